"""Which files under a path are slides."""

from __future__ import annotations

import os
import re
from pathlib import Path

from eosin.errors import SlideError

SLIDE_SUFFIXES = (
    ".svs",
    ".tif",
    ".tiff",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".bif",
    ".svslide",
    ".vms",
    ".vmu",
    ".dcm",
    ".png",
    ".jpg",
    ".jpeg",
)
DICOM_SUFFIX = ".dcm"
_HEAD_BYTES = 64 * 1024
# (0020,000E) SeriesInstanceUID, explicit little endian: tag, "UI", length, value.
_SERIES_UID = re.compile(rb"\x20\x00\x0e\x00UI..([0-9.]{1,64})", re.DOTALL)


def find_slides(path: str | os.PathLike[str]) -> list[tuple[str, Path]]:
    """Return (relative id, path) of every slide at or under `path`, sorted by id.

    The id is the POSIX path relative to `path`, suffix kept; for a single file its name. A
    folder of DICOM files of one series is one slide, named by the folder; in a folder of
    several series each is named by its first file. MRXS data folders and the image files of
    VMS slides are companions, not slides. Hidden files and folders are left out.

    Raises:
        SlideError: no such file or folder.
    """
    root = Path(path)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise SlideError(f"{root}: no such file or folder")
    found: list[tuple[str, Path]] = []
    for folder, names, files in os.walk(root, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        here = Path(folder)
        found.extend(_slides_in(here, root, [here / name for name in sorted(files) if not name.startswith(".")]))
        # An MRXS data folder bears its slide's name.
        owned = {Path(name).stem for name in files if name.lower().endswith(".mrxs")}
        names[:] = [name for name in names if name not in owned]
    return sorted(found)


def _slides_in(folder: Path, root: Path, files: list[Path]) -> list[tuple[str, Path]]:
    dicom = [file for file in files if file.suffix.lower() == DICOM_SUFFIX]
    slides = [file for file in files if file.suffix.lower() in SLIDE_SUFFIXES and file not in dicom]
    if any(file.suffix.lower() in (".vms", ".vmu") for file in files):
        slides = [file for file in slides if file.suffix.lower() not in (".jpg", ".jpeg", ".tif")]
    series: dict[str, Path] = {}
    for file in dicom:
        series.setdefault(series_uid(file), file)
    if len(series) == 1:
        slides.append(folder)
    else:
        slides.extend(series.values())
    return [(root.name if slide == root else slide.relative_to(root).as_posix(), slide) for slide in slides]


def series_uid(path: Path) -> str:
    """Return the DICOM SeriesInstanceUID of a file, or "" when its first 64 KiB hold none."""
    with path.open("rb") as file:
        match = _SERIES_UID.search(file.read(_HEAD_BYTES))
    return match.group(1).decode() if match else ""


def companions(path: Path) -> list[Path]:
    """Return the further files that belong to the slide at `path`, sorted by name."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() == DICOM_SUFFIX)
    if path.suffix.lower() == DICOM_SUFFIX:
        uid = series_uid(path)
        beside = (f for f in path.parent.iterdir() if f.suffix.lower() == DICOM_SUFFIX and f != path)
        return sorted(file for file in beside if series_uid(file) == uid)
    if path.suffix.lower() == ".mrxs" and (folder := path.with_suffix("")).is_dir():
        return sorted(file for file in folder.iterdir() if file.is_file())
    return []
