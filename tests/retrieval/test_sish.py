"""The constant-time index: against exact search, against a ranking computed by hand, on disk, and with bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from eosin.errors import (
    IndexCorruptError,
    IndexLockedError,
    IndexMismatchError,
    IndexStoreError,
    NonFiniteError,
    QueryError,
)
from eosin.heads.neighbours import nearest
from eosin.retrieval import sish_files
from eosin.retrieval.codes import encode
from eosin.retrieval.engines import create_index, open_index
from eosin.retrieval.filters import All, FieldType, Is, Not
from eosin.retrieval.manifest import Manifest, lock_index, read_manifest, write_manifest
from eosin.retrieval.protocol import IndexSpec
from eosin.retrieval.sish import PATIENCE, SishIndex, SishSettings, build_sish, search_sish, similar_slides, sish_of
from eosin.retrieval.sish_files import open_sish, save_sish

Floats = npt.NDArray[np.float32]
FIELDS: dict[str, FieldType] = {"slide_id": "keyword", "patient_id": "keyword", "label": "keyword", "x": "integer"}


def clustered(rows: int, dim: int, seed: int, *, clusters: int = 50) -> Floats:
    """Return vectors about the same centres for every seed."""
    centres = np.random.default_rng(99).standard_normal((clusters, dim))
    rng = np.random.default_rng(seed)
    x = centres[rng.integers(clusters, size=rows)] + 0.4 * rng.standard_normal((rows, dim))
    return x.astype(np.float32)


def plain(rows: int, dim: int, **given: int) -> SishIndex:
    """Return an index of clustered vectors without payload."""
    spec = IndexSpec(dim=dim, encoder="made", fields={})
    return build_sish(np.arange(rows, dtype=np.uint64), clustered(rows, dim, 1), {}, spec, **given)


def with_payload(rows: int = 3000, dim: int = 16) -> SishIndex:
    """Return an index whose entries know their slide, patient and label."""
    number = np.random.default_rng(3).integers(30, size=rows)
    payload = {
        "slide_id": np.array([f"s{one:02d}" for one in number], object),
        "patient_id": np.array([f"p{one // 2:02d}" for one in number], object),
        "label": np.array([("benign", "malignant")[one % 2] for one in number], object),
        "x": np.arange(rows),
    }
    spec = IndexSpec(dim=dim, encoder="made", mpp=0.5, tile_px=224, fields=FIELDS)
    return build_sish(np.arange(rows, dtype=np.uint64) + 7, clustered(rows, dim, 1), payload, spec, cells=32)


@pytest.fixture(scope="module")
def index() -> SishIndex:
    return with_payload()


def same(first: SishIndex, second: SishIndex) -> bool:
    arrays = [sish_files._arrays(one) for one in (first, second)]
    return arrays[0].keys() == arrays[1].keys() and all(np.array_equal(arrays[0][n], arrays[1][n]) for n in arrays[0])


def test_a_budget_for_all_entries_gives_the_exact_answer(index: SishIndex) -> None:
    queries = clustered(20, 16, 2)
    found = search_sish(index, queries, k=12, settings=SishSettings(budget=5000))
    distance, rows = nearest(queries, index.vectors, 12)
    for one, away, row in zip(found, distance, rows, strict=True):
        assert one.candidates == one.examined == len(index)
        assert one.hits.ids.tolist() == index.ids[row].tolist()
        np.testing.assert_allclose(one.hits.score, 1 - away, atol=1e-6)
        assert one.hits.payload["x"].tolist() == (one.hits.ids - 7).tolist()


def test_entries_lie_by_key_and_keep_what_belongs_to_them(index: SishIndex) -> None:
    assert (np.diff(index.keys) >= 0).all()
    np.testing.assert_array_equal(encode(index.vectors, index.codebook), index.keys)
    x = clustered(3000, 16, 1)[index.ids.astype(np.int64) - 7]
    np.testing.assert_allclose(index.vectors, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-6)
    payload = index.payload(slice(0, 5), index.columns)
    number = np.random.default_rng(3).integers(30, size=3000)[index.ids[:5].astype(np.int64) - 7]
    assert payload["slide_id"].tolist() == [f"s{one:02d}" for one in number]


def test_hits_are_the_best_of_the_walked_candidates(index: SishIndex) -> None:
    query = clustered(1, 16, 5)
    (every,) = search_sish(index, query, k=200, settings=SishSettings(budget=200))
    assert len(every.hits) == every.candidates == 200
    (found,) = search_sish(index, query, k=30, settings=SishSettings(budget=200))
    assert found.hits.ids.tolist() == every.hits.ids[:30].tolist()
    assert (np.diff(every.hits.score) <= 0).all()
    cosine = every.hits.vectors @ (query[0] / np.linalg.norm(query))
    np.testing.assert_allclose(every.hits.score, cosine, atol=1e-6)


def test_few_candidates_hold_most_of_the_nearest() -> None:
    index = plain(6_000, 24, cells=64)
    queries = clustered(60, 24, 2)
    _, rows = nearest(queries, index.vectors, 10)
    for budget, least in ((60, 0.5), (240, 0.9), (900, 0.98)):
        found = search_sish(index, queries, settings=SishSettings(budget=budget))
        assert {one.candidates for one in found} == {budget}
        recall = np.mean([np.isin(index.ids[row], one.hits.ids).mean() for row, one in zip(rows, found, strict=True)])
        assert recall >= least


@pytest.mark.parametrize("rows", [3_000, 30_000])
def test_candidates_do_not_depend_on_the_number_stored(rows: int) -> None:
    found = search_sish(plain(rows, 8, cells=32), clustered(20, 8, 2), settings=SishSettings(budget=1000))
    assert {(one.candidates, one.examined) for one in found} == {(1000, 1000)}


@pytest.mark.slow
def test_candidates_of_a_million_are_those_of_ten_thousand() -> None:
    queries = clustered(50, 8, 2)
    few, many = (search_sish(plain(rows, 8), queries) for rows in (10_000, 1_000_000))
    assert np.mean([one.candidates for one in few]) == np.mean([one.candidates for one in many]) == 2000
    assert max(one.examined for one in many) == 2000


def test_the_patient_is_left_out_and_candidates_are_replaced(index: SishIndex) -> None:
    where = Not(Is("patient_id", ("p03", "p04")))
    found = search_sish(index, clustered(10, 16, 2), k=20, where=where, settings=SishSettings(budget=500))
    for one in found:
        assert not set(one.hits.payload["patient_id"]) & {"p03", "p04"}
        assert one.candidates == 500
        assert 500 < one.examined <= PATIENCE * 500
        assert one.hits.lacking == 0


def test_a_filter_equals_searching_the_rest(index: SishIndex) -> None:
    everything = SishSettings(budget=5000)
    query = clustered(4, 16, 6)
    allowed = index.payload(slice(None), ["label"])["label"] == "benign"
    _, rows = nearest(query, index.vectors[allowed], 5)
    found = search_sish(index, query, k=5, where=Is("label", ("benign",)), settings=everything)
    assert [one.hits.ids.tolist() for one in found] == index.ids[allowed][rows].tolist()
    found = search_sish(index, query, k=5, where=All(()), settings=everything)
    assert [one.candidates for one in found] == [len(index)] * 4


def test_too_rare_a_filter_says_what_is_lacking(index: SishIndex) -> None:
    (found,) = search_sish(index, clustered(1, 16, 2), where=Is("x", (5, 6)), settings=SishSettings(budget=100))
    assert found.examined == PATIENCE * 100
    assert len(found.hits) + found.hits.lacking == 10
    assert found.hits.lacking >= 8


def circle(degrees: npt.ArrayLike) -> Floats:
    """Return points of the unit circle."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_a_slide_ranking_equals_the_one_computed_by_hand() -> None:
    """Seven tiles on a circle, by angle; three tiles ask: at 1, at 33 and at 200 degrees.

    Order of the hits of the first: 0 A, 5 A, 10 A, 60 B, 80 B, 90 B, 100 B; of the second: 10 A, 60 B, 5 A, 0 A, 80 B,
    90 B, 100 B. The third is like nothing and falls to the mean over bags. Both others vote A; the surer goes first.
    """
    tiles = [("s1", 0, "A"), ("s1", 10, "A"), ("s2", 5, "A"), ("s3", 80, "B"), ("s3", 90, "B"), ("s3", 100, "B")]
    slide, angle, label = zip(*tiles, ("s4", 60, "B"), strict=True)
    payload = {"slide_id": np.array(slide, object), "label": np.array(label, object)}
    spec = IndexSpec(dim=2, encoder="made", fields={"slide_id": "keyword", "label": "keyword"})
    index = build_sish(np.array(angle, np.uint64), circle(angle), payload, spec)

    found = similar_slides(index, circle([1, 33, 200]))

    def entropy(a: float, b: float) -> float:
        return -sum(one / (a + b) * math.log2(one / (a + b)) for one in (a, b))

    sure = entropy((1 + 1 / 2 + 1 / 3) / 3, (1 / 4 + 1 / 5 + 1 / 6 + 1 / 7) / 4)
    less = entropy((1 + 1 / 3 + 1 / 4) / 3, (1 / 2 + 1 / 5 + 1 / 6 + 1 / 7) / 4)
    assert sure == pytest.approx(0.7901, abs=5e-5)
    assert less == pytest.approx(0.9081, abs=5e-5)
    assert found.slide.tolist() == ["s1", "s2", "s4", "s3"]
    np.testing.assert_allclose(found.entropy, [sure, sure, sure, less], rtol=1e-12)
    assert found.tile.tolist() == [0, 0, 0, 1]
    assert found.hit.tolist() == [0, 5, 60, 80]
    np.testing.assert_allclose(found.score, np.cos(np.radians([1, 4, 59, 47])), atol=1e-6)
    assert found.candidates.tolist() == [7, 7, 7]
    assert similar_slides(index, circle([1]), k=2).slide.tolist() == ["s1", "s2"]


