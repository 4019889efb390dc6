"""How good a search is and what it sees: numbers of ranked hits, one a query, and metrics for the bootstrap.

A query has a code (of its label, site or slide) and a row of hits, best first, given by their codes; `NONE` (-1) where
there is no hit. Papers define some of these differently. Here, of one query with R relevant candidates:

    precision@k  share of the first k hits that carry the query's code
    Acc@k        1 if any of the first k hits carries it, else 0
    mMV@k        1 if the majority of the first k hits carries it, else 0; see `majority` for ties and short lists
    mAP@k        1/k sum_{i <= k} rel_i precision@i: divided by k always, so that with R < k it cannot reach 1
    nDCG@k       sum_{i <= k} rel_i / log2(i + 1), over its value with all relevant candidates first
                 (Järvelin & Kekäläinen 2002, gains 0 and 1)
    macro-F1@k   the majority taken as a prediction; mean over labels of F1

Acc, mMV and mAP are those of SISH (Chen et al. 2022) and RetCCL (Wang et al. 2023), where mMV may also be averaged over
labels first: `balanced_vote_metric`. scikit-learn's average precision divides by R instead of k. A query without any
relevant candidate cannot be answered and should be left out, and counted.

A rate of neighbours means nothing without its chance level. That is exact here: `candidates` counts, for each query,
who could have been found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError
from eosin.evaluation.weighted import LinearMetric, confusion_metric, mean_metric, ratio

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NONE = -1


def precision_at(query: Codes, found: Codes, k: int) -> Floats:
    """Return the share (q,) of the first k hits that carry the query's code; NaN for a query without hits.

    A missing hit (fewer than k were found) is in neither part of the share.

    Args:
        query: (q,) code of each query.
        found: (q, K) codes of its hits, best first, K >= k.
        k: how many hits count.

    Raises:
        QueryError: shapes that do not fit, or k outside 1-K.
    """
    first = _first(query, found, k)
    there = (first != NONE).sum(axis=1)
    return ratio((first == query[:, None]).sum(axis=1).astype(np.float64), there.astype(np.float64))


def accuracy_at(query: Codes, found: Codes, k: int) -> Floats:
    """Return 1 for each query (q,) of whose first k hits any carries its code, else 0; arguments as `precision_at`."""
    return (_first(query, found, k) == query[:, None]).any(axis=1).astype(np.float64)


def majority(found: Codes, k: int) -> Codes:
    """Return the code (q,) that most of the first k hits carry; `NONE` where there is no majority.

    Of codes that come equally often, the one whose first hit is better. Where fewer than k were found, the most
    frequent must come at least ceil(k / 2) times, as in SISH; otherwise the query is not answered.
    """
    first = _first(None, found, k)
    there = first != NONE
    times = ((first[:, :, None] == first[:, None, :]) & there[:, :, None] & there[:, None, :]).sum(axis=2)
    best = times.argmax(axis=1)
    rows = np.arange(len(first))
    enough = there.all(axis=1) | (times[rows, best] >= -(-k // 2))
    return np.where(enough, first[rows, best], NONE)


def majority_at(query: Codes, found: Codes, k: int) -> Floats:
    """Return 1 for each query (q,) whose code is the `majority` of its first k hits, else 0."""
    _first(query, found, k)
    return (majority(found, k) == query).astype(np.float64)


def average_precision_at(query: Codes, found: Codes, k: int) -> Floats:
    """Return 1/k sum_{i <= k} rel_i precision@i of each query (q,); arguments as `precision_at`."""
    relevant = _first(query, found, k) == query[:, None]
    precision = relevant.cumsum(axis=1) / np.arange(1, k + 1)
    return (relevant * precision).sum(axis=1) / k


def ndcg_at(query: Codes, found: Codes, k: int, relevant: Codes) -> Floats:
    """Return the normalised discounted cumulative gain of each query (q,); NaN where nothing is relevant.

    Args:
        query: (q,) code of each query.
        found: (q, K) codes of its hits, best first.
        k: how many hits count.
        relevant: (q,) how many candidates carry the query's code, found or not.
    """
    weight = 1 / np.log2(np.arange(2, k + 2))
    gain = (_first(query, found, k) == query[:, None]) @ weight
    ideal = np.concatenate([[0.0], weight.cumsum()])[np.minimum(relevant, k)]
    return ratio(gain, ideal)


def candidates(
    exclude: Sequence[Codes],
    rows: Codes,
    columns: Sequence[Codes] = (),
    wanted: Sequence[Codes] = (),
) -> Codes:
    """Return how many points each query could have found, or how many of these carry given codes.

    A point can be found by a query with which it shares none of the `exclude` columns (row number, slide, patient,
    site ...), counted by inclusion and exclusion.

    Args:
        exclude: columns (n,) of codes.
        rows: (q,) the point that each query is.
        columns: columns (n,) of codes that a counted point must have.
        wanted: the code wanted in each of `columns`, (q,) or (q, K).

    Returns:
        Counts (q,), or (q, K) where `wanted` is so.
    """
    shape = np.broadcast_shapes(rows.shape + (1,), *(np.atleast_1d(one).reshape(len(rows), -1).shape for one in wanted))
    asked = [np.broadcast_to(one.reshape(len(rows), -1), shape) for one in wanted]
    total = np.zeros(shape, np.int64)
    for size in range(len(exclude) + 1):
        for chosen in combinations(exclude, size):
            own = [np.broadcast_to(column[rows, None], shape) for column in chosen]
            total += (-1) ** size * _tally([*chosen, *columns], [*own, *asked], len(exclude[0]))
    flat = all(one.ndim == 1 for one in wanted)
    return total[:, 0] if flat else total


def chance(exclude: Sequence[Codes], rows: Codes, codes: Codes) -> Floats:
    """Return the share (q,) of each query's candidates that carry its code: precision@k of a blind search.

    Args:
        exclude: columns (n,); see `candidates`.
        rows: (q,) the point that each query is.
        codes: (n,) codes of all points.
    """
    some = candidates(exclude, rows, [codes], [codes[rows]])
    return ratio(some.astype(np.float64), candidates(exclude, rows).astype(np.float64))


def chance_among(exclude: Sequence[Codes], rows: Codes, codes: Codes, label: Codes, near: Codes, k: int) -> Floats:
    """Return the share (q,) expected of a search that is blind to `codes` but finds the labels that it found.

    Where labels and sites go together, a search for the label alone meets its own site more often than `chance`. Each
    of the first k hits is replaced by a random candidate of its label; the mean of those that carry the query's code.

    Args:
        exclude: columns (n,); see `candidates`.
        rows: (q,) the point that each query is.
        codes: (n,) codes of all points, such as sites.
        label: (n,) codes of their labels.
        near: (q, K) points found, `NONE` where there is none.
        k: how many hits count.
    """
    first = _first(None, near, k)
    there = first != NONE
    labels = label[np.where(there, first, 0)]
    own = np.broadcast_to(codes[rows, None], labels.shape)
    some = candidates(exclude, rows, [label, codes], [labels, own])
    share = ratio(some.astype(np.float64), candidates(exclude, rows, [label], [labels]).astype(np.float64))
    return ratio(np.where(there, share, 0.0).sum(axis=1), there.sum(axis=1).astype(np.float64))


def blind_search(exclude: Sequence[Codes], rows: Codes, k: int, *, once: Codes | None = None, seed: int = 0) -> Codes:
    """Return k random candidates of each query (q, k), none twice; `NONE` where a query has fewer.

    The chance level of measures that have no closed form.

    Args:
        exclude: columns (n,); see `candidates`.
        rows: (q,) the point that each query is.
        k: hits a query.
        once: (n,) codes of which a query finds each once at most, such as patients.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    n = len(exclude[0])
    found = np.full((len(rows), k), NONE, np.int64)
    for at, row in enumerate(rows.tolist()):
        drawn = rng.choice(n, size=min(n, 4 * k + 16), replace=False)
        good = _usable(exclude, once, drawn, row)
        if len(good) < k:  # much is excluded: look at everyone
            good = _usable(exclude, once, rng.permutation(n), row)
        found[at, : min(k, len(good))] = good[:k]
    return found


