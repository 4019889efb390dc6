"""How fast is a regularisation path? `logistic_path` against loops over scikit-learn's LogisticRegression.

    python benchmarks/probe.py --rows 100000 --dim 1024

Features are made: float32, correlated (eigenvalues of their covariance fall as 1 / rank), every feature with an
offset; labels are noisy, so no strength separates the classes. Every method gets the
same grid of C and, in each repeat, its turn. scikit-learn is handed features that are standardised already, so that
its scaling is not timed, and ours is. scikit-learn's answers are compared with ours through the loss they reach, in
float64: `excess` is C times its loss plus penalty, less ours, over ours. `error` is the largest difference in
a standardised coefficient from a reference, our path at a hundredth of the tolerance.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from eosin.heads import logistic
from eosin.heads.logistic import logistic_path

Array = npt.NDArray[Any]
Answers = tuple[Array, Array]  # coefficients (n_c, K, D) of standardised features, intercepts (n_c, K)

EOSIN = "eosin logistic_path"
BASELINE = "scikit-learn loop, lbfgs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    x: Array  # (n, D) float32
    z: Array  # (n, D) float32, standardised
    mean: Array
    scale: Array
    codes: Array
    targets: Array


def make(rows: int, dim: int, classes: int, seed: int) -> Data:
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    spread = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    x = (rng.standard_normal((rows, dim), dtype=np.float32) * spread) @ turn
    x += rng.standard_normal(dim, dtype=np.float32)
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    score = (x - mean.astype(np.float32)) @ (1.5 * rng.standard_normal((dim, classes)).astype(np.float32))
    codes = (score + rng.gumbel(size=score.shape)).argmax(axis=1)
    z = ((x - mean) / scale).astype(np.float32)
    targets = np.eye(classes)[codes]
    return Data(x=x, z=z, mean=mean, scale=scale, codes=codes, targets=targets[:, 1:] if classes == 2 else targets)


def eosin(data: Data, grid: list[float]) -> tuple[Answers, dict[str, Any]]:
    link = "sigmoid" if data.targets.shape[1] == 1 else "softmax"
    found = logistic_path(data.x, data.targets, grid, link=link)
    answers = found.coef * data.scale, found.intercept + found.coef @ data.mean
    return answers, {"passes": found.passes, "curvatures": found.curvatures}


def sklearn_loop(**how: Any) -> Callable[[Data, list[float]], tuple[Answers, dict[str, Any]]]:
    """Return a method: one LogisticRegression for every C, ascending; with warm_start each begins at the last."""

    def run(data: Data, grid: list[float]) -> tuple[Answers, dict[str, Any]]:
        coef, intercept, iterations = [], [], []
        model = LogisticRegression(max_iter=100_000, **how)
        for c in grid:
            model.set_params(C=c).fit(data.z, data.codes)
            coef.append(model.coef_.astype(np.float64))
            intercept.append(model.intercept_.astype(np.float64))
            iterations.append(int(model.n_iter_.max()))
        return (np.array(coef), np.array(intercept)), {"iterations": iterations}

    return run


METHODS: dict[str, Callable[[Data, list[float]], tuple[Answers, dict[str, Any]]]] = {
    EOSIN: eosin,
    BASELINE: sklearn_loop(),
    "scikit-learn loop, lbfgs, warm start": sklearn_loop(warm_start=True),
    "scikit-learn loop, lbfgs, tol 1e-6": sklearn_loop(tol=1e-6),
    "scikit-learn loop, newton-cholesky": sklearn_loop(solver="newton-cholesky"),
}


def losses(data: Data, answers: Answers, grid: list[float]) -> list[float]:
    """Return C times the summed loss, plus half the squared norm, for every C, in float64."""
    flat, sums = answers[0].reshape(-1, data.x.shape[1]), np.zeros(len(grid))
    for at in range(0, len(data.x), 4096):
        rows = slice(at, at + 4096)
        z = (data.x[rows] - data.mean) / data.scale
        margin = (z @ flat.T).reshape(len(z), len(grid), -1) + answers[1]
        logits = np.concatenate([np.zeros_like(margin), margin], axis=2) if margin.shape[2] == 1 else margin
        highest = logits.max(axis=2, keepdims=True)
        total = np.log(np.exp(logits - highest).sum(axis=2)) + highest[..., 0]
        sums += (total - logits[np.arange(len(z)), :, data.codes[rows]]).sum(axis=0)
    return (np.array(grid) * sums + 0.5 * np.square(answers[0]).sum(axis=(1, 2))).tolist()


def reference(data: Data, grid: list[float]) -> Answers:
    usual = logistic.TOLERANCE
    logistic.TOLERANCE = usual / 100
    try:
        return eosin(data, grid)[0]
    finally:
        logistic.TOLERANCE = usual


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, threads, versions, commit, load."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "blas": sorted({f"{pool['internal_api']} {pool['version']}" for pool in pools}),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "scikit-learn")},
        "commit": commit.stdout.strip(),
    }


def measure(data: Data, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per method: seconds of every repeat, ratio of medians to the baseline, how exact it is."""
    names = [name for name in METHODS if name not in given.skip]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    answers, notes = {}, {}
    for repeat in range(given.repeats):
        for name in names:
            if repeat and name not in (EOSIN, BASELINE):
                continue  # the alternatives run once: they are there to be fair, not to be compared closely
            started = time.perf_counter()
            answers[name], notes[name] = METHODS[name](data, given.grid)
            seconds[name].append(time.perf_counter() - started)
            print(f"  {name:40s} {seconds[name][-1]:8.2f} s", flush=True)
    truth = reference(data, given.grid)
    best = losses(data, answers[EOSIN], given.grid)
    base = statistics.median(seconds[BASELINE])
    rows = []
    for name in names:
        middle = statistics.median(seconds[name])
        excess = [(loss - low) / low for loss, low in zip(losses(data, answers[name], given.grid), best, strict=True)]
        error = np.abs(answers[name][0] - truth[0]).max(axis=(1, 2))
        rows.append(
            {
                "method": name,
                "seconds": [round(value, 3) for value in seconds[name]],
                "median_s": round(middle, 3),
                "times_faster_than_baseline": round(base / middle, 2),
                "error": [float(f"{value:.2g}") for value in error],
                "excess": [float(f"{value:.2g}") for value in excess],
                **notes[name],
            }
        )
    return rows


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast is a regularisation path?")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--grid", type=float, nargs="+", default=[1e-6, 1e-4, 1e-2, 1.0, 100.0], help="ascending C")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probe.json")
    return parser.parse_args()


def main() -> None:
    given = options()
    sizes = {name: getattr(given, name) for name in ("rows", "dim", "classes", "grid", "threads", "repeats", "seed")}
    told = " ".join(f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in sizes.items())
    command = f"python benchmarks/probe.py {told}" + "".join(f" --skip {json.dumps(name)}" for name in given.skip)
    print(command)
    result: dict[str, Any] = {"command": command, "machine": machine(), **sizes}
    with threadpool_limits(given.threads, "blas"):
        data = make(given.rows, given.dim, given.classes, given.seed)
        result["methods"] = measure(data, given)
    print(f"\nmedian seconds, times faster than {BASELINE}, largest error in a coefficient")
    for row in result["methods"]:
        print(
            f"  {row['method']:40s} {row['median_s']:8.2f} {row['times_faster_than_baseline']:7.2f}x"
            f"  {max(row['error']):.1e}"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
