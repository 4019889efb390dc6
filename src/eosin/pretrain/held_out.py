"""What the encoder is worth while it trains: neighbours, a linear probe and a picture of held-out images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from eosin.cohort import grouped_kfold, read_cohort
from eosin.errors import CohortError, LabelError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.metrics import make_metrics
from eosin.heads import KnnHead, LinearProbe
from eosin.pretrain.model import CropTokens, VisionTransformer
from eosin.pretrain.view_config import ViewConfig
from eosin.pretrain.watch import feature_monitors

FOLDS = 5
NEIGHBOURS = 10
C_GRID = (0.001, 0.1)
RESAMPLES = 500
BATCH = 32
GAP = 4

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class HeldOut:
    """Labelled images that training does not see.

    Attributes:
        tiles: uint8 (n, 3, S, S), their centres.
        y: int64 (n,) classes.
        classes: their names.
        clusters: (n,) patients.
    """

    tiles: Tensor
    y: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    clusters: npt.NDArray[np.str_]

    @property
    def folds(self) -> int:
        """Number of parts that no patient is divided between, each of which is tested once."""
        fewest = min(len(np.unique(self.clusters[self.y == code])) for code in np.unique(self.y))
        return min(FOLDS, fewest)


def read_held_out(table: Path, *, patch_px: int) -> HeldOut:
    """Return the images of a table with columns `path` (or `file`), `label` and `patient_id` (or `slide_id`).

    Images are cut, not resized, to one square: the largest multiple of the patch that fits into all of them.

    Args:
        table: CSV; paths are relative to its folder.
        patch_px: side of a patch.

    Raises:
        CohortError: no such column or image.
        LabelError: one class, or one that lies in a single patient.
    """
    cohort = read_cohort(table, label="label")
    column = "file" if "file" in cohort.table else "path"
    y, classes = cohort.labels("label")
    images = [_read(table.parent / name, table) for name in cohort.values(column).tolist()]
    side = min(min(image.shape[:2]) for image in images) // patch_px * patch_px
    if side == 0:
        raise CohortError(f"{table}: an image is smaller than a patch of {patch_px} px")
    tiles = torch.from_numpy(np.stack([_centre(image, side) for image in images])).movedim(3, 1).contiguous()
    found = HeldOut(tiles=tiles, y=y, classes=classes, clusters=cohort.group_key())
    if found.folds < 2:
        raise LabelError(f"{table}: a class lies in one patient only; neighbours are sought among other patients")
    return found


def _read(path: Path, table: Path) -> Pixels:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise CohortError(f"{table}: image {path} cannot be read: {error}") from error


def _centre(image: Pixels, side: int) -> Pixels:
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


@torch.no_grad()
def tokens_of(encoder: VisionTransformer, tiles: Tensor, views: ViewConfig, *, precision: str) -> CropTokens:
    """Return the float32 tokens of tiles uint8 (n, 3, S, S), on the CPU; the encoder's mode is left as it was."""
    device = next(encoder.parameters()).device
    mean, std = (torch.tensor(value, device=device)[:, None, None] for value in (views.mean, views.std))
    was_training, parts = encoder.training, []
    encoder.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for piece in tiles.split(BATCH):
            (tokens,) = encoder([(piece.to(device) / 255 - mean) / std])
            parts.append([part.float().cpu() for part in tokens])
    encoder.train(was_training)
    return CropTokens(*(torch.cat(part) for part in zip(*parts, strict=True)))


