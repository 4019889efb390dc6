"""Every real slide through the main job: features that can be checked, or the one right error."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

import eosin
from eosin.encoders.texture import TextureEncoder
from eosin.errors import EosinError, MissingMppError, NotBrightfieldError
from eosin.features.extraction import Outcome, run
from eosin.features.store import Features, FeatureStore
from eosin.tiles import TileSpec

pytestmark = pytest.mark.real

SPEC = TileSpec(tile_px=224, mpp=0.5)
GOOD = ("CMU-1-Small-Region.svs", "OS-1-detail.ome.tif", "OS-2-ndpi.ome.tif", "OS-2-vsi.ome.tif")
BAD: dict[str, type[EosinError]] = {
    "hamamatsu-dapi.ndpi": NotBrightfieldError,
    "prostate-2500px.jpeg": MissingMppError,
    "tcga-cr-7395-01a-01-ts1.svs": MissingMppError,
}


@pytest.fixture(scope="module")
def slides(real_data: Path) -> Path:
    return real_data / "slides"


@pytest.fixture(scope="module")
def cohort(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All slides of the folder in one run."""
    return run(slides, SPEC, TextureEncoder(), out=tmp_path_factory.mktemp("real") / "features", workers=1)


def command_line(*args: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "eosin.cli", *(str(a) for a in args)]
    return subprocess.run(call, capture_output=True, text=True, check=False, timeout=250)


def check(features: Features) -> None:
    """Finite, of the right width, told apart, and every tile whole on the slide at a place of its own."""
    assert features.x.shape == (len(features.xy), TextureEncoder().spec.dim)
    assert np.isfinite(features.x).all()
    assert len(features) == 1 or np.abs(features.x - features.x[0]).max() > 0
    assert len(np.unique(features.xy, axis=0)) == len(features.xy)
    assert features.size0_px is not None
    width, height = features.slide["size_px"]
    ends = features.xy + np.asarray(features.size0_px)
    assert (features.xy >= 0).all()
    assert (ends <= np.array([width, height]) + 0.5).all()
    assert (features.qc["read_status"] == 0).all()
    assert (features.qc["valid"] > 0.99).all()
    assert len(features.unreadable_xy) == 0


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_one_run_over_the_folder_does_the_good_and_names_the_bad(cohort: Outcome, slides: Path) -> None:
    assert {path.name for path in slides.iterdir()} == {*GOOD, *BAD}
    assert cohort.done == GOOD
    assert {name: reason.split(":")[0] for name, reason in cohort.failed.items()} == {
        name: error.__name__ for name, error in BAD.items()
    }
    store = cohort.stores[0]
    assert store.slide_ids == list(GOOD)
    assert all(row.ok for row in store.verify())
    for name, reason in cohort.failed.items():
        assert name in reason
        assert "\n" not in reason
        record = json.loads((store.path / "failures" / f"{name}.json").read_text())
        assert (record["slide_id"], record["error"]) == (name, BAD[name].__name__)
        assert record["message"] in reason
        if BAD[name] is MissingMppError:
            assert "--slide-mpp" in reason
    assert json.loads((store.path / "run.json").read_text())["failed"] == cohort.failed


@pytest.mark.parametrize("name", GOOD)
def test_a_good_slide_gives_features(cohort: Outcome, name: str) -> None:
    features = cohort.stores[0][name]
    check(features)
    ledger = features.slide["mpp"]
    assert features.size0_px == pytest.approx((224 * 0.5 / ledger["x"], 224 * 0.5 / ledger["y"]))


def test_features_of_cmu_are_those_of_openslide_s_pixels(cohort: Outcome, slides: Path) -> None:
    """At 0.499 mpp a tile of 0.5 is 224.4 pixels: read as they are, so OpenSlide's tile gives the same numbers."""
    features = cohort.stores[0]["CMU-1-Small-Region.svs"]
    assert len(features) > 50
    with openslide.OpenSlide(slides / "CMU-1-Small-Region.svs") as slide:
        tiles = [slide.read_region((int(x), int(y)), 0, (224, 224)).convert("RGB") for x, y in features.xy]
    expected = TextureEncoder().encode(np.stack([np.asarray(tile) for tile in tiles]))
    np.testing.assert_allclose(features.x, expected, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in GOOD if n.endswith(".ome.tif")])
def test_features_of_ome_slides_are_those_of_a_plain_resize(cohort: Outcome, slides: Path, name: str) -> None:
    """The whole of level 0 by tifffile, each footprint cut out and resized once by Pillow."""
    features = cohort.stores[0][name]
    assert len(features) >= 4
    with tifffile.TiffFile(slides / name) as tiff:
        image = Image.fromarray(tiff.pages.first.asarray())
    assert image.size == tuple(features.slide["size_px"])
    assert features.size0_px is not None
    width, height = features.size0_px
    boxes = [(float(x), float(y), min(x + width, image.width), min(y + height, image.height)) for x, y in features.xy]
    tiles = [image.resize((224, 224), Image.Resampling.BILINEAR, box=box) for box in boxes]
    expected = TextureEncoder().encode(np.stack([np.asarray(tile) for tile in tiles]))
    # A reduced JPEG decode or a pyramid level stands for the first halving, so the numbers are near, not equal.
    assert cosine(features.x, expected).min() > 0.99
    others = cosine(features.x, np.roll(expected, 1, axis=0))
    assert (cosine(features.x, expected) > others).all()


@pytest.mark.parametrize("name", BAD)
def test_an_open_bad_slide_raises_its_own_error(slides: Path, tmp_path: Path, name: str) -> None:
    with eosin.open_slide(slides / name) as slide, pytest.raises(BAD[name], match=name):
        run(slide, SPEC, TextureEncoder(), out=tmp_path)
    assert FeatureStore.open(tmp_path).slide_ids == []


def test_tcga_with_its_mpp_gives_features(slides: Path, tmp_path: Path) -> None:
    name = "tcga-cr-7395-01a-01-ts1.svs"
    outcome = run(slides / name, TileSpec(tile_px=224, mpp=1.0), TextureEncoder(), out=tmp_path, slide_mpp=1.0)
    assert outcome.done == (name,), outcome.failed
    features = outcome.stores[0][name]
    check(features)
    assert len(features) > 20
    assert features.size0_px == (224, 224)
    assert features.slide["mpp"]["x"] == 1.0
    assert features.slide["mpp"]["source"] != "missing"


@pytest.mark.slow
def test_the_command_line_goes_on_and_says_why(cohort: Outcome, slides: Path) -> None:
    """The same folder again: nothing is done twice, the bad slides fail again, the summary lists all."""
    store = cohort.stores[0]
    before = {path: path.read_bytes() for path in store.path.glob("*.h5")}
    done = command_line("extract", slides, "--out", store.path, "--encoder", "texture", "--workers", 1, "--json")
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert (told["done"], told["skipped"]) == ([], list(GOOD))
    assert told["failed"] == cohort.failed
    assert {path: path.read_bytes() for path in store.path.glob("*.h5")} == before
    with (store.path / "summary.csv").open(newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*GOOD, *BAD}
    for name in GOOD:
        assert float(rows[name]["tiles"]) == len(store[name])
        assert rows[name]["failure"] == ""
    for name in BAD:
        assert rows[name]["failure"] in cohort.failed[name] != ""
    page = (store.path / "summary.html").read_text()
    assert all(name in page for name in BAD)
