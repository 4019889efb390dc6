from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cellgen import AMIBR, MIDOG25, pixels, write_picture, write_table

from eosin.errors import CohortError, GeometryError, LabelError
from eosin.finetune.aliases import dataset_name, scanner_name, slide_identity
from eosin.finetune.cells import domain_counts, read_tiles
from eosin.finetune.tables import read_sources, read_table, recognise, with_sources


def midog25(path: Path, *rows: str) -> Path:
    return write_table(path, MIDOG25, *rows)


XR = "human breast cancer,Hamammatsu XR,UMC Utrecht,Human"


def test_midog25_rows_become_cells(tmp_path: Path) -> None:
    path = midog25(
        tmp_path / "MIDOG25.csv",
        f"1.png,002.tiff,5047,459,{XR},NMF,NMF,,NMF",
        f"2.png,002.tiff,10,20,{XR},AMF,NMF,AMF,AMF",
        "3.png,201.tiff,7,8,canine lung cancer,3D Histech,VMU Vienna,Canine,AMF,AMF,,AMF",
    )
    cells = read_table(path)
    assert cells.label.tolist() == [0, 1, 1]
    assert np.allclose(cells.soft, [0, 2 / 3, 1])
    assert cells.votes["expert3"].tolist() == [-1, 1, -1]
    assert cells.xy.tolist() == [[5047, 459], [10, 20], [7, 8]]
    assert cells.group_key().tolist() == ["midog/002", "midog/002", "midog/201"]
    assert cells.domain.tolist()[1:] == [
        "human breast cancer | Hamamatsu XR | UMC Utrecht | human",
        "canine lung cancer | 3D Histech | VMU Vienna | canine",
    ]
    assert cells.file.tolist() == ["", "", ""]
    assert any("none of the 3 (first: 1.png) was found" in note for note in cells.notes)
    assert cells.root == tmp_path


def test_two_spellings_of_a_scanner_are_one_domain(tmp_path: Path) -> None:
    path = midog25(
        tmp_path / "t.csv",
        f"1.png,002.tiff,1,1,{XR},NMF,NMF,,NMF",
        f"2.png,003.tiff,1,1,{XR.replace('Hamammatsu', 'Hamamatsu')},AMF,AMF,,AMF",
    )
    assert len(domain_counts(read_table(path))) == 1


def test_amibr_takes_set_and_picture_from_its_columns(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "AMI-BR.csv",
        "," + AMIBR,
        "0,002.tiff,MIDOG21,6,4422,216,NMF metaphase,False,False,False,False",
        "1,002.tiff,TUPAC16,9,5,6,AMF other,True,False,True,True",
    )
    for name, seed in (("MIDOG21_6.png", 1), ("TUPAC16_9.png", 2)):
        write_picture(tmp_path / "patches" / name, pixels(seed))
    cells = read_table(path)
    assert cells.dataset.tolist() == ["midog21", "tupac16"]
    assert cells.file.tolist() == ["patches/MIDOG21_6.png", "patches/TUPAC16_9.png"]
    assert cells.group_key().tolist() == ["midog/002", "tupac16/002.tiff"]
    assert cells.soft.tolist() == [0, np.float32(2 / 3)]
    assert np.array_equal(read_tiles(cells, [1])[0], pixels(2))


def test_atnorm_votes_and_folders(tmp_path: Path) -> None:
    votes = write_table(
        tmp_path / "votes.csv",
        "Filename,Expert_1,Expert_2,Expert_3,Expert_4,Expert_5,Majority",
        "1.png,Normal,Normal,Atypical,Normal,Normal,Normal",
        "2.png,Atypical,Atypical,Normal,Atypical,Normal,Atypical",
    )
    cells = read_table(votes)
    assert np.allclose(cells.soft, [0.2, 0.6])
    assert set(cells.dataset) == {"atnorm-md"}
    assert len(set(cells.group_key())) == 2
    folder = tmp_path / "AtNorM-Br"
    for name, seed in (("Atypical/3.png", 3), ("Normal/1.png", 1), ("Normal/2.png", 2)):
        write_picture(folder / name, pixels(seed))
    cells = read_table(folder)
    assert cells.label.tolist() == [1, 0, 0]
    assert set(cells.dataset) == {"atnorm-br"}
    assert set(cells.origin) == {"TCGA"}
    assert np.array_equal(read_tiles(cells, [2])[0], pixels(2))


