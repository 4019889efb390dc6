"""Find what is like some examples: exclusions, filters, diversity, and what the hits are to be measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError, closest
from eosin.retrieval.examples import Example
from eosin.retrieval.filters import All, Filter, Is, Not, check_filter, leaves, mask
from eosin.retrieval.inputs import check_k, mmr_order, mmr_pool, recommended, unit_queries
from eosin.retrieval.protocol import Floats, Hits, Ids, IndexSpec, VectorIndex

SAMPLE = 1024
"""Tiles drawn to say how alike any two tiles of the index are."""
IDENTICAL = 0.9999
"""Cosine from which a hit counts as the same picture."""
ROUNDING = 1e-6
"""Difference of two float32 cosines that means nothing."""
BLOCK = 64
"""Queries sent to the engine at once."""
MIXES = ("label", "site", "scanner", "organ", "stain")
"""Fields of which a result says how often each value occurs among what was searched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How to search.

    Attributes:
        k: hits wanted.
        where: what a hit must satisfy; None for anything.
        same_slide: whether tiles of the examples' own slides may be hits.
        same_patient: whether tiles of other slides of their patients may be hits.
        mmr: weight of likeness to the query against likeness among the hits, 0 to 1; None for likeness alone.
        merge: "mean" looks for the mean of the examples' tiles; "best" lets each tile ask for itself, and a hit has the
            score of the tile it is most like.
        exact: compare with every tile instead of walking the engine's graph.
    """

    k: int = 10
    where: Filter | None = None
    same_slide: bool = False
    same_patient: bool = False
    mmr: float | None = None
    merge: Literal["mean", "best"] = "mean"
    exact: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Searched:
    """How many tiles could be hits; each tile is counted under the first reason that left it out.

    Attributes:
        total: tiles of the index.
        own: tiles of the examples' slides, unless these may be hits; the examples' and counter-examples' own tiles
            never may.
        patient: tiles of other slides of the same patients, unless these may be hits.
        filtered: tiles that the filter left out of what remained.
        left: tiles that were searched.
    """

    total: int
    own: int
    patient: int
    filtered: int
    left: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SearchResult:
    """Hits, and what is needed to judge them.

    Attributes:
        examples: what was looked for.
        against: what was to be avoided.
        settings: how.
        spec: of the index.
        hits: best first; fewer than wanted where no more were left. Vectors are included.
        matched: (k,) with ``merge="best"``: which tile of the examples, in their order, each hit is like; else None.
        searched: how many tiles could be hits.
        chance: cosines of tiles drawn from what was searched, float32 (m,), ascending: what any tile would score.
        base: field -> value -> tiles among what was searched.
        notes: what a reader must know, in sentences.
    """

    examples: tuple[Example, ...]
    against: tuple[Example, ...]
    settings: SearchSettings
    spec: IndexSpec
    hits: Hits
    matched: npt.NDArray[np.int64] | None
    searched: Searched
    chance: Floats
    base: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of hits."""
        return len(self.hits.ids)

    def rarity(self) -> npt.NDArray[np.float64]:
        """Return the share of drawn tiles that score at least as high as each hit, (k,); NaN when none was drawn."""
        if not len(self.chance):
            return np.full(len(self), np.nan)
        below = np.searchsorted(self.chance, self.hits.score - ROUNDING, side="left")
        return 1 - below / len(self.chance)

    def mix(self, column: str) -> dict[str, int]:
        """Return value -> hits that have it, most frequent first."""
        values = [str(value) for value in self.hits.payload[column].tolist()]
        return dict(sorted(((v, values.count(v)) for v in set(values)), key=lambda pair: (-pair[1], pair[0])))


