"""Plain images and arrays as slides of one level."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from eosin.errors import CorruptSlideError, UnsupportedSlideError
from eosin.slides.backend import WHITE, Pixels, read_padded, to_rgb
from eosin.slides.ledger import MppLedger

MAX_PIXELS = 500_000_000
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class ImageBackend:
    """A whole image in memory."""

    def __init__(self, pixels: Pixels, *, reader: str, properties: dict[str, str], icc_profile: bytes | None) -> None:
        """Wrap `pixels`, uint8 (H, W, 3) or (H, W, 4)."""
        height, width = pixels.shape[:2]
        self._pixels = pixels
        self.reader = reader
        self.properties = properties
        self.level_sizes = ((width, height),)
        self.level_scales = ((1,),)
        self.bounds = (0, 0, width, height)
        self.background = WHITE
        self.mpp = MppLedger()
        self.associated: tuple[str, ...] = ()
        self.icc_profile = icc_profile

    @classmethod
    def open(cls, path: Path) -> ImageBackend:
        """Read a PNG, JPEG or another plain image; its dpi says nothing about a slide and is not used.

        Raises:
            UnsupportedSlideError: not an image, more than 8 bits, or more than 500 megapixels.
            CorruptSlideError: the image is broken off.
        """
        with warnings.catch_warnings():
            # Pillow warns above 89 megapixels; the limit that holds here is MAX_PIXELS.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                image = Image.open(path)
            except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise UnsupportedSlideError(f"{path}: Pillow does not know this format") from error
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnsupportedSlideError(
                    f"{path}: {width} x {height} pixels do not fit in memory; convert it to a tiled, pyramidal TIFF"
                )
            if image.mode not in _MODES:
                raise UnsupportedSlideError(
                    f"{path}: the image's mode is {image.mode}; 8-bit grey, RGB or RGBA is needed"
                )
            has_alpha = "A" in image.mode or "transparency" in image.info
            try:
                pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                raise CorruptSlideError(f"{path}: the image cannot be decoded: {error}") from error
            properties = {"image.format": str(image.format), "image.mode": image.mode}
            profile = image.info.get("icc_profile")
        return cls(pixels, reader=f"pillow {PIL.__version__}", properties=properties, icc_profile=profile)

    @classmethod
    def from_array(cls, array: npt.NDArray[np.uint8]) -> ImageBackend:
        """Wrap an array: uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

        Raises:
            UnsupportedSlideError: another dtype or shape.
        """
        good = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
        if array.dtype != np.uint8 or not good or array.size == 0:
            raise UnsupportedSlideError(
                f"an array of {array.dtype} {array.shape} is no slide; uint8 (H, W, 3) is needed"
            )
        return cls(to_rgb(array), reader=f"numpy {np.__version__}", properties={}, icc_profile=None)

    def associated_image(self, name: str) -> Pixels:
        """Raise KeyError: a plain image has none."""
        raise KeyError(name)

    def read_region(self, xy_px: tuple[int, int], *, level: int, scale: int, size_px: tuple[int, int]) -> Pixels:
        """Return a region of the read frame; see `Backend.read_region`."""

        def inside(xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
            return self._pixels[xy[1] : xy[1] + size[1], xy[0] : xy[0] + size[0]]

        return read_padded(inside, xy_px=xy_px, size_px=size_px, frame_px=self.level_sizes[level])

    def close(self) -> None:
        """Do nothing: no file is held open."""
