"""What a TIFF's directories say before any reader opens it: cut short, holes, colours."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from eosin.errors import CorruptSlideError

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BROKEN = (tifffile.TiffFileError, struct.error, IndexError, KeyError, ValueError, TypeError, EOFError)


@dataclass(frozen=True, slots=True)
class TiffFacts:
    """Facts of one TIFF file.

    Attributes:
        ome: whether it carries OME-XML.
        sub_ifds: whether its first page carries a pyramid in SubIFDs.
        eight_bit_colour: whether its first page is 8-bit with 1, 3 or 4 samples.
        holes: (width, height) of pages that lack some of their tiles on purpose (byte count 0).
    """

    ome: bool
    sub_ifds: bool
    eight_bit_colour: bool
    holes: frozenset[tuple[int, int]]


def tiff_facts(path: Path) -> TiffFacts:
    """Walk the directories of `path`.

    Raises:
        CorruptSlideError: the directories are broken, or a page's tiles or strips lie beyond
            the end of the file.
    """
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = list(all_pages(tiff))
            if not pages or _chain_cut(tiff, size):
                raise CorruptSlideError(
                    f"{path}: truncated: a TIFF directory lies beyond the end of the file ({size:,} bytes)"
                )
            _check_cut(path, pages, size)
            first = pages[0]
            return TiffFacts(
                ome=bool(tiff.is_ome),
                sub_ifds=bool(first.subifds),
                eight_bit_colour=first.bitspersample == 8 and first.samplesperpixel in (1, 3, 4),
                holes=frozenset((page.imagewidth, page.imagelength) for page in pages if 0 in page.databytecounts),
            )
    except _BROKEN as error:
        raise CorruptSlideError(
            f"{path}: its TIFF directories cannot be read ({error}); copy the file again"
        ) from error


def all_pages(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    """Yield the pages in file order, each followed by its SubIFDs."""
    for page in tiff.pages:
        full = page.aspage()
        yield full
        for sub in (full.pages or ()) if full.subifds else ():
            yield sub.aspage()


def _chain_cut(tiff: tifffile.TiffFile, size: int) -> bool:
    """Return whether the last directory points to a further one beyond the end of the file."""
    last, layout = tiff.pages[-1].aspage(), tiff.tiff
    tiff.filehandle.seek(last.offset)
    (tags,) = struct.unpack(layout.tagnoformat, tiff.filehandle.read(layout.tagnosize))
    tiff.filehandle.seek(last.offset + layout.tagnosize + tags * layout.tagsize)
    pointer = tiff.filehandle.read(layout.offsetsize)
    if len(pointer) < layout.offsetsize:
        return True
    (following,) = struct.unpack(layout.offsetformat, pointer)
    return following >= size


def _check_cut(path: Path, pages: list[tifffile.TiffPage], size: int) -> None:
    cut = total = needed = 0
    for page in pages:
        offsets = np.asarray(page.dataoffsets, dtype=np.int64)
        counts = np.asarray(page.databytecounts, dtype=np.int64)
        if len(offsets) != len(counts):
            raise CorruptSlideError(f"{path}: a page has {len(offsets)} tile offsets and {len(counts)} byte counts")
        ends = np.where(counts > 0, offsets + counts, 0)
        cut += int((ends > size).sum())
        total += len(ends)
        needed = max(needed, int(ends.max(initial=0)))
    if cut:
        raise CorruptSlideError(
            f"{path}: truncated: {cut} of its {total} tiles lie beyond the end of the file "
            f"({size:,} bytes; at least {needed:,} needed); copy the file again"
        )
