"""Finding mitotic figures: `detect train` on boxes, `detect run` on slides."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli.options import Inputs, Json, Masks, SlideMpp, print_json, print_table

if TYPE_CHECKING:
    from eosin.features.jobs import Job
    from eosin.finetune.detector_files import TrainedDetector
    from eosin.finetune.detector_train import Step

app = typer.Typer(help="Find mitotic figures: train a detector on boxes, run it on slides.", no_args_is_help=True)
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; what is there is replaced.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]


@app.command()
def train(
    data: Annotated[Path, typer.Option("--data", help="Boxes, in the form of MIDOG++.json.", metavar="FILE")],
    images: Annotated[Path, typer.Option("--images", help="Folder of their pictures, or of crops with a table.")],
    encoder: Annotated[str, typer.Option("--encoder", help="Whose patch tokens are used.", metavar="NAME")],
    out: Out,
    mode: Annotated[str, typer.Option("--mode", help="What of the encoder trains: head (nothing), lora ...")] = "head",
    window_px: Annotated[int, typer.Option("--window-px", min=16, help="Side of a window.")] = 224,
    mpp: Annotated[float, typer.Option("--mpp", help="Microns per pixel of a window.")] = 0.25,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps a fold.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows a step.")] = 32,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-3,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Folds of whole slides.")] = 5,
    slide_mpp: SlideMpp = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every random draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a detector on boxes: folds of whole slides, a threshold out of fold, F1 by the MIDOG rule."""
    from eosin.finetune.adapters import AdaptConfig
    from eosin.finetune.detector_files import DetectConfig
    from eosin.finetune.detector_train import train_detector

    adapt = AdaptConfig(mode=mode)  # type: ignore[arg-type]
    given: dict[str, Any] = {"steps": steps, "batch": batch, "lr": lr, "folds": folds, "seed": seed}
    config = DetectConfig(adapt=adapt, window_px=window_px, mpp=mpp, **given)
    with _steps() as progress:
        report = train_detector(
            data, images, encoder, config, out=out, slide_mpp=slide_mpp, device=device, progress=progress
        )
    if as_json:
        print_json(report)
    else:
        _print_report(report, out)


@app.command()
def run(
    inputs: Inputs,
    model: Annotated[Path, typer.Option("--model", help="Folder that detect train wrote.")],
    out: Out,
    threshold: Annotated[
        float | None, typer.Option("--threshold", min=0, max=1, help="Least score; the model's own.")
    ] = None,
    encoder: Annotated[
        str, typer.Option("--encoder", help="Where the encoder lies, if not where the model says.")
    ] = "",
    slide_mpp: SlideMpp = None,
    masks: Masks = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the mitotic figures of slides: per slide a GeoJSON for QuPath, and a count per mm² of tissue."""
    from eosin.features.jobs import find_jobs
    from eosin.finetune.detector_files import load_detector

    jobs = find_jobs(inputs, slide_mpp=slide_mpp, masks=masks)
    detector = load_detector(model, device=device, encoder=encoder)
    least = detector.threshold if threshold is None else threshold
    with _slides(len(jobs)) as show:
        rows = [_run_one(job, detector, out, least, show) for job in jobs]
    for row in rows:
        for note in row.get("notes", []):
            sys.stderr.write(f"{row['slide']}: {note}\n")
    if as_json:
        print_json({"out": str(out), "slides": rows})
    else:
        print_table(
            ["slide", "figures", "tissue mm2", "per mm2 (95 % CI)", "error"],
            [[row["slide"], row.get("figures"), _mm2(row), _density(row), row.get("error")] for row in rows],
        )
    raise typer.Exit(1 if any(row.get("error") for row in rows) else 0)


def _run_one(
    job: Job, detector: TrainedDetector, out: Path, threshold: float, show: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Return what was found on a slide, or why it failed; the next slide does not suffer."""
    from eosin.errors import EosinError
    from eosin.finetune.detector_scan import detect_slide

    try:
        slide = job.open()
        with slide:
            return detect_slide(
                slide,
                detector,
                job.tissue(slide),
                out=out,
                name=job.slide_id,
                threshold=threshold,
                progress=lambda done, total: show(job.slide_id, done, total),
            )
    except (EosinError, OSError) as error:
        return {"slide": job.slide_id, "error": f"{type(error).__name__}: {error}"}


def _mm2(row: dict[str, Any]) -> str:
    return f"{row['tissue_mm2']:.2f}" if "tissue_mm2" in row else ""


def _density(row: dict[str, Any]) -> str:
    found = row.get("per_mm2")
    return "" if found is None else f"{found['point']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def _print_report(report: dict[str, Any], out: Path) -> None:
    for note in report["notes"]:
        sys.stderr.write(f"{note}\n")
    f1 = report["f1"]
    low, high = (float("nan") if f1[end] is None else f1[end] for end in ("low", "high"))
    print_table(
        ["slides", "figures", "F1 (95 % CI)", "precision", "recall", "threshold"],
        [
            [
                report["slides"],
                report["figures"],
                f"{f1['point']:.3f} ({low:.3f}-{high:.3f})",
                *("" if report[name] is None else f"{report[name]:.3f}" for name in ("precision", "recall")),
                f"{report['threshold']:.2f}",
            ]
        ],
    )
    sys.stdout.write(f"Out of fold, hits within 7.5 microns. Model: {out}\n")


@contextlib.contextmanager
def _steps() -> Iterator[Callable[[Step], None]]:
    """Yield a callback that shows fold, step and loss on stderr."""
    with _bar("training") as (bar, task):

        def show(step: Step) -> None:
            done, total = (step.fold - 1) * step.steps + step.step, step.folds * step.steps
            note = f"fold {step.fold}/{step.folds}, loss {step.loss:.3f}"
            bar.update(task, total=total, completed=done, note=note)

        yield show


@contextlib.contextmanager
def _slides(count: int) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback that shows the slide and its windows on stderr."""
    seen: dict[str, None] = {}
    with _bar("windows") as (bar, task):

        def show(name: str, done: int, total: int) -> None:
            seen.setdefault(name)
            bar.update(task, total=total, completed=done, note=f"slide {len(seen)} of {count}: {name}")

        yield show


@contextlib.contextmanager
def _bar(what: str) -> Iterator[tuple[Any, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description} {task.completed:g}/{task.total:g} {task.fields[note]}")
    columns = (SpinnerColumn(), text, BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar, bar.add_task(what, total=1, note="")
