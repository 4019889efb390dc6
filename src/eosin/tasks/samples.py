"""One feature vector a row of a cohort: from a feature store, from a folder of images, or from an array."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from eosin.cohort.reading import row_phrase
from eosin.cohort.table import Cohort
from eosin.errors import CohortError, NonFiniteError, StoreCorruptError, StoreError
from eosin.features.store import Features, FeatureStore
from eosin.features.writer import write_durably

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

ARRAYS = (".npy", ".npz")
BATCH = 64
LISTED = 8
# Modes whose conversion to 8-bit RGB loses nothing that an encoder could see.
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class ImageEncoder(Protocol):
    """What is needed of an encoder."""

    @property
    def spec(self) -> Any:
        """Its `EncoderSpec`."""
        ...

    def encode(self, tiles: Pixels, /) -> Floats:
        """Return (B, D) features of uint8 tiles (B, H, W, 3)."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Samples:
    """Features with the rows they belong to.

    Attributes:
        x: (n, D) float32, finite; row i belongs to row i of the cohort.
        cohort: the table.
        encoder: what made the features: `EncoderSpec.to_dict()`, or name and sha256 of an array's file.
        source: "store", "images" or "array".
        pictures: (n,) image file of each row, None where features came without pictures.
        notes: what was done to get them, in sentences.
    """

    x: Floats
    cohort: Cohort
    encoder: dict[str, Any]
    source: str
    pictures: tuple[Path, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return n."""
        return len(self.x)

    @property
    def name(self) -> str:
        """Name of the encoder."""
        return str(self.encoder["name"])


def read_samples(
    features: Path | str, cohort: Cohort, *, encoder: str | None = None, cache: Path | None = None
) -> Samples:
    """Return the features of each row of a cohort.

    A store gives the tile at (x, y) where a row has a position, else the mean of the slide's kept tiles. A folder of
    images gives what `encoder` makes of each row's ``file``; transparent pixels become white, and an image is resized
    once (bicubic, antialiased) to the input the encoder was released for. An array has its rows in the cohort's order.

    Args:
        features: a feature store, a folder of images, or .npy / .npz.
        cohort: the table.
        encoder: name of an encoder for images (see `load_encoder`), or an .npy / .npz file of features made elsewhere.
        cache: folder that keeps features of images; used again only for the same encoder, weights and bytes.

    Raises:
        CohortError: rows without a slide, tile or image, or an array of another length.
        StoreError: no store, images or array there.
        NonFiniteError: NaN or infinity among the features.
    """
    features = Path(features)
    if encoder is not None and encoder.endswith(ARRAYS):
        folder = features if features.is_dir() and "file" in cohort.table else None
        return _from_array(Path(encoder), cohort, folder)
    if features.suffix in ARRAYS:
        return _from_array(features, cohort, None)
    if (features / "manifest.json").is_file():
        store = FeatureStore.open(features)
        made_by = store.recipe.encoder.get("name")
        if encoder not in (None, made_by):
            raise CohortError(f"{features} holds features of {made_by!r}, not of {encoder!r}; leave --encoder out")
        return from_store(store, cohort)
    if not features.is_dir():
        raise StoreError(f"{features}: needed a feature store, a folder of images, or an .npy / .npz file")
    if encoder is None:
        raise CohortError(
            f"{features} is no feature store (no manifest.json); if it is a folder of images, say which encoder reads "
            "them: --encoder NAME, such as texture or dinov2-vits14"
        )
    return _from_images(features, cohort, encoder, cache)


def from_store(store: FeatureStore, cohort: Cohort) -> Samples:
    """Return the features that a store holds of each row; see `read_samples`."""
    table = cohort.table
    where: dict[str, list[int]] = {}
    for at, name in enumerate(table["slide_id"].fillna("").astype(str)):
        where.setdefault(name, []).append(at)
    has_xy = table["x"].notna().to_numpy() if "x" in table else np.zeros(len(table), bool)
    xy = table[["x", "y"]].to_numpy(dtype=np.float64) if "x" in table else np.zeros((len(table), 2))
    x: Floats | None = None
    missing, lost, bare = [], [], []
    for name, rows in where.items():
        slide = _slide(store, name)
        if slide is None:
            missing.append(name or "(no slide_id)")
            continue
        x = np.empty((len(table), slide.x.shape[1]), np.float32) if x is None else x
        tiles = {(float(a), float(b)): i for i, (a, b) in enumerate(slide.xy.tolist())}
        whole = [at for at in rows if not has_xy[at]]
        if whole and not slide.kept.any():
            bare.append(name)
        elif whole:
            x[whole] = slide.x[slide.kept].mean(axis=0, dtype=np.float64)
        for at in (at for at in rows if has_xy[at]):
            tile = tiles.get((xy[at, 0], xy[at, 1]))
            if tile is None:
                lost.append(at)
            else:
                x[at] = slide.x[tile]
    _refuse(store, cohort, missing=missing, lost=lost, bare=bare)
    assert x is not None
    notes = [f"{int((~has_xy).sum())} rows are the mean of their slide's kept tiles"] if (~has_xy).any() else []
    encoder = {**store.recipe.encoder, "recipe_hash": store.recipe.hash}
    return Samples(x=_finite(x, cohort), cohort=cohort, encoder=encoder, source="store", notes=tuple(notes))


def _slide(store: FeatureStore, name: str) -> Features | None:
    """Return a slide's features, None where the store has no such slide; a damaged file raises."""
    try:
        return store[name] if name else None
    except StoreCorruptError:
        raise
    except StoreError:
        return None


def _refuse(store: FeatureStore, cohort: Cohort, *, missing: list[str], lost: list[int], bare: list[str]) -> None:
    if missing:
        failed = {one["slide_id"] for one in store.failures()}
        why = " (some of them failed: see eosin verify)" if failed & set(missing) else ""
        raise CohortError(
            f"{len(missing)} slides of {cohort.source} are not in {store.path}: {_listed(missing)}{why}; extract them, "
            "or take their rows out and say how many"
        )
    if lost:
        numbers = cohort.table.index[lost]
        raise CohortError(
            f"{cohort.source}, {row_phrase(numbers)}: {len(lost)} rows name an (x, y) at which {store.path} has no "
            "tile; positions are level-0 top-left corners as extraction wrote them"
        )
    if bare:
        raise CohortError(f"{len(bare)} slides have no tile that QC kept: {_listed(bare)}; take their rows out")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _finite(x: Floats, cohort: Cohort) -> Floats:
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        numbers = cohort.table.index[bad]
        raise NonFiniteError(f"{cohort.source}, {row_phrase(numbers)}: {len(bad)} feature rows hold NaN or infinity")
    return x


def _from_array(path: Path, cohort: Cohort, folder: Path | None) -> Samples:
    try:
        with path.open("rb") as stream:
            x = _one_array(np.load(stream, allow_pickle=False), path)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        if isinstance(error, CohortError):
            raise
        raise StoreError(f"{path} cannot be read as an array ({error})") from error
    if x.ndim != 2 or x.dtype.kind != "f":
        raise CohortError(f"{path} holds {x.dtype} of shape {x.shape}; needed floats (n, D)")
    if len(x) != len(cohort):
        raise CohortError(f"{path} has {len(x)} rows and {cohort.source} {len(cohort)}; needed one a row, in its order")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    encoder = {"name": path.stem, "dim": x.shape[1], "source": f"file:{path.name}", "sha256": digest}
    x = _finite(np.ascontiguousarray(x, dtype=np.float32), cohort)
    pictures = None if folder is None else tuple(_image_files(folder, cohort))
    return Samples(x=x, cohort=cohort, encoder=encoder, source="array", pictures=pictures)


def _one_array(found: Any, path: Path) -> npt.NDArray[Any]:
    """Return what `numpy.load` gave, or the array called "features" or alone in an .npz file."""
    if isinstance(found, np.ndarray):
        return found
    names = found.files
    name = "features" if "features" in names else names[0] if len(names) == 1 else None
    if name is None:
        raise CohortError(f"{path} holds {_listed(names)}; needed one array, or one called 'features'")
    return found[name]


def _from_images(folder: Path, cohort: Cohort, name: str, cache: Path | None) -> Samples:
    from eosin.encoders import load_encoder  # torch is needed here only

    files = _image_files(folder, cohort)
    encoder = load_encoder(name)
    spec = encoder.spec.to_dict()
    target = encoder.spec.input_px if encoder.spec.patch_px else None
    side = _side(files[0])
    note = f"{spec['name']}: images of {side} px" + (f", resized to {target} px" if target not in (None, side) else "")
    key = _cache_key(spec, files)
    kept = None if cache is None else cache / f"features_{safe_name(name)}.npz"
    x = None if kept is None else _cached(kept, key)
    if x is None:
        x = encode_images(files, encoder, target_px=target)
        if kept is not None:
            _keep(kept, x, key, spec)
    return Samples(
        x=_finite(x, cohort), cohort=cohort, encoder=spec, source="images", pictures=tuple(files), notes=(note,)
    )


def safe_name(name: str) -> str:
    """Return an encoder's name as a file name."""
    return re.sub(r"[^A-Za-z0-9.@-]+", "-", Path(name).stem if name.endswith(ARRAYS) else name).strip("-")


def _image_files(folder: Path, cohort: Cohort) -> list[Path]:
    """Return the image of each row.

    Raises:
        CohortError: no column file, or rows whose file is not there.
    """
    files = [folder / name for name in cohort.values("file").tolist()]
    lost = [at for at, path in enumerate(files) if not path.is_file()]
    if lost:
        raise CohortError(
            f"{cohort.source}, {row_phrase(cohort.table.index[lost])}: {len(lost)} images are not in {folder}, first "
            f"{files[lost[0]].relative_to(folder)}; files are given relative to that folder"
        )
    return files


def _side(path: Path) -> int:
    with _opened(path) as image:
        return image.size[0]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError) as error:
        raise CohortError(f"{path} cannot be read as an image ({error})") from error


