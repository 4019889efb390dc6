"""An encoder and a linear head that give logits, ready to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eosin.encoders.checkpoints import hash_tensors
from eosin.encoders.convert import to_timm
from eosin.encoders.network import Backbone
from eosin.encoders.pooling import pool
from eosin.encoders.spec import EncoderSpec, Pooling, Tokens, check_side
from eosin.errors import ConfigError
from eosin.finetune.adapters import AdaptConfig, adapt, depths, set_checkpointing, stages_of

CLASSES = ("normal", "atypical")


class Classifier(nn.Module):
    """Normalised images to logits: backbone, pooling, one linear.

    Two classes have one logit, that of the second. Batch norms whose weights stand still keep their statistics, too.

    Args:
        backbone: images to `Tokens`; its network is adapted in place, and belongs to the classifier from now on.
        config: what of the network trains.
        classes: their names, in order; for two, the second is the positive one.
        pooling: how tokens become one vector.
        seed: of adapters, prompts and head.

    Raises:
        ConfigError: fewer than two classes or one twice, or the network cannot be adapted so.
    """

    def __init__(
        self,
        backbone: Backbone | TransformersBackbone,
        config: AdaptConfig,
        *,
        classes: Sequence[str] = CLASSES,
        pooling: Pooling | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ConfigError(f"classes {tuple(classes)}: needed are two or more, each once")
        self.spec: EncoderSpec = backbone.spec if pooling is None else backbone.spec.with_pooling(pooling)
        self.config = config
        self.classes = tuple(classes)
        self.backbone = backbone
        adapt(backbone.network, config, seed=seed)
        outputs = 1 if len(classes) == 2 else len(classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(self.spec.dim, outputs)
            nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.head = head.to(next(backbone.parameters()).device)

    @property
    def branches(self) -> list[Classifier]:
        """The classifiers this model is made of: itself."""
        return [self]

    def vector(self, images: Tensor) -> Tensor:
        """Return the pooled tokens (B, D) of normalised images (B, 3, H, W).

        Raises:
            GeometryError: a side is no multiple of the patch.
        """
        self.backbone.fit(images.shape[-2], images.shape[-1])
        return pool(self.backbone(images), self.spec.pooling)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of normalised images (B, 3, H, W): (B, 1) for two classes, else (B, K)."""
        return self.head(self.vector(images))

    def train(self, mode: bool = True) -> Classifier:
        """Switch between training and use; batch norms that stand still stay in use."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def set_checkpointing(self, on: bool) -> None:
        """Switch gradient checkpointing of the blocks; see `adapters.set_checkpointing`."""
        set_checkpointing(self.backbone.network, on)


class TransformersBackbone(nn.Module):
    """A DINOv3 or DINOv2 model of transformers, with linears of their own for queries, keys and values, as `Tokens`.

    Its weights have the hash of the same weights in timm's layout, so that adapters trained on one load on the other.

    Args:
        network: `DINOv3ViTModel`, `Dinov2Model` or `Dinov2WithRegistersModel`, with its weights.
        name: of the encoder.
    """

    def __init__(self, network: nn.Module, *, name: str) -> None:
        super().__init__()
        config = cast(Any, network).config
        patch = int(config.patch_size)
        on_meta = next(network.parameters()).is_meta
        self.network = network
        self.spec = EncoderSpec(
            name=name,
            dim=int(config.hidden_size),
            patch_px=patch,
            input_px=max(1, int(config.image_size) // patch) * patch,
            registers=int(getattr(config, "num_register_tokens", 0)),
            source=f"hf:{name}",
            weights_hash="" if on_meta else hash_tensors(to_timm(network.state_dict()).state),
        )

    def fit(self, height_px: int, width_px: int) -> None:
        """Raise `GeometryError` unless both sides are multiples of the patch."""
        check_side(self.spec, height_px, width_px)

    def forward(self, images: Tensor) -> Tokens:
        """Return the tokens of normalised images (B, 3, H, W), after the final norm."""
        tokens = cast(Any, self.network)(pixel_values=images).last_hidden_state
        prefix = 1 + self.spec.registers
        grid = (images.shape[-2] // self.spec.patch_px, images.shape[-1] // self.spec.patch_px)
        return Tokens(tokens[:, 0], tokens[:, 1:prefix], tokens[:, prefix:].unflatten(1, grid))


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return groups of what trains for a torch optimiser, with layer-wise decay of the learning rate.

    As in BEiT (Bao et al. 2021, arXiv 2106.08254): with L blocks, block i (from 1) learns at lr d^(L + 1 - i), what is
    before the blocks at lr d^(L + 1), the final norm and everything new after it at lr. Biases, norms and learned
    tokens (class, register, prompts) have no weight decay.

    Args:
        model: a `Classifier` or a mixture of them.
        lr: learning rate of the head.
        weight_decay: of matrices.
        layer_decay: d, above 0 to 1; 1 gives every layer `lr`.

    Returns:
        One dict a pair of rate and decay: "params", "lr", "weight_decay" and "names", highest rate first.

    Raises:
        ConfigError: `layer_decay` is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise ConfigError(f"layer decay is {layer_decay}; it must be above 0 and at most 1 (0.65-0.9 is usual)")
    scales: dict[int, float] = {}
    for branch in (module for module in model.modules() if isinstance(module, Classifier)):
        network = branch.backbone.network
        top = len(stages_of(network)) + 1
        scales |= {id(parameter): layer_decay ** (top - depth) for _, parameter, depth in depths(network)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * scales.get(id(parameter), 1.0)
        token = name.rsplit(".", 1)[-1] in ("cls_token", "reg_token", "register_tokens", "prompts")
        decay = 0.0 if parameter.ndim <= 1 or token else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay, "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, reverse=True)]
