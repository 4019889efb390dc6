"""The run: from a config to an encoder, watched, resumable, and stopped with a reason when it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eosin.encoders.ranks import all_reduce_, any_rank, on_ranks, rank, world_size
from eosin.errors import ConfigError, EosinError
from eosin.features.writer import write_durably
from eosin.pretrain import checkpoint, contact, engine, held_out, inputs, parallel, pretrain_page, watch
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.engine import Engine, Stepped
from eosin.pretrain.export import encoder_facts, export_encoder, prune
from eosin.pretrain.gauges import Clock, FirstBad, Stop
from eosin.pretrain.lora import merged, save_adapter
from eosin.pretrain.model import VisionTransformer
from eosin.pretrain.objective import check_batch
from eosin.pretrain.planner import plan
from eosin.pretrain.pretrain_page import PICTURES, RUN, SHEET
from eosin.pretrain.schedules import Budget
from eosin.pretrain.sources import AnySource
from eosin.pretrain.tables import differences
from eosin.version import __version__

log = logging.getLogger(__name__)

ENCODER, ENCODERS, CHECKPOINTS, REPORT = "encoder.safetensors", "encoders", "checkpoints", "report.html"
ADAPTER = "adapter.safetensors"
TEACHER_FACTS = ("name", "weights_hash", "dim", "patch_px", "licence", "source")
TIMED_STEPS, WARM_STEPS = 5, 2
SETTLING_STEPS = 5000
"""Steps after the warm-up in which an encoder may still see all images alike, as an untrained one does."""
PICTURED = 16
SHEET_TILES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How far a run is, for a progress bar.

    Attributes:
        step: optimiser steps made.
        steps: of the whole run.
        loss: of the last logged step.
        images_per_s: since the last logged step.
        wait: share of that time spent waiting for tiles.
    """

    step: int
    steps: int
    loss: float
    images_per_s: float
    wait: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run left.

    Attributes:
        out: its folder.
        step: optimiser steps made.
        budget: what ends the run.
        resumed_from: step this process began at.
        encoder: the teacher's weights, a file for `load_encoder`; None when the run was stopped before its end.
        report: the page.
        last: the last record of the log.
        probe: the last probe on held-out images, or None.
    """

    out: Path
    step: int
    budget: Budget
    resumed_from: int
    encoder: Path | None
    report: Path
    last: dict[str, Any]
    probe: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether the budget is used up."""
        return self.step >= self.budget.steps


Progress = Callable[[Status], None]


