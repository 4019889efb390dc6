"""The OpenSlide reader: SVS, NDPI, MRXS, SCN, BIF, SVSLIDE, VMS, tiled TIFF, DICOM."""

from __future__ import annotations

import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from eosin.errors import CorruptSlideError, RegionError, UnsupportedSlideError
from eosin.geometry import round_half_up
from eosin.slides.backend import WHITE, Pixels, composite, frame_size, read_padded
from eosin.slides.jpegtiles import JpegTiles
from eosin.slides.ledger import from_openslide
from eosin.slides.tiff_backend import TiffBackend

# Vendors whose TIFF pages are plain grids of tiles.
_PLAIN_TILES = ("aperio", "generic-tiff")
# TIFF tag 259: none, LZW, deflate (both), Aperio's JPEG 2000 in RGB. Measured equal; 33003 was not measured.
_SAME_VALUES = (1, 5, 8, 32946, 33005)


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
        self._downsamples = tuple(self._slide.level_downsamples)
        self._direct = self._direct_levels(holes) if fast else (None,) * len(self.level_sizes)
        self.level_scales = tuple(
            direct.scales(level) if isinstance(direct, JpegTiles) else (1,) for level, direct in enumerate(self._direct)
        )
        if any(isinstance(direct, JpegTiles) for direct in self._direct):
            self.reader += " + jpegtiles"
        if any(isinstance(direct, TiffBackend) for direct in self._direct):
            self.reader += f" + tifffile {version('tifffile')}"
        self.bounds = _bounds(self.properties, self.level_sizes[0])
        self.background = _background(self.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR))
        self.mpp = from_openslide(self.properties)
        self.associated = tuple(sorted(self._slide.associated_images))
        profile = self._slide.color_profile
        self.icc_profile = None if profile is None else profile.tobytes()

    def _direct_levels(self, holes: frozenset[tuple[int, int]]) -> tuple[JpegTiles | TiffBackend | None, ...]:
        """Return, per level, what reads its stored pixels directly; None leaves it to OpenSlide.

        JPEG tiles gain the codec's reductions. Further levels whose downsample is no whole
        number gain sharpness: OpenSlide takes level-0 positions, which then fall between that
        level's pixels, and interpolates (2.0005x on a real slide: up to 37 of 255).
        """
        if self.properties.get(openslide.PROPERTY_NAME_VENDOR) not in _PLAIN_TILES:
            return (None,) * len(self.level_sizes)
        jpeg = JpegTiles.open(self._path, self.level_sizes)
        fractional = [downsample % 1 != 0 for downsample in self._downsamples]
        exact: TiffBackend | None = None
        if any(between and not (jpeg and jpeg.has(level)) for level, between in enumerate(fractional)):
            exact = _exact_reader(self._path, self.level_sizes)
        chosen: list[JpegTiles | TiffBackend | None] = []
        for level, size in enumerate(self.level_sizes):
            if size in holes:
                chosen.append(None)
            elif jpeg is not None and jpeg.has(level):
                chosen.append(jpeg)
            else:
                chosen.append(exact if fractional[level] else None)
        return tuple(chosen)

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
        direct = self._direct[level]

        def inside(xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
            if direct is not None:
                return direct.read_region(xy, level=level, scale=scale, size_px=size)
            return self._read(xy, level, size)

        return read_padded(inside, xy_px=xy_px, size_px=size_px, frame_px=frame)

    def _read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        # OpenSlide wants the level-0 position and divides it by its own downsample.
        downsample = self._downsamples[level]
        location = (int(round_half_up(xy[0] * downsample)), int(round_half_up(xy[1] * downsample)))
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
        for direct in self._direct:
            if direct is not None:
                direct.close()


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise UnsupportedSlideError(f"{path}: OpenSlide does not know this format") from error
    except openslide.OpenSlideError as error:
        raise CorruptSlideError(f"{path}: OpenSlide cannot open it: {error}") from error
    except Image.DecompressionBombError as error:
        raise UnsupportedSlideError(f"{path}: {error}") from error


def _exact_reader(path: Path, level_sizes: tuple[tuple[int, int], ...]) -> TiffBackend | None:
    """Return a reader of the same levels whose codecs give OpenSlide's own values, or None."""
    try:
        reader = TiffBackend(path)
    except (UnsupportedSlideError, CorruptSlideError):
        return None
    if reader.level_sizes == level_sizes and all(codec in _SAME_VALUES for codec in reader.compressions):
        return reader
    reader.close()
    return None


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
