"""Queues: shares, each reason to look, and a fair audit; against brute force and by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.preprocessing import StandardScaler, normalize

from eosin.errors import NonFiniteError, QueryError
from eosin.tasks.review_queue import (
    SPREAD,
    Known,
    Shares,
    build_queue,
    directions,
    false_alarm_scores,
    farthest,
    margins,
)

NONE = np.zeros(0, np.int64)


def known(n: int, **about: Any) -> Known:
    rows = np.array(about.get("rows", []), np.int64)
    open_ = np.ones(n, bool)
    open_[rows] = False
    open_[about.get("barred", [])] = False
    return Known(
        open=open_,
        rows=rows,
        alarms=np.array(about.get("alarms", []), np.int64),
        alarm_codes=np.array(about.get("alarm_codes", []), np.int64),
        rarest=about.get("rarest", 1),
    )


def probabilities(n: int, classes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), size=n)


def test_shares_of_fifty() -> None:
    assert Shares().counts(50) == {"uncertain": 20, "hard": 15, "diverse": 10, "audit": 5}
    assert Shares(uncertain=4, hard=3, diverse=2, audit=1).counts(50) == Shares().counts(50)
    assert Shares(uncertain=1, hard=0, diverse=0, audit=0).counts(7)["uncertain"] == 7


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=4, max_size=4).filter(lambda s: sum(s) > 0.01), st.integers(0, 300))
def test_counts_add_up_and_keep_to_their_shares(parts: list[float], size: int) -> None:
    shares = Shares(uncertain=parts[0], hard=parts[1], diverse=parts[2], audit=parts[3])
    counts = list(shares.counts(size).values())
    assert sum(counts) == size
    exact = size * np.array(parts) / sum(parts)
    assert (np.abs(counts - exact) < 1 + 1e-6).all()


def test_shares_that_make_no_queue() -> None:
    with pytest.raises(QueryError, match="make no queue"):
        Shares(uncertain=-0.1)
    with pytest.raises(QueryError, match="make no queue"):
        Shares(uncertain=0, hard=0, diverse=0, audit=0)


def test_directions_are_those_of_scikit_learn() -> None:
    x = np.random.default_rng(0).standard_normal((200, 9)) * np.arange(1, 10) + 50
    expected = normalize(StandardScaler().fit_transform(x))
    np.testing.assert_allclose(directions(x), expected, atol=1e-5)
    constant = np.column_stack([x, np.full(200, 7.25)])
    np.testing.assert_allclose(directions(constant)[:, :9], expected, atol=1e-5)
    np.testing.assert_array_equal(directions(np.full((5, 3), 2.0)), 0)
    with pytest.raises(NonFiniteError, match="1 feature rows"):
        directions(np.where(np.arange(200)[:, None] == 3, np.nan, x))


def test_margins() -> None:
    np.testing.assert_allclose(margins(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])), [0.2, 0.7])


@settings(deadline=None)
@given(st.integers(0, 5000))
def test_k_centre_is_within_twice_the_best(seed: int) -> None:
    """Gonzalez: the farthest-first radius is at most twice the optimum, found here by trying every subset."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((10, 3))
    unit = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    fixed = np.array([0])
    chosen = farthest(unit, np.arange(1, 10), from_rows=fixed, k=2)
    radius = distance[:, [0, *chosen]].min(axis=1).max()
    best = min(distance[:, [0, *pair]].min(axis=1).max() for pair in itertools.combinations(range(1, 10), 2))
    assert radius <= 2 * best + 1e-5


def test_k_centre_visits_every_group_before_any_twice() -> None:
    rng = np.random.default_rng(1)
    group = rng.integers(6, size=120)
    unit = directions(4 * np.eye(6)[group] + 0.1 * rng.standard_normal((120, 6)))
    start = np.flatnonzero(group == 0)[:1]
    chosen = farthest(unit, np.arange(120), from_rows=start, k=5)
    assert sorted(group[chosen]) == [1, 2, 3, 4, 5]
    assert len(set(group[farthest(unit, np.arange(120), from_rows=NONE, k=6)])) == 6
    assert sorted(farthest(unit, np.arange(3), from_rows=NONE, k=9)) == [0, 1, 2]


