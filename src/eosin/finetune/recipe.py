"""Recipes of fine-tuning: everything that decides the numbers of a run, as frozen values.

`amf` follows the winner of MIDOG 2025 task 2 (Balezo et al., arXiv 2508.21041) as far as the abstract and the
organisers' records tell: DINOv3, LoRA on query and value with 1.3 million trained parameters, AdamW at 1e-4 with weight
decay 0.1, a cosine with a tenth of warm-up over 60 epochs, a focal loss weighted by domain, four rotations at the test.
What could not be read is ours: gamma, the domain weights, the augmentation, the sampling, the moving average, early
stopping, folds and calibration.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from eosin.errors import ConfigError, closest
from eosin.features.recipe import canonical_json
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.augment import AugmentConfig
from eosin.finetune.losses import LossConfig
from eosin.finetune.mix import MixConfig
from eosin.finetune.sampler import Sampling
from eosin.finetune.weights import WeightKind

Tta = Literal["none", "rot4", "dihedral"]
LeaveOut = Literal["", "domain", "scanner", "tumour", "origin", "species", "dataset"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """One recipe.

    Attributes:
        recipe: its name.
        adapt: what of the encoder trains, beside the head.
        expert: what of a second encoder trains, which is mixed with the first by a gate; None is no second one.
        crop_px: side of the centre of a tile that is used, pixels; 0 is the whole tile.
        input_px: side of the encoder's input; 0 is the tile's own, cut to whole patches; else tiles are resized.
        checkpointing: forget activations and compute them twice, to fit a large encoder.
        loss: of training.
        domain_weights: how much a row counts by its domain.
        soft_labels: train on the share of atypical votes instead of the label.
        sampling: which rows an epoch shows; see `sampler.epoch_rows`.
        augment: how training tiles are altered at random; None is not at all.
        mix: how training tiles are mixed with each other; None is not at all.
        epochs: the most epochs of one fold.
        batch: tiles a step.
        lr: peak learning rate.
        weight_decay: of AdamW, on matrices only.
        warmup: share of all steps in which the learning rate rises.
        layer_decay: factor on the learning rate from a block to the one before it, where blocks train.
        clip: largest norm of the gradient.
        ema: momentum of the moving average of the trained parameters that is evaluated and kept; 0 for none.
        patience: epochs without a better AUROC on the stopping part that end a fold.
        folds: number of grouped folds.
        leave_out: field of a cell, such as "scanner": each of its values is left out once, in place of `folds`.
        stop_share: share of a fold's training cells, whole slides, that decide when to stop and nothing else.
        tta: views of a tile whose logits are averaged at inference.
        seed: of every random draw.
    """

    recipe: str = "amf"
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    expert: AdaptConfig | None = None
    crop_px: int = 0
    input_px: int = 0
    checkpointing: bool = False
    loss: LossConfig = field(default_factory=LossConfig)
    domain_weights: WeightKind = "inverse"
    soft_labels: bool = False
    sampling: Sampling = "class"
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    mix: MixConfig | None = None
    epochs: int = 60
    batch: int = 32
    lr: float = 1e-4
    weight_decay: float = 0.1
    warmup: float = 0.1
    layer_decay: float = 0.75
    clip: float = 1.0
    ema: float = 0.99
    patience: int = 10
    folds: int = 5
    leave_out: LeaveOut = ""
    stop_share: float = 0.15
    tta: Tta = "rot4"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ConfigError: a field out of range; the message says which.
        """
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, known))}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        for name in ("warmup", "ema", "stop_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")
        if not self.stop_share > 0:
            raise ConfigError("stop_share is 0; early stopping needs cells that are not trained on, such as 0.15")
        for name in ("lr", "clip", "layer_decay"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if self.layer_decay > 1 or not self.weight_decay >= 0:
            raise ConfigError(f"layer_decay is {self.layer_decay}, weight_decay {self.weight_decay}; 0-1 and 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return asdict(self)

    @property
    def hash(self) -> str:
        """Sha256 of the recipe, the same for the same values."""
        told = self.to_dict()
        if self.expert is None:  # as it was before there were any: states of then go on
            del told["expert"]
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()


_CHOICES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        "domain_weights": get_args(WeightKind),
        "sampling": get_args(Sampling),
        "leave_out": get_args(LeaveOut),
        "tta": get_args(Tta),
    }
)
_LEAST: Mapping[str, int] = types.MappingProxyType(
    {"crop_px": 0, "input_px": 0, "epochs": 1, "batch": 1, "patience": 1, "folds": 2, "seed": 0}
)

RECIPES: Mapping[str, FinetuneConfig] = types.MappingProxyType({"amf": FinetuneConfig()})


def get_recipe(name: str, **changes: Any) -> FinetuneConfig:
    """Return a named recipe with some fields changed.

    Args:
        name: of `RECIPES`.
        changes: field -> value.

    Raises:
        ConfigError: no such recipe or field, or a value that cannot be.
    """
    if name not in RECIPES:
        raise ConfigError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    known = [one.name for one in fields(FinetuneConfig)]
    for key in changes:
        if key not in known:
            raise ConfigError(f"a recipe has no field {key!r}; closest: {closest(key, known)}")
    return replace(RECIPES[name], **changes)


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any], lead: str = "") -> list[str]:
    """Return "field: old -> new" for each field in which two recipes differ."""
    said = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            said += changed_fields(was, now, f"{lead}{key}.")
        elif was != now:
            said.append(f"{lead}{key}: {was!r} -> {now!r}")
    return said
