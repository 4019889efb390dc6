from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from eosin.errors import LabelError, NonFiniteError
from eosin.heads import few_label
from eosin.heads.few_label import Candidates, SandiHead, at_random, farthest, label_curve, selection_curves

RARE = 3


def cells(n, *, seed, crops=4, dim=12, shares=(0.5, 0.3, 0.18, 0.02)):
    """Planted clusters, the last one rare; crops of a cell scatter about it."""
    rng = np.random.default_rng(seed)
    y = rng.choice(len(shares), size=n, p=shares)
    y[: len(shares)] = np.arange(len(shares))
    centres = 3 * np.eye(len(shares), dim)
    cell = centres[y] + 0.4 * rng.normal(size=(n, dim))
    return cell[:, None] + 0.3 * rng.normal(size=(n, crops, dim)), y


def best_pair(a, b):
    """SANDI's similarity of two cells, pair by pair, both orders averaged."""
    pairs = [[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in b] for u in a]
    return (max(map(max, pairs)) + max(map(max, zip(*pairs, strict=True)))) / 2


def test_similarity_is_the_best_pair_of_crops_over_the_references_of_a_class(monkeypatch):
    monkeypatch.setattr(few_label, "BLOCK", 100)  # a few cells at a time
    x, y = cells(25, seed=0)
    test, _ = cells(9, seed=1, crops=3)
    head = SandiHead().fit(x, np.array(["d", "b", "a", "c"])[y])
    assert head.classes_.tolist() == ["a", "b", "c", "d"]
    expected = np.array(
        [[max(best_pair(cell, x[at]) for at in np.flatnonzero(y == code)) for code in (2, 1, 3, 0)] for cell in test]
    )
    np.testing.assert_allclose(head.similarity(test), expected, atol=1e-6)
    np.testing.assert_allclose(head.predict_proba(test), softmax(expected / 0.1, axis=1), atol=1e-5)
    np.testing.assert_array_equal(head.predict(test), head.classes_[expected.argmax(axis=1)])


def test_one_crop_is_the_nearest_neighbour_by_cosine():
    x, y = cells(300, seed=2, crops=1)
    test, _ = cells(100, seed=3, crops=1)
    oracle = KNeighborsClassifier(1, metric="cosine").fit(x[:, 0], y)
    np.testing.assert_array_equal(SandiHead().fit(x[:, 0], y).predict(test[:, 0]), oracle.predict(test[:, 0]))
    np.testing.assert_array_equal(SandiHead().fit(x, y).predict(test), oracle.predict(test[:, 0]))


def test_crops_tell_what_their_mean_hides():
    """The sign of one crop is the class; the other crop cancels it in the mean."""
    rng = np.random.default_rng(4)
    y = rng.integers(2, size=80)
    mark = np.where(y == 1, 1.0, -1.0)[:, None] * np.eye(6)[0]
    other = -mark + 0.8 * np.eye(6)[1] * np.where(y == 1, 3, -3)[:, None]
    x = np.stack([mark + 0.1 * rng.normal(size=(80, 6)), other + 0.1 * rng.normal(size=(80, 6))], axis=1)
    assert (SandiHead().fit(x[:10], y[:10]).predict(x[10:]) == y[10:]).mean() > 0.95


def labels_until_rare(rule, seed, *, budget=150):
    """Labels asked for after the start until the first rare cell; budget when none; None when the start has one."""
    x, y = cells(1200, seed=seed)
    curve = label_curve(x, y, x_test=x[:50], y_test=y[:50], select=rule, start=10, step=5, budget=budget, seed=seed)
    rare = np.flatnonzero(y[curve.asked] == RARE)
    if len(rare) and rare[0] < 10:
        return None
    return rare[0] - 9 if len(rare) else budget


def test_farthest_query_finds_the_rare_class_with_fewer_labels_than_random():
    needed = np.array(
        [
            pair
            for seed in range(20)
            if None not in (pair := [labels_until_rare(rule, seed) for rule in (farthest, at_random)])
        ]
    )
    assert len(needed) >= 10
    assert np.median(needed[:, 0]) * 3 < np.median(needed[:, 1])
    assert (needed[:, 0] < needed[:, 1]).mean() >= 0.75
    assert needed[:, 0].max() <= 15


