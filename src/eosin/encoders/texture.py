"""Hand-made colour and texture features of H&E tiles: the baseline that needs no weights and no torch.

Every encoder that learned something has to beat this one. A tile of any size >= 32 px becomes `TEXTURE_DIM`
numbers of order one; every part is a histogram, an energy or a count over the whole tile (or over rings around its
centre), so that turning the tile by 90 degrees or mirroring it leaves the features as they are. Sizes are in pixels:
features of tiles with different microns per pixel are not comparable.

============ ====================================================================================
part         definition
============ ====================================================================================
stain        per channel of `stain_image` (hematoxylin, eosin, residual): mean, standard deviation,
             cube root of the third central moment, percentiles 5, 25, 50, 75, 95 of the optical
             density. Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 23 (2001) 291.
colour       mean, standard deviation, cube root of the third central moment of CIE L*, a*, b*, half size.
             Stricker & Orengo, SPIE 2420 (1995) 381, eq. 1-3.
lbp          histograms of uniform, rotation-invariant local binary patterns (riu2) of hematoxylin and of
             grey, eight neighbours on squares of radius 1, 2, 4, as square roots. Ojala, Pietikäinen &
             Harwood, Pattern Recogn. 29 (1996) 51; Ojala, Pietikäinen & Mäenpää, IEEE TPAMI 24 (2002)
             971, eq. 9.
glcm         contrast, correlation, energy, homogeneity, entropy of the 16-level co-occurrence matrix of
             hematoxylin at distances 1, 2, 4, 8, both axes pooled. Haralick, Shanmugam & Dinstein, IEEE
             SMC 3 (1973) 610.
pyramid      log energy of four bands of a Laplacian pyramid (3 x 3 means) of each stain channel. Burt &
             Adelson, IEEE Trans. Commun. 31 (1983) 532.
gradient     mean and deviation of the hematoxylin gradient, coherence of its structure tensor, global and
             local, half size. Bigün & Granlund, ICCV (1987) 433.
blob         number, area and compactness of connected regions darker than Otsu's hematoxylin threshold,
             half size. Otsu, IEEE SMC 9 (1979) 62.
ring         mean and standard deviation of hematoxylin and eosin in four rings around the centre (equal
             steps of the Chebyshev radius), half size.
============ ====================================================================================
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from eosin.encoders.registry import TEXTURE, get_spec
from eosin.errors import GeometryError

Bytes = NDArray[Any]  # uint8; OpenCV declares wider types
Floats = NDArray[np.float32]

MIN_TILE_PX = 32
"""The smallest tile: four halvings and a distance of 8 pixels must fit."""
PERCENTILES = (5, 25, 50, 75, 95)
LBP_RADII = (1, 2, 4)
GLCM_DISTANCES = (1, 2, 4, 8)
PYRAMID_BANDS = 4
RINGS = 4

# Ruifrok & Johnston (2001): optical densities of hematoxylin and eosin in R, G, B; the third row is orthogonal to both.
HEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
# One grey step of a stain plane is 1 / 160 of an optical density; the offsets make room for negative densities.
STEPS_PER_OD = 160.0
PLANE_OFFSETS = (32.0, 32.0, 128.0)

TEXTURE_DIM = 3 * (3 + len(PERCENTILES)) + 9 + 2 * 10 * len(LBP_RADII) + 5 * len(GLCM_DISTANCES)
TEXTURE_DIM += 3 * PYRAMID_BANDS + 4 + 8 + 2 * 2 * RINGS


def _unmixing() -> tuple[Floats, Floats]:
    """Return the optical density of each byte (256, 1) and the affine map (3, 4) from RGB densities to planes."""
    densities = -np.log10(np.maximum(np.arange(256), 1) / 255.0)
    stains = np.array([HEMATOXYLIN, EOSIN, np.cross(HEMATOXYLIN, EOSIN)])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    linear = np.linalg.inv(stains).T * STEPS_PER_OD  # density (3,) = amounts (3,) @ stains
    affine = np.hstack([linear, np.array(PLANE_OFFSETS)[:, None]])
    return densities.astype(np.float32)[:, None], affine.astype(np.float32)


def _uniform_bins() -> NDArray[np.intp]:
    """Return the rotation-invariant uniform bin (0-9) of each 8-bit pattern: Ojala et al. (2002), eq. 9."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), 9).astype(np.intp)


