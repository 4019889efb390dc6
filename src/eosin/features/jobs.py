"""What is to be done: slides named by files, folders or cohort tables, as an ordered list of jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eosin.errors import CohortError
from eosin.geometry import check_mpp
from eosin.slides import find_slides, open_slide
from eosin.tiles import TissueMask, tissue_mask

if TYPE_CHECKING:
    from eosin.slides import Slide

GEOJSON_SUFFIXES = (".geojson", ".json")
MASK_SUFFIXES = (*GEOJSON_SUFFIXES, ".png", ".tif", ".tiff", ".npy")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
_ALIASES = {
    "path": ("path", "file", "slide_path", "image_path", "wsi", "filename"),
    "slide_id": ("slide_id", "slide", "sample_id", "id"),
    "mpp": ("mpp", "slide_mpp", "spacing_at_level_0"),
    "mask": ("mask", "mask_path", "tissue"),
    "roi": ("roi", "roi_path"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One slide to extract.

    Attributes:
        slide_id: key in the store: posix path relative to the input root, suffix kept.
        source: the file, or an open slide.
        mpp: microns per level-0 pixel supplied by the user, None to take the file's own.
        mask: external tissue mask (image or GeoJSON), None to segment.
        roi: GeoJSON of regions of interest, None for the whole slide.
        icc: whether to convert to sRGB through the embedded profile.
    """

    slide_id: str
    source: Path | Slide
    mpp: float | None = None
    mask: Path | None = None
    roi: Path | None = None
    icc: bool = False

    def open(self) -> Slide:
        """Return the slide, opened with what the user supplied."""
        if not isinstance(self.source, Path):
            return self.source
        return open_slide(self.source, mpp=self.mpp, icc=self.icc)

    def tissue(self, slide: Slide) -> TissueMask:
        """Return the supplied mask of the open `slide`, or segment it."""
        if self.mask is None:
            return tissue_mask(slide)
        if self.mask.suffix.lower() in GEOJSON_SUFFIXES:
            return TissueMask.from_geojson(self.mask, slide)
        return TissueMask.from_image(self.mask, slide)

    def inputs_hash(self, fingerprint: str) -> str:
        """Return what identifies everything the user gave for this slide.

        The slide's own `fingerprint` when nothing was added to it; otherwise sha256 over it,
        the supplied mpp and the bytes of mask and region files.
        """
        if self.mpp is None and self.mask is None and self.roi is None:
            return fingerprint
        total = hashlib.sha256(f"{fingerprint} mpp={self.mpp!r}".encode())
        for name, path in (("mask", self.mask), ("roi", self.roi)):
            total.update(f" {name}=".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest() if path is not None else b"none")
        return total.hexdigest()


def find_jobs(
    inputs: Sequence[Path | str],
    *,
    slide_mpp: float | None = None,
    masks: Path | None = None,
) -> list[Job]:
    """Return one job a slide, sorted by slide id.

    Args:
        inputs: slides, folders (searched recursively) and cohort tables
            (.csv, .tsv, .parquet with a column ``path`` and, optionally, ``slide_id``, ``mpp``,
            ``mask``, ``roi``; relative paths count from the table's folder).
        slide_mpp: microns per level-0 pixel for slides whose table row gives none.
        masks: folder of tissue masks named ``<slide_id>.geojson`` (or .png, .tif, .npy), as
            extraction leaves them in ``tissue/``; slides without one are segmented.

    Raises:
        CohortError: nothing found, a missing path, or two slides that share an id.
        ImplausibleMppError: an mpp outside 0.05-5.
    """
    if slide_mpp is not None:
        check_mpp(slide_mpp, "--slide-mpp")
    jobs: list[Job] = []
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise CohortError(f"{path}: no such file or folder")
        if path.suffix.lower() in TABLE_SUFFIXES:
            jobs += _from_table(path)
        else:
            jobs += [Job(slide_id=slide_id, source=file) for slide_id, file in find_slides(path)]
    if not jobs:
        raise CohortError(f"no slides found in {', '.join(str(p) for p in inputs)}; give a slide, a folder or a table")
    first: dict[str, Job] = {}
    for job in jobs:
        other = first.setdefault(job.slide_id, job)
        if other is not job:
            raise CohortError(
                f"two slides would both be called {job.slide_id!r}: {other.source} and {job.source}; "
                "give their common folder, or a table with a slide_id column"
            )
    jobs.sort(key=lambda job: job.slide_id)
    return [
        replace(
            job,
            mpp=slide_mpp if job.mpp is None else job.mpp,
            mask=_mask_in(masks, job.slide_id) if job.mask is None and masks is not None else job.mask,
        )
        for job in jobs
    ]


def _mask_in(folder: Path, slide_id: str) -> Path | None:
    names = (folder / f"{slide_id}{suffix}" for suffix in MASK_SUFFIXES)
    return next((path for path in names if path.is_file()), None)


def shard_jobs(jobs: Sequence[Job], shard: tuple[int, int] | None) -> list[Job]:
    """Return every n-th job for shard (i, n), i counted from 1: disjoint, and together all."""
    if shard is None:
        return list(jobs)
    index, count = shard
    if not 1 <= index <= count:
        raise CohortError(f"shard {index}/{count} is not between 1/{count} and {count}/{count}")
    return list(jobs[index - 1 :: count])


def _from_table(path: Path) -> list[Job]:
    import pandas as pd

    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", dtype=str)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise CohortError(f"{path}: cannot be read as a table ({error})") from error
    lower = {str(column).strip().lower(): column for column in table.columns}
    columns = {key: next((lower[a] for a in names if a in lower), None) for key, names in _ALIASES.items()}
    if columns["path"] is None:
        raise CohortError(f"{path}: needs a column 'path'; it has {', '.join(map(str, table.columns))}")
    return [_from_row(path, number, row, columns) for number, row in enumerate(table.to_dict("records"), start=2)]


def _from_row(table: Path, number: int, row: dict, columns: dict[str, str | None]) -> Job:
    def cell(key: str) -> str | None:
        value = row.get(columns[key]) if columns[key] is not None else None
        text = "" if value is None or value != value else str(value).strip()
        return text or None

    def file(key: str) -> Path | None:
        text = cell(key)
        if text is None:
            return None
        found = Path(text) if Path(text).is_absolute() else table.parent / text
        if not found.exists():
            raise CohortError(f"{table}, row {number}: {key} {text!r} does not exist")
        return found

    path = file("path")
    if path is None:
        raise CohortError(f"{table}, row {number}: the path is empty")
    mpp_text = cell("mpp")
    try:
        mpp = None if mpp_text is None else check_mpp(float(mpp_text), f"{table}, row {number}")
    except ValueError as error:
        raise CohortError(f"{table}, row {number}: mpp {mpp_text!r} is not a plausible number ({error})") from error
    try:
        default_id = path.resolve().relative_to(table.parent.resolve()).as_posix()
    except ValueError:
        default_id = path.name
    slide_id = cell("slide_id") or default_id
    if slide_id.startswith(("/", "..")) or ".." in Path(slide_id).parts:
        raise CohortError(f"{table}, row {number}: slide_id {slide_id!r} would leave the output folder")
    return Job(slide_id=slide_id, source=path, mpp=mpp, mask=file("mask"), roi=file("roi"))
