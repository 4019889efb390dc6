"""The grand-challenge side of MIDOG 2025: what a container is given, what it must write, and how that is scored.

A container finds `inputs.json` and its image under /input, and writes one JSON file under /output. Task 2 (is this
figure atypical?) gives a TIFF of up to 16 pages; task 1 (where are the figures?) gives a region of a slide.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import tifffile

from eosin.errors import CohortError, ConfigError, CorruptSlideError, GeometryError, PredictionsError
from eosin.evaluation.metrics import accuracy, auroc, sensitivity, sign_warning, specificity
from eosin.finetune.cascade import CellClassifier, checked_scores
from eosin.finetune.cells import TILE_MPP, TILE_PX, check_tile
from eosin.finetune.detections import Detections
from eosin.finetune.tables import MPP_TOLERANCE
from eosin.geometry import PLAUSIBLE_MPP, Mpp
from eosin.slides import Slide, open_slide
from eosin.slides.tifffacts import tiff_facts

STACK = "stacked-histopathology-roi-cropouts"
STACK_ANSWER = "multiple-mitotic-figure-classification.json"
REGION = "histopathology-region-of-interest-cropout"
REGION_ANSWER = "mitotic-figures.json"
CLASSES = ("normal", "atypical")
# The evaluation of task 1 takes a coordinate above this for pixels.
MOST_MM = 10.0
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # inch, centimetre


class CellDetector(Protocol):
    """Anything that finds mitotic figures on a slide."""

    def detect(self, slide: Slide, /) -> Detections:
        """Return the points of a slide in level-0 pixels, each with a score in 0-1."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Socket:
    """One input of a container.

    Attributes:
        slug: what it is.
        name: the file's name as its owner knows it; not its name on disk.
        folder: where its file lies.
    """

    slug: str
    name: str
    folder: Path


def read_sockets(input_dir: Path | str) -> tuple[Socket, ...]:
    """Return the inputs that `inputs.json` lists, sorted by slug.

    Raises:
        CohortError: no such file, or not of this form.
    """
    root = Path(input_dir)
    path = root / "inputs.json"
    try:
        listed = orjson.loads(path.read_bytes())
        sockets = [
            Socket(
                slug=str(item["interface"]["slug"]),
                name=str((item.get("image") or {}).get("name", "")),
                folder=root / str(item["interface"]["relative_path"]),
            )
            for item in listed
        ]
    except FileNotFoundError as error:
        raise CohortError(f"{path}: no such file; the platform writes it beside the images") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CohortError(
            f"{path}: not a list of inputs with interface.slug and interface.relative_path "
            f"({type(error).__name__}: {error})"
        ) from error
    return tuple(sorted(sockets, key=lambda socket: socket.slug))


def read_stack(path: Path | str, *, tile_px: int = TILE_PX, mpp: float = TILE_MPP) -> npt.NDArray[np.uint8]:
    """Return the pages of a TIFF as uint8 (n, tile_px, tile_px, 3), in page order.

    Raises:
        CohortError: no such file.
        CorruptSlideError: no TIFF, or one cut short (its pages are not taken for fewer).
        GeometryError: a page of another size or kind, or of a resolution that is not `mpp`, by page.
    """
    path = Path(path)
    if not path.is_file():
        raise CohortError(f"{path}: no such file")
    tiff_facts(path)
    tiles = []
    try:
        with tifffile.TiffFile(path) as tiff:
            for at, page in enumerate(tiff.pages):
                _check_resolution(page.aspage(), f"{path}, page {at + 1}", mpp)
                pixels = page.asarray()
                mode = {3: "RGB", 4: "RGBA"}.get(pixels.shape[-1] if pixels.ndim == 3 else 1, "grey or layered")
                tiles.append(check_tile(pixels, mode, f"{path}, page {at + 1}", tile_px=tile_px))
    except (tifffile.TiffFileError, RuntimeError) as error:  # codecs raise RuntimeError
        raise CorruptSlideError(f"{path}: a page cannot be decoded ({error}); copy it again") from error
    return np.stack(tiles)


def _check_resolution(page: tifffile.TiffPage, where: str, mpp: float) -> None:
    """Refuse a page that states a plausible resolution far from `mpp`; screen resolutions say nothing."""
    unit = _UM_PER_UNIT.get(int(page.tags.valueof("ResolutionUnit", 1)))
    value = page.tags.valueof("XResolution")
    if unit is None or not value or not value[0]:
        return
    stated = unit * value[1] / value[0]
    if PLAUSIBLE_MPP[0] <= stated <= PLAUSIBLE_MPP[1] and abs(stated / mpp - 1) > MPP_TOLERANCE:
        raise GeometryError(
            f"{where}: states {stated:.3g} microns per pixel where crops of {mpp:g} are needed; cut them anew"
        )


