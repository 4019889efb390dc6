"""The probe: against scikit-learn, closed forms, and what must not change when what may not be seen changes."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from eosin.cli.probe import probe as probe_command
from eosin.cohort import grouped_kfold, load_splits, read_cohort
from eosin.errors import CohortError, LabelError, StoreError
from eosin.evaluation.report import Report
from eosin.tasks import probe_measures as measure
from eosin.tasks.predictions import ValidationSettings
from eosin.tasks.probe import SCHEMA, ProbeSettings, evaluate, fit_probe, probe, read_study
from eosin.tasks.probe_model import C_GRID, HEADS, Probe, fit_linear, fit_nested, inner_splits, positive_class, refit
from eosin.tasks.samples import Samples
from eosin.tasks.validate import evaluate_predictions

SEPARATION = 1.2
SMALL = ProbeSettings(label="grade", folds=4, seeds=2, controls=False, label_efficiency=False, resamples=200)


def cells(n: int = 600, patients: int = 60, seed: int = 0, dim: int = 6) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows of patients at two sites and an external set; one feature tells the grade, one the site."""
    rng = np.random.default_rng(seed)
    of = np.arange(n) % patients
    y = rng.random(n) < 0.4
    x = rng.normal(size=(n, dim)).astype(np.float32)
    x[:, 0] += SEPARATION * y
    site = of % 2
    x[:, 1] += 8 * site
    table = pd.DataFrame(
        {
            "slide_id": [f"s{k:03d}" for k in of],
            "x": np.arange(n) * 7,
            "y": np.arange(n) * 3,
            "center": np.array(["Bergen", "Coimbra"])[site],
            "grade": np.where(y, "yes", "no"),
            "part": np.where(of < patients // 4, "outside", "inside"),
            "split": np.where(of < patients // 4, "test", "train"),
        }
    )
    return table, x


def written(folder: Path, **how: int) -> tuple[Path, Path, pd.DataFrame, np.ndarray]:
    table, x = cells(**how)
    table.to_csv(folder / "cohort.csv", index=False)
    np.save(folder / "x.npy", x)
    return folder / "x.npy", folder / "cohort.csv", table, x


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered, where a test looks at numbers that another one draws."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"<svg/>"))


def task(table: pd.DataFrame, *, folds: int = 4, seeds: int = 2, head: str = "linear") -> measure.Task:
    y = (table["grade"] == "yes").to_numpy().astype(np.int64)
    group = table["slide_id"].to_numpy(dtype=np.str_)
    splits = grouped_kfold(y, groups=group, folds=folds, repeats=seeds)
    return measure.Task(
        y=y,
        group=group,
        site=table["center"].to_numpy(dtype=np.str_),
        layouts=measure.layouts_of(splits, len(y)),
        head=head,
        resamples=200,
        level=0.95,
        seed=0,
    )


def test_the_linear_head_is_scikit_learns() -> None:
    table, x = cells()
    t = task(table)
    pairs = inner_splits(t.y, t.group)
    head, scores = fit_linear(x, t.y, pairs)
    losses, found = [], []
    for c in C_GRID:
        p = np.empty(len(x))
        for train, val in pairs:
            peer = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=1000))
            p[val] = peer.fit(x[train], t.y[train]).predict_proba(x[val])[:, 1]
        losses.append(log_loss(t.y, p))
        found.append(p)
    best = int(np.argmin(losses))
    assert head.c_ == C_GRID[best]
    np.testing.assert_allclose(scores, found[best], atol=1e-4)


def test_auroc_within_is_that_of_the_truth() -> None:
    """Two normals a distance d apart have AUROC Phi(d / sqrt 2)."""
    table, x = cells(n=3000, patients=150)
    t = task(table)
    found = measure.within(measure.out_of_fold(x, t), t)
    truth = norm.cdf(SEPARATION / sqrt(2))
    assert found["auroc"]["low"] < truth < found["auroc"]["high"]
    assert found["auroc"]["point"] == pytest.approx(truth, abs=0.02)
    assert found["auroc"]["clusters"] == 150


