"""The vision transformer that is trained: DINOv2 and DINOv3 geometry, several crop sizes in one pass.

- Parameters have the names of the DINOv2 release (`blocks.0.attn.qkv.weight`, `ls1.gamma`, `w12`), also with rotary
  positions; `eosin.pretrain.layouts` turns them into every other layout and back.
- All crops run as one (tokens, dim) matrix: linears and norms see it whole, attention each crop size alone, through
  `scaled_dot_product_attention`.
- Stochastic depth runs each branch on a random subset of the samples only, so that it saves time.
- Random numbers in training (subsets, rotary rescale) come from torch's global generator of the device: seed it at each
  step and a run can be repeated and resumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.encoders.network import SHORT_SEQUENCE, resize_position
from eosin.encoders.spec import Interpolation
from eosin.errors import GeometryError, UnknownEncoderError, closest
from eosin.pretrain.positions import Turn, rotary_angles, turn_patches

Sizes = Sequence[tuple[int, int]]
"""Samples and tokens a sample of each crop size, in the order of the rows of the token matrix."""


class CropTokens(NamedTuple):
    """The tokens of one crop size after the final norm.

    Attributes:
        cls: class tokens, (B, D).
        registers: register tokens, (B, R, D); R may be 0.
        patches: patch tokens, (B, N, D), rows of the grid first.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The geometry of a vision transformer and its regularisation.

    Attributes:
        dim: width D of a token.
        depth: number of blocks.
        heads: attention heads.
        patch_px: side of a patch, pixels.
        registers: register tokens (arXiv 2309.16588).
        ffn: "mlp" with GELU or "swiglu".
        ffn_ratio: hidden width over `dim`; "swiglu" has two thirds of it, rounded up to a multiple of 8.
        position: "learned" table (DINOv2) or "rope", axial rotary angles of base 100 (DINOv3).
        position_grid: side of the learned table, patches; other crop sizes resize it.
        rope_rescale: in training every block and crop size stretches the rotary coordinates by a log-uniform factor
            in [1 / rope_rescale, rope_rescale]; 1 does not.
        layer_scale: initial value of LayerScale.
        drop_path: share of the samples a residual branch leaves out in training, the same in all blocks.
        norm_eps: epsilon of LayerNorm.
        qkv_bias: whether queries, keys and values have a bias.
        k_bias: whether that of the keys counts; DINOv3 holds it at zero.
    """

    dim: int
    depth: int
    heads: int
    patch_px: int = 14
    registers: int = 4
    ffn: Literal["mlp", "swiglu"] = "mlp"
    ffn_ratio: float = 4.0
    position: Literal["learned", "rope"] = "learned"
    position_grid: int = 16
    rope_rescale: float = 1.0
    layer_scale: float = 1e-5
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    k_bias: bool = True

    def __post_init__(self) -> None:
        """Refuse values no network can have."""
        rotary = self.position == "rope"
        checks = (
            (min(self.dim, self.depth, self.heads, self.patch_px, self.position_grid) > 0, "sizes must be positive"),
            (self.heads > 0 and self.dim % self.heads == 0, f"dim {self.dim} is no multiple of heads {self.heads}"),
            (not rotary or self.head_dim % 4 == 0, f"rope needs heads of a multiple of 4, not {self.head_dim}"),
            (self.registers >= 0, f"registers {self.registers} is negative"),
            (0 <= self.drop_path < 1, f"drop_path {self.drop_path} is outside [0, 1)"),
            (self.rope_rescale >= 1, f"rope_rescale {self.rope_rescale} is below 1"),
            (self.ffn in ("mlp", "swiglu"), f"ffn {self.ffn!r} is neither 'mlp' nor 'swiglu'"),
            (self.position in ("learned", "rope"), f"position {self.position!r} is neither 'learned' nor 'rope'"),
        )
        wrong = [message for fine, message in checks if not fine]
        if wrong:
            raise GeometryError("this vision transformer cannot be built: " + "; ".join(wrong))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // max(self.heads, 1)

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward part; of each half of a gated one."""
        full = round(self.dim * self.ffn_ratio)
        return full if self.ffn == "mlp" else (int(full * 2 / 3) + 7) // 8 * 8

    @property
    def interpolation(self) -> Interpolation:
        """How the learned table is resized: as in the DINOv2 releases with and without registers."""
        if self.position == "rope":
            return "rope"
        return "bicubic-antialias" if self.registers else "bicubic-offset0.1"


