"""Validation of predictions: `validate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli.options import Json, Out, print_json, print_table

if TYPE_CHECKING:
    from eosin.evaluation.report import Report

Column = str | None


def _column(name: str, text: str) -> object:
    return typer.Option(name, help=text, metavar="COL")


def validate(
    predictions: Annotated[Path, typer.Argument(help="Table of predictions: .csv, .tsv or .parquet, one row each.")],
    out: Out,
    label: Annotated[str, _column("--label", "Column of the reference standard.")],
    score: Annotated[str, _column("--score", "Column of P(positive).")],
    group: Annotated[Column, _column("--group", "Column of the patient, the unit that is resampled.")] = None,
    site: Annotated[Column, _column("--site", "Column of the medical centre.")] = None,
    subgroup: Annotated[list[str] | None, _column("--subgroup", "Column to break results down by; repeatable.")] = None,
    date: Annotated[Column, _column("--date", "Column of ISO dates.")] = None,
    split: Annotated[Column, _column("--split", "Column: rows 'tune' choose the threshold, 'test' are scored.")] = None,
    image: Annotated[Column, _column("--image", "Column of picture files, relative to the table.")] = None,
    positive: Annotated[str | None, typer.Option("--positive", help="Label that counts as positive.")] = None,
    logits: Annotated[bool, typer.Option("--logits", help="Scores are logits: apply a sigmoid.")] = False,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Operating point, set beforehand.")] = None,
    reference: Annotated[Column, _column("--reference", "Column of another model's score.")] = None,
    margin: Annotated[float | None, typer.Option("--margin", help="Non-inferiority margin in AUROC.")] = None,
    readers: Annotated[Path | None, typer.Option("--readers", help="Table of readers' calls; see the docs.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of every random draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Validate any model's predictions: intervals, calibration per site, plots, checklists, one page."""
    from eosin.tasks.validate import ValidationSettings
    from eosin.tasks.validate import validate as run_validation

    columns = {
        "label": label,
        "score": score,
        "group": group,
        "site": site,
        "date": date,
        "split": split,
        "image": image,
    }
    settings = ValidationSettings(
        **columns,
        subgroups=tuple(subgroup or ()),
        positive=positive,
        logits=logits,
        threshold=threshold,
        reference=reference,
        margin=margin,
        readers=readers,
        seed=seed,
    )
    report = run_validation(predictions, settings, out=out)
    if as_json:
        print_json(report.to_dict())
    else:
        _print_summary(report, out)


def _print_summary(report: Report, out: Path) -> None:
    for remark in report.remarks:
        sys.stderr.write(f"{remark.severity}: {remark.message}\n")
    data, pooled = report.sections["data"], report.sections["discrimination"]["pooled"]
    shown = {**pooled, "ece": report.sections["calibration"]["pooled"]["ece"]}
    names = ("auroc", "auprc", "ba", "sensitivity", "specificity", "brier", "ece")
    rows = [[name, *(_short(shown[name][end]) for end in ("point", "low", "high"))] for name in names]
    print_table(["metric", "estimate", "low", "high"], rows)
    unit = f"{data['clusters']} patients" if data["cluster_column"] else "rows taken as independent"
    threshold = report.sections["operating_point"]
    sys.stdout.write(
        f"{data['rows_scored']} rows, {unit}; threshold {threshold['threshold']:.3f}, {threshold['words']}\n"
    )
    sys.stdout.write(f"Open {out / 'report.html'} in a browser.\n")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
