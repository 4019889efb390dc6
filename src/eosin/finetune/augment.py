"""Augmentation while fine-tuning: six families, batched on the images' device, drawn from one generator.

The order is that of the glass: what the laboratory does (stain), the scanner (optics, colour, JPEG), and last what only
the trainer does (geometry, dropout). Strengths are physical: microns, degrees, optical density, libjpeg's quality. What
the winner of MIDOG 2025 task 2 did exactly could not be read; families, chances and strengths are ours.

Each family draws from a generator of its own, seeded from the one given: without one family, the others draw what they
drew with it, which is what an ablation compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.errors import CohortError, ConfigError, GeometryError, NonFiniteError, StainError, closest
from eosin.finetune import photometry
from eosin.finetune.warp import affine, flip, warp
from eosin.stain import Macenko, StainFit, StainTarget, jitter_he, jitter_hed, random_macenko

Family = Literal["stain", "optics", "colour", "jpeg", "geometry", "dropout"]
FAMILIES: tuple[Family, ...] = get_args(Family)

MAX_BANK_TILES = 64
"""A domain's reference is fitted to this many of its tiles at most, evenly spaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What may happen to a tile, how often and how strongly; a chance is a probability for each image.

    At most one of the three stain changes happens to an image, and at most one of the two blurs.

    Attributes:
        mpp: of the tiles.
        families: the ones that are on.
        macenko_chance: normalise to a reference drawn from the bank.
        he_chance: scale and shift hematoxylin and eosin, found in each image.
        he_scale: half-width of the factor.
        he_shift: half-width of the shift, natural optical density.
        hed_chance: scale and shift hematoxylin, eosin and the residual under one fixed matrix.
        hed_scale: half-width of the factor.
        hed_shift: half-width of the shift, natural optical density.
        blur_chance: Gaussian blur.
        blur_um: largest standard deviation.
        defocus_chance: blur by a disc.
        defocus_um: largest radius.
        colour_chance: brightness, contrast, saturation and hue.
        brightness: half-width of the factor.
        contrast: half-width of the factor.
        saturation: half-width of the factor.
        hue_deg: largest turn of the hue.
        grey_chance: lose all colour.
        jpeg_chance: compress.
        jpeg_quality: lowest and highest, libjpeg's scale.
        flip_chance: mirror left to right; and, independently, top to bottom.
        warp_chance: the next four, in one resample.
        rotate_deg: largest turn to either side.
        shear_deg: largest shear to either side.
        scale: largest magnification; the smallest is one over it.
        translate_um: largest shift to either side, in x and in y.
        dropout_chance: paint holes.
        holes: largest number of them.
        hole_um: shortest and longest side.
    """

    mpp: float = 0.25
    families: tuple[Family, ...] = FAMILIES
    macenko_chance: float = 0.3
    he_chance: float = 0.2
    he_scale: float = 0.2
    he_shift: float = 0.1
    hed_chance: float = 0.3
    hed_scale: float = 0.05
    hed_shift: float = 0.05
    blur_chance: float = 0.1
    blur_um: float = 0.4
    defocus_chance: float = 0.1
    defocus_um: float = 0.75
    colour_chance: float = 0.5
    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    hue_deg: float = 8.0
    grey_chance: float = 0.02
    jpeg_chance: float = 0.2
    jpeg_quality: tuple[int, int] = (40, 95)
    flip_chance: float = 0.5
    warp_chance: float = 0.8
    rotate_deg: float = 180.0
    shear_deg: float = 5.0
    scale: float = 1.1
    translate_um: float = 2.0
    dropout_chance: float = 0.2
    holes: int = 3
    hole_um: tuple[float, float] = (1.5, 4.0)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: an unknown family, or a number out of range.
        """
        _check_families(self.families)
        for field in fields(self):
            if field.name.endswith("_chance") and not 0 <= getattr(self, field.name) <= 1:
                raise ConfigError(f"{field.name} is {getattr(self, field.name)}; a probability lies in 0-1")
        ranges = {"mpp": (0.05, 5), "he_scale": (0, 1), "hed_scale": (0, 1), "he_shift": (0, 2), "hed_shift": (0, 2)}
        ranges |= {"blur_um": (0, 5), "defocus_um": (0, 5), "brightness": (0, 1), "contrast": (0, 1)}
        ranges |= {"saturation": (0, 1), "hue_deg": (0, 180), "rotate_deg": (0, 180), "shear_deg": (0, 45)}
        ranges |= {"scale": (1, 2), "translate_um": (0, 100), "holes": (0, 20)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be in {low}-{high}")
        for names in (("macenko_chance", "he_chance", "hed_chance"), ("blur_chance", "defocus_chance")):
            total = sum(getattr(self, name) for name in names)
            if total > 1 + 1e-9:
                raise ConfigError(f"{', '.join(names)} add up to {total:g}; an image gets one of them at most")
        if not 1 <= self.jpeg_quality[0] <= self.jpeg_quality[1] <= 100:
            raise ConfigError(f"jpeg_quality is {self.jpeg_quality}; give the lowest and highest, 1-100")
        if not 0 < self.hole_um[0] <= self.hole_um[1] <= 100:
            raise ConfigError(f"hole_um is {self.hole_um}; give the shortest and longest side")

    def without(self, *families: Family) -> AugmentConfig:
        """Return this with some families off, for ablation."""
        _check_families(families)
        return replace(self, families=tuple(name for name in self.families if name not in families))


@dataclass(frozen=True, kw_only=True, slots=True)
class StainBank:
    """References to normalise to, one a domain.

    Attributes:
        domains: names, sorted.
        targets: the Macenko fit of each.
        left_out: (domain, why) of those that have none.
    """

    domains: tuple[str, ...]
    targets: tuple[StainTarget, ...]
    left_out: tuple[tuple[str, str], ...]


def stain_bank(tiles: npt.NDArray[np.uint8], domain: npt.ArrayLike) -> StainBank:
    """Return the Macenko reference of each domain, fitted to its training tiles, pooled.

    Args:
        tiles: uint8 (n, S, S, 3), of training only.
        domain: (n,) names.

    Raises:
        CohortError: not one domain a tile.
        StainError: no domain can be fitted.
    """
    names = np.asarray(domain, dtype=np.str_)
    if names.shape != (len(tiles),) or not len(tiles):
        raise CohortError(f"a stain bank needs one domain a tile, found {len(tiles)} tiles and domains {names.shape}")
    fitted, left_out = {}, []
    for name in np.unique(names).tolist():
        rows = np.flatnonzero(names == name)
        rows = rows[:: -(-len(rows) // MAX_BANK_TILES)]
        try:
            fitted[name] = Macenko().fit(tiles[rows]).target(source=f"{name}: {len(rows)} tiles")
        except StainError as error:
            left_out.append((name, str(error)))
    if not fitted:
        raise StainError(f"none of the {len(left_out)} domains shows two stains; leave the stain family out")
    return StainBank(domains=tuple(fitted), targets=tuple(fitted.values()), left_out=tuple(left_out))


@torch.no_grad()
def augment(
    images: Tensor,
    config: AugmentConfig,
    *,
    generator: torch.Generator,
    bank: Sequence[StainTarget] = (),
) -> Tensor:
    """Return a batch augmented, float32 (B, 3, S, S) in 0-1.

    Args:
        images: (B, 3, S, S), uint8, or float in 0-1.
        config: what may happen.
        generator: one draw is taken from it, whatever is on; best on the CPU, also for images that are not.
        bank: `StainBank.targets`, of the training domains.

    Raises:
        GeometryError: another shape, or floats outside 0-1.
        NonFiniteError: NaN or infinity; names the rows.
        ConfigError: macenko_chance above 0 and an empty bank.
    """
    images = _checked(images)
    if "stain" in config.families and config.macenko_chance and not bank:
        raise ConfigError(
            "macenko_chance is above 0 and the bank is empty; give stain_bank(...).targets, or set it to 0"
        )
    seeds = torch.randint(2**62, (len(FAMILIES),), generator=generator, device=generator.device).tolist()
    steps: dict[Family, Callable[[Tensor, AugmentConfig, torch.Generator], Tensor]] = {
        "stain": lambda i, c, g: stain(i, c, g, bank=bank),
        "optics": optics,
        "colour": colour,
        "jpeg": jpeg,
        "geometry": geometry,
        "dropout": dropout,
    }
    for name, seed in zip(FAMILIES, seeds, strict=True):
        if name in config.families:
            own = torch.Generator(device=generator.device).manual_seed(seed)
            images = steps[name](images, config, own)
    return images


def stain(
    images: Tensor, config: AugmentConfig, generator: torch.Generator, *, bank: Sequence[StainTarget] = ()
) -> Tensor:
    """Return images of which each has at most one stain change; those that cannot be unmixed stay as they are.

    The stains of an image are estimated from every second pixel of every second row, which is enough and much faster.
    """
    (which,) = _uniform(len(images), 1, generator=generator)
    edges = np.cumsum([config.macenko_chance, config.he_chance, config.hed_chance]).tolist()
    he = {"scale": config.he_scale, "shift": config.he_shift}
    hed = {"scale": config.hed_scale, "shift": config.hed_shift}
    images = _on(images, which < edges[0], lambda i: random_macenko(i, bank, generator, fit=_stains(i, bank))[0])
    images = _on(
        images,
        (which >= edges[0]) & (which < edges[1]),
        lambda i: jitter_he(i, generator=generator, **he, fit=_stains(i, bank))[0],
    )
    return _on(
        images,
        (which >= edges[1]) & (which < edges[2]),
        lambda i: jitter_hed(i, generator=generator, **hed)[0],
    )


def _stains(images: Tensor, bank: Sequence[StainTarget]) -> StainFit:
    """Return the Macenko fit of each image, from a quarter of its pixels."""
    fitter = Macenko(light=bank[0].light) if bank else Macenko()
    return fitter.fit_each(images[..., ::2, ::2])


def optics(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Return images of which each is blurred by a Gaussian, or by a disc, or not at all."""
    which, strength = _uniform(len(images), 2, generator=generator)
    gaussian = which < config.blur_chance
    disc = ~gaussian & (which < config.blur_chance + config.defocus_chance)
    sigma, radius = strength * config.blur_um / config.mpp, strength * config.defocus_um / config.mpp
    images = _on(images, gaussian, lambda i: photometry.blur(i, sigma[gaussian]))
    return _on(images, disc, lambda i: photometry.defocus(i, radius[disc]))


def colour(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Return images with other brightness, contrast, saturation and hue, in this order, and some of them grey."""
    which, *draws, lost = _uniform(len(images), 6, generator=generator)
    rows, grey = which < config.colour_chance, lost < config.grey_chance
    light, spread, depth, turn = (2 * draw[rows] - 1 for draw in draws)

    def change(chosen: Tensor) -> Tensor:
        chosen = photometry.brightness(chosen, 1 + config.brightness * light)
        chosen = photometry.contrast(chosen, 1 + config.contrast * spread)
        chosen = photometry.saturation(chosen, 1 + config.saturation * depth)
        return photometry.hue(chosen, config.hue_deg * turn)

    return _on(_on(images, rows, change), grey, photometry.grey)


def jpeg(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Return images of which some were compressed, every quality of the range being equally likely."""
    which, draw = _uniform(len(images), 2, generator=generator)
    low, high = config.jpeg_quality
    quality = (low + draw * (high + 1 - low)).floor().clamp(max=high).long()
    rows = which < config.jpeg_chance
    return _on(images, rows, lambda i: photometry.jpeg(i, quality[rows]))


def geometry(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Return images flipped, and of which some are rotated, sheared, scaled and shifted, in one resample."""
    across, down, which, turn, lean, zoom, right, below = _uniform(len(images), 8, generator=generator)
    images = flip(images, horizontal=across < config.flip_chance, vertical=down < config.flip_chance)
    rows = which < config.warp_chance
    shift = (2 * torch.stack([right, below], 1) - 1) * (config.translate_um / config.mpp)
    matrix = affine(
        angle_deg=(2 * turn - 1)[rows] * config.rotate_deg,
        shear_deg=(2 * lean - 1)[rows] * config.shear_deg,
        scale=config.scale ** (2 * zoom - 1)[rows],
        shift_px=shift[rows],
    )
    return _on(images, rows, lambda i: warp(i, matrix.to(images.device)))


def dropout(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Return images of which some have 1 to `holes` rectangles painted over, anywhere, cut at the edges."""
    if config.holes == 0:
        return images
    which, number = _uniform(len(images), 2, generator=generator)
    draws = torch.rand(4, len(images), config.holes, generator=generator, device=generator.device, dtype=torch.float64)
    shortest, longest = (side / config.mpp for side in config.hole_um)
    size = shortest + draws[:2] * (longest - shortest)
    centre = draws[2:] * torch.tensor([images.shape[3], images.shape[2]]).to(draws)[:, None, None]
    there = torch.arange(config.holes, device=draws.device) <= (number * config.holes).floor()[:, None]
    size = size * there
    holes = torch.cat([centre - size / 2, centre + size / 2]).movedim(0, 2)
    rows = which < config.dropout_chance
    return _on(images, rows, lambda i: photometry.dropout(i, holes[rows]))


def _check_families(names: Sequence[str]) -> None:
    """Raise `ConfigError` at a name that is no family."""
    for name in names:
        if name not in FAMILIES:
            raise ConfigError(f"no augmentation family is called {name!r}; the closest are {closest(name, FAMILIES)}")


def _uniform(count: int, draws: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return `draws` float64 tensors (count,) of numbers in 0 to below 1, on the generator's device."""
    drawn = torch.rand(draws, count, generator=generator, device=generator.device, dtype=torch.float64)
    return drawn.unbind(0)


def _on(images: Tensor, rows: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return images of which the `rows` (bool (B,)) went through `change`."""
    chosen = rows.nonzero()[:, 0].to(images.device)
    return images.index_copy(0, chosen, change(images[chosen])) if len(chosen) else images


def _checked(images: Tensor) -> Tensor:
    """Return `images` as float32 in 0-1.

    Raises:
        GeometryError: another shape, or floats outside 0-1.
        NonFiniteError: NaN or infinity.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or not len(images):
        raise GeometryError(f"augmentation needs images (B, 3, S, S), found {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.contiguous().float().div_(255)
    if not images.is_floating_point():
        raise GeometryError(
            f"augmentation needs uint8 or float images, found {images.dtype}; convert them to 8 bits first"
        )
    bad = ~images.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise NonFiniteError(
            f"images {bad.nonzero()[:, 0].tolist()} of the batch hold NaN or infinity; look at those tiles"
        )
    low, high = float(images.amin()), float(images.amax())
    if low < 0 or high > 1:
        raise GeometryError(
            f"float images lie in {low:g} to {high:g}; augment them in 0-1, before the encoder's mean and std come off"
        )
    return images.contiguous().float()
