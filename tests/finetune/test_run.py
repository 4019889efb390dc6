"""A whole run: out of fold is out of fold, the threshold comes from there alone, and the folder answers by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cellgen import cell_table
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from test_challenge import inputs, stack_file
from traingen import quick, write_cells, write_encoder

from eosin.errors import CheckpointError, CohortError, ConfigError, PredictionsError, WeightsError
from eosin.evaluation.calibration import ece
from eosin.evaluation.metrics import balanced_accuracy, choose_threshold
from eosin.evaluation.report import Report
from eosin.finetune.cells import read_tiles
from eosin.finetune.challenge import STACK
from eosin.finetune.container import run as answer_container
from eosin.finetune.folds import plan_folds
from eosin.finetune.infer import MODEL, combine, load_classifier
from eosin.finetune.page import find, page
from eosin.finetune.results import cross_fitted, evaluate, fit_scale
from eosin.finetune.run import finetune
from eosin.finetune.tables import read_table

pytestmark = pytest.mark.slow

CONFIG = replace(quick(), epochs=3, lr=1e-2, tta="rot4")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("finetune")
    write_cells(folder / "data", slides=16)
    write_encoder(folder / "tiny.safetensors")
    report = finetune(
        folder / "data",
        str(folder / "tiny.safetensors"),
        CONFIG,
        out=folder / "out",
        external=("dataset", "other"),
        device="cpu",
        resamples=50,
    )
    return folder, report


def test_report_has_every_section_and_page(done: tuple[Path, Report]) -> None:
    folder, report = done
    assert Report.from_json((folder / "out" / "report.json").read_text()).to_json() == report.to_json()
    sections = report.sections
    assert [fold["name"] for fold in sections["folds"]] == ["fold 1", "fold 2", "fold 3"]
    for part, n in (("out_of_fold", 72), ("external", 24)):
        assert sections[part]["n"] == n
        for scope in ("pooled", "domain_mean", "worst_domain"):
            found = find(sections[part], "ba", scope)
            assert found is not None
            assert found["low"] <= found["point"] <= found["high"]
        assert [row["level"] for row in sections[part]["calibration"]] == ["all", "A", "B"]
    html = (folder / "out" / "report.html").read_text()
    assert html == page(report, sheet=(folder / "out" / "sheet.png").read_bytes())
    for word in ("worst domain", "mean of domains", "Calibration by scanner", "not for clinical use", "data:image/png"):
        assert word in html
    for name in ("sheet.png", "curves.png"):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_out_of_fold_predictions_are_of_models_that_saw_nothing_of_the_slide(done: tuple[Path, Report]) -> None:
    folder, report = done
    table = pd.read_csv(folder / "out" / "out-of-fold.csv")
    cells = read_table(folder / "data")
    own = cells.take(cells.dataset == "own")
    for fold in plan_folds(own, CONFIG):
        rows = table["file"].isin(own.file[fold.test].tolist())
        assert set(table["fold"][rows]) == {fold.name}
        assert not set(table["slide_id"][rows]) & set(own.slide_id[np.concatenate([fold.train, fold.stop])])
    told = report.sections["threshold"]
    assert choose_threshold(table["atypical"], table["p_atypical"]) == pytest.approx(told["threshold"], abs=1e-9)
    assert (table["called"] == (table["p_atypical"] >= told["threshold"])).all()


def test_external_labels_change_no_prediction_and_no_threshold(done: tuple[Path, Report], tmp_path: Path) -> None:
    folder, report = done
    cells = read_table(folder / "data")
    other = cells.dataset == "other"
    flipped = replace(cells, label=np.where(other, 1 - cells.label, cells.label).astype(np.int8))
    again = finetune(
        flipped,
        str(folder / "tiny.safetensors"),
        CONFIG,
        out=tmp_path / "out",
        external=("dataset", "other"),
        device="cpu",
        resamples=20,
    )
    assert again.sections["threshold"] == report.sections["threshold"]
    for name in ("out-of-fold.csv", "external.csv"):
        ours, theirs = (pd.read_csv(path / name)["p_atypical"] for path in (folder / "out", tmp_path / "out"))
        assert (ours == theirs).all()
    first, second = (find(r.sections["external"], "auroc", "pooled") for r in (report, again))
    assert first is not None
    assert second is not None
    assert first["point"] == pytest.approx(1 - second["point"])


def test_model_folder_answers_by_itself(done: tuple[Path, Report], tmp_path: Path) -> None:
    folder, report = done
    table = pd.read_csv(folder / "out" / "external.csv")
    cells = read_table(folder / "data")
    tiles = read_tiles(cells, cells.dataset == "other")
    moved = tmp_path / "elsewhere"
    (folder / "out" / MODEL).rename(moved)
    try:
        loaded = load_classifier(moved)
        assert loaded.threshold == report.sections["threshold"]["threshold"]
        assert loaded.scores(tiles) == pytest.approx(table["p_atypical"].to_numpy(), abs=1e-6)
        said = loaded.predict(tiles)
        assert said.disagreement == pytest.approx(table["disagreement"].to_numpy(), abs=1e-6)
        turned = np.ascontiguousarray(np.rot90(tiles, 1, (1, 2)))
        assert loaded.scores(turned) == pytest.approx(said.p, abs=1e-5)
        write_encoder(moved / "encoder.safetensors", seed=1)
        with pytest.raises(WeightsError, match="load the one it was trained on"):
            load_classifier(moved)
    finally:
        write_encoder(moved / "encoder.safetensors")
        moved.rename(folder / "out" / MODEL)
    assert load_classifier(folder / "out").scores(tiles[:2]) == pytest.approx(table["p_atypical"][:2], abs=1e-6)


def test_container_answers_with_the_model_folder(done: tuple[Path, Report], tmp_path: Path) -> None:
    folder = done[0]
    cells = read_table(folder / "data")
    given = inputs(tmp_path / "input", STACK, STACK)
    stack_file(given / "stack.tif", read_tiles(cells, cells.dataset == "other")[:5])
    path = answer_container(tmp_path / "input", tmp_path / "out", folder=folder / "out" / MODEL, load=load_classifier)
    table = pd.read_csv(folder / "out" / "external.csv")[:5]
    answer = json.loads(path.read_text())
    assert [one["confidence"] for one in answer] == pytest.approx(table["p_atypical"].tolist(), abs=1e-6)
    assert [one["class"] == "atypical" for one in answer] == table["called"].tolist()


def test_same_folder_goes_on_and_another_recipe_is_refused(done: tuple[Path, Report]) -> None:
    folder, report = done
    how = {"out": folder / "out", "external": ("dataset", "other"), "device": "cpu", "resamples": 50}
    told: list[object] = []
    again = finetune(folder / "data", str(folder / "tiny.safetensors"), CONFIG, progress=told.append, **how)
    assert told == []
    assert again.to_json() == report.to_json()
    with pytest.raises(ConfigError, match=r"holds another run: recipe\.epochs: 3 -> 5"):
        finetune(folder / "data", str(folder / "tiny.safetensors"), replace(CONFIG, epochs=5), **how)


@pytest.mark.parametrize(
    ("external", "said"),
    [
        (("dataset", "third"), "no cell has the dataset 'third'; found: other, own"),
        (("site", "x"), "no field 'site'"),
        (("scanner", "A"), None),
    ],
)
def test_external_cells_that_cannot_be(
    done: tuple[Path, Report], tmp_path: Path, external: tuple[str, str], said: str | None
) -> None:
    folder, _ = done
    if said is None:  # half of a slide external
        cells = read_table(folder / "data")
        scanner = cells.scanner.copy()
        scanner[0] = "B"
        data, said = replace(cells, scanner=scanner), "slides have cells inside and outside scanner 'A'"
    else:
        data = folder / "data"
    with pytest.raises(CohortError, match=said):
        finetune(data, str(folder / "tiny.safetensors"), CONFIG, out=tmp_path / "o", external=external, device="cpu")


def test_an_encoder_without_weights_is_refused(done: tuple[Path, Report], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="texture is a fixed computation"):
        finetune(done[0] / "data", "texture", CONFIG, out=tmp_path / "o", device="cpu")


def test_no_model_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no ensemble\.json"):
        load_classifier(tmp_path)
    (tmp_path / "ensemble.json").write_text(json.dumps({"scale": {}}))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_classifier(tmp_path)


def test_scale_and_cross_fitting() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 3000)
    x = rng.normal(size=3000) + 2 * y - 1  # log odds 2 x: the temperature is a half
    scale = fit_scale(y, x)
    assert scale.temperature == pytest.approx(0.5, abs=0.05)
    assert scale.threshold == pytest.approx(0.5, abs=0.1)
    fold = np.arange(3000) % 3
    p, calls, threshold = cross_fitted(y, x, fold)
    for each in range(3):
        rest = fit_scale(y[fold != each], x[fold != each])
        assert p[fold == each] == pytest.approx(expit((x[fold == each] - rest.shift) / rest.temperature))
        assert (threshold[fold == each] == rest.threshold).all()
        assert (calls[fold == each] == (p[fold == each] >= rest.threshold)).all()
        assert p[fold == each].mean() == pytest.approx(y[fold == each].mean(), abs=0.03)
    # labels of a fold do not touch its own calls
    flipped = np.where(fold == 0, 1 - y, y)
    assert (cross_fitted(flipped, x, fold)[1][fold == 0] == calls[fold == 0]).all()


def test_shift_brings_back_the_share_of_atypical_cells() -> None:
    """A logit of balanced batches says half of what is told by the classes' shares; scikit-learn fits the same line."""
    rng = np.random.default_rng(1)
    y = (rng.random(4000) < 0.2).astype(np.int64)
    x = rng.normal(size=4000) + 2 * y - 1  # log odds 2 x among as many of both
    scale = fit_scale(y, x)
    assert scale.shift == pytest.approx(np.log(4) / 2, abs=0.08)
    p = combine(x, temperature=scale.temperature, shift=scale.shift).p
    assert p.mean() == pytest.approx(y.mean(), abs=1e-6)
    assert ece(y, p) < 0.03 < 0.1 < ece(y, expit(2 * x))
    line = LogisticRegression(C=np.inf).fit(x[:, None], y)
    assert 1 / scale.temperature == pytest.approx(line.coef_.item(), rel=1e-3)
    assert -scale.shift / scale.temperature == pytest.approx(line.intercept_.item(), rel=1e-3)
    assert (p >= scale.threshold).tolist() == (x >= scale.shift + scale.temperature * logit(scale.threshold)).tolist()


