"""What of an encoder trains: nothing, its last blocks, all of it, low-rank adapters, or prompts.

LoRA: Hu et al. 2021, arXiv 2106.09685. Linears of their own get it from peft; queries, keys and values in one linear
from `eosin.finetune.fused`. Both give the same function for the same A and B, and name them alike (`added_state`), so
that what was trained on one layout of the weights loads on the other.

Visual prompts: Jia et al. 2022, arXiv 2203.12119. Shallow: P learned tokens go in before the first block and come out
after the last (equations 4-6). Deep: every block gets P of its own, whose outputs are thrown away (equation 7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eosin.errors import ConfigError
from eosin.finetune.fused import FusedLora, add_fused, merge_fused

Mode = Literal["head", "last", "full", "lora", "vpt"]
MODES: tuple[Mode, ...] = ("head", "last", "full", "lora", "vpt")
Target = Literal["q", "k", "v", "proj", "mlp"]
TARGETS: tuple[Target, ...] = ("q", "k", "v", "proj", "mlp")

# Name of a linear in a block, of timm or transformers -> (target, name in a file).
_LINEARS: dict[str, tuple[Target, str]] = {
    **{name: ("q", "q") for name in ("q_proj", "query")},
    **{name: ("k", "k") for name in ("k_proj", "key")},
    **{name: ("v", "v") for name in ("v_proj", "value")},
    **{name: ("proj", "proj") for name in ("proj", "o_proj", "dense")},
    **{name: ("mlp", "gate") for name in ("fc1_g", "gate_proj")},
    **{name: ("mlp", "fc1") for name in ("fc1", "fc1_x", "up_proj", "w12", "weights_in")},
    **{name: ("mlp", "fc2") for name in ("fc2", "down_proj", "w3", "weights_out")},
}
# Never trained: resized from the release for every input size, used in pretraining only, or not on the way to tokens.
_FROZEN = ("pos_embed", "position_embeddings", "mask_token", "attn_pool")
_NORMS = ("norm", "fc_norm", "layernorm")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig:
    """What of an encoder trains.

    Attributes:
        mode: "head" (nothing of the encoder), "last" (its last `blocks` and the final norm), "full" (all but a learned
            position embedding), "lora" or "vpt".
        rank: r of LoRA.
        alpha: LoRA's output counts alpha / rank.
        dropout: of the input of LoRA, 0 to below 1.
        targets: linears that get LoRA: queries, keys, values, the projection after attention, the feed-forward part.
        blocks: how many last blocks of a transformer, or stages of a CNN, "last" trains.
        prompts: P, how many tokens "vpt" adds.
        deep: whether every block gets prompts of its own.
    """

    mode: Mode = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[Target, ...] = ("q", "v")
    blocks: int = 2
    prompts: int = 10
    deep: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one is out of range, or no such mode or target.
        """
        if self.mode not in MODES:
            raise ConfigError(f"mode {self.mode!r} does not exist; choose one of {', '.join(MODES)}")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ConfigError(f"targets {self.targets} must be one or more of {', '.join(TARGETS)}, each once")
        for name in ("rank", "blocks", "prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be in 0 to below 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha}; it must be positive (twice the rank is usual)")


def adapt(network: nn.Module, config: AdaptConfig, *, seed: int = 0) -> None:
    """Freeze a network and let train what `config` says, in place.

    Args:
        network: a timm network, or a vision transformer of transformers; with its weights.
        config: what trains.
        seed: of what is new; the same on every device.

    Raises:
        ConfigError: the network has adapters or prompts already, or cannot have those asked for.
    """
    if _adapted(network) or _prompted(network):
        raise ConfigError("the network has adapters or prompts already; load the encoder anew, or merge them first")
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.mode == "lora":
            _add_lora(network, config)
        elif config.mode == "vpt":
            _add_prompts(network, config)
    if config.mode == "last":
        _train_last(network, config.blocks)
    elif config.mode == "full":
        network.requires_grad_(True)
    for name, parameter in network.named_parameters():
        if any(part in _FROZEN for part in name.split(".")):
            parameter.requires_grad_(False)
    network.train(network.training)  # what is new as well: dropout would be on in a network that is in use


