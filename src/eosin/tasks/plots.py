"""The figures of a validation report, each drawn from the report's own numbers, as SVG that prints sharply.

A figure is a function of plain values (what `Report.sections` holds), so a page can be drawn again from its JSON.
Colours are muted and chosen to be told apart by colour-blind readers; text stays text.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from eosin.tasks.pictures import data_uri

INK, SOFT, LINE, ACCENT = "#1f2430", "#667085", "#d0d5dd", "#8f3f71"
POSITIVE, NEGATIVE, BLUE = "#b3541e", "#5b7a99", "#33658a"
SITES = ("#33658a", "#b3541e", "#4f7f5a", "#8f3f71", "#b8892b", "#5a5a8f", "#7a8a94", "#3f8f8a")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "eosin",
}
SMALL_MULTIPLES = 12

Row = Mapping[str, Any]


def svg(figure: Figure) -> str:
    """Return a figure as an SVG data URI, the same bytes for the same figure."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return data_uri(file.getvalue(), "image/svg+xml")


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _unit_square(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=x, ylabel=y)
    axes.set_aspect("equal")


def _column(rows: Sequence[Row], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=np.float64)


def roc_plot(curves: Sequence[Row], point: Row, label: str) -> str:
    """Draw ROC curves: the pooled one strong, sites faint, the operating point as a dot.

    Args:
        curves: mappings of name, fpr, tpr; the first is the pooled one.
        point: sensitivity and specificity at the operating point.
        label: of the pooled curve, such as its AUROC with interval.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes(3.9, 3.9)
        axes.plot([0, 1], [0, 1], color=LINE, lw=1, ls="--")
        for index, curve in enumerate(curves[1:]):
            axes.plot(
                curve["fpr"], curve["tpr"], color=SITES[index % len(SITES)], lw=0.9, alpha=0.65, label=curve["name"]
            )
        axes.plot(curves[0]["fpr"], curves[0]["tpr"], color=INK, label=label)
        axes.plot(1 - point["specificity"], point["sensitivity"], "o", color=ACCENT, ms=6, label="operating point")
        _unit_square(axes, "1 - specificity", "sensitivity")
        axes.legend(loc="lower right", fontsize=7.5 if len(curves) <= SMALL_MULTIPLES else 5.5)
        return svg(figure)


def pr_plot(curve: Row, prevalence: float, label: str) -> str:
    """Draw precision against recall beside the prevalence, which is what a score that says nothing reaches."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(3.9, 3.9)
        axes.axhline(prevalence, color=SOFT, lw=1, ls="--", label=f"prevalence {prevalence:.3f}")
        axes.plot(curve["recall"], curve["precision"], color=INK, label=label)
        _unit_square(axes, "recall (sensitivity)", "precision (PPV)")
        axes.legend(loc="lower left")
        return svg(figure)


def reliability_plot(panels: Sequence[Row]) -> str:
    """Draw one reliability diagram a panel: mappings of name, n, ece, rows of a reliability table."""
    shown = panels[:SMALL_MULTIPLES]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.55 * across, 2.75 * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        for index, (axes, panel) in enumerate(zip(grid, shown, strict=False)):
            score, seen = _column(panel["rows"], "score"), _column(panel["rows"], "frequency")
            reach = np.abs(
                np.stack([_column(panel["rows"], "frequency_low"), _column(panel["rows"], "frequency_high")]) - seen
            )
            color = INK if index == 0 else SITES[(index - 1) % len(SITES)]
            axes.plot([0, 1], [0, 1], color=LINE, lw=1, ls="--")
            axes.errorbar(score, seen, yerr=reach, fmt="none", ecolor=color, alpha=0.45, lw=1)
            share = np.sqrt(_column(panel["rows"], "n") / panel["n"])
            axes.scatter(score, seen, s=8 + 70 * share, color=color, alpha=0.85, linewidths=0)
            axes.set_title(f"{panel['name']}  (n {panel['n']})")
            ece = "ECE -" if panel["ece"] is None else f"ECE {panel['ece']:.3f}"
            axes.text(0.03, 0.96, ece, transform=axes.transAxes, va="top", fontsize=8.5, color=INK)
            _unit_square(
                axes, "predicted" if index >= len(shown) - across else "", "observed" if index % across == 0 else ""
            )
        return svg(figure)


