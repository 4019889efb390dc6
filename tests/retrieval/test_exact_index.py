"""The exact engine beyond the contract: exactness, files that were cut or altered, killed processes, full disks."""

from __future__ import annotations

import dataclasses
import inspect
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from conftest import SPEC, cloud
from eosin.errors import IndexCorruptError, IndexLockedError, IndexStoreError
from eosin.heads.neighbours import nearest
from eosin.retrieval import scan
from eosin.retrieval.exact import ExactIndex
from eosin.retrieval.filters import Between, Is
from eosin.retrieval.points import JOURNAL, STREAMS
from eosin.retrieval.scan import as_float32

SMALL = dataclasses.replace(SPEC, dim=3, fields={"site": "keyword", "x": "integer"})


@pytest.fixture
def index(tmp_path):
    index = ExactIndex.create(tmp_path / "index", SPEC)
    yield index
    index.close()


def small(ids, value=0.0, site="A"):
    """Points of SMALL whose vectors tell id and value."""
    ids = np.asarray(ids, np.uint64)
    vectors = np.stack([np.ones(len(ids)), ids.astype(float), np.full(len(ids), value)], axis=1).astype(np.float32)
    return ids, vectors, {"site": np.array([site] * len(ids), object), "x": ids.astype(np.int64)}


def table(index):
    """Id -> vector bytes and payload, of everything."""
    found = {}
    for hits in index.scroll():
        rows = zip(hits.vectors, *hits.payload.values(), strict=True)
        found.update(
            {one: (row[0].tobytes(), *map(str, row[1:])) for one, row in zip(hits.ids.tolist(), rows, strict=True)}
        )
    return found


# Exactness