def test_points_in_any_order_give_the_same_index() -> None:
    spec = IndexSpec(dim=12, encoder="made", fields={"x": "integer"})
    ids, x = np.arange(500, dtype=np.uint64) * 3, clustered(500, 12, 4)
    shuffle = np.random.default_rng(0).permutation(500)
    first = build_sish(ids, x, {"x": np.arange(500)}, spec, seed=5)
    second = build_sish(ids[shuffle], x[shuffle], {"x": np.arange(500)[shuffle]}, spec, seed=5)
    assert same(first, second)
    assert not same(first, build_sish(ids, x, {"x": np.arange(500)}, spec, seed=6))


def test_built_from_another_index_it_is_the_same(tmp_path: Path) -> None:
    spec = IndexSpec(dim=12, encoder="made", fields={"site": "keyword"})
    ids, x = np.arange(2500, dtype=np.uint64) * 3, clustered(2500, 12, 4)
    site = np.array(["A", "B"], object)[np.arange(2500) % 2]
    other = create_index(tmp_path / "exact", spec, engine="exact", expected=2500)
    with pytest.raises(QueryError, match="no points"):
        sish_of(other)
    other.upsert(ids, x, {"site": site})
    first = build_sish(ids[::2], x[::2], {"site": site[::2]}, spec, cells=16)
    second = sish_of(other, where=Is("site", ("A",)), cells=16)
    other.close()
    assert second.spec == spec
    assert second.ids.tolist() == first.ids.tolist()
    np.testing.assert_array_equal(second.keys, first.keys)
    np.testing.assert_allclose(second.vectors, first.vectors, atol=1e-6)


