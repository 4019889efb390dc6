"""Metrics of predictions, as plain numbers and as `METRICS` for the bootstrap.

`y` is (n,) class indices; `p` is (n,) P(positive) for a binary task or (n, C) probabilities for a multiclass one. A
row is called positive when p >= threshold, or of the most probable class. Plain functions raise where a number is
undefined (one class, nothing predicted positive); the metrics in `METRICS` return NaN there, and the bootstrap counts
and leaves out such resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from eosin.errors import PredictionsError, closest
from eosin.evaluation.bootstrap import ClusterMetric, Codes, Metric, Values, bootstrap
from eosin.evaluation.inputs import (
    check_binary,
    check_both,
    check_labels,
    check_multiclass,
    check_same_rows,
    check_weight,
)
from eosin.evaluation.interval import Interval
from eosin.evaluation.weighted import (
    LinearMetric,
    MeanMetric,
    auroc_metric,
    average_precision_metric,
    confusion_metric,
    mean_metric,
    ratio,
    threshold_metric,
)

__all__ = [
    "FROM_CONFUSION",
    "METRICS",
    "LinearMetric",
    "accuracy",
    "auprc",
    "auroc",
    "balanced_accuracy",
    "brier",
    "c_index",
    "choose_threshold",
    "cohen_kappa",
    "confusion",
    "f1",
    "kappa_of",
    "log_loss",
    "macro_f1",
    "make_metrics",
    "mcc",
    "npv",
    "ppv",
    "sensitivity",
    "sign_warning",
    "specificity",
    "threshold_spread",
]

Factory = Callable[[npt.ArrayLike, npt.ArrayLike, float], Metric]
KappaWeights = Literal["linear", "quadratic"]
PAIR_CELLS = 4_000_000


# --- from confusion tables (B, C, C), rows true, columns predicted -> (B,) ---------------------------------------


def _accuracy(tables: Values) -> Values:
    return ratio(np.trace(tables, axis1=1, axis2=2), tables.sum(axis=(1, 2)))


def _balanced_accuracy(tables: Values) -> Values:
    return ratio(np.diagonal(tables, axis1=1, axis2=2), tables.sum(axis=2)).mean(axis=1)


def _sensitivity(tables: Values) -> Values:
    return ratio(tables[:, 1, 1], tables[:, 1].sum(axis=1))


def _specificity(tables: Values) -> Values:
    return ratio(tables[:, 0, 0], tables[:, 0].sum(axis=1))


def _ppv(tables: Values) -> Values:
    return ratio(tables[:, 1, 1], tables[:, :, 1].sum(axis=1))


def _npv(tables: Values) -> Values:
    return ratio(tables[:, 0, 0], tables[:, :, 0].sum(axis=1))


def _f1_each(tables: Values) -> Values:
    """Return (B, C) F1 of each class, NaN for a class without rows."""
    true, predicted = tables.sum(axis=2), tables.sum(axis=1)
    return np.where(true > 0, ratio(2 * np.diagonal(tables, axis1=1, axis2=2), true + predicted), np.nan)


def _f1(tables: Values) -> Values:
    return _f1_each(tables)[:, 1]


def _macro_f1(tables: Values) -> Values:
    return _f1_each(tables).mean(axis=1)


def _mcc(tables: Values) -> Values:
    """Return Matthews' correlation for C classes (Gorodkin 2004, eq. 8); 0 when one class is predicted throughout."""
    total, right = tables.sum(axis=(1, 2)), np.trace(tables, axis1=1, axis2=2)
    true, predicted = tables.sum(axis=2), tables.sum(axis=1)
    spread_true, spread_predicted = total**2 - (true**2).sum(axis=1), total**2 - (predicted**2).sum(axis=1)
    value = ratio(right * total - (true * predicted).sum(axis=1), np.sqrt(spread_true * spread_predicted))
    return np.where((spread_true > 0) & (spread_predicted <= 0), 0.0, value)


def kappa_of(tables: Values, weights: KappaWeights | None = None) -> Values:
    """Return Cohen's kappa (B,) of confusion tables (B, C, C), also of two raters; NaN without expected disagreement.

    kappa = 1 - sum(w observed) / sum(w expected) (Cohen 1968), w = 0/1, |i - j| or (i - j)^2.
    """
    apart = np.abs(np.subtract.outer(np.arange(tables.shape[1]), np.arange(tables.shape[1]))).astype(np.float64)
    cost = {None: (apart > 0).astype(np.float64), "linear": apart, "quadratic": apart**2}[weights]
    expected = np.einsum("bi,bj,ij->b", tables.sum(axis=2), tables.sum(axis=1), cost)
    observed = np.einsum("bij,ij->b", tables, cost)
    return 1 - ratio(observed * tables.sum(axis=(1, 2)), expected)


