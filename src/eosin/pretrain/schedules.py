"""What learning rate, weight decay, momentum and temperature are at each optimiser step: closed forms, no state.

Steps are optimiser steps; gradient accumulation does not enter. Every length is a share of the `Budget`, the limit that
ends the run, so that no schedule is ever cut off before its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Rule = Literal["sqrt", "linear", "none"]
WARM_MOMENTUM = 0.999
"""Lowest momentum a warm teacher starts from: DINOv3 holds 0.999 when it continues at a higher resolution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How long a run is.

    Attributes:
        steps: optimiser steps.
        images_per_step: tiles an optimiser step sees, over all ranks and accumulated micro-steps.
        ended_by: the limit that ends the run.
        seconds_per_step: the measured time by which hours became steps; None unless hours were given.
    """

    steps: int
    images_per_step: int
    ended_by: Literal["steps", "images", "hours"]
    seconds_per_step: float | None = None

    @property
    def images(self) -> int:
        """Tiles the whole run sees."""
        return self.steps * self.images_per_step

    def __str__(self) -> str:
        """Return the budget in words."""
        text = f"{self.steps} optimiser steps of {self.images_per_step} images, ended by {self.ended_by}"
        return text if self.seconds_per_step is None else f"{text} (measured {self.seconds_per_step:.4g} s a step)"


def resolve_budget(
    *,
    images_per_step: int,
    steps: int | None = None,
    images: int | None = None,
    hours: float | None = None,
    seconds_per_step: float | None = None,
) -> Budget:
    """Return the budget that ends the run: the smallest of the limits given.

    Hours become steps once, by a time measured on this machine; the steps are then kept through every resume.

    Args:
        images_per_step: tiles an optimiser step sees, over all ranks and accumulated micro-steps.
        steps: limit in optimiser steps.
        images: limit in tiles; the last step that would pass it is not begun.
        hours: limit in hours of training.
        seconds_per_step: measured seconds an optimiser step takes; needed with `hours`.

    Raises:
        ValueError: no limit, hours without a measured step, or a limit below one step.
    """
    if images_per_step < 1:
        raise ValueError(f"images_per_step is {images_per_step}; it must be at least 1")
    if hours is not None and not (seconds_per_step and seconds_per_step > 0):
        raise ValueError(f"{hours} hours are no number of steps yet: measure a step and give seconds_per_step")
    limits: dict[Literal["steps", "images", "hours"], int] = {}
    if steps is not None:
        limits["steps"] = steps
    if images is not None:
        limits["images"] = images // images_per_step
    if hours is not None and seconds_per_step:
        limits["hours"] = int(hours * 3600 / seconds_per_step)
    if not limits:
        raise ValueError("nothing ends the run: give steps, images or hours")
    ended_by = min(limits, key=lambda name: limits[name])
    if limits[ended_by] < 1:
        raise ValueError(f"{ended_by} allows {limits[ended_by]} steps of {images_per_step} images; it must allow one")
    measured = seconds_per_step if hours is not None else None
    return Budget(steps=limits[ended_by], images_per_step=images_per_step, ended_by=ended_by, seconds_per_step=measured)


def scaled_lr(lr: float, *, batch: int, rule: Rule = "sqrt", reference_batch: int = 1024) -> float:
    """Return the peak learning rate for `batch` images an optimiser step.

    "sqrt": lr * sqrt(batch / reference), as DINOv2 with reference 1024; DINOv3's 4 * sqrt(batch / 1024) is
    reference 64. "linear": lr * batch / reference, as SimCLR and DINO with reference 256. "none": lr.

    Raises:
        ValueError: a batch or reference below 1, or an unknown rule.
    """
    if min(batch, reference_batch) < 1:
        raise ValueError(f"batch {batch} and reference_batch {reference_batch} must be at least 1")
    ratio = batch / reference_batch
    factors = {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}
    if rule not in factors:
        raise ValueError(f"no learning rate rule is called {rule!r}; choose one of {', '.join(factors)}")
    return lr * factors[rule]


def ramp(step: int, *, start: float, end: float, over: int) -> float:
    """Return a point of the line from `start` at step 0 to `end` at step over - 1; `end` ever after."""
    if step >= over:
        return end
    return start + (end - start) * step / (over - 1) if over > 1 else start


def cosine(step: int, *, start: float, end: float, steps: int, warmup: int = 0) -> float:
    """Return `ramp` from 0 to `start` over the warm-up, then half a cosine from `start` down or up to `end`.

    end + (start - end) (1 + cos(pi i / n)) / 2 for i = 0 ... n - 1, n = steps - warmup, and `end` from step `steps` on
    (as DINOv2's CosineScheduler: the last step of the run is one step short of `end`).
    """
    if step < warmup:
        return ramp(step, start=0.0, end=start, over=warmup)
    if step >= steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSpec:
    """The shape of a run; lengths are shares of its steps, pairs are (first, last). Defaults: DINOv2's ViT-L/14.

    Attributes:
        shape: "cosine", or "constant": after warm-up, learning rate, weight decay and momentum keep their first value
            (DINOv3).
        warmup: share of the steps over which the learning rate rises from 0.
        lr_end: last learning rate, not scaled by the batch.
        weight_decay: of weights and tokens; biases, norms and LayerScale have none.
        momentum: of the teacher's moving average.
        temperature: of the teacher, a straight line over `temperature_warmup`, then its last value.
        temperature_warmup: share of the steps that the temperature takes.
        freeze_last_layer: share of the steps in which the learning rate of the heads' last layer is 0.
        warm_start: for continued and high-resolution training: begin where a run ends (see `warmed`).
    """

    shape: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.16
    lr_end: float = 1e-6
    weight_decay: tuple[float, float] = (0.04, 0.2)
    momentum: tuple[float, float] = (0.994, 1.0)
    temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.06
    freeze_last_layer: float = 0.002
    warm_start: bool = False

    def __post_init__(self) -> None:
        """Refuse what no run can follow."""
        shares = ("warmup", "temperature_warmup", "freeze_last_layer")
        checks = [(name, 0 <= getattr(self, name) <= 1, "a share of the steps, 0 to 1") for name in shares]
        checks += [
            ("shape", self.shape in ("cosine", "constant"), "'cosine' or 'constant'"),
            ("lr_end", self.lr_end >= 0, "0 or more"),
            ("weight_decay", min(self.weight_decay) >= 0, "two numbers of 0 or more"),
            ("momentum", min(self.momentum) >= 0 and max(self.momentum) <= 1, "two numbers from 0 to 1"),
            ("temperature", min(self.temperature) > 0, "two numbers above 0"),
            (
                "momentum",
                not self.warm_start or self.momentum[0] >= WARM_MOMENTUM,
                f"at least {WARM_MOMENTUM} at a warm start, such as [0.9995, 0.9995]: a lower one replaces the teacher "
                "within its first steps",
            ),
        ]
        for name, fine, needed in checks:
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {needed}")


def warmed(spec: ScheduleSpec) -> ScheduleSpec:
    """Return the spec that begins where a run ends, if `warm_start`; else `spec`.

    Weight decay and temperature hold their last values and no layer is frozen; the learning rate still warms up,
    because the optimiser's moments are new, and the momentum is as written.
    """
    if not spec.warm_start:
        return spec
    decay, temperature = spec.weight_decay[1], spec.temperature[1]
    return replace(
        spec,
        weight_decay=(decay, decay),
        temperature=(temperature, temperature),
        temperature_warmup=0.0,
        freeze_last_layer=0.0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepValues:
    """What one optimiser step uses.

    Attributes:
        lr: learning rate before the multipliers of the parameter groups.
        last_layer_lr: the same for the heads' last layer; 0 while it is frozen.
        weight_decay: before the multipliers.
        momentum: of the teacher's moving average after this step.
        temperature: of the teacher.
    """

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    temperature: float


def step_values(step: int, spec: ScheduleSpec, *, lr: float, steps: int) -> StepValues:
    """Return the values of optimiser step `step` (0 is the first) of a run of `steps`; from `steps` on, the last ones.

    Args:
        step: number of optimiser steps already made.
        spec: the shape of the run.
        lr: peak learning rate, already scaled by `scaled_lr`.
        steps: `Budget.steps`.

    Raises:
        ValueError: a negative step, or a run without steps.
    """
    if step < 0 or steps < 1:
        raise ValueError(f"step {step} of {steps}: steps count from 0, and a run has at least one")
    spec = warmed(spec)
    warmup, thaw = round(spec.warmup * steps), round(spec.freeze_last_layer * steps)
    held = spec.shape == "constant"
    rate = cosine(step, start=lr, end=lr if held else spec.lr_end, steps=steps, warmup=warmup)
    first, last = spec.temperature
    return StepValues(
        lr=rate,
        last_layer_lr=0.0 if step < thaw else rate,
        weight_decay=_from_to(step, spec.weight_decay, steps, held),
        momentum=_from_to(step, spec.momentum, steps, held),
        temperature=ramp(step, start=first, end=last, over=round(spec.temperature_warmup * steps)),
    )


def _from_to(step: int, pair: tuple[float, float], steps: int, held: bool) -> float:
    return pair[0] if held else cosine(step, start=pair[0], end=pair[1], steps=steps)
