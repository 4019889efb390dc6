"""Write tiatoolbox_reference.npz: what tiatoolbox 2.1.3 makes of three 64 px crops.

    python tests/stain/make_tiatoolbox_reference.py TILE.png TILE.png TILE.png

in an environment of tiatoolbox (it pins another torch than eosin). The crops are the middle 64 px of
three tiles of different slides (CC0, Camelyon16: tumor_004, tumor_001, tumor_064);
crop 0 is the target. Of every output each fourth row and column is kept, so that the file stays small.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tiatoolbox
from PIL import Image
from tiatoolbox.tools.stainnorm import get_normalizer
from tiatoolbox.utils.misc import get_luminosity_tissue_mask


def middle(path: str) -> np.ndarray:
    """Return the middle 64 px of an image, uint8 (64, 64, 3)."""
    image = np.asarray(Image.open(path).convert("RGB"))
    top, left = (image.shape[0] - 64) // 2, (image.shape[1] - 64) // 2
    return image[top : top + 64, left : left + 64].copy()


def main(paths: list[str]) -> None:
    """Run the three normalisers and write their numbers beside this script."""
    crops = np.stack([middle(path) for path in paths])
    tissue = np.stack([get_luminosity_tissue_mask(crop, 0.8) for crop in crops])
    numbers: dict[str, np.ndarray] = {
        "crops": crops,
        "tissue": np.packbits(tissue, axis=-1),
        "version": np.array(tiatoolbox.__version__),
    }
    for method in ("macenko", "vahadane", "reinhard"):
        normaliser = get_normalizer(method)
        normaliser.fit(crops[0].copy())
        numbers[f"{method}_output"] = np.stack([normaliser.transform(crop.copy())[::4, ::4] for crop in crops])
        if method == "reinhard":
            statistics = [normaliser.get_mean_std(crop) for crop in crops]
            numbers["reinhard_mean"] = np.array([s[0] for s in statistics]).reshape(-1, 3)
            numbers["reinhard_std"] = np.array([s[1] for s in statistics]).reshape(-1, 3)
            continue
        matrices = [normaliser.extractor.get_stain_matrix(crop.copy()) for crop in crops]
        stains = [normaliser.get_concentrations(c.copy(), m) for c, m in zip(crops, matrices, strict=True)]
        numbers[f"{method}_matrix"] = np.stack(matrices)
        numbers[f"{method}_concentrations"] = np.stack([np.percentile(s, 99, axis=0) for s in stains])
    np.savez_compressed(Path(__file__).with_name("tiatoolbox_reference.npz"), **numbers)


if __name__ == "__main__":
    main(sys.argv[1:])
