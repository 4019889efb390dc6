"""Options that mean the same everywhere, and how results are printed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from eosin.features.pipeline import Status

Inputs = Annotated[list[Path], typer.Argument(help="Slides, folders, or cohort tables (.csv with a column 'path').")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; a run that was stopped goes on there.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
TilePx = Annotated[int, typer.Option("--tile-px", min=16, help="Side of a tile in pixels.")]
MppList = Annotated[
    str, typer.Option("--mpp", help="Microns per pixel of the tiles (or 20x); several: 0.5,1.0", metavar="F[,F]")
]
SlideMpp = Annotated[
    float | None, typer.Option("--slide-mpp", help="Microns per level-0 pixel, for slides that do not say it.")
]
Masks = Annotated[
    Path | None,
    typer.Option("--masks", help="Folder of tissue masks (<slide>.geojson or .png), e.g. edited in QuPath."),
]
OverlapPx = Annotated[int, typer.Option("--overlap-px", min=0, help="Pixels shared by neighbouring tiles.")]
MinTissue = Annotated[float, typer.Option("--min-tissue", help="Least share of tissue in a tile, 0 to 1.")]
Edge = Annotated[str, typer.Option("--edge", help="Tiles over the slide's edge: drop, pad-white or shift-in.")]


def parse_mpp(text: str) -> list[float]:
    """Return the microns per pixel in ``"0.5"``, ``"0.5,1.0"`` or ``"20x"`` (20x is 0.5 mpp)."""
    values = []
    for part in text.split(","):
        power = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]\s*", part)
        try:
            values.append(10 / float(power.group(1)) if power else float(part))
        except (ValueError, ZeroDivisionError):
            raise typer.BadParameter(f"{part!r} is not a number of microns per pixel", param_hint="--mpp") from None
    return values


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Return (i, n) of ``"i/n"``."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not i/n, such as 1/8", param_hint="--shard")
    return int(found.group(1)), int(found.group(2))


def first_rank() -> bool:
    """Return whether this process speaks for all that torchrun started; True when it is the only one."""
    return os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """Print rows as a table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console().print(table)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Status], None]]:
    """Yield a callback that shows slides, tiles, rates and time left on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description} {task.completed:g}/{task.total:g} {task.fields[note]}")
    with Progress(SpinnerColumn(), text, BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        slides = bar.add_task("slides", total=1, note="")
        tiles = bar.add_task("tiles", total=1, note="")

        def show(status: Status) -> None:
            finished = status.slides_done + status.slides_failed + status.slides_skipped
            rate = status.tiles_all / status.seconds if status.seconds else 0.0
            bar.update(slides, total=status.slides_total, completed=finished, note=f"{_left(status, finished)}")
            note = f"{rate:.0f} tiles/s  {status.slide_id}"
            bar.update(tiles, total=max(1, status.tiles_total), completed=status.tiles_done, note=note)

        yield show


def _left(status: Status, finished: int) -> str:
    worked = status.slides_done + status.slides_failed
    part = status.tiles_done / status.tiles_total if 0 < status.tiles_done < status.tiles_total else 0.0
    if worked + part < 0.05:
        return ""
    left = status.seconds / (worked + part) * max(0.0, status.slides_total - finished - part)
    failed = f"{status.slides_failed} failed, " if status.slides_failed else ""
    return f"{failed}about {left // 3600:.0f} h {left % 3600 // 60:02.0f} min {left % 60:02.0f} s left"
