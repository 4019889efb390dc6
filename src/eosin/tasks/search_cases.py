"""Cases like a slide: the answer in words, its record, and its page with the pairs of tiles that are the evidence."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined

from eosin.errors import EosinError, QueryError
from eosin.features.writer import write_durably
from eosin.retrieval.cases import Case, CaseResult, CaseSettings, find_cases
from eosin.retrieval.engines import open_index
from eosin.retrieval.examples import Example, footprint
from eosin.retrieval.filters import describe
from eosin.retrieval.protocol import VectorIndex
from eosin.slides import Slide
from eosin.tasks.pictures import data_uri, jpeg_bytes
from eosin.tasks.search import Question, read_examples, read_filter
from eosin.tasks.search_page import GREY, PALETTE
from eosin.tasks.search_pictures import OUTLINE, Pixels, SlideFile, crop, open_again, outlined
from eosin.tasks.search_slides import remembered_recipe, slide_files, unknown_places
from eosin.version import __version__

SCHEMA = "eosin.cases/1"
PAIR_PX = 150
SLIDE_PX = 420
MIX_SHOWN = 5

Size = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """A slide on the page: where it is, and which of its tiles are evidence.

    Attributes:
        slide_id: the slide.
        size0_px: (width, height) of a tile in level-0 pixels; None when not known.
        xy: level-0 corners of the tiles, (m, 2).
    """

    slide_id: str
    size0_px: Size | None
    xy: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Views:
    """Pictures of a slide: the whole with tiles outlined, and each tile; or why there are none."""

    whole: Pixels | None
    tiles: Sequence[Pixels | None]
    why: str = ""


def answer_cases(
    index: str,
    question: Question,
    *,
    aggregator: str = "median-of-minima",
    slides: Sequence[Path] = (),
    out: Path | None = None,
    api_key: str | None = None,
) -> tuple[CaseResult, dict[str, Any], dict[str, str]]:
    """Find cases in an index on disk or behind an address; write the page and the JSON where a folder is given.

    Args:
        index: folder or address.
        question: one query; `k`, `filters`, `same_patient` and `exact` count, what is about single tiles must be left
            out.
        aggregator: how tiles rank slides; see `eosin.retrieval.cases.CaseSettings`.
        slides: where slides lie, beside what the index remembers; for the pictures.
        out: folder to write to; nothing is written when None.
        api_key: of a server.

    Returns:
        The result, the same as JSON types, and what was written -> path.

    Raises:
        QueryError: several queries, or settings that cases do not know.
    """
    if len(question.queries) != 1 or question.against:
        raise QueryError("cases are looked for with one query, usually a slide, and without counter-examples")
    if question.mmr is not None or question.same_slide or question.merge != "mean":
        raise QueryError("mmr, same-slide and merge are about single tiles; leave them out when looking for cases")
    with contextlib.closing(open_index(index, api_key=api_key)) as opened:
        (example,), _ = read_examples(opened, question, recipe=remembered_recipe(index))
        settings = CaseSettings(
            aggregator=aggregator,  # type: ignore[arg-type]
            k=question.k,
            where=read_filter(question.filters, opened.spec),
            same_patient=question.same_patient,
            exact=question.exact,
        )
        result = find_cases(opened, example, settings)
        files = slide_files(index, slides)
        without = unknown_places(index, {case.slide_id for case in result.cases} - files.keys())
        result = replace(result, notes=(*result.notes, *without)) if out is not None else result
        record = cases_to_dict(result, example, index=index, spec=opened.spec.to_dict())
        places = case_places(opened, example, result)
    made = {} if out is None else write_cases(result, record, places, out, slides=files)
    return result, record, made


def case_places(index: VectorIndex, example: Example, result: CaseResult) -> list[Place]:
    """Return where the evidence lies: first on the query's slide, then on each case's."""
    places = [
        Place(
            slide_id=example.slide_id or "",
            size0_px=example.size0_px,
            xy=np.array([pair.query_xy for case in result.cases for pair in case.pairs], np.int64).reshape(-1, 2),
        )
    ]
    for case in result.cases:
        hits = index.retrieve(np.array([pair.id for pair in case.pairs], np.uint64))
        size = footprint(hits.payload, 0) if len(hits) else None
        xy = np.array([pair.xy for pair in case.pairs], np.int64).reshape(-1, 2)
        places.append(Place(slide_id=case.slide_id, size0_px=size, xy=xy))
    return places


def cases_to_dict(result: CaseResult, example: Example, *, index: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return cases as JSON types; ids are text, for they exceed what JSON numbers hold exactly."""
    found = result.to_dict()
    for case in found["cases"]:
        for pair in case["pairs"]:
            pair["id"] = str(pair["id"])
    where = result.settings.where
    found["settings"]["where"] = None if where is None else describe(where)
    about = {column: dict(values) for column, values in example.about.items()}
    head = {"schema": SCHEMA, "eosin": __version__, "index": index, "spec": dict(spec)}
    return {**head, **found, "query": {"name": example.name, "slide_id": example.slide_id, "about": about}}


def write_cases(
    result: CaseResult,
    record: Mapping[str, Any],
    places: Sequence[Place],
    out: Path,
    *,
    slides: Mapping[str, SlideFile],
) -> dict[str, str]:
    """Write ``cases.html`` (self-contained) and ``cases.json`` into a folder; return what -> path.

    Raises:
        StoreError: the folder cannot be written.
    """
    views = [_views(place, slides) for place in places]
    page, data = out / "cases.html", out / "cases.json"
    write_durably(page, cases_page(result, record, views).encode())
    write_durably(data, orjson.dumps(record, option=orjson.OPT_INDENT_2))
    return {"page: similar cases and their evidence": str(page), "the same for programs": str(data)}


