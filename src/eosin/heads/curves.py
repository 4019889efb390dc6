"""How many labelled patients does a head need? Scores against the share of patients it was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import roc_auc_score

from eosin.errors import CohortError, LabelError
from eosin.heads.labels import encode_labels, encode_test_labels, f1_per_class

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
FEW_SEEDS = 5


class Head(Protocol):
    """What a curve needs of a head."""

    classes_: Array

    def fit(self, x: Array, y: Array, *, groups: Array | None = None) -> Any:
        """Learn from features (n, D), classes (n,) and groups (n,)."""
        ...

    def predict_proba(self, x: Array) -> Array:
        """Return probabilities (n, C) in the order of `classes_`."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class LabelEfficiency:
    """Scores against the share of training patients.

    Attributes:
        table: one row per (fraction, seed): fraction asked, fraction_used, groups and n (patients and rows used),
            seed, n_test, test_groups, balanced_accuracy, macro_f1, auroc (one against the rest, unweighted mean; NaN
            when a class is missing from the test set).
        summary: one row per (fraction, metric): mean, sd, low and high (least and greatest over seeds), seeds, groups
            (median patients used), note.
        ratio25: one row per metric: the score at 25 % of patients over the score at 100 %, per seed; mean, sd, low,
            high, seeds, note. Empty when either fraction was not asked for.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    ratio25: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Return the three tables as lists of rows; NaN becomes None."""
        return {name: records(getattr(self, name)) for name in ("table", "summary", "ratio25")}


def label_efficiency(
    head_factory: Callable[[int], Head],
    x: Array,
    y: Array,
    groups: Array,
    *,
    test: Array,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = range(5),
    per_class: int = 1,
) -> LabelEfficiency:
    """Return test scores of heads trained on growing shares of the patients.

    For each seed the training patients get one order; every fraction takes a prefix of it, so that subsets are nested.
    The order keeps the classes in proportion and begins with patients that together hold every class, so that even
    1 % can be fitted; `fraction_used` says when that took more patients than asked.

    Args:
        head_factory: seed -> an unfitted head; called once per fraction and seed.
        x: (n, D) features, training and test rows together.
        y: (n,) classes.
        groups: (n,) the unit that is sampled, usually the patient.
        test: (m,) rows held out; no group may lie on both sides.
        fractions: shares of the training groups, above 0 and at most 1.
        seeds: one order of the groups each.
        per_class: groups of every class that even the smallest fraction holds; a head that chooses its settings on
            validation folds needs 2.

    Raises:
        CohortError: shapes, an empty side, or a group on both sides.
        LabelError: fewer than two classes, a class found only in the test rows, or in fewer groups than `per_class`.
        ValueError: fractions or seeds that make no curve.
    """
    if not fractions or min(fractions) <= 0 or max(fractions) > 1 or not seeds:
        raise ValueError(f"fractions {tuple(fractions)} must lie in (0, 1], seeds {tuple(seeds)} must not be empty")
    train, test = _sides(len(x), y, groups, test)
    unit_names, units = np.unique(groups[train], return_inverse=True)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        order, cover = group_order(y[train], units, seed=seed, per_class=per_class)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        for fraction in sorted(set(fractions)):
            count = max(cover, math.floor(fraction * len(unit_names) + 0.5))
            used = train[rank[units] < count]
            head = head_factory(seed)
            head.fit(x[used], y[used], groups=groups[used])
            sizes = {"fraction": fraction, "fraction_used": count / len(unit_names), "groups": count, "n": len(used)}
            held = {"seed": seed, "n_test": len(test), "test_groups": len(np.unique(groups[test]))}
            rows.append({**sizes, **held, **probability_scores(y[test], head.predict_proba(x[test]), head.classes_)})
    table = pd.DataFrame(rows).sort_values(["fraction", "seed"], ignore_index=True)
    return LabelEfficiency(table=table, summary=_summary(table), ratio25=_ratio25(table))


METRICS = ("balanced_accuracy", "macro_f1", "auroc")


