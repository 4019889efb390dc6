"""Reader processes: they open slides, plan tiles and fill shared memory with pixels.

Reading happens in processes of their own because a codec can crash: a segmentation fault
then costs one slide and not the run. Each process keeps its slides open and its decoded
native tiles cached from one task to the next, and across slides.

Tasks go to a process in order and come back in order, so when one dies the first task
still open on it is the one that killed it; the others are given to its successor.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import EosinError, ReaderCrashError, RegionError, SlideError
from eosin.features.jobs import Job
from eosin.geometry import ReadPlan
from eosin.slides import Slide

OPEN_SLIDES = 3
# glibc gives blocks of this size and more back when they are freed; left alone, it learns to keep those of a thumbnail.
MMAP_BYTES = 4 * 2**20
SENT_AHEAD = 4
TASK_TIMEOUT_S = 900.0


class ReaderState:
    """What one reader keeps between tasks: open slides, threads, and the shared pixels."""

    def __init__(
        self, pixels: npt.NDArray[np.uint8], slot_bytes: int, threads: int, *, keep: int = OPEN_SLIDES
    ) -> None:
        self.pixels = pixels
        self.keep = keep
        self.slot_bytes = slot_bytes
        self._slides: OrderedDict[Job, Slide] = OrderedDict()
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def slide(self, job: Job) -> Slide:
        """Return the job's slide, opened once and kept while it is in use."""
        key = job
        if key not in self._slides:
            self._slides[key] = job.open()
            self.close_slides(max(1, self.keep))
        self._slides.move_to_end(key)
        return self._slides[key]

    def close_slides(self, keep: int) -> None:
        """Close all but the last `keep` slides that this reader opened, with their decoded native tiles."""
        while len(self._slides) > keep:
            job, old = self._slides.popitem(last=False)
            if old is not job.source:
                old.close()

    def slot(self, index: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return slot `index` of the shared pixels as an array of `shape`."""
        start = index * self.slot_bytes
        return self.pixels[start : start + int(np.prod(shape))].reshape(shape)

    def map(self, function: Callable[[int], None], count: int) -> None:
        """Run ``function(0) ... function(count - 1)``, on threads when there are several."""
        if self._pool is None:
            for i in range(count):
                function(i)
        else:
            list(self._pool.map(function, range(count)))

    def close(self) -> None:
        """Close every slide this reader opened."""
        self.close_slides(0)
        if self._pool is not None:
            self._pool.shutdown()


def read_tiles(
    state: ReaderState, job: Job, plan: ReadPlan, xy: npt.NDArray[np.int64], slot: int
) -> tuple[npt.NDArray[np.int8], dict[str, npt.NDArray[np.float32]]]:
    """Read tiles into a slot and measure them.

    Args:
        state: the reader's.
        job: slide to read.
        plan: how a tile is read.
        xy: (n, 2) level-0 top-left corners.
        slot: where the pixels go, as (n, tile_px, tile_px, 3) uint8.

    Returns:
        read_status int8 (n,): 0 read, 1 unreadable; and the columns ``valid`` and
        `PIXEL_COLUMNS`, float32 (n,).
    """
    from eosin.tiles.qc import PIXEL_COLUMNS, READ_FAILED, tile_qc

    slide = state.slide(job)
    count = len(xy)
    tiles = state.slot(slot, (count, plan.tile_px, plan.tile_px, 3))
    status = np.zeros(count, dtype=np.int8)
    table = {name: np.zeros(count, dtype=np.float32) for name in ("valid", *PIXEL_COLUMNS)}

    def one(i: int) -> None:
        try:
            read = slide.read_tile((int(xy[i, 0]), int(xy[i, 1])), plan)
        except RegionError:
            status[i] = READ_FAILED
            return
        tiles[i] = read.rgb
        table["valid"][i] = read.valid_fraction
        for name, value in tile_qc(tiles[i], plan.mpp).items():
            table[name][i] = value

    state.map(one, count)
    return status, table


def serve(connection_fd: int, memory_fd: int, size: int, slot_bytes: int, threads: int, keep: int) -> None:
    """Run tasks from the connection until it closes; the main function of a reader process.

    Between tasks at most `keep` slides stay open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    connection: Connection = Connection(connection_fd)
    sys.path[:] = connection.recv()
    pixels = np.frombuffer(mmap.mmap(memory_fd, size), dtype=np.uint8)
    state = ReaderState(pixels, slot_bytes, threads, keep=keep)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is done, or dead
        while True:
            function, args = connection.recv()
            try:
                answer = (True, function(state, *args))
            except EosinError as error:
                answer = (False, error)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # crosses the process boundary; `ReaderPool.result` raises it again
                answer = (False, SlideError(f"{type(error).__name__}: {error}"))
            connection.send(answer)
            del answer, args
            state.close_slides(keep)
    state.close()


class Ticket:
    """A task given to the pool, and later its answer."""

    __slots__ = ("answer", "args", "done", "function", "what")

    def __init__(self, what: str, function: Callable[..., Any], args: tuple) -> None:
        self.what = what
        self.function = function
        self.args = args
        self.done = False
        self.answer: Any = None


class _Process:
    """One reader process, the tasks it was sent, and the tasks that wait to be sent.

    Few tasks are sent ahead, so that neither side ever blocks writing into a full pipe
    while the other does the same.
    """

    def __init__(self, memory_fd: int, size: int, slot_bytes: int, threads: int, keep: int) -> None:
        self.keep = keep
        ours, theirs = socket.socketpair()
        # Not multiprocessing: its children import the user's script again, and need a main guard in it.
        call = f"serve({theirs.fileno()}, {memory_fd}, {size}, {slot_bytes}, {threads}, {keep})"
        command = [sys.executable, "-c", f"from eosin.features.readers import serve; {call}"]
        environment = {"MALLOC_MMAP_THRESHOLD_": str(MMAP_BYTES), **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(), memory_fd), env=environment)
        theirs.close()
        self.connection: Connection = Connection(ours.detach())
        self.connection.send(sys.path)
        self.sent: deque[Ticket] = deque()
        self.waiting: deque[Ticket] = deque()

    def give(self, ticket: Ticket) -> None:
        self.waiting.append(ticket)
        self.send()

    def send(self) -> None:
        while self.waiting and len(self.sent) < SENT_AHEAD:
            ticket = self.waiting.popleft()
            self.sent.append(ticket)
            # If it died, `ReaderPool._pump` sees the end of the pipe and tells whose fault it was.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.connection.send((ticket.function, ticket.args))


