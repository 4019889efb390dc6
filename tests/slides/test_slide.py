"""Tiles at any mpp: where their pixels come from, what lies under transparency, how much is slide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

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
    # Between two pixels of a level the mean of two 8-bit values is rounded, a quarter of a grey level at most.
    tolerance = 0.5 if plan.resample else 0.25 * WIDTH / 255
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


def box_means(pixels, scale):
    """Return means over scale x scale boxes, halves rounded up; sides must be multiples of `scale`."""
    height, width = pixels.shape[0] // scale, pixels.shape[1] // scale
    boxes = pixels.reshape(height, scale, width, scale, 3).mean(axis=(1, 3))
    return np.floor(boxes + 0.5).astype(np.uint8)


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_reduction_is_box_means_then_one_antialiased_resize():
    pixels = noise(600, 600)
    slide = open_slide(pixels, mpp=0.25)
    plan = slide.plan(tile_px=100, mpp=0.7)
    assert (plan.scale, plan.resample) == (2, True)
    got = slide.read_tile((40, 60), plan).rgb
    half = box_means(pixels, 2)[30 : 30 + 140, 20 : 20 + 140]
    expected = np.asarray(Image.fromarray(half).resize((100, 100), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(got, expected)
    # White noise of variance v averaged over 2 x 2, then over a triangle of half-width s, keeps v * (1/2 * 2/(3 s))^2.
    assert got.std() == pytest.approx(255 / 12**0.5 / 2 * 2 / (3 * 1.4), rel=0.1)


@pytest.mark.parametrize(("mpp", "scale"), [(0.5, 2), (1.0, 4), (2.0, 8)])
def test_a_whole_reduction_is_exactly_box_means(mpp, scale):
    pixels = noise(832, 640)
    slide = open_slide(pixels, mpp=0.25)
    plan = slide.plan(tile_px=40, mpp=mpp)
    assert (plan.scale, plan.resample) == (scale, False)
    reduced_by = box_means(pixels, scale)
    for column, row in ((0, 0), (7, 3), (20, 11)):
        got = slide.read_tile((column * scale, row * scale), plan).rgb
        np.testing.assert_array_equal(got, reduced_by[row : row + 40, column : column + 40])


def test_a_tile_between_two_pixels_is_interpolated_between_them():
    pixels = noise(600, 500)
    slide = open_slide(pixels, mpp=0.25)
    plan = slide.plan(tile_px=64, mpp=0.5)
    half = box_means(pixels, 2).astype(float)
    got = slide.read_tile((41, 20), plan).rgb
    # x = 20.5 pixels of the half: the mean of the tiles at 20 and 21.
    between = (half[10:74, 20:84] + half[10:74, 21:85]) / 2
    # Pillow's resize sees nothing outside its box, so the first and last columns lack half a neighbour.
    assert np.abs(got[:, 1:-1] - between[:, 1:-1]).max() <= 1


def test_the_last_box_of_an_odd_slide_is_of_what_is_there():
    pixels = noise(403, 305)
    slide = open_slide(pixels, mpp=0.25)
    rgb = slide.read((0, 0), (202, 153), mpp=0.5)
    np.testing.assert_array_equal(rgb[:152, :201], box_means(pixels[:304, :402], 2))
    column = np.floor(pixels[:304, 402].reshape(152, 2, 3).mean(1) + 0.5)
    np.testing.assert_array_equal(rgb[:152, 201], column)
    np.testing.assert_array_equal(rgb[152, 201], pixels[304, 402])


def test_reduction_of_transparency_bleeds_no_colour():
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[:, :33] = (200, 0, 0, 255)
    slide = open_slide(rgba, mpp=0.25)
    rgb = slide.read((0, 0), 32, mpp=0.5)
    assert (rgb[:, :16] == (200, 0, 0)).all()
    assert (rgb[:, 17:] == 255).all()
    # Half red, half of whatever colour lay under alpha 0: that is half red on white.
    np.testing.assert_allclose(rgb[5, 16], (228, 128, 128), atol=1)
    tile = slide.read_tile((0, 0), slide.plan(tile_px=32, mpp=0.5))
    assert tile.valid_fraction == pytest.approx(33 / 64, abs=1e-3)


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


@pytest.mark.parametrize("mpp", [0.5, 0.61, 1.0, 1.7])
def test_the_filter_does_not_depend_on_the_codec(tmp_path, mpp):
    """The same file through the decoder's reductions and without: the plan, and the pixels within its rounding."""
    pixels, _ = histology(1024, 1024, seed=5, blobs=-1)
    path = write_tiff(tmp_path / "a.svs", pixels, TiffStyle(compression="jpeg", factors=(), mpp=0.25))
    fast, plain = open_slide(path), open_slide(path, reader="openslide")
    assert fast.level_scales == ((1, 2, 4, 8),)
    assert plain.level_scales == ((1,),)
    np.testing.assert_array_equal(fast.read((13, 17), 300), plain.read((13, 17), 300))
    plans = [slide.plan(tile_px=112, mpp=mpp) for slide in (fast, plain)]
    assert plans[0] == plans[1]
    for xy in ((64, 128), (31, 77)):
        tiles = [slide.read_tile(xy, plans[0]).rgb.astype(int) for slide in (fast, plain)]
        assert np.abs(tiles[0] - tiles[1]).mean() < 1.5
        # A sharper or wider filter differs by more than the decoder does.
        other = np.asarray(
            Image.fromarray(plain.read(xy, round(112 * mpp / 0.25))).resize((112, 112), Image.Resampling.BILINEAR)
        )
        assert np.abs(tiles[0] - tiles[1]).mean() < np.abs(tiles[1] - other).mean()
    thumbnails = [slide.thumbnail(100)[0].astype(int) for slide in (fast, plain)]
    assert np.abs(thumbnails[0] - thumbnails[1]).mean() < 1
