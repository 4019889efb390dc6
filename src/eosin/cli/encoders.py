"""`eosin encoders`: what there is, which weights are here, bringing weights offline."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from eosin.cli.options import Json, print_json, print_table

app = typer.Typer(help="List encoders; see which weights are here; import weights from a file.")


@app.callback(invoke_without_command=True)
def encoders(context: typer.Context, as_json: Json = False) -> None:
    """List every encoder of the registry with size, training mpp, licence and gate."""
    if context.invoked_subcommand is not None:
        return
    from eosin.encoders.registry import REGISTRY

    specs = [spec.to_dict() for spec in REGISTRY.values()]
    if as_json:
        print_json(specs)
        return
    columns = ["name", "dim", "patch_px", "input_px", "mpp", "pooling", "params_m", "licence", "gated"]
    print_table(columns, [[_cell(spec.get(column)) for column in columns] for spec in specs])


@app.command()
def status(as_json: Json = False) -> None:
    """Say which weights are on this machine."""
    from eosin.encoders.weights import weights_status

    rows = [asdict(row) for row in weights_status()]
    if as_json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), [[_cell(cell) for cell in row.values()] for row in rows])


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="Checkpoint: .safetensors, .pth, .bin or a folder.")],
    name: Annotated[str, typer.Option("--name", help="Encoder these weights are for.")],
    as_json: Json = False,
) -> None:
    """Copy a checkpoint into eosin's weights folder and record its sha256."""
    from eosin.encoders.weights import import_weights

    row = asdict(import_weights(name, file))
    if as_json:
        print_json(row)
    else:
        sys.stdout.write(f"{name}: {row['path']} sha256 {row['sha256']}\n")


def _cell(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return {True: "yes", False: ""}.get(value, str(value)) if isinstance(value, bool) else str(value)
