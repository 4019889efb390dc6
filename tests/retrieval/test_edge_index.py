"""Qdrant Edge: what the contract suite does not ask. Graph, quantised codes, crashes, damage, disk, locks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filters_for_tests import FIELDS, TREES, few_values
from hypothesis import given, settings

from conftest import SPEC, cloud
from eosin.errors import (
    IndexCorruptError,
    IndexLockedError,
    IndexStoreError,
    MissingDependencyError,
    QueryError,
)
from eosin.retrieval import edge
from eosin.retrieval.edge import EdgeIndex
from eosin.retrieval.edge_files import disk_bytes
from eosin.retrieval.engines import create_index, open_index
from eosin.retrieval.filters import All, Any_, Between, Is, Not, mask
from eosin.retrieval.protocol import IndexSpec
from eosin.retrieval.qdrant import filter_json, needs_acorn

pytestmark = pytest.mark.slow

GROUPS = {name: "keyword" for name in ("tenth", "hundredth", "region")} | {"value": "float"}


def answers(index, asked, **more):
    return [hits.ids.tolist() for hits in index.search(asked, k=10, exact=True, **more)]


@pytest.fixture
def graph(monkeypatch):
    """Make a graph of few points too."""
    monkeypatch.setattr(edge, "FULL_SCAN_BYTES", 2**14)


def groups(n: int, dim: int = 32, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Points of a few hundred clusters, with fields that leave a tenth, a hundredth, or one side of the space."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(200, dim))
    vectors = (centres[rng.integers(0, 200, n)] + 0.5 * rng.normal(size=(n, dim))).astype(np.float32)
    side = np.argsort(np.argsort(vectors @ rng.normal(size=dim))) * 10 // n
    words = {"tenth": rng.integers(0, 10, n), "hundredth": rng.integers(0, 100, n), "region": side}
    payload = {name: np.array([f"g{value}" for value in column], object) for name, column in words.items()}
    return vectors, {**payload, "value": rng.random(n)}


SELECTIVE = {
    "all": lambda at: None,
    "a tenth": lambda at: Is("tenth", (f"g{at % 10}",)),
    "a hundredth": lambda at: Is("hundredth", (f"g{at}",)),
    "another region": lambda at: Is("region", (f"g{at % 10}",)),
    "all but one": lambda at: Not(Is("hundredth", (f"g{at}",))),
    "a tenth by range": lambda at: Between("value", (at % 10) / 10, (at % 10) / 10 + 0.1),
    "a hundredth by two": lambda at: All((Is("tenth", (f"g{at % 10}",)), Is("region", (f"g{at % 7}",)))),
}


@pytest.mark.slow
@pytest.mark.parametrize("quantise", ["none", "int8", "binary"])
def test_the_graph_finds_the_truth_under_every_filter(tmp_path, graph, quantise):
    dim = 128 if quantise == "binary" else 32
    vectors, payload = groups(3000, dim)
    index = EdgeIndex.create(tmp_path / "i", IndexSpec(dim=dim, encoder="e", fields=GROUPS, quantise=quantise))
    index.upsert(np.arange(3000), vectors, payload)
    waiting = index.stats()
    assert (waiting["optimised"], waiting["compared_one_by_one"]) == (0, 3000)
    index.optimise()
    done = index.stats()
    assert (done["optimised"], done["compared_one_by_one"]) == (3000, 0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = vectors[::75] + 0.2 * np.random.default_rng(1).normal(size=(40, dim)).astype(np.float32)
    score = (asked / np.linalg.norm(asked, axis=1, keepdims=True)) @ unit.T
    for name, make in SELECTIVE.items():
        right = wanted = 0
        for at, query in enumerate(asked):
            where = make(at)
            kept = np.ones(3000, bool) if where is None else mask(where, payload)
            (hits,) = index.search(query, k=10, where=where)
            true = np.argsort(-np.where(kept, score[at], -2))[: min(10, kept.sum())]
            assert len(hits) == len(true)
            assert kept[hits.ids.astype(int)].all()
            # Rescored: what comes back are cosines of the vectors themselves, not of their codes.
            np.testing.assert_allclose(hits.score, score[at, hits.ids.astype(int)], atol=2e-6)
            right, wanted = right + len(set(hits.ids.tolist()) & set(true.tolist())), wanted + len(true)
        assert right >= 0.95 * wanted, name
    index.close()


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """An index of two hundred points whose fields take few values, NaN and infinity among them."""
    rows, payload = few_values()
    index = EdgeIndex.create(tmp_path_factory.mktemp("filtered") / "i", IndexSpec(dim=4, encoder="e", fields=FIELDS))
    index.upsert(np.arange(200), rows, payload)
    yield index, payload
    index.close()


@settings(max_examples=60, deadline=None)
@given(where=TREES)
def test_any_filter_means_what_mask_says(filtered, where):
    index, payload = filtered
    kept = np.flatnonzero(mask(where, payload))
    (hits,) = index.search(np.ones(4), k=200, where=where)
    assert sorted(hits.ids.tolist()) == kept.tolist()
    assert index.count(where) == len(kept)


def test_missing_and_infinite_numbers_come_back(filtered):
    index, payload = filtered
    hits = index.retrieve(np.arange(200))
    for name, column in payload.items():
        np.testing.assert_array_equal(hits.payload[name], column)


def test_ids_and_names_of_any_kind(tmp_path):
    spec = IndexSpec(dim=2, encoder="e", fields={"a.b [µm]": "keyword", "klass-1": "integer"})
    index = EdgeIndex.create(tmp_path / "i", spec)
    ids = np.array([0, 2**63, 2**64 - 1], np.uint64)
    payload = {"a.b [µm]": np.array(["é\u0000", "x", "x"], object), "klass-1": np.array([1, -(2**63), 2**63 - 1])}
    index.upsert(ids, np.eye(3, 2, dtype=np.float32) + 0.5, payload)
    assert [hits.ids.tolist() for hits in index.scroll(batch=2)] == [ids[:2].tolist(), ids[2:].tolist()]
    hits = index.retrieve(ids)
    assert hits.payload["klass-1"].tolist() == payload["klass-1"].tolist()
    assert hits.payload["a.b [µm]"].tolist() == payload["a.b [µm]"].tolist()
    assert index.facet("a.b [µm]") == {"x": 2, "é\u0000": 1}
    assert index.count(Is("a.b [µm]", ("x",))) == 2
    assert index.delete(Is("klass-1", (2**63 - 1,))) == 1
    index.close()
    with pytest.raises(QueryError, match="cannot be a field"):
        EdgeIndex.create(tmp_path / "j", replace(spec, fields={'a"b': "keyword"}))


def test_impossible_ranges_of_integers_hold_nothing():
    assert filter_json(Between("x", 2.2, 2.8), {"x": "integer"}) == {"must": [{"has_id": []}]}
    found = filter_json(Between("x", -2.5, 2.5), {"x": "integer"})
    assert found == {"must": [{"key": "x", "range": {"gte": -2.0, "lte": 2.0}}]}


def test_acorn_is_for_what_links_do_not_hold_together():
    fields = {"site": "keyword", "organ": "keyword", "x": "integer", "pen": "bool"}
    site, organ, patient = Is("site", ("A", "B")), Is("organ", ("skin",)), Not(Is("site", ("C",)))
    for alone in (site, Not(site), All((site, patient)), All((All((patient, Not(organ))), site)), Any_((site, organ))):
        assert not needs_acorn(alone, fields)
    for more in (Between("x", 1), Is("pen", (True,)), All((site, organ)), All((All((site,)), organ, patient))):
        assert needs_acorn(more, fields)
    assert needs_acorn(All((site, Not(Between("x", 1)))), fields)


# Crashes. The child says what has been acknowledged; whatever it said must be there afterwards.

CHILD = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from conftest import SPEC, cloud
from eosin.retrieval import edge
edge.FULL_SCAN_BYTES, edge.FLUSH_POINTS = 2**14, int(sys.argv[4])
index = edge.EdgeIndex.open(sys.argv[2])
points = cloud(4000, seed=1)
for turn in range(int(sys.argv[3])):
    part = points.take(slice(100 * turn % 4000, 100 * turn % 4000 + 100))
    part.payload["y"] = np.full(100, turn)
    index.upsert(part.ids, part.vectors, part.payload)
    print(turn, flush=True)
print("optimise", flush=True)
index.optimise()
print("done", flush=True)
sys.stdin.read()
"""


