"""What reader processes do for pretraining: survey slides, read drawn tiles. Free of torch, as they are."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from eosin.errors import CorruptSlideError, RegionError, SlideError
from eosin.features.jobs import Job
from eosin.features.readers import ReaderState
from eosin.features.writer import replace_durably
from eosin.geometry import ReadPlan, round_half_up
from eosin.pretrain.sampling import HsvFilter, SampleConfig, SlideFacts, TissueRuns, drawable_mpp
from eosin.slides import Slide

OPEN_SLIDES = 64
HELD_BYTES = 512 * 2**20
"""Decoded native tiles that the open slides of one process may hold, by an upper estimate."""
PROBES = 8
_NATIVE_PX = 512
_CACHE_VERSION = 1

Pixels = npt.NDArray[np.uint8]


class Outcome(NamedTuple):
    """What became of one drawn tile.

    Attributes:
        ok: whether it was read and kept.
        tried: index of the position that was kept, or the number of positions tried.
        xy: where it was read: level-0 corner on a slide, offset of the crop in a larger tile.
        hsv: positions rejected by the filter.
        unreadable: positions that could not be decoded.
        reason: the last error.
        lost: whether the slide or tile as a whole cannot be read any more.
    """

    ok: bool
    tried: int = 0
    xy: tuple[int, int] = (0, 0)
    hsv: int = 0
    unreadable: int = 0
    reason: str | None = None
    lost: bool = False


class SlideRequest(NamedTuple):
    """A tile to read: the slide as it was surveyed, and positions in the order to try them."""

    job: Job
    stamp: tuple[int, int] | None
    mpp: float
    xy: npt.NDArray[np.int64]


class _OpenSlides:
    """The slides one reader keeps open, least recently used closed first, bounded in number and memory."""

    def __init__(self) -> None:
        self._slides: OrderedDict[str, tuple[Job, Slide]] = OrderedDict()
        self._bytes: dict[str, int] = {}

    def get(self, job: Job) -> Slide:
        if job.slide_id not in self._slides:
            self._slides[job.slide_id] = job, job.open()
            self._bytes[job.slide_id] = 0
        self._slides.move_to_end(job.slide_id)
        return self._slides[job.slide_id][1]

    def account(self, job: Job, plan: ReadPlan) -> None:
        """Add what the next read may leave in the slide's cache; close slides until all fit."""
        width, height = (side * plan.scale + _NATIVE_PX for side in plan.read_px)
        self._bytes[job.slide_id] += int(3 * width * height)
        while len(self._slides) > OPEN_SLIDES or sum(self._bytes.values()) > HELD_BYTES:
            self.drop(next(iter(self._slides)))

    def drop(self, slide_id: str) -> None:
        job, slide = self._slides.pop(slide_id, (None, None))
        self._bytes.pop(slide_id, None)
        if job is not None and slide is not None and isinstance(job.source, Path):
            slide.close()


_OPEN: WeakKeyDictionary[ReaderState, _OpenSlides] = WeakKeyDictionary()


