"""Distillation of a whole run: each fold is taught by its own teacher, the folder answers by itself, and bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from PIL import Image
from traingen import quick, write_cells, write_encoder
from typer.testing import CliRunner

from eosin.cli.distil import distil as command
from eosin.encoders import load_encoder
from eosin.encoders.encoder import Encoder
from eosin.errors import CheckpointError, CohortError, ConfigError
from eosin.evaluation.metrics import auroc
from eosin.evaluation.report import Report
from eosin.finetune import teacher as teacher_module
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.cells import read_tiles
from eosin.finetune.classifier import Classifier
from eosin.finetune.distil import DistilConfig
from eosin.finetune.distil_run import distil
from eosin.finetune.folds import plan_folds
from eosin.finetune.infer import MODEL, input_of, load_classifier
from eosin.finetune.run import finetune
from eosin.finetune.saving import load_trained, trained_state
from eosin.finetune.tables import read_table
from eosin.finetune.teacher import read_teacher
from eosin.finetune.train import Job

pytestmark = pytest.mark.slow

TEACHER = replace(quick(), epochs=3, lr=1e-2, seed=3)
STUDENT = quick(adapt=AdaptConfig(mode="full"), epochs=2, lr=1e-3)
OTHER = ("dataset", "other")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A teacher of three folds, and a student of it in "student"."""
    folder = tmp_path_factory.mktemp("distil")
    write_cells(folder / "data", slides=14, external=2)
    write_encoder(folder / "tiny.safetensors")
    write_encoder(folder / "small.safetensors", seed=7)
    finetune(
        folder / "data", str(folder / "tiny.safetensors"), TEACHER, out=folder / "run", external=OTHER, device="cpu",
        resamples=20,
    )  # fmt: skip
    return folder, run(folder, "student")


def run(folder: Path, out: str, *, data: Any = None, teacher: str = "run", **more: Any) -> Report:
    return distil(
        folder / "data" if data is None else data, str(folder / "small.safetensors"), STUDENT,
        DistilConfig(), teacher=folder / teacher, out=folder / out, device="cpu", resamples=20, **more,
    )  # fmt: skip


def job_of(folder: Path, at: int) -> Job:
    """Return one fold of the student's, with cells of its own."""
    table = read_table(folder / "data")
    own = table.take(table.dataset == "own")
    config = read_teacher(folder / "run", DistilConfig()).student_config(STUDENT)
    how = input_of(student(folder).spec, tile_px=128)
    return Job(cells=own, tiles=read_tiles(own), fold=plan_folds(own, config)[at], config=config, how=how)


def student(folder: Path) -> Classifier:
    found = load_encoder(folder / "small.safetensors", device="cpu", precision="fp32")
    assert isinstance(found, Encoder)
    return Classifier(found.backbone, STUDENT.adapt)


def test_the_folder_is_that_of_a_run_and_answers_by_itself(taught: tuple[Path, Report]) -> None:
    folder, report = taught
    out = folder / "student"
    assert Report.from_json((out / "report.json").read_text()).to_json() == report.to_json()
    table = pd.read_csv(out / "external.csv")
    cells = read_table(folder / "data")
    loaded = load_classifier(out)
    assert loaded.threshold == report.sections["threshold"]["threshold"]
    assert loaded.scores(read_tiles(cells, cells.dataset == "other")) == pytest.approx(
        table["p_atypical"].to_numpy(), abs=1e-6
    )
    html = (out / "report.html").read_text()
    for word in ("Teacher and student", "student, labels only", "saw nothing of the tested slides", "worst domain"):
        assert word in html
    record = json.loads((out / "run.json").read_text())["distillation"]
    assert record["folds"] == list(read_teacher(folder / "run", DistilConfig()).hashes)
    assert (record["temperature"], record["unlabelled"]) == (2.0, 0)


