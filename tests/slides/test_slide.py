"""Tiles at any mpp: where their pixels come from, what lies under transparency, how much is slide."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from eosin.errors import CorruptSlideError, RegionError
from eosin.geometry import covered_fraction
from eosin.slides import open_slide
from eosin.slides import slide as slide_module
from slidegen import TiffStyle, coordinates, histology, pyramid_sizes, ramp, reduced, write_tiff

WIDTH, HEIGHT = 2001, 1503


@pytest.fixture(scope="module")
def ramp_slide(tmp_path_factory):
    """2001 x 1503 at 0.25 mpp; levels 1001 x 752 and 501 x 376, rounded up: 1.999x, not 2x."""
    levels = [ramp(*size) for size in pyramid_sizes((WIDTH, HEIGHT), (2, 4), ceil=True)]
    path = tmp_path_factory.mktemp("ramp") / "ramp.svs"
    write_tiff(path, ramp(WIDTH, HEIGHT), TiffStyle(mpp=0.25), levels)
    with open_slide(path) as slide:
        assert slide.level_sizes[1:] == ((1001, 752), (501, 376))
        yield slide


def centre_of(rgb):
    """Return the level-0 (x, y) that the mean colour of a ramp picture stands for."""
    return rgb[..., 0].mean() * WIDTH / 255, rgb[..., 1].mean() * HEIGHT / 255


@pytest.mark.parametrize("mpp", [0.25, 0.2527, 0.31, 0.4, 0.465, 0.5, 0.5004, 0.61, 0.88, 1.0, 1.37])
@pytest.mark.parametrize("xy", [(0, 0), (137, 201), (700, 640)])
def test_a_tile_at_any_mpp_shows_exactly_its_footprint(ramp_slide, mpp, xy):
    plan = ramp_slide.plan(tile_px=128, mpp=mpp)
    tile = ramp_slide.read_tile(xy, plan)
    assert tile.rgb.shape == (128, 128, 3)
    assert tile.valid_fraction == 1.0
    x, y = centre_of(tile.rgb)
    side = 128 * mpp / 0.25
    # Without a resize a tile starts on the nearest whole pixel of its level: half a pixel at most.
    tolerance = 0.5 if plan.resample else 0.5 * max(plan.downsample) + 0.3
    assert x == pytest.approx(xy[0] + side / 2, abs=tolerance)
    assert y == pytest.approx(xy[1] + side / 2, abs=tolerance)
    # First and last column: the extent is right too, not only the centre.
    first, last = (tile.rgb[:, i, 0].mean() * WIDTH / 255 for i in (0, -1))
    assert last - first == pytest.approx(side * 127 / 128, abs=max(1.0, plan.downsample[0]))


def test_a_pyramid_rounded_up_is_read_at_its_true_downsample(ramp_slide):
    plan = ramp_slide.plan(tile_px=256, mpp=0.5)
    assert plan.level == 1
    assert plan.downsample == (2001 / 1001, 1503 / 752)
    # Taken as 1x, half the footprint would be read: its centre would be 128 pixels off.
    x, y = centre_of(ramp_slide.read_tile((1400, 900), plan).rgb)
    assert (x, y) == (pytest.approx(1400 + 256, abs=1.3), pytest.approx(900 + 256, abs=1.3))


def test_without_resampling_pixels_are_the_stored_ones(tmp_path):
    pixels = coordinates(600, 500)
    slide = open_slide(write_tiff(tmp_path / "a.svs", pixels))
    plan = slide.plan(tile_px=200, mpp=0.25)
    assert not plan.resample
    np.testing.assert_array_equal(slide.read_tile((33, 77), plan).rgb, pixels[77:277, 33:233])


def test_resampling_is_one_antialiased_resize(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    slide = open_slide(noise, mpp=0.25)
    plan = slide.plan(tile_px=100, mpp=0.7)
    got = slide.read_tile((40, 60), plan).rgb
    region = noise[60 : 60 + 280, 40 : 40 + 280]
    np.testing.assert_array_equal(
        got, np.asarray(Image.fromarray(region).resize((100, 100), Image.Resampling.BILINEAR))
    )
    # White noise of variance v averaged over a triangle of half-width s keeps v * (2 / (3 s))^2.
    expected = 255 / 12**0.5 * 2 / (3 * 2.8)
    assert got.std() == pytest.approx(expected, rel=0.1)


def test_reading_a_rectangle_at_an_mpp_agrees_with_a_tile(ramp_slide):
    tile = ramp_slide.read_tile((301, 203), ramp_slide.plan(tile_px=160, mpp=0.6)).rgb
    np.testing.assert_array_equal(ramp_slide.read((301, 203), 160, mpp=0.6), tile)
    wide = ramp_slide.read((301, 203), (160, 90), mpp=0.6)
    assert wide.shape == (90, 160, 3)
    np.testing.assert_allclose(wide[:88].astype(int), tile[:88], atol=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    x=st.integers(-400, WIDTH + 100),
    y=st.integers(-400, HEIGHT + 100),
    mpp=st.floats(0.25, 1.4),
    tile_px=st.integers(1, 200),
)
def test_valid_fraction_is_the_share_inside_the_slide(ramp_slide, x, y, mpp, tile_px):
    plan = ramp_slide.plan(tile_px=tile_px, mpp=mpp)
    tile = ramp_slide.read_tile((x, y), plan)
    side = tile_px * mpp / 0.25
    inside_x = max(0.0, min(x + side, WIDTH) - max(x, 0))
    inside_y = max(0.0, min(y + side, HEIGHT) - max(y, 0))
    assert tile.rgb.shape == (tile_px, tile_px, 3)
    assert tile.valid_fraction == pytest.approx(inside_x * inside_y / side**2, abs=1e-5)


def test_a_last_tile_gets_no_white_seam(tmp_path):
    dark = np.full((901, 901, 3), 40, dtype=np.uint8)
    slide = open_slide(write_tiff(tmp_path / "a.svs", dark, TiffStyle(mpp=0.2527, factors=(2,))))
    for mpp in (0.2527, 0.5, 0.5054, 0.8):
        plan = slide.plan(tile_px=100, mpp=mpp)
        at = int(901 - plan.size0_px[0] + 0.25)
        assert slide.read_tile((at, at), plan).rgb.max() == 40


def transparent_picture():
    """Return RGBA 400 x 300: dark, its right half transparent, a strip of alpha 128 between."""
    rgba = np.full((300, 400, 4), (60, 20, 100, 255), dtype=np.uint8)
    rgba[:, 200:, 3] = 0
    rgba[:, 180:200, 3] = 128
    return rgba


def test_transparent_pixels_lie_on_white_and_are_not_valid(tmp_path):
    Image.fromarray(transparent_picture()).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png", mpp=0.5)
    rgb = slide.read((0, 0), (400, 300))
    assert (rgb[:, :180] == (60, 20, 100)).all()
    assert (rgb[:, 200:] == 255).all()
    expected = np.rint(np.array([60, 20, 100]) * 128 / 255 + 255 * 127 / 255)
    assert (rgb[:, 180:200] == expected).all()
    plan = slide.plan(tile_px=200, mpp=0.5)
    assert slide.read_tile((100, 0), plan).valid_fraction == pytest.approx((80 + 20 * 128 / 255) / 200, abs=1e-3)
    assert slide.read_tile((200, 0), plan).valid_fraction == 0
    shrunk = slide.read_tile((0, 0), slide.plan(tile_px=100, mpp=1.0)).rgb
    assert (shrunk[:, 95:] >= 250).mean() < 1
    assert shrunk.min() >= 20


@pytest.mark.parametrize("associated", [False, True])
def test_alpha_of_a_tiff_is_understood_straight_and_premultiplied(tmp_path, associated):
    import tifffile

    rgba = transparent_picture()
    stored = rgba.copy()
    if associated:
        stored[..., :3] = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255.0))
    kind = "assocalpha" if associated else "unassalpha"
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored,
        photometric="rgb",
        extrasamples=[kind],
        tile=(64, 64),
        compression="zlib",
        metadata=None,
    )
    slide = open_slide(tmp_path / "a.tif", mpp=0.5, reader="tiff")
    rgb = slide.read((0, 0), (400, 300)).astype(int)
    np.testing.assert_allclose(rgb[:, :180], np.broadcast_to((60, 20, 100), (300, 180, 3)), atol=1)
    assert (rgb[:, 200:] == 255).all()
    np.testing.assert_allclose(rgb[0, 190], np.array([60, 20, 100]) * 128 / 255 + 127, atol=2)


def test_a_hole_in_a_tiff_is_transparent(tmp_path):
    import tifffile

    pixels = coordinates(512, 256)
    tiles = [pixels[y : y + 128, x : x + 128] for y in (0, 128) for x in range(0, 512, 128)]
    streams = (None if i == 2 else tile for i, tile in enumerate(tiles))
    tifffile.imwrite(
        tmp_path / "a.tif",
        streams,
        shape=pixels.shape,
        dtype="uint8",
        photometric="rgb",
        tile=(128, 128),
        metadata=None,
    )
    for reader in (None, "tiff"):
        slide = open_slide(tmp_path / "a.tif", mpp=0.5, reader=reader)
        rgb = slide.read((0, 0), (512, 256))
        expected = pixels.copy()
        expected[:128, 256:384] = 255
        np.testing.assert_array_equal(rgb, expected)
        assert slide.read_tile((256, 0), slide.plan(tile_px=256, mpp=0.5)).valid_fraction == pytest.approx(0.75)


def test_bounds_limit_the_valid_fraction(ramp_slide, monkeypatch):
    monkeypatch.setattr(ramp_slide.backend, "bounds", (100, 50, 1000, 800))
    plan = ramp_slide.plan(tile_px=200, mpp=0.5)
    got = ramp_slide.read_tile((0, 0), plan).valid_fraction
    assert got == pytest.approx(float(covered_fraction(np.array([[0, 0]]), (400, 400), (100, 50, 1000, 800))[0]))
    assert got == pytest.approx(300 * 350 / 400**2)


def test_a_thumbnail_in_blocks_equals_one_in_one_piece(tmp_path, monkeypatch):
    pixels, _ = histology(1501, 1103, seed=3, mpp=1.0)
    slide = open_slide(write_tiff(tmp_path / "a.svs", pixels, TiffStyle(factors=())))
    whole, downsample = slide.thumbnail(300)
    largest = []
    read = slide.backend.read_region
    monkeypatch.setattr(slide_module, "MAX_READ_PIXELS", 10_000)
    monkeypatch.setattr(slide_module, "BLOCK_PIXELS", 90_000)

    def counting(xy_px, *, level, scale, size_px):
        largest.append(size_px[0] * size_px[1])
        return read(xy_px, level=level, scale=scale, size_px=size_px)

    monkeypatch.setattr(slide.backend, "read_region", counting)
    blocks, again = slide.thumbnail(300)
    assert again == downsample
    assert len(largest) > 10
    assert max(largest) <= 90_000
    assert np.abs(whole.astype(int) - blocks).max() <= 1


def test_a_thumbnail_comes_from_the_coarsest_level_that_suffices(ramp_slide, monkeypatch):
    used = []
    read = ramp_slide.backend.read_region

    def noting(xy_px, *, level, scale, size_px):
        used.append(level)
        return read(xy_px, level=level, scale=scale, size_px=size_px)

    monkeypatch.setattr(ramp_slide.backend, "read_region", noting)
    for max_px, level in ((2001, 0), (1002, 0), (1000, 1), (501, 2), (60, 2)):
        rgb, (dx, dy) = ramp_slide.thumbnail(max_px)
        assert used.pop() == level
        assert max(rgb.shape[:2]) == max_px
        assert (dx, dy) == (WIDTH / rgb.shape[1], HEIGHT / rgb.shape[0])


def test_thumbnail_colours_are_box_means(tmp_path):
    pixels, mask = histology(1200, 900, seed=1, mpp=1.0)
    slide = open_slide(write_tiff(tmp_path / "a.svs", pixels, TiffStyle(compression="jpeg", quality=95)))
    thumbnail = slide.thumbnail(150)[0]
    assert np.abs(thumbnail.astype(int) - reduced(pixels, (150, 113))).mean() < 4
    assert thumbnail.mean((0, 1)) == pytest.approx(pixels.mean((0, 1)), abs=1)
    assert 0.1 < mask.mean() < 0.6


def test_codec_reductions_give_the_same_tile_within_noise(tmp_path):
    pixels, _ = histology(1024, 1024, seed=5, blobs=-1)
    path = write_tiff(tmp_path / "a.svs", pixels, TiffStyle(compression="jpeg", factors=(), mpp=0.25))
    fast, plain = open_slide(path), open_slide(path, reader="openslide")
    assert fast.level_scales == ((1, 2, 4, 8),)
    assert plain.level_scales == ((1,),)
    np.testing.assert_array_equal(fast.read((13, 17), 300), plain.read((13, 17), 300))
    plans = [slide.plan(tile_px=224, mpp=0.5) for slide in (fast, plain)]
    assert [plan.scale for plan in plans] == [2, 1]
    tiles = [slide.read_tile((64, 128), plan).rgb.astype(int) for slide, plan in zip((fast, plain), plans, strict=True)]
    assert np.abs(tiles[0] - tiles[1]).mean() < 4


def test_fingerprint_follows_content_and_not_name(tmp_path):
    path = write_tiff(tmp_path / "a.svs", coordinates(300, 200))
    data = path.read_bytes()
    (tmp_path / "b.svs").write_bytes(data)
    (tmp_path / "c.svs").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    prints = [open_slide(tmp_path / name).fingerprint for name in ("a.svs", "b.svs")]
    assert prints[0] == prints[1]
    assert len(prints[0]) == 64
    from eosin.slides.fingerprint import fingerprint_path

    assert fingerprint_path(tmp_path / "c.svs") != prints[0]


def test_fingerprint_hears_companions(tmp_path):
    from eosin.slides.fingerprint import fingerprint_path

    (tmp_path / "m.mrxs").write_bytes(b"index")
    alone = fingerprint_path(tmp_path / "m.mrxs")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/Data0000.dat").write_bytes(b"0123")
    first = fingerprint_path(tmp_path / "m.mrxs")
    (tmp_path / "m/Data0000.dat").write_bytes(b"0124")
    assert len({alone, first, fingerprint_path(tmp_path / "m.mrxs")}) == 3


def test_icc_none_is_recorded_and_changes_nothing(tmp_path):
    path = write_tiff(tmp_path / "a.svs", coordinates(300, 200))
    slide = open_slide(path, icc=True)
    assert slide.options["icc"] == "no profile"
    np.testing.assert_array_equal(slide.read((0, 0), 100), open_slide(path).read((0, 0), 100))
    assert open_slide(path).options["icc"] == "off"


def test_icc_profile_is_applied_as_imagecms_does(tmp_path):
    pixels, _ = histology(300, 200, blobs=-1)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Exchange the red and green primaries of sRGB: a profile with a known, strong effect.
    swapped = profile.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    path = write_tiff(tmp_path / "a.svs", pixels, TiffStyle(icc=swapped))
    slide = open_slide(path, icc=True)
    assert slide.options["icc"] == "applied"
    got = slide.read((0, 0), (300, 200))
    expected = ImageCms.profileToProfile(
        Image.fromarray(pixels), ImageCms.ImageCmsProfile(io.BytesIO(swapped)), ImageCms.createProfile("sRGB")
    )
    np.testing.assert_array_equal(got, np.asarray(expected))
    np.testing.assert_allclose(got[..., [1, 0, 2]].astype(int), pixels, atol=3)
    np.testing.assert_array_equal(open_slide(path).read((0, 0), (300, 200)), pixels)


def test_a_broken_icc_profile_names_the_way_out(tmp_path):
    path = write_tiff(tmp_path / "a.tif", coordinates(300, 200), TiffStyle(flavour="generic", icc=b"no profile" * 20))
    assert open_slide(path, reader="tiff").size_px == (300, 200)
    with pytest.raises(CorruptSlideError, match="icc=False"):
        open_slide(path, reader="tiff", icc=True)


@pytest.mark.parametrize("reader", [None, "openslide", "tiff"])
def test_a_damaged_tile_raises_and_its_neighbours_still_read(tmp_path, reader):
    import tifffile

    pixels = histology(512, 512, blobs=-1)[0]
    path = write_tiff(tmp_path / "a.svs", pixels, TiffStyle(compression="jpeg", factors=(), tile=128))
    sound = open_slide(path, reader=reader).read((128, 0), 128)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    slide = open_slide(path, reader=reader)
    for _ in range(2):
        with pytest.raises(RegionError, match="cannot be decoded"):
            slide.read((0, 0), 128)
        np.testing.assert_array_equal(slide.read((128, 0), 128), sound)
