"""Domain weights: closed forms, what each kind equalises, and domains too small to weigh."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_sample_weight

from eosin.errors import CohortError, ConfigError
from eosin.finetune.weights import MAX_WEIGHT, domain_weights, limit_weights

KINDS = ("none", "inverse", "sqrt-inverse", "effective-number", "domain-class")

# The ten training domains of MIDOG 2025: normal and atypical cells (docs of the challenge's training set).
MIDOG25 = {
    "ccMCT": (1976, 351),
    "cLC": (745, 110),
    "cLym": (3642, 317),
    "cSTS-NY": (900, 197),
    "cSTS-V": (176, 13),
    "hBC-CS2": (516, 172),
    "hBC-S360": (455, 127),
    "hBC-XR": (346, 105),
    "hMel": (879, 271),
    "hNET": (554, 85),
}


def table(counts):
    """Return domains and labels of {domain: (cells of class 0, class 1, ...)}, shuffled."""
    domain = [d for d, cells in counts.items() for n in cells for _ in range(n)]
    label = [y for cells in counts.values() for y, n in enumerate(cells) for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(domain))
    return np.array(domain)[order], np.array(label)[order]


@pytest.mark.parametrize("kind", KINDS)
def test_mean_over_the_rows_is_one(kind):
    weights = domain_weights(*table(MIDOG25), kind=kind)
    assert weights.rows.shape == (11_937,)
    assert weights.rows.mean() == pytest.approx(1, abs=1e-12)
    assert (weights.rows > 0).all()


def test_inverse_is_its_formula_and_scikit_learns():
    domain, label = table(MIDOG25)
    weights = domain_weights(domain, label, kind="inverse")
    np.testing.assert_allclose(weights.rows, compute_sample_weight("balanced", domain), rtol=1e-12)
    (smallest,) = (g for g in weights.groups if g.domain == "cSTS-V")
    assert smallest.weight == pytest.approx(11_937 / (10 * 189))
    assert (smallest.cells, smallest.label, smallest.note) == (189, None, "")
    totals = [weights.rows[domain == d].sum() for d in MIDOG25]
    np.testing.assert_allclose(totals, 1193.7)


def test_domain_class_is_its_formula_and_scikit_learns():
    domain, label = table(MIDOG25)
    weights = domain_weights(domain, label, kind="domain-class")
    pairs = np.char.add(domain, label.astype(str))
    np.testing.assert_allclose(weights.rows, compute_sample_weight("balanced", pairs), rtol=1e-12)
    by_pair = {(g.domain, g.label): g for g in weights.groups}
    assert by_pair["cSTS-V", 1].weight == pytest.approx(11_937 / (2 * 10 * 13))  # 45.9: below the limit
    assert by_pair["cSTS-V", 1].note == ""
    assert weights.rows[label == 1].sum() == pytest.approx(weights.rows[label == 0].sum())


def test_sqrt_inverse_has_the_root_of_the_ratio():
    domain, label = table(MIDOG25)
    of = {g.domain: g.weight for g in domain_weights(domain, label, kind="sqrt-inverse").groups}
    assert of["cSTS-V"] / of["cLym"] == pytest.approx((3959 / 189) ** 0.5)


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999])
def test_effective_number_is_cui_2019(beta):
    domain, label = table(MIDOG25)
    of = {g.domain: g.weight for g in domain_weights(domain, label, kind="effective-number", beta=beta).groups}
    expected = (1 - beta**3959) / (1 - beta**189)  # E_n = (1 - beta^n) / (1 - beta), weight 1 / E_n
    assert of["cSTS-V"] / of["cLym"] == pytest.approx(expected, rel=1e-9)


def test_effective_number_lies_between_none_and_inverse():
    domain, label = table(MIDOG25)
    near = domain_weights(domain, label, kind="effective-number", beta=1 - 1e-12).rows
    np.testing.assert_allclose(near, domain_weights(domain, label, kind="inverse").rows, rtol=1e-6)
    far = domain_weights(domain, label, kind="effective-number", beta=1e-9).rows
    np.testing.assert_allclose(far, 1, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_domain_of_one_cell_or_one_class_has_a_finite_stated_weight(kind):
    domain, label = table({"big": (4000, 900), "one class": (30, 0), "one cell": (0, 1), "": (5, 5)})
    weights = domain_weights(domain, label, kind=kind)
    assert np.isfinite(weights.rows).all()
    assert weights.rows.max() <= MAX_WEIGHT
    assert weights.rows.mean() == pytest.approx(1, abs=1e-12)
    notes = {g.domain: g.note for g in weights.groups}
    assert notes["one class"].startswith("only class 0")
    assert notes["one cell"].startswith("one cell")
    assert ("limited to 50" in notes["one cell"]) == (kind != "none")
    assert notes["big"] == ""
    for group in weights.groups:
        own = (domain == group.domain) & ((label == group.label) | (group.label is None))
        assert own.sum() == group.cells
        assert (weights.rows[own] == group.weight).all()


def test_the_limit_leaves_the_other_ratios_alone():
    raw = np.array([1.0, 1 / 10, 1 / 2000, 1 / 5000])
    cells = np.array([1, 10, 2000, 5000])
    weight = limit_weights(raw, cells)
    assert weight[0] == weight[1] == MAX_WEIGHT
    assert weight[2] / weight[3] == pytest.approx(2.5)
    assert (weight * cells).sum() == pytest.approx(cells.sum())


@settings(max_examples=25)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_limited_weights_have_mean_one_whatever_the_counts(cells, seed):
    raw = np.exp(np.random.default_rng(seed).uniform(-12, 12, len(cells)))
    weight = limit_weights(raw, np.array(cells))
    assert (weight * cells).sum() / sum(cells) == pytest.approx(1, rel=1e-9)
    assert weight.max() <= MAX_WEIGHT * (1 + 1e-12)
    assert (np.diff(weight[np.argsort(raw)]) >= -1e-9).all()


def test_three_classes_and_one_domain():
    domain, label = table({"a": (10, 20, 70)})
    np.testing.assert_array_equal(domain_weights(domain, label, kind="inverse").rows, 1)
    rows = domain_weights(domain, label, kind="domain-class").rows
    np.testing.assert_allclose([rows[label == y].sum() for y in range(3)], 100 / 3)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"kind": "inverses"}, ConfigError, "closest are inverse"),
        ({"beta": 1.0}, ConfigError, "beta is 1.0"),
        ({"label": [0]}, CohortError, "one domain and one label a row"),
        ({"domain": [], "label": []}, CohortError, "one domain and one label a row"),
    ],
)
def test_bad_input_is_refused(kwargs, error, match):
    with pytest.raises(error, match=match):
        domain_weights(**{"domain": ["a", "b"], "label": [0, 1], **kwargs})
