"""Search over features: one protocol, three engines, and what is built on them."""

from __future__ import annotations

from eosin.retrieval.filters import All, Any_, Between, Filter, Is, Not, describe, mask, parse_filter
from eosin.retrieval.protocol import Hits, IndexSpec, Payload, VectorIndex, check_same_features, tile_ids

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
    "check_same_features",
    "describe",
    "mask",
    "parse_filter",
    "tile_ids",
]
