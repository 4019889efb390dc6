from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoders_for_tests import CrashingJob, MeanEncoder, NanEncoder

import slidegen
from eosin.errors import CohortError, NonFiniteError, NoTissueError, StoreError, StoreMismatchError
from eosin.features.extraction import Settings, run
from eosin.features.jobs import Job, find_jobs, shard_jobs
from eosin.features.readers import ReaderPool, ReaderState
from eosin.features.store import FeatureStore
from eosin.slides import open_slide
from eosin.slides.footprint import FILTER
from eosin.tiles import TileSpec, tile

SPEC = TileSpec(tile_px=64, mpp=1.0, min_tissue=0.1)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small slides, two of the same name in different folders."""
    root = tmp_path_factory.mktemp("cohort")
    for seed, name in enumerate(("a/one.svs", "b/one.svs", "two.svs")):
        pixels, _ = slidegen.histology(1200, 900, seed=seed, mpp=0.5)
        path = root / name
        path.parent.mkdir(exist_ok=True)
        slidegen.write_tiff(path, pixels, slidegen.TiffStyle(compression="jpeg", mpp=0.5, power=20, factors=(4,)))
    return root


def same_store(one: Path, other: Path) -> list[str]:
    """Names of the files of two stores that differ, but for the record of the run."""
    names = {p.relative_to(r).as_posix() for r in (one, other) for p in r.rglob("*") if p.is_file()}
    names = {n for n in names if not n.startswith((".locks/", "run"))}
    return [
        n
        for n in sorted(names)
        if not (one / n).exists() or not (other / n).exists() or (one / n).read_bytes() != (other / n).read_bytes()
    ]


def test_every_row_is_the_tile_its_coordinates_name(cohort: Path, tmp_path: Path) -> None:
    outcome = run(cohort, SPEC, MeanEncoder(), out=tmp_path, workers=1)
    assert outcome.done == ("a/one.svs", "b/one.svs", "two.svs")
    assert not outcome.failed
    store = outcome.stores[0]
    assert store.slide_ids == list(outcome.done)
    encoder = MeanEncoder()
    for slide_id in store:
        features = store[slide_id]
        with open_slide(cohort / slide_id) as slide:
            plan = slide.plan(tile_px=64, mpp=1.0)
            tiles = np.stack([slide.read_tile((int(x), int(y)), plan).rgb for x, y in features.xy])
            grid = tile(slide, tile_px=64, mpp=1.0)
        np.testing.assert_array_equal(features.x, encoder.encode(tiles))
        np.testing.assert_array_equal(features.xy, grid.xy)
        np.testing.assert_array_equal(features.qc["tissue"], grid.tissue)
        assert len(features.background_xy) == len(grid.background_xy) > 0
        assert (features.qc["read_status"] == 0).all()
        assert (store.path / "tissue" / f"{slide_id}.geojson").is_file()


@pytest.mark.parametrize(("workers", "batch"), [(0, 7), (1, 1), (2, 64)])
def test_workers_and_batches_change_nothing(cohort: Path, tmp_path: Path, workers: int, batch: int) -> None:
    run(cohort, SPEC, MeanEncoder(), out=tmp_path / "a", workers=0, batch_size=16)
    run(cohort, SPEC, MeanEncoder(), out=tmp_path / "b", workers=workers, batch_size=batch)
    assert same_store(tmp_path / "a", tmp_path / "b") == []


def test_a_second_run_skips_and_a_changed_slide_is_redone(cohort: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    shutil.copytree(cohort, slides)
    run(slides, SPEC, MeanEncoder(), out=tmp_path / "o", workers=0)
    again = MeanEncoder()
    outcome = run(slides, SPEC, again, out=tmp_path / "o", workers=0)
    assert outcome.skipped == ("a/one.svs", "b/one.svs", "two.svs")
    assert again.seen == []
    shutil.copy(cohort / "two.svs", slides / "a" / "one.svs")
    outcome = run(slides, SPEC, again, out=tmp_path / "o", workers=0)
    assert outcome.done == ("a/one.svs",)


def test_another_recipe_is_refused_by_name(cohort: Path, tmp_path: Path) -> None:
    run(cohort / "two.svs", SPEC, MeanEncoder(), out=tmp_path, workers=0)
    with pytest.raises(StoreMismatchError, match=r"tile\.mpp: here 0\.75, store has 1"):
        run(cohort / "two.svs", replace(SPEC, mpp=0.75), MeanEncoder(), out=tmp_path, workers=0)
    with pytest.raises(StoreMismatchError, match="precision"):
        run(cohort / "two.svs", SPEC, MeanEncoder(precision="bf16"), out=tmp_path, workers=0)


def test_a_store_made_by_another_filter_is_refused(cohort: Path, tmp_path: Path) -> None:
    """What version 1 of the pipeline left: pixels made coarser by whatever the codec offered."""
    recipe = run(cohort / "two.svs", SPEC, MeanEncoder(), out=tmp_path / "new", workers=0).stores[0].recipe
    assert (recipe.tile["filter"], recipe.version) == (FILTER, 2)
    tile = {key: value for key, value in recipe.tile.items() if key != "filter"}
    FeatureStore.create(tmp_path / "old", replace(recipe, tile=tile, version=1))
    with pytest.raises(
        StoreMismatchError, match=r'tile\.filter: here "mean of .*, store has nothing\n  version: here 2'
    ):
        run(cohort / "two.svs", SPEC, MeanEncoder(), out=tmp_path / "old", workers=0)


def test_several_encoders_and_mpps_share_one_decode(cohort: Path, tmp_path: Path) -> None:
    specs = [SPEC, replace(SPEC, mpp=2.0)]
    outcome = run(cohort, specs, [MeanEncoder("one"), MeanEncoder("two")], out=tmp_path, workers=1)
    names = [store.path.name for store in outcome.stores]
    assert names == ["one_64px_1mpp", "two_64px_1mpp", "one_64px_2mpp", "two_64px_2mpp"]
    alone = run(cohort, SPEC, MeanEncoder("one"), out=tmp_path / "alone", workers=0).stores[0]
    assert same_store(outcome.stores[0].path, alone.path) == []
    np.testing.assert_array_equal(outcome.stores[0]["two.svs"].x, outcome.stores[1]["two.svs"].x)


def test_shards_are_disjoint_and_complete(cohort: Path, tmp_path: Path) -> None:
    jobs = find_jobs([cohort])
    parts = [shard_jobs(jobs, (i, 2)) for i in (1, 2)]
    assert sorted(j.slide_id for part in parts for j in part) == [j.slide_id for j in jobs]
    for i in (1, 2):
        run(cohort, SPEC, MeanEncoder(), out=tmp_path / "parts", shard=(i, 2), workers=0)
    run(cohort, SPEC, MeanEncoder(), out=tmp_path / "whole", workers=0)
    assert same_store(tmp_path / "parts", tmp_path / "whole") == []
    with pytest.raises(CohortError, match="shard 3/2"):
        shard_jobs(jobs, (3, 2))


def test_bad_slides_fail_alone_each_with_its_reason(cohort: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    shutil.copytree(cohort, slides)
    (slides / "zero.svs").write_bytes(b"")
    slidegen.truncated(cohort / "two.svs", slides / "cut.svs", 0.7)
    (slides / "words.svs").write_text("not a slide")
    pixels, _ = slidegen.histology(600, 600, seed=5, mpp=0.5)
    slidegen.write_tiff(slides / "nompp.tif", pixels, slidegen.TiffStyle(compression="jpeg", mpp=None))
    blank = np.full((600, 600, 3), 244, np.uint8)
    slidegen.write_tiff(slides / "blank.svs", blank, slidegen.TiffStyle(compression="jpeg", mpp=0.5))
    outcome = run(slides, SPEC, MeanEncoder(), out=tmp_path / "o", workers=1)
    assert outcome.done == ("a/one.svs", "b/one.svs", "two.svs")
    assert set(outcome.failed) == {"zero.svs", "cut.svs", "words.svs", "nompp.tif", "blank.svs"}
    assert "MissingMppError" in outcome.failed["nompp.tif"]
    assert "--slide-mpp" in outcome.failed["nompp.tif"]
    assert "NoTissueError" in outcome.failed["blank.svs"]
    store = outcome.stores[0]
    assert {row["slide_id"] for row in store.failures()} == set(outcome.failed)
    for name, reason in outcome.failed.items():
        assert Path(name).name in reason
        assert "\n" not in reason
    mended = run(slides / "nompp.tif", SPEC, MeanEncoder(), out=tmp_path / "o", workers=0, slide_mpp=0.5)
    assert mended.done == ("nompp.tif",)
    assert "nompp.tif" not in {row["slide_id"] for row in store.failures()}


def test_nan_fails_the_slide_and_leaves_no_row(cohort: Path, tmp_path: Path) -> None:
    outcome = run(cohort, SPEC, NanEncoder(at=5), out=tmp_path, workers=0, batch_size=4)
    assert outcome.done == ("b/one.svs", "two.svs")
    assert "NonFiniteError" in outcome.failed["a/one.svs"]
    assert not list((tmp_path / "a").glob("*"))
    with open_slide(cohort / "two.svs") as slide, pytest.raises(NonFiniteError, match="fp32"):
        run(slide, SPEC, NanEncoder(), out=tmp_path / "alone")


def test_an_open_slide_raises_its_own_error(tmp_path: Path) -> None:
    blank = open_slide(np.full((600, 600, 3), 244, np.uint8), mpp=0.5)
    with pytest.raises(NoTissueError):
        run(blank, SPEC, MeanEncoder(), out=tmp_path)


def test_a_grid_and_an_array_make_the_same_store_call(tmp_path: Path) -> None:
    pixels, _ = slidegen.histology(800, 600, seed=3, mpp=0.5)
    slide = open_slide(pixels, mpp=0.5)
    grid = tile(slide, tile_px=64, mpp=1.0)
    outcome = run(slide, grid, MeanEncoder(), out=tmp_path)
    assert outcome.stores[0].slide_ids == ["array"]
    np.testing.assert_array_equal(outcome.stores[0]["array"].xy, grid.xy)


def test_an_edited_mask_is_taken_and_noticed(cohort: Path, tmp_path: Path) -> None:
    first = run(cohort / "two.svs", SPEC, MeanEncoder(), out=tmp_path / "o", workers=0)
    masks = tmp_path / "masks"
    shutil.copytree(tmp_path / "o" / "tissue", masks)
    path = masks / "two.svs.geojson"
    outline = json.loads(path.read_text())
    square = [[0, 0], [600, 0], [600, 900], [0, 900], [0, 0]]
    outline["features"] = [outline["features"][0] | {"geometry": {"type": "Polygon", "coordinates": [square]}}]
    path.write_text(json.dumps(outline))
    jobs = find_jobs([cohort / "two.svs"], masks=masks)
    second = run(jobs, SPEC, MeanEncoder(), out=tmp_path / "o", workers=0)
    assert second.done == ("two.svs",)
    features = second.stores[0]["two.svs"]
    assert features.xy[:, 0].max() < 600
    assert features.slide["tissue"]["method"] == "geojson"
    assert first.done == ("two.svs",)


def test_a_table_gives_ids_mpp_and_clear_errors(cohort: Path, tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    table.write_text(f"slide_id,path,mpp\nP1,{cohort / 'a/one.svs'},0.25\nP2,{cohort / 'two.svs'},\n")
    jobs = find_jobs([table], slide_mpp=0.4)
    assert [(j.slide_id, j.mpp) for j in jobs] == [("P1", 0.25), ("P2", 0.4)]
    table.write_text(f"path,mpp\n{cohort / 'two.svs'},banana\n")
    with pytest.raises(CohortError, match="row 2: mpp 'banana'"):
        find_jobs([table])
    table.write_text("file,mpp\nnowhere.svs,0.5\n")
    with pytest.raises(CohortError, match=r"row 2: path 'nowhere.svs' does not exist"):
        find_jobs([table])
    table.write_text(f"path,slide_id\n{cohort / 'two.svs'},../evil\n")
    with pytest.raises(CohortError, match="leave the output folder"):
        find_jobs([table])
    table.write_text("slides,mpp\na,1\n")
    with pytest.raises(CohortError, match="needs a column 'path'"):
        find_jobs([table])
    with pytest.raises(CohortError, match=r"both be called 'one.svs'"):
        find_jobs([cohort / "a" / "one.svs", cohort / "b" / "one.svs"])
    with pytest.raises(CohortError, match="no such file"):
        find_jobs([tmp_path / "absent"])


def test_settings_reach_the_recipe(cohort: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    settings = Settings(stain="macenko", dtype="float16")
    plain = run(cohort / "two.svs", SPEC, MeanEncoder(), out=tmp_path / "p", workers=0).stores[0]
    stained = [
        run(
            cohort / "two.svs",
            SPEC,
            MeanEncoder(),
            out=tmp_path / f"s{batch}",
            workers=0,
            batch_size=batch,
            settings=settings,
        )
        for batch in (5, 64)
    ]
    assert same_store(tmp_path / "s5", tmp_path / "s64") == []
    features = stained[0].stores[0]["two.svs"]
    assert features.x.dtype == np.float16
    assert features.recipe["stain"]["method"] == "macenko"
    assert "stain_unchanged" in features.qc
    assert np.abs(features.x.astype(np.float32) - plain["two.svs"].x).mean() > 1


def spoil(path: Path, keep: float, seed: int = 0) -> int:
    """Overwrite level-0 JPEG tiles with zeros, all but a share `keep`; return how many."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    bad = np.random.default_rng(seed).permutation(len(places))[: round(len(places) * (1 - keep))]
    with open(path, "r+b") as file:
        for i in bad:
            file.seek(places[i][0] + 2)
            file.write(bytes(places[i][1] - 2))
    return len(bad)


