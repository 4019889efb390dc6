"""The page of a fine-tuning run, a function of its report and its sheet; and the learning curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from eosin.evaluation.report import Report
from eosin.version import __version__

Row = Mapping[str, Any]

INK, SOFT, LINE, ACCENT = "#1f2430", "#667085", "#d0d5dd", "#8f3f71"
COLORS = ("#33658a", "#b3541e", "#4f7f5a", "#8f3f71", "#b8892b", "#5a5a8f", "#7a8a94", "#3f8f8a")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "eosin",
}
NAMES = {
    "auroc": "AUROC",
    "auprc": "average precision",
    "brier": "Brier score",
    "ba": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}
COLUMNS = ("auroc", "ba", "sensitivity", "specificity", "brier")
SCOPES = {"pooled": "all cells", "domain_mean": "mean of domains", "worst_domain": "worst domain"}
PANELS = 8


def page(report: Report, *, sheet: bytes, first: Sequence[Row] = ()) -> str:
    """Return the page as HTML, self-contained.

    Args:
        report: of `run.finetune`.
        sheet: PNG of `sheet.draw_sheet`.
        first: blocks that come before the others, each a title and its parts.
    """
    r = report.sections
    blocks = [
        *first,
        {"title": "Out of fold", "parts": _part(r["out_of_fold"], _within_words(r))},
        {"title": "External", "parts": _part(r["external"], _external_words(r)) if r["external"] else []},
        {
            "title": "Cells to look at",
            "parts": [_figure(_png(sheet), "The surest, the wrong and the borderline cells.")],
        },
        {"title": "Test-time augmentation", "parts": [_tta(r)]},
        {"title": "Training", "parts": _training(r)},
        {"title": "Data", "parts": _data(r)},
        {"title": "Methods", "parts": [{"kind": "text", "text": text} for text in methods(r)]},
        {"title": "Record", "parts": [_record(report)]},
    ]
    environment = Environment(loader=PackageLoader("eosin.finetune"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("finetune.html.j2").render(
        title=f"eosin: {r['run']['recipe']['recipe']}",
        heading="How well are atypical mitotic figures told?",
        lead=f"{_encoders(r['run'])}: {r['run']['trained']:,} of "
        f"{r['run']['parameters']:,} numbers trained; {r['data']['own']['n']} cells of {r['data']['own']['slides']} "
        f"slides, {r['data']['own']['atypical']} atypical, {len(r['folds'])} folds.",
        remarks=[remark.to_dict() for remark in report.remarks],
        not_done=dict(report.not_done),
        headline=_headline(r),
        blocks=[block for block in blocks if block["parts"]],
        footer=f"Made by eosin {__version__}. For research only: not for clinical use. Intervals resample slides and "
        "keep the trained models; they do not cover bias in how cells were chosen or labelled.",
    )


def _encoders(run: Row) -> str:
    """Return what was trained, and how: the encoder, and the expert where there is one."""
    said = f"{run['encoder']}, {run['recipe']['adapt']['mode']}"
    expert = run["recipe"].get("expert")
    return said if expert is None else f"{said}, mixed by a gate with {run['expert']}, {expert['mode']}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number as text, a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(row: Row | None) -> str:
    """Return "0.812 (0.780 to 0.840)"; without an interval the number alone."""
    if row is None or row["point"] is None:
        return "-"
    if row["low"] is None:
        return number(row["point"])
    return f"{number(row['point'])} ({number(row['low'])} to {number(row['high'])})"


def find(section: Row, metric: str, scope: str) -> Row | None:
    """Return the row of a metric and scope ("pooled", "domain_mean", "worst_domain"), None where there is none."""
    rows = [*section["scores"], *section["calls"]]
    return next((row for row in rows if row["metric"] == metric and row["scope"] == scope), None)


def _headline(r: Row) -> list[dict[str, str]]:
    found = []
    for section, words in ((r["external"], "external, once"), (r["out_of_fold"], "out of fold")):
        if not section:
            continue
        for metric in ("ba", "auroc"):
            row = find(section, metric, "pooled")
            interval = with_interval(row).partition(" ")[2].strip("()")
            found.append(
                {
                    "name": NAMES[metric],
                    "value": number(row["point"] if row else None),
                    "interval": f"95 % CI {interval}" if interval else "no interval",
                    "what": f"{words}; {section['n']} cells",
                }
            )
    return found


def _part(section: Row, words: str) -> list[dict[str, Any]]:
    """Return the table by domain, calibration by scanner and its picture, and what the uncertainty is worth."""
    rows = []
    for scope, name in SCOPES.items():
        rows.append(_scope_row(section, scope, name))
    domains = [row for row in section["calls"] if row["scope"] == "domain" and row["metric"] == "ba"]
    if len(domains) > 1:
        rows[1:1] = [_domain_row(section, row) for row in domains]
    else:
        rows = rows[:1]
    columns = ["", "cells", "atypical", "slides", *(NAMES[name] for name in COLUMNS), ""]
    sure = section["uncertainty"]
    said = (
        f"Of the {100 * sure['sure_share']:.0f} % of cells furthest from the threshold "
        f"{100 * sure['wrong_sure']:.1f} % are called wrong, "
        f"of the rest {number(None if sure['wrong_rest'] is None else 100 * sure['wrong_rest'], 1)} %."
    )
    return [
        {"kind": "text", "text": words},
        {"kind": "table", "columns": columns, "rows": rows, "caption": "With 95 % intervals over slides."},
        _calibration(section),
        _figure(draw_reliability(section["reliability"]), "Predicted probability against the share that is atypical."),
        {"kind": "text", "text": said},
    ]


def _scope_row(section: Row, scope: str, name: str) -> dict[str, Any]:
    found = {metric: find(section, metric, scope) for metric in COLUMNS}
    ba = found["ba"]
    label = f"{name}: {ba['level']}" if scope == "worst_domain" and ba else name
    size = [ba["n"], ba["positives"], ba["clusters"]] if ba and scope != "domain_mean" else ["", "", ""]
    return {
        "cells": [label, *size, *(with_interval(found[metric]) for metric in COLUMNS), (ba or {}).get("flag") or ""]
    }


def _domain_row(section: Row, row: Row) -> dict[str, Any]:
    rows = [*section["scores"], *section["calls"]]
    mine = {one["metric"]: one for one in rows if one["scope"] == "domain" and one["level"] == row["level"]}
    numbers = [with_interval(mine.get(metric)) for metric in COLUMNS]
    return {"cells": [row["level"], row["n"], row["positives"], row["clusters"], *numbers, row["flag"] or ""]}


def _calibration(section: Row) -> dict[str, Any]:
    rows = []
    for row in section["calibration"]:
        ends = [
            with_interval({"point": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]})
            for name in ("ece", "slope", "intercept")
        ]
        facts = [row["level"], row["n"], number(row["mean_score"]), number(row["frequency"])]
        rows.append({"cells": [*facts, ends[0], number(row["ece_floor"]), *ends[1:], row["flag"] or ""]})
    columns = ["scanner", "cells", "mean P", "atypical", "ECE", "ECE by chance", "slope", "intercept", ""]
    caption = "Calibration by scanner: slope 1 and intercept 0 are perfect; ECE of 15 bins, beside what chance gives."
    return {"kind": "table", "columns": columns, "rows": rows, "caption": caption}


def _within_words(r: Row) -> str:
    left_out = r["run"]["recipe"]["leave_out"]
    how = f"each {left_out} left out once" if left_out else "folds of whole slides"
    return (
        f"Each cell predicted by the one model that saw nothing of its slide ({how}); its temperature, shift and "
        "threshold come from the other folds."
    )


def _external_words(r: Row) -> str:
    told = r["threshold"]
    return (
        f"{r['run']['external']}: predicted once by all folds together, at the threshold {told['threshold']:.3f} and "
        f"the temperature {told['temperature']:.3f} and shift {told['shift']:.3f} that {told['n']} out-of-fold "
        "predictions gave. These cells chose nothing."
    )


def _tta(r: Row) -> dict[str, Any]:
    rows = []
    for name, section in ((r["run"]["recipe"]["tta"], r["out_of_fold"]), ("none", r["without_tta"])):
        cells = [with_interval(find(section, metric, scope)) for metric, scope in _TTA_COLUMNS]
        rows.append({"cells": [name, *cells]})
    columns = ["views", "balanced accuracy", "mean of domains", "AUROC"]
    return {"kind": "table", "columns": columns, "rows": rows, "caption": "The same models, out of fold."}


_TTA_COLUMNS = (("ba", "pooled"), ("ba", "domain_mean"), ("auroc", "pooled"))


def _training(r: Row) -> list[dict[str, Any]]:
    rows = []
    for fold in r["folds"]:
        best = fold["history"][fold["best_epoch"] - 1]
        facts = [fold["name"], fold["train"], fold["stop"], fold["test"], f"{fold['best_epoch']} of {fold['epochs']}"]
        rows.append({"cells": [*facts, number(best["auroc"]), number(best["ba"]), fold["note"]]})
    columns = ["fold", "trained on", "stopped on", "tested on", "best epoch", "AUROC, stopping", "BA at 0.5", ""]
    caption = "Cells of each part; stopping cells chose the epoch and nothing else."
    return [
        _figure(draw_curves(r["folds"], "svg"), "Learning curves, one line a fold; a dot is the epoch that was kept."),
        {"kind": "table", "columns": columns, "rows": rows, "caption": caption},
    ]


def _data(r: Row) -> list[dict[str, Any]]:
    rows = []
    for part in ("own", "external"):
        for one in r["data"][part]["domains"] if r["data"][part] else []:
            cells = [one["domain"], part, one["cells"], one["atypical"], one["groups"], one["note"]]
            rows.append({"cells": cells})
    columns = ["domain", "part", "cells", "atypical", "slides", ""]
    notes = [{"kind": "text", "text": note} for note in r["data"]["notes"]]
    return [{"kind": "table", "columns": columns, "rows": rows, "caption": ""}, *notes]


def methods(r: Row) -> list[str]:
    """Return how the numbers were made, in sentences."""
    c = r["run"]["recipe"]
    folds = f"one {c['leave_out']} left out at a time" if c["leave_out"] else f"{c['folds']} folds, stratified by class"
    families = ", ".join(c["augment"]["families"]) if c["augment"] else "none"
    loss = "cross-entropy" if c["loss"]["gamma"] == 0 else f"focal loss, gamma {c['loss']['gamma']:g}"
    return [
        f"Slides (or patients) are never cut: {folds}; {100 * c['stop_share']:.0f} % of the training cells, whole "
        "slides, decide when to stop.",
        f"{loss}, domain weights {c['domain_weights']}, sampling {c['sampling']}, augmentation: {families}. AdamW, "
        f"peak learning rate {c['lr']:g}, weight decay {c['weight_decay']:g}, warm-up {100 * c['warmup']:.0f} % and a "
        f"cosine over {c['epochs']} epochs of batches of {c['batch']}; moving average {c['ema']:g}; patience "
        f"{c['patience']}; seed {c['seed']}.",
        "The recipe follows what could be read of the winner of MIDOG 2025 task 2 (Balezo et al., arXiv 2508.21041). "
        "Its domain weights, gamma and augmentation could not be read: those are choices of eosin.",
        "Every score is P(atypical). Intervals: 95 % percentile bootstrap over slides.",
    ]


def _record(report: Report) -> dict[str, Any]:
    r = report.sections["run"]
    rows = [
        ("encoder", r["encoder"]),
        ("weights", r["weights_hash"]),
        ("licence of the weights", r["licence"]),
        *((words, r[name]) for name, words in _EXPERT.items() if name in r),
        ("precision", r["precision"]),
        ("what a fold trained", f"{r['trained_bytes'] / 1e6:.2f} MB"),
        ("eosin", report.provenance["eosin"]),
        ("python", report.provenance["python"]),
    ]
    return {"kind": "table", "columns": ["", ""], "rows": [{"cells": list(row)} for row in rows], "caption": ""}


_EXPERT = {"expert": "expert", "expert_weights_hash": "its weights", "expert_licence": "licence of its weights"}


def _figure(uri: str | bytes, caption: str) -> dict[str, Any]:
    address = uri if isinstance(uri, str) else "data:image/svg+xml;base64," + base64.b64encode(uri).decode()
    return {"kind": "figure", "uri": address, "caption": caption}


def _png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def draw_curves(folds: Sequence[Row], kind: Literal["svg", "png"]) -> bytes:
    """Return the learning curves: training loss, and loss, AUROC and balanced accuracy on the stopping part.

    Args:
        folds: mappings of name, best_epoch and history.
        kind: of file.
    """
    panels = (("loss", "training loss"), ("stop_loss", "loss, stopping part"), ("auroc", "AUROC"), ("ba", "BA at 0.5"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 2.7), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for at, fold in enumerate(folds):
                color = COLORS[at % len(COLORS)]
                values = [row[name] for row in fold["history"]]
                axes.plot(range(1, len(values) + 1), values, color=color, lw=1.3, label=fold["name"])
                axes.plot(fold["best_epoch"], values[fold["best_epoch"] - 1], "o", color=color, ms=4)
            axes.set(title=title, xlabel="epoch")
            if name in ("auroc", "ba"):
                axes.axhline(0.5, color=LINE, lw=1, ls="--")
        figure.axes[0].legend(loc="best")
        return _saved(figure, kind)


def draw_reliability(panels: Sequence[Row]) -> bytes:
    """Return reliability diagrams as SVG: all cells, then each scanner."""
    shown = panels[:PANELS]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(shown), 2.8), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            axes.plot([0, 1], [0, 1], color=LINE, lw=1, ls="--")
            x = [row["score"] for row in panel["rows"]]
            y = [row["frequency"] for row in panel["rows"]]
            low = [row["frequency"] - row["frequency_low"] for row in panel["rows"]]
            high = [row["frequency_high"] - row["frequency"] for row in panel["rows"]]
            axes.errorbar(x, y, yerr=[low, high], fmt="o", color=INK, ecolor=SOFT, ms=4, lw=1)
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title=f"{panel['name']} (n {panel['n']})")
            axes.set(xlabel="P(atypical)", ylabel="share atypical")
            axes.set_aspect("equal")
        return _saved(figure, "svg")


def _saved(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    file = io.BytesIO()
    about = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(file, format=kind, dpi=150, metadata=about)
    return file.getvalue()
