"""Batches of tiles from reader processes, ahead of their use. `Source` is what slides and tile files share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.errors import CohortError, EosinError, ReaderCrashError, SlideError
from eosin.features.readers import SENT_AHEAD, ReaderPool, ReaderState, Ticket
from eosin.pretrain.reads import Outcome
from eosin.pretrain.sampling import NEVER, Groups, HsvFilter

log = logging.getLogger(__name__)

MAX_ROUNDS = 64
MAX_CHUNK = 64
COUNTS = ("drawn", "tissue", "hsv", "unreadable")
_WARNED_ALONE = 20

Ints = npt.NDArray[np.int64]
ReadTiles = Callable[[ReaderState, Sequence[Any], int, HsvFilter | None, int], list[Outcome]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """How tiles are read.

    Attributes:
        workers: reader processes of this rank; 0 reads in this process, when the batch is asked for.
        prefetch: batches read ahead by the workers.
        rank: of this process.
        world: number of ranks.
    """

    workers: int = 0
    prefetch: int = 2
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            CohortError: a rank outside the world, or a negative number.
        """
        if not 0 <= self.rank < self.world:
            raise CohortError(f"rank {self.rank} of {self.world} ranks: ranks count from 0")
        if self.workers < 0 or self.prefetch < 0:
            raise CohortError(f"workers {self.workers} and prefetch {self.prefetch} must be 0 or more")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Batch:
    """Tiles and where they come from.

    Attributes:
        tiles: uint8 (B, 3, S, S).
        slide: int64 (B,) index into the source's `slide_ids`.
        mpp: float32 (B,) microns per pixel.
        xy: int64 (B, 2) level-0 top-left corner on a slide; offset of the crop in a larger tile.
    """

    tiles: Tensor
    slide: Tensor
    mpp: Tensor
    xy: Tensor


class Draw(NamedTuple):
    """One drawn tile.

    Attributes:
        unit: index of the slide or tile file.
        request: what the reader is asked.
        mpp: microns per pixel.
        skipped: positions without tissue drawn before each one in the request, and in all.
    """

    unit: int
    request: Any
    mpp: float
    skipped: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class _Sample:
    """A tile of a batch under way: its number, how often it was drawn anew, and the draw."""

    number: int
    draw: Draw
    outcome: Outcome = field(default_factory=lambda: Outcome(False))
    round: int = 0


@dataclass(kw_only=True, slots=True)
class _Part:
    samples: list[_Sample]
    slot: int
    ticket: Ticket


@dataclass(kw_only=True, slots=True)
class _Ahead:
    """A batch that readers work on."""

    step: int
    size: int
    parts: list[_Part]


