"""Checkpoints that are whole or not there, and a resume that restores everything or refuses.

A checkpoint is a folder `step-00001000`: `checkpoint.json` (step, config, budget, optimiser groups, and the name, shape
and type of every tensor) and the tensors, as one safetensors file, or as `torch.distributed.checkpoint` writes them
when a process group is up. It is written under another name, synchronised to disk and renamed, so that a run killed at
any moment leaves the one before as it was. Either kind is read by any number of ranks. The second kind holds pickles,
as torch makes them: load your own, and take a stranger's weights as safetensors.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from eosin.encoders.ranks import rank, world_size
from eosin.errors import CheckpointError, NonFiniteError, WeightsError
from eosin.features.recipe import plain
from eosin.features.writer import fsync_folder
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.schedules import Budget
from eosin.pretrain.tables import differences

log = logging.getLogger(__name__)

VERSION = 1
_ABOUT = "checkpoint.json"
_FILE = "tensors.safetensors"
_SHARDS = "shards"
_UNFINISHED, _DELETED = ".unfinished-", ".deleted-"


@runtime_checkable
class Scaler(Protocol):
    """What has numbers to keep, such as a `GradScaler`: a state of plain JSON types."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take a state back."""
        ...


Part = nn.Module | Optimizer | torch.Generator | Scaler
"""One thing a run consists of; modules, one optimiser of their parameters, generators, scalers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What came back beside the parts.

    Attributes:
        step: optimiser steps made.
        budget: of the run, with hours already turned into steps.
        ranks: that wrote the checkpoint.
        exact: whether as many ranks on the same kind of device wrote it, so that random states came back and the run
            goes on bit by bit. Else parameters, moments and schedules are exact, and generators are as they were given.
    """

    step: int
    budget: Budget
    ranks: int
    exact: bool


def save_checkpoint(
    folder: Path, parts: Mapping[str, Part], *, step: int, config: PretrainConfig, budget: Budget, keep: int = 2
) -> Path:
    """Write a checkpoint of `parts` after optimiser step `step`, keep the newest `keep`, return its path.

    Every rank calls it; torch's global generators (CPU and the current CUDA device) are saved with the parts, those of
    every rank.

    Args:
        folder: of the run's checkpoints, on a disk that all ranks share.
        parts: by name: student, teacher and heads as modules without wrappers of their own, the optimiser, generators,
            a gradient scaler.
        step: optimiser steps made.
        config: of the run.
        budget: of the run.
        keep: checkpoints to keep, this one counted.

    Raises:
        CheckpointError: there is one of this step already, or the disk refuses.
        NonFiniteError: NaN or infinity in a parameter: the checkpoint before stays the newest.
        WeightsError: an optimiser of parameters that are in no module, or two modules with the same tensor.
    """
    tensors = {name: t.detach() for name, t in _tensors(parts).items()}
    _check_apart(tensors)
    broken = _of_all_ranks([name for name, t in tensors.items() if not _is_finite(t)])
    if broken:
        raise NonFiniteError(f"step {step} is not saved: NaN or infinity in {len(broken)} tensors: {_list(broken)}")
    states = _random_states(parts)
    about = {
        "version": VERSION,
        "step": step,
        "ranks": world_size(),
        "hash": config.hash,
        "config": config.identity(),
        "budget": asdict(budget),
        "groups": {name: _groups(part, parts) for name, part in parts.items() if isinstance(part, Optimizer)},
        "scalers": {name: scaler.state_dict() for name, scaler in _scalers(parts).items()},
        "tensors": {name: _form(t) for name, t in tensors.items()},
        "random": _random_forms(states),
    }
    target = folder / f"step-{step:08d}"
    unfinished = folder / f"{_UNFINISHED}{target.name}"
    if target.exists():
        raise CheckpointError(
            f"{target} is there already; resume from the newest checkpoint, or write to another folder"
        )
    try:
        _on_first_rank(lambda: _prepare(folder, unfinished))
        _write(unfinished, {**tensors, **states})
        _on_first_rank(lambda: _finish(unfinished, target, about, keep))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{target} cannot be written: {error}; the checkpoint before it is whole") from error
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    found = [path for path in folder.glob("step-*") if (path / _ABOUT).is_file()]
    return max(found, key=lambda path: path.name, default=None)


