"""Which part of the `amf` recipe helps? One part changed at a time, three seeds, intervals over slides.

    python benchmarks/finetune_ablation.py IMAGES --out RUNS [--encoder eosin-tiny] [--epochs 12] [--only loss,mode]
    python benchmarks/finetune_ablation.py --table      (writes the table of docs/finetune.md again, from the results)
    python benchmarks/finetune_ablation.py --check      (exit 1 where it differs)

IMAGES holds labels.csv and pictures; cells of atnorm-br are external. A run that was stopped goes on. The seed lays the
folds out anew, so that a line is the mean over layouts and its range over them; the interval is of the first seed. A
change that does not help stays in the table. Test-time views are compared on the same trained models.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from end_to_end import commit, machine
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.augment import FAMILIES
from eosin.finetune.losses import LossConfig
from eosin.finetune.page import find, with_interval
from eosin.finetune.recipe import FinetuneConfig, get_recipe
from eosin.finetune.run import finetune

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "finetune" / "ablation.json"
PAGE = HERE.parent / "docs" / "finetune.md"
MARKER = re.compile(r"(<!-- ablation -->\n).*?(<!-- /ablation -->)", re.S)
SEEDS = (0, 1, 2)
SHOWN = (("ba", "pooled"), ("ba", "domain_mean"), ("ba", "worst_domain"), ("auroc", "pooled"))


def variants(base: FinetuneConfig) -> Iterator[tuple[str, str, FinetuneConfig]]:
    """Yield (group, name, recipe), the recipe itself first."""
    yield "recipe", base.recipe, base
    bce = LossConfig(gamma=0.0)
    yield "loss", "cross-entropy, no domain weights", replace(base, loss=bce, domain_weights="none")
    yield "loss", "focal, no domain weights", replace(base, domain_weights="none")
    for kind in ("sqrt-inverse", "effective-number", "domain-class"):
        yield "loss", f"focal, {kind}", replace(base, domain_weights=kind)
    yield "sampling", "every cell once", replace(base, sampling="shuffle")
    yield "sampling", "domain and class balanced", replace(base, sampling="domain-class")
    yield "labels", "share of votes", replace(base, soft_labels=True)
    yield "augmentation", "none", replace(base, augment=None)
    if base.augment is not None:
        for family in FAMILIES:
            yield "augmentation", f"without {family}", replace(base, augment=base.augment.without(family))
    yield "mode", "head alone", replace(base, adapt=AdaptConfig(mode="head"))
    yield "mode", "last two blocks", replace(base, adapt=AdaptConfig(mode="last"))
    yield "mode", "full", replace(base, adapt=AdaptConfig(mode="full"))
    yield "mode", "visual prompts", replace(base, adapt=AdaptConfig(mode="vpt"))


def numbers(section: dict[str, Any]) -> dict[str, Any]:
    """Return what the table shows of a section of a report."""
    return {f"{metric} {scope}": find(section, metric, scope) for metric, scope in SHOWN}


def run(options: argparse.Namespace) -> None:
    """Train what is missing, and keep the numbers of all runs."""
    base = get_recipe("amf", epochs=options.epochs, folds=options.folds)
    wanted = {name for name in options.only.split(",") if name}
    rows: list[dict[str, Any]] = []
    for group, name, config in variants(base):
        if wanted and group not in wanted and group != "recipe":
            continue
        for seed in SEEDS:
            folder = options.out / f"{group}-{re.sub(r'[^a-z0-9]+', '-', name)}" / str(seed)
            settled = replace(config, seed=seed)
            external = ("dataset", "atnorm-br")
            report = finetune(options.images, options.encoder, settled, out=folder, external=external)
            parts = {part: numbers(report.sections[part]) for part in ("out_of_fold", "external", "without_tta")}
            rows.append({"group": group, "name": name, "seed": seed, **parts})
            sys.stderr.write(f"{group}: {name}, seed {seed}: {with_interval(parts['out_of_fold']['ba pooled'])}\n")
            keep(rows, options)


def keep(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the results so far."""
    result = {
        "command": f"python benchmarks/finetune_ablation.py IMAGES --out RUNS --encoder {options.encoder} "
        f"--epochs {options.epochs} --folds {options.folds}" + (f" --only {options.only}" if options.only else ""),
        "machine": machine(),
        "commit": commit(),
        "encoder": options.encoder,
        "seeds": SEEDS,
        "rows": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table: mean and range over seeds, the interval of the first, and the change of the mean."""
    lines = [
        "| part | changed to | BA out of fold | change | 95 % CI, seed 0 | mean of domains | worst domain | external |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = None
    names = list(dict.fromkeys((row["group"], row["name"]) for row in result["rows"]))
    for group, name in names:
        mine = [row for row in result["rows"] if (row["group"], row["name"]) == (group, name)]
        line = _line(group, name, mine, "out_of_fold", base)
        base = _mean(mine, "out_of_fold", "ba pooled") if base is None else base
        lines.append(line)
        if group == "recipe":
            lines.append(_line("views", "no test-time augmentation", mine, "without_tta", base))
    return "\n".join((*lines, "", f"`{result['command']}`, commit {result['commit'][:12]}.", ""))


def _mean(rows: list[dict[str, Any]], part: str, key: str) -> float:
    values = [row[part][key]["point"] for row in rows]
    return sum(values) / len(values)


def _line(group: str, name: str, rows: list[dict[str, Any]], part: str, base: float | None) -> str:
    values = [row[part]["ba pooled"]["point"] for row in rows]
    mean = sum(values) / len(values)
    change = "" if base is None else f"{mean - base:+.3f}"
    outside = "" if part == "without_tta" else f"{_mean(rows, 'external', 'ba pooled'):.3f}"
    cells = [
        group,
        name,
        f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})",
        change,
        with_interval(rows[0][part]["ba pooled"]),
        f"{_mean(rows, part, 'ba domain_mean'):.3f}",
        f"{_mean(rows, part, 'ba worst_domain'):.3f}",
        outside,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run, or write the table from the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--encoder", default="eosin-tiny")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", default="", help="groups, such as loss,mode")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.images is not None:
        if options.out is None:
            parser.error("give --out, the folder of the runs")
        run(options)
    before = PAGE.read_text(encoding="utf-8")
    body = table(json.loads(RESULT.read_text(encoding="utf-8"))) if RESULT.is_file() else "No results yet.\n"
    after = MARKER.sub(lambda found: f"{found[1]}{body}{found[2]}", before)
    if options.check:
        raise SystemExit(int(before != after))
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
