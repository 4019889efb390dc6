"""Crops and feature stores through a trained model: the same numbers as from the model itself, and clear ends."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cellgen import pixels, write_picture, write_table
from modelgen import write_model
from traingen import cells_and_tiles, encoder

import slidegen
from eosin.errors import CheckpointError, CohortError, ConfigError, GeometryError, StoreMismatchError
from eosin.features.extraction import extract
from eosin.features.store import FeatureStore
from eosin.finetune.adapters import AdaptConfig, Mode
from eosin.finetune.cells import read_tiles
from eosin.finetune.infer import Ensemble, load_classifier
from eosin.finetune.predict import SHEET, TABLE, Scorer, find_crops, load_scorer, score_crops, score_store
from eosin.finetune.recipe import Tta
from eosin.finetune.sheet import draw_sheet
from eosin.finetune.tables import read_table
from eosin.slides import open_slide
from eosin.tiles import TileSpec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scorer(model: Path) -> Scorer:
    return load_scorer(model.parent, device="cpu")


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    _, tiles = cells_and_tiles(slides=2)
    for at, tile in enumerate(tiles):
        write_picture(tmp_path / "crops" / f"c{at:02d}.png", tile)
    return tmp_path / "crops"


def written(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / TABLE, keep_default_na=False)


def test_pictures_of_a_folder(crops: Path, model: Path, tmp_path: Path) -> None:
    _, tiles = cells_and_tiles(slides=2)
    told: list[tuple[int, int, str]] = []
    said = load_classifier(model, device="cpu").predict(tiles)
    middle = float(np.median(said.p))  # both calls, or the test shows nothing
    scorer = load_scorer(model.parent, device="cpu", threshold=middle)
    found = score_crops(crops, scorer, out=tmp_path / "out", progress=lambda *now: told.append(now))
    table = written(tmp_path / "out")
    assert table["file"].tolist() == [f"c{at:02d}.png" for at in range(12)]
    for name, column in (("p_atypical", said.p), ("spread", said.spread), ("entropy", said.entropy)):
        assert table[name].to_numpy() == pytest.approx(column, abs=1e-9)
    assert table["disagreement"].to_numpy() == pytest.approx(said.disagreement, abs=1e-9)
    assert (said.spread > 0).any()
    assert table["call"].tolist() == ["atypical" if p >= middle else "normal" for p in said.p]
    assert set(table["call"]) == {"atypical", "normal"}
    assert told == [(12, 12, "")]
    assert (found.failed, [path.name for path in found.files]) == ({}, [TABLE])


def test_a_threshold_and_views_of_ones_own(crops: Path, model: Path, tmp_path: Path) -> None:
    own = load_scorer(model, device="cpu", threshold=0.3, tta="rot4")
    score_crops(crops, own, out=tmp_path / "out")
    table = written(tmp_path / "out")
    assert (table["call"] == "atypical").tolist() == (table["p_atypical"] >= 0.3).tolist()
    turned = load_scorer(model, device="cpu", tta="rot4").ensemble.scores(cells_and_tiles(slides=2)[1])
    assert table["p_atypical"].to_numpy() == pytest.approx(turned, abs=1e-9)
    with pytest.raises(ConfigError, match="threshold is 50"):
        load_scorer(model, threshold=50)
    with pytest.raises(ConfigError, match="no test-time augmentation is called 'rot2'"):
        load_scorer(model, tta="rot2")  # pyright: ignore[reportArgumentType]


def test_labels_make_a_sheet(crops: Path, scorer: Scorer, tmp_path: Path) -> None:
    cells, _ = cells_and_tiles(slides=2)
    rows = [f"c{at:02d}.png,s{at // 6},Aperio,{label}" for at, label in enumerate(cells.label)]
    write_table(crops / "labels.csv", "file,slide_id,scanner,atypical", *rows)
    score_crops(crops, scorer, out=tmp_path / "out")
    table = written(tmp_path / "out")
    assert table["atypical"].tolist() == cells.label.tolist()
    assert set(table["scanner"]) == {"Aperio"}
    read = read_table(crops)
    p = table["p_atypical"].to_numpy(dtype=np.float64)
    sheet = draw_sheet(read, read_tiles(read), p, threshold=0.5, title="12 scored crops")
    assert (tmp_path / "out" / SHEET).read_bytes() == sheet


def test_a_table_without_labels(crops: Path, scorer: Scorer, tmp_path: Path) -> None:
    table = write_table(tmp_path / "list.csv", "picture,file", "a,c03.png", "b,c01.png")
    assert not find_crops(write_table(crops / "list.csv", "file,slide_id", "c03.png,s", "c01.png,s")).labelled
    score_crops(crops / "list.csv", scorer, out=tmp_path / "out")
    assert written(tmp_path / "out")["file"].tolist() == ["c03.png", "c01.png"]
    assert "atypical" not in written(tmp_path / "out")
    assert not (tmp_path / "out" / SHEET).exists()
    with pytest.raises(CohortError, match="2 of 2 cells have no picture"):
        find_crops(write_table(tmp_path / "empty" / "list.csv", "file", "x.png", "y.png"))
    assert table.is_file()


def test_two_folders_of_classes_are_labels(crops: Path, scorer: Scorer, tmp_path: Path) -> None:
    for at, name in enumerate(("Atypical", "Normal", "Normal")):
        (tmp_path / "two" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(crops / f"c{at:02d}.png", tmp_path / "two" / name)
    score_crops(tmp_path / "two", scorer, out=tmp_path / "out")
    assert written(tmp_path / "out")["atypical"].tolist() == [1, 0, 0]


def test_what_cannot_be_read_is_listed_and_the_rest_is_scored(crops: Path, scorer: Scorer, tmp_path: Path) -> None:
    score_crops(crops, scorer, out=tmp_path / "good")
    (crops / "c01.png").write_bytes(b"")
    write_picture(crops / "c02.png", pixels(0, side=96))
    write_picture(crops / "c03.png", np.concatenate([pixels(0), np.full((128, 128, 1), 90, np.uint8)], axis=2))
    found = score_crops(crops, scorer, out=tmp_path / "out")
    good, table = written(tmp_path / "good"), written(tmp_path / "out")
    assert list(found.failed) == ["c01.png", "c02.png", "c03.png"]
    for name, said in (("c01", "cannot be read as a picture"), ("c02", "96 x 96 pixels"), ("c03", "transparent")):
        assert said in found.failed[f"{name}.png"]
    rest = ~table["file"].isin(list(found.failed))
    scores = np.array([float(text or "nan") for text in table["p_atypical"].tolist()])
    assert scores[rest] == pytest.approx(np.array(good["p_atypical"].tolist())[rest])
    assert (table["p_atypical"][~rest] == "").all()
    assert (table["call"][~rest] == "").all()
    assert table["error"][~rest].tolist() == list(found.failed.values())
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(crops / "c02.png", only)
    with pytest.raises(GeometryError, match="96 x 96 pixels where 128 x 128 are needed"):
        score_crops(only, scorer, out=tmp_path / "none")


@pytest.mark.parametrize("header", ["file,mpp", "file,mpp,atypical"])
def test_crops_of_another_mpp_are_refused(crops: Path, header: str) -> None:
    table = write_table(crops / "list.csv", header, "c00.png,0.5,1"[: 11 + 2 * header.count("atypical")])
    with pytest.raises(GeometryError, match=r"mpp 0\.5 where crops of 0\.25"):
        find_crops(table)


def test_inputs_that_are_no_crops(crops: Path, scorer: Scorer, tmp_path: Path, make_slide: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="where its files would be taken for crops"):
        score_crops(crops, scorer, out=crops / "out")
    with pytest.raises(CohortError, match="no such file or folder"):
        find_crops(tmp_path / "nothing")
    make_slide(slidegen.coordinates(300, 300), name="a.svs", mpp=0.25)
    (tmp_path / "slides").mkdir()
    (tmp_path / "a.svs").rename(tmp_path / "slides" / "a.svs")
    with pytest.raises(CohortError, match="its 1 slides need their detections: give --points"):
        find_crops(tmp_path / "slides")
    with pytest.raises(CohortError, match="a slide needs its detections"):
        find_crops(tmp_path / "slides" / "a.svs")
    assert len(find_crops(crops / "c00.png").file) == 1


def test_a_model_of_another_kind(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no ensemble\.json"):
        load_scorer(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        load_scorer(model / "fold-01.safetensors")


def test_the_hash_names_the_model(model: Path, scorer: Scorer, tmp_path: Path) -> None:
    assert load_scorer(model, device="cpu", threshold=0.1).model_hash == scorer.model_hash
    other = write_model(tmp_path, folds=1)
    assert load_scorer(other, device="cpu").model_hash != scorer.model_hash


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, Path]:
    folder = tmp_path_factory.mktemp("store")
    picture, _ = slidegen.histology(700, 600, seed=3, mpp=0.25)
    slide = slidegen.write_tiff(folder / "he.svs", picture, slidegen.TiffStyle(mpp=0.25, factors=()))
    small = encoder(model.parents[1])
    made = extract(slide, TileSpec(tile_px=128, mpp=0.25), small, out=folder / "features", workers=0)
    return made, slide


def test_features_give_what_pixels_give(store: tuple[FeatureStore, Path], scorer: Scorer, tmp_path: Path) -> None:
    made, path = store
    found = score_store(made.path, scorer, out=tmp_path / "out")
    table = written(tmp_path / "out")
    features = made["he.svs"]
    assert table[["x", "y"]].to_numpy().tolist() == features.xy[features.kept].tolist()
    assert len(table) > 5
    with open_slide(path) as slide:
        plan = slide.plan(tile_px=128, mpp=0.25)
        tiles = np.stack([slide.read_tile((int(x), int(y)), plan).rgb for x, y in table[["x", "y"]].to_numpy()])
    said = scorer.ensemble.predict(tiles)
    for name in ("p_atypical", "spread", "entropy", "disagreement"):
        want = said.p if name == "p_atypical" else getattr(said, name)
        assert table[name].to_numpy() == pytest.approx(want, abs=1e-5)
    assert np.ptp(said.p) > 0.01
    assert "presumes a mitotic figure" in found.notes[0]


def test_features_that_cannot_give_the_answers(
    store: tuple[FeatureStore, Path], scorer: Scorer, tmp_path: Path
) -> None:
    own = scorer.ensemble

    def changed(*, side_px: int = 128, crop_px: int = 128, tta: Tta = "none", mode: Mode = "head") -> Scorer:
        models = [copy.copy(model) for model in own.models]
        for model in models:
            model.config = AdaptConfig(mode=mode)  # pyright: ignore[reportArgumentType]
        how = replace(own.how, side_px=side_px, crop_px=crop_px)
        return replace(scorer, ensemble=Ensemble(models, how, threshold=0.5, tta=tta))

    score_store(store[0].path, changed(), out=tmp_path / "out")
    for given, said in (
        (changed(tta="rot4"), "views: the model averages rot4, features are of one view; --tta none asks for one"),
        (changed(mode="lora"), r"mode lora\), not the head alone"),
        (changed(side_px=64, crop_px=64), "sees the centre of 64 px as 64 px, the store's tiles have 128 px"),
        (changed(side_px=160, crop_px=0), "sees whole tiles as 160 px, the store's tiles have 128 px"),
    ):
        with pytest.raises(StoreMismatchError, match=said):
            score_store(store[0].path, given, out=tmp_path / "out")


def test_features_of_another_recipe(store: tuple[FeatureStore, Path], scorer: Scorer, tmp_path: Path) -> None:
    recipe = store[0].recipe
    changed = replace(
        recipe,
        encoder={**recipe.encoder, "weights_hash": "0" * 16, "pooling": "mean"},
        tile={**recipe.tile, "mpp": 0.5},
        stain={"method": "macenko"},
        icc=True,
    )
    FeatureStore.create(tmp_path / "other", changed)
    with pytest.raises(StoreMismatchError) as told:
        score_store(tmp_path / "other", scorer, out=tmp_path / "out")
    lines = str(told.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == ["weights_hash", "pooling", "mpp", "stain", "icc"]
    assert lines[-1] == "give the slides and their detections (--points) instead"


def test_a_damaged_file_of_the_store_is_listed(
    store: tuple[FeatureStore, Path], scorer: Scorer, tmp_path: Path
) -> None:
    shutil.copytree(store[0].path, tmp_path / "features")
    (tmp_path / "features" / "broken.svs.h5").write_bytes(b"no HDF5")
    found = score_store(tmp_path / "features", scorer, out=tmp_path / "out")
    assert list(found.failed) == ["broken.svs"]
    assert set(found.table["slide_id"]) == {"he.svs"}
