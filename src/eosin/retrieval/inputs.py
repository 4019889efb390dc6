"""What every engine checks and computes alike before it searches: vectors, payload, examples, diversity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import IndexMismatchError, NonFiniteError, QueryError, closest
from eosin.retrieval.filters import FieldType
from eosin.retrieval.protocol import Floats, Ids, IndexSpec, Payload, Vectors

LENGTHS = (1e-15, 1e15)  # of a vector; beyond, its square leaves float32
_DTYPES: Mapping[FieldType, Any] = {"keyword": object, "integer": np.int64, "float": np.float64, "bool": np.bool_}


def unit_queries(queries: Vectors, spec: IndexSpec) -> Floats:
    """Return queries (q, dim) float32 of length 1; one vector (dim,) counts as one query.

    Raises:
        IndexMismatchError: another dimension.
        QueryError: NaN, infinity or a zero vector, whose cosine is undefined.
    """
    found = np.atleast_2d(np.asarray(queries))
    _check_dim(found, spec, "the query")
    lengths = _lengths(found)
    bad = np.flatnonzero(~((lengths > LENGTHS[0]) & (lengths < LENGTHS[1])))
    if len(bad):
        raise QueryError(
            f"query {bad[0]} of {len(found)} {_flaw(float(lengths[bad[0]]))}; was its tile read and embedded?"
        )
    return (found / lengths[:, None]).astype(np.float32)


def check_points(ids: Ids, vectors: Vectors, payload: Payload, spec: IndexSpec) -> tuple[Ids, Vectors, dict[str, Any]]:
    """Return ids uint64 (n,), vectors (n, dim) float16 or float32 as given, and columns of the spec's types.

    Raises:
        IndexMismatchError: another dimension.
        NonFiniteError: NaN, infinity or zero vectors, by row and id.
        QueryError: ids that are no uint64 or come twice; lengths or payload columns that do not fit.
    """
    ids = id_array(ids)
    unique, times = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        twice = unique[times > 1]
        raise QueryError(
            f"{len(twice)} of {len(unique)} ids come more than once in one call, first {twice[0]}; nothing was stored: "
            "give each point once"
        )
    found = np.asarray(vectors)
    _check_dim(found, spec, "a point")
    if len(found) != len(ids):
        raise QueryError(f"{len(ids)} ids beside {len(found)} vectors; give one vector per id")
    found = found if found.dtype in (np.float16, np.float32) else found.astype(np.float32)
    lengths = _lengths(found)
    bad = np.flatnonzero(~((lengths > LENGTHS[0]) & (lengths < LENGTHS[1])))
    if len(bad):
        raise NonFiniteError(
            f"{len(bad)} of {len(ids)} vectors cannot be indexed: row {bad[0]} (id {ids[bad[0]]}) "
            f"{_flaw(float(lengths[bad[0]]))}; nothing was stored: leave such tiles out"
        )
    return ids, found, check_payload(payload, spec.fields, len(ids))


def id_array(ids: Any) -> Ids:
    """Return ids as uint64 (n,).

    Raises:
        QueryError: something that is no list of ids.
    """
    array = np.asarray(ids)
    if (
        array.ndim != 1
        or (array.dtype.kind not in "ui" and array.size)
        or (array.dtype.kind == "i" and (array < 0).any())
    ):
        raise QueryError(f"ids must be whole numbers from 0, shape (n,), not {array.dtype} {array.shape}")
    return array.astype(np.uint64)


def check_payload(payload: Payload, fields: Mapping[str, FieldType], rows: int) -> dict[str, npt.NDArray[Any]]:
    """Return the columns in the order and types of `fields`: object arrays of str, int64, float64, bool.

    Raises:
        QueryError: columns lacking or too many, of another length, or of another type; None and NaN in text too.
    """
    extra, lacking = [n for n in payload if n not in fields], [n for n in fields if n not in payload]
    if extra:
        raise QueryError(f"the index has no field {extra[0]!r}; the closest are: {closest(extra[0], fields)}")
    if lacking:
        raise QueryError(f"the payload lacks {', '.join(lacking)}; give every field of the index")
    return {name: _column(name, kind, np.asarray(payload[name]), rows) for name, kind in fields.items()}


def check_k(k: int) -> int:
    """Return k.

    Raises:
        QueryError: k is not a whole number from 1.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise QueryError(f"k is {k!r}; ask for at least 1 point")
    return int(k)


