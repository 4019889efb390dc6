"""A trained model at work: crops of cells, or the tiles of a feature store, to one line each. Slides: `predict_slides`.

What cannot be read gets its reason in place of a probability; the rest is scored all the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from eosin.cohort.reading import read_cells, squeeze
from eosin.errors import CheckpointError, CohortError, ConfigError, EosinError, GeometryError, StoreMismatchError
from eosin.features.store import FeatureStore
from eosin.features.writer import write_durably
from eosin.finetune.aliases import class_of
from eosin.finetune.cells import TILE_MPP, CellTable, Texts, read_tile
from eosin.finetune.classifier import Classifier
from eosin.finetune.infer import ENSEMBLE, MODEL, Ensemble, Predictions, combine, load_classifier
from eosin.finetune.recipe import Tta
from eosin.finetune.sheet import draw_sheet, pick_cells
from eosin.finetune.tables import COLUMN_NAMES, PICTURES, read_table
from eosin.slides.find import find_slides

BATCH = 256
TABLE = "predictions.csv"
SHEET = "sheet.png"
CALLS = ("normal", "atypical")
_TABLES = (".csv", ".tsv", ".parquet")
_DESCRIBED = ("dataset", "slide_id", "scanner", "domain")

Progress = Callable[[int, int, str], None]
"""Told (done, of, what is at hand)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A trained model, and what it is called in what it made.

    Attributes:
        ensemble: answers; its threshold and views are those asked for.
        model_hash: of the folder's files, so that another model's results are not taken for this one's.
    """

    ensemble: Ensemble
    model_hash: str


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Scored:
    """What a run said.

    Attributes:
        table: a line a crop, tile or slide, as in the CSV file.
        failed: name -> why nothing could be said of it.
        notes: what the reader should know.
        files: what was written, the table first.
    """

    table: pd.DataFrame
    failed: Mapping[str, str]
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def load_scorer(
    folder: Path, *, device: str = "auto", encoder: str = "", threshold: float | None = None, tta: Tta | None = None
) -> Scorer:
    """Return the model of a folder that `eosin finetune` wrote, ready to score.

    Args:
        folder: of a run, or its folder "model".
        device: "auto", "cpu", "cuda" ...
        encoder: where the encoder lies, if not where the folder says.
        threshold: in place of the model's own, which was chosen out of fold.
        tta: views whose logits are averaged, in place of the model's own.

    Raises:
        CheckpointError: no such folder, or a damaged file in it.
        WeightsError: another encoder than the one that was trained.
        ConfigError: a threshold outside 0-1, or unknown views.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"threshold is {threshold:g}; it is a probability from 0 to 1")
    if tta not in (None, "none", "rot4", "dihedral"):
        raise ConfigError(f"no test-time augmentation is called {tta!r}; choose none, rot4 or dihedral")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the one that eosin finetune wrote")
    ensemble = load_classifier(folder, device=device, encoder=encoder)
    ensemble.threshold = ensemble.threshold if threshold is None else float(threshold)
    ensemble.tta = ensemble.tta if tta is None else tta
    return Scorer(ensemble=ensemble, model_hash=_hash_model(folder))


def _hash_model(folder: Path) -> str:
    """Return a hash of what answers: each fold's file names the weights of its encoder."""
    folder = folder if (folder / ENSEMBLE).is_file() else folder / MODEL
    told = (folder / ENSEMBLE).read_bytes()
    digest = hashlib.sha256(told)
    for name in json.loads(told)["folds"]:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Crops:
    """Pictures of cells.

    Attributes:
        root: the folder that `file` is relative to.
        file: (n,) the pictures.
        cells: what a table says of them; None without a table.
        labelled: whether the table says which are atypical.
        notes: of the reading.
    """

    root: Path
    file: Texts
    cells: CellTable | None
    labelled: bool
    notes: tuple[str, ...] = ()


def find_crops(source: Path) -> Crops:
    """Return the crops of a table, with or without labels; or the pictures in and below a folder; or one picture.

    A folder with a table, or with the folders Atypical and Normal, is read as `tables.read_table` does.

    Raises:
        CohortError: nothing there, no pictures, or a table that cannot be read.
        GeometryError: a table with another mpp.
    """
    if source.is_file():
        if source.suffix.lower() in (*_TABLES, ".txt"):
            return _from_table(source)
        if source.suffix.lower() in PICTURES:
            return Crops(root=source.parent, file=np.array([source.name]), cells=None, labelled=False)
        raise CohortError(f"{source} is no table and no picture of a cell; a slide needs its detections: give --points")
    if not source.is_dir():
        raise CohortError(f"{source}: no such file or folder; give crops, slides with --points, or a feature store")
    tables = [path for path in source.iterdir() if path.suffix.lower() in _TABLES]
    classes = [path for path in source.iterdir() if path.is_dir() and class_of(path.name) is not None]
    if len(tables) == 1:
        return _from_table(tables[0])
    if tables or classes:
        return _of_cells(read_table(source), labelled=True)
    below = (path.relative_to(source) for path in source.rglob("*") if path.suffix.lower() in PICTURES)
    shown = [path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts)]
    if not shown:
        slides = len(find_slides(source))
        more = f"; its {slides} slides need their detections: give --points" if slides else ""
        raise CohortError(f"{source} holds no pictures of cells ({', '.join(PICTURES)}) and no table{more}")
    return Crops(root=source, file=np.array(sorted(shown), dtype=np.str_), cells=None, labelled=False)


