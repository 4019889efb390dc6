"""Feature files of other tools: what goes out comes back, and other readers can open it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from eosin.errors import ConvertError, ImplausibleMppError, NonFiniteError, StoreMismatchError
from eosin.features.convert import FORMATS, KEEPS_REASONS, convert, detect, read_features
from eosin.features.store import FeatureStore, Recipe

MPP = (0.2527, 0.2527)
SIDE0 = 224 * 0.5 / 0.2527
NEEDS = {"clam": "torch", "safetensors": "safetensors", "anndata": "anndata", "spatialdata": "spatialdata"}
FOREIGN = [name for name in FORMATS if name != "eosin"]


def make_store(folder: Path, *, n: int = 60, dtype: str = "float32", ids=("a/one.svs", "b/two.ndpi")) -> FeatureStore:
    recipe = Recipe(
        encoder={"name": "dinov2-vits14", "dim": 16},
        tile={"tile_px": 224, "mpp": 0.5, "overlap_px": 32, "min_tissue": 0.1, "edge": "drop"},
        tissue={},
        qc={},
        stain=None,
        precision="fp32",
        dtype=dtype,
        tokens=False,
        icc=False,
    )
    store = FeatureStore.create(folder, recipe)
    for seed, slide_id in enumerate(ids):
        rng = np.random.default_rng(seed)
        # Distinct corners in eosin's order (by y, then x).
        places = np.sort(rng.choice(40 * 30, n, replace=False))
        xy = np.stack([places % 40, places // 40], axis=1) * 389 + 17
        meta = {"size_px": (20001, 15003), "mpp": {"x": MPP[0], "y": MPP[1], "source": "test"}, "fingerprint": "f"}
        with store.writer(slide_id, meta=meta) as writer:
            tissue = rng.random(n, dtype=np.float32)
            writer.append(rng.normal(size=(n, 16)).astype(dtype), xy, {"tissue": tissue})
            writer.finish((np.arange(n) % 6 == 5).astype(np.int8))
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "features")


def by_place(x, xy):
    order = np.lexsort(xy.T)
    return x[order], xy[order]


@pytest.mark.parametrize("fmt", FOREIGN)
def test_round_trip(store, tmp_path, fmt):
    """eosin -> format -> eosin: features bit-equal (STAMP: as float16), coordinates equal, metadata kept."""
    pytest.importorskip(NEEDS.get(fmt, "numpy"))
    written = convert(store.path, tmp_path / "there", to=fmt)
    assert all(path.exists() for path in written)
    convert(tmp_path / "there", tmp_path / "back", to="eosin")
    back = FeatureStore.open(tmp_path / "back")
    assert all(row.ok for row in back.verify())
    assert list(back) == list(store)
    for slide_id in store:
        old, new = store[slide_id], back[slide_id]
        rows = slice(None) if fmt in KEEPS_REASONS else old.kept
        x, xy = by_place(old.x[rows], old.xy[rows])
        found_x, found_xy = by_place(new.x, new.xy)
        np.testing.assert_array_equal(found_x, x.astype(np.float16) if fmt == "stamp" else x)
        np.testing.assert_array_equal(found_xy, xy)
        assert (new.mpp, new.tile_px, new.size0_px) == (old.mpp, old.tile_px, old.size0_px)
        assert new.recipe["encoder"]["name"] == "dinov2-vits14"
        assert tuple(new.slide["size_px"]) == (20001, 15003)
        assert (new.slide["mpp"]["x"], new.slide["mpp"]["y"]) == MPP
        if fmt in KEEPS_REASONS:
            np.testing.assert_array_equal(new.reason, old.reason)
            np.testing.assert_array_equal(new.qc["tissue"], old.qc["tissue"])
            assert (new.recipe, new.slide) == (old.recipe, old.slide)
        else:
            assert new.recipe["precision"] == "unknown"
            assert fmt in json.dumps(new.recipe)


@pytest.mark.parametrize("fmt", ["trident", "stamp", "atlaspatch", "slide2vec", "clam"])
def test_rejected_tiles_are_left_out_unless_asked_for(store, tmp_path, fmt):
    pytest.importorskip(NEEDS.get(fmt, "numpy"))
    for rejected, n in ((False, 50), (True, 60)):
        path = convert(store.path, tmp_path / str(rejected), to=fmt, rejected=rejected)[0]
        slide_mpp = MPP if fmt == "stamp" else None
        assert len(read_features(path, slide_mpp=slide_mpp).x) == n


def without_card(path: Path) -> None:
    """Make a file look as the other tool wrote it: without what eosin added."""
    with h5py.File(path, "r+") as file:
        del file.attrs["eosin"]


def test_trident_by_its_own_attributes(store, tmp_path):
    path = convert(store.path / "a/one.svs.h5", tmp_path, to="trident")[0]
    without_card(path)
    assert detect(path) == "trident"
    found = read_features(path)
    assert (found.encoder, found.tile_px, found.overlap_px) == ("dinov2-vits14", 224, 32)
    assert found.size0_px == (round(SIDE0), round(SIDE0))
    assert found.slide_size_px == (20001, 15003)
    assert found.mpp is None, "TRIDENT's file has no mpp, only a magnification"
    assert found.slide_mpp is None
    given = read_features(path, slide_mpp=MPP)
    assert given.mpp == pytest.approx(round(SIDE0) * 0.2527 / 224)


def test_imported_without_mpp_stays_null(store, tmp_path):
    path = convert(store.path / "a/one.svs.h5", tmp_path / "t", to="trident")[0]
    without_card(path)
    convert(path, tmp_path / "f", to="eosin")
    found = FeatureStore.open(tmp_path / "f")["one"]
    assert found.mpp is None
    assert found.recipe["tile"] == {"tile_px": 224, "mpp": None, "overlap_px": 32}
    assert found.recipe["encoder"]["origin"] == "imported from trident"
    assert found.slide["mpp"] is None
    with h5py.File(tmp_path / "f" / "one.h5") as file:
        assert "mpp" not in file["coords"].attrs
        assert file["coords"].attrs["target_magnification"] == "None"


def trident_reader(path):
    """What TRIDENT's readers do: features, coords and the attributes of coords."""
    with h5py.File(path, "r") as file:
        attributes = dict(file["coords"].attrs)
        needed = ["patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap", "name"]
        needed += ["savetodir", "level0_width", "level0_height"]
        return file["features"][:], file["coords"][:], {key: attributes[key] for key in needed}


