"""The review loop with a reviewer that knows the truth: what it finds, what it never does, and how it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eosin.errors import QueryError, StoreError, StoreMismatchError
from eosin.heads import LinearProbe
from eosin.tasks.review import OTHER, Answer, Review, fit_head
from eosin.tasks.review_pool import Pool
from eosin.tasks.review_queue import Shares
from eosin.tasks.review_state import AUDIT, Item, read_state
from eosin.tasks.review_stop import stop_advice


def make_pool(y: np.ndarray, *, dim: int = 16, apart: float = 4.0, seed: int = 0, test: float = 0.0) -> Pool:
    """Tiles of twenty slides around one centre a class."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((int(y.max()) + 1, dim))
    centres *= apart / np.linalg.norm(centres, axis=1, keepdims=True)
    slide = np.array([f"s{number:02d}.svs" for number in rng.integers(20, size=len(y))])
    split = np.where(slide < f"s{round(20 * test):02d}", "test", "train")
    place = np.arange(len(y))
    return Pool(
        x=(centres[y] + rng.standard_normal((len(y), dim))).astype(np.float32),
        ids=place.astype(np.uint64) + 2**60,
        slide_id=slide,
        patient_id=slide,
        xy=np.stack([224 * place, 0 * place], axis=1),
        size0_px=np.full((len(y), 2), 224.0),
        split=split,
        about={"encoder": "made", "weights_sha256": None, "mpp": 0.5, "tile_px": 224, "dim": dim},
    )


def truthful(review: Review, names: list[str]) -> Callable[[Item], Answer]:
    """The answers of a reviewer who knows each row's class."""

    def answer(item: Item) -> Answer:
        return Answer(id=item.id, verdict="relabel", label=names[review.row(item.id)])

    return answer


def run(review: Review, names: list[str], *, reviews: int, size: int = 50) -> None:
    answer, done = truthful(review, names), 0
    while done < reviews:
        queue = review.next_round(size=min(size, reviews - done))
        review.decide(*(answer(item) for item in queue))
        done += len(queue)


def rare(seed: int, n: int = 4000, share: float = 0.01) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y = rng.integers(1, 8, size=n)
    y[rng.choice(n, round(share * n), replace=False)] = 0
    return y


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Review, list[str]]]:
    """A review for 'tumour' among 600 tiles, a third of them on test slides, two seeds."""
    y = np.random.default_rng(8).integers(3, size=600)
    pool = make_pool(y, test=0.3)
    names = ["tumour" if code == 0 else OTHER for code in y]
    free = np.flatnonzero((y == 0) & ~pool.barred)
    seeds = {int(row): "tumour" for row in free[:2]}
    with Review.start(pool, tmp_path / "r.jsonl", seeds=seeds, reviewer="ada") as review:
        yield review, names


def test_a_rare_class_is_found_at_least_five_times_as_often_as_by_chance(tmp_path: Path) -> None:
    y = rare(1)
    pool, names = make_pool(y, dim=32), ["rare" if code == 0 else OTHER for code in y]
    seeds = {int(row): "rare" for row in np.flatnonzero(y == 0)[:3]}
    with Review.start(pool, tmp_path / "r.jsonl", seeds=seeds) as review:
        run(review, names, reviews=200)
        found = review.counts()["rare"] - 3
    by_chance = 200 * 37 / len(y)
    assert found >= 5 * by_chance
    assert found >= 0.5 * 37


def test_one_class_gets_its_opposite_and_seeds_are_kept(two: tuple[Review, list[str]]) -> None:
    review, _ = two
    assert review.labels == ("tumour", OTHER)
    assert review.counts() == {"tumour": 2, OTHER: 0}
    assert review.head() is None
    assert review.pending() == []
    assert review.undo() is None


def test_the_first_queue_is_like_the_seeds_and_has_its_shares(two: tuple[Review, list[str]]) -> None:
    review, names = two
    queue = review.next_round(size=40)
    assert Counter(item.share for item in queue) == {"retrieved": 28, "diverse": 8, "audit": 4}
    assert all(item.label == "tumour" and item.p is None for item in queue)
    hits = [names[review.row(item.id)] for item in queue if item.share == "retrieved"]
    assert hits.count("tumour") > 0.8 * len(hits)


def test_later_queues_follow_the_head(two: tuple[Review, list[str]]) -> None:
    review, names = two
    run(review, names, reviews=40, size=40)
    queue = review.next_round(size=40)
    assert Counter(item.share for item in queue) == Shares().counts(40)
    head = review.head()
    assert isinstance(head, LinearProbe)
    p = head.predict_proba(review.pool.x)
    for item in queue:
        row = p[review.row(item.id)]
        assert item.label == review.labels[row.argmax()]
        assert item.p == pytest.approx(row.max(), abs=1e-4)


