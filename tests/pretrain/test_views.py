"""Views of tiles: shapes, seeds, pairs, bad configurations, the contact sheet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eosin.pretrain import views as module
from eosin.pretrain.contact import contact_sheet
from eosin.pretrain.views import BLUR_AS_PUBLISHED, BLUR_AS_RELEASED, PRESETS, ViewConfig, make_views

SMALL = ViewConfig(global_px=32, local_px=16, local_crops=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int = 4, px: int = 64) -> Tensor:
    return torch.randint(0, 256, (batch, 3, px, px), dtype=torch.uint8, generator=seeded(1))


def stack(views: module.Views) -> list[Tensor]:
    return [*views.global_, *views.local]


def test_shapes():
    views = make_views(noise(), SMALL, seeded())
    assert [tuple(v.shape) for v in views.global_] == [(4, 3, 32, 32)] * 2
    assert [tuple(v.shape) for v in views.local] == [(4, 3, 16, 16)] * 3
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in stack(views))
    assert views.crops.x.shape == (5, 4)


def test_the_same_seed_gives_the_same_views_and_another_does_not():
    first, again, other = (make_views(noise(), SMALL, seeded(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(stack(first), stack(again), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(stack(first), stack(other), strict=True))


def test_a_generator_goes_on():
    generator = seeded()
    first, second = (make_views(noise(), SMALL, generator) for _ in range(2))
    assert not torch.equal(first.global_[0], second.global_[0])


@pytest.mark.parametrize("stain", ["hed", "he"])
def test_working_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch, stain: str):
    config = replace(SMALL, stain=stain, stain_probability=1.0, solarise=0.5)
    whole = make_views(noise(), config, seeded())
    monkeypatch.setitem(module._PIECE, "cpu", 1)
    pieces = make_views(noise(), config, seeded())
    for a, b in zip(stack(whole), stack(pieces), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_autocast_and_global_seed_are_left_out():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plain = make_views(noise(), SMALL, seeded())
    assert torch.equal(before, torch.get_rng_state())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = make_views(noise(), SMALL, seeded())
    assert all(torch.equal(a, b) for a, b in zip(stack(plain), stack(other), strict=True))


def off(**changed: object) -> ViewConfig:
    """A configuration that changes no colour and cuts the whole tile."""
    plain = ViewConfig(
        global_px=64,
        local_crops=0,
        global_scale=(1.0, 1.0),
        aspect=(1.0, 1.0),
        hflip=0,
        vflip=0,
        rotate=0,
        blur=(0, 0, 0),
        stain_probability=0,
        jitter=0,
        grey=0,
    )
    return replace(plain, **changed)


def test_everything_off_is_the_normalised_tile():
    tiles = noise()
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    config = off(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (tiles / 255 - mean[:, None, None]) / std[:, None, None]
    for view in make_views(tiles, config, seeded()).global_:
        torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)


def test_each_tile_gives_its_own_views():
    """Constant tiles: a view of tile i must have the colour of tile i, in every view and at every size."""
    tiles = (torch.arange(7, dtype=torch.uint8) * 30)[:, None, None, None].expand(7, 3, 64, 64).contiguous()
    config = off(global_px=16, local_px=12, local_crops=4, global_scale=(0.3, 1.0), mean=(0, 0, 0), std=(1, 1, 1))
    for view in stack(make_views(tiles, config, seeded())):
        torch.testing.assert_close(view, tiles[:, :, :1, :1].expand(view.shape) / 255, atol=1e-5, rtol=0)


def test_stain_pairs_differ_in_stain_only():
    config = replace(SMALL, stain_pairs=True, stain_scale=0.2, stain_shift=0.1, mean=(0, 0, 0), std=(1, 1, 1))
    config = replace(config, jitter=0.0, grey=0.0)
    tiles = noise().float().mul(0.3).add(60).to(torch.uint8)  # no clipping, so that the stains can be undone
    first, second = make_views(tiles, config, seeded()).global_
    od = [-torch.log((view * 255 + 1) / 240).double() for view in (first, second)]
    assert (od[0] - od[1]).abs().amax((1, 2, 3)).min() > 0.02
    for a, b in zip(*od, strict=True):  # an affine map of OD takes one exactly to the other
        design = torch.cat([a.flatten(1), torch.ones(1, a[0].numel())]).T
        solution = torch.linalg.lstsq(design, b.flatten(1).T).solution
        torch.testing.assert_close(design @ solution, b.flatten(1).T, atol=1e-4, rtol=0)
    same = replace(config, stain_scale=0.0, stain_shift=0.0, jitter=0.8, grey=0.2)
    first, second = make_views(noise(), same, seeded()).global_
    assert torch.equal(first, second)


def test_simclr_is_a_pair():
    views = make_views(noise(), PRESETS["simclr"], seeded())
    assert [tuple(v.shape) for v in views.global_] == [(4, 3, 224, 224)] * 2
    assert views.local == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_views(name: str):
    config = replace(PRESETS[name], global_px=32, local_px=16, blur_sigma_px=(0.1, 2.0))
    assert all(v.isfinite().all() for v in stack(make_views(noise(2), config, seeded())))


def test_blur_default_is_what_upstream_did_not_what_it_wrote():
    assert ViewConfig().blur == BLUR_AS_RELEASED
    assert tuple(pytest.approx(1 - p) for p in BLUR_AS_PUBLISHED) == BLUR_AS_RELEASED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"global_px": 0}, "global_px is 0"),
        ({"local_crops": -1}, "local_crops is -1"),
        ({"local_px": 96.0}, "local_px is 96.0"),
        ({"global_scale": (0.0, 1.0)}, "global_scale"),
        ({"local_scale": (0.4, 0.3)}, "local_scale"),
        ({"global_scale": (0.3, 1.1)}, "at most 1"),
        ({"aspect": (0.0, 1.0)}, "aspect"),
        ({"extended_scale": (0.9, 5.0)}, "tile pixels per crop pixel"),
        ({"blur": (1.0, 0.1)}, "blur has 2"),
        ({"blur": (1.0, 0.1, 1.5)}, "blur is 1.5"),
        ({"blur_sigma_px": (0.1, 20.0)}, "pixels of the crop"),
        ({"rotate": 1.2}, "rotate is 1.2; it must be 0 to 1"),
        ({"stain": "rgb"}, "'hed' or 'he'"),
        ({"stain_shift": 5.0}, "natural optical density"),
        ({"stain_scale": float("nan")}, "stain_scale is nan"),
        ({"hue_deg": 200.0}, "0 to 180"),
        ({"brightness": -0.1}, "brightness is -0.1"),
        ({"std": (0.0, 0.2, 0.2)}, "std is 0.0"),
        ({"mean": (120.0, 0.2, 0.2)}, "mean is 120.0"),
    ],
)
def test_bad_configurations_are_named(change: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        ViewConfig(**change)


@pytest.mark.parametrize(
    "tiles",
    [
        torch.zeros(2, 3, 64, 64),
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        torch.zeros(2, 64, 64, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 64, 32, dtype=torch.uint8),
        torch.zeros(0, 3, 64, 64, dtype=torch.uint8),
    ],
)
def test_bad_tiles_are_refused(tiles: Tensor):
    with pytest.raises(ValueError, match="uint8"):
        make_views(tiles, SMALL, seeded())


def test_extended_context_needs_larger_tiles():
    config = ViewConfig(extended_context=1.0)
    assert config.least_tile_px() == 253  # 224 * 1.1 * sqrt(1 / 0.95) = 252.8
    with pytest.raises(ValueError, match="at least 253 px"):
        make_views(noise(1, 224), config, seeded())
    assert len(make_views(noise(1, 253), replace(config, local_crops=1), seeded()).local) == 1


def test_contact_sheet_shows_the_views(tmp_path: Path):
    tiles = noise(2)
    path = contact_sheet(tiles, SMALL, tmp_path / "sheet.png", seed=3)
    sheet = np.asarray(Image.open(path))
    views = make_views(tiles, SMALL, seeded(3))
    mean, std = (torch.tensor(v)[:, None, None] for v in (SMALL.mean, SMALL.std))
    for group in (views.global_, views.local):
        for view in group:
            shown = (view[1] * std + mean).mul(255).round().to(torch.uint8).movedim(0, 2).numpy()
            places = np.lib.stride_tricks.sliding_window_view(sheet, shown.shape)[:, :, 0]
            assert (places[::2, ::2] == shown).all((2, 3, 4)).sum() == 1


@pytest.mark.real
def test_views_of_real_tiles(real_data: Path):
    files = sorted((real_data / "tiles" / "camelyon16").glob("*/*.png"))[:4]
    tiles = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))).movedim(2, 0) for f in files])
    config = replace(ViewConfig(), local_crops=2, stain="he", stain_probability=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    for view in stack(make_views(tiles, config, seeded())):
        assert view.isfinite().all()
        assert view.min() >= 0
        assert view.max() <= 1
        assert (view.std((1, 2, 3)) > 0.01).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_gives_the_views_of_the_cpu():
    tiles = noise(6, 128)
    for stain in ("hed", "he"):
        config = replace(SMALL, stain=stain, stain_probability=1.0)
        on_cpu, on_gpu = (make_views(t, config, seeded()) for t in (tiles, tiles.cuda()))
        for a, b in zip(stack(on_cpu), stack(on_gpu), strict=True):
            torch.testing.assert_close(a, b.cpu(), atol=1e-3, rtol=0)
