"""Cohorts: validated tables, splits that never cut a patient in two, and what leaks."""

from eosin.cohort.leakage import Finding, LeakageReport, cramers_v, leakage_report, near_duplicates
from eosin.cohort.pins import load_splits, save_splits
from eosin.cohort.reading import CANONICAL, COLUMN_ALIASES, DEFAULT_ALIASES
from eosin.cohort.splits import (
    Split,
    check_split,
    external,
    from_column,
    grouped_kfold,
    leave_one_site_out,
    preserved_site,
    temporal,
)
from eosin.cohort.table import Cohort, read_cohort

__all__ = [
    "CANONICAL",
    "COLUMN_ALIASES",
    "DEFAULT_ALIASES",
    "Cohort",
    "Finding",
    "LeakageReport",
    "Split",
    "check_split",
    "cramers_v",
    "external",
    "from_column",
    "grouped_kfold",
    "leakage_report",
    "leave_one_site_out",
    "load_splits",
    "near_duplicates",
    "preserved_site",
    "read_cohort",
    "save_splits",
    "temporal",
]
