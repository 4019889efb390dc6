"""The methods section of a validation report, written from the settings that were used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eosin.tasks.predictions import ValidationSettings
from eosin.tasks.validation_sections import CURVE_RESAMPLES, PERMUTATIONS


def methods_text(s: ValidationSettings, sections: Mapping[str, Any]) -> list[str]:
    """Return paragraphs that say what was done, and nothing that was not."""
    paragraphs = [_data(s, sections), _uncertainty(s), _measures(s, sections)]
    if sections["subgroups"]:
        paragraphs.append(
            "Sites and subgroups: every level was evaluated on the same resampled patients. Levels with fewer than 10 "
            "positives, 10 negatives or 10 patients are flagged and left out of best, worst and gap. Differences "
            "of AUROC "
            f"between levels were tested by permuting levels among patients of like class ({PERMUTATIONS} "
            f"permutations). "
            "Subgroup results are exploratory unless they were planned."
        )
    if sections["conformal"]:
        paragraphs.append(
            f"Prediction sets: split conformal on 1 - P(class) with alpha {s.alpha:g}, calibrated on the tune rows"
            + (" of each site (Mondrian)." if sections["conformal"]["by_site"] else ".")
        )
    if sections["temporal"]:
        paragraphs.append(sections["temporal"]["method"])
    if sections["comparison"]:
        paragraphs.append(
            f"Comparison: differences to {s.reference} were taken on the same resampled patients; p is twice the "
            f"smaller "
            "tail share of resampled differences, with one added to counts."
            + (f" The non-inferiority margin was {s.margin:g} in AUROC." if s.margin is not None else "")
        )
    return paragraphs


def _data(s: ValidationSettings, sections: Mapping[str, Any]) -> str:
    data, point = sections["data"], sections["operating_point"]
    logits = " after a sigmoid" if s.logits else ""
    return (
        f"Data: column {s.label} was the reference standard ({data['positive_label']} positive), column "
        f"{s.score}{logits} the "
        f"predicted probability. {data['rows_scored']} rows were scored. The operating point "
        f"{point['threshold']:.4f} was "
        f"{point['words']}. A row is called positive at or above it."
    )


def _uncertainty(s: ValidationSettings) -> str:
    unit = (
        f"patients (column {s.group})"
        if s.group
        else "rows, each taken as independent because no patient column was given"
    )
    return (
        f"Uncertainty: {100 * s.level:g} % percentile intervals from {s.resamples} bootstrap resamples of "
        f"{unit}, drawn "
        f"within strata of those with and without a positive row ({CURVE_RESAMPLES} resamples for curves and "
        f"calibration); "
        f"seed {s.seed}. Resamples on which a measure is undefined are counted and left out."
    )


def _measures(s: ValidationSettings, sections: Mapping[str, Any]) -> str:
    tuned = sections["calibration"]["temperature"] is not None
    return (
        "Measures: AUROC, average precision, and at the operating point balanced accuracy, sensitivity, specificity, "
        "predictive values, F1, Matthews' correlation and Cohen's kappa. Calibration: expected calibration error in "
        f"{s.bins} bins of equal width (and of equal mass), Brier score with Murphy's parts, slope and intercept of a "
        "logistic recalibration with cluster-robust Wald intervals. The calibration error of a perfect score at "
        "this sample "
        "size was simulated from the scores. Usefulness: net benefit (Vickers and Elkin 2006). Declining: "
        "risk-coverage curve."
        + (" Temperature scaling was fitted on the tune rows and is reported beside the raw scores." if tuned else "")
    )
