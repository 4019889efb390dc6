"""The file of decisions: nothing acknowledged is lost, half-written lines do not count, reviewers merge or conflict."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from eosin.errors import StoreCorruptError, StoreError, StoreLockedError, StoreMismatchError
from eosin.tasks.review_state import (
    Decision,
    Item,
    Journal,
    Start,
    State,
    Verdict,
    _kappa,
    decide_event,
    merge,
    read_state,
    round_event,
    undo_event,
)

START = Start(labels=("tumour", "other"), pool={"encoder": "tiny", "tiles": 9}, reviewer="ada", seed=3)
BIG = 2**63 - 1


def decision(tile: int, label: str | None = "tumour", verdict: Verdict = "accept", **about: Any) -> Decision:
    known = {"proposed": "tumour", "share": "hard", "round": 0, "at": "2026-01-01T00:00:00+00:00", "reviewer": "ada"}
    return Decision(id=tile, slide_id="a.svs", x=tile, y=0, verdict=verdict, label=label, **{**known, **about})


EVENTS = (
    round_event(0, [Item(id=1, share="hard", label="tumour"), Item(id=BIG, share="audit", label="other", p=0.25)]),
    decide_event(decision(1)),
    decide_event(decision(BIG, "other", "relabel", share="audit")),
    undo_event(1, "2026-01-01T00:00:01+00:00"),
    decide_event(decision(1, None, "skip")),
)


def written(path: Path) -> Path:
    with Journal.create(path, START) as journal:
        for event in EVENTS:
            journal.append(event)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = read_state(written(tmp_path / "r.jsonl"))
    assert state.start == START
    assert state.rounds[0][1] == Item(id=BIG, share="audit", label="other", p=0.25)
    assert list(state.decisions) == [BIG, 1]
    assert state.decisions[BIG] == decision(BIG, "other", "relabel", share="audit")
    assert state.decisions[1].label is None
    assert state.undone == []
    assert all(json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines())


def test_cut_anywhere_the_whole_lines_count(tmp_path: Path) -> None:
    """Every length a crash could leave: the state is that of the lines that end, and the next line fits on."""
    content = written(tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "cut.jsonl"
    first = content.index(b"\n") + 1
    for length in range(first, len(content) + 1, 3):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n") - 1
        expected = State(start=START)
        for event in EVENTS[:whole]:
            expected.apply(event)
        assert read_state(path) == expected
        if length % 7 == 0:
            with Journal.open(path) as journal:
                assert journal.state == expected
                journal.append(*EVENTS[whole:])
            assert path.read_bytes() == content


def test_a_start_that_was_cut_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"kind":"start","for')
    with pytest.raises(StoreError, match="begin again"):
        Journal.open(path)
    with Journal.create(path, START):
        pass
    assert read_state(path) == State(start=START)
    with pytest.raises(StoreError, match="there already"):
        Journal.create(path, START)


def test_undo_brings_the_tile_back_until_it_is_decided_again() -> None:
    state = State(start=START)
    for event in (*EVENTS[:3], undo_event(BIG, ""), undo_event(1, "")):
        state.apply(event)
    assert state.undone == [BIG, 1]
    assert not state.decisions
    state.apply(decide_event(decision(BIG)))
    assert state.undone == [1]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"not json", "line 2"),
        (b'{"kind":"undo","id":"0000000000000001","at":""}', "line 2"),
        (b'{"kind":"round","round":4,"queue":[]}', "round 4 follows 0"),
        (json.dumps(dict(decide_event(decision(1, "liver")))).encode(), "liver"),
        (b'{"kind":"banana"}', "banana"),
        (b"\0\0\0\0", "line 2"),
    ],
)
def test_a_line_that_cannot_be_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "r.jsonl"
    with Journal.create(path, START):
        pass
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(StoreCorruptError, match=what):
        read_state(path)


def test_a_tile_decided_twice_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl")
    before = path.read_bytes()
    with Journal.open(path) as journal:
        with pytest.raises(ValueError, match="decided twice"):
            journal.append(decide_event(decision(7)), decide_event(decision(BIG)))
        assert 7 not in journal.state.decisions
        assert path.read_bytes() == before
        journal.append(decide_event(decision(7)))
    assert 7 in read_state(path).decisions


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl")
    with Journal.open(path), pytest.raises(StoreLockedError, match="another process"):
        Journal.open(path)
    Journal.open(path).close()


class Full:
    """A file on a disk that fills up in the middle of a line."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, content: bytes) -> int:
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl")
    before = path.read_bytes()
    with Journal.open(path) as journal:
        file, journal._file = journal._file, Full(journal._file)
        with pytest.raises(StoreError, match="No space left"):
            journal.append(decide_event(decision(7)))
        assert path.read_bytes() == before
        assert 7 not in journal.state.decisions
        journal._file = file
        journal.append(decide_event(decision(7)))
    assert 7 in read_state(path).decisions


