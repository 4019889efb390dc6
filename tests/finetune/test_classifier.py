from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vits import DEPTH, SIDE, WIDTH, dinov2, dinov3, images, resnet, separate, train_a_little
from torch.nn import functional

from eosin.encoders.network import Backbone, build_network
from eosin.encoders.pooling import pool
from eosin.encoders.spec import EncoderSpec
from eosin.errors import ConfigError, GeometryError
from eosin.finetune.adapters import AdaptConfig, count
from eosin.finetune.classifier import Classifier, parameter_groups

HEAD = AdaptConfig(mode="head")


def test_the_head_of_huge_plus_has_1281_parameters() -> None:
    spec = EncoderSpec(name="h", dim=1280, patch_px=16, source="random:0", interpolation="rope", registers=4)
    with torch.device("meta"):
        backbone = Backbone(build_network("vit_huge_plus_patch16_dinov3", {}), spec)
        model = Classifier(backbone, HEAD)
    assert count(model) == 1_281


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_logits_are_the_head_on_pooled_tokens(pooling: Any) -> None:
    for classes, outputs in ((("normal", "atypical"), 1), (("a", "b", "c"), 3)):
        backbone = dinov2()
        backbone.fit(SIDE, SIDE)
        vectors = pool(backbone(images()), pooling)
        model = Classifier(backbone, HEAD, pooling=pooling, classes=classes)
        assert vectors.shape == (3, model.spec.dim)
        assert model.spec.dim == WIDTH * (2 if pooling == "cls+mean" else 1)
        logits = model(images())
        assert logits.shape == (3, outputs)
        assert torch.equal(logits, functional.linear(vectors, model.head.weight, model.head.bias))


def test_both_layouts_are_one_encoder() -> None:
    """The same weights have the same hash, and the classifiers the same logits."""
    backbone = dinov3()
    other = separate(backbone)
    assert other.spec.weights_hash == backbone.spec.weights_hash
    ours, theirs = Classifier(backbone, HEAD), Classifier(other, HEAD)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["head", "last", "full", "lora", "vpt"])
def test_every_mode_learns_a_few_tiles(mode: Any) -> None:
    model = Classifier(dinov3(), AdaptConfig(mode=mode, dropout=0.0, blocks=1)).train()
    x, labels = images(count=6), torch.tensor([0.0, 1, 0, 1, 1, 0])[:, None]
    optimiser = torch.optim.AdamW(parameter_groups(model, lr=0.01, weight_decay=0.0))
    losses = []
    for _ in range(12):
        loss = functional.binary_cross_entropy_with_logits(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_batch_norms_that_stand_still_keep_their_statistics() -> None:
    x = images(count=4, side=64)
    for config, moves in ((HEAD, set()), (AdaptConfig(mode="last", blocks=1), {"layer4"})):
        model = Classifier(resnet(), config)
        before = {key: value.clone() for key, value in model.backbone.network.state_dict().items()}
        model.train()
        model(x)
        after = model.backbone.network.state_dict()
        changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
        assert changed == moves


def test_groups_decay_by_layer() -> None:
    model = Classifier(dinov2(), AdaptConfig(mode="full"))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    start = "backbone.network."
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)
    assert found[f"{start}norm.weight"] == (1.0, 0.0)
    for block in range(DEPTH):
        assert found[f"{start}blocks.{block}.attn.qkv.weight"] == (0.5 ** (DEPTH - block), 0.1)
    assert found[f"{start}patch_embed.proj.weight"] == (0.5 ** (DEPTH + 1), 0.1)
    assert found[f"{start}cls_token"] == (0.5 ** (DEPTH + 1), 0.0)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [g["lr"] for g in groups] == sorted((g["lr"] for g in groups), reverse=True)
    plain = parameter_groups(Classifier(dinov2(), AdaptConfig()), lr=1e-4, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in plain] == [(1e-4, 0.1), (1e-4, 0.0)]


def test_seeds_decide_the_start() -> None:
    one, same, other = (Classifier(dinov3(), AdaptConfig(), seed=seed) for seed in (0, 0, 1))
    train_a_little(one.backbone.network), train_a_little(same.backbone.network)
    assert torch.equal(one(images()), same(images()))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_bad_input_is_refused() -> None:
    for classes in (("one",), ("a", "a")):
        with pytest.raises(ConfigError, match="two or more"):
            Classifier(dinov3(), HEAD, classes=classes)
    for backbone in (dinov3(), separate(dinov3())):
        with pytest.raises(GeometryError, match="30 px is not a multiple"):
            Classifier(backbone, HEAD)(images(side=30))
    for decay in (0.0, 1.1):
        with pytest.raises(ConfigError, match="layer decay"):
            parameter_groups(Classifier(dinov3(), HEAD), lr=1.0, weight_decay=0.0, layer_decay=decay)
