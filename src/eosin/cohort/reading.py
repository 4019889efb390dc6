"""Tables to text cells and back: delimiters, column names, value aliases and types."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from eosin.errors import CohortError, closest

CANONICAL = (
    "slide_id",
    "patient_id",
    "path",
    "dataset",
    "site",
    "scanner",
    "stain",
    "date",
    "split",
    "x",
    "y",
    "file",
)
# Other names of the canonical columns, written without case, spaces, underscores, dots and hyphens.
COLUMN_ALIASES: Mapping[str, tuple[str, ...]] = {
    "slide_id": ("slide", "slidename", "sampleid", "wsiid", "id"),
    "patient_id": ("patient", "case", "caseid", "subject", "subjectid", "participant", "participantid"),
    "path": ("slidepath", "imagepath", "wsipath", "wsi"),
    "dataset": ("cohort", "study"),
    "site": ("center", "centre", "medicalcenter", "medicalcentre", "hospital", "institution", "origin"),
    "scanner": ("scannermodel", "scannertype"),
    "stain": ("staining",),
    "date": ("acquiredon", "scandate", "acquisitiondate"),
    "split": ("subset", "partition"),
    "x": ("coordinatex", "coordx", "xcoord"),
    "y": ("coordinatey", "coordy", "ycoord"),
    "file": ("filename", "tilefile", "tilepath"),
}
# Values with a known second spelling, by canonical column.
DEFAULT_ALIASES: Mapping[str, Mapping[str, str]] = {"scanner": {"Hamammatsu XR": "Hamamatsu XR"}}
# Cells that mean "nothing here", compared without case.
MISSING = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "<na>"})

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_INTEGER = re.compile(r"[+-]?\d{1,15}")
_PADDED = re.compile(r"[+-]?0\d.*")


def read_cells(path: Path) -> pd.DataFrame:
    """Return the table in `path` as text cells, indexed by row number (the header is row 1).

    The delimiter of a text file is whichever of comma, semicolon and tab the header holds most
    of. Blank lines are skipped but counted, so that a row number is the one a spreadsheet shows.

    Raises:
        CohortError: no such file, not a table, or a row with more or fewer cells than the header.
    """
    if not path.is_file():
        raise CohortError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".parquet":
            return frame_cells(pd.read_parquet(path))
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            delimiter = max(",;\t", key=header.count)
            stream.seek(0)
            rows = list(csv.reader(stream, delimiter=delimiter, strict=True))
    except (ValueError, OSError, csv.Error) as error:  # a decoding error is a ValueError, as are pyarrow's
        raise CohortError(f"{path}: cannot be read as a table ({error})") from error
    if not rows:
        raise CohortError(f"{path}: the file is empty; a table needs a header and rows")
    names = [cell.strip() for cell in rows[0]]
    numbered = [(number, row) for number, row in enumerate(rows[1:], start=2) if any(cell.strip() for cell in row)]
    for number, row in numbered:
        if len(row) != len(names):
            raise CohortError(f"{path}, row {number}: {len(row)} cells where the header has {len(names)}")
    index = [number for number, _ in numbered]
    cells = [[cell.strip() for cell in row] for _, row in numbered]
    return pd.DataFrame(cells, columns=pd.Index(names), index=pd.Index(index), dtype=object)


def frame_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Return any data frame as text cells, its first row being row 2."""
    cells = {str(name).strip(): texts(frame.iloc[:, at]) for at, name in enumerate(frame.columns)}
    if len(cells) != frame.shape[1]:
        raise CohortError(f"a column name occurs twice among {', '.join(map(str, frame.columns))}")
    return pd.DataFrame(cells, index=range(2, len(frame) + 2), dtype=object)


def series(table: pd.DataFrame, name: str) -> pd.Series:
    """Return one column of a table whose column names are distinct."""
    return cast(pd.Series, table[name])


def texts(column: pd.Series) -> list[str]:
    """Return one text a cell: numbers in their shortest form, dates in ISO form, "" where missing."""
    return ["" if gone else _text(value) for value, gone in zip(column.tolist(), column.isna().to_numpy(), strict=True)]


def _text(value: object) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float | np.floating):
        return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else str(value)
    if isinstance(value, datetime.datetime):
        midnight = value.time() == datetime.time() and value.tzinfo is None
        return value.date().isoformat() if midnight else value.isoformat()
    return str(value).strip()


def squeeze(name: str) -> str:
    """Return `name` without case, spaces, underscores, dots and hyphens."""
    return re.sub(r"[\s_.\-]+", "", name).casefold()


def canonical_name(name: str) -> str:
    """Return the canonical column that `name` stands for, or `name` itself."""
    short = squeeze(name)
    return next((key for key in CANONICAL if short == squeeze(key) or short in COLUMN_ALIASES[key]), name)


