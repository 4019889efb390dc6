"""The page of a run: a function of its folder alone (`run.json`, `metrics.jsonl`, pictures), in one file."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eosin.errors import StoreCorruptError
from eosin.pretrain.watch import read_log
from eosin.version import __version__

RUN, SHEET, PICTURES = "run.json", "views.png", "pictures"
SHOWN_PICTURES = 3
INK, SOFT, LINE = "#1f2430", "#667085", "#d0d5dd"
COLOURS = ("#33658a", "#b3541e", "#4f7f5a", "#8f3f71", "#b8892b", "#5a5a8f", "#7a8a94", "#3f8f8a")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "eosin",
}
MONITORS = (
    ("cosine", "mean cosine of different images", "near 1: collapsed"),
    ("feature_std", "spread of the features", "about 1: fills the sphere; 0: collapsed"),
    ("rankme", "dimensions in use (RankMe)", "of one batch"),
    ("information", "information of the targets", "0: every image gets the same"),
    ("teacher_entropy", "entropy of the mean target / log K", "1: all prototypes alike"),
    ("prototypes", "prototypes used in one batch", "largest of some image"),
)

Row = Mapping[str, Any]


def read_run(out: Path) -> dict[str, Any]:
    """Return the record of a run, or raise `StoreCorruptError`."""
    try:
        return json.loads((out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreCorruptError(
            f"{out / RUN} cannot be read ({error}); it is written whole, so it was changed"
        ) from error


def as_json(record: Row) -> bytes:
    """Return a record as JSON."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def page(out: Path) -> str:
    """Return the page of the run in a folder as HTML."""
    run, rows = read_run(out), read_log(out)
    steps, probes = [row for row in rows if "loss" in row], [row for row in rows if "probe" in row]
    values = {
        "title": "eosin: pretrain",
        "lead": _lead(run),
        "failed": run["status"].removeprefix("failed: ") if run["status"].startswith("failed") else "",
        "remarks": run["remarks"],
        "headline": _headline(run, steps, probes),
        "sections": [section for section in _sections(out, run, steps, probes) if section["figures"]],
        "tables": [("Data", _rows(run["data"])), ("Machine", _rows(_machine(run)))],
        "config": json.dumps(run["config"], indent=1, ensure_ascii=False),
        "footer": f"Made by eosin {__version__}. A falling loss is no evidence of useful features; the probe is, "
        "on the images it was given.",
    }
    environment = Environment(loader=PackageLoader("eosin.pretrain"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("pretrain.html.j2").render(values)


def _lead(run: Row) -> str:
    model, of = run["config"]["model"], run["config"]["objective"]
    budget, trained = run["budget"], run.get("trained", run["parameters"])
    methods = {"dino": "DINO", "simclr": "SimCLR", "distil": f"Distilled from {run['config']['run'].get('teacher')}"}
    adapted = f", of which {trained / 1e6:.2g} M in adapters train" if trained < run["parameters"] else ""
    return (
        f"{methods[of['method']]}, ViT of width {model['dim']} and depth {model['depth']}, patch {model['patch_px']}, "
        f"{run['parameters'] / 1e6:.1f} M parameters{adapted}. {run['step']} of {budget['steps']} optimiser steps of "
        f"{budget['images_per_step']} images; {run['status'].split(':')[0]}."
    )


def _headline(run: Row, steps: Sequence[Row], probes: Sequence[Row]) -> list[Row]:
    cards: list[Row] = [{"name": "images seen", "value": f"{run['step'] * run['budget']['images_per_step']:,}"}]
    if steps:
        speed, wait = _median(steps, "images_per_s"), _median(steps, "wait")
        cards.append({"name": f"images/s, median, on {run['gpu'] or run['device']}", "value": f"{speed:,.1f}"})
        cards.append({"name": "of the time waiting for tiles, median", "value": f"{100 * wait:.0f} %"})
        cards.append({"name": "loss, last", "value": f"{steps[-1]['loss']:.3f}"})
    for name, words in (("knn", "nearest neighbours"), ("linear", "linear probe")):
        if probes:
            first, last = probes[0]["probe"][name], probes[-1]["probe"][name]
            what = (
                f"balanced accuracy, {words}, 95 % CI {last['low']:.3f} to {last['high']:.3f}; n {last['n']}, "
                f"{last['clusters']} patients; at step {probes[0]['step']} {first['point']:.3f}"
            )
            cards.append({"name": what, "value": f"{last['point']:.3f}"})
    return cards


def _median(rows: Sequence[Row], name: str) -> float:
    return float(np.median([row[name] for row in rows]))


def _sections(out: Path, run: Row, steps: Sequence[Row], probes: Sequence[Row]) -> list[Row]:
    pictures = sorted((out / PICTURES).glob("pca-*.png"))
    picked = sorted({0, len(pictures) // 2, len(pictures) - 1})[:SHOWN_PICTURES] if pictures else []
    shown = [(pictures[at], f"step {int(pictures[at].stem.rpartition('-')[2])}") for at in picked]
    sheet = [(out / SHEET, "tiles with their crops, and the views the student gets")] if (out / SHEET).is_file() else []
    batch = run["config"]["run"]["batch"]
    return [
        {"title": "Held-out images", "figures": [_probe_plot(probes)] if probes else [], "note": _PROBE_NOTE},
        {"title": "Loss", "figures": _loss_plots(steps), "note": _LOSS_NOTE},
        {"title": "Does it collapse?", "figures": _monitor_plots(steps), "note": f"Over one batch of {batch} tiles."},
        {"title": "Gradients and schedules", "figures": _step_plots(steps), "note": ""},
        {"title": "Speed", "figures": _speed_plots(steps), "note": ""},
        {
            "title": "What patches are alike",
            "figures": [_png(path, words) for path, words in shown],
            "note": "First three principal components of the teacher's patches as red, green and blue; within one "
            "picture, one colour means one thing.",
        },
        {"title": "Views", "figures": [_png(path, words) for path, words in sheet], "note": ""},
    ]


_PROBE_NOTE = (
    "Balanced accuracy out of fold, whole patients left out; bands resample patients. The dashed line is chance, the "
    "first point the untrained encoder."
)
_LOSS_NOTE = (
    "Unweighted parts. With K prototypes the cross-entropies begin near log K; they need not fall while features "
    "improve, as the teacher sharpens."
)


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.9, 2.7))
    axes = figure.subplots(gridspec_kw={"left": 0.17, "right": 0.97, "top": 0.9, "bottom": 0.18})
    axes.set_title(title)
    axes.set_xlabel("optimiser step")
    axes.grid(visible=True, axis="y", color=LINE, lw=0.5)
    return figure, axes


def _curve(title: str, steps: Sequence[Row], series: Mapping[str, Sequence[float]], caption: str = "") -> Row:
    """Draw named series over the logged steps."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(title)
        at = [row["step"] for row in steps]
        for index, (name, values) in enumerate(series.items()):
            marker = "o" if len(at) == 1 else None
            axes.plot(at, values, color=COLOURS[index % len(COLOURS)], label=name, marker=marker, ms=3)
        if len(series) > 1:
            axes.legend(ncols=2 if len(series) > 3 else 1)
        return {"uri": _svg(figure), "caption": caption, "alt": title}


def _nested(steps: Sequence[Row], part: str) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in steps for name in row[part])
    return {name: [row[part].get(name, math.nan) for row in steps] for name in names}


def _loss_plots(steps: Sequence[Row]) -> list[Row]:
    if not steps:
        return []
    total = _curve("total", steps, {"total": [row["loss"] for row in steps]})
    return [total, *(_curve(name, steps, {name: values}) for name, values in _nested(steps, "parts").items())]


def _monitor_plots(steps: Sequence[Row]) -> list[Row]:
    found = _nested(steps, "monitors") if steps else {}
    return [_curve(title, steps, {name: found[name]}, note) for name, title, note in MONITORS if name in found]


def _step_plots(steps: Sequence[Row]) -> list[Row]:
    if not steps:
        return []
    schedule = _nested(steps, "schedule")
    plots = [_curve("norm of the gradient, before clipping", steps, _nested(steps, "grad_norm"))]
    plots.append(_curve("learning rate", steps, {name: schedule[name] for name in ("lr", "last_layer_lr")}))
    words = {"weight_decay": "weight decay", "momentum": "momentum of the teacher", "temperature": "its temperature"}
    return [*plots, *(_curve(title, steps, {name: schedule[name]}) for name, title in words.items())]


def _speed_plots(steps: Sequence[Row]) -> list[Row]:
    if not steps:
        return []
    waits = {"wait": [100 * row["wait"] for row in steps]}
    return [
        _curve("images/s", steps, {"images/s": [row["images_per_s"] for row in steps]}),
        _curve("TFLOP/s of products, all ranks", steps, {"TFLOP/s": [row["tflops"] for row in steps]}),
        _curve("time waiting for tiles, %", steps, waits, "the device had nothing to do"),
    ]


def _probe_plot(probes: Sequence[Row]) -> Row:
    with mpl.rc_context(STYLE):
        figure, axes = _axes("balanced accuracy on held-out images")
        at = [row["step"] for row in probes]
        axes.axhline(probes[0]["probe"]["chance"], color=SOFT, lw=1, ls="--")
        for colour, (name, words) in zip(
            COLOURS, (("knn", "nearest neighbours"), ("linear", "linear probe")), strict=False
        ):
            found = [row["probe"][name] for row in probes]
            low, high = ([np.nan if one[end] is None else one[end] for one in found] for end in ("low", "high"))
            axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(at, [one["point"] for one in found], color=colour, label=words, marker="o", ms=3)
        axes.legend()
        return {"uri": _svg(figure), "caption": "", "alt": "probe"}


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return _uri(file.getvalue(), "image/svg+xml")


def _png(path: Path, caption: str) -> Row:
    return {"uri": _uri(path.read_bytes(), "image/png"), "caption": caption, "alt": caption, "wide": True}


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _rows(record: Row) -> list[tuple[str, str]]:
    return [(name, _words(value)) for name, value in record.items()]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_words(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _machine(run: Row) -> dict[str, Any]:
    found = {"device": run["gpu"] or run["device"], "ranks": run["ranks"], **run["machine"], **run["versions"]}
    return {**found, "seconds of the last process": run["seconds"], "it began at step": run["resumed_from"]}
