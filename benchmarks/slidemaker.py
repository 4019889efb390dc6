"""Write a large Aperio-like slide with real texture, for the benchmarks.

    python benchmarks/slidemaker.py /somewhere/big.svs --size-px 24576

Tiles of 256 px, JPEG quality 80, 4:2:0, shared tables, 0.25 mpp, levels 1, 4 and 16. The picture is a
mosaic of 1,024 px pieces cut at random from a real H&E slide (mirrored, stain strength varied a
little) inside a disc, on a bright, slightly noisy background. The source was scanned at 0.5 mpp and is not
enlarged, so there is more detail per pixel than in a true 0.25 mpp scan and the JPEG work is not flattered.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import simplejpeg
import tifffile

Pixels = npt.NDArray[np.uint8]

TILE_PX, CELL_PX, QUALITY, MPP, FACTORS = 256, 1024, 80, 0.25, (1, 4, 16)
UNIT_PX = TILE_PX * FACTORS[-1]
BACKGROUND = (241, 240, 242)
TABLE_CODES = (0xDB, 0xC4)
SOI, EOI = b"\xff\xd8", b"\xff\xd9"


def real_data() -> Path:
    """Return the folder of real data: $EOSIN_DATA or ../shared/data beside the repository."""
    return Path(os.environ.get("EOSIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def source_texture() -> Pixels:
    """Return real H&E, uint8 (H, W, 3), mirrored to both sides so that crops never meet an edge."""
    with openslide.OpenSlide(real_data() / "slides" / "CMU-1-Small-Region.svs") as slide:
        image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    wide = np.concatenate([image, image[:, ::-1]], axis=1)
    return np.concatenate([wide, wide[::-1]], axis=0)


def tissue_corners(texture: Pixels, *, least: float = 0.6) -> npt.NDArray[np.int64]:
    """Return the (top, left) of the cells of `texture` that tissue fills to at least this share, int64 (n, 2)."""
    step = CELL_PX // 8
    coarse = texture[::16, ::16].astype(float)
    tissue = coarse.max(axis=2) - coarse.min(axis=2) > 30
    tops = range(0, texture.shape[0] - CELL_PX, step)
    lefts = range(0, texture.shape[1] - CELL_PX, step)
    side = CELL_PX // 16
    places = [(t, f) for t in tops for f in lefts if tissue[t // 16 :, f // 16 :][:side, :side].mean() >= least]
    return np.asarray(places, dtype=np.int64)


class Mosaic:
    """The level-0 picture, computed on demand: `band(top)` gives 256 rows of it."""

    def __init__(self, size_px: int, seed: int) -> None:
        self.size_px, self.seed, self.texture = size_px, seed, source_texture()
        self.corners = tissue_corners(self.texture)
        noise = np.random.default_rng(seed).normal(0, 1.5, (CELL_PX, CELL_PX, 1))
        self.background = np.clip(np.rint(np.asarray(BACKGROUND) + noise), 0, 255).astype(np.uint8)

    def is_tissue(self, row: int, column: int) -> bool:
        """Return whether the cell's centre lies in a disc of 45 % of the side."""
        centre = self.size_px / CELL_PX / 2
        return (row + 0.5 - centre) ** 2 + (column + 0.5 - centre) ** 2 < (0.9 * centre) ** 2

    def cell(self, row: int, column: int, rows: slice) -> Pixels:
        """Return `rows` of one cell, uint8 (rows, 1024, 3)."""
        if not self.is_tissue(row, column):
            return self.background[rows]
        rng = np.random.default_rng([self.seed, row, column])
        top, left = self.corners[rng.integers(len(self.corners))]
        # Powers of the transmittance vary the stain's strength and leave white glass white.
        power = rng.uniform(0.8, 1.2, 3)
        lookup = np.rint(255 * (np.arange(256)[:, None] / 255) ** power).astype(np.uint8)
        piece = np.ascontiguousarray(self.texture[top + rows.start : top + rows.stop, left : left + CELL_PX])
        return np.asarray(cv2.LUT(piece, lookup[None]), dtype=np.uint8)

    def band(self, top: int) -> Pixels:
        """Return level-0 rows `top` to `top + 256`, uint8 (256, size, 3)."""
        row, start = divmod(top, CELL_PX)
        rows = slice(start, start + TILE_PX)
        return np.concatenate([self.cell(row, column, rows) for column in range(self.size_px // CELL_PX)], axis=1)

    def reduced_band(self, top: int, factor: int) -> Pixels:
        """Return 256 rows from `top` on of the level reduced by box means, uint8 (256, size // factor, 3)."""
        if factor == 1:
            return self.band(top)
        size = (self.size_px // factor, TILE_PX // factor)
        bands = (self.band(top * factor + at * TILE_PX) for at in range(factor))
        reduced = [np.asarray(cv2.resize(band, size, interpolation=cv2.INTER_AREA), dtype=np.uint8) for band in bands]
        return np.concatenate(reduced, axis=0)


def split_tables(stream: bytes) -> tuple[bytes, bytes]:
    """Return (abbreviated stream without tables and JFIF marker, JPEGTables)."""
    body, tables, at = SOI, SOI, 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] in TABLE_CODES:
            tables += stream[at:end]
        elif stream[at + 1] != 0xE0:
            body += stream[at:end]
        at = end
    return body + stream[at:], tables + EOI


def encode(tile: Pixels) -> tuple[bytes, bytes]:
    """Return (abbreviated stream, tables) of one tile."""
    stream = simplejpeg.encode_jpeg(np.ascontiguousarray(tile), QUALITY, colorsubsampling="420")
    return split_tables(stream)


def level_streams(mosaic: Mosaic, factor: int, tables: bytes) -> Iterator[bytes]:
    """Yield the abbreviated streams of one level, row-major."""
    size = mosaic.size_px // factor
    for top in range(0, size, TILE_PX):
        band = mosaic.reduced_band(top, factor)
        for left in range(0, size, TILE_PX):
            body, own = encode(band[:, left : left + TILE_PX])
            if own != tables:
                raise RuntimeError("the encoder changed its tables between tiles; they cannot be shared")
            yield body


def verify(path: Path, mosaic: Mosaic) -> float:
    """Return the worst per-channel mean error of read-back tiles; raise when a colour is wrong."""
    worst = 0.0
    rng = np.random.default_rng(mosaic.seed)
    with openslide.OpenSlide(path) as slide:
        for level, factor in enumerate(FACTORS):
            side = mosaic.size_px // factor
            for top in rng.integers(side // TILE_PX, size=3) * TILE_PX:
                left = int(rng.integers(side // TILE_PX)) * TILE_PX
                at = (left * factor, int(top) * factor)
                found = np.asarray(slide.read_region(at, level, (TILE_PX, TILE_PX)))[..., :3].astype(float)
                wanted = mosaic.reduced_band(int(top), factor)[:, left : left + TILE_PX]
                worst = max(worst, float(np.abs((found - wanted).mean(axis=(0, 1))).max()))
    if worst > 2:
        raise RuntimeError(f"{path}: colours differ by {worst:.1f} grey levels on average after reading back")
    return worst


def make_slide(path: Path, *, size_px: int = 24_576, seed: int = 0) -> float:
    """Write the slide in bounded memory, read it back, return the worst mean colour error.

    Args:
        path: where to write; a `.svs` name suits.
        size_px: side of the square level 0, a multiple of 4,096.
        seed: of the mosaic.
    """
    if size_px < UNIT_PX or size_px % UNIT_PX:
        raise ValueError(f"size_px is {size_px}; it must be a multiple of {UNIT_PX}")
    cv2.setNumThreads(1)
    mosaic = Mosaic(size_px, seed)
    tables = encode(mosaic.background[:TILE_PX, :TILE_PX])[1]
    part = path.with_name(path.name + ".part")
    with tifffile.TiffWriter(part, bigtiff=size_px > 65_536) as writer:
        for factor in FACTORS:
            side = size_px // factor
            text = (
                f"Aperio Image Library v11.2.1\r\n{size_px}x{size_px} [0,0 {size_px}x{size_px}] "
                f"({TILE_PX}x{TILE_PX}) -> {side}x{side} JPEG/RGB Q={QUALITY}|AppMag = 40|MPP = {MPP}"
            )
            writer.write(
                level_streams(mosaic, factor, tables),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                compression="jpeg",
                photometric="ycbcr",  # what the streams hold; given RGB samples this would turn them magenta
                subsampling=(2, 2),
                jpegtables=tables,
                description=text,
                metadata=None,
                subfiletype=0 if factor == 1 else 1,
            )
    worst = verify(part, mosaic)
    part.replace(path)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a large Aperio-like slide with real texture.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--size-px", type=int, default=24_576)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    worst = make_slide(given.path, size_px=given.size_px, seed=given.seed)
    print(f"{given.path}: {given.path.stat().st_size / 2**20:.0f} MiB, worst mean colour error {worst:.2f} grey levels")


if __name__ == "__main__":
    main()
