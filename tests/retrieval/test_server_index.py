"""The Qdrant server: what the contract suite does not ask. A server that goes away, foreign points, copies, filters."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from filters_for_tests import FIELDS, TREES, few_values
from hypothesis import given, settings
from qdrant_client import QdrantClient, models
from server_for_tests import Wire

from conftest import SPEC
from eosin.errors import (
    IndexCorruptError,
    IndexMismatchError,
    IndexStoreError,
    IndexUnreachableError,
    MissingDependencyError,
)
from eosin.retrieval import server
from eosin.retrieval.edge import EdgeIndex
from eosin.retrieval.engines import create_index, index_exists, open_index
from eosin.retrieval.exact import ExactIndex
from eosin.retrieval.filters import Between, mask
from eosin.retrieval.qdrant import filter_json, payload_rows
from eosin.retrieval.server import ServerIndex, copy_index

pytestmark = pytest.mark.slow


@pytest.fixture
def wire():
    wire = Wire()
    yield wire
    wire.stop()


@pytest.fixture
def url(wire):
    return f"{wire.base}/tiles"


def same(one, other):
    """Both hold the same points."""
    for hits, theirs in zip(one.scroll(batch=100), other.scroll(batch=100), strict=True):
        np.testing.assert_array_equal(hits.ids, theirs.ids)
        np.testing.assert_allclose(hits.vectors, theirs.vectors, atol=2e-7)
        for name, column in hits.payload.items():
            np.testing.assert_array_equal(column, theirs.payload[name])


def test_the_collection_is_made_as_the_embedded_engine_is(wire, url):
    ServerIndex.create(url, replace(SPEC, quantise="int8")).close()
    kinds = {key: schema.type.value for (_, key), schema in wire.fields.items()}
    assert kinds == {name: "integer" if kind == "bool" else kind for name, kind in SPEC.fields.items()}
    links = {key for (_, key), schema in wire.fields.items() if schema.enable_hnsw}
    assert links == {name for name, kind in SPEC.fields.items() if kind == "keyword"}
    assert wire.client.get_collection("tiles").config.metadata["eosin"]["spec"]["encoder"] == "tiny"


def test_fields_that_the_server_does_not_index_yet_are_indexed_when_opened(wire, url):
    ServerIndex.create(url, SPEC).close()
    del wire.fields["tiles", "site"], wire.fields["tiles", "x"]
    ServerIndex.open(url).close()
    assert {key for _, key in wire.fields} == set(SPEC.fields)


def test_how_a_search_is_asked_for(wire, url, points):
    index = ServerIndex.create(url, replace(SPEC, quantise="binary"))
    points.take(slice(0, 50)).store(index)
    index.search(points.vectors[:1])
    index.search(points.vectors[:1], where=Between("x", 1), exact=True)
    index.search(points.vectors[:1], k=400)
    plain, filtered, many = wire.params
    assert (plain.hnsw_ef, plain.exact, plain.acorn.enable) == (256, False, False)
    assert (plain.quantization.ignore, plain.quantization.rescore) == (False, True)
    assert plain.quantization.oversampling > 1
    assert (filtered.exact, filtered.quantization.ignore, filtered.acorn.enable) == (True, True, True)
    assert many.hnsw_ef == 600
    index.close()


# The server goes away.


def test_down_in_the_middle_the_acknowledged_is_kept_and_the_rest_comes_later(wire, url, points, monkeypatch):
    monkeypatch.setattr(server, "REQUEST_BYTES", 100 * (24 * SPEC.dim + 2048))
    index = ServerIndex.create(url, SPEC)
    points.take(slice(0, 250)).store(index, batch=250)
    wire.left = 2
    rest = points.take(slice(250, 600))
    with pytest.raises(
        IndexUnreachableError, match=r"does not answer .*200 of these 350 are stored.*run the same again"
    ):
        rest.store(index, batch=350)
    for call in (index.count, lambda: index.search(points.vectors[:1]), lambda: list(index.scroll()), index.stats):
        with pytest.raises(IndexUnreachableError, match="does not answer"):
            call()
    wire.left = None
    assert index.count() == 450
    points.store(index, batch=350)
    assert index.count() == 600
    found = index.search(points.vectors[:20], k=10, exact=True)
    assert [hits.ids.tolist() for hits in found] == [points.nearest(q, 10)[0].tolist() for q in points.vectors[:20]]
    index.close()


def test_down_while_copying_the_copy_goes_on_later(wire, url, points, tmp_path):
    index = ServerIndex.create(url, SPEC)
    points.store(index)
    half = ExactIndex.create(tmp_path / "half", SPEC)
    wire.left = 3
    with pytest.raises(IndexUnreachableError):
        copy_index(index, half, batch=100)
    assert half.count() == 300
    with pytest.raises(IndexUnreachableError):
        index.snapshot(tmp_path / "copy")
    assert [file.name for file in tmp_path.iterdir()] == ["half"]
    wire.left = None
    copy_index(index, half)
    copy = open_index(index.snapshot(tmp_path / "copy"))
    same(copy, index)
    same(half, index)
    for one in (half, copy, index):
        one.close()


def test_nobody_listens(wire, url):
    ServerIndex.create(url, SPEC).close()
    wire.stop()
    calls = (
        lambda: open_index(url),
        lambda: create_index(url, SPEC),
        lambda: index_exists(url),
        lambda: ServerIndex.create(url, SPEC),
    )
    for call in calls:
        with pytest.raises(IndexUnreachableError, match=r"/tiles does not answer \(ConnectError"):
            call()


@pytest.mark.parametrize(
    ("status", "headers", "body", "error", "words"),
    [
        (200, {"Content-Type": "text/html"}, b"<html>hello</html>", IndexStoreError, "not a Qdrant server's"),
        (404, {}, b"not here", IndexStoreError, "could not .*: 404 not here"),
        (500, {}, b"out of disk", IndexStoreError, "could not .*: 500 out of disk"),
        (503, {}, b"", IndexUnreachableError, "does not answer now"),
        (429, {"Retry-After": "7"}, b"{}", IndexUnreachableError, "too much to do .* again in 7 s"),
    ],
)
def test_answers_that_are_none(wire, url, status, headers, body, error, words):
    wire.raw = status, headers, body
    for call in (lambda: ServerIndex.open(url), lambda: ServerIndex.exists(url), lambda: ServerIndex.create(url, SPEC)):
        with pytest.raises(error, match=words):
            call()


def test_the_key_is_asked_for_and_used(wire, url, points):
    wire.key = "secret"
    with pytest.raises(IndexStoreError, match="give an API key that allows it"):
        ServerIndex.create(url, SPEC)
    with pytest.warns(UserWarning, match="insecure connection"):
        index = ServerIndex.create(url, SPEC, api_key="secret")
    points.take(slice(0, 5)).store(index)
    assert index.count() == 5
    index.close()


def test_optimise_waits_for_the_server(wire, url, points, monkeypatch):
    monkeypatch.setattr(server, "LOOK_EVERY_S", 0.0)
    index = ServerIndex.create(url, SPEC)
    wire.statuses, wire.requests = ["grey", "yellow", "yellow"], []
    index.optimise()
    assert wire.requests == [("PATCH", "/collections/tiles")] + 4 * [("GET", "/collections/tiles")]
    wire.statuses = ["yellow", "red"]
    with pytest.raises(IndexStoreError, match="could not be optimised"):
        index.optimise()
    wire.statuses = ["yellow"]
    assert index.stats()["status"] == "yellow"
    index.close()


# What is not ours.


def test_a_collection_that_eosin_did_not_make(wire, url):
    vectors = models.VectorParams(size=24, distance=models.Distance.COSINE)
    wire.client.create_collection("tiles", vectors)
    with pytest.raises(IndexStoreError, match="eosin did not make"):
        ServerIndex.open(url)
    with pytest.raises(IndexStoreError, match="holds a collection already"):
        ServerIndex.create(url, SPEC)
    about = {"format": "eosin-index", "version": 99, "spec": SPEC.to_dict()}
    wire.client.create_collection("newer", vectors, metadata={"eosin": about})
    with pytest.raises(IndexStoreError, match="index format 99, this eosin reads up to 1"):
        ServerIndex.open(f"{wire.base}/newer")
    wire.client.create_collection("other", vectors, metadata={"eosin": {**about, "version": 1, "spec": {"dim": 5}}})
    with pytest.raises(IndexStoreError, match="eosin did not make"):
        ServerIndex.open(f"{wire.base}/other")
    spec = replace(SPEC, dim=25).to_dict()
    wire.client.create_collection("wide", vectors, metadata={"eosin": {**about, "version": 1, "spec": spec}})
    with pytest.raises(IndexCorruptError, match="its vectors have 25 numbers"):
        ServerIndex.open(f"{wire.base}/wide")


def test_a_server_that_keeps_no_metadata_is_too_old(wire, url, monkeypatch):
    create = wire.client.create_collection
    monkeypatch.setattr(wire.client, "create_collection", lambda name, vectors, metadata: create(name, vectors))
    with pytest.raises(IndexStoreError, match=r"1\.16 or newer"):
        ServerIndex.create(url, SPEC)
    assert not ServerIndex.exists(url)


def test_points_of_somebody_else_are_told(wire, url, points):
    index = ServerIndex.create(url, SPEC)
    points.take(slice(0, 5)).store(index)
    whole = payload_rows(points.take(slice(0, 1)).payload)[0]
    word = "bf3f4d29-4a1f-4b44-9e6c-1c2d3e4f5a6b"
    for point in (
        models.PointStruct(id=word, vector=[1.0] * 24, payload=whole),
        models.PointStruct(id=7, vector=[1.0] * 24, payload={**whole, "x": "left"}),
    ):
        wire.client.upsert("tiles", [point])
        with pytest.raises(IndexCorruptError):
            list(index.scroll())
        wire.client.delete("tiles", [point.id])
    wire.client.upsert("tiles", [models.PointStruct(id=8, vector=[0.0] * 24, payload=whole)])
    with pytest.raises(IndexCorruptError, match="vector of point 8 is lost"):
        list(index.scroll())
    index.close()


def test_no_collection_there(wire, url):
    assert not index_exists(url)
    with pytest.raises(IndexStoreError, match="no collection 'tiles'"):
        ServerIndex.open(url)


@pytest.mark.parametrize("url", ["http://localhost:6333", "http://localhost:6333/", "http:///tiles", "tiles"])
def test_an_address_without_a_collection(url):
    with pytest.raises(IndexStoreError, match="names no collection"):
        ServerIndex.open(url)


def test_parts_of_an_address():
    assert server._address("https://host:1/a/b/tiles%20of%20A/") == ("https://host:1/a/b", "tiles of A")


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(MissingDependencyError, match=r"qdrant-client.*eosin\[search\]"):
        ServerIndex.open("http://localhost:6333/tiles")


# Copies.


@pytest.mark.parametrize("engine", [EdgeIndex, ExactIndex])
def test_a_folder_is_brought_to_the_server_and_back(wire, url, points, tmp_path, engine):
    folder = engine.create(tmp_path / "i", SPEC)
    points.store(folder)
    there = ServerIndex.create(url, replace(SPEC, quantise="int8"))
    seen: list[int] = []
    assert copy_index(folder, there, batch=250, progress=seen.append) == 600
    assert seen == [250, 500, 600]
    assert copy_index(folder, there) == 600
    assert there.count() == 600
    same(folder, there)
    back = engine.create(tmp_path / "back", SPEC)
    copy_index(there, back)
    same(folder, back)
    for index in (folder, there, back):
        index.close()


def test_copies_of_other_features_are_refused(wire, url, tmp_path):
    one = ExactIndex.create(tmp_path / "i", replace(SPEC, encoder="huge"))
    two = ExactIndex.create(tmp_path / "j", replace(SPEC, fields={"site": "keyword"}))
    there = ServerIndex.create(url, SPEC)
    with pytest.raises(IndexMismatchError, match="encoder: the index to copy has huge, the index tiny"):
        copy_index(one, there)
    with pytest.raises(IndexMismatchError, match="the fields differ"):
        copy_index(two, there)
    there.close()


# Filters, by another engine's reading of the same JSON.


@pytest.fixture(scope="module")
def in_memory():
    vectors, payload = few_values()
    client = QdrantClient(":memory:")
    client.create_collection("c", models.VectorParams(size=4, distance=models.Distance.COSINE))
    rows = json.loads(json.dumps(payload_rows(payload), allow_nan=False))
    client.upsert("c", models.Batch(ids=list(range(200)), vectors=vectors.tolist(), payloads=rows))
    yield client, payload
    client.close()


@settings(max_examples=60, deadline=None)
@given(where=TREES)
def test_any_filter_means_what_mask_says(in_memory, where):
    client, payload = in_memory
    condition = json.loads(json.dumps(filter_json(where, FIELDS), allow_nan=False))
    points, _ = client.scroll("c", models.Filter.model_validate(condition), limit=200)
    assert [point.id for point in points] == np.flatnonzero(mask(where, payload)).tolist()


def test_missing_floats_have_no_key():
    rows = payload_rows({"a": np.array([np.nan, 1.0, -np.inf]), "b": np.array([True, False, True])})
    assert rows == [{"b": 1}, {"a": 1.0, "b": 0}, {"a": -sys.float_info.max, "b": 1}]
    assert all(math.isfinite(row.get("a", 0.0)) for row in rows)
