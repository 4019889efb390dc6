"""Colour of crops: stain in optical density, light, contrast, saturation, hue, grey, solarise.

Every parameter is drawn beforehand, one a crop, so that the images may lie on any device and be worked on in pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from eosin.pretrain.crops import between, to_device
from eosin.pretrain.view_config import ViewConfig
from eosin.stain.augment import RUIFROK_HED
from eosin.stain.colour import LIGHT, mix
from eosin.stain.macenko import Macenko
from eosin.stain.unmix import pseudo_inverse

STAINS = 3
FIT_PX = 128 * 128
"""Macenko's fit of a tile looks at about this many of its pixels."""

_LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Colours:
    """What happens to the colours of V crops of each of B tiles; every tensor is (V, B) or (V, B, 3).

    Attributes:
        stained: jitter the stains.
        stain_factor: (V, B, 3), added share of hematoxylin, eosin and the third stain.
        stain_offset: (V, B, 3), added amount, natural OD.
        jittered: change the next four.
        brightness: factor.
        contrast: factor.
        saturation: factor.
        hue: turns, -0.5 to 0.5.
        grey: lose all colour.
        solarise: invert the bright half.
    """

    stained: Tensor
    stain_factor: Tensor
    stain_offset: Tensor
    jittered: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grey: Tensor
    solarise: Tensor

    def __getitem__(self, index: slice | Tensor) -> Colours:
        """Return the colours of some rows."""
        return Colours(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def draw_colours(batch: int, config: ViewConfig, *, generator: torch.Generator) -> Colours:
    """Return the colours of the crops of `batch` tiles, two global ones, then the local ones.

    Args:
        batch: B.
        config: strengths and probabilities.
        generator: source of the draws; the result lies on its device.
    """
    views, device = 2 + config.local_crops, generator.device

    def uniform(*size: int) -> Tensor:
        return torch.rand(views, batch, *size, generator=generator, device=device)

    def around(strength: float, size: tuple[int, ...] = ()) -> Tensor:
        return between((-strength, strength), uniform(*size))

    second = (torch.arange(views, device=device) == 1)[:, None]
    drawn = {
        "jittered": uniform() < config.jitter,
        "brightness": 1 + around(config.brightness),
        "contrast": 1 + around(config.contrast),
        "saturation": 1 + around(config.saturation),
        "hue": around(config.hue_deg / 360),
        "grey": uniform() < config.grey,
        "solarise": (uniform() < config.solarise) & second,
    }
    stained = uniform() < config.stain_probability
    if config.stain_pairs:
        drawn = {name: torch.cat([value[:1], value[:1], value[2:]]) for name, value in drawn.items()}
        stained[:2] = True
    return Colours(
        stained=stained,
        stain_factor=around(config.stain_scale, (STAINS,)),
        stain_offset=around(config.stain_shift, (STAINS,)),
        **drawn,
    )


def stain_basis(tiles: Tensor, kind: Literal["hed", "he"]) -> tuple[Tensor, Tensor]:
    """Return stain vectors (B, 3, 3), in rows, and the weights (B, 3, 3) that take OD to amounts, float64.

    "hed" has the three vectors of Ruifrok & Johnston 2001 in every tile. "he" has the two that Macenko's method finds
    in each tile and a third row of zeros; where it finds none, all rows are zero and nothing is jittered.

    Args:
        tiles: uint8 (B, 3, S, S).
        kind: which.
    """
    if kind == "hed":
        vectors = torch.tensor(RUIFROK_HED, dtype=torch.float64)
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        weights = torch.linalg.inv(vectors).T
        size = (len(tiles), 3, 3)
        return vectors.expand(size).to(tiles.device), weights.expand(size).to(tiles.device)
    step = max(1, round((tiles.shape[2] * tiles.shape[3] / FIT_PX) ** 0.5))
    fit = Macenko().fit_each(tiles[:, :, ::step, ::step])
    pad = (0, 0, 0, 1)
    vectors, weights = (torch.nn.functional.pad(m, pad) for m in (fit.matrix, pseudo_inverse(fit.matrix)))
    return vectors * fit.ok[:, None, None], weights * fit.ok[:, None, None]


def recolour(images: Tensor, colours: Colours, basis: tuple[Tensor, Tensor]) -> Tensor:
    """Return images after all that was drawn for them, in the order of the fields of `Colours`.

    Args:
        images: (N, 3, H, W) float in 0-1; overwritten.
        colours: tensors (N,) and (N, 3); best on the CPU, which saves waiting for a GPU.
        basis: stain vectors and weights of each image, (N, 3, 3) each, from `stain_basis`.
    """
    moved = Colours(**{f.name: to_device(getattr(colours, f.name), images.device) for f in fields(colours)})
    for flag, change in (
        (colours.stained, lambda i: jitter_stains(images[i], basis[0][i], basis[1][i], colours=moved[i])),
        (colours.jittered, lambda i: jitter_colours(images[i], moved[i])),
        (colours.grey, lambda i: grey_out(images[i])),
        (colours.solarise, lambda i: solarise(images[i])),
    ):
        rows = to_device(flag.nonzero()[:, 0], images.device)
        images[rows] = change(rows)
    return images


def jitter_stains(images: Tensor, vectors: Tensor, weights: Tensor, *, colours: Colours) -> Tensor:
    """Return images with the amount C of each stain changed to C + factor C + offset, the rest of the OD kept.

    What `eosin.stain.jitter_hed` and `jitter_he` do (Tellez et al., IEEE TMI 37(9), 2018), as one affine map of OD for
    each image: OD' = (I + V^T diag(factor) W) OD + V^T offset, with V the vectors and W the weights.

    Args:
        images: (N, 3, H, W) float in 0-1.
        vectors: (N, 3, 3), stains in rows.
        weights: (N, 3, 3), OD to amounts.
        colours: `stain_factor` and `stain_offset` (N, 3) of them.
    """
    added = vectors.mT @ (colours.stain_factor.double()[..., None] * weights)
    offset = (vectors.mT @ colours.stain_offset.double()[..., None])[..., 0]
    constant = -math.log(LIGHT) * added.sum(2) - offset  # since OD = log(LIGHT) - log(1 + I)
    log = (images.flatten(2) * 255).add_(1).log_()
    log = mix(added, log).add_(log).add_(constant[..., None].to(log.dtype))
    return log.exp_().sub_(1).div_(255).clamp_(0, 1).view_as(images)


def jitter_colours(images: Tensor, colours: Colours) -> Tensor:
    """Return images with other brightness, contrast, saturation and hue, in this order, each clipped to 0-1.

    The four functions of torchvision's `ColorJitter`, which draws their order too.

    Args:
        images: (N, 3, H, W) float in 0-1; overwritten.
        colours: tensors (N,).
    """
    brightness, contrast, saturation = (
        value[:, None, None, None] for value in (colours.brightness, colours.contrast, colours.saturation)
    )
    images = images.mul_(brightness).clamp_(0, 1)
    mean = luma(images).mean((1, 2), keepdim=True)[:, None]
    images = images.mul_(contrast).add_((1 - contrast) * mean).clamp_(0, 1)
    grey = luma(images)[:, None]
    images = images.mul_(saturation).add_((1 - saturation) * grey).clamp_(0, 1)
    return turn_hue(images, colours.hue)


def luma(images: Tensor) -> Tensor:
    """Return the grey (N, H, W) of images (N, 3, H, W), ITU-R BT.601 weights as PIL and torchvision round them."""
    return (images[:, 0] * _LUMA[0]).add_(images[:, 1], alpha=_LUMA[1]).add_(images[:, 2], alpha=_LUMA[2])


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in 0-1 with the hue of HSV turned by `turns` (N,), value and saturation kept."""
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    span = high - low
    sixth = torch.where(
        high == red,
        green - blue,
        torch.where(high == green, (blue - red).add_(span, alpha=2), (red - green) + 4 * span),
    )
    sixth = sixth.div_(span.clamp(min=1e-12)).add_(6 * turns[:, None, None])
    sixth = sixth.sub_((sixth / 6).floor_().mul_(6))
    ramps = (
        (sixth - 3).abs_().sub_(1),
        (sixth - 2).abs_().neg_().add_(2),
        (sixth - 4).abs_().neg_().add_(2),
    )
    out = torch.empty_like(images)
    for channel, ramp in enumerate(ramps):
        torch.addcmul(low, span, ramp.clamp_(0, 1), out=out[:, channel])
    return out


def grey_out(images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) without colour."""
    return luma(images)[:, None].expand_as(images)


def solarise(images: Tensor) -> Tensor:
    """Return images with their bright half, 0.5 and above, inverted."""
    return torch.where(images >= 0.5, 1 - images, images)
