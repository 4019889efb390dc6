"""What would make an evaluation look better than it is: a report over a cohort, its splits and its features."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import chi2

from eosin.cohort.nametells import NameTell, name_tell
from eosin.cohort.reading import series, spelling_twins, texts
from eosin.cohort.splits import Split, shared_groups
from eosin.cohort.table import Cohort
from eosin.errors import CohortError, LabelError, NonFiniteError

Severity = Literal["error", "warning", "note"]
NEAR_COSINE = 0.9999
_BLOCK = 2048
_MOST_PAIRS = 10_000
_ORIGINS = ("site", "scanner", "stain", "dataset")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing found.

    Attributes:
        kind: short name, e.g. "patient-in-two-parts".
        severity: "error" (results would be wrong), "warning" (look at it) or "note".
        message: one sentence with the figures.
        rows: row numbers of the table (header = row 1) it concerns, () where it is about all.
    """

    kind: str
    severity: Severity
    message: str
    rows: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakageReport:
    """Everything found, errors first, and the names of the checks that were made."""

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make results wrong."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def raise_on_error(self) -> None:
        """Raise `CohortError` listing the errors, if there are any."""
        if self.errors:
            raise CohortError("; ".join(finding.message for finding in self.errors))

    def to_dict(self) -> dict:
        """Return the report as plain values for JSON."""
        return {
            "checked": list(self.checked),
            "findings": [
                {"kind": f.kind, "severity": f.severity, "message": f.message, "rows": list(f.rows)}
                for f in self.findings
            ],
        }


def leakage_report(
    cohort: Cohort,
    splits: Sequence[Split] | None = None,
    features: npt.ArrayLike | None = None,
    *,
    label: str | None = None,
    seed: int = 0,
) -> LeakageReport:
    """Return what leaks, or may leak, in a cohort.

    Patients and slides in two parts of a split; the same tile in two data sets; duplicate rows;
    near-identical features of different patients; labels and sites that the file name gives
    away; sites that go with the label; sites spelled in two ways.

    Args:
        cohort: the table.
        splits: splits to check, None to look at the table alone.
        features: (n, D) one vector a row, None to skip the search for near-duplicates
            (exact: n^2 D / 2 multiplications, in blocks of 2048 rows).
        label: label column; None skips the checks that need one. Rows without a label are not
            used in those.
        seed: of the shuffles of the file-name check.

    Raises:
        LabelError: `label` is no column of the table.
        CohortError: features of another number of rows.
        NonFiniteError: NaN or infinity in the features.
    """
    checked = ["patients across data sets", "duplicate rows", "tiles across data sets", "spelling of sites"]
    found = [*_reused_ids(cohort), *_duplicate_rows(cohort), *_same_tiles(cohort), *_spellings(cohort)]
    for split in splits or ():
        found += _cut_groups(cohort, split)
    if splits:
        checked.append("patients and slides across parts")
    if features is not None:
        found += _near_features(cohort, splits or (), np.asarray(features))
        checked.append("near-duplicate features")
    if label is not None:
        checked += ["label and origin", "file names"]
        labelled = _labelled(cohort, label)
        found += _origin_association(labelled, label)
        found += _name_findings(labelled, label, "warning", seed)
        found += [finding for one in _ORIGINS[:3] for finding in _name_findings(labelled, one, "note", seed)]
    order = {"error": 0, "warning": 1, "note": 2}
    return LeakageReport(findings=tuple(sorted(found, key=lambda f: order[f.severity])), checked=tuple(checked))


def _rows(cohort: Cohort, mask: npt.ArrayLike) -> tuple[int, ...]:
    return tuple(int(row) for row in cohort.table.index[np.asarray(mask)])


def _listed(names: Iterable[object], most: int = 3) -> str:
    every = [str(name) for name in names]
    return ", ".join(every[:most]) + (", ..." if len(every) > most else "")


