"""What a review leaves: a table of labels, one GeoJSON a slide for QuPath, and the tiles reviewers disagree on.

Labels that nobody gave but that spread along the neighbour graph are added only when asked for. Each carries
`source` "propagated" and a weight below one, none lies in the test split, and no audit tile spreads: what measures the
head must not shape its labels.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import shapely

from eosin.errors import QueryError, StoreError
from eosin.features.writer import write_durably
from eosin.retrieval.propagate import PROPAGATED, Propagation, Spread, knn_graph, propagate
from eosin.tasks.review import check_pool
from eosin.tasks.review_pool import Pool
from eosin.tasks.review_queue import directions
from eosin.tasks.review_state import AUDIT, Decision, Merged, merge, read_state
from eosin.tiles.geojson import Annotation, to_feature_collection

GRAPH_LIMIT = 60_000  # rows of the exact neighbour graph; more are sampled
COLUMNS = pd.Index(
    [
        "tile_id",
        "slide_id",
        "patient_id",
        "split",
        "x",
        "y",
        "file",
        "label",
        "not_label",
        "source",
        "verdict",
        "weight",
        "margin",
        "purity",
        "round",
        "reviewer",
        "at",
    ]
)
# Colour-blind-safe (Okabe and Ito), one a class in the order of the keys.
COLORS = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (240, 228, 66),
    (0, 0, 0),
    (120, 120, 120),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        table: labels.parquet.
        geojson: files, one a slide; empty for images.
        conflicts: conflicts.csv, or None when reviewers agree.
        labels: tiles of each class that a person labelled.
        propagated: tiles of each class that a label spread to.
        both: tiles that two reviewers gave a class.
        kappa: their agreement, see `Merged`.
        notes: what was left out, and why.
    """

    table: Path
    geojson: tuple[Path, ...]
    conflicts: Path | None
    labels: Mapping[str, int]
    propagated: Mapping[str, int]
    both: int
    kappa: float | None
    notes: tuple[str, ...]


def export_reviews(pool: Pool, out: Path, *, spread: Propagation | None = None) -> Exported:
    """Write the labels of all reviewers whose files lie in `out`; see `export`.

    Raises:
        StoreError: no file there.
        StoreMismatchError: files about other tiles than the pool's, or than each other's.
    """
    files = sorted(out.glob("review-*.jsonl"))
    if not files:
        raise StoreError(f"{out} holds no review (review-<name>.jsonl); begin one, or give the folder it is in")
    states = [read_state(path) for path in files]
    for path, state in zip(files, states, strict=True):
        check_pool(pool, state, path)
    return export(pool, merge(states), out, spread=spread)


def export(pool: Pool, merged: Merged, out: Path, *, spread: Propagation | None = None) -> Exported:
    """Write the labels of one or several reviewers.

    Args:
        pool: the tiles.
        merged: of `merge`.
        out: folder; gets labels.parquet, geojson/<slide>.geojson and, where reviewers disagree, conflicts.csv.
        spread: also label tiles that nobody looked at, where the neighbour graph leaves no doubt; None: do not.

    Raises:
        QueryError: labels are to spread, but they are of one class only.
        StoreError: the folder cannot be written.
    """
    notes = []
    rows = [
        _row(pool, one, place) for one, place in zip(merged.decisions, _places(pool, merged.decisions), strict=True)
    ]
    reached = []
    if spread is not None:
        found, note = spread_labels(pool, merged, spread)
        reached = [_spread_row(pool, found, at, merged.start.labels) for at in range(len(found.rows))]
        notes.append(note)
    table = pd.DataFrame([row for row in rows if row["source"] != "skip"] + reached, columns=COLUMNS)
    skipped = sum(row["source"] == "skip" for row in rows)
    notes += [f"{skipped} skipped tiles are left out"] if skipped else []
    write_durably(out / "labels.parquet", _parquet(table))
    conflicts = None
    if merged.conflicts:
        conflicts = out / "conflicts.csv"
        both = [
            _row(pool, one, place)
            for pair in merged.conflicts
            for one, place in zip(pair, _places(pool, pair), strict=True)
        ]
        write_durably(conflicts, pd.DataFrame(both, columns=COLUMNS).to_csv(index=False).encode())
        notes.append(f"{len(merged.conflicts)} tiles that reviewers disagree on are left out; see conflicts.csv")
    geojson, note = _write_geojson(pool, table, merged.start.labels, out / "geojson")
    notes += [note] if note else []
    labelled = table.loc[table["label"].notna()]
    by_person = Counter(labelled.loc[labelled["source"] != PROPAGATED, "label"])
    by_graph = Counter(labelled.loc[labelled["source"] == PROPAGATED, "label"])
    return Exported(
        table=out / "labels.parquet",
        geojson=tuple(geojson),
        conflicts=conflicts,
        labels={name: by_person[name] for name in merged.start.labels},
        propagated={name: by_graph[name] for name in merged.start.labels},
        both=merged.both,
        kappa=merged.kappa,
        notes=tuple(notes),
    )


