"""A report of a probe's errors: each beside its nearest labelled neighbours, with a verdict (`hard_judge`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pandas as pd

from eosin.cohort import Cohort, read_cohort
from eosin.cohort.reading import read_cells
from eosin.errors import PredictionsError
from eosin.evaluation.report import Remark, Report, plain, provenance
from eosin.features.writer import write_durably
from eosin.tasks.hard_judge import AGREEMENT, ALPHA, VERDICTS, Judged, K, judge_errors
from eosin.tasks.hard_page import hard_page, sample_pictures
from eosin.tasks.predictions import ValidationSettings, read_predictions
from eosin.tasks.samples import Samples, read_samples
from eosin.tasks.validation_sections import operating_point

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

SCHEMA = "eosin.hard_examples/1"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HardExamples:
    """The report of `hard_examples` and what it rests on.

    Attributes:
        report: as written.
        judged: errors and neighbours, in rows of the predictions that were scored.
        table: one row an error, as written.
    """

    report: Report
    judged: Judged
    table: pd.DataFrame


def hard_examples(
    features: Path,
    table: Path,
    predictions: Path,
    *,
    out: Path,
    encoder: str | None = None,
    group: str | None = None,
    positive: str | None = None,
    threshold: float | None = None,
    slides: Sequence[Path] = (),
) -> HardExamples:
    """Set each error among the scored rows of a probe beside its neighbours; write a table, a report and a page.

    `out` then holds hard_examples.csv, hard_examples.json, hard_examples.html and run.json. Neighbours are taken among
    all rows of the predictions' first layout, tuning rows included: their labels are given, and nothing is fitted.

    Args:
        features: what was probed: a feature store, a folder of images or an array.
        table: the cohort that was probed.
        predictions: predictions_<encoder>.csv of `eosin probe`.
        out: folder.
        encoder: what reads images, or an array of features made elsewhere.
        group: column of the patient, as it was probed.
        positive: label that counts as positive, where the values do not say it.
        threshold: operating point; chosen on the tuning rows when None, as `validate` does.
        slides: where slides lie, for pictures of tiles.

    Raises:
        PredictionsError: predictions that are not of this cohort.
        CohortError, LabelError, StoreError: what cannot be read, as in `probe` and `validate`.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    cohort = read_cohort(table, columns={"patient_id": group} if group else None)
    settings = ValidationSettings(
        label="label", score="score", group="group", split="split", positive=positive, threshold=threshold
    )
    read = read_predictions(predictions, settings)
    assert read.tune is not None
    point = operating_point(read.tune, settings)
    at = _cohort_rows(predictions, cohort)
    number = np.concatenate([read.test.number, read.tune.number])
    rows = np.array([at[one] for one in number.tolist()], np.int64)
    y = np.concatenate([read.test.y, read.tune.y]).astype(np.int64)
    score = np.concatenate([read.test.p, read.tune.p])
    called = (score >= point["threshold"]).astype(np.int64)
    called[len(read.test) :] = y[len(read.test) :]  # errors are looked for among scored rows only
    samples = read_samples(features, cohort, encoder=encoder, cache=out)
    patient = np.concatenate([read.test.cluster, read.tune.cluster])
    judged = judge_errors(samples.x[rows], y, called, patient)
    names = (f"not {read.facts['positive_label']}", str(read.facts["positive_label"]))
    errors = _error_table(judged, cohort, rows, y, score, patient, names)
    report = _report(judged, errors, read, point, samples, (table, predictions))
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / "hard_examples.csv", errors.to_csv(index=False, float_format="%.6g").encode())
    write_durably(out / "hard_examples.json", report.to_json().encode())
    picture = sample_pictures(samples, features, slides)
    page = hard_page(report, judged, errors, samples, rows, [names[code] for code in y], picture)
    write_durably(out / "hard_examples.html", page.encode())
    record = {
        "command": "hard-examples",
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 3),
        **report.provenance,
    }
    write_durably(out / "run.json", orjson.dumps(record, option=orjson.OPT_INDENT_2))
    return HardExamples(report=report, judged=judged, table=errors)