def test_every_half_precision_number_is_widened_exactly():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].reshape(-1, 64)
    np.testing.assert_array_equal(as_float32(every), every.astype(np.float32))
    assert np.signbit(as_float32(np.array([[-0.0]], np.float16))[0, 0])
    assert as_float32(every[:0]).shape == (0, 64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("block", [64, 100, 8192])
def test_no_block_size_changes_the_answer(index, monkeypatch, block, dtype):
    points = cloud(700, dtype=dtype)
    points.store(index)
    asked = np.random.default_rng(1).normal(size=(20, SPEC.dim)).astype(np.float32)
    monkeypatch.setattr(scan, "BLOCK", block)
    distance, rows = nearest(asked, points.vectors.astype(np.float64), 12)
    for at, hits in enumerate(index.search(asked, k=12)):
        np.testing.assert_array_equal(hits.ids, points.ids[rows[at]])
        np.testing.assert_allclose(hits.score, 1 - distance[at], atol=2e-7)
    for where in (Is("patient_id", ("p1",)), Between("x", 0, 150_000)):
        for query, hits in zip(asked, index.search(asked, k=12, where=where), strict=True):
            np.testing.assert_array_equal(hits.ids, points.nearest(query, 12, where)[0])


def test_equal_scores_come_by_id_wherever_they_lie(index, monkeypatch):
    """Copies of one vector in many blocks: more than k of them, all equally good."""
    monkeypatch.setattr(scan, "BLOCK", 37)
    points = cloud(500)
    points.vectors[::3] = points.vectors[0]
    points.store(index)
    (hits,) = index.search(points.vectors[:1], k=20)
    assert hits.ids.tolist() == sorted(points.ids[::3].tolist())[:20]
    assert (hits.score == hits.score[0]).all()


def test_differences_that_float32_cannot_see_are_ranked(index):
    """Neighbours that differ by less than float32 rounding of a product still come in their true order."""
    base = np.random.default_rng(0).normal(size=SPEC.dim)
    points = cloud(400)
    drift = np.random.default_rng(1).normal(size=(400, SPEC.dim)) * 2e-6
    points.vectors[:] = (base + drift).astype(np.float32)
    points.store(index)
    query = base.astype(np.float32)
    (hits,) = index.search(query, k=50)
    unit = (query / np.sqrt(np.square(query.astype(np.float64)).sum())).astype(np.float32)
    score = points.units() @ unit.astype(np.float64)
    np.testing.assert_array_equal(hits.ids, points.ids[np.lexsort((points.ids, -score))[:50]])


def test_many_queries_equal_single_ones(index, points, monkeypatch):
    points.store(index)
    monkeypatch.setattr("eosin.retrieval.exact.QUERIES", 7)
    asked = points.vectors[:40]
    for one, hits in zip(asked, index.search(asked, k=5), strict=True):
        np.testing.assert_array_equal(hits.ids, index.search(one, k=5)[0].ids)


# Codes


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.999), ("binary", 0.98)])
def test_codes_find_the_nearest(tmp_path, kind, least):
    spec = dataclasses.replace(SPEC, dim=192, fields={"half": "bool"}, quantise=kind)
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(60, 192))[rng.integers(0, 60, 20_000)] + 0.7 * rng.normal(size=(20_000, 192)) + 0.5
    vectors = vectors.astype(np.float32)
    half = {"half": np.arange(20_000) % 2 == 0}
    index = ExactIndex.create(tmp_path / "index", spec)
    index.upsert(np.arange(20_000, dtype=np.uint64), vectors, half)
    asked = vectors[::500] + 0.2 * rng.normal(size=(40, 192)).astype(np.float32)
    truth = index.search(asked, k=10, exact=True)
    assert index.stats()["optimised"] == 0
    for one, other in zip(truth, index.search(asked, k=10), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)  # no codes yet: the truth
    index.optimise()
    assert index.stats()["optimised"] == 20_000
    found = index.search(asked, k=10)
    right = [len(set(one.ids) & set(other.ids)) for one, other in zip(truth, found, strict=True)]
    assert least * 400 <= sum(right)
    if kind == "binary":
        assert index._codes.candidates(10) < 1000  # it does choose
    for one, other in zip(truth, found, strict=True):
        at = {i: s for i, s in zip(one.ids.tolist(), one.score.tolist(), strict=True)}
        assert all(at[i] == s for i, s in zip(other.ids.tolist(), other.score.tolist(), strict=True) if i in at)
    kept = index.search(asked, k=10, where=Is("half", (True,)))
    assert all((hits.ids % 2 == 0).all() and len(hits) == 10 for hits in kept)
    new = asked[:1] * 2
    index.upsert(np.array([10**6], np.uint64), new, {"half": np.array([True])})
    assert index.search(new, k=1)[0].ids.tolist() == [10**6], "points without a code yet are found too"
    index.delete(np.array([10**6], np.uint64))
    assert index.search(new, k=1)[0].ids.tolist() != [10**6]
    index.close()
    again = ExactIndex.open(tmp_path / "index")
    for one, other in zip(found, again.search(asked, k=10), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_estimates_of_codes_are_near_the_cosine(tmp_path, kind):
    """Both estimates are unbiased, within the errors their docstring gives."""
    spec = dataclasses.replace(SPEC, dim=256, fields={}, quantise=kind)
    rng = np.random.default_rng(4)
    vectors = (rng.normal(size=(3000, 256)) + 1.0).astype(np.float32)
    index = ExactIndex.create(tmp_path / "index", spec)
    index.upsert(np.arange(3000, dtype=np.uint64), vectors, {})
    index.optimise()
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = units[:8]
    wrong = index._codes.scorer(asked)(slice(8, 3000)) - asked @ units[8:].T
    assert abs(wrong.mean()) < (1e-4 if kind == "int8" else 5e-3)
    assert wrong.std() < (1e-3 if kind == "int8" else 0.06)


# Bytes


def test_optimise_gives_the_bytes_back(index, points):
    points.store(index)
    whole = index.stats()["bytes_on_disk"]
    points.store(index)
    assert index.stats()["replaced_or_deleted"] == 600
    assert index.stats()["bytes_on_disk"] > 1.9 * whole
    index.optimise()
    assert index.stats()["bytes_on_disk"] <= whole
    folder = index._points.folder
    index.optimise()
    assert index._points.folder == folder, "nothing to do, nothing done"
    assert [p.name for p in index.path.glob("g*")] == [folder.name]


def test_a_deleted_patient_leaves_no_trace_after_optimise(index, points):
    points.store(index)
    index.delete(Is("patient_id", ("p3",)))
    journal = index._points.folder / JOURNAL
    assert '"p3"' in journal.read_text()
    index.optimise()
    assert '"p3"' not in (index._points.folder / JOURNAL).read_text()
    assert not journal.exists()
    assert "p3" not in index.facet("patient_id")


def test_a_reader_keeps_what_it_opened(index, points):
    points.store(index)
    reader = ExactIndex.open(index.path)
    before = table(reader)
    index.delete(Is("site", ("A",)))
    index.optimise()
    assert table(reader) == before
    fresh = ExactIndex.open(index.path)
    assert table(fresh) == table(index)
    index.close()
    reader.delete(np.empty(0, np.uint64))
    assert table(reader) == table(fresh), "a writer looks again at what others stored"
    reader.close()


@pytest.mark.parametrize("name", [*STREAMS[:2], JOURNAL])
def test_a_missing_file_is_half_an_index(index, points, name):
    points.store(index)
    index.close()
    (index.path / "g0001" / name).unlink()
    with pytest.raises(IndexCorruptError, match=rf"half an index: .*{name} is missing"):
        ExactIndex.open(index.path)


def test_a_folder_without_manifest_is_no_index(tmp_path):
    (tmp_path / "index" / "g0001").mkdir(parents=True)
    with pytest.raises(IndexStoreError, match=r"not a search index .*eosin index"):
        ExactIndex.open(tmp_path / "index")
    ExactIndex.create(tmp_path / "index", SPEC).close()
    ExactIndex.open(tmp_path / "index").close()


@pytest.mark.parametrize("text", ["", "{", '{"format": "eosin-index"}', '{"format": "other"}', "[]"])
def test_a_manifest_that_cannot_be_read(index, text):
    (index.path / "index.json").write_text(text)
    with pytest.raises(IndexCorruptError, match=r"index\.json cannot be used"):
        ExactIndex.open(index.path)


def test_a_newer_format(index):
    file = index.path / "index.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(IndexStoreError, match="index format 2, this eosin reads up to 1: upgrade"):
        ExactIndex.open(index.path)


@pytest.mark.parametrize("name", STREAMS[:2])
def test_a_file_cut_short_is_noticed(index, points, name):
    points.store(index)
    index.close()
    file = index.path / "g0001" / name
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(IndexCorruptError, match=rf"{name} is damaged: it holds \d+ bytes"):
        ExactIndex.open(index.path)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def test_altered_rows_and_journals_are_noticed_on_opening(index, points):
    points.store(index)
    index.delete(points.ids[:5])
    index.close()
    for name in (STREAMS[1], STREAMS[2], JOURNAL):
        file = index.path / "g0001" / name
        whole = file.read_bytes()
        for at in random.Random(0).sample(range(len(whole) - 1), min(20, len(whole) - 1)):
            flip(file, at)
            with pytest.raises(IndexCorruptError, match=rf"{name} is damaged"):
                ExactIndex.open(index.path)
            file.write_bytes(whole)
    assert ExactIndex.open(index.path).count() == 595


def test_altered_vectors_are_noticed_before_they_are_copied(index, points):
    points.store(index)
    index.delete(points.ids[:5])
    index.close()
    flip(index.path / "g0001" / STREAMS[0], 50_000)
    again = ExactIndex.open(index.path)
    with pytest.raises(IndexCorruptError, match=r"vectors\.bin is damaged: rows 400 to 600 differ"):
        again.optimise()
    assert again.count() == 595
    assert (index.path / "g0001").is_dir()
    again.close()


def test_any_torn_tail_leaves_the_commits_before_it(tmp_path):
    """Cut the journal anywhere: what is left is the state after some whole number of commits, and writable."""
    index = ExactIndex.create(tmp_path / "index", SMALL)
    states, ends = [table(index)], [0]
    journal = tmp_path / "index/g0001" / JOURNAL
    index.upsert(*small([1, 2, 3]))
    states, ends = [*states, table(index)], [*ends, journal.stat().st_size]
    index.upsert(*small([2, 9], 5.0, "ünï\n"))
    states, ends = [*states, table(index)], [*ends, journal.stat().st_size]
    index.delete(np.array([3], np.uint64))
    states, ends = [*states, table(index)], [*ends, journal.stat().st_size]
    index.close()
    near = {end + step for end in ends for step in (-2, -1, 0, 1)}
    for size in sorted({*range(0, ends[-1], 9), *near} & set(range(ends[-1] + 1))):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "index", tmp_path / "copy")
        os.truncate(tmp_path / "copy/g0001" / JOURNAL, size)
        copy = ExactIndex.open(tmp_path / "copy")
        state = states[max(at for at, end in enumerate(ends) if end <= size)]
        assert table(copy) == state
        copy.upsert(*small([77], 1.0))
        copy.close()
        again = ExactIndex.open(tmp_path / "copy")
        assert {one: row for one, row in table(again).items() if one != 77} == state
        assert again.count() == len(state) + 1