def test_metrics_are_means_over_layouts() -> None:
    table, x = cells()
    t = task(table, seeds=3)
    oof = measure.out_of_fold(x, t)
    found = measure.within(oof, t)
    aurocs = [roc_auc_score(t.y, p) for p in oof.p]
    np.testing.assert_allclose(found["auroc"]["layouts"], aurocs, atol=1e-12)
    assert found["auroc"]["point"] == pytest.approx(np.mean(aurocs))
    assert found["ba"]["point"] == pytest.approx(np.mean([balanced_accuracy_score(t.y, c) for c in oof.calls]))


@pytest.mark.parametrize("head", ["linear", "knn", "prototype"])
def test_a_test_fold_decides_nothing_about_itself(head: str) -> None:
    """Turning a fold's labels round changes neither its scores nor its calls nor its threshold."""
    table, x = cells()
    t = task(table, seeds=1, head=head)
    test = t.layouts[0][1].test
    turned = t.y.copy()
    turned[test] = 1 - turned[test]
    before, after = measure.out_of_fold(x, t), measure.out_of_fold(x, t, labels=[turned])
    np.testing.assert_array_equal(before.p[0, test], after.p[0, test])
    np.testing.assert_array_equal(before.calls[0, test], after.calls[0, test])
    assert before.thresholds[1] == after.thresholds[1]
    assert before.thresholds[0] != after.thresholds[0]


def test_knowing_the_patient_is_no_skill() -> None:
    """Features that name the patient, labels that go with the patient: rows at random would give AUROC 1."""
    rng = np.random.default_rng(3)
    of = np.repeat(np.arange(60), 10)
    label = rng.permutation(np.arange(60) % 2)[of]
    table = pd.DataFrame({"slide_id": [f"s{k}" for k in of], "center": "a", "grade": np.where(label, "yes", "no")})
    x = rng.normal(size=(60, 40))[of] + 0.01 * rng.normal(size=(600, 40))
    t = task(table)
    found = measure.within(measure.out_of_fold(x, t), t)
    assert found["auroc"]["low"] < 0.5 < found["auroc"]["high"]


def test_shuffling_keeps_labels_and_their_runs() -> None:
    y = np.repeat([1, 0, 0, 1, 1, 0], 5)
    group = np.repeat(list("abcdef"), 5)
    for seed in range(20):
        dealt = measure.shuffled_labels(y, group, seed=seed)
        assert dealt.sum() == y.sum()
        assert all(len(set(dealt[group == one])) == 1 for one in "abcdef")
    assert any((measure.shuffled_labels(y, group, seed=seed) != y).any() for seed in range(5))


def test_shuffled_labels_are_not_learned() -> None:
    table, x = cells(n=2000, patients=100)
    t = task(table)
    labels = [measure.shuffled_labels(t.y, t.group, seed=seed) for seed in (1, 2)]
    found = measure.within(measure.out_of_fold(x, t, labels=labels), t)
    assert found["auroc"]["low"] < 0.5 < found["auroc"]["high"]


def test_the_site_is_told_and_the_label_is_not() -> None:
    table, x = cells()
    t = task(table)
    x = x.copy()
    x[:, 0] = np.random.default_rng(1).normal(size=len(x))
    codes = (table["center"] == "Coimbra").to_numpy().astype(int)
    splits = grouped_kfold(codes, groups=t.group, folds=4)
    assert measure.site_leakage(x, t, splits)["accuracy"]["point"] > 0.99
    assert measure.within(measure.out_of_fold(x, t), t)["auroc"]["point"] < 0.6


def test_across_sites_uses_the_other_sites_only(tmp_path: Path) -> None:
    """A head trained on Bergen, where the feature has the other sign, is wrong in Coimbra and the other way round."""
    table, x = cells(n=1200, patients=80)
    flipped = np.where((table["center"] == "Coimbra").to_numpy()[:, None], -1, 1).astype(np.float32)
    x = x * flipped
    t = task(table)
    cohort = read_cohort(table)
    from eosin.cohort import leave_one_site_out

    found = measure.across_sites(x, t, leave_one_site_out(cohort, column="center"))
    truth = 1 - norm.cdf(SEPARATION / sqrt(2))
    assert [row["level"] for row in found["rows"]] == ["Bergen", "Coimbra"]
    for row in found["rows"]:
        assert row["metrics"]["auroc"]["point"] == pytest.approx(truth, abs=0.06)
    mean = np.mean([row["metrics"]["auroc"]["point"] for row in found["rows"]])
    assert found["domain_mean"]["auroc"]["point"] == pytest.approx(mean)