def test_undecodable_tiles_are_listed_and_many_fail_the_slide(tmp_path: Path) -> None:
    pixels, _ = slidegen.histology(3000, 2400, seed=2, mpp=0.5, blobs=-1)
    path = slidegen.write_tiff(
        tmp_path / "few.svs", pixels, slidegen.TiffStyle(compression="jpeg", mpp=0.5, factors=(4,))
    )
    shutil.copy(path, tmp_path / "many.svs")
    spec = TileSpec(tile_px=64, mpp=0.5)
    whole = run(path, spec, MeanEncoder(), out=tmp_path / "whole", workers=0).stores[0]["few"]
    assert spoil(path, keep=0.99) >= 1
    assert spoil(tmp_path / "many.svs", keep=0.5) > 20
    outcome = run([path, tmp_path / "many.svs"], spec, MeanEncoder(), out=tmp_path / "o", workers=1)
    assert outcome.done == ("few.svs",), outcome.failed
    assert "CorruptSlideError" in outcome.failed["many.svs"]
    assert "cannot be decoded" in outcome.failed["many.svs"]
    few = outcome.stores[0]["few"]
    assert 0 < len(few.unreadable_xy) < 0.05 * len(whole)
    rows = {tuple(xy): x for xy, x in zip(whole.xy.tolist(), whole.x, strict=True)}
    assert {*map(tuple, few.xy.tolist()), *map(tuple, few.unreadable_xy.tolist())} == set(rows)
    for xy, x in zip(few.xy.tolist(), few.x, strict=True):
        np.testing.assert_array_equal(x, rows[tuple(xy)])


