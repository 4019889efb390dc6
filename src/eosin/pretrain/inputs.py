"""The tiles of a run as its config says, the factor that each slide has, and what a micro-step makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eosin.cohort import Cohort, read_cohort
from eosin.errors import ConfigError
from eosin.features.jobs import find_jobs
from eosin.pretrain.adversary import UNKNOWN, suppression_warnings
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.loading import Loading
from eosin.pretrain.masking import block_masks
from eosin.pretrain.objective import Crops
from eosin.pretrain.sources import AnySource, SlideSource
from eosin.pretrain.tilesource import TileConfig, TileSource
from eosin.pretrain.views import make_views

WEIGHTS, VIEWS, MASKS, STEP, DROPOUT, TEACHER = range(6)
"""What a seed is for; each has a stream of its own."""


def seed_of(seed: int, what: int, index: int = 0, rank: int = 0) -> int:
    """Return the seed of one use, a function of its address alone, so that a resumed run draws what it would have."""
    return int(np.random.SeedSequence((seed, what, index, rank)).generate_state(1, np.uint64)[0])


def open_source(config: PretrainConfig, *, rank: int = 0, world: int = 1, cache: Path | None = None) -> AnySource:
    """Return the tiles of `[data]` for one rank.

    Args:
        config: of the run.
        rank: of this process.
        world: number of ranks.
        cache: folder that keeps what was found out about slides.

    Raises:
        ConfigError: files of tiles without their mpp.
        CohortError: nothing found, or a table that does not fit.
        MissingMppError: slides that do not say their mpp.
    """
    data, sample = config.data, config.sample
    loading = Loading(workers=data.workers, rank=rank, world=world)
    table = None if data.table is None else Path(data.table)
    if data.kind == "tiles":
        if data.slide_mpp is None:
            raise ConfigError("data.slide_mpp is not given; files of tiles do not say their mpp: give it, such as 0.5")
        balance = "tile" if sample.balance == "area" else sample.balance
        wanted = TileConfig(
            tile_px=sample.tile_px, mpp=data.slide_mpp, balance=balance, hsv=sample.hsv, seed=sample.seed
        )
        return TileSource(data.paths, wanted, table=table, loading=loading)
    jobs = find_jobs(list(data.paths or [str(table)]), slide_mpp=data.slide_mpp)
    groups = None
    if sample.balance in ("site", "organ"):
        groups = {} if table is None else _by_slide(read_cohort(table), sample.balance)
    return SlideSource(jobs, sample, groups=groups, cache=cache, loading=loading)


def _by_slide(cohort: Cohort, column: str) -> dict[str, str]:
    """Return the value of a column for every slide, or raise `ConfigError` where one slide has two."""
    found: dict[str, str] = {}
    for slide, value in zip(cohort.values("slide_id").tolist(), cohort.values(column).tolist(), strict=True):
        if found.setdefault(slide, value) != value:
            raise ConfigError(f"{cohort.source}: slide {slide!r} has {column} {found[slide]!r} and {value!r}")
    return found


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Factors:
    """What features should forget ("adversary") or keep ("anchor").

    Attributes:
        codes: int64 (slides,) class of each slide, -1 unknown, by head.
        names: of the classes, by head.
        remarks: what speaks against it, in sentences.
    """

    codes: Mapping[str, Tensor]
    names: Mapping[str, tuple[str, ...]]
    remarks: tuple[str, ...]

    @property
    def classes(self) -> dict[str, int]:
        """Number of classes by head."""
        return {name: len(found) for name, found in self.names.items()}


def read_factors(config: PretrainConfig, slide_ids: tuple[str, ...]) -> Factors:
    """Return the factors of `[objective]` for every slide of a source.

    Raises:
        ConfigError: no table, no such column, or a factor of one class.
    """
    of = config.objective
    codes: dict[str, Tensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    values: dict[str, list[str]] = {}
    for head, column in (("adversary", of.adversary), ("anchor", of.anchor)):
        if column is None:
            continue
        found = {slide: slide for slide in slide_ids} if column == "slide" else _table_factor(config, head, column)
        known = sorted({found[slide] for slide in slide_ids if slide in found})
        if len(known) < 2:
            raise ConfigError(
                f"objective.{head} is {column!r}, of which these {len(slide_ids)} slides have {len(known)} value(s); "
                "there is nothing to tell apart: give the table, or leave it out"
            )
        code = {name: at for at, name in enumerate(known)}
        codes[head] = torch.tensor([code.get(found.get(slide, ""), UNKNOWN) for slide in slide_ids])
        names[head], values[head] = tuple(known), [found.get(slide, "unknown") for slide in slide_ids]
    remarks: tuple[str, ...] = ()
    if of.adversary is not None:
        keep = {str(of.anchor): values["anchor"]} if of.anchor is not None else {}
        remarks = suppression_warnings(of.adversary, values["adversary"], keep)
    return Factors(codes=codes, names=names, remarks=remarks)


def _table_factor(config: PretrainConfig, head: str, column: str) -> dict[str, str]:
    if config.data.table is None:
        raise ConfigError(f"objective.{head} is {column!r}; data.table must name a table with that column")
    return _by_slide(read_cohort(Path(config.data.table)), column)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Maker:
    """Makes the crops of micro-step after micro-step of one rank; each is a function of (config, index, rank).

    Attributes:
        config: of the run.
        source: of the tiles.
        factors: of the slides.
        device: of the crops.
        rank: of this process.
        world: number of ranks.
    """

    config: PretrainConfig
    source: AnySource
    factors: Factors
    device: torch.device
    rank: int
    world: int

    def tiles(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the tiles uint8 (B, 3, S, S) of micro-step `index`, and their slides (B,); it may wait for them."""
        batch = self.source.batch(index, self.config.batch_of_rank(self.world))
        return batch.tiles, batch.slide

    def crops(self, index: int, tiles: Tensor, slide: Tensor) -> Crops:
        """Return the views and masks of tiles of micro-step `index`."""
        return make_crops(
            self.config, self.factors, tiles.to(self.device, non_blocking=True), slide, (index, self.rank)
        )


def make_crops(
    config: PretrainConfig, factors: Factors, tiles: Tensor, slide: Tensor, address: tuple[int, int]
) -> Crops:
    """Return the crops of tiles uint8 (B, 3, S, S) on their device, drawn by (micro-step, rank)."""
    of, seed = config.objective, config.run.seed
    views = make_views(tiles, config.views, torch.Generator().manual_seed(seed_of(seed, VIEWS, *address)))
    images = [torch.cat(part) for part in (views.global_, views.local) if part]
    hidden = places = None
    if of.method != "simclr" and (of.ibot or of.jepa):
        masks = block_masks(
            len(images[0]),
            config.views.global_px // config.model.patch_px,
            share=of.mask_share,
            ratio=of.mask_ratio,
            exact=of.mask_exact,
            generator=torch.Generator().manual_seed(seed_of(seed, MASKS, *address)),
        )
        hidden = masks.to(tiles.device, non_blocking=True)
        places = masks.flatten().nonzero().flatten().to(tiles.device, non_blocking=True)
    classes = {name: codes[slide].to(tiles.device, non_blocking=True) for name, codes in factors.codes.items()}
    return Crops(images=images, hidden=hidden, places=places, factors=classes)
