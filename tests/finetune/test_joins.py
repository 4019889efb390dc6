from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from cellgen import cell_table

from eosin.errors import CohortError, GeometryError
from eosin.finetune.joins import join_boxes, read_boxes
from eosin.finetune.tables import read_table


def boxes_file(path: Path, boxes: list[tuple[list[float], int, int]], **change: Any) -> Path:
    """Write boxes (corners, category, image) of two slides of 1000 x 800."""
    data = {
        "images": [{"id": i, "file_name": f"00{i}.tiff", "width": 1000, "height": 800} for i in (1, 2)],
        "categories": [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "not mitotic figure"}],
        "annotations": [{"bbox": box, "category_id": kind, "image_id": image} for box, kind, image in boxes],
    }
    path.write_bytes(orjson.dumps(data | change))
    return path


def around(x: float, y: float) -> list[float]:
    return [x - 25, y - 25, x + 25, y + 25]


def test_each_box_gets_its_class(tmp_path: Path) -> None:
    boxes = read_boxes(
        boxes_file(
            tmp_path / "boxes.json",
            [(around(100, 100), 1, 1), (around(200, 100), 1, 1), (around(300, 100), 2, 1), (around(100, 100), 1, 2)],
        )
    )
    cells = cell_table(
        [1, 0, 0, 1, 1],
        dataset="midog25",
        slides=["001.tiff", "001.tiff", "001.tiff", "002.tiff", "003.tiff"],
        xy=[(100.5, 100), (200, 99), (300, 100), (500, 500), (100, 100)],
    )
    join = join_boxes(boxes, cells)
    assert join.kind.tolist() == [2, 1, 0, -1]
    assert join.cell.tolist() == [0, 1, -1, -1]
    assert join.on_negatives.tolist() == [2]
    assert join.alone.tolist() == [3, 4]
    assert join.counts() == {
        "hard negative": 1,
        "normal": 1,
        "atypical": 1,
        "mitotic figure without a label": 1,
        "cells without a box": 2,
        "cells on a hard negative": 1,
    }


def test_two_cells_at_one_box_leave_the_farther_alone(tmp_path: Path) -> None:
    boxes = read_boxes(boxes_file(tmp_path / "boxes.json", [(around(100, 100), 1, 1), (around(101.5, 100), 1, 1)]))
    cells = cell_table([0, 1, 0], dataset="midog25", slides=["1"] * 3, xy=[(100, 100), (100, 101), (101.5, 100)])
    join = join_boxes(boxes, cells)
    assert join.cell.tolist() == [0, 2]
    assert join.alone.tolist() == [1]


def test_a_corner_and_a_size_are_not_taken_for_two_corners(tmp_path: Path) -> None:
    path = boxes_file(tmp_path / "coco.json", [([100, 100, 50, 50], 1, 1)])
    with pytest.raises(GeometryError, match=r"two corners.*add the corner to the size"):
        read_boxes(path)


def test_boxes_off_their_slide_are_refused_and_those_over_its_edge_kept(tmp_path: Path) -> None:
    assert len(read_boxes(boxes_file(tmp_path / "edge.json", [(around(-2, 400), 1, 1)]))) == 1
    with pytest.raises(GeometryError, match="off their slide"):
        read_boxes(boxes_file(tmp_path / "off.json", [(around(1030, 400), 1, 1)]))


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no such file"):
        read_boxes(tmp_path / "gone.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "half.json").write_text('{"images": [')
    for name in ("list.json", "half.json"):
        with pytest.raises(CohortError, match=f"{name}: not a MIDOG"):
            read_boxes(tmp_path / name)
    with pytest.raises(CohortError, match="category 'nucleus'"):
        read_boxes(
            boxes_file(tmp_path / "n.json", [(around(100, 100), 1, 1)], categories=[{"id": 1, "name": "nucleus"}])
        )
    with pytest.raises(CohortError, match="no box"):
        read_boxes(boxes_file(tmp_path / "none.json", []))


def test_cells_without_a_place_cannot_be_joined(tmp_path: Path) -> None:
    boxes = read_boxes(boxes_file(tmp_path / "boxes.json", [(around(100, 100), 1, 1)]))
    with pytest.raises(CohortError, match="2 of 2 cells have no slide or no position"):
        join_boxes(boxes, cell_table([0, 1]))


@pytest.mark.real
def test_every_labelled_cell_of_midog21_has_its_box(real_data: Path) -> None:
    boxes = read_boxes(real_data / "labels" / "MIDOGpp.json")
    assert len(boxes) == 26_286
    assert int(boxes.mitotic.sum()) == 11_937
    amf = read_table(real_data / "tiles" / "amf")
    cells = amf.take(amf.dataset == "midog21")
    join = join_boxes(boxes, cells)
    assert join.counts() == {
        "hard negative": 14_349,
        "normal": 1317,
        "atypical": 404,
        "mitotic figure without a label": 11_937 - 1721,
        "cells without a box": 0,
        "cells on a hard negative": 0,
    }
    known = join.cell >= 0
    assert sorted(join.cell[known].tolist()) == list(range(1721))
    assert np.abs(boxes.xy[known] - cells.xy[join.cell[known]]).max() <= 0.5
