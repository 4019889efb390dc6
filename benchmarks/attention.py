"""Attention of short sequences in bfloat16 on a CPU: torch's fused kernel against plain products.

python benchmarks/attention.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from end_to_end import commit, machine
from eosin.pretrain.model import attend

HEADS, WIDTH, TOKENS = 6, 64, 6000
LENGTHS = (14, 41, 101, 201, 261)


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Return the shortest of `repeats` runs after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def forward_backward(attention: Callable[..., Tensor], parts: list[Tensor]) -> None:
    """Run attention and its gradient."""
    attention(*parts).sum().backward()


def main() -> None:
    """Measure every length and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    rows = []
    for length in LENGTHS:
        shape = (TOKENS // length, HEADS, length, WIDTH)
        parts = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        fused = milliseconds(partial(forward_backward, functional.scaled_dot_product_attention, parts), repeats)
        plain = milliseconds(partial(forward_backward, attend, parts), repeats)
        rows.append({"tokens": length, "fused_ms": round(fused, 1), "plain_ms": round(plain, 1)})
        print(f"{length} tokens: fused {fused:.1f} ms, plain {plain:.1f} ms, {fused / plain:.2f}x")
    result = {"command": "python benchmarks/attention.py", "machine": machine(), "commit": commit(), "rows": rows}
    path = Path(__file__).parent / "results" / "attention.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
