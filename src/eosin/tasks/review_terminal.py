"""A review at the keyboard of a terminal: one key a decision."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TextIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from eosin.tasks.review import KEYS, Answer, Review
from eosin.tasks.review_pool import Pictures
from eosin.tasks.review_queue import Shares
from eosin.tasks.review_state import Item

Pixels = npt.NDArray[np.uint8]
Write = Callable[[str], object]

ACCEPT, REJECT, SKIP, UNDO, QUIT, NEXT = "a", "r", "s", "u", "q", "n"
PICTURE_COLUMNS = 56
RESET = "\x1b[0m"


def terminal_keys(stream: TextIO) -> Generator[str, None, None]:
    """Yield one key after the other, without waiting for the end of a line where the stream is a terminal.

    The terminal is put back as it was when the iterator is closed. Other streams are read character by character.
    """
    with _single_keys(stream):
        while key := (os.read(stream.fileno(), 1).decode(errors="replace") if stream.isatty() else stream.read(1)):
            yield key


@contextlib.contextmanager
def _single_keys(stream: TextIO) -> Iterator[None]:
    if sys.platform == "win32" or not stream.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(stream.fileno())
    tty.setcbreak(stream.fileno())
    try:
        yield
    finally:
        termios.tcsetattr(stream.fileno(), termios.TCSADRAIN, before)


def review_at_terminal(
    review: Review,
    keys: Iterator[str],
    write: Write,
    *,
    picture: Pictures,
    size: int = 50,
    shares: Shares | None = None,
    pictures: bool = True,
) -> None:
    """Go through queue after queue until the reviewer quits, the keys end or no tile is left.

    Every decision is on the disk before the next tile is shown. A key that means nothing is passed over.

    Args:
        review: open.
        keys: one character at a time.
        write: where text goes.
        picture: reads the tile of a row of the pool.
        size: tiles a round.
        shares: of each kind in a round.
        pictures: draw tiles with coloured blocks.
    """
    while True:
        pending = review.pending()
        if not pending:
            wish = _at_the_end(review, keys, write) if review.round >= 0 else NEXT
            if wish == QUIT:
                return
            if wish == UNDO:
                _undo(review, write)
            elif not review.next_round(size=size, shares=shares):
                write("No tile is left to review.\n")
                return
            continue
        item = pending[0]
        write(_shown(review, item, len(pending), picture if pictures else None))
        if not _answered(review, item, keys, write):
            return


def block_picture(rgb: Pixels, columns: int = PICTURE_COLUMNS) -> str:
    """Return a picture (H, W, 3) as lines of coloured half blocks, two pixels a character."""
    height = max(2, round(columns * rgb.shape[0] / rgb.shape[1]))
    small = np.asarray(Image.fromarray(rgb).resize((columns, height + height % 2), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(small[::2].tolist(), small[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + RESET)
    return "\n".join(lines) + "\n"


def _at_the_end(review: Review, keys: Iterator[str], write: Write) -> str:
    """Tell how the round ended; return whether the reviewer wants NEXT, UNDO (there is something) or QUIT."""
    counts = ", ".join(f"{count} {label}" for label, count in review.counts().items())
    write(f"\nRound {review.round} is done: {counts}.\n{review.stop_advice().why}\n")
    write(f"[{NEXT}] next round  [{UNDO}] undo  [{QUIT}] quit\n")
    return next((key for key in keys if key in (NEXT, UNDO, QUIT)), QUIT)


def _answered(review: Review, item: Item, keys: Iterator[str], write: Write) -> bool:
    """Take the decision of one tile; return False when the reviewer quits or the keys end."""
    labels = review.labels
    for key in keys:
        if key == QUIT:
            return False
        if key == UNDO:
            if _undo(review, write):
                return True
            continue
        answer = None
        if key in (ACCEPT, " "):
            answer = Answer(id=item.id, verdict="accept")
        elif key == REJECT:
            answer = Answer(id=item.id, verdict="reject")
        elif key == SKIP:
            answer = Answer(id=item.id, verdict="skip")
        elif key in KEYS[: len(labels)]:
            answer = Answer(id=item.id, verdict="relabel", label=labels[KEYS.index(key)])
        if answer is not None:
            review.decide(answer)
            decided = review.state.decisions[item.id]
            write(f"-> {decided.label or decided.verdict}\n")
            return True
    return False


def _undo(review: Review, write: Write) -> bool:
    taken = review.undo()
    write("Nothing to undo.\n" if taken is None else f"Undone: {taken.label or taken.verdict}.\n")
    return taken is not None


def _shown(review: Review, item: Item, left: int, picture: Pictures | None) -> str:
    row = review.row(item.id)
    pixels = None if picture is None else picture(row).tile
    sure = "" if item.p is None else f" (p {item.p:.2f})"
    classes = "  ".join(f"[{key}] {label}" for key, label in zip(KEYS, review.labels, strict=False))
    others = f"[{SKIP}] skip  [{UNDO}] undo  [{QUIT}] quit"
    return (
        f"\nRound {review.round}, {left} left: {item.share}, {review.pool.name(row)}\n"
        + ("" if pixels is None else block_picture(pixels))
        + f"{item.label}?{sure}  [{ACCEPT}] yes  [{REJECT}] no  {classes}  {others}\n"
    )
