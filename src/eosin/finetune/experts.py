"""A mixture of experts: several classifiers of the same images, weighed for each image by a learned gate.

After the idea of Jacobs et al. 1991 (Neural Computation 3, 79-87) and of the staging study of the esophagogastric
junction, which joins a vision transformer, for the whole of the tile, and a ResNet50, for its local texture. The design
is ours: z(x) = sum_e g_e(x) z_e(x), with logits z_e and g = softmax(W [v_1, v_2, ...] + b), v_e being the vector of
expert e after a layer norm without parameters. W and b start at zero: at first every expert counts alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.encoders.spec import EncoderSpec
from eosin.errors import ConfigError
from eosin.finetune.adapters import blocks_of
from eosin.finetune.classifier import Classifier


class Mixture(nn.Module):
    """Classifiers and a gate: normalised images to logits.

    Images are normalised as the first expert has them; for another with another mean or deviation they are changed.

    Args:
        experts: two or more, of the same classes.

    Raises:
        ConfigError: fewer than two experts, or of different classes.
    """

    def __init__(self, experts: Sequence[Classifier]) -> None:
        super().__init__()
        if len(experts) < 2 or len({expert.classes for expert in experts}) > 1:
            told = "; ".join(", ".join(expert.classes) for expert in experts)
            raise ConfigError(f"a mixture needs two or more experts of the same classes; given: {told or 'none'}")
        self.experts = nn.ModuleList(experts)
        self.spec: EncoderSpec = experts[0].spec
        self.classes = experts[0].classes
        where = experts[0].head.weight.device
        self.gate = nn.Linear(sum(expert.spec.dim for expert in experts), len(experts), device=where)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    @property
    def branches(self) -> list[Classifier]:
        """The experts."""
        return [expert for expert in self.experts if isinstance(expert, Classifier)]

    def _vectors(self, images: Tensor) -> list[Tensor]:
        return [expert.vector(_renormalised(images, self.spec, expert.spec)) for expert in self.branches]

    def _shares(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return what the gate gives each expert, (B, E), float32 whatever the precision."""
        return self.gate(_joined(vectors)).float().softmax(dim=-1)

    def shares(self, images: Tensor) -> Tensor:
        """Return how much each expert counts for normalised images (B, 3, H, W): (B, E), rows sum to 1."""
        return self._shares(self._vectors(images))

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the gate sees, (B, D) with the D of the experts added up, and the logits as `forward`."""
        vectors = self._vectors(images)
        logits = torch.stack([e.head(v) for e, v in zip(self.branches, vectors, strict=True)], dim=1)
        return _joined(vectors), (self._shares(vectors)[..., None] * logits).sum(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of normalised images (B, 3, H, W): (B, 1) for two classes, else (B, K)."""
        return self.answer(images)[1]

    def set_checkpointing(self, on: bool) -> None:
        """Switch gradient checkpointing of the experts that are transformers."""
        for expert in self.branches:
            if blocks_of(expert.backbone.network):
                expert.set_checkpointing(on)


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    """Return the experts' vectors side by side, each after a layer norm."""
    return torch.cat([functional.layer_norm(vector, vector.shape[-1:]) for vector in vectors], dim=-1)


def _renormalised(images: Tensor, had: EncoderSpec, wanted: EncoderSpec) -> Tensor:
    """Return images normalised with the mean and deviation of one encoder as those of another."""
    if (had.mean, had.std) == (wanted.mean, wanted.std):
        return images
    numbers = [images.new_tensor(values)[:, None, None] for values in (had.mean, had.std, wanted.mean, wanted.std)]
    mean, std, other_mean, other_std = numbers
    return (images * std + mean - other_mean) / other_std
