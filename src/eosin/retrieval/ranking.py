"""From tiles to slides: how the matches of a query's tiles become a ranking of slides.

Two ways to look at the same search. `best` (m, S) holds the highest cosine similarity between each of the query's m
tiles and any tile of each of S slides; a slide's score is then

    median of minima   the median over the query's tiles; as a cosine distance, the median of the minima, by which
                       Yottixel compares mosaics (Kalra et al. 2020)
    mean of top k      the mean of the k highest: what is alike in the two slides, whatever else they hold

`Bags` holds the nearest tiles of each of the query's tiles in the whole index, a bag each. The vote ranked by entropy
asks of which tiles of the query the neighbours agree in their label, and trusts those first; it is the ranking of SISH
(Chen et al. 2022), written anew from its description.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError
from eosin.retrieval.measures import NONE

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TOP = 5
"""Best matches, and leading bags, that the rankings below look at."""
ROUNDING = 1e-6
"""Similarities closer than this are equal: they come from float32 products."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bags:
    """The nearest tiles of each tile of a query, best first: m bags of K places.

    Attributes:
        slide: (m, K) code of the slide of each, `NONE` where fewer than K were found.
        score: (m, K) cosine similarity, descending; what stands beside `NONE` is not read.
        label: (m, K) code of its label, `NONE` where that is not known.
    """

    slide: Codes
    score: Floats
    label: Codes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Vote:
    """Slides in the order of an entropy-ranked vote.

    Attributes:
        slide: (r,) codes, each once.
        bag: (r,) the query's tile that put it there.
        score: (r,) similarity of the match.
        entropy: (r,) of that tile's bag, in bits.
    """

    slide: Codes
    bag: Codes
    score: Floats
    entropy: Floats


def median_of_minima(best: Floats) -> Floats:
    """Return the median similarity (S,) over the query's tiles of `best` (m, S); NaN for a slide without matches."""
    return np.median(best, axis=0)


def mean_top_k(best: Floats, k: int = TOP) -> Floats:
    """Return the mean (S,) of the k highest similarities of `best` (m, S), of all where the query has fewer tiles."""
    m = len(best)
    if m <= k:
        return best.mean(axis=0)
    return np.partition(best, m - k, axis=0)[m - k :].mean(axis=0)


def upper_bounds(bags: Bags, slides: int, aggregate: Callable[[Floats], Floats]) -> tuple[Floats, float]:
    """Return what each slide can score at most, given its tiles in the bags, and what a slide in no bag can.

    A slide that is not in a bag has no tile that is more alike than the bag's last. The aggregate must not fall when a
    similarity rises; both above do not. So the best slides can be named without looking at all of them: a slide whose
    bound is below what others score cannot come before them (the threshold algorithm, Fagin, Lotem & Naor 2003).

    Args:
        bags: of the query.
        slides: number of slides S; codes are 0 to S - 1.
        aggregate: (m, S) -> (S,).

    Returns:
        Bounds (S,); the bound of unseen slides, -inf where every bag holds all there is.
    """
    m, places = bags.slide.shape
    there = bags.slide != NONE
    floor = np.where(there.all(axis=1), bags.score[:, -1], -np.inf)
    best = np.repeat(floor[:, None], slides, axis=1)
    row = np.repeat(np.arange(m), places)[there.ravel()]
    np.maximum.at(best, (row, bags.slide[there]), bags.score[there])
    return aggregate(best), float(aggregate(floor[:, None])[0])


def bag_entropies(label: Codes, count: npt.NDArray[np.number]) -> tuple[Floats, Codes]:
    """Return the entropy of each bag's labels in bits (m,), and the label of greatest mass (m,).

    The mass of label c in a bag is sum 1 / (rank n_c) over its hits of that label, rank from 1, n_c candidates of c, so
    that a frequent label does not win by its number; p_c is its share, and H = -sum p_c log2 p_c (Shannon 1948). A bag
    without a known label has entropy NaN and label `NONE`; of equal masses the lower code wins.

    Args:
        label: (m, K) codes, best hit first; `NONE` counts for no label.
        count: (C,) candidates of each label, each at least 1 for labels that occur.

    Raises:
        QueryError: a label that occurs has no candidates.
    """
    known = label != NONE
    if known.any() and (count[np.unique(label[known])] <= 0).any():
        raise QueryError("a label occurs among the hits and is counted 0 times among the candidates")
    weight = 1.0 / np.arange(1, label.shape[1] + 1)
    mass = np.zeros((len(label), len(count)))
    row = np.repeat(np.arange(len(label)), label.shape[1])[known.ravel()]
    place = np.tile(weight, len(label))[known.ravel()]
    np.add.at(mass, (row, label[known]), place / count[label[known]])
    total = mass.sum(axis=1)
    empty = total == 0
    share = mass / np.where(empty, 1.0, total)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(share > 0, -share * np.log2(share), 0.0)
    return np.where(empty, np.nan, terms.sum(axis=1)), np.where(empty, NONE, mass.argmax(axis=1))


def entropy_vote(bags: Bags, count: npt.NDArray[np.number]) -> Vote:
    """Return slides by how sure the labels around their matches are; ties by similarity.

    1. Bags whose mean similarity of the first five hits lies below the mean of that over bags are dropped, and so are
       bags without a known label.
    2. The five bags of lowest entropy vote, each for its label of greatest mass; of these five, bags that voted
       otherwise than most are dropped. A draw goes to the label of the bag of lowest entropy.
    3. All hits of a bag of entropy 0 count; of other bags, hits at least as similar as the mean of step 1.
    4. Hits are sorted by the entropy of their bag, then by similarity; each slide stands where it comes first.

    Args:
        bags: of the query.
        count: (C,) candidates of each label.

    Raises:
        QueryError: no hit has a known label.
    """
    entropy, top = bag_entropies(bags.label, count)
    known = ~np.isnan(entropy)
    if not known.any():
        raise QueryError(
            "no hit has a label, so there is nothing to vote on; give labels to the index (--cohort, --label), or "
            "choose another aggregator"
        )
    there = bags.slide != NONE
    first = np.where(there, bags.score, 0.0)[:, :TOP].sum(axis=1) / np.maximum(there[:, :TOP].sum(axis=1), 1)
    least = first[known].mean() - ROUNDING
    kept = np.flatnonzero(known & (first >= least))
    kept = kept[np.lexsort((kept, -first[kept], entropy[kept]))]
    leading = kept[:TOP]
    names, where, votes = np.unique(top[leading], return_index=True, return_counts=True)
    winner = names[np.lexsort((where, -votes))[0]]
    kept = np.concatenate([leading[top[leading] == winner], kept[TOP:]])
    sure = entropy[kept] <= ROUNDING
    bag, place = np.nonzero(there[kept] & (sure[:, None] | (bags.score[kept] >= least)))
    bag = kept[bag]
    score, slide = bags.score[bag, place], bags.slide[bag, place]
    order = np.lexsort((slide, -score, entropy[bag]))
    _, earliest = np.unique(slide[order], return_index=True)
    chosen = order[np.sort(earliest)]
    return Vote(slide=slide[chosen], bag=bag[chosen], score=score[chosen], entropy=entropy[bag[chosen]])
