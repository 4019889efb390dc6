"""The wsidicom reader: DICOM whole-slide images, one file or a folder of one series."""

from __future__ import annotations

import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np

from eosin.errors import CorruptSlideError, MissingDependencyError, RegionError, UnsupportedSlideError
from eosin.slides.backend import WHITE, Pixels, read_padded, to_rgb
from eosin.slides.find import companions
from eosin.slides.ledger import MppLedger, number

try:
    from pydicom import Dataset, dcmread
    from wsidicom import WsiDicom
    from wsidicom import errors as wsidicom_errors
except ImportError as missing:
    raise MissingDependencyError.for_extra("wsidicom", "dicom") from missing

_ERRORS = tuple(
    kind for kind in vars(wsidicom_errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
) + (ValueError, KeyError, IndexError, AttributeError, EOFError, OSError)

_TAGS = [
    "BitsAllocated",
    "ImageType",
    "Manufacturer",
    "ManufacturerModelName",
    "OpticalPathSequence",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "TotalPixelMatrixColumns",
]


class DicomBackend:
    """One DICOM slide opened by wsidicom."""

    def __init__(self, path: Path) -> None:
        """Open the series of the file `path`, or the folder `path`.

        Raises:
            UnsupportedSlideError: no DICOM whole-slide image there.
            CorruptSlideError: wsidicom cannot read it.
        """
        files = companions(path) if path.is_dir() else [path, *companions(path)]
        if not files:
            raise UnsupportedSlideError(f"{path}: a folder without .dcm files is no slide")
        try:
            self._slide = WsiDicom.open(files)
        except wsidicom_errors.WsiDicomNotFoundError as error:
            raise UnsupportedSlideError(f"{path}: wsidicom finds no whole-slide image: {error}") from error
        except _ERRORS as error:
            raise CorruptSlideError(f"{path}: wsidicom cannot open it: {error}") from error
        self._path = path
        self._lock = threading.Lock()
        levels = self._slide.pyramid.levels
        self._level_ids = tuple(level.level for level in levels)
        self.reader = f"wsidicom {version('wsidicom')}"
        self.level_sizes = tuple((level.size.width, level.size.height) for level in levels)
        self.level_scales = ((1,),) * len(levels)
        self.bounds = (0, 0, *self.level_sizes[0])
        self.background = WHITE
        dataset = _finest_header(files)
        paths = len(levels[0].optical_paths)
        if dataset.BitsAllocated != 8 or paths > 1:
            raise UnsupportedSlideError(
                f"{path}: found {paths} optical path(s) of {dataset.SamplesPerPixel} samples of "
                f"{dataset.BitsAllocated} bit; one 8-bit brightfield path is needed"
            )
        self.mpp = _ledger(dataset, levels[0].mpp.width, levels[0].mpp.height)
        self.properties = {
            f"dicom.{name}": str(dataset.get(name, "")) for name in _TAGS if name != "OpticalPathSequence"
        }
        self.icc_profile = _icc(dataset)
        self.associated = tuple(
            name for name, series in (("label", self._slide.labels), ("macro", self._slide.overviews)) if series
        )

    def associated_image(self, name: str) -> Pixels:
        """Return the label or the overview ("macro"), uint8 (H, W, 3)."""
        image = self._slide.read_label() if name == "label" else self._slide.read_overview()
        return to_rgb(np.asarray(image))[..., :3]

    def read_region(self, xy_px: tuple[int, int], *, level: int, scale: int, size_px: tuple[int, int]) -> Pixels:
        """Return a region of the read frame; see `Backend.read_region`."""

        def inside(xy: tuple[int, int], size: tuple[int, int]) -> Pixels:
            try:
                with self._lock:
                    return to_rgb(np.asarray(self._slide.read_region(xy, self._level_ids[level], size)))
            except _ERRORS as error:
                raise RegionError(f"{self._path}: level {level}, {xy} + {size} cannot be decoded: {error}") from error

        return read_padded(inside, xy_px=xy_px, size_px=size_px, frame_px=self.level_sizes[level])

    def close(self) -> None:
        """Release the files."""
        self._slide.close()


def _finest_header(files: list[Path]) -> Dataset:
    """Return the few header tags that matter, of the widest image among `files`."""
    headers = (dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS)) for file in files)
    volumes = [header for header in headers if "VOLUME" in header.get("ImageType", ())]
    return max(volumes, key=lambda header: int(header.get("TotalPixelMatrixColumns", 0)))


def _ledger(dataset: Dataset, x: float, y: float) -> MppLedger:
    path = next(iter(dataset.get("OpticalPathSequence", [])), {})
    power = number(path.get("ObjectiveLensPower", "")) if path else None
    return MppLedger.build(number(x), number(y), "DICOM PixelSpacing", power)


def _icc(dataset: Dataset) -> bytes | None:
    path = next(iter(dataset.get("OpticalPathSequence", [])), None)
    profile = None if path is None else path.get("ICCProfile")
    return bytes(profile) if profile else None