def start(path: Path, turns: int, flush_every: int = 2**15) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(path), str(turns), str(flush_every)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(child: subprocess.Popen[str]) -> list[str]:
    """End the process without warning; return what it still said."""
    child.send_signal(signal.SIGKILL)
    return child.communicate()[0].split()


def check(index: EdgeIndex, last: int) -> None:
    """Every point acknowledged up to `last` is there, whole, in its newest form or a later one."""
    points, turn_of = cloud(4000, seed=1), {}
    for turn in range(last + 1):
        turn_of.update(dict.fromkeys(range(100 * turn % 4000, 100 * turn % 4000 + 100), turn))
    rows = np.array(sorted(turn_of))
    hits = index.retrieve(points.ids[rows])
    assert hits.lacking == 0
    np.testing.assert_allclose(hits.vectors, points.units()[rows], atol=2e-7)
    assert (hits.payload["y"] >= [turn_of[row] for row in rows]).all()
    assert set(np.concatenate([part.ids for part in index.scroll()]).tolist()) <= set(points.ids.tolist())
    asked = points.vectors[rows[::200]]
    for query, found in zip(asked, index.search(asked, k=1, exact=True), strict=True):
        assert found.score[0] > 0.99999, query


@pytest.mark.slow
@pytest.mark.parametrize(("stop_at", "flush_every"), [(0, 2**15), (7, 2**15), (30, 300), (61, 1000)])
def test_killed_while_storing_nothing_acknowledged_is_lost(tmp_path, graph, stop_at, flush_every):
    EdgeIndex.create(tmp_path / "i", SPEC).close()
    child = start(tmp_path / "i", 10_000, flush_every)
    for line in child.stdout:
        if line.strip() == str(stop_at):
            break
    last = int([str(stop_at), *kill(child)][-1])
    with pytest.raises(IndexStoreError, match="not a search index"):
        EdgeIndex.open(tmp_path)
    index = EdgeIndex.open(tmp_path / "i")
    check(index, last)
    index.optimise()
    check(index, last)
    index.close()


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.8, 1.5])
def test_killed_while_optimising_nothing_is_lost(tmp_path, graph, after_s):
    EdgeIndex.create(tmp_path / "i", SPEC).close()
    child = start(tmp_path / "i", 40)
    for line in child.stdout:
        if line.strip() == "optimise":
            break
    try:
        child.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        kill(child)
    for _ in range(20_000):  # the process that builds the graph outlives the one that was killed; nothing else may come
        try:
            index = EdgeIndex.open(tmp_path / "i")
            break
        except IndexLockedError:
            time.sleep(0.001)
    check(index, 39)
    assert index.count() == 4000
    index.optimise()
    assert index.stats()["optimised"] == 4000
    check(index, 39)
    index.close()


