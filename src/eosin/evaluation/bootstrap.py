"""The cluster bootstrap: patients are resampled, not rows (tiles of one patient are not independent).

A resample draws, within each stratum, as many clusters as there are, with replacement, and keeps all rows of each
draw (Davison & Hinkley 1997, section 3.8). A resample is a vector of counts; a metric takes a batch of such vectors
as row weights, so nothing is copied or sorted again. A metric that can work on cluster counts directly says so with
`by_cluster` and is then never handed rows.

Strata: a cluster's stratum is the highest class it holds. In a binary task that is whether it holds a positive, so
every resample keeps the number of patients with and without the finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, overload, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from eosin.errors import PredictionsError
from eosin.evaluation.inputs import check_clusters, check_labels, check_same_rows
from eosin.evaluation.interval import Difference, Interval

Method = Literal["percentile", "bca"]
Weights = npt.NDArray[np.floating]
Values = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

CHUNK_CELLS = 200_000
JACKKNIFE_GROUPS = 1000
FEW_CLUSTERS = 20
FEW_IN_STRATUM = 10
MANY_DEGENERATE = 0.05


class Metric(Protocol):
    """A number computed for many weightings of the same rows at once."""

    def __call__(self, weights: Weights, /) -> Values:
        """Return (B,) values for weights (B, n); NaN where the number is undefined."""
        ...


@runtime_checkable
class ClusterMetric(Protocol):
    """A metric that can be restated over clusters, for speed."""

    def __call__(self, weights: Weights, /) -> Values:
        """Return (B,) values for row weights (B, n)."""
        ...

    def by_cluster(self, codes: Codes, clusters: int) -> Metric:
        """Return the same metric over cluster counts (B, clusters), where row i belongs to cluster `codes[i]`."""
        ...


def cluster_weights(
    cluster: npt.ArrayLike, *, strata: npt.ArrayLike | None = None, resamples: int = 2000, seed: int = 0
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield row weights of the resamples in chunks (b, n) float32, of bounded memory.

    Args:
        cluster: (n,) patient ids.
        strata: (n,) class of every row; the highest of a cluster is its stratum. None = one stratum.
        resamples: how many in all.
        seed: of the draws; they depend neither on the chunk size nor on the order of the rows.

    Raises:
        PredictionsError: shapes that do not fit, or fewer than one resample.
    """
    codes, stratum = _clusters(cluster, strata)
    for counts in _counts(stratum, resamples, seed, cells=len(codes)):
        yield np.take(counts, codes, axis=1)


def bootstrap_values(
    metrics: Mapping[str, Metric],
    cluster: npt.ArrayLike,
    *,
    y: npt.ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, Values]]:
    """Return each metric on all rows, and on every resample (resamples,); all see the same resamples.

    Args:
        metrics: by name.
        cluster: (n,) patient ids.
        y: (n,) class indices that stratify the clusters; None = one stratum.
        resamples: how many.
        seed: of the draws.

    Raises:
        PredictionsError: shapes that do not fit, or fewer than one resample.
    """
    study = _study(metrics, cluster, y)
    return study.points(), study.resampled(resamples, seed)


@overload
def bootstrap(
    metric: Mapping[str, Metric],
    cluster: npt.ArrayLike,
    *,
    y: npt.ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
) -> dict[str, Interval]: ...
@overload
def bootstrap(
    metric: Metric,
    cluster: npt.ArrayLike,
    *,
    y: npt.ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
) -> Interval: ...
def bootstrap(
    metric: Metric | Mapping[str, Metric],
    cluster: npt.ArrayLike,
    *,
    y: npt.ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    method: Method = "percentile",
    seed: int = 0,
) -> Interval | dict[str, Interval]:
    """Return the interval of a metric, or of several on the same resamples, by resampling clusters.

    "percentile": quantiles of the resampled values (Efron & Tibshirani 1993, eq. 13.5). "bca": bias-corrected and
    accelerated (eq. 14.9 to 14.15), the acceleration by a jackknife over clusters or, where there are more than
    1,000, over 1,000 random groups of clusters.

    Args:
        metric: one metric, or several by name.
        cluster: (n,) patient ids.
        y: (n,) class indices that stratify the clusters; None = one stratum.
        resamples: how many; 2,000 or more for a published interval.
        level: of confidence.
        method: "percentile" or "bca".
        seed: of the draws.

    Raises:
        PredictionsError: shapes that do not fit, a level outside (0, 1), or an unknown method.
    """
    if method not in ("percentile", "bca"):
        raise PredictionsError(f"unknown bootstrap method {method!r}; choose percentile or bca")
    check_level(level)
    study = _study(metric if isinstance(metric, Mapping) else {"metric": metric}, cluster, y)
    points, drawn = study.points(), study.resampled(resamples, seed)
    acceleration = study.acceleration(seed) if method == "bca" else {}
    result = {name: study.interval(points[name], drawn[name], level, acceleration.get(name)) for name in drawn}
    return result if isinstance(metric, Mapping) else result["metric"]


