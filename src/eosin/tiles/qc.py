"""Quality numbers of each tile, kept beside the features so that filtering later is a query.

`tile_qc` measures one tile, `qc_table` joins the measures of a grid, `reject_reason` turns
them into one reason per tile by rules that are data.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from eosin.errors import GeometryError, TissueError
from eosin.tiles.grid import TileGrid

PIXEL_COLUMNS = ("focus", "white", "black", "pen", "fold", "saturation", "od_hematoxylin", "od_eosin")
QC_COLUMNS = ("tissue", "valid", *PIXEL_COLUMNS, "neighbours", "read_status")
READ_OK, READ_FAILED = 0, 1

FOCUS_MPP = 0.5
# Grey-level variance below which a tile has no contrast to judge focus by: sensor and JPEG noise.
FOCUS_NOISE_VARIANCE = 25.0
# Variance that rounding to whole grey levels (1/12) gives the Laplacian (sum of squared weights: 20).
ROUNDING_ENERGY = 20 / 12
FOLD_UM = 8.0
FOLD_OD, FOLD_SATURATION = 0.60, 0.40
WHITE_LEVEL, WHITE_SPREAD, BLACK_LEVEL = 205, 20, 45
# Rows: haematoxylin, eosin, DAB as the third direction (Ruifrok and Johnston 2001).
STAIN_OD = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_UNMIX = np.linalg.inv(STAIN_OD / np.linalg.norm(STAIN_OD, axis=1, keepdims=True))
_INVERSE_OF_LEVEL = (1 / np.maximum(np.arange(256), 1)).astype(np.float32)
_OD_OF_LEVEL = -np.log10(np.maximum(np.arange(256), 1) / 255.0).astype(np.float32)

REASONS = ("kept", "unreadable", "background", "outside", "black", "pen", "fold", "white", "blurred")
Density = npt.NDArray[np.float32]
Op = Literal["<", "<=", ">", ">=", "==", "!="]
_OPS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A tile is rejected for `reason` when its `column` `op` `threshold` holds."""

    column: str
    op: Op
    threshold: float
    reason: str


DEFAULT_RULES: tuple[Rule, ...] = (
    Rule("read_status", "!=", READ_OK, "unreadable"),
    Rule("tissue", "<", 0.01, "background"),
    Rule("valid", "<", 0.5, "outside"),
    Rule("black", ">", 0.5, "black"),
    Rule("pen", ">", 0.2, "pen"),
    Rule("fold", ">", 0.5, "fold"),
    Rule("white", ">", 0.9, "white"),
    Rule("focus", "<", 0.03, "blurred"),
)


