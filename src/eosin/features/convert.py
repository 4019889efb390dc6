"""Feature files of other tools to eosin's and back.

`convert` finds out what it is given; a reader makes `ForeignFeatures` of each slide and a
writer makes a file of that. Coordinates are never guessed: a unit or an mpp that a file
does not state must be given, or it stays unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eosin.errors import ConvertError, closest
from eosin.features import convert_files as files
from eosin.features import convert_h5 as h5
from eosin.features.convert_spatial import read_spatialdata, write_spatialdata
from eosin.features.convert_types import ForeignFeatures
from eosin.features.store import Features, FeatureStore, Recipe, stem
from eosin.geometry import check_mpp

Writer = Callable[[ForeignFeatures, Path, str], list[Path]]
WRITERS: dict[str, Writer] = {
    "trident": h5.write_trident,
    "clam": h5.write_clam,
    "stamp": h5.write_stamp,
    "atlaspatch": h5.write_atlaspatch,
    "slide2vec": files.write_slide2vec,
    "anndata": files.write_anndata,
    "spatialdata": write_spatialdata,
    "safetensors": files.write_safetensors,
    "npz": files.write_npz,
}
FORMATS = ("eosin", *WRITERS)
# These hold QC columns and reasons; the others would show a rejected tile as a good one.
KEEPS_REASONS = ("eosin", "anndata", "spatialdata", "safetensors", "npz")
_SUFFIXES = {".h5", ".hdf5", ".npz", ".pt", ".h5ad", ".safetensors", ".zarr"}


@dataclass(frozen=True, kw_only=True)
class _Options:
    slide_mpp: tuple[float, float] | None
    coord_unit: str | None
    encoder: str | None


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    slide_mpp: float | tuple[float, float] | None = None,
    coord_unit: str | None = None,
    encoder: str | None = None,
    rejected: bool = False,
) -> list[Path]:
    """Write the features in `src` into the folder `dst` in the format `to`.

    Args:
        src: a feature store, a folder with another tool's files, or one such file.
        dst: folder; made if needed, nothing in it is overwritten.
        to: one of `FORMATS`.
        slide_mpp: microns per level-0 pixel of every slide in `src`, one number or (x, y);
            wins over what the files say; needed to turn STAMP's microns into pixels.
        coord_unit: ``"um"`` or ``"px"`` for STAMP-like files that do not state the unit.
        encoder: which encoder, where a file holds several (AtlasPatch, SpatialData), and the name
            where a file does not say.
        rejected: whether tiles that QC rejected go into formats that cannot mark them.

    Returns:
        The files written, in order.

    Raises:
        ConvertError: unknown or broken input, a missing unit or mpp, or a file in the way.
        MissingDependencyError: a format's package is not installed.
        StoreMismatchError: slides of different recipes converted into one store.
    """
    src, dst = Path(src), Path(dst)
    if to not in FORMATS:
        raise ConvertError(f"unknown format {to!r}; the closest are: {closest(to, FORMATS)}")
    if coord_unit not in (None, "um", "px"):
        raise ConvertError(f"coord_unit is {coord_unit!r}; 'um' or 'px'")
    sources = _sources(src)
    options = _Options(slide_mpp=_pair(slide_mpp), coord_unit=coord_unit, encoder=encoder)
    if to == "eosin":
        if any(fmt == "eosin" for fmt, *_ in sources):
            raise ConvertError(f"{src} is eosin's own format already; copy the folder")
        return [_to_eosin(item, dst, fmt) for fmt, item in _items(sources, options)]
    taken: dict[str, str] = {}
    written: list[Path] = []
    for _, item in _items(sources, options):
        name = str(Path(item.name).with_name(stem(item.name)).as_posix())
        if name in taken:
            raise ConvertError(f"{taken[name]} and {item.name} would both be {name}; convert them into two folders")
        taken[name] = item.name
        _refuse_overwriting(dst, name, item.encoder)
        if item.reason is not None and to not in KEEPS_REASONS and not rejected:
            item = _rows(item, item.reason == 0)
        written += WRITERS[to](item, dst, name)
    return written


def detect(path: str | Path) -> str | None:
    """Return the format of one file; None when it holds no tile features.

    Raises:
        ConvertError: an HDF5 file that cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        return "spatialdata" if path.suffix == ".zarr" else None
    if path.suffix in (".h5", ".hdf5"):
        return h5.h5_format(path)
    if path.suffix in (".npz", ".pt") and "tile_embeddings" in (folder.name for folder in path.parents):
        return "slide2vec"
    if path.suffix == ".npz":
        return None if path.name.endswith(".coordinates.npz") else "npz"
    return {".h5ad": "anndata", ".safetensors": "safetensors"}.get(path.suffix)