def test_trident_s_reader_opens_ours_and_the_store_itself(store, tmp_path):
    path = convert(store.path, tmp_path, to="trident")[0]
    for file, rows in ((path, store["a/one.svs"].kept), (store.path / "a/one.svs.h5", slice(None))):
        x, xy, attributes = trident_reader(file)
        np.testing.assert_array_equal(x, store["a/one.svs"].x[rows])
        np.testing.assert_array_equal(xy, store["a/one.svs"].xy[rows])
        assert (x.dtype, xy.dtype) == (np.float32, np.int64)
        assert attributes["patch_size_level0"] == round(SIDE0)
        assert attributes["level0_magnification"] == round(10 / 0.2527, 2)
        assert attributes["target_magnification"] == 20.0
        assert attributes["name"] == "one"


def test_clam_s_reader_opens_ours(store, tmp_path):
    """CLAM trains on pt_files/<slide>.pt and draws from h5_files/<slide>.h5."""
    torch = pytest.importorskip("torch")
    written = convert(store.path, tmp_path, to="clam")
    assert [p.relative_to(tmp_path).as_posix() for p in written[:2]] == ["h5_files/a/one.h5", "pt_files/a/one.pt"]
    old = store["a/one.svs"]
    tensor = torch.load(written[1], weights_only=True)
    with h5py.File(written[0]) as file:
        np.testing.assert_array_equal(file["features"][:], old.x[old.kept])
        np.testing.assert_array_equal(file["coords"][:], old.xy[old.kept])
    np.testing.assert_array_equal(tensor.numpy(), old.x[old.kept])
    without_card(written[0])
    found = read_features(written[0])
    assert detect(written[0]) == "clam"
    assert (found.mpp, found.tile_px, found.size0_px, found.encoder) == (None, None, None, "")


