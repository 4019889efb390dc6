"""Out of distribution: against scikit-learn, scipy, torch and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from eosin.errors import NonFiniteError, PredictionsError
from eosin.evaluation.ood import energy, knn_distance, mahalanobis, ood_auroc


def test_knn_distance_equals_scikit_learn_across_blocks() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(400, 12)), rng.normal(size=(1500, 12))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    theirs = NearestNeighbors(n_neighbors=7).fit(unit[0]).kneighbors(unit[1])[0][:, 6]
    assert knn_distance(train, test, k=7) == pytest.approx(theirs)


def test_knn_distance_of_known_directions() -> None:
    train = np.array([[1.0, 0], [0, 2]])
    test = np.array([[5.0, 0], [-1, 0], [1, 1]])
    assert knn_distance(train, test, k=1) == pytest.approx([0, np.sqrt(2), np.sqrt(2 - np.sqrt(2))], abs=1e-7)
    assert knn_distance(train, test, k=2) == pytest.approx([np.sqrt(2), 2, np.sqrt(2 - np.sqrt(2))], abs=1e-7)


def test_mahalanobis_of_one_class_equals_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(60, 5)) * [1, 2, 3, 4, 5], rng.normal(size=(20, 5))
    assert mahalanobis(train, None, test) == pytest.approx(LedoitWolf().fit(train).mahalanobis(test))


def test_mahalanobis_goes_to_the_nearest_class_with_one_covariance() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 300)
    means = np.array([[0, 0, 0, 0], [8, 0, 0, 0], [0, 8, 0, 0]])
    train, test = means[labels] + rng.normal(size=(300, 4)), rng.normal(size=(40, 4)) * 6
    centres = np.stack([train[labels == c].mean(0) for c in range(3)])
    precision = np.linalg.inv(LedoitWolf(assume_centered=True).fit(train - centres[labels]).covariance_)
    expected = [min((z - m) @ precision @ (z - m) for m in centres) for z in test]
    assert mahalanobis(train, labels, test) == pytest.approx(expected)
    assert mahalanobis(train, 10 * labels, test) == pytest.approx(expected), "names of classes must not matter"


def test_shrinkage_bears_more_dimensions_than_samples() -> None:
    rng = np.random.default_rng(3)
    scores = mahalanobis(rng.normal(size=(30, 200)), None, rng.normal(size=(10, 200)))
    assert np.isfinite(scores).all()
    assert (scores > 0).all()


def test_energy_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(4).normal(size=(50, 6)) * 300
    for temperature in (1.0, 2.5):
        theirs = -temperature * torch.logsumexp(torch.from_numpy(logits) / temperature, dim=1).numpy()
        assert energy(logits, temperature=temperature) == pytest.approx(theirs)
    assert energy(np.zeros((1, 8))) == pytest.approx([-np.log(8)])


def test_auroc_equals_scikit_learn_and_its_closed_form() -> None:
    rng = np.random.default_rng(5)
    familiar, strange = rng.normal(size=3000), rng.normal(loc=1, size=3000)
    found = ood_auroc(familiar, strange, resamples=200)
    truth = np.repeat([0, 1], 3000)
    assert found.point == pytest.approx(roc_auc_score(truth, np.concatenate([familiar, strange])))
    assert found.low < norm.cdf(1 / np.sqrt(2)) < found.high


def test_patients_make_the_interval_wider() -> None:
    rng = np.random.default_rng(6)
    patient = np.repeat(np.arange(15), 40)
    familiar = rng.normal(size=600) + rng.normal(size=15)[patient]
    strange = 1 + rng.normal(size=600) + rng.normal(size=15)[patient]
    rows = ood_auroc(familiar, strange, resamples=300)
    patients = ood_auroc(familiar, strange, familiar_cluster=patient, strange_cluster=patient, resamples=300)
    assert patients.point == rows.point
    assert patients.clusters == 30, "a patient in both sets is two clusters, each in its own stratum"
    assert patients.high - patients.low > 2 * (rows.high - rows.low)


def test_scores_rise_with_strangeness() -> None:
    rng = np.random.default_rng(7)
    train, near = rng.normal(size=(200, 6)) + 4, rng.normal(size=(100, 6)) + 4
    far = rng.normal(size=(100, 6)) + [4, 4, 4, 4, 4, -4]
    for score in (lambda x: knn_distance(train, x), lambda x: mahalanobis(train, None, x)):
        assert ood_auroc(score(near), score(far), resamples=50).point > 0.95


def test_bad_input_says_what_is_wrong() -> None:
    x = np.random.default_rng(8).normal(size=(5, 3))
    with pytest.raises(PredictionsError, match="k is 6 and there are 5"):
        knn_distance(x, x, k=6)
    with pytest.raises(PredictionsError, match=r"\(5, 3\) and \(5, 2\)"):
        mahalanobis(x, None, x[:, :2])
    with pytest.raises(NonFiniteError, match="rows of test"):
        knn_distance(x, np.full((2, 3), np.nan))
    with pytest.raises(PredictionsError, match="no spread"):
        mahalanobis(np.ones((4, 3)), None, x)
    with pytest.raises(PredictionsError, match="C >= 2"):
        energy(x[:, :1])
    with pytest.raises(PredictionsError, match="temperature"):
        energy(x, temperature=0)
    with pytest.raises(PredictionsError, match="strange set"):
        ood_auroc([0.1], [])
