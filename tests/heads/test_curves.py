from __future__ import annotations

import json
import math

import hypothesis
import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from eosin.errors import CohortError, LabelError
from eosin.heads.curves import group_order, label_efficiency, probability_scores, records
from eosin.heads.knn import KnnHead
from eosin.heads.labels import f1_per_class
from eosin.heads.prototypes import PrototypeHead


class Spy:
    """A head that notes what it was given."""

    seen: list[tuple[int, np.ndarray, np.ndarray]]

    def __init__(self, seed, seen):
        self.seed, self.seen, self.head = seed, seen, PrototypeHead()

    def fit(self, x, y, *, groups=None):
        self.seen.append((self.seed, x, groups))
        self.head.fit(x, y)
        self.classes_ = self.head.classes_
        return self

    def predict_proba(self, x):
        return self.head.predict_proba(x)


class Logistic(LogisticRegression):
    def fit(self, x, y, *, groups=None):
        return super().fit(x, y)


def cohort(*, patients=80, each=12, seed=0, spread=2.0):
    """Patients with a class and an offset of their own; the last quarter is the test set."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"p{at:03d}" for at in range(patients)], each)
    y = np.repeat(rng.permutation(np.arange(patients) % 2), each)
    offset = np.repeat(1.5 * rng.normal(size=(patients, 10)), each, axis=0)
    x = np.where(y == 1, 1.2, -1.2)[:, None] * np.eye(10)[0] + offset + spread * rng.normal(size=(len(y), 10))
    return x, y, groups, np.arange(len(y) * 3 // 4, len(y))


def test_patients_are_sampled_whole_and_subsets_are_nested():
    x, y, groups, test = cohort()
    seen = []
    label_efficiency(lambda seed: Spy(seed, seen), x, y, groups, test=test, fractions=(0.05, 0.25, 1.0), seeds=(3, 4))
    assert [len(set(given)) for _, _, given in seen] == [3, 15, 60] * 2
    for seed in (3, 4):
        parts = [set(given) for at, _, given in seen if at == seed]
        assert parts[0] < parts[1] < parts[2]
    for _, _, given in seen:
        assert (pd.Series(given).value_counts() == 12).all()
        assert not set(given) & set(groups[test])
    assert set(seen[0][2]) != set(seen[3][2])


def test_scores_and_ratio_equal_a_loop_written_out():
    x, y, groups, test = cohort(seed=1)
    seen = []
    curve = label_efficiency(lambda seed: Spy(seed, seen), x, y, groups, test=test, seeds=range(5))
    assert sorted(set(curve.table["fraction"])) == [0.01, 0.05, 0.1, 0.25, 0.5, 1.0]
    by_seed = {}
    for row, (seed, rows, given) in zip(curve.table.sort_values(["seed", "fraction"]).itertuples(), seen, strict=True):
        labels = dict(zip(groups, y, strict=True))
        head = PrototypeHead().fit(rows, np.array([labels[name] for name in given]))
        probability = head.predict_proba(x[test])
        assert row.seed == seed
        assert row.n == len(rows)
        assert row.n_test == len(test)
        assert row.test_groups == 20
        assert row.balanced_accuracy == pytest.approx(balanced_accuracy_score(y[test], probability.argmax(1)))
        assert row.macro_f1 == pytest.approx(f1_score(y[test], probability.argmax(1), average="macro"))
        assert row.auroc == pytest.approx(roc_auc_score(y[test], probability[:, 1]))
        by_seed[seed, row.fraction] = row.auroc
    ratios = [by_seed[seed, 0.25] / by_seed[seed, 1.0] for seed in range(5)]
    found = curve.ratio25.set_index("metric").loc["auroc"]
    assert found["mean"] == pytest.approx(np.mean(ratios))
    assert (found["low"], found["high"]) == (min(ratios), max(ratios))
    assert found["seeds"] == 5
    few = curve.summary.query("fraction == 0.05 and metric == 'auroc'").iloc[0]
    assert few["mean"] == pytest.approx(np.mean([by_seed[seed, 0.05] for seed in range(5)]))
    assert few["sd"] == pytest.approx(np.std([by_seed[seed, 0.05] for seed in range(5)], ddof=1))


def test_more_patients_help():
    x, y, groups, test = cohort(patients=160, each=4, seed=2, spread=1.5)
    curve = label_efficiency(lambda seed: Logistic(), x, y, groups, test=test, seeds=range(6))
    mean = curve.summary.query("metric == 'auroc'").set_index("fraction")["mean"]
    assert mean[1.0] > mean[0.25] > mean[0.01]
    assert 0.5 < curve.ratio25.set_index("metric").loc["auroc", "mean"] < 1


def test_one_percent_still_holds_every_class_and_says_what_it_took():
    x, y, groups, test = cohort(seed=3)
    y = y.copy()
    y[groups == "p005"] = 2  # one patient alone holds the third class
    seen = []
    curve = label_efficiency(lambda seed: Spy(seed, seen), x, y, groups, test=test, fractions=(0.01,), seeds=range(4))
    assert (curve.table["groups"] == 3).all()
    np.testing.assert_allclose(curve.table["fraction_used"], 3 / 60)
    assert all("p005" in set(given) for _, _, given in seen)
    assert curve.table["auroc"].isna().all()  # the test set lacks the class
    assert curve.ratio25.empty
    assert curve.summary.query("metric == 'auroc'")["note"].tolist() == ["undefined"]
    assert curve.summary.query("metric == 'macro_f1'")["note"].tolist() == ["fewer than 5 seeds"]
    json.dumps(curve.to_dict(), allow_nan=False)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3)), min_size=2, max_size=60), st.integers(0, 9)
)
def test_group_order_is_a_permutation_whose_lead_holds_every_class(pairs, seed):
    names, classes = np.array(pairs).T
    units = np.unique(names, return_inverse=True)[1]
    order, lead = group_order(classes, units, seed=seed)
    assert sorted(order) == list(range(units.max() + 1))
    assert set(classes[np.isin(units, order[:lead])]) == set(classes)
    assert lead <= len(set(classes))


def test_two_patients_a_class_let_a_head_validate_its_settings():
    x, y, groups, test = cohort(seed=7)
    given = {"test": test, "fractions": (0.01, 1.0), "seeds": (0, 1)}
    with pytest.raises(LabelError, match="one group only"):
        label_efficiency(lambda seed: KnnHead(k_grid=(1, 3)), x, y, groups, **given)
    curve = label_efficiency(lambda seed: KnnHead(k_grid=(1, 3)), x, y, groups, per_class=2, **given)
    assert curve.table["groups"].tolist() == [4, 4, 60, 60]
    with pytest.raises(LabelError, match=r"fewer than per_class \(31\)"):
        label_efficiency(lambda seed: PrototypeHead(), x, y, groups, per_class=31, **given)


def test_group_order_keeps_classes_in_proportion():
    units = np.arange(1000)
    y = (units < 200).astype(int)
    order, _ = group_order(y, units, seed=0)
    for size in (50, 100, 400):
        assert y[order[:size]].mean() == pytest.approx(0.2, abs=2 / size)


def test_multiclass_scores_equal_scikit_learn():
    rng = np.random.default_rng(4)
    y = np.array(["b", "a", "c", "d"])[rng.integers(4, size=200)]
    probability = rng.dirichlet(np.ones(4), size=200)
    found = probability_scores(y, probability, np.array(["a", "b", "c", "d"]))
    called = np.array(["a", "b", "c", "d"])[probability.argmax(axis=1)]
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, called))
    assert found["macro_f1"] == pytest.approx(f1_score(y, called, average="macro"))
    assert found["auroc"] == pytest.approx(roc_auc_score(y, probability, multi_class="ovr", average="macro"))


def test_f1_per_class_equals_scikit_learn():
    rng = np.random.default_rng(5)
    truth, called = rng.integers(3, size=50), rng.integers(4, size=50)
    expected = f1_score(truth, called, labels=range(5), average=None, zero_division=0)
    np.testing.assert_allclose(f1_per_class(truth, called, 5), expected)


def test_any_scikit_learn_classifier_can_be_wrapped():
    x, y, groups, test = cohort(seed=6)
    curve = label_efficiency(lambda seed: Logistic(), x, y, groups, test=test, fractions=(0.25, 1), seeds=(0,))
    assert curve.ratio25["note"].tolist() == ["fewer than 5 seeds"] * 3
    assert curve.ratio25["sd"].isna().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fractions": (0.0, 1.0)}, ValueError, r"\(0, 1\]"),
        ({"seeds": ()}, ValueError, "not be empty"),
        ({"test": np.arange(6)}, CohortError, "first 'p000'; split by group"),
        ({"test": np.arange(0)}, CohortError, "both sides"),
        ({"groups": np.arange(4)}, CohortError, "4 groups"),
        ({"y": np.zeros(960)}, LabelError, "1 class"),
        ({"y": np.concatenate([np.arange(720) % 2, np.full(240, 7)])}, LabelError, r"\[7\]"),
    ],
)
def test_bad_curves_say_what_is_wrong(change, error, words):
    x, y, groups, test = cohort()
    given = {"y": y, "groups": groups, "test": test, "seeds": (0,), **change}
    with pytest.raises(error, match=words):
        label_efficiency(lambda seed: PrototypeHead(), x, given.pop("y"), given.pop("groups"), **given)


def test_records_hold_plain_values():
    table = pd.DataFrame({"a": np.array([1, 2]), "b": [math.nan, 0.5], "c": ["x", "y"]})
    assert records(table) == [{"a": 1, "b": None, "c": "x"}, {"a": 2, "b": 0.5, "c": "y"}]
    assert type(records(table)[0]["a"]) is int
