"""Which parameters learn at which share of the learning rate, and which have no weight decay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from eosin.pretrain.model import VisionTransformer
from eosin.pretrain.schedules import StepValues

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"(pos_embed|patch_embed|mask_token|cls_token|register_tokens)\b")


def layer_of(name: str, depth: int) -> int:
    """Return the layer of an encoder's parameter: 0 tokens, positions and patch embedding, i + 1 block i, else the top.

    The top, depth + 1, holds the final norm (as DINOv2's `get_vit_lr_decay_rate`).
    """
    if _EMBEDDING.match(name):
        return 0
    block = _BLOCK.match(name)
    return int(block.group(1)) + 1 if block else depth + 1


def decays(name: str) -> bool:
    """Return whether a parameter has weight decay: not biases, norms and LayerScale; tokens and positions have it."""
    return not (name.endswith("bias") or "norm" in name or "gamma" in name)


def parameter_groups(
    encoder: VisionTransformer,
    heads: Mapping[str, nn.Module],
    *,
    layer_decay: float = 1.0,
    patch_embed_multiplier: float = 0.2,
) -> list[dict[str, Any]]:
    """Return the groups of an optimiser: every trainable parameter once, those that are treated alike together.

    The learning rate of layer l of an encoder with L blocks is multiplied by layer_decay ** (L + 1 - l); that of the
    patch embedding by `patch_embed_multiplier` too. Each group has `params` as (name, parameter), `lr_multiplier`,
    `wd_multiplier` and `last_layer`, which `apply_values` reads.

    Args:
        encoder: the student's encoder.
        heads: the student's heads by name; they learn at the full rate.
        layer_decay: 0-1; 1 treats all layers alike.
        patch_embed_multiplier: 0.2 in all DINOv2 and DINOv3 recipes.

    Raises:
        ValueError: a multiplier that is not positive, or one parameter under two names.
    """
    if not 0 < layer_decay <= 1 or patch_embed_multiplier <= 0:
        raise ValueError(
            f"layer_decay is {layer_decay} and patch_embed_multiplier {patch_embed_multiplier}; needed 0 < layer_decay "
            "<= 1 and a multiplier above 0"
        )
    depth = len(encoder.blocks)
    groups: dict[tuple[float, float, bool], list[tuple[str, nn.Parameter]]] = {}
    owner: dict[int, str] = {}
    for part, module in {"encoder": encoder, **heads}.items():
        for name, parameter in module.named_parameters():
            full = f"{part}.{name}"
            if id(parameter) in owner:
                raise ValueError(f"{full} is also {owner[id(parameter)]}: give a shared head once")
            owner[id(parameter)] = full
            if not parameter.requires_grad:
                continue
            rate = 1.0
            if module is encoder:
                rate = layer_decay ** (depth + 1 - layer_of(name, depth))
                rate *= patch_embed_multiplier if name.startswith("patch_embed") else 1.0
            key = (rate, float(decays(name)), module is not encoder and "last_layer" in name)
            groups.setdefault(key, []).append((full, parameter))
    return [
        {"params": members, "lr_multiplier": rate, "wd_multiplier": decay, "last_layer": last}
        for (rate, decay, last), members in groups.items()
    ]


def apply_values(optimizer: Optimizer, values: StepValues) -> None:
    """Set the learning rate and weight decay of every group of `parameter_groups` to those of this step."""
    for group in optimizer.param_groups:
        rate = values.last_layer_lr if group["last_layer"] else values.lr
        group["lr"] = rate * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["wd_multiplier"]
