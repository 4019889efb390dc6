"""Where crops lie in their tiles, and cutting them: one antialiased resampling, exact and batched.

A crop is a box in a tile with real edges, seen flipped, turned and out of focus. All of it is linear and separable,
so a crop is two matrix products, rows @ tile @ columns, and a transposition. The matrices hold the cubic filter that
PIL and torchvision use (Keys 1981, a = -1/2), widened by the downscale factor where that is above 1: this is what
antialiasing is, and it is right for every factor, unlike `grid_sample`, which reads 2 x 2 pixels whatever the factor.
Blur is a product more with a band matrix. It acts on light before any colour step, as the defocus of a scanner does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eosin.pretrain.view_config import ViewConfig

TRIES = 10


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Crops:
    """V crops of each of B tiles; every tensor is (V, B).

    The crop is cut from its box, flipped, then transposed.

    Attributes:
        x: left edge of the box in pixels of the tile, real (0 is the left edge of the first pixel).
        y: top edge.
        width: of the box, pixels of the tile.
        height: of the box.
        flip_x: left and right change places.
        flip_y: top and bottom change places.
        transpose: rows become columns.
        sigma: standard deviation of the blur in pixels of the crop, before the transposition; 0 is none.
    """

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    flip_x: Tensor
    flip_y: Tensor
    transpose: Tensor
    sigma: Tensor

    def __getitem__(self, index: slice) -> Crops:
        """Return the crops of some views."""
        return Crops(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def draw_crops(batch: int, tile_px: int, config: ViewConfig, *, generator: torch.Generator) -> Crops:
    """Return the crops of `batch` tiles: two global ones, then the local ones.

    The standard rule is `RandomResizedCrop`'s: area uniform, aspect log-uniform, drawn again (up to ten times) where
    the box would leave the tile, then the whole tile; the corner is uniform over where the box fits. Edges are real
    numbers; torchvision's are rounded.

    Args:
        batch: B.
        tile_px: side of the tiles.
        config: scales, aspects and probabilities.
        generator: source of the draws; the result lies on its device.
    """

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, batch, generator=generator, device=generator.device)

    views = 2 + config.local_crops
    is_local = torch.arange(views, device=generator.device)[:, None] >= 2
    width, height = _standard_sides(uniform(2, TRIES, views), is_local, tile_px, config)
    base = between(config.extended_scale, uniform(views)) * torch.where(is_local, config.local_px, config.global_px)
    root = _log_between(config.extended_aspect, uniform(views)).sqrt()
    extended = uniform(1) < config.extended_context
    width, height = torch.where(extended, base * root, width), torch.where(extended, base / root, height)
    turns = torch.where(uniform(views) < config.rotate, (uniform(views) * 3).floor() + 1, 0).long()
    flip_x, flip_y = uniform(views) < config.hflip, uniform(views) < config.vflip
    blur = torch.tensor([*config.blur[:2], *config.blur[2:] * config.local_crops], device=generator.device)[:, None]
    sigma = between(config.blur_sigma_px, uniform(views))
    crops = Crops(
        x=uniform(views) * (tile_px - width),
        y=uniform(views) * (tile_px - height),
        width=width,
        height=height,
        flip_x=flip_x ^ (turns == 1) ^ (turns == 2),
        flip_y=flip_y ^ (turns == 2) ^ (turns == 3),
        transpose=turns % 2 == 1,
        sigma=torch.where(uniform(views) < blur, sigma, 0.0),
    )
    return _pair(crops) if config.stain_pairs else crops


def _pair(crops: Crops) -> Crops:
    """Return `crops` with the second global crop equal to the first."""
    values = {f.name: getattr(crops, f.name) for f in fields(crops)}
    return Crops(**{name: torch.cat([value[:1], value[:1], value[2:]]) for name, value in values.items()})


def between(limits: tuple[float, float], uniform: Tensor) -> Tensor:
    """Return draws from U(limits), given draws from U(0, 1)."""
    return limits[0] + (limits[1] - limits[0]) * uniform


def _log_between(limits: tuple[float, float], uniform: Tensor) -> Tensor:
    return between((math.log(limits[0]), math.log(limits[1])), uniform).exp()


def _standard_sides(uniform: Tensor, is_local: Tensor, tile_px: int, config: ViewConfig) -> tuple[Tensor, Tensor]:
    """Return width and height (V, B) of the first of the tries (2, TRIES, V, B) that fits, else of the whole tile."""
    share = torch.where(is_local, between(config.local_scale, uniform[0]), between(config.global_scale, uniform[0]))
    root = _log_between(config.aspect, uniform[1]).sqrt()
    side = share.sqrt() * tile_px
    width, height = side * root, side / root
    fits = (width <= tile_px) & (height <= tile_px)
    first = fits.int().argmax(0, keepdim=True)
    width, height = (torch.where(fits.any(0), s.gather(0, first)[0], float(tile_px)) for s in (width, height))
    return width, height


def largest_side(tile_px: int, config: ViewConfig, *, local: bool) -> float:
    """Return the longest side that a box of the global or of the local crops can have, in pixels of the tile."""
    scale, px = (config.local_scale, config.local_px) if local else (config.global_scale, config.global_px)
    standard = tile_px * math.sqrt(scale[1] * _elongation(config.aspect)) if config.extended_context < 1 else 0.0
    extended = (
        px * config.extended_scale[1] * math.sqrt(_elongation(config.extended_aspect))
        if config.extended_context
        else 0.0
    )
    return min(tile_px, max(standard, extended))


def _elongation(aspect: tuple[float, float]) -> float:
    return max(aspect[1], 1 / aspect[0])


def cut(tiles: Tensor, rows: Tensor, crops: Crops, *, px: int, largest: float) -> Tensor:
    """Return crops of px x px pixels as float in 0-1, (N, 3, px, px).

    Args:
        tiles: uint8 (B, 3, S, S).
        rows: which tile each crop is cut from, int64 (N,).
        crops: tensors (N,); they and `rows` may lie on the CPU whatever the tiles' device, which saves waiting for it.
        px: side of the crops.
        largest: no box is longer than this; what is read around a box follows from it. S is always right.
    """
    tile_px, device = tiles.shape[3], tiles.device
    blurred, turned = (to_device(flag.nonzero()[:, 0], device) for flag in (crops.sigma > 0, crops.transpose))
    rows, crops = (
        to_device(rows, device),
        Crops(**{f.name: to_device(getattr(crops, f.name), device) for f in fields(crops)}),
    )
    reach = math.ceil(2 * max(largest / px, 1.0)) + 1
    window = min(tile_px, math.ceil(largest) + 2 * reach + 2)
    size = {"px": px, "window": window, "reach": reach, "tile_px": tile_px}
    with torch.autocast(device.type, enabled=False):
        across, left = _axis(crops.x, crops.width, crops.flip_x, **size)
        down, top = _axis(crops.y, crops.height, crops.flip_y, **size)
        blur = _blur(crops.sigma[blurred], px)
        for matrix in (across, down):
            matrix[blurred] = torch.bmm(blur, matrix[blurred])
        windows = tiles.unfold(2, window, 1).unfold(3, window, 1)[rows, :, top, left]
        narrow = torch.bmm(windows.to(torch.float32).flatten(1, 2), across.mT)
        crop = torch.matmul(down[:, None], narrow.view(-1, 3, window, px))
    crop[turned] = crop[turned].mT
    return crop.div_(255).clamp_(0, 1)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on `device`; a copy from the CPU to a GPU does not wait for the work queued there."""
    return values.to(device, non_blocking=device.type == "cuda")