def recommended(positive: Vectors, negative: Vectors | None, spec: IndexSpec) -> Floats:
    """Return the one query (1, dim) that stands for examples and counter-examples.

    With p and n the means of the positive and negative examples, each example of length 1 first: p + (p - n), or p
    without negatives. This is Qdrant's "average vector" strategy, computed here so that all engines agree.

    Raises:
        IndexMismatchError: another dimension.
        QueryError: no positive example, NaN or zero examples, or examples that cancel.
    """
    if not np.asarray(positive).size:
        raise QueryError("no positive example; give at least one tile to look for")
    towards = unit_queries(positive, spec).mean(axis=0, dtype=np.float64)
    if negative is not None and np.asarray(negative).size:
        towards = 2 * towards - unit_queries(negative, spec).mean(axis=0, dtype=np.float64)
    if np.sqrt(np.square(towards).sum()) < 1e-6:
        raise QueryError("the examples cancel: nothing is left to look for; take a negative or a positive example away")
    return unit_queries(towards, spec)


def mmr_pool(k: int) -> int:
    """Return how many of the nearest points `mmr_order` chooses from, in every engine: 10 k, at least 100."""
    return max(100, 10 * k)


def mmr_order(score: Floats, vectors: Floats, k: int, relevance: float) -> npt.NDArray[np.int64]:
    """Return the rows (<= k,) chosen one after the other by maximal marginal relevance.

    Each step takes the row with the largest ``w s_i - (1 - w) max_j v_i . v_j`` over the chosen j (Carbonell and
    Goldstein, SIGIR 1998, the formula of section 2); the first is the most similar; ties go to the earlier row.

    Args:
        score: similarity with the query (n,), best first.
        vectors: of length 1 (n, dim).
        k: rows wanted.
        relevance: w, 0 to 1.

    Raises:
        QueryError: w outside 0-1.
    """
    if not 0 <= relevance <= 1:
        raise QueryError(f"mmr is {relevance}; it is the weight of relevance, 0 (most varied) to 1 (most similar)")
    chosen: list[int] = []
    nearest = np.full(len(score), -np.inf)
    gain = np.array(score, np.float64)
    while len(chosen) < min(k, len(score)):
        chosen.append(int(np.argmax(gain)))
        nearest = np.maximum(nearest, (vectors @ vectors[chosen[-1]]).astype(np.float64))
        gain = relevance * score.astype(np.float64) - (1 - relevance) * nearest
        gain[chosen] = -np.inf
    return np.array(chosen, np.int64)


def _column(name: str, kind: FieldType, column: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    if column.shape != (rows,):
        raise QueryError(f"payload {name!r} has shape {column.shape} for {rows} points")
    kinds = {"keyword": "UO", "integer": "iu", "float": "fiu", "bool": "b"}[kind]
    if column.dtype.kind not in kinds and rows:
        raise QueryError(f"payload {name!r} must be {kind}, not {column.dtype}")
    if kind == "keyword":
        column = column.astype(object)
        wrong = [value for value in column.tolist() if not isinstance(value, str)]
        if wrong:
            raise QueryError(f"payload {name!r} must be text, not {wrong[0]!r}; a missing value is the empty text")
        column[:] = [str(value) for value in column.tolist()]  # numpy's texts are str, and are not JSON's
    return column.astype(_DTYPES[kind])


def _check_dim(vectors: Vectors, spec: IndexSpec, what: str) -> None:
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise QueryError(f"{what} must be numbers of shape (n, {spec.dim}), not {vectors.dtype} {vectors.shape}")
    if vectors.shape[1] != spec.dim:
        raise IndexMismatchError(
            f"dim: {what} has {vectors.shape[1]} numbers, the index {spec.dim} (encoder {spec.encoder}); "
            "use the encoder the index was made with"
        )


def _flaw(length: float) -> str:
    if not np.isfinite(length):
        return "holds NaN or infinity"
    if length <= LENGTHS[0]:
        return "is all zeros, so its cosine with anything is undefined"
    return f"has length {length:g}, too long for float32"


def _lengths(vectors: Vectors) -> npt.NDArray[np.float64]:
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
