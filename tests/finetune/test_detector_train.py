"""From boxes to a detector: pictures, windows, folds, F1, training that learns, and a file that answers the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectgen import paint, picture, scatter, write_boxes, write_set
from PIL import Image
from safetensors.torch import load_file
from small_vits import dinov2
from traingen import write_encoder

from eosin.errors import (
    CheckpointError,
    CohortError,
    ConfigError,
    GeometryError,
    LabelError,
    MissingMppError,
    NonFiniteError,
    WeightsError,
)
from eosin.finetune import detector_train
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.detections import detections
from eosin.finetune.detector import Detector
from eosin.finetune.detector_data import Windows, read_pictures, turn
from eosin.finetune.detector_files import DetectConfig, TrainedDetector, load_detector
from eosin.finetune.detector_scan import find
from eosin.finetune.detector_train import held_out, judge, plan_folds, train_detector, train_fold
from eosin.finetune.joins import read_boxes
from eosin.finetune.matching import count

QUICK: dict[str, Any] = {"window_px": 64, "steps": 3, "batch": 4, "folds": 2, "width": 8}


def drawn_from(pictures, *, figure: float = 0.5, lookalike: float = 0.25, window: int = 64) -> Windows:
    return Windows(pictures, window_px=window, mpp=0.25, figure_share=figure, lookalike_share=lookalike)


def test_figures_of_windows_lie_on_their_dark_discs_however_turned() -> None:
    tiles, points, names = drawn_from([picture(0), picture(1)]).draw(200, np.random.default_rng(0))
    assert tiles.shape == (200, 64, 64, 3)
    assert set(names) == {"0.tiff", "1.tiff"}
    y, x = np.mgrid[:64, :64] + 0.5
    for tile, places in zip(tiles, points, strict=True):
        expected = np.zeros((64, 64), dtype=bool)
        for px, py in places:
            expected |= np.hypot(x - px, y - py) <= 10
        assert np.array_equal(tile[..., 0] == 70, expected)


def test_shares_of_windows_and_offsets_that_mean_nothing() -> None:
    many = [picture(at, size=(600, 500)) for at in range(3)]
    _, points, _ = drawn_from(many, figure=1.0, lookalike=0.0).draw(600, np.random.default_rng(1))
    held = [one[((one >= -1) & (one <= 65)).all(axis=1)] for one in points]  # corners are whole pixels
    first = np.array([one[0] for one in held])
    quarters = np.histogram2d(first[:, 0], first[:, 1], bins=2, range=[[-1, 65], [-1, 65]])[0]
    assert quarters.min() > 0.8 * 150  # as often in each quarter
    tiles, _, _ = drawn_from(many, figure=0.0, lookalike=1.0).draw(50, np.random.default_rng(2))
    assert all((tile[..., 0] == 190).any() for tile in tiles)
    _, points, _ = drawn_from(many, figure=0.0, lookalike=0.0).draw(100, np.random.default_rng(3))
    held = [((one >= 0) & (one < 64)).all(axis=1).any() for one in points]
    assert 0 < np.mean(held) < 0.5


def test_windows_that_would_give_figures_away_are_refused() -> None:
    """A crop around its figure: in windows of 96 px it lies between 32 and 64, whatever their offset."""
    crop = replace(picture(0, size=(128, 128), figures=1, lookalikes=0), xy=np.array([(64.0, 64.0)]))
    drawn_from([crop], window=64)
    with pytest.raises(GeometryError, match="lie only from 32 to 64 px: their place would give them away"):
        drawn_from([crop], window=96)
    with pytest.raises(GeometryError, match=r"0\.tiff: 128 x 128 px are smaller than a window of 224 px"):
        drawn_from([crop], window=224)


def test_the_eight_turns_are_all_different_and_move_points_with_pixels() -> None:
    tile = np.random.default_rng(0).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    seen = set()
    for which in range(8):
        turned, points = turn(tile, np.array([(1.5, 3.5)]), which)
        column, row = np.floor(points[0]).astype(int)
        assert np.array_equal(turned[row, column], tile[3, 1])
        seen.add(turned.tobytes())
    assert len(seen) == 8


def test_pictures_of_a_folder_have_their_boxes(tmp_path: Path) -> None:
    data, images = write_set(tmp_path, slides=3)
    (images / "003.tiff").unlink()
    pictures, notes = read_pictures(read_boxes(data), images)
    assert [one.group for one in pictures] == ["midog/001", "midog/002"]
    assert notes == ("1 of 3 listed slides have no picture here",)
    for at, one in enumerate(pictures):
        truth = picture(at)
        assert np.array_equal(one.xy, truth.xy)
        assert np.array_equal(one.mitotic, truth.mitotic)
        for x, y in one.figures.astype(int):
            assert one.slide.read((x, y), 1, level=0)[0, 0, 0] == 70


def test_crops_have_every_box_that_lies_on_them(tmp_path: Path) -> None:
    """A crop of 128 px around the first box; the second is on it, the third just off, the fourth looks like one."""
    xy = np.array([(400.0, 300.0), (440.0, 280.0), (464.0, 300.0), (380.0, 340.0)])
    mitotic = np.array([True, True, True, False])
    pixels = paint((800, 600), xy[mitotic], xy[~mitotic])
    folder = tmp_path / "crops"
    folder.mkdir()
    Image.fromarray(pixels[236:364, 336:464]).save(folder / "a.png")
    Image.fromarray(pixels[:128, :128]).save(folder / "b.png")
    rows = ["file,dataset,slide_id,scanner,x,y,atypical", "a.png,midog21,midog21-007,S,400,300,0"]
    (folder / "labels.csv").write_text("\n".join([*rows, "b.png,elsewhere,7,S,64,64,1"]) + "\n")
    boxes = read_boxes(write_boxes(tmp_path / "boxes.json", {"007.tiff": ((800, 600), xy, mitotic)}))
    pictures, notes = read_pictures(boxes, folder)
    assert len(pictures) == 1
    assert pictures[0].group == "midog/007"
    assert pictures[0].xy.tolist() == [[64, 64], [104, 44], [44, 104]]
    assert pictures[0].mitotic.tolist() == [True, True, False]
    assert pictures[0].slide.read((44, 104), 1, level=0)[0, 0, 0] == 190
    assert "1 crops are of slides without boxes" in notes[1]


def test_folds_are_of_whole_slides_and_alike() -> None:
    pictures = [replace(picture(at % 9), name=str(at)) for at in range(27)]
    fold = plan_folds(pictures, folds=3)
    assert np.array_equal(fold, plan_folds(pictures, folds=3))
    of = {}
    for one, at in zip(pictures, fold.tolist(), strict=True):
        assert of.setdefault(one.group, at) == at
    assert np.bincount(fold).tolist() == [9, 9, 9]
    with pytest.raises(CohortError, match="2 slides with mitotic figures cannot be laid out in 3 folds"):
        plan_folds([picture(0), picture(1)], folds=3)


def test_f1_is_at_the_threshold_that_the_other_folds_choose() -> None:
    """Two folds of scores on different scales: each is counted at the other's threshold, all at the common best."""
    pictures = [picture(at) for at in range(4)]
    fold = np.array([0, 0, 1, 1])
    found = []
    for one, at in zip(pictures, fold.tolist(), strict=True):
        wrong = one.xy[~one.mitotic]
        high = 0.9 if at == 0 else 0.5
        score = [high] * len(one.figures) + [high - 0.3] * len(wrong)
        found.append(detections(np.concatenate([one.figures + 3, wrong]), score=score))
    judged = judge(pictures, found, fold)
    assert judged.fold_thresholds == (0.5, 0.9)
    # Fold 0 at 0.5: figures and lookalikes (0.6); fold 1 at 0.9: nothing.
    assert (judged.counts.tp, judged.counts.fp, judged.counts.fn) == (12, 8, 12)
    assert judged.f1.point == pytest.approx(24 / (24 + 8 + 12))
    assert judged.f1.clusters == 4
    assert judged.slide_counts.tolist() == [[6, 4, 0], [6, 4, 0], [0, 0, 6], [0, 0, 6]]
    assert judged.threshold == 0.5


