"""Embed one slide with LazySlide, through its public API; run it in LazySlide's environment.

The openslide reader is named because LazySlide 0.13.0 never finishes with its fastslide reader
and two loader workers.
"""

import time

import harness
import lazyslide as zs
import torch
from wsidata import open_wsi


def main() -> None:
    """Find tissue, tile, embed, write."""
    options = harness.parse_options(__doc__)
    architecture = harness.ARCHITECTURES[options.encoder]
    model = harness.load_model(options.encoder, options.weights)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return model(images).float()  # LazySlide calls .numpy(), which has no bfloat16

    wsi = open_wsi(str(options.slide), store=None, reader="openslide")
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, architecture.tile_px, mpp=harness.MPP)
    started = time.perf_counter()
    features = zs.tl.feature_extraction(
        wsi,
        encode,
        model_name="bench",
        transform=harness.tile_transform(),
        device="cpu",
        amp=True,
        autocast_dtype=torch.bfloat16,
        batch_size=options.batch,
        num_workers=options.threads,
        pbar=False,
        return_features=True,
    )
    embed_s = time.perf_counter() - started
    coords = wsi.shapes["tiles"].bounds[["minx", "miny"]].to_numpy()
    harness.report(
        options.out,
        features,
        coords,
        embed_s=embed_s,
        embed_covers="feature_extraction: starting workers, reading, encoding, the AnnData table",
        packages=("lazyslide", "wsidata", "openslide-python"),
    )


if __name__ == "__main__":
    main()
