"""Sections of a validation report that set the model beside another model, readers, time and other sites."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from eosin.cohort.reading import read_cells
from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import paired_difference
from eosin.evaluation.comparisons import benjamini_hochberg, delong, mcnemar, non_inferiority
from eosin.evaluation.drift import ks_drift, psi
from eosin.evaluation.metrics import auroc, choose_threshold, make_metrics
from eosin.evaluation.readers import model_against_readers, mrmc, reader_table
from eosin.evaluation.report import plain
from eosin.evaluation.temporal import first_alarm, temporal_performance
from eosin.tasks.predictions import Rows, ValidationSettings
from eosin.tasks.validation_sections import PERMUTATIONS, RULE, Values

COMPARED = ("auroc", "auprc", "ba", "brier")
MAX_WINDOWS = 8
ROWS_PER_WINDOW = 30
MARGIN = 0.05


def temporal(rows: Rows, tune: Rows | None, s: ValidationSettings) -> Values:
    """Return AUROC per window of time, its trend and the first alarm; rows without a date are left out."""
    assert rows.date is not None
    dated = rows.take(~np.isnat(rows.date))
    if len(np.unique(dated.y)) < 2:
        raise PredictionsError(
            f"{len(dated)} scored rows have a date in column {s.date!r}, not of both classes; needed both, or "
            "leave out --date"
        )
    assert dated.date is not None
    days = dated.date.astype("datetime64[D]").astype(np.int64)
    rarer = int(min(dated.y.sum(), (dated.y == 0).sum()))
    windows = max(1, min(MAX_WINDOWS, rarer // ROWS_PER_WINDOW))
    window_days = int(-(-(int(np.ptp(days)) + 1) // windows))
    judged_by = dated if tune is None else tune
    found = temporal_performance(
        dated.y,
        dated.p,
        dated.date,
        dated.cluster,
        window_days=window_days,
        resamples=s.resamples,
        seed=s.seed,
    )
    reference = auroc(judged_by.y, judged_by.p)
    alarm = first_alarm(found.windows, reference=reference, margin=MARGIN)
    shown = found.to_dict()
    source = "all dated rows together" if tune is None else "the tune rows"
    trend = shown["trend"]
    change = (
        f"AUROC changes by {trend['point']:+.3f} a year ({trend['low']:+.3f} to {trend['high']:+.3f})."
        if trend["point"] is not None
        else f"No trend: {trend['note']}."
    )
    held = f"the reference {reference:.3f} ({source}) less {MARGIN:g}"
    said = (
        f"First alarm: the window from {alarm} lies wholly below {held}."
        if alarm is not None
        else f"No window lies wholly below {held}."
    )
    return plain(
        {
            "metric": "auroc",
            "rows": [{**row, "label": row["start"]} for row in shown["windows"]],
            "trend": trend,
            "alarm": None if alarm is None else str(alarm),
            "reference": reference,
            "margin": MARGIN,
            "window_days": window_days,
            "words": f"{len(dated)} dated rows in windows of {window_days} days. {change} {said}",
            "method": f"Time: AUROC in consecutive windows of {window_days} days, all on the same resampled "
            f"patients; trend by "
            "regression weighted with the inverse variance of each window.",
        }
    )


def score_drift(rows: Rows, s: ValidationSettings) -> Values:
    """Return how every site's scores differ from those of all others, without labels; there are two sites or more."""
    assert rows.site is not None
    table = pd.DataFrame({"site": rows.site, "cluster": rows.cluster})
    alone = int(np.asarray(table.groupby("cluster")["site"].nunique()).max()) == 1
    found, scores = [], []
    for name in np.unique(rows.site):
        mine = rows.site == name
        index = psi(rows.p[~mine], rows.p[mine])
        test = ks_drift(
            rows.p[~mine, None],
            rows.p[mine, None],
            cluster_reference=rows.cluster[~mine] if alone else None,
            cluster_current=rows.cluster[mine] if alone else None,
            permutations=PERMUTATIONS,
            seed=s.seed,
        )
        found.append(
            {
                "level": str(name),
                "n": int(mine.sum()),
                "psi": index.value,
                "band": index.band,
                "psi_expected": index.expected,
                "ks": test["statistic"][0],
                "p": test["p"][0],
                "note": index.note,
            }
        )
        scores.append({"name": str(name), "deciles": np.quantile(rows.p[mine], np.arange(1, 10) / 10)})
    for row, q in zip(found, benjamini_hochberg([row["p"] for row in found]), strict=True):
        row["p_adjusted"] = q
    how = "patients permuted" if alone else "rows taken as independent, as some patients are at several sites"
    return plain(
        {
            "rows": found,
            "scores": scores,
            "caption": f"Kolmogorov-Smirnov p: {how}, adjusted over sites (Benjamini-Hochberg).",
        }
    )


