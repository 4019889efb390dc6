"""Robustness to a confounder: brute force, planted truths, and real tiles whose scanner shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from eosin.errors import CohortError, LabelError, NonFiniteError
from eosin.evaluation.confounded import probe_sweep
from eosin.evaluation.robustness import encoder_robustness, neighbours, weighted_median


def planted(
    biology: float,
    scanner: float,
    *,
    seed: int = 0,
    labels: int = 2,
    scanners: int = 2,
    groups: int = 12,
    rows: int = 3,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Features where label and scanner each push along their own axes, with noise of 1, and their table."""
    rng = np.random.default_rng(seed)
    cells = [(y, s, g) for y in range(labels) for s in range(scanners) for g in range(groups) for _ in range(rows)]
    y, s, g = np.array(cells).T
    x = rng.normal(size=(len(cells), 12))
    x[np.arange(len(x)), y] += biology
    x[np.arange(len(x)), labels + s] += scanner
    group = [f"slide {a}-{b}-{c}" for a, b, c in zip(y, s, g, strict=True)]
    table = pd.DataFrame(
        {"label": [f"class {a}" for a in y], "scanner": [f"scanner {b}" for b in s], "group_id": group}
    )
    return x, table


def brute_ri(x: np.ndarray, table: pd.DataFrame, k: int) -> float:
    """Robustness index straight from its definition, one sample at a time."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    label, scanner, group = (table[name].to_numpy() for name in ("label", "scanner", "group_id"))
    so = os = 0
    for i in range(len(x)):
        others = np.flatnonzero(group != group[i])
        nearest = others[np.argsort(-(unit[others] @ unit[i]))[:k]]
        same_label, same_scanner = label[nearest] == label[i], scanner[nearest] == scanner[i]
        so += int((same_label & ~same_scanner).sum())
        os += int((~same_label & same_scanner).sum())
    return so / (so + os)


def brute_margin(x: np.ndarray, table: pd.DataFrame, m: int = 5) -> np.ndarray:
    """Margins of CRoMa straight from their definition."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    label, scanner, group = (table[name].to_numpy() for name in ("label", "scanner", "group_id"))
    margins = []
    for i in range(len(x)):
        distance, free = 1 - unit @ unit[i], group != group[i]
        so = np.sort(distance[free & (label == label[i]) & (scanner != scanner[i])])[:m].mean()
        os = np.sort(distance[free & (label != label[i]) & (scanner == scanner[i])])[:m].mean()
        margins.append((os - so) / (os + so))
    return np.array(margins)


@pytest.mark.parametrize("seed", range(3))
def test_index_and_margin_equal_brute_force(seed: int) -> None:
    x, table = planted(1.5, 1.0, seed=seed, labels=3, scanners=2)
    found = encoder_robustness(x, table, confounder="scanner", iterations=0, resamples=100)
    assert found.ri.point == pytest.approx(brute_ri(x, table, found.k))
    margins = brute_margin(x, table)
    assert found.croma is not None
    assert found.croma.point == pytest.approx(np.median(margins))
    assert found.croma_lost == pytest.approx((margins <= 0).mean())
    assert found.croma_tail == pytest.approx(margins[margins <= np.quantile(margins, 0.1)].mean())
    assert found.ri.low < found.ri.point < found.ri.high
    assert not any("tied" in note for note in found.notes), "the index of croma and the plain count must agree"


def test_biology_without_scanner_is_robust_and_the_reverse_is_not() -> None:
    good, bad = (
        encoder_robustness(*planted(*push), confounder="scanner", iterations=2, resamples=50)
        for push in ((6.0, 0.0), (0.0, 6.0))
    )
    assert good.ri.point > 0.95
    assert bad.ri.point < 0.05
    assert good.mari > 0.95
    assert bad.mari < 0.05
    assert good.croma is not None
    assert bad.croma is not None
    assert good.croma.low > 0 > bad.croma.high
    assert (good.biology, bad.confounded) == (1, 1)
    assert bad.biology < 0.65
    assert good.drop is not None
    assert abs(good.drop.apd) < 0.02


