"""A picture of search inside one slide, for the demo: tiles of three kinds, and where else there is such tissue."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from eosin.errors import QueryError
from eosin.features.store import FeatureStore
from eosin.retrieval.mosaic import mosaic
from eosin.slides import Slide
from eosin.tasks.pictures import Pixels
from eosin.tasks.search_pictures import INK, SOFT

TILE_PX = 132
GAP = 8
LABEL = 20
APART = 1.5
"""Sides of a tile that two tiles of a row lie apart at least, so that a row shows different places."""
# Okabe and Ito: told apart by colour-blind eyes, and on H&E.
COLORS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (230, 159, 0))


def search_picture(
    store: FeatureStore, slide_id: str, slide: Slide, *, kinds: int = 3, hits: int = 6
) -> tuple[Pixels, str]:
    """Return a picture of searches inside one slide, uint8 (H, W, 3), and what it shows in words.

    At the left the slide; at the right one row a kind of tissue: a typical tile and the tiles most like it, outlined on
    the slide in the row's colour. Neighbours in place are left out, so that a row shows different places.

    Args:
        store: features of the slide.
        slide_id: which slide of the store.
        slide: the slide, open.
        kinds: rows, at most four.
        hits: tiles beside each typical one.

    Raises:
        QueryError: the tiles' size is not known, or quality control kept fewer tiles than a picture needs.
    """
    features = store[slide_id]
    size0, xy = features.size0_px, features.xy[features.kept]
    if size0 is None or len(xy) < 2 * kinds:
        raise QueryError(f"{slide_id}: {len(xy)} tiles of size {size0}; a picture of search needs {2 * kinds} at least")
    x = features.x[features.kept].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    typical = mosaic(x, xy, clusters=kinds, share=1e-9, most=kinds).rows
    rows = [(int(row), *_apart(x @ x[row], xy, int(row), size0, hits)) for row in typical.tolist()]
    height = len(rows) * (TILE_PX + LABEL + GAP) - GAP
    thumbnail, scale = slide.thumbnail(2 * height)
    whole = Image.fromarray(thumbnail).resize((round(thumbnail.shape[1] * height / thumbnail.shape[0]), height))
    shrink = np.asarray(scale) * thumbnail.shape[0] / height
    sheet = Image.new("RGB", (whole.width + 2 * GAP + (hits + 1) * (TILE_PX + GAP), height), "white")
    sheet.paste(whole, (0, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    plan = slide.plan(tile_px=int(features.tile_px or 0), mpp=float(features.mpp or 0))
    for at, (query, found, score) in enumerate(rows):
        color, top = COLORS[at % len(COLORS)], at * (TILE_PX + LABEL + GAP)
        for number, one in enumerate([query, *found]):
            left = whole.width + 2 * GAP + number * (TILE_PX + GAP)
            tile = slide.read_tile((int(xy[one, 0]), int(xy[one, 1])), plan).rgb
            sheet.paste(Image.fromarray(tile).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS), (left, top))
            draw.rectangle((left, top, left + TILE_PX - 1, top + TILE_PX - 1), outline=color, width=2 if number else 4)
            text = f"{score[number - 1]:.3f}" if number else "looked for"
            draw.text((left + 2, top + TILE_PX + 3), text, fill=SOFT if number else INK, font=font)
            corner, end = xy[one] / shrink, (xy[one] + np.asarray(size0)) / shrink
            draw.rectangle((*corner.tolist(), *end.tolist()), outline=color, width=1 if number else 3)
    caption = (
        f"Find similar, inside this slide: {len(rows)} typical tiles and for each the {hits} most like it by cosine "
        "similarity of their features, outlined on the slide in the same colour. Tiles side by side are left out."
    )
    return np.asarray(sheet), caption


def _apart(
    score: npt.NDArray[np.float64], xy: npt.NDArray[np.int64], query: int, size0: tuple[float, float], count: int
) -> tuple[list[int], list[float]]:
    """Return the best rows that lie apart from the query and from each other, and their scores."""
    chosen = [query]
    for row in np.argsort(-score, kind="stable").tolist():
        away = np.abs(xy[chosen] - xy[row]) / np.asarray(size0)
        if (away.max(axis=1) >= APART).all():
            chosen.append(row)
        if len(chosen) > count:
            break
    return chosen[1:], [float(score[row]) for row in chosen[1:]]
