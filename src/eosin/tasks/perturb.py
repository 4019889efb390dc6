"""How much do features and answers change when only the picture-taking changes?

A perturbation is one physical change of known size, the same for every tile: weaker or stronger staining, another
balance of the stains, another lamp, another tone curve, defocus, compression. `robustness_curve` encodes the changed
tiles and evaluates them with whatever was trained on unchanged ones.

A tone curve is close to a change of staining: v^gamma is the optical density times gamma, though of everything and
not of the two stains alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from eosin.errors import GeometryError, MissingDependencyError, NonFiniteError, PredictionsError, closest
from eosin.evaluation.interval import Interval

if TYPE_CHECKING:
    from torch import Tensor

Tiles = npt.NDArray[np.uint8]
FeatureRows = npt.NDArray[np.floating]
Encode = Callable[[Tiles], FeatureRows]
Evaluate = Callable[[FeatureRows], float | Interval]

CHUNK = 64
"""Tiles unmixed at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbation:
    """One kind of change.

    Attributes:
        what: in words.
        unit: of the size.
        levels: name -> size, mildest first.
    """

    what: str
    unit: str
    levels: Mapping[str, float]


STAIN_FACTORS: Mapping[str, Callable[[float], tuple[float, float]]] = {
    "stain-weaker": lambda f: (f, f),
    "stain-stronger": lambda f: (f, f),
    "hematoxylin": lambda f: (f, 1.0),
    "eosin": lambda f: (1.0, f),
}
"""Kind -> factors of hematoxylin and eosin, in each tile's own Macenko stains."""

PERTURBATIONS: Mapping[str, Perturbation] = {
    "stain-weaker": Perturbation(
        what="both stains times a factor: a thinner or less stained section (Beer-Lambert)",
        unit="factor of the concentrations",
        levels={"x0.85": 0.85, "x0.7": 0.7, "x0.5": 0.5},
    ),
    "stain-stronger": Perturbation(
        what="both stains times a factor: a thicker or more stained section (Beer-Lambert)",
        unit="factor of the concentrations",
        levels={"x1.15": 1.15, "x1.4": 1.4, "x2": 2.0},
    ),
    "hematoxylin": Perturbation(
        what="hematoxylin alone times a factor",
        unit="factor of the concentration",
        levels={"x1.25": 1.25, "x1.6": 1.6, "x2": 2.0},
    ),
    "eosin": Perturbation(
        what="eosin alone times a factor",
        unit="factor of the concentration",
        levels={"x1.25": 1.25, "x1.6": 1.6, "x2": 2.0},
    ),
    "hed": Perturbation(
        what="random HED shift of each tile (Tellez et al. 2019; their light is 0.05, their strong 0.2)",
        unit="half-width of factor and offset",
        levels={"0.02": 0.02, "0.05": 0.05, "0.1": 0.1, "0.2": 0.2},
    ),
    "darker": Perturbation(
        what="lamp dimmed", unit="factor of the light", levels={"x0.9": 0.9, "x0.75": 0.75, "x0.6": 0.6}
    ),
    "brighter": Perturbation(
        what="lamp brighter; what exceeds white is lost",
        unit="factor of the light",
        levels={"x1.1": 1.1, "x1.25": 1.25},
    ),
    "gamma": Perturbation(
        what="tone curve 255 (v / 255)^gamma, darker mid-tones",
        unit="gamma",
        levels={"1.25": 1.25, "1.6": 1.6, "2.2": 2.2},
    ),
    "gamma-inverse": Perturbation(
        what="tone curve 255 (v / 255)^(1 / gamma), lighter mid-tones",
        unit="gamma",
        levels={"1.25": 1.25, "1.6": 1.6, "2.2": 2.2},
    ),
    "blur": Perturbation(
        what="Gaussian blur: defocus",
        unit="standard deviation in µm",
        levels={"0.25um": 0.25, "0.5um": 0.5, "1um": 1.0, "2um": 2.0},
    ),
    "jpeg": Perturbation(
        what="JPEG compression, chroma halved (4:2:0)",
        unit="quality",
        levels={"q80": 80, "q50": 50, "q30": 30, "q10": 10},
    ),
}


