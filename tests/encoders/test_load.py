"""Loading: random weights, files, folders, the hub that is not there, and what `encode` computes."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from seeded import seeded_images, seeded_state

from eosin.encoders import get_spec, hub, load_encoder
from eosin.encoders.encoder import Encoder
from eosin.encoders.files import read_tensors
from eosin.encoders.pooling import multi_depth_cls, pool
from eosin.encoders.spec import Tokens
from eosin.encoders.weights import find_weights, import_weights, weights_status
from eosin.errors import GeometryError, UnknownEncoderError, WeightsError, WeightsUnavailableError

PLAIN = {"device": "cpu", "precision": "fp32", "backend": "torch"}
TILES = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)


def tiny() -> torch.nn.Module:
    """A ViT of timm with random weights: width 64, one head, patch 14, native 70 px."""
    network = timm.create_model(
        "vit_small_patch14_dinov2", embed_dim=64, depth=2, num_heads=1, img_size=70, num_classes=0
    )
    network.load_state_dict(seeded_state({key: tuple(v.shape) for key, v in network.state_dict().items()}))
    return network.eval()


@pytest.fixture(scope="module")
def small() -> Encoder:
    encoder = load_encoder("random:vit_tiny_patch16_224@1", **PLAIN)
    assert isinstance(encoder, Encoder)
    return encoder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("EOSIN_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "_seen", {})
    return tmp_path


def test_random_weights_follow_the_seed_and_leave_torch_alone(small: Encoder) -> None:
    before = torch.get_rng_state()
    same, other = (load_encoder(f"random:vit_tiny_patch16_224@{seed}", **PLAIN) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same.spec.name == "random:vit_tiny_patch16_224@1"
    assert same.spec.weights_hash == small.spec.weights_hash != other.spec.weights_hash
    np.testing.assert_array_equal(same.encode(TILES), small.encode(TILES))


def test_random_features_tell_tiles_apart(small: Encoder) -> None:
    noise, flat = TILES[:1], np.full_like(TILES[:1], 128)
    features = small.encode(np.concatenate((noise, flat)))
    assert np.corrcoef(features)[0, 1] < 0.99


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
def test_encode_is_normalise_forward_pool(pooling) -> None:
    encoder = load_encoder("random:dinov2-vits14-reg", pooling=pooling, **PLAIN)
    tiles = TILES[:, :98, :98]
    network = encoder.backbone.network
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = torch.from_numpy(((tiles / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    features = encoder.encode(tiles)
    with torch.inference_mode():
        sequence = network.forward_features(images)  # its position embedding is at 98 px now
    cls, mean_patch = sequence[:, 0], sequence[:, 5:].mean(1)
    expected = {"cls": cls, "mean": mean_patch, "cls+mean": torch.cat((cls, mean_patch), 1)}[pooling]
    assert features.dtype == np.float32
    assert features.shape == (3, encoder.spec.dim) == tuple(expected.shape)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-4)


def test_tokens_have_their_shapes() -> None:
    encoder = load_encoder("random:dinov3-vits16", **PLAIN)
    tokens = encoder(encoder.prepare(TILES[:, :160, :192]))
    assert [tuple(part.shape) for part in tokens] == [(3, 384), (3, 4, 384), (3, 10, 12, 384)]


def test_patch_tokens_lie_on_the_image_grid(small: Encoder) -> None:
    """Changing one patch of the image changes its own patch embedding before any block."""
    images = small.prepare(TILES[:1])
    changed = images.clone()
    changed[:, :, 32:48, 80:96] += 1
    first, second = (small.layers(x, [0])[0].patches for x in (images, changed))
    moved = (first - second).norm(dim=-1)[0]
    assert divmod(int(moved.argmax()), moved.shape[1]) == (2, 5)


def test_layers_end_in_the_tokens_and_multi_depth_joins_them(small: Encoder) -> None:
    images = small.prepare(TILES)
    last = small(images)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(small.layers(images, [-1])[0], last, strict=True))
    joined = multi_depth_cls(small, images, [11, 3, -1])
    assert joined.shape == (3, 3 * 192)
    torch.testing.assert_close(joined[:, :192], joined[:, 384:])
    blocks = small.backbone.network
    with torch.inference_mode():
        x = blocks._pos_embed(blocks.patch_embed(images))
        x = blocks.norm(blocks.blocks[:4](blocks.norm_pre(x)))
    torch.testing.assert_close(joined[:, 192:384], x[:, 0], atol=1e-4, rtol=1e-4)
    with pytest.raises(GeometryError, match="12 blocks; there is no block 12"):
        multi_depth_cls(small, images, [12])


def test_pool_on_numbers() -> None:
    patches = torch.arange(8.0).reshape(1, 2, 2, 2)
    tokens = Tokens(torch.tensor([[9.0, 9.0]]), torch.zeros(1, 0, 2), patches)
    assert pool(tokens, "cls+mean").tolist() == [[9.0, 9.0, 3.0, 4.0]]
    with pytest.raises(GeometryError, match="'max' does not exist"):
        pool(tokens, "max")  # type: ignore[arg-type]


def test_wrong_tiles_are_refused(small: Encoder) -> None:
    for tiles, message in (
        (TILES[:, :220, :220], "multiple of its 16 px patch"),
        (TILES[:, :208], "square"),
        (TILES.astype(np.float32), "needed: uint8"),
        (TILES[0], "needed: uint8"),
    ):
        with pytest.raises(GeometryError, match=message):
            small.encode(tiles)
    assert small.encode(TILES[:0]).shape == (0, 192)


def test_other_sizes_are_encoded_and_the_first_is_not_changed_by_it() -> None:
    encoder = load_encoder("random:dinov2-vits14", **PLAIN)
    first = encoder.encode(TILES[:, :70, :70])
    assert encoder.encode(TILES[:, :98, :98]).shape == (3, 384)
    encoder(encoder.prepare(TILES[:, :112, :70]))
    np.testing.assert_array_equal(encoder.encode(TILES[:, :70, :70]), first)


def test_convolutional_networks_of_timm_give_tokens_too() -> None:
    encoder = load_encoder("random:timm:resnet18", **PLAIN)
    tokens = encoder(encoder.prepare(TILES))
    assert (tokens.patches.shape, tokens.registers.shape[1]) == ((3, 7, 7, 512), 0)
    torch.testing.assert_close(tokens.cls, tokens.patches.mean((1, 2)))
    np.testing.assert_allclose(encoder.encode(TILES), tokens.cls.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_file_gives_what_its_network_gives(kind: str, tmp_path: Path) -> None:
    network, path = tiny(), tmp_path / f"mine.{kind}"
    if kind == "pth":
        torch.save({"model": network.state_dict()}, path)
    else:
        save_file(network.state_dict(), path)
    encoder = load_encoder(path, **PLAIN)
    images = seeded_images(70, 70)
    with torch.inference_mode():
        assert torch.allclose(encoder(images).cls, network.forward_features(images)[:, 0], atol=1e-5)
    assert (encoder.spec.name, encoder.spec.source) == ("mine", f"file:mine.{kind}")
    assert (encoder.spec.dim, encoder.spec.patch_px, encoder.spec.native_px) == (64, 14, 70)


def test_the_hash_is_of_the_weights_not_of_the_file(tmp_path: Path) -> None:
    state = tiny().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path / "b.pth")
    changed = {**state, "norm.bias": state["norm.bias"] + 1e-3}
    save_file(changed, tmp_path / "c.safetensors")
    a, b, c = (load_encoder(tmp_path / n, **PLAIN).spec for n in ("a.safetensors", "b.pth", "c.safetensors"))
    assert a.weights_hash == b.weights_hash != c.weights_hash


def test_a_timm_folder_is_read(tmp_path: Path) -> None:
    args = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 64}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": args, "pretrained_cfg": half}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        encoder = load_encoder(source, **PLAIN)
        assert (encoder.spec.mean, encoder.spec.input_px, encoder.spec.dim) == ((0.5,) * 3, 64, 48)
        assert encoder.encode(TILES[:, :64, :64]).shape == (3, 48)


def test_a_timm_folder_of_a_convolutional_network_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "tf_efficientnet_lite0", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(tmp_path, **PLAIN)
    images = torch.from_numpy(TILES).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        wanted = network.forward_features(images).mean((2, 3)).numpy()
    np.testing.assert_allclose(encoder.encode(TILES), wanted, atol=1e-5)
    save_file({**network.state_dict(), "stranger": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="unexpected: stranger"):
        load_encoder(tmp_path, **PLAIN)


def test_code_shipped_with_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}')
    with pytest.raises(WeightsError, match="not executed"):
        load_encoder(tmp_path)


class _Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("bomb-went-off",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": _Bomb()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="would run its code"):
        load_encoder(tmp_path / "x.pth")
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize(("suffix", "data"), [(".pth", b"no weights"), (".safetensors", b"\x00" * 20), (".pth", b"")])
def test_a_broken_file_is_named(suffix: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"x\."):
        read_tensors(path)


@pytest.mark.parametrize("name", ["conch", "ctranspath", "genbio-pathfm"])
def test_networks_with_their_own_code_say_so(name: str) -> None:
    with pytest.raises(WeightsError, match="does not execute"):
        load_encoder(name)


def test_unknown_names(no_hub: Path) -> None:
    with pytest.raises(UnknownEncoderError, match=r"closest: h-optimus-[01]"):
        load_encoder("h-optimus-2")
    with pytest.raises(UnknownEncoderError, match=r"closest: vit_tiny_patch16_224, "):
        load_encoder("timm:vit_tinny_patch16_224")
    with pytest.raises(UnknownEncoderError, match="whole number"):
        load_encoder("random:uni@x")
    with pytest.raises(WeightsUnavailableError, match="does not exist"):
        load_encoder(no_hub / "gone.pth")


@pytest.mark.parametrize("name", ["dinov2-vits14", "uni", "hf:owner/name", "owner/name", "timm:vit_tiny_patch16_224"])
def test_no_hub_fails_at_once_in_one_line(name: str, no_hub: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(WeightsUnavailableError, match=r"offline: http://127\.0\.0\.1:9 cannot be reached") as caught:
        load_encoder(name)
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value)
    way_out = f"eosin encoders import FILE --name {name}" if name in ("dinov2-vits14", "uni") else "give its path"
    assert way_out in str(caught.value)


def test_a_silent_hub_fails_within_five_seconds(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(4)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        with pytest.raises(WeightsUnavailableError, match="offline"):
            load_encoder("uni")
        assert time.perf_counter() - start < 5


def test_files_in_the_cache_of_the_hub_need_no_hub(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(no_hub / "hub"))
    snapshot = no_hub / "hub" / "models--own--net" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    reference = no_hub / "hub" / "models--own--net" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("0" * 40)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1}}')
    encoder = load_encoder("own/net", **PLAIN)
    assert encoder.spec.source == "hf:own/net"
    with torch.inference_mode():
        expected = network.eval().forward_features(encoder.prepare(TILES))[:, 0]
    np.testing.assert_allclose(encoder.encode(TILES), expected.numpy(), atol=1e-4)


def test_imported_weights_are_found_shown_and_verified(no_hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    save_file(state, no_hub / "lunit.safetensors")
    row = import_weights("lunit-vits16", no_hub / "lunit.safetensors")
    assert row.have
    assert [r for r in weights_status() if r.have and r.name not in ("texture", "eosin-tiny")] == [row]
    with caplog.at_level(logging.INFO, logger="eosin.encoders"):
        encoder = load_encoder("lunit-vits16", **PLAIN)
    assert "licence Lunit non-commercial licence" in caplog.text
    assert encoder.spec.replace(weights_hash="") == get_spec("lunit-vits16")
    assert row.path is not None
    with row.path.open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\x01\x02\x03\x04")
    with pytest.raises(WeightsError, match="was altered"):
        load_encoder("lunit-vits16")
    row.path.unlink()
    with pytest.raises(WeightsUnavailableError, match="in the index but gone"):
        find_weights("lunit-vits16")


def test_imported_weights_of_the_wrong_network_list_their_keys(no_hub: Path) -> None:
    save_file(tiny().state_dict(), no_hub / "tiny.safetensors")
    import_weights("uni", no_hub / "tiny.safetensors")
    with pytest.raises(WeightsError, match=r"checkpoint of uni does not fit.*308 missing: blocks\.10\..*wrong shape"):
        load_encoder("uni")


def test_weights_of_a_name_of_ones_own(no_hub: Path) -> None:
    save_file(tiny().state_dict(), no_hub / "tiny.safetensors")
    import_weights("my-lab.v1", no_hub / "tiny.safetensors")
    import_weights("my-lab.v1", no_hub / "tiny.safetensors")
    assert load_encoder("my-lab.v1", **PLAIN).spec.dim == 64
    assert [row.name for row in weights_status()][-1] == "my-lab.v1"
    for name, file in (("../up", "tiny.safetensors"), ("x", "tiny.csv")):
        (no_hub / "tiny.csv").touch()
        with pytest.raises(WeightsError):
            import_weights(name, no_hub / file)
    assert not list((no_hub / "weights").glob(".import-*"))


def test_runtime_names_what_ran(small: Encoder) -> None:
    runtime = small.runtime()
    assert (runtime["backend"], runtime["precision"], runtime["device"]) == ("torch", "fp32", "cpu")
    assert runtime["timm"] == timm.__version__
