"""What all engines share: ids of tiles, examples as one query, diversity, specs that may not be mixed."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from conftest import SPEC
from eosin.errors import IndexMismatchError, QueryError
from eosin.retrieval.inputs import check_payload, id_array, mmr_order, mmr_pool, recommended, unit_queries
from eosin.retrieval.protocol import Hits, IndexSpec, check_same_features, tile_ids


def test_ids_are_the_hash_their_docstring_describes():
    xy = np.array([[0, 0], [448, 0], [10**9, 7]])
    for (x, y), found in zip(xy.tolist(), tile_ids("a/ä.svs", xy, SPEC).tolist(), strict=True):
        text = f"('a/ä.svs', 224, 0.5, 'tiny', '{'ab' * 32}')".encode()
        place = x.to_bytes(8, "little", signed=True) + y.to_bytes(8, "little", signed=True)
        digest = hashlib.blake2b(text + place, digest_size=8).digest()
        assert found == int.from_bytes(digest, "big") % 2**63


def test_ids_tell_places_and_features_apart():
    xy = np.stack(np.meshgrid(np.arange(0, 20000, 100), np.arange(0, 20000, 100)), axis=-1).reshape(-1, 2)
    ids = tile_ids("a.svs", xy, SPEC)
    assert ids.dtype == np.uint64
    assert len(np.unique(ids)) == len(xy)
    assert (ids < 2**63).all()
    changes = ({"mpp": 0.25}, {"tile_px": 256}, {"encoder": "other"}, {"weights_sha256": None})
    for other in [
        tile_ids("b.svs", xy, SPEC),
        *(tile_ids("a.svs", xy, dataclasses.replace(SPEC, **c)) for c in changes),
    ]:
        assert not np.isin(other, ids).any()
    same = dataclasses.replace(SPEC, quantise="int8", fields={})
    np.testing.assert_array_equal(tile_ids("a.svs", xy[::-1].astype(np.int32), same), ids[::-1])


def test_texts_and_numbers_of_numpy_are_what_they_say():
    xy = np.array([[0, 0], [448, 7]])
    spec = dataclasses.replace(SPEC, encoder=np.str_("tiny"), mpp=np.float64(0.5), tile_px=np.int64(224))
    np.testing.assert_array_equal(tile_ids(np.str_("a.svs"), xy, spec), tile_ids("a.svs", xy, SPEC))
    columns = {"word": np.array([np.str_("a"), "b"], object), "words": np.array(["a", "b"])}
    for column in check_payload(columns, {"word": "keyword", "words": "keyword"}, 2).values():
        assert [type(value) for value in column] == [str, str]
        assert column.tolist() == ["a", "b"]


def naive_mmr(score, vectors, k, relevance):
    """The formula, one candidate at a time."""
    chosen = []
    while len(chosen) < min(k, len(score)):
        values = {
            at: relevance * score[at] - (1 - relevance) * max(vectors[at] @ vectors[one] for one in chosen)
            if chosen
            else score[at]
            for at in range(len(score))
            if at not in chosen
        }
        chosen.append(max(values, key=lambda at: (values[at], -at)))
    return chosen


@pytest.mark.parametrize("relevance", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_mmr_is_its_formula(relevance):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = rng.normal(size=5)
    score = np.sort(vectors @ query / np.linalg.norm(query))[::-1]
    vectors = vectors[np.argsort(-(vectors @ query))]
    assert mmr_order(score, vectors, 12, relevance).tolist() == naive_mmr(score, vectors, 12, relevance)


def test_mmr_ends_and_edges():
    score, vectors = np.array([0.9, 0.9, 0.8], np.float32), np.eye(3, dtype=np.float32)[[0, 0, 1]]
    assert mmr_order(score, vectors, 3, 1.0).tolist() == [0, 1, 2]
    assert mmr_order(score, vectors, 2, 0.5).tolist() == [0, 2], "a copy comes after something new"
    assert mmr_order(score, vectors, 9, 0.5).tolist() == [0, 2, 1]
    assert mmr_order(score[:0], vectors[:0], 3, 0.5).tolist() == []
    with pytest.raises(QueryError, match="mmr"):
        mmr_order(score, vectors, 2, 1.5)
    assert [mmr_pool(k) for k in (1, 10, 50)] == [100, 100, 500]


def test_examples_as_one_query():
    positive, negative = np.array([[2.0, 0, 0], [0, 0.1, 0]]), np.array([[0, 0, 7.0]])
    spec = dataclasses.replace(SPEC, dim=3)
    wanted = np.array([0.5, 0.5, 0]) * 2 - np.array([0, 0, 1])
    np.testing.assert_allclose(recommended(positive, negative, spec)[0], wanted / np.linalg.norm(wanted), rtol=1e-6)
    np.testing.assert_allclose(recommended(positive, None, spec)[0], [0.5**0.5, 0.5**0.5, 0], rtol=1e-6)
    np.testing.assert_array_equal(recommended(positive, negative[:0], spec), recommended(positive, None, spec))


def test_queries_of_any_length_have_length_one():
    found = unit_queries(np.array([[3e-10, 4e-10], [3e10, 4e10]]), dataclasses.replace(SPEC, dim=2))
    np.testing.assert_allclose(found, [[0.6, 0.8]] * 2, rtol=1e-6)
    assert found.dtype == np.float32
    with pytest.raises(QueryError, match="too long for float32"):
        unit_queries(np.array([3e20, 4e20]), dataclasses.replace(SPEC, dim=2))
    with pytest.raises(QueryError, match=r"numbers of shape \(n, 2\)"):
        unit_queries(np.array([["a", "b"]]), dataclasses.replace(SPEC, dim=2))


def test_payload_columns_become_the_types_of_the_spec():
    fields = {"a": "keyword", "b": "integer", "c": "float", "d": "bool"}
    given = {"d": np.array([True]), "a": np.array(["x"]), "b": np.array([3], np.uint8), "c": np.array([2])}
    found = check_payload(given, fields, 1)
    assert {name: column.dtype for name, column in found.items()} == {"a": object, "b": int, "c": float, "d": bool}
    assert list(found) == list(fields)


@pytest.mark.parametrize("ids", [[1.5], [-1], [[1]], ["a"], 3])
def test_what_is_no_list_of_ids(ids):
    with pytest.raises(QueryError, match="ids must be whole numbers"):
        id_array(np.asarray(ids))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("encoder", "uni2", "encoder: the query has uni2, the index tiny"),
        ("weights_sha256", "cd" * 32, f"weights_sha256: the query has {'cd' * 32}, the index {'ab' * 32}"),
        ("mpp", 0.25, r"mpp: the query has 0\.25, the index 0\.5"),
        ("tile_px", 256, "tile_px: the query has 256, the index 224"),
        ("dim", 384, "dim: the query has 384, the index 24"),
    ],
)
def test_features_that_may_not_be_mixed(name, value, words):
    other = dataclasses.replace(SPEC, **{name: value})
    with pytest.raises(IndexMismatchError, match=words):
        check_same_features(SPEC, other, "the query")
    check_same_features(SPEC, dataclasses.replace(SPEC, quantise="int8", fields={}), "the query")


def test_what_else_made_the_features_matters_where_both_say_it():
    known = dataclasses.replace(SPEC, made_with={"pooling": "cls", "stain": None})
    other = dataclasses.replace(SPEC, made_with={"pooling": "mean", "stain": {"method": "macenko"}})
    with pytest.raises(IndexMismatchError, match=r"pooling: it has mean, the index cls\n  stain: it has {'method"):
        check_same_features(known, other, "it")
    check_same_features(known, SPEC, "it")
    check_same_features(SPEC, other, "it")


def test_a_spec_survives_json():
    made_with = {"pooling": "cls", "stain": None, "version": 2}
    spec = dataclasses.replace(SPEC, quantise="binary", mpp=1 / 3, made_with=made_with)
    assert IndexSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(TypeError):
        IndexSpec.from_dict({**spec.to_dict(), "colour": 1})


def test_some_of_the_hits():
    hits = Hits(
        ids=np.arange(4, dtype=np.uint64),
        score=np.linspace(1, 0, 4, dtype=np.float32),
        payload={"site": np.array(list("ABCD"), object)},
        vectors=np.eye(4, dtype=np.float32),
        wanted=6,
    )
    part = hits.take(np.array([2, 0]))
    assert (part.ids.tolist(), part.payload["site"].tolist(), part.wanted) == ([2, 0], ["C", "A"], 6)
    assert (part.lacking, hits.lacking) == (4, 2)
    np.testing.assert_array_equal(part.vectors, np.eye(4)[[2, 0]])
    assert hits.take(hits.score > 0.5).ids.tolist() == [0, 1]
