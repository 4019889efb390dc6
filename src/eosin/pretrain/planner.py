"""What a run costs before it starts: images, floating point operations, memory and hours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from eosin.errors import ConfigError
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.guide import Guide, sketch_guide
from eosin.pretrain.lora import add_adapters
from eosin.pretrain.model import ModelConfig
from eosin.pretrain.objective import Branch, Student, feature_weights
from eosin.pretrain.parallel import put_away
from eosin.pretrain.schedules import Budget, resolve_budget

BACKWARD = 3
"""Forward and backward cost three forwards: one matrix product forward, two backward."""
FROZEN = 2
"""Of weights that stand still the backward pass needs one product: no gradient of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The cost of a run.

    Attributes:
        budget: what ends the run; None when it is given in hours alone and no speed is known.
        lr: peak learning rate after the rule of the batch.
        batch_of_rank: tiles of one micro-step on one rank.
        world: ranks.
        parameters: numbers that are trained, "encoder" and "heads"; those that are not, "frozen" with adapters and
            "teacher" in a distillation.
        flops_per_image: operations for one tile of the training set (a multiplication and an addition are two), by
            part: "teacher", "student", "heads", "anchor". Stochastic depth is credited; norms, softmax, views and the
            optimiser are not counted.
        memory: bytes on one rank, by part: "weights" (student, teacher, anchor), "optimiser" (gradients and moments),
            "activations" (what the backward pass keeps, estimated), "logits" (of teacher and student, estimated).
        hours: of training; None without a speed.
        hours_from: the speed that the hours rest on.
    """

    budget: Budget | None
    lr: float
    batch_of_rank: int
    world: int
    parameters: dict[str, int]
    flops_per_image: dict[str, float]
    memory: dict[str, float]
    hours: float | None
    hours_from: str

    @property
    def flops(self) -> float | None:
        """Operations of the whole run, or None without a budget."""
        return None if self.budget is None else sum(self.flops_per_image.values()) * self.budget.images

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "flops": self.flops}

    def __str__(self) -> str:
        """Return the plan as lines of text."""
        per_image, memory = sum(self.flops_per_image.values()), sum(self.memory.values())
        rows = {
            "budget": self.budget or "hours only: it becomes steps when a step has been timed",
            "images": "" if self.budget is None else f"{self.budget.images:,}",
            "learning rate": f"{self.lr:.3g} at the peak",
            "batch": f"{self.batch_of_rank} tiles a micro-step on each rank; ranks: {self.world}",
            "parameters": _parts(self.parameters, 1e6, "M"),
            "an image": f"{per_image / 1e12:.3g} TFLOP: {_parts(self.flops_per_image, 1e12, '')}",
            "the run": "" if self.flops is None else f"{self.flops / 1e15:.3g} PFLOP",
            "memory a rank": f"about {memory / 2**30:.3g} GiB: {_parts(self.memory, 2**30, '')}",
            "hours": self.hours_from if self.hours is None else f"{self.hours:.3g} ({self.hours_from})",
        }
        return "\n".join(f"{name:<14} {value}" for name, value in rows.items() if value != "")


def plan(
    config: PretrainConfig,
    *,
    world: int = 1,
    seconds_per_step: float | None = None,
    tflops: float | None = None,
    guide: Guide | None = None,
) -> Plan:
    """Return the cost of a run.

    Args:
        config: of the run.
        world: ranks.
        seconds_per_step: measured time of an optimiser step; it decides the hours when given.
        tflops: else the rate that one device is taken to sustain, in 1e12 operations a second. Reported runs sustain
            about a third of an A100's 312 in bf16 with ViT-L and g, a quarter of an H100's 989, and 5 to 11 % of it
            with ViT-S, where views and reading are the limit.
        guide: the frozen teacher of a distillation where it is at hand; None looks it up.

    Raises:
        ConfigError: a batch that the ranks do not divide, or a rate that is not positive.
        WeightsError: the teacher of a distillation is a file that cannot be read.
    """
    for name, value in (("seconds_per_step", seconds_per_step), ("tflops", tflops)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    batch = config.batch_of_rank(world)
    if config.objective.method == "distil" and guide is None:
        guide = sketch_guide(config)
    parameters = _parameters(config, guide)
    flops = _flops_per_image(config, batch, guide)
    seconds, source = seconds_per_step, "a measured step"
    if seconds is None and tflops is not None:
        seconds = sum(flops.values()) * config.images_per_step / (tflops * 1e12 * world)
        source = f"{tflops:g} TFLOP/s on each of {world} devices, as stated"
    only_hours = config.budget.steps is None and config.budget.images is None
    budget = None if only_hours and seconds is None else _budget(config, seconds)
    hours = None if seconds is None or budget is None else budget.steps * seconds / 3600
    return Plan(
        budget=budget,
        lr=config.lr,
        batch_of_rank=batch,
        world=world,
        parameters=parameters,
        flops_per_image=flops,
        memory=_memory(config, parameters, batch, world),
        hours=hours,
        hours_from="unknown: give a measured step or a rate of the device" if hours is None else source,
    )


def forward_flops(model: ModelConfig, side_px: int) -> dict[str, float]:
    """Return the operations of one crop's forward pass: "blocks", which stochastic depth thins, and "embedding".

    Each token meets 4 D^2 weights of attention and 2 D h of an MLP (3 D h gated) in a block, and each pair of tokens
    2 D products (logits and values).

    Args:
        model: the geometry.
        side_px: side of the crop.
    """
    patches, tokens = (side_px // model.patch_px) ** 2, _tokens(model, side_px)
    weights = 4 * model.dim**2 + (2 if model.ffn == "mlp" else 3) * model.dim * model.hidden
    block = 2 * tokens * weights + 4 * tokens**2 * model.dim
    return {"blocks": model.depth * block, "embedding": 2 * patches * 3 * model.patch_px**2 * model.dim}


def masked_patches(config: PretrainConfig) -> float:
    """Return the expected patches that masks pick of one tile's two global crops; 0 without."""
    of = config.objective
    if of.method == "simclr" or not (of.ibot or of.jepa):
        return 0.0
    ratio = sum(of.mask_ratio) / 2
    return 2 * of.mask_share * ratio * (config.views.global_px // config.model.patch_px) ** 2


def _budget(config: PretrainConfig, seconds: float | None) -> Budget:
    """Return the budget by the limits whose length is known."""
    if seconds is not None or config.budget.hours is None:
        return config.resolve_budget(seconds)
    limits = {"steps": config.budget.steps, "images": config.budget.images}
    return resolve_budget(images_per_step=config.images_per_step, **limits)


def _parameters(config: PretrainConfig, guide: Guide | None = None) -> dict[str, int]:
    with torch.device("meta"):
        student = Student(config, {}, teacher_dim=1 if guide is None else guide.spec.width)
        if config.run.lora is not None:
            add_adapters(student.branch.encoder, config.run.lora)
    encoder = list(student.branch.encoder.parameters())
    trained = sum(p.numel() for p in encoder if p.requires_grad)
    heads = sum(p.numel() for p in student.parameters()) - sum(p.numel() for p in encoder)
    found = {"encoder": trained, "heads": heads}
    if config.run.lora is not None:
        found["frozen"] = sum(p.numel() for p in encoder) - trained
    return found if guide is None else {**found, "teacher": sum(p.numel() for p in guide.parameters())}


def _flops_per_image(config: PretrainConfig, batch: int, guide: Guide | None) -> dict[str, float]:
    of, views = config.objective, config.views
    whole, local = (_trained_flops(config, side) for side in (views.global_px, views.local_px))
    glob = sum(forward_flops(config.model, views.global_px).values()) + _adapter_flops(config, views.global_px)
    trained = 2 * _thinned(config, whole, 2 * batch)
    if views.local_crops:
        trained += views.local_crops * _thinned(config, local, views.local_crops * batch)
    teacher = 2 * glob if of.method == "dino" else 0.0
    found = {"teacher": teacher if guide is None else 2 * _guide_flops(config, guide), "student": trained}
    found["heads"] = _head_flops(config, guide)
    if of.method == "dino" and of.gram:
        patches = (views.global_px // config.model.patch_px) ** 2
        cosines = 2 * 2 * patches**2 * config.model.dim
        found["anchor"] = (1 - of.gram_start) * (2 * glob + (1 + BACKWARD) * cosines)
    return found


def _trained_flops(config: PretrainConfig, side_px: int) -> dict[str, float]:
    """Return the operations of one crop, forward and backward; of weights that stand still without their gradients."""
    forward = forward_flops(config.model, side_px)
    if config.run.lora is None:
        return {part: BACKWARD * flops for part, flops in forward.items()}
    model = config.model
    pairs = model.depth * 4 * _tokens(model, side_px) ** 2 * model.dim
    adapters = _adapter_flops(config, side_px)
    weights = forward["blocks"] - pairs
    # Nothing goes back through the queries, keys and values of the first block to the embedding.
    first = 2 * _tokens(model, side_px) * 3 * model.dim**2
    return {
        "blocks": FROZEN * weights - first + BACKWARD * (pairs + adapters),
        "embedding": forward["embedding"],
    }


def _adapter_flops(config: PretrainConfig, side_px: int) -> float:
    """Return the operations of the adapters of one crop's forward pass."""
    return 0.0 if config.run.lora is None else 2.0 * _tokens(config.model, side_px) * _parameters(config)["encoder"]


def _tokens(model: ModelConfig, side_px: int) -> int:
    return 1 + model.registers + (side_px // model.patch_px) ** 2


def _thinned(config: PretrainConfig, flops: dict[str, float], crops: int) -> float:
    """Return a training forward's operations, of which stochastic depth leaves out whole samples in each block."""
    rate = config.model.drop_path
    kept = max(int(crops * (1 - rate)), 1) / crops if rate else 1.0
    return flops["blocks"] * kept + flops["embedding"]


def _guide_flops(config: PretrainConfig, guide: Guide) -> float:
    """Return the operations of a frozen teacher's network for one global crop, as torch counts them."""
    side, at = config.views.global_px, next(guide.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        guide.backbone(torch.zeros(1, 3, side, side, device=at))
    put_away(guide)
    return float(counter.get_total_flops())


def _head_flops(config: PretrainConfig, guide: Guide | None) -> float:
    of, dim = config.objective, config.model.dim
    if of.method == "simclr":
        return BACKWARD * 2 * 2 * (dim * of.hidden + of.hidden * of.bottleneck)
    row = 2 * (dim * of.hidden + of.hidden**2 + of.hidden * of.bottleneck + of.bottleneck * of.prototypes)
    own = 1 if guide is None else 0  # a frozen teacher has heads of its own
    rows = (BACKWARD * (2 + config.views.local_crops) + 2 * own) if of.dino else 0
    masked = masked_patches(config)
    patch_rows = (BACKWARD + own) * masked if of.ibot else 0
    predictor = BACKWARD * masked * 2 * 2 * dim * of.hidden if of.jepa else 0
    total = (rows + patch_rows) * row + predictor
    if guide is None:
        return total
    for name, head in guide.heads.items():
        products = 2 * sum(p.numel() for key, p in head.named_parameters() if p.ndim == 2 and "_g" not in key)
        total += products * (2 if name == "dino" else masked)
    tokens = {"feature_cls": 2, "feature_patches": 2 * (config.views.global_px // config.model.patch_px) ** 2}
    regressed = sum(tokens[name] for name, weight in feature_weights(of).items() if weight)
    return total + BACKWARD * regressed * 2 * dim * guide.spec.width


def _memory(config: PretrainConfig, parameters: dict[str, int], batch: int, world: int) -> dict[str, float]:
    """Return bytes on one rank; weights, gradients and moments are float32."""
    of = config.objective
    with torch.device("meta"):
        teacher = sum(p.numel() for p in Branch(config).parameters())
    frozen, trained = parameters.get("frozen", 0), parameters["encoder"] + parameters["heads"]
    teacher += parameters["encoder"] if frozen else 0  # its adapters
    others = parameters["encoder"] + frozen if of.method == "dino" and of.gram else parameters.get("teacher", 0)
    ranks = world if config.run.shard else 1
    half = config.run.precision == "bf16"
    masked = masked_patches(config)
    views = 2 + config.views.local_crops
    student_rows = (views if of.dino else 0) + (masked if of.ibot else 0)
    teacher_rows = (2 if of.dino else 0) + (masked if of.ibot else 0)
    # In float32: of the student logits, log-probabilities and their gradient; of the teacher logits and targets.
    logits = batch * of.prototypes * 4 * (3 * student_rows + 2 * teacher_rows) if of.method != "simclr" else 0
    return {
        "weights": 4.0 * (trained + frozen + teacher + others) / ranks + (2.0 * (trained + frozen) if half else 0),
        "optimiser": 12.0 * trained / ranks,
        "activations": float(batch * _activations(config, batch, half)),
        "logits": float(logits),
    }


def _activations(config: PretrainConfig, batch: int, half: bool) -> float:
    """Return the bytes that the backward pass of the encoder keeps for one tile.

    Of each token and block: the inputs of both norms in float32, and with stochastic depth both branches; in the
    precision of the products the outputs of the norms, query, key and value, what attention gives and its copy, both
    branches before LayerScale, and the hidden layer before and after its non-linearity (gated: both halves, the gate's
    and the product). Beside the blocks: the crops, and the input of the last norm.
    """
    model, views = config.model, config.views
    size = 2 if half else 4
    full = (4 if model.drop_path else 2) * model.dim
    token = 4 * full + size * _kept_of_token(config)
    total = 0.0
    for crops, side in ((2, views.global_px), (views.local_crops, views.local_px)):
        if crops:
            kept = _thinned(config, {"blocks": 1.0, "embedding": 0.0}, crops * batch)
            tokens = 1 + model.registers + (side // model.patch_px) ** 2
            total += crops * (tokens * (kept * token * model.depth + 4 * model.dim) + size * 3 * side**2)
            if config.run.lora is not None:  # nothing goes back to the embedding: no crop, nor the first norm's input
                total -= crops * (tokens * kept * 4 * model.dim + size * 3 * side**2)
    return total


def _kept_of_token(config: PretrainConfig) -> int:
    """Return how many numbers in the precision of the products a block keeps of a token.

    A linear that stands still needs no input of its own, and its LayerScale no branch: what adapters see is kept.
    """
    model, lora = config.model, config.run.lora
    rotated = 2 * model.dim if model.position == "rope" else 0
    if lora is None:
        return 9 * model.dim + (2 if model.ffn == "mlp" else 4) * model.hidden + rotated
    seen = [model.dim] * bool({"q", "k", "v"} & set(lora.targets)) + [model.dim] * ("proj" in lora.targets)
    seen += [model.dim, model.hidden] if "mlp" in lora.targets else []
    return sum(seen) + 4 * model.dim + (1 if model.ffn == "mlp" else 3) * model.hidden + rotated


def _parts(parts: dict[str, int] | dict[str, float], unit: float, name: str) -> str:
    return ", ".join(f"{key} {value / unit:.3g}{name and ' ' + name}" for key, value in parts.items())
