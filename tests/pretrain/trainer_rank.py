"""One rank of a test, run as a program: `trainer_rank.py WHAT RANK WORLD FOLDER`; ranks meet in a file there."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trainer_runs
from safetensors.torch import save_file

from eosin.pretrain import checkpoint, engine, parallel
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.groups import parameter_groups
from eosin.pretrain.trainer import pretrain


def one_step(config: PretrainConfig, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Make one step of plain gradient descent on this rank's share of one batch; return all weights after it."""
    made = engine.build(config, classes={}, steps=4, device=torch.device("cpu"))
    heads = {name: module for name, module in made.student.parts().items() if name != "encoder"}
    groups = parameter_groups(made.student.branch.encoder, heads)
    made = dataclasses.replace(made, optimizer=torch.optim.SGD(groups, lr=config.lr))
    crops = trainer_runs.part_of(trainer_runs.crops_of(config), rank, world)
    stepped = engine.optimiser_step(made, 0, lambda _: crops)
    parts = torch.stack([stepped.parts[name] for name in sorted(stepped.parts)])
    if world > 1:
        dist.all_reduce(parts)
    norms = {f"norm/{name}": norm.detach().clone() for name, norm in stepped.norms.items()}
    found = {"student": made.student, "teacher": made.teacher, "targets": made.targets}
    if made.guide is not None:
        found["moments"] = made.guide.moments
    state = {f"{of}/{k}": v.clone() for of, module in found.items() for k, v in parallel.whole_state(module).items()}
    return {"losses": parts / world, **norms, **state}


def main(what: str, rank: int, world: int, folder: Path) -> None:
    """Do what was asked on one rank."""
    os.chdir(folder)
    config = trainer_runs.small(folder / "tiles.npy", **RUNS[what])
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        dist.init_process_group("gloo", init_method=f"file://{folder / f'meet-{what}'}", rank=rank, world_size=world)
    if what.startswith("step"):
        state = one_step(config, rank, world)
        if rank == 0:
            save_file(state, folder / f"{what}-{world}.safetensors")
    else:
        if what == "killed":
            finish, kill_at = checkpoint._finish, 4

            def killed(unfinished: Path, target: Path, *rest: Any) -> None:
                if target.name.endswith(str(kill_at)):
                    os.kill(os.getpid(), signal.SIGKILL)
                finish(unfinished, target, *rest)

            checkpoint._finish = killed
        source = trainer_runs.source(config, rank=rank, world=world)
        pretrain(config, folder / ("run" if what == "killed" else what), device="cpu", source=source)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


STEP = {
    "model__drop_path": 0.0,
    "optimizer__lr": 0.01,
    "optimizer__clip": 0.0,
    "schedule__warmup": 0.0,
    "schedule__momentum": [0.9, 0.9],
    "objective__koleo": 0.1,
}
LORA = {**STEP, "run__weights": "base.safetensors", "run__lora_rank": 4}
DISTIL = {
    **STEP,
    "objective__method": "distil",
    "objective__features": {"cls": 1.0, "patches": 1.0},
    "run__teacher": "base.safetensors",
}
SAVED = {"budget__steps": 6, "run__save_every": 2, "watch__log_every": 2}
RUNS = {
    "step": STEP,
    "step-ema": {**STEP, "objective__centring": "ema", "objective__own_ibot_head": False},
    "step-sharded": {**STEP, "run__shard": True},
    "step-lora": LORA,
    "step-lora-sharded": {**LORA, "run__shard": True},
    "step-distil-sharded": {**DISTIL, "run__shard": True},
    "ranks": SAVED,
    "killed": SAVED,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    sys.stderr.flush()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in the usual way
