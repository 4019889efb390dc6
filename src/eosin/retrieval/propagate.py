"""Labels spread along a nearest-neighbour graph, and only to where the graph leaves no doubt.

Zhou, Bousquet, Lal, Weston & Schölkopf, NIPS 16 (2004) 321, section 2: with W the symmetric graph, D its degrees and
S = D^(-1/2) W D^(-1/2), the sequence F <- alpha S F + (1 - alpha) Y converges to (1 - alpha) (I - alpha S)^(-1) Y.

What is spread is a guess, not a label: `propagate` returns it with a weight below one and never for rows that are to
be tested, and whoever keeps it must keep the tag `PROPAGATED` beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from eosin.errors import QueryError
from eosin.heads.neighbours import nearest

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

PROPAGATED = "propagated"
TOLERANCE = 1e-9  # of F, whose rows sum to at most about one
MAX_STEPS = 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class Propagation:
    """How far labels may spread.

    Attributes:
        k: neighbours of each row in the graph.
        alpha: share of a row's mass that comes from its neighbours, 0 to 1, both excluded.
        margin: least difference between the two largest shares of a row's mass.
        purity: least share of a row's edges, by weight, that lead to rows with the same answer.
        weight: what a spread label counts beside a reviewed one, above 0 and below 1.
    """

    k: int = 15
    alpha: float = 0.9
    margin: float = 0.5
    purity: float = 0.9
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            QueryError: a value that makes no propagation; the message names it.
        """
        if self.k < 1:
            raise QueryError(f"k is {self.k}; a graph needs at least one neighbour a row")
        if not 0 < self.alpha < 1:
            raise QueryError(f"alpha is {self.alpha:g}; it must lie between 0 and 1, both excluded")
        if not (0 <= self.margin <= 1 and 0 <= self.purity <= 1):
            raise QueryError(f"margin {self.margin:g} and purity {self.purity:g} must lie between 0 and 1")
        if not 0 < self.weight < 1:
            raise QueryError(f"the weight of a spread label is {self.weight:g}; it must lie above 0 and below 1")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Spread:
    """Labels that reached other rows, m of them, by row.

    Attributes:
        rows: (m,) places in the graph.
        codes: (m,) class index.
        margin: (m,) difference between the two largest shares of the row's mass.
        purity: (m,) share of the row's edges, by weight, to rows with the same answer.
        weight: what each counts beside a reviewed label.
        reached: rows without a label that any label reached, whatever the margin and purity.
        barred: rows that were sure enough, but are not to be labelled (test rows).
    """

    rows: Indices
    codes: Indices
    margin: Floats
    purity: Floats
    weight: float
    reached: int
    barred: int


def knn_graph(x: Array, *, k: int = 15) -> scipy.sparse.csr_array:
    """Return the symmetric graph (n, n) in which an edge joins rows of which one is among the other's `k` nearest.

    An edge weighs the cosine similarity of its rows; rows at a right angle or beyond are not joined. No row is its own
    neighbour.

    Args:
        x: (n, D) features, any float type; the search is exact and takes n^2 D operations.
        k: neighbours of each row, below n.

    Raises:
        QueryError: k does not fit n.
        NonFiniteError: NaN, infinity or a row of zeros.
    """
    if not 1 <= k < len(x):
        raise QueryError(f"a graph of {k} neighbours a row needs at least {k + 1} rows; there are {len(x)}")
    distance, index = nearest(x, x, k + 1)
    own = index == np.arange(len(x))[:, None]
    own[~own.any(axis=1), -1] = True  # equal rows in front of it: any one may go
    similarity = np.clip(1 - distance[~own].reshape(-1, k), 0, 1)
    start = np.arange(0, len(x) * k + 1, k)
    directed = scipy.sparse.csr_array((similarity.ravel(), index[~own], start), shape=(len(x), len(x)))
    graph = scipy.sparse.csr_array(directed.maximum(directed.T))
    graph.eliminate_zeros()
    return graph


