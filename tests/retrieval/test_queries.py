"""Examples become queries, and queries hits: against plain numpy over all tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from shapely.geometry import Point, Polygon

import eosin
import slidegen
from eosin.errors import (
    IndexMismatchError,
    MissingMppError,
    NoTissueError,
    QueryError,
)
from eosin.features import FeatureStore
from eosin.retrieval import All, Between, IndexSpec, Is, Not, VectorIndex, tile_ids
from eosin.retrieval.build import build_index
from eosin.retrieval.engines import create_index, open_index
from eosin.retrieval.examples import (
    Example,
    image_tiles,
    indexed_tiles,
    stored_tiles,
    tile_at,
    tiles_in_annotations,
    tiles_in_rectangle,
    whole_slide,
)
from eosin.retrieval.queries import SearchResult, SearchSettings, search
from eosin.tiles import Annotation, TileSpec

DIM, SIDE = 12, 100
FIELDS: dict[str, Any] = {
    "slide_id": "keyword",
    "patient_id": "keyword",
    "site": "keyword",
    "label": "keyword",
    "x": "integer",
    "y": "integer",
    "size0_px": "float",
    "qc_focus": "float",
}
# slide -> patient, site, label; a and b are one patient's
SLIDES = {
    "a.svs": ("P1", "north", "tumour"),
    "b.svs": ("P1", "north", "normal"),
    "c.svs": ("P2", "south", "tumour"),
    "d.svs": ("P3", "north", "normal"),
    "e.svs": ("P4", "south", ""),
}


@dataclass(frozen=True)
class World:
    """An index of five slides of 6 x 5 tiles, and the same as plain arrays."""

    index: VectorIndex
    ids: npt.NDArray[np.uint64]
    vectors: npt.NDArray[np.float64]
    payload: dict[str, npt.NDArray[Any]]

    def rows(self, **wanted: str) -> npt.NDArray[np.bool_]:
        found = np.ones(len(self.ids), bool)
        for name, value in wanted.items():
            found &= self.payload[name] == value
        return found

    def best(self, query: npt.NDArray[Any], allowed: npt.NDArray[np.bool_], k: int) -> list[int]:
        """The k ids nearest to a query by plain cosines."""
        score = self.vectors @ (query / np.linalg.norm(query))
        order = np.argsort(-np.where(allowed, score, -np.inf), kind="stable")
        return self.ids[order[: min(k, int(allowed.sum()))]].tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    rng = np.random.default_rng(3)
    spec = IndexSpec(dim=DIM, encoder="texture", mpp=0.5, tile_px=SIDE, fields=FIELDS)
    xy = np.array([(SIDE * i, SIDE * j) for j in range(5) for i in range(6)])
    ids, vectors, columns = [], [], {name: [] for name in FIELDS}
    for slide_id, (patient, site, label) in SLIDES.items():
        ids.append(tile_ids(slide_id, xy, spec))
        vectors.append(rng.normal(size=(len(xy), DIM)) + 1.5 * rng.normal(size=DIM))
        for name, value in (("slide_id", slide_id), ("patient_id", patient), ("site", site), ("label", label)):
            columns[name] += [value] * len(xy)
        columns["x"] += xy[:, 0].tolist()
        columns["y"] += xy[:, 1].tolist()
        columns["size0_px"] += [float(SIDE)] * len(xy)
        columns["qc_focus"] += rng.random(len(xy)).tolist()
    payload = {name: np.array(v, dtype=object if FIELDS[name] == "keyword" else None) for name, v in columns.items()}
    index = create_index(tmp_path_factory.mktemp("world") / "index", spec, engine="exact")
    x = np.concatenate(vectors)
    index.upsert(np.concatenate(ids), x.astype(np.float32), payload)
    yield World(index, np.concatenate(ids), x / np.linalg.norm(x, axis=1, keepdims=True), payload)
    index.close()


def one(world: World, slide: str = "a.svs", xy: tuple[int, int] = (200, 300)) -> Example:
    return tile_at(indexed_tiles(world.index, slide), xy)


def found(result: SearchResult) -> list[int]:
    return result.hits.ids.tolist()


def test_own_slide_and_patient_are_left_out_unless_asked_for(world: World) -> None:
    example = one(world)
    query = example.vectors[0]
    own = np.isin(world.ids, example.ids)
    for same_slide, same_patient, allowed in (
        (False, False, ~world.rows(patient_id="P1")),
        (False, True, ~world.rows(slide_id="a.svs")),
        (True, False, ~world.rows(slide_id="b.svs") & ~own),
        (True, True, ~own),
    ):
        settings = SearchSettings(k=25, same_slide=same_slide, same_patient=same_patient)
        result = search(world.index, [example], settings=settings)
        assert found(result) == world.best(query, allowed, 25)
        assert result.searched.left == allowed.sum()
        part = result.searched
        assert part.total == part.own + part.patient + part.filtered + part.left == len(world.ids)
    default = search(world.index, [example])
    assert found(default) == world.best(query, ~world.rows(patient_id="P1"), 10)
    np.testing.assert_allclose(default.hits.score, np.sort(default.hits.score)[::-1])


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        (Is("site", ("south",)), lambda w: w.rows(site="south")),
        (Not(Is("label", ("tumour",))), lambda w: ~w.rows(label="tumour")),
        (Between("qc_focus", 0.3, 0.6), lambda w: (w.payload["qc_focus"] >= 0.3) & (w.payload["qc_focus"] <= 0.6)),
        (
            All((Is("site", ("north",)), Between("qc_focus", 0.5, None))),
            lambda w: w.rows(site="north") & (w.payload["qc_focus"] >= 0.5),
        ),
    ],
    ids=["site", "not label", "focus", "both"],
)
def test_filters_are_applied_before_ranking(world: World, where: Any, allowed: Any) -> None:
    example = one(world)
    kept = allowed(world) & ~world.rows(patient_id="P1")
    result = search(world.index, [example], settings=SearchSettings(k=12, where=where))
    assert found(result) == world.best(example.vectors[0], kept, 12)
    assert result.searched.filtered == (~world.rows(patient_id="P1")).sum() - kept.sum()
    same = search(world.index, [example], settings=SearchSettings(k=200, where=where, same_slide=True))
    own = np.isin(world.ids, example.ids)
    kept = allowed(world) & ~own & ~world.rows(slide_id="b.svs")
    assert sorted(found(same)) == sorted(world.ids[kept].tolist())
    assert same.searched.left == kept.sum()
    assert same.searched.total == same.searched.own + same.searched.patient + same.searched.filtered + kept.sum()


def test_too_few_after_filtering_is_said(world: World) -> None:
    where = All((Is("slide_id", ("c.svs",)), Between("x", None, 150)))
    result = search(world.index, [one(world)], settings=SearchSettings(k=20, where=where))
    assert len(result) == 10
    assert result.hits.lacking == 10
    assert "20 hits were wanted and 10 found, for 10 of 150 tiles were left" in result.notes[0]
    assert not search(world.index, [one(world)], settings=SearchSettings(k=10, where=where)).notes


def test_a_value_that_no_tile_has_is_named_with_the_closest(world: World) -> None:
    result = search(world.index, [one(world)], settings=SearchSettings(where=Is("label", ("tumor",))))
    assert len(result) == 0
    assert result.searched.left == 0
    assert any("No tile has label 'tumor'; the closest are: tumour" in note for note in result.notes)
    assert result.rarity().shape == (0,)
    assert result.mix("label") == {}
    with pytest.raises(QueryError, match="no field 'labels'"):
        search(world.index, [one(world)], settings=SearchSettings(where=Is("labels", ("tumour",))))


def test_rectangles_hold_the_tiles_whose_centre_lies_inside(world: World) -> None:
    tiles = indexed_tiles(world.index, "c.svs")
    example = tiles_in_rectangle(tiles, (150, 50), (200, 100))  # centres x 150 and 250, y 50
    assert sorted(map(tuple, example.xy.tolist())) == [(100, 0), (200, 0)]
    everything = tiles_in_rectangle(tiles, (0, 0), (600, 500))
    assert len(everything.xy) == 30
    with pytest.raises(QueryError, match=r"none of its 30 tiles .* c.svs:75,25"):
        tiles_in_rectangle(tiles, (70, 20), (10, 10))
    with pytest.raises(QueryError, match="empty"):
        tiles_in_rectangle(tiles, (0, 0), (0, 10))


def test_annotations_hold_the_tiles_whose_centre_lies_inside(world: World) -> None:
    tiles = indexed_tiles(world.index, "c.svs")
    ring = Polygon([(10, 10), (590, 40), (560, 480), (30, 430)], [[(200, 120), (420, 130), (400, 330), (190, 300)]])
    square = Polygon([(300, 200), (360, 200), (360, 260), (300, 260)])
    areas = [Annotation(geometry=ring, name="Tumour"), Annotation(geometry=square)]
    example = tiles_in_annotations(tiles, areas, name="drawn.geojson")
    expected = {
        (x, y)
        for x, y in tiles.xy.tolist()
        if ring.contains(Point(x + 50, y + 50)) or square.contains(Point(x + 50, y + 50))
    }
    assert set(map(tuple, example.xy.tolist())) == expected
    assert (300, 200) in expected
    assert (200, 200) not in expected
    with pytest.raises(QueryError, match="holds no area"):
        tiles_in_annotations(tiles, [], name="empty.geojson")


def test_points_find_the_tile_that_covers_them(world: World) -> None:
    tiles = indexed_tiles(world.index, "d.svs")
    assert tile_at(tiles, (300, 200)).xy.tolist() == [[300, 200]]
    assert tile_at(tiles, (399, 201)).xy.tolist() == [[300, 200]]
    with pytest.raises(QueryError, match=r"no tile covers \(650, 10\).*nearest tile is at \(500, 0\)"):
        tile_at(tiles, (650, 10))
    assert one(world, "d.svs", (0, 0)).about == {"patient_id": {"P3": 1}, "site": {"north": 1}, "label": {"normal": 1}}
    with pytest.raises(QueryError, match=r"not in the index \(5 slides; the closest are: d.svs"):
        indexed_tiles(world.index, "dd.svs")


def test_the_mean_of_a_region_is_looked_for(world: World) -> None:
    example = tiles_in_rectangle(indexed_tiles(world.index, "a.svs"), (0, 0), (300, 200))
    own = world.vectors[np.isin(world.ids, example.ids)]
    assert len(own) == 6
    result = search(world.index, [example], settings=SearchSettings(k=15))
    assert found(result) == world.best(own.mean(axis=0), ~world.rows(patient_id="P1"), 15)
    assert result.matched is None


def test_each_tile_may_ask_for_itself(world: World) -> None:
    example = whole_slide(indexed_tiles(world.index, "a.svs"))
    allowed = ~world.rows(patient_id="P1")
    result = search(world.index, [example], settings=SearchSettings(k=20, merge="best"))
    table = world.vectors @ example.vectors.T.astype(np.float64)
    score = np.where(allowed, table.max(axis=1), -np.inf)
    order = np.argsort(-score)[:20]
    assert found(result) == world.ids[order].tolist()
    np.testing.assert_allclose(result.hits.score, score[order], atol=1e-6)
    assert result.matched is not None
    assert result.matched.tolist() == table[order].argmax(axis=1).tolist()


def test_counter_examples_move_the_query_away(world: World) -> None:
    like = [
        one(world),
        one(world, "c.svs", (0, 0)),
        tiles_in_rectangle(indexed_tiles(world.index, "c.svs"), (300, 300), (200, 100)),
    ]
    unlike = [one(world, "d.svs", (100, 100))]
    result = search(world.index, like, against=unlike, settings=SearchSettings(k=10))

    def mean(examples: list[Example]) -> npt.NDArray[np.float64]:
        units = [v / np.linalg.norm(v) for v in (e.vectors.astype(np.float64).mean(axis=0) for e in examples)]
        return np.mean(units, axis=0)

    query = 2 * mean(like) - mean(unlike)
    # The slides of examples are left out; of the counter-example's only the tile itself.
    own = np.isin(world.ids, unlike[0].ids)
    assert found(result) == world.best(query, ~world.rows(patient_id="P1") & ~world.rows(patient_id="P2") & ~own, 10)
    assert result.searched.left == 59
    assert result.searched.own == 61
    every = search(world.index, like, against=unlike, settings=SearchSettings(k=99))
    assert len(every) == 59
    with pytest.raises(QueryError, match="merge 'mean'"):
        search(world.index, like, against=unlike, settings=SearchSettings(merge="best"))
    opposite = replace(like[0], vectors=-like[0].vectors)
    with pytest.raises(QueryError):
        search(world.index, [like[0], opposite])


@pytest.mark.parametrize("weight", [0.0, 0.35, 0.8, 1.0])
def test_diverse_hits_follow_the_formula(world: World, weight: float) -> None:
    example = one(world)
    result = search(world.index, [example], settings=SearchSettings(k=8, mmr=weight))
    pool = np.array(
        [np.flatnonzero(world.ids == i)[0] for i in world.best(example.vectors[0], ~world.rows(patient_id="P1"), 100)]
    )
    score = world.vectors[pool] @ example.vectors[0].astype(np.float64)
    chosen = [0]
    while len(chosen) < 8:
        rest = [i for i in range(len(pool)) if i not in chosen]
        value = {
            i: weight * score[i] - (1 - weight) * max(world.vectors[pool[i]] @ world.vectors[pool[j]] for j in chosen)
            for i in rest
        }
        chosen.append(max(rest, key=lambda i: (value[i], -i)))
    assert found(result) == world.ids[pool[chosen]].tolist()
    assert len(set(found(result))) == 8


def test_chance_is_the_score_of_what_was_searched(world: World) -> None:
    example = one(world)
    result = search(world.index, [example], settings=SearchSettings(k=5, where=Is("site", ("south",))))
    expected = np.sort(world.vectors[world.rows(site="south")] @ example.vectors[0].astype(np.float64))
    np.testing.assert_allclose(result.chance, expected, atol=1e-6)
    np.testing.assert_allclose(result.rarity(), np.arange(1, 6) / 60)
    assert result.base["site"] == {"south": 60}
    assert result.base["label"] == {"tumour": 30, "": 30}
    assert sum(result.mix("label").values()) == 5


def test_copies_of_the_query_are_pointed_out(tmp_path: Path, world: World) -> None:
    spec = replace(world.index.spec)
    with_copy = create_index(tmp_path / "index", spec, engine="exact")
    example = one(world)
    rows = np.concatenate([np.flatnonzero(world.rows(slide_id="a.svs")), np.flatnonzero(world.rows(slide_id="c.svs"))])
    payload = {name: column[rows].copy() for name, column in world.payload.items()}
    vectors = world.vectors[rows].astype(np.float32)
    vectors[-1] = example.vectors[0] * 3
    with_copy.upsert(world.ids[rows], vectors, payload)
    result = search(with_copy, [one(World(with_copy, world.ids, world.vectors, payload))], settings=SearchSettings(k=3))
    assert any(note.startswith("1 of 3 hits are all but identical") for note in result.notes)
    with_copy.close()


def test_bad_questions_are_refused(world: World) -> None:
    example = one(world)
    with pytest.raises(QueryError, match="nothing to look for"):
        search(world.index, [])
    with pytest.raises(QueryError, match="k is 0"):
        search(world.index, [example], settings=SearchSettings(k=0))
    with pytest.raises(QueryError, match="mmr is 2"):
        search(world.index, [example], settings=SearchSettings(mmr=2))
    with pytest.raises(QueryError, match="unknown merge"):
        search(world.index, [example], settings=SearchSettings(merge="sum"))  # type: ignore[arg-type]
    with pytest.raises(IndexMismatchError, match="dim"):
        search(world.index, [replace(example, vectors=example.vectors[:, :5])])
    for bad in (np.nan, 0.0):
        with pytest.raises(QueryError, match=r"NaN|zero"):
            search(world.index, [replace(example, vectors=np.full((1, DIM), bad, np.float32))])


@pytest.fixture(scope="module")
def real_index(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, FeatureStore, VectorIndex, npt.NDArray[np.uint8]]]:
    """Two slides on disk, their texture features and an index of them; and the first one's pixels."""
    root = tmp_path_factory.mktemp("slides")
    (root / "slides").mkdir()
    pixels = {}
    for seed, name in enumerate(("a.tif", "b.tif")):
        pixels[name], _ = slidegen.histology(1000, 800, seed=seed, mpp=0.5)
        slidegen.write_tiff(root / "slides" / name, pixels[name], slidegen.TiffStyle(mpp=0.5))
    store = eosin.extract(root / "slides", TileSpec(tile_px=128, mpp=0.5), "texture", out=root / "features", workers=0)
    build_index(store.path, root / "index", engine="exact")
    index = open_index(root / "index")
    yield root, store, index, pixels["a.tif"]
    index.close()


