"""Filters on the payload of points: a small tree that every engine understands alike.

`mask` says what a filter means; an engine that answers otherwise is wrong. A missing keyword is the empty text and a
missing float is NaN: no range holds NaN, and `Not` of a range does.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eosin.errors import QueryError, closest

FieldType = Literal["keyword", "integer", "float", "bool"]
Value = str | int | float | bool
Bools = npt.NDArray[np.bool_]

_OPERATORS = ("!=", ">=", "<=", "=", ">", "<")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class Is:
    """The field holds one of `values`; for keyword, integer and bool fields."""

    field: str
    values: tuple[str | int | bool, ...]


@dataclass(frozen=True, slots=True)
class Between:
    """The field lies between `low` and `high`, both included; None leaves an end open. For integer and float fields."""

    field: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Not:
    """The filter does not hold."""

    filter: Filter


@dataclass(frozen=True, slots=True)
class All:
    """Every filter holds; no filter at all holds for every point."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Any_:
    """At least one filter holds; no filter at all holds for no point."""

    filters: tuple[Filter, ...]


Leaf = Is | Between
Filter = Is | Between | Not | All | Any_


def mask(filter: Filter, payload: Mapping[str, npt.NDArray[Any]]) -> Bools:
    """Return which rows of `payload` the filter holds for, (n,): what every engine must agree with.

    Args:
        filter: a filter that `check_filter` accepts for these columns.
        payload: columns, each (n,).

    Raises:
        QueryError: a field that is no column; the message lists the closest.
    """
    for leaf in leaves(filter):
        if leaf.field not in payload:
            raise QueryError(f"no field {leaf.field!r} to filter on; the closest are: {closest(leaf.field, payload)}")
    rows = len(next(iter(payload.values()), ()))
    return evaluate(filter, lambda leaf: _holds(leaf, payload[leaf.field]), rows)


def evaluate(filter: Filter, leaf: Callable[[Leaf], Bools], rows: int) -> Bools:
    """Return where the filter holds (rows,), given the function that answers for its leaves."""
    if isinstance(filter, Not):
        return ~evaluate(filter.filter, leaf, rows)
    if isinstance(filter, All):
        found = np.ones(rows, bool)
        for part in filter.filters:
            found &= evaluate(part, leaf, rows)
        return found
    if isinstance(filter, Any_):
        found = np.zeros(rows, bool)
        for part in filter.filters:
            found |= evaluate(part, leaf, rows)
        return found
    return leaf(filter)


def between(low: float | None, high: float | None, column: npt.NDArray[Any]) -> Bools:
    """Return where a column of numbers (n,) lies between two ends; NaN never does."""
    found = column == column
    if low is not None:
        found &= column >= low
    if high is not None:
        found &= column <= high
    return found


def leaves(filter: Filter) -> Iterator[Leaf]:
    """Yield the conditions on single fields, left to right."""
    if isinstance(filter, Not):
        yield from leaves(filter.filter)
    elif isinstance(filter, (All, Any_)):
        for part in filter.filters:
            yield from leaves(part)
    else:
        yield filter


def check_filter(filter: Filter, fields: Mapping[str, FieldType]) -> None:
    """Raise unless every condition names a field of the index and asks what its type can answer.

    Raises:
        QueryError: an unknown field (the message lists the closest), no value, a value of another type, a range on
            text, an equality on a float.
    """
    for leaf in leaves(filter):
        kind = field_type(leaf.field, fields)
        if isinstance(leaf, Is):
            _check_is(leaf, kind)
        else:
            _check_between(leaf, kind)


def field_type(name: str, fields: Mapping[str, FieldType]) -> FieldType:
    """Return the type of a field.

    Raises:
        QueryError: no such field; the message lists the closest.
    """
    if name not in fields:
        raise QueryError(f"the index has no field {name!r}; the closest are: {closest(name, fields)}")
    return fields[name]


def parse_filter(text: str, fields: Mapping[str, FieldType]) -> Filter:
    """Return the filter a command line says: ``site=A,B``, ``label!=tumour``, ``mpp>=0.4``, ``qc_focus>10``.

    A value that holds a comma goes in double quotes: ``site="A, B",C``. ``label=`` finds points without a label.

    Raises:
        QueryError: no operator, an unknown field, or a value the field's type cannot be.
    """
    places = [(text.find(sign), -len(sign), sign) for sign in _OPERATORS if sign in text]
    if not places:
        raise QueryError(f"filter {text!r} needs one of {' '.join(_OPERATORS)}, as in site=A,B or mpp>=0.4")
    at, _, sign = min(places)
    name, rest = text[:at].strip(), text[at + len(sign) :].strip()
    kind = field_type(name, fields)
    if sign in ("=", "!="):
        words = next(csv.reader([rest], skipinitialspace=True), []) or [""]
        same = _same(name, kind, [_value(name, kind, word.strip()) for word in words])
        parsed = Not(same) if sign == "!=" else same
    elif kind in ("integer", "float"):
        parsed = _ordered(name, sign, float(_value(name, "float", rest)), kind)
    else:
        raise QueryError(f"field {name!r} holds {kind} values, which have no order: use = or !=, not {sign}")
    check_filter(parsed, fields)
    return parsed


