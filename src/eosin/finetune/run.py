"""Fine-tuning in one call: a table of cells, folds of whole slides, a threshold from out of fold, one report.

The run folder holds `report.html` and `report.json`, `sheet.png`, `curves.png`, `out-of-fold.csv`, `external.csv`, what
each fold trained (`folds/`), and `model/`: the ensemble that `eosin.finetune.infer` and the container load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.encoders import load_encoder
from eosin.encoders.encoder import Encoder
from eosin.encoders.ranks import on_ranks, rank, wait_for_all
from eosin.errors import CohortError, ConfigError, LabelError, closest
from eosin.evaluation.report import Remark, Report, plain, provenance
from eosin.features.writer import write_durably
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.cells import TEXT_FIELDS, CellTable, domain_counts, read_tiles
from eosin.finetune.classifier import Classifier
from eosin.finetune.experts import Mixture
from eosin.finetune.folds import Fold, plan_folds
from eosin.finetune.infer import MODEL, Input, Scale, combine, input_of, write_ensemble
from eosin.finetune.page import draw_curves, page
from eosin.finetune.recipe import FinetuneConfig, changed_fields
from eosin.finetune.results import evaluate, fit_scale
from eosin.finetune.saving import Model, save_trained
from eosin.finetune.sheet import draw_sheet
from eosin.finetune.tables import read_table
from eosin.finetune.train import Job, Lesson, Status, Trained, shared_logits, train_fold

SCHEMA = "eosin.finetune/1"
RUN, REPORT, PAGE, SHEET, CURVES = "run.json", "report.json", "report.html", "sheet.png", "curves.png"
ADAPTER = "trained.safetensors"
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class FoldResult:
    """What one fold gave.

    Attributes:
        fold: its rows.
        trained: how training went.
        logits: of its test rows, mean over views.
        plain: of its test rows, without other views.
        external: logits of the external cells, mean over views.
        file: what it trained.
        numbers: how many numbers the model has, how many trained, and the bytes of the file.
    """

    fold: Fold
    trained: Trained
    logits: npt.NDArray[np.float64]
    plain: npt.NDArray[np.float64]
    external: npt.NDArray[np.float64]
    file: Path
    numbers: dict[str, int]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Data:
    """Cells and their tiles: those that are trained on by folds, and those that are predicted once."""

    own: CellTable
    tiles: npt.NDArray[np.uint8]
    external: CellTable
    external_tiles: npt.NDArray[np.uint8]
    files: tuple[Path, ...]


class Teaching(Protocol):
    """What teaches a run beside its labels; see `eosin.finetune.teacher`."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What the record of the run says of it."""
        ...

    def teach(self, at: int, job: Job, student: Model, /) -> tuple[Job, Lesson]:
        """Return the job of fold number `at`, with cells that only the teacher speaks of, and what it says."""
        ...


def finetune(
    data: Path | str | CellTable,
    encoder: str,
    config: FinetuneConfig,
    *,
    out: Path,
    external: tuple[str, str] | None = None,
    device: str = "auto",
    resamples: int = RESAMPLES,
    progress: Callable[[Status], None] | None = None,
    teacher: Teaching | None = None,
    expert: str = "",
) -> Report:
    """Fine-tune an encoder on cells, and report what it is worth; a run that was stopped goes on in its folder.

    Under torchrun or `accelerate launch` every rank calls this; all need `out` on one disk, which the first writes.

    Args:
        data: a table of cells, or a folder with one; see `tables.read_table`.
        encoder: as `load_encoder` takes it.
        config: the recipe.
        out: folder of the run.
        external: (field, value), as ("dataset", "atnorm-br"), of cells that are never trained on and predicted once.
        device: "auto", "cpu", "cuda" ...
        resamples: of the bootstrap.
        progress: told after every epoch.
        teacher: what teaches beside the labels; None is nothing.
        expert: a second encoder, mixed in by a gate (see `experts`); all of it trains if the recipe does not say.

    Raises:
        CohortError: no cells, no pictures, or no such external cells.
        LabelError: a class is missing, or lies in too few slides for the folds; or no votes for soft labels.
        ConfigError: the folder holds another run, or the encoder cannot be trained.
        EosinError: as `train_fold`.
    """
    with on_ranks(device) as place:
        given = _read(data, external)
        config = _settled(config, given.own, expert)
        names, where = [encoder, expert] if expert else [encoder], str(place)
        first = [_load(name, where) for name in names]
        how = _input(first, given, config)
        folds = plan_folds(given.own, config)
        record = _record(given, first, config, names, external) | ({} if teacher is None else plain(teacher.record))
        _begin(out, record)
        results: list[FoldResult] = []
        for at, fold in enumerate(folds):
            fresh = first if at == 0 else [_load(name, where) for name in names]
            teach = None if teacher is None else partial(teacher.teach, at)
            folder = _fold_folder(out, at)
            results.append(_one_fold(fresh, given, fold, config, how, folder=folder, progress=progress, teach=teach))
        scale = fit_scale(given.own.label, _gather(given.own, results, "logits"))
        report = _report(given, results, config, scale, record=record | results[-1].numbers, resamples=resamples)
        if rank() == 0:
            told = {"how": how, "scale": scale, "tta": config.tta, "precision": first[0].precision}
            files = [result.file for result in results]
            write_ensemble(out / MODEL, files, encoder=encoder, expert=expert, **told)
            _write_files(out, given, results, scale, config, report)
        wait_for_all()
    return report


