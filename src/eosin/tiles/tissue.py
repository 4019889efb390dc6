"""Finding tissue on a brightfield slide, on the CPU, from a thumbnail.

Thresholds are optical densities against the slide's own glass and sizes are physical, so the
answer does not depend on the mpp of the tiles, and there is no histogram split that could
turn over on a slide that is all tissue or all glass.

What is computed per pixel from colour is computed in bands of rows, with the margin its filter
needs, so that a large slide's thumbnail costs about 20 bytes a pixel; no bit depends on the bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eosin.errors import NotBrightfieldError, NoTissueError, TissueError
from eosin.tiles.filters import (
    Bool,
    Field,
    Image,
    bands,
    channel_range,
    close,
    components,
    dilate,
    drop_small,
    erode,
    local_deviation,
    local_share,
    softened,
)
from eosin.tiles.mask import MASK_MPP, TissueMask, mask_size

if TYPE_CHECKING:
    from eosin.slides import Slide

METHODS = ("auto", "od-texture")
# Optical densities (log10) above the glass that count as stain; raised where the glass is noisy.
CHROMA_OD, DENSE_OD, TEXTURE_OD = 0.025, 0.050, 0.010
NOISE_FACTOR = 4.0
MAX_RAISE = 3.0
INK_OVER_TISSUE_OD = 1.0
# Physical sizes.
SMOOTH_UM, TEXTURE_UM, CLOSE_UM, INK_UM = 6.0, 90.0, 24.0, 24.0
MIN_OBJECT_UM2, MAX_HOLE_UM2, MIN_INK_UM2 = 20_000.0, 20_000.0, 20_000.0
# Half width of the grey levels, and of their shift between channels, that belong to one glass surface.
GLASS_BAND, GLASS_TINT = 6, 3
# Dark slide: most pixels below DARK_LEVEL and almost none above BRIGHT_LEVEL (mean of channels, 0-255).
DARK_LEVEL, BRIGHT_LEVEL = 50, 110


@dataclass(frozen=True, slots=True)
class GlassColor:
    """The colour of empty glass over an image: a quadratic in x, y per channel, held within a range.

    Attributes:
        weights: float32 (6, c), of 1, u, v, u², uv, v², where u, v run from -0.5 to 0.5.
        low: float32 (c,), least value.
        high: float32 (c,), greatest value.
        size_px: (width, height) of the image.
    """

    weights: Field
    low: Field
    high: Field
    size_px: tuple[int, int]

    @classmethod
    def constant(cls, color: Field, size_px: tuple[int, int]) -> GlassColor:
        """Return the same colour everywhere."""
        weights = np.zeros((6, len(color)), dtype=np.float32)
        weights[0] = color
        return cls(weights, color, color, size_px)

    def at(self, rows: slice) -> Field:
        """Return the colour in these rows, float32 (rows, width, c)."""
        width, height = self.size_px
        x = (np.arange(width, dtype=np.float32) / width - 0.5)[None, :, None]
        y = (np.arange(height, dtype=np.float32) / height - 0.5)[rows, None, None]
        w = self.weights
        surface = (w[0] + w[1] * x + w[3] * x * x) + (w[2] + w[4] * x + w[5] * y) * y
        return np.clip(surface, self.low, self.high)


def tissue_mask(slide: Slide, *, mpp: float = MASK_MPP, method: str = "auto") -> TissueMask:
    """Return where the tissue is.

    Args:
        slide: an open slide with a known mpp.
        mpp: microns per pixel of the thumbnail that is looked at (its long side is 4096 px at most).
        method: "auto" or its present meaning, "od-texture".

    Raises:
        NoTissueError: the slide is blank.
        NotBrightfieldError: the slide is dark (fluorescence).
        MissingMppError: the slide does not say its mpp.
        TissueError: unknown method.
    """
    if method not in METHODS:
        raise TissueError(f"unknown tissue method {method!r}; one of {', '.join(METHODS)}")
    slide_mpp = slide.mpp
    rgb, (dx, dy) = slide.thumbnail(max(mask_size(slide, mpp)))
    x, y, width, height = slide.bounds
    left, top = round(x / dx), round(y / dy)
    rgb = rgb[top : max(top + 1, round((y + height) / dy)), left : max(left + 1, round((x + width) / dx))]
    mask, params = segment_tissue(rgb, pixel_um=(dx * slide_mpp.x, dy * slide_mpp.y), where=slide.name)
    return TissueMask(mask, (dx, dy), (left * dx, top * dy), "od-texture", params)


def segment_tissue(
    rgb: Image, *, pixel_um: tuple[float, float], where: str = "the image"
) -> tuple[Bool, dict[str, Any]]:
    """Return the tissue of a brightfield overview, bool (h, w), and the numbers it rests on.

    Pixels are turned into optical density against the colour of the glass, found on the slide
    itself. Tissue is what is coloured (spread of density over the channels), dense, or textured
    (local deviation of density, for fat), above the noise of the glass. Ink and black are
    left out, gaps closed, and objects without stain (dust, coverslip edges) or too small dropped.

    Args:
        rgb: uint8 (h, w, 3), about 8 µm per pixel.
        pixel_um: (x, y) microns per pixel.
        where: name for error messages.

    Raises:
        NotBrightfieldError: the image is dark.
        NoTissueError: nothing but glass, dust and ink.
    """
    check_brightfield(rgb, where)
    um = float(np.sqrt(pixel_um[0] * pixel_um[1]))
    glass, glass_color, is_glass = find_glass(rgb)
    ink = find_ink(rgb, glass, um)
    stained, dense, textured, limits = _stains(rgb, glass, is_glass, um)
    stained &= ~ink
    # Grey dirt and coverslip edges are dense or textured too: only beside stain is that tissue.
    beside = local_share(stained, TEXTURE_UM / um) > 0.05
    found = (stained | (beside & (dense | textured))) & ~ink
    found = close(found, CLOSE_UM / um) & ~ink
    min_object = min(MIN_OBJECT_UM2, 0.05 * rgb.shape[0] * rgb.shape[1] * um * um) / um**2
    found = _keep_stained_objects(found, stained, min_object)
    found = _fill_holes(found, MAX_HOLE_UM2 / um**2) & ~ink
    params = {
        "pixel_um": [round(float(p), 4) for p in pixel_um],
        "glass_rgb": [round(float(c), 1) for c in glass_color],
        "glass_share": round(float(is_glass.mean()), 4),
        "ink_share": round(float(ink.mean()), 4),
        "tissue_share": round(float(found.mean()), 4),
        "limits_od": {name: round(value, 4) for name, value in limits.items()},
    }
    if not found.any():
        raise NoTissueError(
            f"no tissue on {where}: {params['glass_share']:.0%} of it is glass of colour {params['glass_rgb']}, "
            f"{params['ink_share']:.1%} is ink, and no stained object is larger than "
            f"{min_object * um * um / 1e6:.3f} mm²; "
            "if there is tissue, give an outline as mask= (GeoJSON or image)"
        )
    return found, params


def check_brightfield(rgb: Image, where: str) -> None:
    """Raise when the image is dark like fluorescence.

    Raises:
        NotBrightfieldError: over half of the pixels are dark and fewer than 5 % are bright.
    """
    dark, bright = 0.0, 0.0
    for rows in bands(len(rgb)):
        light = channel_range(rgb[rows])[1]
        dark += np.count_nonzero(light < DARK_LEVEL) * 3 / rgb.size
        bright += np.count_nonzero(light > BRIGHT_LEVEL) * 3 / rgb.size
    if dark > 0.5 and bright < 0.05:
        raise NotBrightfieldError(
            f"{where} is not brightfield: {dark:.0%} of the thumbnail is darker than {DARK_LEVEL} of 255 (mean of "
            f"the channels) and {bright:.1%} brighter than {BRIGHT_LEVEL} (fluorescence?); give an outline as "
            "mask= to use it all the same"
        )


def find_glass(rgb: Image) -> tuple[GlassColor, Field, Bool]:
    """Return the colour of empty glass at every pixel, its median, and where glass was seen.

    Glass is bright, nearly grey and smooth; its level is the brightest strong mode of such pixels
    (exact white, the filling of unscanned areas, does not count if there is other glass). Where
    enough of it is seen, a quadratic surface per channel then follows vignetting. With no glass in view the colour is
    that of the brightest pixels, 230 at least.

    Returns:
        the surface, float32 (3,), bool (h, w).
    """
    height, width = rgb.shape[:2]
    light, candidate = _grey_and_smooth(rgb)
    scanned = candidate & ~_is_white(rgb)
    if scanned.mean() > 0.005:
        candidate = scanned
    del scanned
    if candidate.mean() <= 0.005:
        color = np.maximum(np.percentile(rgb.reshape(-1, 3), 99.9, axis=0), 230).astype(np.float32)
        return GlassColor.constant(color, (width, height)), color, np.zeros((height, width), dtype=bool)
    counts = np.zeros(256)
    for rows in bands(height):
        counts += np.bincount(light[rows][candidate[rows]].astype(np.int64), minlength=256)
    counts = np.convolve(counts, np.ones(5) / 5, mode="same")
    mode = int(np.flatnonzero(counts >= 0.25 * counts.max()).max())
    member = candidate & (np.abs(light - mode) < GLASS_BAND)
    # Vignetting dims glass but leaves its hue: pale stain of the same brightness has another.
    hue = [np.median(tint, overwrite_input=True) for tint in _soft_values(rgb, member, less=light)]
    for rows, soft in softened(rgb, 1.0):
        for channel in range(3):
            candidate[rows] &= np.abs(soft[..., channel] - light[rows] - hue[channel]) < GLASS_TINT
    member &= candidate
    for _ in range(6):
        y, x = _sample(member)
        surface = _quadratic_surface(member, (y, x), light[y, x][:, None])
        grown = np.zeros_like(member)
        for rows in bands(height):
            grown[rows] = candidate[rows] & (np.abs(light[rows] - surface.at(rows)[..., 0]) < GLASS_BAND)
        if grown.sum() < 0.5 * member.sum():
            break
        member = grown
    del light, candidate
    color = np.array([np.median(one, overwrite_input=True) for one in _soft_values(rgb, member)], dtype=np.float32)
    y, x = _sample(member)
    values = np.empty((len(y), 3), dtype=np.float32)
    for rows, soft in softened(rgb, 1.0):
        here = (y >= rows.start) & (y < rows.stop)
        values[here] = soft[y[here] - rows.start, x[here]]
    return _quadratic_surface(member, (y, x), values), color, member


def _grey_and_smooth(rgb: Image) -> tuple[Field, Bool]:
    """Return the mean of the channels, slightly smoothed, and where the image is bright, nearly grey and smooth."""
    light = np.empty(rgb.shape[:2], dtype=np.float32)
    found = np.empty(rgb.shape[:2], dtype=bool)
    for rows, soft in softened(rgb, 1.0):
        low, light[rows], high = channel_range(soft)
        found[rows] = high - low < 32
    found &= local_deviation(light, 5.0) < 4.0
    found &= light > max(140.0, 0.6 * float(np.percentile(light, 99.5)))
    return light, found


def _soft_values(rgb: Image, member: Bool, *, less: Field | None = None) -> Field:
    """Return the smoothed colours of the members, less a field's values, float32 (3, n)."""
    values = np.empty((3, np.count_nonzero(member)), dtype=np.float32)
    start = 0
    for rows, soft in softened(rgb, 1.0):
        inside = member[rows]
        stop = start + np.count_nonzero(inside)
        values[:, start:stop] = soft[inside].T
        if less is not None:
            values[:, start:stop] -= less[rows][inside]
        start = stop
    return values