def stamp(job: Job) -> tuple[int, int] | None:
    """Return (bytes, modification time) of the job's file; None for an array.

    Raises:
        SlideError: the file is gone.
    """
    path = job.source if isinstance(job.source, Path) else job.source.path
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError as error:
        raise SlideError(f"{path}: the file cannot be reached any more ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns


def read_slide_tiles(
    state: ReaderState, requests: Sequence[SlideRequest], tile_px: int, hsv: HsvFilter | None, slot: int
) -> list[Outcome]:
    """Read one tile a request into a slot, as (n, 3, tile_px, tile_px) uint8; runs in a reader process."""
    tiles = state.slot(slot, (len(requests), 3, tile_px, tile_px))
    slides = _OPEN.setdefault(state, _OpenSlides())
    return [_read_one(slides, request, hsv, tile) for request, tile in zip(requests, tiles, strict=True)]


def _read_one(slides: _OpenSlides, request: SlideRequest, hsv: HsvFilter | None, out: Pixels) -> Outcome:
    job = request.job
    unreadable, rejected, reason = 0, 0, None
    try:
        if stamp(job) != request.stamp:
            slides.drop(job.slide_id)
            raise SlideError(f"{job.slide_id}: the file has changed since its tissue was found")
        slide = slides.get(job)
        plan = slide.plan(tile_px=out.shape[1], mpp=request.mpp)
        for tried, (x, y) in enumerate(on_pixels(request.xy, plan, slide.bounds).tolist()):
            slides.account(job, plan)
            try:
                rgb = slides.get(job).read_tile((x, y), plan).rgb
            except RegionError as error:
                unreadable, reason = unreadable + 1, str(error)
                continue
            if hsv is not None and not hsv.keeps(rgb):
                rejected += 1
                continue
            out[:] = rgb.transpose(2, 0, 1)
            return Outcome(True, tried, (x, y), rejected, unreadable, reason)
    except OSError as error:  # SlideErrors are OSErrors, and so is what a network drive raises
        slides.drop(job.slide_id)
        return Outcome(False, hsv=rejected, unreadable=unreadable, reason=str(error), lost=True)
    return Outcome(False, len(request.xy), hsv=rejected, unreadable=unreadable, reason=reason)


def on_pixels(xy: npt.NDArray[np.int64], plan: ReadPlan, bounds: tuple[int, int, int, int]) -> npt.NDArray[np.int64]:
    """Return corners (k, 2) moved to whole pixels of the read frame where no resize follows; else as they are.

    Stored pixels then come out as they are stored. A corner moves left and up by less than a pixel, or the other way
    where it would leave the bounds.

    Args:
        xy: level-0 corners.
        plan: how the tile is read.
        bounds: x, y, width, height of what was scanned, level 0.
    """
    if plan.resample:
        return xy
    downsample = np.array(plan.downsample)
    pixel = np.maximum(np.floor(xy / downsample), np.ceil(np.array(bounds[:2]) / downsample))
    return round_half_up(pixel * downsample)


def survey(state: ReaderState, job: Job, config: SampleConfig, cache: Path | None) -> SlideFacts:
    """Open a slide, find its tissue (or read it from `cache`) and try to read from it; runs in a reader process.

    Raises:
        SlideError: it cannot be opened, or none of `PROBES` positions can be decoded.
        MppError, TissueError, GeometryError: it has no mpp, no tissue, or not the wanted mpp.
    """
    del state  # a slide is surveyed once: nothing is kept
    found = stamp(job)
    with _opened(job) as slide:
        mpp = slide.mpp
        tissue = _cached_tissue(job, slide, cache)
        facts = SlideFacts(
            size_px=slide.size_px,
            bounds=slide.bounds,
            mpp=mpp,
            tissue=tissue,
            area_mm2=tissue.pixels * tissue.downsample[0] * mpp.x * tissue.downsample[1] * mpp.y / 1e6,
            stamp=found,
        )
        drawable_mpp(facts, config, job.slide_id)
        probe(slide, facts, config)
    return facts


def probe_again(state: ReaderState, job: Job, facts: SlideFacts, config: SampleConfig) -> None:
    """Open a slide anew and try to read from it; `SlideError` when nothing can be decoded."""
    _OPEN.setdefault(state, _OpenSlides()).drop(job.slide_id)
    with _opened(job) as slide:
        probe(slide, facts, config)


@contextmanager
def _opened(job: Job) -> Iterator[Slide]:
    """Open the job's slide, and close it unless it was given open."""
    slide = job.open()
    try:
        yield slide
    finally:
        if isinstance(job.source, Path):
            slide.close()


def probe(slide: Slide, facts: SlideFacts, config: SampleConfig) -> None:
    """Read at `PROBES` places spread evenly over the tissue until one can be decoded.

    Raises:
        CorruptSlideError: none can.
    """
    plan = slide.plan(tile_px=config.tile_px, mpp=drawable_mpp(facts, config, slide.name)[0])
    at = (np.arange(PROBES) + 0.5) / PROBES
    corners = facts.tissue.points(at, np.full(PROBES, 0.5)) - np.array(plan.size0_px) / 2
    reason = ""
    for x, y in corners.astype(np.int64).tolist():
        try:
            slide.read_tile((x, y), plan)
        except RegionError as error:
            reason = str(error)
        else:
            return
    raise CorruptSlideError(f"{slide.name}: none of {PROBES} places on its tissue can be decoded: {reason}")


def _cached_tissue(job: Job, slide: Slide, cache: Path | None) -> TissueRuns:
    if cache is None:
        return TissueRuns.from_mask(job.tissue(slide))
    key = f"{_CACHE_VERSION} {job.inputs_hash(slide.fingerprint)} {job.icc}"
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if path.is_file():
        with np.load(path) as held:
            dx, dy, x, y = held["scale"].tolist()
            return TissueRuns(held["row"], held["left"], held["right"], (dx, dy), (x, y))
    runs = TissueRuns.from_mask(job.tissue(slide))
    scale = np.array([*runs.downsample, *runs.origin_px], dtype=np.float64)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.npz")
    np.savez_compressed(temporary, row=runs.row, left=runs.left, right=runs.right, scale=scale)
    replace_durably(temporary, path)
    return runs
