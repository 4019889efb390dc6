"""Slides that the tests write themselves.

`coordinates` encodes each pixel's own x and y, so a wrong offset fails loudly; `histology`
draws stained-looking tissue with a known mask. `write_tiff` and `write_ome` put pixels into
pyramids that OpenSlide and tifffile open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Compression = Literal["deflate", "jpeg", "lzw", "none", "jpeg2000"]
Flavour = Literal["aperio", "generic"]
BRIGHT = 243
HAEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.07, 0.99, 0.11)
DAB = (0.27, 0.57, 0.78)


def coordinates(width: int, height: int) -> Pixels:
    """Return uint8 (height, width, 3): red = x mod 256, green = y mod 256, blue = x // 256 + 16 * (y // 256)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, x // 256 + 16 * (y // 256)], axis=2).astype(np.uint8)


def decode_coordinates(rgb: Pixels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the (x, y) that `coordinates` wrote into unresampled pixels."""
    red, green, blue = (rgb[..., i].astype(np.int64) for i in range(3))
    return red + 256 * (blue % 16), green + 256 * (blue // 16)


def ramp(width: int, height: int, seed: int = 0) -> Pixels:
    """Return a smooth picture: red rises with x, green with y, from 0 to 255 over the whole side; blue is 128.

    It survives resampling, since the mean of a region is the value at its centre: rounding to 8
    bits is dithered, hence without bias. A pyramid of ramps is exact at every level.
    """
    dither = np.random.default_rng(seed).random((height, width, 2))
    picture = np.full((height, width, 3), 128.0)
    picture[..., 0] = (np.arange(width) + 0.5)[None] * 255 / width + dither[..., 0]
    picture[..., 1] = (np.arange(height) + 0.5)[:, None] * 255 / height + dither[..., 1]
    return np.clip(np.floor(picture), 0, 255).astype(np.uint8)


def reduced(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Return `pixels` as a pyramid level of (width, height), averaged over boxes."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def pyramid_sizes(size: tuple[int, int], factors: Sequence[float], *, ceil: bool = False) -> list[tuple[int, int]]:
    """Return the (width, height) of each level below level 0, rounded down or up."""
    to_int = np.ceil if ceil else np.floor
    return [(max(1, int(to_int(size[0] / f))), max(1, int(to_int(size[1] / f)))) for f in factors]


@dataclass(frozen=True, kw_only=True)
class TiffStyle:
    """How `write_tiff` lays a slide out.

    Attributes:
        flavour: "aperio" opens as SVS; "generic" as a plain tiled TIFF.
        compression: codec of the tiles.
        tile: side of a native tile, a multiple of 16.
        factors: downsample of each further level.
        ceil: round the sizes of the levels up instead of down.
        sub_ifds: keep the further levels in SubIFDs instead of pages (generic only).
        mpp: microns per pixel, or (x, y) for generic; None leaves it out.
        power: objective power (aperio only).
        quality: of JPEG.
        icc: ICC profile.
    """

    flavour: Flavour = "aperio"
    compression: Compression = "deflate"
    tile: int = 256
    factors: tuple[float, ...] = (2, 4)
    ceil: bool = False
    sub_ifds: bool = False
    mpp: float | tuple[float, float] | None = 0.25
    power: float | None = 40
    quality: int = 90
    icc: bytes | None = None


def write_tiff(path: Path, pixels: Pixels, style: TiffStyle | None = None, levels: Sequence[Pixels] = ()) -> Path:
    """Write `pixels` (and `levels`, else box-averaged reductions) as a tiled TIFF pyramid."""
    style = style or TiffStyle()
    height, width = pixels.shape[:2]
    if not levels:
        levels = [reduced(pixels, size) for size in pyramid_sizes((width, height), style.factors, ceil=style.ceil)]
    options = _options(style, pixels)
    with tifffile.TiffWriter(path) as tiff:
        description = _aperio(pixels, style) if style.flavour == "aperio" else None
        tiff.write(
            pixels,
            subifds=len(levels) if style.sub_ifds else 0,
            iccprofile=style.icc,
            description=description,
            **options,
        )
        if style.flavour == "aperio":
            # An SVS has its stripped thumbnail as the second page.
            thumbnail = reduced(pixels, (max(1, width // 8), max(1, height // 8)))
            tiff.write(
                thumbnail, photometric="rgb", rowsperstrip=16, description="Aperio Image Library v12.0.0", metadata=None
            )
        for level in levels:
            tiff.write(level, subfiletype=1, description=_aperio(level, style) if description else None, **options)
    return path


def _options(style: TiffStyle, pixels: Pixels) -> dict:
    options: dict = {"tile": (style.tile, style.tile), "metadata": None, "photometric": "rgb"}
    if style.compression == "jpeg":
        # From photometric "rgb" tifffile makes YCbCr JPEG; given "ycbcr" it takes the pixels as YCbCr.
        options |= {"compression": "jpeg", "compressionargs": {"level": style.quality}}
    elif style.compression != "none":
        options["compression"] = {"deflate": "zlib"}.get(style.compression, style.compression)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        options["photometric"] = "minisblack"
    elif pixels.shape[2] == 4:
        options["extrasamples"] = ["unassalpha"]
    if style.flavour == "generic" and style.mpp is not None:
        x, y = style.mpp if isinstance(style.mpp, tuple) else (style.mpp, style.mpp)
        options |= {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
    return options


def _aperio(pixels: Pixels, style: TiffStyle) -> str:
    height, width = pixels.shape[:2]
    text = f"Aperio Image Library v12.0.0\r\n{width}x{height} ({style.tile}x{style.tile}) made for tests"
    if style.power is not None:
        text += f"|AppMag = {style.power:g}"
    if style.mpp is not None:
        text += f"|MPP = {style.mpp:g}"
    return text


def write_ome(
    path: Path,
    pixels: npt.NDArray[np.generic],
    *,
    size: tuple[float, float] = (0.25, 0.25),
    unit: str = "µm",
    axes: str = "YXS",
    compression: str | None = "zlib",
) -> Path:
    """Write an OME-TIFF with its pyramid in SubIFDs and PhysicalSizeX/Y in `unit`."""
    metadata = {
        "axes": axes,
        "PhysicalSizeX": size[0],
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeY": size[1],
        "PhysicalSizeYUnit": unit,
    }
    photometric = "rgb" if axes.endswith("S") else "minisblack"
    options: dict = {"tile": (128, 128), "compression": compression, "photometric": photometric}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        levels = 1 if pixels.dtype == np.uint8 and pixels.ndim == 3 and axes == "YXS" else 0
        tiff.write(pixels, subifds=levels, metadata=metadata, **options)
        if levels:
            height, width = pixels.shape[:2]
            tiff.write(reduced(pixels, (width // 2, height // 2)), subfiletype=1, **options)
    return path


def truncated(source: Path, target: Path, keep: float) -> Path:
    """Write the first `keep` share of `source`'s bytes."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * keep)])
    return target


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: int) -> npt.NDArray[np.float32]:
    """Return smooth noise in 0-1: random values every `cell` pixels, bicubic between."""
    small = rng.random((shape[0] // cell + 3, shape[1] // cell + 3), dtype=np.float32)
    grown = Image.fromarray(small).resize((small.shape[1] * cell, small.shape[0] * cell), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(grown)[cell : cell + shape[0], cell : cell + shape[1]], 0, 1)


def _blobs(rng: np.random.Generator, shape: tuple[int, int], count: int) -> npt.NDArray[np.bool_]:
    """Return `count` wobbly ellipses, clear of the border."""
    height, width = shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    mask = np.zeros(shape, dtype=bool)
    wobble = _noise(rng, shape, max(8, min(shape) // 8)) * 0.5
    for i in range(count):
        centre = (width * (i + 0.5) / count, height * rng.uniform(0.4, 0.6))
        radius = (width * 0.36 / count, height * rng.uniform(0.25, 0.34))
        mask |= ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 < 1 - wobble
    return mask


def _nuclei(rng: np.random.Generator, mask: npt.NDArray[np.bool_], radius: float) -> npt.NDArray[np.float32]:
    """Return the nuclear stain in 0-1: soft discs of about `radius` pixels scattered over `mask`."""
    height, width = mask.shape
    density = np.zeros(mask.shape, dtype=np.float32)
    half = int(radius * 1.6) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    count = int(mask.sum() / (radius * radius * 22))
    ys, xs = np.nonzero(mask)
    for at in rng.integers(0, len(ys), count) if len(ys) else ():
        cy, cx = int(ys[at]), int(xs[at])
        if not (half <= cy < height - half and half <= cx < width - half):
            continue
        stretch, angle = rng.uniform(1.0, 1.5), rng.uniform(0, np.pi)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        disc = 1 / (1 + np.exp(np.hypot(u / stretch, v * stretch) - radius))
        target = density[cy - half : cy + half + 1, cx - half : cx + half + 1]
        np.maximum(target, disc * rng.uniform(0.7, 1.0), out=target)
    return density * mask


def _stained(
    amounts: Sequence[tuple[npt.NDArray[np.float32], tuple[float, float, float]]], rng: np.random.Generator
) -> Pixels:
    """Return the picture of stain amounts by Beer-Lambert: I = I0 * 10^(-sum of OD), with sensor noise."""
    optical = sum(amount[..., None] * np.asarray(vector, dtype=np.float32) for amount, vector in amounts)
    clean = BRIGHT * np.power(10.0, -np.asarray(optical))
    noise = rng.normal(0, 1.2, clean.shape[:2])[..., None]
    return np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)


def histology(
    width: int, height: int, *, seed: int = 0, blobs: int = 2, kind: Literal["he", "ihc"] = "he", mpp: float = 0.25
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Return a stained-looking slide and its truth mask, uint8 (H, W, 3) and bool (H, W).

    Args:
        width: of the slide.
        height: of the slide.
        seed: same seed, same pixels.
        blobs: pieces of tissue; 0 = blank; -1 = tissue everywhere.
        kind: "he", or "ihc": pale blue counterstain with brown cells in a third of the tissue.
        mpp: sets the size of the nuclei (about 3.5 µm radius).
    """
    rng = np.random.default_rng(seed)
    shape = (height, width)
    mask = np.ones(shape, dtype=bool) if blobs < 0 else _blobs(rng, shape, blobs)
    radius = max(1.5, 3.5 / mpp)
    nuclei = _nuclei(rng, mask, radius)
    fibres = (0.25 + 0.5 * _noise(rng, shape, max(4, int(4 / mpp)))) * mask
    if kind == "he":
        return _stained([(0.75 * nuclei + 0.06 * fibres, HAEMATOXYLIN), (0.55 * fibres, EOSIN)], rng), mask
    positive = _noise(rng, shape, max(8, int(40 / mpp))) > 0.6
    brown = nuclei * positive + 0.1 * fibres * positive
    return _stained([(0.4 * nuclei * ~positive + 0.12 * fibres, HAEMATOXYLIN), (0.7 * brown, DAB)], rng), mask


def pen(
    pixels: Pixels, *, colour: tuple[int, int, int] = (20, 70, 200), thickness: int = 24
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Return a copy with a marker-pen arc drawn across it, and where."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    distance = np.abs(np.hypot(x - width * 0.5, y + height * 0.2) - height * 0.45)
    stroke = (distance < thickness / 2) & (x > width * 0.2) & (x < width * 0.8)
    out = pixels.copy()
    out[stroke] = (out[stroke] * 0.12 + np.asarray(colour) * 0.88).astype(np.uint8)
    return out, stroke