def load_checkpoint(path: Path, parts: Mapping[str, Part], *, config: PretrainConfig) -> Restored:
    """Put a checkpoint back into `parts`, all of it, and return where the run stands.

    Nothing is changed unless every name, shape and type fits. Every rank calls it, with the parts `save_checkpoint` was
    given, sharded as they are now.

    Args:
        path: of one checkpoint, as `latest_checkpoint` gives it.
        parts: as in `save_checkpoint`, newly built.
        config: of the resumed run; it must have the same `identity`.

    Raises:
        CheckpointError: not a checkpoint, damaged, or of a run with another config (the fields are named).
        WeightsError: tensors missing, unexpected, or of another shape or type.
    """
    about = _read_about(path)
    if about["hash"] != config.hash:
        changed = differences(about["config"], plain(config.identity()))
        raise CheckpointError(
            f"{path.name} is of another run: {'; '.join(changed)}; take the old values, or start anew in another folder"
        )
    _check_parts(path, about, parts)
    states = _random_states(parts)
    same = about["ranks"] == world_size() and about["random"] == _random_forms(states)
    if not same:
        log.warning("%s is of %d ranks, these are %d: random states are new", path, about["ranks"], world_size())
        states = {}
    moments = _new_moments(about, parts)
    wanted = {**_module_tensors(parts), **{f"{n}/{key}": t for n, state in moments.items() for key, t in state.items()}}
    _check_tensors(path, about["tensors"], wanted)
    _read(path, {**wanted, **states})
    _restore(parts, about, moments)
    _set_random_states(parts, states)
    return Restored(step=about["step"], budget=Budget(**about["budget"]), ranks=about["ranks"], exact=same)


def read_part(path: Path, start: str) -> dict[str, Tensor]:
    """Return the whole tensors of a checkpoint whose names begin with `start`, under the rest of their names.

    Args:
        path: of one checkpoint.
        start: such as "teacher/dino.".

    Raises:
        CheckpointError: not a checkpoint, or damaged.
    """
    forms = {name: form for name, form in _read_about(path)["tensors"].items() if name.startswith(start)}
    tensors = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in forms.items()}
    if tensors:
        _read(path, tensors)
    return {name.removeprefix(start): tensor for name, tensor in tensors.items()}


# What is saved.


def _scalers(parts: Mapping[str, Part]) -> dict[str, Scaler]:
    others = (nn.Module, Optimizer, torch.Generator)
    return {n: part for n, part in parts.items() if isinstance(part, Scaler) and not isinstance(part, others)}


def _plain(module: nn.Module) -> nn.Module:
    """Return a module without the wrapper that data-parallel training or compilation puts around it."""
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")
        else:
            return module