def _axis(
    start: Tensor, length: Tensor, flip: Tensor, *, px: int, window: int, reach: int, tile_px: int
) -> tuple[Tensor, Tensor]:
    """Return the weights (N, px, window) of one axis, and the tile's pixel where each window starts, int64 (N,).

    Output pixel i is centred on start + (i + 1/2) length / px. A tile's pixels beyond the box count, as in PIL's
    `resize(box=...)`; beyond the tile there is nothing, and the weights of the rest sum to 1.
    """
    factor = (length / px)[:, None]
    centre = start[:, None] + factor * (torch.arange(px, device=start.device) + 0.5)
    centre = torch.where(flip[:, None], centre.flip(1), centre)[..., None]
    spread = factor.clamp(min=1)[..., None]
    taps = 2 * reach
    position = (centre - 2 * spread).floor() + torch.arange(taps, device=start.device)
    weight = _cubic((position + 0.5 - centre).abs() / spread) * ((position >= 0) & (position < tile_px))
    weight = weight / weight.sum(2, keepdim=True)
    origin = (start - reach).floor().clamp(0, tile_px - window).long()
    column = position.long() - origin[:, None, None] + taps
    matrix = weight.new_zeros(len(start), px, window + 2 * taps).scatter_(2, column, weight)
    return matrix[:, :, taps:-taps], origin


def _cubic(distance: Tensor) -> Tensor:
    """Return the cubic convolution kernel with a = -1/2 (Keys 1981, equation 8) at distances of 0 or more."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _blur(sigma: Tensor, px: int) -> Tensor:
    """Return the matrices (N, px, px) of a Gaussian of `sigma` (N,) pixels that is reflected at the edges.

    Where sigma is 0, the matrix is the identity, exactly.
    """
    offset = torch.arange(2 * px - 1, device=sigma.device)
    bell = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3)[:, None]) ** 2)
    both_sides = torch.cat([bell[:, 1:px].flip(1), bell[:, :px]], 1)
    band = both_sides.unfold(1, px, 1).flip(1)
    mirrored = bell.unfold(1, px, 1).clone()
    mirrored[:, :, 0] = 0
    band = band + mirrored + mirrored.flip(1, 2)
    return band / band.sum(2, keepdim=True)
