"""A head fitted on features: settings and threshold chosen on training rows only, kept without pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from eosin.cohort.splits import grouped_kfold
from eosin.errors import CohortError, LabelError, StoreError, closest
from eosin.evaluation.metrics import choose_threshold
from eosin.features.writer import write_durably
from eosin.heads import KnnHead, LinearProbe, PrototypeHead, SgdProbe
from eosin.heads.logistic import logistic_path
from eosin.tasks.predictions import KNOWN_PAIRS
from eosin.tasks.samples import npz_bytes

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Pairs = list[tuple[Array, Array]]

HEADS = ("linear", "knn", "prototype", "sgd")
INNER_FOLDS = 3
# Penalties weaker than these never won on frozen features, and converge slowly where classes are separable.
C_GRID = tuple(10.0**power for power in range(-5, 2))
MANY_CLASS_GRID = (1e-4, 1e-2, 1.0)
FORMAT = "eosin.probe-model/1"
# What each head learned, as attributes; the array names of the file.
_LEARNED = {
    "linear": ("coef_", "intercept_"),
    "sgd": ("coef_", "intercept_"),
    "prototype": ("mean_", "prototypes_"),
    "knn": ("_x", "_codes"),
}


class Fitted(Protocol):
    """A fitted head."""

    classes_: Array

    def predict_proba(self, x: Array) -> Array:
        """Return probabilities (n, C)."""
        ...


def check_head(name: str) -> None:
    """Raise `CohortError` unless there is such a head."""
    if name not in HEADS:
        raise CohortError(f"no head is called {name!r}; closest: {closest(name, HEADS)}")


def inner_splits(y: Array, groups: Array, *, seed: int = 0) -> Pairs:
    """Return up to three (train, validation) row pairs, stratified, no group on both sides, every row validated once.

    Raises:
        LabelError: a class lies in one group only.
    """
    fewest = min(len(np.unique(groups[y == code])) for code in np.unique(y))
    if fewest < 2:
        raise LabelError(
            f"a class lies in {fewest} patient of the {len(np.unique(groups))} that train, so that settings and "
            "threshold cannot be chosen on other patients; needed at least 2"
        )
    splits = grouped_kfold(y, groups=groups, folds=min(INNER_FOLDS, fewest), seed=seed)
    return [(split.train, split.test) for split in splits]


def fit_head(name: str, x: Array, y: Array, pairs: Pairs, *, seed: int = 0) -> Fitted:
    """Return a head fitted on all rows, its settings chosen on the validation parts of `pairs`.

    The linear head chooses C by log loss: it is proper, so that scores stay probabilities, and the threshold is chosen
    apart. The SGD head stops early on the first pair, as its protocol says.
    """
    check_head(name)
    if name == "knn":
        return KnnHead().fit(x, y, splits=pairs)
    if name == "prototype":
        return PrototypeHead().fit(x, y)
    if name == "sgd":
        return SgdProbe(seed=seed).fit(x, y, split=pairs[0])
    if len(np.unique(y)) > 2:
        return LinearProbe(c_grid=MANY_CLASS_GRID, scoring="log_loss").fit(x, y, splits=pairs)
    return fit_linear(x, y, pairs)[0]


def fit_linear(x: Array, y: Array, pairs: Pairs) -> tuple[LinearProbe, Floats]:
    """Return the linear head for labels 0 and 1, and P(1) (n,) of each row by the fit, at the chosen C, without it.

    C is that of `C_GRID` with the least log loss over all validation rows; of equals, the strongest penalty.
    """
    scores = np.full((len(C_GRID), len(y)), np.nan)
    for train, val in pairs:
        path = logistic_path(x[train], y[train, None].astype(np.float64), C_GRID, link="sigmoid")
        scores[:, val] = path.coef[:, 0] @ x[val].T.astype(np.float64) + path.intercept
    loss = np.logaddexp(0, np.where(y == 1, -scores, scores)).mean(axis=1)
    best = int(loss.argmin())
    return LinearProbe(c_grid=(C_GRID[best],)).fit(x, y), expit(scores[best])


def refit(head: Fitted, x: Array, y: Array) -> Fitted:
    """Return a head of the same kind and chosen settings, fitted on other rows."""
    if isinstance(head, KnnHead):
        return KnnHead(k_grid=(head.k_,)).fit(x, y)
    if isinstance(head, SgdProbe):
        return SgdProbe(steps=head.best_step_, seed=head.seed).fit(x, y)
    if isinstance(head, LinearProbe):
        return LinearProbe(c_grid=(float(head.c_),)).fit(x, y)
    return PrototypeHead().fit(x, y)


def chosen(head: Fitted) -> str:
    """Return the settings that were chosen, in words."""
    if isinstance(head, LinearProbe):
        return f"C {head.c_:g}"
    if isinstance(head, KnnHead):
        return f"k {head.k_}"
    return f"{head.best_step_} steps" if isinstance(head, SgdProbe) else ""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Nested:
    """A head, and the threshold that predictions for training patients it had not seen recommend.

    Attributes:
        head: fitted on all training rows.
        threshold: best balanced accuracy on `scores`.
        scores: (n,) P(positive) of each training row by a head of the same settings fitted without its patient.
    """

    head: Fitted
    threshold: float
    scores: Floats


def fit_nested(name: str, x: Array, y: Array, groups: Array, *, seed: int = 0) -> Nested:
    """Return a head on training rows, with all choices made inside them.

    Args:
        name: one of `HEADS`.
        x: (n, D) features.
        y: (n,) 0 or 1.
        groups: (n,) patients.
        seed: of the inner folds and of the head.

    Raises:
        LabelError: one class, or a class in one patient only.
    """
    check_head(name)
    pairs = inner_splits(y, groups, seed=seed)
    if name == "linear":
        probe, scores = fit_linear(x, y, pairs)
        return Nested(head=probe, threshold=choose_threshold(y, scores), scores=scores)
    head = fit_head(name, x, y, pairs, seed=seed)
    scores = np.full(len(y), np.nan)
    for train, val in pairs:
        scores[val] = refit(head, x[train], y[train]).predict_proba(x[val])[:, 1]
    return Nested(head=head, threshold=choose_threshold(y, scores), scores=scores)


def positive_class(classes: Sequence[str], positive: str | None, label: str) -> str:
    """Return the class that counts as positive; all others are negative.

    Raises:
        LabelError: it is not one of them, or nobody said which one and the names do not say it themselves.
    """
    if positive is None:
        lower = {name.lower(): name for name in classes}
        for negative, found in KNOWN_PAIRS:
            if len(classes) == 2 and set(lower) == {negative, found}:
                return lower[found]
        raise LabelError(f"{label} is one of {', '.join(classes)}; say which one is looked for: --positive VALUE")
    if positive not in classes:
        raise LabelError(f"{label} is never {positive!r}; closest: {closest(positive, classes)}")
    return positive


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Probe:
    """A fitted head with what it needs to be used on other features.

    Attributes:
        kind: one of `HEADS`.
        head: the fitted estimator; classes 0 and 1.
        encoder: what made the features it was fitted on.
        label: column it was fitted for.
        classes: values of that column.
        positive: the one whose probability `scores` returns.
        threshold: operating point, chosen on out-of-fold predictions of the training rows.
        groups: (g,) patients it was fitted on.
        n: rows it was fitted on.
    """

    kind: str
    head: Fitted
    encoder: dict[str, Any]
    label: str
    classes: tuple[str, ...]
    positive: str
    threshold: float
    groups: npt.NDArray[np.str_]
    n: int

    @property
    def dim(self) -> int:
        """Length D of a feature vector."""
        return int(getattr(self.head, "n_features_in_"))  # noqa: B009 - scikit-learn sets it at run time

    def scores(self, x: Array) -> Floats:
        """Return P(positive) (n,) of features (n, D)."""
        return np.asarray(self.head.predict_proba(x)[:, 1], dtype=np.float64)

    def save(self, path: Path | str) -> None:
        """Write the probe as .npz: arrays, and one JSON text for the rest."""
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "settings": chosen(self.head),
            "parameters": {
                name: _json(value) for name, value in vars(self.head).items() if name in ("c_", "k_", "best_step_")
            },
            "encoder": self.encoder,
            "label": self.label,
            "classes": list(self.classes),
            "positive": self.positive,
            "threshold": self.threshold,
            "n": self.n,
            "dim": self.dim,
        }
        arrays = {name.strip("_"): getattr(self.head, name) for name in _LEARNED[self.kind]}
        text = np.array(json.dumps(about, ensure_ascii=False, default=str))
        write_durably(Path(path), npz_bytes({**arrays, "groups": self.groups, "about": text}))

    @classmethod
    def load(cls, path: Path | str) -> Probe:
        """Return the probe that `save` wrote; nothing in the file is executed.

        Raises:
            StoreError: no such file, or something else than a probe.
        """
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                if about["format"] != FORMAT:
                    raise ValueError(f"format {about['format']!r}")
                arrays = {name: file[name.strip("_")] for name in _LEARNED[about["kind"]]}
                groups = file["groups"]
            head = _restored(about["kind"], arrays, about["parameters"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise StoreError(f"{path} is not a probe that eosin saved ({error})") from error
        return cls(
            kind=about["kind"],
            head=head,
            encoder=about["encoder"],
            label=about["label"],
            classes=tuple(about["classes"]),
            positive=about["positive"],
            threshold=float(about["threshold"]),
            groups=groups,
            n=int(about["n"]),
        )


def _json(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _restored(kind: str, arrays: dict[str, Array], parameters: dict[str, Any]) -> Fitted:
    """Return the head of these learned arrays."""
    if kind == "knn":
        return KnnHead(k_grid=(int(parameters["k_"]),)).fit(arrays["_x"], arrays["_codes"])
    makers = {"linear": LinearProbe, "sgd": SgdProbe, "prototype": PrototypeHead}
    head = makers[kind]()
    learned = {
        **arrays,
        **parameters,
        "classes_": np.arange(2),
        "n_features_in_": next(iter(arrays.values())).shape[-1],
    }
    if kind == "linear":
        learned["_several"] = False
    for name, value in learned.items():
        setattr(head, name, value)
    return head
