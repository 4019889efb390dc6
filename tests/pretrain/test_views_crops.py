"""Crops against PIL, torchvision, closed forms and the distributions that are asked for."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
import torchvision.transforms.functional as tvf
from PIL import Image
from scipy import stats
from torch import Tensor

from eosin.pretrain import crops as module
from eosin.pretrain.crops import Crops, blur_radius, draw_crops, largest_side
from eosin.pretrain.view_config import ViewConfig

S = 256


def crops_of(
    boxes: list[tuple[float, float, float, float]],
    *,
    flip_x: bool = False,
    flip_y: bool = False,
    transpose: bool = False,
    sigma: float = 0.0,
) -> Crops:
    """Crops (N,) with boxes (x, y, width, height)."""
    x, y, width, height = torch.tensor(boxes).T
    flags = {
        name: torch.full((len(boxes),), v)
        for name, v in (("flip_x", flip_x), ("flip_y", flip_y), ("transpose", transpose))
    }
    return Crops(x=x, y=y, width=width, height=height, sigma=torch.full((len(boxes),), sigma), **flags)


def noise(batch: int = 2, px: int = S) -> Tensor:
    return torch.randint(0, 256, (batch, 3, px, px), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def cut(tiles: Tensor, rows: Tensor, crops: Crops, *, px: int, largest: float, radius: int = 6) -> Tensor:
    return module.cut(tiles / 255, rows, crops, px=px, largest=largest, radius=radius)


def coordinates() -> Tensor:
    """A tile whose red is x, green is y."""
    line = torch.arange(S, dtype=torch.uint8)
    return torch.stack([line.expand(S, S), line[:, None].expand(S, S), torch.zeros(S, S, dtype=torch.uint8)])[None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BOXES = [
    (0.0, 0.0, 256.0, 256.0),
    (10.3, 20.7, 200.4, 180.9),
    (100.5, 3.25, 60.0, 75.0),
    (0.0, 180.2, 255.9, 75.8),
    (190.1, 200.2, 65.9, 55.8),
]


@pytest.mark.parametrize("px", [32, 96, 224])
def test_equals_pil_resize_of_a_real_box(px: int):
    tiles = noise(1)
    ours = cut(tiles, torch.zeros(len(BOXES), dtype=torch.long), crops_of(BOXES), px=px, largest=S) * 255
    for crop, (x, y, w, h) in zip(ours, BOXES, strict=True):
        for channel in range(3):
            image = Image.fromarray(tiles[0, channel].numpy()).convert("F")
            theirs = np.asarray(image.resize((px, px), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h)))
            np.testing.assert_allclose(crop[channel].numpy(), theirs.clip(0, 255), atol=0.02)


def test_equals_torchvision_antialiased_resized_crop():
    tiles = noise()
    boxes = [(30.0, 12.0, 160.0, 200.0), (64.0, 64.0, 40.0, 36.0)]
    ours = cut(tiles, torch.tensor([0, 1]), crops_of(boxes), px=96, largest=S)
    for i, (x, y, w, h) in enumerate(boxes):
        theirs = tvf.resized_crop(
            tiles[i].float() / 255,
            int(y),
            int(x),
            int(h),
            int(w),
            [96, 96],
            tvf.InterpolationMode.BICUBIC,
            antialias=True,
        ).clamp(0, 1)
        inside = slice(6, -6)  # torchvision does not look at what lies outside the box
        torch.testing.assert_close(ours[i, :, inside, inside], theirs[:, inside, inside], atol=2e-5, rtol=0)


def test_downscaling_does_not_alias():
    grid = (torch.arange(S)[:, None] + torch.arange(S)) % 2
    tile = (grid * 255).to(torch.uint8).expand(1, 3, S, S).contiguous()
    box = crops_of([(0.4, 0.2, 250.0, 250.0)])
    ours = cut(tile, torch.zeros(1, dtype=torch.long), box, px=90, largest=S)[..., 4:-4, 4:-4]
    aliased = torch.nn.functional.interpolate(tile.float() / 255, size=(90, 90), mode="bicubic")[..., 4:-4, 4:-4]
    assert (ours - 0.5).abs().max() < 0.02
    assert (aliased - 0.5).abs().max() > 0.3


@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_every_pixel_shows_its_coordinate(flip_x: bool, flip_y: bool, transpose: bool):
    boxes = [(20.3, 33.3, 170.2, 150.6), (60.75, 90.5, 50.1, 60.2), (120.0, 40.0, 96.0, 96.0)]
    crops = crops_of(boxes, flip_x=flip_x, flip_y=flip_y, transpose=transpose)
    out = cut(coordinates(), torch.zeros(3, dtype=torch.long), crops, px=96, largest=180) * 255
    step = (torch.arange(96) + 0.5) / 96
    for crop, (x, y, w, h) in zip(out, boxes, strict=True):
        across = x + w * (step.flip(0) if flip_x else step) - 0.5
        down = y + h * (step.flip(0) if flip_y else step) - 0.5
        red, green = across.expand(96, 96), down[:, None].expand(96, 96)
        if transpose:
            red, green = red.mT, green.mT
        # the cubic kernel keeps straight lines exactly; widened by a factor that is not whole, to a few hundredths
        atol = 1e-3 if max(w, h) <= 96 else 0.05
        torch.testing.assert_close(crop[0], red, atol=atol, rtol=0)
        torch.testing.assert_close(crop[1], green, atol=atol, rtol=0)


def test_a_tight_bound_on_the_boxes_changes_nothing():
    config = ViewConfig(global_px=64, local_px=32)
    crops = draw_crops(8, S, config, generator=seeded())
    tiles, rows = noise(8), torch.arange(8)
    for view in range(2, 10):
        tight = largest_side(S, config, local=True)
        assert tight < S
        ours = cut(tiles, rows, crops[view], px=32, largest=tight)
        torch.testing.assert_close(ours, cut(tiles, rows, crops[view], px=32, largest=S), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision(sigma: float):
    tiles, box = noise(1), [(8.0, 16.0, 200.0, 220.0)]
    ours = cut(tiles, torch.zeros(1, dtype=torch.long), crops_of(box, sigma=sigma), px=64, largest=S, radius=6)
    sharp = cut(tiles, torch.zeros(1, dtype=torch.long), crops_of(box), px=64, largest=S)
    theirs = tvf.gaussian_blur(sharp, [13, 13], [sigma, sigma])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_blur_reads_three_deviations():
    assert blur_radius(ViewConfig(blur_sigma_px=(0.1, 2.0))) == 6
    assert blur_radius(ViewConfig(blur_sigma_px=(0.1, 2.1))) == 7


def test_turns_are_right_angles():
    config = ViewConfig(rotate=1.0, hflip=0.0, vflip=0.0, global_px=32, local_px=16, blur=(0, 0, 0))
    crops = draw_crops(600, 64, config, generator=seeded())[0]
    whole = crops_of([(0.0, 0.0, 64.0, 64.0)] * 600)
    turned = dataclasses.replace(whole, flip_x=crops.flip_x, flip_y=crops.flip_y, transpose=crops.transpose)
    tiles = noise(1, 64)
    rows = torch.zeros(600, dtype=torch.long)
    out = cut(tiles, rows, turned, px=32, largest=64)
    plain = cut(tiles, rows[:1], whole[:1], px=32, largest=64)[0]
    turns = torch.stack([torch.rot90(plain, k, (1, 2)) for k in range(4)])
    distance = (out[:, None] - turns).abs().amax((2, 3, 4))
    assert distance.amin(1).max() < 1e-5
    counts = distance.argmin(1).bincount(minlength=4)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 0.001


def test_flips_and_turns_reach_all_eight_orientations_alike():
    crops = draw_crops(4000, S, ViewConfig(), generator=seeded())[0]
    code = crops.flip_x.int() + 2 * crops.flip_y.int() + 4 * crops.transpose.int()
    assert stats.chisquare(code.bincount(minlength=8).numpy()).pvalue > 0.001


def test_local_crops_are_uniform_in_area_log_aspect_and_place():
    config = ViewConfig()
    crops = draw_crops(500, S, config, generator=seeded())[2:]
    x, y, w, h = (value.flatten().double() for value in (crops.x, crops.y, crops.width, crops.height))
    low, high = config.local_scale
    draws = {
        "area": ((w * h / S**2) - low) / (high - low),
        "aspect": ((w / h).log() - math.log(3 / 4)) / math.log(16 / 9),
        "x": x / (S - w),
        "y": y / (S - h),
    }
    for name, values in draws.items():
        assert stats.kstest(values.numpy(), "uniform").pvalue > 0.001, name


def test_global_crops_are_distributed_like_torchvision():
    config = ViewConfig()
    crops = draw_crops(1500, S, config, generator=seeded())[:1]
    torch.manual_seed(0)
    image = torch.zeros(3, S, S)
    theirs = np.array([tv.RandomResizedCrop.get_params(image, [0.32, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)])
    ours = [v.flatten().numpy() for v in (crops.y, crops.x, crops.height, crops.width)]
    for i, values in enumerate(ours):
        assert stats.ks_2samp(values, theirs[:, i]).pvalue > 0.001, i
    area = stats.ks_2samp(ours[2] * ours[3], theirs[:, 2] * theirs[:, 3])
    assert area.pvalue > 0.001


def test_boxes_lie_in_the_tile():
    for config in (ViewConfig(), ViewConfig(extended_context=0.5), ViewConfig(global_scale=(1.0, 1.0))):
        crops = draw_crops(200, 392, config, generator=seeded())
        for start, side in ((crops.x, crops.width), (crops.y, crops.height)):
            assert start.min() >= 0
            assert (start + side).max() <= 392 + 1e-3
            assert side[:2].max() <= largest_side(392, config, local=False) + 1e-3
            assert side[2:].max() <= largest_side(392, config, local=True) + 1e-3


def test_nothing_fits_gives_the_whole_tile():
    crops = draw_crops(50, S, ViewConfig(global_scale=(1.0, 1.0), aspect=(1.2, 1.3)), generator=seeded())
    assert (crops.width[:2] == S).all()
    assert (crops.height[:2] == S).all()


def test_extended_context_keeps_the_mpp():
    config = ViewConfig(extended_context=1.0)
    crops = draw_crops(500, 392, config, generator=seeded())
    for part, px in ((slice(0, 2), 224), (slice(2, None), 96)):
        w, h = crops.width[part].flatten().double(), crops.height[part].flatten().double()
        scale = ((w * h).sqrt() / px - 0.9) / 0.2
        aspect = ((w / h).log() - math.log(0.95)) / math.log(1.05 / 0.95)
        assert stats.kstest(scale.numpy(), "uniform").pvalue > 0.001
        assert stats.kstest(aspect.numpy(), "uniform").pvalue > 0.001


def test_extended_context_is_drawn_per_tile():
    config = ViewConfig(extended_context=0.3)
    crops = draw_crops(2000, 392, config, generator=seeded())
    side = (crops.width * crops.height).sqrt()[2:] / config.local_px
    extended = ((side > 0.9 - 1e-4) & (side < 1.1 + 1e-4)).all(0)
    assert abs(extended.double().mean() - 0.3) < 0.05


def test_blur_has_its_true_probability():
    crops = draw_crops(3000, S, ViewConfig(blur=(0.0, 0.9, 0.5)), generator=seeded())
    blurred = (crops.sigma > 0).double()
    assert blurred[0].sum() == 0
    assert abs(blurred[1].mean() - 0.9) < 0.02
    assert abs(blurred[2:].mean() - 0.5) < 0.02
    sigma = crops.sigma[1][crops.sigma[1] > 0].double()
    assert stats.kstest((sigma.numpy() - 0.1) / 1.9, "uniform").pvalue > 0.001


def test_boxes_do_not_depend_on_blur_or_flips():
    plain = draw_crops(5, S, ViewConfig(), generator=seeded())
    other = draw_crops(5, S, ViewConfig(blur=(1, 1, 1), hflip=0, rotate=0), generator=seeded())
    assert torch.equal(plain.x, other.x)
    assert torch.equal(plain.width, other.width)
