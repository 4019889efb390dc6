"""Which reader takes a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from eosin.errors import (
    CorruptSlideError,
    EosinError,
    MissingDependencyError,
    SlideError,
    UnsupportedSlideError,
    closest,
)
from eosin.slides.backend import Backend, Pixels
from eosin.slides.find import companions
from eosin.slides.image_backend import ImageBackend
from eosin.slides.openslide_backend import OpenSlideBackend, detect_vendor
from eosin.slides.tiff_backend import TiffBackend
from eosin.slides.tifffacts import TIFF_MAGIC, TiffFacts, tiff_facts

_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8", b"RIFF")
# These are not told by their first bytes: an MRXS index is a JPEG, a VMS index a text.
_OPENSLIDE_SUFFIXES = (".mrxs", ".vms", ".vmu")
_DICOM_AT = 128


def _open_dicom(path: Path) -> Backend:
    from eosin.slides.dicom_backend import DicomBackend

    return DicomBackend(path)


def _first_file(path: Path) -> Path:
    """Return `path`, or of a DICOM folder the file from which OpenSlide finds the others."""
    files = companions(path) if path.is_dir() else [path]
    if not files:
        raise UnsupportedSlideError(f"{path}: a folder without .dcm files is no slide")
    return files[0]


READERS: dict[str, Callable[[Path], Backend]] = {
    "openslide": lambda path: OpenSlideBackend(_first_file(path), fast=False),
    "tiff": TiffBackend,
    "dicom": _open_dicom,
    "image": ImageBackend.open,
}
"""What `reader=` may force."""


def open_backend(source: Path | Pixels, reader: str | None) -> Backend:
    """Open `source` with `reader`, or with the first reader that takes it.

    Raises:
        SlideError: no such file, or it may not be read.
        CorruptSlideError: empty, truncated, or without its companion files.
        UnsupportedSlideError: no reader takes it.
    """
    if reader is not None and reader not in READERS:
        raise UnsupportedSlideError(f"unknown reader {reader!r}; the closest are {closest(reader, READERS)}")
    if isinstance(source, np.ndarray):
        return ImageBackend.from_array(source)
    head = _head(source)
    facts = tiff_facts(source) if head.startswith(TIFF_MAGIC) else None
    if reader is not None:
        return READERS[reader](source)
    reasons: list[EosinError] = []
    for name in _candidates(source, head, facts):
        try:
            if name == "openslide":
                return OpenSlideBackend(_first_file(source), holes=facts.holes if facts else frozenset())
            return READERS[name](source)
        except (UnsupportedSlideError, CorruptSlideError, MissingDependencyError) as error:
            reasons.append(error)
    missing = [reason for reason in reasons if isinstance(reason, MissingDependencyError)]
    if len(reasons) == 1 or missing:
        raise (missing or reasons)[0]
    kind = CorruptSlideError if any(isinstance(r, CorruptSlideError) for r in reasons) else UnsupportedSlideError
    listed = "; ".join(str(reason).removeprefix(f"{source}: ") for reason in reasons)
    raise kind(f"{source}: no reader takes it: {listed}")


def _head(path: Path) -> bytes:
    """Return the first bytes of a file, b"" for a folder."""
    if path.is_dir():
        return b""
    try:
        with path.open("rb") as file:
            head = file.read(_DICOM_AT + 4)
    except FileNotFoundError as error:
        raise SlideError(f"{path}: no such file") from error
    except OSError as error:
        raise SlideError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CorruptSlideError(f"{path}: the file is empty (0 bytes); copy it again")
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        raise CorruptSlideError(f"{path}: its data folder {path.stem}/ is missing; copy it beside the .mrxs file")
    return head


def _candidates(path: Path, head: bytes, facts: TiffFacts | None) -> tuple[str, ...]:
    if path.is_dir() or head[_DICOM_AT:].startswith(b"DICM"):
        # wsidicom reads every level's own pixels; OpenSlide interpolates where a downsample is no whole number.
        return ("dicom", "openslide")
    if path.suffix.lower() in _OPENSLIDE_SUFFIXES:
        return ("openslide",)
    if facts is not None:
        generic = detect_vendor(path) in (None, "generic-tiff")
        # OpenSlide's generic reader sees no SubIFDs, no OME units, and quietly scales other depths.
        if generic and (facts.ome or facts.sub_ifds or not facts.eight_bit_colour):
            return ("tiff",)
        return ("openslide", "tiff")
    if head.startswith(_IMAGE_MAGIC):
        return ("image",)
    return ("openslide", "image")
