"""From a feature store to an index: what is stored, what is skipped, what is refused, what a killed build leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import eosin
from eosin.cohort.table import read_cohort
from eosin.errors import (
    CohortError,
    IndexCorruptError,
    IndexLockedError,
    IndexMismatchError,
    IndexStoreError,
    StoreError,
    StoreMismatchError,
)
from eosin.features.store import FeatureStore, Recipe
from eosin.heads.neighbours import nearest
from eosin.retrieval import build, points
from eosin.retrieval.build import build_index, open_one_store, store_spec
from eosin.retrieval.engines import create_index, open_index
from eosin.retrieval.exact import ExactIndex
from eosin.retrieval.filters import Is, Not
from eosin.retrieval.protocol import tile_ids
from eosin.tiles import TileSpec

DIM = 16


def make_recipe(**changes):
    parts = {
        "encoder": {
            "name": "tiny",
            "dim": DIM,
            "weights_hash": "ab" * 32,
            "pooling": "cls",
            **changes.pop("encoder", {}),
        },
        "tile": {"tile_px": 224, "mpp": 0.5, "overlap_px": 0, **changes.pop("tile", {})},
    }
    rest = {
        "tissue": {},
        "qc": {},
        "stain": None,
        "precision": "fp32",
        "dtype": "float32",
        "tokens": False,
        "icc": False,
    }
    return Recipe(**parts, **{**rest, **changes})


def add_slide(store, slide_id, n=40, *, seed=0, fingerprint="f", zero=None):
    """Write a slide whose fourth tiles are rejected; return its features, corners and quality."""
    rng = np.random.default_rng([seed, *slide_id.encode()])
    dim = store.recipe.encoder["dim"]
    x = rng.normal(size=(n, dim)).astype(np.float32)
    if zero is not None:
        x[zero] = 0
    xy = np.stack([np.arange(n) * 448, rng.integers(0, 9000, n)], axis=1)
    qc = {"focus": rng.random(n, dtype=np.float32), "read_status": np.zeros(n, np.int8), "ink": rng.random(n) < 0.5}
    meta = {"size_px": (90000, 9000), "mpp": {"x": 0.25, "y": 0.2501}, "fingerprint": fingerprint}
    with store.writer(slide_id, meta=meta) as writer:
        writer.append(x, xy, qc)
        writer.finish((np.arange(n) % 4 == 3).astype(np.int8))
    return x, xy, qc


@pytest.fixture
def store(tmp_path):
    store = FeatureStore.create(tmp_path / "features", make_recipe())
    for slide_id in ("a/one.svs", "b/two.svs", "three.svs"):
        add_slide(store, slide_id)
    return store


def table(**columns):
    return read_cohort(pd.DataFrame(columns))


def contents(path):
    """Everything of an index, in the order of ids."""
    index = open_index(path)
    parts = list(index.scroll())
    index.close()
    columns = {name: np.concatenate([part.payload[name] for part in parts]) for name in parts[0].payload}
    return np.concatenate([part.ids for part in parts]), np.concatenate([part.vectors for part in parts]), columns


def same_contents(one, other):
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    assert list(one[2]) == list(other[2])
    for name, column in one[2].items():
        np.testing.assert_array_equal(column, other[2][name], err_msg=name)


# What is stored


def test_every_kept_tile_with_what_is_known_of_it(store, tmp_path):
    x, xy, qc = add_slide(store, "c/four.svs", 30, seed=5)
    cohort = table(
        slide_id=["c/four.svs", "one", "two.svs"],
        patient=["P4", "P1", "P1"],
        site=["Utrecht", "Utrecht", None],
        scanner=["S1", "S2", "S2"],
        organ=["breast", "breast", "colon"],
        grade=[1, 2, 3],
    )
    result = build_index(store.path, tmp_path / "index", cohort=cohort, label="grade")
    assert (result.tiles, result.points, result.engine) == (113, 113, "exact")
    assert result.done == ("a/one.svs", "b/two.svs", "c/four.svs", "three.svs")
    assert (result.skipped, result.failed) == ((), {})
    assert result.notes == ("1 of 4 slides are not in data frame, such as three.svs",)
    index = open_index(tmp_path / "index")
    assert index.spec.weights_sha256 == "ab" * 32
    assert (index.spec.encoder, index.spec.dim, index.spec.mpp, index.spec.tile_px) == ("tiny", DIM, 0.5, 224)
    keep = np.arange(30) % 4 != 3
    hits = index.retrieve(tile_ids("c/four.svs", xy[keep], index.spec))
    assert len(hits) == 23
    np.testing.assert_allclose(hits.vectors, (x / np.linalg.norm(x, axis=1, keepdims=True))[keep], atol=2e-7)
    wanted = {
        "slide_id": "c/four.svs",
        "patient_id": "P4",
        "site": "Utrecht",
        "scanner": "S1",
        "stain": "",
        "organ": "breast",
        "label": "1",
        "x": xy[keep, 0],
        "y": xy[keep, 1],
        "mpp": 0.5,
        "tile_px": 224,
        "size0_px": 448.0,
        "size0_height_px": 224 * 0.5 / 0.2501,
        "qc_focus": qc["focus"][keep].astype(float),
        "qc_read_status": 0,
        "qc_ink": qc["ink"][keep],
    }
    assert set(hits.payload) == {*wanted, "fingerprint"}
    for name, column in wanted.items():
        np.testing.assert_array_equal(hits.payload[name], np.broadcast_to(column, 23), err_msg=name)
    assert index.facet("patient_id") == {"P1": 60, "three.svs": 30, "P4": 23}
    assert index.facet("site") == {"": 60, "Utrecht": 53}
    assert index.facet("label") == {"2": 30, "3": 30, "": 30, "1": 23}
    index.close()


def test_without_a_table_a_slide_is_a_patient(store, tmp_path):
    build_index(store.path, tmp_path / "index")
    found = contents(tmp_path / "index")[2]
    np.testing.assert_array_equal(found["patient_id"], found["slide_id"])
    assert set(found["site"]) == {""}


def test_labels_of_tiles(store, tmp_path):
    xy = store["three.svs"].xy
    cohort = table(
        slide_id=["three.svs", "three.svs", "three.svs", "one.svs"],
        x=[xy[0, 0], xy[5, 0], 77, None],
        y=[xy[0, 1], xy[5, 1], 77, None],
        label=["tumour", "stroma", "fat", "normal"],
    )
    build_index(store.path, tmp_path / "index", cohort=cohort)
    found = contents(tmp_path / "index")[2]
    told = {(s, x): label for s, x, label in zip(found["slide_id"], found["x"], found["label"], strict=True) if label}
    assert told.pop(("three.svs", int(xy[0, 0]))) == "tumour"
    assert told.pop(("three.svs", int(xy[5, 0]))) == "stroma"
    assert set(told.values()) == {"normal"}
    assert len(told) == 30


@pytest.mark.parametrize(
    ("columns", "label", "words"),
    [
        (
            {"slide_id": ["five"], "site": ["A"]},
            None,
            r"none of its slides is in the store; it names five, the store a/",
        ),
        ({"slide_id": ["two"], "site": ["A"]}, "grade", "no column 'grade'; closest: "),
        (None, "grade", "give the table too"),
    ],
)
def test_tables_that_do_not_fit(store, tmp_path, columns, label, words):
    cohort = None if columns is None else table(**columns)
    with pytest.raises(CohortError, match=words):
        build_index(store.path, tmp_path / "index", cohort=cohort, label=label)


def test_rows_of_a_slide_that_disagree_fail_it(store, tmp_path):
    cohort = table(slide_id=["two", "two", "one"], site=["A", "B", "C"])
    result = build_index(store.path, tmp_path / "index", cohort=cohort)
    assert set(result.failed) == {"b/two.svs"}
    assert "b/two.svs has 2 values of site (A, B)" in result.failed["b/two.svs"]
    assert result.done == ("a/one.svs", "three.svs")


def test_a_name_of_two_slides(store, tmp_path):
    add_slide(store, "z/two.svs")
    with pytest.raises(CohortError, match=r"'two' names 2 slides of the store \(b/two\.svs, z/two\.svs\)"):
        build_index(store.path, tmp_path / "index", cohort=table(slide_id=["two"], site=["A"]))
    build_index(store.path, tmp_path / "index", cohort=table(slide_id=["z/two.svs"], site=["A"]))
    assert open_index(tmp_path / "index").facet("site") == {"": 90, "A": 30}


def test_progress_is_told(store, tmp_path):
    told = []
    build_index(store.path, tmp_path / "index", progress=told.append)
    assert [(s.slide_id, s.done, s.total, s.tiles) for s in told] == [
        ("a/one.svs", 1, 3, 30),
        ("b/two.svs", 2, 3, 60),
        ("three.svs", 3, 3, 90),
        ("", 3, 3, 90),
    ]


def test_half_precision_features_stay_half(tmp_path):
    store = FeatureStore.create(tmp_path / "features", make_recipe(dtype="float16"))
    add_slide(store, "a.svs")
    build_index(store.path, tmp_path / "index")
    index = open_index(tmp_path / "index")
    assert index.stats()["dtype"] == "float16"
    kept = store["a.svs"].x[store["a.svs"].kept].astype(np.float64)
    found = index.retrieve(tile_ids("a.svs", store["a.svs"].xy[store["a.svs"].kept], index.spec)).vectors
    np.testing.assert_allclose(found, kept / np.linalg.norm(kept, axis=1, keepdims=True), atol=1e-7)


def test_codes_are_made(store, tmp_path):
    build_index(store.path, tmp_path / "index", quantise="int8")
    assert open_index(tmp_path / "index").stats()["optimised"] == 90


def test_an_imported_store_that_does_not_say_everything(tmp_path):
    bare = make_recipe(tile={"tile_px": None, "mpp": None}, encoder={"weights_hash": ""})
    store = FeatureStore.create(tmp_path / "features", bare)
    with store.writer("a.svs", meta={"size_px": None, "mpp": None, "fingerprint": "f"}) as writer:
        writer.append(np.ones((3, DIM)), np.arange(6).reshape(3, 2))
        writer.finish()
    build_index(store.path, tmp_path / "index")
    index = open_index(tmp_path / "index")
    assert (index.spec.mpp, index.spec.tile_px, index.spec.weights_sha256) == (None, None, None)
    assert "tile_px" not in index.spec.fields
    (hits,) = index.search(np.ones(DIM), k=1)
    assert np.isnan(hits.payload["mpp"]).all()
    assert np.isnan(hits.payload["size0_px"]).all()
    nameless = FeatureStore.create(tmp_path / "nameless", make_recipe(encoder={"name": None}))
    with pytest.raises(StoreError, match="does not say which encoder made it"):
        store_spec(nameless)


# Again and again


def test_a_second_build_changes_nothing(store, tmp_path):
    build_index(store.path, tmp_path / "index")
    before, size = contents(tmp_path / "index"), open_index(tmp_path / "index").stats()["bytes_on_disk"]
    result = build_index(store.path, tmp_path / "index")
    assert (result.done, result.tiles, result.points) == ((), 0, 90)
    assert result.skipped == ("a/one.svs", "b/two.svs", "three.svs")
    same_contents(contents(tmp_path / "index"), before)
    assert open_index(tmp_path / "index").stats()["bytes_on_disk"] == size


def test_new_and_changed_slides_are_stored(store, tmp_path):
    build_index(store.path, tmp_path / "index")
    add_slide(store, "b/two.svs", 12, seed=9, fingerprint="g")
    add_slide(store, "four.svs", 8)
    result = build_index(store.path, tmp_path / "index")
    assert result.done == ("b/two.svs", "four.svs")
    assert result.skipped == ("a/one.svs", "three.svs")
    build_index(store.path, tmp_path / "fresh")
    same_contents(contents(tmp_path / "index"), contents(tmp_path / "fresh"))
    assert open_index(tmp_path / "index").count(Is("slide_id", ("b/two.svs",))) == 9


def test_a_new_label_is_stored(store, tmp_path):
    build_index(store.path, tmp_path / "index")
    cohort = table(slide_id=["a/one.svs", "b/two.svs", "three.svs"], label=["x", "", "y"])
    result = build_index(store.path, tmp_path / "index", cohort=cohort)
    assert result.done == ("a/one.svs", "three.svs")
    assert open_index(tmp_path / "index").facet("label") == {"": 30, "x": 30, "y": 30}


def test_two_stores_of_one_recipe_share_an_index(store, tmp_path):
    other = FeatureStore.create(tmp_path / "more", make_recipe())
    add_slide(other, "z.svs")
    build_index(store.path, tmp_path / "index")
    assert build_index(other.path, tmp_path / "index").points == 120


def test_a_slide_without_kept_tiles_is_told(store, tmp_path):
    with store.writer("empty.svs", meta={"size_px": None, "mpp": None, "fingerprint": "f"}) as writer:
        writer.finish()
    result = build_index(store.path, tmp_path / "index")
    assert result.notes == ("empty.svs: quality control kept no tile",)
    assert (result.failed, result.points) == ({}, 90)


def test_auto_takes_the_graph_when_there_are_many(store, tmp_path, monkeypatch):
    pytest.importorskip("qdrant_edge")
    pytest.importorskip("eosin.retrieval.edge")
    build_index(store.path, tmp_path / "few")
    assert open_index(tmp_path / "few").stats()["engine"] == "exact"
    monkeypatch.setattr(build, "FEW", 50)
    monkeypatch.setattr("eosin.retrieval.engines.FEW", 50)
    assert build_index(store.path, tmp_path / "many").engine == "edge"
    many, few = contents(tmp_path / "many"), contents(tmp_path / "few")
    np.testing.assert_array_equal(many[0], few[0])
    np.testing.assert_allclose(many[1], few[1], atol=2e-7)
    assert build_index(store.path, tmp_path / "few").engine == "exact", "an index keeps its engine"


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": {"name": "uni2"}}, "encoder: what is to be stored has uni2, the index tiny"),
        ({"encoder": {"weights_hash": "cd" * 32}}, "weights_sha256: "),
        ({"encoder": {"dim": 8}}, "dim: what is to be stored has 8, the index 16"),
        ({"tile": {"mpp": 0.25}}, r"mpp: what is to be stored has 0\.25, the index 0\.5"),
        ({"tile": {"tile_px": 256}}, "tile_px: what is to be stored has 256, the index 224"),
        ({"tile": {"filter": "box"}}, "filter: what is to be stored has box, the index None"),
        ({"encoder": {"pooling": "mean"}}, "pooling: what is to be stored has mean, the index cls"),
        ({"stain": {"method": "macenko"}}, r"stain: what is to be stored has {'method': 'macenko'}, the index None"),
        ({"icc": True}, "icc: what is to be stored has True, the index False"),
    ],
)
def test_other_features_are_not_mixed_in(store, tmp_path, change, words):
    build_index(store.path, tmp_path / "index")
    before = contents(tmp_path / "index")
    other = FeatureStore.create(tmp_path / "other", make_recipe(**change))
    add_slide(other, "z.svs")
    with pytest.raises(IndexMismatchError, match=words):
        build_index(other.path, tmp_path / "index")
    same_contents(contents(tmp_path / "index"), before)


def test_other_columns_and_codes_are_refused_by_name(store, tmp_path):
    build_index(store.path, tmp_path / "index")
    with pytest.raises(IndexMismatchError, match="quantise: int8 asked for, none in the index"):
        build_index(store.path, tmp_path / "index", quantise="int8")
    spec = store_spec(store, fields={"site": "keyword"})
    with pytest.raises(IndexMismatchError, match="slide_id: nothing to be stored, keyword in the index"):
        create_index(tmp_path / "index", spec)


def test_a_broken_slide_does_not_stop_the_others(store, tmp_path):
    file = store.path / "b/two.svs.h5"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    add_slide(store, "zero.svs", zero=8)
    result = build_index(store.path, tmp_path / "index")
    assert result.points == 60
    assert set(result.failed) == {"b/two.svs", "zero.svs"}
    assert "two.svs.h5 cannot be read" in result.failed["b/two.svs"]
    assert "zero.svs: 1 of 30 vectors cannot be indexed: row 6" in result.failed["zero.svs"]
    assert json.loads((tmp_path / "index/build.json").read_text())["failed"] == result.failed
    file.write_bytes(whole)
    again = build_index(store.path, tmp_path / "index")
    assert again.done == ("b/two.svs",)
    assert again.points == 90


def test_positions_that_come_twice_fail_their_slide(store, tmp_path):
    with store.writer("twice.svs", meta={"size_px": None, "mpp": None, "fingerprint": "f"}) as writer:
        qc = {"focus": np.ones(2, np.float32), "read_status": np.zeros(2, np.int8), "ink": np.zeros(2, bool)}
        writer.append(np.eye(2, DIM), np.zeros((2, 2), int), qc)
        writer.finish()
    assert "more than once" in build_index(store.path, tmp_path / "index").failed["twice.svs"]


def test_a_slide_with_other_quality_columns_fails(store, tmp_path):
    with store.writer("zz.svs", meta={"size_px": None, "mpp": None, "fingerprint": "f"}) as writer:
        writer.append(np.ones((2, DIM)), np.arange(4).reshape(2, 2), {"focus": np.ones(2, np.float32)})
        writer.finish()
    assert "no quality column 'ink'" in build_index(store.path, tmp_path / "index").failed["zz.svs"]


def test_folders_that_are_no_store(store, tmp_path):
    with pytest.raises(StoreError, match="not a feature store"):
        build_index(tmp_path / "nothing", tmp_path / "index")
    empty = FeatureStore.create(tmp_path / "empty", make_recipe())
    with pytest.raises(StoreError, match="no finished slide"):
        build_index(empty.path, tmp_path / "index")
    for slide_id in store:
        (store.path / f"{slide_id}.h5").write_bytes(b"")
    with pytest.raises(StoreError, match="none of its 3 slides can be searched"):
        build_index(store.path, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_one_of_several_stores(tmp_path):
    for name in ("tiny", "other"):
        FeatureStore.create(tmp_path / "features" / f"{name}_224px_0.5mpp", make_recipe(encoder={"name": name}))
    assert open_one_store(tmp_path / "features", "other").recipe.encoder["name"] == "other"
    with pytest.raises(StoreError, match=r"holds 2 feature stores \(other_224px_0\.5mpp, tiny_224px_0\.5mpp\)"):
        open_one_store(tmp_path / "features")
    with pytest.raises(StoreError, match="holds no features of 'tinny'; the closest are: tiny"):
        open_one_store(tmp_path / "features", "tinny")
    inside = tmp_path / "features/tiny_224px_0.5mpp"
    assert open_one_store(inside, "tiny").path == inside
    with pytest.raises(StoreMismatchError):
        FeatureStore.create(inside, make_recipe(encoder={"name": "other"}))


def test_a_full_disk_keeps_the_slides_before_it(store, tmp_path, monkeypatch):
    real, written = points._write, []

    def write(handle, data):
        written.append(data.nbytes)
        if len(written) > 5:  # three files a slide: the third of the second slide
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(points, "_write", write)
        with pytest.raises(IndexStoreError, match=r"No space left .* every point stored before is kept: make room"):
            build_index(store.path, tmp_path / "index")
    with pytest.raises(IndexCorruptError, match="holds only some of its slides"):
        open_index(tmp_path / "index")
    partial = open_index(tmp_path / "index", partial=True)
    assert partial.facet("slide_id") == {"a/one.svs": 30}
    partial.close()
    assert build_index(store.path, tmp_path / "index").skipped == ("a/one.svs",)
    build_index(store.path, tmp_path / "fresh")
    same_contents(contents(tmp_path / "index"), contents(tmp_path / "fresh"))


def test_an_index_that_another_writes_is_left_alone(store, tmp_path):
    build_index(store.path, tmp_path / "index")
    add_slide(store, "new.svs")
    other = open_index(tmp_path / "index")
    other.delete(Is("slide_id", ("three.svs",)))
    with pytest.raises(IndexLockedError, match="open for writing elsewhere"):
        build_index(store.path, tmp_path / "index")
    assert open_index(tmp_path / "index").count() == 60, "it is whole and can be read"
    other.close()
    assert build_index(store.path, tmp_path / "index").done == ("new.svs", "three.svs")


# Opening


def test_what_open_and_create_refuse(store, tmp_path):
    spec = store_spec(store)
    with pytest.raises(IndexStoreError, match="is not a search index"):
        open_index(tmp_path / "features")
    with pytest.raises(IndexStoreError, match="holds something that is no index"):
        create_index(store.path, spec)
    with pytest.raises(IndexStoreError, match="unknown engine 'exakt'; the closest are: exact"):
        create_index(tmp_path / "index", spec, engine="exakt")
    with pytest.raises(IndexStoreError, match="it is a folder; a server has an address"):
        open_index(tmp_path / "index", engine="server")
    with pytest.raises(IndexStoreError, match="it is an address"):
        open_index("http://localhost:1/tiles", engine="exact")
    ExactIndex.create(tmp_path / "index", spec).close()
    with pytest.raises(IndexStoreError, match="made by the engine 'exact', not 'edge'"):
        open_index(tmp_path / "index", engine="edge")
    file = tmp_path / "index/index.json"
    whole = file.read_text()
    file.write_text(whole.replace('"exact"', '"novel"'))
    with pytest.raises(IndexStoreError, match="engine 'novel', which is none of exact, edge, server"):
        open_index(tmp_path / "index")
    file.write_text(whole.replace('"complete": true', '"complete": false'))
    with pytest.raises(IndexCorruptError, match="half an index"):
        open_index(tmp_path / "index")
    create_index(tmp_path / "index", spec).close()
    open_index(tmp_path / "index").close()


def test_an_interrupted_create_is_begun_again(tmp_path, store):
    spec = dataclasses.replace(store_spec(store), fields={})
    (tmp_path / "index/g0001").mkdir(parents=True)
    (tmp_path / "index/g0001/rows.bin").write_bytes(b"old")
    (tmp_path / "index/.lock").touch()
    index = create_index(tmp_path / "index", spec)
    index.upsert(np.arange(3, dtype=np.uint64), np.eye(3, DIM), {})
    assert index.count() == 3
    index.close()


def test_a_build_record_that_cannot_be_read(store, tmp_path):
    build_index(store.path, tmp_path / "index")
    (tmp_path / "index/build.json").write_text("{")
    with pytest.raises(IndexCorruptError, match=r"build\.json cannot be used .*run the same eosin index command again"):
        open_index(tmp_path / "index")
    build_index(store.path, tmp_path / "index")
    open_index(tmp_path / "index").close()


# Real slides


@pytest.mark.real
@pytest.mark.slow
def test_all_tiles_of_real_slides(real_data, tmp_path):
    """Every kept tile is there, finds itself first, and its neighbours are those of a plain search of the features."""
    slides = [real_data / "slides" / name for name in ("CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs")]
    store = eosin.extract(slides, TileSpec(tile_px=112, mpp=0.5), "texture", out=tmp_path / "features", workers=0)
    result = build_index(store.path, tmp_path / "index")
    parts = [store[slide_id] for slide_id in store]
    x = np.concatenate([part.x[part.kept] for part in parts])
    assert result.failed == {}
    assert result.points == len(x) >= 100
    index = open_index(tmp_path / "index")
    ids = np.concatenate([tile_ids(part.slide_id, part.xy[part.kept], index.spec) for part in parts])
    distance, rows = nearest(x, x, 10)
    for at, hits in enumerate(index.search(x, k=10)):
        assert hits.ids[0] == ids[at]
        np.testing.assert_allclose(hits.score, 1 - distance[at], atol=1e-6)
        assert len(np.setdiff1d(hits.ids, ids[rows[at]])) <= 1, "near-equal neighbours may swap at the end"
    first = parts[0].slide_id
    other = index.search(x[:5], k=5, where=Not(Is("slide_id", (first,))))
    assert all((hits.payload["slide_id"] != first).all() for hits in other)
    index.close()


# Killed


BUILDER = """
import sys
from eosin.retrieval.build import build_index
build_index(sys.argv[1], sys.argv[2], progress=lambda status: print(status.done, flush=True))
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path):
    """SIGKILL while slides are stored: what was reported stays, and the resumed index is the uninterrupted one."""
    store = FeatureStore.create(tmp_path / "features", make_recipe())
    for at in range(40):
        add_slide(store, f"s{at:02}.svs", 400)
    rng, reported, rounds = random.Random(0), 0, 0
    while rounds < 10:
        rounds += 1
        command = [sys.executable, "-c", BUILDER, str(store.path), str(tmp_path / "index")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            wanted = min(38, reported + rng.randint(1, 5))
            lines = [process.stdout.readline() for _ in range(wanted)]
            time.sleep(rng.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.read().splitlines()
        reported = max(reported, int(lines[-1]))
        if reported == 40:
            break
        with pytest.raises(IndexCorruptError, match="holds only some of its slides"):
            open_index(tmp_path / "index")
        partial = open_index(tmp_path / "index", partial=True)
        counts = partial.facet("slide_id")
        partial.close()
        assert [counts.get(f"s{at:02}.svs") for at in range(reported)] == [300] * reported
        assert set(counts.values()) == {300}, "a slide is stored whole or not at all"
    assert rounds >= 8, "it was killed too seldom to mean anything"
    build_index(store.path, tmp_path / "index")
    build_index(store.path, tmp_path / "fresh")
    same_contents(contents(tmp_path / "index"), contents(tmp_path / "fresh"))
