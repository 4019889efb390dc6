"""Stain augmentation: identity at strength 0, closed forms, seeds, banks."""

import numpy as np
import pytest
import torch

from eosin.errors import StainError
from eosin.stain import Macenko, StainTarget, default_target, jitter_he, jitter_hed, random_macenko

# Ruifrok & Johnston 2001: rows hematoxylin, eosin, DAB
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED /= np.linalg.norm(HED, axis=1, keepdims=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tissue(count=4, seed=0, size=48):
    """Return uint8 images (count, 3, size, size) of mixed hematoxylin and eosin with a little noise."""
    rng = np.random.default_rng(seed)
    stains = rng.uniform(0, 1, (count, size, size, 2)) * [1.6, 1.2]
    od = stains @ HED[:2] + rng.normal(0, 0.02, (count, size, size, 3))
    return torch.from_numpy((240 * np.exp(-od) - 1).clip(0, 255).round().astype(np.uint8)).movedim(-1, 1).contiguous()


def bank():
    rows = default_target("macenko").matrix
    return [StainTarget(method="macenko", matrix=rows, concentrations=(c, 1.0), light=240.0) for c in (0.8, 1.6, 2.4)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("jitter", [jitter_he, jitter_hed])
def test_strength_zero_is_identity(jitter, dtype):
    images = tissue() if dtype == torch.uint8 else tissue().float() / 255
    out, unchanged = jitter(images, generator=seeded(), scale=0.0, shift=0.0)
    assert not unchanged.any()
    assert (out.double() - images.double()).abs().max() <= (0 if dtype == torch.uint8 else 1e-6)


def test_probability_zero_is_identity_bit_for_bit():
    images = tissue().float() / 255
    out, unchanged = random_macenko(images, bank(), seeded(), probability=0.0)
    assert torch.equal(out, images)
    assert not unchanged.any()


def test_hed_jitter_is_its_formula():
    """OD' = ((OD M^-1) a + b) M, written with numpy, from the same draws."""
    images = tissue().double() / 255
    out, _ = jitter_hed(images, generator=seeded(3), scale=0.1, shift=0.07)
    draws = torch.rand(4, 2, 3, 1, generator=seeded(3)).numpy() * 2 - 1
    od = -np.log((images.movedim(1, -1).numpy() * 255 + 1) / 240)
    stains = od @ np.linalg.inv(HED)
    stains = stains * (1 + 0.1 * draws[:, 0, None, None, :, 0]) + 0.07 * draws[:, 1, None, None, :, 0]
    expected = (240 * np.exp(-stains @ HED) - 1).clip(0, 255) / 255
    np.testing.assert_allclose(out.movedim(1, -1), expected, atol=1e-7)


def test_he_jitter_moves_concentrations_as_drawn_and_keeps_the_residual():
    images = tissue().double() / 255
    fit = Macenko().fit_each(images)
    out, unchanged = jitter_he(images, generator=seeded(5), scale=0.15, shift=0.05, fit=fit)
    draws = torch.rand(4, 2, 2, 1, generator=seeded(5)).double().numpy() * 2 - 1
    assert not unchanged.any()
    inside = ((out > 0) & (out < 1)).all(1).flatten(1).numpy()
    for i in range(4):
        before, after = (-np.log((x[i].flatten(1).numpy() * 255 + 1) / 240) for x in (images, out))
        matrix = fit.matrix[i].numpy()
        stains = [np.linalg.lstsq(matrix.T, od, rcond=None)[0] for od in (before, after)]
        expected = stains[0] * (1 + 0.15 * draws[i, 0]) + 0.05 * draws[i, 1]
        np.testing.assert_allclose(stains[1][:, inside[i]], expected[:, inside[i]], atol=1e-6)
        residual = [od - matrix.T @ c for od, c in zip((before, after), stains, strict=True)]
        np.testing.assert_allclose(residual[1][:, inside[i]], residual[0][:, inside[i]], atol=1e-6)


def test_random_macenko_is_normalise_with_the_target_drawn():
    images, targets = tissue(12), bank()
    out, unchanged = random_macenko(images, targets, seeded(1), probability=0.6)
    assert not unchanged.any()
    untouched, chosen = 0, set()
    for i in range(12):
        options = [images[i], *(Macenko().normalise(images[i : i + 1], None, t)[0][0] for t in targets)]
        matches = [k for k, option in enumerate(options) if torch.equal(option, out[i])]
        assert len(matches) == 1
        untouched += matches[0] == 0
        chosen.add(matches[0])
    assert 0 < untouched < 12
    assert chosen == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "augment",
    [jitter_he, jitter_hed, lambda x, generator: random_macenko(x, bank(), generator)],
    ids=["he", "hed", "macenko"],
)
def test_seed_decides_and_inputs_stay(augment):
    images = tissue()
    before = images.clone()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (augment(images, generator=seeded(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"


def test_strength_bounds_the_change():
    images = tissue()
    small, large = (
        (jitter_hed(images, generator=seeded(), scale=s, shift=s)[0].int() - images.int()).abs().float().mean()
        for s in (0.02, 0.2)
    )
    assert 0 < small < large < 40


def test_hopeless_images_are_flagged_where_unmixing_is_needed():
    images = tissue()
    images[1] = 255
    for out, unchanged in (jitter_he(images, generator=seeded()), random_macenko(images, bank(), seeded())):
        assert unchanged.tolist() == [False, True, False, False]
        assert torch.equal(out[1], images[1])
    broken = images.float() / 255
    broken[2, 0, 0, 0] = float("nan")
    out, unchanged = jitter_hed(broken, generator=seeded())
    assert unchanged.tolist() == [False, False, True, False]
    assert torch.equal(out[2].nan_to_num(7), broken[2].nan_to_num(7))
    assert out[[0, 1, 3]].isfinite().all()


def test_wrong_arguments_are_refused():
    images = tissue()
    with pytest.raises(StainError, match="0 targets"):
        random_macenko(images, [], seeded())
    with pytest.raises(StainError, match="probability"):
        random_macenko(images, bank(), seeded(), probability=1.5)
    with pytest.raises(StainError, match="do not go with"):
        random_macenko(images, [default_target("vahadane")], seeded())
    with pytest.raises(StainError, match="scale"):
        jitter_hed(images, generator=seeded(), scale=1.5)
    with pytest.raises(StainError, match="shift"):
        jitter_he(images, generator=seeded(), shift=-0.1)
    with pytest.raises(StainError, match="of 2 images"):
        jitter_he(images, generator=seeded(), fit=Macenko().fit_each(images[:2]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_images_with_a_cpu_generator():
    images = tissue()
    for augment in (jitter_he, jitter_hed, lambda x, generator: random_macenko(x, bank(), generator)):
        here, there = augment(images, generator=seeded())[0], augment(images.cuda(), generator=seeded())[0]
        assert (here.int() - there.cpu().int()).abs().max() <= 1
