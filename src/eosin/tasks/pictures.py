"""Pictures of slides, tiles and features. Thumbnail frame: (x, y) pixels of the thumbnail."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from eosin.tiles import TileGrid, TissueMask
from eosin.tiles.qc import REASONS

Pixels = npt.NDArray[np.uint8]

# Colour-blind-safe (Okabe and Ito), one a reason, in the order of `REASONS`.
REASON_COLORS: dict[str, tuple[int, int, int]] = {
    "kept": (0, 158, 115),
    "unreadable": (0, 0, 0),
    "background": (170, 170, 170),
    "outside": (120, 120, 120),
    "black": (60, 60, 60),
    "pen": (86, 180, 233),
    "fold": (204, 121, 167),
    "white": (240, 228, 66),
    "blurred": (213, 94, 0),
}
assert tuple(REASON_COLORS) == REASONS

OUTLINE_COLOR = (0, 114, 178)


def jpeg_bytes(rgb: Pixels, quality: int = 88) -> bytes:
    """Return (H, W, 3) uint8 as JPEG."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=quality)
    return file.getvalue()


def png_bytes(pixels: Pixels) -> bytes:
    """Return (H, W, 3 or 4) uint8 as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Return `content` of MIME type `kind` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def outline_layer(mask: TissueMask, size_px: tuple[int, int], downsample: tuple[float, float]) -> Pixels:
    """Return the outline of the tissue as RGBA (H, W, 4).

    Args:
        mask: tissue, level-0 frame.
        size_px: (width, height) of the thumbnail.
        downsample: (dx, dy) level-0 pixels per thumbnail pixel.
    """
    layer = Image.new("RGBA", size_px, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    width = max(2, size_px[0] // 500)
    for polygon in mask.polygons():
        for ring in (polygon.exterior, *polygon.interiors):
            points = [(x / downsample[0], y / downsample[1]) for x, y in ring.coords]
            draw.line(points, fill=(*OUTLINE_COLOR, 255), width=width, joint="curve")
    return np.asarray(layer)


def tiles_layer(
    size_px: tuple[int, int],
    downsample: tuple[float, float],
    groups: Sequence[tuple[npt.NDArray[np.int64], tuple[int, int, int]]],
    size0_px: tuple[float, float],
) -> Pixels:
    """Return tiles as outlined, lightly filled squares, RGBA (H, W, 4).

    Args:
        size_px: (width, height) of the thumbnail.
        downsample: (dx, dy) level-0 pixels per thumbnail pixel.
        groups: (xy (n, 2) level-0 top-left, colour) drawn in this order.
        size0_px: (width, height) of a tile in level-0 pixels.
    """
    layer = Image.new("RGBA", size_px, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    width, height = size0_px[0] / downsample[0], size0_px[1] / downsample[1]
    line = 1 if min(width, height) < 24 else 2
    for xy, color in groups:
        for x, y in xy / np.asarray(downsample):
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=(*color, 36), outline=(*color, 255), width=line)
    return np.asarray(layer)


def overlay(rgb: Pixels, *layers: Pixels) -> Pixels:
    """Return RGBA layers laid over an RGB picture, in order."""
    image = Image.fromarray(rgb).convert("RGBA")
    for layer in layers:
        image = Image.alpha_composite(image, Image.fromarray(layer))
    return np.asarray(image.convert("RGB"))


def draw_tiles(thumbnail: Pixels, downsample: tuple[float, float], grid: TileGrid) -> Pixels:
    """Return the thumbnail with tissue outline, tiles to be read and background positions."""
    size = (thumbnail.shape[1], thumbnail.shape[0])
    groups = [
        (grid.background_xy, REASON_COLORS["background"]),
        (grid.xy, REASON_COLORS["kept"]),
    ]
    tiles = tiles_layer(size, downsample, groups, grid.plan.size0_px)
    return overlay(thumbnail, tiles, outline_layer(grid.mask, size, downsample))


def principal_colors(x: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Return the first three principal components of features (n, D) as colours (n, 3) uint8.

    Features are standardised first. Each component is stretched between its 1st and 99th
    percentile, with the sign that makes its skewness positive, so that the picture is the
    same from run to run.
    """
    centred = x.astype(np.float64) - x.mean(axis=0)
    scale = centred.std(axis=0)
    centred = centred[:, scale > 1e-9] / scale[scale > 1e-9]
    count = min(3, *centred.shape)
    colors = np.full((len(x), 3), 128.0)
    if count:
        values, vectors = np.linalg.eigh(centred.T @ centred)
        scores = centred @ vectors[:, np.argsort(values)[::-1][:count]]
        scores *= np.where((scores**3).sum(axis=0) < 0, -1.0, 1.0)
        low, high = np.percentile(scores, [1, 99], axis=0)
        colors[:, :count] = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1) * 255
    return np.round(colors).astype(np.uint8)


def paint(
    values: npt.NDArray[np.uint8],
    xy: npt.NDArray[np.int64],
    size0_px: tuple[float, float],
    size_px: tuple[int, int],
    downsample: tuple[float, float],
) -> Pixels:
    """Return colours painted as rectangles, RGBA (H, W, 4); a later one covers an earlier one.

    Args:
        values: (n, 3) colours.
        xy: (n, 2) level-0 top-left corners.
        size0_px: (width, height) of a rectangle in level-0 pixels.
        size_px: (width, height) of the thumbnail.
        downsample: (dx, dy) level-0 pixels per thumbnail pixel.
    """
    painted = np.zeros((size_px[1], size_px[0], 4), dtype=np.uint8)
    corners = np.round(xy / np.asarray(downsample)).astype(int)
    width, height = np.ceil(np.asarray(size0_px) / np.asarray(downsample)).astype(int)
    for color, (left, top) in zip(values, corners, strict=True):
        painted[top : top + height, left : left + width] = (*color, 255)
    return painted


def mask_layer(mask: TissueMask, size_px: tuple[int, int], downsample: tuple[float, float]) -> npt.NDArray[np.bool_]:
    """Return the tissue mask in the thumbnail frame, bool (H, W)."""
    layer = Image.new("1", size_px, 0)
    draw = ImageDraw.Draw(layer)
    for polygon in mask.polygons():
        draw.polygon([(x / downsample[0], y / downsample[1]) for x, y in polygon.exterior.coords], fill=1)
        for ring in polygon.interiors:
            draw.polygon([(x / downsample[0], y / downsample[1]) for x, y in ring.coords], fill=0)
    return np.asarray(layer)