def stages_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformer, or the stages of a CNN, in order; [] when it has neither."""
    found: Any = network
    for path in ("blocks", "model.layer", "encoder.layer", "stages", "layers"):
        try:
            return list(found.get_submodule(path))
        except AttributeError:
            continue
    return [found.get_submodule(f"layer{at}") for at in (1, 2, 3, 4)] if hasattr(found, "layer4") else []


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a vision transformer of timm or transformers; [] when it is none."""
    stages = stages_of(network)
    return stages if stages and all(hasattr(s, "attn") or hasattr(s, "attention") for s in stages) else []


def _blocks(network: nn.Module, what: str) -> list[nn.Module]:
    blocks = blocks_of(network)
    if not blocks:
        raise ConfigError(
            f"{type(network).__name__} is no vision transformer with blocks, and has no place for {what}; "
            "choose the mode head, last or full"
        )
    return blocks


def _train_last(network: nn.Module, count: int) -> None:
    """Let the last `count` blocks or stages and the final norm train."""
    stages = stages_of(network)
    if count > len(stages):
        raise ConfigError(f"the last {count} blocks are asked for; {type(network).__name__} has {len(stages)}")
    for stage in stages[-count:]:
        stage.requires_grad_(True)
    for name in _NORMS:
        module = getattr(network, name, None)
        if isinstance(module, nn.Module):
            module.requires_grad_(True)


# LoRA.


