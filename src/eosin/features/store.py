"""A folder of feature files, one HDF5 a slide: made by one recipe, resumable, verifiable, torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np
import numpy.typing as npt
from filelock import BaseFileLock, FileLock, Timeout

from eosin.errors import StoreCorruptError, StoreError, StoreLockedError, StoreMismatchError, closest
from eosin.features.recipe import Recipe, canonical_json
from eosin.features.writer import FORMAT, FORMAT_VERSION, SlideWriter, content_hash, disk_error, replace_durably, stem

__all__ = ["FeatureStore", "Features", "Recipe", "SlideWriter", "TileTable", "VerifyRow", "stem"]

_READ_ERRORS = (OSError, KeyError, ValueError, RuntimeError, TypeError)
_META_KEYS = ("size_px", "mpp", "fingerprint")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class TileTable:
    """What is known of one slide's tiles beside their features: small, whatever the encoder.

    Attributes:
        slide_id: path of the slide relative to the input, with its suffix.
        xy: level-0 top-left corners (n, 2), int64.
        qc: QC columns, each (n,).
        reason: int8 (n,), why a tile is rejected; 0 = kept.
        recipe: what made the file.
        slide: what was known of the slide: size_px, mpp ledger, fingerprint, reader...
        mpp: microns per pixel of the tiles; None when an imported file did not say.
        tile_px: side of a tile; None likewise.
        size0_px: (width, height) of a tile's footprint in level-0 pixels; None likewise.
        background_xy: positions (m, 2) that were not embedded for want of tissue.
        background_tissue: their tissue fraction (m,).
        unreadable_xy: positions (k, 2) that could not be decoded and were left out.
    """

    slide_id: str
    xy: npt.NDArray[np.int64]
    qc: dict[str, npt.NDArray[Any]]
    reason: npt.NDArray[np.int8]
    recipe: dict[str, Any]
    slide: dict[str, Any]
    mpp: float | None
    tile_px: int | None
    size0_px: tuple[float, float] | None
    background_xy: npt.NDArray[np.int64]
    background_tissue: npt.NDArray[np.float32]
    unreadable_xy: npt.NDArray[np.int64]

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Rows that no QC rule rejected (n,)."""
        return self.reason == 0

    def __len__(self) -> int:
        """Return the number of rows, rejected ones included."""
        return len(self.xy)


@dataclass(frozen=True, kw_only=True, eq=False)
class Features(TileTable):
    """One slide's features.

    Attributes:
        x: features (n, D), float32 or float16 as stored; the other attributes are those of `TileTable`.
    """

    x: npt.NDArray[Any]


class VerifyRow(NamedTuple):
    """One line of `FeatureStore.verify`."""

    slide_id: str
    ok: bool
    reason: str


