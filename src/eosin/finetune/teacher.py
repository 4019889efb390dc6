"""A finished run as a teacher: fold by fold, so that what the student says out of fold stays honest.

The student has the folds of its teacher, and the student of fold k is taught by the teacher of fold k alone, which has
seen no slide of that fold's test part; a mean over the folds would have seen them all. So out of fold there is no
ensemble to distil: the teacher of a fold is one model. It is checked that the table and the folds are the teacher's,
and that its model of a fold gives the out-of-fold predictions that its run kept. Neither the teacher's temperature nor
its threshold is used: they come from the labels of every fold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.errors import CheckpointError, CohortError, ConfigError
from eosin.finetune.cells import TEXT_FIELDS, CellTable
from eosin.finetune.distil import DistilConfig, Distillation
from eosin.finetune.folds import Fold
from eosin.finetune.infer import ENSEMBLE, MODEL, Ensemble, combine, load_classifier, tile_logits
from eosin.finetune.recipe import FinetuneConfig
from eosin.finetune.saving import Model, read_saved
from eosin.finetune.train import Job

OUT_OF_FOLD = "out-of-fold.csv"
# Test cells of a fold on which its teacher must say what it said; P may differ so much on another device.
CHECKED, TOLERANCE = 16, 0.02
# What the recipe of a student takes from its teacher's: all that decides the folds.
_OF_FOLDS = ("folds", "leave_out", "stop_share", "seed")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Teacher:
    """A finished run of `eosin finetune`, of which each fold teaches one fold of the student.

    Attributes:
        folder: of the run.
        run: its record, `run.json`.
        folds: names of its folds, in order.
        said: its out-of-fold predictions, a row a cell in the order of the table.
        hashes: of what each fold trained.
        config: what the student learns from.
        unlabelled: cells that only the teacher speaks of, with their tiles; None is none.
    """

    folder: Path
    run: Mapping[str, Any]
    folds: tuple[str, ...]
    said: pd.DataFrame
    hashes: tuple[str, ...]
    config: DistilConfig
    unlabelled: tuple[CellTable, npt.NDArray[np.uint8]] | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What the student's record says of it; another teacher is another run."""
        more = 0 if self.unlabelled is None else len(self.unlabelled[0])
        told = {"teacher": self.run["encoder"], "teacher_weights": self.run["weights_hash"]}
        return {"distillation": {**asdict(self.config), **told, "folds": list(self.hashes), "unlabelled": more}}

    def student_config(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return a recipe with the folds of the teacher's."""
        return replace(config, **{name: self.run["recipe"][name] for name in _OF_FOLDS})

    @property
    def external(self) -> tuple[str, str] | None:
        """Which cells the teacher never trained on: the student does not, either."""
        named = self.run["external"]
        if named is None:
            return None
        field, _, value = named.partition("=")
        return field, value

    def check(self, cells: CellTable, folds: Sequence[Fold]) -> None:
        """Raise as `teach` does, for a whole table, before anything is trained or written."""
        self._check_table(cells)
        for at, fold in enumerate(folds):
            self._check_fold(fold, at)

    def teach(self, at: int, job: Job, student: Model) -> tuple[Job, Distillation]:
        """Return the job of one fold, with the unlabelled cells it may see, and what its own teacher says.

        Args:
            at: number of the fold, from 0.
            job: of this fold of the student.
            student: that will learn.

        Raises:
            CohortError: the table is not the teacher's.
            ConfigError: its folds are not.
            CheckpointError: the teacher's model of this fold does not say what the run kept.
        """
        self._check_table(job.cells)
        self._check_fold(job.fold, at)
        model = load_classifier(self.folder, device=job.device, folds=(at,))
        self._check_answers(model, job)
        lesson = Distillation(student, model, self.config, identity=self.hashes[at], seed=job.config.seed)
        return self._with_unlabelled(job), lesson

    def _check_table(self, cells: CellTable) -> None:
        """Raise unless the cells are those that the teacher was tested on, with the same labels."""
        if len(cells) != len(self.said):
            raise CohortError(
                f"{self.folder.name} was trained on {len(self.said)} cells, the table has {len(cells)}; "
                "a student needs the table of its teacher"
            )
        for name, own in (("file", cells.file), ("dataset", cells.dataset), ("slide_id", cells.slide_id)):
            differ = np.flatnonzero(self.said[name].to_numpy(dtype=np.str_) != own)
            if len(differ):
                at = int(differ[0])
                raise CohortError(
                    f"the table is not that of {self.folder.name}: {len(differ)} cells have another {name}, such as "
                    f"row {at} with {str(own[at])!r} where the teacher had {str(self.said[name].iloc[at])!r}"
                )
        relabelled = int((self.said["atypical"].to_numpy() != cells.label).sum())
        if relabelled:
            raise CohortError(
                f"{relabelled} cells have another label than when {self.folder.name} was trained; train it anew"
            )

    def _check_fold(self, fold: Fold, at: int) -> None:
        """Raise unless the teacher of this number was tested on this fold's test cells."""
        name = self.folds[at] if at < len(self.folds) else "none"
        tested = np.flatnonzero(self.said["fold"].to_numpy(dtype=np.str_) == name)
        if name != fold.name or not np.array_equal(tested, np.sort(fold.test)):
            raise ConfigError(
                f"the folds are not those of {self.folder.name}: {fold.name} tests {len(fold.test)} cells, its fold "
                f"{at + 1} ({name}) {len(tested)}; a teacher that has seen the tested cells would tell their answers"
            )

    def _check_answers(self, model: Ensemble, job: Job) -> None:
        """Raise unless the model of this fold gives the out-of-fold predictions that were kept."""
        rows, one = job.fold.test[:CHECKED], model.models[0]
        tiles, where, precision = job.tiles[rows], model.device, model.precision
        logits = tile_logits(one, tiles, model.how, tta=model.tta, device=where, precision=precision)
        now = combine(logits, temperature=model.temperature, shift=model.shift).p
        kept = self.said["p_atypical"].to_numpy(dtype=np.float64)[rows]
        worst = float(np.abs(now - kept).max())
        if not worst <= TOLERANCE:
            raise CheckpointError(
                f"the model of {job.fold.name} in {self.folder} does not give the predictions in {OUT_OF_FOLD} (off by "
                f"{worst:.3f}): it is of another fold or run, or the pictures have changed; train the teacher anew"
            )

    def _with_unlabelled(self, job: Job) -> Job:
        """Return the job with those cells of no label that share neither slide nor picture with its held-out cells."""
        if self.unlabelled is None:
            return job
        more, tiles = self.unlabelled
        held = np.concatenate((job.fold.stop, job.fold.test))
        fine = apart(more, tiles, job.cells.take(held), job.tiles[held])
        cells, start = join(job.cells, more), len(job.cells)
        both = np.concatenate((job.tiles, tiles))
        return replace(job, cells=cells, tiles=both, unlabelled=start + np.flatnonzero(fine))


def read_teacher(folder: Path, config: DistilConfig) -> Teacher:
    """Return a finished run of `eosin finetune` as a teacher.

    Raises:
        CheckpointError: no such run, or one that is not finished or damaged.
    """
    model = folder / MODEL
    for path in (folder / "run.json", folder / "report.json", folder / OUT_OF_FOLD, model / ENSEMBLE):
        if not path.is_file():
            raise CheckpointError(
                f"{folder} is no finished run of eosin finetune: it has no {path.relative_to(folder)}; give its --out"
            )
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        told = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        files = json.loads((model / ENSEMBLE).read_text(encoding="utf-8"))["folds"]
        said = read_predictions(folder / OUT_OF_FOLD)
        teacher = Teacher(
            folder=folder,
            run={name: run[name] for name in ("recipe", "encoder", "weights_hash", "external")},
            folds=tuple(fold["name"] for fold in told["folds"]),
            said=said,
            hashes=tuple(read_saved(model / name).trained_hash for name in files),
            config=config,
        )
        predicted = set(said[["file", "dataset", "slide_id", "fold"]]["fold"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the run in {folder} is damaged ({error!r}); run eosin finetune again") from error
    if len(teacher.hashes) != len(teacher.folds) or predicted != set(teacher.folds):
        raise CheckpointError(
            f"{folder} tells of {len(teacher.folds)} folds, holds the models of {len(teacher.hashes)} and the "
            f"predictions of {len(predicted)}; run eosin finetune again"
        )
    return teacher


def read_predictions(path: Path) -> pd.DataFrame:
    """Return the predictions that a run kept, text as text, empty where it is empty.

    Raises:
        KeyError: a column is missing.
    """
    table = pd.read_csv(path, keep_default_na=False, dtype={"file": str, "dataset": str, "slide_id": str})
    return table.astype({"atypical": np.int64, "p_atypical": np.float64})


def apart(
    cells: CellTable, tiles: npt.NDArray[np.uint8], held: CellTable, held_tiles: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Return which cells share neither slide nor picture with those that are held out, (n,)."""
    known = {hash_of(tile) for tile in held_tiles}
    other = np.array([hash_of(tile) not in known for tile in tiles], dtype=np.bool_)
    return other & ~np.isin(cells.group_key(), held.group_key())


def hash_of(tile: npt.NDArray[np.uint8]) -> bytes:
    """Return a hash of the pixels of a tile."""
    return hashlib.sha256(np.ascontiguousarray(tile).tobytes()).digest()


def join(own: CellTable, more: CellTable) -> CellTable:
    """Return cells followed by others, for training from tiles that are read already."""
    names = (*TEXT_FIELDS, "label", "soft", "xy")
    columns = {name: np.concatenate((getattr(own, name), getattr(more, name))) for name in names}
    return CellTable(root=own.root, votes={}, notes=own.notes, **columns)
