"""The command line: parse, call one library function, print. Results on stdout, progress and log on stderr."""

from __future__ import annotations

import logging
import sys

import typer

from eosin.cli import (
    cells,
    detect,
    distil,
    encoders,
    evaluate,
    extract,
    finetune,
    look,
    pretrain,
    probe,
    review,
    search,
)
from eosin.errors import EosinError

app = typer.Typer(
    name="eosin",
    help="Whole-slide pathology images to vision-transformer features, and features to answers that can be checked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(extract.demo)
app.command()(look.info)
app.command()(look.doctor)
app.add_typer(encoders.app, name="encoders")
app.command()(extract.tile)
app.command()(extract.extract)
app.command()(look.verify)
app.command()(look.convert)
app.command()(probe.probe)
app.command()(evaluate.validate)
app.command()(finetune.finetune)
app.command()(distil.distil)
app.command()(cells.cells)
app.add_typer(detect.app, name="detect")
app.command()(search.index)
app.command()(search.search)
app.command()(review.review)
app.command(name="hard-examples")(review.hard_examples)
app.command()(pretrain.pretrain)


@app.callback()
def _options(verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what is done to stderr.")) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s"
    )


def main() -> None:
    """Run the command line; a deliberate error is one line on stderr and exit code 1."""
    try:
        app()
    except EosinError as error:
        sys.stderr.write(f"eosin: {error}\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("eosin: stopped; run the same command again to go on where it stopped\n")
        raise SystemExit(130) from None
