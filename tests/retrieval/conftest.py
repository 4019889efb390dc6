"""Every engine of the search index, made the same way for the contract suite.

To join: add a maker to `MAKERS`. An engine is skipped only while its module does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from eosin.retrieval.engines import create_index, open_index
from eosin.retrieval.filters import Filter, mask
from eosin.retrieval.protocol import IndexSpec, VectorIndex

SPEC = IndexSpec(
    dim=24,
    encoder="tiny",
    weights_sha256="ab" * 32,
    mpp=0.5,
    tile_px=224,
    fields={
        "slide_id": "keyword",
        "patient_id": "keyword",
        "site": "keyword",
        "label": "keyword",
        "x": "integer",
        "y": "integer",
        "mpp": "float",
        "qc_focus": "float",
        "qc_pen": "bool",
    },
)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the suite makes and opens an engine's index.

    Attributes:
        name: of the engine.
        create: spec -> an empty index in the test's own place.
        reopen: open what `create` made, after it was closed.
        one_writer: a second writer at the same time is refused.
    """

    name: str
    create: Callable[[IndexSpec], VectorIndex]
    reopen: Callable[[], VectorIndex]
    one_writer: bool


def _in_folder(name: str) -> Callable[[Path], Engine]:
    def make(tmp_path: Path) -> Engine:
        path = tmp_path / "index"
        return Engine(
            name=name,
            create=lambda spec: create_index(path, spec, engine=name),
            reopen=lambda: open_index(path, engine=name),
            one_writer=True,
        )

    return make


def _server(tmp_path: Path) -> Engine:
    from server_for_tests import create, reopen  # beside this file, with the server engine

    return Engine(
        name="server", create=lambda spec: create(tmp_path, spec), reopen=lambda: reopen(tmp_path), one_writer=False
    )


MAKERS = {"exact": _in_folder("exact"), "edge": _in_folder("edge"), "server": _server}


@pytest.fixture(params=["exact", *(pytest.param(name, marks=pytest.mark.slow) for name in ("edge", "server"))])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    """Each engine in turn."""
    if find_spec(f"eosin.retrieval.{request.param}") is None:
        pytest.skip(f"eosin.retrieval.{request.param} does not exist yet")
    return MAKERS[request.param](tmp_path)


@dataclass
class Cloud:
    """Points that were stored, and the plain answers to questions about them: the oracle."""

    ids: np.ndarray
    vectors: np.ndarray
    payload: dict[str, np.ndarray]

    def take(self, rows) -> Cloud:
        """Some of the points."""
        columns = {name: column[rows] for name, column in self.payload.items()}
        return Cloud(self.ids[rows], self.vectors[rows], columns)

    def kept(self, where: Filter | None) -> np.ndarray:
        """Rows the filter holds for."""
        return np.arange(len(self.ids)) if where is None else np.flatnonzero(mask(where, self.payload))

    def units(self) -> np.ndarray:
        """Vectors of length 1, float64."""
        wide = self.vectors.astype(np.float64)
        return wide / np.linalg.norm(wide, axis=1, keepdims=True)

    def nearest(self, query: np.ndarray, k: int, where: Filter | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and cosines of the k best, by sorting all of them."""
        rows = self.kept(where)
        wide = np.asarray(query, np.float64)
        score = self.units()[rows] @ (wide / np.linalg.norm(wide))
        order = np.lexsort((self.ids[rows], -score))[:k]
        return self.ids[rows[order]], score[order]

    def store(self, index: VectorIndex, batch: int = 200) -> None:
        """Upsert all, some at a time."""
        for start in range(0, len(self.ids), batch):
            part = self.take(slice(start, start + batch))
            index.upsert(part.ids, part.vectors, part.payload)


def cloud(n: int = 600, *, dim: int = 24, seed: int = 0, dtype=np.float32) -> Cloud:
    """Clustered points with every type of payload, some of it missing."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, dim))
    group = rng.integers(0, 12, n)
    vectors = (centres[group] + 0.4 * rng.normal(size=(n, dim))) * rng.uniform(0.5, 20, (n, 1))
    patient = rng.integers(0, 9, n)
    focus = rng.uniform(0, 50, n)
    focus[rng.random(n) < 0.1] = np.nan
    words = np.array(["tumour", "stroma", "", "fat, necrosis"], object)
    return Cloud(
        ids=rng.permutation(np.unique(rng.integers(0, 2**63, 2 * n, dtype=np.uint64))[:n]),
        vectors=vectors.astype(dtype),
        payload={
            "slide_id": np.array([f"s{p}/Präparat {p % 2}.svs" for p in patient], object),
            "patient_id": np.array([f"p{p}" for p in patient], object),
            "site": np.array(["A", "B", "C"], object)[patient % 3],
            "label": words[rng.integers(0, 4, n)],
            "x": rng.integers(0, 200_000, n),
            "y": np.full(n, 7) * np.arange(n),
            "mpp": np.array([0.25, 0.5, 1 / 3])[patient % 3],
            "qc_focus": focus,
            "qc_pen": rng.random(n) < 0.2,
        },
    )


@pytest.fixture
def points() -> Cloud:
    """Six hundred points."""
    return cloud()
