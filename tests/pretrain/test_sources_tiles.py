from __future__ import annotations

import io
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import slidegen
from eosin.errors import CohortError, GeometryError, ImplausibleMppError
from eosin.pretrain.loading import Batch, Loading
from eosin.pretrain.sampling import HsvFilter
from eosin.pretrain.tilesource import TileConfig, TileSource

SIDE = 48
CONFIG = TileConfig(tile_px=32, mpp=0.25, seed=5)


def tiles(count: int) -> np.ndarray:
    """Pictures cut from one field of coordinates, so that every crop says which tile it is from and where."""
    field = slidegen.coordinates(SIDE * count, SIDE)
    return np.stack(np.split(field, count, axis=1))


def write_folder(folder: Path, pictures: np.ndarray, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:03d}{suffix}")
    return folder


def write(form: str, where: Path, pictures: np.ndarray) -> Path:
    """Write the same tiles in any form."""
    if form == "folder":
        return write_folder(where / "folder", pictures)
    path = where / f"tiles.{form}"
    if form == "npy":
        np.save(path, pictures)
    elif form == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=pictures, chunks=(1, *pictures.shape[1:]), compression="gzip")
    else:
        with zipfile.ZipFile(path, "w") as file:
            for index, picture in enumerate(pictures):
                held = io.BytesIO()
                Image.fromarray(picture).save(held, "png")
                file.writestr(f"{index:03d}.png", held.getvalue())
    return path


