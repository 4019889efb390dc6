from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eosin.errors import WeightsError
from eosin.pretrain.ema import make_teacher, pair, update
from eosin.pretrain.model import ModelConfig, VisionTransformer


def student(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(ModelConfig(dim=16, depth=2, heads=2, patch_px=4, position_grid=4))


def test_averaging_equals_torch_swa_utils_bit_by_bit() -> None:
    """AveragedModel copies the model at its first update, so its second update is our first."""
    net = student()
    ours = make_teacher(net)
    oracle = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    oracle.update_parameters(net)
    pairs = pair(ours, net)
    for seed in range(1, 5):
        net.load_state_dict(student(seed).state_dict())
        update(pairs, momentum=0.9)
        oracle.update_parameters(net)
    for (name, mine), theirs in zip(ours.named_parameters(), oracle.module.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_average_of_a_constant_student_has_a_closed_form() -> None:
    teacher, net = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    first = teacher.weight.detach().clone()
    pairs = pair(teacher, net)
    for _ in range(50):
        update(pairs, momentum=0.95)
    expected = net.weight + 0.95**50 * (first - net.weight)
    torch.testing.assert_close(teacher.weight, expected, rtol=0, atol=1e-14)


def test_momentum_one_holds_and_zero_copies() -> None:
    teacher, net = student(0), student(1)
    old = {n: p.clone() for n, p in teacher.named_parameters()}
    update(pair(teacher, net), momentum=1.0)
    assert all(torch.equal(p, old[n]) for n, p in teacher.named_parameters())
    update(pair(teacher, net), momentum=0.0)
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), net.parameters(), strict=True))


def test_the_teacher_is_apart_and_takes_no_gradient() -> None:
    net = student()
    teacher = make_teacher(net)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        net.cls_token.add_(1)
    assert not torch.equal(net.cls_token, teacher.cls_token)
    assert net.cls_token.requires_grad


def test_bad_pairs_are_refused() -> None:
    net = student()
    with pytest.raises(WeightsError, match="is the student's own tensor"):
        pair(net, net)
    other = VisionTransformer(ModelConfig(dim=32, depth=2, heads=2, patch_px=4, position_grid=4))
    with pytest.raises(WeightsError, match=r"cls_token is \(1, 1, 32\) in the teacher, \(1, 1, 16\)"):
        pair(other, net)
    shallow = VisionTransformer(ModelConfig(dim=16, depth=1, heads=2, patch_px=4, position_grid=4))
    with pytest.raises(WeightsError, match=r"differ in 14 parameters: blocks\.1"):
        pair(shallow, net)
    with pytest.raises(WeightsError, match=r"torch\.bfloat16"):
        pair(make_teacher(net).bfloat16(), net)
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        update(pair(make_teacher(net), net), momentum=1.5)
