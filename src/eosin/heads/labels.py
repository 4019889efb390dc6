"""What every head asks of its features and labels, and the scores heads choose their settings by."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from eosin.errors import LabelError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

FEATURE_TYPES = [np.float32, np.float64, np.float16]


def fit_arrays(head: Any, x: Any, y: Any, **how: Any) -> tuple[Array, Array]:
    """Return features (n, D) and labels as arrays, checked by scikit-learn, and note D on `head`.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity.
    """
    return cast(tuple[Array, Array], validate_data(head, x, y, **{"dtype": FEATURE_TYPES, **how}))


def predict_array(head: Any, x: Any, **how: Any) -> Array:
    """Return features (n, D) as an array, checked against what `head` was fitted with.

    Raises:
        NotFittedError: `fit` comes first.
        ValueError: another D, NaN or infinity.
    """
    check_is_fitted(head)
    return cast(Array, validate_data(head, x, reset=False, **{"dtype": FEATURE_TYPES, **how}))


def encode_labels(y: Array) -> tuple[Array, Indices]:
    """Return the sorted classes (C,) and each label's place among them (n,).

    Raises:
        LabelError: fewer than two classes.
        ValueError: labels that are numbers of a scale, not classes.
    """
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise LabelError(f"the labels hold {len(classes)} class ({classes.tolist()}); a head needs at least two")
    return classes, codes.astype(np.int64)


def encode_test_labels(y: Array, classes: Array) -> Indices:
    """Return each label's place (n,) among the sorted training classes.

    Raises:
        LabelError: a label that is not among them.
    """
    strange = np.setdiff1d(y, classes)
    if len(strange):
        raise LabelError(
            f"the test labels hold {strange.tolist()}, which the training labels {classes.tolist()} do not"
        )
    return np.searchsorted(classes, y).astype(np.int64)


def default_splits(codes: Indices, groups: Array | None, *, folds: int = 5) -> list[tuple[Array, Array]]:
    """Return stratified (train, validation) row pairs; no group is on both sides.

    Args:
        codes: (n,) class indices.
        groups: (n,) clusters, or None: rows are their own.
        folds: at most so many; fewer when the rarest class has fewer rows (or groups).

    Raises:
        LabelError: a class lies in one row or one group only.
    """
    units = np.arange(len(codes)) if groups is None else np.asarray(groups)
    counts = [len(np.unique(units[codes == code])) for code in np.unique(codes)]
    folds = min(folds, *counts)
    if folds < 2:
        what = "row" if groups is None else "group"
        raise LabelError(f"a class lies in one {what} only, so nothing can be validated; give splits or one k")
    if groups is None:
        return list(StratifiedKFold(folds).split(codes, codes))
    return list(StratifiedGroupKFold(folds).split(codes, codes, units))


def f1_per_class(truth: Indices, called: Indices, n_classes: int) -> Floats:
    """Return F1 (C,) of each class index: 2 TP / (called + actual); 0 for a class neither called nor there."""
    hits = np.bincount(truth[truth == called], minlength=n_classes)
    size = np.bincount(truth, minlength=n_classes) + np.bincount(called, minlength=n_classes)
    return 2 * hits / np.maximum(size, 1)
