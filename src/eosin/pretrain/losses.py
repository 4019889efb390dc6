"""The objectives of self-supervised training, each a plain function of logits or tokens.

All compute in float32 whatever comes in, also inside autocast. Over several ranks each returns the mean over this
rank's rows; see `eosin.encoders.ranks`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from eosin.encoders.ranks import all_reduce_, gather_rows, rank, world_size

KOLEO_EPS = 1e-8
TWINS = 1e-6


def _float32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `loss` with autocast off: a float32 argument alone would still be multiplied in half precision."""

    @functools.wraps(loss)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return loss(x, *args, **kwargs)

    return run


# --- targets of the teacher


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, temperature: float, *, iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the teacher's targets (B, K): rows sum to 1, and prototypes are used about equally over all ranks' rows.

    Alternately scales exp(logits / temperature) so that prototypes, then rows, have equal mass (SwAV, Caron et al.
    2020, section 3.1; Cuturi 2013), in logarithms: the largest logit of all ranks is taken off first, and no prototype
    or row is ever lost to overflow or underflow. Ranks may hold different numbers of rows, also none.

    Args:
        logits: (B, K) of this rank.
        temperature: of the teacher.
        iterations: pairs of scalings.
        group: of ranks; None is all.

    Raises:
        ValueError: one row in all (its target would be uniform), iterations or temperature not positive.
    """
    _check_temperature(temperature)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; Sinkhorn-Knopp needs at least 1")
    if len(logits) == 1 and world_size(group) == 1:
        raise ValueError(
            "Sinkhorn-Knopp got 1 row; it spreads rows over prototypes and needs at least 2: raise the batch"
        )
    scores = logits.float()
    top = scores.amax() if scores.numel() else scores.new_tensor(-math.inf)
    scores = (scores - all_reduce_(top, "max", group)) / temperature
    for i in range(iterations):
        if i:
            scores -= scores.logsumexp(dim=1, keepdim=True)
        scores -= _logsumexp_over_ranks(scores, group)
    return scores.softmax(dim=1)


def _logsumexp_over_ranks(scores: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return log sum exp over the rows (B, K) of every rank, (1, K)."""
    local = scores.logsumexp(dim=0, keepdim=True)
    top = all_reduce_(local.clone(), "max", group)
    return top + all_reduce_((local - top).exp(), "sum", group).log()


class CenteredSoftmax(nn.Module):
    """The teacher's targets as softmax((logits - centre) / temperature) (DINO, Caron et al. 2021, section 3.1).

    The centre is the moving average of the mean logits of all ranks' rows, c <- m c + (1 - m) mean (equation 4).

    Args:
        prototypes: K.
        momentum: m.
    """

    center: Tensor

    def __init__(self, prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, *, group: dist.ProcessGroup | None = None) -> Tensor:
        """Return the targets (B, K) under the centre of earlier steps, then move the centre by these logits (B, K)."""
        _check_temperature(temperature)
        logits = logits.float()
        targets = ((logits - self.center) / temperature).softmax(dim=1)
        sums = torch.cat([logits.sum(dim=0), logits.new_tensor([len(logits)])])
        sums = all_reduce_(sums, "sum", group)
        rows = sums[-1]
        self.center.lerp_(sums[None, :-1] / rows.clamp(min=1), (1 - self.momentum) * (rows > 0))
        return targets


# --- distillation