def _settled(config: FinetuneConfig, own: CellTable, expert: str) -> FinetuneConfig:
    """Return the recipe with what the expert trains, or raise where it asks for what is not there."""
    if config.expert is not None and not expert:
        raise ConfigError("the recipe says how a second encoder trains, and none is named; name it with --expert")
    if config.soft_labels and bool((own.soft == own.label).all()):
        raise LabelError(
            f"soft labels are shares of votes, and no vote of {len(own)} cells differs from its label; give a table "
            "with the experts' votes, or leave --soft-labels out"
        )
    return replace(config, expert=AdaptConfig(mode="full")) if expert and config.expert is None else config


def _input(encoders: Sequence[Encoder], given: Data, config: FinetuneConfig) -> Input:
    """Return how the tiles become the input of one encoder, or of two."""
    first, *others = (encoder.spec for encoder in encoders)
    expert, side_px = others[0] if others else None, given.tiles.shape[1]
    return input_of(first, tile_px=side_px, input_px=config.input_px, crop_px=config.crop_px, expert=expert)


def _model(encoders: Sequence[Encoder], config: FinetuneConfig) -> Model:
    """Return a classifier, or of two encoders a mixture, ready to train."""
    adapts = [config.adapt] if config.expert is None else [config.adapt, config.expert]
    experts = [
        Classifier(encoder.backbone, adapt, seed=config.seed) for encoder, adapt in zip(encoders, adapts, strict=True)
    ]
    return experts[0] if len(experts) == 1 else Mixture(experts)


def _tables(data: Path | str | CellTable) -> tuple[Path, ...]:
    """Return the files of the table, for the record."""
    if isinstance(data, CellTable):
        return ()
    path = Path(data)
    return (path,) if path.is_file() else tuple(sorted(path.glob("*.csv")))


def _read(data: Path | str | CellTable, external: tuple[str, str] | None) -> Data:
    """Return the cells of both parts, with their tiles."""
    own, other = split_external(data if isinstance(data, CellTable) else read_table(data), external)
    tiles, external_tiles = read_tiles(own), read_tiles(other)
    return Data(own=own, tiles=tiles, external=other, external_tiles=external_tiles, files=_tables(data))


def split_external(table: CellTable, external: tuple[str, str] | None) -> tuple[CellTable, CellTable]:
    """Return the cells that are trained on by folds, and those that are predicted once.

    Raises:
        CohortError: no such field or cells, a slide in both parts, or nothing left to train on.
    """
    aside = np.zeros(len(table), dtype=np.bool_)
    if external is not None:
        field, value = external
        if field not in TEXT_FIELDS:
            raise CohortError(
                f"cells have no field {field!r} to tell external ones by; closest: {closest(field, TEXT_FIELDS)}"
            )
        found = getattr(table, field)
        aside = found == value
        if not aside.any():
            known = ", ".join(np.unique(found).tolist()[:8])
            raise CohortError(f"no cell has the {field} {value!r}; found: {known}")
        shared = np.intersect1d(table.group_key()[aside], table.group_key()[~aside])
        if len(shared):
            raise CohortError(
                f"{len(shared)} slides have cells inside and outside {field} {value!r} ({', '.join(shared[:3])}); "
                "an external test shares no slide with training"
            )
    if aside.all():
        raise CohortError("every cell is external; none is left to train on")
    return table.take(~aside), table.take(aside)


