"""Figures on a whole slide or picture: overlapping windows, peaks of their heat maps, each figure once.

A window's peaks count where no other window's centre is clearly nearer, so that a figure at a window's edge is judged
by a window that sees all of it. Of peaks within 7.5 micrometres, the challenge's radius of a hit, the highest stays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import shapely
import torch
from scipy.spatial import KDTree
from torch import Tensor
from torch.nn import functional

from eosin.errors import NonFiniteError, NoTissueError
from eosin.features.writer import write_durably
from eosin.finetune.cascade import DRAWN_UM, per_mm2
from eosin.finetune.detections import Detections, detections
from eosin.finetune.detector import peaks
from eosin.finetune.matching import HIT_UM
from eosin.geometry import LEVEL_TOLERANCE, Mpp, ReadPlan
from eosin.slides import Slide
from eosin.tiles.geojson import Annotation, write_geojson
from eosin.tiles.grid import TileSpec, grid_positions
from eosin.tiles.mask import TissueMask

BATCH = 32
# Shared by neighbouring windows, at least: a figure (about 10 micrometres) and some of what is around it.
OVERLAP_UM = 16.0
FIGURE = "Mitotic figure"
COLOR = (0, 150, 60)

Floats = npt.NDArray[np.float64]


class HeatMaker(Protocol):
    """Anything that gives heat maps of windows.

    Attributes:
        window_px: side of a window.
        mpp: microns per pixel of a window.
    """

    window_px: int
    mpp: float

    def heat(self, tiles: npt.NDArray[np.uint8], /) -> Tensor:
        """Return logits (B, h, w) of windows uint8 (B, window_px, window_px, 3)."""
        ...


def find(
    slide: Slide,
    maker: HeatMaker,
    *,
    threshold: float = 0.0,
    mask: TissueMask | None = None,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Detections:
    """Return the figures of a slide with their scores, in level-0 pixels, from the top down.

    Args:
        slide: an open slide with a known mpp.
        maker: gives the heat maps.
        threshold: least score.
        mask: only windows with any tissue are looked at; None looks everywhere.
        batch: windows at once; no result depends on it but by the rounding of the network.
        progress: told windows done and windows in all.

    Raises:
        MissingMppError: the slide does not say its mpp.
        UpsampleError: the slide is more than twice as coarse as the windows.
        RegionError: a window cannot be decoded.
        NonFiniteError: the network gave NaN or infinity.
    """
    plan = slide.plan(tile_px=maker.window_px, mpp=maker.mpp)
    corners = windows(slide, plan)
    if mask is not None:
        corners = corners[mask.fraction(corners, plan.size0_px) > 0]
    size0 = np.array(plan.size0_px)
    found: list[tuple[npt.NDArray[np.int64], Floats, Floats]] = []
    for start in range(0, len(corners), batch):
        some = corners[start : start + batch]
        tiles = np.stack([slide.read_tile((int(x), int(y)), plan).rgb for x, y in some])
        which, place, score = _peaks(maker, tiles, slide.name, threshold)
        found.append((start + which, some[which] + place * size0, score))
        if progress is not None:
            progress(start + len(some), len(corners))
    if not found:
        return detections(np.empty((0, 2)))
    window, xy, score = (np.concatenate(part) for part in zip(*found, strict=True))
    kept = _on(slide, xy) & _owned(xy, window, corners, plan)
    xy, score = xy[kept], score[kept]
    once = suppress(xy * np.array([slide.mpp.x, slide.mpp.y]), score)
    return detections(xy[once], score=score[once], name="mitotic figure")


def windows(slide: Slide, plan: ReadPlan) -> npt.NDArray[np.int64]:
    """Return the corners (n, 2) of overlapping windows that cover a slide, level-0 pixels."""
    overlap = min(plan.tile_px // 2, round(OVERLAP_UM / plan.mpp))
    spec = TileSpec(tile_px=plan.tile_px, mpp=plan.mpp, overlap_px=overlap, min_tissue=0.0, edge="shift-in")
    pixel0 = (1.0, 1.0) if plan.resample else plan.downsample
    return grid_positions(spec, size0_px=plan.size0_px, bounds=slide.bounds, pixel0_px=pixel0)


def _peaks(
    maker: HeatMaker, tiles: npt.NDArray[np.uint8], where: str, threshold: float
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Return window (n,), place (n, 2) as a share of the window, and score (n,) of the peaks."""
    with torch.no_grad():
        logits = maker.heat(tiles).double()
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"{where}: the detector gave NaN or infinity; was it trained at too high a rate?")
        which, place, score = peaks(functional.logsigmoid(logits), floor=threshold)
        share = place / torch.tensor([logits.shape[2], logits.shape[1]], dtype=place.dtype, device=place.device)
    return which.cpu().numpy(), share.cpu().numpy(), score.cpu().numpy()


