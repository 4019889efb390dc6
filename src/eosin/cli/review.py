"""Cheap labels from search: `review`, and what a model's errors say: `hard-examples`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli.options import Json, Out, print_json, print_table

if TYPE_CHECKING:
    from eosin.tasks.hard_examples import HardExamples
    from eosin.tasks.review import Review
    from eosin.tasks.review_pool import Pool
    from eosin.tasks.review_queue import Shares

Features = Annotated[
    Path, typer.Argument(help="Feature store, search index, folder of images (with --encoder), .npy or .npz.")
]
Encoder = Annotated[str | None, typer.Option("--encoder", help="What reads images.", metavar="NAME")]
Slides = Annotated[
    list[Path] | None,
    typer.Option("--slides", help="Slides, folders or tables: where the slides lie, for the pictures."),
]


def review(
    features: Features,
    out: Out,
    seeds: Annotated[
        list[Path] | None,
        typer.Option("--seeds", help="<slide>.geojson of QuPath, or a table with labels; repeatable."),
    ] = None,
    cohort: Annotated[Path | None, typer.Option("--cohort", help="Table with patient_id and split of slides.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="Class, in the order of the keys.")] = None,
    encoder: Encoder = None,
    slides: Slides = None,
    reviewer: Annotated[str, typer.Option("--reviewer", help="Whose decisions; each has a file.")] = "reviewer",
    size: Annotated[int, typer.Option("--size", min=1, help="Tiles a round.")] = 50,
    shares: Annotated[
        str, typer.Option("--shares", help="Parts: uncertain, hard, diverse, audit.", metavar="F,F,F,F")
    ] = "40,30,20,10",
    page: Annotated[bool, typer.Option("--page", help="Write the queue as a page instead of asking here.")] = False,
    read: Annotated[Path | None, typer.Option("--read", help="Take the decisions that a page downloaded.")] = None,
    export: Annotated[bool, typer.Option("--export", help="Write the labels of all reviewers in OUT.")] = False,
    propagate: Annotated[
        bool, typer.Option("--propagate", help="Export also labels that spread to sure tiles.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of every random draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Label tiles in rounds: similar to the seeds first, then what teaches the most; stop when the audit is flat."""
    from eosin.tasks.review import Review
    from eosin.tasks.review_page import read_decisions
    from eosin.tasks.review_pool import open_pool, read_all_seeds, tile_pictures

    parts = _shares(shares)
    pool = open_pool(features, cohort, encoder=encoder, cache=out)
    if export or propagate:
        _export(pool, out, propagate, as_json)
        return
    path = out / f"review-{reviewer}.jsonl"
    if path.is_file() and not seeds:
        opened = Review.resume(pool, path)
    else:
        found = read_all_seeds(seeds or [], pool)
        opened = Review.start(pool, path, seeds=found, labels=label or (), reviewer=reviewer, seed=seed)
    with opened as one:
        pictures = tile_pictures(pool, features, slides or ())
        if read is not None:
            sys.stderr.write("{} decisions taken, {} known already\n".format(*read_decisions(read, one)))
        elif page:
            _page(one, out, pictures, size, parts)
        else:
            _terminal(one, pictures, size, parts)
        _told(one, as_json)


def _shares(text: str) -> Shares:
    from eosin.tasks.review_queue import Shares

    try:
        uncertain, hard, diverse, audit = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not four numbers, such as 40,30,20,10", param_hint="--shares") from None
    return Shares(uncertain=uncertain, hard=hard, diverse=diverse, audit=audit)


def _page(one: Review, out: Path, picture: Any, size: int, parts: Shares) -> None:
    from eosin.features.writer import write_durably
    from eosin.tasks.review_page import queue_page

    if not one.pending():
        one.next_round(size=size, shares=parts)
    write_durably(out / "queue.html", queue_page(one, picture).encode())
    sys.stderr.write(f"Open {out / 'queue.html'} in a browser, decide, download, and give the file to --read.\n")


def _terminal(one: Review, picture: Any, size: int, parts: Shares) -> None:
    from eosin.tasks.review_terminal import review_at_terminal, terminal_keys

    keys = terminal_keys(sys.stdin)
    try:
        review_at_terminal(
            one, keys, sys.stderr.write, picture=picture, size=size, shares=parts, pictures=sys.stderr.isatty()
        )
    finally:
        keys.close()


def _told(one: Review, as_json: bool) -> None:
    advice, pending = one.stop_advice(), len(one.pending())
    if as_json:
        from eosin.evaluation.report import plain

        print_json(plain({"round": one.round, "labels": one.counts(), "pending": pending, "audit": advice}))
        return
    print_table(["class", "tiles"], [[name, count] for name, count in one.counts().items()])
    sys.stdout.write(f"round {one.round}, {pending} tiles wait; {advice.why}\n")


def _export(pool: Pool, out: Path, propagate: bool, as_json: bool) -> None:
    from eosin.evaluation.report import plain
    from eosin.retrieval.propagate import Propagation
    from eosin.tasks.review_export import export_reviews

    found = export_reviews(pool, out, spread=Propagation() if propagate else None)
    if as_json:
        print_json(plain(found))
        return
    rows = [[name, count, found.propagated[name]] for name, count in found.labels.items()]
    print_table(["class", "reviewed", "propagated"], rows)
    agreement = "" if found.kappa is None else f"; kappa {found.kappa:.3f} on {found.both} tiles that two labelled"
    sys.stdout.write(f"{found.table}{agreement}\n" + "".join(f"{note}\n" for note in found.notes))


def hard_examples(
    features: Features,
    cohort: Annotated[Path, typer.Argument(help="Table of labels, as it was probed.")],
    predictions: Annotated[Path, typer.Argument(help="predictions_<encoder>.csv of eosin probe.")],
    out: Out,
    encoder: Encoder = None,
    group: Annotated[str | None, typer.Option("--group", help="Column of the patient.", metavar="COL")] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Operating point; chosen on rows 'tune' without it.")
    ] = None,
    slides: Slides = None,
    as_json: Json = False,
) -> None:
    """Set each error of a model beside its nearest labelled neighbours: is the label doubtful, or the case?"""
    from eosin.tasks.hard_examples import hard_examples as run

    found = run(
        features, cohort, predictions, out=out, encoder=encoder, group=group, threshold=threshold, slides=slides or ()
    )
    if as_json:
        print_json(found.report.to_dict())
    else:
        _print_errors(found, out)


def _print_errors(found: HardExamples, out: Path) -> None:
    for remark in found.report.remarks:
        sys.stderr.write(f"{remark.severity}: {remark.message}\n")
    rows = [[one["verdict"], one["missed"], one["false_alarms"]] for one in found.report.sections["verdicts"]]
    print_table(["verdict", "missed", "false alarms"], rows)
    sys.stdout.write(f"Open {out / 'hard_examples.html'} in a browser.\n")
