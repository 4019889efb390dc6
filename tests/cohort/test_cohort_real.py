"""The real tables: atypical mitoses, MIDOG++ and its slide list."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from eosin.cohort import (
    Cohort,
    external,
    from_column,
    grouped_kfold,
    leakage_report,
    leave_one_site_out,
    load_splits,
    preserved_site,
    read_cohort,
    save_splits,
)
from eosin.errors import CohortError

pytestmark = pytest.mark.real


@pytest.fixture
def amf(real_data: Path) -> Cohort:
    return read_cohort(real_data / "tiles" / "amf" / "labels.csv", label="atypical")


@pytest.fixture
def slides(real_data: Path) -> Cohort:
    return read_cohort(real_data / "labels" / "datasets_xvalidation.csv")


def midogpp(real_data: Path) -> pd.DataFrame:
    """The boxes of MIDOG++ as rows: slide, centre of the box, mitotic figure or not."""
    document = json.loads((real_data / "labels" / "MIDOGpp.json").read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    boxes = np.array([one["bbox"] for one in document["annotations"]])
    return pd.DataFrame(
        {
            "file": [f"box {one['id']}" for one in document["annotations"]],
            "slide_id": [names[one["image_id"]] for one in document["annotations"]],
            "dataset": "midog++",
            "x": (boxes[:, 0] + boxes[:, 2]) // 2,
            "y": (boxes[:, 1] + boxes[:, 3]) // 2,
            "mitosis": [int(one["category_id"] == 1) for one in document["annotations"]],
        }
    )


def test_amf_counts_and_clusters(amf: Cohort) -> None:
    y, classes = amf.labels("atypical")
    inner = amf.values("dataset") == "midog21"
    assert classes == ("0", "1")
    assert (int(inner.sum()), int(y[inner].sum()), int((~inner).sum()), int(y[~inner].sum())) == (1721, 404, 746, 128)
    group = amf.group_key()
    assert len(np.unique(group[inner])) == 135
    assert len(np.unique(group[~inner])) == 746
    assert any("746 rows have neither patient_id nor slide_id" in note for note in amf.notes)
    assert amf.table["votes"].iloc[0] == "000"
    assert len(np.unique(amf.row_ids())) == len(amf)


def test_amf_says_loudly_that_slides_are_missing(real_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="eosin.cohort.table"):
        read_cohort(real_data / "tiles" / "amf" / "labels.csv")
    assert "746 rows" in caplog.text


def test_amf_splits_are_clean_and_pinned(amf: Cohort, tmp_path: Path) -> None:
    inner = amf.take(amf.values("dataset") == "midog21")
    splits = grouped_kfold(inner, label="atypical", folds=5, seed=42)
    y, _ = inner.labels("atypical")
    shares = [y[split.test].mean() for split in splits]
    theirs = [
        y[test].mean()
        for _, test in StratifiedGroupKFold(5, shuffle=True, random_state=42).split(y, y, inner.group_key())
    ]
    assert max(shares) - min(shares) <= max(theirs) - min(theirs)
    assert max(shares) - min(shares) < 0.02
    save_splits(tmp_path / "splits.json", splits, inner)
    assert len(load_splits(tmp_path / "splits.json", inner)) == 5
    with pytest.raises(CohortError, match=r"made for 1721 rows of labels\.csv, this cohort has 2467"):
        load_splits(tmp_path / "splits.json", amf)
    assert not leakage_report(inner, splits).errors


def test_amf_rows_split_at_random_leak_slides(amf: Cohort) -> None:
    inner = amf.take(amf.values("dataset") == "midog21")
    y, _ = inner.labels("atypical")
    rows = grouped_kfold(y, groups=np.arange(len(inner)), folds=5)
    report = leakage_report(inner, rows)
    assert len(report.errors) == 5
    assert {finding.kind for finding in report.errors} == {"patient-in-two-parts"}


def test_amf_external_set_and_scanners(amf: Cohort) -> None:
    (split,) = external(amf, column="dataset", value="atnorm-br", label="atypical", val=0.2)
    assert (len(split.train) + len(split.val), len(split.test)) == (1721, 746)
    inner = amf.take(amf.values("dataset") == "midog21")
    assert [s.name for s in leave_one_site_out(inner, column="scanner", label="atypical")] == [
        "scanner Aperio CS2",
        "scanner Hamamatsu S360",
        "scanner Hamamatsu XR",
    ]
    with pytest.raises(CohortError, match=r"\(746 in all\): scanner is missing"):
        leave_one_site_out(amf, column="scanner")


def test_the_misspelt_scanner_is_one_scanner(slides: Cohort, real_data: Path) -> None:
    assert len(slides) == 503
    assert len(np.unique(slides.site("scanner"))) == 4
    assert int((slides.site("scanner") == "Hamamatsu XR").sum()) == 154
    assert any("50 rows said 'Hamammatsu XR'" in note for note in slides.notes)
    unmended = read_cohort(real_data / "labels" / "datasets_xvalidation.csv", aliases={})
    assert [f.kind for f in leakage_report(unmended).findings if f.severity == "warning"] == ["two-spellings"]
    assert any("'Hamamatsu XR' and 'Hamammatsu XR' look like one" in note for note in unmended.notes)


def test_the_slide_list_holds_its_own_split_and_sites(slides: Cohort) -> None:
    (split,) = from_column(slides, "dataset")
    assert (len(split.train), len(split.test)) == (392, 111)
    assert set(slides.site()) == {"UMC Utrecht", "FU Berlin", "VMU Vienna", "AMC New York"}
    report = leakage_report(slides, [split], label="Tumor")
    assert any(f.kind == "origin-and-label" and f.severity == "warning" for f in report.findings)


def test_cells_that_are_in_both_datasets_are_found_to_the_last(amf: Cohort, real_data: Path) -> None:
    boxes = midogpp(real_data)
    both = read_cohort(pd.concat([amf.table[["file", "slide_id", "dataset", "x", "y"]], boxes], ignore_index=True))
    (finding,) = [f for f in leakage_report(both).errors if f.kind == "same-tile-in-two-datasets"]
    hit = both.table.loc[list(finding.rows)]
    assert int((hit["dataset"] == "midog21").sum()) == 1721
    assert hit.loc[hit["dataset"] == "midog++", "mitosis"].eq(1).all()


def test_preserved_scanner_folds_of_midogpp(slides: Cohort, real_data: Path) -> None:
    boxes = midogpp(real_data)
    number = boxes["slide_id"].str.removesuffix(".tiff").astype(int).astype(str)
    boxes["Tumor"] = number.map(slides.table.set_index("slide_id")["Tumor"])
    boxes["domain"] = number.map(
        slides.table.set_index("slide_id")[["Tumor", "scanner", "site"]].agg(" / ".join, axis=1)
    )
    cohort = read_cohort(boxes, label="mitosis")
    assert len(cohort) == 26_286
    splits = preserved_site(cohort, label="mitosis", column="domain", folds=3)
    y, _ = cohort.labels("mitosis")
    domain = cohort.site("domain")
    assert len(np.unique(domain)) == 10
    for split in splits:
        assert set(domain[split.train]).isdisjoint(domain[split.test])
        assert abs(len(split.test) / len(y) - 1 / 3) < 0.08
        assert abs(y[split.test].mean() - y.mean()) < 0.08