def spread_labels(pool: Pool, merged: Merged, how: Propagation, *, seed: int = 0) -> tuple[Spread, str]:
    """Return the labels that reach tiles nobody looked at, by row of the pool, and one sentence about them.

    The graph holds no test tile. Tiles of the audit, tiles that were skipped or rejected and tiles in conflict neither
    give nor get a label. A pool larger than `GRAPH_LIMIT` is sampled, all labelled tiles kept.

    Raises:
        QueryError: labels of fewer than two classes, or too few tiles for the graph.
    """
    codes = np.full(len(pool), -1)
    silent = np.zeros(len(pool), np.bool_)
    for one, row in zip(merged.decisions, _places(pool, merged.decisions), strict=True):
        if one.label is None or one.share == AUDIT:
            silent[row] = True
        else:
            codes[row] = merged.start.labels.index(one.label)
    silent[[row for pair in merged.conflicts for row in _places(pool, pair)]] = True
    if len(np.unique(codes[codes >= 0])) < 2:
        raise QueryError("labels spread against each other, and there is one class only; review tiles of another")
    rows = np.flatnonzero(~pool.barred)
    note = ""
    if len(rows) > GRAPH_LIMIT:
        free = rows[codes[rows] < 0]
        kept = np.random.default_rng(seed).choice(free, max(0, GRAPH_LIMIT - int((codes >= 0).sum())), replace=False)
        note = f" of a sample of {GRAPH_LIMIT} of {len(rows)} tiles"
        rows = np.sort(np.concatenate([rows[codes[rows] >= 0], kept]))
    unit = directions(pool.x[rows])
    usable = np.linalg.norm(unit, axis=1) > 0
    rows, unit = rows[usable], unit[usable]
    found = propagate(knn_graph(unit, k=how.k), codes[rows], len(merged.start.labels), allowed=~silent[rows], how=how)
    placed = Spread(
        rows=rows[found.rows],
        codes=found.codes,
        margin=found.margin,
        purity=found.purity,
        weight=found.weight,
        reached=found.reached,
        barred=found.barred,
    )
    told = (
        f"labels spread to {len(found.rows)} tiles{note} with margin >= {how.margin:g} and purity >= {how.purity:g} "
        f"(of {found.reached} that a label reached); each weighs {how.weight:g} and is called {PROPAGATED!r}"
    )
    return placed, told


def _places(pool: Pool, decisions: Sequence[Decision]) -> list[int]:
    row = {tile: at for at, tile in enumerate(pool.ids.tolist())}
    return [row[one.id] for one in decisions]


def _row(pool: Pool, one: Decision, row: int) -> dict[str, Any]:
    """Return one decision as a row of the table; its source is why the tile was shown."""
    source = "skip" if one.verdict == "skip" else {"seed": "seed", AUDIT: AUDIT}.get(one.share, "review")
    return {
        **_tile(pool, row),
        "label": one.label,
        "not_label": one.proposed if one.verdict == "reject" and one.label is None else None,
        "source": source,
        "verdict": one.verdict,
        "weight": 1.0 if one.label is not None else 0.0,
        "round": one.round,
        "reviewer": one.reviewer,
        "at": one.at,
    }


def _spread_row(pool: Pool, found: Spread, at: int, labels: Sequence[str]) -> dict[str, Any]:
    numbers = {"weight": found.weight, "margin": found.margin[at], "purity": found.purity[at], "round": -1}
    return {**_tile(pool, int(found.rows[at])), "label": labels[found.codes[at]], "source": PROPAGATED, **numbers}


def _tile(pool: Pool, row: int) -> dict[str, Any]:
    image = pool.pictures is not None
    return {
        "tile_id": f"{int(pool.ids[row]):016x}",
        "slide_id": pool.slide_id[row],
        "patient_id": pool.patient_id[row],
        "split": pool.split[row],
        "x": None if image else int(pool.xy[row, 0]),
        "y": None if image else int(pool.xy[row, 1]),
        "file": pool.slide_id[row] if image else None,
    }


def _parquet(table: pd.DataFrame) -> bytes:
    texts = ("file", "label", "not_label", "verdict", "reviewer", "at")
    kinds = {"x": "Int64", "y": "Int64", "margin": "float64", "purity": "float64", **dict.fromkeys(texts, "string")}
    file = io.BytesIO()
    table.astype(kinds).to_parquet(file, index=False)
    return file.getvalue()


def _write_geojson(pool: Pool, table: pd.DataFrame, labels: Sequence[str], folder: Path) -> tuple[list[Path], str]:
    """Write one file a slide: reviewed tiles as annotations, propagated ones as detections."""
    if pool.pictures is not None:
        return [], "tiles are images without a place on a slide, so there is no GeoJSON"
    sizes = {tile: size for tile, size in zip(pool.ids.tolist(), pool.size0_px, strict=True)}
    files = []
    for slide_id, rows in table.loc[table["label"].notna()].groupby("slide_id", sort=True):
        annotations = []
        for one in rows.to_dict(orient="records"):
            width, height = sizes[int(one["tile_id"], 16)]
            if not (np.isfinite(width) and np.isfinite(height)):
                return [], "how large a tile is on its slide is not known here, so there is no GeoJSON"
            x, y = int(one["x"]), int(one["y"])
            spread = one["source"] == PROPAGATED
            about: dict[str, Any] = {"name": one["source"], "measurements": {"weight": one["weight"]}}
            if spread:
                about["measurements"] |= {"margin": one["margin"], "purity": one["purity"]}
            annotations.append(
                Annotation(
                    geometry=shapely.box(x, y, x + width, y + height),
                    name=str(one["label"]),
                    color=COLORS[labels.index(one["label"])],
                    object_type="detection" if spread else "annotation",
                    properties=about,
                )
            )
        files.append(folder / f"{slide_id}.geojson")
        write_durably(files[-1], orjson.dumps(to_feature_collection(annotations)))
    return files, ""
