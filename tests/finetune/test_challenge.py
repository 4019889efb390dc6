from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pytest
import tifffile
from cellgen import pixels

import slidegen
from eosin.errors import CohortError, ConfigError, CorruptSlideError, GeometryError, NonFiniteError, PredictionsError
from eosin.evaluation.metrics import accuracy, balanced_accuracy
from eosin.finetune.cells import read_tiles
from eosin.finetune.challenge import (
    REGION,
    REGION_ANSWER,
    STACK,
    STACK_ANSWER,
    answer,
    check_answer,
    points_answer,
    read_sockets,
    read_stack,
    run_region,
    run_stack,
    stack_metrics,
)
from eosin.finetune.detections import Detections, detections, read_detections
from eosin.finetune.tables import read_table
from eosin.geometry import Mpp
from eosin.slides import Slide

# metrics.json of the organisers' task 2 evaluation (2025-07-28) for `drawn_stacks()`.
ORGANISERS = {
    "overall_sensitivity": 0.8695652173913043,
    "overall_specificity": 0.7746478873239436,
    "overall_balanced_accuracy": 0.822106552357624,
    "overall_roc_auc": 0.8315982853643601,
    "overall_accuracy": 0.811965811965812,
    "domain_0": (0.8571428571428571, 0.75, 0.8035714285714286, 0.7857142857142857, 0.8290816326530612),
    "domain_1": (0.9411764705882353, 0.8260869565217391, 0.8836317135549872, 0.875, 0.8797953964194374),
    "domain_2": (0.8, 0.75, 0.775, 0.7714285714285715, 0.8066666666666666),
}
FIVE = ("sensitivity", "specificity", "balanced_accuracy", "accuracy", "roc_auc")


def drawn_stacks() -> tuple[list[dict[str, Any]], dict[str, object]]:
    rng = np.random.default_rng(25)
    truth, answers = [], {}
    for at in range(8):
        n = 16 if at < 7 else 5
        y, domains = rng.random(n) < 0.35, rng.integers(0, 3, n)
        p = np.clip(rng.normal(0.35 + 0.3 * y, 0.2), 0, 1)
        labels = ["atypical" if one else "normal" for one in y]
        truth.append({"image": f"stack_{at}.tiff", "labels": labels, "tumordomains": domains.tolist()})
        answers[f"stack_{at}.tiff"] = answer(p, threshold=0.45)
    return truth, answers


def inputs(root: Path, slug: str, folder: str) -> Path:
    """Write inputs.json as the platform does, and return the folder for the image."""
    socket = {
        "file": None,
        "image": {"name": "the name its owner knows.tiff"},
        "value": None,
        "interface": {
            "slug": slug,
            "kind": "Image",
            "super_kind": "Image",
            "relative_path": f"images/{folder}",
            "example_value": None,
        },
    }
    (root / "images" / folder).mkdir(parents=True)
    (root / "inputs.json").write_bytes(orjson.dumps([socket]))
    return root / "images" / folder


def stack_file(path: Path, tiles: npt.NDArray, **options: Any) -> Path:
    """Write one page a tile, as Pillow and the organisers' stacks have it."""
    with tifffile.TiffWriter(path) as tiff:
        for tile in tiles:
            tiff.write(tile, photometric="rgb", metadata=None, contiguous=False, **options)
    return path


