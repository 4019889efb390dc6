"""Every code block of the README and the docs runs, or says why it is only shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slidegen

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
# Blocks in these languages are shown, not run: results, file layouts, formulas.
SHOWN = ("text", "json", "toml", "math")


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_have_a_known_language(page: Path) -> None:
    for language, code in blocks(page):
        assert language in ("python", "console", *SHOWN), f"{page.name}: ```{language} {code[:40]!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_tests_exist(page: Path) -> None:
    known = {
        n for p in (ROOT / "tests").rglob("test_*.py") for n in re.findall(r"^def (test_\w+)", p.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    assert not named - known


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder, new for each page, with what the examples name: slides/a.svs, slides/b.svs, a.svs."""
    root = tmp_path
    (root / "slides").mkdir()
    for seed, name in enumerate(("slides/a.svs", "slides/b.svs", "a.svs")):
        pixels, _ = slidegen.histology(1300, 1000, seed=seed, mpp=0.5)
        style = slidegen.TiffStyle(compression="jpeg", mpp=0.5, power=20, factors=(4,))
        slidegen.write_tiff(root / name, pixels, style)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page: Path, workplace: Path) -> None:
    """Python blocks of a page run one after another in one program; console blocks line by line."""
    python = [code for language, code in blocks(page) if language == "python"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, code in blocks(page):
        if language != "console":
            continue
        for line in re.findall(r"^\$ (.+)$", code, re.M):
            if line.startswith(("make", "pip", "git")):
                continue  # set-up: CI does it before this test
            done = subprocess.run(
                line, shell=True, cwd=workplace, env=environment, capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout}\n{done.stderr}"
    if python:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(python)], cwd=workplace, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page.name}\n{done.stderr}"
