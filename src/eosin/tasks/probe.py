"""How good is an encoder for a label, honestly: folds by patient, other sites, an external set, and controls."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pandas as pd

from eosin.cohort import Cohort, Split, external, grouped_kfold, leakage_report, leave_one_site_out, read_cohort
from eosin.cohort.pins import load_splits, save_splits
from eosin.errors import CohortError, LabelError
from eosin.evaluation.comparisons import holm
from eosin.evaluation.report import Remark, Report, plain, provenance
from eosin.features.writer import write_durably
from eosin.tasks import probe_measures as measure
from eosin.tasks.predictions import TEST, TUNE, ValidationSettings
from eosin.tasks.probe_fit import evaluate, fit_probe
from eosin.tasks.probe_measures import OutOfFold, Task
from eosin.tasks.probe_model import Probe, check_head, chosen, fit_head, inner_splits, positive_class
from eosin.tasks.probe_page import probe_page
from eosin.tasks.samples import ARRAYS, Samples, read_samples, safe_name
from eosin.tasks.validate import validate

SCHEMA = "eosin.probe/1"
TEXTURE = "texture"
RANDOM = "random:dinov2-vits14"

__all__ = ["SCHEMA", "Probe", "ProbeSettings", "evaluate", "fit_probe", "probe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeSettings:
    """What `probe` is asked to do.

    Attributes:
        label: column to predict.
        positive: its value that is looked for; all others are negative. None where the values say it (0/1, no/yes).
        head: "linear", "knn", "prototype" or "sgd".
        encoders: names for a folder of images, or .npy / .npz files; empty for a store or an array.
        group: column of the patient, None for patient_id or what stands for it.
        site: column of the site or scanner, None where there is none.
        external: (column, value) of rows that are tested once and never trained on.
        folds: outer folds of patients.
        seeds: layouts of the folds.
        controls: add shuffled labels and, for images, the texture floor and a network of random weights.
        label_efficiency: add the curve over shares of the patients.
        splits: file that pins the folds (`save_splits`); None makes new ones.
        resamples: of the bootstrap.
        level: of confidence.
        seed: of every random draw.
    """

    label: str
    positive: str | None = None
    head: str = "linear"
    encoders: tuple[str, ...] = ()
    group: str | None = None
    site: str | None = None
    external: tuple[str, str] | None = None
    folds: int = 5
    seeds: int = 3
    controls: bool = True
    label_efficiency: bool = True
    splits: Path | None = None
    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a head that does not exist."""
        check_head(self.head)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Study:
    """The cohort, cut into rows that train and rows of the external set, in positions of `cohort`."""

    cohort: Cohort
    y: npt.NDArray[np.int64]
    positive: str
    classes: tuple[str, ...]
    dev: npt.NDArray[np.int64]
    ext: npt.NDArray[np.int64]
    dev_cohort: Cohort
    task: Task
    settings: ProbeSettings


@dataclass(eq=False, kw_only=True, slots=True)
class _Found:
    """What was measured of one encoder."""

    samples: Samples
    oof: OutOfFold
    probe: Probe
    p_ext: npt.NDArray[np.float64]
    values: dict[str, Any]
    not_done: dict[str, str] = field(default_factory=dict)