def encode(tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return eosin.load_encoder("texture").encode(tiles)


def test_an_image_cut_from_a_slide_finds_its_own_tile(real_index: Any, tmp_path: Path) -> None:
    from PIL import Image

    _, store, index, pixels = real_index
    x, y = store["a.tif"].xy[7].tolist()
    Image.fromarray(pixels[y : y + 128, x : x + 128]).save(tmp_path / "cut.png")
    example = image_tiles(tmp_path / "cut.png", index.spec, encode, mpp=0.5)
    result = search(index, [example], settings=SearchSettings(k=3))
    assert (result.hits.payload["slide_id"][0], result.hits.payload["x"][0], result.hits.payload["y"][0]) == (
        "a.tif",
        x,
        y,
    )
    assert result.hits.score[0] > 0.99999
    assert any("patient of image cut.png" in note for note in result.notes)
    # The same glass scanned twice as fine: enlarged pixels, halved mpp.
    fine = np.repeat(np.repeat(pixels[y : y + 128, x : x + 128], 2, axis=0), 2, axis=1)
    Image.fromarray(fine).save(tmp_path / "fine.png")
    again = image_tiles(tmp_path / "fine.png", index.spec, encode, mpp=0.25)
    assert float(again.vectors[0] @ example.vectors[0]) > 0.99999


def test_images_of_the_wrong_size_are_refused_or_tiled(real_index: Any, tmp_path: Path) -> None:
    from PIL import Image

    _, store, index, pixels = real_index
    Image.fromarray(pixels).save(tmp_path / "large.png")
    example = image_tiles(tmp_path / "large.png", index.spec, encode, mpp=0.5)
    assert len(example.xy) > 20
    assert example.slide_id is None
    in_both = {tuple(xy) for xy in example.xy.tolist()} & {tuple(xy) for xy in store["a.tif"].xy.tolist()}
    assert len(in_both) > 15
    Image.fromarray(pixels[:100, :100]).save(tmp_path / "small.png")
    with pytest.raises(QueryError, match="shows 50 x 50 µm; a tile of the index is 64 µm wide and is never padded"):
        image_tiles(tmp_path / "small.png", index.spec, encode, mpp=0.5)
    with pytest.raises(MissingMppError, match="give it with --mpp"):
        image_tiles(tmp_path / "small.png", index.spec, encode)
    Image.fromarray(np.full((400, 400, 3), 245, np.uint8)).save(tmp_path / "blank.png")
    with pytest.raises(NoTissueError):
        image_tiles(tmp_path / "blank.png", index.spec, encode, mpp=0.5)
    unknown = replace(index.spec, mpp=None, tile_px=None)
    with pytest.raises(QueryError, match="does not say how large its tiles are"):
        image_tiles(tmp_path / "large.png", unknown, encode, mpp=0.5)


def test_slides_of_a_store_are_searched_for_if_made_alike(real_index: Any, tmp_path: Path) -> None:
    _, store, index, _ = real_index
    tiles = stored_tiles(store, "a.tif", index.spec)
    inside = indexed_tiles(index, "a.tif")
    assert len(tiles.xy) == len(inside.xy) == store["a.tif"].kept.sum()
    example = tile_at(tiles, tuple(tiles.xy[3].tolist()))
    assert not len(example.ids)
    result = search(index, [example], settings=SearchSettings(k=50))
    assert set(result.hits.payload["slide_id"]) == {"b.tif"}  # the slide is left out by its name
    for field, value in (("encoder", "resnet"), ("mpp", 0.25), ("tile_px", 64), ("weights_sha256", "ab"), ("dim", 3)):
        with pytest.raises(IndexMismatchError, match=field):
            stored_tiles(store, "a.tif", replace(index.spec, **{field: value}))
