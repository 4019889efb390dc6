"""Several ranks: a process group from torchrun's environment, and data-parallel or sharded modules."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from eosin.errors import ConfigError
from eosin.pretrain.ranks import world_size


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


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set on any rank; every rank calls it."""
    if world_size() == 1:
        return flag
    told = torch.tensor(float(flag), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told.item())
