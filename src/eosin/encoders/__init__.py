"""Vision transformers that turn tiles into vectors: registry, weights, pooling.

Importing this package loads no torch; `load_encoder` does, except for `texture`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from eosin.encoders.registry import REGISTRY, get_spec
from eosin.encoders.spec import EncoderSpec, Tokens

if TYPE_CHECKING:
    from eosin.encoders.encoder import Encoder
    from eosin.encoders.load import load_encoder
    from eosin.encoders.pooling import multi_depth_cls, pool
    from eosin.encoders.texture import TextureEncoder
    from eosin.encoders.weights import import_weights, weights_status

_LAZY = {
    "Encoder": "eosin.encoders.encoder",
    "TextureEncoder": "eosin.encoders.texture",
    "import_weights": "eosin.encoders.weights",
    "load_encoder": "eosin.encoders.load",
    "multi_depth_cls": "eosin.encoders.pooling",
    "pool": "eosin.encoders.pooling",
    "weights_status": "eosin.encoders.weights",
}

__all__ = [
    "REGISTRY",
    "Encoder",
    "EncoderSpec",
    "TextureEncoder",
    "Tokens",
    "get_spec",
    "import_weights",
    "load_encoder",
    "multi_depth_cls",
    "pool",
    "weights_status",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
