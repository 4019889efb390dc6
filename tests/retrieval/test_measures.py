"""Measures of ranked hits: against scikit-learn, closed forms of chance, and counting one by one."""

from __future__ import annotations

from collections import Counter
from math import comb, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, ndcg_score

from eosin.errors import QueryError
from eosin.evaluation.bootstrap import bootstrap
from eosin.retrieval import measures
from eosin.retrieval.measures import NONE


def drawn(seed: int, queries: int = 40, hits: int = 7, labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(labels, size=queries), rng.integers(labels, size=(queries, hits))


def test_values_worked_by_hand() -> None:
    query = np.array([0, 1, 2])
    found = np.array([[1, 0, 0, 2, 0], [1, 2, 2, 1, 0], [0, 1, 0, 1, 0]])
    np.testing.assert_allclose(measures.precision_at(query, found, 5), [3 / 5, 2 / 5, 0])
    np.testing.assert_array_equal(measures.accuracy_at(query, found, 1), [0, 1, 0])
    np.testing.assert_array_equal(measures.accuracy_at(query, found, 2), [1, 1, 0])
    np.testing.assert_array_equal(measures.majority(found, 5), [0, 1, 0])  # the tie of 1 and 2 goes to the first seen
    np.testing.assert_array_equal(measures.majority_at(query, found, 5), [1, 1, 0])
    np.testing.assert_allclose(
        measures.average_precision_at(query, found, 5), [(1 / 2 + 2 / 3 + 3 / 5) / 5, (1 + 2 / 4) / 5, 0]
    )
    gain = (1 / log2(3) + 1 / log2(4) + 1 / log2(6)) / (1 + 1 / log2(3) + 1 / log2(4) + 1 / log2(5))
    np.testing.assert_allclose(measures.ndcg_at(query, found, 5, np.array([4, 9, 0])), [gain, *_second(), np.nan])


def _second() -> list[float]:
    return [(1 + 1 / log2(5)) / sum(1 / log2(i + 1) for i in range(1, 6))]


@pytest.mark.parametrize("k", [1, 3, 5, 12])
def test_ndcg_is_scikit_learns(k: int) -> None:
    rng = np.random.default_rng(k)
    labels, query = rng.integers(3, size=(20, 12)), rng.integers(3, size=20)
    relevant = labels == query[:, None]
    known = relevant.any(axis=1)
    ranks = np.tile(-np.arange(12.0), (20, 1))
    expected = [ndcg_score(relevant[i : i + 1], ranks[i : i + 1], k=k) for i in np.flatnonzero(known)]
    found = measures.ndcg_at(query, labels, k, relevant.sum(axis=1))
    np.testing.assert_allclose(found[known], expected)
    assert np.isnan(found[~known]).all()


def test_average_precision_is_scikit_learns_but_for_the_divisor() -> None:
    """With all candidates in the list, ours divides by k and scikit-learn's by R."""
    query, found = drawn(1, hits=9)
    relevant = found == query[:, None]
    ours = measures.average_precision_at(query, found, 9)
    for row in np.flatnonzero(relevant.any(axis=1)):
        theirs = average_precision_score(relevant[row], -np.arange(9.0))
        assert ours[row] * 9 / relevant[row].sum() == pytest.approx(theirs)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(1, 8))
def test_the_majority_is_that_of_a_counter(hits: list[int], k: int) -> None:
    k = min(k, len(hits))
    expected = Counter(hits[:k]).most_common(1)[0][0]  # of equals, the first met
    assert measures.majority(np.array([hits]), k)[0] == expected


@pytest.mark.parametrize(
    ("hits", "expected"),
    [
        ([2, 2, 2, NONE, NONE], 2),  # 3 of 5 asked for
        ([2, 2, NONE, NONE, NONE], NONE),  # 2 are fewer than ceil(5 / 2)
        ([2, 2, 1, 1, NONE], NONE),
        ([2, 1, 1, 0, 0], 1),  # a full list needs no absolute majority
        ([NONE] * 5, NONE),
    ],
)
def test_short_lists_need_half_of_what_was_asked(hits: list[int], expected: int) -> None:
    assert measures.majority(np.array([hits]), 5)[0] == expected
    assert measures.majority_at(np.array([2]), np.array([hits]), 5)[0] == (expected == 2)


def test_missing_hits_are_in_no_share() -> None:
    query = np.array([1, 1, 1])
    found = np.array([[1, 0, NONE], [NONE, NONE, NONE], [1, 1, 1]])
    np.testing.assert_array_equal(measures.precision_at(query, found, 3), [0.5, np.nan, 1])
    np.testing.assert_array_equal(measures.accuracy_at(query, found, 3), [1, 0, 1])
    assert measures.average_precision_at(query, found, 3)[1] == 0


