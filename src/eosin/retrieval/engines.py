"""Open or make an index without knowing its engine.

A folder says in `index.json` which engine made it. An address (http:// or https://) means a Qdrant server; it ends in
the name of a collection, such as ``http://localhost:6333/tiles``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from eosin.errors import IndexCorruptError, IndexMismatchError, IndexStoreError, closest
from eosin.retrieval.exact import ExactIndex
from eosin.retrieval.manifest import check_build, is_index, read_manifest
from eosin.retrieval.protocol import IndexSpec, VectorIndex, check_same_features

Engine = Literal["auto", "exact", "edge", "server"]

ENGINES = ("exact", "edge", "server")
SISH = "sish"
FEW = 200_000
"""Points below which `auto` takes the exact engine: a search is a scan, and nothing has to be built."""


def is_url(path_or_url: str | Path) -> bool:
    """Return whether this is the address of a server rather than a folder."""
    return isinstance(path_or_url, str) and path_or_url.startswith(("http://", "https://"))


def index_exists(path_or_url: str | Path, *, api_key: str | None = None) -> bool:
    """Return whether there is an index to open, finished or not.

    Raises:
        IndexUnreachableError: the server does not answer.
    """
    if is_url(path_or_url):
        from eosin.retrieval.server import ServerIndex

        return ServerIndex.exists(str(path_or_url), api_key=api_key)
    return is_index(Path(path_or_url))


def open_index(
    path_or_url: str | Path, *, engine: Engine = "auto", api_key: str | None = None, partial: bool = False
) -> VectorIndex:
    """Open an index.

    Args:
        path_or_url: folder, or address of a server and its collection.
        engine: that must have made it; any when "auto".
        api_key: of a server.
        partial: open a folder that `build_index` has not finished; what it answers then lacks slides.

    Raises:
        IndexStoreError: no index there, a newer format, or another engine's.
        IndexCorruptError: half-written or damaged.
        IndexLockedError: another process has it open, and its engine allows one only.
        IndexUnreachableError: the server does not answer.
        MissingDependencyError: its engine is not installed.
    """
    _check_engine(engine, path_or_url)
    if is_url(path_or_url):
        from eosin.retrieval.server import ServerIndex

        return ServerIndex.open(str(path_or_url), api_key=api_key)
    path = Path(path_or_url)
    manifest = read_manifest(path)
    if engine not in ("auto", manifest.engine) and manifest.engine != SISH:
        raise IndexStoreError(f"{path} was made by the engine {manifest.engine!r}, not {engine!r}; open it as it is")
    if not manifest.complete:
        raise IndexCorruptError(
            f"{path} is half an index: making it was interrupted before a point was stored; make it again"
        )
    if not partial:
        check_build(path)
    if manifest.engine == "exact":
        return ExactIndex.open(path)
    if manifest.engine == "edge":
        from eosin.retrieval.edge import EdgeIndex

        return EdgeIndex.open(path)
    if manifest.engine == SISH:
        raise IndexStoreError(
            f"{path} was made by the engine {SISH!r}, which looks up a bounded number of candidates and so is no index "
            "of this kind: open it with eosin.retrieval.sish_files.open_sish"
        )
    raise IndexStoreError(
        f"{path} was made by the engine {manifest.engine!r}, which is none of {', '.join(ENGINES)}: open it with the "
        "function that made it, or upgrade eosin"
    )


def create_index(
    path_or_url: str | Path,
    spec: IndexSpec,
    *,
    engine: Engine = "auto",
    expected: int | None = None,
    api_key: str | None = None,
) -> VectorIndex:
    """Make an index, or open the one that is there if it holds the same.

    Args:
        path_or_url: folder, or address of a server and its collection.
        spec: what it will hold.
        engine: "auto" takes the server for an address, and for a folder "exact" up to `FEW` points, else "edge".
        expected: how many points will come; None counts as few.
        api_key: of a server.

    Raises:
        IndexMismatchError: an index is there that holds something else; the message names each field.
        IndexStoreError: the folder cannot be written, or holds an index of another engine.
        IndexLockedError: another process is making it.
        IndexUnreachableError: the server does not answer.
        MissingDependencyError: the engine is not installed.
    """
    _check_engine(engine, path_or_url)
    if index_exists(path_or_url, api_key=api_key) and (
        is_url(path_or_url) or read_manifest(Path(path_or_url)).complete
    ):
        index = open_index(path_or_url, engine=engine, api_key=api_key, partial=True)
        try:
            check_same_spec(index.spec, spec, str(path_or_url))
        except IndexMismatchError:
            index.close()
            raise
        return index
    if is_url(path_or_url):
        from eosin.retrieval.server import ServerIndex

        return ServerIndex.create(str(path_or_url), spec, api_key=api_key)
    path = Path(path_or_url)
    if path.exists() and (not path.is_dir() or _foreign(path)):
        raise IndexStoreError(f"{path} holds something that is no index; give a new or an empty folder")
    if engine == "exact" or (engine == "auto" and (expected or 0) < FEW):
        return ExactIndex.create(path, spec)
    from eosin.retrieval.edge import EdgeIndex

    return EdgeIndex.create(path, spec)


def check_same_spec(index: IndexSpec, spec: IndexSpec, where: str) -> None:
    """Raise unless an index that is there holds what is to be stored.

    Raises:
        IndexMismatchError: other features, fields or quantisation; the message names each.
    """
    check_same_features(index, spec, "what is to be stored")
    here, there = dict(spec.fields), dict(index.fields)
    differ = [
        f"  {name}: {here.get(name, 'nothing')} to be stored, {there.get(name, 'nothing')} in the index"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    if index.quantise != spec.quantise:
        differ.append(f"  quantise: {spec.quantise} asked for, {index.quantise} in the index")
    if differ:
        raise IndexMismatchError(
            f"{where} is an index of other columns:\n" + "\n".join(differ) + "\n"
            "use the same settings, or give another folder, or delete this one to start again"
        )


def _foreign(path: Path) -> bool:
    """Return whether a folder holds files of somebody else; those of an index that was never finished do not count."""
    return not is_index(path) and any(
        file.name != ".lock" and not file.name.startswith((".index.json", "g0001")) for file in path.iterdir()
    )


def _check_engine(engine: str, path_or_url: str | Path) -> None:
    if engine not in ("auto", *ENGINES):
        raise IndexStoreError(f"unknown engine {engine!r}; the closest are: {closest(engine, ENGINES)}")
    if is_url(path_or_url) != (engine == "server") and engine != "auto":
        what = "an address, so its engine is the server" if is_url(path_or_url) else "a folder; a server has an address"
        raise IndexStoreError(f"engine {engine!r} does not fit {path_or_url}: it is {what}")
