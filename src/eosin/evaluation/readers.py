"""Reader studies: the same cases read by people without and with help, and a model beside them.

A table of reads has one row a reader and case: `reader`, `case`, `truth`, `unassisted`, `assisted` (calls, 1 =
positive), and may have `experience` (of the reader) and `patient` (of the case). `case` and `patient` are what the
truth belongs to; `assisted` may be absent where people are only compared with a model.

Reads of one case by several readers are not independent, nor are cases of one patient. Numbers over several readers
therefore come with an interval that resamples readers and patients both (multi-reader multi-case bootstrap, Beiden,
Wagner & Campbell 2000); Wilson intervals stand beside single readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from eosin.errors import PredictionsError
from eosin.evaluation.bootstrap import CHUNK_CELLS, bootstrap_values, cluster_weights, two_sided_p
from eosin.evaluation.comparisons import holm, mcnemar
from eosin.evaluation.proportions import wilson
from eosin.evaluation.weighted import LinearMetric, ratio

Arm = Literal["unassisted", "assisted"]
Values = npt.NDArray[np.float64]

METRICS = ("accuracy", "sensitivity", "specificity", "balanced_accuracy")
PROPORTIONS = METRICS[:3]
FEW_READERS = 5


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class _Reads:
    """A study as matrices: which reader read which case, and what was right.

    Attributes:
        readers: (R,) names.
        cases: (C,) names.
        truth: (C,) 0 or 1.
        patient: (C,) patient of the case.
        right: arm -> (R, C) 1.0 where the call was right, 0 where wrong or not read.
        read: (R, C) 1.0 where the reader read the case.
    """

    readers: npt.NDArray[np.object_]
    cases: npt.NDArray[np.object_]
    truth: npt.NDArray[np.int64]
    patient: npt.NDArray[np.object_]
    right: dict[str, Values]
    read: Values


def reader_table(reads: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Return accuracy, sensitivity and specificity of every reader, of every experience level, and of all.

    Args:
        reads: see the module.
        level: of the Wilson intervals.

    Returns:
        Columns scope (reader, experience, all), name, arm, metric, correct, n, readers, point, low, high, note. Rows
        over several readers pool their reads; the note says that their interval is too narrow, and `mrmc` has the
        right one. point, low and high are NaN where there is no such case.

    Raises:
        PredictionsError: columns missing, calls other than 0 and 1, a case read twice by one reader ...
    """
    checked = _check(reads)
    parts: list[tuple[str, str, pd.DataFrame]] = [("reader", str(n), rows) for n, rows in checked.groupby("reader")]
    if "experience" in checked:
        parts += [("experience", str(name), rows) for name, rows in checked.groupby("experience")]
    parts.append(("all", "all", checked))
    return pd.DataFrame([row for part in parts for row in _proportions(*part, level)])


def reader_changes(reads: pd.DataFrame) -> pd.DataFrame:
    """Return McNemar's test of help, a row a reader: were more wrong calls mended than right ones spoiled?

    Returns:
        Columns reader, n, mended (wrong alone, right with help), spoiled (right alone, wrong with help), p, p_holm
        (over the readers), method (exact, chi-squared). p takes a reader's cases as independent.

    Raises:
        PredictionsError: as `reader_table`, or no column `assisted`.
    """
    checked = _check(reads, assisted=True)
    rows = []
    for name, part in checked.groupby("reader"):
        test = mcnemar(part["truth"], part["assisted"], part["unassisted"])
        rows.append(
            {
                "reader": name,
                "n": test.n,
                "mended": test.only_a,
                "spoiled": test.only_b,
                "p": test.p,
                "method": "exact" if test.exact else "chi-squared",
            }
        )
    table = pd.DataFrame(rows)
    table.insert(5, "p_holm", holm(table["p"]))
    return table