def probe(features: Path, table: Path, settings: ProbeSettings, *, out: Path) -> Report:
    """Probe one encoder or several on a table of labels; write everything into `out` and return the report.

    `out` then holds report.json, report.html (self-contained), splits.json, run.json and, for each encoder,
    predictions_<encoder>.csv (what `validate` reads), model_<encoder>.npz and validation_<encoder>/ (one more for the
    external set). Features of images are kept in `out` and used again.

    Args:
        features: a feature store, a folder of images, or an array.
        table: the cohort.
        settings: what to do.
        out: folder; made when it is not there.

    Raises:
        CohortError: the table, its splits or what leaks between its parts; nothing is trained then.
        LabelError: labels missing, of one class, or in too few patients.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    study = read_study(table, settings)
    leaks = leakage_report(study.cohort, label=settings.label, seed=settings.seed)
    leaks.raise_on_error()
    samples = [read_samples(features, study.cohort, encoder=name, cache=out) for name in _encoders(features, settings)]
    found = [_measure(study, one) for one in samples]
    out.mkdir(parents=True, exist_ok=True)
    save_splits(out / "splits.json", _splits(study), study.dev_cohort)
    wrong = [_write_encoder(study, one, out) for one in found]
    best = _best(found)
    report = _report(study, found, leaks.to_dict(), wrong[best], table)
    write_durably(out / "report.json", report.to_json().encode())
    write_durably(out / "report.html", probe_page(report, out).encode())
    record = {
        "command": "probe",
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 3),
        "files": sorted(path.name for path in out.iterdir() if path.name != "run.json"),
        **report.provenance,
    }
    write_durably(out / "run.json", orjson.dumps(record, option=orjson.OPT_INDENT_2))
    return report


def _encoders(features: Path, s: ProbeSettings) -> list[str | None]:
    """Return the encoders to read, controls included; [None] for a store or an array."""
    if features.suffix in ARRAYS or (features / "manifest.json").is_file():
        return list(s.encoders) or [None]
    extra = [name for name in (TEXTURE, RANDOM) if s.controls and s.encoders and name not in s.encoders]
    return [*s.encoders, *extra] or [None]


def read_study(table: Path, s: ProbeSettings) -> _Study:
    """Return the checked cohort with its labels, parts and folds."""
    cohort = read_cohort(table, label=s.label, columns={"patient_id": s.group} if s.group else None)
    codes, classes = cohort.labels(s.label)
    positive = positive_class(classes, s.positive, s.label)
    y = (codes == classes.index(positive)).astype(np.int64)
    dev, ext = np.arange(len(cohort)), np.zeros(0, np.int64)
    if s.external is not None:
        split = external(cohort, column=s.external[0], value=s.external[1])[0]
        dev, ext = split.train, split.test
        for rows, what in ((dev, "other"), (ext, "external")):
            if len(np.unique(y[rows])) < 2:
                raise LabelError(f"the {len(rows)} {what} rows hold one class of {s.label!r} only; both are needed")
    dev_cohort, group = cohort.take(dev), cohort.group_key()
    if s.splits is None:
        splits = grouped_kfold(y[dev], groups=group[dev], folds=s.folds, repeats=s.seeds, seed=s.seed)
    else:
        splits = load_splits(s.splits, dev_cohort)
    site = None
    if s.site is not None:
        column = cohort.table[cohort.column(s.site)]
        site = column.iloc[dev].fillna("").astype(str).to_numpy(dtype=np.str_)
    task = Task(
        y=y[dev],
        group=group[dev],
        site=site,
        layouts=measure.layouts_of(splits, len(dev)),
        head=s.head,
        resamples=s.resamples,
        level=s.level,
        seed=s.seed,
    )
    return _Study(
        cohort=cohort,
        y=y,
        positive=positive,
        classes=classes,
        dev=dev,
        ext=ext,
        dev_cohort=dev_cohort,
        task=task,
        settings=s,
    )


def _splits(study: _Study) -> list[Split]:
    return [split for layout in study.task.layouts for split in layout]


def _parts(study: _Study) -> list[Split]:
    """Return every split, the external one too, in positions of the whole cohort."""
    dev = study.dev
    parts = [Split(name=one.name, train=dev[one.train], val=dev[one.val], test=dev[one.test]) for one in _splits(study)]
    if len(study.ext):
        parts.append(Split(name="external", train=dev, val=np.zeros(0, np.int64), test=study.ext))
    return parts


def _measure(study: _Study, samples: Samples) -> _Found:
    """Return everything about one encoder."""
    task, s, x = study.task, study.settings, samples.x[study.dev]
    measure.check_varies(x, samples.name)
    # Scaled, so that what all images share does not make every pair look the same.
    scaled = (samples.x - x.mean(axis=0)) / np.where((sd := x.std(axis=0)) > 0, sd, 1)
    leaks = leakage_report(study.cohort, _parts(study), scaled)
    leaks.raise_on_error()
    oof = measure.out_of_fold(x, task)
    pairs = inner_splits(task.y, task.group, seed=s.seed)
    head = fit_head(s.head, x, task.y, pairs, seed=s.seed)
    made = Probe(
        kind=s.head,
        head=head,
        encoder=samples.encoder,
        label=s.label,
        classes=study.classes,
        positive=study.positive,
        threshold=measure.final_threshold(oof),
        groups=np.unique(task.group),
        n=len(task.y),
    )
    p_ext = made.scores(samples.x[study.ext]) if len(study.ext) else np.zeros(0)
    values: dict[str, Any] = {
        "name": samples.name,
        "dim": x.shape[1],
        "spec": samples.encoder,
        "notes": list(samples.notes),
        "near_duplicates": [one.message for one in leaks.findings if one.kind == "near-duplicate-features"],
        "chosen": chosen(head),
        "threshold": {"final": made.threshold, "folds": list(oof.thresholds)},
        "within": measure.within(oof, task),
        "external": None,
        "shuffled": None,
        "label_curve": None,
    }
    found = _Found(samples=samples, oof=oof, probe=made, p_ext=p_ext, values=values)
    if len(study.ext):
        calls = (p_ext >= made.threshold).astype(np.float64)
        group = study.cohort.group_key()[study.ext]
        values["external"] = measure.fixed_rows(study.y[study.ext], p_ext, calls, group, task)
    if s.controls:
        labels = [measure.shuffled_labels(task.y, task.group, seed=s.seed + 1)]
        values["shuffled"] = _optional(found, "shuffled labels", lambda: _shuffled(x, task, labels))
    values |= _sites(study, x, oof, found)
    if s.label_efficiency:
        values["label_curve"] = _optional(found, "label curve", lambda: _curve(study, samples.x))
    return found


def _optional(found: _Found, name: str, compute: Any) -> Any:
    """Return what `compute` gives, or None with the reason noted where there are too few patients for it."""
    try:
        return compute()
    except CohortError as error:
        found.not_done[name] = f"{found.samples.name}: {error}"
        return None


def _shuffled(x: npt.NDArray[Any], task: Task, labels: Sequence[npt.NDArray[Any]]) -> dict[str, Any]:
    """Return the result with labels that have nothing to do with the images, on folds laid out for them."""
    layouts = []
    for r, y in enumerate(labels):
        folds = len(task.layouts[r])
        layouts.append(tuple(grouped_kfold(y, groups=task.group, folds=folds, seed=task.seed + r)))
    other = replace(task, layouts=tuple(layouts))
    return measure.within(measure.out_of_fold(x, other, labels=labels), other)


def _curve(study: _Study, x: npt.NDArray[Any]) -> dict[str, Any]:
    """Return the label curve, tested on the external set or else on the first fold."""
    if len(study.ext):
        return measure.label_curve(x, study.y, study.cohort.group_key(), study.ext, head=study.settings.head)
    test = study.task.layouts[0][0].test
    return measure.label_curve(x, study.task.y, study.task.group, test, head=study.settings.head)


def _sites(study: _Study, x: npt.NDArray[Any], oof: OutOfFold, found: _Found) -> dict[str, Any]:
    """Return within and across sites, how well the site itself is told, and the robustness indices."""
    task = study.task
    empty = {"within_site": None, "across_site": None, "site_leakage": None, "robustness": None}
    if task.site is None or study.settings.site is None:
        return empty
    rows = np.flatnonzero(task.site != "")
    if not len(rows):
        raise CohortError(f"column {study.settings.site!r} is empty in all rows that train")
    part, site = measure.some_rows(task, rows), task.site[rows]
    inside = measure.by_site(part.y, oof.p[0, rows], oof.calls[0, rows], site, part)
    if len(np.unique(site)) < 2:
        found.not_done["across sites"] = f"{study.settings.site} is {site[0]!r} in all rows; two are needed"
        return {**empty, "within_site": inside}
    cohort = study.dev_cohort.take(rows)

    def across() -> dict[str, Any]:
        return measure.across_sites(x[rows], part, leave_one_site_out(cohort, column=study.settings.site or ""))

    def tells() -> dict[str, Any]:
        codes = np.unique(site, return_inverse=True)[1]
        folds = min(study.settings.folds, *(len(np.unique(part.group[codes == c])) for c in np.unique(codes)))
        splits = grouped_kfold(codes, groups=part.group, folds=folds, seed=part.seed)
        return measure.site_leakage(x[rows], part, splits)

    names = [f"not {study.positive}", study.positive]
    return {
        "within_site": inside,
        "across_site": _optional(found, "across sites", across),
        "site_leakage": _optional(found, "site leakage", tells),
        "robustness": _optional(found, "robustness", lambda: measure.robustness(x[rows], part, names)),
    }


def _best(found: Sequence[_Found]) -> int:
    """Return the place of the encoder with the best AUROC that is not random."""
    score = [(not one.samples.name.startswith("random:"), one.values["within"]["auroc"]["point"]) for one in found]
    return max(range(len(found)), key=lambda at: score[at])


def predictions_table(study: _Study, found: _Found, out: Path) -> pd.DataFrame:
    """Return every prediction as a row of the table that `validate` reads.

    Column ``split``: of layout 0, the first fold is 'tune', the others are 'test'. Column ``split_external``: layout 0
    is 'tune', the external rows are 'test'. Rows of other layouts carry neither word and are left out there.
    """
    cohort, s = study.cohort, study.settings
    group, label = cohort.group_key(), cohort.values(s.label)
    site = np.full(len(cohort), "", dtype=object)
    if s.site is not None:
        site = cohort.table[cohort.column(s.site)].fillna("").astype(str).to_numpy()
    pictures = found.samples.pictures
    image = [""] * len(cohort) if pictures is None else [os.path.relpath(path, out) for path in pictures]
    common = pd.DataFrame({"row": cohort.table.index, "label": label, "group": group, "site": site, "file": image})
    parts = []
    for r, (p, fold) in enumerate(zip(found.oof.p, found.oof.fold, strict=True)):
        first = TUNE if r == 0 else f"layout {r}"
        rest = TEST if r == 0 else f"layout {r}"
        mine = common.iloc[study.dev].assign(seed=r, fold=fold, score=p, split=np.where(fold == 1, first, rest))
        parts.append(mine.assign(split_external=TUNE if r == 0 else f"layout {r}"))
    if len(study.ext):
        parts.append(
            common.iloc[study.ext].assign(seed=0, fold=0, score=found.p_ext, split="external", split_external=TEST)
        )
    columns = ["row", "seed", "fold", "split", "split_external", "label", "score", "group", "site", "file"]
    return pd.DataFrame(pd.concat(parts, ignore_index=True)).filter(columns)


def _write_encoder(study: _Study, found: _Found, out: Path) -> list[dict[str, Any]]:
    """Write predictions, model and validations of one encoder; return its confidently wrong rows."""
    s, name = study.settings, safe_name(found.samples.name)
    path = out / f"predictions_{name}.csv"
    table = predictions_table(study, found, out)
    write_durably(path, table.to_csv(index=False, float_format="%.9g").encode())
    found.probe.save(out / f"model_{name}.npz")
    has_site = bool((table.loc[table["split"].isin([TUNE, TEST]), "site"] != "").any())
    settings = ValidationSettings(
        label="label",
        score="score",
        group="group",
        site="site" if has_site else None,
        split="split",
        image="file" if found.samples.pictures is not None else None,
        positive=study.positive,
        resamples=s.resamples,
        level=s.level,
        seed=s.seed,
    )
    inside = validate(path, settings, out=out / f"validation_{name}")
    if not len(study.ext):
        return inside.sections["confidently_wrong"]
    known = bool((table.loc[table["split_external"] == TEST, "site"] != "").any())
    settings = replace(settings, split="split_external", site="site" if known else None)
    return validate(path, settings, out=out / f"validation_{name}_external").sections["confidently_wrong"]


def _report(
    study: _Study, found: list[_Found], leaks: dict[str, Any], wrong: list[dict[str, Any]], table: Path
) -> Report:
    task, s = study.task, study.settings
    best = found[_best(found)]
    sections = {
        "data": _data(study),
        "leakage": leaks,
        "encoders": [one.values for one in found],
        "best": best.samples.name,
        "differences": _differences(study, found),
        "confidently_wrong": wrong,
    }
    not_done = {name: why for one in found for name, why in one.not_done.items()}
    if s.site is None:
        not_done["sites"] = "no site column was given (--site), so nothing is said about other sites or scanners"
    if s.external is None:
        not_done["external test"] = "no external rows were named (--external COLUMN=VALUE)"
    if not s.controls:
        not_done["controls"] = "left out (--no-controls)"
    remarks = [
        Remark(kind=one["kind"], severity="warning", message=one["message"])
        for one in leaks["findings"]
        if one["severity"] == "warning"
    ]
    copies = {message: None for one in found for message in one.values["near_duplicates"]}  # once, if all say the same
    remarks += [Remark(kind="near-duplicates", severity="warning", message=message) for message in copies]
    remarks += [remark for one in found for remark in _doubts(one, task)]
    remarks += [Remark(kind="cohort", severity="note", message=note) for note in study.cohort.notes]
    return Report(
        schema=SCHEMA,
        provenance=provenance(inputs=[table], settings=s, seed=s.seed),
        sections=plain(sections),
        remarks=tuple(sorted(remarks, key=lambda one: one.severity != "warning")),
        not_done=not_done,
    )


def _data(study: _Study) -> dict[str, Any]:
    s, group, y = study.settings, study.cohort.group_key(), study.y

    def part(rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        return {"n": len(rows), "clusters": len(np.unique(group[rows])), "positives": int(y[rows].sum())}

    sites = []
    if study.task.site is not None:
        for name in np.unique(study.task.site):
            sites.append({"level": str(name) or "(not recorded)", **part(study.dev[study.task.site == name])})
    return {
        "label": s.label,
        "positive": study.positive,
        "classes": list(study.classes),
        "head": s.head,
        "folds": len(study.task.layouts[0]),
        "layouts": len(study.task.layouts),
        "train": part(study.dev),
        "external": {**part(study.ext), "name": "=".join(s.external)} if s.external else None,
        "site_column": s.site,
        "by_site": sites,
    }


def _differences(study: _Study, found: list[_Found]) -> list[dict[str, Any]]:
    """Return each encoder less texture (or the first encoder), AUROC and BA, with Holm's correction over encoders."""
    names = [one.samples.name for one in found]
    if len(found) < 2:
        return []
    base = found[names.index(TEXTURE) if TEXTURE in names else 0]
    others = [one for one in found if one is not base]
    rows: list[dict[str, Any]] = []
    for metric in ("auroc", "ba"):
        mine = [
            {
                "encoder": one.samples.name,
                "reference": base.samples.name,
                "metric": metric,
                **measure.difference(one.oof, base.oof, metric, study.task),
            }
            for one in others
        ]
        for row, adjusted in zip(mine, holm([row["p"] for row in mine]).tolist(), strict=True):
            row["p_holm"] = adjusted
        rows += mine
    return rows