def _load(name: str, device: str) -> Encoder:
    found = load_encoder(name, device=device, backend="torch")
    if not isinstance(found, Encoder):
        raise ConfigError(f"{name} is a fixed computation without weights; fine-tuning needs an encoder that can train")
    return found


def _fold_folder(out: Path, at: int) -> Path:
    return out / "folds" / f"{at + 1:02d}"


def _one_fold(
    encoders: Sequence[Encoder],
    given: Data,
    fold: Fold,
    config: FinetuneConfig,
    how: Input,
    *,
    folder: Path,
    progress: Callable[[Status], None] | None,
    teach: Callable[[Job, Model], tuple[Job, Lesson]] | None = None,
) -> FoldResult:
    """Train one fold and predict its test part and the external cells."""
    where, precision = encoders[0].device, encoders[0].precision
    model = _model(encoders, config)
    if config.checkpointing:
        model.set_checkpointing(True)
    job = Job(cells=given.own, tiles=given.tiles, fold=fold, config=config, how=how, device=where, precision=precision)
    lesson = None
    if teach is not None:
        job, lesson = teach(job, model)
    trained = train_fold(model, job, folder=folder, progress=progress, lesson=lesson)
    file = folder / ADAPTER
    if rank() == 0:
        save_trained(file, model, recipe=plain(config.to_dict()))
    wait_for_all()
    test = given.tiles[fold.test]
    logits = shared_logits(model, test, how, tta=config.tta, device=where, precision=precision)
    single = shared_logits(model, test, how, device=where, precision=precision)
    outside = shared_logits(model, given.external_tiles, how, tta=config.tta, device=where, precision=precision)
    return FoldResult(
        fold=fold,
        trained=trained,
        logits=logits,
        plain=single,
        external=outside,
        file=file,
        numbers={**_numbers(model), "trained_bytes": file.stat().st_size},
    )


def _numbers(model: Model) -> dict[str, int]:
    """Return how many numbers the model has, head and gate with them, and how many of them train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trained": sum(n for n, trains in sizes if trains), "parameters": sum(n for n, _ in sizes)}


def _gather(own: CellTable, results: list[FoldResult], which: str) -> npt.NDArray[np.float64]:
    """Return the out-of-fold logits of every cell, (n,)."""
    found = np.full(len(own), np.nan)
    for result in results:
        found[result.fold.test] = getattr(result, which)
    return found


def _record(
    given: Data,
    encoders: Sequence[Encoder],
    config: FinetuneConfig,
    names: Sequence[str],
    external: tuple[str, str] | None,
) -> dict[str, Any]:
    encoder, name = encoders[0], names[0]
    second: dict[str, Any] = {}
    if len(encoders) > 1:
        spec = encoders[1].spec
        second = {"expert": names[1], "expert_weights_hash": spec.weights_hash, "expert_licence": spec.licence}
    return {
        "recipe": plain(config.to_dict()),
        "encoder": name,
        **second,
        "weights_hash": encoder.spec.weights_hash,
        "licence": encoder.spec.licence,
        "precision": encoder.precision,
        "cells": len(given.own),
        "external": None if external is None else "=".join(external),
        "external_cells": len(given.external),
    }


def _begin(out: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run, or refuse a folder that holds another; the first rank does."""
    if rank():
        return
    path = out / RUN
    changed = changed_fields(json.loads(path.read_text(encoding="utf-8")), dict(record)) if path.is_file() else []
    if changed:
        raise ConfigError(
            f"{out} holds another run: {'; '.join(changed[:6])}; take the old values to go on with it, or another --out"
        )
    _write_json(path, record)


