"""The target, the loss, the peaks and the network of the detector, each against something plain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import maximum_filter
from small_vits import dinov2, dinov3, images, resnet

from eosin.errors import ConfigError, GeometryError
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.detector import Detector, heat_loss, heat_target, peaks

HEAD = AdaptConfig(mode="head")


def plain_loss(logits: np.ndarray, target: np.ndarray) -> float:
    """Zhou et al. 2019, equation 1, cell by cell."""
    total, figures = 0.0, 0
    for z, y in zip(logits.ravel(), target.ravel(), strict=True):
        p = 1 / (1 + math.exp(-z))
        if y == 1:
            figures += 1
            total += (1 - p) ** 2 * math.log(p)
        else:
            total += (1 - y) ** 4 * p**2 * math.log(1 - p)
    return -total / max(1, figures)


def test_target_is_the_largest_bump_and_one_at_each_centre() -> None:
    points = np.array([(13.0, 22.0), (18.0, 25.0), (-3.0, 30.0), (70.0, 5.0)])
    heat = heat_target(points, (8, 10), stride_px=4, sigma_px=8)
    for row in range(8):
        for column in range(10):
            x, y = 4 * column + 2, 4 * row + 2
            bump = max(math.exp(-((x - a) ** 2 + (y - b) ** 2) / 128) for a, b in points)
            holds = any(x - 2 <= a < x + 2 and y - 2 <= b < y + 2 for a, b in points)
            assert heat[row, column] == pytest.approx(1.0 if holds else bump, abs=1e-6)
    assert (heat == 1).sum() == 2  # the two centres on the map, and no other cell
    assert not heat_target(np.empty((0, 2)), (8, 10), stride_px=4, sigma_px=8).any()


def test_loss_is_the_plain_loop() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, 6, 7))
    target = np.stack([heat_target(rng.uniform(-4, 28, (k, 2)), (6, 7), stride_px=4, sigma_px=6) for k in (0, 1, 3)])
    found = heat_loss(torch.from_numpy(logits), torch.from_numpy(target.astype(np.float64)))
    assert float(found) == pytest.approx(plain_loss(logits, target), rel=1e-12)
    empty = heat_loss(torch.from_numpy(logits[:1]), torch.zeros(1, 6, 7, dtype=torch.float64))
    assert float(empty) == pytest.approx(plain_loss(logits[:1], np.zeros((6, 7))), rel=1e-12)


def test_gradient_of_the_loss_is_its_slope() -> None:
    rng = np.random.default_rng(1)
    target = torch.from_numpy(heat_target(np.array([(9.0, 6.0)]), (4, 5), stride_px=4, sigma_px=5).astype(np.float64))
    logits = torch.from_numpy(rng.normal(0, 2, (1, 4, 5))).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: heat_loss(z, target[None]), (logits,))
    far = torch.tensor([[[-90.0, 90.0, 90.0]]], requires_grad=True)
    heat_loss(far, torch.tensor([[[1.0, 0.0, 1.0]]])).backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()


def test_loss_is_zero_where_the_map_is_right() -> None:
    target = torch.zeros(1, 5, 5)
    target[0, 2, 3] = 1
    right = torch.where(target == 1, 40.0, -40.0)
    assert float(heat_loss(right, target)) == pytest.approx(0, abs=1e-12)
    assert float(heat_loss(-right, target)) > 100
    # Beside a centre a high score costs less than far from it, by (1 - Y)^4.
    bump = torch.from_numpy(heat_target(np.array([(10.0, 10.0)]), (5, 5), stride_px=4, sigma_px=8))[None]
    beside, far = right.clone(), right.clone()
    beside[0, 2, 1], far[0, 0, 0] = 2.0, 2.0
    assert float(heat_loss(beside, bump)) < float(heat_loss(far, bump))


def test_peaks_are_those_of_a_maximum_filter() -> None:
    rng = np.random.default_rng(2)
    p = rng.uniform(0.001, 0.999, (4, 9, 11))
    p[0, 3, 3:5] = 0.9995  # a plateau of two
    p[1, 0, 0] = p[2, 8, 10] = p[3, 0, 5] = 0.9999
    which, place, score = peaks(torch.from_numpy(np.log(p)), floor=0.3)
    highest = np.stack([maximum_filter(one, size=3, mode="constant", cval=-np.inf) for one in p])
    expected = np.argwhere((p == highest) & (p >= 0.3))
    cells = torch.stack((which, place[:, 1].floor().long(), place[:, 0].floor().long()), dim=1).numpy()
    near = np.abs(place.numpy() - 0.5 - expected[:, [2, 1]])
    assert np.array_equal(which.numpy(), expected[:, 0])
    assert near.max() <= 0.5
    assert np.allclose(score.numpy(), p[tuple(expected.T)])
    border = (expected[:, 1] == 0) & (expected[:, 2] == 0)
    assert np.array_equal(place.numpy()[border], np.full((border.sum(), 2), 0.5))
    assert len(cells) == len(expected)


@pytest.mark.parametrize("centre", [(5.5, 4.5), (5.93, 4.2), (5.01, 4.99), (3.3, 6.77)])
def test_the_place_of_a_bump_is_exact(centre: tuple[float, float]) -> None:
    y, x = np.mgrid[:9, :11] + 0.5
    log_p = math.log(0.8) - ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 1.7**2)
    _, place, score = peaks(torch.from_numpy(log_p)[None])
    assert place.numpy() == pytest.approx(np.array([centre]), abs=1e-9)
    assert 0.7 < float(score[0]) <= 0.8


@pytest.mark.parametrize("make", [dinov2, dinov3])
@pytest.mark.parametrize("mode", ["head", "lora"])
def test_map_and_what_trains(make, mode: str) -> None:
    model = Detector(make(), AdaptConfig(mode=mode, dropout=0.0), width=16).train()  # type: ignore[arg-type]
    assert model.stride_px == 4
    heat = model(images(side=48))
    assert heat.shape == (3, 12, 12)
    heat.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    inside = {name for name in trained if name.startswith("backbone")}
    assert all(name in trained for name, _ in model.head.named_parameters(prefix="head"))
    assert bool(inside) == (mode == "lora")
    assert model.backbone.training == (mode == "lora")


def test_a_new_head_is_as_unsure_as_centernets_and_seeded() -> None:
    one, same, other = (Detector(dinov2(), HEAD, seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        heat = [model(images()).sigmoid() for model in (one, same, other)]
    assert heat[0].mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(heat[0], heat[1])
    assert not torch.equal(heat[0], heat[2])


def test_cells_are_about_four_pixels_whatever_the_patch() -> None:
    assert Detector(resnet(), HEAD).stride_px == 4  # 32 px, halved three times
    assert Detector(resnet(), HEAD, width=8)(images(side=32)).shape == (3, 8, 8)


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = dinov2()
    with pytest.raises(GeometryError, match="not a multiple of its 8 px patch"):
        Detector(backbone, HEAD)(images(side=44))
    monkeypatch.setattr(backbone, "spec", backbone.spec.replace(patch_px=0))
    with pytest.raises(ConfigError, match="no patch tokens"):
        Detector(backbone, HEAD)
