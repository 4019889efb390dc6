from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from lifelines.utils import concordance_index
from sklearn import metrics as sk

from eosin.errors import PredictionsError
from eosin.evaluation import metrics as own
from eosin.evaluation.bootstrap import ClusterMetric, cluster_weights
from eosin.evaluation.metrics import METRICS, choose_threshold, make_metrics, threshold_spread
from eosin.evaluation.weighted import threshold_metric

Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64] | None]

BINARY: dict[str, tuple[Callable[..., float], Callable[..., float], str]] = {
    "ba": (own.balanced_accuracy, sk.balanced_accuracy_score, "calls"),
    "accuracy": (own.accuracy, sk.accuracy_score, "calls"),
    "sensitivity": (own.sensitivity, sk.recall_score, "calls"),
    "specificity": (own.specificity, lambda y, c, **w: sk.recall_score(y, c, pos_label=0, **w), "calls"),
    "ppv": (own.ppv, sk.precision_score, "calls"),
    "npv": (own.npv, lambda y, c, **w: sk.precision_score(y, c, pos_label=0, **w), "calls"),
    "f1": (own.f1, sk.f1_score, "calls"),
    "macro_f1": (own.macro_f1, lambda y, c, **w: sk.f1_score(y, c, average="macro", **w), "calls"),
    "mcc": (own.mcc, sk.matthews_corrcoef, "calls"),
    "kappa": (own.cohen_kappa, sk.cohen_kappa_score, "calls"),
    "auroc": (own.auroc, sk.roc_auc_score, "scores"),
    "auprc": (own.auprc, sk.average_precision_score, "scores"),
    "brier": (own.brier, sk.brier_score_loss, "scores"),
    "log_loss": (own.log_loss, sk.log_loss, "scores"),
}


def predictions(seed: int, *, ties: bool, weighted: bool, n: int = 300) -> Arrays:
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.3).astype(np.int64)
    p = 1 / (1 + np.exp(-(rng.normal(size=n) + 1.2 * y - 0.5)))
    return y, np.round(p, 1) if ties else p, rng.exponential(size=n) if weighted else None


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_metrics_equal_scikit_learn(name: str, ties: bool, weighted: bool) -> None:
    ours, theirs, takes = BINARY[name]
    for seed in range(3):
        y, p, weight = predictions(seed, ties=ties, weighted=weighted)
        given = p if takes == "scores" else p >= 0.4
        threshold = {} if takes == "scores" else {"threshold": 0.4}
        expected = theirs(y, given, sample_weight=weight)
        assert ours(y, p, weight=weight, **threshold) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_multiclass_metrics_equal_scikit_learn(weighted: bool) -> None:
    rng = np.random.default_rng(4)
    y = rng.integers(4, size=400)
    p = rng.dirichlet(np.ones(4), size=400)
    p[np.arange(400), y] += 0.3
    p /= p.sum(axis=1, keepdims=True)
    weight = rng.exponential(size=400) if weighted else None
    calls = p.argmax(axis=1)
    w = {"sample_weight": weight}
    assert own.balanced_accuracy(y, p, weight=weight) == pytest.approx(sk.balanced_accuracy_score(y, calls, **w))
    assert own.accuracy(y, p, weight=weight) == pytest.approx(sk.accuracy_score(y, calls, **w))
    assert own.macro_f1(y, p, weight=weight) == pytest.approx(sk.f1_score(y, calls, average="macro", **w))
    assert own.mcc(y, p, weight=weight) == pytest.approx(sk.matthews_corrcoef(y, calls, **w))
    for kind in (None, "linear", "quadratic"):
        expected = sk.cohen_kappa_score(y, calls, weights=kind, **w)
        assert own.cohen_kappa(y, p, weights=kind, weight=weight) == pytest.approx(expected)
    expected = np.mean([sk.roc_auc_score(y == c, p[:, c], **w) for c in range(4)])
    assert own.auroc(y, p, weight=weight) == pytest.approx(expected)
    expected = np.mean([sk.average_precision_score(y == c, p[:, c], **w) for c in range(4)])
    assert own.auprc(y, p, weight=weight) == pytest.approx(expected)
    assert own.log_loss(y, p, weight=weight) == pytest.approx(sk.log_loss(y, p, **w))
    expected = np.average(((p - np.eye(4)[y]) ** 2).sum(axis=1), weights=weight)
    assert own.brier(y, p, weight=weight) == pytest.approx(expected)
    table = own.confusion(y, calls, 4, weight=weight)
    np.testing.assert_allclose(table, sk.confusion_matrix(y, calls, **w))
    assert own.kappa_of(table[None])[0] == pytest.approx(own.cohen_kappa(y, p, weight=weight))