def search(
    index: VectorIndex,
    examples: Sequence[Example],
    *,
    against: Sequence[Example] = (),
    settings: SearchSettings | None = None,
) -> SearchResult:
    """Return the tiles of an index that are most like the examples.

    Several examples count alike, whatever their number of tiles: the query is the mean p of their means, and with
    counter-examples of mean m it is ``p + (p - m)`` (the average-vector strategy of Rocchio, in: The SMART Retrieval
    System, 1971, 313, with both weights 1). The examples' slides and patients are left out, as the settings say; those
    of counter-examples are not.

    Args:
        index: where to look.
        examples: what to look for, at least one.
        against: what hits should be unlike.
        settings: see `SearchSettings`.

    Raises:
        QueryError: nothing to look for, an unknown field, or settings that contradict each other.
        NonFiniteError: a vector with NaN or infinity.
    """
    settings = settings or SearchSettings()
    _check(examples, against, settings, index.spec)
    loose = (*examples, *against) if settings.same_slide else against  # what the filter does not leave out anyhow
    own = np.unique(np.concatenate([np.empty(0, np.uint64), *(one.ids for one in loose)]))
    where, searched, passing = _scope(index, settings, examples, own)
    queries = _queries(examples, against, settings, index.spec)
    hits, matched = _hits(index, queries, settings, where=where, own=own, passing=passing)
    drawn = _drawn(index, where, own)
    chance = (drawn @ queries.T).max(axis=1) if len(drawn) else np.empty(0, dtype=np.float32)
    fields = [name for name in MIXES if index.spec.fields.get(name) == "keyword"]
    result = SearchResult(
        examples=tuple(examples),
        against=tuple(against),
        settings=settings,
        spec=index.spec,
        hits=hits,
        matched=matched if settings.merge == "best" else None,
        searched=searched,
        chance=np.sort(chance),
        base={name: index.facet(name, where) for name in fields},
    )
    return replace(result, notes=_notes(index, result))


def _check(examples: Sequence[Example], against: Sequence[Example], settings: SearchSettings, spec: IndexSpec) -> None:
    if not examples:
        raise QueryError("nothing to look for; give at least one tile, region, annotation, slide or image")
    check_k(settings.k)
    if settings.mmr is not None and not 0 <= settings.mmr <= 1:
        raise QueryError(f"mmr is {settings.mmr:g}; it is the weight of likeness to the query, from 0 to 1")
    if settings.merge not in ("mean", "best"):
        raise QueryError(f"unknown merge {settings.merge!r}; one of mean, best")
    if settings.merge == "best" and against:
        raise QueryError("counter-examples move the mean of the examples; use them with the merge 'mean'")
    if settings.where is not None:
        check_filter(settings.where, spec.fields)
    for one in (*examples, *against):
        unit_queries(one.vectors, spec)  # refuses another length, NaN and zeros


def _scope(
    index: VectorIndex, settings: SearchSettings, examples: Sequence[Example], own: Ids
) -> tuple[Filter | None, Searched, int]:
    """Return the filter that hits must pass, how many tiles each part of it leaves out, and how many of `own` pass."""
    slides = tuple(sorted({one.slide_id for one in examples if one.slide_id is not None}))
    patients = tuple(sorted({name for one in examples for name in one.about.get("patient_id", ())}))
    parts: list[Filter] = []
    left = [index.count()]

    def leave_out(part: Filter | None) -> None:
        if part is not None:
            parts.append(part)
        left.append(left[-1] if part is None else index.count(All(tuple(parts))))

    on_slides, of_patients = Is("slide_id", slides), Is("patient_id", patients)
    elsewhere = All((of_patients, Not(on_slides)))  # where the slides may be hits, the patients' other slides may not
    leave_out(Not(on_slides) if slides and not settings.same_slide else None)
    leave_out(Not(elsewhere) if patients and not settings.same_patient else None)
    leave_out(settings.where)
    where = All(tuple(parts)) if parts else None
    slide, patient, filtered = (before - after for before, after in pairwise(left))
    passing = len(own)
    if len(own) and where is not None:
        passing = int(mask(where, index.retrieve(own).payload).sum())
    searched = Searched(total=left[0], own=slide + passing, patient=patient, filtered=filtered, left=left[-1] - passing)
    return where, searched, passing


def _queries(
    examples: Sequence[Example], against: Sequence[Example], settings: SearchSettings, spec: IndexSpec
) -> Floats:
    """Return what the engine is asked, (q, dim)."""
    if settings.merge == "best":
        return unit_queries(np.concatenate([one.vectors for one in examples]), spec)
    means = [np.stack([one.mean for one in part]) for part in (examples, against) if part]
    return recommended(means[0], means[1] if against else None, spec)


