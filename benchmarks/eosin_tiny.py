"""The data, the training and the evaluation of eosin-tiny.

    python benchmarks/eosin_tiny.py tiles DATA --out TILES
    eosin pretrain --config docs/pretrain-eosin-tiny.toml --out RUN       (from the folder that holds TILES)

DATA holds slides/ and tiles/amf/labels.csv. `tiles` cuts the H&E slides at several microns per pixel, copies the crops
of `midog21` and writes `tiles.csv`; atnorm-br is left out, it is the external test.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

from PIL import Image

import eosin

TILE_PX = 128
SLIDES = {
    "CMU-1-Small-Region.svs": (None, (0.5, 1.0, 2.0)),
    "OS-1-detail.ome.tif": (None, (0.25, 0.5, 1.0)),
    "tcga-cr-7395-01a-01-ts1.svs": (1.0, (1.0, 2.0)),
    "prostate-2500px.jpeg": (0.5, (0.5, 1.0, 2.0)),
}
"""Microns per pixel of the files that do not say (by eye: nuclei of 7 to 8 um), and those that tiles are cut at."""
WHITE = 230


def cut(path: Path, slide_mpp: float | None, mpp: float, out: Path) -> list[str]:
    """Write the tiles of a slide of which at least half is tissue, each half over the next; return their names."""
    slide = eosin.open_slide(path, mpp=slide_mpp)
    grid = eosin.tile(slide, tile_px=TILE_PX, mpp=mpp, overlap_px=TILE_PX // 2, min_tissue=0.5)
    names = []
    for x, y in grid.xy.tolist():
        pixels = slide.read((x, y), TILE_PX, mpp=mpp)
        if (pixels.min(axis=2) > WHITE).mean() <= 0.5:
            names.append(f"{path.name.split('.')[0]}-{mpp:g}-{x}-{y}.png")
            Image.fromarray(pixels).save(out / names[-1])
    return names


def tiles(data: Path, out: Path) -> None:
    """Write tiles and `tiles.csv`: file, slide_id, patient_id, site (scanner or slide, what is drawn evenly)."""
    out.mkdir(parents=True)
    rows = []
    for name, (slide_mpp, resolutions) in SLIDES.items():
        for mpp in resolutions:
            found = cut(data / "slides" / name, slide_mpp, mpp, out)
            print(f"{name} at {mpp:g} um/px: {len(found)} tiles")
            rows += [(file, name, name, name) for file in found]
    with (data / "tiles" / "amf" / "labels.csv").open(newline="") as file:
        crops = [row for row in csv.DictReader(file) if row["dataset"] == "midog21"]
    for row in crops:
        shutil.copy(data / "tiles" / "amf" / row["file"], out)
        rows.append((Path(row["file"]).name, row["slide_id"], row["slide_id"], row["scanner"]))
    print(f"midog21 at 0.25 um/px: {len(crops)} crops")
    with (out / "tiles.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "slide_id", "patient_id", "site"), *rows])


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("tiles",))
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tiles(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
