from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from small_vits import (
    DEPTH,
    WIDTH,
    copy_added,
    dinov2,
    dinov3,
    images,
    resnet,
    separate,
    train_a_little,
)
from torch import Tensor, nn

from eosin.encoders.network import Backbone, build_network
from eosin.errors import ConfigError
from eosin.finetune.adapters import (
    AdaptConfig,
    adapt,
    added_state,
    count,
    depths,
    merge,
    set_checkpointing,
)

ALL = ("q", "k", "v", "proj", "mlp")
PLUS = "vit_huge_plus_patch16_dinov3"


def cls(backbone: Any, x: Tensor) -> Tensor:
    backbone.fit(*x.shape[-2:])
    return backbone(x).cls


def trains(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


# Counts.


def huge_plus(layout: str) -> nn.Module:
    """ViT-H+ without memory: 32 blocks, width 1280."""
    with torch.device("meta"):
        if layout == "timm":
            return build_network(PLUS, {})
        config = transformers.DINOv3ViTConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            num_register_tokens=4, use_gated_mlp=True, hidden_act="silu",
        )  # fmt: skip
        return transformers.DINOv3ViTModel(config)


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_counts_of_huge_plus(layout: str) -> None:
    """Blocks x targets x rank x (in + out): 32 x 2 x 4 x 2560; merging gives the plain network back."""
    network = huge_plus(layout)
    for rank, number in ((4, 655_360), (8, 1_310_720)):
        with torch.device("meta"):
            adapt(network, AdaptConfig(rank=rank))
        assert count(network) == number
        merge(network)


def test_counts_of_the_other_modes() -> None:
    blocks = 2 * sum(p.numel() for p in dinov3().network.blocks[0].parameters())
    network = dinov3().network
    norm = 2 * WIDTH
    whole = sum(p.numel() for p in network.parameters())
    expected = {
        AdaptConfig(mode="head"): 0,
        AdaptConfig(mode="last", blocks=2): blocks + norm,
        AdaptConfig(mode="full"): whole,
        AdaptConfig(mode="vpt", prompts=5, deep=False): 5 * WIDTH,
        AdaptConfig(mode="vpt", prompts=5): DEPTH * 5 * WIDTH,
        AdaptConfig(rank=2, targets=ALL): DEPTH * 2 * (4 * 2 * WIDTH + 2 * (WIDTH + 4 * WIDTH)),
    }
    for config, number in expected.items():
        network = dinov3().network
        adapt(network, config)
        assert count(network) == number, config


def test_what_trains() -> None:
    full, last, stages = dinov2().network, dinov2().network, resnet().network
    adapt(full, AdaptConfig(mode="full"))
    assert {name for name, _ in full.named_parameters()} - trains(full) == {"pos_embed"}
    adapt(last, AdaptConfig(mode="last", blocks=1))
    assert {name.split(".")[0] for name in trains(last)} == {"blocks", "norm"}
    assert all(name.startswith(("blocks.2.", "norm.")) for name in trains(last))
    adapt(stages, AdaptConfig(mode="last", blocks=1))
    assert {name.split(".")[0] for name in trains(stages)} == {"layer4"}


def test_only_what_trains_gets_gradients() -> None:
    for config in (AdaptConfig(), AdaptConfig(mode="vpt"), AdaptConfig(mode="last"), AdaptConfig(mode="full")):
        backbone = dinov3()
        adapt(backbone.network, config)
        train_a_little(backbone.network)
        found = backbone(images())
        (found.cls.square().sum() + found.patches.square().sum()).backward()
        with_gradient = {name for name, p in backbone.network.named_parameters() if p.grad is not None}
        assert with_gradient == trains(backbone.network)


# LoRA.


@pytest.mark.parametrize("layout", ["fused", "separate", "dinov2"])
@pytest.mark.parametrize("targets", [("q", "v"), ALL])
def test_merged_is_unmerged(layout: str, targets: Any) -> None:
    backbone: Any = dinov2() if layout == "dinov2" else dinov3()
    backbone = separate(backbone) if layout == "separate" else backbone
    keys = backbone.network.state_dict().keys()
    before = cls(backbone, images())
    adapt(backbone.network, AdaptConfig(rank=4, targets=targets))
    train_a_little(backbone.network)
    backbone.network.double()
    x = images().double()
    unmerged = cls(backbone, x).detach()
    assert float((unmerged - before).abs().max()) > 0.05
    merge(backbone.network)
    torch.testing.assert_close(cls(backbone, x), unmerged, rtol=0, atol=1e-6)
    assert backbone.network.state_dict().keys() == keys
    assert not trains(backbone.network)


