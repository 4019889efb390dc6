"""Folds: whole slides, both classes, each cell tested once; and what cannot be laid out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cellgen import cell_table
from sklearn.model_selection import StratifiedGroupKFold

from eosin.errors import CohortError, LabelError
from eosin.finetune.cells import CellTable
from eosin.finetune.folds import plan_folds
from eosin.finetune.recipe import get_recipe


def many(slides: int = 30, each: int = 8, scanners: tuple[str, ...] = ("A", "B", "C")) -> CellTable:
    rng = np.random.default_rng(0)
    cells = cell_table(
        rng.permuted(np.tile([1, 1, *[0] * (each - 2)], (slides, 1)), axis=1).ravel().tolist(),
        slides=[f"s{slide:02d}" for slide in range(slides) for _ in range(each)],
    )
    scanner = np.array([scanners[slide % len(scanners)] for slide in range(slides) for _ in range(each)])
    return replace(cells, scanner=scanner, domain=scanner)


def test_every_cell_is_tested_once_and_no_slide_is_in_two_parts() -> None:
    cells = many()
    folds = plan_folds(cells, get_recipe("amf"))
    assert [fold.name for fold in folds] == [f"fold {i}" for i in range(1, 6)]
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(len(cells)))
    groups = cells.group_key()
    for fold in folds:
        parts = [set(groups[rows]) for rows in (fold.train, fold.stop, fold.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 30
        assert len(fold.train) + len(fold.stop) + len(fold.test) == len(cells)
        assert all(0 < cells.label[rows].mean() < 1 for rows in (fold.train, fold.stop, fold.test))
        assert 0.08 < len(fold.stop) / (len(fold.stop) + len(fold.train)) < 0.25


def test_as_even_as_scikit_learn() -> None:
    cells = many(40)
    ours = [cells.label[fold.test].mean() for fold in plan_folds(cells, get_recipe("amf"))]
    theirs = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(cells.file, cells.label, cells.group_key())
    assert np.std(ours) <= np.std([cells.label[test].mean() for _, test in theirs]) + 1e-12


def test_same_slide_name_in_two_sets_is_two_slides() -> None:
    cells = replace(many(), dataset=np.array(["one", "two"] * 120), patient_id=np.full(240, ""))
    assert len(np.unique(cells.group_key())) == 60


def test_seed_decides() -> None:
    cells = many()
    first, again = (plan_folds(cells, get_recipe("amf", seed=3)) for _ in range(2))
    other = plan_folds(cells, get_recipe("amf", seed=4))
    assert all((a.train == b.train).all() for a, b in zip(first, again, strict=True))
    assert any(a.test.tolist() != b.test.tolist() for a, b in zip(first, other, strict=True))


def test_leave_one_scanner_out() -> None:
    cells = many()
    folds = plan_folds(cells, get_recipe("amf", leave_out="scanner"))
    assert [fold.name for fold in folds] == ["scanner A", "scanner B", "scanner C"]
    for fold, scanner in zip(folds, "ABC", strict=True):
        assert set(cells.scanner[fold.test]) == {scanner}
        assert scanner not in cells.scanner[np.concatenate([fold.train, fold.stop])]


def test_slide_of_two_scanners_is_not_trained_on_while_it_is_tested() -> None:
    cells = many()
    scanner = cells.scanner.copy()
    scanner[:4] = "B"  # half of slide s00, the rest of which is of scanner A
    folds = plan_folds(replace(cells, scanner=scanner), get_recipe("amf", leave_out="scanner"))
    assert "4 cells of slides that are also tested" in folds[0].note
    assert not np.isin(np.arange(8), np.concatenate([folds[0].train, folds[0].stop, folds[1].train])).any()


def test_domain_of_one_class_is_said() -> None:
    cells = many()
    label = np.where(cells.scanner == "B", 0, cells.label).astype(np.int8)
    folds = plan_folds(replace(cells, label=label), get_recipe("amf", leave_out="scanner"))
    assert "only normal cells: no balanced accuracy" in folds[1].note
    assert folds[0].note == ""


def test_class_missing_in_a_fold() -> None:
    cells = many()
    label = np.zeros(len(cells), dtype=np.int8)
    label[:16] = 1  # two slides
    with pytest.raises(LabelError, match=r"5 folds of whole slides.*'atypical' lies in 2.*at most 2 folds"):
        plan_folds(replace(cells, label=label), get_recipe("amf"))
    with pytest.raises(LabelError, match="cannot give up a share"):
        plan_folds(replace(cells, label=label), get_recipe("amf", folds=2))


@pytest.mark.parametrize(("value", "name"), [(0, "atypical"), (1, "normal")])
def test_class_missing_at_all(value: int, name: str) -> None:
    cells = many()
    with pytest.raises(LabelError, match=f"is {name}; both classes"):
        plan_folds(replace(cells, label=np.full(len(cells), value, dtype=np.int8)), get_recipe("amf"))


def test_domains_that_cannot_be_left_out() -> None:
    cells = many(scanners=("A",))
    with pytest.raises(CohortError, match="every cell has the scanner 'A'"):
        plan_folds(cells, get_recipe("amf", leave_out="scanner"))
    with pytest.raises(CohortError, match="240 of 240 cells have no tumour"):
        plan_folds(cells, get_recipe("amf", leave_out="tumour"))
