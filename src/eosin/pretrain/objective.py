"""What is learned: student and teacher with their heads, the teacher's targets, and the parts of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eosin.errors import ConfigError
from eosin.pretrain import losses
from eosin.pretrain.adversary import AdversaryHead, adversary_loss
from eosin.pretrain.config import ObjectiveConfig, PretrainConfig
from eosin.pretrain.guide import feature_loss
from eosin.pretrain.heads import ProjectionHead, mlp
from eosin.pretrain.model import VisionTransformer

SMALLEST_MASKED = 4
FACTOR_HEADS = ("adversary", "anchor")


class Crops(NamedTuple):
    """One micro-step's views on the device of the model.

    Attributes:
        images: (2 B, 3, g, g) both global crops, the first of every tile before the second; then (L B, 3, l, l) the
            local ones if there are any.
        hidden: bool (2 B, N), the patches that iBOT and JEPA learn from, which the student does not see (it does when
            it is distilled); None without.
        places: int64 (M,) where `hidden` is True, counted over all crops.
        factors: class of each tile, int64 (B,), -1 unknown, by head ("adversary", "anchor").
    """

    images: list[Tensor]
    hidden: Tensor | None
    places: Tensor | None
    factors: Mapping[str, Tensor]


class Seen(NamedTuple):
    """What student or teacher made of the crops.

    Attributes:
        cls: (2 B, D) class tokens of the global crops.
        patches: (2 B, N, D) their patches.
        masked: (M, D) those at the masked places, or None.
        logits: (B, K) of each crop, global ones first; empty without DINO.
        masked_logits: (M, K), or None without iBOT.
    """

    cls: Tensor
    patches: Tensor
    masked: Tensor | None
    logits: tuple[Tensor, ...]
    masked_logits: Tensor | None


class Branch(nn.Module):
    """An encoder and the heads whose outputs are distilled: all that the teacher is, and most of the student."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        of = config.objective
        self.encoder = VisionTransformer(config.model)
        taught = of.method != "simclr"
        self.dino = _head(config) if taught and of.dino else None
        own = of.own_ibot_head or self.dino is None
        self.ibot = _head(config) if taught and of.ibot and own else None
        self.shared = taught and of.ibot > 0 and not own

    def forward(
        self, images: list[Tensor], masks: list[Tensor | None] | None, places: Tensor | None, tiles: int
    ) -> Seen:
        """Return the outputs of `tiles` tiles' crops; `masks` are applied, the patches at `places` are picked."""
        tokens = self.encoder(images, masks)
        seen = tokens[0]
        picked = None if places is None else seen.patches.flatten(0, 1).index_select(0, places)
        logits: tuple[Tensor, ...] = ()
        if self.dino is not None:
            logits = self.dino(torch.cat([part.cls for part in tokens])).split(tiles)
        head = self.dino if self.shared else self.ibot
        masked = head(picked) if head is not None and picked is not None else None
        return Seen(seen.cls, seen.patches, picked, logits, masked)


def _head(config: PretrainConfig) -> ProjectionHead:
    of = config.objective
    sizes = {"hidden": of.hidden, "bottleneck": of.bottleneck, "prototypes": of.prototypes}
    return ProjectionHead(config.model.dim, **sizes, weight_norm=of.weight_norm)


