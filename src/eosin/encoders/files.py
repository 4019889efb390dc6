"""Read tensors and configurations from disk: safetensors, or torch files without code."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eosin.errors import WeightsError, WeightsUnavailableError

INDEX = "model.safetensors.index.json"
USUAL = ("model.safetensors", "pytorch_model.bin")


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Return the checkpoint in `path`; nothing in it is executed.

    Raises:
        WeightsError: a pickle that holds code, or a file that is broken.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, or is broken; it is not read, as that would run its code. "
            f"Ask its author for safetensors ({_first_line(error)})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path} is broken or no weights file: {_first_line(error)}") from error
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}, needed: a mapping of names to tensors")
    return checkpoint


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_model(get: Callable[[str], Path], *, name: str, file: str = "") -> Mapping[str, Any]:
    """Return the checkpoint of a repository or folder, in one file or in shards.

    Args:
        get: file name to local path; raises `WeightsUnavailableError` where there is none.
        name: what the user asked for.
        file: its file name, "" for the usual ones.
    """
    refusal: WeightsUnavailableError | None = None
    for candidate in (file,) if file else (*USUAL, INDEX):
        try:
            path = get(candidate)
        except WeightsUnavailableError as error:
            if "not found" not in str(error):
                raise
            refusal = refusal or error
            continue
        if candidate != INDEX:
            return read_tensors(path)
        shards = sorted(set(read_json(path)["weight_map"].values()))
        return {key: value for shard in shards for key, value in read_tensors(get(shard)).items()}
    raise refusal or WeightsUnavailableError(f"{name}: no weights")


def folder_getter(folder: Path) -> Callable[[str], Path]:
    """Return a getter of the files of a local folder."""

    def get(filename: str) -> Path:
        path = folder / filename
        if not path.is_file():
            raise WeightsUnavailableError(f"not found: {folder} has no {filename}")
        return path

    return get


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or raise `WeightsError`."""
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return value
