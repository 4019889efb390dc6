"""A slide: one opened file, read at any position and any microns per pixel."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eosin.errors import CorruptSlideError, GeometryError, MissingMppError, SlideError
from eosin.geometry import SCALES, Mpp, ReadPlan, check_mpp, covered_fraction, plan_read, round_half_up
from eosin.slides.backend import Backend, Pixels, codec_scale, composite, frame_size, read_reduced
from eosin.slides.colour import IccTransform, icc_transform
from eosin.slides.fingerprint import fingerprint_array, fingerprint_path
from eosin.slides.footprint import Footprint, cover, footprint, resize, snap
from eosin.slides.ledger import MppLedger
from eosin.slides.opening import open_backend

MAX_READ_PIXELS = 64_000_000
BLOCK_PIXELS = 16_000_000


@dataclass(frozen=True, slots=True)
class TileRead:
    """A tile and how much of it is slide.

    Attributes:
        rgb: uint8 (tile_px, tile_px, 3).
        valid_fraction: share of the tile's footprint that is scanned: inside the slide's
            bounds and not transparent.
    """

    rgb: Pixels
    valid_fraction: float


class Slide:
    """An open slide. Points are level-0 pixels (x, y), sizes (width, height), arrays (H, W, 3).

    The file is opened once per process and again after a fork; an instance pickles as its
    path and options. Threads may share it.
    """

    def __init__(
        self,
        source: Path | Pixels,
        *,
        mpp: float | tuple[float, float] | None = None,
        reader: str | None = None,
        icc: bool = False,
    ) -> None:
        """Hold `source`; use `open_slide`, which opens it at once."""
        self._source = source
        self._mpp = mpp
        self._reader = reader
        self._icc = icc
        self._closed = False
        self._fingerprint: str | None = None
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._backend: Backend | None = None
        self._transform: IccTransform | None = None
        self._mpp_ledger: MppLedger | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what opens the slide again elsewhere."""
        keep = ("_source", "_mpp", "_reader", "_icc", "_closed", "_fingerprint")
        return {name: self.__dict__[name] for name in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what opens the slide; it is opened when first read."""
        self.__dict__.update(state)
        self._forget()

    def __enter__(self) -> Slide:
        """Return the slide itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the slide."""
        self.close()

    def __del__(self) -> None:
        """Release the file of a slide that nobody closed."""
        if getattr(self, "_backend", None) is not None:
            self.close()

    def __repr__(self) -> str:
        """Return name and state."""
        name = "array" if self.path is None else str(self.path)
        return f"Slide({name!r}, closed)" if self._closed else f"Slide({name!r})"

    @property
    def backend(self) -> Backend:
        """The reader of this process, opened when first needed.

        Raises:
            SlideError: the slide was closed, or cannot be opened.
        """
        if self._pid != os.getpid():
            self._forget()
        backend = self._backend
        if backend is not None:
            return backend
        with self._lock:
            if self._closed:
                raise SlideError(f"{self.name}: the slide is closed; open it again")
            if self._backend is None:
                opened = open_backend(self._source, self._reader)
                _check_sizes(self.name, opened)
                self._transform = icc_transform(opened.icc_profile, self.name) if self._icc else None
                self._backend = opened
            return self._backend

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        with self._lock:
            if self._backend is not None and self._pid == os.getpid():
                self._backend.close()
            self._backend = None
            self._closed = True

    @property
    def path(self) -> Path | None:
        """The file or DICOM folder; None for an array."""
        return self._source if isinstance(self._source, Path) else None

    @property
    def name(self) -> str:
        """File name, or "array"."""
        return "array" if self.path is None else self.path.name

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of level 0."""
        return self.backend.level_sizes[0]

    @property
    def level_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each level, finest first."""
        return self.backend.level_sizes

    @property
    def level_downsamples(self) -> tuple[tuple[float, float], ...]:
        """(x, y) level-0 pixels per pixel of each level, never rounded."""
        width, height = self.size_px
        return tuple((width / w, height / h) for w, h in self.level_sizes)

    @property
    def level_scales(self) -> tuple[tuple[int, ...], ...]:
        """Reductions the codec offers while decoding each level."""
        return self.backend.level_scales

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """x, y, width, height of what was scanned, level 0; the whole slide when unknown."""
        return self.backend.bounds

    @property
    def properties(self) -> Mapping[str, str]:
        """What the file says about itself, in its reader's words."""
        return self.backend.properties

    @property
    def reader(self) -> str:
        """Name and version of what decodes the pixels."""
        return self.backend.reader

    @property
    def associated(self) -> tuple[str, ...]:
        """Names of the label, macro and thumbnail images."""
        return self.backend.associated

    def associated_image(self, name: str) -> Pixels:
        """Return an associated image, uint8 (H, W, 3).

        Raises:
            SlideError: there is none of that name.
        """
        if name not in self.associated:
            raise SlideError(
                f"{self.name}: no associated image {name!r}; it has {', '.join(self.associated) or 'none'}"
            )
        return self.backend.associated_image(name)

    @property
    def options(self) -> dict[str, Any]:
        """What was asked at opening, and what became of it: mpp, reader, icc."""
        backend = self.backend
        icc = "off"
        if self._icc:
            icc = "applied" if self._transform is not None else "no profile"
        return {"mpp": self._mpp, "reader": self._reader, "decoder": backend.reader, "icc": icc}

    @property
    def mpp_ledger(self) -> MppLedger:
        """Microns per pixel as found or given, with source and conflicts; never raises for them."""
        if self._mpp_ledger is None or self._pid != os.getpid():
            found = self.backend.mpp
            self._mpp_ledger = found if self._mpp is None else found.overridden(self._mpp)
        return self._mpp_ledger

    @property
    def mpp(self) -> Mpp:
        """Microns per level-0 pixel.

        Raises:
            MissingMppError: the file does not say.
            ImplausibleMppError: it says something outside 0.05-5.
        """
        ledger = self.mpp_ledger
        if ledger.x is None or ledger.y is None:
            raise MissingMppError(
                f"{self.name}: the file does not say its microns per pixel ({ledger.source}); "
                "give them with --slide-mpp or in the cohort column 'mpp'"
            )
        where = f"{self.name}, {ledger.source}"
        return Mpp(check_mpp(ledger.x, where), check_mpp(ledger.y, where))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over sizes and sampled bytes of the file and its companions."""
        if self._fingerprint is None:
            source = self._source
            self._fingerprint = fingerprint_path(source) if isinstance(source, Path) else fingerprint_array(source)
        return self._fingerprint

    def plan(self, *, tile_px: int, mpp: float) -> ReadPlan:
        """Return how tiles of `tile_px` at `mpp` are read from this slide; see `geometry.plan_read`."""
        return plan_read(
            tile_px=tile_px,
            mpp=mpp,
            slide_mpp=self.mpp,
            level_downsamples=self.level_downsamples,
        )

    def read_tile(self, xy: tuple[int, int], plan: ReadPlan) -> TileRead:
        """Read the tile whose top-left level-0 pixel is `xy`.

        The smallest whole region of the read frame that covers the exact footprint is decoded,
        laid on the slide's background, and resized once, antialiased, from the footprint's
        fractional rectangle. Without `plan.resample` stored pixels are returned as they are, if
        `xy` is a whole pixel of the read frame, as in a grid of that plan.

        Raises:
            RegionError: the pixels cannot be decoded.
        """
        rgb, alpha_share = self._read(self._footprint(plan, xy, (plan.tile_px, plan.tile_px)))
        inside = covered_fraction(np.array([xy], dtype=np.int64), plan.size0_px, self.bounds)[0]
        return TileRead(rgb=rgb, valid_fraction=float(inside) * alpha_share)

    def read(
        self,
        xy: tuple[int, int],
        size_px: int | tuple[int, int],
        *,
        mpp: float | None = None,
        level: int | None = None,
    ) -> Pixels:
        """Read a rectangle as uint8 (H, W, 3), outside the slide in the background colour.

        Args:
            xy: top-left level-0 pixel.
            size_px: side, or (width, height), of the result: in pixels at `mpp`, or of `level`.
            mpp: microns per pixel of the result.
            level: level of the file, not resized; level 0 when neither is given.

        Raises:
            GeometryError: both `mpp` and `level`, no such level, or an empty size.
            RegionError: the pixels cannot be decoded.
        """
        width, height = (size_px, size_px) if isinstance(size_px, int) else size_px
        if width < 1 or height < 1:
            raise GeometryError(f"a region of {width} x {height} pixels is empty")
        if mpp is not None:
            if level is not None:
                raise GeometryError("give mpp or level, not both")
            plan = self.plan(tile_px=max(width, height), mpp=mpp)
            return self._read(self._footprint(plan, xy, (width, height)))[0]
        level = 0 if level is None else level
        if not 0 <= level < len(self.level_sizes):
            raise GeometryError(f"{self.name} has levels 0 to {len(self.level_sizes) - 1}, not {level}")
        dx, dy = self.level_downsamples[level]
        origin = (xy[0] / dx, xy[1] / dy)
        return self._read(Footprint(level, 1, origin, (width, height), (width, height), resample=False))[0]

    def thumbnail(self, max_px: int = 2048) -> tuple[Pixels, tuple[float, float]]:
        """Return the whole slide with its longer side at most `max_px`, and its downsample.

        Read from the coarsest level that is large enough, in blocks where that is a large one.

        Returns:
            uint8 (H, W, 3) and the (x, y) level-0 pixels per thumbnail pixel.
        """
        width, height = self.size_px
        factor = min(1.0, max_px / max(width, height))
        out = (max(1, int(round_half_up(width * factor))), max(1, int(round_half_up(height * factor))))
        level, scale = self._coarsest(out)
        frame = frame_size(self.level_sizes[level], scale)
        extent = (self.level_sizes[level][0] / scale, self.level_sizes[level][1] / scale)
        # What is decoded is larger than the frame where the codec does not reduce that far.
        factor = scale // codec_scale(self.backend, level, scale)
        if frame[0] * frame[1] * factor**2 <= MAX_READ_PIXELS:
            rgb = self._read(Footprint(level, scale, (0.0, 0.0), extent, out, extent != out))[0]
        else:
            rgb = self._read_blocks(level, scale, extent, out)
        return rgb, (width / out[0], height / out[1])

    def _coarsest(self, out: tuple[int, int]) -> tuple[int, int]:
        """Return the coarsest level with at least `out` pixels, then its largest reduction that still has them."""
        fits = [i for i, (width, height) in enumerate(self.level_sizes) if width >= out[0] and height >= out[1]]
        level = max(fits, key=lambda i: self.level_downsamples[i], default=0)
        width, height = self.level_sizes[level]
        return level, max((s for s in SCALES if width / s >= out[0] and height / s >= out[1]), default=1)

    def _read_blocks(self, level: int, scale: int, extent: tuple[float, float], out: tuple[int, int]) -> Pixels:
        """Resize a frame that is too large to hold, block by block, each with the filter's margin."""
        ratio = (extent[0] / out[0], extent[1] / out[1])
        factor = scale // codec_scale(self.backend, level, scale)
        side = max(1, int((BLOCK_PIXELS**0.5 / factor - 2) / max(ratio)) - 4)
        frame = frame_size(self.level_sizes[level], scale)
        rgb = np.empty((out[1], out[0], 3), dtype=np.uint8)
        for top in range(0, out[1], side):
            for left in range(0, out[0], side):
                bottom, right = min(top + side, out[1]), min(left + side, out[0])
                # Bilinear support is one output pixel to each side; two leave room for rounding.
                x0, y0 = (max(0, int((at - 2) * r)) for at, r in zip((left, top), ratio, strict=True))
                x1 = min(frame[0], int((right + 2) * ratio[0]) + 1)
                y1 = min(frame[1], int((bottom + 2) * ratio[1]) + 1)
                region = self._pixels(level, scale, (x0, y0), (x1 - x0, y1 - y0))[0]
                box = (
                    left * ratio[0] - x0,
                    top * ratio[1] - y0,
                    min(right * ratio[0], extent[0]) - x0,
                    min(bottom * ratio[1], extent[1]) - y0,
                )
                rgb[top:bottom, left:right] = resize(region, (right - left, bottom - top), box)
        return rgb

    def _footprint(self, plan: ReadPlan, xy: tuple[int, int], out_px: tuple[int, int]) -> Footprint:
        return footprint(plan, xy, out_px, frame_size(self.level_sizes[plan.level], plan.scale))

    def _read(self, region: Footprint) -> tuple[Pixels, float]:
        """Return the region's pixels and the mean alpha of those inside the bounds (1 = opaque)."""
        frame = frame_size(self.level_sizes[region.level], region.scale)
        if not region.resample:
            whole = (snap(region, frame, 0), snap(region, frame, 1))
            rgb, share = self._pixels(region.level, region.scale, whole, region.out_px)
            # A copy: it may be a view of the image itself.
            return np.array(rgb, order="C"), share
        starts, counts, boxes = zip(*(cover(region, frame, axis) for axis in (0, 1)), strict=True)
        rgb, share = self._pixels(region.level, region.scale, starts, counts)
        (left, right), (top, bottom) = boxes
        return resize(rgb, region.out_px, (left, top, right, bottom)), share

    def _pixels(self, level: int, scale: int, xy: tuple[int, int], size: tuple[int, int]) -> tuple[Pixels, float]:
        """Return whole read-frame pixels composited on the background, and their mean alpha."""
        backend = self.backend
        pixels = read_reduced(backend, xy, level=level, scale=scale, size_px=size)
        share = 1.0 if pixels.shape[2] == 3 else self._alpha_share(pixels[..., 3], level, scale, xy)
        if self._transform is not None:
            pixels = self._transform(pixels)
        return composite(pixels, backend.background), share

    def _alpha_share(self, alpha: Pixels, level: int, scale: int, xy: tuple[int, int]) -> float:
        """Return the mean alpha of the pixels inside the bounds, 0-1; 1 when none is."""
        x, y, width, height = self.bounds
        dx, dy = (d * scale for d in self.level_downsamples[level])
        left, right = (int(round_half_up(edge / dx)) - xy[0] for edge in (x, x + width))
        top, bottom = (int(round_half_up(edge / dy)) - xy[1] for edge in (y, y + height))
        inside = alpha[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        return float(inside.mean()) / 255 if inside.size else 1.0


def _check_sizes(name: str, backend: Backend) -> None:
    sizes = backend.level_sizes
    if not sizes or any(w < 1 or h < 1 for w, h in sizes):
        raise CorruptSlideError(f"{name}: the file has an empty level (sizes {list(sizes)})")


def open_slide(
    source: str | os.PathLike[str] | Pixels,
    *,
    mpp: float | tuple[float, float] | None = None,
    reader: str | None = None,
    icc: bool = False,
) -> Slide:
    """Open a whole-slide image, a plain image, or an array.

    Args:
        source: a file, a DICOM folder, or uint8 (H, W, 3).
        mpp: microns per level-0 pixel, one value or (x, y), instead of what the file says.
        reader: force "openslide", "tiff", "dicom" or "image"; chosen by content when None.
        icc: convert colours to sRGB through the file's ICC profile, when it has one. Off by
            default, because encoders were trained without.

    Raises:
        UnsupportedSlideError: no reader takes it; the message lists each one's reason.
        CorruptSlideError: empty or truncated.
        ImplausibleMppError: the given `mpp` lies outside 0.05-5.
    """
    slide = Slide(source if isinstance(source, np.ndarray) else Path(source), mpp=mpp, reader=reader, icc=icc)
    _ = slide.mpp_ledger
    return slide
