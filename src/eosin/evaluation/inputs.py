"""Checks of what is handed to evaluation: labels, probabilities, clusters, weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.errors import PredictionsError

ROW_SUM_TOLERANCE = 1e-3


def check_binary(
    y: npt.ArrayLike, p: npt.ArrayLike, *, both: bool = True
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Return labels (n,) int8 in {0, 1} and probabilities of the positive class (n,) float64.

    Args:
        y: (n,) class indices, 1 = positive; booleans do.
        p: (n,) P(positive) in [0, 1].
        both: insist on at least one row of each class.

    Raises:
        PredictionsError: wrong shapes, no rows, NaN, values outside [0, 1], labels that are not 0 or 1, one class.
    """
    labels, scores = check_labels(y), _floats(p)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise PredictionsError(
            f"labels have shape {labels.shape} and probabilities {scores.shape}; a binary task needs (n,) and (n,): "
            "the probability of the positive class of every row"
        )
    _in_unit_range(scores)
    strange = np.setdiff1d(labels, (0, 1))
    if strange.size:
        raise PredictionsError(
            f"a binary task has the labels 0 and 1, but {_listed(strange)} also occur; "
            "encode the positive class as 1, or hand over one probability a class (n, C)"
        )
    if both:
        check_both(labels)
    return labels.astype(np.int8), scores


def check_both(y: npt.NDArray[np.integer]) -> None:
    """Return when `y` holds more than one class.

    Raises:
        PredictionsError: all rows are of one class.
    """
    if (y == y[0]).all():
        raise PredictionsError(
            f"all {len(y)} rows are of class {int(y[0])}; this number compares classes and needs both 0 and 1: "
            "join this group with another, or report sensitivity or specificity alone"
        )


def check_multiclass(y: npt.ArrayLike, p: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return labels (n,) int64 in 0 ... C-1 and probabilities (n, C) float64, rows summing to 1.

    Args:
        y: (n,) class indices.
        p: (n, C) probabilities, C >= 2.

    Raises:
        PredictionsError: wrong shapes, no rows, NaN, values outside [0, 1], rows that do not sum to 1, labels >= C.
    """
    labels, scores = check_labels(y), _floats(p)
    if scores.ndim != 2 or scores.shape[0] != labels.shape[0] or scores.shape[1] < 2:
        raise PredictionsError(
            f"labels have shape {labels.shape} and probabilities {scores.shape}; a multiclass task needs (n,) and "
            "(n, C) with C >= 2"
        )
    _in_unit_range(scores)
    sums = scores.sum(axis=1)
    wrong = np.flatnonzero(np.abs(sums - 1) > ROW_SUM_TOLERANCE)
    if wrong.size:
        raise PredictionsError(
            f"{wrong.size} rows of probabilities do not sum to 1 (first: row {wrong[0]}, {sums[wrong[0]]:.4g}); "
            "apply softmax, or evaluate independent labels one by one as binary tasks"
        )
    strange = np.unique(labels[(labels < 0) | (labels >= scores.shape[1])])
    if strange.size:
        raise PredictionsError(
            f"labels {_listed(strange)} occur, but {scores.shape[1]} probabilities a row mean classes "
            f"0 to {scores.shape[1] - 1}"
        )
    return labels, scores


def check_labels(y: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return class indices (n,) as int64.

    Raises:
        PredictionsError: not one-dimensional, empty, text, missing or not whole numbers.
    """
    labels = np.asarray(y)
    if labels.ndim != 1 or labels.size == 0:
        raise PredictionsError(f"labels have shape {labels.shape}; needed (n,) with at least one row")
    if labels.dtype.kind not in "biuf":
        try:
            labels = labels.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise PredictionsError(
                f"labels are not class indices (first: {labels[0]!r}); encode them as 0, 1, ... with Cohort.labels"
            ) from error
    missing = np.flatnonzero(~np.isfinite(labels))
    if missing.size:
        raise PredictionsError(
            f"{missing.size} of {labels.size} labels are missing (first: row {missing[0]}); leave these rows out"
        )
    whole = labels.astype(np.int64)
    if not np.array_equal(whole, labels):
        row = int(np.flatnonzero(whole != labels)[0])
        raise PredictionsError(
            f"label {labels[row]:g} in row {row} is not a whole number; needed class indices 0, 1 ..."
        )
    return whole


def check_clusters(cluster: npt.ArrayLike, n: int) -> npt.NDArray[np.int64]:
    """Return cluster codes (n,) int64 from 0, in the sorted order of the cluster's names.

    Args:
        cluster: (n,) patient ids of any hashable type.
        n: rows expected.

    Raises:
        PredictionsError: wrong length, or rows without a cluster.
    """
    names = np.asarray(cluster)
    if names.shape != (n,):
        raise PredictionsError(f"clusters have shape {names.shape}; needed ({n},): the patient of every row")
    codes, _ = pd.factorize(names, sort=True)
    missing = np.flatnonzero(codes < 0)
    if missing.size:
        raise PredictionsError(
            f"{missing.size} of {n} rows have no cluster (first: row {missing[0]}); "
            "give each its patient id, or its own id when it is alone"
        )
    return codes.astype(np.int64, copy=False)


def check_weight(weight: npt.ArrayLike | None, n: int) -> npt.NDArray[np.float64]:
    """Return row weights (n,) float64; ones when `weight` is None.

    Raises:
        PredictionsError: wrong length, NaN, negative, or all zero.
    """
    if weight is None:
        return np.ones(n)
    weights = _floats(weight)
    if weights.shape != (n,):
        raise PredictionsError(f"weights have shape {weights.shape}; needed ({n},)")
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise PredictionsError("weights must be finite, not negative, and not all zero")
    return weights


def check_same_rows(name: str, got: int, expected: int) -> None:
    """Return when two columns have the same number of rows.

    Raises:
        PredictionsError: they do not; the message names the column.
    """
    if got != expected:
        raise PredictionsError(
            f"{name} has {got} rows where the labels have {expected}; they must be row by row the same"
        )


def _floats(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PredictionsError(f"expected an array of numbers, found something else ({error})") from error


def _in_unit_range(scores: npt.NDArray[np.float64]) -> None:
    missing = np.flatnonzero(np.isnan(scores.reshape(len(scores), -1)).any(axis=1))
    if missing.size:
        raise PredictionsError(
            f"{missing.size} of {len(scores)} rows have NaN as probability (first: row {missing[0]}); "
            "find out why, or leave these rows out and say how many"
        )
    low, high = float(scores.min()), float(scores.max())
    if low < 0 or high > 1:
        row = int(np.flatnonzero(((scores < 0) | (scores > 1)).reshape(len(scores), -1).any(axis=1))[0])
        logits = low < 0 and high - low > 1
        advice = (
            "these look like logits: apply a sigmoid (binary) or softmax (multiclass) first"
            if logits
            else "scale them to probabilities first"
        )
        raise PredictionsError(
            f"probabilities must lie in [0, 1] but range over {low:.4g} to {high:.4g} (first: row {row}); {advice}"
        )


def _listed(values: npt.NDArray[np.int64]) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    return f"{shown} ..." if values.size > 5 else shown