def share_metric(share: Floats) -> LinearMetric:
    """Return the mean of shares (q,) as a function of row weights; queries without hits (NaN) do not count."""
    known = ~np.isnan(share)
    terms = np.column_stack([np.where(known, share, 0.0), known])
    return LinearMetric(terms=terms, finish=lambda sums: ratio(sums[:, 0], sums[:, 1]))


def lift_metric(share: Floats, blind: Floats) -> LinearMetric:
    """Return mean(share) / mean(blind) as a function of row weights: how many times as often as by chance.

    Queries where either (q,) is NaN do not count.
    """
    terms = np.column_stack([share, blind])
    terms[np.isnan(terms).any(axis=1)] = 0
    return LinearMetric(terms=terms, finish=lambda sums: ratio(sums[:, 0], sums[:, 1]))


def balanced_vote_metric(query: Codes, found: Codes, k: int) -> LinearMetric:
    """Return mMV@k averaged over labels: of each label, the share of its queries whose majority is right."""
    names, codes = np.unique(query, return_inverse=True)
    right = majority_at(query, found, k)
    terms = np.zeros((len(query), 2 * len(names)))
    terms[np.arange(len(query)), codes] = right
    terms[np.arange(len(query)), len(names) + codes] = 1
    return LinearMetric(terms=terms, finish=lambda s: ratio(s[:, : len(names)], s[:, len(names) :]).mean(axis=1))