def test_octo_pictures_name_their_set_and_a_repeated_row_is_left_out(tmp_path: Path) -> None:
    one, two = "69a_040622_x75_y79_366_5_414_47.png", "0228_x102_y115_577_371_609_403.png"
    path = write_table(
        tmp_path / "any.csv", "image_id,filename,majority", f"{one},69a,AMF", f"{one},69a,AMF", f"{two},0228,NMF"
    )
    cells = read_table(path)
    assert cells.label.tolist() == [1, 0]
    assert set(cells.dataset) == {"omg-octo"}
    assert any("row 3 repeat" in note for note in cells.notes)
    assert np.isnan(cells.xy).all()


def test_a_table_of_no_known_kind(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "crop": ["1.png", "2.png"],
            "Patient": ["p1", "p2"],
            "Slide": ["s1", "s1"],
            "centre": ["Paris", "Lyon"],
            "class": ["atypical", "normal"],
            "comment": ["", "fine"],
        }
    )
    cells = read_table(table, root=tmp_path, dataset="ours")
    assert cells.label.tolist() == [1, 0]
    assert cells.soft.tolist() == [1, 0]
    assert cells.patient_id.tolist() == ["ours/p1", "ours/p2"]
    assert cells.origin.tolist() == ["Paris", "Lyon"]
    assert "columns not used: comment" in cells.notes
    table.to_csv(tmp_path / "cells.tsv", sep="\t", index=False)
    again = read_table(tmp_path / "cells.tsv", dataset="ours")
    assert again.patient_id.tolist() == cells.patient_id.tolist()
    assert np.array_equal(again.label, cells.label)


def test_a_number_in_a_label_column_may_mean_either_class() -> None:
    with pytest.raises(LabelError, match="do not say which class is 1"):
        read_table(pd.DataFrame({"file": ["1.png", "2.png"], "label": [0, 1]}))
    cells = read_table(pd.DataFrame({"file": ["1.png", "2.png"], "atypical": [0.0, 1.0]}))
    assert cells.label.tolist() == [0, 1]


@pytest.mark.parametrize(("cell", "shown"), [("", "is empty"), ("maybe", "is 'maybe'"), ("2", "is '2'")])
def test_a_label_that_is_no_class_is_named_by_row(cell: str, shown: str) -> None:
    with pytest.raises(LabelError, match=rf"row 3: atypical {shown}"):
        read_table(pd.DataFrame({"file": ["1.png", "2.png"], "atypical": ["1", cell]}))


def test_unknown_columns_list_what_there_is() -> None:
    with pytest.raises(CohortError, match=r"no column says which cells are atypical; it has file, outcome.*atypical"):
        recognise(["file", "outcome"], "t.csv")
    with pytest.raises(CohortError, match=r"names a picture .* or a position"):
        recognise(["atypical", "x", "y"], "t.csv")
    with pytest.raises(CohortError, match="no rows"):
        read_table(pd.DataFrame({"file": [], "atypical": []}))


def voted(against: int, rows: int = 100) -> pd.DataFrame:
    """Return a table whose first `against` rows have votes against the label."""
    votes = ["110" if at < against else "001" for at in range(rows)]
    files = [f"{at}.png" for at in range(rows)]
    return pd.DataFrame({"file": files, "atypical": [0] * (rows - 1) + [1], "votes": [*votes[:-1], "111"]})


