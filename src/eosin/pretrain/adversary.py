"""Making features forget a factor (scanner, slide, year) or keep one, by a head trained against or with the encoder."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

UNKNOWN = -1
OVERLAP = 0.5
SITE_NAMES = re.compile(r"(^|[^a-z])(sites?|tss|cent(er|re)|hospital|institut\w*)([^a-z]|$)", re.IGNORECASE)


class GradientReversal(torch.autograd.Function):
    """The identity whose gradient is multiplied by -strength (Ganin et al. 2016, equation 18): `apply(x, strength)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        """Return `x`."""
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return -strength times the gradient."""
        return -ctx.strength * grads[0], None


class AdversaryHead(nn.Module):
    """A classifier of a factor whose gradient reaches the encoder reversed, so that features forget the factor.

    The MLP of AdvDINO (arXiv 2508.04955): D -> h -> h/2 -> h/4 -> classes, GELU, dropout 0.2, 0.3, 0.3. It draws from
    its own seed and generator only, and at strength 0 the features enter detached: the encoder then trains bit for bit
    as without the head, which goes on as a probe of how much of the factor is left.

    Args:
        dim: D of the features.
        classes: of the factor.
        hidden: h; None takes D.
        dropout: after each hidden layer.
        anchor: True passes the gradient on with its own sign, so that features keep the factor (say, the organ).
        seed: of the weights.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        *,
        hidden: int | None = None,
        dropout: tuple[float, float, float] = (0.2, 0.3, 0.3),
        anchor: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"the factor has {classes} class(es); there is nothing to tell apart below 2")
        if not all(0 <= p < 1 for p in dropout):
            raise ValueError(f"dropout is {dropout}; each must be at least 0 and below 1")
        width = hidden or dim
        widths = (dim, width, max(width // 2, 1), max(width // 4, 1), classes)
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(_linear(into, out, generator) for into, out in itertools.pairwise(widths))
        self.dropout, self.anchor = dropout, anchor

    def forward(self, features: Tensor, *, strength: float, generator: torch.Generator | None = None) -> Tensor:
        """Return logits (B, classes) for features (B, D).

        Args:
            features: (B, D), usually the CLS tokens of the global crops.
            strength: factor of the gradient that goes back to the features, reversed unless `anchor`; 0 sends none.
            generator: of the dropout, on the features' device; needed in training.

        Raises:
            ValueError: a negative strength, or training without a generator.
        """
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength is {strength}; it must be 0 or more (anchor=True turns the sign)")
        if self.training and generator is None and any(self.dropout):
            raise ValueError("training draws dropout: give a generator, or dropout=(0, 0, 0)")
        if strength == 0:
            x = features.detach()
        else:
            x = GradientReversal.apply(features, -strength if self.anchor else strength)
        for layer, p in zip(self.layers, (*self.dropout, 0.0), strict=True):
            x = layer(x)
            if layer is not self.layers[-1]:
                x = _dropout(F.gelu(x), p if self.training else 0.0, generator)
        return x


def adversary_loss(logits: Tensor, factor: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, classes) with classes (B,), averaged over rows where it is not -1.

    -1 says that the factor is unknown; a batch without any known row gives 0.
    """
    total = F.cross_entropy(logits.float(), factor, ignore_index=UNKNOWN, reduction="sum")
    return total / (factor != UNKNOWN).sum().clamp(min=1)


def reversal_ramp(step: int, steps: int, *, maximum: float = 1.0, steepness: float = 10.0) -> float:
    """Return the strength at optimiser step `step` of `steps`: maximum * (2 / (1 + exp(-steepness * p)) - 1).

    p = step / steps, so it is 0 at the start (Ganin et al. 2016, section 5.2.2).

    Raises:
        ValueError: a step outside 0 to `steps`: the ramp must be keyed to the end of the run.
    """
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"step {step} of {steps}; the ramp runs from 0 to the last optimiser step of the run")
    return maximum * math.tanh(steepness * step / steps / 2)


def factor_overlap(kept: Sequence[object], factor: Sequence[object]) -> float:
    """Return Theil's U(kept | factor): the share of the entropy of `kept` (n,) that `factor` (n,) already tells, 0-1.

    At 1 the factor determines the label, and features that forget the one have forgotten the other. Many factor levels
    of few rows raise it by themselves. A label of one class has nothing to lose: 0.
    """
    if len(kept) != len(factor) or len(kept) == 0:
        raise ValueError(f"{len(kept)} labels and {len(factor)} factor values; they must be equally many, and some")
    (_, label), (_, level) = (np.unique(np.asarray([str(v) for v in x]), return_inverse=True) for x in (kept, factor))
    table = np.zeros((label.max() + 1, level.max() + 1))
    np.add.at(table, (label, level), 1.0 / len(label))
    entropy = _entropy(table.sum(axis=1))
    if entropy == 0:
        return 0.0
    return float(np.clip((entropy + _entropy(table.sum(axis=0)) - _entropy(table.ravel())) / entropy, 0, 1))


def suppression_warnings(
    name: str, factor: Sequence[object], keep: Mapping[str, Sequence[object]] | None = None
) -> tuple[str, ...]:
    """Return what speaks against making features forget the column `name`, one sentence each.

    Args:
        name: of the factor's column.
        factor: (n,) its values, a row a tile or slide.
        keep: label columns (n,) that the features must still tell apart.
    """
    found = []
    if SITE_NAMES.search(name):
        found.append(
            f"{name!r} reads like a tissue source site: sites differ in the patients and cancers they send (in TCGA "
            "the site tells the cancer type outright), so forgetting it can erase biology; suppress scanner or year "
            "instead, and add an anchor head on what must stay"
        )
    for label, values in (keep or {}).items():
        overlap = factor_overlap(values, factor)
        if overlap >= OVERLAP:
            found.append(
                f"{name!r} already tells {overlap:.0%} of the entropy of {label!r} (n = {len(values)}): features that "
                f"forget {name!r} lose {label!r}; suppress another factor, or add an anchor head on {label!r}"
            )
    return tuple(found)


def _linear(dim: int, out: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer, weights uniform within 1 / sqrt(dim), biases 0, that leaves the global generator alone."""
    layer = nn.Linear(dim, out, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(dim)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Return `x` with a share p of its values 0 and the rest divided by 1 - p."""
    if p == 0:
        return x
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * keep / (1 - p)


def _entropy(p: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
