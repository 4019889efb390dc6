"""Pictures with dark figures and pale lookalikes whose places are known, and files of their boxes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

import slidegen
from eosin.finetune.detector_data import Picture
from eosin.slides import open_slide

Points = npt.NDArray[np.float64]
DARK, PALE = (70, 40, 110), (190, 150, 200)


def paint(
    size: tuple[int, int], figures: Points, lookalikes: Points | None = None, *, radius: float = 10.0
) -> npt.NDArray[np.uint8]:
    """Return uint8 (H, W, 3): near-white, a dark disc a figure and a pale one a look-alike, pixel i from i to i + 1."""
    width, height = size
    pixels = np.full((height, width, 3), 235, dtype=np.uint8)
    y, x = np.mgrid[:height, :width] + 0.5
    pale = np.empty((0, 2)) if lookalikes is None else lookalikes
    for places, colour in ((pale, PALE), (figures, DARK)):
        for px, py in np.asarray(places, dtype=np.float64).reshape(-1, 2):
            pixels[np.hypot(x - px, y - py) <= radius] = colour
    return pixels


def scatter(size: tuple[int, int], count: int, rng: np.random.Generator, *, apart: float = 45.0) -> Points:
    """Return places (count, 2), whole numbers, that keep their distance."""
    places: list[Points] = []
    while len(places) < count:
        place = rng.integers(12, np.array(size) - 12).astype(np.float64)
        if all(np.hypot(*(place - other)) > apart for other in places):
            places.append(place)
    return np.array(places)


def picture(seed: int, *, size: tuple[int, int] = (256, 224), figures: int = 6, lookalikes: int = 4) -> Picture:
    """Return a picture of a slide of its own."""
    rng = np.random.default_rng(seed)
    xy = scatter(size, figures + lookalikes, rng)
    pixels = paint(size, xy[:figures], xy[figures:])
    mitotic = np.arange(len(xy)) < figures
    slide = open_slide(pixels, mpp=0.25)
    return Picture(name=f"{seed}.tiff", group=f"midog/{seed:03d}", slide=slide, xy=xy, mitotic=mitotic)


def write_boxes(path: Path, slides: Mapping[str, tuple[tuple[int, int], Points, npt.NDArray[np.bool_]]]) -> Path:
    """Write boxes of 50 px as MIDOG++ does: name -> (size, centres, mitotic)."""
    images, notes = [], []
    for at, (name, ((width, height), xy, mitotic)) in enumerate(slides.items(), 1):
        images.append({"id": at, "file_name": name, "width": width, "height": height, "tumor_type": "none"})
        for (x, y), kind in zip(xy.tolist(), mitotic.tolist(), strict=True):
            box = [x - 25, y - 25, x + 25, y + 25]
            notes.append({"bbox": box, "image_id": at, "category_id": 1 if kind else 2, "id": len(notes)})
    kinds = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "not mitotic figure"}]
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": kinds}))
    return path


def write_set(folder: Path, *, slides: int = 4, mpp: float | None = 0.25) -> tuple[Path, Path]:
    """Write pictures as TIFF and their boxes; return the file of boxes and the folder of pictures."""
    images = folder / "images"
    images.mkdir(parents=True)
    listed = {}
    for at in range(slides):
        one = picture(at)
        name = f"{at + 1:03d}.tiff"
        pixels = one.slide.read((0, 0), one.slide.size_px, level=0)
        style = slidegen.TiffStyle(flavour="generic", mpp=mpp, factors=(), power=None)
        slidegen.write_tiff(images / name, pixels, style)
        listed[name] = (one.slide.size_px, one.xy, one.mitotic)
    return write_boxes(folder / "MIDOG++.json", listed), images