def optical_density(rgb: Field, glass: Field) -> Field:
    """Return -log10(I / I0) per channel, at least 0 (Beer-Lambert), I0 the colour of the glass."""
    return np.maximum(-np.log10(np.maximum(rgb, 1.0) / np.maximum(glass, 1.0)), 0.0).astype(np.float32)


def find_ink(rgb: Image, glass: GlassColor, um: float) -> Bool:
    """Return where pen ink or black lies, bool (h, w).

    Ink absorbs what no haematoxylin, eosin or DAB mixture does: green ink least in
    green; blue ink red much more than green; red ink blue as much as green and hardly any red;
    black everything. Strong cores are grown over paler rims of the same ink, and over what beside
    them is darker than tissue alone.
    """
    cores, rims, deep = (np.zeros((n, *rgb.shape[:2]), dtype=bool) for n in (4, 4, 1))
    for rows, soft in softened(rgb, INK_UM / 2 / um):
        od = optical_density(soft, glass.at(rows))
        red, green, blue = od[..., 0], od[..., 1], od[..., 2]
        low, _, high = channel_range(od)
        kinds = (
            # (hue test, density it is graded by, density of a core, density of a rim)
            ((green < 0.7 * blue) & (green < 0.6 * red), red, 0.25, 0.06),
            ((red > 1.2 * green) & (red > 2.8 * blue), red, 0.60, 0.15),
            ((blue > 0.8 * green) & (red < 0.2 * green), green, 0.60, 0.15),
            (high < 1.6 * low, low, 0.65, 0.25),
        )
        deep[0, rows] = high > INK_OVER_TISSUE_OD
        for kind, (hue, density, core_od, rim_od) in enumerate(kinds):
            cores[kind, rows] = hue & (density > core_od)
            rims[kind, rows] = hue & (density > rim_od)
    ink = np.zeros(rgb.shape[:2], dtype=bool)
    for core, rim in zip(cores, rims, strict=True):
        core = drop_small(core, MIN_INK_UM2 / um**2)
        if core.any():
            near = dilate(core, 200.0 / um)
            ink |= dilate(core, 12.0 / um) | (near & (rim | deep[0]))
    return ink


