"""The state of a review: one file of JSON lines, only ever added to.

The first line says what is reviewed; every later line is a round's queue, a decision or an undo. What is true now is
what the lines say when they are read in order, so nothing is ever rewritten and no crash can lose a decision that was
acknowledged: a line counts once it is on the disk with its line end, and a half-written last line is cut off. Another
reviewer writes another file; `merge` puts them together and names what they disagree on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import orjson
from filelock import FileLock, Timeout

from eosin.errors import StoreCorruptError, StoreError, StoreLockedError, StoreMismatchError
from eosin.features.writer import fsync_folder

FORMAT, VERSION = "eosin.review", 1
Verdict = Literal["seed", "accept", "reject", "relabel", "skip"]
VERDICTS: tuple[Verdict, ...] = ("seed", "accept", "reject", "relabel", "skip")
SEED, AUDIT, RETRIEVED = "seed", "audit", "retrieved"
Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a file of decisions is about.

    Attributes:
        labels: classes, at least two, in the order of their keys.
        pool: what the tiles were: encoder, tile_px, mpp and what else tells one pool from another.
        reviewer: whose decisions these are.
        seed: of every random draw.
        seeds: tiles it begins from; fewer in the file mean that the start was cut short.
    """

    labels: tuple[str, ...]
    pool: Mapping[str, Any]
    reviewer: str
    seed: int
    seeds: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A tile in a queue.

    Attributes:
        id: of the tile.
        share: why it is there: retrieved, uncertain, hard, diverse or audit.
        label: the class that is proposed.
        p: probability of that class by the head; None before there is a head.
    """

    id: int
    share: str
    label: str
    p: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What a reviewer said about a tile.

    Attributes:
        id: of the tile.
        slide_id: where it lies, so that the file can be read without the pool.
        x: level-0 left edge.
        y: level-0 top edge.
        verdict: "seed", "accept" (the proposed class), "reject" (not that one), "relabel" (another one), "skip".
        label: the class it has; None for "skip", and for a "reject" among three classes or more.
        proposed: the class that was proposed; None for a seed.
        share: why it was shown, "seed" for a seed.
        round: from 0; -1 for a seed.
        at: time of the decision, ISO 8601.
        reviewer: who; several names joined by ", " after a merge.
    """

    id: int
    slide_id: str
    x: int
    y: int
    verdict: Verdict
    label: str | None
    proposed: str | None
    share: str
    round: int
    at: str
    reviewer: str


@dataclass(kw_only=True, slots=True)
class State:
    """What the lines of a file say when read in order.

    Attributes:
        start: the first line.
        decisions: by tile, in the order in which they were taken; undone ones are not here.
        rounds: the queue of each round.
        undone: tiles whose decision was taken back and not taken again, the latest last.
    """

    start: Start
    decisions: dict[int, Decision] = field(default_factory=dict)
    rounds: list[tuple[Item, ...]] = field(default_factory=list)
    undone: list[int] = field(default_factory=list)

    def apply(self, event: Event) -> None:
        """Take one line into account.

        Raises:
            KeyError, TypeError, ValueError: not such a line, or one that cannot follow what came before.
        """
        kind = event["kind"]
        if kind == "round":
            if event["round"] != len(self.rounds):
                raise ValueError(f"round {event['round']} follows {len(self.rounds)} rounds")
            names = ("share", "label", "p")
            items = ({"id": int(one[0], 16), **dict(zip(names, one[1:], strict=True))} for one in event["queue"])
            self.rounds.append(tuple(Item(**item) for item in items))
        elif kind == "decide":
            one = Decision(**{**_without_kind(event), "id": int(event["id"], 16), "reviewer": self.start.reviewer})
            if one.id in self.decisions:
                raise ValueError(f"tile {event['id']} is decided twice")
            if one.verdict not in VERDICTS or not (one.label is None or one.label in self.start.labels):
                raise ValueError(f"verdict {one.verdict!r} with label {one.label!r}")
            self.decisions[one.id] = one
            if one.id in self.undone:
                self.undone.remove(one.id)
        elif kind == "undo":
            taken = int(event["id"], 16)
            del self.decisions[taken]
            self.undone.append(taken)
        else:
            raise ValueError(f"unknown kind {kind!r}")


