"""Splits of a cohort that never cut a patient in two, and the file that pins them.

Each function returns a list of `Split`. What a split cannot be (a class in too few patients, a
patient on both sides) raises, naming the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.cohort.balance import assign_groups, class_counts
from eosin.cohort.reading import row_phrase
from eosin.cohort.table import Cohort
from eosin.errors import CohortError, LabelError

Rows = npt.NDArray[np.int64]
_PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "tune", "tuning", "dev"),
    "test": ("test", "testing"),
    "unused": ("unused", "none", "exclude", "excluded"),
}
_RESTARTS = 64


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Split:
    """Positions of the rows to train on, to choose settings on and to test on.

    Attributes:
        name: e.g. "fold 1" or "site UMC Utrecht".
        train, val, test: sorted row positions (k,), disjoint; val may be empty.
        note: what was left out and why, "" when nothing was.
    """

    name: str
    train: Rows
    val: Rows
    test: Rows
    note: str = ""


def grouped_kfold(
    data: Cohort | npt.ArrayLike,
    *,
    label: str | None = None,
    groups: npt.ArrayLike | None = None,
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    val: float = 0.0,
) -> list[Split]:
    """Return ``folds * repeats`` splits: stratified by class, whole patients only.

    Args:
        data: a cohort (with `label`), or labels (n,) (with `groups`).
        label: label column of the cohort.
        groups: (n,) patient of each row; for a cohort `Cohort.group_key` is the default.
        folds: parts; each is the test part once a repeat.
        repeats: times everything is laid out anew.
        seed: of the layout; the same seed gives the same splits.
        val: share of the rows that are not tested to set aside for validation, 0 for none.

    Raises:
        LabelError: a class lies in fewer patients than there are folds.
        CohortError: shapes that do not fit, or fewer than two folds.
    """
    y, group, names = _labels_and_groups(data, label, groups)
    if folds < 2 or repeats < 1:
        raise CohortError(f"{folds} folds, {repeats} repeats: at least 2 folds and 1 repeat are needed")
    counts = class_counts(y, group)
    _check_enough(counts, names, folds, what="patients")
    splits = []
    for repeat in range(repeats):
        rng = np.random.default_rng((seed, repeat))
        part = assign_groups(counts, np.full(folds, 1 / folds), rng=rng)
        lead = f"repeat {repeat + 1}, " if repeats > 1 else ""
        splits += [
            _with_val(f"{lead}fold {fold + 1}", part[group] != fold, part[group] == fold, y, group, val=val, rng=rng)
            for fold in range(folds)
        ]
    for split in splits:
        _check_classes(split, y, names)
        check_split(split, group)
    return splits


def preserved_site(
    cohort: Cohort,
    *,
    label: str,
    column: str = "site",
    folds: int = 3,
    seed: int = 0,
    val: float = 0.0,
) -> list[Split]:
    """Return k folds of whole sites whose class shares are as equal as whole sites allow.

    A model cannot be rewarded for knowing the site's stain when no site is in two folds: Howard
    et al. 2021, Nat Commun 12:4423, who lay sites out by quadratic programming. Here the same
    squared deviation is searched by many restarts of moves and swaps.

    Args:
        cohort: the table.
        label: label column to balance.
        column: what counts as a site.
        folds: parts, at most the number of sites.
        seed: of the search.
        val: share of the training rows to set aside for validation, whole sites again.

    Raises:
        LabelError: a class is found at fewer sites than there are folds.
        CohortError: a patient at two sites, too few folds or no such column.
    """
    y, group, names = _labels_and_groups(cohort, label, None)
    site = cohort.site(column)
    _check_nested(cohort.group_key(), site, column)
    if folds < 2:
        raise CohortError(f"{folds} folds: at least 2 are needed")
    codes = np.unique(site, return_inverse=True)[1]
    counts = class_counts(y, codes)
    _check_enough(counts, names, folds, what=f"levels of {column!r}")
    rng = np.random.default_rng(seed)
    part = assign_groups(counts, np.full(folds, 1 / folds), rng=rng, restarts=_RESTARTS, spread=0.01)[codes]
    splits = [
        _with_val(f"sites {fold + 1}", part != fold, part == fold, y, codes, val=val, rng=rng) for fold in range(folds)
    ]
    for split in splits:
        _check_classes(split, y, names)
        check_split(split, group)
    return splits


def leave_one_site_out(
    cohort: Cohort,
    *,
    label: str | None = None,
    column: str = "site",
    shared: Literal["raise", "drop"] = "raise",
    val: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """Return one split a site, in sorted order: that site is tested, the others train.

    Args:
        cohort: the table.
        label: label column; given, the training part must hold every class and `val` is stratified.
        column: what counts as a site, e.g. ``scanner``.
        shared: what to do with a patient at two sites: raise, or drop their training rows.
        val: share of the training rows to set aside for validation, whole patients.
        seed: of the validation part.

    Raises:
        CohortError: one site only, missing sites, or a patient at two sites.
        LabelError: without this site a class is not left to train on.
    """
    site = cohort.site(column)
    sites = np.unique(site)
    if len(sites) < 2:
        raise CohortError(f"{cohort.source}: {column!r} is {sites[0]!r} in all rows; two are needed to leave one out")
    return [
        _by_mask(cohort, f"{column} {name}", site == name, label=label, shared=shared, val=val, seed=seed)
        for name in sites.tolist()
    ]


def temporal(
    cohort: Cohort,
    *,
    until: str,
    label: str | None = None,
    shared: Literal["raise", "drop"] = "raise",
    val: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """Return one split: dates up to and including the day `until` train, later ones are tested.

    Args:
        cohort: the table; every row needs a ``date``.
        until: last training day, e.g. "2020-12-31".
        label: as in `leave_one_site_out`.
        shared: what to do with a patient seen before and after: raise, or drop their later rows.
        val: share of the training rows to set aside for validation, whole patients.
        seed: of the validation part.

    Raises:
        CohortError: missing dates, nothing on one side, or a patient on both.
    """
    cohort.values("date")
    try:
        last = pd.Timestamp(until)
    except ValueError as error:
        raise CohortError(f"until: {until!r} is not a date such as 2020-12-31") from error
    later = (cohort.table[cohort.column("date")].dt.normalize() > last).to_numpy()
    name = f"until {str(last)[:10]}"
    return [_by_mask(cohort, name, later, label=label, shared=shared, val=val, seed=seed, keep="train")]


def external(
    cohort: Cohort,
    *,
    column: str,
    value: str | Sequence[str],
    label: str | None = None,
    shared: Literal["raise", "drop"] = "raise",
    val: float = 0.0,
    seed: int = 0,
) -> list[Split]:
    """Return one split: rows whose `column` is `value` (or one of several) are tested, the others train.

    `label`, `shared` (dropping training rows), `val` and `seed` are as in `leave_one_site_out`.

    Raises:
        CohortError: the value does not occur, nothing is left to train on, or a shared patient.
    """
    found = cohort.values(column)
    wanted = [value] if isinstance(value, str) else list(value)
    for one in wanted:
        if one not in found:
            raise CohortError(f"{cohort.source}: {column!r} is never {one!r}; it is {', '.join(np.unique(found)[:10])}")
    name = f"{column} {', '.join(wanted)}"
    return [_by_mask(cohort, name, np.isin(found, wanted), label=label, shared=shared, val=val, seed=seed)]


def from_column(cohort: Cohort, column: str = "split") -> list[Split]:
    """Return the one split that a column spells out: train, val and test (or usual words for them).

    Rows marked unused, none or excluded are left out.

    Raises:
        CohortError: another word, an empty cell, no train or no test rows, or a cut patient.
    """
    found = np.char.lower(cohort.values(column))
    meaning = {word: part for part, words in _PARTS.items() for word in words}
    odd = [at for at, word in enumerate(found.tolist()) if word not in meaning]
    if odd:
        raise CohortError(
            f"{cohort.source}, {row_phrase(cohort.table.index[odd])}: {column} {str(found[odd[0]])!r} is none of "
            f"{', '.join(word for words in _PARTS.values() for word in words)}"
        )
    part = np.array([meaning[word] for word in found.tolist()])
    unused = int((part == "unused").sum())
    split = Split(
        name=column,
        train=np.flatnonzero(part == "train"),
        val=np.flatnonzero(part == "val"),
        test=np.flatnonzero(part == "test"),
        note=f"{unused} rows are marked as unused" if unused else "",
    )
    check_split(split, cohort.group_key())
    return [split]


def check_split(split: Split, groups: npt.ArrayLike) -> None:
    """Raise unless the parts are disjoint, in range, and no patient is in two of them.

    Args:
        split: the split.
        groups: (n,) patient of each row.

    Raises:
        CohortError: what is wrong, naming up to three patients.
    """
    group = np.asarray(groups)
    parts = {"train": split.train, "val": split.val, "test": split.test}
    for name in ("train", "test"):
        if not len(parts[name]):
            raise CohortError(f"split {split.name!r}: the {name} part is empty")
    every = np.concatenate(list(parts.values()))
    if every.min() < 0 or every.max() >= len(group):
        raise CohortError(f"split {split.name!r}: row positions {every.min()}..{every.max()} for {len(group)} rows")
    if len(np.unique(every)) != len(every):
        raise CohortError(f"split {split.name!r}: {len(every) - len(np.unique(every))} rows are in two parts")
    shared = shared_groups(split, group)
    if shared:
        shown = "; ".join(f"{who} in {' and '.join(where)}" for who, where in list(shared.items())[:3])
        raise CohortError(
            f"split {split.name!r}: {len(shared)} patients are in two parts ({shown}); "
            "move each patient's rows to one part"
        )


def shared_groups(split: Split, groups: npt.ArrayLike) -> dict[str, list[str]]:
    """Return the groups that occur in more than one part of `split`, with those parts."""
    group = np.asarray(groups)
    where: dict[str, list[str]] = {}
    for name in ("train", "val", "test"):
        for one in np.unique(group[getattr(split, name)]).tolist():
            where.setdefault(str(one), []).append(name)
    return {one: names for one, names in where.items() if len(names) > 1}


def _labels_and_groups(
    data: Cohort | npt.ArrayLike, label: str | None, groups: npt.ArrayLike | None
) -> tuple[Rows, Rows, tuple[str, ...]]:
    """Return class codes (n,), group codes (n,) and class names."""
    if isinstance(data, Cohort):
        if label is None:
            raise CohortError("label: say which column of the cohort to stratify by")
        y, names = data.labels(label)
        keys = data.group_key() if groups is None else np.asarray(groups)
    else:
        if groups is None:
            raise CohortError("groups: labels without a cohort need the patient of each row")
        classes, y = np.unique(np.asarray(data), return_inverse=True)
        names, keys = tuple(map(str, classes.tolist())), np.asarray(groups)
        if len(names) < 2:
            raise LabelError(f"the label has {len(names)} class{'es' if not names else ''}; two are needed")
    if y.ndim != 1 or keys.shape != y.shape:
        raise CohortError(f"labels of shape {y.shape} and groups of shape {keys.shape}; both must be (n,)")
    return y.astype(np.int64), np.unique(keys, return_inverse=True)[1].astype(np.int64), names


def _check_enough(counts: npt.NDArray[np.float64], names: Sequence[str], needed: int, *, what: str) -> None:
    held = (counts > 0).sum(axis=0)
    at = int(np.argmin(held))
    if held[at] < needed:
        listed = ", ".join(f"{name!r} in {n}" for name, n in zip(names, held.tolist(), strict=True))
        raise LabelError(
            f"class {names[at]!r} lies in {held[at]} {what}, {needed} parts need at least {needed} "
            f"({listed}; {len(counts)} {what} in all); "
            + (f"use at most {held[at]} folds" if held[at] > 1 else "this class cannot be tested by folds")
        )


def _check_classes(split: Split, y: Rows, names: Sequence[str]) -> None:
    for part in ("train", "val", "test"):
        rows = getattr(split, part)
        lost = np.setdiff1d(np.arange(len(names)), y[rows]) if len(rows) else np.zeros(0, int)
        if len(lost):
            raise LabelError(
                f"split {split.name!r}: no row of class {names[lost[0]]!r} in {part} ({len(rows)} rows); "
                "that class lies in too few patients or sites for this layout: use fewer folds or less validation"
            )


def _check_nested(group: npt.NDArray[np.str_], site: npt.NDArray[np.str_], column: str) -> None:
    pairs = np.unique(np.stack([group, site], axis=1), axis=0)
    names, count = np.unique(pairs[:, 0], return_counts=True)
    twice = names[count > 1].tolist()
    if len(twice):
        raise CohortError(
            f"{len(twice)} patients have more than one {column!r} ({', '.join(twice[:3])}); "
            "whole sites cannot be kept apart: correct the table, or take these patients out"
        )


def _with_val(
    name: str,
    train: npt.NDArray[np.bool_],
    test: npt.NDArray[np.bool_],
    y: Rows,
    group: Rows,
    *,
    val: float,
    rng: np.random.Generator,
    note: str = "",
) -> Split:
    """Return the split of two masks (n,), a share `val` of train set aside by whole groups."""
    if not 0 <= val < 1:
        raise CohortError(f"val is {val}; it is a share of the training rows, 0 to below 1")
    rows, aside = np.flatnonzero(train), np.zeros(0, np.int64)
    if val > 0:
        present = np.unique(y[rows], return_inverse=True)[1]
        codes = np.unique(group[rows], return_inverse=True)[1]
        if codes.max() < 1:
            raise CohortError(
                f"split {name!r}: all training rows are of one patient or site; none can be set aside for validation"
            )
        part = assign_groups(class_counts(present, codes), np.array([1 - val, val]), rng=rng, restarts=4)[codes]
        rows, aside = rows[part == 0], rows[part == 1]
        if not len(rows) or not len(aside):
            raise CohortError(f"split {name!r}: val {val} leaves {len(rows)} training and {len(aside)} validation rows")
    return Split(name=name, train=rows, val=aside, test=np.flatnonzero(test), note=note)


def _by_mask(
    cohort: Cohort,
    name: str,
    test: npt.NDArray[np.bool_],
    *,
    label: str | None,
    shared: Literal["raise", "drop"],
    val: float,
    seed: int,
    keep: Literal["train", "test"] = "test",
) -> Split:
    """Return the split with `test` (n,) against the rest; patients on both sides raise or stay on the side `keep`."""
    group = np.unique(cohort.group_key(), return_inverse=True)[1].astype(np.int64)
    train, note = ~test, ""
    both = np.isin(group, np.intersect1d(group[train], group[test]))
    if shared == "drop" and both.any():
        gone = both & (train if keep == "test" else test)
        train, test = train & ~gone, test & ~gone
        note = f"{int(gone.sum())} rows of {len(np.unique(group[gone]))} patients on both sides are left out"
    for part, mask in (("train", train), ("test", test)):
        if not mask.any():
            raise CohortError(f"split {name!r}: the {part} part is empty")
    y, names = cohort.labels(label) if label is not None else (np.zeros(len(cohort), np.int64), ("",))
    split = _with_val(name, train, test, y, group, val=val, rng=np.random.default_rng(seed), note=note)
    check_split(split, cohort.group_key())
    for part in (split.train, split.val):
        lost = [names[code] for code in np.setdiff1d(np.arange(len(names)), y[part])] if len(part) else []
        if lost:
            raise LabelError(f"split {name!r}: no row of class {lost[0]!r} is left to train or choose settings on")
    return split