def test_stamp_by_its_own_attributes(store, tmp_path):
    path = convert(store.path / "a/one.svs.h5", tmp_path, to="stamp")[0]
    without_card(path)
    old = store["a/one.svs"]
    with h5py.File(path) as file:
        assert file["feats"].dtype == np.float16
        assert file.attrs["unit"] == "um"
        assert (file.attrs["tile_size_um"], file.attrs["tile_size_px"]) == (112.0, 224)
        np.testing.assert_allclose(file["coords"][:], old.xy[old.kept] * 0.2527)
    with pytest.raises(ConvertError, match=r"coords are microns.*slide_mpp="):
        read_features(path)
    found = read_features(path, slide_mpp=MPP)
    np.testing.assert_array_equal(found.xy, old.xy[old.kept])
    assert (found.mpp, found.tile_px, found.encoder) == (0.5, 224, "dinov2-vits14")
    assert found.size0_px == pytest.approx((SIDE0, SIDE0))


def test_stamp_s_float16_must_hold_the_numbers(store, tmp_path):
    found = read_features(convert(store.path, tmp_path / "npz", to="npz")[0])
    found.x[3, 3] = 1e5
    with pytest.raises(NonFiniteError, match=r"tile 3 .*float16"):
        __import__("eosin.features.convert_h5", fromlist=["x"]).write_stamp(found, tmp_path, "x")
    assert not list(tmp_path.glob("*x*"))


