"""The encoders eosin knows by name: one dict, no torch.

Facts come from the model cards, the papers and the code that loads the releases; what could
not be confirmed says so in `notes`. A wrong architecture cannot load silently: every key and
shape of a checkpoint is accounted for (`eosin.encoders.convert`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eosin.encoders.spec import EncoderSpec
from eosin.errors import UnknownEncoderError, closest

_APACHE = "Apache-2.0"
_NC_ND = "CC-BY-NC-ND-4.0"
_DINOV3 = "DINOv3 License"
_OWKIN = "Owkin non-commercial licence"

_H_OPTIMUS_MEAN = (0.707223, 0.578729, 0.703617)
_H_OPTIMUS_STD = (0.211883, 0.230117, 0.177517)
_HIBOU_MEAN = (0.7068, 0.5755, 0.722)
_HIBOU_STD = (0.195, 0.2316, 0.1816)
_LUNIT_MEAN = (0.70322989, 0.53606487, 0.66096631)
_LUNIT_STD = (0.21716536, 0.26081574, 0.20723464)
_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}


def _dinov2() -> Iterable[EncoderSpec]:
    """DINOv2 (arXiv 2304.07193) without and with registers (arXiv 2309.16588)."""
    sizes = {"s": ("small", 384, 22.06), "b": ("base", 768, 86.58), "l": ("large", 1024, 304.37)}
    sizes["g"] = ("giant", 1536, 1136.48)
    for letter, (size, width, params_m) in sizes.items():
        for suffix, middle, registers in (("", "", 0), ("-reg", "_reg4", 4)):
            arch = f"vit_{size}_patch14{middle}_dinov2"
            yield EncoderSpec(
                name=f"dinov2-vit{letter}14{suffix}",
                dim=width,
                patch_px=14,
                registers=registers,
                params_m=params_m,
                licence=_APACHE,
                source=f"timm:{arch}.lvd142m",
                arch=arch,
                native_px=518,
                interpolation="bicubic-antialias" if registers else "bicubic-offset0.1",
            )


def _dinov3() -> Iterable[EncoderSpec]:
    """DINOv3 (arXiv 2508.10104): rotary positions, four registers, natural or satellite images."""
    for tag, arch, width, params_m in (
        ("vits16", "vit_small_patch16_dinov3", 384, 21.59),
        ("vits16plus", "vit_small_plus_patch16_dinov3", 384, 28.68),
        ("vitb16", "vit_base_patch16_dinov3", 768, 85.64),
        ("vitl16", "vit_large_patch16_dinov3", 1024, 303.08),
        ("vithplus16", "vit_huge_plus_patch16_dinov3", 1280, 840.51),
        ("vit7b16", "vit_7b_patch16_dinov3", 4096, 6716.03),
    ):
        common: dict[str, Any] = {
            "dim": width,
            "patch_px": 16,
            "registers": 4,
            "params_m": params_m,
            "licence": _DINOV3,
            "arch": arch,
            "native_px": 256,
            "interpolation": "rope",
        }
        note = "Meta's own hub repository is gated; the source used here is timm's copy."
        yield EncoderSpec(name=f"dinov3-{tag}", source=f"timm:{arch}.lvd1689m", notes=(note,), **common)
        if tag in ("vitl16", "vit7b16"):
            satellite = (note, "Trained on satellite images (SAT-493M).")
            # mean and std of the satellite release, as timm and the release's README give them
            common |= {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}
            yield EncoderSpec(name=f"dinov3-{tag}-sat", source=f"timm:{arch}.sat493m", notes=satellite, **common)


def _pathology_timm() -> Iterable[EncoderSpec]:
    """Releases that are timm networks."""
    uni = {"init_values": 1e-5}
    yield EncoderSpec(
        name="uni", dim=1024, patch_px=16, mpp=(0.5,), params_m=303.35, licence=_NC_ND, gated=True,
        source="hf:MahmoodLab/UNI", arch="vit_large_patch16_224", arch_args=uni, interpolation="bicubic-antialias",
    )  # fmt: skip
    yield EncoderSpec(
        name="uni2-h", dim=1536, patch_px=14, registers=8, mpp=(0.5,), params_m=681.39, licence=_NC_ND, gated=True,
        source="hf:MahmoodLab/UNI2-h", arch="vit_giant_patch14_reg4_dinov2",
        arch_args={"depth": 24, "num_heads": 24, "reg_tokens": 8}, interpolation="bicubic-antialias",
    )  # fmt: skip
    virchow = {"init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU}
    yield EncoderSpec(
        name="virchow", dim=2560, patch_px=14, mpp=(0.5,), pooling="cls+mean", params_m=631.23, licence=_APACHE,
        gated=True, source="hf:paige-ai/Virchow", arch="vit_huge_patch14_224", arch_args=virchow,
        interpolation="bicubic-antialias",
    )  # fmt: skip
    yield EncoderSpec(
        name="virchow2", dim=2560, patch_px=14, registers=4, mpp=(0.25, 0.5, 1.0, 2.0), pooling="cls+mean",
        params_m=631.24, licence=_NC_ND, gated=True, source="hf:paige-ai/Virchow2", arch="vit_huge_patch14_224",
        arch_args={**virchow, "reg_tokens": 4}, interpolation="bicubic-antialias",
    )  # fmt: skip
    yield EncoderSpec(
        name="prov-gigapath", dim=1536, patch_px=16, mpp=(0.5,), params_m=1134.95, licence=_APACHE, gated=True,
        source="hf:prov-gigapath/prov-gigapath", arch="vit_giant_patch14_dinov2", arch_args={"patch_size": 16},
        interpolation="bicubic-antialias",
        notes=(
            "The release reads 256 px tiles at 0.5 microns per pixel and crops the central 224 px; "
            "224 px tiles at 0.5 are that crop.",
            "unconfirmed: the licence field of the card; its text limits use to research.",
        ),
    )  # fmt: skip
    for name, source, licence in (
        ("h-optimus-0", "hf:bioptimus/H-optimus-0", _APACHE),
        ("h-optimus-1", "hf:bioptimus/H-optimus-1", _NC_ND),
    ):
        yield EncoderSpec(
            name=name, dim=1536, patch_px=14, registers=4, mpp=(0.5,), params_m=1134.77, licence=licence,
            gated=True, mean=_H_OPTIMUS_MEAN, std=_H_OPTIMUS_STD, source=source,
            arch="vit_giant_patch14_reg4_dinov2", interpolation="bicubic-antialias",
        )  # fmt: skip
    yield EncoderSpec(
        name="h0-mini", dim=768, patch_px=14, registers=4, mpp=(0.5,), params_m=85.74, licence=_NC_ND, gated=True,
        mean=_H_OPTIMUS_MEAN, std=_H_OPTIMUS_STD, source="hf:bioptimus/H0-mini", arch="vit_base_patch14_reg4_dinov2",
        arch_args={"mlp_ratio": 5.33334, **_SWIGLU}, interpolation="bicubic-antialias",
        notes=(
            "unconfirmed: mlp_ratio 5.33334; a wrong value cannot load, its shapes would not fit.",
            "The card also shows cls+mean (1536); ask for it with pooling='cls+mean'.",
        ),
    )  # fmt: skip
    for patch_px in (16, 8):
        yield EncoderSpec(
            name=f"lunit-vits{patch_px}", dim=384, patch_px=patch_px, mpp=(0.25, 0.5), params_m=21.67,
            licence="Lunit non-commercial licence", mean=_LUNIT_MEAN, std=_LUNIT_STD,
            source=f"hf:1aurent/vit_small_patch{patch_px}_224.lunit_dino", arch=f"vit_small_patch{patch_px}_224",
            interpolation="bicubic-antialias",
            notes=("unconfirmed: the hub repository is a third party's conversion of Lunit's release.",),
        )  # fmt: skip


def _pathology_other() -> Iterable[EncoderSpec]:
    """Releases in the transformers or facebookresearch layout; timm's equal network is built."""
    yield EncoderSpec(
        name="phikon", dim=768, patch_px=16, mpp=(0.5,), params_m=85.80, licence=_OWKIN, source="hf:owkin/phikon",
        arch="vit_base_patch16_224", arch_args={"norm_eps": 1e-12},
        notes=("unconfirmed: LayerNorm eps 1e-12, the default of the ViT class the release uses.",),
    )  # fmt: skip
    yield EncoderSpec(
        name="phikon-v2", dim=1024, patch_px=16, mpp=(0.5,), params_m=303.35, licence=_OWKIN,
        source="hf:owkin/phikon-v2", arch="vit_large_patch14_dinov2", arch_args={"patch_size": 16},
    )  # fmt: skip
    for letter, size, width, params_m, registers_note in (
        ("b", "base", 768, 85.73, "Hibou-B"),
        ("l", "large", 1024, 303.23, "Hibou-L"),
    ):
        yield EncoderSpec(
            name=f"hibou-{letter}", dim=width, patch_px=14, registers=4, mpp=(0.5,), params_m=params_m,
            licence=_APACHE, gated=True, mean=_HIBOU_MEAN, std=_HIBOU_STD,
            source=f"hf:histai/hibou-{'L' if letter == 'l' else 'b'}", arch=f"vit_{size}_patch14_reg4_dinov2",
            interpolation="bicubic-antialias",
            notes=(
                f"{registers_note} ships its own model code, which is not executed here: its weights are read "
                "as DINOv2 with registers.",
                "unconfirmed: gated; exact network (a misfit in keys or shapes raises).",
            ),
        )  # fmt: skip
    yield EncoderSpec(
        name="midnight-12k", dim=3072, patch_px=14, mpp=(0.25, 0.5, 1.0, 2.0), pooling="cls+mean", params_m=1136.48,
        licence="MIT", mean=_HALF, std=_HALF, source="hf:kaiko-ai/midnight", arch="vit_giant_patch14_dinov2",
        native_px=518, interpolation="bicubic", notes=("unconfirmed: gated (sources disagree).",),
    )  # fmt: skip
    yield EncoderSpec(
        name="openmidnight", dim=1536, patch_px=14, registers=4, params_m=1134.77, licence="unknown",
        source="hf:SophontAI/OpenMidnight", file="teacher_checkpoint_load.pt", arch="vit_giant_patch14_reg4_dinov2",
        interpolation="bicubic-antialias",
        notes=(
            "unconfirmed: licence; gated (sources disagree).",
            "Trained on tiles of every pyramid level, without a target resolution.",
        ),
    )  # fmt: skip
    yield EncoderSpec(
        name="plip", dim=512, patch_px=32, params_m=87.85, licence="unknown", mean=_CLIP_MEAN, std=_CLIP_STD,
        source="hf:vinid/plip", arch="vit_base_patch32_clip_quickgelu_224",
        arch_args={"num_classes": 512},
        notes=(
            "unconfirmed: the card states no licence.",
            "Tokens are projected into the joint image-text space; only cls is trained for it.",
        ),
    )  # fmt: skip


