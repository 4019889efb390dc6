"""Features on disk: the store, the embedding pipeline and the converters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eosin.features.extraction import extract
    from eosin.features.store import Features, FeatureStore, TileTable

_LAZY = {"FeatureStore": "store", "Features": "store", "TileTable": "store", "extract": "extraction"}

__all__ = ["FeatureStore", "Features", "TileTable", "extract"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"eosin.features.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'eosin.features' has no attribute {name!r}")
