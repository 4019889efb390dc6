"""What a search leaves: JSON, a contact sheet, GeoJSON for QuPath, and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import shapely
from PIL import Image, ImageDraw, ImageFont

from eosin.features.writer import write_durably
from eosin.retrieval.examples import Example, footprint
from eosin.retrieval.filters import describe
from eosin.retrieval.queries import SearchResult
from eosin.tasks.pictures import png_bytes
from eosin.tasks.search_pictures import INK, SOFT, TILE_PX, Picture, Pixels, SlideFile, hit_pictures, query_pictures
from eosin.tiles import Annotation, to_feature_collection
from eosin.version import __version__

SCHEMA = "eosin.search/1"
PICTURED = 60
"""Hits that get pictures; the others stand in the table, the JSON and the GeoJSON."""
SHEET_COLUMNS = 5
POSITIONS_TOLD = 200
HIT_COLOR, QUERY_COLOR = (230, 159, 0), (0, 114, 178)


def write_results(
    result: SearchResult, out: Path, *, index: str, slides: Mapping[str, SlideFile]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Write everything a search gives into a folder; return the record and what was written -> path.

    ``search.html`` (self-contained), ``search.json``, ``hits.png`` (contact sheet) and ``geojson/<slide>.geojson``, one
    for each slide with hits or examples, in its own level-0 pixels.

    Args:
        result: of `eosin.retrieval.queries.search`.
        out: folder.
        index: name of the index, for the record.
        slides: slide id -> file, for the pictures.

    Raises:
        StoreError: the folder cannot be written.
    """
    from eosin.tasks.search_page import search_page

    pictures = hit_pictures(result, slides, first=PICTURED)
    asked = [query_pictures(one, slides) for one in (*result.examples, *result.against)]
    record = result_to_dict(result, index=index)
    for hit, picture in zip(record["hits"], pictures, strict=False):
        hit["no_picture"] = picture.why or None
    made = {
        "page: query, hits, what they are worth": (out / "search.html", search_page(result, record, asked, pictures)),
        "the same for programs": (out / "search.json", orjson.dumps(record, option=orjson.OPT_INDENT_2)),
        "contact sheet": (out / "hits.png", png_bytes(contact_sheet(result, asked, pictures))),
    }
    for path, content in made.values():
        write_durably(path, content.encode() if isinstance(content, str) else content)
    paths = {what: str(path) for what, (path, _) in made.items()}
    collections = to_geojson(result)
    for slide_id, collection in collections.items():
        write_durably(out / "geojson" / f"{slide_id}.geojson", orjson.dumps(collection))
    if collections:
        paths["hits for QuPath, one file a slide"] = str(out / "geojson")
    return record, paths


def result_to_dict(result: SearchResult, *, index: str) -> dict[str, Any]:
    """Return a result as JSON types; ids are text, for they exceed what JSON numbers hold exactly."""
    settings, searched = result.settings, result.searched
    return {
        "schema": SCHEMA,
        "eosin": __version__,
        "index": index,
        "spec": result.spec.to_dict(),
        "query": [_example(one) for one in result.examples],
        "against": [_example(one) for one in result.against],
        "settings": {
            "k": settings.k,
            "where": None if settings.where is None else describe(settings.where),
            "same_slide": settings.same_slide,
            "same_patient": settings.same_patient,
            "mmr": settings.mmr,
            "merge": settings.merge,
            "exact": settings.exact,
        },
        "wanted": result.hits.wanted,
        "found": len(result),
        "searched": {
            "total": searched.total,
            "own": searched.own,
            "patient": searched.patient,
            "filtered": searched.filtered,
            "left": searched.left,
        },
        "chance": _chance(result),
        "mix": {
            column: {"hits": result.mix(column), "searched": dict(base)}
            for column, base in result.base.items()
            if any(base)
        },
        "hits": [hit_to_dict(result, row) for row in range(len(result))],
        "notes": list(result.notes),
    }


def hit_to_dict(result: SearchResult, row: int) -> dict[str, Any]:
    """Return one hit as JSON types."""
    hits = result.hits
    score, rarity = float(hits.score[row]), float(result.rarity()[row])
    facts = {
        "rank": row + 1,
        "id": str(int(hits.ids[row])),
        "score": round(score, 6),
        "distance": round(1 - score, 6),
        "rarity": None if math.isnan(rarity) else round(rarity, 6),
        **{name: _plain(column[row]) for name, column in hits.payload.items() if name != "fingerprint"},
    }
    if result.matched is not None:
        facts["like"] = _like(result, int(result.matched[row]))
    return facts