def encode_images(files: list[Path], encoder: ImageEncoder, *, target_px: int | None) -> Floats:
    """Return features (n, D) of image files, square and all of one size.

    Args:
        files: n images of 8 bits a channel; transparent pixels are composited on white.
        encoder: what makes the features.
        target_px: side to resize to (bicubic, antialiased); None leaves images as they are.

    Raises:
        CohortError: an image that cannot be read, is not square, or of another size than the first.
    """
    side = _side(files[0])
    parts = []
    for start in range(0, len(files), BATCH):
        tiles = np.stack([read_image(path, side_px=side, target_px=target_px) for path in files[start : start + BATCH]])
        parts.append(encoder.encode(tiles))
    return np.concatenate(parts).astype(np.float32, copy=False)


def read_image(path: Path, *, side_px: int, target_px: int | None) -> Pixels:
    """Return one image as uint8 RGB (side, side, 3), on white where it is transparent."""
    with _opened(path) as image:
        if image.size != (side_px, side_px):
            raise CohortError(
                f"{path} has {image.size[0]} x {image.size[1]} px; needed {side_px} x {side_px}, all alike"
            )
        if image.mode not in EIGHT_BIT:
            raise CohortError(f"{path} is of mode {image.mode}; needed 8 bits a channel")
        try:
            rgba = image.convert("RGBA")
        except (OSError, SyntaxError) as error:
            raise CohortError(f"{path} cannot be decoded ({error})") from error
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if target_px not in (None, side_px):
        rgb = rgb.resize((target_px, target_px), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _cache_key(spec: Mapping[str, Any], files: list[Path]) -> str:
    """Return a hash of the encoder, its weights and the bytes of every image in order."""
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True, default=str).encode())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _cached(path: Path, key: str) -> Floats | None:
    """Return the features kept in `path`, None where there are none of this key."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
            return found["features"] if str(found["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _keep(path: Path, x: Floats, key: str, spec: Mapping[str, Any]) -> None:
    write_durably(
        path, npz_bytes({"features": x, "key": np.array(key), "encoder": np.array(json.dumps(spec, default=str))})
    )


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return arrays as the bytes of an .npz file."""
    file = io.BytesIO()
    np.savez(file, **dict(arrays))  # pyright: ignore[reportArgumentType]
    return file.getvalue()