class Student(nn.Module):
    """The branch that is trained, and the heads that only it has.

    Args:
        config: of the run.
        classes: of the factor of each of "adversary" and "anchor" that is wanted.
        teacher_dim: width of the tokens of a frozen teacher, 0 without one.
    """

    def __init__(self, config: PretrainConfig, classes: Mapping[str, int], *, teacher_dim: int = 0) -> None:
        super().__init__()
        of, dim = config.objective, config.model.dim
        self.branch = Branch(config)
        self.masks = of.method == "dino"
        own: dict[str, nn.Module] = {}
        if of.method == "simclr":
            own["simclr"] = mlp(dim, of.hidden, of.bottleneck, layers=2)
        elif of.jepa:
            own["jepa"] = mlp(dim, of.hidden, dim, layers=2)
        for name, weight in feature_weights(of).items():
            if weight:
                own[name] = nn.Linear(dim, teacher_dim)
        for at, (name, count) in enumerate(classes.items()):
            own[name] = AdversaryHead(dim, count, anchor=name == "anchor", seed=config.run.seed + at)
        self.own = nn.ModuleDict(own)

    def forward(
        self, crops: Crops, strength: float, generator: torch.Generator | None
    ) -> tuple[Seen, dict[str, Tensor]]:
        """Return what the branch saw, and the outputs of the other heads by name.

        Args:
            crops: of one micro-step.
            strength: of the gradient that goes back from the factor heads.
            generator: of their dropout.
        """
        masks = [crops.hidden if self.masks else None, *[None] * (len(crops.images) - 1)]
        seen = self.branch(crops.images, masks, crops.places, len(crops.images[0]) // 2)
        out: dict[str, Tensor] = {}
        for name, head in self.own.items():
            if name in FACTOR_HEADS:
                out[name] = head(seen.cls, strength=strength, generator=generator)
            elif name == "feature_patches":
                out[name] = head(seen.patches.flatten(0, 1))
            else:
                out[name] = head(seen.masked if name == "jepa" else seen.cls)
        return seen, out

    def parts(self) -> dict[str, nn.Module]:
        """Return the encoder and each head by name, every parameter in one of them."""
        own = {"encoder": self.branch.encoder, "dino": self.branch.dino, "ibot": self.branch.ibot, **self.own}
        return {name: module for name, module in own.items() if module is not None}


class Targets(nn.Module):
    """The teacher's logits made distributions: Sinkhorn-Knopp, or softmax under a moving centre (which is state)."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.centres = nn.ModuleDict()
        if config.centring == "ema":
            self.centres.update({name: losses.CenteredSoftmax(config.prototypes) for name in ("dino", "ibot")})

    def forward(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        """Return the targets (rows, K) of "dino" or "ibot"."""
        if name in self.centres:
            return self.centres[name](logits, temperature)
        return losses.sinkhorn_knopp(logits, temperature)


def feature_weights(config: ObjectiveConfig) -> dict[str, float]:
    """Return the weights of the regression of a teacher's tokens; 0 without."""
    of = config.features
    return {} if of is None else {"feature_cls": of.cls, "feature_patches": of.patches}


def loss_weights(config: ObjectiveConfig) -> dict[str, float]:
    """Return the weight of every part of the loss that is not left out."""
    if config.method == "simclr":
        weights = {"simclr": 1.0, "koleo": 0.0, "kde": 0.0}
    else:
        weights = {name: getattr(config, name) for name in ("dino", "ibot", "jepa", "koleo", "kde", "gram")}
        weights |= feature_weights(config)
    weights |= {name: 1.0 for name in FACTOR_HEADS if getattr(config, name) is not None}
    return {name: weight for name, weight in weights.items() if weight > 0}


def loss_parts(
    config: ObjectiveConfig,
    crops: Crops,
    student: tuple[Seen, Mapping[str, Tensor]],
    teacher: Seen | None,
    targets: Mapping[str, Tensor],
    anchor: Tensor | None,
) -> dict[str, Tensor]:
    """Return the parts of the loss, unweighted; the total is their sum with `loss_weights`.

    Args:
        config: the objective.
        crops: of this micro-step.
        student: what `Student.forward` gave.
        teacher: what the teacher saw of the whole global crops, standardised when it is frozen; None with SimCLR.
        targets: its targets by name, (2 B, K) "dino" and (M, K) "ibot".
        anchor: patches (2 B, N, D) of the Gram anchor, or None while there is none.
    """
    seen, out = student
    found: dict[str, Tensor] = {}
    views = seen.cls.chunk(2)
    if "simclr" in out:
        found["simclr"] = losses.simclr(*out["simclr"].chunk(2), temperature=config.temperature)
    if "dino" in targets:
        found["dino"] = losses.dino_loss(seen.logits, targets["dino"].chunk(2), temperature=config.temperature)
    if "ibot" in targets and seen.masked_logits is not None and crops.hidden is not None:
        found["ibot"] = losses.ibot_loss(
            seen.masked_logits, targets["ibot"], crops.hidden, temperature=config.temperature
        )
    if "jepa" in out and teacher is not None and teacher.masked is not None and crops.hidden is not None:
        found["jepa"] = losses.jepa_loss(out["jepa"], teacher.masked, crops.hidden)
    for name in feature_weights(config):
        if name in out and teacher is not None and config.features is not None:
            target = teacher.cls if name == "feature_cls" else teacher.patches.flatten(0, 1)
            found[name] = feature_loss(out[name], target, distance=config.features.distance)
    if config.method != "simclr" and config.koleo:
        found["koleo"] = sum((losses.koleo(z) for z in views), torch.zeros((), device=seen.cls.device))
    if config.method != "simclr" and config.kde:
        kernel = (losses.kde(z, kappa=config.kde_kappa) for z in views)
        found["kde"] = sum(kernel, torch.zeros((), device=seen.cls.device))
    if anchor is not None:
        found["gram"] = losses.gram_loss(seen.patches, anchor)
    for name in FACTOR_HEADS:
        if name in out:
            found[name] = adversary_loss(out[name], crops.factors[name].repeat(2))
    return found


def check_batch(config: PretrainConfig, world: int) -> None:
    """Refuse a batch for which a part of the objective means nothing.

    Raises:
        ConfigError: naming the part, the batch, and what to change.
    """
    of, batch = config.objective, config.batch_of_rank(world)
    where = f"run.batch is {config.run.batch}" + (f" on {world} ranks, {batch} a rank" if world > 1 else "")
    taught = of.method != "simclr"
    if taught and (of.dino or of.ibot) and of.centring == "sinkhorn" and config.run.batch < 2:
        raise ConfigError(
            f"{where}; Sinkhorn-Knopp spreads the rows of a batch over prototypes, and would drive the two views of "
            'one tile apart: give 2 or more, or objective.centring = "ema"'
        )
    if (of.koleo or of.kde or not taught) and config.run.batch < 2:
        raise ConfigError(f"{where}; KoLeo, KDE and SimCLR compare tiles: give 2 or more, or set their weights to 0")
    if not (taught and (of.ibot or of.jepa)):
        return
    if int(2 * batch * of.mask_share) < 1:
        raise ConfigError(
            f"{where}, and objective.mask_share is {of.mask_share}: no crop of a rank would be masked, and iBOT and "
            "JEPA learn from masked ones; raise one of them, or set ibot and jepa to 0"
        )
    patches = (config.views.global_px // config.model.patch_px) ** 2
    if int(patches * of.mask_ratio[1]) < SMALLEST_MASKED:
        raise ConfigError(
            f"a global crop of {config.views.global_px} px has {patches} patches, and objective.mask_ratio "
            f"{list(of.mask_ratio)} hides fewer than {SMALLEST_MASKED}, the smallest block; raise either"
        )
