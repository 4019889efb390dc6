"""Weights of the training model from and to the layouts of DINOv2, DINOv3, timm and transformers.

The names of the training model are those of the DINOv2 release, so that its own layout needs no change and every other
one goes through `eosin.encoders.convert` (any layout to timm) and `eosin.encoders.export` (timm to any layout).
Both directions account for every key. What timm's layout cannot hold (the mask token; beside registers the position of
cls apart from cls) is taken from the checkpoint itself where it has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from eosin.encoders.convert import LAYOUTS, Converted, State, fill, infer, to_timm, unwrap
from eosin.encoders.export import from_timm
from eosin.encoders.files import read_tensors
from eosin.encoders.network import resize_position
from eosin.errors import NonFiniteError, WeightsError
from eosin.features.writer import replace_durably
from eosin.pretrain.model import ModelConfig, VisionTransformer
from eosin.pretrain.positions import rotary_periods

EXPORTS = ("dinov2", "dinov3", "timm", "hf-dinov2", "hf-dinov3")
"""Layouts that can be written; the first two are the official ones."""

_ASSUMED_EPS = {"learned": 1e-6, "rope": 1e-5}
_SPECIAL = re.compile(r"(?:^|\.)(mask_token|cls_token|pos_embed|position_embeddings)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """What became of a checkpoint's keys.

    Attributes:
        layout: name of the layout it was read as.
        ignored: keys that a rule of the layout leaves out (heads, buffers).
        fresh: parameters the layout does not have and that keep their initial value.
        resized: side of the learned position table in the checkpoint and in the model where they differ.
    """

    layout: str
    ignored: tuple[str, ...]
    fresh: tuple[str, ...]
    resized: tuple[int, int] | None


def family(config: ModelConfig) -> str:
    """Return the official layout of a geometry: "dinov2" with a learned position table, "dinov3" with rope."""
    return "dinov3" if config.position == "rope" else "dinov2"


def load_weights(model: VisionTransformer, checkpoint: str | Path | Mapping[str, Any], *, what: str = "") -> Loading:
    """Fill a model completely from a checkpoint of any known layout.

    Args:
        model: changed in place, before it is sharded; also one on the meta device.
        checkpoint: a file, or what `torch.load` or safetensors gave.
        what: the checkpoint's name in errors; "" takes the file's.

    Returns:
        Which layout it was, what was ignored, what is fresh, and whether the position table was resized.

    Raises:
        WeightsError: unknown layout, the other kind of positions, keys missing or unexpected, wrong shapes, or a bias
            of the keys that the model would hold at zero.
    """
    if isinstance(checkpoint, str | Path):
        what = what or Path(checkpoint).name
        checkpoint = read_tensors(Path(checkpoint))
    what = what or "the checkpoint"
    config = model.config
    converted, state, fresh = _official(checkpoint, config, what)
    state = _from_official(state, config, what)
    resized = _resize(state, config)
    ignored = tuple(key for key in converted.ignored if not _SPECIAL.search(key))
    fill(model, Converted(layout=converted.layout, state=state), what=what)
    return Loading(layout=converted.layout, ignored=ignored, fresh=fresh, resized=resized)


def config_of(checkpoint: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """Return the geometry of a checkpoint of any known layout.

    Shapes do not tell the width of a head where there are no rotary periods (64 is taken), nor the
    regularisation: give those in `changes`.

    Raises:
        WeightsError: unknown layout, or no transformer of the DINOv2 or DINOv3 kind.
    """
    try:
        converted = to_timm(checkpoint)
        state = converted.state
        _, args = infer(converted)
        hidden, gated = state["blocks.0.mlp.fc2.weight"].shape[1], "blocks.0.mlp.fc1_g.weight" in state
        gated = gated or state["blocks.0.mlp.fc1.weight"].shape[0] != hidden
    except KeyError as error:
        raise WeightsError(f"this is no vision transformer of the DINOv2 or DINOv3 kind: it lacks {error}") from None
    rotary, dim = "pos_embed" not in state, int(args["embed_dim"])
    geometry = {
        "dim": dim,
        "depth": args["depth"],
        "heads": args["num_heads"],
        "patch_px": args["patch_size"],
        "registers": args["num_reg_tokens"] if rotary else args["reg_tokens"],
        "ffn": "swiglu" if gated else "mlp",
        "ffn_ratio": hidden / dim * (1.5 if gated else 1),
        "position": "rope" if rotary else "learned",
        "norm_eps": _ASSUMED_EPS["rope" if rotary else "learned"],
        "k_bias": not rotary,
    }
    if not rotary:
        geometry["position_grid"] = math.isqrt(state["pos_embed"].shape[1])
    return ModelConfig(**geometry | changes)


def export_state(state: Mapping[str, Tensor], config: ModelConfig, layout: str) -> State:
    """Return the weights of a model in another layout.

    Args:
        state: complete `VisionTransformer.state_dict()`, not sharded; prefixes of wrappers are taken off.
        config: its geometry.
        layout: one of `EXPORTS`, of the same kind of positions.

    Raises:
        WeightsError: keys missing or unexpected, or a layout this geometry does not have.
    """
    own = family(config)
    if layout not in EXPORTS or (layout != "timm" and not layout.endswith(own)):
        raise WeightsError(f"position {config.position!r} has no layout {layout!r}; choose {own}, timm or hf-{own}")
    flat, left = unwrap(state)
    if left:
        raise WeightsError(f"these are not weights alone: {', '.join(left[:8])}")
    with torch.device("meta"):
        blank = VisionTransformer(config)
    fill(blank, Converted(layout="training", state=flat), what="the state to be exported")
    official = _to_official(flat, config)
    if layout == own:
        return official
    converted = to_timm(official)
    if layout == "timm":
        return converted.state
    out = from_timm(converted.state, layout, head_dim=config.head_dim)
    names = {"mask_token": "mask_token", "cls_token": "cls_token", "pos_embed": "position_embeddings"}
    for name, theirs in names.items():
        key = f"embeddings.{theirs}"
        if key in out:
            out[key] = official[name].reshape(out[key].shape).to(out[key].dtype)
    return out


def save_encoder(
    path: str | Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    layout: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a model as a safetensors file that `eosin.load_encoder` opens; complete or not at all.

    Args:
        path: the file, ending in .safetensors; replaced when it exists.
        state: see `export_state`.
        config: its geometry.
        layout: see `export_state`; None is the official one of the geometry.
        dtype: of the tensors in the file, but for the class token.

    Raises:
        WeightsError: see `export_state`; also a geometry that a reader could not tell from the shapes.
        NonFiniteError: NaN or infinity in a tensor.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path.name}: weights are written as .safetensors")
    if config.position == "learned" and config.head_dim != 64:
        raise WeightsError(f"heads of {config.head_dim} cannot be told from a file, readers take 64; change heads")
    if config.norm_eps != _ASSUMED_EPS[config.position]:
        eps = _ASSUMED_EPS[config.position]
        raise WeightsError(f"norm_eps {config.norm_eps} cannot be told from a file, readers take {eps}")
    out = export_state(state, config, layout or family(config))
    broken = [key for key, value in out.items() if not value.isfinite().all()]
    if broken:
        raise NonFiniteError(f"{path.name} is not written: NaN or infinity in {', '.join(broken[:8])}")
    # The class token stays exact: readers add the position of cls to it in the precision of the file.
    kinds = {key: torch.float32 if key.endswith("cls_token") else dtype for key in out}
    tensors = {key: value.detach().to("cpu", kinds[key]).contiguous().clone() for key, value in out.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    replace_durably(temporary, path)
    return path


def _official(
    checkpoint: Mapping[str, Any], config: ModelConfig, what: str
) -> tuple[Converted, State, tuple[str, ...]]:
    """Return a checkpoint in timm's names, in the official names, and the parameters that it does not have."""
    try:
        converted = to_timm(checkpoint)
        state = {key: value for key, value in converted.state.items() if value.numel()}
        if ("pos_embed" in state) == (config.position == "rope"):
            found = "learned positions" if config.position == "rope" else "no learned positions"
            raise WeightsError(f"{what} has {found}, the model has position {config.position!r}; choose another preset")
        official = from_timm(state, family(config), head_dim=config.head_dim)
    except KeyError as error:
        raise WeightsError(f"{what} does not fit the model: 1 missing or more, {error} in timm's names") from None
    flat, _ = unwrap(checkpoint)
    special = {match[1]: value for key, value in flat.items() if (match := _SPECIAL.search(key))}
    fresh = () if "mask_token" in special else ("mask_token",)
    if "mask_token" in special:
        official["mask_token"] = special["mask_token"].reshape(1, -1)
    position = special.get("pos_embed", special.get("position_embeddings"))
    if LAYOUTS[converted.layout].position_has_cls and position is not None and "cls_token" in special:
        official["cls_token"] = special["cls_token"].reshape(1, 1, -1)
        official["pos_embed"] = position.reshape(1, -1, position.shape[-1])
    return converted, official, fresh


