"""Codes against brute force: the nearest centre at each level, the nearest cells, and paths whose order is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from eosin.retrieval.codes import (
    LEVELS,
    Codebook,
    digit,
    encode,
    fit_codebook,
    likeness,
    occupied_cells,
    path_order,
    probes,
)

Floats = npt.NDArray[np.float32]


def clustered(rows: int, dim: int, *, clusters: int, seed: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return unit vectors about centres, and the cluster of each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim))
    label = rng.integers(clusters, size=rows)
    x = centres[label] + 0.3 * rng.standard_normal((rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), label


@pytest.fixture(scope="module")
def vectors() -> Floats:
    return clustered(1500, 24, clusters=20, seed=0)[0]


@pytest.fixture(scope="module")
def codebook(vectors: Floats) -> Codebook:
    return fit_codebook(vectors, cells=32, seed=3)


def greedy(vector: Floats, centres: Floats) -> list[int]:
    """Return the digits of one vector, by comparing distances one by one."""
    rest, digits = vector.astype(np.float64), []
    for level in centres.astype(np.float64):
        away = [float(np.square(rest - centre).sum()) for centre in level]
        digits.append(away.index(min(away)))
        rest = rest - level[digits[-1]]
    return digits


def test_a_key_holds_the_nearest_centre_at_each_level(vectors: Floats, codebook: Codebook) -> None:
    keys = encode(vectors[:200], codebook)
    expected = np.array([greedy(one, codebook.centres) for one in vectors[:200]])
    found = np.stack([digit(keys, level) for level in range(LEVELS)], axis=1)
    np.testing.assert_array_equal(found, expected)
    text = ["".join(f"{number:02x}" for number in digits) for digits in expected]
    assert keys.tolist() == [int(one, 16) for one in text]


def test_blocks_and_float16_change_no_key_that_is_not_a_near_tie(vectors: Floats, codebook: Codebook) -> None:
    together = encode(np.tile(vectors, (8, 1)), codebook)
    np.testing.assert_array_equal(together, np.tile(encode(vectors, codebook), 8))
    half = encode(vectors.astype(np.float16), codebook)
    assert np.mean(digit(half, 0) == digit(together[: len(vectors)], 0)) > 0.99


def test_every_level_leaves_less_of_the_vector(vectors: Floats, codebook: Codebook) -> None:
    keys = encode(vectors, codebook)
    rest, left = vectors.astype(np.float64), []
    for level in range(LEVELS):
        rest = rest - codebook.centres[level, digit(keys, level)]
        left.append(float(np.square(rest).sum(axis=1).mean()))
    assert left == sorted(left, reverse=True)
    variance = float(np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean())
    assert left[0] < 0.4 * variance
    assert left[-1] < 0.75 * left[0]


def test_vectors_close_in_key_are_alike(vectors: Floats, codebook: Codebook) -> None:
    order = np.argsort(encode(vectors, codebook), kind="stable")
    beside = np.einsum("nd,nd->n", vectors[order[1:]], vectors[order[:-1]]).mean()
    shuffled = vectors[np.random.default_rng(0).permutation(len(vectors))]
    anywhere = np.einsum("nd,nd->n", shuffled[1:], shuffled[:-1]).mean()
    assert beside > anywhere + 0.5


def test_the_path_of_points_on_a_line_is_the_line() -> None:
    line = np.linspace(0, 1, 40) ** 2
    shuffle = np.random.default_rng(1).permutation(40)
    points = np.stack([line[shuffle], 3 * line[shuffle] + 1], axis=1)
    order = path_order(points)
    walked = line[shuffle][order]
    assert (np.diff(walked) > 0).all() or (np.diff(walked) < 0).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_path_visits_each_centre_once(count: int) -> None:
    assert sorted(path_order(np.random.default_rng(0).standard_normal((count, 3))).tolist()) == list(range(count))


def test_the_path_is_shorter_than_chance(codebook: Codebook) -> None:
    def length(centres: Floats) -> float:
        return float(np.linalg.norm(np.diff(centres, axis=0), axis=1).sum())

    rng = np.random.default_rng(0)
    for level in codebook.centres[:2]:
        chance = [length(level[rng.permutation(len(level))]) for _ in range(200)]
        assert length(level) < min(chance)


def test_the_same_seed_gives_the_same_codebook(vectors: Floats, codebook: Codebook) -> None:
    again = fit_codebook(vectors, cells=32, seed=3)
    np.testing.assert_array_equal(again.centres, codebook.centres)
    other = fit_codebook(vectors, cells=32, seed=4)
    assert not np.array_equal(other.centres, codebook.centres)


def test_few_rows_get_few_centres() -> None:
    same = np.tile(np.eye(3, dtype=np.float32)[:1], (9, 1))
    codebook = fit_codebook(same)
    assert codebook.centres.shape == (LEVELS, 2, 3)
    assert len(np.unique(encode(same, codebook))) == 1
    assert fit_codebook(same[:1]).centres.shape[1] == 1


@pytest.mark.parametrize("cells", [1, 257])
def test_a_level_has_2_to_256_centres(vectors: Floats, cells: int) -> None:
    with pytest.raises(ValueError, match=f"cells is {cells}"):
        fit_codebook(vectors, cells=cells)


def test_no_rows_teach_no_codes() -> None:
    with pytest.raises(ValueError, match="no vectors"):
        fit_codebook(np.empty((0, 4), np.float32))


def test_probes_are_the_nearest_occupied_cells(vectors: Floats, codebook: Codebook) -> None:
    stored = encode(vectors[:300], codebook)
    occupied = occupied_cells(stored, codebook)
    assert {divmod(int(pair), 32) for pair in np.flatnonzero(occupied)} == set(
        zip(digit(stored, 0).tolist(), digit(stored, 1).tolist(), strict=True)
    )
    for query in vectors[300:310]:
        tables = codebook.centres @ query
        keys, worth = probes(query, codebook, tables, occupied, 12)
        cells = [divmod(int(pair), 32) for pair in np.flatnonzero(occupied)]
        middle = {
            pair: codebook.centres[0, pair[0]] + codebook.centres[1, pair[1]].astype(np.float64) for pair in cells
        }
        nearest = sorted(cells, key=lambda pair: float(np.square(query - middle[pair]).sum()))[:12]
        assert list(zip(digit(keys, 0).tolist(), digit(keys, 1).tolist(), strict=True)) == nearest
        np.testing.assert_allclose(worth, [query @ middle[pair] for pair in nearest], atol=1e-5)
        for key, pair in zip(keys, nearest, strict=True):
            low = greedy((query - middle[pair]).astype(np.float32), codebook.centres[2:])
            assert [int(digit(key, 2)), int(digit(key, 3))] == low


def test_more_probes_than_cells_are_all_cells(vectors: Floats, codebook: Codebook) -> None:
    occupied = occupied_cells(encode(vectors[:5], codebook), codebook)
    keys, _ = probes(vectors[0], codebook, codebook.centres @ vectors[0], occupied, 64)
    assert len(keys) == np.count_nonzero(occupied) <= 5


def test_likeness_is_the_product_with_the_sum_of_centres(vectors: Floats, codebook: Codebook) -> None:
    keys = encode(vectors, codebook)
    stands_for = sum(codebook.centres[level, digit(keys, level)].astype(np.float64) for level in range(LEVELS))
    np.testing.assert_allclose(likeness(keys, codebook.centres @ vectors[7]), stands_for @ vectors[7], atol=1e-5)
