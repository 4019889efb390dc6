"""Training: it learns, goes on bit by bit, repeats itself, stops early, and names the cells of a NaN."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from traingen import classifier, job, quick

from eosin.encoders import load_encoder
from eosin.errors import CheckpointError, NonFiniteError
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.augment import AugmentConfig
from eosin.finetune.classifier import Classifier
from eosin.finetune.mix import MixConfig
from eosin.finetune.quicker import quicker
from eosin.finetune.resume import load_state
from eosin.finetune.saving import trained_state
from eosin.finetune.train import STATE, Status, domain_scores, schedule, train_fold

pytestmark = pytest.mark.slow


class StoppedError(Exception):
    pass


def stop_after(epochs: int) -> object:
    def tell(status: Status) -> None:
        if status.epoch == epochs:
            raise StoppedError

    return tell


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("mode", ["lora", "full", "head"])
def test_learns(tmp_path: Path, mode: str) -> None:
    adapt = AdaptConfig(mode=mode, rank=4)  # pyright: ignore[reportArgumentType]
    config = quick(adapt=adapt, epochs=8, lr=1e-3 if mode == "full" else 1e-2)
    model = classifier(tmp_path, mode=mode, rank=4)
    told: list[Status] = []
    done = train_fold(model, job(tmp_path, config=config), progress=told.append)
    best = done.history[done.best_epoch - 1]
    assert best["auroc"] > (0.8 if mode == "head" else 0.95)
    assert best["auroc"] == max(row["auroc"] for row in done.history)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert [status.epoch for status in told] == list(range(1, len(done.history) + 1))
    assert told[0].fold == "fold 1"
    assert {name for name, _, _ in told[0].domains} <= {"A", "B"}
    assert math.isclose(sum(n for _, n, _ in told[0].domains), len(job(tmp_path).fold.stop))


EVERYTHING = {
    "plain": quick(),
    "all": quick(
        augment=AugmentConfig(),
        mix=MixConfig(mixup_chance=0.5),
        adapt=AdaptConfig(dropout=0.3),
        domain_weights="domain-class",
        sampling="domain-class",
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_goes_on_bit_by_bit(tmp_path: Path, name: str) -> None:
    config = EVERYTHING[name]
    adapt: dict[str, Any] = {"dropout": config.adapt.dropout}
    whole, halves = classifier(tmp_path, **adapt), classifier(tmp_path, **adapt)
    expected = train_fold(whole, job(tmp_path, config=config), folder=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train_fold(
            halves,
            job(tmp_path, config=config),
            folder=tmp_path / "halves",
            progress=stop_after(2),  # pyright: ignore[reportArgumentType]
        )
    again = classifier(tmp_path, seed=9, **adapt)  # other random values: all of them must come from the state
    torch.rand(3)
    found = train_fold(again, job(tmp_path, config=config), folder=tmp_path / "halves")
    assert found == expected
    assert same(trained_state(again), trained_state(whole))
    states = [load_state(tmp_path / which / STATE) for which in ("whole", "halves")]
    assert same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_a_finished_fold_is_not_trained_again(tmp_path: Path) -> None:
    model = classifier(tmp_path)
    first = train_fold(model, job(tmp_path), folder=tmp_path / "run")

    def fail(status: Status) -> None:
        raise AssertionError(status)

    other = classifier(tmp_path, seed=5)
    assert train_fold(other, job(tmp_path), folder=tmp_path / "run", progress=fail) == first
    assert same(trained_state(other), trained_state(model))


def test_seed_decides_and_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two, other = (classifier(tmp_path) for _ in range(3))
    histories = [train_fold(model, job(tmp_path)).history for model in (one, two)]
    assert torch.equal(before, torch.get_rng_state())
    assert histories[0] == histories[1]
    assert same(trained_state(one), trained_state(two))
    train_fold(other, replace(job(tmp_path), config=quick(seed=1)))
    assert not same(trained_state(one), trained_state(other))


def test_moving_average_of_one_step_is_the_closed_form(tmp_path: Path) -> None:
    start = trained_state(classifier(tmp_path))
    results = []
    for ema in (0.0, 0.9):
        model = classifier(tmp_path)
        train_fold(model, job(tmp_path, config=quick(epochs=1, batch=1000, ema=ema, warmup=0.0)))
        results.append(trained_state(model))
    for name, value in results[1].items():  # the first step counts at least nine tenths
        assert torch.allclose(value, 0.1 * start[name] + 0.9 * results[0][name], atol=1e-7)
    assert not torch.equal(results[0]["head.weight"], start["head.weight"])


def test_patience_ends_a_fold_that_stands_still(tmp_path: Path) -> None:
    done = train_fold(classifier(tmp_path), job(tmp_path, config=quick(lr=1e-30, epochs=9, patience=2)))
    assert (len(done.history), done.best_epoch, done.stopped_early) == (3, 1, True)


def test_nan_names_its_cells(tmp_path: Path) -> None:
    given, model = job(tmp_path), classifier(tmp_path)
    marked = given.tiles.copy()
    bad = int(given.fold.train[5])
    marked[bad] = 255

    def poison(module: object, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        white = (args[0] > 2.2).flatten(1).all(1)
        return torch.where(white[:, None], torch.nan, out)

    model.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match=rf"NaN or infinite in \d of 16 rows.*{given.cells.file[bad]}"):
        train_fold(model, replace(given, tiles=marked), folder=tmp_path / "run")
    assert not (tmp_path / "run" / STATE).exists()


def test_infinite_gradient_names_the_batch(tmp_path: Path) -> None:
    model = classifier(tmp_path)
    model.head.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(
        NonFiniteError, match=r"fold 1, epoch 1, step 1: the gradient is NaN .*cell-\d+\.png.*and 8 more"
    ):
        train_fold(model, job(tmp_path))


def test_state_of_another_run_is_refused(tmp_path: Path) -> None:
    train_fold(classifier(tmp_path), job(tmp_path, config=quick(epochs=1)), folder=tmp_path / "run")
    for other in (job(tmp_path, config=quick(epochs=2)), job(tmp_path, config=quick(epochs=1), seed=4)):
        with pytest.raises(CheckpointError, match="another recipe, table, fold or encoder"):
            train_fold(classifier(tmp_path), other, folder=tmp_path / "run")
    (tmp_path / "run" / STATE).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="is no state of a fold"):
        train_fold(classifier(tmp_path), job(tmp_path, config=quick(epochs=1)), folder=tmp_path / "run")


def test_interrupted_save_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoppedError):
        train_fold(
            classifier(tmp_path),
            job(tmp_path),
            folder=tmp_path / "run",
            progress=stop_after(1),  # pyright: ignore[reportArgumentType]
        )
    before = (tmp_path / "run" / STATE).read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("eosin.finetune.resume.replace_durably", full)
    with pytest.raises(OSError, match="no space left"):
        train_fold(classifier(tmp_path), job(tmp_path), folder=tmp_path / "run")
    assert (tmp_path / "run" / STATE).read_bytes() == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == [STATE]


def test_schedule_is_a_line_and_half_a_cosine() -> None:
    values = [schedule(step, steps=100, warmup=0.1) for step in range(100)]
    assert values[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert values[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 90)) for i in range(90)])
    assert schedule(0, steps=10, warmup=0.0) == 1.0


def test_domains_of_one_class_have_no_balanced_accuracy() -> None:
    label, p = np.array([0, 1, 1, 0, 0]), np.array([0.1, 0.9, 0.2, 0.7, 0.2])
    domain = np.array(["a", "a", "a", "b", "b"])
    assert domain_scores(label, p, domain) == [("a", 3, 0.75), ("b", 2, None)]


@pytest.mark.parametrize("mode", ["lora", "last", "full"])
def test_what_makes_training_quicker_changes_rounding_only_and_is_taken_back(tmp_path: Path, mode: str) -> None:
    """Logits and gradients are within 2 % of those in float32, or as near as plain bfloat16's; every bit comes back."""
    encoder: Any = load_encoder("eosin-tiny", device="cpu", precision="bf16", backend="torch")
    model = Classifier(encoder.backbone, AdaptConfig(mode=mode, dropout=0.0), seed=0).train()  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if ".up." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    given = replace(job(tmp_path, config=quick(crop_px=64)), precision="bf16")
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def gradients(*, half: bool) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(images).float()
        logits.square().sum().backward()
        grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        return logits.detach(), torch.cat(grads)

    exact, plain = gradients(half=False), gradients(half=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with quicker(model, given.how, device=given.device, precision=given.precision):
        quick_ones = gradients(half=True)
        frozen = [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad]
        assert all(p.dtype == torch.bfloat16 for p in frozen)
        assert bool(frozen) == (mode != "full")
    assert same(before, model.state_dict())
    for got, usual, true in zip(quick_ones, plain, exact, strict=True):
        assert float((got - true).norm()) < max(0.02 * float(true.norm()), 1.5 * float((usual - true).norm()))