def test_neither_pushes_neither_wins() -> None:
    found = encoder_robustness(*planted(0, 0, groups=40), confounder="scanner", iterations=0, resamples=200)
    assert found.ri.low < 0.5 < found.ri.high
    assert found.biology == pytest.approx(0.5, abs=0.08)
    assert (found.biology_chance, found.confounded_chance) == (0.5, 0.5)


def test_tiles_of_one_slide_are_no_evidence() -> None:
    """Tiles of a slide are nearly equal; were they counted, biology would look perfect."""
    rng = np.random.default_rng(0)
    x, table = planted(0, 0, groups=10, rows=1)
    x, table = np.repeat(x, 5, axis=0) + 1e-3 * rng.normal(size=(200, 12)), table.loc[np.repeat(table.index, 5)]
    found = encoder_robustness(x, table, confounder="scanner", iterations=0, resamples=20)
    assert found.biology < 0.7
    nearest, valid = neighbours(x, pd.factorize(table["group_id"])[0].astype(np.int64), 7)
    assert valid.all()
    assert (table["group_id"].to_numpy()[nearest] != table["group_id"].to_numpy()[:, None]).all()


def test_support_and_cells_are_counted() -> None:
    x, table = planted(6, 6, groups=8)
    found = encoder_robustness(x, table, confounder="scanner", iterations=0, resamples=20, k_candidates=(5,))
    assert found.support < 0.2, "neighbours share label and scanner, which says nothing"
    assert any("thin" in note for note in found.notes)
    assert found.cells[["n", "groups"]].to_numpy().tolist() == [[24, 8]] * 4
    assert (found.n, found.groups) == (96, 32)


def test_a_cell_that_is_empty_leaves_out_what_cannot_be_said() -> None:
    x, table = planted(2, 1)
    keep = ~((table["label"] == "class 1") & (table["scanner"] == "scanner 1")).to_numpy()
    found = encoder_robustness(x[keep], table[keep], confounder="scanner", resamples=20)
    assert found.croma is None
    assert found.drop is None
    assert [note.split(" left out")[0] for note in found.notes if "left out" in note] == ["APD", "CRoMa"]
    assert found.cells["n"].min() == 0
    json.dumps(found.to_dict(), allow_nan=False)


def test_result_is_plain_and_repeatable() -> None:
    x, table = planted(2, 1, rows=2)
    results = [
        encoder_robustness(x, table, confounder="scanner", iterations=2, resamples=30, seed=5).to_dict()
        for _ in range(2)
    ]
    assert json.dumps(results[0], allow_nan=False) == json.dumps(results[1], allow_nan=False)
    assert results[0]["drop"]["table"][0]["cramers_v"] == 0


def test_order_of_rows_and_length_of_features_do_not_matter() -> None:
    x, table = planted(2, 1)
    order = np.random.default_rng(1).permutation(len(x))
    plain, changed = (
        encoder_robustness(a, b, confounder="scanner", iterations=0, resamples=40)
        for a, b in ((x, table), (5 * x[order], table.iloc[order]))
    )
    assert plain.ri.point == changed.ri.point
    assert plain.ri.low == changed.ri.low
    assert plain.mari == pytest.approx(changed.mari)


def test_a_probe_that_can_cheat_is_caught() -> None:
    """Weak biology beside a loud scanner: the tied training set teaches the scanner."""
    x, table = planted(1.5, 8, groups=20, rows=4, seed=3)
    codes = [pd.factorize(table[name])[0].astype(np.int64) for name in ("label", "scanner", "group_id")]
    found = probe_sweep(x, *codes, iterations=3)
    assert found.table["cramers_v"].iloc[0] == 0
    assert found.table["cramers_v"].iloc[-1] == pytest.approx(1)
    assert found.table["cramers_v"].is_monotonic_increasing
    assert found.apd < -0.05
    assert found.nipd is not None
    assert found.nipd < -0.1
    means = found.table["accuracy"].to_numpy()
    assert means[-1] < means[0] - 0.15
    assert found.rows_per_group == 4


