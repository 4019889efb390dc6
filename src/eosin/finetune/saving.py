"""What a run trained, alone: a file of a few MB beside the encoder's own weights, which it names by their hash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eosin.encoders.checkpoints import hash_tensors
from eosin.encoders.encoder import Encoder
from eosin.encoders.files import read_tensors
from eosin.encoders.spec import EncoderSpec, Pooling
from eosin.errors import CheckpointError, ConfigError, NonFiniteError, WeightsError
from eosin.features.writer import replace_durably
from eosin.finetune.adapters import AdaptConfig, added_state
from eosin.finetune.classifier import Classifier, TransformersBackbone
from eosin.finetune.experts import Mixture
from eosin.version import __version__

FACTS = "eosin_finetune"
"""Key of a file's metadata."""

Model = Classifier | Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One encoder of a saved model.

    Attributes:
        encoder: its name, as `load_encoder` takes it.
        weights_hash: of its weights before training.
        pooling: how tokens became one vector.
        config: what of it trained.
    """

    encoder: str
    weights_hash: str
    pooling: Pooling
    config: AdaptConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What a file says of itself.

    Attributes:
        branches: the encoders, one for a classifier, several for a mixture.
        classes: their names, in order.
        threshold: of the probability of the second class, chosen out of fold; None when none was.
        temperature: logits are divided by it before they become probabilities.
        recipe: how it was trained, plain JSON types.
        version: of eosin that wrote it.
        trained_hash: of the tensors.
    """

    branches: tuple[Branch, ...]
    classes: tuple[str, ...]
    threshold: float | None
    temperature: float
    recipe: Mapping[str, Any]
    version: str
    trained_hash: str


def trained_state(model: Model) -> dict[str, Tensor]:
    """Return what training changes, and nothing else.

    These are the parameters that train and the statistics of batch norms that train; of a mixture with "experts.0."
    before them. Adapters and prompts, as "added.0.q.down", and the head have the same names for every layout of the
    encoder's weights. The tensors are the model's own: clone them to keep them, as for the start of the next fold.
    """
    out: dict[str, Tensor] = {}
    for at, branch in enumerate(model.branches):
        start = f"experts.{at}." if isinstance(model, Mixture) else ""
        added = added_state(branch.backbone.network)
        known = {id(parameter) for parameter in added.values()}
        out |= {f"{start}added.{name}": parameter.detach() for name, parameter in added.items()}
        for name, module in branch.named_modules():
            own = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
            buffers = {key: b for key, b in module.named_buffers(recurse=False) if own and "running" in key}
            path = f"{start}{name}." if name else start
            kept = {key: value for key, value in {**own, **buffers}.items() if id(value) not in known}
            out |= {f"{path}{key}": value.detach() for key, value in kept.items()}
    if isinstance(model, Mixture):
        out |= {f"gate.{name}": parameter.detach() for name, parameter in model.gate.named_parameters()}
    return out


