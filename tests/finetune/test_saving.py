from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vits import dinov2, dinov3, images, resnet, separate, train_a_little
from torch import nn

from eosin.errors import CheckpointError, ConfigError, NonFiniteError, WeightsError
from eosin.finetune import saving
from eosin.finetune.adapters import AdaptConfig, count
from eosin.finetune.classifier import Classifier
from eosin.finetune.experts import Mixture
from eosin.finetune.saving import load_trained, load_trained_state, read_saved, save_trained, trained_state

RECIPE = {"name": "amf", "loss": {"gamma": 2.0}, "folds": [1, 2]}


def trained(config: AdaptConfig, backbone: Any = None, seed: int = 3) -> Classifier:
    model = Classifier(backbone or dinov3(), config, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return model.eval()


@pytest.mark.parametrize("mode", ["head", "last", "full", "lora", "vpt"])
def test_a_file_gives_the_model_back_bit_by_bit(mode: Any, tmp_path: Path) -> None:
    model = trained(AdaptConfig(mode=mode, rank=4, blocks=1), dinov2())
    path = save_trained(tmp_path / "a.safetensors", model, recipe=RECIPE, threshold=0.37, temperature=1.5)
    found, saved = load_trained(path, [dinov2()])
    assert torch.equal(found(images()), model(images()))
    state, again = trained_state(model), trained_state(found)
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert (saved.threshold, saved.temperature, saved.recipe) == (0.37, 1.5, RECIPE)
    assert saved.classes == ("normal", "atypical")
    assert saved.branches[0].config == model.config
    assert saved.branches[0].encoder == model.spec.name
    assert sum(value.numel() for value in load_file(path).values()) == count(model)
    second = save_trained(tmp_path / "b.safetensors", found, recipe=RECIPE, threshold=0.37, temperature=1.5)
    assert second.read_bytes() == path.read_bytes()


def test_a_mixture_comes_back_with_its_batch_norms_and_its_gate(tmp_path: Path) -> None:
    model = Mixture([trained(AdaptConfig()), trained(AdaptConfig(mode="full"), resnet())]).train()
    nn.init.normal_(model.gate.weight)
    model(images())  # moves the statistics of batch norms
    model.eval()
    path = save_trained(tmp_path / "m.safetensors", model, recipe={})
    found, saved = load_trained(path, [dinov3(), resnet()])
    assert isinstance(found, Mixture)
    assert torch.equal(found(images()), model(images()))
    assert [branch.encoder for branch in saved.branches] == [dinov3().spec.name, resnet().spec.name]
    with pytest.raises(WeightsError, match="needs 2 encoders"):
        load_trained(path, [dinov3()])


def test_adapters_of_timm_load_on_transformers(tmp_path: Path) -> None:
    for mode in ("lora", "vpt"):
        model = trained(AdaptConfig(mode=mode, targets=("q", "v", "proj", "mlp")))
        path = save_trained(tmp_path / "a.safetensors", model, recipe={})
        found, _ = load_trained(path, [separate(dinov3())])
        torch.testing.assert_close(found(images()), model(images()), rtol=0, atol=1e-5)


def test_another_encoder_is_refused_by_its_hash(tmp_path: Path) -> None:
    path = save_trained(tmp_path / "a.safetensors", trained(AdaptConfig()), recipe={})
    mine, other = dinov3(), dinov3(seed=1)
    with pytest.raises(WeightsError) as caught:
        load_trained(path, [other])
    for word in (mine.spec.name, other.spec.name, mine.spec.weights_hash, other.spec.weights_hash):
        assert word in str(caught.value)


@pytest.mark.parametrize("where", ["save_file", "replace_durably"])
def test_an_interrupted_save_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_trained(tmp_path / "a.safetensors", trained(AdaptConfig()), recipe={"run": 1})
    before = path.read_bytes()

    def stop(first: Any, second: Any, **_: Any) -> None:
        target = Path(second) if where == "save_file" else Path(first)
        target.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, where, stop)
    with pytest.raises(KeyboardInterrupt):
        save_trained(path, trained(AdaptConfig(), seed=9), recipe={"run": 2})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert read_saved(path).recipe == {"run": 1}


def test_a_fold_starts_where_the_last_one_started() -> None:
    model = trained(AdaptConfig())
    start = {key: value.clone() for key, value in trained_state(model).items()}
    logits = model(images())
    train_a_little(model.backbone.network)
    assert not torch.equal(model(images()), logits)
    load_trained_state(model, start)
    assert torch.equal(model(images()), logits)
    with pytest.raises(WeightsError, match=r"missing: head\.bias.*of another shape: head\.weight"):
        load_trained_state(
            model, {k: v[:, :5] if k == "head.weight" else v for k, v in start.items() if k != "head.bias"}
        )


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = save_trained(tmp_path / "a.safetensors", trained(AdaptConfig()), recipe={})
    with pytest.raises(CheckpointError, match="does not exist"):
        read_saved(tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="broken"):
        read_saved(cut)
    altered = bytearray(path.read_bytes())
    altered[-3] ^= 1
    cut.write_bytes(altered)
    with pytest.raises(CheckpointError, match="altered"):
        load_trained(cut, [dinov3()])
    save_file({"x": torch.zeros(1)}, cut)
    with pytest.raises(CheckpointError, match="not written by eosin finetune"):
        read_saved(cut)


def test_what_should_not_be_saved_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = trained(AdaptConfig())
    with pytest.raises(ConfigError, match="threshold"):
        save_trained(path, model, recipe={}, threshold=float("nan"))
    with pytest.raises(ConfigError, match="temperature"):
        save_trained(path, model, recipe={}, temperature=0.0)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"head\.weight"):
        save_trained(path, model, recipe={})
    assert not path.exists()
