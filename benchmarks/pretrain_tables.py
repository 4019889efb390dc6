"""Tables of what concerns pretraining, for `tables.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]
Markdown = Callable[..., str]
ORDER = ("texture", "untrained", "EfficientNet-Lite0 (ImageNet)", "eosin-tiny", "seed 1", "seed 2")
CENTRE = ", central 64 px"
CURVE = {
    "0 %": ("untrained", "untrained, seed 1", "untrained, seed 2"),
    "25 %": ("25 %", "seed 1, 25 %", "seed 2, 25 %"),
    "50 %": ("50 %", "seed 1, 50 %", "seed 2, 50 %"),
    "100 %": ("eosin-tiny", "seed 1", "seed 2"),
}
TESTS = ("within", "across_scanner", "external", "shuffled")


def throughput(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """Images a second of whole training loops, and of the step alone."""
    rows = [
        (one["method"], _span(one["images_per_s"], 1), f"{one['times_lightly']:.2f}" if "times_lightly" in one else "-")
        for one in record["methods"]
    ]
    note = f"dim {record['dim']}, depth {record['depth']}, {record['precision']}, batch {record['batch']}"
    return f"{markdown(('loop', 'images/s', 'times lightly'), rows)}\n\n{origin(record, note)}"


def views(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """Tiles a second made into crops."""
    rows = [
        (name, _span(values, 2), f"{record['tiles_per_second'][name]:.0f}")
        for name, values in record["seconds"].items()
    ]
    columns = (f"{record['tiles']} tiles into 2 x 224 and 8 x 96 px", "seconds", "tiles/s")
    load = f"load average {record['load_average']['before']:.1f}"
    return f"{markdown(columns, rows)}\n\n{origin(record, load)}"


def sampling(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """Tiles a second drawn from slides."""
    rows = [
        (f"{run['slides']} slides, {run['workers']} workers: {name}", _span(one["tiles_per_s"], 0), one["ratio"])
        for run in record["runs"]
        for name, one in run["methods"].items()
    ]
    waits = ", ".join(f"{run['busy']['waited']:.1%} with {run['slides']} slides" for run in record["runs"])
    busy = (
        f"Share of its time that a training step of {record['runs'][0]['busy']['step_s']} s waited for tiles: {waits}."
    )
    load = f"load average {record['machine']['load_before']:.1f}"
    return f"{markdown(('drawn from slides', 'tiles/s', 'ratio'), rows)}\n\n{busy} {origin(record, load)}"


def skill(record: Record, markdown: Markdown, origin: Markdown, *, suffix: str = "") -> str:
    """What features of each encoder tell on AMF: label and scanner."""
    found = record["results"]
    rows = [
        (
            f"{name}, {head}",
            *(_interval(found[name][head][test]) for test in TESTS),
            _interval(found[name]["scanner"]) if head == "linear" else "",
        )
        for name in (f"{one}{suffix}" for one in ORDER)
        if name in found
        for head in ("knn", "linear")
    ]
    names = ("encoder, head", "within", "scanner left out", "external", "shuffled labels", "scanner told")
    return markdown(names, rows)


def curve(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """Mean and range over training seeds of what features tell, by share of the training."""
    found = record["results"]
    rows = [
        (
            share,
            len(names),
            *(
                _seeds([found[name][head][test]["point"] for name in names])
                for head in ("knn", "linear")
                for test in ("within", "external")
            ),
            _seeds([found[name]["knn"]["shuffled"]["point"] for name in names]),
        )
        for share, names in CURVE.items()
    ]
    columns = ("of 1,200 steps", "seeds", "kNN within", "kNN external", "linear within", "linear external")
    return markdown((*columns, "kNN shuffled"), rows)


def compare(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """Mean over training seeds minus each other encoder, on the same resampled slides."""
    found: dict[str, dict[str, str]] = {}
    for key, one in record["results"].items():
        name, head, test = key.split("/")
        found.setdefault(name, {})[f"{head}/{test}"] = f"{one['point']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
    tests = ("knn/within", "knn/external", "linear/within", "linear/external")
    rows = [(name, *(by[test] for test in tests)) for name, by in found.items()]
    return markdown(("minus", "kNN within", "kNN external", "linear within", "linear external"), rows)


def centre(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """The same for the middle of each crop."""
    return skill(record, markdown, origin, suffix=CENTRE)


def camelyon(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """The smoke test on camelyon16."""
    found = record["results"]
    shown = {name: one for name, one in found.items() if "," not in name and "%" not in name}
    rows = [(name, one["tiles"], one["slides"], f"{one['accuracy']:.3f}") for name, one in shown.items()]
    return markdown(("encoder", "tiles", "slides", "accuracy, neighbours of other slides"), rows)


def ablations(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """Mean and range over seeds of each variant of a recipe."""
    found: dict[str, list[Record]] = {}
    for key, one in record["results"].items():
        found.setdefault(key.rsplit("/", 1)[0], []).append(one)
    rows = []
    for name, seeds in found.items():
        cells = [
            _seeds([one[head][test]["point"] for one in seeds])
            for head in ("knn", "linear")
            for test in ("within", "external")
        ]
        shuffled = _seeds([one["knn"]["shuffled"]["point"] for one in seeds])
        spread = [
            _seeds([one["monitors"][what] for one in seeds], digits) for what, digits in (("cosine", 2), ("rankme", 1))
        ]
        rows.append((name, len(seeds), *spread, *cells, shuffled, _seeds([one["scanner"]["point"] for one in seeds])))
    columns = (
        "variant",
        "seeds",
        "mean cosine",
        "RankMe",
        "kNN within",
        "kNN external",
        "linear within",
        "linear external",
    )
    return markdown((*columns, "kNN shuffled", "scanner told"), rows)


def labels(record: Record, markdown: Markdown, origin: Markdown) -> str:
    """External AUROC by share of the slides whose labels were given."""
    found: dict[str, dict[str, list[float]]] = {}
    cells: dict[str, list[int]] = {}
    for key, one in record["results"].items():
        name, share, _seed = key.split("/")
        found.setdefault(name, {}).setdefault(share, []).append(one["point"])
        cells.setdefault(share, []).append(one["cells"])
    shares = sorted(cells, key=float)
    rows = [(name, *(_seeds(by[share]) for share in shares)) for name, by in found.items()]
    heads = [f"{float(share):.0%} ({statistics.mean(cells[share]):.0f} cells)" for share in shares]
    return markdown(("learner", *heads), rows)


def _interval(one: Record) -> str:
    if not isinstance(one, dict):
        return f"{one:.3f}"
    return f"{one['point']:.3f} ({one['low']:.3f}-{one['high']:.3f})"


def _seeds(values: Sequence[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _span(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