def describe(filter: Filter) -> str:
    """Return the filter as a phrase for people: ``site is A or B and not (label is tumour)``."""
    if isinstance(filter, Is):
        return f"{filter.field} is {' or '.join('missing' if v == '' else str(v) for v in filter.values)}"
    if isinstance(filter, Between):
        low, high = (None if end is None else f"{end:g}" for end in (filter.low, filter.high))
        if low is None or high is None:
            return f"{filter.field} {'<=' if low is None else '>='} {high if low is None else low}"
        return f"{filter.field} {low} to {high}"
    if isinstance(filter, Not):
        return f"not ({describe(filter.filter)})"
    word, empty = (" and ", "anything") if isinstance(filter, All) else (" or ", "nothing")
    parts = [f"({describe(f)})" if isinstance(f, (All, Any_)) else describe(f) for f in filter.filters]
    return word.join(parts) or empty


def _holds(leaf: Leaf, column: npt.NDArray[Any]) -> Bools:
    if isinstance(leaf, Is):
        wanted = set(leaf.values)
        return np.fromiter((value in wanted for value in column.tolist()), bool, len(column))
    return between(leaf.low, leaf.high, column)


def _check_is(leaf: Is, kind: FieldType) -> None:
    if not leaf.values:
        raise QueryError(f"the filter on {leaf.field!r} names no value; give at least one")
    if kind == "float":
        raise QueryError(f"field {leaf.field!r} holds floats: ask for a range (low to high), not for equal values")
    right = {"keyword": str, "integer": int, "bool": bool}[kind]
    wrong = [v for v in leaf.values if not isinstance(v, right) or (kind == "integer" and isinstance(v, bool))]
    if wrong:
        raise QueryError(f"field {leaf.field!r} holds {kind} values, the filter asks for {wrong[0]!r}")


def _check_between(leaf: Between, kind: FieldType) -> None:
    if kind not in ("integer", "float"):
        raise QueryError(f"field {leaf.field!r} holds {kind} values, which have no order: ask for values, not a range")
    ends = [end for end in (leaf.low, leaf.high) if end is not None]
    if not ends or any(math.isnan(end) for end in ends):
        raise QueryError(f"the range on {leaf.field!r} is {leaf.low} to {leaf.high}; it needs a number at one end")
    if len(ends) == 2 and ends[0] > ends[1]:
        raise QueryError(f"the range on {leaf.field!r} ends at {leaf.high} before it begins at {leaf.low}")


def _value(name: str, kind: FieldType, word: str) -> Value:
    """Return a word of the command line as a value of the field's type."""
    try:
        if kind == "integer":
            return int(word)
        if kind == "float":
            return float(word)
        if kind == "bool":
            return _TRUTH[word.lower()]
    except (ValueError, KeyError) as error:
        wanted = {"integer": "whole numbers", "float": "numbers", "bool": "true or false"}[kind]
        raise QueryError(f"field {name!r} holds {wanted}, not {word!r}") from error
    return word


def _same(name: str, kind: FieldType, values: list[Any]) -> Filter:
    """Return the filter for equal values; floats become ranges of no width."""
    if kind != "float":
        return Is(name, tuple(values))
    parts = tuple(Between(name, value, value) for value in values)
    return parts[0] if len(parts) == 1 else Any_(parts)


def _ordered(name: str, sign: str, value: float, kind: FieldType) -> Between:
    """Return the closed range for an order sign: the next whole number or the next float stands for < and >."""
    if kind == "integer":
        up, down = math.floor(value) + 1, math.ceil(value) - 1
        ends = {">": (up, None), ">=": (math.ceil(value), None), "<": (None, down), "<=": (None, math.floor(value))}
    else:
        up, down = math.nextafter(value, math.inf), math.nextafter(value, -math.inf)
        ends = {">": (up, None), ">=": (value, None), "<": (None, down), "<=": (None, value)}
    return Between(name, *ends[sign])
