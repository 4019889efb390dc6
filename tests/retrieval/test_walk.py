"""Walks against brute force: sets searched step by step for the next smaller and the next larger entry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.retrieval.walk import STRIDE, guided_walk, predecessors, successors

Entry = tuple[int, int]  # key, place among the sorted: what a tree of keys with lists of entries would hold


def previous(entries: set[Entry], than: Entry) -> Entry | None:
    """Return the largest entry below `than`, by looking at all."""
    return max((entry for entry in entries if entry < than), default=None)


def following(entries: set[Entry], than: Entry) -> Entry | None:
    """Return the smallest entry that is `than` or above, by looking at all."""
    return min((entry for entry in entries if entry >= than), default=None)


def steps_down(keys: list[int], key: int, count: int) -> list[int]:
    entries, at, met = set(zip(keys, range(len(keys)), strict=True)), (key, -1), []
    while len(met) < count:
        found = previous(entries, at)
        if found is None:
            break
        met.append(found[1])
        at = found
    return met


def steps_up(keys: list[int], key: int, count: int) -> list[int]:
    entries, at, met = set(zip(keys, range(len(keys)), strict=True)), (key, -1), []
    while len(met) < count:
        found = following(entries, at)
        if found is None:
            break
        met.append(found[1])
        at = (found[0], found[1] + 1)
    return met


@settings(max_examples=150, deadline=None)
@given(
    keys=st.lists(st.integers(-40, 40) | st.integers(-(2**62), 2**62), max_size=40),
    key=st.integers(-45, 45) | st.integers(-(2**62), 2**62),
    count=st.integers(0, 50),
)
def test_steps_are_those_of_a_set_searched_one_by_one(keys: list[int], key: int, count: int) -> None:
    keys = sorted(keys)
    stored = np.array(keys, np.int64)
    assert predecessors(stored, key, count).tolist() == steps_down(keys, key, count)
    assert successors(stored, key, count).tolist() == steps_up(keys, key, count)


def brute_walk(
    keys: list[int], seeds: list[int], worth: list[float], rates: list[float], budget: int, passing: list[bool]
) -> tuple[list[int], int]:
    """Walk cursor by cursor over a set of entries not yet met, one entry at a time.

    Every cursor stands between two entries and knows its direction; it ends where another began and at the first entry
    that is met already.
    """
    entries = set(zip(keys, range(len(keys)), strict=True))
    best: dict[int, float] = {}
    for seed, value in zip(seeds, worth, strict=True):
        at = sum(key < seed for key in keys)
        best[at] = max(value, best.get(at, -np.inf))
    # worth, then successors before predecessors, then from the left: how equal worths are settled
    cursors = [[value, down, at, at] for at, value in best.items() for down in (0, 1)]
    met: dict[int, None] = {}
    examined = found = 0
    order: list[int] = []
    while cursors and found < budget and examined < 3 * budget:
        cursor = min(cursors, key=lambda one: (-one[0], one[1], one[2]))
        _, down, start, at = cursor
        block: list[int] = []
        while len(block) < min(STRIDE, budget - found, 3 * budget - examined):
            entry = previous(entries, (keys[at], at) if at < len(keys) else (2**63, 0)) if down else None
            if not down and at < len(keys):
                entry = following(entries, (keys[at], at))
            if entry is None or entry[1] in met or (at in best and at != start):
                break
            block.append(entry[1])
            met[entry[1]] = None
            at = entry[1] if down else entry[1] + 1
        if not block:
            cursors.remove(cursor)
            continue
        kept = [place for place in block if passing[place]]
        order += kept
        examined, found = examined + len(block), found + len(kept)
        cursor[0] = float(np.mean([rates[place] for place in sorted(block)]))
        cursor[3] = at
    return order, examined


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_guided_walk_is_the_walk_of_brute_force(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, seeds = data.draw(st.integers(0, 120)), data.draw(st.integers(1, 6))
    keys = np.sort(rng.integers(0, data.draw(st.sampled_from([4, 60, 10**9])), size=rows))
    starts, worth = rng.integers(-2, 62, size=seeds), rng.integers(0, 3, size=seeds) / 2
    rates = rng.integers(0, 5, size=rows) / 4
    passing = rng.random(rows) < data.draw(st.sampled_from([0.2, 0.7, 1.0]))
    budget = data.draw(st.integers(1, 130))
    walked = guided_walk(
        keys,
        starts,
        worth,
        lambda block: float(rates[block].mean()),
        budget=budget,
        passes=lambda block: passing[block],
        limit=3 * budget,
    )
    expected = brute_walk(keys.tolist(), starts.tolist(), worth.tolist(), rates.tolist(), budget, passing.tolist())
    assert (walked.places.tolist(), walked.examined) == expected


def test_one_seed_walks_its_predecessors_and_successors() -> None:
    keys = np.sort(np.random.default_rng(0).integers(0, 10**6, size=5000))
    seed = 400_000
    walked = guided_walk(keys, np.array([seed]), np.ones(1), lambda _: 1.0, budget=20 * STRIDE)
    below = set(predecessors(keys, seed, 10 * STRIDE).tolist())
    above = set(successors(keys, seed, 10 * STRIDE).tolist())
    assert set(walked.places.tolist()) <= set(predecessors(keys, seed, 5000)) | set(successors(keys, seed, 5000))
    # equal worths: successors first, so that the walk goes up alone
    assert set(walked.places.tolist()) == set(successors(keys, seed, 20 * STRIDE).tolist())
    fading = iter(np.linspace(0.9, 0, 100))
    walked = guided_walk(keys, np.array([seed]), np.ones(1), lambda _: next(fading), budget=20 * STRIDE)
    assert set(walked.places.tolist()) == below | above


@pytest.mark.parametrize("rows", [2_000, 20_000, 200_000, 1_000_000])
def test_as_many_entries_are_found_however_many_are_stored(rows: int) -> None:
    rng = np.random.default_rng(rows)
    keys = np.sort(rng.integers(0, 2**40, size=rows))
    for _ in range(5):
        seeds = rng.integers(0, 2**40, size=32)
        walked = guided_walk(keys, seeds, rng.random(32), lambda block: block.start % 997 / 997, budget=1000)
        assert len(walked.places) == len(set(walked.places.tolist())) == walked.examined == 1000


def test_every_entry_is_met_when_the_budget_allows() -> None:
    keys = np.sort(np.random.default_rng(2).integers(0, 50, size=300))
    walked = guided_walk(keys, np.array([3, 3, 20, 99]), np.zeros(4), lambda _: 0.0, budget=10**6)
    assert sorted(walked.places.tolist()) == list(range(300))
    assert walked.examined == 300


def test_what_does_not_pass_is_examined_but_not_found() -> None:
    keys = np.arange(10_000)
    rare = keys % 10 == 0
    walked = guided_walk(
        keys, np.array([5000]), np.ones(1), lambda _: 0.0, budget=50, passes=lambda b: rare[b], limit=200
    )
    assert walked.examined == 200
    assert len(walked.places) == 20
    assert rare[walked.places].all()


def test_no_entries_give_an_empty_walk() -> None:
    walked = guided_walk(np.empty(0, np.int64), np.array([1]), np.ones(1), lambda _: 0.0, budget=5)
    assert walked.places.tolist() == []
    assert walked.examined == 0
