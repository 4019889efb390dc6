"""One vector a slide, the mean of its tiles: a cheap first look at which slides are alike."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eosin.retrieval.filters import Filter
from eosin.retrieval.protocol import VectorIndex

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlideVectors:
    """The mean vector of every slide of an index: a cheap first look.

    Attributes:
        slide_id: (S,) ascending.
        vectors: (S, dim) float32 of length 1; zeros where the tiles of a slide cancel.
        tiles: (S,) tiles of each.
    """

    slide_id: tuple[str, ...]
    vectors: npt.NDArray[np.float32]
    tiles: npt.NDArray[np.int64]

    def nearest(self, query: npt.NDArray[np.floating], names: Container[str]) -> dict[str, float]:
        """Return some slides with their cosine similarity to a vector of length 1 (dim,), best first."""
        rows = [at for at, name in enumerate(self.slide_id) if name in names]
        score = self.vectors[rows] @ query.astype(np.float32)
        return {self.slide_id[rows[at]]: float(score[at]) for at in np.argsort(-score, kind="stable").tolist()}


def slide_vectors(index: VectorIndex, *, where: Filter | None = None) -> SlideVectors:
    """Return the mean of each slide's tiles, by one pass over the vectors.

    Args:
        index: payload with slide_id.
        where: tiles that count.
    """
    sums: dict[str, Floats] = {}
    tiles: dict[str, int] = {}
    for part in index.scroll(where=where):
        assert part.vectors is not None  # scroll gives vectors
        names, codes = np.unique(part.payload["slide_id"].astype(str), return_inverse=True)
        order = np.argsort(codes, kind="stable")
        starts = np.searchsorted(codes[order], np.arange(len(names)))
        added = np.add.reduceat(part.vectors[order].astype(np.float64), starts, axis=0)
        for name, one, many in zip(names.tolist(), added, np.bincount(codes).tolist(), strict=True):
            sums[name] = one if name not in sums else sums[name] + one
            tiles[name] = tiles.get(name, 0) + many
    names = sorted(sums)
    means = np.array([sums[name] for name in names]).reshape(len(names), index.spec.dim)
    length = np.linalg.norm(means, axis=1, keepdims=True)
    unit = np.divide(means, length, out=np.zeros_like(means), where=length > 1e-9)
    return SlideVectors(
        slide_id=tuple(names), vectors=unit.astype(np.float32), tiles=np.array([tiles[n] for n in names], np.int64)
    )
