"""Pools, seeds and pictures: a feature store, an index of it, and images, each against what was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
from PIL import Image

import slidegen
from eosin.cohort import read_cohort
from eosin.errors import CohortError, QueryError
from eosin.features.recipe import Recipe
from eosin.features.store import FeatureStore
from eosin.retrieval.build import build_index
from eosin.tasks.review_pool import Pool, open_pool, pool_from_store, read_all_seeds, read_seeds, tile_pictures
from eosin.tiles.geojson import Annotation, write_geojson

SIDE = 100  # of a tile in level-0 pixels


def grid(count: int) -> np.ndarray:
    at = np.arange(count)
    return np.stack([SIDE * (at % 5), SIDE * (at // 5)], axis=1)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Two slides of 20 tiles, the last one of each rejected by quality control."""
    recipe = Recipe(
        encoder={"name": "tiny", "dim": 4, "weights_hash": "abc"},
        tile={"tile_px": 50, "mpp": 1.0, "overlap_px": 0},
        tissue={},
        qc={},
        stain=None,
        precision="fp32",
        dtype="float32",
        tokens=False,
        icc=False,
    )
    made = FeatureStore.create(tmp_path / "features", recipe)
    rng = np.random.default_rng(0)
    for name in ("in/a.svs", "in/b.svs"):
        meta = {"size_px": (500, 400), "mpp": {"x": 0.5, "y": 0.5, "source": "test"}, "fingerprint": "f"}
        with made.writer(name, meta=meta) as writer:
            writer.append(rng.standard_normal((20, 4)).astype(np.float32), grid(20), {})
            writer.finish(np.array([0] * 19 + [3], np.int8))
    return made


def square(x: float, y: float, side: float, name: str | None) -> Annotation:
    return Annotation(geometry=shapely.box(x, y, x + side, y + side), name=name)


def rows_of(pool: Pool, slide: str, *places: tuple[int, int]) -> list[int]:
    return [int(np.flatnonzero((pool.slide_id == slide) & (pool.xy == place).all(axis=1))[0]) for place in places]


def test_a_store_gives_its_kept_tiles(store: FeatureStore) -> None:
    pool = pool_from_store(store)
    assert len(pool) == 38
    np.testing.assert_array_equal(pool.x, np.concatenate([store[name].x[:19] for name in store]))
    np.testing.assert_array_equal(pool.xy[:19], grid(19))
    assert set(pool.patient_id) == {"in/a.svs", "in/b.svs"}
    np.testing.assert_array_equal(pool.size0_px, SIDE)
    assert not pool.barred.any()
    assert pool.about["encoder"] == "tiny"
    assert pool.name(1) == "in/a.svs (100, 0)"


def test_an_index_of_the_store_gives_the_same_tiles(store: FeatureStore, tmp_path: Path) -> None:
    build_index(store.path, tmp_path / "index")
    stored, indexed = pool_from_store(store), open_pool(tmp_path / "index", None)
    order = {tile: at for at, tile in enumerate(indexed.ids.tolist())}
    at = [order[tile] for tile in stored.ids.tolist()]
    assert sorted(at) == list(range(38))
    length = np.linalg.norm(stored.x, axis=1, keepdims=True)
    np.testing.assert_allclose(indexed.x[at], stored.x / length, atol=1e-6)
    np.testing.assert_array_equal(indexed.xy[at], stored.xy)
    np.testing.assert_array_equal(indexed.slide_id[at], stored.slide_id)
    np.testing.assert_array_equal(indexed.size0_px, SIDE)
    assert indexed.about != stored.about


def test_a_cohort_names_patients_and_bars_the_test_split(store: FeatureStore, tmp_path: Path) -> None:
    rows = {"slide_id": ["a.svs", "b"], "patient_id": ["P1", "P2"], "split": ["train", "Test"]}
    pd.DataFrame(rows).to_csv(tmp_path / "c.csv", index=False)
    pool = open_pool(store.path, tmp_path / "c.csv")
    assert dict(zip(pool.slide_id.tolist(), pool.patient_id.tolist(), strict=True)) == {
        "in/a.svs": "P1",
        "in/b.svs": "P2",
    }
    np.testing.assert_array_equal(pool.barred, pool.slide_id == "in/b.svs")
    build_index(store.path, tmp_path / "index")
    again = open_pool(tmp_path / "index", tmp_path / "c.csv")
    assert again.barred.sum() == 19
    assert set(again.patient_id) == {"P1", "P2"}
    barred = tmp_path / "seeds.csv"
    pd.DataFrame({"slide_id": ["in/b.svs"], "x": [0], "y": [0], "label": ["t"]}).to_csv(barred, index=False)
    with pytest.raises(QueryError, match="test split"):
        read_seeds(barred, pool)


def test_a_slide_without_one_patient_and_split_is_refused(store: FeatureStore) -> None:
    with pytest.raises(QueryError, match=r"in/b.svs is not in"):
        pool_from_store(store, read_cohort(pd.DataFrame({"slide_id": ["a.svs"], "patient_id": ["P1"]})))
    rows = {"slide_id": ["a.svs", "b.svs", "b.svs"], "patient_id": ["1", "2", "2"], "split": ["train", "train", "test"]}
    with pytest.raises(QueryError, match="has 2 patients or splits"):
        pool_from_store(store, read_cohort(pd.DataFrame(rows)))


