"""The cohort: one validated table saying which row belongs to which slide, patient, site and label."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.cohort.reading import (
    DEFAULT_ALIASES,
    canonical_name,
    frame_cells,
    read_cells,
    rename_columns,
    replace_aliases,
    row_phrase,
    series,
    spelling_twins,
    squeeze,
    texts,
    typed_columns,
)
from eosin.errors import CohortError, LabelError, closest

_LOG = logging.getLogger(__name__)
# What may tell one row from every other, the shortest first.
_IDENTITIES = (("slide_id",), ("file",), ("path",), ("slide_id", "x", "y"), ("file", "x", "y"), ("path", "x", "y"))


@dataclass(frozen=True, eq=False, kw_only=True)
class Cohort:
    """A validated table of slides or tiles.

    Attributes:
        table: n rows, canonical columns first as they came, row order kept; the index is the row
            number in the file (the header is row 1).
        source: the file, or "data frame".
        sha256: hash of column names and cells in row order, independent of the file's format.
        notes: what was derived, replaced or is doubtful, in sentences.
    """

    table: pd.DataFrame
    source: str
    sha256: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def __repr__(self) -> str:
        """Return one line: rows, clusters, columns."""
        clusters = len(np.unique(self.group_key()))
        return f"Cohort({self.source}: {len(self)} rows, {clusters} clusters, columns {', '.join(self.table.columns)})"

    def column(self, name: str) -> str:
        """Return the table's column for `name`, given exactly or up to case, spaces and aliases.

        Raises:
            CohortError: no such column; the message lists the closest.
        """
        names = list(map(str, self.table.columns))
        if name in names:
            return name
        loose = [known for known in names if squeeze(known) == squeeze(name)] or [canonical_name(name)]
        if len(loose) == 1 and loose[0] in names:
            return loose[0]
        raise CohortError(f"{self.source}: no column {name!r}; closest: {closest(name, names)}")

    def values(self, column: str) -> npt.NDArray[np.str_]:
        """Return a column as text, shape (n,).

        Raises:
            CohortError: no such column, or missing cells, by row number.
        """
        name = self.column(column)
        gone = self.table.index[self.table[name].isna()]
        if len(gone):
            raise CohortError(f"{self.source}, {row_phrase(gone)}: {name} is missing; fill it in or drop the rows")
        return np.array(texts(series(self.table, name)), dtype=np.str_)

    def labels(self, column: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """Return class indices (n,) and the class names, sorted (numbers by value).

        Raises:
            LabelError: no such column, missing labels, or fewer than two classes.
        """
        try:
            found = self.values(column)
        except CohortError as error:
            raise LabelError(f"label: {error}") from error
        names = np.unique(found).tolist()
        try:
            names.sort(key=float)
        except ValueError:
            names.sort()
        if len(names) < 2:
            raise LabelError(
                f"{self.source}: label {column!r} is {names[0]!r} in all {len(self)} rows; two classes needed"
            )
        code = {name: at for at, name in enumerate(names)}
        return np.array([code[value] for value in found.tolist()], dtype=np.int64), tuple(names)

    def site(self, column: str = "site") -> npt.NDArray[np.str_]:
        """Return the medical centre (or any other origin, such as ``scanner``) of each row, (n,)."""
        return self.values(column)

    def group_key(self) -> npt.NDArray[np.str_]:
        """Return the cluster of each row, (n,): ``dataset/patient``, or the patient without a dataset.

        Slide names are reused across data sets, hence the prefix. A row with neither patient nor
        slide is its own cluster (its file is the key).
        """
        table = self.table
        key = series(table, "patient_id").copy()
        alone = key.isna()
        if alone.any():
            key[alone] = "file " + table.loc[alone, "file"].astype(str)
        if "dataset" in table:
            key = table["dataset"].fillna("").astype(str) + "/" + key
        return key.to_numpy(dtype=np.str_)

    def row_ids(self) -> npt.NDArray[np.str_]:
        """Return a text a row that names it and no other, (n,), from the fewest columns that can."""
        lead = ["dataset"] if "dataset" in self.table else []
        for names in _IDENTITIES:
            if all(name in self.table and self.table[name].notna().all() for name in names):
                parts = [texts(series(self.table, name)) for name in (*lead, *names)]
                ids = np.array(["|".join(row) for row in zip(*parts, strict=True)], dtype=np.str_)
                if len(np.unique(ids)) == len(ids):
                    return ids
        return np.array([f"row {number}" for number in self.table.index], dtype=np.str_)

    def column_digests(self) -> dict[str, str]:
        """Return sha256 of each column's cells, taken in the order of `row_ids`: row order is ignored."""
        order = np.argsort(self.row_ids(), kind="stable")
        return {str(name): _digest(texts(series(self.table, name).iloc[order])) for name in self.table.columns}

    def take(self, rows: npt.ArrayLike) -> Cohort:
        """Return the cohort of some rows, given as positions or as a mask (n,); row numbers stay."""
        chosen = np.asarray(rows)
        table = self.table.iloc[np.flatnonzero(chosen) if chosen.dtype == bool else chosen]
        if table.empty:
            raise CohortError(f"{self.source}: no row is left")
        return replace(self, table=table, sha256=_table_digest(table))

    def to_csv(self, path: Path | str) -> None:
        """Write the table under its canonical names; `read_cohort` gives the same cells back."""
        cells = {name: texts(series(self.table, name)) for name in self.table.columns}
        write_text(Path(path), pd.DataFrame(cells).to_csv(index=False))


