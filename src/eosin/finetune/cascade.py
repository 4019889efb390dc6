"""From points on a slide to a count of atypical figures: crops, P(atypical), count per mm²."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import orjson
import shapely
from scipy.special import gammaincinv
from shapely.geometry import MultiPolygon, Polygon

from eosin.errors import ConfigError, GeometryError, NonFiniteError, PredictionsError
from eosin.evaluation.interval import Interval
from eosin.finetune.cells import TILE_MPP, TILE_PX
from eosin.finetune.detections import Detections
from eosin.geometry import LEVEL_TOLERANCE, Mpp, round_half_up
from eosin.slides import Slide
from eosin.tiles.geojson import Annotation, write_geojson
from eosin.tiles.tissue import tissue_mask

BATCH = 256
# The area that a mitotic count is given for (2 mm², ten high-power fields of 0.2 mm²).
USUAL_AREA_MM2 = 2.0
# Side of the square drawn around a cell: that of the MIDOG boxes, 50 px at 0.25 microns.
DRAWN_UM = 12.5
CLASS_COLORS = {"Atypical mitosis": (200, 0, 0), "Normal mitosis": (0, 110, 180)}
ATYPICAL, NORMAL = CLASS_COLORS


class CellClassifier(Protocol):
    """Anything that says how likely a crop shows an atypical figure."""

    def scores(self, tiles: npt.NDArray[np.uint8], /) -> npt.NDArray[np.floating]:
        """Return P(atypical) (n,) of crops uint8 (n, S, S, 3)."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ScoredCells:
    """The cells of one slide with what was said of them.

    Attributes:
        xy: float64 (n, 2) centre, level-0 pixels.
        p_atypical: float64 (n,).
        found: float64 (n,) the detector's own score, NaN where it gave none.
        valid_fraction: float64 (n,) share of each crop that is scanned slide.
        threshold: a cell at or above it is called atypical.
        mpp: of the slide's level-0 pixels.
        notes: what the reader should know of the crops.
    """

    xy: npt.NDArray[np.float64]
    p_atypical: npt.NDArray[np.float64]
    found: npt.NDArray[np.float64]
    valid_fraction: npt.NDArray[np.float64]
    threshold: float
    mpp: Mpp
    notes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.p_atypical)

    @property
    def atypical(self) -> npt.NDArray[np.bool_]:
        """Which cells are called atypical, (n,)."""
        return self.p_atypical >= self.threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class Density:
    """Cells per mm² of one area: figures of any kind, and atypical ones.

    Attributes:
        figures: per mm², with an exact Poisson interval; `n` is the count itself.
        atypical: the same of the atypical ones.
        area_mm2: the area they were counted on.
    """

    figures: Interval
    atypical: Interval
    area_mm2: float


def crops(
    slide: Slide, xy: npt.ArrayLike, *, tile_px: int = TILE_PX, mpp: float = TILE_MPP, batch: int = BATCH
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]]:
    """Yield the crops around points, in batches: uint8 (b, tile_px, tile_px, 3), and the scanned share of each (b,).

    The centre of a crop is the point, to half a level-0 pixel. What lies off the slide has its background's colour.

    Args:
        slide: an open slide with a known mpp.
        xy: (n, 2) centres, level-0 pixels.
        tile_px: side of a crop.
        mpp: of the crops.
        batch: crops in memory at once.

    Raises:
        UpsampleError: the slide is more than twice as coarse as `mpp`.
        MissingMppError: the slide does not say its mpp.
        RegionError: a crop cannot be decoded.
    """
    points = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
    plan = slide.plan(tile_px=tile_px, mpp=mpp)
    corners = round_half_up(points - np.array(plan.size0_px) / 2)
    for start in range(0, len(corners), batch):
        reads = [slide.read_tile((int(x), int(y)), plan) for x, y in corners[start : start + batch]]
        valid = np.array([read.valid_fraction for read in reads], dtype=np.float64)
        yield np.stack([read.rgb for read in reads]), valid


