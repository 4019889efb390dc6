"""Do sites differ by more than chance? Cochran's Q and I^2 over effects, and a permutation test over patients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import ClusterMetric, Metric
from eosin.evaluation.inputs import check_clusters
from eosin.evaluation.metrics import make_metrics
from eosin.evaluation.subgroups import Codes, Floats, check_scores, level_codes, level_of_clusters

CHUNK_CELLS = 2_000_000
ROUNDING = 1e-12
FEW_SITES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Heterogeneity:
    """How much effects differ between sites beyond their own uncertainty.

    Attributes:
        q: Cochran's Q, chi-squared with df = sites - 1 when there is no heterogeneity.
        df: sites - 1.
        p: of that test.
        i2: share of the variation that is between sites, max(0, (Q - df) / Q).
        i2_low: lower end of its 95 % interval (test-based, Higgins and Thompson 2002).
        i2_high: upper end.
        tau2: between-site variance (DerSimonian and Laird 1986).
        fixed: inverse-variance mean.
        fixed_se: its standard error.
        random: mean with tau2 added to every variance.
        random_se: its standard error.
        note: empty, or that there are few sites.
    """

    q: float
    df: int
    p: float
    i2: float
    i2_low: float
    i2_high: float
    tau2: float
    fixed: float
    fixed_se: float
    random: float
    random_se: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PermutationTest:
    """A permutation test.

    Attributes:
        statistic: the observed value.
        p: share of permutations at least as extreme, with one added to both counts.
        permutations: how many were drawn.
        levels: levels compared.
        scheme: "between clusters" or "within clusters".
        note: which levels were left out, if any.
    """

    statistic: float
    p: float
    permutations: int
    levels: int
    scheme: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def heterogeneity(effects: npt.ArrayLike, errors: npt.ArrayLike) -> Heterogeneity:
    """Return Cochran's Q, I^2 and tau^2 of one effect per site, such as `point` and `se` of a subgroup table.

    Args:
        effects: (k,) one number per site, k >= 2.
        errors: (k,) their standard errors, > 0.

    Raises:
        PredictionsError: fewer than two sites, values that are not finite, an error of 0.
    """
    value, error = np.asarray(effects, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if value.ndim != 1 or value.shape != error.shape or len(value) < 2:
        raise PredictionsError(
            f"effects {value.shape} and errors {error.shape}; needed (k,) and (k,) with k >= 2 sites"
        )
    if not (np.isfinite(value).all() and np.isfinite(error).all() and (error > 0).all()):
        raise PredictionsError("every site needs a finite effect and a standard error above 0; leave out the others")
    weight = error**-2.0
    df = len(value) - 1
    fixed = float((weight * value).sum() / weight.sum())
    q = float((weight * (value - fixed) ** 2).sum())
    tau2 = max(0.0, (q - df) / float(weight.sum() - (weight**2).sum() / weight.sum()))
    with_tau = 1 / (error**2 + tau2)
    low, high = _i2_interval(q, df)
    return Heterogeneity(
        q=q,
        df=df,
        p=float(scipy.stats.chi2.sf(q, df)),
        i2=max(0.0, (q - df) / q) if q > 0 else 0.0,
        i2_low=low,
        i2_high=high,
        tau2=tau2,
        fixed=fixed,
        fixed_se=float(weight.sum() ** -0.5),
        random=float((with_tau * value).sum() / with_tau.sum()),
        random_se=float(with_tau.sum() ** -0.5),
        note=f"only {len(value)} sites: I^2 says little" if len(value) < FEW_SITES else "",
    )


def interaction_test(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    level: npt.ArrayLike,
    cluster: npt.ArrayLike,
    *,
    metric: str = "auroc",
    threshold: float = 0.5,
    permutations: int = 999,
    seed: int = 0,
) -> PermutationTest:
    """Return a test of whether a metric differs between levels by more than chance would make it.

    Level labels are permuted over clusters, among clusters whose highest class is the same; where a cluster is in
    several levels (one slide on several scanners), over the rows of one class within each cluster. The statistic is
    sum_l w_l (m_l - mean)^2 with 1 / w_l = sum over classes of 1 / rows. The hypothesis is that scores, given the
    class, do not depend on the level: a level that only shifts all its scores leaves AUROC alone and shows in "ba".

    Args:
        y: (n,) class indices.
        p: (n,) P(positive) or (n, C) probabilities.
        level: (n,) site of each row.
        cluster: (n,) patient of each row.
        metric: name of `METRICS`.
        threshold: of the binary decision.
        permutations: how many.
        seed: of the permutations.

    Raises:
        PredictionsError: bad input, or fewer than two levels with a value.
    """
    labels, scores = check_scores(y, p)
    names, codes = level_codes(level, len(labels))
    units = check_clusters(cluster, len(labels))
    kept = _has_value(make_metrics([metric], labels, scores, threshold=threshold)[metric], codes, len(names))
    if kept.sum() < 2:
        raise PredictionsError(f"{metric} has a value on {kept.sum()} of {len(names)} levels; needed at least two")
    rows = np.flatnonzero(kept[codes])
    labels, scores, codes = labels[rows], scores[rows], (np.cumsum(kept) - 1)[codes[rows]]
    units = check_clusters(units[rows], len(rows))
    made = make_metrics([metric], labels, scores, threshold=threshold)[metric]
    made, classes, chunks, scheme = _exchange(made, labels, codes, units, permutations, np.random.default_rng(seed))
    levels = int(kept.sum())
    values = np.concatenate([_spread(made, classes, chunk, levels) for chunk in chunks])
    beyond = int((values[1:] >= values[0] * (1 - ROUNDING)).sum())
    lost = ", ".join(str(name) for name, ok in zip(names, kept, strict=True) if not ok)
    return PermutationTest(
        statistic=float(values[0]),
        p=(1 + beyond) / (1 + permutations),
        permutations=permutations,
        levels=levels,
        scheme=scheme,
        note=f"left out, {metric} has no value there: {lost}" if lost else "",
    )


def _exchange(
    metric: Metric, labels: Codes, codes: Codes, units: Codes, permutations: int, rng: np.random.Generator
) -> tuple[Metric, Floats, Iterator[Codes], str]:
    """Return what is exchanged (clusters or rows): the metric over them, their class counts, levels, the scheme."""
    of_cluster = level_of_clusters(codes, units)
    classes = np.eye(int(labels.max()) + 1)[labels]
    if of_cluster is None:
        return metric, classes, _within(labels, codes, units, permutations, rng), "within clusters"
    assert isinstance(metric, ClusterMetric)  # every one of METRICS is
    counts = np.zeros((len(of_cluster), classes.shape[1]))
    np.add.at(counts, units, classes)
    over_clusters = metric.by_cluster(units, len(of_cluster))
    return over_clusters, counts, _between(of_cluster, counts, permutations, rng), "between clusters"


def _has_value(metric: Metric, codes: Codes, levels: int) -> npt.NDArray[np.bool_]:
    """Return (levels,) whether the metric is defined on the rows of each level."""
    return np.array([np.isfinite(metric((codes == k)[None].astype(np.float64))[0]) for k in range(levels)])


def _i2_interval(q: float, df: int) -> tuple[float, float]:
    """Return the 95 % interval of I^2 from that of ln H (Higgins and Thompson 2002, table II)."""
    k = df + 1
    log_h = 0.5 * np.log(max(q, df) / df)
    if q > k:
        error = 0.5 * (np.log(q) - np.log(df)) / (np.sqrt(2 * q) - np.sqrt(2 * k - 3))
    elif k > 2:
        error = np.sqrt(1 / (2 * (k - 2)) * (1 - 1 / (3 * (k - 2) ** 2)))
    else:
        return 0.0, 1.0
    h = np.exp(log_h + scipy.stats.norm.isf(0.025) * error * np.array([-1, 1]))
    low, high = np.maximum(0, 1 - 1 / h**2)
    return float(low), float(high)


def _between(of_cluster: Codes, classes: Floats, permutations: int, rng: np.random.Generator) -> Iterator[Codes]:
    """Yield levels (b, G): the real ones, then exchanged among clusters of the same highest class."""
    yield of_cluster[None]
    highest = np.array([np.flatnonzero(row)[-1] for row in classes])
    step = max(1, CHUNK_CELLS // len(of_cluster))
    for start in range(0, permutations, step):
        drawn = np.tile(of_cluster, (min(step, permutations - start), 1))
        for kind in np.unique(highest):
            mine = np.flatnonzero(highest == kind)
            drawn[:, mine] = rng.permuted(drawn[:, mine], axis=1)
        yield drawn


def _within(labels: Codes, codes: Codes, units: Codes, permutations: int, rng: np.random.Generator) -> Iterator[Codes]:
    """Yield levels (b, n): the real ones, then exchanged among the rows of one class of one cluster."""
    yield codes[None]
    block = units * (int(labels.max()) + 1) + labels
    order = np.argsort(block, kind="stable")
    step = max(1, CHUNK_CELLS // len(codes))
    for start in range(0, permutations, step):
        drawn = np.empty((min(step, permutations - start), len(codes)), dtype=np.int64)
        for row in drawn:
            row[order] = codes[np.lexsort((rng.random(len(codes)), block))]
        yield drawn


def _spread(metric: Metric, classes: Floats, levels: Codes, count: int) -> Floats:
    """Return the weighted spread (b,) of the metric over `count` levels, for levels (b, m) and class counts (m, C)."""
    inside = [(levels == k).astype(np.float64) for k in range(count)]
    values = np.column_stack([metric(weights) for weights in inside])
    rows = np.stack([weights @ classes for weights in inside], axis=1)
    present = classes.sum(0) > 0
    weight = np.where(np.isfinite(values), 1 / (1 / np.maximum(rows[:, :, present], 0.5)).sum(2), 0)
    values = np.where(np.isfinite(values), values, 0)
    mean = (weight * values).sum(1) / weight.sum(1)
    return (weight * (values - mean[:, None]) ** 2).sum(1)
