from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize
from sklearn.utils.estimator_checks import parametrize_with_checks

from eosin.errors import LabelError, NonFiniteError
from eosin.heads.prototypes import PrototypeHead, episodes, label_scores


def clouds(n, dim=16, *, seed, classes=3, spread=1.5):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return np.random.default_rng(5).normal(size=(classes, dim))[y] + 3 + spread * rng.normal(size=(n, dim)), y


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_nearest_centroid_on_centred_normalised_rows(dtype):
    x, y = clouds(300, seed=0)
    test, _ = clouds(200, seed=1)
    x, test, names = x.astype(dtype), test.astype(dtype), np.array(["c", "a", "b"])[y]
    head = PrototypeHead().fit(x, names)
    mean = x.astype(float).mean(axis=0)
    oracle = NearestCentroid().fit(normalize(x.astype(float) - mean), names)
    rows = normalize(test.astype(float) - mean)
    np.testing.assert_allclose(head.prototypes_, oracle.centroids_, atol=1e-12)
    np.testing.assert_array_equal(head.predict(test), oracle.predict(rows))
    square = ((rows[:, None] - oracle.centroids_) ** 2).sum(-1)
    np.testing.assert_allclose(head.predict_proba(test), softmax(-square, axis=1), atol=1e-12)


def test_a_given_centre_is_subtracted():
    x, y = clouds(100, seed=2)
    centre = np.full(16, 2.5)
    head = PrototypeHead(centre=centre).fit(x, y)
    oracle = NearestCentroid().fit(normalize(x - centre), y)
    np.testing.assert_allclose(head.prototypes_, oracle.centroids_, atol=1e-12)
    with pytest.raises(ValueError, match=r"need \(16,\)"):
        PrototypeHead(centre=centre[:4]).fit(x, y)


def test_adding_and_scaling_change_nothing():
    x, y = clouds(100, seed=3)
    plain = PrototypeHead().fit(x, y).predict_proba(x)
    np.testing.assert_allclose(PrototypeHead().fit(7 * x + 100, y).predict_proba(7 * x + 100), plain, atol=1e-10)


def test_one_class_is_refused():
    with pytest.raises(LabelError, match="1 class"):
        PrototypeHead().fit(np.ones((4, 2)), np.zeros(4))


@parametrize_with_checks([PrototypeHead()])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("centre", ["support", "pool"])
def test_each_episode_equals_a_head_fitted_on_its_support_set(centre, monkeypatch):
    x, y = clouds(120, seed=4)
    test, truth = clouds(80, seed=5)
    drawn = []
    from eosin.heads import prototypes

    supports = prototypes._supports

    def spy(*given):
        for block in supports(*given):
            drawn.extend(block)
            yield block

    monkeypatch.setattr(prototypes, "_supports", spy)
    found = episodes(x, y, test, truth, shots=(1, 5), draws=60, centre=centre, seed=3)
    assert len(drawn) == 120
    called = []
    for support in drawn:
        assert [set(y[rows]) for rows in support] == [{0}, {1}, {2}]
        rows = support.ravel()
        given = x.mean(axis=0) if centre == "pool" else None
        called.append(PrototypeHead(centre=given).fit(x[rows], y[rows]).predict(test))
    for shots, part in ((1, called[:60]), (5, called[60:])):
        expected = [balanced_accuracy_score(truth, labels) for labels in part]
        np.testing.assert_allclose(found.scores[shots]["balanced_accuracy"], expected)
        np.testing.assert_allclose(
            found.scores[shots]["macro_f1"], [f1_score(truth, labels, average="macro") for labels in part]
        )
        counts = (np.array(part)[:, :, None] == np.arange(3)).sum(axis=0)
        np.testing.assert_array_equal(found.votes[shots], counts)
        row = found.table.query("shots == @shots and metric == 'balanced_accuracy'").iloc[0]
        np.testing.assert_allclose(
            row[["low", "q25", "median", "q75", "high"]].astype(float),
            np.quantile(expected, [0.025, 0.25, 0.5, 0.75, 0.975]),
        )
        assert row["mean"] == pytest.approx(np.mean(expected))
        assert row["sem"] == pytest.approx(np.std(expected, ddof=1) / np.sqrt(60))
        assert row["vote"] == pytest.approx(balanced_accuracy_score(truth, counts.argmax(axis=1)))