def classify(
    slide: Slide,
    points: Detections,
    classifier: CellClassifier,
    *,
    threshold: float = 0.5,
    tile_px: int = TILE_PX,
    mpp: float = TILE_MPP,
) -> ScoredCells:
    """Return P(atypical) of every point of a slide.

    Args:
        slide: an open slide with a known mpp.
        points: what a detector found, see `detections.read_detections`.
        classifier: what scores the crops.
        threshold: from out-of-fold predictions, never from these.
        tile_px: side of a crop.
        mpp: of the crops.

    Raises:
        ConfigError: a threshold outside 0-1.
        PredictionsError: the classifier does not return one probability a crop.
        NonFiniteError: it returns NaN.
        UpsampleError: the slide is more than twice as coarse as `mpp`.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold is {threshold:g}; it is a probability from 0 to 1")
    scores, valid = [], []
    for tiles, share in crops(slide, points.xy, tile_px=tile_px, mpp=mpp):
        scores.append(checked_scores(classifier.scores(tiles), len(tiles)))
        valid.append(share)
    valid_fraction = np.concatenate(valid) if valid else np.empty(0)
    return ScoredCells(
        xy=points.xy,
        p_atypical=np.concatenate(scores) if scores else np.empty(0),
        found=points.score,
        valid_fraction=valid_fraction,
        threshold=float(threshold),
        mpp=slide.mpp,
        notes=_notes(slide, valid_fraction, tile_px=tile_px, mpp=mpp),
    )


def checked_scores(scores: npt.ArrayLike, n: int) -> npt.NDArray[np.float64]:
    """Return what a classifier said of `n` crops as float64 (n,).

    Raises:
        PredictionsError: another shape, or values outside 0-1 (logits, say).
        NonFiniteError: NaN or infinity.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (n,):
        raise PredictionsError(
            f"the classifier returned shape {values.shape} for {n} crops; needed ({n},): P(atypical)"
        )
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"the classifier returned {int((~np.isfinite(values)).sum())} scores of {n} that are not finite"
        )
    if n and (values.min() < 0 or values.max() > 1):
        raise PredictionsError(
            f"the classifier returned scores from {values.min():.3g} to {values.max():.3g}; needed are probabilities "
            "of the atypical class in 0-1: apply a sigmoid"
        )
    return values


def _notes(slide: Slide, valid: npt.NDArray[np.float64], *, tile_px: int, mpp: float) -> tuple[str, ...]:
    notes = []
    factor = slide.plan(tile_px=tile_px, mpp=mpp).upsample
    if factor > 1 + LEVEL_TOLERANCE:
        notes.append(
            f"the crops are {factor:.2f}x finer than the slide's own {slide.mpp.mean:.3g} microns per pixel: enlarged, "
            "unlike what the classifier was trained on"
        )
    cut = int((valid < 1 - 1e-6).sum())
    if cut:
        notes.append(f"{cut} of {len(valid)} crops reach over the edge of what was scanned")
    return tuple(notes)


def density(cells: ScoredCells, *, area_mm2: float, region: Polygon | MultiPolygon | None = None) -> Density:
    """Return figures and atypical figures per mm², with exact Poisson intervals.

    Args:
        cells: of one slide.
        area_mm2: of the tissue (`TissueMask.area_mm2`), or of `region` (`region_mm2`).
        region: count the cells in it only, level-0 pixels, its edge included.

    Raises:
        GeometryError: an area that is not positive.
    """
    if not (np.isfinite(area_mm2) and area_mm2 > 0):
        raise GeometryError(f"the area is {area_mm2:g} mm²; cells per mm² need one above 0")
    inside = np.ones(len(cells), dtype=np.bool_)
    if region is not None:
        inside = np.asarray(shapely.intersects_xy(region, cells.xy[:, 0], cells.xy[:, 1]), dtype=np.bool_).reshape(-1)
    return Density(
        figures=per_mm2(int(inside.sum()), area_mm2),
        atypical=per_mm2(int((inside & cells.atypical).sum()), area_mm2),
        area_mm2=float(area_mm2),
    )


