"""LazySlide's store: SpatialData zarr with a shapes element "tiles" and a table "<encoder>_tiles"."""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from eosin.errors import ConvertError, MissingDependencyError
from eosin.features.convert_files import feature_table, from_table, tile_spec
from eosin.features.convert_types import CARD, ForeignFeatures, need

TILES = "tiles"


def write_spatialdata(item: ForeignFeatures, dst: Path, name: str) -> list[Path]:
    """Write ``<name>.zarr``: tiles as level-0 polygons, features as their table, ``attrs["tile_spec"]``.

    Raises:
        ConvertError: tile size or footprint are unknown.
        MissingDependencyError: spatialdata is not installed.
    """
    spatialdata = _spatialdata()
    geopandas = importlib.import_module("geopandas")
    width, height = need(item.size0_px, "tile size on level 0", name, "SpatialData")
    x, y = item.xy[:, 0], item.xy[:, 1]
    shapes = geopandas.GeoDataFrame({"tile_id": np.arange(len(x))}, geometry=shapely.box(x, y, x + width, y + height))
    path = dst / f"{name}.zarr"
    data = spatialdata.SpatialData(
        shapes={TILES: spatialdata.models.ShapesModel.parse(shapes)},
        tables={f"{item.encoder or 'features'}_{TILES}": spatialdata.models.TableModel.parse(feature_table(item))},
        attrs={"tile_spec": {TILES: tile_spec(item)}},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.zarr")
    try:
        data.write(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [path]


def read_spatialdata(path: Path, name: str, encoder: str | None) -> ForeignFeatures:
    """Read one feature table of LazySlide's zarr; coordinates are the corners of the tiles' polygons.

    Raises:
        ConvertError: no feature table, or several and `encoder` does not say which.
        MissingDependencyError: spatialdata is not installed.
    """
    try:
        data = _spatialdata().read_zarr(path)
    except (OSError, KeyError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read as SpatialData: {error}") from error
    tables = {k: t for k, t in data.tables.items() if k.endswith(f"_{TILES}") and "spatialdata_attrs" in t.uns}
    if encoder is not None:
        tables = {k: t for k, t in tables.items() if k == f"{encoder}_{TILES}"}
    if len(tables) != 1 or TILES not in data.shapes:
        raise ConvertError(f"{path} holds {len(data.tables)} tables ({', '.join(data.tables)}); say which: encoder=")
    ((key, table),) = tables.items()
    tiles = data.shapes[TILES]
    ids = tiles.get("tile_id", tiles.index)
    rows = {int(tile): row for row, tile in enumerate(ids)}
    order = [rows[int(tile)] for tile in table.obs["tile_id"]]
    corners = tiles.geometry.bounds[["minx", "miny"]].to_numpy()[order]
    table = table.copy()
    table.obsm["spatial"] = corners
    spec = data.attrs.get("tile_spec", {}).get(TILES)
    if spec is not None:
        table.uns["tile_spec"] = dict(spec)
    item = from_table(table, name, str(path))
    return item if CARD in table.uns else replace(item, encoder=key.removesuffix(f"_{TILES}"))


def _spatialdata() -> Any:
    try:
        importlib.import_module("spatialdata.models")
    except ImportError as error:
        raise MissingDependencyError("spatialdata is not installed; run: pip install spatialdata") from error
    return importlib.import_module("spatialdata")
