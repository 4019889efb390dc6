"""Features a row: from stores, images and arrays, each checked against what was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eosin.cohort import read_cohort
from eosin.encoders.texture import TextureEncoder
from eosin.errors import CohortError, NonFiniteError, StoreError
from eosin.features.recipe import Recipe
from eosin.features.store import FeatureStore
from eosin.tasks.samples import encode_images, read_image, read_samples

META = {"size_px": (2000, 1500), "mpp": {"x": 0.5, "y": 0.5, "source": "test"}, "fingerprint": "f"}


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Two slides; the features of a tile are (slide, x, y)."""
    recipe = Recipe(
        encoder={"name": "tiny", "dim": 3},
        tile={"tile_px": 224, "mpp": 0.5},
        tissue={},
        qc={},
        stain=None,
        precision="fp32",
        dtype="float32",
        tokens=False,
        icc=False,
    )
    made = FeatureStore.create(tmp_path / "features", recipe)
    for number, name in enumerate(("a.svs", "b.svs")):
        xy = np.array([[0, 0], [224, 0], [0, 224], [224, 224]]) + 1000 * number
        x = np.column_stack([np.full(4, number), xy]).astype(np.float32)
        with made.writer(name, meta=META) as writer:
            writer.append(x, xy, {})
            writer.finish(np.array([0, 0, 0, 3], np.int8))
    return made


def test_a_slide_is_the_mean_of_its_kept_tiles(store: FeatureStore) -> None:
    cohort = read_cohort(pd.DataFrame({"slide_id": ["b.svs", "a"], "label": [1, 0]}))
    found = read_samples(store.path, cohort)
    np.testing.assert_allclose(found.x, [[1, 1000 + 224 / 3, 1000 + 224 / 3], [0, 224 / 3, 224 / 3]], rtol=1e-6)
    assert found.name == "tiny"
    assert found.source == "store"
    assert found.encoder["recipe_hash"] == store.recipe.hash


def test_a_position_is_that_tile(store: FeatureStore) -> None:
    rows = {"slide_id": ["b.svs", "a.svs", "a.svs"], "x": [1224, 224, None], "y": [1000, 224, None]}
    found = read_samples(store.path, read_cohort(pd.DataFrame(rows)))
    np.testing.assert_allclose(found.x, [[1, 1224, 1000], [0, 224, 224], [0, 224 / 3, 224 / 3]], rtol=1e-6)


def test_what_a_store_lacks_is_named(store: FeatureStore) -> None:
    lacking = read_cohort(pd.DataFrame({"slide_id": ["a.svs", "c.svs", "d.svs"]}))
    with pytest.raises(CohortError, match=r"2 slides .* c\.svs, d\.svs"):
        read_samples(store.path, lacking)
    wrong = read_cohort(pd.DataFrame({"slide_id": ["a.svs", "a.svs"], "x": [0, 5], "y": [0, 0]}))
    with pytest.raises(CohortError, match="row 3: 1 rows name an"):
        read_samples(store.path, wrong)
    with pytest.raises(CohortError, match="holds features of 'tiny'"):
        read_samples(store.path, wrong, encoder="texture")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("p0.png", "p1.png", "p2.png"):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(folder / name)
    return folder


def images_cohort() -> pd.DataFrame:
    return pd.DataFrame({"file": ["p2.png", "p0.png", "p1.png"], "patient_id": list("abc")})


def test_images_are_encoded_in_the_order_of_the_rows(pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    found = read_samples(pictures, read_cohort(images_cohort()), encoder="texture", cache=cache)
    tiles = [np.asarray(Image.open(pictures / name)) for name in images_cohort()["file"]]
    np.testing.assert_array_equal(found.x, TextureEncoder().encode(np.stack(tiles)))
    assert found.pictures is not None
    assert [path.name for path in found.pictures] == ["p2.png", "p0.png", "p1.png"]


def test_the_cache_is_used_for_the_same_bytes_only(pictures: Path, tmp_path: Path) -> None:
    cohort, cache = read_cohort(images_cohort()), tmp_path / "cache"
    first = read_samples(pictures, cohort, encoder="texture", cache=cache)
    kept = cache / "features_texture.npz"
    with np.load(kept) as file:
        marked = {name: file[name] for name in file.files}
    np.savez(kept, **{**marked, "features": marked["features"] + 1})
    again = read_samples(pictures, cohort, encoder="texture", cache=cache)
    np.testing.assert_array_equal(again.x, first.x + 1)
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(pictures / "p0.png")
    changed = read_samples(pictures, cohort, encoder="texture", cache=cache)
    assert (changed.x[1] != first.x[1]).any()
    np.testing.assert_array_equal(changed.x[[0, 2]], first.x[[0, 2]])


def test_transparent_pixels_are_white_and_images_are_resized_once(tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.fromarray(np.full((40, 40, 4), (10, 20, 30, 0), np.uint8)).save(path)
    assert (read_image(path, side_px=40, target_px=None) == 255).all()
    colour = tmp_path / "colour.png"
    pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(colour)
    expected = np.asarray(Image.fromarray(pixels).resize((56, 56), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(read_image(colour, side_px=40, target_px=56), expected)


def test_images_that_do_not_fit_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="say which encoder"):
        read_samples(pictures, read_cohort(images_cohort()))
    with pytest.raises(CohortError, match="row 4: 1 images are not in"):
        read_samples(pictures, read_cohort(images_cohort().replace("p1.png", "gone.png")), encoder="texture")
    Image.fromarray(np.zeros((48, 47, 3), np.uint8)).save(pictures / "p1.png")
    with pytest.raises(CohortError, match="47 x 48 px"):
        encode_images([pictures / "p0.png", pictures / "p1.png"], TextureEncoder(), target_px=None)
    Image.fromarray(np.zeros((48, 48), np.uint16)).save(pictures / "p1.png")
    with pytest.raises(CohortError, match="8 bits"):
        encode_images([pictures / "p0.png", pictures / "p1.png"], TextureEncoder(), target_px=None)
    (pictures / "p1.png").write_bytes(b"no image")
    with pytest.raises(CohortError, match="cannot be read as an image"):
        encode_images([pictures / "p0.png", pictures / "p1.png"], TextureEncoder(), target_px=None)


def test_arrays_have_a_row_a_row(tmp_path: Path, pictures: Path) -> None:
    cohort = read_cohort(images_cohort())
    x = np.arange(12, dtype=np.float64).reshape(3, 4)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", features=x, other=np.zeros(2))
    for name in ("x.npy", "x.npz"):
        np.testing.assert_array_equal(read_samples(tmp_path / name, cohort).x, x.astype(np.float32))
    beside = read_samples(pictures, cohort, encoder=str(tmp_path / "x.npy"))
    assert beside.name == "x"
    assert beside.pictures is not None
    np.save(tmp_path / "x.npy", x[:2])
    with pytest.raises(CohortError, match="has 2 rows"):
        read_samples(tmp_path / "x.npy", cohort)
    x[1, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(NonFiniteError, match="row 3"):
        read_samples(tmp_path / "x.npy", cohort)
    np.save(tmp_path / "x.npy", np.array(["a", "b", "c"])[:, None])
    with pytest.raises(CohortError, match="needed floats"):
        read_samples(tmp_path / "x.npy", cohort)
    (tmp_path / "x.npy").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="cannot be read as an array"):
        read_samples(tmp_path / "x.npy", cohort)
    with pytest.raises(StoreError, match="needed a feature store"):
        read_samples(tmp_path / "gone", cohort)
