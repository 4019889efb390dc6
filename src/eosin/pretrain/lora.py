"""Low-rank adapters on released weights (LoRA, Hu et al. 2021, arXiv 2106.09685): the base stands still, they train.

Queries, keys and values are rows of one linear, as in the DINOv2 release, of which some are adapted, by the layer of
`eosin.encoders.lora`; the names of the base stay apart for export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eosin.encoders.checkpoints import hash_tensors
from eosin.encoders.files import read_tensors
from eosin.encoders.lora import LowRank, Pair, add_products, draw_down
from eosin.errors import WeightsError
from eosin.features.writer import replace_durably
from eosin.pretrain.model import VisionTransformer

Target = Literal["q", "k", "v", "proj", "mlp"]
USUAL: tuple[Target, ...] = ("q", "v")
FACTS = "eosin_adapter"
"""Key of an adapter file's metadata."""

_PARTS: dict[str, tuple[Target, ...]] = {
    "attn.qkv": ("q", "k", "v"),
    "attn.proj": ("proj",),
    "mlp.fc1": ("mlp",),
    "mlp.fc2": ("mlp",),
    "mlp.w12": ("mlp", "mlp"),
    "mlp.w3": ("mlp",),
}
"""What the equal blocks of rows of each linear of a block are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Which adapters an encoder gets.

    Attributes:
        rank: r of each.
        alpha: their output counts alpha / rank.
        targets: queries, keys, values, the projection after attention, the linears of the feed-forward part.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...] = USUAL

    def rows(self, path: str) -> tuple[int, ...]:
        """Return which blocks of rows of a linear, such as "attn.qkv", are adapted."""
        return tuple(at for at, part in enumerate(_PARTS[path]) if part in self.targets)


class Adapted(LowRank):
    """A frozen linear, to some blocks of whose rows (alpha / r) B A x is added (equation 3).

    B starts at zero, so that at the start this is the linear itself, bit for bit; A as peft and the authors' code have
    it, uniform. All A are one tensor, and all B.

    Args:
        base: the linear; it takes no gradient from now on.
        parts: equal blocks its rows fall into.
        rows: which of them are adapted.
        lora: rank and strength.
    """

    def __init__(self, base: nn.Linear, *, parts: int, rows: Sequence[int], lora: Lora) -> None:
        super().__init__(base, parts=parts, rows=rows, scale=lora.alpha / lora.rank)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Parameter(torch.empty(len(rows), lora.rank, base.in_features, **like))
        self.up = nn.Parameter(torch.zeros(len(rows), base.out_features // parts, lora.rank, **like))
        for matrix in self.down:
            draw_down(matrix)

    def pairs(self) -> list[Pair]:
        """Return block of rows, A and B of each that is adapted."""
        return list(zip(self.rows, self.down, self.up, strict=True))


def add_adapters(encoder: VisionTransformer, lora: Lora) -> None:
    """Freeze an encoder and give the linears of its blocks adapters, in place; load its weights before."""
    encoder.requires_grad_(False)
    for block in encoder.blocks:
        for path, parts in _PARTS.items():
            parent, _, name = path.partition(".")
            linear, rows = getattr(getattr(block, parent), name, None), lora.rows(path)
            if isinstance(linear, nn.Linear) and rows:
                setattr(getattr(block, parent), name, Adapted(linear, parts=len(parts), rows=rows, lora=lora))


def merged(state: Mapping[str, Tensor], lora: Lora | None) -> dict[str, Tensor]:
    """Return the weights of an encoder with its adapters added to the base, under the names of a plain encoder.

    Args:
        state: complete `state_dict()`, not sharded.
        lora: of `add_adapters`; None returns the state as it is.
    """
    if lora is None:
        return dict(state)
    plain = {key.replace(".base.", "."): value for key, value in state.items() if not _is_adapter(key)}
    return _added(plain, {key: value for key, value in state.items() if _is_adapter(key)}, lora)


def _is_adapter(key: str) -> bool:
    return key.endswith((".down", ".up"))


def _added(plain: Mapping[str, Tensor], adapters: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Return plain weights with the products of `adapters` added to their rows."""
    out = dict(plain)
    for key in _adapted_weights(adapters):
        path = ".".join(key.split(".")[2:4])
        weight, start = out[key].detach().clone(), key.removesuffix("weight")
        pairs = zip(lora.rows(path), adapters[f"{start}down"], adapters[f"{start}up"], strict=True)
        add_products(weight, pairs, parts=len(_PARTS[path]), scale=lora.alpha / lora.rank)
        out[key] = weight
    return out


def _adapted_weights(adapters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights that adapters add to."""
    return [f"{key.removesuffix('down')}weight" for key in adapters if key.endswith(".down")]


def save_adapter(path: Path, state: Mapping[str, Tensor], lora: Lora, facts: Mapping[str, Any]) -> Path:
    """Write the adapters of an encoder alone as safetensors, with the hash of the weights that they add to.

    Args:
        path: the file; replaced when it exists.
        state: as in `merged`.
        lora: of `add_adapters`.
        facts: what else a reader should know, plain JSON types.
    """
    adapters = {key: value.detach().cpu().contiguous() for key, value in state.items() if _is_adapter(key)}
    base = {key: state[f"{key.removesuffix('weight')}base.weight"] for key in _adapted_weights(adapters)}
    told = {**facts, **asdict(lora), "base_hash": hash_tensors(base)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(adapters, temporary, metadata={"format": "pt", FACTS: json.dumps(told)})
    replace_durably(temporary, path)
    return path


def apply_adapter(encoder: VisionTransformer, path: Path) -> None:
    """Add the adapters of a file to the weights of a plain encoder, in place.

    Raises:
        WeightsError: the file is no adapter, or was trained on other weights.
    """
    adapters = read_tensors(path)
    with safe_open(path, "pt") as file:
        told = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    if "base_hash" not in told:
        raise WeightsError(f"{path.name} is no adapter of eosin pretrain: its metadata lacks {FACTS!r}")
    state, names = encoder.state_dict(), _adapted_weights(adapters)
    missing = [name for name in names if name not in state]
    if missing or hash_tensors({name: state[name] for name in names}) != told["base_hash"]:
        what = told.get("weights", "weights that it does not name")
        raise WeightsError(f"{path.name} was trained on {what}; the encoder has other weights: load those first")
    lora = Lora(rank=told["rank"], alpha=told["alpha"], targets=tuple(told["targets"]))
    encoder.load_state_dict(_added(state, adapters, lora))
