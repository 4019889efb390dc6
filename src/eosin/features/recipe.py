"""What made a feature file: encoder, tiles, tissue, QC, stain, precision; hashed and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

VERSION = 2
"""Of the pipeline. 2: one filter for every codec, named in ``tile.filter``; grids on whole read-frame pixels."""


def plain(value: object) -> Any:
    """Return `value` as JSON types; numbers without a fraction become int (1.0 and 1 hash alike).

    Raises:
        TypeError: something JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return int(value) if float(value).is_integer() else float(value)
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"{type(value).__name__} cannot go into a recipe or slide record: {value!r}")


def canonical_json(value: object) -> str:
    """Return the one JSON text of `value`: sorted keys, no blanks, no NaN."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the numbers of a feature store, and nothing else.

    Attributes:
        encoder: `EncoderSpec.to_dict()`.
        tile: `TileSpec.to_dict()` and the ``filter`` that made pixels coarser; `tile_px` and `mpp` are read by the
            store.
        tissue: how tissue was found.
        qc: which rules gave the reason codes.
        stain: stain normalisation, or None.
        precision: arithmetic of the encoder, such as ``"fp32"``.
        dtype: dtype of the stored features, ``"float32"`` or ``"float16"``.
        tokens: whether patch tokens are stored too.
        icc: whether the slide's ICC profile was applied.
        version: version of the pipeline that gives these fields their meaning.
    """

    encoder: dict[str, Any]
    tile: dict[str, Any]
    tissue: dict[str, Any]
    qc: dict[str, Any]
    stain: dict[str, Any] | None
    precision: str
    dtype: str
    tokens: bool
    icc: bool
    version: int = VERSION

    def __post_init__(self) -> None:
        """Reject a dtype the store does not write."""
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"features are stored as float32 or float16, not {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe `to_dict` gave.

        Raises:
            TypeError: unknown or missing fields.
        """
        return cls(**data)

    @property
    def hash(self) -> str:
        """Sha256 (hex) of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()

    def diff(self, other: Recipe) -> list[str]:
        """Return one line a differing field: ``tile.mpp: here 0.5, store has 0.25``."""
        here, there = _flat(self.to_dict()), _flat(other.to_dict())
        return [
            f"{field}: here {_show(here, field)}, store has {_show(there, field)}"
            for field in sorted(here.keys() | there.keys())
            if here.get(field, _ABSENT) != there.get(field, _ABSENT)
        ]


_ABSENT = object()


def _show(fields: dict[str, Any], name: str) -> str:
    return json.dumps(fields[name], ensure_ascii=False) if name in fields else "nothing"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[prefix + key] = item
    return flat
