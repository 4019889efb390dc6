"""Macenko et al. 2009: the stain vectors are the extreme directions in the plane of most OD variance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.errors import StainError
from eosin.stain.colour import (
    LIGHT,
    MIN_TISSUE_PX,
    TISSUE_OD,
    grey_to_od,
    low_percentile,
    mix,
    to_batch,
    to_grey_values,
)
from eosin.stain.target import StainTarget, default_target
from eosin.stain.unmix import StainFit, checked_fit, normalise_stains, one_slide, order_he, pool_pixels

MIN_VARIANCE = 1e-5
"""Second eigenvalue of the OD covariance below this: one colour only (0.003 OD, less than one grey level)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Macenko:
    """Macenko stain normalisation.

    M. Macenko et al., "A method for normalizing histology slides for quantitative analysis",
    ISBI 2009, section 2, steps 1-9.

    Attributes:
        light: grey value plus one that counts as OD 0 (I0).
        beta: a pixel with OD below this in any channel is not used to find the stains.
        alpha: percentile (and 100 - alpha) of the angles that is taken as extreme.
    """

    light: float = LIGHT
    beta: float = TISSUE_OD
    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            StainError: light not in 1-512, beta not positive or alpha not in 0-25.
        """
        if not (1 < self.light <= 512 and 0 < self.beta < 5 and 0 <= self.alpha <= 25):
            raise StainError(
                f"Macenko: light {self.light} (1-512), beta {self.beta} (0-5) or alpha {self.alpha} (0-25) out of range"
            )

    def fit(self, images: Tensor | npt.NDArray[np.uint8]) -> StainFit:
        """Return the stains of one slide from a sample of its tiles, all pixels pooled.

        Args:
            images: tiles of one slide, tensor (B, 3, H, W) or uint8 array (B, H, W, 3).

        Raises:
            StainError: no stain matrix can be estimated.
        """
        return one_slide(self.fit_each(pool_pixels(to_batch(images))))

    def fit_each(self, images: Tensor | npt.NDArray[np.uint8]) -> StainFit:
        """Return the stains of every image by itself, `ok` False where they cannot be estimated."""
        values, finite = to_grey_values(to_batch(images))
        od = grey_to_od(values, self.light)
        tissue = od.amin(1) >= self.beta
        plane, spread = _principal_plane(od, tissue)
        first, second = mix(plane, od).unbind(1)
        angle = torch.atan2(second, first)
        low = low_percentile(angle, self.alpha, tissue)
        high = -low_percentile(-angle, self.alpha, tissue)
        extremes = torch.stack([low, high], 1).double()[..., None]
        vectors = extremes.cos() * plane[:, 0, None] + extremes.sin() * plane[:, 1, None]
        ok = finite & (tissue.sum(1) >= MIN_TISSUE_PX) & (spread > MIN_VARIANCE)
        return checked_fit("macenko", order_he(vectors[:, 0], vectors[:, 1]), od, ok=ok, light=self.light)

    def normalise(
        self, images: Tensor, fit: StainFit | None = None, target: StainTarget | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `images` in the stains of `target`.

        Args:
            images: tensor (B, 3, H, W), uint8 in 0-255 or float in 0-1, on any device.
            fit: of the slide (from `fit`), or of each image (from `fit_each`); each image is fitted
                by itself when None.
            target: what to look like; `default_target("macenko")` when None.

        Returns:
            Images of the same shape, dtype and device, and a bool (B,) that is True where the image
            was returned unchanged: not finite, too little tissue or no stain matrix.

        Raises:
            StainError: the fit or the target is another method's or has another light.
        """
        images = to_batch(images)
        target = default_target("macenko") if target is None else target
        return normalise_stains(images, self.fit_each(images) if fit is None else fit, target, self.light)


def _principal_plane(od: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two main eigenvectors (B, 2, 3) of the tissue's OD covariance and the second eigenvalue (B,).

    The sums are in float64: in float32 they would depend on how torch splits them.
    """
    weight = tissue.double()[:, None]
    count = weight.sum(2)
    centred = (od.double() - (od.double() * weight).sum(2, keepdim=True) / count.clamp(min=1)[..., None]) * weight
    covariance = centred @ centred.transpose(1, 2) / (count - 1).clamp(min=1)[..., None]
    values, vectors = torch.linalg.eigh(covariance)
    plane = vectors[:, :, [2, 1]].transpose(1, 2)
    sign = torch.where(plane.sum(2, keepdim=True) < 0, -1.0, 1.0)
    return plane * sign, values[:, 1]
