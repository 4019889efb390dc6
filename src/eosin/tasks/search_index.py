"""`eosin index`: from slides or features to a search index that remembers where its slides lie."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from eosin.cohort import read_cohort
from eosin.errors import QueryError, StoreError
from eosin.features.extraction import run
from eosin.features.jobs import find_jobs
from eosin.features.pipeline import Status
from eosin.features.store import FeatureStore
from eosin.retrieval import build
from eosin.retrieval.build import BuildResult, build_index, open_one_store
from eosin.retrieval.engines import Engine, is_url
from eosin.retrieval.protocol import Quantise
from eosin.tasks.search_pictures import SlideFile
from eosin.tasks.search_slides import check_recipe, find_files, remember
from eosin.tasks.summary import write_summary
from eosin.tiles import TileSpec

Progress = Callable[[Status], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSettings:
    """How to make an index.

    Attributes:
        encoder: for slides, what to extract with; for features, which of several stores.
        tile_px: side of the tiles of slides.
        mpp: microns per pixel of the tiles of slides.
        slide_mpp: microns per level-0 pixel of slides that do not say it.
        slides: where the slides of a feature store lie, for later pictures.
        cohort: table of patient_id, site, stain, organ and labels.
        label: its column that hits show as label.
        engine: "auto", "exact", "edge" or "server".
        quantise: "none", "int8" or "binary".
        workers: reader processes of the extraction.
        api_key: of a server.
    """

    encoder: str | None = None
    tile_px: int = 224
    mpp: float = 0.5
    slide_mpp: float | None = None
    slides: tuple[Path, ...] = ()
    cohort: Path | None = None
    label: str | None = None
    engine: Engine = "auto"
    quantise: Quantise = "none"
    workers: int | None = None
    api_key: str | None = None


def make_index(
    source: Path, out: str, settings: IndexSettings | None = None, *, progress: Progress | None = None
) -> BuildResult:
    """Make an index of a feature store, or of slides, which are extracted first into ``OUT-features``.

    The same call again brings the index up to date: only slides that are new or changed are extracted and stored.

    Args:
        source: folder of a feature store; or a slide, a folder of slides or a table of them.
        out: folder of the index, or address of a server's collection.
        settings: see `IndexSettings`.
        progress: told how far it is.

    Raises:
        QueryError: slides without an encoder, or slides for an index on a server.
        IndexMismatchError: the index holds features that were made otherwise.
        EosinError: whatever `eosin.features.extraction.run` and `eosin.retrieval.build.build_index` raise.
    """
    settings = settings or IndexSettings()
    failed: dict[str, str] = {}
    if _has_features(source):
        store = open_one_store(source, settings.encoder)
        files = find_files(settings.slides) if settings.slides else {}
    else:
        store, files, failed = _extract(source, out, settings, progress)
    check_recipe(out, store)
    result = build_index(
        store.path,
        out,
        cohort=None if settings.cohort is None else read_cohort(settings.cohort),
        label=settings.label,
        engine=settings.engine,
        quantise=settings.quantise,
        api_key=settings.api_key,
        progress=None if progress is None else _told(progress),
    )
    remember(out, store, files)
    notes = result.notes
    absent = [slide_id for slide_id in (*result.done, *result.skipped) if slide_id not in files]
    if files and absent:
        notes = (*notes, f"{len(absent)} slides of the features were not found in --slides, first {absent[0]}")
    return replace(result, failed={**failed, **result.failed}, notes=notes)


def _has_features(source: Path) -> bool:
    return (source / "manifest.json").is_file() or any(source.glob("*/manifest.json"))


def _extract(
    source: Path, out: str, settings: IndexSettings, progress: Progress | None
) -> tuple[FeatureStore, dict[str, SlideFile], dict[str, str]]:
    """Return features of slides, where these lie, and which failed and why."""
    if settings.encoder is None:
        raise QueryError(
            f"{source} is not a feature store (no manifest.json); if it holds slides, say what extracts them: "
            "--encoder NAME, such as texture or dinov2-vits14"
        )
    if is_url(out):
        raise QueryError("extract slides into a folder first (eosin extract), then index that folder on the server")
    folder = Path(out).parent / f"{Path(out).name}-features"
    outcome = run(
        find_jobs([source], slide_mpp=settings.slide_mpp),
        TileSpec(tile_px=settings.tile_px, mpp=settings.mpp),
        settings.encoder,
        out=folder,
        workers=settings.workers,
        progress=progress,
    )
    store = outcome.stores[0]
    write_summary(store)
    if not len(store):
        reasons = "; ".join(f"{slide_id}: {why}" for slide_id, why in list(outcome.failed.items())[:3])
        raise StoreError(f"no slide of {source} could be extracted ({reasons}); eosin doctor says more")
    return store, find_files([source]), outcome.failed


def _told(progress: Progress) -> Callable[[build.Status], None]:
    """Return what tells a build's progress in the words of an extraction's."""
    started = time.monotonic()

    def tell(status: build.Status) -> None:
        progress(
            Status(
                slides_total=status.total,
                slides_done=status.done,
                slides_failed=0,
                slides_skipped=0,
                slide_id=status.slide_id or "optimising",
                tiles_done=status.done,
                tiles_total=status.total,
                tiles_all=status.tiles,
                seconds=time.monotonic() - started,
            )
        )

    return tell
