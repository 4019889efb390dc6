"""Every layout gives the tokens of the code it comes from: official networks and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from seeded import seeded_images, seeded_state

from eosin.encoders.checkpoints import _inferred, hash_weights
from eosin.encoders.convert import fill, infer, to_timm
from eosin.encoders.export import from_timm
from eosin.encoders.load import load_encoder
from eosin.encoders.network import Backbone, build_network, resize_position
from eosin.encoders.spec import Tokens
from eosin.errors import WeightsError

OFFICIAL = np.load(Path(__file__).with_name("official_tokens.npz"))
META = json.loads(OFFICIAL["meta"].tobytes())
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}


def backbone_of(checkpoint: dict[str, torch.Tensor]) -> Backbone:
    spec, network = _inferred(checkpoint, name="x", source="file:x")
    return Backbone(network, spec).eval()


def sequence(tokens: Tokens) -> torch.Tensor:
    return torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches.flatten(1, 2)), dim=1)


@torch.inference_mode()
def run(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    backbone.fit(images.shape[-2], images.shape[-1])
    return sequence(backbone(images))


@pytest.mark.parametrize(("name", "size"), [(n, tuple(s)) for n in META for s in META[n]["sizes"]])
def test_official_layout_gives_official_tokens(name: str, size: tuple[int, int]) -> None:
    backbone = backbone_of(seeded_state(META[name]["shapes"]))
    tokens = run(backbone, seeded_images(*size))[:, ::3, ::5]
    expected = OFFICIAL[f"{name}/{size[0]}x{size[1]}"]
    assert tokens.shape == expected.shape
    np.testing.assert_allclose(tokens.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in META if n.startswith("dinov2")])
def test_another_interpolation_would_be_noticed(name: str) -> None:
    backbone = backbone_of(seeded_state(META[name]["shapes"]))
    backbone.spec = backbone.spec.replace(interpolation="bicubic")
    tokens = run(backbone, seeded_images(98, 56))[:, ::3, ::5]
    assert np.abs(tokens.numpy() - OFFICIAL[f"{name}/98x56"]).max() > 1e-3


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with every parameter random, so that no part can be lost unseen."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(seeded_state(shapes))
    return model.eval()


def _transformers_models() -> dict[str, torch.nn.Module]:
    square = {"image_size": 70, "patch_size": 14, "mlp_ratio": 2}
    v2, registers, v3 = transformers.Dinov2Config, transformers.Dinov2WithRegistersConfig, transformers.DINOv3ViTConfig
    rotary = {**SMALL, "image_size": 64, "patch_size": 16, "intermediate_size": 256, "num_register_tokens": 4}
    plain = {**SMALL, "image_size": 64, "patch_size": 16, "intermediate_size": 256}
    return {
        "hf-dinov2": transformers.Dinov2Model(v2(**SMALL, **square)),
        "hf-dinov2-swiglu": transformers.Dinov2Model(v2(**SMALL, **square, use_swiglu_ffn=True)),
        "hf-dinov2-reg": transformers.Dinov2WithRegistersModel(registers(**SMALL, **square, num_register_tokens=4)),
        "hf-dinov3": transformers.DINOv3ViTModel(v3(**rotary)),
        "hf-dinov3-gated": transformers.DINOv3ViTModel(v3(**rotary, use_gated_mlp=True, hidden_act="silu")),
        "hf-vit": transformers.ViTModel(transformers.ViTConfig(**plain), add_pooling_layer=False),
    }


@pytest.mark.parametrize("name", sorted(_transformers_models()))
@pytest.mark.parametrize("times", [(1, 1), (2, 1)])
def test_transformers_folder_gives_transformers_tokens(name: str, times: tuple[int, int], tmp_path: Path) -> None:
    model = _lively(_transformers_models()[name])
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    encoder = load_encoder(tmp_path, device="cpu", precision="fp32", backend="torch")
    side = 70 if "dinov2" in name else 64
    images = seeded_images(side * times[0], side * times[1])
    options = {"interpolate_pos_encoding": True} if name == "hf-vit" else {}
    with torch.inference_mode():
        expected = model(images, **options).last_hidden_state
    tokens = sequence(encoder(images))
    assert tokens.shape == expected.shape
    assert (tokens - expected).abs().max() <= 1e-4
    assert expected.abs().mean() > 0.1


@pytest.mark.parametrize("name", ["hf-dinov2", "hf-dinov2-swiglu", "hf-dinov2-reg", "hf-vit"])
def test_names_of_transformers_4_and_5_mean_the_same(name: str, tmp_path: Path) -> None:
    model = _lively(_transformers_models()[name])
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    saved = load_encoder(tmp_path, device="cpu", precision="fp32", backend="torch")
    in_memory = backbone_of(dict(model.state_dict()))
    assert saved.spec.weights_hash == hash_weights(in_memory.network)


def test_clip_vision_tower_gives_projected_class_tokens(tmp_path: Path) -> None:
    vision = {"image_size": 64, "patch_size": 32, "intermediate_size": 256, "hidden_act": "quick_gelu", **SMALL}
    config = transformers.CLIPConfig(
        vision_config=vision,
        text_config={"hidden_size": 64, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 64},
        projection_dim=16,
    )
    model = _lively(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    encoder = load_encoder(tmp_path, device="cpu", precision="fp32", backend="torch")
    images = seeded_images(64, 64)
    with torch.inference_mode():
        pooled = model.vision_model(images).pooler_output  # type: ignore[operator]
        expected = model.visual_projection(pooled)  # type: ignore[operator]
    assert encoder.spec.dim == 16
    assert (encoder(images).cls - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", list(META))
def test_round_trip_through_every_layout(name: str) -> None:
    first = backbone_of(seeded_state(META[name]["shapes"]))
    family = name[:6]
    size = META[name]["sizes"][1]
    expected = run(first, seeded_images(*size))
    first.fit(first.spec.native_px, first.spec.native_px)
    for layout in (family, f"hf-{family}"):
        checkpoint = from_timm(dict(first.network.state_dict()), layout)
        second = backbone_of(checkpoint)
        second.spec = second.spec.replace(interpolation=first.spec.interpolation)
        assert to_timm(checkpoint).layout == layout
        assert hash_weights(second.network) == hash_weights(first.network)
        assert torch.equal(run(second, seeded_images(*size)), expected)


def test_exported_weights_load_into_transformers() -> None:
    first = backbone_of(seeded_state(META["dinov2-plain-mlp"]["shapes"]))
    images = seeded_images(70, 70)
    expected = run(first, images)
    config = transformers.Dinov2Config(**SMALL, image_size=70, patch_size=14, mlp_ratio=2)
    exported = from_timm(dict(first.network.state_dict()), "hf-dinov2")
    model = transformers.Dinov2Model.from_pretrained(None, config=config, state_dict=exported).eval()
    with torch.inference_mode():
        assert (model(images).last_hidden_state - expected).abs().max() <= 1e-4


def _official() -> dict[str, torch.Tensor]:
    return seeded_state(META["dinov2-reg-mlp"]["shapes"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()}},
        lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}, "iteration": 9, "student": {}},
        lambda s: {f"teacher.backbone.{k}": v for k, v in s.items()} | {"student.backbone.cls_token": torch.ones(1)},
        lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}, "optimizer": {}},
        lambda s: {**s, "dino_head.mlp.0.weight": torch.ones(2, 2)},
    ],
)
def test_training_checkpoints_are_unwrapped(wrap) -> None:
    plain, wrapped = to_timm(_official()), to_timm(wrap(_official()))
    assert plain.state.keys() == wrapped.state.keys()
    assert all(torch.equal(plain.state[key], wrapped.state[key]) for key in plain.state)


def test_ignored_keys_are_listed() -> None:
    assert to_timm(_official()).ignored == ("mask_token",)
    assert "iteration (beside the network)" in to_timm({"teacher": _official(), "iteration": 1}).ignored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.proj.bias"), "1 missing: blocks.1.attn.proj.bias"),
        (lambda s: s.update({"blocks.0.extra": torch.ones(1)}), "1 unexpected: blocks.0.extra"),
        (lambda s: s.update({"norm.weight": torch.ones(3)}), r"1 wrong shape: norm.weight \(3,\), needed \(128,\)"),
    ],
)
def test_every_key_and_shape_is_accounted_for(change, message: str) -> None:
    state = _official()
    arch, args = infer(to_timm(state))
    change(state)
    with pytest.raises(WeightsError, match=message):
        fill(build_network(arch, args, img_size=70), to_timm(state), what="x")


def test_a_dinov3_bias_of_k_is_refused() -> None:
    state = seeded_state(META["dinov3-mlp"]["shapes"])
    state["blocks.0.attn.qkv.bias_mask"] = torch.ones(384)
    with pytest.raises(WeightsError, match="bias of k is not zero"):
        to_timm(state)


def test_other_rotary_periods_are_refused() -> None:
    state = seeded_state(META["dinov3-mlp"]["shapes"])
    state["rope_embed.periods"] = state["rope_embed.periods"] * 2
    with pytest.raises(WeightsError, match="rotary periods"):
        to_timm(state)


def test_zero_biases_of_dinov3_are_dropped_and_told() -> None:
    state = seeded_state(META["dinov3-mlp"]["shapes"])
    for key in [key for key in state if key.endswith("qkv.bias")]:
        state[key].zero_()
    converted = to_timm(state)
    assert not any(key.endswith("q_bias") for key in converted.state)
    assert "blocks.1.attn.qkv.bias (all zero)" in converted.ignored


@pytest.mark.parametrize("state", [{}, {"conv1.weight": torch.ones(1)}])
def test_unknown_layout(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(WeightsError, match="no known layout"):
        to_timm(state)


@pytest.mark.parametrize("how", ["bicubic-offset0.1", "bicubic-antialias", "bicubic"])
def test_position_embedding_keeps_constants_and_prefix(how) -> None:
    position = torch.cat((torch.full((1, 1, 3), 9.0), torch.full((1, 25, 3), 2.0)), dim=1)
    resized = resize_position(position, (3, 7), how, prefix=1)
    assert resized.shape == (1, 22, 3)
    assert torch.equal(resized[:, :1], position[:, :1])
    torch.testing.assert_close(resized[:, 1:], torch.full((1, 21, 3), 2.0))
    assert resize_position(position, (5, 5), how, prefix=1) is position


@pytest.mark.parametrize("key", ["cls_token", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"])
def test_a_key_the_architecture_is_told_by_is_named_when_it_lacks(key: str) -> None:
    state = {name: tensor for name, tensor in _official().items() if name != key}
    with pytest.raises(WeightsError, match=f"lacks '?{key}"):
        infer(to_timm(state))
