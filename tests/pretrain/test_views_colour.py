"""Colour of crops against torchvision and against eosin.stain."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as tvf
from scipy import stats
from torch import Tensor

from eosin.pretrain import photometric
from eosin.pretrain.photometric import Colours, draw_colours, jitter_colours, jitter_stains, recolour, stain_basis
from eosin.pretrain.view_config import ViewConfig
from eosin.stain import Macenko, jitter_he, jitter_hed


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, px: int = 40) -> Tensor:
    """Noise, plus an image each of grey, black and saturated colour."""
    out = torch.rand(count, 3, px, px, generator=seeded(3))
    out[0] = out[0, :1]
    out[1] = 0
    out[2] = (out[2] > 0.5).float()
    return out


def stained(count: int, px: int = 48) -> Tensor:
    """H&E-like tiles, uint8."""
    amounts = torch.rand(count, 2, px * px, generator=seeded(5)) ** 3 * torch.tensor([1.5, 1.0])[:, None]
    matrix = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    grey = 240 * torch.exp(-(matrix.T @ amounts)) - 1
    return grey.clamp(0, 255).round().to(torch.uint8).view(count, 3, px, px)


def nothing(count: int, **changed: Tensor) -> Colours:
    flags = dict.fromkeys(("stained", "jittered", "grey", "solarise"), torch.zeros(count, dtype=torch.bool))
    factors = dict.fromkeys(("brightness", "contrast", "saturation"), torch.ones(count))
    stains = dict.fromkeys(("stain_factor", "stain_offset"), torch.zeros(count, 3))
    return Colours(**{**flags, **factors, **stains, "hue": torch.zeros(count), **changed})


def random_factors(count: int, strength: float = 0.5) -> dict[str, Tensor]:
    draw = torch.rand(4, count, generator=seeded(9)) * 2 - 1
    names = ("brightness", "contrast", "saturation")
    return {name: 1 + strength * draw[i] for i, name in enumerate(names)} | {"hue": 0.5 * draw[3]}


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_equals_torchvision(name: str):
    source, factor = images(), random_factors(6)[name]
    ours = jitter_colours(source.clone(), nothing(6, **{name: factor}))
    function = getattr(tvf, f"adjust_{name}")
    theirs = torch.stack([function(image, float(f)) for image, f in zip(source, factor, strict=True)])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_all_four_equal_torchvision_in_order():
    source, factors = images(), random_factors(6)
    ours = jitter_colours(source.clone(), nothing(6, **factors))
    for i, image in enumerate(source):
        theirs = tvf.adjust_brightness(image, float(factors["brightness"][i]))
        theirs = tvf.adjust_contrast(theirs, float(factors["contrast"][i]))
        theirs = tvf.adjust_saturation(theirs, float(factors["saturation"][i]))
        theirs = tvf.adjust_hue(theirs, float(factors["hue"][i]))
        torch.testing.assert_close(ours[i], theirs, atol=2e-5, rtol=0)


def test_hue_by_closed_form():
    pure = torch.eye(3)[..., None, None]
    third = jitter_colours(pure.clone(), nothing(3, hue=torch.full((3,), 1 / 3)))
    torch.testing.assert_close(third, pure.roll(-1, 0), atol=1e-6, rtol=0)  # red to green to blue to red


def test_grey_and_solarise_equal_torchvision():
    source, flag = images(), torch.tensor([True, False, True, False, True, True])
    grey = recolour(source.clone(), nothing(6, grey=flag), stain_basis(stained(6), "hed"))
    torch.testing.assert_close(grey[flag], tvf.rgb_to_grayscale(source[flag], 3), atol=1e-6, rtol=0)
    assert torch.equal(grey[~flag], source[~flag])
    inverted = recolour(source.clone(), nothing(6, solarise=flag), stain_basis(stained(6), "hed"))
    torch.testing.assert_close(inverted[flag], tvf.solarize(source[flag], 0.5), atol=1e-6, rtol=0)
    assert torch.equal(inverted[~flag], source[~flag])


def draws_of(generator: torch.Generator, count: int, stains: int) -> tuple[Tensor, Tensor]:
    """What eosin.stain.augment draws, padded to three stains."""
    draws = torch.rand(count, 2, stains, 1, generator=generator)[..., 0] * 2 - 1
    draws = torch.nn.functional.pad(draws, (0, 3 - stains))
    return draws[:, 0], draws[:, 1]


def test_hed_equals_eosin_stain():
    tiles = stained(4).float() / 255
    theirs, unchanged = jitter_hed(tiles, generator=seeded(), scale=0.2, shift=0.1)
    factor, offset = draws_of(seeded(), 4, 3)
    colours = nothing(4, stain_factor=0.2 * factor, stain_offset=0.1 * offset)
    ours = jitter_stains(tiles, *stain_basis(tiles, "hed"), colours=colours)
    assert not unchanged.any()
    assert (ours - tiles).abs().max() > 0.02
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_he_equals_eosin_stain():
    tiles = stained(4)
    theirs, unchanged = jitter_he(tiles / 255, generator=seeded(), scale=0.2, shift=0.1, fit=Macenko().fit_each(tiles))
    factor, offset = draws_of(seeded(), 4, 2)
    colours = nothing(4, stain_factor=0.2 * factor, stain_offset=0.1 * offset)
    ours = jitter_stains(tiles / 255, *stain_basis(tiles, "he"), colours=colours)
    assert not unchanged.any()
    assert (ours - tiles / 255).abs().max() > 0.02
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_he_fit_of_part_of_the_pixels_is_that_of_all(monkeypatch: pytest.MonkeyPatch):
    tiles = stained(2, px=256)
    some = stain_basis(tiles, "he")[0]
    monkeypatch.setattr(photometric, "FIT_PX", 256 * 256)
    every = stain_basis(tiles, "he")[0]
    cosine = torch.nn.functional.cosine_similarity(some[:, :2], every[:, :2], dim=2)
    assert not torch.equal(some, every)
    assert cosine.min() > 0.999


def test_a_blank_tile_keeps_its_colour_under_he():
    blank = torch.full((1, 3, 48, 48), 240, dtype=torch.uint8)
    colours = nothing(1, stain_factor=torch.ones(1, 3), stain_offset=torch.ones(1, 3))
    out = jitter_stains(blank / 255, *stain_basis(blank, "he"), colours=colours)
    torch.testing.assert_close(out, blank / 255, atol=1e-6, rtol=0)


def test_stain_jitter_of_nothing_changes_nothing():
    source = images()
    out = jitter_stains(source, *stain_basis(source, "hed"), colours=nothing(6))
    torch.testing.assert_close(out, source, atol=2e-6, rtol=0)


def test_draws_have_their_probabilities_and_ranges():
    config = ViewConfig(jitter=0.8, grey=0.2, solarise=0.3, stain_probability=0.4)
    drawn = draw_colours(1000, config, generator=seeded())
    for name, p in (("jittered", 0.8), ("grey", 0.2), ("stained", 0.4)):
        assert abs(getattr(drawn, name).double().mean() - p) < 0.02, name
    assert abs(drawn.solarise[1].double().mean() - 0.3) < 0.05
    assert not drawn.solarise[[0, *range(2, 10)]].any()
    for values, centre, half in (
        (drawn.brightness, 1, config.brightness),
        (drawn.contrast, 1, config.contrast),
        (drawn.saturation, 1, config.saturation),
        (drawn.hue, 0, config.hue_deg / 360),
        (drawn.stain_factor, 0, config.stain_scale),
        (drawn.stain_offset, 0, config.stain_shift),
    ):
        uniform = (values.flatten().double().numpy() - centre) / (2 * half) + 0.5
        assert stats.kstest(uniform, "uniform").pvalue > 0.001
