"""The data, the ablations and the evaluation of eosin-tiny. Every step adds to benchmarks/results/eosin_tiny/.

    python benchmarks/eosin_tiny.py tiles DATA --tiles TILES
    eosin pretrain --config docs/pretrain-eosin-tiny.toml --out RUN     (in the folder that holds TILES as "tiles")
    python benchmarks/eosin_tiny.py release RUN                         (the weights of the package, in bfloat16)
    python benchmarks/eosin_tiny.py ablate DATA --tiles TILES           (recipes of docs/, changed one by one)
    python benchmarks/eosin_tiny.py encoders DATA --encoder NAME=FILE_OR_NAME ...
    python benchmarks/eosin_tiny.py compare DATA --encoder "eosin-tiny, seed 0=eosin-tiny" ...
    python benchmarks/eosin_tiny.py labels DATA --encoder NAME=FILE_OR_NAME ...
    python benchmarks/eosin_tiny.py table                               (writes the tables of docs/eosin-tiny.md)

DATA holds slides/, tiles/amf/labels.csv and tiles/camelyon16/. `tiles` cuts the H&E slides at several microns per pixel
and copies the crops of `midog21`; atnorm-br and camelyon16 are left out, they are tests.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import eosin
from end_to_end import machine
from eosin.cohort import grouped_kfold
from eosin.encoders.spec import IMAGENET_MEAN, IMAGENET_STD
from eosin.evaluation.bootstrap import bootstrap, paired_difference
from eosin.evaluation.metrics import make_metrics
from eosin.heads import KnnHead, LinearProbe
from eosin.pretrain.config import PretrainConfig, parse_config
from eosin.pretrain.model import PRESETS, VisionTransformer
from eosin.pretrain.trainer import pretrain

Floats = npt.NDArray[Any]
Codes = npt.NDArray[np.int64]
Row = dict[str, Any]
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "eosin_tiny"
HEADS = ("knn", "linear")
NEIGHBOURS, STRENGTH = 20, 0.003
PERMUTATIONS, CENTRE = 10, slice(32, 96)
SEEDS, SHARES, SCRATCH_STEPS = (0, 1, 2), (0.05, 0.1, 0.25, 1.0), 200
SMALL, TINY = "pretrain-small.toml", "pretrain-eosin-tiny.toml"
FULL, BASE = "small.toml", "150 steps"
VARIANTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    FULL: (SMALL, {}),
    "untrained": (SMALL, {"budget": {"steps": 1}, "optimizer": {"lr": 1e-12}}),
    BASE: (TINY, {}),
    "no KDE": (TINY, {"objective": {"kde": 0.0}}),
    "KoLeo for KDE": (TINY, {"objective": {"kde": 0.0, "koleo": 0.1}}),
    "extended context": (TINY, {"views": {"extended_context": 1.0}}),
    "no HED jitter": (TINY, {"views": {"stain_probability": 0.0}}),
    "adversary of the scanner": (TINY, {"objective": {"adversary": "site"}}),
}
"""A recipe of docs/ and what is changed in it; those of eosin-tiny have 150 of its 1,200 steps."""
TILE_PX = 128
SLIDES = {
    "CMU-1-Small-Region.svs": (None, (0.5, 1.0, 2.0)),
    "OS-1-detail.ome.tif": (None, (0.25, 0.5, 1.0)),
    "tcga-cr-7395-01a-01-ts1.svs": (1.0, (1.0, 2.0)),
    "prostate-2500px.jpeg": (0.5, (0.5, 1.0, 2.0)),
}
"""Microns per pixel of the files that do not say (by eye: nuclei of 7 to 8 um), and those that tiles are cut at."""
WHITE = 230


def cut(path: Path, slide_mpp: float | None, mpp: float, out: Path) -> list[str]:
    """Write the tiles of a slide of which at least half is tissue, each half over the next; return their names."""
    slide = eosin.open_slide(path, mpp=slide_mpp)
    grid = eosin.tile(slide, tile_px=TILE_PX, mpp=mpp, overlap_px=TILE_PX // 2, min_tissue=0.5)
    names = []
    for x, y in grid.xy.tolist():
        pixels = slide.read((x, y), TILE_PX, mpp=mpp)
        if (pixels.min(axis=2) > WHITE).mean() <= 0.5:
            names.append(f"{path.name.split('.')[0]}-{mpp:g}-{x}-{y}.png")
            Image.fromarray(pixels).save(out / names[-1])
    return names


def tiles(data: Path, out: Path) -> None:
    """Write tiles and `tiles.csv`: file, slide_id, patient_id, site (scanner or slide, what is drawn evenly)."""
    out.mkdir(parents=True)
    rows = []
    for name, (slide_mpp, resolutions) in SLIDES.items():
        for mpp in resolutions:
            found = cut(data / "slides" / name, slide_mpp, mpp, out)
            print(f"{name} at {mpp:g} um/px: {len(found)} tiles")
            rows += [(file, name, name, name) for file in found]
    with (data / "tiles" / "amf" / "labels.csv").open(newline="") as file:
        crops = [row for row in csv.DictReader(file) if row["dataset"] == "midog21"]
    for row in crops:
        shutil.copy(data / "tiles" / "amf" / row["file"], out)
        rows.append((Path(row["file"]).name, row["slide_id"], row["slide_id"], row["scanner"]))
    print(f"midog21 at 0.25 um/px: {len(crops)} crops")
    with (out / "tiles.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "slide_id", "patient_id", "site"), *rows])


# --- measures


class Crops(NamedTuple):
    """The cells of AMF: pixels uint8 (n, 128, 128, 3), and columns (n,)."""

    pixels: npt.NDArray[np.uint8]
    label: npt.NDArray[np.int64]
    slide: npt.NDArray[np.str_]
    scanner: npt.NDArray[np.str_]
    external: npt.NDArray[np.bool_]

    def part(self, rows: npt.NDArray[Any]) -> Crops:
        """Return some rows."""
        columns: list[Any] = [column[rows] for column in self]
        return Crops(*columns)


def read_crops(data: Path) -> Crops:
    """Return all cells, those of atnorm-br as external."""
    with (data / "tiles" / "amf" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pixels = np.stack([np.asarray(Image.open(data / "tiles" / "amf" / row["file"]).convert("RGB")) for row in rows])
    external = np.array([row["dataset"] == "atnorm-br" for row in rows])
    slides = [row["slide_id"] or row["file"] for row in rows]
    label = np.array([int(row["atypical"]) for row in rows])
    return Crops(pixels, label, np.array(slides), np.array([row["scanner"] for row in rows]), external)


def features_of(encoder: str, pixels: npt.NDArray[np.uint8]) -> Floats:
    """Return the features (n, D) of an encoder, a weights file, or an .npz of features in the order of the crops."""
    if encoder.endswith(".npz"):
        return np.load(encoder)["features"]
    return np.asarray(eosin.load_encoder(encoder, device="cpu").encode(pixels), dtype=np.float32)


def knn(x: Floats, y: Codes, new: Floats) -> Floats:
    """Return the share of positives among the nearest neighbours, by cosine of standardised features."""
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    head = KnnHead(k_grid=(min(NEIGHBOURS, len(x)),)).fit((x - mean) / std, y)
    return head.predict_proba((new - mean) / std)[:, 1]


def linear(x: Floats, y: Codes, new: Floats) -> Floats:
    """Return the probability of the positive class by logistic regression on standardised features."""
    return LinearProbe(c_grid=(STRENGTH,), class_weight="balanced").fit(x, y).predict_proba(new)[:, 1]


def auroc(y: Codes, p: Floats, cluster: npt.ArrayLike) -> Row:
    """Return AUROC with its interval over clusters."""
    return bootstrap(make_metrics(["auroc"], y, p)["auroc"], cluster, y=y, resamples=1000).to_dict()


def out_of_fold(head: Any, x: Floats, y: Codes, slide: npt.NDArray[np.str_]) -> Floats:
    """Return scores (n,) of rows whose slide the head did not see."""
    scores = np.zeros(len(y))
    for split in grouped_kfold(y, groups=slide, folds=5):
        scores[split.test] = head(x[split.train], y[split.train], x[split.test])
    return scores


def shuffled(head: Any, x: Floats, y: Codes, slide: npt.NDArray[np.str_]) -> Row:
    """Return the mean AUROC for permuted labels, and the lowest and highest; one permutation alone may lie far off."""
    points = []
    for seed in range(PERMUTATIONS):
        labels = np.random.default_rng(seed).permutation(y)
        metric = make_metrics(["auroc"], labels, out_of_fold(head, x, labels, slide))["auroc"]
        points.append(float(metric(np.ones((1, len(y))))[0]))
    return {"point": float(np.mean(points)), "low": min(points), "high": max(points), "permutations": PERMUTATIONS}


def skill(x: Floats, crops: Crops) -> Row:
    """Return what features tell: the label within, across scanners and outside; shuffled labels; the scanner."""
    inside = ~crops.external
    xi, own = x[inside], crops.part(inside)
    y, outside = own.label, crops.part(crops.external)
    found: Row = {"dim": x.shape[1]}
    for name, head in (("knn", knn), ("linear", linear)):
        scores = np.zeros(len(y))
        for scanner in np.unique(own.scanner):
            test = own.scanner == scanner
            scores[test] = head(xi[~test], y[~test], xi[test])
        across = [auroc(y[rows], scores[rows], own.slide[rows]) for rows in _each(own.scanner)]
        found[name] = {
            "within": auroc(y, out_of_fold(head, xi, y, own.slide), own.slide),
            "across_scanner": float(np.mean([one["point"] for one in across])),
            "external": auroc(outside.label, head(xi, y, x[crops.external]), outside.slide),
            "shuffled": shuffled(head, xi, y, own.slide),
        }
    names, code = np.unique(own.scanner, return_inverse=True)
    called = np.zeros(len(y), dtype=np.int64)
    for split in grouped_kfold(code, groups=own.slide, folds=5):
        head = LinearProbe(c_grid=(STRENGTH,)).fit(xi[split.train], code[split.train])
        called[split.test] = head.predict(xi[split.test])
    right = (called == code).astype(np.float64)
    found["scanner"] = bootstrap(_mean(right), own.slide, y=code, resamples=1000).to_dict() | {"classes": len(names)}
    return found


def _each(values: npt.NDArray[np.str_]) -> list[npt.NDArray[np.bool_]]:
    return [values == one for one in np.unique(values)]


def _mean(values: Floats) -> Any:
    def metric(weights: Floats) -> Floats:
        return weights @ values / weights.sum(axis=1)

    return metric


def camelyon(data: Path, encoder: str) -> Row:
    """Return the balanced accuracy of nearest neighbours on other slides' tiles: 89 tiles of 4 slides, a smoke test."""
    files = sorted((data / "tiles" / "camelyon16").rglob("*.png"))
    y = np.array([int(path.parent.name == "tumor") for path in files])
    slide = np.array(["_".join(path.stem.split("_")[:2]) for path in files])
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").crop((16, 16, 240, 240))) for path in files])
    x, scores = features_of(encoder, pixels), np.full(len(y), np.nan)
    for one in np.unique(slide):
        test = slide == one
        if len(np.unique(y[~test])) == 2:
            scores[test] = knn(x[~test], y[~test], x[test])
    used = ~np.isnan(scores)
    called = (scores[used] > 0.5) == y[used]
    return {"tiles": int(used.sum()), "slides": len(np.unique(slide[used])), "accuracy": float(called.mean())}


