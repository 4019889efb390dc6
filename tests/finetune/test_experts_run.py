"""A second encoder through a whole run: trained, saved, loaded, in the ensemble, and on the record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import typer
from safetensors.torch import save_file
from traingen import classifier, job, quick, write_cells, write_encoder
from typer.testing import CliRunner

from eosin.cli.finetune import _mix
from eosin.cli.finetune import finetune as command
from eosin.encoders import get_spec, load_encoder
from eosin.errors import ConfigError, GeometryError, LabelError
from eosin.evaluation.report import Report
from eosin.features.recipe import canonical_json
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.cells import read_tiles
from eosin.finetune.classifier import Classifier
from eosin.finetune.distil import DistilConfig, Distillation
from eosin.finetune.experts import Mixture
from eosin.finetune.infer import MODEL, Ensemble, input_of, load_classifier
from eosin.finetune.recipe import get_recipe
from eosin.finetune.run import finetune
from eosin.finetune.saving import read_saved, trained_state
from eosin.finetune.tables import read_table
from eosin.finetune.train import train_fold

CHANNELS = [8, 8, 16, 32]
CONFIG = replace(quick(), epochs=2, lr=1e-2, folds=2)


def write_cnn(folder: Path) -> Path:
    """Write a small ResNet as timm saves it: weights and config.json."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("resnet10t", num_classes=0, channels=CHANNELS)
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    told = {"architecture": "resnet10t", "model_args": {"channels": CHANNELS}, "pretrained_cfg": {"mean": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("experts")
    write_cells(folder / "data", slides=16, external=2)
    write_encoder(folder / "tiny.safetensors")
    write_cnn(folder / "cnn")
    return folder, run(folder)


def run(folder: Path, **more: Any) -> Report:
    given = {"expert": str(folder / "cnn"), "external": ("dataset", "other"), "device": "cpu", "resamples": 20, **more}
    return finetune(folder / "data", str(folder / "tiny.safetensors"), CONFIG, out=folder / "out", **given)


@pytest.mark.slow
def test_both_encoders_are_on_the_record(mixed: tuple[Path, Report]) -> None:
    folder, report = mixed
    record = json.loads((folder / "out" / "run.json").read_text())
    hashes = [load_encoder(folder / name, device="cpu").spec.weights_hash for name in ("tiny.safetensors", "cnn")]
    assert [record["weights_hash"], record["expert_weights_hash"]] == hashes
    assert record["recipe"]["expert"]["mode"] == "full"
    for at in (1, 2):
        saved = read_saved(folder / "out" / MODEL / f"fold-0{at}.safetensors")
        assert [branch.weights_hash for branch in saved.branches] == hashes
        assert [branch.config.mode for branch in saved.branches] == ["lora", "full"]
    html = (folder / "out" / "report.html").read_text()
    assert "mixed by a gate with" in html
    assert hashes[1] in html
    model = load_classifier(folder / "out").models[0]
    assert isinstance(model, Mixture)
    assert report.sections["run"]["parameters"] == sum(p.numel() for p in model.parameters())
    cnn = sum(p.numel() for p in model.branches[1].parameters())
    lora = 2 * 2 * 8 * (64 + 64) + 65  # blocks, q and v, rank; head
    assert report.sections["run"]["trained"] == cnn + lora + (64 + 32) * 2 + 2


@pytest.mark.slow
def test_the_folder_answers_by_itself_with_both(mixed: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = mixed
    table = pd.read_csv(folder / "out" / "external.csv")
    cells = read_table(folder / "data")
    tiles = read_tiles(cells, cells.dataset == "other")
    moved = [(folder / name, tmp_path / name) for name in ("tiny.safetensors", "cnn")]
    for source, target in moved:
        source.rename(target)
    try:
        loaded = load_classifier(folder / "out")
    finally:
        for source, target in moved:
            target.rename(source)
    assert loaded.scores(tiles) == pytest.approx(table["p_atypical"].to_numpy(), abs=1e-6)
    gates = [model.gate.weight for model in loaded.models if isinstance(model, Mixture)]
    assert len(gates) == 2
    assert all(float(gate.detach().abs().max()) > 1e-4 for gate in gates)  # it starts at zero
    single = load_classifier(folder / "out", folds=(1,))
    assert single.scores(tiles) == pytest.approx(loaded.predict(tiles).fold_p[1])


@pytest.mark.slow
def test_goes_on_and_refuses_another_expert(mixed: tuple[Path, Report], tmp_path: Path) -> None:
    folder, report = mixed
    told: list[object] = []
    assert run(folder, progress=told.append).to_json() == report.to_json()
    assert told == []
    with pytest.raises(ConfigError, match=r"holds another run: expert: '.*cnn' -> None"):
        run(folder, expert="")


def test_an_expert_needs_a_name_and_soft_labels_votes(tmp_path: Path) -> None:
    write_cells(tmp_path / "data", slides=4)
    write_encoder(tmp_path / "tiny.safetensors")
    given = {"out": tmp_path / "out", "device": "cpu"}
    for changes, error, said in (
        ({"expert": AdaptConfig(mode="full")}, ConfigError, "none is named; name it with --expert"),
        ({"soft_labels": True}, LabelError, "no vote of 24 cells differs from its label"),
    ):
        with pytest.raises(error, match=said):
            finetune(tmp_path / "data", str(tmp_path / "tiny.safetensors"), replace(CONFIG, **changes), **given)
    assert not (tmp_path / "out").exists()


def test_the_input_is_whole_patches_of_both() -> None:
    fourteen, sixteen = get_spec("dinov2-vits14"), get_spec("dinov3-vits16")
    cnn = sixteen.replace(name="cnn", patch_px=32)
    assert input_of(sixteen, tile_px=120, expert=cnn).side_px == 96
    assert input_of(fourteen, tile_px=128, input_px=224, expert=cnn).side_px == 224
    with pytest.raises(GeometryError, match="dinov2-vits14 with cnn takes sides that are a multiple of 224 px"):
        input_of(fourteen, tile_px=128, expert=cnn)


def test_a_recipe_without_an_expert_is_what_it_was_before_there_were_any() -> None:
    plain, both = get_recipe("amf"), get_recipe("amf", expert=AdaptConfig(mode="full"))
    told = {name: value for name, value in plain.to_dict().items() if name != "expert"}
    assert plain.hash == hashlib.sha256(canonical_json(told).encode()).hexdigest()
    assert both.hash != plain.hash


def test_a_mixture_can_teach(tmp_path: Path) -> None:
    given, student = job(tmp_path), classifier(tmp_path, seed=2).eval()
    teacher = Mixture([classifier(tmp_path), classifier(tmp_path, seed=1)])
    lesson = Distillation(
        student, Ensemble([teacher], given.how, threshold=0.5), DistilConfig(feature=1.0), identity="x"
    )
    assert isinstance(lesson.module, torch.nn.Linear)
    assert lesson.module.weight.shape == (128, 64)
    seen = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    logits, loss = lesson(student, given.how.prepare(seen), seen)
    assert (logits.shape, loss.shape) == ((3, 1), (3,))
    vectors, answers = teacher.answer(given.how.prepare(seen))
    torch.testing.assert_close(answers, teacher(given.how.prepare(seen)))
    one = next(part for part in teacher.branches if isinstance(part, Classifier))
    normed = torch.nn.functional.layer_norm(one.vector(given.how.prepare(seen)), (64,))
    torch.testing.assert_close(vectors[:, :64], normed)


# The command line.


def app() -> typer.Typer:
    found = typer.Typer()
    found.command()(command)
    return found


def call(folder: Path, *more: str) -> list[str]:
    return [
        *("amf", "--data", str(folder / "data"), "--encoder", str(folder / "tiny.safetensors"), "--device", "cpu"),
        *("--epochs", "1", "--folds", "2", "--without", "all", "--tta", "none", "--out", str(folder / "cli"), *more),
    ]


def with_votes(folder: Path) -> None:
    """Give every cell three votes, of which one now and then disagrees."""
    path = folder / "data" / "labels.csv"
    table, rng = pd.read_csv(path), np.random.default_rng(0)
    words, other = np.array(["NMF", "AMF"]), rng.random(len(table)) < 0.3
    for at in (1, 2, 3):
        table[f"expert{at}"] = words[np.where(other & (at == 3), 1 - table["atypical"], table["atypical"])]
    table.to_csv(path, index=False)


@pytest.mark.slow
def test_expert_votes_and_mixing_from_the_command_line(tmp_path: Path) -> None:
    write_cells(tmp_path / "data", slides=16, external=2)
    with_votes(tmp_path)
    write_encoder(tmp_path / "tiny.safetensors")
    write_cnn(tmp_path / "cnn")
    more = ("--expert", str(tmp_path / "cnn"), "--soft-labels", "--mix", "mixup")
    done = CliRunner().invoke(app(), call(tmp_path, *more))
    assert done.exit_code == 0, done.output
    recipe = json.loads((tmp_path / "cli" / "run.json").read_text())["recipe"]
    assert recipe["soft_labels"] is True
    assert (recipe["mix"]["mixup_chance"], recipe["mix"]["cutmix_chance"]) == (0.5, 0.0)
    assert recipe["expert"]["mode"] == "full"
    cells = read_table(tmp_path / "data")
    assert np.unique((3 * cells.soft).round()).tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_soft_labels_are_what_is_trained_on(tmp_path: Path) -> None:
    """Votes against every label train as the other label would."""
    config = quick(epochs=1, sampling="shuffle", domain_weights="none", lr=1e-2)
    given = job(tmp_path, config=config)
    other = (1 - given.cells.label).astype(np.int8)
    voted = replace(given.cells, soft=other.astype(np.float32))
    swapped = np.where(np.isin(np.arange(len(other)), given.fold.train), other, given.cells.label)
    states = []
    for cells, soft in ((voted, True), (replace(given.cells, label=swapped.astype(np.int8)), False), (voted, False)):
        model = classifier(tmp_path)
        train_fold(model, replace(given, cells=cells, config=replace(config, soft_labels=soft)))
        states.append({name: value.clone() for name, value in trained_state(model).items()})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_mix_is_mixup_or_cutmix() -> None:
    assert _mix("") is None
    cut = _mix("cutmix")
    assert (cut.mixup_chance, cut.cutmix_chance) == (0.0, 0.5)
    with pytest.raises(typer.BadParameter, match="'both' is not mixup or cutmix"):
        _mix("both")


def test_soft_labels_without_votes_end_the_command(tmp_path: Path) -> None:
    write_cells(tmp_path / "data", slides=4)
    write_encoder(tmp_path / "tiny.safetensors")
    done = CliRunner().invoke(app(), call(tmp_path, "--soft-labels"))
    assert isinstance(done.exception, LabelError)
