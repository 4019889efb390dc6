"""What an index holds, as codes in a fixed order, and what a search in it finds: the input of every measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError
from eosin.retrieval.cases import CaseSettings, find_cases
from eosin.retrieval.examples import indexed_tiles, whole_slide
from eosin.retrieval.filters import All, Filter, Is, Not
from eosin.retrieval.measures import NONE
from eosin.retrieval.mosaic import mosaic
from eosin.retrieval.protocol import VectorIndex
from eosin.retrieval.slide_vectors import SlideVectors

Codes = npt.NDArray[np.int64]

ITSELF = "itself"
EXCLUSIONS: Mapping[str, tuple[str, ...]] = {
    ITSELF: (ITSELF,),
    "patient": ("patient",),
    "site": ("patient", "site"),
}
"""What a query may not find: name -> columns it may not share with a hit."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Points:
    """Labelled points, in the order of slide and position, so that indexes of other encoders agree row by row.

    Attributes:
        ids: (n,) of the points; empty where a row is a slide.
        codes: column -> (n,) codes: label, patient, slide, and site and organ where they are known.
        names: column -> what the codes stand for.
        fields: column -> field of the index.
        total: points of the index, unlabelled ones included.
    """

    ids: npt.NDArray[np.uint64]
    codes: Mapping[str, Codes]
    names: Mapping[str, tuple[str, ...]]
    fields: Mapping[str, str]
    total: int

    def __len__(self) -> int:
        """Return n."""
        return len(self.codes["label"])

    def excluded(self, exclusion: str) -> list[Codes]:
        """Return the columns that a query may not share with a hit."""
        return [np.arange(len(self)) if name == ITSELF else self.codes[name] for name in EXCLUSIONS[exclusion]]

    def count(self, column: str) -> Counter[str]:
        """Return how many points carry each value."""
        return Counter([self.names[column][code] for code in self.codes[column].tolist()])

    def clusters(self, column: str) -> Counter[str]:
        """Return how many patients carry each value."""
        pairs = np.unique(np.stack([self.codes[column], self.codes["patient"]], axis=1), axis=0)
        return Counter([self.names[column][code] for code in pairs[:, 0].tolist()])


def read_points(index: VectorIndex, fields: Mapping[str, str]) -> Points:
    """Return the labelled points of an index, after one pass over it.

    Args:
        index: with keyword fields for what is asked.
        fields: column -> field; of these, site and organ are left out where some point has no value.

    Raises:
        QueryError: no field of labels, or fewer than two labels.
    """
    lacking = [fields[name] for name in ("label", "slide") if index.spec.fields.get(fields[name]) != "keyword"]
    if lacking:
        raise QueryError(
            f"the index has no field {lacking[0]!r} of text: make it with --cohort and --label, or name the field to "
            f"evaluate; it has {', '.join(index.spec.fields)}"
        )
    wanted = {name: field for name, field in fields.items() if index.spec.fields.get(field) == "keyword"}
    place = [name for name in ("x", "y") if name in index.spec.fields]
    parts = list(_columns(index, [*wanted.values(), *place]))
    ids = np.concatenate([part for part, _ in parts]) if parts else np.empty(0, np.uint64)
    found = {field: np.concatenate([part[field] for _, part in parts]) for field in (*wanted.values(), *place) if parts}
    total = len(ids)
    labelled = np.array([bool(value) for value in found.get(fields["label"], ())], bool)
    if len({value for value in found.get(fields["label"], ()) if value}) < 2:
        raise QueryError(
            f"the {total} points of the index have fewer than two different values of {fields['label']!r}; a search is "
            "judged by whether it tells labels apart"
        )
    text = {name: found[field].astype(str)[labelled] for name, field in wanted.items()}
    text.setdefault("patient", np.full(len(text["slide"]), ""))
    alone = text["patient"] == ""
    text["patient"] = np.where(alone, np.char.add("slide ", text["slide"]), np.char.add("patient ", text["patient"]))
    order = np.lexsort((ids[labelled], *(found[name][labelled] for name in place), text["slide"]))
    unique = {name: np.unique(column, return_inverse=True) for name, column in text.items() if _known(name, column)}
    return Points(
        ids=ids[labelled][order],
        codes={name: codes.astype(np.int64)[order] for name, (_, codes) in unique.items()},
        names={name: tuple(values.tolist()) for name, (values, _) in unique.items()},
        fields={name: fields[name] for name in unique if name in wanted},
        total=total,
    )


