"""What training is tested on: a tiny seeded vision transformer, and cells whose class a small network can learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from cellgen import cell_table
from PIL import Image
from safetensors.torch import save_file

from eosin.encoders import load_encoder
from eosin.encoders.encoder import Encoder
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.cells import CellTable
from eosin.finetune.classifier import Classifier
from eosin.finetune.folds import plan_folds
from eosin.finetune.infer import input_of
from eosin.finetune.recipe import FinetuneConfig, get_recipe
from eosin.finetune.train import Job

QUICK: dict[str, Any] = {"epochs": 4, "batch": 16, "folds": 3, "lr": 3e-3, "augment": None, "ema": 0.5, "tta": "none"}


def quick(**changes: Any) -> FinetuneConfig:
    """Return a recipe that a test has time for."""
    return get_recipe("amf", **{**QUICK, **changes})


def write_encoder(path: Path, *, seed: int = 0) -> Path:
    """Write a vision transformer of 16 patches, two blocks and 64 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=0,
            img_size=128,
            patch_size=32,
            embed_dim=64,
            depth=2,
            num_heads=1,
            mlp_ratio=2,
        )
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name in ("cls_token", "pos_embed"):
                    parameter.normal_(std=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), path)
    return path


def encoder(folder: Path) -> Encoder:
    """Return a fresh encoder of `write_encoder`."""
    path = folder / "tiny.safetensors"
    found = load_encoder(path if path.is_file() else write_encoder(path), device="cpu", precision="fp32")
    assert isinstance(found, Encoder)
    return found


def classifier(folder: Path, *, seed: int = 0, **adapt: Any) -> Classifier:
    """Return a classifier on a fresh encoder."""
    return Classifier(encoder(folder).backbone, AdaptConfig(**adapt), seed=seed)


def cells_and_tiles(
    slides: int = 18, each: int = 6, *, seed: int = 0, scanners: tuple[str, ...] = ("A", "B")
) -> tuple[CellTable, npt.NDArray[np.uint8]]:
    """Return cells of which a third is atypical, shown as a figure that is dark and wide; scanners differ in tint."""
    rng = np.random.default_rng(seed)
    n = slides * each
    label = rng.permuted(np.tile([1] * (each // 3) + [0] * (each - each // 3), (slides, 1)), axis=1).ravel()
    scanner = np.array([scanners[at // each % len(scanners)] for at in range(n)])
    y, x = np.mgrid[:128, :128] - 63.5
    tiles = np.empty((n, 128, 128, 3), dtype=np.uint8)
    for at in range(n):
        tissue = np.array([226, 170, 206]) - 10 * (scanner[at] == scanners[-1])
        mixed = rng.random((32, 32)).repeat(4, 0).repeat(4, 1)[..., None]
        picture = tissue * (1 - 0.4 * mixed) + np.array([110, 70, 150]) * 0.4 * mixed
        wide = 34 if label[at] else 14
        figure = (x / wide) ** 2 + (y / 18) ** 2 < 1
        picture[figure] = np.array([70, 40, 110])
        tiles[at] = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255)
    table = cell_table(
        label.tolist(),
        slides=[f"s{at // each:02d}" for at in range(n)],
        files=[f"cell-{at:03d}.png" for at in range(n)],
    )
    return replace(table, scanner=scanner, domain=scanner), tiles


def write_cells(folder: Path, *, external: int = 4, **how: Any) -> Path:
    """Write cells as pictures and a table labels.csv; the last `external` slides are of the set "other"."""
    cells, tiles = cells_and_tiles(**how)
    folder.mkdir(parents=True, exist_ok=True)
    slides = np.unique(cells.slide_id)
    lines = ["file,dataset,slide_id,scanner,atypical"]
    for at, tile in enumerate(tiles):
        Image.fromarray(tile).save(folder / cells.file[at])
        other = cells.slide_id[at] in slides[len(slides) - external :]
        lines.append(
            f"{cells.file[at]},{'other' if other else 'own'},{cells.slide_id[at]},{cells.scanner[at]},{cells.label[at]}"
        )
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def job(folder: Path, *, config: FinetuneConfig | None = None, **how: Any) -> Job:
    """Return the first fold of `cells_and_tiles`."""
    cells, tiles = cells_and_tiles(**how)
    settings = config or quick()
    eyes = input_of(encoder(folder).spec, tile_px=128, input_px=settings.input_px, crop_px=settings.crop_px)
    return Job(cells=cells, tiles=tiles, fold=plan_folds(cells, settings)[0], config=settings, how=eyes)
