"""eosin: whole-slide pathology images to vision-transformer features, and features to answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from eosin.version import __version__ as __version__

if TYPE_CHECKING:
    from eosin.cohort import read_cohort
    from eosin.encoders import load_encoder
    from eosin.features import FeatureStore, extract
    from eosin.slides import open_slide
    from eosin.tasks.probe import evaluate, fit_probe
    from eosin.tiles import tile

_LAZY = {
    "FeatureStore": "eosin.features",
    "evaluate": "eosin.tasks.probe",
    "extract": "eosin.features",
    "fit_probe": "eosin.tasks.probe",
    "load_encoder": "eosin.encoders",
    "open_slide": "eosin.slides",
    "read_cohort": "eosin.cohort",
    "tile": "eosin.tiles",
}

__all__ = ["FeatureStore", "evaluate", "extract", "fit_probe", "load_encoder", "open_slide", "read_cohort", "tile"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'eosin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
