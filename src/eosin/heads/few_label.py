"""Few labels: SANDI's reference set, and which cells to have labelled next.

SANDI (Zhang et al.) compares a cell with labelled reference cells by the most similar pair of their sub-crops, and
grows the reference set by asking, class by predicted class, for the cells farthest from their references. Here the
sub-crops are features of a frozen encoder and the similarity is the cosine; the network of the paper is not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from eosin.errors import NonFiniteError
from eosin.heads.curves import records
from eosin.heads.labels import encode_labels, encode_test_labels, f1_per_class

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Similarities = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

BLOCK = 16_000_000  # similarities of crop pairs held at once


class SandiHead(ClassifierMixin, BaseEstimator):
    """The class of the labelled cell with the most similar sub-crop.

    Similarity of two cells = largest cosine over all pairs of their crops (it is symmetric, so SANDI's mean over both
    orders is the same number). Probabilities are softmax(similarity / temperature) over classes; they rank, they are
    not calibrated.

    Args:
        temperature: of the softmax; SANDI's contrastive loss uses 0.1.

    Attributes:
        classes_: the classes, sorted.
    """

    def __init__(self, *, temperature: float = 0.1) -> None:
        self.temperature = temperature

    def fit(self, x: Array, y: Array, *, groups: Array | None = None) -> Self:
        """Keep the reference cells: crops (n, crops, D), or (n, D) for one crop, and classes (n,).

        Raises:
            LabelError: one class only.
            NonFiniteError: NaN, infinity, or a crop of zeros.
            ValueError: shapes.
        """
        crops = crop_directions(x)
        if len(crops) != len(y):
            raise ValueError(f"{len(crops)} cells but {len(y)} labels")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        self.classes_, self._codes = encode_labels(y)
        self._references = crops
        self.n_features_in_ = crops.shape[2]
        return self

    def similarity(self, x: Array) -> Similarities:
        """Return the largest similarity (n, C) of each cell to the references of each class, -1 to 1."""
        check_is_fitted(self)
        crops = crop_directions(x)
        if crops.shape[2] != self.n_features_in_:
            raise ValueError(f"x has {crops.shape[2]} features; the head was fitted with {self.n_features_in_}")
        return _class_similarity(crops, self._references, self._codes, len(self.classes_))

    def predict_proba(self, x: Array) -> Floats:
        """Return softmax(similarity / temperature), (n, C)."""
        return softmax(self.similarity(x).astype(np.float64) / self.temperature, axis=1)

    def predict(self, x: Array) -> Array:
        """Return the class (n,) of the most similar reference; equal similarities go to the lower class."""
        return self.classes_[self.similarity(x).argmax(axis=1)]


def crop_directions(x: Array) -> npt.NDArray[np.float32]:
    """Return crops (n, crops, D) float32, each of length 1; (n, D) is taken as one crop a cell.

    Raises:
        NonFiniteError: NaN, infinity, or a crop of zeros.
        ValueError: another shape.
    """
    x = np.asarray(x)
    if x.ndim not in (2, 3) or not x.size:
        raise ValueError(f"cells have shape {x.shape}; expected (n, crops, D) or (n, D), not empty")
    crops = x.reshape(len(x), -1, x.shape[-1])
    length = np.sqrt(np.square(crops, dtype=np.float64).sum(axis=2, keepdims=True))
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)).all(axis=(1, 2)))
    if len(bad):
        raise NonFiniteError(
            f"{len(bad)} cells hold NaN, infinity or a crop of zeros, first cell {bad[0]}; remove them"
        )
    return (crops / length).astype(np.float32)


def crop_similarity(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> Similarities:
    """Return (n, m) largest cosines over the crop pairs of cells (n, crops, D) and (m, crops, D) of length 1."""
    out = np.empty((len(a), len(b)), np.float32)
    flat = b.reshape(-1, b.shape[2])
    step = max(1, BLOCK // (a.shape[1] * len(flat)))
    for start in range(0, len(a), step):
        part = a[start : start + step]
        pairs = part.reshape(-1, part.shape[2]) @ flat.T
        out[start : start + step] = pairs.reshape(len(part), a.shape[1], len(b), b.shape[1]).max(axis=(1, 3))
    return out


def _class_similarity(
    crops: npt.NDArray[np.float32], references: npt.NDArray[np.float32], codes: Indices, n_classes: int
) -> Similarities:
    """Return (n, C) largest similarities; -inf for a class without references."""
    out = np.full((len(crops), n_classes), -np.inf, np.float32)
    for code in np.unique(codes):
        out[:, code] = crop_similarity(crops, references[codes == code]).max(axis=1)
    return out


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Candidates:
    """What a selection rule may look at.

    Attributes:
        rows: (n,) the unlabelled cells' rows.
        similarity: (n, C) their largest similarity to the references of each class; -inf where a class has none.
        predicted: (n,) their predicted class index.
    """

    rows: Indices
    similarity: Similarities
    predicted: Indices


Select = Callable[[Candidates, int, np.random.Generator], Indices]


def farthest(candidates: Candidates, count: int, rng: np.random.Generator) -> Indices:
    """Return the rows least similar to their predicted class, the classes taking turns (SANDI's expansion)."""
    nearest = candidates.similarity.max(axis=1)
    order = np.lexsort((candidates.rows, nearest))
    turn = np.empty(len(order), np.int64)
    for code in np.unique(candidates.predicted):
        members = order[candidates.predicted[order] == code]
        turn[members] = np.arange(len(members))
    chosen = np.lexsort((candidates.rows, nearest, turn))[:count]
    return candidates.rows[chosen]


def at_random(candidates: Candidates, count: int, rng: np.random.Generator) -> Indices:
    """Return rows drawn at random: what a selection rule has to beat."""
    return rng.choice(candidates.rows, min(count, len(candidates.rows)), replace=False)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class LabelCurve:
    """Scores against the number of labelled cells.

    Attributes:
        table: one row per round: labels, classes_found, macro_f1, weighted_f1, n_test. A class not yet found counts
            with its F1 of 0.
        asked: (budget,) rows in the order in which they were labelled.
    """

    table: pd.DataFrame
    asked: Indices

    def to_dict(self) -> dict[str, Any]:
        """Return the rows and the labelled cells as plain values."""
        return {"rows": records(self.table), "asked": self.asked.tolist()}


def label_curve(
    x: Array,
    y: Array,
    *,
    x_test: Array,
    y_test: Array,
    select: Select = farthest,
    start: int = 10,
    step: int = 10,
    budget: int = 100,
    seed: int = 0,
) -> LabelCurve:
    """Return how scores on a test set grow as `select` chooses which cells of a pool get their label.

    The first `start` cells are drawn at random; every round then predicts the unlabelled cells from the references,
    asks for `step` labels and adds them. Labels of cells not asked for are never looked at.

    Args:
        x: (n, crops, D) features of the pool, or (n, D).
        y: (n,) classes, told only when asked for.
        x_test: (m, crops, D) features, of other patients.
        y_test: (m,) classes.
        select: (candidates, count, rng) -> up to `count` of `candidates.rows`.
        start: cells labelled at the beginning; the same for every rule under one seed.
        step: labels a round.
        budget: labels in all.
        seed: of the first draw and of the rule.

    Raises:
        LabelError: the pool holds one class, or the test set one that the pool lacks.
        ValueError: shapes, sizes, or a rule that answers with rows it was not offered.
    """
    pool, test = crop_directions(x), crop_directions(x_test)
    if len(pool) != len(y) or len(test) != len(y_test) or pool.shape[2] != test.shape[2]:
        raise ValueError(f"x {x.shape}, {len(y)} labels, x_test {x_test.shape}, {len(y_test)} labels do not fit")
    if not 1 <= start <= budget <= len(pool) or step < 1:
        raise ValueError(f"need 1 <= start ({start}) <= budget ({budget}) <= {len(pool)} cells and step ({step}) >= 1")
    classes, codes = encode_labels(y)
    test_codes = encode_test_labels(y_test, classes)
    first_rng, rng = (np.random.default_rng([seed, part]) for part in range(2))
    asked = first_rng.choice(len(pool), start, replace=False)
    new = asked
    near_pool = np.full((len(pool), len(classes)), -np.inf, np.float32)
    near_test = np.full((len(test), len(classes)), -np.inf, np.float32)
    rows = []
    while True:
        for near, crops in ((near_pool, pool), (near_test, test)):
            np.maximum(near, _class_similarity(crops, pool[new], codes[new], len(classes)), out=near)
        found = {"labels": len(asked), "classes_found": len(np.unique(codes[asked]))}
        rows.append({**found, **_f1(test_codes, near_test.argmax(axis=1), len(classes))})
        if len(asked) >= budget:
            return LabelCurve(table=pd.DataFrame(rows), asked=asked)
        left = np.setdiff1d(np.arange(len(pool)), asked)
        near_left = near_pool[left]
        candidates = Candidates(rows=left, similarity=near_left, predicted=near_left.argmax(axis=1))
        new = _checked(select(candidates, min(step, budget - len(asked)), rng), left)
        asked = np.concatenate([asked, new])


def selection_curves(
    x: Array,
    y: Array,
    *,
    x_test: Array,
    y_test: Array,
    rules: Mapping[str, Select],
    seeds: Sequence[int] = range(20),
    **sizes: int,
) -> pd.DataFrame:
    """Return the tables of `label_curve` for every rule and seed, with columns rule and seed in front.

    Under one seed all rules begin with the same cells, so that they are compared in pairs. `sizes` are `start`, `step`
    and `budget`.
    """
    tables = []
    for name, rule in rules.items():
        for seed in seeds:
            curve = label_curve(x, y, x_test=x_test, y_test=y_test, select=rule, seed=seed, **sizes)
            tables.append(curve.table.assign(rule=name, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return table.set_index(["rule", "seed"]).reset_index()


def _f1(truth: Indices, called: Indices, n_classes: int) -> dict[str, float | int]:
    scores, size = f1_per_class(truth, called, n_classes), np.bincount(truth, minlength=n_classes)
    weighted = float(np.average(scores, weights=size))
    return {"macro_f1": float(scores[size > 0].mean()), "weighted_f1": weighted, "n_test": len(truth)}


def _checked(rows: Indices, offered: Indices) -> Indices:
    if not len(rows) or len(np.unique(rows)) != len(rows) or not np.isin(rows, offered).all():
        raise ValueError("the selection rule must answer with at least one of candidates.rows, none twice")
    return np.asarray(rows, np.int64)
