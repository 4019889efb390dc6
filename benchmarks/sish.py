"""Does a search with a fixed number of candidates stay fast as the index grows, and what does it miss?

    python benchmarks/sish.py --features FEATURES.npz
    python benchmarks/sish.py --table            (writes the tables of docs/constant-time-search.md again)
    python benchmarks/sish.py --check            (exit 1 where they differ)

Three questions, recall@10 against exact search in each, and exact search timed in the same run on the same queries:

- growth: vectors of uneven clusters, each about a plane of few dimensions (`--sizes`), default settings, 256 cells;
- budget: the largest size again, with more and fewer candidates;
- real: the rows of FEATURES.npz (array `features`), as they are and, `--jitter` rows, between neighbours of each other.

Beside them at the same number of candidates: one walk from the query's own key, without guidance, and candidates drawn
by chance, whose recall is their share of the rows. Queries are of their own draw, or rows left out. Times are processor
time of one thread, one query at a time, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from eosin.heads.neighbours import nearest
from eosin.retrieval.codes import encode
from eosin.retrieval.protocol import IndexSpec
from eosin.retrieval.sish import SishIndex, SishSettings, build_sish, search_sish
from eosin.retrieval.walk import predecessors, successors
from knn import machine

Vectors = npt.NDArray[np.float32]
HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "sish.json"
PAGE = HERE.parent / "docs" / "constant-time-search.md"
K = 10
CLUSTERS, PLANE, NOISE = 500, 12, 0.1
NEAR, WIDER = 10, 0.1  # neighbours that jitter goes towards, and its noise in standard deviations of a feature
GROWTH = ("entries", "build, CPU s", "candidates", "lowest-highest", "recall@10", "CPU ms", "p95", "exact, CPU ms")
BUDGETS = ("vectors", "entries", "candidates", "by chance", "one walk", "guided", "CPU ms", "exact, CPU ms")


def clustered(rows: int, dim: int, seed: int) -> Vectors:
    """Return vectors of clusters of different sizes, each about its own plane; the clusters are those of any seed."""
    made = np.random.default_rng(0)
    centres = made.standard_normal((CLUSTERS, dim), dtype=np.float32)
    planes = 0.35 * made.standard_normal((CLUSTERS, PLANE, dim), dtype=np.float32)
    share = made.dirichlet(np.full(CLUSTERS, 0.7))
    rng = np.random.default_rng([1, seed])
    label = rng.choice(CLUSTERS, rows, p=share)
    out = NOISE * rng.standard_normal((rows, dim), dtype=np.float32)
    for cluster in np.unique(label):
        members = np.flatnonzero(label == cluster)
        within = rng.standard_normal((len(members), PLANE), dtype=np.float32)
        out[members] += centres[cluster] + within @ planes[cluster]
    return out


def jittered(features: Vectors, rows: int, seed: int) -> Vectors:
    """Return rows that lie between a row of `features` and one of its nearest, with noise."""
    rng = np.random.default_rng(seed)
    _, near = nearest(features, features, NEAR + 1)
    spread = WIDER * features.std(axis=0)
    start = rng.integers(len(features), size=rows)
    end = near[start, rng.integers(1, NEAR + 1, size=rows)]
    out = np.empty((rows, features.shape[1]), np.float32)
    for at in range(0, rows, 5000):
        part = slice(at, at + 5000)
        share = rng.random((len(start[part]), 1), dtype=np.float32)
        out[part] = features[start[part]] * (1 - share) + features[end[part]] * share
        out[part] += spread * rng.standard_normal(out[part].shape, dtype=np.float32)
    return out


def built(base: Vectors, seed: int) -> tuple[SishIndex, float]:
    """Return the index of `base` with row numbers as ids, and the processor seconds it took."""
    spec = IndexSpec(dim=base.shape[1], encoder="benchmark", fields={})
    started = time.process_time()
    index = build_sish(np.arange(len(base), dtype=np.uint64), base, {}, spec, seed=seed)
    return index, time.process_time() - started


def exact(index: SishIndex, queries: Vectors, timed: int) -> tuple[npt.NDArray[np.int64], list[float]]:
    """Return places of the nearest (q, K), and milliseconds of searching for some queries one at a time."""
    _, places = nearest(queries, index.vectors, K)
    spent = []
    for query in queries[:timed] / np.linalg.norm(queries[:timed], axis=1, keepdims=True):
        started = time.thread_time()
        score = index.vectors @ query
        best = np.argpartition(-score, K)[:K]
        best[np.argsort(-score[best])]
        spent.append(1e3 * (time.thread_time() - started))
    return places, spent


def measured(
    index: SishIndex, queries: Vectors, truth: npt.NDArray[np.int64], scan: list[float], budget: int
) -> dict[str, Any]:
    """Return recall, candidates and times of one budget."""
    settings = SishSettings(budget=budget)
    search_sish(index, queries[:2], k=K, settings=settings)
    spent, recall, counts = [], [], []
    for query, places in zip(queries, truth, strict=True):
        started = time.thread_time()
        (found,) = search_sish(index, query[None], k=K, settings=settings)
        spent.append(1e3 * (time.thread_time() - started))
        recall.append(np.isin(index.ids[places], found.hits.ids).mean())
        counts.append(found.candidates)
    return {
        "entries": len(index),
        "dim": index.spec.dim,
        "budget": budget,
        "candidates": {"mean": float(np.mean(counts)), "min": min(counts), "max": max(counts)},
        "recall": round(float(np.mean(recall)), 4),
        "recall_lowest_tenth": round(float(np.sort(recall)[: max(1, len(recall) // 10)].mean()), 4),
        "recall_one_walk": round(one_walk(index, queries, truth, budget), 4),
        "recall_chance": round(min(1.0, budget / len(index)), 4),
        "ms": {"p50": round(float(np.median(spent)), 2), "p95": round(float(np.quantile(spent, 0.95)), 2)},
        "exact_ms_p50": round(float(np.median(scan)), 2),
    }


def one_walk(index: SishIndex, queries: Vectors, truth: npt.NDArray[np.int64], budget: int) -> float:
    """Return the recall of half the budget below and half above the query's key, all of it compared exactly."""
    keys = encode(queries / np.linalg.norm(queries, axis=1, keepdims=True), index.codebook)
    half = budget // 2
    walks = [
        np.concatenate([predecessors(index.keys, k, half), successors(index.keys, k, half)]) for k in keys.tolist()
    ]
    return float(np.mean([np.isin(places, walk).mean() for places, walk in zip(truth, walks, strict=True)]))


