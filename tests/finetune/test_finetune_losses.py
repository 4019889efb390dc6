"""Losses: torch's and torchvision's, closed forms in float64, votes, and the ends of the number line."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from eosin.errors import ConfigError, NonFiniteError
from eosin.finetune.losses import LossConfig, binary_rows, loss_rows, mean_loss, multiclass_rows, training_loss

PLAIN = LossConfig(gamma=0.0)


def batch(rows=64, seed=0, spread=4.0, classes=None):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn((rows,) if classes is None else (rows, classes), generator=generator)
    targets = torch.randint(classes or 2, (rows,), generator=generator)
    return logits, targets if classes else targets.float()


def gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weights", [None, torch.ones(64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_zero_is_torch_bit_for_bit(soft, weights, dtype):
    logits, targets = batch()
    targets = torch.rand(64, generator=torch.Generator().manual_seed(1)) if soft else targets
    logits, targets = logits.to(dtype), targets.to(dtype)
    ours = gradient(lambda x: training_loss(x, targets, PLAIN, weights=weights), logits)
    theirs = gradient(lambda x: F.binary_cross_entropy_with_logits(x, targets), logits)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_gamma_zero_of_classes_is_torch_bit_for_bit(soft, smoothing):
    logits, targets = batch(classes=3)
    if soft:
        targets = torch.rand(64, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    config = LossConfig(gamma=0.0, smoothing=smoothing)
    ours = gradient(lambda x: training_loss(x, targets, config), logits)
    theirs = gradient(lambda x: F.cross_entropy(x, targets, label_smoothing=smoothing), logits)
    # the mean of rows and torch's own mean add in another order
    torch.testing.assert_close(ours[0], theirs[0], rtol=3e-7, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=3e-7, atol=1e-9)
    rows = loss_rows(logits, targets, config)
    assert torch.equal(rows, F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.7])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_focal_of_hard_labels_is_torchvision(gamma, alpha):
    logits, targets = batch(spread=3.0)
    ours = gradient(lambda x: binary_rows(x, targets, gamma=gamma, alpha=alpha).sum(), logits.double())
    theirs = gradient(
        lambda x: sigmoid_focal_loss(
            x, targets.double(), gamma=gamma, alpha=-1 if alpha is None else alpha, reduction="sum"
        ),
        logits.double(),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_is_its_closed_form_in_float64(gamma):
    """-alpha_t (1 - p_t)^gamma log p_t, written with numpy; float32 keeps its relative precision in the tails."""
    logits = np.linspace(-30, 30, 241)
    p = 1 / (1 + np.exp(-logits))
    rest = 1 / (1 + np.exp(logits))
    for target, p_t, q_t, alpha_t in ((1.0, p, rest, 0.3), (0.0, rest, p, 0.7)):
        expected = -alpha_t * q_t**gamma * np.log1p(-q_t)
        expected = np.where(q_t > 0.5, -alpha_t * q_t**gamma * np.log(p_t), expected)
        for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            rows = binary_rows(torch.from_numpy(logits).to(dtype), torch.full((241,), target), gamma=gamma, alpha=0.3)
            np.testing.assert_allclose(rows.double(), expected, rtol=rtol)


def test_a_soft_label_costs_what_its_votes_cost_on_average():
    logits, _ = batch(seed=3)
    votes = torch.randint(2, (3, 64), generator=torch.Generator().manual_seed(4)).double()
    each = torch.stack([binary_rows(logits.double(), vote, gamma=2.0, alpha=0.4) for vote in votes])
    soft = binary_rows(logits.double(), votes.mean(0), gamma=2.0, alpha=0.4)
    torch.testing.assert_close(soft, each.mean(0), rtol=1e-12, atol=0)


def test_smoothing_moves_labels_towards_one_half():
    logits, targets = batch()
    smooth = binary_rows(logits, targets, smoothing=0.2)
    assert torch.equal(smooth, F.binary_cross_entropy_with_logits(logits, targets * 0.8 + 0.1, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_two_classes_are_the_binary_loss_of_the_difference(gamma):
    logits, targets = batch(classes=2)
    logits = logits.double()
    rows = multiclass_rows(logits, targets, gamma=gamma, alpha=(0.7, 0.3), smoothing=0.1)
    binary = binary_rows(logits[:, 1] - logits[:, 0], targets, gamma=gamma, alpha=0.3, smoothing=0.1)
    torch.testing.assert_close(rows, binary, rtol=1e-10, atol=0)


def test_multiclass_focal_is_its_closed_form():
    logits, targets = batch(classes=3, seed=5)
    q = F.one_hot(targets, 3).numpy() * 0.9 + 0.1 / 3
    x = logits.double().numpy()
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    expected = -(q * np.array([1.0, 2.0, 0.5]) * (1 - p) ** 1.5 * np.log(p)).sum(1)
    rows = multiclass_rows(logits.double(), targets, gamma=1.5, alpha=(1.0, 2.0, 0.5), smoothing=0.1)
    np.testing.assert_allclose(rows, expected, rtol=1e-9)
    one_hot = multiclass_rows(logits.double(), F.one_hot(targets, 3).double(), gamma=1.5)
    torch.testing.assert_close(one_hot, multiclass_rows(logits.double(), targets, gamma=1.5))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_at_the_ends(gamma, dtype):
    logits = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).repeat(3).to(dtype)
    targets = torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(5)
    value, slope = gradient(lambda x: training_loss(x, targets, LossConfig(gamma=gamma)), logits)
    assert value.isfinite()
    assert slope.isfinite().all()
    pair = torch.stack([torch.zeros_like(logits), logits], 1)
    value, slope = gradient(
        lambda x: training_loss(x, torch.stack([1 - targets, targets], 1), LossConfig(gamma=gamma)), pair
    )
    assert value.isfinite()
    assert slope.isfinite().all()
    hard_wrong = gradient(lambda x: training_loss(x, torch.ones(1), LossConfig(gamma=gamma)), torch.tensor([-100.0]))
    torch.testing.assert_close(hard_wrong, (torch.tensor(100.0), torch.tensor([-1.0])))


def test_gradients_are_finite_differences():
    logits, targets = batch(rows=8, spread=2.0)
    wide, labels = batch(rows=6, spread=2.0, classes=3)
    soft = targets.double() * 0.6 + 0.2
    assert torch.autograd.gradcheck(
        lambda x: binary_rows(x, soft, gamma=1.5, alpha=0.4), logits.double().requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda x: multiclass_rows(x, labels, gamma=1.5, smoothing=0.1), wide.double().requires_grad_()
    )


def test_weights_are_a_sum_over_rows_divided_by_their_number():
    logits, targets = batch(rows=16)
    weights = torch.linspace(0.1, 3.0, 16)
    loss = training_loss(logits, targets, LossConfig(gamma=2.0), weights=weights)
    each = [
        float(w * binary_rows(x[None], t[None], gamma=2.0)) for w, x, t in zip(weights, logits, targets, strict=True)
    ]
    assert float(loss) == pytest.approx(math.fsum(each) / 16, rel=1e-6)
    assert training_loss(logits[:, None], targets, LossConfig(), weights=weights) == loss


def test_half_precision_is_computed_in_float32_also_in_autocast():
    logits, targets = batch()
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = loss_rows(half, targets, LossConfig())
    assert rows.dtype == torch.float32
    assert torch.equal(rows, loss_rows(half.float(), targets, LossConfig()))


def test_a_loss_that_is_not_finite_names_its_rows():
    logits, targets = batch(rows=6)
    logits[2] = torch.nan
    logits[4] = torch.inf
    names = [f"cell{i}.png" for i in range(6)]
    with pytest.raises(NonFiniteError, match=r"2 of 6 rows of the batch: 2 \(cell2.png\), 4 \(cell4.png\);"):
        training_loss(logits, targets, LossConfig(), names=names)
    with pytest.raises(NonFiniteError, match=r"1 of 6 rows of the batch: 5;"):
        mean_loss(torch.ones(6), weights=torch.tensor([1.0, 1, 1, 1, 1, torch.inf]))
    with pytest.raises(NonFiniteError, match=r"20 of 20 .* and 12 more"):
        mean_loss(torch.full((20,), torch.nan))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("wrong", [-0.1, 1.01, torch.nan])
def test_a_target_outside_the_unit_interval_names_its_row(gamma, wrong):
    logits, targets = batch(rows=4)
    targets[3] = wrong
    with pytest.raises(NonFiniteError, match=r"1 of 4 rows of the batch: 3; .*targets lie in 0-1"):
        training_loss(logits, targets, LossConfig(gamma=gamma))
    soft = torch.full((4, 3), 1 / 3)
    soft[1, 2] = wrong
    with pytest.raises(NonFiniteError, match="1 of 4 rows of the batch: 1;"):
        training_loss(torch.zeros(4, 3), soft, LossConfig(gamma=gamma))


@pytest.mark.parametrize(
    ("logits", "targets", "config"),
    [
        (torch.zeros(4), torch.zeros(3), PLAIN),
        (torch.zeros(4, 3), torch.zeros(4), PLAIN),
        (torch.zeros(4, 3), torch.zeros(4, 2), PLAIN),
        (torch.zeros(4, 3), torch.zeros(4).long(), LossConfig(alpha=0.25)),
        (torch.zeros(4, 3), torch.zeros(4).long(), LossConfig(alpha=(0.5, 0.5))),
        (torch.zeros(4), torch.zeros(4), LossConfig(alpha=(0.5, 0.5))),
        (torch.zeros(0), torch.zeros(0), PLAIN),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, targets, config):
    with pytest.raises(ConfigError):
        training_loss(logits, targets, config)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("wrong", [-100, -1, 3])
def test_a_class_that_does_not_exist_names_its_row(gamma, wrong):
    """torch would skip class -100 without a word."""
    targets = torch.tensor([0, 2, wrong])
    with pytest.raises(NonFiniteError, match="1 of 3 rows of the batch: 2;"):
        training_loss(torch.zeros(3, 3), targets, LossConfig(gamma=gamma))


def test_weights_of_another_number_are_refused():
    with pytest.raises(ConfigError, match="weights for 4 rows"):
        mean_loss(torch.ones(4), weights=torch.ones(3))


@pytest.mark.parametrize(
    "bad",
    [{"gamma": -1}, {"gamma": math.nan}, {"alpha": 1.5}, {"smoothing": 1.0}, {"alpha": (1.0,)}, {"alpha": (0, 0)}],
)
def test_a_config_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError):
        LossConfig(**bad)
