"""Find similar cases: slides whose tiles match those of a slide, with the pairs of tiles that are the evidence.

The query's tiles are reduced to a mosaic; each tile of it is looked up in the index; an aggregator of
`eosin.retrieval.ranking` turns the matches into a ranking of slides. A patient stands in it once, by the best slide,
and the query's own patient never.

What is found is evidence, not a diagnosis: independent studies of such rankings report wide differences between organs,
and subtypes that are never found (Lahr et al. 2024, arXiv:2401.03271). Measure yours with `evaluate_search`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError, closest
from eosin.retrieval.examples import Example
from eosin.retrieval.filters import All, Filter, Is, Not, check_filter
from eosin.retrieval.inputs import check_k
from eosin.retrieval.measures import NONE
from eosin.retrieval.mosaic import Mosaic, mosaic
from eosin.retrieval.protocol import Hits, VectorIndex
from eosin.retrieval.ranking import Bags, entropy_vote, mean_top_k, median_of_minima, upper_bounds
from eosin.retrieval.slide_vectors import SlideVectors, slide_vectors

Aggregator = Literal["median-of-minima", "entropy-vote", "mean-top-k", "slide-vector"]
Floats = npt.NDArray[np.float64]

AGGREGATORS: tuple[Aggregator, ...] = get_args(Aggregator)
UNLABELLED = "(no label)"


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseSettings:
    """How to look for cases.

    Attributes:
        aggregator: how matches of tiles rank slides; see `eosin.retrieval.ranking`. "slide-vector" compares the mean
            vectors of slides and looks at tiles for the evidence only.
        k: cases wanted.
        tiles: neighbours looked up for each tile of the mosaic.
        evidence: pairs of tiles shown of each case.
        top: tiles of the mosaic that "mean-top-k" averages.
        first_stage: slides that a first look at slide vectors keeps; None keeps all.
        most: slides at most that are compared in full.
        same_patient: whether other slides of the query's patient may be cases.
        where: what a tile must satisfy to be a match; None for anything.
        exact: compare with every tile instead of walking the engine's graph.
        seed: of the mosaic.
    """

    aggregator: Aggregator = "median-of-minima"
    k: int = 5
    tiles: int = 50
    evidence: int = 5
    top: int = 5
    first_stage: int | None = None
    most: int = 100
    same_patient: bool = False
    where: Filter | None = None
    exact: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TilePair:
    """A tile of the query beside the most similar tile of a case.

    Attributes:
        query_xy: level-0 corner of the query's tile, on the query's slide.
        covers: tiles of the query that it stands for.
        id: the case's tile in the index.
        xy: its level-0 corner, on the case's slide.
        score: cosine similarity.
    """

    query_xy: tuple[int, int]
    covers: int
    id: int
    xy: tuple[int, int]
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A slide like the query.

    Attributes:
        slide_id: the slide.
        patient_id: its patient, "" where the index does not say.
        label: its label, "" likewise.
        score: what the aggregator ranks by: a cosine similarity. With "entropy-vote" of the match that decided.
        entropy: in bits, of the labels around that match; None with other aggregators.
        pairs: its best matches, best first: the evidence.
        mix: label -> share of the neighbours, in the whole index, of the query's tiles in `pairs`. A case whose
            evidence is like anything has a mix like the index; one that is told apart has few labels.
    """

    slide_id: str
    patient_id: str
    label: str
    score: float
    entropy: float | None
    pairs: tuple[TilePair, ...]
    mix: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """Cases, best first, and what is needed to judge them.

    Attributes:
        query: what was looked for, in words.
        tiles: tiles of its mosaic.
        cases: best first.
        settings: how.
        candidates: slides that could have been found.
        compared: slides that were compared in full.
        proven: whether no other slide can score higher, if the engine's neighbours are the true ones; None for
            "entropy-vote", which compares slides by their nearest tiles alone. Slides that a first stage left out may
            always score higher. Where this is not True, `notes` says so.
        mix: label -> share of the neighbours of all tiles of the mosaic.
        base: label -> share of the tiles that could have been found: what `mix` would be by chance.
        notes: what a reader must know, in sentences.
    """

    query: str
    tiles: int
    cases: tuple[Case, ...]
    settings: CaseSettings
    candidates: int
    compared: int
    proven: bool | None
    mix: Mapping[str, float]
    base: Mapping[str, float]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the filter is left to who knows its words."""
        values = asdict(self)
        values["settings"].pop("where")
        return values


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Slides:
    """Slides met so far, and what the payload says of them."""

    code: dict[str, int]
    patient: list[str]
    label: list[str]

    def add(self, hits: Hits) -> npt.NDArray[np.int64]:
        """Return the code (k,) of each hit's slide."""
        blank = [""] * len(hits)
        columns = [hits.payload[name].tolist() if name in hits.payload else blank for name in ("patient_id", "label")]
        codes = []
        for slide, patient, label in zip(hits.payload["slide_id"].tolist(), *columns, strict=True):
            if slide not in self.code:
                self.code[slide] = len(self.code)
                self.patient.append(patient)
                self.label.append(label)
            codes.append(self.code[slide])
        return np.array(codes, np.int64)

    @property
    def names(self) -> list[str]:
        """Slides in the order of their codes."""
        return list(self.code)

    def once_a_case(self, codes: Sequence[int], k: int) -> list[int]:
        """Return the positions of the first slide of each patient, k at most; a slide without patient is its own."""
        seen: set[tuple[str, str]] = set()
        kept = []
        for at, code in enumerate(codes):
            case = (self.patient[code], "" if self.patient[code] else self.names[code])
            if case not in seen and len(kept) < k:
                seen.add(case)
                kept.append(at)
        return kept


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Look:
    """One look-up: the query's mosaic, where it was searched, and its neighbours.

    Attributes:
        index: where.
        settings: how.
        where: what a match must satisfy.
        vectors: of the mosaic (m, dim).
        xy: corners of its tiles (m, 2).
        covers: tiles each stands for (m,).
        bags: neighbours of each.
        labels: names of the labels in the bags.
        met: slides in the bags, by code.
    """

    index: VectorIndex
    settings: CaseSettings
    where: Filter
    vectors: npt.NDArray[np.float32]
    xy: npt.NDArray[np.int64]
    covers: npt.NDArray[np.int64]
    bags: Bags
    labels: Sequence[str]
    met: _Slides

    def matches(self, code: int) -> tuple[Floats, list[Hits]]:
        """Return the similarity (m,) of each tile to a slide's most similar tile, and these tiles, one a `Hits`."""
        inside = All((self.where, Is("slide_id", (self.met.names[code],))))
        hits = self.index.search(self.vectors, k=1, where=inside, exact=True)
        return np.array([one.score[0] if len(one) else np.nan for one in hits], np.float64), hits

    def mix(self, rows: npt.NDArray[np.integer] | slice) -> dict[str, float]:
        """Return label -> share of the neighbours of some tiles, most frequent first."""
        codes = self.bags.label[rows][self.bags.slide[rows] != NONE]
        counts = np.bincount(codes + 1, minlength=len(self.labels) + 1).tolist()
        return _shares({name: many for name, many in zip([UNLABELLED, *self.labels], counts, strict=True) if many})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ranked:
    """Slides by code, best first, with their scores; how many were compared, and whether all others are worse."""

    codes: Sequence[int]
    scores: Sequence[float]
    entropies: Sequence[float | None]
    compared: int
    proven: bool | None


