"""What a search leaves: pictures at the right place, a page without foreign addresses, files that others read."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import slidegen
from eosin.errors import SlideError
from eosin.features import FeatureStore
from eosin.retrieval.engines import open_index
from eosin.slides import open_slide
from eosin.tasks import search as search_module
from eosin.tasks import search_cases
from eosin.tasks.search import Question, answer
from eosin.tasks.search_cases import answer_cases
from eosin.tasks.search_demo import search_picture
from eosin.tasks.search_index import IndexSettings, make_index
from eosin.tasks.search_pictures import AROUND_PX, OUTLINE, SlideFile, crop, open_again, outlined, tile_picture
from eosin.tasks.search_results import contact_sheet, write_results
from eosin.tasks.search_slides import slide_files
from eosin.tiles import read_geojson
from search_archive import MPP, TILE_PX, Archive, archive


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return archive(tmp_path_factory)


class Page(HTMLParser):
    """The words of a page, the sources of its images, and whatever it would load from elsewhere."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.images: list[str] = []
        self.foreign: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("img", "meta", "br", "input", "link"):
            self._open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src":
                self.images.append(str(value))
            elif name in ("src", "href"):
                self.foreign.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.words.append(data)


def decoded(uri: str) -> np.ndarray:
    kind, content = uri.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_pictures_show_the_very_place(tmp_path: Path) -> None:
    path = slidegen.write_tiff(tmp_path / "xy.tif", slidegen.coordinates(1500, 1200), slidegen.TiffStyle(mpp=None))
    with open_again("xy.tif", SlideFile(path=path), (224.0, 224.0)) as slide:
        x, y = slidegen.decode_coordinates(crop(slide, (311, 502), (224.0, 224.0), 224))
        assert (x == 311 + np.arange(224)[None]).all()
        assert (y == 502 + np.arange(224)[:, None]).all()
        # Three tiles of 88 pixels around the middle one make 264, the size of the picture.
        around = tile_picture(slide, (400, 300), (AROUND_PX / 3, AROUND_PX / 3)).around
        assert around is not None
        x, y = slidegen.decode_coordinates(around)
        drawn = (around == OUTLINE).all(axis=2)
        assert (np.flatnonzero(drawn.any(axis=0)).min(), np.flatnonzero(drawn.any(axis=0)).max()) == (88, 175)
        assert (np.flatnonzero(drawn.any(axis=1)).min(), np.flatnonzero(drawn.any(axis=1)).max()) == (88, 175)
        assert (x[132, 132], y[132, 132]) == (400 + 44, 300 + 44)
        assert (x[0, 0], y[0, 0]) == (312, 212)


def test_pixels_that_are_not_square_are_shown_square(tmp_path: Path) -> None:
    """A tile of 200 x 100 level-0 pixels is square on the glass, so it is in the picture."""
    path = slidegen.write_tiff(
        tmp_path / "flat.tif", slidegen.ramp(1000, 600), slidegen.TiffStyle(flavour="generic", mpp=(0.5, 1.0))
    )
    with open_again("flat.tif", SlideFile(path=path), (200.0, 100.0)) as slide:
        pixels = crop(slide, (400, 300), (200.0, 100.0), 100)
    assert pixels.shape == (100, 100, 3)
    for channel, length, start, size in ((0, 1000, 400, 200), (1, 600, 300, 100)):
        axis = pixels[..., channel].astype(float).mean(axis=0 if channel == 0 else 1)
        truth = (start + (np.arange(100) + 0.5) * size / 100) * 255 / length
        assert np.abs(axis - truth).max() < 1.0


def test_outlines_are_seen_on_light_and_dark() -> None:
    for value in (0, 120, 255):
        pixels = outlined(np.full((60, 60, 3), value, np.uint8), [(20, 20, 40, 40)])
        edge = pixels[30].astype(int).sum(axis=1)
        assert np.abs(np.diff(edge)).max() > 150
        assert (pixels[30, 30] == value).all()
        assert (pixels[5, 5] == value).all()


