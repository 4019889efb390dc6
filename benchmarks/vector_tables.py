"""Write the tables of docs/vector-search.md from results/vector_search*.json.

    python benchmarks/vector_tables.py            (writes them again)
    python benchmarks/vector_tables.py --check    (exit 1 where they differ)

One file a size. The growth table fits a power of the number of points to Qdrant Edge's figures at all sizes and gives
its value at ten million: a projection, marked as one. Qdrant Edge is shown as eosin asks it, the others at their best.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from marked import fill
from vector_search import GOOD, chosen

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "vector-search.md"
FAR = 10_000_000
OURS = 256
"""The `ef` that eosin searches Qdrant Edge with."""


def main() -> None:
    """Write the page, or compare it."""
    results = sorted(
        (json.loads(file.read_text(encoding="utf-8")) for file in (HERE / "results").glob("vector_search*.json")),
        key=lambda result: -result["n"],
    )
    largest = results[0]
    parts = [engines(largest), selections(largest), growth(results)]
    commands = "\n".join(f"{one['command']}" for one in results)
    machine = (
        f"{largest['machine']['processor']}, {largest['threads']} cores, commit {largest['machine']['commit'][:12]}"
    )
    body = "\n\n".join([*parts, f"{machine}:\n\n```text\n{commands}\n```"])
    fill(PAGE, "measured", f"\n{body}\n\n", check="--check" in sys.argv)


def engines(result: dict[str, Any]) -> str:
    """Return a line an engine: the fastest setting that is good at every selection, or else the best there is."""
    lines = [
        f"**{result['n']:,} vectors of {result['dim']} numbers**, one query at a time. Qdrant Edge as eosin asks it; "
        f"every other engine at its fastest setting with recall of {GOOD} or more at every selection, or else at its "
        "best recall. The peak is resident memory while building, mapped files included:",
        "",
        "| engine | setting | build, min | peak memory, MiB | disk, MiB | worst recall@10 | p50 / p95 / p99, ms "
        "| worst p95, ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, engine in result["engines"].items():
        if "failed" in engine["build"] or "failed" in engine["search"]:
            lines.append(f"| {name} | failed | | | | | | |")
            continue
        setting, runs = picked(name, engine)
        plain = _at(runs, "everything")
        build, worst = engine["build"], min(run["recall"] for run in runs)
        cells = [
            name + ("" if worst >= GOOD else " (not good)"),
            setting,
            f"{sum(build['seconds'].values()) / 60:.1f}",
            "-" if build["peak_mib"] is None else f"{build['peak_mib']:,.0f}",
            f"{build['disk_mib']:,.0f}",
            f"{worst:.3f}",
            " / ".join(f"{plain[f'p{q}_ms']:.1f}" for q in (50, 95, 99)),
            f"{max(run['p95_ms'] for run in runs):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def selections(result: dict[str, Any]) -> str:
    """Return recall and p95 at every selection, a column an engine."""
    shown = {
        name: picked(name, engine)[1] for name, engine in result["engines"].items() if "failed" not in engine["search"]
    }
    lines = [
        "The same settings, recall@10 and p95 in ms by what the filter leaves:",
        "",
        "| selection | " + " | ".join(shown) + " |",
        "|---|" + "---:|" * len(shown),
    ]
    for name in [run["selection"] for run in next(iter(shown.values()))]:
        cells = [f"{one['recall']:.3f}, {one['p95_ms']:.1f}" for one in (_at(runs, name) for runs in shown.values())]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picked(name: str, engine: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """Return the setting that an engine is shown at, and its runs."""
    runs = engine["search"]["runs"]
    return (f"ef {OURS}", [run for run in runs if run["ef"] == OURS]) if name == "edge" else chosen(runs)


def growth(results: list[dict[str, Any]]) -> str:
    """Return Qdrant Edge's figures by size, and a power of the size fitted to them at ten million."""
    sizes, rows, told = [], [], []
    for result in sorted(results, key=lambda one: one["n"]):
        edge = result["engines"]["edge"]
        runs, build = picked("edge", edge)[1], edge["build"]
        sizes.append(result["n"])
        rows.append([sum(build["seconds"].values()), build["peak_mib"], build["disk_mib"]])
        rows[-1].append(_at(runs, "everything")["p95_ms"])
        told.append(f"{max(run['p95_ms'] for run in runs):.1f} | {min(run['recall'] for run in runs):.3f}")
    slopes, levels = np.polyfit(np.log(sizes), np.log(np.array(rows)), 1)
    far = np.exp(levels + slopes * np.log(FAR))
    lines = [
        f"Qdrant Edge by size at ef {OURS}. Ten million is projected by a power of the size, fitted to those above:",
        "",
        "| vectors | build, min | peak memory, MiB | disk, MiB | p95, ms | worst p95, ms | worst recall@10 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *(_grown(f"{size:,}", row, words) for size, row, words in zip(sizes, rows, told, strict=True)),
        _grown(f"{FAR:,} (projected)", far, "- | -"),
        "| exponent | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " | | |",
    ]
    return "\n".join(lines)


def _grown(name: str, row: Any, words: str) -> str:
    build, memory, disk, p95 = (float(value) for value in row)
    return f"| {name} | {build / 60:.1f} | {memory:,.0f} | {disk:,.0f} | {p95:.1f} | {words} |"


def _at(runs: list[dict[str, Any]], selection: str) -> dict[str, Any]:
    return next(run for run in runs if run["selection"] == selection)


if __name__ == "__main__":
    main()
