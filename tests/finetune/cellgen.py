"""Cells and tables of cells that the tests write themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from eosin.finetune.cells import CellTable, domain_name, slide_keys

MIDOG25 = "image_id,filename,coordinateX,coordinateY,Tumor,Scanner,Origin,Species,expert1,expert2,expert3,majority"
AMIBR = "slide,dataset,uid,x,y,expert1_label,expert1_atypical,expert2_atypical,expert3_atypical,majority_atypical"


def write_table(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return path


def write_picture(path: Path, pixels: npt.NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pixels(seed: int, side: int = 128) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def cell_table(
    labels: list[int],
    *,
    root: Path = Path(),
    dataset: str = "set",
    slides: list[str] | None = None,
    xy: list[tuple[float, float]] | None = None,
    files: list[str] | None = None,
    scanner: str = "scanner",
) -> CellTable:
    """Return cells of one domain; without `slides` all are of slide "a"."""
    n = len(labels)

    def texts(values: list[str] | str) -> npt.NDArray[np.str_]:
        return np.array([values] * n if isinstance(values, str) else values, dtype=np.str_).reshape(n)

    sets, slide_id, file = texts(dataset), texts(slides or "a"), texts(files or "")
    domain = domain_name(tumour="", scanner=scanner, origin="", species="", dataset=dataset)
    return CellTable(
        root=root,
        file=file,
        label=np.array(labels, dtype=np.int8),
        soft=np.array(labels, dtype=np.float32),
        dataset=sets,
        slide_id=slide_id,
        patient_id=slide_keys(sets, slide_id, file),
        domain=texts(domain),
        scanner=texts(scanner),
        tumour=texts(""),
        origin=texts(""),
        species=texts(""),
        xy=np.full((n, 2), np.nan) if xy is None else np.array(xy, dtype=np.float64).reshape(n, 2),
        votes={},
    )
