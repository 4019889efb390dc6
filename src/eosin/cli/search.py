"""Find similar: `index` and `search`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli.options import Json, SlideMpp, TilePx, parse_mpp, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from eosin.retrieval.cases import CaseResult
    from eosin.tasks.search import Question

SHOWN = ("label", "site", "patient_id")
_QUERY = (
    "SLIDE:x,y (a tile), SLIDE:x,y,width,height (a region), SLIDE, FILE.geojson[:CLASS], or an image; several are "
    "looked for together."
)
Query = Annotated[
    list[str] | None, typer.Option("--query", "-q", help=_QUERY, metavar="TILE|REGION|SLIDE|GEOJSON|IMAGE")
]
Against = Annotated[list[str] | None, typer.Option("--against", help="What hits should be unlike.")]
Filters = Annotated[
    list[str] | None, typer.Option("--filter", "-f", help="site=A,B  label!=tumour  qc_focus>=0.1; all must hold.")
]
Page = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the page, contact sheet, JSON and GeoJSON.")]
Aggregator = Annotated[
    str, typer.Option("--aggregator", help="Of cases: median-of-minima, entropy-vote, mean-top-k or slide-vector.")
]
Variety = Annotated[
    float | None, typer.Option("--mmr", min=0, max=1, help="Varied hits: weight of likeness, such as 0.7.")
]
NewFeatures = Annotated[
    Path | None, typer.Option("--features", help="Folder of features of slides that are not in the index.")
]
ImageMpp = Annotated[
    str | None, typer.Option("--mpp", help="Microns per pixel of an image file (or 20x).", metavar="F")
]
ImageEncoder = Annotated[
    str | None, typer.Option("--encoder", "-e", help="What reads image files; the index's own when left out.")
]
Evaluate = Annotated[
    bool, typer.Option("--evaluate", help="Instead of a query: measure what the index finds, against chance.")
]
Site = Annotated[str, typer.Option("--site", help="Field of the site or scanner, for --evaluate.", metavar="FIELD")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="QDRANT_API_KEY", help="Of a server.", show_envvar=True)]
Slides = Annotated[
    list[Path] | None,
    typer.Option("--slides", help="Slides, folders or tables: where the slides lie, for the pictures."),
]


def index(
    source: Annotated[Path, typer.Argument(help="Folder of features; or slides, with --encoder.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the index, or http://HOST:PORT/COLLECTION.")],
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", help="Extract slides with it first.")] = None,
    tile_px: TilePx = 224,
    mpp: Annotated[str, typer.Option("--mpp", help="Microns per pixel of the tiles (or 20x).")] = "0.5",
    slide_mpp: SlideMpp = None,
    slides: Slides = None,
    cohort: Annotated[
        Path | None, typer.Option("--cohort", help="Table: patient_id, site, stain, organ, labels of slides or tiles.")
    ] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="Column of the cohort that hits show as label.", metavar="COL")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="auto, exact, edge or server.")] = "auto",
    quantise: Annotated[str, typer.Option("--quantise", help="none, int8 or binary, always rescored.")] = "none",
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Reader processes.")] = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Make features searchable: an index of tiles with slide, patient, site, label and quality as filters."""
    from eosin.tasks.search_index import IndexSettings, make_index

    settings = IndexSettings(
        encoder=encoder,
        tile_px=tile_px,
        mpp=parse_mpp(mpp)[0],
        slide_mpp=slide_mpp,
        slides=tuple(slides or ()),
        cohort=cohort,
        label=label,
        engine=engine,  # type: ignore[arg-type]
        quantise=quantise,  # type: ignore[arg-type]
        workers=workers,
        api_key=api_key,
    )
    with progress_bar() as progress:
        made = make_index(source, out, settings, progress=progress)
    if as_json:
        print_json(made.to_dict())
    else:
        for note in made.notes:
            sys.stderr.write(f"note: {note}\n")
        sys.stdout.write(
            f"{len(made.done)} slides stored, {len(made.skipped)} already there, {len(made.failed)} failed; "
            f"{made.points} tiles in {made.out} ({made.engine}), {made.seconds:.1f} s\n"
        )
        if made.failed:
            print_table(["slide", "why it is not in the index"], sorted(made.failed.items()))
    raise typer.Exit(1 if made.failed else 0)


