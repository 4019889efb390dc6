"""Agreement with torchstain (installed) and tiatoolbox (numbers stored by make_tiatoolbox_reference.py).

Two differences of convention, undone here so that the rest can be compared closely: the peers do not
take back the +1 of OD = -ln((I + 1) / light) and cut off the fraction, so theirs = floor(ours + 1);
and torchstain's torch backend takes the nearest rank for percentiles where numpy and we interpolate.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchstain
from PIL import Image

from eosin.stain import LabTarget, Macenko, Reinhard, StainFit, StainTarget, Vahadane
from eosin.stain.colour import grey_to_lab

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
STORED = np.load(Path(__file__).with_name("tiatoolbox_reference.npz"))


def load(folder, count):
    """Return `count` evenly spaced tiles of a folder, uint8 (count, H, W, 3)."""
    files = sorted(folder.glob("*.png"))
    files = files[:: len(files) // count][:count]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


@pytest.fixture(params=["amf/midog21", "amf/atnorm-br", "camelyon16/normal", "camelyon16/tumor"])
def tiles(request, real_data):
    return load(real_data / "tiles" / request.param, 8)


def batch(tiles):
    return torch.from_numpy(tiles).movedim(-1, 1)


def as_peers(images):
    """Return float images (B, 3, H, W) in 0-1 as the peers write grey values, int (B, H, W, 3)."""
    return (images * 255 + 1).clamp(max=255).floor().int().movedim(1, -1).numpy()


@pytest.mark.real
def test_macenko_fit_equals_torchstain_numpy(tiles):
    """float32 against float64, the same interpolation: 2e-5 in the matrix, 2e-4 in the concentrations."""
    ours = Macenko().fit_each(batch(tiles))
    theirs = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    for i, tile in enumerate(tiles):
        theirs.fit(tile)
        np.testing.assert_allclose(ours.matrix[i], theirs.HERef.T, atol=2e-5)
        np.testing.assert_allclose(ours.concentrations[i], theirs.maxCRef, rtol=2e-4)


@pytest.mark.real
def test_macenko_output_equals_torchstain_numpy(tiles):
    """One grey level at most, in fewer than 1 of 1,000 values (where floor falls either way)."""
    theirs = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    theirs.fit(tiles[0])
    out, unchanged = Macenko().normalise(batch(tiles).double() / 255, None, Macenko().fit(tiles[:1]).target())
    assert not unchanged.any()
    expected = np.stack([theirs.normalize(tile, stains=False)[0] for tile in tiles])
    # numpy's cast of 240 exp(-OD) is not clipped at 0 by torchstain; it cannot be negative
    difference = np.abs(as_peers(out) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.real
def test_macenko_output_near_torchstain_torch(tiles):
    """Nearest-rank percentiles and float32 move the fit a little: mean below 0.2, at most 4 grey levels."""
    theirs = torchstain.normalizers.MacenkoNormalizer(backend="torch")
    images = batch(tiles)
    theirs.fit(images[0])
    out, _ = Macenko().normalise(images.double() / 255, None, Macenko().fit(tiles[:1]).target())
    expected = torch.stack([theirs.normalize(image, stains=False)[0] for image in images]).numpy()
    difference = np.abs(as_peers(out) - expected)
    assert difference.mean() < 0.2
    assert difference.max() <= 4


@pytest.mark.real
def test_uint8_output_is_within_one_of_torchstain(tiles):
    """As users see it: rounding against truncation plus one."""
    theirs = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    theirs.fit(tiles[0])
    out, _ = Macenko().normalise(batch(tiles), None, Macenko().fit(tiles[:1]).target())
    expected = np.stack([theirs.normalize(tile, stains=False)[0] for tile in tiles]).astype(int)
    difference = expected - out.movedim(1, -1).numpy()
    assert difference.min() >= -1
    assert difference.max() <= 2
    assert 0.3 < difference.mean() < 0.7


@pytest.mark.real
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_reinhard_equals_torchstain(tiles, backend):
    """The same CIELAB up to constants of six digits: statistics to 0.02 Lab units, 99.9 % of values to 1 level.

    Only values inside 0-255 are compared: torchstain's cast to uint8 wraps around outside.
    """
    theirs = torchstain.normalizers.ReinhardNormalizer(backend=backend)
    peers = tiles if backend == "numpy" else batch(tiles)
    theirs.fit(peers[0])
    target = Reinhard().fit(tiles[:1]).target()
    np.testing.assert_allclose(target.mean, theirs.target_means, atol=0.02)
    np.testing.assert_allclose(target.std, theirs.target_stds, atol=0.02)
    out, unchanged = Reinhard().normalise(batch(tiles).double() / 255, None, target)
    assert not unchanged.any()
    expected = [np.asarray(theirs.normalize(tile if backend == "numpy" else tile.clone())) for tile in peers]
    expected = np.stack(expected).astype(int)
    ours = (out * 255).movedim(1, -1).numpy()
    inside = ((ours > 2) & (ours < 253)).all(-1)
    difference = np.abs(np.floor(ours) - expected)[inside]
    assert inside.mean() > 0.4
    assert (difference <= 1).mean() > 0.999


def shifted(crops):
    """Return crops, float64 in 0-1, whose OD by our formula is tiatoolbox's: max(-ln(max(I, 1) / 255), 1e-6)."""
    return (batch(crops).double().clamp(1, 255 * np.exp(-1e-6)) - 1) / 255


