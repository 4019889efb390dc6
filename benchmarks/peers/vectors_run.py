"""One engine of benchmarks/vector_search.py, in a process of its own: builds its index, or answers the queries.

    python benchmarks/peers/vectors_run.py ENGINE build|search WORK THREADS BUDGET_S

Runs in the environment of the engine, so this file imports only numpy and, inside an engine, that engine. WORK holds
what the driver wrote: base.npy (n, dim) of length 1, queries.npy, columns/*.npy (n,), selections.json, truth.npz. The
last line on stdout is JSON. Time to turn a condition into what the engine wants is part of a query's time.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

K = 10
BATCH = 4096
M, EF_CONSTRUCT = 16, 128  # every graph here is made with the same
EFS = (32, 64, 128, 256, 512)
PROBES = ((16, 10), (64, 10), (256, 10), (256, 50), (1024, 50))
OVERFETCH = 5000  # for an engine that cannot filter


class Condition(NamedTuple):
    """What a query asks of the points: ``column == value``, ``!= value``, or ``value <= column < value + width``."""

    column: str
    op: str
    value: float
    width: float = 0.0

    def mask(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows it holds for (n,)."""
        column = columns[self.column]
        if self.op == "==":
            return column == self.value
        if self.op == "!=":
            return column != self.value
        return (column >= self.value) & (column < self.value + self.width)

    def sql(self) -> str:
        """The same for lancedb."""
        if self.op == "in":
            return f"{self.column} >= {self.value!r} AND {self.column} < {self.value + self.width!r}"
        return f"{self.column} {self.op.replace('==', '=')} {int(self.value)}"


Ask = Callable[[np.ndarray, Condition | None], Any]


class Work:
    """The driver's folder."""

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        self.base = np.load(path / "base.npy", mmap_mode="r")
        self.columns = {file.stem: np.load(file) for file in sorted((path / "columns").glob("*.npy"))}

    def batches(self, size: int = BATCH) -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(self.base), size):
            part = slice(start, min(start + size, len(self.base)))
            yield part, np.ascontiguousarray(self.base[part])


class Engine:
    """How an engine builds and asks. `settings` are tried one after the other."""

    package = ""
    settings: tuple[dict[str, Any], ...] = ({},)

    def __init__(self, work: Work, folder: Path) -> None:
        self.work, self.folder = work, folder

    def build(self) -> dict[str, float]:
        """Make the index on disk; return seconds a phase."""
        raise NotImplementedError

    def open(self) -> None:
        """Open what `build` made."""
        raise NotImplementedError

    def ask(self, setting: dict[str, Any]) -> Ask:
        """Return the function that gives ids for a query and a condition."""
        raise NotImplementedError


class Stopwatch:
    """Seconds a phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = round(now - self._at, 2)
        self._at = now


class Eosin(Engine):
    """eosin's own engines, through their public methods."""

    package = "eosin"
    quantise = "none"
    engine = "edge"

    def build(self) -> dict[str, float]:
        from eosin.retrieval import IndexSpec
        from eosin.retrieval.engines import create_index

        words = {name: column.dtype.kind == "i" for name, column in self.work.columns.items()}
        fields = {name: "keyword" if word else "float" for name, word in words.items()}
        spec = IndexSpec(dim=self.work.base.shape[1], encoder="benchmark", fields=fields, quantise=self.quantise)
        watch = Stopwatch()
        index = create_index(self.folder, spec, engine=self.engine)
        for part, vectors in self.work.batches():
            payload = {
                name: np.array([f"v{value}" for value in column[part].tolist()], object)
                if words[name]
                else column[part]
                for name, column in self.work.columns.items()
            }
            index.upsert(np.arange(part.start, part.stop, dtype=np.uint64), vectors, payload)
        watch("load_s")
        index.optimise()
        watch("index_s")
        index.close()
        return watch.seconds

    def open(self) -> None:
        from eosin.retrieval.engines import open_index

        self.index: Any = open_index(self.folder)

    def ask(self, setting: dict[str, Any]) -> Ask:
        if "ef" in setting:
            self.index.ef = setting["ef"]
        return lambda query, condition: self.index.search(query, k=K, where=_eosin_filter(condition))[0].ids


class Edge(Eosin):
    settings = tuple({"ef": ef} for ef in EFS)


class EdgeInt8(Edge):
    quantise = "int8"


class EdgeBinary(Edge):
    quantise = "binary"


class Exact(Eosin):
    engine = "exact"


class ExactInt8(Exact):
    quantise = "int8"


def _eosin_filter(condition: Condition | None) -> Any:
    from eosin.retrieval import Between, Is, Not

    if condition is None:
        return None
    if condition.op == "in":
        return Between(condition.column, condition.value, math.nextafter(condition.value + condition.width, -math.inf))
    same = Is(condition.column, (f"v{int(condition.value)}",))
    return Not(same) if condition.op == "!=" else same