def _labelled(cohort: Cohort, label: str) -> Cohort:
    try:
        name = cohort.column(label)
    except CohortError as error:
        raise LabelError(f"label: {error}") from error
    return cohort.take(cohort.table[name].notna().to_numpy())


def _cut_groups(cohort: Cohort, split: Split) -> list[Finding]:
    """Patients in two parts are an error; slides of different patients in two parts a warning."""
    group = cohort.group_key()
    cut = shared_groups(split, group)
    found = []
    if cut:
        found.append(
            Finding(
                kind="patient-in-two-parts",
                severity="error",
                message=f"split {split.name!r}: {len(cut)} patients are in two parts ({_listed(cut)})",
                rows=_rows(cohort, np.isin(group, list(cut))),
            )
        )
    slide = cohort.table["slide_id"].fillna("").astype(str)
    if "dataset" in cohort.table:
        slide = cohort.table["dataset"].fillna("").astype(str) + "/" + slide
    names = np.where(cohort.table["slide_id"].isna() | np.isin(group, list(cut)), "", slide).astype(str)
    both = [name for name in shared_groups(split, names) if name]
    if both:
        found.append(
            Finding(
                kind="slide-in-two-parts",
                severity="warning",
                message=f"split {split.name!r}: {len(both)} slides with several patients (tissue microarrays?) "
                f"are in two parts ({_listed(both)}): stain and scan are shared",
                rows=_rows(cohort, np.isin(names, both)),
            )
        )
    return found


def _reused_ids(cohort: Cohort) -> list[Finding]:
    if "dataset" not in cohort.table:
        return []
    table = cohort.table.dropna(subset=["patient_id"])
    several = np.asarray(table.groupby("patient_id")["dataset"].transform("nunique")) > 1
    names = table.loc[several, "patient_id"].unique()
    if not len(names):
        return []
    return [
        Finding(
            kind="patient-id-in-two-datasets",
            severity="warning",
            message=f"{len(names)} patient ids occur in more than one dataset ({_listed(names)}) and are taken as "
            "different patients; if they are the same people, drop the dataset column",
            rows=tuple(int(row) for row in table.index[several]),
        )
    ]


def _duplicate_rows(cohort: Cohort) -> list[Finding]:
    whole = cohort.table.duplicated(keep=False)
    identity = [name for name in ("dataset", "slide_id", "path", "file", "x", "y") if name in cohort.table]
    partly = cohort.table.duplicated(subset=identity, keep=False) & ~whole
    found = []
    if whole.any():
        copies = int(cohort.table.duplicated().sum())
        message = f"{copies} rows repeat another row in every column; keep one of each"
        found.append(Finding(kind="duplicate-rows", severity="error", message=message, rows=_rows(cohort, whole)))
    if partly.any():
        message = f"{int(partly.sum())} rows name the same image or tile but differ elsewhere"
        found.append(Finding(kind="same-image-rows", severity="warning", message=message, rows=_rows(cohort, partly)))
    return found


def _same_tiles(cohort: Cohort) -> list[Finding]:
    """The same (slide name, x, y) in two data sets: the same cell, unless positions lie on a grid."""
    if not {"dataset", "x", "y"} <= set(cohort.table.columns):
        return []
    table = cohort.table.loc[cohort.table["x"].notna() & cohort.table["dataset"].notna()]
    name, dataset = series(table, "slide_id"), series(table, "dataset")
    if "file" in table:
        name = name.fillna(series(table, "file"))
    bare = [_bare_slide(str(one), str(source)) for one, source in zip(name, dataset, strict=True)]
    sets = dataset.groupby([pd.Series(bare, index=table.index), table["x"], table["y"]]).transform("nunique")
    rows = np.asarray(table.index)[np.asarray(sets) > 1]
    if not len(rows):
        return []
    grid = _on_grid(table.loc[dataset.isin(dataset[rows]), ["x", "y"]].to_numpy(float))
    pair = _listed(sorted(set(dataset[rows])))
    reason = "; their positions lie on a grid, so slides of one name may be enough to explain it" if grid else ""
    return [
        Finding(
            kind="same-tile-in-two-datasets",
            severity="warning" if grid else "error",
            message=f"{len(rows)} rows share slide name, x and y with a row of another dataset ({pair}): "
            f"keep each tile once before pooling{reason}",
            rows=tuple(int(row) for row in rows),
        )
    ]


