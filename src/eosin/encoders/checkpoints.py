"""Networks by name, from the hub or from a file, loaded completely or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from eosin.encoders import backends
from eosin.encoders.convert import Converted, fill, infer, position_side, to_timm
from eosin.encoders.encoder import Encoder
from eosin.encoders.files import folder_getter, read_json, read_model, read_tensors
from eosin.encoders.hub import fetch
from eosin.encoders.network import Backbone, build_network, position_px
from eosin.encoders.registry import REGISTRY, get_spec
from eosin.encoders.spec import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec, Interpolation, Pooling
from eosin.encoders.weights import SUFFIXES, find_weights
from eosin.errors import UnknownEncoderError, WeightsError, WeightsUnavailableError, closest

log = logging.getLogger("eosin.encoders")

HF_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "clip", "clip_vision_model")
"""`model_type` of the Hugging Face configurations that are understood."""

BUILTIN = Path(__file__).parent
"""Where the weights lie that come with eosin."""

FACTS = "eosin_encoder"
"""Key of a safetensors file's metadata under which `eosin pretrain` says, as JSON, what tensors cannot tell."""

_INTERPOLATION: dict[str, Interpolation] = {"dinov2": "bicubic-offset0.1", "timm": "bicubic-antialias"}

Loaded = tuple[EncoderSpec, nn.Module]


def load_network(name: str, *, device: str, precision: str, backend: str, pooling: Pooling | None) -> Encoder:
    """Return the network of this name, ready to use; arguments and errors as in `load_encoder`."""
    how, kind, where = backends.resolve(backend, precision, device)
    spec, network = _load(name)
    spec = spec.replace(weights_hash=hash_weights(network))
    if pooling is not None:
        spec = spec.with_pooling(pooling)
    return Encoder(Backbone(network, spec), device=where, precision=kind, backend=how)


def _load(name: str) -> Loaded:
    """Find out what `name` is and load it."""
    if name.startswith("random:"):
        return _random(name.removeprefix("random:"))
    if name in REGISTRY:
        return _registered(get_spec(name))
    if name.startswith("timm:"):
        return _registered(timm_spec(name.removeprefix("timm:")))
    if name.startswith("hf:"):
        return _from_hub(name.removeprefix("hf:"))
    path = Path(name)
    if path.is_dir():
        return _configured(folder_getter(path), name=path.resolve().name, source=f"file:{path.name}")
    if path.is_file():
        return _from_file(path)
    if path.suffix in SUFFIXES:
        raise WeightsUnavailableError(f"{path} does not exist")
    imported = find_weights(name)
    if imported is not None:
        return _told(imported, name=name)
    if name.count("/") == 1:
        return _from_hub(name)
    if timm.is_model(name.split(".")[0]):
        return _registered(timm_spec(name))
    return _registered(get_spec(name))


