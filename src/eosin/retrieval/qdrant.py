"""What the two Qdrant engines share: filters and payload in Qdrant's terms, and every method above single requests.

Qdrant knows no NaN, no infinity and, in its embedded form, no filter on bool. So a missing float is a missing key, an
infinite float is the largest finite one, and a bool is 0 or 1. All three come back as they went in.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eosin.errors import IndexCorruptError, QueryError
from eosin.retrieval.filters import All, Between, FieldType, Filter, Is, Not, check_filter, field_type, leaves
from eosin.retrieval.inputs import (
    LENGTHS,
    check_k,
    check_points,
    id_array,
    mmr_order,
    mmr_pool,
    recommended,
    unit_queries,
)
from eosin.retrieval.protocol import Hits, Ids, IndexSpec, Payload, Vectors

Json = dict[str, Any]

# The graph, the same in both engines: docs/vector-search.md has the figures behind the numbers.
M, EF_CONSTRUCT = 16, 128
SEARCH_EF = 256
FULL_SCAN_BYTES = 2**25  # of vectors: a filter that leaves fewer is answered by comparing them all
ACORN_BELOW = 0.4  # share of points that pass the filter, below which ACORN may be used: Qdrant's own default
OVERSAMPLING = {"none": 1.0, "int8": 2.0, "binary": 8.0}

BIGGEST = float(np.finfo(np.float64).max)
NOTHING: Json = {"has_id": []}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Row(NamedTuple):
    """A point as Qdrant gives it."""

    id: int
    score: float
    payload: Mapping[str, Any]
    vector: Sequence[float] | None


class Point(NamedTuple):
    """A point as Qdrant takes it."""

    id: int
    vector: list[float]
    payload: Json


def field_key(name: str) -> str:
    """Return the path by which Qdrant finds a field: the name, in quotes where it is no plain word.

    Raises:
        QueryError: a name that no path can hold.
    """
    if not name or '"' in name:
        raise QueryError(f'{name!r} cannot be a field of a Qdrant index: rename it, without double quotes (")')
    return name if _PLAIN_NAME.fullmatch(name) else f'"{name}"'


def filter_json(filter: Filter | None, fields: Mapping[str, FieldType]) -> Json | None:
    """Return a filter in the form of Qdrant's REST interface; None stays None.

    Raises:
        QueryError: an unknown field, or a question that its type cannot answer.
    """
    if filter is None:
        return None
    check_filter(filter, fields)
    found = _condition(filter, fields)
    return found if found.keys() & {"must", "should", "must_not"} else {"must": [found]}


def _condition(filter: Filter, fields: Mapping[str, FieldType]) -> Json:
    if isinstance(filter, Is):
        values = [int(value) if isinstance(value, bool) else value for value in filter.values]
        return {"key": field_key(filter.field), "match": {"value": values[0]} if len(values) == 1 else {"any": values}}
    if isinstance(filter, Between):
        return _range(filter, whole=fields[filter.field] == "integer")
    if isinstance(filter, Not):
        return {"must_not": [_condition(filter.filter, fields)]}
    parts = [_condition(part, fields) for part in filter.filters]
    if isinstance(filter, All):
        return {"must": parts}
    return {"should": parts} if parts else NOTHING


def _range(filter: Between, *, whole: bool) -> Json:
    """Return a closed range; its ends become whole numbers for integers and finite for floats."""
    low, high = (None if end is None else min(max(float(end), -BIGGEST), BIGGEST) for end in (filter.low, filter.high))
    if whole:
        low, high = None if low is None else float(math.ceil(low)), None if high is None else float(math.floor(high))
        if low is not None and high is not None and low > high:
            return NOTHING
    ends = {name: end for name, end in (("gte", low), ("lte", high)) if end is not None}
    return {"key": field_key(filter.field), "range": ends}


def needs_acorn(filter: Filter, fields: Mapping[str, FieldType]) -> bool:
    """Return whether the graph may fall apart under the filter, so that its neighbours of neighbours must be followed.

    The points of each value of a keyword field are linked among themselves. That holds one value together, several, and
    what is left without some. It does not hold ranges and other types together, nor what two fields have in common.
    ACORN does, and takes about three times as long.
    """
    if any(fields[leaf.field] != "keyword" for leaf in leaves(filter)):
        return True
    parts, wanted = [filter], 0
    while parts:
        part = parts.pop()
        if isinstance(part, All):
            parts.extend(part.filters)
        elif not isinstance(part, Not):
            wanted += 1
    return wanted > 1


def payload_rows(columns: Mapping[str, npt.NDArray[Any]]) -> list[Json]:
    """Return columns that `inputs.check_payload` gave as one dict a point."""
    lists: list[list[Any]] = []
    for column in columns.values():
        if column.dtype.kind == "b":
            column = column.astype(np.int64)
        elif column.dtype.kind == "f":
            column = np.clip(column, -BIGGEST, BIGGEST)  # keeps NaN
        lists.append(column.tolist())
    names = tuple(columns)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*lists, strict=True)]
    for name, column in columns.items():
        for row in np.flatnonzero(np.isnan(column)) if column.dtype.kind == "f" else ():
            del rows[row][name]
    return rows


def payload_columns(rows: Sequence[Row], fields: Mapping[str, FieldType]) -> dict[str, npt.NDArray[Any]]:
    """Return the payload of points as columns of the spec's types: the inverse of `payload_rows`.

    Raises:
        IndexCorruptError: a point without a field that the index has, or with a value of another type.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    for name, kind in fields.items():
        try:
            if kind == "float":
                column = np.array([row.payload.get(name, math.nan) for row in rows], np.float64)
                huge = np.abs(column) >= BIGGEST
                column[huge] = np.copysign(np.inf, column[huge])
            else:
                column = np.empty(len(rows), {"keyword": object, "integer": np.int64, "bool": np.bool_}[kind])
                column[:] = [row.payload[name] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise IndexCorruptError(
                f"the payload does not fit the index: field {name!r} should be {kind} ({error!r}); something else "
                "writes to it. Make the index again"
            ) from error
        found[name] = column
    return found


class QdrantIndex(ABC):
    """A search index of Qdrant: what `eosin.retrieval.protocol.VectorIndex` asks for, over a few single requests."""

    spec: IndexSpec

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
        """Return the `k` points nearest to each query, best first: see `VectorIndex.search`."""
        k, condition = check_k(k), filter_json(where, self.spec.fields)
        unit = unit_queries(queries, self.spec)
        if mmr is not None and not 0 <= mmr <= 1:
            raise QueryError(f"mmr is {mmr}; it is the weight of relevance, 0 (most varied) to 1 (most similar)")
        whole, pool = with_vectors or mmr is not None, k if mmr is None else mmr_pool(k)
        acorn = where is not None and needs_acorn(where, self.spec.fields)
        answers = self._ask(unit.tolist(), pool, condition, exact=exact, acorn=acorn, vectors=whole)
        short = [] if exact else [at for at, rows in enumerate(answers) if len(rows) < pool]
        if short and min(pool, there := self._count(condition)) > min(len(answers[at]) for at in short):
            # The graph fell apart under the filter: what it did not reach is found by comparing all that pass.
            again = self._ask(unit[short].tolist(), min(pool, there), condition, exact=True, acorn=False, vectors=whole)
            for at, rows in zip(short, again, strict=True):
                answers[at] = rows
        found = []
        for rows in answers:
            hits = self._hits(sorted(rows, key=lambda row: (-row.score, row.id)), k, vectors=whole)
            if mmr is not None and hits.vectors is not None:
                hits = hits.take(mmr_order(hits.score, hits.vectors, k, mmr))
            found.append(hits if with_vectors else replace(hits, vectors=None))
        return found

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
        """Return the points nearest to examples and away from counter-examples: see `VectorIndex.recommend`."""
        query = recommended(positive, negative, self.spec)
        return self.search(query, k=k, where=where, exact=exact, with_vectors=with_vectors, mmr=mmr)[0]

    def retrieve(self, ids: Ids) -> Hits:
        """Return points by id, in the order asked, with vectors; ids that are not there are left out."""
        wanted: list[int] = id_array(ids).tolist()
        known = {row.id: row for row in self._fetch(wanted, whole=True)}
        return self._hits([known[one] for one in wanted if one in known], len(wanted), vectors=True)

    def scroll(self, *, where: Filter | None = None, batch: int = 1024) -> Iterator[Hits]:
        """Yield every point the filter holds for, ascending ids, with vectors, `batch` at a time."""
        batch, condition = check_k(batch), filter_json(where, self.spec.fields)
        following: int | None = 0
        while following is not None:
            rows, following = self._page(following, batch, condition)
            if rows:
                yield self._hits(rows, len(rows), vectors=True)

    def upsert(self, ids: Ids, vectors: Vectors, payload: Payload) -> None:
        """Store points; an id that is there is replaced: see `VectorIndex.upsert`."""
        ids, vectors, columns = check_points(ids, vectors, payload, self.spec)
        length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
        rows = payload_rows(columns) if columns else [{} for _ in ids]
        self._put(ids.tolist(), (vectors / length[:, None]).astype(np.float32), rows)

    def delete(self, where_or_ids: Filter | Ids) -> int:
        """Remove points; return how many there were."""
        if isinstance(where_or_ids, Filter):
            condition = filter_json(where_or_ids, self.spec.fields)
            there = self._count(condition)
            if there and condition is not None:
                self._drop_where(condition, there)
            return there
        ids = [row.id for row in self._fetch(id_array(where_or_ids).tolist(), whole=False)]
        if ids:
            self._drop(ids)
        return len(ids)

    def count(self, where: Filter | None = None) -> int:
        """Return the number of points the filter holds for."""
        return self._count(filter_json(where, self.spec.fields))

    def facet(self, field: str, where: Filter | None = None) -> dict[str, int]:
        """Return how many points hold each value of a field, most first, then by value.

        Raises:
            QueryError: an unknown field, or one of floats.
        """
        kind = field_type(field, self.spec.fields)
        if kind == "float":
            raise QueryError(f"field {field!r} holds floats, too many values to count: ask for a range with count")
        condition = filter_json(where, self.spec.fields)
        pairs = self._facet(field_key(field), condition, max(1, self._count(condition)))
        counts = {str(bool(value) if kind == "bool" else value): number for value, number in pairs if number}
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def _hits(self, rows: Sequence[Row], wanted: int, *, vectors: bool) -> Hits:
        return Hits(
            ids=np.array([row.id for row in rows], np.uint64),
            score=np.clip(np.array([row.score for row in rows], np.float32), -1, 1),
            payload=payload_columns(rows, self.spec.fields),
            vectors=_unit_rows(rows, self.spec.dim) if vectors else None,
            wanted=wanted,
        )

    @abstractmethod
    def _ask(
        self, queries: list[list[float]], k: int, where: Json | None, *, exact: bool, acorn: bool, vectors: bool
    ) -> list[list[Row]]:
        """Return the k nearest of each query; with `acorn` by way of points that the filter leaves out."""

    @abstractmethod
    def _fetch(self, ids: list[int], *, whole: bool) -> list[Row]:
        """Return those points that are there, in any order; without payload and vector unless `whole`."""

    @abstractmethod
    def _page(self, start: int, limit: int, where: Json | None) -> tuple[list[Row], int | None]:
        """Return up to `limit` points from id `start` on, ascending, and where to go on; None at the end."""

    @abstractmethod
    def _put(self, ids: list[int], vectors: npt.NDArray[np.float32], payload: list[Json]) -> None:
        """Store points durably."""

    @abstractmethod
    def _drop(self, ids: list[int]) -> None:
        """Remove points that are there, durably."""

    @abstractmethod
    def _drop_where(self, where: Json, there: int) -> None:
        """Remove the points a filter holds for, of which there are so many, durably."""

    @abstractmethod
    def _count(self, where: Json | None) -> int:
        """Return how many points there are, exactly."""

    @abstractmethod
    def _facet(self, key: str, where: Json | None, limit: int) -> Iterable[tuple[Any, int]]:
        """Return values with their numbers of points, exactly."""


def batches(ids: list[int], vectors: npt.NDArray[np.float32], payload: list[Json], size: int) -> Iterator[list[Point]]:
    """Yield points, at most `size` at a time."""
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        yield [Point(*point) for point in zip(ids[part], vectors[part].tolist(), payload[part], strict=True)]


def _unit_rows(rows: Sequence[Row], dim: int) -> npt.NDArray[np.float32]:
    """Return the vectors (n, dim), each of length 1.

    Raises:
        IndexCorruptError: a point whose vector is lost: too short, zero or not finite.
    """
    try:
        found = np.array([row.vector for row in rows], np.float32).reshape(len(rows), dim)
    except (TypeError, ValueError) as error:
        raise IndexCorruptError(f"a point has no vector of {dim} numbers ({error}); make the index again") from error
    length = np.sqrt(np.einsum("nd,nd->n", found, found, dtype=np.float64))
    bad = np.flatnonzero(~(np.isfinite(length) & (length > LENGTHS[0])))
    if len(bad):
        raise IndexCorruptError(f"the vector of point {rows[bad[0]].id} is lost; make the index again")
    return (found / length[:, None]).astype(np.float32)
