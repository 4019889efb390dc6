"""From tiles to slides: toys worked by hand, scipy's entropy, and bounds against looking at everything."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from eosin.errors import QueryError
from eosin.retrieval.measures import NONE
from eosin.retrieval.ranking import Bags, bag_entropies, entropy_vote, mean_top_k, median_of_minima, upper_bounds

A1, A2, B1, B2 = range(4)
LABEL = np.array([0, 0, 1, 1])


def bags(*rows: list[tuple[int, float]], label: np.ndarray = LABEL) -> Bags:
    slide = np.array([[one for one, _ in row] for row in rows])
    score = np.array([[value for _, value in row] for row in rows])
    return Bags(slide=slide, score=score, label=np.where(slide == NONE, NONE, label[slide]))


def test_four_slides_worked_by_hand() -> None:
    """Slides a1, a2 of label a and b1, b2 of label b, as many candidates of each; three tiles of the query.

    tile 0: a1 .90, a2 .80, b1 .50   mass a 1 + 1/2 = 9/6, b 1/3 = 2/6: p = 9/11, 2/11, H = 0.6840; mean .7333
    tile 1: a2 .95, a1 .85, a2 .60   all a: H = 0; mean .8
    tile 2: b1 .70, a1 .40, b2 .30   b 1 + 1/3 = 8/6, a 1/2 = 3/6: p = 8/11, 3/11, H = 0.8454; mean .4667
    Mean of the means .6667, so tile 2 goes. Tile 1 is sure: a2 at .95, then a1 at .85. Tile 0 would add hits of .6667
    or more, and both are there already. b1 and b2 are not found.
    """
    query = bags(
        [(A1, 0.9), (A2, 0.8), (B1, 0.5)], [(A2, 0.95), (A1, 0.85), (A2, 0.6)], [(B1, 0.7), (A1, 0.4), (B2, 0.3)]
    )
    entropy, top = bag_entropies(query.label, np.array([10, 10]))
    np.testing.assert_allclose(entropy, [0.6840, 0, 0.8454], atol=5e-5)
    assert top.tolist() == [0, 0, 1]
    vote = entropy_vote(query, np.array([10, 10]))
    assert vote.slide.tolist() == [A2, A1]
    assert vote.bag.tolist() == [1, 1]
    assert vote.score.tolist() == [0.95, 0.85]
    assert vote.entropy.tolist() == [0, 0]


def test_a_rare_label_weighs_more() -> None:
    """With 30 candidates of a and 10 of b, tile 0 has a 9/6 / 30 = 3/60, b 2/6 / 10 = 2/60: p = 3/5, 2/5."""
    query = bags([(A1, 0.9), (A2, 0.8), (B1, 0.5)])
    entropy, top = bag_entropies(query.label, np.array([30, 10]))
    assert entropy[0] == pytest.approx(-(0.6 * np.log2(0.6) + 0.4 * np.log2(0.4)))
    assert top[0] == 0
    entropy, top = bag_entropies(query.label, np.array([60, 10]))  # now 3/120 against 4/120
    assert entropy[0] == pytest.approx(-(3 / 7 * np.log2(3 / 7) + 4 / 7 * np.log2(4 / 7)))
    assert top[0] == 1


def test_a_bag_that_votes_otherwise_is_dropped() -> None:
    """Three equally similar tiles: two sure of a, one sure of b. b1 would be the most similar hit."""
    query = bags([(A1, 0.8), (A2, 0.7)], [(B1, 0.9), (B2, 0.6)], [(A2, 0.81), (A1, 0.69)])
    vote = entropy_vote(query, np.array([1, 1]))
    assert vote.slide.tolist() == [A2, A1]
    assert vote.score.tolist() == [0.81, 0.8]
    assert vote.bag.tolist() == [2, 0]


def test_unsure_bags_give_their_similar_hits_only() -> None:
    """Both tiles 0.75 on average; tile 0 has H = 0, tile 1 has b second: only .9 of it reaches .75."""
    query = bags([(A1, 0.8), (A1, 0.7)], [(A2, 0.9), (B1, 0.6)])
    vote = entropy_vote(query, np.array([1, 1]))
    assert vote.slide.tolist() == [A1, A2]
    assert vote.score.tolist() == [0.8, 0.9]
    np.testing.assert_allclose(vote.entropy, [0, -(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3))])


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 10_000))
def test_entropy_is_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(-1, 4, (6, 9))
    count = rng.integers(1, 50, 4)
    found, top = bag_entropies(label, count)
    for row, value, best in zip(label, found, top, strict=True):
        mass = [sum(1 / (rank + 1) / count[c] for rank, one in enumerate(row) if one == c) for c in range(4)]
        if sum(mass) == 0:
            assert np.isnan(value)
            assert best == NONE
        else:
            assert value == pytest.approx(scipy_entropy(mass, base=2))
            assert mass[best] == pytest.approx(max(mass))


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(0, 10_000))
def test_the_order_of_a_vote_is_by_entropy_then_similarity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slide = rng.integers(8, size=(7, 6))
    score = -np.sort(-rng.random((7, 6)), axis=1)
    label = np.arange(8) % 3
    vote = entropy_vote(Bags(slide=slide, score=score, label=label[slide]), np.array([3, 3, 2]))
    assert len(set(vote.slide.tolist())) == len(vote.slide)
    keys = list(zip(vote.entropy.tolist(), (-vote.score).tolist(), strict=True))
    assert all(a <= b for a, b in pairwise(keys))
    for one, bag, value in zip(vote.slide, vote.bag, vote.score, strict=True):
        assert value == score[bag][slide[bag] == one].max()


def test_unknown_labels_do_not_vote() -> None:
    query = bags([(A1, 0.85), (NONE, 0.0)], [(A2, 0.9), (A1, 0.8)], label=np.array([0, NONE, 1, 1]))
    vote = entropy_vote(query, np.array([1, 1]))
    assert vote.slide.tolist() == [A2, A1]  # both bags are sure of what they know, and a2 is in one of them
    assert vote.score.tolist() == [0.9, 0.85]
    with pytest.raises(QueryError, match="no hit has a label"):
        entropy_vote(bags([(A1, 0.8), (A2, 0.7)], label=np.full(4, NONE)), np.array([1, 1]))
    with pytest.raises(QueryError, match="counted 0 times"):
        bag_entropies(query.label, np.array([0, 1]))


def test_median_and_mean_are_what_they_say() -> None:
    best = np.array([[0.9, 0.5], [0.1, 0.5], [0.8, 0.5], [0.2, 0.5]])
    np.testing.assert_allclose(median_of_minima(best), [0.5, 0.5])
    np.testing.assert_allclose(1 - median_of_minima(best), np.median(1 - best, axis=0))
    np.testing.assert_allclose(mean_top_k(best, 2), [0.85, 0.5])
    np.testing.assert_allclose(mean_top_k(best, 9), [0.5, 0.5])
    gone = np.array([[0.9, np.nan]])
    assert np.isnan(median_of_minima(gone)).tolist() == [False, True]
    assert np.isnan(mean_top_k(gone)).tolist() == [False, True]


@pytest.mark.parametrize("aggregate", [median_of_minima, mean_top_k])
@settings(deadline=None)  # a busy machine is no failure
@given(seed=st.integers(0, 10_000), places=st.integers(1, 12))
def test_no_slide_scores_above_its_bound(aggregate, seed: int, places: int) -> None:
    """Bags of the nearest tiles of all: the true score of each slide never passes what the bags allow."""
    rng = np.random.default_rng(seed)
    of = rng.integers(6, size=40)
    score = rng.uniform(-1, 1, (8, 40))
    best = np.stack([score[:, of == one].max(axis=1, initial=-1) for one in range(6)], axis=1)
    order = np.argsort(-score, axis=1)[:, :places]
    near = Bags(slide=of[order], score=np.take_along_axis(score, order, 1), label=np.full(order.shape, NONE))
    bounds, unseen = upper_bounds(near, 6, aggregate)
    true = aggregate(best)
    there = np.unique(of)
    assert (true[there] <= bounds[there] + 1e-12).all()
    absent = np.setdiff1d(there, near.slide)
    assert (true[absent] <= unseen + 1e-12).all()
    np.testing.assert_allclose(bounds[absent], unseen)


def test_full_bags_leave_nothing_open() -> None:
    near = bags([(A1, 0.9), (B1, 0.2), (NONE, 0.0)])
    bounds, unseen = upper_bounds(near, 4, median_of_minima)
    assert bounds.tolist() == [0.9, -np.inf, 0.2, -np.inf]
    assert unseen == -np.inf
