"""Short codes of vectors, scanned before the vectors themselves: one byte or one bit a number.

int8: each vector of length 1 is divided by its largest number and rounded to -127..127. A quarter of the bytes of
float32; scores are wrong by about 5e-4.

binary: with the mean m taken off and a fixed random rotation R, the signs of R(v - m). Two vectors whose signs differ
in h of d places stand at an angle of about pi h / d (Charikar, STOC 2002, section 3), hence

    q.v = (q - m).(v - m) + q.m + v.m - m.m  ~  |q - m| |v - m| cos(pi h / d) + q.m + v.m - m.m

with |v - m| and v.m kept as numbers. A 32nd of the bytes and the fastest to scan; it needs many candidates.

Codes choose candidates only: the index scores those again with the vectors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eosin.retrieval.protocol import Floats
from eosin.retrieval.scan import Block, Score

Array = npt.NDArray[Any]
Kind = Literal["int8", "binary"]

FILES = {"codes": "codes.npy", "factors": "factors.npy", "basis": "basis.npy"}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Codes:
    """The codes of the first n rows.

    Attributes:
        kind: "int8" or "binary".
        codes: int8 (n, dim), or bits as uint64 (n, words).
        factors: float32 (n, 1) size of a step, or (n, 2) |v - m| and v.m.
        basis: float32 (dim + 1, dim) rotation and mean (binary), else (0, 0).
    """

    kind: Kind
    codes: Array
    factors: Floats
    basis: Floats

    def __len__(self) -> int:
        """Return the number of rows that have a code."""
        return len(self.codes)

    def candidates(self, k: int) -> int:
        """Return how many rows must be scored again for the best `k`."""
        return 4 * k + 32 if self.kind == "int8" else 32 * k + 480

    def scorer(self, queries: Floats) -> Score:
        """Return the function that estimates cosines (q, rows) of queries (q, dim) of length 1 with some rows."""
        return self._int8(queries) if self.kind == "int8" else self._binary(queries)

    def _int8(self, queries: Floats) -> Score:
        def score(block: Block) -> Floats:
            return (queries @ self.codes[block].astype(np.float32).T) * self.factors[block, 0]

        return score

    def _binary(self, queries: Floats) -> Score:
        rotation, mean = self.basis[:-1], self.basis[-1]
        moved = queries - mean
        signs = _pack(moved @ rotation)
        reach = np.sqrt(np.square(moved).sum(axis=1, dtype=np.float64)).astype(np.float32)
        shift = queries @ mean - mean @ mean
        angle = np.cos(np.pi * np.arange(len(mean) + 1) / len(mean)).astype(np.float32)

        def score(block: Block) -> Floats:
            codes, factors = self.codes[block], self.factors[block]
            found = np.empty((len(signs), len(codes)), np.float32)
            for row, sign in enumerate(signs):
                apart = np.bitwise_count(codes ^ sign).sum(axis=1, dtype=np.int64)
                found[row] = reach[row] * factors[:, 0] * angle[apart] + factors[:, 1] + shift[row]
            return found

        return score


def write_codes(folder: Path, kind: Kind, parts: Callable[[], Iterator[Floats]], rows: int, dim: int) -> None:
    """Write the codes of `rows` vectors, durably.

    Args:
        folder: of the points.
        kind: of the codes.
        parts: begins a pass over the vectors, in their order, of length 1, some at a time.
        rows: how many there are.
        dim: numbers in a vector.
    """
    basis = np.zeros((0, 0), np.float32)
    if kind == "binary":
        mean = np.sum([part.sum(axis=0, dtype=np.float64) for part in parts()], axis=0) / max(1, rows)
        basis = np.vstack([_rotation(dim), mean]).astype(np.float32)
    width, dtype = (dim, np.int8) if kind == "int8" else (-(-dim // 64), np.uint64)
    shapes = {"codes": ((rows, width), dtype), "factors": ((rows, 1 if kind == "int8" else 2), np.float32)}
    files = {
        name: np.lib.format.open_memmap(folder / FILES[name], "w+", dtype, shape)
        for name, (shape, dtype) in shapes.items()
    }
    start = 0
    for part in parts():
        stop = start + len(part)
        codes, factors = _to_int8(part) if kind == "int8" else _to_bits(part, basis)
        files["codes"][start:stop], files["factors"][start:stop] = codes, factors
        start = stop
    for array in files.values():
        array.flush()
    np.save(folder / FILES["basis"], basis)
    for name in FILES.values():
        with open(folder / name, "rb+") as handle:
            os.fsync(handle.fileno())


def read_codes(folder: Path, kind: Kind) -> Codes | None:
    """Return the codes in a folder, None when they were not made yet."""
    if not (folder / FILES["basis"]).is_file():
        return None
    arrays = {name: np.load(folder / file, mmap_mode="r", allow_pickle=False) for name, file in FILES.items()}
    return Codes(kind=kind, **arrays)


def _to_int8(vectors: Floats) -> tuple[Array, Floats]:
    step = np.abs(vectors).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(vectors / step).astype(np.int8), step


def _to_bits(vectors: Floats, basis: Floats) -> tuple[Array, Floats]:
    moved = vectors - basis[-1]
    factors = [np.sqrt(np.square(moved).sum(axis=1)), vectors @ basis[-1]]
    return _pack(moved @ basis[:-1]), np.stack(factors, axis=1)


def _pack(vectors: Floats) -> npt.NDArray[np.uint64]:
    """Return the signs of (n, dim) as bits in whole 64-bit words (n, words)."""
    packed = np.packbits(vectors > 0, axis=1)
    words = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    words[:, : packed.shape[1]] = packed
    return words.view(np.uint64)


def _rotation(dim: int) -> Array:
    """Return one fixed random rotation (dim, dim), so that every sign carries as much as another."""
    square = np.random.default_rng(0).normal(size=(dim, dim))
    basis, triangle = np.linalg.qr(square)
    return basis * np.sign(np.diag(triangle))