def by_slide(points: Points) -> Points | None:
    """Return the same with a row a slide, None where tiles of a slide differ in their label."""
    slides, first = np.unique(points.codes["slide"], return_index=True)
    label = points.codes["label"]
    if (label != label[first][points.codes["slide"]]).any():
        return None
    assert len(slides) == len(points.names["slide"])
    codes = {name: column[first] for name, column in points.codes.items()}
    return replace(points, ids=points.ids[:0], codes=codes)


def nearest_tiles(index: VectorIndex, points: Points, rows: Codes, exclusion: str, k: int, *, exact: bool) -> Codes:
    """Return the points (q, k) that the index finds for each query, best first; `NONE` where it finds fewer.

    Args:
        index: that `points` were read from.
        points: n rows.
        rows: (q,) the points that ask.
        exclusion: a key of `EXCLUSIONS`.
        k: hits a query.
        exact: compare with every point.
    """
    found = np.full((len(rows), k), NONE, np.int64)
    columns = EXCLUSIONS[exclusion]
    labelled = Not(Is(points.fields["label"], ("",)))
    order = np.argsort(points.ids)
    keys = np.stack([np.zeros(len(rows), np.int64) if c == ITSELF else points.codes[c][rows] for c in columns], axis=1)
    extra = int(exclusion == ITSELF)
    for key in np.unique(keys, axis=0):
        members = np.flatnonzero((keys == key).all(axis=1))
        where = All((labelled, *(_not(points, name, int(code)) for name, code in zip(columns, key, strict=True))))
        asked = points.ids[rows[members]]
        vectors = index.retrieve(asked).vectors
        assert vectors is not None  # retrieve gives vectors
        for row, own, hits in zip(
            members, asked, index.search(vectors, k=k + extra, where=where, exact=exact), strict=True
        ):
            ids = hits.ids[hits.ids != own][:k] if extra else hits.ids
            found[row, : len(ids)] = order[np.searchsorted(points.ids, ids, sorter=order)]
    return found


def nearest_cases(
    index: VectorIndex, slides: Points, rows: Codes, settings: CaseSettings, *, vectors: SlideVectors
) -> tuple[Codes, int]:
    """Return the slides (q, k) that are found for each slide, best first, and for how many that was proven.

    Args:
        index: that `slides` were read from.
        slides: of `by_slide`.
        rows: (q,) slides that ask.
        settings: of the search; only labelled slides are cases.
        vectors: of the slides.
    """
    found = np.full((len(rows), settings.k), NONE, np.int64)
    at = {name: row for row, name in enumerate(slides.names["slide"][code] for code in slides.codes["slide"].tolist())}
    settings = replace(settings, where=Not(Is(slides.fields["label"], ("",))))
    proven = 0
    for place, row in enumerate(rows.tolist()):
        name = slides.names["slide"][int(slides.codes["slide"][row])]
        example = whole_slide(indexed_tiles(index, name))
        chosen = mosaic(example.vectors, example.xy, seed=settings.seed)
        result = find_cases(index, example, settings, chosen=chosen, slides=vectors)
        found[place, : len(result.cases)] = [at[case.slide_id] for case in result.cases]
        proven += bool(result.proven)
    return found, proven


def _columns(
    index: VectorIndex, fields: Sequence[str]
) -> Iterator[tuple[npt.NDArray[np.uint64], dict[str, npt.NDArray[Any]]]]:
    for part in index.scroll(batch=8192):
        yield part.ids, {name: part.payload[name] for name in fields}


def _known(name: str, column: npt.NDArray[np.str_]) -> bool:
    """Return whether a column can be used: site and organ only where no point lacks them."""
    return name not in ("site", "organ") or bool((column != "").all())


def _not(points: Points, name: str, code: int) -> Filter:
    """Return the filter that leaves out what shares a code; nothing for the query itself, which is taken out later."""
    if name == ITSELF:
        return All(())
    value = points.names[name][code]
    if name == "patient":  # one without an id is known by the slide
        kind, _, value = value.partition(" ")
        name = kind
    return Not(Is(points.fields[name], (value,)))
