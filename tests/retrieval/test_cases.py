"""Similar cases: rankings against comparing with every tile of every slide."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from eosin.errors import QueryError
from eosin.retrieval.cases import AGGREGATORS, UNLABELLED, CaseSettings, find_cases
from eosin.retrieval.exact import ExactIndex
from eosin.retrieval.examples import indexed_tiles, tile_at, whole_slide
from eosin.retrieval.filters import Is
from eosin.retrieval.mosaic import mosaic
from eosin.retrieval.protocol import IndexSpec, VectorIndex, tile_ids
from eosin.retrieval.ranking import Bags, entropy_vote
from eosin.retrieval.slide_vectors import slide_vectors

DIM, TILES = 12, 40
FIELDS = {"slide_id": "keyword", "patient_id": "keyword", "label": "keyword", "site": "keyword"}
FIELDS |= {"x": "integer", "y": "integer"}


@dataclass(frozen=True, kw_only=True)
class World:
    """Slides of tiles in an index, and the same as plain arrays."""

    index: VectorIndex
    x: np.ndarray
    slide: np.ndarray
    patient: dict[str, str]
    label: dict[str, str]
    site: dict[str, str]


def made(folder: Path, *, slides: int = 24, seed: int = 0, fields: dict[str, Any] | None = None) -> World:
    """Three labels, each a mixture of five kinds of tissue; two slides a patient; the last slide has no label."""
    rng = np.random.default_rng(seed)
    kinds, mixture = rng.normal(size=(5, DIM)), rng.dirichlet(np.full(5, 0.5), size=3)
    spec = IndexSpec(dim=DIM, encoder="toy", weights_sha256="0", mpp=0.5, tile_px=224, fields=fields or FIELDS)
    index = ExactIndex.create(folder, spec)
    names, parts = [f"s{at:02d}" for at in range(slides)], []
    label = {name: "abc"[(at // 2) % 3] for at, name in enumerate(names)} | {names[-1]: ""}
    patient = {name: f"p{at // 2}" for at, name in enumerate(names)}
    site = {name: "AB"[at % 4 // 2] for at, name in enumerate(names)}
    for name in names:
        kind = rng.choice(5, TILES, p=mixture["abc".index(label[name] or "a")])
        x = (kinds[kind] + 0.6 * rng.normal(size=(TILES, DIM))).astype(np.float32)
        xy = np.stack([np.arange(TILES) % 8, np.arange(TILES) // 8], axis=1) * 224
        columns = {key: np.full(TILES, table[name], object) for key, table in
                   (("slide_id", dict(zip(names, names, strict=True))), ("patient_id", patient), ("label", label),
                    ("site", site))}  # fmt: skip
        payload = {**columns, "x": xy[:, 0], "y": xy[:, 1]}
        index.upsert(tile_ids(name, xy, spec), x, {key: payload[key] for key in spec.fields})
        parts.append(x)
    return World(index=index, x=np.stack(parts), slide=np.array(names), patient=patient, label=label, site=site)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = made(tmp_path_factory.mktemp("cases") / "index")
    yield found
    found.index.close()


def similarities(world: World, name: str) -> np.ndarray:
    """Similarity (m, S, TILES) of the mosaic of a slide to every tile of every slide."""
    example = whole_slide(indexed_tiles(world.index, name))
    chosen = mosaic(example.vectors, example.xy)
    flat = cosine_similarity(example.vectors[chosen.rows].astype(np.float64), world.x.reshape(-1, DIM))
    return flat.reshape(len(chosen), len(world.slide), TILES)


def expected(world: World, name: str, score: np.ndarray, k: int, *, others: bool = True) -> list[str]:
    """The best slide of each of the best k patients, by scores (S,), the own patient left out."""
    found: dict[str, str] = {}
    for at in np.argsort(-score, kind="stable"):
        slide = str(world.slide[at])
        own = world.patient[slide] == world.patient[name] if others else slide == name
        if not own:
            found.setdefault(world.patient[slide], slide)
    return list(found.values())[:k]


@pytest.mark.parametrize("name", ["s00", "s05", "s11", "s23"])
def test_median_of_minima_is_that_of_all_tiles(world: World, name: str) -> None:
    distance = 1 - similarities(world, name)
    score = 1 - np.median(distance.min(axis=2), axis=0)
    example = whole_slide(indexed_tiles(world.index, name))
    found = find_cases(world.index, example, CaseSettings(k=4))
    assert [case.slide_id for case in found.cases] == expected(world, name, score, 4)
    at = [world.slide.tolist().index(case.slide_id) for case in found.cases]
    np.testing.assert_allclose([case.score for case in found.cases], score[at], atol=1e-5)
    assert found.candidates == 22
    assert [case.label for case in found.cases] == [world.label[case.slide_id] for case in found.cases]
    assert [case.patient_id for case in found.cases] == [world.patient[case.slide_id] for case in found.cases]


def test_mean_top_k_is_that_of_all_tiles(world: World) -> None:
    best = similarities(world, "s03").max(axis=2)
    score = np.sort(best, axis=0)[-3:].mean(axis=0)
    example = whole_slide(indexed_tiles(world.index, "s03"))
    found = find_cases(world.index, example, CaseSettings(aggregator="mean-top-k", top=3))
    assert [case.slide_id for case in found.cases] == expected(world, "s03", score, 5)
    np.testing.assert_allclose(
        [case.score for case in found.cases],
        [score[world.slide.tolist().index(case.slide_id)] for case in found.cases],
        atol=1e-5,
    )


@pytest.mark.parametrize("aggregator", ["median-of-minima", "mean-top-k"])
def test_what_is_proven_is_true(world: World, aggregator: str) -> None:
    """Few neighbours leave it open whether another slide is better; where it says it is proven, it is."""
    seen = Counter()
    for name in world.slide[:12]:
        best = similarities(world, str(name)).max(axis=2)
        score = np.median(best, axis=0) if aggregator == "median-of-minima" else np.sort(best, 0)[-5:].mean(axis=0)
        example = whole_slide(indexed_tiles(world.index, str(name)))
        for tiles in (3, 20, 900):
            settings = CaseSettings(aggregator=aggregator, tiles=tiles, k=2)
            found = find_cases(world.index, example, settings)
            seen[tiles, found.proven] += 1
            if found.proven:
                assert [case.slide_id for case in found.cases] == expected(world, str(name), score, 2)
            else:
                assert "another one may score higher" in found.notes[-1]
            assert found.compared <= found.candidates
    assert seen[900, True] == 12  # every tile of every slide is a neighbour
    assert seen[3, False] > seen[20, False]


def test_fewer_slides_are_compared_than_there_are(world: World) -> None:
    example = whole_slide(indexed_tiles(world.index, "s00"))
    found = find_cases(world.index, example, CaseSettings(k=1, tiles=300))
    assert found.proven
    assert found.compared < found.candidates
    capped = find_cases(world.index, example, CaseSettings(k=3, most=3, tiles=3))
    assert capped.compared == 3
    assert not capped.proven


def test_slide_vectors_are_means(world: World) -> None:
    slides = slide_vectors(world.index)
    unit = world.x / np.linalg.norm(world.x, axis=2, keepdims=True)
    mean = unit.mean(axis=1)
    np.testing.assert_allclose(slides.vectors, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    assert slides.slide_id == tuple(world.slide)
    assert slides.tiles.tolist() == [TILES] * 24
    score = cosine_similarity(mean)[7]
    example = whole_slide(indexed_tiles(world.index, "s07"))
    for given in (slides, None):
        found = find_cases(world.index, example, CaseSettings(aggregator="slide-vector"), slides=given)
        assert [case.slide_id for case in found.cases] == expected(world, "s07", score, 5)
        assert found.proven
    assert all(len(case.pairs) == 5 for case in found.cases)


def test_a_first_stage_narrows_the_search(world: World) -> None:
    unit = world.x / np.linalg.norm(world.x, axis=2, keepdims=True)
    by_mean = cosine_similarity(unit.mean(axis=1))[4]
    by_mean[[4, 5]] = -2  # the patient's own slides
    kept = np.argsort(-by_mean)[:6]
    score = np.full(24, -np.inf)
    score[kept] = np.median(similarities(world, "s04").max(axis=2), axis=0)[kept]
    example = whole_slide(indexed_tiles(world.index, "s04"))
    found = find_cases(world.index, example, CaseSettings(first_stage=6, k=3, tiles=300))
    assert [case.slide_id for case in found.cases] == expected(world, "s04", score, 3)
    assert found.proven is False
    assert found.notes[-1].startswith("Only the 6 of 22 slides whose mean vector is nearest were looked at; another")
    assert find_cases(world.index, example, CaseSettings(first_stage=22, k=3, tiles=900)).proven
    by_vector = find_cases(world.index, example, CaseSettings(first_stage=6, k=3, aggregator="slide-vector"))
    assert by_vector.proven
    assert by_vector.notes == ()


def test_the_vote_is_that_of_the_nearest_tiles(world: World) -> None:
    name, tiles = "s02", 30
    similarity = similarities(world, name)
    similarity[:, [2, 3]] = -2
    flat = similarity.reshape(len(similarity), -1)
    order = np.argsort(-flat, axis=1)[:, :tiles]
    slide = order // TILES
    label = np.array(["abc".find(world.label[str(one)] or "-") for one in world.slide])
    bags = Bags(slide=slide, score=np.take_along_axis(flat, order, 1), label=label[slide])
    count = np.bincount(label[np.setdiff1d(np.arange(23), [2, 3])], minlength=3) * TILES
    vote = entropy_vote(bags, count)
    score = np.full(24, -np.inf)
    score[vote.slide] = -np.arange(len(vote.slide))
    example = whole_slide(indexed_tiles(world.index, name))
    found = find_cases(world.index, example, CaseSettings(aggregator="entropy-vote", tiles=tiles, k=3))
    assert [case.slide_id for case in found.cases] == expected(world, name, score, 3)[: len(found.cases)]
    assert found.proven is None
    assert "cannot show that no other slide is more like it" in found.notes[-1]
    entropy = {str(world.slide[at]): value for at, value in zip(vote.slide, vote.entropy, strict=True)}
    for case in found.cases:
        assert case.entropy == pytest.approx(entropy[case.slide_id])


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_evidence_is_the_best_pairs_and_the_mix_is_of_their_neighbours(world: World, aggregator: str) -> None:
    name, tiles = "s06", 25
    similarity = similarities(world, name)
    example = whole_slide(indexed_tiles(world.index, name))
    chosen = mosaic(example.vectors, example.xy)
    settings = CaseSettings(aggregator=aggregator, tiles=tiles, evidence=3, k=2)
    found = find_cases(world.index, example, settings, chosen=chosen)
    others = similarity.copy()
    others[:, [6, 7]] = -2
    near = np.argsort(-others.reshape(len(chosen), -1), axis=1)[:, :tiles] // TILES
    labels = np.array([world.label[str(one)] or UNLABELLED for one in world.slide])[near]
    assert found.mix == pytest.approx({k: v / labels.size for k, v in Counter(labels.ravel().tolist()).items()})
    assert sum(found.base.values()) == pytest.approx(1)
    for case in found.cases:
        best = similarity[:, world.slide.tolist().index(case.slide_id)]
        rows = np.argsort(-best.max(axis=1), kind="stable")[:3]
        np.testing.assert_allclose([pair.score for pair in case.pairs], best.max(axis=1)[rows], atol=1e-5)
        for row, pair in zip(rows, case.pairs, strict=True):
            assert pair.query_xy == tuple(example.xy[chosen.rows[row]])
            assert pair.covers == chosen.covers[row]
            tile = int(best[row].argmax())
            assert pair.xy == (tile % 8 * 224, tile // 8 * 224)
            assert world.index.retrieve(np.array([pair.id], np.uint64)).payload["slide_id"][0] == case.slide_id
        mine = Counter(labels[rows].ravel().tolist())
        assert case.mix == pytest.approx({k: v / (3 * tiles) for k, v in mine.items()})


def test_a_patient_stands_once_and_never_looks_at_itself(world: World) -> None:
    for name in ("s00", "s01", "s13"):
        example = whole_slide(indexed_tiles(world.index, name))
        found = find_cases(world.index, example, CaseSettings(k=50))
        patients = [case.patient_id for case in found.cases]
        assert len(set(patients)) == len(patients) == 11
        assert world.patient[name] not in patients
        assert "Not enough cases: 50 were wanted and 11 found; 22 slides were left" in found.notes[0]
        with_own = find_cases(world.index, example, CaseSettings(k=50, same_patient=True))
        own = [case for case in with_own.cases if case.patient_id == world.patient[name]]
        assert len(own) == 1
        assert own[0].slide_id != name


def test_a_filter_holds_for_evidence_too(world: World) -> None:
    example = whole_slide(indexed_tiles(world.index, "s08"))
    for aggregator in AGGREGATORS:
        settings = CaseSettings(aggregator=aggregator, where=Is("site", ("B",)), k=3)
        found = find_cases(world.index, example, settings)
        assert found.candidates == 12
        assert {world.site[case.slide_id] for case in found.cases} == {"B"}
        nobody = find_cases(world.index, example, replace(settings, where=Is("site", ("C",))))
        assert nobody.cases == ()
        assert "Not enough cases: 3 were wanted and 0 found; 0 slides were left" in nobody.notes[0]


def test_one_tile_is_a_query_too(world: World) -> None:
    tiles = indexed_tiles(world.index, "s09")
    found = find_cases(world.index, tile_at(tiles, (224, 448)), CaseSettings(k=2))
    similarity = cosine_similarity(tiles.vectors[[17]], world.x.reshape(-1, DIM)).reshape(24, TILES)
    assert found.tiles == 1
    assert [case.slide_id for case in found.cases] == expected(world, "s09", similarity.max(axis=1), 2)


def test_a_result_is_json(world: World) -> None:
    example = whole_slide(indexed_tiles(world.index, "s10"))
    found = find_cases(world.index, example, CaseSettings(where=Is("site", ("A",))))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["cases"][0]["pairs"][0]["query_xy"] == list(found.cases[0].pairs[0].query_xy)
    assert values["query"] == "slide s10, 40 tiles"


def test_an_index_without_labels_or_patients(tmp_path: Path) -> None:
    fields = {name: FIELDS[name] for name in ("slide_id", "x", "y")}
    bare = made(tmp_path / "bare", slides=6, fields=fields)
    example = whole_slide(indexed_tiles(bare.index, "s00"))
    found = find_cases(bare.index, example, CaseSettings(k=9))
    assert len(found.cases) == 5  # each slide is its own patient
    assert "s01" in [case.slide_id for case in found.cases]
    assert any("The patient of slide s00, 40 tiles is not known" in note for note in found.notes)
    assert found.cases[0].label == ""
    assert found.mix == {UNLABELLED: 1.0}
    with pytest.raises(QueryError, match="no labels to vote on"):
        find_cases(bare.index, example, CaseSettings(aggregator="entropy-vote"))
    bare.index.close()


def test_bad_input_is_named(world: World, tmp_path: Path) -> None:
    example = whole_slide(indexed_tiles(world.index, "s00"))
    with pytest.raises(QueryError, match="unknown aggregator 'median'; the closest are: median-of-minima"):
        find_cases(world.index, example, CaseSettings(aggregator="median"))
    with pytest.raises(QueryError, match="k is 0"):
        find_cases(world.index, example, CaseSettings(k=0))
    with pytest.raises(QueryError, match="at most 4 slides"):
        find_cases(world.index, example, CaseSettings(k=5, most=4))
    with pytest.raises(QueryError, match="organ"):
        find_cases(world.index, example, CaseSettings(where=Is("organ", ("skin",))))
    fields = {"slide_id": "keyword", "x": "integer"}
    flat = made(tmp_path / "flat", slides=2, fields=fields)
    with pytest.raises(QueryError, match="the index has no y: cases cannot be told apart"):
        find_cases(flat.index, example)
    flat.index.close()