def read_cohort(
    source: Path | str | pd.DataFrame,
    *,
    label: str | None = None,
    columns: Mapping[str, str] | None = None,
    aliases: Mapping[str, Mapping[str, str]] = DEFAULT_ALIASES,
) -> Cohort:
    """Return the validated cohort of a table.

    Ids are text ("002" keeps its zeros). Without ``patient_id`` the slide stands for the patient;
    without ``slide_id`` the slide is named by its path relative to the table, as extraction does.
    Files are not looked for.

    Args:
        source: .csv, .tsv, .txt (comma, semicolon or tab) or .parquet, or a data frame.
        label: column that must hold a label in every row, and at least two classes.
        columns: canonical name -> name in this table, for what the aliases do not know.
        aliases: canonical column -> {spelling: right spelling}.

    Raises:
        CohortError: unreadable, ambiguous or empty table, or a bad cell, by row number.
        LabelError: the label is missing in some rows, has one class, or contradicts itself.
    """
    path = None if isinstance(source, pd.DataFrame) else Path(source)
    where = "data frame" if path is None else str(path)
    cells = frame_cells(source) if isinstance(source, pd.DataFrame) else read_cells(Path(source))
    cells = rename_columns(cells, columns or {}, where)
    if cells.empty:
        raise CohortError(f"{where}: the table has no rows")
    notes = replace_aliases(cells, aliases)
    table = typed_columns(cells, where)
    table.index.name = "row"
    _check_rows(table, where)
    notes += _add_ids(table, None if path is None else path.parent)
    for name in ("dataset", "site", "scanner", "stain"):
        if name in table:
            pairs = spelling_twins(table[name].dropna())
            notes += [f"{name}: {a!r} and {b!r} look like one; if so, give an alias" for a, b in pairs]
    cohort = Cohort(table=table, source=where, sha256=_table_digest(table), notes=tuple(notes))
    if label is not None:
        cohort.labels(label)
        _check_contradictions(cohort, cohort.column(label))
    return cohort


