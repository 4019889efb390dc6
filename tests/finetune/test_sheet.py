"""The sheet: the right cells in the right strips, and a picture that holds them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from cellgen import cell_table
from PIL import Image

from eosin.errors import PredictionsError
from eosin.finetune.sheet import caption, draw_sheet, pick_cells


def test_strips_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    label, p = rng.integers(0, 2, 200), rng.random(200).round(2)
    strips = {strip.name: strip for strip in pick_cells(label, p, threshold=0.3, each=5)}
    cells = list(zip(range(200), label.tolist(), p.tolist(), strict=True))
    expected = {
        "right-atypical": sorted((c for c in cells if c[1] and c[2] >= 0.3), key=lambda c: (-c[2], c[0])),
        "right-normal": sorted((c for c in cells if not c[1] and c[2] < 0.3), key=lambda c: (c[2], c[0])),
        "wrong-missed": sorted((c for c in cells if c[1] and c[2] < 0.3), key=lambda c: (c[2], c[0])),
        "wrong-alarm": sorted((c for c in cells if not c[1] and c[2] >= 0.3), key=lambda c: (-c[2], c[0])),
    }
    for name, found in expected.items():
        assert strips[name].rows.tolist() == [c[0] for c in found[:5]]
        assert strips[name].of == len(found)
    assert sum(len(found) for found in expected.values()) == 200
    assert np.abs(p[strips["borderline"].rows] - 0.3).max() <= np.sort(np.abs(p - 0.3))[5]


def test_borderline_is_measured_in_logits() -> None:
    # in probability 0.001 is nearer to 0.02 than 0.12 is; in log odds it is farther
    strips = pick_cells([0, 0, 1], [0.001, 0.12, 0.9], threshold=0.02, each=1)
    assert strips[-1].rows.tolist() == [1]
    assert pick_cells([0, 1], [0.0, 1.0], threshold=0.5)[1].rows.tolist() == [0]


def test_sheet_shows_the_tiles_it_names() -> None:
    cells = cell_table([1, 0, 1, 0], slides=["a slide with a very long name indeed", "b", "c", "d"])
    tiles = np.stack([np.full((128, 128, 3), value, np.uint8) for value in (40, 90, 140, 190)])
    png = draw_sheet(cells, tiles, [0.9, 0.1, 0.2, 0.7], threshold=0.5, each=4, title="test")
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert shown.shape[1] == 2 * 24 + 4 * 138 - 10
    # each tile is in the strip of its kind and in the borderline strip; bar and frame aside it is whole
    for value in (40, 90, 140, 190):
        assert (shown == value).all(2).sum() > 2 * 0.95 * 128 * 128


def test_empty_strips_are_said_and_drawn() -> None:
    cells = cell_table([1, 0])
    strips = pick_cells(cells.label, [0.9, 0.1], threshold=0.5)
    assert [strip.of for strip in strips] == [1, 1, 0, 0, 2]
    assert draw_sheet(cells, np.zeros((2, 128, 128, 3), np.uint8), [0.9, 0.1], threshold=0.5).startswith(b"\x89PNG")


def test_caption_says_votes_where_there_are_some() -> None:
    cells = cell_table([1, 0], slides=["a", ""], files=["x.png", "y.png"])
    assert caption(cells, 0, 0.25) == ["P 0.250", "atypical", "a", "scanner"]
    assert caption(cells, 1, 1.0)[2] == "y.png"


def test_bad_scores() -> None:
    with pytest.raises(PredictionsError, match="one probability in 0-1 a label"):
        pick_cells([0, 1], [0.2, 3.0], threshold=0.5)
