"""The registry: complete, torch-free, and in agreement with timm."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eosin.encoders.registry import REGISTRY, get_spec
from eosin.encoders.spec import EncoderSpec
from eosin.errors import GeometryError, UnknownEncoderError

REQUIRED = {
    *(f"dinov2-vit{s}14{r}" for s in "sblg" for r in ("", "-reg")),
    *("dinov3-vits16", "dinov3-vits16plus", "dinov3-vitb16", "dinov3-vitl16", "dinov3-vithplus16", "dinov3-vit7b16"),
    *("uni", "uni2-h", "conch", "virchow", "virchow2", "prov-gigapath", "h-optimus-0", "h-optimus-1", "h0-mini"),
    *("phikon", "phikon-v2", "hibou-b", "hibou-l", "midnight-12k", "openmidnight", "genbio-pathfm", "lunit-vits16"),
    *("lunit-vits8", "ctranspath", "plip", "texture"),
}
BUILDABLE = sorted(name for name, spec in REGISTRY.items() if spec.arch)


def test_every_promised_encoder_is_there_under_its_own_name() -> None:
    assert set(REGISTRY) >= REQUIRED
    assert all(name == spec.name for name, spec in REGISTRY.items())


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_spec_is_complete(name: str) -> None:
    spec = REGISTRY[name]
    assert spec.dim > 0
    assert spec.source.split(":")[0] in ("timm", "hf", "builtin")
    assert bool(spec.arch) != bool(spec.needs) or spec.source.startswith("builtin:")
    assert spec.licence != "unknown" or any("licence" in note for note in spec.notes)
    assert all(0 < value < 1 for value in (*spec.mean, *spec.std)) or name == "texture"
    assert spec.to_dict()["mean"] == list(spec.mean)


def test_registry_loads_no_torch() -> None:
    code = (
        "import sys, eosin.encoders.registry, eosin.encoders; "
        "print(sorted({'torch', 'timm', 'transformers', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_name_lists_the_closest_three() -> None:
    with pytest.raises(UnknownEncoderError, match=r"closest: virchow, virchow2, [\w-]+\."):
        get_spec("virchow3")


def test_width_follows_pooling() -> None:
    virchow = get_spec("virchow2")
    assert (virchow.dim, virchow.width) == (2560, 1280)
    assert virchow.with_pooling("cls").dim == 1280
    assert virchow.with_pooling("cls").with_pooling("cls+mean") == virchow


def test_a_side_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(GeometryError, match="multiple of its 14 px patch; use tiles of 210 or 224 px"):
        EncoderSpec(name="x", dim=8, patch_px=14, input_px=223, source="file:x")


@pytest.mark.parametrize("name", BUILDABLE)
def test_spec_agrees_with_the_network(name: str) -> None:
    torch = pytest.importorskip("torch")
    from eosin.encoders.network import build_network, position_px

    spec = REGISTRY[name]
    with torch.device("meta"):
        network = build_network(spec.arch, spec.arch_args, img_size=position_px(spec))
    head = network.head.out_features if isinstance(network.head, torch.nn.Linear) else network.num_features
    assert head == spec.width
    assert network.patch_embed.patch_size == (spec.patch_px, spec.patch_px)
    assert network.num_prefix_tokens == 1 + spec.registers
    assert spec.input_px % spec.patch_px == 0
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx(spec.params_m, abs=0.01)
    assert not hasattr(network, "fc_norm") or isinstance(network.fc_norm, torch.nn.Identity)


@pytest.mark.parametrize("name", [n for n in BUILDABLE if REGISTRY[n].source.startswith("timm:")])
def test_spec_agrees_with_timm_configuration(name: str) -> None:
    timm = pytest.importorskip("timm")
    spec = REGISTRY[name]
    config = timm.get_pretrained_cfg(spec.source.removeprefix("timm:"))
    assert (config.mean, config.std) == (spec.mean, spec.std)
    assert config.input_size == (3, spec.native_px, spec.native_px)
    assert config.license.replace("-", " ").split()[0] == spec.licence.lower().replace("-", " ").split()[0]
