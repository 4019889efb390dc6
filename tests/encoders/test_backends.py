"""Every backend gives the vectors of plain torch fp32, whatever batch a tile comes in."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from torch import Tensor, nn  # noqa: E402

from eosin.encoders import backends  # noqa: E402
from eosin.encoders.backends import BATCH, build, has_bf16, resolve, runtime_info  # noqa: E402
from eosin.errors import GeometryError, MissingDependencyError  # noqa: E402

DATA = Path(os.environ.get("EOSIN_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
needs_bf16 = pytest.mark.skipif(not has_bf16("cpu"), reason="this CPU does not compute in bf16")


class ClassToken(nn.Module):
    """A timm ViT, images to its class token."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_features(images)[:, 0]  # pyright: ignore[reportCallIssue]


def seeded(arch: str, seed: int = 0, **options: object) -> nn.Module:
    """Return a random ViT whose blocks act: fresh LayerScale (1e-5) would hide a backend's errors behind zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(arch, pretrained=False, num_classes=0, **options).eval()
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if "gamma" in name.rsplit(".", 1)[-1]:
                    weight.fill_(0.5)
                elif weight.ndim > 1 and "blocks" in name:
                    weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
    return ClassToken(network)


def small() -> nn.Module:
    """Return a DINOv2-like ViT of two blocks for 56 px."""
    return seeded("vit_small_patch14_dinov2", img_size=56, embed_dim=64, depth=2, num_heads=2)


def small_rope() -> nn.Module:
    """Return a DINOv3-like ViT (registers, rotary positions) of two blocks for 64 px."""
    return seeded("vit_small_patch16_dinov3", img_size=64, embed_dim=64, depth=2, num_heads=2)


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Return tiles that differ in colour and in grain: uint8 (count, side, side, 3)."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(60, 230, (count, 1, 1, 3))
    coarse = np.repeat(np.repeat(rng.normal(0, 40, (count, side // 8 + 1, side // 8 + 1, 1)), 8, 1), 8, 2)
    return np.clip(colour + coarse[:, :side, :side] + rng.normal(0, 15, (count, side, side, 3)), 0, 255).astype(
        np.uint8
    )


def reference(network: nn.Module, tiles: np.ndarray) -> np.ndarray:
    """Return the vectors in plain torch fp32, normalised by the definition in float64."""
    images = (tiles / 255.0 - np.array(MEAN)) / np.array(STD)
    with torch.inference_mode():
        return network(torch.from_numpy(images.transpose(0, 3, 1, 2)).float()).numpy()


def made(network: nn.Module, side: int, backend: str = "torch", precision: str = "fp32", batch: int | None = None):
    """Return `build` on the CPU with the tests' normalisation."""
    options = {"mean": MEAN, "std": STD, "input_px": side, "batch": batch}
    return build(network, backend=backend, precision=precision, device="cpu", **options)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


COMBINATIONS = [
    pytest.param("torch", "fp32", id="torch-fp32"),
    pytest.param("torch", "bf16", id="torch-bf16"),
    pytest.param("openvino", "fp32", id="openvino-fp32", marks=needs_openvino),
    pytest.param("openvino", "bf16", id="openvino-bf16", marks=[needs_openvino, needs_bf16]),
    pytest.param("compile", "fp32", id="compile-fp32", marks=[needs_compiler, pytest.mark.slow]),
    pytest.param("compile", "bf16", id="compile-bf16", marks=[needs_compiler, pytest.mark.slow]),
]


@pytest.mark.parametrize("network", [small, small_rope])
@pytest.mark.parametrize(("backend", "precision"), COMBINATIONS)
def test_vectors_are_those_of_torch(network: Callable[[], nn.Module], backend: str, precision: str) -> None:
    side = 56 if network is small else 64
    tiles = noise(11, side)
    expected = reference(network(), tiles)
    found = made(network(), side, backend, precision)(tiles)
    assert found.dtype == np.float32
    assert cosines(found, expected).min() >= 0.9999
    spread = expected - expected.mean(axis=0)
    assert cosines(expected, np.roll(expected, 1, axis=0)).max() < 0.99, "the tiles must differ, or nothing is tested"
    assert cosines(found - expected.mean(axis=0), spread).min() >= (0.9999 if precision == "fp32" else 0.99)
    if precision == "fp32":
        np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(("backend", "precision"), COMBINATIONS)
def test_a_row_does_not_depend_on_its_batch(backend: str, precision: str) -> None:
    """Another count, other mates, other places: the same bits."""
    forward = made(small(), 56, backend, precision)
    tiles = noise(19, 56, seed=1)
    whole = forward(tiles)
    np.testing.assert_array_equal(forward(tiles), whole)
    np.testing.assert_array_equal(np.concatenate([forward(tiles[:5]), forward(tiles[5:])]), whole)
    np.testing.assert_array_equal(forward(tiles[3:4]), whole[3:4])
    np.testing.assert_array_equal(forward(tiles[::-1]), whole[::-1])


