"""The parts of a run on one rank, and one optimiser step of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eosin.encoders import load_encoder
from eosin.encoders.checkpoints import read_facts
from eosin.encoders.encoder import Encoder
from eosin.encoders.ranks import rank, world_size
from eosin.errors import ConfigError, WeightsError
from eosin.pretrain import ema
from eosin.pretrain.adversary import reversal_ramp
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.groups import apply_values, parameter_groups
from eosin.pretrain.guide import Guide, load_guide
from eosin.pretrain.inputs import DROPOUT, STEP, TEACHER, WEIGHTS, seed_of
from eosin.pretrain.layouts import load_weights
from eosin.pretrain.lora import add_adapters
from eosin.pretrain.model import VisionTransformer
from eosin.pretrain.objective import Branch, Crops, Seen, Student, Targets, loss_parts, loss_weights
from eosin.pretrain.parallel import blocks_of, clip, data_parallel, put_away, shard, without_sync
from eosin.pretrain.schedules import StepValues, step_values


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Engine:
    """What is trained and what trains it.

    Attributes:
        config: of the run.
        steps: optimiser steps of the whole run, to which every schedule is keyed.
        device: where all is.
        student: without wrappers.
        forward: the student as it is called: itself, or data-parallel.
        teacher: the moving average of the student's branch, which comes out in the end.
        guide: the frozen teacher that teaches instead of it in a distillation; or None.
        targets: makes its logits distributions.
        anchor: of Gram, an earlier teacher's encoder; or None.
        optimizer: AdamW.
        pairs: the parameters that are averaged.
    """

    config: PretrainConfig
    steps: int
    device: torch.device
    student: Student
    forward: nn.Module
    teacher: Branch
    guide: Guide | None
    targets: Targets
    anchor: VisionTransformer | None
    optimizer: torch.optim.Optimizer
    pairs: ema.Pairs

    def parts(self) -> dict[str, Any]:
        """Return all that a checkpoint must hold, by name."""
        found = {"student": self.student, "teacher": self.teacher, "targets": self.targets, "optimizer": self.optimizer}
        others = {"anchor": self.anchor, "moments": None if self.guide is None else self.guide.moments}
        return {**found, **{name: part for name, part in others.items() if part is not None}}

    def autocast(self) -> torch.autocast:
        """Return the context of the matrix products' precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    @property
    def gram_from(self) -> int:
        """Optimiser step at which the Gram anchor is taken."""
        return round(self.config.objective.gram_start * self.steps)


def build(config: PretrainConfig, *, classes: Mapping[str, int], steps: int, device: torch.device) -> Engine:
    """Return the parts of a run at its start; torch's global generator is seeded with the run's seed.

    Args:
        config: of the run.
        classes: of the factor of each factor head, by head.
        steps: optimiser steps of the whole run.
        device: where all will be.

    Raises:
        ConfigError: sharding without ranks, bf16 on a GPU that lacks it, or a teacher that does not fit the views.
        WeightsError: weights of another shape.
    """
    _check_place(config, device)
    torch.manual_seed(seed_of(config.run.seed, WEIGHTS))
    distilled = config.objective.method == "distil"
    guide = load_guide(config, seed_of(config.run.seed, TEACHER)) if distilled else None
    student = Student(config, classes, teacher_dim=0 if guide is None else guide.spec.width)
    if config.run.weights is not None:
        start_from(student.branch.encoder, config)
    if config.run.lora is not None:
        add_adapters(student.branch.encoder, config.run.lora)
    student.to(device)
    teacher = ema.make_teacher(student.branch)
    anchor = ema.make_teacher(teacher.encoder) if config.objective.method == "dino" and config.objective.gram else None
    others = [module for module in (teacher, anchor, guide) if module is not None]
    for module in (student, *others):
        module.to(device)
        if config.run.compile:
            for block in blocks_of(module):
                block.compile()
        if config.run.shard:
            shard(module, device)
    heads = {name: module for name, module in student.parts().items() if name != "encoder"}
    groups = parameter_groups(
        student.branch.encoder,
        heads,
        layer_decay=config.optimizer.layer_decay,
        patch_embed_multiplier=config.optimizer.patch_embed_multiplier,
    )
    return Engine(
        config=config,
        steps=steps,
        device=device,
        student=student,
        forward=student if config.run.shard else data_parallel(student),
        teacher=teacher,
        guide=guide,
        targets=Targets(config.objective).to(device),
        anchor=anchor,
        optimizer=torch.optim.AdamW(
            groups, lr=config.lr, betas=config.optimizer.betas, fused=None if config.run.shard else True
        ),
        pairs=ema.pair(teacher, student.branch, trained=True),
    )


def _check_place(config: PretrainConfig, device: torch.device) -> None:
    if config.run.shard and world_size() == 1:
        raise ConfigError("run.shard is true, but there is one rank; start with torchrun, or set it to false")
    if config.run.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f'run.precision is "bf16", which {torch.cuda.get_device_name(device)} lacks; set it to "fp32"'
        )


def start_from(encoder: VisionTransformer, config: PretrainConfig) -> None:
    """Fill an encoder from `run.weights`: a file, a folder, or a name that `load_encoder` knows.

    Raises:
        WeightsError: another shape or kind.
        ConfigError: weights that are known to be trained with another mean or deviation than the views have.
    """
    name = str(config.run.weights)
    if Path(name).is_file():
        facts = read_facts(Path(name))
        _check_scale(facts.get("mean"), facts.get("std"), config, name)
        load_weights(encoder, Path(name))
        return
    loaded = load_encoder(name, device="cpu", precision="fp32", backend="torch")
    if not isinstance(loaded, Encoder):
        raise WeightsError(f"run.weights is {name!r}, which has no weights to start from")
    _check_scale(loaded.spec.mean, loaded.spec.std, config, name)
    load_weights(encoder, loaded.backbone.network.state_dict(), what=name)


