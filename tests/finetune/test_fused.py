from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from small_vits import copy_added, dinov2, dinov3, images, separate, train_a_little
from torch import Tensor, nn

from eosin.errors import ConfigError
from eosin.finetune.adapters import AdaptConfig, adapt, added_state, merge
from eosin.finetune.fused import FusedLora, add_fused

QV = AdaptConfig(rank=4, alpha=10.0, dropout=0.0)


def tokens(backbone: Any, x: Tensor) -> Tensor:
    backbone.fit(*x.shape[-2:])
    found = backbone(x)
    return torch.cat((found.cls[:, None], found.registers, found.patches.flatten(1, 2)), dim=1)


def peft_apart(fused: nn.Linear, parts: tuple[str, ...]) -> Any:
    """Queries, keys and values as linears of their own, adapted by peft."""
    apart = nn.ModuleDict({name: nn.Linear(fused.in_features, fused.out_features // 3) for name in "qkv"})
    for at, linear in enumerate(apart.values()):
        linear.load_state_dict({"weight": fused.weight.chunk(3)[at], "bias": fused.bias.chunk(3)[at]})
    settings = peft.LoraConfig(r=4, lora_alpha=10, target_modules=list(parts))
    return peft.inject_adapter_in_model(settings, apart)


@pytest.mark.parametrize("parts", [("q", "v"), ("k",), ("q", "k", "v")])
def test_thirds_of_a_linear_are_pefts_linears(parts: tuple[str, ...]) -> None:
    """Outputs, gradients, merged weights."""
    torch.manual_seed(0)
    base = nn.Linear(16, 48).double()
    theirs = peft_apart(base, parts).double().train()
    ours = FusedLora(base, parts=parts, rank=4, alpha=10.0, dropout=0.0).double().train()
    for part in parts:
        nn.init.normal_(ours.up[part])
        theirs[part].lora_A["default"].weight.data.copy_(ours.down[part])
        theirs[part].lora_B["default"].weight.data.copy_(ours.up[part])
    x = torch.randn(5, 7, 16, dtype=torch.float64)
    expected = torch.cat([linear(x) for linear in theirs.values()], dim=-1)
    got = ours(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()
    got.square().sum().backward()
    for part in parts:
        torch.testing.assert_close(ours.down[part].grad, theirs[part].lora_A["default"].weight.grad)
        torch.testing.assert_close(ours.up[part].grad, theirs[part].lora_B["default"].weight.grad)
        theirs[part].merge()
    whole = torch.cat([linear.weight for linear in theirs.values()])
    torch.testing.assert_close(ours.merged().weight, whole, rtol=0, atol=1e-12)


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero() -> None:
    torch.manual_seed(0)
    ours = FusedLora(nn.Linear(400, 300), parts=("q", "v"), rank=100, alpha=1.0, dropout=0.0)
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=100, target_modules=["q"]), nn.ModuleDict({"q": nn.Linear(400, 100)})
    )
    drawn = theirs["q"].lora_A["default"].weight.detach()
    for part in ("q", "v"):
        own = ours.down[part].detach()
        assert float(own.std()) == pytest.approx(float(drawn.std()), rel=0.03)
        assert float(own.abs().max()) == pytest.approx(float(drawn.abs().max()), rel=0.01)
        assert not ours.up[part].any()
    assert not torch.equal(ours.down["q"], ours.down["v"])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("q", "k", "v", "proj", "mlp")])
def test_timm_fused_is_transformers_separate(targets: Any, gated: bool) -> None:
    """The same weights, A and B: the same tokens and the same gradients of A and B."""
    fused = dinov3(bias=False, gated=gated)
    apart = separate(fused)
    config = AdaptConfig(rank=4, alpha=10.0, dropout=0.0, targets=targets)
    adapt(fused.network, config)
    adapt(apart.network, config, seed=5)
    train_a_little(fused.network)
    copy_added(fused.network, apart.network)
    fused.network.double(), apart.network.double()
    x = images().double()
    ours, theirs = tokens(fused, x), tokens(apart, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    grads = {name: p.grad for name, p in added_state(apart.network).items()}
    for name, parameter in added_state(fused.network).items():
        assert parameter.grad is not None
        assert parameter.grad.any()
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-6)


def test_an_attention_that_reads_the_weight_of_qkv_is_made_to_call_it() -> None:
    """DINOv3 with biases: timm takes `qkv.weight` past the module, where adapters would be without effect."""
    plain = dinov3(bias=True)
    fused, apart = copy.deepcopy(plain), separate(plain)
    before = tokens(plain, images()).detach()
    adapt(fused.network, QV)
    torch.testing.assert_close(tokens(fused, images()), before, rtol=0, atol=1e-6)
    adapt(apart.network, QV)
    train_a_little(fused.network)
    copy_added(fused.network, apart.network)
    changed = tokens(fused, images())
    assert float((changed - before).detach().abs().max()) > 0.1
    torch.testing.assert_close(changed, tokens(apart, images()), rtol=0, atol=1e-5)
    fused.network.double()
    unmerged = tokens(fused, images().double())
    merge(fused.network)
    torch.testing.assert_close(tokens(fused, images().double()), unmerged, rtol=0, atol=1e-6)
    assert not any(block.attn.qkv_bias_separate for block in fused.network.blocks)


@pytest.mark.parametrize("make", [dinov2, lambda: dinov3(bias=False)])
def test_the_start_is_the_base_bit_by_bit(make: Any) -> None:
    plain = make()
    adapted = copy.deepcopy(plain)
    adapt(adapted.network, QV)
    assert torch.equal(tokens(adapted, images()), tokens(plain, images()))


def test_adapters_are_float32_beside_a_base_in_bfloat16() -> None:
    half, whole = dinov3(bias=False), dinov3(bias=False)
    half.network.to(torch.bfloat16)
    for backbone in (half, whole):
        adapt(backbone.network, QV)
        train_a_little(backbone.network)
        assert {p.dtype for p in added_state(backbone.network).values()} == {torch.float32}
    out = tokens(half, images().to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), tokens(whole, images()), rtol=0, atol=0.15)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in added_state(half.network).values())


def test_grouped_heads_are_refused() -> None:
    attention = nn.Module()
    attention.qkv, attention.num_heads, attention.num_kv_heads = nn.Linear(8, 16), 4, 2
    with pytest.raises(ConfigError, match=r"4 heads of queries and 2 of keys"):
        add_fused(attention, parts=("q",), rank=2, alpha=4.0, dropout=0.0)
    with pytest.raises(ConfigError, match="16 rows"):
        FusedLora(nn.Linear(8, 16), parts=("q",), rank=2, alpha=4.0, dropout=0.0)