def test_pictures_of_one_slide_do_not_hit_each_others_figures() -> None:
    one = picture(0)
    pictures = [one, replace(one, name="again"), picture(1), picture(2)]
    nothing = detections(np.empty((0, 2)))
    both = detections(np.repeat(one.figures, 2, axis=0), score=np.full(12, 0.7))
    whole = [detections(p.figures, score=np.full(6, 0.7)) for p in pictures[2:]]
    counts = judge(pictures, [both, nothing, *whole], np.array([0, 0, 1, 1])).counts
    assert (counts.tp, counts.fp, counts.fn) == (18, 6, 6)


def test_a_small_network_learns_a_picture_to_f1_one() -> None:
    config = DetectConfig(window_px=64, steps=150, batch=8, lr=5e-3, width=24)
    train = [picture(at) for at in range(2)]
    model = Detector(dinov2(), config.adapt, width=config.width)
    losses = train_fold(model, train, config)
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    maker = TrainedDetector([model], window_px=64, mpp=0.25, threshold=0.0)
    for one in train:
        found = find(one.slide, maker, threshold=0.4)
        counts = count(one.figures, found.xy, radius=30)
        assert counts.f1 == 1, counts
        assert np.abs(found.xy[np.lexsort(found.xy.T)] - one.figures[np.lexsort(one.figures.T)]).max() < 4


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_training_repeats_bit_for_bit_and_depends_on_seed_and_fold(mode: str) -> None:
    adapt = AdaptConfig(mode=mode, dropout=0.1)  # type: ignore[arg-type]
    config = DetectConfig(adapt=adapt, **{**QUICK, "steps": 4})

    def trained(config: DetectConfig, fold: int = 0) -> list[float]:
        torch.manual_seed(np.random.default_rng().integers(1 << 30))  # what the caller drew plays no part
        return train_fold(Detector(dinov2(), adapt, width=8), [picture(0)], config, fold=fold)

    first = trained(config)
    assert trained(config) == first
    assert trained(config, fold=1) != first
    assert trained(replace(config, seed=1)) != first


