"""Penalised logistic regression at many regularisation strengths in one go.

The minimised function is scikit-learn's, for standardised features z and C = 1 / lambda:

    F(W, b) = sum_i s_i loss(y_i, W z_i + b) + lambda / 2 |W|^2        (b is free)

Plain L-BFGS needs hundreds of passes over the features because they are correlated. Here the variables are changed
so that the curvature of F is near the identity: the weighted covariance G of the features is decomposed once,
G = V diag(e) V', and L-BFGS works on u with W = V diag(kappa e + lambda)^(-1/2) u. One decomposition serves every C,
each C starts from its neighbour's answer, and G is renewed with the present weights s p (1 - p) when progress is
slow, which for one logit makes it the exact Hessian. (Nocedal & Wright 2006, section 7.2, with the preconditioner of
Böhning 1992, Ann. Inst. Statist. Math. 44:197, taken at the present probabilities instead of at their bound.)

Losses and gradients are float64 whatever the features' type; only G may be float32, and it changes the speed, never
the answer. Features are neither copied nor standardised in memory: blocks of rows are converted as they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from threadpoolctl import threadpool_info, threadpool_limits

Link = Literal["sigmoid", "softmax"]
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Map = Callable[..., Iterator[Any]]

PASS_CELLS, GRAM_CELLS = 2**20, 2**21  # features handled at once: 8 MB of float64, 8 MB of float32
SMALL_CELLS = 2**22  # below it: one thread, curvature in float64
ROUND, ROUNDS = 20, 60  # L-BFGS iterations before the curvature is renewed; times that it may be
STALE = 4  # curvature that has shrunk by more than this must be renewed before its error estimate counts
TOLERANCE = 1e-6  # error left in coefficients of standardised features, relative to the largest (or 1)
WORST = 30  # times the tolerance that will do where float64 cannot tell the losses apart


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticPath:
    """Answers for a grid of C, in the order it was given, for features as they are (not standardised)."""

    coef: Floats  # (n_c, K, D)
    intercept: Floats  # (n_c, K)
    passes: int  # times the features were read for a gradient
    curvatures: int  # times they were read for a covariance


def logistic_path(
    x: Array,
    targets: Floats,
    c_grid: Sequence[float] | Floats,
    *,
    link: Link,
    weight: Floats | None = None,
    standardize: bool = True,
) -> LogisticPath:
    """Return the minimisers of F for every C.

    Args:
        x: (n, D) finite features, float16, float32 or float64.
        targets: (n, K) of 0 and 1: K independent labels for "sigmoid" (K = 1 for two classes), one-hot rows for
            "softmax". Every column holds both values.
        c_grid: (n_c,) inverse strengths, scikit-learn's C, or (n_c, K) when each label has its own.
        link: "sigmoid" or "softmax".
        weight: (n, K) or (n, 1) weights s of the rows' losses; None is one. Columns may differ for "sigmoid" only.
        standardize: penalise coefficients of features scaled to unit variance (population variance, unweighted).
            A constant feature gets the coefficient zero.

    Raises:
        ArithmeticError: no convergence within 1,200 iterations for one C.
    """
    weight = np.ones((len(x), 1)) if weight is None else weight
    penalty = 1.0 / np.asarray(c_grid, np.float64).reshape(len(c_grid), -1) * np.ones(targets.shape[1])
    with _threads(x.size) as run:
        mean, scale = _moments(x, run) if standardize else (np.zeros(x.shape[1]), np.ones(x.shape[1]))
        if len(x) > x.shape[1]:
            data = _Data(x=x, mean=mean, scale=scale, targets=targets, weight=weight, link=link, run=run)
            return _path(data, penalty)
        # fewer rows than features: every minimiser lies in the span of the rows, an n-dimensional problem
        basis, rows = np.linalg.qr(((x - mean) / scale).T)
        zeros, ones = np.zeros(len(x)), np.ones(len(x))
        data = _Data(x=rows.T, mean=zeros, scale=ones, targets=targets, weight=weight, link=link, run=run)
        found = _path(data, penalty)
    coef = found.coef @ basis.T / scale
    return LogisticPath(
        coef=coef,
        intercept=found.intercept - coef @ mean,
        passes=found.passes,
        curvatures=found.curvatures,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """What stays the same along a path; `mean` and `scale` standardise `x`."""

    x: Array
    mean: Floats
    scale: Floats
    targets: Floats
    weight: Floats
    link: Link
    run: Map


@dataclass(frozen=True, kw_only=True, slots=True)
class _Curvature:
    """Curvature of the loss about one point, as the product of one over features and one over outputs."""

    vectors: Floats  # (D, D) eigenvectors of the weighted covariance of standardised features
    values: Floats  # (D,) its eigenvalues
    mix: Floats  # (K, K) eigenvectors of the curvature over outputs; the identity for "sigmoid"
    share: Floats  # (K,) its eigenvalues, of mean about one
    centre: Floats  # (D,) weighted mean of the features as they are
    total: float  # sum of the weights


@contextmanager
def _threads(cells: int) -> Iterator[Map]:
    """Yield a map over blocks: in order, on as many threads as BLAS would use, one when there is little to do."""
    threads = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
    if cells < SMALL_CELLS or threads == 1:
        yield map
        return
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        yield pool.map


def _blocks(x: Array, cells: int) -> list[slice]:
    step = max(1, cells // max(1, x.shape[1]))
    return [slice(start, start + step) for start in range(0, len(x), step)]


def _moments(x: Array, run: Map) -> tuple[Floats, Floats]:
    """Return mean and standard deviation (one where the feature is constant) of every feature."""
    first = x[0].astype(np.float64)

    def sums(rows: slice) -> tuple[Floats, Floats]:
        shifted = x[rows] - first  # so that large means do not cancel
        return shifted.sum(axis=0), np.einsum("ij,ij->j", shifted, shifted)

    totals = np.zeros((2, x.shape[1]))
    for part in run(sums, _blocks(x, PASS_CELLS)):
        totals += part
    shift, square = totals / len(x)
    mean, variance = first + shift, square - np.square(shift)
    varies = variance > np.square(10 * np.finfo(np.float64).eps * mean)
    return mean, np.sqrt(np.where(varies, variance, 1.0))


def _probability(margin: Floats, link: Link) -> Floats:
    return expit(margin) if link == "sigmoid" else np.exp(log_softmax(margin, axis=1))


def _gradient(data: _Data, coef: Floats, intercept: Floats) -> tuple[float, Floats, Floats, float]:
    """Return the loss, its gradients in raw coefficients (D, K) and intercepts (K,), and the total weight s p (1 - p).

    The total is of the outputs' mean, as in `_Curvature`.
    """

    def part(rows: slice) -> tuple[float, Floats, Floats, float]:
        block = data.x[rows].astype(np.float64, copy=False)
        margin, target, weight = block @ coef + intercept, data.targets[rows], data.weight[rows]
        if data.link == "sigmoid":
            loss, p = np.logaddexp(0.0, margin) - target * margin, expit(margin)
        else:
            logs = log_softmax(margin, axis=1)
            loss, p = -target * logs, np.exp(logs)
        residual, spread = weight * (p - target), weight * p * (1.0 - p)
        return float((weight * loss).sum()), block.T @ residual, residual.sum(axis=0), float(spread.sum())

    loss, gradient, residual, spread = 0.0, np.zeros_like(coef), np.zeros_like(intercept), 0.0
    for part_loss, part_gradient, part_residual, part_spread in data.run(part, _blocks(data.x, PASS_CELLS)):
        loss += part_loss
        gradient += part_gradient
        residual += part_residual
        spread += part_spread
    return loss, gradient, residual, spread / len(intercept)


def _curvature(data: _Data, coef: Floats, intercept: Floats) -> _Curvature:
    """Return the curvature at a point: the exact Hessian of one logit, a Kronecker approximation for more."""
    kind = np.float64 if data.x.size < SMALL_CELLS else np.float32

    mean, scale, standard = data.mean.astype(kind), data.scale.astype(kind), (coef * data.scale[:, None]).astype(kind)
    base = intercept + data.mean @ coef

    def part(rows: slice) -> tuple[Array, Array, Floats]:
        block = (data.x[rows].astype(kind, copy=False) - mean) / scale
        p = _probability(block @ standard + base, data.link)
        weighted = data.weight[rows] * p
        across = np.diag(weighted.sum(axis=0)) - p.T @ weighted
        shared = (weighted * (1.0 - p)).mean(axis=1, keepdims=True)
        first = block.T @ shared.astype(kind)
        block *= np.sqrt(shared).astype(kind)
        return block.T @ block, first[:, 0], across

    columns, outputs = data.x.shape[1], len(intercept)
    gram, first, outer = np.zeros((columns, columns)), np.zeros(columns), np.zeros((outputs, outputs))
    for part_gram, part_first, part_outer in data.run(part, _blocks(data.x, GRAM_CELLS)):
        gram += part_gram
        first += part_first
        outer += part_outer
    total = float(np.trace(outer)) / outputs
    gram -= np.outer(first, first / total)
    values, vectors = np.linalg.eigh(gram)
    floor = np.finfo(kind).eps * max(float(values[-1]), np.finfo(np.float64).tiny)
    share, mix = np.diag(outer), np.eye(outputs)
    if data.link == "softmax":
        share, mix = np.linalg.eigh(outer)
        share = np.maximum(share, 0.0)  # the first is zero: adding one number to every output changes nothing
    return _Curvature(
        vectors=vectors,
        values=np.maximum(values, floor),
        mix=mix,
        share=share / total,
        centre=data.mean + data.scale * first / total,
        total=total,
    )


def _path(data: _Data, penalty: Floats) -> LogisticPath:
    """Return the minimisers for every row of `penalty` (n_c, K), the strongest first as each starts the next."""
    shape = (data.x.shape[1], data.targets.shape[1])
    base = (data.weight * data.targets).sum(axis=0) / np.broadcast_to(data.weight, data.targets.shape).sum(axis=0)
    coef, intercept = np.zeros(shape), np.log(base)
    if data.link == "sigmoid":
        intercept = intercept - np.log1p(-base)
    curvature, passes, curvatures = _curvature(data, coef, intercept), 0, 1
    coefs, intercepts = np.empty((len(penalty), *shape[::-1])), np.empty((len(penalty), shape[1]))
    for at in np.argsort(-penalty.sum(axis=1), kind="stable"):
        for _ in range(ROUNDS):
            coef, intercept, done, used = _descend(data, curvature, penalty[at], coef, intercept)
            passes += used
            if done:
                break
            curvature = _curvature(data, coef, intercept)
            curvatures += 1
        else:
            raise ArithmeticError(
                f"logistic regression with C = {1 / penalty[at].min():g} did not converge in {ROUND * ROUNDS} "
                "iterations; leave out so large a C, or standardise the features"
            )
        coefs[at], intercepts[at] = coef.T, intercept
    return LogisticPath(coef=coefs, intercept=intercepts, passes=passes, curvatures=curvatures)


def _descend(
    data: _Data, curvature: _Curvature, penalty: Floats, coef: Floats, intercept: Floats
) -> tuple[Floats, Floats, bool, int]:
    """Return coefficients, intercepts, whether they are final, and passes used, after at most one round of L-BFGS."""
    latest = curvature.total
    vectors, mix, centre, scale = curvature.vectors, curvature.mix, curvature.centre, data.scale[:, None]
    step = 1.0 / np.sqrt(curvature.share * curvature.values[:, None] + penalty)
    lift = 1.0 / np.sqrt(np.where(curvature.share > 1e-9, curvature.share * curvature.total, 1.0))

    def place(flat: Floats) -> tuple[Floats, Floats, Floats]:
        u = flat.reshape(-1, len(penalty))
        standard = vectors @ (step * u[:-1]) @ mix.T
        raw = standard / scale
        return standard, raw, (lift * u[-1]) @ mix.T - centre @ raw

    def objective(flat: Floats) -> tuple[float, Floats]:
        nonlocal latest
        standard, raw, free = place(flat)
        loss, gradient, residual, latest = _gradient(data, raw, free)
        gradient = (gradient - np.outer(centre, residual)) / scale + penalty * standard
        slope = np.vstack([step * (vectors.T @ gradient @ mix), lift * (residual @ mix)])
        return loss + 0.5 * float((penalty * np.square(standard)).sum()), slope.ravel()

    start = np.vstack([vectors.T @ (coef * scale) @ mix / step, (intercept + centre @ coef) @ mix / lift]).ravel()
    tolerance = TOLERANCE * max(1.0, np.abs(coef * scale).max()) / max(step.max(), lift.max())
    first = objective(start)
    length = max(
        float(np.linalg.norm(first[1])), tolerance
    )  # the unit in which the first step, of length one, is right

    def scaled(flat: Floats) -> tuple[float, Floats]:
        value, slope = first if np.array_equal(flat, start / length) else objective(flat * length)
        return value / length**2, slope / length

    options = {"maxiter": ROUND, "maxcor": 20, "ftol": 0.0, "gtol": tolerance / length}
    found = minimize(scaled, start / length, jac=True, method="L-BFGS-B", options=options)
    _, coef, intercept = place(found.x * length)
    if data.link == "softmax":
        intercept = intercept - intercept.mean()  # only differences count
    stopped = found.nit < ROUND  # at the tolerance, or where no step lowers the loss in float64
    done = stopped and np.abs(found.jac).max() <= WORST * options["gtol"] and latest * STALE > curvature.total
    return coef, intercept, bool(done), found.nfev
