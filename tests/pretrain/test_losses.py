from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, NTXentLoss
from scipy.special import logsumexp
from torch.nn import functional as F
from torchmetrics.functional.pairwise import pairwise_cosine_similarity

from eosin.pretrain.losses import (
    CenteredSoftmax,
    dino_loss,
    gram_loss,
    ibot_loss,
    jepa_loss,
    kde,
    koleo,
    resize_patches,
    simclr,
    sinkhorn_knopp,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def float64(x):
    return x.detach().double().numpy()


def assert_same_with_gradient(ours, theirs, x, atol=1e-6):
    """Both losses (of one tensor) agree in value and in gradient."""
    values, grads = [], []
    for loss in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        grads.append(torch.autograd.grad(value, leaf)[0])
        values.append(value.detach())
    torch.testing.assert_close(values[0], values[1], atol=atol, rtol=3e-7)
    torch.testing.assert_close(grads[0], grads[1], atol=atol, rtol=1e-4)


# --- Sinkhorn-Knopp


def sinkhorn_by_the_book(logits, temperature, iterations):
    """The formula of SwAV and DINOv2 in float64, without any stabilisation."""
    q = np.exp(float64(logits) / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= q.shape[0]
        q /= q.sum(axis=0, keepdims=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_sinkhorn_equals_the_formula(temperature, iterations):
    logits = torch.randn(24, 50)
    ours = sinkhorn_knopp(logits, temperature, iterations=iterations)
    np.testing.assert_allclose(float64(ours), sinkhorn_by_the_book(logits, temperature, iterations), atol=2e-5)
    torch.testing.assert_close(ours.sum(dim=1), torch.ones(24), atol=1e-6, rtol=0)


def test_sinkhorn_converges_to_optimal_transport():
    logits = torch.randn(20, 12)
    plan = ot.sinkhorn(np.full(20, 1 / 20), np.full(12, 1 / 12), -float64(logits), reg=0.5, stopThr=1e-12)
    ours = sinkhorn_knopp(logits, 0.5, iterations=300)
    np.testing.assert_allclose(float64(ours), 20 * plan, atol=1e-6)
    np.testing.assert_allclose(float64(ours.mean(dim=0)), 1 / 12, atol=1e-6)


def test_sinkhorn_does_not_see_a_constant_shift():
    logits = (torch.randn(16, 30) * 64).round() / 64
    for shift in (-1000.0, 3.5, 4096.0):
        assert torch.equal(sinkhorn_knopp(logits + shift, 0.04), sinkhorn_knopp(logits, 0.04))


def test_sinkhorn_is_finite_where_exp_overflows_and_underflows():
    logits = 1e4 * torch.randn(16, 30)
    logits[:, 3] = -1e6
    logits[5] = -1e5
    assert not torch.exp(logits / 0.04).isfinite().all()
    targets = sinkhorn_knopp(logits, 0.04)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(16), atol=1e-6, rtol=0)
    scaled = sinkhorn_knopp(3 * torch.randn(16, 30), 0.04)
    assert scaled.isfinite().all()


def test_sinkhorn_leaves_its_input_and_the_gradient_alone():
    logits = torch.randn(6, 9, requires_grad=True)
    before = logits.detach().clone()
    assert not sinkhorn_knopp(logits, 0.1).requires_grad
    assert torch.equal(logits, before)
    half = sinkhorn_knopp(before.bfloat16(), 0.1)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, sinkhorn_knopp(before.bfloat16().float(), 0.1))


def test_sinkhorn_of_nothing_and_of_one_row():
    assert sinkhorn_knopp(torch.zeros(0, 7), 0.1).shape == (0, 7)
    with pytest.raises(ValueError, match="got 1 row"):
        sinkhorn_knopp(torch.zeros(1, 7), 0.1)
    with pytest.raises(ValueError, match="iterations is 0"):
        sinkhorn_knopp(torch.zeros(3, 7), 0.1, iterations=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        sinkhorn_knopp(torch.zeros(3, 7), 0.0)


# --- DINO, iBOT and the centre


def test_dino_and_centre_equal_lightly_over_steps():
    theirs, centred = DINOLoss(20, teacher_temp=0.05, warmup_teacher_temp_epochs=1), CenteredSoftmax(20)
    for _ in range(4):
        teacher = [torch.randn(6, 20) + torch.arange(20) / 5 for _ in range(2)]
        student = 0.3 * torch.randn(10, 6, 20)
        targets = centred(torch.cat(teacher), 0.05).chunk(2)
        before = theirs.center.clone()

        def reference(s, teacher=teacher, before=before):
            theirs.center.copy_(before)
            return theirs(teacher, list(s), teacher_temp=0.05)

        assert_same_with_gradient(lambda s, t=targets: dino_loss(list(s), t), reference, student)
        torch.testing.assert_close(centred.center, theirs.center[0], atol=1e-6, rtol=0)
    assert float(centred.center.abs().max()) > 0.5


def test_dino_weights_every_pair_equally():
    student, teacher = torch.randn(10, 5, 8), torch.randn(2, 5, 8).softmax(dim=-1)
    total = 0.0
    for s in range(10):
        for t in range(2):
            if s != t:
                log_p = float64(student[s]) / 0.1
                log_p = log_p - logsumexp(log_p, axis=1, keepdims=True)
                total -= (float64(teacher[t]) * log_p).sum(axis=1).mean() / 18
    assert float(dino_loss(list(student), list(teacher))) == pytest.approx(total, abs=1e-5)
    swapped = dino_loss([student[1], student[0]], list(teacher))
    assert float(swapped) != pytest.approx(float(dino_loss(list(student[:2]), list(teacher))), abs=1e-3)


@pytest.mark.parametrize(("prototypes", "expected"), [(65536, 11.090), (131072, 11.784)])
def test_dino_starts_at_log_k(prototypes, expected):
    student, targets = torch.zeros(2, 3, prototypes), torch.rand(2, 3, prototypes).softmax(dim=-1)
    assert float(dino_loss(list(student), list(targets))) == pytest.approx(expected, abs=6e-4)


def test_one_global_crop_teaches_the_local_ones():
    student, teacher = torch.randn(3, 4, 6), torch.rand(4, 6).softmax(dim=-1)
    expected = np.mean([float(F.cross_entropy(s / 0.1, teacher)) for s in student[1:]])
    assert float(dino_loss(list(student), [teacher])) == pytest.approx(expected, abs=1e-6)


def random_masks(crops, patches, masked):
    order = torch.rand(crops, patches).argsort(dim=1).argsort(dim=1)
    return order < torch.tensor(masked)[:, None]


def test_ibot_equals_lightly_over_steps():
    theirs, centred = IBOTPatchLoss(20, teacher_temp=0.05), CenteredSoftmax(20)
    for step in range(3):
        masks = random_masks(6, 9, [0, 3, 1, 0, 9, step])
        count = int(masks.sum())
        teacher, student = torch.randn(count, 20) + 1, 0.3 * torch.randn(count, 20)
        targets = centred(teacher, 0.05)
        before = theirs.center.center.clone()

        def reference(s, teacher=teacher, masks=masks, before=before):
            theirs.center.center = before.clone()
            return theirs(teacher, s, masks[:, None, :])

        assert_same_with_gradient(lambda s, t=targets, m=masks: ibot_loss(s, t, m), reference, student)
        torch.testing.assert_close(centred.center, theirs.center.center, atol=1e-6, rtol=0)


def test_ibot_is_halved_by_unmasked_crops_and_zero_without_masks():
    masks = random_masks(4, 9, [4, 4, 0, 0])
    student, targets = torch.zeros(8, 32), torch.rand(8, 32).softmax(dim=-1)
    assert float(ibot_loss(student, targets, masks)) == pytest.approx(math.log(32) / 2, abs=1e-5)
    nothing = torch.zeros(0, 32, requires_grad=True)
    loss = ibot_loss(nothing, torch.zeros(0, 32), torch.zeros(4, 9, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0


def test_distillation_in_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(4, 5, 64), torch.randn(2, 5, 64).softmax(dim=-1)
    half = [s.bfloat16() for s in student]
    with torch.autocast("cpu", torch.bfloat16):
        loss = dino_loss(half, list(teacher))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dino_loss([s.float() for s in half], list(teacher)), atol=1e-6, rtol=0)


def test_crops_and_shapes_that_do_not_fit():
    x = torch.rand(3, 4)
    with pytest.raises(ValueError, match="1 student and 1 teacher crops make no pair"):
        dino_loss([x], [x])
    with pytest.raises(ValueError, match="2 student and 0 teacher"):
        dino_loss([x, x], [])
    with pytest.raises(ValueError, match="2 student and 3 teacher"):
        dino_loss([x, x], [x, x, x])
    with pytest.raises(ValueError, match="one shape"):
        dino_loss([x, x[:2]], [x])
    masks = random_masks(2, 5, [2, 2])
    with pytest.raises(ValueError, match="masks hide 4 patches; logits of 3 came"):
        ibot_loss(x, x, masks)
    with pytest.raises(ValueError, match="student logits"):
        ibot_loss(x, x[:2], masks)


# --- JEPA and Gram


def test_jepa_equals_the_formula():
    masks = random_masks(3, 8, [4, 4, 4])
    predicted, teacher = torch.randn(12, 10), 3 * torch.randn(12, 10) + 2
    t = float64(teacher)
    t = (t - t.mean(axis=1, keepdims=True)) / np.sqrt(t.var(axis=1, keepdims=True) + 1e-5)
    d = np.abs(float64(predicted) - t)
    expected = np.where(d < 1, 0.5 * d**2, d - 0.5).mean()
    assert float(jepa_loss(predicted, teacher, masks)) == pytest.approx(expected, abs=1e-6)
    perfect = torch.tensor(t, dtype=torch.float32)
    assert float(jepa_loss(perfect, teacher, masks)) == pytest.approx(0, abs=1e-10)
    teacher.requires_grad_()
    assert not jepa_loss(predicted, teacher, masks).requires_grad


def test_gram_equals_torchmetrics():
    student, anchor = torch.randn(3, 7, 10), torch.randn(3, 7, 12)

    def reference(x):
        pairs = zip(x, anchor, strict=True)
        return torch.stack(
            [
                F.mse_loss(
                    pairwise_cosine_similarity(a, zero_diagonal=False),
                    pairwise_cosine_similarity(b, zero_diagonal=False),
                )
                for a, b in pairs
            ]
        ).mean()

    assert_same_with_gradient(lambda x: gram_loss(x, anchor), reference, student)
    rotation = torch.linalg.qr(torch.randn(10, 10)).Q
    assert float(gram_loss(student, 5 * student @ rotation)) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="one B and N"):
        gram_loss(student, anchor[:, :4])


def test_resized_patches_of_a_plane_stay_a_plane():
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    fine = torch.stack([x, y, 2 * x - y], dim=-1).reshape(1, 256, 3)
    coarse = resize_patches(fine, 8).reshape(8, 8, 3)
    y, x = torch.meshgrid(2 * torch.arange(8.0) + 0.5, 2 * torch.arange(8.0) + 0.5, indexing="ij")
    expected = torch.stack([x, y, 2 * x - y], dim=-1)
    torch.testing.assert_close(coarse[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(resize_patches(fine, 16), fine, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="15 patches"):
        resize_patches(torch.zeros(1, 15, 3), 2)


# --- KoLeo, KDE, SimCLR


def test_koleo_equals_lightly():
    assert_same_with_gradient(koleo, KoLeoLoss(), torch.randn(20, 16))


def test_koleo_closed_forms():
    assert float(koleo(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))) == pytest.approx(-math.log(2), abs=1e-6)
    assert float(koleo(5 * torch.eye(4))) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)
    twins = torch.ones(2, 384)
    assert float(koleo(twins)) == pytest.approx(15.40, abs=5e-3)
    assert float(koleo(torch.ones(2, 1024))) == pytest.approx(14.92, abs=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_koleo_is_finite_in_half_precision_with_duplicates(dtype, autocast):
    z = torch.randn(6, 384).to(dtype)
    z[1] = z[2] = z[0]
    z.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = koleo(z)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    torch.testing.assert_close(loss, koleo(z.detach().float()), atol=1e-6, rtol=0)
    assert z.grad[4:].abs().max() > 0


def test_koleo_gives_exact_twins_no_direction():
    z = torch.randn(1, 64).repeat(3, 1).requires_grad_()
    koleo(z).backward()
    assert not z.grad.any()
    near = (z.detach() + 1e-3 * torch.randn(3, 64)).requires_grad_()
    koleo(near).backward()
    assert near.grad.abs().sum(dim=1).min() > 0


def mean_cosine(z):
    similarity = pairwise_cosine_similarity(z.detach(), zero_diagonal=True)
    return float(similarity.sum()) / (len(z) * (len(z) - 1))


def test_kde_equals_scipy():
    z = torch.randn(12, 6)
    u = float64(z) / np.linalg.norm(float64(z), axis=1, keepdims=True)
    logits = 5 * u @ u.T
    np.fill_diagonal(logits, -np.inf)
    expected = (logsumexp(logits, axis=1) - math.log(11)).mean()
    assert float(kde(z)) == pytest.approx(expected, abs=1e-6)


def test_kde_closed_forms():
    assert float(kde(torch.ones(9, 4), kappa=7)) == pytest.approx(7, abs=1e-5)
    simplex = torch.eye(6) - 1 / 6
    assert float(kde(simplex, kappa=5)) == pytest.approx(-1, abs=1e-5)
    simplex.requires_grad_()
    kde(simplex).backward()
    assert float(simplex.grad.abs().max()) < 1e-6
    for _ in range(20):
        assert float(kde(simplex.detach() + 0.1 * torch.randn(6, 6))) > -1


@pytest.mark.parametrize("loss", [kde, koleo])
def test_a_step_spreads_the_vectors(loss):
    z = (torch.randn(48, 64) + 0.5).requires_grad_()
    optimizer = torch.optim.SGD([z], lr=1.0)
    before = mean_cosine(z)
    loss(z).backward()
    optimizer.step()
    assert mean_cosine(z) < before - 1e-5


def test_many_kde_steps_leave_little_similarity():
    z = (torch.randn(48, 64) + 0.5).requires_grad_()
    optimizer = torch.optim.SGD([z], lr=20.0)
    before = mean_cosine(z)
    for _ in range(300):
        optimizer.zero_grad()
        kde(z).backward()
        optimizer.step()
    assert before > 0.15
    assert mean_cosine(z) < 0.05


def test_simclr_equals_lightly():
    a, b = torch.randn(8, 16), torch.randn(8, 16)
    for temperature in (0.1, 0.5):
        theirs = NTXentLoss(temperature=temperature)
        assert_same_with_gradient(
            lambda x, t=temperature: simclr(x, b, temperature=t), lambda x, n=theirs: n(x, b), a, atol=2e-6
        )
    assert float(simclr(a, b)) == pytest.approx(float(simclr(b, a)), abs=1e-6)


@pytest.mark.parametrize(
    "loss", [koleo, kde, lambda z: simclr(z, z.flip(0)), lambda z: gram_loss(z[None], z[None] ** 2)]
)
def test_autocast_changes_nothing(loss):
    z = torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(z)
    assert torch.equal(inside, loss(z))


@pytest.mark.parametrize("loss", [koleo, kde, lambda z: simclr(z, z)])
def test_a_batch_of_one_is_refused(loss):
    with pytest.raises(ValueError, match="raise the batch to 2 or more"):
        loss(torch.ones(1, 4))


def test_bad_vectors_and_settings():
    with pytest.raises(ValueError, match=r"KDE takes vectors \(B, D\)"):
        kde(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="kappa is -5"):
        kde(torch.ones(3, 4), kappa=-5)
    with pytest.raises(ValueError, match="first view"):
        simclr(torch.ones(3, 4), torch.ones(2, 4))
