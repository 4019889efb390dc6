from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from deadly_reader import read_until_deadly
from scipy import stats

import slidegen
from eosin.errors import CohortError, ImplausibleMppError, MissingMppError
from eosin.features.jobs import Job
from eosin.pretrain.loading import Batch, Loading
from eosin.pretrain.reads import on_pixels
from eosin.pretrain.sampling import HsvFilter, SampleConfig
from eosin.pretrain.sources import MixedSource, SlideSource, measure
from eosin.slides import open_slide
from slidegen import TiffStyle

WIDTH, HEIGHT = 768, 640
CONFIG = SampleConfig(tile_px=32, mpp=(0.25, 1.0), min_tissue=0.1, seed=3)


def job(path: Path, name: str | None = None, mpp: float | None = None) -> Job:
    """A slide that is tissue everywhere, which pictures of coordinates and ramps are not by themselves."""
    mask = path.with_suffix(".npy")
    np.save(mask, np.ones((HEIGHT // 8, WIDTH // 8), dtype=np.uint8))
    return Job(slide_id=name or path.name, source=path, mask=mask, mpp=mpp)


def ramp_slide(folder: Path, name: str, **style: object) -> Job:
    options = {"compression": "jpeg", "mpp": 0.25, "factors": (2, 4), "tile": 128} | style
    return job(slidegen.write_tiff(folder / name, slidegen.ramp(WIDTH, HEIGHT), TiffStyle(**options)))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    folder = tmp_path_factory.mktemp("ramps")
    return [ramp_slide(folder, f"{name}.svs") for name in "abc"]


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("tiles", "slide", "mpp", "xy"))


def damage(path: Path, tiles: slice) -> None:
    """Overwrite native tiles of every level."""
    with tifffile.TiffFile(path) as tiff:
        spans = [
            span
            for page in tiff.pages
            if page.is_tiled
            for span in list(zip(page.dataoffsets, page.databytecounts, strict=True))[tiles]
        ]
    with path.open("r+b") as file:
        for offset, count in spans:
            file.seek(offset)
            file.write(bytes(count))


def test_pixels_are_those_of_the_stated_place(tmp_path: Path):
    pixels = slidegen.coordinates(WIDTH, HEIGHT)
    path = slidegen.write_tiff(tmp_path / "xy.svs", pixels, TiffStyle(mpp=0.25, factors=()))
    config = SampleConfig(tile_px=40, mpp_values=(0.25,), min_tissue=0)
    with SlideSource([job(path)], config) as source:
        batch = source.batch(0, 64)
    assert batch.tiles.shape == (64, 3, 40, 40)
    assert batch.tiles.dtype == torch.uint8
    for tile, xy in zip(batch.tiles, batch.xy.tolist(), strict=True):
        x, y = slidegen.decode_coordinates(tile.permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(x, np.arange(xy[0], xy[0] + 40)[None].repeat(40, axis=0))
        np.testing.assert_array_equal(y, np.arange(xy[1], xy[1] + 40)[:, None].repeat(40, axis=1))
    assert len({tuple(xy) for xy in batch.xy.tolist()}) > 60


@pytest.mark.parametrize("mpp", [0.25, (0.25, 0.5)])
def test_pixels_are_those_of_the_stated_mpp(tmp_path: Path, mpp):
    style = TiffStyle(flavour="generic", mpp=mpp, factors=(2, 4))
    path = slidegen.write_tiff(tmp_path / "ramp.tif", slidegen.ramp(WIDTH, HEIGHT), style)
    config = SampleConfig(tile_px=48, mpp=(0.25, 2.0), min_tissue=0)
    with SlideSource([job(path)], config) as source:
        batch = source.batch(0, 48)
    slide_mpp = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    for tile, at, xy in zip(batch.tiles.numpy(), batch.mpp.tolist(), batch.xy.numpy(), strict=True):
        # Red of a ramp is its x, green its y: the slope tells the mpp, the value in the middle the place.
        for channel, side, axis in ((0, WIDTH, 0), (1, HEIGHT, 1)):
            slope, middle = np.polyfit(np.arange(48) - 23.5, tile[channel].mean(axis=axis), 1)
            px = at / slide_mpp[axis]
            assert slope == pytest.approx(px * 255 / side, rel=0.03)
            # Rounding to 8 bits in the levels and the resize adds up to 0.5.
            assert middle == pytest.approx((xy[axis] + 24 * px) * 255 / side, abs=0.8)
    assert batch.mpp.max() > 1.5 * batch.mpp.min()


@pytest.mark.parametrize("bounds", [None, (37, 22, 600, 500)])
@pytest.mark.parametrize(("mpp", "factor"), [(0.5, 2), (1.0, 4)])
def test_tiles_at_a_level_are_its_stored_pixels(tmp_path: Path, mpp: float, factor: int, bounds: Any):
    """Against the level itself: no pixel is mixed of its neighbours when the mpp needs no resize."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    style = TiffStyle(flavour="generic", mpp=0.25, factors=(2, 4))
    path = slidegen.write_tiff(tmp_path / "noise.tif", pixels, style)
    request = job(path)
    with open_slide(path) as slide:
        plan, whole = slide.plan(tile_px=32, mpp=mpp), tuple(side // factor for side in slide.size_px)
        stored = slide.read((0, 0), whole, level=plan.level)
        scanned = bounds or slide.bounds
    corners = np.random.default_rng(1).integers((37, 22), (500, 400), (20, 2))
    moved = on_pixels(corners, plan, scanned)
    assert (np.abs(moved - corners) < factor).all()
    assert (moved >= scanned[:2]).all()
    if bounds is not None:
        return
    with SlideSource([request], SampleConfig(tile_px=32, mpp_values=(mpp,), min_tissue=0)) as source:
        batch = source.batch(0, 16)
    for tile, (x, y) in zip(batch.tiles, (batch.xy // factor).tolist(), strict=True):
        np.testing.assert_array_equal(tile.permute(1, 2, 0).numpy(), stored[y : y + 32, x : x + 32])
    assert not (batch.xy % factor).any()


def test_batches_do_not_depend_on_workers_order_or_resume(three: list[Job]):
    with SlideSource(three, CONFIG) as alone:
        expected = [alone.batch(step, 6) for step in range(4)]
        counts = alone.counts
        assert same(alone.batch(2, 6), expected[2])
    assert not same(expected[0], expected[1])
    for workers in (1, 2):
        with SlideSource(three, CONFIG, loading=Loading(workers=workers)) as source:
            found = [source.batch(step, 6) for step in range(4)]
            assert all(same(one, other) for one, other in zip(found, expected, strict=True))
            assert source.counts == counts
            assert same(source.batch(1, 6), expected[1])  # back, against what was read ahead
    with SlideSource(three, CONFIG) as resumed:
        assert same(resumed.batch(2, 6), expected[2])
        assert same(resumed.batch(3, 6), expected[3])


def test_the_ranks_together_draw_what_one_process_draws(three: list[Job]):
    with SlideSource(three, CONFIG) as alone:
        whole = [alone.batch(step, 8) for step in range(3)]
    parts = []
    for rank in (0, 1):
        with SlideSource(three, CONFIG, loading=Loading(rank=rank, world=2)) as source:
            parts.append([source.batch(step, 4) for step in range(3)])
    for step in range(3):
        assert torch.equal(torch.cat([part[step].tiles for part in parts]), whole[step].tiles)
        places = [
            {(*xy, mpp) for xy, mpp in zip(p[step].xy.tolist(), p[step].mpp.tolist(), strict=True)} for p in parts
        ]
        assert not places[0] & places[1]


def test_slides_and_mpp_are_drawn_as_asked(three: list[Job]):
    sites = {"a.svs": "one", "b.svs": "two", "c.svs": "two"}
    config = SampleConfig(tile_px=8, mpp=(0.25, 1.0), min_tissue=0, balance="site")
    with SlideSource(three, config, groups=sites) as source:
        batches = [source.batch(step, 150) for step in range(6)]
    slide = torch.cat([batch.slide for batch in batches])
    drawn = np.bincount(slide.numpy(), minlength=3)
    assert stats.chisquare(drawn, np.array([2, 1, 1]) / 4 * drawn.sum()).pvalue > 1e-3
    mpp = np.log(torch.cat([batch.mpp for batch in batches]).numpy().astype(float))
    assert stats.kstest(mpp, stats.uniform(np.log(0.25), np.log(4)).cdf).pvalue > 1e-3
    assert source.describe()["groups"] == 2


def test_a_damaged_region_is_drawn_around_and_counted(tmp_path: Path, three: list[Job]):
    broken = ramp_slide(tmp_path, "broken.svs")
    damage(broken.source, slice(0, 12))
    with SlideSource([broken, three[0]], CONFIG) as source:
        batches = [source.batch(step, 40) for step in range(3)]
        counts = source.counts
        assert source.excluded == {}
    assert counts["broken.svs"]["unreadable"] > 5
    assert counts["a.svs"] == {"drawn": counts["a.svs"]["drawn"], "tissue": 0, "hsv": 0, "unreadable": 0}
    assert sum(count["drawn"] for count in counts.values()) == 120
    for batch in batches:
        for tile, mpp, xy in zip(batch.tiles.numpy(), batch.mpp.tolist(), batch.xy.numpy(), strict=True):
            centre = (xy + 16 * mpp / 0.25) * 255 / np.array([WIDTH, HEIGHT])
            assert np.abs(tile[:2].mean(axis=(1, 2)) - centre).max() < 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slide_that_vanishes_is_left_out_loudly_and_a_resume_goes_on_alike(
    tmp_path: Path, three: list[Job], caplog: pytest.LogCaptureFixture, workers: int
):
    gone = ramp_slide(tmp_path, "gone.svs")
    jobs = [three[0], gone, three[1]]
    loading = Loading(workers=workers, prefetch=1)
    with SlideSource(jobs, CONFIG, loading=loading) as source:
        assert 1 in source.batch(0, 9).slide
        gone.source.unlink()
        with caplog.at_level(logging.WARNING):
            later = [source.batch(step, 9) for step in range(1, 5)]
        state = source.state_dict()
        assert list(source.excluded) == ["gone.svs"]
        assert "cannot be reached any more" in source.excluded["gone.svs"]
        assert source.describe()["slides"] == 2
    assert sum("gone.svs is left out from step" in message for message in caplog.messages) == 1
    assert all(1 not in batch.slide for batch in later[2:])
    assert len(later[3].tiles) == 9
    with SlideSource(jobs, CONFIG) as resumed:
        assert "gone.svs" in resumed.excluded
        resumed.load_state_dict(state)
        assert same(resumed.batch(4, 9), later[3])
        assert resumed.counts["a.svs"]["drawn"] > state["counts"]["a.svs"]["drawn"]


def test_a_slide_that_changes_is_left_out(tmp_path: Path, three: list[Job]):
    changed = ramp_slide(tmp_path, "changed.svs")
    with SlideSource([changed, three[0]], CONFIG) as source:
        source.batch(0, 4)
        os.utime(changed.source, ns=(1, 1))
        source.batch(1, 8)
        assert "has changed since" in source.excluded["changed.svs"]


def test_a_slide_that_cannot_be_used_from_the_start_is_left_out_and_keeps_the_others(
    tmp_path: Path, three: list[Job], caplog: pytest.LogCaptureFixture
):
    ruined = ramp_slide(tmp_path, "ruined.svs", factors=())
    damage(ruined.source, slice(None))
    coarse = ramp_slide(tmp_path, "coarse.svs", mpp=1.3)
    empty = tmp_path / "empty.svs"
    empty.touch()
    jobs = [three[0], ruined, coarse, Job(slide_id="empty.svs", source=empty)]
    with caplog.at_level(logging.WARNING), SlideSource(jobs, CONFIG) as source:
        assert set(source.excluded) == {"ruined.svs", "coarse.svs", "empty.svs"}
        assert source.batch(0, 4).slide.tolist() == [0] * 4
    assert "none of 8 places on its tissue can be decoded" in source.excluded["ruined.svs"]
    assert "neither enlarged nor padded" in source.excluded["coarse.svs"]
    assert sum("is left out before the first step" in message for message in caplog.messages) == 3


def test_nothing_left_is_an_error(tmp_path: Path):
    only = ramp_slide(tmp_path, "only.svs")
    with SlideSource([only], CONFIG) as source:
        assert source.batch(0, 3).slide.tolist() == [0, 0, 0]
        only.source.unlink()
        with pytest.raises(CohortError, match=r"none of 1 slides is left to draw from: only\.svs"):
            source.batch(1, 3)
        with pytest.raises(CohortError, match="none of 1 slides is left"):
            source.batch(2, 3)
    with pytest.raises(CohortError, match=r"none of 1 slides is left to draw from: only\.svs"):
        SlideSource([only], CONFIG)


def test_a_slide_broken_in_the_middle_of_a_run_is_found_out(tmp_path: Path, three: list[Job]):
    broken = ramp_slide(tmp_path, "broken.svs", factors=())
    with SlideSource([broken, three[0]], CONFIG) as source:
        source.batch(0, 4)
        before = broken.source.stat()
        damage(broken.source, slice(None))
        os.utime(broken.source, ns=(before.st_atime_ns, before.st_mtime_ns))
        for step in range(1, 4):
            source.batch(step, 12)
        if "broken.svs" not in source.excluded:  # native tiles held in memory stay readable
            source.close()
            source.batch(4, 12)
        assert "none of 8 places" in source.excluded["broken.svs"]
        assert source.counts["broken.svs"]["unreadable"] > 0


class KillingSource(SlideSource):
    _read = staticmethod(read_until_deadly)


def test_a_slide_that_kills_its_reader_is_left_out(three: list[Job]):
    deadly = Job(slide_id="deadly", source=three[1].source, mask=three[1].mask)
    jobs = [three[0], deadly, three[2]]
    with KillingSource(jobs, CONFIG, loading=Loading(workers=1, prefetch=1)) as source:
        batches = [source.batch(step, 8) for step in range(3)]
        assert list(source.excluded) == ["deadly"]
        assert "exit code 139" in source.excluded["deadly"]
    assert all(1 not in batch.slide for batch in batches)
    # What replaces it is what is drawn when it is known to be lost.
    with SlideSource(jobs, CONFIG) as other:
        other.load_state_dict({"excluded": [["deadly", -1, "known"]], "counts": {}})
        assert all(same(other.batch(step, 8), batch) for step, batch in enumerate(batches))


def test_missing_mpp_is_one_error_that_names_the_slides(tmp_path: Path, three: list[Job]):
    without = [ramp_slide(tmp_path, f"{name}.svs", mpp=None, power=None) for name in ("x", "y")]
    with pytest.raises(MissingMppError, match=r"2 of 3 slides do not say .*: x\.svs, y\.svs; give them .*'mpp'"):
        SlideSource([three[0], *without], CONFIG)
    given = [Job(slide_id=one.slide_id, source=one.source, mask=one.mask, mpp=0.25) for one in without]
    with SlideSource([three[0], *given], CONFIG) as source:
        assert source.describe()["slides"] == 3
    with pytest.raises(ImplausibleMppError, match=r"1 of 1 slides \(z\.svs\)"):
        SlideSource([ramp_slide(tmp_path, "z.svs", mpp=12.0)], CONFIG)


def test_tissue_is_found_once_and_then_read_from_the_cache(tmp_path: Path, he_slide, monkeypatch: pytest.MonkeyPatch):
    jobs = [Job(slide_id="he", source=he_slide.path)]
    config = SampleConfig(tile_px=64, mpp=(0.5, 1.0), min_tissue=0.8)
    with SlideSource(jobs, config, cache=tmp_path / "tissue") as source:
        first = source.batch(0, 16)
        rejected = source.counts["he"]["tissue"]
    monkeypatch.setattr("eosin.features.jobs.tissue_mask", lambda slide: pytest.fail("segmented again"))
    with SlideSource(jobs, config, cache=tmp_path / "tissue") as source:
        assert same(source.batch(0, 16), first)
    assert rejected > 0
    # By the truth of the drawn slide, not by the mask that chose them.
    for xy, mpp in zip(first.xy.tolist(), first.mpp.tolist(), strict=True):
        side = round(64 * mpp / 0.5)
        assert he_slide.mask[xy[1] : xy[1] + side, xy[0] : xy[0] + side].mean() > 0.5


def test_hsv_rejects_and_what_is_kept_passes(he_slide):
    jobs = [Job(slide_id="he", source=he_slide.path)]
    strict = HsvFilter(min_share=0.7)
    config = SampleConfig(tile_px=64, mpp_values=(0.5,), min_tissue=0.0, hsv=strict)
    with SlideSource(jobs, config) as source:
        batch = source.batch(0, 24)
        assert source.counts["he"]["hsv"] > 0
    assert all(strict.keeps(np.ascontiguousarray(tile.permute(1, 2, 0).numpy())) for tile in batch.tiles)
    impossible = SampleConfig(
        tile_px=64, mpp_values=(0.5,), min_tissue=0.0, hsv=HsvFilter(low=(0, 0, 0), high=(1, 1, 1))
    )
    with SlideSource(jobs, impossible) as source, pytest.raises(CohortError, match="no tile was accepted in 64 draws"):
        source.batch(0, 1)


def test_inputs_that_make_no_source(three: list[Job]):
    with pytest.raises(CohortError, match="no slides to draw from"):
        SlideSource([], CONFIG)
    with pytest.raises(CohortError, match=r"given more than once: a\.svs"):
        SlideSource([three[0], three[0]], CONFIG)
    config = SampleConfig(tile_px=32, balance="organ")
    with pytest.raises(CohortError, match=r"needs the organ of every slide; 2 of 3 have none, among them b\.svs"):
        SlideSource(three, config, groups={"a.svs": "lung"})
    with pytest.raises(CohortError, match="rank 2 of 2"):
        Loading(rank=2, world=2)
    with SlideSource(three, CONFIG) as source, pytest.raises(CohortError, match="at least 1 tile"):
        source.batch(0, 0)


def test_an_open_slide_is_read_and_left_open(three: list[Job]):
    slide = open_slide(three[0].source)
    given = Job(slide_id="open", source=slide, mask=three[0].mask)
    with SlideSource([three[0]], CONFIG) as source:
        expected = source.batch(0, 5)
    for workers in (0, 1):
        with SlideSource([given], CONFIG, loading=Loading(workers=workers)) as source:
            assert same(source.batch(0, 5), expected)
    assert slide.read((0, 0), 8).shape == (8, 8, 3)
    slide.close()


def test_describe_says_what_there_is(three: list[Job]):
    with SlideSource(three, CONFIG) as source:
        said = source.describe()
    area = 3 * WIDTH * HEIGHT * 0.25**2 / 1e6
    assert said["tissue_mm2"] == pytest.approx(area, abs=2e-3)
    assert (said["slides"], said["mpp"], said["slide_mpp"], said["excluded"]) == (3, [0.25, 1.0], [0.25, 0.25], {})


def test_a_mixture_keeps_its_shares(three: list[Job]):
    one, two = SlideSource(three[:1], CONFIG), SlideSource(three[1:], CONFIG)
    mixed = MixedSource([one, two], [1, 3])
    batch = mixed.batch(0, 8)
    assert mixed.slide_ids == ("a.svs", "b.svs", "c.svs")
    assert batch.slide[:2].tolist() == [0, 0]
    assert set(batch.slide[2:].tolist()) <= {1, 2}
    assert torch.equal(batch.tiles[2:], two.batch(0, 6).tiles)
    assert mixed.sizes(9) == (2, 7)
    assert mixed.sizes(10) == (3, 7)
    with pytest.raises(CohortError, match=r"a batch of 1 tiles has none of a share of 0\.25; take 4"):
        mixed.sizes(1)
    state = mixed.state_dict()
    mixed.load_state_dict(state)
    assert mixed.state_dict() == state
    assert [part["slides"] for part in mixed.describe()["sources"]] == [1, 2]
    mixed.close()
    with pytest.raises(CohortError, match="one positive share each"):
        MixedSource([one, two], [1, 0])
    other = SlideSource(three, SampleConfig(tile_px=16))
    with pytest.raises(CohortError, match=r"tile_px \[32, 16\] cannot share"):
        MixedSource([one, other], [1, 1])


class Clockwork:
    """A clock, and a source whose batches take 20 ms of it."""

    slide_ids, tile_px = ("a",), 8

    def __init__(self) -> None:
        self.now = 5.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def batch(self, step: int, size: int) -> None:
        self.now += 0.02


def test_measure_counts_tiles_and_waiting(monkeypatch: pytest.MonkeyPatch):
    clock = Clockwork()
    monkeypatch.setattr("eosin.pretrain.sources.time", clock)
    free = measure(clock, size=10, seconds=0.99)
    assert (free.batches, free.tiles_per_s, free.waited) == (50, pytest.approx(500), pytest.approx(1))
    busy = measure(clock, size=10, seconds=0.99, step_s=0.06)
    assert (busy.batches, busy.tiles_per_s, busy.waited) == (13, pytest.approx(125), pytest.approx(0.25))


@pytest.mark.real
def test_real_slides_give_tiles_of_tissue(real_data: Path):
    names = ("CMU-1-Small-Region.svs", "OS-1-detail.ome.tif", "OS-2-ndpi.ome.tif")
    jobs = [Job(slide_id=name, source=real_data / "slides" / name) for name in names]
    config = SampleConfig(tile_px=64, mpp=(0.25, 2.0), min_tissue=0.4, hsv=HsvFilter())
    with SlideSource(jobs, config) as source:
        batch = source.batch(0, 24)
        assert source.excluded == {}
    assert len(set(batch.slide.tolist())) == 3
    assert batch.mpp[batch.slide == 0].min() >= 0.499
    assert (batch.tiles.float().std(dim=(1, 2, 3)) > 8).all()
