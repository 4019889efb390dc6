"""How fast the encoder alone runs on tiles already in memory: the ceiling of a backend.

Nothing of eosin is used: timm and torch, or OpenVINO's own converter and runtime. The slide is
read once, by OpenSlide; neither that nor normalisation is timed.
"""

import json
import time

import harness
import numpy as np
import openslide
import torch
from PIL import Image

TILES = 64
SECONDS = 8.0


def cached_batches(options) -> list[torch.Tensor]:
    """Normalised float32 batches (B, 3, H, W) of tiles spread over the middle of the slide."""
    tile_px = harness.ARCHITECTURES[options.encoder].tile_px
    with openslide.OpenSlide(options.slide) as slide:
        side0_px = round(tile_px * harness.MPP / float(slide.properties[openslide.PROPERTY_NAME_MPP_X]))
        axes = [np.linspace(0.25 * size, 0.75 * size - side0_px, 8).astype(int) for size in slide.dimensions]
        tiles = [
            slide.read_region((int(x), int(y)), 0, (side0_px, side0_px))
            .convert("RGB")
            .resize((tile_px, tile_px), Image.Resampling.BILINEAR)
            for y in axes[1]
            for x in axes[0]
        ]
    transform = harness.tile_transform()
    images = torch.stack([transform(tile) for tile in tiles[:TILES]])
    return [batch.contiguous() for batch in images.split(options.batch) if len(batch) == options.batch]


def torch_runner(model: torch.nn.Module):
    """Run one batch with torch."""

    def run(images: torch.Tensor) -> None:
        with torch.inference_mode():
            model(images)

    return run


def openvino_runner(model: torch.nn.Module, example: torch.Tensor, threads: int):
    """Convert once, compile for this batch shape in bfloat16, run one batch."""
    import openvino

    with torch.inference_mode():
        graph = openvino.convert_model(model, example_input=example, input=[tuple(example.shape)])
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(graph, "CPU", settings)

    def run(images: torch.Tensor) -> None:
        compiled(images.numpy())

    return run


def main() -> None:
    """Warm up, then count batches for a fixed time."""
    options = harness.parse_options(__doc__, backends=("torch-bf16", "torch-fp32", "openvino-bf16"))
    batches = cached_batches(options)
    model = harness.load_model(options.encoder, options.weights)
    if options.backend == "openvino-bf16":
        run = openvino_runner(model, batches[0], options.threads)
    else:
        run = torch_runner(harness.Bf16Encoder(model) if options.backend == "torch-bf16" else model)
    for images in batches[:2]:
        run(images)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        run(batches[done % len(batches)])
        done += 1
    seconds = time.perf_counter() - started
    print(
        json.dumps({"images": done * options.batch, "seconds": seconds, "images_per_s": done * options.batch / seconds})
    )


if __name__ == "__main__":
    main()
