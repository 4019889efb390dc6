from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from lightly.utils.scheduler import cosine_schedule

from eosin.pretrain.schedules import Budget, ScheduleSpec, cosine, ramp, resolve_budget, scaled_lr, step_values, warmed


def upstream(base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> np.ndarray:
    """The array of DINOv2's CosineScheduler, as the reference states it, written with numpy."""
    i = np.arange(total - warmup)
    rest = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate((np.linspace(start, base, warmup), rest))


@pytest.mark.parametrize(
    ("lr", "batch", "expected"),
    [
        (4e-3, 2048, 5.657e-3),
        (2e-4, 3072, 3.464e-4),
        (2e-4, 384, 1.225e-4),
        (3e-4, 384, 1.837e-4),
        (3.5e-4, 768, 3.031e-4),
    ],
)
def test_the_square_root_rule_gives_the_published_rates(lr: float, batch: int, expected: float) -> None:
    assert scaled_lr(lr, batch=batch) == pytest.approx(expected, abs=5e-4 * 10 ** math.floor(math.log10(expected)))


def test_the_other_rules() -> None:
    # DINOv3: 4 sqrt(B / 1024) is the square root against 64, 4e-4 at 4096 from 5e-5.
    assert scaled_lr(5e-5, batch=4096, reference_batch=64) == pytest.approx(4e-4)
    assert scaled_lr(0.3, batch=512, rule="linear", reference_batch=256) == pytest.approx(0.6)
    assert scaled_lr(0.3, batch=512, rule="none") == 0.3
    with pytest.raises(ValueError, match="no learning rate rule is called 'cube'"):
        scaled_lr(0.3, batch=512, rule="cube")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must be at least 1"):
        scaled_lr(0.3, batch=0)


@pytest.mark.parametrize(("total", "warmup"), [(1250, 125), (37, 1), (10, 0), (12, 12)])
def test_cosine_equals_the_reference_array(total: int, warmup: int) -> None:
    ours = [cosine(i, start=4e-3, end=1e-6, steps=total, warmup=warmup) for i in range(total + 3)]
    np.testing.assert_allclose(ours[:total], upstream(4e-3, 1e-6, total, warmup), rtol=1e-12, atol=1e-18)
    assert ours[total:] == [1e-6] * 3


def test_cosine_equals_lightly_where_the_definitions_meet() -> None:
    """Lightly reaches the end at step n - 1, DINOv2 at step n: lightly over n + 1 steps is ours over n."""
    for step in range(100):
        theirs = cosine_schedule(step=step, max_steps=101, start_value=0.994, end_value=1.0)
        assert cosine(step, start=0.994, end=1.0, steps=100) == pytest.approx(theirs, abs=1e-12)


def test_a_ramp_is_numpy_linspace() -> None:
    np.testing.assert_allclose(
        [ramp(i, start=0.04, end=0.07, over=30) for i in range(30)], np.linspace(0.04, 0.07, 30), rtol=1e-12
    )
    assert ramp(30, start=0.04, end=0.07, over=30) == ramp(10**9, start=0.04, end=0.07, over=30) == 0.07
    assert ramp(0, start=0.04, end=0.07, over=0) == 0.07


def test_dinov2_fast_recipe_step_by_step() -> None:
    """ViT-L/16 of 125,000 steps: warm-up 12,500, temperature over 37,500, last layer frozen for 1,250."""
    spec = ScheduleSpec(
        warmup=0.1, weight_decay=(0.04, 0.4), momentum=(0.992, 1.0), temperature_warmup=0.3, freeze_last_layer=0.01
    )
    steps, lr = 125_000, scaled_lr(4e-3, batch=2048)
    rate = upstream(lr, 1e-6, steps, 12_500)
    decay, momentum = upstream(0.04, 0.4, steps), upstream(0.992, 1.0, steps)
    temperature = np.concatenate((np.linspace(0.04, 0.07, 37_500), np.full(steps - 37_500, 0.07)))
    for step in [0, 1, 1249, 1250, 12_499, 12_500, 37_499, 37_500, 80_000, steps - 1]:
        values = step_values(step, spec, lr=lr, steps=steps)
        found = (values.lr, values.weight_decay, values.momentum, values.temperature)
        np.testing.assert_allclose(found, (rate[step], decay[step], momentum[step], temperature[step]), rtol=1e-9)
        assert values.last_layer_lr == (0.0 if step < 1250 else values.lr)
    assert dataclasses.astuple(step_values(steps, spec, lr=lr, steps=steps)) == (1e-6, 1e-6, 0.4, 1.0, 0.07)


@pytest.mark.parametrize("steps", [7, 100, 12_345])
def test_every_schedule_ends_with_the_budget(steps: int) -> None:
    """The learning rate has fallen to within 1/n of its end, whatever limit made the number of steps."""
    last = step_values(steps - 1, ScheduleSpec(), lr=1.0, steps=steps)
    gap = math.sin(math.pi / (2 * (steps - round(0.16 * steps)))) ** 2  # (1 + cos(pi (n - 1) / n)) / 2
    assert last.lr == pytest.approx(1e-6 + (1 - 1e-6) * gap, rel=1e-9)
    assert last.temperature == 0.07


def test_constant_schedules_hold_after_the_warm_up() -> None:
    spec = ScheduleSpec(shape="constant", warmup=0.1, momentum=(0.994, 1.0), weight_decay=(0.04, 0.2))
    for step in (100, 500, 999, 5000):
        values = step_values(step, spec, lr=4e-4, steps=1000)
        assert (values.lr, values.weight_decay, values.momentum) == (4e-4, 0.04, 0.994)
    assert step_values(50, spec, lr=4e-4, steps=1000).lr == pytest.approx(4e-4 * 50 / 99)


def test_a_warm_start_begins_where_a_run_ends() -> None:
    cold = ScheduleSpec(momentum=(0.994, 1.0))
    warm = ScheduleSpec(momentum=(0.9995, 0.9995), warm_start=True)
    end = step_values(1000, cold, lr=1e-4, steps=1000)
    first = step_values(0, warm, lr=1e-4, steps=1000)
    assert (first.temperature, first.weight_decay, first.momentum) == (end.temperature, end.weight_decay, 0.9995)
    assert first.lr == 0
    assert step_values(1, warm, lr=1e-4, steps=1000).last_layer_lr > 0
    assert warmed(cold) is cold


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"momentum": (0.9, 1.2)}, r"momentum is \(0.9, 1.2\)"),
        ({"temperature": (0.0, 0.07)}, "temperature is"),
        ({"weight_decay": (-0.1, 0.2)}, "weight_decay is"),
        ({"shape": "triangle"}, "'cosine' or 'constant'"),
        ({"warm_start": True}, "at least 0.999 at a warm start"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ScheduleSpec(**changes)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("step", "steps"), [(-1, 10), (0, 0)])