# Any sequence of calls


class AnySequence(RuleBasedStateMachine):
    """Whatever is called in whatever order, the index holds what a dict would."""

    @initialize(seed=st.integers(0, 99))
    def begin(self, seed):
        self.path = Path(os.environ["EOSIN_TEST_FOLDER"]) / f"i{time.monotonic_ns()}"
        self.index = ExactIndex.create(self.path, SMALL)
        self.model = {}
        self.value = float(seed)

    @rule(ids=st.sets(st.integers(0, 12), max_size=6), site=st.sampled_from("ABC"), half=st.booleans())
    def upsert(self, ids, site, half):
        self.value += 1
        chosen, vectors, payload = small(sorted(ids), self.value, site)
        self.index.upsert(chosen, vectors.astype(np.float16) if half else vectors, payload)
        self.model.update({one: (self.value, site) for one in ids})

    @rule(ids=st.lists(st.integers(0, 12), max_size=4))
    def delete(self, ids):
        gone = set(ids) & self.model.keys()
        assert self.index.delete(np.array(ids, np.uint64)) == len(gone)
        for one in gone:
            del self.model[one]

    @rule(site=st.sampled_from("ABC"))
    def delete_a_site(self, site):
        gone = [one for one, (_, where) in self.model.items() if where == site]
        assert self.index.delete(Is("site", (site,))) == len(gone)
        for one in gone:
            del self.model[one]

    @rule()
    def optimise(self):
        self.index.optimise()
        assert self.index.stats()["replaced_or_deleted"] == 0

    @rule()
    def reopen(self):
        self.index.close()
        self.index = ExactIndex.open(self.path)

    @invariant()
    def agrees(self):
        if not hasattr(self, "index"):
            return
        hits = self.index.retrieve(np.arange(13, dtype=np.uint64))
        found = {
            one: (vector[2] / vector[0], site)
            for one, vector, site in zip(hits.ids.tolist(), hits.vectors, hits.payload["site"].tolist(), strict=True)
        }
        assert found.keys() == self.model.keys()
        for one, (value, site) in found.items():
            assert value == pytest.approx(self.model[one][0], rel=1e-5)
            assert site == self.model[one][1]
        assert self.index.count() == len(self.model)
        sites = [site for _, site in self.model.values()]
        assert self.index.facet("site") == {site: sites.count(site) for site in set(sites)}

    @precondition(lambda self: getattr(self, "model", None))
    @rule()
    def search(self):
        one = max(self.model)
        (hits,) = self.index.search(np.array([1.0, one, self.model[one][0]], np.float32), k=1)
        assert hits.score[0] == pytest.approx(1)

    def teardown(self):
        if hasattr(self, "index"):
            self.index.close()
            shutil.rmtree(self.path)


