"""Found cells against true ones: the MIDOG challenge's rule, its F1, FROC and average precision.

A detection is a hit when it lies within 7.5 micrometres of a cell. Each cell takes its nearest detection that no
earlier cell has taken; what is left over is a false positive, a cell that got none a false negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

from eosin.errors import NonFiniteError, PredictionsError
from eosin.evaluation.bootstrap import Metric

Points = npt.NDArray[np.float64]

HIT_UM = 7.5
# Half the side of the squares that stand for points in the challenge's average precision.
HALF_BOX_UM = 11.25
FROC_MAX_FALSE = 8
FROC_THRESHOLDS = 40
FROC_POINTS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """True positives, false positives and false negatives of one slide, or summed over many."""

    tp: int
    fp: int
    fn: int

    @property
    def precision(self) -> float:
        """Share of the detections that are cells; NaN without detections."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else float("nan")

    @property
    def recall(self) -> float:
        """Share of the cells that are detected; NaN without cells."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else float("nan")

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN with neither cells nor detections."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else float("nan")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SlideDetections:
    """The true and the found cells of one slide, in micrometres from its corner.

    Attributes:
        truth_um: float64 (m, 2) true cells.
        found_um: float64 (n, 2) detections.
        score: float64 (n,) higher is surer.
    """

    truth_um: Points
    found_um: Points
    score: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit and numbers that are not finite."""
        n = len(self.score)
        if self.truth_um.shape[1:] != (2,) or self.found_um.shape != (n, 2) or self.score.shape != (n,):
            raise PredictionsError(
                f"truth {self.truth_um.shape}, detections {self.found_um.shape} and scores {self.score.shape}; "
                "needed (m, 2), (n, 2) and (n,)"
            )
        for name in ("truth_um", "found_um", "score"):
            if not np.isfinite(getattr(self, name)).all():
                raise NonFiniteError(f"{name} has values that are not finite; leave those detections out")


def match(truth: Points, found: Points, *, radius: float) -> npt.NDArray[np.int64]:
    """Return the detection that each true cell takes, int64 (m,), -1 for none.

    Cells choose in their order, each the nearest detection within `radius` (of equals the first) that is free: the
    rule of the challenge's evaluation. Where cells lie closer together than twice the radius, another order may give
    one hit more; `scipy.sparse.csgraph.maximum_bipartite_matching` bounds it.

    Args:
        truth: (m, 2) true cells.
        found: (n, 2) detections, in the same unit.
        radius: of a hit, in that unit, its edge included.
    """
    taken = np.full(len(truth), -1, dtype=np.int64)
    if not len(truth) or not len(found):
        return taken
    free = np.ones(len(found), dtype=np.bool_)
    near = KDTree(found).query_ball_point(truth, radius * (1 + 1e-12), return_sorted=True)
    for at, candidates in enumerate(near):
        rows = np.array(candidates, dtype=np.int64)
        rows = rows[free[rows]]
        if len(rows):
            distance = np.hypot(*(found[rows] - truth[at]).T)
            taken[at] = rows[np.argmin(distance)]
            free[taken[at]] = False
    return taken


def count(truth: Points, found: Points, *, radius: float) -> Counts:
    """Return hits, false detections and missed cells by the rule of `match`."""
    tp = int((match(truth, found, radius=radius) >= 0).sum())
    return Counts(tp=tp, fp=len(found) - tp, fn=len(truth) - tp)


def count_slides(
    slides: Sequence[SlideDetections], *, threshold: float = -np.inf, radius_um: float = HIT_UM
) -> npt.NDArray[np.int64]:
    """Return (slides, 3) of TP, FP and FN, with the detections of a score at least `threshold`."""
    rows = []
    for slide in slides:
        counts = count(slide.truth_um, slide.found_um[slide.score >= threshold], radius=radius_um)
        rows.append((counts.tp, counts.fp, counts.fn))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def pooled(counts: npt.NDArray[np.int64]) -> Counts:
    """Return the sums over slides, whose F1 is the challenge's."""
    tp, fp, fn = counts.sum(axis=0).tolist()
    return Counts(tp=tp, fp=fp, fn=fn)


def f1_metric(counts: npt.NDArray[np.int64]) -> Metric:
    """Return the pooled F1 as a metric of weights over slides, for `evaluation.bootstrap` with slides as rows."""
    tp, fp, fn = counts.astype(np.float64).T

    def pooled_f1(weights: npt.NDArray[np.floating], /) -> npt.NDArray[np.float64]:
        hits, others = 2 * (weights @ tp), weights @ (fp + fn)
        with np.errstate(invalid="ignore"):
            return np.asarray(hits / (hits + others), dtype=np.float64)

    return pooled_f1


