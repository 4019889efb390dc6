"""What the ranks of one training run share: a process group, reductions and rows; nothing when there is one process.

DistributedDataParallel averages gradients over the ranks. A loss here is therefore the mean over the rank's own rows,
and its mean over the ranks (and the averaged gradient) is that of one process holding every row.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from eosin.errors import ConfigError

Op = Literal["sum", "max"]


@contextlib.contextmanager
def on_ranks(device: str) -> Iterator[torch.device]:
    """Yield this rank's device; under torchrun with a process group (NCCL on GPUs, gloo on CPUs) around the block.

    Args:
        device: "auto" (cuda when there is one), "cpu", "cuda", "cuda:1" ...

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but torch sees no GPU; use --device cpu")
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many and kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    found = torch.device(kind)
    if found.type == "cuda":
        found = torch.device("cuda", found.index or 0)
        torch.cuda.set_device(found)
    mine = many and not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield found
    finally:
        if mine:
            dist.destroy_process_group()


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


def wait_for_all() -> None:
    """Return when every rank has come here; at once without a process group."""
    if _distributed():
        dist.barrier()


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in place; every rank must hold those of the same parameters."""
    if world_size() == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole = all_reduce_(torch.cat([grad.flatten() for grad in grads]))
    for grad, part in zip(grads, whole.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on any rank; every rank calls it."""
    if world_size() == 1:
        return flag
    return bool(all_reduce_(torch.tensor(float(flag), device=device), "max"))


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
