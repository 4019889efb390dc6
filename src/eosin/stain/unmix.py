"""Stain matrices at work: unmix an image into hematoxylin and eosin, put it together again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eosin.errors import StainError
from eosin.stain.colour import from_grey_values, grey_to_od, high_percentile, mix, od_to_grey, to_grey_values
from eosin.stain.target import StainMethod, StainTarget

MAX_FIT_PX = 4_000_000
"""A slide-level fit looks at this many pixels at most, evenly spaced over the tiles given."""

MIN_ANGLE_DEG = 2.0
"""Hematoxylin and eosin closer than this cannot be told apart."""

MIN_CONCENTRATION = 0.05
"""A stain whose 99th percentile is weaker than this (natural OD) is absent: nothing to scale."""

RUIFROK_HE = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105))
"""Hematoxylin and eosin of Ruifrok & Johnston 2001, table 1."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class StainFit:
    """The stains of one slide (no batch axis) or of each image of a batch.

    Attributes:
        method: which normaliser made it.
        matrix: (2, 3) or (B, 2, 3) float64, unit rows, hematoxylin then eosin.
        concentrations: (2,) or (B, 2) float64, 99th percentiles in natural OD.
        ok: bool () or (B,); where False the numbers mean nothing and images stay unchanged.
        light: grey value plus one that counts as OD 0.
    """

    method: StainMethod
    matrix: Tensor
    concentrations: Tensor
    ok: Tensor
    light: float

    @classmethod
    def from_target(cls, target: StainTarget, device: torch.device | str = "cpu") -> StainFit:
        """Return `target` as a slide-level fit, to use a fit that was stored."""
        return cls(
            method=target.method,
            matrix=torch.tensor(target.matrix, dtype=torch.float64, device=device),
            concentrations=torch.tensor(target.concentrations, dtype=torch.float64, device=device),
            ok=torch.tensor(True, device=device),
            light=target.light,
        )

    def target(self, source: str = "") -> StainTarget:
        """Return a slide-level fit as plain numbers, to store or to normalise to."""
        if self.matrix.ndim != 2:
            raise StainError(f"a target is one fit, this is a batch of {len(self.matrix)}; fit one slide at a time")
        first, second = self.matrix.tolist()
        hematoxylin, eosin = self.concentrations.tolist()
        return StainTarget(
            method=self.method,
            matrix=(tuple(first), tuple(second)),
            concentrations=(hematoxylin, eosin),
            light=self.light,
            source=source,
        )