def degrees(a, b):
    return np.degrees(np.arccos(np.clip((np.asarray(a) * np.asarray(b)).sum(-1), -1, 1)))


def test_macenko_fit_equals_tiatoolbox_on_its_tissue_pixels():
    """Only the choice of tissue differs: on tiatoolbox's luminosity mask the vectors agree to 0.1 degree."""
    tissue = np.unpackbits(STORED["tissue"], axis=-1).astype(bool)
    images = shifted(STORED["crops"])
    for i in range(3):
        pixels = images[i].movedim(0, -1)[torch.from_numpy(tissue[i])]
        fit = Macenko(light=255.0, beta=1e-7).fit(pixels.T[None, :, :, None])
        assert degrees(fit.matrix, STORED["macenko_matrix"][i]).max() < 0.1


def test_macenko_output_equals_tiatoolbox_under_its_fits():
    """The same stains in, the same image out: one grey level at most (float error before floor)."""
    matrix, strongest = torch.from_numpy(STORED["macenko_matrix"]), torch.from_numpy(STORED["macenko_concentrations"])
    fit = StainFit(method="macenko", matrix=matrix, concentrations=strongest, ok=torch.ones(3).bool(), light=255.0)
    first, second = (tuple(row) for row in matrix[0].tolist())
    target = StainTarget(
        method="macenko", matrix=(first, second), concentrations=tuple(strongest[0].tolist()), light=255.0
    )
    out, unchanged = Macenko(light=255.0).normalise(shifted(STORED["crops"]), fit, target)
    assert not unchanged.any()
    difference = np.abs(as_peers(out)[:, ::4, ::4] - STORED["macenko_output"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_reinhard_near_tiatoolbox():
    """tiatoolbox rounds Lab to 8 bits (OpenCV) before and after: 0.06 Lab units, below one grey level on average."""
    images = batch(STORED["crops"])
    lab = grey_to_lab(images.flatten(2).double())
    np.testing.assert_allclose(lab.mean(2), STORED["reinhard_mean"], atol=0.06)
    np.testing.assert_allclose(lab.std(2, correction=0), STORED["reinhard_std"], atol=0.06)
    mean, std = (tuple(STORED[f"reinhard_{name}"][0].tolist()) for name in ("mean", "std"))
    out, _ = Reinhard().normalise(images, None, LabTarget(mean=mean, std=std))
    difference = np.abs(out.movedim(1, -1).numpy()[:, ::4, ::4].astype(int) - STORED["reinhard_output"])
    assert difference.mean() < 1
    assert np.percentile(difference, 99) <= 6


def test_vahadane_hematoxylin_near_tiatoolbox():
    """Only hematoxylin can be compared, to 10 degrees.

    tiatoolbox hands scikit-learn the transposed problem, so its penalty lies on the stain vectors, and warns
    that the result is unstable (its issue 382): its eosin has zeros and negative absorbance on these crops.
    """
    fit = Vahadane().fit_each(batch(STORED["crops"]))
    assert (STORED["vahadane_matrix"][:, 1] <= 0).any(-1).all()
    assert (fit.matrix >= 0).all()
    assert degrees(fit.matrix[:, 0], STORED["vahadane_matrix"][:, 0]).max() < 10
    assert degrees(fit.matrix, Macenko().fit_each(batch(STORED["crops"])).matrix).max() < 20
