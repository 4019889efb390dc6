"""Filters and morphology of an overview image, in bands of rows where that saves memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

BAND_ROWS = 64

Image = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


def bands(height: int) -> Iterator[slice]:
    """Yield the rows of an image in bands."""
    for start in range(0, height, BAND_ROWS):
        yield slice(start, min(start + BAND_ROWS, height))


def softened(rgb: Image, sigma_px: float) -> Iterator[tuple[slice, Field]]:
    """Yield bands of rows and the image smoothed in them, float32 (rows, w, 3), as if it were smoothed in one piece."""
    # OpenCV cuts the kernel of a float image at four sigma.
    margin = int(np.ceil(4 * sigma_px)) + 2
    for rows in bands(len(rgb)):
        top = max(0, rows.start - margin)
        part = rgb[top : rows.stop + margin].astype(np.float32)
        if sigma_px >= 0.2:
            part = cv2.GaussianBlur(part, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT_101).astype(
                np.float32, copy=False
            )
        yield rows, part[rows.start - top : rows.stop - top]


def channel_range(image: npt.NDArray[Any]) -> tuple[Field, Field, Field]:
    """Return least, mean and greatest of the three channels (by slices: a reduction over so short an axis is slow)."""
    red, green, blue = (image[..., channel].astype(np.float32) for channel in range(3))
    low = np.minimum(np.minimum(red, green), blue)
    return low, (red + green + blue) / np.float32(3), np.maximum(np.maximum(red, green), blue)


def local_deviation(field: Field, window_px: float) -> Field:
    """Return the standard deviation in a square window around each pixel."""
    side = max(3, int(window_px) // 2 * 2 + 1)
    mean = cv2.blur(field, (side, side), borderType=cv2.BORDER_REFLECT_101)
    square = cv2.blur(field * field, (side, side), borderType=cv2.BORDER_REFLECT_101)
    square -= np.multiply(mean, mean, out=mean)
    return np.sqrt(np.maximum(square, 0, out=square), out=square)


def local_share(found: Bool, window_px: float) -> Field:
    """Return the share of found pixels in a square window around each pixel."""
    side = max(3, int(window_px) // 2 * 2 + 1)
    return np.asarray(cv2.blur(found.astype(np.float32), (side, side)), dtype=np.float32)


def components(found: Bool, connectivity: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the label of every pixel (0 = not found) and the pixels of each label."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(found.view(np.uint8), connectivity=connectivity)
    return np.asarray(labels, dtype=np.int32), stats[:, cv2.CC_STAT_AREA].astype(np.int64)


def drop_small(found: Bool, min_px: float) -> Bool:
    """Return the objects of at least `min_px` pixels."""
    labels, area = components(found, connectivity=8)
    keep = area >= min_px
    keep[0] = False
    return keep[labels]


def dilate(found: Bool, radius_px: float) -> Bool:
    """Return what lies within a disk of what was found."""
    return cv2.dilate(found.view(np.uint8), _disk(radius_px)).view(np.bool_)


def erode(found: Bool, radius_px: float) -> Bool:
    """Return where a whole disk was found."""
    # The default border of cv2.erode counts as tissue, so the slide's edge is not eaten.
    return cv2.erode(found.view(np.uint8), _disk(radius_px)).view(np.bool_)


def close(found: Bool, radius_px: float) -> Bool:
    """Return `found` with gaps narrower than a disk closed."""
    return cv2.morphologyEx(found.view(np.uint8), cv2.MORPH_CLOSE, _disk(radius_px)).view(np.bool_)


def _disk(radius_px: float) -> Image:
    side = 2 * max(1, round(radius_px)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), dtype=np.uint8)
