"""Splits: patients whole, classes shared out, checked against scikit-learn and brute force."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from eosin.cohort import (
    Cohort,
    Split,
    check_split,
    external,
    from_column,
    grouped_kfold,
    leave_one_site_out,
    load_splits,
    preserved_site,
    read_cohort,
    save_splits,
    temporal,
)
from eosin.cohort.balance import assign_groups, class_counts, imbalance
from eosin.errors import CohortError, LabelError


def clustered(seed: int, patients: int = 60, most: int = 20, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels and patients with sizes 1..most and a prevalence of their own."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(patients), rng.integers(1, most + 1, patients))
    tilt = rng.dirichlet(np.full(classes, 1.5), patients)
    y = np.array([rng.choice(classes, p=tilt[g]) for g in group])
    return y, group


def worst_share(y: np.ndarray, tests: list[np.ndarray]) -> float:
    """Largest deviation of a fold's class share from the class share of all rows."""
    whole = np.bincount(y) / len(y)
    return max(float(np.abs(np.bincount(y[t], minlength=len(whole)) / len(t) - whole).max()) for t in tests)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("classes", [2, 4])
def test_kfold_balances_at_least_as_well_as_scikit_learn(seed: int, classes: int) -> None:
    y, group = clustered(seed, classes=classes)
    ours = [split.test for split in grouped_kfold(y, groups=group, folds=5, seed=seed)]
    theirs = [t for _, t in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(y, y, group)]
    assert worst_share(y, ours) <= max(worst_share(y, theirs), 0.03)
    sizes = [len(t) for t in ours]
    assert max(sizes) - min(sizes) <= max(max(map(len, theirs)) - min(map(len, theirs)), 0.05 * len(y))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    patients=st.integers(4, 40),
    folds=st.integers(2, 4),
    val=st.sampled_from([0.0, 0.25]),
    classes=st.integers(2, 3),
)
def test_kfold_properties(seed: int, patients: int, folds: int, val: float, classes: int) -> None:
    y, group = clustered(seed, patients=patients, most=6, classes=classes)
    assume(len(np.unique(y)) == classes)
    try:
        splits = grouped_kfold(y, groups=group, folds=folds, seed=seed, val=val, repeats=2)
    except CohortError:
        held = [len(np.unique(group[y == c])) for c in range(classes)]
        assert val or min(held) < 2 * folds  # without validation, refused only where a class is truly rare
        return
    assert len(splits) == 2 * folds
    for split in splits:
        parts = [set(group[part]) for part in (split.train, split.val, split.test)]
        assert not [a for a, b in itertools.combinations(parts, 2) if a & b]
        assert np.array_equal(np.sort(np.concatenate([split.train, split.val, split.test])), np.arange(len(y)))
        assert all(len(np.unique(y[part])) == classes for part in (split.train, split.test))
        assert bool(len(split.val)) == (val > 0)
    for repeat in (splits[:folds], splits[folds:]):
        assert np.array_equal(np.sort(np.concatenate([s.test for s in repeat])), np.arange(len(y)))


def test_seeds_and_repeats_change_the_layout_and_nothing_else_does() -> None:
    y, group = clustered(1)
    first = grouped_kfold(y, groups=group, repeats=2, seed=3)
    again = grouped_kfold(y, groups=group, repeats=2, seed=3)
    assert all(np.array_equal(a.test, b.test) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].test, first[5].test)
    assert not np.array_equal(first[0].test, grouped_kfold(y, groups=group, seed=4)[0].test)
    assert [s.name for s in first][4:6] == ["repeat 1, fold 5", "repeat 2, fold 1"]
    # Which patients share a fold must vary too, the largest ones included.
    big = np.argsort(-np.bincount(group))[:2]
    together = []
    for seed in range(30):
        folds = grouped_kfold(y, groups=group, seed=seed)
        together.append(any(set(big) <= set(group[s.test]) for s in folds))
    assert 0 < sum(together) < 30


def test_one_patient_a_row_is_ordinary_stratified_kfold() -> None:
    y = np.r_[np.zeros(80, int), np.ones(20, int)]
    for split in grouped_kfold(y, groups=np.arange(100), folds=5):
        assert len(split.test) == 20
        assert y[split.test].sum() == 4


def test_validation_part_is_near_the_share_asked_for_and_stratified() -> None:
    y, group = clustered(5, patients=200)
    for split in grouped_kfold(y, groups=group, folds=5, val=0.2):
        rest = len(split.train) + len(split.val)
        assert abs(len(split.val) / rest - 0.2) < 0.02
        assert abs(y[split.val].mean() - y.mean()) < 0.03