class ReaderPool:
    """Readers with a fixed number of pixel slots; ``workers=0`` reads inside this process.

    Args:
        workers: processes that read tiles; one more plans slides.
        slots: chunks of pixels that may be in flight.
        slot_bytes: size of a chunk.
        threads: threads inside each reader.
    """

    def __init__(self, *, workers: int, slots: int, slot_bytes: int, threads: int = 1) -> None:
        self._slot_bytes, self._threads, self._size = slot_bytes, threads, slots * slot_bytes
        self.free = deque(range(slots))
        self._memory_fd = _shared_memory(self._size) if workers else None
        # Left to the garbage collector: closing a map that arrays still look into is an error.
        block = mmap.mmap(self._memory_fd, self._size) if self._memory_fd is not None else bytearray(self._size)
        self._state = ReaderState(np.frombuffer(block, dtype=np.uint8), slot_bytes, threads)
        # The planner sees each slide once.
        self._readers = [self._start(keep) for keep in (0, *[OPEN_SLIDES] * workers)] if workers else []

    def _start(self, keep: int) -> _Process:
        assert self._memory_fd is not None
        return _Process(self._memory_fd, self._size, self._slot_bytes, self._threads, keep)

    def submit(self, what: str, function: Callable[..., Any], *args: Any, planning: bool = False) -> Ticket:
        """Give ``function(state, *args)`` to the least busy reader; `what` names it in an error.

        Planning goes to a process of its own, so that the next slide's tissue does not hold
        up the present slide's tiles.
        """
        ticket = Ticket(what, function, args)
        if self._readers:
            lane = self._readers[:1] if planning else self._readers[1:]
            min(lane, key=lambda reader: len(reader.sent) + len(reader.waiting)).give(ticket)
        return ticket

    def result(self, ticket: Ticket) -> Any:
        """Wait for a task and return its value.

        Raises:
            EosinError: what the task raised.
            ReaderCrashError: its process died, or gave no answer in time.
        """
        if not self._readers and not ticket.done:
            ticket.done = True
            try:
                ticket.answer = (True, ticket.function(self._state, *ticket.args))
            except EosinError as error:
                ticket.answer = (False, error)
        while not ticket.done:
            self._pump()
        ok, value = ticket.answer
        if not ok:
            raise value
        return value

    def slot(self, index: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return slot `index` as an array of `shape`, without copying."""
        return self._state.slot(index, shape)

    def _pump(self) -> None:
        """Take in what has arrived; replace readers that died."""
        ready = wait([reader.connection for reader in self._readers], timeout=TASK_TIMEOUT_S)
        if not ready:
            for reader in self._readers:
                if reader.sent:
                    reader.process.kill()
            return
        for index, reader in enumerate(self._readers):
            if reader.connection not in ready:
                continue
            try:
                answer = reader.connection.recv()
            except (EOFError, ConnectionResetError):
                self._readers[index] = self._replace(reader)
                continue
            ticket = reader.sent.popleft()
            ticket.answer, ticket.done = answer, True
            reader.send()

    def _replace(self, dead: _Process) -> _Process:
        code = dead.process.wait()
        dead.connection.close()
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if dead.sent:
            culprit = dead.sent.popleft()
            culprit.done = True
            culprit.answer = (False, ReaderCrashError(f"the reader process died ({reason}) while {culprit.what}"))
        fresh = self._start(dead.keep)
        fresh.waiting = deque([*dead.sent, *dead.waiting])
        fresh.send()
        return fresh

    def close(self) -> None:
        """Stop the readers and free the shared pixels."""
        for reader in self._readers:
            reader.connection.close()
        for reader in self._readers:
            try:
                reader.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                reader.process.kill()
                reader.process.wait()
        self._readers = []
        self._state.close()
        if self._memory_fd is not None:
            os.close(self._memory_fd)
            self._memory_fd = None


def _shared_memory(size: int) -> int:
    """Return the descriptor of `size` bytes that processes can share and nothing outlives."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("eosin-pixels")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
