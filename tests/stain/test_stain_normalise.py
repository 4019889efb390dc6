"""Closed forms and properties of Macenko, Reinhard and Vahadane on images made from known stains."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import DictionaryLearning

from eosin.errors import StainError
from eosin.stain import LabTarget, Macenko, Reinhard, StainFit, Vahadane, default_target
from eosin.stain.colour import grey_to_lab, high_percentile, lab_to_grey, low_percentile
from eosin.stain.unmix import nonnegative_lasso

KNOWN = np.array([[0.644, 0.717, 0.267], [0.22, 0.93, 0.30]])
KNOWN /= np.linalg.norm(KNOWN, axis=1, keepdims=True)
NORMALISERS = [Macenko(), Vahadane(), Reinhard()]
UNMIXERS = [Macenko(), Vahadane()]


def stained(matrix=KNOWN, *, seed=0, size=64, light=240.0, count=1, strength=(2.0, 1.5), single=2):
    """Return float images (count, 3, size, size) in 0-1 whose pixels are mixed from `matrix`, and C (count, P, 2).

    Of six pixels `single` hold one stain only, like nuclei and stroma.
    """
    rng = np.random.default_rng(seed)
    stains = rng.uniform(0.35, 1.0, (count, size * size, 2)) * strength
    pure = rng.integers(0, 6, (count, size * size))
    stains[pure < single / 2, 1] = 0
    stains[pure >= 6 - single / 2, 0] = 0
    od = stains @ matrix
    grey = light * np.exp(-od) - 1
    images = torch.from_numpy(grey.reshape(count, size, size, 3)).movedim(-1, 1) / 255
    return images, stains


def uint8(images):
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def angles(found, expected):
    """Return the angle in degrees between the rows of two (..., 2, 3)."""
    cosine = (np.asarray(found) * np.asarray(expected)).sum(-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def test_macenko_recovers_known_stains():
    images, _ = stained()
    assert angles(Macenko(light=240).fit(images).matrix, KNOWN).max() < 0.5
    assert angles(Macenko(light=240).fit(uint8(images)).matrix, KNOWN).max() < 2


def test_vahadane_recovers_known_stains():
    """The penalty pulls the vectors together: a little where the stains lie apart, by degrees where they mix."""
    apart, mixed = stained(light=256, single=4)[0], stained(light=256, single=2)[0]
    assert angles(Vahadane().fit(uint8(apart)).matrix, KNOWN).max() < 2
    assert angles(Vahadane(penalty=0.01).fit(uint8(mixed)).matrix, KNOWN).max() < 1
    assert 2 < angles(Vahadane().fit(mixed).matrix, KNOWN).max() < 5


def test_vahadane_sees_eosin_that_lets_red_through():
    """Eosin without red absorbance fails Macenko's rule of OD >= beta in every channel, not Vahadane's."""
    clear = np.array([[0.644, 0.717, 0.267], [0.05, 0.95, 0.30]])
    clear /= np.linalg.norm(clear, axis=1, keepdims=True)
    images, _ = stained(clear, light=256, single=4)
    assert angles(Vahadane().fit(images).matrix, clear).max() < 2
    assert angles(Macenko().fit(images).matrix, clear).max() > 5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hematoxylin_is_first_whatever_is_stronger(seed):
    images, _ = stained(seed=seed, strength=(1.0, 2.5))
    for normaliser in UNMIXERS:
        matrix = normaliser.fit(images).matrix
        assert matrix[0, 0] > matrix[1, 0]


def test_concentrations_are_the_99th_percentile_of_the_known_ones():
    images, stains = stained()
    found = Macenko(alpha=0.0).fit(images).concentrations.numpy()
    np.testing.assert_allclose(found, np.percentile(stains[0], 99, axis=0), rtol=0.02)


def test_normalising_moves_known_stains_onto_the_target():
    """An image mixed from A, normalised to a target B, is the image mixed from B (closed form)."""
    other = np.array([[0.55, 0.75, 0.37], [0.2, 0.85, 0.49]])
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    source, _ = stained()
    expected, stains = stained(other)
    exact = [
        StainFit(
            method="macenko",
            matrix=torch.tensor(matrix),
            concentrations=torch.tensor(np.percentile(stains[0], 99, axis=0)),
            ok=torch.tensor(True),
            light=240.0,
        )
        for matrix in (KNOWN, other)
    ]
    out, unchanged = Macenko().normalise(source, exact[0], exact[1].target())
    assert not unchanged.any()
    assert (out - expected).abs().max() < 1e-6


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
def test_normalising_to_itself_is_identity(normaliser):
    light = getattr(normaliser, "light", 240.0)
    images = uint8(stained(light=light)[0])
    fit = normaliser.fit(images)
    if isinstance(normaliser, Vahadane):  # its stains may not be negative: stay between the vectors it found
        images = uint8(stained(fit.matrix.numpy(), light=light)[0])
    out, unchanged = normaliser.normalise(images, fit, fit.target())
    assert not unchanged.any()
    difference = (out.int() - images.int()).abs()
    assert difference.max() <= 2, "only what two stains cannot express may change"


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
def test_normalised_image_has_the_targets_fit(normaliser):
    normaliser = Vahadane(penalty=0.01) if isinstance(normaliser, Vahadane) else normaliser
    images = stained(light=getattr(normaliser, "light", 240.0))[0]
    target = normaliser.fit(stained(seed=5, strength=(1.5, 1.2))[0]).target()
    again = normaliser.fit(normaliser.normalise(images, None, target)[0]).target()
    if isinstance(target, LabTarget):
        np.testing.assert_allclose([again.mean, again.std], [target.mean, target.std], atol=1e-6)
    else:
        assert angles(again.matrix, target.matrix).max() < 1
        np.testing.assert_allclose(again.concentrations, target.concentrations, rtol=0.02)


def test_reinhard_matches_mean_and_deviation_exactly_where_nothing_clips():
    images = stained()[0]
    target = LabTarget(mean=(60.0, 12.0, -8.0), std=(6.0, 3.0, 2.0))
    out, unchanged = Reinhard().normalise(images, None, target)
    assert not unchanged.any()
    assert 0 < out.min() < out.max() < 1
    lab = grey_to_lab(out.flatten(2) * 255)
    np.testing.assert_allclose(lab.mean(2)[0], target.mean, atol=1e-9)
    np.testing.assert_allclose(lab.std(2, correction=0)[0], target.std, atol=1e-9)


def test_lab_of_known_colours():
    """CIELAB of the sRGB primaries and of mid grey, as tabulated (Lindbloom, D65)."""
    rgb = torch.tensor([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [119, 119, 119], [0, 0, 0]]).double()
    expected = [[100, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [50.03, 0, 0]]
    lab = grey_to_lab(rgb.T[None])
    np.testing.assert_allclose(lab[0].T, [*expected, [0, 0, 0]], atol=0.02)
    np.testing.assert_allclose(lab_to_grey(lab)[0].T, rgb, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_two_stain_lasso_against_brute_force(penalty):
    """The closed form is no worse than any point of a fine grid of concentrations."""
    rng = np.random.default_rng(4)
    od = torch.from_numpy(rng.uniform(0, 1.5, (1, 3, 200)))
    matrix = torch.from_numpy(KNOWN)[None]
    code = nonnegative_lasso(od, matrix, penalty)
    axis = np.linspace(0, 3, 121)
    grid = torch.from_numpy(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))

    def cost(c):  # (..., 2) against pixels
        return ((od[0].T - c @ matrix[0]) ** 2).sum(-1) / 2 + penalty * c.sum(-1)

    best = torch.stack([cost(point.expand(200, 2)) for point in grid]).min(0).values
    mine = cost(code[0].T)
    assert (code >= 0).all()
    assert (mine <= best + 1e-9).all()
    assert (best - mine).max() < 2e-3


def test_vahadane_dictionary_is_scikit_learns():
    """The same objective, solved by scikit-learn's coordinate descent, gives the same stain vectors."""
    images, _ = stained(size=32, light=256)
    noisy = uint8(images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))
    mine = Vahadane().fit(noisy)
    od = -np.log((noisy[0].flatten(1).T.numpy().astype(float) + 1) / 256)
    od = od[od.mean(1) >= 0.15]
    learner = DictionaryLearning(
        2,
        alpha=0.1,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        positive_code=True,
        positive_dict=True,
        dict_init=KNOWN,
        code_init=od @ np.linalg.pinv(KNOWN),
        max_iter=300,
        tol=1e-10,
        random_state=0,
    )
    theirs = learner.fit(od).components_
    assert np.linalg.norm(theirs, axis=1) == pytest.approx(1, abs=1e-3)
    assert angles(mine.matrix, theirs).max() < 0.2