def test_few_votes_against_the_label_are_noted_and_the_label_stands() -> None:
    cells = read_table(voted(5))
    assert cells.label[:5].tolist() == [0] * 5
    assert cells.soft[:5].tolist() == [0] * 5
    assert np.allclose(cells.soft[5:-1], 1 / 3)
    note = next(note for note in cells.notes if note.startswith("votes"))
    assert "rows 2, 3, 4, 5, 6 the majority is against the label" in note
    with pytest.raises(LabelError, match=r"in 6% of the rows.*check that 1 means atypical"):
        read_table(voted(6))


def test_a_tie_is_not_against_the_label() -> None:
    table = pd.DataFrame({"file": ["1", "2"], "atypical": [0, 1], "votes": ["01", "10"]})
    assert read_table(table).soft.tolist() == [0.5, 0.5]


def test_votes_that_lost_their_zeros_are_refused() -> None:
    table = pd.DataFrame({"file": ["1", "2"], "atypical": [0, 1], "votes": [0, 111]})
    with pytest.raises(LabelError, match=r"row 2: votes '0'; one digit a reader.*loses zeros"):
        read_table(table)
    with pytest.raises(LabelError, match="expert1 is 'perhaps'"):
        read_table(pd.DataFrame({"file": ["1", "2"], "label": ["AMF", "NMF"], "expert1": ["AMF", "perhaps"]}))


def test_crops_of_another_resolution_are_refused() -> None:
    table = pd.DataFrame({"file": ["1", "2", "3"], "atypical": [0, 1, 1], "mpp": [0.25, 0.23, 0.5]})
    with pytest.raises(GeometryError, match=r"row 4: mpp 0\.5 where crops of 0\.25.*cut these crops anew"):
        read_table(table)
    assert len(read_table(table[:2])) == 2
    with pytest.raises(GeometryError, match=r"rows 2, 3: mpp 0\.25"):
        read_table(table, mpp=0.5)


def test_some_missing_pictures_are_an_error_and_ambiguous_ones_too(tmp_path: Path) -> None:
    write_picture(tmp_path / "a" / "1.png", pixels(1))
    table = pd.DataFrame({"file": ["1.png", "2.png"], "atypical": [0, 1]})
    with pytest.raises(CohortError, match=r"1 of 2 pictures are missing under .*first: 2\.png"):
        read_table(table, root=tmp_path)
    write_picture(tmp_path / "b" / "1.png", pixels(2))
    with pytest.raises(CohortError, match=r"1\.png lies in a/1\.png and b/1\.png"):
        read_table(table, root=tmp_path)


def test_a_data_frame_does_not_search_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "deep" / "1.png", pixels(1))
    write_picture(tmp_path / "2.png", pixels(2))
    monkeypatch.chdir(tmp_path)
    assert read_table(pd.DataFrame({"file": ["1.png"], "atypical": [1]})).file.tolist() == [""]
    assert read_table(pd.DataFrame({"file": ["2.png"], "atypical": [1]})).file.tolist() == ["2.png"]
    assert read_table(pd.DataFrame({"file": ["1.png"], "atypical": [1]}), root=".").file.tolist() == ["deep/1.png"]


def test_one_cell_with_two_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"rows 2, 3: the same picture .* with different labels"):
        read_table(pd.DataFrame({"file": ["1.png", "1.png"], "atypical": [0, 1]}))
    row = f"002.tiff,5047,459,{XR}"
    path = midog25(tmp_path / "t.csv", f"1.png,{row},NMF,NMF,,NMF", f"2.png,{row},AMF,AMF,,AMF")
    with pytest.raises(LabelError, match=r"rows 2, 3: the same position \(002.tiff 5047 459\)"):
        read_table(path)


def test_positions_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    path = midog25(tmp_path / "t.csv", f"1.png,002.tiff,50x,459,{XR},NMF,NMF,,NMF")
    with pytest.raises(CohortError, match="row 2: x '50x' is not a number"):
        read_table(path)


