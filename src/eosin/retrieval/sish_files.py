"""A `SishIndex` on disk: a folder of plain arrays, each with its checksum in `index.json`.

index.json      spec, the names of the files, their checksums; "complete" only when all of them are synced
keys.npy        and ids, centres
vectors.npy     memory-mapped when opened
column0.npy     payload, in the order of the spec's fields; names0.npy: the texts of a keyword field
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import IndexCorruptError, IndexStoreError
from eosin.features.writer import fsync_folder
from eosin.retrieval.codes import codebook_of, occupied_cells
from eosin.retrieval.engines import SISH
from eosin.retrieval.manifest import Manifest, disk_trouble, is_index, lock_index, read_manifest, write_manifest
from eosin.retrieval.sish import SishIndex

ENGINE = SISH
MAPPED = "vectors"
"""The one array that is not read, and so not checked by content, when an index is opened."""


def save_sish(index: SishIndex, path: str | Path) -> Path:
    """Write the index to a new folder and return it. Killed in between, the folder says that it is half-written.

    Raises:
        IndexStoreError: the folder holds a finished index or another engine's, or the disk is full.
        IndexLockedError: another process writes there.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_trouble(error, path) from error
    lock = lock_index(path)
    try:
        if is_index(path):
            there = read_manifest(path)
            if there.complete or there.engine != ENGINE:
                raise IndexStoreError(f"{path} holds an index already ({there.engine}); give another folder")
        elif any(file.name != ".lock" for file in path.iterdir()):
            raise IndexStoreError(f"{path} holds other files; give a new or an empty folder")
        write_manifest(path, Manifest(spec=index.spec, engine=ENGINE, complete=False))
        checks = {name: _write(path / f"{name}.npy", array) for name, array in _arrays(index).items()}
        fsync_folder(path)
        write_manifest(path, Manifest(spec=index.spec, engine=ENGINE, state={"checks": checks}))
    finally:
        lock.release()
    return path


def open_sish(path: str | Path) -> SishIndex:
    """Return the index of a folder; vectors stay on disk.

    Raises:
        IndexStoreError: no index there, another engine's, or a newer format.
        IndexCorruptError: half-written, or a file missing, cut or altered.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.engine != ENGINE:
        raise IndexStoreError(f"{path} holds an index of the engine {manifest.engine}, not {ENGINE}; use open_index")
    if not manifest.complete:
        raise IndexCorruptError(f"{path} is half-written: its making was cut short; save the index there again")
    try:
        checks = dict(manifest.state["checks"])
        arrays = {name: _read(path / f"{name}.npy", check) for name, check in checks.items()}
        return _index(manifest, arrays)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise IndexCorruptError(f"{path} cannot be used ({error}); restore it, or make the index again") from error


def _arrays(index: SishIndex) -> dict[str, npt.NDArray[Any]]:
    """Return what is written, by name of file."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "keys": index.keys,
        "ids": index.ids,
        "vectors": index.vectors,
        "centres": index.codebook.centres,
    }
    for number, name in enumerate(index.spec.fields):
        arrays[f"column{number}"] = index.columns[name]
        if name in index.names:
            arrays[f"names{number}"] = index.names[name].astype(np.str_)
    return arrays


def _index(manifest: Manifest, arrays: dict[str, npt.NDArray[Any]]) -> SishIndex:
    """Return the index of the arrays.

    Raises:
        KeyError: an array is missing.
        ValueError: shapes that do not fit.
    """
    spec, keys = manifest.spec, arrays["keys"]
    if arrays["vectors"].shape != (len(keys), spec.dim):
        raise ValueError(f"vectors {arrays['vectors'].shape} for {len(keys)} keys of {spec.dim} dimensions")
    codebook = codebook_of(arrays["centres"])
    numbered = list(enumerate(spec.fields))
    keywords = [(number, name) for number, name in numbered if spec.fields[name] == "keyword"]
    return SishIndex(
        spec=spec,
        codebook=codebook,
        keys=keys,
        vectors=arrays["vectors"],
        ids=arrays["ids"],
        columns={name: arrays[f"column{number}"] for number, name in numbered},
        names={name: arrays[f"names{number}"].astype(object) for number, name in keywords},
        occupied=occupied_cells(keys, codebook),
    )


def _write(file: Path, array: npt.NDArray[Any]) -> str:
    """Write an array durably and return its checksum; none for the one that is mapped."""
    try:
        with open(file, "wb") as handle:
            np.save(handle, array, allow_pickle=False)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise disk_trouble(error, file) from error
    return "" if file.stem == MAPPED else _checksum(array)


def _read(file: Path, check: str) -> npt.NDArray[Any]:
    """Return an array.

    Raises:
        OSError: no such file.
        ValueError: cut, altered, or not an array.
    """
    try:
        array = np.load(file, mmap_mode="r" if file.stem == MAPPED else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file.name}: {error}") from error
    if check and _checksum(array) != check:
        raise ValueError(f"{file.name} was altered")
    return array


def _checksum(array: npt.NDArray[Any]) -> str:
    head = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(array).tobytes(), digest_size=16).hexdigest()
