"""What a search index is, whatever the engine: its spec, its answers, its methods.

Engines differ in how they find; they agree in what they mean. Vectors are compared by cosine similarity and come back
with length 1. A point is acknowledged when `upsert` returns: after that, no crash loses it. The same id replaces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from eosin.errors import IndexMismatchError
from eosin.retrieval.filters import FieldType, Filter

Payload = Mapping[str, npt.NDArray[Any]]
"""Columns, each (n,): text, int64, float64 or bool, as the spec's fields say. Missing: ``""`` or NaN."""
Ids = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.floating[Any]]
Quantise = Literal["none", "int8", "binary"]

IDENTITY = ("encoder", "weights_sha256", "mpp", "tile_px", "dim", "metric")
"""Fields of a spec that two sets of vectors must share to be compared at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSpec:
    """What an index holds. All but fields and quantise decide whether vectors may be compared: `check_same_features`.

    Attributes:
        dim: length of a vector.
        encoder: name of the encoder that made the vectors.
        weights_sha256: hash of its weights, None when an imported store did not say.
        mpp: microns per pixel of the tiles, None likewise.
        tile_px: side of a tile, None likewise.
        metric: how vectors are compared.
        fields: payload columns and their types.
        made_with: what else decides the vectors, such as pooling and stain normalisation; None when not known.
        quantise: what the engine scans first; the best are always scored again with the vectors themselves.
    """

    dim: int
    encoder: str
    weights_sha256: str | None = None
    mpp: float | None = None
    tile_px: int | None = None
    metric: Literal["cosine"] = "cosine"
    fields: Mapping[str, FieldType]
    made_with: Mapping[str, Any] | None = None
    quantise: Quantise = "none"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {**asdict(self), "fields": dict(self.fields)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> IndexSpec:
        """Return the spec `to_dict` gave.

        Raises:
            TypeError: unknown or missing fields.
        """
        return cls(**data)


def check_same_features(index: IndexSpec, other: IndexSpec, what: str) -> None:
    """Raise unless `other` vectors may be compared with those of the index.

    Args:
        index: spec of the index.
        other: spec of the vectors that are to be added or asked for; its fields and quantisation do not matter.
        what: what `other` is, for the message, such as ``"the query"`` or a folder.

    Raises:
        IndexMismatchError: encoder, weights, mpp, tile size, dimension or, where both say it, `made_with` differ; the
            message names each.
    """
    pairs = [(name, getattr(other, name), getattr(index, name)) for name in IDENTITY]
    if index.made_with is not None and other.made_with is not None:
        names = sorted(index.made_with.keys() | other.made_with.keys())
        pairs += [(name, other.made_with.get(name), index.made_with.get(name)) for name in names]
    lines = [f"  {name}: {what} has {here}, the index {there}" for name, here, there in pairs if here != there]
    if lines:
        raise IndexMismatchError(
            f"{what} cannot be mixed with this index:\n" + "\n".join(lines) + "\n"
            "use features of the same extraction, or make another index from the new ones"
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Hits:
    """Points found, best first (in order of choice with `mmr`, ascending ids from `scroll`, as asked from `retrieve`).

    Attributes:
        ids: uint64 (k,).
        score: float32 (k,), cosine similarity with the query; 0 from `scroll` and `retrieve`.
        payload: columns, each (k,): object arrays of str, int64, float64 or bool.
        vectors: float32 (k, dim) of length 1, or None when not asked for.
        wanted: how many were asked for.
    """

    ids: Ids
    score: Floats
    payload: dict[str, npt.NDArray[Any]]
    vectors: Floats | None
    wanted: int

    def __len__(self) -> int:
        """Return the number of points found."""
        return len(self.ids)

    @property
    def lacking(self) -> int:
        """How many fewer were found than asked for: not enough points, or not enough after filtering."""
        return self.wanted - len(self.ids)

    def take(self, rows: npt.NDArray[np.integer] | Sequence[int] | slice) -> Hits:
        """Return some of the points, `wanted` as before."""
        chosen = np.arange(len(self.ids))[rows]
        return Hits(
            ids=self.ids[chosen],
            score=self.score[chosen],
            payload={name: column[chosen] for name, column in self.payload.items()},
            vectors=None if self.vectors is None else self.vectors[chosen],
            wanted=self.wanted,
        )


@runtime_checkable
class VectorIndex(Protocol):
    """A search index. Made by `create_index`, opened by `open_index`; one process writes it at a time.

    Errors, in every engine: `IndexMismatchError` for vectors of another length; `QueryError` for queries with NaN or of
    length 0, k < 1, unknown fields, ids twice in one call, payload columns that are not the spec's; `NonFiniteError`
    for NaN or zero vectors to be stored; `IndexLockedError` when another process writes; `IndexStoreError` when the
    disk is full. A call that raises has stored nothing.
    """

    @property
    def spec(self) -> IndexSpec:
        """What the index holds."""
        ...

    def upsert(self, ids: Ids, vectors: Vectors, payload: Payload) -> None:
        """Store points durably; an id that is there is replaced.

        Args:
            ids: uint64 (n,), each once.
            vectors: float32 or float16 (n, dim), any length but 0.
            payload: exactly the spec's fields, each (n,).
        """
        ...

    def search(
        self,
        queries: Vectors,
        *,
        k: int = 10,
        where: Filter | None = None,
        exact: bool = False,
        with_vectors: bool = False,
        mmr: float | None = None,
    ) -> list[Hits]:
        """Return the `k` points nearest to each query, of those the filter holds for.

        Args:
            queries: (q, dim), any length but 0.
            k: points wanted per query.
            where: filter on the payload, applied inside the search: if k points pass it, k come back.
            exact: compare with every point, without graph or quantisation.
            with_vectors: return the vectors too.
            mmr: weight of relevance, 0 to 1, in maximal marginal relevance over the `mmr_pool(k)` nearest
                points (`eosin.retrieval.inputs.mmr_order`); None ranks by similarity, smaller values vary more.
        """
        ...

    def recommend(
        self,
        positive: Vectors,
        negative: Vectors | None = None,
        *,
        k: int = 10,
        where: Filter | None = None,
        exact: bool = False,
        with_vectors: bool = False,
        mmr: float | None = None,
    ) -> Hits:
        """Return the points nearest to examples and away from counter-examples (`inputs.recommended`).

        Args:
            positive: (p, dim), p >= 1.
            negative: (m, dim) or None.
            k: points wanted.
            where: filter on the payload, as in `search`.
            exact: compare with every point.
            with_vectors: return the vectors too.
            mmr: weight of relevance, as in `search`.
        """
        ...

    def retrieve(self, ids: Ids) -> Hits:
        """Return points by id, in the order asked, with vectors; ids that are not there are left out."""
        ...

    def scroll(self, *, where: Filter | None = None, batch: int = 1024) -> Iterator[Hits]:
        """Yield every point the filter holds for, ascending ids, with vectors, `batch` at a time."""
        ...

    def delete(self, where_or_ids: Filter | Ids) -> int:
        """Remove points durably; return how many there were."""
        ...

    def count(self, where: Filter | None = None) -> int:
        """Return the number of points the filter holds for."""
        ...

    def facet(self, field: str, where: Filter | None = None) -> dict[str, int]:
        """Return how many points hold each value of a keyword, integer or bool field: most first, then by value.

        Values become text as `str` writes them; a missing keyword is ``""``.
        """
        ...

    def optimise(self) -> None:
        """Make searching fast (graph, quantised codes, holes of replaced points closed); may take long."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return JSON types: engine, points, dim, quantise, bytes_on_disk, optimised points, and engine's own."""
        ...

    def snapshot(self, path: str | Path) -> Path:
        """Copy the index as it is now to a new folder that `open_index` opens, and return that folder."""
        ...

    def close(self) -> None:
        """Let go of files, locks and connections; calling again does nothing."""
        ...


def tile_ids(slide_id: str, xy: npt.NDArray[np.integer], spec: IndexSpec) -> Ids:
    """Return an id per tile (n,), the same on every machine and in every run.

    It is the first 8 bytes (big-endian, highest bit cleared) of blake2b over the slide, the position, the tile size,
    the mpp, the encoder and its weights, so that the same place read otherwise is another point. Among 10^8 tiles the
    chance that any two share an id is 5e-4 (birthday bound n^2 / 2^64).

    Args:
        slide_id: id in the feature store.
        xy: level-0 top-left corners (n, 2), integer.
        spec: of the index.
    """
    named = (slide_id, spec.tile_px, spec.mpp, spec.encoder, spec.weights_sha256)
    # numpy's own texts and numbers have another repr, and would give another id.
    head = repr(tuple(value.item() if isinstance(value, np.generic) else value for value in named)).encode()
    first = hashlib.blake2b(head, digest_size=8)
    ids = np.empty(len(xy), np.uint64)
    for row, place in enumerate(np.ascontiguousarray(xy, "<i8")):
        one = first.copy()
        one.update(place.tobytes())
        ids[row] = int.from_bytes(one.digest(), "big") & (2**63 - 1)
    return ids
