"""Drift without labels: has what the model sees changed since the reference period?

Four looks at it, from one score to whole feature vectors: the population stability index, Kolmogorov-Smirnov per
feature, the maximum mean discrepancy and a classifier two-sample test. The rows of one patient resemble each other,
so a p-value from permuted rows is far too small; here the patients (clusters) are permuted. A drift says that the
data differ, not that the model is worse.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.linalg
import scipy.stats

from eosin.errors import NonFiniteError, PredictionsError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.comparisons import benjamini_hochberg
from eosin.evaluation.interval import Interval
from eosin.evaluation.metrics import METRICS

Floats = npt.NDArray[np.float64]

PSI_WATCH = 0.10
PSI_ACT = 0.25
ROUNDING = 1e-12
FEW_PARTITIONS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Psi:
    """A population stability index.

    Attributes:
        value: sum over bins of (q - p) ln(q / p); 0 is no change.
        band: "stable" below 0.10, "watch" from 0.10, "act" from 0.25.
        expected: about what two samples of these sizes show without any drift, (bins - 1)(1/n + 1/m).
        bins: bins that were left after equal reference quantiles were joined.
        n_reference: rows of the reference.
        n_current: rows of the current period.
        note: empty, or why the band cannot be trusted.
    """

    value: float
    band: str
    expected: float
    bins: int
    n_reference: int
    n_current: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftTest:
    """A two-sample test on feature vectors.

    Attributes:
        statistic: the observed value: MMD^2, or the AUROC of the classifier.
        p: share of permuted labellings at least as extreme, with one added to both counts.
        null_mean: mean of the statistic over the permuted labellings.
        interval: cluster-bootstrap interval of the statistic (classifier test only).
        bandwidth: sigma of the RBF kernel (MMD only).
        n_reference: rows used of the reference.
        n_current: rows used of the current period.
        clusters_reference: clusters behind them.
        clusters_current: clusters behind them.
        permutations: labellings drawn.
        note: empty, or what limits the reading.
    """

    statistic: float
    p: float
    null_mean: float
    interval: Interval | None = None
    bandwidth: float | None = None
    n_reference: int
    n_current: int
    clusters_reference: int
    clusters_current: int
    permutations: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["interval"] = self.interval.to_dict() if self.interval is not None else None
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pooled:
    """Both samples stacked: rows (N, d), which are current (N,), and the cluster code of each (N,)."""

    x: Floats
    current: npt.NDArray[np.bool_]
    cluster: npt.NDArray[np.int64]


def psi(reference: npt.ArrayLike, current: npt.ArrayLike, *, bins: int = 10, epsilon: float = 1e-4) -> Psi:
    """Return the population stability index of one score or feature on the reference's quantile bins.

    Args:
        reference: (n,) values of the reference period.
        current: (m,) values of the period under watch.
        bins: quantile bins of the reference (10 = deciles); equal edges are joined.
        epsilon: floor of a bin's share, so that an empty bin gives a large number and not infinity.

    Raises:
        PredictionsError: an array that is empty or not one-dimensional, fewer than 2 bins, a constant reference.
        NonFiniteError: NaN or infinity.
    """
    before, after = _vector(reference, "reference"), _vector(current, "current")
    if bins < 2:
        raise PredictionsError(f"psi needs at least 2 bins, got {bins}")
    edges = np.unique(np.quantile(before, np.linspace(0, 1, bins + 1)[1:-1], method="inverted_cdf"))
    edges = edges[edges < before.max()]
    count = len(edges) + 1
    if count < 2:
        raise PredictionsError(f"nearly all values of the reference are {before.max():g}: there are no bins to compare")
    p = np.bincount(np.searchsorted(edges, before), minlength=count) / len(before)
    q = np.bincount(np.searchsorted(edges, after), minlength=count) / len(after)
    p, q = np.maximum(p, epsilon), np.maximum(q, epsilon)
    value = float(((q - p) * np.log(q / p)).sum())
    expected = (count - 1) * (1 / len(before) + 1 / len(after))
    few = (
        f"with so few rows a value of about {expected:.2f} is expected without drift"
        if expected > PSI_WATCH / 2
        else ""
    )
    return Psi(
        value=value,
        band="act" if value >= PSI_ACT else "watch" if value >= PSI_WATCH else "stable",
        expected=expected,
        bins=count,
        n_reference=len(before),
        n_current=len(after),
        note=few,
    )


def ks_drift(
    reference: npt.ArrayLike | pd.DataFrame,
    current: npt.ArrayLike | pd.DataFrame,
    *,
    cluster_reference: npt.ArrayLike | None = None,
    cluster_current: npt.ArrayLike | None = None,
    alpha: float = 0.05,
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the two-sample Kolmogorov-Smirnov distance of every feature, false discoveries held at `alpha`.

    Without clusters the p-value is scipy's (rows independent); with clusters it comes from permuting clusters.

    Args:
        reference: (n, f) features, or a table whose column names become the feature names.
        current: (m, f) the same features of the period under watch.
        cluster_reference: (n,) patient of each row.
        cluster_current: (m,) patient of each row.
        alpha: false discovery rate (Benjamini and Hochberg 1995).
        permutations: labellings drawn when clusters are given.
        seed: of the permutations.

    Returns:
        One row a feature: feature, statistic, p, q (BH-adjusted p), drift, n_reference, n_current, clusters, method.

    Raises:
        PredictionsError: shapes that do not fit, or a cluster in both samples.
        NonFiniteError: NaN or infinity.
    """
    names = list(reference.columns) if isinstance(reference, pd.DataFrame) else None
    if names is not None and isinstance(current, pd.DataFrame) and names != list(current.columns):
        raise PredictionsError("reference and current do not have the same columns in the same order")
    pooled = _pool(reference, current, cluster_reference, cluster_current)
    permuted = cluster_reference is not None
    if permuted:
        labels = _labellings(pooled, permutations, np.random.default_rng(seed))
        distances = np.stack([_ks(column, labels) for column in pooled.x.T])
        statistic, p = distances[:, 0], _p_value(distances)
    else:
        tests = [scipy.stats.ks_2samp(c[~pooled.current], c[pooled.current]) for c in pooled.x.T]
        statistic, p = np.array([tuple(test)[:2] for test in tests]).T
    q = benjamini_hochberg(p)
    return pd.DataFrame(
        {
            "feature": names if names is not None else [f"feature_{i}" for i in range(len(p))],
            "statistic": statistic,
            "p": p,
            "q": q,
            "drift": q <= alpha,
            "n_reference": int((~pooled.current).sum()),
            "n_current": int(pooled.current.sum()),
            "clusters": int(pooled.cluster.max()) + 1,
            "method": "cluster permutation" if permuted else "scipy, rows independent",
        }
    )


