"""What identifies a slide's content without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eosin.slides.find import companions

_END_BYTES = 64 * 1024
_SAMPLE_BYTES = 4 * 1024
_SAMPLES = 16


def fingerprint_path(path: Path) -> str:
    """Return SHA-256 over the size and sampled bytes of `path` and each of its companions.

    Sampled are the first and last 64 KiB and 16 evenly spaced blocks of 4 KiB. Companions
    (an MRXS folder, the files of a DICOM folder) also count with their names.
    """
    digest = hashlib.sha256()
    if path.is_file():
        _add(digest, path)
    for companion in companions(path):
        digest.update(companion.name.encode() + b"\0")
        _add(digest, companion)
    return digest.hexdigest()


def fingerprint_array(array: npt.NDArray[np.uint8]) -> str:
    """Return SHA-256 over shape and bytes."""
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def _add(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{size}\0".encode())
    starts = [0, *(size * (i + 1) // (_SAMPLES + 1) for i in range(_SAMPLES)), max(0, size - _END_BYTES)]
    with path.open("rb") as file:
        for i, start in enumerate(starts):
            file.seek(start)
            digest.update(file.read(_END_BYTES if i in (0, len(starts) - 1) else _SAMPLE_BYTES))