def test_no_test_tile_is_ever_shown_and_no_audit_trains(two: tuple[Review, list[str]]) -> None:
    review, names = two
    run(review, names, reviews=390, size=65)
    shown = [item for queue in review.state.rounds for item in queue]
    assert not review.pool.barred[[review.row(item.id) for item in shown]].any()
    rows, codes = review._training(review.round + 1)
    audits = {review.row(one.id) for one in review.state.decisions.values() if one.share == AUDIT}
    assert audits
    assert not audits & set(rows.tolist())
    assert [review.labels[code] for code in codes] == [names[row] for row in rows]


def test_a_pool_that_is_through_gives_no_more(two: tuple[Review, list[str]]) -> None:
    review, names = two
    left = int((~review.pool.barred).sum()) - 2
    answer = truthful(review, names)
    while queue := review.next_round(size=200):
        review.decide(*map(answer, queue))
        left -= len(queue)
    assert left == 0
    assert review.next_round() == []


def test_undo_asks_again_and_changes_the_head_back(two: tuple[Review, list[str]]) -> None:
    review, names = two
    answer = truthful(review, names)
    queue = review.next_round(size=10)
    review.decide(*(answer(item) for item in queue[:4]))
    before = dict(review.state.decisions)
    review.decide(answer(queue[4]))
    undone = review.undo()
    assert undone is not None
    assert undone.id == queue[4].id
    assert review.state.decisions == before
    assert [item.id for item in review.pending()] == [item.id for item in queue[4:]]
    for _ in range(4):
        review.undo()
    assert review.undo() is None
    assert [item.id for item in review.pending()] == [item.id for item in queue[:4]] + [item.id for item in queue[4:]]


def test_undo_reaches_into_an_earlier_round(two: tuple[Review, list[str]]) -> None:
    review, names = two
    run(review, names, reviews=30, size=30)
    last = list(review.state.decisions)[-1]
    queue = review.next_round(size=10)
    review.undo()
    assert [item.id for item in review.pending()] == [last] + [item.id for item in queue]
    with pytest.raises(QueryError, match="11 tiles"):
        review.next_round()
    review.decide(Answer(id=last, verdict="skip"))
    assert review.state.decisions[last].round == 0


def test_interrupted_anywhere_it_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    y = np.random.default_rng(9).integers(3, size=300)
    pool, names = make_pool(y), [f"class {code}" for code in y]
    seeds = {int(np.flatnonzero(y == code)[0]): f"class {code}" for code in range(3)}

    def events(path: Path) -> list[Any]:
        state = read_state(path)
        return [state.rounds, [(one.id, one.label, one.verdict, one.round) for one in state.decisions.values()]]

    with Review.start(pool, tmp_path / "whole.jsonl", seeds=seeds, seed=4) as review:
        run(review, names, reviews=60, size=20)
    Review.start(pool, tmp_path / "cut.jsonl", seeds=seeds, seed=4).close()
    for _ in range(60):
        with Review.resume(pool, tmp_path / "cut.jsonl") as review:
            queue = review.pending() or review.next_round(size=20)
            review.decide(truthful(review, names)(queue[0]))
    assert events(tmp_path / "cut.jsonl") == events(tmp_path / "whole.jsonl")


def test_verdicts_of_two_classes(two: tuple[Review, list[str]]) -> None:
    review, _ = two
    a, b, c, d, e = review.next_round(size=5)
    review.decide(
        Answer(id=a.id, verdict="accept"),
        Answer(id=b.id, verdict="reject"),
        Answer(id=c.id, verdict="relabel", label="tumour"),
        Answer(id=d.id, verdict="relabel", label=OTHER),
        Answer(id=e.id, verdict="skip"),
    )
    found = [(one.verdict, one.label) for one in list(review.state.decisions.values())[2:]]
    assert found == [
        ("accept", "tumour"),
        ("reject", OTHER),
        ("accept", "tumour"),
        ("relabel", OTHER),
        ("skip", None),
    ]
    known = review._known()
    assert set(known.alarms) == {review.row(b.id), review.row(d.id)}
    assert not known.open[review.row(e.id)]


def test_a_rejected_class_of_three_is_an_alarm_and_no_label(tmp_path: Path) -> None:
    y = np.random.default_rng(10).integers(3, size=120)
    pool = make_pool(y)
    seeds = {int(np.flatnonzero(y == code)[0]): name for code, name in enumerate("abc")}
    with Review.start(pool, tmp_path / "r.jsonl", seeds=seeds) as review:
        item = review.next_round(size=6)[0]
        review.decide(Answer(id=item.id, verdict="reject"))
        assert review.state.decisions[item.id].label is None
        assert review.row(item.id) in review._known().alarms
        assert len(review._training(9)[0]) == 3
        assert sum(review.counts().values()) == 3