def comparison(rows: Rows, tune: Rows | None, threshold: float, s: ValidationSettings) -> Values:
    """Return model minus reference on the same rows and the same resampled patients."""
    assert rows.reference is not None
    other = threshold
    if tune is not None and tune.reference is not None and s.threshold is None:
        other = choose_threshold(tune.y, tune.reference, rule=RULE)
    mine = make_metrics(COMPARED, rows.y, rows.p, threshold=threshold)
    theirs = make_metrics(COMPARED, rows.y, rows.reference, threshold=other)
    metrics = {}
    differences = {}
    for name in COMPARED:
        ones = np.ones((1, len(rows)))
        d = paired_difference(
            mine[name], theirs[name], rows.cluster, y=rows.y, resamples=s.resamples, level=s.level, seed=s.seed
        )
        differences[name] = d
        metrics[name] = {"model": mine[name](ones)[0], "reference": theirs[name](ones)[0], "difference": d}
    where = (
        "each at the threshold chosen on its own tune scores"
        if other != threshold
        else f"both at threshold {threshold:.3f}"
    )
    compared = f"{s.score} against {s.reference} on the same {len(rows)} rows, {where}. Brier score: lower is better."
    verdict = None
    if s.margin is not None:
        test = non_inferiority(differences["auroc"], margin=s.margin, alpha=(1 - s.level) / 2)
        said = "Non-inferiority is shown" if test.established else "Non-inferiority is not shown"
        p = "p below 0.0001" if test.p < 1e-4 else f"p {test.p:.4f}"
        words = (
            f"{said}: the AUROC difference has the lower bound {test.low:.3f}, to be above -{s.margin:g} "
            f"(one-sided {p}). The margin must have been set before looking."
        )
        verdict = test.to_dict() | {"words": words}
    return plain(
        {
            "metrics": metrics,
            "words": compared,
            "thresholds": {"model": threshold, "reference": other},
            "delong": delong(rows.y, rows.p, rows.reference, level=s.level),
            "mcnemar": mcnemar(rows.y, rows.p >= threshold, rows.reference >= other),
            "non_inferiority": verdict,
        }
    )


def readers_section(rows: Rows, threshold: float, s: ValidationSettings) -> Values:
    """Return the readers' tables, with and without help, and the model beside them where their cases are rows here."""
    assert s.readers is not None
    reads = read_readers(s.readers)
    table = reader_table(reads, level=s.level)
    helped = (
        mrmc(reads, resamples=s.resamples, level=s.level, seed=s.seed)
        if "assisted" in reads and reads["reader"].nunique() > 1
        else []
    )
    model, why = _calls_of_cases(reads, rows, threshold)
    against = (
        [] if model is None else model_against_readers(reads, model, resamples=s.resamples, level=s.level, seed=s.seed)
    )
    alone = table[(table["scope"] == "reader") & (table["arm"] == "unassisted")]
    points = [
        {"name": str(name), **dict(zip(part["metric"], part["point"], strict=True))}
        for name, part in alone.groupby("name")
    ]
    points = [one for one in plain(points) if None not in one.values()]
    words = f"{reads['reader'].nunique()} readers, {reads['case'].nunique()} cases. {why}"
    return plain({"table": table, "mrmc": helped, "model": against, "points": points, "words": words})


def _calls_of_cases(reads: pd.DataFrame, rows: Rows, threshold: float) -> tuple[pd.DataFrame | None, str]:
    """Return the model's call of every case read (case, call), or None, and in words how they were matched."""
    cases = set(reads["case"])
    for name, keys in (("image", rows.image), ("patient", rows.cluster)):
        if keys is None or not cases <= set(keys.tolist()):
            continue
        table = pd.DataFrame({"case": keys, "call": (rows.p >= threshold).astype(np.int64)})
        table = pd.DataFrame(table[np.isin(keys, list(cases))])
        if table["case"].is_unique:
            return table, f"Cases are matched to the scored rows by {name}."
    return None, (
        "The model is not set beside the readers: their cases are not all found, once each, in the image "
        "or the patient column of the scored rows."
    )


def read_readers(path: Path) -> pd.DataFrame:
    """Return the table of readers' answers, calls as 0 and 1; case names stay text.

    Raises:
        CohortError: it cannot be read.
        PredictionsError: a call is not 0 or 1.
    """
    reads = read_cells(path)
    for name in ("truth", "unassisted", "assisted"):
        if name in reads:
            calls = reads[name].to_numpy()
            numbers = np.asarray(pd.to_numeric(reads[name], errors="coerce"), dtype=np.float64)
            bad = np.flatnonzero(~np.isin(numbers, (0, 1)))
            if len(bad):
                raise PredictionsError(
                    f"{path}, row {reads.index[bad[0]]}: {name} is {calls[bad[0]]!r}; needed a call, 0 or 1"
                )
            reads[name] = numbers.astype(np.int64)
    return reads.reset_index(drop=True)