# --- steps


def keep(name: str, key: str, value: Any) -> None:
    """Put one result into its file, written whole."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        record = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "results": {}}
        record["results"][key] = value
        path.write_text(json.dumps(record, indent=1) + "\n")


def kept(name: str) -> dict[str, Any]:
    """Return the results of a file so far."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def changed_recipe(name: str, tiles: Path, seed: int) -> PretrainConfig:
    """Return the recipe of a variant on these tiles."""
    file, changes = VARIANTS[name]
    table = tomllib.loads((HERE.parent / "docs" / file).read_text())
    table["data"] = {"paths": [str(tiles)], "kind": "tiles", "table": str(tiles / "tiles.csv"), "slide_mpp": 0.5}
    table["data"] |= {"workers": 1, "sample": {"tile_px": TILE_PX, "balance": "site"}}
    table["run"] |= {"seed": seed, "keep": 100}
    table["watch"] = {"log_every": 20, "stop_on_collapse": False}
    shorter = {"budget": {"steps": 150}} if file == TINY else {}
    for section, values in (shorter | changes).items():
        table[section] = table[section] | values
    return parse_config(table)


def ablate(data: Path, tiles: Path, only: Sequence[str]) -> None:
    """Train every variant on every seed, and say what its features tell; what is done already is left."""
    crops = read_crops(data)
    for seed in SEEDS:
        for name in VARIANTS:
            key = f"{name}/{seed}"
            if key in kept("ablations") or (only and key not in only):
                continue
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                outcome = pretrain(changed_recipe(name, tiles, seed), Path(folder), device="cpu")
                if outcome.encoder is None:
                    raise SystemExit(f"{key} was stopped; run the same command again")
                seconds = time.perf_counter() - start
                log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
                found = skill(features_of(str(outcome.encoder), crops.pixels), crops)
                if name == FULL:
                    found["curve"] = curve(Path(folder) / "encoders", crops)
            loss = {name: round(value, 4) for name, value in log[-1]["parts"].items()}
            keep("ablations", key, {"seconds": round(seconds), "loss": loss, "monitors": log[-1]["monitors"], **found})
            told = [round(found[head][where]["point"], 3) for head in HEADS for where in ("within", "external")]
            print(key, f"{seconds:.0f} s", *told, round(found["scanner"]["point"], 3), flush=True)