_V3: dict[str, Any] = {"patch_px": 16, "position": "rope", "rope_rescale": 2.0, "norm_eps": 1e-5, "k_bias": False}
_GATED: dict[str, Any] = {"ffn": "swiglu", "ffn_ratio": 6.0}
PRESETS: dict[str, ModelConfig] = {
    # Short runs from scratch: LayerScale 0.1 as CaiT has for up to 18 blocks (arXiv 2103.17239, section 2).
    "tiny": ModelConfig(dim=192, depth=12, heads=3, patch_px=16, position_grid=14, layer_scale=0.1),
    "small": ModelConfig(dim=384, depth=12, heads=6),
    "base": ModelConfig(dim=768, depth=12, heads=12),
    "large": ModelConfig(dim=1024, depth=24, heads=16),
    "giant": ModelConfig(dim=1536, depth=40, heads=24, ffn="swiglu"),
    "dinov3_small": ModelConfig(dim=384, depth=12, heads=6, **_V3),
    "dinov3_small_plus": ModelConfig(dim=384, depth=12, heads=6, **_V3, **_GATED),
    "dinov3_base": ModelConfig(dim=768, depth=12, heads=12, **_V3),
    "dinov3_large": ModelConfig(dim=1024, depth=24, heads=16, **_V3),
    "dinov3_large_plus": ModelConfig(dim=1024, depth=24, heads=16, **_V3, **_GATED),
    "huge_plus": ModelConfig(dim=1280, depth=32, heads=20, **_V3, **_GATED),
}
"""DINOv2 S, B, L and g with registers at 224 px, DINOv3 S to H+ ("huge_plus"), and a small one for two cores."""