def test_too_few_positives_are_counted_in_the_error() -> None:
    y = np.r_[np.zeros(50, int), 1, 1, 1, 1]
    group = np.r_[np.arange(50), 50, 50, 51, 52]
    with pytest.raises(
        LabelError, match=r"class '1' lies in 3 patients, 5 parts need at least 5 \('0' in 50, '1' in 3"
    ):
        grouped_kfold(y, groups=group, folds=5)
    with pytest.raises(LabelError, match="use at most 3 folds"):
        grouped_kfold(y, groups=group, folds=5)
    with pytest.raises(LabelError, match="this class cannot be tested by folds"):
        grouped_kfold(y, groups=np.where(group >= 50, 50, group), folds=2)
    assert len(grouped_kfold(y, groups=group, folds=3)) == 3
    with pytest.raises(LabelError, match=r"no row of class '1' in (train|val)"):
        grouped_kfold(y, groups=np.where(group > 50, 51, group), folds=2, val=0.3)


def test_other_bad_input_to_kfold() -> None:
    y, group = clustered(0)
    with pytest.raises(LabelError, match="1 class; two are needed"):
        grouped_kfold(np.ones(9, int), groups=np.arange(9))
    with pytest.raises(CohortError, match="labels without a cohort need the patient"):
        grouped_kfold(y)
    with pytest.raises(CohortError, match=r"shape \(4,\)"):
        grouped_kfold(y, groups=np.arange(4))
    with pytest.raises(CohortError, match="1 folds"):
        grouped_kfold(y, groups=group, folds=1)
    with pytest.raises(CohortError, match="val is 1"):
        grouped_kfold(y, groups=group, val=1.0)
    cohort = read_cohort(pd.DataFrame({"slide_id": ["a", "b"], "label": [0, 1]}))
    with pytest.raises(CohortError, match="say which column"):
        grouped_kfold(cohort)


@pytest.mark.parametrize("seed", range(8))
def test_whole_sites_are_laid_out_as_well_as_brute_force_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 60, (8, 2)).astype(float)
    shares = np.full(3, 1 / 3)
    layouts = np.array(list(itertools.product(range(3), repeat=8)))
    least = min(imbalance(counts, part, shares) for part in layouts if len(np.unique(part)) == 3)
    chance = np.median([imbalance(counts, part, shares) for part in layouts[::50]])
    found = assign_groups(counts, shares, rng=rng, restarts=64, spread=0.01)
    assert imbalance(counts, found, shares) <= least + 0.005 * chance


def test_imbalance_by_hand() -> None:
    counts = np.array([[1.0, 2.0], [3.0, 2.0]])
    assert imbalance(counts, np.array([0, 1]), np.array([0.5, 0.5])) == pytest.approx(2 * 0.25**2)
    assert imbalance(counts, np.array([0, 0]), np.array([1.0, 0.0])) == 0
    assert class_counts(np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1])).tolist() == [[1, 1], [1, 1]]


def sites_cohort(seed: int = 0, sites: int = 9) -> Cohort:
    rng = np.random.default_rng(seed)
    rows = []
    for site in range(sites):
        for patient in range(rng.integers(4, 30)):
            for tile in range(rng.integers(1, 4)):
                name = f"p{site}-{patient}"
                rows.append(
                    (f"{name}.svs", name, f"site {site}", int(rng.random() < 0.2 + 0.05 * site), f"{name}-{tile}")
                )
    return read_cohort(pd.DataFrame(rows, columns=["slide_id", "patient_id", "site", "label", "file"]), label="label")


def test_preserved_site_keeps_sites_whole_and_beats_chance() -> None:
    cohort = sites_cohort()
    site = cohort.site()
    y, _ = cohort.labels("label")
    splits = preserved_site(cohort, label="label", folds=3, val=0.2)
    for split in splits:
        parts = [set(site[part]) for part in (split.train, split.val, split.test)]
        assert not [a for a, b in itertools.combinations(parts, 2) if a & b]
        assert len(parts[1])
    assert np.array_equal(np.sort(np.concatenate([s.test for s in splits])), np.arange(len(y)))
    counts = class_counts(y, np.unique(site, return_inverse=True)[1])
    shares = np.full(3, 1 / 3)
    fold_of = {name: fold for fold, split in enumerate(splits) for name in site[split.test].tolist()}
    found = imbalance(counts, np.array([fold_of[name] for name in np.unique(site).tolist()]), shares)
    rng = np.random.default_rng(1)
    chance = [imbalance(counts, rng.permutation(np.arange(9) % 3), shares) for _ in range(500)]
    assert found <= np.min(chance)


