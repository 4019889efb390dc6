"""Write the tables of README.md and docs/benchmarks.md from benchmarks/results/*.json.

    python benchmarks/tables.py            # rewrite what stands between the markers
    python benchmarks/tables.py --check    # exit 1 and name the pages that differ

A page says where a table goes:

    <!-- table:NAME -->
    <!-- /table -->

NAME is a key of `TABLES`: the JSON files it is made of, and the function from their contents to Markdown. A new
benchmark adds one function and one line there.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pretrain_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "eosin-tiny")))
MARKER = re.compile(r"(?P<open><!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<close><!-- /table -->)", re.S)

Record = dict[str, Any]


class TableError(ValueError):
    """A marker that names no table, or a table whose results are not there."""


class Table(NamedTuple):
    """What a marker stands for.

    Attributes:
        files: results it is made of, without the suffix.
        write: from their contents to Markdown.
    """

    files: tuple[str, ...]
    write: Callable[..., str]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; the first column is text, the others are right-aligned."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def origin(record: Record, *more: str) -> str:
    """Return one line: command, processor, cores, commit."""
    machine = record.get("machine") or {}
    names = (machine.get(key) for key in ("cpu", "processor"))
    processor = next((name for name in names if name and name != "x86_64"), "x86-64")
    cores = machine.get("cpus") or machine.get("cores") or record.get("threads")
    commit = str(record.get("commit") or machine.get("commit") or "")[:7]
    parts = [f"`{record['command']}`", processor, f"{cores} cores" if cores else "", f"commit {commit}", *more]
    return ", ".join(part for part in parts if part) + "."


def span(values: Sequence[float], digits: int) -> str:
    """Return ``median (lowest-highest)``."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def part(summary: dict[str, float] | None, digits: int) -> str:
    """Return ``median (lowest-highest)`` of a summary that has these three."""
    if not summary:
        return "-"
    return f"{summary['median']:.{digits}f} ({summary['min']:.{digits}f}-{summary['max']:.{digits}f})"


def reading(record: Record) -> str:
    """Tiles per second of every way of reading."""
    rows = [
        (f"{name}", entry["grid"], entry["threads"], span(row["tiles_per_s"], 0), f"{row['ratio']:.2f}")
        for entry in record["rates"]
        for name, row in entry["methods"].items()
    ]
    table = markdown(("512 px at 0.25 mpp into 256 px at 0.5", "grid", "threads", "tiles/s", "ratio"), rows)
    loss = record["psnr_to_box_means"]
    words = "; ".join(f"{n} {v['median_db']:.1f} dB, worst {v['worst_db']:.1f}" for n, v in loss.items())
    note = f"Pixels against box means of the full decode: {words}. Median (lowest-highest) of the repeats."
    return f"{table}\n\n{note}\n\n{origin(record)}"


def tissue(record: Record) -> str:
    """Intersection over union per case and method."""
    methods = list(record["mean_iou"])
    rows = [(case["case"], *(f"{statistics.mean(case['iou'][m]):.3f}" for m in methods)) for case in record["cases"]]
    rows.append(("**mean**", *(f"**{record['mean_iou'][m]:.3f}**" for m in methods)))
    table = markdown(("drawn slide", *methods), rows)
    return f"{table}\n\nIntersection over union, mean of {len(record['seeds'])} seeds. {origin(record)}"


def stain(record: Record) -> str:
    """Seconds for 64 tiles, and the ratios to torchstain."""
    rows = [
        (name, span(values, 2), f"{record['tiles_per_second'][name]:.1f}") for name, values in record["seconds"].items()
    ]
    table = markdown(("64 tiles of 224 px", "seconds", "tiles/s"), rows)
    ratios = markdown(
        ("torchstain's seconds over eosin's", "ratio"), [(n, f"{v:.1f}") for n, v in record["ratio"].items()]
    )
    load = record.get("load_average")
    note = f"load average {load['before']:.1f} before" if load else "load not recorded"
    return f"{table}\n\n{ratios}\n\n{origin(record, note)}"