def test_false_alarms_by_hand() -> None:
    unit = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)
    p = np.array([[0.1, 0.9], [0.4, 0.6], [0.2, 0.8], [0.5, 0.5]])
    score = false_alarm_scores(unit, p, known(4, rows=[0], alarms=[0], alarm_codes=[1]))
    np.testing.assert_allclose(score, [0.9, 0.36, 0, 0], atol=1e-6)
    both = false_alarm_scores(unit, p, known(4, rows=[0, 2], alarms=[0, 2], alarm_codes=[1, 0]))
    np.testing.assert_allclose(both, [0.9, max(0.36, 0.4 * 0.8), 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(false_alarm_scores(unit, p, known(4, rarest=0)), p[:, 0])


def test_each_tile_is_there_for_its_reason() -> None:
    rng = np.random.default_rng(2)
    unit, p = directions(rng.standard_normal((400, 12))), probabilities(400, 3, 3)
    told = known(400, rows=range(30), alarms=range(5), alarm_codes=[1] * 5)
    queue = build_queue(unit, p, told, size=40, shares=Shares(), rng=np.random.default_rng(4))
    assert Counter(share for _, share in queue) == Shares().counts(40)
    rows = {share: [row for row, why in queue if why == share] for share in Shares().to_dict()}
    left = told.open.copy()
    left[rows["audit"]] = False
    half = len(rows["hard"]) // 2
    top = np.flatnonzero(left)[np.argsort(-p[left, told.rarest])][:half]
    left[top] = False
    alarms = np.flatnonzero(left)[np.argsort(-false_alarm_scores(unit, p, told)[left])][: len(rows["hard"]) - half]
    left[alarms] = False
    assert set(rows["hard"]) == {*top, *alarms}
    least_sure = np.flatnonzero(left)[np.argsort(margins(p)[left])][: SPREAD * len(rows["uncertain"])]
    assert set(rows["uncertain"]) <= set(least_sure)
    left[rows["uncertain"]] = False
    taken = [*range(30), *(row for why in ("audit", "hard", "uncertain") for row in rows[why])]
    first = np.flatnonzero(left)[(unit[left] @ unit[taken].T).max(axis=1).argmin()]
    assert first in rows["diverse"]


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 60),
    shares=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any),
)
def test_no_tile_twice_and_none_that_is_closed(seed: int, size: int, shares: list[int]) -> None:
    rng = np.random.default_rng(seed)
    closed = rng.choice(50, rng.integers(0, 49), replace=False)
    told = known(50, rows=closed[::2], barred=closed[1::2], alarms=closed[:2], alarm_codes=[0] * len(closed[:2]))
    parts = Shares(uncertain=shares[0], hard=shares[1], diverse=shares[2], audit=shares[3])
    queue = build_queue(
        directions(rng.standard_normal((50, 4))), probabilities(50, 2, seed), told, size=size, shares=parts, rng=rng
    )
    rows = [row for row, _ in queue]
    assert len(rows) == len(set(rows)) == min(size, 50 - len(closed))
    assert not set(rows) & set(closed.tolist())


def test_the_audit_is_uniform_and_blind_to_the_head() -> None:
    rng = np.random.default_rng(5)
    unit = directions(rng.standard_normal((40, 5)))
    told = known(40, rows=range(10))
    drawn = Counter()
    parts = Shares(uncertain=1, hard=1, diverse=1, audit=6)
    heads = [probabilities(40, 2, 6), probabilities(40, 2, 7)]
    for seed in range(600):
        audits = []
        for p in heads[: 1 + (seed < 50)]:
            queue = build_queue(unit, p, told, size=9, shares=parts, rng=np.random.default_rng(seed))
            audits.append({row for row, share in queue if share == "audit"})
        assert audits[0] == audits[-1]
        drawn.update(audits[0])
    assert set(drawn) == set(range(10, 40))
    assert chisquare([drawn[row] for row in range(10, 40)]).pvalue > 0.001
