"""Reader studies: against statsmodels, brute force, simulated studies with a known truth, and by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from eosin.errors import PredictionsError
from eosin.evaluation.readers import METRICS, model_against_readers, mrmc, reader_changes, reader_table


def study(
    seed: int = 0, *, readers: int = 6, cases: int = 80, alone: float = 0.7, helped: float = 0.85, spread: float = 0.0
) -> pd.DataFrame:
    """Reads that are right with the given chance, which varies by reader with standard deviation `spread`."""
    rng = np.random.default_rng(seed)
    truth = (np.arange(cases) % 3 == 0).astype(int)
    rows = []
    for r in range(readers):
        shift = spread * rng.normal()
        for c in range(cases):
            calls = {}
            for arm, skill in (("unassisted", alone), ("assisted", helped)):
                right = rng.random() < np.clip(skill + shift, 0, 1)
                calls[arm] = int(truth[c] if right else 1 - truth[c])
            level = "expert" if r < 2 else "trainee"
            rows.append({"reader": f"r{r}", "case": f"c{c:03d}", "truth": truth[c], "experience": level} | calls)
    return pd.DataFrame(rows)


def by_hand(reads: pd.DataFrame, arm: str) -> dict[str, float]:
    """Mean over readers of the four metrics, straight from their definitions."""
    found = []
    for _, part in reads.groupby("reader"):
        right = part[arm] == part["truth"]
        sensitivity, specificity = right[part["truth"] == 1].mean(), right[part["truth"] == 0].mean()
        found.append([right.mean(), sensitivity, specificity, (sensitivity + specificity) / 2])
    return dict(zip(METRICS, np.mean(found, axis=0), strict=True))


def test_table_equals_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    reads = study()
    table = reader_table(reads)
    assert len(table) == (6 + 2 + 1) * 2 * 3
    for row in table.itertuples():
        assert row.point == row.correct / row.n
        low, high = proportion.proportion_confint(row.correct, row.n, method="wilson")
        assert (row.low, row.high) == pytest.approx((low, high))
    one = table.query("name == 'r3' and arm == 'assisted' and metric == 'specificity'").iloc[0]
    part = reads.query("reader == 'r3' and truth == 0")
    assert (one["correct"], one["n"]) == ((part["assisted"] == 0).sum(), len(part))


def test_pooled_rows_say_that_they_are_too_sure() -> None:
    table = reader_table(study())
    assert (table.query("scope == 'reader'")["note"] == "").all()
    assert table.query("scope != 'reader'")["note"].str.contains("too narrow").all()
    assert table.query("scope == 'experience' and name == 'expert'")["readers"].eq(2).all()


def test_changes_equal_statsmodels() -> None:
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    few = study(1, cases=40).assign(reader=lambda t: t["reader"] + " of few")
    reads = pd.concat([study(1, cases=120), few.assign(case="few " + few["case"])])
    table = reader_changes(reads)
    for row in table.itertuples():
        part = reads[reads["reader"] == row.reader]
        before, after = part["unassisted"] == part["truth"], part["assisted"] == part["truth"]
        cells = pd.crosstab(before, after).to_numpy()
        discordant = cells[0, 1] + cells[1, 0]
        assert (row.mended, row.spoiled) == (cells[0, 1], cells[1, 0])
        theirs = contingency.mcnemar(cells, exact=discordant < 25, correction=True)
        assert row.p == pytest.approx(theirs.pvalue)
        assert row.method == ("exact" if discordant < 25 else "chi-squared")
    assert set(table["method"]) == {"exact", "chi-squared"}, "both forms must be seen"
    assert table["p_holm"].to_numpy() == pytest.approx(multitest.multipletests(table["p"], method="holm")[1])


def test_mrmc_points_are_means_over_readers() -> None:
    reads = study(2).sample(frac=1, random_state=0)
    table = mrmc(reads, resamples=50).query("scope == 'all'").set_index("metric")
    for arm in ("unassisted", "assisted"):
        assert table[arm].to_dict() == pytest.approx(by_hand(reads, arm))
    assert table["difference"].to_numpy() == pytest.approx((table["assisted"] - table["unassisted"]).to_numpy())
    assert table["readers"].eq(6).all()
    experts = mrmc(reads, resamples=50).query("name == 'expert'").set_index("metric")
    assert experts["assisted"].to_dict() == pytest.approx(by_hand(reads.query("experience == 'expert'"), "assisted"))


def test_mrmc_interval_equals_brute_force() -> None:
    """The same resampling written as loops over copied rows; only the random draws differ."""
    reads = study(3, readers=5, cases=40, spread=0.1)
    cube = reads.assign(right=reads["assisted"] == reads["truth"]).pivot(index="reader", columns="case", values="right")
    right, truth = cube.to_numpy(float), reads.drop_duplicates("case").sort_values("case")["truth"].to_numpy()
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(4000):
        rows = rng.integers(0, 5, 5)
        columns = np.concatenate([rng.choice(np.flatnonzero(truth == v), (truth == v).sum()) for v in (0, 1)])
        drawn.append(right[np.ix_(rows, columns)].mean())
    found = mrmc(reads, resamples=4000).query("scope == 'all' and metric == 'accuracy'").iloc[0]
    assert (found["assisted_low"], found["assisted_high"]) == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.01
    )


def test_readers_that_differ_widen_the_interval() -> None:
    alike, different = study(4, readers=8, cases=200), study(4, readers=8, cases=200, spread=0.12)
    widths = []
    for reads in (alike, different):
        row = mrmc(reads, resamples=500).query("scope == 'all' and metric == 'accuracy'").iloc[0]
        widths.append(row["unassisted_high"] - row["unassisted_low"])
    pooled = reader_table(different).query("scope == 'all' and arm == 'unassisted' and metric == 'accuracy'").iloc[0]
    assert widths[1] > 1.5 * widths[0]
    assert widths[1] > 2 * (pooled["high"] - pooled["low"]), "Wilson over pooled reads is far too narrow here"


@pytest.mark.slow
def test_mrmc_intervals_cover_the_truth() -> None:
    """Help that adds nothing: the 95 % interval of the difference must hold 0 nearly always."""
    holds, significant = 0, 0
    for seed in range(60):
        reads = study(100 + seed, readers=8, cases=60, alone=0.75, helped=0.75, spread=0.08)
        row = mrmc(reads, resamples=400).query("scope == 'all' and metric == 'balanced_accuracy'").iloc[0]
        holds += row["difference_low"] <= 0 <= row["difference_high"]
        significant += row["p"] < 0.05
    assert holds >= 53
    assert significant <= 7


def test_cases_of_one_patient_stay_together() -> None:
    reads = study(5, readers=4, cases=60)
    number = reads["case"].str[1:].astype(int)
    reads["patient"] = "p" + (number // 6).astype(str)
    hard = (number // 6) % 2 == 0
    reads.loc[hard, "assisted"] = 1 - reads.loc[hard, "truth"]
    rows = [mrmc(x, resamples=400).query("scope == 'all'").iloc[0] for x in (reads, reads.drop(columns="patient"))]
    assert (rows[0]["patients"], rows[1]["patients"]) == (10, 60)
    width = [row["assisted_high"] - row["assisted_low"] for row in rows]
    assert width[0] > 1.5 * width[1]


def test_model_beside_readers() -> None:
    reads = study(6, readers=5)
    truth = reads.drop_duplicates("case")[["case", "truth"]]
    model = truth.rename(columns={"truth": "call"}).sample(frac=1, random_state=1)
    table = model_against_readers(reads, model, resamples=200)
    assert len(table) == (5 + 1) * 4
    assert (table["model_point"] == 1).all()
    one = table.query("reader == 'r2' and metric == 'sensitivity'").iloc[0]
    part = reads.query("reader == 'r2' and truth == 1")
    assert one["reader_point"] == pytest.approx((part["unassisted"] == 1).mean())
    assert one["difference"] == pytest.approx(1 - one["reader_point"])
    assert one["low"] < one["difference"] < one["high"]
    mean = table[table["reader"] == "mean"].set_index("metric")["reader_point"].to_dict()
    assert mean == pytest.approx(by_hand(reads, "unassisted"))
    helped = model_against_readers(reads, model, arm="assisted", resamples=50)
    assert helped[helped["reader"] == "mean"].set_index("metric")["reader_point"].to_dict() == pytest.approx(
        by_hand(reads, "assisted")
    )


def test_model_that_is_one_of_the_readers_differs_from_itself_by_nothing() -> None:
    reads = study(7)
    model = reads.query("reader == 'r4'").rename(columns={"unassisted": "call"})[["case", "call"]]
    mine = model_against_readers(reads, model, resamples=100).query("reader == 'r4'")
    assert mine[["difference", "low", "high"]].to_numpy() == pytest.approx(np.zeros((4, 3)))
    assert (mine["p"] == 1).all()
    assert (mine["p_holm"] == 1).all()


def test_readers_may_skip_cases() -> None:
    reads = study(8, readers=4)
    kept = reads[~((reads["reader"] == "r1") & (reads["case"] < "c040"))]
    table = mrmc(kept, resamples=50).query("scope == 'all'").set_index("metric")
    assert table["assisted"].to_dict() == pytest.approx(by_hand(kept, "assisted"))
    model = reads.drop_duplicates("case").rename(columns={"truth": "call"})[["case", "call"]]
    counted = model_against_readers(kept, model, resamples=20).query("metric == 'accuracy'").set_index("reader")["n"]
    assert counted.to_dict() == {"r0": 80, "r1": 40, "r2": 80, "r3": 80, "mean": 80}


def test_no_positive_case_is_flagged() -> None:
    reads = study(9).query("truth == 0")
    table = reader_table(reads)
    sensitivity = table[table["metric"] == "sensitivity"]
    assert sensitivity["point"].isna().all()
    assert sensitivity["note"].str.contains("no such case").all()
    found = mrmc(reads, resamples=30).query("scope == 'all'").set_index("metric")
    assert np.isnan(found.loc["sensitivity", "assisted"])
    assert found.loc["sensitivity", "degenerate"] == 30
    assert found.loc["specificity", "degenerate"] == 0


def test_same_seed_same_numbers() -> None:
    reads = study(10)
    first, second = mrmc(reads, resamples=40, seed=3), mrmc(reads.iloc[::-1], resamples=40, seed=3)
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="truth"), "no column truth"),
        (lambda t: t.assign(assisted=2), "needed calls 0 or 1"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "twice"),
        (lambda t: t.assign(truth=np.arange(len(t)) // 20 % 2), "more than one truth"),
        (lambda t: t.assign(experience=np.arange(len(t)).astype(str)), "more than one experience"),
        (lambda t: t.assign(patient=None), "'patient' is empty"),
        (lambda t: t.iloc[:0], "no rows"),
        (lambda t: t.query("reader == 'r0'"), "only one reader"),
        (lambda t: t.drop(columns="assisted"), "no column assisted"),
    ],
)
def test_bad_tables_say_what_is_wrong(change, message: str) -> None:
    with pytest.raises(PredictionsError, match=message):
        mrmc(change(study(cases=20, readers=3).iloc[:59]))


def test_bad_models_say_what_is_wrong() -> None:
    reads = study(cases=20, readers=3)
    model = reads.drop_duplicates("case").rename(columns={"truth": "call"})[["case", "call"]]
    with pytest.raises(PredictionsError, match=r"1 of 20 cases have no call of the model \(first: 'c000'\)"):
        model_against_readers(reads, model.iloc[1:])
    with pytest.raises(PredictionsError, match="called 1 cases twice"):
        model_against_readers(reads, pd.concat([model, model.iloc[:1]]))
    with pytest.raises(PredictionsError, match="0 or 1"):
        model_against_readers(reads, model.assign(call=0.7))
