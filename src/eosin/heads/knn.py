"""The k-nearest-neighbour head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin

from eosin.heads.labels import default_splits, encode_labels, f1_per_class, fit_arrays, predict_array
from eosin.heads.neighbours import Metric, nearest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

K_GRID = (1, 3, 5, 10, 20, 30, 40, 50)


class KnnHead(ClassifierMixin, BaseEstimator):
    """Majority vote of the k nearest training rows; k chosen by macro-F1 on validation splits (THUNDER's protocol).

    A drawn vote goes to the lower class. Equals scikit-learn's KNeighborsClassifier at the chosen k.

    Args:
        k_grid: numbers of neighbours to choose from; one number is taken as it is.
        metric: "cosine" or "euclidean".
        block: training rows compared at once.

    Attributes:
        k_: the chosen number of neighbours, the smallest among equals.
        k_scores_: mean validation macro-F1 per k; empty when `k_grid` holds one.
        classes_: the classes, sorted.
    """

    def __init__(self, *, k_grid: Sequence[int] = K_GRID, metric: Metric = "cosine", block: int = 8192) -> None:
        self.k_grid = k_grid
        self.metric: Metric = metric
        self.block = block

    def fit(
        self,
        x: Array,
        y: Array,
        *,
        groups: Array | None = None,
        splits: Sequence[tuple[Array, Array]] | None = None,
    ) -> Self:
        """Keep the training rows and choose k.

        Args:
            x: (n, D) features.
            y: (n,) classes.
            groups: (n,) clusters, usually patients; used when `splits` is not given.
            splits: (train rows, validation rows) pairs. Without them: up to five stratified folds, by group if given.

        Raises:
            LabelError: one class only, or no split can be made.
            ValueError: shapes, NaN, or a grid with no k that the smallest training part can serve.
        """
        x, y = fit_arrays(self, x, y)
        self.classes_, codes = encode_labels(y)
        grid = sorted(set(self.k_grid))
        if not grid or grid[0] < 1:
            raise ValueError(f"k_grid is {tuple(self.k_grid)}; it needs at least one k, each 1 or more")
        self.k_scores_: dict[int, float] = {}
        if len(grid) == 1:
            self.k_ = grid[0]
        else:
            pairs = default_splits(codes, groups) if splits is None else splits
            self.k_scores_ = self._score_grid(x, codes, grid, pairs)
            self.k_ = max(self.k_scores_, key=lambda k: (self.k_scores_[k], -k))
        if self.k_ > len(x):
            raise ValueError(f"k is {self.k_} but there are {len(x)} training rows; lower k_grid")
        self._x, self._codes = x, codes
        return self

    def _score_grid(
        self, x: Array, codes: Indices, grid: list[int], splits: Sequence[tuple[Array, Array]]
    ) -> dict[int, float]:
        fewest = min(len(train) for train, _ in splits)
        grid = [k for k in grid if k <= fewest]
        if not grid:
            raise ValueError(f"the smallest training part has {fewest} rows, fewer than any k of {tuple(self.k_grid)}")
        scores: dict[int, list[float]] = {k: [] for k in grid}
        for train, val in splits:
            votes = self._votes(x[val], x[train], codes[train], grid)
            for k in grid:
                called = votes(k).argmax(axis=1)
                present = np.union1d(codes[val], called)
                scores[k].append(float(f1_per_class(codes[val], called, len(self.classes_))[present].mean()))
        return {k: float(np.mean(values)) for k, values in scores.items()}

    def _votes(self, queries: Array, x: Array, codes: Indices, grid: Sequence[int]) -> Callable[[int], Indices]:
        """Return a function from k to vote counts (q, C), after one search for the largest k."""
        _, index = nearest(queries, x, max(grid), metric=self.metric, block=self.block)
        near, n_classes = codes[index], len(self.classes_)
        offset = np.arange(len(queries))[:, None] * n_classes

        def votes(k: int) -> Indices:
            counts = np.bincount((near[:, :k] + offset).ravel(), minlength=len(queries) * n_classes)
            return counts.reshape(len(queries), n_classes)

        return votes

    def predict_proba(self, x: Array) -> Floats:
        """Return the share (n, C) of the k neighbours in each class."""
        x = predict_array(self, x)
        return self._votes(x, self._x, self._codes, [self.k_])(self.k_) / self.k_

    def predict(self, x: Array) -> Array:
        """Return the class (n,) with most neighbours."""
        probability = self.predict_proba(x)
        return self.classes_[probability.argmax(axis=1)]