def perturb(tiles: Tiles, kind: str, severity: str, *, mpp: float, seed: int = 0) -> Tiles:
    """Return the tiles changed.

    Args:
        tiles: uint8 (n, H, W, 3).
        kind: a key of `PERTURBATIONS`.
        severity: one of its levels.
        mpp: microns per pixel of the tiles (blur is in microns).
        seed: of the draws (hed only).

    Returns:
        uint8 (n, H, W, 3), a new array.

    Raises:
        GeometryError: tiles of another shape or type, or an mpp that is not positive.
        PredictionsError: no such kind or severity.
    """
    if not isinstance(tiles, np.ndarray) or tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[-1] != 3:
        raise GeometryError(
            f"tiles are {getattr(tiles, 'dtype', type(tiles).__name__)} {np.shape(tiles)}; needed uint8 (n, H, W, 3)"
        )
    if not (mpp > 0 and np.isfinite(mpp)):
        raise GeometryError(f"mpp is {mpp}; needed the microns per pixel of the tiles, a positive number")
    size = _size(kind, severity)
    if kind == "blur":
        return _each(tiles, lambda tile: _blur(tile, size / mpp))
    if kind == "jpeg":
        return _each(tiles, lambda tile: _jpeg(tile, round(size)))
    if kind == "hed" or kind in STAIN_FACTORS:
        return _restained(tiles, kind, size, seed)
    return _tone_curve(kind, size)[tiles]


