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

BITS_16 = 2**16
Pair = tuple[int, Tensor, Tensor]
"""Which of the equal blocks of rows is adapted, its A (r, in) and its B (rows of the block, r)."""


class LowRank(nn.Module):
    """A frozen linear, to some equal blocks of whose rows (alpha / r) B A dropout(x) is added (equation 3).

    How A and B are stored, and so what they are called in a file, is up to those who inherit: they give `pairs`.
    One draw of dropout serves all blocks.

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
        self.blocks, self.rows, self.scale, self.dropout = parts, tuple(rows), scale, dropout

    def pairs(self) -> Iterable[Pair]:
        """Return what is added, a pair a block of `rows`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for tokens (..., in)."""
        out, pairs = self.base(x), list(self.pairs())
        given = x if torch.is_autocast_enabled(x.device.type) else x.to(pairs[0][1].dtype)
        scale = self.scale
        if self.training and self.dropout:
            kept, share = draw_kept(given, self.dropout)
            given, scale = given * kept, scale / share
        low = functional.linear(given, torch.cat([down for _, down, _ in pairs]))
        return out + functional.linear(low, self._spread(pairs, scale)).to(out.dtype)

    def _spread(self, pairs: Sequence[Pair], scale: float) -> Tensor:
        """Return scale B of every block of rows, (out, pairs * r): 0 where a block or another's A is meant."""
        height, rank = pairs[0][2].shape
        placed = {
            row: functional.pad(up * scale, (at * rank, (len(pairs) - 1 - at) * rank))
            for at, (row, _, up) in enumerate(pairs)
        }
        nothing = pairs[0][2].new_zeros(height, len(pairs) * rank)
        return torch.cat([placed.get(row, nothing) for row in range(self.blocks)])

    def merged(self) -> nn.Linear:
        """Return the linear with the adapters' products added to its rows, in place; this module is spent."""
        add_products(self.base.weight, self.pairs(), parts=self.blocks, scale=self.scale)
        return self.base


def draw_kept(x: Tensor, chance: float) -> tuple[Tensor, float]:
    """Return which numbers of x dropout keeps, bool like x, and the share that it keeps of many.

    On a CPU the draws are 16 bits each of torch's generator, several times faster than a number for each; the chance is
    rounded to 1/65,536.

    Args:
        x: any shape.
        chance: of each number to be lost, 0 to below 1.
    """
    if x.device.type != "cpu":
        return torch.rand(x.shape, device=x.device) >= chance, 1 - chance
    lost = round(chance * BITS_16)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return drawn.view(torch.int16)[: x.numel()].view(x.shape) >= lost - BITS_16 // 2, 1 - lost / BITS_16


@torch.no_grad()
def add_products(weight: Tensor, pairs: Iterable[Pair], *, parts: int, scale: float) -> None:
    """Add scale B A to blocks of rows of a weight (out, in), in place; computed in the type of A."""
    for row, down, up in pairs:
        block = weight.chunk(parts)[row]
        block.copy_(block.to(down.dtype) + scale * (up @ down))


def draw_down(matrix: Tensor) -> Tensor:
    """Fill an A (r, in) in place as peft and the authors' code do, uniform in +-1 / sqrt(in), and return it."""
    return nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