DENSITIES, UNMIX = _unmixing()
UNIFORM_BINS = _uniform_bins()
# Neighbours in the order of the angle, as (down, right) steps of one radius.
NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))
LEVELS = np.arange(256, dtype=np.float64)


class TextureEncoder:
    """Hand-made features behind the encoder's interface: `.spec`, `.encode`, `.runtime`.

    Attributes:
        spec: what it is and how wide its features are.
    """

    def __init__(self) -> None:
        """Make the encoder; it has no weights and no settings."""
        self.spec = get_spec(TEXTURE)

    def encode(self, tiles: Bytes) -> Floats:
        """Return the features of each tile; row i depends on tile i only.

        Args:
            tiles: uint8 RGB (B, H, W, 3), H and W >= 32.

        Returns:
            float32 (B, D), finite.

        Raises:
            GeometryError: the array is not uint8 (B, H, W, 3) or is too small.
        """
        tiles = np.asarray(tiles)
        if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.dtype != np.uint8:
            raise GeometryError(f"tiles are {tiles.dtype} {tiles.shape}; needed: uint8 (B, H, W, 3)")
        if min(tiles.shape[1:3]) < MIN_TILE_PX:
            raise GeometryError(f"tiles of {tiles.shape[2]} x {tiles.shape[1]} px; needed: at least {MIN_TILE_PX} px")
        rows = np.empty((len(tiles), TEXTURE_DIM), np.float32)
        for row, tile in zip(rows, tiles, strict=True):
            row[:] = texture_features(np.ascontiguousarray(tile))
        return rows

    def runtime(self) -> dict[str, str]:
        """Return what ran: backend, precision, device and library versions."""
        return {
            "backend": "numpy",
            "precision": "fp32",
            "device": "cpu",
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        }


def texture_features(tile: Bytes) -> Floats:
    """Return the features (D,) of one RGB tile (H, W, 3) in the order of the module's table."""
    stains = stain_image(tile)
    planes = list(cv2.split(stains))
    hematoxylin, grey = planes[0], cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
    half_stains, half_tile = _halved(stains), _halved(tile)
    half_hematoxylin = np.ascontiguousarray(half_stains[..., 0])
    lab = cv2.split(cv2.cvtColor(half_tile, cv2.COLOR_RGB2LAB))
    parts = [
        *(_plane_statistics(_histogram(p), offset) for p, offset in zip(planes, PLANE_OFFSETS, strict=True)),
        *(_moments(_histogram(plane)) / 64.0 for plane in lab),
        *(np.sqrt(lbp_histogram(plane, radius)) for plane in (hematoxylin, grey) for radius in LBP_RADII),
        cooccurrence_features(hematoxylin),
        *(np.log10(1e-3 + np.sqrt(band_energies(plane)) / STEPS_PER_OD) + 3.0 for plane in planes),
        _gradient_features(half_hematoxylin),
        _blob_features(half_hematoxylin),
        _ring_features(half_stains),
    ]
    return np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)


def stain_image(tile: Bytes) -> Bytes:
    """Return hematoxylin, eosin and residual optical densities of a tile as bytes (H, W, 3).

    Beer-Lambert: the density d = -log10(I / 255) of a pixel is amounts @ stains with unit stain vectors; the amounts
    are d @ inverse(stains) (Ruifrok & Johnston 2001). A byte is 160 * amount + offset (32, 32, 128), rounded and cut
    to 0-255. The third vector is the cross product of the first two.
    """
    amounts = cv2.transform(cv2.LUT(tile, DENSITIES), UNMIX)
    return cv2.multiply(amounts, np.ones(4), dtype=cv2.CV_8U)  # rounds and saturates


def lbp_histogram(plane: Bytes, radius: int) -> NDArray[np.float64]:
    """Return the riu2 histogram (10,) of local binary patterns of a plane (H, W), sum 1.

    The eight neighbours lie on the square of half-side `radius`; one is set if it is >= the centre. Bins 0-8 count
    the set neighbours of uniform patterns, bin 9 holds the others (Ojala et al. 2002, eq. 9). Pixels nearer than
    `radius` to the border are centres of nothing.
    """
    height, width = plane.shape
    flat = np.ravel(plane)
    margin = radius * (width + 1)
    centre = flat[margin:-margin]
    code = np.zeros(centre.size, np.uint8)
    # Rows are compared as one line, so that neighbours of border pixels wrap around: these are cut off below.
    for down, right in NEIGHBOURS:
        start = margin + radius * (down * width + right)
        code += code
        code |= (flat[start : start + centre.size] >= centre).view(np.uint8)
    whole = np.empty(flat.size, np.uint8)
    whole[margin:-margin] = code
    code = whole.reshape(height, width)[radius:-radius, radius:-radius]
    return np.bincount(UNIFORM_BINS, weights=_histogram(code), minlength=10) / code.size