def find_cases(
    index: VectorIndex,
    example: Example,
    settings: CaseSettings | None = None,
    *,
    chosen: Mosaic | None = None,
    slides: SlideVectors | None = None,
) -> CaseResult:
    """Return the cases most like an example, usually a whole slide (`eosin.retrieval.examples.whole_slide`).

    Args:
        index: where to look; its payload must hold slide_id, x and y.
        example: what to look for.
        settings: see `CaseSettings`.
        chosen: the example's mosaic; made here when None.
        slides: of the index (`slide_vectors`), for "slide-vector" and `first_stage`; made here when None, by one pass
            over all vectors.

    Raises:
        QueryError: unknown aggregator or field, k below 1, a vote without labels.
        IndexMismatchError: vectors of another length than the index.
    """
    settings = settings or CaseSettings()
    _check(index, settings)
    chosen = mosaic(example.vectors, example.xy, seed=settings.seed) if chosen is None else chosen
    where = _scope(example, settings)
    allowed = index.facet("slide_id", where)
    by_vector: dict[str, float] = {}
    if settings.aggregator == "slide-vector" or settings.first_stage is not None:
        slides = slide_vectors(index) if slides is None else slides
        by_vector = slides.nearest(example.mean, allowed)
    if settings.first_stage is not None:
        by_vector = dict(list(by_vector.items())[: settings.first_stage])
        where = All((where, Is("slide_id", tuple(by_vector))))
    look = _look(index, example, chosen, settings, where)
    count = index.facet("label", where) if "label" in index.spec.fields else {}
    if settings.aggregator == "slide-vector":
        ranked = _vector_ranking(look, by_vector)
    elif settings.aggregator == "entropy-vote":
        ranked = _vote_ranking(look, count)
    else:
        ranked = _tile_ranking(look)
        if len(by_vector) < len(allowed) and settings.first_stage is not None:
            ranked = replace(ranked, proven=False)
    return CaseResult(
        query=example.name,
        tiles=len(chosen),
        cases=tuple(_case(look, *one) for one in zip(ranked.codes, ranked.scores, ranked.entropies, strict=True)),
        settings=settings,
        candidates=len(allowed),
        compared=ranked.compared,
        proven=ranked.proven,
        mix=look.mix(slice(None)),
        base=_shares({name or UNLABELLED: tiles for name, tiles in count.items()}),
        notes=_notes(example, settings, ranked, len(allowed)),
    )


