"""The linear probe: logistic regression on frozen features, its strength chosen on validation parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import roc_auc_score
from sklearn.utils import Tags, column_or_1d, compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets

from eosin.errors import LabelError, closest
from eosin.heads.labels import default_splits, encode_labels, fit_arrays, predict_array
from eosin.heads.logistic import Link, logistic_path

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Splits = Sequence[tuple[Array, Array]]
ClassWeight = Any  # None, "balanced" or a mapping from class to weight, as scikit-learn takes it
Scoring = Literal["balanced_accuracy", "auroc", "log_loss"]

C_GRID = tuple(10.0**power for power in range(-6, 5))
BLOCK_CELLS = 2**20


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Logistic regression whose strength C is chosen on validation parts, then refitted on all rows.

    The answer at a given C is that of scikit-learn's `StandardScaler` and `LogisticRegression(C)` (L2 penalty, free
    intercept, softmax for three classes or more), folded into one matrix on the features as they are. Labels of two
    dimensions, (n, L) of 0 and 1, make L separate probes that read the features together, each with its own C.

    Args:
        c_grid: strengths to try (larger = weaker penalty); a single one is used as it is.
        class_weight: None, "balanced" (n / (classes * rows of the class); of each label by itself when there are
            several) or a mapping from class to weight.
        standardize: scale features to unit variance on the rows being fitted.
        scoring: what C is chosen by, averaged over validation parts: "balanced_accuracy", "auroc" (mean over
            classes of one against the rest) or "log_loss". Of equal scores the strongest penalty wins.

    Attributes:
        coef_: (K, D) on the features as they are; K is 1 for two classes, else the number of classes or labels.
        intercept_: (K,).
        c_: the chosen C; (L,) for several labels.
        c_scores_: (splits, len(c_grid)) validation scores, higher is better (log loss is negated), with several
            labels (splits, len(c_grid), L). No rows when `c_grid` holds one.
        classes_: (C,) sorted classes; 0 to L - 1 for several labels.
    """

    def __init__(
        self,
        *,
        c_grid: Sequence[float] = C_GRID,
        class_weight: ClassWeight = None,
        standardize: bool = True,
        scoring: Scoring = "balanced_accuracy",
    ) -> None:
        self.c_grid = c_grid
        self.class_weight = class_weight
        self.standardize = standardize
        self.scoring = scoring

    def __sklearn_tags__(self) -> Tags:
        """Return scikit-learn's description of the estimator."""
        tags = super().__sklearn_tags__()
        if tags.classifier_tags is not None:
            tags.classifier_tags.multi_label = True
        return tags

    def fit(self, x: Array, y: Array, *, groups: Array | None = None, splits: Splits | None = None) -> Self:
        """Choose C and fit.

        A part's features are copied while it is fitted, so memory peaks near twice the features.

        Args:
            x: (n, D) features, float16, float32 or float64.
            y: (n,) classes, or (n, L) of 0 and 1.
            groups: (n,) clusters, usually patients; used when `splits` is not given.
            splits: (train rows, validation rows) pairs. Without them: up to five stratified folds, by group if given
                (several labels: stratified by the rarest).

        Raises:
            LabelError: one class only, or a part without a class it needs.
            ValueError: shapes, NaN or infinity, a strength that is not above zero, an unknown scoring.
            ArithmeticError: no convergence at one C.
        """
        grid = np.sort(np.asarray(self.c_grid, np.float64).ravel())
        if not len(grid) or not np.isfinite(grid).all() or grid[0] <= 0:
            raise ValueError(f"c_grid is {self.c_grid}; it needs at least one strength, each finite and above zero")
        if self.scoring not in _SCORES:
            raise ValueError(f"unknown scoring {self.scoring!r}; closest: {closest(str(self.scoring), _SCORES)}")
        x, y = fit_arrays(self, x, y, multi_output=True)
        target = _target(y)
        self.classes_, self._several = target.classes, target.several
        scores = np.empty((0, len(grid), target.values.shape[1] if target.several else 1))
        best = grid[:1]
        if len(grid) > 1:
            parts = _default_splits(target, groups) if splits is None else splits
            scores = np.array([self._part_scores(x, target, grid, part, at) for at, part in enumerate(parts)])
            best = grid[scores.mean(axis=0).argmax(axis=0)]
        order = np.argsort(np.argsort(np.ravel(self.c_grid), kind="stable"), kind="stable")
        self.c_scores_ = scores[:, order] if target.several else scores[:, order, 0]
        self.c_ = np.broadcast_to(best, scores.shape[2:]).copy() if target.several else float(best[0])
        path = self._path(x, target, best[None])
        self.coef_, self.intercept_ = path.coef[0], path.intercept[0]
        return self

    def decision_function(self, x: Array) -> Floats:
        """Return margins (n,) for two classes, else (n, K)."""
        margin = _margins(predict_array(self, x), self.coef_, self.intercept_)
        return margin if self._several or margin.shape[1] > 1 else margin[:, 0]

    def predict_proba(self, x: Array) -> Floats:
        """Return probabilities (n, C) of the classes, or (n, L) of each label being 1."""
        margin = self.decision_function(x)
        if margin.ndim == 1:
            return np.column_stack([expit(-margin), expit(margin)])
        return expit(margin) if self._several else softmax(margin, axis=1)

    def predict(self, x: Array) -> Array:
        """Return the most probable class (n,), or (n, L) of 0 and 1."""
        margin = self.decision_function(x)
        if self._several:
            return (margin > 0).astype(np.int64)
        return self.classes_[(margin > 0).astype(np.int64) if margin.ndim == 1 else margin.argmax(axis=1)]

    def _path(self, x: Array, target: _Target, grid: Floats) -> Any:
        weight = _weights(target, self.class_weight)
        return logistic_path(x, target.values, grid, link=target.link, weight=weight, standardize=self.standardize)

    def _part_scores(self, x: Array, target: _Target, grid: Floats, part: tuple[Array, Array], at: int) -> Floats:
        """Return (n_c, L) validation scores of one split; L is 1 unless there are several labels."""
        train, val = (np.asarray(rows) for rows in part)
        _check_part(target.rows(train), every=True, name=f"the training rows of split {at}")
        _check_part(target.rows(val), every=target.several, name=f"the validation rows of split {at}")
        path = self._path(x[train], target.rows(train), grid)
        margins = _margins(x[val], path.coef.reshape(-1, x.shape[1]), path.intercept.ravel())
        margins = margins.reshape(len(val), len(grid), -1).transpose(1, 0, 2)
        truth, score = target.values[val], _SCORES[self.scoring]
        if target.several:
            return np.array(
                [[score(truth[:, [k]], margin[:, [k]]) for k in range(truth.shape[1])] for margin in margins]
            )
        return np.array([[score(truth, margin)] for margin in margins])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """Labels as the solver wants them."""

    values: Floats  # (n, K) of 0 and 1: one column for two classes, one-hot rows for more, a column a label
    classes: Array
    several: bool

    @property
    def link(self) -> Link:
        return "sigmoid" if self.several or self.values.shape[1] == 1 else "softmax"

    @property
    def held(self) -> Array:
        """(n, K or 2K) which class a row holds: of two classes or several labels, first "is 1", then "is 0"."""
        return self.values > 0 if self.link == "softmax" else np.hstack([self.values > 0, self.values == 0])

    def rows(self, rows: Array) -> _Target:
        """Return the target of some rows."""
        return _Target(values=self.values[rows], classes=self.classes, several=self.several)


