"""Training a detector: folds of whole slides, a threshold out of fold, one file that answers by itself.

AdamW with linear warm-up and half a cosine, seeded by fold and step alone. There is no early stop: the held-out folds
choose the threshold and nothing else, and each fold's F1 is counted at the threshold that the other folds choose.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.cohort.balance import assign_groups
from eosin.encoders.spec import EncoderSpec, check_side
from eosin.errors import CheckpointError, CohortError, NonFiniteError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.interval import Interval
from eosin.features.recipe import canonical_json
from eosin.features.writer import write_durably
from eosin.finetune.detections import Detections
from eosin.finetune.detector import Detector, heat_loss, heat_target
from eosin.finetune.detector_data import Picture, Windows, read_pictures
from eosin.finetune.detector_files import DetectConfig, TrainedDetector, save_detector, torch_encoder, window_images
from eosin.finetune.detector_scan import HeatMaker, find
from eosin.finetune.joins import read_boxes
from eosin.finetune.matching import Counts, SlideDetections, count_slides, f1_metric, pooled
from eosin.finetune.resume import load_state, save_state
from eosin.finetune.saving import load_trained_state, trained_state
from eosin.finetune.train import schedule
from eosin.version import __version__

REPORT = "detector.json"
# Thresholds that are tried: scores are not surer than that.
STEPS = np.arange(1, 100) / 100
FEW_SLIDES = 20
# Between two pictures of one slide while they are counted: a metre, wider than any.
APART_UM = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What is told while training: fold (from 1), folds, step, steps, loss."""

    fold: int
    folds: int
    step: int
    steps: int
    loss: float


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Judged:
    """What the out-of-fold detections are worth.

    Attributes:
        threshold: of the best F1 over all folds, what a new slide is judged at.
        counts: TP, FP and FN of all slides, each at the threshold that the other folds choose.
        slide_counts: int64 (slides, 3), the same of each slide, slides sorted by name.
        f1: of `counts`, with an interval over slides.
        fold_thresholds: what was used for each fold.
    """

    threshold: float
    counts: Counts
    slide_counts: npt.NDArray[np.int64]
    f1: Interval
    fold_thresholds: tuple[float, ...]


def train_fold(
    model: Detector,
    pictures: Sequence[Picture],
    config: DetectConfig,
    *,
    fold: int = 0,
    progress: Callable[[Step], None] | None = None,
) -> list[float]:
    """Train a detector in place on pictures, and return the loss of every step.

    Args:
        model: newly built.
        pictures: the training part.
        config: how.
        fold: which one, from 0; part of the seed.
        progress: told after every step.

    Raises:
        NonFiniteError: NaN or infinity in the gradient; names the pictures of the batch.
        GeometryError: windows that do not suit the pictures, see `detector_data.Windows`.
    """
    drawn = Windows(
        pictures,
        window_px=config.window_px,
        mpp=config.mpp,
        figure_share=config.figure_share,
        lookalike_share=config.lookalike_share,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    rest = [parameter for parameter in trained if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=config.lr,
    )
    model.train()
    losses = []
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * schedule(step, steps=config.steps, warmup=config.warmup)
            losses.append(_step(model, drawn, config, optimizer, trained, at=(fold, step)))
            if progress is not None:
                told = {"fold": fold + 1, "folds": config.folds, "step": step + 1, "steps": config.steps}
                progress(Step(loss=losses[-1], **told))
    model.eval()
    return losses


def _step(
    model: Detector,
    drawn: Windows,
    config: DetectConfig,
    optimizer: torch.optim.Optimizer,
    trained: list[torch.nn.Parameter],
    *,
    at: tuple[int, int],
) -> float:
    """Make one step of the optimiser, and return its loss."""
    words = np.random.SeedSequence((config.seed, *at)).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0] >> 1))
    tiles, points, names = drawn.draw(config.batch, np.random.default_rng(int(words[1])))
    logits = model(window_images(model, tiles))
    sigma_px = config.sigma_um / config.mpp
    grid = (logits.shape[1], logits.shape[2])
    targets = [heat_target(one, grid, stride_px=model.stride_px, sigma_px=sigma_px) for one in points]
    loss = heat_loss(logits, torch.from_numpy(np.stack(targets)).to(logits.device))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
    if not bool(norm.isfinite()):
        shown = ", ".join(dict.fromkeys(names[:8]))
        raise NonFiniteError(
            f"fold {at[0] + 1}, step {at[1] + 1}: the gradient is NaN or infinite; the batch is of {shown}. Lower the "
            f"learning rate ({config.lr:g})"
        )
    optimizer.step()
    return float(loss.detach())


