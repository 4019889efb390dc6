"""What the ranks of one training run share: reductions and rows, and nothing at all when there is one process.

DistributedDataParallel averages gradients over the ranks. A loss here is therefore the mean over the rank's own rows,
and its mean over the ranks (and the averaged gradient) is that of one process holding every row.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Op = Literal["sum", "max"]


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in `group` (None: all); 1 without a process group."""
    return dist.get_world_size(group) if _distributed() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in `group` (None: all); 0 without a process group."""
    return dist.get_rank(group) if _distributed() else 0


def all_reduce_(tensor: Tensor, op: Op = "sum", group: dist.ProcessGroup | None = None) -> Tensor:
    """Reduce `tensor` over the ranks in place and return it; the identity without a process group. No gradient."""
    if _distributed():
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group)
    return tensor


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the rows (b, D) of every rank, in rank order, as (ranks * b, D), with their gradient.

    Every rank must hold the same b. The gradient of a rank's rows is the sum of what all ranks' losses ask of them.
    """
    return _GatherRows.apply(rows, group) if world_size(group) > 1 else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.count = group, len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = all_reduce_(grads[0].clone(memory_format=torch.contiguous_format), "sum", ctx.group)
        return grad.narrow(0, rank(ctx.group) * ctx.count, ctx.count), None


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