def macro_f1_metric(query: Codes, found: Codes, k: int, rows: npt.NDArray[np.bool_] | None = None) -> LinearMetric:
    """Return macro-F1 of the majority of the first k hits as a function of row weights (B, q).

    The mean runs over the labels that occur among the queries. No majority, or a label that none of these queries has,
    counts against the query's own label and as no prediction of another; scikit-learn's `f1_score` with `labels=` those
    of the queries does the same.

    Args:
        query: (q,) labels.
        found: (q, K) labels of the hits.
        k: how many vote.
        rows: (q,) queries that count, such as those of one organ; all when None.
    """
    counted = np.ones(len(query), bool) if rows is None else rows
    names = np.unique(query[counted])
    other = len(names)
    vote = majority(found, k)
    place = np.searchsorted(names, vote).clip(max=other - 1)
    called = np.where(names[place] == vote, place, other)
    true = np.where(counted, np.searchsorted(names, query).clip(max=other - 1), other)
    called = np.where(counted, called, other)  # a row that does not count falls into a cell that nobody reads

    def finish(tables: Floats) -> Floats:
        hit = np.diagonal(tables, axis1=1, axis2=2)[:, :other]
        own, named = tables[:, :other].sum(axis=2), tables[:, :other, :other].sum(axis=1)
        return np.where(own > 0, ratio(2 * hit, own + named), np.nan).mean(axis=1)

    return confusion_metric(true, called, other + 1, finish)


def label_metrics(
    query: Codes, found: Codes, relevant: Codes, *, ks: Sequence[int] = (1, 3, 5)
) -> dict[str, LinearMetric]:
    """Return all measures of labels by name, as functions of row weights.

    Args:
        query: (q,) labels.
        found: (q, K) labels of the hits, K >= max(ks).
        relevant: (q,) candidates of the query's label, each at least 1.
        ks: list lengths; mMV, mAP, nDCG and macro-F1 are of those above 1, nDCG and mAP of the longest only.

    Raises:
        QueryError: a query without a relevant candidate, or shapes that do not fit.
    """
    if (relevant < 1).any():
        raise QueryError(
            f"{int((relevant < 1).sum())} of {len(query)} queries have no candidate of their label: leave them out, "
            "and say how many"
        )
    longest = max(ks)
    metrics = {f"acc@{k}": mean_metric(accuracy_at(query, found, k)) for k in ks}
    for k in (k for k in ks if k > 1):
        metrics[f"mmv@{k}"] = mean_metric(majority_at(query, found, k))
        metrics[f"mmv_balanced@{k}"] = balanced_vote_metric(query, found, k)
    metrics[f"map@{longest}"] = mean_metric(average_precision_at(query, found, longest))
    metrics[f"ndcg@{longest}"] = mean_metric(ndcg_at(query, found, longest, relevant))
    metrics[f"macro_f1@{longest}"] = macro_f1_metric(query, found, longest)
    return metrics


def points(metrics: Mapping[str, LinearMetric], queries: int) -> dict[str, float]:
    """Return the value of each metric with every query once."""
    once = np.ones((1, queries))
    return {name: float(metric(once)[0]) for name, metric in metrics.items()}


def _usable(exclude: Sequence[Codes], once: Codes | None, points: Codes, row: int) -> Codes:
    """Return the points (m,) that share no excluded column with a row, the first of each `once`."""
    good = points[np.all([column[points] != column[row] for column in exclude], axis=0)]
    return good if once is None else good[np.sort(np.unique(once[good], return_index=True)[1])]


def _first(query: Codes | None, found: Codes, k: int) -> Codes:
    """Return the first k hits (q, k).

    Raises:
        QueryError: shapes that do not fit, or k outside 1-K.
    """
    if found.ndim != 2 or (query is not None and query.shape != found.shape[:1]):
        shape = None if query is None else query.shape
        raise QueryError(f"queries {shape} and hits {found.shape} do not fit; needed: (q,) and (q, K)")
    if not 1 <= k <= found.shape[1]:
        raise QueryError(f"k is {k}, but {found.shape[1]} hits a query were kept; search with a larger k")
    return found[:, :k]


def _tally(columns: Sequence[Codes], wanted: Sequence[Codes], n: int) -> Codes:
    """Return how many of n points have the wanted code in every column; `wanted` all of one shape."""
    if not columns:
        return np.full(1, n, np.int64)
    key, ask = np.zeros(n, np.int64), np.zeros(np.shape(wanted[0]), np.int64)
    for column, value in zip(columns, wanted, strict=True):
        size = int(max(column.max(), value.max())) + 1
        key, ask = key * size + column, ask * size + value
    names, counts = np.unique(key, return_counts=True)
    at = np.searchsorted(names, ask).clip(max=len(names) - 1)
    return np.where(names[at] == ask, counts[at], 0)