def encoder_backends(record: Record) -> str:
    """Tiles per second of each network, batch and backend."""
    rows = []
    for row in record["results"]:
        head = (f"{row['network']}, {row['setting']}", row["batch"])
        if "left_out" in row:
            rows.append((*head, "not here", "-", "-"))
            continue
        ratio, low = row.get("ratio_to_torch_fp32"), row.get("lowest_cosine_to_torch_fp32")
        rows.append((*head, span(row["tiles_per_s"], 1), ratio or "-", f"{low:.5f}" if low is not None else "-"))
    columns = ("network, backend", "batch", "tiles/s", "ratio to torch fp32", "lowest cosine to it")
    most = "; ".join(
        f"{name}: {one['gflop_per_tile']:.1f} GFLOP a tile, so at most {one['bf16_tiles_per_s']:.1f} tiles/s in bf16 "
        f"and {one['fp32_tiles_per_s']:.1f} in fp32 at the rate of a large matrix product"
        for name, one in record.get("bounds", {}).items()
    )
    return f"{markdown(columns, rows)}\n\nThe processor's bound: {most}. {origin(record, 'random weights')}"


def agreed(check: dict[str, float] | None) -> str:
    """Return plain and centred cosines as one cell."""
    if check is None:
        return "-"
    return f"{check['median']:.5f} / {check['p5']:.5f} [{check['centred_median']:.4f} / {check['centred_p5']:.4f}]"


def end_to_end(record: Record) -> str:
    """eosin and its peers on one slide."""
    rows, backends = [], [name for name in record["summary"] if name.startswith("eosin")]
    short = [name.removeprefix("eosin ").strip("()") for name in backends]
    for name, entry in record["summary"].items():
        if "error" in entry:
            rows.append((name, f"failed: {entry['error']}", *["-"] * (6 + len(backends))))
            continue
        check = record["agreement"].get(name, {})
        faster = entry.get("eosin_times_as_fast", {})
        rows.append(
            (
                f"{name} {entry['versions'].get(name.split(' ')[0], '')}".strip(),
                entry["tiles"],
                part(entry["embed_tiles_per_s"], 1),
                part(entry["wall_s"], 1),
                part(entry.get("share_of_ceiling"), 2),
                *(part(faster.get(ours, {}).get("embed"), 2) for ours in backends),
                f"{entry['peak_pss_mib']:.0f}",
                agreed(check.get("with_fp32_reference")),
            )
        )
    columns = ("tool", "tiles", "tiles/s embedding", "wall s", "share of encoder alone")
    columns += tuple(f"eosin {name} is faster by" for name in short) + ("peak PSS MiB", "cosine to fp32")
    alone = ", ".join(f"{name} {part(rate, 1)}" for name, rate in record["encoder_alone_images_per_s"].items())
    notes = (
        f"Encoder {record['settings']['encoder']}, batch {record['settings']['batch']}, {len(record['rounds'])} "
        f"rounds; encoder alone, tiles/s: {alone}. Medians (lowest-highest). Cosines: median / 5th percentile "
        "[minus the mean feature]."
    )
    return f"{markdown(columns, rows)}\n\n{notes}\n\n{origin(record)}"


def memory(record: Record) -> str:
    """Peak memory of two plans."""
    rows = [
        (
            name,
            f"{run['tiles']:,}",
            f"{run['peak_pss_mib']:.0f}",
            f"{run['peak_rss_mib']:.0f}",
            f"{run['sum_of_high_water_mib']:.0f}",
            f"{run['store_mib']:.0f}",
        )
        for name, run in record["runs"].items()
    ]
    rows += [
        (
            f"*large slide / {name}*",
            *(f"{ratio[key]:.2f}" for key in ("tiles", "peak_pss_mib", "peak_rss_mib", "sum_of_high_water_mib")),
            "",
        )
        for name, ratio in record["ratio_of_large_slide_to"].items()
    ]
    columns = ("plan", "tiles", "peak PSS MiB", "peak RSS MiB", "sum of high-water marks MiB", "store MiB")
    made = record["settings"]
    note = f"{made['tile_px']} px tiles, {made['dim']} features each, {made['workers']} reader(s)"
    return f"{markdown(columns, rows)}\n\nAll processes of `eosin extract` together, {note}. {origin(record)}"