def load_trained_state(model: Model, state: Mapping[str, Tensor]) -> None:
    """Put values back that `trained_state` gave, in place; all of them or an error that lists what does not fit.

    Raises:
        WeightsError: names or shapes differ.
    """
    own = trained_state(model)
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or foreign or shapes:
        told = {"missing": missing, "not known": foreign, "of another shape": sorted(shapes)}
        listed = "; ".join(f"{what}: {', '.join(keys[:5])} ({len(keys)})" for what, keys in told.items() if keys)
        raise WeightsError(f"the trained values do not fit the model: {listed}; they are of another recipe or encoder")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def save_trained(
    path: Path,
    model: Model,
    *,
    recipe: Mapping[str, Any],
    threshold: float | None = None,
    temperature: float = 1.0,
) -> Path:
    """Write what a run trained as safetensors; an interrupted save leaves the file that was there.

    Args:
        path: the file.
        model: the trained model.
        recipe: how it was trained, plain JSON types.
        threshold: of the probability of the second class, 0-1.
        temperature: positive.

    Raises:
        NonFiniteError: a trained value is NaN or infinite.
        ConfigError: threshold or temperature is out of range.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold is {threshold}; it is a probability, 0-1")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"the temperature is {temperature}; it must be positive")
    state = {key: value.cpu().contiguous().clone() for key, value in trained_state(model).items()}
    bad = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"{len(bad)} trained tensors hold NaN or infinity ({', '.join(bad[:3])}); nothing is saved"
        )
    saved = Saved(
        branches=tuple(_branch(branch) for branch in model.branches),
        classes=model.classes,
        threshold=threshold,
        temperature=temperature,
        recipe=dict(recipe),
        version=__version__,
        trained_hash=hash_tensors(state),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(state, temporary, metadata={FACTS: json.dumps(asdict(saved), allow_nan=False)})
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _branch(model: Classifier) -> Branch:
    spec = model.spec
    if not spec.weights_hash:
        raise WeightsError(f"{spec.name} has no hash of its weights, so that a file could not name them; load it anew")
    return Branch(encoder=spec.name, weights_hash=spec.weights_hash, pooling=spec.pooling, config=model.config)


def read_saved(path: Path) -> Saved:
    """Return what a file of `save_trained` says of itself, without its tensors.

    Raises:
        CheckpointError: there is no such file, or it is none of these.
        WeightsError: it is broken.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[Saved, Mapping[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the file that eosin finetune wrote")
    state = read_tensors(path)
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(FACTS)
    if text is None:
        raise CheckpointError(f"{path.name} was not written by eosin finetune: its metadata lacks {FACTS!r}")
    try:
        told = json.loads(text)
        branches = [{**branch, "config": _config(branch["config"])} for branch in told["branches"]]
        told |= {"branches": tuple(Branch(**branch) for branch in branches), "classes": tuple(told["classes"])}
        saved = Saved(**told)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name}: its metadata {FACTS!r} cannot be read ({error!r})") from error
    if hash_tensors(state) != saved.trained_hash:
        raise CheckpointError(f"{path.name} has been altered: its tensors are not those it was written with")
    return saved, state


def _config(values: Mapping[str, Any]) -> AdaptConfig:
    return AdaptConfig(**{**values, "targets": tuple(values["targets"])})


def load_trained(path: Path, encoders: Sequence[Encoder | TransformersBackbone]) -> tuple[Model, Saved]:
    """Return the model of a file, ready for use, and what the file says.

    Args:
        path: written by `save_trained`.
        encoders: those that `read_saved(path).branches` names, in that order; freshly loaded, as they are changed.

    Raises:
        WeightsError: another encoder than the one that was trained, or tensors that do not fit.
        CheckpointError: no such file, none of these, or altered.
    """
    saved, state = _read(path)
    specs = [encoder.spec for encoder in encoders]
    if len(specs) != len(saved.branches):
        needed = ", ".join(branch.encoder for branch in saved.branches)
        raise WeightsError(f"{path.name} needs {len(saved.branches)} encoders ({needed}); {len(specs)} were given")
    for branch, spec in zip(saved.branches, specs, strict=True):
        _check(path.name, branch, spec)
    experts = []
    for branch, encoder in zip(saved.branches, encoders, strict=True):
        backbone = encoder.backbone if isinstance(encoder, Encoder) else encoder
        experts.append(Classifier(backbone, branch.config, classes=saved.classes, pooling=branch.pooling))
    model = experts[0] if len(experts) == 1 else Mixture(experts)
    load_trained_state(model, state)
    return model.eval(), saved


def _check(name: str, branch: Branch, spec: EncoderSpec) -> None:
    """Raise unless the encoder's weights are those that were trained."""
    if branch.weights_hash != spec.weights_hash:
        raise WeightsError(
            f"{name} was trained on {branch.encoder} with weights {branch.weights_hash}; the encoder given is "
            f"{spec.name} with weights {spec.weights_hash or 'without a hash'}: load the one it was trained on"
        )