def where_from(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tile number and crop offsets as the pixels tell, checking that crops are whole."""
    x, y = slidegen.decode_coordinates(batch.tiles.permute(0, 2, 3, 1).numpy())
    assert (np.diff(x, axis=2) == 1).all()
    assert (np.diff(y, axis=1) == 1).all()
    return x[:, 0, 0] // SIDE, x[:, 0, 0] % SIDE, y[:, 0, 0]


@pytest.mark.parametrize("form", ["folder", "zip", "h5", "npy"])
def test_every_form_gives_the_crops_it_says(tmp_path: Path, form: str):
    path = write(form, tmp_path, tiles(10))
    with TileSource([path], CONFIG) as source:
        batch = source.batch(0, 200)
        said = source.describe()
        counts = source.counts
    number, left, top = where_from(batch)
    np.testing.assert_array_equal(np.stack([left, top], axis=1), batch.xy.numpy())
    room = SIDE - 32 + 1
    for offset in (left, top):
        assert stats.chisquare(np.bincount(offset, minlength=room)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(number, minlength=10)).pvalue > 1e-3
    assert (batch.mpp == 0.25).all()
    assert (said["tiles"], said["slides"]) == (10, 1)
    assert next(iter(counts.values()))["drawn"] == 200


def test_every_form_gives_the_same_batch(tmp_path: Path):
    pictures = tiles(10)
    batches = []
    for form in ("folder", "zip", "h5", "npy"):
        with TileSource([write(form, tmp_path, pictures)], CONFIG) as source:
            batches.append(source.batch(3, 16).tiles)
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def test_batches_do_not_depend_on_workers_ranks_or_resume(tmp_path: Path):
    paths = [write(form, tmp_path, tiles(6)) for form in ("zip", "h5", "npy")]
    with TileSource(paths, CONFIG) as alone:
        expected = [alone.batch(step, 8).tiles for step in range(4)]
        assert len(alone.slide_ids) == 3
    with TileSource(paths, CONFIG, loading=Loading(workers=2)) as source:
        assert all(torch.equal(source.batch(step, 8).tiles, expected[step]) for step in range(4))
    halves = []
    for rank in (0, 1):
        with TileSource(paths, CONFIG, loading=Loading(rank=rank, world=2)) as source:
            halves.append(source.batch(2, 4).tiles)
    assert torch.equal(torch.cat(halves), expected[2])


def test_tiles_of_the_size_are_taken_whole(tmp_path: Path):
    path = write("npy", tmp_path, tiles(3))
    with TileSource([path], TileConfig(tile_px=SIDE, mpp=0.5)) as source:
        batch = source.batch(0, 5)
    assert (batch.xy == 0).all()
    assert where_from(batch)[0].max() < 3


@pytest.mark.parametrize("form", ["folder", "h5"])
def test_tiles_that_are_too_small_are_an_error(tmp_path: Path, form: str):
    path = write(form, tmp_path, tiles(3))
    with pytest.raises(GeometryError, match="has 48 x 48 px, which is smaller than tile_px = 64; ask for tile_px = 48"):
        TileSource([path], TileConfig(tile_px=64, mpp=0.25))


def test_a_small_tile_among_larger_ones_is_an_error_when_it_is_read(tmp_path: Path):
    folder = write_folder(tmp_path / "mixed", tiles(3))
    Image.fromarray(tiles(1)[0, :20, :20]).save(folder / "zzz.png")
    for workers in (0, 1):
        with (
            TileSource([folder], CONFIG, loading=Loading(workers=workers)) as source,
            pytest.raises(GeometryError, match=r"zzz\.png has 20 x 20 px"),
        ):
            source.batch(0, 60)


def test_transparent_and_grey_images_become_rgb(tmp_path: Path):
    clear = np.zeros((SIDE, SIDE, 4), dtype=np.uint8)
    folder = write_folder(tmp_path / "clear", clear[None])
    with TileSource([folder], CONFIG) as source:
        assert (source.batch(0, 2).tiles == 255).all()
    folder = write_folder(tmp_path / "grey", np.full((1, SIDE, SIDE), 77, dtype=np.uint8), ".jpg")
    with TileSource([folder], CONFIG) as source:
        assert (source.batch(0, 2).tiles == 77).all()


def test_balance_by_slide_and_by_a_column_of_the_table(tmp_path: Path):
    folder = write_folder(tmp_path / "one", tiles(9))
    rows = [f"one/{i:03d}.png,{'s1' if i < 6 else f's{i}'},{'A' if i < 8 else 'B'}" for i in range(9)]
    table = tmp_path / "tiles.csv"
    table.write_text("\n".join(["file,slide_id,site", *rows]) + "\n")
    expected = {
        "tile": np.full(9, 1 / 9),
        "slide": np.array([1 / 24] * 6 + [1 / 4] * 3),
        "site": np.array([1 / 16] * 8 + [1 / 2]),
    }
    for balance, share in expected.items():
        config = TileConfig(tile_px=32, mpp=0.25, balance=balance, seed=1)
        with TileSource([folder], config, table=table) as source:
            batch = source.batch(0, 900)
            number = where_from(batch)[0]
            assert stats.chisquare(np.bincount(number, minlength=9), share * 900).pvalue > 1e-3
            assert [source.slide_ids[slide] for slide in batch.slide] == ["s1" if n < 6 else f"s{n}" for n in number]
    with pytest.raises(CohortError, match="no column 'scanner'"):
        TileSource([folder], TileConfig(tile_px=32, mpp=0.25, balance="scanner"), table=table)


def test_a_table_names_tiles_in_zips_and_arrays(tmp_path: Path):
    paths = [write(form, tmp_path, tiles(2)) for form in ("zip", "npy")]
    table = tmp_path / "tiles.csv"
    table.write_text("file,slide_id\ntiles.zip/000.png,p\ntiles.zip/001.png,q\ntiles.npy/0,r\ntiles.npy/1,s\n")
    with TileSource(paths, CONFIG, table=table) as source:
        assert source.slide_ids == ("p", "q", "r", "s")
        batch = source.batch(0, 20)
    assert (where_from(batch)[0] == batch.slide.numpy() % 2).all()
    table.write_text("file,slide_id\ntiles.zip/000.png,p\n")
    with pytest.raises(
        CohortError, match=r"3 of 4 tiles have no row in .*tiles\.csv, among them .*tiles\.zip/001\.png"
    ):
        TileSource(paths, CONFIG, table=table)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_and_vanished_tiles_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
):
    folder = write_folder(tmp_path / "some", tiles(6))
    whole = (folder / "002.png").read_bytes()
    (folder / "002.png").write_bytes(whole[: len(whole) // 2])
    with TileSource([folder], CONFIG, loading=Loading(workers=workers)) as source:
        first = source.batch(0, 40)
        assert [Path(name).name for name in source.excluded] == ["002.png"]
        (folder / "004.png").unlink()
        later = [source.batch(step, 40) for step in range(1, 5)][-1]
        assert [Path(name).name for name in source.excluded] == ["002.png", "004.png"]
        assert source.describe()["tiles"] == 4
        state = source.state_dict()
    assert 2 not in where_from(first)[0]
    assert set(where_from(later)[0]) == {0, 1, 3, 5}
    assert sum("002.png is left out from step 0 on" in message for message in caplog.messages) == 1
    with TileSource([write("h5", tmp_path, tiles(6))], CONFIG) as fresh:
        fresh.load_state_dict(state)  # names another source's tiles: nothing of it applies
        assert fresh.excluded == {}


def test_when_all_tiles_are_damaged_it_is_an_error(tmp_path: Path):
    folder = write_folder(tmp_path / "some", tiles(3))
    for path in folder.iterdir():
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with TileSource([folder], CONFIG) as source, pytest.raises(CohortError, match="none of 3 tiles is left"):
        source.batch(0, 8)


def test_hsv_filter_on_tiles(tmp_path: Path):
    pictures = np.full((2, SIDE, SIDE, 3), 240, dtype=np.uint8)
    pictures[1] = (255, 150, 200)
    path = write("npy", tmp_path, pictures)
    with TileSource([path], TileConfig(tile_px=32, mpp=0.25, hsv=HsvFilter())) as source:
        assert (source.batch(0, 20).tiles[:, 1] == 150).all()
        (counts,) = source.counts.values()
    assert counts["hsv"] > 4


def test_inputs_that_are_no_tiles(tmp_path: Path):
    with pytest.raises(CohortError, match="no such file or folder"):
        TileSource([tmp_path / "nowhere"], CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CohortError, match="no tiles in it"):
        TileSource([tmp_path / "empty"], CONFIG)
    np.save(tmp_path / "float.npy", np.zeros((2, 8, 8, 3)))
    with pytest.raises(CohortError, match=r"holds float64 \(2, 8, 8, 3\); tiles are uint8"):
        TileSource([tmp_path / "float.npy"], CONFIG)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features"] = np.zeros(3)
    with pytest.raises(CohortError, match=r"needs a dataset 'images' \(n, H, W, 3\); it has features"):
        TileSource([tmp_path / "other.h5"], CONFIG)
    (tmp_path / "bad.zip").write_bytes(b"nothing")
    with pytest.raises(CohortError, match="not a zip file"):
        TileSource([tmp_path / "bad.zip"], CONFIG)
    (tmp_path / "a.svs").write_bytes(b"nothing")
    with pytest.raises(CohortError, match="slides are for SlideSource"):
        TileSource([tmp_path / "a.svs"], CONFIG)
    with pytest.raises(CohortError, match="needs a table with that column"):
        TileSource([write("npy", tmp_path, tiles(2))], TileConfig(tile_px=32, mpp=0.25, balance="site"))
    with pytest.raises(ImplausibleMppError, match="mpp of the tiles"):
        TileConfig(tile_px=32, mpp=20)


@pytest.mark.real
def test_amf_crops_are_balanced_over_scanners(real_data: Path):
    root = real_data / "tiles" / "amf"
    config = TileConfig(tile_px=96, mpp=0.25, balance="scanner")
    with TileSource([root / "midog21"], config, table=root / "labels.csv") as source:
        said = source.describe()
        batch = source.batch(0, 32)
    assert (said["tiles"], said["slides"], said["groups"]) == (1721, 135, 3)
    assert batch.tiles.shape == (32, 3, 96, 96)
    assert (batch.xy <= 32).all()
    with pytest.raises(GeometryError, match="smaller than tile_px = 224"):
        TileSource([root / "midog21"], TileConfig(tile_px=224, mpp=0.25))
