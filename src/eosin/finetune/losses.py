"""The losses of fine-tuning: cross-entropy and focal, of hard and soft labels, weighted by row.

Everything is computed row by row in float32 or better, also inside autocast, and averaged last: L = mean(w_i L_i). With
the weights of `eosin.finetune.weights` that is a domain-weighted focal loss (DWFL),

    L = (1 / N) sum_i w_d(i) FL(p_t,i),    FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t),

FL being equation 5 of Lin et al., ICCV 2017. The winner of MIDOG 2025 task 2 (Balezo et al., arXiv 2508.21041) names
such a loss; the gamma, alpha and exact weights it used could not be read. This form, and every default here, is ours.

A soft label q, a share of votes or a mixture of two images, costs what its votes cost on average:
q FL(1) + (1 - q) FL(0). That is linear in q, and is the usual soft cross-entropy at gamma 0. (Putting q into p_t, as
torchvision's focal loss would, is not.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eosin.errors import ConfigError, NonFiniteError

ROWS_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """A loss: cross-entropy is gamma 0.

    Attributes:
        gamma: focusing exponent, 0-10; 0 leaves plain cross-entropy, bit for bit torch's.
        alpha: share of the positive class, 0-1, the negative one having 1 - alpha; or one factor a class; or None.
        smoothing: label smoothing, 0 to below 1: q becomes (1 - smoothing) q + smoothing / classes.
    """

    gamma: float = 2.0
    alpha: float | tuple[float, ...] | None = None
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: one is out of range.
        """
        if not 0 <= self.gamma <= 10:
            raise ConfigError(f"gamma is {self.gamma}; it must be in 0-10 (0 is cross-entropy, 2 is usual)")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"label smoothing is {self.smoothing}; it must be in 0 to below 1")
        if isinstance(self.alpha, tuple):
            if len(self.alpha) < 2 or not all(0 <= a < float("inf") for a in self.alpha) or not any(self.alpha):
                raise ConfigError(f"alpha is {self.alpha}; give one finite factor of at least 0 for each class")
        elif self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}; it must be in 0-1, or None for no class weight")


def training_loss(
    logits: Tensor,
    targets: Tensor,
    config: LossConfig,
    *,
    weights: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Return the loss of a batch, a scalar: the mean over rows of weight times loss.

    Args:
        logits: (B,) or (B, 1) for two classes, (B, K) for K of them.
        targets: see `loss_rows`.
        config: which loss.
        weights: (B,) of each row, whose mean over all training rows is 1; None is 1 each.
        names: (B,) of the rows, for the error.

    Raises:
        ConfigError: shapes that do not fit.
        NonFiniteError: a row's loss is NaN or infinite, a target lies outside 0-1, or no class has its number; names
            the rows.
    """
    return mean_loss(loss_rows(logits, targets, config), weights=weights, names=names)


def loss_rows(logits: Tensor, targets: Tensor, config: LossConfig) -> Tensor:
    """Return the loss of each row, (B,), not weighted.

    Args:
        logits: (B,) or (B, 1) for two classes, (B, K) for K of them.
        targets: two classes: (B,) or (B, 1), probability of the positive class. K classes: (B,) class numbers
            from 0, or (B, K) probabilities.
        config: which loss.

    Raises:
        ConfigError: shapes that do not fit.
    """
    if logits.ndim == 2 and logits.shape[1] > 1:
        if config.alpha is not None and not isinstance(config.alpha, tuple):
            raise ConfigError(f"alpha is {config.alpha} for {logits.shape[1]} classes; give one factor for each class")
        return multiclass_rows(logits, targets, gamma=config.gamma, alpha=config.alpha, smoothing=config.smoothing)
    if isinstance(config.alpha, tuple):
        raise ConfigError(f"alpha is {config.alpha} for one logit; give the share of the positive class, or None")
    return binary_rows(logits, targets, gamma=config.gamma, alpha=config.alpha, smoothing=config.smoothing)


def binary_rows(
    logits: Tensor, targets: Tensor, *, gamma: float = 0.0, alpha: float | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy (gamma 0) or focal loss of each row, (B,).

    Lin et al., "Focal loss for dense object detection", ICCV 2017, equation 5, averaged over the votes of a soft label.
    Powers of 1 - p_t are taken as exp(gamma log(1 - p_t)), so that gradients stay finite for any gamma and logit.

    Args:
        logits: (B,) or (B, 1).
        targets: (B,) or (B, 1), probability of the positive class.
        gamma: focusing exponent.
        alpha: share of the positive class, or None for no class weight.
        smoothing: of labels.

    Raises:
        ConfigError: shapes that do not fit.
    """
    if logits.ndim not in (1, 2) or logits.shape[1:] not in ((), (1,)) or targets.numel() != len(logits):
        raise ConfigError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} are not one number a row")
    with torch.autocast(logits.device.type, enabled=False):
        x = _at_least_float32(logits).reshape(-1)
        q = _in_unit(targets.reshape(-1).to(x.dtype))
        if smoothing:
            q = q * (1 - smoothing) + smoothing / 2
        if gamma == 0 and alpha is None:
            return F.binary_cross_entropy_with_logits(x, q, reduction="none")
        positive = -F.logsigmoid(x) * torch.exp(gamma * F.logsigmoid(-x))
        negative = -F.logsigmoid(-x) * torch.exp(gamma * F.logsigmoid(x))
        share = 1.0 if alpha is None else alpha
        rest = 1.0 if alpha is None else 1 - alpha
        return share * q * positive + rest * (1 - q) * negative


