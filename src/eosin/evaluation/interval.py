"""Results that carry how sure they are: an interval of one number, and a difference of two."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any


class AsDict:
    """Conversion of a result to plain values."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON knows; NaN and infinity become None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval(AsDict):
    """A number, and the range that it may well lie in.

    Attributes:
        point: the estimate on all rows; NaN where it is undefined.
        low: lower end of the interval; NaN where no resample was usable.
        high: upper end.
        level: confidence level in (0, 1).
        n: rows.
        clusters: units that were resampled, usually patients; equal to `n` for methods that take rows as independent.
        resamples: bootstrap resamples drawn; 0 for closed forms.
        degenerate: resamples on which the number is undefined (one class, say); they are left out.
        method: "percentile", "bca", "delong", "wilson", "clopper-pearson" ...
        note: what a reader must know before believing it; empty when there is nothing.
    """

    point: float
    low: float
    high: float
    level: float
    n: int
    clusters: int
    resamples: int = 0
    degenerate: int = 0
    method: str
    note: str = ""

    def __str__(self) -> str:
        """Return `0.908 (95 % CI 0.893-0.921; n 3800, clusters 365)`."""
        return (
            f"{self.point:.3f} ({100 * self.level:g} % CI {self.low:.3f}-{self.high:.3f}; "
            f"n {self.n}, clusters {self.clusters})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference(AsDict):
    """A paired difference a - b: two scores of the same rows.

    Attributes:
        point: the difference on all rows.
        low: lower end of its interval.
        high: upper end.
        p: two-sided p-value of no difference.
        se: standard error (of a bootstrap: the standard deviation over resamples).
        level: confidence level in (0, 1).
        n: rows.
        clusters: units that were resampled.
        resamples: bootstrap resamples drawn; 0 for closed forms.
        degenerate: resamples on which either number is undefined; they are left out.
        method: "percentile" or "delong".
        note: what a reader must know before believing it.
    """

    point: float
    low: float
    high: float
    p: float
    se: float
    level: float
    n: int
    clusters: int
    resamples: int = 0
    degenerate: int = 0
    method: str
    note: str = ""
