"""From a feature store to a search index: slide by slide, resumable, one broken slide at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.cohort.table import Cohort
from eosin.errors import CohortError, NonFiniteError, QueryError, StoreError, closest
from eosin.features.store import FeatureStore, TileTable
from eosin.retrieval.about import ABOUT, About, Columns
from eosin.retrieval.engines import FEW, Engine, create_index, index_exists, is_url
from eosin.retrieval.filters import All, FieldType, Is, Not
from eosin.retrieval.manifest import finish_build, start_build
from eosin.retrieval.protocol import IndexSpec, Quantise, VectorIndex, tile_ids
from eosin.version import __version__

QC = "qc_"
_KINDS: Mapping[str, FieldType] = {"b": "bool", "i": "integer", "u": "integer", "f": "float"}
FIELDS: Mapping[str, FieldType] = {
    "slide_id": "keyword",
    **dict.fromkeys(ABOUT, "keyword"),
    "x": "integer",
    "y": "integer",
    "mpp": "float",
    "tile_px": "integer",
    "size0_px": "float",
    "size0_height_px": "float",
    "fingerprint": "keyword",
}
"""Payload of an index made from a store, beside one ``qc_<column>`` for each quality number.

`mpp`, `size0_px` (width of a tile in level-0 pixels) and `size0_height_px` are NaN where an imported store does not
say; `tile_px` is then left out. `fingerprint` tells whether a slide is stored as it is now.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How far a build has come.

    Attributes:
        slide_id: slide that was just dealt with; "" while the index is being optimised.
        done: slides dealt with.
        total: slides there are.
        tiles: tiles stored so far.
    """

    slide_id: str
    done: int
    total: int
    tiles: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """What a build did.

    Attributes:
        out: folder or address of the index.
        engine: that holds it.
        done: slides stored now.
        skipped: slides that were in it already, just as they are.
        failed: slide -> why it is not in the index.
        notes: what is doubtful, in sentences.
        tiles: tiles stored now.
        points: tiles in the index.
        seconds: wall time.
    """

    out: str
    engine: str
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: dict[str, str]
    notes: tuple[str, ...]
    tiles: int
    points: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def build_index(
    features: str | Path,
    out: str | Path,
    *,
    encoder: str | None = None,
    cohort: Cohort | None = None,
    label: str | None = None,
    engine: Engine = "auto",
    quantise: Quantise = "none",
    api_key: str | None = None,
    progress: Callable[[Status], None] | None = None,
) -> BuildResult:
    """Make a store's kept tiles searchable, or bring an index up to date with its store.

    Slides are stored one after the other. A slide that is in the index already, from the same content and
    with the same payload, is skipped; one that changed is replaced, its old tiles removed once the new ones are safe.
    A slide that cannot be read is reported and does not stop the others. Killed at any moment, the same call goes on.

    Args:
        features: folder of a feature store, or of several of which `encoder` names one.
        out: folder of the index, or ``http://host:port/collection``.
        encoder: name of the encoder.
        cohort: table that says patient, site, scanner, stain, organ and label; without it a slide counts as a patient.
        label: column of the cohort to store as ``label``; its column "label" when None, if it has one.
        engine: as in `create_index`.
        quantise: as in `IndexSpec`.
        api_key: of a server.
        progress: called after every slide.

    Raises:
        StoreError: no store there, an empty one, or several and no `encoder`.
        IndexMismatchError: the index at `out` was made from other features or columns; the message names each.
        IndexStoreError: the index cannot be written; slides stored before are kept.
        IndexLockedError: another process writes it; nothing was changed.
        CohortError: no column of that name.
    """
    begun = time.monotonic()
    store = open_one_store(features, encoder)
    slides, fields = _contents(store)
    known = About(slides, cohort, label)
    spec = store_spec(store, fields=fields, quantise=quantise)
    new = engine == "auto" and not is_url(out) and not index_exists(out)
    expected = _count(store, slides) if new else None
    with contextlib.closing(create_index(out, spec, engine=engine, expected=expected, api_key=api_key)) as index:
        index.delete(np.empty(0, np.uint64))  # takes the lock: who cannot write leaves everything as it is
        about = {"features": store.recipe.hash, "cohort": cohort and cohort.sha256, "eosin": __version__}
        if not is_url(out):
            start_build(Path(out), about)
        outcome = _store_slides(index, store, slides, known, progress)
        index.optimise()
        result = _result(str(out), index, outcome, known.notes, time.monotonic() - begun)
        if not is_url(out):
            finish_build(Path(out), about, {"points": result.points, "failed": result.failed})
    return result


def store_spec(
    store: FeatureStore, *, fields: Mapping[str, FieldType] | None = None, quantise: Quantise = "none"
) -> IndexSpec:
    """Return the spec of an index of a store's features: what they are, and the payload asked for (none when None).

    Raises:
        StoreError: an imported store that does not say its encoder or dimension.
    """
    recipe = store.recipe.to_dict()
    encoder, tile = recipe["encoder"], recipe["tile"]
    if not encoder.get("name") or not encoder.get("dim"):
        raise StoreError(
            f"{store.path} does not say which encoder made it, or its dimension; convert it with --encoder"
        )
    return IndexSpec(
        dim=int(encoder["dim"]),
        encoder=str(encoder["name"]),
        weights_sha256=encoder.get("weights_hash") or None,
        mpp=tile.get("mpp"),
        tile_px=tile.get("tile_px"),
        fields=dict(fields or {}),
        made_with={
            "pooling": encoder.get("pooling"),
            "stain": recipe["stain"],
            "icc": recipe["icc"],
            "filter": tile.get("filter"),
            "version": recipe["version"],
        },
        quantise=quantise,
    )


def open_one_store(features: str | Path, encoder: str | None = None) -> FeatureStore:
    """Return the store in a folder, or that one of several in it which an encoder made.

    Raises:
        StoreError: none, none of that encoder, or several.
    """
    path = Path(features)
    if (path / "manifest.json").is_file():
        stores = [FeatureStore.open(path)]
    else:
        stores = [FeatureStore.open(file.parent) for file in sorted(path.glob("*/manifest.json"))]
    names = [str(store.recipe.encoder.get("name")) for store in stores]
    if encoder is not None:
        stores = [store for store, name in zip(stores, names, strict=True) if name == encoder]
    if len(stores) == 1:
        return stores[0]
    if not names:
        raise StoreError(f"{path} is not a feature store (no manifest.json); make one with eosin extract or convert")
    if not stores:
        raise StoreError(f"{path} holds no features of {encoder!r}; the closest are: {closest(str(encoder), names)}")
    folders = ", ".join(store.path.name for store in stores)
    raise StoreError(f"{path} holds {len(stores)} feature stores ({folders}); name one of these folders")


def _result(
    out: str, index: VectorIndex, outcome: Mapping[str, int | str | None], notes: tuple[str, ...], seconds: float
) -> BuildResult:
    """Return the summary of what came of each slide."""
    empty = tuple(f"{slide}: quality control kept no tile" for slide, stored in outcome.items() if stored == 0)
    return BuildResult(
        out=out,
        engine=str(index.stats()["engine"]),
        done=tuple(slide for slide, stored in outcome.items() if isinstance(stored, int) and stored),
        skipped=tuple(slide for slide, stored in outcome.items() if stored is None),
        failed={slide: stored for slide, stored in outcome.items() if isinstance(stored, str)},
        notes=(*notes, *empty),
        tiles=sum(stored for stored in outcome.values() if isinstance(stored, int)),
        points=index.count(),
        seconds=seconds,
    )


def _store_slides(
    index: VectorIndex,
    store: FeatureStore,
    slides: list[str],
    known: About,
    progress: Callable[[Status], None] | None,
) -> dict[str, int | str | None]:
    """Return what came of each slide: tiles stored, None if it was there as it is, or why it failed."""
    outcome: dict[str, int | str | None] = {}
    tiles = 0
    for at, slide_id in enumerate(slides, 1):
        try:
            stored = _store_slide(index, store, slide_id, known)
            outcome[slide_id] = stored
            tiles += stored or 0
        except (StoreError, CohortError, NonFiniteError, QueryError) as error:
            outcome[slide_id] = str(error)
        if progress:
            progress(Status(slide_id=slide_id, done=at, total=len(slides), tiles=tiles))
    if progress:
        progress(Status(slide_id="", done=len(slides), total=len(slides), tiles=tiles))
    return outcome


def _store_slide(index: VectorIndex, store: FeatureStore, slide_id: str, known: About) -> int | None:
    """Store a slide's kept tiles and return how many, or None if they are in the index just as they are."""
    table = store.tiles(slide_id)
    keep, here = np.flatnonzero(table.kept), Is("slide_id", (slide_id,))
    if not len(keep):
        index.delete(here)
        return 0
    columns = _payload(table, keep, index.spec.fields) | known.columns(slide_id, table.xy[keep])
    mark = _fingerprint(store, table, columns)
    if index.facet("fingerprint", here) == {mark: len(keep)}:
        return None
    columns["fingerprint"] = np.full(len(keep), mark, object)
    try:
        index.upsert(tile_ids(slide_id, table.xy[keep], index.spec), store[slide_id].x[keep], columns)
    except NonFiniteError as error:
        raise NonFiniteError(f"{slide_id}: {error}") from error
    index.delete(All((here, Not(Is("fingerprint", (mark,))))))
    return len(keep)