def test_everything_a_search_leaves(made: Archive, tmp_path: Path) -> None:
    question = Question(queries=("north/a.tif:128,256",), filters=("label!=none",), k=5)
    result, record, written = answer(str(made.index), question, out=tmp_path)
    page = Page(tmp_path / "search.html")
    assert not page.foreign
    assert len(page.images) == 2 + 2 * 5
    hits = result.hits.payload
    for row in range(5):
        assert f"{hits['slide_id'][row]} x {hits['x'][row]}, y {hits['y'][row]}" in page.text
        x, y, slide_id = int(hits["x"][row]), int(hits["y"][row]), str(hits["slide_id"][row])
        shown = decoded(page.images[2 + 2 * row]).astype(float)
        truth = made.pixels[slide_id][y : y + TILE_PX, x : x + TILE_PX]
        large = np.asarray(Image.fromarray(truth).resize((224, 224), Image.Resampling.BICUBIC)).astype(float)
        assert np.abs(shown - large).mean() < 6
    for words in (
        "80 tiles in the index",
        "− 20 of the query's own slide",
        "− 20 more of the same patient",
        "− 0 fail the filter",
        "40 searched",
        "5 found, 5 wanted",
        "all but identical",
        "patient P1 site north label benign",
        "Grey: cosine of 40 tiles",
        "not (label is none)",
    ):
        assert words in page.text, words
    assert json.loads((tmp_path / "search.json").read_text()) == record
    assert record["found"] == record["wanted"] == 5
    assert [hit["rank"] for hit in record["hits"]] == [1, 2, 3, 4, 5]
    assert [int(hit["id"]) for hit in record["hits"]] == result.hits.ids.tolist()
    assert sum(record["mix"]["label"]["hits"].values()) == 5
    assert record["mix"]["site"]["searched"] == {"south": 40}
    assert all(Path(path).exists() for path in written.values())


def test_geojson_lies_on_the_tiles(made: Archive, tmp_path: Path) -> None:
    result, _, _ = answer(str(made.index), Question(queries=("a:128,256",), k=8), out=tmp_path)
    hits = result.hits.payload
    drawn = {}
    for path in (tmp_path / "geojson").rglob("*.geojson"):
        slide_id = path.relative_to(tmp_path / "geojson").as_posix().removesuffix(".geojson")
        for one in read_geojson(path):
            left, top, right, bottom = one.geometry.bounds
            assert (right - left, bottom - top) == (TILE_PX, TILE_PX)
            drawn[slide_id, int(left), int(top)] = one
    assert drawn.pop(("north/a.tif", 128, 256)).name == "Query"
    assert set(drawn) == set(zip(*(hits[name].tolist() for name in ("slide_id", "x", "y")), strict=True))
    best = drawn[str(hits["slide_id"][0]), int(hits["x"][0]), int(hits["y"][0])]
    assert best.name == "Similar"
    assert best.properties is not None
    assert best.properties["measurements"] == {"rank": 1, "score": round(float(result.hits.score[0]), 4)}


def test_slides_that_moved_or_changed_are_named_and_left_blank(made: Archive, tmp_path: Path) -> None:
    shutil.copytree(made.slides, tmp_path / "slides")
    shutil.copy(tmp_path / "slides" / "north" / "b.tif", tmp_path / "slides" / "south" / "copy.tif")
    question = Question(queries=("a:128,256",), k=12)
    result, record, _ = answer(str(made.index), question, slides=[tmp_path / "slides"], out=tmp_path / "changed")
    page = Page(tmp_path / "changed" / "search.html")
    of_copy = result.mix("slide_id")["south/copy.tif"]
    assert 0 < of_copy < 12
    assert page.text.count("is not the slide that was indexed as south/copy.tif: its content has changed") == of_copy
    assert len(page.images) == 2 + 2 * (12 - of_copy)
    why = [hit["no_picture"] for hit in record["hits"]]
    assert sum(one is not None for one in why) == of_copy
    known = slide_files(str(made.index), [])
    gone = {slide_id: replace(file, path=tmp_path / "gone" / slide_id) for slide_id, file in known.items()}
    write_results(result, tmp_path / "gone-page", index="index", slides=gone)
    text = Page(tmp_path / "gone-page" / "search.html").text
    assert f"No picture: north/a.tif is no longer at {tmp_path / 'gone' / 'north' / 'a.tif'}" in text
    write_results(result, tmp_path / "nowhere", index="index", slides={})
    text = Page(tmp_path / "nowhere" / "search.html").text
    assert "where south/c.tif lies is not known; give its folder with --slides" in text
    with pytest.raises(SlideError, match="not known"):
        open_again("x", None, None)


