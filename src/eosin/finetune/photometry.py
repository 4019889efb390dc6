"""Light, colour, focus, compression and holes: what scanners and their settings do, with one strength an image.

Every function takes images (B, 3, S, S), float in 0-1, and a tensor (B,) of strengths, draws nothing, and returns new
images. Strengths may lie on the CPU, which saves waiting for a GPU. Brightness, contrast, saturation, hue and grey are
those of torchvision.
"""

from __future__ import annotations

import math

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.nn import functional as F

from eosin.errors import GeometryError

_LUMA = (0.2989, 0.587, 0.114)


def grey(images: Tensor) -> Tensor:
    """Return the luma of ITU-R BT.601 in all three channels."""
    return _luma(images).expand_as(images)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Return images times `factor`, clipped to 0-1."""
    return (images * _each(factor, images)).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return images spread by `factor` about the mean luma of each, clipped to 0-1."""
    mean = _luma(images).mean((1, 2, 3), keepdim=True)
    return (mean + _each(factor, images) * (images - mean)).clamp(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Return images spread by `factor` about the luma of each pixel, clipped to 0-1."""
    luma = _luma(images)
    return (luma + _each(factor, images) * (images - luma)).clamp(0, 1)


def hue(images: Tensor, degrees: Tensor) -> Tensor:
    """Return images with the hue of HSV turned by `degrees`, saturation and value kept."""
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    span = high - low
    red, green, blue = images.split(1, 1)
    sector = torch.where(
        high == red,
        (green - blue) / span.clamp(min=1e-12),
        torch.where(high == green, 2 + (blue - red) / span.clamp(min=1e-12), 4 + (red - green) / span.clamp(min=1e-12)),
    )
    # HSV to RGB: each channel falls from high to low and back as the hue runs once around its six sectors
    start = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device)[:, None, None]
    k = torch.remainder(start + sector + _each(degrees / 60, images), 6)
    return high - span * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, sigma_px: Tensor) -> Tensor:
    """Return images under a Gaussian of standard deviation `sigma_px`, mirrored about their edges.

    The kernel reaches three standard deviations of the widest in the batch.

    Args:
        images: (B, 3, S, S).
        sigma_px: (B,), 0 leaves an image alone.
    """
    reach = _reach(3 * float(sigma_px.max()))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64, device=sigma_px.device)
    kernel = torch.exp(-0.5 * (steps / sigma_px.double()[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(images)
    return _filter(_filter(images, kernel[:, None, :]), kernel[:, :, None])


def defocus(images: Tensor, radius_px: Tensor) -> Tensor:
    """Return images under a disc of `radius_px`: the blur of a plane out of focus, in geometrical optics.

    Args:
        images: (B, 3, S, S).
        radius_px: (B,), up to 0.5 leaves an image alone.
    """
    return _filter(images, disc(radius_px, _reach(float(radius_px.max()))).to(images))


def disc(radius_px: Tensor, reach: int) -> Tensor:
    """Return the kernels (B, 2 reach + 1, 2 reach + 1) of discs, float64, each of sum 1.

    A weight is the share of its pixel that the disc covers, counted on a grid of 8 x 8 points.
    """
    sides = 2 * reach + 1
    steps = (torch.arange(8 * sides, dtype=torch.float64, device=radius_px.device) + 0.5) / 8 - sides / 2
    covered = torch.hypot(steps[:, None], steps) <= radius_px.double()[:, None, None].clamp(min=0.5)
    kernel = covered.reshape(-1, sides, 8, sides, 8).double().mean((2, 4))
    return kernel / kernel.sum((1, 2), keepdim=True)


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Return images after a real JPEG encoder and decoder: libjpeg-turbo on the CPU, by simplejpeg, chroma 4:2:0.

    Pixels are rounded to 8 bits on the way. Images on another device travel to the CPU and back. The encoder uses
    libjpeg's fast transform, whose pixels differ from Pillow's and torchvision's by less than a grey level on average.

    Args:
        images: (B, 3, S, S).
        quality: (B,) whole numbers, 1-100, the scale of libjpeg.
    """
    pixels = (images * 255).round().to("cpu", torch.uint8).movedim(1, 3).contiguous().numpy()
    out = np.empty_like(pixels)
    for at, q in enumerate(quality.tolist()):
        data = simplejpeg.encode_jpeg(pixels[at], quality=int(q), colorspace="RGB", colorsubsampling="420")
        out[at] = simplejpeg.decode_jpeg(data, colorspace="RGB")
    return torch.from_numpy(out).movedim(3, 1).to(images).div_(255)


def dropout(images: Tensor, holes: Tensor) -> Tensor:
    """Return images with rectangles painted in the mean colour of each image (coarse dropout).

    DeVries & Taylor, arXiv 1708.04552, who paint the mean of the data.

    Args:
        images: (B, 3, S, S).
        holes: (B, N, 4), x0, y0, x1, y1 in pixels; a pixel is inside when its centre is. Empty ones paint nothing.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device) + 0.5
    x0, y0, x1, y1 = holes.to(images)[..., None].unbind(2)  # (B, N, 1) each
    columns, rows = (x >= x0) & (x < x1), (y >= y0) & (y < y1)
    inside = (rows[..., :, None] & columns[..., None, :]).any(1)[:, None]
    return torch.where(inside, images.mean((2, 3), keepdim=True), images)


def _luma(images: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W)."""
    return sum(weight * images[:, at : at + 1] for at, weight in enumerate(_LUMA))  # type: ignore[return-value]


def _each(strength: Tensor, images: Tensor) -> Tensor:
    """Return strengths (B,) as (B, 1, 1, 1), of the device and dtype of `images`."""
    return strength.to(images)[:, None, None, None]


def _reach(width: float) -> int:
    """Return how many pixels a kernel of half-width `width` reaches to either side, at least one."""
    return max(1, math.ceil(width))


def _filter(images: Tensor, kernels: Tensor) -> Tensor:
    """Return every image under its own kernel (B, h, w) of odd sides, mirrored about the centres of its edge pixels.

    Raises:
        GeometryError: a kernel reaches as far as the image.
    """
    count, channels, height, width = images.shape
    tall, wide = kernels.shape[1] // 2, kernels.shape[2] // 2
    if tall >= height or wide >= width:
        raise GeometryError(
            f"a blur that reaches {max(tall, wide)} px is too wide for images of {width} x {height} px; blur less"
        )
    padded = F.pad(images, (wide, wide, tall, tall), mode="reflect")
    weights = kernels.repeat_interleave(channels, 0)[:, None]
    out = F.conv2d(padded.reshape(1, count * channels, *padded.shape[2:]), weights, groups=count * channels)
    return out.reshape(count, channels, height, width)
