"""Inference: views, their equivariance, folds, temperature, uncertainty, and the input a tile becomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, functional
from traingen import cells_and_tiles, classifier

from eosin.encoders import EncoderSpec, get_spec
from eosin.errors import ConfigError, GeometryError, NonFiniteError
from eosin.finetune.infer import Ensemble, Input, binary_entropy, combine, input_of, tile_logits, views

PLAIN = Input(side_px=128, crop_px=128, mean=(0.0,) * 3, std=(1.0,) * 3)


class Corner(nn.Module):
    """A logit that no turn of the tile leaves alone."""

    def forward(self, images: Tensor) -> Tensor:
        return (images[:, 0, 0, 0] + 2 * images[:, 1, 0, -1] + 5 * images[:, 2, 3, 40])[:, None]


def tiles(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 128, 128, 3), dtype=np.uint8)


def test_views_are_the_symmetries_of_the_square() -> None:
    image = torch.arange(4.0).reshape(1, 1, 2, 2)
    shown = {tuple(view.flatten().tolist()) for view in views(image, "dihedral")}
    assert len(shown) == 8
    assert {tuple(view.flatten().tolist()) for view in views(image, "rot4")} < shown
    assert len(views(image, "none")) == 1


@pytest.mark.parametrize(("tta", "mirror"), [("rot4", False), ("dihedral", True)])
def test_logits_do_not_change_when_tiles_turn(tta: str, mirror: bool) -> None:
    given, model = tiles(), Corner()
    expected = tile_logits(model, given, PLAIN, tta=tta)  # pyright: ignore[reportArgumentType]
    alone = tile_logits(model, given, PLAIN)
    for quarter in range(4):
        turned = np.rot90(given, quarter, (1, 2))
        if mirror:
            turned = turned[:, ::-1]
        found = tile_logits(model, np.ascontiguousarray(turned), PLAIN, tta=tta)  # pyright: ignore[reportArgumentType]
        assert found == pytest.approx(expected, abs=1e-6)
        if quarter:
            assert np.abs(tile_logits(model, np.ascontiguousarray(turned), PLAIN) - alone).max() > 0.01


def test_logits_of_views_are_averaged_not_their_probabilities(tmp_path: Path) -> None:
    model, given = classifier(tmp_path).eval(), tiles(2)
    with torch.no_grad():
        images = torch.from_numpy(given).permute(0, 3, 1, 2) / 255
        each = [model(torch.rot90(images, k, (2, 3)))[:, 0].double() for k in range(4)]
    assert tile_logits(model, given, PLAIN, tta="rot4") == pytest.approx(torch.stack(each).mean(0).numpy(), abs=1e-6)


def test_batch_size_and_mode_do_not_matter(tmp_path: Path) -> None:
    model, given = classifier(tmp_path, dropout=0.5), cells_and_tiles(4)[1]
    model.train()
    one, many = (tile_logits(model, given, PLAIN, batch=batch) for batch in (1, 7))
    assert one == pytest.approx(many, abs=1e-5)
    assert model.training
    assert tile_logits(model, given[:0], PLAIN).shape == (0,)


def test_ensemble_is_the_sigmoid_of_mean_logits() -> None:
    logits = np.array([[1.0, -2.0], [3.0, 0.0]])
    found = combine(logits, temperature=2.0)
    assert found.p == pytest.approx(1 / (1 + np.exp(-np.array([1.0, -0.5]))))
    assert combine(logits, temperature=2.0, shift=1.0).p == pytest.approx(1 / (1 + np.exp(-np.array([0.5, -1.0]))))
    assert found.spread == pytest.approx([0.5, 0.5])
    assert found.entropy == pytest.approx([entropy([p, 1 - p], base=2) for p in found.p])
    total = [entropy([p, 1 - p], base=2) for p in found.fold_p.mean(0)]
    parts = np.mean([[entropy([p, 1 - p], base=2) for p in fold] for fold in found.fold_p], axis=0)
    assert found.disagreement == pytest.approx(total - parts)
    assert (combine(logits[:1]).disagreement == 0).all()
    assert binary_entropy([0.0, 1.0, 0.5]).tolist() == [0, 0, 1]


def test_ensemble_of_models(tmp_path: Path) -> None:
    models, given = [classifier(tmp_path, seed=seed).eval() for seed in (0, 1)], tiles()
    both = Ensemble(models, PLAIN, threshold=0.4, temperature=1.5, shift=0.2)
    each = [tile_logits(model, given, PLAIN, tta="rot4") for model in models]
    assert both.scores(given) == pytest.approx(1 / (1 + np.exp(-(np.mean(each, axis=0) - 0.2) / 1.5)))
    assert both.threshold == 0.4


def wide_of(images: torch.Tensor, spec: EncoderSpec) -> torch.Tensor:
    """Return images resized to 224 px as torchvision does it, normalised."""
    resized = functional.resize(images, [224, 224], InterpolationMode.BICUBIC, antialias=True)
    return functional.normalize(resized.clamp(0, 1), list(spec.mean), list(spec.std))


def test_input_is_cut_or_resized_to_whole_patches() -> None:
    spec = get_spec("dinov2-vits14")
    cut = input_of(spec, tile_px=128)
    assert (cut.side_px, cut.crop_px) == (126, 126)
    images = torch.rand(1, 3, 128, 128)
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    assert torch.equal(cut.prepare(images), (images[..., 1:127, 1:127] - mean) / std)
    wide = input_of(spec, tile_px=128, input_px=224).prepare(images)
    assert wide.shape == (1, 3, 224, 224)
    assert float((wide * std + mean).max()) <= 1 + 1e-6
    centre = input_of(spec, tile_px=128, input_px=224, crop_px=64)
    assert torch.equal(centre.prepare(images), wide_of(images[..., 32:96, 32:96], spec))
    assert input_of(spec, tile_px=128, crop_px=64).side_px == 56
    with pytest.raises(GeometryError, match="crop_px is 130, and the tiles have 128 px"):
        input_of(spec, tile_px=128, crop_px=130)
    with pytest.raises(GeometryError, match="multiple of 14 px, found 200; the closest are 196 and 210"):
        input_of(spec, tile_px=128, input_px=200)


def test_bad_input() -> None:
    with pytest.raises(GeometryError, match=r"uint8 \(n, S, S, 3\), square"):
        tile_logits(Corner(), np.zeros((1, 128, 128, 4), np.uint8), PLAIN)
    with pytest.raises(ConfigError, match="temperature 0"):
        combine([[1.0]], temperature=0)
    with pytest.raises(ConfigError, match="no test-time augmentation is called 'rot2'"):
        views(torch.zeros(1, 3, 2, 2), "rot2")  # pyright: ignore[reportArgumentType]

    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0, 0, 0] / 0

    with pytest.raises(NonFiniteError, match="2 of 2 tiles have a logit that is NaN"):
        tile_logits(Broken(), np.ones((2, 128, 128, 3), np.uint8), PLAIN)