def _report(
    given: Data,
    results: list[FoldResult],
    config: FinetuneConfig,
    scale: Scale,
    *,
    record: Mapping[str, Any],
    resamples: int,
) -> Report:
    own, seed = given.own, config.seed
    logits, fold_of = _gather(own, results, "logits"), np.zeros(len(own), dtype=np.int64)
    for at, result in enumerate(results):
        fold_of[result.fold.test] = at
    within = evaluate(own, logits[None], scale, fold_of=fold_of, resamples=resamples, seed=seed)
    bare = evaluate(own, _gather(own, results, "plain")[None], None, fold_of=fold_of, resamples=resamples, seed=seed)
    outside, not_done = None, {}
    if len(given.external):
        both = np.stack([result.external for result in results])
        outside = evaluate(given.external, both, scale, resamples=resamples, seed=seed)
    else:
        not_done["external"] = "no external cells were named; give --external dataset=NAME"
    sections = {
        "run": dict(record),
        "data": {
            "own": _describe(own),
            "external": _describe(given.external) if outside else None,
            "notes": list(own.notes),
        },
        "folds": [_told(result) for result in results],
        "threshold": scale.to_dict(),
        "out_of_fold": within.sections,
        "without_tta": {"scores": bare.sections["scores"], "calls": bare.sections["calls"]},
        "external": None if outside is None else outside.sections,
    }
    remarks = [*_remarks(given, results, scale), *within.remarks, *(outside.remarks if outside else ())]
    return Report(
        schema=SCHEMA,
        provenance=provenance(inputs=given.files, settings=config.to_dict(), seed=seed),
        sections=plain(sections),
        remarks=tuple(sorted(remarks, key=lambda remark: remark.severity == "note")),
        not_done=not_done,
    )


def _describe(cells: CellTable) -> dict[str, Any]:
    return {
        "n": len(cells),
        "atypical": int(cells.label.sum()),
        "slides": len(np.unique(cells.group_key())),
        "domains": [plain(one) for one in domain_counts(cells)],
    }


def _told(result: FoldResult) -> dict[str, Any]:
    fold, trained = result.fold, result.trained
    return {
        "name": fold.name,
        "train": len(fold.train),
        "stop": len(fold.stop),
        "test": len(fold.test),
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.history),
        "stopped_early": trained.stopped_early,
        "history": list(trained.history),
        "note": "; ".join((*([fold.note] if fold.note else []), *trained.notes)),
    }


def _remarks(given: Data, results: list[FoldResult], scale: Scale) -> list[Remark]:
    found = []
    for result in results:
        if result.fold.note:
            message = f"{result.fold.name}: {result.fold.note}"
            found.append(Remark(kind="fold", severity="note", message=message))
    if scale.note:
        found.append(Remark(kind="temperature", severity="warning", message=scale.note))
    last = [result.fold.name for result in results if result.trained.best_epoch == len(result.trained.history)]
    if last:
        message = f"{', '.join(last)}: the last epoch was the best; more epochs may be better still"
        found.append(Remark(kind="epochs", severity="note", message=message))
    if len(given.external) and len(np.unique(given.external.group_key())) == len(given.external):
        message = "the external table names no slides: its intervals take every cell as independent, and are too narrow"
        found.append(Remark(kind="no-group", severity="warning", message=message))
    return found


def _write_files(
    out: Path, given: Data, results: list[FoldResult], scale: Scale, config: FinetuneConfig, report: Report
) -> None:
    own = given.own
    how = {"temperature": scale.temperature, "shift": scale.shift}
    oof = combine(_gather(own, results, "logits")[None], **how)
    fold_name = np.empty(len(own), dtype=object)
    for result in results:
        fold_name[result.fold.test] = result.fold.name
    _write_csv(out / "out-of-fold.csv", own, oof.p, scale.threshold, fold=fold_name, entropy=oof.entropy)
    shown, shown_tiles, p, what = own, given.tiles, oof.p, "out of fold"
    if len(given.external):
        logits = np.stack([result.external for result in results])
        said = combine(logits, **how)
        table = given.external
        uncertain = {"entropy": said.entropy, "disagreement": said.disagreement, "spread": said.spread}
        _write_csv(out / "external.csv", table, said.p, scale.threshold, **uncertain)
        shown, shown_tiles, p, what = table, given.external_tiles, said.p, "external cells"
    title = f"{config.recipe}: {what}, {len(shown)} cells"
    write_durably(out / SHEET, draw_sheet(shown, shown_tiles, p, threshold=scale.threshold, title=title))
    write_durably(out / CURVES, draw_curves(report.sections["folds"], "png"))
    write_durably(out / REPORT, report.to_json().encode())
    write_durably(out / PAGE, page(report, sheet=(out / SHEET).read_bytes()).encode())


def _write_csv(path: Path, cells: CellTable, p: npt.NDArray[np.float64], threshold: float, **more: Any) -> None:
    columns = {name: getattr(cells, name) for name in ("file", "dataset", "slide_id", "scanner", "domain")}
    table = pd.DataFrame({**columns, "atypical": cells.label, "p_atypical": p, "called": p >= threshold, **more})
    write_durably(path, table.to_csv(index=False).encode())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_durably(path, json.dumps(value, indent=1, allow_nan=False).encode())