def test_the_log_alone_brings_back_what_was_acknowledged(tmp_path, points):
    """After a power cut the other files may be as old as the last flush; the log is synced at every upsert."""
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    first, rest = points.take(slice(0, 300)), points.take(slice(300, 600))
    first.store(index)
    index.close()
    shutil.copytree(tmp_path / "i", tmp_path / "old")
    index = EdgeIndex.open(tmp_path / "i")
    rest.store(index)
    index.delete(points.ids[:10])
    shutil.rmtree(tmp_path / "old/shard/wal")
    shutil.copytree(tmp_path / "i/shard/wal", tmp_path / "old/shard/wal")
    shutil.copy(tmp_path / "i/index.json", tmp_path / "old/index.json")
    after = EdgeIndex.open(tmp_path / "old")
    assert after.count() == 590
    np.testing.assert_allclose(after.retrieve(points.ids[10:]).vectors, points.units()[10:], atol=2e-7)
    assert answers(after, points.vectors[:20]) == answers(index, points.vectors[:20])
    after.close()
    index.close()


def test_every_upsert_and_delete_syncs_the_log(tmp_path, points, monkeypatch):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    log = str(tmp_path / "i/shard/wal")
    for write in (lambda: points.store(index, batch=600), lambda: index.delete(points.ids[:3])):
        synced.clear()
        write()
        assert {log, f"{log}/open-1"} <= set(synced)
    index.close()


