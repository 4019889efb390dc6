"""eosin: whole-slide pathology images to vision-transformer features, and features to answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from eosin.encoders import load_encoder
    from eosin.features import FeatureStore, extract
    from eosin.slides import open_slide
    from eosin.tiles import tile

_LAZY = {
    "FeatureStore": "eosin.features",
    "extract": "eosin.features",
    "load_encoder": "eosin.encoders",
    "open_slide": "eosin.slides",
    "tile": "eosin.tiles",
}

__all__ = ["FeatureStore", "extract", "load_encoder", "open_slide", "tile"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'eosin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