def _doubts(found: _Found, task: Task) -> list[Remark]:
    """Return what a reader must know before believing one encoder's numbers."""
    name, dim, n = found.samples.name, found.values["dim"], len(task.y)
    auroc, shuffled = found.values["within"]["auroc"], found.values["shuffled"]
    remarks = []
    if auroc["high"] is not None and auroc["high"] < 0.5:
        message = (
            f"{name}: AUROC {auroc['point']:.3f} is surely below 0.5 out of fold; look for labels that are reversed"
        )
        remarks.append(Remark(kind="sign", severity="warning", message=message))
    if shuffled is not None and shuffled["auroc"]["low"] is not None and shuffled["auroc"]["low"] > 0.5:
        message = (
            f"{name}: with shuffled labels AUROC is {shuffled['auroc']['point']:.3f} "
            f"({shuffled['auroc']['low']:.3f} to {shuffled['auroc']['high']:.3f}), above chance: something leaks"
        )
        remarks.append(Remark(kind="control", severity="warning", message=message))
    if n < dim:
        message = f"{name}: {n} rows for {dim} features; the head is held by its penalty alone"
        remarks.append(Remark(kind="wide", severity="note", message=message))
    if auroc["note"]:
        remarks.append(Remark(kind="few", severity="warning", message=f"{name}: {auroc['note']}"))
    return remarks