# Damage.


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        ("shard/segments/*/vector_storage/vectors/chunk_0.mmap", "removed"),
        ("shard/segments/*/vector_storage/vectors/chunk_0.mmap", "cut"),
        ("shard/segments/*/mutable_id_tracker.mappings", "cut"),
        ("shard/segments/*/mutable_id_tracker.mappings", "removed"),
        ("shard/segments/*/payload_storage/page_0.dat", "removed"),
        ("shard/segments/*/segment.json", "overwritten"),
        ("shard/edge_config.json", "cut"),
        ("shard/segments", "removed"),
        ("shard", "removed"),
        ("index.json", "cut"),
    ],
)
def test_damage_is_told_and_never_fewer_points_given(tmp_path, points, pattern, how):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.store(index)
    index.close()
    (file,) = (tmp_path / "i").glob(pattern)
    if how == "removed":
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_bytes(b"\xff" * file.stat().st_size)
    for _ in range(2):  # and again: a failed attempt leaves no lock and mends nothing
        with pytest.raises(IndexCorruptError, match="i"):
            open_index(tmp_path / "i")


def test_lost_points_are_told_even_after_a_crash(tmp_path, points):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.store(index)
    index.close()
    index = EdgeIndex.open(tmp_path / "i")
    index.upsert(points.ids[:1], points.vectors[:1], points.take(slice(0, 1)).payload)  # sizes no longer noted
    index._flush()
    shutil.copytree(tmp_path / "i", tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    index.close()
    (file,) = (tmp_path / "copy").glob("shard/segments/*/mutable_id_tracker.mappings")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(IndexCorruptError, match=r"600 points or more .*, now [0-9]+"):
        EdgeIndex.open(tmp_path / "copy")


def test_a_killed_reader_leaves_an_index_that_opens(tmp_path, points):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.store(index)
    index.optimise()
    index.close()
    before = (tmp_path / "i/index.json").read_text()
    code = (
        "import sys; from eosin.retrieval.edge import EdgeIndex; i = EdgeIndex.open(sys.argv[1]);"
        "print(len(i.search([1.0] * 24)[0]), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "i")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "10\n"
    with pytest.raises(IndexLockedError, match="open for writing elsewhere"):
        EdgeIndex.open(tmp_path / "i")
    kill(child)
    index = EdgeIndex.open(tmp_path / "i")
    assert index.count() == 600
    index.close()
    assert (tmp_path / "i/index.json").read_text() == before


def test_making_an_index_that_was_interrupted(tmp_path, points, monkeypatch):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(edge, "sync_log", stop)
        with pytest.raises(KeyboardInterrupt):
            EdgeIndex.create(tmp_path / "i", SPEC)
    with pytest.raises(IndexCorruptError, match="half an index"):
        EdgeIndex.open(tmp_path / "i")
    index = create_index(tmp_path / "i", SPEC, engine="edge")
    points.store(index)
    assert index.count() == 600
    index.close()
    with pytest.raises(IndexStoreError, match="holds an index already"):
        EdgeIndex.create(tmp_path / "i", SPEC)


# The disk.


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, points, monkeypatch):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.take(slice(0, 500)).store(index)
    before = answers(index, points.vectors[:5])
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**27, 2**27))
        for write in (lambda: points.store(index), index.optimise, lambda: EdgeIndex.create(tmp_path / "j", SPEC)):
            with pytest.raises(IndexStoreError, match=r"no space left: 128 MiB are free, 2[0-9]+ MiB are needed"):
                write()
        assert answers(index, points.vectors[:5]) == before
    assert index.count() == 500
    points.store(index)
    assert index.count() == 600
    index.close()