def test_areas_drawn_in_qupath_seed_the_tiles_they_cover(store: FeatureStore, tmp_path: Path) -> None:
    pool = pool_from_store(store)
    areas = [square(0, 0, 149, "tumour"), square(160, 0, 140, "stroma"), square(300, 300, 45, "tumour")]
    write_geojson(tmp_path / "a.svs.geojson", areas)
    found = read_seeds(tmp_path / "a.svs.geojson", pool)
    assert {pool.name(row): label for row, label in found.items()} == {
        "in/a.svs (0, 0)": "tumour",
        "in/a.svs (200, 0)": "stroma",
    }
    write_geojson(tmp_path / "b.geojson", [square(0, 0, 151, "tumour")])
    assert sorted(read_seeds(tmp_path / "b.geojson", pool)) == sorted(
        rows_of(pool, "in/b.svs", (0, 0), (100, 0), (0, 100))
    )


def test_a_tile_halved_between_two_classes_is_nobodys(store: FeatureStore, tmp_path: Path) -> None:
    pool = pool_from_store(store)
    write_geojson(tmp_path / "a.geojson", [square(0, 0, 150, "x"), square(150, 0, 150, "y")])
    found = read_seeds(tmp_path / "a.geojson", pool)
    assert rows_of(pool, "in/a.svs", (100, 0))[0] not in found
    assert found[rows_of(pool, "in/a.svs", (200, 0))[0]] == "y"


def test_tables_seed_tiles_and_rows_without_a_label_are_passed_over(store: FeatureStore, tmp_path: Path) -> None:
    pool = pool_from_store(store)
    rows = {"slide_id": ["in/a.svs"] * 3, "x": [0, 100, 200], "y": [0, 0, 0], "label": ["t", None, "s"]}
    path = tmp_path / "seeds.parquet"
    pd.DataFrame(rows).to_parquet(path)
    assert {pool.name(row): label for row, label in read_seeds(path, pool).items()} == {
        "in/a.svs (0, 0)": "t",
        "in/a.svs (200, 0)": "s",
    }
    pd.DataFrame(rows).assign(x=[0, 0, 13]).to_parquet(path)
    with pytest.raises(QueryError, match=r"no tile in/a.svs \(13, 0\)"):
        read_seeds(path, pool)
    pd.DataFrame(rows).assign(x=[0, 1, 0], label=["t", "t", "s"]).iloc[[0, 2]].to_parquet(path)
    with pytest.raises(QueryError, match="two classes, t and s"):
        read_seeds(path, pool)


def test_seeds_that_cannot_be(store: FeatureStore, tmp_path: Path) -> None:
    pool = pool_from_store(store)
    write_geojson(tmp_path / "a.geojson", [square(0, 0, 100, None)])
    with pytest.raises(QueryError, match="1 of 1 areas have no class"):
        read_seeds(tmp_path / "a.geojson", pool)
    write_geojson(tmp_path / "a.geojson", [square(0, 0, 20, "t")])
    with pytest.raises(QueryError, match="names no tile"):
        read_seeds(tmp_path / "a.geojson", pool)
    write_geojson(tmp_path / "c.geojson", [square(0, 0, 100, "t")])
    with pytest.raises(QueryError, match="names no slide; the closest are in/"):
        read_seeds(tmp_path / "c.geojson", pool)
    with pytest.raises(QueryError, match="begins from seeds"):
        read_all_seeds([], pool)
    write_geojson(tmp_path / "a.geojson", [square(0, 0, 100, "t")])
    write_geojson(tmp_path / "a.svs.geojson", [square(0, 0, 100, "s")])
    with pytest.raises(QueryError, match="is 's' here and 't' in another"):
        read_all_seeds([tmp_path / "a.geojson", tmp_path / "a.svs.geojson"], pool)


def test_images_are_tiles_of_their_own(tmp_path: Path) -> None:
    for at in range(6):
        Image.fromarray(np.full((40, 40, 3), 20 * at, np.uint8)).save(tmp_path / f"{at}.png")
    rows = {"file": [f"{at}.png" for at in range(6)], "patient_id": list("aabbcc"), "split": ["test"] + ["train"] * 5}
    pd.DataFrame(rows).to_csv(tmp_path / "c.csv", index=False)
    pool = open_pool(tmp_path, tmp_path / "c.csv", encoder="texture")
    assert len(set(pool.ids.tolist())) == 6
    assert pool.patient_id.tolist() == list("aabbcc")
    assert pool.barred.tolist() == [True] + [False] * 5
    assert pool.name(3) == "3.png"
    tile = tile_pictures(pool, tmp_path, [])(3).tile
    assert tile is not None
    assert (tile == 60).all()
    pd.DataFrame({"file": ["2.png", "4.png"], "label": ["dark", "light"]}).to_csv(tmp_path / "s.csv", index=False)
    assert read_seeds(tmp_path / "s.csv", pool) == {2: "dark", 4: "light"}
    with pytest.raises(CohortError, match="give --cohort TABLE"):
        open_pool(tmp_path, None)


def test_pictures_are_read_from_the_slides_again(store: FeatureStore, tmp_path: Path) -> None:
    """A slide whose red is x / 2 and green y / 2: the tile at (x, y) shows its own place."""
    y, x = np.mgrid[:400, :500]
    pixels = np.stack([x // 2, y // 2, np.full_like(x, 7)], axis=2).astype(np.uint8)
    (tmp_path / "slides" / "in").mkdir(parents=True)
    style = slidegen.TiffStyle(compression="deflate", mpp=0.5)
    slidegen.write_tiff(tmp_path / "slides" / "in" / "a.svs", pixels, style)
    pool = pool_from_store(store)
    read = tile_pictures(pool, store.path, [tmp_path / "slides"])
    row = rows_of(pool, "in/a.svs", (300, 200))[0]
    tile = read(row).tile
    assert tile is not None
    middle = tile[tile.shape[0] // 2, tile.shape[1] // 2]
    np.testing.assert_allclose(middle, [175, 125, 7], atol=2)
    gone = read(rows_of(pool, "in/b.svs", (0, 0))[0])
    assert gone.tile is None
    assert "in/b.svs" in gone.why
