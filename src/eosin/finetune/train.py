"""Training of one fold: seeded by fold, epoch, step and rank, so that a stopped run goes on bit by bit on a CPU.

Several ranks each take a share of every batch, and their gradients are added up: the loss is that of one process.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); linear warm-up and half a cosine; a moving average of what trains,
which is what is judged and kept; the epoch of the best AUROC on the fold's stopping part wins (ties: the lower loss).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from torch import Tensor, nn

from eosin.encoders.ranks import all_reduce_, rank, sum_gradients, world_size
from eosin.errors import CheckpointError, ConfigError, NonFiniteError, PredictionsError, StainError
from eosin.evaluation.metrics import auroc, balanced_accuracy
from eosin.features.recipe import canonical_json
from eosin.finetune.augment import augment, stain_bank
from eosin.finetune.cells import CellTable
from eosin.finetune.classifier import parameter_groups
from eosin.finetune.folds import Fold
from eosin.finetune.infer import Input, Tta, tile_logits, to_images
from eosin.finetune.losses import LossConfig, loss_rows, mean_loss, training_loss
from eosin.finetune.mix import mix_batch, mixed_loss
from eosin.finetune.quicker import quicker
from eosin.finetune.recipe import FinetuneConfig
from eosin.finetune.resume import load_optimizer, load_state, optimizer_tensors, save_state
from eosin.finetune.sampler import balanced_weights, epoch_rows, sampling_groups
from eosin.finetune.saving import Model, load_trained_state, trained_state
from eosin.finetune.weights import domain_weights
from eosin.stain import StainTarget

STATE = "state.safetensors"
# Counts of the moving average's first steps: it follows closely until it has seen some.
EMA_START = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What is told after every epoch.

    Attributes:
        fold: its name.
        epoch: epochs made.
        epochs: the most there may be.
        loss: mean training loss of the epoch.
        auroc: on the stopping part.
        ba: balanced accuracy there, at 0.5.
        domains: (domain, cells, balanced accuracy or None), of the stopping part.
        tiles_per_s: trained tiles a second.
    """

    fold: str
    epoch: int
    epochs: int
    loss: float
    auroc: float
    ba: float
    domains: tuple[tuple[str, int, float | None], ...]
    tiles_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How the training of one fold went; its model holds the best epoch's moving average.

    Attributes:
        history: a mapping an epoch: epoch, loss, lr, stop_loss, auroc, ba, domains.
        best_epoch: from 1.
        stopped_early: whether patience ended it.
        notes: what the reader should know.
    """

    history: tuple[Mapping[str, Any], ...]
    best_epoch: int
    stopped_early: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Job:
    """One fold to train.

    Attributes:
        cells: the table.
        tiles: uint8 (n, S, S, 3), one a cell.
        fold: row numbers of both.
        config: the recipe.
        how: tiles become inputs.
        device: "cpu", "cuda" ...
        precision: "fp32" or "bf16".
        unlabelled: row numbers of cells whose label says nothing; a lesson is taught on them.
    """

    cells: CellTable
    tiles: npt.NDArray[np.uint8]
    fold: Fold
    config: FinetuneConfig
    how: Input
    device: str = "cpu"
    precision: str = "fp32"
    unlabelled: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def identity(self, model: Model, lesson: Lesson | None = None) -> str:
        """Return a hash of all that decides the numbers of this fold."""
        rows = (self.fold.train, self.fold.stop, self.cells.label, self.cells.soft)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in rows))
        digest.update("|".join([*self.cells.file.tolist(), *self.cells.domain.tolist()]).encode())
        digest.update(
            canonical_json([self.config.hash, [branch.spec.weights_hash for branch in model.branches]]).encode()
        )
        if lesson is not None:
            digest.update(np.ascontiguousarray(self.unlabelled).tobytes())
            digest.update(lesson.identity.encode())
        return digest.hexdigest()


class Lesson(Protocol):
    """What a model is taught beside the labels, such as a teacher's answers.

    Attributes:
        identity: a hash of all that decides what it says.
        label_share: how much the loss of the labels counts beside it.
        module: what trains with the model, and is thrown away after.
    """

    identity: str
    label_share: float
    module: nn.Module

    def __call__(self, model: Model, given: Tensor, seen: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return the model's logits (B, 1) and the lesson's loss of each row (B,).

        Args:
            model: that learns.
            given: its input, normalised (B, 3, s, s).
            seen: the same augmented images in 0-1, (B, 3, S, S).
        """
        ...


