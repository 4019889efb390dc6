"""When a review may stop: the audit, which never trains, has not moved for three rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.evaluation.bootstrap import bootstrap, paired_difference
from eosin.evaluation.interval import Difference, Interval
from eosin.evaluation.proportions import clopper_pearson

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

FLAT_ROUNDS = 3
FLAT_CHANGE = 0.02
LEAST_AUDIT = 20
LEAST_LABELS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class StopAdvice:
    """Whether more review is likely to change the head.

    Attributes:
        stop: it is not.
        why: in one sentence, with the numbers.
        n: audit tiles with a class.
        patients: they come from.
        error: share of audit tiles that the present head gets wrong, with its interval; None before there are any.
        change: error now less error three rounds ago, on the same tiles; None before there were so many rounds.
        errors: (R,) share wrong of each round's head, oldest first, all on the same tiles.
        per_class: audit tiles of each class; of a class with few, the audit says little.
    """

    stop: bool
    why: str
    n: int
    patients: int
    error: Interval | None
    change: Difference | None
    errors: tuple[float, ...]
    per_class: Mapping[str, int]


def stop_advice(
    wrong: npt.NDArray[np.bool_],
    patient: Array,
    *,
    labels: Mapping[str, int],
    per_class: Mapping[str, int],
    found: Mapping[str, int],
) -> StopAdvice:
    """Return whether the error on the audit has been flat for `FLAT_ROUNDS` rounds.

    Flat: the heads of the last `FLAT_ROUNDS` rounds and the one before lie within `FLAT_CHANGE` in the share of audit
    tiles it gets wrong, all on the same tiles, and the interval of the whole change holds zero. Asked only with
    `LEAST_AUDIT` audit tiles and `LEAST_LABELS` labels of each class; the audit never trained, so that its error is
    that of tiles nobody has reviewed. Of a class with fewer than `LEAST_LABELS` audit tiles the audit says little:
    while the last rounds still find tiles of it, the review goes on.

    Args:
        wrong: (R, n) which audit tiles each head got wrong, oldest first, R up to `FLAT_ROUNDS` + 1.
        patient: (n,) clusters that are resampled.
        labels: labels of each class so far.
        per_class: audit tiles of each class.
        found: tiles of each class that the last `FLAT_ROUNDS` rounds brought, audit excluded.
    """
    n, patients = wrong.shape[1], len(np.unique(patient))
    errors = tuple(float(one.mean()) for one in wrong) if n else ()
    error = _share_wrong(wrong[-1], patient) if n and len(wrong) else None
    enough = len(errors) > FLAT_ROUNDS
    change = None
    if enough:
        now, then = (wrong[at].astype(np.float64) for at in (-1, 0))
        change = paired_difference(_mean_of(now), _mean_of(then), patient)
    rare = [name for name, count in labels.items() if count < LEAST_LABELS]
    if error is None or n < LEAST_AUDIT:
        why = f"go on: {n} audit tiles, needed {LEAST_AUDIT}"
    elif rare:
        why = f"go on: {labels[rare[0]]} tiles of {rare[0]!r}, needed {LEAST_LABELS}"
    elif change is None:
        why = f"go on: {len(errors)} rounds had a head, needed {FLAT_ROUNDS + 1}"
    else:
        few = [name for name, count in per_class.items() if count < LEAST_LABELS]
        coming = [name for name in few if found[name]]
        flat = np.ptp(errors) <= FLAT_CHANGE and change.low <= 0 <= change.high and not coming
        why = (
            f"{'flat' if flat else 'go on'}: audit error {error.point:.3f} ({error.low:.3f} to {error.high:.3f}; "
            f"{n} tiles, {patients} patients), over {FLAT_ROUNDS} rounds {change.point:+.3f} ({change.low:+.3f} to "
            f"{change.high:+.3f})"
        )
        if few:
            name = (coming or few)[0]
            why += f"; the audit says little of {name!r} ({per_class[name]} tiles), {FLAT_ROUNDS} rounds found "
            why += f"{found[name]} more"
    return StopAdvice(
        stop=why.startswith("flat"),
        why=why,
        n=n,
        patients=patients,
        error=error,
        change=change,
        errors=errors,
        per_class=per_class,
    )


def _share_wrong(wrong: npt.NDArray[np.bool_], patient: Array) -> Interval:
    """Return the error with an interval over patients; where all tiles agree, the exact one on patients' numbers."""
    if 0 < wrong.sum() < len(wrong):
        return bootstrap(_mean_of(wrong.astype(np.float64)), patient)
    patients = len(np.unique(patient))
    ends = clopper_pearson(patients if wrong[0] else 0, patients)
    return replace(ends, n=len(wrong))


def _mean_of(values: Floats) -> Any:
    return lambda weights: weights @ values / weights.sum(axis=1)