def _not_loadable() -> Iterable[EncoderSpec]:
    """Releases whose network is in neither timm nor transformers."""
    own_code = "its network is the release's own code, which eosin does not execute; "
    yield EncoderSpec(
        name="conch", dim=512, patch_px=16, input_px=448, native_px=448, params_m=90.4, licence=_NC_ND, gated=True,
        mean=_CLIP_MEAN, std=_CLIP_STD, source="hf:MahmoodLab/conch",
        needs=own_code + "install the CONCH package and extract features with it, then `eosin convert` them",
        notes=("unconfirmed: params_m, mean and std; trained resolution is not one value (image-caption pairs).",),
    )  # fmt: skip
    yield EncoderSpec(
        name="ctranspath", dim=768, patch_px=32, params_m=27.5, licence="GPL-3.0", source="hf:MahmoodLab/hest-bench",
        needs=own_code + "it needs a patched timm 0.5.4 (Swin-T with a convolutional stem)",
        notes=(
            "unconfirmed: params_m, trained resolution.",
            "A Swin network: patch_px is the total stride of its last feature map.",
        ),
    )  # fmt: skip
    yield EncoderSpec(
        name="genbio-pathfm", dim=4608, patch_px=16, params_m=1100, licence="GenBio AI Community License",
        mean=(0.697, 0.575, 0.728), std=(0.188, 0.240, 0.187), source="hf:genbio-ai/genbio-pathfm",
        needs=own_code + "it encodes each colour channel alone (3 x 1536) and needs trust_remote_code",
        notes=("unconfirmed: patch_px, gated, trained resolution (the card states none).",),
    )  # fmt: skip


