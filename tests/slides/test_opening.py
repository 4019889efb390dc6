"""What cannot be read is refused at once, with the file's name and the reason."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from eosin.errors import CorruptSlideError, MissingDependencyError, SlideError, UnsupportedSlideError
from eosin.slides import open_slide, opening
from slidegen import TiffStyle, coordinates, ramp, truncated, write_ome, write_tiff

PIXELS = coordinates(600, 500)


def test_no_such_file(tmp_path):
    with pytest.raises(SlideError, match=r"nosuch\.svs: no such file"):
        open_slide(tmp_path / "nosuch.svs")


def test_zero_bytes(tmp_path):
    (tmp_path / "a.svs").touch()
    with pytest.raises(CorruptSlideError, match=r"a\.svs: the file is empty"):
        open_slide(tmp_path / "a.svs")


@pytest.mark.parametrize("reader", [None, "openslide", "tiff"])
@pytest.mark.parametrize("compression", ["deflate", "jpeg"])
def test_tiles_beyond_the_end_are_counted(tmp_path, reader, compression):
    path = write_tiff(tmp_path / "a.svs", PIXELS, TiffStyle(compression=compression, factors=(), tile=64))
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        keep = page.dataoffsets[60] + 1
        tiles = sum(len(p.dataoffsets) for p in tiff.pages)
        # The second directory lies behind the tiles: only its absence must not hide the rest.
    cut = truncated(path, tmp_path / "cut.svs", keep / path.stat().st_size)
    with pytest.raises(CorruptSlideError, match=r"cut\.svs: .*(truncated|cannot be read)"):
        open_slide(cut, reader=reader)
    assert tiles > 80


def test_the_number_of_cut_tiles_is_right(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS, photometric="rgb", tile=(128, 128), compression="zlib", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        offsets, counts = np.array(tiff.pages[0].dataoffsets), np.array(tiff.pages[0].databytecounts)
    size = int(offsets[13]) + 1
    path.write_bytes(path.read_bytes()[:size])
    cut = int((offsets + counts > size).sum())
    assert cut == 7
    with pytest.raises(CorruptSlideError, match=f"truncated: {cut} of its 20 tiles lie beyond the end"):
        open_slide(path)


@pytest.mark.parametrize("keep", [0.002, 0.05, 0.3, 0.6, 0.95, 0.999])
def test_any_truncation_is_noticed_at_opening(tmp_path, keep):
    path = write_tiff(tmp_path / "a.svs", PIXELS, TiffStyle(factors=(2,)))
    with pytest.raises(SlideError, match=r"cut\.svs"):
        open_slide(truncated(path, tmp_path / "cut.svs", keep))


def test_garbage_lists_each_reader_with_its_reason(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"this is not a slide" * 50)
    with pytest.raises(UnsupportedSlideError, match=r"a\.svs: no reader takes it: OpenSlide .*; Pillow ") as caught:
        open_slide(tmp_path / "a.svs")
    assert str(caught.value).count("a.svs") == 1


def test_a_png_named_svs_opens_by_its_content(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.svs")
    slide = open_slide(tmp_path / "a.svs")
    assert slide.reader.startswith("pillow")
    np.testing.assert_array_equal(slide.read((0, 0), (600, 500)), PIXELS)


def test_a_broken_png_is_corrupt(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    with pytest.raises(CorruptSlideError, match="cannot be decoded"):
        open_slide(truncated(tmp_path / "a.png", tmp_path / "cut.png", 0.5))


def test_sixteen_bits_are_refused_with_what_is_needed(tmp_path):
    pixels = (ramp(300, 300).astype(np.uint16)) * 256
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(128, 128), metadata=None)
    with pytest.raises(UnsupportedSlideError, match=r"found 3 samples of 16 bit.*8-bit grey, RGB or RGBA"):
        open_slide(tmp_path / "a.tif")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    with pytest.raises(UnsupportedSlideError, match=r"I;16.*8-bit"):
        open_slide(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_fluorescence_channels_are_refused(tmp_path, dtype):
    channels = np.zeros((4, 300, 256), dtype=dtype)
    path = write_ome(tmp_path / "a.ome.tif", channels, axes="CYX")
    with pytest.raises(UnsupportedSlideError, match=r"a\.ome\.tif: found .*brightfield"):
        open_slide(path)
    tifffile.imwrite(tmp_path / "b.tif", channels, photometric="minisblack", tile=(128, 128), metadata=None)
    with pytest.raises(UnsupportedSlideError, match=r"b\.tif"):
        open_slide(tmp_path / "b.tif", reader="tiff")


def test_grey_becomes_rgb(tmp_path):
    grey = PIXELS[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="minisblack", tile=(128, 128), metadata=None)
    Image.fromarray(grey).save(tmp_path / "a.png")
    for name, reader in (("a.tif", None), ("a.tif", "tiff"), ("a.png", None)):
        rgb = open_slide(tmp_path / name, reader=reader).read((0, 0), (600, 500))
        np.testing.assert_array_equal(rgb, np.repeat(grey[..., None], 3, axis=2))


def test_an_mrxs_without_its_folder_says_so(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.mrxs")
    with pytest.raises(CorruptSlideError, match=r"data folder a/ is missing"):
        open_slide(tmp_path / "a.mrxs")


def test_a_folder_without_dicom_is_no_slide(tmp_path):
    with pytest.raises(UnsupportedSlideError, match=r"without \.dcm"):
        open_slide(tmp_path)


def test_without_wsidicom_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(200))
    monkeypatch.setitem(sys.modules, "wsidicom", None)
    monkeypatch.delitem(sys.modules, "eosin.slides.dicom_backend", raising=False)
    with pytest.raises(MissingDependencyError, match=r"eosin\[dicom\]"):
        open_slide(tmp_path / "a.dcm")


@pytest.mark.parametrize("reader", [None, "dicom", "openslide"])
def test_broken_dicom(tmp_path, reader):
    pytest.importorskip("wsidicom", reason="needs the extra 'dicom'")
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(200))
    with pytest.raises(SlideError, match=r"a\.dcm"):
        open_slide(tmp_path / "a.dcm", reader=reader)


def test_unknown_reader_lists_the_closest(tmp_path):
    with pytest.raises(UnsupportedSlideError, match=r"'openslid'.*openslide"):
        open_slide(tmp_path / "a.svs", reader="openslid")


def test_an_unreadable_file_says_why(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.svs", PIXELS)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(opening.Path, "open", refuse)
    with pytest.raises(SlideError, match=r"a\.svs: cannot be read: Permission denied"):
        open_slide(path)


@pytest.mark.parametrize("shape", [(1, 1), (700, 1), (1, 700), (3, 2)])
def test_the_thinnest_slides_open(tmp_path, shape):
    pixels = coordinates(shape[1], shape[0])
    write_tiff(tmp_path / "a.tif", pixels, TiffStyle(flavour="generic", factors=(), tile=16))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (tmp_path / "a.tif", tmp_path / "a.png", pixels):
        slide = open_slide(source, mpp=0.5)
        np.testing.assert_array_equal(slide.read((0, 0), (shape[1], shape[0])), pixels)
        assert slide.thumbnail(100)[0].size > 0
        assert slide.read_tile((0, 0), slide.plan(tile_px=8, mpp=0.7)).rgb.shape == (8, 8, 3)


@pytest.mark.parametrize("array", [np.zeros((5, 5, 2), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)])
def test_arrays_that_are_no_slides(array):
    with pytest.raises(UnsupportedSlideError, match="uint8"):
        open_slide(array)


def test_a_thumbnail_page_is_no_level(tmp_path):
    slide = open_slide(write_tiff(tmp_path / "a.svs", PIXELS, TiffStyle(factors=(2, 4))), reader="tiff")
    assert slide.level_sizes == ((600, 500), (300, 250), (150, 125))
    assert slide.associated == ("page-1",)
