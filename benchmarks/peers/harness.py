"""What every script in this folder shares: its options, the encoder, its output.

The scripts run inside the environment of the tool they measure, so this file imports only
numpy, torch and timm, which each of those environments has.
"""

import argparse
import importlib.metadata
import json
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

MPP = 0.5
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A timm vision transformer and the tile side in pixels it is fed here."""

    timm_name: str
    tile_px: int


ARCHITECTURES = {
    "vits14": Architecture(timm_name="vit_small_patch14_dinov2", tile_px=224),
    "vits16-dinov3": Architecture(timm_name="vit_small_patch16_dinov3", tile_px=256),
}


def parse_options(description: str, *, backends: Sequence[str] = ()) -> argparse.Namespace:
    """Read the options that every script here takes, and --backend where there are several."""
    parser = argparse.ArgumentParser(description=description)
    if backends:
        parser.add_argument("--backend", choices=backends, required=True)
    parser.add_argument("--slide", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="npz with features and coords")
    parser.add_argument("--encoder", choices=sorted(ARCHITECTURES), default="vits14")
    parser.add_argument("--weights", type=Path, required=True, help="state dict the driver saved")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="torch threads and loader workers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def create_model(encoder: str) -> torch.nn.Module:
    """The timm model of an architecture, untrained, whose output is the class token (B, D)."""
    architecture = ARCHITECTURES[encoder]
    model = timm.create_model(
        architecture.timm_name,
        pretrained=False,
        num_classes=0,
        img_size=architecture.tile_px,
        global_pool="token",
    )
    return model.eval()


def load_model(encoder: str, weights: Path) -> torch.nn.Module:
    """The timm model with every weight taken from the driver's file."""
    model = create_model(encoder)
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"), strict=True)
    return model


class Bf16Encoder(torch.nn.Module):
    """Runs a model under CPU bfloat16 autocast and returns float32.

    For tools that have no switch of their own for bfloat16 on a CPU.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) normalised float32 to (B, D) float32."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(images).float()


def tile_transform():
    """ToTensor and ImageNet normalisation, as each tool's user would write it."""
    from torchvision.transforms import v2

    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=MEAN, std=STD)])


def report(out: Path, features, coords, *, embed_s: float, embed_covers: str, packages) -> None:
    """Write the npz and print one JSON line.

    Args:
        out: Where the npz goes.
        features: (n, D) numbers.
        coords: (n, 2) level-0 top-left x, y.
        embed_s: Seconds spent in reading and encoding.
        embed_covers: What those seconds cover, in words.
        packages: Distributions whose versions are stated.
    """
    features = np.asarray(features, dtype=np.float32)
    coords = np.rint(np.asarray(coords, dtype=np.float64)).astype(np.int64)
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise ValueError(f"features {features.shape} do not fit coordinates {coords.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold numbers that are not finite")
    np.savez(out, features=features, coords=coords)
    rss_kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", *packages)}
    line = {
        "tiles": len(features),
        "embed_s": embed_s,
        "embed_covers": embed_covers,
        "largest_process_rss_mib": rss_kib / 1024,
        "versions": {"python": platform.python_version(), **versions},
    }
    print(json.dumps(line), flush=True)