def robustness_curve(
    encode: Encode,
    tiles: Tiles,
    evaluate: Evaluate,
    *,
    mpp: float,
    severities: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return performance and likeness of features against the size of every change.

    Args:
        encode: tiles (n, H, W, 3) -> features (n, D).
        tiles: uint8 (n, H, W, 3), unchanged.
        evaluate: features (n, D) -> a number where higher is better, or an `Interval`; train it on unchanged tiles of
            other patients.
        mpp: microns per pixel.
        severities: kind -> its severities; all when None.
        seed: of the draws.

    Returns:
        Columns kind, severity, size, unit, score, low, high (NaN without an interval), change (score minus that of
        unchanged tiles), cosine (mean cosine of changed and unchanged features), n. The first row is the unchanged
        tiles, kind "none".

    Raises:
        GeometryError: as `perturb`.
        PredictionsError: no such kind or severity, or features of another shape after a change.
        NonFiniteError: features with NaN or infinity.
    """
    chosen = {kind: list(one.levels) for kind, one in PERTURBATIONS.items()} if severities is None else severities
    wanted = [(kind, severity, _size(kind, severity)) for kind, levels in chosen.items() for severity in levels]
    clean = _encoded(encode, tiles, "unchanged tiles")
    rows = [_row("none", "", float("nan"), evaluate(clean), clean, clean)]
    for kind, severity, size in wanted:
        features = _encoded(encode, perturb(tiles, kind, severity, mpp=mpp, seed=seed), f"{kind} {severity}")
        if features.shape != clean.shape:
            raise PredictionsError(
                f"features of {kind} {severity} have shape {features.shape}, unchanged {clean.shape}"
            )
        rows.append(_row(kind, severity, size, evaluate(features), features, clean))
    table = pd.DataFrame(rows)
    table.insert(7, "change", table["score"] - table["score"].iloc[0])
    return table


def _row(
    kind: str, severity: str, size: float, score: float | Interval, features: FeatureRows, clean: FeatureRows
) -> dict[str, object]:
    ends = (score.point, score.low, score.high) if isinstance(score, Interval) else (float(score), np.nan, np.nan)
    return {
        "kind": kind,
        "severity": severity,
        "size": size,
        "unit": PERTURBATIONS[kind].unit if kind in PERTURBATIONS else "",
        "score": ends[0],
        "low": ends[1],
        "high": ends[2],
        "cosine": _mean_cosine(features, clean),
        "n": len(features),
    }


def _size(kind: str, severity: str) -> float:
    if kind not in PERTURBATIONS:
        raise PredictionsError(f"no perturbation is called {kind!r}; closest: {closest(kind, PERTURBATIONS)}")
    levels = PERTURBATIONS[kind].levels
    if severity not in levels:
        raise PredictionsError(f"{kind} has no severity {severity!r}; it has {', '.join(levels)}")
    return levels[severity]


def _encoded(encode: Encode, tiles: Tiles, what: str) -> FeatureRows:
    features = np.asarray(encode(tiles))
    if features.ndim != 2 or len(features) != len(tiles):
        raise PredictionsError(f"encode returned shape {features.shape} for {len(tiles)} tiles; needed (n, D)")
    if not np.isfinite(features).all():
        raise NonFiniteError(f"the features of {what} hold NaN or infinity")
    return features


def _mean_cosine(features: FeatureRows, clean: FeatureRows) -> float:
    a, b = features.astype(np.float64), clean.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.maximum(lengths, 1e-300)))


def _each(tiles: Tiles, change: Callable[[Tiles], Tiles]) -> Tiles:
    out = np.empty_like(tiles)
    for i, tile in enumerate(tiles):
        out[i] = change(tile)
    return out


def _blur(tile: Tiles, sigma_px: float) -> Tiles:
    reach = 2 * int(np.ceil(4 * sigma_px)) + 1
    blurred = cv2.GaussianBlur(
        tile.astype(np.float32), (reach, reach), sigmaX=sigma_px, sigmaY=sigma_px, borderType=cv2.BORDER_REFLECT
    )
    return np.rint(blurred).clip(0, 255).astype(np.uint8)


def _jpeg(tile: Tiles, quality: int) -> Tiles:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=quality, subsampling=2)
    file.seek(0)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _tone_curve(kind: str, size: float) -> Tiles:
    """Return the new value (256,) of every grey value."""
    light = np.arange(256) / 255
    lamp = kind in ("darker", "brighter")
    curve = light * size if lamp else light ** (size if kind == "gamma" else 1 / size)
    return np.rint(curve * 255).clip(0, 255).astype(np.uint8)


def _restained(tiles: Tiles, kind: str, size: float, seed: int) -> Tiles:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingDependencyError.for_extra("torch", "torch") from error
    from eosin.stain.augment import jitter_hed

    generator = torch.Generator().manual_seed(seed)
    out = np.empty_like(tiles)
    chunk = 1 if kind == "hed" else CHUNK  # one at a time, so that a tile's draws do not depend on the tiles after it
    for start in range(0, len(tiles), chunk):
        images = torch.from_numpy(np.ascontiguousarray(tiles[start : start + chunk])).movedim(-1, 1)
        if kind == "hed":
            changed, _ = jitter_hed(images, generator=generator, scale=size, shift=size)
        else:
            changed = _scaled_stains(images, STAIN_FACTORS[kind](size))
        out[start : start + chunk] = changed.movedim(1, -1).numpy()
    return out


def _scaled_stains(images: Tensor, factors: tuple[float, float]) -> Tensor:
    """Return images (B, 3, H, W) with hematoxylin and eosin times `factors`; what neither explains is kept.

    OD' = OD + (f - 1) C M with concentrations C >= 0 (least squares) under the tile's own Macenko matrix M, or under
    that of Ruifrok & Johnston where a tile has none, so that every tile is changed.
    """
    import torch

    from eosin.stain import Macenko
    from eosin.stain.colour import from_grey_values, grey_to_od, mix, od_to_grey, to_grey_values
    from eosin.stain.unmix import RUIFROK_HE, nonnegative_lasso

    fit = Macenko().fit_each(images)
    fallback = torch.nn.functional.normalize(torch.tensor(RUIFROK_HE, dtype=torch.float64), dim=1)
    matrix = torch.where(fit.ok[:, None, None], fit.matrix, fallback)
    values, finite = to_grey_values(images)
    od = grey_to_od(values, fit.light)
    stains = nonnegative_lasso(od, matrix)
    added = stains * torch.tensor([f - 1 for f in factors], dtype=od.dtype)[:, None]
    od = od + mix(matrix.transpose(1, 2), added)
    return from_grey_values(od_to_grey(od, fit.light), images, finite)