def test_a_unit_that_is_not_stated_is_asked_for(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["coords"], file["feats"] = np.array([[0, 10], [512, 10]]), np.zeros((2, 4), np.float32)
    with pytest.raises(ConvertError, match="coord_unit='um' or coord_unit='px'"):
        read_features(path)
    np.testing.assert_array_equal(read_features(path, coord_unit="px").xy, [[0, 10], [512, 10]])
    np.testing.assert_array_equal(read_features(path, coord_unit="um", slide_mpp=(0.5, 0.25)).xy, [[0, 40], [1024, 40]])


def test_atlaspatch_by_its_own_attributes(store, tmp_path):
    path = convert(store.path / "a/one.svs.h5", tmp_path, to="atlaspatch")[0]
    assert path == tmp_path / "patches/a/one.h5"
    without_card(path)
    old = store["a/one.svs"]
    with h5py.File(path, "r+") as file:
        assert (file["coords"].dtype, file["coords"].shape) == (np.int32, (50, 5))
        np.testing.assert_array_equal(file["coords"][0, 2:], [round(SIDE0), round(SIDE0), 0])
        assert file.attrs["num_patches"] == 50
        file["features/other"] = np.ones((50, 3), np.float32)
    with pytest.raises(ConvertError, match=r"2 encoders \(dinov2-vits14, other\); say which"):
        read_features(path)
    with pytest.raises(ConvertError, match="no encoder 'third'"):
        read_features(path, encoder="third")
    found = read_features(path, encoder="dinov2-vits14")
    np.testing.assert_array_equal(found.x, old.x[old.kept])
    np.testing.assert_array_equal(found.xy, old.xy[old.kept])
    assert (found.tile_px, found.size0_px, found.slide_size_px) == (224, (round(SIDE0),) * 2, (20001, 15003))
    assert read_features(path, encoder="other").x.shape == (50, 3)


def test_slide2vec_by_its_own_files(store, tmp_path):
    written = convert(store.path / "a/one.svs.h5", tmp_path, to="slide2vec")
    embedding, meta, coordinates, plan = written
    assert [p.relative_to(tmp_path).as_posix() for p in written] == [
        "tile_embeddings/a/one.npz",
        "tile_embeddings/a/one.meta.json",
        "tiles/a/one.coordinates.npz",
        "tiles/a/one.coordinates.meta.json",
    ]
    data = json.loads(meta.read_text())
    del data["eosin"]
    meta.write_text(json.dumps(data))
    with np.load(coordinates) as places:
        xy = np.stack([places["x"], places["y"]], axis=1)
        np.testing.assert_array_equal(np.lexsort((xy[:, 1], xy[:, 0])), np.arange(50))
        np.testing.assert_array_equal(places["tile_index"], np.arange(50))
    found = read_features(embedding)
    assert (found.mpp, found.tile_px, found.encoder) == (0.5, 224, "dinov2-vits14")
    assert found.slide_mpp == pytest.approx(MPP)
    old = store["a/one.svs"]
    order = np.lexsort((old.xy[old.kept][:, 1], old.xy[old.kept][:, 0]))
    np.testing.assert_array_equal(found.x, old.x[old.kept][order])
    np.testing.assert_array_equal(found.qc["tissue"], old.qc["tissue"][old.kept][order])
    plan.unlink()
    with pytest.raises(ConvertError, match="is missing"):
        read_features(embedding)


def test_slide2vec_pt(store, tmp_path):
    torch = pytest.importorskip("torch")
    embedding = convert(store.path / "a/one.svs.h5", tmp_path, to="slide2vec")[0]
    x = read_features(embedding).x
    embedding.unlink()
    torch.save(torch.from_numpy(x), embedding.with_suffix(".pt"))
    np.testing.assert_array_equal(read_features(embedding.with_suffix(".pt")).x, x)


class _Touch:
    """Runs code when a careless reader unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_not_loaded(store, tmp_path):
    torch = pytest.importorskip("torch")
    trap = _Touch(tmp_path / "ran")
    embedding = convert(store.path / "a/one.svs.h5", tmp_path, to="slide2vec")[0]
    embedding.unlink()
    torch.save(trap, embedding.with_suffix(".pt"))
    np.savez(tmp_path / "x.npz", features=np.array([trap], dtype=object), coords=PLACES)
    for path in (embedding.with_suffix(".pt"), tmp_path / "x.npz"):
        with pytest.raises(ConvertError, match="cannot be read"):
            read_features(path)
    assert not (tmp_path / "ran").exists()


def test_anndata_opens_ours(store, tmp_path):
    anndata = pytest.importorskip("anndata")
    table = anndata.read_h5ad(convert(store.path, tmp_path, to="anndata")[0])
    old = store["a/one.svs"]
    np.testing.assert_array_equal(table.X, old.x)
    np.testing.assert_array_equal(table.obsm["spatial"], old.xy)
    np.testing.assert_array_equal(table.obs["tile_id"], np.arange(60))
    np.testing.assert_array_equal(table.obs["reason"], old.reason)
    np.testing.assert_array_equal(table.obs["tissue"], old.qc["tissue"])
    assert table.uns["tile_spec"]["mpp"] == 0.5
    assert table.uns["tile_spec"]["base_downsample"] == pytest.approx(0.5 / 0.2527)
    assert table.uns["tile_spec"]["stride_width"] == 192
    assert table.uns["slide_properties"]["mpp"] == pytest.approx(0.2527)


def test_lazyslide_s_table(tmp_path):
    """The AnnData of wsidata's fetch.features_anndata, made here by anndata alone."""
    anndata = pytest.importorskip("anndata")
    pandas = pytest.importorskip("pandas")
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    obs = pandas.DataFrame({"tile_id": range(4), "tissue_id": [0, 0, 1, 1]}, index=list("0123"))
    spec = {"height": 256, "width": 256, "stride_height": 256, "stride_width": 200, "mpp": 0.5, "base_downsample": 2.0}
    properties = {"shape": np.array([3000, 4000]), "mpp": 0.25}
    table = anndata.AnnData(X=x, obs=obs, obsm={"spatial": np.array([[0.0, 8], [512, 8], [0, 520], [512, 520]])})
    table.uns = {"tile_spec": spec, "slide_properties": properties}
    table.write_h5ad(tmp_path / "s.h5ad")
    found = read_features(tmp_path / "s.h5ad")
    np.testing.assert_array_equal(found.x, x)
    np.testing.assert_array_equal(found.xy, [[0, 8], [512, 8], [0, 520], [512, 520]])
    assert (found.tile_px, found.size0_px, found.overlap_px, found.mpp) == (256, (512, 512), 56, 0.5)
    assert (found.slide_size_px, found.slide_mpp) == ((4000, 3000), (0.25, 0.25))


def test_trident_s_patches_hold_the_same_tiles(store, tmp_path):
    """TRIDENT's own layout: coordinates in a file of their own, which encoders share; attributes on the dataset."""
    written = convert(store.path, tmp_path / "out", to="trident")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in written] == [
        "features_dinov2-vits14/a/one.h5",
        "patches/a/one_patches.h5",
        "features_dinov2-vits14/b/two.h5",
        "patches/b/two_patches.h5",
    ]
    for features, patches in (written[:2], written[2:]):
        with h5py.File(features) as one, h5py.File(patches) as two:
            assert list(two) == ["coords"]
            np.testing.assert_array_equal(one["coords"][:], two["coords"][:])
            assert (two["coords"].dtype, two["coords"].maxshape) == (np.int64, (None, 2))
            needed = {"patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap"}
            assert set(two["coords"].attrs) == needed | {"name", "savetodir", "level0_width", "level0_height"}
            assert dict(one["coords"].attrs) == dict(two["coords"].attrs)


