"""Tiles drawn from slides while they are needed, mixtures of sources, and how fast a source is."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from eosin.errors import CohortError, EosinError, MissingMppError, MppError
from eosin.features.jobs import Job
from eosin.features.readers import ReaderPool
from eosin.pretrain.loading import Batch, Draw, Loading, Source
from eosin.pretrain.reads import SlideRequest, probe_again, read_slide_tiles, survey
from eosin.pretrain.sampling import (
    TRIES,
    Groups,
    SampleConfig,
    SlideFacts,
    draw_place,
    drawable_mpp,
    stream,
)

log = logging.getLogger(__name__)

_UNFILTERED_POSITIONS = 4


class AnySource(Protocol):
    """What a training loop needs."""

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Names of the slides, which `Batch.slide` indexes."""
        ...

    @property
    def tile_px(self) -> int:
        """Side of the tiles."""
        ...

    def batch(self, step: int, size: int) -> Batch:
        """Return the tiles of one step of this rank."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what it holds, as plain values."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know beside the step."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...

    def close(self) -> None:
        """Stop the readers."""
        ...


class SlideSource(Source):
    """Tiles drawn from many slides while they are needed: no tile is written.

    Every slide is opened once at the start: its tissue is found (or taken from `cache`) and one of its places read.
    A slide that cannot be used is left out with a warning; one without mpp stops everything, for it must be told.

    Args:
        jobs: the slides; see `eosin.features.jobs.find_jobs`.
        config: what is drawn.
        groups: slide id -> name of its site or organ, for those balances.
        cache: folder that keeps the tissue of each slide for the next start and the other ranks.
        loading: workers, prefetch, rank and world.

    Raises:
        MissingMppError: a slide does not say its mpp (`ImplausibleMppError`: it says nonsense).
        CohortError: two slides of one id, a slide without group, or no slide that can be used.
    """

    _read = staticmethod(read_slide_tiles)
    _unit_word = "slide"

    def __init__(
        self,
        jobs: Sequence[Job],
        config: SampleConfig,
        *,
        groups: Mapping[str, str] | None = None,
        cache: Path | None = None,
        loading: Loading | None = None,
    ) -> None:
        loading = loading or Loading()
        names = [job.slide_id for job in jobs]
        super().__init__(names, tile_px=config.tile_px, seed=config.seed, hsv=config.hsv, loading=loading)
        self.jobs, self.config = tuple(jobs), config
        _check_jobs(names)
        group_of = _group_names(names, config, groups)
        self._facts: list[SlideFacts | None] = [None] * len(jobs)
        errors = self._survey(cache)
        _raise_mpp(errors, self.jobs)
        areas = np.array([facts.area_mm2 if facts is not None else 0.0 for facts in self._facts])
        found = Groups.of(group_of, areas if config.balance == "area" and areas.any() else None)
        self._set_units(found, np.arange(len(jobs), dtype=np.int64))
        for index, error in sorted(errors.items()):
            self._exclude(index, -1, str(error))
        self._mpp = [
            drawable_mpp(facts, config, name) if facts is not None else ()
            for facts, name in zip(self._facts, names, strict=True)
        ]

    def _survey(self, cache: Path | None) -> dict[int, EosinError]:
        """Fill in the facts of every slide; return what is wrong with the others."""
        loading, count = self.loading, len(self.jobs)
        # Ranks begin at different slides, so that with a shared cache each finds most of the others' work done.
        start = count * loading.rank // loading.world
        order = [*range(start, count), *range(start)]
        pool = ReaderPool(workers=loading.workers, slots=1, slot_bytes=1)
        errors: dict[int, EosinError] = {}
        try:
            tickets = {
                i: pool.submit(f"opening {self.jobs[i].slide_id}", survey, self.jobs[i], self.config, cache)
                for i in order
            }
            for i, ticket in tickets.items():
                try:
                    self._facts[i] = pool.result(ticket)
                except EosinError as error:
                    errors[i] = error
        finally:
            pool.close()
        log.info("found the tissue of %d of %d slides", count - len(errors), count)
        return errors

    def _unit_name(self, unit: int) -> str:
        return self.slide_ids[unit]

    def _draw(self, number: int, round_: int, lost: npt.NDArray[np.bool_]) -> Draw:
        unit = self._groups.pick(stream(self.seed, number, round_), lost)
        facts = self._facts[unit]
        assert facts is not None
        # Its own stream: the place on this slide does not depend on how many lost ones were picked before it.
        random = stream(self.seed, number, round_, 1 + unit)
        limit = TRIES if self._hsv is not None else _UNFILTERED_POSITIONS
        place = draw_place(facts, self.config, self._mpp[unit], random, limit)
        request = SlideRequest(self.jobs[unit], facts.stamp, place.mpp, place.xy)
        return Draw(unit, request, place.mpp, place.skipped)

    def _still_broken(self, draw: Draw) -> str | None:
        assert self._pool is not None
        job, facts = self.jobs[draw.unit], self._facts[draw.unit]
        try:
            self._pool.result(self._pool.submit(f"opening {job.slide_id}", probe_again, job, facts, self.config))
        except EosinError as error:
            return str(error)
        return None

    def describe(self) -> dict[str, Any]:
        """Return slides, tissue, mpp drawn from and of the slides, groups, and what was left out."""
        facts = [f for i, f in enumerate(self._facts) if f is not None and i not in self._reasons]
        drawn = [mpp for i, mpp in enumerate(self._mpp) if i not in self._reasons for mpp in mpp]
        config = self.config
        return {
            "kind": "slides",
            "slides": len(facts),
            "tissue_mm2": round(sum(f.area_mm2 for f in facts), 3),
            "tile_px": self.tile_px,
            "mpp": [min(drawn), max(drawn)] if drawn else [],
            "slide_mpp": [min(f.mpp.mean for f in facts), max(f.mpp.mean for f in facts)] if facts else [],
            "balance": config.balance,
            "groups": len(self._groups.names),
            "min_tissue": config.min_tissue,
            "excluded": self.excluded,
        }


def _check_jobs(names: Sequence[str]) -> None:
    if not names:
        raise CohortError("no slides to draw from; give at least one")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CohortError(f"slide ids must differ; given more than once: {', '.join(twice[:5])}")


def _group_names(names: Sequence[str], config: SampleConfig, groups: Mapping[str, str] | None) -> list[str]:
    if config.balance in ("slide", "area"):
        return ["all"] * len(names)
    without = [name for name in names if name not in (groups or {})]
    if without or groups is None:
        raise CohortError(
            f"balance = {config.balance!r} needs the {config.balance} of every slide; {len(without)} of {len(names)} "
            f"have none, among them {', '.join(without[:3])}; add it to the table, or balance by slide"
        )
    return [groups[name] for name in names]


def _raise_mpp(errors: Mapping[int, EosinError], jobs: Sequence[Job]) -> None:
    """Raise one error for all slides whose mpp is missing or implausible."""
    wrong = {jobs[i].slide_id: error for i, error in sorted(errors.items()) if isinstance(error, MppError)}
    if not wrong:
        return
    missing = [name for name, error in wrong.items() if isinstance(error, MissingMppError)]
    names = missing or list(wrong)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if missing:
        raise MissingMppError(
            f"{len(names)} of {len(jobs)} slides do not say their microns per pixel: {shown}; give them "
            "in a column 'mpp' of the slide table (or as slide_mpp for all), or leave these slides out"
        )
    first = next(iter(wrong.values()))
    raise type(first)(f"{len(names)} of {len(jobs)} slides ({shown}): {first}")


class MixedSource:
    """Several sources in every batch, each with its share, in the order given.

    Args:
        sources: of one `tile_px`.
        shares: positive; their ratio counts. A batch gets the whole numbers nearest to them (largest remainder).

    Raises:
        CohortError: not one share a source, a share that is not positive, or different sizes of tile.
    """

    def __init__(self, sources: Sequence[AnySource], shares: Sequence[float]) -> None:
        if not sources or len(sources) != len(shares) or min(shares) <= 0:
            raise CohortError(f"{len(sources)} sources with shares {list(shares)}: one positive share each is needed")
        sides = [source.tile_px for source in sources]
        if len(set(sides)) > 1:
            raise CohortError(f"sources of tile_px {sides} cannot share a batch; give all the same")
        self.sources, self.tile_px = tuple(sources), sides[0]
        self.shares = tuple(share / sum(shares) for share in shares)
        self.slide_ids = tuple(name for source in sources for name in source.slide_ids)
        self._starts = np.cumsum([0, *(len(source.slide_ids) for source in sources)]).tolist()

    def sizes(self, size: int) -> tuple[int, ...]:
        """Return how many tiles of a batch of `size` come from each source.

        Raises:
            CohortError: a source would never be drawn from.
        """
        exact = np.array(self.shares) * size
        counts = np.floor(exact + 1e-9).astype(int)
        rest = np.argsort(counts - exact, kind="stable")[: size - counts.sum()]
        counts[rest] += 1
        if counts.min() == 0:
            least = int(np.ceil(1 / min(self.shares)))
            raise CohortError(f"a batch of {size} tiles has none of a share of {min(self.shares):.3g}; take {least}")
        return tuple(counts.tolist())

    def batch(self, step: int, size: int) -> Batch:
        """Return the tiles of one step of this rank; see `Source.batch`."""
        parts = [source.batch(step, count) for source, count in zip(self.sources, self.sizes(size), strict=True)]
        return Batch(
            tiles=torch.cat([part.tiles for part in parts]),
            slide=torch.cat([part.slide + start for part, start in zip(parts, self._starts, strict=False)]),
            mpp=torch.cat([part.mpp for part in parts]),
            xy=torch.cat([part.xy for part in parts]),
        )

    def describe(self) -> dict[str, Any]:
        """Return the shares and what each source says of itself."""
        return {"kind": "mixed", "shares": list(self.shares), "sources": [source.describe() for source in self.sources]}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all sources."""
        return {"sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for source, part in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(part)

    def close(self) -> None:
        """Stop the readers of all sources."""
        for source in self.sources:
            source.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """How fast a source is.

    Attributes:
        tiles_per_s: over the whole time, the consumer's included.
        waited: share of the time spent waiting for tiles.
        batches: measured.
        seconds: measured.
    """

    tiles_per_s: float
    waited: float
    batches: int
    seconds: float


def measure(source: AnySource, *, size: int, seconds: float, step_s: float = 0.0) -> Throughput:
    """Return tiles/s of a source, and how long a consumer waits that needs `step_s` seconds a batch.

    The first batch, which starts the readers, is not counted.
    """
    source.batch(0, size)
    begun = time.perf_counter()
    waited, batches = 0.0, 0
    while (now := time.perf_counter()) - begun < seconds:
        batches += 1
        source.batch(batches, size)
        waited += time.perf_counter() - now
        time.sleep(step_s)
    total = time.perf_counter() - begun
    return Throughput(tiles_per_s=batches * size / total, waited=waited / total, batches=batches, seconds=total)
