"""Qdrant Edge: an HNSW index inside this process, on disk, with filters inside the search. Needs `qdrant-edge-py`.

    index.json   spec, engine, and what the engine's files must be at least (see `_whole`)
    shard/       Qdrant's files

One process has the folder open at a time. The graph (Malkov & Yashunin, arXiv 1603.09320) is made by `optimise`; what
was stored since is compared one by one, which `stats` tells. A filter must not cut the graph apart: one that leaves few
points is answered by comparing them all; the points of each value of a keyword field are linked among themselves too;
what such links do not hold together goes through neighbours of neighbours (ACORN-1, Patel et al., arXiv 2403.04871,
section 5).

An upsert is acknowledged when its entry in Qdrant's write-ahead log is on the disk; the other files follow at every
`FLUSH_POINTS` points. Qdrant writes through memory maps, where a full disk kills the process: so room is looked for
before, and `optimise` runs in a process of its own, which can also be interrupted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from filelock import BaseFileLock

from eosin.errors import IndexCorruptError, IndexStoreError, MissingDependencyError
from eosin.features.writer import fsync_folder
from eosin.retrieval.edge_files import (
    OPTIMISING,
    ROOM,
    ROOM_TO_OPEN,
    SHARD,
    check_files,
    check_optimised,
    check_room,
    copy_sparse,
    damaged,
    disk_bytes,
    sizes,
    sync_log,
)
from eosin.retrieval.filters import FieldType
from eosin.retrieval.manifest import (
    Manifest,
    disk_trouble,
    is_index,
    lock_index,
    read_manifest,
    write_manifest,
)
from eosin.retrieval.protocol import IndexSpec
from eosin.retrieval.qdrant import (
    ACORN_BELOW,
    EF_CONSTRUCT,
    FULL_SCAN_BYTES,
    OVERSAMPLING,
    SEARCH_EF,
    Json,
    M,
    QdrantIndex,
    Row,
    batches,
    field_key,
)

if TYPE_CHECKING:
    import qdrant_edge

ENGINE = "edge"

BATCH_BYTES = 2**22  # of vectors in one entry of the log
FLUSH_POINTS = 32_768
QUERIES = 64  # in one request
_PAYLOAD_BYTES = 2048  # a point, generously

# Qdrant's own lock lets a second process in while the first optimises, which then damages the files of both. So the
# process holds a lock to its end, and does nothing when the one that asked is gone: then the index may be open again.
_OPTIMISE = """
import os, sys, filelock, qdrant_edge
with filelock.FileLock(sys.argv[2], timeout=0):
    if os.getppid() == int(sys.argv[3]):
        shard = qdrant_edge.EdgeShard.load(sys.argv[1])
        shard.optimize()
        shard.flush()
        shard.close()
        del shard
