"""A folder such as `eosin finetune` leaves, without the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from traingen import classifier, encoder

from eosin.finetune.infer import Scale, input_of, write_ensemble
from eosin.finetune.saving import save_trained


def write_model(folder: Path, *, tta: str = "none", mode: str = "head", folds: int = 2, **how: Any) -> Path:
    """Write heads of several seeds on the small encoder that lies in `folder`, and return the model's folder."""
    files = []
    for seed in range(folds):
        model = classifier(folder, seed=seed, mode=mode)
        with torch.no_grad():
            model.head.weight.mul_(40)
        files.append(save_trained(folder / f"{seed}.safetensors", model, recipe={"seed": seed}))
    return write_ensemble(
        folder / "run" / "model",
        files,
        encoder=str(folder / "tiny.safetensors"),
        how=input_of(encoder(folder).spec, tile_px=128, **how),
        scale=Scale(threshold=0.5, temperature=1.3, shift=0.1, n=100),
        tta=tta,  # pyright: ignore[reportArgumentType]
        precision="fp32",
    )
