"""Which tiles a reviewer sees next: four reasons to look, in stated shares, and a fair sample among them.

The audit is drawn first, uniformly from all tiles that nobody has reviewed, and never trains: it alone says how often
the head is wrong. The other shares take what it left:

    uncertain  smallest margin between the two most probable classes; of the three times as many least sure, those
               farthest apart, so that a queue is not one tile many times (Zhdanov 2019, arXiv 1901.05954)
    hard       where the next false alarm would be: half are the tiles that the head is surest are of the rarest class
               (false alarms, or finds), half those with the largest class probability times similarity to a tile whose
               proposed class was turned down; before there is one, all are of the first kind
    diverse    greedy k-centre: the tile farthest from all that is labelled or queued, again and again (Gonzalez 1985,
               Theoretical Computer Science 38:293; Sener & Savarese, ICLR 2018)
    audit      a uniform random sample

All similarities are cosines of features that were centred and scaled over the pool (`directions`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import NonFiniteError, QueryError

Array = npt.NDArray[Any]
Unit = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SPREAD = 3  # least sure tiles looked at for each one queued
CANDIDATES = 50_000  # tiles among which the diverse share looks; more are sampled
BLOCK = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Parts of a queue, above or equal to zero; they need not add up to one."""

    uncertain: float = 0.4
    hard: float = 0.3
    diverse: float = 0.2
    audit: float = 0.1

    def __post_init__(self) -> None:
        """Refuse shares that make no queue.

        Raises:
            QueryError: a share below zero, or all of them zero.
        """
        values = list(self.to_dict().values())
        if not np.isfinite(values).all() or min(values) < 0 or sum(values) <= 0:
            raise QueryError(f"shares {self.to_dict()} make no queue; none may be below 0, and one must be above it")

    def to_dict(self) -> dict[str, float]:
        """Return the shares by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def counts(self, size: int) -> dict[str, int]:
        """Return whole numbers that add up to `size`, each within one of its share (largest remainders)."""
        wanted = np.array(list(self.to_dict().values()))
        exact = size * wanted / wanted.sum()
        whole = np.floor(exact + 1e-9).astype(int)
        late = np.argsort(-(exact - whole), kind="stable")[: size - int(whole.sum())]
        whole[late] += 1
        return dict(zip(self.to_dict(), whole.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Known:
    """What review has told so far, by row of the pool.

    Attributes:
        open: (n,) tiles that may be queued: not reviewed, not of the test split.
        rows: (m,) reviewed tiles.
        alarms: (a,) tiles whose proposed class was turned down.
        alarm_codes: (a,) the class that was proposed for each.
        rarest: class index with the fewest labels.
    """

    open: Mask
    rows: Indices
    alarms: Indices
    alarm_codes: Indices
    rarest: int


def directions(x: Array) -> Unit:
    """Return features (n, D) centred, scaled to unit variance and brought to unit length, float32.

    Centring takes away what all tiles share, which would otherwise make every pair look alike. A feature that does not
    vary counts nothing; a tile exactly at the mean keeps a vector of zeros.

    Raises:
        NonFiniteError: NaN or infinity.
    """
    if not np.isfinite(x).all():
        raise NonFiniteError(f"{int((~np.isfinite(x).all(axis=1)).sum())} feature rows hold NaN or infinity")
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-9 * np.maximum(1, np.abs(mean)))
    out = np.empty(x.shape, np.float32)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        scaled = (x[rows] - mean) * inverse
        length = np.linalg.norm(scaled, axis=1, keepdims=True)
        out[rows] = np.divide(scaled, length, out=np.zeros_like(scaled), where=length > 0)
    return out


def margins(probability: Floats) -> Floats:
    """Return the difference (n,) between the two largest probabilities of each row; 0 is a coin's toss."""
    top = np.partition(probability, -2, axis=1)[:, -2:]
    return top[:, 1] - top[:, 0]


def farthest(unit: Unit, rows: Indices, *, from_rows: Indices, k: int) -> Indices:
    """Return `k` of `rows`, each the one farthest from `from_rows` and from those before it (greedy k-centre).

    Args:
        unit: (n, D) unit vectors.
        rows: candidates.
        from_rows: what to keep away from; empty: the first is the candidate farthest from the candidates' mean.
        k: how many; all, when there are fewer candidates.
    """
    chosen: list[int] = []
    vectors = unit[rows]
    near = np.full(len(rows), -np.inf, np.float32)
    for start in range(0, len(from_rows), 256):
        np.maximum(near, (vectors @ unit[from_rows[start : start + 256]].T).max(axis=1), out=near)
    if not len(from_rows) and len(rows):
        near = vectors @ vectors.mean(axis=0)
    for _ in range(min(k, len(rows))):
        at = int(np.argmin(near))
        chosen.append(at)
        np.maximum(near, vectors @ vectors[at], out=near)
        near[at] = np.inf
    return rows[chosen]


def false_alarm_scores(unit: Unit, probability: Floats, known: Known) -> Floats:
    """Return how likely each tile (n,) is to be the next false alarm; see the module."""
    if not len(known.alarms):
        return probability[:, known.rarest].copy()
    score = np.zeros(len(unit))
    for code in np.unique(known.alarm_codes):
        alarms = unit[known.alarms[known.alarm_codes == code]]
        for start in range(0, len(unit), BLOCK):
            rows = slice(start, start + BLOCK)
            near = np.maximum((unit[rows] @ alarms.T).max(axis=1), 0)
            score[rows] = np.maximum(score[rows], probability[rows, code] * near)
    return score


def build_queue(
    unit: Unit, probability: Floats, known: Known, *, size: int, shares: Shares, rng: np.random.Generator
) -> list[tuple[int, str]]:
    """Return (row, share) of the tiles to look at next, in random order; fewer where fewer are open.

    Args:
        unit: of `directions`, (n, D).
        probability: (n, C) of the head.
        known: what was reviewed.
        size: tiles wanted.
        shares: of each kind.
        rng: of the audit, the order and, in large pools, the candidates of the diverse share.
    """
    open_ = known.open.copy()
    counts = shares.counts(min(size, int(open_.sum())))
    queue: list[tuple[int, str]] = []

    def take(rows: Indices, share: str) -> None:
        queue.extend((int(row), share) for row in rows)
        open_[rows] = False

    take(np.sort(rng.choice(np.flatnonzero(open_), counts["audit"], replace=False)), "audit")
    alarm = false_alarm_scores(unit, probability, known)
    take(_largest(probability[:, known.rarest], open_, counts["hard"] // 2), "hard")
    take(_largest(alarm, open_, counts["hard"] - counts["hard"] // 2), "hard")
    unsure = _largest(-margins(probability), open_, SPREAD * counts["uncertain"])
    take(farthest(unit, unsure, from_rows=unsure[:0], k=counts["uncertain"]), "uncertain")
    rows = np.flatnonzero(open_)
    if len(rows) > CANDIDATES:
        rows = np.sort(rng.choice(rows, CANDIDATES, replace=False))
    queued = np.array([row for row, _ in queue], np.int64)
    take(farthest(unit, rows, from_rows=np.concatenate([known.rows, queued]), k=counts["diverse"]), "diverse")
    return [queue[at] for at in rng.permutation(len(queue))]


def _largest(value: Floats, open_: Mask, k: int) -> Indices:
    """Return the `k` open rows of largest value, the largest first; equal values in row order."""
    rows = np.flatnonzero(open_)
    return rows[np.argsort(-value[rows], kind="stable")[:k]]