def test_teacher_and_student_stand_side_by_side(taught: tuple[Path, Report]) -> None:
    folder, report = taught
    told = report.sections["distillation"]
    for part, n in (("out_of_fold", 72), ("external", 12)):
        rows = {row["model"]: row for row in told[part]["models"]}
        assert list(rows) == ["teacher", "student", "alone"]
        assert told[part]["n"] == n
        assert (rows["teacher"]["same_calls"], rows["teacher"]["rank_correlation"]) == (1.0, pytest.approx(1.0))
        for pair in told[part]["differences"]:
            gap = rows[pair["a"]][pair["metric"]]["point"] - rows[pair["b"]][pair["metric"]]["point"]
            assert pair["point"] == pytest.approx(gap)
    for name, where in (("teacher", "run"), ("student", "student"), ("alone", "student/alone")):
        row = next(row for row in told["out_of_fold"]["models"] if row["model"] == name)
        theirs = Report.from_json((folder / where / "report.json").read_text()).sections["out_of_fold"]
        ba = next(r["point"] for r in theirs["calls"] if r["metric"] == "ba" and r["scope"] == "pooled")
        assert row["ba"]["point"] == pytest.approx(ba)  # as the run itself reports it
        kept = pd.read_csv(folder / where / "out-of-fold.csv")
        assert row["auroc"]["point"] == pytest.approx(auroc(kept["atypical"], kept["p_atypical"]))
        ranked = next(r["point"] for r in theirs["scores"] if r["metric"] == "auroc" and r["scope"] == "pooled")
        assert row["auroc"]["point"] == pytest.approx(ranked)
        brier = next(r["point"] for r in theirs["scores"] if r["metric"] == "brier" and r["scope"] == "pooled")
        assert row["brier"]["point"] == pytest.approx(brier)


def test_the_student_has_the_folds_of_its_teacher(taught: tuple[Path, Report]) -> None:
    folder, _ = taught
    ours, theirs = (pd.read_csv(folder / name / "out-of-fold.csv") for name in ("student", "run"))
    assert (ours["file"] == theirs["file"]).all()
    assert (ours["fold"] == theirs["fold"]).all()
    changed = plan_folds(job_of(folder, 0).cells, STUDENT)  # seed 0: other folds
    assert any(not np.array_equal(a.test, job_of(folder, at).fold.test) for at, a in enumerate(changed))


def test_each_fold_is_taught_by_its_own_teacher(taught: tuple[Path, Report]) -> None:
    folder, _ = taught
    guide = read_teacher(folder / "run", DistilConfig())
    for at in range(3):
        _, lesson = guide.teach(at, job_of(folder, at), student(folder))
        (used,) = lesson.teacher.models
        tiny = load_encoder(folder / "tiny.safetensors", device="cpu", precision="fp32")
        assert isinstance(tiny, Encoder)
        own, _ = load_trained(folder / "run" / "folds" / f"0{at + 1}" / "trained.safetensors", [tiny])
        theirs, ours = trained_state(own), {**trained_state(own), **dict(used.named_parameters())}
        assert all(torch.equal(ours[name], theirs[name]) for name in ("head.weight", "head.bias"))


