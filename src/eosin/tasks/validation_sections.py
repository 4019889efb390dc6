"""The sections of a validation report: each a function from checked rows to plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import bootstrap
from eosin.evaluation.calibration import (
    TemperatureScaling,
    brier_decomposition,
    ece,
    mce,
    reliability,
)
from eosin.evaluation.conformal import ALL_SITES, coverage_table, split_conformal
from eosin.evaluation.heterogeneity import heterogeneity, interaction_test
from eosin.evaluation.metrics import confusion, log_loss, make_metrics, threshold_spread
from eosin.evaluation.report import Remark, plain
from eosin.evaluation.selective import risk_coverage
from eosin.evaluation.subgroups import (
    calibration_table,
    describe,
    pooled_and_domains,
    subgroup_table,
)
from eosin.evaluation.usefulness import decision_curve
from eosin.tasks.predictions import Rows, ValidationSettings

POOLED = ("auroc", "auprc", "ba", "sensitivity", "specificity", "ppv", "npv", "accuracy", "f1", "mcc", "kappa", "brier")
PER_LEVEL = ("auroc", "ba", "sensitivity", "specificity")
DEFAULT_THRESHOLD = 0.5
RULE = "balanced_accuracy"
CURVE_POINTS = 200
CURVE_RESAMPLES = 1000
PERMUTATIONS = 199
HISTOGRAM_BINS = 30
SHOWN_WRONG = 12
Values = dict[str, Any]


def data_section(rows: Rows, facts: Mapping[str, Any]) -> Values:
    """Return what was read and scored, also by site."""
    sites: list[Values] = []
    if rows.site is not None:
        for name in np.unique(rows.site):
            mine = np.flatnonzero(rows.site == name)
            found = describe(rows.y, rows.p, rows.cluster, mine)
            sites.append({"level": str(name), **found, "prevalence": found["positives"] / found["n"]})
    dates = None
    if rows.date is not None and not np.isnat(rows.date).all():
        known = rows.date[~np.isnat(rows.date)]
        dates = [str(day.astype("datetime64[D]")) for day in (known.min(), known.max())]
    return plain({**facts, "dates": dates, "by_site": sites})


def operating_point(tune: Rows | None, s: ValidationSettings) -> Values:
    """Return the threshold, and who chose it."""
    if s.threshold is not None:
        return {"threshold": s.threshold, "source": "given", "rule": None, "spread": None, "words": "set beforehand"}
    if tune is None:
        words = "the default, chosen by nobody for these data"
        return {"threshold": DEFAULT_THRESHOLD, "source": "default", "rule": None, "spread": None, "words": words}
    spread = threshold_spread(
        tune.y, tune.p, tune.cluster, rule=RULE, resamples=s.resamples, level=s.level, seed=s.seed
    )
    words = f"chosen on {len(tune)} tune rows for the best balanced accuracy, none of which is scored"
    return {"threshold": spread.point, "source": "tune rows", "rule": RULE, "spread": plain(spread), "words": words}


def discrimination(rows: Rows, threshold: float, s: ValidationSettings) -> Values:
    """Return pooled metrics with intervals, the confusion table, curves and score histograms."""
    metrics = make_metrics(POOLED, rows.y, rows.p, threshold=threshold)
    found = bootstrap(metrics, rows.cluster, y=rows.y, resamples=s.resamples, level=s.level, seed=s.seed)
    table = confusion(rows.y, (rows.p >= threshold).astype(np.int64), 2)
    precision, recall, _ = precision_recall_curve(rows.y, rows.p)
    thin = _thin(len(recall))
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    return plain(
        {
            "pooled": found,
            "confusion": dict(zip(("tn", "fp", "fn", "tp"), table.ravel().astype(int).tolist(), strict=True)),
            "roc": _roc(rows.y, rows.p),
            "roc_by_site": _site_curves(rows),
            "pr": {"recall": recall[thin], "precision": precision[thin]},
            "histogram": {
                "edges": edges,
                "positive": np.histogram(rows.p[rows.y == 1], edges)[0],
                "negative": np.histogram(rows.p[rows.y == 0], edges)[0],
            },
        }
    )


def _roc(y: npt.NDArray[np.int8], p: npt.NDArray[np.float64]) -> Values:
    fpr, tpr, _ = roc_curve(y, p)
    thin = _thin(len(fpr))
    return {"fpr": fpr[thin], "tpr": tpr[thin]}


def _site_curves(rows: Rows) -> list[Values]:
    """Return the ROC curve of every site that is large enough to draw."""
    curves = []
    for name in [] if rows.site is None else np.unique(rows.site):
        mine = np.flatnonzero(rows.site == name)
        if not describe(rows.y, rows.p, rows.cluster, mine)["flag"]:
            curves.append({"name": str(name), **_roc(rows.y[mine], rows.p[mine])})
    return curves


def _thin(count: int) -> npt.NDArray[np.int64]:
    """Return at most `CURVE_POINTS` positions among `count`, both ends kept."""
    return np.unique(np.linspace(0, count - 1, min(count, CURVE_POINTS)).round().astype(np.int64))


def sign_remark(section: Mapping[str, Any], s: ValidationSettings) -> list[Remark]:
    """Return a warning when the score ranks the classes the wrong way round."""
    auroc, ba = section["pooled"]["auroc"], section["pooled"]["ba"]["point"]
    against = auroc["point"] < 0.5 < ba
    below = auroc["high"] is not None and auroc["high"] < 0.5
    if not (against or below):
        return []
    found = f"AUROC is {auroc['point']:.3f}" + (f" while balanced accuracy is {ba:.3f}" if against else "")
    cure = (
        f"Column {s.score!r} is most likely the probability of the other class. Give --positive VALUE to name "
        f"the label "
        "that the score is the probability of, or hand over 1 - score. Every other number here is upside down "
        "until then."
    )
    return [
        Remark(kind="sign", severity="warning", message=f"{found}: the score ranks positives below negatives. {cure}")
    ]


def _three(row: Mapping[str, Any], name: str, level: float) -> Values:
    ends = {"point": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}
    return plain({**ends, "level": level, "note": row["flag"] if np.isnan(row[name]) else ""})


def calibration(rows: Rows, tune: Rows | None, s: ValidationSettings) -> Values:
    """Return calibration of all rows and of every site, reliability tables, and what a temperature would change."""
    level = np.full(len(rows), "all") if rows.site is None else rows.site
    table = calibration_table(
        rows.y, rows.p, level, rows.cluster, bins=s.bins, resamples=CURVE_RESAMPLES, confidence=s.level, seed=s.seed
    )
    each = []
    for row in table.to_dict("records"):
        facts = {
            key: row[key]
            for key in ("level", "n", "positives", "clusters", "mean_score", "frequency", "ece_floor", "flag")
        }
        each.append(
            plain(facts) | {name: _three(row, name, s.level) for name in ("ece", "brier", "slope", "intercept")}
        )
    panels = [
        {
            "name": "all rows",
            "n": len(rows),
            "ece": each[0]["ece"]["point"],
            "rows": reliability(rows.y, rows.p, bins=s.bins),
        }
    ]
    for found in each[1:] if rows.site is not None else []:
        mine = level == found["level"]
        both = len(np.unique(rows.y[mine])) == 2
        table_rows = reliability(rows.y[mine], rows.p[mine], bins=s.bins) if both else []
        panels.append({"name": found["level"], "n": found["n"], "ece": found["ece"]["point"], "rows": table_rows})
    more = {
        "ece_mass": ece(rows.y, rows.p, bins=s.bins, scheme="mass"),
        "mce": mce(rows.y, rows.p, bins=s.bins),
        "brier_parts": brier_decomposition(rows.y, rows.p, bins=s.bins),
    }
    return plain(
        {
            "bins": s.bins,
            "pooled": each[0] | more,
            "by_site": each[1:] if rows.site is not None else [],
            "reliability": panels,
            "temperature": None if tune is None else _temperature(rows, tune, s),
        }
    )


def _temperature(rows: Rows, tune: Rows, s: ValidationSettings) -> Values | None:
    """Return what temperature scaling fitted on the tune rows does to the scored rows; None where none fits."""
    try:
        scaling = TemperatureScaling.fit(tune.y, tune.p)
    except PredictionsError:
        return None
    scaled = scaling.apply(rows.p)
    return {
        "temperature": scaling.temperature,
        "n": scaling.n,
        "ece_before": ece(rows.y, rows.p, bins=s.bins),
        "ece_after": ece(rows.y, scaled, bins=s.bins),
        "log_loss_before": log_loss(rows.y, rows.p),
        "log_loss_after": log_loss(rows.y, scaled),
    }


def usefulness(rows: Rows, s: ValidationSettings) -> Values:
    """Return the decision curve, and the longest range of thresholds where the model surely beats both rules."""
    curve = decision_curve(rows.y, rows.p, cluster=rows.cluster, resamples=CURVE_RESAMPLES, level=s.level, seed=s.seed)
    better = np.flatnonzero(np.asarray(curve["gain_low"]) > 0)
    longest = max(np.split(better, np.flatnonzero(np.diff(better) > 1) + 1), key=len)
    t = np.asarray(curve["threshold"])
    between = [float(t[longest[0]]), float(t[longest[-1]])] if len(longest) else None
    return plain({"decision_curve": curve, "better_between": between})


def selective(rows: Rows, threshold: float, s: ValidationSettings) -> Values:
    """Return the risk-coverage curve."""
    found = risk_coverage(
        rows.y, rows.p, threshold=threshold, cluster=rows.cluster, resamples=CURVE_RESAMPLES, level=s.level, seed=s.seed
    )
    return plain(found)


def conformal(rows: Rows, tune: Rows, s: ValidationSettings) -> Values:
    """Return how often prediction sets calibrated on the tune rows hold the truth, per site where all have some."""
    by_site = rows.site is not None and tune.site is not None and set(rows.site) <= set(tune.site)
    sites = {"site_cal": tune.site, "site_test": rows.site} if by_site else {}
    sets = split_conformal(tune.p, tune.y, rows.p, alpha=s.alpha, **sites)
    table = coverage_table(
        rows.y, sets.sets, site=rows.site, cluster=rows.cluster, resamples=s.resamples, level=s.level, seed=s.seed
    )
    ordered = table.sort_values("site", key=lambda site: site.where(site != ALL_SITES, ""), kind="stable")
    return plain({**sets.to_dict(), "by_site": by_site, "coverage": ordered})


def levels_section(rows: Rows, threshold: float, s: ValidationSettings) -> Values | None:
    """Return metrics per site and per level of every subgroup column; None without any such column."""
    found: Values = {}
    if rows.site is not None and s.site is not None:
        found[s.site] = _sites(rows, rows.site, threshold, s)
    for name, level in rows.subgroups.items():
        if name not in found:
            found[name] = _subgroup(rows, level, threshold, s)
    return found or None


def _sites(rows: Rows, site: npt.NDArray[np.str_], threshold: float, s: ValidationSettings) -> Values:
    options = {
        "metrics": PER_LEVEL,
        "threshold": threshold,
        "resamples": s.resamples,
        "confidence": s.level,
        "seed": s.seed,
    }
    table = pooled_and_domains(rows.y, rows.p, site, rows.cluster, **options)
    summary = {
        label: _wide(_part(table, scope))
        for scope, label in (("domain_mean", "mean of sites"), ("worst_domain", "worst site"), ("pooled", "pooled"))
    }
    domains = _part(table, "domain")
    spread = _heterogeneity(domains)
    words = ["A site in italics has too few cases to be judged alone; it is left out of the worst."]
    words += [_spread_words(rows, site, threshold, s)]
    if spread is not None:
        share = f"{100 * spread['i2_low']:.0f} to {100 * spread['i2_high']:.0f} %"
        note = f"; {spread['note']}" if spread["note"] else ""
        words.append(
            f"Heterogeneity of AUROC: I² {100 * spread['i2']:.0f} % ({share}), Cochran's Q {spread['q']:.1f} on "
            f"{spread['df']} degrees of freedom, p {spread['p']:.3f}{note}."
        )
    if "auroc" in summary["worst site"]:
        words.append(f"The worst AUROC is that of {summary['worst site']['auroc']['level']}.")
    found = {"rows": _wide_rows(domains), "summary": summary, "heterogeneity": spread, "caption": " ".join(words)}
    return plain(found)


def _part(table: pd.DataFrame, scope: str) -> pd.DataFrame:
    return pd.DataFrame(table[table["scope"] == scope])


def _heterogeneity(domains: pd.DataFrame) -> Values | None:
    """Return Q and I² of AUROC over the sites that are large enough; None with fewer than two."""
    rows = pd.DataFrame(domains[(domains["metric"] == "auroc") & (domains["flag"] == "") & (domains["se"] > 0)])
    return heterogeneity(rows["point"], rows["se"]).to_dict() if len(rows) > 1 else None


def _subgroup(rows: Rows, level: npt.NDArray[np.str_], threshold: float, s: ValidationSettings) -> Values:
    options = {
        "metrics": PER_LEVEL,
        "threshold": threshold,
        "resamples": s.resamples,
        "confidence": s.level,
        "seed": s.seed,
    }
    found = subgroup_table(rows.y, rows.p, level, rows.cluster, **options)
    gaps = {
        row["metric"]: {name: row["gap" if name == "point" else name] for name in ("point", "low", "high")}
        for row in found.gaps.to_dict("records")
    }
    caption = (
        _spread_words(rows, level, threshold, s)
        + " The gap is that between the best and the worst level, picked on these data, so it is too large on average."
    )
    return plain({"rows": _wide_rows(found.table), "summary": {"gap, best to worst": gaps}, "caption": caption})


def _spread_words(rows: Rows, level: npt.NDArray[np.str_], threshold: float, s: ValidationSettings) -> str:
    """Return the test of whether AUROC differs between the levels, in words."""
    try:
        test = interaction_test(
            rows.y, rows.p, level, rows.cluster, threshold=threshold, permutations=PERMUTATIONS, seed=s.seed
        )
    except PredictionsError as error:
        return f"Whether AUROC differs between levels was not tested: {error}."
    note = f"; {test.note}" if test.note else ""
    return f"Does AUROC differ between levels? p {test.p:.3f} ({test.permutations} permutations {test.scheme}{note})."


def _wide_rows(table: pd.DataFrame) -> list[Values]:
    """Return one mapping a level, its metrics gathered."""
    gathered: dict[str, Values] = {}
    for row in table.to_dict("records"):
        facts = {key: row[key] for key in ("n", "positives", "clusters", "flag")}
        mine = gathered.setdefault(str(row["level"]), {"level": str(row["level"]), **facts, "metrics": {}})
        mine["metrics"][row["metric"]] = {key: row[key] for key in ("point", "low", "high", "se", "degenerate")}
    return list(gathered.values())


def _wide(table: pd.DataFrame) -> Values:
    return {
        row["metric"]: {key: row[key] for key in ("level", "n", "point", "low", "high")}
        for row in table.to_dict("records")
    }


def confidently_wrong(rows: Rows, threshold: float, positive: str) -> list[Values]:
    """Return the wrongly called rows that lie farthest from the threshold, relative to the room on their side."""
    called = rows.p >= threshold
    sure = np.where(called, (rows.p - threshold) / (1 - threshold), (threshold - rows.p) / threshold)
    wrong = np.flatnonzero(called != (rows.y == 1))
    shown = wrong[np.argsort(-sure[wrong], kind="stable")][:SHOWN_WRONG]
    return [
        {
            "row": int(rows.number[i]),
            "score": float(rows.p[i]),
            "label": positive if rows.y[i] else f"not {positive}",
            "cluster": str(rows.cluster[i]),
            "site": None if rows.site is None else str(rows.site[i]),
            "image": None if rows.image is None else str(rows.image[i]),
        }
        for i in shown
    ]


def threshold_remark(point: Values) -> list[Remark]:
    """Return a note when nobody chose the operating point."""
    if point["source"] != "default":
        return []
    message = (
        f"The operating point {DEFAULT_THRESHOLD} is the default and was not chosen for these data. Give "
        f"--threshold (set "
        "beforehand), or --split with tune rows to choose one on rows that are not scored."
    )
    return [Remark(kind="threshold", severity="note", message=message)]


def site_remarks(sections: Values) -> list[Remark]:
    """Return a note that names the sites that are too small to be judged alone."""
    small = [
        f"{one['level']} (n {one['n']}, {one['positives']} positive)"
        for one in sections["data"]["by_site"]
        if one["flag"]
    ]
    if not small:
        return []
    message = f"Too few cases to be judged alone, shown in italics: {', '.join(small)}."
    return [Remark(kind="small-site", severity="note", message=message)]
