from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from eosin.errors import CohortError, LabelError, PredictionsError
from eosin.tasks.predictions import ValidationSettings, read_predictions

BASE = ValidationSettings(label="y", score="p", group="patient", site="center")


def good(n: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    return pd.DataFrame(
        {
            "patient": [f"P{i // 2}" for i in range(n)],
            "center": np.array(["A", "B"])[np.arange(n) // 2 % 2],
            "image": [f"{i}.png" for i in range(n)],
            "split": np.where(np.arange(n) < n // 2, "tune", "test"),
            "y": y,
            "p": np.clip(0.3 + 0.4 * y + rng.normal(0, 0.15, n), 0.01, 0.99).round(4),
        }
    )


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., object]:
    def go(data: pd.DataFrame, settings: ValidationSettings = BASE) -> object:
        data.to_csv(tmp_path / "p.csv", index=False)
        return read_predictions(tmp_path / "p.csv", settings)

    return go


def test_good_rows_are_read_as_they_stand(read: Callable[..., object]) -> None:
    data = good()
    found = read_rows = read(data)
    assert found.test.y.tolist() == data["y"].tolist()  # type: ignore[attr-defined]
    assert found.test.p.tolist() == data["p"].tolist()  # type: ignore[attr-defined]
    assert found.test.number.tolist() == list(range(2, len(data) + 2))  # type: ignore[attr-defined]
    assert read_rows.facts["clusters"] == 20  # type: ignore[attr-defined]
    assert read_rows.facts["positive_label"] == "1"  # type: ignore[attr-defined]


def test_missing_labels_are_named_by_row(read: Callable[..., object]) -> None:
    data = good().astype({"y": object})
    data.loc[[3, 7], "y"] = None
    with pytest.raises(LabelError, match=r"rows 5, 9: y is missing"):
        read(data)


def test_one_class_only(read: Callable[..., object]) -> None:
    with pytest.raises(LabelError, match="'1' in all 40 rows"):
        read(good().assign(y=1))


def test_one_class_among_the_scored_rows(read: Callable[..., object]) -> None:
    data = good()
    data.loc[data["split"] == "test", "y"] = 0
    with pytest.raises(LabelError, match="all 20 test rows are of one class"):
        read(data, replace(BASE, split="split"))


@pytest.mark.parametrize("bad", ["", "NaN", "inf", "none", "0,5"])
def test_scores_that_are_no_numbers(read: Callable[..., object], bad: str) -> None:
    data = good().astype({"p": object})
    data.loc[4, "p"] = bad
    with pytest.raises(PredictionsError, match=r"row 6: p is .* 1 of 40 scores are not finite"):
        read(data)


def test_logits_name_the_option(read: Callable[..., object]) -> None:
    data = good()
    data["p"] = np.log(data["p"] / (1 - data["p"]))
    with pytest.raises(PredictionsError, match=r"look like logits.*--logits"):
        read(data)
    with pytest.raises(PredictionsError, match="probabilities already"):
        read(good(), replace(BASE, logits=True))


def test_percentages_are_told_from_logits(read: Callable[..., object]) -> None:
    with pytest.raises(PredictionsError, match="divide them by 100"):
        read(good().assign(p=good()["p"] * 100))


def test_an_unknown_column_lists_the_closest_three(read: Callable[..., object]) -> None:
    with pytest.raises(CohortError, match=r"no column 'centre' for site; closest: center, \w+, \w+$"):
        read(good(), replace(BASE, site="centre"))


def test_labels_that_do_not_say_which_is_positive(read: Callable[..., object]) -> None:
    data = good()
    data["y"] = np.where(data["y"] == 1, "tumour", "benign")
    with pytest.raises(LabelError, match=r"'benign', 'tumour'.*--positive"):
        read(data)
    with pytest.raises(LabelError, match=r"never is 'tumor'.*closest: tumour"):
        read(data, replace(BASE, positive="tumor"))


@pytest.mark.parametrize(
    ("negative", "positive"), [("0", "1"), ("0.0", "1.0"), ("False", "True"), ("neg", "POS"), ("no", "yes")]
)
def test_labels_that_do(read: Callable[..., object], negative: str, positive: str) -> None:
    data = good()
    y = data["y"].to_numpy()
    data["y"] = np.where(y == 1, positive, negative)
    found = read(data)
    assert found.facts["positive_label"] == positive  # type: ignore[attr-defined]
    assert found.test.y.tolist() == y.tolist()  # type: ignore[attr-defined]


def test_several_classes_are_one_against_the_rest(read: Callable[..., object]) -> None:
    data = good()
    data["y"] = np.array(["a", "b", "c", "d"])[np.arange(40) % 4]
    found = read(data, replace(BASE, positive="c"))
    assert found.test.y.sum() == 10  # type: ignore[attr-defined]
    assert found.facts["negative_labels"] == ["a", "b", "d"]  # type: ignore[attr-defined]


def test_a_patient_in_tune_and_test_is_refused(read: Callable[..., object]) -> None:
    data = good()
    data.loc[0, "split"] = "test"
    with pytest.raises(CohortError, match=r"1 values of patient are in tune and test .*'P0'"):
        read(data, replace(BASE, split="split"))


def test_a_split_without_tune_rows_says_what_it_holds(read: Callable[..., object]) -> None:
    with pytest.raises(CohortError, match=r"holds 'test', 'val' but no 'tune'"):
        read(good().replace({"split": {"tune": "val"}}), replace(BASE, split="split"))


def test_rows_of_other_splits_are_left_out_and_counted(read: Callable[..., object]) -> None:
    data = good()
    data.loc[data["patient"] == "P1", "split"] = "train"
    found = read(data, replace(BASE, split="split"))
    assert (found.facts["rows_left_out"], found.facts["rows_scored"]) == (2, 20)  # type: ignore[attr-defined]


def test_a_row_without_a_patient_is_refused(read: Callable[..., object]) -> None:
    data = good()
    data.loc[5, "patient"] = None
    with pytest.raises(CohortError, match="row 7: patient is missing"):
        read(data)


def test_a_row_without_a_site_forms_a_level_and_is_noted(read: Callable[..., object]) -> None:
    data = good()
    data.loc[5, "center"] = None
    found = read(data)
    assert found.test.site[5] == "(not recorded)"  # type: ignore[attr-defined]
    assert any(r.kind == "missing" and "center" in r.message for r in found.remarks)  # type: ignore[attr-defined]


def test_ids_reused_at_another_site_are_warned_of(read: Callable[..., object]) -> None:
    data = good()
    data.loc[0, "center"] = "B"
    found = read(data)
    assert any(r.kind == "shared-ids" for r in found.remarks)  # type: ignore[attr-defined]


def test_the_same_image_with_both_labels_is_refused(read: Callable[..., object]) -> None:
    data = good()
    data.loc[1, "image"] = "0.png"
    with pytest.raises(LabelError, match=r"rows 2, 3: the same image \(0.png\)"):
        read(data, replace(BASE, image="image"))


def test_a_date_that_is_none(read: Callable[..., object]) -> None:
    with pytest.raises(CohortError, match="row 3: day '13/13/2020' is not an ISO date"):
        read(good().assign(day=["2020-01-01", "13/13/2020", *["2020-02-02"] * 38]), replace(BASE, date="day"))


def test_no_table_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no such file"):
        read_predictions(tmp_path / "absent.csv", BASE)
    (tmp_path / "empty.csv").write_text("y,p,patient,center\n")
    with pytest.raises(CohortError, match="no rows"):
        read_predictions(tmp_path / "empty.csv", BASE)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"margin": 0.05}, "--reference"),
        ({"margin": -1.0, "reference": "q"}, "margin is -1"),
    ],
)
def test_settings_that_do_not_fit(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(PredictionsError, match=says):
        replace(BASE, **wrong)