def test_more_shots_help_and_the_vote_hides_the_spread():
    x, y = clouds(400, seed=6, spread=2.5)
    test, truth = clouds(400, seed=7, spread=2.5)
    table = episodes(x, y, test, truth, shots=(1, 4, 16), draws=200).table.query("metric == 'balanced_accuracy'")
    assert table["mean"].is_monotonic_increasing
    assert (table["high"] - table["low"]).is_monotonic_decreasing
    assert table["vote"].iloc[0] > table["q75"].iloc[0]


def test_the_seed_decides_and_other_shots_do_not_interfere():
    x, y = clouds(100, seed=8)
    one = episodes(x, y, x, y, shots=(2,), draws=30, seed=1)
    same = episodes(x, y, x, y, shots=(1, 2), draws=30, seed=1)
    other = episodes(x, y, x, y, shots=(2,), draws=30, seed=2)
    np.testing.assert_array_equal(one.scores[2]["macro_f1"], same.scores[2]["macro_f1"])
    assert not np.array_equal(one.scores[2]["macro_f1"], other.scores[2]["macro_f1"])


def test_a_support_set_takes_one_row_a_patient_each_patient_equally_often():
    from eosin.heads.prototypes import _supports

    codes = np.repeat([0, 1], 60)
    units = np.concatenate([np.repeat([0, 1, 2], [50, 5, 5]), np.repeat([3, 4, 5], 20)])
    drawn = np.concatenate(list(_supports(codes, units, 2, 2, 3000, np.random.default_rng(0))))
    chosen = units[drawn]
    assert (chosen[:, :, 0] != chosen[:, :, 1]).all()
    share = np.bincount(chosen.ravel(), minlength=6) / 3000
    np.testing.assert_allclose(share, 2 / 3, atol=0.04)
    assert len(np.unique(drawn)) == 120


def test_label_scores_equal_scikit_learn():
    rng = np.random.default_rng(9)
    truth, called = rng.integers(4, size=90), rng.integers(4, size=(5, 90))
    found = label_scores(truth, called)
    np.testing.assert_allclose(found["balanced_accuracy"], [balanced_accuracy_score(truth, row) for row in called])
    np.testing.assert_allclose(found["macro_f1"], [f1_score(truth, row, average="macro") for row in called])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shots": (60,)}, LabelError, "fewer than 60 shots"),
        ({"groups": np.arange(100) % 4, "shots": (5,)}, LabelError, "4 groups"),
        ({"y_test": np.full(100, 9)}, LabelError, r"\[9\]"),
        ({"draws": 1}, ValueError, "2 or more draws"),
        ({"level": 1.0}, ValueError, "level 1.0"),
        ({"shots": ()}, ValueError, "at least one number"),
        ({"x_test": np.ones((100, 3))}, ValueError, "same D"),
        ({"y": np.zeros(7)}, ValueError, "one label"),
        ({"x_test": np.full((100, 16), np.nan)}, NonFiniteError, "100 rows of x_test"),
    ],
)
def test_bad_episodes_say_what_is_wrong(change, error, words):
    x, y = clouds(100, seed=10)
    given = {"x": x, "y": y, "x_test": x, "y_test": y, "draws": 5, "shots": (1,), **change}
    with pytest.raises(error, match=words):
        episodes(given.pop("x"), given.pop("y"), given.pop("x_test"), given.pop("y_test"), **given)


def test_results_are_json():
    x, y = clouds(60, seed=11)
    plain = json.loads(json.dumps(episodes(x, y, x, y, shots=(1,), draws=5).to_dict(), allow_nan=False))
    assert plain["classes"] == [0, 1, 2]
    assert {row["metric"] for row in plain["rows"]} == {"balanced_accuracy", "macro_f1"}
