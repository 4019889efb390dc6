from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import eosin
from eosin.errors import PredictionsError
from eosin.evaluation.interval import Interval
from eosin.evaluation.report import Remark, Report, plain, provenance


def report() -> Report:
    return Report(
        schema="eosin.test/1",
        provenance={"eosin": eosin.__version__},
        sections={"data": {"rows": 3}, "drift": None},
        remarks=(Remark(kind="sign", severity="warning", message="upside down"),),
        not_done={"drift": "no site"},
    )


def test_a_report_survives_json() -> None:
    back = Report.from_json(report().to_json())
    assert back.to_dict() == report().to_dict()
    assert back.remarks[0].severity == "warning"


def test_value_walks_a_path() -> None:
    assert report().value("data.rows") == 3
    assert report().value("drift.psi") is None
    assert report().value("nothing.at.all") is None


def test_what_is_not_a_report_is_refused() -> None:
    for text in ("", "[]", '{"schema": "x"}', '{"schema": 1, "remarks": [{"x": 1}], "not_done": {}, "provenance": {}}'):
        with pytest.raises(PredictionsError, match="not the JSON of a report"):
            Report.from_json(text)


def test_nan_in_a_section_never_becomes_json() -> None:
    bad = Report(schema="s", provenance={}, sections={"x": math.nan})
    with pytest.raises(ValueError, match="not JSON compliant"):
        bad.to_json()


def test_plain_knows_what_results_are_made_of() -> None:
    interval = Interval(point=0.5, low=math.nan, high=np.inf, level=0.95, n=3, clusters=2, method="percentile")
    frame = pd.DataFrame({"n": [1, 2], "when": pd.to_datetime(["2021-03-04", None]), "p": [0.5, np.nan]})
    value = {
        "interval": interval,
        "frame": frame,
        "array": np.arange(2, dtype=np.int64),
        "nan": np.float32("nan"),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        "tuple": (1, None),
        7: "key",
        "missing": pd.NaT,
    }
    found = plain(value)
    assert found["interval"]["point"] == 0.5
    assert found["interval"]["low"] is None
    assert found["interval"]["high"] is None
    assert found["frame"] == [
        {"n": 1, "when": "2021-03-04T00:00:00", "p": 0.5},
        {"n": 2, "when": None, "p": None},
    ]
    assert found["array"] == [0, 1]
    assert found["nan"] is None
    assert found["flag"] is True
    assert found["path"] == "a/b"
    assert found["tuple"] == [1, None]
    assert found["7"] == "key"
    assert found["missing"] is None
    json.dumps(found, allow_nan=False)


def test_provenance_hashes_inputs_without_their_folder(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"abc")
    found = provenance(inputs=[path], settings={"seed": 3, "readers": None}, seed=3)
    # FIPS 180-2, appendix B.1: the digest of "abc"
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert found["inputs"] == [{"name": "p.csv", "bytes": 3, "sha256": sha256}]
    assert found["eosin"] == eosin.__version__
    assert str(tmp_path) not in json.dumps(found)
