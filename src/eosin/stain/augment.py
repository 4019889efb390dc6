"""Stain augmentation: seeded, batched, on the images' device.

Every function takes images (B, 3, H, W), uint8 or float in 0-1, and an explicit generator (its
device may differ from the images'), and returns the images and a bool (B,) that is True where an
image was returned unchanged because it could not be unmixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eosin.errors import StainError
from eosin.stain.colour import LIGHT, from_grey_values, grey_to_od, mix, od_to_grey, to_batch, to_grey_values
from eosin.stain.macenko import Macenko
from eosin.stain.target import StainTarget
from eosin.stain.unmix import StainFit, check_same, pseudo_inverse, restain

RUIFROK_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Hematoxylin, eosin and DAB, Ruifrok & Johnston 2001 as rounded in common use; rows are scaled to unit length."""


def jitter_he(
    images: Tensor,
    *,
    generator: torch.Generator,
    scale: float = 0.2,
    shift: float = 0.2,
    fit: StainFit | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and shift how much hematoxylin and eosin every image holds.

    C' = a C + b with a ~ U(1 - scale, 1 + scale) and b ~ U(-shift, shift) for each image and stain
    (Tellez et al., IEEE TMI 37(9), 2018), C under the image's own Macenko matrix. Only the difference
    (C' - C) M is added to the OD, so what the two stains do not explain is kept.

    Args:
        images: (B, 3, H, W).
        generator: source of the draws, four an image.
        scale: half-width of the factor, 0-1.
        shift: half-width of the offset, in natural OD.
        fit: Macenko fit of the slide or of each image; each image is fitted by itself when None.
    """
    _check_strength(scale, shift)
    images = to_batch(images)
    fit = Macenko().fit_each(images) if fit is None else fit
    if fit.matrix.ndim == 3 and len(fit.matrix) != len(images):
        raise StainError(f"the fit is of {len(fit.matrix)} images, the batch has {len(images)}")
    values, finite = to_grey_values(images)
    od = grey_to_od(values, fit.light)
    matrix = fit.matrix.reshape(-1, 2, 3).to(images.device)
    stains = mix(pseudo_inverse(matrix), od)
    factor, offset = _draws(len(images), 2, generator, images.device)
    added = scale * factor * stains + shift * offset
    changed = finite & fit.ok.to(images.device)
    od = od + mix(matrix.transpose(1, 2), added.to(od.dtype))
    return from_grey_values(od_to_grey(od, fit.light), images, changed), ~changed


def jitter_hed(
    images: Tensor, *, generator: torch.Generator, scale: float = 0.05, shift: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Scale and shift hematoxylin, eosin and the residual (DAB) channel under one fixed matrix.

    The HED jitter of Tellez et al. (IEEE TMI 2018; Medical Image Analysis 58, 2019) with the matrix of
    Ruifrok & Johnston (Anal Quant Cytol Histol 23, 2001). Nothing is estimated from the image, so only
    images that are not finite are left unchanged.

    Args:
        images: (B, 3, H, W).
        generator: source of the draws, six an image.
        scale: half-width of the factor, 0-1 (0.05 is Tellez' HED-light, 0.2 HED-strong).
        shift: half-width of the offset, in natural OD along a unit stain vector.
    """
    _check_strength(scale, shift)
    images = to_batch(images)
    values, finite = to_grey_values(images)
    od = grey_to_od(values, LIGHT)
    matrix = torch.tensor(RUIFROK_HED, dtype=torch.float64, device=images.device)
    matrix = matrix / matrix.norm(dim=1, keepdim=True)
    stains = mix(torch.linalg.inv(matrix).T[None], od)
    factor, offset = _draws(len(images), 3, generator, images.device)
    added = scale * factor * stains + shift * offset
    od = od + mix(matrix.T[None], added.to(od.dtype))
    return from_grey_values(od_to_grey(od, LIGHT), images, finite), ~finite


def random_macenko(
    images: Tensor,
    bank: Sequence[StainTarget],
    generator: torch.Generator,
    *,
    probability: float = 1.0,
    fit: StainFit | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise every image to a target drawn at random from `bank` ("multi-Macenko" augmentation).

    Args:
        images: (B, 3, H, W).
        bank: targets of `Macenko`, for example one a scanner or site.
        generator: source of the draws, two an image.
        probability: chance that an image is touched at all; the others come out bit for bit.
        fit: Macenko fit of the slide or of each image; each image is fitted by itself when None.

    Returns:
        The images, and a bool (B,) that is True where an image was drawn but could not be unmixed.

    Raises:
        StainError: empty bank, or targets that do not go with the fit.
    """
    if not bank or not 0 <= probability <= 1:
        raise StainError(
            f"random_macenko: {len(bank)} targets and probability {probability}; needs one or more and 0-1"
        )
    images = to_batch(images)
    fit = Macenko(light=bank[0].light).fit_each(images) if fit is None else fit
    for target in bank:
        check_same(fit, target, fit.light)
    draws = torch.rand(len(images), 2, generator=generator, device=generator.device).to(images.device)
    which = (draws[:, 0] * len(bank)).long().clamp(max=len(bank) - 1)
    to_matrix, to_concentrations = (
        torch.tensor([getattr(t, name) for t in bank], dtype=torch.float64, device=images.device)[which]
        for name in ("matrix", "concentrations")
    )
    out, unchanged = restain(images, fit=fit, to_matrix=to_matrix, to_concentrations=to_concentrations)
    drawn = draws[:, 1] < probability
    return torch.where(drawn[:, None, None, None], out, images), unchanged & drawn


def _draws(count: int, stains: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factors and offsets in U(-1, 1), each (count, stains, 1), drawn on the generator's device."""
    draws = torch.rand(count, 2, stains, 1, generator=generator, device=generator.device).to(device) * 2 - 1
    return draws[:, 0], draws[:, 1]


def _check_strength(scale: float, shift: float) -> None:
    """Raise `StainError` unless 0 <= `scale` <= 1 and 0 <= `shift`."""
    if not (0 <= scale <= 1 and 0 <= shift < 5):
        raise StainError(f"jitter: scale {scale} must be in 0-1 and shift {shift} in 0-5 (natural OD)")
