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


@app.command()
def explain(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder with a config.json, or a name on the hub.")
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")],
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16; as the config says.")] = None,
    attention: Annotated[str | None, typer.Option(help="eager, sdpa; transformers' choice.")] = None,
    device: Annotated[str | None, typer.Option(help="Where it would run; the accelerator, else cpu.")] = None,
    mode: Annotated[str | None, typer.Option(help="Policy: auto, always or never.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Policy: more query rows than this.")] = None,
    min_free: Annotated[
        str | None, typer.Option(help="Policy: by rows when less is free, such as 2GB.")
    ] = None,
    headroom: Annotated[
        float | None, typer.Option(help="Policy: share of free memory for temporaries.")
    ] = None,
    workspace: Annotated[str | None, typer.Option(help="Policy: what one attention call may hold.")] = None,
    rows: Annotated[int | None, typer.Option(help="Policy: query rows per step.")] = None,
    heads: Annotated[int | None, typer.Option(help="Policy: heads per step.")] = None,
) -> None:
    """What the attention of a model would do and hold at a length; nothing of it is loaded or run."""
    import attnpatch
    from attnpatch.hosts.transformers import built_on_meta

    fields = {
        "mode": mode, "min_tokens": min_tokens, "min_free": min_free, "headroom": headroom,
        "workspace": workspace, "rows": rows, "heads": heads,
    }  # fmt: skip
    policy = {name: value for name, value in fields.items() if value is not None}
    built = built_on_meta(model, dtype, attention)
    typer.echo(str(attnpatch.explain(built, seq_len, batch, device=device, **policy)))
