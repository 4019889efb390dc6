"""A fine-tuned model at work: `cells`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli.options import Json, Out, SlideMpp, print_json, print_table

if TYPE_CHECKING:
    from eosin.finetune.predict import Scored, Scorer


def cells(
    source: Annotated[
        Path, typer.Argument(help="Crops (table, folder), slides (with --points), or a feature store.", metavar="INPUT")
    ],
    model: Annotated[Path, typer.Option("--model", help="Run or model folder of eosin finetune.", metavar="DIR")],
    out: Out,
    points: Annotated[
        Path | None, typer.Option("--points", help="Detections of the slide, or a folder with one file a slide.")
    ] = None,
    region: Annotated[
        Path | None, typer.Option("--region", help="GeoJSON of areas to count in, or a folder with one a slide.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="P(atypical) from which a cell is atypical; the model's own.")
    ] = None,
    tta: Annotated[str | None, typer.Option("--tta", help="Views: none, rot4 or dihedral; the model's own.")] = None,
    slide_mpp: SlideMpp = None,
    encoder: Annotated[str, typer.Option("--encoder", help="Where its encoder lies now.", metavar="NAME")] = "",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Say which cells are atypical: of crops, of slides' detections with counts per mm², or of a feature store."""
    from eosin.finetune.predict import load_scorer

    if points is None and (region is not None or slide_mpp is not None):
        raise typer.BadParameter("--region and --slide-mpp are for slides, which need --points", param_hint="--points")
    scorer = load_scorer(model, device=device, encoder=encoder, threshold=threshold, tta=tta)  # type: ignore[arg-type]
    with _bar() as progress:
        found = _score(source, scorer, out, points=points, region=region, slide_mpp=slide_mpp, progress=progress)
    for note in found.notes:
        sys.stderr.write(f"note: {note}\n")
    if as_json:
        lines = found.table.astype(object).where(found.table.notna(), None).to_dict("records")
        print_json({"lines": lines, "failed": dict(found.failed), "notes": list(found.notes)})
    else:
        _print_summary(found, scorer.ensemble.threshold, slides=points is not None)
    for name, why in list(found.failed.items())[:20]:
        sys.stderr.write(f"failed: {name}: {why}\n")
    if len(found.failed) > 20:
        sys.stderr.write(f"failed: {len(found.failed)} in all; {found.files[0]} lists them\n")
    raise typer.Exit(1 if found.failed else 0)


def _score(source: Path, scorer: Scorer, out: Path, *, points: Path | None, progress: Any, **slides: Any) -> Scored:
    from eosin.finetune.predict import score_crops, score_store
    from eosin.finetune.predict_slides import score_slides

    if points is not None:
        return score_slides(source, scorer, points=points, out=out, progress=progress, **slides)
    if (source / "manifest.json").is_file():
        return score_store(source, scorer, out=out, progress=progress)
    return score_crops(source, scorer, out=out, progress=progress)


def _print_summary(found: Scored, threshold: float, *, slides: bool) -> None:
    table = found.table
    if slides:
        _print_slides(table.to_dict("records"))
    else:
        scored = int(table["p_atypical"].notna().sum())
        atypical = int((table["call"] == "atypical").sum()) if scored else 0
        sys.stdout.write(f"{scored} scored, {atypical} called atypical from P {threshold:.3f} on")
        sys.stdout.write(f", {len(found.failed)} failed.\n" if found.failed else ".\n")
    sys.stdout.write("".join(f"Wrote {path}\n" for path in found.files))
    if not slides and "atypical" in table:
        sys.stdout.write(
            "The labels are in the table: eosin validate PREDICTIONS --label atypical --score p_atypical "
            "gives figures with intervals.\n"
        )


def _print_slides(lines: list[dict[Any, Any]]) -> None:
    done = [line for line in lines if not line["error"]]
    rows = []
    for line in done:
        for lead, where in (("", "tissue"), ("region_", "region")):
            if line.get(f"{lead}area_mm2", float("nan")) > 0:
                density = [
                    "{:.3g} ({:.3g}-{:.3g})".format(
                        *(line[f"{lead}{kind}_{part}"] for part in ("per_mm2", "low", "high"))
                    )
                    for kind in ("figures", "atypical")
                ]
                counts = [int(line[f"{lead}{kind}_n"]) for kind in ("figures", "atypical")]
                rows.append([line["slide"], where, f"{line[f'{lead}area_mm2']:.3g}", *counts, *density])
    columns = ["slide", "area", "mm²", "figures", "atypical", "figures/mm² (95 % CI)", "atypical/mm² (95 % CI)"]
    if rows:
        print_table(columns, rows)
    sys.stdout.write(f"{len(done)} of {len(lines)} slides counted; not for clinical use.\n")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """Yield a callback that shows how many are done, and the one at hand, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.completed:g}/{task.total:g} {task.description}")
    columns = (SpinnerColumn(), text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield show
