"""What tells whether training works: monitors of collapse, the verdict on them, and the log of a run."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eosin.encoders.ranks import gather_rows
from eosin.errors import CollapseError
from eosin.pretrain.config import PretrainConfig

METRICS = "metrics.jsonl"
PATIENCE = 3
ALIKE = 0.02
"""Features spread less than this share of what is healthy: every image looks the same to the encoder."""
EMPTY = 1e-3
"""Teacher's distributions tell images apart by less than this share of what they could."""
CLEARLY = 5.0
GATHERED_ROWS = 4096


# Monitors.


@torch.no_grad()
def feature_monitors(cls: Tensor) -> dict[str, float]:
    """Return how spread the class tokens (n, D) of n images are.

    - cosine: mean over pairs of different images; 1 after collapse.
    - feature_std: mean over dimensions of the standard deviation of unit vectors, times sqrt(D); about 1 when they fill
      the sphere, 0 after collapse (SimSiam, Chen & He 2021, section 4.1).
    - rankme: exp of the entropy of the normalised singular values, the number of dimensions in use (Garrido et al.
      2023, equation 1); at most min(n, D).
    """
    z = F.normalize(cls.float(), dim=-1)
    n, dim = z.shape
    values = torch.linalg.svdvals(cls.double())
    share = values / values.sum().clamp(min=1e-12) + 1e-7
    pairs = (z.sum(dim=0).square().sum() - z.square().sum()) / max(n * (n - 1), 1)
    return {
        "cosine": float(pairs),
        "feature_std": float(z.std(dim=0, correction=0).mean() * math.sqrt(dim)),
        "rankme": float(torch.exp(-(share * share.log()).sum())),
    }


@torch.no_grad()
def target_monitors(targets: Tensor) -> dict[str, float]:
    """Return how the teacher's distributions (n, K) use the prototypes.

    - teacher_entropy: of the mean distribution, over log K; 1 when all prototypes are used alike.
    - target_entropy: mean entropy of a single distribution, over log K; 1 when they say nothing.
    - information: mean Kullback-Leibler divergence of a distribution to the mean, over the most that n rows and K
      prototypes allow; 0 when every image gets the same one (DINO, Caron et al. 2021, section 5.3).
    - prototypes: number of prototypes that are the largest of some image.
    """
    p = targets.float()
    n, k = p.shape
    mean = p.mean(dim=0)
    of_mean = float(torch.special.entr(mean).sum())
    of_each = float(torch.special.entr(p).sum(dim=1).mean())
    most = math.log(min(n, k)) if min(n, k) > 1 else 1.0
    return {
        "teacher_entropy": of_mean / math.log(k),
        "target_entropy": of_each / math.log(k),
        "information": (of_mean - of_each) / most,
        "prototypes": float(len(p.argmax(dim=1).unique())),
    }


@torch.no_grad()
def monitors(cls: Tensor, targets: Mapping[str, Tensor]) -> dict[str, float]:
    """Return all monitors of one micro-step, over the rows of all ranks; every rank calls it.

    Args:
        cls: (B, D) class tokens of the teacher on this rank, one view of every tile.
        targets: (2 B, K) of "dino", and others, which are not looked at.
    """
    found = feature_monitors(gather_rows(cls)[:GATHERED_ROWS])
    if "dino" in targets:
        found |= target_monitors(gather_rows(targets["dino"])[:GATHERED_ROWS])
    return found


# Verdict.


def collapse_of(history: Sequence[Mapping[str, float]], *, settled: bool) -> str | None:
    """Return what the last `PATIENCE` monitors show of a collapse, in words, or None.

    An untrained encoder sees all images alike too. So it is a collapse when the features once told images apart, or
    when training had the time to make them do so.

    Args:
        history: monitors of all logged steps, the newest last.
        settled: whether that time is over.
    """
    last = history[-PATIENCE:]
    if len(last) < PATIENCE:
        return None
    now, before = last[-1], history[:-PATIENCE]
    if all(one["feature_std"] < ALIKE for one in last) and (settled or _was(before, "feature_std", ALIKE)):
        return (
            f"every image gets almost the same features (mean cosine {now['cosine']:.4f}, spread "
            f"{now['feature_std']:.3f} of a healthy 1)"
        )
    one_for_all = all(one.get("information", 1.0) < EMPTY and one["target_entropy"] < 0.5 for one in last)
    if one_for_all and (settled or _was(before, "information", EMPTY)):
        return f"the teacher gives every image the same {now['prototypes']:.0f} prototype(s) of all"
    return None


def flat_of(history: Sequence[Mapping[str, float]], *, settled: bool) -> str | None:
    """Return a warning when the teacher's targets say nothing though it had time to learn, or None.

    The loss of the class tokens then stays at log K. Other parts may go on teaching, so the run is not ended.
    """
    last = history[-PATIENCE:]
    flat = [one.get("information", 1.0) < EMPTY and one["target_entropy"] > 0.5 for one in last]
    if not settled or len(last) < PATIENCE or not all(flat):
        return None
    return (
        f"the teacher's targets are uniform (information {last[-1]['information']:.1e}): the dino loss stays at log K "
        "and teaches nothing. Lower schedule.temperature, optimizer.lr or objective.prototypes, or raise run.batch"
    )


def _was(before: Sequence[Mapping[str, float]], name: str, limit: float) -> bool:
    """Return whether a monitor was ever clearly above its limit."""
    return any(one.get(name, 0.0) > CLEARLY * limit for one in before)


def collapse_error(config: PretrainConfig, step: int, what: str, saved: str) -> CollapseError:
    """Return the error that ends a collapsed run, naming what to change."""
    of = config.objective
    spread = "objective.kde (Virchow2 has 0.05)" if of.kde == 0 else f"objective.kde (now {of.kde:g})"
    return CollapseError(
        f"training collapsed by step {step}: {what}, at {PATIENCE} logged steps in a row. Change one of: lower "
        f"optimizer.lr (now {config.lr:.2e} at the peak), raise {spread}, raise run.batch (now {config.run.batch}), "
        f"lower schedule.temperature (now {list(config.schedule.temperature)}), or lengthen schedule.warmup. {saved}; "
        "watch.stop_on_collapse = false goes on regardless"
    )


# Log.


class Log:
    """`metrics.jsonl`, one line a record, and TensorBoard where it is installed.

    Args:
        folder: of the run.
        step: optimiser steps the run resumes from: later lines of an interrupted run are taken off, for their steps
            will be made again.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        self.path = folder / METRICS
        self.rows = [row for row in read_log(folder) if row["step"] <= step]
        kept = "".join(_line(row) for row in self.rows)
        self.path.write_text(kept, encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a record: `step`, and numbers or nested mappings of numbers."""
        self.rows.append(dict(row))
        self._file.write(_line(row))
        self._file.flush()
        if self._board is not None:
            for name, value in _flat(row):
                self._board.add_scalar(name, value, row["step"])

    def recent(self, part: str, count: int) -> list[Mapping[str, Any]]:
        """Return the last `count` values of `part` among the records that have it, oldest first."""
        return [row[part] for row in self.rows if part in row][-count:]

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's `metrics.jsonl`, without a last line that a killed run left half written."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _flat(row: Mapping[str, Any], lead: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{lead}{key}/")
        elif isinstance(value, int | float) and key != "step":
            found.append((lead + key, float(value)))
    return found


def _tensorboard(folder: Path, step: int) -> Any:
    """Return a writer, or None where TensorBoard is not installed."""
    try:
        board = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    return board.SummaryWriter(str(folder), purge_step=step + 1 if step else None)