@pytest.mark.parametrize(("labels", "scanners"), [(2, 3), (3, 2), (3, 3)])
def test_sweep_takes_any_number_of_labels_and_scanners(labels: int, scanners: int) -> None:
    x, table = planted(3, 3, labels=labels, scanners=scanners, groups=24, rows=2)
    codes = [pd.factorize(table[name])[0].astype(np.int64) for name in ("label", "scanner", "group_id")]
    found = probe_sweep(x, *codes, iterations=2)
    assert found.table["cramers_v"].iloc[[0, -1]].tolist() == pytest.approx([0, 1])
    assert found.table["accuracy"].iloc[0] > found.table["accuracy"].iloc[-1]


def test_slides_with_both_labels_serve_for_one_only() -> None:
    x, table = planted(3, 1, groups=30, rows=2)
    number = table["group_id"].str.split("-").str[-1]
    table["group_id"] = table["scanner"] + number
    codes = [pd.factorize(table[name])[0].astype(np.int64) for name in ("label", "scanner", "group_id")]
    found = probe_sweep(x, *codes, iterations=2)
    assert found.training_groups <= 15, "60 slides, two cells a scanner: 15 each, some of them for the test"


def test_a_probe_at_chance_has_nothing_to_lose() -> None:
    x, table = planted(0, 3, groups=16, rows=1)
    x[:] = x[0]
    codes = [pd.factorize(table[name])[0].astype(np.int64) for name in ("label", "scanner", "group_id")]
    found = probe_sweep(x, *codes, iterations=1)
    assert found.nipd is None
    assert "at chance" in found.note
    assert probe_sweep(planted(6, 0, groups=16, rows=1)[0], *codes, iterations=1).note == ""


def test_weighted_median_equals_numpy_on_repeated_values() -> None:
    rng = np.random.default_rng(0)
    for n in (5, 8):
        values, weights = rng.normal(size=n), rng.integers(0, 4, size=(50, n)).astype(float)
        expected = [np.median(np.repeat(values, w.astype(int))) for w in weights]
        assert weighted_median(values)(weights) == pytest.approx(expected)


def test_bad_input_says_what_is_wrong() -> None:
    x, table = planted(1, 1)
    with pytest.raises(CohortError, match="no column 'site'"):
        encoder_robustness(x, table, confounder="site")
    with pytest.raises(CohortError, match="the table 144 rows"):
        encoder_robustness(x[1:], table, confounder="scanner")
    with pytest.raises(CohortError, match=r"'group_id' is empty in 144 rows"):
        encoder_robustness(x, table.assign(group_id=" "), confounder="scanner")
    with pytest.raises(LabelError, match="'label' holds only 'a'"):
        encoder_robustness(x, table.assign(label="a"), confounder="scanner")
    with pytest.raises(CohortError, match="leaves only 0 samples"):
        encoder_robustness(x, table.assign(group_id="one"), confounder="scanner")
    x[7, 3] = np.nan
    with pytest.raises(NonFiniteError, match="first: row 7"):
        encoder_robustness(x, table, confounder="scanner")


@pytest.mark.real
def test_colours_of_real_mitoses_show_the_scanner(real_data: Path) -> None:
    """Mean colours of mitotic figures know the scanner, not the atypia."""
    from PIL import Image

    cells = pd.read_csv(real_data / "tiles" / "amf" / "labels.csv").query("dataset == 'midog21'")
    cells = cells.groupby(["scanner", "atypical"]).sample(80, random_state=0, replace=False).reset_index(drop=True)
    pixels = [np.asarray(Image.open(real_data / "tiles" / "amf" / file).convert("RGB")) for file in cells["file"]]
    x = np.stack([np.concatenate([p.mean((0, 1)), p.std((0, 1)), np.percentile(p, 10, axis=(0, 1))]) for p in pixels])
    x = (x - x.mean(0)) / x.std(0)
    found = encoder_robustness(
        x, cells, confounder="scanner", label="atypical", group="slide_id", iterations=2, resamples=200
    )
    assert found.confounded > 0.75
    assert found.biology < 0.65
    assert found.ri.high < 0.5
    assert found.croma is not None
    assert found.croma.high < 0
    assert found.drop is not None