def decision_plot(rows: Sequence[Row], threshold: float) -> str:
    """Draw net benefit with its interval against treating all and nobody."""
    t, benefit, all_ = (_column(rows, name) for name in ("threshold", "net_benefit", "treat_all"))
    with mpl.rc_context(STYLE):
        figure, axes = _axes(5.2, 3.3)
        axes.axhline(0, color=SOFT, lw=1, label="act on nobody")
        axes.plot(t, all_, color=SOFT, lw=1, ls="--", label="act on all")
        axes.fill_between(t, _column(rows, "low"), _column(rows, "high"), color=BLUE, alpha=0.18, lw=0)
        axes.plot(t, benefit, color=BLUE, label="model")
        axes.axvline(threshold, color=ACCENT, lw=1, ls=":", label="operating point")
        top = max(float(np.nanmax(benefit)), 0.01)
        axes.set(xlim=(0, 1), ylim=(-0.25 * top, 1.15 * max(top, float(all_[0]))))
        axes.set(xlabel="threshold probability", ylabel="net benefit")
        axes.legend(loc="upper right")
        return svg(figure)


def forest_plot(rows: Sequence[Row], pooled: Row, name: str) -> str:
    """Draw one interval a row (label, n, point, low, high, flag, heading) around the pooled one.

    Flagged rows are hollow and grey. A row with a true ``heading`` is only a line of text.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes(8.2, 0.75 + 0.235 * (len(rows) + 1))
        low, high, point = pooled["low"], pooled["high"], pooled["point"]
        if low is not None and high is not None:
            axes.axvspan(low, high, color=ACCENT, alpha=0.10, lw=0)
        axes.axvline(point, color=ACCENT, lw=1, ls=":")
        labels = []
        for at, row in enumerate(rows):
            labels.append(row["label"] if row.get("heading") else f"{row['label']}  (n {row['n']})")
            if row.get("heading") or row["point"] is None:
                continue
            color = SOFT if row["flag"] else INK
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [at, at], color=color, lw=1.3)
            axes.plot(row["point"], at, "s", ms=5, color=color, mfc="white" if row["flag"] else color)
        axes.set_yticks(range(len(rows)), labels)
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(SOFT if not row.get("heading") and row["flag"] else INK)
            tick.set_fontweight("bold" if row.get("heading") else "normal")
        axes.set(xlabel=name)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=LINE, lw=0.5)
        return svg(figure)


def confusion_plot(table: Row, positive: str) -> str:
    """Draw the confusion table, shaded by the share of each true class."""
    counts = np.array([[table["tn"], table["fp"]], [table["fn"], table["tp"]]], dtype=np.float64)
    share = counts / counts.sum(axis=1, keepdims=True)
    with mpl.rc_context(STYLE):
        figure, axes = _axes(3.3, 3.0)
        axes.imshow(share, cmap=LinearSegmentedColormap.from_list("shade", ["#ffffff", "#7d97b3"]), vmin=0, vmax=1)
        for i in range(2):
            for j in range(2):
                axes.text(j, i - 0.06, f"{int(counts[i, j])}", ha="center", va="center", fontsize=13, color=INK)
                axes.text(
                    j, i + 0.22, f"{100 * share[i, j]:.1f} % of row", ha="center", va="center", fontsize=7.5, color=INK
                )
        names = [f"not {positive}", positive]
        axes.set_xticks([0, 1], names)
        axes.set_yticks([0, 1], names, rotation=90, va="center")
        axes.set(xlabel="called", ylabel="true")
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        return svg(figure)


def risk_plot(rows: Sequence[Row]) -> str:
    """Draw the error rate among the rows kept when the least sure ones are declined."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(4.4, 3.0)
        kept = _column(rows, "coverage")
        axes.fill_between(kept, _column(rows, "low"), _column(rows, "high"), color=BLUE, alpha=0.18, lw=0)
        axes.plot(kept, _column(rows, "risk"), color=BLUE)
        axes.set(
            xlim=(0, 1), ylim=(0, None), xlabel="share of rows kept, surest first", ylabel="error rate of the kept"
        )
        return svg(figure)


