"""Fit a probe on the training rows of a table, and evaluate it on other patients."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from eosin.cohort import Cohort, from_column, read_cohort
from eosin.cohort.reading import CANONICAL
from eosin.errors import CohortError, LabelError
from eosin.evaluation.report import Report
from eosin.features.store import FeatureStore
from eosin.tasks.predictions import ValidationSettings
from eosin.tasks.probe_measures import check_varies
from eosin.tasks.probe_model import Probe, check_head, fit_nested, positive_class
from eosin.tasks.samples import Samples, from_store, read_samples
from eosin.tasks.validate import evaluate_predictions

FEW_LABELS, MANY_LABELS = 2, 10


def fit_probe(
    store: FeatureStore | Samples | Path | str,
    cohort: Cohort | Path | str | pd.DataFrame,
    *,
    label: str | None = None,
    split: str | None = "train",
    head: str = "linear",
    positive: str | None = None,
    seed: int = 0,
) -> Probe:
    """Return a head fitted on the rows of one split; settings and threshold are chosen inside them, by patient.

    Args:
        store: a feature store, its path, or samples.
        cohort: the table, with a column ``split`` unless `split` is None.
        label: column to predict; None takes the only one that looks like a label.
        split: "train", "val" or "test"; None uses all rows.
        head: "linear", "knn", "prototype" or "sgd".
        positive: value that is looked for; None where the values say it.
        seed: of folds and head.

    Raises:
        CohortError: no such column or split, or features missing.
        LabelError: labels missing, of one class, or in too few patients.
    """
    check_head(head)
    table = _cohort(cohort)
    name = table.column(label) if label is not None else _only_label(table)
    part = _rows_of(table, split)
    classes = part.labels(name)[1]
    found = positive_class(classes, positive, name)
    samples = _samples(store, part, table, split)
    y = (part.values(name) == found).astype(np.int64)
    group = part.group_key()
    check_varies(samples.x, samples.name)
    nested = fit_nested(head, samples.x, y, group, seed=seed)
    return Probe(
        kind=head,
        head=nested.head,
        encoder=samples.encoder,
        label=name,
        classes=classes,
        positive=found,
        threshold=nested.threshold,
        groups=np.unique(group),
        n=len(y),
    )


def evaluate(
    probe: Probe,
    store: FeatureStore | Samples | Path | str,
    cohort: Cohort | Path | str | pd.DataFrame,
    *,
    split: str | None = "test",
    site: str | None = None,
    seed: int = 0,
) -> Report:
    """Return the validation report of a probe on the rows of one split, at the threshold its training chose.

    Args:
        probe: from `fit_probe`, or loaded.
        store: features of the same encoder.
        cohort: the table.
        split: which rows; None uses all.
        site: column of the site, for results by site.
        seed: of the bootstrap.

    Raises:
        CohortError: features of another encoder, or patients that the probe was fitted on.
        LabelError: labels missing or of one class.
    """
    table = _cohort(cohort)
    part = _rows_of(table, split)
    samples = _samples(store, part, table, split)
    _check_encoder(probe, samples)
    group = part.group_key()
    both = np.intersect1d(group, probe.groups)
    if len(both):
        raise CohortError(f"{len(both)} patients of these rows trained the probe (first: {both[0]}); test on others")
    columns = {"label": part.values(probe.label), "score": probe.scores(samples.x), "group": group}
    if site is not None:
        columns["site"] = part.table[part.column(site)].fillna("").astype(str).to_numpy()
    settings = ValidationSettings(
        label="label",
        score="score",
        group="group",
        site="site" if site is not None else None,
        positive=probe.positive,
        threshold=probe.threshold,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.csv"
        pd.DataFrame(columns).to_csv(path, index=False)
        return evaluate_predictions(path, settings)


def _cohort(source: Cohort | Path | str | pd.DataFrame) -> Cohort:
    return source if isinstance(source, Cohort) else read_cohort(source)


def _rows_of(table: Cohort, split: str | None) -> Cohort:
    if split is None:
        return table
    if "split" not in table.table:
        raise CohortError(
            f"{table.source}: no column 'split'; add one (train, val, test), or give split=None for all rows"
        )
    if split not in ("train", "val", "test"):
        raise CohortError(f"split is {split!r}; choose train, val or test, or None for all rows")
    return table.take(getattr(from_column(table)[0], split))


def _samples(store: FeatureStore | Samples | Path | str, part: Cohort, table: Cohort, split: str | None) -> Samples:
    """Return the features of the rows in `part`; samples handed over belong to all rows of the table."""
    if isinstance(store, FeatureStore):
        return from_store(store, part)
    if not isinstance(store, Samples):
        return read_samples(Path(store), part)
    if len(store) != len(table):
        raise CohortError(f"{len(store)} samples for {len(table)} rows of {table.source}; needed one a row")
    rows = np.arange(len(table)) if split is None else getattr(from_column(table)[0], split)
    return replace(store, x=store.x[rows], cohort=part, pictures=None)


def _only_label(table: Cohort) -> str:
    """Return the only column that looks like a label.

    Raises:
        LabelError: none or several do.
    """
    found = [
        str(name)
        for name in table.table.columns
        if name not in CANONICAL
        and bool(table.table[name].notna().to_numpy().all())
        and FEW_LABELS <= len(set(table.table[name])) <= min(MANY_LABELS, max(2, len(table) // 2))
    ]
    if len(found) != 1:
        what = (
            f"{len(found)} columns look like labels ({', '.join(found)})" if found else "no column looks like a label"
        )
        raise LabelError(
            f"{table.source}: {what}; say which one with label=. It has {', '.join(map(str, table.table.columns))}"
        )
    return found[0]


def _check_encoder(probe: Probe, samples: Samples) -> None:
    for name in ("name", "dim", "pooling", "weights_hash", "recipe_hash"):
        here, there = samples.encoder.get(name), probe.encoder.get(name)
        if here is not None and there is not None and here != there:
            raise CohortError(
                f"these features have {name} {here!r}, the probe was fitted on {there!r}; use features of its encoder"
            )
