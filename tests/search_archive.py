"""A small archive to search in: four slides of three patients, their features and an index, made once a test run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import slidegen
from eosin.tasks.search_index import IndexSettings, make_index

# slide -> patient, site, diagnosis, seed; the copy has the pixels of north/a.tif
SLIDES = {
    "north/a.tif": ("P1", "north", "benign", 1),
    "north/b.tif": ("P1", "north", "malignant", 2),
    "south/c.tif": ("P2", "south", "malignant", 3),
    "south/copy.tif": ("P3", "south", "benign", 1),
}
TILE_PX, MPP = 128, 0.5

_made: list[Archive] = []


@dataclass(frozen=True)
class Archive:
    """Folders of slides, features and index; the pixels of each slide. To be read only."""

    root: Path
    pixels: dict[str, npt.NDArray[np.uint8]]

    @property
    def slides(self) -> Path:
        return self.root / "slides"

    @property
    def index(self) -> Path:
        return self.root / "index"

    @property
    def features(self) -> Path:
        return self.root / "index-features"

    @property
    def cohort(self) -> Path:
        return self.root / "cohort.csv"


def archive(factory: pytest.TempPathFactory) -> Archive:
    if not _made:
        root = factory.mktemp("archive")
        pixels = {}
        rows = ["slide_id,patient_id,site,diagnosis"]
        for slide_id, (patient, site, diagnosis, seed) in SLIDES.items():
            pixels[slide_id], _ = slidegen.histology(640, 512, seed=seed, blobs=-1, mpp=MPP)
            path = root / "slides" / slide_id
            path.parent.mkdir(parents=True, exist_ok=True)
            slidegen.write_tiff(path, pixels[slide_id], slidegen.TiffStyle(mpp=MPP, factors=(4,)))
            rows.append(f"{slide_id},{patient},{site},{diagnosis}")
        (root / "cohort.csv").write_text("\n".join(rows) + "\n")
        settings = IndexSettings(
            encoder="texture",
            tile_px=TILE_PX,
            mpp=MPP,
            cohort=root / "cohort.csv",
            label="diagnosis",
            workers=0,
        )
        made = make_index(root / "slides", str(root / "index"), settings)
        assert not made.failed
        _made.append(Archive(root, pixels))
    return _made[0]