def read_features(
    path: str | Path,
    *,
    slide_mpp: tuple[float, float] | None = None,
    coord_unit: str | None = None,
    encoder: str | None = None,
) -> ForeignFeatures:
    """Read one foreign file; arguments as in `convert`.

    Raises:
        ConvertError: as `convert`.
    """
    path = Path(path)
    fmt = detect(path) if path.exists() else None
    if fmt is None:
        raise ConvertError(f"{path} holds no tile features that eosin knows; it reads {', '.join(FORMATS)}")
    return _read(fmt, path, path.stem, _Options(slide_mpp=slide_mpp, coord_unit=coord_unit, encoder=encoder))


def _pair(slide_mpp: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if slide_mpp is None:
        return None
    x, y = slide_mpp if isinstance(slide_mpp, tuple) else (slide_mpp, slide_mpp)
    return check_mpp(x, "slide_mpp"), check_mpp(y, "slide_mpp")


def _sources(src: Path) -> list[tuple[str, Path, str]]:
    """Return (format, file, name) of every slide in `src`, sorted; the name keeps folders."""
    if src.is_file() or (src.is_dir() and src.suffix == ".zarr"):
        fmt = detect(src)
        if fmt is None:
            raise ConvertError(f"{src} holds no tile features that eosin knows; it reads {', '.join(FORMATS)}")
        return [(fmt, src, src.stem)]
    if not src.is_dir():
        raise ConvertError(f"{src} does not exist")
    found = []
    for path in sorted(p for p in src.rglob("*") if p.suffix in _SUFFIXES and not p.name.startswith(".")):
        fmt = detect(path)
        if fmt is not None:
            name = path.relative_to(src).with_suffix("")
            layout = {"clam": "h5_files", "slide2vec": "tile_embeddings", "atlaspatch": "patches"}.get(fmt)
            folders = [part for part in name.parts[:-1] if part != layout]
            if fmt == "trident":
                folders = [part for part in folders if not part.startswith("features_")]
            name = Path(*folders, name.name)
            found.append((fmt, path, name.as_posix()))
    if not found:
        raise ConvertError(f"{src} holds no tile features that eosin knows; it reads {', '.join(FORMATS)}")
    return found


def _items(sources: list[tuple[str, Path, str]], options: _Options) -> Iterator[tuple[str, ForeignFeatures]]:
    for fmt, path, name in sources:
        yield fmt, _read(fmt, path, name, options)


def _read(fmt: str, path: Path, name: str, options: _Options) -> ForeignFeatures:
    if fmt == "eosin":
        item = _from_eosin(path)
    elif fmt in ("trident", "clam", "stamp", "atlaspatch"):
        item = h5.read_h5(
            path,
            name,
            fmt,
            slide_mpp=options.slide_mpp,
            coord_unit=options.coord_unit,
            encoder=options.encoder,
        )
    elif fmt == "slide2vec":
        item = files.read_slide2vec(path, name)
    elif fmt == "anndata":
        item = files.read_anndata(path, name)
    elif fmt == "spatialdata":
        item = read_spatialdata(path, name, options.encoder)
    else:
        item = {"npz": files.read_npz, "safetensors": files.read_safetensors}[fmt](path, name)
    if not np.isfinite(item.x).all():
        row = int(np.flatnonzero(~np.isfinite(item.x).all(axis=1))[0])
        raise ConvertError(f"{path}: features of tile {row} are not finite")
    return replace(item, slide_mpp=options.slide_mpp or item.slide_mpp, encoder=item.encoder or options.encoder or "")


def _refuse_overwriting(dst: Path, name: str, encoder: str) -> None:
    for folder in (
        dst,
        *(dst / part for part in ("h5_files", "patches", "tile_embeddings", h5.features_folder(encoder))),
    ):
        for suffix in _SUFFIXES:
            if (folder / (name + suffix)).exists():
                raise ConvertError(f"{folder / (name + suffix)} is in the way; delete it or give another folder")


def _rows(item: ForeignFeatures, rows: Any) -> ForeignFeatures:
    reason = None if item.reason is None else item.reason[rows]
    return replace(item, x=item.x[rows], xy=item.xy[rows], qc={k: v[rows] for k, v in item.qc.items()}, reason=reason)


def _from_eosin(path: Path) -> ForeignFeatures:
    """Read one file of a store; the store is the nearest folder above that has a manifest."""
    for folder in path.parents:
        if (folder / "manifest.json").is_file():
            features = FeatureStore.open(folder)[path.relative_to(folder).as_posix()[: -len(".h5")]]
            return foreign(features)
    raise ConvertError(f"{path}: no manifest.json in the folders above; convert the file inside its store")


def foreign(features: Features) -> ForeignFeatures:
    """Return a store's `Features` as what the writers take."""
    slide, tile = features.slide, features.recipe["tile"]
    mpp = slide.get("mpp") or {}
    return ForeignFeatures(
        name=features.slide_id,
        x=features.x,
        xy=features.xy,
        encoder=features.recipe["encoder"].get("name") or "",
        mpp=features.mpp,
        tile_px=features.tile_px,
        size0_px=features.size0_px,
        overlap_px=tile.get("overlap_px"),
        slide_size_px=(slide["size_px"][0], slide["size_px"][1]) if slide.get("size_px") else None,
        slide_mpp=(mpp["x"], mpp["y"]) if mpp.get("x") and mpp.get("y") else None,
        qc=features.qc,
        reason=features.reason,
        extras={"recipe": {**features.recipe, "tokens": False}, "slide": slide},
    )


def _to_eosin(item: ForeignFeatures, dst: Path, fmt: str) -> Path:
    recipe, meta = item.extras.get("recipe"), item.extras.get("slide")
    store = FeatureStore.create(dst, Recipe.from_dict(recipe) if recipe else _imported_recipe(item, fmt))
    if item.name in store:
        raise ConvertError(
            f"{item.name} is already in {dst}; delete {dst / (item.name + '.h5')} or give another folder"
        )
    if meta is None:
        x, y = item.slide_mpp or (None, None)
        mpp = {"x": x, "y": y, "source": f"imported from {fmt}"} if item.slide_mpp else None
        meta = {"size_px": item.slide_size_px, "mpp": mpp, "size0_px": item.size0_px, "fingerprint": ""}
    with store.writer(item.name, meta=meta) as writer:
        writer.append(item.x, item.xy, item.qc)
        writer.finish(item.reason)
    return dst / f"{item.name}.h5"


def _imported_recipe(item: ForeignFeatures, fmt: str) -> Recipe:
    """Return a recipe that says where the file came from and leaves null what it does not state."""
    origin = f"imported from {fmt}"
    return Recipe(
        encoder={"name": item.encoder, "dim": item.x.shape[1], "origin": origin},
        tile={"tile_px": item.tile_px, "mpp": item.mpp, "overlap_px": item.overlap_px},
        tissue={"origin": origin},
        qc={"origin": origin},
        stain={"origin": origin},
        precision="unknown",
        dtype="float16" if item.x.dtype == np.float16 else "float32",
        tokens=False,
        icc=False,
    )
