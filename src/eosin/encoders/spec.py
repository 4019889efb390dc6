"""What an encoder is (`EncoderSpec`) and what it returns (`Tokens`): no torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from eosin.errors import GeometryError

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["cls", "mean", "cls+mean", "none"]
POOLINGS: tuple[Pooling, ...] = ("cls", "mean", "cls+mean")
"""Ways to make one vector of the tokens; "none" is for encoders without tokens."""

Interpolation = Literal["bicubic-offset0.1", "bicubic-antialias", "bicubic", "rope", "none"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Tokens(NamedTuple):
    """Every token of the last layer, after the final norm.

    Attributes:
        cls: class token, (B, W); the mean of the patches for a network without one.
        registers: register tokens, (B, R, W); R is 0 for most releases.
        patches: patch tokens on their grid, (B, h, w, W), rows first.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """One encoder: what it eats, what it gives, under which licence, and where it comes from.

    Attributes:
        name: unique name, as given to `load_encoder`.
        dim: length D of the vector `encode` returns for one tile.
        patch_px: side of a patch token, input pixels; 0 for an encoder without patches.
        input_px: side of the input the release was meant for, pixels.
        mean: per-channel mean of the input on a 0-1 scale.
        std: per-channel standard deviation on a 0-1 scale.
        mpp: microns per pixel of the training tiles; empty for natural images or when not stated.
        pooling: how `encode` makes one vector of the tokens.
        registers: number of register tokens.
        params_m: parameters, millions.
        licence: licence of the weights.
        gated: whether the hub asks for an agreement before the download.
        source: "timm:NAME", "hf:owner/name", "builtin:NAME", "file:NAME" or "random:SEED".
        arch: timm architecture that is built, "" when none can be.
        arch_args: arguments of that architecture; layers are named by strings.
        native_px: input side at which the position embedding was released, pixels.
        interpolation: how the release resizes its position embedding.
        file: file name on the hub, "" for the usual names.
        needs: what is missing to load it with standard classes, "" when nothing is.
        notes: facts that could not be confirmed, one sentence each.
        weights_hash: sha256 over the loaded tensors, "" before loading.
    """

    name: str
    dim: int
    patch_px: int
    input_px: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    mpp: tuple[float, ...] = ()
    pooling: Pooling = "cls"
    registers: int = 0
    params_m: float = 0.0
    licence: str = "unknown"
    gated: bool = False
    source: str
    arch: str = ""
    arch_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    native_px: int = 224
    interpolation: Interpolation = "bicubic"
    file: str = ""
    needs: str = ""
    notes: tuple[str, ...] = ()
    weights_hash: str = ""

    def __post_init__(self) -> None:
        """Refuse a pooling that does not exist and an input that is no whole number of patches."""
        if self.pooling not in (*POOLINGS, "none"):
            raise GeometryError(f"{self.name}: pooling {self.pooling!r} does not exist; choose one of {POOLINGS}")
        if self.patch_px:
            check_side(self, self.input_px)

    @property
    def width(self) -> int:
        """Width W of one token: half of `dim` when two tokens are joined."""
        return self.dim // 2 if self.pooling == "cls+mean" else self.dim

    def with_pooling(self, pooling: Pooling) -> EncoderSpec:
        """Return the spec with another pooling and the `dim` that follows from it."""
        dim = self.width * (2 if pooling == "cls+mean" else 1)
        return dataclasses.replace(self, pooling=pooling, dim=dim)

    def replace(self, **changes: Any) -> EncoderSpec:
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON values."""
        names = [f.name for f in dataclasses.fields(self)]
        values = {name: getattr(self, name) for name in names}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {**plain, "arch_args": dict(self.arch_args)}


def check_side(spec: EncoderSpec, *sides_px: int) -> None:
    """Raise `GeometryError` unless every side is a positive multiple of the patch."""
    for side in sides_px:
        if side <= 0 or side % spec.patch_px:
            low = max(1, side // spec.patch_px) * spec.patch_px
            raise GeometryError(
                f"{spec.name}: an input of {side} px is not a multiple of its {spec.patch_px} px patch; "
                f"use tiles of {low} or {low + spec.patch_px} px (released for {spec.input_px} px)"
            )
