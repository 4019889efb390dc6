"""Does the review loop find more, and teach a head faster, than looking at random tiles? Tables of docs/review.md.

    python benchmarks/review.py IMAGES [--features DIR/efficientnet-lite0.npz] [--probe PROBE]
    python benchmarks/review.py --table         (writes tables and picture of docs/review.md again, from the results)
    python benchmarks/review.py --check         (exit 1 where they differ)

IMAGES holds labels.csv and the pictures it names (AMi-Br: midog21 and atnorm-br); the features of EfficientNet-Lite0
are those of `benchmarks/effnet_weights.py`, and PROBE is what `benchmarks/amf.py` leaves (`eosin probe ... --out
PROBE`), for the part on hard examples. A reviewer that knows every label answers. Three ways to choose what it sees,
from the same five seed tiles of the class that is looked for:

    loop      eosin.tasks.review as it is: default shares, 50 tiles a round
    similar   the tiles most like the mean of the seeds, in that order
    random    tiles at random

All three heads are `fit_head`. The loop's audit tiles count as reviewed, and never train.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from end_to_end import commit, machine
from eosin.cohort import read_cohort
from eosin.evaluation.bootstrap import bootstrap
from eosin.heads.logistic import logistic_path
from eosin.retrieval.propagate import Propagation, knn_graph, propagate
from eosin.tasks.hard_examples import hard_examples
from eosin.tasks.hard_judge import DOUBTFUL
from eosin.tasks.review import OTHER, Answer, Review, fit_head
from eosin.tasks.review_pool import Pool
from eosin.tasks.review_queue import directions
from eosin.tasks.review_state import AUDIT
from eosin.tasks.samples import read_samples
from eosin.tasks.validation_page import with_interval

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "review" / "loop.json"
PAGE = HERE.parent / "docs" / "review.md"
PICTURE = HERE.parent / "docs" / "review.png"
SEEDS = 5
GIVEN = 5  # seed tiles
SIZE = 50
METHODS = ("loop", "similar", "random")
COLORS = {"loop": "#d55e00", "similar": "#0072b2", "random": "#767676"}

Array = npt.NDArray[Any]
Step = tuple[int, Array, Array]  # reviews, rows reviewed (seeds excluded), rows that train


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Tiles with the class that is looked for, and slides that only test."""

    x: Array
    y: Array  # (n,) bool
    group: Array
    test: Array  # (n,) bool


def pool_of(task: Task) -> Pool:
    n = len(task.x)
    return Pool(
        x=task.x,
        ids=np.arange(n, dtype=np.uint64),
        slide_id=task.group,
        patient_id=task.group,
        xy=np.stack([np.arange(n), np.zeros(n, int)], axis=1),
        size0_px=np.ones((n, 2)),
        split=np.where(task.test, "test", "train"),
        about={"encoder": "benchmark"},
    )


def loop(task: Task, seeds: Array, total: int, seed: int) -> tuple[list[Step], dict[str, Any]]:
    names = np.where(task.y, "sought", OTHER)
    steps, stopped = [(0, seeds[:0], seeds)], None
    with tempfile.TemporaryDirectory() as folder:
        start = {int(row): "sought" for row in seeds}
        with Review.start(pool_of(task), Path(folder) / "r.jsonl", seeds=start, seed=seed) as review:
            seconds = []
            while len(review.state.decisions) - len(seeds) < total:
                clock = time.process_time()
                queue = review.next_round(size=SIZE)
                seconds.append(time.process_time() - clock)
                review.decide(*(Answer(id=i.id, verdict="relabel", label=str(names[review.row(i.id)])) for i in queue))
                decided = list(review.state.decisions.values())[len(seeds) :]
                train = [review.row(one.id) for one in decided if one.share != AUDIT]
                rows = np.array([review.row(one.id) for one in decided])
                steps.append((len(rows), rows, np.concatenate([seeds, np.array(train, np.int64)])))
                advice = review.stop_advice()
                if advice.stop and stopped is None:
                    stopped = {"reviews": len(rows), "why": advice.why}
            why = review.stop_advice().why
    return steps, {"stopped": stopped, "why_at_the_end": why, "round_cpu_seconds": round(max(seconds), 3)}


def ordered(order: Array, seeds: Array, total: int) -> list[Step]:
    return [(k, order[:k], np.concatenate([seeds, order[:k]])) for k in range(0, total + 1, SIZE)]


