"""A picture of what each augmentation does: `python -m eosin.finetune.augment_picture OUT CELL CELL ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from eosin.errors import CohortError
from eosin.finetune import photometry
from eosin.finetune.augment import AugmentConfig, StainBank, augment, geometry, stain_bank
from eosin.finetune.cells import read_tile
from eosin.finetune.mix import MixConfig, mix_batch
from eosin.finetune.warp import flip
from eosin.stain import jitter_he, jitter_hed, random_macenko

GAP = 4
HEADER = 16
COLUMNS = 9


def augmentation_picture(
    tiles: npt.NDArray[np.uint8], path: str | Path, *, config: AugmentConfig | None = None, seed: int = 0
) -> Path:
    """Write a picture with a column for each augmentation and a row for each tile, in bands of nine columns.

    Strengths are the largest of `config`, or, of stain, geometry and holes, drawn.

    Args:
        tiles: uint8 (n, S, S, 3), at least two, best of different scanners: they are each other's Macenko references.
        path: the file to write; its ending says how.
        config: whose strengths are shown; the default one when None.
        seed: of the draws.

    Returns:
        The path.

    Raises:
        CohortError: fewer than two tiles.
        StainError: no tile shows two stains.
    """
    if len(tiles) < 2:
        raise CohortError(f"the picture needs two tiles or more, found {len(tiles)}: they are mixed and restained")
    bank = stain_bank(tiles, [str(at) for at in range(len(tiles))])
    images = torch.from_numpy(tiles).movedim(-1, 1).float().div_(255)
    shown = effects(images, config or AugmentConfig(), bank, generator=torch.Generator().manual_seed(seed))
    step, band = tiles.shape[1] + GAP, len(tiles) * (tiles.shape[1] + GAP) + HEADER
    size = (min(COLUMNS, len(shown)) * step + GAP, -(-len(shown) // COLUMNS) * band + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for at, (name, changed) in enumerate(shown.items()):
        left, top = GAP + at % COLUMNS * step, GAP + at // COLUMNS * band
        draw.text((left, top), name, fill="black")
        pixels = (changed * 255).round().to(torch.uint8).movedim(1, -1).numpy()
        for row, tile in enumerate(pixels):
            sheet.paste(Image.fromarray(tile), (left, top + HEADER + row * step))
    path = Path(path)
    sheet.save(path, quality=90)
    return path


def effects(images: Tensor, config: AugmentConfig, bank: StainBank, *, generator: torch.Generator) -> dict[str, Tensor]:
    """Return images (n, 3, S, S) in 0-1 after each augmentation alone, under its name and strength.

    Args:
        images: (n, 3, S, S) float in 0-1.
        config: strengths.
        bank: of the images; each is shown in the next one's stain.
        generator: source of what is drawn.
    """
    ones = torch.ones(len(images))
    px = 1 / config.mpp
    others = [bank.targets[(at + 1) % len(bank.targets)] for at in range(len(images))]
    restained = [random_macenko(i[None], [t], generator)[0] for i, t in zip(images, others, strict=True)]
    he, _ = jitter_he(images, generator=generator, scale=config.he_scale, shift=config.he_shift)
    hed, _ = jitter_hed(images, generator=generator, scale=config.hed_scale, shift=config.hed_shift)
    low, high = config.jpeg_quality
    return {
        "as scanned": images,
        "Macenko": torch.cat(restained),
        "H&E jitter": he,
        "HED jitter": hed,
        f"blur {config.blur_um:g} um": photometry.blur(images, ones * config.blur_um * px),
        f"defocus {config.defocus_um:g} um": photometry.defocus(images, ones * config.defocus_um * px),
        f"brightness {1 - config.brightness:g}": photometry.brightness(images, ones * (1 - config.brightness)),
        f"contrast {1 + config.contrast:g}": photometry.contrast(images, ones * (1 + config.contrast)),
        f"saturation {1 + config.saturation:g}": photometry.saturation(images, ones * (1 + config.saturation)),
        f"hue {config.hue_deg:+g} deg": photometry.hue(images, ones * config.hue_deg),
        "grey": photometry.grey(images),
        f"JPEG {low} of {low}-{high}": photometry.jpeg(images, ones * low),
        "flip": flip(images, horizontal=ones.bool(), vertical=~ones.bool()),
        "warp": geometry(images, replace(config, flip_chance=0.0, warp_chance=1.0), generator),
        "dropout": augment(images, replace(config, families=("dropout",), dropout_chance=1.0), generator=generator),
        "MixUp": mix_batch(images, MixConfig(mixup_chance=1.0, mixup_alpha=1.0), generator=generator).images,
        "CutMix": mix_batch(images, MixConfig(mixup_chance=0.0, cutmix_chance=1.0), generator=generator).images,
        "all, as drawn": augment(images, config, generator=generator, bank=bank.targets),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture of the cells named on the command line."""
    parser = argparse.ArgumentParser(description="Show what each augmentation does to some cells.")
    parser.add_argument("out", type=Path, help="the picture to write, .jpg or .png")
    parser.add_argument("cell", type=Path, nargs="+", help="two or more cell crops, best of different scanners")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    tiles = np.stack([read_tile(path) for path in given.cell])
    augmentation_picture(tiles, given.out, seed=given.seed)


if __name__ == "__main__":
    main()
