"""The linear probe of the eva benchmark: a fixed budget of stochastic gradient steps instead of a converged fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin

from eosin.errors import LabelError, MissingDependencyError
from eosin.heads.labels import encode_labels, fit_arrays, predict_array

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

PATIENCE = 0.2  # of the epochs the budget allows


class SgdProbe(ClassifierMixin, BaseEstimator):
    """One linear layer trained by eva's protocol for patches, to compare with its published numbers.

    From eva's documentation (kaiko-ai/eva, docs/leaderboards.md): one layer on frozen features, no dropout, cross
    entropy, 12,500 steps, batch 256, AdamW with learning rate 3e-4, early stopping after 20 % of the maximal epochs,
    the validation part used for monitoring and for choosing the checkpoint, the mean of 5 runs reported.

    From its configuration files (configs/vision/pathology/offline/classification): validation once an epoch, balanced
    accuracy to be beaten by more than 0, a last batch that may be smaller, one logit with binary cross entropy for
    two classes, features not standardised, torch's initialisation of a linear layer.

    Where they disagree or leave it open: the documentation says weight decay 0.0, but those files that name AdamW give
    none, which is torch's default of 0.01 (ours). They set a patience a data set (45 to 125 epochs) instead of 20 %
    (ours is 20 %). Some name a cosine schedule over 12,500, others none; Lightning steps such a schedule once an epoch,
    so over a run it hardly moves, and we keep the rate constant. eva's random streams cannot be repeated.

    Args:
        steps: gradient steps at most.
        batch_size: rows in a step.
        lr: learning rate.
        weight_decay: of AdamW, on weights and bias.
        device: torch's name of the device to train on.
        seed: of the initial weights and the order of rows; eva's 5 runs are 5 seeds.

    Attributes:
        coef_: (K, D), K = 1 for two classes.
        intercept_: (K,).
        classes_: the classes, sorted.
        steps_: steps taken.
        best_step_: steps after which the weights kept were reached.
        history_: (epochs,) validation balanced accuracy after each epoch; empty without a validation part.
    """

    def __init__(
        self,
        *,
        steps: int = 12_500,
        batch_size: int = 256,
        lr: float = 3e-4,
        weight_decay: float = 0.01,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.device = device
        self.seed = seed

    def fit(self, x: Array, y: Array, *, groups: Array | None = None, split: tuple[Array, Array] | None = None) -> Self:
        """Train on the rows of the split's first part and keep the epoch that is best on the second.

        Args:
            x: (n, D) features, used as float32.
            y: (n,) classes.
            groups: not used; nothing is chosen by resampling.
            split: (train rows, validation rows). Without it all rows train for the whole budget, and the last weights
                are kept.

        Raises:
            LabelError: fewer than two classes, or a class missing from the training rows.
            ValueError: shapes, NaN or infinity, a budget without a step, an empty validation part.
            MissingDependencyError: torch is not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError.for_extra("torch", "torch") from error
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps is {self.steps} and batch_size {self.batch_size}; both must be 1 or more")
        x, y = fit_arrays(self, x, y)
        self.classes_, codes = encode_labels(y)
        train, val = (np.arange(len(x)), None) if split is None else (np.asarray(rows) for rows in split)
        missing = np.setdiff1d(np.arange(len(self.classes_)), codes[train])
        if len(missing):
            raise LabelError(f"the training rows hold no {self.classes_[missing].tolist()}; split by class")
        if val is not None and not len(val):
            raise ValueError("the validation part is empty; leave split out to train on all rows")

        def part(rows: Array) -> tuple[torch.Tensor, torch.Tensor]:
            features = torch.from_numpy(np.ascontiguousarray(x[rows], dtype=np.float32))
            return features.to(self.device), torch.from_numpy(codes[rows]).to(self.device)

        weight, bias = self._train(part(train), None if val is None else part(val))
        self.coef_, self.intercept_ = weight.cpu().double().numpy(), bias.cpu().double().numpy()
        return self

    def decision_function(self, x: Array) -> Floats:
        """Return margins (n,) for two classes, else (n, C)."""
        margin = predict_array(self, x) @ self.coef_.T + self.intercept_
        return margin if len(self.classes_) > 2 else margin[:, 0]

    def predict_proba(self, x: Array) -> Floats:
        """Return probabilities (n, C)."""
        margin = self.decision_function(x)
        return softmax(margin, axis=1) if margin.ndim == 2 else np.column_stack([expit(-margin), expit(margin)])

    def predict(self, x: Array) -> Array:
        """Return the most probable class (n,)."""
        margin = self.decision_function(x)
        return self.classes_[margin.argmax(axis=1) if margin.ndim == 2 else (margin > 0).astype(np.int64)]

    def _train(
        self, train: tuple[torch.Tensor, torch.Tensor], val: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight (K, D) and bias (K,) after the budget, or at the best epoch; note how it went."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        outputs = len(self.classes_) if len(self.classes_) > 2 else 1
        bound = 1 / math.sqrt(train[0].shape[1])  # what torch.nn.Linear draws from
        draws = torch.empty(outputs, train[0].shape[1] + 1).uniform_(-bound, bound, generator=generator)
        weight = draws[:, :-1].contiguous().to(self.device).requires_grad_()
        bias = draws[:, -1].contiguous().to(self.device).requires_grad_()
        optimizer = torch.optim.AdamW([weight, bias], lr=self.lr, weight_decay=self.weight_decay)
        epochs = math.ceil(self.steps / math.ceil(len(train[0]) / self.batch_size))
        patience = max(1, round(PATIENCE * epochs))
        step, best, since = 0, -math.inf, 0
        kept, history = (weight, bias), []
        while step < self.steps and since < patience:
            order = torch.randperm(len(train[0]), generator=generator).to(self.device)
            for rows in order.split(self.batch_size)[: self.steps - step]:
                optimizer.zero_grad()
                _loss(train[0][rows] @ weight.T + bias, train[1][rows]).backward()
                optimizer.step()
                step += 1
            if val is None:
                continue
            with torch.no_grad():
                history.append(_balanced_accuracy(val[0] @ weight.T + bias, val[1]))
            since += 1
            if history[-1] > best:
                best, since, self.best_step_ = history[-1], 0, step
                kept = weight.detach().clone(), bias.detach().clone()
        self.steps_, self.history_ = step, np.array(history)
        if val is None:
            self.best_step_ = step
        return kept[0].detach(), kept[1].detach()


def _loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional

    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], codes.to(logits.dtype))
    return functional.cross_entropy(logits, codes)


def _balanced_accuracy(logits: torch.Tensor, codes: torch.Tensor) -> float:
    """Return the mean recall over the classes that are there."""
    called = logits.argmax(dim=1) if logits.shape[1] > 1 else (logits[:, 0] > 0).to(codes.dtype)
    recalls = [(called[codes == code] == code).double().mean() for code in codes.unique()]
    return float(sum(recalls) / len(recalls))