def test_what_cannot_be_answered_is_refused(two: tuple[Review, list[str]], tmp_path: Path) -> None:
    review, _ = two
    item = review.next_round(size=3)[0]
    before = (tmp_path / "r.jsonl").read_bytes()
    with pytest.raises(QueryError, match="closest are: tumour"):
        review.decide(Answer(id=item.id, verdict="relabel", label="tumor"))
    with pytest.raises(QueryError, match="not waiting"):
        review.decide(Answer(id=item.id, verdict="accept"), Answer(id=item.id, verdict="accept"))
    with pytest.raises(QueryError, match="not waiting"):
        review.decide(Answer(id=123, verdict="accept"))
    with pytest.raises(QueryError, match="verdict"):
        review.decide(Answer(id=item.id, verdict="seed"))
    assert (tmp_path / "r.jsonl").read_bytes() == before
    review.decide(*(Answer(id=one.id, verdict="skip") for one in review.pending()))
    with pytest.raises(QueryError, match="0 tiles make no round"):
        review.next_round(size=0)


def test_a_start_that_cannot_be(tmp_path: Path) -> None:
    pool = make_pool(np.arange(60) % 2, test=0.5)
    test, train = int(np.flatnonzero(pool.barred)[0]), int(np.flatnonzero(~pool.barred)[0])
    for seeds, labels, what in (
        ({}, ("a", "b"), "at least one seed"),
        ({test: "a"}, (), "test split"),
        ({train: "a"}, ("b", "c"), "add --label"),
        ({train: "a"}, tuple("abcdefghij"), "2 to 9"),
    ):
        with pytest.raises(QueryError, match=what):
            Review.start(pool, tmp_path / "r.jsonl", seeds=seeds, labels=labels)
    assert not (tmp_path / "r.jsonl").exists()


def test_another_pool_is_refused(two: tuple[Review, list[str]], tmp_path: Path) -> None:
    review, names = two
    run(review, names, reviews=20, size=20)
    review.close()
    path = tmp_path / "r.jsonl"
    other = make_pool(np.zeros(600, int), dim=17)
    with pytest.raises(StoreMismatchError, match="dim: 16 there, 17 here"):
        Review.resume(other, path)
    with pytest.raises(StoreMismatchError, match="tiles that are not here"):
        Review.resume(make_pool(np.zeros(3, int)), path)
    Review.resume(review.pool, path).close()


def test_a_start_that_was_cut_short_is_told(two: tuple[Review, list[str]], tmp_path: Path) -> None:
    review, _ = two
    review.close()
    path = tmp_path / "r.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    with pytest.raises(StoreError, match="2 seeds and holds 1"):
        Review.resume(review.pool, path)
    path.write_bytes(b"".join(lines))
    Review.resume(review.pool, path).close()


def wrong_rounds(share: list[float], n: int, seed: int) -> np.ndarray:
    """Heads that err on nested sets of tiles."""
    luck = np.random.default_rng(seed).random(n)
    return np.array([luck < one for one in share])


ENOUGH = {"a": 30, "b": 30}
NO_MORE = {"a": 0, "b": 0}


def test_a_flat_audit_stops_and_a_falling_one_does_not() -> None:
    patient = np.arange(100) // 2
    flat = stop_advice(wrong_rounds([0.1] * 4, 100, 0), patient, labels=ENOUGH, per_class=ENOUGH, found=NO_MORE)
    assert flat.stop
    assert flat.why.startswith("flat: audit error 0.")
    assert flat.error is not None
    assert flat.error.low < flat.error.point < flat.error.high
    falling = stop_advice(
        wrong_rounds([0.3, 0.2, 0.12, 0.1], 100, 0), patient, labels=ENOUGH, per_class=ENOUGH, found=NO_MORE
    )
    assert not falling.stop
    assert falling.change is not None
    assert falling.change.high < 0
    late = stop_advice(
        wrong_rounds([0.3, 0.1, 0.1, 0.1], 100, 0), patient, labels=ENOUGH, per_class=ENOUGH, found=NO_MORE
    )
    assert not late.stop


@pytest.mark.parametrize(
    ("rounds", "n", "labels", "what"),
    [
        (4, 19, ENOUGH, "19 audit tiles, needed 20"),
        (3, 60, ENOUGH, "3 rounds had a head, needed 4"),
        (4, 60, {"a": 30, "b": 4}, "4 tiles of 'b'"),
        (0, 0, ENOUGH, "0 audit tiles"),
    ],
)
def test_too_little_never_stops(rounds: int, n: int, labels: dict[str, int], what: str) -> None:
    found = stop_advice(np.zeros((rounds, n), bool), np.arange(n), labels=labels, per_class=ENOUGH, found=NO_MORE)
    assert not found.stop
    assert what in found.why


