"""The review loop: seeds -> similar tiles -> decisions -> a head in seconds -> the next queue, until the audit is flat.

A round is a queue of tiles, each with a proposed class and the reason why it is shown (`review_queue`). The first
rounds, before two classes are known, show what is most like the seeds without being all alike (maximal marginal
relevance), some tiles far from everything, and the audit. Later rounds follow the head. Audit tiles never train: each
round's head is measured on all of them, and the review may stop when three rounds have changed nothing.

Everything that was decided lies in one file (`review_state`); a head is made again from it and is never stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError, StoreError, StoreMismatchError, closest
from eosin.heads import LinearProbe
from eosin.heads.labels import default_splits
from eosin.retrieval.inputs import mmr_order, mmr_pool
from eosin.tasks.review_pool import Pool
from eosin.tasks.review_queue import Known, Shares, build_queue, directions, farthest
from eosin.tasks.review_state import (
    AUDIT,
    RETRIEVED,
    SEED,
    Decision,
    Item,
    Journal,
    Start,
    State,
    Verdict,
    decide_event,
    round_event,
    undo_event,
)
from eosin.tasks.review_stop import FLAT_ROUNDS, StopAdvice, stop_advice

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

OTHER = "other"
"""The class of everything else, added when one class only is looked for."""
C_GRID = (1e-3, 1e-2, 1e-1, 1.0)
C_FEW = 1e-2  # used as it is while a class has fewer than `FEW` labels
FEW = 10
RELEVANCE = 0.7  # of maximal marginal relevance
KEYS = "123456789"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a reviewer does with a tile.

    Attributes:
        id: of the tile.
        verdict: "accept", "reject", "relabel" or "skip".
        label: the class, for "relabel" only.
    """

    id: int
    verdict: Verdict
    label: str | None = None