def mmd_drift(
    reference: npt.ArrayLike,
    current: npt.ArrayLike,
    *,
    cluster_reference: npt.ArrayLike | None = None,
    cluster_current: npt.ArrayLike | None = None,
    permutations: int = 499,
    max_rows: int = 4000,
    seed: int = 0,
) -> DriftTest:
    """Return the squared maximum mean discrepancy between two sets of features, with a cluster-permutation p.

    Gretton et al. 2012 (JMLR 13), eq. 3: the unbiased estimate with k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma the
    median distance of the pooled rows. Pairs of rows of one cluster are left out of the means: they say how alike the
    tiles of one patient are, not how alike patients are. With one row a cluster it is the textbook estimate.

    Args:
        reference: (n, d) features of the reference period.
        current: (m, d) features of the period under watch.
        cluster_reference: (n,) patient of each row; None: each row is its own.
        cluster_current: (m,) patient of each row.
        permutations: labellings drawn.
        max_rows: rows used at most, drawn evenly from both samples when there are more (the kernel is rows squared).
        seed: of the permutations and of the draw.

    Raises:
        PredictionsError: shapes that do not fit, a cluster in both samples, fewer than two clusters in one, all equal.
        NonFiniteError: NaN or infinity.
    """
    rng = np.random.default_rng(seed)
    pooled, thinned = _thin(_pool(reference, current, cluster_reference, cluster_current), max_rows, rng)
    clusters = _clusters_per_side(pooled, least=2)
    square = (pooled.x**2).sum(1)
    distance2 = np.maximum(square[:, None] + square[None, :] - 2 * pooled.x @ pooled.x.T, 0)
    np.fill_diagonal(distance2, 0)
    sigma2 = _median_distance2(distance2)
    kernel = np.exp(distance2 / (-2 * sigma2))
    kernel[pooled.cluster[:, None] == pooled.cluster[None, :]] = 0
    values = _mmd2(kernel, pooled.cluster, _labellings(pooled, permutations, rng))
    return DriftTest(
        statistic=float(values[0]),
        p=float(_p_value(values)),
        null_mean=float(values[1:].mean()),
        bandwidth=math.sqrt(sigma2),
        n_reference=int((~pooled.current).sum()),
        n_current=int(pooled.current.sum()),
        clusters_reference=clusters[0],
        clusters_current=clusters[1],
        permutations=permutations,
        note=_join(thinned, _partition_note(clusters)),
    )


