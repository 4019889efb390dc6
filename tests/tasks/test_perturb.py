"""Perturbations: closed forms, the order of severities, and curves on real mitotic figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import slidegen
from eosin.errors import GeometryError, NonFiniteError, PredictionsError
from eosin.evaluation.interval import Interval
from eosin.tasks.perturb import PERTURBATIONS, perturb, robustness_curve

EVERY = [(kind, severity) for kind, one in PERTURBATIONS.items() for severity in one.levels]


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """Six tiles (96 px, 0.25 mpp) of synthetic H&E."""
    pixels, mask = slidegen.histology(800, 600, seed=3, mpp=0.25)
    origins = [
        (x, y) for y in range(0, 500, 96) for x in range(0, 700, 96) if mask[y : y + 96, x : x + 96].mean() > 0.9
    ]
    assert len(origins) >= 6
    return np.stack([pixels[y : y + 96, x : x + 96] for x, y in origins[:6]])


def density(tiles: np.ndarray) -> np.ndarray:
    return -np.log((tiles.astype(float) + 1) / 240)


@pytest.mark.parametrize(("kind", "severity"), EVERY)
def test_every_change_is_a_new_array_of_the_same_kind(tiles: np.ndarray, kind: str, severity: str) -> None:
    before = tiles.copy()
    changed = perturb(tiles, kind, severity, mpp=0.25, seed=1)
    assert (changed.shape, changed.dtype) == (tiles.shape, np.uint8)
    assert np.array_equal(tiles, before)
    assert (changed != tiles).any(axis=(1, 2, 3)).all(), "every tile must change"
    assert np.array_equal(changed, perturb(tiles, kind, severity, mpp=0.25, seed=1))
    assert np.array_equal(changed[:2], perturb(tiles[:2], kind, severity, mpp=0.25, seed=1))


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_severities_are_in_order(tiles: np.ndarray, kind: str) -> None:
    apart = [
        np.abs(perturb(tiles, kind, severity, mpp=0.25, seed=1).astype(float) - tiles).mean()
        for severity in PERTURBATIONS[kind].levels
    ]
    assert apart == sorted(apart)
    assert apart[-1] > 1.5 * apart[0]


@pytest.mark.parametrize("kind", ["stain-weaker", "stain-stronger"])
def test_staining_multiplies_the_optical_density(tiles: np.ndarray, kind: str) -> None:
    """Of tiles made of two stains, both times f is the whole density times f."""
    for severity, factor in PERTURBATIONS[kind].levels.items():
        changed = density(perturb(tiles, kind, severity, mpp=0.25))
        before = density(tiles)
        inside = (before > 0.3) & (factor * before < 2.5)
        assert np.median(changed[inside] / before[inside]) == pytest.approx(factor, rel=0.06)


def test_the_balance_of_stains_moves_as_said() -> None:
    """Two flat stripes of pure stains: the one grows by the factor, the other stays."""
    stains = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    amount = rng.uniform(0.4, 1.0, size=(64, 64))
    which = (np.arange(64) >= 32).astype(int)[None, :].repeat(64, 0)
    od = amount[..., None] * stains[which]
    tile = np.rint(240 * np.exp(-od) - 1).clip(0, 255).astype(np.uint8)[None]
    for kind, factors in (("hematoxylin", (1.6, 1)), ("eosin", (1, 1.6))):
        changed = density(perturb(tile, kind, "x1.6", mpp=0.25))[0]
        for column, factor in enumerate(factors):
            share = changed[which == column].sum() / density(tile)[0][which == column].sum()
            assert share == pytest.approx(factor, rel=0.05)


def test_tone_curves_have_their_closed_forms() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    value = ramp.astype(float)
    assert np.abs(perturb(ramp, "darker", "x0.75", mpp=1) - 0.75 * value).max() <= 0.5
    assert np.abs(perturb(ramp, "brighter", "x1.25", mpp=1) - np.minimum(1.25 * value, 255)).max() <= 0.5
    assert np.abs(perturb(ramp, "gamma", "1.6", mpp=1) - 255 * (value / 255) ** 1.6).max() <= 0.5
    there = perturb(ramp, "gamma", "1.25", mpp=1)
    back = perturb(there, "gamma-inverse", "1.25", mpp=1).astype(float)
    assert np.abs(back - value)[value > 30].max() <= 1


def test_blur_is_gaussian_in_microns(tiles: np.ndarray) -> None:
    for mpp, severity, sigma in ((0.25, "0.5um", 2.0), (0.5, "1um", 2.0), (0.25, "1um", 4.0), (1.0, "0.5um", 0.5)):
        expected = gaussian_filter(tiles.astype(float), (0, sigma, sigma, 0), mode="reflect", truncate=4)
        assert np.abs(perturb(tiles, "blur", severity, mpp=mpp) - expected).max() <= 0.75


def test_hed_shift_keeps_to_its_seed(tiles: np.ndarray) -> None:
    one, two = (perturb(tiles, "hed", "0.1", mpp=0.25, seed=seed) for seed in (1, 2))
    assert not np.array_equal(one, two)


def test_jpeg_is_what_a_reader_of_jpeg_gives(tiles: np.ndarray) -> None:
    import cv2

    changed = perturb(tiles, "jpeg", "q50", mpp=0.25)
    settings = [cv2.IMWRITE_JPEG_QUALITY, 50, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    written = cv2.imencode(".jpg", tiles[0][..., ::-1], settings)[1]
    assert np.abs(cv2.imdecode(written, cv2.IMREAD_COLOR)[..., ::-1].astype(int) - changed[0]).max() <= 3


def test_blank_tiles_bear_every_change() -> None:
    blank = np.stack([np.full((32, 32, 3), 255, np.uint8), np.zeros((32, 32, 3), np.uint8)])
    for kind, severity in EVERY:
        assert perturb(blank, kind, severity, mpp=0.5).shape == blank.shape


def mean_colour(tiles: np.ndarray) -> np.ndarray:
    return density(tiles).mean(axis=(1, 2))


def test_curve_measures_against_unchanged_tiles(tiles: np.ndarray) -> None:
    clean = mean_colour(tiles)

    def closeness(features: np.ndarray) -> float:
        return -float(np.abs(features - clean).mean())

    table = robustness_curve(
        mean_colour, tiles, closeness, mpp=0.25, severities={"darker": ["x0.9", "x0.6"], "blur": ["0.5um"]}
    )
    assert table["kind"].tolist() == ["none", "darker", "darker", "blur"]
    assert table.loc[0, ["score", "change", "cosine", "n"]].tolist() == pytest.approx([0, 0, 1, 6])
    dark = table[table["kind"] == "darker"]
    assert dark["change"].tolist() == pytest.approx([np.log(0.9), np.log(0.6)], rel=0.05)
    assert table["change"].iloc[3] > -0.03, "blur keeps the mean"
    assert table["size"].iloc[1:].tolist() == [0.9, 0.6, 0.5]
    assert table["low"].isna().all()


def test_curve_carries_intervals(tiles: np.ndarray) -> None:
    def evaluate(features: np.ndarray) -> Interval:
        point = float(features.mean())
        return Interval(point=point, low=point - 1, high=point + 2, level=0.95, n=6, clusters=6, method="made up")

    table = robustness_curve(mean_colour, tiles, evaluate, mpp=0.25, severities={"jpeg": ["q80"]})
    assert (table["high"] - table["low"]).tolist() == pytest.approx([3, 3])


def test_curve_of_everything_has_a_row_each(tiles: np.ndarray) -> None:
    table = robustness_curve(mean_colour, tiles[:2], lambda x: float(x.mean()), mpp=0.25)
    assert list(zip(table["kind"], table["severity"], strict=True)) == [("none", ""), *EVERY]
    assert table["cosine"].between(-1, 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: perturb(t, "blr", "1um", mpp=1), PredictionsError, "closest: blur"),
        (lambda t: perturb(t, "blur", "9um", mpp=1), PredictionsError, "it has 0.25um, 0.5um"),
        (lambda t: perturb(t.astype(float), "blur", "1um", mpp=1), GeometryError, "float64"),
        (lambda t: perturb(t[0], "blur", "1um", mpp=1), GeometryError, "needed uint8"),
        (lambda t: perturb(t, "blur", "1um", mpp=0), GeometryError, "mpp is 0"),
        (lambda t: robustness_curve(lambda x: x, t, len, mpp=1), PredictionsError, "encode returned shape"),
        (
            lambda t: robustness_curve(lambda x: np.full((len(x), 2), np.nan), t, len, mpp=1),
            NonFiniteError,
            "unchanged",
        ),
        (lambda t: robustness_curve(mean_colour, t, len, mpp=1, severities={"fog": ["x"]}), PredictionsError, "fog"),
    ],
)
def test_bad_input_says_what_is_wrong(
    tiles: np.ndarray, call: Callable[[np.ndarray], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(tiles)


@pytest.mark.real
def test_real_mitoses_survive_every_change(real_data: Path) -> None:
    """Changes of known direction on real crops; no tile comes out blank, and every curve falls."""
    from PIL import Image

    folder = real_data / "tiles" / "amf" / "midog21"
    files = sorted(folder.glob("*.png"))[:: len(list(folder.glob("*.png"))) // 12][:12]
    crops = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    before = density(crops).mean(axis=(1, 2, 3))
    for kind, severity in EVERY:
        changed = perturb(crops, kind, severity, mpp=0.25)
        spread = changed.std(axis=(1, 2)).max(axis=1)
        assert (spread > 5).all(), f"{kind} {severity} blanks a tile"
        mean = density(changed).mean(axis=(1, 2, 3))
        if kind in ("stain-stronger", "darker", "gamma"):
            assert (mean > before).all()
        if kind in ("stain-weaker", "brighter", "gamma-inverse"):
            assert (mean < before).all()
    table = robustness_curve(
        lambda x: np.column_stack([mean_colour(x), x.std(axis=(1, 2))]),
        crops,
        lambda x: -float(np.abs(x - np.column_stack([mean_colour(crops), crops.std(axis=(1, 2))])).mean()),
        mpp=0.25,
    )
    assert (table["change"].iloc[1:] < 0).all()
