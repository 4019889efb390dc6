"""Feature files in HDF5: TRIDENT, CLAM, STAMP, AtlasPatch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from eosin.errors import ConvertError, MissingDependencyError, NonFiniteError
from eosin.features.convert_types import (
    CARD,
    ForeignFeatures,
    card_fields,
    corners,
    microns_to_px,
    need,
    new_file,
    number,
    whole,
    word,
)
from eosin.features.writer import stem

# The oldest STAMP whose readers take this layout; STAMP refuses files of a newer version than itself.
STAMP_VERSION = "2.0.0"


def h5_format(path: Path) -> str | None:
    """Return which tool's layout an HDF5 file has; None when it holds no tile features.

    Raises:
        ConvertError: not HDF5, or truncated.
    """
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if file.attrs.get("format") == "eosin-features":
                return "eosin"
            if "coords" not in file:
                return None
            if "feats" in file:
                return "stamp"
            if isinstance(file.get("features"), h5py.Group):
                return "atlaspatch"
            if "features" not in file:
                return None
            return "trident" if "patch_size_level0" in file["coords"].attrs else "clam"
    except OSError as error:
        raise ConvertError(f"{path} cannot be read as HDF5: {error}") from error


def read_h5(
    path: Path,
    name: str,
    fmt: str,
    *,
    slide_mpp: tuple[float, float] | None,
    coord_unit: str | None,
    encoder: str | None,
) -> ForeignFeatures:
    """Read one file of format `fmt` (see `eosin.features.convert.convert` for the options).

    Raises:
        ConvertError: datasets or units are not what the format says.
    """
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if fmt == "atlaspatch":
                return _read_atlaspatch(file, name, encoder)
            if fmt == "stamp":
                return _read_stamp(file, name, slide_mpp, coord_unit)
            return _read_trident(file, name, slide_mpp)
    except (OSError, KeyError) as error:
        raise ConvertError(f"{path} is not a whole {fmt} file: {error}") from error


def _array(file: h5py.Group, key: str) -> npt.NDArray[Any]:
    item = file[key]
    if not isinstance(item, h5py.Dataset):
        raise KeyError(f"{key} is not a dataset")
    return item[...]


def _read_trident(file: h5py.File, name: str, slide_mpp: tuple[float, float] | None) -> ForeignFeatures:
    """TRIDENT, and CLAM, which is the same two datasets without attributes."""
    coords, features = dict(file["coords"].attrs), dict(file["features"].attrs)
    tile_px, side0 = whole(coords, "patch_size"), number(coords, "patch_size_level0")
    size = whole(coords, "level0_width"), whole(coords, "level0_height")
    mpp = None
    if slide_mpp and side0 and tile_px:
        mpp = side0 * float(np.sqrt(slide_mpp[0] * slide_mpp[1])) / tile_px
    found: dict[str, Any] = {
        "name": name,
        "encoder": word(features, "encoder"),
        "mpp": mpp,
        "tile_px": tile_px,
        "size0_px": (side0, side0) if side0 else None,
        "overlap_px": whole(coords, "overlap"),
        "slide_size_px": size if None not in size else None,
        "slide_mpp": slide_mpp,
    }
    found.update(card_fields(file.attrs.get(CARD)))
    return ForeignFeatures(x=_array(file, "features"), xy=corners(_array(file, "coords"), name), **found)


def _read_stamp(
    file: h5py.File, name: str, slide_mpp: tuple[float, float] | None, coord_unit: str | None
) -> ForeignFeatures:
    attributes = dict(file.attrs)
    if word(attributes, "feat_type") not in ("", "tile"):
        raise ConvertError(f"{name}: holds {word(attributes, 'feat_type')} features, not tiles")
    card = card_fields(attributes.get(CARD))
    slide_mpp = slide_mpp or card.get("slide_mpp")
    unit = word(attributes, "unit") or coord_unit
    if unit not in ("um", "px"):
        raise ConvertError(
            f"{name}: the file does not say whether coords are microns or level-0 pixels; "
            "give coord_unit='um' or coord_unit='px'"
        )
    coords = _array(file, "coords")
    if unit == "um" and slide_mpp is None:
        raise ConvertError(f"{name}: coords are microns; to make them level-0 pixels give the slide's mpp (slide_mpp=)")
    side_um, tile_px = number(attributes, "tile_size_um"), whole(attributes, "tile_size_px")
    found: dict[str, Any] = {
        "name": name,
        "encoder": word(attributes, "extractor"),
        "mpp": side_um / tile_px if side_um and tile_px else None,
        "tile_px": tile_px,
        "size0_px": (side_um / slide_mpp[0], side_um / slide_mpp[1]) if side_um and slide_mpp else None,
        "slide_mpp": slide_mpp,
    }
    found.update({**card, "slide_mpp": slide_mpp})
    xy = microns_to_px(coords, slide_mpp) if unit == "um" and slide_mpp else corners(coords, name)
    return ForeignFeatures(x=_array(file, "feats"), xy=xy, **found)


def _read_atlaspatch(file: h5py.File, name: str, encoder: str | None) -> ForeignFeatures:
    group, coords, attributes = file["features"], _array(file, "coords"), dict(file.attrs)
    if not isinstance(group, h5py.Group):
        raise KeyError("features is not a group")
    names = [str(n) for n in group if not str(n).startswith("__tmp_")]
    if encoder is None and len(names) != 1:
        raise ConvertError(f"{name}: holds {len(names)} encoders ({', '.join(names)}); say which: encoder=")
    encoder = encoder or names[0]
    if encoder not in names:
        raise ConvertError(f"{name}: no encoder {encoder!r}; it holds {', '.join(names)}")
    if coords.ndim != 2 or coords.shape[1] not in (2, 5):
        raise ConvertError(f"{name}: coords have shape {coords.shape}; AtlasPatch writes (n, 5)")
    side0 = number(attributes, "patch_size_level0")
    size = whole(attributes, "level0_width"), whole(attributes, "level0_height")
    found: dict[str, Any] = {
        "name": name,
        "encoder": encoder,
        "tile_px": whole(attributes, "patch_size"),
        "size0_px": (side0, side0) if side0 else None,
        "overlap_px": whole(attributes, "overlap"),
        "slide_size_px": size if None not in size else None,
    }
    found.update({**card_fields(attributes.get(CARD)), "encoder": encoder})
    return ForeignFeatures(x=_array(group, encoder), xy=corners(coords[:, :2], name), **found)


def features_folder(encoder: str) -> str:
    """Return the folder TRIDENT keeps an encoder's features in, for any name of an encoder."""
    return "features_" + (encoder or "unknown").replace("/", "--").replace(":", "--")


