"""Predictions of any model, read from a table and checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.special

from eosin.cohort.reading import MISSING, read_cells, row_phrase
from eosin.errors import CohortError, LabelError, PredictionsError, closest
from eosin.evaluation.report import Remark

Texts = npt.NDArray[np.str_]
Floats = npt.NDArray[np.float64]

NOT_RECORDED = "(not recorded)"
# Pairs that say themselves which one is the finding; anything else needs `positive`.
KNOWN_PAIRS = (("0", "1"), ("false", "true"), ("no", "yes"), ("negative", "positive"), ("neg", "pos"))
TUNE, TEST = "tune", "test"
LISTED_VALUES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSettings:
    """What `validate` is asked to do; columns are named as in the table.

    Attributes:
        label: column of the reference standard.
        score: column of P(positive).
        group: column of the patient (the unit that is resampled); None: every row for itself.
        site: column of the medical centre.
        subgroups: columns to break the results down by, such as scanner or sex.
        date: column of ISO dates, for performance over time.
        split: column whose rows 'tune' choose the operating point, the temperature and the conformal quantile, and
            whose rows 'test' are scored; all other rows are left out. None: all rows are scored.
        image: column of picture files, relative to the table, shown for confidently wrong rows.
        positive: the label that counts as positive; all others are negative.
        logits: the score columns hold logits; a sigmoid is applied.
        threshold: operating point, set beforehand.
        reference: column of another model's score, compared on the same rows.
        margin: non-inferiority margin in AUROC, set beforehand; needs `reference`.
        readers: table of readers' answers; see `eosin.evaluation.readers`.
        alpha: conformal sets are to miss the truth in at most this share of rows.
        bins: of the calibration error.
        resamples: of the bootstrap.
        level: of confidence.
        seed: of every random draw.
    """

    label: str
    score: str
    group: str | None = None
    site: str | None = None
    subgroups: tuple[str, ...] = ()
    date: str | None = None
    split: str | None = None
    image: str | None = None
    positive: str | None = None
    logits: bool = False
    threshold: float | None = None
    reference: str | None = None
    margin: float | None = None
    readers: Path | None = None
    alpha: float = 0.1
    bins: int = 15
    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without the table.

        Raises:
            PredictionsError: a value out of its range, or a margin without a reference.
        """
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise PredictionsError(
                f"threshold is {self.threshold:g}; needed a probability between 0 and 1 (after the sigmoid, with "
                f"--logits)"
            )
        if self.margin is not None and self.reference is None:
            raise PredictionsError("a margin needs a model to compare with: give --reference COLUMN too")
        if self.margin is not None and not 0 < self.margin < 1:
            raise PredictionsError(f"margin is {self.margin:g}; needed a loss of AUROC in (0, 1), such as 0.05")

    def columns(self) -> dict[str, str]:
        """Return each option that names a column of the table -> that column."""
        single = ("label", "score", "group", "site", "date", "split", "image", "reference")
        named = {name: getattr(self, name) for name in single if getattr(self, name) is not None}
        return named | {f"subgroup {name}": name for name in self.subgroups}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Checked rows, n of them, in the order of the table.

    Attributes:
        number: (n,) row numbers in the file (the header is row 1).
        y: (n,) int8, 1 = positive.
        p: (n,) float64 P(positive).
        cluster: (n,) patient, or the row number.
        site: (n,) or None.
        subgroups: column -> (n,) levels.
        date: (n,) datetime64[ns], NaT where missing, or None.
        image: (n,) file names, "" where missing, or None.
        reference: (n,) P(positive) of the other model, or None.
    """

    number: npt.NDArray[np.int64]
    y: npt.NDArray[np.int8]
    p: Floats
    cluster: Texts
    site: Texts | None
    subgroups: dict[str, Texts]
    date: npt.NDArray[np.datetime64] | None
    image: Texts | None
    reference: Floats | None

    def __len__(self) -> int:
        """Return n."""
        return len(self.y)

    def take(self, mask: npt.NDArray[np.bool_]) -> Rows:
        """Return the rows where `mask` (n,) is true."""

        def cut(values: Any) -> Any:
            return None if values is None else values[mask]

        return Rows(
            number=self.number[mask],
            y=self.y[mask],
            p=self.p[mask],
            cluster=self.cluster[mask],
            site=cut(self.site),
            subgroups={name: levels[mask] for name, levels in self.subgroups.items()},
            date=cut(self.date),
            image=cut(self.image),
            reference=cut(self.reference),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """A read table of predictions.

    Attributes:
        test: the rows that are scored.
        tune: the rows that choose threshold, temperature and conformal quantile; None without a split.
        facts: counts about the table, for the report.
        remarks: what a reader must know about the table.
    """

    test: Rows
    tune: Rows | None
    facts: dict[str, Any]
    remarks: tuple[Remark, ...]


def read_predictions(path: Path, settings: ValidationSettings) -> Predictions:
    """Return the checked predictions of a .csv, .tsv, .txt or .parquet table.

    Raises:
        CohortError: the table cannot be read, lacks a column, has a bad date or split, or a patient in both splits.
        LabelError: labels are missing, of one class, contradictory, or do not say which is positive.
        PredictionsError: scores are missing, not numbers or outside [0, 1].
    """
    cells = read_cells(path)
    if cells.empty:
        raise CohortError(f"{path}: the table has no rows; needed one row a prediction")
    _check_columns(cells, settings, path)
    part = _parts(cells, settings, path)
    used = pd.DataFrame(cells[part != ""])
    rows, positive, negative = _rows(used, settings, path)
    is_test = part[part != ""] == TEST
    scored = pd.DataFrame(used[is_test])
    test, tune = rows.take(is_test), (rows.take(~is_test) if settings.split is not None else None)
    _check_parts(test, tune, settings, path)
    facts = {
        "rows_in_file": len(cells),
        "rows_scored": len(test),
        "rows_tune": 0 if tune is None else len(tune),
        "rows_left_out": len(cells) - len(used),
        "clusters": len(np.unique(test.cluster)),
        "cluster_column": settings.group,
        "positives": int(test.y.sum()),
        "prevalence": float(test.y.mean()),
        "positive_label": positive,
        "negative_labels": list(negative),
        "duplicate_rows": int(scored.duplicated().sum()),
        "missing": _missing(scored, settings),
    }
    return Predictions(test=test, tune=tune, facts=facts, remarks=tuple(_remarks(scored, test, settings, facts)))


def _check_columns(cells: pd.DataFrame, settings: ValidationSettings, path: Path) -> None:
    names = [str(name) for name in cells.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CohortError(f"{path}: the column name {twice[0]!r} occurs twice; rename one of them")
    for option, name in settings.columns().items():
        if name not in names:
            raise CohortError(f"{path}: no column {name!r} for {option}; closest: {closest(name, names)}")


def _parts(cells: pd.DataFrame, settings: ValidationSettings, path: Path) -> Texts:
    """Return "test", "tune" or "" (left out) for every row."""
    if settings.split is None:
        return np.full(len(cells), TEST)
    found = _column(cells, settings.split).str.lower().to_numpy(dtype=np.str_)
    part = np.where(np.isin(found, (TUNE, TEST)), found, "")
    for needed in (TEST, TUNE):
        if not (part == needed).any():
            raise CohortError(
                f"{path}: column {settings.split!r} holds {_listed(_column(cells, settings.split))} but no {needed!r}; "
                f"rows {TUNE!r} choose the threshold and rows {TEST!r} are scored, so both are needed; without --split "
                "all rows are scored"
            )
    return part.astype(np.str_)


def _rows(cells: pd.DataFrame, settings: ValidationSettings, path: Path) -> tuple[Rows, str, tuple[str, ...]]:
    """Return all used rows, the positive label and the negative ones."""
    y, positive, negative = _labels(cells, settings, path)
    levels = {name: _levels(_column(cells, name)) for name in settings.subgroups}
    number = cells.index.to_numpy(dtype=np.int64)
    cluster = number.astype(np.str_) if settings.group is None else _complete(cells, settings.group, path)
    rows = Rows(
        number=number,
        y=y,
        p=_scores(_column(cells, settings.score), settings.logits, path),
        cluster=cluster,
        site=None if settings.site is None else _levels(_column(cells, settings.site)),
        subgroups=levels,
        date=None if settings.date is None else _dates(_column(cells, settings.date), path),
        image=None if settings.image is None else _levels(_column(cells, settings.image), ""),
        reference=None
        if settings.reference is None
        else _scores(_column(cells, settings.reference), settings.logits, path),
    )
    if rows.image is not None:
        _check_contradictions(rows, path)
    return rows, positive, negative


def _labels(
    cells: pd.DataFrame, settings: ValidationSettings, path: Path
) -> tuple[npt.NDArray[np.int8], str, tuple[str, ...]]:
    """Return y (n,), the positive label and the negative ones."""
    column = _column(cells, settings.label)
    gone = _numbers(column, _is_missing(column))
    if len(gone):
        raise LabelError(
            f"{path}, {row_phrase(gone)}: {settings.label} is missing; a row without a reference standard cannot be "
            "scored: fill it in, or drop these rows and say so"
        )
    values = sorted(set(column))
    if len(values) == 1:
        raise LabelError(
            f"{path}: {settings.label} is {values[0]!r} in all {len(column)} rows; discrimination needs both classes"
        )
    positive = settings.positive
    if positive is None:
        positive = _known_positive(values)
        if positive is None:
            raise LabelError(
                f"{path}: {settings.label} holds {_listed(column)}; say which one the score is the probability of: "
                "--positive VALUE (all others are then negative)"
            )
    elif positive not in values:
        same = [value for value in values if _same_number(value, positive)]
        if len(same) != 1:
            raise LabelError(
                f"{path}: {settings.label} never is {positive!r}; it holds {_listed(column)}; "
                f"closest: {closest(positive, values)}"
            )
        positive = same[0]
    y = (column == positive).to_numpy().astype(np.int8)
    return y, positive, tuple(value for value in values if value != positive)


def _known_positive(values: Sequence[str]) -> str | None:
    """Return which of two values is the positive one, None where they do not say it themselves."""
    if len(values) != 2:
        return None
    for negative, positive in KNOWN_PAIRS:
        for low, high in (values, values[::-1]):
            if {low.lower(), high.lower()} == {negative, positive}:
                return high if high.lower() == positive else low
            if negative == "0" and _same_number(low, "0") and _same_number(high, "1"):
                return high
    return None


def _same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def _scores(column: pd.Series, logits: bool, path: Path) -> Floats:
    """Return P(positive) (n,) of a score column."""
    values = np.asarray(pd.to_numeric(column.where(~_is_missing(column)), errors="coerce"), dtype=np.float64)
    bad = _numbers(column, ~np.isfinite(values))
    if len(bad):
        raise PredictionsError(
            f"{path}, {row_phrase(bad)}: {column.name} is {column.loc[bad[0]]!r}; {len(bad)} of {len(column)} scores "
            "are not finite numbers: find out why the model gave none, or drop these rows and say how many"
        )
    low, high = float(values.min()), float(values.max())
    if logits:
        if low >= 0 and high <= 1:
            raise PredictionsError(
                f"{path}: {column.name} lies between {low:.4g} and {high:.4g}, so these look like probabilities "
                "already; leave out --logits"
            )
        return scipy.special.expit(values)
    if low < 0 or high > 1:
        outside = _numbers(column, (values < 0) | (values > 1))
        looks = (
            "percentages: divide them by 100"
            if low >= 0 and 1 < high <= 100
            else ("logits: apply the sigmoid first, or give --logits to have it applied")
        )
        raise PredictionsError(
            f"{path}, {row_phrase(outside)}: {column.name} ranges from {low:.4g} to {high:.4g} but a probability lies "
            f"in [0, 1]; these look like {looks}"
        )
    return values


def _levels(column: pd.Series, missing: str = NOT_RECORDED) -> Texts:
    """Return a column's cells, missing ones under one name."""
    return np.array([missing if cell.lower() in MISSING else cell for cell in column], dtype=np.str_)