@pytest.mark.parametrize("percent", [0, 1, 12.5, 50])
def test_percentiles_are_numpys(percent):
    rng = np.random.default_rng(0)
    values, valid = rng.normal(size=(5, 333)), rng.random((5, 333)) < [[0.01], [0.3], [0.5], [0.9], [1.1]]
    valid[:, 0] = True
    found = low_percentile(torch.from_numpy(values), percent, torch.from_numpy(valid))
    expected = [np.percentile(v[k], percent) for v, k in zip(values, valid, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    upper = high_percentile(torch.from_numpy(values), 100 - percent)
    np.testing.assert_allclose(upper, np.percentile(values, 100 - percent, axis=1), atol=1e-12)


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_image_does_not_depend_on_its_batch(normaliser, dtype):
    images = torch.cat([stained(seed=s, strength=(1 + s / 3, 2 - s / 4))[0] for s in range(5)])
    images[3] = 1.0
    images = uint8(images) if dtype == torch.uint8 else images.to(dtype)
    together, flags = normaliser.normalise(images)
    for i in range(5):
        alone, flag = normaliser.normalise(images[i : i + 1])
        assert flag[0] == flags[i]
        assert torch.equal(alone[0], together[i])


GUARDED = {
    "white": torch.full((3, 64, 64), 255),
    "black": torch.zeros(3, 64, 64, dtype=torch.int64),
    "constant": torch.tensor([180, 90, 160])[:, None, None].expand(3, 64, 64),
    "nearly white": torch.full((3, 64, 64), 255).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(90)),
}


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("name", GUARDED)
@pytest.mark.parametrize("floating", [False, True])
def test_hopeless_images_come_back_unchanged_and_flagged(normaliser, name, floating):
    good = uint8(stained()[0])[0]
    images = torch.stack([GUARDED[name].to(torch.uint8), good])
    images = images.float() / 255 if floating else images
    out, unchanged = normaliser.normalise(images)
    assert unchanged.tolist() == [True, False]
    assert torch.equal(out[0], images[0])
    assert not torch.equal(out[1], images[1])
    with pytest.raises(StainError):
        normaliser.fit(images[:1])


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
def test_one_pixel(normaliser):
    images = torch.tensor([120, 60, 140], dtype=torch.uint8).reshape(1, 3, 1, 1)
    out, unchanged = normaliser.normalise(images)
    assert unchanged.tolist() == [True]
    assert torch.equal(out, images)


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_flagged_even_under_a_slides_fit(normaliser, bad):
    images = stained(count=2)[0].float()
    images[0, 1, 5, 5] = bad
    for fit in (None, normaliser.fit(images[1:])):
        out, unchanged = normaliser.normalise(images, fit)
        assert unchanged.tolist() == [True, False]
        assert torch.equal(out[0].nan_to_num(7), images[0].nan_to_num(7))
        assert out[1].isfinite().all()


@pytest.mark.parametrize("normaliser", UNMIXERS, ids=lambda n: type(n).__name__)
def test_slides_fit_pools_its_tiles_and_serves_a_white_tile(normaliser):
    """A tile without tissue is normalised like the rest of its slide: white stays white."""
    tiles = uint8(stained(count=3)[0])
    fit = normaliser.fit(tiles)
    pooled = tiles.movedim(0, 1).reshape(3, -1, 64)[None]
    assert torch.equal(fit.matrix, normaliser.fit(pooled).matrix)
    assert torch.equal(fit.matrix, normaliser.fit(tiles.movedim(1, -1).contiguous().numpy()).matrix)
    white = torch.full((1, 3, 64, 64), 245, dtype=torch.uint8)
    out, unchanged = normaliser.normalise(white, fit)
    assert not unchanged.any()
    assert out.min() >= 235


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_and_dtype_are_kept(normaliser, dtype):
    images = stained(count=2)[0]
    images = uint8(images) if dtype == torch.uint8 else images.to(dtype)
    before = images.clone()
    out, unchanged = normaliser.normalise(images[:, :, :48])
    assert (out.shape, out.dtype, unchanged.shape) == ((2, 3, 48, 64), dtype, (2,))
    assert torch.equal(images, before), "the input is not written to"
    reference = normaliser.normalise(before[:, :, :48].float() / (255 if dtype == torch.uint8 else 1))[0]
    scaled = out.float() / (255 if dtype == torch.uint8 else 1)
    assert (scaled - reference).abs().max() < 0.01


def test_wrong_input_is_refused():
    images = stained()[0]
    fit = Macenko().fit(images)
    for bad in (images[0], images.movedim(1, -1), images.long(), images[:0], images.numpy()):
        with pytest.raises(StainError, match="expected"):
            Macenko().normalise(bad)
    with pytest.raises(StainError, match="do not go with"):
        Macenko().normalise(images, fit, default_target("vahadane"))
    with pytest.raises(StainError, match="do not go with"):
        Macenko(light=250).normalise(images, fit)
    with pytest.raises(StainError, match="of 2 images"):
        Macenko().normalise(images, Macenko().fit_each(torch.cat([images, images])))
    for parameters in ({"light": 0.0}, {"beta": -1.0}, {"alpha": 40.0}):
        with pytest.raises(StainError, match="out of range"):
            Macenko(**parameters)
    for parameters in ({"light": 240.0}, {"sweeps": 0}, {"penalty": -0.1}):
        with pytest.raises(StainError, match="out of range"):
            Vahadane(**parameters)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda n: type(n).__name__)
def test_cuda_gives_the_cpus_answer(normaliser):
    images = uint8(stained(count=4)[0])
    images[2] = 255
    here, flags_here = normaliser.normalise(images)
    there, flags_there = normaliser.normalise(images.cuda())
    assert there.device.type == "cuda"
    assert torch.equal(flags_here, flags_there.cpu())
    assert (here.int() - there.cpu().int()).abs().max() <= 1
    fit = normaliser.fit(images.cuda())
    assert (
        normaliser.normalise(images, fit)[0].int() - normaliser.normalise(images.cuda(), fit)[0].cpu().int()
    ).abs().max() <= 1
