from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.nn import functional as F

from eosin.pretrain.adversary import (
    AdversaryHead,
    GradientReversal,
    _dropout,
    adversary_loss,
    factor_overlap,
    reversal_ramp,
    suppression_warnings,
)

LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ordinary(head, x):
    """The head's classifier without any reversal, in evaluation."""
    for layer in head.layers[:-1]:
        x = F.gelu(layer(x))
    return head.layers[-1](x)


@pytest.mark.parametrize("strength", [0.03, 1.0, 2.7])
def test_the_reversed_gradient_is_minus_strength_times_the_ordinary_one(strength):
    head = AdversaryHead(8, 3).eval()
    z = torch.randn(6, 8, requires_grad=True)
    plain_loss = F.cross_entropy(ordinary(head, z), LABELS)
    plain, *plain_head = torch.autograd.grad(plain_loss, [z, *head.parameters()])
    loss = adversary_loss(head(z, strength=strength), LABELS)
    got, *got_head = torch.autograd.grad(loss, [z, *head.parameters()])
    torch.testing.assert_close(loss, plain_loss, atol=1e-7, rtol=0)
    reference = torch.autograd.grad(adversary_loss(ordinary(head, z), LABELS), z)[0]
    assert torch.equal(got, -(strength * reference))
    torch.testing.assert_close(reference, plain)
    for mine, other in zip(got_head, plain_head, strict=True):
        torch.testing.assert_close(mine, other)


def test_reversal_against_a_numerical_derivative():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, dtype=torch.float64)

    def loss(x):
        return (weights * x.sin()).sum()

    loss(GradientReversal.apply(x, 0.3)).backward()
    steps = 1e-6 * torch.eye(5, dtype=torch.float64)
    numerical = torch.stack([(loss(x + h) - loss(x - h)) / 2e-6 for h in steps]).detach()
    torch.testing.assert_close(x.grad, -0.3 * numerical, atol=1e-8, rtol=1e-6)


def test_an_anchor_passes_the_ordinary_gradient():
    head = AdversaryHead(8, 3, anchor=True).eval()
    z = torch.randn(6, 8, requires_grad=True)
    got = torch.autograd.grad(adversary_loss(head(z, strength=0.4), LABELS), z)[0]
    assert torch.equal(got, 0.4 * torch.autograd.grad(adversary_loss(ordinary(head, z), LABELS), z)[0])