def evenly_spaced(pixels: Tensor, limit: int) -> Tensor:
    """Return at most `limit` of the pixels (..., P), one every ceil(P / limit)."""
    return pixels[..., :: -(-pixels.shape[-1] // limit)]


def pool_pixels(images: Tensor) -> Tensor:
    """Return the pixels of all images as one row (1, 3, P, 1), at most `MAX_FIT_PX` of them."""
    return evenly_spaced(images.movedim(1, 0).flatten(1), MAX_FIT_PX)[None, :, :, None]


def order_he(first: Tensor, second: Tensor) -> Tensor:
    """Return (B, 2, 3) with the vector that absorbs more red, hematoxylin, in row 0."""
    swap = (first[:, 0] < second[:, 0])[:, None]
    return torch.stack([torch.where(swap, second, first), torch.where(swap, first, second)], 1)


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """Return (B, 2, 3) weights that take OD to least-squares concentrations: (M M^T)^-1 M, in float64."""
    a, b = matrix[:, 0].double(), matrix[:, 1].double()
    aa, bb, ab = (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)
    determinant = (aa * bb - ab * ab).clamp(min=1e-12)
    first = (bb[:, None] * a - ab[:, None] * b) / determinant[:, None]
    second = (aa[:, None] * b - ab[:, None] * a) / determinant[:, None]
    return torch.stack([first, second], 1)


def nonnegative_lasso(od: Tensor, matrix: Tensor, penalty: float = 0.0) -> Tensor:
    """Return argmin over C >= 0 of |od - C M|^2 / 2 + penalty * sum(C), exactly, per pixel.

    With two unit atoms of cosine g >= 0 the four sign patterns reduce to two comparisons. With
    b = M od - penalty: C = (b1 - g b2, b2 - g b1) / (1 - g^2) where both are positive, else the
    larger of b1, b2 alone (its positive part).

    Args:
        od: (B, 3, P).
        matrix: (B or 1, 2, 3), unit rows.
        penalty: L1 weight, 0 for non-negative least squares.

    Returns:
        (B, 2, P).
    """
    b = mix(matrix, od) - penalty
    b1, b2 = b[:, 0], b[:, 1]
    g = (matrix[:, 0] * matrix[:, 1]).sum(1, keepdim=True).to(od.dtype)
    free = (1 - g * g).clamp(min=1e-12)
    first = torch.where(b2 < g * b1, b1, (b1 - g * b2) / free)
    second = torch.where(b1 < g * b2, b2, (b2 - g * b1) / free)
    return torch.stack([first, second], 1).clamp_(min=0)


def checked_fit(method: StainMethod, matrix: Tensor, od: Tensor, *, ok: Tensor, light: float) -> StainFit:
    """Return the batched fit of `matrix` (B, 2, 3) with its concentrations, `ok` narrowed by what is degenerate."""
    matrix = matrix.double()
    cosine = (matrix[:, 0] * matrix[:, 1]).sum(1)
    limit = torch.cos(torch.deg2rad(torch.tensor(MIN_ANGLE_DEG, dtype=torch.float64, device=od.device)))
    ok = ok & matrix.isfinite().all(2).all(1) & (cosine.abs() < limit)
    fallback = torch.tensor(RUIFROK_HE, dtype=torch.float64, device=od.device)
    matrix = torch.where(ok[:, None, None], matrix, fallback)
    stains = concentrations(od, matrix, method)
    strongest = high_percentile(stains, 99.0).double()
    ok = ok & (strongest > MIN_CONCENTRATION).all(1)
    strongest = torch.where(ok[:, None], strongest, torch.ones_like(strongest))
    return StainFit(method=method, matrix=matrix, concentrations=strongest, ok=ok, light=light)


def concentrations(od: Tensor, matrix: Tensor, method: StainMethod) -> Tensor:
    """Return (B, 2, P): least squares for Macenko, non-negative least squares for Vahadane."""
    if method == "vahadane":
        return nonnegative_lasso(od, matrix)
    return mix(pseudo_inverse(matrix), od)


def one_slide(fit: StainFit) -> StainFit:
    """Return a batch of one as a slide-level fit.

    Raises:
        StainError: nothing could be estimated.
    """
    if not bool(fit.ok[0]):
        raise StainError(
            "no stain matrix can be estimated: fewer than 100 stained pixels, one colour only, or values that "
            "are not finite; give tiles with both stains, or leave stain normalisation out for this slide"
        )
    return StainFit(
        method=fit.method,
        matrix=fit.matrix[0],
        concentrations=fit.concentrations[0],
        ok=fit.ok[0],
        light=fit.light,
    )


def restain(images: Tensor, *, fit: StainFit, to_matrix: Tensor, to_concentrations: Tensor) -> tuple[Tensor, Tensor]:
    """Return `images` with their stains replaced, and which images (B,) were left unchanged.

    OD' = (C * c_target / c_source) M_target with C the concentrations under `fit.matrix`.

    Args:
        images: (B, 3, H, W).
        fit: of the slide or of each image.
        to_matrix: (2, 3) or (B, 2, 3).
        to_concentrations: (2,) or (B, 2).
    """
    values, finite = to_grey_values(images)
    od = grey_to_od(values, fit.light)
    matrix = fit.matrix.reshape(-1, 2, 3).to(images.device)
    to_matrix = to_matrix.reshape(-1, 2, 3).to(images.device, torch.float64)
    scale = (to_concentrations.to(images.device, torch.float64) / fit.concentrations.to(images.device)).reshape(-1, 2)
    mixing = (scale[:, :, None] * to_matrix).transpose(1, 2)
    if fit.method == "vahadane":
        od = mix(mixing, nonnegative_lasso(od, matrix))
    else:  # linear, so that both steps are one 3 x 3 matrix
        inverse = pseudo_inverse(matrix)
        both = mixing[:, :, 0, None] * inverse[:, None, 0] + mixing[:, :, 1, None] * inverse[:, None, 1]
        od = mix(both, od)
    changed = finite & fit.ok.to(images.device)
    return from_grey_values(od_to_grey(od, fit.light), images, changed), ~changed


def normalise_stains(images: Tensor, fit: StainFit, target: StainTarget, light: float) -> tuple[Tensor, Tensor]:
    """Return `images` with the stains of `target`, and which images (B,) were left unchanged.

    Raises:
        StainError: `fit` and `target` are of different methods, or either was made with another light,
            or a batched fit is not of this batch.
    """
    check_same(fit, target, light)
    if fit.matrix.ndim == 3 and len(fit.matrix) != len(images):
        raise StainError(f"the fit is of {len(fit.matrix)} images, the batch has {len(images)}")
    reference = StainFit.from_target(target, images.device)
    return restain(images, fit=fit, to_matrix=reference.matrix, to_concentrations=reference.concentrations)


def check_same(fit: StainFit, target: StainTarget, light: float) -> None:
    """Raise `StainError` unless `fit` and `target` come from one method and count OD from `light`."""
    if fit.method != target.method or fit.light != light or target.light != light:
        raise StainError(
            f"fit ({fit.method}, light {fit.light:g}) and target ({target.method}, light {target.light:g}) do not go "
            f"with a normaliser of light {light:g}; make all three with the same one"
        )