def _stains(rgb: Image, glass: GlassColor, is_glass: Bool, um: float) -> tuple[Bool, Bool, Bool, dict[str, float]]:
    """Return where the image is coloured, dense, and textured, each bool (h, w), and the densities that decide it."""
    chroma, mean, high = (np.empty(rgb.shape[:2], dtype=np.float32) for _ in range(3))
    for rows, soft in softened(rgb, SMOOTH_UM / um):
        low, mean[rows], high[rows] = channel_range(optical_density(soft, glass.at(rows)))
        chroma[rows] = high[rows] - low
    limits = {"chroma": _limit(chroma[is_glass], CHROMA_OD)}
    stained = chroma > limits["chroma"]
    del chroma
    limits["dense"] = _limit(mean[is_glass], DENSE_OD)
    dense = mean > limits["dense"]
    del mean
    texture = local_deviation(high, TEXTURE_UM / um)
    del high
    # Away from tissue, whose edge lies in the window of the glass beside it.
    limits["texture"] = _limit(texture[erode(is_glass, TEXTURE_UM / 2 / um)], TEXTURE_OD)
    # A window over an edge sees deviation on both sides of it: give back half the window and the blur.
    textured = erode(texture > limits["texture"], (TEXTURE_UM / 2 + 2 * SMOOTH_UM) / um)
    return stained, dense, textured, limits


