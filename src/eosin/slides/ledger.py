"""Where a slide's microns per pixel come from, and what speaks against them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from eosin.geometry import PLAUSIBLE_MPP, check_mpp

POWER_TOLERANCE = 0.15
AXIS_TOLERANCE = 0.01
MISSING = "missing"

# Microns in one unit of length, as OME-XML spells them (both micro signs, and the angstrom sign).
_MICRONS = {
    "pm": 1e-6,
    "å": 1e-4,
    "angstrom": 1e-4,
    "nm": 1e-3,
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "dm": 1e5,
    "m": 1e6,
    "in": 25_400.0,
    "inch": 25_400.0,
    "ft": 304_800.0,
    "thou": 25.4,
    "mil": 25.4,
}
# TIFF tag 296, ResolutionUnit: 2 = inch, 3 = centimetre; 1 = no absolute unit.
_TIFF_UNIT_UM = {2: 25_400.0, 3: 10_000.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class MppLedger:
    """Microns per level-0 pixel as found, with their source.

    Attributes:
        x: microns per pixel along x, or None when the file does not say.
        y: microns per pixel along y, or None.
        source: key of the file that was believed, "user", "missing", or "... refused: ...".
        objective_power: what the file calls its objective power. Recorded, never used.
        conflict: a sentence when power and mpp disagree by more than 15 %, or x and y by more
            than 1 %; else None.
        file_says: for the source "user", what the file itself said; else None.
    """

    x: float | None = None
    y: float | None = None
    source: str = MISSING
    objective_power: float | None = None
    conflict: str | None = None
    file_says: str | None = None

    @classmethod
    def build(cls, x: float | None, y: float | None, source: str, power: float | None = None) -> MppLedger:
        """Return the ledger of these values with its conflict sentence worked out."""
        return cls(x=x, y=y, source=source, objective_power=power, conflict=_conflict(x, y, power))

    def overridden(self, mpp: float | tuple[float, float]) -> MppLedger:
        """Return the ledger after a user gave `mpp` (one value, or x and y), which wins.

        Raises:
            ImplausibleMppError: outside 0.05-5.
        """
        x, y = (mpp, mpp) if isinstance(mpp, (int, float)) else mpp
        x, y = check_mpp(float(x), "the mpp given for the slide"), check_mpp(float(y), "the mpp given for the slide")
        said = self.source if self.x is None or self.y is None else f"{self.x:.6g} x {self.y:.6g} ({self.source})"
        return replace(MppLedger.build(x, y, "user", self.objective_power), file_says=said)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def _conflict(x: float | None, y: float | None, power: float | None) -> str | None:
    if x is None or y is None or x <= 0 or y <= 0:
        return None
    found = []
    if abs(x / y - 1) > AXIS_TOLERANCE:
        found.append(f"x and y differ: {x:.4g} and {y:.4g} microns per pixel")
    if power:
        mean = (x * y) ** 0.5
        if abs(mean * power / 10 - 1) > POWER_TOLERANCE:
            found.append(
                f"{mean:.4g} mpp does not fit the objective power {power:g} (about {10 / power:.3g} mpp expected)"
            )
    return "; ".join(found) or None


def number(text: object) -> float | None:
    """Return `text` as a finite float above 0, or None (a comma is read as a decimal point)."""
    try:
        value = float(str(text).strip().replace(",", "."))
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def microns(value: float, unit: str) -> float | None:
    """Return a length of `value` `unit` in microns, or None for a unit nobody knows."""
    name = unit.strip().replace("\u03bc", "µ").replace("\u212b", "Å").lower()
    factor = _MICRONS.get(name)
    return None if factor is None else value * factor


def from_openslide(properties: Mapping[str, str]) -> MppLedger:
    """Return what OpenSlide's properties say. Dpi values of generic TIFFs must be plausible."""
    power = number(properties.get("openslide.objective-power", ""))
    x, y = (number(properties.get(f"openslide.mpp-{axis}", "")) for axis in "xy")
    if x is None or y is None:
        return MppLedger(objective_power=power)
    if properties.get("openslide.vendor") == "generic-tiff":
        return _guarded(x, y, "tiff.XResolution", power)
    return MppLedger.build(x, y, "openslide.mpp-x", power)


def from_tiff_resolution(x: float | None, y: float | None, unit: int) -> MppLedger:
    """Return what XResolution and YResolution (pixels per unit) mean, refused when not plausible."""
    if x is None or y is None or x <= 0 or y <= 0:
        return MppLedger()
    per_unit = _TIFF_UNIT_UM.get(unit)
    if per_unit is None:
        return MppLedger(source="tiff.XResolution refused: no absolute unit")
    return _guarded(per_unit / x, per_unit / y, "tiff.XResolution", None)


def _guarded(x: float, y: float, source: str, power: float | None) -> MppLedger:
    low, high = PLAUSIBLE_MPP
    worst = next((value for value in (x, y) if not low <= value <= high), None)
    if worst is not None:
        return MppLedger(source=f"{source} refused: {worst:.4g} µm", objective_power=power)
    return MppLedger.build(x, y, source, power)


def from_ome(pixels: Mapping[str, str], power: float | None) -> MppLedger:
    """Return what the attributes of an OME `Pixels` element say; the unit defaults to µm."""
    values = []
    for axis in "XY":
        size = number(pixels.get(f"PhysicalSize{axis}", ""))
        unit = pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if size is None:
            return MppLedger(objective_power=power)
        value = microns(size, unit)
        if value is None:
            return MppLedger(
                source=f"OME PhysicalSize{axis} refused: unit {unit!r} is not a length", objective_power=power
            )
        values.append(value)
    return MppLedger.build(values[0], values[1], f"OME PhysicalSizeX ({pixels.get('PhysicalSizeXUnit', 'µm')})", power)


def from_aperio(description: str) -> MppLedger:
    """Return what an Aperio ImageDescription says (`MPP = 0.25`, `AppMag = 20`)."""
    found = dict(re.findall(r"\|\s*(MPP|AppMag)\s*=\s*([0-9.,]+)", description))
    mpp, power = number(found.get("MPP", "")), number(found.get("AppMag", ""))
    if mpp is None:
        return MppLedger(objective_power=power)
    return MppLedger.build(mpp, mpp, "aperio.MPP", power)
