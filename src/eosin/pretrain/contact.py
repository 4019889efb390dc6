"""A picture of what the views of some tiles look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from eosin.pretrain.crops import Crops
from eosin.pretrain.view_config import ViewConfig
from eosin.pretrain.views import make_views

GAP = 6
HEADER = 18
GLOBAL_COLOURS = ("#0050ff", "#00a000")
LOCAL_COLOUR = "#202020"


def contact_sheet(tiles: Tensor, config: ViewConfig, path: str | Path, *, seed: int = 0) -> Path:
    """Write a PNG with a row for each tile: the tile with its boxes, the two global views, the local views.

    The tile is shown at the size of a global view, with the boxes of the global views in blue and green and those of
    the local ones in black; views are shown pixel for pixel, before normalisation.

    Args:
        tiles: uint8 (B, 3, S, S).
        config: what makes the views.
        path: the file to write, `.png`.
        seed: of the views.

    Returns:
        The path.
    """
    views = make_views(tiles, config, torch.Generator().manual_seed(seed))
    big, small = config.global_px, config.local_px
    stacked = max(1, round((big + GAP) / (small + GAP)))
    columns = -(-config.local_crops // stacked)
    height = max(big, stacked * (small + GAP) - GAP if columns else 0) + GAP
    sheet = Image.new("RGB", (3 * (big + GAP) + columns * (small + GAP) + GAP, HEADER + len(tiles) * height), "white")
    _write_header(ImageDraw.Draw(sheet), tile_px=tiles.shape[3], config=config)
    globals_, locals_ = ([_to_uint8(view, config) for view in group] for group in (views.global_, views.local))
    for row in range(len(tiles)):
        top = HEADER + row * height
        sheet.paste(_tile_with_boxes(tiles[row], views.crops, row, shown_px=big), (GAP, top))
        for i, view in enumerate(globals_):
            sheet.paste(Image.fromarray(view[row]), (GAP + (i + 1) * (big + GAP), top))
        for i, view in enumerate(locals_):
            left = GAP + 3 * (big + GAP) + i // stacked * (small + GAP)
            sheet.paste(Image.fromarray(view[row]), (left, top + i % stacked * (small + GAP)))
    path = Path(path)
    sheet.save(path, format="PNG")
    return path


def _write_header(draw: ImageDraw.ImageDraw, *, tile_px: int, config: ViewConfig) -> None:
    words = [f"tile, {tile_px} px", "global 1", "global 2"]
    words += [f"{config.local_crops} local, {config.local_px} px"] if config.local_crops else []
    for i, word in enumerate(words):
        draw.text((GAP + i * (config.global_px + GAP), 3), word, fill="black")


def _to_uint8(view: Tensor, config: ViewConfig) -> npt.NDArray[np.uint8]:
    """Return a view (B, 3, H, W) without its normalisation, uint8 (B, H, W, 3)."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    return (view.cpu() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8).movedim(1, 3).numpy()


def _tile_with_boxes(tile: Tensor, crops: Crops, row: int, *, shown_px: int) -> Image.Image:
    zoom = shown_px / tile.shape[2]
    image = Image.fromarray(tile.cpu().movedim(0, 2).numpy()).resize((shown_px, shown_px), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    boxes = torch.stack([crops.x, crops.y, crops.x + crops.width, crops.y + crops.height], -1)[:, row] * zoom
    for view in reversed(range(len(boxes))):
        left, top, right, bottom = boxes[view].tolist()
        colour = GLOBAL_COLOURS[view] if view < 2 else LOCAL_COLOUR
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=3 if view < 2 else 1)
    return image
