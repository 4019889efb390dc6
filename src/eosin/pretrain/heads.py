"""The heads that training puts on an encoder and throws away afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(dim: int, hidden: int, out: int, *, layers: int = 3) -> nn.Module:
    """Return `layers` linear layers, dim -> hidden -> ... -> out, with GELU between; weights N(0, 0.02), biases 0.

    Two layers make SimCLR's projection head and the predictor of `jepa_loss`.

    Raises:
        ValueError: fewer than one layer, or a width below 1.
    """
    if min(dim, hidden, out, layers) < 1:
        raise ValueError(f"a head of {layers} layers {dim} -> {hidden} -> {out} cannot be; each must be at least 1")
    widths = [dim, *[hidden] * (layers - 1), out]
    parts: list[nn.Module] = []
    for i in range(layers):
        linear = nn.Linear(widths[i], widths[i + 1])
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        parts += [linear, nn.GELU()]
    return nn.Sequential(*parts[:-1]) if layers > 1 else parts[0]


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose row k is weight_g[k] * weight_v[k] / ||weight_v[k]|| (Salimans & Kingma 2016).

    Two plain parameters, so that copies, sharding and moving averages need no special case. The gains start at 1
    and are trained, as in DINOv2's released code.

    Args:
        dim: D of the input.
        out: K rows.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(dim, out, bias=False).weight.detach().clone())
        self.weight_g = nn.Parameter(torch.ones(out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., K) for x (..., D)."""
        direction = F.normalize(self.weight_v.float(), dim=1)
        return F.linear(x, (self.weight_g * direction).to(x.dtype))


class ProjectionHead(nn.Module):
    """DINO's projection head (Caron et al. 2021, appendix C): an MLP, length 1, then K prototypes.

    Parameter names are those of DINOv2 and DINOv3 (`mlp.*`, `last_layer.*`).

    Args:
        dim: D of the encoder's tokens.
        hidden: width of the MLP.
        bottleneck: width of the normalised vector that the prototypes see.
        prototypes: K, the logits that come out.
        layers: linear layers of the MLP.
        weight_norm: True as DINOv2 (prototypes of trained length, starting at 1); False as DINOv3 (a plain linear
            layer, N(0, 0.02), whose logits are not bounded).
    """

    def __init__(
        self, dim: int, *, hidden: int, bottleneck: int, prototypes: int, layers: int = 3, weight_norm: bool = True
    ) -> None:
        super().__init__()
        if prototypes < 2:
            raise ValueError(f"prototypes is {prototypes}; a distribution needs at least 2")
        self.mlp = mlp(dim, hidden, bottleneck, layers=layers)
        if weight_norm:
            self.last_layer: nn.Module = WeightNormLinear(bottleneck, prototypes)
        else:
            self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (..., K) for tokens (..., D)."""
        x = self.mlp(tokens)
        return self.last_layer(F.normalize(x.float(), dim=-1).to(x.dtype))
