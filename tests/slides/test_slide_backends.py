"""One contract for every reader: the same pixels for the same region."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eosin.errors import GeometryError, SlideError
from eosin.slides import Slide, open_slide
from slidegen import TiffStyle, coordinates, decode_coordinates, pyramid_sizes, reduced, write_ome, write_tiff

Opener = Callable[..., Slide]
WIDTH, HEIGHT = 701, 467
PIXELS = coordinates(WIDTH, HEIGHT)


def _svs(path: Path) -> Opener:
    return partial(open_slide, write_tiff(path / "a.svs", PIXELS))


def _svs_pure(path: Path) -> Opener:
    return partial(open_slide, write_tiff(path / "a.svs", PIXELS), reader="openslide")


def _generic(path: Path) -> Opener:
    return partial(open_slide, write_tiff(path / "a.tif", PIXELS, TiffStyle(flavour="generic", compression="lzw")))


def _tiff(path: Path) -> Opener:
    return partial(open_slide, write_tiff(path / "a.tif", PIXELS, TiffStyle(flavour="generic")), reader="tiff")


def _sub_ifds(path: Path) -> Opener:
    return partial(
        open_slide, write_tiff(path / "a.tif", PIXELS, TiffStyle(flavour="generic", sub_ifds=True, ceil=True))
    )


def _jpeg2000(path: Path) -> Opener:
    return partial(open_slide, write_tiff(path / "a.tif", PIXELS, TiffStyle(flavour="generic", compression="jpeg2000")))


def _ome(path: Path) -> Opener:
    return partial(open_slide, write_ome(path / "a.ome.tif", PIXELS))


def _strips(path: Path) -> Opener:
    import tifffile

    with tifffile.TiffWriter(path / "a.tif") as tiff:
        for size in ((WIDTH, HEIGHT), *pyramid_sizes((WIDTH, HEIGHT), (2, 4))):
            tiff.write(reduced(PIXELS, size), photometric="rgb", rowsperstrip=37, compression="lzw", metadata=None)
    return partial(open_slide, path / "a.tif", mpp=0.25)


def _planar(path: Path) -> Opener:
    import tifffile

    planes = np.ascontiguousarray(np.moveaxis(PIXELS, 2, 0))
    tifffile.imwrite(
        path / "a.tif",
        planes,
        photometric="rgb",
        planarconfig="separate",
        tile=(128, 96),
        compression="zlib",
        metadata=None,
    )
    return partial(open_slide, path / "a.tif", mpp=0.25, reader="tiff")


def _png(path: Path) -> Opener:
    Image.fromarray(PIXELS).save(path / "a.png")
    return partial(open_slide, path / "a.png", mpp=0.25)


def _array(path: Path) -> Opener:
    return partial(open_slide, PIXELS, mpp=0.25)


def _dicom(path: Path) -> Opener:
    pytest.importorskip("wsidicom", reason="needs the extra 'dicom'")
    from dicomgen import write_dicom

    levels = [reduced(PIXELS, size) for size in ((WIDTH, HEIGHT), *pyramid_sizes((WIDTH, HEIGHT), (2, 4)))]
    return partial(open_slide, write_dicom(path / "series", levels, mpp=(0.25, 0.25)))


def _dicom_openslide(path: Path) -> Opener:
    return partial(_dicom(path), reader="openslide")


MAKERS = {
    "svs": (_svs, "openslide"),
    "svs-openslide-only": (_svs_pure, "openslide"),
    "generic": (_generic, "openslide"),
    "tiff": (_tiff, "tifffile"),
    "sub-ifds": (_sub_ifds, "tifffile"),
    "jpeg2000": (_jpeg2000, "tifffile"),
    "ome": (_ome, "tifffile"),
    "strips": (_strips, "tifffile"),
    "planar": (_planar, "tifffile"),
    "png": (_png, "pillow"),
    "array": (_array, "numpy"),
    "dicom": (_dicom, "wsidicom"),
    "dicom-openslide": (_dicom_openslide, "openslide"),
}


@pytest.fixture(params=MAKERS, scope="module")
def written(request, tmp_path_factory):
    make, reader = MAKERS[request.param]
    return make(tmp_path_factory.mktemp("slide")), reader


@pytest.fixture
def slide(written):
    opener, reader = written
    with opener() as opened:
        assert opened.reader.startswith(reader)
        yield opened


def test_every_pixel_is_where_it_says(slide):
    np.testing.assert_array_equal(slide.read((0, 0), (WIDTH, HEIGHT)), PIXELS)


@pytest.mark.parametrize("xy", [(0, 0), (255, 255), (256, 128), (613, 402), (127, 37)])
def test_a_region_is_the_same_wherever_it_starts(slide, xy):
    rgb = slide.read(xy, (64, 50))
    x, y = decode_coordinates(rgb)
    np.testing.assert_array_equal(x, np.broadcast_to(xy[0] + np.arange(64), (50, 64)))
    np.testing.assert_array_equal(y, np.broadcast_to(xy[1] + np.arange(50)[:, None], (50, 64)))


@pytest.mark.parametrize(
    ("xy", "size"), [((-20, -10), (60, 40)), ((WIDTH - 30, HEIGHT - 5), (50, 44)), ((-5, -5), (900, 600))]
)
def test_outside_the_slide_is_white(slide, xy, size):
    canvas = np.full((HEIGHT + 1000, WIDTH + 1000, 3), 255, dtype=np.uint8)
    canvas[500 : 500 + HEIGHT, 500 : 500 + WIDTH] = PIXELS
    top, left = 500 + xy[1], 500 + xy[0]
    np.testing.assert_array_equal(slide.read(xy, size), canvas[top : top + size[1], left : left + size[0]])


def test_far_outside_the_slide_is_white_and_not_valid(slide):
    assert (slide.read((5000, 5000), 32) == 255).all()
    tile = slide.read_tile((5000, 5000), slide.plan(tile_px=32, mpp=0.25))
    assert (tile.rgb == 255).all()
    assert tile.valid_fraction == 0


def test_levels(slide):
    assert slide.size_px == slide.level_sizes[0] == (WIDTH, HEIGHT)
    assert slide.level_downsamples[0] == (1.0, 1.0)
    for (width, height), (dx, dy) in zip(slide.level_sizes, slide.level_downsamples, strict=True):
        assert (width * dx, height * dy) == (pytest.approx(WIDTH), pytest.approx(HEIGHT))
    assert len(slide.level_scales) == len(slide.level_sizes)
    assert all(scales[0] == 1 for scales in slide.level_scales)
    assert slide.bounds == (0, 0, WIDTH, HEIGHT)


def test_each_level_gives_its_stored_pixels(slide):
    for level, size in enumerate(slide.level_sizes):
        got = slide.read((0, 0), size, level=level)
        # OpenSlide alone works from level-0 positions; from (0, 0) they meet the level's pixels.
        np.testing.assert_array_equal(got, reduced(PIXELS, size))
    with pytest.raises(GeometryError, match="levels 0 to"):
        slide.read((0, 0), 8, level=len(slide.level_sizes))


def test_lower_levels_are_not_interpolated(slide):
    if slide.reader.startswith("openslide") and "tifffile" not in slide.reader:
        pytest.skip("OpenSlide alone interpolates where a downsample is no whole number")
    for level, size in enumerate(slide.level_sizes):
        got = slide.backend.read_region((61, 43), level=level, scale=1, size_px=(50, 40))
        np.testing.assert_array_equal(got[..., :3], reduced(PIXELS, size)[43:83, 61:111])


def test_pixels_belong_to_the_caller(slide):
    for rgb in (
        slide.read((5, 5), 40),
        slide.read((5, 5), 40, mpp=0.4),
        slide.thumbnail(50)[0],
        slide.thumbnail(4096)[0],
    ):
        assert rgb.flags.writeable
        assert rgb.flags.c_contiguous
        rgb[:] = 7
    np.testing.assert_array_equal(slide.read((5, 5), 40), PIXELS[5:45, 5:45])


def test_thumbnail_shows_the_whole_slide(slide):
    rgb, (dx, dy) = slide.thumbnail(200)
    assert rgb.shape == (133, 200, 3)
    assert (dx, dy) == (WIDTH / 200, HEIGHT / 133)
    rgb, downsample = slide.thumbnail(4096)
    np.testing.assert_array_equal(rgb, PIXELS)
    assert downsample == (1.0, 1.0)


def test_a_pickled_slide_reads_the_same(slide):
    again = pickle.loads(pickle.dumps(slide))
    assert again.fingerprint == slide.fingerprint
    assert again.mpp == slide.mpp
    np.testing.assert_array_equal(again.read((100, 90), 50), PIXELS[90:140, 100:150])
    again.close()


def _read_in_child(slide, queue):
    queue.put(slide.read((100, 90), 50).tobytes())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_opens_its_own_handle(slide):
    slide.read((0, 0), 10)
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_read_in_child, args=(slide, queue))
    child.start()
    got = np.frombuffer(queue.get(timeout=30), dtype=np.uint8).reshape(50, 50, 3)
    child.join(30)
    assert child.exitcode == 0
    np.testing.assert_array_equal(got, PIXELS[90:140, 100:150])
    np.testing.assert_array_equal(slide.read((10, 9), 50), PIXELS[9:59, 10:60])


def test_threads_share_a_slide(slide):
    wrong = []

    def work(seed: int) -> None:
        for x, y in np.random.default_rng(seed).integers(0, 400, (20, 2)):
            if not np.array_equal(slide.read((int(x), int(y)), 40), PIXELS[y : y + 40, x : x + 40]):
                wrong.append((x, y))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_slide_says_so(slide):
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read((0, 0), 10)
    assert "closed" in repr(slide)


def test_empty_regions_and_double_targets_are_refused(slide):
    with pytest.raises(GeometryError, match="empty"):
        slide.read((0, 0), (0, 5))
    with pytest.raises(GeometryError, match="not both"):
        slide.read((0, 0), 5, mpp=0.5, level=0)


def test_unknown_associated_image_lists_the_known(slide):
    with pytest.raises(SlideError, match="no associated image 'nosuch'"):
        slide.associated_image("nosuch")
    for name in slide.associated:
        image = slide.associated_image(name)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
