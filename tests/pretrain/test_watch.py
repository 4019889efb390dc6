from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import trainer_runs
from torchmetrics.functional import pairwise_cosine_similarity

from eosin.pretrain import watch


def test_cosine_is_the_mean_over_pairs_of_different_images() -> None:
    cls = torch.randn(17, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = pairwise_cosine_similarity(cls, zero_diagonal=True).sum() / (17 * 16)
    assert watch.feature_monitors(cls)["cosine"] == pytest.approx(float(expected), abs=1e-6)


def test_equal_features_have_no_spread_and_one_dimension() -> None:
    found = watch.feature_monitors(torch.ones(8, 16))
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["feature_std"] == pytest.approx(0, abs=1e-6)
    assert found["rankme"] == pytest.approx(1, abs=1e-3)


def test_features_on_the_sphere_spread_as_one_and_rankme_counts_directions() -> None:
    wide = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    assert watch.feature_monitors(wide)["feature_std"] == pytest.approx(1, abs=0.02)
    assert watch.feature_monitors(torch.eye(6, 32))["rankme"] == pytest.approx(6, rel=1e-3)


def test_rankme_is_the_entropy_of_singular_values() -> None:
    cls = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    values = np.linalg.svd(cls.double().numpy(), compute_uv=False)
    expected = math.exp(scipy.stats.entropy(values / values.sum()))
    assert watch.feature_monitors(cls)["rankme"] == pytest.approx(expected, rel=1e-4)


def test_entropies_of_targets_are_scipys() -> None:
    p = torch.rand(10, 7, generator=torch.Generator().manual_seed(3)).softmax(dim=1)
    found = watch.target_monitors(p)
    mean = p.mean(dim=0)
    assert found["teacher_entropy"] == pytest.approx(scipy.stats.entropy(mean) / math.log(7), abs=1e-5)
    each = scipy.stats.entropy(p.numpy(), axis=1).mean()
    assert found["target_entropy"] == pytest.approx(each / math.log(7), abs=1e-5)
    divergence = scipy.stats.entropy(p.numpy(), mean.numpy()[None], axis=1).mean()
    assert found["information"] == pytest.approx(divergence / math.log(7), abs=1e-5)


def test_a_prototype_for_every_image_is_all_information_and_one_for_all_is_none() -> None:
    assert watch.target_monitors(torch.eye(8))["information"] == pytest.approx(1)
    assert watch.target_monitors(torch.eye(8))["prototypes"] == 8
    same = torch.zeros(8, 8)
    same[:, 3] = 1
    assert watch.target_monitors(same)["information"] == pytest.approx(0)
    assert watch.target_monitors(same)["prototypes"] == 1
    uniform = watch.target_monitors(torch.full((8, 8), 1 / 8))
    assert (uniform["information"], uniform["target_entropy"]) == (pytest.approx(0, abs=1e-6), pytest.approx(1))


def healthy(**changes: float) -> dict[str, float]:
    return {"cosine": 0.2, "feature_std": 0.8, "information": 0.5, "target_entropy": 0.4, "prototypes": 20} | changes


def test_collapse_needs_three_logged_steps_in_a_row() -> None:
    bad = healthy(feature_std=0.001, cosine=0.9999)
    assert watch.collapse_of([healthy(), bad, bad], settled=True) is None
    assert watch.collapse_of([bad, bad, healthy(), bad], settled=True) is None
    words = watch.collapse_of([healthy(), bad, bad, bad], settled=False)
    assert words is not None
    assert "same features" in words


def test_an_untrained_encoder_is_given_time() -> None:
    new = healthy(feature_std=0.01, information=1e-5, target_entropy=0.999)
    assert watch.collapse_of([new] * 9, settled=False) is None
    assert watch.collapse_of([new] * 9, settled=True) is not None


def test_one_prototype_for_all_is_a_collapse_and_a_uniform_target_a_warning() -> None:
    one = [healthy(information=1e-5, target_entropy=0.0, prototypes=1)] * 3
    words = watch.collapse_of(one, settled=True)
    assert words is not None
    assert "1 prototype" in words
    assert watch.flat_of(one, settled=True) is None
    flat = [healthy(information=1e-5, target_entropy=0.999)] * 3
    assert watch.collapse_of(flat, settled=True) is None
    assert watch.flat_of(flat, settled=False) is None
    told = watch.flat_of(flat, settled=True)
    assert told is not None
    assert "log K" in told
    assert watch.flat_of([healthy()] * 3, settled=True) is None


def test_the_error_names_what_to_change(tmp_path: Path) -> None:
    config = trainer_runs.small(tmp_path / "x.npy", run__batch=6)
    text = str(watch.collapse_error(config, 70, "all alike", "The checkpoint of step 50 is whole"))
    for words in ("step 70", "optimizer.lr", "objective.kde (now 0.05)", "run.batch (now 6)", "step 50 is whole"):
        assert words in text


def test_a_resumed_log_forgets_what_will_be_made_again(tmp_path: Path) -> None:
    first = watch.Log(tmp_path, step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step)})
    first.close()
    with (tmp_path / watch.METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    again = watch.Log(tmp_path, step=2)
    again.write({"step": 3, "loss": 30.0})
    again.close()
    assert [row["loss"] for row in watch.read_log(tmp_path)] == [1.0, 2.0, 30.0]


def test_the_log_holds_no_nan(tmp_path: Path) -> None:
    log = watch.Log(tmp_path, step=0)
    with pytest.raises(ValueError, match="JSON compliant"):
        log.write({"step": 1, "loss": math.nan})
    log.close()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = watch.Log(tmp_path, step=0)
    log.write({"step": 5, "loss": 2.5, "monitors": {"cosine": 0.25}})
    log.close()
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(one.step, one.value) for one in board.Scalars("monitors/cosine")] == [(5, 0.25)]
    assert json.loads((tmp_path / watch.METRICS).read_text())["loss"] == 2.5
