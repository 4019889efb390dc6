"""Distillation: a small encoder learns the answers of a large one that was fine-tuned.

Hinton et al. 2015 (arXiv 1503.02531): the student's logits s learn the teacher's t, both softened by a temperature T,
at T^2 times the cost, so that gradients keep their size when T changes (section 2.1). Of two classes, with one logit,

    L = a T^2 KL(Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(s / T))) + b D(W v_s, v_t) + c L_label,

v being the pooled vectors, W a linear that trains along and is thrown away, and D one minus the cosine, or the smooth
L1 distance of both after a layer norm. Teacher and student look at the same augmented image, mixed with the same other
one (Beyer et al. 2022, arXiv 2106.05237), each at its own size and normalisation.

A student is taught out of fold by `eosin.finetune.teacher`, which says what keeps that honest.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.errors import ConfigError
from eosin.features.recipe import canonical_json
from eosin.finetune.classifier import Classifier
from eosin.finetune.experts import Mixture
from eosin.finetune.infer import Ensemble
from eosin.finetune.saving import Model

Compare = Literal["cosine", "smooth-l1"]
COMPARES: tuple[Compare, ...] = ("cosine", "smooth-l1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilConfig:
    """What the student learns from.

    Attributes:
        temperature: T, of both logits.
        logit: a, how much the teacher's logit counts.
        feature: b, how much its vector counts.
        label: c, how much the labels count; 0 is teaching without labels (which still choose the epoch).
        compare: how vectors are compared.
    """

    temperature: float = 2.0
    logit: float = 1.0
    feature: float = 1.0
    label: float = 1.0
    compare: Compare = "cosine"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one is out of range, or nothing of the teacher counts.
        """
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"the temperature is {self.temperature}; it must be above 0 (1-4 is usual)")
        for name in ("logit", "feature", "label"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"the share of {name} is {getattr(self, name)}; it must be 0 or more")
        if not self.logit + self.feature > 0:
            raise ConfigError("logit and feature are 0: nothing of the teacher would be learned; use eosin finetune")
        if self.compare not in COMPARES:
            raise ConfigError(f"vectors cannot be compared by {self.compare!r}; choose {' or '.join(COMPARES)}")


def logit_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of two softened Bernoulli distributions, a row each, (B,).

    The gradient by s is T (sigmoid(s / T) - sigmoid(t / T)), which tends to (s - t) / 4 as T grows (equation 4).

    Args:
        student: logits (B,) or (B, 1).
        teacher: logits of as many.
        temperature: T.
    """
    s, t = (_at_least_float32(x).reshape(-1) / temperature for x in (student, teacher))
    p = t.sigmoid()
    positive = functional.logsigmoid(t) - functional.logsigmoid(s)
    negative = functional.logsigmoid(-t) - functional.logsigmoid(-s)
    return temperature**2 * (p * positive + (1 - p) * negative)


def feature_loss(student: Tensor, teacher: Tensor, *, compare: Compare = "cosine") -> Tensor:
    """Return how far vectors (B, D) lie apart, a row each, (B,): 1 - cosine, or smooth L1 after a layer norm."""
    s, t = _at_least_float32(student), _at_least_float32(teacher)
    if compare == "cosine":
        return 1 - functional.cosine_similarity(s, t, dim=-1)
    ours, theirs = (functional.layer_norm(x, x.shape[-1:]) for x in (s, t))
    return functional.smooth_l1_loss(ours, theirs, reduction="none").mean(-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Distillation:
    """What one fold is taught: a `train.Lesson`.

    Attributes:
        teacher: one model, with how it takes tiles.
        module: W, from the student's vectors to the teacher's; empty where vectors do not count.
        identity: a hash of the teacher and the config.
        label_share: how much the labels count.
    """

    def __init__(
        self, student: Model, teacher: Ensemble, config: DistilConfig, *, identity: str, seed: int = 0
    ) -> None:
        """Keep the teacher, still and without gradients, and draw W on the CPU."""
        (self._model,) = teacher.models
        self._model.eval().requires_grad_(False)
        self.teacher, self.config, self.label_share = teacher, config, config.label
        self.identity = hashlib.sha256(f"{identity}{canonical_json(asdict(config))}".encode()).hexdigest()
        self.module: nn.Module = nn.Identity()
        if config.feature:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.module = nn.Linear(_width(student), _width(self._model), bias=False)
            self.module.to(teacher.device)

    def __call__(self, model: Model, given: Tensor, seen: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the student's logits (B, 1), and what its answers lack of the teacher's, (B,)."""
        bf16 = torch.autocast(torch.device(self.teacher.device).type, torch.bfloat16, self.teacher.precision == "bf16")
        with torch.no_grad(), bf16:
            wanted, right = answer(self._model, self.teacher.how.prepare(seen))
        vector, logits = answer(model, given)
        loss = torch.zeros(len(seen), device=seen.device)
        if self.config.logit:
            loss = loss + self.config.logit * logit_loss(logits, right, temperature=self.config.temperature)
        if self.config.feature:
            apart = feature_loss(self.module(vector), wanted, compare=self.config.compare)
            loss = loss + self.config.feature * apart
        return logits, loss


def answer(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vector (B, D) and the logits (B, 1) of normalised images (B, 3, H, W)."""
    if isinstance(model, Mixture):
        return model.answer(images)
    if not isinstance(model, Classifier):
        raise ConfigError(f"{type(model).__name__} is no classifier that can teach or learn")
    vector = model.vector(images)
    return vector, model.head(vector)


def _width(model: nn.Module) -> int:
    """Return the length D of the vector of `answer`."""
    return sum(part.spec.dim for part in model.modules() if isinstance(part, Classifier))
