"""A file of weights says how it was trained, and the reader normalises so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_runs import small

import eosin
from eosin.encoders.checkpoints import FACTS, read_facts
from eosin.errors import ConfigError, WeightsError
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.engine import start_from
from eosin.pretrain.export import encoder_facts, export_encoder
from eosin.pretrain.model import VisionTransformer

PLAIN: dict[str, Any] = {"device": "cpu", "precision": "fp32", "backend": "torch"}
MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)


def written(folder: Path) -> tuple[Path, VisionTransformer, PretrainConfig]:
    """Return the file of an untrained encoder of odd colours, the network and the config."""
    config = small(folder / "tiles.npy", views__mean=list(MEAN), views__std=list(STD), model__layer_scale=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(config.model).eval()
    facts = encoder_facts(config, mpp=(0.25, 2.0), step=3)
    return export_encoder(folder / "mine.safetensors", model.state_dict(), config, facts), model, config


def altered(path: Path, facts: object) -> Path:
    """Return a copy of a file with other metadata."""
    text = facts if isinstance(facts, str) else json.dumps(facts)
    other = path.with_name("other.safetensors")
    save_file(load_file(path), other, metadata={"format": "pt", FACTS: text})
    return other


def test_a_file_is_read_as_it_was_trained(tmp_path: Path) -> None:
    path, model, _ = written(tmp_path)
    encoder = eosin.load_encoder(path, **PLAIN)
    spec = encoder.spec
    assert (spec.mean, spec.std, spec.mpp, spec.input_px, spec.pooling) == (MEAN, STD, (0.25, 2.0), 32, "cls")
    tiles = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images = torch.from_numpy((tiles / 255 - MEAN) / STD).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model([images])[0].cls.numpy()
    np.testing.assert_allclose(encoder.encode(tiles), expected, atol=1e-5)


def test_imported_weights_keep_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EOSIN_HOME", str(tmp_path / "home"))
    path, _, _ = written(tmp_path)
    eosin.encoders.import_weights("my-own", path)
    assert eosin.load_encoder("my-own", **PLAIN).spec.mean == MEAN


def test_a_file_without_metadata_is_read_as_before(tmp_path: Path) -> None:
    path, _, _ = written(tmp_path)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    assert read_facts(tmp_path / "bare.safetensors") == {}
    assert eosin.load_encoder(tmp_path / "bare.safetensors", **PLAIN).spec.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_px": 16}, "says patch_px 16, its tensors have 8; it has been altered"),
        ({"dim": 128}, "says dim 128, its tensors have 64"),
        ({"mean": [0.5, 0.5]}, r"mean \(0\.5, 0\.5\) and std .* are of no image"),
        ({"std": [0.0, 1.0, 1.0]}, "are of no image"),
        ({"mean": [float("nan"), 0.5, 0.5]}, "are of no image"),
        ({"mean": None}, "cannot be read"),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path, _, _ = written(tmp_path)
    with pytest.raises(WeightsError, match=words):
        eosin.load_encoder(altered(path, {**read_facts(path), **change}), **PLAIN)


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path, _, _ = written(tmp_path)
    for text in ("{", "[1]"):
        with pytest.raises(WeightsError, match=r"other\.safetensors: the metadata 'eosin_encoder' cannot be read"):
            eosin.load_encoder(altered(path, text), **PLAIN)


def test_training_goes_on_with_the_colours_of_the_file(tmp_path: Path) -> None:
    path, model, config = written(tmp_path)
    again = VisionTransformer(config.model)
    start_from(again, small(tmp_path, run__weights=str(path), views__mean=list(MEAN), views__std=list(STD)))
    assert torch.equal(again.norm.weight, model.norm.weight)
    assert torch.equal(again.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    with pytest.raises(ConfigError, match=r"mine\.safetensors was trained with \(0\.7, 0\.5, 0\.6\) and .*: set those"):
        start_from(again, small(tmp_path, run__weights=str(path)))
