"""What every engine of the search index must do. Engines join in conftest.py; the oracle is `conftest.Cloud`."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from conftest import SPEC, cloud
from eosin.errors import (
    IndexLockedError,
    IndexMismatchError,
    IndexStoreError,
    NonFiniteError,
    QueryError,
)
from eosin.retrieval.engines import open_index
from eosin.retrieval.filters import All, Any_, Between, Is, Not
from eosin.retrieval.inputs import mmr_order, mmr_pool
from eosin.retrieval.protocol import VectorIndex

FILTERS = {
    "one word": Is("site", ("A",)),
    "words": Is("label", ("tumour", "stroma", "unheard of")),
    "missing word": Is("label", ("",)),
    "comma in a word": Is("label", ("fat, necrosis",)),
    "not a word": Not(Is("patient_id", ("p1", "p2"))),
    "integers": Is("y", (0, 7, 70, 71, 7 * 599)),
    "integer range": Between("x", 1000, 90_000),
    "integer from": Between("x", 150_000),
    "both ends included": Between("y", 7, 14),
    "float range": Between("mpp", 1 / 3, 0.5),
    "float up to": Between("qc_focus", None, 10.0),
    "not a float range, missing values with it": Not(Between("qc_focus", 10.0)),
    "true": Is("qc_pen", (True,)),
    "false": Is("qc_pen", (False,)),
    "either truth": Is("qc_pen", (True, False)),
    "all of them": All((Is("site", ("B",)), Not(Is("label", ("",))), Between("x", 0, 100_000))),
    "any of them": Any_((Is("slide_id", ("s1/Präparat 1.svs",)), Between("qc_focus", 45))),
    "nested": All(
        (Any_((Is("site", ("A",)), Is("site", ("B",)))), Not(All((Is("qc_pen", (True,)), Is("site", ("A",))))))
    ),
    "all of nothing": All(()),
    "any of nothing": Any_(()),
    "nobody": Is("site", ("Z",)),
    "not anybody": Not(Any_(())),
}


@pytest.fixture
def index(engine, points):
    index = engine.create(SPEC)
    points.store(index)
    yield index
    index.close()


def queries(n=8, seed=5, dim=SPEC.dim):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def same_payload(found, wanted):
    assert list(found) == list(wanted)
    for name, column in wanted.items():
        assert found[name].dtype == (object if column.dtype == object else column.dtype), name
        if column.dtype == np.float64:  # text between two machines may cost the last bit
            np.testing.assert_allclose(found[name], column, rtol=1e-15, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], column, err_msg=name)


def everything(index, where=None):
    """All points by id -> (vector, payload row)."""
    found = {}
    for hits in index.scroll(where=where, batch=100):
        for row, one in enumerate(hits.ids.tolist()):
            assert one not in found
            found[one] = hits.vectors[row].tobytes(), tuple(str(c[row]) for c in hits.payload.values())
    return found


def test_is_what_the_protocol_says(index):
    assert isinstance(index, VectorIndex)
    assert index.spec == SPEC
    stats = index.stats()
    assert (stats["engine"], stats["points"], stats["dim"]) == (index.stats()["engine"], 600, SPEC.dim)
    assert stats["bytes_on_disk"] > 0


def test_an_empty_index_answers(engine):
    index = engine.create(SPEC)
    assert index.count() == 0
    (hits,) = index.search(queries(1), k=5, with_vectors=True)
    assert (len(hits), hits.wanted, hits.lacking) == (0, 5, 5)
    assert hits.vectors.shape == (0, SPEC.dim)
    assert list(hits.payload) == list(SPEC.fields)
    assert list(index.scroll()) == []
    assert index.facet("site") == {}
    assert index.delete(Is("site", ("A",))) == 0
    index.optimise()
    index.upsert(np.empty(0, np.uint64), np.empty((0, SPEC.dim), np.float32), cloud(0).payload)
    assert index.count() == 0
    index.close()


@pytest.mark.parametrize("optimised", [False, True])
def test_exact_search_equals_sorting_everything(index, points, optimised):
    if optimised:
        index.optimise()
    asked = queries()
    for query, hits in zip(asked, index.search(asked, k=15, exact=True), strict=True):
        ids, score = points.nearest(query, 15)
        np.testing.assert_array_equal(hits.ids, ids)
        np.testing.assert_allclose(hits.score, score, atol=2e-6)
        assert hits.score.dtype == np.float32
        assert hits.ids.dtype == np.uint64
        assert hits.vectors is None
        rows = [points.ids.tolist().index(one) for one in ids]
        same_payload(hits.payload, points.take(rows).payload)


def test_search_finds_nearly_all_of_the_truth(index, points):
    index.optimise()
    asked = points.vectors[::20]
    found = index.search(asked, k=10)
    right = [len(set(hits.ids) & set(points.nearest(q, 10)[0])) for q, hits in zip(asked, found, strict=True)]
    assert sum(right) >= 0.95 * 10 * len(asked)
    for hits in found:
        assert (np.diff(hits.score) <= 0).all()


@pytest.mark.parametrize("where", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("optimised", [False, True])
def test_filters_are_exact(index, points, where, optimised):
    if optimised:
        index.optimise()
    kept = points.kept(where)
    assert index.count(where) == len(kept)
    assert [one for hits in index.scroll(where=where) for one in hits.ids.tolist()] == sorted(points.ids[kept].tolist())
    for exact in (True, False):
        (hits,) = index.search(queries(1), k=40, where=where, exact=exact)
        assert len(hits) == min(40, len(kept))
        assert hits.lacking == 40 - len(hits)
        assert set(hits.ids.tolist()) <= set(points.ids[kept].tolist())
        if exact:
            np.testing.assert_array_equal(hits.ids, points.nearest(queries(1)[0], 40, where)[0])


def test_fewer_points_than_asked_for(index):
    (hits,) = index.search(queries(1), k=1000)
    assert (len(hits), hits.wanted, hits.lacking) == (600, 1000, 400)


def test_one_vector_is_one_query(index):
    (hits,) = index.search(queries(1)[0], k=3, exact=True)
    np.testing.assert_array_equal(hits.ids, index.search(queries(1), k=3, exact=True)[0].ids)


def test_length_of_a_query_does_not_matter(index):
    short, long = index.search(queries(1) * np.array([[1e-6], [1e6]], np.float32), k=20, exact=True)
    np.testing.assert_array_equal(short.ids, long.ids)


def test_vectors_come_back_with_length_one(index, points):
    (hits,) = index.search(queries(1), k=12, with_vectors=True, exact=True)
    rows = [points.ids.tolist().index(one) for one in hits.ids]
    assert hits.vectors.dtype == np.float32
    np.testing.assert_allclose(hits.vectors, points.units()[rows], atol=2e-7)


def test_retrieve_keeps_the_order_asked(index, points):
    rows = [400, 3, 599, 0]
    asked = np.insert(points.ids[rows], 2, np.uint64(12345))
    hits = index.retrieve(asked)
    np.testing.assert_array_equal(hits.ids, points.ids[rows])
    assert (hits.wanted, hits.lacking) == (5, 1)
    np.testing.assert_allclose(hits.vectors, points.units()[rows], atol=2e-7)
    same_payload(hits.payload, points.take(rows).payload)
    assert len(index.retrieve(np.empty(0, np.uint64))) == 0


@pytest.mark.parametrize("batch", [1, 7, 600, 5000])
def test_scroll_gives_everything_once_by_id(index, points, batch):
    parts = list(index.scroll(batch=batch))
    assert [len(part) for part in parts[:-1]] == [batch] * (len(parts) - 1)
    found = np.concatenate([part.ids for part in parts])
    order = np.argsort(points.ids)
    np.testing.assert_array_equal(found, points.ids[order])
    np.testing.assert_allclose(np.concatenate([p.vectors for p in parts]), points.units()[order], atol=2e-7)
    columns = {name: np.concatenate([part.payload[name] for part in parts]) for name in SPEC.fields}
    same_payload(columns, points.take(order).payload)


def test_upsert_twice_is_once(index, points):
    before = everything(index)
    points.store(index, batch=333)
    assert index.count() == 600
    assert everything(index) == before
    index.optimise()
    assert everything(index) == before


def test_the_same_id_replaces(index, points):
    new = cloud(50, seed=3)
    index.upsert(points.ids[:50], new.vectors, new.payload)
    assert index.count() == 600
    hits = index.retrieve(points.ids[:50])
    np.testing.assert_allclose(hits.vectors, new.units(), atol=2e-7)
    same_payload(hits.payload, new.payload)
    points.vectors[:50] = new.vectors
    for name, column in points.payload.items():
        column[:50] = new.payload[name]
    for where in (None, Is("site", ("A",))):
        (found,) = index.search(queries(1), k=60, where=where, exact=True)
        np.testing.assert_array_equal(found.ids, points.nearest(queries(1)[0], 60, where)[0])


def test_delete_by_filter(index, points):
    where = Is("patient_id", ("p3", "p4"))
    gone = points.kept(where)
    assert index.delete(where) == len(gone)
    assert index.delete(where) == 0
    left = points.take(points.kept(Not(where)))
    assert index.count() == len(left.ids)
    assert sorted(everything(index)) == sorted(left.ids.tolist())
    (hits,) = index.search(points.vectors[gone[:1]], k=30, exact=True)
    np.testing.assert_array_equal(hits.ids, left.nearest(points.vectors[gone[0]], 30)[0])
    index.optimise()
    assert sorted(everything(index)) == sorted(left.ids.tolist())


def test_delete_by_ids_and_store_again(index, points):
    assert index.delete(np.append(points.ids[:7], np.uint64(99))) == 7
    assert index.count() == 593
    assert len(index.retrieve(points.ids[:8])) == 1
    first = points.take(slice(0, 7))
    index.upsert(first.ids, first.vectors, first.payload)
    assert index.count() == 600
    assert len(index.retrieve(points.ids[:8])) == 8


@pytest.mark.parametrize("field", ["site", "label", "slide_id", "qc_pen", "y"])
def test_facet_counts(index, points, field):
    for where in (None, Between("x", 0, 50_000), Is("site", ("Z",))):
        counts = Counter(str(value) for value in points.payload[field][points.kept(where)].tolist())
        found = index.facet(field, where)
        assert found == dict(counts)
        assert list(found.items()) == sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))


def test_facet_of_floats_is_refused(index):
    with pytest.raises(QueryError, match="qc_focus"):
        index.facet("qc_focus")


def test_recommend_is_the_average_of_examples(index, points):
    positive, negative = points.vectors[:4], points.vectors[10:13]
    towards = points.units()[:4].mean(axis=0)
    away = points.units()[10:13].mean(axis=0)
    hits = index.recommend(positive, negative, k=20, exact=True)
    ids, score = points.nearest(towards + (towards - away), 20)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_allclose(hits.score, score, atol=2e-6)
    where = Not(Is("patient_id", ("p1",)))
    alone = index.recommend(positive, k=20, where=where, exact=True)
    np.testing.assert_array_equal(alone.ids, points.nearest(towards, 20, where)[0])


def test_recommend_needs_a_positive_example(index, points):
    with pytest.raises(QueryError, match="no positive example"):
        index.recommend(np.empty((0, SPEC.dim), np.float32), points.vectors[:1], k=3)
    opposite = np.stack([np.eye(SPEC.dim)[0], -np.eye(SPEC.dim)[0]])
    with pytest.raises(QueryError, match="cancel"):
        index.recommend(opposite, k=3)


@pytest.mark.parametrize("relevance", [0.0, 0.3, 1.0])
def test_mmr_chooses_from_the_nearest(index, points, relevance):
    (hits,) = index.search(queries(1), k=9, mmr=relevance, exact=True)
    ids, score = points.nearest(queries(1)[0], mmr_pool(9))
    rows = [points.ids.tolist().index(one) for one in ids]
    order = mmr_order(score.astype(np.float32), points.units()[rows].astype(np.float32), 9, relevance)
    np.testing.assert_array_equal(hits.ids, ids[order])
    assert hits.wanted == 9
    assert hits.vectors is None


def test_reopened_it_is_the_same(engine, index, points):
    before, asked = everything(index), queries(4)
    found = index.search(asked, k=10, exact=True)
    index.close()
    with pytest.raises(IndexStoreError, match="closed"):
        index.count()
    again = engine.reopen()
    assert again.spec == SPEC
    assert everything(again) == before
    for one, other in zip(found, again.search(asked, k=10, exact=True), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.score, other.score)
    again.optimise()
    assert everything(again) == before
    again.close()
    again.close()
    last = engine.reopen()
    assert everything(last) == before
    assert last.facet("site") == dict(Counter(points.payload["site"]).most_common())
    last.close()


def test_a_second_writer_is_refused(engine, index, points):
    if not engine.one_writer:
        pytest.skip("a server takes many writers")
    part = points.take(slice(0, 5))
    with pytest.raises(IndexLockedError, match="close"):
        engine.reopen().upsert(part.ids, part.vectors, part.payload)
    index.close()
    second = engine.reopen()
    second.upsert(part.ids, part.vectors, part.payload)
    assert second.count() == 600
    second.close()


def test_a_snapshot_is_an_index(index, points, tmp_path):
    index.delete(Is("patient_id", ("p1",)))
    before = everything(index)
    folder = index.snapshot(tmp_path / "copy")
    assert folder == tmp_path / "copy"
    index.delete(Is("site", ("A",)))
    copy = open_index(folder)
    assert copy.spec == SPEC
    assert everything(copy) == before
    copy.close()
    with pytest.raises(IndexStoreError, match="copy"):
        index.snapshot(folder)


def test_half_precision_is_kept(engine):
    points = cloud(dtype=np.float16)
    index = engine.create(SPEC)
    points.store(index)
    (hits,) = index.search(queries(1), k=30, exact=True, with_vectors=True)
    ids, score = points.nearest(queries(1)[0], 30)
    np.testing.assert_array_equal(hits.ids, ids)
    np.testing.assert_allclose(hits.score, score, atol=2e-6)
    fine = cloud(50, seed=9)
    index.upsert(fine.ids, fine.vectors, fine.payload)
    np.testing.assert_allclose(index.retrieve(fine.ids).vectors, fine.units(), atol=2e-7)
    np.testing.assert_allclose(index.retrieve(points.ids).vectors, points.units(), atol=2e-7)
    index.close()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, "dim"])
def test_bad_vectors_are_not_stored(index, points, value):
    new = cloud(5, seed=8)
    error, words, vectors = NonFiniteError, f"row 3 .*{new.ids[3]}.*nothing was stored", new.vectors
    if value == "dim":
        error, words, vectors = IndexMismatchError, r"dim: .* 23 numbers, the index 24 \(encoder tiny\)", vectors[:, 1:]
    elif value == 0.0:
        vectors[3] = 0
    else:
        vectors[3, 2] = value
    with pytest.raises(error, match=words):
        index.upsert(new.ids, vectors, new.payload)
    assert index.count() == 600
    assert len(index.retrieve(new.ids)) == 0


@pytest.mark.parametrize("value", [np.nan, -np.inf, 0.0, "dim"])
def test_bad_queries_are_refused(index, value):
    asked = queries(3)
    error, words = QueryError, "query 1 of 3"
    if value == "dim":
        error, words, asked = IndexMismatchError, r"dim: .* 25 numbers, the index 24", queries(3, dim=25)
    elif value == 0.0:
        asked[1] = 0
        words = "query 1 of 3 is all zeros"
    else:
        asked[1, 4] = value
    with pytest.raises(error, match=words):
        index.search(asked)
    with pytest.raises(error):
        index.recommend(asked)
    with pytest.raises(error):
        index.recommend(queries(1), asked)


def test_an_id_twice_in_one_call_is_refused(index):
    new = cloud(6, seed=8)
    new.ids[4] = new.ids[1]
    with pytest.raises(QueryError, match=rf"more than once in one call, first {new.ids[1]}; nothing was stored"):
        index.upsert(new.ids, new.vectors, new.payload)
    assert index.count() == 600


def changed(payload, **columns):
    return {name: column for name, column in {**payload, **columns}.items() if column is not None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"site": None}, "lacks site"),
        ({"sites": np.array(["A"] * 5, object)}, "no field 'sites'; the closest are: site"),
        ({"x": np.zeros(5)}, "'x' must be integer, not float64"),
        ({"site": np.arange(5)}, "'site' must be keyword"),
        ({"site": np.array(["A", None, "B", "C", "D"], object)}, "'site' must be text, not None"),
        ({"qc_pen": np.array(["yes"] * 5)}, "'qc_pen' must be bool"),
        ({"y": np.arange(4)}, r"'y' has shape \(4,\) for 5 points"),
    ],
)
def test_a_payload_that_is_not_the_specs_is_refused(index, change, words):
    new = cloud(5, seed=8)
    with pytest.raises(QueryError, match=words):
        index.upsert(new.ids, new.vectors, changed(new.payload, **change))
    assert index.count() == 600


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (Is("sit", ("A",)), "no field 'sit'; the closest are: site"),
        (Not(All((Between("X", 1),))), "no field 'X'"),
        (Is("site", ()), "names no value"),
        (Is("site", (1,)), "holds keyword values, the filter asks for 1"),
        (Is("x", ("1",)), "holds integer values"),
        (Is("x", (True,)), "holds integer values"),
        (Is("mpp", (0.5,)), "ask for a range"),
        (Between("site", 1), "no order"),
        (Between("x"), "needs a number"),
        (Between("x", 2, 1), "before it begins"),
    ],
)
def test_filters_that_make_no_sense_are_refused(index, where, words):
    calls = (
        lambda: index.search(queries(1), where=where),
        lambda: index.count(where),
        lambda: list(index.scroll(where=where)),
        lambda: index.delete(where),
        lambda: index.facet("site", where),
    )
    for call in calls:
        with pytest.raises(QueryError, match=words):
            call()
    assert index.count() == 600


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_k_is_a_whole_number_from_one(index, k):
    with pytest.raises(QueryError, match="k is"):
        index.search(queries(1), k=k)


@pytest.mark.parametrize("relevance", [-0.1, 1.1, np.nan])
def test_mmr_lies_between_0_and_1(index, relevance):
    with pytest.raises(QueryError, match="mmr"):
        index.search(queries(1), mmr=relevance)


def test_unknown_field_of_a_facet(index):
    with pytest.raises(QueryError, match="no field 'sites'; the closest are: site"):
        index.facet("sites")


def test_negative_ids_are_refused(index, points):
    part = points.take(slice(0, 1))
    with pytest.raises(QueryError, match="ids must be whole numbers"):
        index.upsert(np.array([-1]), part.vectors, part.payload)


def test_many_dimensions_and_no_payload(engine):
    spec = dataclasses.replace(SPEC, dim=1100, fields={})
    vectors = np.random.default_rng(2).normal(size=(40, 1100)).astype(np.float32)
    index = engine.create(spec)
    index.upsert(np.arange(40, dtype=np.uint64), vectors, {})
    (hits,) = index.search(vectors[17], k=1)
    assert hits.ids.tolist() == [17]
    assert hits.payload == {}
    index.close()
    again = engine.reopen()
    assert again.count() == 40
    again.close()
