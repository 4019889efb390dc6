"""The page of a validation report: a function of the report alone, one self-contained HTML file that also prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from eosin.evaluation.report import Report
from eosin.tasks import plots
from eosin.version import __version__

Row = Mapping[str, Any]
Block = dict[str, Any]

NAMES = {
    "auroc": "AUROC",
    "auprc": "average precision",
    "ba": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "accuracy": "accuracy",
    "f1": "F1",
    "mcc": "MCC",
    "kappa": "Cohen's kappa",
    "brier": "Brier score",
    "ece": "ECE",
}
PER_SITE = ("auroc", "ba", "sensitivity", "specificity")
MAX_FOREST = 40
MAX_TOLD = 8


def validation_page(report: Report, pictures: Mapping[int, str] | None = None) -> str:
    """Return the page as HTML.

    Args:
        report: of `eosin.tasks.validate`.
        pictures: row number -> data URI, for confidently wrong rows.
    """
    r = report.sections
    builders = (
        ("Data", _data),
        ("Operating point", _operating_point),
        ("Discrimination", _discrimination),
        ("Calibration", _calibration),
        ("Usefulness of acting on the score", _usefulness),
        ("Sites and subgroups", _subgroups),
        ("Prediction sets and declining", _selective),
        ("Over time", _temporal),
        ("Do the sites' scores differ?", _drift),
        ("Against the reference model", _comparison),
        ("Readers", _readers),
        ("Confidently wrong", lambda one: _wrong(one, pictures or {})),
    )
    sections = [{"title": title, "blocks": blocks} for title, build in builders if (blocks := build(r))]
    if report.not_done:
        rows = [_cells(name.replace("_", " "), why) for name, why in report.not_done.items()]
        sections.append({"title": "Not done", "blocks": [_table(["part", "why"], rows, words=True)]})
    sections.append({"title": "Methods", "blocks": [{"kind": "text", "text": text} for text in r["methods"]]})
    sections.append({"title": "Record", "blocks": [_record(report)]})
    data = r["data"]
    page = {
        "title": "eosin: validation report",
        "heading": "Validation report",
        "lead": f"{report.provenance['inputs'][0]['name']}: the score {report.value('provenance.settings.score')!r} as "
        f"probability of {data['positive_label']!r}. {data['rows_scored']} rows, {_clusters(data)}, "
        f"{data['positives']} positive ({100 * data['prevalence']:.1f} %)"
        + (f", {len(data['by_site'])} sites." if data["by_site"] else "."),
        "warnings": [one.message for one in report.remarks if one.severity == "warning"],
        "notes": [one.message for one in report.remarks if one.severity == "note"],
        "headline": _headline(r),
        "headline_note": _headline_note(r),
        "sections": sections,
        "footer": f"Made by eosin {__version__}. Intervals hold for patients like these; they do not cover bias "
        "in how cases were chosen or labelled.",
    }
    environment = Environment(loader=PackageLoader("eosin.tasks"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("validation.html.j2").render(page)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(row: Row | None, digits: int = 3) -> str:
    """Return ``0.912 (0.893 to 0.931)``, or a dash."""
    if row is None or row["point"] is None:
        return "–"
    if row["low"] is None or row["high"] is None:
        return f"{number(row['point'], digits)} (no interval)"
    return f"{number(row['point'], digits)} ({number(row['low'], digits)} to {number(row['high'], digits)})"


def p_value(p: float | None) -> str:
    """Return a p-value as journals print it."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _clusters(data: Row) -> str:
    return f"{data['clusters']} patients" if data["cluster_column"] else "every row taken as independent"


def _cells(*cells: Any, flagged: bool = False) -> Block:
    return {"cells": ["" if cell is None else str(cell) for cell in cells], "flagged": flagged}


def _table(columns: Sequence[str], rows: Sequence[Block], caption: str = "", *, words: bool = False) -> Block:
    """Return a table; `words` lets long cells wrap."""
    return {"kind": "table", "columns": list(columns), "rows": list(rows), "caption": caption, "words": words}


def _text(text: str) -> Block:
    return {"kind": "text", "text": text}


def _figures(*figures: tuple[str, str] | tuple[str, str, bool]) -> Block:
    """Return figures given as (uri, caption) or (uri, caption, wide)."""
    return {
        "kind": "figures",
        "figures": [
            {"uri": f[0], "caption": f[1], "alt": f[1].split(".")[0], "wide": len(f) > 2 and f[2]} for f in figures
        ],
    }


