"""The page of a search evaluation: a function of the report alone, but for example pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.image import imread

from eosin.evaluation.report import Report
from eosin.tasks.pictures import data_uri
from eosin.tasks.plots import BLUE, INK, LINE, POSITIVE, SOFT, STYLE, svg
from eosin.tasks.validation_page import number, with_interval
from eosin.version import __version__

Row = Mapping[str, Any]
Block = dict[str, Any]

LEFT_OUT = {
    "itself": "nothing but the tile itself",
    "patient": "the patient",
    "site": "the patient and the site",
}
SHARED = {"label": "label", "site": "site", "slide": "slide"}
NAMES = {
    "acc": "Acc@{k}: any right",
    "mmv": "mMV@{k}: majority right",
    "mmv_balanced": "mMV@{k}, mean over labels",
    "map": "mAP@{k}",
    "ndcg": "nDCG@{k}",
    "macro_f1": "macro-F1@{k} of the majority",
}


def evaluation_page(report: Report, pictures: Mapping[int, Path] | None = None) -> str:
    """Return the page as HTML, self-contained.

    Args:
        report: of `eosin.tasks.evaluate_search.evaluate_search`.
        pictures: id of a point -> its image file.
    """
    r = report.sections
    builders = (
        ("What neighbours share", _neighbours),
        ("Is the label found?", _measures),
        ("Label by label", _labels),
        ("Organ by organ", _organs),
        ("Cases", _cases),
        ("Examples", lambda one: _examples(one, pictures or {})),
        ("Data", _data),
    )
    sections = [{"title": title, "blocks": blocks} for title, build in builders if (blocks := build(r))]
    if report.not_done:
        rows = [_cells(name, why) for name, why in report.not_done.items()]
        sections.append({"title": "Not done", "blocks": [_table(["part", "why"], rows, words=True)]})
    sections.append({"title": "Methods", "blocks": [_text(text) for text in methods(r)]})
    sections.append({"title": "Record", "blocks": [_record(report)]})
    data = r["data"]
    page = {
        "title": "eosin: search evaluation",
        "heading": f"What does this search find, and what does it see? {data['spec']['encoder']}",
        "lead": f"{data['labelled']} labelled tiles of {data['slides']} slides and {data['patients']} patients; "
        f"{data['queries']} of them asked, each leaving its own patient out unless said otherwise. Label: "
        f"{data['fields']['label']}" + (f"; site: {data['fields']['site']}." if "site" in data["fields"] else "."),
        "warnings": [one.message for one in report.remarks if one.severity == "warning"],
        "notes": [one.message for one in report.remarks if one.severity == "note"],
        "headline": _headline(r),
        "headline_note": "A rate means nothing without the chance level beside it: what a blind search of the same "
        "candidates would find.",
        "sections": sections,
        "footer": f"Made by eosin {__version__}. Intervals resample the patients of the queries; the index stays as it "
        "is. Similar tiles and cases are evidence, not a diagnosis.",
    }
    environment = Environment(loader=PackageLoader("eosin.tasks"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("validation.html.j2").render(page)


def metric_name(name: str) -> str:
    """Return a measure in words, such as ``Acc@1: any right`` for ``acc@1``."""
    kind, _, k = name.partition("@")
    return NAMES[kind].format(k=k)


def methods(r: Row) -> list[str]:
    """Return how the numbers were made, in words."""
    k = r["data"]["k"]
    texts = [
        "Every query is looked up in the whole index under a filter that leaves out what it may not find; a hit is "
        "right when it carries the query's label. Tiles whose label no other patient has cannot be answered and are "
        "left out of the measures of labels.",
        "Acc@k: any of the first k hits is right. mMV@k: the label that most of them carry is right (a draw goes to "
        "the label of the better first hit; where fewer than k were found, at least half of k must agree). mAP@k: "
        "sum over right hits of the precision up to them, divided by k always. nDCG@k: gains 0 and 1 discounted by "
        "log2(rank + 1), over the best order possible. macro-F1: the majority as a prediction, mean over labels. "
        f"Other definitions are in use; compare numbers only with these in mind. Longest list: {k}.",
        "Chance of a share: the query's candidates counted, exactly. Chance of a measure: the mean of ten searches "
        "that draw hits at random. Share of the site that labels explain: each hit replaced by any candidate of its "
        "label, so that sites which hold more of a label are not taken for bias.",
        "Intervals: percentile bootstrap over the patients of the queries, stratified by label.",
    ]
    if r["cases"]:
        texts.append(
            "Cases: each slide asks with its mosaic; a patient is found once, by the best slide; the own patient is "
            "left out. Chance: slides in a random order."
        )
    return texts


def neighbours_plot(rows: Sequence[Row], k: int) -> str:
    """Draw shares (name, shared, point, low, high, chance) with their intervals; a bar marks chance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["shared"], []).append(row)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 0.8 + 0.3 * (len(rows) + len(groups))), layout="constrained")
        axes = figure.subplots()
        labels, at = [], 0
        for shared, inside in groups.items():
            labels.append((f"same {shared}", True))
            at += 1
            for row in inside:
                if row["low"] is not None:
                    axes.plot([row["low"], row["high"]], [at, at], color=INK, lw=1.4)
                axes.plot(row["point"], at, "s", ms=5.5, color=INK, zorder=3)
                axes.plot([row["chance"]] * 2, [at - 0.3, at + 0.3], color=POSITIVE, lw=2)
                if row["among"] is not None:
                    axes.plot([row["among"]] * 2, [at - 0.3, at + 0.3], color=BLUE, lw=2)
                labels.append((f"left out: {row['name']}", False))
                at += 1
        axes.set_yticks(range(len(labels)), [label for label, _ in labels])
        for tick, (_, heading) in zip(axes.get_yticklabels(), labels, strict=True):
            tick.set_color(INK)
            tick.set_fontweight("bold" if heading else "normal")
        axes.plot([], [], "s-", ms=5.5, color=INK, label="found")
        axes.plot([], [], color=POSITIVE, lw=2, label="by chance")
        if any(row["among"] is not None for row in rows):
            axes.plot([], [], color=BLUE, lw=2, label="explained by labels")
        axes.set(xlabel=f"share of the first {k} neighbours", xlim=(-0.02, 1.02))
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=LINE, lw=0.5)
        axes.legend(loc="lower right", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
        return svg(figure)


def examples_picture(examples: Sequence[Row], pictures: Mapping[int, Path]) -> bytes:
    """Draw each query with its hits in a row, as JPEG: a hit of the query's label framed blue, of another orange."""
    hits = max(len(one["hits"]) for one in examples)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.35 * (hits + 1), 1.62 * len(examples)), layout="constrained")
        grid = figure.subplots(len(examples), hits + 1, squeeze=False)
        for axes_row, one in zip(grid, examples, strict=True):
            for axes in axes_row:
                axes.set_axis_off()
            for place, (axes, point) in enumerate(zip(axes_row, [one["query"], *one["hits"]], strict=False)):
                query = place == 0
                right = point["label"] == one["query"]["label"]
                _draw(axes, pictures.get(point["id"]), color=SOFT if query else BLUE if right else POSITIVE)
                site = point.get("site")
                lines = ["query: " + point["label"] if query else point["label"]]
                lines += [] if site is None else [site + ("" if query or site != one["query"]["site"] else " (same)")]
                axes.set_title("\n".join(lines), fontsize=6.5, loc="center", fontweight="normal")
        file = io.BytesIO()
        figure.savefig(file, format="jpeg", dpi=110, pil_kwargs={"quality": 88})
    return file.getvalue()


