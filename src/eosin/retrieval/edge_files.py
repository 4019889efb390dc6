"""Files of Qdrant Edge, seen from outside: whether the disk has room, whether they are whole, how to copy them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from eosin.errors import IndexCorruptError, IndexStoreError
from eosin.features.writer import fsync_folder
from eosin.retrieval.manifest import Manifest, disk_trouble, lock_index

SHARD = "shard"
OPTIMISING = ".optimising"  # locked by the process that builds the graph
ROOM = 2**28  # to write: Qdrant makes its files in steps of 32 MiB, several at once
ROOM_TO_OPEN = 2**26


def check_room(path: Path, needed: int) -> None:
    """Raise unless the disk has `needed` bytes free.

    Raises:
        IndexStoreError: it has not; nothing was changed.
    """
    free = shutil.disk_usage(path).free
    if free < needed:
        raise IndexStoreError(
            f"{path}: no space left: {free / 2**20:.0f} MiB are free, {needed / 2**20:.0f} MiB are needed; "
            "every point stored before is kept: make room, then run the same again"
        )


def sync_log(path: Path) -> None:
    """Bring Qdrant's write-ahead log to the disk: what is in it is replayed after a crash."""
    folder = path / SHARD / "wal"
    try:
        for file in folder.iterdir():
            handle = os.open(file, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_folder(folder)
    except OSError as error:
        raise disk_trouble(error, path) from error


def sizes(shard: Path) -> dict[str, int]:
    """Return the size of every file of the segments, by path."""
    files = sorted(file for file in (shard / "segments").rglob("*") if file.is_file())
    return {file.relative_to(shard).as_posix(): file.stat().st_size for file in files}


def check_files(path: Path, manifest: Manifest) -> None:
    """Compare the files with what was noted when nothing has changed them since.

    Raises:
        IndexCorruptError: a file is missing or shorter. Qdrant itself would go on with fewer points.
    """
    if not (path / SHARD / "segments").is_dir():
        raise damaged(path, f"{SHARD}/segments is missing")
    found = sizes(path / SHARD)
    for name, size in manifest.state.get("files", {}).items():
        if found.get(name, -1) < size:
            state = f"holds {found[name]} bytes instead of {size}" if name in found else "is missing"
            raise damaged(path, f"{SHARD}/{name} {state}")


def check_optimised(path: Path) -> None:
    """Raise while a process builds the graph whose caller was killed.

    Raises:
        IndexLockedError: one does.
    """
    held = "is still being optimised by a process whose caller has ended; wait until it is done"
    lock_index(path, OPTIMISING, held).release()


def damaged(path: Path, why: str) -> IndexCorruptError:
    """Return the error for files that are not what they should be."""
    return IndexCorruptError(f"{path} is damaged: {why}; restore it from a snapshot, or make the index again")


def disk_bytes(folder: Path) -> int:
    """Return what the files take on the disk: Qdrant makes them longer than what is in them."""
    found = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(one.st_blocks * 512 if hasattr(one, "st_blocks") else one.st_size for one in found)


def copy_sparse(source: str, target: str) -> None:
    """Copy a file, leave holes where it holds zeros, and bring it to the disk."""
    step = 2**12
    with open(source, "rb", 2**20) as before, open(target, "wb", 2**20) as after:
        while block := before.read(step):
            if block.count(0) == len(block):
                after.seek(len(block), os.SEEK_CUR)
            else:
                after.write(block)
        after.truncate(before.tell())
        after.flush()
        os.fsync(after.fileno())