def c2st(
    reference: npt.ArrayLike,
    current: npt.ArrayLike,
    *,
    cluster_reference: npt.ArrayLike | None = None,
    cluster_current: npt.ArrayLike | None = None,
    folds: int = 5,
    permutations: int = 199,
    max_rows: int = 4000,
    seed: int = 0,
) -> DriftTest:
    """Return how well a linear classifier tells the two samples apart: 0.5 is no drift, 1 complete.

    Lopez-Paz and Oquab 2017, with AUROC in place of accuracy. The classifier is ridge regression of the label on
    standardised features (penalty 0.1 per training row), scored out of fold with whole clusters left out. Its scores
    are linear in the labels, so that every permuted labelling is refitted exactly at the price of one matrix product.

    Args:
        reference: (n, d) features of the reference period.
        current: (m, d) features of the period under watch.
        cluster_reference: (n,) patient of each row; None: each row is its own.
        cluster_current: (m,) patient of each row.
        folds: cross-validation folds over clusters, drawn without looking at the labels.
        permutations: labellings drawn.
        max_rows: rows used at most, drawn evenly from both samples when there are more.
        seed: of folds, permutations and bootstrap.

    Raises:
        PredictionsError: shapes that do not fit, a cluster in both samples, fewer than two clusters in one.
        NonFiniteError: NaN or infinity.
    """
    rng = np.random.default_rng(seed)
    pooled, thinned = _thin(_pool(reference, current, cluster_reference, cluster_current), max_rows, rng)
    clusters = _clusters_per_side(pooled, least=2)
    fold_of = rng.permutation(sum(clusters)) % min(folds, sum(clusters))
    smoother = _ridge_smoother(pooled.x, fold_of[pooled.cluster])
    labels = _labellings(pooled, permutations, rng)
    scores = labels @ smoother.T
    values = _auroc_rows(labels, scores)
    rank = scipy.stats.rankdata(scores[0]) / len(scores[0])
    y = pooled.current.astype(np.int64)
    interval = bootstrap(METRICS["auroc"](y, rank, 0.5), pooled.cluster, y=y, seed=seed)
    return DriftTest(
        statistic=float(values[0]),
        p=float(_p_value(values)),
        null_mean=float(values[1:].mean()),
        interval=interval,
        n_reference=int((~pooled.current).sum()),
        n_current=int(pooled.current.sum()),
        clusters_reference=clusters[0],
        clusters_current=clusters[1],
        permutations=permutations,
        note=_join(thinned, _partition_note(clusters)),
    )


