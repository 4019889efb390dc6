"""A vision transformer through the whole pipeline: batch size and readers change nothing, not a bit.

The encoder computes batches of one fixed size and fills up the rest, so the same kernels see the same shapes
however many tiles a chunk holds; readers change only when a tile arrives. Therefore the files of every combination
are equal byte for byte. Against torch run tile by tile, which is another shape and other rounding, the features
differ in their last bits: there the tolerance is a cosine of 0.9999.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_extract import same_store

import slidegen
from eosin.features.extraction import run
from eosin.features.store import FeatureStore
from eosin.slides import open_slide
from eosin.tiles import TileSpec

pytest.importorskip("timm")

SPEC = TileSpec(tile_px=64, mpp=1.0)
IDS = ("a.svs", "b.svs")
QUICK = ((7, 0), (64, 0), (7, 1))
COMBINATIONS = [
    pytest.param(batch, workers, marks=[] if (batch, workers) in QUICK else [pytest.mark.slow])
    for batch in (1, 7, 64)
    for workers in (0, 1, 2)
]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides whose numbers of tiles are multiples of none of the batches."""
    root = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(IDS):
        pixels, _ = slidegen.histology(1500, 1200, seed=seed, mpp=0.5)
        slidegen.write_tiff(root / name, pixels, slidegen.TiffStyle(compression="jpeg", mpp=0.5, factors=(4,)))
    return root


@pytest.fixture(scope="module")
def vit():
    """ViT-Tiny/16 with seeded random weights, fp32 in torch."""
    from eosin.encoders import load_encoder

    return load_encoder("random:vit_tiny_patch16_224@1", device="cpu", precision="fp32", backend="torch")


@pytest.fixture(scope="module")
def plain(slides: Path, vit, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """What one tile at a time, read in this process, gives."""
    return run(slides, SPEC, vit, out=tmp_path_factory.mktemp("plain") / "o", workers=0, batch_size=1).stores[0]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(("batch", "workers"), COMBINATIONS)
def test_batches_and_readers_change_no_bit(
    slides: Path, vit, plain: FeatureStore, tmp_path: Path, batch: int, workers: int
) -> None:
    outcome = run(slides, SPEC, vit, out=tmp_path / "o", workers=workers, batch_size=batch)
    assert outcome.done == IDS
    for slide_id in IDS:
        one, other = plain[slide_id], outcome.stores[0][slide_id]
        np.testing.assert_array_equal(other.xy, one.xy)
        assert cosine(other.x, one.x).min() >= 0.9999
        np.testing.assert_array_equal(other.x, one.x)
    assert same_store(plain.path, outcome.stores[0].path) == []


def test_every_row_is_its_own_tile_through_plain_torch(slides: Path, vit, plain: FeatureStore) -> None:
    """Rows against the network itself, one image at a time, on tiles read here in the order of the coordinates."""
    import torch

    network = vit.backbone.network
    mean, std = (np.array(part) for part in (vit.spec.mean, vit.spec.std))
    for slide_id in IDS:
        features = plain[slide_id]
        assert len(features) > 20
        assert len(features) % 7
        with open_slide(slides / slide_id) as slide, torch.inference_mode():
            plan = slide.plan(tile_px=64, mpp=1.0)
            tiles = [slide.read_tile((int(x), int(y)), plan).rgb for x, y in features.xy]
            images = [torch.from_numpy((tile / 255 - mean) / std).float().permute(2, 0, 1) for tile in tiles]
            expected = np.stack([network.forward_features(image[None])[0, 0].numpy() for image in images])
        assert cosine(features.x, expected).min() >= 0.9999
        np.testing.assert_allclose(features.x, expected, atol=1e-3)
        # The tolerance can tell rows apart: no row is that near to another tile's.
        centred = expected - expected.mean(0)
        assert cosine(features.x - expected.mean(0), centred).min() > 0.999
        assert cosine(features.x - expected.mean(0), np.roll(centred, 1, axis=0)).max() < 0.999


@pytest.mark.slow
def test_openvino_is_as_steady(slides: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from eosin.encoders import load_encoder

    vit = load_encoder("random:vit_tiny_patch16_224@1", device="cpu", precision="fp32", backend="openvino")
    stores = [
        run(slides, SPEC, vit, out=tmp_path / f"{batch}-{workers}", workers=workers, batch_size=batch).stores[0]
        for batch, workers in ((1, 0), (7, 1), (64, 2))
    ]
    assert same_store(stores[0].path, stores[1].path) == []
    assert same_store(stores[0].path, stores[2].path) == []
