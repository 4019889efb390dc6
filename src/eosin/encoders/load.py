"""Load an encoder by name, from the hub or from a file: completely or not at all."""

from __future__ import annotations

import hashlib
import logging

import timm
import torch
from torch import nn

from eosin.encoders.encoder import Encoder
from eosin.encoders.network import Backbone, build_network, position_px
from eosin.encoders.registry import REGISTRY, TEXTURE, get_spec
from eosin.encoders.spec import EncoderSpec, Pooling
from eosin.encoders.texture import TextureEncoder
from eosin.errors import UnknownEncoderError, WeightsError, closest

log = logging.getLogger("eosin.encoders")


def load_encoder(
    name_or_path: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    backend: str = "auto",
    pooling: Pooling | None = None,
) -> Encoder | TextureEncoder:
    """Return an encoder that is ready to use."""
    if name_or_path == TEXTURE:
        return TextureEncoder()
    if not name_or_path.startswith("random:"):
        raise WeightsError("only random: for now")
    spec, network = _random(name_or_path.removeprefix("random:"))
    if pooling is not None:
        spec = spec.with_pooling(pooling)
    spec = spec.replace(weights_hash=hash_weights(network))
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = ("bf16" if chosen.startswith("cuda") else "fp32") if precision == "auto" else precision
    return Encoder(Backbone(network, spec), device=chosen, precision=kind, backend="torch")


def hash_weights(network: nn.Module) -> str:
    """Return sha256 over the sorted names, dtypes, shapes and bytes of every tensor of `network`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{flat.dtype}|{tuple(flat.shape)}|".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def timm_spec(name: str) -> EncoderSpec:
    """Return a spec for any timm network, read from timm's own configuration of it.

    Raises:
        UnknownEncoderError: timm has no such network.
    """
    arch = name.split(".")[0]
    if not timm.is_model(arch):
        raise UnknownEncoderError(f"timm has no network {name!r}; closest: {closest(arch, timm.list_models())}")
    known = [spec for spec in REGISTRY.values() if spec.source == f"timm:{name}"]
    if known:
        return known[0]
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    with torch.device("meta"):
        network = build_network(arch, {})
    embed = getattr(network, "patch_embed", None)
    patch_px = embed.patch_size[0] if embed is not None and hasattr(embed, "patch_size") else 0
    patch_px = patch_px or int(network.feature_info[-1]["reduction"])  # type: ignore[index]
    side = config.input_size[-1] if config else 224
    return EncoderSpec(
        name=f"timm:{name}",
        dim=int(network.num_features),  # type: ignore[arg-type]
        patch_px=patch_px,
        input_px=side,
        native_px=side,
        mean=config.mean,
        std=config.std,
        pooling="cls" if getattr(network, "cls_token", None) is not None else "mean",
        registers=max(0, int(getattr(network, "num_prefix_tokens", 0)) - 1),
        params_m=round(sum(p.numel() for p in network.parameters()) / 1e6, 2),
        licence=config.license or "unknown",
        source=f"timm:{name}",
        arch=arch,
        interpolation="bicubic-antialias" if getattr(network, "pos_embed", None) is not None else "none",
    )


def _random(rest: str) -> tuple[EncoderSpec, nn.Module]:
    """Return the spec and a seeded network of "NAME[@SEED]"."""
    name, _, seed = rest.partition("@")
    spec = get_spec(name) if name in REGISTRY else timm_spec(name.removeprefix("timm:"))
    if not spec.arch:
        raise WeightsError(f"{name} cannot be built: {spec.needs}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        network = build_network(spec.arch, spec.arch_args, img_size=position_px(spec))
    return spec.replace(name=f"random:{name}@{seed or 0}", source=f"random:{seed or 0}", licence="none"), network

