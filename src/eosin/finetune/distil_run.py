"""Distillation in one call: a finished run teaches a small encoder, which is compared with what it learns alone.

The folder is that of a fine-tuning run, with the student in `model/`; in `alone/` lies the same student of the same
folds, trained on the labels only, which is what distillation must beat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import rankdata

from eosin.cohort.reading import read_cells, squeeze
from eosin.encoders.ranks import on_ranks, rank
from eosin.errors import CohortError
from eosin.evaluation.bootstrap import bootstrap, paired_difference
from eosin.evaluation.metrics import make_metrics
from eosin.evaluation.report import Report, plain
from eosin.features.writer import write_durably
from eosin.finetune.cells import CellTable, read_tiles
from eosin.finetune.distil import DistilConfig
from eosin.finetune.folds import plan_folds
from eosin.finetune.page import number, page, with_interval
from eosin.finetune.recipe import FinetuneConfig
from eosin.finetune.results import cross_fitted
from eosin.finetune.run import PAGE, REPORT, RESAMPLES, SHEET, finetune, split_external
from eosin.finetune.tables import COLUMN_NAMES, PICTURES, read_table
from eosin.finetune.teacher import OUT_OF_FOLD, apart, read_predictions, read_teacher
from eosin.finetune.train import Status

ALONE = "alone"
EXTERNAL = "external.csv"
# A probability that was rounded to 0 or 1 has this much to the other.
_EPS = 1e-15
MODEL_NAMES = {"teacher": "teacher", "student": "student, taught", "alone": "student, labels only"}
METRIC_NAMES = {"auroc": "AUROC", "ba": "balanced accuracy"}
KINDS = {"out_of_fold": "Out of fold", "external": "External cells, by all folds together"}
_PAIRS = (("student", "alone"), ("student", "teacher"))


def distil(
    data: Path | str | CellTable,
    encoder: str,
    config: FinetuneConfig,
    how: DistilConfig,
    *,
    teacher: Path,
    out: Path,
    unlabelled: Path | None = None,
    device: str = "auto",
    resamples: int = RESAMPLES,
    progress: Callable[[Status], None] | None = None,
) -> Report:
    """Teach an encoder what a fine-tuned one answers, fold by fold, and report both and what it learns alone.

    Args:
        data: the teacher's table of cells.
        encoder: of the student, as `load_encoder` takes it.
        config: recipe of the student; its folds, their seed and the external cells are the teacher's.
        how: what the student learns from.
        teacher: folder of a finished run of `finetune.run.finetune`.
        out: folder of the student's run; a run that was stopped goes on there.
        unlabelled: folder of pictures, or table with a file column, that the teacher alone speaks of. A cell that
            shares its slide or its pixels with the held-out cells of a fold is not shown to that fold.
        device: "auto", "cpu", "cuda" ...
        resamples: of the bootstrap.
        progress: told after every epoch, of the taught student and then of the other.

    Raises:
        CheckpointError: the teacher's run is missing, not finished or damaged, or its models are not its folds'.
        CohortError: the table is not the teacher's.
        ConfigError: the folds are not, or the folder holds another run.
        EosinError: as `finetune`.
    """
    guide = read_teacher(teacher, how)
    table = data if isinstance(data, CellTable) else read_table(data)
    own, external = split_external(table, guide.external)
    settled = guide.student_config(config)
    guide.check(own, plan_folds(own, settled))
    if unlabelled is not None:
        guide = replace(guide, unlabelled=_unlabelled(unlabelled, external))
    common: dict[str, Any] = {
        "external": guide.external,
        "device": device,
        "resamples": resamples,
        "progress": progress,
    }
    with on_ranks(device):
        report = finetune(data, encoder, settled, out=out, teacher=guide, **common)
        finetune(data, encoder, settled, out=out / ALONE, **common)
        runs = {"teacher": teacher, "student": out, "alone": out / ALONE}
        section = compare(runs, own, external, resamples=resamples, seed=settled.seed)
        whole = replace(report, sections={**report.sections, "distillation": section})
        if rank() == 0:
            write_durably(out / REPORT, whole.to_json().encode())
            write_durably(
                out / PAGE, page(whole, sheet=(out / SHEET).read_bytes(), first=[block(whole.sections)]).encode()
            )
    return whole


def _unlabelled(source: Path, external: CellTable) -> tuple[CellTable, npt.NDArray[np.uint8]]:
    """Return cells without a label, with their tiles; those that are shared with the external cells are left out.

    Raises:
        CohortError: no pictures, or all are of external cells.
    """
    if source.is_dir():
        names = sorted(path.name for path in source.iterdir() if path.suffix.lower() in PICTURES)
        frame, root = pd.DataFrame({"file": names}), source
    else:
        frame, root = read_cells(source), source.parent
    if frame.empty:
        raise CohortError(f"{source} has no pictures; give a folder of them, or a table with a file column")
    # Labels that are there are read and go unused: nothing is trained on them.
    labelled = any(squeeze(str(name)) in COLUMN_NAMES["label"] for name in frame.columns)
    cells = read_table(source if labelled else frame.assign(atypical="0"), root=root, dataset=source.stem)
    tiles = read_tiles(cells)
    fine = apart(cells, tiles, external, read_tiles(external))
    if not fine.any():
        raise CohortError(f"every cell of {source} is an external one, which nothing is learned from")
    return cells.take(fine), tiles[fine]


def compare(
    runs: Mapping[str, Path], own: CellTable, external: CellTable, *, resamples: int, seed: int
) -> dict[str, Any]:
    """Return what teacher, student and the student alone are worth on the same cells, with paired differences.

    Args:
        runs: "teacher", "student" and "alone" -> folder of a finished run.
        own: cells that were predicted out of fold.
        external: cells that were predicted once by the ensembles.
        resamples: of the bootstrap over slides.
        seed: of the bootstrap.
    """
    records = {name: json.loads((path / REPORT).read_text(encoding="utf-8"))["run"] for name, path in runs.items()}
    facts = ("encoder", "parameters", "trained")
    section: dict[str, Any] = {
        "models": {name: {key: record[key] for key in facts} for name, record in records.items()},
        "out_of_fold": _part({n: out_of_fold(path) for n, path in runs.items()}, own, resamples=resamples, seed=seed),
        "external": None,
    }
    if len(external):
        said = {name: _predicted(path) for name, path in runs.items()}
        section["external"] = _part(said, external, resamples=resamples, seed=seed)
    return plain(section)


class Said(NamedTuple):
    """What a model says of n cells: P(atypical), its calls, and what ranks them, each (n,)."""

    p: npt.NDArray[np.float64]
    calls: npt.NDArray[np.float64]
    ranks: npt.NDArray[np.float64]


def out_of_fold(run: Path) -> Said:
    """Return what a run says out of fold, each fold's with the scale and threshold of the others."""
    table = read_predictions(run / OUT_OF_FOLD)
    told = json.loads((run / REPORT).read_text(encoding="utf-8"))["threshold"]
    logits = logit(table["p_atypical"].to_numpy().clip(_EPS, 1 - _EPS)) * told["temperature"] + told["shift"]
    found = cross_fitted(table["atypical"], logits, table["fold"].to_numpy(dtype=np.str_))
    return Said(found.p, found.calls, logits)


