"""How fast do we read? 512 px at 0.25 mpp into 256 px tiles at 0.5 mpp, against a plain OpenSlide loop.

    python benchmarks/reading.py --slide /somewhere/big.svs --size-px 24576

The slide is made by slidemaker.py when it is not there. Tiles with at least half tissue are read in row-major
order, each thread a contiguous run of them, on a grid aligned to the file's native tiles and on one shifted by
100 px. Every reading starts with a fresh reader (empty caches) on a file the system has in memory. Repeats
interleave the methods, so that a drifting machine touches all alike.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openslide
import simplejpeg
import tifffile
from PIL import Image

from eosin.slides import open_slide
from eosin.slides.jpegtiles import JpegTiles
from slidemaker import MPP, make_slide

Pixels = npt.NDArray[np.uint8]
Read = Callable[[tuple[int, int]], Pixels]
Method = Callable[[Path], tuple[Read, Callable[[], None]]]

READ_PX, TILE_PX, SHIFT_PX, TARGET_MPP = 512, 256, 100, 0.5
BASELINE = "OpenSlide, PIL resize"
EOSIN = "eosin Slide.read_tile"


def resized(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR))


def plain_openslide(path: Path) -> tuple[Read, Callable[[], None]]:
    slide = openslide.OpenSlide(path)

    def read(xy: tuple[int, int]) -> Pixels:
        region = slide.read_region(xy, 0, (READ_PX, READ_PX)).convert("RGB")
        return np.asarray(region.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR))

    return read, slide.close


def eosin_slide(path: Path) -> tuple[Read, Callable[[], None]]:
    slide = open_slide(path)
    plan = slide.plan(tile_px=TILE_PX, mpp=TARGET_MPP)
    return lambda xy: slide.read_tile(xy, plan).rgb, slide.close


def jpegtiles(path: Path) -> JpegTiles:
    with openslide.OpenSlide(path) as slide:
        reader = JpegTiles.open(path, slide.level_dimensions)
    if reader is None:
        raise SystemExit(f"{path} has no JPEG tiles that eosin reads directly")
    return reader


def direct_dct(path: Path) -> tuple[Read, Callable[[], None]]:
    reader, size = jpegtiles(path), (TILE_PX, TILE_PX)
    return lambda xy: reader.read_region((xy[0] // 2, xy[1] // 2), level=0, scale=2, size_px=size), reader.close


def direct_full(path: Path) -> tuple[Read, Callable[[], None]]:
    reader, size = jpegtiles(path), (READ_PX, READ_PX)
    return lambda xy: resized(reader.read_region(xy, level=0, scale=1, size_px=size)), reader.close


def fastslide_loop(path: Path) -> tuple[Read, Callable[[], None]]:
    slide = importlib.import_module("fastslide").FastSlide.from_file_path(str(path))
    size = (READ_PX, READ_PX)
    return lambda xy: resized(np.asarray(slide.read_region(xy, 0, size).numpy())[..., :3]), slide.close


def methods() -> dict[str, Method]:
    found: dict[str, Method] = {
        BASELINE: plain_openslide,
        EOSIN: eosin_slide,
        "JpegTiles, DCT 1/2": direct_dct,
        "JpegTiles, full decode, PIL resize": direct_full,
    }
    try:
        importlib.metadata.version("fastslide")
    except importlib.metadata.PackageNotFoundError:
        return found
    return {**found, "fastslide, PIL resize": fastslide_loop}


def grid(path: Path, shift: int, limit: int) -> list[tuple[int, int]]:
    """Return at most `limit` level-0 origins, row-major, of tiles with at least half tissue."""
    with openslide.OpenSlide(path) as slide:
        level = slide.level_count - 1
        image = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3].astype(int)
        factor, (width, height) = slide.level_downsamples[level], slide.dimensions
    tissue = image.max(axis=2) - image.min(axis=2) > 30
    places: list[tuple[int, int]] = []
    for y in range(shift, height - READ_PX + 1, READ_PX):
        for x in range(shift, width - READ_PX + 1, READ_PX):
            rows, columns = (slice(int(at / factor), int((at + READ_PX) / factor)) for at in (y, x))
            if tissue[rows, columns].mean() >= 0.5:
                places.append((x, y))
    if not places or (0, 0) in places:
        raise SystemExit(f"{path}: needs tissue, and bare glass in its top-left corner")
    return places[:limit]


def tiles_per_second(read: Read, places: Sequence[tuple[int, int]], threads: int) -> float:
    """Return the rate of reading all `places`, each thread a contiguous run of them."""
    edges = np.linspace(0, len(places), threads + 1).astype(int)
    runs = [places[edges[at] : edges[at + 1]] for at in range(threads)]

    def work(run: Sequence[tuple[int, int]]) -> None:
        for xy in run:
            read(xy)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [[(0, 0)]] * threads))  # starts the threads; the corner is bare glass, not among `places`
        started = time.perf_counter()
        list(pool.map(work, runs))
        return len(places) / (time.perf_counter() - started)


def native_streams(path: Path, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return complete JPEG streams of the native tiles under `places`, each once, in reading order."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        side, columns, tables = page.tilewidth, -(-page.imagewidth // page.tilewidth), page.jpegtables
        wanted = dict.fromkeys(
            row * columns + column
            for x, y in places
            for row in range(y // side, (y + READ_PX - 1) // side + 1)
            for column in range(x // side, (x + READ_PX - 1) // side + 1)
        )
        head = b"\xff\xd8" + (tables[2:-2] if tables else b"")
        raw = path.read_bytes()
        return [head + raw[page.dataoffsets[at] + 2 : page.dataoffsets[at] + page.databytecounts[at]] for at in wanted]


def decode_limit(streams: Sequence[bytes], tiles: int, threads: int, side: int) -> float:
    """Return tiles per second if only the codec worked: each native tile once, straight from memory."""

    def work(run: Sequence[bytes]) -> None:
        for stream in run:
            simplejpeg.decode_jpeg(stream, min_height=side, min_width=side)

    edges = np.linspace(0, len(streams), threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(work, [streams[edges[at] : edges[at + 1]] for at in range(threads)]))
        return tiles / (time.perf_counter() - started)


def psnr(image: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / np.mean((image.astype(float) - other.astype(float)) ** 2)))


def fidelity(path: Path, places: Sequence[tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Return PSNR in dB of each way to halve a tile against box means of its full decode, 40 tiles."""
    reader = jpegtiles(path)
    scores: dict[str, list[float]] = {"DCT 1/2": [], "PIL bilinear": []}
    for x, y in places[:: max(1, len(places) // 40)][:40]:
        full = reader.read_region((x, y), level=0, scale=1, size_px=(READ_PX, READ_PX))
        boxes = full.reshape(TILE_PX, 2, TILE_PX, 2, 3).mean(axis=(1, 3))
        dct = reader.read_region((x // 2, y // 2), level=0, scale=2, size_px=(TILE_PX, TILE_PX))
        scores["DCT 1/2"].append(psnr(dct, boxes))
        scores["PIL bilinear"].append(psnr(resized(full), boxes))
    reader.close()
    return {
        name: {"median_db": statistics.median(values), "worst_db": min(values), "tiles": len(values)}
        for name, values in scores.items()
    }


def measure(path: Path, places: Sequence[tuple[int, int]], threads: int, repeats: int) -> dict[str, list[float]]:
    """Return tiles per second of every repeat of every method, methods interleaved."""
    rates: dict[str, list[float]] = {}
    streams, compared = native_streams(path, places), methods()
    for _ in range(repeats):
        for name, method in compared.items():
            read, close = method(path)
            rates.setdefault(name, []).append(tiles_per_second(read, places, threads))
            close()
        for name, side in (("codec only, DCT 1/2", 128), ("codec only, full", 256)):
            rates.setdefault(name, []).append(decode_limit(streams, len(places), threads, side))
    return rates


def summary(rates: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return per method its repeats, their median and the ratio of medians to the plain loop."""
    base = statistics.median(rates[BASELINE])
    return {
        name: {
            "tiles_per_s": [round(value, 1) for value in values],
            "median": round(statistics.median(values), 1),
            "ratio": round(statistics.median(values) / base, 2),
        }
        for name, values in rates.items()
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, versions, commit, load."""
    packages = ("numpy", "pillow", "openslide-python", "openslide-bin", "simplejpeg", "tifffile", "fastslide")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast do we read tiles?")
    parser.add_argument("--slide", type=Path, required=True, help="made when it is not there")
    parser.add_argument("--size-px", type=int, default=24_576, help="side of a slide that is made")
    parser.add_argument("--seed", type=int, default=0, help="of a slide that is made")
    parser.add_argument("--tiles", type=int, default=100_000, help="read at most so many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reading.json")
    return parser.parse_args()


def main() -> None:
    given = options()
    command = f"python benchmarks/reading.py --slide {given.slide.name} --size-px {given.size_px} --seed {given.seed}"
    command += f" --tiles {given.tiles} --repeats {given.repeats}"
    print(command)
    result: dict[str, Any] = {"command": command, "machine": machine(), "seed": given.seed}
    if not given.slide.exists():
        make_slide(given.slide, size_px=given.size_px, seed=given.seed)
    with openslide.OpenSlide(given.slide) as slide:
        if float(slide.properties["openslide.mpp-x"]) != MPP:
            raise SystemExit(f"{given.slide} is not at {MPP} mpp")
        result["slide"] = {"size_px": slide.dimensions, "bytes": given.slide.stat().st_size}
    given.slide.read_bytes()
    result["rates"] = []
    for name, shift in (("aligned", 0), (f"shifted {SHIFT_PX} px", SHIFT_PX)):
        places = grid(given.slide, shift, given.tiles)
        for threads in (1, 2):
            rows = summary(measure(given.slide, places, threads, given.repeats))
            result["rates"].append({"grid": name, "threads": threads, "tiles": len(places), "methods": rows})
            print(f"\n{name}, {threads} thread(s), {len(places)} tiles: tiles/s (lowest-highest), ratio to {BASELINE}")
            for method, row in rows.items():
                low, high = min(row["tiles_per_s"]), max(row["tiles_per_s"])
                print(f"  {method:36s} {row['median']:7.0f} ({low:.0f}-{high:.0f})  {row['ratio']:.2f}x")
    result["psnr_to_box_means"] = fidelity(given.slide, grid(given.slide, 0, given.tiles))
    print("\nPSNR to box means of the full decode:", json.dumps(result["psnr_to_box_means"]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
