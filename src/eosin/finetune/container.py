"""What a challenge container runs: find the model, answer the inputs, stop.

    python -m eosin.finetune.container [--input DIR] [--output DIR] [--model DIR] [--load MODULE:FUNCTION]

`--load` names what turns the model folder into an object with `threshold` and `scores` (task 2) or `detect` (task 1);
see `challenge.CellDetector` and `cascade.CellClassifier`. A classifier of one's own goes into the container that way.
"""

from __future__ import annotations

import argparse
import logging
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eosin.errors import CheckpointError, CohortError, ConfigError, EosinError
from eosin.finetune.challenge import REGION, STACK, read_sockets, run_region, run_stack

_LOG = logging.getLogger("eosin.container")

LOADER = "eosin.finetune.infer:load_classifier"
# Where the platform unpacks an uploaded model, and where an image may carry its own.
MODEL_FOLDERS = (Path("/opt/ml/model"), Path("/opt/app/model"))
# Task -> what its model must be able to do.
_NEEDS = {STACK: "scores", REGION: "detect"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the inputs and return the exit status: 0, or 1 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m eosin.finetune.container", description="Answer MIDOG 2025 inputs.")
    parser.add_argument("--input", type=Path, default=Path("/input"))
    parser.add_argument("--output", type=Path, default=Path("/output"))
    parser.add_argument("--model", type=Path, help="by default the first of /opt/ml/model, /opt/app/model with files")
    parser.add_argument("--load", default=LOADER, metavar="MODULE:FUNCTION")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        folder = model_folder(MODEL_FOLDERS if asked.model is None else (asked.model,))
        path = run(asked.input, asked.output, folder=folder, load=find_loader(asked.load))
    except EosinError as error:
        _LOG.error("%s: %s", type(error).__name__, error)
        return 1
    _LOG.info("wrote %s", path)
    return 0


def run(input_dir: Path, output_dir: Path, *, folder: Path, load: Callable[[Path], Any]) -> Path:
    """Answer whichever task `inputs.json` asks for with the model in `folder`; return the file written.

    Raises:
        CohortError: inputs of neither task.
        ConfigError: a model that cannot do the task, or has no threshold.
    """
    slugs = [socket.slug for socket in read_sockets(input_dir)]
    if len(slugs) != 1 or slugs[0] not in _NEEDS:
        raise CohortError(f"inputs.json lists {', '.join(slugs) or 'nothing'}; needed is {STACK} or {REGION}")
    model = load(folder)
    missing = [name for name in (_NEEDS[slugs[0]], "threshold") if not hasattr(model, name)]
    if missing:
        raise ConfigError(
            f"the model in {folder} is a {type(model).__name__} without {' and '.join(missing)}; "
            f"{slugs[0]} needs {_NEEDS[slugs[0]]}() and a threshold chosen out of fold"
        )
    threshold = float(model.threshold)
    if slugs[0] == STACK:
        return run_stack(model, input_dir=input_dir, output_dir=output_dir, threshold=threshold)
    return run_region(model, input_dir=input_dir, output_dir=output_dir, threshold=threshold)


def model_folder(folders: Sequence[Path]) -> Path:
    """Return the first of `folders` that holds anything.

    Raises:
        CheckpointError: none does.
    """
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    raise CheckpointError(
        f"no model: {' and '.join(map(str, folders))} missing or empty; upload the model's tarball with the container"
    )


def find_loader(name: str) -> Callable[[Path], Any]:
    """Return the function that "module:function" names.

    Raises:
        ConfigError: no such module or function.
    """
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--load {name}: {error}; needed is MODULE:FUNCTION that takes the model's folder") from error
    if not callable(found):
        raise ConfigError(f"--load {name} is no function but a {type(found).__name__}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