def curve(folder: Path, crops: Crops) -> list[Row]:
    """Return what neighbours tell of the label at every checkpoint."""
    own, rows = crops.part(~crops.external), []
    for path in sorted(folder.glob("step-*.safetensors")):
        x = features_of(str(path), own.pixels)
        found = {
            name: auroc(own.label, out_of_fold(head, x, own.label, own.slide), own.slide)["point"]
            for name, head in (("knn", knn), ("linear", linear))
        }
        rows.append({"step": int(path.stem.removeprefix("step-")), **found})
    return rows


def encoders(data: Path, named: Mapping[str, str]) -> None:
    """Say what the features of each encoder tell."""
    crops = read_crops(data)
    for name, encoder in named.items():
        found = skill(features_of(encoder, crops.pixels), crops)
        if not encoder.endswith(".npz"):
            middle = np.ascontiguousarray(crops.pixels[:, CENTRE, CENTRE])
            keep("encoders", f"{name}, central 64 px", skill(features_of(encoder, middle), crops))
            keep("camelyon16", name, camelyon(data, encoder))
        keep("encoders", name, found)
        told = [round(found[head][where]["point"], 3) for head in HEADS for where in ("within", "external")]
        print(name, *told, round(found["scanner"]["point"], 3), flush=True)


def compare(data: Path, named: Mapping[str, str]) -> None:
    """Say by how much the mean AUROC over the seeds of the first encoder differs from that of each other one.

    "NAME, seed 1" is a seed of NAME.
    """
    crops = read_crops(data)
    own, outside = crops.part(~crops.external), crops.part(crops.external)
    metrics: dict[str, dict[str, Any]] = {}
    for name, encoder in named.items():
        x = features_of(encoder, crops.pixels)
        inside = x[~crops.external]
        for kind, head in (("knn", knn), ("linear", linear)):
            scores = out_of_fold(head, inside, own.label, own.slide)
            metrics.setdefault(f"{kind}/within", {})[name] = make_metrics(["auroc"], own.label, scores)["auroc"]
            scores = head(inside, own.label, x[crops.external])
            metrics.setdefault(f"{kind}/external", {})[name] = make_metrics(["auroc"], outside.label, scores)["auroc"]
    for test, by in metrics.items():
        where = own if test.endswith("within") else outside
        groups: dict[str, list[Any]] = {}
        for name, metric in by.items():
            groups.setdefault(name.split(", seed ")[0], []).append(metric)
        ours, *others = groups
        for name in others:
            means = _average(groups[ours]), _average(groups[name])
            gap = paired_difference(*means, where.slide, y=where.label)
            keep("compare", f"{name}/{test}", {"seeds": [len(groups[ours]), len(groups[name])], **gap.to_dict()})
            print(name, test, round(gap.point, 3), round(gap.low, 3), round(gap.high, 3), flush=True)


