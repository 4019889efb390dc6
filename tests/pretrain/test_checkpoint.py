from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

import eosin.pretrain.checkpoint as module
from eosin.errors import CheckpointError, NonFiniteError, WeightsError
from eosin.pretrain.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from eosin.pretrain.config import PretrainConfig, parse_config
from eosin.pretrain.ema import make_teacher, pair, update
from eosin.pretrain.groups import apply_values, parameter_groups
from eosin.pretrain.heads import ProjectionHead
from eosin.pretrain.losses import CenteredSoftmax
from eosin.pretrain.model import ModelConfig, VisionTransformer
from eosin.pretrain.schedules import step_values

GEOMETRY = {"dim": 16, "depth": 2, "heads": 2, "patch_px": 4, "position_grid": 4, "drop_path": 0.3}
HERE = Path(__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in the processes that are killed: sums over other threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_config(**run: Any) -> PretrainConfig:
    return parse_config({
        "model": GEOMETRY,
        "data": {"paths": ["slides"]},
        "views": {"global_px": 16, "local_px": 16, "blur_sigma_px": [0.1, 2.0]},
        "optimizer": {"lr": 1e-2},
        "budget": {"steps": 20},
        "run": {"batch": 8, **run},
    })  # fmt: skip


def make_parts(seed: int = 0, dim: int = 16) -> dict[str, Any]:
    """Return a small run: student, teacher, head, centre, optimiser, generator."""
    torch.manual_seed(seed)
    student = VisionTransformer(ModelConfig(**{**GEOMETRY, "dim": dim}))
    head = ProjectionHead(dim, hidden=8, bottleneck=4, prototypes=6)
    optimizer = torch.optim.AdamW(parameter_groups(student, {"dino": head}, layer_decay=0.9), lr=0.0)
    return {
        "student": student,
        "teacher": make_teacher(student),
        "dino": head,
        "centre": CenteredSoftmax(6),
        "optimizer": optimizer,
        "views": torch.Generator().manual_seed(seed),
    }


def train(parts: dict[str, Any], first: int, last: int) -> None:
    """Make optimiser steps that use every kind of state: drop path, a generator, the centre, the moving average."""
    pairs, config = pair(parts["teacher"], parts["student"]), make_config()
    parts["student"].train()
    for step in range(first, last):
        values = step_values(step, config.schedule, lr=config.lr, steps=20)
        apply_values(parts["optimizer"], values)
        crops = torch.rand(8, 3, 16, 16, generator=parts["views"])
        with torch.no_grad():
            targets = parts["centre"](parts["dino"](parts["teacher"]([crops])[0].cls), values.temperature)
        logits = parts["dino"](parts["student"]([crops])[0].cls)
        functional.cross_entropy(logits / 0.1, targets).backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        update(pairs, momentum=values.momentum)


def save(folder: Path, parts: dict[str, Any], step: int, **changes: Any) -> Path:
    config = changes.pop("config", make_config())
    return save_checkpoint(folder, parts, step=step, config=config, budget=config.resolve_budget(), **changes)


def states(parts: dict[str, Any]) -> dict[str, torch.Tensor]:
    modules = {f"{n}.{k}": t for n, p in parts.items() if isinstance(p, nn.Module) for k, t in p.state_dict().items()}
    moments = enumerate(parts["optimizer"].state_dict()["state"].values())
    return {**modules, **{f"{i}.{k}": t for i, state in moments for k, t in state.items()}}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    one, other = states(a), states(b)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def test_a_resumed_run_is_the_whole_run_bit_by_bit(tmp_path: Path) -> None:
    whole = make_parts()
    torch.manual_seed(1)
    train(whole, 0, 8)

    first = make_parts()
    torch.manual_seed(1)
    train(first, 0, 4)
    save(tmp_path, first, 4)

    resumed = make_parts(seed=99)
    torch.manual_seed(12345)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    restored = load_checkpoint(latest, resumed, config=make_config())
    assert (restored.step, restored.budget.steps, restored.ranks, restored.exact) == (4, 20, 1, True)
    assert_same(resumed, first)
    train(resumed, restored.step, 8)
    assert_same(resumed, whole)
    assert not torch.equal(resumed["student"].cls_token, first["student"].cls_token)


def test_settings_of_the_groups_come_back(tmp_path: Path) -> None:
    parts, other = make_parts(), make_parts(seed=1)
    train(parts, 0, 2)
    load_checkpoint(save(tmp_path, parts, 2), other, config=make_config())
    for saved, found in zip(parts["optimizer"].param_groups, other["optimizer"].param_groups, strict=True):
        assert {k: v for k, v in saved.items() if k != "params"} == {k: v for k, v in found.items() if k != "params"}


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    parts, other = make_parts(), make_parts(seed=1)
    load_checkpoint(save(tmp_path, parts, 0), other, config=make_config())
    assert not other["optimizer"].state
    assert_same(parts, other)


def test_gradient_scalers_are_kept(tmp_path: Path) -> None:
    parts, other = make_parts(), make_parts()
    parts["scaler"], other["scaler"] = (torch.amp.GradScaler("cpu", init_scale=s) for s in (512.0, 2.0))
    parts["scaler"].scale(torch.ones(()))  # a scaler makes its state at first use
    path = save(tmp_path, parts, 1)
    load_checkpoint(path, other, config=make_config())
    assert other["scaler"].state_dict()["scale"] == 512.0
    with pytest.raises(WeightsError, match=r"has the scalers \['scaler'\], the run has \[\]"):
        load_checkpoint(path, make_parts(), config=make_config())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    parts = make_parts()
    for step in (1, 2, 3, 10):
        save(tmp_path, parts, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000010"
    assert latest_checkpoint(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="step-00000010 is there already"):
        save(tmp_path, parts, 10)


def test_another_config_is_refused_with_its_fields(tmp_path: Path) -> None:
    path = save(tmp_path, make_parts(), 1)
    parts = make_parts(seed=5)
    before = {k: v.clone() for k, v in states(parts).items()}
    other = dataclasses.replace(make_config(seed=3), optimizer=dataclasses.replace(make_config().optimizer, lr=2e-2))
    with pytest.raises(
        CheckpointError, match=r"another run: optimizer\.lr: 0\.01, now 0\.02; run\.seed: 0, now 3; take"
    ):
        load_checkpoint(path, parts, config=other)
    assert all(torch.equal(v, before[k]) for k, v in states(parts).items())
    load_checkpoint(path, parts, config=make_config(keep=7, save_every=3))


def test_every_tensor_is_accounted_for_before_any_is_changed(tmp_path: Path) -> None:
    trained = make_parts()
    train(trained, 0, 1)
    path = save(tmp_path, trained, 1)
    parts = make_parts(seed=5)
    parts["teacher"] = VisionTransformer(ModelConfig(**{**GEOMETRY, "dim": 8}))
    before = {k: v.clone() for k, v in states(parts).items()}
    with pytest.raises(WeightsError, match=r"0 missing .* 0 unexpected .* 3\d of another shape or type .*teacher/"):
        load_checkpoint(path, parts, config=make_config())
    parts["teacher"] = nn.Linear(2, 2)
    with pytest.raises(
        WeightsError, match=r"2 missing \(teacher/bias, teacher/weight\), 36 unexpected \(teacher/blocks"
    ):
        load_checkpoint(path, parts, config=make_config())
    del parts["teacher"]
    with pytest.raises(WeightsError, match=r"0 missing .*36 unexpected"):
        load_checkpoint(path, parts, config=make_config())
    assert all(torch.equal(v, before[k]) for k, v in states(parts).items() if not k.startswith("teacher"))


def test_an_optimiser_of_other_groups_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, make_parts(), 1)
    parts = make_parts()
    groups = parameter_groups(parts["student"], {"dino": parts["dino"]}, layer_decay=1.0)
    parts["optimizer"] = torch.optim.AdamW(groups, lr=0.0)
    with pytest.raises(WeightsError, match="groups of optimizer hold other parameters"):
        load_checkpoint(path, parts, config=make_config())
    parts["optimizer"] = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.0)
    with pytest.raises(WeightsError, match=r"1 parameters of none of the parts, of shapes \[\(3,\)\]"):
        load_checkpoint(path, parts, config=make_config())


