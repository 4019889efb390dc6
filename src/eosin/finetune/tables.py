"""Tables of cells: MIDOG 2025, AMi-Br, AtNorM, OMG-Octo, folders of two classes, and any other with its columns."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.cohort.reading import frame_cells, read_cells, row_phrase, spelling_twins, squeeze
from eosin.errors import CohortError, GeometryError, LabelError, closest
from eosin.finetune.aliases import SET_SOURCES, Source, class_of, dataset_name, scanner_name, slide_identity
from eosin.finetune.cells import TILE_MPP, CellTable, Texts, domain_name, slide_keys
from eosin.finetune.votes import expert_of, read_labels, read_votes, soft_labels, texts_of

# The scanners of the MIDOG sets lie between 0.23 and 0.25, and their crops are called 0.25.
MPP_TOLERANCE = 0.1
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
TABLE_NAMES = (
    "labels.csv",
    "MIDOG25_Atypical_Classification_Train_Set.csv",
    "MIDOG25.csv",
    "AMI-BR.csv",
    "OMG-Octo.csv",
    "AtNorM-MD_expert_votes.csv",
)
# Field of a cell -> names of its column in tables of no known kind, without case, spaces, underscores, dots, hyphens.
COLUMN_NAMES: Mapping[str, tuple[str, ...]] = {
    "file": ("file", "imageid", "image", "crop", "tile", "path", "filename", "datasetuid"),
    "slide_id": ("slideid", "slide", "wsi", "slidename"),
    "patient_id": ("patientid", "patient", "case", "caseid", "subject"),
    "dataset": ("dataset", "cohort", "study"),
    "scanner": ("scanner", "scannermodel"),
    "tumour": ("tumour", "tumor", "tumourtype", "tumortype"),
    "origin": ("origin", "site", "center", "centre", "hospital", "institution"),
    "species": ("species",),
    "x": ("x", "coordinatex", "centerx", "centrex"),
    "y": ("y", "coordinatey", "centery", "centrey"),
    "label": ("atypical", "majorityatypical", "isatypical", "label", "majority", "class", "finallabel"),
    "votes": ("votes",),
    "mpp": ("mpp",),
}
_SET_OF_PICTURE = (
    (re.compile(r"MIDOG21_\d+\.\w+"), "midog21"),
    (re.compile(r"TUPAC16_\d+\.\w+"), "tupac16"),
    (re.compile(r"\w+_x\d+_y\d+_\d+_\d+_\d+_\d+\.\w+"), "omg-octo"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one kind of table says what a cell is.

    Attributes:
        name: of the kind.
        columns: field of a cell -> column.
        dataset: the set all rows belong to, "" where rows or pictures say so.
        picture: how a picture is named, in terms of the table's columns, where no column names it.
    """

    name: str
    columns: Mapping[str, str]
    dataset: str = ""
    picture: str = ""


LAYOUTS = (
    Layout(
        name="MIDOG 2025",
        dataset="midog25",
        columns={
            "file": "image_id",
            "slide_id": "filename",
            "x": "coordinateX",
            "y": "coordinateY",
            "tumour": "Tumor",
            "scanner": "Scanner",
            "origin": "Origin",
            "species": "Species",
            "label": "majority",
        },
    ),
    Layout(
        name="AMi-Br",
        columns={"slide_id": "slide", "dataset": "dataset", "x": "x", "y": "y", "label": "majority_atypical"},
        picture="{dataset}_{uid}.png",
    ),
    Layout(name="AtNorM", dataset="atnorm-md", columns={"file": "Filename", "label": "Majority"}),
    Layout(name="OMG-Octo", columns={"file": "image_id", "slide_id": "filename", "label": "majority"}),
)


def read_table(
    source: Path | str | pd.DataFrame,
    *,
    root: Path | str | None = None,
    dataset: str = "",
    mpp: float = TILE_MPP,
) -> CellTable:
    """Return the validated cells of a table, or of a folder that holds one or has the folders Atypical and Normal.

    The kind of a table is told by its columns. Pictures are looked for, first by the path given and then by name
    anywhere under `root`; with none at all the table is read without pictures (its notes say so), with some it is
    refused. The label column stands where votes disagree with it, in up to 5 % of rows, and the notes count them.

    Args:
        source: .csv, .tsv or .parquet, a folder, or a data frame.
        root: the folder with the pictures; the table's own folder by default, for a data frame the current one.
        dataset: the set's name, for tables that do not say.
        mpp: microns per pixel of the crops, for tables that say theirs.

    Raises:
        CohortError: no such file, no table of cells, a column missing, or some of the pictures missing.
        LabelError: labels or votes that are no known word, or that contradict each other.
        GeometryError: a column mpp with other values.
    """
    if isinstance(source, pd.DataFrame):
        cells, where, folder = frame_cells(source), "data frame", None
        stem = "table"
    else:
        path = Path(source)
        if path.is_dir():
            found = _table_in(path)
            if found is None:
                return _read_folders(path, dataset or path.resolve().name)
            path = found
        cells, where, folder = read_cells(path), str(path), path.parent
        stem = path.stem
    if cells.empty:
        raise CohortError(f"{where}: the table has no rows")
    layout = recognise(list(map(str, cells.columns)), where)
    dataset = dataset or layout.dataset or stem
    return _build(cells, layout, where=where, root=folder if root is None else Path(root), dataset=dataset, mpp=mpp)