def test_a_codec_crash_fails_its_slide_alone(cohort: Path, tmp_path: Path) -> None:
    jobs = find_jobs([cohort])
    evil = jobs[1]
    jobs[1] = CrashingJob(slide_id=evil.slide_id, source=evil.source)
    outcome = run(jobs, SPEC, MeanEncoder(), out=tmp_path, workers=1)
    assert outcome.done == ("a/one.svs", "two.svs")
    assert "SIGSEGV" in outcome.failed["b/one.svs"]


def test_a_full_disk_stops_the_run_and_keeps_what_is_done(cohort: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with pytest.raises(StoreError, match="free"):
            run(cohort, SPEC, MeanEncoder(), out=disk / "o", workers=0)
        store = FeatureStore.open(disk / "o")
        assert 0 < len(store) < 3
        assert all(row.ok for row in store.verify())
        assert not list((disk / "o").rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Tasks for the pool must be importable by the reader processes.


def crash(state: ReaderState, how: int) -> None:
    os.kill(os.getpid(), how)


def double(state: ReaderState, value: int) -> int:
    time.sleep(0.01)
    return 2 * value


def test_a_crashed_reader_costs_one_task() -> None:
    pool = ReaderPool(workers=1, slots=1, slot_bytes=1)
    try:
        tickets = [pool.submit(f"doubling {i}", double, i) for i in range(3)]
        bad = pool.submit("reading tile 7 of evil.svs", crash, signal.SIGSEGV)
        tickets += [pool.submit(f"doubling {i}", double, i) for i in range(3, 40)]
        from eosin.errors import ReaderCrashError

        with pytest.raises(ReaderCrashError, match=r"SIGSEGV.*reading tile 7 of evil\.svs"):
            pool.result(bad)
        assert [pool.result(t) for t in tickets] == [2 * i for i in range(40)]
    finally:
        pool.close()


def opened_before(state: ReaderState, job: Job) -> int:
    """Open a slide; return how many were open."""
    count = len(state._slides)
    state.slide(job).size_px  # noqa: B018
    return count


def test_the_planner_keeps_no_slide_and_readers_keep_a_few(cohort: Path) -> None:
    """Decoded native tiles of a thumbnail would stay for the rest of the run."""
    pool = ReaderPool(workers=1, slots=1, slot_bytes=1)
    try:
        jobs = [*find_jobs([cohort]), *find_jobs([cohort / "a"])] * 2
        for planning, expected in ((True, [0] * 8), (False, [0, 1, 2, 3, 3, 3, 3, 3])):
            tickets = [pool.submit("opening", opened_before, job, planning=planning) for job in jobs]
            assert [min(3, pool.result(ticket)) for ticket in tickets] == expected
    finally:
        pool.close()


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from encoders_for_tests import MeanEncoder
from eosin.features.extraction import run
from eosin.tiles import TileSpec
import time
class Slow(MeanEncoder):
    def encode(self, tiles):
        time.sleep(0.01)
        return super().encode(tiles)
if __name__ == "__main__":
    outcome = run({source!r}, TileSpec(tile_px=64, mpp=1.0), Slow(), out={out!r}, workers={workers}, batch_size=8)
    sys.exit(1 if outcome.failed else 0)
"""


def start(cohort: Path, out: Path, script: Path, workers: int) -> subprocess.Popen[bytes]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(SCRIPT.format(paths=paths, source=str(cohort), out=str(out), workers=workers))
    return subprocess.Popen([sys.executable, str(script)])


@pytest.mark.slow
def test_killed_at_twenty_moments_and_resumed_equals_uninterrupted(cohort: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments; whatever was there goes on to a store equal bit for bit."""
    whole = tmp_path / "whole"
    started = time.monotonic()
    assert start(cohort, whole, tmp_path / "s.py", 1).wait() == 0
    lasts = time.monotonic() - started
    rng = np.random.default_rng(20)
    out = tmp_path / "killed"
    seen_partial = 0
    for kill, moment in enumerate(rng.uniform(0.2, 1.0, 20) * lasts):
        if kill % 4 == 0:
            shutil.rmtree(out, ignore_errors=True)
        process = start(cohort, out, tmp_path / "s.py", kill % 2)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            seen_partial += 1
            for path in out.rglob("*.h5"):
                assert path.read_bytes() == (whole / path.relative_to(out)).read_bytes()
    assert seen_partial >= 5
    assert start(cohort, out, tmp_path / "s.py", 1).wait() == 0
    assert same_store(out, whole) == []
    assert not list(out.rglob("*.tmp"))
    assert all(row.ok for row in FeatureStore.open(out).verify())


def test_two_processes_share_one_output(cohort: Path, tmp_path: Path) -> None:
    one = start(cohort, tmp_path / "o", tmp_path / "a.py", 0)
    other = start(cohort, tmp_path / "o", tmp_path / "b.py", 0)
    assert one.wait() == 0
    assert other.wait() == 0
    run(cohort, TileSpec(tile_px=64, mpp=1.0), MeanEncoder(), out=tmp_path / "whole", workers=0)
    assert same_store(tmp_path / "o", tmp_path / "whole") == []