@pytest.mark.parametrize("head", HEADS)
def test_a_saved_probe_gives_the_same_scores(head: str, tmp_path: Path) -> None:
    pytest.importorskip("torch") if head == "sgd" else None
    table, x = cells()
    t = task(table)
    fitted = fit_nested("linear" if head == "sgd" else head, x, t.y, t.group).head
    if head == "sgd":
        from eosin.heads import SgdProbe

        fitted = SgdProbe(steps=30).fit(x, t.y)
    made = Probe(
        kind=head,
        head=fitted,
        encoder={"name": "tiny", "dim": 6},
        label="grade",
        classes=("no", "yes"),
        positive="yes",
        threshold=0.37,
        groups=np.unique(t.group),
        n=len(x),
    )
    made.save(tmp_path / "m.npz")
    again = Probe.load(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.scores(x), made.scores(x))
    assert (again.threshold, again.positive, again.dim, again.n) == (0.37, "yes", 6, 600)
    np.testing.assert_array_equal(again.groups, made.groups)
    content = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "m.npz").write_bytes(content[:-40])
    with pytest.raises(StoreError, match="not a probe"):
        Probe.load(tmp_path / "m.npz")


def test_a_refit_keeps_the_settings() -> None:
    table, x = cells()
    t = task(table)
    for head in ("linear", "knn", "prototype"):
        fitted = fit_nested(head, x, t.y, t.group).head
        again = refit(fitted, x, t.y)
        np.testing.assert_allclose(again.predict_proba(x), fitted.predict_proba(x), atol=1e-9)


def test_one_command_makes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SWEEP_ITERATIONS", 2)  # of splits; the sweep itself is tested in test_robustness
    features, table, frame, x = written(tmp_path)
    settings = replace(SMALL, site="center", external=("part", "outside"), controls=True)
    out = tmp_path / "out"
    report = probe(features, table, settings, out=out)
    assert report.schema == SCHEMA
    assert Report.from_json((out / "report.json").read_text()).to_dict() == report.to_dict()
    one = report.sections["encoders"][0]
    assert one["within"]["auroc"]["n"] == (frame["part"] == "inside").sum()
    assert one["site_leakage"]["accuracy"]["point"] > 0.99
    assert one["shuffled"]["auroc"]["low"] < 0.5 < one["shuffled"]["auroc"]["high"]
    made = pd.read_csv(out / "predictions_x.csv")
    inside = made[made["split"].isin(["tune", "test"])]
    assert len(inside) == (frame["part"] == "inside").sum()
    outside = made[made["split_external"] == "test"]
    kept = Probe.load(out / "model_x.npz")
    np.testing.assert_allclose(outside["score"], kept.scores(x[outside["row"] - 2]), atol=1e-8)
    truth = roc_auc_score(outside["label"] == "yes", outside["score"])
    assert one["external"]["auroc"]["point"] == pytest.approx(truth, abs=1e-9)
    validated = Report.from_json((out / "validation_x_external" / "report.json").read_text())
    assert validated.value("discrimination.pooled.auroc")["point"] == pytest.approx(truth, abs=1e-9)
    assert validated.value("operating_point.threshold") == pytest.approx(kept.threshold, abs=1e-6)
    page = (out / "report.html").read_text()
    assert "external" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert json.loads((out / "run.json").read_text())["command"] == "probe"
    settings = ValidationSettings(label="label", score="score", group="group", split="split", positive="yes")
    assert evaluate_predictions(out / "predictions_x.csv", settings).value("data.rows_scored") > 0


@pytest.mark.usefixtures("unrendered")
def test_external_rows_are_never_trained_on(tmp_path: Path) -> None:
    features, table, frame, x = written(tmp_path)
    settings = replace(SMALL, external=("part", "outside"))
    first = probe(features, table, settings, out=tmp_path / "a").sections["encoders"][0]
    outside = (frame["part"] == "outside").to_numpy()
    x[outside] = np.random.default_rng(9).normal(size=(outside.sum(), x.shape[1])) * 50
    frame.loc[outside, "grade"] = np.where(np.arange(outside.sum()) % 2, "yes", "no")
    frame.to_csv(table, index=False)
    np.save(features, x)
    second = probe(features, table, settings, out=tmp_path / "b").sections["encoders"][0]
    assert first["within"] == second["within"]
    assert first["threshold"] == second["threshold"]
    assert first["external"] != second["external"]


