"""ICC colour conversion, opt-in."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from eosin.errors import CorruptSlideError
from eosin.slides.backend import Pixels

IccTransform = Callable[[Pixels], Pixels]


def icc_transform(profile: bytes | None, name: str) -> IccTransform | None:
    """Return the conversion of (h, w, 3 or 4) from `profile` to sRGB, or None without a profile.

    Perceptual intent; alpha is left as it is.

    Raises:
        CorruptSlideError: the profile cannot be used.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise CorruptSlideError(f"{name}: its ICC profile cannot be used ({error}); open it with icc=False") from error

    def convert(pixels: Pixels) -> Pixels:
        image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
        converted = ImageCms.applyTransform(image, transform)
        assert converted is not None
        rgb = np.asarray(converted)
        return rgb if pixels.shape[2] == 3 else np.concatenate([rgb, pixels[..., 3:]], axis=2)

    return convert