def _bare_slide(name: str, dataset: str) -> str:
    """Return a slide's name without folder, suffix and the data set's own prefix."""
    stem = re.sub(r"(\.ome)?\.[A-Za-z][A-Za-z0-9]{1,7}$", "", name.rsplit("/", 1)[-1])
    rest = stem[len(dataset) :] if stem.casefold().startswith(dataset.casefold()) else stem
    return rest.strip(" _-") or stem


def _on_grid(xy: npt.NDArray[np.float64]) -> bool:
    """Return whether all positions are multiples of a step of at least 8 pixels from the first."""
    step = np.gcd.reduce(np.abs(np.rint(xy - xy[0])).astype(np.int64), axis=0)
    return bool(((step >= 8) | (step == 0)).all() and step.any())


def _spellings(cohort: Cohort) -> list[Finding]:
    found = []
    for name in (one for one in _ORIGINS if one in cohort.table):
        for a, b in spelling_twins(cohort.table[name].dropna()):
            message = f"{name}: {a!r} and {b!r} are most likely one; two spellings make one {name} into two"
            rows = _rows(cohort, cohort.table[name].isin([a, b]))
            found.append(Finding(kind="two-spellings", severity="warning", message=message, rows=rows))
    return found


def near_duplicates(
    features: npt.ArrayLike, groups: npt.ArrayLike, *, cosine: float = NEAR_COSINE
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], int]:
    """Return pairs of rows of different groups whose features point the same way.

    Exact: every pair is looked at, in blocks. At most 10,000 pairs are returned; all are counted.

    Args:
        features: (n, D); zero vectors match nothing.
        groups: (n,) pairs within one group are ignored.
        cosine: similarity above which two rows are a pair.

    Returns:
        Pairs (k, 2) of positions i < j, their cosine (k,), and how many there are in all.

    Raises:
        CohortError: shapes that do not fit.
        NonFiniteError: NaN or infinity.
    """
    x = np.asarray(features, dtype=np.float32)
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    if x.ndim != 2 or len(x) != len(group):
        raise CohortError(f"features of shape {x.shape} for {len(group)} rows; (n, D) is needed")
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise NonFiniteError(
            f"{int((~finite).sum())} of {len(x)} feature rows are not finite, first {int(finite.argmin())}"
        )
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    pairs: list[npt.NDArray[np.int64]] = []
    values: list[npt.NDArray[np.float32]] = []
    total, kept = 0, 0
    for top in range(0, len(x), _BLOCK):
        for left in range(top, len(x), _BLOCK):
            near = unit[top : top + _BLOCK] @ unit[left : left + _BLOCK].T
            i, j = np.nonzero(near > cosine)
            i, j, value = i + top, j + left, near[i, j]
            use = (i < j) & (group[i] != group[j])
            total += int(use.sum())
            room = np.flatnonzero(use)[: _MOST_PAIRS - kept]
            kept += len(room)
            pairs.append(np.stack([i[room], j[room]], axis=1))
            values.append(value[room])
    return np.concatenate(pairs), np.concatenate(values), total


def _near_features(cohort: Cohort, splits: Sequence[Split], features: npt.NDArray) -> list[Finding]:
    pairs, _, total = near_duplicates(features, cohort.group_key())
    if not total:
        return []
    across = [split.name for split in splits if _crosses(split, pairs, len(cohort))]
    where = f", across the parts of {_listed(map(repr, across))}" if across else ""
    return [
        Finding(
            kind="near-duplicate-features",
            severity="error" if across else "warning",
            message=f"{total} pairs of rows from different patients have features of cosine > {NEAR_COSINE}{where}: "
            "the same image under two names, or empty tiles",
            rows=_rows(cohort, np.isin(np.arange(len(cohort)), pairs)),
        )
    ]


