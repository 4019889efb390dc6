"""The command line of fine-tuning: one command from table to page, and clear ends of what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from traingen import write_cells, write_encoder
from typer.testing import CliRunner

from eosin.cli.finetune import _config, _pair, finetune
from eosin.errors import ConfigError

app = typer.Typer()
app.command()(finetune)


def call(folder: Path, *more: str) -> list[str]:
    return [
        *("amf", "--data", str(folder / "data"), "--encoder", str(folder / "tiny.safetensors")),
        *("--out", str(folder / "out"), "--device", "cpu", *more),
    ]


def test_from_table_to_page(tmp_path: Path) -> None:
    write_cells(tmp_path / "data", slides=30, external=3)
    write_encoder(tmp_path / "tiny.safetensors")
    options = ("--external", "dataset=other", "--epochs", "1", "--folds", "2", "--without", "all", "--tta", "none")
    done = CliRunner().invoke(app, call(tmp_path, *options))
    assert done.exit_code == 0, done.output
    assert "out of fold" in done.stdout
    assert "external" in done.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    again = CliRunner().invoke(app, call(tmp_path, *options, "--json"))
    assert json.loads(again.stdout)["schema"] == "eosin.finetune/1"


def test_options_become_the_recipe() -> None:
    given = {"epochs": 3, "batch": None, "lr": None, "folds": None, "tta": "dihedral"}
    config = _config("amf", given, mode="last", rank=4, without="stain, jpeg")
    assert (config.epochs, config.batch, config.tta) == (3, 32, "dihedral")
    assert (config.adapt.mode, config.adapt.rank, config.adapt.alpha) == ("last", 4, 8.0)
    assert config.augment.families == ("optics", "colour", "geometry", "dropout")
    assert _config("amf", {}, mode=None, rank=None, without="all").augment is None
    with pytest.raises(ConfigError, match="no augmentation family is called 'stains'; the closest are stain"):
        _config("amf", {}, mode=None, rank=None, without="stains")


def test_external_is_field_and_value() -> None:
    assert _pair(None) is None
    assert _pair("dataset=a=b") == ("dataset", "a=b")
    with pytest.raises(typer.BadParameter, match="is not FIELD=VALUE"):
        _pair("dataset")
