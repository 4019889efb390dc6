"""Search over features: one protocol, three engines, and what is built on them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eosin.retrieval.build import build_index, store_spec
    from eosin.retrieval.engines import create_index, open_index
    from eosin.retrieval.filters import All, Any_, Between, Filter, Is, Not, describe, mask, parse_filter
    from eosin.retrieval.protocol import Hits, IndexSpec, Payload, VectorIndex, check_same_features, tile_ids

_LAZY = {
    "build": ("build_index", "store_spec"),
    "engines": ("create_index", "open_index"),
    "filters": ("All", "Any_", "Between", "Filter", "Is", "Not", "describe", "mask", "parse_filter"),
    "protocol": ("Hits", "IndexSpec", "Payload", "VectorIndex", "check_same_features", "tile_ids"),
}

__all__ = [
    "All",
    "Any_",
    "Between",
    "Filter",
    "Hits",
    "IndexSpec",
    "Is",
    "Not",
    "Payload",
    "VectorIndex",
    "build_index",
    "check_same_features",
    "create_index",
    "describe",
    "mask",
    "open_index",
    "parse_filter",
    "store_spec",
    "tile_ids",
]


def __getattr__(name: str) -> object:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"eosin.retrieval.{module}"), name)
    raise AttributeError(f"module 'eosin.retrieval' has no attribute {name!r}")
