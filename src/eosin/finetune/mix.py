"""MixUp and CutMix: images of two cells in one, with the loss of both.

Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018: x = s x_i + (1 - s) x_j, s ~ Beta(a, a). Yun et
al., "CutMix", ICCV 2019: a box of x_j is pasted into x_i, s being the share of x_i that is left.

A cell's class is decided at the centre of its tile: a CutMix box that misses the centre takes its share of the label
and brings none of the cell. So CutMix is off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor

from eosin.errors import ConfigError, GeometryError
from eosin.finetune.losses import LossConfig, loss_rows, mean_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class MixConfig:
    """How often and how strongly images are mixed; an image is mixed in one way at most.

    Attributes:
        mixup_chance: probability for each image.
        mixup_alpha: of the Beta distribution; 0.2 leaves most shares near 0 and 1, 1 is uniform.
        cutmix_chance: probability for each image.
        cutmix_alpha: of the Beta distribution of the share that is left.
    """

    mixup_chance: float = 0.5
    mixup_alpha: float = 0.2
    cutmix_chance: float = 0.0
    cutmix_alpha: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: one is out of range.
        """
        chances = (self.mixup_chance, self.cutmix_chance)
        if not (min(chances) >= 0 and sum(chances) <= 1):
            raise ConfigError(f"the chances of mixing are {chances}; they must be 0 or more and add up to 1 at most")
        for alpha in (self.mixup_alpha, self.cutmix_alpha):
            if not 0.01 <= alpha <= 100:
                raise ConfigError(f"alpha of mixing is {alpha}; it must be in 0.01-100")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Mixed:
    """A mixed batch.

    Attributes:
        images: (B, 3, S, S).
        partner: (B,), the row each was mixed with.
        share: (B,) float32, the share of the image that is its own; 1 where nothing was mixed in.
    """

    images: Tensor
    partner: Tensor
    share: Tensor


@torch.no_grad()
def mix_batch(images: Tensor, config: MixConfig, *, generator: torch.Generator) -> Mixed:
    """Return a batch of which some images are mixed with another of it.

    Args:
        images: (B, 3, S, S) float.
        config: how often, how strongly.
        generator: source of the draws; best on the CPU.

    Raises:
        GeometryError: not a batch of float images.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise GeometryError(f"mixing needs float images (B, 3, S, S), found {images.dtype} {tuple(images.shape)}")
    count, (height, width) = len(images), images.shape[2:]
    partner = torch.randperm(count, generator=generator, device=generator.device)
    draws = torch.rand(5, count, generator=generator, device=generator.device, dtype=torch.float64)
    kind, *_ = draws
    blended = kind < config.mixup_chance
    pasted = ~blended & (kind < config.mixup_chance + config.cutmix_chance)
    share = torch.where(blended, beta_quantile(draws[1], config.mixup_alpha), torch.ones_like(kind))
    left = beta_quantile(draws[2], config.cutmix_alpha)
    boxes = paste_boxes(left, draws[3:], (width, height)) * pasted[:, None]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    share = torch.where(pasted, 1 - area / (width * height), share)
    partner, boxes, share = (value.to(images.device) for value in (partner, boxes, share.float()))
    other = images[partner]
    own = torch.where(pasted.to(images.device), torch.ones_like(share), share)[:, None, None, None].to(images.dtype)
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    columns = (x >= boxes[:, 0, None]) & (x < boxes[:, 2, None])
    rows = (y >= boxes[:, 1, None]) & (y < boxes[:, 3, None])
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return Mixed(images=torch.where(inside, other, torch.lerp(other, images, own)), partner=partner, share=share)


def mixed_loss(
    logits: Tensor,
    targets: Tensor,
    mixed: Mixed,
    config: LossConfig,
    *,
    weights: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the loss of a mixed batch, a scalar: mean over rows of s w_i L(y_i) + (1 - s) w_j L(y_j), j the partner.

    Args:
        logits: (B,), (B, 1) or (B, K), of the mixed images.
        targets: of the images before they were mixed, as in `losses.loss_rows`.
        mixed: what was mixed.
        config: which loss.
        weights: (B,) of the rows before they were mixed, or None for 1 each.
        names: (B,) of the rows, for the error.

    Raises:
        ConfigError: shapes that do not fit.
        NonFiniteError: as in `losses.training_loss`.
    """
    own, other = loss_rows(logits, targets, config), loss_rows(logits, targets[mixed.partner], config)
    if weights is not None:
        if weights.shape != own.shape:
            raise ConfigError(f"{tuple(weights.shape)} weights for {len(own)} rows; give one a row")
        own, other = own * weights.to(own), other * weights[mixed.partner].to(own)
    share = mixed.share.to(own)
    return mean_loss(share * own + (1 - share) * other, names=names)


def beta_quantile(uniform: Tensor, alpha: float) -> Tensor:
    """Return the quantiles of Beta(alpha, alpha) at `uniform`, float64: torch draws no Beta from a generator."""
    return torch.from_numpy(betaincinv(alpha, alpha, uniform.cpu().numpy())).to(uniform.device)


def paste_boxes(left: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes (B, 4), x0, y0, x1, y1 in whole pixels, of sides sqrt(1 - left) of the image's, cut at its edges.

    Args:
        left: (B,) share of the image that is to be left, before the cut.
        centre: (2, B) in 0-1, x and y.
        size: width and height of the image.
    """
    side = (1 - left).clamp(min=0).sqrt()
    edges = []
    for sign in (-1, 1):
        for axis in (0, 1):
            edges.append(((centre[axis] + sign * side / 2) * size[axis]).round().clamp(0, size[axis]))
    return torch.stack(edges, 1)
