"""Folds of cells: whole slides or patients, stratified by class; or one domain left out at a time.

Each fold has three parts that share no slide: cells to train on, cells that decide when to stop, and cells that are
predicted once, out of fold. The threshold and the temperature come from those predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eosin.cohort import Split, check_split, grouped_kfold
from eosin.errors import CohortError, LabelError
from eosin.finetune.cells import CellTable
from eosin.finetune.recipe import FinetuneConfig

Rows = npt.NDArray[np.int64]
CLASS_NAMES = ("normal", "atypical")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Fold:
    """One fold: row numbers of a table of cells.

    Attributes:
        name: "fold 1", or "scanner Aperio CS2".
        train: (k,) rows to train on.
        stop: rows that decide when to stop.
        test: rows that are predicted out of fold.
        note: what the reader should know.
    """

    name: str
    train: Rows
    stop: Rows
    test: Rows
    note: str = ""


def plan_folds(cells: CellTable, config: FinetuneConfig) -> tuple[Fold, ...]:
    """Return the folds of a recipe, the same for the same cells and seed.

    Args:
        cells: all cells that may be trained on.
        config: `folds` or `leave_out`, `stop_share` and `seed`.

    Raises:
        LabelError: a class is missing, or lies in too few slides for its parts.
        CohortError: one domain only, cells without it, or a slide in two parts.
    """
    missing = [name for code, name in enumerate(CLASS_NAMES) if not (cells.label == code).any()]
    if missing:
        raise LabelError(f"no cell of {len(cells)} is {missing[0]}; both classes are needed to train")
    splits = _left_out(cells, config.leave_out) if config.leave_out else _grouped(cells, config)
    return tuple(_with_stop(cells, split, config) for split in splits)


def _grouped(cells: CellTable, config: FinetuneConfig) -> list[Split]:
    names = np.array(CLASS_NAMES)[cells.label]
    try:
        return grouped_kfold(names, groups=cells.group_key(), folds=config.folds, seed=config.seed)
    except LabelError as error:
        raise LabelError(f"{config.folds} folds of whole slides cannot be laid out: {error}") from error


def _left_out(cells: CellTable, field: str) -> list[Split]:
    """Return a split for each value of a field, which is tested while the others train."""
    values = getattr(cells, field)
    if (values == "").any():
        raise CohortError(
            f"{int((values == '').sum())} of {len(cells)} cells have no {field}, so that it cannot be left out; fill "
            "the column, or leave out another"
        )
    levels = np.unique(values).tolist()
    if len(levels) < 2:
        raise CohortError(f"every cell has the {field} {levels[0]!r}; two are needed to leave one out")
    groups, splits = cells.group_key(), []
    for level in levels:
        test = values == level
        shared = np.isin(groups, groups[test]) & ~test
        notes = [f"{int(shared.sum())} cells of slides that are also tested are not trained on"] if shared.any() else []
        atypical = int(cells.label[test].sum())
        if atypical in (0, int(test.sum())):
            name = CLASS_NAMES[int(atypical > 0)]
            notes.append(f"only {name} cells: no balanced accuracy or AUROC of its own")
        splits.append(
            Split(
                name=f"{field} {level}",
                train=np.flatnonzero(~test & ~shared),
                val=np.zeros(0, dtype=np.int64),
                test=np.flatnonzero(test),
                note="; ".join(notes),
            )
        )
    return splits


def _with_stop(cells: CellTable, split: Split, config: FinetuneConfig) -> Fold:
    """Set whole slides of the training part aside for early stopping, stratified by class."""
    rows, groups = split.train, cells.group_key()
    names = np.array(CLASS_NAMES)[cells.label[rows]]
    parts = max(2, round(1 / config.stop_share))
    try:
        inner = grouped_kfold(names, groups=groups[rows], folds=parts, seed=config.seed)[0]
    except LabelError as error:
        raise LabelError(
            f"{split.name}: its {len(rows)} training cells cannot give up a share of {config.stop_share:g} with both "
            f"classes in whole slides to stop on ({error}); use fewer folds, or a larger stop_share"
        ) from error
    fold = Fold(name=split.name, train=rows[inner.train], stop=rows[inner.test], test=split.test, note=split.note)
    check_split(Split(name=split.name, train=fold.train, val=fold.stop, test=fold.test), groups)
    return fold
