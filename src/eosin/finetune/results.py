"""What out-of-fold and external predictions say: temperature, threshold, metrics by domain, calibration by scanner.

Two thresholds must not be mixed up. The ensemble that is shipped has one, chosen on all out-of-fold predictions. The
out-of-fold numbers themselves are made with a temperature, shift and threshold a fold, from the other folds alone: a
threshold judged on the predictions it was chosen on flatters itself. Ranks are those of the logits: the shift of a fold
puts it the lower the more atypical cells it has itself, which would lower a pooled AUROC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from eosin.errors import PredictionsError
from eosin.evaluation.calibration import calibration_slope_intercept, reliability
from eosin.evaluation.metrics import auroc, choose_threshold, sign_warning
from eosin.evaluation.report import Remark, plain
from eosin.evaluation.subgroups import calibration_table, pooled_and_domains
from eosin.finetune.cells import CellTable
from eosin.finetune.infer import Scale, combine

RANKED, SCORED = ("auroc", "auprc"), ("brier",)
CALLS = ("ba", "sensitivity", "specificity")
RELIABILITY_BINS = 10
SURE_SHARE = 0.8
_EPS = 1e-12  # from 0 and 1, before a logit

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Sections of the report on one set of predictions, and what its reader must know."""

    sections: dict[str, Any]
    remarks: tuple[Remark, ...]


def fit_scale(label: npt.ArrayLike, logits: npt.ArrayLike) -> Scale:
    """Return temperature and shift of least log loss, and threshold of best balanced accuracy, out of fold.

    Temperature scaling (Guo et al. 2017, section 4.2) with a shift is Platt's: training shows classes as often as each
    other, and the shift brings P back to the share of atypical cells there is.

    Args:
        label: (n,) 1 = atypical.
        logits: (n,) out of fold.

    Raises:
        PredictionsError: a cell without a prediction, or one class.
    """
    y, x = np.asarray(label, dtype=np.int64), np.asarray(logits, dtype=np.float64)
    if not np.isfinite(x).all():
        raise PredictionsError(f"{int((~np.isfinite(x)).sum())} of {len(x)} cells have no out-of-fold prediction")
    note, temperature, shift = "", 1.0, 0.0
    found = calibration_slope_intercept(y, expit(x))
    slope, intercept = found.slope.point, found.joint_intercept.point
    if slope > 0:
        temperature, shift = 1 / slope, -intercept / slope
    else:
        why = found.slope.note or "the scores rank the classes no better than chance; see that 1 is atypical"
        note = f"no temperature could be fitted, 1 is used: {why}"
    threshold = choose_threshold(y, expit((x - shift) / temperature))
    return Scale(threshold=threshold, temperature=temperature, n=len(y), shift=shift, note=note)


class CrossFitted(NamedTuple):
    """P(atypical), calls in {0, 1} and the threshold they were made at, each (n,)."""

    p: Floats
    calls: Floats
    threshold: Floats


def cross_fitted(label: npt.ArrayLike, logits: npt.ArrayLike, fold_of: npt.ArrayLike) -> CrossFitted:
    """Return what is called, each fold with the scale and threshold of the others.

    Args:
        label: (n,) 1 = atypical.
        logits: (n,) out of fold.
        fold_of: (n,) in which fold a cell was tested.
    """
    y, x, fold = np.asarray(label), np.asarray(logits, dtype=np.float64), np.asarray(fold_of)
    p, threshold = np.empty(len(x)), np.empty(len(x))
    for each in np.unique(fold):
        mine = fold == each
        scale = fit_scale(y[~mine], x[~mine])
        p[mine] = combine(x[mine], temperature=scale.temperature, shift=scale.shift).p
        threshold[mine] = scale.threshold
    return CrossFitted(p, (p >= threshold).astype(np.float64), threshold)


def evaluate(
    cells: CellTable,
    logits: Floats,
    scale: Scale | None,
    *,
    fold_of: npt.NDArray[np.int64] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Evaluated:
    """Return what predictions are worth: pooled, by domain, mean and worst domain; calibration by scanner.

    Args:
        cells: the cells that were predicted.
        logits: (folds, n); (1, n) out of fold.
        scale: of the ensemble; used where `fold_of` is not given.
        fold_of: (n,) fold of each out-of-fold cell: calls are then cross-fitted.
        resamples: of the bootstrap over slides.
        seed: of the bootstrap.

    Raises:
        PredictionsError: one class, or neither scale nor folds.
    """
    y, slides = cells.label.astype(np.int64), cells.group_key()
    if fold_of is not None:
        p, calls, threshold = cross_fitted(y, logits[0], fold_of)
    elif scale is not None:
        p = combine(logits, temperature=scale.temperature, shift=scale.shift).p
        calls, threshold = (p >= scale.threshold).astype(np.float64), np.full(len(p), scale.threshold)
    else:
        raise PredictionsError("predictions of an ensemble need its threshold and temperature")
    domain = np.where(cells.domain == "", "unknown", cells.domain)
    scanner = np.where(cells.scanner == "", "unknown", cells.scanner)
    how = {"resamples": resamples, "seed": seed}
    ranks = expit(logits.mean(0))
    ranked = pooled_and_domains(y, ranks, domain, slides, metrics=RANKED, **how)
    scored = pooled_and_domains(y, p, domain, slides, metrics=SCORED, **how)
    called = pooled_and_domains(y, calls, domain, slides, metrics=CALLS, **how)
    sections = {
        "n": len(y),
        "slides": len(np.unique(slides)),
        "scores": [*plain(ranked), *plain(scored)],
        "calls": called,
        "calibration": calibration_table(y, p, scanner, slides, **how),
        "reliability": _curves(y, p, scanner),
        "uncertainty": _uncertainty(calls != y, p, threshold),
    }
    pooled = next(row["point"] for row in plain(called) if row["scope"] == "pooled" and row["metric"] == "ba")
    warning = sign_warning(auroc=auroc(y, ranks), ba=float(pooled))
    remarks = (Remark(kind="sign", severity="warning", message=warning),) if warning else ()
    return Evaluated(sections=plain(sections), remarks=remarks)


def _curves(y: npt.NDArray[np.int64], p: Floats, scanner: npt.NDArray[np.str_]) -> list[dict[str, Any]]:
    """Return a reliability table of all cells and of each scanner."""
    parts = [("all", np.ones(len(y), dtype=np.bool_))]
    names = np.unique(scanner).tolist()
    parts += [(name, scanner == name) for name in names] if len(names) > 1 else []
    return [
        {
            "name": name,
            "n": int(rows.sum()),
            "rows": reliability(y[rows], p[rows], bins=RELIABILITY_BINS, scheme="mass"),
        }
        for name, rows in parts
    ]


def _uncertainty(wrong: npt.NDArray[np.bool_], p: Floats, threshold: Floats) -> dict[str, Any]:
    """Return the share of wrong calls among the surest cells and among the rest, sure being far from the threshold."""
    margin = np.abs(logit(np.clip(p, _EPS, 1 - _EPS)) - logit(np.clip(threshold, _EPS, 1 - _EPS)))
    order = np.argsort(-margin, kind="stable")
    sure = order[: round(SURE_SHARE * len(order))]
    rest = order[len(sure) :]
    return {
        "sure_share": SURE_SHARE,
        "wrong": float(wrong.mean()),
        "wrong_sure": float(wrong[sure].mean()),
        "wrong_rest": float(wrong[rest].mean()) if len(rest) else None,
    }
