from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from trainer_runs import crops_of, small, source, texture, write_tiles

import eosin
from eosin.encoders.checkpoints import read_facts
from eosin.errors import ConfigError, WeightsError
from eosin.pretrain import engine, losses
from eosin.pretrain.config import PretrainConfig, parse_config
from eosin.pretrain.export import encoder_facts, export_encoder
from eosin.pretrain.guide import Guide, Standardiser, feature_loss, load_guide
from eosin.pretrain.heads import ProjectionHead
from eosin.pretrain.layouts import save_encoder
from eosin.pretrain.model import ModelConfig, VisionTransformer
from eosin.pretrain.planner import plan
from eosin.pretrain.schedules import step_values
from eosin.pretrain.trainer import Outcome, pretrain
from eosin.pretrain.watch import target_monitors

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"device": "cpu", "precision": "fp32", "backend": "torch"}
BIG = ModelConfig(dim=128, depth=2, heads=2, patch_px=8, position_grid=4, registers=0, layer_scale=1.0)
FEATURES = {"cls": 1.0, "patches": 0.5}


def network(config: ModelConfig, seed: int = 0) -> VisionTransformer:
    """Return a random network whose blocks do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionTransformer(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("weight") and p.ndim > 1:
                p.mul_(3)
    return model


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles") / "tiles.npy", 64)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("teacher") / "big.safetensors", network(BIG).state_dict(), BIG)


def distil(tiles: Path, teacher: Path | str, **changes: Any) -> PretrainConfig:
    settings = {"objective__method": "distil", "run__teacher": str(teacher), "model__drop_path": 0.0, **changes}
    return small(tiles, **settings)


def build(config: PretrainConfig, steps: int = 4) -> engine.Engine:
    with torch.random.fork_rng():
        return engine.build(config, classes={}, steps=steps, device=CPU)


def run(config: PretrainConfig, out: Path, **more: Any) -> Outcome:
    return pretrain(config, out, device="cpu", source=source(config), **more)


# Standardised tokens, and distances to them.


def test_standardised_tokens_have_the_moments_of_all_rows_so_far() -> None:
    random = np.random.default_rng(0)
    batches = [random.normal(1e4, [1e-2, 1.0, 5.0], (rows, 3)) for rows in (2, 7, 1, 40)]
    ours = Standardiser(3)
    for i, batch in enumerate(batches):
        given = torch.from_numpy(batch)
        found = ours(given)
        seen = np.concatenate(batches[: i + 1])
        expected = (batch - seen.mean(axis=0)) / seen.std(axis=0)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert float(ours.count) == 50
    assert torch.equal(Standardiser(2)(torch.ones(3, 2)), torch.zeros(3, 2))


def test_distances_are_what_they_are_called() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    assert float(feature_loss(a, 7 * a, distance="cosine")) == pytest.approx(0, abs=1e-6)
    assert float(feature_loss(a, -a, distance="cosine")) == pytest.approx(2)
    assert float(feature_loss(a[:2], a[:2].flip(1), distance="cosine")) == pytest.approx(1)
    d = torch.tensor([[0.5, -3.0]])
    assert float(feature_loss(d, torch.zeros(1, 2), distance="smooth_l1")) == pytest.approx((0.125 + 2.5) / 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert feature_loss(a.bfloat16(), a, distance="cosine").dtype == torch.float32
    with pytest.raises(ValueError, match="must be \\(rows, D\\) alike"):
        feature_loss(a, a[:2], distance="cosine")


def test_codes_of_random_directions_are_as_far_apart_as_their_tokens() -> None:
    """softmax(z w / T) over many w ~ N(0, I / b) is N(z / (T b), I / b): their divergence is |z - z'|^2 / (2 b T^2)."""
    torch.manual_seed(0)
    head = ProjectionHead(32, hidden=1, bottleneck=64, prototypes=20_000, layers=1)
    tokens, temperature = torch.randn(6, 32), 0.4
    with torch.no_grad():
        logits = head(tokens) / temperature
        z = functional.normalize(head.mlp(tokens), dim=-1)
    a, b = logits[:3].log_softmax(-1), logits[3:].log_softmax(-1)
    found = (a.exp() * (a - b)).sum(-1)
    expected = (z[:3] - z[3:]).square().sum(-1) / (2 * 64 * temperature**2)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


