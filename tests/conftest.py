"""Fixtures that every test folder may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

import slidegen

# The same examples in every run: a red build means a change, not a draw. HYPOTHESIS_PROFILE=search draws anew.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("search")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The shared real data; the test is skipped where there is none."""
    root = Path(os.environ.get("EOSIN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "slides").is_dir():
        pytest.skip(f"no real data at {root}; set EOSIN_DATA")
    return root


@pytest.fixture
def make_slide(tmp_path: Path) -> Callable[..., Path]:
    """Write pixels as a slide: make_slide(pixels, name="a.svs", **TiffStyle fields) -> path."""

    def make(pixels: npt.NDArray[np.uint8], name: str = "slide.svs", **style: object) -> Path:
        return slidegen.write_tiff(tmp_path / name, pixels, slidegen.TiffStyle(**style))

    return make


@dataclass(frozen=True)
class TruthSlide:
    """A synthetic slide, and which of its pixels are tissue."""

    path: Path
    pixels: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    mpp: float


@pytest.fixture(scope="session")
def he_slide(tmp_path_factory: pytest.TempPathFactory) -> TruthSlide:
    """A small H&E-like SVS, 2000 x 1500 at 0.5 mpp in two levels, with its truth mask."""
    pixels, mask = slidegen.histology(2000, 1500, seed=7, mpp=0.5)
    style = slidegen.TiffStyle(compression="jpeg", mpp=0.5, power=20, factors=(4,))
    path = slidegen.write_tiff(tmp_path_factory.mktemp("he") / "he.svs", pixels, style)
    return TruthSlide(path=path, pixels=pixels, mask=mask, mpp=0.5)
