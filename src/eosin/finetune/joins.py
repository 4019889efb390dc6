"""MIDOG++ boxes joined to the labels of atypical figures: each is a hard negative, a normal or an atypical one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from scipy.spatial import KDTree

from eosin.errors import CohortError, GeometryError
from eosin.finetune.aliases import slide_identity
from eosin.finetune.cells import CellTable, Texts

CLASSES = ("hard negative", "normal", "atypical")
UNLABELLED = -1
# Centres are whole or half pixels of one drawing; two pixels are room for rounding, not for another cell.
SAME_CELL_PX = 2.0

_MITOTIC = frozenset({"mitotic figure", "mitosis"})
_LOOKALIKE = frozenset({"not mitotic figure", "non-mitotic figure", "hard negative", "hard negative imposter"})


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class BoxTable:
    """The boxes of a detection set, one a row.

    Attributes:
        slide: (n,) file name of the slide.
        xy: float64 (n, 2) centre, level-0 pixels.
        size_px: float64 (n, 2) width and height.
        mitotic: bool (n,) a mitotic figure; else a cell that looks like one (hard negative).
        tumour: (n,) tumour type as the file says, "" where it does not.
        slide_px: slide -> (width, height) of its picture, slides without boxes included.
    """

    slide: Texts
    xy: npt.NDArray[np.float64]
    size_px: npt.NDArray[np.float64]
    mitotic: npt.NDArray[np.bool_]
    tumour: Texts
    slide_px: Mapping[str, tuple[int, int]]

    def __len__(self) -> int:
        """Return the number of boxes."""
        return len(self.mitotic)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Join:
    """Boxes and cells brought together.

    Attributes:
        kind: int8 (boxes,), index into `CLASSES`, -1 for a mitotic figure that no cell labels.
        cell: int64 (boxes,), row of the cell of each box, -1 where there is none.
        alone: int64 (k,), rows of cells without a box on their slide's list, or whose slide is not listed.
        on_negatives: int64 (m,), rows of cells that lie on a hard negative: one of the two sets is wrong there.
    """

    kind: npt.NDArray[np.int8]
    cell: npt.NDArray[np.int64]
    alone: npt.NDArray[np.int64]
    on_negatives: npt.NDArray[np.int64]

    def counts(self) -> dict[str, int]:
        """Return the boxes of each class, and what did not fit."""
        known = {name: int((self.kind == at).sum()) for at, name in enumerate(CLASSES)}
        return known | {
            "mitotic figure without a label": int((self.kind == UNLABELLED).sum()),
            "cells without a box": len(self.alone),
            "cells on a hard negative": len(self.on_negatives),
        }


def read_boxes(path: Path | str) -> BoxTable:
    """Return the boxes of a MIDOG++ file (`MIDOG++.json`).

    It looks like COCO but its boxes are two corners, (x1, y1, x2, y2), where COCO has a corner and a size.

    Raises:
        CohortError: no such file, or not of this form.
        GeometryError: boxes of a corner and a size, or outside their slide.
    """
    path = Path(path)
    try:
        data = orjson.loads(path.read_bytes())
        images = {image["id"]: image for image in data["images"]}
        names = {category["id"]: str(category["name"]).casefold() for category in data["categories"]}
        notes = data["annotations"]
        corners = np.array([note["bbox"] for note in notes], dtype=np.float64).reshape(len(notes), 4)
        own = [images[note["image_id"]] for note in notes]
        kinds = [names[note["category_id"]] for note in notes]
        sizes = {str(image["file_name"]): (int(image["width"]), int(image["height"])) for image in images.values()}
    except FileNotFoundError as error:
        raise CohortError(f"{path}: no such file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CohortError(
            f"{path}: not a MIDOG++ file ({type(error).__name__}: {error}); needed are images, categories and "
            "annotations with bbox, image_id and category_id"
        ) from error
    strange = sorted(set(kinds) - _MITOTIC - _LOOKALIKE)
    if strange:
        raise CohortError(f"{path}: category {strange[0]!r} is neither a mitotic figure nor a hard negative")
    slides = [str(image["file_name"]) for image in own]
    _check_corners(corners, np.array([sizes[name] for name in slides]).reshape(-1, 2), str(path))
    return BoxTable(
        slide=np.array(slides, dtype=np.str_),
        xy=(corners[:, :2] + corners[:, 2:]) / 2,
        size_px=corners[:, 2:] - corners[:, :2],
        mitotic=np.array([kind in _MITOTIC for kind in kinds], dtype=np.bool_),
        tumour=np.array([_tumour(image) for image in own], dtype=np.str_),
        slide_px=sizes,
    )


def _tumour(image: Mapping[str, Any]) -> str:
    return str(image.get("tumor_type", "")).casefold()


def _check_corners(corners: npt.NDArray[np.float64], slide_px: npt.NDArray[np.int64], where: str) -> None:
    if not len(corners):
        raise CohortError(f"{where}: no box")
    flat = (corners[:, 2:] <= corners[:, :2]).any(axis=1)
    if flat.any():
        at = int(np.flatnonzero(flat)[0])
        raise GeometryError(
            f"{where}: {int(flat.sum())} boxes end before they start (first: annotation {at}, {corners[at].tolist()}); "
            "boxes must be two corners (x1, y1, x2, y2). These look like corner and size: add the corner to the size"
        )
    # MIDOG++ itself has two boxes whose centres lie just off the slide; none lies wholly off it.
    outside = ((corners[:, 2:] <= 0) | (corners[:, :2] >= slide_px)).any(axis=1)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise GeometryError(
            f"{where}: {int(outside.sum())} boxes lie off their slide (first: annotation {at}, "
            f"{corners[at].tolist()} on {slide_px[at].tolist()} pixels)"
        )


def join_boxes(boxes: BoxTable, cells: CellTable, *, dataset: str = "midog++") -> Join:
    """Return the class of every box, from the labels of the cells at their centres.

    A cell takes the nearest mitotic box of its slide within 2 pixels that no nearer cell has taken. Slides go by
    `aliases.slide_identity`.

    Args:
        boxes: of the detection set.
        cells: labelled cells with slide and position.
        dataset: what the set of the boxes is called.

    Raises:
        CohortError: cells without slide or position.
    """
    if not np.isfinite(cells.xy).all() or (cells.slide_id == "").any():
        gone = int((~np.isfinite(cells.xy).all(axis=1) | (cells.slide_id == "")).sum())
        raise CohortError(f"{gone} of {len(cells)} cells have no slide or no position; take() those that have")
    of_box = _by_slide([slide_identity(dataset, name) for name in boxes.slide.tolist()])
    of_cell = _by_slide(
        [slide_identity(a, b) for a, b in zip(cells.dataset.tolist(), cells.slide_id.tolist(), strict=True)]
    )
    cell = np.full(len(boxes), -1, dtype=np.int64)
    alone, on_negatives = [], []
    for slide, rows in of_cell.items():
        here = of_box.get(slide, np.empty(0, dtype=np.int64))
        mitotic, negative = here[boxes.mitotic[here]], here[~boxes.mitotic[here]]
        left = _take_nearest(cells.xy, rows, boxes.xy, mitotic, cell)
        hit = _near(cells.xy[left], boxes.xy[negative])
        on_negatives += left[hit].tolist()
        alone += left[~hit].tolist()
    kind = np.where(boxes.mitotic, UNLABELLED, 0).astype(np.int8)
    known = cell >= 0
    kind[known] = cells.label[cell[known]] + 1
    return Join(
        kind=kind,
        cell=cell,
        alone=np.sort(np.array(alone, dtype=np.int64)),
        on_negatives=np.sort(np.array(on_negatives, dtype=np.int64)),
    )


def _by_slide(keys: list[tuple[str, str]]) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
    rows: dict[tuple[str, str], list[int]] = {}
    for at, key in enumerate(keys):
        rows.setdefault(key, []).append(at)
    return {key: np.array(at, dtype=np.int64) for key, at in rows.items()}


def _take_nearest(
    cell_xy: npt.NDArray[np.float64],
    rows: npt.NDArray[np.int64],
    box_xy: npt.NDArray[np.float64],
    free: npt.NDArray[np.int64],
    taken: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Write the cell of each free box into `taken`, nearest pairs first; return the cells that got none."""
    if not len(free):
        return rows
    near = KDTree(cell_xy[rows]).sparse_distance_matrix(KDTree(box_xy[free]), SAME_CELL_PX, output_type="ndarray")
    placed: set[int] = set()
    for pair in near[np.argsort(near["v"], kind="stable")]:
        row, box = int(rows[pair["i"]]), int(free[pair["j"]])
        if row not in placed and taken[box] < 0:
            taken[box] = row
            placed.add(row)
    return rows[[int(row) not in placed for row in rows]]


def _near(points: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    if not len(points) or not len(others):
        return np.zeros(len(points), dtype=np.bool_)
    distance, _ = KDTree(others).query(points, distance_upper_bound=SAME_CELL_PX * (1 + 1e-9))
    return np.isfinite(distance)
