"""Reporting checklists filled from the record of a run: TRIPOD+AI, CLAIM 2024 and STARD-AI.

A checklist is a data file: item ids as published, item texts abridged in our own words, and for the items that a
computation can speak to, the name of an answer. An answer is a sentence made of values that stand in the report;
everything else is "not reported", because only the authors know it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from eosin.evaluation.report import Report
from eosin.tasks.validation_page import p_value, with_interval

CHECKLISTS = ("tripod_ai", "claim_2024", "stard_ai")
NOT_REPORTED = "not reported"


def checklist(name: str) -> dict[str, Any]:
    """Return a checklist: title, version, citation, counts and items (id, topic, text, and fill where it has one)."""
    return json.loads((files("eosin.tasks") / "checklists" / f"{name}.json").read_text(encoding="utf-8"))


def checklist_page(name: str, report: Report) -> str:
    """Return a checklist filled from `report`, as Markdown."""
    content, found = checklist(name), answers(report)
    rows = [(item, found.get(item.get("fill", ""))) for item in content["items"]]
    filled = sum(answer is not None for _, answer in rows)
    lines = [
        f"# {content['title']} checklist, filled from the run record",
        "",
        f"{content['title']}, {content['version']} ({content['counts']}): {content['citation']}.",
        "",
        "**Item numbers are those published; item wording is abridged in our own words, so cite and consult the "
        "original.** "
        f"{filled} of {len(rows)} entries could be filled, in whole or in part, from what the software recorded. "
        f"An entry says what "
        "was computed; it does not say that the item is fulfilled. “not reported” means that only the authors "
        "can say it.",
        "",
        "| item | topic | what is asked (abridged) | found in the run record |",
        "|---|---|---|---|",
    ]
    for item, answer in rows:
        lines.append(f"| {item['id']} | {item['topic']} | {item['text']} | {_cell(answer or NOT_REPORTED)} |")
    return "\n".join(lines) + "\n"


def answers(report: Report) -> dict[str, str]:
    """Return every answer that this report can give, by name."""
    r, settings = report.sections, report.provenance["settings"]
    return {
        name: answer
        for part in (_about_data(r, report, settings), _about_methods(r, settings), _about_results(r))
        for name, answer in part.items()
        if answer is not None
    }


def _about_data(r: Mapping[str, Any], report: Report, settings: Mapping[str, Any]) -> dict[str, str | None]:
    data = r["data"]
    inputs = "; ".join(f"{one['name']} (sha256 {one['sha256'][:16]}…)" for one in report.provenance["inputs"])
    missing = ", ".join(f"{name}: {n}" for name, n in data["missing"].items() if n) or "none in the columns used"
    unit = f"patients (column {data['cluster_column']})" if data["cluster_column"] else None
    sites = [f"{s['level']} (n {s['n']}, {s['positives']} positive)" for s in data["by_site"]]
    dates = f"{data['dates'][0]} to {data['dates'][1]}" if data["dates"] else None
    events = f"{data['rows_scored']} scored rows, {data['positives']} positive"
    tune = f"; {data['rows_tune']} tune rows" if data["rows_tune"] else ""
    scanners = {name: group for name, group in (r["subgroups"] or {}).items() if "scan" in name.lower()}
    return {
        "inputs": f"table of predictions {inputs}; how the cases were collected is not in it",
        "dates": dates,
        "where_when": "; ".join(part for part in (dates, f"{len(sites)} sites" if sites else None) if part) or None,
        "sites": f"{len(sites)} sites: {', '.join(sites)}" if sites else None,
        "by_site": f"counts by site: {', '.join(sites)}" if sites else None,
        "checks": f"scores checked to be finite and in [0, 1]; {data['duplicate_rows']} exact duplicate rows "
        f"found; preprocessing is not recorded",
        "label": f"column {settings['label']}; positive: {data['positive_label']}; how it was obtained is not recorded",
        "label_values": f"positive: {data['positive_label']}; negative: {', '.join(data['negative_labels'])}",
        "missing": f"empty cells: {missing}; rows without label or score are refused, not imputed; "
        f"{data['rows_left_out']} rows left out by the split column",
        "flow": f"{data['rows_in_file']} rows in the file, {data['rows_left_out']} left out, {data['rows_tune']} "
        f"for tuning, {data['rows_scored']} scored" + (f" of {data['clusters']} {unit}" if unit else ""),
        "events": events + tune,
        "prevalence": f"prevalence among the scored rows {100 * data['prevalence']:.1f} %; whether that is the "
        f"intended population's is not recorded",
        "partition": f"column {settings['split']}: {data['rows_tune']} tune rows, {data['rows_scored']} scored "
        f"rows; training data are not in the table"
        if settings["split"]
        else None,
        "disjoint": f"tune and scored rows share no {data['cluster_column']} (checked)"
        if settings["split"] and unit
        else None,
        "devices": "; ".join(
            f"{name}: {', '.join(row['level'] for row in group['rows'])}" for name, group in scanners.items()
        )
        or None,
        "score": f"read from column "
        f"{settings['score']}{' (logits, sigmoid applied)' if settings['logits'] else ''}; how the "
        f"model was run is not recorded",
    }


def _about_methods(r: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, str | None]:
    groups = ", ".join(r["subgroups"] or {})
    temperature = r["calibration"]["temperature"]
    return {
        "objective": "evaluation of an existing model"
        + (f", compared with {settings['reference']}" if settings["reference"] else "")
        + (f", non-inferiority with margin {settings['margin']:g}" if settings["margin"] else ""),
        "measures": r["methods"][2],
        "uncertainty": r["methods"][1],
        "heterogeneity_method": f"results by {groups}, with a permutation test" if groups else None,
        "subgroup_method": f"performance broken down by {groups}, with intervals and gaps" if groups else None,
        "recalibration_method": "temperature scaling fitted on the tune rows, reported beside the raw scores"
        if temperature
        else "none",
        "threshold": f"probability; threshold {r['operating_point']['threshold']:.4f}, {r['operating_point']['words']}",
        "imbalance": f"none in the evaluation; prevalence {100 * r['data']['prevalence']:.1f} % shown beside "
        f"precision and recall",
        "indeterminate": f"prediction sets with both classes are counted as “cannot tell” (alpha {settings['alpha']:g})"
        if r["conformal"]
        else None,
        "software": "evaluation by eosin (Apache-2.0), versions in report.json; availability of model and data "
        "is not recorded",
        "robustness": f"results by {groups}; selective prediction" if groups else None,
        "audit": "report.json holds settings, seed, versions and input hashes; whether the model's outputs are "
        "kept is not recorded",
    }


def _about_results(r: Mapping[str, Any]) -> dict[str, str | None]:
    pooled, table = r["discrimination"]["pooled"], r["discrimination"]["confusion"]
    shown = "; ".join(
        f"{name} {with_interval(pooled[key])}"
        for key, name in (
            ("auroc", "AUROC"),
            ("ba", "balanced accuracy"),
            ("sensitivity", "sensitivity"),
            ("specificity", "specificity"),
        )
    )
    ece = with_interval(r["calibration"]["pooled"]["ece"])
    captions = "; ".join(f"{name}: {group['caption']}" for name, group in (r["subgroups"] or {}).items())
    temperature, drift, readers = r["calibration"]["temperature"], r["drift"], r["readers"]
    differing = [row["level"] for row in drift["rows"] if row["p_adjusted"] < 0.05] if drift else []
    return {
        "auroc": f"AUROC {with_interval(pooled['auroc'])}",
        "performance": f"{shown}; calibration error {ece}",
        "precision": f"no calculation recorded; the AUROC interval is "
        f"{pooled['auroc']['high'] - pooled['auroc']['low']:.3f} wide"
        if pooled["auroc"]["low"] is not None
        else None,
        "heterogeneity": captions or None,
        "subgroups": captions or None,
        "recalibration": f"temperature {temperature['temperature']:.3f}: calibration error "
        f"{temperature['ece_before']:.3f} to {temperature['ece_after']:.3f}"
        if temperature
        else None,
        "drift": (
            f"score distribution differs from the other sites (p < 0.05, adjusted): {', '.join(differing) or 'none'}"
            if drift
            else None
        ),
        "failures": f"confusion table TP {table['tp']}, FP {table['fp']}, FN {table['fn']}, TN {table['tn']}; "
        f"{len(r['confidently_wrong'])} confidently wrong rows listed",
        "confusion": f"TP {table['tp']}, FP {table['fp']}, FN {table['fn']}, TN {table['tn']}",
        "readers": f"{readers['words']}" if readers else None,
        "limitations": _limitations(r),
    }


def _limitations(r: Mapping[str, Any]) -> str | None:
    found = []
    if not r["data"]["cluster_column"]:
        found.append("rows were treated as independent, no patient column being given")
    if r["operating_point"]["source"] == "default":
        found.append("the threshold 0.5 was not chosen for these data")
    small = [s["level"] for s in r["data"]["by_site"] if s["flag"]]
    if small:
        found.append(f"sites too small to judge: {', '.join(small)}")
    if r["comparison"] and r["comparison"]["metrics"]["auroc"]["difference"]["p"] is not None:
        found.append(
            f"difference to the reference in AUROC p {p_value(r['comparison']['metrics']['auroc']['difference']['p'])}"
        )
    return "; ".join(found) + "; others are the authors' to state" if found else None


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