def mrmc(reads: pd.DataFrame, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Return the mean over readers of every metric, without and with help, and the difference.

    Every resample draws readers with replacement, and patients with replacement within those with and without a
    positive case; a metric is computed reader by reader and averaged. p as in `bootstrap.paired_difference`.

    Args:
        reads: see the module, with `assisted`.
        resamples: how many.
        level: of the intervals.
        seed: of the draws.

    Returns:
        Columns scope, name, metric, unassisted, unassisted_low, unassisted_high, assisted ..., difference ..., p,
        readers, cases, patients, degenerate, note; a block for all readers and one for every experience level.

    Raises:
        PredictionsError: as `reader_changes`, or fewer than two readers.
    """
    checked = _check(reads, assisted=True)
    parts: list[tuple[str, str, pd.DataFrame]] = [("all", "all", checked)]
    if "experience" in checked:
        parts += [("experience", str(name), rows) for name, rows in checked.groupby("experience")]
    if checked["reader"].nunique() < 2:
        raise PredictionsError("only one reader: there is no spread of readers to resample; use reader_changes")
    rows: list[dict[str, Any]] = []
    for scope, name, part in parts:
        study = _matrices(part)
        points = {arm: _by_reader(study.right[arm], study, np.ones((1, len(study.cases)))) for arm in study.right}
        drawn: dict[str, list[Values]] = {arm: [] for arm in study.right}
        for readers, cases in _draws(study, resamples, seed):
            for arm in drawn:
                drawn[arm].append(_mean_reader(_by_reader(study.right[arm], study, cases), readers))
        resampled = {arm: np.concatenate(values) for arm, values in drawn.items()}
        everyone = np.ones((1, len(study.readers)))
        for i, metric in enumerate(METRICS):
            point = {arm: float(_mean_reader(points[arm], everyone)[0, i]) for arm in points}
            values = {arm: resampled[arm][:, i] for arm in resampled}
            rows.append(
                {"scope": scope, "name": name, "metric": metric}
                | _bounds("unassisted", point["unassisted"], values["unassisted"], level)
                | _bounds("assisted", point["assisted"], values["assisted"], level)
                | _compared("difference", point["assisted"] - point["unassisted"], values, level)
                | _counts(study)
            )
    return pd.DataFrame(rows)


def model_against_readers(
    reads: pd.DataFrame,
    model: pd.DataFrame,
    *,
    arm: Arm = "unassisted",
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Return a model beside every reader, on the cases that reader read, and beside the mean reader.

    Args:
        reads: see the module.
        model: columns case and call (0 or 1, at a threshold chosen elsewhere); every case read must be there.
        arm: which calls of the readers.
        resamples: patients resampled; for the mean reader, readers and patients.
        level: of the intervals.
        seed: of the draws.

    Returns:
        Columns reader ("mean" in the last rows), metric, reader_point, model_point, difference (model - reader), low,
        high, p, p_holm (over the readers, by metric; NaN for the mean), degenerate, note, n.

    Raises:
        PredictionsError: as `reader_table`; cases without a call of the model, or called twice.
    """
    checked = _check(reads, assisted=arm == "assisted")
    study = _matrices(checked)
    calls = _model_calls(model, study.cases)
    right = np.where(study.read > 0, (calls == study.truth).astype(np.float64), 0.0)
    rows: list[dict[str, Any]] = []
    for r, reader in enumerate(study.readers):
        mine = np.flatnonzero(study.read[r])
        metrics = {}
        for i, name in enumerate(METRICS):
            metrics[f"reader {name}"] = _metric(study.right[arm][r, mine], study.truth[mine], i)
            metrics[f"model {name}"] = _metric(right[r, mine], study.truth[mine], i)
        points, values = bootstrap_values(
            metrics, study.patient[mine], y=study.truth[mine], resamples=resamples, seed=seed
        )
        for name in METRICS:
            pair = {"assisted": values[f"model {name}"], "unassisted": values[f"reader {name}"]}
            both = points[f"reader {name}"], points[f"model {name}"]
            rows.append(_beside(str(reader), name, both, pair, level) | {"n": len(mine)})
    if len(study.readers) > 1:
        rows += _beside_the_mean(study, study.right[arm], right, resamples=resamples, level=level, seed=seed)
    table = pd.DataFrame(rows)
    alone = (table["reader"] != "mean") & table["p"].notna()
    adjusted = table[alone].groupby("metric")["p"].transform(lambda p: holm(p.to_numpy()))
    table.insert(list(table.columns).index("p") + 1, "p_holm", adjusted.reindex(table.index))
    return table


def _beside_the_mean(
    study: _Reads, readers_right: Values, model_right: Values, *, resamples: int, level: float, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the model beside the mean reader; both are averaged over the same readers and their cases."""
    ones, everyone = np.ones((1, len(study.cases))), np.ones((1, len(study.readers)))
    sides = {"unassisted": readers_right, "assisted": model_right}
    point = {side: _mean_reader(_by_reader(right, study, ones), everyone)[0] for side, right in sides.items()}
    drawn: dict[str, list[Values]] = {side: [] for side in sides}
    for readers, cases in _draws(study, resamples, seed):
        for side, right in sides.items():
            drawn[side].append(_mean_reader(_by_reader(right, study, cases), readers))
    values = {side: np.concatenate(parts) for side, parts in drawn.items()}
    note = _reader_note(len(study.readers))
    for i, name in enumerate(METRICS):
        both = float(point["unassisted"][i]), float(point["assisted"][i])
        pair = {side: values[side][:, i] for side in values}
        yield _beside("mean", name, both, pair, level) | {"n": len(study.cases), "note": note}


def _beside(
    reader: str, metric: str, points: tuple[float, float], values: dict[str, Values], level: float
) -> dict[str, Any]:
    found = _compared("difference", points[1] - points[0], values, level)
    return {
        "reader": reader,
        "metric": metric,
        "reader_point": points[0],
        "model_point": points[1],
        "difference": found["difference"],
        "low": found["difference_low"],
        "high": found["difference_high"],
        "p": found["p"],
        "degenerate": found["degenerate"],
        "note": "",
    }


def _metric(right: Values, truth: npt.NDArray[np.int64], which: int) -> LinearMetric:
    """Return one of `METRICS` of right calls (n,) as a function of row weights."""
    terms = np.column_stack([right * (truth == 1), truth == 1, right * (truth == 0), truth == 0]).astype(np.float64)
    return LinearMetric(terms=terms, finish=lambda sums: _four(*sums.T)[..., which])


def _four(hit: Values, positive: Values, rejected: Values, negative: Values) -> Values:
    """Return `METRICS` (..., 4) of how many of the positives were hit and of the negatives rejected."""
    sensitivity, specificity = ratio(hit, positive), ratio(rejected, negative)
    accuracy = ratio(hit + rejected, positive + negative)
    return np.stack([accuracy, sensitivity, specificity, (sensitivity + specificity) / 2], axis=-1)


def _by_reader(right: Values, study: _Reads, cases: npt.NDArray[np.floating]) -> Values:
    """Return `METRICS` (B, R, 4) of right calls (R, C) under case weights (B, C)."""
    sums = [cases @ (part * (study.truth == value)).T for value in (1, 0) for part in (right, study.read)]
    return _four(*(np.asarray(one, dtype=np.float64) for one in sums))


def _mean_reader(values: Values, readers: Values) -> Values:
    """Return the mean (B, 4) over readers of (B, R, 4) under reader weights (B, R); NaN where one that counts is."""
    weights = readers[..., None]
    return np.where(weights > 0, values * weights, 0.0).sum(axis=1) / weights.sum(axis=1)


def _draws(study: _Reads, resamples: int, seed: int) -> Iterator[tuple[Values, npt.NDArray[np.float32]]]:
    """Yield weights of readers (b, R) and of cases (b, C)."""
    rng = np.random.default_rng([seed, 1])
    count = len(study.readers)
    step = max(1, CHUNK_CELLS // (4 * count * count + 1))
    for chunk in cluster_weights(study.patient, strata=study.truth, resamples=resamples, seed=seed):
        for start in range(0, len(chunk), step):
            cases = chunk[start : start + step]
            yield rng.multinomial(count, np.full(count, 1 / count), size=len(cases)).astype(np.float64), cases


def _bounds(name: str, point: float, values: Values, level: float) -> dict[str, float]:
    usable = values[np.isfinite(values)]
    low, high = np.quantile(usable, [(1 - level) / 2, (1 + level) / 2]) if usable.size else (np.nan, np.nan)
    return {name: point, f"{name}_low": float(low), f"{name}_high": float(high)}


def _compared(name: str, point: float, values: dict[str, Values], level: float) -> dict[str, Any]:
    apart = values["assisted"] - values["unassisted"]
    usable = apart[np.isfinite(apart)]
    return _bounds(name, point, apart, level) | {"p": two_sided_p(usable), "degenerate": len(apart) - len(usable)}


def _counts(study: _Reads) -> dict[str, Any]:
    readers = len(study.readers)
    patients = len(pd.unique(study.patient))
    return {"readers": readers, "cases": len(study.cases), "patients": patients, "note": _reader_note(readers)}


def _reader_note(readers: int) -> str:
    return f"only {readers} readers: they hardly stand for others" if readers < FEW_READERS else ""


def _proportions(scope: str, name: str, part: pd.DataFrame, level: float) -> Iterator[dict[str, Any]]:
    readers = part["reader"].nunique()
    for arm in [one for one in ("unassisted", "assisted") if one in part]:
        right = part[arm] == part["truth"]
        for metric, inside in zip(
            PROPORTIONS, (part["truth"] >= 0, part["truth"] == 1, part["truth"] == 0), strict=True
        ):
            correct, n = int(right[inside].sum()), int(inside.sum())
            row = {"scope": scope, "name": name, "arm": arm, "metric": metric, "correct": correct, "n": n}
            notes = ["reads of the same cases pooled: the interval is too narrow, see mrmc"] if readers > 1 else []
            if n:
                found = wilson(correct, n, level=level)
                ends = {"point": found.point, "low": found.low, "high": found.high}
            else:
                ends, notes = dict.fromkeys(("point", "low", "high"), float("nan")), [*notes, "no such case"]
            yield row | {"readers": readers} | ends | {"note": "; ".join(notes)}


def _check(reads: pd.DataFrame, *, assisted: bool = False) -> pd.DataFrame:
    """Return the known columns of `reads`, checked, sorted by reader and case."""
    needed = ["reader", "case", "truth", "unassisted", *(["assisted"] if assisted else [])]
    missing = [name for name in needed if name not in reads.columns]
    if missing:
        raise PredictionsError(
            f"the table of reads has no column {', '.join(missing)}; it has {', '.join(map(str, reads.columns))}"
        )
    known = [*needed, *(name for name in ("assisted", "experience", "patient") if name in reads and name not in needed)]
    table: pd.DataFrame = reads.loc[:, known].reset_index(drop=True)
    if table.empty:
        raise PredictionsError("the table of reads has no rows")
    for name in known:
        empty = np.flatnonzero(table[name].isna())
        if empty.size:
            raise PredictionsError(f"column {name!r} is empty in {empty.size} rows (first: row {empty[0]})")
    for name in [one for one in ("truth", "unassisted", "assisted") if one in table]:
        strange = np.flatnonzero(~table[name].isin([0, 1]))
        if strange.size:
            raise PredictionsError(
                f"column {name!r} holds {table[name].iloc[strange[0]]!r} in row {strange[0]}; needed calls 0 or 1"
            )
        table[name] = table[name].astype(np.int64)
    twice = np.flatnonzero(table.duplicated(subset=["reader", "case"]))
    if twice.size:
        first = table.iloc[twice[0]]
        raise PredictionsError(f"reader {first['reader']!r} read case {first['case']!r} twice (row {twice[0]})")
    if "patient" not in table:
        table["patient"] = table["case"]
    for column, owner in (("truth", "case"), ("patient", "case"), ("experience", "reader")):
        if column in table:
            several = table.groupby(owner)[column].nunique()
            if (several > 1).any():
                raise PredictionsError(f"{owner} {several.idxmax()!r} has more than one {column}; needed one")
    return table.sort_values(by=["reader", "case"], kind="stable", ignore_index=True)


def _matrices(table: pd.DataFrame) -> _Reads:
    reader, readers = pd.factorize(table["reader"], sort=True)
    case, cases = pd.factorize(table["case"], sort=True)
    first = table.drop_duplicates("case").set_index("case").loc[cases]
    shape = (len(readers), len(cases))
    read = np.zeros(shape)
    read[reader, case] = 1
    right: dict[str, Values] = {}
    for arm in [one for one in ("unassisted", "assisted") if one in table]:
        right[arm] = np.zeros(shape)
        right[arm][reader, case] = table[arm] == table["truth"]
    return _Reads(
        readers=np.asarray(readers, dtype=object),
        cases=np.asarray(cases, dtype=object),
        truth=first["truth"].to_numpy(np.int64),
        patient=first["patient"].to_numpy(object),
        right=right,
        read=read,
    )


def _model_calls(model: pd.DataFrame, cases: npt.NDArray[np.object_]) -> npt.NDArray[np.int64]:
    missing = [name for name in ("case", "call") if name not in model.columns]
    if missing:
        raise PredictionsError(f"the model's table has no column {', '.join(missing)}; needed case and call")
    called = dict(zip(model["case"], model["call"], strict=True))
    if len(called) < len(model):
        raise PredictionsError(f"the model called {len(model) - len(called)} cases twice; needed one call a case")
    without = [case for case in cases if case not in called or pd.isna(called[case])]
    if without:
        raise PredictionsError(
            f"{len(without)} of {len(cases)} cases have no call of the model (first: {without[0]!r})"
        )
    calls = np.array([called[case] for case in cases])
    if not np.isin(calls, (0, 1)).all():
        raise PredictionsError("the model's calls must be 0 or 1; apply a threshold that was chosen elsewhere")
    return calls.astype(np.int64)