def tile_qc(rgb: npt.NDArray[np.uint8], mpp: float) -> dict[str, float]:
    """Return the quality numbers of one tile.

    - `focus`: variance of the Laplacian of luminance over the variance of luminance, both on
      a 0.5 µm grid (finer tiles are averaged down to it, coarser ones are used as they are), so
      that neither stain strength nor mpp sets its scale; falls with defocus (Pech-Pacheco et al.
      2000; measure LAP4 of Pertuz et al., Pattern Recognition 46, 2013). The denominator
      has 25 grey levels squared added, so that flat noise is not "sharp".
    - `white`: share of pixels that look like glass (every channel > 205, spread < 20).
    - `black`: share of pixels with every channel < 45.
    - `pen`: share of pixels with an ink hue, which no mixture of haematoxylin, eosin and DAB has.
    - `fold`: share of 8 µm blocks that are dark and saturated at once, as tissue of double
      thickness is and single nuclei are not (after Bautista and Yagi, J Biomed Opt 15, 2010).
    - `saturation`: mean of (max - min) / max over the channels.
    - `od_hematoxylin`, `od_eosin`: mean stain densities by colour deconvolution with the standard
      vectors (Ruifrok and Johnston, Anal Quant Cytol Histol 23, 2001; third vector DAB).

    All but `focus` are taken from a copy averaged down twofold.

    Args:
        rgb: uint8 (H, W, 3), at least 8 x 8.
        mpp: microns per pixel of the tile.

    Returns:
        Finite floats under the names of `PIXEL_COLUMNS`.

    Raises:
        GeometryError: not a uint8 RGB tile, or smaller than 8 x 8.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or min(rgb.shape[:2]) < 8:
        raise GeometryError(f"a tile is uint8 (H, W, 3), at least 8 x 8; got {rgb.dtype} {rgb.shape}")
    rgb = np.ascontiguousarray(rgb)
    half = _shrink(rgb, (rgb.shape[1] // 2, rgb.shape[0] // 2))
    channels = cv2.split(half)
    high = np.asarray(cv2.max(cv2.max(channels[0], channels[1]), channels[2]), dtype=np.uint8)
    low = np.asarray(cv2.min(cv2.min(channels[0], channels[1]), channels[2]), dtype=np.uint8)
    spread = high - low
    pixels = high.size
    red, green, blue = (np.asarray(cv2.LUT(channel, _OD_OF_LEVEL), dtype=np.float32) for channel in channels)
    stains = np.array([red.mean(), green.mean(), blue.mean()]) @ _UNMIX
    return {
        "focus": _focus(rgb, mpp),
        "white": float(np.count_nonzero((low > WHITE_LEVEL) & (spread < WHITE_SPREAD)) / pixels),
        "black": float(np.count_nonzero(high < BLACK_LEVEL) / pixels),
        "pen": _ink_share(red, green, blue),
        "fold": _fold_share(half, mpp * 2),
        "saturation": float(np.mean(spread * _INVERSE_OF_LEVEL[high])),
        "od_hematoxylin": float(stains[0]),
        "od_eosin": float(stains[1]),
    }


def qc_table(grid: TileGrid, rows: Sequence[Mapping[str, float] | None]) -> dict[str, npt.NDArray[Any]]:
    """Return the quality table of a grid: one array of length n per name of `QC_COLUMNS`.

    Args:
        grid: the plan the tiles were read from.
        rows: what `tile_qc` said of each tile of the grid, in its order; None for a tile that could
            not be read (its pixel measures are NaN, its `read_status` 1).

    Returns:
        float32 columns (`neighbours`: share of the eight neighbouring grid positions that hold a
        tile which could be read) and `read_status` int8 (0 read, 1 unreadable).

    Raises:
        GeometryError: not one row per tile.
    """
    if len(rows) != len(grid):
        raise GeometryError(f"{len(rows)} rows of quality numbers for {len(grid)} tiles")
    status = np.array([READ_FAILED if row is None else READ_OK for row in rows], dtype=np.int8)
    table: dict[str, npt.NDArray[Any]] = {"tissue": grid.tissue, "valid": grid.valid}
    for name in PIXEL_COLUMNS:
        table[name] = np.array([np.nan if row is None else row[name] for row in rows], dtype=np.float32)
    table["neighbours"] = neighbours(grid.xy, grid.step0_px, status == READ_OK)
    table["read_status"] = status
    return table


def neighbours(
    xy: npt.NDArray[np.int64],
    step0_px: tuple[float, float],
    kept: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float32]:
    """Return, per tile, the share of its eight grid neighbours that are there and `kept`.

    Rows and columns of the grid are adjacent when they are at most one step apart (so a column
    moved inwards at the slide's edge still touches the one before it). What lies beyond the
    slide or was left out as background counts as not kept.

    Args:
        xy: int64 (n, 2) top-left corners of tiles of one grid.
        step0_px: (x, y) distance between grid positions in level-0 pixels, not rounded.
        kept: bool (n,); all tiles when None.

    Returns:
        float32 (n,) in 0..1.
    """
    if len(xy) == 0:
        return np.zeros(0, dtype=np.float32)
    column, row = (_grid_index(xy[:, axis], step0_px[axis]) + 1 for axis in (0, 1))
    chosen = np.ones(len(xy), dtype=bool) if kept is None else kept
    occupied = np.zeros((int(row.max()) + 2, int(column.max()) + 2), dtype=np.int8)
    occupied[row[chosen], column[chosen]] = 1
    count = np.zeros(len(xy), dtype=np.float32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if dx or dy:
                count += occupied[row + dy, column + dx]
    return count / np.float32(8)


def _grid_index(origins: npt.NDArray[np.int64], step: float) -> npt.NDArray[np.int64]:
    """Return an index per origin; neighbours differ by 1, whatever is further apart by 2."""
    distinct, inverse = np.unique(origins, return_inverse=True)
    gap = np.where(np.diff(distinct) < 1.5 * step + 0.5, 1, 2)
    return np.concatenate([[0], np.cumsum(gap)])[inverse]


def reject_reason(table: Mapping[str, npt.NDArray[Any]], rules: Sequence[Rule] = DEFAULT_RULES) -> npt.NDArray[np.int8]:
    """Return why each tile is rejected: an index into `REASONS`, 0 = kept. The first rule that holds wins.

    A rule on one of `QC_COLUMNS` that the table lacks rejects nothing, nor does NaN (but for ``!=``):
    a tile is never rejected for a number nobody measured.

    Args:
        table: columns (n,); further ones than `QC_COLUMNS` may be there and be used by `rules`.
        rules: in order of precedence.

    Raises:
        TissueError: a rule names an unknown column, operator or reason.
    """
    count = len(next(iter(table.values()))) if table else 0
    codes = np.zeros(count, dtype=np.int8)
    for rule in rules:
        if rule.column not in table and rule.column not in QC_COLUMNS:
            raise TissueError(f"rule on unknown column {rule.column!r}; the table has {', '.join(table)}")
        if rule.op not in _OPS:
            raise TissueError(f"unknown operator {rule.op!r} in a rule; one of {' '.join(_OPS)}")
        if rule.reason not in REASONS[1:]:
            raise TissueError(f"unknown reason {rule.reason!r} in a rule; one of {', '.join(REASONS[1:])}")
        if rule.column not in table:
            continue
        hit = _OPS[rule.op](np.asarray(table[rule.column]), rule.threshold)
        codes[(codes == 0) & hit] = REASONS.index(rule.reason)
    return codes


def _focus(rgb: npt.NDArray[np.uint8], mpp: float) -> float:
    luminance = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    shrink = mpp / FOCUS_MPP
    if shrink < 0.99:
        size = (max(4, round(rgb.shape[1] * shrink)), max(4, round(rgb.shape[0] * shrink)))
        luminance = cv2.resize(luminance, size, interpolation=cv2.INTER_AREA)
    laplacian = cv2.Laplacian(luminance, cv2.CV_32F)
    _, laplacian_deviation = cv2.meanStdDev(laplacian)
    _, deviation = cv2.meanStdDev(luminance)
    energy = max(0.0, float(laplacian_deviation[0, 0]) ** 2 - ROUNDING_ENERGY)
    return energy / (float(deviation[0, 0]) ** 2 + FOCUS_NOISE_VARIANCE)


def _ink_share(red: Density, green: Density, blue: Density) -> float:
    """Return the share of pixels with the hue of green, blue or red ink, from densities (h, w) per channel."""
    green_ink = (green < 0.7 * blue) & (green < 0.6 * red) & (red > 0.25)
    blue_ink = (red > 1.2 * green) & (red > 2.8 * blue) & (red > 0.70)
    # Erythrocytes share the hue but not the density of red ink.
    red_ink = (blue > 0.8 * green) & (red < 0.2 * green) & (green > 0.90)
    return float(np.count_nonzero(green_ink | blue_ink | red_ink) / red.size)


def _fold_share(rgb: npt.NDArray[np.uint8], mpp: float) -> float:
    side = max(1.0, FOLD_UM / mpp)
    size = (max(1, round(rgb.shape[1] / side)), max(1, round(rgb.shape[0] / side)))
    block = _shrink(rgb, size)
    density = _OD_OF_LEVEL[block].mean(axis=2)
    high = block.max(axis=2).astype(np.float32)
    saturation = (high - block.min(axis=2)) / np.maximum(high, 1)
    return float(np.mean((density > FOLD_OD) & (saturation > FOLD_SATURATION)))


def _shrink(rgb: npt.NDArray[np.uint8], size_px: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return `rgb` averaged down to (width, height)."""
    return np.asarray(cv2.resize(rgb, size_px, interpolation=cv2.INTER_AREA), dtype=np.uint8)
