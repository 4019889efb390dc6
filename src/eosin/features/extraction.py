"""The one pipeline: slides -> tissue -> tiles -> QC -> features on disk.

Reader processes plan and decode while this process encodes and a thread writes:

    readers: open, segment, lay the grid, decode tiles into shared memory, measure QC
    here:    pixels -> (stain) -> encoder(s)            one decode feeds every encoder
    writer:  features + QC -> one HDF5 a slide, visible only when whole

A slide that fails is recorded with its reason and the run goes on. Nothing is kept in
memory that grows with the number of tiles but their positions and QC numbers.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from eosin.errors import CohortError
from eosin.features.jobs import Job, find_jobs, shard_jobs
from eosin.features.pipeline import STAIN_SAMPLE, Extraction, Normaliser, Pixels, Status, TileEncoder
from eosin.features.readers import ReaderPool
from eosin.features.store import FeatureStore, Recipe
from eosin.features.writer import write_durably
from eosin.slides import Slide
from eosin.slides.footprint import FILTER
from eosin.tiles import TileGrid, TileSpec
from eosin.tiles.mask import MASK_MPP
from eosin.tiles.qc import DEFAULT_RULES
from eosin.version import __version__

TISSUE_VERSION = 2
"""Raised when `tissue_mask` would find other tissue on the same slide."""

Source = Slide | Path | str | Sequence[Path | str] | Sequence[Job]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What, beside tiles and encoder, changes the numbers; part of the recipe.

    Attributes:
        stain: None, "macenko", "reinhard" or "vahadane": normalise to eosin's default
            target, fitted once a slide.
        dtype: "float32" or "float16" on disk.
        icc: convert to sRGB through the slide's profile.
    """

    stain: str | None = None
    dtype: str = "float32"
    icc: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run did.

    Attributes:
        stores: one store a (encoder, tile spec), in the order asked for.
        done: slide ids written now.
        skipped: slide ids that were already there.
        elsewhere: slide ids another process is writing.
        failed: slide id -> reason.
        tiles: tiles embedded now (per encoder and spec).
        seconds: wall time.
    """

    stores: tuple[FeatureStore, ...]
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    elsewhere: tuple[str, ...]
    failed: dict[str, str]
    tiles: int
    seconds: float


def extract(
    source: Source,
    tiles: TileGrid | TileSpec | Sequence[TileSpec] | None = None,
    encoder: str | TileEncoder | Sequence[str | TileEncoder] = "texture",
    *,
    out: Path | str,
    **options: Any,
) -> FeatureStore:
    """Embed slides and return their feature store.

    Args:
        source: an open slide; a slide file, a folder, a cohort table, or several of these; or
            jobs made by `find_jobs`.
        tiles: a grid (for one open slide) or the spec of the tiles; 224 px at 0.5 mpp when None.
        encoder: an encoder or its name, or several; each must give one store, so with several
            use `run` and its `Outcome.stores`.
        out: folder of the store; made, or resumed when its recipe is the same.
        **options: see `run`.

    Raises:
        StoreMismatchError: `out` was made by another recipe.
        EosinError: when `source` is an open slide, whatever made it fail.
    """
    outcome = run(source, tiles, encoder, out=out, **options)
    if len(outcome.stores) != 1:
        raise CohortError(f"{len(outcome.stores)} stores were made under {out}; use eosin.features.extraction.run")
    return outcome.stores[0]


def run(
    source: Source,
    tiles: TileGrid | TileSpec | Sequence[TileSpec] | None = None,
    encoder: str | TileEncoder | Sequence[str | TileEncoder] = "texture",
    *,
    out: Path | str,
    settings: Settings | None = None,
    slide_mpp: float | None = None,
    workers: int | None = None,
    batch_size: int | None = None,
    shard: tuple[int, int] | None = None,
    progress: Callable[[Status], None] | None = None,
) -> Outcome:
    """Embed slides into one store per (encoder, tile spec) and say what was done.

    With one encoder and one spec the store is `out` itself; otherwise each is a folder
    ``out/<encoder>_<tile_px>px_<mpp>mpp[_<overlap>overlap]``.

    Args:
        source: as in `extract`.
        tiles: as in `extract`.
        encoder: as in `extract`.
        out: folder of the store or stores.
        settings: stain, dtype, ICC.
        slide_mpp: microns per level-0 pixel for slides that do not say it.
        workers: reader processes; 0 reads in this process (no protection from codec crashes).
        batch_size: tiles the encoder sees at once; by device when None.
        shard: (i, n), i from 1: take every n-th slide. Shards may write to one `out` at once.
        progress: called with a `Status` after each chunk and slide.

    Raises:
        StoreMismatchError: a store under `out` was made by another recipe.
        StoreError: the disk is full or cannot be written.
        CohortError: nothing to do, or inputs that do not make sense.
    """
    started = time.monotonic()
    settings = settings or Settings()
    encoders = _load_encoders(encoder)
    grid = tiles if isinstance(tiles, TileGrid) else None
    specs = _specs(tiles)
    jobs = _jobs(source, slide_mpp=slide_mpp, icc=settings.icc, shard=shard)
    alone = isinstance(source, Slide)
    if grid is not None and len(jobs) != 1:
        raise CohortError(f"a grid belongs to one slide, but there are {len(jobs)}; give a TileSpec instead")
    stores = _create_stores(Path(out), encoders, specs, settings)
    batch = _batch(batch_size, encoders[0])
    if workers is None:
        workers = 0 if alone else max(1, min(8, (os.cpu_count() or 2) // 2))
    extraction = Extraction(
        encoders,
        specs,
        stores,
        batch=batch,
        fit_stain=_stain_fitter(settings.stain),
        grid=grid,
        progress=progress,
    )
    slot_bytes = batch * max(spec.tile_px for spec in specs) ** 2 * 3
    readers = ReaderPool(workers=0 if alone else workers, slots=max(2, 3 * workers), slot_bytes=slot_bytes)
    try:
        extraction.run(readers, jobs)
    finally:
        readers.close()
    outcome = _outcome(extraction, seconds=time.monotonic() - started)
    for row in stores:
        for store, one in zip(row, encoders, strict=True):
            _write_run(store, one, outcome, batch=batch, workers=workers, shard=shard)
    if alone and extraction.errors:
        raise next(iter(extraction.errors.values()))
    return outcome


def _batch(asked: int | None, encoder: TileEncoder) -> int:
    """Return how many tiles the encoder sees at once."""
    if asked is None:
        return 256 if str(encoder.runtime().get("device", "cpu")).startswith("cuda") else 16
    if asked < 1:
        raise CohortError(f"batch size {asked} must be at least 1")
    return asked


def _outcome(extraction: Extraction, *, seconds: float) -> Outcome:
    return Outcome(
        stores=tuple(store for row in extraction.stores for store in row),
        done=tuple(extraction.done),
        skipped=tuple(extraction.skipped),
        elsewhere=tuple(extraction.elsewhere),
        failed={slide_id: f"{type(error).__name__}: {error}" for slide_id, error in extraction.errors.items()},
        tiles=extraction.tiles_all,
        seconds=seconds,
    )


def _load_encoders(encoder: str | TileEncoder | Sequence[str | TileEncoder]) -> list[TileEncoder]:
    several: Sequence[str | TileEncoder] = encoder if isinstance(encoder, (list, tuple)) else [encoder]  # type: ignore[list-item]
    if not several:
        raise CohortError("no encoder given; see: eosin encoders")
    loaded: list[TileEncoder] = [_load_encoder(one) if isinstance(one, str) else one for one in several]
    names = [one.spec.name for one in loaded]
    if len(set(names)) != len(names):
        raise CohortError(f"an encoder is named twice: {', '.join(names)}")
    return loaded


def _load_encoder(name: str) -> TileEncoder:
    from eosin.encoders import load_encoder

    return load_encoder(name)


def _specs(tiles: TileGrid | TileSpec | Sequence[TileSpec] | None) -> list[TileSpec]:
    if tiles is None:
        return [TileSpec()]
    if isinstance(tiles, TileGrid):
        return [tiles.spec]
    specs = [tiles] if isinstance(tiles, TileSpec) else list(tiles)
    if not specs or len(set(specs)) != len(specs):
        raise CohortError("give at least one tile spec, and each only once")
    return specs


def _jobs(source: Source, *, slide_mpp: float | None, icc: bool, shard: tuple[int, int] | None) -> list[Job]:
    if isinstance(source, Slide):
        name = source.path.name if source.path is not None else "array"
        return [Job(slide_id=name, source=source)]
    several = [source] if isinstance(source, (str, Path)) else list(source)
    jobs = [one for one in several if isinstance(one, Job)]
    if len(jobs) < len(several):
        jobs += find_jobs([one for one in several if not isinstance(one, Job)], slide_mpp=slide_mpp)
    return shard_jobs([replace(job, icc=icc) for job in jobs], shard)


def _create_stores(
    out: Path, encoders: Sequence[TileEncoder], specs: Sequence[TileSpec], settings: Settings
) -> list[list[FeatureStore]]:
    alone = len(encoders) * len(specs) == 1
    rows = []
    for spec in specs:
        row = []
        for encoder in encoders:
            name = encoder.spec.name.replace("/", "--").replace(":", "--")
            overlap = f"_{spec.overlap_px}overlap" if spec.overlap_px else ""
            path = out if alone else out / f"{name}_{spec.tile_px}px_{spec.mpp:g}mpp{overlap}"
            recipe = Recipe(
                encoder=encoder.spec.to_dict(),
                tile={**spec.to_dict(), "filter": FILTER},
                tissue={"method": "od-texture", "mpp": MASK_MPP, "version": TISSUE_VERSION},
                qc={"rules": [f"{r.column} {r.op} {r.threshold:g}: {r.reason}" for r in DEFAULT_RULES]},
                stain=_stain_recipe(settings.stain),
                precision=str(encoder.runtime()["precision"]),
                dtype=settings.dtype,
                tokens=False,
                icc=settings.icc,
            )
            row.append(FeatureStore.create(path, recipe))
        rows.append(row)
    return rows


def _stain_recipe(stain: str | None) -> dict[str, Any] | None:
    if stain is None:
        return None
    from eosin.stain import default_target

    return {"method": stain, "fit": "slide", "sample": STAIN_SAMPLE, "target": default_target(stain).to_dict()}  # type: ignore[arg-type]


def _stain_fitter(stain: str | None) -> Callable[[Pixels], Normaliser] | None:
    """Return what fits a slide's stain on a sample of its tiles and gives its normaliser."""
    if stain is None:
        return None
    from eosin import stain as stains

    method = {"macenko": stains.Macenko, "reinhard": stains.Reinhard, "vahadane": stains.Vahadane}[stain]()

    def fit(sample: Pixels) -> Normaliser:
        fitted = method.fit(sample)

        def normalise(tiles: Pixels) -> tuple[Pixels, npt.NDArray[np.bool_]]:
            images, unchanged = method.normalise(tiles, fitted)  # type: ignore[arg-type]
            return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy()), unchanged.cpu().numpy()

        return normalise

    return fit


def _write_run(
    store: FeatureStore,
    encoder: TileEncoder,
    outcome: Outcome,
    *,
    batch: int,
    workers: int,
    shard: tuple[int, int] | None,
) -> None:
    """Write ``run.json``: what ran where, for how long, and what became of each slide."""
    name = "run.json" if shard is None else f"run-{shard[0]}of{shard[1]}.json"
    record = {
        "eosin": __version__,
        "recipe_hash": store.recipe.hash,
        "recipe": store.recipe.to_dict(),
        "runtime": encoder.runtime(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "batch_size": batch,
        "workers": workers,
        "shard": list(shard) if shard else None,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(outcome.seconds, 3),
        "tiles": outcome.tiles,
        "done": list(outcome.done),
        "skipped": list(outcome.skipped),
        "elsewhere": list(outcome.elsewhere),
        "failed": outcome.failed,
    }
    write_durably(store.path / name, orjson.dumps(record, option=orjson.OPT_INDENT_2))