def test_the_surest_calls_are_those_far_from_the_threshold() -> None:
    """Where a fifth is atypical, the threshold lies far below a half, and most cells about a half are called right."""
    rng = np.random.default_rng(2)
    y = (rng.random(2000) < 0.2).astype(np.int64)
    cells = cell_table(y.tolist(), slides=[f"s{at // 20}" for at in range(2000)])
    x = rng.normal(size=2000) + 4 * y - 2
    told = evaluate(cells, x[None], fit_scale(y, x), resamples=20).sections["uncertainty"]
    assert told["wrong_sure"] < told["wrong"] < told["wrong_rest"] < 0.5
    assert told["wrong"] == pytest.approx(0.8 * told["wrong_sure"] + 0.2 * told["wrong_rest"])


def test_a_threshold_judged_where_it_was_chosen_flatters_itself() -> None:
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y, x, fold = rng.permutation([0, 1] * 30), rng.normal(size=60), np.arange(60) % 5
        own = fit_scale(y, x)
        p = combine(x, temperature=own.temperature, shift=own.shift).p
        chosen = balanced_accuracy(y, p, threshold=own.threshold)
        gains.append((chosen, balanced_accuracy(y, cross_fitted(y, x, fold)[1])))
    chosen, honest = np.mean(gains, axis=0)
    assert chosen > 0.55
    assert honest < 0.53