def test_saved_and_opened_it_answers_the_same(index: SishIndex, tmp_path: Path) -> None:
    path = save_sish(index, tmp_path / "made" / "sish")
    opened = open_sish(path)
    assert same(opened, index)
    assert opened.spec == index.spec
    assert isinstance(opened.vectors, np.memmap)
    queries, where = clustered(5, 16, 2), Not(Is("patient_id", ("p01",)))
    for one, other in zip(
        search_sish(index, queries, where=where), search_sish(opened, queries, where=where), strict=True
    ):
        assert one.hits.ids.tolist() == other.hits.ids.tolist()
        assert {n: c.tolist() for n, c in one.hits.payload.items()} == {
            n: c.tolist() for n, c in other.hits.payload.items()
        }


def test_a_finished_index_is_not_overwritten(index: SishIndex, tmp_path: Path) -> None:
    save_sish(index, tmp_path / "a")
    with pytest.raises(IndexStoreError, match="holds an index already"):
        save_sish(index, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(IndexStoreError, match="other files"):
        save_sish(index, tmp_path / "b")
    with pytest.raises(IndexStoreError, match="not a search index"):
        open_sish(tmp_path / "b")


def test_two_do_not_write_one_folder(index: SishIndex, tmp_path: Path) -> None:
    lock = lock_index(tmp_path)
    try:
        with pytest.raises(IndexLockedError):
            save_sish(index, tmp_path)
    finally:
        lock.release()
    assert same(open_sish(save_sish(index, tmp_path)), index)


@pytest.mark.parametrize("step", [0, 3, 8])
def test_cut_short_it_says_so_and_can_be_saved_again(
    index: SishIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    written: list[str] = []
    write = sish_files._write

    def full(file: Path, array: npt.NDArray[np.generic]) -> str:
        if len(written) == step:
            file.write_bytes(b"half")
            raise IndexStoreError("no space left")
        written.append(file.name)
        return write(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(sish_files, "_write", full)
        with pytest.raises(IndexStoreError, match="no space left"):
            save_sish(index, tmp_path)
    with pytest.raises(IndexCorruptError, match="half-written"):
        open_sish(tmp_path)
    assert same(open_sish(save_sish(index, tmp_path)), index)


def test_a_full_disk_is_named(index: SishIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sish_files.np, "save", full)
    with pytest.raises(IndexStoreError, match="MiB free"):
        save_sish(index, tmp_path / "a")


READ = ("keys", "ids", "centres", "column1", "names0")
HARMS = [(name, harm) for name in READ for harm in ("gone", "cut", "altered")] + [
    ("vectors", "gone"),
    ("vectors", "cut"),
]


@pytest.mark.parametrize(("name", "harm"), HARMS)
def test_harm_to_a_file_is_found(index: SishIndex, tmp_path: Path, name: str, harm: str) -> None:
    file = save_sish(index, tmp_path) / f"{name}.npy"
    data = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(data[:-5])
    else:
        data[-3] ^= 1
        file.write_bytes(data)
    with pytest.raises(IndexCorruptError, match=name):
        open_sish(tmp_path)


def test_vectors_of_another_index_are_found(index: SishIndex, tmp_path: Path) -> None:
    path = save_sish(index, tmp_path)
    np.save(path / "vectors.npy", index.vectors[:-1])
    with pytest.raises(IndexCorruptError, match="vectors"):
        open_sish(path)
    manifest = read_manifest(path)
    checks = {name: check for name, check in manifest.state["checks"].items() if name != "ids"}
    write_manifest(path, dataclasses.replace(manifest, state={"checks": checks}))
    np.save(path / "vectors.npy", index.vectors)
    with pytest.raises(IndexCorruptError, match="ids"):
        open_sish(path)


def test_another_engine_is_not_opened(index: SishIndex, tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(spec=index.spec, engine="exact"))
    with pytest.raises(IndexStoreError, match="engine exact"):
        open_sish(tmp_path)
    with pytest.raises(IndexStoreError, match=r"holds an index already \(exact\)"):
        save_sish(index, tmp_path)


@pytest.mark.parametrize("engine", ["auto", "exact"])
def test_opened_as_another_engine_its_own_function_is_named(index: SishIndex, tmp_path: Path, engine: Any) -> None:
    save_sish(index, tmp_path)
    with pytest.raises(IndexStoreError, match=r"open it with eosin\.retrieval\.sish_files\.open_sish"):
        open_index(tmp_path, engine=engine)


def test_queries_that_cannot_be_answered(index: SishIndex) -> None:
    query = np.ones((1, 16), np.float32)
    with pytest.raises(IndexMismatchError, match="15 numbers, the index 16"):
        search_sish(index, query[:, :15])
    with pytest.raises(QueryError, match="all zeros"):
        search_sish(index, query * 0)
    with pytest.raises(QueryError, match="NaN"):
        search_sish(index, query * np.nan)
    with pytest.raises(QueryError, match="k is 0"):
        search_sish(index, query, k=0)
    with pytest.raises(QueryError, match="no field 'labels'"):
        search_sish(index, query, where=Is("labels", ("benign",)))
    for name in ("budget", "probes"):
        with pytest.raises(QueryError, match=f"{name} is 0"):
            search_sish(index, query, settings=SishSettings(**{name: 0}))


def test_points_that_cannot_be_indexed() -> None:
    spec = IndexSpec(dim=4, encoder="made", fields={})
    none = np.empty((0, 4), np.float32)
    with pytest.raises(QueryError, match="no points"):
        build_sish(np.empty(0, np.uint64), none, {}, spec)
    with pytest.raises(NonFiniteError, match=r"row 1 \(id 1\) is all zeros"):
        build_sish(np.arange(2, dtype=np.uint64), np.array([[1, 0, 0, 0], [0, 0, 0, 0]], np.float32), {}, spec)
    with pytest.raises(QueryError, match="more than once"):
        build_sish(np.ones(2, np.uint64), np.ones((2, 4), np.float32), {}, spec)


def test_one_point_is_found() -> None:
    spec = IndexSpec(dim=3, encoder="made", fields={})
    index = build_sish(np.array([9], np.uint64), np.array([[0, 2, 0]], np.float16), {}, spec)
    (found,) = search_sish(index, np.array([[0, 1, 1]], np.float32))
    assert found.hits.ids.tolist() == [9]
    assert found.hits.score[0] == pytest.approx(math.sqrt(0.5))
    assert found.hits.lacking == 9


def test_slides_need_labels() -> None:
    query = np.ones((1, 2), np.float32)
    bare = build_sish(np.array([1], np.uint64), query, {}, IndexSpec(dim=2, encoder="made", fields={}))
    with pytest.raises(QueryError, match="lacks slide_id, label"):
        similar_slides(bare, query)
    spec = IndexSpec(dim=2, encoder="made", fields={"slide_id": "keyword", "label": "keyword"})
    payload = {"slide_id": np.array(["s"], object), "label": np.array([""], object)}
    unlabelled = build_sish(np.array([1], np.uint64), query, payload, spec)
    with pytest.raises(QueryError, match="no hit has a label"):
        similar_slides(unlabelled, query)


def test_the_page_shows_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "sish.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("benchmark_sish", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    page, result = benchmark.PAGE.read_text(), json.loads(benchmark.RESULT.read_text())
    found = benchmark.tables(result)
    assert benchmark.rendered(page, found) == page
    assert all(f"<!-- sish:{name} -->" in page for name in found)
    # what is promised of candidates: the same, within 5 %, from 10,000 entries to a million
    counts = [row["candidates"]["mean"] for row in result["growth"]]
    assert [row["entries"] for row in result["growth"]] == [10_000, 100_000, 1_000_000]
    assert max(counts) <= 1.05 * min(counts)


@pytest.mark.real
def test_real_features_are_found(real_data: Path) -> None:
    with h5py.File(real_data / "features" / "tcga-ad-6964-mopadi.h5") as file:
        x = np.asarray(file["feats"], np.float32)
    queries, stored = x[::10], np.delete(x, np.arange(0, len(x), 10), axis=0)
    spec = IndexSpec(dim=x.shape[1], encoder="mopadi", fields={})
    index = build_sish(np.arange(len(stored), dtype=np.uint64), stored, {}, spec)
    _, rows = nearest(queries, index.vectors, 10)
    found = search_sish(index, queries, settings=SishSettings(budget=140))
    recall = np.mean([np.isin(index.ids[row], one.hits.ids).mean() for row, one in zip(rows, found, strict=True)])
    assert len(stored) == 699
    assert {one.candidates for one in found} == {140}
    assert recall > 0.75