@pytest.mark.usefixtures("unrendered")
def test_pinned_splits_give_the_same_numbers(tmp_path: Path) -> None:
    features, table, frame, _ = written(tmp_path)
    first = probe(features, table, SMALL, out=tmp_path / "a")
    pinned = load_splits(tmp_path / "a" / "splits.json", read_cohort(table))
    assert len(pinned) == SMALL.folds * SMALL.seeds
    again = probe(features, table, replace(SMALL, splits=tmp_path / "a" / "splits.json", folds=9), out=tmp_path / "b")
    assert first.sections["encoders"][0]["within"] == again.sections["encoders"][0]["within"]
    half = load_splits(tmp_path / "a" / "splits.json", read_cohort(table))[:3]
    with pytest.raises(CohortError, match="test each row once"):
        measure.layouts_of(half, len(frame))


@pytest.mark.usefixtures("unrendered")
def test_encoders_are_compared_on_the_same_patients(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    y = np.arange(96) % 2
    for k in range(96):
        pixels = rng.integers(90, 160, (36, 36, 3)) + 25 * y[k]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    frame = pd.DataFrame({"file": [f"{k}.png" for k in range(96)], "patient_id": np.arange(96) // 4, "grade": y})
    frame.to_csv(tmp_path / "cohort.csv", index=False)
    np.save(tmp_path / "noise.npy", rng.normal(size=(96, 4)))
    settings = replace(SMALL, encoders=("texture", str(tmp_path / "noise.npy")))
    report = probe(folder, tmp_path / "cohort.csv", settings, out=tmp_path / "out")
    assert report.sections["best"] == "texture"
    row = next(one for one in report.sections["differences"] if one["metric"] == "auroc")
    points = {one["name"]: one["within"]["auroc"]["point"] for one in report.sections["encoders"]}
    assert row["point"] == pytest.approx(points["noise"] - points["texture"])
    assert row["high"] < 0
    assert (
        "data:image/jpeg" in (tmp_path / "out" / "report.html").read_text() or not report.sections["confidently_wrong"]
    )


def test_what_makes_a_probe_meaningless_is_refused(tmp_path: Path) -> None:
    features, table, frame, x = written(tmp_path)
    out = tmp_path / "out"

    def run(changes: dict | None = None, **columns: object) -> None:
        frame.assign(**columns).to_csv(table, index=False)
        probe(features, table, replace(SMALL, **(changes or {})), out=out)

    with pytest.raises(LabelError, match="in all 600 rows"):
        run(grade="yes")
    few = np.where(frame["slide_id"].isin(["s001", "s002"]), "yes", "no")
    with pytest.raises(LabelError, match=r"class '1' lies in 2 patients"):
        run(grade=few)
    with pytest.raises(LabelError, match="--positive"):
        run(grade=np.where(frame["grade"] == "yes", "tumour", "stroma"))
    with pytest.raises(CohortError, match="no head is called 'lineal'"):
        run({"head": "lineal"})
    with pytest.raises(CohortError, match="'part' is never 'abroad'"):
        run({"external": ("part", "abroad")})
    np.save(features, np.ones_like(x))
    with pytest.raises(CohortError, match="the same features"):
        run()
    np.save(features, np.where(np.arange(len(x))[:, None] == 7, np.nan, x))
    with pytest.raises(ArithmeticError, match="row 9"):
        run()
    assert not (out / "report.json").exists()


def test_the_same_image_in_two_folds_stops_everything(tmp_path: Path) -> None:
    features, table, frame, x = written(tmp_path)
    of = np.arange(len(frame)) % 60
    for patient in range(20, 40):
        x[of == patient] = x[of == patient + 20]
    np.save(features, x)
    with pytest.raises(CohortError, match="cosine"):
        probe(features, table, SMALL, out=tmp_path / "out")


@pytest.mark.usefixtures("unrendered")
def test_copies_inside_the_external_set_are_told(tmp_path: Path) -> None:
    features, table, frame, x = written(tmp_path)
    of = np.arange(len(frame)) % 60
    x[of == 3] = x[of == 4]
    np.save(features, x)
    report = probe(features, table, replace(SMALL, seeds=1, external=("part", "outside")), out=tmp_path / "out")
    assert [one.kind for one in report.remarks if one.severity == "warning"] == ["near-duplicates"]
    assert "10 pairs" in next(one.message for one in report.remarks if one.kind == "near-duplicates")


def samples(table: pd.DataFrame, x: np.ndarray) -> Samples:
    return Samples(x=x, cohort=read_cohort(table), encoder={"name": "tiny", "dim": x.shape[1]}, source="array")


def test_fit_and_evaluate(tmp_path: Path) -> None:
    table, x = cells(n=900)
    frame = table.drop(columns=["part", "center"])
    made = fit_probe(samples(frame, x), frame)
    assert (made.label, made.positive, made.classes) == ("grade", "yes", ("no", "yes"))
    report = evaluate(made, samples(frame, x), frame)
    test = (frame["split"] == "test").to_numpy()
    truth = roc_auc_score(frame["grade"][test] == "yes", made.scores(x[test]))
    assert report.value("discrimination.pooled.auroc")["point"] == pytest.approx(truth)
    assert report.value("operating_point.threshold") == made.threshold
    assert report.value("data.clusters") == 15
    with pytest.raises(CohortError, match="trained the probe"):
        evaluate(made, samples(frame, x), frame, split="train")
    other = replace(samples(frame, x), encoder={"name": "large", "dim": 6})
    with pytest.raises(CohortError, match="name 'large'"):
        evaluate(made, other, frame)
    with pytest.raises(LabelError, match="3 columns look like labels"):
        fit_probe(samples(table, x), table.assign(third=np.arange(900) % 3))
    with pytest.raises(CohortError, match="no column 'split'"):
        fit_probe(samples(frame, x), frame.drop(columns="split"))


def test_positive_class() -> None:
    assert positive_class(("0", "1"), None, "y") == "1"
    assert positive_class(("No", "Yes"), None, "y") == "Yes"
    assert positive_class(("a", "b", "c"), "b", "y") == "b"
    with pytest.raises(LabelError, match="never 'd'"):
        positive_class(("a", "b"), "d", "y")


def test_the_command_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SWEEP_ITERATIONS", 2)  # of splits; the sweep itself is tested in test_robustness
    features, table, *_ = written(tmp_path, n=400, patients=40)
    app = typer.Typer()
    app.command()(probe_command)
    arguments = [str(features), str(table), "--label", "grade", "--out", str(tmp_path / "out"), "--folds", "3"]
    done = CliRunner().invoke(app, [*arguments, "--seeds", "1", "--external", "part=outside", "--site", "center"])
    assert done.exit_code == 0, done.output
    assert "tells the site with accuracy" in done.output
    assert "external" in done.output
    wrong = CliRunner().invoke(app, [*arguments, "--external", "part"])
    assert wrong.exit_code == 2


@pytest.mark.slow
@pytest.mark.real
def test_atypical_mitoses(real_data: Path) -> None:
    """Hand-made features tell atypical mitoses above chance, the scanner almost always, shuffled labels not."""
    from eosin.tasks.samples import read_samples

    folder = real_data / "tiles" / "amf"
    settings = replace(SMALL, label="atypical", site="scanner", external=("dataset", "atnorm-br"), folds=3, seeds=1)
    study = read_study(folder / "labels.csv", settings)
    x = read_samples(folder, study.cohort, encoder="texture").x[study.dev]
    assert (len(study.dev), len(study.ext)) == (1721, 746)
    found = measure.within(measure.out_of_fold(x, study.task), study.task)
    assert 0.62 < found["auroc"]["low"] < found["auroc"]["high"] < 0.8
    codes = np.unique(study.task.site, return_inverse=True)[1]
    splits = grouped_kfold(codes, groups=study.task.group, folds=3)
    assert measure.site_leakage(x, study.task, splits)["accuracy"]["point"] > 0.97


def test_the_page_on_mitoses_shows_its_results() -> None:
    root = Path(__file__).parents[2]
    path = root / "benchmarks" / "amf.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("benchmark_amf", path)
    assert spec is not None
    assert spec.loader is not None
    amf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(amf)
    sys.path.remove(str(path.parent))
    page = amf.PAGE.read_text()
    found = amf.tables(json.loads(amf.RESULT.read_text()))
    assert amf.rendered(page, found) == page
    assert all(f"<!-- amf:{name} -->" in page for name in found)