def cases_page(result: CaseResult, record: Mapping[str, Any], views: Sequence[Views]) -> str:
    """Return the page as HTML.

    Args:
        result: of `eosin.retrieval.cases.find_cases`.
        record: of `cases_to_dict`.
        views: pictures of the query's slide, then of each case's.
    """
    query = record["query"]
    starts = np.cumsum([0, *(len(case.pairs) for case in result.cases)]).tolist()
    colors = dict(zip([name for name in result.base if name != "(no label)"], PALETTE, strict=False))
    page = {
        "title": f"eosin: cases like {query['slide_id']}",
        "heading": "Cases like this one",
        "lead": f"{_count(len(result.cases), 'case')} of {_count(result.candidates, 'slide')}, ranked by "
        f"{result.settings.aggregator.replace('-', ' ')} over a mosaic of {_count(result.tiles, 'tile')} of the query. "
        "A patient stands here once.",
        "notes": result.notes,
        "query": {
            "name": query["name"],
            "uri": _uri(views[0].whole),
            "why": views[0].why,
            "facts": [(_word(name), ", ".join(values)) for name, values in query["about"].items()],
        },
        "mix": _mix(result.mix, result.base, colors),
        "cases": [
            _card(rank, case, views[0].tiles[starts[rank - 1] : starts[rank]], views[rank], result.base, colors=colors)
            for rank, case in enumerate(result.cases, start=1)
        ],
        "record": _record(record),
        "footer": f"Made by eosin {__version__}. A similar case is evidence to look at, not a diagnosis.",
    }
    environment = Environment(loader=PackageLoader("eosin.tasks"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("search_cases.html.j2").render(page)


def _views(place: Place, slides: Mapping[str, SlideFile]) -> Views:
    nothing = [None] * len(place.xy)
    size = place.size0_px
    if size is None:
        return Views(whole=None, tiles=nothing, why="the index does not know how large tiles are on this slide")
    try:
        with open_again(place.slide_id, slides.get(place.slide_id), size) as slide:
            tiles = [crop(slide, (int(x), int(y)), size, PAIR_PX) for x, y in place.xy]
            return Views(whole=_whole(slide, place, size), tiles=tiles)
    except EosinError as error:
        return Views(whole=None, tiles=nothing, why=str(error))


def _whole(slide: Slide, place: Place, size: Size) -> Pixels:
    pixels, scale = slide.thumbnail(SLIDE_PX)
    corners = place.xy / np.asarray(scale)
    ends = np.maximum(np.asarray(size) / np.asarray(scale), 5.0)
    boxes = [(float(x), float(y), float(x + ends[0]), float(y + ends[1])) for x, y in corners]
    return outlined(pixels, boxes, OUTLINE, 3)


def _card(
    rank: int,
    case: Case,
    asked: Sequence[Pixels | None],
    views: Views,
    base: Mapping[str, float],
    *,
    colors: Mapping[str, str],
) -> dict[str, Any]:
    pairs = [
        {"query": _uri(ours), "case": _uri(theirs), "score": f"{pair.score:.3f}", "covers": pair.covers}
        for pair, ours, theirs in zip(case.pairs, asked, views.tiles, strict=True)
    ]
    return {
        "rank": rank,
        "slide": case.slide_id,
        "patient": case.patient_id if case.patient_id != case.slide_id else "",
        "label": case.label,
        "color": colors.get(case.label, GREY),
        "score": f"{case.score:.3f}",
        "entropy": "" if case.entropy is None else f"entropy {case.entropy:.2f} bits",
        "whole": _uri(views.whole),
        "why": views.why,
        "pairs": pairs,
        "mix": _mix(case.mix, base, colors),
    }


def _mix(mix: Mapping[str, float], base: Mapping[str, float], colors: Mapping[str, str]) -> list[dict[str, Any]]:
    if set(mix) <= {"(no label)"}:
        return []
    return [
        {
            "name": name,
            "width": round(100 * share, 1),
            "tick": round(100 * base.get(name, 0.0), 1),
            "color": colors.get(name, GREY),
            "text": f"{100 * share:.0f} %",
        }
        for name, share in list(mix.items())[:MIX_SHOWN]
    ]


def _record(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    spec, settings = record["spec"], record["settings"]
    proven = {
        True: "no other slide can score higher"
        + ("" if settings["exact"] else ", if the engine's neighbours are true"),
        False: "another slide may score higher",
        None: "not shown to be complete",
    }
    return [
        ("index", record["index"]),
        ("encoder", f"{spec['encoder']}, {spec['dim']} numbers a tile; weights {spec['weights_sha256'] or 'none'}"),
        ("tiles", f"{spec['tile_px']} px at {spec['mpp']} microns per pixel"),
        ("filter", settings["where"] or "none"),
        ("same patient", "may be a case" if settings["same_patient"] else "left out"),
        ("neighbours a tile", str(settings["tiles"])),
        ("slides compared in full", str(record["compared"])),
        ("order", proven[record["proven"]]),
    ]


def _uri(pixels: Pixels | None) -> str | None:
    return None if pixels is None else data_uri(jpeg_bytes(pixels), "image/jpeg")


def _word(column: str) -> str:
    return {"patient_id": "patient"}.get(column, column)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