def _check(index: VectorIndex, settings: CaseSettings) -> None:
    if settings.aggregator not in AGGREGATORS:
        near = closest(settings.aggregator, AGGREGATORS)
        raise QueryError(f"unknown aggregator {settings.aggregator!r}; the closest are: {near}")
    for name in ("k", "tiles", "evidence", "top", "most", "first_stage"):
        if getattr(settings, name) is not None:
            check_k(getattr(settings, name))
    if settings.most < settings.k:
        raise QueryError(f"{settings.k} cases are wanted of at most {settings.most} slides compared; raise `most`")
    lacking = [name for name in ("slide_id", "x", "y") if name not in index.spec.fields]
    if lacking:
        raise QueryError(f"the index has no {' and no '.join(lacking)}: cases cannot be told apart in it")
    if settings.aggregator == "entropy-vote" and "label" not in index.spec.fields:
        raise QueryError(
            "the index has no labels to vote on; make it with --cohort and --label, or choose another aggregator"
        )
    if settings.where is not None:
        check_filter(settings.where, index.spec.fields)


def _scope(example: Example, settings: CaseSettings) -> Filter:
    """Return the filter that matches must pass: not the query's slide, not its patient, and the settings' own."""
    parts: list[Filter] = []
    if example.slide_id is not None:
        parts.append(Not(Is("slide_id", (example.slide_id,))))
    patients = tuple(sorted(name for name in example.about.get("patient_id", ()) if name))
    if patients and not settings.same_patient:
        parts.append(Not(Is("patient_id", patients)))
    if settings.where is not None:
        parts.append(settings.where)
    return All(tuple(parts))


def _look(index: VectorIndex, example: Example, chosen: Mosaic, settings: CaseSettings, where: Filter) -> _Look:
    """Return the neighbours of every tile of the mosaic."""
    vectors, names = example.vectors[chosen.rows], dict[str, int]()
    met = _Slides(code={}, patient=[], label=[])
    slide = np.full((len(vectors), settings.tiles), NONE, np.int64)
    score, label = np.zeros(slide.shape), slide.copy()
    for row, hits in enumerate(index.search(vectors, k=settings.tiles, where=where, exact=settings.exact)):
        slide[row, : len(hits)] = met.add(hits)
        score[row, : len(hits)] = hits.score
        if "label" in hits.payload:
            codes = [names.setdefault(one, len(names)) if one else NONE for one in hits.payload["label"].tolist()]
            label[row, : len(hits)] = codes
    return _Look(
        index=index,
        settings=settings,
        where=where,
        vectors=vectors,
        xy=example.xy[chosen.rows],
        covers=chosen.covers,
        bags=Bags(slide=slide, score=score, label=label),
        labels=list(names),
        met=met,
    )


def _vote_ranking(look: _Look, count: Mapping[str, int]) -> _Ranked:
    if not look.met.code:
        return _Ranked(codes=(), scores=(), entropies=(), compared=0, proven=None)
    vote = entropy_vote(look.bags, np.array([count[name] for name in look.labels]))
    codes, scores, entropies = vote.slide.tolist(), vote.score.tolist(), vote.entropy.tolist()
    kept = look.met.once_a_case(codes, look.settings.k)
    return _Ranked(
        codes=[codes[at] for at in kept],
        scores=[scores[at] for at in kept],
        entropies=[entropies[at] for at in kept],
        compared=len(codes),
        proven=None,
    )