def _target(y: Array) -> _Target:
    """Return checked labels; a single column is taken as classes, with scikit-learn's warning."""
    if y.ndim == 2 and y.shape[1] > 1:
        check_classification_targets(y)
        if not np.isin(y, (0, 1)).all():
            raise LabelError(f"labels of shape {y.shape} must be 0 or 1; found {np.unique(y)[:5].tolist()}")
        target = _Target(values=y.astype(np.float64), classes=np.arange(y.shape[1]), several=True)
        _check_part(target, every=True, name="the rows")
        return target
    classes, codes = encode_labels(column_or_1d(y, warn=True))
    values = np.eye(len(classes))[codes]
    return _Target(values=values if len(classes) > 2 else values[:, 1:], classes=classes, several=False)


def _check_part(target: _Target, *, every: bool, name: str) -> None:
    """Raise LabelError unless rows hold every class (or two, if not `every`), and every label both values."""
    present = target.held.any(axis=0)
    if present.all() or (not every and present.sum() > 1):
        return
    if target.several:
        labels = np.flatnonzero(~present.reshape(2, -1).all(axis=0)).tolist()
        raise LabelError(f"in {name}, label {labels[0]} has one value only; leave it out or split otherwise")
    order = target.classes if target.link == "softmax" else target.classes[::-1]
    raise LabelError(
        f"{name} hold no {order[~present].tolist()}; use fewer folds, splits stratified by class, or one C"
    )