def multiclass_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 0.0,
    alpha: Sequence[float] | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy (gamma 0) or focal loss of each row over K classes, (B,): sum_c q_c alpha_c FL(p_c).

    Args:
        logits: (B, K).
        targets: (B,) class numbers from 0, or (B, K) probabilities.
        gamma: focusing exponent.
        alpha: (K,) factor of each class, or None.
        smoothing: of labels.

    Raises:
        ConfigError: shapes that do not fit.
    """
    classes = logits.shape[1]
    hard = targets.shape == logits.shape[:1] and not targets.is_floating_point()
    if not hard and targets.shape != logits.shape:
        raise ConfigError(
            f"targets {tuple(targets.shape)} of {targets.dtype} do not go with logits {tuple(logits.shape)}; "
            "give (B,) class numbers or (B, K) probabilities"
        )
    if alpha is not None and len(alpha) != classes:
        raise ConfigError(f"alpha has {len(alpha)} factors for {classes} classes; give one for each")
    with torch.autocast(logits.device.type, enabled=False):
        x = _at_least_float32(logits)
        if hard:  # torch leaves a class of -100 out without a word
            x = x.where(((targets >= 0) & (targets < classes))[:, None], torch.nan)
        q = targets.long().clamp(0, classes - 1) if hard else _in_unit(targets.to(x.dtype))
        if gamma == 0 and alpha is None:
            return F.cross_entropy(x, q, reduction="none", label_smoothing=smoothing)
        q = F.one_hot(q, classes).to(x.dtype) if hard else q
        q = q * (1 - smoothing) + smoothing / classes
        if alpha is not None:
            q = q * torch.tensor(list(alpha), dtype=x.dtype, device=x.device)
        total = x.logsumexp(1, keepdim=True)
        mine = torch.eye(classes, dtype=torch.bool, device=x.device)
        others = x[:, None].masked_fill(mine, -torch.inf).logsumexp(2)  # (B, K): log sum of exp over the other classes
        return (q * torch.exp(gamma * (others - total)) * (total - x)).sum(1)


def mean_loss(rows: Tensor, *, weights: Tensor | None = None, names: Sequence[str] | None = None) -> Tensor:
    """Return the mean of weight times loss over the rows, a scalar.

    The sum is divided by the number of rows, not by the sum of the weights: with that, a batch of one domain would be
    weighted like any other, and the weights would be lost where they matter.

    Args:
        rows: (B,) loss of each row.
        weights: (B,), or None for 1 each.
        names: (B,) of the rows, for the error.

    Raises:
        ConfigError: no rows, or weights of another number.
        NonFiniteError: a loss is NaN or infinite, or a target lies outside 0-1; names the rows.
    """
    if len(rows) == 0:
        raise ConfigError("the loss of a batch of no rows is not defined")
    if weights is not None:
        if weights.shape != rows.shape:
            raise ConfigError(f"{tuple(weights.shape)} weights for {len(rows)} rows; give one a row")
        rows = rows * weights.to(rows)
    finite = rows.detach().isfinite()
    if not bool(finite.all()):
        bad = (~finite).nonzero()[:, 0].tolist()
        called = [f"{at} ({names[at]})" if names is not None else str(at) for at in bad[:ROWS_NAMED]]
        more = f" and {len(bad) - ROWS_NAMED} more" if len(bad) > ROWS_NAMED else ""
        raise NonFiniteError(
            f"the loss is NaN or infinite in {len(bad)} of {len(rows)} rows of the batch: {', '.join(called)}{more}; "
            "look at those tiles and labels (targets lie in 0-1, weights are finite); if all rows are bad, the model "
            "has diverged: lower the learning rate"
        )
    return rows.mean()


def _at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _in_unit(targets: Tensor) -> Tensor:
    """Return `targets` with NaN where they lie outside 0-1: `mean_loss` then names their rows, at no further wait."""
    return targets.where((targets >= 0) & (targets <= 1), torch.nan)
