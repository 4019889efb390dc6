"""Which encoder tells atypical mitotic figures, and which tells the scanner? The table of docs/amf.md.

    python benchmarks/effnet_weights.py --packages PACKAGES --out DIR --images IMAGES --table IMAGES/labels.csv
    python benchmarks/amf.py IMAGES --features DIR/efficientnet-lite0.npz --out OUT
    python benchmarks/amf.py --table            (writes the tables of docs/amf.md again, from the results)
    python benchmarks/amf.py --check            (exit 1 where they differ)

IMAGES holds labels.csv (file, dataset, slide_id, scanner, atypical ...) and the pictures it names. The same as
`eosin probe IMAGES IMAGES/labels.csv --label atypical --site scanner --external dataset=atnorm-br --encoder
texture,DIR/efficientnet-lite0.npz,random:dinov2-vits14 --out OUT`, and the numbers in benchmarks/results/amf/.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from end_to_end import commit, machine
from eosin.tasks.probe import ProbeSettings, probe
from eosin.tasks.validation_page import number, with_interval

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "amf" / "probe.json"
PAGE = HERE.parent / "docs" / "amf.md"
KEPT = ("name", "dim", "chosen", "notes", "threshold", "within", "within_site", "across_site", "external")
KEPT += ("shuffled", "site_leakage", "robustness", "label_curve")
METRICS = ("auroc", "ba", "sensitivity", "specificity")


def run(images: Path, features: Path, out: Path) -> None:
    """Probe the three encoders and keep the numbers."""
    settings = ProbeSettings(
        label="atypical",
        site="scanner",
        external=("dataset", "atnorm-br"),
        encoders=("texture", str(features), "random:dinov2-vits14"),
    )
    report = probe(images, images / "labels.csv", settings, out=out)
    record = json.loads((out / "run.json").read_text())
    encoders = [{name: one[name] for name in KEPT} for one in report.sections["encoders"]]
    result = {
        "command": f"eosin probe IMAGES IMAGES/labels.csv --label atypical --site scanner --external "
        f"dataset=atnorm-br --encoder texture,{features.name},random:dinov2-vits14 --out OUT",
        "machine": machine(),
        "commit": commit(),
        "cpu_seconds": round(time.process_time()),
        "inputs": record["inputs"],
        "seed": record["seed"],
        "data": report.sections["data"],
        "encoders": encoders,
        "differences": report.sections["differences"],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page by name."""
    rows = []
    for kind, words in (
        ("within", "within"),
        ("across_site", "scanner left out"),
        ("external", "external"),
        ("shuffled", "shuffled labels"),
    ):
        for one in result["encoders"]:
            found = one[kind]["domain_mean"] if kind == "across_site" else one[kind]
            rows.append([words, one["name"], *(with_interval(found[name]) for name in METRICS)])
    skill = _lines(["test", "encoder", "AUROC", "balanced accuracy", "sensitivity", "specificity"], rows)
    rows = []
    for one in result["encoders"]:
        leak, robust = one["site_leakage"], one["robustness"]
        told = with_interval(leak["accuracy"])
        if leak["accuracy"]["point"] == 1:
            told = f"1.000 (at least {1 - 3 / leak['accuracy']['clusters']:.3f})"
        drop = number(robust["drop"]["apd"]) if robust["drop"] else "–"
        numbers = [with_interval(robust["ri"]), with_interval(robust["croma"]), drop, number(robust["biology"])]
        rows.append([one["name"], told, *numbers])
    site = _lines(["encoder", "scanner told, accuracy", "RI", "CRoMa", "APD", "label by neighbours, BA"], rows)
    rows = []
    for one in result["encoders"]:
        beyond = {row["level"]: row for row in one["across_site"]["rows"]}
        for row in one["within_site"]["rows"]:
            other = beyond[row["level"]]["metrics"]
            pairs = [with_interval(part[name]) for name in ("auroc", "ba") for part in (row["metrics"], other)]
            rows.append([one["name"], f"{row['level']}, {row['n']} ({row['clusters']})", *pairs])
    names = ["encoder", "scanner, n (slides)", "AUROC, seen", "AUROC, left out", "BA, seen", "BA, left out"]
    scanners = _lines(names, rows)
    shares = [
        f"{100 * row['fraction']:g} % ({row['groups']:g})" for row in result["encoders"][0]["label_curve"]["rows"]
    ]
    rows = [
        [
            one["name"],
            *(f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in one["label_curve"]["rows"]),
        ]
        for one in result["encoders"]
    ]
    differences = [
        [one["encoder"], one["metric"].upper(), with_interval(one), f"{one['p_holm']:.3f}"]
        for one in result["differences"]
    ]
    return {
        "skill": skill,
        "site": site,
        "scanners": scanners,
        "labels": _lines(["encoder", *shares], rows),
        "differences": _lines(["encoder less texture", "metric", "difference", "p, Holm"], differences),
    }


def _lines(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rendered(page: str, found: dict[str, str]) -> str:
    """Return the page with its tables between their marks."""
    for name, table in found.items():
        mark = re.compile(rf"(<!-- amf:{name} -->\n).*?(<!-- /amf -->)", re.S)
        page = mark.sub(lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", page)
    return page


def main() -> None:
    """Run, or write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.images is not None:
        run(args.images, args.features, args.out)
    page = PAGE.read_text()
    new = rendered(page, tables(json.loads(RESULT.read_text())))
    if args.check and new != page:
        raise SystemExit("docs/amf.md does not show the results; run: python benchmarks/amf.py --table")
    if not args.check:
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
