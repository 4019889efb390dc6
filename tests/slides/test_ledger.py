from __future__ import annotations

import pytest

from eosin.errors import ImplausibleMppError, MissingMppError
from eosin.slides import MppLedger, open_slide
from eosin.slides.ledger import from_aperio, from_ome, from_openslide, from_tiff_resolution, microns
from slidegen import TiffStyle, coordinates, write_ome, write_tiff


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (250, "nm", 0.25),
        (0.25, "µm", 0.25),
        (0.25, "\u03bcm", 0.25),
        (0.25, "um", 0.25),
        (2500, "Å", 0.25),
        (2500, "\u212b", 0.25),
        (0.00025, "mm", 0.25),
        (0.000025, "cm", 0.25),
        (2.5e-7, "m", 0.25),
        (250_000, "pm", 0.25),
        (1, "in", 25_400),
    ],
)
def test_a_length_in_any_unit_becomes_microns(value, unit, expected):
    assert microns(value, unit) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unit", ["pixel", "reference frame", "", "parsec"])
def test_a_unit_that_is_no_length_is_refused(unit):
    assert microns(1.0, unit) is None
    ledger = from_ome({"PhysicalSizeX": "1", "PhysicalSizeXUnit": unit, "PhysicalSizeY": "1"}, None)
    assert ledger.x is None
    assert "refused" in ledger.source


@pytest.mark.parametrize(
    ("resolution", "unit", "x", "source"),
    [
        (40_000.0, 3, 0.25, "tiff.XResolution"),
        (25_400 / 0.25, 2, 0.25, "tiff.XResolution"),
        (72.0, 2, None, "tiff.XResolution refused: 352.8 µm"),
        (96.0, 2, None, "tiff.XResolution refused: 264.6 µm"),
        (300.0, 2, None, "tiff.XResolution refused: 84.67 µm"),
        (40_000.0, 1, None, "tiff.XResolution refused: no absolute unit"),
        (None, 2, None, "missing"),
    ],
)
def test_tiff_resolution_counts_only_when_plausible(resolution, unit, x, source):
    ledger = from_tiff_resolution(resolution, resolution, unit)
    assert ledger.source == source
    assert ledger.x == (None if x is None else pytest.approx(x))


@pytest.mark.parametrize(
    ("mpp", "power", "conflict"),
    [(0.25, 40, False), (0.2201, 40, False), (0.234, 20, True), (0.5, 20, False), (0.58, 20, True), (0.43, 20, False)],
)
def test_power_and_mpp_conflict_beyond_15_percent(mpp, power, conflict):
    assert (MppLedger.build(mpp, mpp, "s", power).conflict is not None) == conflict


def test_power_never_becomes_mpp():
    ledger = from_openslide({"openslide.objective-power": "20"})
    assert (ledger.x, ledger.y, ledger.objective_power) == (None, None, 20.0)


def test_axes_that_differ_by_more_than_one_percent_are_a_conflict():
    assert MppLedger.build(0.25, 0.252, "s").conflict is None
    assert "x and y differ" in (MppLedger.build(0.25, 0.26, "s").conflict or "")


def test_aperio_description_with_comma_or_without_mpp():
    assert from_aperio("Aperio x|AppMag = 20|MPP = 0,4990").x == pytest.approx(0.499)
    assert from_aperio("Aperio x|AppMag = 20|MPP = 0,4990").objective_power == 20
    assert from_aperio("Aperio x|AppMag = 20").x is None


@pytest.mark.parametrize(
    ("style", "name", "x", "source", "power"),
    [
        (TiffStyle(mpp=0.2527, power=40), "a.svs", 0.2527, "openslide.mpp-x", 40),
        (TiffStyle(flavour="generic", mpp=0.25), "a.tif", 0.25, "tiff.XResolution", None),
        (TiffStyle(flavour="generic", mpp=25_400 / 72), "a.tif", None, "tiff.XResolution refused: 352.8 µm", None),
        (TiffStyle(mpp=None, power=20), "a.svs", None, "missing", 20),
    ],
)
@pytest.mark.parametrize("reader", [None, "tiff"])
def test_files_say_their_mpp_through_either_reader(tmp_path, style, name, x, source, power, reader):
    path = write_tiff(tmp_path / name, coordinates(300, 200), style)
    ledger = open_slide(path, reader=reader).mpp_ledger
    assert ledger.x == (None if x is None else pytest.approx(x, rel=1e-5))
    assert ledger.objective_power == power
    assert ledger.source in (source, "aperio.MPP")


def test_anisotropic_mpp_is_kept_per_axis(tmp_path):
    path = write_tiff(tmp_path / "a.tif", coordinates(300, 200), TiffStyle(flavour="generic", mpp=(0.25, 0.5)))
    slide = open_slide(path)
    assert (slide.mpp.x, slide.mpp.y) == (pytest.approx(0.25, rel=1e-5), pytest.approx(0.5, rel=1e-5))
    assert "x and y differ" in (slide.mpp_ledger.conflict or "")
    plan = slide.plan(tile_px=100, mpp=0.5)
    assert plan.size0_px == (pytest.approx(200, rel=1e-5), pytest.approx(100, rel=1e-5))


@pytest.mark.parametrize(
    ("size", "unit"), [((250, 300), "nm"), ((0.25, 0.3), "µm"), ((2.5e-4, 3e-4), "mm"), ((2500, 3000), "Å")]
)
def test_ome_units(tmp_path, size, unit):
    slide = open_slide(write_ome(tmp_path / "a.ome.tif", coordinates(300, 260), size=size, unit=unit))
    assert (slide.mpp.x, slide.mpp.y) == (pytest.approx(0.25), pytest.approx(0.3))
    assert slide.mpp_ledger.source == f"OME PhysicalSizeX ({unit})"


def test_a_given_mpp_wins_and_the_file_is_still_heard(tmp_path):
    path = write_tiff(tmp_path / "a.svs", coordinates(300, 200), TiffStyle(mpp=0.25, power=40))
    ledger = open_slide(path, mpp=(0.5, 0.51)).mpp_ledger
    assert (ledger.x, ledger.y, ledger.source) == (0.5, 0.51, "user")
    assert ledger.file_says == "0.25 x 0.25 (openslide.mpp-x)"
    assert "objective power 40" in (ledger.conflict or "")
    assert open_slide(path, mpp=0.5).mpp_ledger.to_dict()["source"] == "user"


def test_a_given_mpp_must_be_plausible(tmp_path):
    path = write_tiff(tmp_path / "a.svs", coordinates(300, 200))
    with pytest.raises(ImplausibleMppError, match="given for the slide"):
        open_slide(path, mpp=25.0)


def test_missing_mpp_raises_where_it_is_used_and_not_at_opening(tmp_path):
    slide = open_slide(write_tiff(tmp_path / "a.svs", coordinates(300, 200), TiffStyle(mpp=None)))
    assert slide.size_px == (300, 200)
    for use in (lambda: slide.mpp, lambda: slide.plan(tile_px=10, mpp=0.5), lambda: slide.read((0, 0), 10, mpp=0.5)):
        with pytest.raises(MissingMppError, match=r"a\.svs.*--slide-mpp.*'mpp'"):
            use()


def test_implausible_mpp_raises_where_it_is_used(tmp_path):
    slide = open_slide(write_tiff(tmp_path / "a.svs", coordinates(300, 200), TiffStyle(mpp=25.0)))
    assert slide.mpp_ledger.x == 25.0
    with pytest.raises(ImplausibleMppError, match="25 microns"):
        _ = slide.mpp
