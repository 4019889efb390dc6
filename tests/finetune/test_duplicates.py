from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cellgen import cell_table, pixels, write_picture
from PIL import Image

from eosin.finetune.cells import pool
from eosin.finetune.duplicates import find_duplicates, without_duplicates
from eosin.finetune.tables import read_table


def test_one_cell_under_two_slide_names_is_found_by_position() -> None:
    tables = {
        "midog25": cell_table([0, 1, 1], dataset="midog25", slides=["002.tiff"] * 3, xy=[(5, 5), (9, 9), (7, 7)]),
        "ami-br": cell_table([0, 0, 1], dataset="midog21", slides=["2", "2", "3"], xy=[(9.2, 8.9), (6, 6), (5, 5)]),
    }
    report = find_duplicates(tables)
    (overlap,) = report.overlaps
    assert (overlap.first, overlap.second, overlap.by) == ("midog25", "ami-br", "position")
    assert overlap.rows.tolist() == [[1, 0]]
    assert overlap.labels_differ == 1
    assert report.slides == (("midog25", "ami-br", 1),)
    left = without_duplicates(tables, report)
    assert len(left["midog25"]) == 3
    assert left["ami-br"].xy.tolist() == [[6, 6], [5, 5]]
    assert not find_duplicates(left).overlaps
    # Slide 2 stays in both tables: as one group, so that no fold cuts it.
    assert sorted(set(pool(list(left.values())).group_key())) == ["midog/002", "midog/003"]


def test_equal_names_in_unrelated_sets_are_no_duplicates() -> None:
    tables = {name: cell_table([0], dataset=name, slides=["002.tiff"], xy=[(5, 5)]) for name in ("midog21", "tupac16")}
    report = find_duplicates(tables)
    assert report.overlaps == ()
    assert report.slides == ()


def test_one_picture_under_two_names_is_found_by_its_pixels(tmp_path: Path) -> None:
    for name, seed in (("a/1.png", 1), ("a/2.png", 2), ("a/3.png", 2), ("b/9.png", 1)):
        write_picture(tmp_path / name, pixels(seed))
    # The same pixels in another container are the same picture.
    Image.fromarray(pixels(2)).save(tmp_path / "b" / "8.tiff")
    tables = {
        "a": cell_table([0, 1, 1], root=tmp_path / "a", files=["1.png", "2.png", "3.png"], slides=[""] * 3),
        "b": cell_table([1, 1], root=tmp_path / "b", files=["9.png", "8.tiff"], slides=["", ""]),
    }
    report = find_duplicates(tables)
    found = {(o.first, o.second): (o.by, o.rows.tolist(), o.labels_differ) for o in report.overlaps}
    assert found == {("a", "a"): ("picture", [[1, 2]], 0), ("a", "b"): ("picture", [[0, 0], [1, 1]], 1)}
    assert str(report.overlaps[0]) == "1 cells in a twice (same picture), 0 with different labels"
    left = without_duplicates(tables, report)
    assert [len(cells) for cells in left.values()] == [2, 0]


def test_cells_about_which_nothing_can_be_said_are_counted() -> None:
    report = find_duplicates({"a": cell_table([0, 1]), "b": cell_table([0], xy=[(1, 1)])})
    assert report.unplaced == {"a": 2}
    assert report.to_dict() == {"overlaps": [], "slides": [], "unplaced": {"a": 2}}


@pytest.mark.real
def test_no_real_crop_lies_in_both_sets_or_twice_in_one(real_data: Path) -> None:
    amf = read_table(real_data / "tiles" / "amf")
    # One in four of each set: every pair of the 617 is compared.
    tables = {name: amf.take(np.flatnonzero(amf.dataset == name)[::4]) for name in ("midog21", "atnorm-br")}
    report = find_duplicates(tables)
    assert report.overlaps == ()
    assert report.unplaced == {}
    again = find_duplicates({"one": tables["midog21"], "two": tables["midog21"].take(range(10, 20))})
    kinds = {(o.first, o.second, o.by): o.rows.tolist() for o in again.overlaps}
    pairs = [[row, at] for at, row in enumerate(range(10, 20))]
    assert kinds == {("one", "two", "position"): pairs, ("one", "two", "picture"): pairs}