def _draw(axes: Any, path: Path | None, *, color: str) -> None:
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set(visible=True, color=color, linewidth=2.6)
    if path is None or not path.is_file():
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=6.5, color=SOFT, transform=axes.transAxes)
        axes.set_aspect("equal")
        return
    pixels = np.asarray(imread(path))
    axes.imshow(pixels[:, :, :3] if pixels.ndim == 3 else pixels, interpolation="bilinear", cmap="gray")


def _cells(*cells: Any, flagged: bool = False) -> Block:
    return {"cells": ["" if cell is None else str(cell) for cell in cells], "flagged": flagged}


def _table(columns: Sequence[str], rows: Sequence[Block], caption: str = "", *, words: bool = False) -> Block:
    return {"kind": "table", "columns": list(columns), "rows": list(rows), "caption": caption, "words": words}


def _text(text: str) -> Block:
    return {"kind": "text", "text": text}


def _figure(uri: str, caption: str) -> Block:
    return {
        "kind": "figures",
        "figures": [{"uri": uri, "caption": caption, "alt": caption.split(".")[0], "wide": True}],
    }


def _headline(r: Row) -> list[Row]:
    k = str(r["data"]["k"])
    patient, itself = r["tiles"]["patient"], r["tiles"]["itself"]
    label = patient["neighbours"]["label"][k]
    found = [(f"Same label, first {k}", label["share"], f"chance {number(label['chance'])}")]
    vote = patient["measures"].get(f"mmv_balanced@{k}")
    if vote:
        found.append((f"mMV@{k}, mean over labels", vote, f"chance {number(vote['chance'])}"))
    site = patient["neighbours"].get("site", {}).get(k)
    if site:
        found.append((f"Same site, first {k}", site["share"], f"labels explain {number(site['chance_among_labels'])}"))
    slide = itself["neighbours"]["slide"][k]
    found.append(("Same slide, nothing left out", slide["share"], f"chance {number(slide['chance'])}"))
    if r["cases"]:
        name, case = next(iter(r["cases"].items()))
        first = next(iter(case["measures"]))
        one = case["measures"][first]
        found.append((f"Cases, {first.replace('acc', 'Acc')}", one, f"{name}; chance {number(one['chance'])}"))
    return [{"name": name, "value": number(one["point"]), "ci": _ci(one), "what": what} for name, one, what in found]