def test_a_diverged_run_does_not_replace_a_good_checkpoint(tmp_path: Path) -> None:
    parts = make_parts()
    good = save(tmp_path, parts, 1)
    with torch.no_grad():
        parts["student"].norm.bias[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 2 is not saved: NaN or infinity in 1 tensors: student/norm\.bias"):
        save(tmp_path, parts, 2)
    assert latest_checkpoint(tmp_path) == good


def test_an_aliased_teacher_is_refused(tmp_path: Path) -> None:
    parts = make_parts()
    parts["teacher"] = parts["student"]
    with pytest.raises(WeightsError, match=r"teacher/cls_token is student/cls_token itself"):
        save(tmp_path, parts, 1)


@pytest.mark.parametrize("damage", ["cut", "about", "gone", "header"])
def test_damaged_checkpoints_are_named(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, make_parts(), 1)
    tensors, about = path / "tensors.safetensors", path / "checkpoint.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "about":
        about.write_text(about.read_text()[:-100])
    elif damage == "gone":
        about.unlink()
    else:
        content = bytearray(tensors.read_bytes())
        content[8:16] = b"garbage!"
        tensors.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bytes, .* were written|damaged|is no checkpoint"):
        load_checkpoint(path, make_parts(), config=make_config())


def test_a_disk_that_refuses_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_parts()
    good = save(tmp_path, parts, 1)

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="No space left on device; the checkpoint before it is whole"):
        save(tmp_path, parts, 2)
    assert [p for p in tmp_path.iterdir()] == [good]


