"""The base install has no torch: `texture` loads and extraction runs; other encoders say what they need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import slidegen
from eosin.features.store import FeatureStore


@pytest.fixture
def torchless(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which torch and timm cannot be imported, by any process."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "timm"):
        (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n")
    return {**os.environ, "PYTHONPATH": str(blocked)}


def ran(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_texture_loads_and_others_name_the_extra(torchless):
    code = (
        "import numpy as np, eosin\n"
        "x = eosin.load_encoder('texture').encode(np.zeros((1, 64, 64, 3), np.uint8))\n"
        "print(x.shape[0])\n"
        "eosin.load_encoder('dinov2-vits14')\n"
    )
    done = ran(torchless, "-c", code)
    assert done.stdout == "1\n"
    assert "MissingDependencyError: timm is not installed; run: pip install 'eosin[torch]'" in done.stderr


def test_the_whole_command_extracts(torchless, tmp_path):
    pixels, _ = slidegen.histology(900, 700, seed=2, mpp=0.5)
    slide = slidegen.write_tiff(tmp_path / "a.svs", pixels, slidegen.TiffStyle(mpp=0.5, power=20, factors=(4,)))
    out = tmp_path / "features"
    done = ran(torchless, "-m", "eosin.cli", "extract", str(slide), "--out", str(out), "--encoder", "texture")
    assert done.returncode == 0, done.stderr
    assert len(FeatureStore.open(out)["a"]) > 0


def test_an_encoder_that_is_handed_over_loads_no_torch(tmp_path):
    pixels, _ = slidegen.histology(600, 500, seed=2, blobs=-1, mpp=0.5)
    slide = slidegen.write_tiff(tmp_path / "a.svs", pixels, slidegen.TiffStyle(mpp=0.5, power=20, factors=()))
    code = (
        "import sys\n"
        "from eosin.encoders.texture import TextureEncoder\n"
        "from eosin.features.extraction import run\n"
        f"outcome = run({str(slide)!r}, None, TextureEncoder(), out={str(tmp_path / 'f')!r}, workers=0)\n"
        "print(outcome.tiles, 'torch' in sys.modules)\n"
    )
    done = ran(dict(os.environ), "-c", code)
    assert done.stdout == "4 False\n", done.stderr
