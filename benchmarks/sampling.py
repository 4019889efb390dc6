"""How fast are training tiles drawn from slides? Against OpenSlide handles kept open in a torch DataLoader.

    python benchmarks/sampling.py --folder /somewhere --slides 4,64

Slides are made by slidemaker.py where they are not there; beyond the first four they are links to those, each opened
by itself. Tiles of 224 px lie at random on tissue at log-uniform 0.25-2 mpp, the slide drawn anew for each. Both read
the same places: eosin's source draws them as it goes; the DataLoader is given the list, reads the best level with
`read_region` and resizes with PIL (bilinear). Each worker of either keeps up to 64 slides open. Repeats interleave
the methods and read different steps, so that no method finds tiles that another decoded; the first batch, which starts
the workers, is not counted. Untimed: what drawing costs the training process, and how long one that computes for
`--step-s` a batch waits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from eosin.features.jobs import Job
from eosin.pretrain.loading import Loading
from eosin.pretrain.sampling import SampleConfig
from eosin.pretrain.sources import SlideSource, measure
from slidemaker import make_slide

TILE_PX, MPP, SLIDE_MPP, MADE, OPEN = 224, (0.25, 2.0), 0.25, 4, 64
BASELINE, EOSIN = "OpenSlide in a DataLoader", "eosin SlideSource"
Place = tuple[Path, tuple[int, int], float]


class PlainTiles(Dataset):
    """Tiles at given places, the way it is usually written."""

    def __init__(self, places: list[Place]) -> None:
        self.places = places
        self.slides: OrderedDict[Path, openslide.OpenSlide] = OrderedDict()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        path, xy, mpp = self.places[index]
        if path not in self.slides:
            self.slides[path] = openslide.OpenSlide(path)
            if len(self.slides) > OPEN:
                self.slides.popitem(last=False)[1].close()
        self.slides.move_to_end(path)
        slide = self.slides[path]
        level = slide.get_best_level_for_downsample(mpp / SLIDE_MPP)
        side = round(TILE_PX * mpp / SLIDE_MPP / slide.level_downsamples[level])
        region = slide.read_region(xy, level, (side, side)).convert("RGB")
        pixels = np.array(region.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def slides(folder: Path, count: int, size_px: int, seed: int) -> list[Job]:
    """Return `count` slides in `folder`, made or linked."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for index in range(count):
        path = folder / f"{size_px}-{index:04d}.svs"
        if not path.exists():
            if index < MADE:
                make_slide(path, size_px=size_px, seed=seed + index)
            else:
                os.link(folder / f"{size_px}-{index % MADE:04d}.svs", path)
        jobs.append(Job(slide_id=path.name, source=path))
    return jobs


def places_of(source: SlideSource, steps: range, size: int) -> list[Place]:
    """Return where the tiles of `steps` lie: the first position of each draw, which is read unless it is damaged."""
    nobody = np.zeros(len(source.jobs), dtype=bool)
    draws = [source._draw(number, 0, nobody) for number in range(steps.start * size, steps.stop * size)]
    return [(d.request.job.source, tuple(d.request.xy[0].tolist()), d.mpp) for d in draws if len(d.request.xy)]


def rate_of_eosin(source: SlideSource, steps: range, size: int) -> tuple[float, torch.Tensor]:
    """Return tiles/s over all but the first of `steps`, and the last batch."""
    source.batch(steps.start, size)
    started = time.perf_counter()
    for step in steps[1:]:
        batch = source.batch(step, size)
    return (len(steps) - 1) * size / (time.perf_counter() - started), batch.tiles


def rate_of_plain(places: list[Place], workers: int, size: int) -> tuple[float, torch.Tensor]:
    """Return tiles/s over all but the first batch, and the last batch."""
    loader = iter(DataLoader(PlainTiles(places), batch_size=size, num_workers=workers))
    next(loader)
    started = time.perf_counter()
    tiles = torch.empty(0)
    count = 0
    for tiles in loader:
        count += len(tiles)
    return count / (time.perf_counter() - started), tiles


