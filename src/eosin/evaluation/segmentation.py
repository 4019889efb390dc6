"""Scores of masks: overlap, boundary distance in microns, and panoptic quality of instances.

Masks are (H, W). Empty masks have defined scores: two empty masks agree (Dice and IoU 1, distance 0), one empty mask
does not (Dice and IoU 0, distance infinite).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.ndimage import binary_erosion, distance_transform_edt

from eosin.errors import ImplausibleMppError, PredictionsError

Mask = npt.NDArray[Any]


def dice(truth: Mask, prediction: Mask) -> float:
    """Return 2 |A and B| / (|A| + |B|) of two masks (H, W), non-zero = inside.

    Raises:
        PredictionsError: shapes that differ or are not (H, W).
    """
    a, b = _pair(truth, prediction)
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def iou(truth: Mask, prediction: Mask) -> float:
    """Return |A and B| / |A or B| of two masks (H, W), non-zero = inside.

    Raises:
        PredictionsError: shapes that differ or are not (H, W).
    """
    a, b = _pair(truth, prediction)
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def hd95(truth: Mask, prediction: Mask, *, mpp: float, percentile: float = 95.0) -> float:
    """Return the 95th percentile Hausdorff distance of two masks (H, W), in microns.

    The larger of the two directions, each the percentile over the boundary pixels of one mask of their distance to
    the nearest boundary pixel of the other (Huttenlocher et al. 1993, eq. 6). Boundary: pixels inside with a
    neighbour (4-connected) outside; the image edge counts as outside. Distances are between pixel centres.

    Args:
        truth: (H, W), non-zero = inside.
        prediction: (H, W).
        mpp: microns per pixel of the masks.
        percentile: 0-100; 100 is the Hausdorff distance itself.

    Raises:
        PredictionsError: shapes that differ, or a percentile outside 0-100.
        ImplausibleMppError: `mpp` is not positive.
    """
    a, b = _pair(truth, prediction)
    if not 0 <= percentile <= 100:
        raise PredictionsError(f"percentile is {percentile:g}; needed 0-100")
    if not (mpp > 0 and np.isfinite(mpp)):
        raise ImplausibleMppError(f"mpp is {mpp}; needed the microns per pixel of the masks, a positive number")
    if not a.any() or not b.any():
        return 0.0 if a.any() == b.any() else float("inf")
    edges = [mask & ~binary_erosion(mask) for mask in (a, b)]
    distances = [
        np.asarray(distance_transform_edt(~edge))[other] for edge, other in zip(edges, edges[::-1], strict=True)
    ]
    return mpp * max(float(np.percentile(one, percentile)) for one in distances)


@dataclass(frozen=True, kw_only=True, slots=True)
class PanopticQuality:
    """Panoptic quality and its parts (Kirillov et al., CVPR 2019, eq. 1 and 2).

    Attributes:
        pq: sq x rq = sum of IoU over matches / (tp + fp / 2 + fn / 2).
        sq: mean IoU of the matches; 0 without any.
        rq: tp / (tp + fp / 2 + fn / 2), the F1 of detection.
        tp: matched instances.
        fp: predicted instances without a match.
        fn: true instances without a match.
    """

    pq: float
    sq: float
    rq: float
    tp: int
    fp: int
    fn: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def panoptic_quality(truth: Mask, prediction: Mask) -> PanopticQuality:
    """Return the panoptic quality of instance maps (H, W): 0 = background, every other value one instance.

    Two instances match when their IoU is above 0.5, which can hold for one partner only. Two maps without any
    instance agree: pq 1.

    Raises:
        PredictionsError: shapes that differ, or values that are not whole numbers from 0.
    """
    a, b = (_whole(x, name) for x, name in ((truth, "truth"), (prediction, "prediction")))
    _same_shape(a, b)
    names_a, a = np.unique(a, return_inverse=True)
    names_b, b = np.unique(b, return_inverse=True)
    joint = np.bincount(a.ravel() * len(names_b) + b.ravel(), minlength=len(names_a) * len(names_b))
    joint = joint.reshape(len(names_a), len(names_b))
    rows, columns = np.nonzero(joint)
    both = joint[rows, columns]
    overlap = both / (joint.sum(axis=1)[rows] + joint.sum(axis=0)[columns] - both)
    matched = overlap[(overlap > 0.5) & (names_a[rows] != 0) & (names_b[columns] != 0)]
    tp, fn, fp = len(matched), int((names_a != 0).sum()) - len(matched), int((names_b != 0).sum()) - len(matched)
    if tp + fn + fp == 0:
        return PanopticQuality(pq=1.0, sq=1.0, rq=1.0, tp=0, fp=0, fn=0)
    rq, sq = tp / (tp + fp / 2 + fn / 2), float(matched.mean()) if tp else 0.0
    return PanopticQuality(pq=sq * rq, sq=sq, rq=rq, tp=tp, fp=fp, fn=fn)


def segmentation_table(truth: Mask, prediction: Mask, *, mpp: float, classes: int) -> pd.DataFrame:
    """Return the scores of every class of a class map (H, W), a row a class.

    Args:
        truth: class indices 0 ... classes - 1.
        prediction: the same.
        mpp: microns per pixel.
        classes: how many there are.

    Returns:
        Columns class, truth_px, predicted_px, dice, iou, hd95_um. A class absent in both has 1, 1 and 0: leave it
        out of a mean by its pixel counts.

    Raises:
        PredictionsError: shapes that differ, or values outside the classes.
        ImplausibleMppError: `mpp` is not positive.
    """
    a, b = (_whole(x, name) for x, name in ((truth, "truth"), (prediction, "prediction")))
    _same_shape(a, b)
    if max(a.max(), b.max()) >= classes:
        raise PredictionsError(f"class {max(a.max(), b.max())} occurs, but {classes} classes are 0 to {classes - 1}")
    return pd.DataFrame(
        [
            {
                "class": c,
                "truth_px": int((a == c).sum()),
                "predicted_px": int((b == c).sum()),
                "dice": dice(a == c, b == c),
                "iou": iou(a == c, b == c),
                "hd95_um": hd95(a == c, b == c, mpp=mpp),
            }
            for c in range(classes)
        ]
    )


def _pair(truth: Mask, prediction: Mask) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    a, b = np.asarray(truth), np.asarray(prediction)
    _same_shape(a, b)
    for name, mask in (("truth", a), ("prediction", b)):
        if mask.dtype.kind == "f" and not np.isin(mask, (0, 1)).all():
            raise PredictionsError(f"{name} holds fractions or NaN; threshold it to a mask first")
    return a != 0, b != 0


def _same_shape(a: Mask, b: Mask) -> None:
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise PredictionsError(f"masks have shapes {a.shape} and {b.shape}; needed twice the same (H, W)")


def _whole(values: Mask, name: str) -> npt.NDArray[np.int64]:
    found = np.asarray(values)
    if found.dtype.kind not in "biu" or (found.size and found.min() < 0):
        raise PredictionsError(f"{name} holds {found.dtype} values; needed whole numbers from 0")
    return found.astype(np.int64)
