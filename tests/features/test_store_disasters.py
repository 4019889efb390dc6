"""The feature store when processes die, disks fill up and bytes rot."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from eosin.errors import StoreCorruptError, StoreError, StoreLockedError
from eosin.features import writer as writer_module
from eosin.features.store import FeatureStore, Recipe

META = {"size_px": (9000, 9000), "mpp": {"x": 0.5, "y": 0.5}, "fingerprint": "f"}
RECIPE = Recipe(
    encoder={"name": "tiny", "dim": 64},
    tile={"tile_px": 224, "mpp": 0.5, "overlap_px": 0},
    tissue={},
    qc={},
    stain=None,
    precision="fp32",
    dtype="float32",
    tokens=False,
    icc=False,
)
PRELUDE = f"""
import sys, time
import numpy as np
from eosin.features.store import FeatureStore, Recipe
store = FeatureStore.create(sys.argv[1], Recipe.from_dict({RECIPE.to_dict()!r}))
def write(slide_id, n, pause=0.0):
    with store.writer(slide_id, meta={META!r}) as writer:
        for i in range(n // 100):
            writer.append(np.full((100, 64), i, np.float32), np.full((100, 2), i))
            print(i, flush=True)
            time.sleep(pause)
        writer.finish()
"""


def write(store: FeatureStore, slide_id: str, n: int = 1000) -> None:
    with store.writer(slide_id, meta=META) as writer:
        for i in range(n // 100):
            writer.append(np.full((100, 64), i, np.float32), np.full((100, 2), i))
        writer.finish()


def start(code: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + code, str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    raise AssertionError(f"the process ended without saying {line}: {process.communicate()[1]}")


@pytest.fixture
def store(tmp_path):
    return FeatureStore.create(tmp_path / "features", RECIPE)


def temporaries(store: FeatureStore) -> list[Path]:
    return list(store.path.rglob(".*.tmp"))


def test_a_killed_writer_leaves_nothing_visible(store):
    process = start("write('a/x.svs', 100000, pause=0.01)", store.path)
    until(process, "30")
    assert temporaries(store)
    with pytest.raises(StoreLockedError, match=r"a/x\.svs"):
        store.writer("a/x.svs", meta=META)
    assert FeatureStore.create(store.path, RECIPE).slide_ids == []
    assert temporaries(store), "a living writer's temporary must stay"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "a/x.svs" not in store
    assert not store.done("a/x.svs", "f")
    FeatureStore.create(store.path, RECIPE)
    assert not temporaries(store), "a dead writer's temporary must go"
    write(store, "a/x.svs")
    assert store.verify() == [("a/x.svs", True, "")]


def test_a_killed_writer_keeps_the_old_file(store):
    write(store, "x.svs")
    before = (store.path / "x.svs.h5").read_bytes()
    process = start("write('x.svs', 100000, pause=0.01)", store.path)
    until(process, "20")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (store.path / "x.svs.h5").read_bytes() == before
    assert store.verify()[0].ok


def test_processes_that_start_together(tmp_path):
    """Four processes make one store and want the same slides: each slide is written once, whole."""
    code = """
from eosin.errors import StoreLockedError
for i in range(6):
    if not store.done(f"{i}.svs", "f"):
        try:
            write(f"{i}.svs", 1500)
        except StoreLockedError:
            print("locked", flush=True)
"""
    running = [start(code, tmp_path / "features") for _ in range(4)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    store = FeatureStore.open(tmp_path / "features")
    assert store.verify() == [(f"{i}.svs", True, "") for i in range(6)]
    assert not temporaries(store)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_truncated(store, keep):
    write(store, "x.svs")
    path = store.path / "x.svs.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert [row.ok for row in store.verify()] == [False]
    with pytest.raises(StoreCorruptError, match=r"x\.svs\.h5 .* delete it"):
        store["x.svs"]


def test_flipped_bytes_of_features_are_noticed_when_reading(store):
    write(store, "x.svs")
    path = store.path / "x.svs.h5"
    data = bytearray(path.read_bytes())
    place = data.find(np.full(64, 3, "<f4").tobytes())
    assert place > 0
    data[place + 5] ^= 0x10
    path.write_bytes(data)
    row = store.verify()[0]
    assert not row.ok
    assert "unreadable" in row.reason
    with pytest.raises(StoreCorruptError, match=r"x\.svs\.h5"):
        store["x.svs"]


def test_every_flipped_byte_is_noticed_or_harmless(store):
    """Flip bytes all over the file: `verify` objects, or every number and word is still right."""
    write(store, "x.svs", n=100)
    path = store.path / "x.svs.h5"
    whole = path.read_bytes()
    right = store["x.svs"]
    noticed = 0
    places = np.random.default_rng(0).integers(0, len(whole), 250)
    for place in places:
        data = bytearray(whole)
        data[place] ^= 0xFF
        path.write_bytes(data)
        if not store.verify()[0].ok:
            noticed += 1
            continue
        found = store["x.svs"]
        np.testing.assert_array_equal(found.x, right.x)
        np.testing.assert_array_equal(found.xy, right.xy)
        assert (found.recipe, found.slide) == (right.recipe, right.slide)
    assert noticed > 10


def test_values_altered_through_hdf5(store):
    write(store, "x.svs")
    with h5py.File(store.path / "x.svs.h5", "r+") as file:
        file["features"][5, 5] += 1
    assert store.verify() == [("x.svs", False, "content differs from its hash: altered on disk")]


def test_an_attribute_altered_through_hdf5(store):
    write(store, "x.svs")
    with h5py.File(store.path / "x.svs.h5", "r+") as file:
        file["coords"].attrs["mpp"] = 0.25
    assert store.verify() == [("x.svs", False, "content differs from its hash: altered on disk")]


def test_a_file_of_another_recipe(store, tmp_path):
    other = Recipe.from_dict({**RECIPE.to_dict(), "precision": "bf16"})
    write(FeatureStore.create(tmp_path / "other", other), "x.svs")
    os.replace(tmp_path / "other/x.svs.h5", store.path / "x.svs.h5")
    row = store.verify()[0]
    assert not row.ok
    assert 'precision: here "bf16", store has "fp32"' in row.reason


@pytest.fixture
def full_after(monkeypatch):
    """Make the disk full after so many bytes; whatever is written then fails as on a real one."""

    def arrange(limit: int, number: int = errno.ENOSPC) -> None:
        class Full:
            def __init__(self, path, mode, buffering):
                self._file = open(path, mode, buffering=buffering)  # noqa: SIM115
                self._left = limit

            def write(self, data):
                if len(data) > self._left:
                    taken, self._left = self._left, 0
                    if taken:
                        return self._file.write(data[:taken])
                    raise OSError(number, os.strerror(number))
                self._left -= len(data)
                return self._file.write(data)

            def __getattr__(self, name):
                return getattr(self._file, name)

        monkeypatch.setattr(writer_module, "open_raw", lambda path: Full(path, "w+b", 0))

    yield arrange
    monkeypatch.undo()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_any_byte(store, full_after, monkeypatch, number):
    """Wherever the space ends, the error names it, nothing stays, and the next slide works."""
    write(store, "probe.svs", n=3000)
    size = (store.path / "probe.svs.h5").stat().st_size
    for limit in [0, 1, 48, 96, 500, 2000, *range(5000, size - 1, 60001), size - 1]:
        full_after(limit, number)
        with pytest.raises(StoreError, match=r"x\.svs\.h5: .*MiB free"):
            write(store, "x.svs", n=3000)
        assert "x.svs" not in store
        assert not temporaries(store)
    monkeypatch.undo()
    write(store, "x.svs", n=3000)
    assert all(row.ok for row in store.verify())


def test_another_write_error_is_passed_on(store, full_after):
    full_after(5000, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(store, "x.svs")
    assert len(store) == 0


def test_a_file_size_limit_in_a_real_process(tmp_path):
    """RLIMIT_FSIZE: the kernel refuses the bytes; the process must live and go on."""
    code = """
import resource
from eosin.errors import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
for attempt in range(3):
    try:
        write("big.svs", 20000)
    except StoreError as error:
        print("refused:", error, flush=True)
write("small.svs", 100)
print([tuple(row) for row in store.verify()], flush=True)
"""
    process = start(code, tmp_path / "features")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.count("refused:") == 3
    assert "File too large" in out
    assert "[('small.svs', True, '')]" in out


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        store = FeatureStore.create(disk / "features", RECIPE)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"No space left on device .*MiB free"):
                write(store, "big.svs", n=10000)
            write(store, "small.svs", n=100)
            assert store.slide_ids == ["small.svs"]
            assert not temporaries(store)
        assert store.verify()[0].ok
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "features").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        FeatureStore.create(tmp_path / "features", RECIPE)
