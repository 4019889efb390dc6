"""The feature store: what is written, what is refused, what is found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest

from eosin.errors import (
    NonFiniteError,
    StoreCorruptError,
    StoreError,
    StoreLockedError,
    StoreMismatchError,
)
from eosin.features.recipe import canonical_json
from eosin.features.store import FeatureStore, Recipe, stem
from eosin.features.writer import content_hash

META = {
    "size_px": (20000, 15000),
    "mpp": {"x": 0.25, "y": 0.2501, "source": "openslide.mpp-x", "objective_power": 40.0, "conflict": None},
    "fingerprint": "f" * 64,
    "reader": "openslide 4.0.1",
}


def recipe(**changes) -> Recipe:
    base = {
        "encoder": {"name": "tiny", "dim": 6, "pooling": "cls"},
        "tile": {"tile_px": 224, "mpp": 0.5, "overlap_px": 0, "min_tissue": 0.1, "edge": "drop"},
        "tissue": {"method": "auto"},
        "qc": {"rules": []},
        "stain": None,
        "precision": "fp32",
        "dtype": "float32",
        "tokens": False,
        "icc": False,
    }
    return Recipe(**{**base, **changes})


def rows(n: int, seed: int = 0, dim: int = 6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim)).astype(np.float32)
    xy = rng.integers(0, 15000, size=(n, 2))
    qc = {"focus": rng.random(n, dtype=np.float32), "read_status": np.zeros(n, np.int8)}
    return x, xy, qc


def write(store: FeatureStore, slide_id: str, n: int = 700, batch: int = 64, seed: int = 0, **meta):
    x, xy, qc = rows(n, seed)
    reason = (np.arange(n) % 5 == 0).astype(np.int8)
    with store.writer(slide_id, meta={**META, **meta}) as writer:
        for i in range(0, n, batch):
            part = slice(i, i + batch)
            writer.append(x[part], xy[part], {k: v[part] for k, v in qc.items()})
        writer.finish(
            reason,
            background_xy=[[1, 2], [3, 4]],
            background_tissue=[0.0, 0.05],
            qc={"neighbours": np.linspace(0, 1, n, dtype=np.float32)},
        )
    return x, xy, qc, reason


def _append(writer, x=None, xy=None, qc=None):
    good = rows(4)
    writer.append(good[0] if x is None else x, good[1] if xy is None else xy, good[2] if qc is None else qc)


def _write_parts(store, *parts, end=None):
    """Write "a.svs" from parts of four good rows, each with some arguments of append() replaced."""
    with store.writer("a.svs", meta=META) as writer:
        for part in parts:
            _append(writer, **part)
        writer.finish(**(end or {}))


@pytest.fixture
def store(tmp_path):
    return FeatureStore.create(tmp_path / "features", recipe())


def test_the_table_of_tiles_is_all_but_the_features_and_reads_none(tmp_path, monkeypatch):
    store = FeatureStore.create(tmp_path, recipe())
    write(store, "a/one.svs")
    whole, read = store["a/one.svs"], []
    plain = h5py.Dataset.__getitem__

    def noting(dataset, args, **options):
        read.append(dataset.name)
        return plain(dataset, args, **options)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", noting)
    table = store.tiles("one")
    assert "/features" not in read
    assert "/qc/focus" in read
    assert len(table) == len(whole)
    np.testing.assert_array_equal(table.kept, whole.kept)
    for field in dataclasses.fields(table):
        np.testing.assert_equal(getattr(table, field.name), getattr(whole, field.name))
    assert {field.name for field in dataclasses.fields(whole)} - {f.name for f in dataclasses.fields(table)} == {"x"}


def test_what_is_written_is_read(store):
    x, xy, qc, reason = write(store, "a/b.svs")
    found = store["a/b.svs"]
    np.testing.assert_array_equal(found.x, x)
    np.testing.assert_array_equal(found.xy, xy)
    np.testing.assert_array_equal(found.reason, reason)
    np.testing.assert_array_equal(found.kept, reason == 0)
    np.testing.assert_array_equal(found.qc["focus"], qc["focus"])
    np.testing.assert_array_equal(found.qc["neighbours"], np.linspace(0, 1, 700, dtype=np.float32))
    np.testing.assert_array_equal(found.background_xy, [[1, 2], [3, 4]])
    np.testing.assert_allclose(found.background_tissue, [0.0, 0.05])
    assert found.x.dtype == np.float32
    assert found.xy.dtype == np.int64
    assert found.qc["read_status"].dtype == np.int8
    assert (found.mpp, found.tile_px) == (0.5, 224)
    assert found.size0_px == pytest.approx((448.0, 224 * 0.5 / 0.2501))
    assert found.slide["reader"] == "openslide 4.0.1"
    assert Recipe.from_dict(found.recipe) == store.recipe
    assert store.verify() == [("a/b.svs", True, "")]


def test_size0_px_given_wins(store):
    write(store, "a.svs", size0_px=(447.5, 447.5))
    assert store["a.svs"].size0_px == (447.5, 447.5)


def test_trident_layout(store):
    """The names and attributes TRIDENT's own files carry, read with plain h5py."""
    write(store, "case/TCGA-A1.0f3c.svs")
    with h5py.File(store.path / "case/TCGA-A1.0f3c.svs.h5") as file:
        features, coords = file["features"], file["coords"]
        assert (features.shape, coords.shape, coords.dtype) == ((700, 6), (700, 2), np.int64)
        assert dict(features.attrs) == {"name": "TCGA-A1.0f3c", "savetodir": "", "encoder": "tiny"}
        expected = {
            "patch_size": 224,
            "patch_size_level0": 448,
            "level0_magnification": round(10 / np.sqrt(0.25 * 0.2501), 2),
            "target_magnification": 20.0,
            "overlap": 0,
            "name": "TCGA-A1.0f3c",
            "savetodir": "",
            "level0_width": 20000,
            "level0_height": 15000,
            "mpp": 0.5,
            "mpp_x": 0.25,
            "mpp_y": 0.2501,
            "tile_px": 224,
            "coord_space": "level-0 pixels, top-left corner, (x, y)",
        }
        assert dict(coords.attrs) == expected
        assert 256 <= features.chunks[0] <= 1024
        assert file.attrs["recipe_hash"] == store.recipe.hash
        assert file.attrs["content_hash"] == content_hash(file)
        assert str(store.path) not in repr(dict(file.attrs))


