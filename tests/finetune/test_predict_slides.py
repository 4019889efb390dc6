"""Detections of slides through a trained model: one that fails never stops the others, and nothing is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from shapely.geometry import box

import slidegen
from eosin.errors import CohortError, ConfigError, GeometryError
from eosin.finetune.cascade import count_atypical, per_mm2
from eosin.finetune.detections import read_detections
from eosin.finetune.predict import Scorer
from eosin.finetune.predict_slides import SLIDES, match_files, read_region, score_slides
from eosin.slides import open_slide
from eosin.tiles import read_geojson
from eosin.tiles.geojson import Annotation, write_geojson

POINTS = [[400, 400, 0.9], [600, 900, 0.8], [1500, 700, 0.7]]


class Redness:
    """In place of an ensemble: calls a crop atypical by the red value of its centre, and counts what it was asked."""

    def __init__(self, *, threshold: float = 0.0, tta: str = "rot4") -> None:
        self.threshold, self.tta, self.asked = threshold, tta, 0

    def scores(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        self.asked += len(tiles)
        return tiles[:, 64, 64, 0] / 255.0


def scorer(*, model: str = "a", **how: Any) -> Scorer:
    return Scorer(ensemble=Redness(**how), model_hash=model)  # pyright: ignore[reportArgumentType]


def asked(given: Scorer) -> int:
    return given.ensemble.asked  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def cohort(tmp_path: Path, he_slide: Any, make_slide: Callable[..., Path]) -> tuple[Path, Path]:
    """Two good slides, one of them in a folder, with their points."""
    slides, points = tmp_path / "slides", tmp_path / "points"
    for folder in (slides / "sub", points / "sub"):
        folder.mkdir(parents=True)
    for name in ("a.svs", "sub/b.svs"):
        (slides / name).write_bytes(he_slide.path.read_bytes())
    (points / "a.svs.json").write_text(json.dumps(POINTS))
    (points / "sub" / "b.csv").write_text("x,y\n400,400\n")
    return slides, points


def written(out: Path) -> pd.DataFrame:
    table = pd.read_csv(out / SLIDES)
    return table.fillna({"notes": "", "error": ""})


def test_a_cohort_gets_cells_counts_and_one_table(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    slides, points = cohort
    given, out, told = scorer(threshold=0.7), tmp_path / "out", []
    found = score_slides(slides, given, points=points, out=out, progress=lambda *now: told.append(now))
    assert (found.failed, asked(given)) == ({}, 4)
    assert found.notes == ("the crops of 2 slides have remarks, see the column notes",)
    assert told == [(1, 2, "a.svs"), (2, 2, "sub/b.svs")]
    with open_slide(slides / "a.svs") as slide:
        read = read_detections(points / "a.svs.json")
        want = count_atypical(slide, read, Redness(), out=tmp_path / "alone", threshold=0.7)
    assert (out / "a.svs.geojson").read_bytes() == (tmp_path / "alone" / "a.svs.geojson").read_bytes()
    record = json.loads((out / "a.svs.json").read_text())
    assert {key: value for key, value in record.items() if key != "made_from"} == json.loads(json.dumps(want))
    assert len(read_geojson(out / "sub" / "b.svs.geojson")) == 1
    line = written(out).iloc[0]
    assert line["figures"] == 3
    assert 0 < line["atypical"] < 3
    assert line["atypical_n"] == line["atypical"]
    for kind in ("figures", "atypical"):
        exact = per_mm2(int(line[kind]), line["area_mm2"])
        assert line[[f"{kind}_{part}" for part in ("per_mm2", "low", "high")]].tolist() == pytest.approx(
            [exact.point, exact.low, exact.high]
        )
    assert "the crops are 2.00x finer" in line["notes"]
    assert "below the 2 mm²" in line["notes"]
    assert written(out)["slide"].tolist() == ["a.svs", "sub/b.svs"]


def test_what_fails_is_listed_and_stops_nothing(
    cohort: tuple[Path, Path], tmp_path: Path, make_slide: Callable[..., Path]
) -> None:
    slides, points = cohort
    (slides / "empty.svs").write_bytes(b"")
    make_slide(slidegen.coordinates(300, 300), name="slides/unknown.svs", mpp=None)
    make_slide(slidegen.coordinates(300, 300), name="slides/coarse.svs", mpp=1.0)
    make_slide(slidegen.coordinates(300, 300), name="slides/without.svs", mpp=0.25)
    make_slide(slidegen.coordinates(300, 300), name="slides/off.svs", mpp=0.25)
    make_slide(slidegen.coordinates(300, 300), name="slides/torn.svs", mpp=0.25)
    for name in ("empty", "unknown", "coarse"):
        (points / f"{name}.json").write_text("[[100, 100]]")
    (points / "off.json").write_text("[[5000, 100]]")
    (points / "torn.json").write_bytes(b"")
    (points / "of-nobody.json").write_text("[]")
    found = score_slides(slides, scorer(), points=points, out=tmp_path / "out")
    said = {
        "coarse.svs": "4.00x finer than the slide's own 1 x 1 mpp",
        "empty.svs": "the file is empty",
        "off.svs": "1 of 1 points lie off the slide",
        "torn.svs": "not JSON",
        "unknown.svs": "does not say its microns per pixel",
        "without.svs": "no points for it",
    }
    assert sorted(found.failed) == sorted(said)
    for slide, words in said.items():
        assert words in found.failed[slide], found.failed[slide]
    assert "needed is without.svs.geojson" in found.failed["without.svs"]
    assert found.notes[-1:] == (f"1 files of points belong to no slide of {slides} (of-nobody.json)",)
    table = written(tmp_path / "out").set_index("slide")
    assert (table.loc[["a.svs", "sub/b.svs"], "error"] == "").all()
    assert table["figures"]["sub/b.svs"] == 1
    assert table["error"]["off.svs"] == found.failed["off.svs"]
    assert not (tmp_path / "out" / "off.svs.json").exists()
    # Who does not say its resolution is told it; who says it is believed.
    told = score_slides(slides, scorer(), points=points, out=tmp_path / "out", slide_mpp=0.4)
    assert sorted(told.failed) == sorted(said.keys() - {"unknown.svs"})
    mpp = {
        slide: json.loads((tmp_path / "out" / f"{slide}.json").read_text())["mpp"] for slide in ("unknown.svs", "a.svs")
    }
    assert mpp == {"unknown.svs": [0.4, 0.4], "a.svs": [0.5, 0.5]}


def test_finished_slides_are_done_again_only_when_something_changed(
    cohort: tuple[Path, Path], tmp_path: Path, he_slide: Any
) -> None:
    slides, points = cohort
    out = tmp_path / "out"

    def run(given: Scorer, **how: Any) -> int:
        score_slides(slides, given, points=points, out=out, **how)
        return asked(given)

    assert run(scorer()) == 4
    before = (out / "a.svs.geojson").read_bytes(), written(out)
    again = scorer()
    found = score_slides(slides, again, points=points, out=out)
    assert asked(again) == 0
    assert found.notes[:1] == ("2 of 2 slides were finished before, from the same inputs",)
    assert (out / "a.svs.geojson").read_bytes() == before[0]
    pd.testing.assert_frame_equal(written(out), before[1])
    (points / "a.svs.json").write_text(json.dumps(POINTS[:2]))
    assert run(scorer()) == 2
    assert run(scorer(model="b")) == 3
    assert run(scorer(model="b", threshold=0.2)) == 3
    assert run(scorer(model="b", threshold=0.2, tta="none")) == 3
    assert run(scorer(model="b", threshold=0.2, tta="none"), slide_mpp=0.5) == 3
    (out / "a.svs.geojson").unlink()
    assert run(scorer(model="b", threshold=0.2, tta="none"), slide_mpp=0.5) == 2
    (out / "a.svs.json").write_text('{"made_from"')
    assert run(scorer(model="b", threshold=0.2, tta="none"), slide_mpp=0.5) == 2
    with (slides / "sub" / "b.svs").open("ab") as file:
        file.write(b"\0")
    assert run(scorer(model="b", threshold=0.2, tta="none"), slide_mpp=0.5) == 1


def test_regions_are_counted_beside_the_tissue(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    slides, points = cohort
    spots = tmp_path / "spots"
    spots.mkdir()
    halves = [Annotation(geometry=box(0, 0, 500, 1500)), Annotation(geometry=box(400, 0, 1000, 1500))]
    write_geojson(spots / "a.geojson", halves)
    found = score_slides(slides, scorer(), points=points, out=tmp_path / "out", region=spots)
    assert list(found.failed) == ["sub/b.svs"]
    assert "no region for it" in found.failed["sub/b.svs"]
    line = written(tmp_path / "out").iloc[0]
    assert line["region_area_mm2"] == pytest.approx(0.5 * 0.75)  # the union, not the sum
    assert (line["figures_n"], line["region_figures_n"], line["region_atypical_n"]) == (3, 2, 2)
    write_geojson(spots / "a.geojson", halves[:1])
    again = scorer()
    score_slides(slides, again, points=points, out=tmp_path / "out", region=spots)
    assert asked(again) == 3
    assert written(tmp_path / "out")["region_figures_n"][0] == 1
    with pytest.raises(GeometryError, match="no area is drawn in it"):
        read_region(write_geojson(tmp_path / "none.geojson", []))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.json", "[]"),
        ("none.geojson", '{"type": "FeatureCollection", "features": []}'),
        ("none.csv", "x,y\n"),
    ],
)
def test_a_slide_without_figures_is_a_count_of_none(he_slide: Any, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = score_slides(he_slide.path, scorer(), points=tmp_path / name, out=tmp_path / "out")
    assert found.failed == {}
    line = written(tmp_path / "out").iloc[0]
    assert (line["figures"], line["atypical"], line["atypical_per_mm2"], line["atypical_low"]) == (0, 0, 0, 0)
    # The rule of three, exactly: no figure on so much tissue.
    assert line["atypical_high"] == pytest.approx(-np.log(0.025) / line["area_mm2"])


def test_files_find_their_slides(tmp_path: Path) -> None:
    for name in ("a.svs.geojson", "b.csv", "sub/a.json", "c.json", "d.json", "d.csv", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    slides = ["a.svs", "b.svs", "c.ndpi", "c.svs", "d.svs", "sub/a.svs"]
    found = match_files(tmp_path, slides, what="points")
    assert {slide: path.relative_to(tmp_path).as_posix() for slide, path in found.file.items()} == {
        "a.svs": "a.svs.geojson",
        "b.svs": "b.csv",
        "sub/a.svs": "sub/a.json",
    }
    assert found.problems["c.svs"] == "c.json fits c.ndpi and c.svs; call it c.svs.json"
    assert "2 files of points fit it (d.csv, d.json)" in found.problems["d.svs"]
    assert [path.name for path in found.unused] == ["c.json", "d.csv", "d.json"]


def test_inputs_that_fit_no_slide(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    slides, points = cohort
    for given, error, said in (
        (points / "a.svs.json", CohortError, "is one file, and there are 2 slides: give --points a folder"),
        (tmp_path / "nothing", CohortError, "no such file or folder of points"),
        (tmp_path / "none", CohortError, "none of the 0 files of points"),
        (slides, CohortError, "none of the 0 files"),
    ):
        (tmp_path / "none").mkdir(exist_ok=True)
        with pytest.raises(error, match=said):
            score_slides(slides, scorer(), points=given, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="whose files would be mixed with it"):
        score_slides(slides, scorer(), points=points, out=points)
    (tmp_path / "blank").mkdir()
    with pytest.raises(CohortError, match="holds no slides"):
        score_slides(tmp_path / "blank", scorer(), points=points, out=tmp_path / "out")
