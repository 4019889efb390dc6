"""Search evaluation: neighbours against brute force, planted labels and sites, and what must be left out."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.metrics.pairwise import cosine_similarity

from eosin.cohort import read_cohort
from eosin.errors import QueryError
from eosin.evaluation.report import Report
from eosin.retrieval.cases import CaseSettings, find_cases
from eosin.retrieval.exact import ExactIndex
from eosin.retrieval.examples import indexed_tiles, whole_slide
from eosin.retrieval.filters import Is, Not
from eosin.retrieval.measures import NONE
from eosin.retrieval.protocol import IndexSpec, VectorIndex, tile_ids
from eosin.tasks.evaluate_search import (
    SCHEMA,
    EvaluationSettings,
    drawn_rows,
    evaluate_search,
    found_cases,
    measured,
)
from eosin.tasks.evaluate_search_page import evaluation_page
from eosin.tasks.evaluate_search_points import by_slide, nearest_cases, nearest_tiles, read_points
from eosin.tasks.samples import read_samples

DIM = 16
FAST = EvaluationSettings(resamples=200, aggregators=())
TEXT = ("slide_id", "patient_id", "label", "site", "organ")


@dataclass(frozen=True, kw_only=True)
class World:
    """Tiles: vectors and columns, slide after slide and row after row, which is the order of `read_points`."""

    x: np.ndarray
    columns: dict[str, np.ndarray]

    def fields(self) -> dict[str, str]:
        return {name: "keyword" if name in TEXT else "integer" for name in self.columns}


def world(
    *, label: float = 2.0, site: float = 0.0, slide: float = 0.0, patients: int = 16, tiles: int = 6, seed: int = 0
) -> World:
    """Two slides a patient; three labels, two organs, two sites; each shifts its tiles by so much."""
    rng = np.random.default_rng(seed)
    n_slides = 2 * patients
    patient = np.arange(n_slides) // 2
    kind, at = (patient // 2) % 3, patient % 2
    shift = label * rng.normal(size=(3, DIM))[kind] + site * rng.normal(size=(2, DIM))[at]
    shift = shift + slide * rng.normal(size=(n_slides, DIM))
    of = np.repeat(np.arange(n_slides), tiles)
    columns = {
        "slide_id": np.array([f"s{k:02d}" for k in of], object),
        "patient_id": np.array([f"p{k:02d}" for k in patient[of]], object),
        "label": np.array(["adenoma", "carcinoma", "normal"], object)[kind[of]],
        "site": np.array(["Bergen", "Coimbra"], object)[at[of]],
        "organ": np.array(["colon", "stomach"], object)[(patient[of] // 6) % 2],
        "x": np.tile(np.arange(tiles) % 3, n_slides) * 224,
        "y": np.tile(np.arange(tiles) // 3, n_slides) * 224,
    }
    return World(x=(shift[of] + rng.normal(size=(len(of), DIM))).astype(np.float32), columns=columns)


@contextmanager
def indexed(folder: Path, one: World, encoder: str = "toy") -> Iterator[VectorIndex]:
    spec = IndexSpec(dim=one.x.shape[1], encoder=encoder, fields=one.fields())
    index = ExactIndex.create(folder, spec)
    ids = np.empty(len(one.x), np.uint64)
    for name in np.unique(one.columns["slide_id"].astype(str)).tolist():
        rows = np.flatnonzero(one.columns["slide_id"] == name)
        ids[rows] = tile_ids(name, np.stack([one.columns["x"], one.columns["y"]], axis=1)[rows], spec)
    index.upsert(ids, one.x, one.columns)
    yield index
    index.close()


@pytest.fixture
def with_index(tmp_path: Path) -> Callable[..., Report]:
    """Evaluate a world: with_index(world, settings) -> report."""

    def run(one: World, settings: EvaluationSettings = FAST, encoder: str = "toy", **more: object) -> Report:
        folder = tmp_path / f"index{len(list(tmp_path.iterdir()))}"
        with indexed(folder, one, encoder) as index:
            return evaluate_search(index, settings, **more)

    return run


def brute(one: World, exclusion: str, k: int) -> np.ndarray:
    """Rows of the k nearest tiles that share nothing excluded, all rows in the order of the world."""
    similarity = cosine_similarity(one.x.astype(np.float64))
    np.fill_diagonal(similarity, -2)
    for name in {"itself": (), "patient": ("patient_id",), "site": ("patient_id", "site")}[exclusion]:
        column = one.columns[name]
        similarity[column[:, None] == column[None, :]] = -2
    order = np.argsort(-similarity, axis=1)[:, :k]
    return np.where(np.take_along_axis(similarity, order, 1) > -2, order, NONE)


@pytest.mark.parametrize("exclusion", ["itself", "patient", "site"])
def test_neighbours_are_those_of_brute_force(tmp_path: Path, exclusion: str) -> None:
    one = world(site=1.0, slide=1.0)
    with indexed(tmp_path / "index", one) as index:
        points = read_points(index, FAST.fields())
        rows = np.arange(0, len(points), 5)
        found = nearest_tiles(index, points, rows, exclusion, 7, exact=False)
    np.testing.assert_array_equal(found, brute(one, exclusion, 7)[rows])


def test_measures_are_those_of_the_neighbours(tmp_path: Path) -> None:
    one = world(label=0.7)
    label = np.unique(one.columns["label"], return_inverse=True)[1]
    near = label[brute(one, "patient", 5)]
    with indexed(tmp_path / "index", one) as index:
        report = evaluate_search(index, FAST)
    part = report.sections["tiles"]["patient"]
    got = {name: value["point"] for name, value in part["measures"].items()}
    assert got["acc@1"] == pytest.approx((near[:, 0] == label).mean())
    assert got["acc@3"] == pytest.approx((near[:, :3] == label[:, None]).any(axis=1).mean())
    vote = np.array([max(set(row), key=lambda c, row=row: (row.count(c), -row.index(c))) for row in near.tolist()])
    assert got["mmv@5"] == pytest.approx((vote == label).mean())
    assert got["mmv_balanced@5"] == pytest.approx(balanced_accuracy_score(label, vote))
    assert got["macro_f1@5"] == pytest.approx(f1_score(label, vote, average="macro"))
    share = part["neighbours"]["label"]["5"]
    assert share["share"]["point"] == pytest.approx((near == label[:, None]).mean())
    others = one.columns["patient_id"][:, None] != one.columns["patient_id"][None, :]
    same = others & (label[:, None] == label[None, :])
    assert share["chance"] == pytest.approx((same.sum(1) / others.sum(1)).mean())
    assert share["lift"]["point"] == pytest.approx(share["share"]["point"] / share["chance"])
    assert share["share"]["clusters"] == 16
    for row in part["by_organ"]:
        mine = one.columns["organ"] == row["organ"]
        truth = f1_score(label[mine], vote[mine], labels=np.unique(label[mine]), average="macro")
        assert row["macro_f1"]["point"] == pytest.approx(truth)
        assert row["n"] == mine.sum()
    for row in part["by_label"]:
        mine = one.columns["label"] == row["label"]
        assert row["measures"]["acc@1"]["point"] == pytest.approx((near[mine, 0] == label[mine]).mean())


def test_chance_of_measures_is_reached_by_labels_that_mean_nothing(with_index: Callable[..., Report]) -> None:
    report = with_index(world(label=0.0, tiles=12, patients=24))
    for name, one in report.sections["tiles"]["patient"]["measures"].items():
        assert one["point"] == pytest.approx(one["chance"], abs=0.08), name
    assert [one.kind for one in report.remarks if one.severity == "warning"] == ["blind"]
    assert "does not find label" in report.remarks[0].message


def test_a_planted_site_is_seen_and_a_label_is_found_beyond_it(with_index: Callable[..., Report]) -> None:
    report = with_index(world(label=1.0, site=3.0))
    tiles = report.sections["tiles"]
    site = tiles["patient"]["neighbours"]["site"]["5"]
    assert site["share"]["point"] > 0.9
    assert site["chance"] == pytest.approx(7 / 15, abs=0.01)
    assert site["lift_among_labels"]["low"] > 1.5
    assert tiles["site"]["neighbours"]["label"]["5"]["lift"]["low"] > 1
    assert "site" not in tiles["site"]["neighbours"]
    (warning,) = [one for one in report.remarks if one.severity == "warning"]
    assert warning.kind == "site"
    assert "the search sees the site" in warning.message
    clean = with_index(world(label=2.0))
    assert not [one for one in clean.remarks if one.severity == "warning"]
    assert clean.sections["tiles"]["patient"]["measures"]["acc@1"]["point"] > 0.9


def test_a_planted_slide_flatters_only_what_may_find_it(with_index: Callable[..., Report]) -> None:
    report = with_index(world(label=0.0, slide=3.0))
    tiles = report.sections["tiles"]
    slide = tiles["itself"]["neighbours"]["slide"]["5"]
    assert slide["share"]["point"] > 0.9
    assert slide["chance"] == pytest.approx(5 / 191)
    assert tiles["itself"]["measures"]["acc@1"]["point"] > 0.9
    assert tiles["patient"]["measures"]["acc@1"]["point"] < 0.6
    assert "slide" not in tiles["patient"]["neighbours"]
    assert any(one.kind == "slide" and "lie on the query's own slide" in one.message for one in report.remarks)


def test_ids_and_the_encoders_name_do_not_change_a_number(with_index: Callable[..., Report]) -> None:
    """Rows are in the order of slide and position: a sample of them is the same tiles in every index."""
    one, how = world(label=0.7), replace(FAST, queries=40)
    a, b = with_index(one, how), with_index(one, how, encoder="another")
    assert a.sections["tiles"] == b.sections["tiles"]
    assert a.sections["data"]["queries"] == 40
    assert a.sections["tiles"]["patient"]["queries"] == 40
    assert any(one.message.startswith("40 of 192 labelled tiles were asked for") for one in a.remarks)
    whole = with_index(one)
    assert whole.sections["data"]["queries"] == 192


def test_a_sample_is_a_random_one() -> None:
    rows = drawn_rows(1000, EvaluationSettings(queries=100))
    assert len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    assert 400 < rows.mean() < 600
    assert (rows != drawn_rows(1000, EvaluationSettings(queries=100, seed=1))).any()
    np.testing.assert_array_equal(drawn_rows(50, EvaluationSettings(queries=None)), np.arange(50))


def test_tiles_without_a_label_neither_ask_nor_answer(with_index: Callable[..., Report]) -> None:
    one = world()
    half = one.columns["y"] == 0
    bare = {**one.columns, "label": np.where(half, one.columns["label"], "")}
    kept = World(x=one.x[half], columns={name: column[half] for name, column in one.columns.items()})
    a, b = with_index(replace(one, columns=bare)), with_index(kept)
    assert a.sections["tiles"] == b.sections["tiles"]
    assert a.sections["data"]["points"] == 192
    assert a.sections["data"]["labelled"] == 96
    assert any("96 tiles have no label" in one.message for one in a.remarks)


def test_a_label_of_one_patient_cannot_be_answered(with_index: Callable[..., Report]) -> None:
    one = world()
    lone = np.where(one.columns["patient_id"] == "p05", "sarcoma", one.columns["label"])
    report = with_index(replace(one, columns={**one.columns, "label": lone}))
    part = report.sections["tiles"]["patient"]
    assert (part["queries"], part["answerable"]) == (192, 180)
    assert "sarcoma" not in [row["label"] for row in part["by_label"]]
    assert report.sections["tiles"]["itself"]["answerable"] == 192
    assert any("12 of 192 tiles have a label that no other patient has" in one.message for one in report.remarks)


def test_a_patient_without_id_is_its_slide(tmp_path: Path) -> None:
    one = world()
    blank = {**one.columns, "patient_id": np.full(192, "", object)}
    with indexed(tmp_path / "index", replace(one, columns=blank)) as index:
        points = read_points(index, FAST.fields())
        near = nearest_tiles(index, points, np.arange(192), "patient", 5, exact=False)
    assert len(points.names["patient"]) == 32
    assert (points.codes["slide"][near] != points.codes["slide"][:, None]).all()
    assert (one.columns["patient_id"][near] == one.columns["patient_id"][:, None]).any()


def test_cases_are_what_find_cases_finds(tmp_path: Path) -> None:
    one, k = world(label=0.8), 3
    with indexed(tmp_path / "index", one) as index:
        points = read_points(index, FAST.fields())
        slides = by_slide(points)
        assert slides is not None
        how = CaseSettings(k=k, aggregator="slide-vector")
        from eosin.retrieval.slide_vectors import slide_vectors

        rows = np.array([0, 9, 31])
        near, proven = nearest_cases(index, slides, rows, how, vectors=slide_vectors(index))
        for row, hits in zip(rows, near, strict=True):
            example = whole_slide(indexed_tiles(index, f"s{row:02d}"))
            found = find_cases(index, example, replace(how, where=Not(Is("label", ("",)))))
            assert [f"s{hit:02d}" for hit in hits] == [case.slide_id for case in found.cases]
        everyone = np.arange(32)
        near, _ = nearest_cases(index, slides, everyone, how, vectors=slide_vectors(index))
        found = found_cases(slides, everyone, near, replace(FAST, ks=(1, 3)))
        values = measured(found, replace(FAST, ks=(1, 3)))
    assert proven == 3
    label = slides.codes["label"]
    patient = slides.codes["patient"]
    assert values["measures"]["acc@1"]["point"] == pytest.approx((label[near[:, 0]] == label).mean())
    other = [len(set(patient[(label == label[row]) & (patient != patient[row])].tolist())) for row in everyone]
    np.testing.assert_array_equal(found.relevant, other)
    share = values["neighbours"]["label"]["3"]
    of_patients = [other[row] / 15 for row in everyone]  # two slides each: a random order finds patients alike
    assert share["chance"] == pytest.approx(np.mean(of_patients), abs=0.03)
    assert "slide" not in values["neighbours"]


def test_every_aggregator_is_measured(with_index: Callable[..., Report]) -> None:
    report = with_index(world(label=1.5), replace(FAST, aggregators=EvaluationSettings().aggregators, queries=10))
    cases = report.sections["cases"]
    assert list(cases) == ["median-of-minima", "entropy-vote", "mean-top-k", "slide-vector"]
    for name, part in cases.items():
        assert part["queries"] == 10
        assert part["measures"]["acc@1"]["point"] >= 0.8, name
        assert part["measures"]["acc@1"]["chance"] < 0.6
    assert cases["entropy-vote"]["proven"] is None
    assert cases["slide-vector"]["proven"] == 10


def test_what_cannot_be_done_is_named(with_index: Callable[..., Report]) -> None:
    one = world()
    rng = np.random.default_rng(0)
    mixed = {**one.columns, "label": rng.choice(np.array(["a", "b"], object), 192)}
    mixed["site"] = np.where(one.columns["x"] == 0, "", one.columns["site"])
    del mixed["organ"]
    report = with_index(replace(one, columns=mixed), replace(FAST, aggregators=("slide-vector",)))
    assert report.not_done["cases"] == "tiles of one slide differ in their label, so slides have none"
    assert report.not_done["site"] == "field 'site' is not in the index, or empty for some tiles"
    assert report.not_done["organ"] == "field 'organ' is not in the index, or empty for some tiles"
    assert "other sites" in report.not_done
    assert list(report.sections["tiles"]) == ["itself", "patient"]
    assert with_index(one, replace(FAST, site=None)).not_done["site"] == "not asked for"


def test_a_label_that_lies_at_one_site_only_cannot_be_found_elsewhere(with_index: Callable[..., Report]) -> None:
    one = world()
    tied = np.where(one.columns["site"] == "Bergen", "a", "b").astype(object)
    report = with_index(replace(one, columns={**one.columns, "label": tied}))
    assert "site" not in report.sections["tiles"]
    assert "no label has a second patient, or a second site" in report.not_done["tiles, site left out"]
    site = report.sections["tiles"]["patient"]["neighbours"]["site"]["5"]
    assert site["chance_among_labels"] == pytest.approx(site["share"]["point"])
    assert site["lift_among_labels"]["point"] == pytest.approx(1)  # what labels explain is no bias
    assert not any(one.kind == "site" for one in report.remarks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": np.full(192, "a", object)}, "fewer than two different values of 'label'"),
        ({"label": np.full(192, "", object)}, "fewer than two different values of 'label'"),
    ],
)
def test_labels_that_tell_nothing_are_refused(
    with_index: Callable[..., Report], change: dict[str, np.ndarray], words: str
) -> None:
    one = world()
    with pytest.raises(QueryError, match=words):
        with_index(replace(one, columns={**one.columns, **change}))


def test_bad_input_is_named(with_index: Callable[..., Report]) -> None:
    one = world(patients=2)
    with pytest.raises(QueryError, match="the index has no field 'grade' of text"):
        with_index(one, replace(FAST, label="grade"))
    with pytest.raises(QueryError, match="no field 'x' of text"):
        with_index(one, replace(FAST, label="x"))
    lone = {**one.columns, "label": one.columns["patient_id"]}
    with pytest.raises(QueryError, match="no value of 'label' is found in two patients"):
        with_index(replace(one, columns=lone))
    with pytest.raises(QueryError, match="list lengths"):
        EvaluationSettings(ks=(3, 1))
    with pytest.raises(QueryError, match="0 queries make no evaluation"):
        EvaluationSettings(queries=0)


def test_files_are_written_and_the_page_is_a_function_of_the_report(tmp_path: Path) -> None:
    one = world(site=2.0)
    out = tmp_path / "out"
    table = tmp_path / "labels.csv"
    table.write_text("a\n")
    with indexed(tmp_path / "index", one) as index:
        points = read_points(index, FAST.fields())
        pictures = {}
        for at in range(len(points)):
            path = tmp_path / f"{at}.png"
            Image.new("RGB", (8, 8), (at, 60, 90)).save(path)
            pictures[int(points.ids[at])] = path
        how = replace(FAST, aggregators=("slide-vector",))
        report = evaluate_search(index, how, out=out, inputs=[table], pictures=pictures)
    assert report.schema == SCHEMA
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "run.json"]
    again = Report.from_json((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    assert evaluation_page(again, pictures) == page
    assert page.count("data:image/jpeg") == 1
    assert "Examples" not in evaluation_page(again)
    shown = report.sections["tiles"]["patient"]["measures"]["mmv_balanced@5"]
    assert f"{shown['point']:.3f} ({shown['low']:.3f} to {shown['high']:.3f})" in page
    assert "the search sees the site" in page
    assert "<script" not in page
    record = json.loads((out / "run.json").read_text())
    assert record["inputs"][0]["name"] == "labels.csv"
    assert record["settings"]["ks"] == [1, 3, 5]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_search_quality", folder / "search_quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    return module


def test_the_page_shows_the_results_on_disk(benchmark: ModuleType) -> None:
    page = benchmark.PAGE.read_text()
    found = benchmark.tables(json.loads(benchmark.RESULT.read_text()))
    assert benchmark.rendered(page, found) == page
    assert all(f"<!-- search:{name} -->" in page for name in found)


@pytest.mark.real
def test_texture_finds_the_scanner_of_mitoses(real_data: Path, tmp_path: Path, benchmark: ModuleType) -> None:
    """Hand-made features tell the scanner far better than chance, and the label hardly: what the page says."""
    images = real_data / "tiles" / "amf"
    cohort = read_cohort(images / "labels.csv", label="atypical")
    some = np.flatnonzero(cohort.values("dataset") == "midog21")[::6]
    part = cohort.take(some)
    samples = read_samples(images, part, encoder="texture", cache=tmp_path)
    table = part.table.reset_index(drop=True)
    table = table.assign(
        label=np.where(table["atypical"].astype(str) == "1", "atypical", "normal"),
        patient_id=table["slide_id"],
        x=table["x"].astype(np.int64),
        y=table["y"].astype(np.int64),
    )
    with benchmark.indexed(samples.x, table, "texture") as (index, _):
        report = evaluate_search(index, replace(benchmark.AMF, resamples=200))
    tiles = report.sections["tiles"]["patient"]
    site = tiles["neighbours"]["site"]["1"]
    assert site["share"]["low"] > 0.85 > 0.5 > site["chance"]
    assert abs(tiles["measures"]["mmv_balanced@5"]["point"] - 0.5) < 0.1
    assert any(one.kind == "site" for one in report.remarks)