def test_the_seed_decides_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    networks = [dinov2().network for _ in range(3)]
    torch.set_rng_state(state)
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        adapt(network, AdaptConfig(), seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    same, again, other = (torch.cat([p.detach().flatten() for p in added_state(n).values()]) for n in networks)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


# Prompts.


def by_hand(backbone: Backbone, x: Tensor, prompts: list[Tensor]) -> Tensor:
    """Class tokens with prompts, block by block, as equations 4-7 of the paper have it (no rotary positions)."""
    network: Any = backbone.network
    backbone.fit(*x.shape[-2:])
    tokens = network.norm_pre(network._pos_embed(network.patch_embed(x)))
    head, patches = tokens[:, :1], tokens[:, 1:]
    number = prompts[0].shape[1]
    middle = prompts[0].expand(len(x), -1, -1)
    for at, block in enumerate(network.blocks):
        if len(prompts) > 1:
            middle = prompts[at].expand(len(x), -1, -1)
        z = block(torch.cat((head, middle, patches), dim=1))
        head, middle, patches = z[:, :1], z[:, 1 : 1 + number], z[:, 1 + number :]
    return network.norm(head)[:, 0]


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_are_those_of_the_paper(deep: bool) -> None:
    backbone = dinov2()
    plain = copy.deepcopy(backbone)
    adapt(backbone.network, AdaptConfig(mode="vpt", prompts=4, deep=deep))
    train_a_little(backbone.network)
    prompts = [p.detach() for p in added_state(backbone.network).values()]
    assert len(prompts) == (DEPTH if deep else 1)
    torch.testing.assert_close(cls(backbone, images()), by_hand(plain, images(), prompts), rtol=0, atol=2e-6)
    assert backbone(images()).patches.shape == (3, 4, 4, WIDTH)


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_have_no_rotary_position(deep: bool) -> None:
    """transformers counts the tokens before the patches itself: the same prompts give the same there."""
    ours = dinov3()
    theirs = separate(ours)
    config = AdaptConfig(mode="vpt", prompts=4, deep=deep)
    before = cls(ours, images())
    adapt(ours.network, config)
    adapt(theirs.network, config, seed=9)
    train_a_little(ours.network)
    copy_added(ours.network, theirs.network)
    torch.testing.assert_close(cls(ours, images()), cls(theirs, images()), rtol=0, atol=1e-5)
    assert float((cls(ours, images()) - before).detach().abs().max()) > 0.01


# Training.


@pytest.mark.parametrize("mode", ["lora", "vpt", "full"])
@pytest.mark.parametrize("layout", ["fused", "separate", "dinov2"])
def test_checkpointing_leaves_gradients_equal(layout: str, mode: Any) -> None:
    """With dropout on: the same is dropped again on the way back."""
    grads = []
    for on in (False, True):
        backbone: Any = dinov2() if layout == "dinov2" else dinov3()
        backbone = separate(backbone) if layout == "separate" else backbone
        adapt(backbone.network, AdaptConfig(mode=mode, dropout=0.3))
        train_a_little(backbone.network)
        set_checkpointing(backbone.network, True)
        set_checkpointing(backbone.network, on)
        backbone.train()
        calls: list[int] = []
        first = next(m for m in backbone.network.modules() if isinstance(m, nn.LayerNorm))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(4)
        cls(backbone, images()).square().sum().backward()
        assert len(calls) == (2 if on else 1)
        grads.append({name: p.grad for name, p in backbone.network.named_parameters() if p.grad is not None})
    assert grads[0]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_mixed_precision_gives_float32_gradients_near_the_exact_ones() -> None:
    grads = []
    for on in (False, True):
        backbone = dinov3()
        adapt(backbone.network, AdaptConfig(dropout=0.0))
        train_a_little(backbone.network)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = cls(backbone, images()).float().square().sum()
        loss.backward()
        found = [p.grad for p in added_state(backbone.network).values()]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in found)
        grads.append(torch.cat([grad.flatten() for grad in found if grad is not None]))
    assert float(torch.cosine_similarity(*grads, dim=0)) > 0.99


def test_depths_are_timms() -> None:
    """timm's own layer-wise decay; it has the final norm with the last block, BEiT with the head, as here."""
    from timm.optim import param_groups_layer_decay

    for backbone in (dinov2(), dinov3()):
        network: Any = backbone.network
        adapt(network, AdaptConfig(mode="full"))
        groups = param_groups_layer_decay(network, layer_decay=0.7)
        theirs = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        found = list(depths(network))
        assert {id(p) for _, p, _ in found} == theirs.keys()
        for name, p, depth in found:
            expected = DEPTH + 1 if name.startswith("norm.") else depth
            assert depth == expected, name
            assert name.startswith("norm.") or 0.7 ** (DEPTH - depth) == pytest.approx(theirs[id(p)]), name
    stages = resnet().network
    adapt(stages, AdaptConfig(mode="full"))
    assert {(name.split(".")[0], depth) for name, _, depth in depths(stages)} == {
        ("conv1", 0), ("bn1", 0), ("layer1", 1), ("layer2", 2), ("layer3", 3), ("layer4", 4),
    }  # fmt: skip


# Bad input.


def test_what_a_network_cannot_have_is_refused() -> None:
    for config in (AdaptConfig(), AdaptConfig(mode="vpt")):
        with pytest.raises(ConfigError, match=r"ResNet is no vision transformer .* head, last or full"):
            adapt(resnet().network, config)
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        set_checkpointing(resnet().network, True)
    with pytest.raises(ConfigError, match="last 4 blocks are asked for; VisionTransformer has 3"):
        adapt(dinov2().network, AdaptConfig(mode="last", blocks=4))
    network = dinov2().network
    adapt(network, AdaptConfig())
    with pytest.raises(ConfigError, match="already"):
        adapt(network, AdaptConfig())
    prompted = dinov2().network
    adapt(prompted, AdaptConfig(mode="vpt"))
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge(prompted)
    with pytest.raises(ConfigError, match="no adapters"):
        merge(dinov2().network)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "lorra"}, "lora"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ("q", "o")}, "proj"),
        ({"targets": ()}, "one or more"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"alpha": 0.0}, "twice the rank"),
        ({"prompts": 0}, "prompts is 0"),
    ],
)
def test_bad_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptConfig(**values)
