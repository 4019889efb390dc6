"""The page of a probe's report: a function of the report alone, one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from eosin.evaluation.report import Report
from eosin.tasks import probe_plots as plots
from eosin.tasks.validation_page import NAMES, number, p_value, with_interval
from eosin.version import __version__

Row = Mapping[str, Any]
Block = dict[str, Any]

METRICS = ("auroc", "ba", "sensitivity", "specificity")
PICTURE_PX = 224


def probe_page(report: Report, folder: Path) -> str:
    """Return the page as HTML.

    Args:
        report: of `eosin.tasks.probe.probe`.
        folder: what the picture files of the report are relative to.
    """
    r = report.sections
    builders = (
        ("All encoders", _overview),
        ("Against the reference", _differences),
        ("Other sites", _sites),
        ("Does it see the site?", _leakage),
        ("How many labelled patients?", _curves),
        ("Confidently wrong", lambda one: _wrong(one, folder)),
        ("Data", _data),
        ("What may leak", _leaks),
    )
    sections = [{"title": title, "blocks": blocks} for title, build in builders if (blocks := build(r))]
    if report.not_done:
        rows = [_cells(name, why) for name, why in report.not_done.items()]
        sections.append({"title": "Not done", "blocks": [_table(["part", "why"], rows, words=True)]})
    sections.append({"title": "Methods", "blocks": [_text(text) for text in methods(r)]})
    sections.append({"title": "Record", "blocks": [_record(report)]})
    data = r["data"]
    page = {
        "title": "eosin: probe",
        "heading": f"How well is {data['label']} told?",
        "lead": f"{data['head']} head on frozen features; positive is {data['positive']!r}. {data['train']['n']} rows "
        f"of {data['train']['clusters']} patients, {data['train']['positives']} positive"
        + (f"; external: {data['external']['n']} rows, {data['external']['name']}." if data["external"] else "."),
        "warnings": [one.message for one in report.remarks if one.severity == "warning"],
        "notes": [one.message for one in report.remarks if one.severity == "note"],
        "headline": _headline(r),
        "headline_note": _headline_note(r),
        "sections": sections,
        "footer": f"Made by eosin {__version__}. Intervals resample patients and keep fitted models; they do not "
        "cover bias in how cases were chosen or labelled.",
    }
    environment = Environment(loader=PackageLoader("eosin.tasks"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("validation.html.j2").render(page)


def _cells(*cells: Any, flagged: bool = False) -> Block:
    return {"cells": ["" if cell is None else str(cell) for cell in cells], "flagged": flagged}


def _table(columns: Sequence[str], rows: Sequence[Block], caption: str = "", *, words: bool = False) -> Block:
    return {"kind": "table", "columns": list(columns), "rows": list(rows), "caption": caption, "words": words}


def _text(text: str) -> Block:
    return {"kind": "text", "text": text}


def _figure(uri: str, caption: str, *, wide: bool = False) -> Block:
    return {
        "kind": "figures",
        "figures": [{"uri": uri, "caption": caption, "alt": caption.split(".")[0], "wide": wide}],
    }


def _side(*blocks: Block) -> Block:
    return {"kind": "side", "blocks": list(blocks)}


def _control(name: str) -> bool:
    """Return whether an encoder is there to be beaten."""
    return name == "texture" or name.startswith("random:")


def _encoder(r: Row) -> Row:
    return next(one for one in r["encoders"] if one["name"] == r["best"])


def _headline(r: Row) -> list[Row]:
    best, data = _encoder(r), r["data"]
    found = [("AUROC", best["within"]["auroc"], f"{best['name']}, {data['layouts']} layouts of {data['folds']} folds")]
    found.append(("Balanced accuracy", best["within"]["ba"], "at thresholds chosen inside each training part"))
    if best["across_site"]:
        mean = best["across_site"]["domain_mean"]["auroc"]
        found.append(("AUROC, other sites", mean, f"mean of {len(best['across_site']['rows'])}, each left out once"))
    if best["external"]:
        external = data["external"]
        what = f"{external['n']} rows, {external['clusters']} patients, tested once"
        found.append(("AUROC, external", best["external"]["auroc"], what))
    if best["site_leakage"]:
        chance = best["site_leakage"]["chance_ba"]
        found.append(("Site told from features", best["site_leakage"]["ba"], f"balanced accuracy; chance {chance:.2f}"))
    return [
        {
            "name": name,
            "value": number(one["point"]),
            "ci": _ci(one),
            "what": what,
        }
        for name, one, what in found
    ]


def _ci(one: Row) -> str:
    if one["low"] is None:
        return "no interval"
    if one["low"] == one["high"] == 1:
        return f"no error; at least {1 - 3 / one['clusters']:.3f}"
    return f"95 % CI {number(one['low'])} to {number(one['high'])}"


def _headline_note(r: Row) -> str:
    if len(r["encoders"]) == 1:
        return f"Encoder: {r['best']}."
    outside = " The external rows chose nothing." if r["data"]["external"] else ""
    return (
        f"{r['best']} has the best AUROC within of {len(r['encoders'])} encoders; picked on these data, that number is "
        f"flattered a little.{outside}"
    )


def _site_told(found: Row, metric: str) -> str:
    """Return an accuracy of telling the site; without any error the bootstrap has nothing to resample."""
    one = found[metric]
    if one["point"] < 1:
        return with_interval(one)
    return f"1.000 (at least {1 - 3 / one['clusters']:.3f})"


def _overview(r: Row) -> list[Block]:
    """The one table, and the figure of all AUROCs."""
    columns = ["encoder", "test", "rows (patients)", *(NAMES[name] for name in METRICS)]
    rows, groups = [], []
    for kind, words in (("within", "within"), ("across_site", "other sites, mean"), ("external", "external")):
        forest = []
        for one in r["encoders"]:
            found = one[kind]["domain_mean"] if kind == "across_site" and one[kind] else one[kind]
            if not found:
                continue
            n, clusters = _size(one, kind, r)
            cells = (with_interval(found[name]) for name in METRICS)
            rows.append(_cells(one["name"], words, f"{n} ({clusters})", *cells, flagged=_control(one["name"])))
            forest.append({"label": one["name"], "control": _control(one["name"]), **_ends(found["auroc"])})
        groups.append((words, forest))
    forest = []
    for one in r["encoders"]:
        if not one["shuffled"]:
            continue
        found = one["shuffled"]
        cells = (with_interval(found[name]) for name in METRICS)
        n, clusters = _size(one, "within", r)
        rows.append(_cells(one["name"], "shuffled labels", f"{n} ({clusters})", *cells, flagged=True))
        forest.append({"label": one["name"], "control": True, **_ends(found["auroc"])})
    groups.append(("shuffled labels", forest))
    caption = "AUROC of every encoder. Hollow: there to be beaten (hand-made texture, random weights, shuffled labels)."
    note = "In italics: floors and controls. All but AUROC belong to the threshold that the training part chose."
    return [
        _figure(plots.intervals_plot(groups, "AUROC", chance=0.5), caption, wide=True),
        _table(columns, rows, note),
    ]


def _size(one: Row, kind: str, r: Row) -> tuple[int, int]:
    if kind == "across_site":
        sites = one["across_site"]["rows"]
        return sum(site["n"] for site in sites), sum(site["clusters"] for site in sites)
    found = one[kind]["auroc"]
    return found["n"], found["clusters"]


def _ends(found: Row) -> Row:
    return {end: found[end] for end in ("point", "low", "high")}


def _differences(r: Row) -> list[Block]:
    if not r["differences"]:
        return []
    rows = [
        _cells(one["encoder"], NAMES[one["metric"]], with_interval(one), p_value(one["p"]), p_value(one["p_holm"]))
        for one in r["differences"]
    ]
    reference = r["differences"][0]["reference"]
    caption = (
        f"Encoder less {reference}, out of fold, on the same resampled patients; p adjusted by Holm over encoders."
    )
    return [_table(["encoder", "metric", "difference (interval)", "p", "p, adjusted"], rows, caption)]


def _sites(r: Row) -> list[Block]:
    best = _encoder(r)
    inside, across = best["within_site"], best["across_site"]
    if not inside:
        return []
    rows = []
    beyond = {row["level"]: row for row in across["rows"]} if across else {}
    for row in inside["rows"]:
        other = beyond.get(row["level"], {}).get("metrics", {})
        cells = [with_interval(found.get(name)) for name in ("auroc", "ba") for found in (row["metrics"], other)]
        facts = (row["level"], row["n"], row["positives"], row["clusters"])
        rows.append(_cells(*facts, *cells, row["flag"], flagged=bool(row["flag"])))
    for scope, words in (("domain_mean", "mean of sites"), ("worst_domain", "worst site")):
        found = [one[scope] if one else {} for one in (inside, across)]
        cells = [with_interval(one.get(name)) for name in ("auroc", "ba") for one in found]
        rows.append(_cells(words, "", "", "", *cells, ""))
    columns = [
        r["data"]["site_column"],
        "n",
        "positive",
        "patients",
        "AUROC, seen sites",
        "AUROC, site left out",
        "BA, seen sites",
        "BA, site left out",
        "",
    ]
    caption = (
        f"{best['name']}. Seen: out of fold (first layout), the site's other patients trained too. Left out: trained "
        "on the other sites only, and so on fewer patients."
    )
    return [_table(columns, rows, caption)]


def _leakage(r: Row) -> list[Block]:
    known = [one for one in r["encoders"] if one["site_leakage"]]
    blocks: list[Block] = []
    if known:
        rows = []
        for one in known:
            found, robust = one["site_leakage"], one["robustness"]
            rows.append(
                _cells(
                    one["name"],
                    _site_told(found, "accuracy"),
                    with_interval(robust["ri"]) if robust else "",
                    number(robust["mari"]) if robust else "",
                    with_interval(robust["croma"]) if robust and robust["croma"] else "",
                    number(robust["drop"]["apd"]) if robust and robust["drop"] else "",
                    number(robust["biology"]) if robust else "",
                    flagged=_control(one["name"]),
                )
            )
        columns = ["encoder", "site told, accuracy", "RI", "MaRI", "CRoMa", "APD", "label by neighbours, BA"]
        chance = known[0]["site_leakage"]["chance_ba"]
        scatter = plots.leakage_plot(
            [
                {
                    "name": one["name"],
                    "skill": one["within"]["auroc"],
                    "site": one["site_leakage"]["ba"],
                    "control": _control(one["name"]),
                }
                for one in known
            ],
            chance,
        )
        words = _leakage_words(known)
        caption = "High up and to the left: features that carry the site rather than the label. Dashed: chance."
        blocks += [_side(_figure(scatter, caption), _text(words)), _table(columns, rows)]
        notes = [f"{one['name']}: {note}" for one in known if one["robustness"] for note in one["robustness"]["notes"]]
        blocks += [_text(note) for note in notes]
    return blocks


def _leakage_words(known: Sequence[Row]) -> str:
    perfect = [one["name"] for one in known if one["site_leakage"]["accuracy"]["point"] == 1]
    first = known[0]["site_leakage"]["accuracy"]
    bound = 1 - 3 / first["clusters"]
    none = (
        f" No error at all for {', '.join(perfect)}: the bootstrap has nothing to resample there; with "
        f"{first['clusters']} patients the rule of three says at least {bound:.3f}."
        if perfect
        else ""
    )
    return (
        "The same head, asked for the site instead of the label, on patients it has not seen. RI and MaRI: of "
        "neighbours that agree in label or in site but not in both, the share that agrees in label (above 0.5 the "
        "label wins). CRoMa: the same as a margin of distances (above 0 the label wins). APD: what a tie of label and "
        "site in the training set costs (0: nothing). An encoder that sees neither is robust and useless: read "
        "them beside the label by neighbours (0.5 is chance)." + none
    )


def _curves(r: Row) -> list[Block]:
    curves = [{"name": one["name"], **one["label_curve"]} for one in r["encoders"] if one["label_curve"]]
    if not curves:
        return []
    rows = [
        _cells(
            one["name"],
            *(f"{number(row['mean'], 2)} ({number(row['low'], 2)} to {number(row['high'], 2)})" for row in one["rows"]),
            number(one["ratio25"]["mean"]),
            flagged=_control(one["name"]),
        )
        for one in curves
    ]
    columns = [
        "encoder",
        *(f"{100 * row['fraction']:g} % ({row['groups']:g})" for row in curves[0]["rows"]),
        "25 %/all",
    ]
    where = "the external rows" if r["data"]["external"] else "the first fold"
    caption = (
        f"AUROC on {where} ({curves[0]['n_test']} rows): mean and range over five orders "
        f"of the patients (100 %: one); in brackets the number of patients."
    )
    return [_figure(plots.curves_plot(curves, "AUROC"), caption), _table(columns, rows)]


def _wrong(r: Row, folder: Path) -> list[Block]:
    cases = [
        {
            "row": row["row"],
            "uri": _picture(folder / row["image"]) if row["image"] else "",
            "lines": [
                f"score {row['score']:.3f}",
                f"true: {row['label']}",
                *([f"site {row['site']}"] if row["site"] is not None else []),
                *([Path(row["image"]).name] if row["image"] else []),
            ],
        }
        for row in r["confidently_wrong"]
    ]
    if not cases:
        return []
    where = "the external rows" if r["data"]["external"] else "rows out of fold"
    return [
        _text(f"{r['best']}, {where}: what it is surest of and wrong in, most extreme first. Labels can be wrong too."),
        {"kind": "cases", "cases": cases},
    ]


def _picture(path: Path) -> str:
    try:
        with Image.open(path) as image:
            rgba = image.convert("RGBA")
    except (UnidentifiedImageError, OSError):
        return ""
    small = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    small.thumbnail((PICTURE_PX, PICTURE_PX))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _data(r: Row) -> list[Block]:
    data = r["data"]
    parts = [("trained and tested in folds", data["train"])]
    if data["external"]:
        parts.append((f"external, {data['external']['name']}", data["external"]))
    parts += [(f"{data['site_column']}: {site['level']}", site) for site in data["by_site"]]
    rows = [
        _cells(name, part["n"], part["clusters"], part["positives"], f"{100 * part['positives'] / part['n']:.1f} %")
        for name, part in parts
    ]
    made = []
    for one in r["encoders"]:
        folds = one["threshold"]["folds"]
        span = f"{min(folds):.3f} to {max(folds):.3f}"
        layouts = one["within"]["auroc"]["layouts"]
        spread = f"{min(layouts):.3f} to {max(layouts):.3f}"
        told = (one["chosen"], number(one["threshold"]["final"]), span, "; ".join(one["notes"]))
        made.append(_cells(one["name"], one["dim"], spread, *told))
    return [
        _table(["rows", "n", "patients", "positive", "share"], rows),
        _table(
            ["encoder", "features", "AUROC of layouts", "head, all rows", "threshold", "thresholds of folds", ""], made
        ),
    ]


def _leaks(r: Row) -> list[Block]:
    rows = [_cells(one["severity"], one["message"]) for one in r["leakage"]["findings"]]
    text = f"Looked for before anything was trained: {', '.join(r['leakage']['checked'])}."
    return [_text(text), *([_table(["", "found"], rows, words=True)] if rows else [])]


def methods(r: Row) -> list[str]:
    """Return how the numbers were made, in words."""
    data = r["data"]
    texts = [
        f"Patients are dealt to {data['folds']} folds, stratified by label, in {data['layouts']} layouts. Inside each "
        "training part, up to three inner folds of its patients choose the head's settings (linear: C by log loss) "
        "and, from their out-of-fold scores, the threshold with the best balanced accuracy; the test fold chooses "
        "nothing.",
        "A number within is the mean over layouts of the number over all out-of-fold rows. Its interval resamples "
        "patients, stratified by whether they hold a positive, with predictions as they are: it holds for these fitted "
        "models and does not include how they would change with other training patients; the spread over layouts "
        "shows a part of that.",
        "Shuffled labels: the labels of the patients, laid end to end in another order of patients, with "
        "one layout of folds and all choices made anew. What is left above 0.5 is leakage or luck.",
    ]
    if data["by_site"]:
        texts.append(
            "Other sites: trained on all sites but one, threshold chosen there, tested on the one; the mean gives each "
            "site the same weight, and AUROC never mixes scores of two models."
        )
    if data["external"]:
        texts.append(
            "External rows are tested once, by a head fitted on all training rows, at the threshold that the first "
            "layout's out-of-fold scores recommend."
        )
    return texts


def _record(report: Report) -> Block:
    p = report.provenance
    rows = [_cells("schema", report.schema), _cells("eosin", p["eosin"]), _cells("seed", p["seed"])]
    rows += [_cells(one["name"], f"sha256 {one['sha256']}") for one in p["inputs"]]
    rows += [_cells(name, value) for name, value in p["settings"].items() if value not in (None, [], False)]
    for one in report.sections["encoders"]:
        known = (
            one["spec"].get("weights_hash")
            or one["spec"].get("sha256")
            or one["spec"].get("recipe_hash")
            or "no weights"
        )
        rows.append(_cells(one["name"], known))
    return _table(["", ""], rows, words=True)
