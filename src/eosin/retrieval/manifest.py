"""`index.json`, the lock and the disk errors of a folder that holds a search index, whatever its engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from eosin.errors import IndexCorruptError, IndexLockedError, IndexStoreError, StoreError
from eosin.features.writer import disk_error, fsync_folder, replace_durably
from eosin.retrieval.protocol import IndexSpec

FORMAT = "eosin-index"
FORMAT_VERSION = 1
NAME = "index.json"
BUILD = "build.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `index.json` says.

    Attributes:
        spec: of the index.
        engine: who reads the other files, such as ``"exact"``.
        complete: False from the first moment of making the index until its engine has made its files.
        state: what the engine keeps here, JSON types.
    """

    spec: IndexSpec
    engine: str
    complete: bool = True
    state: Mapping[str, Any] = field(default_factory=dict)


def is_index(path: Path) -> bool:
    """Return whether the folder holds an index, finished or not."""
    return (path / NAME).is_file()


def read_manifest(path: Path) -> Manifest:
    """Return what `path` says of its index.

    Raises:
        IndexStoreError: no index there, or of a newer format.
        IndexCorruptError: `index.json` cannot be read.
    """
    file = path / NAME
    if not file.is_file():
        raise IndexStoreError(
            f"{path} is not a search index (no {NAME}); make one with: eosin index FEATURES --out DIR"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}")
        version = int(data["version"])
        if version <= FORMAT_VERSION:
            return Manifest(
                spec=IndexSpec.from_dict(data["spec"]),
                engine=str(data["engine"]),
                complete=bool(data["complete"]),
                state=dict(data["state"]),
            )
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise IndexCorruptError(
            f"{file} cannot be used ({error!r}); restore it, or delete the folder and make the index again"
        ) from error
    raise IndexStoreError(f"{path} has index format {version}, this eosin reads up to {FORMAT_VERSION}: upgrade eosin")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `index.json` in one step: a reader sees the old or the new, never half of it."""
    data = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "engine": manifest.engine,
        "complete": manifest.complete,
        "spec": manifest.spec.to_dict(),
        "state": dict(manifest.state),
    }
    _write_json(path / NAME, data)


def start_build(path: Path, about: Mapping[str, Any]) -> None:
    """Note that an index is being filled: until `finish_build`, `open_index` says that it is not whole."""
    _write_json(path / BUILD, {"finished": False, **about})


def finish_build(path: Path, about: Mapping[str, Any], outcome: Mapping[str, Any]) -> None:
    """Note that every slide has been dealt with, and what came of it."""
    _write_json(path / BUILD, {"finished": True, **about, **outcome})


def check_build(path: Path) -> None:
    """Raise if an index is being filled, or filling it was interrupted.

    Raises:
        IndexCorruptError: it is not whole; the message says what to do.
    """
    file = path / BUILD
    try:
        finished = not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["finished"]
    except (KeyError, ValueError, TypeError) as error:
        raise IndexCorruptError(f"{file} cannot be used ({error!r}); run the same eosin index command again") from error
    if not finished:
        raise IndexCorruptError(
            f"{path} holds only some of its slides: eosin index is still running or was interrupted. Run the same "
            "command again, it goes on where it stopped; or open the index with partial=True"
        )


ELSEWHERE = "is open for writing elsewhere; close that index, or wait until its process ends"


def lock_index(path: Path, name: str = ".lock", held: str = ELSEWHERE) -> BaseFileLock:
    """Return the held lock of the one process that may write the index; release it when done.

    Args:
        path: folder of the index.
        name: of the lock's file.
        held: what is said where another holds it.

    Raises:
        IndexLockedError: another process, or another open index of this one, holds it.
    """
    lock = FileLock(path / name, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise IndexLockedError(f"{path} {held}") from error
    except OSError as error:
        raise disk_trouble(error, path) from error
    return lock


def disk_trouble(error: OSError, path: Path) -> IndexStoreError:
    """Return the error that says what the disk refused, with the free space if it is full."""
    known = disk_error(error, path)
    if isinstance(known, StoreError):
        where = str(known).split("; nothing")[0]
        return IndexStoreError(f"{where}; every point stored before is kept: make room, then run the same again")
    return IndexStoreError(f"{path} cannot be written: {error}; every point stored before is kept")


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        replace_durably(temporary, file)
        fsync_folder(file.absolute().parent.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_trouble(error, file.parent) from error
