"""A reader function for reader processes, free of torch and pytest, as theirs are."""

from __future__ import annotations

import os
from collections.abc import Sequence

from eosin.features.readers import ReaderState
from eosin.pretrain.reads import Outcome, SlideRequest, read_slide_tiles
from eosin.pretrain.sampling import HsvFilter


def read_until_deadly(
    state: ReaderState, requests: Sequence[SlideRequest], tile_px: int, hsv: HsvFilter | None, slot: int
) -> list[Outcome]:
    """Read tiles, and die at a slide called deadly, as a codec does."""
    if any(request.job.slide_id == "deadly" for request in requests):
        os._exit(139)
    return read_slide_tiles(state, requests, tile_px, hsv, slot)
