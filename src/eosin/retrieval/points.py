"""Points on disk: append-only files, and a journal that says how much of them counts.

    gNNNN/vectors.bin   (n, dim) float16 or float32, as first given
    gNNNN/rows.bin      (n,) id, length of the vector, payload; text as numbers into the journal's word lists
    gNNNN/dead.bin      rows that were deleted
    gNNNN/journal.txt   a line a commit: checksum, rows and dead so far, new words

A commit appends to the first three, syncs them, then appends and syncs its line. Before the line is whole the commit
has not happened; after it, it cannot be lost. What lies beyond the last whole line is the torn tail of a killed
process: readers do not look at it, the next writer cuts it off. A row whose id comes again later is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import IndexCorruptError
from eosin.features.writer import fsync_folder
from eosin.retrieval.filters import FieldType
from eosin.retrieval.manifest import disk_trouble
from eosin.retrieval.protocol import Ids, IndexSpec, Vectors

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

STREAMS = ("vectors.bin", "rows.bin", "dead.bin")
JOURNAL = "journal.txt"
CHUNK_BYTES = 2**25  # of vectors that are copied or checked at once
_STORED: Mapping[FieldType, str] = {"keyword": "<i4", "integer": "<i8", "float": "<f8", "bool": "?"}


@dataclass(frozen=True, slots=True)
class Commit:
    """One line of the journal: totals after it, checksums of what it appended, words it added."""

    rows: int
    dead: int
    dtype: str
    checks: tuple[int, int, int]
    words: Mapping[str, list[str]]

    def line(self) -> bytes:
        """Return the line, its own checksum first."""
        text = json.dumps([self.rows, self.dead, self.dtype, self.checks, self.words], ensure_ascii=False)
        return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()

    @classmethod
    def parse(cls, line: bytes) -> Commit | None:
        """Return the commit of a whole line, None when it does not match its checksum."""
        check, _, text = line.rstrip(b"\n").partition(b" ")
        if check != b"%08x" % zlib.crc32(text):
            return None
        rows, dead, dtype, checks, words = json.loads(text)
        return cls(rows, dead, dtype, tuple(checks), words)


@dataclass(slots=True)
class Points:
    """One generation of points: the files of a folder as far as its journal counts them, memory-mapped.

    Attributes:
        folder: where the files are.
        spec: of the index.
        commits: the journal.
        journal_bytes: its length, without a torn tail.
        words: keyword field -> text -> number.
        vectors: (n, dim) as stored.
        rows: (n,) records: id, length, c0, c1, ... in the order of the spec's fields.
        ids: uint64 (n,).
        live: rows that are neither replaced nor deleted (n,).
    """

    folder: Path
    spec: IndexSpec
    commits: list[Commit] = field(default_factory=list)
    journal_bytes: int = 0
    words: dict[str, dict[str, int]] = field(default_factory=dict)
    vectors: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    rows: Array = field(default_factory=lambda: np.empty(0))
    ids: Ids = field(default_factory=lambda: np.empty(0, np.uint64))
    live: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    _sorted: tuple[Ids, Rows] = field(default_factory=lambda: (np.empty(0, np.uint64), np.empty(0, np.int64)))
    _columns: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, spec: IndexSpec) -> Points:
        """Make the empty files, whatever an interrupted attempt left there, and open them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*STREAMS, JOURNAL):
            with open(folder / name, "wb") as handle:
                os.fsync(handle.fileno())
        fsync_folder(folder)
        return cls.open(folder, spec)

    @classmethod
    def open(cls, folder: Path, spec: IndexSpec) -> Points:
        """Read the journal and map the files.

        Raises:
            IndexCorruptError: a line inside the journal is broken, a file is shorter than the journal says, or the
                rows do not match their checksums.
            FileNotFoundError: a file is missing.
        """
        points = cls(folder, spec)
        points.commits, points.journal_bytes = _read_journal(folder / JOURNAL)
        points._map()
        points._check_rows()
        for commit in points.commits:
            points._add_words(commit.words)
        points.ids = np.ascontiguousarray(points.rows["id"])
        order = np.argsort(points.ids, kind="stable")
        last = np.ones(len(order), bool)
        last[:-1] = points.ids[order[1:]] != points.ids[order[:-1]]
        points.live = np.zeros(len(order), bool)
        points.live[order[last]] = True
        points.live[np.fromfile(folder / "dead.bin", "<u8", points.last.dead)] = False
        order = order[points.live[order]]
        points._sorted = points.ids[order], order
        return points

    @property
    def last(self) -> Commit:
        """The last commit; one of nothing when there is none."""
        return self.commits[-1] if self.commits else Commit(0, 0, "<f4", (0, 0, 0), {})

    def find(self, ids: Ids) -> tuple[Rows, npt.NDArray[np.bool_]]:
        """Return the live rows of ids (n,) and which ids there are (n,); rows of absent ids mean nothing."""
        known, rows = self._sorted
        if not len(known):
            return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
        place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return rows[place], known[place] == ids

    def column(self, name: str) -> Array:
        """Return a field of every row (n,), contiguous; keywords as numbers (`words`)."""
        found = self._columns.get(f"field {name}")
        if found is None or len(found) != len(self.rows):
            found = self._columns[f"field {name}"] = np.ascontiguousarray(self.rows[self._at(name)])
        return found

    def lengths(self) -> npt.NDArray[np.float64]:
        """Return the length of every vector (n,)."""
        found = self._columns.get("lengths")
        if found is None or len(found) != len(self.rows):
            found = self._columns["lengths"] = np.ascontiguousarray(self.rows["length"])
        return found

    def payload(self, rows: Rows) -> dict[str, Array]:
        """Return the payload of some rows, keywords as text."""
        records = self.rows[rows]
        found: dict[str, Array] = {}
        for name, kind in self.spec.fields.items():
            values = records[self._at(name)]
            if kind == "keyword":
                values = self._texts(name)[values]
            found[name] = np.ascontiguousarray(values)
        return found

    def append(self, ids: Ids, vectors: Vectors, columns: Mapping[str, Array]) -> None:
        """Add rows, replacing those of the same ids; durable when it returns.

        Args:
            ids: uint64 (n,), each once.
            vectors: (n, dim), finite, of this generation's dtype or convertible to it without loss.
            columns: as `inputs.check_payload` gives them.

        Raises:
            IndexStoreError: the disk refuses; nothing was stored.
        """
        dtype = self.last.dtype if len(self.rows) else vectors.dtype.newbyteorder("<").str
        stored = np.ascontiguousarray(vectors, dtype)
        records = np.zeros(len(ids), self._record())
        records["id"] = ids
        records["length"] = np.sqrt(np.einsum("nd,nd->n", stored, stored, dtype=np.float64))
        words: dict[str, list[str]] = {}
        for name, column in columns.items():
            if self.spec.fields[name] == "keyword":
                column, fresh = _numbers(column, self.words.get(name, {}))
                if fresh:
                    words[name] = fresh
            records[self._at(name)] = column
        self._commit(stored, records, np.empty(0, "<u8"), words)
        first = len(self.ids)
        old, replaced = self.find(ids)
        self.ids = np.concatenate([self.ids, ids])
        self.live = np.concatenate([self.live, np.ones(len(ids), bool)])
        self.live[old[replaced]] = False
        known, rows = self._sorted
        order = np.argsort(ids, kind="stable")
        rows[np.searchsorted(known, ids[replaced])] = first + np.flatnonzero(replaced)
        fresh_rows = order[~replaced[order]]
        place = np.searchsorted(known, ids[fresh_rows])
        self._sorted = np.insert(known, place, ids[fresh_rows]), np.insert(rows, place, first + fresh_rows)

    def kill(self, rows: Rows) -> None:
        """Delete live rows; durable when it returns.

        Raises:
            IndexStoreError: the disk refuses; nothing was deleted.
        """
        empty = self.vectors[:0], self.rows[:0]
        self._commit(*empty, rows.astype("<u8"), {})
        self.live[rows] = False
        known, at = self._sorted
        keep = self.live[at]
        self._sorted = known[keep], at[keep]

    def chunks(self) -> Iterator[slice]:
        """Yield slices that cover the rows, each with at most `CHUNK_BYTES` of float32 vectors."""
        step = max(1, CHUNK_BYTES // (4 * self.spec.dim))
        for start in range(0, len(self.rows), step):
            yield slice(start, min(start + step, len(self.rows)))

    def check_vectors(self) -> None:
        """Compare the vectors with their checksums, one commit after the other.

        Raises:
            IndexCorruptError: a commit's vectors were altered on disk.
        """
        start = 0
        for commit in self.commits:
            if zlib.crc32(_bytes(self.vectors[start : commit.rows])) != commit.checks[0]:
                raise _corrupt(self.folder / STREAMS[0], f"rows {start} to {commit.rows} differ from their checksum")
            start = commit.rows

    def copy_live(self, folder: Path, dtype: str | None = None) -> Points:
        """Write the live rows, in their order, as a new generation in `folder`, and return it.

        Words that no live row uses are left out.

        Args:
            folder: a new folder.
            dtype: of the vectors; as they are when None.

        Raises:
            OSError: the disk refuses.
        """
        keep = np.flatnonzero(self.live)
        renumber, words = self._used_words(keep)
        names = [(self._at(name), table) for name, table in renumber.items()]
        checks = [0, 0, 0]
        dtype = dtype or self.last.dtype
        Points.create(folder, self.spec)
        with open(folder / STREAMS[0], "r+b", 0) as vectors, open(folder / STREAMS[1], "r+b", 0) as rows:
            for part in self.chunks():
                taken = keep[np.searchsorted(keep, part.start) : np.searchsorted(keep, part.stop)]
                records = self.rows[taken]
                for name, table in names:
                    records[name] = table[records[name]]
                for at, handle, data in ((0, vectors, self.vectors[taken].astype(dtype)), (1, rows, records)):
                    checks[at] = zlib.crc32(_bytes(data), checks[at])
                    _write(handle, data)
            os.fsync(vectors.fileno())
            os.fsync(rows.fileno())
        commit = Commit(len(keep), 0, dtype, (checks[0], checks[1], checks[2]), words)
        with open(folder / JOURNAL, "r+b", 0) as journal:
            _write(journal, np.frombuffer(commit.line(), np.uint8))
            os.fsync(journal.fileno())
        return Points.open(folder, self.spec)

    def bytes_on_disk(self) -> int:
        """Return the size of the files."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def _used_words(self, rows: Rows) -> tuple[dict[str, npt.NDArray[np.int32]], dict[str, list[str]]]:
        """Return old number -> new number a keyword field, and the words that are left, in their old order."""
        tables, words = {}, {}
        for name, known in self.words.items():
            used = np.zeros(len(known), bool)
            used[self.column(name)[rows]] = True
            tables[name] = (np.cumsum(used) - 1).astype(np.int32)
            words[name] = [word for word, number in known.items() if used[number]]
        return tables, {name: left for name, left in words.items() if left}

    def _commit(self, vectors: Array, records: Array, dead: Array, words: dict[str, list[str]]) -> None:
        """Append, sync, and only then write the line that makes it count."""
        last, data = self.last, (vectors, records, dead)
        checks = zlib.crc32(_bytes(vectors)), zlib.crc32(_bytes(records)), zlib.crc32(_bytes(dead))
        dtype = vectors.dtype.str if len(vectors) else last.dtype
        commit = Commit(last.rows + len(records), last.dead + len(dead), dtype, checks, words)
        parts = [
            (self.folder / name, start, part)
            for name, start, part in zip(STREAMS, self._ends(), data, strict=True)
            if part.size
        ]
        line = np.frombuffer(commit.line(), np.uint8)
        parts.append((self.folder / JOURNAL, self.journal_bytes, line))
        try:
            for path, start, part in parts:
                with open(path, "r+b", 0) as handle:
                    handle.truncate(start)
                    handle.seek(start)
                    _write(handle, part)
                    os.fsync(handle.fileno())
        except OSError as error:
            for path, start, _ in parts:
                with contextlib.suppress(OSError), open(path, "r+b", 0) as handle:
                    handle.truncate(start)
            raise disk_trouble(error, self.folder.parent) from error
        self.commits.append(commit)
        self.journal_bytes += len(line)
        self._add_words(words)
        self._map()

    def _map(self) -> None:
        """Map the rows that count."""
        self.vectors = _mapped(self.folder / STREAMS[0], np.dtype(self.last.dtype), (self.last.rows, self.spec.dim))
        self.rows = _mapped(self.folder / STREAMS[1], self._record(), (self.last.rows,))
        file = self.folder / STREAMS[2]
        if file.stat().st_size < 8 * self.last.dead:
            raise _corrupt(file, f"it holds {file.stat().st_size} bytes, its journal counts {8 * self.last.dead}")

    def _check_rows(self) -> None:
        rows = dead = 0
        gone = np.fromfile(self.folder / STREAMS[2], "<u8", self.last.dead)
        for commit in self.commits:
            checks = zlib.crc32(_bytes(self.rows[rows : commit.rows])), zlib.crc32(_bytes(gone[dead : commit.dead]))
            for at in (1, 2):
                if checks[at - 1] != commit.checks[at]:
                    raise _corrupt(self.folder / STREAMS[at], f"the commit of row {rows} differs from its checksum")
            rows, dead = commit.rows, commit.dead

    def _ends(self) -> tuple[int, int, int]:
        """Return how many bytes of each stream count."""
        last = self.last
        row = self.spec.dim * np.dtype(last.dtype).itemsize
        return last.rows * row, last.rows * self._record().itemsize, 8 * last.dead

    def _texts(self, name: str) -> Array:
        """Return the words of a field by their numbers."""
        known = self.words.get(name, {})
        found = self._columns.get(f"words of {name}")
        if found is None or len(found) != len(known):
            found = self._columns[f"words of {name}"] = np.array([*known, None], object)[:-1]
        return found

    def _add_words(self, words: Mapping[str, list[str]]) -> None:
        for name, fresh in words.items():
            known = self.words.setdefault(name, {})
            known.update({word: len(known) + at for at, word in enumerate(fresh)})

    def _at(self, name: str) -> str:
        return f"c{list(self.spec.fields).index(name)}"

    def _record(self) -> np.dtype[Any]:
        columns = [(f"c{at}", _STORED[kind]) for at, kind in enumerate(self.spec.fields.values())]
        return np.dtype([("id", "<u8"), ("length", "<f8"), *columns])


def _numbers(column: Array, known: Mapping[str, int]) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return text (n,) as numbers, and the words that `known` lacks in the order of their numbers."""
    fresh: dict[str, int] = {}
    numbers = [
        known[word] if word in known else fresh.setdefault(word, len(known) + len(fresh)) for word in column.tolist()
    ]
    return np.array(numbers, np.int32), list(fresh)


def _read_journal(path: Path) -> tuple[list[Commit], int]:
    """Return the whole commits and the bytes they take; a torn last line is left out."""
    commits: list[Commit] = []
    size = 0
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for at, line in enumerate(lines):
        commit = Commit.parse(line)
        if commit is None:
            raise _corrupt(path, f"line {at + 1} of {len(lines)} does not match its checksum")
        commits.append(commit)
        size += len(line)
    return commits, size


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return a file as a read-only array; fewer bytes than the shape needs is damage."""
    needed, found = int(np.prod(shape)) * dtype.itemsize, path.stat().st_size
    if found < needed:
        raise _corrupt(path, f"it holds {found} bytes, its journal counts {needed}")
    return np.memmap(path, dtype, "r", shape=shape) if needed else np.empty(shape, dtype)


def _bytes(data: Array) -> memoryview:
    return np.ascontiguousarray(data).view(np.uint8).reshape(-1).data if data.size else memoryview(b"")


def _write(handle: Any, data: Array) -> None:
    left = _bytes(data)
    while len(left):
        left = left[handle.write(left) :]


def _corrupt(path: Path, why: str) -> IndexCorruptError:
    return IndexCorruptError(f"{path} is damaged: {why}; restore it from a snapshot, or make the index again")
