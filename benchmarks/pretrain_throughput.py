"""How many images a second does a training step take? `eosin pretrain` against lightly's DINOv2 example loop.

    python benchmarks/pretrain_throughput.py --batch 32 --steps 8

Both train the same geometry (ViT of patch 16 without registers, LayerScale, drop path) with DINO, iBOT (a head of its
own) and KoLeo, EMA centring, AdamW in one precision, on the same PNG tiles, with 2 global and `--local` local crops of
the same sizes, scales and colour changes, and the same number of worker processes. lightly's side is put together as
its DINOv2 example is, of its own parts: DINOTransform in a DataLoader's workers, MaskedVisionTransformerTIMM over
timm's network, DINOProjectionHead, DINOLoss, IBOTPatchLoss, KoLeoLoss, update_momentum. Ours is what `eosin pretrain`
runs between two log lines. In each repeat every side has its turn, which begins with steps that are not timed; the time
includes waiting for tiles. "step alone" takes one batch of views again and again: no reading, no views.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import random_block_mask, update_drop_path_rate, update_momentum
from lightly.transforms import DINOTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from eosin.pretrain import engine, inputs
from eosin.pretrain.config import PretrainConfig, parse_config
from eosin.pretrain.loading import Loading
from eosin.pretrain.tilesource import TileConfig, TileSource

WARM = 2
SCALES = {"global_scale": (0.32, 1.0), "local_scale": (0.05, 0.32)}
NO_FACTORS = inputs.Factors(codes={}, names={}, remarks=())
Turn = Callable[[], Iterator[None]]


def write_tiles(folder: Path, count: int, side: int, seed: int) -> None:
    """Write blurred noise in the colours of H&E, which compresses about as tissue does."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8), dtype=np.uint8))
        stain = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
        rgb = 240 - stain * [60, 130, 70] + rng.normal(0, 6, (side, side, 3))
        Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).save(folder / f"{i:05d}.png")


# lightly


class Tiles(Dataset):
    def __init__(self, folder: Path, transform: DINOTransform, length: int) -> None:
        self.paths, self.transform, self.length = sorted(folder.glob("*.png")), transform, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.paths[index % len(self.paths)]) as image:
            return self.transform(image.convert("RGB"))


