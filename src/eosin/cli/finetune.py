"""Fine-tuning an encoder on cells: `finetune`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli.options import Json, Out, first_rank, print_json, print_table

if TYPE_CHECKING:
    from eosin.evaluation.report import Report
    from eosin.finetune.train import Status


def finetune(
    recipe: Annotated[str, typer.Argument(help="Named recipe: amf (atypical mitotic figures).")],
    data: Annotated[Path, typer.Option("--data", help="Table of cells, or a folder with one.", metavar="DIR_OR_TABLE")],
    encoder: Annotated[str, typer.Option("--encoder", help="What to fine-tune.", metavar="NAME")],
    out: Out,
    expert: Annotated[
        str, typer.Option("--expert", help="A second encoder, such as a CNN, mixed in by a gate.", metavar="NAME")
    ] = "",
    external: Annotated[
        str | None, typer.Option("--external", help="Cells predicted once, never trained on.", metavar="FIELD=VALUE")
    ] = None,
    leave_out: Annotated[
        str, typer.Option("--leave-out", help="Leave each scanner, domain ... out, instead of folds.", metavar="FIELD")
    ] = "",
    mode: Annotated[str | None, typer.Option("--mode", help="lora, head, last, full or vpt.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of LoRA.")] = None,
    without: Annotated[
        str, typer.Option("--without", help="Augmentation families to leave out, or all.", metavar="NAME[,NAME]")
    ] = "",
    crop: Annotated[
        int | None, typer.Option("--crop", help="Use only the centre of a tile, of this side.", metavar="PX")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Most epochs of a fold.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Tiles a step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    folds: Annotated[int | None, typer.Option("--folds", min=2, help="Folds of whole slides.")] = None,
    tta: Annotated[str | None, typer.Option("--tta", help="Views at inference: none, rot4 or dihedral.")] = None,
    soft_labels: Annotated[bool, typer.Option("--soft-labels", help="Train on shares of atypical votes.")] = False,
    mix: Annotated[str, typer.Option("--mix", help="Mix half of the training tiles: mixup or cutmix.")] = "",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, more time.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every random draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Fine-tune an encoder on cells: folds of whole slides, a threshold out of fold, an external test, one page.

    Several GPUs: torchrun --nproc-per-node N -m eosin.cli finetune ...
    """
    from eosin.finetune.run import finetune as run

    given = {"crop_px": crop, "epochs": epochs, "batch": batch, "lr": lr, "folds": folds, "tta": tta}
    config = _config(recipe, given, mode=mode, rank=rank, without=without)
    more = {"soft_labels": soft_labels, "mix": _mix(mix), "checkpointing": checkpointing}
    settled = _changed(config, leave_out=leave_out, seed=seed, **more)
    where = {"out": out, "external": _pair(external), "expert": expert, "device": device}
    with epochs_bar() as progress:
        report = run(data, encoder, settled, **where, progress=progress)
    if not first_rank():
        return
    if as_json:
        print_json(report.to_dict())
    else:
        _print_summary(report, out)


def _config(recipe: str, given: dict[str, Any], *, mode: str | None, rank: int | None, without: str) -> Any:
    """Return the recipe with what the command line changes."""
    from eosin.finetune.recipe import get_recipe

    config = get_recipe(recipe, **{name: value for name, value in given.items() if value is not None})
    adapt: dict[str, Any] = {name: value for name, value in (("mode", mode), ("rank", rank)) if value is not None}
    if rank is not None:
        adapt["alpha"] = 2.0 * rank
    if adapt:
        config = _changed(config, adapt=_changed(config.adapt, **adapt))
    names: list[Any] = [name.strip() for name in without.split(",") if name.strip()]
    if names == ["all"]:
        config = _changed(config, augment=None)
    elif names and config.augment is not None:
        config = _changed(config, augment=config.augment.without(*names))
    return config


def _changed(value: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(value, **changes)


def _mix(name: str) -> Any:
    """Return how tiles are mixed: one half of them, in one way."""
    from eosin.finetune.mix import MixConfig

    if name not in ("", "mixup", "cutmix"):
        raise typer.BadParameter(f"{name!r} is not mixup or cutmix", param_hint="--mix")
    chances = {"mixup_chance": 0.5 * (name == "mixup"), "cutmix_chance": 0.5 * (name == "cutmix")}
    return MixConfig(**chances) if name else None


def _pair(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    field, equals, value = text.partition("=")
    if not (field and equals and value):
        raise typer.BadParameter(f"{text!r} is not FIELD=VALUE, such as dataset=atnorm-br", param_hint="--external")
    return field, value


def _print_summary(report: Report, out: Path) -> None:
    from eosin.finetune.page import find, with_interval

    for remark in report.remarks:
        sys.stderr.write(f"{remark.severity}: {remark.message}\n")
    rows = []
    for name, words in (("out_of_fold", "out of fold"), ("external", "external")):
        section = report.sections[name]
        if section:
            cells = [("ba", "pooled"), ("ba", "domain_mean"), ("ba", "worst_domain"), ("auroc", "pooled")]
            rows.append([words, section["n"], *(with_interval(find(section, *cell)) for cell in cells)])
    print_table(["cells", "n", "BA (95 % CI)", "BA, mean of domains", "BA, worst domain", "AUROC"], rows)
    told = report.sections["threshold"]
    scale = f"temperature {told['temperature']:.3f}, shift {told['shift']:.3f}"
    sys.stdout.write(f"Threshold {told['threshold']:.3f}, {scale}, from out of fold.\n")
    sys.stdout.write(f"Model: {out / 'model'}\nOpen {out / 'report.html'} in a browser.\n")


@contextlib.contextmanager
def epochs_bar() -> Iterator[Callable[[Status], None] | None]:
    """Yield a callback that shows fold, epoch, loss, AUROC and balanced accuracy on stderr, and domains below."""
    if not first_rank():
        yield None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:

        def show(status: Status) -> None:
            table = Table(
                title=f"{status.fold}, epoch {status.epoch}/{status.epochs}: loss {status.loss:.4f}, "
                f"AUROC {status.auroc:.3f}, BA {status.ba:.3f}, {status.tiles_per_s:.0f} tiles/s",
                title_justify="left",
            )
            for column in ("domain (stopping part)", "cells", "BA at 0.5"):
                table.add_column(column)
            for name, n, ba in status.domains:
                table.add_row(name, str(n), "one class" if ba is None else f"{ba:.3f}")
            live.update(table, refresh=True)

        yield show
