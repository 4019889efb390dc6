"""Evaluation: metrics with intervals that respect patients, comparisons, calibration, subgroups and more. No torch.

Arrays everywhere: `y` (n,) class indices, 1 = positive; `p` (n,) P(positive) or (n, C) rows summing to 1; `cluster`
(n,) patient ids, the unit that is resampled; `weight` (n,).
"""

from __future__ import annotations
