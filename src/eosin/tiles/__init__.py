"""Slides to tiles: tissue masks, grids, per-tile quality and GeoJSON."""

from eosin.tiles.geojson import Annotation, read_geojson, to_feature_collection, write_geojson
from eosin.tiles.grid import TileGrid, TileSpec, plan_tiles, tile
from eosin.tiles.mask import TissueMask
from eosin.tiles.tissue import tissue_mask

__all__ = [
    "Annotation",
    "TileGrid",
    "TileSpec",
    "TissueMask",
    "plan_tiles",
    "read_geojson",
    "tile",
    "tissue_mask",
    "to_feature_collection",
    "write_geojson",
]
