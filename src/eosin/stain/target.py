"""What an image is normalised to: plain numbers that go into a recipe as JSON. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, overload

import numpy as np

from eosin.errors import StainError

StainMethod = Literal["macenko", "vahadane"]
Row = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StainTarget:
    """A stain matrix and how strongly each stain goes: of a reference, or of one slide.

    Attributes:
        method: which normaliser made it; another one refuses it.
        matrix: (2, 3) unit OD vectors, hematoxylin then eosin; columns red, green, blue.
        concentrations: 99th percentile of hematoxylin and of eosin, in natural OD.
        light: grey value plus one that counts as OD 0.
        source: where the numbers come from, for people.
    """

    method: StainMethod
    matrix: tuple[Row, Row]
    concentrations: tuple[float, float]
    light: float
    source: str = ""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            StainError: unknown method, wrong shape, rows not of unit length or nearly parallel, negative ones
                of Vahadane, concentrations or light not positive, or anything not finite.
        """
        if self.method not in ("macenko", "vahadane"):
            raise StainError(f"stain target: method is {self.method!r}, expected 'macenko' or 'vahadane'")
        if [len(row) for row in self.matrix] != [3, 3] or len(self.concentrations) != 2:
            raise StainError(
                f"stain target: expected a matrix (2, 3) and two concentrations, found {self.matrix} and "
                f"{self.concentrations}"
            )
        matrix = np.array(self.matrix, float)
        if not (np.isfinite(matrix).all() and np.abs(np.linalg.norm(matrix, axis=1) - 1).max() < 1e-3):
            raise StainError(f"stain target: rows of the matrix must be unit vectors, found {self.matrix}")
        if self.method == "vahadane" and (matrix < 0).any():
            raise StainError(f"stain target: Vahadane's stain vectors are not negative, found {self.matrix}")
        if abs(float(matrix[0] @ matrix[1])) > 0.9999:
            raise StainError(f"stain target: hematoxylin and eosin are the same colour in {self.matrix}")
        positive = np.array([*self.concentrations, self.light], float)
        if not (np.isfinite(positive).all() and (positive > 0).all()):
            raise StainError(
                f"stain target: concentrations {self.concentrations} and light {self.light} must be positive"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `target_from_dict` reads them back."""
        return {**asdict(self), "matrix": [list(row) for row in self.matrix], "concentrations": [*self.concentrations]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StainTarget:
        """Return the target that `to_dict` wrote."""
        _check_keys(values, {"method", "matrix", "concentrations", "light", "source"})
        first, second = (tuple(float(x) for x in row) for row in values["matrix"])
        return cls(
            method=values["method"],
            matrix=(first, second),  # type: ignore[arg-type]  # lengths are checked in __post_init__
            concentrations=tuple(float(x) for x in values["concentrations"]),  # type: ignore[arg-type]
            light=float(values["light"]),
            source=str(values.get("source", "")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LabTarget:
    """Mean and standard deviation of L*, a*, b* (CIELAB, D65; population standard deviation)."""

    mean: Row
    std: Row
    source: str = ""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            StainError: not three finite means and three positive standard deviations.
        """
        mean, std = np.asarray(self.mean, float), np.asarray(self.std, float)
        if mean.shape != (3,) or std.shape != (3,) or not np.isfinite([mean, std]).all() or not (std > 0).all():
            raise StainError(f"lab target: expected 3 means and 3 positive deviations, found {self.mean}, {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `target_from_dict` reads them back."""
        return {"method": "reinhard", "mean": [*self.mean], "std": [*self.std], "source": self.source}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabTarget:
        """Return the target that `to_dict` wrote."""
        _check_keys(values, {"method", "mean", "std", "source"})
        mean, std = (tuple(float(x) for x in values[name]) for name in ("mean", "std"))
        return cls(mean=mean, std=std, source=str(values.get("source", "")))  # type: ignore[arg-type]


def _check_keys(values: Mapping[str, Any], allowed: set[str]) -> None:
    """Raise `StainError` unless `values` has the keys `allowed` (source may be left out)."""
    missing, unknown = sorted(allowed - {"source"} - set(values)), sorted(set(values) - allowed)
    if missing or unknown:
        raise StainError(f"stain target: missing {missing}, unknown {unknown}")


def target_from_dict(values: Mapping[str, Any]) -> StainTarget | LabTarget:
    """Return the target written by `to_dict`, of the kind that its "method" says."""
    return LabTarget.from_dict(values) if values.get("method") == "reinhard" else StainTarget.from_dict(values)


_PUBLISHED = "reference of the MATLAB code released with Macenko et al. 2009 (also the default of torchstain)"
_FITTED = (
    "CMU-1-Small-Region.svs (OpenSlide test data, CC0), 224 px tiles at 0.499 mpp restained to Macenko's reference"
)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "macenko": {
        "matrix": [[0.562583, 0.720078, 0.406188], [0.215899, 0.801196, 0.558097]],
        "concentrations": [1.9705, 1.0308],
        "light": 240.0,
        "source": _PUBLISHED,
    },
    "vahadane": {
        "matrix": [[0.552741, 0.719394, 0.420654], [0.356518, 0.768602, 0.531174]],
        "concentrations": [1.889501, 1.547651],
        "light": 256.0,
        "source": _FITTED,
    },
    "reinhard": {
        "mean": [68.638249, 16.400140, -7.025958],
        "std": [19.321024, 9.579967, 6.066432],
        "source": _FITTED,
    },
}


@overload
def default_target(method: StainMethod) -> StainTarget: ...
@overload
def default_target(method: Literal["reinhard"]) -> LabTarget: ...
def default_target(method: str) -> StainTarget | LabTarget:
    """Return the target of "macenko", "vahadane" or "reinhard" that is used when none is given.

    Macenko's is published: the reference of the code released with the paper. The other two are fitted
    to the CC0 slide CMU-1-Small-Region after it was restained to that reference, so that all three give
    one appearance: `python tests/stain/make_default_target.py CMU-1-Small-Region.svs`.
    """
    if method not in _DEFAULTS:
        raise StainError(f"no default target for {method!r}; there is one for {', '.join(_DEFAULTS)}")
    return target_from_dict({"method": method, **_DEFAULTS[method]})
