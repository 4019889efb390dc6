"""Does an encoder see biology or the scanner? Robustness to a confounder, always beside how much biology it sees.

The indices come from the package `croma`, which counts neighbours of other groups only (tiles of one slide are not
independent). Every neighbour of a sample is typed by label and confounder: SO = same label, other confounder (biology
won), OS = other label, same confounder (the confounder won).

    RI    = sum SO / sum (SO + OS) among the k nearest                 Kömen et al. 2025, arXiv:2507.17845
    MaRI  = the same with weights exp(-distance / tau)                 Grisi et al. 2026, arXiv:2607.25497
    CRoMa = median of (d_OS - d_SO) / (d_OS + d_SO), mean distances    Grisi et al. 2026
            to the 5 nearest of either type; its tail, the mean of the worst 10 %
    APD   = mean relative change of a probe's accuracy as its training set ties label and confounder

A collapsed encoder is robust and useless: read these beside `biology`, the balanced accuracy of the same neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import croma
import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.errors import CohortError, LabelError, NonFiniteError
from eosin.evaluation.bootstrap import Metric, bootstrap
from eosin.evaluation.confounded import ProbeSweep, probe_sweep
from eosin.evaluation.interval import Interval
from eosin.evaluation.weighted import LinearMetric, ratio

K_CANDIDATES = (5, 11, 21, 31, 46, 61)
"""Tried in turn; the k with the best balanced accuracy of the label is used, as in PathoROB."""

CROMA_NEIGHBOURS = 5
"""Neighbours of either type that CRoMa averages over, the headline choice of its authors."""

THIN_SUPPORT = 0.5
"""Below this share of samples with an SO or OS neighbour among the k nearest, RI and MaRI rest on a minority."""

BLOCK = 1024

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class EncoderRobustness:
    """What `encoder_robustness` found.

    Attributes:
        confounder: column that must not matter.
        n: samples.
        groups: groups; neighbours of the same group do not count.
        cells: samples and groups of every label and confounder, columns label, confounder, n, groups.
        k: neighbours looked at.
        biology: balanced accuracy of the label, by majority of the k nearest of other groups.
        biology_chance: 1 / labels.
        confounded: the same for the confounder itself.
        confounded_chance: 1 / confounders.
        ri: robustness index in [0, 1]; above 0.5 biology wins.
        support: share of samples with an SO or OS neighbour among the k nearest.
        mari: margin-aware robustness index in [0, 1].
        tau: temperature of MaRI, the median distance of typed neighbours of this encoder.
        croma: median margin in (-1, 1), positive where biology wins; None where a sample lacks partners.
        croma_tail: mean of the worst 10 % of the margins.
        croma_lost: share of samples whose margin is 0 or less.
        drop: the probe sweep behind APD; None where the cells are too small.
        notes: what a reader must know before believing it.
    """

    confounder: str
    n: int
    groups: int
    cells: pd.DataFrame
    k: int
    biology: float
    biology_chance: float
    confounded: float
    confounded_chance: float
    ri: Interval
    support: float
    mari: float
    tau: float
    croma: Interval | None
    croma_tail: float | None
    croma_lost: float | None
    drop: ProbeSweep | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        own = ("confounder", "n", "groups", "k", "biology", "biology_chance", "confounded", "confounded_chance")
        return {
            **{name: getattr(self, name) for name in own},
            "ri": self.ri.to_dict(),
            "support": self.support,
            "mari": self.mari if np.isfinite(self.mari) else None,
            "tau": self.tau if np.isfinite(self.tau) else None,
            "croma": None if self.croma is None else self.croma.to_dict(),
            "croma_tail": self.croma_tail,
            "croma_lost": self.croma_lost,
            "drop": None if self.drop is None else self.drop.to_dict(),
            "cells": self.cells.to_dict("records"),
            "notes": list(self.notes),
        }


def encoder_robustness(
    features: npt.NDArray[np.floating],
    table: pd.DataFrame,
    *,
    confounder: str,
    label: str = "label",
    group: str = "group_id",
    k_candidates: Sequence[int] = K_CANDIDATES,
    iterations: int = 20,
    resamples: int = 1000,
    seed: int = 0,
) -> EncoderRobustness:
    """Return how far features follow the label rather than a confounder.

    Intervals resample groups and keep every sample's neighbours as they are.

    Args:
        features: (n, D), row by row as `table`; scaled to unit length inside, except for the probes of APD.
        table: n rows with the three columns below.
        confounder: column that must not matter: site, scanner, stain ...
        label: column with the biology, such as tissue class.
        group: column with slide or patient; samples of one group are no evidence about each other.
        k_candidates: neighbour counts to choose from.
        iterations: repeats of the probe sweep; 0 leaves APD out.
        resamples: of the bootstrap.
        seed: of the bootstrap and of the sweep.

    Raises:
        CohortError: columns missing or empty, rows that do not match, or too few samples of other groups.
        LabelError: fewer than two labels or confounders.
        NonFiniteError: NaN or infinity in the features.
    """
    x = _check_features(features, len(table))
    columns = {name: _column(table, name) for name in (label, confounder, group)}
    labels, confounders = (_codes(columns[name], name) for name in (label, confounder))
    groups = pd.factorize(columns[group], sort=True)[0].astype(np.int64)
    manifest = pd.DataFrame(
        {
            "sample_id": np.arange(len(x)).astype(str),
            "image_path": "",
            "label": columns[label],
            "group_id": columns[group],
            "confounder": columns[confounder],
        }
    )
    candidates = _usable_k(k_candidates, groups)
    with warnings.catch_warnings():  # croma warns of thin support, which is a field of the result
        warnings.simplefilter("ignore", RuntimeWarning)
        index = croma.RI.compute(x, manifest, confounder_column="confounder", k_candidates=candidates)
        margin = croma.MaRI.compute(x, manifest, confounder_column="confounder", k_candidates=candidates)
    found, valid = neighbours(x, groups, index.k)
    biology, confounded = (_vote_accuracy(found, valid, codes) for codes in (labels, confounders))
    notes = _support_notes(float(index.support), index.k)
    scores, why = _croma(x, manifest, groups, resamples=resamples, seed=seed)
    drop: ProbeSweep | None = None
    if iterations:
        try:
            drop = probe_sweep(x, labels, confounders, groups, iterations=iterations, seed=seed)
        except CohortError as error:
            notes.append(f"APD left out: {error}")
    interval = bootstrap(_index_metric(found, valid, labels, confounders), groups, resamples=resamples, seed=seed)
    if not np.isclose(interval.point, index.value, atol=0.005):
        notes.append(
            f"RI is {index.value:.3f} by croma and {interval.point:.3f} by a plain count: many distances are tied"
        )
    return EncoderRobustness(
        confounder=confounder,
        n=len(x),
        groups=int(groups.max()) + 1,
        cells=_cells(columns[label], columns[confounder], groups),
        k=int(index.k),
        biology=biology,
        biology_chance=1 / (labels.max() + 1),
        confounded=confounded,
        confounded_chance=1 / (confounders.max() + 1),
        ri=interval,
        support=float(index.support),
        mari=float(margin.value),
        tau=float(margin.tau),
        croma=scores[0] if scores else None,
        croma_tail=scores[1] if scores else None,
        croma_lost=scores[2] if scores else None,
        drop=drop,
        notes=tuple(notes + why),
    )


def neighbours(
    x: npt.NDArray[np.floating], groups: Codes, k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the k most similar samples of other groups (n, k), nearest first, and which of them exist (n, k).

    Args:
        x: (n, D); cosine similarity.
        groups: (n,) codes.
        k: how many; a sample with fewer candidates has False at the end of its row.
    """
    unit = _unit(x)
    found = np.empty((len(x), k), dtype=np.int64)
    valid = np.empty((len(x), k), dtype=np.bool_)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        similarity = unit[rows] @ unit.T
        similarity[groups[rows, None] == groups[None, :]] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(similarity, nearest, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        found[rows] = np.take_along_axis(nearest, order, axis=1)
        valid[rows] = np.isfinite(np.take_along_axis(values, order, axis=1))
    return found, valid


def _index_metric(
    found: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_], labels: Codes, confounders: Codes
) -> Metric:
    """Return RI of these neighbours as a function of row weights."""
    same_label = labels[found] == labels[:, None]
    same_confounder = confounders[found] == confounders[:, None]
    so = (valid & same_label & ~same_confounder).sum(axis=1)
    os = (valid & ~same_label & same_confounder).sum(axis=1)
    terms = np.column_stack([so, so + os]).astype(np.float64)
    return LinearMetric(terms=terms, finish=lambda sums: ratio(sums[:, 0], sums[:, 1]))


