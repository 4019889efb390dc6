"""Fit the default targets of eosin.stain for Vahadane and Reinhard.

    python tests/stain/make_default_target.py CMU-1-Small-Region.svs

prints their JSON. The default of Macenko is published (the reference of the code released with the
paper); this gives the other two the same appearance: the CC0 slide CMU-1-Small-Region (OpenSlide
test data) is normalised to it as a whole and measured. The tiles are the slide's 224 px squares at
its own 0.499 mpp, without overlap, with OD >= 0.15 in all channels of at least half the pixels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import openslide
import torch

from eosin.stain import LabTarget, Macenko, Reinhard, StainTarget, Vahadane, default_target

TILE_PX = 224


def tissue_tiles(path: Path) -> np.ndarray:
    """Return the slide's tiles with tissue, uint8 (N, 224, 224, 3)."""
    with openslide.OpenSlide(path) as slide:
        image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    rows, columns = image.shape[0] // TILE_PX, image.shape[1] // TILE_PX
    cut = image[: rows * TILE_PX, : columns * TILE_PX].reshape(rows, TILE_PX, columns, TILE_PX, 3)
    tiles = np.ascontiguousarray(cut.swapaxes(1, 2)).reshape(-1, TILE_PX, TILE_PX, 3)
    density = -np.log((tiles.astype(np.float32) + 1) / 240)
    return tiles[(density >= 0.15).all(3).mean((1, 2)) >= 0.5]


def default_targets(path: Path) -> dict[str, StainTarget | LabTarget]:
    """Return the fitted targets by method."""
    tiles = torch.from_numpy(tissue_tiles(path)).movedim(-1, 1)
    restained, unchanged = Macenko().normalise(tiles, Macenko().fit(tiles), default_target("macenko"))
    assert not unchanged.any()
    return {"vahadane": Vahadane().fit(restained).target(), "reinhard": Reinhard().fit(restained).target()}


if __name__ == "__main__":
    print(json.dumps({name: target.to_dict() for name, target in default_targets(Path(sys.argv[1])).items()}, indent=1))
