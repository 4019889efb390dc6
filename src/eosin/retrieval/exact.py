"""The exact engine: every vector is looked at, so what it answers is the truth the other engines are held to.

Vectors are memory-mapped and multiplied block by block in float32. A row is dropped only when its float32 score lies
below the k-th best by more than rounding can hide; what is left is scored again in float64. So the answer does not
depend on blocks or on the BLAS, and equal scores come in the order of their ids.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import BaseFileLock

from eosin.errors import IndexCorruptError, IndexStoreError, QueryError
from eosin.retrieval.filters import (
    All,
    Any_,
    Between,
    Filter,
    Is,
    Leaf,
    Not,
    between,
    check_filter,
    evaluate,
    field_type,
)
from eosin.retrieval.inputs import check_k, check_points, id_array, mmr_order, mmr_pool, recommended, unit_queries
from eosin.retrieval.manifest import Manifest, disk_trouble, lock_index, read_manifest, write_manifest
from eosin.retrieval.points import Points
from eosin.retrieval.protocol import Floats, Hits, Ids, IndexSpec, Payload, Vectors
from eosin.retrieval.quantised import Codes, read_codes, write_codes
from eosin.retrieval.scan import BLOCK, Block, Score, as_float32, best_rows

Rows = npt.NDArray[np.int64]

ENGINE = "exact"
QUERIES = 256  # queries at once
ROUNDING = float(np.finfo(np.float32).eps) / 2


class ExactIndex:
    """A folder of points that is searched whole. Use `create` or `open`.

    Several may read it at once; each sees what was stored when it was opened. The first call that writes takes the
    lock and keeps it until `close`.
    """

    def __init__(self, path: Path, manifest: Manifest, points: Points) -> None:
        """Hold the opened files; use `create` or `open` instead."""
        self.path = path
        self._manifest = manifest
        self._points = points
        self._codes = _codes(points)
        self._lock: BaseFileLock | None = None
        self._closed = False

    @classmethod
    def create(cls, path: str | Path, spec: IndexSpec) -> ExactIndex:
        """Make an empty index in a folder, and open it.

        Raises:
            IndexStoreError: the folder cannot be written.
            IndexLockedError: another process is making it.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = lock_index(path)
            try:
                manifest = Manifest(spec=spec, engine=ENGINE, state={"generation": 1})
                Points.create(_folder(path, manifest), spec)
                write_manifest(path, manifest)
            finally:
                lock.release()
        except IndexStoreError:
            raise
        except OSError as error:
            raise disk_trouble(error, path) from error
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> ExactIndex:
        """Open an index that `create` made.

        Raises:
            IndexStoreError: there is none, or another engine made it.
            IndexCorruptError: files are missing, cut short or altered.
        """
        path = Path(path)
        return cls(path, *_load(path))

    @property
    def spec(self) -> IndexSpec:
        """What the index holds."""
        return self._manifest.spec

    def upsert(self, ids: Ids, vectors: Vectors, payload: Payload) -> None:
        """Store points durably; see `VectorIndex.upsert`."""
        ids, vectors, columns = check_points(ids, vectors, payload, self.spec)
        self._begin()
        if not len(ids):
            return
        if vectors.dtype == np.float32 and self._points.vectors.dtype == np.float16:
            self._rewrite("<f4")
        self._points.append(ids, vectors, columns)

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
        """Return the `k` points nearest to each query; see `VectorIndex.search`.

        `exact` matters only for an index with quantised codes.
        """
        units = unit_queries(queries, self.spec)
        k = check_k(k)
        if mmr is not None and not 0 <= mmr <= 1:
            raise QueryError(f"mmr is {mmr}; it is the weight of relevance, 0 (most varied) to 1 (most similar)")
        allowed = self._allowed(where)
        pool = k if mmr is None else mmr_pool(k)
        step = max(1, min(QUERIES, 4_000_000 // min(pool, max(1, len(allowed)))))
        found: list[Hits] = []
        for start in range(0, len(units), step):
            part = units[start : start + step]
            for query, rows in zip(part, self._candidates(part, pool, allowed, exact), strict=True):
                rows, score = self._ranked(query, rows, pool)
                hits = self._hits(rows, score, k, with_vectors or mmr is not None)
                found.append(hits if mmr is None else _varied(hits, k, mmr, with_vectors))
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
        """Return the points nearest to examples and away from counter-examples; see `VectorIndex.recommend`."""
        query = recommended(positive, negative, self.spec)
        return self.search(query, k=k, where=where, exact=exact, with_vectors=with_vectors, mmr=mmr)[0]

    def retrieve(self, ids: Ids) -> Hits:
        """Return points by id, in the order asked; ids that are not there are left out."""
        asked = id_array(ids)
        rows, found = self._open_points().find(asked)
        return self._hits(rows[found], np.zeros(int(found.sum()), np.float32), len(asked), True)

    def scroll(self, *, where: Filter | None = None, batch: int = 1024) -> Iterator[Hits]:
        """Yield every point the filter holds for, ascending ids, with vectors, `batch` at a time."""
        rows = np.flatnonzero(self._allowed(where))
        rows = rows[np.argsort(self._points.ids[rows], kind="stable")]
        for start in range(0, len(rows), check_k(batch)):
            part = rows[start : start + batch]
            yield self._hits(part, np.zeros(len(part), np.float32), len(part), True)

    def delete(self, where_or_ids: Filter | Ids) -> int:
        """Remove points durably; return how many there were. Their bytes leave the disk with `optimise`."""
        self._begin()
        if isinstance(where_or_ids, (Is, Between, Not, All, Any_)):
            rows = np.flatnonzero(self._allowed(where_or_ids))
        else:
            at, found = self._points.find(id_array(where_or_ids))
            rows = np.unique(at[found])
        if len(rows):
            self._points.kill(rows)
        return len(rows)

    def count(self, where: Filter | None = None) -> int:
        """Return the number of points the filter holds for."""
        return int(np.count_nonzero(self._allowed(where)))

    def facet(self, field: str, where: Filter | None = None) -> dict[str, int]:
        """Return how many points hold each value of a keyword, integer or bool field; see `VectorIndex.facet`."""
        kind = field_type(field, self.spec.fields)
        if kind == "float":
            raise QueryError(f"field {field!r} holds floats, which have no values to count; filter by a range")
        allowed = self._allowed(where)
        values, times = np.unique(self._points.column(field)[allowed], return_counts=True)
        words = list(self._points.words.get(field, ()))
        names = [words[value] if kind == "keyword" else str(value) for value in values.tolist()]
        return dict(sorted(zip(names, times.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0])))

    def optimise(self) -> None:
        """Drop the bytes of replaced and deleted points, and make the codes if the spec wants them.

        Raises:
            IndexCorruptError: the vectors differ from their checksums; nothing was changed.
            IndexStoreError: the disk is full; the index is as it was.
        """
        self._begin()
        coded = 0 if self._codes is None else len(self._codes)
        if self._points.live.all() and (self.spec.quantise == "none" or coded == len(self._points.rows)):
            return
        self._points.check_vectors()
        self._rewrite(None)

    def stats(self) -> dict[str, Any]:
        """Return JSON types: what is stored, and how much of it waits for `optimise`."""
        points = self._open_points()
        rows = len(points.rows)
        return {
            "engine": ENGINE,
            "points": int(np.count_nonzero(points.live)),
            "dim": self.spec.dim,
            "quantise": self.spec.quantise,
            "dtype": str(points.vectors.dtype),
            "bytes_on_disk": points.bytes_on_disk(),
            "optimised": rows if self.spec.quantise == "none" else len(self._codes or ()),
            "replaced_or_deleted": int(rows - np.count_nonzero(points.live)),
        }

    def snapshot(self, path: str | Path) -> Path:
        """Copy the live points to a new folder, which is an index of its own, and return it.

        Raises:
            IndexStoreError: something is there already, or the disk is full.
        """
        path, points = Path(path), self._open_points()
        if path.exists():
            raise IndexStoreError(f"{path} is there already; give a new folder for the snapshot")
        manifest = replace(self._manifest, state={"generation": 1})
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            _write_generation(points, _folder(temporary, manifest), None)
            write_manifest(temporary, manifest)
            os.replace(temporary, path)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise error if isinstance(error, IndexStoreError) else disk_trouble(error, path) from error
        return path

    def close(self) -> None:
        """Let go of files and lock; calling again does nothing."""
        if not self._closed:
            self._closed = True
            self._points = Points(self._points.folder, self.spec)
            self._codes = None
            if self._lock is not None:
                self._lock.release()

    def _open_points(self) -> Points:
        if self._closed:
            raise IndexStoreError(f"{self.path}: the index is closed; open it again")
        return self._points

    def _begin(self) -> None:
        """Take the lock before the first change, and look again at what others stored until then."""
        self._open_points()
        if self._lock is None:
            self._lock = lock_index(self.path)
            self._manifest, self._points = _load(self.path)
            self._codes = _codes(self._points)
            for folder in self.path.glob("g[0-9]*"):
                if folder != self._points.folder:
                    shutil.rmtree(folder, ignore_errors=True)

    def _rewrite(self, dtype: str | None) -> None:
        """Copy the live points to the next generation and switch to it in one step."""
        old = self._points.folder
        manifest = replace(self._manifest, state={"generation": self._manifest.state["generation"] + 1})
        folder = _folder(self.path, manifest)
        try:
            points = _write_generation(self._points, folder, dtype)
            write_manifest(self.path, manifest)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise error if isinstance(error, IndexStoreError) else disk_trouble(error, self.path) from error
        self._manifest, self._points, self._codes = manifest, points, _codes(points)
        shutil.rmtree(old, ignore_errors=True)

    def _allowed(self, where: Filter | None) -> npt.NDArray[np.bool_]:
        """Return the live rows the filter holds for (n,)."""
        points = self._open_points()
        if where is None:
            return points.live
        check_filter(where, self.spec.fields)
        return evaluate(where, self._leaf, len(points.rows)) & points.live

    def _leaf(self, leaf: Leaf) -> npt.NDArray[np.bool_]:
        column = self._points.column(leaf.field)
        if isinstance(leaf, Between):
            return between(leaf.low, leaf.high, column)
        if self.spec.fields[leaf.field] != "keyword":
            return np.isin(column, np.array(leaf.values))
        known = self._points.words.get(leaf.field, {})
        wanted = np.zeros(len(known) + 1, bool)
        wanted[[known[str(value)] for value in leaf.values if value in known]] = True
        return wanted[column]

    def _candidates(self, queries: Floats, k: int, allowed: npt.NDArray[np.bool_], exact: bool) -> list[Rows]:
        """Return rows a query that hold its best `k`: certainly, or as far as codes can tell."""
        margin = 2 * (self.spec.dim + 8) * ROUNDING  # Higham 2002, section 3.1, on both sides
        scan = self._scorer(queries)
        if exact or self._codes is None:
            return best_rows(scan, allowed, 0, k, margin, len(queries))
        coded, keep = len(self._codes), self._codes.candidates(k)
        rough = best_rows(self._codes.scorer(queries), allowed[:coded], 0, keep, 0.0, len(queries))
        rest = best_rows(scan, allowed[coded:], coded, k, margin, len(queries))
        return [np.concatenate(pair) for pair in zip(rough, rest, strict=True)]

    def _scorer(self, queries: Floats) -> Score:
        vectors, inverse = self._points.vectors, self._points.lengths()

        def score(block: Block) -> Floats:
            found = queries @ as_float32(vectors[block]).T
            found *= (1 / inverse[block]).astype(np.float32)
            return found

        return score

    def _ranked(self, query: Floats, rows: Rows, k: int) -> tuple[Rows, Floats]:
        """Return the best `k` of some rows and their cosines, measured in float64; equal ones by id."""
        points = self._points
        score = np.empty(len(rows))
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            products = points.vectors[part].astype(np.float64) * query.astype(np.float64)
            score[start : start + BLOCK] = products.sum(axis=1) / points.lengths()[part]
        order = np.lexsort((points.ids[rows], -score))[:k]
        return rows[order], np.clip(score[order], -1, 1).astype(np.float32)

    def _hits(self, rows: Rows, score: Floats, wanted: int, with_vectors: bool) -> Hits:
        points = self._points
        vectors = None
        if with_vectors:
            vectors = (points.vectors[rows] / points.lengths()[rows, None]).astype(np.float32)
        return Hits(ids=points.ids[rows], score=score, payload=points.payload(rows), vectors=vectors, wanted=wanted)


def _load(path: Path) -> tuple[Manifest, Points]:
    """Read the manifest and the generation it names; once more if a writer has just replaced that."""
    manifest = read_manifest(path)
    if manifest.engine != ENGINE:
        raise IndexStoreError(f"{path} was made by the engine {manifest.engine!r}; open it with open_index")
    try:
        return manifest, Points.open(_folder(path, manifest), manifest.spec)
    except FileNotFoundError as error:
        newer = read_manifest(path)
        if newer.state == manifest.state:
            raise IndexCorruptError(
                f"{path} is half an index: {error.filename} is missing; restore it, or delete the folder and make the "
                "index again"
            ) from error
    return newer, Points.open(_folder(path, newer), newer.spec)


def _folder(path: Path, manifest: Manifest) -> Path:
    return path / f"g{int(manifest.state['generation']):04d}"


def _codes(points: Points) -> Codes | None:
    kind = points.spec.quantise
    return None if kind == "none" else read_codes(points.folder, kind)


def _write_generation(points: Points, folder: Path, dtype: str | None) -> Points:
    """Copy the live points to a new folder, with codes if the spec wants them."""
    copy = points.copy_live(folder, dtype)

    def parts() -> Iterator[Floats]:
        for part in copy.chunks():
            yield (copy.vectors[part] / copy.lengths()[part, None]).astype(np.float32)

    if points.spec.quantise != "none":
        write_codes(folder, points.spec.quantise, parts, len(copy.rows), points.spec.dim)
    return copy


def _varied(hits: Hits, k: int, relevance: float, with_vectors: bool) -> Hits:
    assert hits.vectors is not None
    varied = hits.take(mmr_order(hits.score, hits.vectors, k, relevance))
    return varied if with_vectors else replace(varied, vectors=None)
