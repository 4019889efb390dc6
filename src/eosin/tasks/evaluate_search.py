"""How good is a search index, and what does it see: leave one patient out, beside what a blind search would find.

Every labelled tile (or a sample) is a query; what it finds is judged by its label. Three exclusions answer three
questions: with nothing left out but the tile itself, how much does a search live on other tiles of the same slide? With
the patient left out, which is how eosin searches, does it find the label, or the site? With the site left out too, does
it find the label elsewhere? Slides are then queries for cases, one ranking an aggregator.

Intervals resample the patients of the queries; the index stays as it is. So they hold for other queries to this index,
not for another index.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from eosin.errors import QueryError
from eosin.evaluation.bootstrap import Metric, bootstrap
from eosin.evaluation.report import Remark, Report, plain, provenance
from eosin.evaluation.weighted import mean_metric
from eosin.features.writer import write_durably
from eosin.retrieval import measures
from eosin.retrieval.cases import AGGREGATORS, Aggregator, CaseSettings
from eosin.retrieval.measures import NONE
from eosin.retrieval.protocol import VectorIndex
from eosin.retrieval.slide_vectors import slide_vectors
from eosin.tasks.evaluate_search_page import evaluation_page
from eosin.tasks.evaluate_search_points import (
    EXCLUSIONS,
    ITSELF,
    Points,
    by_slide,
    nearest_cases,
    nearest_tiles,
    read_points,
)

SCHEMA = "eosin.search-evaluation/1"
DRAWS = 10
"""Blind searches behind the chance level of measures without a closed form."""
SHARED = {ITSELF: ("label", "site", "slide"), "patient": ("label", "site"), "site": ("label",)}
"""What neighbours may share with a query under each exclusion."""
ORGAN_LABELS = 2
"""Labels that an organ must have for a macro-F1 of its own."""
MOST_LABELS = 60
SHOWN = 8
"""Queries whose hits are kept for the page."""

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What `evaluate_search` is asked to do.

    Attributes:
        label: field of the label.
        site: field of the site or scanner; None, or a field the index lacks, leaves that part out.
        organ: field within which labels are compared too; likewise.
        patient: field of the patient.
        slide: field of the slide.
        ks: list lengths of the measures.
        aggregators: of the cases; empty leaves cases out.
        queries: tiles, and slides, that ask at most, drawn at random; None for all.
        exact: compare with every tile instead of walking the engine's graph.
        resamples: of the bootstrap.
        level: of confidence.
        seed: of every random draw.
    """

    label: str = "label"
    site: str | None = "site"
    organ: str | None = "organ"
    patient: str = "patient_id"
    slide: str = "slide_id"
    ks: tuple[int, ...] = (1, 3, 5)
    aggregators: tuple[Aggregator, ...] = AGGREGATORS
    queries: int | None = 2000
    exact: bool = False
    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no evaluation."""
        if not self.ks or min(self.ks) < 1 or tuple(sorted(set(self.ks))) != tuple(self.ks):
            raise QueryError(f"the list lengths are {self.ks}; needed: ascending whole numbers from 1, such as 1, 3, 5")
        if self.queries is not None and self.queries < 1:
            raise QueryError(f"{self.queries} queries make no evaluation; needed: at least 1, or None for all")

    def fields(self) -> dict[str, str]:
        """Return column -> field of the index."""
        named = {"label": self.label, "site": self.site, "organ": self.organ, "patient": self.patient}
        return {name: text for name, text in {**named, "slide": self.slide}.items() if text is not None}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """The hits of some queries, and what a blind search would find.

    Attributes:
        points: tiles or slides.
        rows: (q,) the queries among them.
        near: (q, K) their hits, best first, `NONE` where there is none.
        relevant: (q,) candidates of the query's label.
        expected: column (n,) of codes -> (q,) share of a query's candidates that carry its code.
        among: the same, of candidates of the labels that were found, in the first k hits; None where it is not known.
        blind: hits (q, K) of random searches.
        shared: columns in which hits may agree with their query.
    """

    points: Points
    rows: Codes
    near: Codes
    relevant: Codes
    expected: Callable[[Codes], Floats]
    among: Callable[[Codes, int], Floats] | None
    blind: Sequence[Codes]
    shared: tuple[str, ...]

    def own(self, column: str) -> Codes:
        """Return the code (q,) of each query."""
        return self.points.codes[column][self.rows]

    def hits(self, column: str, near: Codes | None = None) -> Codes:
        """Return the codes (q, K) of the hits, `NONE` where there is none."""
        near = self.near if near is None else near
        return np.where(near == NONE, NONE, self.points.codes[column][near])

    def patients(self) -> Codes:
        """Return the patient (q,) of each query: the unit that is resampled."""
        return self.own("patient")

    def metrics(self, ks: Sequence[int]) -> tuple[dict[str, Any], npt.NDArray[np.bool_]]:
        """Return all measures of labels over the queries that can be answered, and which these are (q,)."""
        can = self.relevant > 0
        made = measures.label_metrics(self.own("label")[can], self.hits("label")[can], self.relevant[can], ks=ks)
        return made, can


def evaluate_search(
    index: VectorIndex,
    settings: EvaluationSettings | None = None,
    *,
    out: Path | None = None,
    inputs: Sequence[Path] = (),
    pictures: Mapping[int, Path] | None = None,
) -> Report:
    """Return what a search index finds, against chance; write report.json, report.html and run.json into `out`.

    Args:
        index: with labels.
        settings: what to do.
        out: folder, made when it is not there; nothing is written when None.
        inputs: files that made the index, for the record.
        pictures: id of a point -> its image file, for examples on the page.

    Raises:
        QueryError: no labels, or fewer than two; settings that make no evaluation.
    """
    settings = settings or EvaluationSettings()
    started, clock = datetime.now(UTC), time.perf_counter()
    points = read_points(index, settings.fields())
    if max(points.clusters("label").values()) < 2:
        raise QueryError(f"no value of {settings.label!r} is found in two patients, so nothing can be found in another")
    sections: Values = {"data": _data(index, points, settings), "tiles": {}, "cases": {}, "examples": []}
    not_done: dict[str, str] = {}
    for name in ("site", "organ"):
        if name not in points.codes:
            asked = settings.fields().get(name)
            why = f"field {asked!r} is not in the index, or empty for some tiles" if asked else "not asked for"
            not_done[name] = why
    rows = drawn_rows(len(points), settings)
    for exclusion in EXCLUSIONS:
        if exclusion == "site" and len(points.names.get("site", ())) < 2:
            not_done["other sites"] = "tiles of two sites or more are needed"
            continue
        found = found_tiles(index, points, rows, exclusion, settings)
        if not (found.relevant > 0).any():
            not_done[f"tiles, {exclusion} left out"] = "no label has a second patient, or a second site, to be found at"
            continue
        sections["tiles"][exclusion] = measured(found, settings)
        if exclusion == "patient":
            sections["examples"] = _examples(found, settings)
    sections["cases"] = _cases(index, points, settings, not_done)
    report = Report(
        schema=SCHEMA,
        provenance=provenance(inputs=inputs, settings=settings, seed=settings.seed),
        sections=plain(sections),
        remarks=_remarks(sections, settings),
        not_done=not_done,
    )
    if out is not None:
        _write(report, out, pictures, {"started": started.isoformat(timespec="seconds"), "clock": clock})
    return report


def drawn_rows(n: int, settings: EvaluationSettings) -> Codes:
    """Return the rows that ask, ascending: all, or a random sample of the size of the settings."""
    if settings.queries is None or settings.queries >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(settings.seed).choice(n, settings.queries, replace=False))


def found_tiles(index: VectorIndex, points: Points, rows: Codes, exclusion: str, settings: EvaluationSettings) -> Found:
    """Return what tiles find under one exclusion (a key of `EXCLUSIONS`)."""
    k = max(settings.ks)
    near = nearest_tiles(index, points, rows, exclusion, k, exact=settings.exact)
    exclude, label = points.excluded(exclusion), points.codes["label"]
    return Found(
        points=points,
        rows=rows,
        near=near,
        relevant=measures.candidates(exclude, rows, [label], [label[rows]]),
        expected=lambda codes: measures.chance(exclude, rows, codes),
        among=lambda codes, first: measures.chance_among(exclude, rows, codes, label, near, first),
        blind=[measures.blind_search(exclude, rows, k, seed=settings.seed + draw) for draw in range(DRAWS)],
        shared=SHARED[exclusion],
    )


def found_cases(points: Points, rows: Codes, near: Codes, settings: EvaluationSettings) -> Found:
    """Return what slides find, each patient once and never the own one."""
    patient, label = points.codes["patient"], points.codes["label"]
    pairs = np.unique(np.stack([label, patient], axis=1), axis=0)
    blind = [
        measures.blind_search([patient], rows, near.shape[1], once=patient, seed=settings.seed + draw)
        for draw in range(DRAWS)
    ]

    def expected(codes: Codes) -> Floats:
        found = [np.where(draw == NONE, NONE, codes[draw]) for draw in blind]
        return np.mean([measures.precision_at(codes[rows], one, near.shape[1]) for one in found], axis=0)

    return Found(
        points=points,
        rows=rows,
        near=near,
        relevant=np.bincount(pairs[:, 0], minlength=len(points.names["label"]))[label[rows]] - 1,
        expected=expected,
        among=None,
        blind=blind,
        shared=SHARED["patient"],
    )


def measured(found: Found, settings: EvaluationSettings) -> Values:
    """Return every number of some queries, each with its interval and its chance level."""
    made, can = found.metrics(settings.ks)
    label, patient = found.own("label")[can], found.patients()[can]
    intervals = _intervals(made, patient, label, settings)
    draws = []
    for near in found.blind:
        hits = found.hits("label", near)[can]
        draws.append(
            measures.points(measures.label_metrics(label, hits, found.relevant[can], ks=settings.ks), len(label))
        )
    chance = {name: float(np.mean([draw[name] for draw in draws])) for name in made}
    columns = [name for name in found.shared if name in found.points.codes]
    return {
        "queries": len(found.rows),
        "answerable": int(can.sum()),
        "short": int((found.near == NONE).any(axis=1).sum()),
        "neighbours": {name: _shares(found, name, settings) for name in columns},
        "measures": {name: {**interval, "chance": chance[name]} for name, interval in intervals.items()},
        "by_label": _by_label(found, can, settings),
        "by_organ": _by_organ(found, can, settings),
    }


def _intervals(made: Mapping[str, Metric], patient: Codes, label: Codes, settings: EvaluationSettings) -> Values:
    """Return each number with its interval; patients are drawn within strata of the rarest label that they hold."""
    how: Values = {"resamples": settings.resamples, "level": settings.level, "seed": settings.seed}
    place = np.argsort(np.argsort(-np.bincount(label), kind="stable"), kind="stable")
    return plain(bootstrap(made, patient, y=place[label], **how))


def _shares(found: Found, column: str, settings: EvaluationSettings) -> Values:
    """Return k -> share of the first k hits that are of the query's label, site or slide, its chance level and lift."""
    own, hits, codes = found.own(column), found.hits(column), found.points.codes[column]
    blind = found.expected(codes)
    rows: Values = {}
    for k in settings.ks:
        share = measures.precision_at(own, hits, k)
        made = {"share": measures.share_metric(share), "lift": measures.lift_metric(share, blind)}
        known = ~np.isnan(share)
        among = None
        if column == "site" and found.among is not None:
            among = found.among(codes, k)
            made["lift_among_labels"] = measures.lift_metric(share, among)
        intervals = _intervals(made, found.patients(), found.own("label"), settings)
        rows[str(k)] = {
            **intervals,
            "chance": float(blind[known].mean()) if known.any() else None,
            "chance_among_labels": None if among is None or not known.any() else float(among[known].mean()),
        }
    return rows


