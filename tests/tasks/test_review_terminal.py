"""One key a decision, from an injected stream; the same keys on a page, whose file is read back."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_review import make_pool

from eosin.errors import QueryError
from eosin.tasks.review import OTHER, Review
from eosin.tasks.review_page import queue_page, read_decisions
from eosin.tasks.review_pool import Picture
from eosin.tasks.review_state import read_state
from eosin.tasks.review_terminal import block_picture, review_at_terminal, terminal_keys


def no_picture(row: int) -> Picture:
    return Picture(why=f"no slide for row {row}")


def red(row: int) -> Picture:
    return Picture(tile=np.full((24, 24, 3), (250, 0, 0), np.uint8))


@pytest.fixture
def review(tmp_path: Path) -> Iterator[Review]:
    pool = make_pool(np.arange(90) % 3)
    with Review.start(pool, tmp_path / "r.jsonl", seeds={0: "tumour", 3: "tumour"}) as one:
        yield one


def press(review: Review, keys: str, *, size: int = 4) -> str:
    told = io.StringIO()
    review_at_terminal(review, terminal_keys(io.StringIO(keys)), told.write, picture=no_picture, size=size)
    return told.getvalue()


def verdicts(review: Review) -> list[tuple[str, str | None]]:
    return [(one.verdict, one.label) for one in list(review.state.decisions.values())[2:]]


def test_every_key(review: Review) -> None:
    told = press(review, "ar12", size=4)
    assert verdicts(review) == [("accept", "tumour"), ("reject", OTHER), ("accept", "tumour"), ("relabel", OTHER)]
    assert "[1] tumour  [2] other" in told
    assert "Round 0 is done: 4 tumour, 2 other." in told
    assert "needed 20" in told
    assert review.round == 0
    press(review, "n s", size=3)
    proposed = [item.label for item in review.state.rounds[1]]
    assert verdicts(review)[4:] == [("accept", proposed[0]), ("skip", None)]
    assert len(review.pending()) == 1


def test_keys_that_mean_nothing_are_passed_over(review: Review) -> None:
    press(review, "\x1b[A\n9xé\ta")
    assert verdicts(review) == [("accept", "tumour")]


def test_undo_asks_the_same_tile_again(review: Review) -> None:
    told = press(review, "uaur")
    assert told.count("Nothing to undo.") == 1
    assert told.count("Undone: tumour.") == 1
    assert verdicts(review) == [("reject", OTHER)]
    first = review.state.rounds[0][0].id
    assert list(review.state.decisions)[2] == first


def test_undo_at_the_end_of_a_round(review: Review) -> None:
    press(review, "aa" + "u" + "s" + "q", size=2)
    assert verdicts(review) == [("accept", "tumour"), ("skip", None)]
    assert review.round == 0


def test_quitting_and_the_end_of_the_keys_lose_nothing(review: Review, tmp_path: Path) -> None:
    press(review, "aaq" + "rrr")
    press(review, "r")
    assert [one[0] for one in verdicts(review)] == ["accept", "accept", "reject"]
    assert len(review.pending()) == 1
    assert read_state(tmp_path / "r.jsonl") == review.state


def test_a_pool_that_is_through_says_so(review: Review) -> None:
    assert "No tile is left" in press(review, ("s" * 44 + "n") * 3, size=44)


def test_the_tile_is_drawn_with_blocks(review: Review) -> None:
    told = io.StringIO()
    review_at_terminal(review, iter("q"), told.write, picture=red)
    assert told.getvalue().count("▀") == 56 * 28
    assert "38;2;250;0;0" in told.getvalue()


def test_blocks_show_the_upper_pixel_before_the_lower() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0], pixels[1] = (1, 2, 3), (4, 5, 6)
    assert block_picture(pixels, 2) == "\x1b[38;2;1;2;3m\x1b[48;2;4;5;6m▀" * 2 + "\x1b[0m\n"


def embedded(page: str) -> dict:
    found = re.search(r'<script id="queue" type="application/json">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_the_queue_and_nothing_from_elsewhere(review: Review) -> None:
    queue = review.next_round(size=5)
    page = queue_page(review, red)
    found = embedded(page)
    assert [int(one["id"], 16) for one in found["items"]] == [item.id for item in queue]
    assert [one["label"] for one in found["items"]] == [item.label for item in queue]
    assert all(one["picture"].startswith("data:image/jpeg;base64,") for one in found["items"])
    assert found["labels"] == ["tumour", OTHER]
    assert not re.findall(r'(?:src|href)="?(?:https?:)?//', page)
    assert embedded(queue_page(review, no_picture))["items"][0]["why"].startswith("no slide")


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    pool = make_pool(np.arange(60) % 2)
    pool = replace(pool, slide_id=np.full(60, "</script>"))
    with Review.start(pool, tmp_path / "r.jsonl", seeds={0: "<b>x</b>"}) as review:
        review.next_round(size=3)
        page = queue_page(review, no_picture)
    assert page.count("</script>") == 2
    assert "<b>x" not in page
    assert embedded(page)["items"][0]["name"].startswith("</script>")


def download(review: Review, decisions: list[dict], path: Path) -> Path:
    found = embedded(queue_page(review, no_picture))
    told = {"format": found["format"], "version": 1, "review": found["review"], "round": review.round}
    path.write_text(json.dumps({**told, "decisions": decisions}))
    return path


def test_downloaded_decisions_are_read_once(review: Review, tmp_path: Path) -> None:
    a, b, c, _ = (f"{item.id:016x}" for item in review.next_round(size=4))
    told = [
        {"id": b, "verdict": "reject"},
        {"id": a, "verdict": "relabel", "label": OTHER},
        {"id": c, "verdict": "skip"},
    ]
    path = download(review, told, tmp_path / "d.json")
    assert read_decisions(path, review) == (3, 0)
    assert verdicts(review) == [("reject", OTHER), ("relabel", OTHER), ("skip", None)]
    assert read_decisions(path, review) == (0, 3)
    assert len(review.pending()) == 1


def test_downloads_that_do_not_fit_take_nothing(review: Review, tmp_path: Path) -> None:
    queue = review.next_round(size=4)
    first, second = (f"{item.id:016x}" for item in queue[:2])
    path = tmp_path / "d.json"
    read_decisions(download(review, [{"id": first, "verdict": "accept"}], path), review)
    good = {"id": second, "verdict": "accept"}
    download(review, [good, {"id": first, "verdict": "reject"}], path)
    with pytest.raises(QueryError, match="'other' there and 'tumour' here"):
        read_decisions(path, review)
    download(review, [good, {"id": f"{int(review.pool.ids[0]) + 7777:016x}", "verdict": "skip"}], path)
    with pytest.raises(QueryError, match="never queued"):
        read_decisions(path, review)
    path.write_text(path.read_text().replace(embedded(queue_page(review, no_picture))["review"], "0" * 16))
    with pytest.raises(QueryError, match="another review or round"):
        read_decisions(path, review)
    path.write_text('{"format": "something"}')
    with pytest.raises(QueryError, match="not what a review page downloads"):
        read_decisions(path, review)
    with pytest.raises(QueryError, match="not what a review page downloads"):
        read_decisions(tmp_path / "gone.json", review)
    assert len(review.pending()) == 3


BROWSER = """
const kept = {};
const element = () => ({ style: {}, append() {}, replaceChildren(...all) { this.children = all; }, blur() {},
  click() { downloaded = JSON.stringify(decisions()); } });