def test_the_contact_sheet_shows_query_and_hits(made: Archive, tmp_path: Path) -> None:
    result, _, _ = answer(str(made.index), Question(queries=("a:128,256",), k=6), out=tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "hits.png").convert("RGB"))
    query = sheet[54 : 54 + 224, 14 : 14 + 224].astype(float)
    first, second = (sheet[54 : 54 + 224, left : left + 224].astype(float) for left in (314, 552))
    # The first hit is the query's copy: the same pixels; the second is another place.
    assert np.abs(first - query).max() == 0
    assert np.abs(second - query).mean() > 5
    blank = contact_sheet(result, [((), "gone")], [])
    assert blank.shape[1] == sheet.shape[1]


def test_an_empty_answer_still_makes_a_page(made: Archive, tmp_path: Path) -> None:
    question = Question(queries=("a:128,256",), filters=("label=bening",))
    _, record, _ = answer(str(made.index), question, out=tmp_path)
    text = Page(tmp_path / "search.html").text
    assert "Nothing was found." in text
    assert "No tile has label 'bening'; the closest are: benign" in text
    assert record["hits"] == []
    assert record["chance"]["n"] == 0


def test_names_cannot_break_the_page(made: Archive, tmp_path: Path) -> None:
    result, _, _ = answer(str(made.index), Question(queries=("a:128,256",), k=2), out=tmp_path)
    evil = "<script>alert(1)</script>"
    payload = {**result.hits.payload, "label": np.array([evil, evil], object)}
    bad = replace(result, hits=replace(result.hits, payload=payload), notes=(evil,))
    write_results(bad, tmp_path / "evil", index=evil, slides={})
    assert "<script" not in (tmp_path / "evil" / "search.html").read_text()
    assert evil in Page(tmp_path / "evil" / "search.html").text


def test_regions_images_and_counter_examples_are_shown(made: Archive, tmp_path: Path) -> None:
    Image.fromarray(made.pixels["south/c.tif"][:300, :300]).save(tmp_path / "field.png")
    queries = ("south/c.tif:0,0,400,400", str(tmp_path / "field.png"), "south/c.tif")
    question = Question(queries=queries, against=("north/b.tif:128,128",), image_mpp=MPP, k=3)
    answer(str(made.index), question, out=tmp_path / "out")
    page = Page(tmp_path / "out" / "search.html")
    assert len(page.images) == 3 + 2 + 2 * 3
    region, image, slide = (decoded(uri) for uri in page.images[:3])
    assert region.shape[1] <= 640
    assert image.shape[:2] == (300, 300) or max(image.shape) == 640
    assert slide.shape[1] == 640
    assert "Tiles like these" in page.text
    assert "south/c.tif" in page.text


