"""Splits in a file: every row by its id, and hashes of the table they were made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eosin.cohort.splits import Split, check_split
from eosin.cohort.table import Cohort, write_text
from eosin.errors import CohortError

_FORMAT = "eosin-splits"
_VERSION = 1
_PARTS = ("train", "val", "test")


def save_splits(path: Path | str, splits: Sequence[Split], cohort: Cohort) -> None:
    """Write `splits` as JSON: the row ids of each part, and what the cohort was.

    Raises:
        CohortError: no splits, two of one name, or a split that cuts a patient of this cohort.
    """
    names = [split.name for split in splits]
    if not names or len(set(names)) != len(names):
        raise CohortError(f"{len(names)} splits with {len(set(names))} names; each needs its own")
    ids, groups = cohort.row_ids(), cohort.group_key()
    for split in splits:
        check_split(split, groups)
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "cohort": {
            "source": Path(cohort.source).name,
            "sha256": cohort.sha256,
            "rows": len(cohort),
            "columns": cohort.column_digests(),
        },
        "splits": [
            {"name": split.name, "note": split.note, **{part: ids[getattr(split, part)].tolist() for part in _PARTS}}
            for split in splits
        ],
    }
    write_text(Path(path), json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def load_splits(path: Path | str, cohort: Cohort) -> list[Split]:
    """Return the splits in `path`, as positions in `cohort`, which must be the table they were made from.

    Rows may come in another order and columns may have been added. Anything else raises.

    Raises:
        CohortError: not a splits file, or rows or cells have changed; the message says which.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CohortError(f"{path}: cannot be read as splits ({error})") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT or document.get("version") != _VERSION:
        raise CohortError(f"{path}: is not an {_FORMAT} file of version {_VERSION}; write one with save_splits")
    ids = cohort.row_ids().tolist()
    try:
        _check_unchanged(path, document["cohort"], cohort)
        where = {name: at for at, name in enumerate(ids)}
        splits = [
            Split(
                name=entry["name"],
                note=entry["note"],
                **{part: np.array(sorted(where[name] for name in entry[part]), dtype=np.int64) for part in _PARTS},
            )
            for entry in document["splits"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise CohortError(f"{path}: damaged, {error} is missing or not in the cohort; save the splits again") from error
    groups = cohort.group_key()
    for split in splits:
        check_split(split, groups)
    return splits


def _check_unchanged(path: Path, saved: dict, cohort: Cohort) -> None:
    if saved["sha256"] == cohort.sha256:
        return
    if saved["rows"] != len(cohort):
        raise CohortError(
            f"{path}: made for {saved['rows']} rows of {saved['source']}, this cohort has {len(cohort)}; "
            "use that table, or make new splits"
        )
    now = cohort.column_digests()
    changed = [name for name, digest in saved["columns"].items() if now.get(name) != digest]
    if changed:
        raise CohortError(
            f"{path}: the table has changed since these splits were made, in {', '.join(changed)}; "
            "use the table of then, or make new splits"
        )
