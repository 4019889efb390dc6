"""Faster training of a model most of which does not train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

from eosin.encoders.network import SHORT_SEQUENCE
from eosin.finetune.infer import Input
from eosin.finetune.saving import Model


@contextlib.contextmanager
def quicker(model: Model, how: Input, *, device: str, precision: str) -> Iterator[None]:
    """Let a model train faster for a while, in bfloat16, by what changes rounding only.

    Linears that do not train are kept in bfloat16, which autocast would round them to at every step, with timm's layer
    scale of their outputs multiplied in. On a CPU timm's attentions are plain products where sequences are short:
    torch's fused backward takes 2 to 8 times as long there.
    """
    if precision != "bf16":
        yield
        return
    before: list[tuple[Any, str, Any]] = []

    def put(where: Any, name: str, value: Any) -> None:
        before.append((where, name, getattr(where, name)))
        setattr(where, name, value)

    patches = max((how.side_px / (one.spec.patch_px or how.side_px)) ** 2 for one in model.branches)
    plain = torch.device(device).type == "cpu" and patches <= SHORT_SEQUENCE
    try:
        for module in list(model.modules()):
            if plain and getattr(module, "fused_attn", False):
                put(module, "fused_attn", False)
            for name, gamma, linear in _scaled(module):
                put(linear.weight, "data", linear.weight.data * gamma[:, None])
                if linear.bias is not None:
                    put(linear.bias, "data", linear.bias.data * gamma)
                put(module, name, nn.Identity())
        for module in model.modules():
            if isinstance(module, nn.Linear) and not _trains(module):
                for parameter in module.parameters():
                    put(parameter, "data", parameter.data.bfloat16())
        yield
    finally:
        for where, name, value in reversed(before):
            setattr(where, name, value)


def _scaled(module: nn.Module) -> Iterator[tuple[str, Tensor, nn.Linear]]:
    """Yield name and factors of the layer scales of a block of timm's, and the linear before, where neither trains."""
    found: Any = module
    for name, path in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
        scale, (parent, leaf) = getattr(found, name, None), path.split(".")
        linear = getattr(getattr(found, parent, None), leaf, None)
        if isinstance(scale, LayerScale) and isinstance(linear, nn.Linear) and not (_trains(scale) or _trains(linear)):
            yield name, scale.gamma.data, linear


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
