"""Does the model serve every site, scanner and kind of patient? One table a question, no number without its n.

All levels see the same resampled patients, so that differences between levels have honest intervals too. Resampling
keeps each level's number of patients with and without the finding where no patient is in two levels. A level with too
few positives, negatives or patients is kept in the table with a flag, and left out of best, worst and gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import ClusterMetric, Metric, bootstrap_values
from eosin.evaluation.calibration import BINS, calibration_slope_intercept, ece_floor, weighted_ece
from eosin.evaluation.inputs import check_binary, check_clusters, check_labels, check_multiclass, check_same_rows
from eosin.evaluation.metrics import METRICS, make_metrics

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Rows = npt.NDArray[np.intp]

MIN_POSITIVES = 10
MIN_CLUSTERS = 10
MIN_CLUSTERS_A_CLASS = 5
LOWER_IS_BETTER = frozenset({"brier", "ece", "log_loss"})
DEFAULT_METRICS = ("auroc", "ba", "sensitivity", "specificity")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Subgroups:
    """Metrics per level and how far the levels lie apart.

    Attributes:
        table: level, n, positives, clusters, metric, point, low, high, se, degenerate, flag.
        gaps: metric, best, worst, gap, low, high, levels, flag. Best and worst are picked on the data, so that the
            gap is too large on average even when there is none: test with `heterogeneity.interaction_test`.
    """

    table: pd.DataFrame
    gaps: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Return both tables as lists of records, None for NaN."""
        return {"table": records(self.table), "gaps": records(self.gaps)}


@dataclass(frozen=True, eq=False, slots=True)
class _Within:
    """A metric of some of the rows, restated over all rows or all clusters."""

    inner: Metric
    rows: Rows

    def __call__(self, weights: npt.NDArray[np.floating], /) -> Floats:
        return self.inner(weights[:, self.rows])

    def by_cluster(self, codes: Codes, clusters: int) -> Metric:
        if isinstance(self.inner, ClusterMetric):
            return self.inner.by_cluster(codes[self.rows], clusters)
        return _Within(self.inner, codes[self.rows])