FROM_CONFUSION: Mapping[str, Callable[[Values], Values]] = {
    "ba": _balanced_accuracy,
    "accuracy": _accuracy,
    "sensitivity": _sensitivity,
    "specificity": _specificity,
    "ppv": _ppv,
    "npv": _npv,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "mcc": _mcc,
    "kappa": kappa_of,
}
_BINARY_ONLY = ("sensitivity", "specificity", "ppv", "npv", "f1")


# --- metrics for the bootstrap ------------------------------------------------------------------------------------


def _decided(y: npt.ArrayLike, p: npt.ArrayLike, threshold: float) -> tuple[Codes, Codes, int]:
    """Return true classes (n,), predicted classes (n,), and how many classes there are."""
    if np.ndim(p) == 2:
        labels, scores = check_multiclass(y, p)
        return labels, scores.argmax(axis=1), scores.shape[1]
    labels, scores = check_binary(y, p, both=False)
    return labels.astype(np.int64), (scores >= threshold).astype(np.int64), 2


def _table_factory(name: str, finish: Callable[[Values], Values]) -> Factory:
    def factory(y: npt.ArrayLike, p: npt.ArrayLike, threshold: float = 0.5) -> Metric:
        true, predicted, classes = _decided(y, p, threshold)
        if np.ndim(p) == 2 and name in _BINARY_ONLY:
            raise PredictionsError(
                f"{name} is of one positive class, but there are {classes} probabilities a row; "
                "hand over those of one class (y == c, p[:, c]), or ask for ba, macro_f1 or kappa"
            )
        return confusion_metric(true, predicted, classes, finish)

    return factory


def _rank_factory(make: Callable[[npt.NDArray[np.integer], Values], ClusterMetric]) -> Factory:
    def factory(y: npt.ArrayLike, p: npt.ArrayLike, threshold: float = 0.5) -> Metric:
        if np.ndim(p) == 2:
            labels, scores = check_multiclass(y, p)
            each = ((labels == c, np.ascontiguousarray(scores[:, c])) for c in range(scores.shape[1]))
            return MeanMetric(parts=tuple(make(one.astype(np.int8), column) for one, column in each))
        return make(*check_binary(y, p, both=False))

    return factory


def _brier_factory(y: npt.ArrayLike, p: npt.ArrayLike, threshold: float = 0.5) -> Metric:
    if np.ndim(p) == 2:
        labels, scores = check_multiclass(y, p)
        return mean_metric(((scores - np.eye(scores.shape[1])[labels]) ** 2).sum(axis=1))
    labels, scores = check_binary(y, p, both=False)
    return mean_metric((scores - labels) ** 2)


def _log_loss_factory(y: npt.ArrayLike, p: npt.ArrayLike, threshold: float = 0.5) -> Metric:
    if np.ndim(p) == 2:
        labels, scores = check_multiclass(y, p)
        of_truth = scores[np.arange(len(labels)), labels] / scores.sum(axis=1)
    else:
        labels, scores = check_binary(y, p, both=False)
        of_truth = np.where(labels == 1, scores, 1 - scores)
    return mean_metric(-np.log(np.clip(of_truth, np.finfo(np.float64).eps, 1)))


def _ece_factory(y: npt.ArrayLike, p: npt.ArrayLike, threshold: float = 0.5) -> Metric:
    from eosin.evaluation.calibration import weighted_ece  # calibration imports this module

    return weighted_ece(y, p, threshold)


METRICS: Mapping[str, Factory] = {
    **{name: _table_factory(name, finish) for name, finish in FROM_CONFUSION.items()},
    "auroc": _rank_factory(auroc_metric),
    "auprc": _rank_factory(average_precision_metric),
    "brier": _brier_factory,
    "log_loss": _log_loss_factory,
    "ece": _ece_factory,
}


def make_metrics(
    names: Iterable[str], y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5
) -> dict[str, Metric]:
    """Return the named metrics of these predictions, for `bootstrap`.

    Raises:
        PredictionsError: an unknown name (the closest are listed), or predictions that cannot be used.
    """
    names = list(names)
    for name in names:
        if name not in METRICS:
            raise PredictionsError(f"no metric is called {name!r}; closest: {closest(name, METRICS)}")
    return {name: METRICS[name](y, p, threshold) for name in names}