def paired_difference(
    metric_a: Metric,
    metric_b: Metric,
    cluster: npt.ArrayLike,
    *,
    y: npt.ArrayLike | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Return metric_a - metric_b of the same rows, both on the same resampled clusters.

    p = 2 min(P(d <= 0), P(d >= 0)), each as (count + 1) / (resamples + 1) (Davison & Hinkley 1997, eq. 4.11), at most
    1; so it is never 0, and 2,000 resamples cannot show less than 0.001.

    Args:
        metric_a: first metric.
        metric_b: second metric, over the same rows in the same order.
        cluster: (n,) patient ids.
        y: (n,) class indices that stratify the clusters; None = one stratum.
        resamples: how many.
        level: of confidence.
        seed: of the draws.

    Raises:
        PredictionsError: shapes that do not fit, or a level outside (0, 1).
    """
    check_level(level)
    study = _study({"a": metric_a, "b": metric_b}, cluster, y)
    points, values = study.points(), study.resampled(resamples, seed)
    drawn = values["a"] - values["b"]
    usable = drawn[np.isfinite(drawn)]
    interval = study.interval(points["a"] - points["b"], drawn, level, None)
    return Difference(
        point=interval.point,
        low=interval.low,
        high=interval.high,
        p=two_sided_p(usable),
        se=float(usable.std(ddof=1)) if usable.size > 1 else float("nan"),
        level=level,
        n=interval.n,
        clusters=interval.clusters,
        resamples=resamples,
        degenerate=interval.degenerate,
        method="percentile",
        note=interval.note,
    )


def two_sided_p(differences: Values) -> float:
    """Return 2 min(P(d <= 0), P(d >= 0)) of resampled differences (R,), with the +1 correction; NaN without any."""
    if differences.size == 0:
        return float("nan")
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (smaller + 1) / (differences.size + 1))


def check_level(level: float) -> None:
    """Return when `level` is a confidence level.

    Raises:
        PredictionsError: it lies outside (0, 1).
    """
    if not 0 < level < 1:
        raise PredictionsError(f"confidence level is {level:g}; needed a fraction between 0 and 1, such as 0.95")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Study:
    """Metrics over cluster counts, the cluster of every row (n,) and the stratum of every cluster (k,)."""

    metrics: Mapping[str, Metric]
    codes: Codes
    stratum: Codes

    def points(self) -> dict[str, float]:
        """Return each metric with every cluster once."""
        once = np.ones((1, len(self.stratum)))
        return {name: float(metric(once)[0]) for name, metric in self.metrics.items()}

    def resampled(self, resamples: int, seed: int) -> dict[str, Values]:
        """Return (resamples,) values of each metric."""
        return _evaluated(self.metrics, _counts(self.stratum, resamples, seed, cells=len(self.codes)))

    def acceleration(self, seed: int) -> dict[str, float]:
        """Return the BCa acceleration of each metric, by a jackknife over groups of clusters."""
        groups, stratum = _jackknife_groups(self.stratum, seed)
        left_out = _evaluated(self.metrics, _leave_out(groups, len(stratum), cells=len(self.codes)))
        return {name: _acceleration(values, stratum) for name, values in left_out.items()}

    def interval(self, point: float, drawn: Values, level: float, acceleration: float | None) -> Interval:
        """Return the interval of resampled values (R,): percentile without an acceleration, else BCa."""
        usable = drawn[np.isfinite(drawn)]
        tails = np.array([(1 - level) / 2, (1 + level) / 2])
        if acceleration is not None and usable.size:
            tails = _bca_tails(usable, point, acceleration, tails)
        low, high = np.quantile(usable, tails) if usable.size and np.isfinite(tails).all() else (np.nan, np.nan)
        notes = _cluster_notes(self.stratum)
        if drawn.size - usable.size > MANY_DEGENERATE * drawn.size:
            notes.append(f"{drawn.size - usable.size} of {drawn.size} resamples were degenerate and left out")
        if not np.isfinite(tails).all():
            notes.append("no BCa interval, all resamples lie on one side of the point: use percentile")
        return Interval(
            point=point,
            low=float(low),
            high=float(high),
            level=level,
            n=len(self.codes),
            clusters=len(self.stratum),
            resamples=drawn.size,
            degenerate=drawn.size - usable.size,
            method="percentile" if acceleration is None else "bca",
            note="; ".join(notes),
        )


def _study(metrics: Mapping[str, Metric], cluster: npt.ArrayLike, y: npt.ArrayLike | None) -> _Study:
    codes, stratum = _clusters(cluster, y)
    over_clusters = {name: _over_clusters(metric, codes, len(stratum)) for name, metric in metrics.items()}
    return _Study(metrics=over_clusters, codes=codes, stratum=stratum)


def _clusters(cluster: npt.ArrayLike, y: npt.ArrayLike | None) -> tuple[Codes, Codes]:
    """Return the cluster of every row (n,) and the stratum of every cluster (k,)."""
    names = np.asarray(cluster)
    if names.size == 0:
        raise PredictionsError("no rows: nothing can be resampled")
    codes = check_clusters(names, len(names))
    stratum = np.zeros(int(codes.max()) + 1, dtype=np.int64)
    if y is not None:
        labels = check_labels(y)
        check_same_rows("cluster", len(codes), len(labels))
        np.maximum.at(stratum, codes, labels)
    return codes, stratum


def _cluster_notes(stratum: Codes) -> list[str]:
    """Return what a reader must know about how few clusters there are."""
    notes = []
    if len(stratum) < FEW_CLUSTERS:
        notes.append(f"only {len(stratum)} clusters: the interval is probably too narrow")
    values, sizes = np.unique(stratum, return_counts=True)
    if len(values) > 1:
        notes += [
            f"only {size} clusters whose highest class is {value}"
            for value, size in zip(values, sizes, strict=True)
            if size < FEW_IN_STRATUM
        ]
    return notes


def _over_clusters(metric: Metric, codes: Codes, clusters: int) -> Metric:
    """Return `metric` as a function of cluster counts (B, clusters)."""
    if isinstance(metric, ClusterMetric):
        return metric.by_cluster(codes, clusters)
    return lambda counts: metric(np.take(counts, codes, axis=1))


def _counts(stratum: Codes, resamples: int, seed: int, *, cells: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield cluster counts (b, k) float32, so many at a time that (b, cells) stays small."""
    if resamples < 1:
        raise PredictionsError(f"{resamples} resamples asked for; needed at least 1, and 2,000 for an interval")
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(stratum == value) for value in np.unique(stratum)]
    step = max(1, CHUNK_CELLS // cells)
    for start in range(0, resamples, step):
        counts = np.empty((min(step, resamples - start), len(stratum)), dtype=np.float32)
        for row in counts:
            for inside in members:
                row[inside] = np.bincount(rng.integers(inside.size, size=inside.size), minlength=inside.size)
        yield counts


def _evaluated(metrics: Mapping[str, Metric], weights: Iterator[npt.NDArray[np.float32]]) -> dict[str, Values]:
    parts: dict[str, list[Values]] = {name: [] for name in metrics}
    for chunk in weights:
        for name, metric in metrics.items():
            parts[name].append(np.asarray(metric(chunk), dtype=np.float64))
    return {name: np.concatenate(found) for name, found in parts.items()}


def _bca_tails(values: Values, point: float, acceleration: float, tails: Values) -> Values:
    """Return corrected tail probabilities (2,) (Efron & Tibshirani 1993, eq. 14.10), NaN where there are none.

    Ties with the point count half; where all values equal the point there is nothing to correct.
    """
    below = ((values < point).mean() + (values <= point).mean()) / 2
    if np.ptp(values) == 0:
        return tails
    if below in (0.0, 1.0):
        return np.full(2, np.nan)
    z = ndtri(below) + ndtri(tails)
    return ndtr(ndtri(below) + z / (1 - acceleration * z))


def _jackknife_groups(stratum: Codes, seed: int) -> tuple[Codes, Codes]:
    """Return the group of every cluster (k,) and the stratum of every group; few clusters are their own groups."""
    if len(stratum) <= JACKKNIFE_GROUPS:
        return np.arange(len(stratum)), stratum
    rng, groups, kinds = np.random.default_rng(seed), np.empty_like(stratum), []
    for value in np.unique(stratum):
        inside = rng.permutation(np.flatnonzero(stratum == value))
        many = min(inside.size, max(2, round(JACKKNIFE_GROUPS * inside.size / len(stratum))))
        groups[inside] = len(kinds) + np.arange(inside.size) % many
        kinds += [value] * many
    return groups, np.array(kinds, dtype=np.int64)


def _leave_out(groups: Codes, many: int, *, cells: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield cluster counts (b, k): ones, but zero for the clusters of one group after another."""
    step = max(1, CHUNK_CELLS // cells)
    for start in range(0, many, step):
        wanted = np.arange(start, min(start + step, many))
        yield (groups[None, :] != wanted[:, None]).astype(np.float32)


def _acceleration(left_out: Values, stratum: Codes) -> float:
    """Return the acceleration (Efron & Tibshirani 1993, eq. 14.15), summed over strata as over several samples.

    Groups whose absence leaves the metric undefined are skipped, as is a stratum of one group.
    """
    third, second = 0.0, 0.0
    for value in np.unique(stratum):
        inside = left_out[stratum == value]
        inside = inside[np.isfinite(inside)]
        if inside.size > 1:
            influence = (inside.size - 1) / inside.size * (inside.mean() - inside)
            third += float((influence**3).sum())
            second += float((influence**2).sum())
    return third / (6 * second**1.5) if second > 0 else 0.0