@pytest.mark.parametrize("batch", [1, 64, 700])
def test_bytes_do_not_depend_on_batches_or_time(tmp_path, batch):
    digests = set()
    for folder, size in (("one", 256), ("two", batch)):
        store = FeatureStore.create(tmp_path / folder, recipe())
        write(store, "a.svs", batch=size)
        digests.add(hashlib.sha256((store.path / "a.svs.h5").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_bytes_do_not_depend_on_the_process(store, tmp_path):
    write(store, "a.svs", n=300)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_store as t;"
        "s = t.FeatureStore.create(sys.argv[2], t.recipe()); t.write(s, 'a.svs', n=300)"
    )
    folder = str(__import__("pathlib").Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, folder, str(tmp_path / "other")], check=True)
    assert (store.path / "a.svs.h5").read_bytes() == (tmp_path / "other" / "a.svs.h5").read_bytes()


def test_a_float16_store_holds_float16(tmp_path):
    store = FeatureStore.create(tmp_path, recipe(dtype="float16"))
    x, *_ = write(store, "a.svs", n=40)
    np.testing.assert_array_equal(store["a.svs"].x, x.astype(np.float16))


def test_tokens(tmp_path):
    store = FeatureStore.create(tmp_path, recipe(tokens=True))
    tokens = np.random.default_rng(1).normal(size=(5, 2, 3, 4)).astype(np.float32)
    x, xy, qc = rows(5)
    with store.writer("a.svs", meta=META) as writer:
        writer.append(x, xy, qc, tokens=tokens)
        writer.finish()
    with h5py.File(store.path / "a.svs.h5") as file:
        np.testing.assert_array_equal(file["tokens"], tokens.astype(np.float16))
    assert store.verify()[0].ok


def test_tokens_are_given_iff_the_recipe_says_so(store):
    x, xy, qc = rows(2)
    with pytest.raises(StoreError, match=r"recipe\.tokens is False"), store.writer("a", meta=META) as writer:
        writer.append(x, xy, qc, tokens=np.zeros((2, 1, 1, 6)))


def test_a_slide_without_tiles(store):
    with store.writer("a.svs", meta=META) as writer:
        writer.finish()
    assert store["a.svs"].x.shape == (0, 6)
    assert store["a.svs"].xy.shape == (0, 2)
    assert store.verify()[0].ok