def region_mm2(region: Polygon | MultiPolygon, mpp: Mpp) -> float:
    """Return the area of a region drawn in level-0 pixels, in mm²."""
    return float(region.area * mpp.x * mpp.y / 1e6)


def per_mm2(n: int, area_mm2: float, *, level: float = 0.95) -> Interval:
    """Return a count per mm² with the exact interval of a Poisson mean (Garwood 1936).

    It is as wide as chance placement alone would make it: cells gather in hot spots, and one slide says nothing of
    the patient's other slides.
    """
    tail = (1 - level) / 2
    low = float(gammaincinv(n, tail)) if n else 0.0
    high = float(gammaincinv(n + 1, 1 - tail))
    small = area_mm2 < USUAL_AREA_MM2
    note = f"{n} cells on {area_mm2:.3g} mm² of one slide"
    return Interval(
        point=n / area_mm2,
        low=low / area_mm2,
        high=high / area_mm2,
        level=level,
        n=n,
        clusters=1,
        method="garwood",
        note=note + (f"; below the {USUAL_AREA_MM2:g} mm² that a mitotic count is given for" if small else ""),
    )


def write_cells(path: Path | str, cells: ScoredCells) -> Path:
    """Write the cells as detections for QuPath (level-0 pixels), and return the path.

    Each is a square of 12.5 micrometres, of the class "Atypical mitosis" or "Normal mitosis", with its probability and
    the detector's score as measurements.
    """
    half = DRAWN_UM / 2 / np.array([cells.mpp.x, cells.mpp.y])
    corners = np.concatenate([cells.xy - half, cells.xy + half], axis=1).round(2)
    drawn = []
    for at, called in enumerate(cells.atypical.tolist()):
        name = ATYPICAL if called else NORMAL
        measured = {"P(atypical)": round(float(cells.p_atypical[at]), 6)}
        if np.isfinite(cells.found[at]):
            measured["Detection probability"] = round(float(cells.found[at]), 6)
        drawn.append(
            Annotation(
                geometry=shapely.box(*corners[at].tolist()),
                name=name,
                color=CLASS_COLORS[name],
                object_type="detection",
                properties={"measurements": measured},
            )
        )
    return write_geojson(path, drawn)


def count_atypical(
    slide: Slide,
    points: Detections,
    classifier: CellClassifier,
    *,
    out: Path | str,
    threshold: float = 0.5,
    region: Polygon | MultiPolygon | None = None,
) -> dict[str, object]:
    """Score the points of a slide, count on its tissue (and on `region`), and write both under `out`.

    `<slide>.geojson` opens in QuPath, `<slide>.json` holds what is returned: counts, densities with intervals, notes.

    Args:
        slide: an open slide with a known mpp.
        points: what a detector found.
        classifier: what scores the crops.
        out: folder for the two files.
        threshold: from out-of-fold predictions.
        region: a hot spot, say, drawn in level-0 pixels; counted beside the whole tissue.

    Raises:
        TissueError: the slide is blank, or no brightfield slide.
        EosinError: as `classify`.
    """
    cells = classify(slide, points, classifier, threshold=threshold)
    counted = [density(cells, area_mm2=tissue_mask(slide).area_mm2(slide.mpp))]
    if region is not None:
        counted.append(density(cells, area_mm2=region_mm2(region, slide.mpp), region=region))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_cells(folder / f"{slide.name}.geojson", cells)
    found = summary(slide.name, cells, counted)
    draft = folder / f"{slide.name}.json.part"
    draft.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    draft.replace(folder / f"{slide.name}.json")
    return found


def summary(name: str, cells: ScoredCells, counted: Sequence[Density]) -> dict[str, object]:
    """Return counts of one slide as values that JSON knows, for a table of slides."""
    return {
        "slide": name,
        "figures": len(cells),
        "atypical": int(cells.atypical.sum()),
        "threshold": cells.threshold,
        "mpp": [cells.mpp.x, cells.mpp.y],
        "areas": [
            {"area_mm2": c.area_mm2, "figures": c.figures.to_dict(), "atypical": c.atypical.to_dict()} for c in counted
        ],
        "notes": list(cells.notes),
    }
