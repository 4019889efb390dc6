"""Slides to tiles: tissue masks, grids, per-tile quality and GeoJSON."""

from eosin.tiles.geojson import Annotation, read_geojson, to_feature_collection, write_geojson
from eosin.tiles.grid import TileGrid, TileSpec, plan_tiles, tile
from eosin.tiles.mask import TissueMask
from eosin.tiles.qc import DEFAULT_RULES, QC_COLUMNS, REASONS, Rule, qc_table, reject_reason, tile_qc
from eosin.tiles.tissue import tissue_mask

__all__ = [
    "DEFAULT_RULES",
    "QC_COLUMNS",
    "REASONS",
    "Annotation",
    "Rule",
    "TileGrid",
    "TileSpec",
    "TissueMask",
    "plan_tiles",
    "qc_table",
    "read_geojson",
    "reject_reason",
    "tile",
    "tile_qc",
    "tissue_mask",
    "to_feature_collection",
    "write_geojson",
]