const parts = {};
let downloaded = null;
let pressed = null;
globalThis.localStorage = { getItem: (k) => kept[k] ?? null, setItem: (k, v) => { kept[k] = v; } };
globalThis.document = {
  getElementById: (id) => (parts[id] ??= Object.assign(element(), id === "queue" ? { textContent: QUEUE } : {})),
  createElement: element,
  addEventListener: (kind, run) => { if (kind === "keydown") pressed = run; },
};
globalThis.Blob = class { constructor() {} };
URL.createObjectURL = () => "blob:";
SCRIPT
for (const key of KEYS) pressed({ key, preventDefault() {} });
save();
console.log(downloaded);
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_page_takes_keys_and_its_download_is_read(review: Review, tmp_path: Path) -> None:
    """The page's own script, run on a bare document: accept, reject, undo, relabel, arrows, skip."""
    queue = review.next_round(size=5)
    page = queue_page(review, no_picture)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    keys = ["a", "r", "u", "2", "x", "s", "ArrowRight", " ", "ArrowLeft", "ArrowLeft"]
    program = BROWSER.replace("QUEUE", json.dumps(json.dumps(embedded(page)))).replace("KEYS", json.dumps(keys))
    program = program.replace("SCRIPT", scripts[0])
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "d.json"
    path.write_text(done.stdout)
    assert read_decisions(path, review) == (4, 0)
    by_id = {one.id: (one.verdict, one.label) for one in review.state.decisions.values()}
    assert [by_id.get(item.id) for item in queue] == [
        ("accept", "tumour"),
        ("relabel", OTHER),
        ("skip", None),
        None,
        ("accept", "tumour"),
    ]
