"""A trained detector: how it was made, how it answers, and the one file that it is kept in."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eosin.encoders import load_encoder
from eosin.encoders.checkpoints import hash_tensors
from eosin.encoders.encoder import Encoder
from eosin.encoders.spec import EncoderSpec
from eosin.errors import CheckpointError, ConfigError, WeightsError
from eosin.features.writer import replace_durably
from eosin.finetune.adapters import AdaptConfig
from eosin.finetune.detector import Detector
from eosin.finetune.resume import load_state, save_state
from eosin.finetune.saving import load_trained_state
from eosin.version import __version__

FILE = "detector.safetensors"
VERSION = 1


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
        images = window_images(self.models[0], tiles)
        if all(model.backbone is self.models[0].backbone for model in self.models):
            tokens = self.models[0].tokens(images)
            return torch.stack([model.head(tokens).squeeze(1) for model in self.models]).mean(0)
        return torch.stack([model(images) for model in self.models]).mean(0)


def window_images(model: Detector, tiles: npt.NDArray[np.uint8]) -> Tensor:
    """Return windows uint8 (B, S, S, 3) as the model's normalised images (B, 3, S, S)."""
    device = next(model.parameters()).device
    images = torch.from_numpy(np.ascontiguousarray(tiles)).to(device).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(part, device=device)[:, None, None] * 255 for part in (model.spec.mean, model.spec.std))
    return ((images - mean) / std).contiguous()


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
        loaded = torch_encoder(source, device) if not models or config.adapt.mode != "head" else models[0]
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


def torch_encoder(name: str, device: str) -> Encoder:
    """Return an encoder that has patch tokens and can train.

    Raises:
        ConfigError: it is a fixed computation.
    """
    loaded = load_encoder(name, device=device, precision="fp32", backend="torch")
    if not isinstance(loaded, Encoder):
        raise ConfigError(f"{name} gives no patch tokens to find cells on; choose a vision transformer")
    return loaded