def _side(*blocks: Block) -> Block:
    return {"kind": "side", "blocks": list(blocks)}


def _headline(r: Row) -> list[Row]:
    pooled, point, data = r["discrimination"]["pooled"], r["operating_point"], r["data"]
    counts, calibration = r["discrimination"]["confusion"], r["calibration"]
    floor = f"{calibration['pooled']['ece_floor']:.3f} is expected of perfect scores at this n"
    cards = [
        _card("AUROC", pooled["auroc"], f"{data['rows_scored']} rows, {_clusters(data)}"),
        _card("Balanced accuracy", pooled["ba"], f"at threshold {point['threshold']:.3f}, {point['words']}"),
        _card("Sensitivity", pooled["sensitivity"], f"{counts['tp']} of {counts['tp'] + counts['fn']} positives"),
        _card("Specificity", pooled["specificity"], f"{counts['tn']} of {counts['tn'] + counts['fp']} negatives"),
        _card("Calibration error", calibration["pooled"]["ece"], f"ECE, {calibration['bins']} bins; {floor}"),
    ]
    judged = [site for site in calibration["by_site"] if not site["flag"]]
    if judged:
        worst = max(judged, key=lambda site: site["ece"]["point"])
        what = f"{worst['level']}, n {worst['n']}; {worst['ece_floor']:.3f} is expected of perfect scores"
        cards.append(_card("Worst site's calibration", worst["ece"], what))
    return cards


def _card(name: str, interval: Row, what: str) -> Row:
    low, high = interval["low"], interval["high"]
    ends = "no interval" if low is None else f"{100 * interval['level']:g} % CI {number(low)} to {number(high)}"
    return {"name": name, "value": number(interval["point"]), "ci": ends, "what": what}


def _headline_note(r: Row) -> str:
    sites = r["calibration"]["by_site"]
    if not sites:
        return (
            "No site column was given, so calibration is pooled only. It can fail at one scanner while AUROC holds: "
            "give --site."
        )
    told = "; ".join(
        f"{site['level']} (n {site['n']}) too few cases"
        if site["flag"]
        else f"{site['level']} {number(site['ece']['point'])}, slope {number(site['slope']['point'], 2)} (n "
        f"{site['n']})"
        for site in sites[:MAX_TOLD]
    )
    more = f"; {len(sites) - MAX_TOLD} more below" if len(sites) > MAX_TOLD else ""
    return f"Calibration error by site: {told}{more}."


def _data(r: Row) -> list[Block]:
    data = r["data"]
    rows = [
        _cells("rows in the file", data["rows_in_file"]),
        _cells("rows scored", data["rows_scored"]),
        _cells("rows that choose threshold and scaling", data["rows_tune"]),
        _cells("rows left out", data["rows_left_out"]),
        _cells("patients (units that are resampled)", _clusters(data)),
        _cells(f"positive ({data['positive_label']})", f"{data['positives']} ({100 * data['prevalence']:.1f} %)"),
        _cells("negative", ", ".join(data["negative_labels"])),
        _cells("exact copies of another row", data["duplicate_rows"]),
        _cells("empty cells", ", ".join(f"{name} {n}" for name, n in data["missing"].items() if n) or "none"),
    ]
    if data["dates"]:
        rows.append(_cells("dates", f"{data['dates'][0]} to {data['dates'][1]}"))
    blocks = [_table(["", ""], rows)]
    if data["by_site"]:
        sites = [
            _cells(s["level"], s["n"], s["clusters"], s["positives"], f"{100 * s['prevalence']:.1f} %")
            for s in data["by_site"]
        ]
        blocks.append(_table(["site", "rows", "patients", "positive", "prevalence"], sites))
    return [_side(*blocks)]


def _operating_point(r: Row) -> list[Block]:
    point = r["operating_point"]
    text = f"A row is called positive when its score is at least {point['threshold']:.4f}: {point['words']}."
    if point["spread"]:
        low, high = (number(point["spread"][end]) for end in ("low", "high"))
        text += f" When the patients it was chosen on are resampled, it moves between {low} and {high}."
    return [_text(text)]


