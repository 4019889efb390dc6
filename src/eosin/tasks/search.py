"""`eosin index` and `eosin search`: from slides or features to an index, and from words to hits."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError, closest
from eosin.features.recipe import Recipe
from eosin.features.store import FeatureStore, stem
from eosin.retrieval.engines import open_index
from eosin.retrieval.examples import (
    Example,
    SlideTiles,
    image_tiles,
    indexed_tiles,
    stored_tiles,
    tile_at,
    tiles_in_annotations,
    tiles_in_rectangle,
    whole_slide,
)
from eosin.retrieval.filters import All, Filter, parse_filter
from eosin.retrieval.protocol import Floats, IndexSpec, VectorIndex, check_same_features
from eosin.retrieval.queries import SearchResult, SearchSettings, search
from eosin.tasks.search_results import result_to_dict, write_results
from eosin.tasks.search_slides import remembered_recipe, slide_files, unknown_places
from eosin.tiles import read_geojson

_PLACE = re.compile(r"(?P<slide>.+):(?P<x>\d+),(?P<y>\d+)(?:,(?P<width>\d+),(?P<height>\d+))?")
_DRAWN = re.compile(r"(?P<path>.+\.(?:geojson|json)(?:\.gz)?)(?::(?P<name>[^/\\]+))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A search in words, as the command line takes it.

    Attributes:
        queries: what to look for, each ``SLIDE:x,y`` (a tile), ``SLIDE:x,y,width,height`` (a region), ``SLIDE``, a
            GeoJSON file (``FILE.geojson:CLASS`` for one class of it), or an image file.
        against: what hits should be unlike, in the same words.
        filters: such as ``site=A,B`` or ``qc_focus>=0.1``; all must hold.
        slide: slide a GeoJSON file was drawn on; by the file's name when None.
        features: feature store of slides that are not in the index.
        image_mpp: microns per pixel of image files; what the files say when None.
        encoder: what reads image files; the index's own encoder, by name, when None.
        k: see `SearchSettings`, and so for the rest.
        same_slide: .
        same_patient: .
        mmr: .
        merge: .
        exact: .
    """

    queries: tuple[str, ...]
    against: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    slide: str | None = None
    features: Path | None = None
    image_mpp: float | None = None
    encoder: str | None = None
    k: int = 10
    same_slide: bool = False
    same_patient: bool = False
    mmr: float | None = None
    merge: Literal["mean", "best"] = "mean"
    exact: bool = False


def ask(index: VectorIndex, question: Question, *, recipe: Recipe | None = None) -> SearchResult:
    """Return the answer to a question.

    Args:
        index: where to look.
        question: what to look for.
        recipe: of the features in the index, when known: it says how an image must be read.

    Raises:
        QueryError: a query that names nothing; see also `eosin.retrieval.queries.search`.
        IndexMismatchError: features or an encoder that the index was not made with.
    """
    examples, against = read_examples(index, question, recipe=recipe)
    settings = SearchSettings(
        k=question.k,
        where=read_filter(question.filters, index.spec),
        same_slide=question.same_slide,
        same_patient=question.same_patient,
        mmr=question.mmr,
        merge=question.merge,
        exact=question.exact,
    )
    return search(index, examples, against=against, settings=settings)


def read_filter(texts: Sequence[str], spec: IndexSpec) -> Filter | None:
    """Return the filter that all of `texts` say; None when there is none.

    Raises:
        QueryError: an unknown field, or a value that it cannot hold.
    """
    filters = [parse_filter(text, spec.fields) for text in texts]
    if not filters:
        return None
    return filters[0] if len(filters) == 1 else All(tuple(filters))


def read_examples(
    index: VectorIndex, question: Question, *, recipe: Recipe | None = None
) -> tuple[list[Example], list[Example]]:
    """Return what a question looks for, and what it is against; see `ask`."""
    reader = _Reader(index, question, recipe)
    return [reader.example(text) for text in question.queries], [reader.example(text) for text in question.against]


def answer(
    index: str, question: Question, *, slides: Sequence[Path] = (), out: Path | None = None, api_key: str | None = None
) -> tuple[SearchResult, dict[str, Any], dict[str, str]]:
    """Search an index on disk or behind an address; write the page and its companions where a folder is given.

    Args:
        index: folder or address.
        question: what to look for.
        slides: where slides lie, beside what the index remembers; for the pictures.
        out: folder to write to; nothing is written when None.
        api_key: of a server.

    Returns:
        The result, the same as JSON types, and what was written -> path.
    """
    with contextlib.closing(open_index(index, api_key=api_key)) as opened:
        result = ask(opened, question, recipe=remembered_recipe(index))
    if out is None:
        return result, result_to_dict(result, index=index), {}
    files = slide_files(index, slides)
    without = unknown_places(index, set(result.hits.payload["slide_id"].tolist()) - files.keys())
    result = replace(result, notes=(*result.notes, *without))
    record, made = write_results(result, out, index=index, slides=files)
    return result, record, made


