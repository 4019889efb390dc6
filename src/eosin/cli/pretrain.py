"""Self-supervised training: `pretrain`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli.options import Json, first_rank, print_json, print_table

if TYPE_CHECKING:
    from eosin.pretrain.trainer import Outcome, Status

STOPPED = 143
PROBES = ("knn", "linear")


def pretrain(
    config: Annotated[Path, typer.Option("--config", help="TOML file of the run.", metavar="FILE.toml")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to; a run that was stopped goes on there.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what the run costs, and start nothing.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Train an encoder on tiles of your slides, self-supervised (DINOv2); several GPUs: torchrun -m eosin.cli."""
    from eosin.pretrain.config import read_config

    settings = read_config(config)
    if plan:
        from eosin.pretrain.planner import plan as cost_of

        cost = cost_of(settings)
        print_json(cost.to_dict()) if as_json else sys.stdout.write(f"{cost}\n")
        return
    if out is None:
        raise typer.BadParameter("give the folder to write to", param_hint="--out")
    from eosin.pretrain.trainer import pretrain as run

    with _bar() if first_rank() else contextlib.nullcontext() as progress:
        outcome = run(settings, out, device=device, progress=progress)
    if first_rank():
        _print_outcome(outcome, as_json)
    raise typer.Exit(0 if outcome.finished else STOPPED)


def _print_outcome(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        kept = {f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)}
        print_json({**kept, "budget": dataclasses.asdict(outcome.budget), "finished": outcome.finished})
        return
    steps, last = outcome.budget.steps, outcome.last
    sys.stdout.write(f"{outcome.step} of {steps} steps, loss {last['loss']:.3f}, {last['images_per_s']:.1f} images/s\n")
    if outcome.probe is not None:
        rows = [[name, *(f"{outcome.probe[name][end]:.3f}" for end in ("point", "low", "high"))] for name in PROBES]
        print_table(["held-out balanced accuracy", "estimate", "low", "high"], rows)
    if outcome.encoder is None:
        sys.stdout.write("Stopped before its end; run the same command again to go on.\n")
    else:
        sys.stdout.write(f"Encoder: {outcome.encoder}\n")
    sys.stdout.write(f"Open {outcome.report} in a browser.\n")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Status], None]]:
    """Yield a callback that shows steps, loss and images/s on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("step {task.completed:g}/{task.total:g} {task.fields[note]}")
    columns = (SpinnerColumn(), text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("pretrain", total=1, note="")

        def show(status: Status) -> None:
            note = f"loss {status.loss:.3f}  {status.images_per_s:.0f} images/s  waiting {100 * status.wait:.0f} %"
            bar.update(task, total=status.steps, completed=status.step, note=note)

        yield show
