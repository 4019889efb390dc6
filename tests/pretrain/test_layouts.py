"""Weights go from and to every layout with every key accounted for, and an exported file is an encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import eosin
from encoders.seeded import seeded_images, seeded_state
from eosin.encoders.convert import detect
from eosin.encoders.network import resize_position
from eosin.errors import NonFiniteError, WeightsError
from eosin.pretrain.layouts import config_of, export_state, family, load_weights, save_encoder
from eosin.pretrain.model import CropTokens, ModelConfig, VisionTransformer

LEARNED = ModelConfig(dim=128, depth=2, heads=2, patch_px=14, position_grid=5, registers=0, ffn_ratio=2.0)
ROPE = ModelConfig(dim=128, depth=2, heads=2, patch_px=16, position="rope", norm_eps=1e-5, k_bias=False, ffn_ratio=2.0)
CONFIGS = {
    "learned": LEARNED,
    "registers": dataclasses.replace(LEARNED, registers=3),
    "swiglu": dataclasses.replace(LEARNED, ffn="swiglu", registers=4, ffn_ratio=3.0),
    "no-qkv-bias": dataclasses.replace(LEARNED, qkv_bias=False),
    "masked-key": dataclasses.replace(LEARNED, k_bias=False),
    "rope": ROPE,
    "rope-bare": dataclasses.replace(ROPE, registers=0),
    "rope-swiglu": dataclasses.replace(ROPE, ffn="swiglu", ffn_ratio=3.0),
    "rope-no-qkv-bias": dataclasses.replace(ROPE, qkv_bias=False),
}
CASES = [(n, layout) for n, c in CONFIGS.items() for layout in (family(c), "timm", f"hf-{family(c)}")]


def built(config: ModelConfig, **changes: object) -> VisionTransformer:
    """Return a model of which every parameter is random, but a masked bias, which stays zero as in training."""
    model = VisionTransformer(dataclasses.replace(config, **changes)).eval()  # type: ignore[arg-type]
    state = seeded_state({key: tuple(value.shape) for key, value in model.state_dict().items()})
    if not config.k_bias:
        for key in [key for key in state if key.endswith("qkv.bias")]:
            state[key][128:256] = 0
    model.load_state_dict(state)
    return model


def sequence(tokens: CropTokens) -> Tensor:
    return torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)


@torch.inference_mode()
def run(model: VisionTransformer, patches: tuple[int, int], mask: Tensor | None = None) -> Tensor:
    px = model.config.patch_px
    return sequence(model([seeded_images(px * patches[0], px * patches[1])], [mask])[0])


# ---- round trips


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_comes_back(name: str, layout: str) -> None:
    config = CONFIGS[name]
    first = built(config)
    exported = export_state(first.state_dict(), config, layout)
    assert detect(exported) == layout
    second = VisionTransformer(config).eval()
    loading = load_weights(second, exported)
    assert loading.layout == layout
    assert loading.resized is None
    assert loading.fresh == (("mask_token",) if layout == "timm" else ())
    assert not any("mask_token" in key for key in loading.ignored)
    folded = {"mask_token", "cls_token", "pos_embed"} if layout == "timm" else set()
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert key in folded or torch.equal(a, b), key
    torch.testing.assert_close(run(second, (5, 3)), run(first, (5, 3)), rtol=0, atol=1e-5)
    if layout != "timm":
        mask = torch.arange(15).expand(2, -1) % 2 == 0
        assert torch.equal(run(second, (5, 3), mask), run(first, (5, 3), mask))


@pytest.mark.parametrize("name", [n for n in CONFIGS if "no-qkv-bias" not in n and n != "masked-key"])
@pytest.mark.parametrize("layout", ["own", "timm", "hf"])
def test_geometry_is_read_from_the_shapes(name: str, layout: str) -> None:
    config = CONFIGS[name]
    own = family(config)
    state = export_state(built(config).state_dict(), config, {"own": own, "hf": f"hf-{own}"}.get(layout, layout))
    found = config_of(state, drop_path=0.2)
    assert found == dataclasses.replace(config, drop_path=0.2, ffn_ratio=found.ffn_ratio)
    assert found.hidden == config.hidden


def test_exported_weights_keep_their_mask_token_in_transformers() -> None:
    options = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    mask = torch.arange(25).expand(2, -1) % 3 == 0
    v2 = transformers.Dinov2WithRegistersConfig(
        **options, image_size=70, patch_size=14, mlp_ratio=2, num_register_tokens=3
    )
    v3 = transformers.DINOv3ViTConfig(
        **options, image_size=80, patch_size=16, intermediate_size=256, num_register_tokens=4
    )
    pairs = (
        ("registers", transformers.Dinov2WithRegistersModel, v2, 1e-5),
        ("rope", transformers.DINOv3ViTModel, v3, 1e-4),
    )
    for name, kind, config, tolerance in pairs:
        first = built(CONFIGS[name])
        exported = export_state(first.state_dict(), CONFIGS[name], f"hf-{family(CONFIGS[name])}")
        model = kind.from_pretrained(None, config=config, state_dict=exported).eval()
        side = 5 * CONFIGS[name].patch_px
        with torch.inference_mode():
            expected = model(seeded_images(side, side), bool_masked_pos=mask).last_hidden_state
        assert (run(first, (5, 5), mask) - expected).abs().max() <= tolerance


# ---- files


@pytest.mark.parametrize(("name", "layout"), [case for case in CASES if case[1].startswith(("dino", "timm"))])
def test_an_exported_file_is_an_encoder(name: str, layout: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = built(config)
    path = save_encoder(tmp_path / "own.safetensors", model.state_dict(), config, layout=layout)
    encoder = eosin.load_encoder(path, device="cpu", precision="fp32", backend="torch")
    assert encoder.spec.patch_px == config.patch_px
    assert encoder.spec.registers == config.registers
    for patches in ((5, 5),) if layout == "timm" else ((5, 5), (7, 3)):
        images = seeded_images(config.patch_px * patches[0], config.patch_px * patches[1])
        tokens = encoder(images)  # type: ignore[arg-type]
        expected = run(model, patches)
        assert (tokens.cls - expected[:, 0]).abs().max() <= 1e-5
        assert (tokens.patches.flatten(1, 2) - expected[:, 1 + config.registers :]).abs().max() <= 1e-4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["learned", "registers", "swiglu", "rope"])
def test_a_file_in_bf16_is_half_as_big_and_the_same_encoder(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = built(config)
    full = save_encoder(tmp_path / "a.safetensors", model.state_dict(), config)
    half = save_encoder(tmp_path / "b.safetensors", model.state_dict(), config, dtype=torch.bfloat16)
    assert half.stat().st_size < 0.52 * full.stat().st_size
    other = VisionTransformer(config).eval()
    load_weights(other, half)
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a if key == "cls_token" else a.bfloat16().float(), b), key
    encoder = eosin.load_encoder(half, device="cpu", precision="fp32", backend="torch")
    side = 5 * config.patch_px
    images = seeded_images(side, side)
    assert (encoder(images).cls - run(other, (5, 5))[:, 0]).abs().max() <= 1e-5  # type: ignore[arg-type]


def test_a_teacher_of_a_training_run_is_loaded_and_its_heads_are_listed(tmp_path: Path) -> None:
    first = built(LEARNED)
    teacher = {f"backbone.{key}": value for key, value in first.state_dict().items()}
    torch.save({"teacher": teacher | {"dino_head.mlp.0.weight": torch.ones(2)}, "iteration": 5}, tmp_path / "t.pth")
    second = VisionTransformer(LEARNED).eval()
    loading = load_weights(second, tmp_path / "t.pth")
    assert loading.ignored == ("iteration (beside the network)", "dino_head.mlp.0.weight")
    assert torch.equal(run(second, (5, 5)), run(first, (5, 5)))


def test_wrappers_of_training_are_taken_off_before_an_export() -> None:
    first = built(LEARNED)
    wrapped = {f"module._orig_mod.{key}": value for key, value in first.state_dict().items()}
    plain = export_state(first.state_dict(), LEARNED, "timm")
    assert all(torch.equal(value, plain[key]) for key, value in export_state(wrapped, LEARNED, "timm").items())


def test_a_model_on_the_meta_device_is_filled() -> None:
    first = built(CONFIGS["swiglu"])
    with torch.device("meta"):
        second = VisionTransformer(CONFIGS["swiglu"]).eval()
    load_weights(second, export_state(first.state_dict(), CONFIGS["swiglu"], "hf-dinov2"))
    assert all(parameter.requires_grad for parameter in second.parameters())
    assert torch.equal(run(second, (4, 5)), run(first, (4, 5)))


# ---- the position table


@pytest.mark.parametrize("name", ["learned", "registers"])
@pytest.mark.parametrize("layout", ["dinov2", "timm", "hf-dinov2"])
def test_a_larger_position_table_is_resized_and_told(name: str, layout: str) -> None:
    config = CONFIGS[name]
    first = built(config, position_grid=37)
    exported = export_state(first.state_dict(), first.config, layout)
    second = VisionTransformer(config).eval()
    assert load_weights(second, exported).resized == (37, 5)
    torch.testing.assert_close(run(second, (5, 5)), run(first, (5, 5)), rtol=0, atol=1e-5)
    table, small = first.pos_embed, second.pos_embed
    assert table is not None
    assert small is not None
    expected = resize_position(table, (5, 5), config.interpolation, prefix=1)
    assert torch.equal(small[:, 1:], expected[:, 1:])


def test_a_position_table_that_is_not_square_is_refused() -> None:
    state = dict(built(LEARNED).state_dict())
    state["pos_embed"] = torch.zeros(1, 1 + 24, 128)
    with pytest.raises(WeightsError, match=r"1 wrong shape: pos_embed \(1, 25, 128\), needed \(1, 26, 128\)"):
        load_weights(VisionTransformer(LEARNED), state)


# ---- every key is accounted for


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.proj.bias"), "1 missing: blocks.1.attn.proj.bias"),
        (
            lambda s: [s.pop(f"blocks.1.{k}") for k in ("ls1.gamma", "norm2.bias")],
            "2 missing: blocks.1.ls1.gamma, blocks.1.norm2.bias",
        ),
        (lambda s: s.pop("cls_token"), "cls_token"),
        (lambda s: s.pop("blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight"),
        (lambda s: s.update({"blocks.0.extra": torch.ones(1)}), "1 unexpected: blocks.0.extra"),
        (lambda s: s.update({"blocks.2.norm1.bias": torch.ones(128)}), "1 unexpected: blocks.2.norm1.bias"),
        (lambda s: s.update({"norm.weight": torch.ones(3)}), r"norm.weight \(3,\), needed \(128,\)"),
        (lambda s: s.pop("register_tokens"), "missing: register_tokens"),
    ],
)
def test_keys_and_shapes_that_do_not_fit(change, message: str) -> None:
    config = CONFIGS["registers"]
    state = dict(built(config).state_dict())
    change(state)
    model = VisionTransformer(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_weights(model, state)
    with pytest.raises(WeightsError, match=message):
        export_state(state, config, "timm")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_half_a_gate_is_missing() -> None:
    config = CONFIGS["rope-swiglu"]
    state = export_state(built(config).state_dict(), config, "dinov3")
    state.pop("blocks.1.mlp.w1.weight")
    with pytest.raises(WeightsError, match=r"1 missing: blocks.1.mlp.w12.weight"):
        load_weights(VisionTransformer(config), state)


def test_a_smaller_or_larger_release_is_refused() -> None:
    state = built(LEARNED).state_dict()
    for changes in ({"depth": 3}, {"depth": 1}, {"dim": 64, "heads": 1}, {"registers": 2}, {"ffn": "swiglu"}):
        with pytest.raises(WeightsError, match=r"missing|unexpected|wrong shape"):
            load_weights(VisionTransformer(dataclasses.replace(LEARNED, **changes)), state)


def test_the_other_kind_of_positions_is_refused() -> None:
    with pytest.raises(WeightsError, match="has learned positions, the model has position 'rope'"):
        load_weights(VisionTransformer(ROPE), built(LEARNED).state_dict())
    state = export_state(built(ROPE).state_dict(), ROPE, "dinov3")
    with pytest.raises(WeightsError, match="has no learned positions, the model has position 'learned'"):
        load_weights(VisionTransformer(LEARNED), state)


@pytest.mark.parametrize("change", [{"k_bias": False}, {"qkv_bias": False}])
def test_a_bias_the_model_would_drop_is_refused(change: dict) -> None:
    model = VisionTransformer(dataclasses.replace(LEARNED, **change))
    with pytest.raises(WeightsError, match=r"blocks.0.attn.qkv.bias is not zero"):
        load_weights(model, built(LEARNED).state_dict())


def test_a_bias_of_the_keys_has_no_place_in_dinov3() -> None:
    config = dataclasses.replace(ROPE, k_bias=True)
    with pytest.raises(WeightsError, match="bias of the keys"):
        export_state(built(config).state_dict(), config, "dinov3")


@pytest.mark.parametrize("name", ["masked-key", "rope"])
def test_what_is_left_in_a_masked_bias_is_exported_as_zero(name: str) -> None:
    config = CONFIGS[name]
    model = built(config)
    expected = run(model, (3, 3))
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[128:256] = 3.0  # type: ignore[index, union-attr]
    for layout in (family(config), f"hf-{family(config)}"):
        exported = export_state(model.state_dict(), config, layout)
        second = VisionTransformer(config).eval()
        load_weights(second, exported)
        assert not second.blocks[1].attn.qkv.bias[128:256].any()  # type: ignore[index, union-attr]
        assert torch.equal(run(second, (3, 3)), expected)


@pytest.mark.parametrize(
    ("config", "layout"), [(LEARNED, "dinov3"), (LEARNED, "hf-dinov3"), (ROPE, "dinov2"), (ROPE, "x")]
)
def test_a_layout_the_geometry_does_not_have(config: ModelConfig, layout: str) -> None:
    with pytest.raises(WeightsError, match=f"has no layout '{layout}'; choose {family(config)}"):
        export_state(built(config).state_dict(), config, layout)


def test_what_a_reader_could_not_tell_is_not_written(tmp_path: Path) -> None:
    wide = dataclasses.replace(LEARNED, heads=4)
    with pytest.raises(WeightsError, match="heads of 32 cannot be told"):
        save_encoder(tmp_path / "x.safetensors", built(wide).state_dict(), wide)
    eps = dataclasses.replace(LEARNED, norm_eps=1e-5)
    with pytest.raises(WeightsError, match="norm_eps 1e-05 cannot be told"):
        save_encoder(tmp_path / "x.safetensors", built(eps).state_dict(), eps)
    with pytest.raises(WeightsError, match=r"written as \.safetensors"):
        save_encoder(tmp_path / "x.pth", built(LEARNED).state_dict(), LEARNED)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_written_and_the_old_file_stays(tmp_path: Path) -> None:
    state = built(LEARNED).state_dict()
    path = save_encoder(tmp_path / "x.safetensors", state, LEARNED)
    before = path.read_bytes()
    state["blocks.1.norm1.bias"][3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in blocks\.1\.norm1\.bias"):
        save_encoder(path, state, LEARNED)
    assert path.read_bytes() == before


def test_a_file_that_is_no_checkpoint_of_a_transformer(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="no known layout"):
        load_weights(VisionTransformer(LEARNED), tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="it lacks"):
        config_of({"patch_embed.proj.weight": torch.ones(8, 3, 2, 2)})
    assert load_file(tmp_path / "x.safetensors").keys() == {"conv1.weight"}
