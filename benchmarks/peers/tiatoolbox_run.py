"""Embed one slide with TIAToolbox, through its public API; run it in TIAToolbox's environment."""

import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
import zarr
from tiatoolbox.models.engine.deep_feature_extractor import DeepFeatureExtractor
from tiatoolbox.models.engine.io_config import IOPatchPredictorConfig
from tiatoolbox.models.models_abc import ModelABC
from tiatoolbox.wsicore.wsireader import WSIReader


class BenchModel(ModelABC):
    """The benchmark's encoder behind the interface TIAToolbox asks of a user's own model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = harness.Bf16Encoder(model)
        transform = harness.tile_transform()
        self.preproc_func = lambda image: transform(image).permute(1, 2, 0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) to (B, D)."""
        return self.encoder(images)

    @staticmethod
    def infer_batch(model: torch.nn.Module, batch_data: torch.Tensor, *, device: str):
        """Encode one loader batch, (B, H, W, 3), as TIAToolbox's own timm models do."""
        with torch.inference_mode():
            images = batch_data.to(device).permute(0, 3, 1, 2).contiguous()
            return [model(images).cpu().numpy()]


class TimedExtractor(DeepFeatureExtractor):
    """TIAToolbox's extractor with a stopwatch around its reading and encoding."""

    embed_s = 0.0

    def infer_wsi(self, dataloader, save_path, **kwargs):
        """Time the inherited method; the rest of a run is masks and saving."""
        started = time.perf_counter()
        result = super().infer_wsi(dataloader, save_path, **kwargs)
        self.embed_s += time.perf_counter() - started
        return result


def main() -> None:
    """Mask, tile and embed in one engine run, write."""
    options = harness.parse_options(__doc__)
    tile_px = harness.ARCHITECTURES[options.encoder].tile_px
    resolution = [{"units": "mpp", "resolution": harness.MPP}]
    extractor = TimedExtractor(
        model=BenchModel(harness.load_model(options.encoder, options.weights)),
        batch_size=options.batch,
        num_workers=options.threads,
        device="cpu",
        verbose=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        outputs = extractor.run(
            [options.slide],
            patch_mode=False,
            ioconfig=IOPatchPredictorConfig(
                input_resolutions=resolution,
                output_resolutions=resolution,
                patch_input_shape=(tile_px, tile_px),
                stride_shape=(tile_px, tile_px),
            ),
            auto_get_mask=True,
            save_dir=Path(folder) / "out",
            output_type="zarr",
        )
        saved = zarr.open(str(outputs[options.slide]), mode="r")
        features = np.asarray(saved["features"])
        coords_at_mpp = np.asarray(saved["coordinates"])[:, :2]
    slide_mpp = np.asarray(WSIReader.open(options.slide).info.mpp, dtype=np.float64)
    harness.report(
        options.out,
        features,
        coords_at_mpp * (harness.MPP / slide_mpp),
        embed_s=extractor.embed_s,
        embed_covers="infer_wsi: starting workers, reading, encoding",
        packages=("tiatoolbox", "openslide-python"),
    )


if __name__ == "__main__":
    main()
