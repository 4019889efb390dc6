from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eosin.errors import ConfigError
from eosin.pretrain.config import PretrainConfig, parse_config
from eosin.pretrain.lora import add_adapters
from eosin.pretrain.masking import block_masks
from eosin.pretrain.model import PRESETS, VisionTransformer
from eosin.pretrain.objective import Branch, Crops, Student
from eosin.pretrain.planner import forward_flops, masked_patches, plan

RECIPE = {"data": {"paths": ["slides"]}, "budget": {"steps": 10}}


def make(model: dict[str, Any], **sections: dict[str, Any]) -> PretrainConfig:
    return parse_config({**RECIPE, "model": model, "run": {"batch": 4, "precision": "fp32"}, **sections})


def tiny(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> PretrainConfig:
    heads = {"prototypes": 512, "hidden": 128, "bottleneck": 64, "koleo": 0.0, **sections.pop("objective", {})}
    views = {"global_px": 96, "local_px": 48}
    return make({"preset": "tiny", "depth": 3, **(model or {})}, objective=heads, views=views, **sections)


def crops_of(config: PretrainConfig) -> Crops:
    """Return random crops of one micro-step, with masks of an exact count."""
    batch, views = config.run.batch, config.views
    random, grid = torch.Generator().manual_seed(0), views.global_px // config.model.patch_px
    masks = block_masks(2 * batch, grid, exact=True, generator=random)
    sizes = [(2 * batch, views.global_px), (views.local_crops * batch, views.local_px)]
    images = [torch.rand(count, 3, side, side, generator=random) for count, side in sizes]
    return Crops(images, masks, masks.flatten().nonzero().flatten(), {})


@pytest.mark.parametrize(
    ("preset", "patch_px", "registers", "drop", "tflop"),
    [
        ("small", 14, 0, 0.0, (0.17, 0.17)),
        ("base", 14, 0, 0.0, (0.59, 0.59)),
        ("large", 14, 0, 0.0, (2.0, 2.0)),
        ("large", 16, 0, 0.3, (1.15, 1.15)),
        ("large", 14, 0, 0.4, (1.38, 1.38)),
        ("huge_plus", 16, 4, 0.3, (3.3, 3.3)),
        ("giant", 14, 0, 0.4, (5.0, 5.2)),
    ],
)
def test_the_cost_of_an_image_is_that_of_the_reference(
    preset: str, patch_px: int, registers: int, drop: float, tflop: tuple[float, float]
) -> None:
    """The project's table of published recipes: 224 px global, 98 (or 96) px local crops, 65,536-131,072 prototypes."""
    config = make(
        {"preset": preset, "patch_px": patch_px, "registers": registers, "drop_path": drop},
        views={"global_px": 224, "local_px": 98 if patch_px == 14 else 96},
        run={"batch": 100},
    )
    found = sum(plan(config).flops_per_image.values()) / 1e12
    assert tflop[0] * 0.95 < found < tflop[1] * 1.05


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_forward_flops_of_every_preset_are_torchs(name: str) -> None:
    """Torch counts the products of a meta forward; ours is a formula of the geometry."""
    config = PRESETS[name]
    side = 6 * config.patch_px
    with torch.device("meta"):
        net = VisionTransformer(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net([torch.empty(2, 3, side, side)])
    assert counter.get_total_flops() == 2 * sum(forward_flops(config, side).values())


@pytest.mark.parametrize("model", [{}, {"ffn": "swiglu"}, {"position": "rope"}, {"drop_path": 0.25}], ids=str)
def test_a_step_costs_what_torch_counts(model: dict[str, Any]) -> None:
    config = tiny(model)
    crops, found, batch = crops_of(config), plan(config).flops_per_image, config.run.batch
    masked = int(crops.hidden.sum())  # the formula has the expected count, a batch has its own
    row = 2 * (192 * 128 + 128 * 128 + 128 * 64 + 64 * 512)
    expected_rows = 2 + masked_patches(config) + 3 * (10 + masked_patches(config))
    assert found["heads"] == pytest.approx(expected_rows * row)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Branch(config).eval()(crops.images[:1], None, crops.places, batch)
    assert counter.get_total_flops() == pytest.approx(batch * (found["teacher"] + 2 * row) + masked * row)
    with FlopCounterMode(display=False) as counter:
        Student(config, {})(crops, 0.0, None)
    assert counter.get_total_flops() == pytest.approx(batch * (found["student"] / 3 + 10 * row) + masked * row)


def test_masked_patches_are_what_masks_have() -> None:
    config = tiny()
    config = parse_config({**config.to_dict(), "views": {"global_px": 224}})
    counts = [
        int(block_masks(64, 14, generator=torch.Generator().manual_seed(s)).sum()) / 32 for s in range(20)
    ]  # fmt: skip
    assert masked_patches(config) == pytest.approx(sum(counts) / 20, rel=0.03)


def student_of(config: PretrainConfig) -> Student:
    student = Student(config, {})
    if config.run.lora is not None:
        add_adapters(student.branch.encoder, config.run.lora)
    return student


def kept_bytes(config: PretrainConfig, *, heads: bool = True) -> int:
    """Return the bytes that a student's forward keeps for its backward, weights not counted."""
    student, crops = student_of(config), crops_of(config)
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    half = config.run.precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        if heads:
            student(crops, 0.0, None)
        else:
            student.branch.encoder(crops.images, [crops.hidden, None])
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("model", [{}, {"ffn": "swiglu"}, {"position": "rope"}, {"drop_path": 0.25}], ids=str)
def test_activations_are_what_autograd_keeps(model: dict[str, Any]) -> None:
    config = tiny(model)
    assert plan(config).memory["activations"] == pytest.approx(kept_bytes(config), rel=0.03)


ADAPTERS = [["q", "v"], ["q", "k", "v", "proj"], ["q", "k", "v", "proj", "mlp"]]


@pytest.mark.parametrize("targets", ADAPTERS, ids="-".join)
@pytest.mark.parametrize("model", [{}, {"ffn": "swiglu"}, {"position": "rope"}, {"drop_path": 0.25}], ids=str)
def test_adapters_keep_and_cost_what_is_planned(model: dict[str, Any], targets: list[str]) -> None:
    """Against autograd and torch's count of a step forward and backward.

    The plan leaves out the zeros that `LowRank` multiplies between the blocks of one linear: 3 % at this tiny width.
    """
    lora = {"lora_rank": 4, "lora_targets": targets, "weights": "any"}
    config = tiny(model, run={"batch": 4, "precision": "fp32", **lora})
    found, plain = plan(config), plan(tiny(model))
    assert found.memory["activations"] == pytest.approx(kept_bytes(config, heads=False), rel=0.04)
    assert found.memory["activations"] < plain.memory["activations"]
    student, crops, row = student_of(config), crops_of(config), 2 * (192 * 128 + 128 * 128 + 128 * 64 + 64 * 512)
    with FlopCounterMode(display=False) as counter:
        seen, _ = student(crops, 0.0, None)
        (sum(logits.sum() for logits in seen.logits) + seen.masked_logits.sum()).backward()
    heads = 3 * (10 * config.run.batch + int(crops.hidden.sum())) * row
    expected = config.run.batch * found.flops_per_image["student"] + heads
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.04)


def test_only_what_trains_has_moments() -> None:
    config = tiny(run={"batch": 4, "precision": "fp32", "lora_rank": 4, "weights": "any"})
    found, student = plan(config), student_of(config)
    trained = [p for p in student.parameters() if p.requires_grad]
    adapters, dim, depth = found.parameters["encoder"], 192, 3
    assert adapters == depth * 2 * 4 * (dim + dim)
    assert sum(p.numel() for p in trained) == adapters + found.parameters["heads"]
    assert found.parameters["frozen"] == plan(tiny()).parameters["encoder"]
    assert found.memory["optimiser"] == 12 * (adapters + found.parameters["heads"])
    assert found.memory["weights"] == 2 * sum(p.nbytes for p in student.parameters())
    assert "frozen" in str(found)


def test_half_precision_keeps_what_is_planned() -> None:
    """The copies of the weights that autocast makes are kept too; the plan has them among the weights."""
    config = tiny(run={"batch": 4, "precision": "bf16"})
    found = plan(config)
    copies = 2 * sum(found.parameters.values())
    assert found.memory["activations"] + copies == pytest.approx(kept_bytes(config), rel=0.08)


def test_parameters_and_states_are_counted_exactly() -> None:
    config = tiny()
    student, found = Student(config, {}), plan(config)
    encoder = sum(p.numel() for p in student.branch.encoder.parameters())
    total = sum(p.numel() for p in student.parameters())
    assert found.parameters == {"encoder": encoder, "heads": total - encoder}
    optimizer = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    gradients = sum(p.grad.nbytes for p in student.parameters() if p.grad is not None)
    assert found.memory["optimiser"] == moments + gradients
    assert found.memory["weights"] == 2 * sum(p.nbytes for p in student.parameters())


def test_sharding_shares_the_states_and_not_the_activations() -> None:
    config = tiny(run={"batch": 8, "precision": "fp32", "shard": True})
    one, four = plan(config), plan(config, world=4)
    for part in ("weights", "optimiser"):
        assert four.memory[part] == pytest.approx(one.memory[part] / 4)
    assert (four.batch_of_rank, four.memory["activations"]) == (2, pytest.approx(one.memory["activations"] / 4))
    replicated = plan(tiny(run={"batch": 8, "precision": "fp32"}), world=4)
    assert replicated.memory["optimiser"] == one.memory["optimiser"]
    with pytest.raises(ConfigError, match="must be a multiple of the 3 ranks"):
        plan(config, world=3)


def test_hours_come_from_a_measured_step_or_a_stated_rate() -> None:
    config = tiny(budget={"images": 4000})
    assert plan(config).hours is None
    assert plan(config, seconds_per_step=3.6).hours == pytest.approx(1.0)
    rated = plan(config, tflops=0.01, world=2)
    assert rated.hours == pytest.approx(rated.flops / 2e10 / 3600)
    assert "0.01 TFLOP/s on each of 2 devices, as stated" in str(rated)
    timed = tiny(budget={"hours": 1.0})
    assert (plan(timed).budget, plan(timed).flops) == (None, None)
    assert plan(timed, seconds_per_step=3.6).budget.steps == 1000
    both = plan(tiny(budget={"hours": 1.0, "steps": 50}))
    assert both.budget.steps == 50
    with pytest.raises(ConfigError, match=r"tflops is -1\.0; it must be above 0"):
        plan(config, tflops=-1.0)


@pytest.mark.parametrize(
    ("objective", "more"),
    [({"gram": 2.0}, {"anchor"}), ({"method": "simclr"}, set()), ({"ibot": 0.0, "jepa": 1.0}, set())],
    ids=["gram", "simclr", "jepa"],
)
def test_other_objectives_are_planned(objective: dict[str, Any], more: set[str]) -> None:
    found = plan(tiny(objective=objective))
    assert set(found.flops_per_image) == {"teacher", "student", "heads"} | more
    assert (found.flops_per_image["teacher"] == 0) == (objective.get("method") == "simclr")
    assert found.flops_per_image["heads"] > 0
    assert json.loads(json.dumps(found.to_dict()))["flops"] == found.flops
    assert all(value != "" for value in str(found).splitlines())


def test_a_gram_anchor_is_counted_for_its_share_of_the_run() -> None:
    without = plan(tiny())
    half, quarter = (
        plan(tiny(objective={"gram": 2.0, "gram_start": s})).flops_per_image["anchor"] for s in (0.5, 0.75)
    )
    assert half == pytest.approx(2 * quarter)
    assert half > 0.5 * without.flops_per_image["teacher"]
