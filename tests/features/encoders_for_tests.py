"""Encoders that cost nothing, for testing what surrounds an encoder."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.encoders.spec import EncoderSpec
from eosin.features.jobs import Job
from eosin.slides import Slide


class MeanEncoder:
    """Mean colour of each of 4 x 4 cells: 48 numbers, row i from tile i only."""

    def __init__(self, name: str = "mean", precision: str = "fp32") -> None:
        self.spec = EncoderSpec(
            name=name,
            dim=48,
            patch_px=1,
            input_px=224,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            mpp=(),
            pooling="cls",
            registers=0,
            params_m=0.0,
            licence="Apache-2.0",
            gated=False,
            source="builtin:mean",
        )
        self.precision = precision
        self.seen: list[int] = []

    def encode(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.seen.append(len(tiles))
        side = tiles.shape[1] // 4
        cells = tiles[:, : side * 4, : side * 4].reshape(len(tiles), 4, side, 4, side, 3)
        return cells.astype(np.float64).mean(axis=(2, 4)).reshape(len(tiles), 48).astype(np.float32)

    def runtime(self) -> dict[str, Any]:
        return {"backend": "numpy", "precision": self.precision, "device": "cpu", "versions": {}}


class NanEncoder(MeanEncoder):
    """Gives NaN for the tile number `at` of a run."""

    def __init__(self, at: int = 5) -> None:
        super().__init__("nan")
        self.at = at

    def encode(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        start = sum(self.seen)
        x = super().encode(tiles)
        if start <= self.at < start + len(tiles):
            x[self.at - start, 7] = np.nan
        return x


class CrashingJob(Job):
    """A slide whose codec takes the process down."""

    def open(self) -> Slide:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("not reached")