def _predicted(run: Path) -> Said:
    """Return what a run says of external cells."""
    table = read_predictions(run / EXTERNAL)
    p = table["p_atypical"].to_numpy()
    return Said(p, table["called"].to_numpy(dtype=np.float64), p)


def _part(said: Mapping[str, Said], cells: CellTable, *, resamples: int, seed: int) -> dict[str, Any]:
    """Return metrics of each, their paired differences, and how often each calls as the teacher does."""
    y, slides = cells.label.astype(np.int64), cells.group_key()
    how = {"y": y, "resamples": resamples, "seed": seed}
    metrics = {
        name: {
            **make_metrics(("auroc",), y, expit(one.ranks)),
            **make_metrics(("brier",), y, one.p),
            **make_metrics(("ba",), y, one.calls),
        }
        for name, one in said.items()
    }
    rows = []
    teacher = said["teacher"]
    for name, one in said.items():
        found = bootstrap(metrics[name], slides, **how)
        with_teacher = float((one.calls == teacher.calls).mean())
        correlation = float(np.corrcoef(rankdata(one.ranks), rankdata(teacher.ranks))[0, 1])
        rows.append({"model": name, **found, "same_calls": with_teacher, "rank_correlation": correlation})
    differences = [
        {"a": a, "b": b, "metric": m, **plain(paired_difference(metrics[a][m], metrics[b][m], slides, **how))}
        for a, b in _PAIRS
        for m in METRIC_NAMES
    ]
    return {"n": len(y), "slides": len(np.unique(slides)), "models": rows, "differences": differences}


def block(r: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the page that compares teacher and student."""
    words = {"kind": "text", "text": _words(r["run"]["distillation"])}
    return {"title": "Teacher and student", "parts": [words, *tables(r["distillation"])]}


def tables(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of a comparison, three models and their differences, for each kind of cells."""
    found = []
    for name, words in KINDS.items():
        if told[name]:
            found += _tables(told, told[name], words)
    return found


def _words(how: Mapping[str, Any]) -> str:
    more = f", and on {how['unlabelled']} cells without a label" if how["unlabelled"] else ""
    return (
        f"{how['logit']:g} x KL of the logits at temperature {how['temperature']:g}, {how['feature']:g} x "
        f"{how['compare']} of the vectors, {how['label']:g} x the loss of the labels, on the teacher's cells{more}. "
        "The student of a fold was taught by the teacher of that fold alone, which saw nothing of the tested slides."
    )


def _tables(told: Mapping[str, Any], part: Mapping[str, Any], words: str) -> list[dict[str, Any]]:
    rows = []
    for row in part["models"]:
        facts = told["models"][row["model"]]
        values = [with_interval(row[name]) for name in ("auroc", "ba", "brier")]
        alike = [number(row["same_calls"]), number(row["rank_correlation"])]
        rows.append(
            {"cells": [MODEL_NAMES[row["model"]], facts["encoder"], f"{facts['parameters']:,}", *values, *alike]}
        )
    columns = [
        "",
        "encoder",
        "numbers",
        "AUROC",
        "balanced accuracy",
        "Brier score",
        "calls as teacher",
        "rank correlation",
    ]
    columns_of_pairs = ["difference", "", "(95 % interval)", "p"]
    caption = f"{words}: {part['n']} cells of {part['slides']} slides, with 95 % intervals over slides."
    pairs = [
        {
            "cells": [
                f"{MODEL_NAMES[d['a']]} - {MODEL_NAMES[d['b']]}",
                METRIC_NAMES[d["metric"]],
                with_interval(d),
                number(d["p"]),
            ]
        }
        for d in part["differences"]
    ]
    return [
        {"kind": "table", "columns": columns, "rows": rows, "caption": caption},
        {"kind": "table", "columns": columns_of_pairs, "rows": pairs, "caption": f"{words}: paired differences."},
    ]