def growth(sizes: list[int], budgets: list[int], dim: int, asked: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of every size at the default budget, and of the largest at all budgets."""
    rows, largest = [], []
    queries = clustered(asked, dim, seed + 1)
    for size in sizes:
        index, seconds = built(clustered(size, dim, seed), seed)
        truth, scan = exact(index, queries, 30)
        rows.append(measured(index, queries, truth, scan, SishSettings().budget) | {"build_s": round(seconds, 1)})
        print(json.dumps(rows[-1]), flush=True)
        if size == max(sizes):
            largest = [measured(index, queries, truth, scan, budget) | {"vectors": "clusters"} for budget in budgets]
    return {"growth": rows, "budget": largest}


def real(file: Path, jitter: int, asked: int, seed: int) -> list[dict[str, Any]]:
    """Return the figures of real features, and of many rows between them."""
    features = np.load(file)["features"].astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(features))
    queries, base = features[order[:asked]], features[order[asked:]]
    out = []
    index, _ = built(base, seed)
    truth, scan = exact(index, queries, 30)
    for budget in (125, 250, 500, 1000):
        out.append(measured(index, queries, truth, scan, budget) | {"vectors": "AMF crops"})
    few = PCA(128, random_state=seed).fit(features)
    small = few.transform(features).astype(np.float32)
    index, _ = built(jittered(small, jitter, seed), seed)
    queries = jittered(small, asked, seed + 1)
    truth, scan = exact(index, queries, 30)
    for budget in (500, 2000, 8000):
        out.append(measured(index, queries, truth, scan, budget) | {"vectors": "AMF crops, jittered"})
    return out


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page by name."""
    rows = [
        (
            f"{row['entries']:,}",
            row["build_s"],
            f"{row['candidates']['mean']:.0f}",
            f"{row['candidates']['min']}-{row['candidates']['max']}",
            f"{row['recall']:.3f}",
            row["ms"]["p50"],
            row["ms"]["p95"],
            row["exact_ms_p50"],
        )
        for row in result["growth"]
    ]
    others = [
        (
            f"{row['vectors']}, {row['dim']} dimensions",
            f"{row['entries']:,}",
            f"{row['candidates']['mean']:.0f}",
            f"{row['recall_chance']:.3f}",
            f"{row['recall_one_walk']:.3f}",
            f"{row['recall']:.3f}",
            row["ms"]["p50"],
            row["exact_ms_p50"],
        )
        for row in result["budget"] + result["real"]
    ]
    where = result["machine"]
    origin = (
        f"`{result['command']}`, {where['processor']}, {where['cores']} cores, load {where['load_before']:.0f} before."
    )
    return {"growth": f"{_lines(GROWTH, rows)}\n\n{origin}", "budget": _lines(BUDGETS, others)}


def _lines(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [names, ("---", *["---:"] * (len(names) - 1)), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def rendered(page: str, found: dict[str, str]) -> str:
    """Return the page with its tables between their marks."""
    for name, table in found.items():
        mark = re.compile(rf"(<!-- sish:{name} -->\n).*?(<!-- /sish -->)", re.S)
        page = mark.sub(lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", page)
    return page


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="npz of real features")
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--budgets", default="500,2000,8000")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--jitter", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    return parser.parse_args()


def run(given: argparse.Namespace) -> None:
    """Measure and keep the numbers."""
    command = (
        f"python benchmarks/sish.py --features {given.features.name} --sizes {given.sizes} --budgets {given.budgets}"
    )
    command += f" --dim {given.dim} --queries {given.queries} --jitter {given.jitter} --seed {given.seed}"
    print(command)
    result: dict[str, Any] = {"command": command, "machine": machine(), "k": K, "settings": str(SishSettings())}
    sizes, budgets = ([int(one) for one in text.split(",")] for text in (given.sizes, given.budgets))
    result |= growth(sizes, budgets, given.dim, given.queries, given.seed)
    result["real"] = real(given.features, given.jitter, given.queries, given.seed)
    result["machine"]["load_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=1))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Run, or write or check the tables."""
    given = options()
    if given.features is not None:
        with threadpool_limits(limits=1):
            run(given)
    page = PAGE.read_text()
    new = rendered(page, tables(json.loads(RESULT.read_text())))
    if given.check and new != page:
        raise SystemExit(
            "docs/constant-time-search.md does not show the results; run: python benchmarks/sish.py --table"
        )
    if not given.check:
        PAGE.write_text(new)


if __name__ == "__main__":
    main()
