"""A frozen teacher of another network, from which a smaller student is distilled."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from eosin.encoders import REGISTRY, load_encoder
from eosin.encoders.convert import unwrap
from eosin.encoders.encoder import Encoder
from eosin.encoders.files import read_tensors
from eosin.encoders.network import Backbone, build_network, position_px
from eosin.encoders.ranks import all_reduce_
from eosin.encoders.spec import EncoderSpec
from eosin.errors import ConfigError, GeometryError, WeightsError
from eosin.pretrain.checkpoint import latest_checkpoint, read_part
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.heads import ProjectionHead
from eosin.pretrain.losses import resize_patches

HEADS = {"dino": "dino_head.", "ibot": "ibot_head."}
"""Names of trained heads in a teacher's checkpoint, as DINOv2 and DINOv3 have them."""


class Standardiser(nn.Module):
    """(x - mean) / deviation of each dimension, over all rows of all ranks so far, those of the call included.

    What tells images apart is a small share of a token, and it is that which is to be learned. Moments are merged as
    in Chan, Golub & LeVeque (1979, equation 2.1), in float64; they are state, and come back with a resume.

    Args:
        dim: D.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros(dim, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return float32 (rows, D) for x (rows, D); the moments move."""
        rows = x.double()
        sums = all_reduce_(torch.cat([rows.sum(dim=0), rows.new_tensor([len(rows)])]))
        new = sums[-1].clamp(min=1)
        mean = sums[:-1] / new
        variance = all_reduce_((rows - mean).square().sum(dim=0)) / new
        share = sums[-1] / (self.count + sums[-1]).clamp(min=1)
        step = (mean - self.mean) * share
        self.variance.lerp_(variance, share).add_((mean - self.mean) * (1 - share) * step)
        self.mean.add_(step)
        self.count.add_(sums[-1])
        return ((rows - self.mean) / (self.variance + 1e-12).sqrt().clamp(min=1e-6)).float()


def feature_loss(predicted: Tensor, target: Tensor, *, distance: str) -> Tensor:
    """Return the mean distance of predicted to standardised features, in float32.

    Args:
        predicted: (rows, D).
        target: (rows, D).
        distance: "cosine", 1 minus the cosine of each row; "smooth_l1", of each number, quadratic below 1.

    Raises:
        ValueError: shapes that differ.
    """
    if predicted.shape != target.shape or predicted.ndim != 2:
        raise ValueError(f"predicted {tuple(predicted.shape)} and target {tuple(target.shape)} must be (rows, D) alike")
    with torch.autocast(predicted.device.type, enabled=False):
        if distance == "cosine":
            return (1 - functional.cosine_similarity(predicted.float(), target.float(), dim=-1)).mean()
        return functional.smooth_l1_loss(predicted.float(), target.float())


class Moments(nn.Module):
    """What of a frozen teacher must come back with a resume: the moments of its tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cls, self.patches = Standardiser(dim), Standardiser(dim)


class Guided(NamedTuple):
    """What a frozen teacher says of global crops.

    Attributes:
        cls: (B, D) class tokens, standardised.
        patches: (B, N, D) patches on the student's grid, standardised where they are used.
        logits: (B, K) "dino" and (M, K) "ibot", those that are wanted.
    """

    cls: Tensor
    patches: Tensor
    logits: dict[str, Tensor]


class Guide(nn.Module):
    """The teacher, its heads if it is to give distributions, and the colours and grid that it is used to.

    Heads that were trained with the teacher see its tokens as they are, as in DINOv2 and DINOv3. Weights are released
    without heads. Then K fixed random directions in `bottleneck` random dimensions of the standardised tokens take the
    place: with Sinkhorn-Knopp their softmax is a code of the token, finer the lower the temperature. Tokens as they
    are would give all images nearly the same code, and the loss would stay at log K.

    Args:
        backbone: its network.
        heads: by "dino" and "ibot", those that are wanted.
        trained: whether those were trained with it.
        config: of the run.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, backbone: Backbone, heads: Mapping[str, ProjectionHead], *, trained: bool, config: PretrainConfig
    ) -> None:
        super().__init__()
        self.spec, self.trained = backbone.spec, trained
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)
        self.moments = Moments(self.spec.width)
        self.side = config.views.global_px // config.model.patch_px
        features = config.objective.features
        self.uses_patches = "ibot" in heads or (features is not None and features.patches > 0)
        self.requires_grad_(False)
        self.eval()
        deviation = torch.tensor(self.spec.std)
        scale = torch.tensor(config.views.std) / deviation
        shift = (torch.tensor(config.views.mean) - torch.tensor(self.spec.mean)) / deviation
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, views: Tensor, places: Tensor | None) -> Guided:
        """Return what the teacher makes of the student's global views (B, 3, g, g), and of the patches at `places`."""
        tokens = self.backbone(views * self.scale.to(views) + self.shift.to(views))
        patches = tokens.patches.flatten(1, 2)
        if tokens.patches.shape[1:3] != (self.side, self.side):
            patches = resize_patches(patches, self.side)
        cls, standard = self.moments.cls(tokens.cls), patches
        if self.uses_patches:
            standard = self.moments.patches(patches.flatten(0, 1)).view(patches.shape)
        logits: dict[str, Tensor] = {}
        if "dino" in self.heads:
            logits["dino"] = self.heads["dino"](tokens.cls if self.trained else cls)
        if "ibot" in self.heads and places is not None:
            picked = (patches if self.trained else standard).flatten(0, 1).index_select(0, places)
            logits["ibot"] = self.heads["ibot"](picked)
        return Guided(cls, standard, logits)