def temporal_plot(rows: Sequence[Row], name: str, reference: float | None) -> str:
    """Draw a metric per time window with intervals (label, point, low, high, n, flag)."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(8.4, 3.0)
        at = np.arange(len(rows))
        point, low, high = (_column(rows, column) for column in ("point", "low", "high"))
        if reference is not None:
            axes.axhline(reference, color=ACCENT, lw=1, ls=":", label="reference")
            axes.legend(loc="lower left")
        axes.plot(at, point, color=LINE, lw=1, zorder=1)
        for index, row in enumerate(rows):
            color = SOFT if row["flag"] else INK
            axes.plot([index, index], [low[index], high[index]], color=color, lw=1.3)
            axes.plot(index, point[index], "o", ms=5, color=color, mfc="white" if row["flag"] else color)
        axes.set_xticks(at, [f"{row['label']}\nn {row['n']}" for row in rows], fontsize=7)
        axes.set(ylabel=name)
        axes.grid(axis="y", color=LINE, lw=0.5)
        return svg(figure)


def histogram_plot(histogram: Row, threshold: float, positive: str) -> str:
    """Draw how the scores of both classes are distributed (edges, positive, negative counts)."""
    edges = np.asarray(histogram["edges"], dtype=np.float64)
    with mpl.rc_context(STYLE):
        figure, axes = _axes(4.4, 3.0)
        for counts, color, name in (
            (histogram["negative"], NEGATIVE, f"not {positive}"),
            (histogram["positive"], POSITIVE, positive),
        ):
            density = np.asarray(counts, dtype=np.float64) / max(1, sum(counts))
            axes.stairs(density, edges, color=color, fill=True, alpha=0.35)
            axes.stairs(density, edges, color=color, lw=1.2, label=f"{name} (n {sum(counts)})")
        axes.axvline(threshold, color=ACCENT, lw=1, ls=":", label="operating point")
        axes.set(xlim=(edges[0], edges[-1]), xlabel="score", ylabel="share of the class")
        axes.legend(loc="upper center")
        return svg(figure)


def site_scores_plot(rows: Sequence[Row]) -> str:
    """Draw the score's deciles (9,) at each site: the median, bars over 20-80 % and 10-90 %."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(7.6, 0.7 + 0.26 * len(rows))
        for at, row in enumerate(rows):
            d = row["deciles"]
            color = SITES[at % len(SITES)]
            axes.plot([d[0], d[8]], [at, at], color=color, lw=2, alpha=0.4)
            axes.plot([d[1], d[7]], [at, at], color=color, lw=6, alpha=0.55, solid_capstyle="butt")
            axes.plot(d[4], at, "|", ms=11, mew=2, color=INK)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set(xlim=(0, 1), xlabel="score: median, 20-80 % (thick) and 10-90 % (thin)")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=LINE, lw=0.5)
        return svg(figure)


def readers_plot(readers: Sequence[Row], curve: Row) -> str:
    """Draw readers (name, sensitivity, specificity) over the model's ROC curve."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(3.9, 3.9)
        axes.plot([0, 1], [0, 1], color=LINE, lw=1, ls="--")
        axes.plot(curve["fpr"], curve["tpr"], color=INK, label="model")
        for index, row in enumerate(readers):
            color = SITES[index % len(SITES)]
            axes.plot(1 - row["specificity"], row["sensitivity"], "D", ms=5, color=color, label=row["name"])
        _unit_square(axes, "1 - specificity", "sensitivity")
        axes.legend(loc="lower right", fontsize=7.5)
        return svg(figure)
