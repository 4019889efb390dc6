"""How fast is the cluster bootstrap? 2,000 resamples of patients, AUROC, against a plain loop over scikit-learn.

    python benchmarks/bootstrap.py --resamples 2000 --loop-resamples 40 --repeats 3

Both resample the same number of patients within the same two strata (patients with and without a positive) and return
the 95 % percentile interval of the AUROC. The loop draws patients, joins the indices of their rows (where a patient is
one row, the draw is the index) and calls `roc_auc_score` on the rows it gets; it is timed on `--loop-resamples`
resamples only, and its time is scaled to `--resamples`. Repeats interleave the methods. Untimed, both also compute the
AUROC of 20 equal resamples, and the largest difference is recorded.
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
from sklearn.metrics import roc_auc_score

from eosin.evaluation.bootstrap import bootstrap, bootstrap_values, cluster_weights
from eosin.evaluation.metrics import METRICS, make_metrics

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LOOP = "scikit-learn loop, AUROC (scaled)"
EOSIN = "eosin bootstrap, AUROC"
MANY = ("auroc", "auprc", "ba", "accuracy", "sensitivity", "specificity", "ppv", "npv", "macro_f1", "mcc", "brier")
SIZES = ((10_000, 100), (100_000, 1_000), (100_000, 100_000))


def predictions(n: int, patients: int, seed: int) -> tuple[Ints, Floats, Ints]:
    """Return labels, probabilities and patients of n rows; half of the patients have about 30 % positive rows."""
    rng = np.random.default_rng(seed)
    cluster = np.arange(n) * patients // n
    y = (rng.random(n) < np.where(rng.random(patients) < 0.5, 0.3, 0.0)[cluster]).astype(np.int64)
    score = 1.5 * y + rng.normal(size=patients)[cluster] + rng.normal(size=n)
    return y, 1 / (1 + np.exp(-score)), cluster


def plain_loop(y: Ints, p: Floats, cluster: Ints, resamples: int, seed: int) -> tuple[float, float]:
    """Return the interval the usual way: index, call, repeat."""
    rng = np.random.default_rng(seed)
    rows = np.split(np.arange(len(y)), np.flatnonzero(np.diff(cluster)) + 1)
    positive = np.array([y[of].any() for of in rows])
    strata = [np.flatnonzero(positive), np.flatnonzero(~positive)]
    values = []
    for _ in range(resamples):
        drawn = np.concatenate([rng.choice(members, size=members.size) for members in strata])
        chosen = drawn if len(rows) == len(y) else np.concatenate([rows[patient] for patient in drawn])
        values.append(roc_auc_score(y[chosen], p[chosen]))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def disagreement(y: Ints, p: Floats, cluster: Ints, seed: int) -> float:
    """Return the largest difference to scikit-learn over 20 resamples of the same draws."""
    weights = np.concatenate(list(cluster_weights(cluster, strata=y, resamples=20, seed=seed)))
    _, values = bootstrap_values(make_metrics(["auroc"], y, p), cluster, y=y, resamples=20, seed=seed)
    rows = [np.repeat(np.arange(len(y)), w.astype(int)) for w in weights]
    return float(max(abs(roc_auc_score(y[at], p[at]) - ours) for at, ours in zip(rows, values["auroc"], strict=True)))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(n: int, patients: int, given: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of every repeat of every method, methods interleaved, and their ratios to the loop."""
    y, p, cluster = predictions(n, patients, given.seed)
    resamples, seed, scale = given.resamples, given.seed, given.resamples / given.loop_resamples
    methods: dict[str, Callable[[], float]] = {
        LOOP: lambda: scale * seconds(lambda: plain_loop(y, p, cluster, given.loop_resamples, seed)),
        EOSIN: lambda: seconds(
            lambda: bootstrap(METRICS["auroc"](y, p, 0.5), cluster, y=y, resamples=resamples, seed=seed)
        ),
        "eosin bootstrap, AUROC, BCa": lambda: seconds(
            lambda: bootstrap(METRICS["auroc"](y, p, 0.5), cluster, y=y, resamples=resamples, method="bca", seed=seed)
        ),
        f"eosin bootstrap, {len(MANY)} metrics": lambda: seconds(
            lambda: bootstrap(make_metrics(MANY, y, p), cluster, y=y, resamples=resamples, seed=seed)
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(given.repeats):
        for name, method in methods.items():
            taken[name].append(method())
    base = statistics.median(taken[LOOP])
    rows = {
        name: {
            "seconds": [round(value, 3) for value in values],
            "median": round(statistics.median(values), 3),
            "ratio": round(base / statistics.median(values), 1),
        }
        for name, values in taken.items()
    }
    return {
        "rows": n,
        "patients": patients,
        "largest_difference_to_scikit_learn": disagreement(y, p, cluster, seed),
        "methods": rows,
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, versions, commit, load."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "scikit-learn")},
        "commit": commit.stdout.strip(),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast is the cluster bootstrap?")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--loop-resamples", type=int, default=40, help="the loop is timed on so many, then scaled")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bootstrap.json")
    return parser.parse_args()


def main() -> None:
    given = options()
    command = f"python benchmarks/bootstrap.py --resamples {given.resamples} --loop-resamples {given.loop_resamples}"
    command += f" --repeats {given.repeats} --seed {given.seed}"
    print(command)
    result: dict[str, Any] = {
        "command": command,
        "machine": machine(),
        "seed": given.seed,
        "resamples": given.resamples,
        "loop_resamples": given.loop_resamples,
        "note": f"the loop was timed on {given.loop_resamples} resamples and its time scaled to {given.resamples}",
        "runs": [],
    }
    for n, patients in SIZES:
        run = measure(n, patients, given)
        result["runs"].append(run)
        print(f"\n{n} rows, {patients} patients: seconds (lowest-highest), times faster than the loop")
        for name, row in run["methods"].items():
            low, high = min(row["seconds"]), max(row["seconds"])
            print(f"  {name:36s} {row['median']:8.2f} ({low:.2f}-{high:.2f})  {row['ratio']:.1f}x")
        print(f"  largest difference to scikit-learn {run['largest_difference_to_scikit_learn']:.1e}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
