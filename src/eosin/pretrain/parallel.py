"""Modules over several ranks: data-parallel or sharded."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from eosin.encoders.ranks import world_size


def shard(module: nn.Module, device: torch.device) -> None:
    """Share the parameters of a module over all ranks (FSDP2), block by block; in place.

    Every rank must hold the same values. Parameters stay float32, as the moving average and AdamW need them; autocast
    does the rest.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of every vision transformer in a module, our own and timm's."""
    parents = [part for part in module.modules() if isinstance(getattr(part, "blocks", None), nn.Module)]
    return [block for parent in parents for block in parent.get_submodule("blocks").children()]


def data_parallel(module: nn.Module) -> nn.Module:
    """Return a module whose gradients are averaged over the ranks; the module itself without a process group."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def without_sync(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which gradients are kept on their rank, unless it is the last micro-step of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def put_away(module: nn.Module) -> None:
    """Drop what a sharded module gathered for a forward pass that no backward pass follows."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Return the complete weights of a module that may be sharded; every rank calls it."""
    if any(isinstance(p, DTensor) for p in module.parameters()):
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return module.state_dict()


def clip(module: nn.Module, most: float) -> Tensor:
    """Return the norm of a module's gradient, over all ranks' shards, after scaling it down to `most` (0: not)."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), most or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
