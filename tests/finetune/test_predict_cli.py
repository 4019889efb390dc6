"""`eosin cells`: three kinds of input, one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from cellgen import write_picture
from modelgen import write_model
from traingen import cells_and_tiles, encoder
from typer.testing import CliRunner, Result

import slidegen
from eosin.cli.cells import cells
from eosin.errors import CohortError
from eosin.features.extraction import extract
from eosin.tiles import TileSpec

app = typer.Typer()
app.command()(cells)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def call(source: Path, model: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(
        app, [str(source), "--model", str(model), "--out", str(out), "--device", "cpu", *more], env={"COLUMNS": "200"}
    )


def test_crops(model: Path, tmp_path: Path) -> None:
    for at, tile in enumerate(cells_and_tiles(slides=1)[1]):
        write_picture(tmp_path / "crops" / f"{at}.png", tile)
    done = call(tmp_path / "crops", model, tmp_path / "out", "--threshold", "0")
    assert (done.exit_code, done.stdout.splitlines()[0]) == (0, "6 scored, 6 called atypical from P 0.000 on.")
    assert (tmp_path / "out" / "predictions.csv").is_file()
    (tmp_path / "crops" / "3.png").write_bytes(b"")
    done = call(tmp_path / "crops", model, tmp_path / "out", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert [line["p_atypical"] is None for line in told["lines"]] == [False, False, False, True, False, False]
    assert list(told["failed"]) == ["3.png"]
    assert "failed: 3.png: " in done.stderr


def test_slides(model: Path, he_slide: Any, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "he.svs").write_bytes(he_slide.path.read_bytes())
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "he.json").write_text("[[400, 400], [600, 900]]")
    options = ("--points", str(tmp_path / "points"))
    done = call(tmp_path / "slides", model, tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert "atypical/mm² (95 % CI)" in done.stdout
    assert "1 of 1 slides counted; not for clinical use." in done.stdout
    assert (tmp_path / "out" / "he.svs.geojson").is_file()
    (tmp_path / "slides" / "broken.svs").write_bytes(b"")
    (tmp_path / "points" / "broken.json").write_text("[[4, 4]]")
    done = call(tmp_path / "slides", model, tmp_path / "out", *options)
    assert done.exit_code == 1
    assert "1 of 2 slides counted" in done.stdout
    assert "note: 1 of 2 slides were finished before" in done.stderr
    assert "failed: broken.svs: " in done.stderr


def test_a_store(model: Path, tmp_path: Path) -> None:
    picture, _ = slidegen.histology(500, 400, seed=3, mpp=0.25)
    slide = slidegen.write_tiff(tmp_path / "he.svs", picture, slidegen.TiffStyle(mpp=0.25, factors=()))
    extract(slide, TileSpec(tile_px=128, mpp=0.25), encoder(model.parents[1]), out=tmp_path / "store", workers=0)
    done = call(tmp_path / "store", model, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "these are tiles of a grid" in done.stderr
    assert "scored" in done.stdout


def test_options_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    done = call(tmp_path, model, tmp_path / "out", "--region", "spot.geojson")
    assert done.exit_code == 2
    assert "are for slides, which need --points" in done.stderr
    failed = call(tmp_path / "nothing", model, tmp_path / "out")
    assert isinstance(failed.exception, CohortError)
