"""The forty lines anyone would write: OpenSlide, Otsu, a DataLoader and torch in bfloat16."""

import time

import cv2
import harness
import numpy as np
import openslide
import torch
from PIL import Image


class Tiles(torch.utils.data.Dataset):
    """Level-0 squares resized to the tile side; each loader worker opens the slide itself."""

    def __init__(self, path, coords, side0_px: int, tile_px: int) -> None:
        self.path, self.coords, self.side0_px, self.tile_px = path, coords, side0_px, tile_px
        self.slide, self.transform = None, harness.tile_transform()

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, i: int) -> torch.Tensor:
        self.slide = self.slide or openslide.OpenSlide(self.path)
        xy = tuple(int(v) for v in self.coords[i])
        tile = self.slide.read_region(xy, 0, (self.side0_px, self.side0_px)).convert("RGB")
        return self.transform(tile.resize((self.tile_px, self.tile_px), Image.Resampling.BILINEAR))


def tissue_coords(slide: openslide.OpenSlide, side0_px: int) -> np.ndarray:
    """Level-0 corners (n, 2) of grid squares at least half covered by Otsu tissue."""
    thumb = np.asarray(slide.get_thumbnail((2048, 2048)).convert("HSV"))[..., 1]
    mask = cv2.threshold(cv2.medianBlur(thumb, 7), 0, 1, cv2.THRESH_OTSU)[1]
    columns, rows = (size // side0_px for size in slide.dimensions)
    side = side0_px * thumb.shape[1] / slide.dimensions[0]
    boxes = [(c, r, *(round(v * side) for v in (c, c + 1, r, r + 1))) for r in range(rows) for c in range(columns)]
    kept = [(c, r) for c, r, x0, x1, y0, y1 in boxes if mask[y0:y1, x0:x1].mean() >= 0.5]
    return np.array(kept, dtype=np.int64).reshape(-1, 2) * side0_px


def main() -> None:
    """Tile, embed, write."""
    options = harness.parse_options(__doc__)
    tile_px = harness.ARCHITECTURES[options.encoder].tile_px
    model = harness.Bf16Encoder(harness.load_model(options.encoder, options.weights))
    slide = openslide.OpenSlide(options.slide)
    side0_px = round(tile_px * harness.MPP / float(slide.properties[openslide.PROPERTY_NAME_MPP_X]))
    coords = tissue_coords(slide, side0_px)
    slide.close()
    started = time.perf_counter()
    loader = torch.utils.data.DataLoader(
        Tiles(options.slide, coords, side0_px, tile_px),
        batch_size=options.batch,
        num_workers=options.threads,
    )
    with torch.inference_mode():
        features = np.concatenate([model(images).numpy() for images in loader])
    harness.report(
        options.out,
        features,
        coords,
        embed_s=time.perf_counter() - started,
        embed_covers="the loop: starting workers, reading, encoding",
        packages=("openslide-python",),
    )


if __name__ == "__main__":
    main()