def _discrimination(r: Row) -> list[Block]:
    found, point, positive = r["discrimination"], r["operating_point"], r["data"]["positive_label"]
    pooled = found["pooled"]
    rows = [_cells(NAMES[name], with_interval(one), _left_out(one)) for name, one in pooled.items()]
    at = {name: pooled[name]["point"] for name in ("sensitivity", "specificity")}
    curves = [{"name": "all rows", **found["roc"]}, *found["roc_by_site"]]
    confusion = plots.confusion_plot(found["confusion"], positive)
    return [
        _side(
            _table(["metric", "estimate (interval)", ""], rows),
            _figures((confusion, f"Calls at threshold {point['threshold']:.3f}.")),
        ),
        _figures(
            (
                plots.roc_plot(curves, at, f"all rows, AUROC {number(pooled['auroc']['point'])}"),
                "ROC curve. Thin lines: single sites with enough cases.",
            ),
            (
                plots.pr_plot(
                    found["pr"], r["data"]["prevalence"], f"average precision {number(pooled['auprc']['point'])}"
                ),
                "Precision and recall. A score that says nothing lies on the prevalence, so the curve cannot be "
                "compared "
                "between cohorts of other prevalence.",
            ),
            (
                plots.histogram_plot(found["histogram"], point["threshold"], positive),
                "Scores of both classes, each scaled to its own total.",
            ),
        ),
    ]


def _left_out(interval: Row) -> str:
    """Return what must be said beside an interval."""
    degenerate = (
        f"{interval['degenerate']} of {interval['resamples']} resamples left out" if interval["degenerate"] else ""
    )
    return interval["note"] or degenerate


def _calibration(r: Row) -> list[Block]:
    c = r["calibration"]
    pooled = c["pooled"]
    parts = pooled["brier_parts"]
    rows = [
        _cells(
            f"ECE, {c['bins']} bins of equal width",
            with_interval(pooled["ece"]),
            f"perfect scores would show about {number(pooled['ece_floor'])} at this n",
        ),
        _cells(f"ECE, {c['bins']} bins of equal mass", number(pooled["ece_mass"]), "the same question with other bins"),
        _cells("largest error of a bin (MCE)", number(pooled["mce"]), "one small bin can set it"),
        _cells(
            "Brier score",
            with_interval(pooled["brier"]),
            f"reliability {number(parts['reliability'], 4)}, resolution {number(parts['resolution'], 4)}, "
            f"uncertainty {number(parts['uncertainty'], 4)}",
        ),
        _cells(
            "calibration slope",
            with_interval(pooled["slope"]),
            pooled["slope"]["note"] or "1 is perfect; below 1 the scores are too extreme",
        ),
        _cells(
            "calibration in the large",
            with_interval(pooled["intercept"]),
            "0 is perfect; above 0 the scores are too low",
        ),
    ]
    blocks = [_table(["all rows", "estimate (interval)", "reading"], rows)]
    if c["by_site"]:
        sites = [
            _cells(
                s["level"],
                s["n"],
                s["positives"],
                with_interval(s["ece"]),
                number(s["ece_floor"]),
                with_interval(s["slope"], 2),
                with_interval(s["intercept"], 2),
                s["flag"],
                flagged=bool(s["flag"]),
            )
            for s in c["by_site"]
        ]
        columns = ["site", "n", "positive", "ECE", "ECE of perfect scores", "slope", "in the large", ""]
        blocks.append(_table(columns, sites, "Calibration of each site: it can fail at one scanner while AUROC holds."))
    panels = [p for p in c["reliability"] if p["rows"]]
    blocks.append(
        _figures(
            (
                plots.reliability_plot(panels),
                "Reliability: observed frequency against predicted probability, with Wilson intervals; larger "
                "dots hold more rows.",
                True,
            )
        )
    )
    if c["temperature"]:
        t = c["temperature"]
        blocks.append(
            _text(
                f"Temperature {number(t['temperature'])}, fitted on the {t['n']} tune rows, takes the ECE of the "
                f"scored rows "
                f"from {number(t['ece_before'])} to {number(t['ece_after'])} and log loss from "
                f"{number(t['log_loss_before'])} to "
                f"{number(t['log_loss_after'])}. All other numbers here are of the scores as given."
            )
        )
    return blocks


def _usefulness(r: Row) -> list[Block]:
    rows = r["usefulness"]["decision_curve"]
    threshold = r["operating_point"]["threshold"]
    text = (
        "Net benefit counts true positives less false positives, weighed by how much a needless action costs: a "
        "threshold "
        "of 0.2 says that missing one positive is as bad as four needless actions. The model helps where its "
        "curve lies "
        "above both lines. It takes the scores as probabilities, so poor calibration costs benefit."
    )
    useful = r["usefulness"]["better_between"]
    said = (
        f"With the interval above zero, acting on the model beats acting on all and on nobody at thresholds from "
        f"{useful[0]:.2f} to {useful[1]:.2f}."
        if useful
        else "At no threshold does the interval of the gain over the better of the two lie above zero."
    )
    return [_side(_figures((plots.decision_plot(rows, threshold), said)), _text(text))]