def train(with_head, strength, steps=6):
    """A small encoder with dropout of its own, trained to regress; its weights and the global generator afterwards."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 8))
    head = AdversaryHead(8, 3, seed=1) if with_head else None
    generator = torch.Generator().manual_seed(2)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (encoder, head) if m is not None]
    for _ in range(steps):
        z = encoder(torch.randn(6, 8))
        loss = z.square().mean()
        if head is not None:
            loss = loss + adversary_loss(head(z, strength=strength, generator=generator), LABELS)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in encoder.parameters()], torch.random.get_rng_state(), head


def test_strength_zero_is_bit_for_bit_no_adversary():
    without, state, _ = train(False, 0.0)
    zero, zero_state, head = train(True, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))
    assert torch.equal(state, zero_state)
    untrained = AdversaryHead(8, 3, seed=1)
    assert not torch.equal(head.layers[0].weight, untrained.layers[0].weight)
    some, _, _ = train(True, 0.5)
    assert not all(torch.equal(a, b) for a, b in zip(without, some, strict=True))


def test_at_strength_zero_not_even_a_broken_head_reaches_the_features():
    head, z = AdversaryHead(8, 3).eval(), torch.randn(6, 8, requires_grad=True)
    torch.nn.init.constant_(head.layers[1].weight, math.nan)
    (z.square().sum() + adversary_loss(head(z, strength=0.0), LABELS)).backward()
    assert torch.equal(z.grad, 2 * z.detach())


@pytest.mark.parametrize(("anchor", "sign"), [(False, 1), (True, -1)])
def test_a_step_of_the_encoder_makes_the_factor_harder_or_easier_to_read(anchor, sign):
    torch.manual_seed(0)
    head, z = AdversaryHead(8, 3, anchor=anchor).eval(), torch.randn(6, 8, requires_grad=True)
    loss = adversary_loss(head(z, strength=1.0), LABELS)
    loss.backward()
    after = adversary_loss(head(z - 0.1 * z.grad, strength=1.0), LABELS)
    assert sign * float((after - loss).detach()) > 0


def test_dropout_comes_from_the_generator_given():
    head, z = AdversaryHead(64, 4, hidden=256), torch.randn(5, 64)
    runs = [head(z, strength=1.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    dropped = _dropout(torch.full((200, 500), 3.0), 0.3, torch.Generator().manual_seed(0))
    assert dropped.unique().tolist() == pytest.approx([0, 3 / 0.7])
    assert float((dropped > 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    with pytest.raises(ValueError, match="give a generator"):
        head.train()(z, strength=1.0)


def test_shape_of_the_mlp():
    head = AdversaryHead(32, 5, hidden=16)
    assert [tuple(layer.weight.shape) for layer in head.layers] == [(16, 32), (8, 16), (4, 8), (5, 4)]
    state = torch.random.get_rng_state()
    assert torch.equal(AdversaryHead(32, 5, hidden=16).layers[1].weight, head.layers[1].weight)
    assert not torch.equal(AdversaryHead(32, 5, hidden=16, seed=1).layers[1].weight, head.layers[1].weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_unknown_factors_do_not_count():
    logits = torch.randn(6, 3, requires_grad=True)
    labels = LABELS.clone()
    labels[[1, 4]] = -1
    known = labels >= 0
    torch.testing.assert_close(adversary_loss(logits, labels), F.cross_entropy(logits[known], labels[known]))
    nothing = adversary_loss(logits, torch.full((6,), -1))
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert not logits.grad.any()


def test_ramp():
    assert reversal_ramp(0, 100) == 0
    for step in (1, 33, 75, 100):
        expected = 0.7 * (2 / (1 + math.exp(-10 * step / 100)) - 1)
        assert reversal_ramp(step, 100, maximum=0.7) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="step 101 of 100"):
        reversal_ramp(101, 100)


def test_overlap_is_theils_coefficient():
    rng = np.random.default_rng(0)
    label, factor = rng.integers(3, size=200), rng.integers(4, size=200)
    factor = np.where(rng.random(200) < 0.5, label, factor)
    expected = mutual_info_score(label, factor) / entropy(np.bincount(label) / 200)
    assert factor_overlap(label, factor) == pytest.approx(expected, abs=1e-12)
    assert factor_overlap(["a", "b", "a"], [1, 2, 1]) == pytest.approx(1)
    assert factor_overlap(["a", "b"] * 10, [1] * 20) == pytest.approx(0, abs=1e-12)
    assert factor_overlap(["a", "a"], [1, 2]) == 0
    with pytest.raises(ValueError, match="2 labels and 1 factor"):
        factor_overlap([1, 2], [1])


def test_warnings_about_what_is_forgotten():
    cancer, site, scanner = ["lung", "skin"] * 10, ["A1", "B2"] * 10, ["x"] * 10 + ["y"] * 10
    assert suppression_warnings("scanner", scanner, {"cancer": cancer}) == ()
    by_name, by_overlap = suppression_warnings("tissue_source_site", site, {"cancer": cancer})
    assert "tissue source site" in by_name
    assert "100% of the entropy of 'cancer' (n = 20)" in by_overlap
    assert suppression_warnings("composite", scanner) == ()
    for name in ("TSS", "Centre", "hospital_id", "site2"):
        assert len(suppression_warnings(name, scanner)) == 1


def test_bad_settings():
    with pytest.raises(ValueError, match="1 class"):
        AdversaryHead(8, 1)
    with pytest.raises(ValueError, match="dropout"):
        AdversaryHead(8, 2, dropout=(0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="strength is -1"):
        AdversaryHead(8, 2).eval()(torch.ones(1, 8), strength=-1.0)
