"""The tiles that are reviewed: from a feature store, a search index or a folder of images; their seeds and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from PIL import Image

from eosin.cohort import Cohort, read_cohort
from eosin.errors import CohortError, EosinError, QueryError, closest
from eosin.features.store import FeatureStore, stem
from eosin.retrieval.build import open_one_store, store_spec
from eosin.retrieval.engines import open_index
from eosin.retrieval.manifest import is_index
from eosin.retrieval.protocol import IndexSpec, VectorIndex, tile_ids
from eosin.slides import Slide
from eosin.tasks.samples import ARRAYS, Samples, read_image, read_samples
from eosin.tasks.search_pictures import Picture, SlideFile, open_again, tile_picture
from eosin.tasks.search_slides import slide_files
from eosin.tiles.geojson import read_geojson

Array = npt.NDArray[Any]
Texts = npt.NDArray[np.str_]
Pictures = Callable[[int], Picture]
"""Reads the tile of a row of the pool again."""

BARRED = ("test", "external")
"""Splits whose tiles are never shown and never labelled, in lower case."""
COVER = 0.5
GEOJSON = (".geojson", ".json", ".gz")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pool:
    """Tiles that may be reviewed, n of them.

    Attributes:
        x: (n, D) features, finite.
        ids: uint64 (n,), each once; those of a search index (`tile_ids`).
        slide_id: (n,); of a folder of images the image's file.
        patient_id: (n,) the cluster of each tile.
        xy: int64 (n, 2) level-0 top-left corners; zeros for images.
        size0_px: (n, 2) width and height of each tile in level-0 pixels; NaN where they are not known.
        split: (n,) of the cohort; empty where there is none.
        about: what made the features: encoder, weights_sha256, mpp, tile_px, dim, vectors ("as stored" or "unit").
        pictures: image file of each tile, None for tiles of slides.
    """

    x: Array
    ids: npt.NDArray[np.uint64]
    slide_id: Texts
    patient_id: Texts
    xy: npt.NDArray[np.int64]
    size0_px: npt.NDArray[np.float64]
    split: Texts
    about: Mapping[str, Any]
    pictures: tuple[Path, ...] | None = None

    def __len__(self) -> int:
        """Return n."""
        return len(self.x)

    @property
    def barred(self) -> npt.NDArray[np.bool_]:
        """Tiles of the test split (n,)."""
        return np.isin(np.char.lower(self.split), BARRED)

    def name(self, row: int) -> str:
        """Return what a tile is called on a page."""
        if self.pictures is not None:
            return str(self.slide_id[row])
        return f"{self.slide_id[row]} ({self.xy[row, 0]}, {self.xy[row, 1]})"


def open_pool(features: Path, cohort: Path | None, *, encoder: str | None = None, cache: Path | None = None) -> Pool:
    """Return the tiles of a search index, a feature store, a folder of images or an array.

    Args:
        features: where they are.
        cohort: table of patients and splits; needed for images and arrays.
        encoder: what reads images; or which of several stores.
        cache: folder that keeps features of images.

    Raises:
        CohortError: images or an array without a table.
        EosinError: what cannot be read; see the reader of each.
    """
    table = None if cohort is None else read_cohort(cohort)
    if is_index(features):
        index = open_index(features)
        try:
            return pool_from_index(index, table)
        finally:
            index.close()
    if features.suffix in ARRAYS or not (
        list(features.glob("manifest.json")) or list(features.glob("*/manifest.json"))
    ):
        if table is None:
            raise CohortError(
                f"{features} is no feature store or index; for images or an array give --cohort TABLE too"
            )
        return pool_from_samples(read_samples(features, table, encoder=encoder, cache=cache))
    return pool_from_store(open_one_store(features, encoder), table)


def pool_from_store(store: FeatureStore, cohort: Cohort | None = None) -> Pool:
    """Return the kept tiles of all slides of a feature store.

    Args:
        store: features.
        cohort: patient and split of each slide; without it, each slide stands for a patient and nothing is barred.

    Raises:
        QueryError: no kept tile, or slides that the cohort does not name.
    """
    spec = store_spec(store)
    who = _slide_columns(cohort, store.slide_ids)
    parts = []
    for slide_id in store:
        found = store[slide_id]
        rows = np.flatnonzero(found.kept)
        size0 = found.size0_px or (np.nan, np.nan)
        patient, split = who[slide_id]
        parts.append(
            {
                "x": found.x[rows],
                "ids": tile_ids(slide_id, found.xy[rows], spec),
                "slide_id": np.full(len(rows), slide_id),
                "patient_id": np.full(len(rows), patient),
                "xy": found.xy[rows],
                "size0_px": np.tile(np.asarray(size0, np.float64), (len(rows), 1)),
                "split": np.full(len(rows), split),
            }
        )
    if not sum(len(part["x"]) for part in parts):
        raise QueryError(f"{store.path} holds no tile that quality control kept; nothing can be reviewed")
    return Pool(**_joined(parts), about=_about(spec))


def pool_from_index(index: VectorIndex, cohort: Cohort | None = None) -> Pool:
    """Return the tiles of a search index; arguments and errors as in `pool_from_store`."""
    parts = [
        {
            "x": hits.vectors,
            "ids": hits.ids,
            "slide_id": hits.payload["slide_id"].astype(np.str_),
            "patient_id": hits.payload["patient_id"].astype(np.str_),
            "xy": np.stack([hits.payload["x"], hits.payload["y"]], axis=1).astype(np.int64),
            "size0_px": np.stack([hits.payload["size0_px"], hits.payload["size0_height_px"]], axis=1).astype(
                np.float64
            ),
        }
        for hits in index.scroll()
    ]
    if not parts:
        raise QueryError("the index holds no tile; nothing can be reviewed")
    columns = _joined(parts)
    names, codes = np.unique(columns["slide_id"], return_inverse=True)
    who = _slide_columns(cohort, names.tolist())
    columns["split"] = np.array([who[name][1] for name in names.tolist()], np.str_)[codes]
    if cohort is not None:
        columns["patient_id"] = np.array([who[name][0] for name in names.tolist()], np.str_)[codes]
    return Pool(**columns, about=_about(index.spec, "unit"))


def pool_from_samples(samples: Samples) -> Pool:
    """Return the rows of a cohort, such as a folder of images, as tiles.

    Raises:
        QueryError: two rows of one name.
    """
    cohort = samples.cohort
    names = cohort.values("file") if "file" in cohort.table else cohort.row_ids()
    if len(np.unique(names)) < len(names):
        raise QueryError(f"{cohort.source}: two rows name one image; each tile may stand in the table once")
    encoder = samples.encoder
    spec = IndexSpec(
        dim=samples.x.shape[1],
        encoder=samples.name,
        weights_sha256=encoder.get("weights_hash") or encoder.get("sha256") or None,
        fields={},
    )
    nowhere = np.zeros((len(names), 2), np.int64)
    split = cohort.table["split"].fillna("").astype(str).to_numpy(np.str_) if "split" in cohort.table else None
    return Pool(
        x=samples.x,
        ids=np.concatenate([tile_ids(name, nowhere[:1], spec) for name in names.tolist()]),
        slide_id=names,
        patient_id=cohort.group_key(),
        xy=nowhere,
        size0_px=np.full((len(names), 2), np.nan),
        split=np.full(len(names), "") if split is None else split,
        about=_about(spec),
        pictures=samples.pictures,
    )


def read_seeds(source: Path, pool: Pool) -> dict[int, str]:
    """Return row -> class of the tiles that a file names, to begin from.

    A QuPath GeoJSON is named after its slide (``a.svs.geojson`` or ``a.geojson``); a tile belongs to the class that
    covers most of it, if that is at least half. A table has a column ``label`` and names tiles by ``slide_id, x, y``
    or by ``file``; rows without a label are passed over, so that the table a review exported can seed the next.

    Raises:
        QueryError: no such slide or tile, areas without a class, nothing covered, or tiles of the test split.
        GeometryError: no GeoJSON.
        CohortError: no table.
    """
    found = _from_geojson(source, pool) if source.suffix.lower() in GEOJSON else _from_table(source, pool)
    if not found:
        raise QueryError(f"{source} names no tile; draw an area over tiles, or give rows of slide_id, x, y and label")
    barred = [row for row in found if pool.barred[row]]
    if barred:
        raise QueryError(
            f"{source}: {len(barred)} seeds lie in the test split, first {pool.name(barred[0])}; test tiles are never "
            "labelled here: choose seeds on other slides"
        )
    return found


def read_all_seeds(sources: Sequence[Path], pool: Pool) -> dict[int, str]:
    """Return row -> class of several files; see `read_seeds`.

    Raises:
        QueryError: no file, or a tile that two files class differently.
    """
    if not sources:
        raise QueryError(
            "a review begins from seeds, a few tiles of what is looked for: give --seeds <slide>.geojson (areas drawn "
            "in QuPath) or a table of slide_id, x, y and label"
        )
    found: dict[int, str] = {}
    for source in sources:
        for row, label in read_seeds(source, pool).items():
            if found.setdefault(row, label) != label:
                raise QueryError(f"{source}: {pool.name(row)} is {label!r} here and {found[row]!r} in another file")
    return found


def tile_pictures(pool: Pool, features: Path, slides: Sequence[Path], *, most_open: int = 4) -> Pictures:
    """Return a function that reads the tile of a row again; where that cannot be, its `why` says so.

    Args:
        pool: the tiles.
        features: what the pool was read from; an index remembers where its slides lay.
        slides: slides, folders or tables that say where they lie now; not needed for images.
        most_open: slides held open at once.
    """
    if pool.pictures is not None:
        files = pool.pictures
        return lambda row: Picture(tile=_image(files[row]))
    known, held = slide_files(str(features), slides), dict[str, Slide]()

    def read(row: int) -> Picture:
        slide_id, (width, height) = str(pool.slide_id[row]), pool.size0_px[row].tolist()
        if not width > 0:
            return Picture(why="how large this tile is on its slide is not known")
        try:
            if slide_id not in held:
                if len(held) >= most_open:
                    held.pop(next(iter(held))).close()
                held[slide_id] = open_again(slide_id, _placed(slide_id, known), (width, height))
            x, y = pool.xy[row].tolist()
            return tile_picture(held[slide_id], (x, y), (width, height))
        except EosinError as error:
            return Picture(why=str(error))

    return read


def _placed(slide_id: str, known: Mapping[str, SlideFile]) -> SlideFile | None:
    """Return where a slide lies, by its whole id or else by a file name that no other slide has."""
    if slide_id in known:
        return known[slide_id]
    named = [file for name, file in known.items() if stem(name) == stem(slide_id)]
    return named[0] if len(named) == 1 else None


def _image(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        side = image.size[0]
    return read_image(path, side_px=side, target_px=None)


def _about(spec: IndexSpec, vectors: str = "as stored") -> dict[str, Any]:
    known = {name: getattr(spec, name) for name in ("encoder", "weights_sha256", "mpp", "tile_px", "dim")}
    return {**known, "vectors": vectors}


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _slide_columns(cohort: Cohort | None, slide_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return (patient, split) of each slide.

    Raises:
        QueryError: a slide that the cohort does not name, or that it puts into two splits or patients.
    """
    if cohort is None:
        return {slide_id: (slide_id, "") for slide_id in slide_ids}
    table = cohort.table
    splits = table["split"].fillna("").astype(str) if "split" in table else pd.Series("", index=table.index)
    named: dict[str, set[tuple[str, str]]] = {}
    for name, patient, split in zip(table["slide_id"].astype(str), cohort.group_key(), splits, strict=True):
        for known in {name, stem(name)}:
            named.setdefault(known, set()).add((str(patient), split))
    found = {slide_id: named.get(slide_id) or named.get(stem(slide_id)) or set() for slide_id in slide_ids}
    lost = [slide_id for slide_id, rows in found.items() if len(rows) != 1]
    if lost:
        many = found[lost[0]]
        why = f"has {len(many)} patients or splits in" if many else "is not in"
        raise QueryError(
            f"{len(lost)} of {len(slide_ids)} slides cannot be placed: {lost[0]} {why} {cohort.source}; each slide "
            "needs one patient and one split, so that test slides stay out of the review"
        )
    return {slide_id: next(iter(rows)) for slide_id, rows in found.items()}