def _ci(one: Row) -> str:
    if one["low"] is None:
        return "no interval"
    return f"{100 * one['level']:g} % CI {number(one['low'])} to {number(one['high'])}"


def _neighbours(r: Row) -> list[Block]:
    drawn, rows, sites = [], [], "site" in r["data"]["fields"]
    longest = str(r["data"]["k"])
    for shared in SHARED:
        for exclusion, part in r["tiles"].items():
            if shared not in part["neighbours"]:
                continue
            for k, one in part["neighbours"][shared].items():
                among = one["chance_among_labels"]
                if k == longest:
                    ends = {end: one["share"][end] for end in ("point", "low", "high")}
                    facts = {"name": LEFT_OUT[exclusion], "shared": shared, "chance": one["chance"], "among": among}
                    drawn.append({**facts, **ends})
                lift = with_interval(one["lift"], 2)
                cells = (with_interval(one["share"]), number(one["chance"]), lift)
                if sites:
                    beyond = with_interval(one["lift_among_labels"], 2) if among is not None else ""
                    cells += ("" if among is None else number(among), beyond)
                rows.append(_cells(shared, LEFT_OUT[exclusion], k, *cells, flagged=bool(one["share"]["note"])))
    columns = ["same", "left out", "k", "share", "chance", "times chance"]
    columns += ["labels explain", "times that"] if sites else []
    caption = (
        f"Neighbours that share the query's label, site or slide among the first {longest}. Orange bar: a blind "
        "search. Blue bar: a search that finds the same labels and is blind to the site."
    )
    return [_figure(neighbours_plot(drawn, int(longest)), caption), _table(columns, rows)]


def _measures(r: Row) -> list[Block]:
    parts = r["tiles"]
    names = list(next(iter(parts.values()))["measures"])
    columns = ["measure"]
    for exclusion in parts:
        columns += [f"left out: {LEFT_OUT[exclusion]}", "chance"]
    rows = []
    for name in names:
        cells = [metric_name(name)]
        for part in parts.values():
            one = part["measures"][name]
            cells += [with_interval(one), number(one["chance"])]
        rows.append(_cells(*cells))
    counts = ["queries answered"]
    for part in parts.values():
        short = f"; {part['short']} found fewer than {r['data']['k']}" if part["short"] else ""
        counts += [f"{part['answerable']} of {part['queries']}{short}", ""]
    return [_table(columns, [*rows, _cells(*counts)], "Tiles.")]


