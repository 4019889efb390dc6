"""Slides: open, find and read whole-slide images at exact microns per pixel."""

from __future__ import annotations

from eosin.slides.backend import Backend
from eosin.slides.find import SLIDE_SUFFIXES, find_slides
from eosin.slides.ledger import MppLedger
from eosin.slides.slide import Slide, TileRead, open_slide

__all__ = ["SLIDE_SUFFIXES", "Backend", "MppLedger", "Slide", "TileRead", "find_slides", "open_slide"]