def preset(name: str, **changes: Any) -> ModelConfig:
    """Return a preset of `PRESETS` with `changes`, or raise `UnknownEncoderError` with the closest three."""
    if name not in PRESETS:
        raise UnknownEncoderError(f"no model preset is called {name!r}; closest: {closest(name, PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


def draw_subset(sizes: Sizes, rate: float, device: torch.device) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Return the rows of a random subset of the samples, their weights and the sizes of the subset.

    Of the b samples of each crop size max(int(b * (1 - rate)), 1) stay, as in DINOv2's batch-subset
    stochastic depth; the weight b / kept makes the expectation over draws that of the whole.

    Args:
        sizes: samples and tokens a sample of each crop size.
        rate: share left out.
        device: of the result.

    Returns:
        row numbers int64 (T',), weights (T', 1), and the `sizes` that are left.
    """
    rows, weights, kept, start = [], [], [], 0
    for count, length in sizes:
        stay = max(int(count * (1 - rate)), 1)
        samples = torch.randperm(count, device=device)[:stay, None]
        rows.append((start + samples * length + torch.arange(length, device=device)).flatten())
        weights.append(torch.full((stay * length, 1), count / stay, device=device))
        kept.append((stay, length))
        start += count * length
    return torch.cat(rows), torch.cat(weights), kept


class MaskedKeyLinear(nn.Linear):
    """A linear to queries, keys and values whose bias of the keys is held at zero: its gradient is zero too."""

    def forward(self, input: Tensor) -> Tensor:
        """Return queries, keys and values of `input`."""
        query, key, value = self.bias.chunk(3)
        return functional.linear(input, self.weight, torch.cat((query, torch.zeros_like(key), value)))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(Q Kᵀ / sqrt(d)) V for (B, heads, N, d) each.

    By `scaled_dot_product_attention`, but for short sequences in bfloat16 on a CPU by plain products: the backward of
    torch's fused kernel takes 2 to 8 times as long there (`benchmarks/attention.py`).
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-2] <= SHORT_SEQUENCE:
        return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    return functional.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Self-attention within each sample of a matrix of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        masked = config.qkv_bias and not config.k_bias
        linear = MaskedKeyLinear if masked else nn.Linear
        self.qkv = linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, sizes: Sizes, turns: Sequence[Turn]) -> Tensor:
        """Return (T, D) for tokens (T, D); `turns` is empty or has one for each crop size."""
        mixed = []
        parts = self.qkv(x).split([count * length for count, length in sizes])
        for index, (part, (count, length)) in enumerate(zip(parts, sizes, strict=True)):
            query, key, value = part.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            if turns:
                query, key = turn_patches(query, turns[index]), turn_patches(key, turns[index])
            out = attend(query, key, value)
            mixed.append(out.transpose(1, 2).reshape(count * length, -1))
        return self.proj(torch.cat(mixed))


class Mlp(nn.Module):
    """Two linears with GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (T, D) for tokens (T, D)."""
        return self.fc2(functional.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """A gated feed-forward part (arXiv 2002.05202, equation 6); the gate is the first half of `w12`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (T, D) for tokens (T, D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel (arXiv 2103.17239)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` times the factors."""
        return x * self.gamma


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added with stochastic depth."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.drop_path = config.drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config.dim)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = (Mlp if config.ffn == "mlp" else SwiGlu)(config.dim, config.hidden)
        self.ls2 = LayerScale(config.dim)

    def forward(self, x: Tensor, sizes: Sizes, turns: Sequence[Turn] = ()) -> Tensor:
        """Return (T, D) for tokens (T, D) of crops of these sizes."""
        x = self._add(x, sizes, lambda part, left: self.ls1(self.attn(self.norm1(part), left, turns)))
        return self._add(x, sizes, lambda part, _: self.ls2(self.mlp(self.norm2(part))))

    def _add(self, x: Tensor, sizes: Sizes, branch: Callable[[Tensor, Sizes], Tensor]) -> Tensor:
        """Return `x` plus the branch; in training of a random subset of the samples."""
        if not self.training or self.drop_path == 0:
            return x + branch(x, sizes)
        rows, weights, kept = draw_subset(sizes, self.drop_path, x.device)
        return x.index_add(0, rows, (branch(x.index_select(0, rows), kept) * weights).to(x.dtype))


class VisionTransformer(nn.Module):
    """A vision transformer without a head; takes crops of several sizes at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, dim)) if config.registers else None
        learned = config.position == "learned"
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.position_grid**2, dim)) if learned else None
        convolution = nn.Conv2d(3, dim, kernel_size=config.patch_px, stride=config.patch_px)
        self.patch_embed = nn.Sequential(OrderedDict(proj=convolution))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter to its initial value; call it after `to_empty` of a model built on the meta device."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self.config.layer_scale)
        nn.init.zeros_(self.mask_token)
        for tokens in (self.cls_token, self.register_tokens, self.pos_embed):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[CropTokens]:
        """Return the tokens of each crop size.

        Args:
            crops: normalised images (B_i, 3, H_i, W_i), one tensor for each crop size; B_i may differ.
            masks: for each of them None, or bool (B_i, N_i) or (B_i, rows, columns), True where the patch is
                replaced by the mask token.

        Raises:
            GeometryError: a side is no multiple of the patch, or a mask does not fit its crops.
        """
        masks = [None] * len(crops) if masks is None else masks
        grids = [self._grid(crop) for crop in crops]
        parts = [self._embed(*each) for each in zip(crops, masks, grids, strict=True)]
        sizes = [(len(part), part.shape[1]) for part in parts]
        x = torch.cat([part.flatten(0, 1) for part in parts])
        rotary = self.config.position == "rope"
        angles = [rotary_angles(*grid, self.config.head_dim, x.device) for grid in grids] if rotary else []
        for block in self.blocks:
            x = block(x, sizes, [self._turn(each) for each in angles])
        prefix = 1 + self.config.registers
        wholes = self.norm(x).split([count * length for count, length in sizes])
        wholes = [whole.view(*size, -1) for whole, size in zip(wholes, sizes, strict=True)]
        return [CropTokens(whole[:, 0], whole[:, 1:prefix], whole[:, prefix:]) for whole in wholes]

    def _grid(self, crop: Tensor) -> tuple[int, int]:
        """Return rows and columns of patches of a crop."""
        height, width = crop.shape[-2:]
        patch = self.config.patch_px
        if min(height, width) < patch or height % patch or width % patch:
            raise GeometryError(f"crops of {height} x {width} px are no whole number of patches of {patch} px")
        return height // patch, width // patch

    def _embed(self, crop: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Return the tokens (B, 1 + R + N, D) that enter the first block."""
        patches = self.patch_embed(crop).flatten(2).transpose(1, 2)
        cls = self.cls_token
        if mask is None:
            cls = cls + 0 * self.mask_token  # keeps the parameter in every graph, which data-parallel training needs
        elif mask.dtype != torch.bool or mask.flatten(1).shape != patches.shape[:2]:
            found = f"{mask.dtype} {tuple(mask.shape)}"
            raise GeometryError(f"the mask is {found}, needed torch.bool {tuple(patches.shape[:2])}, one a patch")
        else:
            patches = torch.where(mask.flatten(1)[..., None], self.mask_token.to(patches.dtype), patches)
        tokens = torch.cat((cls.expand(len(crop), -1, -1), patches), dim=1)
        if self.pos_embed is not None:
            tokens = tokens + resize_position(self.pos_embed, grid, self.config.interpolation, prefix=1)
        if self.register_tokens is None:
            return tokens
        return torch.cat((tokens[:, :1], self.register_tokens.expand(len(crop), -1, -1), tokens[:, 1:]), dim=1)

    def _turn(self, angles: Tensor) -> Turn:
        """Return cosine and sine of the angles of one block, in training with its own random stretch."""
        if self.training and self.config.rope_rescale > 1:
            reach = math.log(self.config.rope_rescale)
            angles = angles * torch.empty((), device=angles.device).uniform_(-reach, reach).exp()
        return angles.cos(), angles.sin()