def rename_columns(cells: pd.DataFrame, columns: Mapping[str, str], where: str) -> pd.DataFrame:
    """Return `cells` with its columns under their canonical names; all others keep theirs.

    Args:
        cells: the table.
        columns: canonical name -> name in this table, for what the aliases do not know.
        where: what the table is called in errors.

    Raises:
        CohortError: a name that is not there, or two columns that could both be the same one.
    """
    names = list(map(str, cells.columns))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        raise CohortError(
            f"{where}: {'column name ' + twice[0] + ' occurs twice' if twice else 'a column has no name'}"
        )
    found: dict[str, str] = {}
    for key, name in columns.items():
        if key not in CANONICAL:
            raise CohortError(f"columns: {key!r} is not a cohort column; known are {', '.join(CANONICAL)}")
        if name not in names:
            raise CohortError(f"{where}: no column {name!r} for {key}; closest: {closest(name, names)}")
        if key in names and key != name:
            raise CohortError(f"{where}: {name!r} is to be {key}, but a column {key!r} exists already; drop one")
        found[key] = name
    for key in CANONICAL:
        if key in found:
            continue
        free = [name for name in names if name not in found.values()]
        same = [name for name in free if squeeze(name) == squeeze(key)]
        likely = [key] if key in free else same or [name for name in free if squeeze(name) in COLUMN_ALIASES[key]]
        if len(likely) > 1:
            raise CohortError(
                f"{where}: {' and '.join(map(repr, likely))} could both be {key}; say which: "
                f"columns={{{key!r}: {likely[0]!r}}}"
            )
        if likely:
            found[key] = likely[0]
    return cells.rename(columns={name: key for key, name in found.items()})


def replace_aliases(cells: pd.DataFrame, aliases: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Replace known second spellings in place; return one note for each spelling replaced."""
    notes = []
    for column, values in aliases.items():
        name = canonical_name(column)
        for old, new in values.items():
            hit = cells[name] == old if name in cells else np.zeros(0, bool)
            if hit.any():
                cells.loc[hit, name] = new
                notes.append(f"{name}: {int(hit.sum())} rows said {old!r}, read as {new!r}")
    return notes


def typed_columns(cells: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the table with types: canonical columns are text, ``x y`` numbers, ``date`` dates.

    Another column becomes numeric when every cell is a number and none has leading zeros.
    Missing cells are NaN (NaT for dates).

    Raises:
        CohortError: an x or y that is no number, or a date that is not ISO, with row numbers.
    """
    gone = cells.map(lambda cell: cell.casefold() in MISSING)
    table = cells.mask(gone, np.nan)
    for name in table.columns:
        column = series(table, name)
        known = column.dropna()
        if name in ("x", "y"):
            _reject(
                known.loc[[_NUMBER.fullmatch(cell) is None for cell in known]],
                where,
                name,
                "a number of level-0 pixels",
            )
            table[name] = _numbers(column)
        elif name == "date":
            table[name] = _dates(column, where)
        elif name not in CANONICAL and _all_numbers(known):
            table[name] = _numbers(column)
    return table


def _all_numbers(known: Iterable[str]) -> bool:
    cells = list(known)
    return bool(cells) and all(
        _NUMBER.fullmatch(cell)
        and not _PADDED.fullmatch(cell)
        and (_INTEGER.fullmatch(cell) or not cell.lstrip("+-").isdigit())
        for cell in cells
    )


def _numbers(column: pd.Series) -> pd.Series:
    whole = all(_INTEGER.fullmatch(cell) for cell in column if isinstance(cell, str))
    return column.astype("int64" if whole and not column.isna().any() else "float64")


def _dates(column: pd.Series, where: str) -> pd.Series:
    dates = pd.to_datetime(column, format="ISO8601", errors="coerce", utc=True)
    _reject(column.loc[dates.isna() & column.notna()], where, "date", "an ISO date such as 2021-03-04")
    return dates.dt.tz_convert(None)


def _reject(bad: pd.Series, where: str, name: str, needed: str) -> None:
    if len(bad):
        raise CohortError(
            f"{where}, {row_phrase(bad.index)}: {name} {bad.iloc[0]!r} is not {needed}"
            + (f" ({len(bad)} such rows)" if len(bad) > 1 else "")
        )


def row_phrase(rows: Iterable[int], *, most: int = 5) -> str:
    """Return "row 7" or "rows 2, 3, 9" or, past `most`, "rows 2, 3, ... (41 in all)"."""
    numbers = [int(row) for row in rows]
    listed = ", ".join(map(str, numbers[:most]))
    if len(numbers) > most:
        return f"rows {listed}, ... ({len(numbers)} in all)"
    return f"row{'s' if len(numbers) != 1 else ''} {listed}"


def spelling_twins(values: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of values that differ only by case, punctuation or doubled letters.

    ``Hamammatsu XR`` and ``Hamamatsu XR`` are such a pair: most likely one scanner.
    """
    first: dict[str, str] = {}
    pairs = []
    for value in sorted(set(values)):
        short = re.sub(r"([^\W\d_])\1+", r"\1", re.sub(r"[\W_]+", "", value.casefold()))
        other = first.setdefault(short, value)
        if other != value:
            pairs.append((other, value))
    return pairs
