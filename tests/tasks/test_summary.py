"""The cohort table: counts stay whole, a failed slide beside good ones changes nothing of theirs."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest

from eosin.features.recipe import Recipe
from eosin.features.store import FeatureStore
from eosin.tasks.summary import cohort_summary, write_summary
from eosin.tiles.qc import REASONS

FOCUS = np.linspace(0, 1, 69, dtype=np.float32)


@pytest.fixture
def store(tmp_path):
    recipe = Recipe(
        encoder={"name": "tiny", "dim": 2},
        tile={"tile_px": 224, "mpp": 0.5},
        tissue={},
        qc={},
        stain=None,
        precision="fp32",
        dtype="float32",
        tokens=False,
        icc=False,
    )
    made = FeatureStore.create(tmp_path, recipe)
    meta = {"size_px": (100, 80), "mpp": {"x": 0.25, "y": 0.25, "source": "given"}, "fingerprint": "f"}
    with made.writer("good.svs", meta=meta) as writer:
        writer.append(np.ones((69, 2)), np.arange(138).reshape(69, 2), {"focus": FOCUS})
        writer.finish((FOCUS < 0.5).astype(np.int8), background_xy=[[1, 2]], background_tissue=[0.0])
    return made


def test_counts_stay_whole_beside_a_failed_slide(store):
    alone = cohort_summary(store)
    store.record_failure("bad.svs", "CorruptSlideError", "bad.svs: broken")
    table = cohort_summary(store)
    good, bad = table.iloc[0], table.iloc[1]
    assert (good["tiles"], good["kept"], good["background"], good["unreadable"]) == (
        69,
        int((FOCUS >= 0.5).sum()),
        1,
        0,
    )
    assert good[f"share_{REASONS[1]}"] == pytest.approx((FOCUS < 0.5).mean(), abs=1e-4)
    assert good["median_focus"] == pytest.approx(np.median(FOCUS), abs=1e-4)
    assert bad["failure"] == "bad.svs: broken"
    assert bad["tiles"] is pd.NA
    pd.testing.assert_series_equal(alone.iloc[0].dropna(), good.dropna())
    write_summary(store)
    lines = (store.path / "summary.csv").read_text().splitlines()
    assert lines[1].startswith("good.svs,69,")
    assert lines[2].startswith("bad.svs,,,,,")
    assert "<td>69</td>" in (store.path / "summary.html").read_text()


def test_features_are_not_read(store, monkeypatch):
    plain = h5py.Dataset.__getitem__

    def refusing(dataset, args, **options):
        assert dataset.name != "/features"
        return plain(dataset, args, **options)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", refusing)
    assert cohort_summary(store)["tiles"].tolist() == [69]


def test_no_slide_at_all(store):
    (store.path / "good.svs.h5").unlink()
    store.record_failure("bad.svs", "CorruptSlideError", "broken")
    write_summary(store)
    assert (store.path / "summary.csv").read_text().splitlines() == ["slide_id,failure", "bad.svs,broken"]