def startup(record: Record) -> str:
    """Seconds of a whole process."""
    rows = [
        (f"`{name}`", f"{r['median']:.3f} ({r['min']:.3f}-{r['max']:.3f})", f"{r['ratio']:.1f}")
        for name, r in record["commands"].items()
    ]
    count = len(next(iter(record["commands"].values()))["seconds"])
    table = markdown(("process", "seconds", "ratio"), rows)
    return f"{table}\n\nMedian (lowest-highest) of {count}. {origin(record)}"


def scaled_decode(record: Record) -> str:
    """Features of tiles read with a scaled JPEG decode against a full one, and other filters as yardsticks."""
    ways = (
        record["scaled"],
        "one bilinear resize",
        "one box resize",
        "one bicubic resize",
        "one lanczos resize",
        "another tile",
    )
    rows = [
        (
            f"{entry['slide']} at {entry['mpp']:g} mpp, {entry['corners']} corners, {network}",
            entry["tiles"],
            *(_cosines(found[way]) for way in ways),
        )
        for entry in record["results"]
        for network, found in entry["features"].items()
    ]
    columns = ("slide, network", "tiles", *ways)
    note = (
        f"Against: {record['reference']}, which is what eosin's filter is by definition. Cosines: median / first "
        "percentile / lowest [median minus the mean feature]."
    )
    return f"{markdown(columns, rows)}\n\n{note}\n\n{origin(record)}"


def _cosines(row: dict[str, dict[str, float]]) -> str:
    plain = " / ".join(f"{row['cosine'][key]:.4f}" for key in ("median", "p1", "min"))
    return f"{plain} [{row['centred_cosine']['median']:.3f}]"


def results(read: Record, found: Record, whole: Record, begun: Record) -> str:
    """The short table of the README."""
    rows = []
    for entry in read["rates"]:
        if entry["threads"] == 2:
            ours, base = entry["methods"]["eosin Slide.read_tile"], entry["methods"]["OpenSlide, PIL resize"]
            what = f"tiles read a second, {entry['grid']} grid, two threads"
            rows.append((what, f"{ours['median']:.0f}", f"{base['median']:.0f} (plain OpenSlide loop)", _code(read)))
    other = found["mean_iou"]["otsu saturation"]
    mean = found["mean_iou"]["eosin"]
    rows.append(
        ("tissue found, mean IoU on drawn slides", f"{mean:.3f}", f"{other:.3f} (Otsu, saturation)", _code(found))
    )
    tools = {n: e for n, e in whole["summary"].items() if "error" not in e}
    rate = {name: entry["embed_tiles_per_s"]["median"] for name, entry in tools.items()}
    best = max((name for name in rate if name.startswith("eosin")), key=rate.__getitem__)
    for name in rate:
        if not name.startswith("eosin"):
            what = f"tiles embedded a second, {whole['settings']['encoder']} in bf16 on a CPU"
            rows.append((what, f"{rate[best]:.1f}", f"{rate[name]:.1f} ({name})", _code(whole)))
    told, base = begun["commands"]["eosin --help"], begun["commands"][begun["baseline"]]
    rows.append(
        ("`eosin --help`, seconds", f"{told['median']:.2f}", f"{base['median']:.2f} (Python alone)", _code(begun))
    )
    return markdown(("what", "eosin", "baseline in the same run", "made by"), rows)


def _code(record: Record) -> str:
    return "`" + " ".join(record["command"].split()[:2]) + "`"


def probe(record: Record) -> str:
    """Seconds and error of a path of logistic regressions."""
    rows = [
        [
            one["method"],
            span(one["seconds"], 2),
            f"{one['times_faster_than_baseline']:.2f}",
            f"{max(one['error']):.1e}",
        ]
        for one in record["methods"]
    ]
    size = f"{record['rows']:,} x {record['dim']} features, {len(record['grid'])} strengths"
    table = markdown([size, "seconds", "ratio", "largest error of a coefficient"], rows)
    return f"{table}\n\n{origin(record)}"


def bootstrap(record: Record) -> str:
    """Seconds of the cluster bootstrap."""
    rows = [
        [f"{run['rows']:,} rows, {run['patients']:,} patients: {name}", span(one["seconds"], 2), f"{one['ratio']:.0f}"]
        for run in record["runs"]
        for name, one in run["methods"].items()
    ]
    table = markdown([f"{record['resamples']:,} resamples", "seconds", "ratio"], rows)
    return f"{table}\n\nIn this run {record['note']}. {origin(record)}"


