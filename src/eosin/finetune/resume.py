"""The state of a fold in training: one file, whole or not there, from which it goes on bit by bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from eosin.errors import CheckpointError, NonFiniteError
from eosin.features.writer import replace_durably

ABOUT = "eosin_finetune_state"


def save_state(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what they are; an interrupted save leaves the file that was there.

    Args:
        path: the file.
        tensors: by name.
        about: plain JSON types.

    Raises:
        NonFiniteError: NaN or infinity in a tensor; nothing is written.
    """
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    bad = [name for name, tensor in kept.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"NaN or infinity in {len(bad)} tensors ({', '.join(bad[:3])}); {path.name} stays as it was"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    try:
        save_file(kept, draft, metadata={ABOUT: json.dumps(dict(about), allow_nan=False)})
        replace_durably(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_state` wrote.

    Raises:
        CheckpointError: the file is damaged, or another program's.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {})[ABOUT]
        return load_file(path), json.loads(text)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no state of a fold ({error}); delete it to train this fold anew") from error


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the moments of an optimiser whose groups have "names", by "name/moment"."""
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state.get(parameter, {})
            found |= {f"{name}/{key}": torch.as_tensor(value) for key, value in state.items()}
    return found


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the moments back that `optimizer_tensors` gave.

    Raises:
        CheckpointError: moments of parameters that do not train here.
    """
    known = {name for group in optimizer.param_groups for name in group["names"]}
    foreign = sorted({name.rsplit("/", 1)[0] for name in tensors} - known)
    if foreign:
        raise CheckpointError(f"the state has moments of {len(foreign)} other parameters: {', '.join(foreign[:3])}")
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            mine = {key.rsplit("/", 1)[1]: value for key, value in tensors.items() if key.rsplit("/", 1)[0] == name}
            # "step" stays on the CPU, as AdamW makes it.
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in mine.items()
            }