@_float32
def _cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return -sum_k targets log softmax(logits / temperature), (B,)."""
    return -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)


def dino_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, temperature: float = 0.1) -> Tensor:
    """Return the cross-entropy of every student crop to every teacher crop but its own, averaged over pairs and images.

    With 2 global and 8 local crops this is DINOv2's released weighting: 2 global and 16 local pairs, each worth 1/18
    (DINO, Caron et al. 2021, equation 3).

    Args:
        student: logits (B, K) of each crop, the global crops first and in the teacher's order.
        teacher: targets (B, K) of each global crop.
        temperature: of the student.

    Raises:
        ValueError: no pair, fewer student than teacher crops, or shapes that differ.
    """
    _check_temperature(temperature)
    pairs = len(teacher) * (len(student) - 1)
    if not 0 < len(teacher) <= len(student) or pairs < 1:
        raise ValueError(
            f"{len(student)} student and {len(teacher)} teacher crops make no pair; "
            "the student needs at least 2 crops, the teacher's among them"
        )
    shapes = {tuple(x.shape) for x in (*student, *teacher)}
    if len(shapes) > 1:
        raise ValueError(f"logits and targets of every crop must have one shape (B, K), found {sorted(shapes)}")
    total = student[0].new_zeros((), dtype=torch.float32)
    everything = _total(teacher)
    for i, logits in enumerate(student):
        others = [*teacher[:i], *teacher[i + 1 :]]
        if i >= len(teacher):
            total = total + _cross_entropy(logits, everything, temperature).mean()
        elif others:
            total = total + _cross_entropy(logits, _total(others), temperature).mean()
    return total / pairs


def ibot_loss(student: Tensor, targets: Tensor, masks: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Return the cross-entropy at masked patches: the mean within each crop, then over all crops, masked or not.

    iBOT (Zhou et al. 2022, equation 3) with the divisor of DINOv2's code, all 2B global crops: with half of the crops
    masked the value is half of the mean over masked crops.

    Args:
        student: logits (M, K) of the masked patches, in the order of `patches[masks]`.
        targets: the teacher's targets (M, K) at the same patches, from its unmasked crop.
        masks: (crops, N) bool with M True.
        temperature: of the student.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_temperature(temperature)
    _check_pair(student, targets, "student logits", "targets")
    return _mean_by_crop(_cross_entropy(student, targets, temperature), masks)


@_float32
def jepa_loss(predicted: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Return the smooth L1 distance of predicted to teacher patches at masked blocks, weighted as `ibot_loss`.

    The teacher's patches are layer-normalised without affine terms and take no gradient (I-JEPA, Assran et al. 2023,
    section 3, as its code does).

    Args:
        predicted: (M, D) from a predictor (see `eosin.pretrain.heads.mlp`) on the student's masked patches.
        teacher: (M, D) the teacher's patches at the same places.
        masks: (crops, N) bool with M True.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_pair(predicted, teacher, "predicted", "teacher patches")
    target = F.layer_norm(teacher.detach().float(), teacher.shape[-1:])
    return _mean_by_crop(F.smooth_l1_loss(predicted.float(), target, reduction="none").mean(dim=-1), masks)


@_float32
def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Return the mean squared difference of the patch-to-patch cosines of student and anchor, within each crop.

    Gram anchoring (DINOv3, Siméoni et al. 2025, equation 2, as a mean instead of a sum).

    Args:
        student: patches (B, N, D).
        anchor: patches (B, N, E) of a frozen earlier teacher, without gradient; a finer grid goes through
            `resize_patches` first.

    Raises:
        ValueError: another number of crops or patches.
    """
    if student.ndim != 3 or student.shape[:2] != anchor.shape[:2]:
        raise ValueError(
            f"student {tuple(student.shape)} and anchor {tuple(anchor.shape)} must be (B, N, D) of one B and N"
        )
    a, b = (F.normalize(x.float(), dim=-1) for x in (student, anchor.detach()))
    return F.mse_loss(a @ a.mT, b @ b.mT)


def resize_patches(patches: Tensor, side: int) -> Tensor:
    """Return the patches (B, n * n, D) of a square grid as (B, side * side, D), bicubic, in float32.

    Raises:
        ValueError: the patches do not form a square.
    """
    crops, count, dim = patches.shape
    old = math.isqrt(count)
    if old * old != count:
        raise ValueError(f"{count} patches do not form a square grid")
    planes = patches.float().mT.reshape(crops, dim, old, old)
    return F.interpolate(planes, size=(side, side), mode="bicubic", align_corners=False).flatten(2).mT


def _mean_by_crop(values: Tensor, masks: Tensor) -> Tensor:
    """Return the mean over all crops of the mean of each crop's masked `values` (M,); a crop without any counts 0."""
    counts = masks.flatten(1).sum(dim=1)
    if not masks.is_cuda and int(counts.sum()) != len(values):
        raise ValueError(f"the masks hide {int(counts.sum())} patches; logits of {len(values)} came")
    weights = counts.clamp(min=1).to(values.dtype).reciprocal()
    return (values * weights.repeat_interleave(counts, output_size=len(values))).sum() / len(masks)


def _total(targets: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, targets)


# --- spreading


