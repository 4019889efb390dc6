"""Tiles drawn from tile files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eosin.cohort import read_cohort
from eosin.errors import CohortError, GeometryError
from eosin.geometry import check_mpp
from eosin.pretrain.loading import Draw, Loading, Source
from eosin.pretrain.sampling import Groups, HsvFilter, stream
from eosin.pretrain.tilefiles import TileRequest, check_size, find_archive, read_tile_files


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """Which tiles are drawn from files.

    Attributes:
        tile_px: side of a tile: a random crop where the files' tiles are larger.
        mpp: microns per pixel of the files' tiles, which they do not say themselves.
        balance: "tile": each is equally likely; "slide", "site" or another column of the table: each value of
            it, then each tile of it.
        hsv: filter on the pixels, or None.
        seed: at least 0.
    """

    tile_px: int
    mpp: float
    balance: str = "tile"
    hsv: HsvFilter | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GeometryError: tile_px below 8.
            ImplausibleMppError: mpp outside 0.05-5.
            CohortError: a negative seed.
        """
        if self.tile_px < 8:
            raise GeometryError(f"tile_px is {self.tile_px}; a tile needs at least 8 pixels a side")
        check_mpp(self.mpp, "mpp of the tiles")
        if self.seed < 0:
            raise CohortError(f"seed is {self.seed}; it must be 0 or more")


class TileSource(Source):
    """Tiles drawn from folders and zips of PNG and JPEG, and from HDF5 (``images``) and .npy arrays (n, H, W, 3).

    Without a table, the slide of a tile is the folder it lies in, or its zip or array file.

    Args:
        inputs: folders (searched recursively) and files.
        config: what is drawn.
        table: cohort table with a row for each tile: ``file`` relative to the table's folder (in a zip:
            ``a.zip/member.png``; in an array: ``a.h5/12``), ``slide_id``, and the column to balance by.
        loading: workers, prefetch, rank and world.

    Raises:
        CohortError: nothing found, a tile without row, or no such column.
        GeometryError: tiles smaller than `tile_px`.
    """

    _read = staticmethod(read_tile_files)
    _unit_word = "tile"

    def __init__(
        self,
        inputs: Sequence[Path | str],
        config: TileConfig,
        *,
        table: Path | None = None,
        loading: Loading | None = None,
    ) -> None:
        self.config = config
        self._archives = [find_archive(Path(given)) for given in inputs]
        if not self._archives:
            raise CohortError("no tiles to draw from; give a folder, .zip, .h5 or .npy")
        for archive in self._archives:
            check_size(archive, config.tile_px)
        self._starts = np.cumsum([0, *(archive.tiles for archive in self._archives)])
        slides, groups = self._named(table)
        known, slide_of = np.unique(np.asarray(slides, dtype=np.str_), return_inverse=True)
        super().__init__(
            known.tolist(), tile_px=config.tile_px, seed=config.seed, hsv=config.hsv, loading=loading or Loading()
        )
        self._set_units(Groups.of(groups), slide_of.astype(np.int64))

    def _named(self, table: Path | None) -> tuple[list[str], list[str]]:
        """Return the slide of every tile, and the group it is balanced by."""
        balance = self.config.balance
        count = int(self._starts[-1])
        if table is None:
            if balance not in ("tile", "slide"):
                raise CohortError(f"balance = {balance!r} needs a table with that column; without one: tile, slide")
            slides = [
                Path(archive.name(i)).parent.as_posix() for archive in self._archives for i in range(archive.tiles)
            ]
            return slides, slides if balance == "slide" else ["all"] * count
        cohort = read_cohort(table)
        column = "file" if "file" in cohort.table else "path"
        named = cohort.values(column).tolist()
        row_of = {(table.parent / name).resolve().as_posix(): row for row, name in enumerate(named)}
        names = [_resolved(archive.name(i)) for archive in self._archives for i in range(archive.tiles)]
        without = [name for name in names if name not in row_of]
        if without:
            raise CohortError(f"{len(without)} of {count} tiles have no row in {table}, among them {without[0]}")
        used = cohort.take([row_of[name] for name in names])
        slides = used.values("slide_id").tolist()
        if balance == "tile":
            return slides, ["all"] * count
        return slides, slides if balance == "slide" else used.values(balance).tolist()

    def _unit_name(self, unit: int) -> str:
        at = int(np.searchsorted(self._starts, unit, side="right")) - 1
        return self._archives[at].name(unit - int(self._starts[at]))

    def _draw(self, number: int, round_: int, lost: npt.NDArray[np.bool_]) -> Draw:
        unit = self._groups.pick(stream(self.seed, number, round_), lost)
        at = int(np.searchsorted(self._starts, unit, side="right")) - 1
        archive, index = self._archives[at], unit - int(self._starts[at])
        x, y = stream(self.seed, number, round_, 1 + unit).random(2).tolist()
        request = TileRequest(archive.kind, archive.path, archive.keys[index] if archive.keys else index, (x, y))
        return Draw(unit, request, self.config.mpp, (0, 0))

    def describe(self) -> dict[str, Any]:
        """Return tiles, slides, groups, and what was left out."""
        return {
            "kind": "tiles",
            "tiles": len(self._lost_at) - len(self._reasons),
            "slides": len(self.slide_ids),
            "tile_px": self.tile_px,
            "mpp": [self.config.mpp, self.config.mpp],
            "balance": self.config.balance,
            "groups": len(self._groups.names),
            "inputs": {archive.path.as_posix(): archive.tiles for archive in self._archives},
            "excluded": self.excluded,
        }


def _resolved(name: str) -> str:
    return Path(name).resolve().as_posix()
