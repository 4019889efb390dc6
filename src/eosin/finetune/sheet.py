"""A sheet of cells for a pathologist: what the model is surest of and right, surest of and wrong, and unsure of."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy.special import logit

from eosin.errors import PredictionsError
from eosin.finetune.cells import TILE_MPP, CellTable

EACH = 8
BAR_UM = 10.0
_GAP, _MARGIN, _LINE, _TITLE = 10, 24, 15, 34
_INK, _SOFT, _PAPER = (31, 36, 48), (102, 112, 133), (255, 255, 255)
_COLORS = {"right": (79, 127, 90), "wrong": (179, 84, 30), "borderline": (143, 63, 113)}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Strip:
    """One row of the sheet.

    Attributes:
        name: "right-atypical", "right-normal", "wrong-missed", "wrong-alarm" or "borderline".
        title: in words.
        rows: (k,) cells, the most telling first.
        of: how many cells there are of this kind.
    """

    name: str
    title: str
    rows: npt.NDArray[np.int64]
    of: int


def pick_cells(label: npt.ArrayLike, p: npt.ArrayLike, *, threshold: float, each: int = EACH) -> tuple[Strip, ...]:
    """Return the cells worth a look: four strips by label and call, surest first, and the ones nearest the threshold.

    Args:
        label: (n,) 1 = atypical.
        p: (n,) P(atypical), out of fold or external.
        threshold: a cell from it on is called atypical.
        each: cells a strip at most; equal scores in the order of the table.

    Raises:
        PredictionsError: not one probability a label.
    """
    labels, scores = np.asarray(label), np.asarray(p, dtype=np.float64)
    if labels.ndim != 1 or scores.shape != labels.shape or not ((scores >= 0) & (scores <= 1)).all():
        raise PredictionsError(
            f"labels {labels.shape} and scores {scores.shape}: needed one probability in 0-1 a label"
        )
    called = scores >= threshold
    kinds = (
        ("right-atypical", "Right: atypical, and most surely called so", (labels == 1) & called, -scores),
        ("right-normal", "Right: normal, and most surely called so", (labels == 0) & ~called, scores),
        ("wrong-missed", "Wrong: labelled atypical, most surely called normal", (labels == 1) & ~called, scores),
        ("wrong-alarm", "Wrong: labelled normal, most surely called atypical", (labels == 0) & called, -scores),
    )
    strips = [
        Strip(name=name, title=title, rows=_first(np.flatnonzero(mask), order, each), of=int(mask.sum()))
        for name, title, mask, order in kinds
    ]
    margin = np.abs(logit(scores.clip(1e-9, 1 - 1e-9)) - logit(np.clip(threshold, 1e-9, 1 - 1e-9)))
    nearest = _first(np.arange(len(labels)), margin, each)
    strips.append(Strip(name="borderline", title="Borderline: nearest to the threshold", rows=nearest, of=len(labels)))
    return tuple(strips)


def _first(rows: npt.NDArray[np.int64], order: npt.NDArray[np.float64], each: int) -> npt.NDArray[np.int64]:
    return rows[np.argsort(order[rows], kind="stable")[:each]]


def draw_sheet(
    cells: CellTable,
    tiles: npt.NDArray[np.uint8] | Mapping[int, npt.NDArray[np.uint8]],
    p: npt.ArrayLike,
    *,
    threshold: float,
    each: int = EACH,
    title: str = "",
) -> bytes:
    """Return the sheet as PNG: a strip a kind, under each tile its score, label, votes, slide and scanner.

    Args:
        cells: the table.
        tiles: uint8 (n, S, S, 3) at 0.25 microns per pixel; or row -> (S, S, 3), of the rows that `pick_cells` gives.
        p: (n,) P(atypical).
        threshold: chosen out of fold.
        each: cells a strip.
        title: first line.
    """
    scores = np.asarray(p, dtype=np.float64)
    strips = pick_cells(cells.label, scores, threshold=threshold, each=each)
    side = len(tiles[int(strips[-1].rows[0])])
    height = _TITLE + side + 4 * _LINE + _GAP
    size = (2 * _MARGIN + each * (side + _GAP) - _GAP, 2 * _MARGIN + 2 * _LINE + len(strips) * height)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN - 8), title, fill=_INK, font=_font(17))
    legend = f"P is the probability of an atypical figure, called from {threshold:.3f} on; bar {BAR_UM:g} microns"
    pen.text((_MARGIN, _MARGIN + 14), legend, fill=_SOFT, font=_font(12))
    for at, strip in enumerate(strips):
        top = _MARGIN + 2 * _LINE + at * height
        color = _COLORS[strip.name.split("-")[0]]
        heading = f"{strip.title} ({len(strip.rows)} of {strip.of})" if len(strip.rows) else f"{strip.title}: none"
        pen.text((_MARGIN, top + 12), heading, fill=color, font=_font(14))
        for column, row in enumerate(strip.rows.tolist()):
            _draw_cell(sheet, pen, (_MARGIN + column * (side + _GAP), top + _TITLE), tiles[row], color)
            lines = caption(cells, row, float(scores[row]))
            for line, text in enumerate(lines):
                where = (_MARGIN + column * (side + _GAP), top + _TITLE + side + 3 + line * _LINE)
                pen.text(where, _short(text, side, pen), fill=_INK if line == 0 else _SOFT, font=_font(11))
    file = io.BytesIO()
    sheet.save(file, format="PNG", optimize=True)
    return file.getvalue()


def caption(cells: CellTable, row: int, p: float) -> list[str]:
    """Return what stands under a cell: score, label with votes, slide, scanner."""
    cast = [int(column[row]) for column in cells.votes.values() if column[row] >= 0]
    votes = f" ({sum(cast)} of {len(cast)} votes)" if cast else ""
    label = "atypical" if cells.label[row] else "normal"
    return [
        f"P {p:.3f}",
        f"{label}{votes}",
        str(cells.slide_id[row] or cells.file[row]),
        str(cells.scanner[row] or cells.dataset[row]),
    ]


def _draw_cell(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    tile: npt.NDArray[np.uint8],
    color: tuple[int, int, int],
) -> None:
    x, y = corner
    side = tile.shape[0]
    sheet.paste(Image.fromarray(tile), corner)
    pen.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=color, width=2)
    bar = round(BAR_UM / TILE_MPP)
    pen.rectangle((x + 6, y + side - 10, x + 6 + bar, y + side - 7), fill=_PAPER, outline=_INK)


def _short(text: str, width: int, pen: ImageDraw.ImageDraw) -> str:
    """Return `text`, its middle left out where it is wider than a tile."""
    if pen.textlength(text, font=_font(11)) <= width:
        return text
    for keep in range(len(text) - 1, 2, -1):
        half = keep // 2
        shorter = f"{text[: keep - half]}…{text[len(text) - half :]}"
        if pen.textlength(shorter, font=_font(11)) <= width:
            return shorter
    return text[:3]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
