from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cellgen import cell_table, pixels, write_picture
from PIL import Image

from eosin.errors import CohortError, GeometryError, LabelError
from eosin.finetune.cells import domain_counts, domain_name, pool, read_tile, read_tiles


def test_take_keeps_rows_together() -> None:
    cells = cell_table([0, 1, 1, 0], slides=["a", "b", "c", "d"], xy=[(0, 1), (2, 3), (4, 5), (6, 7)])
    for rows in ([2, 0], np.array([False, True, False, True])):
        part = cells.take(rows)
        at = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
        assert part.slide_id.tolist() == cells.slide_id[at].tolist()
        assert part.label.tolist() == cells.label[at].tolist()
        assert np.array_equal(part.xy, cells.xy[at])
        assert part.group_key().tolist() == cells.group_key()[at].tolist()


def test_one_slide_name_in_two_sets_is_two_groups() -> None:
    # AMi-Br calls slides of MIDOG21 and of TUPAC16 "002.tiff".
    both = pool(
        [
            cell_table([0], dataset="tupac16", slides=["002.tiff"]),
            cell_table([1], dataset="midog21", slides=["002.tiff"]),
        ]
    )
    assert len(set(both.group_key())) == 2


@pytest.mark.parametrize(("dataset", "slide"), [("midog25", "002.tiff"), ("midog++", "2"), ("midog21", "midog21-002")])
def test_one_slide_under_three_names_is_one_group(dataset: str, slide: str) -> None:
    assert cell_table([0], dataset=dataset, slides=[slide]).group_key().tolist() == ["midog/002"]


def test_cells_without_a_slide_stand_alone() -> None:
    cells = cell_table([0, 1], slides=["", ""], files=["1.png", "2.png"])
    assert cells.group_key().tolist() == ["set/1.png", "set/2.png"]
    assert len(set(replace(cells, file=np.array(["", ""])).group_key())) == 2


def test_a_named_patient_is_the_group() -> None:
    cells = replace(cell_table([0, 1], slides=["a", "b"]), patient_id=np.array(["set/p", "set/p"]))
    assert set(cells.group_key()) == {"set/p"}


def test_columns_of_different_lengths_and_other_labels_are_refused() -> None:
    cells = cell_table([0, 1])
    with pytest.raises(CohortError, match=r"2 cells.*scanner \(1,\)"):
        replace(cells, scanner=np.array(["one"]))
    with pytest.raises(CohortError, match="xy"):
        replace(cells, xy=np.zeros((2, 3)))
    with pytest.raises(LabelError, match=r"found \[2\]"):
        replace(cells, label=np.array([0, 2], dtype=np.int8))
    with pytest.raises(LabelError, match="0-1"):
        replace(cells, soft=np.array([0, np.nan], dtype=np.float32))


def test_domains_are_counted_and_the_unusable_ones_say_why() -> None:
    tables = [
        cell_table([1], scanner="one cell"),
        cell_table([0, 0], slides=["a", "b"], scanner="one class"),
        cell_table([0, 1], scanner="one slide"),
        cell_table([0, 1, 1], slides=["a", "b", "b"], scanner="two slides"),
    ]
    counts = {line.domain: line for line in domain_counts(pool(tables))}
    assert counts["one cell"].note.startswith("one cell")
    assert "only normal" in counts["one class"].note
    assert counts["one slide"].note.startswith("one slide")
    good = counts["two slides"]
    assert (good.cells, good.atypical, good.normal, good.groups, good.note) == (3, 2, 1, 2, "")


def test_an_unknown_scanner_is_not_one_domain_over_two_sets() -> None:
    facts = {"tumour": "breast", "scanner": "", "origin": "", "species": "human"}
    assert domain_name(**facts, dataset="a") != domain_name(**facts, dataset="b")
    known = facts | {"scanner": "S360"}
    assert domain_name(**known, dataset="a") == domain_name(**known, dataset="b") == "breast | S360 | human"


def test_pooled_tables_find_their_pictures_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_picture(tmp_path / name / "1.png", pixels(len(name)))
    write_picture(tmp_path / "two" / "1.png", pixels(7))
    both = pool([cell_table([0], root=tmp_path / name, dataset=name, files=["1.png"]) for name in ("one", "two")])
    assert both.file.tolist() == ["one/1.png", "two/1.png"]
    tiles = read_tiles(both)
    assert np.array_equal(tiles[0], pixels(3))
    assert np.array_equal(tiles[1], pixels(7))
    with pytest.raises(CohortError, match="no table"):
        pool([])


def test_pooling_fills_in_readers_who_did_not_vote() -> None:
    voted = replace(cell_table([1, 0]), votes={"expert1": np.array([1, 0], dtype=np.int8)})
    both = pool([voted, cell_table([1])])
    assert both.votes["expert1"].tolist() == [1, 0, -1]


def test_an_opaque_alpha_channel_is_dropped_and_any_other_refused(tmp_path: Path) -> None:
    rgba = np.dstack([pixels(1), np.full((128, 128), 255, dtype=np.uint8)])
    assert np.array_equal(read_tile(write_picture(tmp_path / "opaque.png", rgba)), pixels(1))
    rgba[5, 5, 3] = 254
    with pytest.raises(GeometryError, match="transparent"):
        read_tile(write_picture(tmp_path / "glass.png", rgba))


@pytest.mark.parametrize("side", [127, 64, 256])
def test_a_crop_of_another_size_is_refused(tmp_path: Path, side: int) -> None:
    path = write_picture(tmp_path / "crop.png", pixels(1, side))
    with pytest.raises(GeometryError, match=rf"{side} x {side} pixels where 128 x 128.*cut it anew"):
        read_tile(path)
    assert read_tile(path, tile_px=side).shape == (side, side, 3)


def test_deep_and_grey_pictures_are_refused(tmp_path: Path) -> None:
    import cv2

    # Pillow neither writes 16-bit colour nor says so when it reads it.
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((128, 128, 3), 40_000, dtype=np.uint16))
    with pytest.raises(GeometryError, match="16-bit RGB"):
        read_tile(tmp_path / "deep.png")
    Image.fromarray(np.full((128, 128), 40_000, dtype=np.uint16)).save(tmp_path / "deep_grey.png")
    write_picture(tmp_path / "grey.png", pixels(1)[..., 0])
    for name in ("deep_grey.png", "grey.png"):
        with pytest.raises(GeometryError, match="8-bit RGB"):
            read_tile(tmp_path / name)


def test_missing_truncated_and_nameless_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"gone\.png: no such picture"):
        read_tile(tmp_path / "gone.png")
    whole = write_picture(tmp_path / "whole.png", pixels(1)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("half.png", "text.png"):
        with pytest.raises(CohortError, match=f"{name}.*copy it again"):
            read_tile(tmp_path / name)
    with pytest.raises(CohortError, match="cell 0 has no picture"):
        read_tiles(cell_table([0], root=tmp_path))


@pytest.mark.real
def test_real_crops_are_read_as_pillow_shows_them(real_data: Path) -> None:
    root = real_data / "tiles" / "amf"
    names = sorted(path.name for path in (root / "midog21").iterdir())[:3]
    cells = cell_table([0] * 3, root=root, files=[f"midog21/{name}" for name in names])
    tiles = read_tiles(cells, [2, 0])
    assert tiles.dtype == np.uint8
    assert tiles.shape == (2, 128, 128, 3)
    assert np.array_equal(tiles[0], np.asarray(Image.open(root / "midog21" / names[2])))
