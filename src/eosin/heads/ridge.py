"""HEST-Benchmark's regression: standardise, PCA, ridge, Pearson per target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.linalg import eigh
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin

from eosin.heads.labels import fit_arrays, predict_array

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class RidgePca(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Ridge on the principal components of standardised features (HEST-Benchmark, Jaume et al. 2024).

    One eigendecomposition serves all targets: component scores are orthogonal, so the ridge solution per component
    and target is (z.y) / (z.z + alpha). Equals scikit-learn's StandardScaler, PCA and Ridge in a row. HEST fits no
    intercept; on centred components an intercept changes neither weights nor Pearson, so it is kept and predictions
    are in the targets' units.

    Args:
        components: principal components kept; HEST uses 256.
        alpha: ridge penalty; None is HEST's 100 / (components x targets).

    Attributes:
        alpha_: the penalty used.
        explained_variance_: (components,) variance of each component, as scikit-learn's PCA gives it.
        coef_: (targets, D) weights on the raw features.
        intercept_: (targets,).
    """

    def __init__(self, *, components: int = 256, alpha: float | None = None) -> None:
        self.components = components
        self.alpha = alpha

    def fit(self, x: Array, y: Array, *, groups: Array | None = None) -> Self:
        """Fit features (n, D) to targets (n, T) or (n,); `groups` is not used.

        Raises:
            ValueError: shapes, NaN, a negative penalty, or more components than min(n, D).
        """
        x, y = fit_arrays(self, x, y, multi_output=True, y_numeric=True, dtype=[np.float64, np.float32])
        targets = np.asarray(y, np.float64).reshape(len(y), -1)
        if not 1 <= self.components <= min(x.shape):
            raise ValueError(
                f"components is {self.components}; {x.shape[0]} rows x {x.shape[1]} features allow 1 to {min(x.shape)}"
            )
        self.alpha_ = 100 / (self.components * targets.shape[1]) if self.alpha is None else float(self.alpha)
        if self.alpha_ < 0:
            raise ValueError(f"alpha is {self.alpha_}; it must be 0 or more")
        mean, scale = _standard(x)
        z = (x - mean) / scale
        value, axes = _principal_axes(z, self.components)
        centre = targets.mean(axis=0)
        projected = (z @ axes).T @ (targets - centre)
        shrunk = value + self.alpha_
        weights = projected / np.where(shrunk > 0, shrunk, np.inf)[:, None]
        coef = ((axes @ weights) / scale[:, None]).T
        self.explained_variance_ = value / (len(x) - 1)
        self._single = np.ndim(y) == 1
        self.coef_, self.intercept_ = coef, centre - coef @ mean
        return self

    def predict(self, x: Array) -> Floats:
        """Return the targets (n, T), or (n,) when one was fitted as (n,)."""
        x = predict_array(self, x, dtype=[np.float64, np.float32])
        predicted = x @ self.coef_.T + self.intercept_
        return predicted[:, 0] if self._single else predicted


def pearson(y: Array, predicted: Array) -> Floats:
    """Return Pearson's r (T,) of each target; NaN where the target or its prediction is constant.

    Args:
        y: (n, T) or (n,) measured.
        predicted: the same shape.

    Raises:
        ValueError: shapes that differ, or fewer than two rows.
    """
    y, predicted = np.asarray(y, np.float64), np.asarray(predicted, np.float64)
    if y.shape != predicted.shape or y.ndim not in (1, 2) or len(y) < 2:
        raise ValueError(f"y {y.shape} and predicted {predicted.shape} must be the same (n, T) with n >= 2")
    y, predicted = y.reshape(len(y), -1), predicted.reshape(len(y), -1)
    a, b = y - y.mean(axis=0), predicted - predicted.mean(axis=0)
    length = np.sqrt(np.square(a).sum(axis=0)) * np.sqrt(np.square(b).sum(axis=0))
    flat = (np.ptp(y, axis=0) == 0) | (np.ptp(predicted, axis=0) == 0) | (length == 0)
    r = (a * b).sum(axis=0) / np.where(flat, 1, length)
    return np.where(flat, np.nan, np.clip(r, -1, 1))


def pearson_over_splits(
    x: Array,
    y: Array,
    splits: Sequence[tuple[Array, Array]],
    *,
    components: int = 256,
    alpha: float | None = None,
    names: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return HEST's table: one row per split and target with split, n_train, n_test, target, pearson.

    HEST's headline is the mean over targets, then mean and standard deviation over splits:
    `table.groupby("split").pearson.mean().agg(["mean", "std"])`. HEST counts a constant target as 0; here it is NaN.

    Args:
        x: (n, D) features.
        y: (n, T) targets, as HEST: log1p of normalised counts.
        splits: (train rows, test rows) pairs; no patient on both sides.
        components: principal components kept.
        alpha: ridge penalty; None is HEST's.
        names: (T,) target names; None numbers them.

    Raises:
        ValueError: shapes, or names that do not fit the targets.
    """
    if y.ndim != 2 or (names is not None and len(names) != y.shape[1]):
        raise ValueError(f"y {y.shape} must be (n, T), with one name a target ({names and len(names)} names)")
    labels = list(names) if names is not None else [str(at) for at in range(y.shape[1])]
    tables = []
    for split, (train, test) in enumerate(splits):
        head = RidgePca(components=components, alpha=alpha).fit(x[train], y[train])
        r = pearson(y[test], head.predict(x[test]))
        sizes = {"split": split, "n_train": len(train), "n_test": len(test)}
        tables.append(pd.DataFrame({**sizes, "target": labels, "pearson": r}))
    return pd.concat(tables, ignore_index=True)


def _standard(x: Array) -> tuple[Floats, Floats]:
    """Return means and population standard deviations (D,); 1 for columns that are constant up to rounding."""
    mean = x.mean(axis=0, dtype=np.float64)
    scale = np.sqrt(np.square(x - mean).mean(axis=0))
    constant = scale <= 10 * np.finfo(x.dtype).eps * np.abs(mean)
    return mean, np.where(constant, 1, scale)


def _principal_axes(z: Floats, components: int) -> tuple[Floats, Floats]:
    """Return the largest squared singular values (components,) of `z` (n, D) and its right vectors (D, components)."""
    n, dim = z.shape
    wide = dim > n
    gram = z @ z.T if wide else z.T @ z
    size = len(gram)
    value, vector = eigh(gram, subset_by_index=(size - components, size - 1))
    value, vector = np.maximum(value[::-1], 0), vector[:, ::-1]
    if not wide:
        return value, vector
    floor = value[0] * n * np.finfo(float).eps
    length = np.sqrt(np.where(value > floor, value, np.inf))
    return value, (z.T @ vector) / length
