"""Vahadane et al. 2016: the stain vectors are the dictionary of a sparse non-negative factorisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.errors import StainError
from eosin.stain.colour import MIN_TISSUE_PX, TISSUE_OD, grey_to_od, tissue_pixels, to_batch, to_grey_values
from eosin.stain.target import StainTarget, default_target
from eosin.stain.unmix import (
    RUIFROK_HE,
    StainFit,
    checked_fit,
    evenly_spaced,
    nonnegative_lasso,
    normalise_stains,
    one_slide,
    order_he,
    pool_pixels,
)

IMAGE_PX, SLIDE_PX = 20_000, 400_000
"""The dictionary is learned from this many pixels at most, evenly spaced: of one image, of one slide."""

SETTLED = 1e-5
"""Learning stops when no entry of any stain vector moves by more than this in a sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vahadane:
    """Vahadane structure-preserving stain normalisation.

    A. Vahadane et al., "Structure-preserving color normalization and sparse stain separation for
    histological images", IEEE TMI 35(8), 2016: equation 4 (the factorisation), section III-C (the
    normalisation). Departures are listed in docs/stain.md: closed-form sparse coding and cyclic
    dictionary updates in place of SPAMS; concentrations by non-negative least squares, so that the
    penalty does not bleach the image; tissue by OD.

    Attributes:
        light: grey value plus one that counts as OD 0; 256 makes white exactly 0, so OD >= 0.
        beta: a pixel whose mean OD is below this is not used to find the stains.
        penalty: weight of the L1 norm of the concentrations (lambda, 0.1 in the paper).
        sweeps: most alternations of coding and dictionary update.
    """

    light: float = 256.0
    beta: float = TISSUE_OD
    penalty: float = 0.1
    sweeps: int = 200

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            StainError: light below 256 (negative OD), beta or penalty out of range, or no sweep.
        """
        if not (256 <= self.light <= 512 and 0 < self.beta < 5 and 0 <= self.penalty < 1 and self.sweeps >= 1):
            raise StainError(
                f"Vahadane: light {self.light} (256-512), beta {self.beta} (0-5), penalty {self.penalty} (0-1) or "
                f"sweeps {self.sweeps} (1 or more) out of range"
            )

    def fit(self, images: Tensor | npt.NDArray[np.uint8]) -> StainFit:
        """Return the stains of one slide from a sample of its tiles, all pixels pooled.

        Args:
            images: tiles of one slide, tensor (B, 3, H, W) or uint8 array (B, H, W, 3).

        Raises:
            StainError: no stain matrix can be estimated.
        """
        return one_slide(self._fit(pool_pixels(to_batch(images)), SLIDE_PX))

    def fit_each(self, images: Tensor | npt.NDArray[np.uint8]) -> StainFit:
        """Return the stains of every image by itself, `ok` False where they cannot be estimated."""
        return self._fit(to_batch(images), IMAGE_PX)

    def _fit(self, images: Tensor, pixels: int) -> StainFit:
        """Return the stains of every image, learned from at most `pixels` of each."""
        values, finite = to_grey_values(images)
        od = grey_to_od(values, self.light).clamp_(min=0)
        tissue = tissue_pixels(od, self.beta)
        matrix, used = self._dictionary(evenly_spaced(od, pixels), evenly_spaced(tissue, pixels))
        ok = finite & (tissue.sum(1) >= MIN_TISSUE_PX) & used
        return checked_fit("vahadane", order_he(matrix[:, 0], matrix[:, 1]), od, ok=ok, light=self.light)

    def normalise(
        self, images: Tensor, fit: StainFit | None = None, target: StainTarget | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `images` in the stains of `target`; arguments and results as for `Macenko.normalise`."""
        images = to_batch(images)
        target = default_target("vahadane") if target is None else target
        return normalise_stains(images, self.fit_each(images) if fit is None else fit, target, self.light)

    def _dictionary(self, od: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit stain vectors (B, 2, 3) >= 0, and whether both atoms of an image are used (B,).

        Alternates the exact sparse code H of the pixels with one cyclic pass of
        w_j <- normalised positive part of w_j + (V h_j - W H h_j) / |h_j|^2.
        """
        od = torch.where(tissue[:, None], od, torch.zeros_like(od))
        pixels = od.double()
        matrix = torch.tensor(RUIFROK_HE, dtype=torch.float64, device=od.device).expand(len(od), 2, 3)
        matrix = matrix / matrix.norm(dim=2, keepdim=True)
        moving = torch.ones(len(od), dtype=torch.bool, device=od.device)
        used = moving
        for _ in range(self.sweeps):
            code = nonnegative_lasso(od, matrix, self.penalty).double()
            gram = code @ code.transpose(1, 2)
            fitted = code @ pixels.transpose(1, 2)
            energy = gram.diagonal(dim1=1, dim2=2)
            used = (energy > 0).all(1)
            new = matrix.clone()
            for j in range(2):
                step = (fitted[:, j] - (gram[:, j, None] @ new)[:, 0]) / energy[:, j, None].clamp(min=1e-12)
                atom = (new[:, j] + step).clamp(min=0)
                length = atom.norm(dim=1, keepdim=True)
                new[:, j] = torch.where(length > 1e-8, atom / length.clamp(min=1e-8), new[:, j])
            new = torch.where(moving[:, None, None], new, matrix)  # an image at rest does not wait for the others
            moving = moving & ((new - matrix).abs().amax((1, 2)) > SETTLED)
            matrix = new
            if not bool(moving.any()):
                break
        return matrix, used
