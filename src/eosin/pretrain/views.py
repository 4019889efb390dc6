"""Views of tiles for self-supervised training, made in batches on the device where the tiles lie.

uint8 tiles (B, 3, S, S) come in, float crops come out, normalised. One explicit generator is the only source of
chance: the same seed, tiles and configuration give the same views, whatever the device, as long as the generator is
on the CPU (draws are a few numbers a crop).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from eosin.pretrain.crops import Crops, blur_radius, cut, draw_crops, largest_side, to_device
from eosin.pretrain.photometric import Colours, draw_colours, recolour, stain_basis
from eosin.pretrain.view_config import BLUR_AS_PUBLISHED, BLUR_AS_RELEASED, PRESETS, ViewConfig

__all__ = ["BLUR_AS_PUBLISHED", "BLUR_AS_RELEASED", "PRESETS", "ViewConfig", "Views", "make_views"]

_PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Pixels worked on at once: what fits the cache of a core, or a moderate part of a GPU's memory."""

_Drawn = TypeVar("_Drawn", Crops, Colours)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Views:
    """The views of B tiles.

    Attributes:
        global_: two tensors (B, 3, global_px, global_px), float32, normalised.
        local: `local_crops` tensors (B, 3, local_px, local_px).
        crops: where they lie in their tiles, (2 + local_crops, B), global ones first, on the generator's device.
    """

    global_: list[Tensor]
    local: list[Tensor]
    crops: Crops


def make_views(tiles: Tensor, config: ViewConfig, generator: torch.Generator) -> Views:
    """Return two global and `config.local_crops` local views of every tile.

    The order is: cut, flip, turn and blur in one resampling; stain; brightness, contrast, saturation and hue; grey;
    solarise; normalise. With the preset "simclr" the two global views are SimCLR's pair, with "stain-pairs" they are
    one crop in two stains.

    Args:
        tiles: uint8 (B, 3, S, S).
        config: what to do.
        generator: source of every draw; advanced.

    Raises:
        ValueError: tiles of another shape or type, or too small for extended-context translation.
    """
    _check(tiles, config)
    batch, tile_px = len(tiles), tiles.shape[3]
    crops = draw_crops(batch, tile_px, config, generator=generator)
    colours = draw_colours(batch, config, generator=generator)
    basis = stain_basis(tiles, config.stain if bool(colours.stained.any()) else "hed")
    views: list[list[Tensor]] = []
    with torch.autocast(tiles.device.type, enabled=False), torch.no_grad():
        light = tiles.to(torch.float32).div_(255)
        for local, part in ((False, slice(0, 2)), (True, slice(2, None))):
            drawn = _flat(crops, part), _flat(colours, part)
            views.append(_render(light, *drawn, basis=basis, config=config, local=local))
    return Views(global_=views[0], local=views[1], crops=crops)


def _check(tiles: Tensor, config: ViewConfig) -> None:
    shape = tuple(tiles.shape)
    if tiles.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not tiles.numel():
        raise ValueError(f"tiles are {tiles.dtype} {shape}; views are made of uint8 (B, 3, S, S), not empty")
    if shape[3] < config.least_tile_px():
        raise ValueError(
            f"tiles are {shape[3]} px; extended-context translation needs at least {config.least_tile_px()} px for "
            f"crops of {config.global_px} and {config.local_px} px: read larger tiles, "
            "392 px for crops of 224, or set extended_context = 0"
        )


def _flat(drawn: _Drawn, part: slice) -> _Drawn:
    """Return what was drawn for some views (V, B, ...) as rows (V * B, ...)."""
    return type(drawn)(**{f.name: getattr(drawn, f.name)[part].flatten(0, 1) for f in fields(drawn)})


def _render(
    tiles: Tensor,
    crops: Crops,
    colours: Colours,
    *,
    basis: tuple[Tensor, Tensor],
    config: ViewConfig,
    local: bool,
) -> list[Tensor]:
    """Return the views of one size, tensors (B, 3, px, px)."""
    batch, count = len(tiles), len(crops.x)
    px = config.local_px if local else config.global_px
    largest, radius = largest_side(tiles.shape[3], config, local=local), blur_radius(config)
    out = torch.empty(count, 3, px, px, device=tiles.device)
    mean, std = (torch.tensor(v, device=tiles.device)[:, None, None] for v in (config.mean, config.std))
    step = max(1, _PIECE[tiles.device.type] // (px * px))
    for start in range(0, count, step):
        piece = slice(start, start + step)
        rows = torch.arange(count)[piece] % batch
        images = cut(tiles, rows, crops[piece], px=px, largest=largest, radius=radius)
        where = to_device(rows, tiles.device)
        images = recolour(images, colours[piece], (basis[0][where], basis[1][where]))
        torch.div(images.sub_(mean), std, out=out[piece])
    return list(out.view(-1, batch, 3, px, px).unbind(0))
