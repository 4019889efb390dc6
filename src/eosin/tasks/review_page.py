"""A queue as one static page: keys decide, the browser keeps the decisions, a file brings them back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from eosin.errors import QueryError
from eosin.tasks.pictures import data_uri, jpeg_bytes
from eosin.tasks.review import Answer, Review
from eosin.tasks.review_export import COLORS
from eosin.tasks.review_pool import Pictures
from eosin.version import __version__

FORMAT, VERSION = "eosin.review.decisions", 1
SHOWN_PX = 448


def queue_page(review: Review, picture: Pictures) -> str:
    """Return the pending tiles as one self-contained page.

    Keys: a or space accepts, r rejects, 1 to 9 relabels, s skips, u takes back, arrows move. The button downloads a
    JSON file for `read_decisions`; a part of the queue may be decided and read, and the rest later.

    Args:
        review: open, with a queue.
        picture: reads the tile of a row of the pool.
    """
    items = []
    for item in review.pending():
        row = review.row(item.id)
        found = picture(row)
        name = review.pool.name(row)
        known = {"id": f"{item.id:016x}", "share": item.share, "label": item.label, "p": item.p, "name": name}
        items.append({**known, "picture": _uri(found.tile), "around": _uri(found.around), "why": found.why})
    queue = {
        "format": FORMAT,
        "version": VERSION,
        "review": review_token(review),
        "round": review.round,
        "labels": review.labels,
        "colors": [",".join(map(str, color)) for color in COLORS[: len(review.labels)]],
        "items": items,
    }
    page = {
        "title": f"eosin: review, round {review.round}",
        "heading": f"Review, round {review.round}",
        "lead": f"{len(items)} tiles. Is each what it is taken for? One key a tile; nothing leaves this page until it "
        "is downloaded, and closing it loses nothing.",
        "after": "Then: eosin review ... --read decisions-round-"
        f"{review.round}.json. A queue that is half decided may be read too.",
        "queue": Markup(json.dumps(queue).replace("<", "\\u003c")),
        "footer": f"Made by eosin {__version__}.",
    }
    environment = Environment(loader=PackageLoader("eosin.tasks"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("review.html.j2").render(page)


def read_decisions(path: Path, review: Review) -> tuple[int, int]:
    """Take the decisions that the page downloaded; return how many are new and how many were known.

    Raises:
        QueryError: no such file, a page of another review, or a tile that was decided otherwise since; nothing is
            taken then.
        StoreError: the disk is full.
    """
    answers = _answers(path, review)
    fresh, known = [], 0
    pending = {item.id for item in review.pending()}
    proposed = {item.id: item.label for queue in review.state.rounds for item in queue}
    for answer in answers:
        if answer.id in pending:
            fresh.append(answer)
            continue
        before = review.state.decisions.get(answer.id)
        if before is None:
            raise QueryError(f"{path}: tile {answer.id:016x} was never queued here; nothing was taken")
        label = {"accept": proposed.get(answer.id), "relabel": answer.label}.get(answer.verdict)
        if answer.verdict == "reject" and len(review.labels) == 2:
            label = next(one for one in review.labels if one != proposed.get(answer.id))
        if label != before.label or (label is None and answer.verdict != before.verdict):
            raise QueryError(
                f"{path}: tile {answer.id:016x} is {label or answer.verdict!r} there and "
                f"{before.label or before.verdict!r} here; undo it first, or take it out of the file; nothing was taken"
            )
        known += 1
    review.decide(*fresh)
    return len(fresh), known


def review_token(review: Review) -> str:
    """Return what ties a page to its review: a hash of the first line and the present queue."""
    start = asdict(review.state.start)
    queue = [asdict(item) for item in (review.state.rounds or [()])[-1]]
    return hashlib.sha256(orjson.dumps([start, review.round, queue], option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _answers(path: Path, review: Review) -> list[Answer]:
    try:
        found: dict[str, Any] = orjson.loads(path.read_bytes())
        if found["format"] != FORMAT or found["version"] > VERSION:
            raise ValueError(f"format {found['format']!r} version {found['version']}")
        told = [
            Answer(id=int(one["id"], 16), verdict=one["verdict"], label=one.get("label")) for one in found["decisions"]
        ]
        token = found["review"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QueryError(f"{path} is not what a review page downloads ({error}); press its button again") from error
    if token != review_token(review):
        raise QueryError(
            f"{path} was made by a page of another review or round ({found.get('round')}, now {review.round}); read "
            "each round's file before the next page is made"
        )
    return told


def _uri(pixels: npt.NDArray[np.uint8] | None) -> str | None:
    """Return a picture of at most `SHOWN_PX` a side as a data URI."""
    if pixels is None:
        return None
    image = Image.fromarray(pixels)
    image.thumbnail((SHOWN_PX, SHOWN_PX))
    return data_uri(jpeg_bytes(np.asarray(image), quality=88), "image/jpeg")