def weighted_median(values: npt.NDArray[np.floating]) -> Metric:
    """Return the median of `values` (n,) as a function of row weights (B, n); `np.median` where all are equal."""
    order = np.argsort(values)
    ranked = np.asarray(values, dtype=np.float64)[order]

    def metric(weights: npt.NDArray[np.floating], /) -> npt.NDArray[np.float64]:
        reached = np.cumsum(weights[:, order], axis=1, dtype=np.float64)
        half = reached[:, -1:] / 2
        middle = (ranked[(reached >= half).argmax(1)] + ranked[(reached > half).argmax(1)]) / 2
        return np.where(half[:, 0] > 0, middle, np.nan)

    return metric


def _croma(
    x: npt.NDArray[np.floating], manifest: pd.DataFrame, groups: Codes, *, resamples: int, seed: int
) -> tuple[tuple[Interval, float, float] | None, list[str]]:
    """Return CRoMa, its tail and its share of losses; or None and why, when a sample has no partners."""
    try:
        result = croma.CRoMa.compute(x, manifest, confounder_column="confounder", m=CROMA_NEIGHBOURS)
    except RuntimeError as error:
        return None, [f"CRoMa left out: {error}"]
    result = result[CROMA_NEIGHBOURS] if isinstance(result, dict) else result
    interval = bootstrap(weighted_median(result.sample_values_aligned), groups, resamples=resamples, seed=seed)
    return (interval, float(result.ltm_alpha), float(result.f0)), []


