"""One slide's feature file: streamed to a temporary name, then renamed. TRIDENT's layout plus ours."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from filelock import BaseFileLock

from eosin.errors import NonFiniteError, StoreError
from eosin.features.recipe import Recipe, canonical_json

FORMAT = "eosin-features"
FORMAT_VERSION = 1
COORD_SPACE = "level-0 pixels, top-left corner, (x, y)"
# One version of the file format for every h5py, with checksums on its metadata.
LIBVER = ("v110", "v110")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HASH_ROWS = 1024


def stem(slide_id: str) -> str:
    """Return the last part of `slide_id` without its suffix; dots inside the name stay.

    ``a/TCGA-A1.0f3c-11.svs`` gives ``TCGA-A1.0f3c-11``; ``.ome.tif`` counts as one suffix.
    """
    return _SUFFIX.sub("", slide_id.rsplit("/", 1)[-1])


_SUFFIX = re.compile(r"(?<=.)(?:\.ome)?\.[A-Za-z][A-Za-z0-9]{1,7}$")


def content_hash(file: h5py.File) -> str:
    """Return sha256 (hex) over every dataset's name, dtype, shape and bytes and every attribute.

    Only the attribute ``content_hash`` itself is left out. Reads `_HASH_ROWS` rows at a time.
    """
    total = hashlib.sha256()
    names: list[str] = []
    file.visit(names.append)
    for name in ["/", *sorted(names)]:
        item = file[name]
        for key in sorted(item.attrs):
            if not (name == "/" and key == "content_hash"):
                total.update(f"{name}@{key}={_attribute_text(item.attrs[key])}\n".encode())
        if isinstance(item, h5py.Dataset):
            data = hashlib.sha256()
            for start in range(0, item.shape[0], _HASH_ROWS):
                data.update(np.ascontiguousarray(item[start : start + _HASH_ROWS]).tobytes())
            total.update(f"{name} {item.dtype.str} {item.shape} {data.hexdigest()}\n".encode())
    return total.hexdigest()


def _attribute_text(value: object) -> str:
    array = np.asarray(value)
    return f"{array.dtype.kind}:{array.tolist()!r}"


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (POSIX only; elsewhere a no-op)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_durably(temporary: Path, target: Path) -> None:
    """Fsync `temporary`, rename it to `target` and fsync the folder."""
    with open(temporary, "rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, target)
    fsync_folder(target.parent)


def write_durably(path: Path, content: bytes) -> Path:
    """Write a file that appears whole or not at all: under a temporary name in its folder, fsync, and rename.

    Returns its path.

    Raises:
        StoreError: the disk or the folder refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        replace_durably(temporary, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
    return path


def disk_error(error: OSError, path: Path) -> OSError:
    """Return a `StoreError` naming the free space if `error` says the disk is full, else `error`.

    HDF5 hides the number in its message, so that is searched too.
    """
    found = re.search(r"errno = (\d+)", str(error))
    number = error.errno or (int(found.group(1)) if found else 0)
    if number not in _FULL:
        return error
    folder = next(p for p in path.absolute().parents if p.is_dir())
    free = shutil.disk_usage(folder).free / 2**20
    return StoreError(
        f"cannot write {path}: {os.strerror(number)} ({free:.1f} MiB free in {folder}); nothing "
        "was left behind; make room or give another --out, then run again: finished slides are kept"
    )


class SlideWriter:
    """Context manager that writes one slide; nothing is visible until `finish` returns.

    Made by `FeatureStore.writer`. Memory is bounded by one chunk of rows.

    Example:
        with store.writer("a.svs", meta=meta) as writer:
            for x, xy, qc in batches:
                writer.append(x, xy, qc)
            writer.finish(reason)
    """

    def __init__(self, path: Path, slide_id: str, recipe: Recipe, meta: Mapping[str, Any], lock: BaseFileLock) -> None:
        """Keep the arguments; the file is opened by `__enter__`. `lock` is held and released here."""
        self.path = path
        self.slide_id = slide_id
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._recipe = recipe
        self._meta = meta
        self._lock = lock
        self._sink: _Sink | None = None
        self._file: h5py.File | None = None
        self._datasets: dict[str, _Rows] = {}
        self._rows = 0
        self._finished = False

    def __enter__(self) -> SlideWriter:
        """Open the temporary file, replacing what a dead writer of this slide left."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = _Sink(self._temporary)
            self._file = h5py.File(self._sink, "w", libver=LIBVER, track_order=False)
            self._sink.check()
        except OSError as error:
            cause = self._cause(error)
            self._discard()
            raise cause from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Remove the temporary unless `finish` was reached; release the lock."""
        if self._finished:
            self._lock.release()
            return
        self._discard()
        if kind is None:
            raise StoreError(f"{self.slide_id}: the writer was left without finish(); nothing was stored")

    def append(
        self,
        x: npt.NDArray[Any],
        xy: npt.NDArray[np.integer],
        qc: Mapping[str, npt.NDArray[Any]] | None = None,
        *,
        tokens: npt.NDArray[Any] | None = None,
    ) -> None:
        """Add rows.

        Args:
            x: features (b, D); cast to the recipe's dtype.
            xy: level-0 top-left corners (b, 2), integer.
            qc: columns (b,), the same names in every call.
            tokens: patch tokens (b, h, w, D), stored as float16; given iff the recipe says so.

        Raises:
            NonFiniteError: NaN or infinity (also from a cast to float16), naming slide and row.
            StoreError: shapes that do not fit, or a full disk.
        """
        if (tokens is not None) != self._recipe.tokens:
            raise StoreError(
                f"{self.slide_id}: recipe.tokens is {self._recipe.tokens}, append() was given the opposite"
            )
        xy = np.asarray(xy)
        if xy.dtype.kind not in "iu":
            raise StoreError(f"{self.slide_id}: coords are level-0 integer pixels, not {xy.dtype}; round them first")
        columns = {"features": self._finite("features", np.asarray(x), self._recipe.dtype)}
        columns["coords"] = xy.astype("<i8")
        for name, values in (qc or {}).items():
            columns[f"qc/{name}"] = self._finite(f"qc/{name}", np.asarray(values), None)
        if tokens is not None:
            columns["tokens"] = self._finite("tokens", np.asarray(tokens), "float16")
        self._check_shapes(columns)
        try:
            for name, values in columns.items():
                self._put(name, values)
            self._open_sink().check()
        except OSError as error:
            raise self._cause(error) from error
        self._rows += len(xy)

    def finish(
        self,
        reason: npt.ArrayLike | None = None,
        *,
        background_xy: npt.ArrayLike | None = None,
        background_tissue: npt.ArrayLike | None = None,
        unreadable_xy: npt.ArrayLike | None = None,
        qc: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        """Write what is known only at the end and give the file its name.

        Args:
            reason: int8 codes (n,), 0 = kept; all kept when None.
            background_xy: positions (m, 2) that were not embedded for want of tissue.
            background_tissue: their tissue fraction (m,).
            unreadable_xy: positions (k, 2) that could not be decoded and were left out.
            qc: whole columns (n,), such as those that need every neighbour.

        Raises:
            StoreError: lengths that do not fit, or a full disk.
        """
        codes = np.zeros(self._rows, np.int8) if reason is None else np.asarray(reason)
        place = np.zeros((0, 2), np.int64) if background_xy is None else np.asarray(background_xy).reshape(-1, 2)
        tissue = np.zeros(len(place), np.float32) if background_tissue is None else np.asarray(background_tissue)
        lost = np.zeros((0, 2), np.int64) if unreadable_xy is None else np.asarray(unreadable_xy).reshape(-1, 2)
        late = {f"qc/{k}": self._finite(f"qc/{k}", np.asarray(v), None) for k, v in (qc or {}).items()}
        for name, values in {"reason": codes, **late}.items():
            if values.shape != (self._rows,):
                raise StoreError(f"{self.slide_id}: {name} has shape {values.shape} for {self._rows} rows")
        if tissue.shape != (len(place),):
            raise StoreError(f"{self.slide_id}: {tissue.shape} background_tissue for {len(place)} positions")
        if self._rows == 0:
            width = int(self._recipe.encoder.get("dim") or 0)
            self._put("features", np.zeros((0, width), self._recipe.dtype))
            self._put("coords", np.zeros((0, 2), "<i8"))
        try:
            for name, values in late.items():
                self._put(name, values)
            self._put("reason", codes.astype(np.int8))
            self._put("background/xy", place.astype("<i8"))
            self._put("background/tissue", tissue.astype("<f4"))
            self._put("unreadable/xy", lost.astype("<i8"))
            self._close()
        except OSError as error:
            raise self._cause(error) from error
        self._finished = True

    def _close(self) -> None:
        file, sink = self._open_file(), self._open_sink()
        for rows in self._datasets.values():
            rows.flush()
        self._write_attributes(file)
        file.flush()
        sink.check()
        file.attrs["content_hash"] = content_hash(file)
        file.close()
        self._file = None
        sink.check()
        sink.close()
        self._sink = None
        replace_durably(self._temporary, self.path)

    def _open_file(self) -> h5py.File:
        if self._file is None:
            raise StoreError(f"{self.slide_id}: the writer is closed; use it inside its with block, once")
        return self._file

    def _open_sink(self) -> _Sink:
        if self._sink is None:
            raise StoreError(f"{self.slide_id}: the writer is closed; use it inside its with block, once")
        return self._sink

    def _put(self, name: str, values: npt.NDArray[Any]) -> None:
        if name not in self._datasets:
            if self._rows and name.startswith("qc/") and len(values) != self._rows:
                raise StoreError(f"{self.slide_id}: {name} was not in the first append()")
            self._datasets[name] = _Rows(self._open_file(), name, values.shape[1:], values.dtype)
        self._datasets[name].append(values)

    def _check_shapes(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        rows, ndim = len(columns["coords"]), {"features": 2, "coords": 2, "tokens": 4}
        seen = {
            name for name in self._datasets if name != "reason" and not name.startswith(("background/", "unreadable/"))
        }
        if self._rows and seen != set(columns):
            raise StoreError(f"{self.slide_id}: append() got {sorted(columns)}, the first one {sorted(seen)}")
        for name, values in columns.items():
            if values.ndim != ndim.get(name, 1) or len(values) != rows or (name == "coords" and values.shape[1] != 2):
                raise StoreError(f"{self.slide_id}: {name} has shape {values.shape} beside {rows} coords")
            known = self._datasets.get(name)
            if known is not None and values.shape[1:] != known.row_shape:
                raise StoreError(f"{self.slide_id}: {name} rows are {values.shape[1:]}, the first {known.row_shape}")

    def _finite(self, name: str, values: npt.NDArray[Any], dtype: str | None) -> npt.NDArray[Any]:
        with np.errstate(over="ignore"):
            cast = values.astype(np.dtype(dtype or values.dtype).newbyteorder("<"), copy=False)
        if cast.dtype.kind != "f" or np.isfinite(cast).all():
            return cast
        row = int(np.flatnonzero(~np.isfinite(cast).reshape(len(cast), -1).all(axis=1))[0])
        overflow = bool(np.isfinite(values[row]).all())
        why = f"too large for {dtype}; store float32" if overflow else "NaN or infinity; try precision fp32"
        raise NonFiniteError(f"{self.slide_id}: {name} of tile {self._rows + row} is not finite: {why}")

    def _write_attributes(self, file: h5py.File) -> None:
        tile, name = self._recipe.tile, stem(self.slide_id)
        size0, (width, height) = self._meta.get("size0_px"), self._meta.get("size_px") or (None, None)
        mpp = self._meta.get("mpp") or {}
        mpp_x, mpp_y, target = mpp.get("x"), mpp.get("y"), tile.get("mpp")
        mean = float(np.sqrt(mpp_x * mpp_y)) if mpp_x and mpp_y else None
        common = {"name": name, "savetodir": ""}
        features = {**common, "encoder": self._recipe.encoder.get("name")}
        trident = {
            **common,
            "patch_size": tile.get("tile_px"),
            "patch_size_level0": int(np.floor(size0[0] + 0.5)) if size0 else None,
            "level0_magnification": round(10 / mean, 2) if mean else None,
            "target_magnification": round(10 / target, 2) if target else None,
            "overlap": tile.get("overlap_px"),
            "level0_width": width,
            "level0_height": height,
        }
        ours = {"mpp": target, "mpp_x": mpp_x, "mpp_y": mpp_y, "tile_px": tile.get("tile_px")}
        # TRIDENT writes the string "None" for what it does not know; its readers expect the key.
        for key, value in features.items():
            file["features"].attrs[key] = "None" if value is None else value
        for key, value in trident.items():
            file["coords"].attrs[key] = "None" if value is None else value
        for key, value in ours.items():
            if value is not None:
                file["coords"].attrs[key] = value
        file["coords"].attrs["coord_space"] = COORD_SPACE
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["slide_id"] = self.slide_id
        file.attrs["recipe"] = canonical_json(self._recipe.to_dict())
        file.attrs["recipe_hash"] = self._recipe.hash
        file.attrs["slide"] = canonical_json(dict(self._meta))

    def _cause(self, error: OSError) -> OSError:
        """Return what to raise: HDF5 may stumble over bytes the sink could not write before."""
        if self._sink is not None and self._sink.error is not None:
            error = self._sink.error
        return disk_error(error, self.path)

    def _discard(self) -> None:
        try:
            if self._file is not None:
                self._file.close()
            if self._sink is not None:
                self._sink.close()
        finally:
            self._file = self._sink = None
            self._temporary.unlink(missing_ok=True)
            self._lock.release()


def open_raw(path: Path) -> io.FileIO:
    """Open `path` for reading and writing from empty, unbuffered."""
    return open(path, "w+b", buffering=0)


class _Sink(io.RawIOBase):
    """The file under HDF5. It keeps the first write error and then takes everything.

    HDF5's own driver cannot close a file it could not write and crashes the process at a
    later point; with this one it closes, and `check` raises what really happened.
    """

    def __init__(self, path: Path) -> None:
        self._raw = open_raw(path)
        self.error: OSError | None = None

    def check(self) -> None:
        """Raise the first error of a write, if there was one."""
        if self.error is not None:
            raise self.error

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: Any) -> int:
        return self._raw.readinto(buffer) or 0

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while len(left) and self.error is None:
                left = left[self._raw.write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._raw.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Rows:
    """A resizable dataset that is written whole chunks at a time, whatever the batch size."""

    def __init__(self, file: h5py.File, name: str, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.row_shape = row_shape
        row_bytes = max(1, int(np.prod(row_shape)) * dtype.itemsize)
        chunk = int(np.clip(2 ** int(np.log2(max(1, 2**20 // row_bytes))), 256, 1024))
        self._chunk = min(chunk, max(1, 2**24 // row_bytes))
        self._dataset = file.create_dataset(
            name,
            shape=(0, *row_shape),
            maxshape=(None, *row_shape),
            chunks=(self._chunk, *(max(1, n) for n in row_shape)),
            dtype=dtype,
            fletcher32=True,
            track_times=False,
        )
        self._buffer = np.empty((self._chunk, *row_shape), dtype)
        self._held = 0

    def append(self, values: npt.NDArray[Any]) -> None:
        start = 0
        while start < len(values):
            take = min(self._chunk - self._held, len(values) - start)
            self._buffer[self._held : self._held + take] = values[start : start + take]
            self._held += take
            start += take
            if self._held == self._chunk:
                self.flush()

    def flush(self) -> None:
        if self._held:
            done = self._dataset.shape[0]
            self._dataset.resize(done + self._held, axis=0)
            self._dataset[done:] = self._buffer[: self._held]
            self._held = 0
