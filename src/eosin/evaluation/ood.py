"""Out of distribution: how strange is a sample to what the model was trained on?

Every score is higher for stranger samples. `ood_auroc` says how well it tells a strange set from a familiar one; it
does not say where to draw the line.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.special import logsumexp
from sklearn.covariance import ledoit_wolf

from eosin.errors import NonFiniteError, PredictionsError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.inputs import check_labels, check_same_rows
from eosin.evaluation.interval import Interval
from eosin.evaluation.weighted import auroc_metric

BLOCK = 1024

Scores = npt.NDArray[np.float64]


def knn_distance(train: npt.NDArray[np.floating], test: npt.NDArray[np.floating], *, k: int = 10) -> Scores:
    """Return the distance (m,) of each test sample to its k-th nearest training sample, both at unit length.

    Sun et al., "Out-of-distribution detection with deep nearest neighbors", ICML 2022, section 3: Euclidean distance,
    so 0 (same direction) to 2 (opposite).

    Args:
        train: (n, D) familiar features.
        test: (m, D).
        k: which neighbour, 1 = the nearest; larger is steadier.

    Raises:
        PredictionsError: shapes that do not fit, or fewer than k training samples.
        NonFiniteError: NaN or infinity.
    """
    x, z = _features(train, test)
    if not 1 <= k <= len(x):
        raise PredictionsError(f"k is {k} and there are {len(x)} training samples; needed 1 to {len(x)}")
    x, z = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (x, z))
    squared = np.empty(len(z))
    for start in range(0, len(z), BLOCK):
        similarity = z[start : start + BLOCK] @ x.T
        squared[start : start + BLOCK] = 2 - 2 * -np.partition(-similarity, k - 1, axis=1)[:, k - 1]
    return np.sqrt(np.maximum(squared, 0))


def mahalanobis(
    train: npt.NDArray[np.floating], labels: npt.ArrayLike | None, test: npt.NDArray[np.floating]
) -> Scores:
    """Return the squared Mahalanobis distance (m,) of each test sample to the nearest class of the training set.

    min over classes c of (x - mean_c)' S^-1 (x - mean_c), with one covariance S of the deviations from their class
    means (Lee et al., NeurIPS 2018, eq. 1-2), shrunk towards a multiple of the identity (Ledoit & Wolf 2004), so that
    fewer samples than dimensions do.

    Args:
        train: (n, D) familiar features.
        labels: (n,) class indices; None = one class.
        test: (m, D).

    Raises:
        PredictionsError: shapes that do not fit, or no spread within classes.
        NonFiniteError: NaN or infinity.
    """
    x, z = _features(train, test)
    codes = np.zeros(len(x), dtype=np.int64) if labels is None else check_labels(labels)
    check_same_rows("train", len(x), len(codes))
    classes, codes = np.unique(codes, return_inverse=True)
    means = np.stack([x[codes == c].mean(axis=0) for c in range(len(classes))])
    within = x - means[codes]
    if not within.any():
        raise PredictionsError(
            f"{len(x)} training samples do not differ within their {len(classes)} classes: no spread"
        )
    factor = cho_factor(ledoit_wolf(within, assume_centered=True)[0])
    apart = [z - mean for mean in means]
    return np.min([np.einsum("md,dm->m", d, cho_solve(factor, d.T)) for d in apart], axis=0)


def energy(logits: npt.NDArray[np.floating], *, temperature: float = 1.0) -> Scores:
    """Return the free energy (m,) of logits (m, C): -T log sum exp(logits / T) (Liu et al., NeurIPS 2020, eq. 4).

    Args:
        logits: (m, C) before the softmax; of one logit a row (binary), hand over (0, logit).
        temperature: T.

    Raises:
        PredictionsError: not (m, C) with C >= 2, or a temperature that is not positive.
        NonFiniteError: NaN or infinity.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise PredictionsError(f"logits have shape {values.shape}; needed (m, C) with C >= 2")
    if not temperature > 0:
        raise PredictionsError(f"temperature is {temperature:g}; needed a positive number")
    _finite(values, "logits")
    return -temperature * logsumexp(values / temperature, axis=1)


def ood_auroc(
    familiar: npt.ArrayLike,
    strange: npt.ArrayLike,
    *,
    familiar_cluster: npt.ArrayLike | None = None,
    strange_cluster: npt.ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the chance that a strange sample scores higher than a familiar one, with its interval.

    Args:
        familiar: (n,) scores of held-out samples like the training set, never of the training set itself.
        strange: (m,) scores of the other set.
        familiar_cluster: (n,) patient ids; samples when None.
        strange_cluster: (m,) patient ids; a patient in both sets is resampled once for each.
        resamples: of the bootstrap, within each set.
        seed: of the bootstrap.

    Raises:
        PredictionsError: an empty set, or clusters that do not fit.
        NonFiniteError: NaN or infinity.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (familiar, strange)]
    units: list[tuple[str, object]] = []
    for name, side, cluster in zip(("familiar", "strange"), sides, (familiar_cluster, strange_cluster), strict=True):
        if side.ndim != 1 or not side.size:
            raise PredictionsError(f"scores of the {name} set have shape {side.shape}; needed (n,) with n > 0")
        _finite(side, name)
        ids = list(range(side.size)) if cluster is None else list(np.asarray(cluster))
        check_same_rows(f"{name}_cluster", len(ids), side.size)
        units += [(name, one) for one in ids]
    codes = {unit: code for code, unit in enumerate(dict.fromkeys(units))}
    y = np.repeat([0, 1], [side.size for side in sides])
    cluster = np.array([codes[unit] for unit in units])
    return bootstrap(auroc_metric(y, np.concatenate(sides)), cluster, y=y, resamples=resamples, seed=seed)


def _features(
    train: npt.NDArray[np.floating], test: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, z = np.asarray(train, dtype=np.float64), np.asarray(test, dtype=np.float64)
    if x.ndim != 2 or z.ndim != 2 or x.shape[1] != z.shape[1] or not len(x):
        raise PredictionsError(f"features have shapes {x.shape} and {z.shape}; needed (n, D) and (m, D)")
    _finite(x, "train")
    _finite(z, "test")
    return x, z


def _finite(values: npt.NDArray[np.float64], name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    if bad.size:
        raise NonFiniteError(f"{bad.size} of {len(values)} rows of {name} hold NaN or infinity (first: row {bad[0]})")
