"""What a pretraining run is: one TOML file into frozen dataclasses, checked whole before anything starts."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from eosin.errors import ConfigError
from eosin.features.recipe import canonical_json
from eosin.pretrain import model, view_config
from eosin.pretrain.lora import USUAL, Lora, Target
from eosin.pretrain.model import ModelConfig
from eosin.pretrain.sampling import SampleConfig
from eosin.pretrain.schedules import Budget, Rule, ScheduleSpec, resolve_budget, scaled_lr
from eosin.pretrain.tables import dump_toml, from_table, require, to_table
from eosin.pretrain.view_config import ViewConfig

PRESETS: Mapping[type, Mapping[str, Any]] = {ModelConfig: model.PRESETS, ViewConfig: view_config.PRESETS}
HIDDEN = frozenset({(SampleConfig, "seed")})
"""The draws follow `run.seed`."""
NO_RESULT = ("watch", "run.save_every", "run.keep", "run.shard", "data.workers")
"""Keys that change how a run is watched, kept or spread, not what it learns: a resume may change them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where tiles come from.

    Attributes:
        paths: slides, or folders, zips and arrays of tiles, and folders of them; relative to the working folder.
        kind: "slides" draws tiles from slides while training; "tiles" reads tiles that are there.
        table: CSV with a column `path` and any of `slide_id`, `site`, `organ`, `scanner`, for balance and adversary.
        slide_mpp: microns per pixel of slides whose files do not say.
        workers: processes that read; 0 reads in the training process, when tiles are needed.
        sample: which tiles are drawn; its seed is `run.seed`.
    """

    paths: tuple[str, ...] = ()
    kind: Literal["slides", "tiles"] = "slides"
    table: str | None = None
    slide_mpp: float | None = None
    workers: int = 2
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        """Refuse a run without data."""
        require(self, "paths", bool(self.paths) or self.table is not None, "given, or a table of paths")
        require(self, "workers", self.workers >= 0, "0 or more")
        if self.slide_mpp is not None:
            require(self, "slide_mpp", self.slide_mpp > 0, "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """Regression of a frozen teacher's tokens, standardised in each dimension, by a linear layer on the student's.

    Attributes:
        cls: weight of the class token.
        patches: weight of the patches; the teacher's grid is resized to the student's.
        distance: "cosine" of each token, or "smooth_l1" of each number.
    """

    cls: float = 1.0
    patches: float = 1.0
    distance: Literal["cosine", "smooth_l1"] = "cosine"

    def __post_init__(self) -> None:
        """Refuse weights that train nothing."""
        for name in ("cls", "patches"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        if self.cls + self.patches == 0:
            raise ConfigError("cls and patches are both 0; one of them must teach, or leave the table out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is learned: weights of the loss parts (0 leaves one out), heads, masks.

    Attributes:
        method: "dino", student and teacher, its moving average; "distil", the frozen `run.teacher` teaches instead, and
            no patch is hidden; "simclr", two views of one encoder, for comparison: it uses `hidden`, `bottleneck` and
            `temperature` only.
        dino: weight of the cross-entropy of the class tokens.
        ibot: weight of the cross-entropy of the masked patches.
        jepa: weight of the regression of the masked patches' features.
        koleo: weight of KoLeo; DINOv2 has 0.1.
        kde: weight of the vMF kernel density, Virchow2's replacement of KoLeo; it has 0.05.
        kde_kappa: concentration of its kernel.
        gram: weight of Gram anchoring to an earlier teacher; DINOv3 has 2.
        gram_start: share of the run after which the anchor is taken and the weight counts.
        centring: of the teacher's outputs, "sinkhorn" (DINOv2 long, DINOv3) or "ema" (DINOv2 fast).
        prototypes: K of each head.
        hidden: width of the heads' hidden layers.
        bottleneck: width before the prototypes.
        own_ibot_head: whether patches have a head of their own.
        weight_norm: whether prototypes are normalised (DINOv2) or not (DINOv3).
        temperature: of the student, or of SimCLR.
        mask_share: share of the global crops that are masked.
        mask_ratio: least and greatest share of a masked crop's patches.
        mask_exact: whether counts are exact (DINOv3) or may fall short (DINOv2).
        adversary: what the features should forget, or None.
        adversary_strength: greatest strength of the reversed gradient; 0 only measures.
        anchor: what they should keep beside it, or None.
        features: with "distil", what of the teacher's features is regressed, or None.
    """

    method: Literal["dino", "distil", "simclr"] = "dino"
    dino: float = 1.0
    ibot: float = 1.0
    jepa: float = 0.0
    koleo: float = 0.1
    kde: float = 0.0
    kde_kappa: float = 5.0
    gram: float = 0.0
    gram_start: float = 0.5
    centring: Literal["sinkhorn", "ema"] = "sinkhorn"
    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    own_ibot_head: bool = True
    weight_norm: bool = True
    temperature: float = 0.1
    mask_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_exact: bool = False
    adversary: Literal["slide", "site", "scanner"] | None = None
    adversary_strength: float = 0.1
    anchor: Literal["organ", "site"] | None = None
    features: FeatureConfig | None = None

    def __post_init__(self) -> None:
        """Refuse weights and sizes that train nothing."""
        for name in ("dino", "ibot", "jepa", "koleo", "kde", "gram", "adversary_strength"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("kde_kappa", "temperature"):
            require(self, name, getattr(self, name) > 0, "above 0")
        require(self, "gram_start", 0 <= self.gram_start < 1, "a share of the run, at least 0 and below 1")
        require(self, "prototypes", self.prototypes >= 2, "2 or more")
        for name in ("hidden", "bottleneck"):
            require(self, name, getattr(self, name) >= 1, "1 or more")
        require(self, "mask_share", 0 < self.mask_share <= 1, "above 0 and at most 1")
        low, high = self.mask_ratio
        require(self, "mask_ratio", 0 < low <= high <= 1, "a smaller and a larger share, above 0 and at most 1")
        if self.method == "dino" and self.dino + self.ibot + self.jepa == 0:
            raise ConfigError("dino, ibot and jepa are all 0; one of them must teach")
        if self.method == "distil" and self.dino + self.ibot == 0 and self.features is None:
            raise ConfigError("dino and ibot are 0 and there is no table features; one of them must teach")
        if self.method == "distil" and self.jepa + self.gram > 0:
            raise ConfigError('jepa and gram learn from an average of the student itself; with "distil" set them to 0')
        if self.method != "distil" and self.features is not None:
            raise ConfigError(f'features are learned with method = "distil", not {self.method!r}')
        if self.anchor is not None and self.anchor == self.adversary:
            raise ConfigError(f"anchor and adversary are both {self.anchor!r}; features cannot keep and forget it")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW. Defaults: DINOv2's ViT-L/14.

    Attributes:
        lr: peak learning rate at `reference_batch` images a step.
        lr_rule: how it grows with the batch, see `schedules.scaled_lr`.
        reference_batch: 1024 for DINOv2, 64 for DINOv3, 256 for the linear rule.
        betas: decay of the moments.
        layer_decay: factor of the rate from each layer to the one below.
        patch_embed_multiplier: factor of the rate of the patch embedding.
        clip: greatest norm of the gradient of the encoder and of each head; 0 does not clip.
    """

    lr: float = 2e-4
    lr_rule: Rule = "sqrt"
    reference_batch: int = 1024
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0
    patch_embed_multiplier: float = 0.2
    clip: float = 3.0

    def __post_init__(self) -> None:
        """Refuse rates that cannot train."""
        require(self, "lr", self.lr > 0, "above 0")
        require(self, "reference_batch", self.reference_batch >= 1, "1 or more")
        require(self, "betas", all(0 <= b < 1 for b in self.betas), "two numbers of at least 0 and below 1")
        require(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        require(self, "patch_embed_multiplier", self.patch_embed_multiplier > 0, "above 0")
        require(self, "clip", self.clip >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """What ends the run; the smallest of the limits does, and all schedules end with it.

    Attributes:
        steps: optimiser steps.
        images: tiles.
        hours: of training; turned into steps once, by the time of the first steps.
    """

    steps: int | None = None
    images: int | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        """Refuse a run without an end."""
        limits = [n for n in ("steps", "images", "hours") if getattr(self, n) is not None]
        for name in limits:
            require(self, name, getattr(self, name) > 0, "above 0")
        if not limits:
            raise ConfigError("nothing ends the run: give steps, images or hours")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How the run is made.

    Attributes:
        batch: tiles of one micro-step over all ranks, so that a file means the same run on one GPU and on eight.
        accumulate: micro-steps whose gradients make one optimiser step. The statistics of Sinkhorn, KoLeo and KDE stay
            those of one micro-step: accumulation does not enlarge them.
        seed: of weights, draws, views, masks and drop path.
        precision: of the matrix products; losses, averages and moments are float32.
        compile: whether the encoder is compiled.
        shard: whether several ranks share the parameters (FSDP2) or each hold them all (DDP).
        weights: encoder to start from, a name or a file; None starts from random numbers.
        teacher: with `objective.method = "distil"`, the frozen encoder: a name, a file, or the folder of a run of
            `eosin pretrain`, whose heads come with it.
        lora_rank: of low-rank adapters on `weights`, which then stand still; None and 0 train all weights.
        lora_alpha: the adapters count lora_alpha / lora_rank; None: 1.
        lora_targets: linears that are adapted; None: queries and values.
        save_every: optimiser steps between checkpoints.
        keep: checkpoints kept.
    """

    batch: int
    accumulate: int = 1
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    shard: bool = False
    weights: str | None = None
    teacher: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[Target, ...] | None = None
    save_every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        for name in ("batch", "accumulate", "save_every", "keep"):
            require(self, name, getattr(self, name) >= 1, "1 or more")
        require(self, "seed", self.seed >= 0, "0 or more")
        require(self, "lora_rank", (self.lora_rank or 0) >= 0, "0 or more")
        require(self, "lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "above 0")
        require(self, "lora_targets", self.lora_targets is None or len(self.lora_targets) > 0, "one or more")
        if self.lora_rank and self.weights is None:
            raise ConfigError(f"lora_rank is {self.lora_rank}, but weights is not given: there is nothing to adapt")
        if not self.lora_rank and (self.lora_alpha, self.lora_targets) != (None, None):
            raise ConfigError("lora_alpha or lora_targets is given without lora_rank; give it, such as 8")

    @property
    def lora(self) -> Lora | None:
        """The adapters, or None when all weights train."""
        if not self.lora_rank:
            return None
        alpha = float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
        return Lora(rank=self.lora_rank, alpha=alpha, targets=self.lora_targets or USUAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """How the run is watched.

    Attributes:
        log_every: optimiser steps between lines of `metrics.jsonl`.
        probe: CSV of held-out images with columns `path`, `label` and `patient_id` for the periodic kNN, or None.
        probe_every: optimiser steps between probes.
        stop_on_collapse: whether a collapsed teacher ends the run with an error.
    """

    log_every: int = 10
    probe: str | None = None
    probe_every: int = 1000
    stop_on_collapse: bool = True

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        for name in ("log_every", "probe_every"):
            require(self, name, getattr(self, name) >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """A whole run, one section of the file a field; `[model]` and `[views]` may begin with `preset = "name"`."""

    model: ModelConfig
    data: DataConfig
    budget: BudgetConfig
    run: RunConfig
    views: ViewConfig = field(default_factory=ViewConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        """Refuse sections that do not fit each other."""
        patch = self.model.patch_px
        for name, used in (("global_px", True), ("local_px", self.views.local_crops > 0)):
            if used and getattr(self.views, name) % patch:
                side = getattr(self.views, name)
                raise ConfigError(f"views.{name} is {side}; it must be a multiple of model.patch_px, {patch}")
        tile, least = self.data.sample.tile_px, self.views.least_tile_px()
        if tile < least:
            what = f"extended-context crops of {self.views.global_px} px need at least {least}"
            raise ConfigError(f"data.sample.tile_px is {tile}; {what}")
        if self.schedule.warm_start and self.run.weights is None:
            raise ConfigError("schedule.warm_start is true, but run.weights is not given: nothing is warm")
        if (self.objective.method == "distil") != (self.run.teacher is not None):
            raise ConfigError(
                f"objective.method is {self.objective.method!r} and run.teacher {self.run.teacher or 'not given'}; "
                'a distillation needs method = "distil" and a teacher, and nothing else has one'
            )
        if (self.run.lora_rank or 0) > self.model.dim:
            raise ConfigError(f"run.lora_rank is {self.run.lora_rank}; the weights have rank {self.model.dim} at most")
        spread = self.objective.koleo + self.objective.kde > 0 or self.objective.method == "simclr"
        if spread and self.run.batch < 2:
            raise ConfigError("run.batch is 1; KoLeo, KDE and SimCLR compare images: give 2 or more, or set them to 0")

    @property
    def images_per_step(self) -> int:
        """Tiles an optimiser step sees, over all ranks and micro-steps."""
        return self.run.batch * self.run.accumulate

    @property
    def lr(self) -> float:
        """Peak learning rate after the rule of the batch."""
        of = self.optimizer
        return scaled_lr(of.lr, batch=self.images_per_step, rule=of.lr_rule, reference_batch=of.reference_batch)

    @property
    def sample(self) -> SampleConfig:
        """`data.sample` with the run's seed."""
        return replace(self.data.sample, seed=self.run.seed)

    def batch_of_rank(self, world: int) -> int:
        """Return the tiles of one micro-step on each of `world` ranks, or raise `ConfigError` if they do not divide."""
        if self.run.batch % world:
            raise ConfigError(f"run.batch is {self.run.batch}; it must be a multiple of the {world} ranks")
        return self.run.batch // world

    def resolve_budget(self, seconds_per_step: float | None = None) -> Budget:
        """Return the budget that ends the run; hours need the measured time of an optimiser step.

        Raises:
            ConfigError: hours without a measured time, or a limit below one step.
        """
        limits = {"steps": self.budget.steps, "images": self.budget.images, "hours": self.budget.hours}
        try:
            return resolve_budget(images_per_step=self.images_per_step, seconds_per_step=seconds_per_step, **limits)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise ConfigError(f"budget: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON and TOML types, presets resolved, without what is None."""
        return to_table(self, HIDDEN)

    def to_toml(self) -> str:
        """Return the file that `parse_config` reads back as this config."""
        return dump_toml(self.to_dict())

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def identity(self) -> dict[str, Any]:
        """Return `to_dict` without `NO_RESULT`: what a resumed run must share."""
        table = self.to_dict()
        for key in NO_RESULT:
            section, _, name = key.partition(".")
            if name:
                table[section].pop(name, None)
            else:
                del table[section]
        return table

    @property
    def hash(self) -> str:
        """Hex SHA-256 of `identity`."""
        return hashlib.sha256(canonical_json(self.identity()).encode()).hexdigest()


def parse_config(table: Mapping[str, Any]) -> PretrainConfig:
    """Return the config of a parsed TOML or JSON table.

    Raises:
        ConfigError: with the path of the key, what was found and what is needed.
    """
    return from_table(PretrainConfig, table, presets=PRESETS, hidden=HIDDEN)


def read_config(path: str | Path) -> PretrainConfig:
    """Return the config of a TOML file.

    Raises:
        ConfigError: the file is not there or not TOML, or see `parse_config`.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not TOML: {error}") from error
    return parse_config(table)
