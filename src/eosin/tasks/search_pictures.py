"""Pictures of a search, read from the slides: the hits in their surroundings, and what was looked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from eosin.errors import EosinError, SlideError
from eosin.geometry import round_half_up
from eosin.retrieval.examples import Example, footprint
from eosin.retrieval.queries import SearchResult
from eosin.slides import Slide, open_slide

Pixels = npt.NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Color = tuple[int, int, int]

TILE_PX = 224
AROUND_PX = 264
AROUND = 3.0
"""Sides of the surroundings, in tiles."""
QUERY_PX = 640
OUTLINED = 400
"""Tiles up to which those of a whole slide or image are outlined."""
OUTLINE: Color = (255, 214, 10)
OUTLINE_DARK: Color = (20, 20, 20)
INK: Color = (31, 36, 48)
SOFT: Color = (102, 112, 133)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideFile:
    """Where a slide lies.

    Attributes:
        path: the file or DICOM folder.
        fingerprint: of the content that was indexed; None when not known.
    """

    path: Path
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """A tile as it was read again.

    Attributes:
        tile: uint8 (TILE_PX, TILE_PX, 3), or None.
        around: its surroundings with the tile outlined, uint8 (AROUND_PX, AROUND_PX, 3), or None.
        why: why there is no picture; "" when there is.
    """

    tile: Pixels | None = None
    around: Pixels | None = None
    why: str = ""


def hit_pictures(result: SearchResult, slides: Mapping[str, SlideFile], *, first: int) -> list[Picture]:
    """Return one picture a hit, for the first hits; each slide is opened once.

    A slide that is gone, or is another one now, leaves its hits without a picture and says why.
    """
    payload = result.hits.payload
    names = [str(name) for name in payload["slide_id"][:first].tolist()]
    pictures: list[Picture] = [Picture()] * len(names)
    for slide_id in dict.fromkeys(names):
        rows = [row for row, name in enumerate(names) if name == slide_id]
        for row, picture in zip(rows, _of_slide(slide_id, rows, result, slides.get(slide_id)), strict=True):
            pictures[row] = picture
    return pictures


def _of_slide(slide_id: str, rows: Sequence[int], result: SearchResult, file: SlideFile | None) -> list[Picture]:
    payload = result.hits.payload
    sizes = [footprint(payload, row) for row in rows]
    found: list[Picture] = []
    try:
        with open_again(slide_id, file, next((size for size in sizes if size), None)) as slide:
            for row, size in zip(rows, sizes, strict=True):
                xy = (int(payload["x"][row]), int(payload["y"][row]))
                found.append(tile_picture(slide, xy, size) if size else Picture(why=_NO_SIZE))
    except EosinError as error:
        found += [Picture(why=str(error))] * (len(rows) - len(found))
    return found


_NO_SIZE = "the index does not know how large this tile is on its slide"


def open_again(slide_id: str, file: SlideFile | None, size0_px: tuple[float, float] | None) -> Slide:
    """Open an indexed slide, in units of its own pixels along x: no microns per pixel are needed for a picture.

    Args:
        slide_id: id in the index.
        file: where it should be.
        size0_px: (width, height) of a square tile in level-0 pixels, for slides whose pixels are not square.

    Raises:
        SlideError: the file is not known, not there, another one than was indexed, or cannot be read.
    """
    if file is None:
        raise SlideError(f"where {slide_id} lies is not known; give its folder with --slides")
    if not file.path.exists():
        raise SlideError(f"{slide_id} is no longer at {file.path}; give its folder with --slides")
    width, height = size0_px or (1.0, 1.0)
    slide = open_slide(file.path, mpp=(1.0, width / height))
    if file.fingerprint is not None and slide.fingerprint != file.fingerprint:
        slide.close()
        raise SlideError(f"{file.path} is not the slide that was indexed as {slide_id}: its content has changed")
    return slide


def tile_picture(slide: Slide, xy: tuple[int, int], size0_px: tuple[float, float]) -> Picture:
    """Return a tile and its surroundings.

    Args:
        slide: opened by `open_again`.
        xy: level-0 top-left corner of the tile.
        size0_px: (width, height) of the tile in level-0 pixels.

    Raises:
        SlideError: the pixels cannot be decoded.
    """
    tile = crop(slide, xy, size0_px, TILE_PX)
    margin = (AROUND - 1) / 2
    corner = (_whole(xy[0] - margin * size0_px[0]), _whole(xy[1] - margin * size0_px[1]))
    around = crop(slide, corner, (AROUND * size0_px[0], AROUND * size0_px[1]), AROUND_PX)
    start, end = AROUND_PX * margin / AROUND, AROUND_PX * (margin + 1) / AROUND
    return Picture(tile=tile, around=outlined(around, [(start, start, end, end)]))


def crop(slide: Slide, xy: tuple[int, int], size0_px: tuple[float, float], width_px: int) -> Pixels:
    """Return a rectangle of the slide, uint8 (H, W, 3), `width_px` wide.

    Where that is finer than the slide's own pixels they are read as they are and enlarged for the eye.

    Args:
        slide: opened by `open_again`.
        xy: level-0 top-left corner.
        size0_px: (width, height) in level-0 pixels.
        width_px: of the result; its height follows.
    """
    aspect = size0_px[1] / size0_px[0] / (slide.mpp.x / slide.mpp.y)
    read_px = max(1, min(width_px, _whole(size0_px[0])))
    pixels = slide.read(xy, (read_px, max(1, _whole(read_px * aspect))), mpp=size0_px[0] / read_px)
    if read_px == width_px:
        return pixels
    size = (width_px, max(1, _whole(width_px * aspect)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def outlined(
    pixels: Pixels, boxes: Sequence[tuple[float, float, float, float]], color: Color = OUTLINE, width: int = 3
) -> Pixels:
    """Return a picture with rectangles (left, top, right, bottom) drawn in light on dark, seen on any tissue."""
    image = Image.fromarray(pixels).copy()
    draw = ImageDraw.Draw(image)
    for left, top, right, bottom in boxes:
        if width > 2:
            draw.rectangle((left - 1, top - 1, right, bottom), outline=OUTLINE_DARK, width=width)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=max(1, width - 1))
    return np.asarray(image)


def query_pictures(example: Example, slides: Mapping[str, SlideFile]) -> tuple[tuple[Pixels, ...], str]:
    """Return pictures of what was looked for, the closest first, and "" or why there are none.

    A tile is shown itself and in its surroundings, a region or annotation with a margin and its tiles outlined, a slide
    and an image whole.
    """
    try:
        file = SlideFile(path=example.path) if example.path is not None else slides.get(str(example.slide_id))
        with open_again(example.slide_id or example.name, file, example.size0_px) as slide:
            if example.kind == "tile" and example.size0_px is not None:
                picture = tile_picture(slide, (int(example.xy[0, 0]), int(example.xy[0, 1])), example.size0_px)
                return tuple(one for one in (picture.tile, picture.around) if one is not None), ""
            return (_many_tiles(slide, example),), ""
    except EosinError as error:
        return (), str(error)


def _many_tiles(slide: Slide, example: Example) -> Pixels:
    size0 = example.size0_px
    if size0 is None or example.kind in ("slide", "image"):
        pixels, scale = slide.thumbnail(QUERY_PX)
        boxes = [] if size0 is None else _boxes(example.xy, size0, (0, 0), scale)
        return outlined(pixels, boxes, width=1) if 1 < len(boxes) <= OUTLINED else pixels
    low = example.xy.min(axis=0)
    extent = example.xy.max(axis=0) + np.asarray(size0) - low
    margin = np.maximum(extent * 0.08, np.asarray(size0) * 0.25)
    corner = (_whole(low[0] - margin[0]), _whole(low[1] - margin[1]))
    size = extent + 2 * margin
    width_px = _whole(QUERY_PX * min(1.0, size[0] / size[1]))
    pixels = crop(slide, corner, (float(size[0]), float(size[1])), width_px)
    scale = (float(size[0]) / pixels.shape[1], float(size[1]) / pixels.shape[0])
    return outlined(pixels, _boxes(example.xy, size0, corner, scale), width=2)


def _boxes(
    xy: npt.NDArray[np.int64], size0_px: tuple[float, float], corner: tuple[int, int], scale: tuple[float, float]
) -> list[tuple[float, float, float, float]]:
    """Return the rectangles of tiles in a picture of `scale` (x, y) level-0 pixels per pixel."""
    low = (xy - np.asarray(corner)) / np.asarray(scale)
    high = low + np.asarray(size0_px) / np.asarray(scale)
    return [(float(a), float(b), float(c), float(d)) for (a, b), (c, d) in zip(low, high, strict=True)]


def _whole(value: float) -> int:
    return int(round_half_up(value))
