"""Finding tissue on a brightfield slide, on the CPU, from a thumbnail.

Thresholds are optical densities against the slide's own glass and sizes are physical, so the
answer does not depend on the mpp of the tiles, and there is no histogram split that could
turn over on a slide that is all tissue or all glass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from eosin.errors import NotBrightfieldError, NoTissueError, TissueError
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

Image = npt.NDArray[np.uint8]
Field = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]


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
    glass, glass_color, is_glass = glass_color_field(rgb)
    od = optical_density(_blur(rgb.astype(np.float32), SMOOTH_UM / um), glass)
    low, mean_od, high = _channel_range(od)
    chroma = high - low
    texture = _local_deviation(high, TEXTURE_UM / um)
    limits = {
        "chroma": _limit(chroma[is_glass], CHROMA_OD),
        "dense": _limit(mean_od[is_glass], DENSE_OD),
        # Away from tissue, whose edge lies in the window of the glass beside it.
        "texture": _limit(texture[_erode(is_glass, TEXTURE_UM / 2 / um)], TEXTURE_OD),
    }
    ink = find_ink(rgb, glass, um)
    stained = (chroma > limits["chroma"]) & ~ink
    # A window over an edge sees deviation on both sides of it: give back half the window and the blur.
    textured = _erode(texture > limits["texture"], (TEXTURE_UM / 2 + 2 * SMOOTH_UM) / um)
    # Grey dirt and coverslip edges are dense or textured too: only beside stain is that tissue.
    beside = _local_share(stained, TEXTURE_UM / um) > 0.05
    found = (stained | (beside & ((mean_od > limits["dense"]) | textured))) & ~ink
    found = _close(found, CLOSE_UM / um) & ~ink
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
    light = _channel_range(rgb)[1]
    dark, bright = float((light < DARK_LEVEL).mean()), float((light > BRIGHT_LEVEL).mean())
    if dark > 0.5 and bright < 0.05:
        raise NotBrightfieldError(
            f"{where} is not brightfield: {dark:.0%} of the thumbnail is darker than {DARK_LEVEL} of 255 (mean of "
            f"the channels) and {bright:.1%} brighter than {BRIGHT_LEVEL} (fluorescence?); give an outline as "
            "mask= to use it all the same"
        )


def glass_color_field(rgb: Image) -> tuple[Field, Field, Bool]:
    """Return the colour of empty glass at every pixel, its median, and where glass was seen.

    Glass is bright, nearly grey and smooth; its level is the brightest strong mode of such pixels
    (exact white, the filling of unscanned areas, does not count if there is other glass). Where
    enough of it is seen, a quadratic surface per channel then follows vignetting. With no glass in view the colour is
    that of the brightest pixels, 230 at least.

    Returns:
        float32 (h, w, 3), float32 (3,), bool (h, w).
    """
    soft = _blur(rgb.astype(np.float32), 1.0)
    low, light, high = _channel_range(soft)
    spread = high - low
    smooth = _local_deviation(light, 5.0) < 4.0
    candidate = (light > max(140.0, 0.6 * float(np.percentile(light, 99.5)))) & (spread < 32) & smooth
    filler = _channel_range(rgb)[0] == 255
    scanned = candidate & ~filler
    if scanned.mean() > 0.005:
        candidate = scanned
    if candidate.mean() <= 0.005:
        color = np.maximum(np.percentile(rgb.reshape(-1, 3), 99.9, axis=0), 230).astype(np.float32)
        return np.broadcast_to(color, rgb.shape), color, np.zeros(rgb.shape[:2], dtype=bool)
    counts = np.bincount(light[candidate].astype(np.int64), minlength=256).astype(np.float64)
    counts = np.convolve(counts, np.ones(5) / 5, mode="same")
    mode = int(np.flatnonzero(counts >= 0.25 * counts.max()).max())
    member = candidate & (np.abs(light - mode) < GLASS_BAND)
    # Vignetting dims glass but leaves its hue: pale stain of the same brightness has another.
    for channel in range(3):
        tint = soft[..., channel] - light
        candidate &= np.abs(tint - np.median(tint[member])) < GLASS_TINT
    member &= candidate
    for _ in range(6):
        surface = _quadratic_surface(light[..., None], member)[..., 0]
        grown = candidate & (np.abs(light - surface) < GLASS_BAND)
        if grown.sum() < 0.5 * member.sum():
            break
        member = grown
    color = np.median(soft[member], axis=0).astype(np.float32)
    return _quadratic_surface(soft, member), color, member


def optical_density(rgb: Field, glass: Field) -> Field:
    """Return -log10(I / I0) per channel, at least 0 (Beer-Lambert), I0 the colour of the glass."""
    return np.maximum(-np.log10(np.maximum(rgb, 1.0) / np.maximum(glass, 1.0)), 0.0).astype(np.float32)


def find_ink(rgb: Image, glass: Field, um: float) -> Bool:
    """Return where pen ink or black lies, bool (h, w).

    Ink absorbs what no haematoxylin, eosin or DAB mixture does: green ink least in
    green; blue ink red much more than green; red ink blue as much as green and hardly any red;
    black everything. Strong cores are grown over paler rims of the same ink, and over what beside
    them is darker than tissue alone.
    """
    od = optical_density(_blur(rgb.astype(np.float32), INK_UM / 2 / um), glass)
    red, green, blue = od[..., 0], od[..., 1], od[..., 2]
    low, _, high = _channel_range(od)
    kinds = (
        # (hue test, density it is graded by, density of a core, density of a rim)
        ((green < 0.7 * blue) & (green < 0.6 * red), red, 0.25, 0.06),
        ((red > 1.2 * green) & (red > 2.8 * blue), red, 0.60, 0.15),
        ((blue > 0.8 * green) & (red < 0.2 * green), green, 0.60, 0.15),
        (high < 1.6 * low, low, 0.65, 0.25),
    )
    ink = np.zeros(rgb.shape[:2], dtype=bool)
    for hue, density, core_od, rim_od in kinds:
        core = _drop_small(hue & (density > core_od), MIN_INK_UM2 / um**2)
        if core.any():
            near = _dilate(core, 200.0 / um)
            ink |= _dilate(core, 12.0 / um) | (near & ((hue & (density > rim_od)) | (high > INK_OVER_TISSUE_OD)))
    return ink


def _limit(noise: Field, floor: float) -> float:
    """Return the threshold: `floor`, raised by the level and spread of the glass, `MAX_RAISE` times at most."""
    if noise.size < 50:
        return floor
    middle = float(np.median(noise))
    deviation = 1.4826 * float(np.median(np.abs(noise - middle)))
    return min(max(floor, middle + NOISE_FACTOR * deviation), MAX_RAISE * floor)


def _quadratic_surface(channels: Field, member: Bool) -> Field:
    """Return a least-squares quadratic in x, y per channel, held within the members' own range.

    Constant (their median) unless they are a fifth of the image and lie in half of its 4 x 4 blocks.
    """
    height, width = member.shape
    rows, columns = np.nonzero(member)
    pick = slice(None, None, max(1, len(rows) // 20_000))
    rows, columns = rows[pick], columns[pick]
    values = channels[rows, columns].astype(np.float64)
    low, high = np.percentile(values, [1, 99], axis=0)
    blocks = len(np.unique(rows * 4 // height * 4 + columns * 4 // width))
    if blocks < 8 or member.mean() < 0.2:
        return np.broadcast_to(np.median(values, axis=0).astype(np.float32), channels.shape)

    u, v = columns / width - 0.5, rows / height - 0.5
    design = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=-1)
    penalty = np.diag([0.0, 1, 1, 1, 1, 1]) * 1e-3 * len(rows)
    weights = np.linalg.solve(design.T @ design + penalty, design.T @ values).astype(np.float32)
    x = (np.arange(width, dtype=np.float32) / width - 0.5)[None, :, None]
    y = (np.arange(height, dtype=np.float32) / height - 0.5)[:, None, None]
    surface = (weights[0] + weights[1] * x + weights[3] * x * x) + (weights[2] + weights[4] * x + weights[5] * y) * y
    return np.clip(surface, low.astype(np.float32), high.astype(np.float32))


def _keep_stained_objects(found: Bool, stained: Bool, min_px: float) -> Bool:
    """Return the objects of at least `min_px` pixels of which a tenth is coloured."""
    labels, area = _components(found, connectivity=8)
    colored = np.bincount(labels[stained], minlength=len(area))
    keep = (area >= min_px) & (colored >= 0.1 * area)
    keep[0] = False
    return keep[labels]


def _drop_small(found: Bool, min_px: float) -> Bool:
    labels, area = _components(found, connectivity=8)
    keep = area >= min_px
    keep[0] = False
    return keep[labels]


def _fill_holes(found: Bool, max_px: float) -> Bool:
    """Return `found` with enclosed holes of at most `max_px` pixels filled."""
    labels, area = _components(~found, connectivity=4)
    fill = area <= max_px
    fill[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False
    fill[0] = False
    return found | fill[labels]


def _components(found: Bool, connectivity: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the label of every pixel (0 = not found) and the pixels of each label."""
    count, labels = cv2.connectedComponents(found.astype(np.uint8), connectivity=connectivity)
    labels = np.asarray(labels, dtype=np.int32)
    return labels, np.bincount(labels.ravel(), minlength=count)


