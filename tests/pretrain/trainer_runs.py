"""Small runs for the trainer's tests: textures that a network can tell apart, and a network that trains in a second."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eosin.pretrain.config import PretrainConfig, parse_config
from eosin.pretrain.inputs import Factors, make_crops
from eosin.pretrain.loading import Loading
from eosin.pretrain.objective import Crops
from eosin.pretrain.tilesource import TileConfig, TileSource

TILE_PX = 40
NO_FACTORS = Factors(codes={}, names={}, remarks=())


def texture(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Return one of four stained-looking textures, uint8 (40, 40, 3), of random phase, turn, colour and noise."""
    y, x = np.mgrid[:TILE_PX, :TILE_PX]
    turn, phase = rng.uniform(0, np.pi), rng.uniform(0, 6)
    wave = (0.25, 0.5, 0.9, 0.5)[kind]
    lines = np.sin(wave * (x * np.cos(turn) + y * np.sin(turn)) + phase)
    pattern = np.sin(wave * x) * np.sin(wave * y + phase) if kind == 3 else lines
    colour = np.array([200, 140, 180]) + rng.uniform(-15, 15, 3)
    return np.clip(
        colour + pattern[..., None] * [25, 30, 20] + rng.normal(0, 12, (TILE_PX, TILE_PX, 3)), 0, 255
    ).astype(np.uint8)


def write_tiles(path: Path, count: int, seed: int = 0) -> Path:
    """Write tiles as an array file, kinds in turn."""
    rng = np.random.default_rng(seed)
    np.save(path, np.stack([texture(i % 4, rng) for i in range(count)]))
    return path


def write_held_out(folder: Path, count: int, seed: int = 1) -> Path:
    """Write labelled images of patients of four, one of each kind, and return their table."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with (folder / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "patient_id"))
        for i in range(count):
            Image.fromarray(texture(i % 4, rng)).save(folder / f"{i}.png")
            rows.writerow((f"{i}.png", f"kind{i % 4}", f"p{i // 4}"))
    return folder / "table.csv"


def small(path: Path, **changes: Any) -> PretrainConfig:
    """Return the config of a run on an array file; `section__key` changes a value."""
    table: dict[str, dict[str, Any]] = {
        "model": {"dim": 64, "depth": 2, "heads": 1, "patch_px": 8, "position_grid": 4, "registers": 1},
        "data": {"paths": [str(path)], "kind": "tiles", "slide_mpp": 0.5, "sample": {"tile_px": TILE_PX}},
        "views": {"global_px": 32, "local_px": 16, "local_crops": 2, "blur_sigma_px": [0.1, 1.0]},
        "objective": {"prototypes": 64, "hidden": 32, "bottleneck": 16, "koleo": 0.0, "kde": 0.05},
        "optimizer": {"lr": 1e-3, "lr_rule": "none"},
        "schedule": {"warmup": 0.1, "momentum": [0.98, 1.0], "freeze_last_layer": 0.0},
        "budget": {"steps": 4},
        "run": {"batch": 4, "precision": "fp32", "save_every": 100},
        "watch": {"log_every": 1, "probe_every": 1000, "stop_on_collapse": False},
    }
    table["model"] |= {"layer_scale": 0.1, "drop_path": 0.1}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        table[section][name] = value
    return parse_config({key: {k: v for k, v in part.items() if v is not None} for key, part in table.items()})


def source(config: PretrainConfig, *, rank: int = 0, world: int = 1) -> TileSource:
    """Return the run's tiles, read in this process."""
    wanted = TileConfig(tile_px=TILE_PX, mpp=0.5, seed=config.run.seed)
    return TileSource(config.data.paths, wanted, loading=Loading(workers=0, rank=rank, world=world))


def crops_of(config: PretrainConfig, index: int = 0) -> Crops:
    """Return the crops of a micro-step."""
    batch = source(config).batch(index, config.run.batch)
    return make_crops(config, NO_FACTORS, batch.tiles, batch.slide, (index, 0))


def part_of(crops: Crops, rank: int, world: int) -> Crops:
    """Return one rank's share of the crops."""
    batch = len(crops.images[0]) // 2

    def share(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([view[rank * batch // world : (rank + 1) * batch // world] for view in rows.split(batch)])

    hidden = None if crops.hidden is None else share(crops.hidden)
    places = None if hidden is None else hidden.flatten().nonzero().flatten()
    return Crops(images=[share(part) for part in crops.images], hidden=hidden, places=places, factors={})
