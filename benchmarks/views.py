"""How many tiles a second become two crops of 224 px and eight of 96 px, against torchvision image by image?

    python benchmarks/views.py

One core, tiles of 256 px (Camelyon16, CC0, from $EOSIN_DATA or ../shared/data), the same crops, colours and
probabilities, in interleaved rounds; with and without stain jitter. The loops are what a loader's worker does: PIL
images (upstream DINOv2's way) or uint8 tensors through torchvision's transforms, HED jitter in numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from eosin.pretrain.views import ViewConfig, make_views
from eosin.stain.augment import RUIFROK_HED

ROOT = Path(__file__).resolve().parents[1]
TILES = 32
CONFIG = ViewConfig()


def load_tiles(data: Path) -> torch.Tensor:
    """Return tiles uint8 (32, 3, 256, 256)."""
    files = sorted((data / "tiles" / "camelyon16").glob("*/*.png"))[:TILES]
    if len(files) < TILES:
        raise SystemExit(f"found {len(files)} tiles below {data}, needed {TILES}; set EOSIN_DATA")
    return (
        torch.from_numpy(np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]))
        .movedim(-1, 1)
        .contiguous()
    )


class HedJitter:
    """Tellez' HED jitter of one image in numpy: three stains unmixed, scaled, shifted, mixed."""

    def __init__(self, config: ViewConfig, seed: int = 0) -> None:
        matrix = np.array(RUIFROK_HED, dtype=np.float32)
        self.matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        self.inverse = np.linalg.inv(self.matrix)
        self.config, self.random = config, np.random.default_rng(seed)

    def __call__(self, image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
        pixels = np.asarray(image) if isinstance(image, Image.Image) else image.movedim(0, -1).numpy()
        factor = 1 + self.random.uniform(-1, 1, 3).astype(np.float32) * self.config.stain_scale
        offset = self.random.uniform(-1, 1, 3).astype(np.float32) * self.config.stain_shift
        stains = -np.log((pixels.astype(np.float32) + 1) / 240) @ self.inverse
        out = 240 * np.exp(-((stains * factor + offset) @ self.matrix)) - 1
        out = np.clip(out.round(), 0, 255).astype(np.uint8)
        return Image.fromarray(out) if isinstance(image, Image.Image) else torch.from_numpy(out).movedim(-1, 0)


def pipeline(view: int, config: ViewConfig, *, stain: bool) -> v2.Compose:
    """Return torchvision's transforms of view 0, 1 or 2 (local), for a PIL image or a uint8 tensor."""
    px = config.global_px if view < 2 else config.local_px
    scale = config.global_scale if view < 2 else config.local_scale
    jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue_deg / 360)
    blur = v2.GaussianBlur(13, config.blur_sigma_px)
    steps = [
        v2.RandomResizedCrop(px, scale, config.aspect, v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(config.hflip),
        v2.RandomVerticalFlip(config.vflip),
        *([v2.RandomApply([v2.Lambda(HedJitter(config))], config.stain_probability)] if stain else []),
        v2.RandomApply([jitter], config.jitter),
        v2.RandomGrayscale(config.grey),
        v2.RandomApply([blur], config.blur[view]),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(config.mean, config.std),
    ]
    return v2.Compose(steps)


def one_by_one(images: list[Image.Image] | list[torch.Tensor], *, stain: bool) -> list[torch.Tensor]:
    """Return the views of every image, as a loader's worker and its collation make them."""
    first, second, local = (pipeline(view, CONFIG, stain=stain) for view in range(3))
    order = [first, second, *[local] * CONFIG.local_crops]
    made = [[transform(image) for transform in order] for image in images]
    return [torch.stack(view) for view in zip(*made, strict=True)]


def contenders(tiles: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    plain, generator = replace(CONFIG, stain_probability=0.0), torch.Generator().manual_seed(0)
    pictures = [Image.fromarray(t.movedim(0, -1).contiguous().numpy()) for t in tiles]
    tensors = list(tiles)
    return {
        "eosin": lambda: make_views(tiles, plain, generator),
        "torchvision, PIL": lambda: one_by_one(pictures, stain=False),
        "torchvision, uint8 tensors": lambda: one_by_one(tensors, stain=False),
        "eosin, stain": lambda: make_views(tiles, CONFIG, generator),
        "torchvision, PIL, stain": lambda: one_by_one(pictures, stain=True),
        "torchvision, uint8 tensors, stain": lambda: one_by_one(tensors, stain=True),
    }


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every repeat, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Time the contenders and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "views.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    functions = contenders(load_tiles(Path(os.environ.get("EOSIN_DATA", ROOT.parent / "shared" / "data"))))
    load = os.getloadavg()[0]
    seconds = measure(functions, options.rounds)
    rate = {name: TILES / statistics.median(values) for name, values in seconds.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    result = {
        "question": "tiles of 256 px a second made into 2 x 224 and 8 x 96 px views on one core",
        "command": "python benchmarks/views.py",
        "machine": {"processor": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
        "threads": 1,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow", "numpy")},
        "commit": commit.stdout.strip(),
        "seed": 0,
        "tiles": TILES,
        "seconds": seconds,
        "tiles_per_second": rate,
        "ratio": {
            f"eosin{stain} / {name}{stain}": rate[f"eosin{stain}"] / rate[f"{name}{stain}"]
            for name in ("torchvision, PIL", "torchvision, uint8 tensors")
            for stain in ("", ", stain")
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("tiles_per_second", "ratio")}, indent=1))


if __name__ == "__main__":
    main()