def _table_in(folder: Path) -> Path | None:
    for name in TABLE_NAMES:
        if (folder / name).is_file():
            return folder / name
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".parquet"))
    if len(tables) > 1:
        raise CohortError(f"{folder} holds {len(tables)} tables ({tables[0].name}, ...); name the one to read")
    return tables[0] if tables else None


def _read_folders(root: Path, dataset: str) -> CellTable:
    """Return the cells of a folder with one subfolder a class."""
    rows = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if class_of(folder.name) is not None:
            names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICTURES)
            rows += [{"file": f"{folder.name}/{name}", "label": folder.name} for name in names]
    if not rows:
        raise CohortError(
            f"{root} holds no table of cells ({', '.join(TABLE_NAMES[:3])} or one other .csv) "
            "and no folders Atypical and Normal with pictures"
        )
    table = pd.DataFrame(rows, index=pd.RangeIndex(2, len(rows) + 2))
    layout = Layout(name="folders", columns={"file": "file", "label": "label"})
    return _build(table, layout, where=str(root), root=root, dataset=dataset, mpp=TILE_MPP)


def _build(
    cells: pd.DataFrame, layout: Layout, *, where: str, root: Path | None, dataset: str, mpp: float
) -> CellTable:
    columns = {field: texts_of(cells, name) for field, name in layout.columns.items()}
    experts = {name: number for name in map(str, cells.columns) if (number := expert_of(name))}
    n, notes = len(cells), _unused(cells, layout, experts)
    _check_mpp(columns.get("mpp"), cells, where, mpp)
    blank = np.full(n, "", dtype=np.str_)
    files = columns.get("file", blank) if not layout.picture else _picture_names(cells, layout.picture)
    sets = _sets(columns.get("dataset"), files, dataset)
    label = read_labels(columns["label"], layout.columns["label"], cells, where)
    votes = read_votes(cells, columns.get("votes"), experts, where)
    soft, disagreeing = soft_labels(label, votes, cells, where)
    slides = columns.get("slide_id", blank)
    source = {name: columns.get(name, blank) for name in ("tumour", "scanner", "origin", "species")}
    source = _tidy_sources(source, sets)
    first, repeated = _first_of_each(columns, files, label, cells, where)
    # A data frame without a root says nothing of where to look; the folder one happens to be in is not searched.
    found, missing = find_pictures(root or Path(), files, where, search=root is not None)
    return CellTable(
        root=root or Path(),
        file=found,
        label=label,
        soft=soft,
        dataset=sets,
        slide_id=slides,
        patient_id=_patients(columns.get("patient_id"), sets, slides, files),
        domain=_domains(source, sets),
        xy=_positions(columns, cells, where),
        votes=votes,
        notes=(
            f"{where}: read as {layout.name}, {n} cells",
            *notes,
            *repeated,
            *missing,
            *disagreeing,
            *_twins(source),
        ),
        **source,
    ).take(first)


def recognise(names: Sequence[str], where: str) -> Layout:
    """Return the kind of table that has these columns.

    Raises:
        CohortError: no column holds the label, or nothing says which picture or position a row is of.
    """
    for layout in LAYOUTS:
        told = set(layout.columns.values()) | set(re.findall(r"\{(\w+)\}", layout.picture))
        if told <= set(names):
            return layout
    columns: dict[str, str] = {}
    for field, spellings in COLUMN_NAMES.items():
        fits = [name for spelling in spellings for name in names if squeeze(name) == spelling]
        free = [name for name in fits if name not in columns.values()]
        if free:
            columns[field] = free[0]
    if "label" not in columns:
        raise CohortError(
            f"{where}: no column says which cells are atypical; it has {', '.join(names)}. Call it atypical (0 or 1) "
            f"or label (atypical, normal); closest: {closest('atypical', names)}"
        )
    if "file" not in columns and not {"slide_id", "x", "y"} <= columns.keys():
        raise CohortError(
            f"{where}: no column names a picture (file) or a position (slide_id, x and y); it has {', '.join(names)}"
        )
    return Layout(name="table", columns=columns)