def _check_rows(table: pd.DataFrame, where: str) -> None:
    named = [name for name in ("slide_id", "path", "file") if name in table]
    if not named:
        raise CohortError(
            f"{where}: needs a column slide_id, path or file; it has {', '.join(map(str, table.columns))}. "
            "Say which is which with columns={'slide_id': '...'}"
        )
    nameless = table.index[table[named].isna().all(axis=1)]
    if len(nameless):
        raise CohortError(f"{where}, {row_phrase(nameless)}: {' and '.join(named)} empty; a row must name its image")
    if ("x" in table) != ("y" in table):
        raise CohortError(f"{where}: has one of x and y; a position needs both")
    if "x" in table:
        halves = table.index[table["x"].isna() != table["y"].isna()]
        if len(halves):
            raise CohortError(f"{where}, {row_phrase(halves)}: only one of x and y is given")


def _add_ids(table: pd.DataFrame, folder: Path | None) -> list[str]:
    """Fill in slide_id and patient_id; return what was derived. Nothing to group by is also logged."""
    notes = []
    only_files = "slide_id" not in table and "path" not in table
    if "slide_id" not in table:
        table["slide_id"] = np.nan
        table["slide_id"] = table["slide_id"].astype(object)
    if "path" in table:
        empty = table["slide_id"].isna() & table["path"].notna()
        table.loc[empty, "slide_id"] = [_relative_id(text, folder) for text in table.loc[empty, "path"]]
        if empty.any():
            notes.append(f"slide_id: {int(empty.sum())} rows named by their path")
    elif only_files:
        table["slide_id"] = [_relative_id(text, folder) for text in table["file"]]
        notes.append("slide_id: rows named by their file")
    if only_files and "patient_id" not in table and table["slide_id"].is_unique:
        notes.append(_alone_note(len(table)))
    notes += _add_patients(table)
    alone = int(table["patient_id"].isna().sum())
    if alone:
        notes.append(_alone_note(alone))
    return notes


def _alone_note(rows: int) -> str:
    note = (
        f"{rows} rows have neither patient_id nor slide_id: each is taken as its own cluster, so one patient may "
        "lie in two parts of a split and intervals will be too narrow; add a patient_id column if you can"
    )
    _LOG.warning(note)
    return note


def _add_patients(table: pd.DataFrame) -> list[str]:
    if "patient_id" not in table:
        table["patient_id"] = table["slide_id"]
        return ["patient_id: not given, each slide is taken as one patient"]
    empty = series(table, "patient_id").isna()
    if not empty.any():
        return []
    lead = table["dataset"].fillna("") if "dataset" in table else ""
    slide = lead + "|" + table["slide_id"]
    known = series(table, "patient_id").groupby(slide)
    guess = known.transform("first").where(known.transform("nunique") == 1)
    table.loc[empty, "patient_id"] = guess[empty].where(guess[empty].notna(), table.loc[empty, "slide_id"])
    note = f"patient_id: missing in {int(empty.sum())} rows, taken from other rows of the slide or from the slide_id"
    _LOG.warning(note)
    return [note]


def _relative_id(text: str, folder: Path | None) -> str:
    path = Path(text)
    if folder is None:
        return path.name if path.is_absolute() else path.as_posix()
    try:
        return (folder / path).resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.name


def _check_contradictions(cohort: Cohort, label: str) -> None:
    """Raise when two rows name the same image or tile and differ in the label."""
    identity = [name for name in ("dataset", "slide_id", "path", "file", "x", "y") if name in cohort.table]
    if label in identity:
        return
    same = cohort.table.groupby(identity, dropna=False, sort=False)[label]
    wrong = cohort.table.index[np.asarray(same.transform("nunique")) > 1]
    if len(wrong):
        raise LabelError(
            f"{cohort.source}, {row_phrase(wrong)}: the same image with different values of {label!r}; "
            "keep one row for each image, or add the columns that tell them apart (file, or x and y)"
        )


def _digest(cells: Iterable[str]) -> str:
    return hashlib.sha256("\x1e".join(cells).encode()).hexdigest()


def _table_digest(table: pd.DataFrame) -> str:
    return _digest(f"{name}\x1f{_digest(texts(series(table, name)))}" for name in sorted(map(str, table.columns)))


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name, flush it to disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
