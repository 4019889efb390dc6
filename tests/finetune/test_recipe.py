"""Recipes: their fields, their errors, and what two of them differ in."""

from __future__ import annotations

import pytest

from eosin.errors import ConfigError
from eosin.finetune.losses import LossConfig
from eosin.finetune.recipe import RECIPES, FinetuneConfig, changed_fields, get_recipe


def test_amf_is_what_the_winners_record_says() -> None:
    amf = get_recipe("amf")
    assert (amf.adapt.mode, amf.adapt.rank, amf.adapt.alpha, amf.adapt.targets) == ("lora", 8, 16.0, ("q", "v"))
    assert (amf.lr, amf.weight_decay, amf.warmup, amf.epochs, amf.tta) == (1e-4, 0.1, 0.1, 60, "rot4")
    assert RECIPES["amf"] == amf


def test_changes_are_kept_and_hashed() -> None:
    few = get_recipe("amf", epochs=3, loss=LossConfig(gamma=0.0))
    assert few.epochs == 3
    assert few.hash != get_recipe("amf").hash
    assert few.hash == get_recipe("amf", epochs=3, loss=LossConfig(gamma=0.0)).hash
    assert changed_fields(get_recipe("amf").to_dict(), few.to_dict()) == ["epochs: 60 -> 3", "loss.gamma: 2.0 -> 0.0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling": "none"}, "sampling is 'none'"),
        ({"tta": "rot8"}, "tta is 'rot8'"),
        ({"batch": 0}, "batch is 0"),
        ({"folds": 1}, "folds is 1"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"stop_share": 0.0}, "stop_share is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"epoch": 3}, "no field 'epoch'; closest: epochs"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        get_recipe("amf", **changes)


def test_unknown_recipe() -> None:
    with pytest.raises(ConfigError, match="no recipe is called 'afm'; there are amf"):
        get_recipe("afm")


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        FinetuneConfig().epochs = 2  # pyright: ignore[reportAttributeAccessIssue]
