"""Registered tiles seen twice (two scanners, two stains): are the two views of a tile near one another?

The protocol of PLISM (Filiot et al. 2025, arXiv:2501.16239; owkin/plism-benchmark): the cosine of matched tiles, and
how often a tile's counterpart is among its k nearest in both sets together. Cosine alone rewards an encoder that
maps everything to one point, so the cosine of tiles that do not match stands beside it. All in float32: with half
precision ranks change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import NonFiniteError, PredictionsError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.interval import Interval
from eosin.evaluation.weighted import mean_metric

BLOCK = 512

TIE = 2e-6
"""Similarities closer than this are tied: sums of products in float32 are not exact to the last bit."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class MatchedTiles:
    """How near the two views of every tile are.

    Attributes:
        cosine: (n,) cosine of the two views of each tile.
        cosine_unmatched: mean cosine of a tile with all other tiles of the other set; near `cosine` means collapse.
        closer: (2, n) candidates strictly nearer than the counterpart, from A to B and from B to A.
        tied: (2, n) candidates as near as the counterpart, itself not counted.
    """

    cosine: npt.NDArray[np.float32]
    cosine_unmatched: float
    closer: npt.NDArray[np.int64]
    tied: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of matched tiles."""
        return len(self.cosine)

    def top_k(self, k: int) -> npt.NDArray[np.float64]:
        """Return (n,) whether the counterpart is among the k nearest, the mean of both directions.

        Among t tied candidates the counterpart may come anywhere, so it counts with the chance (k - closer) / (t + 1)
        that it is within k, cut to 0-1; a collapsed encoder scores as a coin would.
        """
        return np.clip((k - self.closer) / (self.tied + 1), 0, 1).mean(axis=0)

    def summary(
        self,
        cluster: npt.ArrayLike | None = None,
        *,
        ks: Sequence[int] = (1, 3, 5, 10),
        resamples: int = 2000,
        seed: int = 0,
    ) -> dict[str, Interval]:
        """Return the means as `cosine`, `top_1`, `top_3` ... with their intervals.

        Args:
            cluster: (n,) what is resampled, such as the tissue core or slide; tiles when None, which is too sure.
            ks: numbers of neighbours.
            resamples: of the bootstrap.
            seed: of the bootstrap.
        """
        metrics = {"cosine": mean_metric(self.cosine.astype(np.float64))}
        metrics |= {f"top_{k}": mean_metric(self.top_k(k)) for k in ks}
        units = np.arange(len(self)) if cluster is None else cluster
        return bootstrap(metrics, units, resamples=resamples, seed=seed)

    def to_dict(self, ks: Sequence[int] = (1, 3, 5, 10)) -> dict[str, Any]:
        """Return the means as plain values."""
        means = {f"top_{k}": float(self.top_k(k).mean()) for k in ks}
        return {
            "n": len(self),
            "cosine": float(self.cosine.mean()),
            "cosine_unmatched": self.cosine_unmatched,
            **means,
        }


def matched_tiles(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> MatchedTiles:
    """Compare features of the same tiles in two sets.

    For every tile of A its candidates are all other tiles of A and all of B; the other direction likewise.

    Args:
        a: (n, D).
        b: (n, D), row i shows the same tissue as row i of `a`.

    Raises:
        PredictionsError: shapes that differ, fewer than two tiles, or a row of zeros.
        NonFiniteError: NaN or infinity.
    """
    if np.ndim(a) != 2 or np.shape(a) != np.shape(b) or len(a) < 2:
        raise PredictionsError(
            f"matched tiles have shapes {np.shape(a)} and {np.shape(b)}; needed twice the same (n, D) with n >= 2"
        )
    one, other = _unit(a, "a"), _unit(b, "b")
    cosine = (one * other).sum(axis=1)
    ranks = [_ranks(one, other), _ranks(other, one)]
    total = float(one.sum(axis=0, dtype=np.float64) @ other.sum(axis=0, dtype=np.float64))
    return MatchedTiles(
        cosine=cosine,
        cosine_unmatched=(total - float(cosine.sum(dtype=np.float64))) / (len(one) * (len(one) - 1)),
        closer=np.stack([closer for closer, _ in ranks]),
        tied=np.stack([tied for _, tied in ranks]),
    )


def _ranks(
    queries: npt.NDArray[np.float32], others: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return how many candidates are nearer than the counterpart (n,), and how many as near (n,)."""
    n = len(queries)
    closer, tied = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    for start in range(0, n, BLOCK):
        rows = np.arange(start, min(start + BLOCK, n))
        within, across = queries[rows] @ queries.T, queries[rows] @ others.T
        target = across[np.arange(len(rows)), rows, None].copy()
        within[np.arange(len(rows)), rows] = -np.inf
        across[np.arange(len(rows)), rows] = -np.inf
        for similarity in (within, across):
            similarity -= target
        closer[rows] = (within > TIE).sum(1) + (across > TIE).sum(1)
        tied[rows] = (np.abs(within) <= TIE).sum(1) + (np.abs(across) <= TIE).sum(1)
    return closer, tied


def _unit(x: npt.NDArray[np.floating], name: str) -> npt.NDArray[np.float32]:
    values = np.asarray(x, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise NonFiniteError(f"{bad.size} rows of {name} hold NaN or infinity (first: row {bad[0]})")
    length = np.linalg.norm(values, axis=1, keepdims=True)
    empty = np.flatnonzero(length[:, 0] == 0)
    if empty.size:
        raise PredictionsError(f"{empty.size} rows of {name} are zero (first: row {empty[0]}) and have no direction")
    return values / length