def _from_table(path: Path) -> Crops:
    rows = read_cells(path)
    if any(squeeze(str(name)) in COLUMN_NAMES["label"] for name in rows.columns):
        return _of_cells(read_table(path), labelled=True)
    # Read with labels of no meaning, so that pictures, positions and mpp are checked as in any table of cells.
    return _of_cells(read_table(rows.assign(label="normal"), root=path.parent, dataset=path.stem), labelled=False)


def _of_cells(cells: CellTable, *, labelled: bool) -> Crops:
    if not (cells.file != "").all():
        raise CohortError(
            f"{int((cells.file == '').sum())} of {len(cells)} cells have no picture ({'; '.join(cells.notes[:3])}); "
            "cut the crops from the slides, or give the slides and these positions as --points"
        )
    return Crops(root=cells.root, file=cells.file, cells=cells, labelled=labelled, notes=cells.notes)


def score_crops(source: Path, scorer: Scorer, *, out: Path, progress: Progress | None = None) -> Scored:
    """Score crops of cells; write `predictions.csv`, and `sheet.png` where there are labels.

    Args:
        source: as for `find_crops`; crops are 128 px at 0.25 microns per pixel.
        scorer: the model.
        out: folder to write to, outside `source`.
        progress: told after each batch.

    Raises:
        CohortError: no crops.
        EosinError: none of the crops can be read; the first one's own error.
        ConfigError: `out` lies in `source`.
    """
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"--out {out} lies in {source}, where its files would be taken for crops; choose another")
    crops = find_crops(source)
    n = len(crops.file)
    columns = {name: np.full(n, np.nan) for name in ("p_atypical", "spread", "entropy", "disagreement")}
    failed: dict[str, EosinError] = {}
    for start in range(0, n, BATCH):
        rows, tiles = _read_batch(crops, range(start, min(start + BATCH, n)), failed)
        if rows:
            _fill(columns, rows, scorer.ensemble.predict(np.stack(tiles)))
        if progress is not None:
            progress(min(start + BATCH, n), n, "")
    if len(failed) == n:
        raise next(iter(failed.values()))
    told = {} if crops.cells is None else {name: getattr(crops.cells, name) for name in _DESCRIBED}
    told = {name: column for name, column in told.items() if (column != "").any()}
    if crops.cells is not None and crops.labelled:
        told["atypical"] = crops.cells.label
    threshold = scorer.ensemble.threshold
    table = pd.DataFrame({"file": crops.file, **told, **columns})
    table.insert(table.columns.get_loc("p_atypical") + 1, "call", _calls(columns["p_atypical"], threshold))  # pyright: ignore[reportArgumentType, reportOperatorIssue]
    table["error"] = [str(failed.get(name, "")) for name in crops.file.tolist()]
    files = [write_durably(out / TABLE, table.to_csv(index=False).encode())]
    if crops.labelled:
        files.append(write_durably(out / SHEET, _sheet(crops, columns["p_atypical"], threshold)))
    return Scored(
        table=table,
        failed={name: str(error) for name, error in failed.items()},
        notes=crops.notes,
        files=tuple(files),
    )


def _read_batch(
    crops: Crops, rows: range, failed: dict[str, EosinError]
) -> tuple[list[int], list[npt.NDArray[np.uint8]]]:
    """Return the rows that could be read with their tiles; the others go to `failed`."""
    good, tiles = [], []
    for row in rows:
        name = str(crops.file[row])
        try:
            tiles.append(read_tile(crops.root / name))
            good.append(row)
        except (CohortError, GeometryError) as error:
            failed[name] = error
    return good, tiles


def _fill(columns: Mapping[str, npt.NDArray[np.float64]], rows: list[int], said: Predictions) -> None:
    columns["p_atypical"][rows] = said.p
    for name in ("spread", "entropy", "disagreement"):
        columns[name][rows] = getattr(said, name)


def _calls(p: npt.NDArray[np.float64], threshold: float) -> list[str]:
    """Return "atypical", "normal", or "" where nothing was scored."""
    return ["" if np.isnan(one) else CALLS[int(one >= threshold)] for one in p.tolist()]


def _sheet(crops: Crops, p: npt.NDArray[np.float64], threshold: float) -> bytes:
    """Return the sheet of the scored crops, reading again only those that it shows."""
    assert crops.cells is not None
    scored = np.flatnonzero(~np.isnan(p))
    cells, scores = crops.cells.take(scored), p[scored]
    strips = pick_cells(cells.label, scores, threshold=threshold)
    shown = {row: read_tile(crops.root / str(cells.file[row])) for strip in strips for row in strip.rows.tolist()}
    return draw_sheet(cells, shown, scores, threshold=threshold, title=f"{len(cells)} scored crops")