def _by_label(found: Found, can: npt.NDArray[np.bool_], settings: EvaluationSettings) -> list[Values]:
    """Return how well each label is found, the most frequent first: the mean hides labels that are never found."""
    k, label, hits = max(settings.ks), found.own("label"), found.hits("label")
    rows = []
    for code in np.argsort(-np.bincount(label[can]), kind="stable")[:MOST_LABELS].tolist():
        mine = can & (label == code)
        if not mine.any():
            continue
        made = {
            f"acc@{settings.ks[0]}": mean_metric(measures.accuracy_at(label[mine], hits[mine], settings.ks[0])),
            f"mmv@{k}": mean_metric(measures.majority_at(label[mine], hits[mine], k)),
        }
        intervals = _intervals(made, found.patients()[mine], label[mine], settings)
        rows.append({"label": found.points.names["label"][code], "n": int(mine.sum()), "measures": intervals})
    return rows


def _by_organ(found: Found, can: npt.NDArray[np.bool_], settings: EvaluationSettings) -> list[Values]:
    """Return macro-F1 of the majority within each organ that has two labels or more."""
    if "organ" not in found.points.codes:
        return []
    k, label, hits, organ = max(settings.ks), found.own("label")[can], found.hits("label")[can], found.own("organ")[can]
    rows = []
    for code in np.unique(organ).tolist():
        mine = organ == code
        labels = len(np.unique(label[mine]))
        row = {"organ": found.points.names["organ"][code], "n": int(mine.sum()), "labels": labels, "macro_f1": None}
        if labels >= ORGAN_LABELS:
            metric = measures.macro_f1_metric(label[mine], hits[mine], k)
            draws = [found.hits("label", near)[can][mine] for near in found.blind]
            blind = [measures.macro_f1_metric(label[mine], draw, k) for draw in draws]
            chance = np.mean([measures.points({"f1": one}, int(mine.sum()))["f1"] for one in blind])
            made = _intervals({"f1": metric}, found.patients()[can][mine], label[mine], settings)["f1"]
            row["macro_f1"] = {**made, "chance": float(chance)}
        rows.append(row)
    return rows


