"""Does the memory of `eosin extract` grow with the number of tiles?

    python benchmarks/memory.py

Three runs of the command line, each in a session of its own: a slide of about 10,000 tiles; the part of a large slide
that holds about as many, through a region of interest; the whole large slide, about 100,000. Tiles are 112 px at
0.5 mpp, so that even the small plan fills the cache of decoded native tiles. The encoder is a stand-in of 1,024 numbers
that costs next to nothing; everything else is the command as a user runs it: readers, QC, store, summary.

The small slide differs from the large one in its tissue mask too, which grows with the area; the part does not.

Memory is summed over the parent and its readers: PSS (shared pages counted once) and RSS, sampled from /proc every
0.2 s, and the sum of the processes' own high-water marks, which no spike between samples escapes.

The slides are BigTIFFs whose tile tables name the same few hundred JPEG streams again and again: real texture, a
size on disk that does not grow, and no reader can know.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from end_to_end import commit, machine, session_memory
from slidemaker import FACTORS, MPP, QUALITY, TILE_PX, Mosaic, encode

HERE = Path(__file__).resolve().parent
PERIOD_PX = 4096
SIDE_PX, TARGET_MPP, DIM_SIDE = 112, 0.5, 32
SEED = 0
# Tags and types of TIFF 6.0 and BigTIFF.
SHORT, LONG, LONG8, ASCII, BYTES = 3, 4, 16, 2, 7


class Wallpaper(Mosaic):
    """4,096 px of tissue without background, repeated."""

    def is_tissue(self, row: int, column: int) -> bool:
        return True


def streams(factor: int) -> tuple[list[list[bytes]], bytes, bytes]:
    """Return the native tiles of one period at `factor` by row and column, one of bare glass, and their tables."""
    mosaic = Wallpaper(PERIOD_PX, SEED)
    side = PERIOD_PX // factor
    glass, tables = encode(mosaic.background[:TILE_PX, :TILE_PX])
    rows = []
    for top in range(0, side, TILE_PX):
        band = mosaic.reduced_band(top, factor)
        rows.append([encode(band[:, left : left + TILE_PX])[0] for left in range(0, side, TILE_PX)])
    return rows, glass, tables


def directory(tags: Sequence[tuple[int, int, Any]], at: int) -> tuple[bytes, int]:
    """Return a BigTIFF directory for offset `at`, long values behind it, and where in it the next offset goes."""
    formats = {SHORT: "H", LONG: "I", LONG8: "Q"}
    entries, behind = b"", b""
    room = at + 8 + 20 * len(tags) + 8
    for tag, kind, value in sorted(tags):
        values = (
            value if isinstance(value, (bytes, np.ndarray)) else struct.pack(f"<{len(value)}{formats[kind]}", *value)
        )
        data = values if isinstance(values, bytes) else values.tobytes()
        count = len(value) if kind not in (ASCII, BYTES) else len(data)
        entries += struct.pack("<HHQ", tag, kind, count)
        if len(data) <= 8:
            entries += data.ljust(8, b"\0")
        else:
            entries += struct.pack("<Q", room + len(behind))
            behind += data + b"\0" * (-len(data) % 8)
    start = struct.pack("<Q", len(tags)) + entries
    return start + struct.pack("<Q", 0) + behind, len(start)


def tile_table(size_px: int, tissue_px: int, factor: int, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return which stream each native tile shows, (n,): -1 for glass; tissue is a square in the middle."""
    count, step = size_px // factor // TILE_PX, TILE_PX * factor
    first = (size_px - tissue_px) // 2
    at = np.arange(count) * step
    inside = (at >= first) & (at < first + tissue_px)
    period = len(places)
    which = places[(np.arange(count) % period)[:, None], (np.arange(count) % period)[None]]
    return np.where(inside[:, None] & inside[None], which, -1).ravel()


def make_slide(path: Path, *, size_px: int, tissue_px: int) -> None:
    """Write a square Aperio-like slide of shared streams; both sides multiples of 4,096."""
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = 8
        for factor in FACTORS:
            rows, glass, tables = streams(factor)
            every = [glass, *(stream for row in rows for stream in row)]
            starts = []
            for stream in every:
                starts.append(file.tell())
                file.write(stream)
            which = tile_table(size_px, tissue_px, factor, np.arange(len(rows) ** 2).reshape(len(rows), -1)) + 1
            side = size_px // factor
            text = (
                f"Aperio Image Library v11.2.1\r\n{size_px}x{size_px} [0,0 {size_px}x{size_px}] "
                f"({TILE_PX}x{TILE_PX}) -> {side}x{side} JPEG/RGB Q={QUALITY}|AppMag = 40|MPP = {MPP}"
            )
            tags = [
                (254, LONG, [0 if factor == 1 else 1]),
                (256, LONG, [side]),
                (257, LONG, [side]),
                (258, SHORT, [8, 8, 8]),
                (259, SHORT, [7]),  # JPEG
                (262, SHORT, [6]),  # YCbCr
                (270, ASCII, text.encode() + b"\0"),
                (277, SHORT, [3]),
                (284, SHORT, [1]),
                (322, LONG, [TILE_PX]),
                (323, LONG, [TILE_PX]),
                (324, LONG8, np.asarray(starts, "<u8")[which]),
                (325, LONG, np.asarray([len(s) for s in every], "<u4")[which]),
                (347, BYTES, tables),
                (530, SHORT, [2, 2]),
            ]
            file.write(b"\0" * (-file.tell() % 8))
            at = file.tell()
            content, next_link = directory(tags, at)
            file.write(content)
            end = file.tell()
            file.seek(link)
            file.write(struct.pack("<Q", at))
            file.seek(end)
            link = at + next_link