def _from_geojson(source: Path, pool: Pool) -> dict[int, str]:
    annotations = read_geojson(source)
    unnamed = sum(one.name is None for one in annotations)
    if unnamed:
        raise QueryError(f"{source}: {unnamed} of {len(annotations)} areas have no class; give each one in QuPath")
    rows = np.flatnonzero(pool.slide_id == _named_slide(source, pool))
    if not np.isfinite(pool.size0_px[rows]).all():
        raise QueryError(f"{source}: how large a tile is on the slide is not known here; name tiles in a table instead")
    ends = pool.xy[rows] + pool.size0_px[rows]
    boxes = shapely.box(pool.xy[rows, 0], pool.xy[rows, 1], ends[:, 0], ends[:, 1])
    names = sorted({one.name for one in annotations if one.name is not None})
    cover = np.zeros((len(rows), len(names)))
    for at, name in enumerate(names):
        area = shapely.union_all([one.geometry for one in annotations if one.name == name])
        cover[:, at] = shapely.area(shapely.intersection(boxes, area)) / shapely.area(boxes)
    best = cover.max(axis=1, initial=0)
    clear = (best >= COVER) & ((cover == best[:, None]).sum(axis=1) == 1)
    return {int(rows[at]): names[int(cover[at].argmax())] for at in np.flatnonzero(clear)}


