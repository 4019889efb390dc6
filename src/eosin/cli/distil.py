"""Teaching a small encoder what a fine-tuned one answers: `distil`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli.finetune import _config, _print_summary, epochs_bar
from eosin.cli.options import Json, Out, first_rank, print_json, print_table

if TYPE_CHECKING:
    from eosin.evaluation.report import Report


def distil(
    teacher: Annotated[Path, typer.Option("--teacher", help="Finished run of eosin finetune.", metavar="RUN")],
    data: Annotated[Path, typer.Option("--data", help="The teacher's table of cells.", metavar="DIR_OR_TABLE")],
    encoder: Annotated[str, typer.Option("--encoder", help="The student.", metavar="NAME")],
    out: Out,
    unlabelled: Annotated[
        Path | None,
        typer.Option("--unlabelled", help="Pictures that the teacher alone speaks of.", metavar="DIR_OR_TABLE"),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Softens both logits.")] = 2.0,
    logit: Annotated[float, typer.Option("--logit", help="How much the teacher's logit counts.")] = 1.0,
    feature: Annotated[float, typer.Option("--feature", help="How much its vector counts.")] = 1.0,
    label: Annotated[float, typer.Option("--label", help="How much the labels count.")] = 1.0,
    compare: Annotated[str, typer.Option("--compare", help="Of vectors: cosine or smooth-l1.")] = "cosine",
    mode: Annotated[str, typer.Option("--mode", help="What of the student trains: full, lora, last or head.")] = "full",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of LoRA.")] = None,
    without: Annotated[
        str, typer.Option("--without", help="Augmentation families to leave out, or all.", metavar="NAME[,NAME]")
    ] = "",
    crop: Annotated[
        int | None, typer.Option("--crop", help="The student sees only the centre of a tile.", metavar="PX")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Most epochs of a fold.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Tiles a step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")] = None,
    tta: Annotated[str | None, typer.Option("--tta", help="Views at inference: none, rot4 or dihedral.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Teach a small encoder what a fine-tuned one answers, fold by fold, and compare it with learning alone."""
    from eosin.finetune.distil import DistilConfig
    from eosin.finetune.distil_run import distil as run

    given = {"crop_px": crop, "epochs": epochs, "batch": batch, "lr": lr, "tta": tta}
    config = _config("amf", given, mode=mode, rank=rank, without=without)
    shares = {"temperature": temperature, "logit": logit, "feature": feature, "label": label}
    how = DistilConfig(**shares, compare=compare)  # pyright: ignore[reportArgumentType]
    folders = {"teacher": teacher, "out": out, "unlabelled": unlabelled}
    with epochs_bar() as progress:
        report = run(data, encoder, config, how, **folders, device=device, progress=progress)
    if not first_rank():
        return
    if as_json:
        print_json(report.to_dict())
    else:
        _print_summary(report, out)
        _print_comparison(report)


def _print_comparison(report: Report) -> None:
    from eosin.finetune.distil_run import KINDS, METRIC_NAMES, MODEL_NAMES
    from eosin.finetune.page import with_interval

    told = report.sections["distillation"]
    for kind, words in KINDS.items():
        part = told[kind]
        if part is None:
            continue
        sys.stdout.write(f"\n{words}: {part['n']} cells of {part['slides']} slides\n")
        rows = [
            [MODEL_NAMES[row["model"]], with_interval(row["auroc"]), with_interval(row["ba"])] for row in part["models"]
        ]
        print_table(["", "AUROC (95 % CI)", "BA (95 % CI)"], rows)
        for gap in part["differences"]:
            pair = f"{MODEL_NAMES[gap['a']]} - {MODEL_NAMES[gap['b']]}"
            sys.stdout.write(f"{METRIC_NAMES[gap['metric']]}, {pair}: {with_interval(gap)}\n")
