"""Fine-tuning an encoder on cells: tables, adapters, losses, training, and what a trained model is used for.

What is imported here needs no torch; the parts that do are modules of their own.
"""

from eosin.finetune.cascade import CellClassifier, ScoredCells, classify, count_atypical, density, write_cells
from eosin.finetune.cells import CellTable, domain_counts, pool, read_tiles
from eosin.finetune.detections import Detections, detections, read_detections
from eosin.finetune.duplicates import find_duplicates, without_duplicates
from eosin.finetune.joins import join_boxes, read_boxes
from eosin.finetune.tables import read_sources, read_table, with_sources

__all__ = [
    "CellClassifier",
    "CellTable",
    "Detections",
    "ScoredCells",
    "classify",
    "count_atypical",
    "density",
    "detections",
    "domain_counts",
    "find_duplicates",
    "join_boxes",
    "pool",
    "read_boxes",
    "read_detections",
    "read_sources",
    "read_table",
    "read_tiles",
    "with_sources",
    "without_duplicates",
    "write_cells",
]
