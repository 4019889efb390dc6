"""Weights kept in a folder of your own: import once, verify at every load, no network. No torch here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock

from eosin.encoders.registry import REGISTRY
from eosin.errors import WeightsError, WeightsUnavailableError

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_INDEX = "index.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsRow:
    """One line of `weights_status`.

    Attributes:
        name: encoder.
        have: whether its weights are in the folder.
        sha256: of the file, "" when it is not there.
        path: where the file is, None when it is not there.
        gated: whether the hub asks for an agreement.
        licence: licence of the weights.
    """

    name: str
    have: bool
    sha256: str
    path: Path | None
    gated: bool
    licence: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"path": str(self.path) if self.path else None}


def weights_home() -> Path:
    """Return the folder: $EOSIN_HOME/weights, or ~/.cache/eosin/weights."""
    home = os.environ.get("EOSIN_HOME")
    return Path(home) / "weights" if home else Path.home() / ".cache" / "eosin" / "weights"


def import_weights(name: str, file: str | Path) -> WeightsRow:
    """Copy a weights file into the folder under an encoder's name, with its sha256 in the index.

    Args:
        name: a registered encoder, or a name of your own (letters, digits, dots, dashes).
        file: .safetensors, .bin, .pth or .pt; its keys are checked when it is loaded.

    Raises:
        WeightsError: the name or the kind of file cannot be used.
        WeightsUnavailableError: no such file.
    """
    source = Path(file)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise WeightsError(f"{name!r} cannot name weights; use letters, digits, dots and dashes")
    if not source.is_file():
        raise WeightsUnavailableError(f"{source} is not a file")
    if source.suffix not in SUFFIXES:
        raise WeightsError(f"{source.name}: weights are {', '.join(SUFFIXES)} files")
    home = weights_home()
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"):
        target = home / f"{name}{source.suffix}"
        digest = _copy(source, target)
        index = _read_index(home)
        old = index.get(name, {}).get("file")
        index[name] = {"file": target.name, "sha256": digest, "bytes": target.stat().st_size, "from": source.name}
        _write(home / _INDEX, orjson.dumps(index, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        if old and old != target.name:
            (home / old).unlink(missing_ok=True)
    return _row(name, index, home)


def weights_status() -> list[WeightsRow]:
    """Return one row for every registered or imported encoder."""
    home = weights_home()
    index = _read_index(home)
    return [_row(name, index, home) for name in dict.fromkeys((*REGISTRY, *sorted(index)))]


def find_weights(name: str) -> Path | None:
    """Return the imported file of an encoder, None when there is none.

    Raises:
        WeightsError: the file is not the one that was imported.
    """
    home = weights_home()
    entry = _read_index(home).get(name)
    if entry is None:
        return None
    path = home / entry["file"]
    if not path.is_file():
        raise WeightsUnavailableError(
            f"{path} is in the index but gone; import it again: eosin encoders import FILE --name {name}"
        )
    found = file_sha256(path)
    if found != entry["sha256"]:
        raise WeightsError(f"{path} was altered: sha256 is {found[:12]}..., imported was {entry['sha256'][:12]}...")
    return path


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _row(name: str, index: dict[str, dict[str, Any]], home: Path) -> WeightsRow:
    spec, entry = REGISTRY.get(name), index.get(name)
    path = home / entry["file"] if entry else None
    have = (path is not None and path.is_file()) or (spec is not None and spec.source.startswith("builtin:"))
    return WeightsRow(
        name=name,
        have=have,
        sha256=entry["sha256"] if entry and have else "",
        path=path if have else None,
        gated=spec.gated if spec else False,
        licence=spec.licence if spec else "unknown",
    )


def _read_index(home: Path) -> dict[str, dict[str, Any]]:
    path = home / _INDEX
    if not path.is_file():
        return {}
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise WeightsError(f"{path} is not JSON ({error}); delete it and import the weights again") from error


def _copy(source: Path, target: Path) -> str:
    """Copy under a temporary name, hash what was written, rename; return the sha256."""
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".import-")
    try:
        with source.open("rb") as reader, os.fdopen(descriptor, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 22)
            writer.flush()
            os.fsync(writer.fileno())
        digest = file_sha256(Path(temporary))
        Path(temporary).replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    return digest


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
