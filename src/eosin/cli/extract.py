"""The main job: `demo`, `tile` and `extract`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from eosin.cli.options import (
    Edge,
    Inputs,
    Json,
    Masks,
    MinTissue,
    MppList,
    Out,
    OverlapPx,
    SlideMpp,
    TilePx,
    parse_mpp,
    parse_shard,
    print_json,
    print_table,
    progress_bar,
)


def demo(
    out: Out,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Encoder; DINOv2 from the hub when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the whole main job on a public slide and make a page to look at."""
    from eosin.tasks.demo import run_demo

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    result = run_demo(out, encoder=encoder, say=say)
    if as_json:
        print_json(result)
        return
    print_table(["made", "what"], [[path, what] for what, path in result["made"].items()])
    sys.stdout.write(f"Open {result['page']} in a browser.\n")


def tile(
    inputs: Inputs,
    out: Out,
    tile_px: TilePx = 224,
    mpp: MppList = "0.5",
    slide_mpp: SlideMpp = None,
    overlap_px: OverlapPx = 0,
    min_tissue: MinTissue = 0.1,
    edge: Edge = "drop",
    masks: Masks = None,
    as_json: Json = False,
) -> None:
    """Find tissue and lay tile grids, without an encoder: coordinates, GeoJSON and previews."""
    from eosin.features.jobs import find_jobs
    from eosin.tasks.tiling import tile_slides

    specs = [_spec(tile_px, one, overlap_px, min_tissue, edge) for one in parse_mpp(mpp)]
    jobs = find_jobs(inputs, slide_mpp=slide_mpp, masks=masks)
    rows = tile_slides(jobs, specs, out)
    if as_json:
        print_json({"out": str(out), "slides": rows})
    else:
        columns = ["slide", "mpp", "tiles", "tissue mm2", "error"]
        keys = ("slide_id", "mpp", "tiles", "tissue_mm2", "error")
        print_table(columns, [[row.get(key) for key in keys] for row in rows])
    raise typer.Exit(1 if any(row.get("error") for row in rows) else 0)


def extract(
    inputs: Inputs,
    out: Out,
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="Encoder, or several: a,b.", metavar="NAME[,NAME]")],
    tile_px: TilePx = 224,
    mpp: MppList = "0.5",
    slide_mpp: SlideMpp = None,
    overlap_px: OverlapPx = 0,
    min_tissue: MinTissue = 0.1,
    edge: Edge = "drop",
    masks: Masks = None,
    stain: Annotated[str | None, typer.Option("--stain", help="Normalise: macenko, reinhard or vahadane.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")] = "auto",
    backend: Annotated[str, typer.Option("--backend", help="auto, torch, compile or openvino.")] = "auto",
    pooling: Annotated[str | None, typer.Option("--pooling", help="cls, mean or cls+mean; the encoder's own.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="On disk: float32 or float16.")] = "float32",
    icc: Annotated[bool, typer.Option("--icc", help="Convert to sRGB through the slide's profile.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Reader processes.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Tiles encoded at once.")] = None,
    shard: Annotated[str | None, typer.Option("--shard", help="i/n: do the i-th of n parts.", metavar="i/n")] = None,
    as_json: Json = False,
) -> None:
    """Embed slides: per slide one HDF5 of features, coordinates and QC, and the tissue outline."""
    from eosin.encoders import load_encoder
    from eosin.features.extraction import Settings, run
    from eosin.features.jobs import find_jobs
    from eosin.tasks.summary import write_summary

    specs = [_spec(tile_px, one, overlap_px, min_tissue, edge) for one in parse_mpp(mpp)]
    part = parse_shard(shard)
    jobs = find_jobs(inputs, slide_mpp=slide_mpp, masks=masks)
    names = [name.strip() for name in encoder.split(",")]
    encoders = [
        load_encoder(name, device=device, precision=precision, backend=backend, pooling=pooling)  # type: ignore[arg-type]
        for name in names
    ]
    settings = Settings(stain=stain, dtype=dtype, icc=icc)
    with progress_bar() as progress:
        outcome = run(
            jobs,
            specs,
            encoders,
            out=out,
            settings=settings,
            workers=workers,
            batch_size=batch_size,
            shard=part,
            progress=progress,
        )
    for store in outcome.stores:
        write_summary(store)
    _print_outcome(outcome, as_json)
    raise typer.Exit(1 if outcome.failed else 0)


def _print_outcome(outcome, as_json: bool) -> None:
    rate = outcome.tiles / outcome.seconds if outcome.seconds else 0.0
    if as_json:
        print_json(
            {
                "stores": [str(store.path) for store in outcome.stores],
                "done": list(outcome.done),
                "skipped": list(outcome.skipped),
                "elsewhere": list(outcome.elsewhere),
                "failed": outcome.failed,
                "tiles": outcome.tiles,
                "seconds": round(outcome.seconds, 3),
                "tiles_per_second": round(rate, 2),
            }
        )
        return
    stores = ", ".join(str(store.path) for store in outcome.stores)
    sys.stdout.write(
        f"{len(outcome.done)} slides done, {len(outcome.skipped)} already there, {len(outcome.failed)} failed"
        f"{f', {len(outcome.elsewhere)} left to another process' if outcome.elsewhere else ''}; "
        f"{outcome.tiles} tiles in {outcome.seconds:.1f} s ({rate:.1f}/s) -> {stores}\n"
    )
    if outcome.failed:
        print_table(["slide", "why it failed"], sorted(outcome.failed.items()))


def _spec(tile_px: int, mpp: float, overlap_px: int, min_tissue: float, edge: str):
    from eosin.tiles import TileSpec

    return TileSpec(tile_px=tile_px, mpp=mpp, overlap_px=overlap_px, min_tissue=min_tissue, edge=edge)  # type: ignore[arg-type]
