"""How fast is a fine-tuning step, augmentation on, against a plain loop of peft, PIL and torchvision?

    python benchmarks/finetune_throughput.py IMAGES [--encoder eosin-tiny] [--device cpu] [--batch 32] [--seconds 20]

IMAGES holds labels.csv and the pictures it names. The plain loop is what one writes first: a Dataset that opens a PNG
with PIL and alters it with torchvision, a DataLoader, peft on the fused qkv of the same timm network, BCE, AdamW. The
other is the `amf` recipe of eosin as it is, with adapters on q and v. Both train LoRA of rank 8 on the same network,
batch and input, in interleaved rounds of this one process; with --workers 0 both do everything on the caller's cores. A
third line trains eosin's step without augmentation, a fourth the plain loop without: what the network alone costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from end_to_end import commit, machine
from eosin.encoders import load_encoder
from eosin.finetune.cells import CellTable, read_tiles
from eosin.finetune.classifier import Classifier
from eosin.finetune.folds import Fold, plan_folds
from eosin.finetune.infer import input_of
from eosin.finetune.quicker import quicker
from eosin.finetune.recipe import get_recipe
from eosin.finetune.sampler import epoch_rows
from eosin.finetune.tables import read_table
from eosin.finetune.train import FoldRun, Job

RESULT = Path(__file__).resolve().parent / "results" / "finetune" / "throughput.json"
SEED = 0


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """PNG files, opened by PIL and altered by torchvision, one at a time."""

    def __init__(self, cells: CellTable, mean: tuple[float, ...], std: tuple[float, ...], *, altered: bool) -> None:
        self.files = [cells.root / name for name in cells.file.tolist()]
        self.labels = torch.from_numpy(cells.label.astype(np.float32))
        chosen: list[nn.Module | Callable[..., Any]] = []
        if altered:  # torchvision's own of each family that eosin has; it has no stains
            chosen = [
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                transforms.RandomApply([transforms.GaussianBlur(9, (0.1, 1.6))], p=0.2),
                transforms.RandomApply([transforms.ColorJitter(0.1, 0.1, 0.1, 0.02)], p=0.5),
                transforms.RandomApply(
                    [transforms.RandomAffine(180, (0.06, 0.06), (0.9, 1.1), 5, transforms.InterpolationMode.BILINEAR)],
                    p=0.8,
                ),
            ]
        erased = [transforms.RandomErasing(0.2, (0.005, 0.05))] if altered else []
        self.alter = transforms.Compose([*chosen, transforms.ToTensor(), transforms.Normalize(mean, std), *erased])

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.files)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        """Return one picture and its label."""
        with Image.open(self.files[at]) as picture:
            altered: Any = self.alter(picture.convert("RGB"))
        return altered, self.labels[at]


def plain_loop(cells: CellTable, options: argparse.Namespace, *, altered: bool) -> Iterator[int]:
    """Yield tiles trained after each step of the plain loop, for ever."""
    encoder: Any = load_encoder(options.encoder, device=options.device, backend="torch")
    backbone = encoder.backbone
    backbone.fit(128, 128)
    settings = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["qkv"])
    network = peft.inject_adapter_in_model(settings, backbone.network)
    head = nn.Linear(encoder.spec.width, 1).to(options.device)
    trained = [p for p in (*network.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1)
    pictures = Pictures(cells, encoder.spec.mean, encoder.spec.std, altered=altered)
    loader = DataLoader(pictures, options.batch, shuffle=True, num_workers=options.workers, drop_last=True)
    while True:
        for images, labels in loader:
            images, labels = images.to(options.device), labels.to(options.device)
            with torch.autocast(options.device, torch.bfloat16, enabled=encoder.precision == "bf16"):
                logits = head(backbone(images).cls)[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            float(loss.detach())
            yield len(images)


def eosin_loop(
    cells: CellTable, tiles: np.ndarray, fold: Fold, options: argparse.Namespace, *, altered: bool
) -> Iterator[int]:
    """Yield tiles trained after each step of eosin's recipe, for ever."""
    encoder: Any = load_encoder(options.encoder, device=options.device, backend="torch")
    config = get_recipe("amf", batch=options.batch, **({} if altered else {"augment": None}))
    model = Classifier(encoder.backbone, config.adapt, seed=SEED)
    how = input_of(encoder.spec, tile_px=128)
    job = Job(
        cells=cells, tiles=tiles, fold=fold, config=config, how=how, device=encoder.device, precision=encoder.precision
    )
    run, epoch = FoldRun(model, job, None), 0
    model.train()
    with quicker(model, job.how, device=job.device, precision=job.precision):
        while True:
            order = epoch_rows(run.groups, seed=SEED, epoch=epoch)
            for step in range(len(order) // options.batch):
                chosen = order[step * options.batch : (step + 1) * options.batch]
                run.step(chosen, epoch=min(epoch, config.epochs - 1), step=step)
                yield len(chosen)
            epoch += 1


def rate(loop: Iterator[int], seconds: float) -> float:
    """Return tiles a second over whole steps of at least `seconds`."""
    next(loop)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        done += next(loop)
    return done / (time.perf_counter() - begun)


def main() -> None:
    """Time the loops in interleaved rounds, and keep every repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--encoder", default="eosin-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="of the plain loop's DataLoader")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = read_table(options.images)
    cells = table.take(table.dataset == "midog21") if (table.dataset == "midog21").any() else table
    tiles, fold = read_tiles(cells), plan_folds(cells, get_recipe("amf"))[0]
    loops = {
        "eosin": eosin_loop(cells, tiles, fold, options, altered=True),
        "plain": plain_loop(cells.take(fold.train), options, altered=True),
        "eosin, no augmentation": eosin_loop(cells, tiles, fold, options, altered=False),
        "plain, no augmentation": plain_loop(cells.take(fold.train), options, altered=False),
    }
    repeats: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, loop in loops.items():
            repeats[name].append(rate(loop, options.seconds))
    middle = {name: statistics.median(values) for name, values in repeats.items()}
    result = {
        "command": f"python benchmarks/finetune_throughput.py IMAGES --encoder {options.encoder} --device "
        f"{options.device} --batch {options.batch} --workers {options.workers}",
        "machine": machine(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "seed": SEED,
        "tiles_per_s": repeats,
        "ratio": middle["eosin"] / middle["plain"],
        "ratio_no_augmentation": middle["eosin, no augmentation"] / middle["plain, no augmentation"],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, values in repeats.items():
        print(f"{name:26s} {statistics.median(values):8.1f} tiles/s  {[round(v, 1) for v in values]}")
    print(f"eosin / plain, augmentation on: {result['ratio']:.2f}; off: {result['ratio_no_augmentation']:.2f}")


if __name__ == "__main__":
    main()