def test_encoders_share_trident_s_patches_only_if_they_are_the_same(store, tmp_path):
    convert(store.path, tmp_path, to="trident")
    for folder, rows in (("same", slice(None)), ("other", slice(1, None))):
        source = store["a/one.svs"]
        features = {"features": source.x[source.kept][rows], "coords": source.xy[source.kept][rows]}
        (tmp_path / folder / "a").mkdir(parents=True)
        np.savez(tmp_path / folder / "a" / "one.npz", **features)
    found = convert(tmp_path / "same", tmp_path, to="trident", encoder="texture")
    assert found[0] == tmp_path / "features_texture" / "a" / "one.h5"
    with pytest.raises(ConvertError, match="other tiles"):
        convert(tmp_path / "other", tmp_path, to="trident", encoder="uni")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_torchmil_reads_a_store(tmp_path):
    """torchmil's own dataset class opens a flat store and a flat TRIDENT folder as they are."""
    datasets = pytest.importorskip("torchmil.datasets", reason="torchmil is not installed")
    store = make_store(tmp_path / "flat", ids=("one.svs", "two.ndpi"))
    convert(store.path, tmp_path / "trident", to="trident")
    for folder, rows in ((store.path, False), (tmp_path / "trident" / "features_dinov2-vits14", True)):
        keys = ["X", "adj", "coords"]
        bags = datasets.ProcessedMILDataset(
            features_path=str(folder), coords_path=str(folder), bag_keys=keys, file_ext=".h5", dist_thr=600.0
        )
        assert len(bags) == 2
        old = store["one.svs"]
        keep = old.kept if rows else slice(None)
        np.testing.assert_array_equal(bags[0]["X"].numpy(), old.x[keep])
        np.testing.assert_array_equal(bags[0]["coords"].numpy(), old.xy[keep])


def test_several_formats_in_one_folder_meet_in_one_store_or_are_refused(store, tmp_path):
    convert(store.path, tmp_path / "mixed/t", to="trident")
    convert(store.path, tmp_path / "mixed/s", to="stamp")
    with pytest.raises(StoreMismatchError, match="imported from"):
        convert(tmp_path / "mixed", tmp_path / "out", to="eosin")


def test_two_slides_that_would_share_a_name(tmp_path):
    store = make_store(tmp_path / "f", ids=("x.svs", "x.tif"))
    with pytest.raises(ConvertError, match=r"x\.svs and x\.tif would both be x"):
        convert(store.path, tmp_path / "out", to="trident")


@pytest.mark.parametrize("fmt", ["trident", "npz", "slide2vec", "atlaspatch"])
def test_nothing_is_overwritten(store, tmp_path, fmt):
    before = {p: p.read_bytes() for p in convert(store.path, tmp_path, to=fmt)}
    with pytest.raises(ConvertError, match="in the way"):
        convert(store.path, tmp_path, to=fmt)
    assert before == {p: p.read_bytes() for p in before}
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_importing_twice_is_refused(store, tmp_path):
    convert(store.path, tmp_path / "t", to="trident")
    convert(tmp_path / "t", tmp_path / "f", to="eosin")
    with pytest.raises(ConvertError, match="already in"):
        convert(tmp_path / "t", tmp_path / "f", to="eosin")


