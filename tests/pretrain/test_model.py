"""The training model gives the tokens of the published code, in one pass for every crop size, and trains right."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.layers
import torch
import transformers
from scipy import stats
from torch import Tensor, nn

from encoders.seeded import seeded_images, seeded_state
from eosin.encoders.network import resize_position
from eosin.errors import GeometryError, UnknownEncoderError
from eosin.pretrain.layouts import config_of, load_weights
from eosin.pretrain.model import PRESETS, Block, CropTokens, ModelConfig, VisionTransformer, draw_subset, preset

OFFICIAL = np.load(Path(__file__).parents[1] / "encoders" / "official_tokens.npz")
META = json.loads(OFFICIAL["meta"].tobytes())
LEARNED = ModelConfig(dim=128, depth=2, heads=2, patch_px=14, position_grid=5, registers=0)
ROPE = ModelConfig(dim=128, depth=2, heads=2, patch_px=16, position="rope", norm_eps=1e-5, k_bias=False)
CONFIGS = {
    "learned": LEARNED,
    "registers": dataclasses.replace(LEARNED, registers=4),
    "swiglu": dataclasses.replace(LEARNED, ffn="swiglu", ffn_ratio=2.0),
    "rope": ROPE,
    "rope-swiglu": dataclasses.replace(ROPE, ffn="swiglu", ffn_ratio=3.0, registers=2),
}


def lively(module: nn.Module) -> nn.Module:
    """Return the module with every parameter random, so that no part can be lost unseen."""
    module.load_state_dict(seeded_state({key: tuple(value.shape) for key, value in module.state_dict().items()}))
    return module.eval()


def built(config: ModelConfig) -> VisionTransformer:
    model = VisionTransformer(config)
    lively(model)
    return model


def sequence(tokens: CropTokens) -> Tensor:
    return torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)


def side_of(config: ModelConfig, patches: int) -> int:
    return config.patch_px * patches


# ---- the same function as the published code


@pytest.mark.parametrize(("name", "size"), [(n, tuple(s)) for n in META for s in META[n]["sizes"]])
def test_official_weights_give_official_tokens(name: str, size: tuple[int, int]) -> None:
    state = seeded_state(META[name]["shapes"])
    model = VisionTransformer(config_of(state)).eval()
    load_weights(model, state)
    with torch.inference_mode():
        tokens = sequence(model([seeded_images(*size)])[0])[:, ::3, ::5]
    expected = OFFICIAL[f"{name}/{size[0]}x{size[1]}"]
    assert tokens.shape == expected.shape
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(tokens.numpy(), expected, atol=1e-4 if "dinov3" in name else 1e-5)


def _timm_network(name: str) -> nn.Module:
    small = {"embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 0}
    gated = {**small, "mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "img_size": 70}
    token = {"global_pool": "token"}
    return {
        "mlp": lambda: timm.create_model("vit_small_patch14_dinov2", **small, img_size=70),
        "registers": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **small, img_size=70),
        "swiglu": lambda: timm.create_model("vit_small_patch14_dinov2", **gated),
        "rope": lambda: timm.create_model("vit_small_patch16_dinov3", **small, **token),
        "rope-bias": lambda: timm.create_model("vit_small_patch16_dinov3_qkvb", **small, **token),
        "rope-swiglu": lambda: timm.create_model("vit_small_plus_patch16_dinov3_qkvb", **small, **token),
    }[name]()


@pytest.mark.parametrize("name", ["mlp", "registers", "swiglu", "rope", "rope-bias", "rope-swiglu"])
def test_timm_weights_give_timm_tokens(name: str) -> None:
    network = lively(_timm_network(name))
    state = dict(network.state_dict())
    config = config_of(state)
    model = VisionTransformer(config).eval()
    assert load_weights(model, state).fresh == ("mask_token",)
    side = side_of(config, 5)
    images = seeded_images(side, side if config.position == "learned" else side - 32)
    with torch.inference_mode():
        expected = network.forward_features(images)  # type: ignore[operator]
        tokens = sequence(model([images])[0])
    assert expected.abs().mean() > 0.1
    assert tokens.shape == expected.shape
    assert (tokens - expected).abs().max() <= (1e-5 if config.position == "learned" else 1e-4)


def transformers_model(name: str) -> nn.Module:
    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    square = {**small, "image_size": 70, "patch_size": 14, "mlp_ratio": 2}
    rotary = {**small, "image_size": 80, "patch_size": 16, "intermediate_size": 256, "num_register_tokens": 4}
    v2, registers, v3 = transformers.Dinov2Config, transformers.Dinov2WithRegistersConfig, transformers.DINOv3ViTConfig
    return {
        "mlp": lambda: transformers.Dinov2Model(v2(**square)),
        "swiglu": lambda: transformers.Dinov2Model(v2(**square, use_swiglu_ffn=True)),
        "registers": lambda: transformers.Dinov2WithRegistersModel(registers(**square, num_register_tokens=4)),
        "rope": lambda: transformers.DINOv3ViTModel(v3(**rotary)),
        "rope-bare": lambda: transformers.DINOv3ViTModel(v3(**rotary | {"num_register_tokens": 0})),
        "rope-swiglu": lambda: transformers.DINOv3ViTModel(v3(**rotary, use_gated_mlp=True, hidden_act="silu")),
    }[name]()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["mlp", "swiglu", "registers", "rope", "rope-bare", "rope-swiglu"])
def test_transformers_weights_give_transformers_tokens(name: str, masked: bool) -> None:
    """With a mask too: transformers puts the mask token in before the positions."""
    network = lively(transformers_model(name))
    state = dict(network.state_dict())
    config = config_of(state)
    model = VisionTransformer(config).eval()
    assert load_weights(model, state).fresh == ()
    side = side_of(config, 5)
    images, mask = seeded_images(side, side), torch.rand(2, 25, generator=torch.Generator().manual_seed(1)) < 0.4
    options = {"bool_masked_pos": mask} if masked else {}
    with torch.inference_mode():
        expected = network(images, **options).last_hidden_state
        tokens = sequence(model([images], [mask if masked else None])[0])
    assert expected.abs().mean() > 0.1
    assert tokens.shape == expected.shape
    assert (tokens - expected).abs().max() <= (1e-5 if config.position == "learned" else 1e-4)


def _count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VisionTransformer(config).parameters())


@pytest.mark.parametrize(
    ("name", "arch"),
    [("small", "vit_small"), ("base", "vit_base"), ("large", "vit_large"), ("giant", "vit_giant")],
)
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_presets_have_the_parameters_of_the_releases(name: str, arch: str, registers: int) -> None:
    config = preset(name, registers=registers, position_grid=37)
    with torch.device("meta"):
        network = timm.create_model(f"{arch}_patch14_{'reg4_' if registers else ''}dinov2")
    theirs = sum(parameter.numel() for parameter in network.parameters())
    ours_only = config.dim * (2 if registers else 1)  # the mask token; beside registers also the position of cls
    assert _count(config) == theirs + ours_only


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("dinov3_small", "vit_small"),
        ("dinov3_small_plus", "vit_small_plus"),
        ("dinov3_base", "vit_base"),
        ("dinov3_large", "vit_large"),
        ("huge_plus", "vit_huge_plus"),
    ],
)
def test_dinov3_presets_have_the_parameters_of_the_releases(name: str, arch: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        network = timm.create_model(f"{arch}_patch16_dinov3_qkvb")
    theirs = sum(parameter.numel() for parameter in network.parameters())
    assert _count(config) == theirs + config.dim * (1 + config.depth)  # the mask token and the biases of the keys


def test_totals_that_are_published() -> None:
    assert _count(PRESETS["huge_plus"]) == 840_633_600
    totals = {"small": 22.06, "base": 86.58, "large": 304.37, "giant": 1136.48}  # timm's table, millions
    for name, millions in totals.items():
        assert _count(preset(name, registers=0, position_grid=37)) / 1e6 == pytest.approx(millions, abs=0.006)
    assert 5 < _count(PRESETS["tiny"]) / 1e6 < 6


# ---- several crop sizes, masks, positions


@pytest.mark.parametrize("name", CONFIGS)
def test_crop_sizes_in_one_pass_equal_separate_passes(name: str) -> None:
    config = CONFIGS[name]
    model = built(config)
    crops = [seeded_images(side_of(config, h), side_of(config, w)) for h, w in ((5, 5), (2, 2), (3, 4))]
    crops[1] = crops[1].repeat(3, 1, 1, 1) + torch.arange(6)[:, None, None, None]
    masks = [torch.arange(50).reshape(2, 5, 5) % 3 == 0, None, None]
    with torch.inference_mode():
        together = model(crops, masks)
        for crop, mask, found in zip(crops, masks, together, strict=True):
            alone = sequence(model([crop], [mask])[0])
            assert sequence(found).shape == alone.shape
            assert (sequence(found) - alone).abs().max() <= 1e-6 * alone.abs().max()
    assert together[1].patches.shape == (6, 4, 128)
    assert together[0].registers.shape == (2, config.registers, 128)


@pytest.mark.parametrize("name", ["learned", "registers"])
def test_mask_token_enters_before_the_position(name: str) -> None:
    model = built(CONFIGS[name])
    entering: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    images = seeded_images(70, 70)
    with torch.inference_mode():
        model([images], [torch.ones(2, 25, dtype=torch.bool)])
        masked = entering[0].view(2, -1, 128)[:, 1 + CONFIGS[name].registers :]
        table = model.pos_embed
        assert table is not None
        torch.testing.assert_close(masked, (model.mask_token + table[:, 1:]).expand(2, -1, -1))
        patches = model.patch_embed(images).flatten(2).transpose(1, 2)
        some = torch.arange(25).expand(2, -1) < 7
        model([images], [some])
        mixed = entering[1].view(2, -1, 128)[:, 1 + CONFIGS[name].registers :]
        torch.testing.assert_close(mixed[:, 7:], (patches + table[:, 1:])[:, 7:])
        torch.testing.assert_close(mixed[:, :7], masked[:, :7])


@pytest.mark.parametrize(("registers", "rule"), [(0, "bicubic-offset0.1"), (4, "bicubic-antialias")])
def test_position_table_is_resized_as_in_the_releases(registers: int, rule: str) -> None:
    config = dataclasses.replace(LEARNED, registers=registers)
    assert config.interpolation == rule
    model = built(config)
    entering: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    images = seeded_images(42, 98)
    with torch.inference_mode():
        model([images])
        table = model.pos_embed
        assert table is not None
        added = entering[0].view(2, -1, 128)[:, 1 + registers :] - model.patch_embed(images).flatten(2).transpose(1, 2)
        expected = {how: resize_position(table, (3, 7), how, prefix=1)[:, 1:] for how in
                    ("bicubic-offset0.1", "bicubic-antialias")}  # fmt: skip
    assert (added - expected.pop(rule)).abs().max() < 1e-5
    assert (added - next(iter(expected.values()))).abs().max() > 1e-2


def _stretches(config: ModelConfig, *, train: bool, passes: int) -> np.ndarray:
    """Return the factors (passes, blocks, crop sizes) that the rotary coordinates were stretched by."""
    model = VisionTransformer(config).train(train)
    factors: list[float] = []

    def note(_: nn.Module, args: tuple) -> None:
        for (cos, sin), n in zip(args[2], (3, 2), strict=True):
            angle = math.atan2(float(sin[0, 15]), float(cos[0, 15]))  # the longest period, never a full turn
            factors.append(angle / (2 * math.pi * (1 / n - 1) / 100 ** (15 / 16)))

    for block in model.blocks:
        block.register_forward_pre_hook(note)
    with torch.inference_mode():
        for _ in range(passes):
            model([torch.zeros(1, 3, 48, 48), torch.zeros(1, 3, 32, 32)])
    return np.array(factors).reshape(passes, config.depth, 2)


def test_rotary_stretch_is_drawn_for_every_block_and_crop_size() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(ROPE, rope_rescale=2.0, depth=3)
    factors = _stretches(config, train=True, passes=40)
    assert all(len(np.unique(each.round(5))) == 6 for each in factors)
    assert factors.min() >= 0.5 - 1e-4
    assert factors.max() <= 2 + 1e-4
    assert stats.kstest(np.log2(factors.ravel()), stats.uniform(-1, 2).cdf).pvalue > 0.01
    np.testing.assert_allclose(_stretches(config, train=False, passes=1), 1, atol=1e-4)
    np.testing.assert_allclose(_stretches(ROPE, train=True, passes=1), 1, atol=1e-4)


# ---- stochastic depth


@pytest.mark.parametrize(("count", "rate", "kept"), [(10, 0.3, 7), (16, 0.4, 9), (3, 0.4, 1), (2, 0.9, 1), (1, 0.5, 1)])
def test_subset_has_the_exact_size_and_weight(count: int, rate: float, kept: int) -> None:
    rows, weights, sizes = draw_subset([(4, 3), (count, 5)], rate, torch.device("cpu"))
    first = max(int(4 * (1 - rate)), 1)
    assert sizes == [(first, 3), (kept, 5)]
    assert rows.shape == (first * 3 + kept * 5,)
    assert weights.shape == (len(rows), 1)
    samples = (rows[first * 3 :] - 12).view(kept, 5)
    assert torch.equal(samples % 5, torch.arange(5).expand(kept, -1))
    assert len(set((samples[:, 0] // 5).tolist())) == kept
    assert samples.min() >= 0
    assert samples.max() < count * 5
    torch.testing.assert_close(weights[-1], torch.tensor([count / kept]))


def _block(rate: float, silent: str) -> Block:
    """Return a training block of which one branch does nothing."""
    block = Block(dataclasses.replace(LEARNED, drop_path=rate))
    lively(block)
    with torch.no_grad():
        getattr(block, silent).gamma.zero_()
    return block.train()


@pytest.mark.parametrize("silent", ["ls1", "ls2"])
def test_only_the_subset_is_changed_and_by_the_scaled_branch(silent: str) -> None:
    torch.manual_seed(1)
    block, sizes = _block(0.3, silent), [(10, 4), (7, 2)]
    x = torch.randn(54, 128)
    with torch.no_grad():
        change = block(x, sizes) - x
        whole = block.eval()(x, sizes) - x
    for rows, (count, length), kept in ((slice(0, 40), sizes[0], 7), (slice(40, 54), sizes[1], 4)):
        mine, full = change[rows].view(count, length, -1), whole[rows].view(count, length, -1)
        touched = mine.abs().amax((1, 2)) > 0
        assert int(touched.sum()) == kept
        torch.testing.assert_close(mine[touched], full[touched] * count / kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("silent", ["ls1", "ls2"])
def test_expectation_over_draws_is_the_whole_branch(silent: str) -> None:
    torch.manual_seed(2)
    block, draws = _block(0.4, silent), 2000
    x = torch.randn(5 * 2, 128)
    with torch.no_grad():
        found = sum(block(x, [(5, 2)]) for _ in range(draws)) / draws
        change, whole = found - x, block.eval()(x, [(5, 2)]) - x
    spread = whole.abs() * math.sqrt((5 / 3 - 1) / draws)  # kept 3 of 5: variance of 5 / 3 Bernoulli(3 / 5)
    assert ((change - whole).abs() <= 4.5 * spread + 1e-5).all()
    assert (change - whole).norm() < 0.05 * whole.norm()


def test_training_repeats_with_the_seed_and_evaluation_draws_nothing() -> None:
    config = dataclasses.replace(ROPE, drop_path=0.3, rope_rescale=2.0)
    model = built(config).train()
    images = seeded_images(48, 48).repeat(3, 1, 1, 1)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model([images])[0].cls.detach()

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    model.eval()
    assert torch.equal(run(3), run(4))


# ---- gradients, precision, initial values


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_parameter_that_should_train(name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], drop_path=0.25, layer_scale=1.0)
    torch.manual_seed(0)
    model = VisionTransformer(config).train()
    crops = [torch.randn(4, 3, side_of(config, n), side_of(config, n)) for n in (4, 2)]
    mask = torch.rand(4, 16) < 0.5
    loss = sum((part * torch.randn_like(part)).sum() for tokens in model(crops, [mask, None]) for part in tokens)
    loss.backward()  # type: ignore[union-attr]
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if key.endswith("qkv.bias"):
            query, keys, value = parameter.grad.chunk(3)
            assert query.abs().sum() > 0
            assert value.abs().sum() > 0
            assert config.k_bias or not keys.any()
        else:
            assert parameter.grad.abs().sum() > 0, key


def test_bias_of_the_keys_does_nothing_when_it_is_masked() -> None:
    model, images = built(ROPE), seeded_images(64, 64)
    with torch.inference_mode():
        before = model([images])[0].cls
        model.blocks[0].attn.qkv.bias[128:256] += 3.0  # type: ignore[index, union-attr]
        assert torch.equal(model([images])[0].cls, before)
        model.blocks[0].attn.qkv.bias[:128] += 3.0  # type: ignore[index, union-attr]
        assert not torch.allclose(model([images])[0].cls, before)


def test_mask_token_is_in_the_graph_without_a_mask() -> None:
    model = VisionTransformer(LEARNED)
    model([seeded_images(70, 70)])[0].cls.sum().backward()
    assert model.mask_token.grad is not None
    assert not model.mask_token.grad.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_autocast_trains_with_a_residual_in_fp32(name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], drop_path=0.25)
    model = built(config)
    crops = [seeded_images(side_of(config, n), side_of(config, n)) for n in (4, 2)]
    masks = [torch.arange(16).expand(2, -1) % 2 == 0, None]
    residual: list[torch.dtype] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: residual.append(args[0].dtype))
    with torch.no_grad():
        exact = model(crops, masks)[0].cls
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(crops, masks)[0].cls
    difference = (rough - exact).norm() / exact.norm()
    assert 1e-5 < difference < 0.05
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sum(tokens.cls.float().square().mean() for tokens in model(crops, masks)).backward()  # type: ignore[union-attr]
    assert residual == [torch.float32] * 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_a_model_from_the_meta_device_gets_initial_values() -> None:
    config = dataclasses.replace(ROPE, dim=256, heads=4, registers=16, layer_scale=0.3)
    with torch.device("meta"):
        model = VisionTransformer(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    straight = VisionTransformer(config)
    torch.manual_seed(0)
    straight.init_weights()
    for (key, a), b in zip(model.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b), key
    values = dict(model.named_parameters())
    assert values["blocks.1.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert values["register_tokens"].std().item() == pytest.approx(0.02, rel=0.1)
    assert (values["blocks.0.ls2.gamma"] == 0.3).all()
    assert not values["mask_token"].any()
    assert not values["blocks.0.attn.qkv.bias"].any()


@pytest.mark.slow
def test_training_pass_is_one_graph_for_the_compiler() -> None:
    model = built(dataclasses.replace(ROPE, drop_path=0.3, rope_rescale=2.0, depth=1)).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    crops = [seeded_images(16 * n, 16 * n).repeat(2, 1, 1, 1) for n in (4, 2)]
    masks = [torch.arange(16).expand(4, -1) % 3 == 0, None]
    found = []
    for each in (compiled, model):
        torch.manual_seed(5)
        model.zero_grad()
        each(crops, masks)[1].cls.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[1].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "dim 128 is no multiple of heads 5"),
        ({"heads": 0}, "sizes must be positive"),
        ({"depth": 0}, "sizes must be positive"),
        ({"position": "rope", "heads": 64}, "rope needs heads of a multiple of 4, not 2"),
        ({"position": "none"}, "position 'none'"),
        ({"ffn": "glu"}, "ffn 'glu'"),
        ({"drop_path": 1.0}, r"drop_path 1.0 is outside \[0, 1\)"),
        ({"rope_rescale": 0.5}, "rope_rescale 0.5 is below 1"),
        ({"registers": -1}, "registers -1 is negative"),
    ],
)
def test_a_geometry_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        dataclasses.replace(LEARNED, **change)


def test_unknown_preset_names_the_closest() -> None:
    with pytest.raises(UnknownEncoderError, match="'hugeplus'; closest: huge_plus"):
        preset("hugeplus")


@pytest.mark.parametrize("size", [(71, 70), (70, 7), (0, 70)])
def test_crops_that_are_no_whole_number_of_patches(size: tuple[int, int]) -> None:
    with pytest.raises(GeometryError, match=f"crops of {size[0]} x {size[1]} px"):
        VisionTransformer(LEARNED)([torch.zeros(1, 3, *size)])


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 24, dtype=torch.bool), torch.ones(1, 25, dtype=torch.bool), torch.ones(2, 25)]
)
def test_a_mask_that_does_not_fit(mask: Tensor) -> None:
    with pytest.raises(GeometryError, match=r"needed torch.bool \(2, 25\)"):
        VisionTransformer(LEARNED)([torch.zeros(2, 3, 70, 70)], [mask])
