from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from PIL import Image

from eosin.errors import GeometryError, RegionError
from eosin.slides import jpegtiles
from eosin.slides.jpegtiles import JpegTiles

WIDTH, HEIGHT = 700, 530
Padding = Literal["edge", "constant"]
TABLES = (0xDB, 0xC4)  # DQT, DHT
ADOBE, JFIF = 0xEE, 0xE0


def texture(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """Smooth colour noise with detail down to about 6 px."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()


def split(stream: bytes, codes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Return (the stream without the segments of these codes, those segments)."""
    kept, taken, at = b"\xff\xd8", b"", 2
    while stream[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] in codes:
            taken += stream[at:end]
        else:
            kept += stream[at:end]
        at = end
    return kept + stream[at:], taken


def encoded(
    image: np.ndarray, tile_px: tuple[int, int], sampling: str | None, padding: Padding = "edge"
) -> list[bytes]:
    """JPEG streams of the tiles, row-major; `sampling` None keeps RGB samples and adds no marker."""
    width, height = tile_px
    rows, columns = -(-image.shape[0] // height), -(-image.shape[1] // width)
    after = ((0, rows * height - image.shape[0]), (0, columns * width - image.shape[1]), (0, 0))
    padded = np.pad(image, after, mode=padding)
    streams = []
    for top in range(0, padded.shape[0], height):
        for left in range(0, padded.shape[1], width):
            tile = np.ascontiguousarray(padded[top : top + height, left : left + width])
            if sampling is None:
                raw = imagecodecs.jpeg8_encode(tile, 90, colorspace="RGB", outcolorspace="RGB", subsampling="444")
                streams.append(split(bytes(raw), (ADOBE, JFIF))[0])
            else:
                streams.append(split(simplejpeg.encode_jpeg(tile, 90, colorsubsampling=sampling), (JFIF,))[0])
    return streams


def write_level(
    writer: tifffile.TiffWriter,
    size: tuple[int, int],
    tile_px: tuple[int, int],
    streams: list[bytes],
    *,
    shared: bool = False,
    **options,
) -> None:
    """Write streams as one page; `shared` moves their tables into the JPEGTables tag."""
    if shared:
        options["jpegtables"] = b"\xff\xd8" + split(streams[0], TABLES)[1] + b"\xff\xd9"
        streams = [split(stream, TABLES)[0] for stream in streams]
    writer.write(
        iter(streams),
        shape=(size[1], size[0], 3),
        dtype=np.uint8,
        tile=tile_px[::-1],
        compression="jpeg",
        metadata=None,
        **options,
    )


def write(path: Path, image: np.ndarray, tile_px=(256, 256), sampling: str | None = "420", shared=False, **kw) -> Path:
    streams = encoded(image, tile_px, sampling, kw.pop("padding", "edge"))
    colour = {"photometric": "ycbcr", "subsampling": (2, 2) if sampling == "420" else (1, 1)}
    if sampling is None:
        colour = {"photometric": "rgb", "compressionargs": {"outcolorspace": "rgb"}}
    with tifffile.TiffWriter(path) as writer:
        write_level(writer, image.shape[1::-1], tile_px, streams, shared=shared, **colour, **kw)
    return path


def opened(path: Path, *sizes: tuple[int, int]) -> JpegTiles:
    reader = JpegTiles.open(path, sizes or [(WIDTH, HEIGHT)])
    assert reader is not None
    return reader


def whole(reader: JpegTiles, level: int = 0, scale: int = 1, size=(WIDTH, HEIGHT)) -> np.ndarray:
    return reader.read_region((0, 0), level=level, scale=scale, size_px=(-(-size[0] // scale), -(-size[1] // scale)))


def by_openslide(path: Path) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]


def psnr(image: np.ndarray, full: np.ndarray, scale: int) -> float:
    """PSNR in dB of `image` against box means of `full`, over the boxes that are complete."""
    rows, columns = full.shape[0] // scale, full.shape[1] // scale
    boxes = full[: rows * scale, : columns * scale].reshape(rows, scale, columns, scale, 3).mean(axis=(1, 3))
    return float(10 * np.log10(255**2 / np.mean((image[:rows, :columns] - boxes) ** 2)))


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("jpegtiles") / "slide.tif", texture())


@pytest.fixture
def decodes(monkeypatch) -> Counter:
    """Counts the decodes of each distinct stream."""
    counts: Counter = Counter()
    decode = simplejpeg.decode_jpeg
    lock = threading.Lock()

    def counting(data, **options):
        with lock:
            counts[data] += 1
        return decode(data, **options)

    monkeypatch.setattr(jpegtiles.simplejpeg, "decode_jpeg", counting)
    return counts


@pytest.mark.parametrize("tile_px", [(256, 256), (240, 240), (128, 64)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sampling", ["420", "444", None])
def test_full_decode_equals_openslide(tmp_path, sampling, shared, tile_px):
    path = write(tmp_path / "slide.tif", texture(), tile_px, sampling, shared)
    expected = by_openslide(path)
    assert np.abs(expected.astype(int) - texture()).mean() < 6  # the file's colours are right
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].aspage().photometric == (2 if sampling is None else 6)
        assert (tiff.pages[0].aspage().jpegtables is not None) == shared
    np.testing.assert_array_equal(whole(opened(path)), expected)


def test_photometric_tag_wins_over_adobe_marker_as_in_openslide(tmp_path):
    tile = texture(256, 256)
    stream = bytes(imagecodecs.jpeg8_encode(tile, 90, colorspace="RGB", outcolorspace="RGB", subsampling="444"))
    assert split(stream, (ADOBE,))[1][-1] == 0  # the stream says: no colour transform
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        write_level(writer, (256, 256), (256, 256), [stream], photometric="ycbcr", subsampling=(1, 1))
    reader = opened(tmp_path / "slide.tif", (256, 256))
    np.testing.assert_array_equal(whole(reader, size=(256, 256)), by_openslide(tmp_path / "slide.tif"))


def test_jfif_tile_is_ycbcr_even_under_an_rgb_tag(tmp_path):
    tile = texture(256, 256)
    stream = simplejpeg.encode_jpeg(tile, 90, colorsubsampling="420")
    assert split(stream, (JFIF,))[1]
    rgb_tag = {"photometric": "rgb", "compressionargs": {"outcolorspace": "rgb"}}
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        write_level(writer, (256, 256), (256, 256), [stream], **rgb_tag)
    reader = opened(tmp_path / "slide.tif", (256, 256))
    np.testing.assert_array_equal(whole(reader, size=(256, 256)), simplejpeg.decode_jpeg(stream))


@pytest.mark.real
def test_real_svs_equals_openslide(real_data):
    path = real_data / "slides" / "CMU-1-Small-Region.svs"
    expected = by_openslide(path)
    reader = opened(path, expected.shape[1::-1])
    full = whole(reader, size=expected.shape[1::-1])
    np.testing.assert_array_equal(full, expected)
    for scale, floor in ((2, 50), (4, 50), (8, 50)):
        assert psnr(whole(reader, scale=scale, size=expected.shape[1::-1]), full, scale) > floor


@pytest.mark.real
@pytest.mark.parametrize("name", ["OS-1-detail.ome.tif", "OS-2-ndpi.ome.tif", "OS-2-vsi.ome.tif"])
def test_real_ome_tiff_equals_tifffile(real_data, name):
    path = real_data / "slides" / name
    with tifffile.TiffFile(path) as tiff:
        expected = tiff.pages[0].asarray()
    np.testing.assert_array_equal(whole(opened(path, expected.shape[1::-1]), size=expected.shape[1::-1]), expected)


@pytest.mark.parametrize("sampling", ["420", "444"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_reduced_decode_is_close_to_box_means(tmp_path, scale, sampling):
    reader = opened(write(tmp_path / "slide.tif", texture(), sampling=sampling))
    assert reader.scales(0) == (1, 2, 4, 8)
    reduced = whole(reader, scale=scale)
    assert reduced.shape == (-(-HEIGHT // scale), -(-WIDTH // scale), 3)
    assert psnr(reduced, whole(reader), scale) > 35


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_padding_never_leaks_into_the_last_pixels(tmp_path, scale):
    image = np.full((262, 301, 3), (200, 120, 160), dtype=np.uint8)
    reader = opened(write(tmp_path / "slide.tif", image, sampling="444", padding="constant"), (301, 262))
    reduced = whole(reader, scale=scale, size=(301, 262)).astype(int)
    full = whole(reader, size=(301, 262)).astype(int)
    assert np.abs(reduced - (200, 120, 160)).max() <= np.abs(full - (200, 120, 160)).max() < 40


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_regions_are_crops_of_the_whole(slide_path, scale):
    reader = opened(slide_path)
    image = whole(reader, scale=scale)
    height, width = image.shape[:2]
    side = 256 // scale
    rng = np.random.default_rng(scale)
    boxes = [(0, 0, side, side), (side, side, side, side), (0, 0, 2 * side, 2 * side), (width - 1, height - 1, 1, 1)]
    for _ in range(50):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        boxes.append((x, y, int(rng.integers(1, width - x + 1)), int(rng.integers(1, height - y + 1))))
    for x, y, w, h in boxes:
        region = reader.read_region((x, y), level=0, scale=scale, size_px=(w, h))
        np.testing.assert_array_equal(region, image[y : y + h, x : x + w])


def test_a_region_may_be_changed_without_changing_the_next(slide_path):
    reader = opened(slide_path)
    first = reader.read_region((0, 0), level=0, scale=1, size_px=(256, 256))
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(reader.read_region((0, 0), level=0, scale=1, size_px=(256, 256)), kept)


def test_threads_agree_and_decode_each_tile_once(slide_path, decodes):
    expected = whole(opened(slide_path), scale=2)
    decodes.clear()
    reader = opened(slide_path)
    barrier = threading.Barrier(8)

    def read(_: int) -> np.ndarray:
        barrier.wait()
        return whole(reader, scale=2)

    with ThreadPoolExecutor(8) as pool:
        for image in pool.map(read, range(8)):
            np.testing.assert_array_equal(image, expected)
    assert len(decodes) == 3 * 3
    assert set(decodes.values()) == {1}


def test_memory_is_bounded_and_least_recent_goes_first(slide_path, decodes):
    tile_bytes = 256 * 256 * 3
    reader = opened(slide_path)
    reader.cache_bytes = 2 * tile_bytes

    def touch(column: int) -> int:
        before = decodes.total()
        reader.read_region((256 * column, 0), level=0, scale=1, size_px=(10, 10))
        return decodes.total() - before

    assert [touch(c) for c in (0, 1, 0, 2, 0, 1)] == [1, 1, 0, 1, 0, 1]


def test_pickled_reader_reads_the_same(slide_path):
    reader = opened(slide_path)
    expected = whole(reader)
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(whole(copy), expected)
    assert copy.path == slide_path


def test_reads_again_after_close(slide_path):
    reader = opened(slide_path)
    expected = whole(reader)
    reader.close()
    reader.close()
    np.testing.assert_array_equal(whole(reader), expected)


def test_forked_child_opens_its_own_file(slide_path):
    reader = opened(slide_path)
    expected = whole(reader)
    with reader._own().lock, warnings.catch_warnings():  # the child must not wait for this lock
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside idle threads is the point
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            same = False
            with contextlib.suppress(Exception):
                same = np.array_equal(whole(reader), expected)
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_corrupt_tile_raises_and_spares_its_neighbours(tmp_path):
    streams = encoded(texture(), (256, 256), "420")
    streams[5] = streams[5][: len(streams[5]) // 2]
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        write_level(writer, (WIDTH, HEIGHT), (256, 256), streams, photometric="ycbcr", subsampling=(2, 2))
    reader = opened(tmp_path / "slide.tif")
    assert reader.read_region((0, 0), level=0, scale=2, size_px=(256, 256)).shape == (256, 256, 3)
    for _ in range(2):  # a failure is not remembered as something else
        with pytest.raises(RegionError, match=r"column 2, row 1 of level 0"):
            reader.read_region((250, 100), level=0, scale=2, size_px=(60, 60))


def test_truncated_file_raises_for_the_missing_tile(slide_path, tmp_path):
    reader = opened(slide_path)
    last = int(reader._levels[0].offsets.max())  # type: ignore[union-attr]
    short = tmp_path / "short.tif"
    short.write_bytes(slide_path.read_bytes()[: last + 100])
    reader.path = short
    with pytest.raises(RegionError, match=r"column 2, row 2 .* ends \d+ bytes too early"):
        whole(reader)


def test_tile_of_another_size_raises(tmp_path):
    streams = encoded(texture(), (256, 256), "420")
    streams[1] = simplejpeg.encode_jpeg(texture(128, 128), 90)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        write_level(writer, (WIDTH, HEIGHT), (256, 256), streams, photometric="ycbcr", subsampling=(2, 2))
    with pytest.raises(RegionError, match="128 x 128 px instead of 256 x 256"):
        whole(opened(tmp_path / "slide.tif"))


def test_absent_tile_is_white(tmp_path):
    streams = encoded(texture(), (256, 256), "420")
    streams[4] = b""
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        write_level(writer, (WIDTH, HEIGHT), (256, 256), streams, photometric="ycbcr", subsampling=(2, 2))
    reader = opened(tmp_path / "slide.tif")
    for scale in reader.scales(0):
        side = 256 // scale
        region = reader.read_region((side, side), level=0, scale=scale, size_px=(side, side))
        assert region.min() == 255


@pytest.mark.parametrize(
    ("xy", "size", "level", "scale"),
    [
        ((-1, 0), (10, 10), 0, 1),
        ((0, -1), (10, 10), 0, 1),
        ((WIDTH - 9, 0), (10, 10), 0, 1),
        ((0, HEIGHT - 9), (10, 10), 0, 1),
        ((0, 0), (WIDTH // 8 + 2, 10), 0, 8),
        ((0, 0), (0, 10), 0, 1),
        ((0, 0), (10, 10), 1, 1),
        ((0, 0), (10, 10), -1, 1),
        ((0, 0), (10, 10), 0, 3),
    ],
)
def test_outside_raises(slide_path, xy, size, level, scale):
    with pytest.raises(GeometryError):
        opened(slide_path).read_region(xy, level=level, scale=scale, size_px=size)


def test_levels_are_found_in_pages_and_subifds(tmp_path):
    sizes = [(WIDTH, HEIGHT), (350, 265), (175, 132), (90, 70)]
    images = [texture(*size, seed=at) for at, size in enumerate(sizes)]
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        for at in (0, 1):  # level 1 is a SubIFD of level 0's page
            options = {"photometric": "ycbcr", "subsampling": (2, 2), **({"subifds": 1} if at == 0 else {})}
            write_level(writer, sizes[at], (128, 128), encoded(images[at], (128, 128), "420"), **options)
        writer.write(images[2], tile=(64, 64), compression="deflate", photometric="rgb", metadata=None)
        streams = encoded(images[3], (64, 64), "444")
        write_level(writer, sizes[3], (64, 64), streams, photometric="ycbcr", subsampling=(1, 1))
    reader = opened(tmp_path / "slide.tif", *sizes)
    assert [reader.has(level) for level in (-1, 0, 1, 2, 3, 4)] == [False, True, True, False, True, False]
    assert reader.scales(2) == (1,)
    for level in (0, 1, 3):
        error = np.abs(whole(reader, level, size=sizes[level]).astype(int) - images[level])
        assert error.mean() < 6
    with pytest.raises(GeometryError, match="level 2"):
        whole(reader, 2, size=sizes[2])


def test_files_that_are_not_jpeg_tiles_give_none(tmp_path):
    image = texture(300, 200)
    tifffile.imwrite(tmp_path / "deflate.tif", image, tile=(64, 64), compression="deflate", photometric="rgb")
    tifffile.imwrite(tmp_path / "strips.tif", image, compression="jpeg", photometric="rgb")
    tifffile.imwrite(tmp_path / "gray.tif", image[..., 0], tile=(64, 64), compression="jpeg")
    Image.fromarray(image).save(tmp_path / "image.png")
    (tmp_path / "empty.tif").touch()
    for path in sorted(tmp_path.iterdir()):
        assert JpegTiles.open(path, [(300, 200)]) is None, path.name
    assert JpegTiles.open(write(tmp_path / "other.tif", image), [(299, 200)]) is None


def test_tables_that_do_not_fit_the_tags_give_none(tmp_path):
    streams = encoded(texture(256, 256), (128, 128), "420")
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:  # the tags promise 256 px tiles
        write_level(writer, (512, 512), (256, 256), streams, photometric="ycbcr", subsampling=(2, 2))
    assert JpegTiles.open(tmp_path / "slide.tif", [(512, 512)]) is None
