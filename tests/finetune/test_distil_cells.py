"""Distillation: the loss is the closed form, a student agrees with its teacher and with no other, and stays honest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr
from torch import Tensor, nn
from traingen import classifier, encoder, job, quick, write_encoder

from eosin.encoders import load_encoder
from eosin.encoders.encoder import Encoder
from eosin.errors import ConfigError
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.classifier import Classifier
from eosin.finetune.distil import DistilConfig, Distillation, answer, feature_loss, logit_loss
from eosin.finetune.infer import Ensemble, tile_logits
from eosin.finetune.saving import trained_state
from eosin.finetune.train import Job, Status, train_fold

LOGITS = torch.linspace(-6, 6, 25, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_the_loss_of_logits_is_the_divergence_of_two_coins(temperature: float) -> None:
    s, t = torch.cartesian_prod(LOGITS, LOGITS).T
    q, p = expit(s.numpy() / temperature), expit(t.numpy() / temperature)
    expected = temperature**2 * (rel_entr(p, q) + rel_entr(1 - p, 1 - q))
    found = logit_loss(s, t, temperature=temperature)
    assert found.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.equal(logit_loss(t, t, temperature=temperature), torch.zeros_like(t))
    assert float(found.min()) >= -1e-12


def test_the_gradient_keeps_its_size_when_the_temperature_changes() -> None:
    """Hinton et al. 2015, equations 2-4: T (q - p), which tends to half the half of the difference of two logits."""
    t = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    for temperature in (1.0, 3.0, 1e4):
        s = t.flip(0).clone().requires_grad_()
        logit_loss(s, t, temperature=temperature).sum().backward()
        expected = temperature * (torch.sigmoid(s / temperature) - torch.sigmoid(t / temperature))
        assert s.grad is not None
        torch.testing.assert_close(s.grad, expected.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(s.grad, (s - t).detach() / 4, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_huge_logits_have_finite_gradients(size: float) -> None:
    s = torch.tensor([size, -size, size, 0.0], requires_grad=True)
    loss = logit_loss(s[:, None], torch.tensor([-size, size, size, -size]), temperature=1.0)
    loss.sum().backward()
    assert s.grad is not None
    assert bool(loss.isfinite().all() & s.grad.isfinite().all())
    assert loss[:2].tolist() == pytest.approx([size, size], rel=1e-6)


def test_the_loss_of_vectors_is_that_of_their_direction() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 12, generator=random, dtype=torch.float64)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(feature_loss(a, b), 1 - cosine)
    torch.testing.assert_close(feature_loss(a, 5 * a), torch.zeros(7, dtype=torch.float64))
    an, bn = ((x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for x in (a, b))
    gap = (an - bn).abs()
    expected = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(1)
    torch.testing.assert_close(feature_loss(a, b, compare="smooth-l1"), expected)
    assert float(feature_loss(a, a, compare="smooth-l1").max()) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"label": -1.0}, "the share of label is -1.0"),
        ({"feature": float("nan")}, "the share of feature is nan"),
        ({"logit": 0.0, "feature": 0.0}, "nothing of the teacher would be learned"),
        ({"compare": "l2"}, "cannot be compared by 'l2'; choose cosine or smooth-l1"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistilConfig(**changes)


def ensemble(model: nn.Module, given: Job) -> Ensemble:
    return Ensemble([model], given.how, threshold=0.5, tta="none")


@pytest.mark.parametrize("compare", ["cosine", "smooth-l1"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path: Path, compare: Any) -> None:
    model, given = classifier(tmp_path).eval(), job(tmp_path)
    lesson = Distillation(model, ensemble(classifier(tmp_path), given), DistilConfig(compare=compare), identity="x")
    assert isinstance(lesson.module, nn.Linear)
    nn.init.eye_(lesson.module.weight)
    seen = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    logits, loss = lesson(model, given.how.prepare(seen), seen)
    torch.testing.assert_close(logits, model(given.how.prepare(seen)))
    torch.testing.assert_close(loss, torch.zeros(4), rtol=0, atol=1e-6)
    other = classifier(tmp_path, seed=1).eval()
    nn.init.normal_(other.head.weight)
    assert float(lesson(other, given.how.prepare(seen), seen)[1].detach().min()) > 0


def test_the_shares_of_the_losses_add_up(tmp_path: Path) -> None:
    given, teacher, student = job(tmp_path), classifier(tmp_path), classifier(tmp_path, seed=3).eval()
    nn.init.normal_(teacher.head.weight)
    seen = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    x, parts = given.how.prepare(seen), []
    for logit, feature in ((1.0, 0.0), (0.0, 1.0), (0.7, 3.0)):
        how = DistilConfig(logit=logit, feature=feature, temperature=3.0)
        lesson = Distillation(student, ensemble(teacher, given), how, identity="x")
        parts.append(lesson(student, x, seen)[1].detach())
    torch.testing.assert_close(parts[2], 0.7 * parts[0] + 3 * parts[1])
    with torch.no_grad():
        expected = logit_loss(student(x), teacher.eval()(x), temperature=3.0)
    torch.testing.assert_close(parts[0], expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# Training.


def student_of(folder: Path) -> Classifier:
    """Return a fresh student: an encoder of other random weights, all of which train."""
    path = folder / "student.safetensors"
    if not path.is_file():
        write_encoder(path, seed=7)
    found = load_encoder(path, device="cpu", precision="fp32")
    assert isinstance(found, Encoder)
    return Classifier(found.backbone, AdaptConfig(mode="full"), seed=2)


FULL = quick(adapt=AdaptConfig(mode="full"), epochs=6, lr=1e-3, sampling="shuffle", patience=9)


def withheld(given: Job) -> Job:
    """Return a job whose training labels say nothing."""
    label = given.cells.label.copy()
    label[given.fold.train] = np.random.default_rng(0).permutation(label[given.fold.train])
    return replace(given, cells=replace(given.cells, label=label))


class Shuffled(Distillation):
    """A teacher whose answers are those on other images."""

    def __call__(self, model: Any, given: Tensor, seen: Tensor, /) -> tuple[Tensor, Tensor]:
        return super().__call__(model, given, seen.roll(1, 0))


@pytest.mark.slow
def test_a_student_without_labels_agrees_with_its_teacher_and_with_no_shuffled_one(tmp_path: Path) -> None:
    given = job(tmp_path, config=quick(epochs=8, lr=1e-2))
    teacher = classifier(tmp_path)
    train_fold(teacher, given)
    pupil = replace(withheld(given), config=replace(FULL, epochs=12, lr=2e-3))
    wanted = tile_logits(teacher, given.tiles[given.fold.test], given.how)
    found = {}
    for kind in (Distillation, Shuffled):
        student = student_of(tmp_path)
        lesson = kind(student, ensemble(teacher, given), DistilConfig(label=0.0), identity="x")
        train_fold(student, pupil, lesson=lesson)
        found[kind] = tile_logits(student, given.tiles[given.fold.test], given.how)
    left = {kind: float(((logits - wanted) ** 2).mean() / wanted.var()) for kind, logits in found.items()}
    same = {kind: float(((logits > 0) == (wanted > 0)).mean()) for kind, logits in found.items()}
    assert (left[Distillation] < 0.3) & (same[Distillation] > 0.9)
    assert (left[Shuffled] > 0.8) & (same[Shuffled] < 0.75)


class StoppedError(Exception):
    pass


@pytest.mark.slow
def test_goes_on_bit_by_bit_with_its_teacher(tmp_path: Path) -> None:
    given = replace(job(tmp_path, config=FULL), config=replace(FULL, epochs=3))
    given = replace(given, fold=replace(given.fold, train=given.fold.train[:-20]), unlabelled=given.fold.train[-20:])
    teacher = classifier(tmp_path)
    nn.init.normal_(teacher.head.weight)

    def lesson(student: Classifier, seed: int = 0) -> Distillation:
        return Distillation(student, ensemble(teacher, given), DistilConfig(), identity="x", seed=seed)

    def stop(status: Status) -> None:
        if status.epoch == 2:
            raise StoppedError

    whole, half, rest = (student_of(tmp_path) for _ in range(3))
    expected = train_fold(whole, given, folder=tmp_path / "whole", lesson=lesson(whole))
    with pytest.raises(StoppedError):
        train_fold(half, given, folder=tmp_path / "half", lesson=lesson(half), progress=stop)
    later = lesson(rest, seed=5)  # another W: it must come from the state
    assert train_fold(rest, given, folder=tmp_path / "half", lesson=later) == expected
    ours, theirs = trained_state(rest), trained_state(whole)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.slow
def test_cells_without_a_label_count_for_the_teacher_alone(tmp_path: Path) -> None:
    given = replace(job(tmp_path, config=FULL), config=replace(FULL, epochs=1))
    rows = given.fold.train
    given = replace(given, fold=replace(given.fold, train=rows[:-20]), unlabelled=rows[-20:])
    teacher = classifier(tmp_path)
    nn.init.normal_(teacher.head.weight)
    label = given.cells.label.copy()
    label[given.unlabelled] = 1 - label[given.unlabelled]
    flipped = replace(given, cells=replace(given.cells, label=label))
    fewer = replace(given, unlabelled=given.unlabelled[:10])
    states = []
    for one in (given, flipped, fewer):
        student = student_of(tmp_path)
        lesson = Distillation(student, ensemble(teacher, given), DistilConfig(), identity="x")
        train_fold(student, one, lesson=lesson)
        states.append({name: value.clone() for name, value in trained_state(student).items()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    with pytest.raises(ConfigError, match="20 cells without a label need a teacher"):
        train_fold(student_of(tmp_path), given)


def test_no_classifier_cannot_teach() -> None:
    with pytest.raises(ConfigError, match="Identity is no classifier"):
        answer(nn.Identity(), torch.zeros(1, 3, 8, 8))


def test_encoder_helper_is_the_teachers(tmp_path: Path) -> None:
    """The student of these tests has other weights than the teacher."""
    teacher, student = encoder(tmp_path), student_of(tmp_path)
    assert teacher.spec.weights_hash != student.spec.weights_hash
