"""What a review leaves: the table, the GeoJSON, conflicts, and labels that spread but never into the test split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
from test_review import make_pool, run, truthful

from eosin.errors import QueryError, StoreError, StoreMismatchError
from eosin.retrieval.propagate import PROPAGATED, Propagation
from eosin.tasks.review import Answer, Review
from eosin.tasks.review_export import export_reviews
from eosin.tasks.review_pool import Pool, read_seeds
from eosin.tasks.review_state import AUDIT
from eosin.tiles.geojson import read_geojson


def reviewed(out: Path, pool: Pool, names: list[str], *, reviewer: str, reviews: int) -> None:
    y = np.array(names)
    free = [int(np.flatnonzero((y == label) & ~pool.barred)[0]) for label in ("a", "b", "c")]
    seeds = {row: names[row] for row in free}
    with Review.start(pool, out / f"review-{reviewer}.jsonl", seeds=seeds, reviewer=reviewer) as review:
        run(review, names, reviews=reviews, size=20)
        answer = truthful(review, names)
        first, second, *rest = review.next_round(size=10)
        review.decide(Answer(id=first.id, verdict="skip"), Answer(id=second.id, verdict="reject"), *map(answer, rest))


@pytest.fixture
def world() -> tuple[Pool, list[str]]:
    y = np.random.default_rng(12).integers(3, size=500)
    return make_pool(y, test=0.3), [str(name) for name in np.array(list("abc"))[y]]


def test_the_table_says_what_was_decided(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    pool, names = world
    reviewed(tmp_path, pool, names, reviewer="ada", reviews=60)
    found = export_reviews(pool, tmp_path)
    table = pd.read_parquet(found.table)
    assert len(table) == 3 + 60 + 9
    assert found.notes == ("1 skipped tiles are left out",)
    by_id = {f"{int(tile):016x}": row for row, tile in enumerate(pool.ids.tolist())}
    rows = np.array([by_id[one] for one in table["tile_id"]])
    named = table["label"].notna().to_numpy()
    assert (table["label"][named] == np.array(names)[rows[named]]).all()
    assert (table["slide_id"] == pool.slide_id[rows]).all()
    np.testing.assert_array_equal(table[["x", "y"]].to_numpy(np.int64), pool.xy[rows])
    assert table["source"].value_counts().to_dict() == {"review": 62, AUDIT: 7, "seed": 3}
    rejected = table.loc[~named]
    assert rejected["verdict"].tolist() == ["reject"]
    assert rejected["weight"].tolist() == [0.0]
    assert rejected["not_label"].notna().all()
    assert set(table["split"]) == {"train"}
    assert sum(found.labels.values()) == named.sum()


def test_the_geojson_is_what_qupath_reads(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    pool, names = world
    reviewed(tmp_path, pool, names, reviewer="ada", reviews=40)
    found = export_reviews(pool, tmp_path, spread=Propagation(k=10))
    table = pd.read_parquet(found.table)
    for path in found.geojson:
        slide_id = path.name.removesuffix(".geojson")
        mine = table.loc[(table["slide_id"] == slide_id) & table["label"].notna()]
        areas = read_geojson(path)
        assert sorted(one.name or "" for one in areas) == sorted(mine["label"])
        corners = {(one.geometry.bounds[0], one.geometry.bounds[1]): one for one in areas}
        for row in mine.itertuples():
            area = corners[(row.x, row.y)]
            assert shapely.area(area.geometry) == pytest.approx(224**2)
            assert area.name == row.label
            assert area.object_type == ("detection" if row.source == PROPAGATED else "annotation")
        for feature in json.loads(path.read_text())["features"]:
            assert feature["properties"]["classification"]["color"]
            ring = feature["geometry"]["coordinates"][0]
            assert ring[0] == ring[-1]


def test_spread_labels_are_tagged_light_and_never_tested(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    pool, names = world
    reviewed(tmp_path, pool, names, reviewer="ada", reviews=60)
    plain = pd.read_parquet(export_reviews(pool, tmp_path).table)
    assert PROPAGATED not in set(plain["source"])
    found = export_reviews(pool, tmp_path, spread=Propagation(k=10))
    table = pd.read_parquet(found.table)
    spread = table.loc[table["source"] == PROPAGATED]
    assert len(spread) > 50
    assert (spread["weight"] == 0.5).all()
    assert (spread["split"] != "test").all()
    assert not set(spread["tile_id"]) & set(table.loc[table["source"] != PROPAGATED, "tile_id"])
    assert spread["reviewer"].isna().all()
    assert (spread[["margin", "purity"]] >= [0.5, 0.9]).to_numpy().all()
    truth = {f"{int(tile):016x}": name for tile, name in zip(pool.ids.tolist(), names, strict=True)}
    assert np.mean([truth[one.tile_id] == one.label for one in spread.itertuples()]) > 0.95
    assert sum(found.propagated.values()) == len(spread)
    pd.testing.assert_frame_equal(table.iloc[: len(plain)], plain)


def test_no_audit_tile_spreads(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    """The audit's labels could be anything: what spreads stays the same."""
    pool, names = world
    reviewed(tmp_path, pool, names, reviewer="ada", reviews=60)
    before = pd.read_parquet(export_reviews(pool, tmp_path, spread=Propagation(k=10)).table)
    path = tmp_path / "review-ada.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "decide" and line["share"] == AUDIT:
            line["label"] = "abc"["bca".index(line["label"])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = pd.read_parquet(export_reviews(pool, tmp_path, spread=Propagation(k=10)).table)
    mine = [one.loc[one["source"] == PROPAGATED].reset_index(drop=True) for one in (before, after)]
    pd.testing.assert_frame_equal(*mine)


def test_one_class_does_not_spread(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    pool = world[0]
    row = int(np.flatnonzero(~pool.barred)[0])
    Review.start(pool, tmp_path / "review-a.jsonl", seeds={row: "a"}).close()
    with pytest.raises(QueryError, match="one class only"):
        export_reviews(pool, tmp_path, spread=Propagation())


def test_two_reviewers_and_what_they_disagree_on(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    pool, names = world
    reviewed(tmp_path, pool, names, reviewer="ada", reviews=40)
    other = [{"a": "b"}.get(name, name) if at % 5 == 0 else name for at, name in enumerate(names)]
    seeds = {int(np.flatnonzero((np.array(names) == label) & ~pool.barred)[0]): label for label in "abc"}
    with Review.start(pool, tmp_path / "review-bob.jsonl", seeds=seeds, reviewer="bob") as review:
        run(review, other, reviews=40, size=20)
    found = export_reviews(pool, tmp_path)
    assert found.conflicts is not None
    conflicts = pd.read_csv(found.conflicts)
    table = pd.read_parquet(found.table)
    assert set(conflicts["reviewer"]) == {"ada", "bob"}
    assert not set(conflicts["tile_id"]) & set(table["tile_id"])
    assert (conflicts.groupby("tile_id")["label"].nunique() == 2).all()
    assert found.both > 20
    assert found.kappa is not None
    assert 0.5 < found.kappa < 1
    assert any("disagree" in note for note in found.notes)


def test_images_have_no_geojson(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    pool, names = world
    pool = replace(pool, slide_id=np.array([f"{at}.png" for at in range(500)]), pictures=(tmp_path,) * 500)
    reviewed(tmp_path, pool, names, reviewer="ada", reviews=20)
    found = export_reviews(pool, tmp_path)
    assert found.geojson == ()
    assert any("without a place" in note for note in found.notes)
    table = pd.read_parquet(found.table)
    assert table["x"].isna().all()
    assert (table["file"] == table["slide_id"]).all()


def test_exported_labels_seed_the_next_review(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    pool, names = world
    reviewed(tmp_path, pool, names, reviewer="ada", reviews=40)
    found = export_reviews(pool, tmp_path)
    seeds = read_seeds(found.table, pool)
    assert len(seeds) == sum(found.labels.values())
    assert all(names[row] == label for row, label in seeds.items())


def test_nothing_to_export_and_another_pool(world: tuple[Pool, list[str]], tmp_path: Path) -> None:
    pool, names = world
    with pytest.raises(StoreError, match="holds no review"):
        export_reviews(pool, tmp_path)
    reviewed(tmp_path, pool, names, reviewer="ada", reviews=20)
    with pytest.raises(StoreMismatchError, match="other features"):
        export_reviews(replace(pool, about={**pool.about, "mpp": 0.25}), tmp_path)