class FirstPixel:
    def scores(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return (tiles[:, 0, 0, 0] / np.float32(255)).astype(np.float32)


def test_a_stack_is_answered_in_page_order(tmp_path: Path) -> None:
    tiles = np.stack([pixels(seed) for seed in range(16)])
    folder = inputs(tmp_path / "input", STACK, STACK)
    stack_file(folder / "f0f1.tif", tiles, compression="deflate", resolution=(102351, 102351), resolutionunit="INCH")
    path = run_stack(FirstPixel(), input_dir=tmp_path / "input", output_dir=tmp_path / "output", threshold=0.5)
    assert path == tmp_path / "output" / STACK_ANSWER
    assert [one.name for one in (tmp_path / "output").iterdir()] == [STACK_ANSWER]
    items = orjson.loads(path.read_bytes())
    red = tiles[:, 0, 0, 0] / np.float32(255)
    assert [item["confidence"] for item in items] == red.astype(np.float64).tolist()
    assert [item["class"] for item in items] == ["atypical" if one >= 0.5 else "normal" for one in red]
    assert all(list(item) == ["class", "confidence"] and type(item["confidence"]) is float for item in items)


def test_a_stack_of_one_page_and_one_series(tmp_path: Path) -> None:
    tiles = np.stack([pixels(seed) for seed in range(5)])
    tifffile.imwrite(tmp_path / "series.tif", tiles, photometric="rgb")
    assert np.array_equal(read_stack(tmp_path / "series.tif"), tiles)
    assert np.array_equal(read_stack(stack_file(tmp_path / "one.tiff", tiles[:1])), tiles[:1])


def test_scores_of_exactly_0_and_1_stay_numbers_with_a_point() -> None:
    items = orjson.loads(orjson.dumps(answer(np.array([0, 1]), threshold=1.0)))
    assert [type(item["confidence"]) for item in items] == [float, float]
    assert [item["class"] for item in items] == ["normal", "atypical"]
    assert check_answer(items, 2)[1].tolist() == [0, 1]


def test_the_confidence_is_that_of_atypical_whatever_is_called() -> None:
    items = answer([0.2, 0.9], threshold=0.95)
    assert items == [{"class": "normal", "confidence": 0.2}, {"class": "normal", "confidence": 0.9}]


@pytest.mark.parametrize(
    ("scores", "threshold", "error"),
    [([0.1, np.nan], 0.5, NonFiniteError), ([-1.0, 4.0], 0.5, PredictionsError), ([0.5], 1.5, ConfigError)],
)
def test_scores_that_cannot_be_answers(scores: list[float], threshold: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        answer(scores, threshold=threshold)


GOOD = {"class": "normal", "confidence": 0.5}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([GOOD], "found 1 entries for 2 pages"),
        ({"class": "normal"}, "found dict"),
        ([GOOD, 0.5], "entry 2 is 0.5"),
        ([GOOD, {"class": "normal"}], "needed an object with class and confidence"),
        ([GOOD, {"class": "AMF", "confidence": 0.5}], "class 'AMF'"),
        ([GOOD, {"class": "normal", "confidence": 1}], "confidence 1; needed a number with a point"),
        ([GOOD, {"class": "normal", "confidence": 1.5}], "confidence 1.5"),
        ([GOOD, {"class": "normal", "confidence": float("nan")}], "confidence nan"),
    ],
)
def test_answers_that_the_platform_would_refuse(items: object, message: str) -> None:
    with pytest.raises(PredictionsError, match=message):
        check_answer(items, 2)


