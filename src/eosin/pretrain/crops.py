"""Where crops lie in their tiles, and cutting them: one antialiased resampling, exact and batched.

A crop is a box in a tile with real edges, seen flipped, turned and out of focus. All of it is linear and separable:
every row, then every column, of a crop is a weighted sum of a few of the tile's. The weights are the cubic filter that
PIL and torchvision use (Keys 1981, a = -1/2), widened by the downscale factor where that is above 1: this is what
antialiasing is, and it is right for every factor, unlike `grid_sample`, which reads 2 x 2 pixels whatever the factor.
Blur is a weighted sum more. It acts on light before any colour step, as the defocus of a scanner does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

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


def cut(tiles: Tensor, rows: Tensor, crops: Crops, *, px: int, largest: float, radius: int) -> Tensor:
    """Return crops of px x px pixels, (N, 3, px, px), clipped to 0-1.

    Args:
        tiles: float32 (B, 3, S, S) in 0-1.
        rows: which tile each crop is cut from, int64 (N,).
        crops: tensors (N,); they and `rows` may lie on the CPU whatever the tiles' device, which saves waiting for it.
        px: side of the crops.
        largest: no box is longer than this; how many pixels the filter reads follows from it.
        radius: of the blur's kernel in pixels of the crop, from `blur_radius`.
    """
    device = tiles.device
    blurred, turned = (to_device(flag.nonzero()[:, 0], device) for flag in (crops.sigma > 0, crops.transpose))
    rows = to_device(rows, device)
    crops = Crops(**{f.name: to_device(getattr(crops, f.name), device) for f in fields(crops)})
    size = {"px": px, "tile_px": tiles.shape[3], "taps": math.floor(4 * max(largest / px, 1.0)) + 1}
    down = sum_rows(tiles, rows, *_filter(crops.y, crops.height, crops.flip_y, **size))
    every = torch.arange(len(rows), device=device)
    crop = sum_rows(down.mT.contiguous(), every, *_filter(crops.x, crops.width, crops.flip_x, **size))
    if len(blurred):
        soft, blur = crop[blurred], _blur(crops.sigma[blurred], px, radius)
        for _ in range(2):
            soft = sum_rows(soft, every[: len(soft)], *blur).mT.contiguous()
        crop[blurred] = soft
    crop = crop.mT.contiguous()
    crop[turned] = crop[turned].mT
    return crop.clamp_(0, 1)


def sum_rows(planes: Tensor, images: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Return weighted sums of the rows of some images: (N, C, px, W).

    Args:
        planes: float32 (B, C, H, W), contiguous.
        images: which image each sum is of, int64 (N,).
        weights: (N, px, taps).
        index: which rows are summed, int64 (N, px, taps), 0 to H - 1.
    """
    _, channels, height, width = planes.shape
    plane = images[:, None] * channels + torch.arange(channels, device=planes.device)
    index = (plane[:, :, None, None] * height + index[:, None]).to(torch.int32)  # (N, C, px, taps)
    weights = weights[:, None].expand(index.shape)
    taps = index.shape[-1]
    # a bag of embeddings is a sum of rows of a table: no window is copied, nothing is multiplied by zero
    table = planes.view(-1, width)
    out = functional.embedding_bag(
        index.reshape(-1, taps), table, per_sample_weights=weights.reshape(-1, taps), mode="sum"
    )
    return out.view(len(images), channels, index.shape[2], width)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on `device`; a copy from the CPU to a GPU does not wait for the work queued there."""
    return values.to(device, non_blocking=device.type == "cuda")


def _filter(start: Tensor, length: Tensor, flip: Tensor, *, px: int, tile_px: int, taps: int) -> tuple[Tensor, Tensor]:
    """Return the weights (N, px, taps) along one axis and the pixels of the tile that they are of.

    Output pixel i is centred on start + (i + 1/2) length / px. A tile's pixels beyond the box count, as in PIL's
    `resize(box=...)`; beyond the tile there is nothing, and the weights of the rest sum to 1.
    """
    factor = (length / px)[:, None]
    centre = start[:, None] + factor * (torch.arange(px, device=start.device) + 0.5)
    centre = torch.where(flip[:, None], centre.flip(1), centre)[..., None]
    spread = factor.clamp(min=1)[..., None]
    position = (centre - 2 * spread - 0.5).ceil() + torch.arange(taps, device=start.device)
    weight = _cubic((position + 0.5 - centre).abs() / spread) * ((position >= 0) & (position < tile_px))
    return weight / weight.sum(2, keepdim=True), position.clamp(0, tile_px - 1).long()


def _cubic(distance: Tensor) -> Tensor:
    """Return the cubic convolution kernel with a = -1/2 (Keys 1981, equation 8) at distances of 0 or more."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def blur_radius(config: ViewConfig) -> int:
    """Return how many pixels to either side the blur reads: three standard deviations of the widest."""
    return math.ceil(3 * config.blur_sigma_px[1])


def _blur(sigma: Tensor, px: int, radius: int) -> tuple[Tensor, Tensor]:
    """Return the weights (N, px, taps) of a Gaussian of `sigma` (N,) pixels and their pixels, mirrored at the edges."""
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    bell = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    bell = bell / bell.sum(1, keepdim=True)
    pixel = (torch.arange(px, device=sigma.device)[:, None] + offset).abs()
    pixel = px - 1 - (px - 1 - pixel).abs()
    size = (len(sigma), px, 2 * radius + 1)
    return bell[:, None].expand(size), pixel.expand(size)
