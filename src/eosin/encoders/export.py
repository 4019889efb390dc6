"""Weights in timm's names as checkpoints of the official and transformers layouts, for other tools."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from eosin.encoders.convert import Renames, State
from eosin.errors import WeightsError

_HF_EMBEDDINGS: Renames = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
)
_HF_BLOCK: Renames = (
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
)
_BACK: dict[str, Renames] = {
    "dinov2": ((r"^reg_token$", "register_tokens"),),
    "dinov3": ((r"^reg_token$", "storage_tokens"), (r"\.gamma_([12])$", r".ls\1.gamma")),
    "hf-dinov2": (
        *_HF_EMBEDDINGS,
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "encoder.layer."),
        *_HF_BLOCK,
        (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
        (r"^norm\.", "layernorm."),
    ),
    "hf-dinov3": (
        *_HF_EMBEDDINGS,
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"^blocks\.", "layer."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.attn\.(q)uery\.|\.attn\.(k)ey\.|\.attn\.(v)alue\.", r".attention.\1\2\3_proj."),
        (r"\.gamma_([12])$", r".layer_scale\1.lambda1"),
    ),
}
_MLP = {
    "dinov2": {"fc1": "w12", "fc2": "w3"},
    "hf-dinov2": {"fc1": "weights_in", "fc2": "weights_out"},
    "dinov3": {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"},
    "hf-dinov3": {"fc1_g": "gate_proj", "fc1_x": "up_proj", "fc1": "up_proj", "fc2": "down_proj"},
}


def from_timm(state: State, layout: str, *, head_dim: int = 64) -> State:
    """Return a timm checkpoint of a DINOv2 or DINOv3 network in another layout.

    Args:
        state: timm names, as `Backbone.network.state_dict()` gives.
        layout: "dinov2", "dinov3", "hf-dinov2" (also with registers) or "hf-dinov3".
        head_dim: width of one attention head; the rotary periods of "dinov3" depend on it.

    Returns:
        The same function in the other names. A mask token of zeros is added, as the layouts have one.

    Raises:
        WeightsError: an unknown layout, or a network of the other family.
    """
    if layout not in _BACK:
        raise WeightsError(f"layout {layout!r} cannot be written; choose one of {', '.join(_BACK)}")
    rotary = "pos_embed" not in state
    if rotary != layout.endswith("dinov3"):
        raise WeightsError(f"a network with{'out' if rotary else ''} a position embedding has no {layout} layout")
    out = _official_biases(state) if rotary else dict(state)
    width = state["cls_token"].shape[-1]
    if not rotary and "reg_token" in out:
        out["pos_embed"] = torch.cat((out["pos_embed"].new_zeros(1, 1, width), out["pos_embed"]), dim=1)
    gated = rotary and "blocks.0.mlp.fc1_g.weight" in out
    gated |= not rotary and out["blocks.0.mlp.fc1.weight"].shape[0] != out["blocks.0.mlp.fc2.weight"].shape[1]
    if layout.startswith("hf-"):
        out = _split_qkv(out)
    names = _MLP[layout] if gated or layout == "hf-dinov3" else {}
    renamed = {_rename(key, names, _BACK[layout]): value for key, value in out.items()}
    mask = torch.zeros(1, 1, width) if layout == "hf-dinov3" else torch.zeros(1, width)
    renamed["embeddings.mask_token" if layout.startswith("hf-") else "mask_token"] = mask
    if layout == "dinov3":
        count = head_dim // 4
        renamed["rope_embed.periods"] = 100.0 ** (torch.arange(count, dtype=torch.float32) / count)
    return renamed


def _rename(key: str, mlp: dict[str, str], renames: Renames) -> str:
    match = re.search(r"\.mlp\.(\w+)\.", key)
    if match and match[1] in mlp:
        key = key.replace(f".mlp.{match[1]}.", f".mlp.{mlp[match[1]]}.")
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _official_biases(state: State) -> State:
    """Return the state with one qkv bias a block, zero where timm has none, and its mask of k."""
    out = {key: value for key, value in state.items() if not key.endswith((".attn.q_bias", ".attn.v_bias"))}
    for key in [key for key in state if key.endswith(".attn.qkv.weight")]:
        start = key.removesuffix("qkv.weight")
        width = state[key].shape[0] // 3
        zeros = state[key].new_zeros(width)
        query, value = state.get(f"{start}q_bias", zeros), state.get(f"{start}v_bias", zeros)
        out[f"{start}qkv.bias"] = torch.cat((query, zeros, value))
        out[f"{start}qkv.bias_mask"] = torch.cat((zeros + 1, zeros, zeros + 1))
    return out


def _split_qkv(state: State) -> State:
    """Return the state with query, key and value apart; a masked key bias is left out, with its mask."""
    out: State = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*\.attn\.)qkv\.(weight|bias)", key)
        if key.endswith(".bias_mask"):
            continue
        if match is None:
            out[key] = value
            continue
        parts: tuple[Tensor, ...] = value.chunk(3)
        masked = f"{key}_mask" in state
        for letter, part in zip(("query", "key", "value"), parts, strict=True):
            if not (masked and letter == "key"):
                out[f"{match[1]}{letter}.{match[2]}"] = part.clone()
    return out
