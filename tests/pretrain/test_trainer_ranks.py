from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trainer_rank
import trainer_runs
from safetensors.torch import load_file

from eosin.pretrain.checkpoint import latest_checkpoint
from eosin.pretrain.layouts import save_encoder
from eosin.pretrain.model import VisionTransformer
from eosin.pretrain.trainer import pretrain

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in the ranks: sums over other threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(what: str, rank: int, world: int, folder: Path) -> subprocess.Popen[str]:
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(HERE / "trainer_rank.py"), what, str(rank), str(world), str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def on_ranks(what: str, world: int, folder: Path) -> None:
    ranks = [start(what, rank, world, folder) for rank in range(world)]
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, said


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with tiles and weights of their networks' geometry; ranks and this process work in it."""
    trainer_runs.write_tiles(tmp_path / "tiles.npy", 32)
    config = trainer_runs.small(tmp_path / "tiles.npy", model__layer_scale=1.0).model
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_encoder(tmp_path / "base.safetensors", VisionTransformer(config).state_dict(), config)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def alone(what: str, folder: Path, **changes: float) -> dict[str, torch.Tensor]:
    settings = {k: v for k, v in trainer_rank.RUNS[what].items() if "shard" not in k}
    config = trainer_runs.small(folder / "tiles.npy", **settings | changes)
    with torch.random.fork_rng():
        return trainer_rank.one_step(config, 0, 1)


@pytest.mark.parametrize(
    "what", ["step", "step-ema", "step-sharded", "step-lora", "step-lora-sharded", "step-distil-sharded"]
)
def test_a_step_on_two_ranks_is_the_step_of_one_process(folder: Path, what: str) -> None:
    """Losses, gradient norms, student, teacher and centres; the gradient goes through Sinkhorn, KoLeo and KDE."""
    on_ranks(what, 2, folder)
    ours, theirs = load_file(folder / f"{what}-2.safetensors"), alone(what, folder)
    assert ours.keys() == theirs.keys()
    apart = {name: float((value - theirs[name]).abs().max()) for name, value in ours.items()}
    for name in [name for name in apart if name.startswith("norm/")]:
        apart[name] /= float(theirs[name])
    assert max(apart.values()) < 1e-6, max(apart, key=lambda name: apart[name])
    still = alone(what, folder, optimizer__lr=1e-12)
    moved = max(float((still[name] - value).abs().max()) for name, value in theirs.items() if "student" in name)
    assert moved > 1e-3


def test_a_run_on_two_ranks_goes_on_with_one(folder: Path) -> None:
    on_ranks("ranks", 2, folder)
    config = trainer_runs.small(folder / "tiles.npy", **trainer_rank.RUNS["ranks"])
    newest = latest_checkpoint(folder / "ranks" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000006"
    for path in (newest, folder / "ranks" / "encoder.safetensors"):
        (path.rename(folder / path.name))
    outcome = pretrain(config, folder / "ranks", device="cpu", source=trainer_runs.source(config))
    assert (outcome.resumed_from, outcome.step, outcome.finished) == (4, 6, True)
    ours, theirs = load_file(outcome.encoder or Path()), load_file(folder / "encoder.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(value.isfinite().all() for value in ours.values())


def test_killed_while_a_checkpoint_is_written_the_one_before_is_whole(folder: Path) -> None:
    process = start("killed", 0, 1, folder)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert left == [".unfinished-step-00000004", "step-00000002"]
    _goes_on_as_if_nothing_had_been(folder, from_step=2)


def test_killed_in_the_middle_of_a_step_nothing_is_lost_but_the_steps_since(folder: Path) -> None:
    process = start("ranks", 0, 1, folder)
    checkpoints = folder / "ranks" / "checkpoints"
    until = time.monotonic() + 120
    while latest_checkpoint(checkpoints) is None and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    newest = latest_checkpoint(checkpoints)
    assert newest is not None
    (folder / "ranks").rename(folder / "run")
    _goes_on_as_if_nothing_had_been(folder, from_step=int(newest.name[-8:]))


def _goes_on_as_if_nothing_had_been(folder: Path, *, from_step: int) -> None:
    config = trainer_runs.small(folder / "tiles.npy", **trainer_rank.SAVED)
    resumed = pretrain(config, folder / "run", device="cpu", source=trainer_runs.source(config))
    whole = pretrain(config, folder / "whole", device="cpu", source=trainer_runs.source(config))
    assert resumed.resumed_from == from_step
    ours, theirs = (load_file(one.encoder or Path()) for one in (resumed, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