def test_preserved_site_refuses_what_cannot_be() -> None:
    cohort = sites_cohort(sites=2)
    with pytest.raises(LabelError, match="lies in 2 levels of 'site', 3 parts need at least 3"):
        preserved_site(cohort, label="label", folds=3)
    frame = cohort.table.copy()
    frame.loc[frame["patient_id"] == "p0-0", "patient_id"] = "p1-0"
    moved = read_cohort(frame)
    with pytest.raises(CohortError, match=r"1 patients have more than one 'site' \(p1-0\)"):
        preserved_site(moved, label="label", folds=2)


def test_leaving_sites_out_tests_each_site_once() -> None:
    cohort = sites_cohort()
    splits = leave_one_site_out(cohort, label="label", val=0.2)
    assert [s.name for s in splits] == [f"site site {i}" for i in range(9)]
    for split in splits:
        assert len(set(cohort.site()[split.test])) == 1
        assert set(cohort.site()[split.test]).isdisjoint(cohort.site()[split.train])
        assert not set(cohort.group_key()[split.train]) & set(cohort.group_key()[split.val])
    with pytest.raises(CohortError, match="two are needed to leave one out"):
        leave_one_site_out(cohort.take(cohort.site() == "site 1"))


def test_leaving_out_the_only_site_with_positives_is_refused() -> None:
    frame = pd.DataFrame({"slide_id": list("abcd"), "site": list("xxyy"), "label": [0, 1, 0, 0]})
    with pytest.raises(LabelError, match="'site x': no row of class '1' is left to train"):
        leave_one_site_out(read_cohort(frame), label="label")


def dated() -> Cohort:
    dates = ["2019-01-01", "2019-06-30T18:00", "2020-01-01", "2020-02-01", "2021-01-01"]
    return read_cohort(
        pd.DataFrame({"slide_id": list("abcde"), "patient_id": list("pqrps"), "date": dates, "label": [0, 1, 0, 1, 1]})
    )


def test_a_temporal_split_includes_its_last_day_and_meets_returning_patients() -> None:
    with pytest.raises(CohortError, match=r"1 patients are in two parts \(p in train and test\)"):
        temporal(dated(), until="2019-06-30")
    (split,) = temporal(dated(), until="2019-06-30", shared="drop")
    assert split.train.tolist() == [0, 1]
    assert split.test.tolist() == [2, 4]
    assert split.note == "1 rows of 1 patients on both sides are left out"
    with pytest.raises(CohortError, match="the test part is empty"):
        temporal(dated(), until="2030-01-01")
    with pytest.raises(CohortError, match="'soon' is not a date"):
        temporal(dated(), until="soon")
    with pytest.raises(CohortError, match="no column 'date'"):
        temporal(sites_cohort(), until="2020-01-01")


def test_an_external_set_is_tested_whole() -> None:
    cohort = sites_cohort()
    (split,) = external(cohort, column="site", value=["site 1", "site 2"], val=0.1, label="label")
    assert set(cohort.site()[split.test]) == {"site 1", "site 2"}
    assert len(split.test) == np.isin(cohort.site(), ["site 1", "site 2"]).sum()
    with pytest.raises(CohortError, match="'site' is never 'site 99'"):
        external(cohort, column="site", value="site 99")


def test_external_drops_training_rows_of_shared_patients_when_told_to() -> None:
    frame = pd.DataFrame({"slide_id": list("abcd"), "patient_id": list("pqpr"), "site": list("xxyy")})
    with pytest.raises(CohortError, match="p in train and test"):
        external(read_cohort(frame), column="site", value="y")
    (split,) = external(read_cohort(frame), column="site", value="y", shared="drop")
    assert (split.train.tolist(), split.test.tolist()) == ([1], [2, 3])