"""


class EdgeIndex(QdrantIndex):
    """A folder with an index of Qdrant Edge. Use `create` or `open`.

    Attributes:
        path: the folder.
        spec: what it holds.
        ef: points looked at on the way through the graph: more is slower and finds more (HNSW's ef).
    """

    def __init__(self, path: Path, manifest: Manifest, shard: qdrant_edge.EdgeShard, lock: BaseFileLock) -> None:
        """Hold the opened shard; use `create` or `open` instead."""
        self.path = path
        self.spec = manifest.spec
        self.ef = SEARCH_EF
        self._manifest = manifest
        self._shard: qdrant_edge.EdgeShard | None = shard
        self._lock = lock
        self._writing = threading.RLock()
        self._unflushed = 0

    @classmethod
    def create(cls, path: str | Path, spec: IndexSpec) -> EdgeIndex:
        """Make an empty index in a folder, and open it.

        Raises:
            IndexStoreError: an index is there already, or the folder cannot be written.
            IndexLockedError: another process is making it.
            MissingDependencyError: `qdrant-edge-py` is not installed.
        """
        path, engine = Path(path), _engine()
        config = _config(engine, spec)
        try:
            path.mkdir(parents=True, exist_ok=True)
            with _held(lock_index(path)) as lock:
                if is_index(path) and read_manifest(path).complete:
                    raise IndexStoreError(f"{path} holds an index already; open it, or give another folder")
                check_room(path, ROOM)
                write_manifest(path, Manifest(spec=spec, engine=ENGINE, complete=False))
                shutil.rmtree(path / SHARD, ignore_errors=True)  # of an attempt that was interrupted
                (path / SHARD).mkdir()
                with _errors(path, "make the index"):
                    shard = engine.EdgeShard.create(str(path / SHARD), config)
                    for name, kind in spec.fields.items():
                        schema = _schema(engine, kind)
                        shard.update(engine.UpdateOperation.create_field_index(field_key(name), schema))
                    shard.flush()
                sync_log(path)
                manifest = Manifest(spec=spec, engine=ENGINE, state={"points": 0})
                write_manifest(path, manifest)
                return cls(path, manifest, shard, lock)
        except OSError as error:
            raise error if isinstance(error, IndexStoreError) else disk_trouble(error, path) from error

    @classmethod
    def open(cls, path: str | Path) -> EdgeIndex:
        """Open an index that `create` made.

        Raises:
            IndexStoreError: there is none, or another engine made it.
            IndexCorruptError: files are missing, cut short or damaged, or points are lost.
            IndexLockedError: another process has it open.
            MissingDependencyError: `qdrant-edge-py` is not installed.
        """
        path, engine = Path(path), _engine()
        manifest = read_manifest(path)
        if manifest.engine != ENGINE:
            raise IndexStoreError(f"{path} was made by the engine {manifest.engine!r}; open it with open_index")
        with _held(lock_index(path)) as lock:
            check_optimised(path)
            manifest = read_manifest(path)
            if not manifest.complete:
                raise IndexCorruptError(f"{path} is half an index: making it was interrupted; make it again")
            check_files(path, manifest)
            check_room(path, ROOM_TO_OPEN)
            index = cls(path, manifest, _load(engine, path), lock)
            there, known = index._count(None), int(manifest.state.get("points", 0))
            if there < known:
                index.shard.close()
                raise damaged(path, f"it held {known} points or more when it was last closed, now {there}")
            shutil.rmtree(path / SHARD / "temp_segments", ignore_errors=True)  # of a killed optimise
            return index

    @property
    def shard(self) -> qdrant_edge.EdgeShard:
        """Qdrant's own object.

        Raises:
            IndexStoreError: the index is closed.
        """
        if self._shard is None:
            raise IndexStoreError(f"{self.path}: the index is closed; open it again")
        return self._shard

    def optimise(self) -> None:
        """Build the graph over what was stored since the last time, in a process of its own.

        Searches wait meanwhile. Interrupted or killed, it leaves the points as they were, the new ones still compared
        one by one.

        Raises:
            IndexStoreError: too little room for a second copy of the points, or the engine failed.
        """
        with self._writing:
            self._flush()
            check_room(self.path, ROOM + 2 * disk_bytes(self.path / SHARD))
            self._note({"points": self._count(None)})
            self.shard.close()
            self._shard = None
            lock, parent = str(self.path / OPTIMISING), str(os.getpid())
            command = [sys.executable, "-c", _OPTIMISE, str(self.path / SHARD), lock, parent]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            finally:
                self._shard = _load(_engine(), self.path)
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
                raise IndexStoreError(f"{self.path} could not be optimised: {why[0]}; every point is kept")
            self._record()

    def stats(self) -> dict[str, Any]:
        """Return JSON types: what is stored, and how much of it is compared one by one until `optimise`."""
        with _errors(self.path, "count its points"):
            info = self.shard.info()
        points = self._count(None)
        waiting = max(0, points - info.indexed_vectors_count)
        return {
            "engine": ENGINE,
            "points": points,
            "dim": self.spec.dim,
            "quantise": self.spec.quantise,
            "bytes_on_disk": disk_bytes(self.path),
            "optimised": points - waiting,
            "compared_one_by_one": waiting,
            "segments": info.segments_count,
            "m": M,
            "ef_construct": EF_CONSTRUCT,
            "ef": self.ef,
        }

    def snapshot(self, path: str | Path) -> Path:
        """Copy the index to a new folder, which is an index of its own, and return it.

        Raises:
            IndexStoreError: something is there already, or the disk is full.
        """
        path = Path(path)
        if path.exists():
            raise IndexStoreError(f"{path} is there already; give a new folder for the snapshot")
        temporary = path.with_name(f".{path.name}.tmp")
        with self._writing:
            self._flush()
            manifest = replace(self._manifest, state={"points": self._count(None)})
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(self.path / SHARD, temporary / SHARD, copy_function=copy_sparse)
                write_manifest(temporary, manifest)
                os.replace(temporary, path)
                fsync_folder(path.absolute().parent)
            except OSError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise error if isinstance(error, IndexStoreError) else disk_trouble(error, path) from error
        return path

    def close(self) -> None:
        """Flush, and let go of files and lock; calling again does nothing."""
        with self._writing:
            if self._shard is None:
                return
            try:
                self._flush()
                self._record()
                self._shard.close()
            finally:
                self._shard = None
                self._lock.release()

    def _ask(
        self, queries: list[list[float]], k: int, where: Json | None, *, exact: bool, acorn: bool, vectors: bool
    ) -> list[list[Row]]:
        engine = _engine()
        params = engine.SearchParams(
            hnsw_ef=max(self.ef, k + k // 2),
            exact=exact,
            quantization=engine.QuantizationSearchParams(
                ignore=exact, rescore=True, oversampling=OVERSAMPLING[self.spec.quantise]
            ),
            acorn=engine.AcornSearchParams(enable=acorn, max_selectivity=ACORN_BELOW),
        )
        condition = None if where is None else _filter(engine, where)
        requests = [
            engine.QueryRequest(
                limit=k,
                query=engine.Query.Nearest(query),
                filter=condition,
                params=params,
                with_payload=True,
                with_vector=vectors,
            )
            for query in queries
        ]
        found: list[list[Row]] = []
        with _errors(self.path, "search"):
            for start in range(0, len(requests), QUERIES):
                batch = engine.QueryBatchRequest(requests[start : start + QUERIES])
                for points in self.shard.query_batch(batch):
                    found.append([Row(_id(p.id), p.score, p.payload or {}, _vector(p.vector)) for p in points])
        return found

    def _fetch(self, ids: list[int], *, whole: bool) -> list[Row]:
        with _errors(self.path, "read points"):
            points = self.shard.retrieve(list(ids), whole, whole)
        return [Row(_id(p.id), 0.0, p.payload or {}, _vector(p.vector)) for p in points]

    def _page(self, start: int, limit: int, where: Json | None) -> tuple[list[Row], int | None]:
        engine = _engine()
        condition = None if where is None else _filter(engine, where)
        request = engine.ScrollRequest(start, limit, condition, with_payload=True, with_vector=True)
        with _errors(self.path, "read points"):
            points, following = self.shard.scroll(request)
        rows = [Row(_id(p.id), 0.0, p.payload or {}, _vector(p.vector)) for p in points]
        return rows, None if following is None else _id(following)

    def _put(self, ids: list[int], vectors: npt.NDArray[np.float32], payload: list[Json]) -> None:
        engine = _engine()
        with self._writing:
            self._changing()
            check_room(self.path, ROOM + 3 * (vectors.nbytes + _PAYLOAD_BYTES * len(ids)))
            for part in batches(ids, vectors, payload, max(1, BATCH_BYTES // (4 * self.spec.dim))):
                points = [engine.Point(*point) for point in part]
                with _errors(self.path, "store points"):
                    self.shard.update(engine.UpdateOperation.upsert_points(points))
                self._unflushed += len(points)
                if self._unflushed >= FLUSH_POINTS:
                    self._flush()
            sync_log(self.path)

    def _drop(self, ids: list[int]) -> None:
        self._remove(_engine().UpdateOperation.delete_points(list(ids)), len(ids))

    def _drop_where(self, where: Json, there: int) -> None:
        engine = _engine()
        self._remove(engine.UpdateOperation.delete_points_by_filter(_filter(engine, where)), there)

    def _remove(self, operation: qdrant_edge.UpdateOperation, there: int) -> None:
        with self._writing:
            self._changing(fewer=there)
            with _errors(self.path, "delete points"):
                self.shard.update(operation)
            self._unflushed += there
            sync_log(self.path)

    def _count(self, where: Json | None) -> int:
        engine = _engine()
        condition = None if where is None else _filter(engine, where)
        with _errors(self.path, "count its points"):
            return self.shard.count(engine.CountRequest(exact=True, filter=condition))

    def _facet(self, key: str, where: Json | None, limit: int) -> Iterable[tuple[Any, int]]:
        engine = _engine()
        condition = None if where is None else _filter(engine, where)
        with _errors(self.path, "count values"):
            found = self.shard.facet(engine.FacetRequest(key, limit=limit, exact=True, filter=condition))
        return [(hit.value, hit.count) for hit in found]

    def _flush(self) -> None:
        """Write every file, after which Qdrant needs its log no more."""
        if self._unflushed:
            with _errors(self.path, "write its files"):
                self.shard.flush()
            self._unflushed = 0

    def _changing(self, *, fewer: int = 0) -> None:
        """Before the first change: take back what `index.json` says of the files, and of points that will go."""
        known = int(self._manifest.state.get("points", 0))
        self._note({"points": max(0, known - fewer)})

    def _record(self) -> None:
        """Note the number of points and the sizes of files, for `open` to compare with."""
        self._note({"points": self._count(None), "files": sizes(self.path / SHARD)})

    def _note(self, state: dict[str, Any]) -> None:
        if self._manifest.state != state:
            self._manifest = replace(self._manifest, state=state)
            write_manifest(self.path, self._manifest)


def _engine() -> Any:
    try:
        import qdrant_edge
    except ImportError as error:
        raise MissingDependencyError(
            "the engine 'edge' needs qdrant-edge-py, which is not installed; run: pip install 'eosin[search]', or make "
            "the index with engine='exact'"
        ) from error
    return qdrant_edge


@contextlib.contextmanager
def _held(lock: BaseFileLock) -> Iterator[BaseFileLock]:
    """Release the lock when what is done under it raises."""
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


@contextlib.contextmanager
def _errors(path: Path, doing: str) -> Iterator[None]:
    """Turn what the engine raises into one of ours: it raises `Exception` itself, nothing narrower."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise IndexStoreError(f"{path}: Qdrant Edge could not {doing}: {error}") from error


def _load(engine: Any, path: Path) -> qdrant_edge.EdgeShard:
    try:
        return engine.EdgeShard.load(str(path / SHARD))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise damaged(path, str(error)) from error


def _config(engine: Any, spec: IndexSpec) -> qdrant_edge.EdgeConfig:
    """Return how the engine keeps and links vectors: see docs/vector-search.md for the figures behind it."""
    memory = engine.Memory
    codes = {
        "none": None,
        "int8": engine.ScalarQuantizationConfig(engine.ScalarType.Int8, quantile=0.99, memory=memory.Pinned),
        "binary": engine.BinaryQuantizationConfig(
            query_encoding=engine.BinaryQuantizationQueryEncoding.Scalar8Bits, memory=memory.Pinned
        ),
    }[spec.quantise]
    graph = engine.HnswIndexConfig(
        m=M, ef_construct=EF_CONSTRUCT, full_scan_threshold=FULL_SCAN_BYTES // 1024, memory=memory.Cached
    )
    vectors = engine.EdgeVectorParams(
        size=spec.dim,
        distance=engine.Distance.Cosine,
        memory=memory.Cached if codes is None else memory.Cold,
        quantization_config=codes,
        hnsw_config=graph,
    )
    # One large graph is searched faster than several small ones; the second segment takes what comes later.
    segments = engine.EdgeOptimizersConfig(
        default_segment_number=2, max_segment_size=2**40 // 1024, indexing_threshold=FULL_SCAN_BYTES // 1024
    )
    return engine.EdgeConfig(vectors=vectors, hnsw_config=graph, optimizers=segments, payload_memory=memory.Cold)


def _schema(engine: Any, kind: FieldType) -> Any:
    """Return how a field is indexed: the values of keywords get links in the graph (see `qdrant.needs_acorn`)."""
    if kind == "keyword":
        return engine.KeywordIndexParams(enable_hnsw=True)
    if kind == "float":
        return engine.FloatIndexParams(enable_hnsw=False)
    return engine.IntegerIndexParams(enable_hnsw=False)  # bool too: see retrieval/qdrant.py


def _filter(engine: Any, where: Json) -> qdrant_edge.Filter:
    return engine.Filter(**{name: [_condition(engine, part) for part in parts] for name, parts in where.items()})


def _condition(engine: Any, part: Json) -> Any:
    if "has_id" in part:
        return engine.HasIdCondition(set(part["has_id"]))
    if "match" in part:
        match = part["match"]
        value = engine.MatchValue(match["value"]) if "value" in match else engine.MatchAny(match["any"])
        return engine.FieldCondition(part["key"], match=value)
    if "range" in part:
        return engine.FieldCondition(part["key"], range=engine.RangeFloat(**part["range"]))
    return _filter(engine, part)


def _id(found: Any) -> int:
    if not isinstance(found, int):
        raise IndexCorruptError(f"a point has the id {found!r}, which eosin did not give; make the index again")
    return found


def _vector(found: Any) -> list[float] | None:
    return found
