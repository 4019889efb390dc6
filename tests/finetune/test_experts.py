from __future__ import annotations

import pytest
import torch
from small_vits import dinov3, images, resnet
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.classifier import Classifier, parameter_groups
from eosin.finetune.experts import Mixture


def pair(classes: tuple[str, ...] = ("normal", "atypical")) -> tuple[Classifier, Classifier]:
    vit = Classifier(dinov3(), AdaptConfig(dropout=0.0), classes=classes)
    cnn = Classifier(resnet(), AdaptConfig(mode="full"), classes=classes, seed=1)
    return vit.eval(), cnn.eval()


@pytest.mark.parametrize("classes", [("normal", "atypical"), ("a", "b", "c")])
def test_a_gate_of_one_is_that_expert_exactly(classes: tuple[str, ...]) -> None:
    vit, cnn = pair(classes)
    model = Mixture([vit, cnn])
    x = images()
    std, mean = (torch.tensor(v)[:, None, None] for v in (vit.spec.std, vit.spec.mean))
    for at, alone in enumerate((vit(x), cnn((x * std + mean - 0.5) / 0.5))):
        with torch.no_grad():
            model.gate.bias.copy_(torch.full((2,), -500.0).index_fill_(0, torch.tensor(at), 500.0))
        assert torch.equal(model.shares(x), torch.eye(2)[at].expand(3, 2))
        assert torch.equal(model(x), alone)


def test_the_start_is_the_mean_of_the_experts_and_shares_sum_to_one() -> None:
    vit, cnn = pair()
    model = Mixture([vit, cnn])
    x = images()
    std, mean = (torch.tensor(v)[:, None, None] for v in (vit.spec.std, vit.spec.mean))
    expected = (vit(x) + cnn((x * std + mean - 0.5) / 0.5)) / 2
    torch.testing.assert_close(model(x), expected)
    torch.nn.init.normal_(model.gate.weight)
    shares = model.shares(x)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    assert float((shares - 0.5).detach().abs().max()) > 0.01


def test_the_gate_learns_which_expert_is_right() -> None:
    """One expert knows the answer, the other says the opposite: its share goes to the first."""
    vit, cnn = pair()
    x, labels = images(count=8), torch.tensor([0.0, 1] * 4)[:, None]
    for expert in (vit, cnn):
        expert.requires_grad_(False)
    model = Mixture([vit, cnn])
    vit.head.register_forward_hook(lambda *_: labels * 8 - 4)
    cnn.head.register_forward_hook(lambda *_: 4 - labels * 8)
    optimiser = torch.optim.Adam(parameter_groups(model, lr=0.1, weight_decay=0.0))
    for _ in range(15):
        optimiser.zero_grad()
        functional.binary_cross_entropy_with_logits(model(x), labels).backward()
        optimiser.step()
    assert float(model.shares(x)[:, 0].detach().min()) > 0.8


def test_experts_of_other_classes_are_refused() -> None:
    vit, _ = pair()
    _, cnn = pair(("a", "b", "c"))
    for experts in ([vit, cnn], [vit], []):
        with pytest.raises(ConfigError, match="same classes"):
            Mixture(experts)


def test_checkpointing_is_for_the_transformer_only() -> None:
    vit, cnn = pair()
    model = Mixture([vit, cnn])
    model.set_checkpointing(True)
    assert vit.backbone.network.grad_checkpointing
