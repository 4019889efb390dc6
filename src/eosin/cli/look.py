"""Looking and checking: `info`, `doctor`, `verify`, `convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from eosin.cli.options import Inputs, Json, MppList, SlideMpp, TilePx, parse_mpp, print_json, print_table


def info(
    slides: Annotated[list[Path], typer.Argument(help="Slide files.")],
    slide_mpp: SlideMpp = None,
    as_json: Json = False,
) -> None:
    """Say what a slide is: size, levels, microns per pixel and where they come from."""
    from eosin.tasks.doctor import describe

    described = [describe(path, slide_mpp=slide_mpp) for path in slides]
    if as_json:
        print_json(described)
    else:
        for one in described:
            print_table(["", ""], [(key, _short(value)) for key, value in one.items()])


def doctor(
    inputs: Inputs,
    mpp: MppList = "0.5",
    tile_px: TilePx = 224,
    slide_mpp: SlideMpp = None,
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", help="Time it, to tell the hours.")] = None,
    as_json: Json = False,
) -> None:
    """Examine slides before a long run: readable, complete, mpp, pyramid, tiles, hours, disk."""
    from eosin.features.jobs import find_jobs
    from eosin.tasks.doctor import examine
    from eosin.tiles import TileSpec

    spec = TileSpec(tile_px=tile_px, mpp=parse_mpp(mpp)[0])
    loaded = None
    if encoder is not None:
        from eosin.encoders import load_encoder

        loaded = load_encoder(encoder)
    report = examine(find_jobs(inputs, slide_mpp=slide_mpp), spec, encoder=loaded)
    if as_json:
        print_json(report)
    else:
        columns = ["slide_id", "verdict", "size", "levels", "mpp", "compression", "icc", "tiles", "problems"]
        print_table(columns, [[_short(row.get(key)) for key in columns] for row in report["slides"]])
        sys.stdout.write(report["summary"] + "\n")
    raise typer.Exit(1 if report["failing"] else 0)


def verify(
    store: Annotated[Path, typer.Argument(help="Folder of features.")],
    as_json: Json = False,
) -> None:
    """Re-hash every file of a store and say which are whole."""
    from eosin.features import FeatureStore

    rows = FeatureStore.open(store).verify()
    bad = [row for row in rows if not row.ok]
    if as_json:
        print_json({"store": str(store), "ok": not bad, "slides": [row._asdict() for row in rows]})
    else:
        if bad:
            print_table(["slide", "what is wrong"], [(row.slide_id, row.reason) for row in bad])
        sys.stdout.write(f"{len(rows) - len(bad)} of {len(rows)} slides are whole\n")
    raise typer.Exit(1 if bad else 0)


def convert(
    src: Annotated[Path, typer.Argument(help="Store, file or folder of another tool.")],
    dst: Annotated[Path, typer.Argument(help="Where to write.")],
    to: Annotated[str, typer.Option("--to", help="Format to write; see the docs, files on disk.")],
    slide_mpp: SlideMpp = None,
    as_json: Json = False,
) -> None:
    """Convert features between eosin, TRIDENT, CLAM, STAMP, AtlasPatch, slide2vec, AnnData and others."""
    from eosin.features.convert import convert as convert_features

    written = convert_features(src, dst, to=to, slide_mpp=slide_mpp)
    if as_json:
        print_json({"to": to, "written": [str(path) for path in written]})
    else:
        sys.stdout.write("".join(f"{path}\n" for path in written))


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return " ".join("x".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for v in value)
    return "" if value is None else str(value)
