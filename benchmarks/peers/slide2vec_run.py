"""Embed one slide with slide2vec, through its public API; run it in slide2vec's environment.

slide2vec applies autocast on CUDA only, so the encoder registered here does it itself.
"""

import tempfile
import time
from pathlib import Path

import harness
import numpy as np
from hs2p import PreviewConfig, SlideSpec, TilingConfig
from slide2vec import (
    ExecutionOptions,
    Model,
    Pipeline,
    PreprocessingConfig,
    TorchTileEncoder,
    register_encoder,
)


def register(options) -> int:
    """Register the benchmark's encoder as slide2vec's guide for own models says.

    Returns:
        The tile side in pixels.
    """
    architecture = harness.ARCHITECTURES[options.encoder]
    model = harness.load_model(options.encoder, options.weights)

    @register_encoder(
        "bench",
        encode_dim=model.num_features,
        input_size=architecture.tile_px,
        supports_variable_input_size=False,
        supported_spacing_um=None,
        default_spacing_um=harness.MPP,
        precision="fp32",
    )
    class BenchEncoder(TorchTileEncoder):
        def __init__(self, *, output_variant: str | None = None) -> None:
            super().__init__(
                harness.Bf16Encoder(model),
                encode_dim=model.num_features,
                input_size=architecture.tile_px,
                mean=harness.MEAN,
                std=harness.STD,
                output_variant=output_variant,
            )

    return architecture.tile_px


def main() -> None:
    """Tile, embed, write."""
    options = harness.parse_options(__doc__)
    tile_px = register(options)
    slide = SlideSpec(sample_id="slide", image_path=options.slide)
    preprocessing = PreprocessingConfig(
        tiling=TilingConfig(
            requested_spacing_um=harness.MPP,
            requested_tile_size_px=tile_px,
            tolerance=0.05,
            overlap=0.0,
        ),
        preview=PreviewConfig(save_mask_preview=False, save_tiling_preview=False),
        # slide2vec starts cpu_count // num_cucim_workers loader processes, each with that many
        # cuCIM threads: 1 gives the same number of loader processes as the other tools have.
        num_cucim_workers=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        execution = ExecutionOptions(
            output_dir=Path(folder),
            output_format="npz",
            batch_size=options.batch,
            num_workers_per_gpu=options.threads,
            precision="fp32",
        )
        pipeline = Pipeline(Model.from_preset("bench", device="cpu"), preprocessing, execution=execution)
        pipeline.run(slides=[slide], tiling_only=True)
        started = time.perf_counter()
        result = pipeline.run_with_coordinates(folder, slides=[slide])
        embed_s = time.perf_counter() - started
        with np.load(result.tile_artifacts[0].path) as arrays:
            features = arrays["features"]
        with np.load(next(Path(folder).glob("tiles/*.coordinates.npz"))) as arrays:
            coords = np.stack([arrays["x"], arrays["y"]], axis=1)
    harness.report(
        options.out,
        features,
        coords,
        embed_s=embed_s,
        embed_covers="run_with_coordinates: starting workers, reading, encoding, the npz file",
        packages=("slide2vec", "hs2p", "cucim-cu12"),
    )


if __name__ == "__main__":
    main()
