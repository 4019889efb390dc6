"""Feature files outside HDF5 proper: npz, safetensors, slide2vec, AnnData and SpatialData (LazySlide)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.errors import ConvertError, MissingDependencyError
from eosin.features.convert_types import CARD, ForeignFeatures, card_fields, corners, need, new_file, number, whole


def write_npz(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``<name>.npz``: features, coords, reason, ``qc.<column>`` and the card."""
    path = dst / f"{name}.npz"
    with new_file(path) as temporary, open(temporary, "wb") as handle:
        arrays: dict[str, Any] = {**_arrays(item), CARD: np.array(item.card(extras=True))}
        np.savez(handle, **arrays)
    return [path]


def read_npz(path: Path, name: str) -> ForeignFeatures:
    """Read an ``.npz`` with ``features`` (n, D) and ``coords`` (n, 2).

    Raises:
        ConvertError: not such a file.
    """
    try:
        arrays = _load_npz(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConvertError(f"{path} cannot be read as npz: {error}") from error
    card = str(arrays.pop(CARD)) if CARD in arrays else None
    return _from_arrays(arrays, card, path, name)


def _load_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    # The handle is ours: np.load leaves a broken file open.
    with open(path, "rb") as handle:
        loaded = np.load(handle, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("one bare array")
        return {key: loaded[key] for key in loaded.files}


def write_safetensors(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``<name>.safetensors``: the arrays of `write_npz`, the card as metadata."""
    numpy_io = _safetensors()
    path = dst / f"{name}.safetensors"
    arrays = {k: np.ascontiguousarray(v) for k, v in _arrays(item).items()}
    with new_file(path) as temporary:
        numpy_io.numpy.save_file(arrays, temporary, metadata={CARD: item.card(extras=True)})
    return [path]


def read_safetensors(path: Path, name: str) -> ForeignFeatures:
    """Read a ``.safetensors`` with ``features`` (n, D) and ``coords`` (n, 2).

    Raises:
        ConvertError: not such a file.
    """
    library = _safetensors()
    try:
        with library.safe_open(path, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            card = (file.metadata() or {}).get(CARD)
    except (OSError, TypeError, library.SafetensorError) as error:
        raise ConvertError(f"{path} cannot be read as safetensors: {error}") from error
    return _from_arrays(arrays, card, path, name)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise MissingDependencyError.for_extra("safetensors", "torch") from error
    return safetensors


def _arrays(item: ForeignFeatures) -> dict[str, npt.NDArray[Any]]:
    arrays = {"features": item.x, "coords": item.xy, **{f"qc.{k}": v for k, v in item.qc.items()}}
    return arrays if item.reason is None else {**arrays, "reason": item.reason}


def _from_arrays(arrays: dict[str, npt.NDArray[Any]], card: object, path: Path, name: str) -> ForeignFeatures:
    if not {"features", "coords"} <= arrays.keys():
        raise ConvertError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; needed: features and coords")
    return ForeignFeatures(
        x=arrays["features"],
        xy=corners(arrays["coords"], name),
        qc={k.removeprefix("qc."): v for k, v in arrays.items() if k.startswith("qc.")},
        reason=arrays.get("reason"),
        **{"name": name, **card_fields(card)},
    )


def slide2vec_files(path: Path) -> tuple[Path, Path, Path]:
    """Return (meta.json, coordinates.npz, coordinates.meta.json) of ``tile_embeddings/<id>.npz|pt``."""
    root = next(folder for folder in path.parents if folder.name == "tile_embeddings")
    tiles = root.with_name("tiles") / path.relative_to(root)
    return (
        path.with_name(f"{path.stem}.meta.json"),
        tiles.with_name(f"{path.stem}.coordinates.npz"),
        tiles.with_name(f"{path.stem}.coordinates.meta.json"),
    )


def read_slide2vec(path: Path, name: str) -> ForeignFeatures:
    """Read ``tile_embeddings/<id>.npz|pt`` with its side files.

    Raises:
        ConvertError: a side file is missing or broken, or the coordinates are not level-0 pixels.
        MissingDependencyError: a .pt without torch.
    """
    try:
        return _read_slide2vec(path, name)
    except ConvertError:
        raise
    except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, UnpicklingError) as error:
        raise ConvertError(f"{path} or its side files cannot be read as slide2vec's: {error}") from error


def _read_slide2vec(path: Path, name: str) -> ForeignFeatures:
    meta_path, coordinates, coordinates_meta = slide2vec_files(path)
    for side in (coordinates, coordinates_meta):
        if not side.is_file():
            raise ConvertError(f"{path}: {side} is missing; slide2vec keeps the coordinates there")
    meta = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.is_file() else {}
    plan = json.loads(coordinates_meta.read_text(encoding="utf-8"))
    if plan["artifact"]["coordinate_space"] != "level0_px":
        raise ConvertError(f"{coordinates_meta}: coordinates are {plan['artifact']['coordinate_space']}, not level0_px")
    data = _load_npz(coordinates)
    xy = np.stack([data["x"], data["y"]], axis=1).astype(np.int64)
    tissue = data["tissue_fractions"].astype(np.float32)
    tiling, slide = plan["tiling"], plan["slide"]
    tile_px, side0, base = (
        tiling["requested_tile_size_px"],
        tiling["tile_size_lv0"],
        number(slide, "base_spacing_um"),
    )
    found: dict[str, Any] = {
        "name": name,
        "encoder": meta.get("encoder_name") or "",
        "mpp": number(tiling, "requested_spacing_um"),
        "tile_px": int(tile_px) if tile_px else None,
        "size0_px": (float(side0), float(side0)) if side0 else None,
        "slide_size_px": tuple(slide["dimensions"]) if slide.get("dimensions") else None,
        "slide_mpp": (base, base) if base else None,
    }
    found.update(card_fields(meta.get(CARD)))
    # eosin writes NaN where a file must have a tissue fraction and the source had none.
    qc = {"tissue": tissue} if np.isfinite(tissue).all() else {}
    return ForeignFeatures(x=_embedding(path), xy=xy, qc=qc, **found)


def _embedding(path: Path) -> npt.NDArray[Any]:
    if path.suffix == ".npz":
        return _load_npz(path)["features"]
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError.for_extra("torch", "torch") from error
    tensor = torch.load(path, map_location="cpu", weights_only=True)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write_slide2vec(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``tile_embeddings/<name>.npz`` and side files; rows go into slide2vec's order (x, then y).

    Raises:
        ConvertError: tile size, mpp or footprint are unknown.
    """
    tile_px = need(item.tile_px, "tile size", name, "slide2vec")
    mpp = need(item.mpp, "mpp of the tiles", name, "slide2vec")
    size0 = need(item.size0_px, "tile size on level 0", name, "slide2vec")
    base = need(item.slide_mpp, "slide's mpp (slide_mpp=)", name, "slide2vec")
    order = np.lexsort((item.xy[:, 1], item.xy[:, 0]))
    xy, x = item.xy[order], item.x[order]
    embedding = dst / "tile_embeddings" / f"{name}.npz"
    meta, coordinates, coordinates_meta = slide2vec_files(embedding)
    index = np.arange(len(x))
    with new_file(embedding) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, features=x, tile_index=index)
    tissue = item.qc.get("tissue")
    tissue = np.full(len(x), np.nan) if tissue is None else tissue[order]
    with new_file(coordinates) as temporary, open(temporary, "wb") as handle:
        fractions = tissue.astype(np.float32)
        np.savez_compressed(
            handle, tile_index=index.astype(np.int32), x=xy[:, 0], y=xy[:, 1], tissue_fractions=fractions
        )
    record = {
        "sample_id": name,
        "artifact_type": "tile_embeddings",
        "format": "npz",
        "feature_dim": x.shape[1],
        "num_tiles": len(x),
        "encoder_name": item.encoder,
        "encoder_level": "tile",
        "requested_tile_size_px": tile_px,
        "annotation": None,
        CARD: item.card(),
    }
    side0, read_mpp = int(np.floor(size0[0] + 0.5)), float(np.sqrt(base[0] * base[1]))
    plan = _slide2vec_plan(item, name, {"tile_px": tile_px, "mpp": mpp, "side0": side0, "base": read_mpp})
    for path, value in ((meta, record), (coordinates_meta, plan)):
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [embedding, meta, coordinates, coordinates_meta]


_SLIDE2VEC_NULL = {
    "provenance": "mask_path backend requested_backend spacing_at_level_0 mask_backend requested_mask_backend",
    "segmentation": "tissue_method requested_seg_downsample seg_downsample seg_level seg_spacing_um sthresh sthresh_up "
    "mthresh close sam2_checkpoint_path sam2_config_path mask_path ref_tile_size_px tissue_mask_tissue_value "
    "mask_level mask_spacing_um",
    "filtering": "a_t a_h filter_white filter_black white_threshold black_threshold fraction_threshold "
    "filter_grayspace grayspace_saturation_threshold grayspace_fraction_threshold filter_blur blur_threshold "
    "qc_spacing_um",
    "artifact": "annotation selection_strategy output_mode",
}


def _slide2vec_plan(item: ForeignFeatures, sample: str, tile: dict[str, Any]) -> dict[str, Any]:
    """Return ``coordinates.meta.json``: hs2p demands every key; what eosin did otherwise is null."""
    overlap = (item.overlap_px or 0) / tile["tile_px"]
    plan: dict[str, Any] = {block: dict.fromkeys(keys.split()) for block, keys in _SLIDE2VEC_NULL.items()}
    plan["provenance"].update(sample_id=sample, image_path="")
    plan["artifact"].update(coordinate_space="level0_px", tile_order="x_then_y")
    plan["slide"] = {
        "dimensions": list(item.slide_size_px) if item.slide_size_px else None,
        "base_spacing_um": tile["base"],
        "level_downsamples": None,
    }
    plan["tiling"] = {
        "requested_tile_size_px": tile["tile_px"],
        "requested_spacing_um": tile["mpp"],
        "read_level": 0,
        "read_tile_size_px": tile["side0"],
        "read_spacing_um": tile["base"],
        "tile_size_lv0": tile["side0"],
        "tolerance": None,
        "step_px_lv0": int(np.floor(tile["side0"] * (1 - overlap) + 0.5)),
        "overlap": overlap,
        "min_tissue_fraction": None,
        "is_within_tolerance": True,
        "n_tiles": len(item.xy),
    }
    return plan


def write_anndata(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``<name>.h5ad`` as LazySlide's feature table: X, obs, obsm["spatial"], uns["tile_spec"]."""
    path = dst / f"{name}.h5ad"
    with new_file(path) as temporary:
        feature_table(item).write_h5ad(temporary)
    return [path]


def feature_table(item: ForeignFeatures) -> Any:
    """Return the AnnData of `item`."""
    anndata = _anndata()
    import pandas as pd

    # Plain objects: anndata's zarr writer does not take pandas' Arrow strings by default.
    rows = np.arange(len(item.x))
    obs = pd.DataFrame({"tile_id": rows}, index=pd.Index(rows.astype(str), dtype=object))
    var = pd.DataFrame(index=pd.Index(np.arange(item.x.shape[1]).astype(str), dtype=object))
    obs["library_id"] = pd.Categorical(["tiles"] * len(rows), categories=pd.Index(["tiles"], dtype=object))
    for column, values in {**item.qc, **({} if item.reason is None else {"reason": item.reason})}.items():
        obs[column] = values
    uns: dict[str, Any] = {CARD: item.card(extras=True), "qc_columns": list(item.qc)}
    uns["spatialdata_attrs"] = {"region": "tiles", "region_key": "library_id", "instance_key": "tile_id"}
    if item.tile_px and item.size0_px:
        uns["tile_spec"] = tile_spec(item)
    properties: dict[str, Any] = {
        "mpp": float(np.sqrt(item.slide_mpp[0] * item.slide_mpp[1])) if item.slide_mpp else None
    }
    properties["shape"] = item.slide_size_px[::-1] if item.slide_size_px else None
    uns["slide_properties"] = {k: np.asarray(v) for k, v in properties.items() if v is not None}
    return anndata.AnnData(X=item.x, obs=obs, var=var, obsm={"spatial": item.xy}, uns=uns)


def tile_spec(item: ForeignFeatures) -> dict[str, Any]:
    """Return LazySlide's tile specification; its tiles are read from level 0."""
    tile_px, size0 = need(item.tile_px, "tile size", item.name, "LazySlide"), need(item.size0_px, "", item.name, "")
    stride = tile_px - (item.overlap_px or 0)
    spec = {"height": tile_px, "width": tile_px, "stride_height": stride, "stride_width": stride, "ops_level": 0}
    spec.update(ops_downsample=size0[0] / tile_px, base_level=0, base_downsample=size0[0] / tile_px)
    return spec if item.mpp is None else {**spec, "mpp": item.mpp}


def read_anndata(path: Path, name: str) -> ForeignFeatures:
    """Read a ``.h5ad`` whose ``obsm["spatial"]`` holds level-0 corners, as LazySlide's does.

    Raises:
        ConvertError: no coordinates, or not AnnData.
    """
    anndata = _anndata()
    try:
        table = anndata.read_h5ad(path)
    except (OSError, KeyError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read as AnnData: {error}") from error
    return from_table(table, name, str(path))


def from_table(table: Any, name: str, where: str) -> ForeignFeatures:
    """Return the features of an AnnData table."""
    if "spatial" not in table.obsm:
        raise ConvertError(f"{where}: no obsm['spatial']; write it with wsi.fetch.features_anndata(...)")
    spec, properties = table.uns.get("tile_spec") or {}, table.uns.get("slide_properties") or {}
    side, base, shape = whole(spec, "width"), number(spec, "base_downsample"), properties.get("shape")
    slide_mpp, stride = number(properties, "mpp"), whole(spec, "stride_width")
    found: dict[str, Any] = {
        "name": name,
        "mpp": number(spec, "mpp"),
        "tile_px": side,
        "size0_px": (side * base, side * base) if side and base else None,
        "overlap_px": side - stride if side and stride else None,
        "slide_size_px": (int(shape[1]), int(shape[0])) if shape is not None else None,
        "slide_mpp": (slide_mpp, slide_mpp) if slide_mpp else None,
    }
    found.update(card_fields(table.uns.get(CARD)))
    columns = [c for c in table.uns.get("qc_columns", ()) if c in table.obs]
    x = table.X if isinstance(table.X, np.ndarray) else table.X.toarray()
    return ForeignFeatures(
        x=x,
        xy=corners(np.asarray(table.obsm["spatial"]), name),
        qc={c: table.obs[c].to_numpy() for c in columns},
        reason=table.obs["reason"].to_numpy(np.int8) if "reason" in table.obs else None,
        **found,
    )


def _anndata() -> Any:
    try:
        import anndata
    except ImportError as error:
        raise MissingDependencyError.for_extra("anndata", "interop") from error
    return anndata
