"""Every error eosin raises on purpose, as one tree.

    EosinError
    ├── SlideError(OSError)               a slide cannot be opened or read
    │   ├── UnsupportedSlideError         no reader takes this file
    │   ├── CorruptSlideError             truncated, zero bytes, broken pyramid
    │   └── RegionError                   one region cannot be decoded
    ├── MppError(ValueError)
    │   ├── MissingMppError               the file does not say its microns per pixel
    │   └── ImplausibleMppError           it says something outside 0.05-5
    ├── GeometryError(ValueError)         a tile, level or rectangle that cannot be
    │   └── UpsampleError                 the tiles asked for are far finer than the slide
    ├── TissueError(ValueError)
    │   ├── NoTissueError                 blank slide, empty mask
    │   └── NotBrightfieldError           fluorescence or another dark slide
    ├── StainError(ValueError)            a stain matrix cannot be estimated
    ├── UnknownEncoderError(KeyError)     no such name; the message lists the closest
    ├── WeightsError(ValueError)          keys, shapes or hash of a checkpoint do not fit
    ├── WeightsUnavailableError(OSError)  gated, offline or not downloaded
    ├── StoreError(OSError)
    │   ├── StoreMismatchError            made by another recipe
    │   ├── StoreCorruptError             unreadable or altered on disk
    │   └── StoreLockedError              another process is writing it
    ├── NonFiniteError(ArithmeticError)   NaN or infinity where a number must be
    ├── ReaderCrashError(RuntimeError)    a reader process died (codec crash, out of memory)
    ├── CohortError(ValueError)           a cohort table or an input path that does not make sense
    │   └── LabelError                    a label column missing, of one class, or with too few of one
    ├── PredictionsError(ValueError)      scores that are NaN, outside 0-1 or of the wrong shape
    ├── ConvertError(ValueError)          a foreign file that is not what it should be
    ├── ConfigError(ValueError)           a configuration that does not make sense
    ├── CheckpointError(OSError)          a checkpoint is missing, broken or of another run
    ├── CollapseError(RuntimeError)       training has failed: features no longer tell images apart
    ├── IndexStoreError(OSError)          a search index on disk or behind an address
    │   ├── IndexMismatchError            made from other features
    │   ├── IndexCorruptError             half-written or altered on disk
    │   ├── IndexLockedError              another process has it open
    │   └── IndexUnreachableError         the server does not answer
    ├── QueryError(ValueError)            a question that a search index cannot answer
    └── MissingDependencyError(ImportError)   an extra is not installed

Each message says what was found, what was needed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EosinError(Exception):
    """Base of every deliberate error."""

    def __str__(self) -> str:
        """Return the message itself (`KeyError` and `OSError` would decorate it)."""
        return str(self.args[0]) if self.args else type(self).__name__


class SlideError(EosinError, OSError):
    """A slide cannot be opened or read."""


class UnsupportedSlideError(SlideError):
    """No reader takes this file."""


class CorruptSlideError(SlideError):
    """The file is truncated, empty or broken."""


class RegionError(SlideError):
    """One region of a slide cannot be decoded."""


class MppError(EosinError, ValueError):
    """Something is wrong with the microns per pixel."""


class MissingMppError(MppError):
    """The file does not say its microns per pixel."""


class ImplausibleMppError(MppError):
    """The microns per pixel lie outside 0.05-5."""


class GeometryError(EosinError, ValueError):
    """A tile, level or rectangle that cannot be."""


class UpsampleError(GeometryError):
    """The tiles asked for are far finer than the slide's pixels."""


class TissueError(EosinError, ValueError):
    """Tissue cannot be told from background."""


class NoTissueError(TissueError):
    """The slide is blank or the mask is empty."""


class NotBrightfieldError(TissueError):
    """The slide is dark: fluorescence, or not a stained section."""


class StainError(EosinError, ValueError):
    """A stain matrix cannot be estimated or applied."""


class UnknownEncoderError(EosinError, KeyError):
    """No encoder has this name."""


class WeightsError(EosinError, ValueError):
    """A checkpoint does not fit: keys, shapes or hash."""


class WeightsUnavailableError(EosinError, OSError):
    """Weights are gated, offline or not downloaded."""


class StoreError(EosinError, OSError):
    """A feature store cannot be used."""


class StoreMismatchError(StoreError):
    """The store was made by another recipe."""


class StoreCorruptError(StoreError):
    """A file of the store is unreadable or was altered."""


class StoreLockedError(StoreError):
    """Another process is writing this part of the store."""


class NonFiniteError(EosinError, ArithmeticError):
    """NaN or infinity where a number must be."""


class ReaderCrashError(EosinError, RuntimeError):
    """A reader process died."""


class CohortError(EosinError, ValueError):
    """A cohort table or an input path does not make sense."""


class LabelError(CohortError):
    """A label column is missing, has one class, or too few of one."""


class PredictionsError(EosinError, ValueError):
    """Scores are NaN, outside 0-1 or of the wrong shape."""


class ConvertError(EosinError, ValueError):
    """A foreign file is not what it should be."""


class ConfigError(EosinError, ValueError):
    """A configuration that cannot be: an unknown key, a value of the wrong type or out of range."""


class CheckpointError(EosinError, OSError):
    """A checkpoint cannot be written, is damaged, or belongs to another run."""


class CollapseError(EosinError, RuntimeError):
    """Training has failed: the features no longer tell images apart."""


class IndexStoreError(EosinError, OSError):
    """A search index cannot be read or written."""


class IndexMismatchError(IndexStoreError):
    """The index was made from other features: encoder, weights, microns per pixel or dimension."""


class IndexCorruptError(IndexStoreError):
    """The index on disk is half-written or altered."""


class IndexLockedError(IndexStoreError):
    """Another process has the index open."""


class IndexUnreachableError(IndexStoreError):
    """The server that holds the index does not answer."""


class QueryError(EosinError, ValueError):
    """A query, filter or batch of points that an index cannot answer or take."""


class MissingDependencyError(EosinError, ImportError):
    """An optional dependency is not installed."""

    @classmethod
    def for_extra(cls, package: str, extra: str) -> MissingDependencyError:
        """Return the error for `package`, naming the extra that brings it."""
        return cls(f"{package} is not installed; run: pip install 'eosin[{extra}]'")


def closest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return the `n` known names nearest to `name`, as a phrase for an error message."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=n, cutoff=0.0)
    return ", ".join(near) if near else "none"