def write_trident(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``features_<encoder>/<name>.h5`` and ``patches/<name>_patches.h5``, TRIDENT's names in its folder of tiles.

    Several encoders of the same tiles share the second file.

    Raises:
        ConvertError: the second is there and holds other tiles.
    """
    path, patches = dst / features_folder(item.encoder) / f"{name}.h5", dst / "patches" / f"{name}_patches.h5"
    common = {"name": stem(name), "savetodir": ""}
    attributes = {**common, **_level0_attributes(item)}
    if patches.exists():
        with h5py.File(patches, "r", locking="best-effort") as file:
            if not np.array_equal(_array(file, "coords"), item.xy):
                raise ConvertError(f"{patches} is in the way: it holds other tiles; delete it or give another folder")
    else:
        with new_file(patches) as temporary, h5py.File(temporary, "w") as file:
            _write_coords(file, item, attributes)
    with new_file(path) as temporary, h5py.File(temporary, "w") as file:
        features = file.create_dataset("features", data=item.x, chunks=_chunks(item.x), track_times=False)
        for key, value in {**common, "encoder": item.encoder or None}.items():
            features.attrs[key] = "None" if value is None else value
        _write_coords(file, item, attributes)
        file.attrs[CARD] = item.card()
    return [path, patches]


def _write_coords(file: h5py.File, item: ForeignFeatures, attributes: dict[str, Any]) -> None:
    coords = file.create_dataset("coords", data=item.xy, chunks=_chunks(item.xy), maxshape=(None, 2), track_times=False)
    for key, value in attributes.items():
        coords.attrs[key] = "None" if value is None else value


def write_clam(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``h5_files/<name>.h5`` and ``pt_files/<name>.pt``.

    Raises:
        MissingDependencyError: torch, which the .pt needs, is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError.for_extra("torch", "torch") from error
    h5, pt = dst / "h5_files" / f"{name}.h5", dst / "pt_files" / f"{name}.pt"
    x = item.x.astype(np.float32)
    with new_file(h5) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=x, chunks=_chunks(x), maxshape=(None, x.shape[1]), track_times=False)
        file.create_dataset("coords", data=item.xy, chunks=_chunks(item.xy), maxshape=(None, 2), track_times=False)
        file.attrs[CARD] = item.card()
    with new_file(pt) as temporary:
        torch.save(torch.from_numpy(x), temporary)
    return [h5, pt]


def write_stamp(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``<name>.h5`` with float16 features and coordinates in microns.

    Raises:
        ConvertError: tile size or mpp of tile or slide are unknown.
        NonFiniteError: a feature is too large for float16.
    """
    slide_mpp = need(item.slide_mpp, "slide's mpp (slide_mpp=)", name, "STAMP")
    tile_px, mpp = need(item.tile_px, "tile size", name, "STAMP"), need(item.mpp, "mpp of the tiles", name, "STAMP")
    with np.errstate(over="ignore"):
        x = item.x.astype(np.float16)
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise NonFiniteError(f"{name}: features of tile {row} are too large for STAMP's float16")
    path = dst / f"{name}.h5"
    with new_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("coords", data=item.xy * np.asarray(slide_mpp), track_times=False)
        file.create_dataset("feats", data=x, track_times=False)
        file.attrs.update(
            {
                "stamp_version": STAMP_VERSION,
                "extractor": item.encoder,
                "unit": "um",
                "tile_size_um": tile_px * mpp,
                "tile_size_px": tile_px,
                "code_hash": "",
                "feat_type": "tile",
                CARD: item.card(),
            }
        )
    return [path]


def write_atlaspatch(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``patches/<name>.h5``; each tile is a square of level 0.

    Raises:
        ConvertError: the footprint of a tile is unknown.
    """
    path, size0 = dst / "patches" / f"{name}.h5", need(item.size0_px, "tile size on level 0", name, "AtlasPatch")
    coords = np.zeros((len(item.xy), 5), np.int32)
    coords[:, :2] = item.xy
    coords[:, 2:4] = np.floor(np.asarray(size0) + 0.5)
    with new_file(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("coords", data=coords, chunks=_chunks(coords), maxshape=(None, 5), track_times=False)
        x = item.x.astype(np.float32)
        file.create_dataset(f"features/{item.encoder or 'unknown'}", data=x, chunks=_chunks(x), track_times=False)
        attributes = {**_level0_attributes(item), "wsi_path": "", "num_patches": len(coords), CARD: item.card()}
        file.attrs.update({k: v for k, v in attributes.items() if v is not None})
    return [path]


def _level0_attributes(item: ForeignFeatures) -> dict[str, Any]:
    width, height = item.slide_size_px or (None, None)
    slide_mpp = float(np.sqrt(item.slide_mpp[0] * item.slide_mpp[1])) if item.slide_mpp else None
    return {
        "patch_size": item.tile_px,
        "patch_size_level0": int(np.floor(item.size0_px[0] + 0.5)) if item.size0_px else None,
        "level0_magnification": round(10 / slide_mpp, 2) if slide_mpp else None,
        "target_magnification": round(10 / item.mpp, 2) if item.mpp else None,
        "overlap": item.overlap_px,
        "level0_width": width,
        "level0_height": height,
    }


def _chunks(values: npt.NDArray[Any]) -> tuple[int, int]:
    return (min(512, max(1, len(values))), max(1, values.shape[1]))