def _add_lora(network: nn.Module, config: AdaptConfig) -> None:
    """Give the linears that `config` targets adapters."""
    whole, fused = [], []
    names = {id(module): name for name, module in network.named_modules()}
    for block in _blocks(network, "adapters"):
        for path, linear in block.named_modules():
            leaf = path.rpartition(".")[2]
            if not isinstance(linear, nn.Linear):
                continue
            if leaf == "qkv" and set(config.targets) & {"q", "k", "v"}:
                fused.append(block.get_submodule(path.rpartition(".")[0]))
            elif leaf in _LINEARS and _LINEARS[leaf][0] in config.targets:
                whole.append(names[id(linear)])
    if not whole and not fused:
        raise ConfigError(f"no linear of {type(network).__name__} is one of the targets {', '.join(config.targets)}")
    for attention in fused:
        add_fused(attention, parts=config.targets, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
    if whole:
        settings = peft.LoraConfig(
            r=config.rank, lora_alpha=cast(int, config.alpha), lora_dropout=config.dropout, target_modules=whole
        )
        peft.inject_adapter_in_model(settings, network)
    for parameter in added_state(network).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _adapted(network: nn.Module) -> list[tuple[str, Any]]:
    """Return the modules with adapters, by name."""
    return [(name, module) for name, module in network.named_modules() if isinstance(module, FusedLora | LoraLayer)]


def added_state(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return what was added to a network, under names that are alike for every layout of its weights.

    Returns:
        The parameters themselves: adapters as "0.q.down" (r, D) and "0.q.up" (W, r), block 0, queries; prompts as
        "0.prompts" (1, P, D).
    """
    out: dict[str, nn.Parameter] = {}
    for at, block in enumerate(blocks_of(network)):
        if hasattr(block, "prompts"):
            out[f"{at}.prompts"] = cast(nn.Parameter, block.prompts)
        for path, module in _adapted(block):
            if isinstance(module, FusedLora):
                for part in module.parts:
                    out[f"{at}.{part}.down"], out[f"{at}.{part}.up"] = module.down[part], module.up[part]
            else:
                part = _LINEARS[path.rpartition(".")[2]][1]
                out[f"{at}.{part}.down"] = module.lora_A["default"].weight
                out[f"{at}.{part}.up"] = module.lora_B["default"].weight
    return out


def merge(network: nn.Module) -> None:
    """Add the adapters to the weights and take them out: a plain network again, frozen, in place.

    Raises:
        ConfigError: the network has prompts, which are no change of its weights, or no adapters.
    """
    if _prompted(network):
        raise ConfigError("prompts are tokens, not weights: they cannot be merged; save them beside the encoder")
    adapted = _adapted(network)
    if not adapted:
        raise ConfigError(f"{type(network).__name__} has no adapters to merge")
    for name, module in adapted:
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, FusedLora):
            merge_fused(network.get_submodule(parent))
        else:
            module.merge()
            setattr(network.get_submodule(parent), leaf, module.get_base_layer())
    if "peft_config" in vars(network):
        del network.peft_config
    network.requires_grad_(False)


# Prompts.


def _prefix(network: nn.Module) -> int:
    """Return how many tokens stand before those of patches."""
    found: Any = network
    if hasattr(found, "num_prefix_tokens"):
        return int(found.num_prefix_tokens)
    return 1 + int(getattr(found.config, "num_register_tokens", 0))


def _prompted(network: nn.Module) -> list[nn.Module]:
    """Return the blocks that hold prompts."""
    return [block for block in blocks_of(network) if hasattr(block, "prompts")]


def _add_prompts(network: nn.Module, config: AdaptConfig) -> None:
    """Put prompts between the first tokens and the patches, by hooks on the blocks, whose names stay as they are."""
    blocks, prefix = _blocks(network, "prompts"), _prefix(network)
    like = next(parameter for parameter in blocks[0].parameters() if parameter.ndim == 2)
    width, patch = like.shape[1], _patch_px(network)
    bound = math.sqrt(6 / (3 * patch * patch + width))  # as the authors' code draws them
    for at, found in enumerate(blocks):
        block: Any = found
        block.prompt_span = (prefix, prefix + config.prompts)
        if config.deep or at == 0:
            drawn = torch.empty(1, config.prompts, width).uniform_(-bound, bound).to(like.device)
            block.register_parameter("prompts", nn.Parameter(drawn))
            block.register_forward_pre_hook(_insert)
        if config.deep or at == len(blocks) - 1:
            block.register_forward_hook(_strip)
        attention: Any = getattr(block, "attn", None)
        if hasattr(attention, "num_prefix_tokens"):  # rotary positions are for patches only
            attention.num_prefix_tokens += config.prompts


def _patch_px(network: nn.Module) -> int:
    found: Any = network
    size = found.patch_embed.patch_size if hasattr(found, "patch_embed") else found.config.patch_size
    return int(size[0] if isinstance(size, tuple | list) else size)


def _insert(block: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Put the block's prompts into its input, (B, N, D) to (B, N + P, D)."""
    tokens, start = args[0], block.prompt_span[0]
    prompts = block.prompts.to(tokens.dtype).expand(len(tokens), -1, -1)
    return (torch.cat((tokens[:, :start], prompts, tokens[:, start:]), dim=1), *args[1:])


def _strip(block: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Take the prompts out of the block's output, (B, N + P, D) to (B, N, D)."""
    start, stop = block.prompt_span
    return torch.cat((out[:, :start], out[:, stop:]), dim=1)


# Training.


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing of the blocks: activations are computed again on the way back, gradients the same.

    Raises:
        ConfigError: the network is no transformer (with batch norm, computing again would count a batch twice).
    """
    found: Any = network
    _blocks(network, "gradient checkpointing")
    if hasattr(found, "set_grad_checkpointing"):
        found.set_grad_checkpointing(on)
        return
    word = "activation" if hasattr(found, "activation_checkpointing_enable") else "gradient"  # transformers 5 or 4
    if on:
        getattr(found, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(found, f"{word}_checkpointing_disable")()


def depths(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yield name, parameter and depth of all that trains: 0 before the blocks, i + 1 in block i, L + 1 after them."""
    stages = stages_of(network)
    inside = {id(parameter): at + 1 for at, stage in enumerate(stages) for parameter in stage.parameters()}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            after = len(stages) + 1 if name.split(".")[0] in (*_NORMS, "head") else 0
            yield name, parameter, inside.get(id(parameter), after)


def count(network: nn.Module) -> int:
    """Return how many numbers train."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