def test_a_folder_must_say_which_table(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="holds no table of cells"):
        read_table(tmp_path)
    for name in ("a.csv", "b.csv"):
        write_table(tmp_path / name, "file,atypical", "1.png,1")
    with pytest.raises(CohortError, match="holds 2 tables"):
        read_table(tmp_path)
    write_table(tmp_path / "labels.csv", "file,atypical", "9.png,1", "8.png,0")
    assert len(read_table(tmp_path)) == 2
    with pytest.raises(CohortError, match="no such file"):
        read_table(tmp_path / "gone.csv")


def test_names_of_scanners_sets_and_slides() -> None:
    assert scanner_name("Hamammatsu XR") == scanner_name("hamamatsu-xr") == "Hamamatsu XR"
    assert scanner_name("Leica GT450") == "Leica GT450"
    assert dataset_name("MIDOGpp") == dataset_name("MIDOG++") == "midog++"
    assert slide_identity("midog25", "007.tiff") == slide_identity("midog21", "midog21-007") == ("midog", "007")
    assert slide_identity("midog++", "000.tiff") == ("midog", "000")
    assert slide_identity("tupac16", "007.tiff") == ("tupac16", "007.tiff")
    assert slide_identity("midog25", "slide A") == ("midog25", "slide A")


def test_sources_fill_what_a_table_does_not_say(tmp_path: Path) -> None:
    sheet = tmp_path / "slides.csv"
    sheet.write_text(
        "Slide;Dataset;Tumor;Scanner;Origin;Species\n2;train;human breast cancer;Hamammatsu XR;UMC Utrecht;Human\n"
    )
    table = pd.DataFrame({"slide": ["002.tiff", "900.tiff"], "x": [1, 2], "y": [3, 4], "atypical": [0, 1]})
    cells = with_sources(read_table(table, dataset="MIDOG21"), read_sources(sheet))
    assert cells.scanner.tolist() == ["Hamamatsu XR", ""]
    assert cells.domain.tolist() == [
        "human breast cancer | Hamamatsu XR | UMC Utrecht | human",
        "human breast cancer | midog21 | UMC Utrecht | human",
    ]
    with pytest.raises(CohortError, match="no column Tumor"):
        read_sources(write_table(tmp_path / "other.csv", "Slide;Scanner", "1;x"))


@pytest.mark.real
def test_the_real_cells(real_data: Path) -> None:
    cells = read_table(real_data / "tiles" / "amf")
    sets = {name: cells.take(cells.dataset == name) for name in ("midog21", "atnorm-br")}
    assert {name: (len(part), int(part.label.sum())) for name, part in sets.items()} == {
        "midog21": (1721, 404),
        "atnorm-br": (746, 128),
    }
    inside, outside = sets["midog21"], sets["atnorm-br"]
    assert len(set(inside.group_key())) == 135
    assert len(set(outside.group_key())) == 746
    counts = {line.domain.split(" | ")[1]: (line.normal, line.atypical) for line in domain_counts(inside)}
    assert counts == {"Aperio CS2": (516, 172), "Hamamatsu S360": (455, 127), "Hamamatsu XR": (346, 105)}
    votes = np.stack([inside.votes[f"expert{at}"] for at in (1, 2, 3)])
    assert np.array_equal(inside.label, (votes.sum(axis=0) >= 2).astype(np.int8))
    assert np.allclose(inside.soft, votes.mean(axis=0))
    assert (np.stack(list(outside.votes.values())) == -1).all()
    sources = read_sources(real_data / "labels" / "datasets_xvalidation.csv")
    assert len(sources) == 503
    assert {sources[key].scanner for key in sources} == {"Hamamatsu XR", "Hamamatsu S360", "Aperio CS2", "3D Histech"}
    # What the crops' own table says of the scanner is what the slides' table says.
    keys = [slide_identity(a, b) for a, b in zip(inside.dataset, inside.slide_id, strict=True)]
    assert [sources[key].scanner for key in keys] == inside.scanner.tolist()
