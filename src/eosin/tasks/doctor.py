"""Before a night's run: open every slide, sample every level, say what will fail and what it will cost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from eosin.errors import EosinError
from eosin.features.jobs import Job
from eosin.features.pipeline import TileEncoder
from eosin.features.readers import ReaderPool, ReaderState
from eosin.slides import Slide, open_slide
from eosin.tiles import TileSpec, plan_tiles

SAMPLE_PX = 256
SAMPLES_PER_AXIS = 3
MAX_LEVEL_STEP = 8.5
MAX_FLAT_PX = 100_000_000
QC_BYTES_PER_TILE = 80


def describe(path: Path | str, *, slide_mpp: float | None = None) -> dict[str, Any]:
    """Return what a slide says of itself, as plain JSON values.

    Raises:
        SlideError: it cannot be opened.
    """
    with open_slide(path, mpp=slide_mpp) as slide:
        return _describe(slide)


def _describe(slide: Slide) -> dict[str, Any]:
    return {
        "path": str(slide.path),
        "reader": slide.reader,
        "size_px": list(slide.size_px),
        "levels": [list(size) for size in slide.level_sizes],
        "downsamples": [[round(dx, 5), round(dy, 5)] for dx, dy in slide.level_downsamples],
        "decoder_scales": [list(scales) for scales in slide.level_scales],
        "mpp": slide.mpp_ledger.to_dict(),
        "bounds": list(slide.bounds),
        "compression": _compression(slide.path),
        "icc": slide.backend.icc_profile is not None,
        "associated": list(slide.associated),
        "bytes": slide.path.stat().st_size if slide.path is not None and slide.path.is_file() else None,
        "fingerprint": slide.fingerprint,
    }


def _compression(path: Path | None) -> str | None:
    """Return the compression of the first TIFF page, None for what is no TIFF."""
    if path is None or not path.is_file():
        return None
    try:
        with tifffile.TiffFile(path) as tiff:
            return tifffile.COMPRESSION(tiff.pages.first.compression).name
    except (tifffile.TiffFileError, OSError, ValueError):
        return None


def examine(
    jobs: Sequence[Job],
    spec: TileSpec,
    *,
    encoder: TileEncoder | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return a row a slide and the cost of the whole.

    Args:
        jobs: slides.
        spec: tiles that would be made.
        encoder: timed on a few tiles for the estimate of hours; none is estimated without it.
        out: folder whose free space is compared with what is needed.
        progress: called with (done, total).

    Returns:
        ``slides`` (rows with verdict "ok", "warn" or "fail" and the problems in words),
        ``failing``, ``warnings``, ``tiles``, ``hours``, ``gigabytes``, ``summary``.
    """
    readers = ReaderPool(workers=1, slots=1, slot_bytes=1)
    rows = []
    try:
        for done, job in enumerate(jobs):
            ticket = readers.submit(f"examining {job.slide_id}", examine_slide, job, spec)
            try:
                rows.append(readers.result(ticket))
            except EosinError as error:
                rows.append(_failed(job, error))
            if progress is not None:
                progress(done + 1, len(jobs))
    finally:
        readers.close()
    tiles = sum(row["tiles"] or 0 for row in rows)
    dim = encoder.spec.dim if encoder is not None else 1024
    gigabytes = tiles * (4 * dim + QC_BYTES_PER_TILE) / 1e9
    free = shutil.disk_usage(_existing(out)).free / 1e9 if out is not None else None
    hours = None if encoder is None else tiles / _tiles_per_second(encoder, spec.tile_px) / 3600
    failing = sum(row["verdict"] == "fail" for row in rows)
    warnings = sum(row["verdict"] == "warn" for row in rows)
    parts = [f"{len(rows)} slides: {len(rows) - failing - warnings} ok, {warnings} with warnings, {failing} will fail"]
    parts.append(f"about {tiles} tiles of {spec.tile_px} px at {spec.mpp:g} mpp")
    parts.append(f"{gigabytes:.3g} GB of features of {dim} numbers")
    if hours is not None and encoder is not None:
        parts.append(f"{hours:.2g} h of {encoder.spec.name} on this machine, if reading keeps up")
    full = free is not None and free < gigabytes
    if full:
        parts.append(f"only {free:.3g} GB are free in {out}: make room or choose another --out")
    return {
        "slides": rows,
        "failing": failing + int(full),
        "warnings": warnings,
        "tiles": tiles,
        "hours": hours,
        "gigabytes": gigabytes,
        "free_gigabytes": free,
        "summary": "; ".join(parts),
    }