def train_fold(
    model: Model,
    job: Job,
    *,
    folder: Path | None = None,
    progress: Callable[[Status], None] | None = None,
    lesson: Lesson | None = None,
) -> Trained:
    """Train a model on one fold, and leave the best epoch's moving average in it.

    Args:
        model: on the job's device, newly built.
        job: what to train on.
        folder: where the state is kept after every epoch, to go on from; None keeps none.
        progress: told after every epoch.
        lesson: what is taught beside the labels; None is nothing.

    Raises:
        ConfigError: cells without a label, and no lesson to teach on them.
        NonFiniteError: NaN or infinity in the loss or the gradient; names the cells of the batch.
        CheckpointError: the folder holds the state of another fold or recipe, or a damaged one.
    """
    if len(job.unlabelled) and lesson is None:
        raise ConfigError(f"{len(job.unlabelled)} cells without a label need a teacher; leave them out")
    run = FoldRun(model, job, lesson)
    path = None if folder is None else folder / STATE
    if path is not None and path.is_file():
        run.restore(path)
    with _private_random(job.device), quicker(model, job.how, device=job.device, precision=job.precision):
        while not run.finished:
            begun = time.perf_counter()
            row = run.epoch()
            seconds = time.perf_counter() - begun
            if path is not None:
                run.save(path)
            if progress is not None:
                progress(run.status(row, seconds))
    load_trained_state(model, run.best)
    best = max(run.history, key=lambda row: row["best"])["epoch"]
    return Trained(
        history=tuple(run.history), best_epoch=best, stopped_early=run.stale >= job.config.patience, notes=run.notes
    )