def _module_tensors(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Return parameters and buffers by part and name; changing them changes the modules."""
    modules = {name: _plain(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    return {f"{part}/{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}


def _tensors(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Return `_module_tensors` and the optimiser's moments."""
    found = _module_tensors(parts)
    for part, optimizer in parts.items():
        if isinstance(optimizer, Optimizer):
            names = _names(optimizer, parts)
            for parameter, state in optimizer.state.items():
                found |= {f"{part}/{names[parameter]}/{key}": torch.as_tensor(t) for key, t in state.items()}
    return found


def _names(optimizer: Optimizer, parts: Mapping[str, Part]) -> dict[Tensor, str]:
    """Return the name of every parameter of an optimiser."""
    modules = {name: _plain(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    names: dict[Tensor, str] = {}
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            names.setdefault(parameter, f"{part}.{name}")
    members = [p for group in optimizer.param_groups for p in group["params"]]
    unknown = [tuple(p.shape) for p in members if p not in names]
    if unknown:
        raise WeightsError(f"the optimiser has {len(unknown)} parameters of none of the parts, of shapes {unknown[:4]}")
    return {p: names[p] for p in members}


def _groups(optimizer: Optimizer, parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """Return the optimiser's groups: settings, and names of the parameters."""
    names = _names(optimizer, parts)
    groups = []
    for group in optimizer.param_groups:
        settings = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k not in _NOT_SAVED}
        groups.append({**settings, "names": [names[p] for p in group["params"]]})
    return groups


_NOT_SAVED = ("params", "param_names", "fused", "foreach", "capturable", "differentiable")
"""Of a group: its members, which are saved by name, and how this machine computes."""


def _random_states(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Return the states of torch's generators and of those among the parts, named by this rank."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {name: part.get_state() for name, part in parts.items() if isinstance(part, torch.Generator)}
    return {f"random/{rank()}/{name}": state for name, state in states.items()}


def _form(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not local.is_floating_point() or bool(local.isfinite().all())


def _random_forms(states: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return the names and shapes of random states, without the rank."""
    return {name.split("/", maxsplit=2)[2]: _form(state) for name, state in states.items()}


def _check_apart(tensors: Mapping[str, Tensor]) -> None:
    """Refuse two names for one tensor: a teacher that is its student, or a shared head given twice."""
    owner: dict[int, str] = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel() and (first := owner.setdefault(local.data_ptr(), name)) != name:
            raise WeightsError(f"{name} is {first} itself; give a shared head once, make the teacher with make_teacher")


def _of_all_ranks(names: list[str]) -> list[str]:
    """Return the names that any rank gives, so that all ranks go the same way."""
    if not dist.is_initialized():
        return names
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, names)
    return sorted({name for each in lists for name in each})


# Writing.


def _on_first_rank(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait; what the disk refuses there is raised on every rank."""
    error: OSError | None = None
    if rank() == 0:
        try:
            action()
        except OSError as refused:
            error = refused
    if dist.is_initialized():
        told: list[Any] = [None if error is None else str(error)]
        dist.broadcast_object_list(told, src=0)
        if rank() != 0 and told[0] is not None:
            error = OSError(told[0])
    if error is not None:
        raise error


def _prepare(folder: Path, unfinished: Path) -> None:
    """Make the folder, and remove what an earlier run was killed in."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_DELETED}*")):
        shutil.rmtree(left)
    unfinished.mkdir()


def _write(unfinished: Path, tensors: dict[str, Tensor]) -> None:
    if dist.is_initialized():
        save_shards(tensors, checkpoint_id=unfinished / _SHARDS)
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished / _FILE)


def _finish(unfinished: Path, target: Path, about: dict[str, Any], keep: int) -> None:
    """Synchronise and rename; put the oldest aside by a rename too, so that none is ever half there."""
    files = sorted(p for p in unfinished.rglob("*") if p.is_file())
    about = {**about, "files": {p.relative_to(unfinished).as_posix(): p.stat().st_size for p in files}}
    (unfinished / _ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    for path in (*files, unfinished / _ABOUT):
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
    for path in (unfinished / _SHARDS, unfinished):
        if path.is_dir():
            fsync_folder(path)
    unfinished.replace(target)
    fsync_folder(target.parent)
    for old in sorted(p for p in target.parent.glob("step-*") if p.name <= target.name)[:-keep]:
        aside = old.with_name(f"{_DELETED}{old.name}")
        old.replace(aside)
        shutil.rmtree(aside)


# Reading.


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is no checkpoint: {_ABOUT} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path / _ABOUT} is damaged ({error}); resume from the checkpoint before") from error
    if about.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {about.get('version')}, this eosin reads {VERSION}")
    for name, size in about["files"].items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise CheckpointError(f"{path / name} has {found} bytes, {size} were written; take the checkpoint before")
    return about


def _check_parts(path: Path, about: dict[str, Any], parts: Mapping[str, Part]) -> None:
    """Refuse optimisers, scalers and generators that are on one side only, or optimisers with other groups."""
    for kind, saved, found in (
        ("optimisers", about["groups"], [name for name, part in parts.items() if isinstance(part, Optimizer)]),
        ("scalers", about["scalers"], _scalers(parts)),
        (
            "generators",
            about["random"].keys() - {"torch", "cuda"},
            [name for name, part in parts.items() if isinstance(part, torch.Generator)],
        ),
    ):
        if set(saved) != set(found):
            raise WeightsError(f"{path.name} has the {kind} {sorted(saved)}, the run has {sorted(found)}")
    for name, groups in about["groups"].items():
        optimizer = parts[name]
        assert isinstance(optimizer, Optimizer)
        now = [sorted(group["names"]) for group in _groups(optimizer, parts)]
        if now != [sorted(group["names"]) for group in groups]:
            raise WeightsError(f"{path.name}: the groups of {name} hold other parameters than those of the run")


def _new_moments(about: dict[str, Any], parts: Mapping[str, Part]) -> dict[str, dict[str, Tensor]]:
    """Return empty tensors for the saved moments of each optimiser, like their parameters where of one shape."""
    moments: dict[str, dict[str, Tensor]] = {}
    for part, optimizer in parts.items():
        if not isinstance(optimizer, Optimizer):
            continue
        by_name = {name: p for p, name in _names(optimizer, parts).items()}
        fused = {p for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
        moments[part] = {}
        for key, (shape, kind) in about["tensors"].items():
            owner, _, rest = key.partition("/")
            name, _, slot = rest.rpartition("/")
            if owner != part or name not in by_name:
                continue
            dtype, parameter = getattr(torch, kind), by_name[name]
            if list(parameter.shape) == shape and slot != "step":
                new = torch.zeros_like(parameter, dtype=dtype).detach()
            else:  # a count of steps lies on the CPU unless the kernel that reads it is on the device
                here = slot != "step" or parameter in fused
                new = torch.zeros(shape, dtype=dtype, device=parameter.device if here else "cpu")
            moments[part][rest] = new
    return moments


def _check_tensors(path: Path, saved: dict[str, list[Any]], wanted: Mapping[str, Tensor]) -> None:
    """Refuse anything but the same names, shapes and types."""
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    other = [
        f"{name} is {saved[name]}, needed {_form(t)}" for name, t in wanted.items()
        if name in saved and saved[name] != _form(t)
    ]  # fmt: skip
    if missing or unexpected or other:
        raise WeightsError(
            f"{path.name} does not fit the run: {len(missing)} missing ({_list(missing)}), {len(unexpected)} "
            f"unexpected ({_list(unexpected)}), {len(other)} of another shape or type ({_list(other)})"
        )


def _read(path: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors, sharded or whole, in place."""
    with torch.no_grad():
        if (path / _SHARDS).is_dir():
            tensors = {name: t.detach() for name, t in into.items()}
            with warnings.catch_warnings():  # torch tells that it reads alone, also when asked to
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                load_shards(tensors, checkpoint_id=path / _SHARDS, no_dist=not dist.is_initialized())
            return
        try:
            whole = load_file(path / _FILE)
        except SafetensorError as error:
            raise CheckpointError(f"{path / _FILE} is damaged ({error}); take the checkpoint before") from error
        for name, tensor in into.items():
            value = whole[name].to(tensor.device)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)


def _restore(parts: Mapping[str, Part], about: dict[str, Any], moments: dict[str, dict[str, Tensor]]) -> None:
    """Give the optimisers their moments and settings, and the scalers their states."""
    for name, scaler in _scalers(parts).items():
        scaler.load_state_dict(about["scalers"][name])
    for part, optimizer in parts.items():
        if not isinstance(optimizer, Optimizer):
            continue
        optimizer.state.clear()
        for parameter, name in _names(optimizer, parts).items():
            of = {key.rpartition("/")[2]: t for key, t in moments[part].items() if key.rpartition("/")[0] == name}
            if of:
                optimizer.state[parameter] = of
        for group, saved in zip(optimizer.param_groups, about["groups"][part], strict=True):
            for key, value in saved.items():
                if key != "names":
                    _set(group, key, value)


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = tuple(value) if isinstance(value, list) else value


def _set_random_states(parts: Mapping[str, Part], states: dict[str, Tensor]) -> None:
    for name, state in states.items():
        owner = name.split("/", maxsplit=2)[2]
        generator = parts.get(owner)
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif owner == "cuda":
            torch.cuda.set_rng_state(state)
        else:
            torch.set_rng_state(state)


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "none"