def _complete(cells: pd.DataFrame, name: str, path: Path) -> Texts:
    column = _column(cells, name)
    gone = _numbers(column, _is_missing(column))
    if len(gone):
        raise CohortError(
            f"{path}, {row_phrase(gone)}: {name} is missing; rows of one patient must carry one id, "
            "and a row that stands alone its own"
        )
    return column.to_numpy(dtype=np.str_)


def _dates(column: pd.Series, path: Path) -> npt.NDArray[np.datetime64]:
    text = column.where(~_is_missing(column))
    dates = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True)
    bad = _numbers(column, (dates.isna() & text.notna()).to_numpy())
    if len(bad):
        raise CohortError(
            f"{path}, {row_phrase(bad)}: {column.name} {column.loc[bad[0]]!r} is not an ISO date such as 2021-03-04"
        )
    return np.asarray(dates.dt.tz_convert(None), dtype="datetime64[ns]")


def _check_contradictions(rows: Rows, path: Path) -> None:
    assert rows.image is not None
    table = pd.DataFrame({"image": rows.image, "y": rows.y})
    several = np.asarray(table.groupby("image")["y"].transform("nunique")) > 1
    wrong = np.flatnonzero(several & (rows.image != ""))
    if len(wrong):
        raise LabelError(
            f"{path}, {row_phrase(rows.number[wrong])}: the same image ({rows.image[wrong[0]]}) is positive in one row "
            "and negative in another; keep the right one"
        )


