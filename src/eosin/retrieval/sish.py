"""Search in time that does not grow with the number stored: keys, a bounded walk, cosines, a ranking of slides.

The idea is that of SISH (Chen et al., Nature Biomedical Engineering 2022): give every tile an integer, keep these
sorted, and look only at a fixed number of predecessors and successors of the query's. What it is made of is our own:
keys are learned from the features themselves (`codes`), the walk goes where the keys promise most (`walk`), candidates
are compared by cosine, and slides are ranked by `ranking.entropy_vote`.

Per query: one product with the centres, one comparison with at most 65,536 cells, `probes` binary searches, `budget`
keys and vectors. Only the binary searches know how many are stored, by its logarithm. Vectors lie in the order of their
keys, so that a walk reads them in runs. What is given up is the promise that the nearest are found:
`benchmarks/sish.py` measures how often they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError
from eosin.retrieval.codes import Codebook, encode, fit_codebook, likeness, occupied_cells, probes
from eosin.retrieval.filters import Filter, check_filter, evaluate, mask
from eosin.retrieval.inputs import check_k, check_points, unit_queries
from eosin.retrieval.protocol import Floats, Hits, Ids, IndexSpec, Payload, VectorIndex, Vectors
from eosin.retrieval.ranking import Bags, entropy_vote
from eosin.retrieval.walk import Keys, Places, guided_walk

BAG = 50
"""Hits that are asked for each tile of a slide."""
PATIENCE = 4
"""Entries looked at for each candidate wanted, at most, where a filter leaves some out."""
_BLOCK = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class SishSettings:
    """How far a query looks. None of it grows with the number stored.

    Attributes:
        budget: candidates of a query: entries compared with it by cosine.
        probes: cells from which walks start.
    """

    budget: int = 2000
    probes: int = 64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SishIndex:
    """Tiles in the order of their keys. Made by `build_sish`, kept on disk by `save_sish`.

    Attributes:
        spec: what the vectors are.
        codebook: from vectors to keys.
        keys: int64 (n,), ascending; the arrays below are in their order, equal keys by id.
        vectors: float32 (n, dim) of length 1; may be memory-mapped.
        ids: uint64 (n,).
        columns: payload, each (n,); a keyword is a number into its names.
        names: texts of each keyword field, object (m,), sorted.
        occupied: (K * K,), cells in which anything is stored.
    """

    spec: IndexSpec
    codebook: Codebook
    keys: Keys
    vectors: Floats
    ids: Ids
    columns: dict[str, npt.NDArray[Any]]
    names: dict[str, npt.NDArray[np.object_]]
    occupied: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.keys)

    def payload(self, places: Places | slice, fields: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
        """Return some fields of the payload of entries by place, keywords as text."""
        rows = {name: self.columns[name][places] for name in fields}
        return {name: self.names[name][column] if name in self.names else column for name, column in rows.items()}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SishFound:
    """What one query found.

    Attributes:
        hits: best first, of the candidates only.
        candidates: entries that passed the filter and were compared by cosine.
        examined: entries the walks looked at: as many, or more where a filter left some out.
    """

    hits: Hits
    candidates: int
    examined: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SishSlides:
    """Slides like the query's, best first.

    Attributes:
        slide: (r,) slide ids.
        entropy: (r,) bits, of the labels around the match that put the slide here; 0: all agree.
        score: (r,) cosine similarity of that match.
        tile: (r,) the query's tile of the match.
        hit: uint64 (r,), the stored tile of the match.
        candidates: (m,) candidates of each of the query's tiles.
    """

    slide: npt.NDArray[np.object_]
    entropy: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    tile: npt.NDArray[np.int64]
    hit: Ids
    candidates: npt.NDArray[np.int64]


def build_sish(
    ids: Ids, vectors: Vectors, payload: Payload, spec: IndexSpec, *, cells: int = 256, seed: int = 0
) -> SishIndex:
    """Learn codes from vectors and sort the vectors by them; all is held in memory, vectors twice for a moment.

    Args:
        ids: uint64 (n,), each once; n >= 1.
        vectors: float32 or float16 (n, dim), any length but 0.
        payload: exactly the spec's fields, each (n,).
        spec: what the vectors are.
        cells: centres a level (`codes.fit_codebook`).
        seed: of the centres. The same points give the same index, in any order they come.

    Raises:
        IndexMismatchError: vectors of another length than the spec says.
        NonFiniteError: NaN, infinity or zero vectors.
        QueryError: no points, ids that come twice, a payload that does not fit.
    """
    ids, vectors, columns = check_points(ids, vectors, payload, spec)
    if not len(ids):
        raise QueryError("no points to index; give at least one")
    by_id = np.argsort(ids)
    unit = _unit(vectors, by_id)
    codebook = fit_codebook(unit, cells=cells, seed=seed)
    keys = encode(unit, codebook)
    order = np.argsort(keys, kind="stable")
    unit, keys, rows = unit[order], keys[order], by_id[order]
    names = {}
    for name, kind in spec.fields.items():
        columns[name] = columns[name][rows]
        if kind == "keyword":
            found, codes = np.unique(columns[name], return_inverse=True)
            names[name], columns[name] = found.astype(object), codes.astype(np.int32)
    return SishIndex(
        spec=spec,
        codebook=codebook,
        keys=keys,
        vectors=unit,
        ids=ids[rows],
        columns=columns,
        names=names,
        occupied=occupied_cells(keys, codebook),
    )


def sish_of(index: VectorIndex, *, where: Filter | None = None, cells: int = 256, seed: int = 0) -> SishIndex:
    """Build from the points of another index that the filter holds for; arguments and errors as `build_sish`."""
    parts = list(index.scroll(where=where))
    if not parts:
        raise QueryError("no points to index: the other index is empty, or its points do not pass the filter")
    payload = {name: np.concatenate([part.payload[name] for part in parts]) for name in index.spec.fields}
    vectors = np.concatenate([part.vectors for part in parts if part.vectors is not None])
    ids = np.concatenate([part.ids for part in parts])
    return build_sish(ids, vectors, payload, index.spec, cells=cells, seed=seed)


def search_sish(
    index: SishIndex,
    queries: Vectors,
    *,
    k: int = 10,
    where: Filter | None = None,
    settings: SishSettings | None = None,
) -> list[SishFound]:
    """Return for each query the best `k` of its candidates by cosine similarity.

    Args:
        index: what to search.
        queries: (q, dim), any length but 0.
        k: hits wanted.
        where: filter, asked of each entry a walk meets. Candidates that do not pass are replaced by walking on, up to
            `PATIENCE` entries looked at for each candidate of the budget: a filter that hardly anything passes ends in
            fewer than k hits, although more may be stored.
        settings: how far to look.

    Raises:
        IndexMismatchError: queries of another dimension.
        QueryError: NaN or zero queries, k or a setting below 1, a filter the fields cannot answer.
    """
    settings = _checked(settings or SishSettings())
    unit, k = unit_queries(queries, index.spec), check_k(k)
    if where is not None:
        check_filter(where, index.spec.fields)
    levels, cells, dim = index.codebook.centres.shape
    tables = (unit @ index.codebook.centres.reshape(-1, dim).T).reshape(-1, levels, cells)
    return [_search(index, *one, k, where, settings) for one in zip(unit, tables, strict=True)]


def similar_slides(
    index: SishIndex,
    tiles: Vectors,
    *,
    k: int = 5,
    where: Filter | None = None,
    settings: SishSettings | None = None,
) -> SishSlides:
    """Return up to `k` slides like the one `tiles` are the mosaic of, by `ranking.entropy_vote`.

    Each tile's `BAG` hits are a bag. Labels are weighed by how many entries of the whole index carry them.

    Args:
        index: with the fields slide_id and label.
        tiles: (m, dim), tiles that stand for the slide.
        k: slides wanted.
        where: filter, as in `search_sish`; leave out the query's own patient with ``Not(Is("patient_id", (name,)))``.
        settings: how far to look.

    Raises:
        QueryError: as `search_sish`; fields the index lacks; no hit at all, or none with a label.
    """
    lacking = [name for name in ("slide_id", "label") if name not in index.names]
    if lacking:
        raise QueryError(f"slides are ranked by the fields slide_id and label; the index lacks {', '.join(lacking)}")
    k = check_k(k)
    found = search_sish(index, tiles, k=BAG, where=where, settings=settings)
    bags, hits = _bags(index, found)
    label = index.names["label"]
    count = np.bincount(index.columns["label"], minlength=len(label))
    vote = entropy_vote(bags, count)
    slide, bag = vote.slide[:k], vote.bag[:k]
    place = (bags.slide[bag] == slide[:, None]).argmax(axis=1)
    return SishSlides(
        slide=index.names["slide_id"][slide],
        entropy=vote.entropy[:k],
        score=vote.score[:k],
        tile=bag,
        hit=hits[bag, place],
        candidates=np.array([one.candidates for one in found]),
    )


def _bags(index: SishIndex, found: list[SishFound]) -> tuple[Bags, Ids]:
    """Return the hits of each tile as codes (m, BAG), an empty label as `NONE`, and their ids (m, BAG)."""
    shape = (len(found), BAG)
    slide, label = np.full(shape, -1), np.full(shape, -1)
    score, ids = np.full(shape, -np.inf), np.zeros(shape, np.uint64)
    for row, one in enumerate(found):
        size = len(one.hits)
        text = one.hits.payload
        slide[row, :size] = np.searchsorted(index.names["slide_id"], text["slide_id"])
        known = np.searchsorted(index.names["label"], text["label"])
        label[row, :size] = np.where(text["label"] == "", -1, known)
        score[row, :size], ids[row, :size] = one.hits.score, one.hits.ids
    return Bags(slide=slide, score=score, label=label), ids


def _search(
    index: SishIndex, query: Floats, tables: Floats, k: int, where: Filter | None, settings: SishSettings
) -> SishFound:
    seeds, worth = probes(query, index.codebook, tables, index.occupied, settings.probes)
    walked = guided_walk(
        index.keys,
        seeds,
        worth,
        lambda block: float(likeness(index.keys[block], tables).mean()),
        budget=settings.budget,
        passes=None if where is None else _passes(index, where),
        limit=settings.budget * (1 if where is None else PATIENCE),
    )
    places = np.sort(walked.places)
    score = index.vectors[places] @ query
    best = np.lexsort((index.ids[places], -score))[:k]
    places = places[best]
    hits = Hits(
        ids=index.ids[places],
        score=score[best],
        payload=index.payload(places, index.columns),
        vectors=index.vectors[places],
        wanted=k,
    )
    return SishFound(hits=hits, candidates=len(walked.places), examined=walked.examined)


def _passes(index: SishIndex, where: Filter) -> Callable[[slice], npt.NDArray[np.bool_]]:
    """Return the function from a slice of places to which of them the filter holds for."""

    def passes(block: slice) -> npt.NDArray[np.bool_]:
        return evaluate(where, lambda leaf: mask(leaf, index.payload(block, [leaf.field])), block.stop - block.start)

    return passes


def _unit(vectors: Vectors, rows: npt.NDArray[np.int64]) -> Floats:
    """Return rows of `vectors` at length 1, block by block."""
    out = np.empty((len(rows), vectors.shape[1]), np.float32)
    for start in range(0, len(rows), _BLOCK):
        part = vectors[rows[start : start + _BLOCK]]
        lengths = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))
        out[start : start + _BLOCK] = part / lengths[:, None]
    return out


def _checked(settings: SishSettings) -> SishSettings:
    for name in ("budget", "probes"):
        if getattr(settings, name) < 1:
            raise QueryError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    return settings