def subgroup_table(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    level: npt.ArrayLike,
    cluster: npt.ArrayLike,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    threshold: float = 0.5,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Subgroups:
    """Return each metric on each level of a column, with intervals, and the gap between best and worst level.

    Args:
        y: (n,) class indices.
        p: (n,) P(positive) or (n, C) probabilities.
        level: (n,) site, scanner, age band ... of each row.
        cluster: (n,) patient of each row.
        metrics: names of `METRICS`.
        threshold: of the binary decision.
        resamples: bootstrap resamples.
        confidence: level of the intervals.
        seed: of the bootstrap.

    Raises:
        PredictionsError: bad scores, rows without a level, an unknown metric.
    """
    names, codes = level_codes(level, len(np.asarray(y)))
    subsets = [np.flatnonzero(codes == k) for k in range(len(names))]
    strata = site_strata(y, codes, cluster)
    points, draws = subset_values(
        y, p, cluster, subsets, metrics=metrics, threshold=threshold, strata=strata, resamples=resamples, seed=seed
    )
    facts = pd.DataFrame(
        [{"level": name, **describe(y, p, cluster, s)} for name, s in zip(names, subsets, strict=True)]
    )
    table = pd.concat([metric_rows(facts, m, points[m], draws[m], confidence) for m in metrics], ignore_index=True)
    flags = facts["flag"].to_numpy()
    gaps = [_gap(m, names, flags, points[m], draws[m], confidence) for m in metrics]
    return Subgroups(table=table, gaps=pd.DataFrame(gaps))


def pooled_and_domains(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    domain: npt.ArrayLike,
    cluster: npt.ArrayLike,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    threshold: float = 0.5,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Return each metric pooled, per domain, as mean over domains and in the worst domain, all with n and intervals.

    Pooled and domain-mean values can disagree by points and in the sign of an effect, so that both are shown. The mean
    is over every domain that has a value; the worst is picked among the domains that are not flagged (all, if all are).

    Args:
        y: (n,) class indices.
        p: (n,) P(positive) or (n, C) probabilities.
        domain: (n,) domain of each row.
        cluster: (n,) patient of each row.
        metrics: names of `METRICS`.
        threshold: of the binary decision.
        resamples: bootstrap resamples.
        confidence: level of the intervals.
        seed: of the bootstrap.

    Returns:
        scope ("pooled", "domain", "domain_mean", "worst_domain"), level, n, positives, clusters, metric, point, low,
        high, se, degenerate, flag.

    Raises:
        PredictionsError: bad scores, rows without a domain, an unknown metric.
    """
    names, codes = level_codes(domain, len(np.asarray(y)))
    subsets = [np.arange(len(codes)), *(np.flatnonzero(codes == k) for k in range(len(names)))]
    points, draws = subset_values(
        y,
        p,
        cluster,
        subsets,
        metrics=metrics,
        threshold=threshold,
        strata=site_strata(y, codes, cluster),
        resamples=resamples,
        seed=seed,
    )
    facts = pd.DataFrame(
        [{"level": n, **describe(y, p, cluster, s)} for n, s in zip(["all", *names], subsets, strict=True)]
    )
    return pd.concat([_scopes(facts, m, points[m], draws[m], confidence) for m in metrics], ignore_index=True)


def calibration_table(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    level: npt.ArrayLike,
    cluster: npt.ArrayLike,
    *,
    bins: int = BINS,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the calibration of a binary score on each scanner or site, and on all rows first.

    AUROC can hold on a scanner where calibration is lost. ECE is too large in small samples: `ece_floor` is what
    perfectly calibrated scores would show there, and `ece` is to be read against it.

    Args:
        y: (n,) 0/1.
        p: (n,) P(positive).
        level: (n,) scanner or site of each row.
        cluster: (n,) patient of each row.
        bins: equal-width bins of the ECE.
        resamples: bootstrap resamples of ECE and Brier score.
        confidence: level of the intervals.
        seed: of the bootstrap.

    Returns:
        level, n, positives, clusters, mean_score, frequency, then ece, brier, slope and intercept each with _low and
        _high, ece_floor, bins, flag.

    Raises:
        PredictionsError: bad scores, or rows without a level.
    """
    labels, scores = check_binary(y, p)
    names, codes = level_codes(level, len(labels))
    units = check_clusters(cluster, len(labels))
    subsets = [np.arange(len(labels)), *(np.flatnonzero(codes == k) for k in range(len(names)))]
    makers = {"ece": lambda a, b: weighted_ece(a, b, bins=bins), "brier": lambda a, b: METRICS["brier"](a, b, 0.5)}
    held: dict[str, Metric] = {
        f"{k} {name}": _Within(make(labels[s], scores[s]), s)
        for k, s in enumerate(subsets)
        for name, make in makers.items()
    }
    strata = site_strata(labels, codes, units)
    points, draws = bootstrap_values(held, units, y=strata, resamples=resamples, seed=seed)
    rows = []
    for k, (name, s) in enumerate(zip(["all", *names], subsets, strict=True)):
        facts = describe(labels, scores, units, s)
        row: dict[str, Any] = {"level": name, **facts, "mean_score": scores[s].mean(), "frequency": labels[s].mean()}
        for metric in makers:
            low, high, _, _ = _interval(draws[f"{k} {metric}"], confidence)
            row |= {metric: points[f"{k} {metric}"], f"{metric}_low": low, f"{metric}_high": high}
        row |= _recalibration(labels[s], scores[s], units[s], confidence)
        flag = "; ".join(text for text in (facts["flag"], row.pop("recalibration_note")) if text)
        row |= {"ece_floor": ece_floor(scores[s], bins=bins, seed=seed), "bins": bins}
        row.pop("flag")
        rows.append({**row, "flag": flag})
    return pd.DataFrame(rows)


def subset_values(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    cluster: npt.ArrayLike,
    subsets: Sequence[Rows],
    *,
    metrics: Sequence[str],
    threshold: float,
    strata: npt.ArrayLike,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return per metric its value on each subset of rows (S,), and on each subset of each resample (resamples, S).

    Args:
        y: (n,) class indices.
        p: (n,) or (n, C) probabilities.
        cluster: (n,) patient of each row.
        subsets: row indices of each subset; they may overlap.
        metrics: names of `METRICS`.
        threshold: of the binary decision.
        strata: (n,) integers that stratify the clusters.
        resamples: bootstrap resamples.
        seed: of the bootstrap.
    """
    labels, scores = check_scores(y, p)
    held: dict[str, Metric] = {}
    for k, rows in enumerate(subsets):
        made = make_metrics(metrics, labels[rows], scores[rows], threshold=threshold)
        held |= {f"{k} {name}": _Within(metric, rows) for name, metric in made.items()}
    points, draws = bootstrap_values(held, cluster, y=strata, resamples=resamples, seed=seed)
    count = range(len(subsets))
    return (
        {name: np.array([points[f"{k} {name}"] for k in count]) for name in metrics},
        {name: np.column_stack([draws[f"{k} {name}"] for k in count]) for name in metrics},
    )


def describe(y: npt.ArrayLike, p: npt.ArrayLike, cluster: npt.ArrayLike, rows: Rows) -> dict[str, Any]:
    """Return n, positives (rows of a class above 0), clusters and flag (why the rows are too few) of some rows."""
    labels = np.asarray(y)[rows]
    counts = np.bincount(check_labels(labels), minlength=2 if np.ndim(p) == 1 else np.shape(p)[1])
    units = np.asarray(cluster)[rows]
    clusters = len(pd.unique(units))
    kinds = ("negatives", "positives") if np.ndim(p) == 1 else [f"rows of class {c}" for c in range(len(counts))]
    few = [f"{clusters} clusters"] if clusters < MIN_CLUSTERS else []
    for c, (count, kind) in reversed(list(enumerate(zip(counts, kinds, strict=True)))):
        holding = len(pd.unique(units[labels == c]))
        if count < MIN_POSITIVES or holding < MIN_CLUSTERS_A_CLASS:
            few.append(f"{count} {kind} in {holding} clusters")
    flag = f"too few: {', '.join(few)}" if few else ""
    return {"n": len(rows), "positives": int((labels > 0).sum()), "clusters": clusters, "flag": flag}


def site_strata(y: npt.ArrayLike, codes: Codes, cluster: npt.ArrayLike) -> Codes:
    """Return strata (n,) for the bootstrap: level and class where each cluster has one level, otherwise the class."""
    labels = check_labels(y)
    one = level_of_clusters(codes, check_clusters(cluster, len(labels)))
    return labels if one is None else codes * (int(labels.max()) + 1) + labels


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as plain values; NaN and infinity become None."""
    plain = table.to_dict("records")
    return [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()} for row in plain]


def metric_rows(facts: pd.DataFrame, metric: str, points: Floats, draws: Floats, confidence: float) -> pd.DataFrame:
    """Return the facts of each subset with the metric's point, low, high, se and degenerate put before the flag."""
    spread = [_interval(column, confidence) for column in draws.T]
    table = facts.drop(columns="flag").assign(metric=metric, point=points)
    table[["low", "high", "se", "degenerate"]] = pd.DataFrame(spread, index=table.index)
    table["flag"] = facts["flag"]
    return table


def level_codes(level: npt.ArrayLike, n: int) -> tuple[list[Any], Codes]:
    """Return the names of the levels, sorted, and the level of each row."""
    values = np.asarray(level, dtype=object)
    check_same_rows("level", len(values), n)
    codes, names = pd.factorize(values, sort=True)
    missing = np.flatnonzero(codes < 0)
    if missing.size:
        raise PredictionsError(
            f"{missing.size} of {n} rows have no level (first: row {missing[0]}); name it, as 'unknown' for instance"
        )
    return list(names), codes.astype(np.int64)


def level_of_clusters(codes: Codes, units: Codes) -> Codes | None:
    """Return the level of each cluster (G,), or None when a cluster is in two levels."""
    of_cluster = np.zeros(int(units.max()) + 1, dtype=np.int64)
    of_cluster[units] = codes
    return of_cluster if (of_cluster[units] == codes).all() else None


def check_scores(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[Codes, Floats]:
    """Return labels (n,) and probabilities (n,) or (n, C), checked; one class is no error here."""
    if np.ndim(p) == 1:
        labels, scores = check_binary(y, p, both=False)
        return labels.astype(np.int64), scores
    return check_multiclass(y, p)


def _interval(drawn: Floats, confidence: float) -> tuple[float, float, float, int]:
    """Return (low, high, standard error, degenerate) of resampled values (R,)."""
    usable = drawn[np.isfinite(drawn)]
    if usable.size < 2:
        return float("nan"), float("nan"), float("nan"), int(drawn.size - usable.size)
    low, high = np.quantile(usable, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high), float(usable.std(ddof=1)), int(drawn.size - usable.size)


def _scopes(facts: pd.DataFrame, metric: str, points: Floats, draws: Floats, confidence: float) -> pd.DataFrame:
    """Return the rows of `pooled_and_domains` of one metric; the first subset is all rows, the others the domains."""
    each = metric_rows(facts, metric, points, draws, confidence)
    each.insert(0, "scope", np.array(["pooled"] + ["domain"] * (len(facts) - 1), dtype=object))
    here, flags = points[1:], facts["flag"].to_numpy()[1:]
    known = np.isfinite(here)
    mean = float(here[known].mean()) if known.any() else float("nan")
    means = draws[:, 1:][:, known].mean(1) if known.any() else np.full(len(draws), np.nan)
    summary = metric_rows(facts.iloc[:1], metric, np.array([mean]), means[:, None], confidence).assign(
        scope="domain_mean", level=f"mean of {known.sum()} domains", flag=_mean_flag(known, flags)
    )
    worst = _worst(metric, here, flags)
    last = [] if worst is None else [each.iloc[[worst + 1]].assign(scope="worst_domain")]
    return pd.concat([each, summary, *last])


def _worst(metric: str, points: Floats, flags: npt.NDArray[Any]) -> int | None:
    """Return the level with the worst value among those not flagged, or among all when all are."""
    usable = np.isfinite(points) & (flags == "")
    usable = usable if usable.any() else np.isfinite(points)
    if not usable.any():
        return None
    badness = np.where(usable, points if metric in LOWER_IS_BETTER else -points, np.nan)
    return int(np.nanargmax(badness))


def _gap(
    metric: str, names: list[Any], flags: npt.NDArray[Any], points: Floats, draws: Floats, confidence: float
) -> dict[str, Any]:
    """Return the row of `Subgroups.gaps` of one metric."""
    usable = np.isfinite(points) & (flags == "")
    out = [str(name) for name, ok in zip(names, usable, strict=True) if not ok]
    note = f"left out: {', '.join(out)}" if out else ""
    row = {
        "metric": metric,
        "best": None,
        "worst": None,
        "gap": float("nan"),
        "low": float("nan"),
        "high": float("nan"),
    }
    if usable.sum() < 2:
        return {**row, "levels": int(usable.sum()), "flag": "fewer than two levels are large enough"}
    sign = -1 if metric in LOWER_IS_BETTER else 1
    goodness = np.where(usable, sign * points, np.nan)
    best, worst = int(np.nanargmax(goodness)), int(np.nanargmin(goodness))
    low, high, _, _ = _interval(sign * (draws[:, best] - draws[:, worst]), confidence)
    row |= {"best": names[best], "worst": names[worst], "gap": float(goodness[best] - goodness[worst])}
    return {**row, "low": low, "high": high, "levels": int(usable.sum()), "flag": note}


def _mean_flag(known: npt.NDArray[np.bool_], flags: npt.NDArray[Any]) -> str:
    """Return what a reader of a mean over domains must know."""
    small, lost = int(((flags != "") & known).sum()), int((~known).sum())
    notes = [f"{small} of {known.sum()} domains are too small by themselves"] if small else []
    notes += [f"{lost} domains have no value"] if lost else []
    return "; ".join(notes)


def _recalibration(labels: npt.NDArray[Any], scores: Floats, units: Codes, confidence: float) -> dict[str, Any]:
    """Return slope and intercept with their intervals, NaN with a note where there are none."""
    keys = [f"{name}{end}" for name in ("slope", "intercept") for end in ("", "_low", "_high")]
    if len(np.unique(labels)) < 2:
        return {**dict.fromkeys(keys, float("nan")), "recalibration_note": "one class only: no slope"}
    found = calibration_slope_intercept(labels, scores, cluster=units, level=confidence)
    values = [getattr(part, end) for part in (found.slope, found.intercept) for end in ("point", "low", "high")]
    return {**dict(zip(keys, values, strict=True)), "recalibration_note": found.slope.note}
