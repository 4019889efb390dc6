"""SgdProbe against AdamW written out in numpy, its convex optimum, and the rules of the protocol."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from eosin.errors import LabelError
from eosin.heads.sgd import SgdProbe

torch = pytest.importorskip("torch")


def data(n: int = 200, d: int = 6, classes: int = 2) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, d)).astype(np.float32)
    score = 1.5 * x @ rng.standard_normal((d, classes)) + rng.gumbel(size=(n, classes))
    return x, score.argmax(axis=1)


def adamw(x: Any, y: Any, start: Any, *, steps: int, lr: float, decay: float) -> Any:
    """Return weights (K, D + 1), bias last, after full-batch AdamW (Loshchilov & Hutter 2019, algorithm 2)."""
    theta, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    ones = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    target = np.eye(len(start))[y] if len(start) > 1 else y[:, None]
    for step in range(1, steps + 1):
        margin = ones @ theta.T
        p = softmax(margin, axis=1) if len(start) > 1 else expit(margin)
        gradient = (p - target).T @ ones / len(x)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        theta = theta * (1 - lr * decay)
        theta -= lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return theta


@pytest.mark.parametrize("classes", [2, 4])
def test_full_batches_follow_adamw(classes: int) -> None:
    x, y = data(classes=classes)
    how = {"batch_size": 200, "lr": 0.01, "weight_decay": 0.3, "seed": 3}
    start = SgdProbe(**{**how, "lr": 0.0}, steps=1).fit(x, y)
    begin = np.column_stack([start.coef_, start.intercept_])
    assert np.abs(begin).max() <= 1 / np.sqrt(6)
    probe = SgdProbe(**how, steps=150).fit(x, y)
    expected = adamw(x, y, begin, steps=150, lr=0.01, decay=0.3)
    np.testing.assert_allclose(np.column_stack([probe.coef_, probe.intercept_]), expected, atol=2e-5)
    assert (probe.steps_, probe.best_step_) == (150, 150)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_long_run_without_decay_reaches_the_unpenalised_optimum(classes: int) -> None:
    x, y = data(classes=classes)
    probe = SgdProbe(steps=1500, batch_size=200, lr=0.1, weight_decay=0.0).fit(x, y)
    expected = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(x, y)
    np.testing.assert_allclose(probe.predict_proba(x), expected.predict_proba(x), atol=1e-3)


def test_an_epoch_uses_every_row_once_and_the_budget_is_exact() -> None:
    x, y = data(n=10, d=10)
    x, y = np.eye(10, dtype=np.float32), np.arange(10) % 2
    how = {"batch_size": 4, "lr": 0.01, "weight_decay": 0.0}
    start = SgdProbe(**{**how, "lr": 0.0}, steps=1).fit(x, y)
    for steps, moved in ((1, 4), (2, 8), (3, 10)):  # batches of 4, 4 and 2 different rows; row i moves weight i only
        probe = SgdProbe(**how, steps=steps).fit(x, y)
        assert (probe.coef_ != start.coef_).sum() == moved
        assert probe.steps_ == steps


def test_keeps_the_best_epoch_and_stops_after_a_fifth_of_the_epochs_without_a_better_one() -> None:
    x, y = data(n=300)
    rng = np.random.default_rng(1)
    y = np.where(rng.random(300) < 0.3, 1 - y, y)
    train, val = np.arange(200), np.arange(200, 300)
    probe = SgdProbe(steps=1000, batch_size=50, lr=0.02).fit(x, y, split=(train, val))  # 250 epochs of 4, patience 50
    best = int(probe.history_.argmax())  # the first of equals
    assert probe.best_step_ == 4 * (best + 1)
    assert len(probe.history_) == best + 1 + 50
    assert probe.steps_ == 4 * len(probe.history_) < 1000
    assert balanced_accuracy_score(y[val], probe.predict(x[val])) == pytest.approx(probe.history_.max())
    same = SgdProbe(steps=probe.best_step_, batch_size=50, lr=0.02).fit(x[train], y[train])
    np.testing.assert_array_equal(same.coef_, probe.coef_)


def test_the_seed_decides_and_the_global_stream_is_left_alone() -> None:
    x, y = data()
    before = torch.random.get_rng_state()
    first = SgdProbe(steps=20, seed=1).fit(x, y)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(first.coef_, clone(first).fit(x, y).coef_)
    assert np.abs(first.coef_ - SgdProbe(steps=20, seed=2).fit(x, y).coef_).max() > 1e-3


def test_default_budget_is_the_published_one() -> None:
    expected = {"steps": 12_500, "batch_size": 256, "lr": 3e-4, "weight_decay": 0.01, "device": "cpu", "seed": 0}
    assert SgdProbe().get_params() == expected


def test_string_labels() -> None:
    x, y = data(classes=3)
    probe = SgdProbe(steps=300, lr=0.05).fit(x, np.array(["a", "b", "c"])[y])
    assert probe.classes_.tolist() == ["a", "b", "c"]
    assert (probe.predict(x) == np.array(["a", "b", "c"])[y]).mean() > 0.5
    np.testing.assert_allclose(probe.predict_proba(x).sum(axis=1), 1)


def test_bad_input_raises() -> None:
    x, y = data(n=20)
    with pytest.raises(LabelError, match="1 class"):
        SgdProbe().fit(x, np.zeros(20))
    with pytest.raises(LabelError, match=r"no \[0\]"):
        SgdProbe().fit(x, y, split=(np.flatnonzero(y == 1), np.flatnonzero(y == 0)))
    with pytest.raises(ValueError, match="empty"):
        SgdProbe().fit(x, y, split=(np.arange(20), np.arange(0)))
    with pytest.raises(ValueError, match="1 or more"):
        SgdProbe(steps=0).fit(x, y)


def test_importing_the_heads_does_not_import_torch() -> None:
    code = "import sys, eosin.heads.linear, eosin.heads.sgd; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