# The teacher.


def test_the_teacher_sees_the_views_in_its_own_colours(tiles: Path, tmp_path: Path) -> None:
    config = small(
        tiles, views__mean=[0.7, 0.5, 0.6], views__std=[0.2, 0.25, 0.3],
        model__dim=BIG.dim, model__heads=BIG.heads, model__registers=0,
    )  # fmt: skip
    model = network(BIG)
    facts = encoder_facts(config, mpp=(), step=0)
    path = export_encoder(tmp_path / "own.safetensors", model.state_dict(), config, facts)
    theirs = distil(tiles, path)  # ImageNet's colours
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (theirs.views.mean, theirs.views.std))
    own = [torch.tensor(v)[:, None, None] for v in (config.views.mean, config.views.std)]
    guide = load_guide(theirs, 0)
    tokens = guide.backbone(((pixels - mean) / std) * guide.scale + guide.shift)
    with torch.no_grad():
        expected = model([(pixels - own[0]) / own[1]])[0]
    torch.testing.assert_close(tokens.cls, expected.cls, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected.patches, rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch_px", [4, 8, 16])
def test_the_teachers_grid_becomes_the_students(tiles: Path, tmp_path: Path, patch_px: int) -> None:
    config = ModelConfig(dim=64, depth=1, heads=1, patch_px=patch_px, position_grid=32 // patch_px, layer_scale=1.0)
    model = network(config)
    path = save_encoder(tmp_path / "other.safetensors", model.state_dict(), config)
    guide = load_guide(distil(tiles, path), 0)
    views = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = guide(views, None)
    with torch.no_grad():
        patches = model([views])[0].patches
    expected = losses.resize_patches(patches, 4) if patch_px != 8 else patches
    expected = expected.flatten(0, 1).numpy()
    expected = (expected - expected.mean(axis=0)) / expected.std(axis=0)
    assert seen.patches.shape == (5, 16, 64)
    np.testing.assert_allclose(seen.patches.flatten(0, 1).numpy(), expected, atol=2e-3)


def test_a_student_of_half_the_grid_learns(tiles: Path, tmp_path: Path) -> None:
    config = ModelConfig(dim=64, depth=1, heads=1, patch_px=16, position_grid=2, layer_scale=1.0)
    path = save_encoder(tmp_path / "coarse.safetensors", network(config).state_dict(), config)
    made = build(distil(tiles, path, objective__features=FEATURES))
    stepped = engine.optimiser_step(made, 0, lambda i: crops_of(made.config, i))
    assert set(stepped.parts) == {"dino", "ibot", "kde", "feature_cls", "feature_patches", "total"}


# What is learned, written out again.


def by_hand(made: engine.Engine, crops: Any, temperature: float) -> dict[str, Tensor]:
    """Return the parts of the loss of a first micro-step, from the networks and heads alone."""
    of, guide = made.config.objective, made.guide
    assert guide is not None
    encoder, student = eosin.load_encoder(str(made.config.run.teacher), **PLAIN), made.student.branch
    seen = encoder(crops.images[0])
    tokens = {"cls": seen.cls.numpy(), "patches": seen.patches.flatten(0, 2).numpy()}
    even = {k: torch.from_numpy((t - t.mean(axis=0)) / t.std(axis=0)) for k, t in tokens.items()}
    ours = student.encoder(crops.images)
    parts: dict[str, Tensor] = {}

    def code(name: str, rows: Tensor) -> Tensor:
        head = guide.heads[name]
        z = functional.normalize(rows @ head.mlp.weight.T + head.mlp.bias, dim=1)
        return losses.sinkhorn_knopp(z @ functional.normalize(head.last_layer.weight_v, dim=1).T, temperature)

    if of.dino:
        first, second = code("dino", even["cls"]).chunk(2)
        logits = [student.dino(crop) / 0.1 for tokens in ours for crop in tokens.cls.split(made.config.run.batch)]
        pairs = [(0, second), (1, first), *((i, t) for i in range(2, len(logits)) for t in (first, second))]
        parts["dino"] = torch.stack([functional.cross_entropy(logits[i], t) for i, t in pairs]).mean()
    if of.ibot:
        masks, at = crops.hidden, 0
        targets, whole = code("ibot", even["patches"][crops.places]), torch.zeros(())
        for crop, mask in zip(ours[0].patches, masks, strict=True):
            if count := int(mask.sum()):
                whole = whole + functional.cross_entropy(student.ibot(crop[mask]) / 0.1, targets[at : at + count])
                at += count
        parts["ibot"] = whole / len(masks)
    for name, rows, target in (
        ("feature_cls", ours[0].cls, even["cls"]),
        ("feature_patches", ours[0].patches.flatten(0, 1), even["patches"]),
    ):
        if name in made.student.own:
            layer = made.student.own[name]
            a, b = rows @ layer.weight.T + layer.bias, target
            if of.features is not None and of.features.distance == "cosine":
                parts[name] = (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
            else:
                gap = (a - b).abs()
                parts[name] = torch.where(gap < 1, gap.square() / 2, gap - 0.5).mean()
    return parts


@pytest.mark.parametrize(
    ("dino", "ibot", "features"),
    [
        (1.0, 1.0, None),
        (0.5, 0.0, None),
        (0.0, 2.0, None),
        (0.0, 0.0, {"cls": 1.0, "patches": 0.0}),
        (0.0, 0.0, {"cls": 0.0, "patches": 3.0, "distance": "smooth_l1"}),
        (0.3, 0.7, {"cls": 1.5, "patches": 0.25, "distance": "smooth_l1"}),
        (0.3, 0.7, {"cls": 1.5, "patches": 0.25}),
    ],
)
def test_parts_and_their_sum_are_those_written_out(
    tiles: Path, teacher: Path, dino: float, ibot: float, features: dict[str, Any] | None
) -> None:
    """The teacher sees whole global crops, the student whole crops; nothing else enters."""
    config = distil(
        tiles, teacher, objective__dino=dino, objective__ibot=ibot, objective__features=features, objective__kde=0.0
    )
    made, crops = build(config), crops_of(config)
    values = step_values(0, config.schedule, lr=config.lr, steps=4)
    expected = by_hand(build(config), crops, values.temperature)
    found, watched, targets = engine._micro_step(made, 0, 0, values, crops)
    weights = {"dino": dino, "ibot": ibot}
    weights |= {f"feature_{name}": (features or {}).get(name, 0.0) for name in ("cls", "patches")}
    assert set(found) == {name for name, weight in weights.items() if weight} | {"total"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    total = sum(weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(found["total"], total, rtol=1e-4, atol=1e-5)
    assert set(targets) == {name for name in ("dino", "ibot") if weights[name]}
    assert watched.cls.shape == (8, 64)  # the student is watched


def test_the_teacher_stands_still_and_the_average_of_the_student_comes_out(tiles: Path, teacher: Path) -> None:
    config = distil(tiles, teacher, objective__features=FEATURES, schedule__warmup=0.0)
    made = build(config)
    assert made.guide is not None
    still = {name: p.clone() for name, p in made.guide.named_parameters()}
    old = {name: p.clone() for name, p in made.teacher.named_parameters()}
    stepped = engine.optimiser_step(made, 0, lambda i: crops_of(config, i))
    assert all(torch.equal(p, still[name]) for name, p in made.guide.named_parameters())
    assert not any(p.requires_grad for p in made.guide.parameters())
    for name, p in made.student.branch.named_parameters():
        expected = torch.lerp(old[name], p.detach(), 1 - stepped.values.momentum)
        torch.testing.assert_close(made.teacher.get_parameter(name), expected, rtol=0, atol=1e-7)
    assert set(stepped.norms) == {"encoder", "dino", "ibot", "feature_cls", "feature_patches"}
    assert all(float(norm) > 0 for norm in stepped.norms.values())


# Trained heads.


def test_heads_come_with_the_run_that_trained_them(tiles: Path, tmp_path: Path) -> None:
    big = run(small(tiles, model__dim=128, model__heads=2, model__drop_path=0.0), tmp_path / "big")
    state = load_file(big.out / "checkpoints" / "step-00000004" / "tensors.safetensors")
    trained = build(small(tiles, model__dim=128, model__heads=2)).teacher
    trained.load_state_dict({k.removeprefix("teacher/"): v for k, v in state.items() if k.startswith("teacher/")})
    config = distil(tiles, big.out)
    crops = crops_of(config)
    seen = load_guide(config, 0)(crops.images[0], crops.places)
    with torch.no_grad():
        expected = trained(crops.images[:1], None, crops.places, 4)
    torch.testing.assert_close(seen.logits["dino"], torch.cat(expected.logits), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.logits["ibot"], expected.masked_logits, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"objective\.prototypes is 32; .*big has heads of 64: set that"):
        load_guide(distil(tiles, big.out, objective__prototypes=32), 0)
    theirs = {f"backbone.{k}": v for k, v in trained.encoder.state_dict().items()}
    theirs |= {
        f"{name}_head.{k}": v for name in ("dino", "ibot") for k, v in getattr(trained, name).state_dict().items()
    }
    torch.save({"teacher": theirs}, tmp_path / "teacher_checkpoint.pth")  # as DINOv2 writes it
    again = load_guide(distil(tiles, tmp_path / "teacher_checkpoint.pth"), 0)(crops.images[0], crops.places)
    torch.testing.assert_close(again.logits["dino"], seen.logits["dino"], rtol=0, atol=1e-5)
    del theirs["dino_head.mlp.2.weight"]
    torch.save({"teacher": theirs}, tmp_path / "half.pth")
    with pytest.raises(WeightsError, match=r"the dino head of .*half\.pth does not fit: mlp"):
        load_guide(distil(tiles, tmp_path / "half.pth"), 0)
    (big.out / "encoders" / "step-00000004.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds a run without a checkpoint and its encoder"):
        load_guide(config, 0)


def test_random_heads_follow_the_seed(tiles: Path, teacher: Path) -> None:
    one, same = (load_guide(distil(tiles, teacher), 3) for _ in range(2))
    other = load_guide(distil(tiles, teacher), 4)
    prototypes = [guide.heads["dino"].last_layer.weight_v for guide in (one, same, other)]
    assert torch.equal(prototypes[0], prototypes[1])
    assert not torch.equal(prototypes[0], prototypes[2])
    assert not torch.equal(prototypes[0], one.heads["ibot"].last_layer.weight_v)


def test_standardised_tokens_say_more_through_random_heads(tiles: Path, teacher: Path) -> None:
    """What tells images apart is a small share of a token."""
    config = distil(tiles, teacher, run__batch=32)
    guide, views = load_guide(config, 0), crops_of(config).images[0]
    told = []
    for trained in (False, True):  # True leaves the tokens as they are
        guide.trained = trained
        logits = guide(views, None).logits["dino"]
        told.append(target_monitors((logits / 0.1).softmax(-1))["information"])
    assert told[0] > 2 * told[1]


# A run.


@pytest.mark.slow
def test_stopped_and_resumed_is_bit_by_bit_the_same(tiles: Path, teacher: Path, tmp_path: Path) -> None:
    config = distil(tiles, teacher, objective__features=FEATURES, objective__centring="ema", budget__steps=5)
    whole = run(config, tmp_path / "whole")

    def stop(status: Any) -> None:
        if status.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    run(config, tmp_path / "parts", progress=stop)
    rest = run(config, tmp_path / "parts")
    assert (rest.finished, rest.resumed_from) == (True, 3)
    found = [load_file(one.out / "checkpoints" / "step-00000005" / "tensors.safetensors") for one in (whole, rest)]
    assert found[0].keys() == found[1].keys()
    assert [name for name, value in found[0].items() if not torch.equal(value, found[1][name])] == []
    assert float(found[0]["moments/cls.count"]) == 5 * 8
    assert not any(name.startswith("guide") for name in found[0])
    record = json.loads((whole.out / "run.json").read_text())
    assert record["teacher"]["name"] == "big"
    assert record["teacher"]["weights_hash"] == eosin.load_encoder(teacher, **PLAIN).spec.weights_hash
    assert eosin.load_encoder(whole.encoder or Path(), **PLAIN).spec.dim == 64
    assert read_facts(whole.encoder or Path())["teacher"] == str(teacher)
    assert "Distilled from" in whole.report.read_text()


def test_another_teacher_of_the_same_name_is_refused(tiles: Path, tmp_path: Path) -> None:
    path = save_encoder(tmp_path / "mine.safetensors", network(BIG).state_dict(), BIG)
    config = distil(tiles, path, objective__ibot=0.0)

    def stop(status: Any) -> None:
        if status.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run(config, tmp_path / "out", progress=stop)
    save_encoder(path, network(BIG, seed=1).state_dict(), BIG)
    with pytest.raises(ConfigError, match=r"mine\.safetensors has weights .* was begun with .*; put the old ones back"):
        run(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run__teacher": None}, r"objective\.method is 'distil' and run\.teacher not given"),
        ({"objective__method": "dino"}, r"objective\.method is 'dino' and run\.teacher big\.safetensors"),
        ({"objective__dino": 0.0, "objective__ibot": 0.0}, r"there is no table features; one of them must teach"),
        ({"objective__jepa": 1.0}, "jepa and gram learn from an average of the student itself"),
        ({"objective__gram": 1.0}, "jepa and gram learn from an average of the student itself"),
        ({"objective__features": {"cls": 0.0, "patches": 0.0}}, r"cls and patches are both 0"),
        ({"objective__features": {"cls": -1.0}}, r"objective\.features\.cls is -1\.0; it must be 0 or more"),
        ({"objective__features": {"distance": "l2"}}, r"features\.distance is \"l2\"; it must be one of 'cosine'"),
        (
            {"objective__method": "dino", "run__teacher": None, "objective__features": {}},
            'learned with method = "distil"',
        ),
    ],
)
def test_settings_that_cannot_be(tiles: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        distil(tiles, "big.safetensors", **changes)


def test_teachers_that_do_not_fit_say_so(tiles: Path, teacher: Path, tmp_path: Path) -> None:
    odd = ModelConfig(dim=64, depth=1, heads=1, patch_px=14, position_grid=4)
    path = save_encoder(tmp_path / "odd.safetensors", network(odd).state_dict(), odd)
    words = r"views\.global_px is 32; the teacher odd has patches of 14 px and the student of 8: take a multiple of 56"
    with pytest.raises(ConfigError, match=words):
        load_guide(distil(tiles, path), 0)
    with pytest.raises(WeightsError, match=r"run\.teacher is 'texture', which has no network to learn from"):
        load_guide(distil(tiles, "texture"), 0)
    state = load_file(teacher)
    del state["blocks.1.norm2.weight"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(WeightsError, match=r"half.*missing.*norm2"):
        load_guide(distil(tiles, tmp_path / "half.pth"), 0)
    with pytest.raises(ConfigError, match=r"run\.batch is 1; Sinkhorn-Knopp"):
        run(distil(tiles, teacher, run__batch=1, objective__kde=0.0), tmp_path / "out")


# What it costs.


def test_the_plan_counts_the_teacher(tiles: Path, teacher: Path) -> None:
    config = distil(tiles, teacher, objective__features=FEATURES, views__global_px=32)
    made, found = build(config), plan(config)
    assert isinstance(made.guide, Guide)
    assert found.parameters == {
        "encoder": sum(p.numel() for p in made.student.branch.encoder.parameters()),
        "heads": sum(
            p.numel() for name, m in made.student.parts().items() if name != "encoder" for p in m.parameters()
        ),
        "teacher": sum(p.numel() for p in made.guide.parameters()),
    }
    of_average = 4 * sum(p.numel() for p in made.teacher.parameters())
    of_student = 4 * sum(p.numel() for p in made.student.parameters())
    assert found.memory["weights"] == of_student + of_average + 4 * found.parameters["teacher"]
    crops, batch = crops_of(config), config.run.batch
    rows = [2 * (128 * 16 + 16 * 64)] * 2  # of the random heads
    with FlopCounterMode(display=False) as counter:
        made.guide(crops.images[0], crops.places)
    masked = int(crops.hidden.sum())
    counted = batch * found.flops_per_image["teacher"] + 2 * batch * rows[0] + masked * rows[1]
    assert counter.get_total_flops() == pytest.approx(counted)
    more = plan(config).flops_per_image["heads"] - plan(distil(tiles, teacher)).flops_per_image["heads"]
    assert more == 3 * (2 + 2 * 16) * 2 * 64 * 128
    assert plan(config, guide=made.guide) == found


def test_a_teacher_known_by_name_is_planned_without_its_weights(tiles: Path) -> None:
    config = distil(tiles, "dinov2-vitl14-reg", model__patch_px=14, views__global_px=224, views__local_px=98)
    config = parse_config({**config.to_dict(), "data": {**config.to_dict()["data"], "sample": {"tile_px": 256}}})
    found = plan(config)
    positions = (37**2 - 16**2) * 1024  # released at 518 px
    heads = 2 * (1024 * 16 + 16 + 64 * 17)
    assert found.parameters["teacher"] == pytest.approx(304.37e6 - positions + heads, rel=1e-4)
    tokens = 1 + 4 + 256  # two crops, 24 blocks: 12 D^2 weights and two products of all pairs
    blocks = 24 * (2 * tokens * 12 * 1024**2 + 4 * tokens**2 * 1024)
    assert found.flops_per_image["teacher"] == pytest.approx(2 * (blocks + 2 * 256 * 3 * 14**2 * 1024), rel=1e-3)


# Does it work?


def cka(a: np.ndarray, b: np.ndarray) -> float:
    """Return linear CKA of two sets of features (Kornblith et al. 2019, equation 5)."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    cross = np.linalg.norm(a.T @ b) ** 2
    return float(cross / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)))


def shared_neighbours(a: np.ndarray, b: np.ndarray, k: int = 5) -> float:
    """Return the share of each row's k nearest others that both feature spaces agree on."""
    near = []
    for x in (a, b):
        x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        similarity = x @ x.T
        np.fill_diagonal(similarity, -np.inf)
        near.append(np.argsort(-similarity, axis=1)[:, :k])
    return float(np.mean([len(set(one) & set(two)) / k for one, two in zip(*near, strict=True)]))


def even_tiles(path: Path, count: int, seed: int) -> Path:
    """Write textures without the colours by which already random networks agree."""
    random = np.random.default_rng(seed)
    pixels = np.stack([texture(i % 4, random) for i in range(count)]).astype(float)
    pixels = (pixels - pixels.mean(axis=(1, 2), keepdims=True)) / pixels.std(axis=(1, 2), keepdims=True)
    np.save(path, np.clip(128 + 40 * pixels, 0, 255).astype(np.uint8))
    return path


@pytest.mark.slow
def test_a_student_comes_to_see_as_its_teacher_does(teacher: Path, tmp_path: Path) -> None:
    """More than the same student trained as long without the teacher, by CKA and by shared neighbours."""
    steps, tiles = 100, even_tiles(tmp_path / "even.npy", 96, seed=0)
    common = {
        "run__batch": 16, "run__seed": 1, "model__layer_scale": 1.0, "optimizer__lr": 1e-3, "objective__kde": 0.0,
        "schedule__momentum": [0.9, 1.0], "views__jitter": 0.0, "views__stain_probability": 0.0, "views__grey": 0.0,
        "views__blur": [0.0, 0.0, 0.0], "views__global_scale": [0.5, 1.0],
    }  # fmt: skip
    alone = small(tiles, model__drop_path=0.0, **common)
    code = distil(tiles, teacher, **common)
    regressed = distil(tiles, teacher, **common, objective__features=FEATURES, objective__dino=0.0, objective__ibot=0.0)
    held = np.load(even_tiles(tmp_path / "held.npy", 80, seed=9))[:, 4:36, 4:36]
    mean, std = alone.views.mean, alone.views.std
    images = torch.from_numpy((held / 255 - mean) / std).float().permute(0, 3, 1, 2)
    wanted = eosin.load_encoder(teacher, **PLAIN)(images).cls.numpy()

    def agreement(made: engine.Engine) -> tuple[float, float]:
        with torch.no_grad():
            ours = made.teacher.encoder([images])[0].cls.numpy()
        return cka(ours, wanted), shared_neighbours(ours, wanted)

    found = {"untrained": agreement(build(alone, steps))}
    for name, config in (("alone", alone), ("code", code), ("features", regressed)):
        made = build(config, steps)
        for step in range(steps):
            engine.optimiser_step(made, step, lambda i, c=config: crops_of(c, i))
        found[name] = agreement(made)
    control = np.maximum(found["untrained"], found["alone"])
    assert found["features"][0] > control[0] + 0.15, found
    assert found["features"][1] > control[1] + 0.12, found
    assert found["code"][0] > found["alone"][0], found
    assert found["code"][1] > control[1] + 0.06, found
