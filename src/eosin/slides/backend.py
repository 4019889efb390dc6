"""What a slide reader must offer, and the arithmetic all readers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from eosin.slides.ledger import MppLedger

Pixels = npt.NDArray[np.uint8]
WHITE = (255, 255, 255)


class Backend(Protocol):
    """One opened slide. Implementations are thread-safe, and need not survive a fork."""

    @property
    def reader(self) -> str:
        """Name and version of the reader, "openslide 4.0.1"."""
        ...

    @property
    def level_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each level, level 0 = finest."""
        ...

    @property
    def level_scales(self) -> tuple[tuple[int, ...], ...]:
        """Reductions the codec offers while decoding each level, (1,) or (1, 2, 4, 8)."""
        ...

    @property
    def properties(self) -> Mapping[str, str]:
        """What the file says about itself."""
        ...

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """x, y, width, height in level-0 pixels of what was scanned; the whole slide when unknown."""
        ...

    @property
    def background(self) -> tuple[int, int, int]:
        """Colour under transparent pixels."""
        ...

    @property
    def mpp(self) -> MppLedger:
        """What the file says about its microns per pixel."""
        ...

    @property
    def associated(self) -> tuple[str, ...]:
        """Names of the label, macro and thumbnail images."""
        ...

    @property
    def icc_profile(self) -> bytes | None:
        """The file's ICC profile."""
        ...

    def associated_image(self, name: str) -> Pixels:
        """Return a label, macro or thumbnail of the file as uint8 (H, W, 3)."""
        ...

    def read_region(self, xy_px: tuple[int, int], *, level: int, scale: int, size_px: tuple[int, int]) -> Pixels:
        """Return a region of the read frame (`level` reduced by `scale`), uint8.

        Args:
            xy_px: top left, in read-frame pixels; may be negative.
            level: level of the file.
            scale: one of ``level_scales[level]``.
            size_px: (width, height) in read-frame pixels.

        Returns:
            (h, w, 3), or (h, w, 4) with straight alpha, 0 outside the slide.

        Raises:
            RegionError: the pixels cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        ...


def frame_size(level_size: tuple[int, int], scale: int) -> tuple[int, int]:
    """Return (width, height) of a level after a reduction, as JPEG rounds it: upwards."""
    return -(-level_size[0] // scale), -(-level_size[1] // scale)


def read_padded(
    read_inside: Callable[[tuple[int, int], tuple[int, int]], Pixels],
    *,
    xy_px: tuple[int, int],
    size_px: tuple[int, int],
    frame_px: tuple[int, int],
) -> Pixels:
    """Read the part of a region that lies inside the frame; the rest becomes transparent.

    Args:
        read_inside: takes (xy, size) wholly inside the frame, returns (h, w, 3 or 4).
        xy_px: top left of the region.
        size_px: (width, height) of the region.
        frame_px: (width, height) of the frame.
    """
    (x, y), (width, height) = xy_px, size_px
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, frame_px[0]), min(y + height, frame_px[1])
    if (left, top, right, bottom) == (x, y, x + width, y + height):
        return read_inside(xy_px, size_px)
    out = np.zeros((height, width, 4), dtype=np.uint8)
    if right > left and bottom > top:
        inside = read_inside((left, top), (right - left, bottom - top))
        target = out[top - y : bottom - y, left - x : right - x]
        target[..., : inside.shape[2]] = inside
        if inside.shape[2] == 3:
            target[..., 3] = 255
    return out


def read_reduced(
    backend: Backend, xy_px: tuple[int, int], *, level: int, scale: int, size_px: tuple[int, int]
) -> Pixels:
    """Return a region of a level reduced by `scale`, also where the codec cannot reduce that far.

    What the codec does not do is averaged over boxes, which lie on the level's own corner as those of
    the codec do; colours are weighted by their alpha.

    Args:
        backend: the reader.
        xy_px: top left, in pixels of the reduced level; may be negative.
        level: level of the file.
        scale: 1, 2, 4 or 8.
        size_px: (width, height) in pixels of the reduced level.

    Returns:
        As `Backend.read_region`.

    Raises:
        RegionError: the pixels cannot be decoded.
    """
    decoded = codec_scale(backend, level, scale)
    factor = scale // decoded
    if factor == 1:
        return backend.read_region(xy_px, level=level, scale=scale, size_px=size_px)
    fine_px = frame_size(backend.level_sizes[level], decoded)

    def inside(xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
        start = (xy[0] * factor, xy[1] * factor)
        # The last box of a level may be cut off: its mean is over what there is.
        count = (min(size[0] * factor, fine_px[0] - start[0]), min(size[1] * factor, fine_px[1] - start[1]))
        pixels = backend.read_region(start, level=level, scale=decoded, size_px=count)
        return np.asarray(Image.fromarray(pixels).reduce(factor))

    return read_padded(inside, xy_px=xy_px, size_px=size_px, frame_px=frame_size(backend.level_sizes[level], scale))


def codec_scale(backend: Backend, level: int, scale: int) -> int:
    """Return the largest reduction up to `scale` that the codec does itself."""
    return max(offered for offered in backend.level_scales[level] if offered <= scale)


def composite(pixels: Pixels, background: tuple[int, int, int]) -> Pixels:
    """Return straight-alpha (h, w, 4) laid over `background` as (h, w, 3); (h, w, 3) unchanged."""
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3:]
    if alpha.size == 0 or alpha.min() == 255:
        return np.ascontiguousarray(pixels[..., :3])
    weight = alpha.astype(np.uint32)
    blended = pixels[..., :3] * weight + np.asarray(background, dtype=np.uint32) * (255 - weight)
    return ((blended + 127) // 255).astype(np.uint8)


def to_rgb(pixels: Pixels) -> Pixels:
    """Return grey (h, w), (h, w, 1) or (h, w, 2) as three channels; colour is unchanged, alpha kept."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 2:
        return np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    return pixels
