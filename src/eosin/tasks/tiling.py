"""`eosin tile`: tissue and grids without an encoder, as files other tools read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import orjson

from eosin.errors import EosinError
from eosin.features.jobs import Job
from eosin.features.pipeline import SlidePlan, plan_slide
from eosin.features.readers import ReaderPool, ReaderState
from eosin.features.writer import write_durably
from eosin.tasks.pictures import draw_tiles, jpeg_bytes
from eosin.tiles import TileGrid, TileSpec


def tile_slides(
    jobs: Sequence[Job],
    specs: Sequence[TileSpec],
    out: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Write tissue outline, coordinates and a preview per slide; return a row per slide and spec.

    Files: ``tissue/<slide>.geojson``; for each spec ``<tile_px>px_<mpp>mpp/<slide>.h5``
    (dataset ``coords`` int64 (n, 2), level-0 top-left, with TRIDENT's attributes and
    ``tissue`` float32 (n,)), ``.geojson`` (a rectangle a tile) and ``.jpg`` (preview).
    """
    readers = ReaderPool(workers=1, slots=1, slot_bytes=1)
    rows: list[dict[str, Any]] = []
    try:
        tickets = [(job, readers.submit(f"tiling {job.slide_id}", _plan_and_draw, job, specs)) for job in jobs]
        for done, (job, ticket) in enumerate(tickets):
            try:
                plan, previews = readers.result(ticket)
                rows += _write(out, job, plan, previews)
            except EosinError as error:
                rows.append({"slide_id": job.slide_id, "error": f"{type(error).__name__}: {error}"})
            if progress is not None:
                progress(done + 1, len(jobs))
    finally:
        readers.close()
    return rows


def _plan_and_draw(state: ReaderState, job: Job, specs: Sequence[TileSpec]) -> tuple[SlidePlan, list[bytes]]:
    plan = plan_slide(state, job, specs, [[]] * len(specs), None)
    slide = state.slide(job)
    thumbnail, downsample = slide.thumbnail(1600)
    previews = [jpeg_bytes(draw_tiles(thumbnail, downsample, grid)) for grid in plan.grids if grid is not None]
    return plan, previews


def _write(out: Path, job: Job, plan: SlidePlan, previews: Sequence[bytes]) -> list[dict[str, Any]]:
    assert plan.mask is not None
    write_durably(out / "tissue" / f"{job.slide_id}.geojson", orjson.dumps(plan.mask.to_geojson()))
    rows = []
    for grid, preview in zip(plan.grids, previews, strict=True):
        assert grid is not None
        folder = out / f"{grid.spec.tile_px}px_{grid.spec.mpp:g}mpp"
        path = folder / f"{job.slide_id}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        _write_coords(temporary, job, grid)
        temporary.replace(path)
        write_durably(folder / f"{job.slide_id}.geojson", orjson.dumps(grid.to_geojson()))
        write_durably(folder / f"{job.slide_id}.jpg", preview)
        rows.append(
            {
                "slide_id": job.slide_id,
                "mpp": grid.spec.mpp,
                "tile_px": grid.spec.tile_px,
                "tiles": len(grid),
                "background": len(grid.background_xy),
                "level": grid.plan.level,
                "scale": grid.plan.scale,
                "upsample": grid.plan.upsample,
                "tissue_mm2": plan.meta["tissue"]["area_mm2"],
                "file": str(path),
                "error": None,
            }
        )
    return rows


def _write_coords(path: Path, job: Job, grid: TileGrid) -> None:
    """Write positions with the attributes TRIDENT's ``*_patches.h5`` has, and exact mpp beside them."""
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        coords = file.create_dataset("coords", data=grid.xy.astype("<i8"), track_times=False)
        file.create_dataset("tissue", data=grid.tissue.astype("<f4"), track_times=False)
        file.create_dataset("valid", data=grid.valid.astype("<f4"), track_times=False)
        mean = grid.slide_mpp.mean
        attributes = {
            "patch_size": grid.spec.tile_px,
            "patch_size_level0": round(float(np.sqrt(grid.plan.size0_px[0] * grid.plan.size0_px[1]))),
            "level0_magnification": round(10 / mean, 2),
            "target_magnification": round(10 / grid.spec.mpp, 2),
            "overlap": grid.spec.overlap_px,
            "name": Path(job.slide_id).stem,
            "savetodir": "",
            "level0_width": grid.slide_size_px[0],
            "level0_height": grid.slide_size_px[1],
            "mpp": grid.spec.mpp,
            "mpp_x": grid.slide_mpp.x,
            "mpp_y": grid.slide_mpp.y,
            "tile_px": grid.spec.tile_px,
            "coord_space": "level-0 pixels, top-left corner, (x, y)",
        }
        for key, value in attributes.items():
            coords.attrs[key] = value