def test_slides_are_listed_and_named(store):
    for slide_id in ("b/one.svs", "a/one.tif", "a/two.ome.tif", "TCGA.1.svs"):
        write(store, slide_id, n=3)
    assert list(store) == ["TCGA.1.svs", "a/one.tif", "a/two.ome.tif", "b/one.svs"]
    assert len(store) == 4
    assert "a/one.tif" in store
    assert "one" not in store
    assert "../x" not in store
    assert store["two"].slide_id == "a/two.ome.tif"
    assert store["b/one"].slide_id == "b/one.svs"
    assert store["one.svs"].slide_id == "b/one.svs"
    assert store["TCGA.1"].slide_id == "TCGA.1.svs"
    with pytest.raises(StoreError, match="'one' names 2 slides"):
        store["one"]
    with pytest.raises(StoreError, match=r"closest are: .*a/two\.ome\.tif"):
        store["a/tow"]


@pytest.mark.parametrize(
    ("slide_id", "name"),
    [
        ("a/b.svs", "b"),
        ("x.ome.tiff", "x"),
        ("TCGA-A1.0f3c-11", "TCGA-A1.0f3c-11"),
        ("TCGA.1.svs", "TCGA.1"),
        ("v1.25", "v1.25"),
        (".svs", ".svs"),
    ],
)
def test_stem(slide_id, name):
    assert stem(slide_id) == name


def test_done_needs_recipe_and_content(store):
    write(store, "a.svs", n=3)
    assert store.done("a.svs", META["fingerprint"])
    assert not store.done("a.svs", "another slide under the same name")
    assert not store.done("b.svs", META["fingerprint"])
    assert not FeatureStore(store.path, recipe(precision="bf16")).done("a.svs", META["fingerprint"])
    path = store.path / "a.svs.h5"
    path.write_bytes(path.read_bytes()[:1000])
    assert not store.done("a.svs", META["fingerprint"])


def test_another_recipe_is_refused_field_by_field(store):
    other = recipe(tile={**store.recipe.tile, "mpp": 0.25}, precision="bf16", stain={"method": "macenko"})
    with pytest.raises(StoreMismatchError) as caught:
        FeatureStore.create(store.path, other)
    message = str(caught.value)
    assert "tile.mpp: here 0.25, store has 0.5" in message
    assert 'precision: here "bf16", store has "fp32"' in message
    assert 'stain.method: here "macenko", store has nothing' in message
    assert "--out" in message
    assert FeatureStore.create(store.path, recipe()).recipe == store.recipe


def test_recipe_hash_is_of_the_canonical_json():
    made = recipe()
    assert made.hash == hashlib.sha256(canonical_json(made.to_dict()).encode()).hexdigest()
    assert made.hash == recipe(tile=dict(reversed(made.tile.items()))).hash
    assert recipe(tile={"mpp": 1}).hash == recipe(tile={"mpp": 1.0}).hash
    assert recipe(tile={"mpp": np.float64(0.5)}).hash == recipe(tile={"mpp": 0.5}).hash
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    changed = {
        **{k: {**v, "new": 1} for k, v in fields.items() if isinstance(v, dict)},
        **{"stain": {}, "precision": "bf16", "dtype": "float16", "tokens": True, "icc": True, "version": 3},
    }
    assert changed.keys() == fields.keys()
    assert len({made.hash, *(recipe(**{k: v}).hash for k, v in changed.items())}) == 1 + len(fields)
    with pytest.raises(ValueError, match="float64"):
        recipe(dtype="float64")
    with pytest.raises(TypeError, match="set"):
        recipe(qc={"x": {1, 2}}).to_dict()


def test_store_pickles(store):
    write(store, "a.svs", n=3)
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again["a.svs"].x, store["a.svs"].x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_and_nothing_is_stored(store, bad):
    x, xy, qc = rows(10)
    x[7, 2] = bad
    with pytest.raises(NonFiniteError, match=r"a\.svs: features of tile 11 "):
        _write_parts(store, {}, {"x": x, "xy": xy, "qc": qc})
    assert "a.svs" not in store
    assert not list(store.path.glob(".*.tmp"))


def test_a_qc_number_that_is_not_finite(store):
    x, xy, qc = rows(10)
    qc["focus"][3] = np.nan
    with pytest.raises(NonFiniteError, match="qc/focus of tile 3"), store.writer("a.svs", meta=META) as writer:
        writer.append(x, xy, qc)


