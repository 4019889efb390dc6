from __future__ import annotations

import json
from pathlib import Path

import h5py
import pytest
from typer.testing import CliRunner, Result

import slidegen
from eosin.cli import app, main
from eosin.cli.options import parse_mpp, parse_shard
from eosin.features.store import FeatureStore

COMMANDS = (
    "demo",
    "info",
    "doctor",
    "encoders",
    "tile",
    "extract",
    "verify",
    "convert",
    "probe",
    "validate",
    "pretrain",
    "finetune",
    "distil",
    "cells",
    "index",
    "search",
    "review",
    "hard-examples",
)


def eosin(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slides")
    pixels, _ = slidegen.histology(1200, 900, seed=4, mpp=0.5)
    style = slidegen.TiffStyle(compression="jpeg", mpp=0.5, power=20, factors=(4,))
    slidegen.write_tiff(root / "good.svs", pixels, style)
    (root / "bad.svs").write_bytes(b"")
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json_and_stands_in_the_docs(command: str) -> None:
    result = eosin(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output
    docs = Path(__file__).parents[1] / "docs"
    assert any(f"eosin {command}" in page.read_text() for page in docs.glob("*.md"))


def test_info(slides: Path) -> None:
    result = eosin("info", slides / "good.svs", "--json")
    described = json.loads(result.stdout)[0]
    assert described["size_px"] == [1200, 900]
    assert described["mpp"]["x"] == 0.5
    assert described["compression"] == "JPEG"
    assert (
        "1200x900" in eosin("info", slides / "good.svs").output.replace(" ", "x")
        or "1200 900" in eosin("info", slides / "good.svs").output
    )


def test_doctor_tells_good_from_bad(slides: Path) -> None:
    result = eosin("doctor", slides, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    verdicts = {row["slide_id"]: row["verdict"] for row in report["slides"]}
    assert verdicts == {"good.svs": "ok", "bad.svs": "fail"}
    assert report["tiles"] > 0
    assert eosin("doctor", slides / "good.svs").exit_code == 0


def test_extract_verify_convert(slides: Path, tmp_path: Path) -> None:
    result = eosin("extract", slides, "--out", tmp_path / "f", "--encoder", "texture", "--mpp", "1.0", "--json")
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    assert told["done"] == ["good.svs"]
    assert "zero" in told["failed"]["bad.svs"] or "empty" in told["failed"]["bad.svs"]
    for name in ("manifest.json", "run.json", "summary.csv", "summary.html", "failures/bad.svs.json"):
        assert (tmp_path / "f" / name).is_file(), name
    store = FeatureStore.open(tmp_path / "f")
    assert len(store["good"]) == told["tiles"]
    assert eosin("verify", tmp_path / "f").exit_code == 0
    path = tmp_path / "f" / "good.svs.h5"
    with h5py.File(path) as file:
        middle = file["qc/focus"].id.get_chunk_info(0).byte_offset + 2
    content = bytearray(path.read_bytes())
    content[middle] ^= 0xFF
    path.write_bytes(bytes(content))
    assert eosin("verify", tmp_path / "f", "--json").exit_code == 1
    damaged = eosin("extract", slides / "good.svs", "--out", tmp_path / "f", "--encoder", "texture", "--mpp", "10x")
    assert "delete it" in (tmp_path / "f" / "summary.csv").read_text(), damaged.output
    path.unlink()
    again = eosin("extract", slides / "good.svs", "--out", tmp_path / "f", "--encoder", "texture", "--mpp", "10x")
    assert again.exit_code == 0, again.output
    converted = eosin("convert", tmp_path / "f", tmp_path / "npz", "--to", "npz", "--json")
    assert converted.exit_code == 0, converted.output
    assert len(json.loads(converted.stdout)["written"]) >= 1


def test_tile(slides: Path, tmp_path: Path) -> None:
    result = eosin("tile", slides / "good.svs", "--out", tmp_path, "--mpp", "0.5,1.0", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["slides"]
    assert [row["mpp"] for row in rows] == [0.5, 1.0]
    for row in rows:
        stem = Path(row["file"]).with_suffix("")
        for suffix in (".h5", ".geojson", ".jpg"):
            assert stem.with_name(stem.name + suffix).is_file()


def test_one_clear_line_for_what_is_wrong(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for args, words in (
        (["extract", str(tmp_path / "absent"), "--out", str(tmp_path), "--encoder", "texture"], "no such file"),
        (["extract", str(slides), "--out", str(tmp_path), "--encoder", "dinov2-vitb41"], "dinov2-vitb14"),
        (["verify", str(tmp_path)], "not a feature store"),
        (["info", str(slides / "bad.svs")], "bad.svs"),
    ):
        monkeypatch.setattr("sys.argv", ["eosin", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        told = capsys.readouterr().err.strip()
        assert words in told
        assert len(told.splitlines()) == 1


def test_parsing() -> None:
    assert parse_mpp("0.5, 20x,1") == [0.5, 0.5, 1.0]
    assert parse_shard("2/8") == (2, 8)
    assert eosin("extract", ".", "--out", "x", "--encoder", "texture", "--mpp", "fast").exit_code == 2
    assert eosin("extract", ".", "--out", "x", "--encoder", "texture", "--shard", "2of8").exit_code == 2


def test_doctor_tells_the_hours_of_an_encoder(slides: Path) -> None:
    assert json.loads(eosin("doctor", slides / "good.svs", "--json").stdout)["hours"] is None
    timed = json.loads(eosin("doctor", slides / "good.svs", "--encoder", "texture", "--json").stdout)
    assert timed["hours"] > 0
    assert "h of texture" in timed["summary"]
