"""A Qdrant server or cluster as a search index: one collection, named in the address. Needs `qdrant-client`.

``https://search.example.org:6333/tiles`` is the collection ``tiles``. Its metadata hold the spec, so that no other
features can be mixed in. Vectors, links and filters are as in the embedded engine (`eosin.retrieval.edge`); shards and
copies of them are the server's own settings. Any number of processes may read and write.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt

from eosin.errors import (
    IndexCorruptError,
    IndexMismatchError,
    IndexStoreError,
    IndexUnreachableError,
    MissingDependencyError,
)
from eosin.retrieval.exact import ExactIndex
from eosin.retrieval.manifest import FORMAT, FORMAT_VERSION, disk_trouble
from eosin.retrieval.protocol import IndexSpec, VectorIndex, check_same_features
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
    from qdrant_client import QdrantClient

ENGINE = "server"
REQUEST_BYTES = 2**24  # a server takes 32 MiB unless it is told otherwise
ANSWER_WITHIN_S = 60
LOOK_EVERY_S = 1.0
_NUMBER_BYTES = 24  # of one float in JSON
_PAYLOAD_BYTES = 2048  # a point, generously
_KEY = "eosin"


class ServerIndex(QdrantIndex):
    """A collection of a Qdrant server. Use `create` or `open`.

    Attributes:
        url: address of the collection.
        spec: what it holds.
        ef: points looked at on the way through the graph: more is slower and finds more (HNSW's ef).
    """

    def __init__(self, url: str, spec: IndexSpec, client: QdrantClient) -> None:
        """Hold the connection; use `create` or `open` instead."""
        self.url = url
        self.spec = spec
        self.ef = SEARCH_EF
        self._name = _address(url)[1]
        self._open_client: QdrantClient | None = client

    @classmethod
    def exists(cls, url: str, *, api_key: str | None = None) -> bool:
        """Return whether the server has the collection.

        Raises:
            IndexUnreachableError: it does not answer.
        """
        with _connected(url, api_key) as client, _answers(url, "name its collections"):
            found = client.collection_exists(_address(url)[1])
            client.close()
        return found

    @classmethod
    def create(cls, url: str, spec: IndexSpec, *, api_key: str | None = None) -> ServerIndex:
        """Make the collection, and open it.

        Raises:
            IndexStoreError: it is there already, the key does not allow it, or the server is older than 1.16 and
                keeps no metadata.
            IndexUnreachableError: the server does not answer.
            MissingDependencyError: `qdrant-client` is not installed.
        """
        name = _address(url)[1]
        keys = [field_key(field) for field in spec.fields]
        with _connected(url, api_key) as client, _answers(url, "make the collection"):
            if client.collection_exists(name):
                raise IndexStoreError(f"{url} holds a collection already; open it, or give another name")
            about = {_KEY: {"format": FORMAT, "version": FORMAT_VERSION, "spec": spec.to_dict()}}
            client.create_collection(name, metadata=about, on_disk_payload=True, **_config(spec))
            if client.get_collection(name).config.metadata != about:
                client.delete_collection(name)
                raise IndexStoreError(f"{url}: the server keeps no metadata of collections; it must be 1.16 or newer")
            _index_fields(client, name, spec, keys)
            return cls(url, spec, client)

    @classmethod
    def open(cls, url: str, *, api_key: str | None = None) -> ServerIndex:
        """Open a collection that `create` made.

        Raises:
            IndexStoreError: there is none, eosin did not make it, or the key does not allow to read it.
            IndexCorruptError: its vectors are not those of its spec.
            IndexUnreachableError: the server does not answer.
            MissingDependencyError: `qdrant-client` is not installed.
        """
        name = _address(url)[1]
        with _connected(url, api_key) as client, _answers(url, "open the collection"):
            if not client.collection_exists(name):
                raise IndexStoreError(
                    f"{url}: the server has no collection {name!r}; make one with: eosin index FEATURES --out {url}"
                )
            found = client.get_collection(name)
            spec = _read_spec(url, (found.config.metadata or {}).get(_KEY))
            vectors = found.config.params.vectors
            if getattr(vectors, "size", None) != spec.dim:
                raise IndexCorruptError(f"{url} says that its vectors have {spec.dim} numbers, and holds {vectors!r}")
            there = found.payload_schema or {}
            if there:  # none at all: a server that keeps no list
                _index_fields(client, name, spec, [key for key in map(field_key, spec.fields) if key not in there])
            return cls(url, spec, client)

    @property
    def client(self) -> QdrantClient:
        """Qdrant's own object.

        Raises:
            IndexStoreError: the index is closed.
        """
        if self._open_client is None:
            raise IndexStoreError(f"{self.url}: the index is closed; open it again")
        return self._open_client

    def optimise(self) -> None:
        """Wait until the server has built the graph over everything stored: it does so by itself.

        Raises:
            IndexStoreError: it reports that it could not.
        """
        from qdrant_client import models

        with _answers(self.url, "build the graph"):
            # A change of settings, even to what they were, wakes optimisers that a restart has put to sleep.
            self.client.update_collection(self._name, optimizers_config=models.OptimizersConfigDiff())
            while True:
                found = self.client.get_collection(self._name)
                if found.status == models.CollectionStatus.GREEN:
                    return
                if found.status == models.CollectionStatus.RED:
                    raise IndexStoreError(f"{self.url} could not be optimised: {found.optimizer_status}")
                time.sleep(LOOK_EVERY_S)

    def stats(self) -> dict[str, Any]:
        """Return JSON types: what is stored, and how much of it is compared one by one until the server is done."""
        with _answers(self.url, "describe the collection"):
            found = self.client.get_collection(self._name)
        points = self._count(None)
        indexed = min(points, found.indexed_vectors_count or 0)
        return {
            "engine": ENGINE,
            "points": points,
            "dim": self.spec.dim,
            "quantise": self.spec.quantise,
            "bytes_on_disk": 4 * self.spec.dim * points,
            "bytes_on_disk_are": "of the vectors alone; the server does not say more",
            "optimised": indexed,
            "compared_one_by_one": points - indexed,
            "segments": found.segments_count,
            "status": found.status.value,
            "m": M,
            "ef_construct": EF_CONSTRUCT,
            "ef": self.ef,
        }

    def snapshot(self, path: str | Path) -> Path:
        """Copy every point to a new folder, an index of the exact engine, and return it; `copy_index` brings it back.

        For servers alone, Qdrant's own snapshots are faster.

        Raises:
            IndexStoreError: something is there already, or the disk is full.
        """
        path = Path(path)
        if path.exists():
            raise IndexStoreError(f"{path} is there already; give a new folder for the snapshot")
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            copy = ExactIndex.create(temporary, self.spec)
            try:
                copy_index(self, copy)
            finally:
                copy.close()
            os.replace(temporary, path)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise error if isinstance(error, IndexStoreError) else disk_trouble(error, path) from error
        return path

    def close(self) -> None:
        """Let go of the connection; calling again does nothing."""
        if self._open_client is not None:
            self._open_client.close()
            self._open_client = None

    def _ask(
        self, queries: list[list[float]], k: int, where: Json | None, *, exact: bool, acorn: bool, vectors: bool
    ) -> list[list[Row]]:
        from qdrant_client import models

        params = models.SearchParams(
            hnsw_ef=max(self.ef, k + k // 2),
            exact=exact,
            quantization=models.QuantizationSearchParams(
                ignore=exact, rescore=True, oversampling=OVERSAMPLING[self.spec.quantise]
            ),
            acorn=models.AcornSearchParams(enable=acorn, max_selectivity=ACORN_BELOW),
        )
        condition = _filter(where)
        requests = [
            models.QueryRequest(
                query=models.NearestQuery(nearest=query),
                limit=k,
                filter=condition,
                params=params,
                with_payload=True,
                with_vector=vectors,
            )
            for query in queries
        ]
        step = max(1, REQUEST_BYTES // (_NUMBER_BYTES * self.spec.dim + _PAYLOAD_BYTES))
        found: list[list[Row]] = []
        with _answers(self.url, "search"):
            for start in range(0, len(requests), step):
                for answer in self.client.query_batch_points(self._name, requests[start : start + step]):
                    found.append([_row(point, point.score) for point in answer.points])
        return found

    def _fetch(self, ids: list[int], *, whole: bool) -> list[Row]:
        with _answers(self.url, "read points"):
            points = self.client.retrieve(self._name, ids, with_payload=whole, with_vectors=whole)
        return [_row(point, 0.0) for point in points]

    def _page(self, start: int, limit: int, where: Json | None) -> tuple[list[Row], int | None]:
        with _answers(self.url, "read points"):
            points, following = self.client.scroll(
                self._name, _filter(where), limit, offset=start, with_payload=True, with_vectors=True
            )
        return [_row(point, 0.0) for point in points], None if following is None else _id(following)

    def _put(self, ids: list[int], vectors: npt.NDArray[np.float32], payload: list[Json]) -> None:
        from qdrant_client import models

        size = max(1, REQUEST_BYTES // (_NUMBER_BYTES * self.spec.dim + _PAYLOAD_BYTES))
        stored = 0
        for part in batches(ids, vectors, payload, size):
            again = f"store points ({stored} of these {len(ids)} are stored; storing all of them again does no harm)"
            points = models.Batch(
                ids=[point.id for point in part],
                vectors=[point.vector for point in part],
                payloads=[point.payload for point in part],
            )
            with _answers(self.url, again):
                self.client.upsert(self._name, points, wait=True)
            stored += len(part)

    def _drop(self, ids: list[int]) -> None:
        from qdrant_client import models

        with _answers(self.url, "delete points"):
            self.client.delete(self._name, models.PointIdsList(points=list(ids)), wait=True)

    def _drop_where(self, where: Json, there: int) -> None:
        from qdrant_client import models

        with _answers(self.url, "delete points"):
            self.client.delete(self._name, models.FilterSelector(filter=models.Filter.model_validate(where)), wait=True)

    def _count(self, where: Json | None) -> int:
        with _answers(self.url, "count its points"):
            return self.client.count(self._name, _filter(where), exact=True).count

    def _facet(self, key: str, where: Json | None, limit: int) -> Iterable[tuple[Any, int]]:
        with _answers(self.url, "count values"):
            found = self.client.facet(self._name, key, _filter(where), limit, exact=True)
        return [(hit.value, hit.count) for hit in found.hits]


def copy_index(
    source: VectorIndex, target: VectorIndex, *, batch: int = 1024, progress: Callable[[int], None] | None = None
) -> int:
    """Store every point of one index in another, whatever their engines, and return how many there were.

    This is how a folder of Qdrant Edge is brought to a server, and back. Stopped half-way, it can be run again: the
    same ids replace themselves. Call `target.optimise` afterwards.

    Args:
        source: read by ascending id.
        target: made with the same fields; its quantisation may differ.
        batch: points at a time.
        progress: called with the number of points stored so far.

    Raises:
        IndexMismatchError: other features or fields.
    """
    check_same_features(target.spec, source.spec, "the index to copy")
    if dict(source.spec.fields) != dict(target.spec.fields):
        raise IndexMismatchError(
            f"the fields differ: {dict(source.spec.fields)} to copy, {dict(target.spec.fields)} in the other index; "
            "make that with the same fields"
        )
    done = 0
    for hits in source.scroll(batch=batch):
        assert hits.vectors is not None  # scroll gives vectors
        target.upsert(hits.ids, hits.vectors, hits.payload)
        done += len(hits)
        if progress is not None:
            progress(done)
    return done


def _address(url: str) -> tuple[str, str]:
    """Return the server's address and the collection's name.

    Raises:
        IndexStoreError: there is no name in it.
    """
    parts = urlsplit(url)
    prefix, _, name = parts.path.rstrip("/").rpartition("/")
    if parts.scheme not in ("http", "https") or not parts.netloc or not name:
        raise IndexStoreError(f"{url!r} names no collection of a server; give one as http://localhost:6333/tiles")
    return urlunsplit((parts.scheme, parts.netloc, prefix, "", "")), unquote(name)


@contextlib.contextmanager
def _connected(url: str, api_key: str | None) -> Iterator[QdrantClient]:
    """Give a connection, and close it when what is done with it raises."""
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise MissingDependencyError(
            "an index on a server needs qdrant-client, which is not installed; run: pip install 'eosin[search]'"
        ) from error
    client = QdrantClient(url=_address(url)[0], api_key=api_key, timeout=ANSWER_WITHIN_S, check_compatibility=False)
    try:
        yield client
    except BaseException:
        client.close()
        raise


@contextlib.contextmanager
def _answers(url: str, doing: str) -> Iterator[None]:
    """Turn what the client raises into one of ours."""
    import httpx  # which qdrant-client is made of
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    try:
        yield
    except ResponseHandlingException as error:
        source = error.source
        if isinstance(source, httpx.TransportError):
            raise IndexUnreachableError(
                f"{url} does not answer ({type(source).__name__}: {source}); asked to {doing}. Start the server or "
                "mend the connection, then run the same again: what it has acknowledged is kept"
            ) from error
        raise IndexStoreError(f"{url}: the answer is not a Qdrant server's; asked to {doing}: {source}") from error
    except json.JSONDecodeError as error:
        raise IndexStoreError(f"{url}: the answer is not a Qdrant server's; asked to {doing}: {error}") from error
    except ResourceExhaustedResponse as error:
        raise IndexUnreachableError(
            f"{url} has too much to do ({error}); asked to {doing}. Run the same again in {error.retry_after_s} s"
        ) from error
    except UnexpectedResponse as error:
        said = bytes(error.content).decode(errors="replace")[:300]
        if error.status_code in (401, 403):
            raise IndexStoreError(f"{url} refuses to {doing}: give an API key that allows it ({said})") from error
        if error.status_code in (502, 503, 504):
            raise IndexUnreachableError(f"{url} does not answer now ({error.status_code}); asked to {doing}") from error
        raise IndexStoreError(f"{url} could not {doing}: {error.status_code} {said}") from error


def _config(spec: IndexSpec) -> dict[str, Any]:
    """Return how the server keeps and links vectors: as the embedded engine does."""
    from qdrant_client import models

    codes = {
        "none": None,
        "int8": models.ScalarQuantization(
            scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
        ),
        "binary": models.BinaryQuantization(
            binary=models.BinaryQuantizationConfig(
                always_ram=True, query_encoding=models.BinaryQuantizationQueryEncoding.SCALAR8BITS
            )
        ),
    }[spec.quantise]
    graph = models.HnswConfigDiff(m=M, ef_construct=EF_CONSTRUCT, full_scan_threshold=FULL_SCAN_BYTES // 1024)
    vectors = models.VectorParams(size=spec.dim, distance=models.Distance.COSINE, on_disk=codes is not None)
    return {"vectors_config": vectors, "hnsw_config": graph, "quantization_config": codes}


def _index_fields(client: QdrantClient, name: str, spec: IndexSpec, keys: Iterable[str]) -> None:
    """Have the server index payload fields; the values of keywords get links in the graph (`qdrant.needs_acorn`)."""
    from qdrant_client import models

    kinds = {field_key(field): kind for field, kind in spec.fields.items()}
    for key in keys:
        if kinds[key] == "keyword":
            schema = models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, enable_hnsw=True)
        elif kinds[key] == "float":
            schema = models.FloatIndexParams(type=models.FloatIndexType.FLOAT, enable_hnsw=False)
        else:
            schema = models.IntegerIndexParams(type=models.IntegerIndexType.INTEGER, enable_hnsw=False)
        client.create_payload_index(name, key, schema, wait=True)


def _read_spec(url: str, about: Any) -> IndexSpec:
    try:
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}")
        version = int(about["version"])
        if version <= FORMAT_VERSION:
            return IndexSpec.from_dict(about["spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise IndexStoreError(
            f"{url} is a collection that eosin did not make (its metadata say nothing of features: {error!r}); give "
            "another name"
        ) from error
    raise IndexStoreError(f"{url} has index format {version}, this eosin reads up to {FORMAT_VERSION}: upgrade eosin")


def _filter(where: Json | None) -> Any:
    from qdrant_client import models

    return None if where is None else models.Filter.model_validate(where)


def _row(point: Any, score: float) -> Row:
    return Row(_id(point.id), score, point.payload or {}, point.vector)


def _id(found: Any) -> int:
    if not isinstance(found, int):
        raise IndexCorruptError(f"a point has the id {found!r}, which eosin did not give: something else writes there")
    return found