def measure(task: Task, seeds: Array, steps: list[Step]) -> dict[str, list[float]]:
    left = int((task.y & ~task.test).sum()) - len(seeds)
    found, auroc, ba = [], [], []
    for _, rows, train in steps:
        found.append(int(task.y[rows].sum()) / left)
        if len(np.unique(task.y[train])) < 2:
            auroc.append(0.5)
            ba.append(0.5)
            continue
        p = fit_head(task.x[train], task.y[train].astype(np.int64), task.group[train]).predict_proba(task.x[task.test])
        auroc.append(float(roc_auc_score(task.y[task.test], p[:, 1])))
        ba.append(float(balanced_accuracy_score(task.y[task.test], p[:, 1] > 0.5)))
    return {"reviews": [step[0] for step in steps], "found": found, "auroc": auroc, "ba": ba}


def area(curve: dict[str, list[float]], name: str) -> float:
    """Return the mean height of a learning curve."""
    return float(np.trapezoid(curve[name], curve["reviews"]) / curve["reviews"][-1])


def study(make: Callable[[int], Task], total: int) -> dict[str, Any]:
    """Return curves of every method and seed, and what is told from them."""
    curves: dict[str, list[dict[str, list[float]]]] = {name: [] for name in METHODS}
    rows, loops = [], []
    for seed in range(SEEDS):
        task, rng = make(seed), np.random.default_rng([seed, 7])
        free = np.flatnonzero(~task.test)
        seeds = np.sort(rng.choice(free[task.y[free]], GIVEN, replace=False))
        rest = np.setdiff1d(free, seeds)
        unit = directions(task.x)
        near = rest[np.argsort(-(unit[rest] @ unit[seeds].mean(axis=0)), kind="stable")]
        steps, about = loop(task, seeds, total, seed)
        loops.append(about)
        curves["loop"].append(measure(task, seeds, steps))
        curves["similar"].append(measure(task, seeds, ordered(near, seeds, total)))
        curves["random"].append(measure(task, seeds, ordered(rng.permutation(rest), seeds, total)))
        full = fit_head(task.x[free], task.y[free].astype(np.int64), task.group[free]).predict_proba(task.x[task.test])
        rows.append(
            {
                "pool": len(free),
                "sought": int(task.y[free].sum()),
                "auroc_all_labels": float(roc_auc_score(task.y[task.test], full[:, 1])),
                "expected_by_chance": total / len(rest),
            }
        )
    told: dict[str, Any] = {}
    for name in METHODS:
        told[name] = {f"area_{one}": [area(curve, one) for curve in curves[name]] for one in ("found", "auroc", "ba")}
        told[name]["found_at_end"] = [curve["found"][-1] for curve in curves[name]]
        at = {n: [c["found"][c["reviews"].index(n)] for c in curves[name]] for n in (200,)}
        told[name]["found_at_200"] = at[200]
    return {"seeds": rows, "loops": loops, "told": told, "curves": _rounded(curves)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def amf_task(x: Array, cells: pd.DataFrame, seed: int) -> Task:
    """Atypical figures of midog21; three in ten slides test."""
    rows = np.flatnonzero(cells["dataset"] == "midog21")
    group = cells["slide_id"].to_numpy(np.str_)[rows]
    slides, rng = np.unique(group), np.random.default_rng([seed, 1])
    test = np.isin(group, rng.choice(slides, len(slides) * 3 // 10, replace=False))
    return Task(x=x[rows], y=(cells["atypical"].to_numpy()[rows] == "1"), group=group, test=test)


def rare_task(x: Array, cells: pd.DataFrame, sought: Array, seed: int) -> Task:
    """All other tiles and so many sought that they are one in a hundred; sought ones of other slides test."""
    rng = np.random.default_rng([seed, 2])
    group = np.where(cells["slide_id"].isna(), cells["file"], cells["slide_id"]).astype(np.str_)
    others = np.flatnonzero(~sought)
    names = np.unique(group[sought])
    train_slides = rng.choice(names, len(names) // 2, replace=False)
    candidates = np.flatnonzero(sought & np.isin(group, train_slides))
    few = rng.choice(candidates, max(GIVEN + 5, round(len(others) / 99)), replace=False)
    held = np.flatnonzero(sought & ~np.isin(group, train_slides))
    away = rng.choice(others, len(others) // 8, replace=False)
    rows = np.concatenate([others, few, held])
    test = np.concatenate([np.isin(others, away), np.zeros(len(few), bool), np.ones(len(held), bool)])
    return Task(x=x[rows], y=sought[rows], group=group[rows], test=test)


def planted_task(seed: int, apart: float, *, n: int = 14_000, dim: int = 64, kinds: int = 12) -> Task:
    """Twelve groups of tiles, one of them 1 %, their centres `apart` standard deviations of noise from the middle."""
    rng = np.random.default_rng([seed, 3])
    centres = rng.standard_normal((kinds, dim))
    centres *= apart / np.linalg.norm(centres, axis=1, keepdims=True)
    share = np.full(kinds, 0.99 / (kinds - 1))
    share[0] = 0.01
    kind = rng.choice(kinds, size=n, p=share)
    x = (centres[kind] + rng.standard_normal((n, dim))).astype(np.float32)
    group = rng.integers(100, size=n)
    return Task(x=x, y=kind == 0, group=group.astype(np.str_), test=group < 28)


def spread_study(make: Callable[[int], Task], total: int) -> list[dict[str, Any]]:
    """Return how right spread labels are, and whether they help the head, per seed, after `total` reviews."""
    rows = []
    for seed in range(SEEDS):
        task, rng = make(seed), np.random.default_rng([seed, 7])
        free = np.flatnonzero(~task.test)
        seeds = np.sort(rng.choice(free[task.y[free]], GIVEN, replace=False))
        train = loop(task, seeds, total, seed)[0][-1][2]
        codes = np.full(len(free), -1)
        at = np.searchsorted(free, train)
        codes[at] = task.y[train]
        how = Propagation()
        found = propagate(knn_graph(directions(task.x[free]), k=how.k), codes, 2, allowed=np.ones(len(free), bool))
        truth = task.y[free[found.rows]]
        with_spread = np.concatenate([train, free[found.rows]])
        target = np.concatenate([task.y[train], found.codes]).astype(np.float64)[:, None]
        weight = np.concatenate([np.ones(len(train)), np.full(len(found.rows), how.weight)])[:, None]
        aurocs = []
        for rows_used in (slice(0, len(train)), slice(None)):
            y, w = target[rows_used], weight[rows_used]
            balance = np.where(y > 0, w.sum() / (2 * w[y > 0].sum()), w.sum() / (2 * w[y == 0].sum()))
            path = logistic_path(task.x[with_spread[rows_used]], y, [1e-2], link="sigmoid", weight=w * balance)
            aurocs.append(float(roc_auc_score(task.y[task.test], task.x[task.test] @ path.coef[0, 0])))
        rows.append(
            {
                "reviewed": len(train),
                "spread": len(found.rows),
                "right": float((truth == found.codes).mean()) if len(truth) else None,
                "sought": int(found.codes.sum()),
                "sought_right": float(truth[found.codes == 1].mean()) if found.codes.any() else None,
                "auroc_without": aurocs[0],
                "auroc_with": aurocs[1],
            }
        )
    return rows


def votes_study(images: Path, probe: Path, name: str, encoder: str) -> dict[str, Any]:
    """Are labels that neighbours doubt those on which the three experts did not agree?"""
    cells = pd.read_csv(images / "labels.csv", dtype=str)
    with tempfile.TemporaryDirectory() as folder:
        found = hard_examples(
            images, images / "labels.csv", probe / f"predictions_{name}.csv", out=Path(folder), encoder=encoder
        )
    table = found.table
    votes = cells["votes"].to_numpy()[table["row"].to_numpy() - 2]
    split = np.array([len(set(one)) > 1 for one in votes]).astype(float)
    doubtful = (table["verdict"] == DOUBTFUL).to_numpy()
    rows = []
    for label in sorted(table["label"].unique()):
        mine = (table["label"] == label).to_numpy()
        for verdict, chosen in (("label doubtful", doubtful), ("other errors", ~doubtful)):
            at = mine & chosen
            rows.append({"label": label, "verdict": verdict, "n": int(at.sum()), "split": int(split[at].sum())})
    patient, d = table["patient"].to_numpy(), doubtful.astype(float)

    def difference(weights: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return weights @ (d * split) / (weights @ d) - weights @ ((1 - d) * split) / (weights @ (1 - d))

    def ranks(weights: Array) -> Array:
        """AUROC of the balance for split votes, with weights of rows."""
        score = table["balance"].to_numpy()
        more = (score[:, None] > score[None, :]) + 0.5 * (score[:, None] == score[None, :])
        good, bad = weights * split, weights * (1 - split)
        return np.einsum("bi,ij,bj->b", good, more, bad) / (good.sum(axis=1) * bad.sum(axis=1))

    told = bootstrap({"difference": difference, "auroc": ranks}, patient, resamples=1000)
    return {
        "encoder": name,
        "errors": len(table),
        "doubtful": int(doubtful.sum()),
        "by_luck": found.judged.by_luck,
        "verdicts": found.report.sections["verdicts"],
        "rows": rows,
        "split_of_all": float(np.mean([len(set(one)) > 1 for one in cells["votes"].dropna()])),
        "split_of_errors": float(split.mean()),
        "difference": told["difference"].to_dict(),
        "auroc_of_balance": told["auroc"].to_dict(),
    }


def run(images: Path, features: Path | None, probe: Path | None, command: str) -> None:
    """Run every study and keep the numbers."""
    cohort = read_cohort(images / "labels.csv")
    cells = pd.read_csv(images / "labels.csv", dtype=str)
    xs = {"texture": read_samples(images, cohort, encoder="texture").x}
    if features is not None:
        xs["efficientnet-lite0"] = read_samples(images, cohort, encoder=str(features)).x
    clock = time.process_time()
    studies, spread, votes = {}, {}, []
    if probe is not None:
        for name in xs:
            encoder = "texture" if name == "texture" else str(features)
            votes.append(votes_study(images, probe, name, encoder))
    for name, x in xs.items():
        studies[f"amf/{name}"] = study(lambda seed, x=x: amf_task(x, cells, seed), 400)
        scanner = (cells["scanner"] == "Hamamatsu XR").to_numpy()
        atypical = (cells["atypical"] == "1").to_numpy()
        studies[f"rare scanner/{name}"] = study(lambda seed, x=x, s=scanner: rare_task(x, cells, s, seed), 200)
        studies[f"rare atypical/{name}"] = study(lambda seed, x=x, s=atypical: rare_task(x, cells, s, seed), 200)
        spread[f"amf/{name}"] = spread_study(lambda seed, x=x: amf_task(x, cells, seed), 400)
    for apart in (1.5, 2.0, 3.0, 4.0, 6.0):
        studies[f"planted/{apart:g}"] = study(lambda seed, a=apart: planted_task(seed, a), 200)
    for apart in (2.0, 4.0):
        spread[f"planted/{apart:g}"] = spread_study(lambda seed, a=apart: planted_task(seed, a, n=5000), 200)
    result = {
        "command": command,
        "machine": machine(),
        "commit": commit(),
        "cpu_seconds": round(time.process_time() - clock),
        "settings": {"seeds": SEEDS, "given": GIVEN, "size": SIZE},
        "studies": studies,
        "spread": _rounded(spread),
        "votes": _rounded(votes),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result) + "\n")


def _mean(values: list[float], digits: int = 3) -> str:
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _difference(ours: list[float], theirs: list[float]) -> str:
    d = np.subtract(ours, theirs)
    return f"{d.mean():+.3f} ({d.min():+.3f} to {d.max():+.3f}), {int((d > 0).sum())} of {len(d)}"


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the tables of the page by name."""
    curves, rare, spread, votes = [], [], [], []
    for key, one in result["studies"].items():
        told = one["told"]
        if key.startswith("amf"):
            for measured, words in (
                ("found", "atypical figures found"),
                ("auroc", "AUROC"),
                ("ba", "balanced accuracy"),
            ):
                name = f"area_{measured}"
                areas = [_mean(told[method][name]) for method in METHODS]
                curves.append([key.split("/")[1], words, *areas, _difference(told["loop"][name], told["random"][name])])
            continue
        ratio = np.mean(told["loop"]["found_at_200"]) / np.mean([row["expected_by_chance"] for row in one["seeds"]])
        rare.append(
            [
                key,
                f"{one['seeds'][0]['sought']} of {one['seeds'][0]['pool']}",
                f"{np.mean([row['auroc_all_labels'] for row in one['seeds']]):.3f}",
                *(_mean(told[method]["found_at_200"], 2) for method in METHODS),
                f"{np.mean([row['expected_by_chance'] for row in one['seeds']]):.3f}",
                f"{ratio:.1f}",
            ]
        )
    for key, rows in result["spread"].items():
        right = [row["right"] for row in rows if row["right"] is not None]
        sought = [row["sought_right"] for row in rows if row["sought_right"] is not None]
        spread.append(
            [
                key,
                f"{rows[0]['reviewed']}",
                f"{np.mean([row['spread'] for row in rows]):.0f}",
                _mean(right) if right else "none",
                f"{np.mean([row['sought'] for row in rows]):.0f}",
                _mean(sought, 2) if sought else "none",
                _mean([row["auroc_without"] for row in rows]),
                _difference([row["auroc_with"] for row in rows], [row["auroc_without"] for row in rows]),
            ]
        )
    for one in result["votes"]:
        for row in one["rows"]:
            share = f"{row['split'] / row['n']:.2f}" if row["n"] else "–"
            votes.append([one["encoder"], row["label"], row["verdict"], row["n"], f"{row['split']} ({share})"])
    points = [
        [
            one["encoder"],
            one["errors"],
            one["doubtful"],
            f"{one['by_luck']:.1f}",
            f"{one['split_of_errors']:.2f}",
            with_interval(one["difference"]),
            with_interval(one["auroc_of_balance"]),
        ]
        for one in result["votes"]
    ]
    names = ["features", "area under the curve of", *METHODS, "loop less random, wins"]
    rare_names = ["class", "sought", "AUROC, all labels", *METHODS, "by chance", "loop to chance"]
    spread_names = ["features", "reviewed", "spread", "right", "sought", "of them right", "AUROC", "with spread, wins"]
    doubts = [
        "features",
        "errors",
        "doubtful",
        "clear by luck",
        "split votes",
        "doubtful less other",
        "AUROC of balance",
    ]
    return {
        "curves": _lines(names, curves),
        "rare": _lines(rare_names, rare),
        "spread": _lines(spread_names, spread),
        "votes": _lines(["features", "label", "verdict", "errors", "votes split"], votes),
        "doubts": _lines(doubts, points),
    }


def _lines(names: list[str], rows: list[list[Any]]) -> str:
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rendered(page: str, found: dict[str, str]) -> str:
    """Return the page with its tables between their marks."""
    for name, table in found.items():
        mark = re.compile(rf"(<!-- review:{name} -->\n).*?(<!-- /review -->)", re.S)
        page = mark.sub(lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", page)
    return page


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw what is found, what the head learns, and the recall of rare classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axis, name, words in (
        (left, "found", "share of atypical figures found"),
        (middle, "auroc", "AUROC, other slides"),
    ):
        for method in METHODS:
            curves = result["studies"]["amf/texture"]["curves"][method]
            x, values = curves[0]["reviews"], np.array([curve[name] for curve in curves])
            axis.plot(x, values.mean(axis=0), color=COLORS[method], label=method, lw=2)
            axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=COLORS[method], alpha=0.15, lw=0)
        axis.set(xlabel="tiles reviewed", title=f"AMi-Br, texture: {words}")
        axis.title.set_fontsize(9.5)
    left.legend(frameon=False)
    planted = [one for key, one in result["studies"].items() if key.startswith("planted")]
    told = [np.mean([row["auroc_all_labels"] for row in one["seeds"]]) for one in planted]
    for method in METHODS:
        values = np.array([one["told"][method]["found_at_200"] for one in planted])
        right.errorbar(
            np.arange(len(told)),
            values.mean(axis=1),
            yerr=np.abs(np.stack([values.min(axis=1), values.max(axis=1)]) - values.mean(axis=1)),
            color=COLORS[method],
            marker="o",
            lw=2,
            capsize=3,
        )
    chance = np.mean([row["expected_by_chance"] for row in planted[0]["seeds"]])
    right.axhline(5 * chance, color="black", ls=":", lw=1)
    right.text(len(told) - 1, 5 * chance + 0.02, "5 times chance", ha="right", fontsize=8)
    right.set(
        xticks=np.arange(len(told)), xlabel="AUROC with all labels", title="planted class of 1 %: found in 200 reviews"
    )
    right.set_xticklabels([f"{one:.3f}" for one in told])
    right.title.set_fontsize(9.5)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, or write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--probe", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.images is not None:
        parts = ["python benchmarks/review.py IMAGES"]
        parts += [f"--features {args.features.name}"] if args.features else []
        run(args.images, args.features, args.probe, " ".join([*parts, *(["--probe PROBE"] if args.probe else [])]))
    result = json.loads(RESULT.read_text())
    page = PAGE.read_text()
    new = rendered(page, tables(result))
    if args.check and new != page:
        raise SystemExit("docs/review.md does not show the results; run: python benchmarks/review.py --table")
    if not args.check:
        PAGE.write_text(new)
        draw(result, PICTURE)


if __name__ == "__main__":
    main()
