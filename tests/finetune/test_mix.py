"""MixUp and CutMix: shares that are what the pixels say, Beta draws, and a loss that is both losses."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from eosin.errors import ConfigError, GeometryError, NonFiniteError
from eosin.finetune.losses import LossConfig, loss_rows, training_loss
from eosin.finetune.mix import MixConfig, beta_quantile, mix_batch, mixed_loss


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count=64, size=20):
    """Return images whose every pixel is the number of their row."""
    return torch.arange(float(count))[:, None, None, None].expand(-1, 3, size, size).contiguous()


def test_mixup_is_its_formula():
    images = torch.rand(64, 3, 12, 12, generator=seeded(1))
    mixed = mix_batch(images, MixConfig(mixup_chance=1.0, mixup_alpha=1.0), generator=seeded())
    share = mixed.share[:, None, None, None]
    torch.testing.assert_close(mixed.images, share * images + (1 - share) * images[mixed.partner], atol=1e-6, rtol=0)
    assert sorted(mixed.partner.tolist()) == list(range(64))
    assert mixed.share.std() > 0.2


def test_cutmix_shares_are_counted_pixels():
    images = numbered()
    mixed = mix_batch(images, MixConfig(mixup_chance=0.0, cutmix_chance=1.0), generator=seeded())
    own = mixed.images == images
    other = mixed.images == images[mixed.partner]
    assert (own | other).all()
    moved = mixed.partner != torch.arange(64)
    counted = own[:, 0].double().mean((1, 2))
    torch.testing.assert_close(mixed.share[moved].double(), counted[moved], atol=1e-6, rtol=0)
    for row in (~own[:, 0])[moved]:  # what was pasted is one box
        assert int(row.sum()) == int(row.any(0).sum()) * int(row.any(1).sum())
    assert 0.3 < mixed.share.mean() < 0.9


def test_chances_are_how_often_and_the_rest_is_untouched_bit_for_bit():
    images = torch.rand(600, 3, 8, 8, generator=seeded(2))
    config = MixConfig(mixup_chance=0.3, mixup_alpha=1.0, cutmix_chance=0.2)
    mixed = mix_batch(images, config, generator=seeded(3))
    same = (mixed.images == images).flatten(1).all(1)
    assert (same[mixed.share == 1]).all()
    whole = ((mixed.images != images).flatten(1).all(1)).double().mean()
    assert abs(whole - 0.3) < 0.08  # a few boxes cover the whole tile
    assert abs((~same).double().mean() - 0.5) < 0.09  # a few boxes are empty
    repeat = mix_batch(images, config, generator=seeded(3))
    assert torch.equal(repeat.images, mixed.images)
    assert torch.equal(repeat.share, mixed.share)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta_distributed(alpha):
    draws = beta_quantile(torch.rand(4000, generator=seeded(), dtype=torch.float64), alpha).numpy()
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 0.001
    assert np.var(draws) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_loss_is_linear_in_the_mixture(gamma):
    """With equal weights, both losses are the loss of the mixed label; with torch's own at gamma 0."""
    images, targets = numbered(32, 8), torch.arange(32) % 2 * 1.0
    mixed = mix_batch(images, MixConfig(mixup_chance=1.0, mixup_alpha=1.0), generator=seeded())
    logits = torch.randn(32, generator=seeded(1), dtype=torch.float64)
    config = LossConfig(gamma=gamma, smoothing=0.1)
    soft = mixed.share.double() * targets + (1 - mixed.share.double()) * targets[mixed.partner]
    loss = mixed_loss(logits, targets.double(), mixed, config)
    torch.testing.assert_close(loss, training_loss(logits, soft, config), rtol=1e-12, atol=0)
    if gamma == 0:
        expected = F.binary_cross_entropy_with_logits(logits, soft * 0.9 + 0.05)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_weights_go_with_their_cells():
    images = numbered(16, 8)
    mixed = mix_batch(images, MixConfig(mixup_chance=1.0, mixup_alpha=1.0), generator=seeded())
    logits, targets = torch.randn(16, 3, generator=seeded(2)), torch.arange(16) % 3
    weights, config = torch.linspace(0.1, 2.0, 16), LossConfig()
    loss = float(mixed_loss(logits, targets, mixed, config, weights=weights))
    total = 0.0
    for i in range(16):
        j, share = int(mixed.partner[i]), float(mixed.share[i])
        for row, part in ((i, share), (j, 1 - share)):
            total += part * float(weights[row]) * float(loss_rows(logits[i : i + 1], targets[row : row + 1], config))
    assert loss == pytest.approx(total / 16, rel=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(GeometryError, match="needs float images"):
        mix_batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), MixConfig(), generator=seeded())
    for bad in ({"mixup_chance": 0.8, "cutmix_chance": 0.3}, {"mixup_chance": -0.1}, {"mixup_alpha": 0.0}):
        with pytest.raises(ConfigError):
            MixConfig(**bad)
    mixed = mix_batch(numbered(4, 8), MixConfig(), generator=seeded())
    with pytest.raises(ConfigError, match="weights for 4 rows"):
        mixed_loss(torch.zeros(4), torch.zeros(4), mixed, LossConfig(), weights=torch.ones(3))
    with pytest.raises(NonFiniteError, match="cell2"):
        mixed_loss(
            torch.tensor([0.0, 0, torch.nan, 0]),
            torch.zeros(4),
            mixed,
            LossConfig(),
            names=[f"cell{i}" for i in range(4)],
        )