def _labels(r: Row) -> list[Block]:
    patients = {row["value"]: row["patients"] for row in r["data"]["by"]["label"]}
    rows = []
    for row in r["tiles"]["patient"]["by_label"]:
        cells = [with_interval(one) for one in row["measures"].values()]
        few = any(one["note"] for one in row["measures"].values())
        rows.append(_cells(row["label"], row["n"], patients.get(row["label"]), *cells, flagged=few))
    names = list(r["tiles"]["patient"]["by_label"][0]["measures"])
    caption = "Tiles, the patient left out. In italics: few patients, so that the interval is too narrow."
    return [_table(["label", "queries", "patients", *(metric_name(name) for name in names)], rows, caption)]


def _organs(r: Row) -> list[Block]:
    found = [("tiles", row) for row in r["tiles"]["patient"]["by_organ"]]
    found += [(name, row) for name, part in r["cases"].items() for row in part["by_organ"]]
    rows = []
    for what, row in found:
        one = row["macro_f1"]
        cells = (with_interval(one), number(one["chance"])) if one else ("one label only", "")
        rows.append(_cells(row["organ"], what, row["n"], row["labels"], *cells))
    if not rows:
        return []
    rows.sort(key=lambda row: row["cells"][0])
    columns = ["organ", "search", "queries", "labels", f"macro-F1@{r['data']['k']}", "chance"]
    return [_table(columns, rows, "Majority of the hits as a prediction, among the labels of the organ.")]


def _cases(r: Row) -> list[Block]:
    if not r["cases"]:
        return []
    parts = r["cases"]
    first = next(iter(parts.values()))
    rows = []
    for name, one in first["measures"].items():
        cells = (with_interval(part["measures"][name]) for part in parts.values())
        rows.append(_cells(metric_name(name), *cells, number(one["chance"])))
    k = str(r["data"]["k"])
    if "site" in first["neighbours"]:
        sites = [part["neighbours"]["site"][k] for part in parts.values()]
        shares = (with_interval(site["share"]) for site in sites)
        rows.append(_cells(f"same site, first {k}", *shares, number(sites[0]["chance"])))
    rows.append(
        _cells("slides answered", *(f"{part['answerable']} of {part['queries']}" for part in parts.values()), "")
    )
    caption = "Slides as queries, the patient left out. The vote sees the labels of the index; the others do not."
    return [_table(["measure", *parts, "chance"], rows, caption)]


def _examples(r: Row, pictures: Mapping[int, Path]) -> list[Block]:
    if not r["examples"] or not pictures:
        return []
    caption = (
        "Queries drawn at random, not chosen, with their neighbours of other patients, nearest first. Blue: the "
        "query's label; orange: another."
    )
    return [_figure(data_uri(examples_picture(r["examples"], pictures), "image/jpeg"), caption)]


def _data(r: Row) -> list[Block]:
    rows = []
    for name, values in r["data"]["by"].items():
        rows += [_cells(f"{r['data']['fields'][name]}: {row['value']}", row["n"], row["patients"]) for row in values]
    return [_table(["tiles", "n", "patients"], rows)]


def _record(report: Report) -> Block:
    p, data = report.provenance, report.sections["data"]
    rows = [_cells("schema", report.schema), _cells("eosin", p["eosin"]), _cells("seed", p["seed"])]
    rows += [_cells(one["name"], f"sha256 {one['sha256']}") for one in p["inputs"]]
    rows += [_cells(name, value) for name, value in data["spec"].items() if value is not None]
    rows += [_cells(name, value) for name, value in p["settings"].items() if value not in (None, [], False)]
    return _table(["", ""], rows, words=True)
