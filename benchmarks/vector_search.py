"""Which engine finds similar tiles best? Recall, latency, build time, memory and disk, with and without filters.

    python benchmarks/vector_search.py --n 1000000 --dim 384 --peer-python ENV/bin/python --out FILE.json
    python benchmarks/vector_search.py --n 1000000 --data FEATURES --peer-python ENV/bin/python --out FILE.json

ENV is an environment of its own with ``faiss-cpu lancedb usearch numpy``; without it eosin's engines run alone. Each
engine builds in one process and answers in another, on the same first `--threads` cores, one query at a time. The
truth is a product of matrices in numpy. `--data` takes real features (a store of eosin's, an HDF5 file with
``features`` or ``feats``, or a .npy file) and makes `--n` of them: each new point lies between a real one and one of
its five nearest, with a little noise.

Selections, by the share of points that pass: everything; all other patients (what a search leaves out by default);
1/10, 1/100, 1/1000 at random; the same shares of another part of the space ("apart": neither the field nor the query
know of each other, so the answers lie far from the query); a hundredth by a range of numbers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from vectors_run import ENGINES, Condition, K

Vectors = npt.NDArray[np.float32]

RUNNER = Path(__file__).parent / "peers" / "vectors_run.py"
CLASSES, SLIDES, TILES_PER_SLIDE = 64, 4000, 1000
DECAY = 0.75  # of the standard deviation with the rank of a direction
GOOD = 0.95
PACKAGES = ("numpy", "qdrant-edge-py", "scipy")


def clustered(rows: int, dim: int, seed: int) -> tuple[Vectors, npt.NDArray[np.int32]]:
    """Return vectors (rows, dim) of length 1 and the slide of each (rows,).

    A point is its class plus its slide plus its own: each normal, with standard deviations that fall as a power of the
    rank of a direction, as those of real features do.
    """
    world = np.random.default_rng(0)
    turn = np.linalg.qr(world.standard_normal((dim, dim)))[0].astype(np.float32)
    spread = np.arange(1, dim + 1, dtype=np.float32) ** -DECAY
    classes = world.standard_normal((CLASSES, dim), dtype=np.float32) * spread
    slides = world.standard_normal((SLIDES, dim), dtype=np.float32) * spread
    share = 1 / np.arange(1, CLASSES + 1)
    rng = np.random.default_rng([1, seed])
    count = max(2, min(SLIDES, rows // TILES_PER_SLIDE))
    slide = rng.integers(count, size=rows, dtype=np.int32)
    out = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 20_000):
        part = slice(start, min(start + 20_000, rows))
        own = rng.standard_normal((part.stop - part.start, dim), dtype=np.float32) * spread
        kind = rng.choice(CLASSES, len(own), p=share / share.sum())
        out[part] = (classes[kind] + 0.6 * slides[slide[part]] + 0.6 * own) @ turn.T
        out[part] /= np.linalg.norm(out[part], axis=1, keepdims=True)
    return out, slide


def real(path: Path) -> Vectors:
    """Return features (n, dim) of length 1 from a store, an HDF5 file or a .npy file."""
    if path.suffix == ".npy":
        found = np.load(path)
    elif path.suffix in (".h5", ".hdf5"):
        with h5py.File(path) as file:
            found = file["features" if "features" in file else "feats"][:]
    else:
        from eosin.features.store import FeatureStore

        store = FeatureStore.open(path)
        found = np.concatenate([store[slide].x for slide in store])
    found = found.reshape(-1, found.shape[-1]).astype(np.float32)
    found = found[np.linalg.norm(found, axis=1) > 0]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def jittered(seeds: Vectors, rows: int, seed: int) -> tuple[Vectors, npt.NDArray[np.int32]]:
    """Return `rows` points about real ones, of length 1, and which thousandth of the real ones each comes from."""
    near = np.empty((len(seeds), 5), np.int64)
    gap = np.empty(len(seeds), np.float32)
    for start in range(0, len(seeds), 1000):
        score = seeds[start : start + 1000] @ seeds.T
        score[np.arange(len(score)), start + np.arange(len(score))] = -2
        near[start : start + 1000] = np.argpartition(-score, 5, axis=1)[:, :5]
        gap[start : start + 1000] = np.sqrt(np.maximum(0, 2 - 2 * score.max(axis=1)))
    rng = np.random.default_rng([2, seed])
    source = rng.integers(len(seeds), size=rows)
    out = np.empty((rows, seeds.shape[1]), np.float32)
    for start in range(0, rows, 20_000):
        one = source[start : start + 20_000]
        other = near[one, rng.integers(5, size=len(one))]
        step = rng.random((len(one), 1), dtype=np.float32)
        noise = rng.standard_normal((len(one), seeds.shape[1]), dtype=np.float32)
        noise *= 0.3 * gap[one, None] / np.sqrt(seeds.shape[1])
        part = seeds[one] + step * (seeds[other] - seeds[one]) + noise
        out[start : start + 20_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return out, (source * 1000 // len(seeds)).astype(np.int32)


def local_dimension(base: Vectors, points: Vectors) -> float:
    """Return the median intrinsic dimension about some points, from their 20 nearest (Levina & Bickel, 2004, eq. 8)."""
    score = np.concatenate([points @ base[start : start + 50_000].T for start in range(0, len(base), 50_000)], axis=1)
    gaps = np.sqrt(np.maximum(2 - 2 * -np.sort(-np.partition(score, -21, axis=1)[:, -21:], axis=1), 1e-12))[:, 1:]
    return float(np.median(1 / np.mean(np.log(gaps[:, -1:] / gaps[:, :-1]), axis=1)))


def columns_of(base: Vectors, slide: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[Any]]:
    """Return the payload, each (n,): int32 words or a float."""
    rng = np.random.default_rng(3)
    rows, dim = base.shape
    along = base @ rng.standard_normal(dim).astype(np.float32)
    rank = np.argsort(np.argsort(along, kind="stable"), kind="stable")
    columns: dict[str, npt.NDArray[Any]] = {"patient": (slide // 2).astype(np.int32), "value": rng.random(rows)}
    for parts in (10, 100, 1000):
        columns[f"random{parts}"] = rng.integers(parts, size=rows, dtype=np.int32)
        columns[f"apart{parts}"] = (rank * parts // rows).astype(np.int32)
    return columns


def selections_of(queries: int, patient: npt.NDArray[np.int32]) -> dict[str, list[Condition | None]]:
    """Return a condition for each query, by selection."""
    rng = np.random.default_rng(4)
    found: dict[str, list[Condition | None]] = {"everything": [None] * queries}
    found["other patients"] = [Condition("patient", "!=", float(one)) for one in patient]
    for kind in ("random", "apart"):
        for parts in (10, 100, 1000):
            values = rng.integers(parts, size=queries).tolist()
            found[f"{kind} 1/{parts}"] = [Condition(f"{kind}{parts}", "==", float(value)) for value in values]
    starts = (rng.random(queries) * 0.99).tolist()
    found["range 1/100"] = [Condition("value", "in", start, 0.01) for start in starts]
    return found


def truth_of(
    base: Vectors, queries: Vectors, columns: dict[str, npt.NDArray[Any]], selections: dict[str, list[Condition | None]]
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the ids of the K nearest that pass, best first, -1 where fewer pass: (queries, K) a selection."""
    found = {name: np.full((len(queries), K), -1, np.int64) for name in selections}
    for at, query in enumerate(queries):
        score = base @ query
        for name, conditions in selections.items():
            condition = conditions[at]
            rows = np.arange(len(base)) if condition is None else np.flatnonzero(condition.mask(columns))
            best = rows[np.argpartition(-score[rows], min(K, len(rows) - 1))[:K]] if len(rows) > K else rows
            best = best[np.argsort(-score[best], kind="stable")]
            found[name][at, : len(best)] = best
    return found


