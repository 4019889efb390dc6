"""Training a detector: folds of whole slides, a threshold out of fold, one file that answers by itself.

AdamW with linear warm-up and half a cosine, seeded by fold and step alone. There is no early stop: the held-out folds
choose the threshold and nothing else, and each fold's F1 is counted at the threshold that the other folds choose.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.cohort.balance import assign_groups
from eosin.encoders import load_encoder
from eosin.encoders.checkpoints import hash_tensors
from eosin.encoders.encoder import Encoder
from eosin.encoders.spec import EncoderSpec, check_side
from eosin.errors import CheckpointError, CohortError, ConfigError, NonFiniteError, WeightsError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.interval import Interval
from eosin.features.writer import replace_durably, write_durably
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.detections import Detections
from eosin.finetune.detector import Detector, heat_loss, heat_target
from eosin.finetune.detector_data import Picture, Windows, read_pictures
from eosin.finetune.detector_scan import HeatMaker, find
from eosin.finetune.joins import read_boxes
from eosin.finetune.matching import Counts, SlideDetections, count_slides, f1_metric, pooled
from eosin.finetune.resume import load_state, save_state
from eosin.finetune.saving import load_trained_state, trained_state
from eosin.finetune.train import schedule
from eosin.version import __version__

FILE = "detector.safetensors"
REPORT = "detector.json"
VERSION = 1
# Thresholds that are tried: scores are not surer than that.
STEPS = np.arange(1, 100) / 100
FEW_SLIDES = 20
# Between two pictures of one slide while they are counted: a metre, wider than any.
APART_UM = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectConfig:
    """How a detector is trained.

    Attributes:
        adapt: what of the encoder trains; by default nothing.
        window_px: side of the windows, in training and in use.
        mpp: microns per pixel of the windows.
        sigma_um: of a figure's bump.
        width: channels of the head.
        steps: of the optimiser, a fold.
        batch: windows a step.
        lr: peak learning rate.
        weight_decay: of matrices.
        warmup: share of the steps.
        clip: largest norm of the gradient.
        figure_share: share of windows that hold a figure.
        lookalike_share: share of windows that hold a hard negative.
        folds: of whole slides.
        seed: of every draw.
    """

    adapt: AdaptConfig = field(default_factory=lambda: AdaptConfig(mode="head"))
    window_px: int = 224
    mpp: float = 0.25
    sigma_um: float = 2.0
    width: int = 64
    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    figure_share: float = 0.5
    lookalike_share: float = 0.25
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one is out of range.
        """
        for name in ("window_px", "mpp", "sigma_um", "width", "steps", "batch", "lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.folds < 2:
            raise ConfigError(f"folds is {self.folds}; two are needed to choose a threshold out of fold")
        if min(self.figure_share, self.lookalike_share) < 0 or self.figure_share + self.lookalike_share > 1:
            raise ConfigError(
                f"figure_share {self.figure_share:g} and lookalike_share {self.lookalike_share:g} are shares of the "
                "windows: at least 0, together at most 1"
            )


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


class TrainedDetector:
    """Detectors of several folds whose logits are averaged; see `detector_scan.find`.

    Attributes:
        models: one a fold.
        window_px, mpp: of the windows.
        threshold: chosen out of fold.
    """

    def __init__(self, models: Sequence[Detector], *, window_px: int, mpp: float, threshold: float) -> None:
        """Keep the models, ready for use."""
        self.models = tuple(model.eval() for model in models)
        self.window_px, self.mpp, self.threshold = window_px, mpp, threshold

    def heat(self, tiles: npt.NDArray[np.uint8]) -> Tensor:
        """Return the mean logits (B, h, w) of windows uint8 (B, window_px, window_px, 3)."""
        images = _inputs(self.models[0], tiles)
        if all(model.backbone is self.models[0].backbone for model in self.models):
            tokens = self.models[0].tokens(images)
            return torch.stack([model.head(tokens).squeeze(1) for model in self.models]).mean(0)
        return torch.stack([model(images) for model in self.models]).mean(0)


def _inputs(model: Detector, tiles: npt.NDArray[np.uint8]) -> Tensor:
    """Return windows uint8 (B, S, S, 3) as the model's normalised images (B, 3, S, S)."""
    device = next(model.parameters()).device
    images = torch.from_numpy(np.ascontiguousarray(tiles)).to(device).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(part, device=device)[:, None, None] * 255 for part in (model.spec.mean, model.spec.std))
    return ((images - mean) / std).contiguous()


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
    logits = model(_inputs(model, tiles))
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

    `detector.safetensors` is the model, `detector.json` what is returned.

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
    """
    pictures, notes = read_pictures(read_boxes(data), images, slide_mpp=slide_mpp)
    fold = plan_folds(pictures, folds=config.folds, seed=config.seed)
    source = _encoder(encoder, device)
    check_side(source.spec, config.window_px)
    states: list[dict[str, Tensor]] = []
    found: list[Detections | None] = [None] * len(pictures)
    tails: list[float] = []
    for at in range(config.folds):
        if at and config.adapt.mode != "head":
            source = _encoder(encoder, device)
        model = Detector(source.backbone, config.adapt, width=config.width, seed=config.seed + at)
        train = [picture for picture, one in zip(pictures, fold.tolist(), strict=True) if one != at]
        losses = train_fold(model, train, config, fold=at, progress=progress)
        tails.append(float(np.mean(losses[-max(1, len(losses) // 10) :])))
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


def _encoder(name: str, device: str) -> Encoder:
    loaded = load_encoder(name, device=device, precision="fp32", backend="torch")
    if not isinstance(loaded, Encoder):
        raise ConfigError(f"{name} gives no patch tokens to find cells on; choose a vision transformer")
    return loaded


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


def _state(model: Detector) -> dict[str, Tensor]:
    """Return a copy of what training changed; the network itself can go."""
    return {key: value.cpu().contiguous().clone() for key, value in trained_state(cast(Any, model)).items()}


def save_detector(
    folder: Path,
    states: Sequence[Mapping[str, Tensor]],
    config: DetectConfig,
    *,
    spec: EncoderSpec,
    encoder: str,
    threshold: float,
) -> Path:
    """Write what the folds trained as one file, whole or not at all; an encoder that is a file is copied beside it.

    Args:
        folder: to write to.
        states: what each fold trained, as `saving.trained_state` names it.
        config: how.
        spec: of the encoder, with the hash of its weights before training.
        encoder: as `load_encoder` takes it.
        threshold: chosen out of fold.

    Raises:
        NonFiniteError: a trained value is NaN or infinite.
        WeightsError: the encoder has no hash of its weights.
    """
    if not spec.weights_hash:
        raise WeightsError(f"{spec.name} has no hash of its weights, so that a file could not name them; load it anew")
    source, name = Path(encoder), encoder
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        name = f"encoder{source.suffix}"
        draft = folder / f".{name}.part"
        shutil.copyfile(source, draft)
        replace_durably(draft, folder / name)
    state = {f"{at}/{key}": value for at, one in enumerate(states) for key, value in one.items()}
    about = {
        "detector": VERSION,
        "encoder": name,
        "weights_hash": spec.weights_hash,
        "folds": len(states),
        "config": asdict(config),
        "threshold": threshold,
        "trained_hash": hash_tensors(state),
        "version": __version__,
    }
    save_state(folder / FILE, state, about)
    return folder / FILE


def load_detector(folder: Path, *, device: str = "auto", encoder: str = "") -> TrainedDetector:
    """Return the detector of a folder, ready for `detector_scan.find`.

    Args:
        folder: that `train_detector` wrote to.
        device: "auto", "cpu", "cuda" ...
        encoder: where the encoder lies, if not where the folder says.

    Raises:
        CheckpointError: no such file, another program's, or an altered one.
        WeightsError: another encoder than the one that was trained on.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {FILE}; give the folder that eosin detect train wrote")
    try:
        state, about = load_state(path)
        config, folds = _config(about["config"]), int(about["folds"])
        kept, threshold, name = str(about["weights_hash"]), float(about["threshold"]), str(about["encoder"])
        whole = hash_tensors(state) == about["trained_hash"]
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no detector, or damaged ({error}); copy it again, or train anew") from error
    if not whole:
        raise CheckpointError(f"{path} has been altered: its tensors are not those it was written with")
    beside = folder / name
    source = encoder or (str(beside) if name.startswith("encoder.") and beside.is_file() else name)
    models: list[Detector] = []
    for at in range(folds):
        loaded = _encoder(source, device) if not models or config.adapt.mode != "head" else models[0]
        if loaded.spec.weights_hash != kept:
            raise WeightsError(
                f"{path.name} was trained on {name} with weights {kept}; the encoder given is {loaded.spec.name} with "
                f"weights {loaded.spec.weights_hash or 'without a hash'}: load the one it was trained on"
            )
        model = Detector(loaded.backbone, config.adapt, width=config.width, seed=config.seed + at)
        start = f"{at}/"
        own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        load_trained_state(cast(Any, model), own)
        models.append(model)
    return TrainedDetector(models, window_px=config.window_px, mpp=config.mpp, threshold=threshold)


def _config(values: Mapping[str, Any]) -> DetectConfig:
    adapted = AdaptConfig(**{**values["adapt"], "targets": tuple(values["adapt"]["targets"])})
    return DetectConfig(**{**values, "adapt": adapted})