# --- plain numbers ------------------------------------------------------------------------------------------------


def _value(metric: Metric, name: str, rows: int, weight: npt.ArrayLike | None) -> float:
    value = float(metric(check_weight(weight, rows)[None, :])[0])
    if np.isnan(value):
        raise PredictionsError(
            f"{name} is undefined on these {rows} rows: a class it needs is absent among the labels or the predictions"
        )
    return value


def _plain(
    name: str, y: npt.ArrayLike, p: npt.ArrayLike, weight: npt.ArrayLike | None, threshold: float = 0.5
) -> float:
    return _value(METRICS[name](y, p, threshold), name, np.asarray(y).size, weight)


def balanced_accuracy(
    y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None
) -> float:
    """Return the mean over classes of the share of their rows that are called right."""
    return _plain("ba", y, p, weight, threshold)


def accuracy(
    y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None
) -> float:
    """Return the share of rows that are called right."""
    return _plain("accuracy", y, p, weight, threshold)


def sensitivity(
    y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None
) -> float:
    """Return the share of positives that are called positive (recall)."""
    return _plain("sensitivity", y, p, weight, threshold)


def specificity(
    y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None
) -> float:
    """Return the share of negatives that are called negative."""
    return _plain("specificity", y, p, weight, threshold)


def ppv(y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None) -> float:
    """Return the share of rows called positive that are positive (precision)."""
    return _plain("ppv", y, p, weight, threshold)


def npv(y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None) -> float:
    """Return the share of rows called negative that are negative."""
    return _plain("npv", y, p, weight, threshold)


def f1(y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None) -> float:
    """Return the harmonic mean of sensitivity and PPV."""
    return _plain("f1", y, p, weight, threshold)


def macro_f1(
    y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None
) -> float:
    """Return the mean over classes of F1."""
    return _plain("macro_f1", y, p, weight, threshold)


def mcc(y: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float = 0.5, weight: npt.ArrayLike | None = None) -> float:
    """Return Matthews' correlation coefficient, for two or more classes."""
    return _plain("mcc", y, p, weight, threshold)


def cohen_kappa(
    y: npt.ArrayLike,
    p: npt.ArrayLike,
    *,
    weights: KappaWeights | None = None,
    threshold: float = 0.5,
    weight: npt.ArrayLike | None = None,
) -> float:
    """Return Cohen's kappa between labels and calls; `weights` = "linear" or "quadratic" for ordered classes."""
    true, predicted, classes = _decided(y, p, threshold)
    metric = confusion_metric(true, predicted, classes, lambda tables: kappa_of(tables, weights))
    return _value(metric, "kappa", len(true), weight)


def auroc(y: npt.ArrayLike, p: npt.ArrayLike, *, weight: npt.ArrayLike | None = None) -> float:
    """Return the area under the ROC curve; of several classes, the mean of one against the rest."""
    check_both(check_labels(y))
    return _plain("auroc", y, p, weight)


def auprc(y: npt.ArrayLike, p: npt.ArrayLike, *, weight: npt.ArrayLike | None = None) -> float:
    """Return the average precision; of several classes, the mean of one against the rest."""
    check_both(check_labels(y))
    return _plain("auprc", y, p, weight)


def log_loss(y: npt.ArrayLike, p: npt.ArrayLike, *, weight: npt.ArrayLike | None = None) -> float:
    """Return the mean of -log P(true class), in nats."""
    return _plain("log_loss", y, p, weight)


def brier(y: npt.ArrayLike, p: npt.ArrayLike, *, weight: npt.ArrayLike | None = None) -> float:
    """Return the mean squared error of the probabilities: of P(positive), or summed over several classes (Brier)."""
    return _plain("brier", y, p, weight)


def confusion(
    y: npt.ArrayLike, calls: npt.ArrayLike, classes: int, *, weight: npt.ArrayLike | None = None
) -> npt.NDArray[np.float64]:
    """Return the table (classes, classes) of summed weights, rows true and columns predicted.

    Raises:
        PredictionsError: lengths differ, or an index is outside 0 ... classes - 1.
    """
    true, predicted = check_labels(y), check_labels(calls)
    check_same_rows("calls", len(predicted), len(true))
    for name, values in (("y", true), ("calls", predicted)):
        if values.min() < 0 or values.max() >= classes:
            raise PredictionsError(
                f"{name} ranges over {values.min()} to {values.max()}, but {classes} classes are 0 to {classes - 1}"
            )
    weights = check_weight(weight, len(true))
    cells = np.bincount(true * classes + predicted, weights=weights, minlength=classes**2)
    return cells.astype(np.float64).reshape(classes, classes)


