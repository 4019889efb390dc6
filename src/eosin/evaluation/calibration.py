"""Calibration: does a predicted probability of 0.7 come true seven times in ten?

Binned errors (ECE, MCE) always say their bins: numbers from different bins cannot be compared. Bins are (low, high],
the first one closed. `scheme="width"` cuts [0, 1] evenly, `scheme="mass"` cuts at quantiles of the scores, equal
scores staying together. In the binary case the bins are of P(positive) against the share of positives; in the
multiclass case of the top-label confidence against the share that is right (Guo et al. 2017).

The plug-in ECE is never negative and is too large in small samples: read it beside `ece_floor`.

Scaling must be fitted on rows that are not scored afterwards; nothing here can notice when that is broken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.optimize
import scipy.special
import scipy.stats
from sklearn.isotonic import IsotonicRegression

from eosin.errors import PredictionsError
from eosin.evaluation.inputs import check_binary, check_clusters, check_multiclass
from eosin.evaluation.interval import Interval
from eosin.evaluation.proportions import wilson
from eosin.evaluation.weighted import LinearMetric, ratio

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Scheme = Literal["width", "mass"]

BINS = 15
CLIP = 1e-6
LEAST = 1e-12
INVERSE_TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True, kw_only=True, slots=True)
class BrierDecomposition:
    """The parts of a Brier score: brier = reliability - resolution + uncertainty + within_bins.

    Murphy 1973, with the within-bin term of Stephenson, Coelho and Jolliffe 2008 (eq. 7) that makes the sum exact for
    binned forecasts; it is 0 when every bin holds one distinct forecast.

    Attributes:
        brier: mean squared error of the probabilities.
        reliability: squared gap between forecast and frequency; smaller is better.
        resolution: spread of the bins' frequencies around the base rate; larger is better.
        uncertainty: base rate times one minus base rate.
        within_bins: what the binning hides.
        bins: bins that hold a row.
        n: rows.
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float
    bins: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitRecalibration:
    """How a logistic model of the outcome on logit(p) departs from the identity.

    Attributes:
        slope: 1 is perfect; below 1 the scores are too extreme (overfitted), above 1 too timid.
        intercept: calibration-in-the-large, the intercept with the slope held at 1; above 0 the scores are too low.
        joint_intercept: the intercept fitted together with the slope.
        clipped: scores at 0 or 1 that were moved to 1e-6 from it before the logit.
    """

    slope: Interval
    intercept: Interval
    joint_intercept: Interval
    clipped: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "slope": self.slope.to_dict(),
            "intercept": self.intercept.to_dict(),
            "joint_intercept": self.joint_intercept.to_dict(),
            "clipped": self.clipped,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TemperatureScaling:
    """Divide the logits by one number (Guo et al. 2017, section 4.2); it never changes a ranking of classes.

    Attributes:
        temperature: above 1 softens, below 1 sharpens.
        n: rows it was fitted on.
    """

    temperature: float
    n: int

    @classmethod
    def fit(cls, y: npt.ArrayLike, p: npt.ArrayLike) -> TemperatureScaling:
        """Return the temperature of least log loss; the loss is convex in 1/temperature, so it is the only one.

        Args:
            y: (n,) labels of the fitting rows, never of the rows that are scored.
            p: (n,) P(positive) or (n, C) probabilities.

        Raises:
            PredictionsError: no temperature is best: the rows are predicted without an error, or the wrong way round.
        """
        logits, labels = _log_probabilities(y, p)
        of_truth = logits[np.arange(len(labels)), labels].mean()

        def slope(inverse: float) -> float:
            return float((scipy.special.softmax(inverse * logits, axis=1) * logits).sum(1).mean() - of_truth)

        low, high = INVERSE_TEMPERATURES
        if slope(low) >= 0:
            raise PredictionsError(
                "these scores rank the classes no better than chance on the fitting rows, so no positive temperature "
                "helps; check that p is the probability of the positive class and not of the other one"
            )
        if slope(high) <= 0:
            raise PredictionsError(
                f"all {len(labels)} fitting rows are predicted without an error, so the best temperature is 0; "
                "fit it on more or harder rows (out-of-fold predictions, never the training fit)"
            )
        best = scipy.optimize.root_scalar(slope, bracket=(low, high), method="brentq", xtol=1e-12).root
        return cls(temperature=1 / best, n=len(labels))

    def apply(self, p: npt.ArrayLike) -> Floats:
        """Return the scaled probabilities, in the shape of `p`."""
        scores = np.asarray(p, dtype=np.float64)
        columns = np.column_stack([1 - scores, scores]) if scores.ndim == 1 else scores
        scaled = scipy.special.softmax(_log(columns) / self.temperature, axis=1)
        return scaled[:, 1] if scores.ndim == 1 else scaled

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class IsotonicScaling:
    """A monotone step-and-line map from score to probability; several classes: one each, then normalised.

    Zadrozny and Elkan 2002. It needs some hundreds of rows: with few it memorises them.

    Attributes:
        knots: per class (binary: one) the pair (scores ascending, probabilities) that is interpolated.
        n: rows it was fitted on.
    """

    knots: tuple[tuple[Floats, Floats], ...]
    n: int

    @classmethod
    def fit(cls, y: npt.ArrayLike, p: npt.ArrayLike) -> IsotonicScaling:
        """Return the least-squares monotone map, fitted on rows that are not scored afterwards.

        Args:
            y: (n,) labels of the fitting rows.
            p: (n,) P(positive) or (n, C) probabilities.
        """
        columns, hits = _per_class(y, p)
        fits = [IsotonicRegression(y_min=0, y_max=1).fit(s, h) for s, h in zip(columns.T, hits.T, strict=True)]
        knots = tuple((np.asarray(f.X_thresholds_), np.asarray(f.y_thresholds_)) for f in fits)
        return cls(knots=knots, n=len(columns))

    def apply(self, p: npt.ArrayLike) -> Floats:
        """Return the scaled probabilities, in the shape of `p`; scores outside the fitted range take its ends.

        Raises:
            PredictionsError: `p` has another number of classes than the fit.
        """
        scores = np.asarray(p, dtype=np.float64)
        columns = scores[:, None] if scores.ndim == 1 else scores
        if columns.shape[1] != len(self.knots):
            raise PredictionsError(f"fitted on {len(self.knots)} columns of scores, got {columns.shape[1]}")
        mapped = np.column_stack([np.interp(c, x, f) for c, (x, f) in zip(columns.T, self.knots, strict=True)])
        if scores.ndim == 1:
            return mapped[:, 0]
        total = mapped.sum(1, keepdims=True)
        return np.where(total > 0, mapped / np.where(total > 0, total, 1), 1 / columns.shape[1])


