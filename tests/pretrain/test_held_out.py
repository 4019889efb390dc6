from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trainer_runs
from PIL import Image

from eosin.errors import CohortError, LabelError
from eosin.pretrain import held_out
from eosin.pretrain.held_out import HeldOut
from eosin.pretrain.model import ModelConfig, VisionTransformer
from eosin.pretrain.view_config import ViewConfig


def labelled(y: np.ndarray, clusters: np.ndarray) -> HeldOut:
    tiles = torch.zeros(len(y), 3, 8, 8, dtype=torch.uint8)
    return HeldOut(tiles=tiles, y=y, classes=("a", "b"), clusters=clusters.astype(str))


def test_images_are_cut_to_whole_patches_and_keep_their_pixels(tmp_path: Path) -> None:
    table = trainer_runs.write_held_out(tmp_path / "held", 8)
    found = held_out.read_held_out(table, patch_px=16)
    assert found.tiles.shape == (8, 3, 32, 32)
    assert found.classes == ("kind0", "kind1", "kind2", "kind3")
    whole = np.asarray(Image.open(table.parent / "5.png"))
    assert np.array_equal(found.tiles[5].movedim(0, 2).numpy(), whole[4:36, 4:36])


def test_a_missing_image_and_a_class_of_one_patient_are_named(tmp_path: Path) -> None:
    table = trainer_runs.write_held_out(tmp_path / "held", 8)
    (table.parent / "3.png").unlink()
    with pytest.raises(CohortError, match=r"3\.png"):
        held_out.read_held_out(table, patch_px=8)
    with pytest.raises(LabelError, match="one patient"):
        held_out.read_held_out(trainer_runs.write_held_out(tmp_path / "few", 4), patch_px=8)


def test_separate_classes_are_told_apart_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    y, clusters = np.tile([0, 1], 60), np.arange(120) // 2
    noise = random.normal(size=(120, 8)).astype(np.float32)
    told = held_out.probe(noise + (6 * y[:, None] - 3).astype(np.float32), labelled(y, clusters))
    assert told["knn"]["point"] > 0.97
    assert told["linear"]["point"] > 0.97
    assert (told["n"], told["clusters"], told["folds"], told["chance"]) == (120, 60, 5, 0.5)
    untold = held_out.probe(noise, labelled(y, clusters))
    for name in ("knn", "linear"):
        assert 0.35 < untold[name]["point"] < 0.65


def test_patients_are_never_on_both_sides() -> None:
    """Features that name the patient and nothing else would tell every label if a patient were divided."""
    random = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 4)
    y = np.repeat(random.permutation(np.tile([0, 1], 20)), 4)
    features = (random.normal(size=(40, 16))[clusters] + random.normal(scale=0.01, size=(160, 16))).astype(np.float32)
    assert held_out.probe(features, labelled(y, clusters))["knn"]["point"] < 0.7


def test_tokens_are_the_encoders_own_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    encoder = VisionTransformer(ModelConfig(dim=64, depth=2, heads=1, patch_px=8, position_grid=4, drop_path=0.5))
    tiles = torch.randint(0, 255, (40, 3, 32, 32), dtype=torch.uint8)
    views = ViewConfig(global_px=32, local_px=16, blur_sigma_px=(0.1, 1), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    encoder.train()
    found = held_out.tokens_of(encoder, tiles, views, precision="fp32")
    assert encoder.training
    images = (tiles / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.2, 0.1])[:, None, None]
    with torch.no_grad():
        expected = encoder.eval()([images])[0]
    assert torch.allclose(found.cls, expected.cls, atol=1e-5)
    assert torch.allclose(found.patches, expected.patches, atol=1e-5)


def test_the_picture_gives_alike_patches_one_colour(tmp_path: Path) -> None:
    patches = torch.zeros(2, 16, 6)
    patches[:, ::2, 0], patches[:, 1::2, 1] = 5.0, 5.0
    tiles = torch.full((2, 3, 32, 32), 200, dtype=torch.uint8)
    path = held_out.pca_picture(patches, tiles, tmp_path / "pca.png", columns=2)
    picture = np.asarray(Image.open(path))
    top = 32 + held_out.GAP
    even, odd = picture[top + 4, 4], picture[top + 4, 12]
    assert not np.array_equal(even, odd)
    assert np.array_equal(picture[top + 4, 20], even)
    other = 32 + held_out.GAP
    assert np.array_equal(picture[top + 4, other + 4], even)
    assert np.array_equal(picture[:32, :32], np.full((32, 32, 3), 200))


def test_every_cluster_is_shown_before_a_second_of_any() -> None:
    assert held_out.spread_rows(["a", "a", "b", "a", "c"], 3) == [0, 2, 4]
    assert held_out.spread_rows(["a", "a"], 5) == [0, 1]