def _hits(
    index: VectorIndex, queries: Floats, settings: SearchSettings, *, where: Filter | None, own: Ids, passing: int
) -> tuple[Hits, npt.NDArray[np.int64]]:
    """Return the hits with vectors, and for each the query it is most like."""
    pool = settings.k if settings.mmr is None else mmr_pool(settings.k)
    asked = pool + passing  # the engine still finds the examples' own tiles; they are taken out below
    best: dict[int, tuple[float, int]] = {}
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        for row, found in enumerate(index.search(block, k=asked, where=where, exact=settings.exact), start=start):
            for one, score in zip(found.ids.tolist(), found.score.tolist(), strict=True):
                if one not in best or score > best[one][0]:
                    best[one] = (score, row)
    for one in own.tolist():
        best.pop(one, None)
    ranked = sorted(best, key=lambda one: (-best[one][0], one))[:pool]
    hits = index.retrieve(np.array(ranked, dtype=np.uint64))
    score = np.array([best[one][0] for one in hits.ids.tolist()], dtype=np.float32)
    hits = replace(hits, score=score, wanted=settings.k)
    if settings.mmr is not None and len(hits):
        assert hits.vectors is not None  # retrieve gives vectors
        hits = hits.take(mmr_order(hits.score, hits.vectors, settings.k, settings.mmr))
    return hits, np.array([best[one][1] for one in hits.ids.tolist()], dtype=np.int64)


def _drawn(index: VectorIndex, where: Filter | None, own: Ids) -> Floats:
    """Return up to `SAMPLE` tiles of what is searched; ids are hashes, so the lowest ones are a random draw."""
    first = next(index.scroll(where=where, batch=SAMPLE), None)
    if first is None or first.vectors is None:
        return np.empty((0, index.spec.dim), dtype=np.float32)
    return first.vectors[~np.isin(first.ids, own)].astype(np.float32, copy=False)


def _notes(index: VectorIndex, result: SearchResult) -> tuple[str, ...]:
    """Return what a reader must know before believing the hits."""
    settings, searched, hits = result.settings, result.searched, result.hits
    notes = []
    if hits.lacking:
        notes.append(
            f"Not enough to search: {settings.k} hits were wanted and {len(hits)} found, for {searched.left} of "
            f"{searched.total} tiles were left ({searched.own} are of the query's own slides, {searched.patient} more "
            f"of its patients, {searched.filtered} fail the filter)."
        )
        if settings.where is not None and not searched.left:
            notes += _missing_values(index, settings.where)
    if not settings.same_patient:
        notes += _patients(index, result.examples)
    alike = int((hits.score >= IDENTICAL).sum())
    if alike:
        notes.append(
            f"{alike} of {len(hits)} hits are all but identical to the query (cosine {IDENTICAL} or more): a copy of "
            "the slide under another name, or a case in the index twice?"
        )
    return tuple(notes)


def _patients(index: VectorIndex, examples: Sequence[Example]) -> list[str]:
    """Say where patients are not known, so that other slides of the same patient may be among the hits."""
    unknown = [one.name for one in examples if not one.about.get("patient_id")]
    if unknown:
        return [
            f"The patient of {' and of '.join(unknown)} is not known: other slides of that patient were not left out. "
            "If they are in the index, leave them out by a filter on patient_id or slide_id."
        ]
    if "patient_id" in index.spec.fields and index.facet("patient_id").keys() == index.facet("slide_id").keys():
        return [
            "The index counts each slide as a patient: other slides of the query's patient were not left out. Name the "
            "patients by making the index with --cohort."
        ]
    return []


def _missing_values(index: VectorIndex, where: Filter) -> list[str]:
    """Name the values a filter asks for that no tile has; most are misspelt."""
    notes = []
    for leaf in leaves(where):
        if isinstance(leaf, Is) and index.spec.fields.get(leaf.field) == "keyword":
            known = index.facet(leaf.field)
            lost = [str(value) for value in leaf.values if str(value) not in known]
            notes += [
                f"No tile has {leaf.field} {value!r}; the closest are: {closest(value, known)}." for value in lost
            ]
    return notes
