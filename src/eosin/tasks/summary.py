"""The cohort at a glance: one row of quality numbers a slide, as CSV and as a page (in the manner of HistoQC)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from eosin.errors import StoreCorruptError
from eosin.features.store import FeatureStore
from eosin.features.writer import write_durably
from eosin.tiles.qc import REASONS

COUNTS = ("tiles", "kept", "background", "unreadable")
QUANTITIES = ("focus", "white", "black", "pen", "fold", "saturation", "od_hematoxylin", "od_eosin")


def cohort_summary(store: FeatureStore) -> pd.DataFrame:
    """Return one row a finished slide, then one a failed slide (column ``failure``).

    Medians are over the tiles that were embedded; ``share_<reason>`` are shares of those. Counts are whole
    numbers, missing where a slide failed. Features are not read.
    """
    rows: list[dict[str, Any]] = []
    for slide_id in store:
        try:
            tiles = store.tiles(slide_id)
        except StoreCorruptError as error:
            rows.append({"slide_id": slide_id, "failure": str(error)})
            continue
        slide = tiles.slide
        ledger = slide.get("mpp") or {}
        row: dict[str, Any] = {
            "slide_id": slide_id,
            "tiles": len(tiles),
            "kept": int(tiles.kept.sum()),
            "background": len(tiles.background_xy),
            "unreadable": len(tiles.unreadable_xy),
            "tissue_mm2": (slide.get("tissue") or {}).get("area_mm2"),
            "mpp_x": ledger.get("x"),
            "mpp_y": ledger.get("y"),
            "mpp_source": ledger.get("source"),
            "mpp_conflict": ledger.get("conflict"),
            "reader": slide.get("reader"),
        }
        for code, reason in enumerate(REASONS):
            if code and len(tiles):
                row[f"share_{reason}"] = round(float((tiles.reason == code).mean()), 4)
        for name in QUANTITIES:
            if name in tiles.qc and len(tiles):
                row[f"median_{name}"] = round(float(np.median(tiles.qc[name])), 4)
        row["failure"] = None
        rows.append(row)
    rows += [{"slide_id": one["slide_id"], "failure": one["message"]} for one in store.failures()]
    table = pd.DataFrame(rows)
    # A failed slide has no counts; without this they would all become floats.
    return table.astype({name: "Int64" for name in COUNTS if name in table})


def write_summary(store: FeatureStore) -> None:
    """Write ``summary.csv`` and ``summary.html`` into the store's folder."""
    table = cohort_summary(store)
    write_durably(store.path / "summary.csv", table.to_csv(index=False).encode())
    from eosin.tasks.report import summary_page

    write_durably(store.path / "summary.html", summary_page(store, table).encode())