def _unused(cells: pd.DataFrame, layout: Layout, experts: Mapping[str, str]) -> list[str]:
    used = set(layout.columns.values()) | set(re.findall(r"\{(\w+)\}", layout.picture)) | experts.keys()
    rest = [name for name in map(str, cells.columns) if name and name not in used]
    return [f"columns not used: {', '.join(rest)}"] if rest else []


def _check_mpp(column: Texts | None, cells: pd.DataFrame, where: str, mpp: float) -> None:
    if column is None:
        return
    values = _numbers(column)
    wrong = ~(np.abs(values / mpp - 1) <= MPP_TOLERANCE) & (column != "")
    if wrong.any():
        raise GeometryError(
            f"{where}, {row_phrase(cells.index[wrong])}: mpp {column[wrong][0]} where crops of {mpp:g} microns per "
            "pixel are needed; cut these crops anew from their slides at that resolution, or leave the rows out"
        )


def _numbers(column: Texts) -> npt.NDArray[np.float64]:
    """Return the finite numbers that the texts are, NaN for all else."""
    values = np.full(len(column), np.nan)
    for at, text in enumerate(column.tolist()):
        try:
            values[at] = float(text)
        except ValueError:
            continue
    return np.where(np.isfinite(values), values, np.nan)


def _picture_names(cells: pd.DataFrame, pattern: str) -> Texts:
    return np.array([pattern.format_map(row) for row in cells.to_dict("records")], dtype=np.str_)


def _sets(column: Texts | None, files: Texts, default: str) -> Texts:
    """Return the data set of each row: as the table says, as the picture's name gives away, or `default`."""
    if column is not None and (column != "").all():
        return np.array([dataset_name(name) for name in column.tolist()], dtype=np.str_)
    told = []
    for at, name in enumerate(files.tolist()):
        given = "" if column is None else str(column[at])
        base = name.rsplit("/", 1)[-1]
        by_name = next((known for pattern, known in _SET_OF_PICTURE if pattern.fullmatch(base)), "")
        told.append(dataset_name(given or by_name or default))
    return np.array(told, dtype=np.str_)


def _tidy_sources(source: Mapping[str, Texts], sets: Texts) -> dict[str, Texts]:
    """Return one spelling of each source, with what is known of a whole set filled in."""
    tidy = {}
    for field, column in source.items():
        known = [getattr(SET_SOURCES.get(name, Source()), field) for name in sets.tolist()]
        texts = [text or fallback for text, fallback in zip(column.tolist(), known, strict=True)]
        spell = scanner_name if field == "scanner" else str.casefold if field in ("species", "tumour") else str
        tidy[field] = np.array([spell(text) for text in texts], dtype=np.str_)
    return tidy


def _domains(source: Mapping[str, Texts], sets: Texts) -> Texts:
    names = [
        domain_name(tumour=tumour, scanner=scanner, origin=origin, species=species, dataset=name)
        for tumour, scanner, origin, species, name in zip(
            *(source[field].tolist() for field in ("tumour", "scanner", "origin", "species")),
            sets.tolist(),
            strict=True,
        )
    ]
    return np.array(names, dtype=np.str_)


def _twins(source: Mapping[str, Texts]) -> list[str]:
    return [
        f"{field}: {one!r} and {other!r} look like one; if so, give both the same spelling"
        for field in ("scanner", "tumour", "origin")
        for one, other in spelling_twins(text for text in source[field].tolist() if text)
    ]


def _patients(column: Texts | None, sets: Texts, slides: Texts, files: Texts) -> Texts:
    keys = slide_keys(sets, slides, files)
    if column is None:
        return keys
    rows = zip(keys.tolist(), column.tolist(), sets.tolist(), strict=True)
    return np.array([f"{slide_identity(name, '')[0]}/{own}" if own else key for key, own, name in rows], dtype=np.str_)


def _positions(columns: Mapping[str, Texts], cells: pd.DataFrame, where: str) -> npt.NDArray[np.float64]:
    xy = np.full((len(cells), 2), np.nan)
    for at, axis in enumerate("xy"):
        column = columns.get(axis)
        if column is None:
            continue
        values = _numbers(column)
        wrong = np.isnan(values) & (column != "")
        if wrong.any():
            raise CohortError(
                f"{where}, {row_phrase(cells.index[wrong])}: {axis} {str(column[wrong][0])!r} is not a number of pixels"
            )
        xy[:, at] = values
    return xy