def cooccurrence_matrices(plane: Bytes) -> NDArray[np.float64]:
    """Return symmetric co-occurrence matrices (distances, 16, 16), each with sum 1, of a plane cut to 16 levels.

    Steps of `distance` pixels along both axes are pooled.
    """
    high = plane & np.uint8(0xF0)
    low = plane >> np.uint8(4)
    pooled = np.empty((len(GLCM_DISTANCES), 256))
    for index, d in enumerate(GLCM_DISTANCES):
        pooled[index] = _histogram(high[:, :-d] | low[:, d:]) + _histogram(high[:-d] | low[d:])
    matrices = pooled.reshape(-1, 16, 16)
    matrices = matrices + matrices.transpose(0, 2, 1)
    return matrices / matrices.sum(axis=(1, 2), keepdims=True)


def cooccurrence_features(plane: Bytes) -> NDArray[np.float64]:
    """Return contrast, correlation, energy, homogeneity and entropy for each distance, (5, distances).

    Haralick et al. (1973) f1-f3, f5, f9 with levels 0-15: contrast / 15, correlation (1 where the plane is constant),
    energy = root of the angular second moment, sum p / (1 + (i - j)^2), entropy / log(256).
    """
    p = cooccurrence_matrices(plane)
    level = np.arange(16.0)
    apart = (level[:, None] - level) ** 2
    marginal = p.sum(axis=2)
    mean = (marginal * level).sum(axis=1)
    variance = (marginal * level**2).sum(axis=1) - mean**2
    contrast = (p * apart).sum(axis=(1, 2))
    flat = variance < 1e-9
    correlation = np.where(flat, 1.0, 1.0 - contrast / np.where(flat, 1.0, 2.0 * variance))  # symmetric p
    energy = np.sqrt((p * p).sum(axis=(1, 2)))
    homogeneity = (p / (1.0 + apart)).sum(axis=(1, 2))
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=(1, 2)) / np.log(256.0)
    return np.stack([contrast / 15.0, correlation, energy, homogeneity, entropy])


def _histogram(plane: Bytes) -> NDArray[np.float64]:
    """Return how often each byte occurs, (256,)."""
    return cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.float64)


def _halved(image: NDArray) -> NDArray:
    """Return the image at half its size, by area."""
    return cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)