def _from_official(state: State, config: ModelConfig, what: str) -> State:
    """Return official names as those of the training model: `register_tokens`, gate and value in `w12`, no buffers."""
    out: State = {}
    for key, value in state.items():
        if key == "rope_embed.periods" or key.endswith(".qkv.bias_mask"):
            continue
        if key.endswith(".attn.qkv.bias") and (not config.qkv_bias or not config.k_bias):
            gone = value if not config.qkv_bias else value.chunk(3)[1]
            if gone.any():
                raise WeightsError(f"{what}: {key} is not zero where the model holds it at zero; set qkv_bias, k_bias")
            if not config.qkv_bias:
                continue
        pair = re.sub(r"\.w1\.(weight|bias)$", r".w2.\1", key)
        if pair != key and pair in state:
            out[key.replace(".w1.", ".w12.")] = torch.cat((value, state[pair]))
        elif not (".mlp.w2." in key and key.replace(".w2.", ".w1.") in state):
            out["register_tokens" if key == "storage_tokens" else key] = value
    return out


def _to_official(state: State, config: ModelConfig) -> State:
    """Return the names of the training model as those of the official release of its family."""
    out = {key: value.detach() for key, value in state.items()}
    for key in [key for key in out if key.endswith(".attn.qkv.weight")]:
        bias = key.replace(".weight", ".bias")
        parts = list(out.get(bias, out[key].new_zeros(3 * config.dim)).chunk(3))
        ones, zeros = torch.ones_like(parts[0]), torch.zeros_like(parts[0])
        parts[1] = parts[1] if config.k_bias else zeros
        out[bias] = torch.cat(parts)
        if config.position == "rope":
            out[f"{bias}_mask"] = torch.cat((ones, zeros, ones))
    if config.position == "learned":
        return out
    if config.k_bias and any(v.chunk(3)[1].any() for key, v in out.items() if key.endswith(".attn.qkv.bias")):
        raise WeightsError("a bias of the keys that is not zero has no place in DINOv3's layouts")
    if "register_tokens" in out:
        out["storage_tokens"] = out.pop("register_tokens")
    for key in [key for key in out if ".mlp.w12." in key]:
        first, second = out.pop(key).chunk(2)
        out[key.replace(".w12.", ".w1.")], out[key.replace(".w12.", ".w2.")] = first, second
    out["rope_embed.periods"] = rotary_periods(config.head_dim)
    return out


def _resize(state: State, config: ModelConfig) -> tuple[int, int] | None:
    """Give a square learned table the side of the model; return both sides where they differ."""
    position = state.get("pos_embed")
    if position is None:
        return None
    side = math.isqrt(position.shape[1] - 1)
    if side**2 + 1 != position.shape[1] or side == config.position_grid:
        return None
    grid = (config.position_grid, config.position_grid)
    state["pos_embed"] = resize_position(position, grid, config.interpolation, prefix=1)
    return side, config.position_grid