# Killed in the middle.

DEATHS = {
    "in-the-tensors": (module, "save_file", 1, 2),
    "before-sync": (module.os, "fsync", 1, 2),
    "between-syncs": (module.os, "fsync", 2, 2),
    "before-rename": (module.Path, "replace", 1, 2),
    "before-old-aside": (module.Path, "replace", 2, 4),
    "before-removal": (module.shutil, "rmtree", 1, 4),
}
"""Where the second save is killed: whose function, which call of it, and the step that must be the newest after."""


def save_and_die(folder: Path, death: str) -> None:
    """Save step 2, then kill this process within the save of step 4."""
    owner, name, at, _ = DEATHS[death]
    parts = make_parts()
    train(parts, 0, 2)
    save(folder, parts, 2)
    real, calls = getattr(owner, name), itertools.count(1)

    def die(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            if name == "save_file":
                Path(args[1]).write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, die)
    train(parts, 2, 4)
    save(folder, parts, 4, keep=1)


FORK = """
import os, sys
sys.path.insert(0, {here!r})
from pathlib import Path
import test_checkpoint as t
for death in t.DEATHS:
    child = os.fork()
    if child == 0:
        t.save_and_die(Path({folder!r}) / death, death)
        os._exit(0)
    print(death, os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of `DEATHS`, as the killed process left it."""
    folder = tmp_path_factory.mktemp("killed")
    code = FORK.format(here=str(HERE), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.stdout.split("\n")[:-1] == [f"{death} {signal.SIGKILL.value}" for death in DEATHS], done.stderr
    return folder


@pytest.mark.parametrize("death", DEATHS)
def test_killed_while_saving(killed: Path, death: str) -> None:
    """Whatever the moment, the newest checkpoint is whole, equals an undisturbed run's, and the next save tidies up."""
    folder, newest = killed / death, DEATHS[death][3]
    assert any(path.name.startswith(".") for path in folder.iterdir()) == (death != "before-old-aside")
    latest = latest_checkpoint(folder)
    assert latest is not None
    resumed, expected = make_parts(seed=9), make_parts()
    train(expected, 0, newest)
    assert load_checkpoint(latest, resumed, config=make_config()).step == newest
    assert_same(resumed, expected)
    save(folder, resumed, 5, keep=1)
    assert [p.name for p in folder.iterdir()] == ["step-00000005"]


ENDLESS = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
import test_checkpoint as t
parts, folder = t.make_parts(), Path({folder!r})
latest = t.latest_checkpoint(folder)
step = t.load_checkpoint(latest, parts, config=t.make_config()).step if latest else 0
print("ready", flush=True)
while True:
    step += 1
    t.save(folder, parts, step)
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A run that saves without pause is killed at random moments; the newest checkpoint always loads."""
    draws, last = random.Random(0), 0
    code = ENDLESS.format(here=str(HERE), folder=str(tmp_path))
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5 + draws.random())
            process.kill()
            process.wait()
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        step = load_checkpoint(latest, make_parts(seed=3), config=make_config()).step
        assert step > last
        last = step


# Several ranks.


def test_shards_are_read_by_one_process_without_a_word(tmp_path: Path) -> None:
    """What ranks wrote, here as torch writes it alone; warnings are errors in these tests."""
    saved = {"student/a": torch.arange(6.0).reshape(2, 3), "student/b": torch.ones(2, dtype=torch.int64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.save_shards(saved, checkpoint_id=tmp_path / module._SHARDS, no_dist=True)
    found = {name: torch.zeros_like(t) for name, t in saved.items()}
    module._read(tmp_path, found)
    assert all(torch.equal(found[name], t) for name, t in saved.items())


def rank_parts(rank: int, seed: int, shard: bool) -> dict[str, Any]:
    """Return a small run of this rank, sharded over all of them or not; odd sizes, so that shards differ."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    if shard:
        fully_shard(student, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    return {"student": student, "optimizer": optimizer, "views": torch.Generator().manual_seed(100 + rank)}


def rank_step(parts: dict[str, Any]) -> None:
    """Make one optimiser step on data that every rank shares."""
    parts["student"](torch.arange(24.0).reshape(4, 6) / 24).square().sum().backward()
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()


def rank_states(parts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return parameters and moments, gathered from all ranks."""
    found = dict(parts["student"].state_dict())
    for i, state in enumerate(parts["optimizer"].state.values()):
        found |= {f"{i}.{key}": value for key, value in state.items()}
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in found.items()}


def save_and_go_on(folder: Path, rank: int, *, shard: bool) -> dict[str, torch.Tensor]:
    """Save after step 3; return what the fourth step and the generator gave."""
    parts = rank_parts(rank, 0, shard)
    for _ in range(3):
        rank_step(parts)
    torch.rand(1, generator=parts["views"])
    save(folder, parts, 3)
    rank_step(parts)
    return {**rank_states(parts), "draw": torch.rand(3, generator=parts["views"])}


def resume_and_compare(folder: Path, rank: int, expected: dict[str, torch.Tensor], *, shard: bool, exact: bool) -> None:
    """Load what `save_and_go_on` saved into another start, and make the fourth step."""
    parts = rank_parts(rank, 7, shard)
    latest = latest_checkpoint(folder)
    assert latest is not None
    restored = load_checkpoint(latest, parts, config=make_config())
    assert (restored.step, restored.exact) == (3, exact)
    rank_step(parts)
    found = {**rank_states(parts), "draw": torch.rand(3, generator=parts["views"])}
    assert torch.equal(found.pop("draw"), expected["draw"]) == exact
    assert found.keys() == expected.keys() - {"draw"}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0 if exact else 1e-6, msg=key)


def check_sharded_average() -> None:
    """Average a sharded teacher and student: the whole tensors must be those of one process, bit by bit."""
    torch.manual_seed(0)
    student, mesh = nn.Linear(6, 5), init_device_mesh("cpu", (dist.get_world_size(),))
    teacher = make_teacher(student)
    with torch.no_grad():
        student.weight.add_(1)
    expected = torch.lerp(teacher.weight, student.weight, 1 - 0.9)
    with pytest.raises(WeightsError, match="sharded one way"):
        pair(teacher, fully_shard(student, mesh=mesh))
    update(pair(fully_shard(teacher, mesh=mesh), student), momentum=0.9)
    assert isinstance(teacher.weight, DTensor)
    assert torch.equal(teacher.weight.full_tensor(), expected)


def as_rank(rank: int, world: int, folder: Path) -> None:
    """Save and resume as one of `world` ranks, sharded, replicated and alone, in every direction."""
    logging.disable(logging.WARNING)
    join = {"backend": "gloo", "rank": rank, "world_size": world}
    dist.init_process_group(**join, init_method=f"file://{folder}/first")
    check_sharded_average()
    sharded = save_and_go_on(folder / "sharded", rank, shard=True)
    resume_and_compare(folder / "sharded", rank, sharded, shard=True, exact=True)
    replicated = save_and_go_on(folder / "replicated", rank, shard=False)
    resume_and_compare(folder / "replicated", rank, replicated, shard=False, exact=True)
    resume_and_compare(folder / "replicated", rank, replicated, shard=True, exact=True)
    poisoned = rank_parts(rank, 0, True)
    if rank == 1:
        with torch.no_grad():
            poisoned["student"][0].weight.to_local()[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"student/0\.weight"):  # on both, though one alone holds it
        save(folder / "sharded", poisoned, 4)
    dist.destroy_process_group()
    if rank == 0:
        resume_and_compare(folder / "sharded", rank, sharded, shard=False, exact=False)
        torch.save(save_and_go_on(folder / "alone", rank, shard=False), folder / "alone.pt")
    dist.init_process_group(**join, init_method=f"file://{folder}/second")
    dist.barrier()
    alone = torch.load(folder / "alone.pt", weights_only=True)
    alone["draw"] = torch.zeros(3)  # another number of ranks draws anew
    resume_and_compare(folder / "alone", rank, alone, shard=True, exact=False)
    dist.destroy_process_group()
    print("done", flush=True)
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in the usual way


@pytest.mark.slow
def test_any_number_of_ranks_resumes(tmp_path: Path) -> None:
    """The step after a resume is that of the run that went on; random states only come back on as many ranks."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_checkpoint as t; "
    code += "t.as_rank(int(sys.argv[1]), 2, t.Path(sys.argv[2]))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "done\n"), errors[-3000:]
    for name, ranks in (("sharded", 2), ("alone", 1)):
        assert json.loads((tmp_path / name / "step-00000003" / "checkpoint.json").read_text())["ranks"] == ranks
