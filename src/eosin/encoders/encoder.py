"""The encoder a user holds: a spec, a network, a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.encoders import backends
from eosin.encoders.network import Backbone
from eosin.encoders.pooling import Pooled
from eosin.encoders.spec import EncoderSpec, Tokens
from eosin.errors import GeometryError, NonFiniteError

Forward = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class Encoder:
    """Tiles to tokens (`encoder(images)`) and to vectors (`encoder.encode(tiles)`).

    Attributes:
        spec: what it is; `spec.weights_hash` names the exact weights.
        backbone: the network, normalised images to `Tokens`.
        device: where it runs, such as "cpu" or "cuda".
        precision: "fp32" or "bf16".
        backend: "torch", "openvino" or "compile".
    """

    def __init__(self, backbone: Backbone, *, device: str, precision: str, backend: str) -> None:
        """Put `backbone` on `device`, in evaluation mode."""
        self.spec: EncoderSpec = backbone.spec
        self.backbone = backbone.eval().requires_grad_(False).to(device)
        self.device = device
        self.precision = precision
        self.backend = backend
        self._forward: tuple[int, Forward] | None = None

    def prepare(self, tiles: NDArray[np.uint8]) -> Tensor:
        """Return tiles uint8 (B, H, W, 3) as normalised float32 (B, 3, H, W) on the device."""
        images = torch.from_numpy(np.ascontiguousarray(_checked(tiles))).to(self.device)
        mean = torch.tensor(self.spec.mean, device=self.device) * 255
        std = torch.tensor(self.spec.std, device=self.device) * 255
        return ((images.float() - mean) / std).permute(0, 3, 1, 2).contiguous()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def __call__(self, images: Tensor) -> Tokens:
        """Return the float32 tokens of normalised images (B, 3, H, W); `prepare` makes such images.

        Raises:
            GeometryError: a side is no multiple of the patch.
        """
        self.backbone.fit(images.shape[-2], images.shape[-1])
        with torch.inference_mode(), self._autocast():
            tokens = self.backbone(images.to(self.device))
        return Tokens(*(part.float() for part in tokens))

    def layers(self, images: Tensor, depths: Sequence[int]) -> list[Tokens]:
        """Return the float32 tokens after the blocks `depths`, each through the final norm."""
        self.backbone.fit(images.shape[-2], images.shape[-1])
        with torch.inference_mode(), self._autocast():
            found = self.backbone.layers(images.to(self.device), depths)
        return [Tokens(*(part.float() for part in tokens)) for tokens in found]

    def encode(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return one vector a tile: normalise, forward, pool as the spec says.

        Args:
            tiles: uint8 (B, H, W, 3), square, side a multiple of `spec.patch_px`; never resized.

        Returns:
            float32 (B, D), D = `spec.dim`.

        Raises:
            GeometryError: shape, dtype or side of the tiles do not fit.
            NonFiniteError: the network gave NaN or infinity.
        """
        tiles = _checked(tiles)
        side = tiles.shape[1]
        if tiles.shape[2] != side:
            raise GeometryError(f"tiles of {tiles.shape[2]} x {side} px; needed: square tiles")
        self.backbone.fit(side, side)
        if len(tiles) == 0:
            return np.empty((0, self.spec.dim), np.float32)
        if self._forward is None or self._forward[0] != side:
            self._forward = (side, self._build(side))
        features = self._forward[1](tiles)
        if not np.isfinite(features).all():
            raise NonFiniteError(f"{self.spec.name} gave NaN or infinity in {self.precision}; try precision='fp32'")
        return features

    def _build(self, side: int) -> Forward:
        return backends.build(
            Pooled(self.backbone, self.spec.pooling),
            backend=self.backend,
            precision=self.precision,
            device=self.device,
            mean=self.spec.mean,
            std=self.spec.std,
            input_px=side,
        )

    def runtime(self) -> dict[str, Any]:
        """Return what ran: backend, precision, device and library versions."""
        known = backends.runtime_info(backend=self.backend, precision=self.precision, device=self.device)
        return {**known, "timm": timm.__version__}


def _checked(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return `tiles` if they are uint8 (B, H, W, 3), or raise `GeometryError`."""
    if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.dtype != np.uint8:
        raise GeometryError(f"tiles are {tiles.dtype} {tiles.shape}; needed: uint8 (B, H, W, 3)")
    return tiles