class Lightly(nn.Module):
    """Backbone and heads of one branch."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__()
        vit = timm.models.VisionTransformer(
            img_size=given.global_px, patch_size=16, embed_dim=given.dim, depth=given.depth, num_heads=given.dim // 64,
            num_classes=0, init_values=0.1, dynamic_img_size=True,
        )  # fmt: skip
        self.backbone = MaskedVisionTransformerTIMM(vit=vit, antialias=False, pos_embed_initialization="skip")
        sizes = (given.dim, given.hidden, given.bottleneck, given.prototypes)
        self.dino, self.ibot = (DINOProjectionHead(*sizes, batch_norm=False, norm_last_layer=False) for _ in range(2))

    def forward(
        self, images: Tensor, mask: Tensor | None, picked: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = self.backbone.encode(images, mask=mask)
        return tokens[:, 0], self.dino(tokens[:, 0]), None if picked is None else self.ibot(tokens[picked])


def lightly_turn(given: argparse.Namespace, folder: Path, ready: bool) -> Turn:
    def turn() -> Iterator[None]:
        torch.manual_seed(given.seed)
        device = torch.device(given.device)
        student = Lightly(given).to(device)
        teacher = Lightly(given).to(device).requires_grad_(False)
        teacher.load_state_dict(student.state_dict())
        update_drop_path_rate(student.backbone.vit, drop_path_rate=given.drop_path, mode="uniform")
        dino, ibot = (
            DINOLoss(output_dim=given.prototypes).to(device),
            IBOTPatchLoss(output_dim=given.prototypes).to(device),
        )
        koleo = KoLeoLoss()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        transform = DINOTransform(
            given.global_px, SCALES["global_scale"], given.local_px, SCALES["local_scale"], given.local,
            cj_strength=0.5, gaussian_blur=(1.0, 0.1, 0.5), solarization_prob=0.2,
        )  # fmt: skip
        data = Tiles(folder, transform, (WARM + given.steps + 4) * given.batch)
        loader = DataLoader(
            data, given.batch, shuffle=True, drop_last=True, num_workers=given.workers, pin_memory=device.type == "cuda"
        )
        batches = iter(loader)
        held = next(batches)
        while True:
            views = [view.to(device, non_blocking=True) for view in (held if ready else next(batches))]
            whole, local = torch.cat(views[:2]), torch.cat(views[2:])
            vit = student.backbone.vit
            side = given.global_px // 16
            mask = whole.new_zeros((len(whole), 1 + side * side), dtype=torch.bool)
            blocks = random_block_mask((len(whole), side, side), device=device)
            mask[:, vit.num_prefix_tokens :] = blocks.flatten(start_dim=1)
            with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
                with torch.no_grad():
                    _, teacher_logits, teacher_masked = teacher(whole, None, mask)
                cls, logits, masked = student(whole, mask, mask)
                _, local_logits, _ = student(local, None, None)
                loss = dino(list(teacher_logits.chunk(2)), [*logits.chunk(2), *local_logits.chunk(given.local)])
                loss = loss + ibot(teacher_masked, masked, blocks)
                loss = loss + 0.1 * sum(koleo(part) for part in cls.chunk(2))
            optimizer.zero_grad()
            loss.backward()
            for part in (student.backbone, student.dino, student.ibot):
                nn.utils.clip_grad_norm_(part.parameters(), 3.0)
            optimizer.step()
            update_momentum(student, teacher, m=0.994)
            yield

    return turn


# eosin


def config_of(given: argparse.Namespace, folder: Path) -> PretrainConfig:
    return parse_config(
        {
            "model": {
                "dim": given.dim, "depth": given.depth, "heads": given.dim // 64, "patch_px": 16, "registers": 0,
                "position_grid": given.global_px // 16, "layer_scale": 0.1, "drop_path": given.drop_path,
            },
            "data": {
                "paths": [str(folder)], "kind": "tiles", "slide_mpp": 0.5, "workers": max(given.workers, 1),
                "sample": {"tile_px": given.tile_px},
            },
            "views": {
                "preset": "dinov2", "global_px": given.global_px, "local_px": given.local_px,
                "local_crops": given.local, "blur": [1.0, 0.1, 0.5], **{k: list(v) for k, v in SCALES.items()},
            },
            "objective": {
                "centring": "ema", "koleo": 0.1, "prototypes": given.prototypes, "hidden": given.hidden,
                "bottleneck": given.bottleneck,
            },
            "optimizer": {"lr": 1e-4, "lr_rule": "none"},
            "budget": {"steps": 100_000},
            "run": {"batch": given.batch, "precision": given.precision, "seed": given.seed},
        }
    )  # fmt: skip


def eosin_turn(given: argparse.Namespace, folder: Path, ready: bool) -> Turn:
    def turn() -> Iterator[None]:
        config, device = config_of(given, folder), torch.device(given.device)
        made = engine.build(config, classes={}, steps=100_000, device=device)
        tiles = TileConfig(tile_px=given.tile_px, mpp=0.5, seed=given.seed)
        source = TileSource([folder], tiles, loading=Loading(workers=given.workers))
        maker = inputs.Maker(config=config, source=source, factors=NO_FACTORS, device=device, rank=0, world=1)

        def crops_of(index: int) -> Any:
            return maker.crops(index, *maker.tiles(index))

        held = crops_of(0)
        step = 0
        try:
            while True:
                engine.optimiser_step(made, step, (lambda _: held) if ready else crops_of)
                step += 1
                yield
        finally:
            source.close()

    return turn


# measuring


def seconds_per_step(turn: Turn, steps: int, device: str) -> float:
    running = turn()
    for _ in range(WARM):
        next(running)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(steps):
        next(running)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    spent = time.perf_counter() - begun
    running.close()  # type: ignore[attr-defined]
    return spent / steps


def measure(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    turns = {
        "eosin, whole": eosin_turn(given, folder, ready=False),
        "lightly, whole": lightly_turn(given, folder, ready=False),
        "eosin, step alone": eosin_turn(given, folder, ready=True),
        "lightly, step alone": lightly_turn(given, folder, ready=True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(given.repeats):
        for name, turn in turns.items():
            speeds[name].append(given.batch / seconds_per_step(turn, given.steps, given.device))
            print(f"repeat {repeat}  {name:20s} {speeds[name][-1]:8.2f} images/s", flush=True)
    rows = []
    for name, found in speeds.items():
        baseline = statistics.median(speeds[f"lightly, {name.split(', ')[1]}"])
        median = statistics.median(found)
        rows.append({"method": name, "images_per_s": found, "median": median, "times_lightly": median / baseline})
    return rows


def machine(device: str) -> dict[str, Any]:
    names = ("torch", "timm", "lightly", "torchvision", "numpy")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit,
        "load_before": os.getloadavg()[0],
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = {
        "batch": 32, "steps": 8, "repeats": 3, "workers": 1, "threads": 1, "seed": 0, "tiles": 256, "tile_px": 160,
        "global_px": 128, "local_px": 48, "local": 8, "dim": 192, "depth": 12, "prototypes": 4096, "hidden": 512,
        "bottleneck": 128,
    }  # fmt: skip
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pretrain_throughput.json"))
    return parser.parse_args()


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    told = {name: value for name, value in vars(given).items() if name != "out"}
    command = "python benchmarks/pretrain_throughput.py " + " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in told.items()
    )
    print(command)
    result: dict[str, Any] = {"command": command, "machine": machine(given.device), **told}
    with tempfile.TemporaryDirectory() as folder:
        write_tiles(Path(folder), given.tiles, given.tile_px, given.seed)
        result["methods"] = measure(given, Path(folder))
    for row in result["methods"]:
        print(f"  {row['method']:22s} {row['median']:8.2f} images/s  {row['times_lightly']:5.2f} x lightly")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