def pretrain(
    config: PretrainConfig,
    out: Path | str,
    *,
    device: str = "auto",
    source: AnySource | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train an encoder and return what was left in `out`; a run that was stopped goes on where its checkpoint is.

    `out` gets `run.json`, `metrics.jsonl`, `report.html`, `checkpoints/`, `encoders/` (one for each kept checkpoint)
    and, at the end, `encoder.safetensors`. SIGTERM and SIGINT end the run after the step under way, with a checkpoint.
    Under torchrun every rank calls this; all need `out` on one disk.

    Args:
        config: of the run.
        out: folder.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        source: tiles; None takes what `[data]` says.
        progress: called at each logged step, on the first rank.

    Raises:
        ConfigError: a batch too small for the objective, or a folder that holds another run.
        NonFiniteError: NaN or infinity in the loss or a gradient, with the part, the step and what to change.
        CollapseError: the features no longer tell images apart.
    """
    out = Path(out)
    with on_ranks(device) as place, _private_random(place), Stop() as stop:
        check_batch(config, world_size())
        _check_folder(out, config)
        opened = source or inputs.open_source(config, rank=rank(), world=world_size(), cache=out / "tissue")
        try:
            return _Run(config, out, place, opened, progress, stop).go()
        finally:
            if source is None:
                opened.close()


@contextlib.contextmanager
def _private_random(device: torch.device) -> Iterator[None]:
    """Leave the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        yield


def _check_folder(out: Path, config: PretrainConfig) -> None:
    """Refuse a folder that holds another run."""
    path = out / RUN
    if not path.is_file():
        return
    changed = differences(pretrain_page.read_run(out)["identity"], config.identity())
    if changed:
        raise ConfigError(
            f"{out} holds another run: {'; '.join(changed)}; take the old values to go on with it, or another --out"
        )


class _Run:
    """One process's share of a run: what every step needs, and what is done between steps."""

    def __init__(
        self,
        config: PretrainConfig,
        out: Path,
        device: torch.device,
        source: AnySource,
        progress: Progress | None,
        stop: Stop,
    ) -> None:
        self.config, self.out, self.device, self.source = config, out, device, source
        self.progress, self.stop = progress, stop
        self.first = rank() == 0
        factors = inputs.read_factors(config, source.slide_ids)
        for remark in factors.remarks:
            log.warning("%s", remark)
        self.maker = inputs.Maker(
            config=config, source=source, factors=factors, device=device, rank=rank(), world=world_size()
        )
        self.held = None
        if config.watch.probe is not None:
            self.held = held_out.read_held_out(Path(config.watch.probe), patch_px=config.model.patch_px)
        self.budget = self._budget()
        self.engine = self._build(self.budget.steps)
        cost = plan(config, world=world_size(), guide=self.engine.guide)
        self.clock, self.flops = Clock(device), sum(cost.flops_per_image.values())
        self.remarks, self.warned = factors.remarks, False

    def _build(self, steps: int) -> Engine:
        return engine.build(self.config, classes=self.maker.factors.classes, steps=steps, device=self.device)

    def _budget(self) -> Budget:
        """Return what ends the run; hours become steps once, by timed steps of an engine that is thrown away."""
        if self.config.budget.hours is None:
            return self.config.resolve_budget()
        if (self.out / RUN).is_file():
            return Budget(**pretrain_page.read_run(self.out)["budget"])
        trial = self._build(WARM_STEPS + TIMED_STEPS)
        clock, times = Clock(self.device), []
        for step in range(WARM_STEPS + TIMED_STEPS):
            clock.restart()
            engine.optimiser_step(trial, step, lambda index: self._crops(index, clock))
            times.append(clock.read()[0])
        seconds = torch.tensor(sorted(times[WARM_STEPS:])[TIMED_STEPS // 2])
        return self.config.resolve_budget(float(_mean_over_ranks(seconds, self.device)))

    def _crops(self, index: int, clock: Clock) -> Any:
        with clock.waiting():
            tiles, slide = self.maker.tiles(index)
        return self.maker.crops(index, tiles, slide)

    def go(self) -> Outcome:
        """Train to the end of the budget, or until a signal."""
        self.begun = time.time()
        start = self._resume()
        self.started, self.saved = start, start
        if self.first:
            self.log = watch.Log(self.out, step=start)
            self._write_run("running", start)
        step = start
        try:
            self._begin(start)
            step = self._train(start)
        except EosinError as error:
            if self.first:
                self._write_run(f"failed: {error}", step)
                self._page()
            raise
        finally:
            if self.first:
                self.log.close()
        finished = step >= self.budget.steps
        if self.first:
            self._write_run("finished" if finished else f"stopped by {self.stop.name}", step)
            self._page()
        return self._outcome(step, finished)

    def _resume(self) -> int:
        """Return the step to go on from, the newest checkpoint put back; 0 without one."""
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
        self.history: list[dict[str, float]] = []
        newest = checkpoint.latest_checkpoint(self.out / CHECKPOINTS)
        if newest is None:
            return 0
        self._check_teacher()
        rows = watch.read_log(self.out)
        restored = checkpoint.load_checkpoint(newest, self._parts(), config=self.config)
        if restored.budget.steps != self.budget.steps:
            self.budget = restored.budget
            self.engine = replace(self.engine, steps=restored.budget.steps)
        self.history = [row["monitors"] for row in rows if "monitors" in row and row["step"] <= restored.step]
        log.info("resumed from step %d of %d", restored.step, restored.budget.steps)
        return restored.step

    def _check_teacher(self) -> None:
        """Refuse to go on with another teacher of the same name."""
        guide = self.engine.guide
        if guide is not None and (self.out / RUN).is_file():
            was = pretrain_page.read_run(self.out)["teacher"]["weights_hash"]
            if was != guide.spec.weights_hash:
                raise ConfigError(
                    f"{self.config.run.teacher} has weights {guide.spec.weights_hash[:12]}, {self.out} was begun with "
                    f"{was[:12]}; put the old ones back, or take another --out"
                )

    def _parts(self) -> dict[str, Any]:
        return {**self.engine.parts(), "source": self.source}

    def _begin(self, start: int) -> None:
        """Leave the pictures and the probe of the untrained encoder."""
        if self.first and (start == 0 or self.held is None):
            self.shown = self.maker.tiles(0)[0][:PICTURED]
        if start:
            return
        if self.first:
            seed = self.config.run.seed
            contact.contact_sheet(self.shown[:SHEET_TILES], self.config.views, self.out / SHEET, seed=seed)
        self._look(0)

    def _train(self, start: int) -> int:
        """Make the steps from `start` on; return the number made in all."""
        watching, every = self.config.watch, self.config.run.save_every
        bad = FirstBad(self.device)
        self.clock.restart()
        images = 0
        for step in range(start, self.budget.steps):
            stepped = engine.optimiser_step(self.engine, step, lambda index: self._crops(index, self.clock))
            done, images = step + 1, images + self.config.images_per_step
            last = done == self.budget.steps
            stopped = any_rank(self.stop.name is not None, self.device)
            logged = done % watching.log_every == 0 or last or stopped
            saving = done % every == 0 or last or stopped
            bad.note(done, stepped)
            if logged or saving or self.device.type == "cpu":
                bad.check(self.config, self._saved_words())
            if logged:
                self._record(done, stepped, images)
                images = 0
            if done % watching.probe_every == 0 or last:
                self._look(done)
            if saving:
                self._save(done)
            if logged or saving or done % watching.probe_every == 0:
                self.clock.restart()
                images = 0
            if stopped:
                return done
        return self.budget.steps

    def _saved_words(self) -> str:
        return f"The checkpoint of step {self.saved} is whole" if self.saved else "There is no checkpoint yet"

    def _record(self, done: int, stepped: Stepped, images: int) -> None:
        """Log a step and judge it."""
        seconds, waited = self.clock.read()
        found = watch.monitors(stepped.cls, stepped.targets)
        values = {f.name: getattr(stepped.values, f.name) for f in stepped.values.__dataclass_fields__.values()}
        parts = {name: float(_mean_over_ranks(value, self.device)) for name, value in stepped.parts.items()}
        row = {
            "step": done,
            "images": done * self.config.images_per_step,
            "loss": parts.pop("total"),
            "parts": parts,
            "schedule": values,
            "monitors": found,
            "grad_norm": {name: float(norm) for name, norm in stepped.norms.items()},
            "images_per_s": images / seconds,
            "tflops": images / seconds * self.flops / 1e12,
            "wait": waited / seconds,
        }
        if self.first:
            self.log.write(row)
            if self.progress is not None:
                told = {"loss": row["loss"], "images_per_s": row["images_per_s"], "wait": row["wait"]}
                self.progress(Status(step=done, steps=self.budget.steps, **told))
        self._judge(done, found)

    def _judge(self, done: int, found: dict[str, float]) -> None:
        """Raise `CollapseError` when the last logged steps show one; every rank comes to the same verdict."""
        self.history.append(found)
        steps = self.budget.steps
        settled = round(self.config.schedule.warmup * steps) + min(steps // 4, SETTLING_STEPS)
        what = watch.collapse_of(self.history, settled=done > settled)
        if what is not None and self.config.watch.stop_on_collapse:
            raise watch.collapse_error(self.config, done, what, self._saved_words())
        flat = watch.flat_of(self.history, settled=done > settled)
        if flat is not None and not self.warned and self.first:
            self.warned = True
            log.warning("step %d: %s", done, flat)
            self.remarks = (*self.remarks, f"At step {done} {flat}.")

    def _look(self, done: int) -> None:
        """Probe the teacher on held-out images and picture its patches; the first rank works, the others wait."""
        encoder = self._whole_encoder()
        if not self.first:
            return
        tiles = self.shown if self.held is None else self.held.tiles
        patch, precision = self.config.model.patch_px, self.config.run.precision
        side = tiles.shape[2] // patch * patch
        tokens = held_out.tokens_of(encoder, tiles[:, :, :side, :side], self.config.views, precision=precision)
        shown = list(range(len(tiles)))
        if self.held is not None:
            shown = held_out.spread_rows(self.held.clusters, PICTURED)
            found = held_out.probe(tokens.cls.numpy(), self.held, seed=self.config.run.seed)
            self.log.write({"step": done, "images": done * self.config.images_per_step, "probe": found})
        picture = self.out / PICTURES / f"pca-{done:08d}.png"
        held_out.pca_picture(tokens.patches[shown], tiles[shown][:, :, :side, :side], picture)

    def _whole_encoder(self) -> VisionTransformer:
        """Return the teacher's encoder, complete on this rank; every rank calls it."""
        if not self.config.run.shard:
            return self.engine.teacher.encoder
        state = parallel.whole_state(self.engine.teacher.encoder)
        whole = VisionTransformer(self.config.model)
        if self.first:
            whole.load_state_dict(merged(state, self.config.run.lora))
        return whole.to(self.device)

    def _save(self, done: int) -> None:
        """Write a checkpoint and the teacher's encoder beside it; at the end the final encoder."""
        keep = self.config.run.keep
        checkpoint.save_checkpoint(
            self.out / CHECKPOINTS, self._parts(), step=done, config=self.config, budget=self.budget, keep=keep
        )
        self.saved = done
        state = parallel.whole_state(self.engine.teacher.encoder)
        if not self.first:
            return
        facts = encoder_facts(self.config, mpp=_mpp(self.config), step=done)
        folder = self.out / ENCODERS
        export_encoder(folder / f"step-{done:08d}.safetensors", state, self.config, facts)
        prune(folder, {path.name for path in (self.out / CHECKPOINTS).glob("step-*")})
        if done == self.budget.steps:
            export_encoder(self.out / ENCODER, state, self.config, facts)
            if self.config.run.lora is not None:
                told = {"weights": self.config.run.weights, "step": done, "config_hash": self.config.hash}
                save_adapter(self.out / ADAPTER, state, self.config.run.lora, told)

    def _write_run(self, status: str, step: int) -> None:
        """Write `run.json`: what ran, on what, and how it ended."""
        encoder, guide = self.engine.student.branch.encoder, self.engine.guide
        record = {
            "status": status,
            "step": step,
            "budget": {name: getattr(self.budget, name) for name in self.budget.__dataclass_fields__},
            "config": self.config.to_dict(),
            "identity": self.config.identity(),
            "hash": self.config.hash,
            "data": self.source.describe(),
            "teacher": None if guide is None else {name: getattr(guide.spec, name) for name in TEACHER_FACTS},
            "remarks": list(self.remarks),
            "ranks": world_size(),
            "device": str(self.device),
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
            "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            "versions": {"eosin": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "trained": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
            "seconds": round(time.time() - self.begun, 3),
            "resumed_from": self.started,
        }
        write_durably(self.out / RUN, pretrain_page.as_json(record))

    def _page(self) -> None:
        write_durably(self.out / REPORT, pretrain_page.page(self.out).encode())

    def _outcome(self, step: int, finished: bool) -> Outcome:
        rows = watch.read_log(self.out)
        probes = [row["probe"] for row in rows if "probe" in row]
        return Outcome(
            out=self.out,
            step=step,
            budget=self.budget,
            resumed_from=self.started,
            encoder=self.out / ENCODER if finished else None,
            report=self.out / REPORT,
            last=next((row for row in reversed(rows) if "loss" in row), {}),
            probe=probes[-1] if probes else None,
        )


def _mpp(config: PretrainConfig) -> tuple[float, ...]:
    if config.data.kind == "tiles":
        return () if config.data.slide_mpp is None else (config.data.slide_mpp,)
    return config.data.sample.mpp_values or config.data.sample.mpp


def _mean_over_ranks(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return all_reduce_(value.detach().float().to(device).clone()) / world_size()
