"""The OpenSlide reader: SVS, NDPI, MRXS, SCN, BIF, SVSLIDE, VMS, tiled TIFF, DICOM."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from eosin.errors import CorruptSlideError, RegionError, UnsupportedSlideError
from eosin.slides.backend import WHITE, Pixels, composite, frame_size, read_padded
from eosin.slides.jpegtiles import JpegTiles
from eosin.slides.ledger import from_openslide

# Vendors whose TIFF pages are plain grids of tiles.
_PLAIN_TILES = ("aperio", "generic-tiff")


class OpenSlideBackend:
    """One slide opened by OpenSlide."""

    def __init__(self, path: Path, *, fast: bool = True, holes: frozenset[tuple[int, int]] = frozenset()) -> None:
        """Open `path`; with `fast`, the JPEG tiles of plain tiled TIFFs are decoded directly.

        Args:
            path: the file.
            fast: whether to offer the codec's reductions.
            holes: sizes of levels that lack tiles, which stay with OpenSlide.

        Raises:
            UnsupportedSlideError: OpenSlide does not know the format.
            CorruptSlideError: it knows the format and cannot open the file.
        """
        self._path = path
        self._lock = threading.Lock()
        self._closed = False
        self._slide = _open(path)
        self.reader = f"openslide {openslide.__library_version__}"
        self.properties = dict(self._slide.properties)
        self.level_sizes = tuple((int(w), int(h)) for w, h in self._slide.level_dimensions)
        plain = self.properties.get(openslide.PROPERTY_NAME_VENDOR) in _PLAIN_TILES
        tiles = JpegTiles.open(path, self.level_sizes) if fast and plain else None
        self._tiles = tuple(
            tiles if tiles is not None and tiles.has(i) and size not in holes else None
            for i, size in enumerate(self.level_sizes)
        )
        self.level_scales = tuple((1,) if found is None else found.scales(i) for i, found in enumerate(self._tiles))
        if any(self._tiles):
            self.reader += " + jpegtiles"
        self._downsamples = tuple(self._slide.level_downsamples)
        self.bounds = _bounds(self.properties, self.level_sizes[0])
        self.background = _background(self.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR))
        self.mpp = from_openslide(self.properties)
        self.associated = tuple(sorted(self._slide.associated_images))
        profile = self._slide.color_profile
        self.icc_profile = None if profile is None else profile.tobytes()

    def associated_image(self, name: str) -> Pixels:
        """Return a label, macro or thumbnail of the file as uint8 (H, W, 3)."""
        try:
            image = self._slide.associated_images[name]
        except openslide.OpenSlideError as error:
            self._reopen()
            raise RegionError(f"{self._path}: the associated image {name!r} cannot be decoded: {error}") from error
        return composite(np.asarray(image.convert("RGBA")), self.background)

    def read_region(self, xy_px: tuple[int, int], *, level: int, scale: int, size_px: tuple[int, int]) -> Pixels:
        """Return a region of the read frame; see `Backend.read_region`."""
        frame = frame_size(self.level_sizes[level], scale)
        tiles = self._tiles[level]

        def inside(xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
            if tiles is not None:
                return tiles.read_region(xy, level=level, scale=scale, size_px=size)
            return self._read(xy, level, size)

        return read_padded(inside, xy_px=xy_px, size_px=size_px, frame_px=frame)

    def _read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        # OpenSlide wants the level-0 position and divides it by its own downsample.
        downsample = self._downsamples[level]
        location = (round(xy[0] * downsample), round(xy[1] * downsample))
        try:
            pixels = np.asarray(self._slide.read_region(location, level, size))
        except openslide.OpenSlideError as error:
            self._reopen()
            raise RegionError(
                f"{self._path}: level {level}, ({xy[0]}, {xy[1]}) + {size[0]} x {size[1]} cannot be decoded: {error}"
            ) from error
        return pixels if pixels[..., 3].min() < 255 else pixels[..., :3]

    def _reopen(self) -> None:
        """Replace the handle: after one error OpenSlide answers every later call with it."""
        with self._lock:
            if not self._closed:
                self._slide = _open(self._path)

    def close(self) -> None:
        """Release the file."""
        with self._lock:
            self._closed = True
            self._slide.close()
        for tiles in self._tiles:
            if tiles is not None:
                tiles.close()


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise UnsupportedSlideError(f"{path}: OpenSlide does not know this format") from error
    except openslide.OpenSlideError as error:
        raise CorruptSlideError(f"{path}: OpenSlide cannot open it: {error}") from error
    except Image.DecompressionBombError as error:
        raise UnsupportedSlideError(f"{path}: {error}") from error


def detect_vendor(path: Path) -> str | None:
    """Return OpenSlide's name of the file's vendor, or None."""
    return openslide.OpenSlide.detect_format(path)


def _bounds(properties: dict[str, str], size: tuple[int, int]) -> tuple[int, int, int, int]:
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height"))
    except KeyError:
        return 0, 0, *size
    left, top = min(max(x, 0), size[0]), min(max(y, 0), size[1])
    right, bottom = min(x + width, size[0]), min(y + height, size[1])
    if right <= left or bottom <= top:
        return 0, 0, *size
    return left, top, right - left, bottom - top


def _background(colour: str | None) -> tuple[int, int, int]:
    if not colour:
        return WHITE
    return int(colour[0:2], 16), int(colour[2:4], 16), int(colour[4:6], 16)