def _cases(
    index: VectorIndex, points: Points, settings: EvaluationSettings, not_done: dict[str, str]
) -> dict[str, Values]:
    """Return what slides find, by aggregator."""
    slides = by_slide(points)
    if not settings.aggregators:
        return {}
    if slides is None:
        not_done["cases"] = "tiles of one slide differ in their label, so slides have none"
        return {}
    if not {"x", "y"} <= set(index.spec.fields):
        not_done["cases"] = "the index has no positions x and y"
        return {}
    patients = slides.clusters("label")
    if sum(count > 1 for count in patients.values()) < 2:
        not_done["cases"] = "fewer than two labels have slides of two patients or more"
        return {}
    rows, vectors, made = drawn_rows(len(slides), settings), slide_vectors(index), {}
    for aggregator in settings.aggregators:
        how = CaseSettings(aggregator=aggregator, k=max(settings.ks), exact=settings.exact, seed=settings.seed)
        near, proven = nearest_cases(index, slides, rows, how, vectors=vectors)
        values = measured(found_cases(slides, rows, near, settings), settings)
        made[aggregator] = {**values, "proven": proven if aggregator != "entropy-vote" else None}
    return made


def _data(index: VectorIndex, points: Points, settings: EvaluationSettings) -> Values:
    spec = index.spec.to_dict()
    tables = {}
    for name in ("label", "site", "organ"):
        if name in points.codes:
            count, patients = points.count(name), points.clusters(name)
            tables[name] = [
                {"value": value, "n": many, "patients": patients[value]}
                for value, many in count.most_common(MOST_LABELS)
            ]
    return {
        "points": points.total,
        "labelled": len(points),
        "slides": len(points.names["slide"]),
        "patients": len(points.names["patient"]),
        "queries": len(drawn_rows(len(points), settings)),
        "fields": dict(points.fields),
        "k": max(settings.ks),
        "spec": {name: spec[name] for name in ("encoder", "weights_sha256", "mpp", "tile_px", "dim", "quantise")},
        "by": tables,
    }


