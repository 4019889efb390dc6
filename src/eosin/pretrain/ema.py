"""The teacher: a moving average of the student."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eosin.errors import WeightsError

M = TypeVar("M", bound=nn.Module)
Pairs = tuple[list[Tensor], list[Tensor]]
"""The teacher's parameters and the student's, in one order."""


def make_teacher(student: M) -> M:
    """Return a copy of `student` of its own storage, in evaluation mode and without gradients.

    Make it before data-parallel wrapping and sharding, then shard both alike. A sharded teacher must be resharded after
    its forward (`reshard()`): what it gathered is not averaged, and would be used again.
    """
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher.eval()


def pair(teacher: nn.Module, student: nn.Module, *, trained: bool = False) -> Pairs:
    """Return the parameters that `update` averages, checked once; `trained`: those alone that the student trains.

    Raises:
        WeightsError: other names or shapes, another sharding, a teacher that shares the student's memory, or
            one in half precision, where an average of momentum 0.999 no longer moves.
    """
    ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    if ours.keys() != theirs.keys():
        only = sorted(ours.keys() ^ theirs.keys())
        raise WeightsError(f"teacher and student differ in {len(only)} parameters: {', '.join(only[:8])}")
    for name, average in ours.items():
        current = theirs[name]
        if average.shape != current.shape:
            raise WeightsError(
                f"{name} is {tuple(average.shape)} in the teacher, {tuple(current.shape)} in the student"
            )
        if average.dtype not in (torch.float32, torch.float64):
            raise WeightsError(f"{name} of the teacher is {average.dtype}; its moving average needs torch.float32")
        if _placed(average) != _placed(current):
            raise WeightsError(f"{name} is sharded one way in the teacher and another in the student")
        if _local(average).data_ptr() == _local(current).data_ptr() and _local(average).numel():
            raise WeightsError(f"{name} of the teacher is the student's own tensor; make the teacher with make_teacher")
    names = [name for name in ours if theirs[name].requires_grad or not trained]
    return [_local(ours[name]) for name in names], [_local(theirs[name]) for name in names]


@torch.no_grad()
def update(pairs: Pairs, *, momentum: float) -> None:
    """Move every teacher parameter to momentum * teacher + (1 - momentum) * student, all in one fused call.

    Args:
        pairs: from `pair`; sharded parameters are averaged shard by shard.
        momentum: 0-1, `StepValues.momentum`.

    Raises:
        ValueError: momentum outside 0-1.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}; it must be from 0 to 1")
    teacher, student = pairs
    torch._foreach_lerp_(teacher, student, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a parameter; detached, of the same memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _placed(tensor: Tensor) -> object:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