def _payload(table: TileTable, keep: npt.NDArray[np.int64], fields: Mapping[str, FieldType]) -> Columns:
    """Return what the store knows of a slide's kept tiles."""
    width, height = table.size0_px or (np.nan, np.nan)
    found: Columns = {
        "slide_id": np.full(len(keep), table.slide_id, object),
        "x": table.xy[keep, 0],
        "y": table.xy[keep, 1],
        "mpp": np.full(len(keep), np.nan if table.mpp is None else table.mpp),
        "size0_px": np.full(len(keep), width),
        "size0_height_px": np.full(len(keep), height),
    }
    if "tile_px" in fields:
        found["tile_px"] = np.full(len(keep), table.tile_px)
    for name in (name for name in fields if name.startswith(QC)):
        column = table.qc.get(name[len(QC) :])
        if column is None:
            raise StoreError(f"{table.slide_id} has no quality column {name[len(QC) :]!r}; extract it again")
        found[name] = column[keep]
    return found


def _fingerprint(store: FeatureStore, table: TileTable, columns: Columns) -> str:
    """Return a hash of all that decides the points of a slide: its content, the recipe, the payload."""
    total = hashlib.blake2b(digest_size=16)
    total.update(json.dumps([__name__, store.recipe.hash, table.slide.get("fingerprint")]).encode())
    for name, column in sorted(columns.items()):
        data = "\x1f".join(column.tolist()).encode() if column.dtype == object else column.tobytes()
        total.update(f"{name} {len(data)} ".encode() + data)
    return total.hexdigest()


def _contents(store: FeatureStore) -> tuple[list[str], dict[str, FieldType]]:
    """Return the slides of a store, and the fields an index of it has: the quality columns are its first slide's."""
    slides = store.slide_ids
    if not slides:
        raise StoreError(f"{store.path} holds no finished slide; run eosin extract first")
    known: dict[str, FieldType] = {
        name: kind for name, kind in FIELDS.items() if name != "tile_px" or store.recipe.tile.get("tile_px")
    }
    reason = "they hold no tile"
    for slide_id in slides:
        try:
            table = store.tiles(slide_id)
        except StoreError as error:
            reason = str(error)
            continue
        if len(table):
            known.update({QC + name: _KINDS[column.dtype.kind] for name, column in sorted(table.qc.items())})
            return slides, known
    raise StoreError(f"{store.path}: none of its {len(slides)} slides can be searched: {reason}")


def _count(store: FeatureStore, slides: list[str]) -> int:
    """Return how many tiles there are to store, or that there are more than a few."""
    total = 0
    for slide_id in slides:
        with contextlib.suppress(StoreError):
            total += int(np.count_nonzero(store.tiles(slide_id).kept))
        if total >= FEW:
            break
    return total
