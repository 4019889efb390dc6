"""Tiles that lie in files: folders and zips of PNG and JPEG, HDF5 and .npy arrays. Free of torch."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image

from eosin.errors import CohortError, GeometryError
from eosin.features.readers import ReaderState
from eosin.pretrain.reads import Outcome
from eosin.pretrain.sampling import HsvFilter
from eosin.slides.backend import WHITE, composite

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
HDF5_SUFFIXES = (".h5", ".hdf5")
IMAGES = "images"

Kind = Literal["folder", "zip", "hdf5", "npy"]
Pixels = npt.NDArray[np.uint8]


class Archive(NamedTuple):
    """A place that holds tiles: a folder or a file.

    Attributes:
        kind: how it is read.
        path: of the folder or file.
        keys: names of its images; empty for arrays.
        tiles: how many.
    """

    kind: Kind
    path: Path
    keys: tuple[str, ...]
    tiles: int

    def name(self, index: int) -> str:
        """Return the tile's name: path of its image, or archive/member, or file/row."""
        return f"{self.path.as_posix()}/{self.keys[index] if self.keys else index}"


class TileRequest(NamedTuple):
    """A tile to read, and where to crop it: shares (x, y) in [0, 1) of the room there is."""

    kind: Kind
    path: Path
    key: str | int
    at: tuple[float, float]


def find_archive(path: Path) -> Archive:
    """Return what tiles a folder, .zip, .h5 or .npy holds, images sorted by name.

    Raises:
        CohortError: no such path, no tiles in it, or an array that is not uint8 (n, H, W, 3).
    """
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        keys = tuple(sorted(file.relative_to(path).as_posix() for file in found))
        archive = Archive("folder", path, keys, len(keys))
    elif not path.is_file():
        raise CohortError(f"{path}: no such file or folder")
    elif path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as held:
                keys = tuple(sorted(n for n in held.namelist() if n.lower().endswith(IMAGE_SUFFIXES)))
        except zipfile.BadZipFile as error:
            raise CohortError(f"{path}: not a zip file ({error})") from error
        archive = Archive("zip", path, keys, len(keys))
    elif path.suffix.lower() in (*HDF5_SUFFIXES, ".npy"):
        kind: Kind = "npy" if path.suffix.lower() == ".npy" else "hdf5"
        archive = Archive(kind, path, (), len(_images(kind, path)))
    else:
        raise CohortError(f"{path}: tiles are read from folders, .zip, .h5 and .npy; slides are for SlideSource")
    if archive.tiles == 0:
        raise CohortError(f"{path}: no tiles in it; {', '.join(IMAGE_SUFFIXES)} are looked for")
    return archive


def _images(kind: Kind, path: Path) -> h5py.Dataset | Pixels:
    """Return the open array (n, H, W, 3) of an HDF5 or .npy file."""
    try:
        if kind == "npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            file = h5py.File(path, "r")
            array = file.get(IMAGES)
            if not isinstance(array, h5py.Dataset):
                raise CohortError(
                    f"{path}: needs a dataset {IMAGES!r} (n, H, W, 3); it has {', '.join(file) or 'none'}"
                )
    except (OSError, ValueError) as error:
        if isinstance(error, CohortError):
            raise
        raise CohortError(f"{path}: cannot be read as an array of tiles ({error})") from error
    if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[3] != 3:
        raise CohortError(f"{path}: holds {array.dtype} {array.shape}; tiles are uint8 (n, H, W, 3)")
    return array


class _OpenFiles:
    """The zips and arrays one reader keeps open."""

    def __init__(self) -> None:
        self._files: dict[Path, zipfile.ZipFile | h5py.Dataset | Pixels] = {}

    def tile(self, request: TileRequest) -> Pixels:
        """Return the whole tile, uint8 (H, W, 3)."""
        if request.kind == "folder":
            return _decode(request.path / str(request.key))
        if request.path not in self._files:
            opened = zipfile.ZipFile(request.path) if request.kind == "zip" else _images(request.kind, request.path)
            self._files[request.path] = opened
        file = self._files[request.path]
        if isinstance(file, zipfile.ZipFile):
            return _decode(io.BytesIO(file.read(str(request.key))))
        return np.asarray(file[int(request.key)])


_OPEN: WeakKeyDictionary[ReaderState, _OpenFiles] = WeakKeyDictionary()


def _decode(source: Path | io.BytesIO) -> Pixels:
    """Return an image as RGB, transparent pixels on white."""
    with Image.open(source) as image:
        if image.mode == "RGB":
            return np.asarray(image)
        return composite(np.asarray(image.convert("RGBA")), WHITE)


def read_tile_files(
    state: ReaderState, requests: Sequence[TileRequest], tile_px: int, hsv: HsvFilter | None, slot: int
) -> list[Outcome]:
    """Read one tile a request into a slot, as (n, 3, tile_px, tile_px) uint8; runs in a reader process.

    Raises:
        GeometryError: a tile is smaller than `tile_px`.
    """
    tiles = state.slot(slot, (len(requests), 3, tile_px, tile_px))
    files = _OPEN.setdefault(state, _OpenFiles())
    return [_read_one(files, request, hsv, tile) for request, tile in zip(requests, tiles, strict=True)]


def _read_one(files: _OpenFiles, request: TileRequest, hsv: HsvFilter | None, out: Pixels) -> Outcome:
    where = f"{request.path}/{request.key}"
    try:
        rgb = files.tile(request)
    except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, KeyError, Image.DecompressionBombError) as error:
        # Pillow's decoders raise SyntaxError for a broken PNG, h5py OSError or KeyError.
        return Outcome(False, unreadable=1, reason=f"{where}: {error}", lost=True)
    side = out.shape[1]
    room = (rgb.shape[1] - side, rgb.shape[0] - side)
    if min(room) < 0:
        raise GeometryError(
            f"{where} has {rgb.shape[1]} x {rgb.shape[0]} px, which is smaller than tile_px = {side}; "
            f"ask for tile_px = {min(rgb.shape[:2])} or less (tiles are never enlarged)"
        )
    x, y = (int(share * (space + 1)) for share, space in zip(request.at, room, strict=True))
    crop = np.ascontiguousarray(rgb[y : y + side, x : x + side])
    if hsv is not None and not hsv.keeps(crop):
        return Outcome(False, 1, hsv=1)
    out[:] = crop.transpose(2, 0, 1)
    return Outcome(True, 0, (x, y))


def check_size(archive: Archive, tile_px: int) -> None:
    """Look at the first tile of an archive.

    Raises:
        GeometryError: it is smaller than `tile_px`.
    """
    request = TileRequest(archive.kind, archive.path, archive.keys[0] if archive.keys else 0, (0.0, 0.0))
    _read_one(_OpenFiles(), request, None, np.empty((3, tile_px, tile_px), dtype=np.uint8))