def _crosses(split: Split, pairs: npt.NDArray[np.int64], n: int) -> bool:
    part = np.zeros(n, np.int64)
    for code, rows in enumerate((split.train, split.val, split.test), start=1):
        part[rows] = code
    a, b = part[pairs[:, 0]], part[pairs[:, 1]]
    return bool(((a != b) & (a > 0) & (b > 0)).any())


def cramers_v(table: npt.ArrayLike) -> tuple[float, float]:
    """Return Cramer's V of a contingency table (r, c) and the p of its chi-squared test.

    V = sqrt(chi2 / (n min(r - 1, c - 1))), over rows and columns that occur. 0 is no
    association, 1 is one variable telling the other. NaN when either has a single level.
    """
    counts = np.asarray(table, dtype=np.float64)
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    rows, columns = counts.shape
    if min(rows, columns) < 2:
        return float("nan"), float("nan")
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0, keepdims=True) / counts.sum()
    squared = float(((counts - expected) ** 2 / expected).sum())
    v = np.sqrt(squared / (counts.sum() * (min(rows, columns) - 1)))
    return float(min(v, 1.0)), float(chi2.sf(squared, (rows - 1) * (columns - 1)))


def _origin_association(cohort: Cohort, label: str) -> list[Finding]:
    """Cramer's V of each origin with the label; a patient counts once, spread over its rows (then p is approximate)."""
    found = []
    name = cohort.column(label)
    for origin in (one for one in _ORIGINS if one in cohort.table and one != name):
        part = cohort.take(rows) if (rows := cohort.table[origin].notna().to_numpy()).any() else None
        if part is None or part.table[name].nunique() < 2 or part.table[origin].nunique() < 2:
            continue
        group = np.unique(part.group_key(), return_inverse=True)[1]
        weight = 1.0 / np.bincount(group)[group]
        counts = pd.crosstab(part.values(origin), part.values(name), values=weight, aggfunc="sum").fillna(0.0)
        v, p = cramers_v(counts)
        one_class = counts.index[(counts > 0).sum(axis=1) == 1].tolist()
        pure = f"; one class only at {_listed(one_class)}" if one_class else ""
        strong = p < 0.05 and (v >= 0.3 or bool(one_class))
        found.append(
            Finding(
                kind="origin-and-label",
                severity="warning" if strong else "note",
                message=f"{origin} and {name}: Cramer's V {v:.2f}, p {p:.2g} over {group.max() + 1} patients{pure}",
            )
        )
    return found


def _name_findings(cohort: Cohort, target: str, severity: Severity, seed: int) -> list[Finding]:
    """Whether `target` can be told from file, path or slide name, on patients not seen."""
    try:
        name = cohort.column(target)
    except CohortError:
        return []
    part = cohort.take(rows) if (rows := cohort.table[name].notna().to_numpy()).any() else None
    if part is None:
        return []
    found = []
    for source in (one for one in ("file", "path", "slide_id") if one in part.table and one != name):
        cells = texts(series(part.table, source))
        if len(set(cells)) < 2:
            continue
        tell = name_tell(cells, part.values(name), part.group_key(), seed=seed)
        if tell is not None and tell.tells:
            found.append(
                Finding(kind="name-tells", severity=severity, message=_tell_message(source, name, tell)),
            )
    return found


def _tell_message(source: str, target: str, tell: NameTell) -> str:
    return (
        f"{target} can be told from {source}: AUROC {tell.auroc:.2f} on unseen patients (n {tell.n}), where "
        f"{tell.shuffles} shuffles of {target} gave {tell.low:.2f} to {tell.high:.2f}; "
        f"{target} goes with the order or the folder of collection: keep names away from the model"
    )