def test_integer_weights_are_repeated_rows() -> None:
    y, p, _ = predictions(7, ties=True, weighted=False)
    counts = np.random.default_rng(0).integers(0, 4, size=(5, len(y)))
    for name in BINARY:
        values = METRICS[name](y, p, 0.4)(counts.astype(np.float32))
        for row, value in zip(counts, values, strict=True):
            again = METRICS[name](np.repeat(y, row), np.repeat(p, row), 0.4)(np.ones((1, row.sum())))[0]
            assert value == pytest.approx(again, rel=1e-9), name


@pytest.mark.parametrize("columns", [1, 3])
def test_cluster_counts_give_what_row_weights_give(columns: int) -> None:
    rng = np.random.default_rng(3)
    y, p, _ = predictions(3, ties=True, weighted=False)
    if columns == 3:
        y, p = rng.integers(3, size=300), rng.dirichlet(np.ones(3), size=300)
    codes = rng.permutation(np.arange(300) % 40)
    counts = rng.integers(0, 4, size=(6, 40)).astype(np.float32)
    binary_only = {"sensitivity", "specificity", "ppv", "npv", "f1"} if columns == 3 else set()
    for name in BINARY.keys() - binary_only:
        metric = METRICS[name](y, p, 0.5)
        assert isinstance(metric, ClusterMetric)
        np.testing.assert_allclose(metric.by_cluster(codes, 40)(counts), metric(counts[:, codes]), rtol=1e-9)


def test_published_counts_give_the_published_numbers() -> None:
    right, total = {1: 584, 0: 2876}, {1: 646, 0: 3154}
    y = np.repeat([1, 0], [total[1], total[0]])
    p = np.concatenate([np.arange(total[c]) < right[c] for c in (1, 0)]).astype(float)
    p[y == 0] = 1 - p[y == 0]
    assert round(own.balanced_accuracy(y, p), 4) == 0.9079
    assert round(own.accuracy(y, p), 4) == 0.9105
    assert round(own.sensitivity(y, p), 4) == 0.9040
    assert round(own.specificity(y, p), 4) == 0.9119


def test_auroc_is_the_share_of_ordered_pairs() -> None:
    y, p = np.array([1, 1, 0, 0, 0]), np.array([0.9, 0.4, 0.4, 0.2, 0.95])
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]
    assert own.auroc(y, p) == pytest.approx(np.mean(pairs))
    assert own.auroc(y, 1 - p) == pytest.approx(1 - np.mean(pairs))


def test_constant_calls_have_no_correlation() -> None:
    y, p = np.array([0, 1, 1]), np.full(3, 0.9)
    assert own.mcc(y, p) == 0.0
    assert own.cohen_kappa(y, p) == 0.0
    assert own.auroc(y, p) == 0.5


