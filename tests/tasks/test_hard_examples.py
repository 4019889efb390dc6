"""Errors beside their neighbours: verdicts by hand, by brute force, on what was planted, and on real votes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import binom, binomtest
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from eosin.errors import PredictionsError, QueryError
from eosin.tasks.hard_examples import hard_examples
from eosin.tasks.hard_judge import ALONE, CONFUSABLE, DOUBTFUL, judge_errors


def groups(n: int, *, apart: float, seed: int, dim: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two classes, one in four positive, thirty patients."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.25).astype(np.int64)
    x = rng.standard_normal((n, dim))
    x[:, :4] += apart * (2 * y - 1)[:, None] / 2
    return x, y, np.array([f"p{number:02d}" for number in rng.integers(40, size=n)])


def test_neighbours_are_the_nearest_of_other_patients_one_each() -> None:
    x, y, patient = groups(200, apart=1.0, seed=0)
    called = y.copy()
    called[:20] = 1 - y[:20]
    found = judge_errors(x, y, called, patient, k=7)
    near = cosine_similarity(StandardScaler().fit_transform(x))
    for row, neighbours in zip(found.rows, found.neighbours, strict=True):
        best: dict[str, int] = {}
        for other in np.argsort(-near[row]).tolist():
            if patient[other] != patient[row]:
                best.setdefault(str(patient[other]), other)
        assert neighbours.tolist() == list(best.values())[:7]
    np.testing.assert_array_equal(found.rows, np.arange(20))


def test_a_verdict_by_hand() -> None:
    """Balance and p of one error, from its counts and the shares of the classes alone."""
    x, y, patient = groups(400, apart=1.0, seed=1)
    called = np.where(np.random.default_rng(2).random(400) < 0.1, 1 - y, y)
    found = judge_errors(x, y, called, patient)
    share = np.array([(y == 0).mean(), (y == 1).mean()])
    for at, row in enumerate(found.rows):
        labels = y[found.neighbours[at]]
        m = int((labels == called[row]).sum())
        q, r = share[called[row]], share[y[row]]
        balance = (m / q) / (m / q + (30 - m) / r)
        side, expected = (m, q) if balance >= 0.5 else (30 - m, r)
        p = binomtest(side, 30, expected, alternative="greater").pvalue
        assert found.balance[at] == pytest.approx(balance)
        assert found.p[at] == pytest.approx(p)
        clear = p <= 0.05 and (balance >= 0.8 or balance <= 0.2)
        assert found.verdict[at] == ((DOUBTFUL if balance > 0.5 else ALONE) if clear else CONFUSABLE)


def test_flipped_labels_are_found_and_confusable_ones_are_not_called_doubtful() -> None:
    x, y, patient = groups(1500, apart=2.0, seed=3)
    given = y.copy()
    flipped = np.random.default_rng(4).choice(1500, 60, replace=False)
    given[flipped] = 1 - given[flipped]
    side = x[:, :4].sum(axis=1)
    called = (side > 0).astype(np.int64)
    found = judge_errors(x, given, called, patient)
    is_flipped = np.isin(found.rows, flipped)
    doubtful = found.verdict == DOUBTFUL
    assert doubtful[is_flipped].mean() > 0.7
    near_border = np.abs(side[found.rows]) < 1
    assert doubtful[near_border & ~is_flipped].mean() < 0.5
    assert doubtful.sum() > 3 * found.by_luck


def test_a_model_that_ignores_what_neighbours_tell_is_alone() -> None:
    x, y, patient = groups(900, apart=3.0, seed=5)
    called = np.where(np.arange(900) < 50, 1 - y, y)
    found = judge_errors(x, y, called, patient)
    assert (found.verdict == ALONE).mean() > 0.9


def test_verdicts_by_luck_are_as_many_as_announced() -> None:
    """Labels that have nothing to do with the features: clear verdicts come as often as `by_luck` says."""
    told, clear = 0.0, 0
    for seed in range(12):
        x, y, patient = groups(300, apart=0.0, seed=100 + seed)
        called = np.random.default_rng(seed).permutation(y)
        found = judge_errors(x, y, called, patient)
        told += found.by_luck
        clear += int((found.verdict != CONFUSABLE).sum())
    assert told > 10
    assert clear == pytest.approx(told, abs=3.5 * np.sqrt(3 * told))  # errors share neighbours: three times Poisson


def test_by_luck_of_two_classes_is_a_binomial_sum() -> None:
    x, y, patient = groups(300, apart=0.5, seed=6)
    called = np.where(np.arange(300) == int(np.flatnonzero(y)[0]), 0, y)
    found = judge_errors(x, y, called, patient)
    q, r = (y == 0).mean(), (y == 1).mean()
    chance = 0.0
    for m in range(31):
        balance = (m / q) / (m / q + (30 - m) / r)
        doubtful = balance >= 0.8 and binom.sf(m - 1, 30, q) <= 0.05
        alone = balance <= 0.2 and binom.sf(30 - m - 1, 30, r) <= 0.05
        chance += float(binom.pmf(m, 30, q)) * (doubtful or alone)
    assert found.by_luck == pytest.approx(chance)


def test_three_classes() -> None:
    rng = np.random.default_rng(7)
    y = rng.integers(3, size=600)
    x = 4 * np.eye(3)[y] + rng.standard_normal((600, 3))
    given = y.copy()
    given[:30] = (y[:30] + 1) % 3
    found = judge_errors(x, given, y, np.arange(600) % 45)
    assert (found.verdict == DOUBTFUL).mean() > 0.8


def test_too_few_patients_and_shapes() -> None:
    x, y, _ = groups(50, apart=1.0, seed=8)
    assert judge_errors(x, y, 1 - y, np.arange(50) % 10).neighbours.shape == (50, 9)
    with pytest.raises(QueryError, match="5 patients; an error needs at least 5"):
        judge_errors(x, y, 1 - y, np.arange(50) % 5)
    with pytest.raises(QueryError, match="49 labels"):
        judge_errors(x, y[1:], y, np.arange(50))


@pytest.fixture
def probed(tmp_path: Path) -> Path:
    """Images of one brightness a row, a cohort, their features and predictions as `probe` writes them."""
    x, y, patient = groups(240, apart=2.0, seed=9)
    given = y.copy()
    given[:12] = 1 - given[:12]
    (tmp_path / "tiles").mkdir()
    names = [f"tiles/{at}.png" for at in range(240)]
    for at, name in enumerate(names):
        Image.fromarray(np.full((32, 32, 3), at, np.uint8)).save(tmp_path / name)
    pd.DataFrame({"file": names, "patient_id": patient, "label": given}).to_csv(tmp_path / "cohort.csv", index=False)
    np.save(tmp_path / "made.npy", x.astype(np.float32))
    score = 1 / (1 + np.exp(-x[:, :4].sum(axis=1)))
    split = np.where(np.char.replace(patient, "p", "").astype(int) < 6, "tune", "test")
    rows = {"row": np.arange(240) + 2, "split": split, "label": given, "score": score, "group": patient}
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_csv(tmp_path / "predictions_made.csv", index=False)
    return tmp_path


def test_from_a_table_of_predictions_to_a_page(probed: Path) -> None:
    where = (probed, probed / "cohort.csv", probed / "predictions_made.csv")
    found = hard_examples(*where, out=probed / "out", encoder=str(probed / "made.npy"))
    table = pd.read_csv(probed / "out" / "hard_examples.csv")
    cohort = pd.read_csv(probed / "cohort.csv")
    told = pd.read_csv(probed / "predictions_made.csv").set_index("row")
    cut = found.report.sections["threshold"]["threshold"]
    wrong = told.loc[(told["split"] == "test") & ((told["score"] >= cut) != (told["label"] == 1))]
    assert set(table["row"]) == set(wrong.index)
    assert (table["name"].to_numpy() == cohort["file"].to_numpy()[table["row"] - 2]).all()
    assert (table["patient"].to_numpy() == cohort["patient_id"].to_numpy()[table["row"] - 2]).all()
    doubtful = table.loc[table["verdict"] == DOUBTFUL, "row"]
    assert (doubtful - 2 < 12).mean() > 0.6
    assert table["balance"].to_numpy()[0] == table.loc[table["verdict"] == DOUBTFUL, "balance"].max()
    for one in table.itertuples():
        near = [int(row) for row in str(one.neighbour_rows).split()]
        assert one.patient not in set(cohort["patient_id"].to_numpy()[np.array(near) - 2])
    report = json.loads((probed / "out" / "hard_examples.json").read_text())
    assert report["schema"] == "eosin.hard_examples/1"
    assert sum(one["n"] for one in report["verdicts"]) == len(table) == report["errors"]
    page = (probed / "out" / "hard_examples.html").read_text()
    shown = page.count('<div class="error">')
    assert shown == sum(min(12, one["n"]) for one in report["verdicts"])
    assert page.count("data:image/jpeg") == 9 * shown
    again = hard_examples(*where, out=probed / "again", encoder=str(probed / "made.npy"))
    assert again.report.to_json() == found.report.to_json()


def test_a_threshold_may_be_given(probed: Path) -> None:
    where = (probed, probed / "cohort.csv", probed / "predictions_made.csv")
    found = hard_examples(*where, out=probed / "out", encoder=str(probed / "made.npy"), threshold=0.9)
    assert found.report.sections["threshold"]["threshold"] == 0.9
    assert (found.table.loc[found.table["called"] == "1", "score"] >= 0.9).all()


def test_predictions_of_another_table_are_refused(probed: Path) -> None:
    table = pd.read_csv(probed / "predictions_made.csv")
    where = (probed, probed / "cohort.csv", probed / "wrong.csv")
    table.assign(row=table["row"] + 500).to_csv(probed / "wrong.csv", index=False)
    with pytest.raises(PredictionsError, match="240 predictions name rows"):
        hard_examples(*where, out=probed / "out", encoder=str(probed / "made.npy"))
    table.drop(columns="row").to_csv(probed / "wrong.csv", index=False)
    with pytest.raises(PredictionsError, match="no column 'row'"):
        hard_examples(*where, out=probed / "out", encoder=str(probed / "made.npy"))
    assert not (probed / "out").exists()


@pytest.mark.real
def test_real_votes_are_read(real_data: Path, tmp_path: Path) -> None:
    """Errors of a constant score on 300 real figures: every missed one is an atypical figure with its own votes."""
    cells = pd.read_csv(real_data / "tiles" / "amf" / "labels.csv", dtype=str)
    cells = cells.loc[cells["dataset"] == "midog21"].iloc[::6].reset_index(drop=True)
    cells["file"] = [str(real_data / "tiles" / "amf" / name) for name in cells["file"]]
    cells.to_csv(tmp_path / "cohort.csv", index=False)
    slides = cells["slide_id"].to_numpy()
    rows = {
        "row": np.arange(len(cells)) + 2,
        "split": np.where(np.isin(slides, np.unique(slides)[::3]), "tune", "test"),
        "label": cells["atypical"],
        "score": np.linspace(0, 1, len(cells)).round(4),
        "group": slides,
    }
    pd.DataFrame(rows).to_csv(tmp_path / "p.csv", index=False)
    found = hard_examples(
        Path("/"), tmp_path / "cohort.csv", tmp_path / "p.csv", out=tmp_path / "out", encoder="texture", threshold=0.999
    )
    missed = found.table.loc[found.table["label"] == "1"]
    votes = cells["votes"].to_numpy()[missed["row"] - 2]
    assert len(missed) > 20
    assert all(vote.count("1") >= 2 for vote in votes)
    assert (tmp_path / "out" / "hard_examples.html").read_text().count("data:image/jpeg") > 9