def ece(y: npt.ArrayLike, p: npt.ArrayLike, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Return the expected calibration error: the mean over rows of their bin's |score - frequency|.

    Args:
        y: (n,) class indices.
        p: (n,) P(positive), or (n, C) probabilities: then of the top label.
        bins: number of bins; say it beside the number.
        scheme: "width" or "mass".
    """
    score, hit = _confidence(y, p)
    return _gap_sums(score, hit, _bin_ids(score, bins, scheme)).sum() / len(score)


def mce(y: npt.ArrayLike, p: npt.ArrayLike, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Return the largest |score - frequency| over bins that hold a row; a bin of one row can set it."""
    score, hit = _confidence(y, p)
    ids = _bin_ids(score, bins, scheme)
    count = np.bincount(ids)
    held = count > 0
    return float((_gap_sums(score, hit, ids)[held] / count[held]).max())


def classwise_ece(y: npt.ArrayLike, p: npt.ArrayLike, *, bins: int = BINS, scheme: Scheme = "width") -> float:
    """Return the mean over classes of the binary ECE of that class against the rest (Kull et al. 2019, eq. 3)."""
    columns, hits = _per_class(y, p)
    each = [_gap_sums(s, h, _bin_ids(s, bins, scheme)).sum() / len(s) for s, h in zip(columns.T, hits.T, strict=True)]
    return float(np.mean(each))


def ece_floor(
    p: npt.ArrayLike, *, bins: int = BINS, scheme: Scheme = "width", draws: int = 200, seed: int = 0
) -> float:
    """Return the ECE that perfectly calibrated scores `p` show on average at this sample size.

    Outcomes are drawn from the scores themselves (consistency resampling, Broecker and Smith 2007), rows independent.

    Args:
        p: (n,) P(positive) or (n, C) probabilities.
        bins: number of bins.
        scheme: "width" or "mass".
        draws: simulated outcome vectors.
        seed: of the draws.
    """
    scores = np.asarray(p, dtype=np.float64)
    score = scores if scores.ndim == 1 else scores.max(1)
    ids = _bin_ids(score, bins, scheme)
    rng = np.random.default_rng(seed)
    sums = [_gap_sums(score, rng.random(len(score)) < score, ids).sum() for _ in range(draws)]
    return float(np.mean(sums)) / len(score)


def weighted_ece(
    y: npt.ArrayLike, p: npt.ArrayLike, threshold: float = 0.5, *, bins: int = BINS, scheme: Scheme = "width"
) -> LinearMetric:
    """Return the ECE as a function of row weights (B, n) -> (B,), for the bootstrap; bins stay those of all rows.

    Args:
        y: (n,) class indices.
        p: (n,) P(positive) or (n, C) probabilities.
        threshold: not used; every metric of the bootstrap takes it.
        bins: number of bins.
        scheme: "width" or "mass".
    """
    score, hit = _confidence(y, p)
    terms = np.zeros((len(score), bins + 1))
    terms[np.arange(len(score)), _bin_ids(score, bins, scheme)] = score - hit
    terms[:, bins] = 1
    return LinearMetric(terms=terms, finish=lambda sums: ratio(np.abs(sums[:, :bins]).sum(1), sums[:, bins]))


def reliability(
    y: npt.ArrayLike, p: npt.ArrayLike, *, bins: int = BINS, scheme: Scheme = "width", level: float = 0.95
) -> pd.DataFrame:
    """Return one row per bin that holds a row: the table behind a reliability diagram.

    Columns: bin, low, high (edges), n, score (mean), frequency, frequency_low, frequency_high (Wilson, rows
    independent), gap (frequency - score).
    """
    score, hit = _confidence(y, p)
    ids = _bin_ids(score, bins, scheme)
    edges = _edges(score, bins, scheme)
    rows = []
    for index in np.unique(ids):
        mine = ids == index
        n, hits = int(mine.sum()), int(hit[mine].sum())
        interval = wilson(hits, n, level=level)
        rows.append(
            {
                "bin": int(index),
                "low": edges[index],
                "high": edges[index + 1],
                "n": n,
                "score": float(score[mine].mean()),
                "frequency": hits / n,
                "frequency_low": interval.low,
                "frequency_high": interval.high,
                "gap": hits / n - float(score[mine].mean()),
            }
        )
    return pd.DataFrame(rows)


def brier_decomposition(
    y: npt.ArrayLike, p: npt.ArrayLike, *, bins: int = BINS, scheme: Scheme = "width"
) -> BrierDecomposition:
    """Return the Brier score and its parts; several classes: the sum over classes, each against the rest.

    Args:
        y: (n,) class indices.
        p: (n,) P(positive) or (n, C) probabilities.
        bins: number of bins.
        scheme: "width" or "mass".
    """
    columns, hits = _per_class(y, p)
    parts = np.zeros(4)
    held = 0
    for score, hit in zip(columns.T, hits.T, strict=True):
        ids = _bin_ids(score, bins, scheme)
        n = np.bincount(ids)
        kept = n > 0
        share, rate = n[kept] / len(score), hit.mean()
        mean_score = np.bincount(ids, score)[kept] / n[kept]
        frequency = np.bincount(ids, hit)[kept] / n[kept]
        parts += (
            ((score - hit) ** 2).mean(),
            (share * (mean_score - frequency) ** 2).sum(),
            (share * (frequency - rate) ** 2).sum(),
            rate * (1 - rate),
        )
        held = max(held, int(kept.sum()))
    brier, rel, res, unc = (float(v) for v in parts)
    return BrierDecomposition(
        brier=brier,
        reliability=rel,
        resolution=res,
        uncertainty=unc,
        within_bins=brier - rel + res - unc,
        bins=held,
        n=len(columns),
    )


def calibration_slope_intercept(
    y: npt.ArrayLike, p: npt.ArrayLike, *, cluster: npt.ArrayLike | None = None, level: float = 0.95
) -> LogitRecalibration:
    """Return slope and intercept of the logistic recalibration logit P(y = 1) = a + b logit(p), with intervals.

    Cox 1958; Van Calster et al. 2016 (J Clin Epidemiol 74, levels of calibration). Wald intervals: from the Fisher
    information when rows are independent; with `cluster`, from the cluster-robust (sandwich) covariance of Liang and
    Zeger 1986 with the factor G/(G-1), and Student's t with G - 1 degrees of freedom. Where an estimate does not exist
    (the scores separate the classes, or are all equal) it is NaN and its note says why.

    Args:
        y: (n,) 0/1.
        p: (n,) P(positive).
        cluster: (n,) patient of each row; None: rows independent.
        level: of the intervals.
    """
    labels, scores = check_binary(y, p)
    groups = None if cluster is None else check_clusters(cluster, len(labels))
    x = _logit(scores)
    clipped = int(((scores < CLIP) | (scores > 1 - CLIP)).sum())
    ones = np.ones((len(x), 1))
    large = _logistic(ones, labels, offset=x, groups=groups)
    undefined = _undefined(x, labels)
    joint = None if undefined else _logistic(np.column_stack([ones[:, 0], x]), labels, offset=0 * x, groups=groups)

    def interval(fit: tuple[Floats, Floats] | None, k: int) -> Interval:
        nan = float("nan")
        point, error = (nan, nan) if fit is None else (float(fit[0][k]), float(np.sqrt(fit[1][k, k])))
        count = len(x) if groups is None else int(groups.max()) + 1
        reach = (
            scipy.stats.norm.isf((1 - level) / 2) if groups is None else scipy.stats.t.isf((1 - level) / 2, count - 1)
        )
        return Interval(
            point=point,
            low=float(point - reach * error),
            high=float(point + reach * error),
            level=level,
            n=len(x),
            clusters=count,
            resamples=0,
            degenerate=0,
            method="wald" if groups is None else "wald, cluster-robust",
            note=undefined if fit is None else "one cluster: no interval" if count < 2 else "",
        )

    return LogitRecalibration(
        slope=interval(joint, 1), intercept=interval(large, 0), joint_intercept=interval(joint, 0), clipped=clipped
    )


def _undefined(x: Floats, labels: npt.NDArray[Any]) -> str:
    """Return why logit(p) has no finite logistic slope, or an empty string."""
    if np.ptp(x) == 0:
        return "all scores are equal: no slope"
    positive, negative = x[labels == 1], x[labels == 0]
    if positive.min() >= negative.max() or positive.max() <= negative.min():
        return "the scores separate the classes completely: the slope is infinite"
    return ""


def _logistic(design: Floats, y: npt.NDArray[Any], *, offset: Floats, groups: Ints | None) -> tuple[Floats, Floats]:
    """Return (coefficients (k,), covariance (k, k)) of an unpenalised logistic fit by Newton's method."""
    beta = np.zeros(design.shape[1])

    def loss(b: Floats) -> float:
        eta = offset + design @ b
        return float(np.logaddexp(0, eta).sum() - (y * eta).sum())

    for _ in range(100):
        mu = scipy.special.expit(offset + design @ beta)
        information = (design * (mu * (1 - mu))[:, None]).T @ design
        step = np.linalg.lstsq(information, design.T @ (y - mu), rcond=None)[0]
        scale, now = 1.0, loss(beta)
        while loss(beta + scale * step) > now and scale > 1e-8:
            scale /= 2
        beta = beta + scale * step
        if np.abs(scale * step).max() < 1e-10:
            break
    mu = scipy.special.expit(offset + design @ beta)
    bread = np.linalg.pinv((design * (mu * (1 - mu))[:, None]).T @ design)
    if groups is None:
        return beta, bread
    count = int(groups.max()) + 1
    if count < 2:
        return beta, np.full_like(bread, np.nan)
    scores = np.zeros((count, design.shape[1]))
    np.add.at(scores, groups, design * (y - mu)[:, None])
    return beta, bread @ (scores.T @ scores) @ bread * count / (count - 1)


def _logit(p: Floats) -> Floats:
    """Return logit(p), scores nearer than 1e-6 to 0 or 1 moved to there."""
    return scipy.special.logit(np.clip(p, CLIP, 1 - CLIP))


def _log(p: Floats) -> Floats:
    """Return log(p), probabilities below 1e-12 taken for that."""
    return np.log(np.maximum(p, LEAST))


def _log_probabilities(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[Floats, Ints]:
    """Return logits (n, C) up to a constant per row, and labels (n,)."""
    if np.ndim(p) == 1:
        labels, score = check_binary(y, p)
        return _log(np.column_stack([1 - score, score])), labels.astype(np.int64)
    labels, scores = check_multiclass(y, p)
    return _log(scores), labels


def _confidence(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return (score, hit) (n,): P(positive) and y, or the top-label confidence and whether it is right."""
    if np.ndim(p) == 1:
        labels, score = check_binary(y, p, both=False)
        return score, labels.astype(np.float64)
    labels, scores = check_multiclass(y, p)
    return scores.max(1), (scores.argmax(1) == labels).astype(np.float64)


def _per_class(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return scores (n, K) and hits (n, K): K = 1 for binary, the number of classes otherwise."""
    if np.ndim(p) == 1:
        labels, score = check_binary(y, p, both=False)
        return score[:, None], labels.astype(np.float64)[:, None]
    labels, scores = check_multiclass(y, p)
    return scores, np.eye(scores.shape[1])[labels]


def _edges(score: Floats, bins: int, scheme: Scheme) -> Floats:
    """Return the bin edges, ascending from 0 (or the least score) to 1 (or the greatest).

    Raises:
        PredictionsError: no such scheme, or fewer than one bin.
    """
    if bins < 1:
        raise PredictionsError(f"{bins} bins; needed at least 1")
    if scheme == "width":
        return np.linspace(0, 1, bins + 1)
    if scheme == "mass":
        return np.quantile(score, np.linspace(0, 1, bins + 1))
    raise PredictionsError(f"unknown binning scheme {scheme!r}; one of width, mass")


def _bin_ids(score: Floats, bins: int, scheme: Scheme) -> Ints:
    """Return the bin 0..bins-1 of each score; bins are (low, high], the first one closed."""
    return np.searchsorted(_edges(score, bins, scheme)[1:-1], score, side="left").astype(np.int64)


def _gap_sums(score: Floats, hit: npt.NDArray[Any], ids: Ints) -> Floats:
    """Return per bin |sum of (score - hit)|."""
    return np.abs(np.bincount(ids, score - hit))
