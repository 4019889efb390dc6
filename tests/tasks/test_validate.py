from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import typer
from PIL import Image
from typer.testing import CliRunner

from eosin.cli import evaluate
from eosin.evaluation.report import Report
from eosin.tasks.checklists import CHECKLISTS, NOT_REPORTED, checklist
from eosin.tasks.predictions import ValidationSettings
from eosin.tasks.validate import SCHEMA, evaluate_predictions, validate

FILES = ("report.json", "report.html", "model_card.md", "tripod_ai.md", "claim_2024.md", "stard_ai.md", "run.json")
BASE = ValidationSettings(label="diagnosis", score="p", resamples=200)
FULL = replace(
    BASE,
    positive="tumour",
    group="patient",
    site="center",
    subgroups=("sex",),
    date="day",
    split="split",
    reference="q",
)


def cohort(n: int = 900, patients: int = 180, seed: int = 5) -> pd.DataFrame:
    """Rows of patients at three sites, one of them with 3 rows and one badly calibrated."""
    rng = np.random.default_rng(seed)
    site = rng.integers(0, 2, patients)
    of = np.sort(rng.integers(0, patients, n))
    y = rng.random(n) < 0.35
    z = -1 + 2.2 * y + rng.normal(0, 0.5, patients)[of] + rng.normal(0, 1, n)
    p = 1 / (1 + np.exp(-np.where(site[of] == 1, 2.5 * z + 1.5, 1.5 * z)))
    q = 1 / (1 + np.exp(-z - rng.normal(0, 1.5, n)))
    names = np.array(["Bergen", "Coimbra"], dtype=object)[site[of]]
    patient = np.array([f"P{k:03d}" for k in of], dtype=object)
    names[:3], patient[:3] = "Espoo", ["E1", "E1", "E2"]
    split = np.where(rng.random(patients) < 0.3, "tune", "test")[of]
    split[:3] = "test"
    day = np.datetime64("2022-01-01") + rng.integers(0, 700, n).astype("timedelta64[D]")
    return pd.DataFrame(
        {
            "patient": patient,
            "center": names,
            "sex": np.array(["f", "m"])[of % 2],
            "day": day.astype(str),
            "split": split,
            "diagnosis": np.where(y, "tumour", "benign"),
            "p": p.round(6),
            "q": q.round(6),
        }
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictions") / "predictions.csv"
    cohort().to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def full(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("validation")
    return validate(table, FULL, out=out), out


def test_every_file_is_written_and_the_page_stands_alone(full: tuple[Report, Path]) -> None:
    report, out = full
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    page = (out / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert "<script" not in page
    for heading in ("Discrimination", "Calibration", "Sites and subgroups", "Over time", "Methods", "Record"):
        assert f">{heading}</h2>" in page
    assert page.count("data:image/svg+xml") == 10
    assert "nan" not in re.sub(r'"data:[^"]*"', "", page).lower().split()
    written = json.loads((out / "report.json").read_text())
    assert written["schema"] == SCHEMA
    assert written == report.to_dict()
    run = json.loads((out / "run.json").read_text())
    assert run["inputs"] == report.provenance["inputs"]
    assert run["seconds"] > 0


def test_the_same_input_gives_the_same_bytes(full: tuple[Report, Path], table: Path, tmp_path: Path) -> None:
    validate(table, FULL, out=tmp_path)
    for name in FILES[:-1]:
        assert (tmp_path / name).read_bytes() == (full[1] / name).read_bytes(), name


def test_pooled_and_site_numbers_are_those_of_sklearn(full: tuple[Report, Path]) -> None:
    data = cohort()
    rows = data[data["split"] == "test"]
    y, p = (rows["diagnosis"] == "tumour").to_numpy(), rows["p"].to_numpy()
    threshold = full[0].value("operating_point.threshold")
    called = p >= threshold
    expected = {
        "auroc": sklearn.metrics.roc_auc_score(y, p),
        "auprc": sklearn.metrics.average_precision_score(y, p),
        "ba": sklearn.metrics.balanced_accuracy_score(y, called),
        "sensitivity": sklearn.metrics.recall_score(y, called),
        "specificity": sklearn.metrics.recall_score(~y, ~called),
        "ppv": sklearn.metrics.precision_score(y, called),
        "accuracy": sklearn.metrics.accuracy_score(y, called),
        "f1": sklearn.metrics.f1_score(y, called),
        "mcc": sklearn.metrics.matthews_corrcoef(y, called),
        "kappa": sklearn.metrics.cohen_kappa_score(y, called),
        "brier": sklearn.metrics.brier_score_loss(y, p),
    }
    for name, value in expected.items():
        found = full[0].value(f"discrimination.pooled.{name}")
        assert found["point"] == pytest.approx(value, abs=1e-5), name
        assert found["low"] < value < found["high"], name
        assert found["clusters"] == rows["patient"].nunique()
    table = sklearn.metrics.confusion_matrix(y, called)
    assert list(full[0].value("discrimination.confusion").values()) == table.ravel().tolist()
    here = rows["center"] == "Bergen"
    bergen = next(row for row in full[0].value("subgroups.center.rows") if row["level"] == "Bergen")
    assert bergen["n"] == here.sum()
    assert bergen["metrics"]["auroc"]["point"] == pytest.approx(
        sklearn.metrics.roc_auc_score(y[here], p[here]), abs=1e-5
    )


def test_the_threshold_is_the_best_on_the_tune_rows_only(full: tuple[Report, Path]) -> None:
    data = cohort()
    tune = data[data["split"] == "tune"]
    y, p = (tune["diagnosis"] == "tumour").to_numpy(), tune["p"].to_numpy()
    point = full[0].value("operating_point")
    best = max(sklearn.metrics.balanced_accuracy_score(y, p >= t) for t in p)
    assert sklearn.metrics.balanced_accuracy_score(y, p >= point["threshold"]) == pytest.approx(best)
    assert point["source"] == "tune rows"
    assert point["spread"]["low"] <= point["threshold"] <= point["spread"]["high"]


def test_the_badly_calibrated_site_is_seen_and_the_tiny_one_flagged(full: tuple[Report, Path]) -> None:
    sites = {row["level"]: row for row in full[0].value("calibration.by_site")}
    assert sites["Coimbra"]["ece"]["low"] > sites["Bergen"]["ece"]["point"]
    assert sites["Coimbra"]["slope"]["high"] < 1
    assert sites["Espoo"]["n"] == 3
    assert "too few" in sites["Espoo"]["flag"]
    espoo = next(row for row in full[0].value("subgroups.center.rows") if row["level"] == "Espoo")
    assert espoo["n"] == 3
    assert "too few" in espoo["flag"]
    assert "Espoo (n 3" in next(r.message for r in full[0].remarks if r.kind == "small-site")
    assert full[0].value("subgroups.center.summary.worst site.auroc.level") != "Espoo"


def test_the_useful_range_has_no_hole(full: tuple[Report, Path]) -> None:
    low, high = full[0].value("usefulness.better_between")
    inside = [row for row in full[0].value("usefulness.decision_curve") if low <= row["threshold"] <= high]
    assert len(inside) > 10
    assert all(row["gain_low"] > 0 for row in inside)


def test_comparison_with_the_reference_is_a_paired_difference(full: tuple[Report, Path]) -> None:
    data = cohort()
    rows = data[data["split"] == "test"]
    y = rows["diagnosis"] == "tumour"
    both = [sklearn.metrics.roc_auc_score(y, rows[name]) for name in ("p", "q")]
    found = full[0].value("comparison.metrics.auroc")
    assert found["difference"]["point"] == pytest.approx(both[0] - both[1], abs=1e-5)
    assert full[0].value("comparison.delong.point") == pytest.approx(both[0] - both[1], abs=1e-5)
    assert full[0].value("comparison.non_inferiority") is None


def test_what_was_not_asked_for_is_named_with_its_reason(table: Path) -> None:
    report = evaluate_predictions(table, replace(BASE, positive="tumour", threshold=0.5))
    assert set(report.not_done) == {"subgroups", "conformal", "temporal", "drift", "comparison", "readers"}
    assert all("--" in why for why in report.not_done.values())
    assert report.value("operating_point.words") == "set beforehand"
    warning = next(r for r in report.remarks if r.kind == "no-group")
    assert warning.severity == "warning"
    assert "independent" in warning.message


def test_no_threshold_is_said_to_be_the_default(table: Path) -> None:
    report = evaluate_predictions(table, replace(BASE, positive="tumour"))
    assert report.value("operating_point.source") == "default"
    assert any(r.kind == "threshold" for r in report.remarks)


def test_known_counts_of_mitotic_figures(tmp_path: Path) -> None:
    """584 of 646 atypical and 2,876 of 3,154 normal figures called right."""
    y = np.repeat([1, 0], [646, 3154])
    called = np.repeat([1, 0, 0, 1], [584, 62, 2876, 278])
    pd.DataFrame({"y": y, "p": called}).to_csv(tmp_path / "p.csv", index=False)
    settings = ValidationSettings(label="y", score="p", threshold=0.5, resamples=50)
    pooled = evaluate_predictions(tmp_path / "p.csv", settings).value("discrimination.pooled")
    assert round(pooled["ba"]["point"], 4) == 0.9079
    assert round(pooled["accuracy"]["point"], 4) == 0.9105


def test_logits_give_the_same_report_as_their_sigmoid(tmp_path: Path) -> None:
    data = cohort(300, 60)
    z = np.log(data["p"] / (1 - data["p"]))
    data["p"] = (1 / (1 + np.exp(-z.round(4)))).astype(float)
    data["z"] = z.round(4)
    data.to_csv(tmp_path / "p.csv", index=False)
    settings = replace(BASE, positive="tumour", group="patient", threshold=0.4)
    a = evaluate_predictions(tmp_path / "p.csv", settings).value("discrimination.pooled")
    b = evaluate_predictions(tmp_path / "p.csv", replace(settings, score="z", logits=True)).value(
        "discrimination.pooled"
    )
    for name, interval in a.items():
        assert b[name]["point"] == pytest.approx(interval["point"], abs=1e-9), name


def test_inverted_sign_is_a_loud_warning_with_the_cure(tmp_path: Path) -> None:
    data = cohort(300, 60)
    data["p"] = 1 - data["p"]
    data.to_csv(tmp_path / "p.csv", index=False)
    settings = replace(BASE, positive="tumour", group="patient")
    report = validate(tmp_path / "p.csv", settings, out=tmp_path / "out")
    first = report.remarks[0]
    assert (first.kind, first.severity) == ("sign", "warning")
    assert "1 - score" in first.message
    assert "--positive" in first.message
    assert "below negatives" in (tmp_path / "out" / "report.html").read_text()
    cured = evaluate_predictions(tmp_path / "p.csv", replace(settings, positive="benign"))
    assert not any(r.kind == "sign" for r in cured.remarks)


def test_duplicate_rows_are_counted_and_warned_of(tmp_path: Path) -> None:
    data = cohort(300, 60)
    pd.concat([data, data.iloc[:7]]).to_csv(tmp_path / "p.csv", index=False)
    report = evaluate_predictions(tmp_path / "p.csv", replace(BASE, positive="tumour", group="patient"))
    assert report.value("data.duplicate_rows") == 7
    assert "7 of 307" in next(r.message for r in report.remarks if r.kind == "duplicates")


def test_parquet_gives_the_numbers_of_csv(table: Path, tmp_path: Path) -> None:
    cohort().to_parquet(tmp_path / "p.parquet")
    settings = replace(BASE, positive="tumour", group="patient", threshold=0.5)
    csv, parquet = (evaluate_predictions(path, settings) for path in (table, tmp_path / "p.parquet"))
    assert csv.value("discrimination") == parquet.value("discrimination")


def test_confidently_wrong_rows_come_with_pictures(tmp_path: Path) -> None:
    data = cohort(300, 60)
    data["file"] = [f"tile{i}.png" for i in range(len(data))]
    data.to_csv(tmp_path / "p.csv", index=False)
    settings = replace(BASE, positive="tumour", group="patient", threshold=0.5, image="file")
    listed = evaluate_predictions(tmp_path / "p.csv", settings).value("confidently_wrong")
    y = data["diagnosis"] == "tumour"
    wrong = data[(data["p"] >= 0.5) != y]
    far = (wrong["p"] - 0.5).abs().sort_values(ascending=False)
    assert [row["score"] for row in listed] == pytest.approx(data.loc[far.index[: len(listed)], "p"].tolist())
    for row in listed[:2]:
        Image.new("RGB", (500, 300), (180, 90, 160)).save(tmp_path / row["image"])
    (tmp_path / listed[2]["image"]).write_bytes(b"not a picture")
    validate(tmp_path / "p.csv", settings, out=tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2
    assert listed[5]["image"] in page


def test_readers_stand_beside_the_model(tmp_path: Path) -> None:
    data = cohort(300, 60)
    data["file"] = [f"tile{i}.png" for i in range(len(data))]
    data.to_csv(tmp_path / "p.csv", index=False)
    rng = np.random.default_rng(0)
    cases = data.iloc[::5]
    truth = (cases["diagnosis"] == "tumour").astype(int)
    reads = pd.concat(
        [
            pd.DataFrame(
                {
                    "reader": name,
                    "case": cases["file"],
                    "truth": truth,
                    "unassisted": np.where(rng.random(len(cases)) < skill, truth, 1 - truth),
                    "assisted": np.where(rng.random(len(cases)) < 0.95, truth, 1 - truth),
                }
            )
            for name, skill in (("Ann", 0.8), ("Bo", 0.7), ("Cy", 0.75))
        ]
    )
    reads.to_csv(tmp_path / "readers.csv", index=False)
    settings = replace(
        BASE, positive="tumour", group="patient", image="file", threshold=0.5, readers=tmp_path / "readers.csv"
    )
    report = validate(tmp_path / "p.csv", settings, out=tmp_path / "out")
    assert "matched to the scored rows by image" in report.value("readers.words")
    ann = next(r for r in report.value("readers.model") if r["reader"] == "Ann" and r["metric"] == "accuracy")
    called = (cases["p"] >= 0.5).astype(int)
    assert ann["model_point"] == pytest.approx((called == truth).mean())
    own = reads[reads["reader"] == "Ann"]
    assert ann["reader_point"] == pytest.approx((own["unassisted"] == own["truth"]).mean())
    assert len(report.provenance["inputs"]) == 2
    assert ">Readers</h2>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("name", CHECKLISTS)
def test_checklists_are_whole_and_say_what_is_not_reported(name: str, full: tuple[Report, Path]) -> None:
    content = checklist(name)
    ids = [item["id"] for item in content["items"]]
    items = {"tripod_ai": 27, "claim_2024": 44, "stard_ai": 40}[name]
    assert len(set(ids)) == len(ids)
    assert sorted({int(re.match(r"\d+", i).group()) for i in ids}) == list(range(1, items + 1))  # type: ignore[union-attr]
    text = (full[1] / f"{name}.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d+[a-g]? \|", line)]
    assert len(rows) == len(ids)
    assert all(line.count("|") == 5 for line in rows)
    assert "abridged" in text
    assert content["citation"] in text
    empty = sum(line.endswith(f"| {NOT_REPORTED} |") for line in rows)
    assert 0 < empty < len(rows)
    assert f"{len(rows) - empty} of {len(rows)}" in text


def test_checklist_fills_name_answers_that_exist(full: tuple[Report, Path]) -> None:
    from eosin.tasks.checklists import answers

    known = set(answers(full[0])) | {"devices", "readers"}  # these two need columns that this table has not
    for name in CHECKLISTS:
        assert {item["fill"] for item in checklist(name)["items"] if "fill" in item} <= known


def test_the_model_card_holds_the_numbers(full: tuple[Report, Path]) -> None:
    card = (full[1] / "model_card.md").read_text()
    auroc = full[0].value("discrimination.pooled.auroc")
    assert f"| AUROC | {auroc['point']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f}) |" in card
    assert "training data: not reported" in card


def test_the_command_prints_a_summary_or_json(table: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(evaluate.validate)
    base = [str(table), "--label", "diagnosis", "--positive", "tumour", "--score", "p", "--group", "patient"]
    told = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "a")])
    assert told.exit_code == 0, told.output
    assert "auroc" in told.stdout
    assert "note: The operating point 0.5 is the default" in told.stderr
    printed = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "b"), "--json"])
    assert json.loads(printed.stdout) == json.loads((tmp_path / "b" / "report.json").read_text())