def probability_scores(y: Array, probability: Array, classes: Array) -> dict[str, float]:
    """Return balanced accuracy, macro-F1 (both over classes present in `y`) and AUROC of probabilities (n, C).

    AUROC is NaN when `y` lacks a class. `classes` (C,) are sorted and hold every label of `y`.
    """
    truth, called = np.searchsorted(classes, y), np.argmax(probability, axis=1)
    present = np.unique(truth)
    f1 = f1_per_class(truth, called, len(classes))[present].mean()
    recalls = [float(np.mean(called[truth == code] == code)) for code in present]
    auroc = math.nan
    if len(present) == len(classes):
        columns = [1] if len(classes) == 2 else range(len(classes))
        auroc = float(np.mean([roc_auc_score(truth == at, probability[:, at]) for at in columns]))
    return {"balanced_accuracy": float(np.mean(recalls)), "macro_f1": float(f1), "auroc": auroc}


def group_order(y: Array, units: Array, *, seed: int, per_class: int = 1) -> tuple[Indices, int]:
    """Return an order of the groups with classes in proportion, and how many lead groups hold every class.

    A group counts for its rarest class (by groups that hold it). Groups of a class are shuffled and spread evenly over
    the order; then, for each class that `per_class` lead groups do not hold yet, its first groups move to the front.

    Args:
        y: (n,) classes.
        units: (n,) group numbers 0 to G - 1.
        seed: of the shuffle.
        per_class: lead groups that hold each class.

    Raises:
        LabelError: a class lies in fewer groups than `per_class`.
    """
    rng = np.random.default_rng(seed)
    classes, codes = np.unique(y, return_inverse=True)
    holds = np.zeros((int(units.max()) + 1, len(classes)), bool)
    holds[units, codes] = True
    support = holds.sum(axis=0)
    if support.min() < per_class:
        scarce = classes[support.argmin()].item()
        raise LabelError(f"class {scarce!r} lies in {support.min()} groups, fewer than per_class ({per_class})")
    stratum = np.where(holds, support, support.max() + 1).argmin(axis=1)
    place = np.empty(len(holds))
    for code in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == code))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(place, kind="stable")
    lead: list[int] = []
    for code in np.argsort(support, kind="stable"):
        free = order[holds[order, code] & ~np.isin(order, lead)]
        lead += free[: max(0, per_class - int(holds[lead, code].sum()))].tolist()
    rest = order[~np.isin(order, lead)]
    return np.concatenate([np.array(lead, np.int64), rest]), len(lead)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as plain Python values; NaN becomes None."""

    def plain(value: Any) -> Any:
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return [{str(name): plain(value) for name, value in row.items()} for row in table.to_dict("records")]


def _sides(n: int, y: Array, groups: Array, test: Array) -> tuple[Indices, Indices]:
    """Return training and test rows, checked."""
    if len(y) != n or len(groups) != n:
        raise CohortError(f"{n} rows of features, {len(y)} labels, {len(groups)} groups; every row needs one of each")
    held = np.zeros(n, bool)
    held[test] = True
    train, test = np.flatnonzero(~held), np.flatnonzero(held)
    if not len(train) or not len(test):
        raise CohortError(f"{len(train)} training and {len(test)} test rows; both sides need some")
    shared = np.intersect1d(groups[train], groups[test])
    if len(shared):
        raise CohortError(
            f"{len(shared)} groups lie in training and test, first {shared.tolist()[0]!r}; split by group"
        )
    classes, _ = encode_labels(y[train])
    encode_test_labels(y[test], classes)
    return train, test


def _spread(values: Sequence[float] | Floats) -> dict[str, Any]:
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return {"mean": math.nan, "sd": math.nan, "low": math.nan, "high": math.nan, "seeds": 0, "note": "undefined"}
    return {
        "mean": float(finite.mean()),
        "sd": float(finite.std(ddof=1)) if len(finite) > 1 else math.nan,
        "low": float(finite.min()),
        "high": float(finite.max()),
        "seeds": len(finite),
        "note": f"fewer than {FEW_SEEDS} seeds" if len(finite) < FEW_SEEDS else "",
    }


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for fraction, part in table.groupby("fraction"):
        for metric in METRICS:
            spread = _spread(part[metric].to_numpy())
            rows.append({"fraction": fraction, "groups": float(part["groups"].median()), "metric": metric, **spread})
    return pd.DataFrame(rows)


def _ratio25(table: pd.DataFrame) -> pd.DataFrame:
    few, whole = (table[table["fraction"] == fraction].set_index("seed") for fraction in (0.25, 1.0))
    if few.empty or whole.empty:
        return pd.DataFrame({name: [] for name in ("metric", *_spread([]))})
    return pd.DataFrame([{"metric": name, **_spread((few[name] / whole[name]).to_numpy())} for name in METRICS])