def test_the_callers_random_numbers_stay() -> None:
    backbone = dinov2()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_fold(Detector(backbone, AdaptConfig(mode="head"), width=8), [picture(0)], DetectConfig(**QUICK))
    assert torch.equal(torch.rand(3), expected)


def test_a_mean_over_folds_of_one_encoder_is_the_mean_of_each() -> None:
    backbone, tiles = dinov2(), np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    models = [Detector(backbone, AdaptConfig(mode="head"), width=8, seed=seed) for seed in (0, 1)]
    apart = [TrainedDetector([m], window_px=64, mpp=0.25, threshold=0.0).heat(tiles) for m in models]
    together = TrainedDetector(models, window_px=64, mpp=0.25, threshold=0.0).heat(tiles)
    assert torch.allclose(together, (apart[0] + apart[1]) / 2, atol=1e-6)


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_a_saved_detector_answers_bit_for_bit(tmp_path: Path, mode: str) -> None:
    data, images = write_set(tmp_path)
    encoder = write_encoder(tmp_path / "tiny.safetensors")
    config = DetectConfig(adapt=AdaptConfig(mode=mode), **QUICK)  # type: ignore[arg-type]
    steps = []
    report = train_detector(
        data, images, str(encoder), config, out=tmp_path / "out", device="cpu", progress=steps.append
    )
    assert [(one.fold, one.step) for one in steps] == [(f, s) for f in (1, 2) for s in (1, 2, 3)]
    assert json.loads((tmp_path / "out" / "detector.json").read_text()) == json.loads(json.dumps(report))
    assert (report["slides"], report["figures"], report["hard_negatives"]) == (4, 24, 16)
    assert report["tp"] + report["fn"] == 24
    assert len(report["loss"]) == 2
    assert report["notes"] == ["4 slides: the interval over them is rough"]
    encoder.unlink()  # the folder answers by itself
    loaded = load_detector(tmp_path / "out", device="cpu")
    assert loaded.threshold == report["threshold"]
    again = load_detector(tmp_path / "out", device="cpu")
    tiles = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.heat(tiles), again.heat(tiles))
    # What was judged out of fold is what the loaded fold says.
    pictures, _ = read_pictures(read_boxes(data), images)
    fold = plan_folds(pictures, folds=2)
    alone = [TrainedDetector([model], window_px=64, mpp=0.25, threshold=0.0) for model in loaded.models]
    found = [held_out(alone[at], [one])[0] for one, at in zip(pictures, fold.tolist(), strict=True)]
    assert judge(pictures, found, fold).counts.tp == report["tp"]
    assert judge(pictures, found, fold).counts.fp == report["fp"]


