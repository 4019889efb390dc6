"""Embed one slide with eosin, under the same options and report as the other tools."""

import tempfile
import time
from pathlib import Path

import harness

import eosin
from eosin.encoders import load_encoder
from eosin.tiles import TileSpec

BACKENDS = ("openvino", "torch")


def embed(options, folder: Path):
    """Load the encoder, then time one `eosin.extract` with eosin's own number of readers.

    Returns:
        Features (n, D), level-0 corners (n, 2) and the seconds `extract` took.
    """
    architecture = harness.ARCHITECTURES[options.encoder]
    encoder = load_encoder(str(options.weights), device="cpu", precision="bf16", backend=options.backend)
    spec = TileSpec(tile_px=architecture.tile_px, mpp=harness.MPP)
    started = time.perf_counter()
    store = eosin.extract(options.slide, spec, encoder, out=folder, batch_size=options.batch)
    embed_s = time.perf_counter() - started
    features = store[options.slide.name]
    return features.x, features.xy, embed_s


def main() -> None:
    """Tile, embed, write."""
    options = harness.parse_options(__doc__, backends=BACKENDS)
    with tempfile.TemporaryDirectory() as folder:
        features, coords, embed_s = embed(options, Path(folder) / "features")
        harness.report(
            options.out,
            features,
            coords,
            embed_s=embed_s,
            embed_covers="extract: starting readers, tissue, grid, reading, QC, encoding, the HDF5 file",
            packages=("eosin", "openvino"),
        )


if __name__ == "__main__":
    main()
