from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lightly.models.modules.heads import DINOProjectionHead
from torch import nn

from eosin.pretrain.heads import ProjectionHead, WeightNormLinear, mlp

SIZES = {"hidden": 24, "bottleneck": 8, "prototypes": 40}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_equals_lightlys_head_in_value_and_gradient():
    theirs = DINOProjectionHead(16, 24, 8, 40, norm_last_layer=False)
    ours = ProjectionHead(16, **SIZES)
    with torch.no_grad():
        theirs.last_layer.weight_g.copy_(torch.rand(40, 1) + 0.5)
        linears = [m for m in theirs.layers if isinstance(m, nn.Linear)]
        for mine, other in zip([m for m in ours.mlp if isinstance(m, nn.Linear)], linears, strict=True):
            mine.load_state_dict(other.state_dict())
        ours.last_layer.load_state_dict(theirs.last_layer.state_dict())
    x = torch.randn(6, 16)
    weights = torch.randn(6, 40)
    for head in (ours, theirs):
        (head(x) * weights).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)
    for name in ("weight_g", "weight_v"):
        mine, other = getattr(ours.last_layer, name).grad, getattr(theirs.last_layer, name).grad
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_without_weight_norm_the_last_layer_is_plain():
    head = ProjectionHead(16, **SIZES, weight_norm=False)
    x = torch.randn(5, 16)
    hidden = head.mlp(x).detach().double().numpy()
    expected = hidden / np.linalg.norm(hidden, axis=1, keepdims=True) @ head.last_layer.weight.detach().numpy().T
    np.testing.assert_allclose(head(x).detach().numpy(), expected, atol=1e-6)


def test_names_are_those_of_upstream():
    names = set(ProjectionHead(16, **SIZES).state_dict())
    expected = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert names == expected | {"last_layer.weight_g", "last_layer.weight_v"}
    assert "last_layer.weight" in ProjectionHead(16, **SIZES, weight_norm=False).state_dict()


def test_initial_weights():
    head = ProjectionHead(384, hidden=512, bottleneck=64, prototypes=2048)
    assert float(head.mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not head.mlp[0].bias.any()
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_g.requires_grad
    plain = ProjectionHead(384, hidden=512, bottleneck=64, prototypes=2048, weight_norm=False)
    assert float(plain.last_layer.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_logits_of_weight_norm_are_cosines_times_gain():
    head = ProjectionHead(16, **SIZES)
    x = 1e4 * torch.randn(50, 16)
    with torch.no_grad():
        before = head(x)
        assert float(before.abs().max()) <= 1 + 1e-5
        head.last_layer.weight_v.mul_(7)
        torch.testing.assert_close(head(x), before)
        head.last_layer.weight_g.mul_(3)
        torch.testing.assert_close(head(x), 3 * before)


def test_tokens_of_any_leading_shape_and_a_copy():
    head = ProjectionHead(16, **SIZES)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(copy.deepcopy(head)(x)[1, 2], head(x[1, 2]))


def test_half_precision_stays_close_and_finite():
    head = ProjectionHead(16, **SIZES)
    x = torch.randn(6, 16)
    full = head(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.03, rtol=0.03)
    assert head(torch.zeros(1, 16)).isfinite().all()


def test_depth_of_the_mlp():
    assert isinstance(mlp(4, 8, 2, layers=1), nn.Linear)
    shapes = [tuple(m.weight.shape) for m in mlp(4, 8, 2, layers=4) if isinstance(m, nn.Linear)]
    assert shapes == [(8, 4), (8, 8), (8, 8), (2, 8)]


def test_a_step_moves_direction_and_gain():
    layer = WeightNormLinear(4, 6)
    layer(torch.randn(3, 4)).square().sum().backward()
    dots = (layer.weight_v.grad * layer.weight_v).sum(dim=1)
    torch.testing.assert_close(dots, torch.zeros(6), atol=1e-5, rtol=0)
    assert layer.weight_g.grad.abs().min() > 0


def test_impossible_sizes():
    with pytest.raises(ValueError, match="prototypes is 1"):
        ProjectionHead(16, hidden=8, bottleneck=4, prototypes=1)
    with pytest.raises(ValueError, match="0 layers"):
        mlp(4, 8, 2, layers=0)
