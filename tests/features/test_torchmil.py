"""What other tools find in a store that `extract` wrote: TRIDENT's and CLAM's own steps in h5py, torchmil itself.

torchmil is 0.2 MB and what it needs beside torch 20 MB more, for one test: it is no dependency. To run that test:

    pip install --no-deps --target TORCHMIL torchmil tensordict pyvers cloudpickle orjson einops tqdm torchmetrics \
        lightning-utilities
    PYTHONPATH=TORCHMIL python -m pytest tests/features/test_torchmil.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
from encoders_for_tests import MeanEncoder
from PIL import Image

import slidegen
from eosin.features.convert import convert
from eosin.features.extraction import run
from eosin.features.store import FeatureStore
from eosin.tiles import TileSpec

TILE_PX, MPP, SLIDE_MPP = 64, 1.0, 0.5
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(NAMES):
        pixels, _ = slidegen.histology(1500, 1200, seed=seed, mpp=SLIDE_MPP)
        style = slidegen.TiffStyle(compression="jpeg", mpp=SLIDE_MPP, power=20, factors=(4,))
        slidegen.write_tiff(root / f"{name}.svs", pixels, style)
    return root


@pytest.fixture(scope="module")
def store(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("store") / "features"
    return run(slides, TileSpec(tile_px=TILE_PX, mpp=MPP), MeanEncoder(), out=out, workers=0).stores[0]


def trident_steps(path: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """Features, coords and attributes of a file, taken as TRIDENT's slide encoders and heatmaps take them."""
    with h5py.File(path, "r") as file:
        return file["features"][:], file["coords"][:], dict(file["coords"].attrs)


@pytest.mark.parametrize("name", NAMES)
def test_trident_s_steps_reach_the_pixels_of_each_row(store: FeatureStore, slides: Path, name: str) -> None:
    """A reader that knows only TRIDENT's layout reads `patch_size_level0` at `coords` and finds the tile of the row."""
    x, coords, attributes = trident_steps(store.path / f"{name}.svs.h5")
    assert (x.dtype, coords.dtype, len(x)) == (np.float32, np.int64, len(coords))
    assert attributes["name"] == name
    assert (attributes["patch_size"], attributes["overlap"]) == (TILE_PX, 0)
    assert attributes["patch_size_level0"] == round(TILE_PX * MPP / SLIDE_MPP)
    assert (attributes["level0_magnification"], attributes["target_magnification"]) == (20.0, 10.0)
    side = int(attributes["patch_size_level0"])
    with openslide.OpenSlide(slides / f"{name}.svs") as slide:
        assert slide.dimensions == (attributes["level0_width"], attributes["level0_height"])
        regions = [slide.read_region((int(a), int(b)), 0, (side, side)).convert("RGB") for a, b in coords]
    tiles = np.stack([np.asarray(one.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR)) for one in regions])
    expected = MeanEncoder().encode(tiles)
    # Grey levels: the halving inside the JPEG decoder against Pillow's.
    assert np.abs(x - expected).mean() < 0.5
    assert np.abs(x - expected).max() < 4
    assert np.abs(x - np.roll(expected, 1, axis=0)).mean() > 4


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_of_slide_encoders_has_a_cell_for_every_tile(store: FeatureStore, name: str) -> None:
    """TITAN and its like place tiles by `coords // patch_size_level0` after the smallest corner is taken off."""
    _, coords, attributes = trident_steps(store.path / f"{name}.svs.h5")
    cells = (coords - coords.min(axis=0)) // attributes["patch_size_level0"]
    assert len(np.unique(cells, axis=0)) == len(coords)


def test_clam_s_steps_open_the_store(store: FeatureStore, tmp_path: Path) -> None:
    """CLAM's dataset: a table of slide ids, then `features` and `coords` by name; and the .pt of the same rows."""
    torch = pytest.importorskip("torch")
    convert(store.path, tmp_path, to="clam")
    for name in NAMES:
        found = store[name]
        with h5py.File(store.path / f"{name}.svs.h5", "r") as file:
            features, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
        np.testing.assert_array_equal(coords, found.xy)
        bag = torch.load(tmp_path / "pt_files" / f"{name}.pt", weights_only=True)
        assert torch.equal(bag, features[torch.from_numpy(found.kept)])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchmil_trains_on_a_store(store: FeatureStore, tmp_path: Path) -> None:
    """torchmil's dataset on the store itself and its TRIDENT dataset on a conversion; one step of its ABMIL."""
    datasets = pytest.importorskip("torchmil.datasets", reason="torchmil is not installed")
    import torch
    from torchmil.data import collate_fn
    from torchmil.models import ABMIL

    root = str(store.path)
    direct = datasets.ProcessedMILDataset(
        features_path=root,
        coords_path=root,
        bag_keys=["X", "adj", "coords"],
        file_ext=".h5",
        dist_thr=1.5 * TILE_PX * MPP / SLIDE_MPP,
    )
    assert direct.get_bag_names() == [f"{name}.svs" for name in NAMES]
    for bag, name in zip(direct, NAMES, strict=False):
        np.testing.assert_array_equal(bag["X"].numpy(), store[name].x)
        np.testing.assert_array_equal(bag["coords"].numpy(), store[name].xy)

    base = tmp_path / "10x_64px_0px_overlap"
    convert(store.path, base, to="trident")
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("slide", "label"), *((f"{n}.svs", i) for i, n in enumerate(NAMES))])
    layout = datasets.TridentWSIDataset(
        base_path=f"{base}/",
        labels_path=str(tmp_path / "labels.csv"),
        feature_extractor="mean",
        bag_keys=["X", "Y", "adj", "coords"],
        patch_size=round(TILE_PX * MPP / SLIDE_MPP),
        wsi_name_col="slide",
        wsi_label_col="label",
    )
    assert layout.get_bag_names() == list(NAMES)
    for i, name in enumerate(NAMES):
        kept = store[name].kept
        np.testing.assert_array_equal(layout[i]["X"].numpy(), store[name].x[kept])
        assert layout[i]["Y"].tolist() == [i]
        cells = layout[i]["coords"].numpy()
        steps = np.abs(cells[:, None] - cells[None]).max(axis=2)
        joined = layout[i]["adj"].to_dense().numpy() > 0
        np.testing.assert_array_equal(joined, steps == 1)

    batch = collate_fn([layout[0], layout[1]])
    assert batch["mask"].sum(1).tolist() == [int(store[name].kept.sum()) for name in NAMES]
    torch.manual_seed(0)
    model = ABMIL(in_shape=(MeanEncoder().spec.dim,))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = model.compute_loss(batch["Y"][:, 0].float(), batch["X"] / 255, batch["mask"])[1]["BCEWithLogitsLoss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
