"""What a probe measures of one encoder, each as plain values with intervals.

Within: patients are folded, several layouts; a number is the mean over layouts, its interval resamples patients with
the fitted models as they are. Across: each site is tested by a head that saw the other sites only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.cohort.splits import Split
from eosin.errors import CohortError
from eosin.evaluation.bootstrap import ClusterMetric, bootstrap, paired_difference
from eosin.evaluation.metrics import METRICS, choose_threshold
from eosin.evaluation.report import plain
from eosin.evaluation.robustness import encoder_robustness
from eosin.evaluation.subgroups import pooled_and_domains, records
from eosin.evaluation.weighted import MeanMetric
from eosin.heads.curves import FRACTIONS, label_efficiency
from eosin.tasks.probe_model import Fitted, fit_head, fit_nested, inner_splits

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Texts = npt.NDArray[np.str_]
Values = dict[str, Any]

SHOWN = ("auroc", "ba", "sensitivity", "specificity")
CURVE_SEEDS = 5
SWEEP_ITERATIONS = 5


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Task:
    """Rows with their labels: what stays the same from encoder to encoder.

    Attributes:
        y: (n,) 0 or 1.
        group: (n,) patients, the unit that is resampled.
        site: (n,) or None; "" where it is not recorded.
        layouts: complete rounds of folds; every row is tested once in each.
        head: name of the head.
        resamples: of the bootstrap.
        level: of confidence.
        seed: of every random draw.
    """

    y: npt.NDArray[np.int64]
    group: Texts
    site: Texts | None
    layouts: tuple[tuple[Split, ...], ...]
    head: str
    resamples: int
    level: float
    seed: int


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class OutOfFold:
    """Predictions for rows by heads that saw none of their patients, R layouts.

    Attributes:
        y: (R, n) the labels that were to be predicted.
        p: (R, n) P(positive).
        calls: (R, n) 1 where p reaches the threshold of the row's fold, chosen inside that fold's training rows.
        fold: (R, n) fold that tested the row, from 1.
        thresholds: of every fold of every layout.
    """

    y: npt.NDArray[np.int64]
    p: Floats
    calls: Floats
    fold: npt.NDArray[np.int64]
    thresholds: tuple[float, ...]


def out_of_fold(x: Array, task: Task, *, labels: Sequence[Array] | None = None) -> OutOfFold:
    """Return out-of-fold predictions of every layout.

    Args:
        x: (n, D) features.
        task: the rows.
        labels: (n,) labels for each layout, None for the true ones.

    Raises:
        LabelError: a training part has a class in one patient only.
    """
    rounds, n = len(task.layouts), len(task.y)
    y = np.array([task.y] * rounds if labels is None else labels)
    p, calls, fold = np.full((rounds, n), np.nan), np.zeros((rounds, n)), np.zeros((rounds, n), np.int64)
    thresholds = []
    for r, layout in enumerate(task.layouts):
        for number, split in enumerate(layout, start=1):
            rows, test = np.sort(np.concatenate([split.train, split.val])), split.test
            found = fit_nested(task.head, x[rows], y[r][rows], task.group[rows], seed=task.seed)
            p[r, test] = found.head.predict_proba(x[test])[:, 1]
            calls[r, test] = p[r, test] >= found.threshold
            fold[r, test] = number
            thresholds.append(found.threshold)
    return OutOfFold(y=y, p=p, calls=calls, fold=fold, thresholds=tuple(thresholds))


def averaged(name: str, found: OutOfFold) -> MeanMetric:
    """Return a metric as the mean over layouts, as a function of row weights."""
    made = [
        METRICS[name](y, p if name == "auroc" else calls, 0.5)
        for y, p, calls in zip(found.y, found.p, found.calls, strict=True)
    ]
    return MeanMetric(parts=tuple(metric for metric in made if isinstance(metric, ClusterMetric)))


def within(found: OutOfFold, task: Task) -> Values:
    """Return each metric over all rows, with its interval and its value in each layout."""
    metrics = {name: averaged(name, found) for name in SHOWN}
    same = bool((found.y == task.y).all())
    intervals = bootstrap(
        metrics,
        task.group,
        y=task.y if same else None,
        resamples=task.resamples,
        level=task.level,
        seed=task.seed,
    )
    once = np.ones((1, len(task.y)))
    seeds = {name: [float(part(once)[0]) for part in metric.parts] for name, metric in metrics.items()}
    return plain({name: {**interval.to_dict(), "layouts": seeds[name]} for name, interval in intervals.items()})


def fixed_rows(y: Array, p: Floats, calls: Floats, group: Texts, task: Task) -> Values:
    """Return each metric of one set of predictions with its interval."""
    metrics = {name: METRICS[name](y, p if name == "auroc" else calls, 0.5) for name in SHOWN}
    return plain(
        bootstrap(metrics, group, y=y, resamples=task.resamples, level=task.level, seed=task.seed),
    )


def difference(a: OutOfFold, b: OutOfFold, name: str, task: Task) -> Values:
    """Return metric(a) - metric(b), means over the layouts, on the same resampled patients."""
    return plain(
        paired_difference(
            averaged(name, a),
            averaged(name, b),
            task.group,
            y=task.y,
            resamples=task.resamples,
            level=task.level,
            seed=task.seed,
        )
    )


def by_site(y: Array, p: Floats, calls: Floats, site: Texts, task: Task) -> Values:
    """Return each metric per site, and its mean and worst over sites; `task.group` must be that of the rows."""
    options = {"resamples": task.resamples, "confidence": task.level, "seed": task.seed}
    ranked = pooled_and_domains(y, p, site, task.group, metrics=("auroc",), **options)
    called = pooled_and_domains(y, calls, site, task.group, metrics=SHOWN[1:], **options)
    table = pd.concat([ranked, called], ignore_index=True)
    rows: dict[str, Values] = {}
    for row in records(pd.DataFrame(table[table["scope"] == "domain"])):
        facts = {key: row[key] for key in ("level", "n", "positives", "clusters", "flag")}
        mine = rows.setdefault(str(row["level"]), {**facts, "metrics": {}})
        mine["metrics"][row["metric"]] = {key: row[key] for key in ("point", "low", "high")}
    scopes = {
        scope: {
            row["metric"]: {key: row[key] for key in ("level", "n", "point", "low", "high")}
            for row in records(pd.DataFrame(table[table["scope"] == scope]))
        }
        for scope in ("domain_mean", "worst_domain")
    }
    return plain({"rows": list(rows.values()), **scopes})


def some_rows(task: Task, rows: Array) -> Task:
    """Return the task of some rows, without its layouts."""
    return Task(
        y=task.y[rows],
        group=task.group[rows],
        site=None if task.site is None else task.site[rows],
        layouts=(),
        head=task.head,
        resamples=task.resamples,
        level=task.level,
        seed=task.seed,
    )


def across_sites(x: Array, task: Task, splits: Sequence[Split]) -> Values:
    """Return how well each site is served by a head that saw only the others.

    Args:
        x: (n, D).
        task: n rows, each with a site.
        splits: one a site, named by it.
    """
    assert task.site is not None
    p, calls = np.full(len(task.y), np.nan), np.zeros(len(task.y))
    for split in splits:
        rows = split.train
        found = fit_nested(task.head, x[rows], task.y[rows], task.group[rows], seed=task.seed)
        p[split.test] = found.head.predict_proba(x[split.test])[:, 1]
        calls[split.test] = p[split.test] >= found.threshold
    return by_site(task.y, p, calls, task.site, task)


def site_leakage(x: Array, task: Task, splits: Sequence[Split]) -> Values:
    """Return how well the same head tells the site, on patients it has not seen: what features carry of it.

    Raises:
        LabelError: a site in one patient only.
    """
    assert task.site is not None
    names, codes = np.unique(task.site, return_inverse=True)
    p = np.full((len(codes), len(names)), np.nan)
    for split in splits:
        rows = split.train
        pairs = inner_splits(codes[rows], task.group[rows], seed=task.seed)
        p[split.test] = fit_head(task.head, x[rows], codes[rows], pairs, seed=task.seed).predict_proba(x[split.test])
    p /= p.sum(axis=1, keepdims=True)
    binary = len(names) == 2
    scores = p[:, 1] if binary else p
    metrics = {name: METRICS[name](codes, scores, 0.5) for name in ("accuracy", "ba", "auroc")}
    found = bootstrap(metrics, task.group, y=codes, resamples=task.resamples, level=task.level, seed=task.seed)
    share = np.bincount(codes).max() / len(codes)
    return plain({"sites": names, "chance_ba": 1 / len(names), "largest_share": share, **found})


def shuffled_labels(y: Array, group: Texts, *, seed: int) -> Array:
    """Return labels (n,) dealt out anew: the patients' labels, laid end to end in another order of patients.

    The number of positives stays, and labels that came in runs within patients still do; only the tie to the images is
    cut.
    """
    rng = np.random.default_rng(seed)
    _, codes = np.unique(group, return_inverse=True)
    rows = np.argsort(codes, kind="stable")
    rank = rng.permutation(codes.max() + 1)
    source = np.lexsort((np.arange(len(y)), rank[codes]))
    dealt = np.empty_like(y)
    dealt[rows] = y[source]
    return dealt


def robustness(x: Array, task: Task, classes: Sequence[str]) -> Values:
    """Return how far neighbours follow the label rather than the site (see `eosin.evaluation.robustness`)."""
    assert task.site is not None
    table = pd.DataFrame({"label": np.asarray(classes)[task.y], "group_id": task.group, "site": task.site})
    found = encoder_robustness(
        x,
        table,
        confounder="site",
        iterations=SWEEP_ITERATIONS,
        resamples=min(task.resamples, 1000),
        seed=task.seed,
    )
    return plain(found.to_dict())


class CurveHead:
    """A head that chooses its settings on other patients, as label curves need it."""

    def __init__(self, name: str, known: dict[bytes, Fitted]) -> None:
        """Name a head of `HEADS`; `known` holds heads by the patients they were fitted on (all of them: many times)."""
        self.name = name
        self.known = known

    def fit(self, x: Array, y: Array, *, groups: Array | None = None) -> CurveHead:
        """Fit features (n, D), labels (n,) and patients (n,)."""
        if groups is None:
            raise CohortError("the patients of the rows are needed to choose settings")
        key = "|".join(np.unique(groups)).encode()
        if key not in self.known:
            self.known[key] = fit_head(self.name, x, y, inner_splits(y, groups))
        self.classes_ = self.known[key].classes_
        self.head = self.known[key]
        return self

    def predict_proba(self, x: Array) -> Array:
        """Return probabilities (n, C)."""
        return self.head.predict_proba(x)


def label_curve(x: Array, y: Array, group: Texts, test: Array, *, head: str) -> Values:
    """Return AUROC on the test rows against the share of training patients; nested subsets, five orders.

    Raises:
        LabelError: too few patients of a class.
    """
    known: dict[bytes, Fitted] = {}
    found = label_efficiency(
        lambda _: CurveHead(head, known),
        x,
        y,
        group,
        test=test,
        fractions=FRACTIONS,
        seeds=range(CURVE_SEEDS),
        per_class=2,
    )
    summary = found.summary[found.summary["metric"] == "auroc"]
    ratio = found.ratio25[found.ratio25["metric"] == "auroc"]
    held = {"n_test": len(test), "test_groups": len(np.unique(group[test]))}
    return plain({"rows": summary, "ratio25": records(pd.DataFrame(ratio))[0], **held})


def check_varies(x: Array, name: str) -> None:
    """Raise unless features differ between rows."""
    if (x == x[0]).all():
        raise CohortError(f"{name}: all {len(x)} rows have the same features; nothing can be learned from them")


def final_threshold(found: OutOfFold) -> float:
    """Return the threshold that the first layout's out-of-fold predictions recommend."""
    return choose_threshold(found.y[0], found.p[0])


def layouts_of(splits: Sequence[Split], n: int) -> tuple[tuple[Split, ...], ...]:
    """Return splits, in order, as complete rounds in which every row is tested once.

    Raises:
        CohortError: rows tested twice or never in a round.
    """
    rounds: list[tuple[Split, ...]] = []
    current: list[Split] = []
    seen = np.zeros(n, np.int64)
    for split in splits:
        current.append(split)
        seen[split.test] += 1
        if seen.max() > 1:
            raise CohortError(f"split {split.name!r} tests rows that an earlier split of its round has tested")
        if seen.all():
            rounds.append(tuple(current))
            current, seen = [], np.zeros(n, np.int64)
    if current or not rounds:
        raise CohortError(
            f"the splits test {int(seen.sum())} of {n} rows in their last round; a probe needs folds "
            "that test each row once"
        )
    return tuple(rounds)