def _cohort_rows(path: Path, cohort: Cohort) -> Mapping[int, int]:
    """Return row number in the table of predictions -> position in the cohort, by its column `row`.

    Raises:
        PredictionsError: no such column, or rows that the cohort has not.
    """
    cells = read_cells(path)
    if "row" not in cells:
        raise PredictionsError(
            f"{path} has no column 'row' that says which row of the cohort it predicts; needed the "
            "predictions_<encoder>.csv that eosin probe wrote"
        )
    position = {int(number): at for at, number in enumerate(cohort.table.index)}
    numbers, named = cells.index.to_numpy(dtype=np.int64).tolist(), cells["row"].tolist()
    found = {number: position.get(int(text)) for number, text in zip(numbers, named, strict=True)}
    lost = [number for number, at in found.items() if at is None]
    if lost:
        raise PredictionsError(
            f"{path}: {len(lost)} predictions name rows that {cohort.source} has not, first in row {lost[0]}; give the "
            "table that was probed"
        )
    return {number: at for number, at in found.items() if at is not None}


def _error_table(
    judged: Judged,
    cohort: Cohort,
    rows: Indices,
    y: Indices,
    score: Floats,
    patient: Array,
    names: tuple[str, str],
) -> pd.DataFrame:
    """Return one row an error, the most doubtful label first."""
    at = judged.rows
    ids = cohort.row_ids()
    found = pd.DataFrame(
        {
            "row": cohort.table.index[rows[at]],
            "name": ids[rows[at]],
            "patient": patient[at],
            "label": [names[code] for code in y[at]],
            "called": [names[1 - code] for code in y[at]],
            "score": score[at],
            "verdict": judged.verdict,
            "neighbours_with_model": judged.with_model,
            "neighbours": judged.neighbours.shape[1],
            "balance": judged.balance,
            "p": judged.p,
            "neighbour_rows": [
                " ".join(str(cohort.table.index[rows[one]]) for one in near) for near in judged.neighbours
            ],
        }
    )
    order = np.lexsort((judged.p, -judged.balance, np.array([VERDICTS.index(one) for one in judged.verdict.tolist()])))
    return found.iloc[order].assign(error=np.arange(len(found))[order]).reset_index(drop=True)


def _report(
    judged: Judged, errors: pd.DataFrame, read: Any, point: Mapping[str, Any], samples: Samples, inputs: Sequence[Path]
) -> Report:
    missed = (errors["label"] == read.facts["positive_label"]).to_numpy(dtype=np.bool_)
    counts = [
        {
            "verdict": verdict,
            "n": int((errors["verdict"] == verdict).sum()),
            "missed": int(((errors["verdict"] == verdict) & missed).sum()),
            "false_alarms": int(((errors["verdict"] == verdict) & ~missed).sum()),
        }
        for verdict in VERDICTS
    ]
    told = sum(one["n"] for one in counts[:2])
    remarks = [*read.remarks]
    if len(errors) and told <= 1.5 * judged.by_luck:
        message = (
            f"{told} verdicts of {len(errors)} errors are clear, and {judged.by_luck:.1f} would be by luck alone: in "
            "these features neighbours hardly follow the label, so a doubtful label is hardly more doubtful than others"
        )
        remarks.append(Remark(kind="luck", severity="warning", message=message))
    sections = {
        "encoder": samples.name,
        "data": read.facts,
        "threshold": {name: point[name] for name in ("threshold", "source", "words")},
        "rule": {"k": judged.neighbours.shape[1], "agreement": AGREEMENT, "alpha": ALPHA},
        "errors": len(errors),
        "verdicts": counts,
        "by_luck": judged.by_luck,
        "rows": errors.drop(columns="error"),
    }
    return Report(
        schema=SCHEMA,
        provenance=provenance(inputs=inputs, settings={"k": K, "encoder": samples.name}, seed=0),
        sections=plain(sections),
        remarks=tuple(remarks),
    )