class FoldRun:
    """What one fold needs from step to step."""

    def __init__(self, model: Model, job: Job, lesson: Lesson | None) -> None:
        self.model, self.job, self.lesson = model, job, lesson
        config, rows, cells = job.config, job.fold.train, job.cells
        self.groups = sampling_groups(cells.label[rows], cells.domain[rows], sampling=config.sampling)
        weights = domain_weights(cells.domain[rows], cells.label[rows], kind=config.domain_weights)
        self.rows = np.concatenate((rows, job.unlabelled))
        # A mean of 1 over all rows that are shown, 0 where there is no label.
        labelled = balanced_weights(weights.rows, self.groups) * (len(self.rows) / len(rows))
        self.weights = np.concatenate((labelled, np.zeros(len(job.unlabelled))))
        self.targets = (cells.soft if config.soft_labels else cells.label)[self.rows].astype(np.float32)
        self.notes = tuple(f"{g.domain}: {g.note}" for g in weights.groups if g.note)
        self.bank = self._bank()
        decay = config.layer_decay if config.adapt.mode in ("last", "full") else 1.0
        groups = parameter_groups(model, lr=config.lr, weight_decay=config.weight_decay, layer_decay=decay)
        self.optimizer = torch.optim.AdamW([*groups, *self._lesson_groups()])
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.steps_an_epoch = math.ceil(len(self.rows) / config.batch)
        self.average = {name: value.clone() for name, value in trained_state(model).items()}
        self.best = {name: value.clone() for name, value in self.average.items()}
        self.history: list[dict[str, Any]] = []
        self.stale = 0

    def _lesson_groups(self) -> list[dict[str, Any]]:
        """Return what of the lesson trains, as a group of the optimiser; the model's moving average leaves it out."""
        named = [] if self.lesson is None else list(self.lesson.module.named_parameters())
        if not named:
            return []
        config, (names, params) = self.job.config, zip(*named, strict=True)
        told = [f"lesson.{name}" for name in names]
        return [{"params": list(params), "lr": config.lr, "weight_decay": config.weight_decay, "names": told}]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the training rows of an epoch in order: the labelled ones balanced, each other one once."""
        order = epoch_rows(self.groups, seed=self.job.config.seed, epoch=epoch)
        if not len(self.job.unlabelled):
            return order
        rng = np.random.default_rng((self.job.config.seed, epoch, 1))
        return rng.permutation(np.concatenate((order, np.arange(len(self.groups), len(self.rows)))))

    def _bank(self) -> tuple[StainTarget, ...]:
        """Return the references that random normalisation draws from, one a training domain."""
        config, rows = self.job.config.augment, self.job.fold.train
        if config is None or "stain" not in config.families or not config.macenko_chance:
            return ()
        try:
            bank = stain_bank(self.job.tiles[rows], self.job.cells.domain[rows])
        except StainError as error:
            raise StainError(f"{self.job.fold.name}: {error}, with --without stain") from error
        self.notes += tuple(f"{domain}: no stain reference ({why})" for domain, why in bank.left_out)
        return bank.targets

    @property
    def finished(self) -> bool:
        """Whether the last epoch was made, or patience has run out."""
        return len(self.history) >= self.job.config.epochs or self.stale >= self.job.config.patience

    def epoch(self) -> dict[str, Any]:
        """Train one epoch, judge it, and return its row of the history."""
        config, at = self.job.config, len(self.history)
        self.model.train()
        order = self._order(at)
        losses = []
        for step in range(self.steps_an_epoch):
            losses.append(self.step(order[step * config.batch : (step + 1) * config.batch], epoch=at, step=step))
        row = {
            "epoch": at + 1,
            "loss": float(np.mean(losses)),
            "lr": self._factor(at + 1, 0) * config.lr,
            **self._judge(),
        }
        row["best"] = [row["auroc"], -row["stop_loss"]]
        if not self.history or row["best"] > max(one["best"] for one in self.history):
            self.best = {name: value.clone() for name, value in self.average.items()}
            self.stale = 0
        else:
            self.stale += 1
        self.history.append(row)
        return row

    def step(self, chosen: npt.NDArray[np.int64], *, epoch: int, step: int) -> float:
        """Make one optimiser step on the training rows `chosen`, each rank on its share; return its loss."""
        job, config = self.job, self.job.config
        seed = int(np.random.SeedSequence((config.seed, epoch, step, rank())).generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        mine = chosen[rank() :: world_size()]
        share = len(mine) / len(chosen)
        if not share:  # fewer rows than ranks: one that counts nothing
            mine = chosen[:1]
        names = job.cells.file[self.rows[mine]].tolist()
        loss = share * self._loss(mine, generator, names)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        sum_gradients(self._parameters())
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), config.clip)
        if not bool(norm.isfinite()):
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise NonFiniteError(
                f"{job.fold.name}, epoch {epoch + 1}, step {step + 1}: the gradient is NaN or infinite; the batch is "
                f"{shown}. Lower the learning rate ({config.lr:g}), or use precision fp32"
            )
        factor = self._factor(epoch, step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        self._follow(epoch * self.steps_an_epoch + step)
        return float(all_reduce_(loss.detach()))

    def _loss(self, chosen: npt.NDArray[np.int64], generator: torch.Generator, names: list[str]) -> Tensor:
        job, config = self.job, self.job.config
        tiles = job.tiles[self.rows[chosen]]
        if config.augment is None:
            images = to_images(tiles, job.device)
        else:
            pixels = torch.from_numpy(tiles).to(job.device).permute(0, 3, 1, 2)
            images = augment(pixels, config.augment, generator=generator, bank=self.bank)
        targets = torch.from_numpy(self.targets[chosen]).to(job.device)
        weights = torch.from_numpy(self.weights[chosen]).to(job.device)
        mixed = None if config.mix is None else mix_batch(images, config.mix, generator=generator)
        seen, taught = images if mixed is None else mixed.images, None
        with torch.autocast(torch.device(job.device).type, torch.bfloat16, enabled=job.precision == "bf16"):
            if self.lesson is None:
                logits = self.model(job.how.prepare(seen))
            else:
                logits, taught = self.lesson(self.model, job.how.prepare(seen), seen)
        if mixed is not None:
            loss = mixed_loss(logits, targets, mixed, config.loss, weights=weights, names=names)
        else:
            loss = training_loss(logits, targets, config.loss, weights=weights, names=names)
        if self.lesson is None or taught is None:
            return loss
        return self.lesson.label_share * loss + mean_loss(taught, names=names)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _factor(self, epoch: int, step: int) -> float:
        """Return the share of the peak learning rate at a step: up a line, down half a cosine."""
        total = self.steps_an_epoch * self.job.config.epochs
        return schedule(epoch * self.steps_an_epoch + step, steps=total, warmup=self.job.config.warmup)

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        momentum = min(self.job.config.ema, (1 + step) / (EMA_START + step))
        for name, value in trained_state(self.model).items():
            self.average[name].lerp_(value, 1 - momentum)

    def _judge(self) -> dict[str, Any]:
        """Return loss, AUROC and balanced accuracy of the moving average on the stopping part."""
        job, rows = self.job, self.job.fold.stop
        with _holding(self.model, self.average):
            logits = shared_logits(self.model, job.tiles[rows], job.how, device=job.device, precision=job.precision)
        label, p = job.cells.label[rows].astype(np.int64), expit(logits)
        loss = loss_rows(torch.from_numpy(logits), torch.from_numpy(label.astype(np.float64)), _plain(job.config.loss))
        return {
            "stop_loss": float(loss.mean()),
            "auroc": auroc(label, p),
            "ba": balanced_accuracy(label, p),
            "domains": [list(one) for one in domain_scores(label, p, job.cells.domain[rows])],
        }

    def status(self, row: Mapping[str, Any], seconds: float) -> Status:
        """Return what is told of an epoch."""
        return Status(
            fold=self.job.fold.name,
            epoch=row["epoch"],
            epochs=self.job.config.epochs,
            loss=row["loss"],
            auroc=row["auroc"],
            ba=row["ba"],
            domains=tuple((name, n, ba) for name, n, ba in row["domains"]),
            tiles_per_s=len(self.rows) / seconds,
        )

    def save(self, path: Path) -> None:
        """Write all that the next epoch needs; the first rank does, for all hold the same."""
        if rank():
            return
        parts = {"model": trained_state(self.model), "average": self.average, "best": self.best}
        parts["adam"] = optimizer_tensors(self.optimizer)
        parts["lesson"] = {} if self.lesson is None else self.lesson.module.state_dict()
        tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        about = {"identity": self.job.identity(self.model, self.lesson), "history": self.history, "stale": self.stale}
        save_state(path, tensors, about)

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            CheckpointError: it is of another fold, recipe, table or encoder, or damaged.
        """
        tensors, about = load_state(path)
        if about["identity"] != self.job.identity(self.model, self.lesson):
            raise CheckpointError(
                f"{path} is of another recipe, table, fold or encoder; write to another folder, or delete it"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "best": {}, "adam": {}, "lesson": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        load_trained_state(self.model, parts["model"])
        load_optimizer(self.optimizer, parts["adam"])
        if self.lesson is not None:
            self.lesson.module.load_state_dict(parts["lesson"])
        for own, kept in ((self.average, parts["average"]), (self.best, parts["best"])):
            for name, value in own.items():
                value.copy_(kept[name])
        self.history, self.stale = about["history"], about["stale"]


def shared_logits(
    model: Model, tiles: npt.NDArray[np.uint8], how: Input, *, device: str, precision: str, tta: Tta = "none"
) -> npt.NDArray[np.float64]:
    """Return what `tile_logits` does, each rank computing its share, and every rank given all."""
    mine = slice(rank(), None, world_size())
    found = torch.zeros(len(tiles), dtype=torch.float64)
    found[mine] = torch.from_numpy(tile_logits(model, tiles[mine], how, tta=tta, device=device, precision=precision))
    return all_reduce_(found.to(device)).cpu().numpy()


def schedule(step: int, *, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate at a step: linear to 1 over the warm-up, then half a cosine to 0.

    Args:
        step: from 0.
        steps: of the whole run.
        warmup: share of the steps.
    """
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def domain_scores(
    label: npt.NDArray[np.int64], p: npt.NDArray[np.float64], domain: npt.NDArray[np.str_], *, threshold: float = 0.5
) -> list[tuple[str, int, float | None]]:
    """Return (domain, cells, balanced accuracy) of each domain, None where it has one class only."""
    out = []
    for name in np.unique(domain).tolist():
        rows = domain == name
        try:
            found = balanced_accuracy(label[rows], p[rows], threshold=threshold)
        except PredictionsError:
            found = None
        out.append((name, int(rows.sum()), found))
    return out


def _plain(config: LossConfig) -> LossConfig:
    """Return a loss without the class factors, which would judge another share of classes than there is."""
    return LossConfig(gamma=config.gamma)


@contextlib.contextmanager
def _holding(model: Model, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other trained values into a model for a while."""
    own = {name: value.clone() for name, value in trained_state(model).items()}
    load_trained_state(model, state)
    try:
        yield
    finally:
        load_trained_state(model, own)


@contextlib.contextmanager
def _private_random(device: str) -> Iterator[None]:
    """Leave the caller's random numbers as they were."""
    kind = torch.device(device)
    with torch.random.fork_rng(devices=[kind.index or 0] if kind.type == "cuda" else []):
        yield