def answer(scores: npt.ArrayLike, *, threshold: float) -> list[dict[str, str | float]]:
    """Return what task 2 asks for: a class and P(atypical) of each page, in page order.

    The confidence is that of the class atypical whatever the class called: a sum of both conventions has cost a
    finalist its AUROC.

    Args:
        scores: (n,) P(atypical).
        threshold: at or above it a figure is called atypical.

    Raises:
        PredictionsError: scores that are no probabilities.
        NonFiniteError: NaN.
        ConfigError: a threshold outside 0-1.
    """
    values = checked_scores(scores, np.size(scores))
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold is {threshold:g}; it is a probability from 0 to 1")
    return [{"class": CLASSES[int(value >= threshold)], "confidence": float(value)} for value in values]


def check_answer(items: object, pages: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Return the calls (n,) int8 and confidences (n,) of an answer that the organisers' evaluation would accept.

    Raises:
        PredictionsError: not a list of `pages` objects, another class, or a confidence that is no float in 0-1.
    """
    if not isinstance(items, list) or len(items) != pages:
        found = f"{len(items)} entries" if isinstance(items, list) else type(items).__name__
        raise PredictionsError(f"an answer is a list with one entry a page: found {found} for {pages} pages")
    for at, item in enumerate(items):
        if not isinstance(item, dict) or {"class", "confidence"} - item.keys():
            raise PredictionsError(f"entry {at + 1} is {item!r}; needed an object with class and confidence")
        if item["class"] not in CLASSES:
            raise PredictionsError(f"entry {at + 1} has the class {item['class']!r}; needed {' or '.join(CLASSES)}")
        # A whole number is refused by the evaluation: 1 is no float there.
        if type(item["confidence"]) is not float or not 0 <= item["confidence"] <= 1:
            raise PredictionsError(
                f"entry {at + 1} has the confidence {item['confidence']!r}; needed a number with a point, 0.0 to 1.0"
            )
    calls = np.array([CLASSES.index(item["class"]) for item in items], dtype=np.int8)
    return calls, np.array([item["confidence"] for item in items], dtype=np.float64)


def points_answer(points: Detections, *, mpp: Mpp, threshold: float) -> dict[str, Any]:
    """Return what task 1 asks for: points in millimetres, each a mitotic figure or, below the threshold, none.

    Raises:
        PredictionsError: scores that are no probabilities.
        NonFiniteError: a point without a score.
        GeometryError: points past 10 mm, which the evaluation takes for pixels.
    """
    scores = checked_scores(points.score, len(points))
    mm = points.xy * np.array([mpp.x, mpp.y]) / 1000
    if len(mm) and mm.max() > MOST_MM:
        raise GeometryError(
            f"a point lies at {mm.max():.1f} mm; the evaluation takes coordinates above {MOST_MM:g} for pixels and "
            "refuses the file: is the mpp right, and the input a region rather than a whole slide?"
        )
    rows = [
        {
            "name": "mitotic figure" if score >= threshold else "non-mitotic figure",
            "point": [float(x), float(y), 0],
            "probability": float(score),
        }
        for (x, y), score in zip(mm, scores, strict=True)
    ]
    return {
        "name": "Points of interest",
        "type": "Multiple points",
        "points": rows,
        "version": {"major": 1, "minor": 0},
    }


def run_stack(classifier: CellClassifier, *, input_dir: Path | str, output_dir: Path | str, threshold: float) -> Path:
    """Answer task 2 for the stack under `input_dir`; return the file written.

    Raises:
        CohortError: inputs that are missing or not those of task 2.
        CorruptSlideError: a stack that is cut short.
        GeometryError: pages that are no crops of 128 px at 0.25 microns per pixel.
    """
    folder = _only(read_sockets(input_dir), STACK).folder
    tiles = read_stack(_one_file(folder, (".tif", ".tiff")))
    items = answer(checked_scores(classifier.scores(tiles), len(tiles)), threshold=threshold)
    check_answer(items, len(tiles))
    return _write_json(Path(output_dir) / STACK_ANSWER, items)


def run_region(
    detector: CellDetector,
    *,
    input_dir: Path | str,
    output_dir: Path | str,
    threshold: float,
    mpp: float | None = None,
) -> Path:
    """Answer task 1 for the region under `input_dir`; return the file written.

    Args:
        detector: finds the figures.
        input_dir: as the platform mounts it.
        output_dir: as the platform mounts it.
        threshold: of the detector's scores.
        mpp: of the region, for files that do not say.

    Raises:
        CohortError: inputs that are missing or not those of task 1.
        SlideError: a region that cannot be read.
    """
    folder = _only(read_sockets(input_dir), REGION).folder
    with open_slide(_one_file(folder, (".tif", ".tiff")), mpp=mpp) as slide:
        found = points_answer(detector.detect(slide), mpp=slide.mpp, threshold=threshold)
    return _write_json(Path(output_dir) / REGION_ANSWER, found)


def _only(sockets: Sequence[Socket], slug: str) -> Socket:
    if [socket.slug for socket in sockets] != [slug]:
        listed = ", ".join(socket.slug for socket in sockets) or "nothing"
        raise CohortError(f"inputs.json lists {listed}; needed is {slug} and nothing else")
    return sockets[0]


def _one_file(folder: Path, suffixes: Sequence[str]) -> Path:
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in suffixes)
    if len(files) != 1:
        raise CohortError(f"{folder} holds {len(files)} files of {', '.join(suffixes)}; needed is one")
    return files[0]


def _write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    with draft.open("wb") as stream:
        stream.write(orjson.dumps(value, option=orjson.OPT_INDENT_2))
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    return path


def stack_metrics(truth: Sequence[Mapping[str, Any]], answers: Mapping[str, object]) -> dict[str, Any]:
    """Return task 2's metrics under the organisers' keys, and beside them ours.

    "aggregates" holds what their metrics.json does: overall_sensitivity, overall_specificity,
    overall_balanced_accuracy (the ranking), overall_roc_auc, overall_accuracy, and for each domain `domain_<id>` the
    same five. A number that a domain of one class does not have is None. "eosin" adds the mean and the worst of the
    domains' balanced accuracies, how many cells each rests on, and a warning when the confidences rank backwards.

    Args:
        truth: of each stack {"image": name, "labels": ["normal", ...], "tumordomains": [0, ...]}.
        answers: image name -> the parsed answer.

    Raises:
        CohortError: a truth without these keys, of unequal lengths, or no stack.
        PredictionsError: a stack without an answer, or an answer that would be refused.
    """
    labels, calls, scores, domains = [], [], [], []
    for stack in truth:
        own, where = _truth_of(stack), str(stack.get("image"))
        if where not in answers:
            raise PredictionsError(f"no answer for {where}; there are {', '.join(sorted(answers)) or 'none'}")
        called, confidence = check_answer(answers[where], len(own))
        labels.append(own)
        calls.append(called)
        scores.append(confidence)
        domains += [str(domain) for domain in stack["tumordomains"]]
    if not labels:
        raise CohortError("no stack to score")
    y, called, p, domain = np.concatenate(labels), np.concatenate(calls), np.concatenate(scores), np.array(domains)
    aggregates: dict[str, Any] = {f"overall_{name}": value for name, value in _five(y, called, p).items()}
    counts, accuracies = {}, {}
    for name in sorted(set(domains), key=lambda text: (len(text), text)):
        rows = domain == name
        aggregates[f"domain_{name}"] = _five(y[rows], called[rows], p[rows])
        counts[name] = {"atypical": int(y[rows].sum()), "normal": int((1 - y[rows]).sum())}
        accuracies[name] = aggregates[f"domain_{name}"]["balanced_accuracy"]
    known = {name: value for name, value in accuracies.items() if value is not None}
    both = (aggregates["overall_roc_auc"], aggregates["overall_balanced_accuracy"])
    ours = {
        "domain_mean_balanced_accuracy": float(np.mean(list(known.values()))) if known else None,
        "worst_domain": min(known, key=lambda name: known[name]) if known else None,
        "domains": counts,
        "domains_left_out": sorted(accuracies.keys() - known.keys()),
        "warning": sign_warning(auroc=both[0], ba=both[1]) if None not in both else "",
    }
    return {"results": {}, "aggregates": aggregates, "eosin": ours}


def _truth_of(stack: Mapping[str, Any]) -> npt.NDArray[np.int8]:
    """Return the classes (n,) of one stack's truth."""
    labels, domains = stack.get("labels"), stack.get("tumordomains")
    if not isinstance(labels, list) or not isinstance(domains, list) or len(labels) != len(domains):
        raise CohortError(f"truth of {stack.get('image')!r}: needed are labels and tumordomains of equal length")
    strange = sorted({str(label) for label in labels} - set(CLASSES))
    if strange:
        raise CohortError(f"truth of {stack.get('image')!r}: label {strange[0]!r}; needed {' or '.join(CLASSES)}")
    return np.array([CLASSES.index(label) for label in labels], dtype=np.int8)


def _five(y: npt.NDArray[np.int8], called: npt.NDArray[np.int8], p: npt.NDArray[np.float64]) -> dict[str, float | None]:
    sens = sensitivity(y, called) if y.any() else None
    spec = specificity(y, called) if not y.all() else None
    both = sens is not None and spec is not None
    return {
        "sensitivity": sens,
        "specificity": spec,
        "balanced_accuracy": (sens + spec) / 2 if sens is not None and spec is not None else None,
        "accuracy": accuracy(y, called),
        "roc_auc": auroc(y, p) if both else None,
    }
