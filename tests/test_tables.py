"""The tables of the README and the docs are those of the results on disk."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "tables.py"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("benchmark_tables", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "tables",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("amf", "detector", "finetune_ablation", "review", "search_quality", "sish", "vector_tables")
        ),
    ],
)
def test_the_pages_show_what_the_results_say(name: str) -> None:
    script = SCRIPT.with_name(f"{name}.py")
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}see python benchmarks/{name}.py --help"


def test_every_result_that_has_a_table_is_shown(tables: ModuleType) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    shown = set(re.findall(r"<!-- table:([\w-]+) -->", text))
    there = {n for n, t in tables.TABLES.items() if all((tables.RESULTS / f"{f}.json").is_file() for f in t.files)}
    assert shown == there


def test_a_changed_figure_changes_its_table(tables: ModuleType, tmp_path: Path) -> None:
    """The number comes from the file: another one there is another one in the page, and old text goes."""
    record = json.loads((tables.RESULTS / "tissue.json").read_text(encoding="utf-8"))
    record["mean_iou"]["eosin"] = 0.1234
    (tmp_path / "tissue.json").write_text(json.dumps(record))
    page = "before\n<!-- table:tissue -->\nold\n<!-- /table -->\nafter\n"
    made = tables.filled(page, tmp_path)
    assert "**0.123**" in made
    assert "old" not in made
    assert made.startswith("before\n<!-- table:tissue -->\n| drawn slide |")
    assert made.endswith("<!-- /table -->\nafter\n")
    assert tables.filled(made, tmp_path) == made


def test_tables_are_rectangular(tables: ModuleType) -> None:
    for page in tables.PAGES:
        for match in tables.MARKER.finditer(page.read_text(encoding="utf-8")):
            for block in match["body"].split("\n\n"):
                lines = [line for line in block.splitlines() if line.startswith("|")]
                assert len({line.count("|") for line in lines}) <= 1, f"{page.name}: {match['name']}"


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("<!-- table:speed -->\n<!-- /table -->\n", "there is no table 'speed'; there are reading"),
        ("<!-- table:tissue -->\n<!-- /table -->\n", "needs tissue.json, which is not in"),
        ("<!-- table:tissue -->\n| a |\n", "1 tables are opened and 0 closed"),
        ("<!-- table:tissue -->\n<!-- table:stain -->\n<!-- /table -->\n", "2 tables are opened and 1 closed"),
    ],
)
def test_markers_that_make_no_sense_are_named(tables: ModuleType, tmp_path: Path, page: str, words: str) -> None:
    with pytest.raises(tables.TableError, match=re.escape(words)):
        tables.filled(page, tmp_path)
