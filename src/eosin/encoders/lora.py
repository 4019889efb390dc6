"""The layer of low-rank adapters that fine-tuning and pretraining share (LoRA, Hu et al. 2021, arXiv 2106.09685).

peft wraps whole linears. Queries, keys and values are often rows of one linear, of which some are adapted: an A shared
by all of them would be another model. So these lines are our own; peft is what the tests hold them against.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[int, Tensor, Tensor]
"""Which of the equal blocks of rows is adapted, its A (r, in) and its B (rows of the block, r)."""


class LowRank(nn.Module):
    """A frozen linear, to some equal blocks of whose rows (alpha / r) B A dropout(x) is added (equation 3).

    How A and B are stored, and so what they are called in a file, is up to those who inherit: they give `pairs`.
    Dropout is drawn for each block apart, in the order of the rows, as linears of their own would.

    Args:
        base: the linear; it takes no gradient from now on.
        parts: equal blocks its rows fall into.
        rows: which of them are adapted, in order.
        scale: alpha / r.
        dropout: of the adapters' input.
    """

    def __init__(self, base: nn.Linear, *, parts: int, rows: Sequence[int], scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.blocks, self.rows, self.scale = parts, tuple(rows), scale
        self.dropout = nn.Dropout(dropout)

    def pairs(self) -> Iterable[Pair]:
        """Return what is added, a pair a block of `rows`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for tokens (..., in)."""
        out = self.base(x)
        height = out.shape[-1] // self.blocks
        for row, down, up in self.pairs():
            low = functional.linear(self.dropout(x.to(down.dtype)), down)
            out.narrow(-1, row * height, height).add_(functional.linear(low, up) * self.scale)
        return out

    def merged(self) -> nn.Linear:
        """Return the linear with the adapters' products added to its rows, in place; this module is spent."""
        add_products(self.base.weight, self.pairs(), parts=self.blocks, scale=self.scale)
        return self.base


@torch.no_grad()
def add_products(weight: Tensor, pairs: Iterable[Pair], *, parts: int, scale: float) -> None:
    """Add scale B A to blocks of rows of a weight (out, in), in place; computed in the type of A."""
    for row, down, up in pairs:
        block = weight.chunk(parts)[row]
        block.copy_(block.to(down.dtype) + scale * (up @ down))


def draw_down(matrix: Tensor) -> Tensor:
    """Fill an A (r, in) in place as peft and the authors' code do, uniform in +-1 / sqrt(in), and return it."""
    return nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
