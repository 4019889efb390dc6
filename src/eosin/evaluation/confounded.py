"""Probes trained on ever more confounded data (APD, PathoROB: arXiv:2507.17845, section 4; run by `croma`).

The schedule is ours, for any number of labels and confounders: every label keeps its number of training groups, and
moves them from an even spread over the confounders (Cramer's V = 0) to the confounders it is paired with (V = 1).
Label j is paired with the confounders i where i and j agree modulo the smaller of both numbers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import croma
import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.exceptions import ConvergenceWarning

from eosin.cohort.leakage import cramers_v
from eosin.errors import CohortError

STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
VALIDATION = 0.25
"""Validation groups, as a share of the training groups of a cell."""

HELD_OUT = 0.2
"""Groups of the smallest cell that are kept for the test."""

MAX_ROWS_PER_GROUP = 100

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ProbeSweep:
    """Accuracy of probes against how strongly label and confounder are tied in their training set.

    Attributes:
        apd: mean over the tied steps of accuracy / accuracy at V = 0, minus 1; 0 = no harm, negative = harm.
        nipd: area under (accuracy - accuracy at 0) / (accuracy at 0 - chance) over V; None where the probe at V = 0 is
            at chance.
        table: columns cramers_v, accuracy (balanced, mean of the repeats), sd; first row V = 0.
        iterations: repeats.
        rows_per_group: samples drawn of every group.
        training_groups: training groups a label.
        note: what was left out, and whether there was anything to lose.
    """

    apd: float
    nipd: float | None
    table: pd.DataFrame
    iterations: int
    rows_per_group: int
    training_groups: int
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "apd": self.apd,
            "nipd": self.nipd,
            "table": self.table.to_dict("records"),
            "iterations": self.iterations,
            "rows_per_group": self.rows_per_group,
            "training_groups": self.training_groups,
            "note": self.note,
        }


def probe_sweep(
    features: npt.NDArray[np.floating],
    labels: Codes,
    confounders: Codes,
    groups: Codes,
    *,
    iterations: int = 20,
    seed: int = 0,
) -> ProbeSweep:
    """Return APD and nIPD of logistic probes (C chosen on validation groups, `croma.probe_sweep`).

    A group with several labels or confounders serves for one of them only, so that no group is in training and test.

    Args:
        features: (n, D).
        labels: (n,) codes 0 ... C-1.
        confounders: (n,) codes 0 ... K-1.
        groups: (n,) codes.
        iterations: repeats with other groups in training and test.
        seed: of all draws.

    Raises:
        CohortError: a combination of label and confounder has too few groups.
    """
    rng = np.random.default_rng(seed)
    shape = (int(confounders.max()) + 1, int(labels.max()) + 1)
    cell_of_group = _one_cell_each(confounders * shape[1] + labels, groups, shape[0] * shape[1], rng)
    rows, rows_per_group = _draw_rows(confounders * shape[1] + labels, groups, cell_of_group, rng)
    per_cell = np.bincount(confounders[rows] * shape[1] + labels[rows], minlength=shape[0] * shape[1])
    schedule, strengths, budget = _schedule(int(per_cell.min()) // rows_per_group, shape, rows_per_group)
    with warnings.catch_warnings():  # the reference protocol stops at 100 iterations; that is part of it
        warnings.simplefilter("ignore", ConvergenceWarning)
        accuracy = croma.probe_sweep(
            features[rows],
            confounders[rows],
            labels[rows],
            schedule=schedule,
            rows_per_slide=rows_per_group,
            iterations=iterations,
            seed=seed,
            validation_fraction=VALIDATION,
        )
    chance = 1 / shape[1]
    above_chance = bool(accuracy[0].mean() > chance)
    left_out = len(np.unique(groups)) - len(rows) // rows_per_group
    notes = [f"{left_out} groups with fewer than {rows_per_group} samples left out"] if left_out else []
    if not above_chance:
        notes.append("the probe at V = 0 is at chance: there is nothing to lose, and APD near 0 is no robustness")
    return ProbeSweep(
        apd=float(croma.apd(accuracy)),
        nipd=float(croma.nipd(accuracy, strengths, chance)) if above_chance else None,
        table=pd.DataFrame(
            {"cramers_v": strengths, "accuracy": accuracy.mean(axis=1), "sd": accuracy.std(axis=1, ddof=1)}
            if iterations > 1
            else {"cramers_v": strengths, "accuracy": accuracy.mean(axis=1), "sd": None}
        ),
        iterations=iterations,
        rows_per_group=rows_per_group,
        training_groups=budget,
        note="; ".join(notes),
    )


def _one_cell_each(cell: Codes, groups: Codes, cells: int, rng: np.random.Generator) -> Codes:
    """Return the cell that every group serves (G,): of those it has, the one with the fewest groups so far."""
    owned = pd.DataFrame({"group": groups, "cell": cell}).drop_duplicates().groupby("group")["cell"].agg(list)
    order = rng.permutation(len(owned))
    chosen, filled = np.empty(int(groups.max()) + 1, dtype=np.int64), np.zeros(cells, dtype=np.int64)
    for position in sorted(order, key=lambda i: len(owned.iloc[i])):
        options = owned.iloc[position]
        chosen[owned.index[position]] = best = min(options, key=lambda one: filled[one])
        filled[best] += 1
    return chosen


def _draw_rows(cell: Codes, groups: Codes, cell_of_group: Codes, rng: np.random.Generator) -> tuple[Codes, int]:
    """Return rows, the same number of every group and one group after another, and that number.

    The number is what four fifths of the groups of every cell can give, 100 at most; smaller groups are left out.
    """
    serving = np.flatnonzero(cell == cell_of_group[groups])
    sizes = np.bincount(groups[serving], minlength=len(cell_of_group))
    present = np.unique(groups)
    smallest = min(
        np.quantile(sizes[present[cell_of_group[present] == one]], 0.2, method="lower")
        for one in np.unique(cell_of_group[present])
    )
    rows_per_group = int(min(smallest, MAX_ROWS_PER_GROUP))
    members = pd.Series(serving).groupby(groups[serving]).agg(list)
    drawn = [
        rng.choice(members[group], rows_per_group, replace=False) for group in present if sizes[group] >= rows_per_group
    ]
    return np.concatenate(drawn).astype(np.int64), rows_per_group


def _schedule(
    smallest: int, shape: tuple[int, int], rows_per_group: int
) -> tuple[list[tuple[list[tuple[int, int, int]], int]], list[float], int]:
    """Return the training rows of every cell at every step, Cramer's V of the steps, and the groups a label.

    Args:
        smallest: groups of the smallest cell.
        shape: (confounders, labels).
        rows_per_group: samples of a group.

    Raises:
        CohortError: too few groups for two in training at V = 0, one in validation and one in the test.
    """
    paired = np.subtract.outer(np.arange(shape[0]), np.arange(shape[1])) % min(shape) == 0
    partners = paired.sum(axis=0)
    most = int((smallest - 1 - max(1, round(HELD_OUT * smallest))) / (1 + VALIDATION))
    budget = most * int(partners.min())
    if round(budget / shape[0]) < 2:
        raise CohortError(
            f"the rarest combination of label and confounder has {smallest} groups of its own, too few to train, "
            "choose and test probes; bring more slides of it, or leave that label or confounder out"
        )
    schedule, strengths = [], []
    for step in STEPS:
        counts = np.rint(budget * ((1 - step) / shape[0] + step * paired / partners)).astype(int)
        strength = cramers_v(counts)[0]
        if strengths and strength <= strengths[-1]:
            continue  # rounding made two steps alike
        takes = [(i, j, int(counts[i, j]) * rows_per_group) for i in range(shape[0]) for j in range(shape[1])]
        schedule.append((takes, most))
        strengths.append(strength)
    return schedule, strengths, budget