def test_over_seeds_farthest_reaches_a_better_macro_f1_at_few_labels():
    x, y = cells(800, seed=20)
    test, truth = cells(400, seed=21)
    table = selection_curves(
        x,
        y,
        x_test=test,
        y_test=truth,
        rules={"farthest": farthest, "random": at_random},
        seeds=range(8),
        start=8,
        step=8,
        budget=48,
    )
    assert len(table) == 2 * 8 * 6
    assert table.columns[:3].tolist() == ["rule", "seed", "labels"]
    first = table[table["labels"] == 8].pivot_table(index="seed", columns="rule", values="macro_f1")
    np.testing.assert_array_equal(first["farthest"], first["random"])
    last = table[table["labels"] == 48].groupby("rule")[["macro_f1", "classes_found"]].mean()
    assert last.loc["farthest", "macro_f1"] > last.loc["random", "macro_f1"] + 0.02
    assert last.loc["farthest", "classes_found"] == 4


def test_the_curve_equals_a_head_fitted_on_the_labels_asked_for():
    x, y = cells(200, seed=5)
    test, truth = cells(150, seed=6)
    curve = label_curve(x, y, x_test=test, y_test=truth, start=12, step=7, budget=40, seed=2)
    assert curve.table["labels"].tolist() == [12, 19, 26, 33, 40]
    assert len(np.unique(curve.asked)) == 40
    for row in curve.table.itertuples():
        given = curve.asked[: row.labels]
        called = SandiHead().fit(x[given], y[given]).predict(test)
        for average in ("macro", "weighted"):
            expected = f1_score(truth, called, labels=np.unique(truth), average=average, zero_division=0)
            assert getattr(row, f"{average}_f1") == pytest.approx(expected)
        assert row.classes_found == len(set(y[given]))


def test_farthest_takes_turns_between_classes_least_similar_first():
    similarity = np.array([[0.9, 0.1], [0.5, 0.2], [0.1, 0.8], [0.0, 0.3], [0.7, 0.0], [0.2, 0.95]], np.float32)
    rows = np.array([10, 11, 12, 13, 14, 15])
    candidates = Candidates(rows=rows, similarity=similarity, predicted=similarity.argmax(axis=1))
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(farthest(candidates, 5, rng), [13, 11, 14, 12, 10])
    assert set(farthest(candidates, 99, rng)) == set(rows)


def test_labels_not_asked_for_are_not_looked_at():
    x, y = cells(150, seed=7)
    test, truth = cells(50, seed=8)
    curve = label_curve(x, y, x_test=test, y_test=truth, start=15, step=5, budget=30)
    hidden = np.setdiff1d(np.arange(150), curve.asked)
    other = y.copy()
    other[hidden] = np.random.default_rng(0).permutation(y[hidden])
    again = label_curve(x, other, x_test=test, y_test=truth, start=15, step=5, budget=30)
    np.testing.assert_array_equal(curve.asked, again.asked)


def test_a_rule_of_your_own():
    x, y = cells(60, seed=9)

    def first_rows(candidates, count, rng):
        return candidates.rows[:count]

    curve = label_curve(x, y, x_test=x, y_test=y, select=first_rows, start=6, step=4, budget=14)
    free = np.setdiff1d(np.arange(60), curve.asked[:6])
    np.testing.assert_array_equal(curve.asked[6:], free[:8])
    with pytest.raises(ValueError, match="none twice"):
        label_curve(x, y, x_test=x, y_test=y, select=lambda c, n, r: c.rows[[0, 0]], start=6, step=2, budget=14)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"budget": 5}, ValueError, "start"),
        ({"budget": 61}, ValueError, "60 cells"),
        ({"y": np.zeros(60)}, LabelError, "1 class"),
        ({"y_test": np.full(60, 8)}, LabelError, r"\[8\]"),
        ({"x_test": np.ones((60, 2, 3))}, ValueError, "do not fit"),
        ({"x": np.zeros((60, 4, 12))}, NonFiniteError, "60 cells"),
        ({"x": np.ones(60)}, ValueError, "expected"),
    ],
)
def test_bad_curves_say_what_is_wrong(change, error, words):
    x, y = cells(60, seed=10)
    given = {"x": x, "y": y, "x_test": x, "y_test": y, "start": 8, "budget": 20, **change}
    with pytest.raises(error, match=words):
        label_curve(given.pop("x"), given.pop("y"), **given)


def test_bad_heads_say_what_is_wrong():
    x, y = cells(20, seed=11)
    with pytest.raises(ValueError, match="above 0"):
        SandiHead(temperature=0).fit(x, y)
    with pytest.raises(ValueError, match="20 cells but 3"):
        SandiHead().fit(x, y[:3])
    with pytest.raises(ValueError, match="5 features"):
        SandiHead().fit(x, y).similarity(x[..., :5])


def test_results_are_json():
    x, y = cells(40, seed=12)
    curve = label_curve(x, y, x_test=x, y_test=y, start=8, step=4, budget=12)
    plain = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert [row["labels"] for row in plain["rows"]] == [8, 12]
    assert plain["asked"] == curve.asked.tolist()