def test_a_stopped_run_goes_on_after_its_last_whole_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, images = write_set(tmp_path)
    encoder, config = str(write_encoder(tmp_path / "tiny.safetensors")), DetectConfig(**QUICK)
    whole = train_detector(data, images, encoder, config, out=tmp_path / "whole", device="cpu")
    trained: list[int] = []

    def stop(model: Detector, pictures: list, config: DetectConfig, *, fold: int, progress: None) -> list[float]:
        if fold in stops:
            raise KeyboardInterrupt
        trained.append(fold)
        return train_fold(model, pictures, config, fold=fold, progress=progress)

    stops = [1]
    monkeypatch.setattr(detector_train, "train_fold", stop)
    with pytest.raises(KeyboardInterrupt):
        train_detector(data, images, encoder, config, out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "detector.json").exists()
    stops.clear()
    assert train_detector(data, images, encoder, config, out=tmp_path / "out", device="cpu") == whole
    assert trained == [0, 1]
    ours, theirs = (load_file(tmp_path / name / "detector.safetensors") for name in ("out", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    with pytest.raises(CheckpointError, match="is of another recipe, encoder or pictures"):
        train_detector(data, images, encoder, replace(config, seed=1), out=tmp_path / "out", device="cpu")


def test_a_detector_of_another_encoder_is_refused(tmp_path: Path) -> None:
    data, images = write_set(tmp_path)
    encoder = write_encoder(tmp_path / "tiny.safetensors")
    train_detector(data, images, str(encoder), DetectConfig(**QUICK), out=tmp_path / "out", device="cpu")
    other = write_encoder(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(WeightsError, match=r"was trained on encoder\.safetensors with weights .* load the one"):
        load_detector(tmp_path / "out", device="cpu", encoder=str(other))
    with pytest.raises(CheckpointError, match=r"holds no detector\.safetensors"):
        load_detector(tmp_path)
    path = tmp_path / "out" / "detector.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="has been altered"):
        load_detector(tmp_path / "out", device="cpu")
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="is no detector, or damaged"):
        load_detector(tmp_path / "out", device="cpu")


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    data, images = write_set(tmp_path / "a", mpp=None)
    with pytest.raises(MissingMppError, match="does not say its microns per pixel"):
        read_pictures(read_boxes(data), images)
    assert len(read_pictures(read_boxes(data), images, slide_mpp=0.25)[0]) == 4
    with pytest.raises(CohortError, match="no such folder of pictures"):
        read_pictures(read_boxes(data), tmp_path / "nowhere")
    with pytest.raises(CohortError, match="no picture of the 4 slides"):
        read_pictures(read_boxes(data), tmp_path)
    negatives = {"001.tiff": ((256, 224), scatter((256, 224), 3, np.random.default_rng(0)), np.zeros(3, dtype=bool))}
    none = read_boxes(write_boxes(tmp_path / "none.json", negatives))
    with pytest.raises(LabelError, match="no mitotic figure lies on any of 1 pictures"):
        read_pictures(none, images, slide_mpp=0.25)
    other = {"001.tiff": ((300, 224), *negatives["001.tiff"][1:])}
    with pytest.raises(CohortError, match="the boxes are of another picture"):
        read_pictures(read_boxes(write_boxes(tmp_path / "other.json", other)), images, slide_mpp=0.25)
    empty = write_boxes(tmp_path / "empty.json", {"001.tiff": ((256, 224), np.empty((0, 2)), np.empty(0, dtype=bool))})
    with pytest.raises(CohortError, match="no box"):
        read_boxes(empty)
    nothing = replace(picture(0), mitotic=np.zeros(10, dtype=bool))
    with pytest.raises(CohortError, match="no mitotic figure on 1 pictures"):
        judge([nothing], [detections(np.empty((0, 2)))], np.array([0]))


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    model = Detector(dinov2(), AdaptConfig(mode="head"), width=8)
    with torch.no_grad():
        model.head[0].weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=r"fold 1, step 1: the gradient is NaN .* of 0\.tiff"):
        train_fold(model, [picture(0)], DetectConfig(**QUICK))
    data, images = write_set(tmp_path)
    encoder = str(write_encoder(tmp_path / "tiny.safetensors"))
    with pytest.raises(GeometryError, match="not a multiple of its 32 px patch"):
        train_detector(data, images, encoder, DetectConfig(**{**QUICK, "window_px": 60}), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="texture gives no patch tokens"):
        train_detector(data, images, "texture", DetectConfig(**QUICK), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for wrong in ({"lr": 0.0}, {"folds": 1}, {"figure_share": 0.9, "lookalike_share": 0.2}, {"steps": -1}):
        with pytest.raises(ConfigError):
            DetectConfig(**wrong)


@pytest.mark.real
@pytest.mark.slow
def test_boxes_of_the_real_crops(real_data: Path) -> None:
    """1,721 crops; each has its own figure in the middle; 39 of others and 11 hard negatives lie on them."""
    boxes = read_boxes(real_data / "labels" / "MIDOGpp.json")
    pictures, _ = read_pictures(boxes, real_data / "tiles" / "amf")
    assert len(pictures) == 1721
    assert len({one.group for one in pictures}) == 135
    assert all((np.abs(one.figures - 64) <= 1).all(axis=1).any() for one in pictures)
    assert sum(len(one.figures) for one in pictures) == 1760
    assert sum(len(one.xy) for one in pictures) == 1771
