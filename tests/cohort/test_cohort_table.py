"""Reading a cohort: names, values, types, derived ids, and errors by row number."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.cohort import read_cohort
from eosin.cohort.reading import spelling_twins
from eosin.errors import CohortError, LabelError


def written(folder: Path, text: str, name: str = "cohort.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_read_from_the_header(tmp_path: Path, delimiter: str) -> None:
    rows = [["Slide", "Case", "Scanner", "grade"], ["002", "p1", "Hamammatsu XR", "1"], ["010", "p2", "Leica", "2"]]
    cohort = read_cohort(written(tmp_path, "\n".join(delimiter.join(row) for row in rows)))
    assert cohort.table["slide_id"].tolist() == ["002", "010"]
    assert cohort.table["patient_id"].tolist() == ["p1", "p2"]
    assert cohort.table["scanner"].tolist() == ["Hamamatsu XR", "Leica"]
    assert cohort.table["grade"].tolist() == [1, 2]
    assert cohort.table.index.tolist() == [2, 3]
    assert any("Hamammatsu XR" in note for note in cohort.notes)


@pytest.mark.parametrize("name", ["Slide", "slide_name", "SLIDE ID", "Slide-ID", "slide.id", "SlideName"])
def test_a_slide_column_is_found_under_its_usual_names(name: str) -> None:
    assert read_cohort(pd.DataFrame({name: ["a", "b"]})).table["slide_id"].tolist() == ["a", "b"]


def test_two_candidates_for_one_column_must_be_settled_by_the_caller() -> None:
    frame = pd.DataFrame({"slide_id": ["a"], "case": ["p"], "subject": ["s"]})
    with pytest.raises(CohortError, match="'case' and 'subject' could both be patient_id"):
        read_cohort(frame)
    cohort = read_cohort(frame, columns={"patient_id": "subject"})
    assert cohort.table["patient_id"].tolist() == ["s"]
    assert cohort.table["case"].tolist() == ["p"]


def test_a_wrong_name_in_columns_is_answered_with_the_closest() -> None:
    frame = pd.DataFrame({"slide_id": ["a"], "Klinik": ["x"]})
    with pytest.raises(CohortError, match="no column 'Clinik' for site; closest: Klinik"):
        read_cohort(frame, columns={"site": "Clinik"})
    with pytest.raises(CohortError, match="'clinic' is not a cohort column"):
        read_cohort(frame, columns={"clinic": "Klinik"})


def test_row_numbers_count_the_header_and_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "slide_id,x,y\na,1,2\n\n\nb,left,3\n")
    with pytest.raises(CohortError, match=r"row 5: x 'left' is not a number"):
        read_cohort(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("slide_id,label\n", "has no rows"),
        ("slide_id,label\na,1,9\n", "row 2: 3 cells where the header has 2"),
        ("slide_id,label\na\n", "row 2: 1 cells where the header has 2"),
        ("slide_id,slide_id\na,b\n", "slide_id occurs twice"),
        ("name,label\na,1\n", "needs a column slide_id, path or file; it has name, label"),
        ("slide_id,label\n,1\nb,0\nNA,1\n", "rows 2, 4: slide_id empty"),
        ("slide_id,x\na,1\n", "has one of x and y"),
        ("slide_id,x,y\na,1,\n", "row 2: only one of x and y"),
        ("slide_id,date\na,2020-01-01\nb,03/04/2021\n", "row 3: date '03/04/2021' is not an ISO date"),
        ('slide_id,label\n"a,1\n', "cannot be read as a table"),
    ],
)
def test_a_bad_table_says_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CohortError, match=message):
        read_cohort(written(tmp_path, text))


def test_bytes_that_are_no_text_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"slide_id\n\xff\xfe\x00")
    with pytest.raises(CohortError, match="cannot be read as a table"):
        read_cohort(tmp_path / "a.csv")
    with pytest.raises(CohortError, match="no such file"):
        read_cohort(tmp_path / "b.csv")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CohortError, match="cannot be read as a table"):
        read_cohort(tmp_path / "c.parquet")


def test_codes_with_leading_zeros_and_long_numbers_stay_text(tmp_path: Path) -> None:
    cohort = read_cohort(
        written(tmp_path, "slide_id,votes,long,n,f\na,000,12345678901234567890,1,0.5\nb,111,2,-2,1e3\n")
    )
    assert cohort.table["votes"].tolist() == ["000", "111"]
    assert cohort.table["long"].tolist() == ["12345678901234567890", "2"]
    assert cohort.table["n"].tolist() == [1, -2]
    assert cohort.table["f"].tolist() == [0.5, 1000.0]


def test_without_patients_the_slide_stands_for_the_patient() -> None:
    cohort = read_cohort(pd.DataFrame({"slide_id": ["a", "a", "b"], "file": ["1", "2", "3"]}))
    assert cohort.group_key().tolist() == ["a", "a", "b"]
    assert any("each slide is taken as one patient" in note for note in cohort.notes)


def test_slides_of_one_name_in_two_datasets_are_two_clusters() -> None:
    cohort = read_cohort(pd.DataFrame({"slide_id": ["002", "002"], "dataset": ["midog", "tupac"]}))
    assert cohort.group_key().tolist() == ["midog/002", "tupac/002"]


def test_rows_with_nothing_to_group_by_are_their_own_clusters_and_this_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    frame = pd.DataFrame({"file": ["a.png", "b.png", "c.png"], "slide_id": ["s", None, None], "dataset": "d"})
    with caplog.at_level(logging.WARNING):
        cohort = read_cohort(frame)
    assert cohort.group_key().tolist() == ["d/s", "d/file b.png", "d/file c.png"]
    assert "2 rows have neither patient_id nor slide_id" in caplog.text
    assert any("2 rows have neither" in note for note in cohort.notes)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(set(read_cohort(frame[["file"]]).group_key())) == 3
    assert "3 rows have neither" in caplog.text


def test_a_missing_patient_is_taken_from_the_other_rows_of_the_slide() -> None:
    frame = pd.DataFrame(
        {"slide_id": ["a", "a", "b", "b", "b"], "patient_id": ["p", None, "q", "r", None], "file": list("12345")}
    )
    cohort = read_cohort(frame)
    assert cohort.table["patient_id"].tolist() == ["p", "p", "q", "r", "b"]  # b holds two patients: nothing is guessed
    assert any("missing in 2 rows" in note for note in cohort.notes)


def test_slides_are_named_as_extraction_names_them(tmp_path: Path) -> None:
    from eosin.features.jobs import find_jobs

    for name in ("sub/a.svs", "b.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for text in ("path,label\nsub/a.svs,1\nb.svs,0\n", "id,path\none,sub/a.svs\ntwo,b.svs\n"):
        table = written(tmp_path, text)
        assert sorted(read_cohort(table).table["slide_id"]) == [job.slide_id for job in find_jobs([table])]


def test_labels_are_codes_in_sorted_order_numbers_by_value() -> None:
    cohort = read_cohort(
        pd.DataFrame({"slide_id": list("abcd"), "grade": [10, 9, 2, 10], "kind": ["t", "n", "t", "n"]})
    )
    codes, classes = cohort.labels("grade")
    assert classes == ("2", "9", "10")
    assert codes.tolist() == [2, 1, 0, 2]
    assert codes.dtype == np.int64
    assert cohort.labels("Kind")[1] == ("n", "t")


def test_bad_labels_name_rows_and_counts() -> None:
    frame = pd.DataFrame({"slide_id": list("abc"), "label": ["1", None, "NA"], "same": 1})
    with pytest.raises(LabelError, match="rows 3, 4: label is missing"):
        read_cohort(frame, label="label")
    with pytest.raises(LabelError, match="'1' in all 3 rows; two classes needed"):
        read_cohort(frame, label="same")
    with pytest.raises(LabelError, match="no column 'labell'; closest: label"):
        read_cohort(frame, label="labell")


def test_one_image_with_two_labels_is_refused() -> None:
    frame = pd.DataFrame({"slide_id": ["a", "b", "a"], "label": [1, 0, 0]})
    with pytest.raises(LabelError, match="rows 2, 4: the same image with different values of 'label'"):
        read_cohort(frame, label="label")
    assert len(read_cohort(frame.assign(file=["1", "2", "3"]), label="label")) == 3


def test_sites_must_be_known_in_every_row() -> None:
    cohort = read_cohort(pd.DataFrame({"slide_id": list("ab"), "Centre": ["x", None]}))
    with pytest.raises(CohortError, match="row 3: site is missing"):
        cohort.site()
    with pytest.raises(CohortError, match="no column 'scanner'"):
        cohort.site("scanner")
    assert cohort.take([0]).site().tolist() == ["x"]


def test_taking_rows_keeps_their_numbers_and_changes_the_hash() -> None:
    cohort = read_cohort(pd.DataFrame({"slide_id": list("abcd"), "n": range(4)}))
    some = cohort.take(np.array([True, False, True, False]))
    assert some.table.index.tolist() == [2, 4]
    assert some.sha256 != cohort.sha256
    assert cohort.take(np.arange(4)).sha256 == cohort.sha256
    with pytest.raises(CohortError, match="no row is left"):
        cohort.take([])


def test_the_hash_is_of_the_cells_not_of_the_file(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "slide_id": ["1", "2", "3"],
            "x": [1.0, np.nan, 3.0],
            "y": [1.0, np.nan, 2.5],
            "date": [datetime.date(2020, 1, 2), None, datetime.date(2021, 5, 6)],
            "age": [40, 50, 60],
            "score": [0.1, 1.0, np.nan],
            "flag": [True, False, True],
        }
    )
    cohort = read_cohort(frame)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "b.tsv", index=False, sep=";")
    frame.to_parquet(tmp_path / "c.parquet")
    hashes = {read_cohort(tmp_path / name).sha256 for name in ("a.csv", "b.tsv", "c.parquet")}
    assert hashes == {cohort.sha256}
    assert read_cohort(frame.assign(age=[40, 50, 61])).sha256 != cohort.sha256
    assert read_cohort(frame.iloc[::-1]).sha256 != cohort.sha256
    assert read_cohort(frame.rename(columns={"age": "years"})).sha256 != cohort.sha256


CELLS = st.one_of(
    st.text(st.characters(exclude_categories=("C", "Z")), max_size=6),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none(),
)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.text("abc019 ,;\"'\t", min_size=1, max_size=5).filter(lambda t: t.strip()), min_size=1, max_size=8),
    data=st.data(),
)
def test_what_is_written_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, ids: list[str], data) -> None:
    extra = data.draw(st.lists(CELLS, min_size=len(ids), max_size=len(ids)))
    cohort = read_cohort(pd.DataFrame({"slide_id": ids, "value": pd.Series(extra, dtype=object)}))
    path = tmp_path_factory.mktemp("round") / "c.csv"
    cohort.to_csv(path)
    again = read_cohort(path)
    assert again.sha256 == cohort.sha256
    pd.testing.assert_frame_equal(again.table, cohort.table)


def test_twins_are_found_and_numbers_told_apart() -> None:
    assert spelling_twins(["Hamamatsu XR", "Hamammatsu XR", "Aperio CS2"]) == [("Hamamatsu XR", "Hamammatsu XR")]
    assert spelling_twins(["aperio-cs2", "Aperio CS2"]) == [("Aperio CS2", "aperio-cs2")]
    assert spelling_twins(["S36", "S360", "S3600", "site 1", "site 11"]) == []
