"""Weights and images that anyone can make again: numpy's PCG64, one stream a tensor.

`official_tokens.npz` holds, for six small networks, the names and shapes of the tensors and the
tokens that the published code gives on these weights and images: facebookresearch/dinov2 at
b8931f7 (`DinoVisionTransformer`, MLP and SwiGLU, with and without registers, chunked
blocks) and facebookresearch/dinov3 at 6876159 (MLP and SwiGLU, masked key bias), width 128, two heads,
two blocks, fp32 on a CPU, `forward_features`: cls, registers and patches after the final norm,
every third token and every fifth channel. No weights and no code of theirs are stored.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def seeded_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return a tensor for every name; rotary periods and bias masks have the values they must have."""
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("periods"):
            values = 100.0 ** (np.arange(shape[0]) / shape[0])
        elif name.endswith("bias_mask"):
            values = np.ones(shape)
            values[shape[0] // 3 : 2 * shape[0] // 3] = 0
        else:
            values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
            fan = math.prod(shape[1:]) if len(shape) > 1 and "token" not in name and "pos" not in name else 25
            values = values / math.sqrt(fan)
            values = np.abs(values) + 0.3 if "gamma" in name else values
            values = values + 1 if "norm" in name and name.endswith("weight") else values
        state[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state


def seeded_images(height: int, width: int) -> torch.Tensor:
    """Return two normal images (2, 3, height, width)."""
    values = np.random.Generator(np.random.PCG64(7)).standard_normal((2, 3, height, width))
    return torch.from_numpy(values.astype(np.float32))