def _vector_ranking(look: _Look, by_vector: Mapping[str, float]) -> _Ranked:
    names, codes, k = list(by_vector), list[int](), look.settings.k
    for name in names:  # best first, until there are enough cases; one tile of a slide tells its patient
        if name not in look.met.code:
            look.met.add(next(look.index.scroll(where=All((look.where, Is("slide_id", (name,)))), batch=1)))
        codes.append(look.met.code[name])
        if len(look.met.once_a_case(codes, k)) == k:
            break
    kept = look.met.once_a_case(codes, k)
    return _Ranked(
        codes=[codes[at] for at in kept],
        scores=[by_vector[names[at]] for at in kept],
        entropies=[None] * len(kept),
        compared=len(names),
        proven=True,
    )


def _tile_ranking(look: _Look) -> _Ranked:
    """Return slides by what their best tiles score; compare in full until no other can come before the k-th."""
    settings, met = look.settings, look.met
    aggregate: Callable[[Floats], Floats] = (
        median_of_minima if settings.aggregator == "median-of-minima" else partial(mean_top_k, k=settings.top)
    )
    bound, unseen = upper_bounds(look.bags, len(met.code), aggregate)
    score: dict[int, float] = {}
    ranked: list[int] = []
    kept: list[int] = []
    reached, following = -np.inf, -np.inf
    for code in np.argsort(-bound, kind="stable").tolist():
        following = bound[code]
        if reached >= following or len(score) == settings.most:
            break
        score[code] = float(aggregate(look.matches(code)[0][:, None])[0])
        following = -np.inf
        ranked = sorted(score, key=lambda one: (-score[one], met.names[one]))
        kept = met.once_a_case(ranked, settings.k)
        reached = score[ranked[kept[-1]]] if len(kept) == settings.k else -np.inf
    codes = [ranked[at] for at in kept]
    return _Ranked(
        codes=codes,
        scores=[score[code] for code in codes],
        entropies=[None] * len(codes),
        compared=len(score),
        proven=bool(reached >= max(following, unseen)),
    )


def _case(look: _Look, code: int, score: float, entropy: float | None) -> Case:
    """Return a ranked slide with its evidence."""
    best, hits = look.matches(code)
    rows = np.argsort(-best, kind="stable")[: look.settings.evidence]
    pairs = [
        TilePair(
            query_xy=(int(look.xy[row, 0]), int(look.xy[row, 1])),
            covers=int(look.covers[row]),
            id=int(hits[row].ids[0]),
            xy=(int(hits[row].payload["x"][0]), int(hits[row].payload["y"][0])),
            score=float(best[row]),
        )
        for row in rows.tolist()
    ]
    return Case(
        slide_id=look.met.names[code],
        patient_id=look.met.patient[code],
        label=look.met.label[code],
        score=score,
        entropy=entropy,
        pairs=tuple(pairs),
        mix=look.mix(rows),
    )


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return {name: count / total for name, count in ordered}


def _notes(example: Example, settings: CaseSettings, ranked: _Ranked, candidates: int) -> tuple[str, ...]:
    notes = []
    if len(ranked.codes) < settings.k:
        notes.append(
            f"Not enough cases: {settings.k} were wanted and {len(ranked.codes)} found; {candidates} slides were left "
            "after exclusions and the filter."
        )
    if not settings.same_patient and not example.about.get("patient_id"):
        notes.append(f"The patient of {example.name} is not known: other slides of that patient were not left out.")
    if ranked.proven is None and candidates:
        notes.append(
            f"The vote looks at the {settings.tiles} nearest tiles of each tile of the query, and cannot show that no "
            "other slide is more like it."
        )
    narrowed = settings.first_stage is not None and settings.first_stage < candidates
    if narrowed and settings.aggregator != "slide-vector":
        notes.append(
            f"Only the {settings.first_stage} of {candidates} slides whose mean vector is nearest were looked at; "
            "another one may score higher."
        )
    elif ranked.proven is False:
        notes.append(
            f"{ranked.compared} of {candidates} slides were compared in full; another one may score higher. Look up "
            f"more neighbours (now {settings.tiles}) or compare more slides (now at most {settings.most}) to be sure."
        )
    return tuple(notes)