def start_event(start: Start) -> Event:
    """Return the first line of a file."""
    return {"kind": "start", "format": FORMAT, "version": VERSION, **asdict(start)}


def round_event(number: int, items: Sequence[Item], **about: Any) -> Event:
    """Return the line of a new queue; `about` says what it was made with."""
    queue = [[f"{item.id:016x}", item.share, item.label, item.p] for item in items]
    return {"kind": "round", "round": number, "queue": queue, **about}


def decide_event(decision: Decision) -> Event:
    """Return the line of a decision; its reviewer stands in the first line."""
    found = {name: value for name, value in asdict(decision).items() if name != "reviewer"}
    return {"kind": "decide", **found, "id": f"{decision.id:016x}"}


def undo_event(tile: int, at: str) -> Event:
    """Return the line that takes a tile's decision back."""
    return {"kind": "undo", "id": f"{tile:016x}", "at": at}


def _without_kind(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "kind"}


def read_state(path: Path) -> State:
    """Return what a file says; a half-written last line is ignored.

    Raises:
        StoreError: no such file, or nothing in it.
        StoreCorruptError: a line that cannot be, by number.
    """
    return _replayed(path, _whole_lines(_content(path)))


class Journal:
    """A file of decisions, open for adding; one process at a time. Use `create` or `open`, and close it."""

    def __init__(self, path: Path, state: State, lock: FileLock, file: Any) -> None:
        """Hold an open file; use `create` or `open` instead."""
        self.path, self.state = path, state
        self._lock, self._file = lock, file
        self._length = file.seek(0, os.SEEK_END)

    @classmethod
    def create(cls, path: Path, start: Start) -> Self:
        """Begin a new file.

        Raises:
            StoreError: the file is there already, or cannot be written.
            StoreLockedError: another process has it open.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _locked(path)
        except OSError as error:
            raise error if isinstance(error, StoreError) else _unwritable(path, error) from error
        try:
            if path.is_file() and _whole_lines(_content(path)):
                raise StoreError(f"{path} is there already; open it to go on, or give another name")
            file = path.open("wb+", buffering=0)  # a file without one whole line is what a killed start left
            fsync_folder(path.parent)
        except OSError as error:
            lock.release()
            raise error if isinstance(error, StoreError) else _unwritable(path, error) from error
        made = cls(path, State(start=start), lock, file)
        made._write([start_event(start)])
        return made

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a file to go on; a half-written last line is cut off.

        Raises:
            StoreError: no such file, or nothing in it.
            StoreCorruptError: a line that cannot be.
            StoreLockedError: another process has it open.
        """
        _content(path)  # no lock beside a file that is not there
        lock = _locked(path)
        try:
            content = _content(path)
            state = _replayed(path, _whole_lines(content))
            file = path.open("rb+", buffering=0)
            file.truncate(content.rfind(b"\n") + 1)
        except OSError as error:
            lock.release()
            raise error if isinstance(error, StoreError) else _unwritable(path, error) from error
        return cls(path, state, lock, file)

    def append(self, *events: Event) -> None:
        """Add lines; they are on the disk when this returns.

        Raises:
            StoreError: the disk is full or gone; nothing of `events` then counts.
            ValueError: an event that cannot follow what came before.
        """
        try:
            for event in events:
                self.state.apply(event)
        except (KeyError, TypeError, ValueError):
            self._reload()
            raise
        self._write(events)

    def _write(self, events: Sequence[Event]) -> None:
        lines = b"".join(orjson.dumps(event, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n" for event in events)
        try:
            self._file.seek(self._length)
            written = self._file.write(lines)
            if written != len(lines):
                raise OSError(f"{written} of {len(lines)} bytes written")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._length)
            self._reload()
            raise _unwritable(self.path, error) from error
        self._length += len(lines)

    def _reload(self) -> None:
        """Make the state again from what is on the disk."""
        self.state = _replayed(self.path, _whole_lines(_content(self.path)[: self._length]))

    def close(self) -> None:
        """Let go of the file; calling again does nothing."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        """Return the journal."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """Decisions of several files.

    Attributes:
        start: of the first file; its reviewer is all of them.
        decisions: what is agreed, in the order of the files.
        conflicts: decisions on one tile that cannot both be true; none of them is in `decisions`.
        both: tiles that the first two reviewers, or any two, gave a class.
        kappa: Cohen's kappa over these, None with fewer than two tiles or one class only.
    """

    start: Start
    decisions: tuple[Decision, ...]
    conflicts: tuple[tuple[Decision, ...], ...]
    both: int
    kappa: float | None


def merge(states: Sequence[State]) -> Merged:
    """Return what the files of several reviewers say together.

    A tile that several gave the same class keeps it; a skip yields to a class; "not A" agrees with any class but A.
    Anything else is a conflict, and the tile is left out until it is settled.

    Args:
        states: at least one.

    Raises:
        StoreMismatchError: files about other tiles or other classes.
    """
    first = states[0].start
    for other in (state.start for state in states[1:]):
        for name in ("labels", "pool"):
            if getattr(other, name) != getattr(first, name):
                raise StoreMismatchError(
                    f"{other.reviewer}'s file cannot be merged with {first.reviewer}'s: {name} are "
                    f"{getattr(other, name)} there and {getattr(first, name)} here"
                )
    by_tile: dict[int, list[Decision]] = {}
    for state in states:
        for tile, decision in state.decisions.items():
            by_tile.setdefault(tile, []).append(decision)
    agreed, conflicts, pairs = [], [], []
    for found in by_tile.values():
        one = _agreed(found)
        if one is None:
            conflicts.append(tuple(found))
        else:
            agreed.append(one)
        classes = [one.label for one in found if one.label is not None]
        pairs += [(classes[0], later) for later in classes[1:]]
    names = ", ".join(dict.fromkeys(state.start.reviewer for state in states))
    start = Start(labels=first.labels, pool=first.pool, reviewer=names, seed=first.seed)
    return Merged(
        start=start, decisions=tuple(agreed), conflicts=tuple(conflicts), both=len(pairs), kappa=_kappa(pairs)
    )


def _agreed(found: Sequence[Decision]) -> Decision | None:
    """Return the one decision that all of them allow, None where they contradict each other."""
    labels = {one.label for one in found if one.label is not None}
    barred = {one.proposed for one in found if one.label is None and one.verdict == "reject"}
    if len(labels) > 1 or labels & barred or (not labels and len(barred) > 1):
        return None
    best = next((one for one in found if one.label is not None), None)
    best = best or next((one for one in found if one.verdict == "reject"), found[0])
    names = ", ".join(dict.fromkeys(one.reviewer for one in found if one.label == best.label))
    return Decision(**{**asdict(best), "reviewer": names})


def _kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Return Cohen's kappa, Educ. Psychol. Meas. 20 (1960) 37, eq. 2; None with fewer than two pairs or one class."""
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    if len(pairs) < 2 or len({*left, *right}) < 2:
        return None
    agreed = sum(a == b for a, b in pairs) / len(pairs)
    by_chance = sum(count * right[label] for label, count in left.items()) / len(pairs) ** 2
    return (agreed - by_chance) / (1 - by_chance)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error}); begin a review to make one") from error


def _whole_lines(content: bytes) -> list[bytes]:
    return content.split(b"\n")[:-1]


def _replayed(path: Path, lines: Sequence[bytes]) -> State:
    if not lines:
        raise StoreError(f"{path} holds no review: it has no first line; delete it and begin again")
    state: State | None = None
    for number, line in enumerate(lines, start=1):
        try:
            event = orjson.loads(line)
            if state is None:
                state = State(start=_start(event))
            else:
                state.apply(event)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreCorruptError(
                f"{path}, line {number} cannot be ({error}); restore the file from a copy, or cut it before that line"
            ) from error
    assert state is not None
    return state


def _start(event: Event) -> Start:
    if event["format"] != FORMAT or event["version"] > VERSION:
        raise ValueError(f"format {event['format']!r} version {event['version']}; this eosin reads {FORMAT} {VERSION}")
    labels = tuple(event["labels"])
    known = {name: event[name] for name in ("pool", "reviewer", "seed", "seeds")}
    return Start(labels=labels, **known)


def _locked(path: Path) -> FileLock:
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreLockedError(f"{path}: another process has this review open; close it first") from error
    return lock


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be written: {error}")
