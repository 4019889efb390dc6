"""Direct reading of the JPEG tiles inside a tiled TIFF slide.

Aperio SVS, generic tiled TIFF and many OME-TIFF files hold a pyramid of small JPEG images. This
module reads those native tiles itself: the codec's own reduction (a smaller inverse DCT gives
1/2, 1/4 or 1/8 of the size; ITU-T T.81 fixes the 8 x 8 blocks it works on) is not reachable
through OpenSlide, and native tiles decoded for one region are kept for its neighbours.

The TIFF must be a plain grid of tiles. Formats whose tiles overlap or are placed by a table
(Ventana, Trestle) are not for this reader even though their pages are tiled JPEG.

Frames: the *read frame* of (level, scale) has ``ceil(level size / scale)`` pixels, and pixel
(x, y) covers the level's pixels ``scale * x`` to ``scale * x + scale - 1``.

Colour follows the TIFF's photometric tag, as in OpenSlide, whatever Adobe marker a tile carries;
but a JFIF tile is YCbCr by definition also where the tag says RGB (Bio-Formats writes such files).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from eosin.errors import GeometryError, RegionError

Pixels = npt.NDArray[np.uint8]

SCALES = (1, 2, 4, 8)
CACHE_BYTES = 256 * 2**20

_BLOCK_PX = 8
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOS_CODE, _ADOBE_CODE = 0xDA, 0xEE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """Where the native tiles of one level lie in the file.

    Attributes:
        size_px: (width, height) of the level.
        tile_px: (width, height) of a native tile; edge tiles are padded to it.
        columns: native tiles per row.
        offsets: int64 (n,) file offset of each tile's stream, row-major.
        bytecounts: int64 (n,) length of each stream, 0 for a tile that is absent.
        prefix: start of every stream: SOI, colour marker, shared tables.
    """

    size_px: tuple[int, int]
    tile_px: tuple[int, int]
    columns: int
    offsets: npt.NDArray[np.int64]
    bytecounts: npt.NDArray[np.int64]
    prefix: bytes

    @property
    def scales(self) -> tuple[int, ...]:
        """Reductions under which each native tile is a whole number of blocks and pixels."""
        aligned = all(side % _BLOCK_PX == 0 for side in self.tile_px)
        return SCALES if aligned else (1,)


@dataclass(slots=True)
class _Process:
    """What one process holds open: the file, the decoded tiles and the decodes under way."""

    pid: int
    fd: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    tiles: OrderedDict[tuple[int, int, int], Pixels] = field(default_factory=OrderedDict)
    pending: dict[tuple[int, int, int], Future[Pixels]] = field(default_factory=dict)
    held_bytes: int = 0


class JpegTiles:
    """Reads regions of the JPEG-tiled levels of one TIFF; shared by threads, safe after fork.

    Decoded native tiles are kept, least recently used first out, in at most `cache_bytes` of
    memory per process. Two threads that need the same native tile decode it once. An instance
    pickles as its path and tile table; the file is opened by the first read of each process,
    also by a first read after `close`.
    """

    def __init__(self, path: Path, levels: Sequence[_Level | None], *, cache_bytes: int = CACHE_BYTES) -> None:
        """Hold the tile tables of `path`; use `JpegTiles.open` to get them from the file."""
        self.path = path
        self.cache_bytes = cache_bytes
        self._levels = tuple(levels)
        self._process: _Process | None = None
        self._opening = threading.Lock()

    @classmethod
    def open(cls, path: Path, level_sizes: Sequence[tuple[int, int]]) -> JpegTiles | None:
        """Return a reader of `path`, or None when none of its levels is JPEG this module reads.

        Args:
            path: a file, TIFF or not.
            level_sizes: (width, height) of each level, finest first; each is looked up among
                the file's pages and their SubIFDs, the first page of that size counts.
        """
        try:
            with tifffile.TiffFile(path) as tiff:
                levels = [None if page is None else _parse(page) for page in _match(tiff, level_sizes)]
        except tifffile.TiffFileError:
            return None
        reader = cls(Path(path), levels)
        try:
            reader._levels = tuple(
                level if level is not None and reader._decodable(level) else None for level in levels
            )
        finally:
            reader.close()
        return reader if any(reader._levels) else None

    def has(self, level: int) -> bool:
        """Return whether regions of `level` can be read here."""
        return 0 <= level < len(self._levels) and self._levels[level] is not None

    def scales(self, level: int) -> tuple[int, ...]:
        """Return the codec reductions `level` offers; (1,) also for a level that is not JPEG."""
        found = self._levels[level] if self.has(level) else None
        return found.scales if found is not None else (1,)

    def read_region(self, xy_px: tuple[int, int], *, level: int, scale: int, size_px: tuple[int, int]) -> Pixels:
        """Return the region as uint8 (height, width, 3) RGB, writable.

        Args:
            xy_px: (x, y) of the top-left pixel in the read frame of (level, scale).
            level: a level for which `has` is true.
            scale: one of `scales(level)`.
            size_px: (width, height) in the read frame.

        Raises:
            GeometryError: no such level or scale, an empty region, or one that leaves the level.
            RegionError: a native tile is truncated or cannot be decoded.
        """
        found = self._levels[level] if self.has(level) else None
        if found is None or scale not in found.scales:
            raise GeometryError(
                f"{self.path.name}: level {level} has no JPEG tiles at 1/{scale}; see has() and scales()"
            )
        (x, y), (width, height) = xy_px, size_px
        frame = (-(-found.size_px[0] // scale), -(-found.size_px[1] // scale))
        if width < 1 or height < 1 or x < 0 or y < 0 or x + width > frame[0] or y + height > frame[1]:
            raise GeometryError(
                f"{self.path.name}: region {width} x {height} px at ({x}, {y}) is not inside "
                f"level {level} at 1/{scale}, which has {frame[0]} x {frame[1]} px"
            )
        tile_width, tile_height = found.tile_px[0] // scale, found.tile_px[1] // scale
        out = np.empty((height, width, 3), dtype=np.uint8)
        for row in range(y // tile_height, (y + height - 1) // tile_height + 1):
            top = row * tile_height - y
            y_from, y_to = max(0, top), min(height, top + tile_height)
            for column in range(x // tile_width, (x + width - 1) // tile_width + 1):
                left = column * tile_width - x
                x_from, x_to = max(0, left), min(width, left + tile_width)
                tile = self._tile((level, scale, row * found.columns + column))
                out[y_from:y_to, x_from:x_to] = tile[y_from - top : y_to - top, x_from - left : x_to - left]
        return out

    def close(self) -> None:
        """Close this process's file and drop its decoded tiles; no read may be under way."""
        with self._opening:
            process, self._process = self._process, None
        if process is not None:
            os.close(process.fd)

    def __getstate__(self) -> dict[str, object]:
        """Leave out what belongs to this process."""
        return {"path": self.path, "cache_bytes": self.cache_bytes, "_levels": self._levels}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the tables; the file is opened by the first read."""
        self.__dict__.update(state)
        self._process = None
        self._opening = threading.Lock()

    def _own(self) -> _Process:
        """Return this process's state, opened anew after a fork."""
        process = self._process
        if process is not None and process.pid == os.getpid():
            return process
        if process is not None:
            # Forked: the parent's lock may be held by a thread that does not exist here.
            self._opening = threading.Lock()
        with self._opening:
            process = self._process
            if process is None or process.pid != os.getpid():
                process = self._process = _Process(pid=os.getpid(), fd=os.open(self.path, os.O_RDONLY))
        return process

    def _tile(self, key: tuple[int, int, int]) -> Pixels:
        """Return the decoded native tile (level, scale, index) from memory or from the file."""
        own = self._own()
        with own.lock:
            tile = own.tiles.get(key)
            if tile is not None:
                own.tiles.move_to_end(key)
                return tile
            future = own.pending.get(key)
            mine = future is None
            if future is None:
                future = own.pending[key] = Future()
        if not mine:
            return future.result()
        try:
            tile = self._decode(own.fd, key)
        except BaseException as error:
            with own.lock:
                del own.pending[key]
            future.set_exception(error)
            raise
        with own.lock:
            del own.pending[key]
            own.tiles[key] = tile
            own.held_bytes += tile.nbytes
            while own.held_bytes > self.cache_bytes:
                own.held_bytes -= own.tiles.popitem(last=False)[1].nbytes
        future.set_result(tile)
        return tile

    def _decode(self, fd: int, key: tuple[int, int, int]) -> Pixels:
        """Return the native tile `key` at its scale, uint8 (tile height, tile width, 3)."""
        level_index, scale, index = key
        level = self._levels[level_index]
        assert level is not None
        row, column = divmod(index, level.columns)
        inside = tuple(
            min(side, size - side * at)
            for side, size, at in zip(level.tile_px, level.size_px, (column, row), strict=True)
        )
        width, height = level.tile_px[0] // scale, level.tile_px[1] // scale
        if level.bytecounts[index] == 0:
            return np.full((height, width, 3), 255, dtype=np.uint8)
        # Where padding shares a block with the picture, a smaller DCT would mix them.
        mixed = scale > 1 and any(side % _BLOCK_PX for side in inside)
        reduced = 1 if mixed else scale
        want = (level.tile_px[1] // reduced, level.tile_px[0] // reduced)
        try:
            pixels = simplejpeg.decode_jpeg(
                _stream(fd, level, index), min_height=want[0], min_width=want[1], min_factor=reduced
            )
        except (ValueError, EOFError) as error:
            raise self._error(key, str(error)) from error
        if pixels.shape[:2] != want:
            raise self._error(key, f"it has {pixels.shape[1]} x {pixels.shape[0]} px instead of {want[1]} x {want[0]}")
        return _box_average(pixels, inside, scale) if mixed else pixels

    def _error(self, key: tuple[int, int, int], reason: str) -> RegionError:
        level_index, _, index = key
        level = self._levels[level_index]
        assert level is not None
        row, column = divmod(index, level.columns)
        return RegionError(
            f"{self.path.name}: native tile at column {column}, row {row} of level {level_index} "
            f"cannot be decoded: {reason}; the file is damaged there"
        )

    def _decodable(self, level: _Level) -> bool:
        """Return whether the level's first stream is a JPEG of the size and colours the tags promise."""
        present = np.flatnonzero(level.bytecounts)
        if present.size == 0:
            return False
        try:
            header = simplejpeg.decode_jpeg_header(_stream(self._own().fd, level, int(present[0])))
        except (ValueError, EOFError):
            return False
        return header[:2] == (level.tile_px[1], level.tile_px[0]) and header[2].upper() in ("RGB", "YCBCR")


def _pages(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    """Yield the file's pages in order, each followed by its SubIFDs."""
    for page in tiff.pages:
        full = page.aspage()
        yield full
        if full.subifds:
            for sub in full.pages or ():
                yield sub.aspage()


def _match(tiff: tifffile.TiffFile, level_sizes: Sequence[tuple[int, int]]) -> list[tifffile.TiffPage | None]:
    """Return for each level the first page of exactly its size, or None."""
    found: dict[tuple[int, int], tifffile.TiffPage] = {}
    wanted = {(int(width), int(height)) for width, height in level_sizes}
    for page in _pages(tiff):
        size = (page.imagewidth, page.imagelength)
        if size in wanted:
            found.setdefault(size, page)
        if len(found) == len(wanted):
            break
    return [found.get((int(width), int(height))) for width, height in level_sizes]


def _parse(page: tifffile.TiffPage) -> _Level | None:
    """Return where the tiles of `page` lie, or None when it is not 8-bit RGB or YCbCr JPEG tiles."""
    colours = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)
    plain = (
        page.is_tiled
        and page.compression == tifffile.COMPRESSION.JPEG
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.photometric in colours
        and page.imagedepth == page.tiledepth == 1
    )
    if not plain:
        return None
    columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    if len(page.dataoffsets) != columns * rows or len(page.databytecounts) != columns * rows:
        return None
    tables = page.jpegtables or b""
    body = _without_adobe(tables.removeprefix(_SOI).removesuffix(_EOI))
    transform = 0 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
    # APP14: length 14, "Adobe", version 100, two flag words, transform (0 none, 1 YCbCr).
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + bytes([transform])
    return _Level(
        size_px=(page.imagewidth, page.imagelength),
        tile_px=(page.tilewidth, page.tilelength),
        columns=columns,
        offsets=np.asarray(page.dataoffsets, dtype=np.int64),
        bytecounts=np.asarray(page.databytecounts, dtype=np.int64),
        prefix=_SOI + adobe + body,
    )


def _stream(fd: int, level: _Level, index: int) -> bytes:
    """Return the complete JPEG of one native tile; EOFError when the file ends before it does."""
    count = int(level.bytecounts[index])
    data = os.pread(fd, count, int(level.offsets[index]))
    if len(data) != count:
        raise EOFError(f"the file ends {count - len(data)} bytes too early")
    return level.prefix + _without_adobe(data.removeprefix(_SOI))


def _without_adobe(segments: bytes) -> bytes:
    """Return JPEG marker segments (what follows SOI) less Adobe's, which would override ours."""
    at = 0
    while at + 4 <= len(segments) and segments[at] == 0xFF and segments[at + 1] != _SOS_CODE:
        end = at + 2 + int.from_bytes(segments[at + 2 : at + 4], "big")
        if segments[at + 1] == _ADOBE_CODE:
            segments = segments[:at] + segments[end:]
        else:
            at = end
    return segments


def _box_average(pixels: Pixels, inside: tuple[int, ...], scale: int) -> Pixels:
    """Return means over scale x scale boxes of the (width, height) `inside` of a padded tile, same padding after."""
    height, width = pixels.shape[0], pixels.shape[1]
    padding = ((0, height - inside[1]), (0, width - inside[0]), (0, 0))
    whole = np.pad(pixels[: inside[1], : inside[0]], padding, mode="edge")
    boxes = whole.reshape(height // scale, scale, width // scale, scale, 3)
    return np.rint(boxes.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)
