"""Reinhard et al. 2001: give every channel of a perceptual colour space the target's mean and deviation."""

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
    from_grey_values,
    grey_to_lab,
    grey_to_od,
    lab_to_grey,
    tissue_pixels,
    to_batch,
    to_grey_values,
)
from eosin.stain.target import LabTarget, default_target
from eosin.stain.unmix import pool_pixels

MIN_DEVIATION = 0.05
"""A channel whose standard deviation is below this (Lab units) is constant: nothing to scale."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class LabFit:
    """CIELAB statistics of one slide (no batch axis) or of each image of a batch.

    Attributes:
        mean: (3,) or (B, 3) float64.
        std: (3,) or (B, 3) float64, of the population.
        ok: bool () or (B,); where False images stay unchanged.
    """

    mean: Tensor
    std: Tensor
    ok: Tensor

    @classmethod
    def from_target(cls, target: LabTarget, device: torch.device | str = "cpu") -> LabFit:
        """Return `target` as a slide-level fit, to use a fit that was stored."""
        mean, std = (torch.tensor(x, dtype=torch.float64, device=device) for x in (target.mean, target.std))
        return cls(mean=mean, std=std, ok=torch.tensor(True, device=device))

    def target(self, source: str = "") -> LabTarget:
        """Return a slide-level fit as plain numbers, to store or to normalise to."""
        if self.mean.ndim != 1:
            raise StainError(f"a target is one fit, this is a batch of {len(self.mean)}; fit one slide at a time")
        return LabTarget(mean=tuple(self.mean.tolist()), std=tuple(self.std.tolist()), source=source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reinhard:
    """Reinhard colour normalisation in CIELAB.

    E. Reinhard et al., "Color transfer between images", IEEE CG&A 21(5), 2001, equations 10-11. The
    paper uses Ruderman's l-alpha-beta; this is CIELAB (sRGB, D65), as in tiatoolbox and torchstain.
    """

    def fit(self, images: Tensor | npt.NDArray[np.uint8]) -> LabFit:
        """Return the statistics of one slide from a sample of its tiles, all pixels pooled.

        Args:
            images: tiles of one slide, tensor (B, 3, H, W) or uint8 array (B, H, W, 3).

        Raises:
            StainError: too little tissue, a constant channel or values that are not finite.
        """
        fit = self.fit_each(pool_pixels(to_batch(images)))
        if not bool(fit.ok[0]):
            raise StainError(
                f"no colour statistics: fewer than {MIN_TISSUE_PX} stained pixels, a constant channel, or values "
                "that are not finite; give tiles with tissue"
            )
        return LabFit(mean=fit.mean[0], std=fit.std[0], ok=fit.ok[0])

    def fit_each(self, images: Tensor | npt.NDArray[np.uint8]) -> LabFit:
        """Return the statistics of every image by itself, `ok` False where there is too little to go by."""
        values, finite = to_grey_values(to_batch(images))
        return _statistics(values, grey_to_lab(values), finite)

    def normalise(
        self, images: Tensor, fit: LabFit | None = None, target: LabTarget | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `images` with the colour statistics of `target`.

        Args:
            images: tensor (B, 3, H, W), uint8 in 0-255 or float in 0-1, on any device.
            fit: of the slide (from `fit`), or of each image (from `fit_each`); each image is fitted
                by itself when None.
            target: what to look like; `default_target("reinhard")` when None.

        Returns:
            Images of the same shape, dtype and device, and a bool (B,) that is True where the image
            was returned unchanged: not finite, too little tissue or one constant channel.
        """
        images = to_batch(images)
        values, finite = to_grey_values(images)
        lab = grey_to_lab(values)
        fit = _statistics(values, lab, finite) if fit is None else fit
        if fit.mean.ndim == 2 and len(fit.mean) != len(images):
            raise StainError(f"the fit is of {len(fit.mean)} images, the batch has {len(images)}")
        goal = LabFit.from_target(default_target("reinhard") if target is None else target, images.device)
        mean, std = (x.to(images.device).reshape(-1, 3) for x in (fit.mean, fit.std))
        scale = goal.std / std
        shift = goal.mean - scale * mean
        lab = scale[..., None].to(lab.dtype) * lab + shift[..., None].to(lab.dtype)
        changed = finite & fit.ok.to(images.device)
        return from_grey_values(lab_to_grey(lab), images, changed), ~changed


def _statistics(values: Tensor, lab: Tensor, finite: Tensor) -> LabFit:
    """Return mean and population deviation of `lab` (B, 3, P), guarded by the tissue in `values`."""
    wide = lab.double()
    mean, std = wide.mean(2), wide.std(2, correction=0)
    tissue = tissue_pixels(grey_to_od(values, LIGHT), TISSUE_OD).sum(1)
    ok = finite & (tissue >= MIN_TISSUE_PX) & (std > MIN_DEVIATION).all(1)
    return LabFit(mean=mean, std=torch.where(ok[:, None], std, torch.ones_like(std)), ok=ok)