def test_any_sequence_of_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("EOSIN_TEST_FOLDER", str(tmp_path))
    machine = AnySequence.TestCase
    machine.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
    machine().runTest()


# Full disks


FILL = """
import resource, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from conftest import cloud
from eosin.errors import IndexStoreError
from eosin.retrieval.exact import ExactIndex
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
index = ExactIndex.open(sys.argv[1])
points = cloud(600)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    if sys.argv[4] == "optimise":
        index.optimise()
    else:
        index.upsert(points.ids, points.vectors, points.payload)
except IndexStoreError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("count", index.count())
few = points.take(slice(0, 100))
index.upsert(few.ids, few.vectors, few.payload)
print("count", index.count())
index.close()
"""


def fill(path: Path, limit: int, what: str) -> list[str]:
    command = [sys.executable, "-c", FILL, str(path), str(Path(__file__).parent), str(limit), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_full_disk_during_upsert_loses_nothing(tmp_path, share):
    """The limit on a file's size cuts the vectors at once, half way or near the end."""
    index = ExactIndex.create(tmp_path / "index", SPEC)
    old = cloud(300, seed=7)
    old.store(index)
    before, size = table(index), (tmp_path / "index/g0001" / STREAMS[0]).stat().st_size
    index.close()
    lines = fill(tmp_path / "index", int(size + share * 2 * size), "upsert")
    assert "cannot write" in lines[0]
    assert "MiB free" in lines[0]
    assert "every point stored before is kept" in lines[0]
    assert lines[1:] == ["count 300", "count 400"]
    again = ExactIndex.open(tmp_path / "index")
    found = table(again)
    assert {one: row for one, row in found.items() if one in before} == before
    assert len(found) == 400


@pytest.mark.slow
def test_a_full_disk_during_optimise_loses_nothing(tmp_path):
    index = ExactIndex.create(tmp_path / "index", SPEC)
    old = cloud(300, seed=7)
    old.store(index)
    index.delete(old.ids[:50])
    before = table(index)
    index.close()
    lines = fill(tmp_path / "index", 10_000, "optimise")
    assert "cannot" in lines[0]
    assert lines[1:] == ["count 250", "count 350"]
    again = ExactIndex.open(tmp_path / "index")
    assert {one: row for one, row in table(again).items() if one in before} == before


# Killed processes


WRITER = """
import sys
import numpy as np
from eosin.retrieval.exact import ExactIndex
SMALL
index = ExactIndex.open(sys.argv[1])
step, seed = 0, int(sys.argv[2])
rng = np.random.default_rng(seed)
while True:
    step += 1
    ids = rng.choice(500, 40, replace=False)
    print("begin", step, "upsert", *ids, flush=True)
    index.upsert(*small(ids, float(step)))
    print("done", step, flush=True)
    if step % 4 == 0:
        gone = rng.choice(500, 30, replace=False)
        print("begin", step, "delete", *gone, flush=True)
        index.delete(gone)
        print("done", step, flush=True)
    if step % OPTIMISE == 0:
        print("begin", step, "optimise", flush=True)
        index.optimise()
        print("done", step, flush=True)
"""


@contextmanager
def writer(path: Path, *, optimise: int, seed: int) -> Iterator[subprocess.Popen[str]]:
    """A process that stores, deletes and optimises, and says what it begins and what is done."""
    code = WRITER.replace("SMALL", inspect.getsource(small)).replace("OPTIMISE", str(optimise))
    command = [sys.executable, "-c", code, str(path), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def apply(model, line):
    """Return what the model holds after a call."""
    _, step, what, *ids = line.split()
    after = dict(model)
    for one in map(int, ids):
        if what == "delete":
            after.pop(one, None)
        else:
            after[one] = float(step)
    return after


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 1000], ids=["during optimise", "during upsert"])
def test_killed_at_random_moments_no_acknowledged_point_is_lost(tmp_path, every):
    """SIGKILL, ten times over one index: it holds every finished call, and the interrupted one whole or not at all."""
    path, rng = tmp_path / "index", random.Random(every)
    ExactIndex.create(path, SMALL).close()
    model: dict[int, float] = {}
    undecided = 0
    for round_ in range(10):
        with writer(path, optimise=every, seed=round_) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip()]
            assert lines[0].startswith("begin 1 upsert"), "the writer did not start"
            time.sleep(rng.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.read().splitlines()
        if not lines[-1].startswith(("begin", "done")) or lines[-1] == "begin":
            lines.pop()
        for call, done in zip(lines[::2], lines[1::2], strict=False):
            assert done.startswith("done")
            model = apply(model, call)
        index = ExactIndex.open(path)
        found = {one: round(float(vector[2] / vector[0]), 3) for one, vector in _vectors(index)}
        choices = [model]
        if len(lines) % 2:
            undecided += 1
            choices.append(apply(model, lines[-1]))
        assert found in choices, f"round {round_}: {len(found)} points, {len(model)} acknowledged"
        model = found
        index.delete(np.empty(0, np.uint64))
        assert len(list(path.glob("g*"))) == 1, "what a killed optimise left is swept away"
        index.close()
    assert undecided > 0, "no call was ever interrupted"


def _vectors(index):
    for hits in index.scroll():
        yield from zip(hits.ids.tolist(), hits.vectors, strict=True)


def test_the_lock_of_a_killed_writer_is_free(tmp_path):
    path = tmp_path / "index"
    ExactIndex.create(path, SMALL).close()
    with writer(path, optimise=1000, seed=0) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("done"):
            assert process.poll() is None
        index = ExactIndex.open(path)
        with pytest.raises(IndexLockedError, match="open for writing elsewhere"):
            index.upsert(*small([1]))
        assert index.count() >= 40
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
    index.upsert(*small([1000]))
    assert len(index.retrieve(np.array([1000], np.uint64))) == 1
    index.close()
