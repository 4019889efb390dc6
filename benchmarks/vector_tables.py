"""Write the tables of docs/vector-search.md from results/vector_search*.json.

    python benchmarks/vector_tables.py            (writes them again)
    python benchmarks/vector_tables.py --check    (exit 1 where they differ)

One file a size. The growth table fits a power of the number of points to Qdrant Edge's figures at all sizes and gives
its value at ten million: a projection, marked as one.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vector_search import GOOD, chosen

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "vector-search.md"
MARKER = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.S)
FAR = 10_000_000


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
    before = PAGE.read_text(encoding="utf-8")
    after = MARKER.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", before)
    if "--check" in sys.argv:
        raise SystemExit(int(before != after))
    PAGE.write_text(after, encoding="utf-8")


def engines(result: dict[str, Any]) -> str:
    """Return a line an engine: the fastest setting that is good at every selection, or else the best there is."""
    lines = [
        f"**{result['n']:,} vectors of {result['dim']} numbers**, one query at a time, each engine at its fastest "
        f"setting with recall of {GOOD} or more at every selection, or else at its best recall:",
        "",
        "| engine | setting | build, min | peak memory, MiB | disk, MiB | worst recall@10 | p50 / p95 / p99, ms "
        "| worst p95, ms |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, engine in result["engines"].items():
        if "failed" in engine["build"] or "failed" in engine["search"]:
            lines.append(f"| {name} | failed | | | | | | |")
            continue
        setting, runs = chosen(engine["search"]["runs"])
        plain = _at(runs, "everything")
        build, worst = engine["build"], min(run["recall"] for run in runs)
        cells = [
            name + ("" if worst >= GOOD else " (not good)"),
            setting,
            f"{sum(build['seconds'].values()) / 60:.1f}",
            f"{build['peak_mib']:,.0f}",
            f"{build['disk_mib']:,.0f}",
            f"{worst:.3f}",
            " / ".join(f"{plain[f'p{q}_ms']:.1f}" for q in (50, 95, 99)),
            f"{max(run['p95_ms'] for run in runs):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def selections(result: dict[str, Any]) -> str:
    """Return recall and p95 at every selection, a column an engine."""
    picked = {
        name: chosen(engine["search"]["runs"])[1]
        for name, engine in result["engines"].items()
        if "failed" not in engine["search"]
    }
    lines = [
        "The same settings, recall@10 and p95 in ms by what the filter leaves:",
        "",
        "| selection | " + " | ".join(picked) + " |",
        "|---|" + "---:|" * len(picked),
    ]
    for name in [run["selection"] for run in next(iter(picked.values()))]:
        cells = [f"{one['recall']:.3f}, {one['p95_ms']:.1f}" for one in (_at(runs, name) for runs in picked.values())]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def growth(results: list[dict[str, Any]]) -> str:
    """Return Qdrant Edge's figures by size at one setting, and a power of the size fitted to them at ten million."""
    setting, _ = chosen(results[0]["engines"]["edge"]["search"]["runs"])
    sizes, rows = [], []
    for result in sorted(results, key=lambda one: one["n"]):
        edge = result["engines"]["edge"]
        runs = [run for run in edge["search"]["runs"] if f"ef {run['ef']}" == setting]
        plain, build = _at(runs, "everything"), edge["build"]
        worst = max(run["p95_ms"] for run in runs)
        sizes.append(result["n"])
        rows.append([sum(build["seconds"].values()), build["peak_mib"], build["disk_mib"], plain["p95_ms"], worst])
        rows[-1].append(1 - min(run["recall"] for run in runs))
    values = np.array(rows)
    slopes, levels = np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-4)), 1)
    far = np.exp(levels + slopes * np.log(FAR))
    lines = [
        f"Qdrant Edge by size, {setting} (ten million: projected, a power of the size fitted to the lines above it):",
        "",
        "| vectors | build, min | peak memory, MiB | disk, MiB | p95, ms | worst p95, ms | worst recall@10 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *(_grown(f"{size:,}", row) for size, row in zip(sizes, rows, strict=True)),
        _grown(f"{FAR:,} (projected)", far),
        "| exponent | " + " | ".join(f"{slope:.2f}" for slope in slopes[:-1]) + " | |",
    ]
    return "\n".join(lines)


def _grown(name: str, row: Any) -> str:
    build, memory, disk, p95, worst, missed = (float(value) for value in row)
    return f"| {name} | {build / 60:.1f} | {memory:,.0f} | {disk:,.0f} | {p95:.1f} | {worst:.1f} | {1 - missed:.3f} |"


def _at(runs: list[dict[str, Any]], selection: str) -> dict[str, Any]:
    return next(run for run in runs if run["selection"] == selection)


if __name__ == "__main__":
    main()
