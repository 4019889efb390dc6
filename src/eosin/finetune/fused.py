"""Low-rank adapters on queries, keys or values that are rows of one linear, as timm has them.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds (alpha / r) B A x to W x. peft wraps whole linears: on a fused `qkv` its
A is shared by queries, keys and values, which is another model than adapters on queries and values alone. These lines
adapt some thirds of the rows, each with an A and a B of its own, as peft does where the three are linears of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eosin.encoders.lora import LowRank, Pair, draw_down
from eosin.errors import ConfigError

THIRDS = ("q", "k", "v")
"""What the rows of a fused linear are, in order."""


class FusedLora(LowRank):
    """A frozen linear of queries, keys and values, to some thirds of whose rows (alpha / r) B A dropout(x) is added.

    B starts at zero, so that at the start this is the linear itself; A is uniform, as peft draws it. A and B are
    float32, whatever the linear is, so that they can be trained beside a base in bfloat16. One draw of dropout serves
    all thirds.

    Args:
        base: the linear, (3 W, D); it takes no gradient from now on.
        parts: which thirds are adapted.
        rank: r.
        alpha: the adapters' output counts alpha / r.
        dropout: of their input.
    """

    def __init__(self, base: nn.Linear, *, parts: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
        if base.out_features % 3:
            raise ConfigError(f"a fused linear of {base.out_features} rows does not fall into queries, keys and values")
        found = tuple(part for part in THIRDS if part in parts)
        rows = [THIRDS.index(part) for part in found]
        super().__init__(base, parts=3, rows=rows, scale=alpha / rank, dropout=dropout)
        self.parts = found
        # Drawn on the CPU, so that one seed gives the same adapters on every device.
        drawn = {part: draw_down(torch.empty(rank, base.in_features)) for part in found}
        where, width = base.weight.device, base.out_features // 3
        self.down = nn.ParameterDict({part: nn.Parameter(a.to(where)) for part, a in drawn.items()})
        self.up = nn.ParameterDict({part: nn.Parameter(torch.zeros(width, rank, device=where)) for part in found})

    def pairs(self) -> list[Pair]:
        """Return third, A and B of each that is adapted."""
        return [(row, self.down[part], self.up[part]) for row, part in zip(self.rows, self.parts, strict=True)]


def add_fused(attention: nn.Module, *, parts: Sequence[str], rank: int, alpha: float, dropout: float) -> FusedLora:
    """Give an attention with a fused `qkv` adapters, in place.

    timm's EVA attention (DINOv3 with biases) reads the weight of `qkv` and never calls it, so that adapters there would
    be silently without effect: it is told to add its biases apart, which calls it.

    Raises:
        ConfigError: queries, keys and values are not thirds of the linear.
    """
    found: Any = attention
    heads = getattr(found, "num_heads", None)
    if getattr(found, "num_kv_heads", heads) != heads:
        raise ConfigError(
            f"the attention has {heads} heads of queries and {found.num_kv_heads} of keys and values in one linear; "
            "adapters need as many of each: choose the targets proj and mlp, or another mode"
        )
    found.qkv = FusedLora(found.qkv, parts=parts, rank=rank, alpha=alpha, dropout=dropout)
    if getattr(found, "q_bias", None) is not None:
        found.qkv.biases_were_apart = found.qkv_bias_separate
        found.qkv_bias_separate = True
    return found.qkv


def merge_fused(attention: nn.Module) -> None:
    """Put the plain linear back into an attention, with its adapters added to its weight."""
    found: Any = attention
    adapters: Any = found.qkv
    if getattr(found, "q_bias", None) is not None:
        found.qkv_bias_separate = adapters.biases_were_apart
    found.qkv = adapters.merged()