def test_a_split_column_is_read_in_usual_words() -> None:
    frame = pd.DataFrame(
        {"slide_id": list("abcde"), "split": ["Train", "training", "VAL", "test", "none"], "label": [0, 1, 0, 1, 1]}
    )
    (split,) = from_column(read_cohort(frame))
    assert (split.train.tolist(), split.val.tolist(), split.test.tolist()) == ([0, 1], [2], [3])
    assert split.note == "1 rows are marked as unused"
    frame["split"] = ["train", "train", "later", "test", "test"]
    with pytest.raises(CohortError, match="row 4: split 'later' is none of train, training"):
        from_column(read_cohort(frame))
    frame["split"] = ["train", "train", "train", "test", "test"]
    frame["patient_id"] = ["p", "q", "r", "p", "s"]
    with pytest.raises(CohortError, match=r"1 patients are in two parts \(p in train and test\)"):
        from_column(read_cohort(frame))


def test_check_split_sees_overlap_and_range() -> None:
    def split(train: list[int], val: list[int], test: list[int]) -> Split:
        parts = {"train": train, "val": val, "test": test}
        return Split(name="s", **{name: np.array(rows, dtype=np.int64) for name, rows in parts.items()})

    groups = np.array(["a", "b", "c", "d"])
    check_split(split([0, 1], [2], [3]), groups)
    with pytest.raises(CohortError, match="1 rows are in two parts"):
        check_split(split([0, 1], [1], [3]), groups)
    with pytest.raises(CohortError, match=r"0\.\.4 for 4 rows"):
        check_split(split([0], [], [4]), groups)
    with pytest.raises(CohortError, match="the train part is empty"):
        check_split(split([], [], [1]), groups)
    with pytest.raises(CohortError, match="a in train and val"):
        check_split(split([0], [1], [2]), np.array(["a", "a", "b"]))


def test_saved_splits_come_back_and_survive_another_row_order(tmp_path: Path) -> None:
    cohort = sites_cohort()
    splits = grouped_kfold(cohort, label="label", val=0.2, repeats=2)
    save_splits(tmp_path / "s.json", splits, cohort)
    for again, split in zip(load_splits(tmp_path / "s.json", cohort), splits, strict=True):
        assert (again.name, again.note) == (split.name, split.note)
        for part in ("train", "val", "test"):
            assert np.array_equal(getattr(again, part), getattr(split, part))
    order = np.random.default_rng(0).permutation(len(cohort))
    mixed = read_cohort(cohort.table.iloc[order].assign(score=0.5))  # another order, one more column
    ids, mixed_ids = cohort.row_ids(), mixed.row_ids()
    for again, split in zip(load_splits(tmp_path / "s.json", mixed), splits, strict=True):
        assert set(mixed_ids[again.test]) == set(ids[split.test])
        assert np.array_equal(again.test, np.sort(again.test))


def test_a_changed_table_is_refused_by_name(tmp_path: Path) -> None:
    cohort = sites_cohort()
    path = tmp_path / "s.json"
    save_splits(path, grouped_kfold(cohort, label="label"), cohort)
    flipped = cohort.table.copy()
    flipped.iloc[5, flipped.columns.get_loc("label")] ^= 1
    with pytest.raises(CohortError, match="has changed since these splits were made, in label;"):
        load_splits(path, read_cohort(flipped))
    with pytest.raises(CohortError, match="in site;"):
        load_splits(path, read_cohort(cohort.table.drop(columns="site")))
    with pytest.raises(CohortError, match=f"made for {len(cohort)} rows .* has {len(cohort) - 1}"):
        load_splits(path, cohort.take(np.arange(len(cohort) - 1)))


def test_a_damaged_or_edited_file_is_refused(tmp_path: Path) -> None:
    cohort = sites_cohort()
    path = tmp_path / "s.json"
    save_splits(path, grouped_kfold(cohort, label="label"), cohort)
    document = json.loads(path.read_text())
    document["splits"][0]["test"].append(document["splits"][0]["train"][0])
    path.write_text(json.dumps(document))
    with pytest.raises(CohortError, match="rows are in two parts"):
        load_splits(path, cohort)
    document["splits"][0]["test"] = ["never seen"]
    path.write_text(json.dumps(document))
    with pytest.raises(CohortError, match="'never seen' is missing or not in the cohort"):
        load_splits(path, cohort)
    for text in ("{", "[]", '{"format": "other"}', '{"format": "eosin-splits", "version": 1}'):
        path.write_text(text)
        with pytest.raises(CohortError, match=r"s\.json: (cannot be read|is not an eosin-splits|damaged)"):
            load_splits(path, cohort)
    with pytest.raises(CohortError, match="2 splits with 1 names"):
        save_splits(path, [grouped_kfold(cohort, label="label")[0]] * 2, cohort)