def _examples(found: Found, settings: EvaluationSettings) -> list[Values]:
    """Return some queries drawn at random, as many of each frequent label, with their hits."""
    rng = np.random.default_rng(settings.seed)
    label = found.own("label")
    frequent = np.argsort(-np.bincount(label), kind="stable")[:4]
    each = SHOWN // min(len(frequent), len(np.unique(label)))
    chosen = [rng.permutation(np.flatnonzero(label == code))[:each] for code in frequent]
    columns = [name for name in ("label", "site", "slide") if name in found.points.codes]

    def about(row: int) -> Values:
        texts = {name: found.points.names[name][int(found.points.codes[name][row])] for name in columns}
        return {"id": int(found.points.ids[row]), **texts}

    return [
        {"query": about(int(found.rows[at])), "hits": [about(row) for row in found.near[at].tolist() if row != NONE]}
        for at in np.concatenate(chosen).tolist()
    ]


def _remarks(sections: Values, settings: EvaluationSettings) -> tuple[Remark, ...]:
    """Return what a reader must know before believing the numbers, warnings first."""
    data, tiles, k = sections["data"], sections["tiles"], str(max(settings.ks))
    patient, itself = tiles["patient"], tiles[ITSELF]
    label = patient["neighbours"]["label"][k]
    found: list[Remark] = []

    def say(kind: str, severity: Any, message: str) -> None:
        found.append(Remark(kind=kind, severity=severity, message=message))

    if label["lift"]["low"] is not None and label["lift"]["low"] <= 1:
        say(
            "blind",
            "warning",
            "Neighbours of other patients do not share the label more often than by chance: "
            f"{label['share']['point']:.3f} of the first {k}, {label['chance']:.3f} by chance. This index does not "
            f"find {data['fields']['label']}.",
        )
    site = patient["neighbours"].get("site", {}).get(k)
    if site and site["lift_among_labels"]["low"] is not None and site["lift_among_labels"]["low"] > 1:
        say(
            "site",
            "warning",
            f"Neighbours of other patients come from the query's own {data['fields']['site']} "
            f"{site['lift_among_labels']['point']:.1f} times as often as their labels explain "
            f"({site['share']['point']:.3f} of the first {k}, {site['chance_among_labels']:.3f} expected): the search "
            "sees the site. Search other sites (--filter) before believing that cases are alike.",
        )
    slide = itself["neighbours"]["slide"][k]
    if slide["chance"] is not None:
        say(
            "slide",
            "note",
            f"With nothing left out, {slide['share']['point']:.3f} of the first {k} neighbours lie on the query's own "
            f"slide ({slide['chance']:.3f} by chance). eosin leaves the query's patient out unless told otherwise.",
        )
    if data["queries"] < data["labelled"]:
        say(
            "sample", "note", f"{data['queries']} of {data['labelled']} labelled tiles were asked for, drawn at random."
        )
    lost = patient["queries"] - patient["answerable"]
    if lost:
        say(
            "unanswerable",
            "note",
            f"{lost} of {patient['queries']} tiles have a label that no other patient has; they cannot be answered and "
            "are left out of the measures of labels.",
        )
    if data["labelled"] < data["points"]:
        say("unlabelled", "note", f"{data['points'] - data['labelled']} tiles have no label and were not searched.")
    return tuple(sorted(found, key=lambda one: one.severity != "warning"))


def _write(report: Report, out: Path, pictures: Mapping[int, Path] | None, run: Values) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / "report.json", report.to_json().encode())
    write_durably(out / "report.html", evaluation_page(report, pictures or {}).encode())
    record = {
        "command": "evaluate_search",
        "started": run["started"],
        "seconds": round(time.perf_counter() - run["clock"], 3),
        "files": ["report.html", "report.json"],
        **report.provenance,
    }
    write_durably(out / "run.json", orjson.dumps(record, option=orjson.OPT_INDENT_2))
