"""Column sums over resampled patients: whole curves bootstrapped in one matrix product."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eosin.evaluation.bootstrap import cluster_weights
from eosin.evaluation.inputs import check_clusters, check_labels

Floats = npt.NDArray[np.float64]


def resampled_sums(
    columns: Floats, cluster: npt.ArrayLike | None, *, y: npt.ArrayLike, resamples: int, seed: int
) -> tuple[Floats, int]:
    """Return the column sums (resamples, K) over resampled clusters, and the number of clusters.

    The resamples are those of `bootstrap` with the same cluster, y and seed.

    Args:
        columns: (n, K) what is summed.
        cluster: (n,) patient of each row; None: each row is its own.
        y: (n,) class indices that stratify the clusters.
        resamples: how many.
        seed: of the draws.
    """
    n = len(columns)
    codes = np.arange(n) if cluster is None else check_clusters(cluster, n)
    clusters = int(codes.max()) + 1
    stratum = np.zeros(clusters, dtype=np.int64)
    np.maximum.at(stratum, codes, check_labels(y))
    sums = np.column_stack([np.bincount(codes, column, minlength=clusters) for column in columns.T])
    chunks = cluster_weights(np.arange(clusters), strata=stratum, resamples=resamples, seed=seed)
    return np.vstack([chunk.astype(np.float64) @ sums for chunk in chunks]), clusters