def to_geojson(result: SearchResult) -> dict[str, dict[str, Any]]:
    """Return slide id -> FeatureCollection that QuPath imports: hits as "Similar", examples as "Query"."""
    drawn: dict[str, list[Annotation]] = {}
    payload = result.hits.payload
    for row in range(len(result)):
        size = footprint(payload, row)
        if size is None:
            continue
        score = round(float(result.hits.score[row]), 4)
        properties = {"name": f"{row + 1}: {score:.3f}", "measurements": {"rank": row + 1, "score": score}}
        corner = (float(payload["x"][row]), float(payload["y"][row]))
        one = _square(corner, size, name="Similar", color=HIT_COLOR, properties=properties)
        drawn.setdefault(str(payload["slide_id"][row]), []).append(one)
    for kind, examples in (("Query", result.examples), ("Query, against", result.against)):
        for example in examples:
            if example.slide_id is None or example.size0_px is None:
                continue
            corners = [(float(x), float(y)) for x, y in example.xy]
            squares = [_square(c, example.size0_px, name=kind, color=QUERY_COLOR, properties={}) for c in corners]
            drawn.setdefault(example.slide_id, []).extend(squares)
    return {slide_id: to_feature_collection(one) for slide_id, one in drawn.items()}


def contact_sheet(
    result: SearchResult, asked: Sequence[tuple[Sequence[Pixels], str]], pictures: Sequence[Picture]
) -> Pixels:
    """Return one picture of the query and the hits beside it, uint8 (H, W, 3).

    Args:
        result: the search.
        asked: pictures of each example and counter-example, or why there are none.
        pictures: of the first hits.
    """
    gap, text, left = 14, 44, 300
    rows = max(1, math.ceil(len(pictures) / SHEET_COLUMNS))
    width = left + gap + SHEET_COLUMNS * (TILE_PX + gap) + gap
    heads = [_fitted(shown[0], left - gap) if shown else None for shown, _ in asked]
    tall = sum((head.height if head else 120) + text + gap for head in heads) + 60
    height = max(60 + rows * (TILE_PX + text + gap), tall) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(20), ImageFont.load_default(13)
    draw.text((gap, gap), "Looked for", fill=INK, font=title)
    draw.text((left + gap, gap), f"{len(result)} most alike of {result.searched.left} tiles", fill=INK, font=title)
    y = 54
    for head, (_, why), one in zip(heads, asked, (*result.examples, *result.against), strict=True):
        if head is None:
            _empty(draw, (gap, y, left - gap, y + 120), why, small)
        else:
            sheet.paste(head, (gap, y))
        y += head.height if head else 120
        _lines(draw, (gap, y + 4), _wrapped(one.name, left - 2 * gap, small)[:2], SOFT, small)
        y += text + gap
    for row, picture in enumerate(pictures):
        x = left + gap + row % SHEET_COLUMNS * (TILE_PX + gap)
        y = 54 + row // SHEET_COLUMNS * (TILE_PX + text + gap)
        if picture.tile is None:
            _empty(draw, (x, y, x + TILE_PX, y + TILE_PX), picture.why, small)
        else:
            sheet.paste(Image.fromarray(picture.tile), (x, y))
        draw.text((x, y + TILE_PX + 4), f"{row + 1}   {result.hits.score[row]:.3f}", fill=INK, font=small)
        told = " · ".join(_told(result, row))
        _lines(draw, (x, y + TILE_PX + 20), _wrapped(told, TILE_PX, small)[:1], SOFT, small)
    return np.asarray(sheet)


def _told(result: SearchResult, row: int) -> list[str]:
    """Return what a line of text says of a hit: label first, where it is known."""
    payload = result.hits.payload
    return [str(payload[name][row]) for name in ("label", "slide_id") if name in payload and payload[name][row]]


def _fitted(pixels: Pixels, width: int) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((width, width * 2))
    return image


def _empty(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], why: str, font: Any) -> None:
    draw.rectangle(box, fill=(242, 244, 247), outline=(208, 213, 221))
    _lines(draw, (box[0] + 8, box[1] + 8), _wrapped(why, box[2] - box[0] - 16, font)[:6], SOFT, font)


def _lines(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], color: Any, font: Any) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + 16 * number), line, fill=color, font=font)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """Return `text` broken at spaces, and inside words too long for a line."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _square(
    corner: tuple[float, float],
    size: tuple[float, float],
    *,
    name: str,
    color: tuple[int, int, int],
    properties: Mapping[str, Any],
) -> Annotation:
    box = shapely.box(corner[0], corner[1], corner[0] + size[0], corner[1] + size[1])
    return Annotation(geometry=box, name=name, color=color, properties=properties)


def _example(one: Example) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "name": one.name,
        "slide_id": one.slide_id,
        "tiles": len(one.vectors),
        "xy": one.xy[:POSITIONS_TOLD].tolist(),
        "about": {column: dict(values) for column, values in one.about.items()},
    }


def _like(result: SearchResult, query: int) -> dict[str, Any]:
    """Return which tile of the examples a hit is like, as slide or image and position."""
    for example in result.examples:
        if query < len(example.vectors):
            x, y = example.xy[query].tolist()
            return {"of": example.slide_id or example.name, "x": x, "y": y}
        query -= len(example.vectors)
    raise IndexError(query)


def _chance(result: SearchResult) -> dict[str, Any]:
    if not len(result.chance):
        return {"n": 0, "median": None, "p99": None, "best": None}
    median, p99 = np.percentile(result.chance, [50, 99])
    best = float(result.chance[-1])
    return {"n": len(result.chance), "median": round(float(median), 6), "p99": round(float(p99), 6), "best": best}


def _plain(value: Any) -> Any:
    """Return a payload value as JSON type; a missing one as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return value
