"""From tiles to P(atypical): views of a tile, several folds, one temperature, one threshold, and how sure they are.

The logits of a tile's views are averaged (the winner of MIDOG 2025 task 2 averages those of four rotations), then those
of the folds, and then one temperature divides them: P = sigmoid(mean / T). Every score is P(atypical).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.nn import functional

from eosin.encoders import load_encoder
from eosin.encoders.encoder import Encoder
from eosin.encoders.spec import EncoderSpec
from eosin.encoders.weights import SUFFIXES
from eosin.errors import CheckpointError, ConfigError, GeometryError, NonFiniteError
from eosin.features.writer import replace_durably, write_durably
from eosin.finetune.recipe import Tta
from eosin.finetune.saving import load_trained

BATCH = 64
MODEL = "model"
ENSEMBLE = "ensemble.json"
CONFIG = "config.json"
VERSION = 1
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """How a tile becomes the input of an encoder.

    Attributes:
        side_px: of the input.
        crop_px: side of the centre of a tile that is used; 0 is all of it.
        mean: of each channel, scale 0-1.
        std: of each channel.
    """

    side_px: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepare(self, images: Tensor) -> Tensor:
        """Return images (B, 3, S, S) in 0-1 as the encoder takes them, (B, 3, side_px, side_px)."""
        if 0 < self.crop_px < images.shape[-1]:
            start = (images.shape[-1] - self.crop_px) // 2
            images = images[..., start : start + self.crop_px, start : start + self.crop_px]
        if images.shape[-1] != self.side_px:
            images = functional.interpolate(
                images, size=(self.side_px, self.side_px), mode="bicubic", antialias=True
            ).clamp(0, 1)
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return (images - mean) / std


def input_of(
    spec: EncoderSpec, *, tile_px: int, input_px: int = 0, crop_px: int = 0, expert: EncoderSpec | None = None
) -> Input:
    """Return how tiles of `tile_px` become the input of an encoder, or of two that look at the same input.

    Args:
        spec: of the encoder; a second one gets the input normalised as this one.
        tile_px: side of the tiles.
        input_px: side to resize to; 0 keeps the tiles' pixels and cuts the centre to a whole number of patches.
        crop_px: side of the centre of a tile that is used; 0 is all of it.
        expert: of a second encoder, whose patches must fit into the input, too.

    Raises:
        GeometryError: the input is no whole number of patches, or the centre is larger than the tile.
    """
    if crop_px > tile_px:
        raise GeometryError(f"crop_px is {crop_px}, and the tiles have {tile_px} px; it must not be larger")
    both = (spec,) if expert is None else (spec, expert)
    patch = math.lcm(*(one.patch_px or 1 for one in both))
    centre = crop_px or tile_px
    side = input_px or centre // patch * patch
    if side < 1 or side % patch:
        raise GeometryError(
            f"{' with '.join(one.name for one in both)} takes sides that are a multiple of {patch} px, found "
            f"{input_px or centre}; the closest are "
            f"{max(patch, side // patch * patch)} and {(side // patch + 1) * patch}"
        )
    return Input(side_px=side, crop_px=crop_px if input_px else side, mean=spec.mean, std=spec.std)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """What turns logits into calls.

    Attributes:
        threshold: P(atypical) from which a cell is called atypical.
        temperature: divides logits, once the shift is taken from them.
        n: out-of-fold cells all were fitted on.
        shift: the logit at which both classes are as likely, among cells like those that were fitted on.
        note: why temperature and shift do nothing, or "".
    """

    threshold: float
    temperature: float
    n: int
    shift: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Predictions:
    """What an ensemble says of n tiles.

    Attributes:
        p: P(atypical) (n,).
        fold_p: P(atypical) of each fold by itself (folds, n).
        spread: standard deviation of the folds' logits after the temperature (n,), 0 of one fold.
        entropy: of P(atypical), bits (n,): 0 is sure, 1 is a coin.
        disagreement: mutual information between call and fold, bits (n,): the part of the entropy that the folds do
            not share (Gal et al. 2017, arXiv 1703.02910, equation 2; of `p_mean`, the folds' mean probability).
    """

    p: Floats
    fold_p: Floats
    spread: Floats
    entropy: Floats
    disagreement: Floats


def views(images: Tensor, tta: Tta) -> list[Tensor]:
    """Return the views of images (B, 3, S, S) that are averaged: rotations by quarters, and their mirror images.

    Raises:
        ConfigError: an unknown kind.
    """
    if tta == "none":
        return [images]
    turned = [torch.rot90(images, quarter, (2, 3)) for quarter in range(4)]
    if tta == "rot4":
        return turned
    if tta == "dihedral":
        return [*turned, *(view.flip(3) for view in turned)]
    raise ConfigError(f"no test-time augmentation is called {tta!r}; choose none, rot4 or dihedral")


def tile_logits(
    model: nn.Module,
    tiles: npt.NDArray[np.uint8],
    how: Input,
    *,
    tta: Tta = "none",
    device: str = "cpu",
    precision: str = "fp32",
    batch: int = BATCH,
) -> Floats:
    """Return the logit of each tile, the mean over its views, float64 (n,).

    Args:
        model: normalised (B, 3, s, s) to a logit a tile, (B,) or (B, 1).
        tiles: uint8 (n, S, S, 3).
        how: tiles become inputs.
        tta: views that are averaged.
        device: that the model is on.
        precision: "fp32" or "bf16".
        batch: tiles at once.

    Raises:
        GeometryError: the tiles are not uint8 (n, S, S, 3).
        NonFiniteError: NaN or infinity among the logits.
    """
    if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.dtype != np.uint8 or tiles.shape[1] != tiles.shape[2]:
        raise GeometryError(f"tiles are {tiles.dtype} {tiles.shape}; needed: uint8 (n, S, S, 3), square")
    was, parts = model.training, []
    model.eval()
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), autocast:
        for start in range(0, len(tiles), batch):
            images = to_images(tiles[start : start + batch], device)
            each = [model(how.prepare(view)).float().reshape(-1) for view in views(images, tta)]
            parts.append(torch.stack(each).double().mean(0).cpu().numpy())
    model.train(was)
    logits = np.concatenate(parts) if parts else np.empty(0)
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            f"{int((~np.isfinite(logits)).sum())} of {len(logits)} tiles have a logit that is NaN or infinite; "
            "try precision fp32, or train at a lower learning rate"
        )
    return logits


def to_images(tiles: npt.NDArray[np.uint8], device: str) -> Tensor:
    """Return tiles uint8 (B, S, S, 3) as float32 (B, 3, S, S) in 0-1 on a device."""
    return torch.from_numpy(np.ascontiguousarray(tiles)).to(device).permute(0, 3, 1, 2).float().div_(255)


def combine(logits: npt.ArrayLike, *, temperature: float = 1.0, shift: float = 0.0) -> Predictions:
    """Return what an ensemble says, from the logits of its folds.

    Args:
        logits: (folds, n).
        temperature: fitted out of fold, as is the shift; see `Scale`.
        shift: taken from the logits before they are divided.

    Raises:
        ConfigError: a temperature that is not positive, or no fold.
    """
    each = np.atleast_2d(np.asarray(logits, dtype=np.float64))
    if not (0 < temperature < np.inf) or not len(each):
        raise ConfigError(f"temperature {temperature:g} of {len(each)} folds; it must be above 0, of one fold or more")
    scaled = (each - shift) / temperature
    fold_p, p = expit(scaled), expit(scaled.mean(0))
    shared = binary_entropy(fold_p).mean(0)
    return Predictions(
        p=p,
        fold_p=fold_p,
        spread=scaled.std(0),
        entropy=binary_entropy(p),
        disagreement=np.maximum(binary_entropy(fold_p.mean(0)) - shared, 0),
    )


def binary_entropy(p: npt.ArrayLike) -> Floats:
    """Return -p log2 p - (1 - p) log2 (1 - p), 0 at both ends."""
    one = np.asarray(p, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -(one * np.log2(one) + (1 - one) * np.log2(1 - one))
    return np.where((one <= 0) | (one >= 1), 0.0, bits)


class Ensemble:
    """Trained folds that answer together: `scores(tiles)` is P(atypical), to be called from `threshold` on.

    Attributes:
        threshold: chosen on out-of-fold predictions.
        temperature: fitted on them.
        shift: fitted on them.
        models: one a fold.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        how: Input,
        *,
        threshold: float,
        temperature: float = 1.0,
        shift: float = 0.0,
        tta: Tta = "rot4",
        device: str = "cpu",
        precision: str = "fp32",
    ) -> None:
        """Keep the folds' models and what they need."""
        self.models, self.how = tuple(models), how
        self.tta: Tta = tta
        self.threshold, self.temperature, self.shift = threshold, temperature, shift
        self.device, self.precision = device, precision

    def predict(self, tiles: npt.NDArray[np.uint8]) -> Predictions:
        """Return P(atypical) of tiles uint8 (n, S, S, 3), with what the folds say apart."""
        logits = [
            tile_logits(model, tiles, self.how, tta=self.tta, device=self.device, precision=self.precision)
            for model in self.models
        ]
        return combine(np.stack(logits), temperature=self.temperature, shift=self.shift)

    def scores(self, tiles: npt.NDArray[np.uint8], /) -> Floats:
        """Return P(atypical) (n,) of tiles uint8 (n, S, S, 3)."""
        return self.predict(tiles).p


