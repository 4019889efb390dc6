"""Where a model is wrong: is the label doubtful, or is the case truly hard to tell?

For each error the nearest labelled rows of other patients are looked at, at most one a patient, so that they are
independent witnesses. Neighbours of each class count by the inverse of the class's share among all rows: at 20 %
prevalence three positive neighbours in ten are more than chance. With m of k neighbours in the class that the model
called, and shares q of that class and r of the label's,

    b = (m / q) / (m / q + (k - m) / r)

is 0.5 where neighbours are as everywhere. The rule:

    label doubtful     b >= 0.8 and so many neighbours side with the model that chance gives them with p <= 0.05
    model alone        b <= 0.2 and so many side with the label, likewise: the neighbourhood tells it, the model did not
    truly confusable   anything between: neighbours are mixed

The p is of the binomial distribution with the class's share; it is for one case at a time, so that among many errors
some verdicts come by luck, and the report says how many. None of them proves a label wrong: they say where to look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from eosin.errors import QueryError
from eosin.tasks.review_queue import directions

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Verdict = Literal["label doubtful", "model alone", "truly confusable"]

DOUBTFUL, ALONE, CONFUSABLE = "label doubtful", "model alone", "truly confusable"
VERDICTS: tuple[Verdict, ...] = (DOUBTFUL, ALONE, CONFUSABLE)
K = 30
LEAST = 5
AGREEMENT = 0.8
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """Errors with their neighbours, m of them.

    Attributes:
        rows: (m,) rows that the model got wrong.
        neighbours: (m, k) their nearest labelled rows, one a patient, nearest first.
        similarity: (m, k) cosine of each.
        with_model: (m,) neighbours of the class that the model called.
        balance: (m,) b of the module, 0 to 1; 0.5 is chance.
        p: (m,) chance of so many neighbours on the side they lean to.
        verdict: (m,) text.
        by_luck: verdicts of the first two kinds to expect if neighbours had classes at random.
    """

    rows: Indices
    neighbours: Indices
    similarity: Floats
    with_model: Indices
    balance: Floats
    p: Floats
    verdict: npt.NDArray[np.str_]
    by_luck: float


def judge_errors(x: Array, label: Indices, called: Indices, patient: Array, *, k: int = K) -> Judged:
    """Return the errors of a model with their neighbours and verdicts; see the module.

    Args:
        x: (n, D) features; compared by cosine after centring and scaling.
        label: (n,) class index of the reference.
        called: (n,) class index that the model gave.
        patient: (n,) clusters.
        k: neighbours of each error, one a patient; as many as there are other patients where these are fewer.

    Raises:
        QueryError: shapes that do not fit, or fewer than `LEAST` other patients.
    """
    n = len(x)
    if not (len(label) == len(called) == len(patient) == n):
        raise QueryError(f"{n} features, {len(label)} labels, {len(called)} calls and {len(patient)} patients")
    names, codes = np.unique(patient, return_inverse=True)
    k = min(k, len(names) - 1)
    if k < LEAST:
        raise QueryError(
            f"{len(names)} patients; an error needs at least {LEAST} neighbours, each of another patient: give a "
            "group column that tells patients apart, or more of them"
        )
    unit, rows = directions(x), np.flatnonzero(label != called)
    neighbours, similarity = np.empty((len(rows), k), np.int64), np.empty((len(rows), k))
    for at, row in enumerate(rows):
        near = unit @ unit[row]
        others = np.flatnonzero(codes != codes[row])
        order = others[np.argsort(-near[others], kind="stable")]
        first = np.sort(np.unique(codes[order], return_index=True)[1])[:k]
        neighbours[at], similarity[at] = order[first], near[order[first]]
    share = np.bincount(label, minlength=int(max(label.max(), called.max())) + 1) / n
    model, own = called[rows], label[rows]
    m = (label[neighbours] == model[:, None]).sum(axis=1)
    against = (label[neighbours] == own[:, None]).sum(axis=1)
    lean = m / share[model].clip(1e-12)
    balance = lean / np.maximum(lean + against / share[own], 1e-12)
    p_model = binom.sf(m - 1, k, share[model])
    p_label = binom.sf(against - 1, k, share[own])
    verdict = np.full(len(rows), CONFUSABLE, dtype="<U16")
    verdict[(balance >= AGREEMENT) & (p_model <= ALPHA)] = DOUBTFUL
    verdict[(balance <= 1 - AGREEMENT) & (p_label <= ALPHA)] = ALONE
    return Judged(
        rows=rows,
        neighbours=neighbours,
        similarity=similarity,
        with_model=m,
        balance=balance,
        p=np.where(balance >= 0.5, p_model, p_label),
        verdict=verdict,
        by_luck=_by_luck(share, model, own, k),
    )


def _by_luck(share: Floats, model: Indices, own: Indices, k: int) -> float:
    """Return how many of the first two verdicts to expect where classes of neighbours are drawn by their shares.

    Neighbours of third classes count for neither side: m and the label's count are then trinomial.
    """
    total = 0.0
    m, against = np.meshgrid(np.arange(k + 1), np.arange(k + 1), indexing="ij")
    both, rest = m + against <= k, np.maximum(k - m, 0)
    for q, r in zip(share[model], share[own], strict=True):
        left = np.where(both, binom.pmf(against, rest, min(1.0, r / max(1e-12, 1 - q))), 0.0)
        chance = binom.pmf(m, k, q) * left
        lean = m / max(q, 1e-12)
        balance = lean / np.maximum(lean + against / max(r, 1e-12), 1e-12)
        doubtful = (balance >= AGREEMENT) & (binom.sf(m - 1, k, q) <= ALPHA)
        alone = (balance <= 1 - AGREEMENT) & (binom.sf(against - 1, k, r) <= ALPHA)
        total += float(chance[(doubtful | alone) & both].sum())
    return total