def test_a_snapshot_takes_no_more_room_than_the_index(tmp_path, points):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.store(index)
    index.snapshot(tmp_path / "copy")
    index.close()
    apparent = sum(file.stat().st_size for file in (tmp_path / "copy").rglob("*"))
    assert disk_bytes(tmp_path / "copy") < min(apparent / 4, 1.5 * disk_bytes(tmp_path / "i"))


# The process that optimises.


def test_optimising_can_be_interrupted(tmp_path, points, monkeypatch):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.store(index)
    before = answers(index, points.vectors[:5])

    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.optimise()
    assert answers(index, points.vectors[:5]) == before
    with monkeypatch.context() as patch:
        patch.setattr(edge, "_OPTIMISE", "raise SystemExit('no memory left')")
        with pytest.raises(IndexStoreError, match="could not be optimised: no memory left; every point is kept"):
            index.optimise()
    assert answers(index, points.vectors[:5]) == before
    index.close()


def test_what_comes_after_optimising_is_found_too(tmp_path, graph, points):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.take(slice(0, 400)).store(index)
    index.optimise()
    points.take(slice(400, 600)).store(index)
    stats = index.stats()
    assert (stats["points"], stats["optimised"], stats["compared_one_by_one"]) == (600, 400, 200)
    for at in range(400, 600, 20):
        assert index.search(points.vectors[at], k=1)[0].ids.tolist() == [points.ids[at]]
    index.optimise()
    index.optimise()
    assert index.stats()["points"] == 600
    assert answers(index, points.vectors[:20]) == [points.nearest(q, 10)[0].tolist() for q in points.vectors[:20]]
    index.close()


def test_large_calls_go_in_parts(tmp_path, points, monkeypatch):
    monkeypatch.setattr(edge, "BATCH_BYTES", 4 * 24 * 7)
    monkeypatch.setattr(edge, "FLUSH_POINTS", 100)
    monkeypatch.setattr(edge, "QUERIES", 3)
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.store(index, batch=600)
    found = answers(index, points.vectors[:10])
    assert found == [points.nearest(query, 10)[0].tolist() for query in points.vectors[:10]]
    index.close()


def test_without_the_package_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_edge", None)
    with pytest.raises(MissingDependencyError, match=r"qdrant-edge-py.*eosin\[search\].*engine='exact'"):
        EdgeIndex.create(tmp_path / "i", SPEC)
    assert not (tmp_path / "i").exists()


def test_an_index_of_another_engine(tmp_path):
    create_index(tmp_path / "i", SPEC, engine="exact").close()
    with pytest.raises(IndexStoreError, match="made by the engine 'exact'"):
        EdgeIndex.open(tmp_path / "i")


def test_points_that_eosin_did_not_write_are_told(tmp_path, points):
    import qdrant_edge

    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.take(slice(0, 5)).store(index)
    strange = qdrant_edge.Point(7, [1.0] * 24, {"site": "A"})
    index.shard.update(qdrant_edge.UpdateOperation.upsert_points([strange]))
    with pytest.raises(IndexCorruptError, match="does not fit the index: field 'slide_id' should be keyword"):
        index.retrieve(np.array([7]))
    index.close()


def test_what_the_graph_does_not_reach_is_found_all_the_same(tmp_path, points, monkeypatch):
    index = EdgeIndex.create(tmp_path / "i", SPEC)
    points.store(index)
    ask, exactly = index._ask, []

    def lame(queries, k, where, *, exact, **more):
        exactly.append((len(queries), exact))
        rows = ask(queries, k, where, exact=exact, **more)
        return rows if exact else [rows[0], rows[1][:2], *rows[2:]]

    monkeypatch.setattr(index, "_ask", lame)
    where = Is("site", ("A",))
    found = index.search(points.vectors[:3], k=10, where=where)
    wanted = [points.nearest(query, 10, where)[0].tolist() for query in points.vectors[:3]]
    assert [hits.ids.tolist() for hits in found] == wanted
    assert exactly == [(3, False), (1, True)]
    few = Is("slide_id", ("nowhere.svs",))
    assert [len(hits) for hits in index.search(points.vectors[:3], k=10, where=few)] == [0, 0, 0]
    assert exactly[2:] == [(3, False)]
    index.close()