def write_ensemble(
    folder: Path,
    files: Sequence[Path],
    *,
    encoder: str,
    how: Input,
    scale: Scale,
    tta: Tta,
    precision: str,
    expert: str = "",
) -> Path:
    """Write a folder that answers by itself: what each fold trained, and how their answers become calls.

    An encoder that is a file, or a folder with its config.json, is copied into it; a registered one is named, and must
    be installed where it is loaded.

    Args:
        folder: to write to.
        files: of `save_trained`, one a fold.
        encoder: as `load_encoder` takes it.
        how: tiles become inputs.
        scale: temperature, shift and threshold.
        tta: views whose logits are averaged.
        precision: of the training, "fp32" or "bf16"; the ensemble answers in it.
        expert: the second encoder of a mixture, likewise; "" where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"fold-{at + 1:02d}.safetensors" for at in range(len(files))]
    for name, file in zip(names, files, strict=True):
        _copy(file, folder / name)
    told = {
        "version": VERSION,
        "encoder": _kept(folder, encoder, "encoder"),
        **({"expert": _kept(folder, expert, "expert")} if expert else {}),
        "folds": names,
        "input": asdict(how),
        "scale": scale.to_dict(),
        "tta": tta,
        "precision": precision,
        "score": "P(atypical)",
    }
    write_durably(folder / ENSEMBLE, json.dumps(told, indent=1, allow_nan=False).encode())
    return folder


def _kept(folder: Path, source: str, stem: str) -> str:
    """Return what an encoder is called in a folder, after copying it if it is files and not a name."""
    path = Path(source)
    if path.is_file():
        _copy(path, folder / f"{stem}{path.suffix}")
        return f"{stem}{path.suffix}"
    if not (path / CONFIG).is_file():
        return source
    (folder / stem).mkdir(exist_ok=True)
    for file in path.iterdir():
        if file.suffix in (*SUFFIXES, ".json"):
            _copy(file, folder / stem / file.name)
    return stem


def load_classifier(
    folder: Path, *, device: str = "auto", encoder: str = "", folds: Sequence[int] | None = None
) -> Ensemble:
    """Return the ensemble of a folder: `.threshold`, and `.scores(tiles)` -> P(atypical).

    Args:
        folder: of `write_ensemble`, or of the run that wrote it.
        device: "auto", "cpu", "cuda" ...
        encoder: where the encoder lies, if not where the folder says; of a mixture, the first.
        folds: numbers, from 0, of the folds that are to answer; None is all.

    Raises:
        CheckpointError: no such folder, or a damaged file in it.
        WeightsError: another encoder than the one that was trained.
    """
    folder = folder if (folder / ENSEMBLE).is_file() else folder / MODEL
    try:
        told = json.loads((folder / ENSEMBLE).read_text(encoding="utf-8"))
        scale, tta, names = Scale(**told["scale"]), told["tta"], list(told["folds"])
        eyes = told["input"]
        how = Input(**{**eyes, "mean": tuple(eyes["mean"]), "std": tuple(eyes["std"])})
        sources, precision = [encoder or str(told["encoder"])], str(told["precision"])
        sources += [str(told["expert"])] if told.get("expert") else []
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no {ENSEMBLE}; give the folder that eosin finetune wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / ENSEMBLE} is damaged ({error!r}); copy it again") from error
    sources = [source if source == encoder else _found(folder, source) for source in sources]
    models, where = [], "cpu"
    for name in names if folds is None else [names[at] for at in folds]:
        loaded = [_load_base(source, device=device, precision=precision) for source in sources]
        where = loaded[0].device
        models.append(load_trained(folder / name, loaded)[0].to(where))
    return Ensemble(
        models,
        how,
        threshold=scale.threshold,
        temperature=scale.temperature,
        shift=scale.shift,
        tta=tta,
        device=where,
        precision=precision,
    )


def _found(folder: Path, source: str) -> str:
    """Return the file of an encoder that lies in the folder, or the name that it has."""
    beside = folder / source
    kept = (beside.suffix in SUFFIXES and beside.is_file()) or (beside / CONFIG).is_file()
    return str(beside) if kept else source


def _load_base(source: str, *, device: str, precision: str) -> Encoder:
    loaded = load_encoder(source, device=device, precision=precision, backend="torch")
    if not isinstance(loaded, Encoder):
        raise ConfigError(f"{source} is no encoder that can have been trained")
    return loaded


def _copy(source: Path, target: Path) -> None:
    draft = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, draft)
    replace_durably(draft, target)
