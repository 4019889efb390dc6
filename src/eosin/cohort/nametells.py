"""Whether a label can be read off a file name: character n-grams, tested on patients not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from eosin.cohort.splits import grouped_kfold
from eosin.errors import LabelError

_FOLDS = 3
_SHUFFLES = 19
_MATTERS = 0.6
_MOST_ROWS = 1200
_MOST_CLASSES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class NameTell:
    """How well a target is told from names.

    Attributes:
        auroc: out-of-fold, one class against the rest, mean over classes.
        low, high: the least and the greatest of the same figure with shuffled targets.
        shuffles: how many shuffles.
        n: rows used.
    """

    auroc: float
    low: float
    high: float
    shuffles: int
    n: int

    @property
    def tells(self) -> bool:
        """Whether the names tell more than every one of the 19 shuffles did (p <= 0.05)."""
        return self.auroc > self.high


def name_tell(
    names: Sequence[str], target: npt.NDArray[np.str_], groups: npt.NDArray[np.str_], *, seed: int = 0
) -> NameTell | None:
    """Return how well `target` (n,) is told from `names` (n,) by logistic regression on 1- to 4-grams.

    Folds keep groups (n,) whole. The null lays the targets over the rows with the groups in
    another order, so that runs of one target within a group stay runs: with few large groups the
    null is as wide as it should be. At most 1,200 rows (whole groups, at random) and the eight most
    frequent classes are used. None when there are too few groups to test, or the AUROC is at most 0.6.
    """
    rng = np.random.default_rng(seed)
    keep = _some_groups(groups, rng)
    keep &= np.isin(target, _frequent(target[keep], groups[keep]))
    text, y = [name for name, use in zip(names, keep, strict=True) if use], target[keep]
    if len(np.unique(y)) < 2:
        return None
    codes, group = np.unique(y, return_inverse=True)[1], np.unique(groups[keep], return_inverse=True)[1]
    grams = csr_matrix(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=2, sublinear_tf=True).fit_transform(text)
    )
    try:
        auroc = _out_of_fold(grams, codes, group, seed)
    except LabelError:  # a class in fewer groups than folds: nothing can be said
        return None
    if auroc <= _MATTERS:
        return None
    null = []
    for at in range(_SHUFFLES):
        try:
            null.append(_out_of_fold(grams, _shuffled(codes, group, rng), group, seed + at))
        except LabelError:  # this shuffle put a class into too few groups
            continue
    if not null:
        return None
    return NameTell(auroc=auroc, low=min(null), high=max(null), shuffles=len(null), n=len(text))


def _frequent(target: npt.NDArray[np.str_], groups: npt.NDArray[np.str_]) -> list[str]:
    """Return the `_MOST_CLASSES` values that lie in most groups, each in at least one group a fold."""
    spread = {name: len(np.unique(groups[target == name])) for name in np.unique(target).tolist()}
    return sorted((name for name in spread if spread[name] >= _FOLDS), key=lambda name: -spread[name])[:_MOST_CLASSES]


def _some_groups(groups: npt.NDArray[np.str_], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return a mask of whole groups, at random, of at most `_MOST_ROWS` rows (or of the first group)."""
    code, size = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    order = rng.permutation(len(size))
    chosen = order[np.cumsum(size[order]) <= _MOST_ROWS]
    return np.isin(code, chosen if len(chosen) else order[:1])


def _shuffled(
    y: npt.NDArray[np.int64], group: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return the targets in one random order of groups laid over the rows in another."""
    groups = int(group.max()) + 1
    out = np.empty_like(y)
    to = np.argsort(rng.permutation(groups)[group], kind="stable")
    out[to] = y[np.argsort(rng.permutation(groups)[group], kind="stable")]
    return out


def _out_of_fold(grams: csr_matrix, y: npt.NDArray[np.int64], group: npt.NDArray[np.int64], seed: int) -> float:
    """Return the macro one-against-rest AUROC, each fold scored by models that have not seen its groups."""
    classes = int(y.max()) + 1
    scores = []
    for split in grouped_kfold(y, groups=group, folds=_FOLDS, seed=seed):
        for code in range(1, classes) if classes == 2 else range(classes):
            truth = (y == code).astype(np.int64)
            model = LogisticRegression(C=10.0, solver="liblinear").fit(grams[split.train], truth[split.train])
            scores.append(_auroc(truth[split.test], model.decision_function(grams[split.test])))
    return float(np.mean(scores))


def _auroc(truth: npt.NDArray[np.int64], score: npt.NDArray[np.float64]) -> float:
    """Return the Mann-Whitney AUROC from midranks: both classes are present, ties count half."""
    ones = int(truth.sum())
    ranks = float(rankdata(score)[truth == 1].sum())
    return (ranks - ones * (ones + 1) / 2) / (ones * (len(truth) - ones))
