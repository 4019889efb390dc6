"""Inside `extract`: the order of things. Readers run ahead, the encoder runs here, a thread writes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from eosin.errors import CorruptSlideError, EosinError, NonFiniteError, NoTissueError, StoreError, StoreLockedError
from eosin.features.jobs import Job
from eosin.features.readers import ReaderPool, ReaderState, Ticket, read_tiles
from eosin.features.store import FeatureStore, SlideWriter
from eosin.features.writer import write_durably
from eosin.tiles import TileGrid, TileSpec, TissueMask, plan_tiles
from eosin.tiles.qc import neighbours, reject_reason

if TYPE_CHECKING:
    from eosin.encoders.spec import EncoderSpec

log = logging.getLogger(__name__)

MAX_UNREADABLE = 0.05
PLANS_AHEAD = 2
STAIN_SAMPLE = 32
WRITES_AHEAD = 4

Pixels = npt.NDArray[np.uint8]
# (n, H, W, 3) tiles -> tiles in the target's stains, and which of them had to stay as they were.
Normaliser = Callable[[Pixels], tuple[Pixels, npt.NDArray[np.bool_]]]


class TileEncoder(Protocol):
    """What extraction needs of an encoder."""

    @property
    def spec(self) -> EncoderSpec:
        """Name, size and normalisation."""
        ...

    def encode(self, tiles: Pixels) -> npt.NDArray[np.float32]:
        """Return (B, D) features of (B, H, W, 3) uint8 tiles."""
        ...

    def runtime(self) -> dict[str, Any]:
        """Return backend, precision, device and versions."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """Where a run stands; given to `progress` after every chunk and every slide."""

    slides_total: int
    slides_done: int
    slides_failed: int
    slides_skipped: int
    slide_id: str
    tiles_done: int
    tiles_total: int
    tiles_all: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SlidePlan:
    """What a reader says of a slide before its tiles are read.

    Attributes:
        meta: size, mpp ledger, reader, tissue and content hash, for the store.
        mask: tissue; None when nothing is left to do.
        grids: one a spec; None where every store has this slide already.
    """

    meta: dict[str, Any]
    mask: TissueMask | None
    grids: tuple[TileGrid | None, ...]


def plan_slide(
    state: ReaderState, job: Job, specs: Sequence[TileSpec], stores: Sequence[Sequence[str]], grid: TileGrid | None
) -> SlidePlan:
    """Open a slide, find its tissue and lay its grids; runs in a reader process.

    Args:
        state: the reader's.
        job: slide to plan.
        specs: tile specs.
        stores: folders of the stores each spec feeds; a spec whose stores all have this
            slide, made from the same inputs, is left out; one that feeds none is planned.
        grid: a grid made beforehand, instead of `specs`.
    """
    slide = state.slide(job)
    inputs = job.inputs_hash(slide.fingerprint)
    todo = [not row or not all(FeatureStore.open(path).done(job.slide_id, inputs) for path in row) for row in stores]
    if not any(todo):
        return SlidePlan(meta={}, mask=None, grids=(None,) * len(specs))
    mpp = slide.mpp
    if grid is not None:
        mask, grids = grid.mask, [grid]
    else:
        mask = job.tissue(slide)
        grids = plan_tiles(slide, specs, mask=mask, roi=job.roi)
    for one in grids:
        if len(one) == 0:
            raise NoTissueError(
                f"{job.slide_id}: no tile of {one.spec.tile_px} px at {one.spec.mpp:g} mpp holds "
                f"{one.spec.min_tissue:.0%} tissue ({mask.mask.mean():.1%} of the slide is tissue, "
                f"{len(one.background_xy)} positions were looked at); lower --min-tissue, or give a mask"
            )
    meta = {
        "size_px": list(slide.size_px),
        "mpp": slide.mpp_ledger.to_dict(),
        "bounds": list(slide.bounds),
        "reader": slide.reader,
        "fingerprint": inputs,
        "slide_fingerprint": slide.fingerprint,
        "tissue": {"method": mask.method, "params": mask.params, "area_mm2": round(mask.area_mm2(mpp), 6)},
    }
    return SlidePlan(meta=meta, mask=mask, grids=tuple(g if t else None for g, t in zip(grids, todo, strict=True)))


@dataclass(kw_only=True, slots=True)
class _Step:
    """One step of the run, already submitted to the readers where it needs pixels."""

    kind: Literal["skipped", "failed", "begin", "sample", "chunk", "end"]
    job: Job
    plan: SlidePlan | None = None
    error: EosinError | None = None
    grid: int = 0
    rows: npt.NDArray[np.int64] | None = None
    ticket: Ticket | None = None
    slot: int | None = None


@dataclass(kw_only=True, slots=True)
class _Stream:
    """One grid of one slide on its way into its stores."""

    grid: TileGrid
    encoders: list[TileEncoder]
    writers: list[SlideWriter]
    sample: list[Pixels] = field(default_factory=list)
    stain: Normaliser | None = None
    qc: list[dict[str, npt.NDArray[Any]]] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)


class Extraction:
    """The state of one run.

    Args:
        encoders: what embeds each tile.
        specs: tile specs.
        stores: ``stores[spec][encoder]``.
        batch: tiles read and encoded at once.
        fit_stain: makes a normaliser from a (n, H, W, 3) sample of a slide, or None.
        grid: a grid made beforehand.
        progress: told of every chunk and slide.
    """

    def __init__(
        self,
        encoders: Sequence[TileEncoder],
        specs: Sequence[TileSpec],
        stores: Sequence[Sequence[FeatureStore]],
        *,
        batch: int,
        fit_stain: Callable[[Pixels], Normaliser] | None,
        grid: TileGrid | None,
        progress: Callable[[Status], None] | None,
    ) -> None:
        self.encoders, self.specs, self.stores = encoders, specs, stores
        self.batch, self.fit_stain, self.grid, self.progress = batch, fit_stain, grid, progress
        self.done: list[str] = []
        self.skipped: list[str] = []
        self.elsewhere: list[str] = []
        self.errors: dict[str, EosinError] = {}
        self.tiles_all = 0
        self._slides_total = 0
        self._tiles = (0, 0)
        self._started = time.monotonic()
        self._streams: dict[int, _Stream] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="eosin-writer")
        self._writes: deque[Future[None]] = deque()

    def run(self, readers: ReaderPool, jobs: Sequence[Job]) -> None:
        """Extract every job; the readers stay ahead of the encoder by the pool's free slots."""
        self._slides_total = len(jobs)
        schedule = self._schedule(readers, jobs)
        ahead: deque[_Step] = deque()
        more = True
        try:
            while ahead or more:
                while more and readers.free and len(ahead) < 64:
                    step = next(schedule, None)
                    more = step is not None
                    if step is not None:
                        ahead.append(step)
                if ahead:
                    self._take(readers, ahead.popleft())
        finally:
            self._abandon()
            self._pool.shutdown()

    def _over(self, job: Job) -> bool:
        return job.slide_id in self.errors or job.slide_id in self.elsewhere

    def _schedule(self, readers: ReaderPool, jobs: Sequence[Job]) -> Iterator[_Step]:
        """Yield the steps of the run in order; called only while a slot is free."""
        folders = [[str(store.path) for store in row] for row in self.stores]
        planned: deque[tuple[Job, Ticket]] = deque()
        waiting = iter(jobs)
        while True:
            while len(planned) < PLANS_AHEAD and (job := next(waiting, None)) is not None:
                args = (job, self.specs, folders, self.grid)
                planned.append((job, readers.submit(f"opening {job.slide_id}", plan_slide, *args, planning=True)))
            if not planned:
                return
            job, ticket = planned.popleft()
            try:
                plan: SlidePlan = readers.result(ticket)
            except EosinError as error:
                yield _Step(kind="failed", job=job, error=error)
                continue
            if all(grid is None for grid in plan.grids):
                yield _Step(kind="skipped", job=job)
                continue
            yield _Step(kind="begin", job=job, plan=plan)
            for index, grid in enumerate(plan.grids):
                if grid is not None:
                    yield from self._reads(readers, job, plan, index, grid)
            yield _Step(kind="end", job=job, plan=plan)

    def _reads(self, readers: ReaderPool, job: Job, plan: SlidePlan, index: int, grid: TileGrid) -> Iterator[_Step]:
        """Yield the reads of one grid: a sample for the stain fit first, then every tile in order."""
        sample = np.linspace(0, len(grid) - 1, STAIN_SAMPLE if self.fit_stain else 0)
        parts: tuple[tuple[Literal["sample", "chunk"], npt.NDArray[np.int64]], ...] = (
            ("sample", np.unique(sample.astype(np.int64))),
            ("chunk", np.arange(len(grid), dtype=np.int64)),
        )
        for kind, every in parts:
            for start in range(0, len(every), self.batch):
                if self._over(job):
                    return
                rows = every[start : start + self.batch]
                slot = readers.free.popleft()
                what = f"reading tiles {rows[0]}-{rows[-1]} of {job.slide_id}"
                ticket = readers.submit(what, read_tiles, job, grid.plan, grid.xy[rows], slot)
                yield _Step(kind=kind, job=job, plan=plan, grid=index, rows=rows, ticket=ticket, slot=slot)

    def _take(self, readers: ReaderPool, step: _Step) -> None:
        """Carry out one step. An error of the slide ends that slide; an error of the disk ends the run."""
        try:
            if self._over(step.job):
                if step.ticket is not None:
                    readers.result(step.ticket)
            elif step.kind == "failed":
                assert step.error is not None
                raise step.error
            elif step.kind == "skipped":
                self.skipped.append(step.job.slide_id)
            elif step.kind == "begin":
                self._begin(step)
            elif step.kind == "end":
                self._end(step)
            else:
                self._pixels(readers, step)
        except StoreLockedError as error:
            log.info("%s", error)
            self._abandon()
            self.elsewhere.append(step.job.slide_id)
        except StoreError:
            raise
        except EosinError as error:
            self._abandon()
            if not self._over(step.job):
                self._fail(step.job, error)
        finally:
            if step.slot is not None:
                readers.free.append(step.slot)
        self._report(step.job)

    def _begin(self, step: _Step) -> None:
        assert step.plan is not None
        job, plan = step.job, step.plan
        self._streams = {}
        for index, (grid, row) in enumerate(zip(plan.grids, self.stores, strict=True)):
            if grid is None:
                continue
            stream = _Stream(grid=grid, encoders=[], writers=[])
            self._streams[index] = stream
            for store, encoder in zip(row, self.encoders, strict=True):
                if not store.done(job.slide_id, plan.meta["fingerprint"]):
                    writer = store.writer(job.slide_id, meta={**plan.meta, "size0_px": list(grid.plan.size0_px)})
                    stream.writers.append(writer.__enter__())
                    stream.encoders.append(encoder)
        self._tiles = (0, sum(len(stream.grid) for stream in self._streams.values()))

    def _pixels(self, readers: ReaderPool, step: _Step) -> None:
        assert step.rows is not None
        assert step.slot is not None
        assert step.ticket is not None
        stream, rows = self._streams[step.grid], step.rows
        tile_px = stream.grid.plan.tile_px
        status, qc = readers.result(step.ticket)
        tiles = readers.slot(step.slot, (len(rows), tile_px, tile_px, 3))
        good = status == 0
        if not good.all():
            tiles = tiles[good]
            qc = {name: column[good] for name, column in qc.items()}
        if step.kind == "sample":
            stream.sample.append(tiles.copy())
            return
        if self.fit_stain is not None and stream.stain is None:
            stream.stain = self.fit_stain(np.concatenate(stream.sample))
            stream.sample.clear()
        stream.unreadable += [int(row) for row in rows[~good]]
        self._encode(stream, rows[good], tiles, qc)
        self._tiles = (self._tiles[0] + len(rows), self._tiles[1])
        self.tiles_all += len(rows)

    def _encode(self, stream: _Stream, rows: npt.NDArray[np.int64], tiles: Pixels, qc: dict[str, Any]) -> None:
        if not len(rows):
            return
        grid = stream.grid
        qc = {"tissue": grid.tissue[rows], **qc}
        pixels = tiles
        if stream.stain is not None:
            pixels, unchanged = stream.stain(tiles)
            qc["stain_unchanged"] = unchanged.astype(np.float32)
        stream.qc.append(qc)
        for encoder, writer in zip(stream.encoders, stream.writers, strict=True):
            x = encoder.encode(pixels)
            if not np.isfinite(x).all():
                row = rows[int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])]
                raise NonFiniteError(
                    f"{encoder.spec.name} gave NaN or infinity for the tile at {tuple(grid.xy[row].tolist())}; "
                    "try --precision fp32, and check the weights"
                )
            while len(self._writes) >= WRITES_AHEAD:
                self._writes.popleft().result()
            self._writes.append(self._pool.submit(writer.append, x, grid.xy[rows], qc))

    def _end(self, step: _Step) -> None:
        assert step.plan is not None
        while self._writes:
            self._writes.popleft().result()
        self._save_tissue(step.job, step.plan)  # before the rename that says this slide is done
        for stream in self._streams.values():
            lost = np.array(sorted(stream.unreadable), dtype=np.int64)
            grid = stream.grid
            if len(lost) > MAX_UNREADABLE * len(grid):
                raise CorruptSlideError(
                    f"{step.job.slide_id}: {len(lost)} of {len(grid)} tiles cannot be decoded, the first at level-0 "
                    f"{tuple(grid.xy[lost[0]].tolist())}; the file is damaged: copy or export it again"
                )
            read = np.ones(len(grid), dtype=np.bool_)
            read[lost] = False
            late = {
                "neighbours": neighbours(grid.xy, grid.step0_px, read)[read],
                "read_status": np.zeros(int(read.sum()), dtype=np.int8),
            }
            table = {name: np.concatenate([part[name] for part in stream.qc]) for name in stream.qc[0]}
            reason = reject_reason({**table, **late})
            for writer in stream.writers:
                writer.finish(
                    reason,
                    qc=late,
                    background_xy=grid.background_xy,
                    background_tissue=grid.background_tissue,
                    unreadable_xy=grid.xy[lost],
                )
        for stream in self._streams.values():
            for writer in stream.writers:
                writer.__exit__(None, None, None)
        self._streams = {}
        self.done.append(step.job.slide_id)

    def _save_tissue(self, job: Job, plan: SlidePlan) -> None:
        """Write the tissue outline as GeoJSON, to be looked at and edited in QuPath."""
        assert plan.mask is not None
        content = orjson.dumps(plan.mask.to_geojson())
        for store in {store.path: store for row in self.stores for store in row}.values():
            write_durably(store.path / "tissue" / f"{job.slide_id}.geojson", content)

    def _fail(self, job: Job, error: EosinError) -> None:
        self.errors[job.slide_id] = error
        for row in self.stores:
            for store in row:
                store.record_failure(job.slide_id, type(error).__name__, str(error))

    def _abandon(self) -> None:
        """Drop the slide in the making: its temporary files go, its locks are released."""
        for write in self._writes:
            write.cancel()
        wait_for(self._writes)
        self._writes.clear()
        for stream in self._streams.values():
            for writer in stream.writers:
                writer.__exit__(EosinError, None, None)
        self._streams = {}

    def _report(self, job: Job) -> None:
        if self.progress is not None:
            self.progress(
                Status(
                    slides_total=self._slides_total,
                    slides_done=len(self.done),
                    slides_failed=len(self.errors),
                    slides_skipped=len(self.skipped) + len(self.elsewhere),
                    slide_id=job.slide_id,
                    tiles_done=self._tiles[0],
                    tiles_total=self._tiles[1],
                    tiles_all=self.tiles_all,
                    seconds=time.monotonic() - self._started,
                )
            )
