"""What a detector is trained on: pictures with the boxes that lie on them, and windows drawn from those.

A picture is a region that was annotated whole (the TIFF of MIDOG++), or a crop of 128 px cut around one cell, whose
place on its slide says which other boxes lie on it. Windows have random offsets, so that no place in them has a
meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eosin.errors import CohortError, GeometryError, LabelError
from eosin.finetune.aliases import slide_identity
from eosin.finetune.cells import TILE_MPP, TILE_PX, read_tile
from eosin.finetune.joins import BoxTable
from eosin.finetune.tables import TABLE_NAMES, read_table
from eosin.geometry import ReadPlan, round_half_up
from eosin.slides import Slide, open_slide

# Share of a window, at either end, that figures need not reach.
EDGE = 0.1
MIDOG = "midog++"
PICTURES = (".tiff", ".tif", ".png", ".jpg", ".jpeg", ".svs", ".ndpi")

Tiles = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Picture:
    """One picture with its boxes.

    Attributes:
        name: of the file.
        group: "set/slide", what is kept in one fold and resampled as one.
        slide: the open picture.
        xy: float64 (n, 2) centres of boxes, level-0 pixels of the picture, pixel i reaching from i to i + 1.
        mitotic: bool (n,) a mitotic figure; else a cell that looks like one (hard negative).
    """

    name: str
    group: str
    slide: Slide
    xy: Points
    mitotic: npt.NDArray[np.bool_]

    @property
    def figures(self) -> Points:
        """Centres of the mitotic figures, (m, 2)."""
        return self.xy[self.mitotic]


def read_pictures(
    boxes: BoxTable, images: Path, *, slide_mpp: float | None = None
) -> tuple[list[Picture], tuple[str, ...]]:
    """Return the pictures of a folder with their boxes, and what the reader should know.

    A folder with a table of cells (`labels.csv` ...) holds crops of 128 px at 0.25 microns per pixel; any other holds
    pictures that are called as the boxes' file says, whatever their ending.

    Args:
        boxes: of `joins.read_boxes`.
        images: the folder.
        slide_mpp: microns per pixel of pictures that do not say theirs.

    Raises:
        CohortError: no picture of the boxes' slides, or an unreadable one.
        LabelError: no mitotic figure on any of them.
        MissingMppError: a picture does not say its mpp, and none is given.
    """
    if not images.is_dir():
        raise CohortError(f"{images}: no such folder of pictures")
    rows: dict[tuple[str, str], list[int]] = {}
    for at, name in enumerate(boxes.slide.tolist()):
        rows.setdefault(slide_identity(MIDOG, name), []).append(at)
    if any((images / name).is_file() for name in TABLE_NAMES):
        pictures, notes = _crops(boxes, rows, images)
    else:
        pictures, notes = _regions(boxes, rows, images, slide_mpp)
    if not pictures:
        raise CohortError(f"{images}: no picture of the {len(boxes.slide_px)} slides of the boxes; is this the folder?")
    if not any(picture.mitotic.any() for picture in pictures):
        raise LabelError(
            f"{images}: no mitotic figure lies on any of {len(pictures)} pictures; there is nothing to learn. "
            "Do the boxes belong to these pictures?"
        )
    return pictures, notes


def _crops(
    boxes: BoxTable, rows: dict[tuple[str, str], list[int]], images: Path
) -> tuple[list[Picture], tuple[str, ...]]:
    """Return the crops of a table of cells, each with all boxes whose centre lies on it."""
    cells = read_table(images)
    pictures, other = [], 0
    columns = (cells.file, cells.dataset, cells.slide_id, cells.xy)
    for file, dataset, slide_id, centre in zip(*(column.tolist() for column in columns), strict=True):
        key = slide_identity(dataset, slide_id)
        if key not in rows or not np.isfinite(centre).all() or not file:
            other += 1
            continue
        here = np.array(rows[key], dtype=np.int64)
        xy = boxes.xy[here] - (round_half_up(centre) - TILE_PX // 2)
        on = ((xy >= 0) & (xy < TILE_PX)).all(axis=1)
        pictures.append(
            Picture(
                name=file,
                group="/".join(key),
                slide=open_slide(read_tile(images / file), mpp=TILE_MPP),
                xy=xy[on],
                mitotic=boxes.mitotic[here[on]],
            )
        )
    notes = [
        f"{len(pictures)} crops of {TILE_PX} px, each cut around a cell: what is found on them says little of slides"
    ]
    if other:
        notes.append(f"{other} crops are of slides without boxes, or have no place on theirs; they are left out")
    return pictures, tuple(notes)


def _regions(
    boxes: BoxTable, rows: dict[tuple[str, str], list[int]], images: Path, slide_mpp: float | None
) -> tuple[list[Picture], tuple[str, ...]]:
    """Return the pictures of the slides that a file of boxes lists, those without a box included."""
    files = {path.name.split(".")[0]: path for path in sorted(images.iterdir()) if path.suffix.lower() in PICTURES}
    pictures = []
    for name in boxes.slide_px:
        path = files.get(name.split(".")[0])
        if path is None:
            continue
        slide = open_slide(path, mpp=slide_mpp)
        _ = slide.mpp
        if slide.size_px != boxes.slide_px[name]:
            raise CohortError(
                f"{path}: {slide.size_px[0]} x {slide.size_px[1]} px where the boxes' file says "
                f"{boxes.slide_px[name][0]} x {boxes.slide_px[name][1]}; the boxes are of another picture"
            )
        key = slide_identity(MIDOG, name)
        here = np.array(rows.get(key, []), dtype=np.int64)
        pictures.append(
            Picture(name=path.name, group="/".join(key), slide=slide, xy=boxes.xy[here], mitotic=boxes.mitotic[here])
        )
    missing = len(boxes.slide_px) - len(pictures)
    return pictures, ((f"{missing} of {len(boxes.slide_px)} listed slides have no picture here",) if missing else ())


class Windows:
    """Windows of pictures, drawn around figures, around lookalikes, or anywhere, in the shares asked for.

    Args:
        pictures: to draw from.
        window_px: side of a window.
        mpp: microns per pixel of a window.
        figure_share: share of windows that hold a figure, at a random place.
        lookalike_share: the same of hard negatives; drawn anywhere where there is none.

    Raises:
        GeometryError: a picture is smaller than a window, or so small around its figures that their place in a window
            would give them away.
        UpsampleError: a picture is more than twice as coarse as `mpp`.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        *,
        window_px: int,
        mpp: float,
        figure_share: float,
        lookalike_share: float,
    ) -> None:
        self.pictures = tuple(pictures)
        self.plans = tuple(picture.slide.plan(tile_px=window_px, mpp=mpp) for picture in pictures)
        places = [
            (at, box, bool(kind)) for at, picture in enumerate(pictures) for box, kind in enumerate(picture.mitotic)
        ]
        self.figures = [(at, box) for at, box, mitotic in places if mitotic]
        self.lookalikes = [(at, box) for at, box, mitotic in places if not mitotic]
        self.shares = (figure_share, figure_share + lookalike_share)
        self._check(window_px)

    def _check(self, window_px: int) -> None:
        """Refuse windows in which figures cannot lie nearly anywhere."""
        for picture, plan in zip(self.pictures, self.plans, strict=True):
            width, height = picture.slide.size_px
            if (np.array(plan.size0_px) > np.array(picture.slide.bounds[2:]) + 1).any():
                raise GeometryError(
                    f"{picture.name}: {width} x {height} px are smaller than a window of {window_px} px at "
                    f"{plan.mpp:g} microns per pixel; use smaller windows"
                )
        if not self.figures:
            return
        reach = np.array([self._reach(at, box) for at, box in self.figures])
        low, high = reach[:, 0].min(axis=0).max(), reach[:, 1].max(axis=0).min()
        if low > EDGE or high < 1 - EDGE:
            raise GeometryError(
                f"in windows of {window_px} px the figures of these pictures lie only from {low * window_px:.0f} to "
                f"{high * window_px:.0f} px: their place would give them away; use windows of at most half a picture"
            )

    def _reach(self, at: int, box: int) -> tuple[Points, Points]:
        """Return the least and the greatest place (2,) of a figure in windows on its picture, as shares of a side."""
        picture, size0 = self.pictures[at], np.array(self.plans[at].size0_px)
        place = picture.xy[box] - np.array(picture.slide.bounds[:2])
        return np.maximum(0, place - _room(picture.slide, self.plans[at])) / size0, np.minimum(size0, place) / size0

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tiles, list[Points], list[str]]:
        """Return windows uint8 (count, S, S, 3), the figures of each (m, 2) in its pixels, and their pictures' names.

        Each is turned by a quarter and mirrored at random.
        """
        tiles, points, names = [], [], []
        for _ in range(count):
            at, corner = self._place(rng)
            picture, plan = self.pictures[at], self.plans[at]
            rgb = picture.slide.read_tile((int(corner[0]), int(corner[1])), plan).rgb
            place = (picture.figures - corner) / np.array(plan.size0_px) * plan.tile_px
            tile, place = turn(rgb, place, int(rng.integers(8)))
            tiles.append(tile)
            points.append(place)
            names.append(picture.name)
        return np.stack(tiles), points, names

    def _place(self, rng: np.random.Generator) -> tuple[int, npt.NDArray[np.int64]]:
        """Return a picture's number and the corner of a window in it, level-0 pixels."""
        kind, within = rng.random(), rng.random(2)
        around = self.figures if kind < self.shares[0] else self.lookalikes if kind < self.shares[1] else []
        if around:
            at, box = around[int(rng.integers(len(around)))]
            start = self.pictures[at].xy[box] - within * self.plans[at].size0_px
        else:
            at = int(rng.integers(len(self.pictures)))
            start = within * _room(self.pictures[at].slide, self.plans[at])
        x, y, _, _ = self.pictures[at].slide.bounds
        low = np.array([x, y])
        return at, np.clip(
            round_half_up(start), low, low + round_half_up(_room(self.pictures[at].slide, self.plans[at]))
        )


def _room(slide: Slide, plan: ReadPlan) -> Points:
    """Return how far a window's corner may move on a slide, (2,) level-0 pixels; 0 where the slide is smaller."""
    return np.maximum(0, np.array(slide.bounds[2:]) - np.array(plan.size0_px))


def turn(tile: Tiles, points: Points, which: int) -> tuple[Tiles, Points]:
    """Return a square tile (S, S, 3) and its points (n, 2) turned and mirrored in one of eight ways, 0 leaves them."""
    side = tile.shape[0]
    if which & 1:
        tile, points = tile[:, ::-1], np.stack((side - points[:, 0], points[:, 1]), axis=1)
    if which & 2:
        tile, points = tile[::-1], np.stack((points[:, 0], side - points[:, 1]), axis=1)
    if which & 4:
        tile, points = tile.transpose(1, 0, 2), points[:, ::-1]
    return np.ascontiguousarray(tile), np.ascontiguousarray(points)