class Means:
    """Grey means of 32 x 32 cells: 1,024 numbers, as wide as a ViT-L, for next to no time."""

    def __init__(self) -> None:
        from eosin.encoders.spec import EncoderSpec

        self.spec = EncoderSpec(
            name="means",
            dim=DIM_SIDE**2,
            patch_px=1,
            input_px=SIDE_PX,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            mpp=(),
            pooling="none",
            registers=0,
            params_m=0.0,
            licence="Apache-2.0",
            gated=False,
            source="builtin:means",
        )

    def encode(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        size = (DIM_SIDE, DIM_SIDE)
        cells = [cv2.resize(np.ascontiguousarray(t[..., 1]), size, interpolation=cv2.INTER_AREA) for t in tiles]
        return np.stack(cells).reshape(len(tiles), -1).astype(np.float32)

    def runtime(self) -> dict[str, Any]:
        return {"backend": "numpy", "precision": "fp32", "device": "cpu"}


def child(arguments: list[str]) -> None:
    """Run `eosin extract` in this process, with the stand-in under whatever encoder name is given."""
    import eosin.encoders
    from eosin.cli import main

    eosin.encoders.load_encoder = lambda *args, **kwargs: Means()  # type: ignore[assignment]
    sys.argv = ["eosin", *arguments]
    main()


def high_water(session: int, marks: dict[int, int]) -> None:
    """Note VmHWM in KiB of every process of a session."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            lines = (entry / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between listing and reading
        found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
        if found:
            marks[int(entry.name)] = found[0]


def measured(table: Path, out: Path, workers: int) -> dict[str, Any]:
    """Run the command on a cohort table; return tiles, seconds and peaks in MiB."""
    command = [sys.executable, str(HERE / "memory.py"), "--child", "extract", str(table), "--out", str(out)]
    command += ["--encoder", "means", "--tile-px", str(SIDE_PX), "--mpp", str(TARGET_MPP), "--workers", str(workers)]
    peaks, marks, samples = [0, 0], {}, 0
    with tempfile.TemporaryFile("w+") as told:
        started = time.perf_counter()
        process = subprocess.Popen([*command, "--json"], stdout=told, stderr=subprocess.DEVNULL, start_new_session=True)
        done = threading.Event()

        def watch() -> None:
            nonlocal samples
            while not done.wait(0.2):
                peaks[:] = [max(pair) for pair in zip(peaks, session_memory(process.pid), strict=True)]
                high_water(process.pid, marks)
                samples += 1

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        told.seek(0)
        text = told.read()
    if code:
        raise SystemExit(f"eosin extract ended with {code}: {text}")
    outcome = json.loads(text)
    store = sum(path.stat().st_size for path in out.rglob("*.h5"))
    # In the order they were started: the command itself, the reader that plans slides, those that read tiles.
    names = ["command", "planner", *(f"reader {i}" for i in range(1, len(marks)))]
    processes = {name: round(marks[pid] / 1024, 1) for name, pid in zip(names, sorted(marks), strict=False)}
    return {
        "tiles": outcome["tiles"],
        "seconds": round(seconds, 1),
        "samples": samples,
        "store_mib": round(store / 2**20, 1),
        "peak_pss_mib": round(peaks[1] / 1024, 1),
        "peak_rss_mib": round(peaks[0] / 1024, 1),
        "sum_of_high_water_mib": round(sum(processes.values()), 1),
        "high_water_mib": processes,
    }


def region(path: Path, size_px: int, side_px: int) -> Path:
    """Write a GeoJSON of the square of `side_px` in the middle of a slide."""
    low, high = (size_px - side_px) // 2, (size_px + side_px) // 2
    ring = [[low, low], [high, low], [high, high], [low, high], [low, low]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    feature = {"type": "Feature", "properties": {}, "geometry": geometry}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return path


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--small", type=int, default=6, help="side of the small slide's tissue in periods of 4096 px")
    parser.add_argument("--large", type=int, default=18, help="side of the large slide's tissue in periods of 4096 px")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    given = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = {"small": given.small, "large": given.large}
        for which, periods in sides.items():
            make_slide(folder / f"{which}.svs", size_px=(periods + 2) * PERIOD_PX, tissue_px=periods * PERIOD_PX)
        part = region(folder / "part.geojson", (given.large + 2) * PERIOD_PX, given.small * PERIOD_PX)
        plans = {
            "small slide": ("small", ""),
            "part of the large slide": ("large", part.name),
            "large slide": ("large", ""),
        }
        for plan, (slide, roi) in plans.items():
            table = folder / f"{plan.replace(' ', '-')}.csv"
            table.write_text(f"path,roi\n{slide}.svs,{roi}\n")
            runs[plan] = measured(table, folder / f"out-{plan.replace(' ', '-')}", given.workers)
            print(plan, json.dumps(runs[plan]), flush=True)
    large = runs["large slide"]
    keys = ("tiles", "peak_pss_mib", "peak_rss_mib", "sum_of_high_water_mib")
    result = {
        "command": "python benchmarks/memory.py " + " ".join(sys.argv[1:]),
        "question": "peak memory of eosin extract, all processes, over plans of about 10,000 and 100,000 tiles",
        "commit": commit(),
        "machine": machine() | {"load_average": os.getloadavg()[0]},
        "seed": SEED,
        "settings": {"tile_px": SIDE_PX, "mpp": TARGET_MPP, "dim": DIM_SIDE**2, "workers": given.workers},
        "runs": runs,
        "ratio_of_large_slide_to": {
            plan: {key: round(large[key] / runs[plan][key], 3) for key in keys}
            for plan in runs
            if plan != "large slide"
        },
    }
    result["command"] = result["command"].strip()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratio_of_large_slide_to"], indent=1))


if __name__ == "__main__":
    main()
