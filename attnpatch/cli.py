"""The command line. A subcommand is one function here; what it does lives elsewhere and is imported late."""

import errno
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from attnpatch import __version__
from attnpatch.errors import AttnpatchError


class OneLineErrors(TyperGroup):
    """Ends every subcommand's foreseeable failures with one line on stderr and exit code 1.

    Here and not around ``app()``: typer turns Ctrl-C into an exit code of its own choice, which differs
    between its versions.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            line = "stopped"
        except AttnpatchError as error:
            line = str(error)
        except OSError as error:
            # A reader that went away ("| head") is no failure to talk about; typer ends it quietly.
            if error.errno == errno.EPIPE:
                raise
            line = _said(error)
        typer.echo(f"attnpatch: {' '.join(line.split())}", err=True)
        raise typer.Exit(1)


def _said(error: OSError) -> str:
    """An operating system's error without its number."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


app = typer.Typer(
    name="attnpatch",
    cls=OneLineErrors,
    help="Attention a few query rows at a time, exactly, and block maps of where it goes.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback that gets here is a bug of ours; plain, it can be copied into a report.
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnpatch {__version__}")
        raise typer.Exit


# With a callback typer keeps asking for a subcommand's name, also while there is only one.
@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for the pictures and the block map.")
    ] = Path("attnpatch_demo"),
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all figures into this file.")
    ] = None,
) -> None:
    """Both things attnpatch does, shown on a small trained model that is part of it."""
    from attnpatch.demo.run import run_demo

    run_demo(out, json)