def _moments(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return mean, standard deviation and signed cube root of the third central moment (3,), in grey steps."""
    share = histogram / histogram.sum()
    mean = (share * LEVELS).sum()
    centred = LEVELS - mean
    second, third = (share * centred**2).sum(), (share * centred**3).sum()
    return np.array([mean, np.sqrt(second), np.cbrt(third)])


def _plane_statistics(histogram: NDArray[np.float64], offset: float) -> NDArray[np.float64]:
    """Return moments (3) and percentiles (5) of one stain plane as optical densities."""
    cumulative = np.cumsum(histogram)
    ranks = np.ceil(np.array(PERCENTILES) / 100.0 * cumulative[-1])
    moments = _moments(histogram)
    moments[0] -= offset
    percentiles = np.searchsorted(cumulative, ranks) - offset
    return np.concatenate([moments, percentiles]) / STEPS_PER_OD


def band_energies(plane: Bytes) -> NDArray[np.float64]:
    """Return the mean square of each band of a Laplacian pyramid of a plane (H, W), (bands,), finest first.

    Band k is level k minus its 3 x 3 mean (mirrored at the border); level k + 1 is level k at half its size, by area;
    both are rounded to bytes. Bands keep their level's size: without that, the doubled chroma pixels of JPEG 4:2:0
    make the energy depend on whether the tile begins at an odd or an even pixel.
    """
    energies = np.empty(PYRAMID_BANDS)
    for band in range(PYRAMID_BANDS):
        energies[band] = cv2.norm(plane, cv2.blur(plane, (3, 3)), cv2.NORM_L2SQR) / plane.size
        plane = _halved(plane)
    return energies


def _gradient_features(plane: Bytes) -> NDArray[np.float64]:
    """Return mean and deviation of |gradient| (density per px), global and mean local coherence of its tensor (4,).

    With tensor J = sum of g g', coherence is sqrt((Jxx - Jyy)^2 + 4 Jxy^2) / (Jxx + Jyy): 0 for no direction, 1 for
    one; local sums run over squares of 8 px and are weighted with their trace.
    """
    gx = cv2.Sobel(plane, cv2.CV_32F, 1, 0, scale=0.125)
    gy = cv2.Sobel(plane, cv2.CV_32F, 0, 1, scale=0.125)
    magnitude = cv2.magnitude(gx, gy)
    mean, deviation = cv2.meanStdDev(magnitude)
    tensor = cv2.merge([gx * gx - gy * gy, 2.0 * gx * gy, magnitude * magnitude])
    across, along, trace = (float(v) for v in cv2.mean(tensor)[:3])
    cells = (max(1, plane.shape[1] // 8), max(1, plane.shape[0] // 8))
    local = cv2.resize(tensor, cells, interpolation=cv2.INTER_AREA)
    directed = float(np.hypot(local[..., 0], local[..., 1]).mean(dtype=np.float64))
    total = float(local[..., 2].mean(dtype=np.float64))
    coherence = np.hypot(across, along) / trace if trace > 1e-6 else 0.0
    local_coherence = directed / total if total > 1e-6 else 0.0
    steepness = np.array([mean[0, 0], deviation[0, 0]]) * 10.0 / STEPS_PER_OD
    return np.array([*steepness, coherence, local_coherence])


def _blob_features(plane: Bytes) -> NDArray[np.float64]:
    """Return eight numbers on nuclei-like blobs: 8-connected regions of >= 4 px above the hematoxylin threshold.

    Threshold: Otsu's of the blurred plane, at least 0.15 optical density. In order: log10(1 + blobs per megapixel) / 4,
    share of area in blobs, roots of mean, deviation and largest blob area over the tile's area, mean share of its box
    that a blob fills, mean density inside minus outside, threshold.
    """
    smooth = cv2.GaussianBlur(plane, (5, 5), 0)
    otsu, _ = cv2.threshold(smooth, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    threshold = max(otsu, PLANE_OFFSETS[0] + 0.15 * STEPS_PER_OD)
    _, binary = cv2.threshold(smooth, threshold, 255, cv2.THRESH_BINARY)
    _, _, regions, _ = cv2.connectedComponentsWithStats(binary, connectivity=8)
    regions = regions[1:].astype(np.float64)
    regions = regions[regions[:, cv2.CC_STAT_AREA] >= 4]
    level = (threshold - PLANE_OFFSETS[0]) / STEPS_PER_OD
    if not len(regions):
        return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, level])
    areas = np.sort(regions[:, cv2.CC_STAT_AREA])
    filled = np.sort(regions[:, cv2.CC_STAT_AREA] / (regions[:, cv2.CC_STAT_WIDTH] * regions[:, cv2.CC_STAT_HEIGHT]))
    inside = cv2.mean(plane, binary)[0]
    outside = cv2.mean(plane, cv2.bitwise_not(binary))[0]
    return np.array(
        [
            np.log10(1.0 + 1e6 * len(areas) / plane.size) / 4.0,
            areas.sum() / plane.size,
            np.sqrt(areas.mean() / plane.size),
            np.sqrt(areas.std() / plane.size),
            np.sqrt(areas[-1] / plane.size),
            filled.mean(),
            (inside - outside) / STEPS_PER_OD,
            level,
        ]
    )


@lru_cache(maxsize=8)
def _ring_masks(height: int, width: int) -> tuple[Bytes, ...]:
    """Return one byte mask (H, W) a ring: Chebyshev distance to the centre over half the side, in equal steps."""
    rows = np.abs(2 * np.arange(height) + 1 - height) / height
    columns = np.abs(2 * np.arange(width) + 1 - width) / width
    ring = (np.maximum(rows[:, None], columns) * RINGS).astype(np.uint8)
    return tuple((ring == index).astype(np.uint8) for index in range(RINGS))


def _ring_features(stains: Bytes) -> NDArray[np.float64]:
    """Return mean and standard deviation (optical density) of hematoxylin and eosin in each ring, (rings, 2, 2)."""
    masks = _ring_masks(*stains.shape[:2])
    rings = np.array([cv2.meanStdDev(stains, mask=mask) for mask in masks], np.float64)[:, :, :2, 0]
    rings[:, 0] -= PLANE_OFFSETS[0]
    return rings / STEPS_PER_OD
