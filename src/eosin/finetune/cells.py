"""Cells: one row a cell, with its picture, its label, who voted how, and where it comes from."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from eosin.errors import CohortError, GeometryError, LabelError
from eosin.finetune.aliases import slide_identity

TILE_PX = 128
TILE_MPP = 0.25
# Everything about a cell that is text.
TEXT_FIELDS = ("file", "dataset", "slide_id", "patient_id", "domain", "scanner", "tumour", "origin", "species")

Texts = npt.NDArray[np.str_]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class CellTable:
    """A validated table of n cells, in the order of the file it was read from.

    Attributes:
        root: the folder that `file` is relative to.
        file: (n,) picture of each cell, "" where there is none.
        label: int8 (n,), 1 = atypical, 0 = normal.
        soft: float32 (n,), share of atypical votes; the label where there are none.
        dataset: (n,) name of the set.
        slide_id: (n,) slide, "" where unknown; unique within a data set only.
        patient_id: (n,) "dataset/slide" as in `slide_keys`, or "dataset/patient" where the table names patients.
        domain: (n,) what training treats as one source of images; see `domain_name`.
        scanner: (n,) "" where unknown, as are `tumour`, `origin` and `species`.
        tumour: (n,) tumour type.
        origin: (n,) the laboratory or archive.
        species: (n,) species, in lower case.
        xy: float64 (n, 2) centre of the cell in level-0 pixels of its slide, or NaN.
        votes: expert -> int8 (n,), 1 = atypical, 0 = normal, -1 = did not vote.
        notes: what was found doubtful or put right while reading, in sentences.
    """

    root: Path
    file: Texts
    label: npt.NDArray[np.int8]
    soft: npt.NDArray[np.float32]
    dataset: Texts
    slide_id: Texts
    patient_id: Texts
    domain: Texts
    scanner: Texts
    tumour: Texts
    origin: Texts
    species: Texts
    xy: npt.NDArray[np.float64]
    votes: Mapping[str, npt.NDArray[np.int8]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse columns of different lengths and labels that are neither 0 nor 1."""
        n = len(self.label)
        sizes = {name: getattr(self, name).shape for name in TEXT_FIELDS}
        sizes |= {f"votes of {name}": column.shape for name, column in self.votes.items()}
        sizes |= {"label": self.label.shape, "soft": self.soft.shape, "xy": self.xy.shape[:1]}
        wrong = [f"{name} {shape}" for name, shape in sizes.items() if shape != (n,)]
        if wrong or self.xy.shape != (n, 2):
            raise CohortError(f"a table of {n} cells has columns of other shapes: {', '.join(wrong) or 'xy'}")
        if not np.isin(self.label, (0, 1)).all():
            raise LabelError(f"labels are 0 (normal) or 1 (atypical), found {np.setdiff1d(self.label, (0, 1))}")
        if not ((self.soft >= 0) & (self.soft <= 1)).all():
            raise LabelError("the share of atypical votes must lie in 0-1 in every row")

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.label)

    def __repr__(self) -> str:
        """Return one line: cells, classes, slides, domains."""
        groups, domains = len(np.unique(self.group_key())), len(np.unique(self.domain))
        return f"CellTable({len(self)} cells, {int(self.label.sum())} atypical, {groups} groups, {domains} domains)"

    def group_key(self) -> Texts:
        """Return the group of each cell, (n,): its patient, or else its slide as `slide_keys` names it.

        What is split, resampled and counted as one; never the cell.
        """
        slides = slide_keys(self.dataset, self.slide_id, self.file)
        return np.where(self.patient_id == "", slides, self.patient_id)

    def take(self, rows: npt.ArrayLike) -> CellTable:
        """Return the cells of `rows` (indices, or a mask (n,)), in that order."""
        at = np.asarray(rows)
        at = np.flatnonzero(at) if at.dtype == np.bool_ else at.astype(np.int64)
        return CellTable(
            root=self.root,
            label=self.label[at],
            soft=self.soft[at],
            xy=self.xy[at],
            votes={name: column[at] for name, column in self.votes.items()},
            notes=self.notes,
            **{name: getattr(self, name)[at] for name in TEXT_FIELDS},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainCount:
    """How many cells, slides and cells of each class one domain has, and what that forbids."""

    domain: str
    cells: int
    atypical: int
    normal: int
    groups: int
    note: str


def slide_keys(dataset: Texts, slide_id: Texts, file: Texts) -> Texts:
    """Return "dataset/slide" of each row, (n,).

    Slide names are used again in other sets, hence the set. Sets drawn from the same numbered slides share theirs,
    whatever each calls it (see `aliases.slide_identity`). A row without a slide stands alone, under its file or number.
    """
    keys = []
    for at, (where, slide, name) in enumerate(zip(dataset.tolist(), slide_id.tolist(), file.tolist(), strict=True)):
        collection, number = slide_identity(where, slide)
        keys.append(f"{collection}/{number or name or f'row {at}'}")
    return np.array(keys, dtype=np.str_)


def domain_name(*, tumour: str, scanner: str, origin: str, species: str, dataset: str) -> str:
    """Return "tumour | scanner | origin | species", what the challenge's ten training domains are told apart by.

    Unknown parts are left out, except that the data set's name stands in for an unknown scanner: two sets of
    unknown scanners are not one domain.
    """
    return " | ".join(part for part in (tumour, scanner or dataset, origin, species) if part)


def domain_counts(cells: CellTable) -> tuple[DomainCount, ...]:
    """Return one line a domain, in sorted order; a domain of one class, one cell or one slide says so in its note."""
    groups = cells.group_key()
    lines = []
    for domain in np.unique(cells.domain).tolist():
        rows = cells.domain == domain
        n, atypical = int(rows.sum()), int(cells.label[rows].sum())
        slides = len(np.unique(groups[rows]))
        note = ""
        if n == 1:
            note = "one cell: it has no balanced accuracy and no interval"
        elif atypical in (0, n):
            name = "normal" if atypical == 0 else "atypical"
            note = f"only {name} cells: balanced accuracy and AUROC are not defined here"
        elif slides == 1:
            note = "one slide: it cannot be split, and has no interval over slides"
        lines.append(
            DomainCount(domain=domain, cells=n, atypical=atypical, normal=n - atypical, groups=slides, note=note)
        )
    return tuple(lines)


def pool(tables: Sequence[CellTable]) -> CellTable:
    """Return the cells of several tables as one, files relative to the folder their roots share.

    Nothing is left out: see `eosin.finetune.duplicates` for sets that hold the same cells.

    Raises:
        CohortError: no table, or roots that share no folder.
    """
    if not tables:
        raise CohortError("no table of cells to pool")
    try:
        root = Path(os.path.commonpath([table.root.resolve() for table in tables]))
    except ValueError as error:
        raise CohortError(f"the tables lie on different drives and share no folder ({error})") from error
    texts = {name: np.concatenate([getattr(table, name) for table in tables]) for name in TEXT_FIELDS}
    moved = []
    for table in tables:
        below = table.root.resolve().relative_to(root)
        moved += [(below / name).as_posix() if name else "" for name in table.file.tolist()]
    texts["file"] = np.array(moved, dtype=np.str_)
    experts = dict.fromkeys(name for table in tables for name in table.votes)
    silent = [np.full(len(table), -1, dtype=np.int8) for table in tables]
    return CellTable(
        root=root,
        label=np.concatenate([table.label for table in tables]),
        soft=np.concatenate([table.soft for table in tables]),
        xy=np.concatenate([table.xy for table in tables]),
        votes={
            name: np.concatenate([t.votes.get(name, none) for t, none in zip(tables, silent, strict=True)])
            for name in experts
        },
        notes=tuple(dict.fromkeys(note for table in tables for note in table.notes)),
        **texts,
    )


def read_tiles(cells: CellTable, rows: npt.ArrayLike | None = None, *, tile_px: int = TILE_PX) -> npt.NDArray[np.uint8]:
    """Return the pictures of `rows` (all by default) as uint8 (n, tile_px, tile_px, 3).

    Raises:
        CohortError: a cell without a picture, or a file that is missing or unreadable.
        GeometryError: a picture of another size, with transparency, of 16 bits, or not of three colours.
    """
    files = cells.file if rows is None else cells.take(rows).file
    tiles = np.empty((len(files), tile_px, tile_px, 3), dtype=np.uint8)
    for at, name in enumerate(files.tolist()):
        if not name:
            raise CohortError(
                f"cell {at} has no picture; give the table a file column, or cut the crops from the slides"
            )
        tiles[at] = read_tile(cells.root / name, tile_px=tile_px)
    return tiles


def read_tile(path: Path, *, tile_px: int = TILE_PX) -> npt.NDArray[np.uint8]:
    """Return one picture as uint8 (tile_px, tile_px, 3); an alpha channel that is opaque everywhere is dropped.

    Raises:
        CohortError: the file is missing or unreadable.
        GeometryError: another size, transparency, 16 bits, or not three colours.
    """
    pixels, mode = read_picture(path)
    return check_tile(pixels, mode, str(path), tile_px=tile_px)


def read_picture(path: Path) -> tuple[npt.NDArray, str]:
    """Return the pixels of a file as stored, and what Pillow calls their kind ("RGB", "RGBA", "I;16" ...).

    Raises:
        CohortError: the file is missing or unreadable.
    """
    try:
        raw = path.read_bytes()
        with Image.open(io.BytesIO(raw)) as picture:
            pixels, mode = np.asarray(picture), picture.mode
    except FileNotFoundError as error:
        raise CohortError(f"{path}: no such picture; check the file column and the folder it is relative to") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises any of these at damaged files
        raise CohortError(f"{path}: cannot be read as a picture ({error}); copy it again") from error
    # Pillow reads 16-bit colour PNG as 8-bit without a word; the header's bit depth tells.
    if raw.startswith(b"\x89PNG") and raw[24] == 16:
        return pixels, f"16-bit {mode}"
    return pixels, mode


def check_tile(pixels: npt.NDArray, mode: str, where: str, *, tile_px: int = TILE_PX) -> npt.NDArray[np.uint8]:
    """Return `pixels` as uint8 (tile_px, tile_px, 3).

    Args:
        pixels: decoded picture (H, W, C).
        mode: what the decoder calls its kind, for the message.
        where: what the picture is called in errors.
        tile_px: side that is needed.

    Raises:
        GeometryError: another size, transparency, 16 bits, or not three colours.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or mode not in ("RGB", "RGBA"):
        raise GeometryError(
            f"{where}: found {mode} pixels, {pixels.dtype} {pixels.shape}; cell crops are 8-bit RGB, convert them first"
        )
    if pixels.shape[:2] != (tile_px, tile_px):
        raise GeometryError(
            f"{where}: {pixels.shape[1]} x {pixels.shape[0]} pixels where {tile_px} x {tile_px} are needed; "
            f"a cell crop is {tile_px} px at {TILE_MPP:g} microns per pixel: cut it anew from the slide, do not resize"
        )
    if pixels.shape[2] == 4 and (pixels[..., 3] != 255).any():
        raise GeometryError(f"{where}: the picture is partly transparent; lay it on its background first")
    return np.ascontiguousarray(pixels[..., :3])
