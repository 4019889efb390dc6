"""Load an encoder by name. Torch is imported by the first encoder that needs it; `texture` does not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eosin.encoders.registry import TEXTURE
from eosin.encoders.spec import Pooling
from eosin.encoders.texture import TextureEncoder
from eosin.errors import MissingDependencyError

if TYPE_CHECKING:
    from eosin.encoders.encoder import Encoder


def load_encoder(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    backend: str = "auto",
    pooling: Pooling | None = None,
) -> Encoder | TextureEncoder:
    """Return an encoder that is ready to use.

    Args:
        name_or_path: a registered name ("dinov2-vits14"); "timm:NAME" or any timm name; "hf:OWNER/NAME" or
            "OWNER/NAME"; a weights file or a folder with config.json; "random:NAME[@SEED]", seeded random weights.
        device: "auto" (cuda when there is one), "cpu", "cuda", "cuda:1", ...
        precision: "auto", "fp32" or "bf16".
        backend: "auto", "torch", "openvino" or "compile".
        pooling: "cls", "mean" or "cls+mean"; None keeps the release's own.

    Raises:
        UnknownEncoderError: no such name; the message lists the closest.
        WeightsUnavailableError: the weights are gated, not found, or the hub cannot be reached.
        WeightsError: keys or shapes do not fit, the file holds code, or the network is the release's own code.
        MissingDependencyError: torch or timm is not installed, and the encoder is not `texture`.
    """
    if str(name_or_path) == TEXTURE:
        return TextureEncoder()
    try:
        from eosin.encoders.checkpoints import load_network
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "timm"):
            raise
        raise MissingDependencyError.for_extra(error.name, "torch") from error
    return load_network(str(name_or_path), device=device, precision=precision, backend=backend, pooling=pooling)
