from __future__ import annotations

import pytest
import torch
from torch import nn

from eosin.encoders.lora import LowRank, Pair, add_products, draw_down, draw_kept
from eosin.finetune.fused import FusedLora
from eosin.pretrain.lora import Adapted, Lora


class Plain(LowRank):
    def __init__(self, base: nn.Linear, **how: object) -> None:
        super().__init__(base, **how)  # pyright: ignore[reportArgumentType]
        self.kept: list[Pair] = []

    def pairs(self) -> list[Pair]:
        return self.kept


def test_rows_get_the_product_and_the_others_stay() -> None:
    random = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 8).double()
    before = base.weight.detach().clone()
    layer = Plain(base, parts=4, rows=(1, 3), scale=2.5).eval()
    down, up = torch.randn(2, 3, 6, generator=random).double(), torch.randn(2, 2, 3, generator=random).double()
    layer.kept = [(row, down[at], up[at]) for at, row in enumerate((1, 3))]
    wanted = before.clone()
    for at, row in enumerate((1, 3)):
        wanted[2 * row : 2 * row + 2] += 2.5 * torch.einsum("or,ri->oi", up[at], down[at])
    x = torch.randn(5, 7, 6, generator=random).double()
    torch.testing.assert_close(layer(x), x @ wanted.T + base.bias, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.merged().weight.detach(), wanted, rtol=1e-10, atol=1e-12)
    assert torch.equal(base.weight[:2], before[:2])


def test_products_are_computed_in_the_type_of_the_adapters() -> None:
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    add_products(weight, [(0, torch.full((1, 4), 0.125), torch.ones(4, 1))], parts=1, scale=0.0625)
    assert weight.dtype == torch.bfloat16
    assert float(weight[0, 0]) == pytest.approx(1 + 0.0078125, abs=1e-6)


@pytest.mark.parametrize("fan_in", [16, 400])
def test_a_is_uniform_within_one_over_the_root_of_its_inputs(fan_in: int) -> None:
    torch.manual_seed(0)
    drawn = draw_down(torch.empty(2000, fan_in))
    assert float(drawn.abs().max()) == pytest.approx(fan_in**-0.5, rel=0.01)
    assert float(drawn.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.01)


def test_both_layers_are_one_function_under_their_own_names() -> None:
    """The names are those of files that were written before the layers shared their code."""
    torch.manual_seed(0)
    base = nn.Linear(16, 48)
    fused = FusedLora(base, parts=("v", "q"), rank=4, alpha=10.0, dropout=0.0)
    stacked = Adapted(base, parts=3, rows=(0, 2), lora=Lora(rank=4, alpha=10.0))
    nn.init.normal_(stacked.up)
    with torch.no_grad():
        for at, part in enumerate("qv"):
            fused.down[part].copy_(stacked.down[at])
            fused.up[part].copy_(stacked.up[at])
    x = torch.randn(5, 16)
    assert torch.equal(fused(x), stacked(x))
    assert list(fused.state_dict()) == ["base.weight", "base.bias", "down.q", "down.v", "up.q", "up.v"]
    assert sorted(stacked.state_dict()) == ["base.bias", "base.weight", "down", "up"]


def test_dropout_loses_the_share_it_should_and_each_number_by_itself() -> None:
    """The share that is lost, and independence of neighbours in memory (four share a draw)."""
    torch.manual_seed(0)
    kept, share = draw_kept(torch.ones(999, 1001), 0.3)
    assert share == pytest.approx(0.7, abs=1e-5)
    lost = (~kept).double().flatten()
    assert float(lost.mean()) == pytest.approx(0.3, abs=0.002)
    for lag in (1, 2, 3, 4):
        assert float((lost[lag:] * lost[:-lag]).mean()) == pytest.approx(0.09, abs=0.002)
    torch.manual_seed(0)
    assert torch.equal(kept, draw_kept(torch.ones(999, 1001), 0.3)[0])


def test_dropout_works_while_training_only() -> None:
    torch.manual_seed(0)
    layer = FusedLora(nn.Linear(64, 48), parts=("q", "v"), rank=4, alpha=8.0, dropout=0.5)
    for up in layer.up.values():
        nn.init.normal_(up)
    x = torch.randn(3, 64)
    kept = layer.eval()(x)
    assert torch.equal(kept, layer(x))
    drawn = torch.stack([layer.train()(x) for _ in range(4000)])
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(0), kept, rtol=0, atol=0.5)
    assert torch.equal(drawn[0, :, 16:32], kept[:, 16:32]), "keys have no adapters"
