from __future__ import annotations

import json

import numpy as np
import pytest

from eosin.errors import EosinError, PredictionsError
from eosin.evaluation.inputs import (
    check_binary,
    check_both,
    check_clusters,
    check_labels,
    check_multiclass,
    check_same_rows,
    check_weight,
)
from eosin.evaluation.interval import Difference, Interval


def test_good_binary_input_comes_back_typed() -> None:
    y, p = check_binary([True, False, True], np.array([0.25, 0.5, 1.0], dtype=np.float32))
    assert (y.dtype, p.dtype) == (np.int8, np.float64)
    np.testing.assert_array_equal(y, [1, 0, 1])
    np.testing.assert_array_equal(p, [0.25, 0.5, 1.0])


def test_good_multiclass_input_comes_back_typed() -> None:
    y, p = check_multiclass([2.0, 0.0], np.array([[0.2, 0.3, 0.5], [1, 0, 0]], dtype=np.float16))
    assert (y.dtype, p.dtype, p.shape) == (np.int64, np.float64, (2, 3))


@pytest.mark.parametrize(
    ("y", "p", "words"),
    [
        ([0, 1, 1], [0.1, np.nan, np.nan], ["2 of 3 rows", "NaN", "row 1"]),
        ([0, 1], [-2.5, 4.0], ["-2.5 to 4", "row 0", "logits", "sigmoid"]),
        ([0, 1], [0.5, 1.01], ["[0, 1]", "row 1"]),
        ([0, 1], [0.5, 99.0], ["scale them"]),
        ([1, 1, 1], [0.5, 0.5, 0.5], ["all 3 rows are of class 1", "both 0 and 1"]),
        ([0, 2, 1], [0.5, 0.5, 0.5], ["labels 0 and 1", "2"]),
        ([0, 1], [0.5, 0.5, 0.5], ["(2,)", "(3,)"]),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], ["(2, 2)"]),
        ([0.5, 1], [0.5, 0.5], ["0.5 in row 0", "whole number"]),
        ([0, np.nan], [0.5, 0.5], ["1 of 2 labels", "row 1"]),
        (["tumour", "normal"], [0.5, 0.5], ["tumour", "Cohort.labels"]),
        ([0, None], [0.5, 0.5], ["missing", "row 1"]),
        ([0, 1], ["high", "low"], ["numbers"]),
        ([], [], ["at least one row"]),
    ],
)
def test_bad_binary_input_is_named(y: object, p: object, words: list[str]) -> None:
    with pytest.raises(PredictionsError) as caught:
        check_binary(y, p)  # type: ignore[arg-type]
    assert isinstance(caught.value, EosinError)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def test_small_negative_numbers_are_not_called_logits() -> None:
    with pytest.raises(PredictionsError) as caught:
        check_binary([0, 1], [-1e-9, 0.5])
    assert "logits" not in str(caught.value)


@pytest.mark.parametrize(
    ("y", "p", "words"),
    [
        ([0, 1], [[0.5, 0.6], [0.5, 0.5]], ["1 rows", "row 0", "1.1", "softmax"]),
        ([0, 3], [[0.5, 0.5], [0.5, 0.5]], ["3", "classes 0 to 1"]),
        ([0, -1], [[0.5, 0.5], [0.5, 0.5]], ["-1"]),
        ([0, 1], [[2.0, -3.0], [0.5, 0.5]], ["logits"]),
        ([0, 1], [0.5, 0.5], ["(n, C)"]),
        ([0, 0], [[1.0], [1.0]], ["C >= 2"]),
    ],
)
def test_bad_multiclass_input_is_named(y: object, p: object, words: list[str]) -> None:
    with pytest.raises(PredictionsError) as caught:
        check_multiclass(y, p)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_one_class_passes_when_asked() -> None:
    y, _ = check_binary([0, 0], [0.1, 0.2], both=False)
    with pytest.raises(PredictionsError, match="class 0"):
        check_both(y)
    check_both(check_labels([0, 1, 2]))


def test_clusters_are_coded_by_sorted_name() -> None:
    np.testing.assert_array_equal(check_clusters(["p9", "p1", "p9", "p3"], 4), [2, 0, 2, 1])
    np.testing.assert_array_equal(check_clusters(np.array([30, 10, 30]), 3), [1, 0, 1])
    codes = check_clusters(np.array(["a", 1, "a"], dtype=object), 3)
    assert codes[0] == codes[2] != codes[1]


def test_bad_clusters_are_named() -> None:
    with pytest.raises(PredictionsError, match=r"needed \(3,\)"):
        check_clusters(["a", "b"], 3)
    with pytest.raises(PredictionsError, match=r"1 of 3 rows have no cluster .*row 1"):
        check_clusters(np.array(["a", None, "b"], dtype=object), 3)


def test_weights() -> None:
    np.testing.assert_array_equal(check_weight(None, 3), [1, 1, 1])
    for bad in ([1, 2], [1, np.nan, 1], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(PredictionsError):
            check_weight(bad, 3)
    with pytest.raises(PredictionsError, match="calls has 2 rows where the labels have 3"):
        check_same_rows("calls", 2, 3)


def test_results_convert_to_json_without_nan() -> None:
    interval = Interval(point=0.9, low=float("nan"), high=1.0, level=0.95, n=4, clusters=2, method="percentile")
    difference = Difference(
        point=0.1, low=0.0, high=float("inf"), p=0.5, se=0.1, level=0.95, n=4, clusters=2, method="delong"
    )
    back = json.loads(json.dumps([interval.to_dict(), difference.to_dict()], allow_nan=False))
    assert back[0]["low"] is None
    assert back[0] == {**back[0], "point": 0.9, "n": 4, "clusters": 2, "method": "percentile", "note": ""}
    assert back[1]["high"] is None
    assert str(interval) == "0.900 (95 % CI nan-1.000; n 4, clusters 2)"
