"""Two ranks under torchrun against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from traingen import classifier, job, quick, write_cells, write_encoder

from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.saving import trained_state
from eosin.finetune.train import STATE, shared_logits, train_fold

pytestmark = pytest.mark.slow

RECIPE = [
    *("--without", "all", "--epochs", "2", "--folds", "3", "--lr", "1e-2", "--tta", "rot4"),
    *("--batch", "7", "--device", "cpu", "--json"),
]


def run(folder: Path, out: str, *more: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the command in the folder, where the data and the encoder lie."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    where = ["--data", "data", "--encoder", "./tiny.safetensors", "--external", "dataset=other", "--out", out]
    command = [sys.executable, *start, "-m", "eosin.cli", "finetune", "amf", *where, *RECIPE, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_cells(folder / "data", slides=16)
    write_encoder(folder / "tiny.safetensors")
    return folder


def train(index: int, folder: str, world: int) -> None:
    """Train a fold in float32, with nothing random, and keep what came of it."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=index, world_size=world)
    config = quick(epochs=3, batch=59, adapt=AdaptConfig(dropout=0.0))
    model, task = classifier(Path(folder), dropout=0.0), job(Path(folder), config=config)
    trained = train_fold(model, task)
    logits = shared_logits(model, task.tiles[task.fold.test], task.how, device="cpu", precision="fp32")
    told = {"loss": [row["loss"] for row in trained.history], "auroc": [row["auroc"] for row in trained.history]}
    found = trained_state(model) | {"logits": torch.from_numpy(logits), **{k: torch.tensor(v) for k, v in told.items()}}
    torch.save(found, f"{folder}/{world}-{index}.pt")
    if world > 1:
        dist.destroy_process_group()
        os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in the usual way


def test_two_ranks_train_what_one_process_does(tmp_path: Path) -> None:
    """Rounding is all that differs; the last batch of an epoch has one row, so that one rank has none."""
    assert len(job(tmp_path, config=quick()).fold.train) % 59 == 1
    mp.spawn(train, args=(str(tmp_path), 2), nprocs=2)
    threads = torch.get_num_threads()
    train(0, str(tmp_path), 1)
    torch.set_num_threads(threads)
    alone, *ranks = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for key, value in alone.items():
        torch.testing.assert_close(ranks[0][key], value, atol=1e-5, rtol=0)
        assert torch.equal(ranks[0][key], ranks[1][key])


def test_the_command_under_torchrun(folder: Path) -> None:
    one, two = run(folder, "one"), run(folder, "two", ranks=2)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    ours, theirs = json.loads(two.stdout), json.loads(one.stdout)  # the first rank alone speaks
    assert ours["run"] == theirs["run"]
    for name in ("out-of-fold.csv", "external.csv"):
        first, second = pd.read_csv(folder / "one" / name), pd.read_csv(folder / "two" / name)
        assert first["p_atypical"].corr(second["p_atypical"]) > 0.99


def test_a_run_on_two_ranks_goes_on_with_one(folder: Path) -> None:
    """What the ranks saved is all there is to save: nothing is trained again."""
    if not (folder / "two" / "report.html").is_file():
        assert run(folder, "two", ranks=2).returncode == 0
    before, state = pd.read_csv(folder / "two" / "out-of-fold.csv"), folder / "two" / "folds" / "01" / STATE
    written = state.stat().st_mtime_ns
    again = run(folder, "two")
    assert again.returncode == 0, again.stderr
    assert state.stat().st_mtime_ns == written
    after = pd.read_csv(folder / "two" / "out-of-fold.csv")
    np.testing.assert_allclose(after["p_atypical"], before["p_atypical"], atol=1e-6)


def test_another_recipe_in_the_folder_ends_every_rank(folder: Path) -> None:
    if not (folder / "two" / "run.json").is_file():
        assert run(folder, "two", ranks=2).returncode == 0
    found = run(folder, "two", "--seed", "1", ranks=2)
    assert found.returncode != 0
    assert "holds another run" in found.stderr