def compare(jobs: list[Job], workers: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return rates of all repeats, methods interleaved, and how far their pixels are apart."""
    config = SampleConfig(tile_px=TILE_PX, mpp=MPP, seed=given.seed)
    rates: dict[str, list[float]] = {BASELINE: [], EOSIN: []}
    with SlideSource(jobs, config, loading=Loading(workers=workers)) as source:
        source.batch(10**6, given.size)
        for repeat in range(given.repeats):
            steps = range(repeat * given.steps, (repeat + 1) * given.steps)
            rate, ours = rate_of_eosin(source, steps, given.size)
            rates[EOSIN].append(rate)
            # Other places, or the second method would find its slides' bytes just read by the first.
            rate, _ = rate_of_plain(
                places_of(source, range(10**5 + steps.start, 10**5 + steps.stop), given.size), workers, given.size
            )
            rates[BASELINE].append(rate)
        last = range(steps.stop - 1, steps.stop)
        plain = torch.stack(list(PlainTiles(places_of(source, last, given.size))))
        apart = (plain.float() - ours.float()).abs().mean().item() if len(plain) == len(ours) else None
        started = time.perf_counter()
        places_of(source, range(2 * 10**5, 2 * 10**5 + 4), given.size)
        draw_us = (time.perf_counter() - started) / (4 * given.size) * 1e6
        busy = measure(source, size=given.size, seconds=given.busy_s, step_s=given.step_s)
    base = statistics.median(rates[BASELINE])
    return {
        "slides": len(jobs),
        "workers": workers,
        "methods": {
            name: {
                "tiles_per_s": [round(value, 1) for value in values],
                "median": round(statistics.median(values), 1),
                "ratio": round(statistics.median(values) / base, 2),
            }
            for name, values in rates.items()
        },
        "mean_difference_grey_levels": None if apart is None else round(apart, 2),
        "draw_us_per_tile": round(draw_us, 1),
        "busy": {
            "step_s": given.step_s,
            "tiles_per_s": round(busy.tiles_per_s, 1),
            "waited": round(busy.waited, 3),
            "batches": busy.batches,
        },
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, versions, commit, load."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = ("numpy", "pillow", "openslide-python", "openslide-bin", "simplejpeg", "torch")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit.stdout.strip(),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast are training tiles drawn from slides?")
    parser.add_argument("--folder", type=Path, required=True, help="of the slides")
    parser.add_argument("--slides", default="4,64", help="numbers of slides")
    parser.add_argument("--workers", default="0,2", help="numbers of workers")
    parser.add_argument("--size-px", type=int, default=8192, help="side of the slides")
    parser.add_argument("--size", type=int, default=64, help="tiles of a batch")
    parser.add_argument("--steps", type=int, default=6, help="batches of a repeat, the first not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-s", type=float, default=0.5, help="what a training step takes")
    parser.add_argument("--busy-s", type=float, default=6.0, help="how long such training is watched")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sampling.json")
    return parser.parse_args()


def main() -> None:
    given = options()
    command = f"python benchmarks/sampling.py --folder {given.folder.name} --slides {given.slides}"
    command += f" --workers {given.workers} --size-px {given.size_px} --size {given.size} --steps {given.steps}"
    command += f" --repeats {given.repeats} --step-s {given.step_s:g} --busy-s {given.busy_s:g} --seed {given.seed}"
    print(command)
    result: dict[str, Any] = {"command": command, "machine": machine(), "seed": given.seed, "runs": []}
    for count in map(int, given.slides.split(",")):
        jobs = slides(given.folder, count, given.size_px, given.seed)
        for workers in map(int, given.workers.split(",")):
            run = compare(jobs, workers, given)
            result["runs"].append(run)
            print(f"\n{count} slides, {workers} workers: tiles/s (lowest-highest), ratio to {BASELINE}")
            for name, row in run["methods"].items():
                low, high = min(row["tiles_per_s"]), max(row["tiles_per_s"])
                print(f"  {name:28s} {row['median']:7.0f} ({low:.0f}-{high:.0f})  {row['ratio']:.2f}x")
            print(f"  mean difference {run['mean_difference_grey_levels']} grey levels", end="")
            print(f", {run['draw_us_per_tile']} µs to draw a tile, with {given.step_s:g} s steps: {run['busy']}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