@_float32
def koleo(z: Tensor, *, gather: bool = True, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return minus the mean log distance of each unit vector to its nearest other (Sablayrolles et al. 2019, eq. 3).

    DINOv2 calls it on each global crop's CLS tokens by themselves, so that two views of one image are not pushed apart.
    Vectors closer than 1e-6 count in the value but take no gradient: at that distance its direction is rounding.

    Args:
        z: (B, D), of any length and precision.
        gather: neighbours are sought among the rows of all ranks; False: among this rank's own, as DINOv2 does.
        group: of ranks; None is all.

    Raises:
        ValueError: fewer than two rows.
    """
    z = F.normalize(z.float(), dim=-1, eps=KOLEO_EPS)
    rows, start = _all_rows(z, "KoLeo", gather, group)
    with torch.no_grad():
        nearest = _without_self(z @ rows.mT, start).argmax(dim=1)
    distance = F.pairwise_distance(z, rows[nearest], eps=KOLEO_EPS)
    distance = torch.where(distance > TWINS, distance, distance.detach())
    return -(distance + KOLEO_EPS).log().mean()


@_float32
def kde(z: Tensor, *, kappa: float = 5.0, gather: bool = True, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the mean log density of each unit vector under a von Mises-Fisher kernel on the others; less is spread.

    mean_i log( 1/(n-1) sum_{j != i} exp(kappa z_i . z_j) ), the uniformity of Wang & Isola 2020 (section 4.1.2) as
    Virchow2 (Zimmermann et al. 2024) uses it. It is added to a loss with a positive weight: stepping down spreads the
    vectors. It is kappa when all are equal and -kappa/(n-1), its least, at a regular simplex.

    Args:
        z: (B, D), of any length and precision.
        kappa: concentration of the kernel.
        gather: density over the rows of all ranks; False: over this rank's own.
        group: of ranks; None is all.

    Raises:
        ValueError: fewer than two rows, or kappa not positive.
    """
    if not 0 < kappa < math.inf:
        raise ValueError(f"kappa is {kappa}; it must be above 0")
    z = F.normalize(z.float(), dim=-1)
    rows, start = _all_rows(z, "KDE", gather, group)
    density = _without_self(kappa * z @ rows.mT, start).logsumexp(dim=1)
    return density.mean() - math.log(len(rows) - 1)


@_float32
def simclr(
    a: Tensor, b: Tensor, *, temperature: float = 0.1, gather: bool = True, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return SimCLR's NT-Xent (Chen et al. 2020, equation 1) of two views, averaged over both directions.

    Args:
        a: (B, D) projections of the first view.
        b: (B, D) of the second; row i is the same image as row i of `a`.
        temperature: of the cosines.
        gather: negatives from all ranks; False: from this rank only.
        group: of ranks; None is all.

    Raises:
        ValueError: fewer than two images, shapes that differ, temperature not positive.
    """
    _check_temperature(temperature)
    _check_pair(a, b, "first view", "second view")
    a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    (rows_a, start), (rows_b, _) = _all_rows(a, "SimCLR", gather, group), _all_rows(b, "SimCLR", gather, group)
    same_a, same_b = (_without_self(x @ rows.mT / temperature, start) for x, rows in ((a, rows_a), (b, rows_b)))
    cross_ab, cross_ba = a @ rows_b.mT / temperature, b @ rows_a.mT / temperature
    own = torch.arange(start, start + len(a), device=a.device)
    first = F.cross_entropy(torch.cat([cross_ab, same_a], dim=1), own)
    return (first + F.cross_entropy(torch.cat([cross_ba, same_b], dim=1), own)) / 2


def _all_rows(z: Tensor, name: str, gather: bool, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Return the rows (n, D) that `z` (b, D) is compared with, and where its own begin among them."""
    if z.ndim != 2:
        raise ValueError(f"{name} takes vectors (B, D), found {tuple(z.shape)}")
    ranks = world_size(group) if gather else 1
    if len(z) * ranks < 2:
        raise ValueError(
            f"{name} compares crops of a batch and got {len(z)} on {ranks} rank(s); "
            "raise the batch to 2 or more, or set its weight to 0"
        )
    return (gather_rows(z, group), rank(group) * len(z)) if gather else (z, 0)


def _without_self(similarity: Tensor, start: int) -> Tensor:
    """Return (b, n) with -inf where row i meets itself, column start + i."""
    itself = torch.zeros_like(similarity, dtype=torch.bool)
    itself.diagonal(start).fill_(True)
    return similarity.masked_fill(itself, -math.inf)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be above 0")


def _check_pair(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"{name_a} {tuple(a.shape)} and {name_b} {tuple(b.shape)} must be two equal (rows, columns)")