class FeatureStore:
    """A folder of feature files with one recipe. Iterates over slide ids; ``store[slide_id]`` reads.

    Use `create` to write and `open` to read. Several processes may write different slides.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        """Hold `path` and `recipe`; use `create` or `open` instead."""
        self.path = path
        self.recipe = recipe

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe) -> FeatureStore:
        """Create the store, or open it if this recipe made it; remove what dead writers left.

        Raises:
            StoreMismatchError: another recipe made it; the message lists every difference.
            StoreError: the folder cannot be written.
        """
        path = Path(path)
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "recipe_hash": recipe.hash}
        text = canonical_json({**manifest, "recipe": recipe.to_dict()}) + "\n"
        try:
            (path / ".locks").mkdir(parents=True, exist_ok=True)
            with FileLock(path / ".locks" / "manifest.lock", timeout=60):
                if not (path / "manifest.json").exists():
                    _write_text(path / "manifest.json", text)
        except Timeout as error:
            raise StoreLockedError(f"{path}: another process has held the manifest for a minute") from error
        except OSError as error:
            raise _unwritable(error, path) from error
        store = cls.open(path)
        differences = recipe.diff(store.recipe)
        if differences:
            raise StoreMismatchError(
                f"{path} was made by another recipe:\n  " + "\n  ".join(differences) + "\n"
                "use the store's settings, or give another --out, or delete the folder to start again"
            )
        store._sweep()
        return store

    @classmethod
    def open(cls, path: str | Path) -> FeatureStore:
        """Open an existing store.

        Raises:
            StoreError: no store there, or a newer format.
            StoreCorruptError: the manifest cannot be read or was altered.
        """
        path = Path(path)
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise StoreError(
                f"{path} is not a feature store (no manifest.json); make one with eosin extract or convert"
            )
        try:
            data = json.loads(manifest.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            version = int(data["format_version"])
            recipe = Recipe.from_dict(data["recipe"]) if version <= FORMAT_VERSION else None
            if recipe is not None and recipe.hash != data["recipe_hash"]:
                raise ValueError("the recipe does not match its hash")
        except (KeyError, ValueError, TypeError) as error:
            raise StoreCorruptError(
                f"{manifest} cannot be used ({error}); restore it, or delete it and run the same command again"
            ) from error
        if recipe is None:
            raise StoreError(
                f"{path} has format version {version}, this eosin reads up to {FORMAT_VERSION}: upgrade eosin"
            )
        return cls(path, recipe)

    @property
    def slide_ids(self) -> list[str]:
        """Ids of the finished slides, sorted; read from the folder each time."""
        return sorted(p.relative_to(self.path).as_posix()[: -len(".h5")] for p in self.path.rglob("*.h5"))

    def __len__(self) -> int:
        """Return the number of finished slides."""
        return len(self.slide_ids)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the sorted slide ids."""
        return iter(self.slide_ids)

    def __contains__(self, slide_id: object) -> bool:
        """Return whether this exact slide id is finished."""
        return isinstance(slide_id, str) and _safe(slide_id) and self._file(slide_id).is_file()

    def __repr__(self) -> str:
        """Name the folder and the encoder."""
        return f"FeatureStore({str(self.path)!r}, encoder={self.recipe.encoder.get('name')!r}, slides={len(self)})"

    def __getitem__(self, slide_id: str) -> Features:
        """Read one slide by its id, or by a name without folder or suffix that is unique.

        Raises:
            StoreError: no such slide, or several; the message lists the closest.
            StoreCorruptError: the file is truncated or altered.
        """
        return self._opened(slide_id, _read)

    def tiles(self, slide_id: str) -> TileTable:
        """Read all of one slide but its features: coordinates, quality numbers, reasons; arguments as ``store[...]``.

        Raises:
            StoreError: no such slide, or several.
            StoreCorruptError: what is read is truncated or altered.
        """
        return self._opened(slide_id, _read_table)

    def _opened(self, slide_id: str, read: Callable[[h5py.File, str], T]) -> T:
        slide_id = self._resolve(slide_id)
        path = self._file(slide_id)
        try:
            with h5py.File(path, "r", locking="best-effort") as file:
                return read(file, slide_id)
        except _READ_ERRORS as error:
            raise StoreCorruptError(
                f"{path} cannot be read ({error}); delete it and run eosin extract again: only this slide is redone"
            ) from error

    def done(self, slide_id: str, fingerprint: str) -> bool:
        """Return whether `slide_id` is finished, by this recipe, from a slide with this content.

        An unreadable file counts as not done, so that the next run replaces it.
        """
        if slide_id not in self:
            return False
        try:
            with h5py.File(self._file(slide_id), "r", locking="best-effort") as file:
                slide = json.loads(_text(file, "slide"))
                complete = "content_hash" in file.attrs
                return (
                    complete and _text(file, "recipe_hash") == self.recipe.hash and slide["fingerprint"] == fingerprint
                )
        except _READ_ERRORS:
            return False

    def writer(self, slide_id: str, *, meta: Mapping[str, Any]) -> SlideWriter:
        """Return the context manager that writes one slide; it holds the slide's lock until it exits.

        Args:
            slide_id: posix path relative to the input root, with suffix.
            meta: what is known of the slide, JSON types: ``size_px`` (width, height),
                ``mpp`` (`MppLedger.to_dict()`), ``fingerprint``, and whatever else
                (``reader``, ...); ``size0_px`` is computed from the recipe when absent.

        Raises:
            StoreLockedError: another process is writing this slide.
            StoreError: an unsafe `slide_id`, or `meta` lacks one of the three.
        """
        if not _safe(slide_id):
            raise StoreError(f"slide id {slide_id!r} must be a relative path without '..', '\\' or empty parts")
        lacking = [key for key in _META_KEYS if key not in meta]
        if lacking:
            raise StoreError(f"{slide_id}: meta lacks {', '.join(lacking)}")
        meta = dict(meta)
        meta.setdefault("size0_px", _size0(self.recipe.tile, meta["mpp"]))
        lock = self._lock(slide_id)
        self.clear_failure(slide_id)
        return SlideWriter(self._file(slide_id), slide_id, self.recipe, meta, lock)

    def failures(self) -> list[dict[str, str]]:
        """Return ``{"slide_id", "error", "message"}`` of each slide that failed, sorted by id."""
        folder = self.path / "failures"
        records = [json.loads(p.read_text(encoding="utf-8")) for p in folder.rglob("*.json")]
        return sorted(records, key=lambda r: r["slide_id"])

    def record_failure(self, slide_id: str, error: str, message: str) -> None:
        """Note why `slide_id` failed; the note goes when the slide is written again."""
        path = self._failure(slide_id)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_text(path, json.dumps({"slide_id": slide_id, "error": error, "message": message}, indent=1) + "\n")
        except OSError as problem:
            raise _unwritable(problem, path) from problem

    def clear_failure(self, slide_id: str) -> None:
        """Forget the failure of `slide_id`, if there is one."""
        self._failure(slide_id).unlink(missing_ok=True)

    def verify(self) -> list[VerifyRow]:
        """Re-hash every file and check its recipe, row counts and numbers; one row a slide."""
        return [VerifyRow(slide_id, *self._check(slide_id)) for slide_id in self.slide_ids]

    def _check(self, slide_id: str) -> tuple[bool, str]:
        try:
            with h5py.File(self._file(slide_id), "r", locking="best-effort") as file:
                features = _read(file, slide_id)
                stored, found = _text(file, "content_hash"), content_hash(file)
                recipe_hash = _text(file, "recipe_hash")
        except _READ_ERRORS as error:
            return False, f"unreadable: {error}"
        if stored != found:
            return False, "content differs from its hash: altered on disk"
        if recipe_hash != self.recipe.hash:
            return False, "made by another recipe: " + "; ".join(Recipe.from_dict(features.recipe).diff(self.recipe))
        if not np.isfinite(features.x).all():
            return False, "features are not finite"
        return True, ""

    def _file(self, slide_id: str) -> Path:
        return self.path / f"{slide_id}.h5"

    def _failure(self, slide_id: str) -> Path:
        return self.path / "failures" / f"{slide_id}.json"

    def _lock(self, slide_id: str) -> BaseFileLock:
        path = self.path / ".locks" / f"{slide_id}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not thread-local: the thread that finishes a slide need not be the one that began it.
            lock = FileLock(path, timeout=0, thread_local=False)
            lock.acquire()
        except Timeout as error:
            raise StoreLockedError(f"{slide_id}: another process is writing it into {self.path}") from error
        except OSError as error:
            raise _unwritable(error, path) from error
        return lock

    def _sweep(self) -> None:
        """Remove temporaries whose writer is dead: nobody holds their lock."""
        for temporary in self.path.rglob(".*.h5.tmp"):
            name = temporary.name[1 : -len(".h5.tmp")]
            slide_id = (temporary.parent.relative_to(self.path) / name).as_posix()
            try:
                lock = self._lock(slide_id)
            except StoreLockedError:
                continue
            temporary.unlink(missing_ok=True)
            lock.release()

    def _resolve(self, key: str) -> str:
        ids = self.slide_ids
        if key in ids:
            return key
        found = [i for i in ids if key in (stem(i), i.rsplit("/", 1)[-1], str(PurePosixPath(i).with_name(stem(i))))]
        if len(found) == 1:
            return found[0]
        if found:
            raise StoreError(
                f"{key!r} names {len(found)} slides of {self.path}: {', '.join(found[:5])}; give the whole id"
            )
        raise StoreError(f"no slide {key!r} in {self.path} ({len(ids)} slides); the closest are: {closest(key, ids)}")