def test_temperature_that_cannot_be_fitted_is_said() -> None:
    worse = fit_scale([0, 1, 0, 1], [2.0, 1.0, -1.0, -2.0])
    assert (worse.temperature, worse.shift) == (1.0, 0.0)
    assert "no better than chance" in worse.note
    with pytest.raises(PredictionsError, match="1 of 2 cells have no out-of-fold prediction"):
        fit_scale([0, 1], [0.0, np.nan])


def test_scores_of_the_wrong_sign_are_said() -> None:
    rng = np.random.default_rng(0)
    cells = cell_table([0, 1] * 40, slides=[f"s{at // 4}" for at in range(80)])
    # ranks are the wrong way round, but one cut at the very top calls some atypical cells and no normal one
    logits = np.where(cells.label == 1, -1.0, 1.0) + rng.normal(0, 0.1, 80)
    logits[1:16:2] = 9.0
    scale = replace(fit_scale(cells.label, -logits), threshold=0.99, temperature=1.0, shift=0.0)
    found = evaluate(cells, logits[None], scale, resamples=20)
    auroc, ba = (find(found.sections, name, "pooled") for name in ("auroc", "ba"))
    assert auroc is not None
    assert ba is not None
    assert auroc["point"] == pytest.approx(0.2)
    assert ba["point"] == pytest.approx(0.6)
    assert [remark.kind for remark in found.remarks] == ["sign"]