def test_macro_f1_and_balanced_vote_are_scikit_learns() -> None:
    query, found = drawn(2, queries=200, hits=5, labels=4)
    query = query % 3  # label 3 is found but never asked for
    vote = measures.majority(found, 5)
    f1 = f1_score(query, vote, labels=[0, 1, 2], average="macro")
    assert measures.points({"f1": measures.macro_f1_metric(query, found, 5)}, 200)["f1"] == pytest.approx(f1)
    inside = np.arange(200) % 4 == 0
    f1 = f1_score(query[inside], vote[inside], labels=[0, 1, 2], average="macro")
    part = measures.macro_f1_metric(query, found, 5, inside)
    assert measures.points({"f1": part}, 200)["f1"] == pytest.approx(f1)
    balanced = measures.balanced_vote_metric(query, found, 5)
    keep = vote < 3
    alone = measures.balanced_vote_metric(query[keep], found[keep], 5)
    expected = balanced_accuracy_score(query[keep], vote[keep])
    assert measures.points({"ba": alone}, int(keep.sum()))["ba"] == pytest.approx(expected)
    assert measures.points({"ba": balanced}, 200)["ba"] < expected


def test_no_majority_counts_against_the_query_only() -> None:
    query = np.array([0, 0, 1, 1])
    found = np.array([[0, 0, 0], [0, NONE, NONE], [1, 1, 1], [1, 1, 0]])
    vote = measures.majority(found, 3)
    np.testing.assert_array_equal(vote, [0, NONE, 1, 1])
    expected = f1_score(query, vote, labels=[0, 1], average="macro")
    assert measures.points({"f1": measures.macro_f1_metric(query, found, 3)}, 4)["f1"] == pytest.approx(expected)


def test_weights_repeat_queries() -> None:
    """A metric of weighted queries is the metric of the queries written out."""
    query, found = drawn(3, queries=30, hits=5)
    relevant = np.full(30, 9)
    weight = np.random.default_rng(0).integers(1, 4, 30)
    again = np.repeat(np.arange(30), weight)
    some = measures.label_metrics(query, found, relevant)
    more = measures.points(measures.label_metrics(query[again], found[again], relevant[again]), len(again))
    assert set(some) == {
        *(f"acc@{k}" for k in (1, 3, 5)),
        *("mmv@3", "mmv@5", "mmv_balanced@3", "mmv_balanced@5", "map@5", "ndcg@5", "macro_f1@5"),
    }
    for name, metric in some.items():
        assert metric(weight[None].astype(float))[0] == pytest.approx(more[name]), name


def test_intervals_resample_patients() -> None:
    """One patient in many copies has no more certainty than once."""
    query, found = drawn(4, queries=60, hits=5)
    patient = np.arange(60) // 3
    relevant = np.full(60, 9)
    name = "mmv@5"
    once = bootstrap(measures.label_metrics(query, found, relevant)[name], patient, resamples=300)
    tiled = [np.tile(part, (4,) + (1,) * (part.ndim - 1)) for part in (query, found, relevant)]
    four = bootstrap(measures.label_metrics(*tiled)[name], np.tile(patient, 4), resamples=300)
    assert (four.low, four.high) == pytest.approx((once.low, once.high))
    assert four.clusters == 20


def world(seed: int = 0, n: int = 60) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    patient = rng.integers(12, size=n)
    return {
        "row": np.arange(n),
        "patient": patient,
        "site": (patient % 3 + (rng.random(n) < 0.2)) % 3,  # some patients were seen at two sites
        "label": rng.integers(4, size=n),
    }


@pytest.mark.parametrize("exclude", [("row",), ("patient",), ("patient", "site"), ("row", "patient", "site")])
def test_candidates_are_those_counted_one_by_one(exclude: tuple[str, ...]) -> None:
    w = world()
    rows = np.array([0, 5, 17, 40, 59])
    columns = [w[name] for name in exclude]
    left = [np.flatnonzero(np.all([c != c[row] for c in columns], axis=0)) for row in rows]
    np.testing.assert_array_equal(measures.candidates(columns, rows), [len(one) for one in left])
    same = [int((w["site"][one] == w["site"][row]).sum()) for row, one in zip(rows, left, strict=True)]
    np.testing.assert_array_equal(measures.candidates(columns, rows, [w["site"]], [w["site"][rows]]), same)
    expected = [a / len(b) for a, b in zip(same, left, strict=True)]
    np.testing.assert_allclose(measures.chance(columns, rows, w["site"]), expected)
    wanted = np.random.default_rng(1).integers(4, size=(5, 3))
    counts = [[int((w["label"][one] == v).sum()) for v in row] for one, row in zip(left, wanted, strict=True)]
    np.testing.assert_array_equal(measures.candidates(columns, rows, [w["label"]], [wanted]), counts)