class _Reader:
    """Turns words into examples; slides, store and encoder are opened once."""

    def __init__(self, index: VectorIndex, question: Question, recipe: Recipe | None) -> None:
        self.index, self.question, self.recipe = index, question, recipe
        self.known = index.facet("slide_id")
        self.store = None if question.features is None else FeatureStore.open(question.features)
        self._tiles: dict[str, SlideTiles] = {}
        self._encode: Callable[[npt.NDArray[np.uint8]], Floats] | None = None

    def example(self, text: str) -> Example:
        place, drawn = _PLACE.fullmatch(text), _DRAWN.fullmatch(text)
        if drawn and Path(drawn["path"]).is_file():
            return self._annotation(Path(drawn["path"]), drawn["name"])
        if self._slide_id(text) is not None:
            return whole_slide(self.tiles(text))
        if place:
            tiles, xy = self.tiles(place["slide"]), (int(place["x"]), int(place["y"]))
            if place["width"] is None:
                return tile_at(tiles, xy)
            return tiles_in_rectangle(tiles, xy, (int(place["width"]), int(place["height"])))
        if Path(text).is_file():
            return self._image(Path(text))
        raise QueryError(
            f"{text!r} is no slide of the index and no file. A query is SLIDE:x,y (a tile), SLIDE:x,y,width,height (a "
            f"region), SLIDE, a .geojson file or an image file; the closest slides are: {closest(text, self.known)}"
        )

    def tiles(self, name: str) -> SlideTiles:
        """Return the tiles of a slide of the index, or else of the feature store."""
        slide_id = self._slide_id(name)
        if slide_id is None:
            return indexed_tiles(self.index, name)  # raises, and names the closest
        if slide_id not in self._tiles:
            if slide_id in self.known or self.store is None:
                self._tiles[slide_id] = indexed_tiles(self.index, slide_id)
            else:
                self._tiles[slide_id] = stored_tiles(self.store, slide_id, self.index.spec)
        return self._tiles[slide_id]

    def _slide_id(self, name: str) -> str | None:
        """Return the id of a slide given whole, or without folder or suffix; None when there is none.

        Raises:
            QueryError: several slides are called so.
        """
        for known in (self.known, self.store or ()):
            found = [name] if name in known else [one for one in known if name in _short_names(one)]
            if len(found) > 1:
                raise QueryError(f"{name!r} names {len(found)} slides: {', '.join(found[:5])}; give the whole id")
            if found:
                return found[0]
        return None

    def _annotation(self, path: Path, name: str | None) -> Example:
        slide = self.question.slide or path.name.removesuffix(".gz").rsplit(".", 1)[0]
        if self._slide_id(slide) is None:
            raise QueryError(
                f"{path.name}: on which slide was it drawn? {slide!r} is none of the index; name it with --slide"
            )
        areas = read_geojson(path)
        what = path.name
        if name is not None:
            classes = sorted({str(one.name) for one in areas if one.name is not None})
            areas = [one for one in areas if one.name == name]
            what = f"{name} of {path.name}"
            if not areas:
                raise QueryError(f"{path.name} has no class {name!r}; it has {', '.join(classes) or 'none'}")
        return tiles_in_annotations(self.tiles(slide), areas, name=what)

    def _image(self, path: Path) -> Example:
        if self._encode is None:
            self._encode = _image_encoder(self.index.spec, self.question.encoder, self._made_with())
        icc = bool(self._made_with().get("icc"))
        return image_tiles(path, self.index.spec, self._encode, mpp=self.question.image_mpp, icc=icc)

    def _made_with(self) -> Mapping[str, Any]:
        """Return pooling, stain and icc of the features: as the folder's recipe says, or as a server's index does."""
        if self.recipe is None:
            return self.index.spec.made_with or {}
        return {
            "pooling": self.recipe.encoder.get("pooling"),
            "stain": self.recipe.stain,
            "icc": self.recipe.icc,
        }


def _short_names(slide_id: str) -> tuple[str, ...]:
    path = PurePosixPath(slide_id)
    return (stem(slide_id), path.name, str(path.with_name(stem(slide_id))))


def _image_encoder(
    spec: IndexSpec, name: str | None, made_with: Mapping[str, Any]
) -> Callable[[npt.NDArray[np.uint8]], Floats]:
    """Return what makes vectors of tiles as those of the index were made.

    Raises:
        IndexMismatchError: other weights than the index's.
        QueryError: the index holds features of stain-normalised tiles.
    """
    from eosin.encoders import load_encoder  # torch is needed here only

    if made_with.get("stain") is not None:
        raise QueryError(
            f"the index holds features of tiles normalised by {made_with['stain'].get('method')}, fitted on whole "
            "slides; an image is too small for that fit: name a tile of a slide instead"
        )
    pooling = made_with.get("pooling")
    encoder = load_encoder(name or spec.encoder, pooling=None if pooling == "none" else pooling)
    weights = encoder.spec.weights_hash or None
    same = weights is not None and weights == spec.weights_sha256
    check_same_features(
        spec,
        IndexSpec(
            dim=encoder.spec.dim,
            encoder=spec.encoder if same else encoder.spec.name,  # a file of weights may have another name
            weights_sha256=weights,
            mpp=spec.mpp,
            tile_px=spec.tile_px,
            fields=spec.fields,
        ),
        "the encoder for images",
    )
    return encoder.encode