def hash_weights(network: nn.Module) -> str:
    """Return sha256 over the sorted names, dtypes, shapes and bytes of every tensor, in timm's names.

    The same weights give the same hash, whichever layout or file they came from.
    """
    return hash_tensors(network.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return sha256 over the sorted names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{flat.dtype}|{tuple(flat.shape)}|".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _random(rest: str) -> Loaded:
    """Return the spec and a seeded network of "NAME[@SEED]"."""
    name, _, seed = rest.partition("@")
    spec = get_spec(name) if name in REGISTRY else timm_spec(name.removeprefix("timm:"))
    _check_loadable(spec)
    if seed and not seed.isdecimal():
        raise UnknownEncoderError(f"random:{rest}: the seed after @ is a whole number, not {seed!r}")
    number = int(seed or 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        network = build_network(spec.arch, spec.arch_args, img_size=position_px(spec))
        _enliven(network)
    return spec.replace(name=f"random:{name}@{number}", source=f"random:{number}", licence="none", gated=False), network


def _enliven(network: nn.Module) -> None:
    """Let random blocks and tokens do something: layer scale 1 instead of 1e-5, tokens of deviation 0.02.

    With the initial values of training every block is nearly the identity and cls says nothing of the image.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("gamma", "gamma_1", "gamma_2"):
                parameter.fill_(1.0)
            elif leaf in ("cls_token", "reg_token", "pos_embed"):
                parameter.normal_(std=0.02)


def _check_loadable(spec: EncoderSpec) -> None:
    if not spec.arch:
        raise WeightsError(f"{spec.name} cannot be loaded: {spec.needs or 'it has no network'}")


def _registered(spec: EncoderSpec) -> Loaded:
    """Load the network of a spec: imported weights first, then those that come with eosin, then the hub."""
    _check_loadable(spec)
    log.info("%s: weights %s, licence %s%s", spec.name, spec.source, spec.licence, ", gated" if spec.gated else "")
    imported = find_weights(spec.name)
    kind, _, repo = spec.source.partition(":")
    if imported is not None:
        checkpoint = read_tensors(imported)
    elif kind == "builtin":
        checkpoint = read_tensors(BUILTIN / f"{repo}.safetensors")
    else:
        repo = f"timm/{repo}" if kind == "timm" else repo
        checkpoint = read_model(partial(_get, repo, spec.name), name=spec.name, file=spec.file)
    return _fit(spec, to_timm(checkpoint))


def _get(repo: str, name: str, filename: str) -> Path:
    return fetch(repo, filename, name=name)


def _fit(spec: EncoderSpec, converted: Converted) -> Loaded:
    """Build the network of `spec` at the size of the checkpoint's position embedding and fill it."""
    args = dict(spec.arch_args)
    if "blocks.0.attn.q_bias" in converted.state:
        args["qkv_bias"] = True
    with torch.device("meta"):
        prefix = _prefix(build_network(spec.arch, args))
    side = position_side(converted, prefix=prefix)
    spec = spec.replace(arch_args=args, native_px=side or spec.native_px)
    network = _empty(spec)
    fill(network, converted, what=f"the checkpoint of {spec.name}")
    ignored = len(converted.ignored)
    log.info(
        "%s: %d tensors, %s layout, %d keys ignored by rule", spec.name, len(converted.state), converted.layout, ignored
    )
    return spec, network


def _prefix(network: nn.Module) -> int:
    """Return how many leading entries of the position embedding belong to cls and registers."""
    return 0 if getattr(network, "no_embed_class", False) else int(cast(int, getattr(network, "num_prefix_tokens", 0)))


def _empty(spec: EncoderSpec) -> nn.Module:
    """Build a network to be filled; without memory for its initial values where it has no computed buffers."""
    if spec.interpolation == "rope":
        return build_network(spec.arch, spec.arch_args)
    with torch.device("meta"):
        network = build_network(spec.arch, spec.arch_args, img_size=position_px(spec))
    if any(True for _ in network.buffers()):
        return build_network(spec.arch, spec.arch_args, img_size=position_px(spec))
    return network


def _from_file(path: Path) -> Loaded:
    if (path.parent / "config.json").is_file() and path.name in ("model.safetensors", "pytorch_model.bin"):
        return _load(str(path.parent))
    return _told(path, name=path.stem)


def _told(path: Path, *, name: str) -> Loaded:
    """Load a file of weights: the network by its shapes, the rest as its metadata says where it says it."""
    spec, network = _inferred(read_tensors(path), name=name, source=f"file:{path.name}")
    facts = read_facts(path)
    for key, found in (("dim", spec.dim), ("patch_px", spec.patch_px), ("registers", spec.registers)):
        if facts.get(key, found) != found:
            raise WeightsError(f"{path.name} says {key} {facts[key]}, its tensors have {found}; it has been altered")
    known = ("mean", "std", "mpp", "input_px", "pooling")
    return spec.replace(**{key: facts[key] for key in known if key in facts}), network


def read_facts(path: Path) -> dict[str, Any]:
    """Return what a file written by `eosin pretrain` says of its encoder, lists as tuples; {} for any other file.

    Raises:
        WeightsError: the metadata cannot be read, or has a mean or deviation that no image can have.
    """
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(FACTS)
    if text is None:
        return {}
    try:
        told = json.loads(text)
        facts = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
        fine = len(facts["mean"]) == len(facts["std"]) == 3 and min(facts["std"]) > 0
        fine = fine and all(math.isfinite(value) for value in (*facts["mean"], *facts["std"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path.name}: the metadata {FACTS!r} cannot be read ({error!r}); export it anew") from error
    if not fine:
        raise WeightsError(f"{path.name}: mean {facts['mean']} and std {facts['std']} are of no image; export it anew")
    return facts


def _from_hub(repo: str) -> Loaded:
    known = [spec for spec in REGISTRY.values() if spec.source == f"hf:{repo}"]
    if known:
        return _registered(known[0])
    log.info("hf:%s: licence not known to eosin; read its card at https://huggingface.co/%s", repo, repo)
    return _configured(partial(_get, repo, f"hf:{repo}"), name=f"hf:{repo}", source=f"hf:{repo}")


def _configured(get: Callable[[str], Path], *, name: str, source: str) -> Loaded:
    """Load a folder or repository with a config.json, timm's or transformers'."""
    config = read_json(get("config.json"))
    if "architecture" in config:
        arch, args = str(config["architecture"]), dict(config.get("model_args") or {})
        given = {**config, **(config.get("pretrained_cfg") or {})}
        side = (given.get("input_size") or (3, 224, 224))[-1]
        with torch.device("meta"):
            network = build_network(arch, args, img_size=args.pop("img_size", None))
        mean, std = given.get("mean", IMAGENET_MEAN), given.get("std", IMAGENET_STD)
        spec = _describe(network, name=name, source=source, arch=arch, args=args, side=side, mean=mean, std=std)
        checkpoint = read_model(get, name=name)
        if network.state_dict().keys() <= checkpoint.keys():  # timm's own names, whatever the architecture
            return _fit(spec, Converted(layout="timm", state=dict(checkpoint)))
        return _fit(spec, to_timm(checkpoint))
    kind = config.get("model_type")
    if kind not in HF_TYPES:
        raise WeightsError(
            f"{name}: model_type {kind!r} is not one of {', '.join(HF_TYPES)}; "
            "code shipped with a model is not executed (trust_remote_code). Supply converted weights instead"
        )
    return _inferred(read_model(get, name=name), name=name, source=source, config=config.get("vision_config") or config)


def _inferred(
    checkpoint: Mapping[str, Any], *, name: str, source: str, config: Mapping[str, Any] | None = None
) -> Loaded:
    """Load a checkpoint whose network is told by its shapes, and by a transformers configuration where there is one."""
    converted = to_timm(checkpoint)
    settings = config or {}
    if "num_attention_heads" in settings:
        converted = Converted(
            layout=converted.layout,
            state=converted.state,
            ignored=converted.ignored,
            head_dim=settings["hidden_size"] // settings["num_attention_heads"],
        )
    arch, args = infer(converted)
    _apply(settings, args, name)
    with torch.device("meta"):
        network = build_network(arch, args)
    side = position_side(converted, prefix=_prefix(network)) or 256
    spec = _describe(network, name=name, source=source, arch=arch, args=args, side=side)
    registers = spec.registers > 0
    how = "rope" if spec.interpolation == "rope" else _INTERPOLATION.get(converted.layout, "bicubic")
    how = "bicubic-antialias" if registers and how != "rope" else how
    usual = 224 if side > 224 and 224 % spec.patch_px == 0 else spec.input_px
    return _fit(spec.replace(interpolation=how, native_px=side, input_px=usual), converted)


def _apply(settings: Mapping[str, Any], args: dict[str, Any], name: str) -> None:
    """Put what shapes cannot tell, from a transformers configuration, into timm's arguments."""
    if "layer_norm_eps" in settings:
        args["norm_eps"] = settings["layer_norm_eps"]
    act = settings.get("hidden_act", "gelu")
    if act not in ("gelu", "silu", "quick_gelu"):
        raise WeightsError(f"{name}: activation {act!r} is not supported")
    if act == "quick_gelu":
        args["act_layer"] = act
    elif args.get("pre_norm"):
        args["act_layer"] = "gelu"
    theta = settings.get("rope_theta", 100.0)
    if not math.isclose(theta, 100.0):
        raise WeightsError(f"{name}: rotary base {theta} is not DINOv3's 100")


def _describe(
    network: nn.Module,
    *,
    name: str,
    source: str,
    arch: str,
    args: Mapping[str, Any],
    side: int,
    mean: Any = IMAGENET_MEAN,
    std: Any = IMAGENET_STD,
    licence: str = "unknown",
) -> EncoderSpec:
    """Return the spec of a network that is in no registry."""
    anything = cast(Any, network)
    embed = getattr(network, "patch_embed", None)
    stride = getattr(embed, "patch_size", (0,))[0]
    has_prefix = hasattr(network, "num_prefix_tokens")
    patch_px = int(stride) if has_prefix and stride else int(anything.feature_info[-1]["reduction"])
    interpolation: Interpolation = "rope" if getattr(network, "rope", None) is not None else "none"
    if has_prefix and getattr(network, "pos_embed", None) is not None:
        interpolation = "bicubic-antialias"
    head = getattr(network, "head", None)
    return EncoderSpec(
        name=name,
        dim=head.out_features if isinstance(head, nn.Linear) else int(anything.num_features),
        patch_px=patch_px,
        input_px=224 if 224 % patch_px == 0 and interpolation == "rope" else side,
        native_px=side,
        mean=cast(tuple[float, float, float], tuple(mean)),
        std=cast(tuple[float, float, float], tuple(std)),
        pooling="cls" if getattr(network, "cls_token", None) is not None else "mean",
        registers=max(0, int(getattr(network, "num_prefix_tokens", 0)) - 1),
        params_m=round(sum(p.numel() for p in network.parameters()) / 1e6, 2),
        licence=licence,
        source=source,
        arch=arch,
        arch_args=dict(args),
        interpolation=interpolation,
    )


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
    with torch.device("meta"):
        network = build_network(arch, {})
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        return _describe(network, name=f"timm:{name}", source=f"timm:{name}", arch=arch, args={}, side=224)
    return _describe(
        network,
        name=f"timm:{name}",
        source=f"timm:{name}",
        arch=arch,
        args={},
        side=config.input_size[-1],
        mean=config.mean,
        std=config.std,
        licence=config.license or "unknown",
    )