def _default_splits(target: _Target, groups: Array | None) -> Splits:
    values = target.values
    if groups is not None and np.shape(groups) != values.shape[:1]:
        raise ValueError(f"groups has shape {np.shape(groups)}; needed ({len(values)},), one a row")
    if target.several:
        rare = np.minimum(values.mean(axis=0), 1 - values.mean(axis=0)).argmin()
        return default_splits(values[:, rare].astype(np.int64), groups)
    return default_splits(
        (values[:, 0] > 0).astype(np.int64) if values.shape[1] == 1 else values.argmax(axis=1), groups
    )


def _weights(target: _Target, class_weight: ClassWeight) -> Floats | None:
    """Return loss weights (n, K) or (n, 1) of the rows."""
    if class_weight is None:
        return None
    if target.link == "softmax":
        return compute_sample_weight(class_weight, target.classes[target.values.argmax(axis=1)])[:, None]
    names = np.arange(2) if target.several else target.classes
    columns = [compute_sample_weight(class_weight, names[column.astype(np.int64)]) for column in target.values.T]
    return np.column_stack(columns)


def _margins(x: Array, coef: Floats, intercept: Floats) -> Floats:
    """Return x @ coef.T + intercept (n, K) in float64, block by block."""
    step = max(1, BLOCK_CELLS // x.shape[1])
    blocks = [x[at : at + step].astype(np.float64, copy=False) @ coef.T for at in range(0, len(x), step)]
    return np.concatenate(blocks) + intercept


def _balanced_accuracy(truth: Floats, margin: Floats) -> float:
    """Return the mean recall over the classes that are there."""
    if truth.shape[1] == 1:
        codes, called = truth[:, 0].astype(np.int64), (margin[:, 0] > 0).astype(np.int64)
    else:
        codes, called = truth.argmax(axis=1), margin.argmax(axis=1)
    return float(np.mean([(called[codes == code] == code).mean() for code in np.unique(codes)]))


def _auroc(truth: Floats, margin: Floats) -> float:
    """Return the mean AUROC of one class against the rest, over the classes that are there."""
    probability = margin if truth.shape[1] == 1 else softmax(margin, axis=1)
    present = np.flatnonzero(truth.any(axis=0))
    return float(np.mean([roc_auc_score(truth[:, at], probability[:, at]) for at in present]))


def _log_loss(truth: Floats, margin: Floats) -> float:
    """Return minus the mean log loss."""
    if truth.shape[1] == 1:
        return float(log_expit(np.where(truth > 0, margin, -margin)).mean())
    return float((truth * log_softmax(margin, axis=1)).sum(axis=1).mean())


_SCORES: dict[str, Callable[[Floats, Floats], float]] = {
    "balanced_accuracy": _balanced_accuracy,
    "auroc": _auroc,
    "log_loss": _log_loss,
}
