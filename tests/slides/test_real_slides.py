"""Real slides against openslide-python and tifffile themselves."""

from __future__ import annotations

import numpy as np
import openslide
import pytest
import tifffile

from eosin.errors import MissingMppError
from eosin.slides import find_slides, open_slide

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def slides(real_data):
    return real_data / "slides"


@pytest.mark.parametrize("reader", [None, "openslide", "tiff"])
def test_cmu_1_equals_openslide(slides, reader):
    path = slides / "CMU-1-Small-Region.svs"
    slide = open_slide(path, reader=reader)
    with openslide.OpenSlide(path) as direct:
        for xy, size in (((0, 0), (300, 200)), ((701, 1203), (500, 511)), ((1900, 2700), (320, 267))):
            expected = np.asarray(direct.read_region(xy, 0, size))[..., :3]
            np.testing.assert_array_equal(slide.read(xy, size), expected)
        assert slide.properties.get("openslide.vendor", "aperio") == "aperio"
    assert slide.mpp.x == slide.mpp.y == 0.499
    assert slide.mpp_ledger.objective_power == 20
    assert slide.mpp_ledger.conflict is None


def test_cmu_1_has_its_label(slides):
    slide = open_slide(slides / "CMU-1-Small-Region.svs")
    assert slide.associated == ("label", "macro", "thumbnail")
    assert slide.associated_image("label").shape == (463, 387, 3)


def test_jpeg2000_levels_are_the_stored_pixels(slides):
    path = slides / "tcga-cr-7395-01a-01-ts1.svs"
    slide = open_slide(path)
    assert slide.level_downsamples[1] == (4443 / 2221, 3567 / 1783)
    with tifffile.TiffFile(path) as tiff:
        stored = next(page for page in tiff.pages if page.shape[:2] == (1783, 2221)).asarray()
    got = slide.backend.read_region((1000, 400), level=1, scale=1, size_px=(200, 150))
    np.testing.assert_array_equal(got, stored[400:550, 1000:1200])
    # What OpenSlide alone gives there lies between pixels; it is close, and it is not the same.
    with open_slide(path, reader="openslide") as alone:
        between = alone.backend.read_region((1000, 400), level=1, scale=1, size_px=(200, 150))
    difference = np.abs(between[..., :3].astype(int) - got)
    assert 1 < difference.mean() < 10


def test_tcga_without_mpp(slides):
    path = slides / "tcga-cr-7395-01a-01-ts1.svs"
    slide = open_slide(path)
    with pytest.raises(MissingMppError):
        _ = slide.mpp
    assert open_slide(path, mpp=1.0).read((1000, 1000), 128, mpp=2.0).shape == (128, 128, 3)


def test_tcga_icc_profile(slides):
    path = slides / "tcga-cr-7395-01a-01-ts1.svs"
    plain, managed = open_slide(path), open_slide(path, icc=True)
    assert plain.backend.icc_profile is not None
    assert len(plain.backend.icc_profile) == 3144
    assert managed.options["icc"] == "applied"
    assert managed.read((2000, 1500), 200).shape == plain.read((2000, 1500), 200).shape


@pytest.mark.parametrize(
    ("name", "size", "x", "y"),
    [
        ("OS-1-detail.ome.tif", 1101, 0.2270972430394695, 0.22710240047237298),
        ("OS-2-ndpi.ome.tif", 2202, 0.2270972430394695, 0.22710240047237298),
        ("OS-2-vsi.ome.tif", 1445, 0.34605325860336383, 0.3460559834973875),
    ],
)
def test_ome_slides(slides, name, size, x, y):
    slide = open_slide(slides / name)
    assert slide.size_px == (size, size)
    assert (slide.mpp.x, slide.mpp.y) == (x, y)
    # Stained tissue on a bright field: blue is not the darkest channel, nothing is green.
    red, green, blue = slide.thumbnail(300)[0].reshape(-1, 3).mean(0)
    assert blue > green - 1
    assert min(red, green, blue) > 100


def test_two_scanners_show_the_same_field_at_the_same_mpp(slides):
    ndpi, vsi = (open_slide(slides / name) for name in ("OS-2-ndpi.ome.tif", "OS-2-vsi.ome.tif"))
    tiles = [s.read_tile((0, 0), s.plan(tile_px=400, mpp=1.0)).rgb.mean(2) for s in (ndpi, vsi)]
    a, b = (tile - tile.mean() for tile in tiles)
    # Phase correlation: the shift between the two fields, in pixels of 1 µm.
    spectrum = np.fft.fft2(a) * np.conj(np.fft.fft2(b))
    peak = np.fft.ifft2(spectrum / np.abs(spectrum)).real
    assert peak.max() > 10 * peak.std()


def test_every_real_slide_opens_and_reads(slides):
    found = find_slides(slides)
    assert [name for name, _ in found] == sorted(path.name for path in slides.iterdir())
    for _, path in found:
        with open_slide(path, mpp=0.5) as slide:
            assert max(slide.thumbnail(256)[0].shape) == 256
            tile = slide.read_tile((100, 100), slide.plan(tile_px=64, mpp=0.9))
            assert tile.valid_fraction == 1.0