def test_float16_overflow_is_an_error_and_not_an_infinity(tmp_path):
    store = FeatureStore.create(tmp_path, recipe(dtype="float16"))
    x, xy, qc = rows(4)
    x[1, 0] = 70000
    with pytest.raises(NonFiniteError, match=r"tile 1 .*too large for float16"), store.writer("a", meta=META) as writer:
        writer.append(x, xy, qc)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.zeros((3, 6))}, "features has shape"),
        ({"x": np.zeros((4, 5))}, "features rows are"),
        ({"x": np.zeros(4)}, "features has shape"),
        ({"xy": np.zeros((4, 3), int)}, "coords has shape"),
        ({"xy": np.zeros((4, 2))}, "integer pixels, not float64"),
        ({"qc": {"focus": np.zeros(4, np.float32)}}, r"append\(\) got"),
        ({"qc": {"focus": np.zeros(3, np.float32), "read_status": np.zeros(4, np.int8)}}, "qc/focus has shape"),
    ],
)
def test_shapes_that_do_not_fit(store, arguments, message):
    with pytest.raises(StoreError, match=message):
        _write_parts(store, {}, arguments)
    assert len(store) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reason": np.zeros(3, np.int8)}, "reason has shape"),
        ({"qc": {"late": np.zeros(5)}}, "qc/late has shape"),
        ({"background_xy": [[1, 2]], "background_tissue": [1.0, 2.0]}, "background_tissue"),
    ],
)
def test_an_end_that_does_not_fit(store, arguments, message):
    with pytest.raises(StoreError, match=message):
        _write_parts(store, {}, end=arguments)
    assert len(store) == 0


def test_leaving_without_finish_stores_nothing(store):
    with pytest.raises(StoreError, match="without finish"), store.writer("a.svs", meta=META) as writer:
        _append(writer)
    with pytest.raises(TypeError, match="interrupt"):
        _write_parts(store, {}, end={"interrupt": True})
    assert len(store) == 0
    assert not list(store.path.glob(".*.tmp"))
    with pytest.raises(StoreError, match="closed"):
        writer.finish(np.zeros(4, np.int8))
    write(store, "a.svs")


@pytest.mark.parametrize("slide_id", ["", "../a.svs", "/a.svs", "a//b.svs", "a/./b", "a\\b.svs", "a\0b"])
def test_unsafe_slide_ids(store, slide_id):
    with pytest.raises(StoreError, match="slide id"):
        store.writer(slide_id, meta=META)


def test_meta_must_say_what_resume_needs(store):
    with pytest.raises(StoreError, match="meta lacks fingerprint"):
        store.writer("a.svs", meta={k: v for k, v in META.items() if k != "fingerprint"})


def test_failures_come_and_go(store):
    store.record_failure("b/x.svs", "RegionError", "tile (1, 2) cannot be decoded: «é»")
    store.record_failure("a.svs", "NoTissueError", "blank")
    assert [f["slide_id"] for f in store.failures()] == ["a.svs", "b/x.svs"]
    assert store.failures()[1]["message"] == "tile (1, 2) cannot be decoded: «é»"
    assert json.loads((store.path / "failures/b/x.svs.json").read_text("utf-8"))["error"] == "RegionError"
    write(store, "b/x.svs", n=3)
    store.clear_failure("never.svs")
    assert [f["slide_id"] for f in store.failures()] == ["a.svs"]
    assert store.slide_ids == ["b/x.svs"]


def test_two_writers_of_one_slide(store):
    with store.writer("a.svs", meta=META) as writer:
        _append(writer)
        with pytest.raises(StoreLockedError, match=r"a\.svs"):
            store.writer("a.svs", meta=META)
        write(store, "b.svs", n=3)
        writer.finish()
    assert len(store) == 2
    write(store, "a.svs")


def test_not_a_store(tmp_path):
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        FeatureStore.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        FeatureStore.create(tmp_path / "file", recipe())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "eosin-features"}', '{"format": "other"}'])
def test_a_broken_manifest(store, text):
    (store.path / "manifest.json").write_text(text)
    with pytest.raises(StoreCorruptError, match=r"manifest\.json"):
        FeatureStore.open(store.path)


def test_an_altered_manifest_and_a_newer_one(store):
    manifest = store.path / "manifest.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "recipe": {**data["recipe"], "precision": "bf16"}}))
    with pytest.raises(StoreCorruptError, match="hash"):
        FeatureStore.open(store.path)
    manifest.write_text(json.dumps({**data, "format_version": 99}))
    with pytest.raises(StoreError, match="upgrade"):
        FeatureStore.open(store.path)
