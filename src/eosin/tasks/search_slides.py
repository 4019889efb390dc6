"""Where the slides of an index lie, and how their features were made: ``slides.json`` beside the index.

Search needs neither; pages need the first for their pictures, image queries the second. An index on a server has no
folder: there the slides are named at each search.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eosin.errors import IndexCorruptError, IndexMismatchError, StoreCorruptError
from eosin.features.jobs import find_jobs
from eosin.features.recipe import Recipe
from eosin.features.store import FeatureStore
from eosin.features.writer import write_durably
from eosin.retrieval.engines import is_url
from eosin.tasks.search_pictures import SlideFile

NAME = "slides.json"
FORMAT, VERSION = "eosin-index-slides", 1
_MATTER = ("encoder.pooling", "stain", "icc", "tile.filter", "version")
"""What of a recipe changes vectors beside encoder, weights and tiles, which the index itself compares."""


def find_files(inputs: Iterable[Path]) -> dict[str, SlideFile]:
    """Return slide id -> file of slides, folders and cohort tables, named as extraction names them."""
    jobs = find_jobs(list(inputs))
    return {job.slide_id: SlideFile(path=job.source.resolve()) for job in jobs if isinstance(job.source, Path)}


def check_recipe(index: str, store: FeatureStore) -> None:
    """Refuse features that were made otherwise than those already in the index.

    Raises:
        IndexMismatchError: naming each difference of pooling, stain normalisation, colour profile or pixels.
    """
    known = remembered_recipe(index)
    if known is None:
        return
    lines = [line for line in store.recipe.diff(known) if line.startswith(_MATTER)]
    if lines:
        told = "\n  ".join(line.replace("store has", "the index has") for line in lines)
        raise IndexMismatchError(
            f"{store.path} was made otherwise than what {index} holds:\n  {told}\n"
            "their vectors cannot be compared: make another index, or extract both alike"
        )


def remember(index: str, store: FeatureStore, files: Mapping[str, SlideFile]) -> None:
    """Note in the index's folder how features were made and where slides lie; nothing for a server.

    Args:
        index: folder.
        store: the features that went in.
        files: slide id -> file; slides that are not in the store are left out, what was known stays.
    """
    if is_url(index):
        return
    known = _read(index)
    slides = dict(known.get("slides", {}))
    for slide_id in store:
        if slide_id in files:
            slides[slide_id] = {"path": str(files[slide_id].path), "fingerprint": _fingerprint(store, slide_id)}
    content = {"format": FORMAT, "version": VERSION, "recipe": store.recipe.to_dict(), "slides": slides}
    write_durably(Path(index) / NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def remembered_recipe(index: str) -> Recipe | None:
    """Return how the features of an index were made; None when it does not know."""
    recipe = _read(index).get("recipe")
    return None if recipe is None else Recipe.from_dict(recipe)


def slide_files(index: str, given: Iterable[Path]) -> dict[str, SlideFile]:
    """Return slide id -> file, of what the index remembers and what is given; what is given is believed first.

    A given file must still be the slide that was indexed, where the index knows its fingerprint.
    """
    known = {
        slide_id: SlideFile(path=Path(one["path"]), fingerprint=one["fingerprint"])
        for slide_id, one in _read(index).get("slides", {}).items()
    }
    given = list(given)
    for slide_id, file in (find_files(given) if given else {}).items():
        before = known.get(slide_id)
        known[slide_id] = file if before is None else replace(file, fingerprint=before.fingerprint)
    return known


def unknown_places(index: str, without: Iterable[str]) -> tuple[str, ...]:
    """Return a note, or none, on slides that a page on an index on a server shows without pictures."""
    names = sorted(without)
    if not names or not is_url(index):
        return ()
    return (
        f"An index on a server does not remember where slides lie: {len(names)} slides have no pictures here (first "
        f"{names[0]}); give their folder with --slides.",
    )


def _fingerprint(store: FeatureStore, slide_id: str) -> str | None:
    try:
        found = store.tiles(slide_id).slide.get("slide_fingerprint")
    except StoreCorruptError:
        return None  # the index has reported it
    return None if found is None else str(found)


def _read(index: str) -> dict[str, Any]:
    path = Path(index) / NAME
    if is_url(index) or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or int(found["version"]) > VERSION:
            raise ValueError(f"format {found['format']!r}, version {found['version']}")
        Recipe.from_dict(found["recipe"])
        if not all({"path", "fingerprint"} <= one.keys() for one in found["slides"].values()):
            raise ValueError("a slide without path or fingerprint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexCorruptError(
            f"{path} cannot be read ({error}); delete it: searches work without it, and eosin index writes it again"
        ) from error
    return found
