"""Nearest class mean: SimpleShot as a head, and its few-shot episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin

from eosin.errors import LabelError, NonFiniteError
from eosin.heads.curves import records
from eosin.heads.labels import encode_labels, encode_test_labels, fit_arrays, predict_array

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Centre = Literal["support", "pool"]

DRAW_BLOCK = 50


class PrototypeHead(ClassifierMixin, BaseEstimator):
    """SimpleShot: subtract the training mean, scale to length 1, nearest class mean (Wang et al. 2019, CL2N, eq. 2-4).

    Probabilities are softmax(-squared distance), as in prototypical networks (Snell et al. 2017, eq. 2); they rank the
    classes and are not calibrated. A row equal to the mean has no direction and stays at the origin.

    Args:
        centre: (D,) vector to subtract, from data of your own; None takes the mean of the rows given to `fit`.

    Attributes:
        mean_: (D,) the vector subtracted.
        prototypes_: (C, D) class means of the centred, normalised rows; not normalised again.
        classes_: the classes, sorted.
    """

    def __init__(self, *, centre: Array | None = None) -> None:
        self.centre = centre

    def fit(self, x: Array, y: Array, *, groups: Array | None = None) -> Self:
        """Learn the mean and the prototypes from features (n, D) and classes (n,); `groups` is not used.

        Raises:
            LabelError: one class only.
            ValueError: shapes, NaN.
        """
        x, y = fit_arrays(self, x, y)
        self.classes_, codes = encode_labels(y)
        x = x.astype(np.float64, copy=False)
        self.mean_ = x.mean(axis=0) if self.centre is None else np.asarray(self.centre, np.float64)
        if self.mean_.shape != (x.shape[1],):
            raise ValueError(f"centre has shape {self.mean_.shape}; the features need ({x.shape[1]},)")
        rows = centred_directions(x, self.mean_)
        self.prototypes_ = np.stack([rows[codes == code].mean(axis=0) for code in range(len(self.classes_))])
        return self

    def decision_function(self, x: Array) -> Floats:
        """Return minus the squared distance (n, C) to each prototype; (n,), second less first, for two classes."""
        scores = -self._squared_distance(x)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, x: Array) -> Floats:
        """Return softmax(-squared distance), (n, C)."""
        return softmax(-self._squared_distance(x), axis=1)

    def predict(self, x: Array) -> Array:
        """Return the class (n,) of the nearest prototype."""
        nearest = self._squared_distance(x).argmin(axis=1)
        return self.classes_[nearest]

    def _squared_distance(self, x: Array) -> Floats:
        x = predict_array(self, x)
        rows = centred_directions(x.astype(np.float64, copy=False), self.mean_)
        square = np.square(rows).sum(axis=1)[:, None] + np.square(self.prototypes_).sum(axis=1)
        return np.maximum(square - 2 * rows @ self.prototypes_.T, 0)


def centred_directions(x: Floats, mean: Floats) -> Floats:
    """Return `x` less `mean`, each row (n, D) scaled to length 1; a row equal to the mean stays zero."""
    moved = x - mean
    length = np.sqrt(np.square(moved).sum(axis=1, keepdims=True))
    return moved / np.where(length > 0, length, 1)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Episodes:
    """What few labels give, over many draws of the support set.

    Attributes:
        table: one row per (shots, metric): draws, support (rows drawn), n_test, mean, sem (standard error of the mean
            over draws), low and high (the range that holds `level` of the draws), q25, median, q75, and vote: the
            metric of the majority vote over all draws (THUNDER's figure, which hides the spread of one draw).
        scores: shots -> metric -> (draws,).
        votes: shots -> (n_test, C) how many draws chose each class.
        classes: (C,) the classes, sorted.
        level: share of draws between low and high.
    """

    table: pd.DataFrame
    scores: dict[int, dict[str, Floats]]
    votes: dict[int, Indices]
    classes: Array
    level: float

    def to_dict(self) -> dict[str, Any]:
        """Return the table and its settings as plain values."""
        return {"level": self.level, "classes": self.classes.tolist(), "rows": records(self.table)}


def episodes(
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    draws: int = 1000,
    groups: Array | None = None,
    centre: Centre = "support",
    level: float = 0.95,
    seed: int = 0,
) -> Episodes:
    """Return SimpleShot's scores on a test set, for support sets of K rows a class drawn `draws` times.

    Equals a PrototypeHead fitted on every support set, computed as matrix products over blocks of draws.

    Args:
        x: (n, D) features to draw support sets from.
        y: (n,) classes.
        x_test: (m, D) features, of other patients.
        y_test: (m,) classes; balanced accuracy and macro-F1 go over the classes present here.
        shots: rows a class in a support set.
        draws: support sets per number of shots.
        groups: (n,) clusters, usually patients: at most one row of each per class is drawn.
        centre: "support" subtracts the mean of the support set; "pool" the mean of all `x`, which needs no labels.
        level: share of draws between `low` and `high`.
        seed: of the draws.

    Raises:
        LabelError: a class with fewer rows (or groups) than shots, or a test class that was never trained.
        ValueError: shapes or settings that make no episode.
        NonFiniteError: NaN or infinity.
    """
    _check_settings(shots, draws, level)
    _check_arrays(x, y, x_test, y_test)
    classes, codes = encode_labels(y)
    test_codes = encode_test_labels(y_test, classes)
    units = np.arange(len(x)) if groups is None else np.unique(groups, return_inverse=True)[1]
    _check_shots(codes, units, classes, max(shots), rows_are_units=groups is None)
    pool_mean = x.mean(axis=0, dtype=np.float64)
    pool, test = x - pool_mean, x_test - pool_mean  # moving everything changes nothing but the rounding
    scores: dict[int, dict[str, Floats]] = {}
    votes: dict[int, Indices] = {}
    rows = []
    for count in shots:
        rng = np.random.default_rng([seed, count])
        votes[count] = np.zeros((len(test), len(classes)), np.int64)
        parts: list[dict[str, Floats]] = []
        for support in _supports(codes, units, len(classes), count, draws, rng):
            chosen = _classify(pool[support], test, centre)
            votes[count] += np.stack([(chosen == code).sum(axis=0) for code in range(len(classes))], axis=1)
            parts.append(label_scores(test_codes, chosen))
        scores[count] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        voted = label_scores(test_codes, votes[count].argmax(axis=1)[None])
        sizes = {"shots": count, "draws": draws, "support": count * len(classes), "n_test": len(test)}
        rows += [
            {**sizes, "metric": name, **_spread(values, level), "vote": float(voted[name][0])}
            for name, values in scores[count].items()
        ]
    return Episodes(table=pd.DataFrame(rows), scores=scores, votes=votes, classes=classes, level=level)


def _classify(support: Floats, test: Floats, centre: Centre) -> Indices:
    """Return the class index (b, m) of the nearest prototype for support sets (b, C, K, D)."""
    mean = support.mean(axis=(1, 2)) if centre == "support" else np.zeros((len(support), support.shape[-1]))
    moved = support - mean[:, None, None]
    length = np.sqrt(np.square(moved).sum(axis=-1, keepdims=True))
    prototypes = (moved / np.where(length > 0, length, 1)).mean(axis=2)
    draws, n_classes, dim = prototypes.shape
    along = (test @ prototypes.reshape(-1, dim).T).reshape(len(test), draws, n_classes)
    along -= np.einsum("bd,bcd->bc", mean, prototypes)
    square = np.square(test).sum(axis=1)[:, None] - 2 * test @ mean.T + np.square(mean).sum(axis=1)
    length = np.sqrt(np.maximum(square, 0))[..., None]  # of the centred test rows
    score = along / np.where(length > 0, length, 1) - np.square(prototypes).sum(axis=-1) / 2
    return score.argmax(axis=-1).T


def _supports(
    codes: Indices, units: Indices, n_classes: int, shots: int, draws: int, rng: np.random.Generator
) -> Iterator[Indices]:
    """Yield row indices (b, C, K) of support sets, at most one row of a unit per class and set."""
    members = [_by_unit(np.flatnonzero(codes == code), units) for code in range(n_classes)]
    for start in range(0, draws, DRAW_BLOCK):
        size = min(DRAW_BLOCK, draws - start)
        yield np.array([[_pick(*member, shots, rng) for member in members] for _ in range(size)])


def _by_unit(rows: Indices, units: Indices) -> tuple[Indices, Indices, Indices]:
    """Return rows in unit order, and where each unit's run starts and how long it is."""
    ordered = rows[np.argsort(units[rows], kind="stable")]
    _, first, size = np.unique(units[ordered], return_index=True, return_counts=True)
    return ordered, first, size


def _pick(ordered: Indices, first: Indices, size: Indices, shots: int, rng: np.random.Generator) -> Indices:
    """Return `shots` rows of different units: units equally likely, then a row of each."""
    unit = rng.choice(len(first), shots, replace=False)
    return ordered[first[unit] + (rng.random(shots) * size[unit]).astype(np.int64)]


def label_scores(truth: Indices, chosen: Indices) -> dict[str, Floats]:
    """Return balanced accuracy and macro-F1 (b,) of class indices `chosen` (b, m), over the classes in `truth` (m,)."""
    recalls, f1s = [], []
    for code in np.unique(truth):
        actual, called = truth == code, chosen == code
        hits = (called & actual).sum(axis=1)
        recalls.append(hits / actual.sum())
        f1s.append(2 * hits / (called.sum(axis=1) + actual.sum()))
    return {"balanced_accuracy": np.mean(recalls, axis=0), "macro_f1": np.mean(f1s, axis=0)}


def _spread(values: Floats, level: float) -> dict[str, float]:
    low, q25, median, q75, high = np.quantile(values, [(1 - level) / 2, 0.25, 0.5, 0.75, (1 + level) / 2])
    return {
        "mean": float(values.mean()),
        "sem": float(values.std(ddof=1) / np.sqrt(len(values))),
        "low": float(low),
        "q25": float(q25),
        "median": float(median),
        "q75": float(q75),
        "high": float(high),
    }


def _check_settings(shots: Sequence[int], draws: int, level: float) -> None:
    if not shots or min(shots) < 1:
        raise ValueError(f"shots is {tuple(shots)}; it needs at least one number, each 1 or more")
    if draws < 2 or not 0 < level < 1:
        raise ValueError(f"draws is {draws} and level {level}; a spread needs 2 or more draws and 0 < level < 1")


def _check_arrays(x: Array, y: Array, x_test: Array, y_test: Array) -> None:
    shapes = f"x {x.shape}, y {np.shape(y)}, x_test {x_test.shape}, y_test {np.shape(y_test)}"
    if x.ndim != 2 or x_test.ndim != 2 or x.shape[1] != x_test.shape[1] or not len(x_test):
        raise ValueError(f"{shapes}: features must be (n, D) and (m, D) with the same D")
    if len(x) != len(y) or len(x_test) != len(y_test):
        raise ValueError(f"{shapes}: every row needs one label")
    for name, rows in (("x", x), ("x_test", x_test)):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise NonFiniteError(f"{len(bad)} rows of {name} hold NaN or infinity, first row {bad[0]}; remove them")


def _check_shots(codes: Indices, units: Indices, classes: Array, shots: int, *, rows_are_units: bool) -> None:
    what = "rows" if rows_are_units else "groups"
    for code, name in enumerate(classes.tolist()):
        found = len(np.unique(units[codes == code]))
        if found < shots:
            raise LabelError(f"class {name!r} has {found} {what}, fewer than {shots} shots; lower shots or add labels")