def test_hits_beyond_the_pictured_stand_in_a_table(
    made: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eosin.tasks.search_results.PICTURED", 4)
    result, _, _ = answer(str(made.index), Question(queries=("a:128,256",), k=9, merge="best"), out=tmp_path)
    page = Page(tmp_path / "search.html")
    assert len(page.images) == 2 + 2 * 4
    assert "Further hits" in page.text
    for row in range(4, 9):
        told = f"{row + 1} {result.hits.score[row]:.3f} {result.hits.payload['slide_id'][row]}"
        assert told in page.text
    assert "like (128, 256) of north/a.tif" in page.text


def test_cases_are_shown_with_their_evidence(made: Archive, tmp_path: Path) -> None:
    result, record, _ = answer_cases(str(made.index), Question(queries=("north/a.tif",), k=2), out=tmp_path)
    page = Page(tmp_path / "cases.html")
    assert not page.foreign
    assert result.cases[0].slide_id == "south/copy.tif"
    pairs = sum(len(case.pairs) for case in result.cases)
    assert len(page.images) == 1 + len(result.cases) + 2 * pairs
    # The best case is the query's copy: each pair shows the same pixels twice.
    shown = [decoded(uri).astype(float) for uri in page.images[2 : 2 + 2 * len(result.cases[0].pairs)]]
    for ours, theirs in zip(shown[::2], shown[1::2], strict=True):
        assert np.abs(ours - theirs).max() < 2
    assert json.loads((tmp_path / "cases.json").read_text()) == json.loads(json.dumps(record))
    assert "patient P3" in page.text
    assert all(isinstance(pair["id"], str) for case in record["cases"] for pair in case["pairs"])


def test_what_the_search_could_not_prove_stands_on_the_page(made: Archive, tmp_path: Path) -> None:
    question = Question(queries=("north/a.tif",), k=1)
    result, record, _ = answer_cases(str(made.index), question, aggregator="entropy-vote", out=tmp_path)
    (note,) = [note for note in result.notes if "cannot show that no other slide" in note]
    text = " ".join(Page(tmp_path / "cases.html").text.split())
    assert note in text
    assert "not shown to be complete" in text
    assert note in record["notes"]


@pytest.mark.parametrize("cases", [False, True])
def test_an_index_on_a_server_says_why_it_has_no_pictures(
    made: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: bool
) -> None:
    # A server holds the points alone; here those of the folder stand in for it.
    ask, module, page = (answer_cases, search_cases, "cases.html") if cases else (answer, search_module, "search.html")
    monkeypatch.setattr(module, "open_index", lambda *_, **__: open_index(made.index))
    question = Question(queries=("south/c.tif:128,256",), k=2)
    result, record, _ = ask("http://localhost:6333/tiles", question, out=tmp_path / "without")
    assert result.notes[-1].startswith("An index on a server does not remember where slides lie: ")
    assert record["notes"][-1] == result.notes[-1]
    shown = Page(tmp_path / "without" / page)
    assert result.notes[-1] in " ".join(shown.text.split())
    with_slides, _, _ = ask("http://localhost:6333/tiles", question, slides=(made.slides,), out=tmp_path / "with")
    assert not any("An index on a server" in note for note in with_slides.notes)
    assert len(Page(tmp_path / "with" / page).images) > len(shown.images)


def test_the_demo_picture_shows_searches_inside_one_slide(made: Archive) -> None:
    store = FeatureStore.open(made.features)
    with open_slide(made.slides / "south" / "c.tif") as slide:
        picture, caption = search_picture(store, "south/c.tif", slide, kinds=2, hits=3)
        again, _ = search_picture(store, "south/c.tif", slide, kinds=2, hits=3)
    assert (picture == again).all()
    assert picture.shape[2] == 3
    assert picture.shape[0] == 2 * (132 + 20 + 8) - 8
    assert "2 typical tiles and for each the 3 most like it" in caption


@pytest.mark.real
def test_real_slides_are_searched_and_shown(real_data: Path, tmp_path: Path) -> None:
    """Skin beside two scans of one breast field: the scans are one patient, and the skin finds both."""
    names = ("CMU-1-Small-Region.svs", "OS-2-ndpi.ome.tif", "OS-2-vsi.ome.tif")
    rows = [f"{name},{real_data / 'slides' / name},{name[:5]}" for name in names]
    (tmp_path / "slides.csv").write_text("slide_id,path,patient_id\n" + "\n".join(rows) + "\n")
    settings = IndexSettings(encoder="texture", tile_px=112, mpp=2.0, cohort=tmp_path / "slides.csv", workers=0)
    index = make_index(tmp_path / "slides.csv", str(tmp_path / "index"), settings)
    assert (len(index.done), index.failed) == (3, {})
    result, _, _ = answer(str(tmp_path / "index"), Question(queries=("OS-2-ndpi:1100,1100",), k=99), out=tmp_path)
    assert set(result.mix("slide_id")) == {"CMU-1-Small-Region.svs"}
    assert result.searched.patient > 0
    result, _, _ = answer(
        str(tmp_path / "index"), Question(queries=("CMU-1-Small-Region:1000,1500",), k=9), out=tmp_path
    )
    page = Page(tmp_path / "search.html")
    assert len(page.images) == 2 + 2 * len(result) > 10
    for uri in page.images:
        assert decoded(uri).std() > 10
