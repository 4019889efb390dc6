"""What is done to a tile to make its views, and the presets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eosin.encoders.spec import IMAGENET_MEAN, IMAGENET_STD

BLUR_AS_RELEASED = (0.0, 0.9, 0.5)
BLUR_AS_PUBLISHED = (1.0, 0.1, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Views of a tile: two global crops and some local ones, each with its own geometry and colour.

    Every probability is the true one, of the thing happening. This matters for blur: DINOv2's and DINOv3's
    `GaussianBlur(p)` hands 1 - p to its `RandomApply`, so that "1.0, 0.1, 0.5" in their code and papers blurred
    0, 90 and 50 % of the crops of the released weights (`BLUR_AS_RELEASED`, the default here, since those are the
    weights one starts from); the published figures are `BLUR_AS_PUBLISHED`.

    Attributes:
        global_px: side of the two global crops.
        local_px: side of the local crops.
        local_crops: how many local crops a tile gives; 0 leaves the two global ones.
        global_scale: smallest and largest share of the tile's area that a global crop covers, 0-1.
        local_scale: the same for local crops.
        aspect: smallest and largest width / height of a crop, drawn log-uniformly.
        extended_context: probability that all crops of a tile are taken by extended-context translation (Zimmermann
            et al. 2024, arXiv 2405.01688): at about their own size in the tile, so that the mpp hardly changes. Needs
            tiles larger than the crops (392 px for 224).
        extended_scale: with extended context, smallest and largest pixels of the tile per pixel of the crop, along a
            side: the factor on the mpp.
        extended_aspect: with extended context, smallest and largest width / height.
        hflip: probability of a left-right flip.
        vflip: probability of a top-bottom flip.
        rotate: probability of a turn by 90, 180 or 270 degrees, each as likely as the others.
        blur: probability of Gaussian blur in the first global, second global and local crops.
        blur_sigma_px: smallest and largest standard deviation, in pixels of the crop.
        stain: what is jittered in optical density: "hed", the three fixed vectors of Ruifrok & Johnston; or "he",
            hematoxylin and eosin as Macenko's method finds them in the tile.
        stain_probability: that a crop is jittered.
        stain_scale: half-width of the factor on each stain, 0-1.
        stain_shift: half-width of the offset of each stain, natural OD.
        stain_pairs: the two global crops are one crop in two stains: same box, turn, blur and colour, both jittered.
        jitter: probability that brightness, contrast, saturation and hue change (all four, in this order).
        brightness: half-width of the factor on light, 0-1.
        contrast: half-width of the factor on the difference from the mean grey, 0-1.
        saturation: half-width of the factor on the difference from each pixel's grey, 0-1.
        hue_deg: half-width of the turn of the hue, 0-180 degrees.
        grey: probability of losing all colour.
        solarise: probability that the second global crop has its bright half inverted. Off: it makes tissue into
            something no scanner shows, and Virchow2 gained by leaving it out.
        mean: of each channel in 0-1, subtracted last; that of the encoder one starts from.
        std: of each channel in 0-1, divided by last.
    """

    global_px: int = 224
    local_px: int = 96
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    extended_context: float = 0.0
    extended_scale: tuple[float, float] = (0.9, 1.1)
    extended_aspect: tuple[float, float] = (0.95, 1.05)
    hflip: float = 0.5
    vflip: float = 0.5
    rotate: float = 0.75
    blur: tuple[float, float, float] = BLUR_AS_RELEASED
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    stain: Literal["hed", "he"] = "hed"
    stain_probability: float = 0.5
    stain_scale: float = 0.05
    stain_shift: float = 0.05
    stain_pairs: bool = False
    jitter: float = 0.8
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.1
    hue_deg: float = 18.0
    grey: float = 0.2
    solarise: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            ValueError: a value is out of range; the message names the field.
        """
        self._check_sizes()
        for name in ("global_scale", "local_scale"):
            _check_range(name, getattr(self, name), above=0, most=1, what="a share of the tile's area")
        for name in ("aspect", "extended_aspect"):
            _check_range(name, getattr(self, name), above=0, most=10, what="width / height")
        _check_range("extended_scale", self.extended_scale, above=0, most=4, what="tile pixels per crop pixel")
        smallest = min(self.global_px, self.local_px) if self.local_crops else self.global_px
        _check_range("blur_sigma_px", self.blur_sigma_px, above=0, most=smallest / 6, what="pixels of the crop")
        for name in ("extended_context", "hflip", "vflip", "rotate", "stain_probability", "jitter", "grey", "solarise"):
            _check_number(name, getattr(self, name), most=1, what="a probability")
        for p in _three("blur", self.blur):
            _check_number("blur", p, most=1, what="a probability")
        for name in ("stain_scale", "brightness", "contrast", "saturation"):
            _check_number(name, getattr(self, name), most=1, what="the half-width of a factor around 1")
        _check_number("stain_shift", self.stain_shift, most=3, what="natural optical density")
        _check_number("hue_deg", self.hue_deg, most=180, what="degrees")
        for mean, std in zip(_three("mean", self.mean), _three("std", self.std), strict=True):
            _check_number("mean", mean, most=1, what="of a channel in 0-1")
            if not 0 < std <= 1:
                raise ValueError(f"std is {std}; it must be above 0 and at most 1 (of a channel in 0-1)")
        if self.stain not in ("hed", "he"):
            raise ValueError(f"stain is {self.stain!r}; it must be 'hed' or 'he' (stain_probability 0 turns it off)")

    def _check_sizes(self) -> None:
        for name, value, least in (
            ("global_px", self.global_px, 8),
            ("local_px", self.local_px, 8),
            ("local_crops", self.local_crops, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")

    def least_tile_px(self) -> int:
        """Return the smallest side of a tile that these views can be cut from: above 1 with extended context."""
        if not self.extended_context:
            return 1
        largest = max(self.global_px, self.local_px if self.local_crops else 0)
        return math.ceil(
            largest * self.extended_scale[1] * math.sqrt(max(self.extended_aspect[1], 1 / self.extended_aspect[0]))
        )


def _check_number(name: str, value: float, *, most: float, what: str) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}; it must be 0 to {most:g} ({what})")


def _check_range(name: str, values: tuple[float, float], *, above: float, most: float, what: str) -> None:
    if len(values) != 2 or not above < values[0] <= values[1] <= most:
        raise ValueError(
            f"{name} is {values}; it must be (smallest, largest), above {above:g} and at most {most:g} ({what})"
        )


def _three(name: str, values: tuple[float, float, float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"{name} has {len(values)} values; it must have 3")
    return values


PRESETS = {
    "pathology": ViewConfig(),
    "dinov2": ViewConfig(
        vflip=0.0,
        rotate=0.0,
        stain_probability=0.0,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue_deg=36.0,
        solarise=0.2,
    ),
    "extended-context": ViewConfig(extended_context=1.0),
    "simclr": ViewConfig(local_crops=0, global_scale=(0.2, 1.0), blur=(0.5, 0.5, 0.5)),
    "stain-pairs": ViewConfig(local_crops=0, stain_pairs=True, stain="he", stain_scale=0.3, stain_shift=0.1, grey=0.0),
}
"""Named configurations. "dinov2" is upstream's augmentation; "simclr" and "stain-pairs" give two crops a tile."""