def _read(file: h5py.File, slide_id: str) -> Features:
    table = _read_table(file, slide_id)
    return Features(**{field.name: getattr(table, field.name) for field in fields(table)}, x=_data(file, "features"))


def _read_table(file: h5py.File, slide_id: str) -> TileTable:
    recipe, slide = json.loads(_text(file, "recipe")), json.loads(_text(file, "slide"))
    if Recipe.from_dict(recipe).hash != _text(file, "recipe_hash"):
        raise ValueError("the recipe does not match its hash")
    columns = {name: _data(file, f"qc/{name}") for name in _children(file, "qc")}
    xy, reason = _data(file, "coords"), _data(file, "reason")
    lengths = {len(_dataset(file, "features")), len(xy), len(reason), *(len(c) for c in columns.values())}
    if len(lengths) != 1:
        raise ValueError(f"datasets of different lengths {sorted(lengths)}")
    size0 = slide.get("size0_px")
    return TileTable(
        slide_id=slide_id,
        xy=xy,
        qc=columns,
        reason=reason,
        recipe=recipe,
        slide=slide,
        mpp=recipe["tile"].get("mpp"),
        tile_px=recipe["tile"].get("tile_px"),
        size0_px=(float(size0[0]), float(size0[1])) if size0 else None,
        background_xy=_data(file, "background/xy"),
        background_tissue=_data(file, "background/tissue"),
        unreadable_xy=_data(file, "unreadable/xy"),
    )


def _data(group: h5py.Group, name: str) -> npt.NDArray[Any]:
    return _dataset(group, name)[...]


def _dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    item = group[name]
    if not isinstance(item, h5py.Dataset):
        raise ValueError(f"{name} is not a dataset")
    return item


def _children(file: h5py.File, name: str) -> list[str]:
    group = file.get(name)
    return sorted(group) if isinstance(group, h5py.Group) else []


def _text(file: h5py.File, key: str) -> str:
    value = file.attrs[key]
    if not isinstance(value, str):
        raise ValueError(f"attribute {key} is not text")
    return value


def _size0(tile: Mapping[str, Any], mpp: Mapping[str, Any] | None) -> tuple[float, float] | None:
    if not (mpp and mpp.get("x") and mpp.get("y") and tile.get("mpp") and tile.get("tile_px")):
        return None
    side_um = tile["tile_px"] * tile["mpp"]
    return side_um / mpp["x"], side_um / mpp["y"]


def _safe(slide_id: str) -> bool:
    parts = slide_id.split("/")
    return "\\" not in slide_id and "\0" not in slide_id and all(p not in ("", ".", "..") for p in parts)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    replace_durably(temporary, path)


def _unwritable(error: OSError, path: Path) -> OSError:
    known = disk_error(error, path)
    return known if known is not error else StoreError(f"{path} cannot be written: {error}")