def best_threshold(slides: Sequence[SlideDetections], *, radius_um: float = HIT_UM) -> tuple[float, Counts]:
    """Return the threshold of the highest pooled F1 and what it counts; of equals the highest threshold.

    For slides that were held out of training, and never for those the F1 is reported on.

    Raises:
        PredictionsError: no detection on any slide.
    """
    scores = np.unique(np.concatenate([slide.score for slide in slides])) if slides else np.empty(0)
    if not len(scores):
        raise PredictionsError("no detection on any slide: there is no threshold to choose")
    # At most 512 of the distinct scores: F1 is flat between neighbours of so many.
    steps = scores[np.unique(np.linspace(0, len(scores) - 1, min(512, len(scores))).round().astype(int))]
    tried = [pooled(count_slides(slides, threshold=float(step), radius_um=radius_um)) for step in steps]
    f1 = np.nan_to_num(np.array([counts.f1 for counts in tried]))
    at = int(np.flatnonzero(f1 == f1.max())[-1])
    return float(steps[at]), tried[at]


def froc_area(slides: Sequence[SlideDetections], *, radius_um: float = HIT_UM) -> float:
    """Return the area under recall over false positives a slide from 0 to 8, hence 0-8, as the challenge takes it.

    40 thresholds evenly between the lowest and the highest score; recall interpolated at 50 points, 0 to the left of
    the curve and level to its right. Of equal false positives the highest recall comes last; the challenge's own code
    leaves their order to an unstable sort, so that few slides may differ from it by a tenth. NaN without detections.
    """
    scores = np.concatenate([slide.score for slide in slides]) if slides else np.empty(0)
    if not len(scores):
        return float("nan")
    low, high = float(scores.min()), float(scores.max())
    thresholds = np.linspace(low, high, FROC_THRESHOLDS) if low < high else np.array([low])
    false, recall = [], []
    for threshold in thresholds.tolist():
        counts = count_slides(slides, threshold=threshold, radius_um=radius_um)
        false.append(counts[:, 1].mean())
        recall.append(counts[:, 0].sum() / max(1, counts[:, 0].sum() + counts[:, 2].sum()))
    order = np.lexsort((recall, false))
    at = np.linspace(0, FROC_MAX_FALSE, FROC_POINTS)
    curve = np.interp(at, np.array(false)[order], np.array(recall)[order], left=0.0)
    return float(np.trapezoid(curve, at))


def average_precision(slides: Sequence[SlideDetections], *, half_box_um: float = HALF_BOX_UM) -> float:
    """Return COCO's average precision at an overlap of one half, of squares of 22.5 micrometres around the points.

    Detections of all slides in the order of their scores; each takes the free true square of its slide that it
    overlaps most, by at least half (intersection over union). Precision, made falling, is read at 101 recalls (Lin et
    al. 2014; Everingham et al. 2010, section 4.2). NaN without true cells.
    """
    cells = sum(len(slide.truth_um) for slide in slides)
    if not cells:
        return float("nan")
    score, hit = [], []
    for slide in slides:
        order = np.argsort(-slide.score, kind="stable")
        score.append(slide.score[order])
        hit.append(_square_hits(slide.truth_um, slide.found_um[order], half_box_um))
    ranked = np.concatenate(hit)[np.argsort(-np.concatenate(score), kind="stable")]
    if not len(ranked):
        return 0.0
    tp = np.cumsum(ranked)
    precision = np.maximum.accumulate((tp / np.arange(1, len(ranked) + 1))[::-1])[::-1]
    at = np.searchsorted(tp / cells, np.linspace(0, 1, 101), side="left")
    return float(np.append(precision, 0.0)[np.minimum(at, len(precision))].mean())


def _square_hits(truth: Points, found: Points, half: float) -> npt.NDArray[np.bool_]:
    """Return which detections (n,), in order, take a true square that they overlap by half."""
    hit = np.zeros(len(found), dtype=np.bool_)
    free = np.ones(len(truth), dtype=np.bool_)
    for at, point in enumerate(found):
        shared = np.clip(2 * half - np.abs(truth - point), 0, None).prod(axis=1)
        overlap = np.where(free, shared / (2 * (2 * half) ** 2 - shared), -1)
        best = int(np.argmax(overlap)) if len(truth) else -1
        if best >= 0 and overlap[best] >= 0.5:
            hit[at], free[best] = True, False
    return hit
