"""A Qdrant server for tests: its REST interface over a real socket, in front of qdrant-client's own in-memory engine.

Bodies are read with the models that Qdrant's OpenAPI file defines, so a request that the server would refuse is refused
here. `Wire` can also stop answering, as a server does that goes down.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pydantic_core
from qdrant_client import QdrantClient, models

from eosin.retrieval.protocol import IndexSpec
from eosin.retrieval.server import ServerIndex


class Wire:
    """The server.

    Attributes:
        base: its address.
        client: what answers.
        requests: (method, path) of every request so far.
        fields: payload indexes asked for: (collection, field) -> schema.
        params: search parameters of every query so far.
        left: requests it still answers before it goes down; None for ever.
        key: API key it wants; None for none.
        statuses: collection statuses to report, one a request, before the true one.
        raw: answer (status, headers, body) to give instead of any other.
    """

    def __init__(self) -> None:
        self.client = QdrantClient(":memory:", force_disable_check_same_thread=True)
        self.requests: list[tuple[str, str]] = []
        self.fields: dict[tuple[str, str], Any] = {}
        self.params: list[models.SearchParams | None] = []
        self.left: int | None = None
        self.key: str | None = None
        self.statuses: list[str] = []
        self.raw: tuple[int, dict[str, str], bytes] | None = None
        self._one_by_one = threading.Lock()
        wire = self

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with wire._one_by_one:
                    given = wire.answer(self.command, self.path.split("?")[0], body, self.headers.get("api-key"))
                if given is None:
                    self.close_connection = True
                    return
                status, headers, content = given
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self.client.close()

    def answer(self, method: str, path: str, body: bytes, key: str | None) -> tuple[int, dict[str, str], bytes] | None:
        """Return status, headers and body; None to hang up."""
        self.requests.append((method, path))
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                return None
        if self.raw is not None:
            return self.raw
        if self.key is not None and key != self.key:
            return 401, {}, b"Must provide an API key or an Authorization bearer token"
        match = re.fullmatch(r"/collections/([^/]+)(/[a-z/]+)?", path)
        assert match, path
        name, rest = match[1], match[2] or ""
        try:
            result = self._result(method, name, rest, json.loads(body, parse_constant=_no_json) if body else {})
        except ValueError as error:
            status = 404 if "not found" in str(error) else 400
            return status, {}, json.dumps({"status": {"error": str(error)}}).encode()
        answer = {"result": result, "status": "ok", "time": 0.0}
        return 200, {"Content-Type": "application/json"}, pydantic_core.to_json(answer)

    def _result(self, method: str, name: str, rest: str, body: Any) -> Any:
        client = self.client
        match method, rest:
            case "GET", "/exists":
                return {"exists": client.collection_exists(name)}
            case "PUT", "":
                asked = models.CreateCollection.model_validate(body)
                assert asked.vectors.distance == models.Distance.COSINE
                # The in-memory engine divides its vectors by their length once more at every search by cosine, in
                # place. Eosin's have length 1 when they come, so their product is the cosine.
                asked.vectors.distance = models.Distance.DOT
                return client.create_collection(name, asked.vectors, metadata=asked.metadata)
            case "GET", "":
                found = client.get_collection(name)
                found.payload_schema = {
                    key: models.PayloadIndexInfo(data_type=schema.type.value, points=0)
                    for (collection, key), schema in self.fields.items()
                    if collection == name
                }
                if self.statuses:
                    found.status = models.CollectionStatus(self.statuses.pop(0))
                return found
            case "PATCH", "":
                models.UpdateCollection.model_validate(body)
                return True
            case "DELETE", "":
                return client.delete_collection(name)
            case "PUT", "/index":
                asked = models.CreateFieldIndex.model_validate(body)
                self.fields[name, asked.field_name] = asked.field_schema
                return models.UpdateResult(status=models.UpdateStatus.COMPLETED)
            case "PUT", "/points":
                return client.upsert(name, models.PointsBatch.model_validate(body).batch)
            case "POST", "/points":
                asked = models.PointRequest.model_validate(body)
                return client.retrieve(name, asked.ids, asked.with_payload, asked.with_vector)
            case "POST", "/points/delete":
                selector = models.PointIdsList if "points" in body else models.FilterSelector
                return client.delete(name, selector.model_validate(body))
            case "POST", "/points/count":
                asked = models.CountRequest.model_validate(body)
                return client.count(name, asked.filter, exact=bool(asked.exact))
            case "POST", "/points/scroll":
                asked = models.ScrollRequest.model_validate(body)
                points, following = client.scroll(
                    name,
                    asked.filter,
                    asked.limit or 10,
                    offset=asked.offset,
                    with_payload=asked.with_payload,
                    with_vectors=asked.with_vector,
                )
                return {"points": points, "next_page_offset": following}
            case "POST", "/points/query/batch":
                asked = models.QueryRequestBatch.model_validate(body)
                for one in asked.searches:
                    self.params.append(one.params)
                    one.params = None  # the in-memory engine has none and warns
                return client.query_batch_points(name, asked.searches)
            case "POST", "/facet":
                asked = models.FacetRequest.model_validate(body)
                return client.facet(name, asked.key, asked.filter, asked.limit or 10, exact=bool(asked.exact))
        raise AssertionError(f"{method} {name} {rest}")


def _no_json(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


_shared: list[Wire] = []


def _url(tmp_path: Path) -> str:
    if not _shared:
        _shared.append(Wire())
    return f"{_shared[0].base}/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16]}"


def create(tmp_path: Path, spec: IndexSpec) -> ServerIndex:
    """An empty collection of the test's own."""
    return ServerIndex.create(_url(tmp_path), spec)


def reopen(tmp_path: Path) -> ServerIndex:
    """What `create` made."""
    return ServerIndex.open(_url(tmp_path))