def search(
    index: Annotated[str, typer.Argument(help="Folder of an index, or http://HOST:PORT/COLLECTION.")],
    query: Query = None,
    against: Against = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Hits wanted.")] = 10,
    filter: Filters = None,
    out: Page = None,
    cases: Annotated[bool, typer.Option("--cases", help="Look for similar slides rather than tiles.")] = False,
    aggregator: Aggregator = "median-of-minima",
    merge: Annotated[str, typer.Option("--merge", help="Of several tiles: their mean, or the best of each.")] = "mean",
    mmr: Variety = None,
    same_slide: Annotated[bool, typer.Option("--same-slide", help="Let the query's slide be found.")] = False,
    same_patient: Annotated[bool, typer.Option("--same-patient", help="Let the query's patient be found.")] = False,
    features: NewFeatures = None,
    slides: Slides = None,
    slide: Annotated[str | None, typer.Option("--slide", help="Slide that a GeoJSON file was drawn on.")] = None,
    mpp: ImageMpp = None,
    encoder: ImageEncoder = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every tile.")] = False,
    evaluate: Evaluate = False,
    site: Site = "site",
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Find the tiles, or the cases, most like a tile, a region, an annotation, a slide or an image."""
    if evaluate == bool(query):
        raise typer.BadParameter("give what to look for, or --evaluate", param_hint="--query")
    if evaluate:
        _evaluate(index, site, out, exact=exact, api_key=api_key, as_json=as_json)
        return
    from eosin.tasks.search import Question

    question = Question(
        queries=tuple(query or ()),
        against=tuple(against or ()),
        filters=tuple(filter or ()),
        slide=slide,
        features=features,
        image_mpp=None if mpp is None else parse_mpp(mpp)[0],
        encoder=encoder,
        k=k,
        same_slide=same_slide,
        same_patient=same_patient,
        mmr=mmr,
        merge=merge,  # type: ignore[arg-type]
        exact=exact,
    )
    _answer(
        index,
        question,
        tuple(slides or ()),
        out,
        aggregator=aggregator if cases else None,
        api_key=api_key,
        as_json=as_json,
    )


def _answer(
    index: str,
    question: Question,
    slides: tuple[Path, ...],
    out: Path | None,
    *,
    aggregator: str | None,
    api_key: str | None,
    as_json: bool,
) -> None:
    """Search for tiles, or with an aggregator for cases, and print what was found."""
    if aggregator is not None:
        from eosin.tasks.search_cases import answer_cases

        found, record, made = answer_cases(
            index, question, aggregator=aggregator, slides=slides, out=out, api_key=api_key
        )
        columns, rows = _case_table(found)
    else:
        from eosin.tasks.search import answer

        _, record, made = answer(index, question, slides=slides, out=out, api_key=api_key)
        columns, rows = _hit_table(record)
    if as_json:
        print_json(record)
        return
    for note in record["notes"]:
        sys.stderr.write(f"note: {note}\n")
    if rows:
        print_table(columns, rows)
    for what, path in made.items():
        sys.stdout.write(f"{path}  ({what})\n")


def _evaluate(index: str, site: str, out: Path | None, *, exact: bool, api_key: str | None, as_json: bool) -> None:
    """Measure an index, write its page, and print the shares of neighbours that agree with their tile."""
    from eosin.retrieval.engines import open_index
    from eosin.tasks.evaluate_search import EvaluationSettings, evaluate_search

    if out is None:
        raise typer.BadParameter("an evaluation writes a page: give a folder", param_hint="--out")
    with contextlib.closing(open_index(index, api_key=api_key)) as opened:
        report = evaluate_search(opened, EvaluationSettings(site=site, exact=exact), out=out)
    if as_json:
        print_json(report.to_dict())
        return
    for remark in report.remarks:
        sys.stderr.write(f"{remark.severity}: {remark.message}\n")
    sys.stdout.write(f"Open {out / 'report.html'} in a browser.\n")


def _hit_table(record: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows; a tile is written as the next --query takes it, fields that no hit has are left out."""
    known = [name for name in SHOWN if any(hit.get(name) is not None for hit in record["hits"])]
    rows = [
        [
            hit["rank"],
            f"{hit['score']:.3f}",
            _top(hit["rarity"]),
            f"{hit['slide_id']}:{hit['x']},{hit['y']}",
            *(hit.get(name) for name in known),
        ]
        for hit in record["hits"]
    ]
    return ["", "score", "top", "tile", *(name.removesuffix("_id") for name in known)], rows


def _top(rarity: float | None) -> str:
    if rarity is None:
        return ""
    return "best" if rarity == 0 else f"{100 * rarity:.2g} %"


def _case_table(result: CaseResult) -> tuple[list[str], list[list[Any]]]:
    rows = [
        [rank, f"{case.score:.3f}", case.slide_id, case.patient_id, case.label, _mix(case.mix)]
        for rank, case in enumerate(result.cases, start=1)
    ]
    return ["", "score", "slide", "patient", "label", "its neighbours"], rows


def _mix(mix: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(mix.items())[:3])