def plan_folds(pictures: Sequence[Picture], *, folds: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return the fold of each picture, int64 (n,): whole slides, with as many figures and pictures in each as can be.

    Raises:
        CohortError: fewer slides with figures than folds.
    """
    groups, of = np.unique([picture.group for picture in pictures], return_inverse=True)
    counts = np.zeros((len(groups), 2))
    np.add.at(counts, of, np.array([(picture.mitotic.sum(), 1) for picture in pictures], dtype=np.float64))
    rich = int((counts[:, 0] > 0).sum())
    if rich < folds:
        raise CohortError(
            f"{rich} slides with mitotic figures cannot be laid out in {folds} folds of whole slides; use fewer "
            "folds, or more slides"
        )
    rng = np.random.default_rng(seed)
    return assign_groups(counts, np.full(folds, 1 / folds), rng=rng).astype(np.int64)[of]


def held_out(maker: HeatMaker, pictures: Sequence[Picture]) -> list[Detections]:
    """Return what is found on pictures at any score from the lowest threshold that is tried."""
    return [find(picture.slide, maker, threshold=float(STEPS[0])) for picture in pictures]


def judge(
    pictures: Sequence[Picture], found: Sequence[Detections], fold: npt.NDArray[np.int64], *, seed: int = 0
) -> Judged:
    """Return threshold and F1 (hits within 7.5 micrometres) of out-of-fold detections.

    Args:
        pictures: n pictures with their figures.
        found: what a detector that had not seen the picture's slide found on it.
        fold: (n,) of each picture.
        seed: of the resamples.

    Raises:
        CohortError: no figure.
    """
    if not any(picture.mitotic.any() for picture in pictures):
        raise CohortError(f"no mitotic figure on {len(pictures)} pictures: there is no F1")
    groups, first = np.unique([picture.group for picture in pictures], return_index=True)
    fold = fold[first]
    slides = [
        _slide([pair for pair in zip(pictures, found, strict=True) if pair[0].group == g]) for g in groups.tolist()
    ]
    tried = np.stack([count_slides(slides, threshold=float(step)) for step in STEPS])
    folds = range(int(fold.max()) + 1)
    chosen = [_best(tried[:, fold != one]) for one in folds]
    counts = np.stack([tried[chosen[one], at] for at, one in enumerate(fold.tolist())])
    return Judged(
        threshold=float(STEPS[_best(tried)]),
        counts=pooled(counts),
        slide_counts=counts,
        f1=bootstrap(f1_metric(counts), groups, seed=seed),
        fold_thresholds=tuple(float(STEPS[at]) for at in chosen),
    )


def _slide(pairs: Sequence[tuple[Picture, Detections]]) -> SlideDetections:
    """Return pictures of one slide side by side, too far apart for a hit from one to the next."""
    truth, places = [], []
    for at, (picture, found) in enumerate(pairs):
        um, aside = np.array([picture.slide.mpp.x, picture.slide.mpp.y]), np.array([at * APART_UM, 0.0])
        truth.append(picture.figures * um + aside)
        places.append(found.xy * um + aside)
    score = np.concatenate([found.score for _, found in pairs])
    return SlideDetections(truth_um=np.concatenate(truth), found_um=np.concatenate(places), score=score)


def _best(counts: npt.NDArray[np.int64]) -> int:
    """Return the threshold's number of the best F1 of counts (thresholds, slides, 3), the highest of equals."""
    f1 = np.nan_to_num([pooled(one).f1 for one in counts])
    return int(np.flatnonzero(f1 == f1.max())[-1])


def train_detector(
    data: Path,
    images: Path,
    encoder: str,
    config: DetectConfig,
    *,
    out: Path,
    slide_mpp: float | None = None,
    device: str = "auto",
    progress: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Train a detector on boxes, choose its threshold out of fold, write both to a folder, and return the report.

    `detector.safetensors` is the model, `detector.json` what is returned. A run that was stopped goes on in its folder,
    after the last fold that it finished.

    Args:
        data: boxes, in the form of `MIDOG++.json`.
        images: folder of their pictures, see `detector_data.read_pictures`.
        encoder: as `load_encoder` takes it.
        config: how.
        out: the folder.
        slide_mpp: microns per pixel of pictures that do not say theirs.
        device: "auto", "cpu", "cuda" ...
        progress: told after every step.

    Raises:
        CohortError: no picture, or too few slides.
        LabelError: no mitotic figure on the pictures.
        GeometryError: windows that the encoder does not take, or that do not suit the pictures.
        NonFiniteError: training ran away.
        CheckpointError: the folder holds a fold of another run, or a damaged one.
    """
    pictures, notes = read_pictures(read_boxes(data), images, slide_mpp=slide_mpp)
    fold = plan_folds(pictures, folds=config.folds, seed=config.seed)
    source = torch_encoder(encoder, device)
    check_side(source.spec, config.window_px)
    states: list[dict[str, Tensor]] = []
    found: list[Detections | None] = [None] * len(pictures)
    tails: list[float] = []
    for at in range(config.folds):
        if at and config.adapt.mode != "head":
            source = torch_encoder(encoder, device)
        model = Detector(source.backbone, config.adapt, width=config.width, seed=config.seed + at)
        train = [picture for picture, one in zip(pictures, fold.tolist(), strict=True) if one != at]
        kept, identity = out / "folds" / f"{at + 1:02d}.safetensors", _identity(at, train, config, source.spec)
        if kept.is_file():
            tails.append(_take_up(model, kept, identity))
        else:
            losses = train_fold(model, train, config, fold=at, progress=progress)
            tails.append(float(np.mean(losses[-max(1, len(losses) // 10) :])))
            save_state(kept, _state(model), {"identity": identity, "loss": tails[-1]})
        maker = TrainedDetector([model], window_px=config.window_px, mpp=config.mpp, threshold=0.0)
        rows = np.flatnonzero(fold == at)
        for row, one in zip(rows.tolist(), held_out(maker, [pictures[row] for row in rows]), strict=True):
            found[row] = one
        states.append(_state(model))
    judged = judge(pictures, cast("list[Detections]", found), fold, seed=config.seed)
    report = _report(pictures, judged, config, encoder, notes) | {"loss": tails}
    out.mkdir(parents=True, exist_ok=True)
    save_detector(out, states, config, spec=source.spec, encoder=encoder, threshold=judged.threshold)
    write_durably(out / REPORT, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    return report


def _report(
    pictures: Sequence[Picture], judged: Judged, config: DetectConfig, encoder: str, notes: Sequence[str]
) -> dict[str, Any]:
    counts = judged.counts
    slides = len({picture.group for picture in pictures})
    told = list(notes)
    if not counts.tp:
        told.append("no detection hit a figure: threshold and F1 say nothing; train longer")
    if slides < FEW_SLIDES:
        told.append(f"{slides} slides: the interval over them is rough")
    return {
        "schema": "eosin.detector/1",
        "version": __version__,
        "encoder": encoder,
        "config": asdict(config),
        "pictures": len(pictures),
        "slides": slides,
        "figures": int(sum(picture.mitotic.sum() for picture in pictures)),
        "hard_negatives": int(sum((~picture.mitotic).sum() for picture in pictures)),
        "threshold": judged.threshold,
        "fold_thresholds": list(judged.fold_thresholds),
        "f1": judged.f1.to_dict(),
        "tp": counts.tp,
        "fp": counts.fp,
        "fn": counts.fn,
        "precision": None if math.isnan(counts.precision) else counts.precision,
        "recall": None if math.isnan(counts.recall) else counts.recall,
        "notes": told,
    }


def _identity(fold: int, pictures: Sequence[Picture], config: DetectConfig, spec: EncoderSpec) -> str:
    """Return a hash of all that decides what a fold learns."""
    told = [fold, asdict(config), spec.weights_hash, [one.name for one in pictures]]
    digest = hashlib.sha256(canonical_json(told).encode())
    for one in pictures:
        digest.update(np.ascontiguousarray(one.xy).tobytes() + np.ascontiguousarray(one.mitotic).tobytes())
    return digest.hexdigest()


def _take_up(model: Detector, kept: Path, identity: str) -> float:
    """Put what a fold has learned into its model, and return its last losses' mean."""
    state, about = load_state(kept)
    if about["identity"] != identity:
        raise CheckpointError(
            f"{kept} is of another recipe, encoder or pictures; write to another folder, or delete it"
        )
    load_trained_state(cast(Any, model), state)
    model.eval()
    return float(about["loss"])


def _state(model: Detector) -> dict[str, Tensor]:
    """Return a copy of what training changed; the network itself can go."""
    return {key: value.cpu().contiguous().clone() for key, value in trained_state(cast(Any, model)).items()}
