"""The mosaic: a few tiles that stand for a slide, different in look and spread over the tissue.

k-means on features finds kinds of tissue; of each kind, a share of its tiles is taken, far from each other on the
slide. The two stages are those of Yottixel (Kalra et al. 2020), with features in place of colour histograms.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from eosin.errors import NonFiniteError, QueryError

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]

CLUSTERS = 9
SHARE = 0.05
MOST = 100


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mosaic:
    """The tiles chosen of one slide.

    Attributes:
        rows: (m,) tiles of the slide, ascending.
        cluster: (m,) kind of tissue of each, from 0.
        covers: (m,) tiles that it stands for: those of its kind to which it is the nearest chosen one on the slide.
    """

    rows: Codes
    cluster: Codes
    covers: Codes

    def __len__(self) -> int:
        """Return m."""
        return len(self.rows)


def mosaic(
    vectors: npt.NDArray[np.floating],
    xy: npt.NDArray[np.integer],
    *,
    clusters: int = CLUSTERS,
    share: float = SHARE,
    most: int = MOST,
    seed: int = 0,
) -> Mosaic:
    """Return the mosaic of a slide; the same for the same tiles in the same order, on any number of threads.

    About `share` of the tiles, at least one a cluster and at most `most` in all, dealt to clusters by size. In each
    cluster the first is the tile nearest to its centre; each next one is farthest on the slide from all chosen before
    (Gonzalez 1985), so that the largest hole is at most twice as wide as it must be.

    Args:
        vectors: (n, D) features of the slide's tiles; their direction counts, not their length.
        xy: (n, 2) positions, level-0 pixels.
        clusters: kinds of tissue; fewer where there are fewer different tiles.
        share: of the tiles to choose, in (0, 1].
        most: tiles at most; at least `clusters`.
        seed: of the start of k-means.

    Raises:
        QueryError: no tiles, shapes that do not fit, or settings that choose nothing.
        NonFiniteError: NaN, infinity or a vector of zeros.
    """
    if vectors.ndim != 2 or xy.shape != (len(vectors), 2) or not len(vectors):
        raise QueryError(f"features {vectors.shape} and positions {xy.shape} make no mosaic; needed (n, D) and (n, 2)")
    if clusters < 1 or not 0 < share <= 1 or most < clusters:
        raise QueryError(
            f"a mosaic of {clusters} clusters, share {share:g}, at most {most} tiles; needed: clusters from 1, a share "
            "in (0, 1], and at least one tile a cluster"
        )
    unit = _unit(vectors)
    cluster, distance = _kinds(unit, clusters, seed)
    sizes = np.bincount(cluster)
    wanted = min(most, max(len(sizes), round(share * len(unit))))
    rows, of, covers = [], [], []
    for kind, count in enumerate(_dealt(sizes, wanted).tolist()):
        members = np.flatnonzero(cluster == kind)
        chosen, nearest = farthest_points(xy[members], count, first=int(distance[members].argmin()))
        rows.append(members[chosen])
        of.append(np.full(count, kind))
        covers.append(np.bincount(nearest, minlength=count))
    order = np.argsort(np.concatenate(rows))
    columns = [np.concatenate(part).astype(np.int64)[order] for part in (rows, of, covers)]
    return Mosaic(rows=columns[0], cluster=columns[1], covers=columns[2])


def farthest_points(xy: npt.NDArray[np.integer], count: int, *, first: int = 0) -> tuple[Codes, Codes]:
    """Return `count` points that are far from each other, and for every point which of them is nearest.

    Each next point is the one farthest from all chosen so far; ties go to the lower row (Gonzalez 1985).

    Args:
        xy: (n, 2) positions.
        count: 1 to n.
        first: row to begin with.

    Returns:
        Rows chosen (count,), in the order of choice, and (n,) positions in that list.
    """
    place = np.asarray(xy, np.float64)
    chosen = np.empty(count, np.int64)
    nearest = np.zeros(len(place), np.int64)
    gap = np.full(len(place), np.inf)
    row = first
    for at in range(count):
        chosen[at] = row
        away = np.square(place - place[row]).sum(axis=1)
        closer = away < gap
        nearest[closer], gap[closer] = at, away[closer]
        gap[row], nearest[row] = -1.0, at  # chosen once, even where several tiles share a place
        row = int(gap.argmax())
    return chosen, nearest


def _unit(vectors: npt.NDArray[np.floating]) -> Floats:
    exact = np.asarray(vectors, np.float64)
    length = np.sqrt(np.square(exact).sum(axis=1, keepdims=True))
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)).ravel())
    if len(bad):
        raise NonFiniteError(f"{len(bad)} of {len(exact)} tiles have no direction (NaN or zeros), first row {bad[0]}")
    return (exact / length).astype(np.float32)


def _kinds(unit: Floats, clusters: int, seed: int) -> tuple[Codes, Floats]:
    """Return the cluster of every tile (n,), from 0 without gaps, and its distance to the centre (n,)."""
    model = KMeans(n_clusters=min(clusters, len(unit)), n_init="auto", random_state=seed)
    with threadpool_limits(limits=1), warnings.catch_warnings():  # sums in another order would move a tile now and then
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer different tiles than clusters: gaps are closed below
        found = model.fit_predict(unit)
    distance = np.sqrt(np.square(unit - model.cluster_centers_[found]).sum(axis=1))
    return np.unique(found, return_inverse=True)[1].astype(np.int64), distance


def _dealt(sizes: Codes, total: int) -> Codes:
    """Return how many tiles each cluster gives: one each, then by Webster's method, `total` in all."""
    count = np.ones(len(sizes), np.int64)
    for _ in range(total - len(sizes)):
        claim = np.where(count < sizes, sizes / (count + 0.5), -1.0)
        count[claim.argmax()] += 1
    return count
