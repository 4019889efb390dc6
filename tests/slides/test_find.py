from __future__ import annotations

import pytest

from eosin.errors import SlideError
from eosin.slides import find_slides
from slidegen import coordinates


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(root):
    return [name for name, _ in find_slides(root)]


def test_a_file_is_known_by_its_name(tmp_path):
    touch(tmp_path, "deep/a.svs")
    assert find_slides(tmp_path / "deep/a.svs") == [("a.svs", tmp_path / "deep/a.svs")]


def test_a_folder_is_searched_and_ids_keep_path_and_suffix(tmp_path):
    touch(
        tmp_path, "b/slide1.svs", "a/slide1.svs", "x.tif", "x.svs", "n.ome.tiff", "A.NDPI", "notes.txt", ".hidden.svs"
    )
    touch(tmp_path, ".cache/y.svs")
    assert ids(tmp_path) == ["A.NDPI", "a/slide1.svs", "b/slide1.svs", "n.ome.tiff", "x.svs", "x.tif"]


def test_companions_are_not_slides(tmp_path):
    touch(tmp_path, "m.mrxs", "m/Data0000.dat", "m/preview.jpg", "v/s.vms", "v/s.jpg", "v/s_map2.jpg")
    assert ids(tmp_path) == ["m.mrxs", "v/s.vms"]


def test_a_folder_of_one_dicom_series_is_one_slide(tmp_path):
    pytest.importorskip("pydicom", reason="needs the extra 'dicom'")
    from dicomgen import write_dicom

    pixels = coordinates(80, 70)
    write_dicom(tmp_path / "case/one", [pixels, pixels[::2, ::2]], mpp=(0.5, 0.5))
    write_dicom(tmp_path / "case/mixed", [pixels], mpp=(0.5, 0.5))
    (tmp_path / "case/mixed/level0.dcm").rename(tmp_path / "case/mixed/other.dcm")
    write_dicom(tmp_path / "case/mixed", [pixels], mpp=(0.5, 0.5))
    assert ids(tmp_path / "case") == ["mixed/level0.dcm", "mixed/other.dcm", "one"]
    assert find_slides(tmp_path / "case/one") == [("one", tmp_path / "case/one")]


def test_nothing_there(tmp_path):
    assert find_slides(tmp_path) == []
    with pytest.raises(SlideError, match="no such file"):
        find_slides(tmp_path / "nosuch")
