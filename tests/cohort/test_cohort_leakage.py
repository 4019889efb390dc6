"""The leakage report finds what is planted and stays silent where nothing is."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats.contingency import association, chi2_contingency

from eosin.cohort import Cohort, Split, cramers_v, grouped_kfold, leakage_report, near_duplicates, read_cohort
from eosin.cohort.leakage import LeakageReport
from eosin.errors import CohortError, LabelError, NonFiniteError


def clean(seed: int = 0, patients: int = 40, tiles: int = 5) -> pd.DataFrame:
    """A table in which nothing leaks: random names, random labels, random positions."""
    rng = np.random.default_rng(seed)
    n = patients * tiles
    patient = np.repeat(np.arange(patients), tiles)
    return pd.DataFrame(
        {
            "file": [f"{rng.integers(16**8):08x}.png" for _ in range(n)],
            "slide_id": [f"s{p:03d}" for p in patient],
            "patient_id": [f"p{p:03d}" for p in patient],
            "dataset": "one",
            "site": np.array(["A", "B", "C"])[rng.permutation(patients) % 3][patient],
            "x": rng.integers(0, 50_000, n),
            "y": rng.integers(0, 50_000, n),
            "label": rng.permutation(patients)[patient] % 2,
        }
    )


def kinds(report: LeakageReport, severity: str = "") -> set[str]:
    return {f.kind for f in report.findings if not severity or f.severity == severity}


def test_a_clean_cohort_has_no_errors_and_no_warnings() -> None:
    cohort = read_cohort(clean())
    features = np.random.default_rng(0).normal(size=(len(cohort), 16))
    report = leakage_report(cohort, grouped_kfold(cohort, label="label"), features, label="label")
    assert kinds(report) == {"origin-and-label"}
    assert not kinds(report, "error") | kinds(report, "warning")
    assert len(report.checked) == 8
    report.raise_on_error()
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["severity"] == "note"


def halves(cohort: Cohort) -> Split:
    rows = np.arange(len(cohort))
    return Split(name="halves", train=rows[::2], val=rows[:0], test=rows[1::2])


def test_patients_in_two_parts_are_errors_with_their_rows() -> None:
    cohort = read_cohort(clean(tiles=2))
    split = grouped_kfold(cohort, label="label")[0]
    moved = int(split.train[0])
    leaky = Split(name="leaky", train=split.train[1:], val=split.val, test=np.append(split.test, moved))
    (finding,) = leakage_report(cohort, [split, leaky]).errors
    assert finding.kind == "patient-in-two-parts"
    assert set(finding.rows) == set(
        cohort.table.index[cohort.table["patient_id"] == cohort.table["patient_id"].iloc[moved]]
    )
    report = leakage_report(cohort, [halves(cohort)])
    assert "40 patients are in two parts" in report.errors[0].message
    with pytest.raises(CohortError, match="40 patients are in two parts"):
        report.raise_on_error()


def test_a_tissue_microarray_slide_in_two_parts_is_a_warning() -> None:
    frame = clean(tiles=2).assign(slide_id="tma", patient_id=[f"p{i}" for i in range(80)])
    report = leakage_report(read_cohort(frame), [halves(read_cohort(frame))])
    assert kinds(report, "warning") == {"slide-in-two-parts"}
    assert not report.errors


def test_duplicate_rows_and_rows_of_one_image() -> None:
    frame = clean()
    again = pd.concat([frame, frame.iloc[[3, 7]], frame.iloc[[9]].assign(site="Z")], ignore_index=True)
    report = leakage_report(read_cohort(again))
    found = {f.kind: f for f in report.findings}
    assert found["duplicate-rows"].rows == (5, 9, 202, 203)
    assert "2 rows repeat" in found["duplicate-rows"].message
    assert found["same-image-rows"].rows == (11, 204)
    assert found["same-image-rows"].severity == "warning"


def test_the_same_cell_in_two_datasets_is_found_through_other_names() -> None:
    frame = clean()
    twins = frame.iloc[:4].assign(dataset="two", file=list("abcd"), slide_id="Two-" + frame["slide_id"][:4] + ".tiff")
    report = leakage_report(read_cohort(pd.concat([frame, twins], ignore_index=True)))
    (finding,) = report.errors
    assert finding.kind == "same-tile-in-two-datasets"
    assert finding.rows == (2, 3, 4, 5, 202, 203, 204, 205)


def test_equal_positions_on_a_grid_are_only_a_warning() -> None:
    grid = pd.DataFrame({"x": np.arange(20) * 256, "y": 512, "slide_id": "002"})
    frame = pd.concat([grid.assign(dataset="one"), grid.assign(dataset="two")], ignore_index=True)
    report = leakage_report(read_cohort(frame))
    assert kinds(report, "error") == set()
    assert {"same-tile-in-two-datasets", "patient-id-in-two-datasets"} == kinds(report, "warning")


def test_two_spellings_of_a_site() -> None:
    frame = clean()
    frame["site"] = np.where(np.arange(len(frame)) % 2, "UMC Utrecht", "umc-utrecht")
    (finding,) = [f for f in leakage_report(read_cohort(frame)).findings if f.kind == "two-spellings"]
    assert "'UMC Utrecht' and 'umc-utrecht'" in finding.message


def test_near_duplicates_equal_brute_force_across_block_borders() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4500, 24)).astype(np.float32)
    x[4400] = 3 * x[10]  # one direction, blocks 0 and 2
    x[2047], x[2048] = x[2046], x[2046] * 2  # around a border
    x[77] = x[76]  # within one group: ignored
    x[[5, 6]] = 0  # zero vectors match nothing
    group = np.arange(4500)
    group[77] = group[76]
    pairs, cosine, total = near_duplicates(x, group)
    assert sorted(map(tuple, pairs.tolist())) == [(10, 4400), (2046, 2047), (2046, 2048), (2047, 2048)]
    assert total == 4
    np.testing.assert_allclose(cosine, 1, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40))
def test_near_duplicates_property(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).round(0)
    group = rng.integers(0, 6, n)
    found = {tuple(pair) for pair in near_duplicates(x, group, cosine=0.999)[0].tolist()}
    norm = np.linalg.norm(x, axis=1)
    for i in range(n):
        for j in range(i + 1, n):
            near = norm[i] > 0 and norm[j] > 0 and x[i] @ x[j] / norm[i] / norm[j] > 0.999
            assert ((i, j) in found) == bool(near and group[i] != group[j])


def test_all_features_equal_does_not_explode() -> None:
    pairs, _, total = near_duplicates(np.ones((3000, 4)), np.arange(3000))
    assert total == 3000 * 2999 // 2
    assert len(pairs) == 10_000


def test_near_duplicates_across_parts_are_errors_else_warnings() -> None:
    cohort = read_cohort(clean())
    split = grouped_kfold(cohort, label="label")[0]
    features = np.random.default_rng(0).normal(size=(len(cohort), 16))
    features[split.test[0]] = features[split.train[0]]
    (finding,) = leakage_report(cohort, [split], features).errors
    assert finding.kind == "near-duplicate-features"
    assert set(finding.rows) == set(cohort.table.index[[split.test[0], split.train[0]]])
    assert kinds(leakage_report(cohort, None, features), "warning") == {"near-duplicate-features"}
    with pytest.raises(CohortError, match=r"shape \(3, 16\) for 200 rows"):
        leakage_report(cohort, None, features[:3])
    features[4, 2] = np.nan
    with pytest.raises(NonFiniteError, match="1 of 200 feature rows are not finite, first 4"):
        leakage_report(cohort, None, features)


def test_a_label_in_the_file_name_is_found_and_only_then() -> None:
    frame = clean()
    stain = np.where(frame["label"] == 1, "b7", "c2")
    frame["file"] = [f"scan_{s}_{name}" for s, name in zip(stain, frame["file"], strict=True)]
    report = leakage_report(read_cohort(frame), label="label")
    (finding,) = [f for f in report.findings if f.kind == "name-tells"]
    assert finding.severity == "warning"
    assert "label can be told from file: AUROC 1.00" in finding.message


def test_a_site_in_the_slide_name_is_a_note() -> None:
    frame = clean()
    frame["slide_id"] = "TCGA-" + frame["site"] + frame["site"] + "-" + frame["slide_id"]
    report = leakage_report(read_cohort(frame), label="label")
    (finding,) = [f for f in report.findings if f.kind == "name-tells"]
    assert finding.severity == "note"
    assert "site can be told from slide_id" in finding.message


def test_clustered_random_names_do_not_cry_wolf() -> None:
    """Labels constant within few large patients, each with its own name prefix: nothing to be told."""
    alarms = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        frame = clean(seed, patients=12, tiles=12)
        prefix = {p: f"{rng.integers(16**6):06x}" for p in frame["patient_id"].unique()}
        frame["file"] = [f"{prefix[p]}_{name}" for p, name in zip(frame["patient_id"], frame["file"], strict=True)]
        frame = frame.drop(columns=["site", "dataset"])
        alarms += "name-tells" in kinds(leakage_report(read_cohort(frame), label="label", seed=seed))
    assert alarms <= 1


@settings(max_examples=50, deadline=None)
@given(data=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=2, max_size=5))
def test_cramers_v_equals_scipy(data: list[list[int]]) -> None:
    counts = np.array(data)
    v, p = cramers_v(counts)
    kept = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if min(kept.shape, default=0) < 2:
        assert np.isnan(v)
        return
    assert v == pytest.approx(association(kept, method="cramer"), abs=1e-9)
    assert p == pytest.approx(chi2_contingency(kept, correction=False).pvalue, rel=1e-6, abs=1e-300)


def test_a_site_with_one_class_is_a_warning_that_counts_patients() -> None:
    frame = clean()
    frame["label"] = (frame["site"] == "A").astype(int)
    report = leakage_report(read_cohort(frame), label="label")
    (finding,) = [f for f in report.findings if f.kind == "origin-and-label"]
    assert finding.severity == "warning"
    assert "Cramer's V 1.00" in finding.message
    assert "over 40 patients; one class only at A, B, C" in finding.message


def test_rows_without_a_label_are_left_out_and_an_unknown_label_raises() -> None:
    frame = clean().astype({"label": object})
    frame.loc[frame["patient_id"] == "p003", "label"] = None
    report = leakage_report(read_cohort(frame), label="label")
    assert "over 39 patients" in next(f.message for f in report.findings if f.kind == "origin-and-label")
    with pytest.raises(LabelError, match="no column 'lalel'; closest: label"):
        leakage_report(read_cohort(frame), label="lalel")


def test_cramers_v_of_known_tables() -> None:
    assert cramers_v(np.eye(3) * 5)[0] == pytest.approx(1)
    assert cramers_v(np.ones((2, 4)))[0] == 0
    assert np.isnan(cramers_v([[3, 4]])[0])