def _h5(path: Path, **arrays) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


NUMBERS, PLACES = np.zeros((2, 3), np.float32), np.array([[0, 0], [9, 9]])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"coords": PLACES}, "no tile features"),
        ({"features": NUMBERS}, "no tile features"),
        ({"features": NUMBERS[0], "coords": PLACES}, "slide-level vector"),
        ({"features": NUMBERS, "coords": PLACES[:1]}, r"\(1, 2\) coordinates for 2 features"),
        ({"features": NUMBERS, "coords": PLACES + 0.5}, "not whole pixels"),
        ({"features": PLACES, "coords": PLACES}, "not floating point"),
        ({"features": NUMBERS * np.nan, "coords": PLACES}, "not finite"),
    ],
)
def test_bad_files(tmp_path, arrays, message):
    with pytest.raises(ConvertError, match=message):
        read_features(_h5(tmp_path / "x.h5", **arrays))


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".h5ad", ".safetensors", ".txt", ".npy"])
@pytest.mark.parametrize(
    "content", [b"", b"not what it says", b"\x89HDF\r\n\x1a\n" + bytes(40), b"PK\x03\x04" + bytes(40)]
)
def test_files_that_are_not_what_their_name_says(tmp_path, suffix, content):
    pytest.importorskip(NEEDS.get({".h5ad": "anndata"}.get(suffix, suffix[1:]), "numpy"))
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=r"x\."):
        read_features(path)
    with pytest.raises(ConvertError):
        convert(path, tmp_path / "out", to="eosin")


def test_truncated_foreign_file(store, tmp_path):
    path = convert(store.path, tmp_path, to="trident")[0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConvertError, match=r"one\.h5"):
        read_features(path)


def test_npz_without_coordinates(tmp_path):
    np.savez(tmp_path / "x.npz", embeddings=NUMBERS)
    with pytest.raises(ConvertError, match="holds embeddings; needed: features and coords"):
        read_features(tmp_path / "x.npz")


def test_questions_that_make_no_sense(store, tmp_path):
    with pytest.raises(ConvertError, match=r"unknown format 'triden'; the closest are: trident"):
        convert(store.path, tmp_path, to="triden")
    with pytest.raises(ConvertError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path, to="npz")
    with pytest.raises(ConvertError, match="no tile features"):
        convert(tmp_path, tmp_path / "out", to="npz")
    with pytest.raises(ConvertError, match="coord_unit"):
        convert(store.path, tmp_path, to="npz", coord_unit="mm")
    with pytest.raises(ImplausibleMppError, match="slide_mpp"):
        convert(store.path, tmp_path, to="npz", slide_mpp=250.0)
    with pytest.raises(ConvertError, match="own format already"):
        convert(store.path, tmp_path, to="eosin")


def test_what_a_format_needs_is_asked_for(tmp_path):
    path = _h5(tmp_path / "x.h5", features=NUMBERS, coords=PLACES)
    for fmt in ("stamp", "slide2vec", "atlaspatch"):
        with pytest.raises(ConvertError, match=r"needs the .*, which the source does not say"):
            convert(path, tmp_path / fmt, to=fmt)


@pytest.mark.real
def test_a_real_foreign_file(tmp_path):
    """A TCGA slide's features from another tool (mopadi): 777 tiles on a 512-pixel grid, no unit stated."""
    root = Path(os.environ.get("EOSIN_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = root / "features" / "tcga-ad-6964-mopadi.h5"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there; set EOSIN_DATA")
    with pytest.raises(ConvertError, match="coord_unit"):
        convert(path, tmp_path / "f", to="eosin")
    convert(path, tmp_path / "f", to="eosin", coord_unit="px", encoder="conch")
    store = FeatureStore.open(tmp_path / "f")
    found = store[path.stem]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(found.x, file["feats"][:])
        np.testing.assert_array_equal(found.xy, file["coords"][:])
    assert (found.mpp, found.tile_px, found.size0_px) == (None, None, None)
    assert found.recipe["encoder"] == {"name": "conch", "dim": 512, "origin": "imported from stamp"}
    assert store.verify() == [(path.stem, True, "")]
