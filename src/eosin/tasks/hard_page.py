"""The page of hard examples: each error beside its nearest labelled neighbours of other patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from eosin.evaluation.report import Report
from eosin.features.store import FeatureStore
from eosin.retrieval.build import open_one_store
from eosin.tasks.hard_judge import AGREEMENT, ALONE, ALPHA, CONFUSABLE, DOUBTFUL, Judged
from eosin.tasks.pictures import data_uri, jpeg_bytes
from eosin.tasks.review_pool import Pool, pool_from_samples, tile_pictures
from eosin.tasks.samples import Samples
from eosin.version import __version__

SHOWN = 12  # errors of each verdict with pictures
NEAR = 8  # neighbours shown of each
PICTURE_PX = 128
WORDS = {
    DOUBTFUL: "Neighbours side with the model against the label: look at these labels again first.",
    ALONE: "Neighbours side with the label: the features tell these cases, and this head did not use it.",
    CONFUSABLE: "Neighbours are mixed: cases of both classes look alike to these features.",
}


def hard_page(
    report: Report,
    judged: Judged,
    errors: pd.DataFrame,
    samples: Samples,
    rows: npt.NDArray[np.int64],
    labels: Sequence[str],
    picture: Callable[[int], str | None],
) -> str:
    """Return the page as HTML.

    Args:
        report: of `hard_examples`.
        judged: errors and neighbours, in positions of `rows`.
        errors: one row an error; column ``error`` is its place in `judged`.
        samples: features, for the rows' names.
        rows: position in the cohort of each row that `judged` speaks of.
        labels: label of each of these rows.
        picture: data URI of a row of the cohort, or None.
    """
    r = report.sections
    names = samples.cohort.row_ids()

    def shown(at: int, **about: Any) -> Mapping[str, Any]:
        return {"uri": picture(int(rows[at])), "name": names[rows[at]], "label": labels[at], **about}

    groups = []
    for verdict in (DOUBTFUL, CONFUSABLE, ALONE):
        mine = errors.loc[errors["verdict"] == verdict]
        cases = []
        for one in mine.head(SHOWN).to_dict(orient="records"):
            at = int(one["error"])
            near = judged.neighbours[at]
            pairs = zip(near[:NEAR].tolist(), judged.similarity[at].tolist(), strict=False)
            cases.append(
                {
                    **one,
                    "tile": shown(int(judged.rows[at])),
                    "near": [shown(row, similarity=value) for row, value in pairs],
                }
            )
        groups.append({"verdict": verdict, "n": len(mine), "words": WORDS[verdict], "cases": cases})
    positive = str(r["data"]["positive_label"])
    page = {
        "title": "eosin: hard examples",
        "heading": "Where the model is wrong",
        "lead": f"{r['errors']} errors among {r['data']['rows_scored']} scored rows; features {r['encoder']}, "
        f"threshold {r['threshold']['threshold']:.3f} ({r['threshold']['words']}).",
        "warnings": [one.message for one in report.remarks if one.severity == "warning"],
        "verdicts": r["verdicts"],
        "positive": positive,
        "groups": groups,
        "methods": f"Of each error the {judged.neighbours.shape[1]} nearest labelled rows of other patients, one a "
        f"patient, by cosine of centred and scaled features; {NEAR} are shown. Classes count by the inverse of their "
        f"share: balance 0.5 is what chance gives. Label doubtful: balance at least {AGREEMENT:g} on the model's side "
        f"and p at most {ALPHA:g} (binomial, one case at a time); model alone: the same on the label's side. By luck "
        f"alone {r['by_luck']:.1f} of {r['errors']} errors would get one of these two verdicts.",
        "footer": f"Made by eosin {__version__}. A verdict says where to look; it proves no label wrong.",
    }
    environment = Environment(loader=PackageLoader("eosin.tasks"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("review_hard.html.j2").render(page)


def sample_pictures(samples: Samples, features: Path, slides: Sequence[Path]) -> Callable[[int], str | None]:
    """Return a function from a row of the cohort to its picture as a data URI; None where there is none.

    Args:
        samples: what was probed.
        features: where the features came from; a store says how large its tiles are.
        slides: where the slides lie.
    """
    if samples.pictures is None and samples.source != "store":
        return lambda row: None
    pool = pool_from_samples(samples)
    if samples.pictures is None:
        pool = _placed(pool, samples, open_one_store(features))
    read = tile_pictures(pool, features, slides)

    def uri(row: int) -> str | None:
        tile = read(row).tile
        if tile is None:
            return None
        image = Image.fromarray(tile)
        image.thumbnail((PICTURE_PX, PICTURE_PX))
        return data_uri(jpeg_bytes(np.asarray(image)), "image/jpeg")

    return uri


def _placed(pool: Pool, samples: Samples, store: FeatureStore) -> Pool:
    """Return the pool with the place of each row that is a tile of a slide."""
    table = samples.cohort.table
    if "x" not in table:
        return pool
    slide_ids = table["slide_id"].astype(str).to_numpy(np.str_)
    sizes = {name: store.tiles(name).size0_px or (np.nan, np.nan) for name in np.unique(slide_ids).tolist()}
    xy = table[["x", "y"]].to_numpy(dtype=np.float64)
    size0 = np.array([sizes[name] for name in slide_ids.tolist()], np.float64)
    size0[np.isnan(xy[:, 0])] = np.nan
    return replace(pool, slide_id=slide_ids, xy=np.nan_to_num(xy).astype(np.int64), size0_px=size0)
