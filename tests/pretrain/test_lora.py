from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainer_runs import crops_of, small, source, write_tiles

import eosin
from eosin.errors import ConfigError, WeightsError
from eosin.pretrain import engine
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.layouts import load_weights, save_encoder
from eosin.pretrain.lora import Adapted, Lora, add_adapters, apply_adapter, merged
from eosin.pretrain.model import ModelConfig, VisionTransformer, preset
from eosin.pretrain.trainer import Outcome, pretrain

CPU = torch.device("cpu")
ALL = ("q", "k", "v", "proj", "mlp")
GEOMETRIES = {
    "dinov2": ModelConfig(dim=64, depth=2, heads=1, patch_px=8, position_grid=4, layer_scale=1.0),
    "gated": ModelConfig(dim=64, depth=2, heads=1, patch_px=8, position_grid=4, ffn="swiglu", layer_scale=1.0),
    "dinov3": ModelConfig(dim=64, depth=2, heads=1, patch_px=8, position="rope", k_bias=False, layer_scale=1.0),
}


def network(config: ModelConfig, seed: int = 0) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(config)


def stir(encoder: nn.Module, seed: int = 1) -> None:
    """Give the adapters weights as after training."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, Adapted):
                module.up.copy_(torch.randn(module.up.shape, generator=random) * 0.1)


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# What adapters compute.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("q", "v"), ALL])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_start_is_the_base_bit_by_bit(name: str, targets: Any, dtype: torch.dtype) -> None:
    base = network(GEOMETRIES[name])
    adapted = copy.deepcopy(base)
    add_adapters(adapted, Lora(rank=4, alpha=8.0, targets=targets))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for ours, theirs in zip(adapted([images()])[0], base([images()])[0], strict=True):
            assert torch.equal(ours, theirs)
        stir(adapted)
        assert not torch.equal(adapted([images()])[0].cls, base([images()])[0].cls)


def test_an_adapted_linear_is_pefts() -> None:
    """peft adapts queries and values as linears of their own, here they are rows of one."""
    torch.manual_seed(0)
    fused = nn.Linear(16, 48)
    apart = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("query", "key", "value")})
    for at, linear in enumerate(apart.values()):
        linear.load_state_dict({"weight": fused.weight.chunk(3)[at], "bias": fused.bias.chunk(3)[at]})
    settings = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["query", "value"], lora_dropout=0.0)
    theirs = peft.inject_adapter_in_model(settings, apart)
    ours = Adapted(fused, parts=3, rows=(0, 2), lora=Lora(rank=4, alpha=10.0))
    stir(ours)
    with torch.no_grad():
        for at, name in enumerate(("query", "value")):
            theirs[name].lora_A["default"].weight.copy_(ours.down[at])
            theirs[name].lora_B["default"].weight.copy_(ours.up[at])
    x = torch.randn(5, 16)
    expected = torch.cat([linear(x) for linear in theirs.values()], dim=1)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)
    (ours(x).square().sum() + theirs["query"](x).square().sum() + theirs["value"](x).square().sum()).backward()
    for at, name in enumerate(("query", "value")):
        torch.testing.assert_close(ours.down.grad[at], theirs[name].lora_A["default"].weight.grad)
        torch.testing.assert_close(ours.up.grad[at], theirs[name].lora_B["default"].weight.grad)
        theirs[name].merge()
    state = {f"blocks.0.attn.qkv.{key}": value for key, value in ours.state_dict().items()}
    whole = merged(state, Lora(rank=4, alpha=10.0))["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(whole, torch.cat([linear.weight for linear in theirs.values()]), rtol=0, atol=1e-6)


def test_adapters_start_as_pefts() -> None:
    """A is uniform in +-1/sqrt(in), as peft draws it; B is zero."""
    ours = Adapted(nn.Linear(400, 300), parts=3, rows=(0, 2), lora=Lora(rank=100, alpha=100.0))
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=100, target_modules=["only"]), nn.ModuleDict({"only": nn.Linear(400, 300)})
    )
    drawn, own = theirs["only"].lora_A["default"].weight.detach(), ours.down.detach()
    assert float(own.std()) == pytest.approx(float(drawn.std()), rel=0.03)
    assert float(own.abs().max()) == pytest.approx(float(drawn.abs().max()), rel=0.01)
    assert not ours.up.any()


@pytest.mark.parametrize(
    ("rank", "targets", "count"),
    [
        (8, ("q", "v"), 1_310_720),
        (8, ("q", "k", "v", "proj"), 2_621_440),
        (8, ALL, 7_536_640),
        (4, ("q", "v"), 655_360),
    ],
)
def test_counts_of_huge_plus(rank: int, targets: Any, count: int) -> None:
    """The numbers of DINOv3 ViT-H+/16 with LoRA: 32 x 2 x 8 x (1280 + 1280) for queries and values of rank 8."""
    with torch.device("meta"):
        encoder = VisionTransformer(preset("huge_plus"))
        add_adapters(encoder, Lora(rank=rank, alpha=1.0, targets=targets))
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == count


def test_counts_are_pefts_on_transformers() -> None:
    """One block of H+ as transformers and peft have it."""
    settings = transformers.DINOv3ViTConfig(
        hidden_size=1280, num_hidden_layers=1, num_attention_heads=20, intermediate_size=5120, use_gated_mlp=True
    )
    with torch.device("meta"):
        theirs = transformers.DINOv3ViTModel(settings)
        names = {name.rpartition(".")[2] for name, part in theirs.named_modules() if isinstance(part, nn.Linear)}
    for targets, wanted in ((("q", "v"), {"q_proj", "v_proj"}), (ALL, names)):
        with torch.device("meta"):
            adapted = peft.inject_adapter_in_model(
                peft.LoraConfig(r=8, target_modules=sorted(wanted)), copy.deepcopy(theirs)
            )
            ours = VisionTransformer(preset("huge_plus", depth=1))
            add_adapters(ours, Lora(rank=8, alpha=8.0, targets=targets))
        expected = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
        assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("targets", [("q", "v"), ALL])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_merged_weights_compute_the_same(name: str, targets: Any) -> None:
    lora = Lora(rank=4, alpha=6.0, targets=targets)
    adapted = network(GEOMETRIES[name])
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    add_adapters(adapted, lora)
    stir(adapted)
    plain = network(GEOMETRIES[name], seed=5)
    plain.load_state_dict(merged(adapted.state_dict(), lora))
    with torch.no_grad():
        for ours, theirs in zip(plain([images()])[0], adapted([images()])[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    changed = {key for key, value in plain.state_dict().items() if not torch.equal(value, before[key])}
    linears = {"q": "attn.qkv", "proj": "attn.proj"} if "proj" in targets else {"q": "attn.qkv"}
    assert {f"blocks.1.{path}.weight" for path in linears.values()} <= changed
    assert all(key.endswith("weight") and ("attn" in key or "mlp" in targets) for key in changed)


# A run.


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles") / "tiles.npy", 32)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, tiles: Path) -> Path:
    """Weights to begin from, of the geometry of `small`."""
    config = small(tiles, model__layer_scale=1.0)
    state = network(config.model).state_dict()
    return save_encoder(tmp_path_factory.mktemp("released") / "base.safetensors", state, config.model)


def lora(tiles: Path, released: Path, **changes: Any) -> PretrainConfig:
    return small(tiles, run__weights=str(released), run__lora_rank=4, run__lora_alpha=8.0, **changes)


def run(config: PretrainConfig, out: Path, **more: Any) -> Outcome:
    return pretrain(config, out, device="cpu", source=source(config), **more)


def build(config: PretrainConfig) -> engine.Engine:
    with torch.random.fork_rng():
        return engine.build(config, classes={}, steps=4, device=CPU)


def test_only_adapters_and_heads_train(tiles: Path, released: Path) -> None:
    config = lora(tiles, released, schedule__warmup=0.0)
    made, base = build(config), load_file(released)
    names = {name for name, p in made.student.named_parameters() if p.requires_grad}
    ours = {name for name in names if name.startswith("branch.encoder.")}
    assert ours == {f"branch.encoder.blocks.{i}.attn.qkv.{part}" for i in (0, 1) for part in ("down", "up")}
    assert sum(made.student.get_parameter(name).numel() for name in ours) == 2 * 2 * 4 * (64 + 64)
    assert {name.split(".")[1] for name in names - ours} == {"dino", "ibot"}
    in_optimizer = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(made.student.get_parameter(name)) for name in names}
    start = {name: p.detach().clone() for name, p in made.teacher.named_parameters()}
    for step in range(2):
        old = {name: p.clone() for name, p in made.teacher.named_parameters()}
        stepped = engine.optimiser_step(made, step, lambda i: crops_of(config, i))
    for name, p in made.teacher.named_parameters():
        student = made.student.branch.get_parameter(name).detach()
        expected = torch.lerp(old[name], student, 1 - stepped.values.momentum)
        if f"branch.{name}" in names:
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-7)
            assert name.endswith("last_layer.weight_g") or not torch.equal(p, start[name]), name
        else:
            assert torch.equal(p, start[name]), name
            assert torch.equal(student, start[name]), name
    assert torch.equal(made.teacher.encoder.blocks[0].attn.qkv.base.weight, base["blocks.0.attn.qkv.weight"])


def test_rank_0_is_no_adapter(tiles: Path, released: Path) -> None:
    config = small(tiles, run__weights=str(released), run__lora_rank=0)
    ours, theirs = build(config), build(small(tiles, run__weights=str(released)))
    for (name, one), (other, two) in zip(
        ours.student.named_parameters(), theirs.student.named_parameters(), strict=True
    ):
        assert (name, one.requires_grad) == (other, True)
        assert torch.equal(one, two)


def test_a_run_leaves_a_merged_encoder_and_the_adapter_alone(tiles: Path, released: Path, tmp_path: Path) -> None:
    config = lora(tiles, released, run__lora_targets=list(ALL))
    outcome = run(config, tmp_path / "out")
    state = load_file(outcome.out / "checkpoints" / "step-00000004" / "tensors.safetensors")
    fresh = build(config)
    fresh.teacher.load_state_dict({k.removeprefix("teacher/"): v for k, v in state.items() if k.startswith("teacher/")})
    crops = crops_of(config).images[0]
    with torch.no_grad():
        expected = fresh.teacher.encoder([crops])[0].cls
    assert outcome.encoder is not None
    encoder = eosin.load_encoder(outcome.encoder, device="cpu", backend="torch", precision="fp32")
    assert torch.allclose(encoder(crops).cls, expected, atol=1e-5)
    base = network(config.model, seed=9)
    load_weights(base, released)
    adapter = outcome.out / "adapter.safetensors"
    assert adapter.stat().st_size < outcome.encoder.stat().st_size / 2
    apply_adapter(base, adapter)
    whole = load_file(outcome.encoder)
    assert all(torch.equal(value, whole[name]) for name, value in base.state_dict().items() if "blocks" in name)
    record = json.loads((outcome.out / "run.json").read_text())
    adapters = sum(v.numel() for v in load_file(adapter).values())
    assert record["trained"] == adapters
    assert "M in adapters train" in outcome.report.read_text()
    assert record["parameters"] == adapters + sum(p.numel() for p in base.parameters())


def test_an_adapter_of_other_weights_is_refused(tiles: Path, released: Path, tmp_path: Path) -> None:
    config = lora(tiles, released, budget__steps=1)
    outcome = run(config, tmp_path / "out")
    other = network(config.model, seed=9)
    before = other.state_dict()["blocks.0.attn.qkv.weight"].clone()
    with pytest.raises(WeightsError, match=r"was trained on .*base\.safetensors; the encoder has other weights"):
        apply_adapter(other, outcome.out / "adapter.safetensors")
    assert torch.equal(other.blocks[0].attn.qkv.weight, before)
    save_file({"a": torch.zeros(2)}, tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match=r"none\.safetensors is no adapter of eosin pretrain"):
        apply_adapter(other, tmp_path / "none.safetensors")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_bit_by_bit_the_same(
    tiles: Path, released: Path, tmp_path: Path, precision: str
) -> None:
    config = lora(tiles, released, run__precision=precision, budget__steps=5)
    whole = run(config, tmp_path / "whole")

    def stop(status: Any) -> None:
        if status.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    run(config, tmp_path / "parts", progress=stop)
    rest = run(config, tmp_path / "parts")
    assert (rest.finished, rest.resumed_from) == (True, 3)
    found = [load_file(one.out / "checkpoints" / "step-00000005" / "tensors.safetensors") for one in (whole, rest)]
    assert found[0].keys() == found[1].keys()
    assert [name for name, value in found[0].items() if not torch.equal(value, found[1][name])] == []
    assert any(name.endswith("attn.qkv.up") and value.any() for name, value in found[0].items())
    moments = [name for name in found[0] if name.startswith("optimizer/student.branch.encoder")]
    assert {name.split("/")[1].rpartition(".")[2] for name in moments} == {"down", "up"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run__weights": None}, r"run\.lora_rank is 4, but weights is not given: there is nothing to adapt"),
        ({"run__lora_rank": -1}, r"run\.lora_rank is -1; it must be 0 or more"),
        ({"run__lora_rank": 65}, r"run\.lora_rank is 65; the weights have rank 64 at most"),
        ({"run__lora_rank": None}, r"lora_alpha or lora_targets is given without lora_rank"),
        ({"run__lora_alpha": 0.0}, r"run\.lora_alpha is 0\.0; it must be above 0"),
        ({"run__lora_targets": ["o"]}, r"run\.lora_targets\[0\] is \"o\"; it must be one of 'q'"),
        ({"run__lora_targets": []}, r"run\.lora_targets is \[\]; it must be one or more"),
    ],
)
def test_settings_that_cannot_be(tiles: Path, changes: dict[str, Any], words: str) -> None:
    settings = {"run__weights": "base.safetensors", "run__lora_rank": 4, "run__lora_alpha": 8.0, **changes}
    with pytest.raises(ConfigError, match=words):
        small(tiles, **settings)
