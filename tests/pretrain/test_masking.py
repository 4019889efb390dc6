from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from lightly.models.utils import random_block_mask
from scipy.stats import ks_2samp

from eosin.pretrain.masking import block_masks


def masks_of(batches, batch, grid, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([block_masks(batch, grid, generator=generator, **options) for _ in range(batches)])


def borders(masks, grid):
    """Number of neighbouring patches of which one is hidden: what tells blocks from scattered patches."""
    planes = masks.reshape(-1, grid, grid)
    return (planes[:, 1:] ^ planes[:, :-1]).sum((1, 2)) + (planes[:, :, 1:] ^ planes[:, :, :-1]).sum((1, 2))


@pytest.mark.parametrize(("grid", "mean"), [(14, 0.2967), (16, 0.2979)])
def test_realised_ratio(grid, mean):
    masks = masks_of(30, 64, grid)
    ratios = masks.float().mean(dim=1)
    ratios = ratios[ratios > 0]
    assert len(ratios) == 30 * 32
    assert float(ratios.mean()) == pytest.approx(mean, abs=0.0015)
    assert float(ratios.max()) <= 0.5
    assert float(masks.float().mean()) == pytest.approx(mean / 2, abs=0.001)


def test_same_distribution_as_lightly():
    random.seed(0)
    theirs = torch.cat([random_block_mask((64, 14, 14)) for _ in range(12)]).flatten(1)
    ours = masks_of(24, 64, 14)
    ours, theirs = (m[m.any(dim=1)] for m in (ours, theirs))
    assert ks_2samp(ours.sum(1), theirs.sum(1)).pvalue > 0.01
    assert ks_2samp(borders(ours, 14), borders(theirs, 14)).pvalue > 0.01
    shares = [m.float().mean(dim=0) for m in (ours, theirs)]
    assert float(torch.corrcoef(torch.stack(shares))[0, 1]) > 0.8


@pytest.mark.parametrize(("batch", "grid", "ratio"), [(64, 14, (0.1, 0.5)), (7, 6, (0.1, 0.45)), (2, 16, (0.3, 0.3))])
def test_exact_counts_are_the_upper_ends(batch, grid, ratio):
    low, high = (Fraction(str(r)) for r in ratio)
    masked = batch // 2
    expected = [int(grid**2 * (low + (high - low) * (i + 1) / masked)) for i in range(masked)]
    counts = masks_of(1, batch, grid, ratio=ratio, exact=True).sum(dim=1)
    assert sorted(counts.tolist()) == [0] * (batch - masked) + sorted(expected)


def test_ratios_are_stratified_and_never_above_what_was_asked():
    for seed in range(20):
        counts = masks_of(1, 64, 14, seed=seed).sum(dim=1).sort().values[32:]
        upper = torch.linspace(0.1, 0.5, 33, dtype=torch.float64)[1:] * 196
        assert (counts <= upper + 1e-9).all()
        assert (counts > 0).all()


def test_exact_masks_are_blocks_topped_up():
    blocks, filled = masks_of(10, 64, 16), masks_of(10, 64, 16, exact=True)
    scattered = torch.rand(filled.shape, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    scattered = scattered < filled.sum(dim=1, keepdim=True)
    mean = [float(borders(m, 16).float().mean()) for m in (blocks, filled, scattered)]
    assert mean[0] < mean[1] < 0.6 * mean[2]


def test_every_crop_is_masked_equally_often():
    rate = torch.stack([masks_of(1, 4, 4, seed=s).any(dim=1) for s in range(300)]).float().mean(dim=0)
    assert float((rate - 0.5).abs().max()) < 0.1


def test_the_generator_decides():
    first, again, other = masks_of(2, 16, 14, seed=3), masks_of(2, 16, 14, seed=3), masks_of(2, 16, 14, seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:16], first[16:])
    state = torch.random.get_rng_state()
    masks_of(1, 16, 14)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_share_of_crops():
    assert int(masks_of(1, 10, 14, share=0.35).any(dim=1).sum()) == 3
    assert masks_of(1, 6, 14, share=1.0).any(dim=1).all()
    assert masks_of(1, 4, 3, share=1.0, ratio=(1.0, 1.0), exact=True).all()


def test_small_grids_end():
    for grid in (1, 2, 3, 5):
        masks = masks_of(20, 8, grid)
        assert np.all(masks.sum(dim=1).numpy() <= grid**2 / 2)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (1, {}, "share 0.5 of 1 crops masks none"),
        (8, {"share": 1.5}, "share 1.5"),
        (8, {"share": 0.0}, "share 0.0"),
        (8, {"ratio": (0.5, 0.1)}, "0 < low <= high <= 1"),
        (8, {"ratio": (0.1, 1.2)}, "0 < low <= high <= 1"),
    ],
)
def test_settings_that_make_no_mask(batch, options, message):
    with pytest.raises(ValueError, match=message):
        masks_of(1, batch, 14, **options)