def test_impossible_steps_are_refused(step: int, steps: int) -> None:
    with pytest.raises(ValueError, match="steps count from 0"):
        step_values(step, ScheduleSpec(), lr=1.0, steps=steps)


def test_the_smallest_limit_ends_the_run() -> None:
    assert resolve_budget(images_per_step=64, steps=100) == Budget(steps=100, images_per_step=64, ended_by="steps")
    budget = resolve_budget(images_per_step=64, steps=100, images=6000)
    assert (budget.steps, budget.ended_by, budget.images) == (93, "images", 5952)
    budget = resolve_budget(images_per_step=64, steps=100, images=6000, hours=0.01, seconds_per_step=0.5)
    assert (budget.steps, budget.ended_by) == (72, "hours")
    assert str(budget) == "72 optimiser steps of 64 images, ended by hours (measured 0.5 s a step)"


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "nothing ends the run"),
        ({"hours": 1.0}, "measure a step"),
        ({"hours": 1.0, "seconds_per_step": 0.0}, "measure a step"),
        ({"images": 63}, "images allows 0 steps of 64 images"),
        ({"steps": 0}, "steps allows 0 steps"),
    ],
)
def test_a_run_without_an_end_is_refused(limits: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_budget(images_per_step=64, **limits)  # pyright: ignore[reportArgumentType]
