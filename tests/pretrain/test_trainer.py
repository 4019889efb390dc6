from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open
from trainer_runs import crops_of, small, source, write_held_out, write_tiles

import eosin
from eosin.errors import CollapseError, ConfigError, NonFiniteError
from eosin.pretrain import engine, held_out, inputs
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.objective import loss_weights
from eosin.pretrain.schedules import step_values
from eosin.pretrain.trainer import Outcome, pretrain
from eosin.pretrain.watch import read_log

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles") / "tiles.npy", 32)


def run(config: PretrainConfig, out: Path, **more: Any) -> Outcome:
    return pretrain(config, out, device="cpu", source=source(config), **more)


def build(config: PretrainConfig, steps: int = 4) -> engine.Engine:
    with torch.random.fork_rng():
        return engine.build(config, classes={}, steps=steps, device=CPU)


def checkpoint_of(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name, value in a.items() if not torch.equal(value, b[name])] == []


# A run.


def test_a_run_leaves_all_that_it_promises(tiles: Path, tmp_path: Path) -> None:
    held = write_held_out(tmp_path / "held", 16)
    config = small(tiles, watch__probe=str(held), watch__probe_every=2, run__save_every=2, run__keep=1)
    before = torch.get_rng_state()
    seen = []
    outcome = run(config, tmp_path / "out", progress=seen.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert (outcome.finished, outcome.step, outcome.resumed_from) == (True, 4, 0)
    assert [status.step for status in seen] == [1, 2, 3, 4]
    rows = read_log(outcome.out)
    assert [row["step"] for row in rows if "probe" in row] == [0, 2, 4]
    steps = [row for row in rows if "loss" in row]
    for at, row in enumerate(steps):
        expected = step_values(at, config.schedule, lr=config.lr, steps=4)
        assert row["schedule"] == dataclasses.asdict(expected)
        weighted = sum(loss_weights(config.objective)[name] * value for name, value in row["parts"].items())
        assert row["loss"] == pytest.approx(weighted, rel=1e-5)
        assert row["images"] == 4 * (at + 1)
        assert 0 <= row["wait"] <= 1
        assert set(row["grad_norm"]) == {"encoder", "dino", "ibot"}
    record = json.loads((outcome.out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["config"] == config.to_dict()
    kept = sorted(p.relative_to(outcome.out).as_posix() for p in outcome.out.glob("*/step-*"))
    assert kept == ["checkpoints/step-00000004", "encoders/step-00000004.safetensors"]
    page = outcome.report.read_text()
    for words in ("Held-out images", "Does it collapse?", "What patches are alike", "Views", "4 of 4 optimiser steps"):
        assert words in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_exported_teacher_is_an_encoder(tiles: Path, tmp_path: Path) -> None:
    config = small(tiles)
    outcome = run(config, tmp_path / "out")
    assert outcome.encoder is not None
    images = crops_of(config).images[0]
    encoder = eosin.load_encoder(outcome.encoder, device="cpu", backend="torch", precision="fp32")
    fresh = build(config)
    state = checkpoint_of(outcome.out, 4)
    fresh.teacher.load_state_dict({k.removeprefix("teacher/"): v for k, v in state.items() if k.startswith("teacher/")})
    with torch.no_grad():
        expected = fresh.teacher.encoder([images])[0].cls
    assert torch.allclose(encoder(images).cls, expected, atol=1e-5)
    with safe_open(outcome.encoder, "pt") as file:
        facts = json.loads(file.metadata()["eosin_encoder"])
    assert facts["mean"] == list(config.views.mean)
    assert (facts["patch_px"], facts["mpp"], facts["step"], facts["images"]) == (8, [0.5], 4, 16)


# Resume.


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_bit_by_bit_the_same(tiles: Path, tmp_path: Path, precision: str) -> None:
    config = small(tiles, run__precision=precision, objective__centring="ema", budget__steps=6)
    whole = run(config, tmp_path / "whole")

    def stop(status: Any) -> None:
        if status.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    part = run(config, tmp_path / "parts", progress=stop)
    assert (part.finished, part.step, part.encoder) == (False, 3, None)
    assert "stopped by SIGTERM" in (part.out / "run.json").read_text()
    rest = run(config, tmp_path / "parts")
    assert (rest.finished, rest.resumed_from) == (True, 3)
    ours, theirs = checkpoint_of(whole.out, 6), checkpoint_of(rest.out, 6)
    assert {"targets/centres.dino.center", "optimizer/student.branch.encoder.norm.weight/exp_avg"} <= ours.keys()
    same(ours, theirs)
    numbers = ("step", "loss", "parts", "monitors", "grad_norm", "schedule")
    logs = [[{name: row[name] for name in numbers} for row in read_log(one.out)] for one in (whole, rest)]
    assert logs[0] == logs[1]


def test_a_signal_handler_is_put_back(tiles: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(small(tiles, budget__steps=1), tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_is_not_trained_again(tiles: Path, tmp_path: Path) -> None:
    config = small(tiles)
    run(config, tmp_path / "out")
    before = checkpoint_of(tmp_path / "out", 4)
    again = run(config, tmp_path / "out")
    assert (again.finished, again.resumed_from) == (True, 4)
    same(before, checkpoint_of(tmp_path / "out", 4))


def test_another_config_is_refused_and_the_field_named(tiles: Path, tmp_path: Path) -> None:
    run(small(tiles, budget__steps=1), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.001, now 0\.002"):
        run(small(tiles, budget__steps=1, optimizer__lr=2e-3), tmp_path / "out")
    assert run(small(tiles, budget__steps=1, watch__log_every=3), tmp_path / "out").finished


# One step.


def test_steps_are_optimiser_steps(tiles: Path) -> None:
    config = small(tiles, run__accumulate=3, objective__centring="ema")
    made = build(config)
    asked: list[int] = []

    def give(index: int) -> Any:
        asked.append(index)
        return crops_of(config, index)

    for step in range(2):
        stepped = engine.optimiser_step(made, step, give)
        assert stepped.values == step_values(step, config.schedule, lr=config.lr, steps=4)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert {float(state["step"]) for state in made.optimizer.state.values()} == {2.0}


def test_the_gradient_is_the_mean_over_micro_steps(tiles: Path) -> None:
    """Against a loop written out here, with an optimiser that does nothing."""
    config = small(tiles, run__accumulate=2, optimizer__clip=0.0, optimizer__lr=1e-12, schedule__momentum=[1.0, 1.0])
    made, alone = build(config), build(config)
    engine.optimiser_step(made, 0, lambda index: crops_of(config, index))
    values = step_values(0, config.schedule, lr=config.lr, steps=4)
    for index in range(2):
        parts, _, _ = engine._micro_step(alone, 0, index, values, crops_of(config, index))
        (parts["total"] / 2).backward()
    for (name, ours), theirs in zip(made.student.named_parameters(), alone.student.parameters(), strict=True):
        assert ours.grad is not None, name
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-7), name


def test_the_teacher_is_the_moving_average_of_the_student(tiles: Path) -> None:
    config = small(tiles)
    made = build(config)
    old = {name: value.clone() for name, value in made.teacher.named_parameters()}
    stepped = engine.optimiser_step(made, 0, lambda index: crops_of(config, index))
    moved = False
    for name, student in made.student.branch.named_parameters():
        expected = stepped.values.momentum * old[name] + (1 - stepped.values.momentum) * student.detach()
        assert torch.allclose(made.teacher.get_parameter(name), expected, atol=1e-7)
        moved = moved or not torch.equal(made.teacher.get_parameter(name), old[name])
    assert moved


def test_a_frozen_last_layer_stands_still_and_the_rest_moves(tiles: Path) -> None:
    config = small(tiles, schedule__freeze_last_layer=0.5, schedule__warmup=0.0)
    made = build(config)
    head = made.student.branch.dino
    last, first = (head.last_layer.weight_v, head.mlp[0].weight)
    before = (last.detach().clone(), first.detach().clone())
    engine.optimiser_step(made, 0, lambda index: crops_of(config, index))
    assert torch.equal(last, before[0])
    assert not torch.equal(first, before[1])
    engine.optimiser_step(made, 2, lambda index: crops_of(config, index))
    assert not torch.equal(last, before[0])


def test_gradients_are_clipped_part_by_part(tiles: Path) -> None:
    config = small(tiles, optimizer__clip=0.01)
    made = build(config)
    stepped = engine.optimiser_step(made, 0, lambda index: crops_of(config, index))
    for name, module in made.student.parts().items():
        after = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
        assert float(after) == pytest.approx(min(0.01, float(stepped.norms[name])), rel=1e-3), name


def test_the_gram_anchor_is_the_teacher_of_its_step(tiles: Path) -> None:
    config = small(tiles, objective__gram=1.0, objective__gram_start=0.5)
    made = build(config)
    found = [set(engine.optimiser_step(made, s, lambda i: crops_of(config, i)).parts) for s in range(2)]
    taken = {name: value.clone() for name, value in made.teacher.encoder.named_parameters()}
    stepped = engine.optimiser_step(made, 2, lambda i: crops_of(config, i))
    assert all("gram" not in names for names in found)
    assert float(stepped.parts["gram"]) >= 0
    assert made.anchor is not None
    for name, value in made.anchor.named_parameters():
        assert torch.equal(value, taken[name])
    assert "anchor" in made.parts()


def test_every_part_of_the_objective_trains(tiles: Path, tmp_path: Path) -> None:
    config = small(
        tiles, objective__jepa=1.0, objective__koleo=0.1, objective__gram=0.5, objective__gram_start=0.0,
        objective__own_ibot_head=False, objective__mask_exact=True, objective__weight_norm=False,
    )  # fmt: skip
    outcome = run(config, tmp_path / "out")
    assert set(outcome.last["parts"]) == {"dino", "ibot", "jepa", "koleo", "kde", "gram"}
    assert set(outcome.last["grad_norm"]) == {"encoder", "dino", "jepa"}
    assert all(value > 0 for value in outcome.last["grad_norm"].values())


def test_simclr_trains_its_one_encoder(tiles: Path, tmp_path: Path) -> None:
    outcome = run(small(tiles, objective__method="simclr", views__local_crops=0), tmp_path / "out")
    assert set(outcome.last["parts"]) == {"simclr"}
    state = checkpoint_of(outcome.out, 4)
    for name in [name for name in state if name.startswith("teacher/")]:
        assert torch.equal(state[name], state[name.replace("teacher/", "student/branch.")])


def test_a_run_is_a_function_of_its_seed(tiles: Path) -> None:
    config = small(tiles)
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=config.run.seed + 1))
    first, again, different = (
        float(engine.optimiser_step(build(one), 0, lambda i: crops_of(config, i)).parts["total"])
        for one in (config, config, other)
    )
    assert first == again
    assert first != different


# Adversary.


def factor_table(folder: Path) -> tuple[Path, Path]:
    """Write tiles of four slides on two scanners, and their table."""
    paths = [write_tiles(folder / f"slide{i}.npy", 8, seed=i) for i in range(4)]
    rows = [f"slide{i}.npy/{n},slide{i},scanner{i % 2}" for i in range(4) for n in range(8)]
    (folder / "table.csv").write_text("path,slide_id,scanner\n" + "\n".join(rows) + "\n")
    return paths[0].parent, folder / "table.csv"


def adversarial(folder: Path, **changes: Any) -> PretrainConfig:
    _, table = factor_table(folder)
    paths = [str(folder / f"slide{i}.npy") for i in range(4)]
    return small(folder, data__paths=paths, data__table=str(table), **changes)


def test_an_adversary_of_strength_0_changes_no_bit_of_the_encoder(tmp_path: Path) -> None:
    states = {}
    for name, changes in {
        "none": {},
        "zero": {"objective__adversary": "scanner", "objective__adversary_strength": 0.0},
        "full": {"objective__adversary": "scanner", "objective__adversary_strength": 5.0},
    }.items():
        config = adversarial(tmp_path, **changes)
        opened = inputs.open_source(config)
        opened.loading = dataclasses.replace(opened.loading, workers=0)
        outcome = pretrain(config, tmp_path / name, device="cpu", source=opened)
        state = checkpoint_of(outcome.out, 4)
        states[name] = {k: v for k, v in state.items() if k.startswith("student/branch")}
    same(states["none"], states["zero"])
    assert any(not torch.equal(v, states["full"][k]) for k, v in states["none"].items())


def test_factors_follow_the_table_and_what_speaks_against_them_is_said(tmp_path: Path) -> None:
    config = adversarial(tmp_path, objective__adversary="scanner")
    opened = inputs.open_source(config)
    found = inputs.read_factors(config, opened.slide_ids)
    opened.close()
    assert found.names["adversary"] == ("scanner0", "scanner1")
    assert found.codes["adversary"].tolist() == [int(name[-1]) % 2 for name in opened.slide_ids]
    with pytest.raises(ConfigError, match=r"data\.table"):
        inputs.read_factors(small(tmp_path, objective__adversary="site"), ("a", "b"))
    with pytest.raises(ConfigError, match="1 value"):
        inputs.read_factors(small(tmp_path, objective__adversary="slide"), ("a",))


# What goes wrong.


def test_nan_stops_the_run_with_the_step_and_what_to_change(tiles: Path, tmp_path: Path) -> None:
    config = small(tiles, optimizer__lr=1e30, run__save_every=1, schedule__warmup=0.5)
    with pytest.raises(NonFiniteError, match=r"step 3: the dino loss.*optimizer\.lr.*step 2 is whole"):
        run(config, tmp_path / "out")
    assert "failed" in json.loads((tmp_path / "out" / "run.json").read_text())["status"]
    assert "Failed." in (tmp_path / "out" / "report.html").read_text()
    kept = checkpoint_of(tmp_path / "out", 2)
    assert all(bool(value.isfinite().all()) for value in kept.values() if value.is_floating_point())


def test_collapse_stops_the_run(tmp_path: Path) -> None:
    np.save(tmp_path / "white.npy", np.full((8, 40, 40, 3), 255, dtype=np.uint8))
    still = {"jitter": 0.0, "grey": 0.0, "stain_probability": 0.0}
    config = small(
        tmp_path / "white.npy",
        budget__steps=8,
        watch__stop_on_collapse=True,
        **{f"views__{k}": v for k, v in still.items()},
    )
    with pytest.raises(CollapseError, match=r"same features.*run\.batch \(now 4\)"):
        run(config, tmp_path / "out")
    patient = dataclasses.replace(config, watch=dataclasses.replace(config.watch, stop_on_collapse=False))
    assert run(patient, tmp_path / "on").finished


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run__batch": 1}, "KoLeo, KDE and SimCLR compare"),
        ({"run__batch": 1, "objective__kde": 0.0}, r"Sinkhorn.*run\.batch|run\.batch.*Sinkhorn"),
        ({"objective__mask_share": 0.1}, "no crop of a rank would be masked"),
        ({"objective__mask_ratio": [0.05, 0.1]}, "smallest block"),
    ],
)
def test_a_batch_that_means_nothing_is_refused_at_the_start(
    tiles: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(small(tiles, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sharding_needs_ranks_and_tiles_their_mpp(tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        run(small(tiles, run__shard=True), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"data\.slide_mpp"):
        inputs.open_source(small(tiles, data__slide_mpp=None))


def test_weights_of_another_shape_are_refused(tiles: Path, tmp_path: Path) -> None:
    first = run(small(tiles, budget__steps=1), tmp_path / "out")
    start = {"run__weights": str(first.encoder)}
    warm = build(small(tiles, **start))
    trained = checkpoint_of(first.out, 1)
    assert torch.allclose(warm.student.branch.encoder.norm.weight, trained["teacher/encoder.norm.weight"], atol=1e-6)
    with pytest.raises(eosin.errors.WeightsError, match="shape"):
        build(small(tiles, model__dim=128, model__heads=2, **start))


def test_hours_become_steps_once(tiles: Path, tmp_path: Path) -> None:
    config = small(tiles, budget__steps=None, budget__hours=0.3 / 3600)
    outcome = run(config, tmp_path / "out")
    assert outcome.budget.ended_by == "hours"
    assert outcome.budget.seconds_per_step is not None
    assert outcome.budget.steps == int(0.3 / outcome.budget.seconds_per_step)
    assert run(config, tmp_path / "out").budget == outcome.budget


@pytest.mark.slow
def test_training_teaches(tmp_path: Path) -> None:
    """Neighbours tell textures of unseen patients better than before training and than with shuffled labels."""
    path = write_tiles(tmp_path / "tiles.npy", 512)
    held = write_held_out(tmp_path / "held", 160)
    config = small(
        path, model__depth=4, model__registers=2, model__drop_path=0.0, views__local_crops=4, views__grey=0.0,
        views__blur=[0.0, 0.0, 0.0], views__global_scale=[0.5, 1.0], views__local_scale=[0.15, 0.4],
        objective__prototypes=256, objective__hidden=128, objective__bottleneck=32, schedule__weight_decay=[0.04, 0.1],
        budget__steps=250, run__batch=32, watch__log_every=50, watch__probe=str(held),
    )  # fmt: skip
    outcome = run(config, tmp_path / "out")
    before, after = (row["probe"] for row in read_log(outcome.out) if "probe" in row)
    images = held_out.read_held_out(held, patch_px=8)
    encoder = eosin.load_encoder(outcome.encoder or "", device="cpu", backend="torch", precision="fp32")
    features = encoder.encode(images.tiles.movedim(1, 3).contiguous().numpy())
    assert held_out.probe(features, images, seed=0)["knn"]["point"] == pytest.approx(after["knn"]["point"], abs=0.03)
    shuffled = dataclasses.replace(images, y=np.random.default_rng(0).permutation(images.y))
    control = held_out.probe(features, shuffled)["knn"]["point"]
    assert after["knn"]["point"] > before["knn"]["point"] + 0.1
    assert after["knn"]["point"] > control + 0.1
    assert after["rankme"] > before["rankme"]
