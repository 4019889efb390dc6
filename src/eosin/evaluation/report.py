"""The report: numbers with what they rest on, as plain values that JSON keeps.

A report is read by people, tools and, years later, by auditors. So it holds plain values only, never NaN, names its
schema, and is the same byte for byte for the same input, settings, seed and versions; when and how long it ran stands
elsewhere. What was not computed is named with the reason, never left out silently.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from eosin.errors import PredictionsError

PACKAGES = ("numpy", "pandas", "scipy", "scikit-learn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Remark:
    """Something a reader must know before believing the numbers.

    Attributes:
        kind: short stable word, such as "sign" or "no-group".
        severity: "warning" when a conclusion may be wrong, "note" when it is only limited.
        message: what was found, what it means, what to do.
    """

    kind: str
    severity: Literal["warning", "note"]
    message: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Report:
    """Results of one evaluation.

    Attributes:
        schema: name and version of the layout of `sections`, such as "eosin.validation/1".
        provenance: versions, hashes of the inputs, settings and seed; see `provenance`.
        sections: results by name, plain values (see `plain`); None where a section was not computed.
        remarks: warnings first.
        not_done: section that is None -> why.
    """

    schema: str
    provenance: Mapping[str, Any]
    sections: Mapping[str, Any]
    remarks: tuple[Remark, ...] = ()
    not_done: Mapping[str, str] = field(default_factory=dict)

    def value(self, path: str) -> Any:
        """Return what lies at a dotted path such as ``"data.rows_scored"``, None where nothing does."""
        found: Any = self.to_dict()
        for step in path.split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report as one mapping of plain values, in the order in which it is written."""
        return {
            "schema": self.schema,
            "remarks": [remark.to_dict() for remark in self.remarks],
            **self.sections,
            "not_done": dict(self.not_done),
            "provenance": dict(self.provenance),
        }

    def to_json(self) -> str:
        """Return the report as JSON; no NaN or infinity ever stands in it."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that `to_json` wrote.

        Raises:
            PredictionsError: the text is not such a report.
        """
        try:
            content = json.loads(text)
            known = {key: content.pop(key) for key in ("schema", "remarks", "not_done", "provenance")}
            remarks = tuple(Remark(**remark) for remark in known.pop("remarks"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PredictionsError(
                f"this is not the JSON of a report ({error}); needed one that eosin wrote"
            ) from error
        return cls(remarks=remarks, sections=content, **known)


def plain(value: Any) -> Any:
    """Return `value` as what JSON knows.

    Results with ``to_dict`` become mappings, data frames lists of mappings, arrays lists; NaN and infinity become None.
    """
    if hasattr(value, "to_dict") and not isinstance(value, (pd.DataFrame, pd.Series)):
        return plain(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, pd.DataFrame):
        return [plain(row) for row in value.to_dict(orient="records")]
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(one) for key, one in value.items()}
    if isinstance(value, (pd.Series, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    return _plain_scalar(value)


def _plain_scalar(value: Any) -> Any:
    if value is None or value is pd.NaT or value is pd.NA or isinstance(value, (bool, str)):
        return value if isinstance(value, (bool, str)) else None
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else str(value.astype("datetime64[s]"))
    if isinstance(value, np.generic):
        return _plain_scalar(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def provenance(*, inputs: Sequence[Path], settings: Any, seed: int) -> dict[str, Any]:
    """Return what is needed to make the same numbers again.

    Args:
        inputs: files that were read; they are named without their folder and hashed.
        settings: a dataclass or mapping of the resolved settings.
        seed: of every random draw.
    """
    return {
        "eosin": version("eosin"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "inputs": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in inputs
        ],
        "settings": plain(settings),
        "seed": seed,
    }