def prepare(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write what the engines read; return what is known of it."""
    rows = options.n + options.queries
    if options.data is None:
        points, slide = clustered(rows, options.dim, 0)
        about: dict[str, Any] = {"data": "clustered", "real": 0}
    else:
        seeds = real(options.data)
        points, slide = jittered(seeds, rows, 0)
        about = {"data": options.data.name, "real": len(seeds)}
    order = np.random.default_rng(5).permutation(rows)
    base, queries = points[order[: options.n]], points[order[options.n :]]
    columns = columns_of(base, slide[order[: options.n]])
    selections = selections_of(options.queries, (slide[order[options.n :]] // 2).astype(np.int32))
    (work / "columns").mkdir(parents=True)
    np.save(work / "base.npy", base)
    np.save(work / "queries.npy", queries)
    for name, column in columns.items():
        np.save(work / "columns" / f"{name}.npy", column)
    (work / "selections.json").write_text(json.dumps(selections))
    np.savez(work / "truth.npz", **truth_of(base, queries, columns, selections))
    dimension = local_dimension(base, queries[: min(100, len(queries))])
    return {**about, "n": len(base), "dim": base.shape[1], "local_dimension": round(dimension, 1)}


def run(engine: str, phase: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one phase of an engine in its own process and environment; an engine that fails is part of the result."""
    python = sys.executable if ENGINES[engine].package == "eosin" else str(options.peer_python)
    threads = str(options.threads)
    count = {name: threads for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")}
    command = [python, str(RUNNER), engine, phase, str(work), threads, str(options.budget_s)]
    began = os.getloadavg()[0]
    done = subprocess.run(command, env={**os.environ, **count}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode, "load_before": began}
    return {**json.loads(done.stdout.splitlines()[-1]), "load_before": began}


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, versions, commit."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
    }


def table(results: dict[str, Any]) -> str:
    """Return, for each engine, the cheapest setting that is good everywhere, or its best one."""
    lines = ["| engine | setting | build s | peak MiB | disk MiB | worst recall | p50 ms | p95 ms | worst p95 ms |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, result in results.items():
        if "failed" in result["build"] or "failed" in result["search"]:
            lines.append(f"| {name} | failed | | | | | | | |")
            continue
        setting, runs = chosen(result["search"]["runs"])
        plain = next(one for one in runs if one["selection"] == "everything")
        build = round(sum(result["build"]["seconds"].values()), 1)
        cells = [build, result["build"]["peak_mib"], result["build"]["disk_mib"], min(one["recall"] for one in runs)]
        cells += [plain["p50_ms"], plain["p95_ms"], max(one["p95_ms"] for one in runs)]
        lines.append(f"| {name} | {setting} | " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def chosen(runs: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Return the setting with the lowest worst p95 of those that reach `GOOD` everywhere; else of the best recall."""
    measured = {"selection", "queries", "recall", "p50_ms", "p95_ms", "p99_ms", "cpu_ms"}
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        setting = " ".join(f"{name} {value}" for name, value in one.items() if name not in measured) or "-"
        groups.setdefault(setting, []).append(one)
    worst: Callable[[list[dict[str, Any]]], float] = lambda group: min(one["recall"] for one in group)  # noqa: E731
    good = {name: group for name, group in groups.items() if worst(group) >= GOOD}
    if good:
        return min(good.items(), key=lambda item: max(one["p95_ms"] for one in item[1]))
    return max(groups.items(), key=lambda item: worst(item[1]))


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which engine finds similar tiles best?")
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384, help="of synthetic vectors")
    parser.add_argument("--data", type=Path, help="real features to make points of, instead of synthetic ones")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", default=",".join(ENGINES), help="those to run, with commas")
    parser.add_argument("--peer-python", type=Path, help="of the environment with faiss-cpu, lancedb and usearch")
    parser.add_argument("--budget-s", type=float, default=60, help="at most, for one setting and selection")
    parser.add_argument("--work", type=Path, help="keep data and indexes in this folder, which must be empty")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vector_search.json")
    return parser.parse_args()


def main() -> None:
    options = options_of()
    names = options.engines.split(",")
    if options.peer_python is None:
        names = [name for name in names if ENGINES[name].package == "eosin"]
    work = options.work or Path(tempfile.mkdtemp(prefix="vector-search-"))
    results: dict[str, Any] = {}
    try:
        about = prepare(work, options)
        for name in names:
            build = run(name, "build", work, options)
            search = {"failed": "not built"} if "failed" in build else run(name, "search", work, options)
            results[name] = {"build": build, "search": search}
            shutil.rmtree(work / "indexes" / name, ignore_errors=True)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    arguments = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    record = {
        "command": " ".join(["python", "benchmarks/vector_search.py", *arguments]),
        "machine": machine(),
        "threads": options.threads,
        "k": K,
        **about,
        "engines": results,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