def c_index(
    time: npt.ArrayLike, event: npt.ArrayLike, risk: npt.ArrayLike, *, weight: npt.ArrayLike | None = None
) -> float:
    """Return Harrell's concordance index (Harrell et al. 1996): pairs where the higher risk has the earlier event.

    A pair counts when its earlier time is an event; at equal times, an event is before a censoring, and two events do
    not count. Equal risks count one half.

    Args:
        time: (n,) time to the event or to censoring.
        event: (n,) True where the event was seen.
        risk: (n,) any score that is higher for an earlier event.
        weight: (n,) a pair weighs the product of its two.

    Raises:
        PredictionsError: shapes that differ, NaN, or no pair that counts.
    """
    seen = check_labels(event).astype(bool)
    when, score = np.asarray(time, dtype=np.float64), np.asarray(risk, dtype=np.float64)
    for name, values in (("time", when), ("risk", score)):
        check_same_rows(name, values.size, len(seen))
        if not np.isfinite(values).all():
            raise PredictionsError(f"{name} has {(~np.isfinite(values)).sum()} values that are not finite")
    weights = check_weight(weight, len(seen))
    first, right, pairs = np.flatnonzero(seen), 0.0, 0.0
    step = max(1, PAIR_CELLS // len(seen))
    for start in range(0, len(first), step):
        i = first[start : start + step, None]
        counts = ((when > when[i]) | ((when == when[i]) & ~seen)) * weights * weights[i]
        pairs += float(counts.sum())
        right += float((counts * ((score < score[i]) + 0.5 * (score == score[i]))).sum())
    if pairs == 0:
        raise PredictionsError(f"no pair of the {len(seen)} rows can be compared: {len(first)} events are seen")
    return right / pairs


# --- the operating point ------------------------------------------------------------------------------------------


def choose_threshold(y: npt.ArrayLike, p_oof: npt.ArrayLike, *, rule: str = "balanced_accuracy") -> float:
    """Return a threshold; choose it on out-of-fold predictions, never on those it is judged by.

    Candidates lie half-way between neighbouring scores. "balanced_accuracy" and "youden" are one rule (Youden's J is
    2 BA - 1); of equals, the candidate nearest 0.5. "sensitivity>=X" takes the highest threshold that has it,
    "specificity>=X" the lowest.

    Args:
        y: (n,) labels in {0, 1}.
        p_oof: (n,) out-of-fold probabilities.
        rule: "balanced_accuracy", "youden", "sensitivity>=0.95" or "specificity>=0.9".

    Raises:
        PredictionsError: unusable predictions, one class, or an unknown rule.
    """
    labels, scores = check_binary(y, p_oof)
    return float(threshold_metric(labels, scores, rule)(np.ones((1, len(labels))))[0])


def threshold_spread(
    y: npt.ArrayLike,
    p_oof: npt.ArrayLike,
    cluster: npt.ArrayLike,
    *,
    rule: str = "balanced_accuracy",
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the chosen threshold, and how far it moves when the patients are resampled.

    Args:
        y: (n,) labels in {0, 1}.
        p_oof: (n,) out-of-fold probabilities.
        cluster: (n,) patient ids.
        rule: as in `choose_threshold`.
        resamples: how many.
        level: of confidence.
        seed: of the draws.

    Raises:
        PredictionsError: unusable predictions, one class, or an unknown rule.
    """
    labels, scores = check_binary(y, p_oof)
    metric = threshold_metric(labels, scores, rule)
    return bootstrap(metric, cluster, y=labels, resamples=resamples, level=level, seed=seed)


def sign_warning(*, auroc: float, ba: float) -> str:
    """Return a warning when the score ranks against the calls (AUROC < 0.5, BA > 0.5), else an empty text."""
    if auroc < 0.5 < ba:
        return (
            f"AUROC {auroc:.3f} is below 0.5 while balanced accuracy is {ba:.3f}: the score is probably the "
            "probability of the other class; check its sign"
        )
    return ""