def _vote_accuracy(found: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_], codes: Codes) -> float:
    """Return the balanced accuracy of the majority of the neighbours; ties go to the lowest code."""
    classes = int(codes.max()) + 1
    votes = np.stack([((codes[found] == code) & valid).sum(1) for code in range(classes)], axis=1)
    hit = votes.argmax(1) == codes
    return float(np.mean([hit[(codes == code) & valid[:, 0]].mean() for code in np.unique(codes[valid[:, 0]])]))


def _usable_k(candidates: Sequence[int], groups: Codes) -> list[int]:
    """Return the candidates that every sample can meet with samples of other groups."""
    most = len(groups) - int(np.bincount(groups).max())
    usable = [int(k) for k in candidates if 0 < k < most]
    if not usable:
        raise CohortError(
            f"the largest group leaves only {most} samples outside itself, and the smallest k tried is "
            f"{min(candidates, default=0)}; give more groups or smaller k_candidates"
        )
    return usable


def _check_features(features: npt.NDArray[np.floating], rows: int) -> npt.NDArray[np.floating]:
    x = np.asarray(features)
    if x.ndim != 2 or len(x) != rows or not x.size:
        raise CohortError(f"features have shape {x.shape} and the table {rows} rows; needed (n, D) and n > 0 rows")
    x = x if x.dtype == np.float64 else x.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if bad.size:
        raise NonFiniteError(f"{bad.size} of {rows} feature rows hold NaN or infinity (first: row {bad[0]})")
    return x


def _column(table: pd.DataFrame, name: str) -> npt.NDArray[np.str_]:
    if name not in table.columns:
        raise CohortError(f"the table has no column {name!r}; it has {', '.join(map(str, table.columns))}")
    missing = np.flatnonzero(table[name].isna() | (table[name].astype(str).str.strip() == ""))
    if missing.size:
        raise CohortError(f"column {name!r} is empty in {missing.size} rows (first: row {missing[0]}); leave them out")
    return table[name].astype(str).str.strip().to_numpy(dtype=str)


def _codes(values: npt.NDArray[np.str_], name: str) -> Codes:
    codes, names = pd.factorize(values, sort=True)
    if len(names) < 2:
        raise LabelError(f"column {name!r} holds only '{names[0]}'; robustness compares two values or more")
    return codes.astype(np.int64)


def _cells(label: npt.NDArray[np.str_], confounder: npt.NDArray[np.str_], groups: Codes) -> pd.DataFrame:
    rows = pd.DataFrame({"label": label, "confounder": confounder, "group": groups})
    counted = rows.groupby(["label", "confounder"])["group"].agg(n="size", groups="nunique")
    every = pd.MultiIndex.from_product([np.unique(label), np.unique(confounder)], names=["label", "confounder"])
    return counted.reindex(every, fill_value=0).reset_index()


def _support_notes(support: float, k: int) -> list[str]:
    if support >= THIN_SUPPORT:
        return []
    return [f"only {support:.0%} of the samples have an informative neighbour among their {k} nearest: RI is thin"]


def _unit(x: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-12)