def _limit(noise: Field, floor: float) -> float:
    """Return the threshold: `floor`, raised by the level and spread of the glass, `MAX_RAISE` times at most.

    `noise`, the values on glass, is overwritten.
    """
    if noise.size < 50:
        return floor
    middle = float(np.median(noise, overwrite_input=True))
    noise -= middle
    deviation = 1.4826 * float(np.median(np.abs(noise, out=noise), overwrite_input=True))
    return min(max(floor, middle + NOISE_FACTOR * deviation), MAX_RAISE * floor)


def _sample(member: Bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (rows, columns) of 20,000 to 40,000 members, evenly; of all where there are fewer."""
    places = np.flatnonzero(member)
    rows, columns = np.divmod(places[:: max(1, len(places) // 20_000)], member.shape[1])
    return rows, columns


def _quadratic_surface(
    member: Bool, places: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], values: Field
) -> GlassColor:
    """Return a least-squares quadratic through `values` (k, c) at `places`, held within their own range.

    Constant (their median) unless the members are a fifth of the image and the places lie in half of its 4 x 4 blocks.
    """
    height, width = member.shape
    rows, columns = places
    exact = values.astype(np.float64)
    low, high = np.percentile(exact, [1, 99], axis=0)
    blocks = len(np.unique(rows * 4 // height * 4 + columns * 4 // width))
    if blocks < 8 or member.mean() < 0.2:
        return GlassColor.constant(np.median(exact, axis=0).astype(np.float32), (width, height))

    u, v = columns / width - 0.5, rows / height - 0.5
    design = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=-1)
    penalty = np.diag([0.0, 1, 1, 1, 1, 1]) * 1e-3 * len(rows)
    weights = np.linalg.solve(design.T @ design + penalty, design.T @ exact).astype(np.float32)
    return GlassColor(weights, low.astype(np.float32), high.astype(np.float32), (width, height))


def _keep_stained_objects(found: Bool, stained: Bool, min_px: float) -> Bool:
    """Return the objects of at least `min_px` pixels of which a tenth is coloured."""
    labels, area = components(found, connectivity=8)
    colored = np.zeros(len(area), dtype=np.int64)
    for rows in bands(len(found)):
        colored += np.bincount(labels[rows][stained[rows]], minlength=len(area))
    keep = (area >= min_px) & (colored >= 0.1 * area)
    keep[0] = False
    return keep[labels]


def _fill_holes(found: Bool, max_px: float) -> Bool:
    """Return `found` with enclosed holes of at most `max_px` pixels filled."""
    labels, area = components(~found, connectivity=4)
    fill = area <= max_px
    fill[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False
    fill[0] = False
    return found | fill[labels]


def _is_white(rgb: Image) -> Bool:
    return (rgb[..., 0] == 255) & (rgb[..., 1] == 255) & (rgb[..., 2] == 255)
