"""A model card from a validation report: what was measured, and blanks that only the model's owner can fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eosin.evaluation.report import Report
from eosin.tasks.checklists import NOT_REPORTED
from eosin.tasks.validation_page import NAMES, with_interval

CARD = ("auroc", "auprc", "ba", "sensitivity", "specificity", "ppv", "npv")


def model_card(report: Report) -> str:
    """Return the card as Markdown (sections after Mitchell et al. 2019, Model Cards for Model Reporting)."""
    r = report.sections
    parts = (
        [
            "# Model card",
            "",
            "Filled from a validation run; what the run cannot know is “not reported”. For research; not for "
            "clinical use.",
        ],
        _owner(
            "Model",
            ("name and version", "kind and architecture", "weights and their licence", "training data", "contact"),
        ),
        _owner("Intended use", ("purpose", "intended users", "uses it is not for")),
        _evaluation(report),
        _performance(r),
        _calibration(r),
        _levels(r),
        _caveats(report),
    )
    return "\n".join(line for part in parts for line in (*part, "")).rstrip() + "\n"


def _owner(title: str, names: tuple[str, ...]) -> list[str]:
    return [f"## {title}", "", *(f"- {name}: {NOT_REPORTED}" for name in names)]


def _evaluation(report: Report) -> list[str]:
    data, point = report.sections["data"], report.sections["operating_point"]
    who = f"{data['clusters']} patients" if data["cluster_column"] else "patients not recorded"
    sites = ", ".join(s["level"] for s in data["by_site"]) or NOT_REPORTED
    return [
        "## Evaluation data",
        "",
        f"- {data['rows_scored']} rows, {who}, {data['positives']} positive ({100 * data['prevalence']:.1f} %)",
        f"- sites: {sites}",
        f"- dates: {' to '.join(data['dates']) if data['dates'] else NOT_REPORTED}",
        f"- input: {', '.join(one['name'] + ' (sha256 ' + one['sha256'] + ')' for one in report.provenance['inputs'])}",
        f"- operating point: {point['threshold']:.4f}, {point['words']}",
    ]


def _performance(r: Mapping[str, Any]) -> list[str]:
    pooled = r["discrimination"]["pooled"]
    level = f"{100 * pooled['auroc']['level']:g} % interval"
    rows = [
        f"| {NAMES[name]} | {with_interval(pooled[name])} | {pooled[name]['n']} | {pooled[name]['clusters']} |"
        for name in CARD
    ]
    return ["## Performance", "", f"| metric | estimate ({level}) | n | clusters |", "|---|---|---|---|", *rows]


def _calibration(r: Mapping[str, Any]) -> list[str]:
    rows = []
    for s in [{**r["calibration"]["pooled"], "level": "all rows"}, *r["calibration"]["by_site"]]:
        rows.append(
            f"| {s['level']} | {s['n']} | {with_interval(s['ece'])} | {s['ece_floor']:.3f} | "
            f"{with_interval(s['slope'], 2)} | {s['flag']} |"
        )
    head = f"| site | n | ECE, {r['calibration']['bins']} bins | ECE of perfect scores | slope | |"
    return ["## Calibration", "", head, "|---|---|---|---|---|---|", *rows]


def _levels(r: Mapping[str, Any]) -> list[str]:
    lines = ["## Sites and subgroups", ""]
    if not r["subgroups"]:
        return [*lines, NOT_REPORTED]
    for name, group in r["subgroups"].items():
        lines += [f"| {name} | n | positive | AUROC | balanced accuracy | |", "|---|---|---|---|---|---|"]
        for row in group["rows"]:
            shown = (with_interval(row["metrics"].get(metric)) for metric in ("auroc", "ba"))
            lines.append(f"| {row['level']} | {row['n']} | {row['positives']} | {' | '.join(shown)} | {row['flag']} |")
        lines += ["", group["caption"], ""]
    return lines[:-1]


def _caveats(report: Report) -> list[str]:
    lines = ["## Caveats", ""]
    lines += [f"- {remark.message}" for remark in report.remarks]
    lines += [f"- not done: {name.replace('_', ' ')} ({why})" for name, why in report.not_done.items()]
    return [*lines, "- ethical considerations, known biases of the training data: " + NOT_REPORTED]
