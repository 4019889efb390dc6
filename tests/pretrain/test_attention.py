"""Attention by plain products is that of torch's kernel."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from eosin.encoders.network import SHORT_SEQUENCE
from eosin.pretrain.model import attend


@pytest.mark.parametrize("length", [1, 14, SHORT_SEQUENCE, SHORT_SEQUENCE + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_sequences_are_attended_as_by_torch(length: int, dtype: torch.dtype) -> None:
    """Values and gradients agree with float64 to the precision of the type."""
    generator = torch.Generator().manual_seed(length)
    exact = [torch.randn((2, 3, length, 16), generator=generator, dtype=torch.float64) for _ in range(3)]
    given = [part.to(dtype).requires_grad_() for part in exact]
    exact = [part.detach().double().requires_grad_() for part in given]
    out, expected = attend(*given), functional.scaled_dot_product_attention(*exact)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    tolerance = {"atol": 0.03, "rtol": 0.03} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    for one, other in zip(given, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, **tolerance)