def load_guide(config: PretrainConfig, seed: int) -> Guide:
    """Return the teacher of a distillation, on the CPU.

    Args:
        config: of the run; `run.teacher` is an encoder's name, a file, or the folder of a run of `eosin pretrain`.
        seed: of a random projection.

    Raises:
        WeightsError: weights that are not complete, or no network.
        ConfigError: a patch or input that does not fit the views, or heads of another number of prototypes.
    """
    name, heads = str(config.run.teacher), {}
    if (Path(name) / "run.json").is_file():
        name, heads = _of_run(Path(name))
    elif Path(name).is_file():
        heads = unwrap(read_tensors(Path(name)))[0]
    loaded = load_encoder(name, device="cpu", precision="fp32", backend="torch")
    if not isinstance(loaded, Encoder):
        raise WeightsError(f"run.teacher is {name!r}, which has no network to learn from")
    return _fitted(loaded.spec, loaded.backbone.network, _trained_heads(heads, config), config, seed)


def sketch_guide(config: PretrainConfig) -> Guide:
    """Return `load_guide` without memory for the weights where the teacher's name tells its network."""
    name = str(config.run.teacher)
    if name not in REGISTRY or not REGISTRY[name].arch:
        return load_guide(config, 0)
    spec = REGISTRY[name]
    with torch.device("meta"):
        return _fitted(spec, build_network(spec.arch, spec.arch_args, img_size=position_px(spec)), {}, config, 0)


def _fitted(
    spec: EncoderSpec, network: nn.Module, heads: dict[str, ProjectionHead], config: PretrainConfig, seed: int
) -> Guide:
    """Check a teacher against the views, and give it the heads that it lacks."""
    side, student = config.views.global_px, config.model.patch_px
    if spec.patch_px and side % spec.patch_px:
        both = math.lcm(spec.patch_px, student)
        raise ConfigError(
            f"views.global_px is {side}; the teacher {spec.name} has patches of {spec.patch_px} px and the student of "
            f"{student}: take a multiple of {both}, such as {max(1, round(side / both)) * both}, or another patch_px"
        )
    trained = bool(heads)
    for at, name in enumerate(() if trained else HEADS):
        if getattr(config.objective, name):
            heads[name] = _random_head(spec.width, config, seed + at)
    backbone = Backbone(network, spec)
    try:
        backbone.fit(side, side)
    except GeometryError as error:
        raise ConfigError(f"views.global_px is {side}, and the teacher {error}; set it so") from error
    return Guide(backbone, heads, trained=trained, config=config)


def _random_head(dim: int, config: PretrainConfig, seed: int) -> ProjectionHead:
    """Return a random projection to a sphere, and random directions on it."""
    of = config.objective
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ProjectionHead(dim, hidden=1, bottleneck=of.bottleneck, prototypes=of.prototypes, layers=1)


# Trained heads.


def _of_run(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Return the file of the newest encoder of a run, and the heads of its teacher in DINOv2's names."""
    newest = latest_checkpoint(folder / "checkpoints")
    encoder = folder / "encoders" / f"{newest.name}.safetensors" if newest is not None else folder / "encoders"
    if newest is None or not encoder.is_file():
        raise WeightsError(
            f"{folder} holds a run without a checkpoint and its encoder; let it save one, or give a file"
        )
    found = {start: read_part(newest, f"teacher/{of}.") for of, start in HEADS.items()}
    return str(encoder), {f"{start}{key}": t for start, state in found.items() for key, t in state.items()}


def _trained_heads(state: Mapping[str, Tensor], config: PretrainConfig) -> dict[str, ProjectionHead]:
    """Return the heads of a checkpoint that the objective asks for; none where it has none."""
    of, what = config.objective, config.run.teacher
    own = {
        name: {key.removeprefix(start): t for key, t in state.items() if key.startswith(start)}
        for name, start in HEADS.items()
    }
    if not any(own.values()):
        return {}
    own["ibot"] = own["ibot"] or own["dino"]
    heads = {name: _head_of(own[name], f"the {name} head of {what}") for name in HEADS if getattr(of, name)}
    for name in heads:
        prototypes = len(_last(own[name]))
        if prototypes != of.prototypes:
            raise ConfigError(f"objective.prototypes is {of.prototypes}; {what} has heads of {prototypes}: set that")
    return heads


def _last(state: Mapping[str, Tensor]) -> Tensor:
    """Return the prototypes (K, bottleneck) of a head, or nothing."""
    return state.get("last_layer.weight_v", state.get("last_layer.weight", torch.empty(0, 0)))


def _head_of(state: Mapping[str, Tensor], what: str) -> ProjectionHead:
    """Return a head with the sizes and weights of a checkpoint."""
    layers = sorted(int(match[1]) for key in state if (match := re.fullmatch(r"mlp\.(\d+)\.weight", key)))
    last = _last(state)
    if not layers or not len(last):
        raise WeightsError(f"{what} is no DINO head: it has {', '.join(sorted(state)[:8]) or 'no tensors'}")
    first = state[f"mlp.{layers[0]}.weight"]
    with torch.random.fork_rng(devices=[]):
        head = ProjectionHead(
            first.shape[1],
            hidden=first.shape[0],
            bottleneck=last.shape[1],
            prototypes=last.shape[0],
            layers=len(layers),
            weight_norm="last_layer.weight_v" in state,
        )
    wanted = {key: tuple(t.shape) for key, t in head.state_dict().items()}
    had = {key: tuple(t.shape) for key, t in state.items()}
    if wanted != had:
        apart = sorted(f"{key} {wanted.get(key)}, found {had.get(key)}" for key in wanted | had
                       if wanted.get(key) != had.get(key))  # fmt: skip
        raise WeightsError(f"{what} does not fit: {'; '.join(apart[:4])}")
    head.load_state_dict(dict(state))
    return head
