"""How much each training row counts, by its domain: the w_d of a domain-weighted loss.

The winner of MIDOG 2025 task 2 (Balezo et al., arXiv 2508.21041) weights its focal loss by domain; the weights it used
could not be read. The four kinds here are ours, and so is the limit on what one row may weigh:

    inverse            w_d = N / (D n_d)                  each domain counts the same
    sqrt-inverse       w_d ~ n_d^-1/2                     half way, on a logarithmic scale
    effective-number   w_d ~ (1 - b) / (1 - b^n_d)        Cui et al., CVPR 2019, equation 2, over domains
    domain-class       w_dy = N / (G n_dy)                each of the G pairs (domain, class) that occur counts the same

scaled so that the mean over the training rows is 1, which leaves the size of the loss, and so the learning rate, alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from eosin.errors import CohortError, ConfigError, closest

WeightKind = Literal["none", "inverse", "sqrt-inverse", "effective-number", "domain-class"]

MAX_WEIGHT = 50.0
"""No row weighs more than this many mean rows: a domain of one cell must not steer the training by itself."""

BETA = 0.999
"""Of effective-number: from about 1 / (1 - BETA) cells on, more cells of a domain hardly count as more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWeight:
    """What a row of one domain, or of one class of one domain, weighs.

    Attributes:
        domain: name.
        label: the class, or None where all classes of the domain weigh the same.
        cells: training rows of this group.
        weight: of each of them.
        note: what is unusual about the group, or "".
    """

    domain: str
    label: int | None
    cells: int
    weight: float
    note: str


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class DomainWeights:
    """Weights of the training rows, and the table they come from.

    Attributes:
        kind: of weight.
        rows: float64 (n,), mean 1.
        groups: a line for each group, by domain and class.
    """

    kind: WeightKind
    rows: npt.NDArray[np.float64]
    groups: tuple[GroupWeight, ...]


def domain_weights(
    domain: npt.ArrayLike, label: npt.ArrayLike, *, kind: WeightKind = "inverse", beta: float = BETA
) -> DomainWeights:
    """Return what each training row weighs.

    Args:
        domain: (n,) names; "" is a domain too.
        label: (n,) whole numbers.
        kind: how weight follows from the number of rows.
        beta: of effective-number, above 0 and below 1.

    Raises:
        ConfigError: an unknown kind, or beta out of range.
        CohortError: no rows, or columns of different lengths.
    """
    domains, labels = np.asarray(domain, dtype=np.str_), np.asarray(label)
    if kind not in get_args(WeightKind):
        raise ConfigError(f"no domain weight is called {kind!r}; the closest are {closest(kind, get_args(WeightKind))}")
    if not 0 < beta < 1:
        raise ConfigError(f"beta is {beta}; it must be above 0 and below 1")
    if domains.ndim != 1 or domains.shape != labels.shape or not len(domains):
        raise CohortError(f"domain weights need one domain and one label a row, found {domains.shape}, {labels.shape}")
    names, where = np.unique(domains, return_inverse=True)
    classes, which = np.unique(labels, return_inverse=True)
    by_class = kind == "domain-class"
    keys, group, cells = np.unique(
        where * len(classes) + which if by_class else where, return_inverse=True, return_counts=True
    )
    weight = limit_weights(_raw(cells, kind, beta), cells)
    table = []
    for at, key in enumerate(keys.tolist()):
        name = str(names[key // len(classes) if by_class else key])
        own = labels[domains == name]
        table.append(
            GroupWeight(
                domain=name,
                label=int(classes[key % len(classes)]) if by_class else None,
                cells=int(cells[at]),
                weight=float(weight[at]),
                note=_note(own, classes, limited=bool(weight[at] >= MAX_WEIGHT)),
            )
        )
    return DomainWeights(kind=kind, rows=weight[group], groups=tuple(table))


def limit_weights(raw: npt.NDArray[np.float64], cells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return min(c raw, MAX_WEIGHT) with the c for which the mean over the rows is 1.

    Args:
        raw: (G,) positive, weight of a row of each group up to a factor.
        cells: (G,) rows of each group.
    """
    total = cells.sum()
    order = np.argsort(-raw, kind="stable")
    taken = 0  # rows of the groups that are at the limit
    for at in range(len(order)):
        rest = order[at:]
        factor = (total - MAX_WEIGHT * taken) / (raw[rest] * cells[rest]).sum()
        if factor * raw[order[at]] <= MAX_WEIGHT:
            return np.minimum(factor * raw, MAX_WEIGHT)
        taken += cells[order[at]]
    raise AssertionError("MAX_WEIGHT is above 1, so that not every group can be at the limit")


def _raw(cells: npt.NDArray[np.int64], kind: WeightKind, beta: float) -> npt.NDArray[np.float64]:
    """Return weights (G,) of groups of `cells` rows, up to a factor."""
    if kind == "none":
        return np.ones(len(cells))
    if kind == "sqrt-inverse":
        return 1.0 / np.sqrt(cells.astype(np.float64))
    if kind == "effective-number":
        rate = np.log(beta)
        return np.expm1(rate) / np.expm1(cells * rate)
    return 1.0 / cells


def _note(labels: npt.NDArray, classes: npt.NDArray, *, limited: bool) -> str:
    """Return what is unusual about a domain whose training rows have `labels`, of all `classes`."""
    said = []
    if len(labels) == 1:
        said.append("one cell")
    elif len(np.unique(labels)) == 1 and len(classes) > 1:
        said.append(f"only class {labels[0]}")
    if limited:
        said.append(f"limited to {MAX_WEIGHT:g} times the mean")
    return "; ".join(said)
