"""Words to examples, indexes that remember their slides, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

import eosin
from eosin.errors import CohortError, IndexCorruptError, IndexMismatchError, MissingMppError, QueryError, StoreError
from eosin.features import FeatureStore
from eosin.retrieval.engines import create_index, open_index
from eosin.retrieval.protocol import VectorIndex
from eosin.tasks.search import Question, answer, ask, read_examples
from eosin.tasks.search_index import IndexSettings, make_index
from eosin.tasks.search_slides import NAME, find_files, remembered_recipe, slide_files
from eosin.tiles import Annotation, TileSpec, write_geojson
from search_archive import MPP, TILE_PX, Archive, archive


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return archive(tmp_path_factory)


@pytest.fixture(scope="module")
def index(made: Archive) -> Iterator[VectorIndex]:
    with contextlib.closing(open_index(made.index)) as opened:
        yield opened


def rows(index: VectorIndex, text: str, **more: object) -> tuple[str, list[tuple[int, int]]]:
    """Kind and positions of the one example that a text names."""
    (example,), _ = read_examples(index, Question(queries=(text,), **more))  # type: ignore[arg-type]
    return example.kind, sorted(map(tuple, example.xy.tolist()))


def test_words_name_tiles_regions_and_slides(index: VectorIndex, tmp_path: Path) -> None:
    assert rows(index, "north/a.tif:128,256") == ("tile", [(128, 256)])
    assert rows(index, "a.tif:200,300") == ("tile", [(128, 256)])
    assert rows(index, "a:200,300") == ("tile", [(128, 256)])
    kind, xy = rows(index, "c:0,0,256,256")
    assert kind == "region"
    assert set(xy) <= {(0, 0), (128, 0), (0, 128), (128, 128)}
    kind, xy = rows(index, "south/c.tif")
    assert kind == "slide"
    assert len(xy) == index.facet("slide_id")["south/c.tif"]
    for text, told in (
        ("x.tif:1,2", "not in the index"),
        ("a.tif:1,2,3", "no slide of the index and no file"),
        (str(tmp_path / "absent.png"), "no slide of the index and no file"),
        ("a.tif:99999,5", "no tile covers"),
    ):
        with pytest.raises(QueryError, match=told):
            rows(index, text)


def test_an_annotation_lies_on_the_slide_of_its_name_or_the_one_given(index: VectorIndex, tmp_path: Path) -> None:
    areas = [
        Annotation(geometry=shapely.box(0, 0, 256, 256), name="Tumor"),
        Annotation(geometry=shapely.box(256, 0, 640, 512), name="Stroma"),
    ]
    path = write_geojson(tmp_path / "c.geojson", areas)
    everything = rows(index, "c.tif")[1]
    inside = [(x, y) for x, y in everything if x < 256 and y < 256]
    assert inside
    assert rows(index, f"{path}:Tumor") == ("annotation", inside)
    assert rows(index, str(path))[1] == sorted([*inside, *((x, y) for x, y in everything if x >= 256)])
    with pytest.raises(QueryError, match="no class 'Tumour'; it has Stroma, Tumor"):
        rows(index, f"{path}:Tumour")
    other = path.rename(tmp_path / "drawn.geojson")
    with pytest.raises(QueryError, match="on which slide was it drawn"):
        rows(index, str(other))
    assert rows(index, f"{other}:Tumor", slide="c") == ("annotation", inside)


def test_a_tile_finds_its_copy_under_another_name(index: VectorIndex) -> None:
    result = ask(index, Question(queries=("north/a.tif:128,256",), k=4))
    payload = result.hits.payload
    assert (payload["slide_id"][0], payload["x"][0], payload["y"][0]) == ("south/copy.tif", 128, 256)
    assert result.hits.score[0] > 0.99999
    assert any("all but identical" in note for note in result.notes)
    assert set(payload["patient_id"].tolist()) <= {"P2", "P3"}
    assert result.examples[0].about["patient_id"] == {"P1": 1}
    south = ask(index, Question(queries=("a:128,256",), filters=("site=south", "label!=benign"), k=30))
    assert set(south.hits.payload["slide_id"].tolist()) == {"south/c.tif"}
    with pytest.raises(QueryError, match="no field 'patients'"):
        ask(index, Question(queries=("a:128,256",), filters=("patients=P1",)))


def test_an_image_file_is_read_as_the_slides_were(made: Archive, index: VectorIndex, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(made.pixels["south/c.tif"][256:384, 128:256]).save(path)
    recipe = remembered_recipe(str(made.index))
    result = ask(index, Question(queries=(str(path),), image_mpp=MPP, k=1), recipe=recipe)
    payload = result.hits.payload
    assert (payload["slide_id"][0], payload["x"][0], payload["y"][0]) == ("south/c.tif", 128, 256)
    assert result.hits.score[0] > 0.99999
    with pytest.raises(MissingMppError, match="--mpp"):
        ask(index, Question(queries=(str(path),)))
    other = create_index(tmp_path / "other", replace(index.spec, encoder="other"))
    with contextlib.closing(other), pytest.raises(IndexMismatchError, match="the encoder for images has texture"):
        ask(other, Question(queries=(str(path),), image_mpp=MPP, encoder="texture"))
    assert recipe is not None
    stained = replace(recipe, stain={"method": "macenko"})
    with pytest.raises(QueryError, match="normalised by macenko"):
        ask(index, Question(queries=(str(path),), image_mpp=MPP), recipe=stained)
    # A server keeps no recipe; what the index itself was made with tells.
    stained_spec = replace(index.spec, made_with={**(index.spec.made_with or {}), "stain": {"method": "reinhard"}})
    far = create_index(tmp_path / "far", stained_spec)
    with contextlib.closing(far), pytest.raises(QueryError, match="normalised by reinhard"):
        ask(far, Question(queries=(str(path),), image_mpp=MPP))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(eosin.errors.SlideError, match=r"text.png"):
        ask(index, Question(queries=(str(tmp_path / "text.png"),), image_mpp=MPP))


def test_a_slide_from_elsewhere_comes_with_its_features(made: Archive, index: VectorIndex, tmp_path: Path) -> None:
    new = tmp_path / "new.tif"
    shutil.copy(made.slides / "south" / "c.tif", new)
    for tile_px, folder in ((TILE_PX, "features"), (64, "small")):
        eosin.extract(new, TileSpec(tile_px=tile_px, mpp=MPP), "texture", out=tmp_path / folder, workers=0)
    with pytest.raises(QueryError, match="--features"):
        ask(index, Question(queries=("new.tif:128,256",)))
    result = ask(index, Question(queries=("new.tif:128,256",), features=tmp_path / "features", k=1))
    assert result.hits.payload["slide_id"].tolist() == ["south/c.tif"]
    assert any("patient of tile of new.tif" in note for note in result.notes)
    with pytest.raises(IndexMismatchError, match="tile_px"):
        ask(index, Question(queries=("new.tif:128,256",), features=tmp_path / "small"))


def test_the_same_index_again_stores_nothing_and_forgets_no_slide(made: Archive, tmp_path: Path) -> None:
    shutil.copytree(made.index, tmp_path / "index")
    settings = IndexSettings(cohort=made.cohort, label="diagnosis")
    again = make_index(made.features, str(tmp_path / "index"), settings)
    assert (len(again.done), len(again.skipped)) == (0, 4)
    assert slide_files(str(tmp_path / "index"), []) == slide_files(str(made.index), [])
    files = slide_files(str(made.index), [])
    assert files["north/a.tif"].path == made.slides / "north" / "a.tif"
    with eosin.open_slide(made.slides / "north" / "a.tif") as slide:
        assert files["north/a.tif"].fingerprint == slide.fingerprint
    recipe = remembered_recipe(str(made.index))
    assert recipe is not None
    assert recipe.hash == FeatureStore.open(made.features).recipe.hash


def test_moved_slides_are_found_where_they_are_given(made: Archive, tmp_path: Path) -> None:
    shutil.copytree(made.slides, tmp_path / "moved")
    files = slide_files(str(made.index), [tmp_path / "moved"])
    assert files["south/c.tif"].path == tmp_path / "moved" / "south" / "c.tif"
    assert files["south/c.tif"].fingerprint == slide_files(str(made.index), [])["south/c.tif"].fingerprint
    assert set(find_files([tmp_path / "moved"])) == set(files)


def test_features_made_otherwise_are_refused(made: Archive, tmp_path: Path) -> None:
    shutil.copytree(made.index, tmp_path / "index")
    notes = json.loads((tmp_path / "index" / NAME).read_text())
    notes["recipe"]["stain"] = {"method": "macenko"}
    notes["recipe"]["encoder"]["pooling"] = "mean"
    (tmp_path / "index" / NAME).write_text(json.dumps(notes))
    settings = IndexSettings(cohort=made.cohort, label="diagnosis")
    with pytest.raises(IndexMismatchError, match=r"(?s)encoder.pooling: .*stain"):
        make_index(made.features, str(tmp_path / "index"), settings)
    (tmp_path / "index" / NAME).write_text("{}")
    with pytest.raises(IndexCorruptError, match="delete it"):
        answer(str(tmp_path / "index"), Question(queries=("a:128,256",)))


def test_what_is_no_source_is_refused(made: Archive, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="--encoder NAME"):
        make_index(made.slides, str(tmp_path / "index"))
    with pytest.raises(QueryError, match="extract slides into a folder first"):
        make_index(made.slides, "http://localhost:6333/tiles", IndexSettings(encoder="texture"))
    with pytest.raises(CohortError, match="no such file"):
        make_index(tmp_path / "absent", str(tmp_path / "index"), IndexSettings(encoder="texture"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.tif").write_bytes(b"II*\0broken")
    with pytest.raises(StoreError, match=r"no slide of .*broken could be extracted"):
        make_index(tmp_path / "broken", str(tmp_path / "index"), IndexSettings(encoder="texture", workers=0))
    assert not (tmp_path / "index").exists()


def test_a_broken_slide_is_reported_and_the_rest_is_found(made: Archive, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    shutil.copy(made.slides / "south" / "c.tif", tmp_path / "slides" / "c.tif")
    (tmp_path / "slides" / "bad.svs").write_bytes(b"")
    settings = IndexSettings(encoder="texture", tile_px=TILE_PX, mpp=MPP, workers=0)
    done = make_index(tmp_path / "slides", str(tmp_path / "index"), settings)
    assert done.done == ("c.tif",)
    assert list(done.failed) == ["bad.svs"]
    result, _, written = answer(str(tmp_path / "index"), Question(queries=("c:128,256",), same_slide=True, k=3))
    assert len(result) == 3
    assert not written
    assert any("counts each slide as a patient" in note for note in result.notes)
    assert np.isfinite(result.hits.score).all()
