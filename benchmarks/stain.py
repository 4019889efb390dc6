"""How long does it take to normalise the stains of 64 tiles of 224 px, against torchstain's loop?

    python benchmarks/stain.py

Both fit every tile and normalise it to the same target, on two threads, on the same tiles
(Camelyon16, CC0, from $EOSIN_DATA or ../shared/data), in interleaved rounds. "slide fit" is what
torchstain does not have: one fit of the slide, made before, applied to the batch.
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
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchstain
from PIL import Image

from eosin.stain import Macenko, Reinhard, Vahadane

ROOT = Path(__file__).resolve().parents[1]
THREADS, TILES, TILE_PX = 2, 64, 224


def load_tiles(data: Path) -> torch.Tensor:
    """Return the first tiles, cut to 224 px, uint8 (64, 3, 224, 224)."""
    files = sorted((data / "tiles" / "camelyon16").glob("*/*.png"))[:TILES]
    if len(files) < TILES:
        raise SystemExit(f"found {len(files)} tiles below {data}, needed {TILES}; set EOSIN_DATA")
    images = [np.asarray(Image.open(file).convert("RGB"))[:TILE_PX, :TILE_PX] for file in files]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous()


def contenders(tiles: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name: functions that normalise all tiles to the first one's stains."""
    macenko, reinhard, vahadane = Macenko(), Reinhard(), Vahadane()
    target, lab_target = macenko.fit(tiles[:1]).target(), reinhard.fit(tiles[:1]).target()
    vahadane_target, slide = vahadane.fit(tiles[:1]).target(), macenko.fit(tiles)
    arrays = [np.ascontiguousarray(tile.movedim(0, -1).numpy()) for tile in tiles]
    in_torch, in_numpy = (torchstain.normalizers.MacenkoNormalizer(backend=name) for name in ("torch", "numpy"))
    lab_torch = torchstain.normalizers.ReinhardNormalizer(backend="torch")
    in_torch.fit(tiles[0])
    in_numpy.fit(arrays[0])
    lab_torch.fit(tiles[0])
    return {
        "eosin Macenko": lambda: macenko.normalise(tiles, None, target)[0],
        "eosin Macenko, slide fit": lambda: macenko.normalise(tiles, slide, target)[0],
        "torchstain Macenko, torch": lambda: [in_torch.normalize(tile, stains=False)[0] for tile in tiles],
        "torchstain Macenko, numpy": lambda: [in_numpy.normalize(tile, stains=False)[0] for tile in arrays],
        "eosin Reinhard": lambda: reinhard.normalise(tiles, None, lab_target)[0],
        "torchstain Reinhard, torch": lambda: [lab_torch.normalize(tile) for tile in tiles],
        "eosin Vahadane": lambda: vahadane.normalise(tiles, None, vahadane_target)[0],
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


def difference(functions: dict[str, Callable[[], object]]) -> float:
    """Return the mean difference in grey levels between eosin's and torchstain's Macenko images."""
    ours = functions["eosin Macenko"]()
    theirs = torch.from_numpy(np.stack(functions["torchstain Macenko, numpy"]()).astype(np.int64))  # type: ignore[arg-type]
    return float((ours.movedim(1, -1).long() - theirs).abs().double().mean())  # type: ignore[attr-defined]


def main() -> None:
    """Time the contenders and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "stain.json")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    tiles = load_tiles(Path(os.environ.get("EOSIN_DATA", ROOT.parent / "shared" / "data")))
    functions = contenders(tiles)
    load = os.getloadavg()[0]
    seconds = measure(functions, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    result = {
        "question": "seconds to fit and normalise 64 tiles of 224 px",
        "command": "python benchmarks/stain.py",
        "machine": {"processor": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
        "threads": THREADS,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("torch", "torchstain", "numpy")},
        "commit": commit.stdout.strip(),
        "seconds": seconds,
        "median_seconds": median,
        "tiles_per_second": {name: TILES / value for name, value in median.items()},
        "ratio": {
            "Macenko, torchstain torch / eosin": median["torchstain Macenko, torch"] / median["eosin Macenko"],
            "Macenko, torchstain numpy / eosin": median["torchstain Macenko, numpy"] / median["eosin Macenko"],
            "Macenko, torchstain torch / eosin slide fit": median["torchstain Macenko, torch"]
            / median["eosin Macenko, slide fit"],
            "Reinhard, torchstain torch / eosin": median["torchstain Reinhard, torch"] / median["eosin Reinhard"],
        },
        "mean_grey_level_difference_to_torchstain": difference(functions),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("tiles_per_second", "ratio")}, indent=1))


if __name__ == "__main__":
    main()
