"""The sampler: every group as often as the next, every cell of a group as often as the next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eosin.errors import CohortError, ConfigError
from eosin.finetune.sampler import balanced_weights, epoch_rows, sampling_groups

TABLES = st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abc")), min_size=2, max_size=60)


@given(TABLES, st.sampled_from(["shuffle", "class", "domain-class"]), st.integers(0, 5))
def test_groups_and_cells_are_shown_evenly(table: list[tuple[int, str]], sampling: str, epoch: int) -> None:
    label, domain = (np.array(column) for column in zip(*table, strict=True))
    groups = sampling_groups(label, domain, sampling=sampling)  # pyright: ignore[reportArgumentType]
    rows = epoch_rows(groups, seed=7, epoch=epoch)
    assert len(rows) == len(table)
    shown = np.bincount(groups[rows], minlength=groups.max() + 1)
    assert shown.max() - shown.min() <= 1
    times = np.bincount(rows, minlength=len(table))
    for group in range(groups.max() + 1):
        mine = times[groups == group]
        assert mine.max() - mine.min() <= 1
    assert (rows == epoch_rows(groups, seed=7, epoch=epoch)).all()


def test_shuffle_is_a_permutation_and_epochs_differ() -> None:
    groups = sampling_groups([0] * 50, ["a"] * 50, sampling="shuffle")
    first, second = (epoch_rows(groups, seed=0, epoch=epoch) for epoch in (0, 1))
    assert sorted(first) == list(range(50))
    assert (first != second).any()
    assert (first != epoch_rows(groups, seed=1, epoch=0)).any()


def test_rare_class_is_seen_whole_and_common_class_in_turns() -> None:
    label = np.array([1] * 10 + [0] * 90)
    groups = sampling_groups(label, ["a"] * 100, sampling="class")
    seen = np.zeros(100, dtype=int)
    for epoch in range(6):
        rows = epoch_rows(groups, seed=0, epoch=epoch)
        assert label[rows].sum() == 50
        seen += np.bincount(rows, minlength=100)
    assert (seen[:10] == 30).all()
    assert (seen[10:] > 0).sum() > 85  # 50 of 90 an epoch, at random: (4/9)^6 = 0.8 % are never seen in six


def test_groups_of_domain_and_class() -> None:
    groups = sampling_groups([0, 1, 0, 1], ["a", "a", "b", "a"], sampling="domain-class")
    assert groups.tolist() == [0, 1, 2, 1]


@given(TABLES, st.integers(0, 1000))
def test_weights_have_mean_one_over_what_is_shown(table: list[tuple[int, str]], seed: int) -> None:
    label, domain = (np.array(column) for column in zip(*table, strict=True))
    groups = sampling_groups(label, domain, sampling="class")
    raw = np.random.default_rng(seed).uniform(0.1, 5, len(table))
    weights = balanced_weights(raw, groups)
    # each class is half of an epoch (all of it, where there is one class), each row an equal share of its class
    expected = np.mean([weights[groups == group].mean() for group in range(groups.max() + 1)])
    assert expected == pytest.approx(1)
    assert weights / weights[0] == pytest.approx(raw / raw[0])


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="no sampling is called 'all'"):
        sampling_groups([0], ["a"], sampling="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(CohortError, match="one label and one domain a row"):
        sampling_groups([0, 1], ["a"], sampling="class")