def score_store(source: Path, scorer: Scorer, *, out: Path, progress: Progress | None = None) -> Scored:
    """Score the kept tiles of a feature store from their features; write `predictions.csv`.

    That equals scoring their pixels where the model is a head on the very encoder of the store, and takes one view of
    a tile; anything else raises.

    Args:
        source: a feature store.
        scorer: the model.
        out: folder to write to.
        progress: told after each slide.

    Raises:
        StoreMismatchError: the model cannot answer from these features; the message says every reason.
        EosinError: no slide of the store can be read; the first one's own error.
    """
    store = FeatureStore.open(source)
    heads = _heads(scorer.ensemble, store)
    failed: dict[str, EosinError] = {}
    parts, dropped = [], 0
    ids = store.slide_ids
    for done, slide_id in enumerate(ids, 1):
        try:
            features = store[slide_id]
        except EosinError as error:
            failed[slide_id] = error
            continue
        x = torch.from_numpy(features.x[features.kept].astype(np.float32)).to(scorer.ensemble.device)
        with torch.no_grad():
            logits = np.stack([head(x).reshape(-1).double().cpu().numpy() for head in heads])
        said = combine(logits, temperature=scorer.ensemble.temperature, shift=scorer.ensemble.shift)
        dropped += int((~features.kept).sum())
        parts.append(_store_lines(slide_id, features.xy[features.kept], said, scorer.ensemble.threshold))
        if progress is not None:
            progress(done, len(ids), slide_id)
    if failed and not parts:
        raise next(iter(failed.values()))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"slide_id": [], "p_atypical": []})
    notes = ["these are tiles of a grid: P(atypical) presumes a mitotic figure in the middle of each"]
    if dropped:
        notes.append(f"{dropped} tiles that quality control rejected were left out")
    recipe = store.recipe
    if recipe.precision != scorer.ensemble.precision or recipe.dtype != "float32":
        notes.append(
            f"the features were made in {recipe.precision} and kept as {recipe.dtype}, and the model answers pixels in "
            f"{scorer.ensemble.precision}: the last digits of P differ"
        )
    file = write_durably(out / TABLE, table.to_csv(index=False).encode())
    return Scored(
        table=table, failed={name: str(error) for name, error in failed.items()}, notes=tuple(notes), files=(file,)
    )


def _store_lines(slide_id: str, xy: npt.NDArray[np.int64], said: Predictions, threshold: float) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "slide_id": slide_id,
            "x": xy[:, 0],
            "y": xy[:, 1],
            "p_atypical": said.p,
            "call": _calls(said.p, threshold),
            "spread": said.spread,
            "entropy": said.entropy,
            "disagreement": said.disagreement,
        }
    )


def _heads(ensemble: Ensemble, store: FeatureStore) -> list[torch.nn.Linear]:
    """Return each fold's head, or raise if features alone do not give the model's answers."""
    reasons = list(_unlike(ensemble, store))
    if reasons:
        raise StoreMismatchError(
            f"{store.path}: this model cannot be scored from these features:\n  "
            + "\n  ".join(dict.fromkeys(reasons))
            + "\ngive the slides and their detections (--points) instead"
        )
    return [model.head for model in ensemble.models if isinstance(model, Classifier)]


def _unlike(ensemble: Ensemble, store: FeatureStore) -> Iterator[str]:
    recipe, how = store.recipe, ensemble.how
    made = recipe.encoder
    for model in ensemble.models:
        if not isinstance(model, Classifier):
            yield f"the model is a {type(model).__name__} of several encoders, not a head on one"
            continue
        if model.config.mode != "head":
            yield f"the model trained the encoder too (mode {model.config.mode}), not the head alone"
        for name in ("weights_hash", "pooling"):
            ours = getattr(model.spec, name)
            if made.get(name) != ours:
                yield (
                    f"{name}: the model's {model.spec.name} has {ours}, the store's {made.get('name')} has "
                    f"{made.get(name)}"
                )
    if abs(float(recipe.tile.get("mpp") or 0) / TILE_MPP - 1) > 1e-6:
        yield f"mpp: the model was trained at {TILE_MPP:g}, the store's tiles have {recipe.tile.get('mpp')}"
    if not how.side_px == how.crop_px == recipe.tile.get("tile_px"):
        seen = f"the centre of {how.crop_px} px" if how.crop_px else "whole tiles"
        there = recipe.tile.get("tile_px")
        yield f"tile_px: the model sees {seen} as {how.side_px} px, the store's tiles have {there} px"
    if recipe.stain is not None:
        yield "stain: the store's tiles were normalised, the model's were not"
    if recipe.icc:
        yield "icc: the store's colours went through the slides' profiles, the model's did not"
    if ensemble.tta != "none":
        yield f"views: the model averages {ensemble.tta}, features are of one view; --tta none asks for one"