def _average(metrics: Sequence[Any]) -> Any:
    def metric(weights: Floats) -> Floats:
        return np.mean([one(weights) for one in metrics], axis=0)

    return metric


def labels(data: Path, named: Mapping[str, str]) -> None:
    """Give each way of learning some of the slides' labels; test on atnorm-br."""
    crops = read_crops(data)
    own, outside = crops.part(~crops.external), crops.part(crops.external)
    x = {name: features_of(encoder, crops.pixels) for name, encoder in named.items()}
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(np.unique(own.slide))
        for share in SHARES:
            rows = np.isin(own.slide, order[: math.ceil(share * len(order))])
            for name, every in x.items():
                scores = linear(every[~crops.external][rows], own.label[rows], every[crops.external])
                _keep_labels(f"{name}/{share}/{seed}", rows, outside, scores)
            if f"scratch/{share}/{seed}" not in kept("labels"):
                _keep_labels(f"scratch/{share}/{seed}", rows, outside, scratch(own.part(rows), outside, seed))


def _keep_labels(key: str, rows: npt.NDArray[np.bool_], outside: Crops, scores: Floats) -> None:
    found = auroc(outside.label, scores, outside.slide)
    keep("labels", key, {"cells": int(rows.sum()), **found})
    print(key, int(rows.sum()), round(found["point"], 3), flush=True)


