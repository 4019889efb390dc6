"""Small DICOM whole-slide images that the tests write themselves (uncompressed, TILED_FULL)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE = 64


def write_dicom(
    folder: Path, levels: list[npt.NDArray[np.uint8]], *, mpp: tuple[float, float], power: float = 20
) -> Path:
    """Write one file a level into `folder`, as one series; mpp is (x, y) of the first level."""
    folder.mkdir(parents=True, exist_ok=True)
    uids = {name: generate_uid() for name in ("study", "series", "frame", "pyramid")}
    for number, pixels in enumerate(levels):
        height, width = pixels.shape[:2]
        ratio = (levels[0].shape[1] / width, levels[0].shape[0] / height)
        spacing = (mpp[1] * ratio[1] / 1000, mpp[0] * ratio[0] / 1000)
        _level(pixels, number, spacing, power, uids).save_as(folder / f"level{number}.dcm", enforce_file_format=True)
    return folder


def _level(
    pixels: npt.NDArray[np.uint8], number: int, spacing: tuple[float, float], power: float, uids: dict[str, str]
) -> FileDataset:
    height, width = pixels.shape[:2]
    columns, rows = -(-width // TILE), -(-height // TILE)
    padded = np.full((rows * TILE, columns * TILE, 3), 255, dtype=np.uint8)
    padded[:height, :width] = pixels
    frames = padded.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uids["study"], uids["series"]
    ds.FrameOfReferenceUID, ds.PyramidUID, ds.Modality = uids["frame"], uids["pyramid"], "SM"
    ds.ImageType = [
        "ORIGINAL" if number == 0 else "DERIVED",
        "PRIMARY",
        "VOLUME",
        "NONE" if number == 0 else "RESAMPLED",
    ]
    ds.Manufacturer, ds.ManufacturerModelName, ds.SeriesNumber, ds.InstanceNumber = "eosin", "test", 1, number + 1
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.Rows, ds.Columns, ds.NumberOfFrames = TILE, TILE, rows * columns
    ds.TotalPixelMatrixColumns, ds.TotalPixelMatrixRows, ds.TotalPixelMatrixFocalPlanes = width, height, 1
    ds.ImagedVolumeWidth, ds.ImagedVolumeHeight, ds.ImagedVolumeDepth = width * spacing[1], height * spacing[0], 0.001
    ds.DimensionOrganizationType, ds.VolumetricProperties, ds.BurnedInAnnotation = "TILED_FULL", "VOLUME", "NO"
    ds.FocusMethod, ds.ExtendedDepthOfField, ds.SpecimenLabelInImage = "AUTO", "NO", "NO"
    ds.LossyImageCompression, ds.NumberOfOpticalPaths = "00", 1
    ds.ImageOrientationSlide = [0, 1, 0, 1, 0, 0]
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 0, 0
    ds.TotalPixelMatrixOriginSequence = Sequence([origin])
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(spacing), 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    path = Dataset()
    path.OpticalPathIdentifier, path.ObjectiveLensPower = "0", power
    ds.OpticalPathSequence = Sequence([path])
    ds.PixelData = np.ascontiguousarray(frames).tobytes()
    ds["PixelData"].VR = "OB"
    return ds
