"""Which part of the `amf` recipe helps? One part changed at a time, three seeds, intervals over slides.

    python benchmarks/finetune_ablation.py IMAGES --out RUNS [--only "NAME;NAME"]
    python benchmarks/finetune_ablation.py --table      (writes the tables of docs/finetune.md again, from the results)
    python benchmarks/finetune_ablation.py --check      (exit 1 where they differ)

IMAGES holds labels.csv and pictures; cells of atnorm-br are external. What is done is left, so that several processes
can share the work by --only. The seed lays the folds out anew: a line is the mean over layouts and its range over
them; the interval is of the first seed. A change that does not help stays in the table. Test-time views are compared
on the same trained models. Two controls must fail: random weights of the encoder, and permuted labels of the training
cells (out of fold they are judged on the permuted labels, outside on the true ones).

The recipe is `amf` with the settings of `BASE`, which two cores can train for every line: a small encoder, few epochs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from end_to_end import commit, machine
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.augment import FAMILIES
from eosin.finetune.cells import CellTable
from eosin.finetune.losses import LossConfig
from eosin.finetune.page import find, with_interval
from eosin.finetune.recipe import FinetuneConfig, get_recipe
from eosin.finetune.run import finetune
from eosin.finetune.tables import read_table
from marked import fill

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "finetune" / "ablation.json"
PAGE = HERE.parent / "docs" / "finetune.md"
SEEDS = (0, 1, 2)
ENCODER = "eosin-tiny"
BASE = {"crop_px": 64, "lr": 1e-3, "epochs": 4, "folds": 3}
SHOWN = (("auroc", "pooled"), ("ba", "pooled"), ("ba", "domain_mean"), ("ba", "worst_domain"))
PARTS = (("out_of_fold", "out of fold"), ("external", "external"))
CALIBRATION = ("level", "n", "positives", "clusters", "ece", "ece_low", "ece_high", "ece_floor", "slope")


def variants(base: FinetuneConfig) -> Iterator[tuple[str, str, FinetuneConfig]]:
    """Yield (group, name, recipe), the recipe itself first."""
    yield "recipe", base.recipe, base
    yield "control", "labels permuted", base
    yield "control", "random weights", base
    yield "mode", "head alone", replace(base, adapt=AdaptConfig(mode="head"))
    yield "mode", "full", replace(base, adapt=AdaptConfig(mode="full"))
    bce = LossConfig(gamma=0.0)
    yield "loss", "cross-entropy, no domain weights", replace(base, loss=bce, domain_weights="none")
    yield "loss", "focal, no domain weights", replace(base, domain_weights="none")
    for kind in ("sqrt-inverse", "effective-number", "domain-class"):
        yield "loss", f"focal, {kind}", replace(base, domain_weights=kind)
    yield "augmentation", "none", replace(base, augment=None)
    if base.augment is not None:
        for family in FAMILIES:
            yield "augmentation", f"without {family}", replace(base, augment=base.augment.without(family))
    yield "tile", "all 128 px", replace(base, crop_px=0)
    yield "sampling", "every cell once", replace(base, sampling="shuffle")
    yield "labels", "share of votes", replace(base, soft_labels=True)
    yield "mode", "last two blocks", replace(base, adapt=AdaptConfig(mode="last"))
    yield "mode", "visual prompts", replace(base, adapt=AdaptConfig(mode="vpt"))
    yield "rate", "1e-4, that of the winner", replace(base, lr=1e-4)


def numbers(section: dict[str, Any]) -> dict[str, Any]:
    """Return what the table shows of a section of a report."""
    return {f"{metric} {scope}": find(section, metric, scope) for metric, scope in SHOWN}


def run(options: argparse.Namespace) -> None:
    """Train what is missing, and keep the numbers of every run."""
    base, external = get_recipe("amf", **BASE), ("dataset", "atnorm-br")
    for group, name, config in variants(base):
        if options.only and name not in options.only.split(";"):
            continue
        for seed in SEEDS:
            key = f"{group}/{name}/{seed}"
            if key in kept():
                continue
            folder = options.out / re.sub(r"[^a-z0-9]+", "-", key)
            data, encoder = options.images, ENCODER
            if name == "labels permuted":
                data = permuted(read_table(options.images), external, seed)
            if name == "random weights":
                encoder = f"random:{ENCODER}@{seed}"
            report = finetune(data, encoder, replace(config, seed=seed), out=folder, external=external)
            row: dict[str, Any] = {"group": group, "name": name, "seed": seed}
            row |= {part: numbers(report.sections[part]) for part in ("out_of_fold", "external", "without_tta")}
            for part in ("out_of_fold", "external"):
                calibrated = report.sections[part]["calibration"]
                row[part]["calibration"] = [{word: one[word] for word in CALIBRATION} for one in calibrated]
            keep(key, row)
            sys.stderr.write(f"{key}: {with_interval(row['out_of_fold']['ba pooled'])}\n")


def permuted(cells: CellTable, external: tuple[str, str], seed: int) -> CellTable:
    """Return the cells with the labels of those that are not external in another order."""
    own = np.flatnonzero(getattr(cells, external[0]) != external[1])
    moved = np.random.default_rng(seed).permutation(own)
    label, soft = cells.label.copy(), cells.soft.copy()
    label[own], soft[own] = label[moved], soft[moved]
    return replace(cells, label=label, soft=soft)


def kept() -> dict[str, Any]:
    """Return the rows so far."""
    return json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.is_file() else {}


def keep(key: str, row: dict[str, Any]) -> None:
    """Add one row to the file, written whole."""
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(RESULT.with_suffix(".lock")):
        result = {
            "command": "python benchmarks/finetune_ablation.py IMAGES --out RUNS",
            "machine": machine(),
            "commit": commit(),
            "encoder": ENCODER,
            "base": BASE,
            "seeds": SEEDS,
            "rows": {**kept(), key: row},
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Return the Markdown tables: every part's mean and range over seeds, and the calibration of the recipe."""
    rows = list(result["rows"].values())
    order = [(group, name) for group, name, _ in variants(get_recipe("amf", **BASE))]
    names = [one for one in order if any((row["group"], row["name"]) == one for row in rows)]
    lines = [
        "| part | changed to | AUROC out of fold | BA out of fold | change of BA | BA, 95 % CI, seed 0 "
        "| mean of domains | worst domain | AUROC external | BA external |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = [row for row in rows if row["group"] == "recipe"]
    for group, name in names:
        mine = [row for row in rows if (row["group"], row["name"]) == (group, name)]
        lines.append(_line(group, name, mine, "out_of_fold", base))
        if group == "recipe":
            lines.append(_line("views", "no test-time augmentation", mine, "without_tta", base))
    calibrated = [
        "| cells of the recipe, seed 0 | n | slides | ECE (95 % CI) | ECE by chance | slope |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            _calibrated(f"{words}, {one['level']}", one)
            for part, words in PARTS
            for one in base[0][part]["calibration"]
        ),
    ]
    return "\n".join((*lines, "", *calibrated, "", f"`{result['command']}`, commit {result['commit'][:12]}.", ""))