def _vector(values: npt.ArrayLike, name: str) -> Floats:
    """Return finite float64 (n,)."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise PredictionsError(f"{name} has shape {array.shape}; needed a non-empty one-dimensional array")
    return _finite(array, name)


def _finite(array: Floats, name: str) -> Floats:
    """Return `array`, or say how many of its values are not finite."""
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise NonFiniteError(f"{name}: {bad} of {array.size} values are NaN or infinite; drop those rows first")
    return array


def _pool(
    reference: npt.ArrayLike | pd.DataFrame,
    current: npt.ArrayLike | pd.DataFrame,
    cluster_reference: npt.ArrayLike | None,
    cluster_current: npt.ArrayLike | None,
) -> _Pooled:
    """Return both samples checked and stacked, clusters as codes 0..G-1."""
    before = _finite(np.asarray(reference, dtype=np.float64), "reference")
    after = _finite(np.asarray(current, dtype=np.float64), "current")
    if before.ndim != 2 or after.ndim != 2 or before.shape[1] != after.shape[1] or not len(before) or not len(after):
        raise PredictionsError(
            f"reference is {before.shape}, current is {after.shape}; needed (n, d) and (m, d), the same d, not empty"
        )
    if (cluster_reference is None) != (cluster_current is None):
        raise PredictionsError("clusters were given for one of the two samples only; give both or neither")
    n, total = len(before), len(before) + len(after)
    if cluster_reference is None or cluster_current is None:
        codes = np.arange(total)
    else:
        left, right = np.asarray(cluster_reference, dtype=object), np.asarray(cluster_current, dtype=object)
        if left.shape != (n,) or right.shape != (total - n,):
            raise PredictionsError(f"{left.shape} and {right.shape} cluster ids for {n} and {total - n} rows")
        codes = pd.factorize(np.concatenate([left, right]))[0].astype(np.int64)
        both = np.intersect1d(codes[:n], codes[n:])
        if len(both):
            raise PredictionsError(
                f"{len(both)} clusters are in reference and current both; permuting clusters needs each on one side: "
                "drop them from one of the two"
            )
    return _Pooled(x=np.vstack([before, after]), current=np.arange(total) >= n, cluster=codes)


def _thin(pooled: _Pooled, max_rows: int, rng: np.random.Generator) -> tuple[_Pooled, str]:
    """Return at most `max_rows` rows, both samples cut in proportion, and a note that says so."""
    total = len(pooled.x)
    if total <= max_rows:
        return pooled, ""
    sides = [np.flatnonzero(pooled.current == side) for side in (False, True)]
    keep = np.sort(
        np.concatenate([rng.choice(s, max(2, int(len(s) * max_rows / total)), replace=False) for s in sides])
    )
    codes = np.unique(pooled.cluster[keep], return_inverse=True)[1]
    thin = _Pooled(x=pooled.x[keep], current=pooled.current[keep], cluster=codes.astype(np.int64))
    return thin, f"a random {len(keep)} of {total} rows"


def _clusters_per_side(pooled: _Pooled, *, least: int) -> tuple[int, int]:
    """Return (clusters in the reference, clusters in current), at least `least` each."""
    before = len(np.unique(pooled.cluster[~pooled.current]))
    after = len(np.unique(pooled.cluster[pooled.current]))
    if min(before, after) < least:
        raise PredictionsError(f"{before} and {after} clusters in reference and current; needed at least {least} each")
    return before, after


def _labellings(pooled: _Pooled, permutations: int, rng: np.random.Generator) -> Floats:
    """Return (permutations + 1, N) labels, 1 = current: the real ones first, then with clusters permuted."""
    if permutations < 1:
        raise PredictionsError(f"{permutations} permutations; needed at least 1")
    of_cluster = np.zeros(int(pooled.cluster.max()) + 1)
    of_cluster[pooled.cluster] = pooled.current
    shuffled = rng.permuted(np.tile(of_cluster, (permutations, 1)), axis=1)
    return np.vstack([of_cluster, shuffled])[:, pooled.cluster]


def _p_value(values: Floats) -> Floats:
    """Return the one-sided permutation p of values (..., permutations + 1) whose first is the observed one."""
    observed = values[..., :1]
    beyond = (values[..., 1:] >= observed - ROUNDING * np.maximum(1, np.abs(observed))).sum(-1)
    return (1 + beyond) / values.shape[-1]


def _partition_note(clusters: tuple[int, int]) -> str:
    """Return a warning when so few labellings exist that no p below 0.05 can be."""
    partitions = math.comb(sum(clusters), clusters[0])
    return f"only {partitions} ways to split the clusters: p cannot be small" if partitions < FEW_PARTITIONS else ""


def _join(*notes: str) -> str:
    """Return the notes that say something, as one."""
    return "; ".join(note for note in notes if note)


def _ks(values: Floats, labels: Floats) -> Floats:
    """Return the KS distance (R,) between the two labelled samples of values (N,) for labels (R, N)."""
    order = np.argsort(values, kind="stable")
    last_of_tie = np.append(np.diff(values[order]) > 0, True)
    ordered = labels[:, order]
    current = np.cumsum(ordered, axis=1) / ordered.sum(1, keepdims=True)
    before = np.cumsum(1 - ordered, axis=1) / (1 - ordered).sum(1, keepdims=True)
    return np.abs(current - before)[:, last_of_tie].max(1)


def _median_distance2(distance2: Floats) -> float:
    """Return the median squared distance over pairs; over the unequal pairs where most are equal."""
    pairs = distance2[np.triu_indices(len(distance2), 1)]
    median = float(np.median(pairs))
    if median > 0:
        return median
    unequal = pairs[pairs > 0]
    if not len(unequal):
        raise PredictionsError("all rows of reference and current are equal; there is no distance to compare")
    return float(np.median(unequal))


def _mmd2(kernel: Floats, cluster: npt.NDArray[np.int64], labels: Floats) -> Floats:
    """Return MMD^2 (R,) for labels (R, N); `kernel` (N, N) is zero within clusters."""
    mates = np.bincount(cluster)[cluster].astype(np.float64)
    to_current = labels @ kernel
    yy = (to_current * labels).sum(1)
    xy = (to_current * (1 - labels)).sum(1)
    xx = kernel.sum() - yy - 2 * xy
    m = labels.sum(1)
    n = labels.shape[1] - m
    return xx / (n**2 - (1 - labels) @ mates) + yy / (m**2 - labels @ mates) - 2 * xy / (n * m)


def _ridge_smoother(x: Floats, fold: npt.NDArray[np.int64]) -> Floats:
    """Return (N, N): out-of-fold ridge scores of any labels y are `smoother @ y`.

    The intercept is left out: it follows the label balance of the training folds and would bias the pooled AUROC.
    """
    spread = x.std(0)
    z = (x - x.mean(0)) / np.where(spread > 0, spread, 1)
    smoother = np.zeros((len(x), len(x)))
    for held_out in np.unique(fold):
        test, train = np.flatnonzero(fold == held_out), np.flatnonzero(fold != held_out)
        centre = z[train].mean(0)
        a, b = z[train] - centre, z[test] - centre
        penalty = 0.1 * len(train)
        if len(train) < x.shape[1]:
            gram = a @ a.T + penalty * np.eye(len(train))
            block = scipy.linalg.solve(gram, a @ b.T, assume_a="pos").T
        else:
            gram = a.T @ a + penalty * np.eye(x.shape[1])
            block = b @ scipy.linalg.solve(gram, a.T, assume_a="pos")
        smoother[np.ix_(test, train)] = block
    return smoother


def _auroc_rows(labels: Floats, scores: Floats) -> Floats:
    """Return the AUROC (R,) of scores (R, N) against labels (R, N), ties counted half."""
    ranks = scipy.stats.rankdata(scores, axis=1)
    m = labels.sum(1)
    n = labels.shape[1] - m
    return ((ranks * labels).sum(1) - m * (m + 1) / 2) / (m * n)