def test_chance_among_is_the_mean_over_candidates_of_the_labels_found() -> None:
    w = world(2)
    rows = np.array([3, 30, 44])
    near = np.array([[1, 2, 50], [7, NONE, NONE], [NONE, NONE, NONE]])
    expected = []
    for row, hits in zip(rows, near, strict=True):
        left = np.flatnonzero(w["patient"] != w["patient"][row])
        shares = [
            (w["site"][left] == w["site"][row])[w["label"][left] == w["label"][hit]].mean()
            for hit in hits
            if hit != NONE
        ]
        expected.append(np.mean(shares) if shares else np.nan)
    found = measures.chance_among([w["patient"]], rows, w["site"], w["label"], near, 3)
    np.testing.assert_allclose(found, expected)


def test_a_label_tied_to_its_site_explains_its_neighbours() -> None:
    """Every label at one site: a perfect search finds its site always, and a blind one among its labels too."""
    label = np.repeat([0, 1], 20)
    patient = np.arange(40)
    near = np.stack([np.flatnonzero((label == label[i]) & (patient != i))[:3] for i in range(40)])
    rows = np.arange(40)
    assert (measures.precision_at(label, label[near], 3) == 1).all()
    np.testing.assert_allclose(measures.chance([patient], rows, label), 19 / 39)
    np.testing.assert_allclose(measures.chance_among([patient], rows, label, label, near, 3), 1)


def test_a_blind_search_meets_closed_forms_of_chance() -> None:
    """Acc@k is 1 - C(N - R, k) / C(N, k); a blind precision is R / N; AP@k follows from pairs of hits."""
    w = world(5)
    rows = np.arange(60)
    exclude = [w["patient"]]
    n = measures.candidates(exclude, rows)
    r = measures.candidates(exclude, rows, [w["label"]], [w["label"]])
    k = 5
    drawn_ = [measures.blind_search(exclude, rows, k, seed=seed) for seed in range(200)]
    labels = [w["label"][one] for one in drawn_]
    query = w["label"]
    hit = 1 - np.array([comb(a - b, k) / comb(a, k) for a, b in zip(n.tolist(), r.tolist(), strict=True)])
    ap = [
        sum(b / a / i * (1 + (i - 1) * (b - 1) / (a - 1)) for i in range(1, k + 1)) / k
        for a, b in zip(n.tolist(), r.tolist(), strict=True)
    ]
    for closed, measure in (
        (hit.mean(), measures.accuracy_at),
        ((r / n).mean(), measures.precision_at),
        (np.mean(ap), measures.average_precision_at),
    ):
        values = [measure(query, found, k).mean() for found in labels]
        assert np.mean(values) == pytest.approx(closed, abs=4 * np.std(values) / np.sqrt(200))
    for found in drawn_[:20]:
        assert (w["patient"][found] != w["patient"][:, None]).all()
        assert all(len(set(row)) == k for row in found.tolist())


def test_a_blind_search_with_few_candidates_says_so() -> None:
    patient = np.array([0] * 50 + [1, 1])
    found = measures.blind_search([patient], np.array([0, 51]), 3, seed=1)
    assert sorted(found[0].tolist()) == [NONE, 50, 51]
    assert (found[1] < 50).all()
    assert (found[1] != NONE).all()


def test_a_blind_search_finds_each_patient_once() -> None:
    """The first of a patient stays: a patient with two slides comes first twice as often as one with one."""
    patient = np.array([0, 1, 1, 2])
    rows = np.zeros(3000, np.int64)
    found = measures.blind_search([patient], rows, 2, once=patient, seed=3)
    assert (np.sort(patient[found], axis=1) == [1, 2]).all()
    assert (patient[found[:, 0]] == 1).mean() == pytest.approx(2 / 3, abs=0.03)


def test_shares_of_queries_without_hits_do_not_count() -> None:
    share = np.array([0.5, np.nan, 1.0])
    weights = np.array([[1.0, 1, 1], [1, 5, 0], [0, 2, 0]])
    np.testing.assert_allclose(measures.share_metric(share)(weights), [0.75, 0.5, np.nan])
    blind = np.array([0.25, 0.25, 0.25])
    np.testing.assert_allclose(measures.lift_metric(share, blind)(weights), [3, 2, np.nan])


def test_lift_is_a_ratio_of_means() -> None:
    lift = measures.lift_metric(np.array([0.5, 1.0]), np.array([0.25, 0.25]))
    assert lift(np.array([[1.0, 1.0], [1.0, 0.0]])).tolist() == [3.0, 2.0]


def test_bad_input_is_named() -> None:
    query, found = drawn(0)
    with pytest.raises(QueryError, match="k is 8, but 7 hits a query were kept"):
        measures.accuracy_at(query, found, 8)
    with pytest.raises(QueryError, match="do not fit"):
        measures.precision_at(query[:3], found, 2)
    with pytest.raises(QueryError, match="2 of 40 queries have no candidate of their label"):
        measures.label_metrics(query, found, np.array([0, 0] + [1] * 38))
