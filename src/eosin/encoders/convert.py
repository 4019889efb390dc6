"""Checkpoints of the known layouts as timm tensors, every key accounted for.

Layouts: `dinov2` and `dinov3` (facebookresearch, also teacher checkpoints of a training run),
`hf-dinov2`, `hf-dinov3`, `hf-vit`, `hf-clip` (transformers 4 and 5) and `timm`. Each layout is a
list of renamings and an explicit list of keys it may ignore; anything else that does not fit the
network is an error (`fill`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eosin.errors import WeightsError

State = dict[str, Tensor]
Renames = tuple[tuple[str, str], ...]

_HEADS = r"^(dino_head|ibot_head|dino_loss|ibot_patch_loss)\."
_HF_ATTENTION: Renames = (
    (r"attention\.(attention\.query|q_proj)\.", "attn.q."),
    (r"attention\.(attention\.key|k_proj)\.", "attn.k."),
    (r"attention\.(attention\.value|v_proj)\.", "attn.v."),
    (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
)
_HF_EMBEDDINGS: Renames = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How one family of checkpoints names its tensors.

    Attributes:
        mark: regular expression of a key only this layout has.
        family: timm class it becomes, "vit" or "eva".
        renames: regular expressions and replacements, applied in order.
        ignored: expressions of keys the network does not use, after renaming.
        position_has_cls: the position embedding has an entry for cls, also beside registers.
    """

    mark: str
    family: str
    renames: Renames = ()
    ignored: tuple[str, ...] = ()
    position_has_cls: bool = False


