"""Filters: what they mean (row by row in plain Python), how a command line says them, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SPEC, cloud
from eosin.errors import QueryError
from eosin.retrieval.filters import All, Any_, Between, Is, Not, check_filter, describe, leaves, mask, parse_filter

FIELDS = {"site": "keyword", "n": "integer", "focus": "float", "pen": "bool", "a,b": "keyword"}
ROWS = {
    "site": np.array(["A", "B", "", "A", "b"], object),
    "n": np.array([-3, 0, 7, 2**53 + 1, 7]),
    "focus": np.array([0.5, np.nan, -np.inf, 1e300, 0.25]),
    "pen": np.array([True, False, True, False, False]),
}


def plain(filter, row):
    """What the filter means for one row."""
    match filter:
        case Is(field, values):
            return any(row[field] == value for value in values)
        case Between(field, low, high):
            value = row[field]
            return not math.isnan(value) and (low is None or value >= low) and (high is None or value <= high)
        case Not(inner):
            return not plain(inner, row)
        case All(parts):
            return all(plain(part, row) for part in parts)
        case Any_(parts):
            return any(plain(part, row) for part in parts)


leaf = st.one_of(
    st.builds(Is, st.just("site"), st.lists(st.sampled_from(["A", "B", "", "C"]), min_size=1).map(tuple)),
    st.builds(Is, st.just("n"), st.lists(st.sampled_from([-3, 7, 2**53, 2**53 + 1]), min_size=1).map(tuple)),
    st.builds(Is, st.just("pen"), st.lists(st.booleans(), min_size=1).map(tuple)),
    st.builds(
        Between, st.sampled_from(["n", "focus"]), st.sampled_from([None, -4, 0.25, 7]), st.sampled_from([7, 8.5])
    ),
    st.builds(Between, st.just("focus"), st.sampled_from([-1.0, 0.25, 0.5])),
)
tree = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(All, st.lists(inner, max_size=3).map(tuple)),
        st.builds(Any_, st.lists(inner, max_size=3).map(tuple)),
    ),
    max_leaves=8,
)


@given(filter=tree)
def test_a_mask_is_the_filter_row_by_row(filter):
    check_filter(filter, FIELDS)
    rows = [{name: column[at] for name, column in ROWS.items()} for at in range(5)]
    np.testing.assert_array_equal(mask(filter, ROWS), [plain(filter, row) for row in rows])


@given(filter=tree)
def test_every_filter_can_be_told_and_compared(filter):
    assert describe(filter)
    assert hash(filter) == hash(filter)
    assert {leaf.field for leaf in leaves(filter)} <= set(FIELDS)


def test_a_mask_of_a_field_that_is_not_there():
    with pytest.raises(QueryError, match="no field 'sites' to filter on; the closest are: site"):
        mask(Is("sites", ("A",)), ROWS)


@pytest.mark.parametrize(
    ("text", "filter"),
    [
        ("site=A", Is("site", ("A",))),
        (" site = A , B ", Is("site", ("A", "B"))),
        ('site="A, B",C', Is("site", ("A, B", "C"))),
        ("site=", Is("site", ("",))),
        ("site!=", Not(Is("site", ("",)))),
        ("site!=A,B", Not(Is("site", ("A", "B")))),
        ("site=x>=2", Is("site", ("x>=2",))),
        ("n=3", Is("n", (3,))),
        ("n!=3,4", Not(Is("n", (3, 4)))),
        ("n>=3", Between("n", 3)),
        ("n>3", Between("n", 4)),
        ("n>3.5", Between("n", 4)),
        ("n<3", Between("n", None, 2)),
        ("n<=3.5", Between("n", None, 3)),
        ("focus>=0.5", Between("focus", 0.5)),
        ("focus>0.5", Between("focus", math.nextafter(0.5, 1))),
        ("focus<1e-3", Between("focus", None, math.nextafter(1e-3, 0))),
        ("focus=0.5", Between("focus", 0.5, 0.5)),
        ("focus!=0.5,1", Not(Any_((Between("focus", 0.5, 0.5), Between("focus", 1, 1))))),
        ("pen=true", Is("pen", (True,))),
        ("pen!=No", Not(Is("pen", (False,)))),
    ],
)
def test_what_a_command_line_says(text, filter):
    assert parse_filter(text, FIELDS) == filter


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("site", "needs one of"),
        ("sit=A", "no field 'sit'; the closest are: site"),
        ("=A", "no field ''"),
        ("site>A", "keyword values, which have no order"),
        ("pen<1", "bool values, which have no order"),
        ("pen=maybe", "holds true or false, not 'maybe'"),
        ("n=x", "holds whole numbers, not 'x'"),
        ("n=1.5", "holds whole numbers, not '1.5'"),
        ("focus>", "holds numbers, not ''"),
        ("focus>nan", "needs a number"),
        ("focus=nan", "needs a number"),
    ],
)
def test_what_a_command_line_cannot_say(text, words):
    with pytest.raises(QueryError, match=words):
        parse_filter(text, FIELDS)


@given(
    sign=st.sampled_from(["<", "<=", ">", ">=", "=", "!="]),
    field=st.sampled_from(["n", "focus"]),
    value=st.integers(-9, 9),
    whole=st.booleans(),
)
def test_order_signs_mean_what_they_say(sign, field, value, whole):
    """Against numpy's own comparisons."""
    if not whole and (field == "focus" or sign not in ("=", "!=")):
        value = value / 4
    column = np.concatenate([np.arange(-9, 10), np.arange(-9, 10)])
    if field == "focus":
        column = np.append(column / 4, np.nan)
    compare = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
    wanted = {**compare, "=": np.equal, "!=": np.not_equal}[sign](column, value)
    np.testing.assert_array_equal(mask(parse_filter(f"{field}{sign}{value}", FIELDS), {field: column}), wanted)


def test_filters_in_words():
    where = All((Is("site", ("A", "")), Not(Any_((Between("n", 3, 5), Between("focus", None, 0.25))))))
    assert describe(where) == "site is A or missing and not (n 3 to 5 or focus <= 0.25)"
    assert describe(All((Any_((Is("n", (1,)), Is("n", (2,)))),))) == "(n is 1 or n is 2)"
    assert (describe(All(())), describe(Any_(()))) == ("anything", "nothing")
    assert describe(Between("n", 1)) == "n >= 1"


def test_payload_of_the_suite_takes_the_filters_of_a_command_line():
    points = cloud()
    for text in ("site=A,B", "mpp>=0.4", "qc_focus>10", "label!=tumour", 'label="fat, necrosis"', "qc_pen=true"):
        where = parse_filter(text, SPEC.fields)
        rows = [{name: column[at] for name, column in points.payload.items()} for at in range(len(points.ids))]
        np.testing.assert_array_equal(mask(where, points.payload), [plain(where, row) for row in rows])
