"""Stain normalisation (Macenko, Reinhard, Vahadane) and stain augmentation, batched in torch.

Importing this package does not import torch; the first use of a name that needs it does.

Frames: an *image batch* is a tensor (B, 3, H, W), uint8 in 0-255 or float in 0-1, or a uint8
array (B, H, W, 3). Optical density (OD) is natural: OD = -ln((I + 1) / light). A stain matrix
is (2, 3): row 0 hematoxylin, row 1 eosin, unit length, columns red, green, blue.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from eosin.errors import MissingDependencyError
from eosin.stain.target import LabTarget, StainTarget, default_target, target_from_dict

if TYPE_CHECKING:
    from eosin.stain.augment import jitter_he, jitter_hed, random_macenko
    from eosin.stain.macenko import Macenko
    from eosin.stain.reinhard import LabFit, Reinhard
    from eosin.stain.unmix import StainFit
    from eosin.stain.vahadane import Vahadane

_LAZY = {
    "LabFit": "reinhard",
    "Macenko": "macenko",
    "Reinhard": "reinhard",
    "StainFit": "unmix",
    "Vahadane": "vahadane",
    "jitter_he": "augment",
    "jitter_hed": "augment",
    "random_macenko": "augment",
}

__all__ = [
    "LabFit",
    "LabTarget",
    "Macenko",
    "Reinhard",
    "StainFit",
    "StainTarget",
    "Vahadane",
    "default_target",
    "jitter_he",
    "jitter_hed",
    "random_macenko",
    "target_from_dict",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'eosin.stain' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"eosin.stain.{_LAZY[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError.for_extra("torch", "torch") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