def test_pages_that_are_no_crops_are_named(tmp_path: Path) -> None:
    good = pixels(1)
    with pytest.raises(GeometryError, match=r"page 2: 64 x 64 pixels where 128 x 128"):
        read_stack(stack_file(tmp_path / "small.tif", [good, pixels(1, 64)]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(GeometryError, match=r"page 1: found RGB pixels, uint16"):
        read_stack(stack_file(tmp_path / "deep.tif", good[None].astype(np.uint16)))
    tifffile.imwrite(tmp_path / "grey.tif", good[..., 0])
    with pytest.raises(GeometryError, match="page 1: found grey"):
        read_stack(tmp_path / "grey.tif")
    glass = np.dstack([good, np.full((128, 128), 7, dtype=np.uint8)])
    with pytest.raises(GeometryError, match="page 1: the picture is partly transparent"):
        read_stack(stack_file(tmp_path / "glass.tif", glass[None], extrasamples=["unassalpha"]))
    opaque = np.dstack([good, np.full((128, 128), 255, dtype=np.uint8)])
    alpha = stack_file(tmp_path / "opaque.tif", opaque[None], extrasamples=["unassalpha"])
    assert np.array_equal(read_stack(alpha)[0], good)


@pytest.mark.parametrize(
    ("resolution", "unit", "accepted"),
    [
        ((101_600, 101_600), "INCH", True),
        ((40_000, 40_000), "CENTIMETER", True),
        ((43_478, 43_478), "CENTIMETER", True),
        ((20_000, 20_000), "CENTIMETER", False),
        ((72, 72), "INCH", True),
        ((1, 1), "NONE", True),
    ],
)
def test_a_stated_resolution_must_be_that_of_the_crops(
    tmp_path: Path, resolution: tuple[int, int], unit: str, accepted: bool
) -> None:
    path = stack_file(tmp_path / "stack.tif", pixels(1)[None], resolution=resolution, resolutionunit=unit)
    if accepted:
        assert len(read_stack(path)) == 1
    else:
        with pytest.raises(GeometryError, match=r"page 1: states 0\.5 microns per pixel where crops of 0\.25"):
            read_stack(path)


@pytest.mark.parametrize("kept", [4, 0.1, 0.5, 0.999])
def test_a_stack_cut_short_is_not_taken_for_a_shorter_one(tmp_path: Path, kept: float) -> None:
    folder = inputs(tmp_path / "input", STACK, STACK)
    tiles = np.stack([pixels(seed) for seed in range(4)])
    whole = stack_file(folder / "cut.tif", tiles, compression="deflate").read_bytes()
    (folder / "cut.tif").write_bytes(whole[: kept if kept == 4 else int(len(whole) * kept)])
    with pytest.raises(CorruptSlideError, match=r"cut\.tif: (truncated|its TIFF directories)"):
        run_stack(FirstPixel(), input_dir=tmp_path / "input", output_dir=tmp_path / "out", threshold=0.5)
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_missing_or_of_another_task(tmp_path: Path) -> None:
    def run(root: Path) -> Path:
        return run_stack(FirstPixel(), input_dir=root, output_dir=tmp_path / "out", threshold=0.5)

    with pytest.raises(CohortError, match=r"inputs\.json: no such file"):
        run(tmp_path / "nothing")
    inputs(tmp_path / "other", REGION, "histopathology-roi-cropout")
    with pytest.raises(CohortError, match=f"lists {REGION}; needed is {STACK}"):
        run(tmp_path / "other")
    folder = inputs(tmp_path / "input", STACK, STACK)
    with pytest.raises(CohortError, match=r"holds 0 files of \.tif"):
        run(tmp_path / "input")
    stack_file(folder / "one.tif", pixels(1)[None])
    stack_file(folder / "two.tif", pixels(2)[None])
    with pytest.raises(CohortError, match="holds 2 files"):
        run(tmp_path / "input")
    with pytest.raises(CohortError, match=r"three\.tif: no such file"):
        read_stack(folder / "three.tif")
    (tmp_path / "input" / "inputs.json").write_text('{"interface": 3}')
    with pytest.raises(CohortError, match="not a list of inputs"):
        run(tmp_path / "input")
    assert not (tmp_path / "out").exists()


def test_the_organisers_keys_and_numbers() -> None:
    truth, answers = drawn_stacks()
    found = stack_metrics(truth, answers)
    assert found["results"] == {}
    aggregates = found["aggregates"]
    assert aggregates.keys() == ORGANISERS.keys()
    for key, value in ORGANISERS.items():
        if isinstance(value, tuple):
            assert list(aggregates[key]) == list(FIVE)
            assert list(aggregates[key].values()) == pytest.approx(value, abs=1e-12)
        else:
            assert aggregates[key] == pytest.approx(value, abs=1e-12)
    ours = found["eosin"]
    assert ours["domain_mean_balanced_accuracy"] == pytest.approx(np.mean([0.8035714, 0.8836317, 0.775]))
    assert ours["worst_domain"] == "2"
    assert sum(sum(count.values()) for count in ours["domains"].values()) == 117
    assert orjson.loads(orjson.dumps(found)) == found


def test_a_domain_of_one_class_or_one_cell_is_reported() -> None:
    truth = [{"image": "a", "labels": ["normal", "atypical", "normal", "atypical"], "tumordomains": [0, 0, 1, 2]}]
    found = stack_metrics(truth, {"a": answer([0.2, 0.9, 0.1, 0.3], threshold=0.5)})
    assert found["aggregates"]["domain_1"] == {
        "sensitivity": None,
        "specificity": 1.0,
        "balanced_accuracy": None,
        "accuracy": 1.0,
        "roc_auc": None,
    }
    assert found["aggregates"]["domain_2"]["sensitivity"] == 0.0
    assert found["eosin"]["domains_left_out"] == ["1", "2"]
    assert found["eosin"]["domain_mean_balanced_accuracy"] == 1.0
    assert found["eosin"]["domains"]["2"] == {"atypical": 1, "normal": 0}


def test_confidences_of_the_wrong_class_are_noticed() -> None:
    truth, answers = drawn_stacks()
    turned = {
        name: [{"class": item["class"], "confidence": 1 - item["confidence"]} for item in items]
        for name, items in answers.items()
        if isinstance(items, list)
    }
    found = stack_metrics(truth, turned)
    assert found["aggregates"]["overall_roc_auc"] == pytest.approx(1 - ORGANISERS["overall_roc_auc"])
    assert "check its sign" in found["eosin"]["warning"]
    assert stack_metrics(truth, answers)["eosin"]["warning"] == ""


def test_a_truth_or_an_answer_that_does_not_fit() -> None:
    good = {"image": "a", "labels": ["normal"], "tumordomains": [0]}
    with pytest.raises(PredictionsError, match="no answer for a; there are b"):
        stack_metrics([good], {"b": answer([0.1], threshold=0.5)})
    with pytest.raises(PredictionsError, match="2 entries for 1 pages"):
        stack_metrics([good], {"a": answer([0.1, 0.2], threshold=0.5)})
    with pytest.raises(CohortError, match="label 'AMF'"):
        stack_metrics([good | {"labels": ["AMF"]}], {})
    with pytest.raises(CohortError, match="equal length"):
        stack_metrics([good | {"tumordomains": []}], {})
    with pytest.raises(CohortError, match="no stack"):
        stack_metrics([], {})


def test_the_winners_counts_give_the_winners_figures() -> None:
    # Final test set of MIDOG 2025, task 2: 584 of 646 atypical and 2,876 of 3,154 normal figures called right
    # (sensitivity 0.9040, specificity 0.9119, balanced accuracy 0.9079, accuracy 0.9105).
    y = np.repeat([1, 1, 0, 0], [584, 646 - 584, 2876, 3154 - 2876])
    called = np.repeat([1, 0, 0, 1], [584, 646 - 584, 2876, 3154 - 2876])
    labels = ["atypical" if one else "normal" for one in y]
    truth = [{"image": "all", "labels": labels, "tumordomains": [0] * len(y)}]
    found = stack_metrics(truth, {"all": answer(called, threshold=0.5)})["aggregates"]
    rounded = {name: round(found[f"overall_{name}"], 4) for name in FIVE[:4]}
    assert rounded == {
        "sensitivity": 0.9040,
        "specificity": 0.9119,
        "balanced_accuracy": 0.9079,
        "accuracy": 0.9105,
    }
    assert found["overall_balanced_accuracy"] == pytest.approx(balanced_accuracy(y, called))
    assert found["overall_accuracy"] == pytest.approx(accuracy(y, called)) == pytest.approx(3460 / 3800)


class Corner:
    def detect(self, slide: Slide) -> Detections:
        return detections([(100, 40), (12.5, slide.size_px[1])], score=[0.9, 0.2])


def test_a_region_is_answered_in_millimetres(tmp_path: Path) -> None:
    # The slug and the folder of task 1 differ: the folder is what inputs.json says.
    folder = inputs(tmp_path / "input", REGION, "histopathology-roi-cropout")
    style = slidegen.TiffStyle(flavour="generic", mpp=(0.25, 0.5), factors=())
    slidegen.write_tiff(folder / "350.tiff", slidegen.coordinates(300, 800), style)
    path = run_region(Corner(), input_dir=tmp_path / "input", output_dir=tmp_path / "output", threshold=0.5)
    assert path.name == REGION_ANSWER
    assert orjson.loads(path.read_bytes()) == {
        "name": "Points of interest",
        "type": "Multiple points",
        "points": [
            {"name": "mitotic figure", "point": [0.025, 0.02, 0], "probability": 0.9},
            {"name": "non-mitotic figure", "point": [0.003125, 0.4, 0], "probability": 0.2},
        ],
        "version": {"major": 1, "minor": 0},
    }
    # What is written is read again, without the point that is called no figure.
    again = read_detections(path, mpp=Mpp(0.25, 0.5), size_px=(300, 800))
    assert np.allclose(again.xy, [[100, 40]])


def test_points_that_task_1_would_refuse() -> None:
    far = detections([(50_000, 10)], score=[0.5])
    with pytest.raises(GeometryError, match=r"12\.5 mm; the evaluation takes"):
        points_answer(far, mpp=Mpp(0.25, 0.25), threshold=0.5)
    with pytest.raises(NonFiniteError):
        points_answer(detections([(5, 10)]), mpp=Mpp(0.25, 0.25), threshold=0.5)


def test_several_sockets_are_sorted(tmp_path: Path) -> None:
    listed = [{"interface": {"slug": slug, "relative_path": f"{slug}.json"}, "image": None} for slug in ("b", "a")]
    (tmp_path / "inputs.json").write_bytes(orjson.dumps(listed))
    assert [socket.slug for socket in read_sockets(tmp_path)] == ["a", "b"]
    assert read_sockets(tmp_path)[0].folder == tmp_path / "a.json"


@pytest.mark.real
def test_a_stack_of_real_crops_through_the_container_and_its_evaluation(real_data: Path, tmp_path: Path) -> None:
    amf = read_table(real_data / "tiles" / "amf")
    cells = amf.take(np.flatnonzero(amf.dataset == "atnorm-br")[:37])
    tiles = read_tiles(cells)
    truth, answers = [], {}
    for start in range(0, len(cells), 16):
        rows = np.arange(start, min(start + 16, len(cells)))
        shutil.rmtree(tmp_path / "input", ignore_errors=True)
        folder = inputs(tmp_path / "input", STACK, STACK)
        stack = stack_file(folder / "a67a1ea8.tiff", tiles[rows], compression="deflate")
        assert np.array_equal(read_stack(stack), tiles[rows])
        path = run_stack(FirstPixel(), input_dir=tmp_path / "input", output_dir=tmp_path / "out", threshold=0.7)
        name = f"stack_{start}.tiff"
        answers[name] = orjson.loads(path.read_bytes())
        labels = ["atypical" if one else "normal" for one in cells.label[rows]]
        truth.append({"image": name, "labels": labels, "tumordomains": [3] * len(rows)})
    found = stack_metrics(truth, answers)["aggregates"]
    want = tiles[:, 0, 0, 0] / np.float32(255) >= 0.7
    assert found["overall_accuracy"] == pytest.approx(np.mean(want == cells.label))
    assert found["domain_3"]["balanced_accuracy"] == found["overall_balanced_accuracy"]