CHILD = """
import sys
from pathlib import Path
from eosin.tasks.review_state import Decision, Journal, Start, decide_event
known = dict(slide_id="a.svs", x=0, y=0, verdict="accept", label="tumour", proposed="tumour", share="hard", round=0)
with Journal.create(Path(sys.argv[1]), Start(labels=("tumour", "other"), pool={}, reviewer="ada", seed=0)) as journal:
    for tile in range(1_000_000):
        journal.append(decide_event(Decision(id=tile, at="", reviewer="ada", **known)))
        print(tile, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_every_acknowledged_decision_is_there(tmp_path: Path) -> None:
    for attempt in range(2):
        path = tmp_path / f"{attempt}.jsonl"
        command = [sys.executable, "-c", CHILD, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(20 + 7 * attempt):
                told = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            told = max([told, *(int(line) for line in child.stdout.read().split("\n")[:-1])])
        with Journal.open(path) as journal:
            assert list(journal.state.decisions)[: told + 1] == list(range(told + 1))
            assert len(journal.state.decisions) <= told + 2


def reviewed(name: str, *decisions: Decision) -> State:
    found = {one.id: replace(one, reviewer=name) for one in decisions}
    return State(start=replace(START, reviewer=name), decisions=found)


def test_two_reviewers_merge() -> None:
    ada = reviewed("ada", decision(1), decision(2), decision(3, None, "skip"), decision(4), decision(6, None, "reject"))
    bob = reviewed("bob", decision(2, "other", "relabel"), decision(3), decision(4), decision(5), decision(6, "other"))
    found = merge([ada, bob])
    assert {one.id: one.label for one in found.decisions} == {
        1: "tumour",
        3: "tumour",
        4: "tumour",
        5: "tumour",
        6: "other",
    }
    assert [{one.reviewer for one in pair} for pair in found.conflicts] == [{"ada", "bob"}]
    assert found.conflicts[0][0].id == 2
    by_tile = {one.id: one.reviewer for one in found.decisions}
    assert (by_tile[1], by_tile[3], by_tile[4]) == ("ada", "bob", "ada, bob")
    assert found.start.reviewer == "ada, bob"
    assert found.both == 2
    assert found.kappa == pytest.approx(cohen_kappa_score(["tumour", "tumour"], ["other", "tumour"]))


def test_not_this_class_contradicts_it() -> None:
    ada, bob = reviewed("ada", decision(1, None, "reject")), reviewed("bob", decision(1))
    assert len(merge([ada, bob]).conflicts) == 1
    assert merge([ada]).decisions[0].verdict == "reject"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["tumour", "other", None])), max_size=20), st.integers(0, 20)
)
def test_merging_needs_no_order(rows: list[tuple[int, str | None]], cut: int) -> None:
    """No label appears that nobody gave, and swapping reviewers changes neither labels nor conflicts."""
    halves = []
    for name, part in (("ada", rows[:cut]), ("bob", rows[cut:])):
        halves.append(reviewed(name, *(decision(i, label, "accept" if label else "skip") for i, label in part)))
    there, back = merge(halves), merge(halves[::-1])
    assert {one.id: one.label for one in there.decisions} == {one.id: one.label for one in back.decisions}
    assert {pair[0].id for pair in there.conflicts} == {pair[0].id for pair in back.conflicts}
    for one in there.decisions:
        given_labels = {state.decisions[one.id].label for state in halves if one.id in state.decisions}
        assert given_labels - {None} in ({one.label}, set())
    assert {one.id for one in there.decisions} | {pair[0].id for pair in there.conflicts} == {
        tile for state in halves for tile in state.decisions
    }


def test_other_tiles_or_classes_do_not_merge() -> None:
    ada = reviewed("ada", decision(1))
    other = State(start=replace(START, reviewer="bob", pool={"encoder": "big"}))
    with pytest.raises(StoreMismatchError, match="pool are"):
        merge([ada, other])
    other = State(start=replace(START, reviewer="bob", labels=("tumour", "stroma")))
    with pytest.raises(StoreMismatchError, match="stroma"):
        merge([ada, other])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=30))
def test_agreement_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    if len({*left, *right}) > 1:
        assert _kappa(pairs) == pytest.approx(cohen_kappa_score(left, right))
    else:
        assert _kappa(pairs) is None