def test_batch_is_the_callers_choice() -> None:
    tiles = noise(7, 56)
    np.testing.assert_allclose(made(small(), 56, batch=3)(tiles), made(small(), 56)(tiles), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 55, 56, 3), (2, 56, 56, 1), (0, 56, 56, 3)])
def test_wrong_tiles_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(GeometryError, match="56, 56, 3"):
        made(small(), 56)(np.zeros(shape, np.uint8))


def test_floats_are_refused() -> None:
    with pytest.raises(GeometryError, match="uint8"):
        made(small(), 56)(np.zeros((1, 56, 56, 3), np.float32))  # pyright: ignore[reportArgumentType]


def test_auto_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "_cpuinfo", lambda *names: "fpu avx512f amx_bf16")
    monkeypatch.setattr(backends, "_installed", lambda package: True)
    assert resolve("auto", "auto", "auto") == ("openvino", "bf16", "cpu")
    monkeypatch.setattr(backends, "_installed", lambda package: False)
    assert resolve("auto", "auto", "auto") == ("torch", "bf16", "cpu")
    monkeypatch.setattr(backends, "_cpuinfo", lambda *names: "fpu avx2")
    assert resolve("auto", "auto", "cpu") == ("torch", "fp32", "cpu")
    assert resolve("torch", "bf16", "cpu") == ("torch", "bf16", "cpu")


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "bf16"), ((7, 5), "fp32")])
def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve("auto", "auto", "auto") == ("torch", precision, "cuda")
    assert resolve("torch", "fp32", "cuda:1") == ("torch", "fp32", "cuda:1")
    with pytest.raises(GeometryError, match="CPU"):
        resolve("openvino", "auto", "cuda")
    with pytest.raises(MissingDependencyError, match="2 CUDA devices"):
        resolve("auto", "auto", "cuda:2")
    if precision == "fp32":
        with pytest.raises(GeometryError, match="fp32"):
            resolve("torch", "bf16", "cuda")


@pytest.mark.parametrize(
    ("names", "word"),
    [(("onnx", "auto", "cpu"), "openvino"), (("auto", "int8", "cpu"), "bf16"), (("auto", "auto", "tpu"), "cuda:N")],
)
def test_unknown_names_list_the_known(names: tuple[str, str, str], word: str) -> None:
    with pytest.raises(GeometryError, match=word):
        resolve(*names)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(backends, "_installed", lambda package: False)
    monkeypatch.setattr(backends, "_cpuinfo", lambda *names: "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="device='cpu'"):
        resolve("auto", "auto", "cuda")
    with pytest.raises(MissingDependencyError, match=r"eosin\[openvino\]"):
        resolve("openvino", "auto", "cpu")
    with pytest.raises(MissingDependencyError, match="compiler"):
        resolve("compile", "auto", "cpu")
    monkeypatch.setattr(backends, "_installed", lambda package: True)
    with pytest.raises(GeometryError, match="fp32"):
        resolve("openvino", "bf16", "cpu")


@needs_openvino
def test_runtime_info_names_versions() -> None:
    import openvino

    info = runtime_info(backend="openvino", precision="fp32", device="cpu")
    assert info["torch"] == torch.__version__
    assert openvino.__version__.startswith(info["openvino"])
    assert info["batch"] == BATCH["cpu"]
    assert info["threads"] <= torch.get_num_threads()
    assert "openvino" not in runtime_info(backend="torch", precision="fp32", device="cpu")


def real_tiles(side: int) -> np.ndarray:
    """Return eight real tissue tiles cut to `side` pixels."""
    from PIL import Image

    paths = sorted((DATA / "tiles" / "camelyon16").glob("*/*.png"))[::12]
    if not paths:
        pytest.skip("tiles/camelyon16 not found; set EOSIN_DATA to the folder of real data")
    return np.stack([np.asarray(Image.open(path).convert("RGB"))[:side, :side] for path in paths])


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
@pytest.mark.parametrize(("backend", "precision"), COMBINATIONS[:4])
def test_real_size_on_real_tiles(arch: str, backend: str, precision: str) -> None:
    """ViT-S, random weights with acting blocks: all backends keep the direction of a vector and the nearest tile."""
    network = seeded(arch, img_size=224)
    tiles = real_tiles(224)
    expected = reference(network, tiles)
    found = made(network, 224, backend, precision)(tiles)
    centre = expected.mean(axis=0)
    centred = cosines(found - centre, expected - centre)
    print(f"{arch} {backend} {precision}: cosine {cosines(found, expected).min():.6f}, centred {centred.min():.6f}")
    assert cosines(found, expected).min() >= 0.9999
    assert centred.min() >= (0.9999 if precision == "fp32" else 0.99)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_gives_the_vectors_of_the_cpu(precision: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tiles = noise(70, 56)
    expected = reference(small(), tiles)
    options = {"mean": MEAN, "std": STD, "input_px": 56}
    forward = build(small(), backend="torch", precision=precision, device="cuda", **options)
    assert cosines(forward(tiles), expected).min() >= 0.9999
    np.testing.assert_array_equal(forward(tiles[66:]), forward(tiles)[66:])