def _calibrated(name: str, one: dict[str, Any]) -> str:
    ece = f"{one['ece']:.3f} ({one['ece_low']:.3f}-{one['ece_high']:.3f})"
    slope = "-" if one["slope"] is None else f"{one['slope']:.2f}"
    return f"| {name} | {one['n']} | {one['clusters']} | {ece} | {one['ece_floor']:.3f} | {slope} |"


def _line(group: str, name: str, rows: list[dict[str, Any]], part: str, base: list[dict[str, Any]]) -> str:
    change = _mean(rows, part, "ba pooled") - _mean(base, "out_of_fold", "ba pooled")
    outside = (
        ["", ""] if part == "without_tta" else [_spread(rows, "external", f"{one} pooled") for one in ("auroc", "ba")]
    )
    own = rows is base or group == "recipe"
    cells = [
        group,
        name,
        _spread(rows, part, "auroc pooled"),
        _spread(rows, part, "ba pooled"),
        "" if own and part == "out_of_fold" else f"{change:+.3f}",
        with_interval(rows[0][part]["ba pooled"]),
        f"{_mean(rows, part, 'ba domain_mean'):.3f}",
        f"{_mean(rows, part, 'ba worst_domain'):.3f}",
        *outside,
    ]
    return "| " + " | ".join(cells) + " |"


def _values(rows: list[dict[str, Any]], part: str, key: str) -> list[float]:
    return [row[part][key]["point"] for row in rows]


def _mean(rows: list[dict[str, Any]], part: str, key: str) -> float:
    return statistics.mean(_values(rows, part, key))


def _spread(rows: list[dict[str, Any]], part: str, key: str) -> str:
    values = _values(rows, part, key)
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    """Run, or write the table from the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="names of the column 'changed to', with semicolons; all without it")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.images is not None:
        if options.out is None:
            parser.error("give --out, the folder of the runs")
        run(options)
    body = table(json.loads(RESULT.read_text(encoding="utf-8"))) if RESULT.is_file() else "No results yet.\n"
    fill(PAGE, "ablation", body, check=options.check)


if __name__ == "__main__":
    main()
