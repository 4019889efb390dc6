"""Small seeded networks: DINOv3 and DINOv2 of timm, the same weights in transformers, and a small ResNet."""

from __future__ import annotations

from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from eosin.encoders.checkpoints import hash_weights
from eosin.encoders.export import from_timm
from eosin.encoders.network import Backbone, build_network
from eosin.encoders.spec import EncoderSpec
from eosin.finetune.adapters import added_state
from eosin.finetune.classifier import TransformersBackbone

WIDTH, DEPTH, HEADS, SIDE = 32, 3, 2, 32


def stir(network: nn.Module, seed: int) -> None:
    """Give every parameter a value that matters."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
            grows = "gamma" in name or ("norm" in name and name.endswith("weight"))
            parameter.copy_(1 + 0.1 * drawn if grows else scale * drawn)


def dinov3(*, seed: int = 0, bias: bool = True, gated: bool = False) -> Backbone:
    args: dict[str, Any] = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "qkv_bias": bias}
    arch = "vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3"
    return _backbone(arch, args | {"patch_size": 8}, seed=seed, interpolation="rope", registers=4)


def dinov2(*, seed: int = 0) -> Backbone:
    args = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "patch_size": 8, "init_values": 1.0}
    return _backbone("vit_small_patch14_dinov2", args, seed=seed, interpolation="bicubic-offset0.1", registers=0)


def _backbone(arch: str, args: dict[str, Any], *, seed: int, interpolation: Any, registers: int) -> Backbone:
    network = build_network(arch, args, img_size=None if interpolation == "rope" else 2 * SIDE)
    stir(network, seed)
    network.eval().requires_grad_(False)
    spec = EncoderSpec(
        name=f"{arch}@{seed}", dim=WIDTH, patch_px=8, input_px=SIDE, native_px=2 * SIDE, source=f"random:{seed}",
        interpolation=interpolation, registers=registers, arch=arch, weights_hash=hash_weights(network),
    )  # fmt: skip
    return Backbone(network, spec)


def resnet(*, seed: int = 0) -> Backbone:
    network = timm.create_model("resnet10t", pretrained=False, num_classes=0, channels=(8, 8, 16, WIDTH))
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else parameter.data.add_(0.1 * len(name) / 100)
    network.eval().requires_grad_(False)
    spec = EncoderSpec(
        name=f"resnet@{seed}", dim=network.num_features, patch_px=32, input_px=SIDE, source=f"random:{seed}",
        pooling="mean", interpolation="none", native_px=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        weights_hash=hash_weights(network),
    )  # fmt: skip
    return Backbone(network, spec)


def separate(backbone: Backbone) -> TransformersBackbone:
    """The weights of `dinov3` in transformers, with queries, keys and values apart."""
    state = from_timm(backbone.network.state_dict(), "hf-dinov3", head_dim=WIDTH // HEADS)
    gated = any("gate_proj" in key for key in state)
    config = transformers.DINOv3ViTConfig(
        patch_size=8, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, num_register_tokens=4,
        intermediate_size=state["layer.0.mlp.down_proj.weight"].shape[1], use_gated_mlp=gated, image_size=SIDE,
        hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    model = transformers.DINOv3ViTModel(config)
    renamed = {
        key.replace("layer.", "model.layer.", 1) if key.startswith("layer.") else key: v for key, v in state.items()
    }
    model.load_state_dict(renamed | {"rope_embeddings.inv_freq": model.rope_embeddings.inv_freq}, strict=False)
    absent = model.state_dict().keys() - renamed.keys()
    assert all("inv_freq" in key for key in absent), absent
    return TransformersBackbone(model.eval().requires_grad_(False), name=backbone.spec.name)


def images(seed: int = 0, *, count: int = 3, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def train_a_little(network: nn.Module, seed: int = 1) -> None:
    """Give adapters and prompts values as after training."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in added_state(network).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))


def copy_added(source: nn.Module, target: nn.Module) -> None:
    """Give one network the adapters or prompts of another, whatever the layout."""
    theirs, ours = added_state(source), added_state(target)
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