def _channel_range(image: npt.NDArray[Any]) -> tuple[Field, Field, Field]:
    """Return least, mean and greatest of the three channels (by slices: a reduction over so short an axis is slow)."""
    red, green, blue = (image[..., channel].astype(np.float32) for channel in range(3))
    low = np.minimum(np.minimum(red, green), blue)
    return low, (red + green + blue) / np.float32(3), np.maximum(np.maximum(red, green), blue)


def _blur(image: Field, sigma_px: float) -> Field:
    if sigma_px < 0.2:
        return image
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT_101), dtype=np.float32)


def _local_deviation(field: Field, window_px: float) -> Field:
    side = max(3, int(window_px) // 2 * 2 + 1)
    mean = cv2.blur(field, (side, side), borderType=cv2.BORDER_REFLECT_101)
    square = cv2.blur(field * field, (side, side), borderType=cv2.BORDER_REFLECT_101)
    return np.sqrt(np.maximum(square - mean * mean, 0)).astype(np.float32)


def _local_share(found: Bool, window_px: float) -> Field:
    side = max(3, int(window_px) // 2 * 2 + 1)
    return np.asarray(cv2.blur(found.astype(np.float32), (side, side)), dtype=np.float32)


def _disk(radius_px: float) -> Image:
    side = 2 * max(1, round(radius_px)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), dtype=np.uint8)


def _dilate(found: Bool, radius_px: float) -> Bool:
    return cv2.dilate(found.astype(np.uint8), _disk(radius_px)).astype(bool)


def _erode(found: Bool, radius_px: float) -> Bool:
    # The default border of cv2.erode counts as tissue, so the slide's edge is not eaten.
    return cv2.erode(found.astype(np.uint8), _disk(radius_px)).astype(bool)


def _close(found: Bool, radius_px: float) -> Bool:
    return cv2.morphologyEx(found.astype(np.uint8), cv2.MORPH_CLOSE, _disk(radius_px)).astype(bool)