LAYOUTS: dict[str, Layout] = {
    "dinov3": Layout(
        mark=r"^(storage_tokens|rope_embed\.periods)$",
        family="eva",
        renames=(
            (r"^storage_tokens$", "reg_token"),
            (r"\.ls([12])\.gamma$", r".gamma_\1"),
            (r"\.mlp\.w1\.", ".mlp.fc1_g."),
            (r"\.mlp\.w2\.", ".mlp.fc1_x."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
        ),
        ignored=(r"^mask_token$", r"^rope_embed\.periods$", r"\.qkv\.bias_mask$", r"^local_cls_norm\.", _HEADS),
    ),
    "dinov2": Layout(
        mark=r"^(mask_token|register_tokens)$|^blocks\.0\.(\d+\.)?mlp\.w12\.weight$",
        family="vit",
        renames=(
            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
            (r"^register_tokens$", "reg_token"),
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
        ),
        ignored=(r"^mask_token$", _HEADS),
        position_has_cls=True,
    ),
    "hf-dinov3": Layout(
        mark=r"^(dinov3_vit\.)?embeddings\.patch_embeddings\.weight$",
        family="eva",
        renames=(
            (r"^dinov3_vit\.", ""),
            *_HF_EMBEDDINGS,
            (r"^(model\.)?layer\.", "blocks."),
            *_HF_ATTENTION,
            (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
            (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
            (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        ),
        ignored=(r"^embeddings\.mask_token$", r"^rope_embeddings\.inv_freq$", r"^classifier\."),
    ),
    "hf-dinov2": Layout(
        mark=r"^(dinov2\.|dinov2_with_registers\.)?encoder\.layer\.0\.layer_scale1\.lambda1$",
        family="vit",
        renames=(
            (r"^(dinov2|dinov2_with_registers)\.", ""),
            *_HF_EMBEDDINGS,
            (r"^encoder\.layer\.", "blocks."),
            *_HF_ATTENTION,
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"\.mlp\.weights_in\.", ".mlp.fc1."),
            (r"\.mlp\.weights_out\.", ".mlp.fc2."),
            (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
            (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
            (r"^layernorm\.", "norm."),
        ),
        ignored=(r"^embeddings\.mask_token$", r"^classifier\."),
        position_has_cls=True,
    ),
    "hf-vit": Layout(
        mark=r"^(vit\.)?(encoder\.layer|layers)\.0\.layernorm_before\.weight$",
        family="vit",
        renames=(
            (r"^vit\.", ""),
            *_HF_EMBEDDINGS,
            (r"^(encoder\.layer|layers)\.", "blocks."),
            *_HF_ATTENTION,
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
            (r"^layernorm\.", "norm."),
        ),
        ignored=(r"^pooler\.", r"^classifier\.", r"^embeddings\.mask_token$"),
        position_has_cls=True,
    ),
    "hf-clip": Layout(
        mark=r"^vision_model\.embeddings\.class_embedding$",
        family="vit",
        renames=(
            (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
            (r"^vision_model\.embeddings\.position_embedding\.weight$", "pos_embed"),
            (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"^vision_model\.pre_layrnorm\.", "norm_pre."),
            (r"^vision_model\.post_layernorm\.", "norm."),
            (r"^vision_model\.encoder\.layers\.", "blocks."),
            (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"^visual_projection\.", "head."),
        ),
        ignored=(r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"\.position_ids$"),
        position_has_cls=True,
    ),
    "timm": Layout(mark=r"^patch_embed\.proj\.weight$", family="vit"),
}


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Converted:
    """A checkpoint in timm's names.

    Attributes:
        layout: name of the layout found.
        state: tensors by timm name.
        ignored: keys of the checkpoint that were left out by a rule of the layout.
        head_dim: width of one attention head where the checkpoint says it, else 0.
    """

    layout: str
    state: State
    ignored: tuple[str, ...] = ()
    head_dim: int = 0


def unwrap(checkpoint: Mapping[str, Any]) -> tuple[State, list[str]]:
    """Return the flat tensors of a checkpoint and the keys that were left behind.

    Training checkpoints nest the network under "teacher", "model" or "state_dict" and prefix it
    with "teacher.", "module.", "_orig_mod." or "backbone."; a student beside a teacher is left.
    """
    left: list[str] = []
    inner: Mapping[str, Any] = checkpoint
    for container in ("teacher", "model", "state_dict", "teacher"):
        if isinstance(inner.get(container), Mapping):
            left += [key for key in inner if key != container]
            inner = inner[container]
    state = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    left += [key for key in inner if key not in state]
    if any(key.startswith("teacher.") for key in state):
        left += [key for key in state if key.startswith("student.")]
        state = {key: value for key, value in state.items() if not key.startswith("student.")}
    return {_bare(key): value for key, value in state.items()}, left


def _bare(key: str) -> str:
    return re.sub(r"^((module|_orig_mod|teacher|backbone)\.)+", "", key.replace("_fsdp_wrapped_module.", ""))


def detect(state: Mapping[str, Any]) -> str:
    """Return the name of the layout of a flat checkpoint, or raise `WeightsError`."""
    for name, layout in LAYOUTS.items():
        mark = re.compile(layout.mark)
        if any(mark.search(key) for key in state):
            return name
    some = ", ".join(list(state)[:5]) or "none"
    raise WeightsError(f"no known layout ({', '.join(LAYOUTS)}) has the keys of this checkpoint: {some}, ...")


def to_timm(checkpoint: Mapping[str, Any]) -> Converted:
    """Return a checkpoint of any known layout in timm's names.

    Args:
        checkpoint: what `torch.load` or safetensors gave.

    Raises:
        WeightsError: unknown layout, two keys for one tensor, or rotary periods timm does not have.
    """
    flat, left = unwrap(checkpoint)
    name = detect(flat)
    layout = LAYOUTS[name]
    ignore = [re.compile(pattern) for pattern in layout.ignored]
    state: State = {}
    ignored = [f"{key} (beside the network)" for key in left]
    for key, value in flat.items():
        new = key
        for pattern, replacement in layout.renames:
            new = re.sub(pattern, replacement, new)
        if any(pattern.search(new) for pattern in ignore):
            ignored.append(key)
        elif new in state:
            raise WeightsError(f"two keys of the checkpoint mean {new!r}; the second is {key!r}")
        else:
            state[new] = value
    family = "eva" if "blocks.0.gamma_1" in state else layout.family
    head_dim = _head_dim(flat)
    _join(state, family)
    ignored += _plain_biases(state, flat) if family == "eva" else []
    _positions(state, layout)
    if name == "hf-clip" and "head.weight" in state:
        state["head.bias"] = torch.zeros(state["head.weight"].shape[0])
    return Converted(layout=name, state=state, ignored=tuple(ignored), head_dim=head_dim)


def _join(state: State, family: str) -> None:
    """Join q, k, v into qkv; for plain ViTs also the halves of a gated MLP; name the ungated MLPs of DINOv3."""
    for key in [key for key in state if re.search(r"\.attn\.q\.(weight|bias)$", key)]:
        start, kind = key.rsplit("q.", 1)
        query, middle, value = (state.pop(f"{start}{letter}.{kind}", None) for letter in "qkv")
        if query is None or value is None or (middle is None and kind == "weight"):
            raise WeightsError(f"{start.rstrip('.')}: one of q, k, v has no {kind}")
        middle = torch.zeros_like(query) if middle is None else middle
        state[f"{start}qkv.{kind}"] = torch.cat((query, middle, value))
    for key in [key for key in state if ".mlp.fc1_x." in key]:
        gate = key.replace("fc1_x", "fc1_g")
        if gate not in state:
            state[key.replace("fc1_x", "fc1")] = state.pop(key)
        elif family == "vit":
            state[key.replace("fc1_x", "fc1")] = torch.cat((state.pop(gate), state.pop(key)))


def _plain_biases(state: State, flat: Mapping[str, Tensor]) -> list[str]:
    """Turn qkv biases into timm's q_bias and v_bias, or drop them when all are zero; DINOv3 masks k's to zero."""
    keys = [key for key in state if key.endswith(".attn.qkv.bias")]
    thirds: dict[str, tuple[Tensor, Tensor]] = {}
    for key in keys:
        bias, mask = state.pop(key), flat.get(f"{key}_mask")
        query, middle, value = (bias if mask is None else bias * mask.to(bias.dtype)).chunk(3)
        if middle.any():
            raise WeightsError(f"{key}: the bias of k is not zero, as it is in every DINOv3 release")
        thirds[key] = (query, value)
    if not any(part.any() for pair in thirds.values() for part in pair):
        return [f"{key} (all zero)" for key in keys]
    for key, (query, value) in thirds.items():
        state[key.replace("qkv.bias", "q_bias")] = query
        state[key.replace("qkv.bias", "v_bias")] = value
    return []


def _positions(state: State, layout: Layout) -> None:
    """Give tokens and positions timm's shapes; with registers, fold the position of cls into cls."""
    if "cls_token" in state and state["cls_token"].ndim == 1:
        state["cls_token"] = state["cls_token"][None, None]
    position = state.get("pos_embed")
    if position is None:
        return
    position = position[None] if position.ndim == 2 else position
    if layout.position_has_cls and "reg_token" in state:
        if "cls_token" not in state:
            raise WeightsError("this checkpoint has registers and positions but lacks 'cls_token'")
        state["cls_token"] = state["cls_token"] + position[:, :1]
        position = position[:, 1:]
    state["pos_embed"] = position


def _head_dim(flat: Mapping[str, Tensor]) -> int:
    """Return the head width that DINOv3's rotary periods imply, after checking their base is 100."""
    periods = flat.get("rope_embed.periods")
    if periods is None:
        return 0
    wanted = 100.0 ** (torch.arange(len(periods), dtype=torch.float32) / len(periods))
    if not torch.allclose(periods.float(), wanted, rtol=0.01):
        raise WeightsError("the rotary periods of this DINOv3 checkpoint are not those of base 100 that timm has")
    return 4 * len(periods)


def infer(converted: Converted) -> tuple[str, dict[str, Any]]:
    """Return the timm architecture and arguments whose tensors have the shapes of `converted`.

    What shapes cannot tell is assumed as in the releases: heads of 64 (where the checkpoint does
    not say), the epsilon of the norms, GELU or SiLU.

    Raises:
        WeightsError: no class token or patch embedding, or a width that is no multiple of 64.
    """
    state = converted.state
    needed = ["cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc2.weight"]
    needed += ["blocks.0.mlp.fc1.weight"] if "pos_embed" in state else []
    missing = [key for key in needed if key not in state]
    if missing:
        raise WeightsError(
            f"this checkpoint is no vision transformer with a class token: it lacks {', '.join(missing)}"
        )
    width = state["cls_token"].shape[-1]
    patch_px = state["patch_embed.proj.weight"].shape[-1]
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    head_dim = converted.head_dim or 64
    if width % head_dim:
        raise WeightsError(
            f"tokens of width {width} are no multiple of {head_dim}, so the number of heads cannot be told; "
            "give a folder with config.json beside the weights"
        )
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    args: dict[str, Any] = {"patch_size": patch_px, "embed_dim": width, "depth": depth, "num_heads": width // head_dim}
    if "pos_embed" not in state:
        gated = "blocks.0.mlp.fc1_g.weight" in state
        args |= {"num_reg_tokens": registers, "mlp_ratio": hidden / width, "swiglu_mlp": gated, "swiglu_align_to": 1}
        args |= {"qkv_bias": "blocks.0.attn.q_bias" in state}
        return "vit_small_patch16_dinov3", args
    inner = state["blocks.0.mlp.fc1.weight"].shape[0]
    args |= {"mlp_ratio": inner / width, "reg_tokens": registers}
    if inner != hidden:
        args |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    args["no_embed_class"] = math.isqrt(state["pos_embed"].shape[1]) ** 2 == state["pos_embed"].shape[1]
    if "norm_pre.weight" in state:
        args |= {"pre_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-5}
        args["num_classes"] = state["head.weight"].shape[0] if "head.weight" in state else 0
    if converted.layout == "hf-vit":
        args["norm_eps"] = 1e-12
    return "vit_small_patch14_dinov2" if "blocks.0.ls1.gamma" in state else "vit_small_patch16_224", args


def position_side(converted: Converted, *, prefix: int) -> int:
    """Return the side in pixels that the position embedding was made for, 0 without one."""
    position = converted.state.get("pos_embed")
    if position is None:
        return 0
    count = position.shape[1] - prefix
    side = math.isqrt(count)
    if side * side != count:
        raise WeightsError(f"a position embedding of {count} patches is not square")
    return side * converted.state["patch_embed.proj.weight"].shape[-1]


def fill(network: nn.Module, converted: Converted, *, what: str) -> None:
    """Put every tensor of `converted` into `network`: all of them, nothing else, same shapes.

    Raises:
        WeightsError: listing missing and unexpected keys and wrong shapes.
    """
    wanted = network.state_dict()
    state = dict(converted.state)
    if converted.layout == "timm" and "head.weight" not in wanted:
        named = getattr(network, "default_cfg", {}).get("classifier", "head")
        classifier = tuple(f"{name}." for name in ("head", "fc_norm", *((named,) if isinstance(named, str) else named)))
        state = {key: value for key, value in state.items() if key in wanted or not key.startswith(classifier)}
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)}, needed {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & state.keys())
        if state[key].shape != wanted[key].shape
    ]
    if missing or unexpected or shapes:
        parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        told = "; ".join(f"{len(keys)} {word}: {_some(keys)}" for word, keys in parts if keys)
        raise WeightsError(f"{what} does not fit the network (read as {converted.layout} layout): {told}")
    on_meta = any(parameter.is_meta for parameter in network.parameters())
    values = {key: value.detach().to(wanted[key].dtype) for key, value in state.items()}
    network.load_state_dict(values, strict=True, assign=on_meta)


def _some(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f", and {len(keys) - limit} more" if len(keys) > limit else "")