@pytest.mark.parametrize("name", ["ba", "auroc", "auprc", "sensitivity", "f1", "macro_f1", "mcc", "kappa"])
def test_one_class_is_nan_for_the_bootstrap_and_an_error_for_people(name: str) -> None:
    y, p = np.zeros(4, dtype=int), np.full(4, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(METRICS[name](y, p, 0.5)(np.ones((1, 4)))[0])
    with pytest.raises(PredictionsError, match=r"undefined|all 4 rows"):
        BINARY[name][0](y, p)


def test_numbers_that_one_class_has() -> None:
    y, p = np.zeros(4, dtype=int), np.array([0.1, 0.2, 0.3, 0.9])
    assert own.specificity(y, p) == 0.75
    assert own.accuracy(y, p) == 0.75
    with pytest.raises(PredictionsError, match="ppv is undefined"):
        own.ppv([0, 1], [0.1, 0.2])


def test_wrong_questions_are_refused() -> None:
    p = np.full((3, 3), 1 / 3)
    with pytest.raises(PredictionsError, match=r"one positive class.*macro_f1"):
        own.sensitivity([0, 1, 2], p)
    with pytest.raises(PredictionsError, match=r"'aurok'; closest: auroc"):
        make_metrics(["ba", "aurok"], [0, 1], [0.1, 0.9])
    with pytest.raises(PredictionsError, match="calls ranges over 0 to 3"):
        own.confusion([0, 1], [0, 3], 3)


def test_named_metrics_use_the_threshold() -> None:
    made = make_metrics(["sensitivity", "auroc"], [0, 1, 1], [0.1, 0.3, 0.9], threshold=0.5)
    assert made["sensitivity"](np.ones((1, 3)))[0] == 0.5
    assert made["auroc"](np.ones((1, 3)))[0] == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_c_index_equals_lifelines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    time, event = rng.integers(1, 30, size=150), rng.random(150) < 0.6
    risk = np.round(rng.normal(size=150) - time / 20, 1)
    assert own.c_index(time, event, risk) == pytest.approx(concordance_index(time, -risk, event))
    times = rng.integers(0, 3, size=150)
    repeated = own.c_index(np.repeat(time, times), np.repeat(event, times), np.repeat(risk, times))
    assert own.c_index(time + 1e-9 * np.arange(150), event, risk) != pytest.approx(0.5)
    assert repeated == pytest.approx(concordance_index(*(np.repeat(v, times) for v in (time, -risk, event))))


def test_c_index_weights_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    time, event, risk = rng.exponential(size=90), rng.random(90) < 0.7, rng.normal(size=90)
    kept = rng.random(90) < 0.5
    whole = own.c_index(time, event, risk)
    assert own.c_index(time, event, risk, weight=kept) == pytest.approx(
        own.c_index(time[kept], event[kept], risk[kept])
    )
    monkeypatch.setattr(own, "PAIR_CELLS", 200)
    assert own.c_index(time, event, risk) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(PredictionsError, match="0 events"):
        own.c_index(time, np.zeros(90), risk)
    with pytest.raises(PredictionsError, match="risk has 1 values"):
        own.c_index(time, event, np.where(np.arange(90) == 3, np.nan, risk))


def test_threshold_maximises_balanced_accuracy() -> None:
    y, p, _ = predictions(11, ties=False, weighted=False)
    chosen = choose_threshold(y, p)
    best = max(own.balanced_accuracy(y, p, threshold=t) for t in np.append(p, 0.0))
    assert own.balanced_accuracy(y, p, threshold=chosen) == pytest.approx(best, rel=1e-12)
    assert choose_threshold(y, p, rule="youden") == chosen
    assert chosen not in p


def test_threshold_reaches_the_rate_asked_for_and_no_more() -> None:
    y, p, _ = predictions(12, ties=True, weighted=False)
    for target in (0.8, 0.95, 1.0):
        t = choose_threshold(y, p, rule=f"sensitivity>={target}")
        assert own.sensitivity(y, p, threshold=t) >= target
        higher = np.unique(p)[np.unique(p) >= t]
        assert own.sensitivity(y, p, threshold=float(higher[0]) + 0.05) < target
        t = choose_threshold(y, p, rule=f"specificity>={target}")
        assert own.specificity(y, p, threshold=t) >= target
        lower = np.unique(p)[np.unique(p) < t]
        assert own.specificity(y, p, threshold=float(lower[-1])) < target


def test_neighbouring_floats_are_told_apart() -> None:
    low = 0.3
    high = np.nextafter(low, 1)
    chosen = choose_threshold([0, 1], [low, high])
    assert low < chosen <= high


def test_unknown_rules_are_refused() -> None:
    for rule in ("best", "sensitivity>=2", "sensitivity>0.9"):
        with pytest.raises(PredictionsError, match="threshold rule"):
            choose_threshold([0, 1], [0.2, 0.8], rule=rule)
    with pytest.raises(PredictionsError, match="class 1"):
        choose_threshold([1, 1], [0.2, 0.8])


def test_threshold_spread_chooses_as_well_as_choosing_again_on_each_resample() -> None:
    y, p, _ = predictions(13, ties=False, weighted=False, n=120)
    cluster = np.arange(120) // 3
    weights = np.concatenate(list(cluster_weights(cluster, strata=y, resamples=200, seed=5)))
    chosen = threshold_metric(y, p, "youden")(weights)
    for w, threshold in zip(weights.astype(int), chosen, strict=True):
        again = choose_threshold(np.repeat(y, w), np.repeat(p, w))
        reached, best = (own.balanced_accuracy(y, p, threshold=t, weight=w) for t in (threshold, again))
        assert reached == pytest.approx(best, rel=1e-12)
    spread = threshold_spread(y, p, cluster, resamples=200, seed=5)
    assert spread.point == choose_threshold(y, p)
    np.testing.assert_allclose([spread.low, spread.high], np.quantile(chosen, [0.025, 0.975]))
    assert (spread.clusters, spread.n) == (40, 120)


def test_sign_warning() -> None:
    assert "other class" in own.sign_warning(auroc=0.21, ba=0.87)
    assert own.sign_warning(auroc=0.97, ba=0.87) == ""
    assert own.sign_warning(auroc=0.4, ba=0.45) == ""