def _subgroups(r: Row) -> list[Block]:
    blocks: list[Block] = []
    pooled = r["discrimination"]["pooled"]
    groups = [(name, group) for name, group in (r["subgroups"] or {}).items()]
    if not groups:
        return []
    forest: list[Row] = []
    for name, group in groups:
        forest.append({"label": name, "heading": True})
        forest += [
            {"label": row["level"], "n": row["n"], "flag": row["flag"], **_ends(row, "auroc")} for row in group["rows"]
        ]
    if len(forest) > MAX_FOREST:
        blocks.append(_text(f"The first {MAX_FOREST} of {len(forest)} lines are drawn; the tables hold all."))
    caption = "AUROC of every level. Dotted: all rows; shaded: their interval; hollow: too few cases to judge."
    blocks.append(_figures((plots.forest_plot(forest[:MAX_FOREST], pooled["auroc"], "AUROC"), caption, True)))
    for name, group in groups:
        rows = [
            _cells(
                row["level"],
                row["n"],
                row["positives"],
                row["clusters"],
                *(with_interval(row["metrics"].get(metric)) for metric in PER_SITE),
                row["flag"],
                flagged=bool(row["flag"]),
            )
            for row in group["rows"]
        ]
        for label, summary in group["summary"].items():
            rows.append(_cells(label, "", "", "", *(with_interval(summary.get(metric)) for metric in PER_SITE), ""))
        columns = [name, "n", "positive", "patients", *(NAMES[metric] for metric in PER_SITE), ""]
        blocks.append(_table(columns, rows, group["caption"]))
    return blocks


def _ends(row: Row, metric: str) -> Row:
    found = row["metrics"].get(metric)
    return {name: found[name] if found else None for name in ("point", "low", "high")}


def _selective(r: Row) -> list[Block]:
    blocks: list[Block] = []
    if r["conformal"]:
        c = r["conformal"]
        rows = [
            _cells(
                row["site"],
                row["n"],
                with_interval({**row, "point": row["coverage"]}),
                number(row["mean_size"], 2),
                f"{100 * row['single']:.1f} %",
                f"{100 * row['empty']:.1f} %",
                row["flag"],
                flagged=bool(row["flag"]),
            )
            for row in c["coverage"]
        ]
        blocks += [
            _text(
                f"Split conformal prediction sets, calibrated on the {r['data']['rows_tune']} tune rows to hold "
                f"the truth in at least "
                f"{100 * (1 - c['alpha']):g} % of rows{' of every site' if c['by_site'] else ''}. A set with "
                f"both classes is an honest “cannot tell”."
            ),
            _table(["site", "n", "sets that hold the truth", "mean size", "one class", "empty", ""], rows),
        ]
    s = r["selective"]
    words = (
        f"If the least sure rows are declined: area under the risk-coverage curve {with_interval(s['aurc'])}, "
        f"{number(s['excess'])} above the best possible order."
    )
    blocks.append(_side(_figures((plots.risk_plot(s["table"]), "Error rate of the rows that are kept.")), _text(words)))
    return blocks


def _temporal(r: Row) -> list[Block]:
    t = r["temporal"]
    if not t:
        return []
    metric = NAMES[t["metric"]]
    return [
        _text(t["words"]),
        _figures(
            (
                plots.temporal_plot(t["rows"], metric, t["reference"]),
                f"{metric} of each window. Hollow: too few cases to judge.",
                True,
            )
        ),
    ]


def _drift(r: Row) -> list[Block]:
    d = r["drift"]
    if not d:
        return []
    rows = [
        _cells(
            row["level"],
            row["n"],
            f"{number(row['psi'])} ({row['band']})",
            number(row["psi_expected"]),
            number(row["ks"]),
            p_value(row["p_adjusted"]),
            row["note"],
            flagged=bool(row["note"]),
        )
        for row in d["rows"]
    ]
    return [
        _text(
            "Each site's scores against all other sites', without looking at labels. A difference may only mean "
            "another mix of "
            "patients; it says where to look, not that the model is worse. PSI from 0.1 is to be watched, from "
            "0.25 acted on."
        ),
        _table(["site", "n", "PSI", "PSI expected by chance", "KS distance", "p (adjusted)", ""], rows, d["caption"]),
        _figures((plots.site_scores_plot(d["scores"]), "Spread of the score at each site.", True)),
    ]


