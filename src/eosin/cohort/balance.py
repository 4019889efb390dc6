"""Whole groups to parts, so that every class is shared out as wished: the search behind all splits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MOVES = 2000
_PERFECT = 1e-8


def class_counts(y: npt.NDArray[np.int64], group: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return how many rows of each class each group has, (groups, classes), from codes (n,)."""
    counts = np.zeros((group.max() + 1, y.max() + 1))
    np.add.at(counts, (group, y), 1.0)
    return counts


def imbalance(counts: npt.NDArray[np.float64], part: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> float:
    """Return the sum over parts f and classes c of ((n_fc - share_f n_c) / n_c)^2: 0 is perfect.

    This is the squared deviation that Howard et al. 2021 (Nat Commun 12:4423) minimise to lay
    out whole sites, here with a share a part instead of equal ones.

    Args:
        counts: (groups, classes) rows of each class.
        part: (groups,) which part each group is in.
        shares: (parts,) wished share of each part, sum 1.
    """
    scaled = counts / counts.sum(axis=0)
    gap = _totals(scaled, part, len(shares)) - shares[:, None]
    return float((gap**2).sum())


def assign_groups(
    counts: npt.NDArray[np.float64],
    shares: npt.NDArray[np.float64],
    *,
    rng: np.random.Generator,
    restarts: int = 1,
    spread: float = 0.5,
) -> npt.NDArray[np.int64]:
    """Return a part for each group, (groups,), of small `imbalance`; whole groups only.

    Groups come in random order, the large ones first, each to the part where it costs least;
    then single groups are moved and pairs of groups swapped while that helps. The objective
    counts rows of each class and also groups that hold the class, so that no part is left
    without a class that enough groups have, and the number of groups, so that parts are alike.

    Args:
        counts: (groups, classes) rows of each class; every class occurs.
        shares: (parts,) wished share of each part, sum 1.
        rng: source of the random order.
        restarts: starts tried, the first greedy, the others random; the best result is kept.
        spread: weight of the groups beside the rows of a class, whose weight is 1.
    """
    held = (counts > 0).astype(np.float64)
    columns = np.hstack([counts, held, np.ones((len(counts), 1))])
    scaled = columns / columns.sum(axis=0)
    scaled[:, counts.shape[1] :] *= np.sqrt(spread)
    goal = shares[:, None] * scaled.sum(axis=0)
    best, least = np.zeros(len(counts), np.int64), np.inf
    for start in range(restarts):
        part = rng.integers(0, len(shares), len(counts)) if start else _greedy(scaled, goal, rng)
        _improve(scaled, goal, part)
        cost = float(((_totals(scaled, part, len(shares)) - goal) ** 2).sum())
        if cost < least - 1e-12:
            best, least = part, cost
    return best


def _totals(scaled: npt.NDArray[np.float64], part: npt.NDArray[np.int64], parts: int) -> npt.NDArray[np.float64]:
    totals = np.zeros((parts, scaled.shape[1]))
    np.add.at(totals, part, scaled)
    return totals


def _greedy(
    scaled: npt.NDArray[np.float64], goal: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    size = scaled.sum(axis=1)
    large_first = np.where(size > 0.1 * goal.sum(axis=1).min(), size * rng.uniform(0.7, 1.0, len(size)), 0.0)
    order = np.lexsort((rng.random(len(size)), -large_first))
    tie = rng.random(len(goal)) * 1e-12
    gap = -goal.copy()
    part = np.zeros(len(scaled), np.int64)
    for at in order:
        part[at] = np.argmin(gap @ scaled[at] + tie)
        gap[part[at]] += scaled[at]
    return part


def _improve(scaled: npt.NDArray[np.float64], goal: npt.NDArray[np.float64], part: npt.NDArray[np.int64]) -> None:
    """Move or swap groups in place while the objective falls.

    Moving g from part a to b changes it by 2 g.(gap_b - gap_a + g), gap = total - goal.
    """
    gap = _totals(scaled, part, len(goal)) - goal
    own = (scaled**2).sum(axis=1)
    every = np.arange(len(scaled))
    for _ in range(_MOVES):
        if (gap**2).sum() < _PERFECT:
            return
        pull = scaled @ gap.T
        change = pull - pull[every, part][:, None] + own[:, None]
        change[every, part] = 0.0
        at, to = np.unravel_index(np.argmin(change), change.shape)
        if change[at, to] < -1e-12:
            gap[part[at]] -= scaled[at]
            gap[to] += scaled[at]
            part[at] = to
        elif not _swap(scaled, gap, part):
            return


def _swap(scaled: npt.NDArray[np.float64], gap: npt.NDArray[np.float64], part: npt.NDArray[np.int64]) -> bool:
    """Swap the pair of groups that helps most; False if none does or there are too many to try."""
    if len(scaled) > 300:
        return False
    pull = scaled @ gap.T
    # Swapping i (part a) with j (part b) is a move by d = s_i - s_j: change 2 d.(gap_b - gap_a + d).
    there = pull[:, part]
    here = pull[np.arange(len(part)), part]
    inner = scaled @ scaled.T
    own = np.diag(inner)
    change = there + there.T - here[:, None] - here[None, :] + own[:, None] + own[None, :] - 2 * inner
    change[part[:, None] == part[None, :]] = 0.0
    i, j = np.unravel_index(np.argmin(change), change.shape)
    if change[i, j] >= -1e-12:
        return False
    a, b = part[i], part[j]
    gap[a] += scaled[j] - scaled[i]
    gap[b] += scaled[i] - scaled[j]
    part[i], part[j] = b, a
    return True
