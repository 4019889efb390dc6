"""The page of a search: what was looked for at the left, the hits beside it, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eosin.retrieval.examples import Example
from eosin.retrieval.queries import MIXES, SearchResult
from eosin.tasks.pictures import data_uri, jpeg_bytes
from eosin.tasks.search_pictures import AROUND, Picture, Pixels
from eosin.version import __version__

Row = Mapping[str, Any]

# Colour-blind-safe (Okabe and Ito), most frequent value first; what is beyond, and what is missing, is grey.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
GREY = "#98a2b3"
MIX_ROWS = 7
BINS = 36
STRIP = (280, 74)
TITLES = {"tile": "Tiles like this one", "region": "Tiles like this region", "annotation": "Tiles like this area"}
TITLES |= {"slide": "Tiles like this slide", "image": "Tiles like this image"}
SHOWN_IN_CARD = (("site", "site"), ("scanner", "scanner"), ("organ", "organ"), ("stain", "stain"))


def search_page(
    result: SearchResult,
    record: Row,
    asked: Sequence[tuple[Sequence[Pixels], str]],
    pictures: Sequence[Picture],
) -> str:
    """Return the page as HTML, pictures inside.

    Args:
        result: the search.
        record: the same as JSON types, of `eosin.tasks.search_results.result_to_dict`.
        asked: pictures of each example, then of each counter-example, or why there are none.
        pictures: of the first hits.
    """
    examples = (*result.examples, *result.against)
    colors = _colors(record)
    columns = [name for name in ("label", "site", "patient_id") if any(hit.get(name) for hit in record["hits"])]
    page = {
        "title": f"eosin: {examples[0].name}",
        "heading": TITLES[examples[0].kind] if len(examples) == 1 else "Tiles like these",
        "lead": _lead(result),
        "notes": result.notes,
        "examples": [
            _example(one, shown, why, against=row >= len(result.examples))
            for row, (one, (shown, why)) in enumerate(zip(examples, asked, strict=True))
        ],
        "counts": _counts(result),
        "strip": _strip(result),
        "strip_says": _strip_says(record),
        "mixes": [_mix(column, record, result, colors) for column in MIXES if _worth(column, record)],
        "hits": [_card(hit, one, colors) for hit, one in zip(record["hits"], pictures, strict=False)],
        "columns": columns,
        "rest": record["hits"][len(pictures) :],
        "around": f"{AROUND:g}",
        "tile_um": _tile_um(result),
        "record": _record(result, record),
        "footer": f"Made by eosin {__version__}. Likeness is evidence to look at, not a diagnosis.",
    }
    environment = Environment(loader=PackageLoader("eosin.tasks"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("search.html.j2").render(page)


def _lead(result: SearchResult) -> str:
    found = len(result)
    what = " and ".join(_named(one) for one in result.examples)
    if len(result.examples) > 2:
        what = f"{len(result.examples)} examples"
    how = "" if result.settings.merge == "mean" else ", each by the tile it is nearest to"
    away = f", away from {' and '.join(map(_named, result.against))}" if result.against else ""
    hits = "The tile" if found == 1 else f"The {found} tiles"
    return (
        f"{hits} of {result.searched.left:,} most like {what}{away}: cosine similarity of "
        f"{result.spec.encoder} features{how}."
    )


def _named(one: Example) -> str:
    return one.name if one.kind in ("region", "annotation") else f"the {one.name}"


def _tile_um(result: SearchResult) -> str:
    spec = result.spec
    return "" if spec.mpp is None or spec.tile_px is None else f"{spec.mpp * spec.tile_px:.0f} µm"


def _example(one: Example, shown: Sequence[Pixels], why: str, *, against: bool) -> Row:
    facts = [(_name(column), _several(values)) for column, values in one.about.items()]
    return {
        "uris": [data_uri(jpeg_bytes(picture), "image/jpeg") for picture in shown],
        "why": why,
        "name": one.name,
        "facts": facts,
        "against": against,
    }


def _several(values: Mapping[str, int]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count})" for value, count in sorted(values.items(), key=lambda pair: -pair[1])[:4])


def _name(column: str) -> str:
    return {"patient_id": "patient", "slide_id": "slide"}.get(column, column)


def _counts(result: SearchResult) -> list[tuple[str, str, str]]:
    """Return (number, what, note) a line: from all tiles of the index to those that were searched."""
    settings, one = result.settings, result.searched
    own = "the query's own tiles" if settings.same_slide else "of the query's own slide"
    rows = [(f"{one.total:,}", "tiles in the index", "")]
    rows.append((f"− {one.own:,}", own, ""))
    if not settings.same_patient:
        rows.append((f"− {one.patient:,}", "more of the same patient", _unknown(result)))
    if settings.where is not None:
        rows.append((f"− {one.filtered:,}", "fail the filter", ""))
    rows.append((f"{one.left:,}", "searched", ""))
    rows.append((f"{len(result):,}", f"found, {result.hits.wanted:,} wanted", "" if not result.hits.lacking else "!"))
    return rows


def _unknown(result: SearchResult) -> str:
    known = all(one.about.get("patient_id") for one in result.examples)
    return "" if known else "patient not known"


def _strip(result: SearchResult) -> Markup | None:
    """Return a histogram of what any tile would score with the hits marked below, as SVG."""
    if len(result.chance) < 20:
        return None
    width, height = STRIP
    low = float(min(result.chance[0], *result.hits.score.tolist()) if len(result) else result.chance[0])
    low, high = min(low, 0.98), 1.0
    counts, _ = np.histogram(result.chance, bins=BINS, range=(low, high))
    top, base = float(counts.max()), height - 30

    def at(score: float) -> float:
        return round((min(score, high) - low) / (high - low) * width, 1)

    bars = []
    for number, count in enumerate(counts.tolist()):
        tall = round(count / top * (base - 4), 1)
        x, w = round(number * width / BINS, 1), round(width / BINS - 1, 1)
        bars.append(f'<rect x="{x}" y="{base - tall:.1f}" width="{w}" height="{tall}" fill="#c3c8d1"/>')
    marks = [
        f'<line x1="{at(score)}" x2="{at(score)}" y1="{base - 14}" y2="{base + 5}" stroke="#8f3f71" stroke-width="2"/>'
        for score in result.hits.score.tolist()
    ]
    line = f'<line x1="0" x2="{width}" y1="{base}" y2="{base}" stroke="#98a2b3"/>'
    text = (
        f'<text x="0" y="{height - 8}">{low:.2f}</text>'
        f'<text x="{width}" y="{height - 8}" text-anchor="end">{high:.2f}</text>'
    )
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="scores of hits among those of any tile">'
        f"{''.join(bars)}{line}{''.join(marks)}{text}</svg>"
    )


def _strip_says(record: Row) -> str:
    chance = record["chance"]
    if not chance["n"]:
        return ""
    text = (
        f"Grey: cosine of {chance['n']:,} tiles drawn from what was searched (median {chance['median']:.2f}, 99th "
        f"percentile {chance['p99']:.2f}). Lines: the hits."
    )
    scores = [hit["score"] for hit in record["hits"]]
    if scores and min(scores) < chance["p99"]:
        weak = sum(score < chance["p99"] for score in scores)
        text += f" {weak} of {len(scores)} hits score no higher than one tile in a hundred does by chance."
    return text


def _worth(column: str, record: Row) -> bool:
    return any(record["mix"].get(column, {"hits": {}})["hits"])


def _colors(record: Row) -> dict[str, str]:
    """Return label -> colour, most frequent label of the hits first."""
    mix = record["mix"].get("label", {"hits": {}, "searched": {}})
    names = [name for name in dict.fromkeys([*mix["hits"], *mix["searched"]]) if name]
    return dict(zip(names, PALETTE, strict=False))


def _mix(column: str, record: Row, result: SearchResult, colors: Mapping[str, str]) -> Row:
    """Return the bars of one field: share of the hits that have a value, beside its share of what was searched."""
    hits, base = record["mix"][column]["hits"], record["mix"][column]["searched"]
    found, left = len(record["hits"]), sum(base.values())
    own = {value for one in result.examples for value in one.about.get(column, {})}
    rows = []
    for value in list(hits)[:MIX_ROWS]:
        share, chance = hits[value] / found, base.get(value, 0) / left if left else 0.0
        rows.append(
            {
                "name": value or f"no {column}",
                "own": value in own,
                "color": colors.get(value, GREY) if column == "label" else GREY,
                "width": round(100 * share, 1),
                "tick": round(100 * chance, 1),
                "text": f"{hits[value]} of {found}",
                "chance": f"{100 * chance:.0f} %" if chance >= 0.005 or not chance else "< 1 %",
            }
        )
    more = len(hits) - len(rows)
    return {"title": _name(column), "rows": rows, "more": f"and {more} more values" if more > 0 else ""}


def _card(hit: Row, picture: Picture, colors: Mapping[str, str]) -> Row:
    label = hit.get("label")
    facts = [(words, hit[name]) for name, words in SHOWN_IN_CARD if hit.get(name)]
    if hit.get("patient_id") and hit["patient_id"] != hit.get("slide_id"):
        facts.insert(0, ("patient", hit["patient_id"]))
    if "like" in hit:
        facts.append(("like", f"({hit['like']['x']}, {hit['like']['y']}) of {hit['like']['of']}"))
    return {
        "rank": hit["rank"],
        "tile": None if picture.tile is None else data_uri(jpeg_bytes(picture.tile), "image/jpeg"),
        "around": None if picture.around is None else data_uri(jpeg_bytes(picture.around), "image/jpeg"),
        "why": picture.why,
        "score": f"{hit['score']:.3f}",
        "distance": f"{hit['distance']:.3f}",
        "rarity": _rarity(hit["rarity"]),
        "slide": hit.get("slide_id"),
        "at": f"x {hit['x']}, y {hit['y']}",
        "label": label,
        "color": colors.get(str(label), GREY),
        "facts": facts,
    }


def _rarity(share: float | None) -> str:
    if share is None:
        return ""
    return "above every drawn tile" if share == 0 else f"top {100 * share:.2g} % of drawn tiles"


def _record(result: SearchResult, record: Row) -> list[tuple[str, str]]:
    spec, settings = record["spec"], record["settings"]
    rows = [
        ("index", record["index"]),
        ("encoder", f"{spec['encoder']}, {spec['dim']} numbers a tile"),
        ("weights", spec["weights_sha256"] or "none"),
        ("tiles", f"{spec['tile_px']} px at {spec['mpp']} microns per pixel"),
        (
            "stored as",
            "vectors" if spec["quantise"] == "none" else f"{spec['quantise']} codes, rescored with the vectors",
        ),
        ("filter", settings["where"] or "none"),
        ("same slide", "may be hits" if settings["same_slide"] else "left out"),
        ("same patient", "may be hits" if settings["same_patient"] else "left out"),
        ("examples", "each tile asks for itself" if settings["merge"] == "best" else "mean of their tiles"),
        ("diversity", "none" if settings["mmr"] is None else f"MMR, weight of likeness {settings['mmr']:g}"),
        ("search", "every tile compared" if settings["exact"] else "as the engine does it"),
        ("query", "; ".join(one.name for one in result.examples)),
    ]
    if result.against:
        rows.append(("against", "; ".join(one.name for one in result.against)))
    return [(name, str(value)) for name, value in rows]