def _check_scale(mean: object, std: object, config: PretrainConfig, name: str) -> None:
    """Refuse views of another mean or deviation than the weights were trained with, where that is known."""
    views = config.views
    if mean is not None and (mean, std) != (views.mean, views.std):
        raise ConfigError(
            f"views.mean and views.std are {views.mean} and {views.std}; {name} was trained with {mean} and {std}: "
            "set those"
        )


class Stepped(NamedTuple):
    """What one optimiser step gave.

    Attributes:
        parts: unweighted parts of the loss on this rank, mean over the micro-steps; "total" is the weighted sum.
        norms: of the gradient of the encoder and of each head, before clipping.
        values: of the schedules.
        cls: (B, D) the teacher's class tokens of one view of each tile of the last micro-step; the student's where
            there is no teacher of its kind.
        targets: the teacher's distributions of the last micro-step.
    """

    parts: dict[str, Tensor]
    norms: dict[str, Tensor]
    values: StepValues
    cls: Tensor
    targets: Mapping[str, Tensor]


def optimiser_step(engine: Engine, step: int, crops_of: Callable[[int], Crops]) -> Stepped:
    """Make optimiser step `step` (0 is the first) and return what it gave.

    Args:
        engine: changed in place.
        step: number of optimiser steps already made.
        crops_of: gives the crops of a micro-step by its number, `step * accumulate` and on.
    """
    config = engine.config
    values = step_values(step, config.schedule, lr=config.lr, steps=engine.steps)
    apply_values(engine.optimizer, values)
    if engine.anchor is not None and step == engine.gram_from:
        ema.update(ema.pair(engine.anchor, engine.teacher.encoder), momentum=0.0)
    engine.optimizer.zero_grad(set_to_none=True)
    totals, seen, targets = _gather_gradients(engine, step, values, crops_of)
    norms = {name: clip(module, config.optimizer.clip) for name, module in engine.student.parts().items()}
    engine.optimizer.step()
    ema.update(engine.pairs, momentum=values.momentum if config.objective.method != "simclr" else 0.0)
    return Stepped(totals, norms, values, seen.cls.detach().chunk(2)[0], targets)


def _gather_gradients(
    engine: Engine, step: int, values: StepValues, crops_of: Callable[[int], Crops]
) -> tuple[dict[str, Tensor], Seen, dict[str, Tensor]]:
    """Add up the gradients of a step's micro-steps; return the mean parts, and what the last one saw."""
    many = engine.config.run.accumulate
    totals: dict[str, Tensor] = {}
    for index in range(step * many, (step + 1) * many - 1):
        with without_sync(engine.forward, last=False):
            _backward(engine, _micro_step(engine, step, index, values, crops_of(index))[0], totals)
    index = (step + 1) * many - 1
    with without_sync(engine.forward, last=True):
        parts, seen, targets = _micro_step(engine, step, index, values, crops_of(index))
        _backward(engine, parts, totals)
    return totals, seen, targets


def _backward(engine: Engine, parts: dict[str, Tensor], totals: dict[str, Tensor]) -> None:
    many = engine.config.run.accumulate
    (parts["total"] / many).backward()
    for name, value in parts.items():
        totals[name] = totals.get(name, 0) + value.detach() / many


def _micro_step(
    engine: Engine, step: int, index: int, values: StepValues, crops: Crops
) -> tuple[dict[str, Tensor], Seen, dict[str, Tensor]]:
    """Return the parts of the loss with their "total", what is to be watched, and the teacher's targets."""
    config, of = engine.config, engine.config.objective
    torch.manual_seed(seed_of(config.run.seed, STEP, index, rank()))
    dropout = torch.Generator(engine.device).manual_seed(seed_of(config.run.seed, DROPOUT, index, rank()))
    strength = reversal_ramp(step, engine.steps, maximum=of.adversary_strength) if crops.factors else 0.0
    teacher, targets, anchor = None, {}, None
    with engine.autocast():
        if of.method != "simclr":
            teacher, targets = (_teach if engine.guide is None else _guide)(engine, crops, values.temperature)
        if engine.anchor is not None and step >= engine.gram_from:
            with torch.no_grad():
                anchor = engine.anchor(crops.images[:1])[0].patches
            put_away(engine.anchor)
        student = engine.forward(crops, strength, dropout)
    parts = loss_parts(of, crops, student, teacher, targets, anchor)
    weights = loss_weights(of)
    parts["total"] = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
    return parts, student[0] if teacher is None or engine.guide is not None else teacher, targets


@torch.no_grad()
def _teach(engine: Engine, crops: Crops, temperature: float) -> tuple[Seen, dict[str, Tensor]]:
    """Return what the teacher sees of the whole global crops, and its targets."""
    seen = engine.teacher(crops.images[:1], None, crops.places, len(crops.images[0]) // 2)
    put_away(engine.teacher)
    targets: dict[str, Tensor] = {}
    if seen.logits:
        targets["dino"] = engine.targets("dino", torch.cat(seen.logits), temperature)
    if seen.masked_logits is not None:
        targets["ibot"] = engine.targets("ibot", seen.masked_logits, temperature)
    return seen, targets


@torch.no_grad()
def _guide(engine: Engine, crops: Crops, temperature: float) -> tuple[Seen, dict[str, Tensor]]:
    """Return the standardised tokens of the frozen teacher for the global crops, and its targets."""
    assert engine.guide is not None
    seen = engine.guide(crops.images[0], crops.places)
    put_away(engine.guide)
    targets = {name: engine.targets(name, logits, temperature) for name, logits in seen.logits.items()}
    return Seen(seen.cls, seen.patches, None, (), None), targets
