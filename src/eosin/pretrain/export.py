"""The encoder that comes out: weights of the teacher with what a reader must know of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from eosin.encoders.checkpoints import FACTS
from eosin.features.writer import replace_durably
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.layouts import save_encoder
from eosin.pretrain.lora import merged


def encoder_facts(config: PretrainConfig, *, mpp: tuple[float, ...], step: int) -> dict[str, Any]:
    """Return what a reader of the weights must know: normalisation, sizes, mpp of the training tiles, where it stands.

    Also the weights that training began from, and a frozen teacher: their licences hold for what comes of them.

    Args:
        config: of the run.
        mpp: microns per pixel of the crops, least and greatest or the values.
        step: optimiser steps made.
    """
    origin = {"weights": config.run.weights, "teacher": config.run.teacher}
    return {
        "dim": config.model.dim,
        "patch_px": config.model.patch_px,
        "input_px": config.views.global_px,
        "registers": config.model.registers,
        "mean": list(config.views.mean),
        "std": list(config.views.std),
        "mpp": list(mpp),
        "pooling": "cls",
        "step": step,
        "images": step * config.images_per_step,
        "config_hash": config.hash,
        **{name: value for name, value in origin.items() if value is not None},
    }


def export_encoder(path: Path, state: Mapping[str, Tensor], config: PretrainConfig, facts: Mapping[str, Any]) -> Path:
    """Write the weights of an encoder as safetensors for `eosin.load_encoder`, `facts` as JSON in its metadata.

    Adapters are merged into the weights.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_name(f".{path.stem}.plain.safetensors")
    save_encoder(plain, merged(state, config.run.lora), config.model)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(load_file(plain), temporary, metadata={"format": "pt", FACTS: json.dumps(facts)})
    replace_durably(temporary, path)
    plain.unlink()
    return path


def prune(folder: Path, keep: set[str]) -> None:
    """Remove the exported encoders whose names without suffix are not among `keep`."""
    for path in folder.glob("step-*.safetensors"):
        if path.stem not in keep:
            path.unlink()
