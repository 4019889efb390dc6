"""`eosin review` and `eosin hard-examples` from outside: seeds, keys, a page, labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from eosin.cli.review import hard_examples, review
from eosin.errors import QueryError, StoreError
from eosin.tasks.review_state import read_state

app = typer.Typer()
app.command()(review)
app.command()(hard_examples)


def eosin(*args: object, keys: str = "") -> Result:
    return CliRunner().invoke(app, [str(one) for one in args], input=keys)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixty images, a third of them bright, of twelve patients; two are on the test side."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    bright = np.arange(60) % 3 == 0
    for at in range(60):
        noise = rng.integers(0, 60, (48, 48, 3)) + (180 if bright[at] else 20)
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{at:02d}.png")
    patient = np.array([f"p{number:02d}" for number in np.arange(60) % 12])
    rows = {"file": [f"{at:02d}.png" for at in range(60)], "patient_id": patient, "label": np.where(bright, "b", "d")}
    split = np.where(np.isin(patient, ["p00", "p01"]), "test", "train")
    pd.DataFrame(rows).assign(split=split).to_csv(folder / "cohort.csv", index=False)
    pd.DataFrame({"file": ["03.png", "06.png"], "label": ["bright"] * 2}).to_csv(folder / "seeds.csv", index=False)
    return folder


def common(images: Path) -> list[object]:
    return [images, "--cohort", images / "cohort.csv", "--encoder", "texture", "--out", images / "out"]


def test_from_seeds_to_labels(images: Path) -> None:
    begun = eosin("review", *common(images), "--seeds", images / "seeds.csv", "--size", 6, keys="aarr21q")
    assert begun.exit_code == 0, begun.output
    assert "Round 0" in begun.stderr
    assert "needed 20" in begun.stdout
    state = read_state(images / "out" / "review-reviewer.jsonl")
    assert len(state.decisions) == 2 + 6
    gone_on = eosin("review", *common(images), "--size", 4, "--shares", "1,1,1,1", "--json", keys="nss")
    told = json.loads(gone_on.stdout)
    assert told["round"] == 1
    assert told["pending"] == 2
    assert sum(told["labels"].values()) == 8
    state = read_state(images / "out" / "review-reviewer.jsonl")
    assert sorted(item.share for item in state.rounds[1]) == ["audit", "diverse", "hard", "uncertain"]
    exported = eosin("review", *common(images), "--export", "--json")
    found = json.loads(exported.stdout)
    table = pd.read_parquet(found["table"])
    assert table["label"].value_counts().to_dict() == found["labels"] == told["labels"]
    assert (table["split"] == "train").all()


def test_a_page_and_back(images: Path) -> None:
    begun = eosin("review", *common(images), "--seeds", images / "seeds.csv", "--size", 5, "--page")
    assert begun.exit_code == 0, begun.output
    page = (images / "out" / "queue.html").read_text()
    queue = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])  # pyright: ignore
    told = {name: queue[name] for name in ("format", "version", "review", "round")}
    told["decisions"] = [{"id": one["id"], "verdict": "reject"} for one in queue["items"][:3]]
    (images / "d.json").write_text(json.dumps(told))
    read = eosin("review", *common(images), "--read", images / "d.json")
    assert "3 decisions taken, 0 known already" in read.stderr
    assert len(read_state(images / "out" / "review-reviewer.jsonl").decisions) == 5
    again = eosin("review", *common(images), "--page")
    assert again.exit_code == 0
    assert (images / "out" / "queue.html").read_text().count('"share"') == 2


def test_two_reviewers_export_together(images: Path) -> None:
    for name, keys in (("ada", "aaaaq"), ("bob", "rrrrq")):
        seeds = ("--seeds", images / "seeds.csv", "--size", 4, "--reviewer", name)
        assert eosin("review", *common(images), *seeds, keys=keys).exit_code == 0
    told = eosin("review", *common(images), "--export")
    assert "4 tiles that reviewers disagree on" in told.stdout
    assert (images / "out" / "conflicts.csv").is_file()


def test_what_cannot_be_begun(images: Path) -> None:
    assert isinstance(eosin("review", *common(images)).exception, QueryError)
    assert eosin("review", *common(images), "--shares", "1,2").exit_code == 2
    seeds = ("--seeds", images / "seeds.csv")
    assert eosin("review", *common(images), *seeds, keys="q").exit_code == 0
    twice = eosin("review", *common(images), *seeds, keys="q").exception
    assert isinstance(twice, StoreError)
    assert "there already" in str(twice)


def test_hard_examples(images: Path) -> None:
    table = pd.read_csv(images / "cohort.csv")
    y = (table["label"] == "b").to_numpy()
    score = np.where(y, 0.9, 0.1)
    score[[5, 9, 10, 20]] = 1 - score[[5, 9, 10, 20]]
    split = np.where(table["patient_id"].isin(["p00", "p01", "p02", "p03"]), "tune", "test")
    rows = {"row": np.arange(60) + 2, "split": split, "label": y.astype(int), "score": score}
    predictions = images / "predictions_texture.csv"
    pd.DataFrame({**rows, "group": table["patient_id"]}).to_csv(predictions, index=False)
    where = (images, images / "cohort.csv", predictions, "--encoder", "texture", "--out", images / "hard")
    told = json.loads(eosin("hard-examples", *where, "--json").stdout)
    assert told["errors"] == 4
    assert sorted(one["row"] - 2 for one in told["rows"]) == [5, 9, 10, 20]
    shown = eosin("hard-examples", *where)
    assert "truly confusable" in shown.stdout
    assert (images / "hard" / "hard_examples.html").is_file()


@pytest.mark.parametrize("command", ["review", "hard-examples"])
def test_help(command: str) -> None:
    told = eosin(command, "--help")
    assert told.exit_code == 0
    assert "--json" in told.output
    assert "--out" in told.output