def examine_slide(state: ReaderState, job: Job, spec: TileSpec) -> dict[str, Any]:
    """Return the row of one slide; runs in a reader process, so that a codec crash is one row too."""
    slide = state.slide(job)
    problems: list[str] = []
    fatal: list[str] = []
    described = _describe(slide)
    for level in range(len(slide.level_sizes)):
        bad, first = _sample(slide, level)
        if bad:
            fatal.append(f"level {level}: {bad} of {SAMPLES_PER_AXIS**2} sampled regions unreadable ({first})")
    problems += _pyramid_problems(slide)
    if slide.mpp_ledger.conflict:
        problems.append(slide.mpp_ledger.conflict)
    tiles: int | None = None
    try:
        grid = plan_tiles(slide, [spec], mask=job.tissue(slide), roi=job.roi)[0]
        tiles = len(grid)
        if tiles == 0:
            fatal.append("no tile holds enough tissue")
        if grid.plan.upsample > 1.01:
            problems.append(f"tiles would be {grid.plan.upsample:.2f}x finer than the slide")
    except EosinError as error:
        fatal.append(str(error))
    verdict = "fail" if fatal else "warn" if problems else "ok"
    ledger = slide.mpp_ledger
    return {
        "slide_id": job.slide_id,
        "verdict": verdict,
        "size": f"{slide.size_px[0]} x {slide.size_px[1]}",
        "levels": len(slide.level_sizes),
        "mpp": None if ledger.x is None else f"{ledger.x:.4g} ({ledger.source})",
        "compression": described["compression"],
        "icc": "yes" if described["icc"] else "",
        "tiles": tiles,
        "problems": fatal + problems,
        "described": described,
    }


def _sample(slide: Slide, level: int) -> tuple[int, str]:
    """Return how many of a grid of regions cannot be read, and the first reason."""
    width, height = slide.level_sizes[level]
    bad, first = 0, ""
    for fy in np.linspace(0, 1, SAMPLES_PER_AXIS):
        for fx in np.linspace(0, 1, SAMPLES_PER_AXIS):
            dx, dy = slide.level_downsamples[level]
            side = min(SAMPLE_PX, width, height)
            x, y = int(fx * (width - side) * dx), int(fy * (height - side) * dy)
            try:
                slide.read((x, y), side, level=level)
            except EosinError as error:
                bad += 1
                first = first or str(error)
    return bad, first


def _pyramid_problems(slide: Slide) -> list[str]:
    problems = []
    width, height = slide.level_sizes[-1]
    if width * height > MAX_FLAT_PX:
        problems.append(f"no small level (the smallest is {width} x {height}): thumbnails are slow")
    means = [float(np.sqrt(dx * dy)) for dx, dy in slide.level_downsamples]
    for level, (fine, coarse) in enumerate(pairwise(means)):
        if coarse / fine > MAX_LEVEL_STEP:
            problems.append(f"gap in the pyramid: level {level + 1} is {coarse / fine:.3g}x coarser than level {level}")
    return problems


def _failed(job: Job, error: EosinError) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(("size", "levels", "mpp", "compression", "icc", "tiles", "described"))
    return {"slide_id": job.slide_id, **row, "verdict": "fail", "problems": [str(error)]}


def _tiles_per_second(encoder: TileEncoder, tile_px: int, batch: int = 16, seconds: float = 3.0) -> float:
    """Return the encoder's own speed, measured on noise after one warm-up batch."""
    tiles = np.random.default_rng(0).integers(0, 256, (batch, tile_px, tile_px, 3), dtype=np.uint8)
    encoder.encode(tiles)
    started, done = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        encoder.encode(tiles)
        done += batch
    return done / (time.monotonic() - started)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
