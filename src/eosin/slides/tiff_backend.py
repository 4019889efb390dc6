"""The tifffile reader: OME-TIFF and generic TIFF, tiles or strips, 8-bit grey, RGB or RGBA."""

from __future__ import annotations

import os
import threading
import xml.etree.ElementTree as ET
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from eosin.errors import CorruptSlideError, RegionError, UnsupportedSlideError
from eosin.slides.backend import WHITE, Pixels, frame_size, read_padded, to_rgb
from eosin.slides.jpegtiles import JpegTiles
from eosin.slides.ledger import MppLedger, from_aperio, from_ome, from_tiff_resolution, number
from eosin.slides.tifffacts import all_pages, tiff_facts

CACHE_BYTES = 128 * 2**20
_MAX_SEGMENT_PIXELS = 200_000_000
_COLOURS = (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR, PHOTOMETRIC.MINISBLACK)
_NEEDED = "8-bit grey, RGB or RGBA brightfield is needed"


class TiffBackend:
    """One TIFF, its levels taken from SubIFDs or from further pages of the same picture."""

    def __init__(self, path: Path, *, fast: bool = True) -> None:
        """Open `path`; with `fast`, JPEG tiles are decoded directly and at reduced scales.

        Raises:
            UnsupportedSlideError: not a TIFF, or not 8-bit grey, RGB or RGBA.
            CorruptSlideError: truncated.
        """
        try:
            tiff = tifffile.TiffFile(path)
        except tifffile.TiffFileError as error:
            raise UnsupportedSlideError(f"{path}: tifffile: {error}") from error
        facts = tiff_facts(path)
        with tiff:
            pages = list(all_pages(tiff))
            base = max(pages, key=lambda page: page.imagewidth * page.imagelength)
            ome = _ome_pixels(tiff.ome_metadata, base) if tiff.ome_metadata else None
            _check_colour(path, base, pages, ome)
            levels = _levels(base, pages)
            others = [page for page in pages if not any(page is level for level in levels)]
            self._levels = [_Segments(path, page) for page in levels]
            self._associated = {_page_name(page): _Segments(path, page) for page in others if _readable(page)}
            self.mpp = _ledger(base, ome)
            self.properties = {
                "tiff.ImageDescription": base.description,
                "tiff.Make": str(base.tags.valueof(271) or ""),
                "tiff.Model": str(base.tags.valueof(272) or ""),
                "tiff.Software": base.software,
                "tiff.Compression": COMPRESSION(base.compression).name,
            }
            self.icc_profile = base.iccprofile
            self.compressions = tuple(int(page.compression) for page in levels)
        self._path = path
        self._fd: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._held = 0
        self.reader = f"tifffile {version('tifffile')}"
        self.level_sizes = tuple(segments.size for segments in self._levels)
        self.bounds = (0, 0, *self.level_sizes[0])
        self.background = WHITE
        self.associated = tuple(sorted(self._associated))
        self._fast = JpegTiles.open(path, self.level_sizes) if fast else None
        # A hole is transparent; only this reader's own path says so.
        self._direct = tuple(
            self._fast is not None and self._fast.has(i) and size not in facts.holes
            for i, size in enumerate(self.level_sizes)
        )
        self.level_scales = tuple(
            self._fast.scales(i) if self._fast is not None and direct else (1,) for i, direct in enumerate(self._direct)
        )
        if any(self._direct):
            self.reader += " + jpegtiles"

    def associated_image(self, name: str) -> Pixels:
        """Return a page that is no level, uint8 (H, W, 3)."""
        segments = self._associated[name]
        return self._assemble(segments, None, (0, 0), segments.size)[..., :3]

    def read_region(self, xy_px: tuple[int, int], *, level: int, scale: int, size_px: tuple[int, int]) -> Pixels:
        """Return a region of the read frame; see `Backend.read_region`."""
        fast = self._fast if self._direct[level] else None

        def inside(xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
            if fast is not None:
                return fast.read_region(xy, level=level, scale=scale, size_px=size)
            return self._assemble(self._levels[level], level, xy, size)

        frame = frame_size(self.level_sizes[level], scale)
        return read_padded(inside, xy_px=xy_px, size_px=size_px, frame_px=frame)

    def _assemble(self, segments: _Segments, level: int | None, xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        """Return the region from the tiles or strips that touch it; holes stay transparent."""
        (x, y), (width, height), (tile_w, tile_h) = xy, size, segments.tile
        out = np.zeros((height, width, 4), dtype=np.uint8)
        for row in range(y // tile_h, (y + height - 1) // tile_h + 1):
            for column in range(x // tile_w, (x + width - 1) // tile_w + 1):
                tile = self._segment(segments, level, row * segments.columns + column)
                if tile is None:
                    continue
                top, left = row * tile_h - y, column * tile_w - x
                y0, x0 = max(top, 0), max(left, 0)
                y1, x1 = min(top + tile.shape[0], height), min(left + tile.shape[1], width)
                part = tile[y0 - top : y1 - top, x0 - left : x1 - left]
                out[y0:y1, x0:x1, : part.shape[2]] = part
                if part.shape[2] == 3:
                    out[y0:y1, x0:x1, 3] = 255
        return out if out[..., 3].min() < 255 else out[..., :3]

    def _segment(self, segments: _Segments, level: int | None, index: int) -> Pixels | None:
        key = (-1 if level is None else level, index)
        with self._lock:
            if level is not None and key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            streams = segments.read(self._fd, index)
        if streams is None:
            return None
        if level is not None and self._fast is not None and self._fast.has(level):
            tile = self._fast.read_region(**segments.box(index), level=level, scale=1)
        else:
            tile = segments.decode(streams, index)
        if level is not None:
            with self._lock:
                if key not in self._cache:
                    self._cache[key] = tile
                    self._held += tile.nbytes
                while self._held > CACHE_BYTES and len(self._cache) > 1:
                    self._held -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def close(self) -> None:
        """Release the file."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
            self._fd = None
            self._cache.clear()
            self._held = 0
        if self._fast is not None:
            self._fast.close()


class _Segments:
    """The tiles or strips of one page, readable after its `TiffFile` is closed."""

    def __init__(self, path: Path, page: tifffile.TiffPage) -> None:
        self.size = (page.imagewidth, page.imagelength)
        self.tile = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
        self.columns = -(-self.size[0] // self.tile[0])
        self._path = path
        self._count = self.columns * -(-self.size[1] // self.tile[1])
        self._planes = page.samplesperpixel if page.planarconfig == PLANARCONFIG.SEPARATE else 1
        self._offsets, self._bytecounts = page.dataoffsets, page.databytecounts
        self._tables, self._header, self._decode = page.jpegtables, page.jpegheader, page.decode
        self._alpha = int(page.extrasamples[0]) if page.samplesperpixel == 4 and page.extrasamples else 0
        if self.tile[0] * self.tile[1] > _MAX_SEGMENT_PIXELS:
            raise UnsupportedSlideError(
                f"{path}: one strip holds {self.tile[0]} x {self.tile[1]} pixels; convert it to a tiled TIFF"
            )
        if len(self._offsets) != self._count * self._planes:
            raise CorruptSlideError(
                f"{path}: a page has {len(self._offsets)} tiles instead of {self._count * self._planes}"
            )

    def read(self, fd: int | None, index: int) -> list[bytes] | None:
        """Return the streams of segment `index`, one a plane; None for a hole.

        Raises:
            RegionError: the file was closed.
        """
        if fd is None:
            raise RegionError(f"{self._path}: the file was closed while it was read")
        streams = []
        for i in range(index, len(self._offsets), self._count):
            if self._bytecounts[i] == 0:
                return None
            os.lseek(fd, self._offsets[i], os.SEEK_SET)
            streams.append(os.read(fd, self._bytecounts[i]))
        return streams

    def box(self, index: int) -> dict[str, tuple[int, int]]:
        """Return where segment `index` lies inside the page, as `xy_px` and `size_px`."""
        row, column = divmod(index, self.columns)
        x, y = column * self.tile[0], row * self.tile[1]
        return {"xy_px": (x, y), "size_px": (min(self.tile[0], self.size[0] - x), min(self.tile[1], self.size[1] - y))}

    def decode(self, streams: list[bytes], index: int) -> Pixels:
        """Return segment `index` as uint8 (h, w, 3), or (h, w, 4) with straight alpha.

        Raises:
            RegionError: the codec fails.
        """
        planes = []
        for plane, stream in enumerate(streams):
            try:
                data = self._decode(
                    stream, index + plane * self._count, jpegtables=self._tables, jpegheader=self._header
                )[0]
            except Exception as error:
                # Each of imagecodecs' codecs has its own error class; all derive from Exception.
                raise RegionError(f"{self._path}: tile {index} cannot be decoded: {error}") from error
            if data is None:
                raise RegionError(f"{self._path}: tile {index} is empty")
            planes.append(data[0])
        pixels = to_rgb(np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0])
        if pixels.shape[2] == 4 and self._alpha == 0:
            return pixels[..., :3]
        return _straight(pixels) if pixels.shape[2] == 4 and self._alpha == 1 else pixels


def _straight(pixels: Pixels) -> Pixels:
    """Return associated (premultiplied) alpha as straight alpha."""
    alpha = pixels[..., 3:].astype(np.uint32)
    colour = np.minimum((pixels[..., :3] * np.uint32(255) + alpha // 2) // np.maximum(alpha, 1), 255)
    return np.concatenate([colour.astype(np.uint8), pixels[..., 3:]], axis=2)


def _readable(page: tifffile.TiffPage) -> bool:
    return page.bitspersample == 8 and page.samplesperpixel in (1, 3, 4) and page.photometric in _COLOURS


def _check_colour(
    path: Path, base: tifffile.TiffPage, pages: list[tifffile.TiffPage], ome: dict[str, str] | None
) -> None:
    """Raise `UnsupportedSlideError` unless `base` is one 8-bit picture."""
    channels = int((ome or {}).get("SizeC", base.samplesperpixel))
    planes = sum((page.imagewidth, page.imagelength) == (base.imagewidth, base.imagelength) for page in pages)
    found = f"{base.samplesperpixel} samples of {base.bitspersample} bit, {PHOTOMETRIC(base.photometric).name}"
    if not _readable(base):
        raise UnsupportedSlideError(f"{path}: found {found}; {_NEEDED}")
    if base.imagedepth > 1 or base.tiledepth > 1:
        raise UnsupportedSlideError(f"{path}: found a volume of depth {base.imagedepth}; one plane is needed")
    if channels > base.samplesperpixel or (base.samplesperpixel == 1 and planes > 1):
        raise UnsupportedSlideError(
            f"{path}: found {max(channels, planes)} separate channels ({found}), as in fluorescence; {_NEEDED}"
        )
    if planes > 1 and ome is not None and int(ome.get("SizeZ", 1)) * int(ome.get("SizeT", 1)) > 1:
        raise UnsupportedSlideError(f"{path}: found {planes} planes (focus or time); one plane is needed")


def _levels(base: tifffile.TiffPage, pages: list[tifffile.TiffPage]) -> list[tifffile.TiffPage]:
    """Return `base` and its reductions, finest first.

    SubIFDs of `base` when it has them, else the pages that show the same picture: same aspect
    to within a pixel of rounding, same colours, tiled when `base` is.
    """
    candidates = [sub.aspage() for sub in base.pages or ()] if base.subifds else pages
    levels = [base]
    for page in sorted(candidates, key=lambda page: -page.imagewidth):
        width, height = page.imagewidth, page.imagelength
        if width >= levels[-1].imagewidth or height > levels[-1].imagelength:
            continue
        ratio = base.imagewidth / width
        aspect = abs(base.imagelength / ratio - height) <= 1 + 1 / ratio + height / width
        alike = page.is_tiled == base.is_tiled and page.samplesperpixel == base.samplesperpixel and _readable(page)
        if aspect and alike:
            levels.append(page)
    return levels


def _ome_pixels(xml: str, base: tifffile.TiffPage) -> dict[str, str] | None:
    """Return the attributes of the OME `Pixels` of `base`'s size, with its objective's power."""
    try:
        root = ET.fromstring(xml)
    except ET.ParseError:
        return None
    for image in root.iterfind("{*}Image"):
        pixels = image.find("{*}Pixels")
        if pixels is None or (pixels.get("SizeX"), pixels.get("SizeY")) != (
            str(base.imagewidth),
            str(base.imagelength),
        ):
            continue
        found = dict(pixels.attrib)
        settings = image.find("{*}ObjectiveSettings")
        wanted = None if settings is None else settings.get("ID")
        for objective in root.iterfind("{*}Instrument/{*}Objective"):
            if objective.get("ID") == wanted:
                found["NominalMagnification"] = objective.get("NominalMagnification", "")
        return found
    return None


def _ledger(base: tifffile.TiffPage, ome: dict[str, str] | None) -> MppLedger:
    if ome is not None:
        return from_ome(ome, number(ome.get("NominalMagnification", "")))
    if base.description.startswith("Aperio"):
        return from_aperio(base.description)
    x, y = (_rational(base.tags.valueof(tag)) for tag in (282, 283))
    return from_tiff_resolution(x, y, int(base.tags.valueof(296) or 2))


def _rational(value: tuple[int, int] | None) -> float | None:
    return None if value is None or value[1] == 0 else value[0] / value[1]


def _page_name(page: tifffile.TiffPage) -> str:
    """Return "label" or "macro" where the description says so, else the page's number."""
    words = page.description.lower().split()
    index = "-".join(map(str, page.index)) if isinstance(page.index, tuple) else page.index
    return next((name for name in ("label", "macro") if name in words), f"page-{index}")
