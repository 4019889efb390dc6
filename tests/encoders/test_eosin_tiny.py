"""The encoder that comes with eosin: it loads without a network, is the one that was measured, and tells tissue."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eosin
from eosin.cohort import grouped_kfold
from eosin.encoders import hub
from eosin.evaluation.metrics import auroc
from eosin.heads import KnnHead

HASH = "c48d08028961074dc5615b460a6b5675019dec2bc9667dd8aed8eee52fd5a4ad"


def test_it_loads_without_network_and_is_the_one_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch", lambda *_args, **_named: pytest.fail("the hub was asked"))
    encoder = eosin.load_encoder("eosin-tiny", device="cpu", backend="torch", precision="fp32")
    assert encoder.spec.weights_hash == HASH
    tiles = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    features = encoder.encode(tiles)
    assert features.shape == (3, encoder.spec.dim)
    assert np.allclose(features[1:2], encoder.encode(tiles[1:2]), atol=1e-5)


def test_the_registry_says_what_the_file_holds() -> None:
    encoder = eosin.load_encoder("eosin-tiny", device="cpu", backend="torch", precision="fp32")
    path = Path(eosin.__file__).parent / "encoders" / "eosin-tiny.safetensors"
    same = eosin.load_encoder(path, device="cpu", backend="torch", precision="fp32")
    assert path.stat().st_size < 25e6
    assert same.spec.weights_hash == encoder.spec.weights_hash
    assert same.spec.mean == encoder.spec.mean
    assert same.spec.registers == encoder.spec.registers
    tiles = np.random.default_rng(1).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    assert np.array_equal(same.encode(tiles), encoder.encode(tiles))


@pytest.mark.real
@pytest.mark.slow
def test_neighbours_tell_atypical_mitoses_better_than_chance_and_shuffled_labels(real_data: Path) -> None:
    with (real_data / "tiles" / "amf" / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "midog21"]
    pixels = np.stack([np.asarray(Image.open(real_data / "tiles" / "amf" / r["file"]).convert("RGB")) for r in rows])
    y, slide = np.array([int(r["atypical"]) for r in rows]), np.array([r["slide_id"] for r in rows])
    x = np.asarray(eosin.load_encoder("eosin-tiny", device="cpu").encode(pixels))
    x = (x - x.mean(axis=0)) / x.std(axis=0)

    def told(labels: np.ndarray) -> float:
        scores = np.zeros(len(labels))
        for split in grouped_kfold(labels, groups=slide, folds=5):
            head = KnnHead(k_grid=(20,)).fit(x[split.train], labels[split.train])
            scores[split.test] = head.predict_proba(x[split.test])[:, 1]
        return auroc(labels, scores)

    assert told(y) > 0.58
    shuffled = [told(np.random.default_rng(seed).permutation(y)) for seed in range(6)]
    assert abs(np.mean(shuffled) - 0.5) < 0.05