def _own() -> Iterable[EncoderSpec]:
    """What comes with eosin; docs/eosin-tiny.md is its card."""
    size = {"patch_size": 16, "embed_dim": 256, "depth": 6, "num_heads": 4, "mlp_ratio": 4.0}
    yield EncoderSpec(
        name=TINY, dim=256, patch_px=16, registers=4, mpp=(0.25, 0.5, 1.0, 2.0), params_m=4.99, licence=_APACHE,
        source=f"builtin:{TINY}", arch="vit_small_patch14_dinov2", interpolation="bicubic-antialias",
        arch_args={**size, "reg_tokens": 4, "no_embed_class": True},
        notes=("For demos, tests and teaching: trained on two CPU cores, on 4 slides and 1,721 crops of mitoses.",),
    )  # fmt: skip


TINY = "eosin-tiny"
TEXTURE = "texture"
_TEXTURE_SPEC = EncoderSpec(
    name=TEXTURE, dim=153, patch_px=0, input_px=0, native_px=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    pooling="none", licence=_APACHE, source="builtin:texture", interpolation="none",
    notes=("A floor to beat: statistics of colour and texture, no training; any tile of at least 32 px.",),
)  # fmt: skip

_GROUPS = (_own, _dinov2, _dinov3, _pathology_timm, _pathology_other, _not_loadable)
REGISTRY: dict[str, EncoderSpec] = {spec.name: spec for group in _GROUPS for spec in group()}
REGISTRY[TEXTURE] = _TEXTURE_SPEC


def get_spec(name: str) -> EncoderSpec:
    """Return the spec of a registered encoder, or raise `UnknownEncoderError` with the closest three."""
    if name not in REGISTRY:
        raise UnknownEncoderError(
            f"no encoder is called {name!r}; closest: {closest(name, REGISTRY)}. "
            "Any timm network is timm:NAME, any Hugging Face one hf:OWNER/NAME, a file its path"
        )
    return REGISTRY[name]
