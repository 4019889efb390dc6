"""The command line of the detector: boxes to a model, slides to GeoJSON, and a bad slide that takes none with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from detectgen import write_set
from traingen import write_encoder
from typer.testing import CliRunner

import slidegen
from eosin.cli.detect import app
from eosin.finetune.detections import read_detections


def train(folder: Path, *more: str):
    data, images = write_set(folder)
    encoder = write_encoder(folder / "tiny.safetensors")
    options = [*("--data", str(data), "--images", str(images), "--encoder", str(encoder), "--device", "cpu")]
    size = [*("--window-px", "64", "--steps", "2", "--batch", "4", "--folds", "2", "--out", str(folder / "model"))]
    return CliRunner().invoke(app, ["train", *options, *size, *more])


def test_from_boxes_to_figures_on_slides(tmp_path: Path) -> None:
    done = train(tmp_path)
    assert done.exit_code == 0, done.output
    assert "F1 (95 % CI)" in done.stdout
    assert "the interval over them is rough" in done.stderr
    slides = tmp_path / "slides"
    slides.mkdir()
    pixels, _ = slidegen.histology(700, 600, seed=1, mpp=0.25, blobs=-1)
    slidegen.write_tiff(slides / "a.svs", pixels, slidegen.TiffStyle(compression="jpeg", factors=()))
    blank = np.full((600, 700, 3), 243, dtype=np.uint8)
    slidegen.write_tiff(slides / "blank.svs", blank, slidegen.TiffStyle(factors=()))
    slidegen.write_tiff(slides / "unknown.svs", pixels, slidegen.TiffStyle(factors=(), mpp=None, power=None))
    (slides / "zero.svs").write_bytes(b"")
    call = ["run", str(slides), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*call, "--threshold", "0.05", "--json"])
    assert done.exit_code == 1  # some failed
    rows = {row["slide"]: row for row in json.loads(done.stdout)["slides"]}
    assert set(rows) == {"a.svs", "blank.svs", "unknown.svs", "zero.svs"}
    assert rows["blank.svs"]["error"].startswith("NoTissueError")
    assert rows["unknown.svs"]["error"].startswith("MissingMppError")
    assert rows["zero.svs"]["error"].startswith("CorruptSlideError")
    assert "error" not in rows["a.svs"]
    assert "a.svs: windows are" not in done.stderr
    found = read_detections(tmp_path / "out" / "a.svs.geojson", size_px=(700, 600))
    assert len(found) == rows["a.svs"]["figures"] > 0
    again = CliRunner().invoke(app, [*call[:1], str(slides / "a.svs"), *call[2:]])
    assert again.exit_code == 0, again.output
    assert "per mm2" in again.stdout


def test_report_as_json(tmp_path: Path) -> None:
    done = train(tmp_path, "--json")
    assert json.loads(done.stdout)["schema"] == "eosin.detector/1"