class Review:
    """A review in progress; use `start` or `resume`, and `close` it.

    Attributes:
        pool: the tiles.
        journal: the file.
        unit: directions of the tiles (n, D), see `review_queue.directions`.
    """

    def __init__(self, pool: Pool, journal: Journal) -> None:
        """Hold a pool and the open file of its decisions; use `start` or `resume` instead."""
        self.pool, self.journal = pool, journal
        self.unit = directions(pool.x)
        self._row = {int(tile): row for row, tile in enumerate(pool.ids.tolist())}
        self._heads: dict[tuple[int, int], LinearProbe] = {}

    @classmethod
    def start(
        cls,
        pool: Pool,
        path: Path,
        *,
        seeds: Mapping[int, str],
        labels: Sequence[str] = (),
        reviewer: str = "reviewer",
        seed: int = 0,
    ) -> Self:
        """Begin a review.

        Args:
            pool: the tiles.
            path: file of the decisions; it must not be there yet.
            seeds: row of the pool -> class, at least one.
            labels: classes in the order of their keys; those of the seeds, sorted, when empty. A single class gets
                a second one, `OTHER`.
            reviewer: whose decisions these are.
            seed: of every random draw.

        Raises:
            QueryError: no seeds, seeds of the test split, unknown or too many classes.
            StoreError: the file is there, or cannot be written.
        """
        named = tuple(dict.fromkeys(labels)) or tuple(sorted(set(seeds.values())))
        names = (*named, OTHER) if len(named) == 1 else named
        strange = sorted(set(seeds.values()) - set(names))
        if strange:
            raise QueryError(f"a seed is called {strange[0]!r}; the classes are {', '.join(names)}; add --label")
        if not seeds or len(names) > len(KEYS) or any(pool.barred[row] for row in seeds):
            raise QueryError(
                f"{len(seeds)} seeds of {len(names)} classes; needed: at least one seed, none of the test split, and "
                f"2 to {len(KEYS)} classes"
            )
        about = {**pool.about, "tiles": len(pool)}
        start = Start(labels=names, pool=about, reviewer=reviewer, seed=seed, seeds=len(seeds))
        journal = Journal.create(path, start)
        made = cls(pool, journal)
        made.journal.append(*(decide_event(made._seed(row, label)) for row, label in sorted(seeds.items())))
        return made

    @classmethod
    def resume(cls, pool: Pool, path: Path) -> Self:
        """Go on with a review where it stopped.

        Raises:
            StoreError: no such file, a broken one, or another process has it open.
            StoreMismatchError: it is about other tiles.
        """
        journal = Journal.open(path)
        try:
            check_pool(pool, journal.state, path)
            there = sum(one.share == SEED for one in journal.state.decisions.values())
            if there < journal.state.start.seeds:
                raise StoreError(
                    f"{path} was begun from {journal.state.start.seeds} seeds and holds {there}: its start was cut "
                    "short; delete it and begin again"
                )
        except StoreError:
            journal.close()
            raise
        return cls(pool, journal)

    @property
    def state(self) -> State:
        """What was decided so far."""
        return self.journal.state

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of their keys."""
        return self.state.start.labels

    @property
    def round(self) -> int:
        """Number of the present round; -1 before the first."""
        return len(self.state.rounds) - 1

    def row(self, tile: int) -> int:
        """Return the row of a tile in the pool."""
        return self._row[tile]

    def pending(self) -> list[Item]:
        """Return what is to be decided now: decisions taken back, the latest first, then the rest of the queue."""
        state = self.state
        queues = {item.id: item for queue in state.rounds for item in queue}
        again = [queues[tile] for tile in reversed(state.undone) if tile in queues]
        taken_back = set(state.undone)
        rest = [item for item in (state.rounds or [()])[-1] if item.id not in state.decisions]
        return again + [item for item in rest if item.id not in taken_back]

    def decide(self, *answers: Answer) -> None:
        """Take answers to pending tiles; they are on the disk when this returns.

        Raises:
            QueryError: a tile that is not pending, or a class that does not exist; nothing is taken then.
            StoreError: the disk is full.
        """
        pending = {item.id: item for item in self.pending()}
        at = datetime.now(UTC).isoformat(timespec="seconds")
        decisions = []
        for answer in answers:
            item = pending.pop(answer.id, None)
            if item is None:
                raise QueryError(f"tile {answer.id:016x} is not waiting for a decision (decided, or never queued)")
            decisions.append(self._decision(item, answer, at))
        self.journal.append(*(decide_event(one) for one in decisions))

    def undo(self) -> Decision | None:
        """Take the latest decision back and return it; None when there is none (seeds stay)."""
        taken = next((one for one in reversed(self.state.decisions.values()) if one.share != SEED), None)
        if taken is not None:
            self.journal.append(undo_event(taken.id, datetime.now(UTC).isoformat(timespec="seconds")))
        return taken

    def next_round(self, *, size: int = 50, shares: Shares | None = None) -> list[Item]:
        """Fit the head, queue the next tiles and return them; an empty list when none is left.

        Args:
            size: tiles of the round.
            shares: of each kind; see `Shares`.

        Raises:
            QueryError: decisions are pending, or a size below 1.
        """
        if self.pending():
            raise QueryError(f"{len(self.pending())} tiles of round {self.round} wait for a decision; finish it first")
        if size < 1:
            raise QueryError(f"{size} tiles make no round; give at least 1")
        shares = shares or Shares()
        rng = np.random.default_rng([self.state.start.seed, self.round + 1])
        known = self._known()
        if not known.open.any():
            return []
        head = self.head()
        if head is None:
            items = self._retrieve(known, size, shares, rng)
        else:
            p = head.predict_proba(self.pool.x)
            queue = build_queue(self.unit, self._all_classes(p, head), known, size=size, shares=shares, rng=rng)
            best = p.argmax(axis=1)
            codes = head.classes_[best].tolist()
            items = [self._item(row, share, codes[row], p[row, best[row]]) for row, share in queue]
        about = {"shares": shares.to_dict(), "labels": self.counts(), "c": None if head is None else head.c_}
        self.journal.append(round_event(self.round + 1, items, **about))
        return items

    def counts(self) -> dict[str, int]:
        """Return how many tiles have each class, seeds and audit included."""
        found = Counter(one.label for one in self.state.decisions.values())
        return {label: found[label] for label in self.labels}

    def head(self, before: int | None = None) -> LinearProbe | None:
        """Return the head fitted on all training decisions; None while they hold one class only.

        Args:
            before: of rounds below this one; of all when None.
        """
        rows, codes = self._training(self.round + 1 if before is None else before)
        key = (len(rows), hash((rows.tobytes(), codes.tobytes())))
        if key not in self._heads:
            if len(np.unique(codes)) < 2:
                return None
            self._heads[key] = fit_head(self.pool.x[rows], codes, self.pool.patient_id[rows])
        return self._heads[key]

    def stop_advice(self) -> StopAdvice:
        """Return whether the audit says that more review would change nothing; see `stop_advice`."""
        tiles = [one for one in self.state.decisions.values() if one.share == AUDIT and one.label is not None]
        rows = np.array([self._row[one.id] for one in tiles], np.int64)
        truth = np.array([self.labels.index(str(one.label)) for one in tiles], np.int64)
        heads = [self.head(before=number) for number in range(max(0, self.round - FLAT_ROUNDS) + 1, self.round + 2)]
        wrong = [head.predict(self.pool.x[rows]) != truth for head in heads if head is not None and len(rows)]
        per_class = {label: int((truth == code).sum()) for code, label in enumerate(self.labels)}
        return stop_advice(
            np.array(wrong, np.bool_).reshape(len(wrong), len(rows)),
            self.pool.patient_id[rows],
            labels=self.counts(),
            per_class=per_class,
            found=self._found_since(self.round - FLAT_ROUNDS + 1),
        )

    def _found_since(self, number: int) -> dict[str, int]:
        """Return how many tiles of each class the rounds from `number` on brought, audit excluded."""
        decided = self.state.decisions.values()
        brought = Counter(one.label for one in decided if one.round >= max(0, number) and one.share != AUDIT)
        return {label: brought[label] for label in self.labels}

    def close(self) -> None:
        """Let go of the file."""
        self.journal.close()

    def __enter__(self) -> Self:
        """Return the review."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _seed(self, row: int, label: str) -> Decision:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        item = self._item(row, SEED, 0, None)
        made = self._decision(replace(item, label=label), Answer(id=item.id, verdict="accept"), now)
        return replace(made, verdict="seed", proposed=None, round=-1)

    def _item(self, row: int, share: str, code: int, p: float | None) -> Item:
        rounded = None if p is None else round(float(p), 4)
        return Item(id=int(self.pool.ids[row]), share=share, label=self.labels[code], p=rounded)

    def _decision(self, item: Item, answer: Answer, at: str) -> Decision:
        label = {"accept": item.label, "relabel": answer.label}.get(answer.verdict)
        verdict = answer.verdict
        if answer.verdict == "relabel":
            if answer.label not in self.labels:
                known = closest(str(answer.label), self.labels)
                raise QueryError(f"there is no class {answer.label!r}; the closest are: {known}")
            verdict = "accept" if answer.label == item.label else "relabel"
        elif answer.verdict == "reject" and len(self.labels) == 2:
            label = self.labels[1 - self.labels.index(item.label)]
        elif answer.verdict not in ("accept", "reject", "skip"):
            raise QueryError(f"verdict {answer.verdict!r}; one of accept, reject, relabel, skip")
        row = self._row[item.id]
        queued = [at for at, queue in enumerate(self.state.rounds) if any(one.id == item.id for one in queue)]
        return Decision(
            id=item.id,
            slide_id=str(self.pool.slide_id[row]),
            x=int(self.pool.xy[row, 0]),
            y=int(self.pool.xy[row, 1]),
            verdict=verdict,
            label=label,
            proposed=item.label,
            share=item.share,
            round=queued[-1] if queued else -1,
            at=at,
            reviewer=self.state.start.reviewer,
        )

    def _training(self, before: int) -> tuple[Indices, Indices]:
        """Return rows and class indices that may train the head of a round: no audit, no test split, no skip."""
        found = [
            (self._row[one.id], self.labels.index(one.label))
            for one in self.state.decisions.values()
            if one.label is not None and one.share != AUDIT and one.round < before
        ]
        table = np.array(sorted(found), np.int64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def _known(self) -> Known:
        decided = list(self.state.decisions.values())
        rows = np.array([self._row[one.id] for one in decided], np.int64)
        open_ = ~self.pool.barred
        open_[rows] = False
        alarms = [one for one in decided if one.proposed is not None and one.verdict in ("reject", "relabel")]
        counts = Counter(one.label for one in decided)
        return Known(
            open=open_,
            rows=rows,
            alarms=np.array([self._row[one.id] for one in alarms], np.int64),
            alarm_codes=np.array([self.labels.index(str(one.proposed)) for one in alarms], np.int64),
            rarest=min(range(len(self.labels)), key=lambda code: counts[self.labels[code]]),
        )

    def _all_classes(self, p: Floats, head: LinearProbe) -> Floats:
        """Return probabilities (n, C) of all classes, zero for those the head has not met."""
        found = np.zeros((len(p), len(self.labels)))
        found[:, head.classes_] = p
        return found

    def _retrieve(self, known: Known, size: int, shares: Shares, rng: np.random.Generator) -> list[Item]:
        """Return a queue without a head: the audit, what is like each class's tiles (MMR), and some far from all."""
        open_, target = known.open.copy(), Counter(one.label for one in self.state.decisions.values())
        counts = shares.counts(min(size, int(open_.sum())))
        rows, codes = self._training(self.round + 1)
        there = [code for code, label in enumerate(self.labels) if target[label]]
        wanted = [code for code in there if self.labels[code] != OTHER] or there
        nearness = np.stack([self.unit @ self.unit[rows[codes == code]].mean(axis=0) for code in wanted], axis=1)
        proposed = np.array(wanted)[nearness.argmax(axis=1)]
        queue = [(int(row), AUDIT) for row in rng.choice(np.flatnonzero(open_), counts[AUDIT], replace=False)]
        open_[[row for row, _ in queue]] = False
        like = counts["uncertain"] + counts["hard"]
        for at in range(len(wanted)):
            k = like // len(wanted) + (at < like % len(wanted))
            free = np.flatnonzero(open_)
            near = free[np.argsort(-nearness[free, at], kind="stable")[: mmr_pool(k)]]
            chosen = near[mmr_order(nearness[near, at].astype(np.float32), self.unit[near], k, RELEVANCE)]
            proposed[chosen] = wanted[at]
            queue += [(int(row), RETRIEVED) for row in chosen]
            open_[chosen] = False
        taken = np.concatenate([known.rows, np.array([row for row, _ in queue], np.int64)])
        far = farthest(self.unit, np.flatnonzero(open_), from_rows=taken, k=counts["diverse"])
        queue += [(int(row), "diverse") for row in far]
        shown = [queue[at] for at in rng.permutation(len(queue))]
        return [self._item(row, share, int(proposed[row]), None) for row, share in shown]


def check_pool(pool: Pool, state: State, path: Path) -> None:
    """Raise unless the decisions of a file are about the tiles of a pool.

    Raises:
        StoreMismatchError: other features, or tiles that the pool lacks; the message names them.
    """
    then = {name: value for name, value in state.start.pool.items() if name != "tiles"}
    differ = [name for name, value in pool.about.items() if then.get(name) != value]
    if differ:
        lines = "; ".join(f"{name}: {then.get(name)} there, {pool.about[name]} here" for name in differ)
        raise StoreMismatchError(
            f"{path} is about other features ({lines}); use those, or begin another review with the exported labels "
            "as its seeds"
        )
    known = set(pool.ids.tolist())
    lost = [one for one in state.decisions.values() if one.id not in known]
    lost += [
        item for queue in state.rounds for item in queue if item.id not in known and item.id not in state.decisions
    ]
    if lost:
        where = getattr(lost[0], "slide_id", f"{lost[0].id:016x}")
        raise StoreMismatchError(
            f"{path} speaks of {len(lost)} tiles that are not here, first of {where}; give the features it was made "
            "with, and the same cohort"
        )


def fit_head(x: Array, codes: Indices, groups: npt.NDArray[np.str_]) -> LinearProbe:
    """Return a linear head on few labels, classes weighted alike.

    The strength is chosen by log loss over folds of patients once every class has `FEW` labels and folds can be laid
    with every class on both sides; before that it is `C_FEW`.

    Args:
        x: (m, D) features.
        codes: (m,) class indices, at least two classes.
        groups: (m,) patients.
    """
    classes = np.unique(codes)
    few = any((codes == code).sum() < FEW or len(np.unique(groups[codes == code])) < 2 for code in classes)
    splits = [] if few else default_splits(codes, groups)
    whole = all(len(np.unique(codes[part])) == len(classes) for split in splits for part in split)
    grid = C_GRID if splits and whole else (C_FEW,)
    head = LinearProbe(c_grid=grid, class_weight="balanced", scoring="log_loss")
    return head.fit(x, codes, splits=splits)
