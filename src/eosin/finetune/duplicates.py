"""The same cell in two sets: pooled without care, a model is tested on what it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eosin.finetune.aliases import slide_identity
from eosin.finetune.cells import CellTable, read_picture
from eosin.geometry import round_half_up

Basis = Literal["position", "picture"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Overlap:
    """Cells that two sets share, or that one set holds twice (then both names are the same).

    Attributes:
        first: name of one set.
        second: name of the other.
        by: "position", the same pixel of the same slide; "picture", the same decoded pixels under any name.
        rows: int64 (k, 2) rows of `first` and `second` that are one cell.
        labels_differ: how many of the k have two labels.
    """

    first: str
    second: str
    by: Basis
    rows: npt.NDArray[np.int64]
    labels_differ: int

    def __str__(self) -> str:
        """Return one sentence."""
        between = f"{self.first} twice" if self.first == self.second else f"{self.first} and {self.second}"
        return f"{len(self.rows)} cells in {between} (same {self.by}), {self.labels_differ} with different labels"


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class DuplicateReport:
    """What several sets have in common.

    Attributes:
        overlaps: pairs of sets with cells in common; none is left out, none is empty.
        slides: (first, second, slides in both); slides shared without a shared cell still leak.
        unplaced: set -> cells with neither position nor picture, about which nothing can be said.
    """

    overlaps: tuple[Overlap, ...]
    slides: tuple[tuple[str, str, int], ...]
    unplaced: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return counts as values that JSON knows."""
        return {
            "overlaps": [
                {
                    "first": o.first,
                    "second": o.second,
                    "by": o.by,
                    "cells": len(o.rows),
                    "labels_differ": o.labels_differ,
                }
                for o in self.overlaps
            ],
            "slides": [{"first": a, "second": b, "slides": n} for a, b, n in self.slides],
            "unplaced": dict(self.unplaced),
        }


def find_duplicates(tables: Mapping[str, CellTable]) -> DuplicateReport:
    """Return which cells and slides several sets share, by position and by picture.

    Slides go by `aliases.slide_identity`, positions by the nearest whole level-0 pixel. Pictures are compared by all
    of their pixels: a crop that was compressed again, or cut elsewhere, is another picture.

    Args:
        tables: name of the set -> its cells.

    Raises:
        CohortError: a picture that cannot be read.
    """
    places = {name: _places(cells) for name, cells in tables.items()}
    pictures = {name: _pictures(cells) for name, cells in tables.items()}
    kinds: tuple[tuple[Basis, Mapping[str, Sequence[Hashable | None]]], ...]
    kinds = (("position", places), ("picture", pictures))
    overlaps = []
    for first, second in combinations_with_replacement(tables, 2):
        for by, keys in kinds:
            rows = _shared(keys[first], keys[second], same=first == second)
            if len(rows):
                differ = tables[first].label[rows[:, 0]] != tables[second].label[rows[:, 1]]
                overlaps.append(Overlap(first=first, second=second, by=by, rows=rows, labels_differ=int(differ.sum())))
    groups = {name: {key[:2] for key in keys if key is not None} for name, keys in places.items()}
    slides = [(a, b, len(groups[a] & groups[b])) for a, b in combinations(tables, 2) if groups[a] & groups[b]]
    unplaced = {
        name: sum(a is None and b is None for a, b in zip(places[name], pictures[name], strict=True)) for name in tables
    }
    return DuplicateReport(
        overlaps=tuple(overlaps),
        slides=tuple(slides),
        unplaced={name: count for name, count in unplaced.items() if count},
    )


def without_duplicates(tables: Mapping[str, CellTable], report: DuplicateReport) -> dict[str, CellTable]:
    """Return the tables without cells that an earlier table (or an earlier row) holds already.

    Slides that stay in two tables keep one group key, so that no fold cuts them.
    """
    again = {name: np.zeros(len(cells), dtype=np.bool_) for name, cells in tables.items()}
    for overlap in report.overlaps:
        again[overlap.second][overlap.rows[:, 1]] = True
    return {name: cells.take(~again[name]) for name, cells in tables.items()}


def _places(cells: CellTable) -> list[tuple[str, str, int, int] | None]:
    known = np.isfinite(cells.xy).all(axis=1) & (cells.slide_id != "")
    whole = round_half_up(np.where(known[:, None], cells.xy, 0)).tolist()
    rows = zip(known.tolist(), cells.dataset.tolist(), cells.slide_id.tolist(), whole, strict=True)
    return [(*slide_identity(name, slide), xy[0], xy[1]) if usable else None for usable, name, slide, xy in rows]


def _pictures(cells: CellTable) -> list[str | None]:
    names = cells.file.tolist()
    return [
        hashlib.sha256(read_picture(cells.root / name)[0].tobytes()).hexdigest() if name else None for name in names
    ]


def _shared(
    first: Sequence[Hashable | None], second: Sequence[Hashable | None], *, same: bool
) -> npt.NDArray[np.int64]:
    """Return the rows (k, 2) with equal keys; within one table each row with the first of its key."""
    rows: dict[Hashable, int] = {}
    for at, key in enumerate(first):
        if key is not None:
            rows.setdefault(key, at)
    pairs = [(rows[key], at) for at, key in enumerate(second) if key is not None and key in rows]
    pairs = [(a, b) for a, b in pairs if not same or a != b]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