def _first_of_each(
    columns: Mapping[str, Texts], files: Texts, label: npt.NDArray[np.int8], cells: pd.DataFrame, where: str
) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Return which rows (n,) do not repeat the picture or the position of an earlier one, and a note on those that do.

    Raises:
        LabelError: a repeated row has another label.
    """
    blank = np.full(len(label), "", dtype=np.str_)
    sets, slides, x, y = (columns.get(name, blank).tolist() for name in ("dataset", "slide_id", "x", "y"))
    places = [(a, b, c, d) if b and c and d else None for a, b, c, d in zip(sets, slides, x, y, strict=True)]
    pictures = [(a, b) if b else None for a, b in zip(sets, files.tolist(), strict=True)]
    first = np.ones(len(label), dtype=np.bool_)
    for what, keys in (("picture", pictures), ("position", places)):
        seen: dict[tuple[str, ...], int] = {}
        for at, key in enumerate(keys):
            other = at if key is None else seen.setdefault(key, at)
            first[at] &= other == at
            if label[other] != label[at]:
                shown = " ".join(part for part in keys[at] or () if part)
                raise LabelError(
                    f"{where}, {row_phrase(cells.index[[other, at]])}: the same {what} ({shown}) with different "
                    "labels; keep one row a cell"
                )
    again = cells.index[~first]
    return first, [f"{row_phrase(again)} repeat an earlier cell and were left out"] if len(again) else []


def find_pictures(root: Path, names: Texts, where: str, *, search: bool = True) -> tuple[Texts, list[str]]:
    """Return the path of each picture relative to `root`, all "" when none is there, and a note in that case.

    Args:
        root: the folder.
        names: (n,) as the table has them, "" where a cell has none.
        where: what the table is called in errors.
        search: look for those that are not where the table says by their name, anywhere under `root`.

    Raises:
        CohortError: some pictures are missing, or one name fits several files.
    """
    wanted = names[names != ""]
    if not len(wanted):
        return names, []
    there = {name: name for name in wanted.tolist() if (root / name).is_file()}
    if search and len(there) < len(wanted) and root.is_dir():
        there |= _by_name(root, [name for name in wanted.tolist() if name not in there])
    missing = [name for name in wanted.tolist() if name not in there]
    if len(missing) == len(wanted):
        note = f"pictures: none of the {len(wanted)} (first: {missing[0]}) was found under {root}"
        return np.full(len(names), "", dtype=np.str_), [note]
    if missing:
        raise CohortError(
            f"{where}: {len(missing)} of {len(wanted)} pictures are missing under {root} (first: {missing[0]}); "
            "fetch them, or take their rows out of the table"
        )
    return np.array([there.get(name, "") for name in names.tolist()], dtype=np.str_), []


def _by_name(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return name -> path relative to `root`, for pictures that lie anywhere under it."""
    short = {name: name.rsplit("/", 1)[-1] for name in names}
    wanted, places = set(short.values()), {}
    for folder, _, files in os.walk(root):
        for file in wanted.intersection(files):
            places.setdefault(file, []).append((Path(folder) / file).relative_to(root).as_posix())
    double = next((file for file, paths in places.items() if len(paths) > 1), "")
    if double:
        raise CohortError(
            f"{double} lies in {' and '.join(sorted(places[double])[:2])} under {root}; say which folder holds this "
            "table's pictures"
        )
    return {name: places[base][0] for name, base in short.items() if base in places}


def read_sources(path: Path | str) -> dict[tuple[str, str], Source]:
    """Return (collection, slide) -> source, from MIDOG++'s table of slides (datasets_xvalidation.csv).

    Raises:
        CohortError: no such file, or columns missing.
    """
    path = Path(path)
    cells = read_cells(path)
    fields = {"tumour": "Tumor", "scanner": "Scanner", "origin": "Origin", "species": "Species"}
    missing = [name for name in ("Slide", *fields.values()) if name not in cells.columns]
    if missing:
        raise CohortError(f"{path}: no column {missing[0]}; it has {', '.join(map(str, cells.columns))}")
    slides = [slide_identity("midog++", text) for text in cells["Slide"].tolist()]
    columns = {field: texts_of(cells, name) for field, name in fields.items()}
    tidy = _tidy_sources(columns, np.full(len(cells), "midog++", dtype=np.str_))
    return {key: Source(**{field: str(tidy[field][at]) for field in fields}) for at, key in enumerate(slides)}


def with_sources(cells: CellTable, sources: Mapping[tuple[str, str], Source]) -> CellTable:
    """Return `cells` with unknown tumour, scanner, origin and species taken from their slides, and new domains."""
    keys = [slide_identity(a, b) for a, b in zip(cells.dataset.tolist(), cells.slide_id.tolist(), strict=True)]
    filled = {}
    for field in ("tumour", "scanner", "origin", "species"):
        own = getattr(cells, field).tolist()
        theirs = [getattr(sources.get(key, Source()), field) for key in keys]
        filled[field] = np.array([a or b for a, b in zip(own, theirs, strict=True)], dtype=np.str_)
    return replace(cells, **filled, domain=_domains(filled, cells.dataset))
