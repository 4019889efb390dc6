"""Validation of any model's predictions: from one table to a report that a reviewer can check."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image, UnidentifiedImageError

from eosin.evaluation.report import Remark, Report, plain, provenance
from eosin.features.writer import write_durably
from eosin.tasks import validation_compare as compare
from eosin.tasks import validation_sections as section
from eosin.tasks.checklists import CHECKLISTS, checklist_page
from eosin.tasks.model_card import model_card
from eosin.tasks.pictures import data_uri, jpeg_bytes
from eosin.tasks.predictions import Predictions, ValidationSettings, read_predictions
from eosin.tasks.validation_methods import methods_text
from eosin.tasks.validation_page import validation_page

SCHEMA = "eosin.validation/1"
PICTURE_PX = 224

__all__ = ["SCHEMA", "ValidationSettings", "evaluate_predictions", "validate"]


def validate(predictions: Path, settings: ValidationSettings, *, out: Path) -> Report:
    """Write the validation of a table of predictions into `out` and return it.

    `out` then holds report.json, report.html (self-contained), model_card.md, tripod_ai.md, claim_2024.md, stard_ai.md
    and run.json (what ran, when, how long). All but run.json are the same bytes for the same input, settings and seed.

    Args:
        predictions: .csv, .tsv, .txt or .parquet, one row a prediction.
        settings: which column is what, and what to compute.
        out: folder; made when it is not there.

    Raises:
        CohortError: the table cannot be read, lacks a column, or has a patient in both splits.
        LabelError: labels missing, of one class, or contradictory.
        PredictionsError: scores that are not finite probabilities, or settings that do not fit.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    report = evaluate_predictions(predictions, settings)
    computed = time.perf_counter() - clock
    out.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(report, predictions.parent)
    files = {
        "report.json": report.to_json(),
        "report.html": validation_page(report, pictures),
        "model_card.md": model_card(report),
        **{f"{name}.md": checklist_page(name, report) for name in CHECKLISTS},
    }
    for name, text in files.items():
        write_durably(out / name, text.encode())
    record = {
        "command": "validate",
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 3),
        "seconds_computing": round(computed, 3),
        "files": sorted(files),
        **report.provenance,
    }
    write_durably(out / "run.json", orjson.dumps(record, option=orjson.OPT_INDENT_2))
    return report


def evaluate_predictions(predictions: Path, settings: ValidationSettings) -> Report:
    """Return the report on a table of predictions, writing nothing; see `validate`."""
    read = read_predictions(predictions, settings)
    sections, not_done, remarks = _sections(read, settings)
    remarks = sorted([*read.remarks, *remarks], key=lambda one: (one.severity != "warning", one.kind != "sign"))
    inputs = [predictions, *([settings.readers] if settings.readers else [])]
    return Report(
        schema=SCHEMA,
        provenance=provenance(inputs=inputs, settings=settings, seed=settings.seed),
        sections=sections,
        remarks=tuple(remarks),
        not_done=not_done,
    )


def _sections(read: Predictions, s: ValidationSettings) -> tuple[dict[str, Any], dict[str, str], list[Remark]]:
    """Return the sections, why some are None, and remarks."""
    rows, tune = read.test, read.tune
    point = section.operating_point(tune, s)
    threshold = point["threshold"]
    not_done: dict[str, str] = {}

    def when(name: str, missing: str, compute: Callable[[], Any]) -> Any:
        if missing:
            not_done[name] = missing
            return None
        return compute()

    no_site = "" if rows.site is not None else "no site column was given (--site)"
    if rows.site is not None and len(set(rows.site)) < 2:
        no_site = f"all rows are of one site, {rows.site[0]}"
    no_tune = "" if tune is not None else "needs rows that are not scored: a column with tune and test rows (--split)"
    no_date = "" if rows.date is not None else "no date column was given (--date)"
    no_levels = (
        "" if rows.site is not None or rows.subgroups else "no site or subgroup column was given (--site, --subgroup)"
    )
    sections: dict[str, Any] = {
        "data": section.data_section(rows, read.facts),
        "operating_point": point,
        "discrimination": section.discrimination(rows, threshold, s),
        "calibration": section.calibration(rows, tune, s),
        "usefulness": section.usefulness(rows, s),
        "subgroups": when("subgroups", no_levels, lambda: section.levels_section(rows, threshold, s)),
        "conformal": section.conformal(rows, tune, s) if tune is not None else when("conformal", no_tune, dict),
        "selective": section.selective(rows, threshold, s),
        "temporal": when("temporal", no_date, lambda: compare.temporal(rows, tune, s)),
        "drift": when("drift", no_site, lambda: compare.score_drift(rows, s)),
        "comparison": when(
            "comparison",
            "" if s.reference else "no other model's score was given (--reference)",
            lambda: compare.comparison(rows, tune, threshold, s),
        ),
        "readers": when(
            "readers",
            "" if s.readers else "no table of readers was given (--readers)",
            lambda: compare.readers_section(rows, threshold, s),
        ),
        "confidently_wrong": section.confidently_wrong(rows, threshold, read.facts["positive_label"]),
    }
    if tune is not None and sections["calibration"]["temperature"] is None:
        not_done["temperature"] = (
            "no positive temperature is best on the tune rows (separated classes, or a score the wrong way round)"
        )
    sections["methods"] = methods_text(s, sections)
    remarks = (
        section.sign_remark(sections["discrimination"], s)
        + section.threshold_remark(point)
        + section.site_remarks(sections)
    )
    return plain(sections), not_done, remarks


def _pictures(report: Report, folder: Path) -> dict[int, str]:
    """Return the pictures of the confidently wrong rows, small, by row number; unreadable ones are left out."""
    found = {}
    for row in report.sections["confidently_wrong"]:
        path = folder / row["image"] if row["image"] else None
        if path is None or not path.is_file():
            continue
        try:
            with Image.open(path) as image:
                small = image.convert("RGB")
                small.thumbnail((PICTURE_PX, PICTURE_PX))
        except (UnidentifiedImageError, OSError):
            continue
        found[row["row"]] = data_uri(jpeg_bytes(np.asarray(small)), "image/jpeg")
    return found
