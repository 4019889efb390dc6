"""Frozen features against labels: `probe`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli.options import Json, Out, print_json, print_table

if TYPE_CHECKING:
    from eosin.evaluation.report import Report

Column = str | None


def _column(name: str, text: str) -> object:
    return typer.Option(name, help=text, metavar="COL")


def probe(
    features: Annotated[Path, typer.Argument(help="Feature store, folder of images (with --encoder), .npy or .npz.")],
    cohort: Annotated[Path, typer.Argument(help="Table of labels: .csv, .tsv or .parquet.")],
    out: Out,
    label: Annotated[str, _column("--label", "Column to predict.")],
    positive: Annotated[str | None, typer.Option("--positive", help="Label that counts as positive.")] = None,
    head: Annotated[str, typer.Option("--head", help="linear, knn, prototype or sgd.")] = "linear",
    encoder: Annotated[
        str, typer.Option("--encoder", help="What reads images; or .npz of features.", metavar="NAME[,NAME]")
    ] = "",
    group: Annotated[Column, _column("--group", "Column of the patient, if it is not patient_id or slide_id.")] = None,
    site: Annotated[Column, _column("--site", "Column of the site or scanner.")] = None,
    external: Annotated[
        str | None, typer.Option("--external", help="Rows tested once, never trained on.", metavar="COL=VALUE")
    ] = None,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Folds of patients.")] = 5,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Layouts of the folds.")] = 3,
    splits: Annotated[Path | None, typer.Option("--splits", help="Folds of an earlier run (its splits.json).")] = None,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Shuffled labels; floors.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of every random draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Probe frozen features for a label: folds by patient, other sites, an external set, controls, one page."""
    from eosin.tasks.probe import ProbeSettings
    from eosin.tasks.probe import probe as run_probe

    settings = ProbeSettings(
        label=label,
        positive=positive,
        head=head,
        encoders=tuple(name.strip() for name in encoder.split(",") if name.strip()),
        group=group,
        site=site,
        external=_pair(external),
        folds=folds,
        seeds=seeds,
        splits=splits,
        controls=controls,
        seed=seed,
    )
    report = run_probe(features, cohort, settings, out=out)
    if as_json:
        print_json(report.to_dict())
    else:
        _print_summary(report, out)


def _pair(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    column, equals, value = text.partition("=")
    if not (column and equals and value):
        raise typer.BadParameter(f"{text!r} is not COLUMN=VALUE, such as dataset=site-b", param_hint="--external")
    return column, value


def _print_summary(report: Report, out: Path) -> None:
    for remark in report.remarks:
        sys.stderr.write(f"{remark.severity}: {remark.message}\n")
    kinds = {"within": "within", "across_site": "other sites", "external": "external", "shuffled": "shuffled labels"}
    rows = []
    for one in report.sections["encoders"]:
        for kind, words in kinds.items():
            found = one[kind]["domain_mean"] if kind == "across_site" and one[kind] else one[kind]
            if found:
                rows.append([one["name"], words, found["auroc"]["n"], _told(found["auroc"]), _told(found["ba"])])
    print_table(["encoder", "test", "n", "AUROC (95 % CI)", "balanced accuracy (95 % CI)"], rows)
    for one in report.sections["encoders"]:
        if one["site_leakage"]:
            sys.stdout.write(f"{one['name']} tells the site with accuracy {_told(one['site_leakage']['accuracy'])}\n")
    sys.stdout.write(f"Open {out / 'report.html'} in a browser.\n")


def _told(found: dict[str, Any]) -> str:
    if found["point"] is None:
        return ""
    ends = "no interval" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
    return f"{found['point']:.3f} ({ends})"