def probe(features: npt.NDArray[np.float32], held: HeldOut, *, seed: int = 0) -> dict[str, Any]:
    """Return how well labels are told from features (n, D), out of fold by patient.

    kNN votes of `NEIGHBOURS` by cosine, and a linear probe whose strength is chosen inside the training part. Balanced
    accuracy, with an interval that resamples patients; its chance level is 1 / classes.

    Returns:
        "knn" and "linear" as intervals (point, low, high, n, clusters ...), "rankme", "n", "clusters", "folds" and
        "chance".
    """
    splits = grouped_kfold(held.y, groups=held.clusters, folds=held.folds, seed=seed)
    heads = {
        "knn": lambda train: KnnHead(k_grid=(min(NEIGHBOURS, len(train)),)).fit(features[train], held.y[train]),
        "linear": lambda train: _linear(features[train], held.y[train], held.clusters[train]),
    }
    found: dict[str, Any] = {}
    for name, fit in heads.items():
        scores = np.zeros((len(held.y), len(held.classes)))
        for split in splits:
            head = fit(split.train)
            scores[np.ix_(split.test, head.classes_)] = head.predict_proba(features[split.test])
        metric = make_metrics(["ba"], held.y, scores)["ba"]
        found[name] = bootstrap(metric, held.clusters, y=held.y, resamples=RESAMPLES, seed=seed).to_dict()
    clusters = len(np.unique(held.clusters))
    sizes = {"n": len(held.y), "clusters": clusters, "folds": held.folds, "chance": 1 / len(held.classes)}
    return {**found, "rankme": feature_monitors(torch.from_numpy(features))["rankme"], **sizes}


def _linear(x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], clusters: npt.NDArray[np.str_]) -> LinearProbe:
    fewest = min(len(np.unique(clusters[y == code])) for code in np.unique(y))
    if fewest < 2:  # the strength cannot be chosen on other patients
        return LinearProbe(c_grid=C_GRID[:1]).fit(x, y)
    splits = [(s.train, s.test) for s in grouped_kfold(y, groups=clusters, folds=min(3, fewest))]
    return LinearProbe(c_grid=C_GRID, scoring="log_loss").fit(x, y, splits=splits)


def pca_picture(patches: Tensor, tiles: Tensor, path: Path, *, columns: int = 8) -> Path:
    """Write a PNG of tiles, each above its patches' first three principal components as red, green and blue.

    The components are those of all patches of all tiles together, so one colour means one thing in the whole picture;
    each is stretched from its 2nd to its 98th percentile.

    Args:
        patches: float (n, N, D) of square grids.
        tiles: uint8 (n, 3, S, S).
        path: the file to write, `.png`.
        columns: tiles in a row.
    """
    n, count, dim = patches.shape
    grid, side = round(count**0.5), tiles.shape[2]
    flat = patches.reshape(-1, dim).double()
    flat = flat - flat.mean(dim=0)
    _, axes = torch.linalg.eigh(flat.T @ flat)
    axes = axes.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    shown = flat @ axes
    low, high = (torch.quantile(shown[:: max(1, len(shown) // 100_000)], q, dim=0) for q in (0.02, 0.98))
    colours = ((shown - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).to(torch.uint8)
    if colours.shape[1] < 3:
        colours = torch.cat([colours, colours.new_zeros(len(colours), 3 - colours.shape[1])], dim=1)
    maps = colours.reshape(n, grid, grid, 3).numpy()
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (side + GAP) - GAP, rows * (2 * side + 3 * GAP) - 2 * GAP), "white")
    for at in range(n):
        left, top = at % columns * (side + GAP), at // columns * (2 * side + 3 * GAP)
        sheet.paste(Image.fromarray(tiles[at].movedim(0, 2).contiguous().numpy()), (left, top))
        coloured = Image.fromarray(maps[at]).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(coloured, (left, top + side + GAP))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")
    return path


def spread_rows(clusters: Sequence[str] | npt.NDArray[np.str_], count: int) -> list[int]:
    """Return up to `count` row numbers, taking one of each cluster before a second of any."""
    turn: Counter[str] = Counter()
    order: list[tuple[int, int]] = []
    for row, name in enumerate(clusters):
        order.append((turn[str(name)], row))
        turn[str(name)] += 1
    return sorted(row for _, row in sorted(order)[:count])