class FaissHnsw(Engine):
    """IndexHNSWFlat; a filter is a bitmap made for each query."""

    package = "faiss-cpu"
    settings = tuple({"ef": ef} for ef in EFS)

    def build(self) -> dict[str, float]:
        import faiss

        faiss.omp_set_num_threads(self.work.threads)
        watch = Stopwatch()
        index = faiss.IndexHNSWFlat(self.work.base.shape[1], M, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = EF_CONSTRUCT
        for _, vectors in self.work.batches(2**16):
            index.add(vectors)
        watch("index_s")
        self._write(index)
        watch("save_s")
        return watch.seconds

    def _write(self, index: Any) -> None:
        import faiss

        self.folder.mkdir(parents=True)
        faiss.write_index(index, str(self.folder / "index.faiss"))

    def open(self) -> None:
        import faiss

        faiss.omp_set_num_threads(self.work.threads)
        self.index: Any = faiss.read_index(str(self.folder / "index.faiss"))

    def ask(self, setting: dict[str, Any]) -> Ask:
        import faiss

        def ask(query: np.ndarray, condition: Condition | None) -> Any:
            selector, _bits = self._selector(condition)
            params = faiss.SearchParametersHNSW(efSearch=setting["ef"], sel=selector)
            return self.index.search(query[None], K, params=params)[1][0]

        return ask

    def _selector(self, condition: Condition | None) -> tuple[Any, Any]:
        import faiss

        if condition is None:
            return None, None
        bits = np.packbits(condition.mask(self.work.columns), bitorder="little")
        return faiss.IDSelectorBitmap(len(self.work.base), faiss.swig_ptr(bits)), bits


class FaissIvfPq(FaissHnsw):
    """IndexIVFPQ of dim / 8 bytes a vector, refined with the vectors themselves."""

    settings = tuple({"nprobe": nprobe, "refine": refine} for nprobe, refine in PROBES)

    def build(self) -> dict[str, float]:
        import faiss

        faiss.omp_set_num_threads(self.work.threads)
        rows, dim = self.work.base.shape
        lists = int(4 * rows**0.5)
        watch = Stopwatch()
        coarse = faiss.IndexFlatIP(dim)
        codes = faiss.IndexIVFPQ(coarse, dim, lists, dim // 8, 8, faiss.METRIC_INNER_PRODUCT)
        sample = np.random.default_rng(0).choice(rows, min(rows, 40 * lists), replace=False)
        codes.train(np.ascontiguousarray(self.work.base[np.sort(sample)]))
        watch("train_s")
        index = faiss.IndexRefineFlat(codes)
        for _, vectors in self.work.batches(2**16):
            index.add(vectors)
        watch("index_s")
        self._write(index)
        watch("save_s")
        return watch.seconds

    def ask(self, setting: dict[str, Any]) -> Ask:
        import faiss

        def ask(query: np.ndarray, condition: Condition | None) -> Any:
            selector, _bits = self._selector(condition)
            inner = faiss.SearchParametersIVF(nprobe=setting["nprobe"], sel=selector)
            params = faiss.IndexRefineSearchParameters(k_factor=setting["refine"], base_index_params=inner)
            return self.index.search(query[None], K, params=params)[1][0]

        return ask


class Lance(Engine):
    """LanceDB, IVF_PQ with refinement, a scalar index a column, filters before the search."""

    package = "lancedb"
    settings = tuple({"nprobes": nprobe, "refine": refine} for nprobe, refine in PROBES)

    def build(self) -> dict[str, float]:
        import lancedb
        import pyarrow as pa
        from lancedb.index import Bitmap, BTree, IvfPq

        rows, dim = self.work.base.shape
        kinds = [(name, pa.int32() if column.dtype.kind == "i" else pa.float64()) for name, column in self._columns()]
        schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), dim)), *kinds])

        def parts() -> Iterator[Any]:
            for part, vectors in self.work.batches():
                flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
                columns = [
                    pa.array(column[part], kind) for (_, column), (_, kind) in zip(self._columns(), kinds, strict=True)
                ]
                yield pa.RecordBatch.from_arrays(
                    [pa.array(np.arange(part.start, part.stop)), flat, *columns], schema=schema
                )

        watch = Stopwatch()
        table = lancedb.connect(self.folder).create_table("points", parts(), schema=schema)
        watch("load_s")
        lists = max(1, int(rows**0.5))
        codes = IvfPq(distance_type="cosine", num_partitions=lists, num_sub_vectors=dim // 8)
        table.create_index("vector", config=codes)
        watch("index_s")
        for name, column in self._columns():
            table.create_index(name, config=Bitmap() if column.dtype.kind == "i" else BTree())
        watch("columns_s")
        return watch.seconds

    def _columns(self) -> list[tuple[str, np.ndarray]]:
        return sorted(self.work.columns.items())

    def open(self) -> None:
        import lancedb

        self.table: Any = lancedb.connect(self.folder).open_table("points")

    def ask(self, setting: dict[str, Any]) -> Ask:
        def ask(query: np.ndarray, condition: Condition | None) -> Any:
            asked = self.table.search(query).distance_type("cosine").limit(K).select(["id", "_distance"])
            asked = asked.nprobes(setting["nprobes"]).refine_factor(setting["refine"])
            if condition is not None:
                asked = asked.where(condition.sql(), prefilter=True)
            return asked.to_arrow()["id"].to_numpy()

        return ask


class Usearch(Engine):
    """usearch has no filters in Python: more are fetched than wanted, and those that do not pass are dropped."""

    package = "usearch"
    settings = tuple({"ef": ef} for ef in EFS)

    def build(self) -> dict[str, float]:
        from usearch.index import Index

        watch = Stopwatch()
        dim = self.work.base.shape[1]
        index = Index(ndim=dim, metric="cos", dtype="f32", connectivity=M, expansion_add=EF_CONSTRUCT)
        for part, vectors in self.work.batches(2**16):
            index.add(np.arange(part.start, part.stop), vectors, threads=self.work.threads)
        watch("index_s")
        self.folder.mkdir(parents=True)
        index.save(str(self.folder / "index.usearch"))
        watch("save_s")
        return watch.seconds

    def open(self) -> None:
        from usearch.index import Index

        self.index: Any = Index.restore(str(self.folder / "index.usearch"), view=True)

    def ask(self, setting: dict[str, Any]) -> Ask:
        self.index.expansion_search = setting["ef"]

        def ask(query: np.ndarray, condition: Condition | None) -> Any:
            if condition is None:
                return self.index.search(query, K, threads=1).keys
            mask = condition.mask(self.work.columns)
            wanted = min(OVERFETCH, int(2 * K / max(mask.mean(), 1e-9)))
            keys = self.index.search(query, wanted, threads=1).keys.astype(np.int64)
            return keys[mask[keys]][:K]

        return ask


ENGINES: dict[str, type[Engine]] = {
    "edge": Edge,
    "edge-int8": EdgeInt8,
    "edge-binary": EdgeBinary,
    "exact": Exact,
    "exact-int8": ExactInt8,
    "faiss-hnsw": FaissHnsw,
    "faiss-ivfpq": FaissIvfPq,
    "lancedb": Lance,
    "usearch": Usearch,
}


def measure(ask: Ask, queries: np.ndarray, conditions: list[Condition | None], truth: Any, budget_s: float) -> dict:
    """Ask one query after the other; return recall and latency of those that fit into the time."""
    for query, condition in zip(queries[:10], conditions[:10], strict=True):
        ask(query, condition)
    wall, cpu, right, wanted = [], [], 0, 0
    began = time.perf_counter()
    for query, condition, true in zip(queries, conditions, truth, strict=True):
        true = set(true[true >= 0].tolist())
        at, busy = time.perf_counter(), time.process_time()
        found = ask(query, condition)
        wall.append(time.perf_counter() - at)
        cpu.append(time.process_time() - busy)
        right, wanted = right + len(true & {int(one) for one in found}), wanted + len(true)
        if time.perf_counter() - began > budget_s:
            break
    low, high, highest = (round(1000 * float(np.quantile(wall, q)), 3) for q in (0.5, 0.95, 0.99))
    return {
        "queries": len(wall),
        "recall": round(right / wanted, 4),
        "p50_ms": low,
        "p95_ms": high,
        "p99_ms": highest,
        "cpu_ms": round(1000 * float(np.mean(cpu)), 3),
    }


def peak_mib() -> dict[str, float]:
    """Resident memory at its highest, with what is mapped; the kernel's other counter is inherited from the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"peak_mib": round(max(own, children) / 1024, 1)}


def disk_mib(folder: Path) -> float:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_blocks for file in files) * 512 / 2**20, 1)


def main() -> None:
    name, phase, path, threads, budget_s = (
        sys.argv[1],
        sys.argv[2],
        Path(sys.argv[3]),
        int(sys.argv[4]),
        float(sys.argv[5]),
    )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    folder = path / "indexes" / name
    engine = ENGINES[name](Work(path, threads), folder)
    answer: dict[str, Any]
    if phase == "build":
        answer = {"seconds": engine.build(), **peak_mib(), "disk_mib": disk_mib(folder)}
        if engine.package != "eosin":
            answer["version"] = importlib.metadata.version(engine.package)
    else:
        watch = Stopwatch()
        engine.open()
        watch("open_s")
        queries = np.load(path / "queries.npy")
        truth = np.load(path / "truth.npz")
        selections = json.loads((path / "selections.json").read_text())
        runs = []
        for setting in engine.settings:
            ask = engine.ask(setting)
            for selection, conditions in selections.items():
                given = [None if one is None else Condition(*one) for one in conditions]
                found = measure(ask, queries, given, truth[selection], budget_s)
                runs.append({"selection": selection, **setting, **found})
                print(name, json.dumps(runs[-1]), file=sys.stderr, flush=True)
        answer = {**watch.seconds, **peak_mib(), "runs": runs}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