def _check_parts(test: Rows, tune: Rows | None, settings: ValidationSettings, path: Path) -> None:
    for rows, name in ((test, TEST), (tune, TUNE)):
        if rows is not None and len(np.unique(rows.y)) < 2:
            raise LabelError(
                f"{path}: all {len(rows)} {name} rows are of one class; both classes are needed among them"
            )
    if tune is None or settings.group is None:
        return
    both = np.intersect1d(test.cluster, tune.cluster)
    if len(both):
        raise CohortError(
            f"{path}: {len(both)} values of {settings.group} are in {TUNE} and {TEST} rows both (first: {both[0]!r}); "
            "a threshold chosen on a patient must not be scored on that patient: move each to one side"
        )


def _missing(cells: pd.DataFrame, settings: ValidationSettings) -> dict[str, int]:
    return {
        name: int(_is_missing(_column(cells, name)).sum())
        for name in settings.columns().values()
        if name in cells.columns
    }


def _remarks(cells: pd.DataFrame, test: Rows, settings: ValidationSettings, facts: dict[str, Any]) -> list[Remark]:
    remarks = []
    if settings.group is None:
        remarks.append(
            Remark(
                kind="no-group",
                severity="warning",
                message="No patient column was given (--group), so the rows are treated as independent. If several "
                "rows come from one patient or slide, every interval here is too narrow and every p-value too small.",
            )
        )
    if facts["duplicate_rows"]:
        remarks.append(
            Remark(
                kind="duplicates",
                severity="warning",
                message=f"{facts['duplicate_rows']} of {len(cells)} scored rows are exact copies of an earlier "
                f"row. They "
                "were kept and each counts; drop them from the table if they are the same case twice.",
            )
        )
    for name, count in facts["missing"].items():
        if count:
            remarks.append(
                Remark(
                    kind="missing",
                    severity="note",
                    message=f"{name} is empty in {count} of {len(cells)} scored rows; "
                    + (
                        "they are left out of the analysis over time."
                        if name == settings.date
                        else f"they form a level of their own, {NOT_RECORDED}."
                        if name != settings.image
                        else "they have no picture."
                    ),
                )
            )
    if test.site is not None and settings.group is not None:
        table = pd.DataFrame({"cluster": test.cluster, "site": test.site})
        shared = int((table.groupby("cluster")["site"].nunique() > 1).sum())
        if shared:
            remarks.append(
                Remark(
                    kind="shared-ids",
                    severity="warning",
                    message=f"{shared} values of {settings.group} occur at more than one {settings.site}. They "
                    f"are taken "
                    "as one patient each; if the ids are reused by different patients, make them unique "
                    "(site and id together).",
                )
            )
    return remarks


def _column(cells: pd.DataFrame, name: str) -> pd.Series:
    return pd.Series(cells[name])


def _is_missing(column: pd.Series) -> npt.NDArray[np.bool_]:
    return column.str.lower().isin(list(MISSING)).to_numpy(dtype=np.bool_)


def _numbers(column: pd.Series, mask: npt.NDArray[np.bool_]) -> list[int]:
    """Return the row numbers where `mask` is true."""
    return column.index.to_numpy()[mask].tolist()


def _listed(column: pd.Series) -> str:
    values = sorted(set(column))
    shown = ", ".join(repr(value) for value in values[:LISTED_VALUES])
    return f"{shown} and {len(values) - LISTED_VALUES} more" if len(values) > LISTED_VALUES else shown