def knn(record: Record) -> str:
    """Queries a second of exact neighbour search."""
    share = record["share"]
    rows = [[name, share[name]["queries"], share[name]["queries_per_s"]] for name in ("eosin", "scikit-learn")]
    rows.append(["matrix products alone", record["products_only"]["queries"], record["products_only"]["queries_per_s"]])
    rows.append(["eosin, all queries", record["whole"]["queries"], record["whole"]["queries_per_s"]])
    table = markdown(["exact search", "queries", "queries/s"], rows)
    facts = (
        f"The same rows for {share['same_row']:.0%} of the neighbours, {share['ratio']:.1f} times as fast; "
        f"{record['memory_mb']['added_peak']} MB beside the {record['memory_mb']['base']} MB searched."
    )
    return f"{table}\n\n{facts} {origin(record)}"


def _pretrain(name: str) -> Callable[..., str]:
    return partial(getattr(pretrain_tables, name), markdown=markdown, origin=origin)


TABLES: dict[str, Table] = {
    "reading": Table(("reading",), reading),
    "tissue": Table(("tissue",), tissue),
    "stain": Table(("stain",), stain),
    "encoder-backends": Table(("encoder_backends",), encoder_backends),
    "end-to-end": Table(("end_to_end",), end_to_end),
    "end-to-end-dinov3": Table(("end_to_end_dinov3",), end_to_end),
    "memory": Table(("memory",), memory),
    "startup": Table(("startup",), startup),
    "scaled-decode": Table(("scaled_decode",), scaled_decode),
    "probe": Table(("probe",), probe),
    "bootstrap": Table(("bootstrap",), bootstrap),
    "knn": Table(("knn",), knn),
    "pretrain-throughput": Table(("pretrain_throughput",), _pretrain("throughput")),
    "views": Table(("views",), _pretrain("views")),
    "sampling": Table(("sampling",), _pretrain("sampling")),
    "tiny-skill": Table(("eosin_tiny/encoders",), _pretrain("skill")),
    "tiny-curve": Table(("eosin_tiny/encoders",), _pretrain("curve")),
    "tiny-compare": Table(("eosin_tiny/compare",), _pretrain("compare")),
    "tiny-centre": Table(("eosin_tiny/encoders",), _pretrain("centre")),
    "tiny-camelyon": Table(("eosin_tiny/camelyon16",), _pretrain("camelyon")),
    "tiny-ablations": Table(("eosin_tiny/ablations",), _pretrain("ablations")),
    "tiny-labels": Table(("eosin_tiny/labels",), _pretrain("labels")),
    "results": Table(("reading", "tissue", "end_to_end", "startup"), results),
}


def written(name: str, folder: Path = RESULTS) -> str:
    """Return the Markdown of one table.

    Raises:
        TableError: no such table, or its JSON is not in `folder`.
    """
    if name not in TABLES:
        raise TableError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    records = []
    for file in TABLES[name].files:
        path = folder / f"{file}.json"
        if not path.is_file():
            raise TableError(f"table {name!r} needs {path.name}, which is not in {folder.name}/")
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return TABLES[name].write(*records)


def filled(text: str, folder: Path = RESULTS) -> str:
    """Return a page with every table between its markers made anew."""
    opened = len(re.findall(r"<!-- table:", text))
    found = MARKER.findall(text)
    if opened != len(found) or opened != text.count("<!-- /table -->"):
        raise TableError(f"{opened} tables are opened and {text.count('<!-- /table -->')} closed")
    return MARKER.sub(lambda m: f"{m['open']}{written(m['name'], folder)}\n{m['close']}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page differs")
    given = parser.parse_args()
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = filled(text)
        if made != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not given.check:
                page.write_text(made, encoding="utf-8")
    print(("differ from benchmarks/results: " if given.check else "rewritten: ") + (", ".join(stale) or "none"))
    raise SystemExit(1 if given.check and stale else 0)


if __name__ == "__main__":
    main()