def test_a_run_asks_each_teacher_for_its_own_fold_alone(
    taught: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _ = taught
    asked: list[Any] = []

    def spy(where: Path, **how: Any) -> Any:
        asked.append(how["folds"])
        return load_classifier(where, **how)

    monkeypatch.setattr(teacher_module, "load_classifier", spy)
    run(folder, "student")  # goes on, with nothing left to train
    assert asked == [(0,), (1,), (2,)]


def test_models_of_other_folds_are_refused(taught: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = taught
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    one, two = (copy / MODEL / f"fold-0{at}.safetensors" for at in (1, 2))
    one.rename(tmp_path / "kept")
    two.rename(one)
    (tmp_path / "kept").rename(two)
    swapped = read_teacher(copy, DistilConfig())
    with pytest.raises(CheckpointError, match=r"the model of fold 1 .* does not give the predictions in out-of-fold"):
        swapped.teach(0, job_of(folder, 0), student(folder))
    with pytest.raises(ConfigError, match="a teacher that has seen the tested cells would tell their answers"):
        read_teacher(folder / "run", DistilConfig()).teach(1, job_of(folder, 0), student(folder))


def test_another_table_is_refused(taught: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = taught
    cells = read_table(folder / "data")
    fewer, label, file = cells.take(np.arange(len(cells)) != 3), cells.label.copy(), cells.file.copy()
    label[5] = 1 - label[5]
    file[2], file[3] = file[3], file[2]
    for data, said in (
        (fewer, "was trained on 72 cells, the table has 71"),
        (replace(cells, label=label), "1 cells have another label than when run was trained"),
        (replace(cells, file=file), "2 cells have another file, such as row 2 with 'cell-003.png'"),
    ):
        with pytest.raises(CohortError, match=said):
            distil(
                data, str(folder / "small.safetensors"), STUDENT, DistilConfig(), teacher=folder / "run",
                out=tmp_path / "out", device="cpu",
            )  # fmt: skip


def test_a_run_that_cannot_teach_is_refused(taught: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = taught
    with pytest.raises(CheckpointError, match=r"is no finished run of eosin finetune: it has no run\.json"):
        read_teacher(tmp_path, DistilConfig())
    copy = shutil.copytree(folder / "run", tmp_path / "run")
    (copy / MODEL / "fold-02.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"fold-02\.safetensors does not exist"):
        read_teacher(copy, DistilConfig())
    kept = (copy / MODEL / "fold-01.safetensors").read_bytes()
    (copy / MODEL / "fold-02.safetensors").write_bytes(kept)
    table = pd.read_csv(copy / "out-of-fold.csv")
    table[table["fold"] != "fold 3"].to_csv(copy / "out-of-fold.csv", index=False)
    with pytest.raises(CheckpointError, match="3 folds, holds the models of 3 and the predictions of 2"):
        read_teacher(copy, DistilConfig())
    table.drop(columns="fold").to_csv(copy / "out-of-fold.csv", index=False)
    with pytest.raises(CheckpointError, match=r"is damaged .*fold"):
        read_teacher(copy, DistilConfig())
    (copy / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_teacher(copy, DistilConfig())


def test_another_temperature_is_another_run(taught: tuple[Path, Report]) -> None:
    folder, _ = taught
    with pytest.raises(ConfigError, match=r"distillation\.temperature: 2\.0 -> 4\.0"):
        distil(
            folder / "data", str(folder / "small.safetensors"), STUDENT, DistilConfig(temperature=4.0),
            teacher=folder / "run", out=folder / "student", device="cpu",
        )  # fmt: skip


def test_unlabelled_cells_of_held_out_slides_are_not_shown(taught: tuple[Path, Report], tmp_path: Path) -> None:
    """Copies of the teacher's own cells: by their pixels, and where the table says so by their slides."""
    folder, _ = taught
    cells = read_table(folder / "data")
    given = job_of(folder, 0)
    held = set(given.cells.file[np.concatenate((given.fold.stop, given.fold.test))].tolist())
    for name in cells.file.tolist():
        shutil.copy(folder / "data" / name, tmp_path / f"copy-{name}")
    fresh = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(fresh).save(tmp_path / "new.png")
    Image.fromarray(fresh[::-1]).save(tmp_path / "turned.png")
    guide = guide_with(folder, tmp_path)
    assert guide.record["distillation"]["unlabelled"] == 84 + 2 - 12  # none of the external cells
    job, _ = guide.teach(0, given, student(folder))
    shown = {name.removeprefix("copy-") for name in job.cells.file[job.unlabelled].tolist()}
    assert shown == set(given.cells.file.tolist()) - held | {"new.png", "turned.png"}
    slide = given.cells.slide_id[given.fold.test[0]]
    lines = ["file,dataset,slide_id", f"new.png,own,{slide}", "turned.png,own,unseen"]
    (tmp_path / "more.csv").write_text("\n".join(lines) + "\n")
    job, _ = guide_with(folder, tmp_path / "more.csv").teach(0, given, student(folder))
    assert job.cells.slide_id[job.unlabelled].tolist() == ["unseen"]
    whole = guide_with(folder, folder / "data" / "labels.csv")  # with labels, which nobody asks for
    assert whole.record["distillation"]["unlabelled"] == 72
    assert len(whole.teach(0, given, student(folder))[0].unlabelled) == 72 - len(held)


def guide_with(folder: Path, source: Path) -> Any:
    from eosin.finetune.distil_run import _unlabelled

    table = read_table(folder / "data")
    guide = read_teacher(folder / "run", DistilConfig())
    return replace(guide, unlabelled=_unlabelled(source, table.take(table.dataset == "other")))


def test_no_pictures_without_labels(taught: tuple[Path, Report], tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="has no pictures"):
        guide_with(taught[0], tmp_path)


def test_from_the_command_line_with_unlabelled_cells(taught: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = taught
    for name in ("cell-000.png", "cell-001.png", "cell-010.png", "cell-020.png"):
        picture = np.asarray(Image.open(folder / "data" / name))[::-1]
        Image.fromarray(picture).save(tmp_path / name)
    app = typer.Typer()
    app.command()(command)
    options = ("--data", str(folder / "data"), "--encoder", str(folder / "small.safetensors"), "--device", "cpu")
    how = (
        "--epochs",
        "1",
        "--without",
        "all",
        "--tta",
        "none",
        "--unlabelled",
        str(tmp_path),
        "--compare",
        "smooth-l1",
    )
    call = ["--teacher", str(folder / "run"), *options, "--out", str(folder / "cli"), *how]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    for line in ("AUROC, student, taught - student, labels only: ", "balanced accuracy, student, taught - teacher: "):
        assert line in done.stdout
    assert json.loads((folder / "cli" / "run.json").read_text())["distillation"]["unlabelled"] == 4
    again = CliRunner().invoke(app, [*call, "--json"])
    assert json.loads(again.stdout)["distillation"]["models"]["student"]["encoder"].endswith("small.safetensors")
