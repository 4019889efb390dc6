"""The figures of a probe's page, drawn from its report's own numbers, in the manner of the validation page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from eosin.tasks.plots import ACCENT, INK, LINE, SITES, SOFT, STYLE, svg

Row = Mapping[str, Any]


def intervals_plot(groups: Sequence[tuple[str, Sequence[Row]]], name: str, *, chance: float) -> str:
    """Draw intervals (label, point, low, high, control) in named groups around the value of guessing.

    Controls are hollow and grey; a row without a point is left out.
    """
    shown = [(title, [row for row in rows if row["point"] is not None]) for title, rows in groups]
    shown = [(title, rows) for title, rows in shown if rows]
    lines = sum(len(rows) + 1 for _, rows in shown)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 0.7 + 0.25 * lines), layout="constrained")
        axes = figure.subplots()
        axes.axvline(chance, color=ACCENT, lw=1, ls=":")
        labels, at = [], 0
        for title, rows in shown:
            labels.append((title, True))
            at += 1
            for row in rows:
                color = SOFT if row["control"] else INK
                if row["low"] is not None:
                    axes.plot([row["low"], row["high"]], [at, at], color=color, lw=1.3)
                axes.plot(row["point"], at, "s", ms=5, color=color, mfc="white" if row["control"] else color)
                labels.append((row["label"], False))
                at += 1
        axes.set_yticks(range(len(labels)), [label for label, _ in labels])
        for tick, (_, heading) in zip(axes.get_yticklabels(), labels, strict=True):
            tick.set_color(INK)
            tick.set_fontweight("bold" if heading else "normal")
        axes.set(xlabel=name)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=LINE, lw=0.5)
        return svg(figure)


def curves_plot(curves: Sequence[Row], name: str) -> str:
    """Draw a metric against the number of training patients, one line an encoder (name, rows), band = range."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0.5, color=SOFT, lw=1, ls="--")
        for index, curve in enumerate(curves):
            color = SITES[index % len(SITES)]
            x = [row["groups"] for row in curve["rows"]]
            low, high = ([row[end] for row in curve["rows"]] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=color, alpha=0.13, lw=0)
            axes.plot(x, [row["mean"] for row in curve["rows"]], "o-", ms=4, color=color, label=curve["name"])
        ticks = [row["groups"] for row in curves[0]["rows"]]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{row['groups']:g}\n{100 * row['fraction']:g} %" for row in curves[0]["rows"]])
        axes.minorticks_off()
        axes.set(xlabel="training patients, and their share", ylabel=name)
        axes.legend(loc="upper left", fontsize=7.5)
        return svg(figure)


def leakage_plot(rows: Sequence[Row], chance: float) -> str:
    """Draw how well the site is told against how well the label is told (name, skill, site, control)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0.5, color=SOFT, lw=1, ls="--")
        axes.axhline(chance, color=SOFT, lw=1, ls="--")
        for index, row in enumerate(rows):
            color = SITES[index % len(SITES)]
            for ends, horizontal in ((row["skill"], True), (row["site"], False)):
                if ends["low"] is None:
                    continue
                other = (row["site"] if horizontal else row["skill"])["point"]
                span = [ends["low"], ends["high"]]
                axes.plot(span if horizontal else [other] * 2, [other] * 2 if horizontal else span, color=color, lw=1)
            fill = "white" if row["control"] else color
            axes.plot(row["skill"]["point"], row["site"]["point"], "o", ms=7, color=color, mfc=fill, label=row["name"])
        axes.set(xlabel="label: AUROC", ylabel="site: balanced accuracy", ylim=(0, 1.05))
        axes.set_xlim(min(0.45, *(row["skill"]["low"] or row["skill"]["point"] for row in rows)), None)
        axes.legend(loc="lower right", fontsize=7.5)
        return svg(figure)