def spread_mass(graph: scipy.sparse.csr_array, codes: npt.ArrayLike, n_classes: int, *, alpha: float = 0.9) -> Floats:
    """Return the mass F (n, C) of every class at every row; a row that no label reaches holds zeros.

    Args:
        graph: symmetric weights (n, n), none negative, without a diagonal.
        codes: (n,) class index of labelled rows, -1 for the others.
        n_classes: C.
        alpha: share of a row's mass that comes from its neighbours.

    Raises:
        QueryError: shapes or codes that do not fit, or a graph that is not symmetric.
        ArithmeticError: no convergence, which cannot be for alpha below one and a symmetric graph.
    """
    labels = np.asarray(codes, np.int64)
    if graph.shape != (len(labels), len(labels)):
        raise QueryError(f"a graph of shape {graph.shape} and {len(labels)} labels do not fit")
    if labels.size and not -1 <= labels.min() <= labels.max() < n_classes:
        raise QueryError(f"class indices run from {labels.min()} to {labels.max()}; needed -1 to {n_classes - 1}")
    if abs(graph - graph.T).max() > 1e-12:
        raise QueryError("the graph is not symmetric; make it with knn_graph")
    degree = np.asarray(graph.sum(axis=1)).ravel()
    root = scipy.sparse.diags_array(1 / np.sqrt(np.where(degree > 0, degree, 1.0)))
    smooth = scipy.sparse.csr_array(root @ graph @ root)
    source = np.zeros((len(labels), n_classes))
    known = np.flatnonzero(labels >= 0)
    source[known, labels[known]] = 1 - alpha
    mass = source
    for _ in range(MAX_STEPS):
        following = alpha * (smooth @ mass) + source
        change = np.abs(following - mass).max(initial=0.0)
        mass = following
        if change <= TOLERANCE * (1 - alpha):
            return mass
    raise ArithmeticError(f"labels still move after {MAX_STEPS} steps with alpha {alpha:g}; lower it")


def propagate(
    graph: scipy.sparse.csr_array,
    codes: npt.ArrayLike,
    n_classes: int,
    *,
    allowed: npt.ArrayLike,
    how: Propagation | None = None,
) -> Spread:
    """Return the labels that spread to rows without one, where margin and purity are high.

    Args:
        graph: of `knn_graph`.
        codes: (n,) class index of labelled rows, -1 for the others.
        n_classes: C, at least 2.
        allowed: (n,) False for rows that must not get a label, those of the test split above all. They stay in the
            graph, as places that mass flows through; leave them out of it to be stricter still.
        how: thresholds.

    Raises:
        QueryError: shapes or codes that do not fit, fewer than two classes, or a label on a row that is not allowed:
            such a label would reach the training rows around it.
    """
    how = how or Propagation()
    labels, free = np.asarray(codes, np.int64), np.asarray(allowed, np.bool_)
    if free.shape != labels.shape:
        raise QueryError(f"{len(free)} marks of allowed rows and {len(labels)} labels do not fit")
    if n_classes < 2:
        raise QueryError(f"{n_classes} class: labels spread against each other, so two are needed")
    if (labels[~free] >= 0).any():
        raise QueryError("a row that is not allowed to be labelled (test split?) holds a label; take it out first")
    mass = spread_mass(graph, labels, n_classes, alpha=how.alpha)
    total = mass.sum(axis=1)
    reached = (total > 0) & (labels < 0)
    share = mass / np.where(total > 0, total, 1.0)[:, None]
    ordered = np.sort(share, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    answer = np.where(total > 0, mass.argmax(axis=1), -1)
    purity = _purity(graph, answer)
    sure = reached & (margin >= how.margin) & (purity >= how.purity)
    rows = np.flatnonzero(sure & free)
    return Spread(
        rows=rows,
        codes=answer[rows],
        margin=margin[rows],
        purity=purity[rows],
        weight=how.weight,
        reached=int(reached.sum()),
        barred=int((sure & ~free).sum()),
    )


def _purity(graph: scipy.sparse.csr_array, answer: Indices) -> Floats:
    """Return the share (n,) of each row's edges, by weight, that lead to rows with its answer; 0 without edges."""
    edges = graph.tocoo()
    left, right = edges.coords
    same = (answer[left] == answer[right]) & (answer[left] >= 0)
    agreeing = np.bincount(left, weights=edges.data * same, minlength=len(answer))
    all_ = np.bincount(left, weights=edges.data, minlength=len(answer))
    return agreeing / np.where(all_ > 0, all_, 1.0)