def _comparison(r: Row) -> list[Block]:
    c = r["comparison"]
    if not c:
        return []
    rows = [
        _cells(
            NAMES[name],
            number(one["model"]),
            number(one["reference"]),
            with_interval(one["difference"]),
            p_value(one["difference"]["p"]),
        )
        for name, one in c["metrics"].items()
    ]
    blocks = [
        _table(["metric", "model", "reference", "model - reference (interval)", "p"], rows, c["words"]),
        _text(
            f"For comparison, with rows taken as independent: DeLong {with_interval(c['delong'])}, p "
            f"{p_value(c['delong']['p'])}; "
            f"McNemar at the operating points: {c['mcnemar']['only_a']} rows right by the model alone, "
            f"{c['mcnemar']['only_b']} by the reference alone, "
            f"p {p_value(c['mcnemar']['p'])}."
        ),
    ]
    if c["non_inferiority"]:
        blocks.append(_text(c["non_inferiority"]["words"]))
    return blocks


def _readers(r: Row) -> list[Block]:
    found = r["readers"]
    if not found:
        return []
    blocks = [_text(found["words"])]
    rows = [
        _cells(
            row["scope"],
            row["name"],
            row["arm"],
            row["metric"],
            f"{row['correct']} of {row['n']}",
            with_interval(row),
            row["note"],
        )
        for row in found["table"]
    ]
    if found["points"]:
        blocks.append(
            _figures(
                (
                    plots.readers_plot(found["points"], r["discrimination"]["roc"]),
                    "Readers (unassisted) beside the model.",
                )
            )
        )
    if found["model"]:
        against = [
            _cells(
                row["reader"],
                row["metric"].replace("_", " "),
                number(row["reader_point"]),
                number(row["model_point"]),
                with_interval({**row, "point": row["difference"]}),
                p_value(row["p"]),
                p_value(row["p_holm"]),
                row["note"],
            )
            for row in found["model"]
        ]
        blocks.append(
            _table(
                ["reader", "metric", "reader", "model", "model - reader (interval)", "p", "p (Holm)", ""],
                against,
                "The model beside every reader, on the cases that reader read.",
            )
        )
    if found["mrmc"]:
        helped = [
            _cells(
                row["name"],
                row["metric"].replace("_", " "),
                number(row["unassisted"]),
                number(row["assisted"]),
                with_interval(
                    {"point": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}
                ),
                p_value(row["p"]),
                row["note"],
            )
            for row in found["mrmc"]
        ]
        blocks.append(
            _table(
                ["readers", "metric", "alone", "with help", "change (interval)", "p", ""],
                helped,
                "Readers with help against the same readers without; readers and patients are both resampled.",
            )
        )
    blocks.append(_table(["", "name", "arm", "metric", "right", "share (Wilson interval)", ""], rows, "Every reader."))
    return blocks


def _wrong(r: Row, pictures: Mapping[int, str]) -> list[Block]:
    rows = r["confidently_wrong"]
    if not rows:
        return []
    cases = [
        {
            "row": row["row"],
            "uri": pictures.get(row["row"], ""),
            "lines": [
                f"row {row['row']}, score {row['score']:.4f}",
                f"true: {row['label']}",
                *([f"patient {row['cluster']}"] if r["data"]["cluster_column"] else []),
                *([f"site {row['site']}"] if row["site"] is not None else []),
                *([row["image"]] if row["image"] else []),
            ],
        }
        for row in rows
    ]
    text = "Rows that the model is surest of and that are wrong, most extreme first. Look at them: labels can be wrong."
    return [_text(text), {"kind": "cases", "cases": cases}]


def _record(report: Report) -> Block:
    p = report.provenance
    settings = {name: value for name, value in p["settings"].items() if value not in (None, [], False)}
    rows = [
        _cells("schema", report.schema),
        _cells("eosin", p["eosin"]),
        _cells("python", p["python"]),
        _cells("packages", ", ".join(f"{name} {version}" for name, version in p["packages"].items())),
        *(_cells("input", f"{one['name']}, {one['bytes']} bytes, sha256 {one['sha256']}") for one in p["inputs"]),
        _cells("settings", ", ".join(f"{name} {value}" for name, value in settings.items())),
        _cells("seed", p["seed"]),
    ]
    return _table(["", ""], rows, words=True)