def test_a_class_the_audit_hardly_met_must_be_found_no_more() -> None:
    wrong, met = wrong_rounds([0.1] * 4, 80, 1), {"a": 79, "b": 1}
    through = stop_advice(wrong, np.arange(80), labels=ENOUGH, per_class=met, found={"a": 20, "b": 0})
    assert through.stop
    assert through.why.endswith("the audit says little of 'b' (1 tiles), 3 rounds found 0 more")
    still = stop_advice(wrong, np.arange(80), labels=ENOUGH, per_class=met, found={"a": 0, "b": 2})
    assert not still.stop
    assert still.why.endswith("3 rounds found 2 more")
    assert stop_advice(wrong, np.arange(80), labels=ENOUGH, per_class=ENOUGH, found={"a": 9, "b": 9}).stop


def test_without_an_error_the_interval_is_the_exact_one() -> None:
    found = stop_advice(np.zeros((4, 40), bool), np.arange(40) // 4, labels=ENOUGH, per_class=ENOUGH, found=NO_MORE)
    assert found.error is not None
    assert (found.error.low, found.error.point) == (0, 0)
    assert found.error.high == pytest.approx(1 - 0.025**0.1)  # ten patients without an error
    assert (found.n, found.patients) == (40, 10)


@pytest.mark.parametrize("seed", range(4))
def test_the_audit_error_is_that_of_the_present_head(seed: int) -> None:
    wrong = np.random.default_rng(seed).random((4, 30)) < 0.3
    found = stop_advice(wrong, np.arange(30), labels=ENOUGH, per_class=ENOUGH, found=NO_MORE)
    assert found.errors == pytest.approx(wrong.mean(axis=1).tolist())
    assert found.error is not None
    assert found.error.point == pytest.approx(wrong[-1].mean())
    assert found.change is not None
    assert found.change.point == pytest.approx(wrong[-1].mean() - wrong[0].mean())


def test_the_audit_of_a_review_is_measured_on_heads_that_never_saw_it(tmp_path: Path) -> None:
    y = np.random.default_rng(11).integers(2, size=800)
    pool, names = make_pool(y, apart=1.5), ["tumour" if code == 0 else OTHER for code in y]
    with Review.start(pool, tmp_path / "r.jsonl", seeds={int(np.flatnonzero(y == 0)[0]): "tumour"}) as review:
        run(review, names, reviews=300, size=50)
        found = review.stop_advice()
        assert found.n == 30
        assert len(found.errors) == 4
        rows, codes = review._training(review.round + 1)
        head = LinearProbe(c_grid=(1e-3, 1e-2, 1e-1, 1.0), class_weight="balanced", scoring="log_loss")
        head.fit(pool.x[rows], codes, groups=pool.patient_id[rows])
        audit = np.array([review.row(one.id) for one in review.state.decisions.values() if one.share == AUDIT])
        wrong = head.predict(pool.x[audit]) != y[audit]
        assert found.error is not None
        assert found.error.point == pytest.approx(wrong.mean())
        late = [one for one in review.state.decisions.values() if one.round >= 3 and one.share != AUDIT]
        assert sum(review._found_since(3).values()) == len(late) == 135


@pytest.mark.parametrize("seed", range(6))
def test_a_head_is_fitted_however_the_patients_lie(seed: int) -> None:
    """Few patients with one class each, many with both: folds with a class missing must not stop the review."""
    rng = np.random.default_rng(seed)
    codes = np.array([0] * 12 + [1] * 60)
    groups = np.concatenate([rng.integers(2 + seed, size=12), rng.integers(40, size=60)]).astype(np.str_)
    x = (2 * codes[:, None] + rng.standard_normal((72, 4))).astype(np.float32)
    head = fit_head(x, codes, groups)
    assert head.c_ in (1e-3, 1e-2, 1e-1, 1.0)
    assert (head.predict(x) == codes).mean() > 0.9


def test_the_strength_is_chosen_once_there_are_labels_enough() -> None:
    rng = np.random.default_rng(13)
    codes = np.arange(200) % 2
    x = np.column_stack([codes * 6.0, rng.standard_normal((200, 3))]) + rng.standard_normal((200, 4)) / 9
    assert fit_head(x[:18], codes[:18], np.arange(18).astype(np.str_)).c_ == 1e-2
    assert fit_head(x, codes, np.arange(200).astype(np.str_)).c_ == 1.0
