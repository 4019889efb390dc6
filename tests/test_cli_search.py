"""`eosin index` and `eosin search` as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from eosin.cli import search as commands
from eosin.errors import IndexStoreError, QueryError
from search_archive import MPP, TILE_PX, Archive, archive

app = typer.Typer()
app.command()(commands.index)
app.command()(commands.search)


def eosin(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return archive(tmp_path_factory)


def test_from_slides_to_a_page_in_two_commands(made: Archive, tmp_path: Path) -> None:
    shutil.copytree(made.slides / "south", tmp_path / "slides")
    index, out = tmp_path / "archive", tmp_path / "similar"
    first = eosin(
        *("index", tmp_path / "slides", "--encoder", "texture", "--out", index),
        *("--tile-px", TILE_PX, "--mpp", MPP, "--workers", 0),
    )
    assert first.exit_code == 0, first.output
    assert f"2 slides stored, 0 already there, 0 failed; 40 tiles in {index} (exact)" in first.stdout
    second = eosin("search", index, "--query", "c.tif:128,256", "--out", out, "--k", 3)
    assert second.exit_code == 0, second.output
    assert "copy.tif:" in second.stdout
    assert "Name the patients by making the index with --cohort" in " ".join(second.stderr.split())
    for name in ("search.html", "search.json", "hits.png", "geojson/copy.tif.geojson", "geojson/c.tif.geojson"):
        assert (out / name).is_file()
    again = eosin(
        *("index", tmp_path / "slides", "--encoder", "texture", "--out", index, "--json"),
        *("--tile-px", TILE_PX, "--mpp", MPP, "--workers", 0),
    )
    assert json.loads(again.stdout)["skipped"] == ["c.tif", "copy.tif"]


def test_a_hit_can_be_the_next_query(made: Archive) -> None:
    found = json.loads(eosin("search", made.index, "-q", "a:128,256", "-k", 1, "--json").stdout)
    assert found["found"] == 1
    hit = found["hits"][0]
    words = f"{hit['slide_id']}:{hit['x']},{hit['y']}"
    assert words in eosin("search", made.index, "-q", "a:128,256", "-k", 1).stdout
    back = json.loads(eosin("search", made.index, "-q", words, "-k", 1, "--json").stdout)
    assert back["query"][0]["name"] == f"tile of {hit['slide_id']} at ({hit['x']}, {hit['y']})"
    assert back["hits"][0]["slide_id"] == "north/a.tif"


def test_filters_exclusions_and_several_examples(made: Archive) -> None:
    def slides(*args: object) -> set[str]:
        result = eosin("search", made.index, "-k", 80, "--json", *args)
        assert result.exit_code == 0, result.output
        return {hit["slide_id"] for hit in json.loads(result.stdout)["hits"]}

    query = ("-q", "a:128,256")
    assert slides(*query) == {"south/c.tif", "south/copy.tif"}
    assert slides(*query, "--same-patient") == {"north/b.tif", "south/c.tif", "south/copy.tif"}
    assert slides(*query, "--same-slide") == {"north/a.tif", "south/c.tif", "south/copy.tif"}
    assert slides(*query, "--same-patient", "-f", "site=north") == {"north/b.tif"}
    assert slides(*query, "-f", "label=malignant", "-f", "x>=128") == {"south/c.tif"}
    assert slides(*query, "-q", "c:128,256") == {"south/copy.tif"}
    assert slides(*query, "--against", "c:128,256") == {"south/c.tif", "south/copy.tif"}


def test_too_few_hits_are_said_and_are_no_failure(made: Archive) -> None:
    result = eosin("search", made.index, "-q", "a:128,256", "-f", "label=bening")
    assert result.exit_code == 0
    assert "10 hits were wanted and 0 found" in result.stderr
    assert "the closest are: benign" in result.stderr


def test_cases(made: Archive, tmp_path: Path) -> None:
    result = eosin("search", made.index, "-q", "north/a.tif", "--cases", "-k", 2, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.index("south/copy.tif") < result.stdout.index("south/c.tif")
    assert (tmp_path / "cases.html").is_file()
    vote = eosin("search", made.index, "-q", "north/a.tif", "--cases", "--aggregator", "entropy-vote", "--json")
    assert json.loads(vote.stdout)["settings"]["aggregator"] == "entropy-vote"
    for args in (("--mmr", 0.5), ("-q", "c")):
        refused = eosin("search", made.index, "-q", "a", "--cases", *args)
        assert isinstance(refused.exception, QueryError)


def test_what_cannot_be_asked(made: Archive, tmp_path: Path) -> None:
    assert eosin("search", made.index).exit_code == 2
    assert eosin("search", made.index, "-q", "a", "--evaluate").exit_code == 2
    assert eosin("search", made.index, "--evaluate").exit_code == 2
    assert eosin("search", made.index, "-q", "a", "--mmr", 2).exit_code == 2
    for args in (("-q", "zzz"), ("-q", "a", "-f", "size=3"), ("-q", "a", "--merge", "sum")):
        assert isinstance(eosin("search", made.index, *args).exception, QueryError)
    assert isinstance(eosin("search", tmp_path, "-q", "a").exception, IndexStoreError)


@pytest.mark.slow
def test_evaluate_writes_its_page(made: Archive, tmp_path: Path) -> None:
    result = eosin("search", made.index, "--evaluate", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report.html").is_file()
