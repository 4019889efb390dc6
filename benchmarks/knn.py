"""How fast is exact neighbour search? Cosine, k nearest of float32 vectors, against scikit-learn's brute force.

    python benchmarks/knn.py --base 1000000 --queries 10000 --dim 384 --k 10

Base and queries are drawn from seeded clusters. The whole search is eosin's alone; scikit-learn answers a share of the
same queries on the same base, because it takes too long for all of them, and eosin answers that share too: the ratio is
of those two. Scikit-learn normalises the whole base on every call, so its rate is also given without the time of a
call with one query. Both use every core. Repeats interleave the two.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

from eosin.heads import neighbours
from eosin.heads.neighbours import nearest

Vectors = npt.NDArray[np.float32]
CLUSTERS, SPREAD = 2000, 0.7


def clustered(rows: int, dim: int, seed: int) -> Vectors:
    """Return (rows, dim) vectors about seeded centres, written block by block."""
    centres = np.random.default_rng(0).standard_normal((CLUSTERS, dim), dtype=np.float32)
    rng = np.random.default_rng([1, seed])
    out = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 5_000):
        part = out[start : start + 5_000]
        rng.standard_normal(dtype=np.float32, out=part)
        part *= SPREAD
        part += centres[rng.integers(CLUSTERS, size=len(part))]
    return out


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and the answer."""
    started = time.perf_counter()
    answer = work()
    return time.perf_counter() - started, answer


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def multiply_seconds(base: Vectors, queries: Vectors, block: int) -> float:
    """Return how long the float32 products alone take: the floor of any exact search by matrix products."""
    out = np.empty((neighbours.QUERY_BLOCK, block), np.float32)

    def work() -> None:
        for at in range(0, len(queries), neighbours.QUERY_BLOCK):
            rows = queries[at : at + neighbours.QUERY_BLOCK]
            for start in range(0, len(base), block):
                part = base[start : start + block]
                np.matmul(rows, part.T, out=out[: len(rows), : len(part)])

    return timed(work)[0]


def count_second_searches(found: list[int]) -> None:
    """Make `nearest` note how many queries had to be searched again."""
    settle = neighbours._settle

    def noted(*given: Any) -> Any:
        found.append(len(given[0]))
        return settle(*given)

    neighbours._settle = noted


def rate(seconds: list[float], queries: int) -> dict[str, Any]:
    return {
        "seconds": [round(value, 2) for value in seconds],
        "queries": queries,
        "queries_per_s": round(queries / statistics.median(seconds), 1),
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, versions, commit, load."""
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "scipy")}
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast is exact neighbour search?")
    parser.add_argument("--base", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--share", type=int, default=1000, help="queries that scikit-learn answers too")
    parser.add_argument("--repeats", type=int, default=3, help="of the share; the whole is searched once")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "knn.json")
    return parser.parse_args()


def compare(base: Vectors, queries: Vectors, k: int, repeats: int) -> dict[str, Any]:
    """Return rates of both on the same queries, their ratio and how far the answers agree."""
    oracle = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(base)
    seconds: dict[str, list[float]] = {"eosin": [], "scikit-learn": [], "scikit-learn, one query": []}
    for _ in range(repeats):
        spent, ours = timed(lambda: nearest(queries, base, k))
        seconds["eosin"].append(spent)
        spent, theirs = timed(lambda: oracle.kneighbors(queries))
        seconds["scikit-learn"].append(spent)
        seconds["scikit-learn, one query"].append(timed(lambda: oracle.kneighbors(queries[:1]))[0])
    own, other, fixed = (statistics.median(values) for values in seconds.values())
    return {
        "eosin": rate(seconds["eosin"], len(queries)),
        "scikit-learn": rate(seconds["scikit-learn"], len(queries)),
        "scikit-learn, one query": rate(seconds["scikit-learn, one query"], 1),
        "ratio": round(other / own, 2),
        "ratio_without_fixed_time": round((other - fixed) / own, 2),
        "same_row": float(np.mean(ours[1] == theirs[1])),
        "same_set": float(np.mean([set(a) == set(b) for a, b in zip(ours[1], theirs[1], strict=True)])),
        "largest_distance_gap": float(np.abs(ours[0] - theirs[0]).max()),
    }


def main() -> None:
    given = options()
    command = f"python benchmarks/knn.py --base {given.base} --queries {given.queries} --dim {given.dim}"
    command += f" --k {given.k} --share {given.share} --repeats {given.repeats}"
    print(command)
    result: dict[str, Any] = {"command": command, "machine": machine(), "clusters": CLUSTERS, "spread": SPREAD}
    base, queries = clustered(given.base, given.dim, 0), clustered(given.queries, given.dim, 1)
    again: list[int] = []
    count_second_searches(again)
    before = peak_mb()
    spent, _ = timed(lambda: nearest(queries, base, given.k))
    result["whole"] = {**rate([spent], given.queries), "searched_again": sum(again)}
    result["memory_mb"] = {"base": round(base.nbytes / 2**20), "added_peak": round(peak_mb() - before)}
    products = multiply_seconds(base, queries[: given.share], 8192)
    result["products_only"] = rate([products], given.share)
    result["share"] = compare(base, queries[: given.share], given.k, given.repeats)
    result["memory_mb"]["added_peak_with_scikit_learn"] = round(peak_mb() - before)
    result["machine"]["load_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=1))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
