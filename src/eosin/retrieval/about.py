"""What a cohort table says of the tiles of each slide: patient, site, scanner, stain, organ and label."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.cohort.reading import series, texts
from eosin.cohort.table import Cohort
from eosin.errors import CohortError
from eosin.features.store import stem

Columns = dict[str, npt.NDArray[Any]]

OF_SLIDES = ("patient_id", "site", "scanner", "stain", "organ")
ABOUT = (*OF_SLIDES, "label")
"""Payload that comes from the cohort, as text; `label` from the column that is asked for."""


class About:
    """The rows of a cohort, by the slides of a store.

    A row names a slide by its whole id, or by its file name with or without suffix if only one slide has that.

    Attributes:
        notes: what is doubtful, in sentences.
    """

    def __init__(self, slides: list[str], cohort: Cohort | None, label: str | None) -> None:
        """Find the rows of each slide.

        Args:
            slides: ids in the store.
            cohort: the table; without it each slide is its own patient and nothing else is known.
            label: its column of labels; "label" when None, if it has one.

        Raises:
            CohortError: no such column, no table, a name of several slides, or no slide of the store in the table.
        """
        self.notes: tuple[str, ...] = ()
        self._rows: dict[str, pd.DataFrame] = {}
        self._label: str | None = None
        self._source = "" if cohort is None else cohort.source
        if cohort is not None:
            self._label = cohort.column(label) if label else ("label" if "label" in cohort.table else None)
            self._find(slides, cohort)
        elif label is not None:
            raise CohortError(f"label {label!r} is a column of a cohort table; give the table too")

    def columns(self, slide_id: str, xy: npt.NDArray[np.int64]) -> Columns:
        """Return the columns `ABOUT` of a slide's tiles, each (n,) text, "" where nothing is known.

        Args:
            slide_id: in the store.
            xy: level-0 top-left corners of its tiles (n, 2).

        Raises:
            CohortError: rows of the slide that disagree.
        """
        found = {name: np.full(len(xy), "", object) for name in ABOUT}
        found["patient_id"][:] = slide_id
        rows = self._rows.get(slide_id)
        if rows is None:
            return found
        for name in OF_SLIDES:
            if name in rows:
                value = self._one(texts(series(rows, name)), name, slide_id)
                found[name][:] = value or (slide_id if name == "patient_id" else "")
        if self._label is not None:
            found["label"] = self._labels(rows, self._label, slide_id, xy)
        return found

    def _find(self, slides: list[str], cohort: Cohort) -> None:
        names: dict[str, list[str]] = {}
        for slide in slides:
            for name in {slide, slide.rsplit("/", 1)[-1], stem(slide)}:
                names.setdefault(name, []).append(slide)
        known = set(slides)
        asked = cohort.table["slide_id"]
        for name, at in cohort.table.groupby("slide_id", sort=False).indices.items():
            found = [str(name)] if str(name) in known else names.get(str(name), [])
            if len(found) > 1:
                raise CohortError(
                    f"{cohort.source}: {name!r} names {len(found)} slides of the store ({', '.join(found[:3])}); "
                    "give the whole slide_id"
                )
            for slide in found:
                rows = cohort.table.iloc[at]
                self._rows[slide] = pd.concat([self._rows[slide], rows]) if slide in self._rows else rows
        absent = [slide for slide in slides if slide not in self._rows]
        if slides and len(absent) == len(slides):
            raise CohortError(
                f"{cohort.source}: none of its slides is in the store; it names {', '.join(asked.iloc[:3])}, the store "
                f"{', '.join(slides[:3])}"
            )
        if absent:
            self.notes = (f"{len(absent)} of {len(slides)} slides are not in {cohort.source}, such as {absent[0]}",)

    def _labels(
        self, rows: pd.DataFrame, column: str, slide_id: str, xy: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.object_]:
        """Return the label of each tile (n,): of its own row where the table has positions, else of the slide."""
        labels = texts(series(rows, column))
        if "x" in rows:
            corners = np.stack([series(rows, "x").to_numpy(float), series(rows, "y").to_numpy(float)], axis=1).tolist()
        else:
            corners = [[np.nan, np.nan]] * len(rows)
        whole = [label for label, (x, _) in zip(labels, corners, strict=True) if np.isnan(x)]
        found = np.full(len(xy), self._one(whole, column, slide_id), object)
        places = {(x, y): at for at, (x, y) in enumerate(xy.tolist())}
        for label, corner in zip(labels, corners, strict=True):
            at = places.get((corner[0], corner[1]))
            if at is not None:
                found[at] = label
        return found

    def _one(self, values: list[str], column: str, slide_id: str) -> str:
        """Return the value that a slide's rows agree on, "" when none has one."""
        known = sorted({value for value in values if value})
        if len(known) > 1:
            raise CohortError(
                f"{self._source}: {slide_id} has {len(known)} values of {column} ({', '.join(known[:3])}); a slide has "
                "one, unless its rows name tiles by x and y"
            )
        return known[0] if known else ""
