"""One name for one thing: scanners with two spellings, data sets with two names, slides with three."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from eosin.cohort.reading import DEFAULT_ALIASES, squeeze

# Spellings without case, spaces, underscores, dots and hyphens -> the name that is used.
SCANNERS: Mapping[str, str] = {
    squeeze(spelling): name
    for spelling, name in {
        **DEFAULT_ALIASES["scanner"],
        "Hamamatsu XR": "Hamamatsu XR",
        "Hamamatsu NanoZoomer XR": "Hamamatsu XR",
        "Hamamatsu S360": "Hamamatsu S360",
        "Aperio CS2": "Aperio CS2",
        "Aperio ScanScope CS2": "Aperio CS2",
        "3D Histech": "3D Histech",
        "3DHISTECH": "3D Histech",
    }.items()
}
DATASETS: Mapping[str, str] = {
    "midog2021": "midog21",
    "midog2025": "midog25",
    "midog++": "midog++",
    "midogpp": "midog++",
    "tupac": "tupac16",
    "tupac2016": "tupac16",
    "amibr": "ami-br",
    "atnormbr": "atnorm-br",
    "atnormmd": "atnorm-md",
    "omgocto": "omg-octo",
}
# Sets that are drawn from the same numbered slides: 001 is one slide in all of them.
COLLECTIONS: Mapping[str, str] = {"midog21": "midog", "midog25": "midog", "midog++": "midog"}

ATYPICAL = frozenset({"amf", "atypical", "true"})
NORMAL = frozenset({"nmf", "normal", "false"})

_NUMBERED = re.compile(r"(?:midog\d*[-_])?(\d{1,4})(?:\.tiff?)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a slide comes from; "" where unknown."""

    tumour: str = ""
    scanner: str = ""
    origin: str = ""
    species: str = ""


# What every slide of a set has in common, for tables that do not say.
SET_SOURCES: Mapping[str, Source] = {
    "midog21": Source(tumour="human breast cancer", origin="UMC Utrecht", species="human"),
    "tupac16": Source(tumour="human breast cancer", species="human"),
    "atnorm-br": Source(tumour="human breast cancer", origin="TCGA", species="human"),
}


def scanner_name(text: str) -> str:
    """Return the one name of a scanner; an unknown one keeps its own."""
    return SCANNERS.get(squeeze(text), text.strip())


def dataset_name(text: str) -> str:
    """Return the one name of a data set, in lower case; an unknown one keeps its own."""
    return DATASETS.get(squeeze(text), text.strip().casefold())


def slide_identity(dataset: str, slide_id: str) -> tuple[str, str]:
    """Return (collection, slide): equal for the same glass slide under any of its names.

    ``("midog21", "midog21-002")``, ``("midog25", "002.tiff")`` and ``("midog++", "2")`` are all
    ``("midog", "002")``. A slide of any other set is itself.
    """
    collection = COLLECTIONS.get(dataset)
    number = _NUMBERED.fullmatch(slide_id.strip()) if collection else None
    if collection is None or number is None:
        return dataset, slide_id
    return collection, number[1].lstrip("0").zfill(3)


def class_of(word: str) -> int | None:
    """Return 1 for a word that means atypical, 0 for one that means normal, None for any other."""
    short = word.strip().casefold()
    if short in ATYPICAL:
        return 1
    return 0 if short in NORMAL else None