def _on(slide: Slide, xy: Floats) -> npt.NDArray[np.bool_]:
    """Return which points (n, 2) lie on what was scanned; windows reach off a slide that is smaller than they are."""
    x, y, width, height = slide.bounds
    return np.asarray(((xy >= (x, y)) & (xy <= (x + width, y + height))).all(axis=1), dtype=np.bool_)


def _owned(
    xy: Floats, window: npt.NDArray[np.int64], corners: npt.NDArray[np.int64], plan: ReadPlan
) -> npt.NDArray[np.bool_]:
    """Return which peaks (n,) no other window's centre is nearer to, by more than a hit's radius.

    The slack keeps a figure whose place two windows see on different sides of the line between them: both keep it, and
    it is one after `suppress`. Distances are the larger of x and y, in sides of a window.
    """
    size0 = np.array(plan.size0_px)
    centres = corners / size0 + 0.5
    here = xy / size0
    own = np.abs(here - centres[window]).max(axis=1)
    nearest, _ = KDTree(centres).query(here, p=np.inf)
    return own <= nearest + HIT_UM / plan.mpp / plan.tile_px


def suppress(xy_um: Floats, score: Floats, *, radius_um: float = HIT_UM) -> npt.NDArray[np.int64]:
    """Return the rows that stay when each peak, the highest first, removes those within `radius_um`, sorted by (y, x).

    Of equal scores the upper, then the left one comes first, so that the order of the rows plays no part.
    """
    order = np.lexsort((xy_um[:, 0], xy_um[:, 1], -score))
    left = np.ones(len(score), dtype=np.bool_)
    tree = KDTree(xy_um) if len(score) else None
    kept = []
    for at in order:
        if left[at] and tree is not None:
            left[tree.query_ball_point(xy_um[at], radius_um)] = False
            kept.append(at)
    rows = np.array(kept, dtype=np.int64)
    return rows[np.lexsort((xy_um[rows, 0], xy_um[rows, 1]))]


def write_figures(path: Path | str, found: Detections, *, mpp: Mpp) -> Path:
    """Write figures as detections for QuPath, squares of 12.5 micrometres with scores; `read_detections` reads it.

    Args:
        path: .geojson.
        found: of one slide, level-0 pixels.
        mpp: of the slide.
    """
    half = DRAWN_UM / 2 / np.array([mpp.x, mpp.y])
    corners = np.concatenate([found.xy - half, found.xy + half], axis=1).round(2).tolist()
    return write_geojson(
        path,
        [
            Annotation(
                geometry=shapely.box(*corner),
                name=FIGURE,
                color=COLOR,
                object_type="detection",
                properties={"measurements": {"Detection probability": round(score, 6)}},
            )
            for corner, score in zip(corners, found.score.tolist(), strict=True)
        ],
    )


def detect_slide(
    slide: Slide,
    maker: HeatMaker,
    mask: TissueMask,
    *,
    out: Path,
    name: str,
    threshold: float,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Find the figures on the tissue of a slide, write `out/<name>.geojson` and `.json`, and return the latter.

    Args:
        slide: an open slide with a known mpp.
        maker: gives the heat maps.
        mask: its tissue.
        out: folder to write to.
        name: of the slide, its folders included.
        threshold: least score.
        progress: told windows done and windows in all.

    Raises:
        NoTissueError: the mask is empty.
        EosinError: as `find`.
    """
    area = mask.area_mm2(slide.mpp)
    if not area:
        raise NoTissueError(f"{slide.name}: the tissue mask is empty; draw one, or let it be found")
    found = find(slide, maker, threshold=threshold, mask=mask, progress=progress)
    told = {
        "slide": name,
        "figures": len(found),
        "threshold": threshold,
        "mpp": [slide.mpp.x, slide.mpp.y],
        "tissue_mm2": area,
        "per_mm2": per_mm2(len(found), area).to_dict(),
        "notes": _notes(slide, maker),
    }
    path = out / f"{name}.geojson"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figures(path, found, mpp=slide.mpp)
    write_durably(out / f"{name}.json", orjson.dumps(told, option=orjson.OPT_INDENT_2))
    return told


def _notes(slide: Slide, maker: HeatMaker) -> list[str]:
    finer = slide.plan(tile_px=maker.window_px, mpp=maker.mpp).upsample
    if finer <= 1 + LEVEL_TOLERANCE:
        return []
    return [f"windows are {finer:.2f}x finer than the slide's own {slide.mpp.mean:.3g} microns per pixel: enlarged"]
