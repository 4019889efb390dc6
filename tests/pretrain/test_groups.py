from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from eosin.pretrain.groups import apply_values, decays, layer_of, parameter_groups
from eosin.pretrain.heads import ProjectionHead
from eosin.pretrain.model import ModelConfig, VisionTransformer
from eosin.pretrain.schedules import StepValues

DEPTH = 3


@pytest.fixture(scope="module")
def encoder() -> VisionTransformer:
    return VisionTransformer(ModelConfig(dim=16, depth=DEPTH, heads=2, patch_px=4, position_grid=4))


@pytest.fixture(scope="module")
def heads() -> dict[str, nn.Module]:
    make = {"hidden": 8, "bottleneck": 8, "prototypes": 12}
    return {"dino": ProjectionHead(16, **make), "ibot": ProjectionHead(16, **make, weight_norm=False)}


def by_name(groups: list[dict]) -> dict[str, dict]:
    return {name: group for group in groups for name, _ in group["params"]}


def test_multipliers_follow_the_closed_form(encoder: VisionTransformer, heads: dict[str, nn.Module]) -> None:
    found = by_name(parameter_groups(encoder, heads, layer_decay=0.7))
    expected = {
        "encoder.pos_embed": 0.7**4,
        "encoder.cls_token": 0.7**4,
        "encoder.mask_token": 0.7**4,
        "encoder.register_tokens": 0.7**4,
        "encoder.patch_embed.proj.weight": 0.7**4 * 0.2,
        "encoder.patch_embed.proj.bias": 0.7**4 * 0.2,
        "encoder.blocks.0.attn.qkv.weight": 0.7**3,
        "encoder.blocks.2.mlp.fc2.bias": 0.7,
        "encoder.norm.weight": 1.0,
        "dino.mlp.0.weight": 1.0,
        "ibot.last_layer.weight": 1.0,
    }
    assert {name: found[name]["lr_multiplier"] for name in expected} == pytest.approx(expected)


def test_only_biases_norms_and_layer_scale_do_not_decay(
    encoder: VisionTransformer, heads: dict[str, nn.Module]
) -> None:
    found = by_name(parameter_groups(encoder, heads))
    norms = {
        f"encoder.{n}.{p}"
        for n, m in encoder.named_modules()
        if isinstance(m, nn.LayerNorm)
        for p in ("weight", "bias")
    }
    scales = {f"encoder.blocks.{i}.{ls}.gamma" for i in range(DEPTH) for ls in ("ls1", "ls2")}
    biases = {name for name in found if name.endswith(".bias")}
    assert {name for name, group in found.items() if group["wd_multiplier"] == 0} == norms | scales | biases
    assert all(found[f"encoder.{name}"]["wd_multiplier"] == 1 for name in ("pos_embed", "cls_token", "register_tokens"))


def test_every_trainable_parameter_is_in_one_group(encoder: VisionTransformer, heads: dict[str, nn.Module]) -> None:
    groups = parameter_groups(encoder, heads, layer_decay=0.9)
    members = [id(p) for group in groups for _, p in group["params"]]
    wanted = [id(p) for module in (encoder, *heads.values()) for p in module.parameters()]
    assert sorted(members) == sorted(wanted)
    heads["ibot"].requires_grad_(False)
    try:
        assert not any(name.startswith("ibot") for name in by_name(parameter_groups(encoder, heads)))
    finally:
        heads["ibot"].requires_grad_(True)


def test_timm_agrees_on_what_a_layer_is() -> None:
    """Timm counts the final norm and the last block as one layer, so its exponents are ours less one."""
    net = TimmTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=DEPTH, num_heads=2, num_classes=0, init_values=1
    )
    names = {id(p): n for n, p in net.named_parameters()}
    for group in param_groups_layer_decay(net, weight_decay=0.1, no_weight_decay_list=(), layer_decay=0.7):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert 0.7 ** max(DEPTH - layer_of(name, DEPTH), 0) == pytest.approx(group["lr_scale"]), name
            if parameter.ndim == 1:  # timm spares all vectors, also those of one dimension that have another name
                assert not decays(name), name


def test_values_reach_the_optimiser(encoder: VisionTransformer, heads: dict[str, nn.Module]) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(encoder, heads, layer_decay=0.5), lr=0.0)
    apply_values(optimizer, StepValues(lr=1e-3, last_layer_lr=0.0, weight_decay=0.1, momentum=0.99, temperature=0.04))
    of = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert of["encoder.blocks.0.attn.qkv.weight"]["lr"] == pytest.approx(1e-3 * 0.5**3)
    assert of["encoder.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1
    assert of["encoder.norm.bias"]["weight_decay"] == 0
    assert of["dino.last_layer.weight_v"]["lr"] == of["ibot.last_layer.weight"]["lr"] == 0
    assert of["dino.mlp.0.weight"]["lr"] == 1e-3


def test_a_frozen_last_layer_does_not_move(heads: dict[str, nn.Module], encoder: VisionTransformer) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(encoder, heads), lr=0.0)
    before = [p.detach().clone() for p in heads["dino"].parameters()]
    names = [n for n, _ in heads["dino"].named_parameters()]
    frozen = StepValues(lr=1e-2, last_layer_lr=0.0, weight_decay=0.1, momentum=0.99, temperature=0.04)
    apply_values(optimizer, frozen)
    heads["dino"](torch.randn(4, 16, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    for name, old, new in zip(names, before, heads["dino"].parameters(), strict=True):
        assert torch.equal(old, new) == name.startswith("last_layer"), name


@pytest.mark.parametrize("setting", [{"layer_decay": 0.0}, {"layer_decay": 1.1}, {"patch_embed_multiplier": 0.0}])
def test_bad_multipliers_are_refused(encoder: VisionTransformer, setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="layer_decay"):
        parameter_groups(encoder, {}, **setting)


def test_a_shared_head_is_given_once(encoder: VisionTransformer, heads: dict[str, nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"again\.mlp\.0\.weight is also dino\.mlp\.0\.weight"):
        parameter_groups(encoder, {"dino": heads["dino"], "again": heads["dino"]})
