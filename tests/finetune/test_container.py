from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import container_model
import numpy as np
import orjson
import pytest
from cellgen import pixels
from test_challenge import inputs, stack_file

import slidegen
from eosin.errors import CheckpointError, CohortError, ConfigError
from eosin.finetune.challenge import REGION, REGION_ANSWER, STACK, STACK_ANSWER, check_answer
from eosin.finetune.container import find_loader, main, model_folder, run

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """A stack of three pages at /input, a model, and nothing yet at /output."""
    folder = inputs(tmp_path / "input", STACK, STACK)
    stack_file(folder / "stack.tif", np.stack([pixels(seed) for seed in range(3)]))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "threshold.txt").write_text("0.3")
    return tmp_path


def places(root: Path, loader: str = "container_model:load") -> list[str]:
    return [f"--{name}={root / name}" for name in ("input", "output", "model")] + [f"--load={loader}"]


def test_the_container_as_it_is_started(stack: Path) -> None:
    command = [sys.executable, *re.findall(r'"([^"]+)"', DOCKERFILE.split("ENTRYPOINT")[1])[1:], *places(stack)]
    # Whatever imports torch fails: only a model's loader should.
    (stack / "without" / "torch").mkdir(parents=True)
    (stack / "without" / "torch" / "__init__.py").write_text("raise AssertionError('torch was imported')")
    paths = os.pathsep.join(str(path) for path in (stack / "without", ROOT / "src", ROOT / "tests" / "finetune"))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "wrote" in done.stderr
    calls, confidence = check_answer(json.loads((stack / "output" / STACK_ANSWER).read_text()), 3)
    want = np.array([pixels(seed)[0, 0, 0] for seed in range(3)]) / np.float32(255)
    assert np.array_equal(confidence, want.astype(np.float64))
    assert np.array_equal(calls, want >= 0.3)


def test_what_is_wrong_is_said_in_one_line(stack: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(places(stack, "container_model:load_nothing")) == 1
    assert main(places(stack, "container_model:load_detector")) == 1
    (stack / "model" / "threshold.txt").unlink()
    assert main(places(stack)) == 1
    said = [record.getMessage() for record in caplog.records]
    assert re.match(r"ConfigError: --load container_model:load_nothing", said[0])
    assert re.match(r"ConfigError: the model in .* is a Detector without scores;", said[1])
    assert re.match(r"CheckpointError: no model: .*upload the model's tarball", said[2])
    assert not (stack / "output").exists()


def test_a_region_goes_to_the_detector(tmp_path: Path) -> None:
    folder = inputs(tmp_path / "input", REGION, "histopathology-roi-cropout")
    style = slidegen.TiffStyle(flavour="generic", mpp=0.25, factors=())
    slidegen.write_tiff(folder / "350.tiff", slidegen.coordinates(300, 300), style)
    path = run(tmp_path / "input", tmp_path / "output", folder=tmp_path, load=container_model.load_detector)
    assert path.name == REGION_ANSWER
    assert orjson.loads(path.read_bytes())["points"][0]["point"] == [0.025, 0.01, 0]


def test_inputs_of_no_task_are_refused(tmp_path: Path) -> None:
    inputs(tmp_path, "whole-slide", "x")
    with pytest.raises(CohortError, match=f"lists whole-slide; needed is {STACK} or {REGION}"):
        run(tmp_path, tmp_path, folder=tmp_path, load=container_model.load_detector)


def test_the_first_folder_with_files_is_the_model(tmp_path: Path) -> None:
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "a").touch()
    assert model_folder([tmp_path / "gone", tmp_path / "empty", tmp_path / "full"]) == tmp_path / "full"
    with pytest.raises(CheckpointError, match="missing or empty"):
        model_folder([tmp_path / "empty"])


@pytest.mark.parametrize(
    "name", ["nomodule_of_this_name:load", "container_model:gone", "container_model:NOT_A_FUNCTION", ":"]
)
def test_a_loader_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--load {name}"):
        find_loader(name)


def test_the_container_file_keeps_the_platforms_rules() -> None:
    lines = [line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    words = [line.split()[0] for line in lines]
    assert "--platform=linux/amd64" in lines[0]
    # Not root, and nothing that needs root after that.
    assert lines[-2:] == ["USER user", 'ENTRYPOINT ["python", "-m", "eosin.finetune.container"]']
    assert words.index("USER") == len(words) - 2
    (environment,) = [line for line in lines if line.startswith("ENV")]
    assert "HF_HUB_OFFLINE=1" in environment
    assert "TRANSFORMERS_OFFLINE=1" in environment
    # What is copied exists, and is let through to the build.
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    let_through = re.findall(r"^!(.+)$", (ROOT / "docker" / "Dockerfile.dockerignore").read_text(), re.M)
    assert copied
    assert set(copied) <= set(let_through)
    assert all((ROOT / name).exists() for name in copied)