def _named_slide(source: Path, pool: Pool) -> str:
    """Return the slide of the pool after which a file is named."""
    known = np.unique(pool.slide_id).tolist()
    name = source.name
    for suffix in GEOJSON[::-1]:
        name = name.removesuffix(suffix)
    found = [one for one in known if name in (one, PurePosixPath(one).name, stem(PurePosixPath(one).name))]
    if len(found) != 1:
        why = f"names {len(found)} slides" if found else f"names no slide; the closest are {closest(name, known)}"
        raise QueryError(f"{source.name} {why}; name the file after its slide, such as {known[0]}.geojson")
    return found[0]


def _from_table(source: Path, pool: Pool) -> dict[int, str]:
    cohort = read_cohort(source)
    table = cohort.table
    label = table[cohort.column("label")]
    by_file = pool.pictures is not None or "x" not in table
    key = cohort.column("file" if by_file and "file" in table else "slide_id")
    places = pool.xy.tolist()
    known = {(name, *(() if by_file else places[row])): row for row, name in enumerate(pool.slide_id.tolist())}
    found: dict[int, str] = {}
    for number, name, text in zip(table.index, table[key].astype(str), label, strict=True):
        if pd.isna(text):
            continue
        place = () if by_file else tuple(int(table.at[number, axis]) for axis in ("x", "y"))
        row = known.get((name, *place))
        if row is None:
            told = f"{name} {place}" if place else name
            raise QueryError(
                f"{source}, row {number}: no tile {told} among the {len(pool)}; tiles are named by slide_id and "
                "level-0 top-left corner as extraction wrote them, images by file"
            )
        if found.setdefault(row, str(text)) != str(text):
            raise QueryError(f"{source}, row {number}: {pool.name(row)} has two classes, {found[row]} and {text}")
    return found
