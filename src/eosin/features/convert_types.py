"""What every reader of a foreign feature file returns and every writer takes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import ConvertError
from eosin.features.recipe import canonical_json
from eosin.geometry import round_half_up

CARD = "eosin"
_CARD_FIELDS = ("name", "encoder", "mpp", "tile_px", "size0_px", "overlap_px", "slide_size_px", "slide_mpp")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignFeatures:
    """One slide's features as a file of any format gives them; None = the file does not say.

    Attributes:
        name: slide id, or the file's name without suffix when it does not hold one.
        x: features (n, D), dtype as stored.
        xy: level-0 top-left corners (n, 2), int64.
        encoder: name of the encoder, "" when unknown.
        mpp: microns per pixel of a tile.
        tile_px: side of a tile.
        size0_px: (width, height) of a tile's footprint in level-0 pixels.
        overlap_px: overlap of neighbours, in tile pixels.
        slide_size_px: (width, height) of level 0.
        slide_mpp: (x, y) microns per level-0 pixel.
        qc: QC columns (n,).
        reason: int8 (n,), 0 = kept; None when the format has no such thing.
        extras: our own recipe and slide record, where the file carries them.
    """

    name: str
    x: npt.NDArray[Any]
    xy: npt.NDArray[np.int64]
    encoder: str = ""
    mpp: float | None = None
    tile_px: int | None = None
    size0_px: tuple[float, float] | None = None
    overlap_px: int | None = None
    slide_size_px: tuple[int, int] | None = None
    slide_mpp: tuple[float, float] | None = None
    qc: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    reason: npt.NDArray[np.int8] | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reject shapes that are not one row a tile.

        Raises:
            ConvertError: features that are not (n, D), coordinates that are not (n, 2).
        """
        if self.x.ndim != 2:
            hint = "a slide-level vector has no tiles" if self.x.ndim == 1 else "expected (n, D)"
            raise ConvertError(f"{self.name}: features have shape {self.x.shape}; {hint}")
        if self.x.dtype.kind != "f":
            raise ConvertError(f"{self.name}: features are {self.x.dtype}, not floating point")
        if self.xy.shape != (len(self.x), 2):
            raise ConvertError(f"{self.name}: {self.xy.shape} coordinates for {len(self.x)} features; expected (n, 2)")

    def card(self, *, extras: bool = False) -> str:
        """Return the JSON that eosin adds to a foreign file, so that reading it back loses nothing.

        Args:
            extras: with recipe and slide record too, where rows are complete.
        """
        data = {name: getattr(self, name) for name in _CARD_FIELDS}
        return canonical_json({**data, "extras": self.extras} if extras else data)


def card_fields(text: object) -> dict[str, Any]:
    """Return the fields a `ForeignFeatures.card` holds; {} when `text` is not one."""
    if isinstance(text, bytes):
        text = text.decode()
    if not isinstance(text, str):
        return {}
    data = json.loads(text)
    pairs = ("size0_px", "slide_size_px", "slide_mpp")
    return {k: tuple(v) if k in pairs and v is not None else v for k, v in data.items()}


def corners(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.int64]:
    """Return `values` as int64 pixels.

    Raises:
        ConvertError: they have a fraction, so they are not level-0 pixels.
    """
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    if values.dtype.kind != "f" or not np.isfinite(values).all() or (values != np.floor(values)).any():
        raise ConvertError(
            f"{name}: coordinates of type {values.dtype} are not whole pixels; if they are microns, say coord_unit='um'"
        )
    return values.astype(np.int64)


def microns_to_px(values: npt.NDArray[Any], slide_mpp: tuple[float, float]) -> npt.NDArray[np.int64]:
    """Return (n, 2) microns as level-0 pixels, rounded."""
    return round_half_up(np.asarray(values, np.float64) / np.asarray(slide_mpp, np.float64))


def number(attributes: Mapping[str, Any], key: str) -> float | None:
    """Return an attribute as float; None when absent, "None" or not a number."""
    value = attributes.get(key)
    try:
        return None if value is None or isinstance(value, bytes) else float(value)
    except (TypeError, ValueError):
        return None


def whole(attributes: Mapping[str, Any], key: str) -> int | None:
    """Return an attribute as int; None like `number`, and when it has a fraction."""
    value = number(attributes, key)
    return int(value) if value is not None and value.is_integer() else None


def word(attributes: Mapping[str, Any], key: str) -> str:
    """Return an attribute as text; "" when absent or "None"."""
    value = attributes.get(key)
    text = value.decode() if isinstance(value, bytes) else value
    return text if isinstance(text, str) and text != "None" else ""


def need(value: Any, what: str, name: str, fmt: str) -> Any:
    """Return `value`.

    Raises:
        ConvertError: it is None; the message says which format needs it.
    """
    if value is None:
        raise ConvertError(f"{name}: {fmt} needs the {what}, which the source does not say")
    return value


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; rename it on success, remove it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
