"""A trained model on slides and their detections: cells for QuPath, counts per mm², and one table over the slides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pandas as pd
from shapely import union_all
from shapely.geometry import MultiPolygon, Polygon

from eosin.errors import CohortError, ConfigError, EosinError, GeometryError, closest
from eosin.features.writer import write_durably
from eosin.finetune.cascade import count_atypical
from eosin.finetune.detections import read_detections
from eosin.finetune.predict import Progress, Scored, Scorer
from eosin.slides import open_slide
from eosin.slides.find import find_slides
from eosin.slides.fingerprint import fingerprint_path
from eosin.tiles import read_geojson

SLIDES = "slides.csv"
VERSION = 1
POINT_SUFFIXES = (".geojson", ".json", ".csv", ".tsv", ".parquet")
_AREAS = ("", "region_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched:
    """Which file belongs to which slide.

    Attributes:
        file: slide id -> its file.
        problems: slide id -> why it has none.
        unused: files that belong to no slide.
    """

    file: Mapping[str, Path]
    problems: Mapping[str, str]
    unused: tuple[Path, ...]


def match_files(given: Path, slides: Sequence[str], *, what: str) -> Matched:
    """Return which file belongs to which slide.

    A file belongs to the one slide there is. In a folder, `a.svs.geojson` belongs to the slide `a.svs`, and so does
    `a.geojson` where no other slide is called `a`; slides in folders have their files in the same folders.

    Args:
        given: a file, or a folder of files.
        slides: ids, paths relative to the folder of slides.
        what: what the files are called in errors, "points" or "region".

    Raises:
        CohortError: no such file or folder; a file for several slides; a folder in which no file fits a slide.
    """
    if given.is_file():
        if len(slides) != 1:
            raise CohortError(
                f"{given} is one file, and there are {len(slides)} slides: give --{what} a folder with one file a "
                f"slide, such as {slides[0]}.geojson"
            )
        return Matched(file={slides[0]: given}, problems={}, unused=())
    if not given.is_dir():
        raise CohortError(f"{given}: no such file or folder of {what}")
    files = sorted(path for path in given.rglob("*") if path.is_file() and path.suffix.lower() in POINT_SUFFIXES)
    named: dict[str, list[Path]] = {}
    for path in files:
        named.setdefault(path.relative_to(given).with_suffix("").as_posix(), []).append(path)
    stems: dict[str, list[str]] = {}
    for slide in slides:
        stems.setdefault(str(PurePosixPath(slide).with_suffix("")), []).append(slide)
    file, problems = {}, {}
    for slide in slides:
        stem = str(PurePosixPath(slide).with_suffix(""))
        twins = stems[stem]
        fits = [*named.get(slide, []), *(named.get(stem, []) if stem != slide and len(twins) == 1 else [])]
        if len(fits) == 1:
            file[slide] = fits[0]
        elif fits:
            problems[slide] = f"{len(fits)} files of {what} fit it ({', '.join(path.name for path in fits)}); keep one"
        elif len(twins) > 1 and stem in named:
            problems[slide] = (
                f"{named[stem][0].name} fits {' and '.join(twins)}; call it {slide}{named[stem][0].suffix}"
            )
        else:
            near = closest(slide, [path.relative_to(given).as_posix() for path in files])
            problems[slide] = (
                f"no {what} for it in {given}: needed is {slide}.geojson (or .json, .csv); closest: {near}"
            )
    if not file:
        raise CohortError(
            f"none of the {len(files)} files of {what} in {given} fits one of the {len(slides)} slides; "
            f"{slides[0]}: {problems[slides[0]]}"
        )
    used = set(file.values())
    return Matched(file=file, problems=problems, unused=tuple(path for path in files if path not in used))


def score_slides(
    source: Path,
    scorer: Scorer,
    *,
    points: Path,
    out: Path,
    region: Path | None = None,
    slide_mpp: float | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Score the detections of a slide, or of every slide in a folder, and count per mm².

    Writes `<slide>.geojson` (cells for QuPath) and `<slide>.json` (counts and what they were made from) a slide, and
    `slides.csv`. A slide that fails is listed with its reason and never stops the others. A slide that is finished is
    not done again while model, threshold, views, points, region and the slide itself are the same.

    Args:
        source: a slide, or a folder of slides.
        scorer: the model.
        points: detections, see `detections.read_detections`; one file, or a folder as for `match_files`.
        out: folder to write to.
        region: areas to count in beside the whole tissue, GeoJSON in level-0 pixels; a file or a folder likewise.
        slide_mpp: microns per level-0 pixel, for slides that do not say it.
        progress: told after each slide.

    Raises:
        CohortError: no slides, or files that fit none of them.
        ConfigError: `out` is the folder of the points or of the regions.
    """
    for folder in (points, region):
        if folder is not None and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"--out {out} lies in {folder}, whose files would be mixed with it; choose another")
    found = find_slides(source)
    if not found:
        raise CohortError(f"{source} holds no slides")
    ids = [slide_id for slide_id, _ in found]
    given = match_files(points, ids, what="points")
    areas = None if region is None else match_files(region, ids, what="region")
    failed: dict[str, str] = {**given.problems, **({} if areas is None else areas.problems)}
    made: dict[str, Mapping[str, Any]] = {}
    skipped = 0
    for done, (slide_id, path) in enumerate(found, 1):
        if slide_id not in failed:
            area = None if areas is None else areas.file[slide_id]
            job = _Job(slide_id=slide_id, path=path, points=given.file[slide_id], region=area, slide_mpp=slide_mpp)
            try:
                made[slide_id], kept = _one(job, scorer, out)
                skipped += kept
            except EosinError as error:
                failed[slide_id] = str(error)
        if progress is not None:
            progress(done, len(found), slide_id)
    table = _table(ids, made, failed)
    remarked = sum(bool(told["notes"]) for told in made.values())
    notes = [f"{skipped} of {len(ids)} slides were finished before, from the same inputs"] if skipped else []
    if remarked:
        notes.append(f"the crops of {remarked} slides have remarks, see the column notes")
    for what, match in (("points", given), ("region", areas)):
        if match is not None and match.unused:
            names = ", ".join(path.name for path in match.unused[:3])
            notes.append(f"{len(match.unused)} files of {what} belong to no slide of {source} ({names})")
    return Scored(
        table=table,
        failed=failed,
        notes=tuple(notes),
        files=(write_durably(out / SLIDES, table.to_csv(index=False).encode()),),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One slide with what belongs to it."""

    slide_id: str
    path: Path
    points: Path
    region: Path | None
    slide_mpp: float | None


def _one(job: _Job, scorer: Scorer, out: Path) -> tuple[Mapping[str, Any], bool]:
    """Return what is counted on a slide, and whether it was found finished."""
    folder = out / PurePosixPath(job.slide_id).parent
    record, drawn = (folder / f"{job.path.name}{suffix}" for suffix in (".json", ".geojson"))
    identity = {
        "version": VERSION,
        "model": scorer.model_hash,
        "threshold": scorer.ensemble.threshold,
        "views": scorer.ensemble.tta,
        "points": _hash_file(job.points),
        "region": None if job.region is None else _hash_file(job.region),
        "slide": fingerprint_path(job.path),
        "slide_mpp": job.slide_mpp,
    }
    kept = _finished(record, drawn, identity)
    if kept is not None:
        return kept, True
    record.unlink(missing_ok=True)  # a run that stops half-way leaves no record beside new cells
    with open_slide(job.path) as slide:
        silent = None in (slide.mpp_ledger.x, slide.mpp_ledger.y)
    with open_slide(job.path, mpp=job.slide_mpp if silent else None) as slide:
        points = read_detections(job.points, mpp=slide.mpp, size_px=slide.size_px)
        region = None if job.region is None else read_region(job.region)
        counts = count_atypical(
            slide, points, scorer.ensemble, out=folder, threshold=scorer.ensemble.threshold, region=region
        )
    told = {**counts, "made_from": identity}
    write_durably(record, json.dumps(told, indent=2, allow_nan=False).encode())
    return told, False


def _finished(record: Path, drawn: Path, identity: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if not (record.is_file() and drawn.is_file()):
        return None
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return told if isinstance(told, dict) and told.get("made_from") == identity else None


def read_region(path: Path) -> Polygon | MultiPolygon:
    """Return the areas of a GeoJSON file as one, level-0 pixels.

    Raises:
        GeometryError: no such file, or no area in it.
    """
    drawn = [one.geometry for one in read_geojson(path)]
    if not drawn:
        raise GeometryError(f"{path}: no area is drawn in it; counting in a region needs a polygon")
    return cast(Polygon | MultiPolygon, union_all(drawn))


def _hash_file(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CohortError(f"{path}: cannot be read ({error.strerror})") from error


def _table(ids: Sequence[str], made: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]) -> pd.DataFrame:
    """Return a line a slide: counts, area, and densities with their intervals; or why it failed."""
    lines = []
    for slide_id in ids:
        told = made.get(slide_id)
        line: dict[str, Any] = {"slide": slide_id}
        if told is not None:
            line |= {"figures": told["figures"], "atypical": told["atypical"], "threshold": told["threshold"]}
            for lead, area in zip(_AREAS, told["areas"], strict=False):
                line[f"{lead}area_mm2"] = area["area_mm2"]
                for kind in ("figures", "atypical"):
                    density = area[kind]
                    line[f"{lead}{kind}_n"] = density["n"]
                    line[f"{lead}{kind}_per_mm2"] = density["point"]
                    line[f"{lead}{kind}_low"] = density["low"]
                    line[f"{lead}{kind}_high"] = density["high"]
            flags = [area["atypical"]["note"] for area in told["areas"] if "below" in area["atypical"]["note"]]
            line["notes"] = "; ".join([*told["notes"], *flags])
        lines.append({**line, "error": failed.get(slide_id, "")})
    table = pd.DataFrame(lines)
    last = ["notes", "error"]
    whole = [name for name in table.columns if name in ("figures", "atypical") or name.endswith("_n")]
    table = table.astype(dict.fromkeys(whole, "Int64"))
    return cast(
        pd.DataFrame, table[[name for name in table.columns if name not in last] + [n for n in last if n in table]]
    )