class Source(ABC):
    """A stream of tiles; `batch` is a function of (seed, rank, world, step, size) and of the files.

    A unit (slide or tile file) that breaks is left out, with a warning, from the draw in which that was
    found on; what takes its place is drawn from the same group, so the result is still such a function.
    Stop the readers at the end: `close`, or a with statement.

    Args:
        slide_ids: names of the slides.
        tile_px: side of the tiles.
        seed: of all draws.
        hsv: filter on pixels.
        loading: workers, ranks.
    """

    _read: ReadTiles
    _unit_word: str

    def __init__(
        self, slide_ids: Sequence[str], *, tile_px: int, seed: int, hsv: HsvFilter | None, loading: Loading
    ) -> None:
        self.slide_ids, self.tile_px, self.seed, self.loading = tuple(slide_ids), tile_px, seed, loading
        self._hsv = hsv
        self._counts = np.zeros((len(self.slide_ids), len(COUNTS)), dtype=np.int64)
        self._lost_at = np.zeros(0, dtype=np.int64)
        self._reasons: dict[int, str] = {}
        self._pool: ReaderPool | None = None
        self._chunk = self._size = 0
        self._ahead: deque[_Ahead] = deque()

    def _set_units(self, groups: Groups, slide_of: Ints) -> None:
        """Take the units: their groups and the slide of each, (n,)."""
        self._groups, self._slide_of = groups, slide_of
        self._lost_at = np.full(len(slide_of), NEVER, dtype=np.int64)

    @abstractmethod
    def _draw(self, number: int, round_: int, lost: npt.NDArray[np.bool_]) -> Draw:
        """Draw sample `number` for the `round_`-th time from the units not lost."""

    @abstractmethod
    def _unit_name(self, unit: int) -> str:
        """Return what to call a unit in messages and in the state."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the source holds and has left out, as plain values."""

    def _still_broken(self, draw: Draw) -> str | None:
        """Return why a unit must be left out of which every position tried was unreadable, or None."""
        return None

    @property
    def excluded(self) -> dict[str, str]:
        """What was left out, and why."""
        return {self._unit_name(unit): reason for unit, reason in self._reasons.items()}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Per slide that was drawn: tiles `drawn`, positions rejected for `tissue`, `hsv`, or `unreadable`."""
        named = {name: row for name, row in zip(self.slide_ids, self._counts.tolist(), strict=True) if any(row)}
        return {name: dict(zip(COUNTS, row, strict=True)) for name, row in named.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know beside the step: what was left out when, and the counts."""
        lost = [[self._unit_name(u), int(self._lost_at[u]), reason] for u, reason in self._reasons.items()]
        return {"excluded": lost, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        unit_of = {self._unit_name(unit): unit for unit in range(len(self._lost_at))} if state["excluded"] else {}
        for name, step, reason in state["excluded"]:
            if name in unit_of:
                self._lost_at[unit_of[name]] = min(step, int(self._lost_at[unit_of[name]]))
                self._reasons[unit_of[name]] = reason
        row_of = {name: row for row, name in enumerate(self.slide_ids)}
        for name, counts in state["counts"].items():
            if name in row_of:
                self._counts[row_of[name]] = [counts[key] for key in COUNTS]
        self._drop_ahead()

    def batch(self, step: int, size: int) -> Batch:
        """Return the tiles of one step of this rank.

        Args:
            step: from 0; steps in order are read ahead, any other is as correct and slower.
            size: tiles, on this rank.

        Raises:
            CohortError: nothing is left to draw from, or `MAX_ROUNDS` draws of one tile failed.
            GeometryError: a tile file smaller than the tile.
        """
        if step < 0 or size < 1:
            raise CohortError(f"batch {step} of {size} tiles: steps count from 0 and a batch has at least 1 tile")
        if size != self._size:
            self._start(size)
        if self._ahead and self._ahead[0].step != step:
            self._drop_ahead()
        following = self._ahead[-1].step + 1 if self._ahead else step
        prefetch = self.loading.prefetch if self.loading.workers else 0
        try:
            for coming in range(following, step + prefetch + 1):
                self._ahead.append(self._send(coming))
            return self._collect(self._ahead.popleft())
        except EosinError:
            self.close()
            raise

    def _start(self, size: int) -> None:
        """Start readers whose slots hold the batches in flight, each split so that all of it is sent ahead."""
        self.close()
        workers, prefetch = self.loading.workers, self.loading.prefetch
        lanes = SENT_AHEAD * max(workers, 1)
        self._chunk = min(size, MAX_CHUNK, max(1, -(-size * max(prefetch, 1) // lanes))) if workers else size
        slots = -(-size // self._chunk) * ((prefetch if workers else 0) + 1) + 1
        self._pool = ReaderPool(workers=workers, slots=slots, slot_bytes=self._chunk * 3 * self.tile_px**2)
        self._size = size

    def _lost(self, before: int) -> npt.NDArray[np.bool_]:
        return self._lost_at < before

    def _send(self, step: int) -> _Ahead:
        assert self._pool is not None
        lost = self._lost(step)
        if lost.all():
            raise self._nothing_left()
        first = (step * self.loading.world + self.loading.rank) * self._size
        samples = [_Sample(number=n, draw=self._draw(n, 0, lost)) for n in range(first, first + self._size)]
        parts = [
            self._send_part(samples[at : at + self._chunk], self._pool.free.popleft())
            for at in range(0, self._size, self._chunk)
        ]
        return _Ahead(step=step, size=self._size, parts=parts)

    def _send_part(self, samples: list[_Sample], slot: int) -> _Part:
        assert self._pool is not None
        requests = [sample.draw.request for sample in samples]
        what = f"reading {len(samples)} tiles, among them of {self._unit_name(samples[0].draw.unit)}"
        return _Part(
            samples=samples,
            slot=slot,
            ticket=self._pool.submit(what, self._read, requests, self.tile_px, self._hsv, slot),
        )

    def _collect(self, ahead: _Ahead) -> Batch:
        assert self._pool is not None
        side = self.tile_px
        tiles = np.empty((ahead.size, 3, side, side), dtype=np.uint8)
        samples: list[_Sample] = []
        for part in ahead.parts:
            self._take_in(part, tiles[len(samples) : len(samples) + len(part.samples)])
            samples += part.samples
        failed = self._settle(ahead.step, range(ahead.size), samples)
        while failed:
            for index in failed:
                self._draw_again(samples[index], self._lost(ahead.step + 1))
            slot = self._pool.free.popleft()
            for at in range(0, len(failed), self._chunk):
                indices = failed[at : at + self._chunk]
                read = np.empty((len(indices), 3, side, side), dtype=np.uint8)
                self._take_in(self._send_part([samples[i] for i in indices], slot), read, keep_slot=True)
                tiles[indices] = read
            self._pool.free.append(slot)
            failed = self._settle(ahead.step, failed, samples)
        return Batch(
            tiles=torch.from_numpy(tiles),
            slide=torch.from_numpy(self._slide_of[[sample.draw.unit for sample in samples]]),
            mpp=torch.tensor([sample.draw.mpp for sample in samples], dtype=torch.float32),
            xy=torch.tensor([sample.outcome.xy for sample in samples], dtype=torch.int64),
        )

    def _draw_again(self, sample: _Sample, lost: npt.NDArray[np.bool_]) -> None:
        """Draw a sample anew: in the same round when its unit was lost, else in the next."""
        if not lost[sample.draw.unit]:
            sample.round += 1
        if sample.round >= MAX_ROUNDS:
            total = dict(zip(COUNTS, self._counts.sum(axis=0).tolist(), strict=True))
            raise CohortError(
                f"no tile was accepted in {MAX_ROUNDS} draws, the last from {self._unit_name(sample.draw.unit)}; so "
                f"far {total} (tiles drawn, positions rejected); loosen min_tissue or the hsv filter, or draw finer mpp"
            )
        sample.draw = self._draw(sample.number, sample.round, lost)

    def _take_in(self, part: _Part, tiles: npt.NDArray[np.uint8], *, keep_slot: bool = False) -> None:
        """Wait for a part, copy its pixels to `tiles`, and free its slot."""
        assert self._pool is not None
        shape = (len(part.samples), 3, self.tile_px, self.tile_px)
        try:
            outcomes = self._pool.result(part.ticket)
            tiles[:] = self._pool.slot(part.slot, shape)
        except (ReaderCrashError, SlideError) as error:
            outcomes = self._singly(part, tiles, str(error))
        for sample, outcome in zip(part.samples, outcomes, strict=True):
            sample.outcome = outcome
        if not keep_slot:
            self._pool.free.append(part.slot)

    def _singly(self, part: _Part, tiles: npt.NDArray[np.uint8], reason: str) -> list[Outcome]:
        """Read a part again tile by tile, because one of them killed its reader or broke in a new way."""
        if len(part.samples) == 1:
            return [Outcome(False, reason=reason, lost=True)]
        culprits: set[int] = set()
        for index, sample in enumerate(part.samples):
            if sample.draw.unit in culprits:
                sample.outcome = Outcome(False)
                continue
            self._take_in(self._send_part([sample], part.slot), tiles[index : index + 1], keep_slot=True)
            if sample.outcome.lost:
                culprits.add(sample.draw.unit)
        return [sample.outcome for sample in part.samples]

    def _settle(self, step: int, indices: Sequence[int], samples: list[_Sample]) -> list[int]:
        """Leave out units that broke, count what became of the others' samples, return those to be drawn anew.

        With a unit go all samples drawn from it together, also those that could be read: which ones were read
        before it broke, or ahead of this step, depends on the readers, and the batch must not.
        """
        for index in indices:
            draw, outcome = samples[index].draw, samples[index].outcome
            reason = outcome.reason if outcome.lost else None
            if not outcome.ok and not outcome.lost and outcome.unreadable and not outcome.hsv:
                reason = self._still_broken(draw)
            if reason is not None and self._lost_at[draw.unit] > step:
                self._exclude(draw.unit, step, reason)
        lost = self._lost(step + 1)
        failed: list[int] = []
        for index in indices:
            draw, outcome = samples[index].draw, samples[index].outcome
            row = self._counts[self._slide_of[draw.unit]]
            if lost[draw.unit]:
                row[COUNTS.index("unreadable")] += outcome.unreadable
                failed.append(index)
                continue
            tested = outcome.tried if outcome.ok else len(draw.skipped) - 1
            row += (outcome.ok, draw.skipped[tested], outcome.hsv, outcome.unreadable)
            if not outcome.ok:
                failed.append(index)
        return failed

    def _exclude(self, unit: int, step: int, reason: str) -> None:
        self._lost_at[unit], self._reasons[unit] = step, reason
        left = int((self._lost_at == NEVER).sum())
        if len(self._reasons) <= _WARNED_ALONE or len(self._reasons) % 1000 == 0:
            when = "before the first step" if step < 0 else f"from step {step} on"
            name = self._unit_name(unit)
            log.warning("%s is left out %s: %s; %d %ss remain", name, when, reason, left, self._unit_word)
        if left == 0:
            raise self._nothing_left()

    def _nothing_left(self) -> CohortError:
        shown = "; ".join(f"{self._unit_name(unit)}: {reason}" for unit, reason in list(self._reasons.items())[:3])
        return CohortError(f"none of {len(self._lost_at)} {self._unit_word}s is left to draw from: {shown}")

    def _drop_ahead(self) -> None:
        """Forget what was read ahead, once the readers have let go of its slots."""
        for ahead in self._ahead:
            for part in ahead.parts:
                assert self._pool is not None
                try:
                    self._pool.result(part.ticket)
                except EosinError as error:
                    log.debug("dropped a batch that was read ahead: %s", error)
                self._pool.free.append(part.slot)
        self._ahead.clear()

    def close(self) -> None:
        """Stop the readers; a later `batch` starts them again."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.close()
        self._pool, self._size = None, 0

    def __enter__(self) -> Self:
        """Return the source itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the readers."""
        self.close()