def scratch(train: Crops, test: Crops, seed: int) -> Floats:
    """Return the scores of a supervised network of eosin-tiny's geometry that starts from random numbers."""
    torch.manual_seed(seed)
    network = VisionTransformer(replace(PRESETS["tiny"], dim=256, depth=6, heads=4, layer_scale=1.0))
    head = torch.nn.Linear(256, 1)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=SCRATCH_STEPS, pct_start=0.1)
    tiles = torch.from_numpy(train.pixels).movedim(3, 1)
    y = torch.from_numpy(train.label).float()
    weight = torch.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(SCRATCH_STEPS):
        rows = torch.randint(len(y), (32,), generator=generator)
        turns, flip = torch.randint(4, (1,), generator=generator), torch.rand(1, generator=generator)
        batch = _normal(torch.rot90(tiles[rows], int(turns), (2, 3)))
        logits = _logits(network, head, batch.flip(3) if flip < 0.5 else batch)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), y[rows], weight=weight[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        pieces = torch.from_numpy(test.pixels).movedim(3, 1).split(64)
        return torch.cat([_logits(network, head, _normal(piece)) for piece in pieces]).sigmoid().float().numpy()


def _logits(network: VisionTransformer, head: torch.nn.Linear, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return head(network([images])[0].cls)[:, 0]


def _normal(tiles: Tensor) -> Tensor:
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (tiles / 255 - mean) / std


def release(run: Path) -> None:
    """Put the encoder of a finished run into the package, in bfloat16."""
    source = run / "encoder.safetensors"
    with safe_open(source, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name).to(torch.bfloat16) for name in file.keys()}  # noqa: SIM118
    path = HERE.parent / "src" / "eosin" / "encoders" / "eosin-tiny.safetensors"
    save_file(tensors, path, metadata=facts)
    path.chmod(0o644)


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("tiles", "release", "ablate", "encoders", "compare", "labels"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--tiles", type=Path, default=Path("tiles"))
    parser.add_argument("--encoder", nargs="+", default=[], metavar="NAME=ENCODER")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT/SEED")
    arguments = parser.parse_args()
    named = dict(one.split("=", 1) for one in arguments.encoder)
    if arguments.step == "tiles":
        tiles(arguments.data, arguments.tiles)
    elif arguments.step == "release":
        release(arguments.data)
    elif arguments.step == "ablate":
        ablate(arguments.data, arguments.tiles.resolve(), arguments.only)
    elif arguments.step == "encoders":
        encoders(arguments.data, named)
    elif arguments.step == "compare":
        compare(arguments.data, named)
    else:
        labels(arguments.data, named)


if __name__ == "__main__":
    main()
