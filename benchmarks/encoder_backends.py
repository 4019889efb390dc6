"""How many tiles a second does each backend encode?

ViT-S/14 DINOv2 and ViT-S/16 DINOv3 at 224 px with random weights; torch fp32 is the baseline of the same run. Every
backend is built once a batch size; then rounds go through all of them in turn, so that a drift of the machine meets
all alike. A round encodes the same tiles with each. Beside it: what the processor could do at most, if all operations
of a tile ran at the rate of one large matrix product.

    python benchmarks/encoder_backends.py [--rounds 5] [--tiles 64] [--batch 8 16 32] [--only openvino-bf16 ...]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eosin.encoders.backends import Forward, build, cpu_name, resolve, runtime_info
from eosin.errors import EosinError

SEED = 0
SIDE_PX = 224
NETWORKS = {"dinov2-vits14": "vit_small_patch14_dinov2", "dinov3-vits16": "vit_small_patch16_dinov3"}
SETTINGS = ("torch-fp32", "torch-bf16", "compile-bf16", "openvino-fp32", "openvino-bf16")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OUT = Path(__file__).parent / "results" / "encoder_backends.json"


class ClassToken(nn.Module):
    """A timm ViT, images to its class token."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_features(images)[:, 0]  # pyright: ignore[reportCallIssue]


def network(arch: str) -> nn.Module:
    """Return a seeded network; LayerScale is set to 0.5, since at its fresh value the blocks would do nothing."""
    torch.manual_seed(SEED)
    made = timm.create_model(arch, pretrained=False, num_classes=0, img_size=SIDE_PX).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "gamma" in name.rsplit(".", 1)[-1]:
                weight.fill_(0.5)
    return ClassToken(made)


def built(setting: str, arch: str, batch: int, device: str) -> tuple[Forward, dict[str, Any], float]:
    """Return the function of one setting, what it runs on, and the seconds until its first vectors."""
    backend, precision = setting.split("-")
    backend, precision, device = resolve(backend, precision, device)
    start = time.perf_counter()
    forward = build(
        network(arch),
        backend=backend,
        precision=precision,
        device=device,
        mean=MEAN,
        std=STD,
        input_px=SIDE_PX,
        batch=batch,
    )
    forward(np.zeros((batch, SIDE_PX, SIDE_PX, 3), np.uint8))
    seconds = time.perf_counter() - start
    return forward, runtime_info(backend=backend, precision=precision, device=device) | {"batch": batch}, seconds


def measured(arch: str, batch: int, tiles: np.ndarray, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row a setting: every repeat in tiles a second, median, ratio to torch fp32, cosine to it."""
    rows: dict[str, dict[str, Any]] = {}
    forwards: dict[str, Forward] = {}
    for setting in args.only:
        try:
            forwards[setting], runtime, seconds = built(setting, arch, batch, args.device)
            rows[setting] = {"setting": setting, "build_s": round(seconds, 2), "runtime": runtime, "tiles_per_s": []}
        except EosinError as error:
            rows[setting] = {"setting": setting, "left_out": str(error)}
    vectors: dict[str, np.ndarray] = {}
    for _ in range(args.rounds):
        for setting, forward in forwards.items():
            start = time.perf_counter()
            vectors[setting] = forward(tiles)
            rows[setting]["tiles_per_s"].append(round(len(tiles) / (time.perf_counter() - start), 2))
    base = vectors.get("torch-fp32")
    for setting, found in vectors.items():
        row = rows[setting]
        row["median"] = statistics.median(row["tiles_per_s"])
        if base is not None:
            row["ratio_to_torch_fp32"] = round(row["median"] / statistics.median(rows["torch-fp32"]["tiles_per_s"]), 2)
            cosine = (found * base).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(base, axis=1)
            row["lowest_cosine_to_torch_fp32"] = round(float(cosine.min()), 6)
    return list(rows.values())


def bound(arch: str, rounds: int) -> dict[str, float]:
    """Return GFLOP of a tile, GFLOP/s of a square matrix product of side 2048 and the tiles/s that would make."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(arch)(torch.zeros(1, 3, SIDE_PX, SIDE_PX))
    found = {"gflop_per_tile": round(counter.get_total_flops() / 1e9, 2)}
    for name, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = torch.randn(2, 2048, 2048).to(kind)
        best = 0.0
        for _ in range(3 * rounds):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * 2048**3 / (time.perf_counter() - start) / 1e9)
        found |= {f"{name}_gflop_per_s": round(best), f"{name}_tiles_per_s": round(best / found["gflop_per_tile"], 1)}
    return found


def commit() -> str:
    """Return the commit of the working tree, with a plus sign when it has changes."""
    here = Path(__file__).parent
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, check=False).returncode
    return head.stdout.strip() + ("+" if dirty else "")


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    tiles = np.random.default_rng(SEED).integers(0, 256, (args.tiles, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    results, bounds = [], {}
    for name in args.networks:
        bounds[name] = bound(NETWORKS[name], args.rounds)
        print(f"{name:14s} at most {bounds[name]}", flush=True)
        for batch in args.batch:
            for row in measured(NETWORKS[name], batch, tiles, args):
                results.append({"network": name, "batch": batch, **row})
                figures = row.get("left_out") or f"{row['median']:8.1f} tiles/s  {row['tiles_per_s']}"
                print(f"{name:14s} batch {batch:3d}  {row['setting']:14s} {figures}", flush=True)
    record = {
        "command": "python " + " ".join(["benchmarks/encoder_backends.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "seed": SEED,
        "machine": {"cpu": cpu_name(), "system": platform.platform(), "python": platform.python_version()},
        "weights": "random, LayerScale 0.5",
        "tile_px": SIDE_PX,
        "tiles": args.tiles,
        "bounds": bounds,
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
