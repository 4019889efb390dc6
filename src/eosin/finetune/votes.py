"""Labels and votes: words to classes, votes to soft labels, and what happens where the two disagree."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.cohort.reading import MISSING, row_phrase, series, squeeze
from eosin.errors import LabelError
from eosin.finetune.aliases import class_of
from eosin.finetune.cells import Texts

Calls = npt.NDArray[np.int8]

# Above this share of rows, votes against the label are no slip but another coding.
MOST_DISAGREEING = 0.05
# A number in one of these columns says of which class it is; in a column called "label" it does not.
_NUMBERS_MEAN_ATYPICAL = frozenset({"atypical", "majorityatypical", "isatypical"})
_NUMBERS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
_EXPERT = re.compile(r"(?:expert|rater|reader)[\s_]*(\d+)(?:[\s_]*atypical)?", re.IGNORECASE)


def texts_of(cells: pd.DataFrame, name: str) -> Texts:
    """Return one column as texts (n,), "" where the cell says that nothing is there."""
    values = [str(text).strip() for text in series(cells, name).tolist()]
    return np.array(["" if text.casefold() in MISSING else text for text in values], dtype=np.str_)


def expert_of(name: str) -> str:
    """Return "expert<n>" for a column of one reader's calls, else ""."""
    match = _EXPERT.fullmatch(name.strip())
    return f"expert{match[1]}" if match else ""


def read_labels(column: Texts, name: str, cells: pd.DataFrame, where: str) -> Calls:
    """Return the classes (n,) of a label column, 1 = atypical.

    Args:
        column: (n,) its texts.
        name: what it is called: a number says which class it is in a column called atypical, and in no other.
        cells: the table, for its row numbers.
        where: what the table is called in errors.

    Raises:
        LabelError: an empty cell, an unknown word, or a number that may mean either.
    """
    numbers = _NUMBERS if squeeze(name) in _NUMBERS_MEAN_ATYPICAL else {}
    codes = [numbers.get(text, class_of(text)) for text in column.tolist()]
    wrong = [at for at, code in enumerate(codes) if code is None]
    if wrong:
        text = str(column[wrong[0]])
        advice = (
            f"numbers in a column called {name} do not say which class is 1 (the challenge's scripts have 0 for "
            "atypical): rename it to atypical, or write atypical and normal"
            if text in _NUMBERS
            else "write atypical or normal, AMF or NMF, or 1 and 0 in a column called atypical"
        )
        shown = repr(text) if text else "empty"
        raise LabelError(f"{where}, {row_phrase(cells.index[wrong])}: {name} is {shown}; {advice}")
    return np.array(codes, dtype=np.int8)


def read_votes(cells: pd.DataFrame, column: Texts | None, experts: Mapping[str, str], where: str) -> dict[str, Calls]:
    """Return the calls of each reader, -1 where there is none: from one column each, or from texts such as 011."""
    votes = {}
    for name, expert in experts.items():
        texts = texts_of(cells, name)
        votes[expert] = _calls(texts, name, cells, where, numbers="atypical" in name.casefold())
    if votes or column is None or (column == "").all():
        return votes
    length = len(max(column.tolist(), key=len))
    odd = [at for at, text in enumerate(column.tolist()) if text and (len(text) != length or set(text) - set("01"))]
    if odd:
        raise LabelError(
            f"{where}, {row_phrase(cells.index[odd])}: votes {str(column[odd[0]])!r}; one digit a reader is needed, "
            f"1 for atypical and 0 for normal, {length} in every row (a table opened in a spreadsheet loses zeros)"
        )
    digits = [[int(digit) for digit in text] if text else [-1] * length for text in column.tolist()]
    calls = np.array(digits, dtype=np.int8)
    return {f"expert{at + 1}": np.ascontiguousarray(calls[:, at]) for at in range(length)}


def _calls(texts: Texts, name: str, cells: pd.DataFrame, where: str, *, numbers: bool) -> Calls:
    known = {"": -1, **(_NUMBERS if numbers else {})}
    codes = [known.get(text, class_of(text)) for text in texts.tolist()]
    wrong = [at for at, code in enumerate(codes) if code is None]
    if wrong:
        raise LabelError(
            f"{where}, {row_phrase(cells.index[wrong])}: {name} is {str(texts[wrong[0]])!r}; write atypical or normal, "
            "AMF or NMF, or leave it empty where the reader did not vote"
        )
    return np.array(codes, dtype=np.int8)


def soft_labels(
    label: Calls, votes: Mapping[str, Calls], cells: pd.DataFrame, where: str
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Return the share of atypical votes, the label itself where there are none or their majority is against it."""
    soft = label.astype(np.float32)
    if not votes:
        return soft, []
    calls = np.stack(list(votes.values()))
    cast, atypical = (calls >= 0).sum(axis=0), (calls == 1).sum(axis=0)
    voted = cast > 0
    majority = np.sign(2 * atypical - cast)
    against = voted & (majority != 0) & ((majority > 0) != (label == 1))
    share = against.sum() / max(1, voted.sum())
    if share > MOST_DISAGREEING:
        raise LabelError(
            f"{where}, {row_phrase(cells.index[against])}: in {share:.0%} of the rows that were voted on, the votes' "
            "majority is against the label; check that 1 means atypical in both, and that rows were not shifted"
        )
    use = voted & ~against
    soft[use] = (atypical[use] / cast[use]).astype(np.float32)
    note = (
        f"votes: in {row_phrase(cells.index[against])} the majority is against the label; the label stands, and is "
        "the soft label too"
    )
    return soft, [note] if against.any() else []
