"""Which cells an epoch shows, in which order: a function of the seed and the epoch alone, so that a resume is exact.

"shuffle" shows every cell once. "class" shows both classes equally often, "domain-class" every pair of domain and class
that occurs; the number of cells shown stays that of the table. A small group's cells are shown several times, each as
often as the next or once more; of a large group a different share each epoch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from eosin.errors import CohortError, ConfigError

Sampling = Literal["shuffle", "class", "domain-class"]
Rows = npt.NDArray[np.int64]


def epoch_rows(groups: npt.ArrayLike, *, seed: int, epoch: int) -> Rows:
    """Return the rows of one epoch, (n,), each group shown n / G times (to one cell), in random order.

    Args:
        groups: (n,) whole numbers from 0, of `sampling_groups`.
        seed: of the run.
        epoch: from 0.
    """
    codes = np.asarray(groups, dtype=np.int64)
    rng = np.random.default_rng((seed, epoch))
    n, count = len(codes), int(codes.max()) + 1
    # The groups that are shown once more than the others change with the epoch.
    shown = np.full(count, n // count) + (rng.permutation(count) < n % count)
    parts = [_draw(np.flatnonzero(codes == group), int(shown[group]), rng) for group in range(count)]
    return rng.permutation(np.concatenate(parts))


def _draw(rows: Rows, size: int, rng: np.random.Generator) -> Rows:
    """Return `size` of `rows`, every one as often as the next or once more."""
    times, rest = divmod(size, len(rows))
    return np.concatenate([np.tile(rows, times), rng.permutation(rows)[:rest]])


def sampling_groups(label: npt.ArrayLike, domain: npt.ArrayLike, *, sampling: Sampling) -> Rows:
    """Return the group of each training row that `epoch_rows` balances, (n,) whole numbers from 0 without a gap.

    Args:
        label: (n,) 0 or 1.
        domain: (n,) names.
        sampling: what is balanced.

    Raises:
        ConfigError: an unknown sampling.
        CohortError: no rows, or columns of different lengths.
    """
    labels, domains = np.asarray(label), np.asarray(domain, dtype=np.str_)
    if labels.ndim != 1 or labels.shape != domains.shape or not len(labels):
        raise CohortError(f"sampling needs one label and one domain a row, found {labels.shape} and {domains.shape}")
    if sampling == "shuffle":
        return np.zeros(len(labels), dtype=np.int64)
    if sampling == "class":
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)
    if sampling == "domain-class":
        both = np.char.add(np.char.add(domains, "|"), labels.astype(np.str_))
        return np.unique(both, return_inverse=True)[1].astype(np.int64)
    raise ConfigError(f"no sampling is called {sampling!r}; choose shuffle, class or domain-class")


def balanced_weights(weights: npt.ArrayLike, groups: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return row weights (n,) scaled to a mean of 1 over what the sampler shows.

    Weights have a mean of 1 over the table; balanced sampling shows other shares, and would so change the size of the
    loss and with it what the learning rate means.

    Args:
        weights: (n,) of each row.
        groups: (n,) of `sampling_groups`.
    """
    rows, codes = np.asarray(weights, dtype=np.float64), np.asarray(groups, dtype=np.int64)
    size = np.bincount(codes)
    shown = 1 / (len(size) * size[codes])  # the share of an epoch that each row is
    return rows / float((rows * shown).sum())
