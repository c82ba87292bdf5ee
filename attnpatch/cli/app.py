"""The command line. Each subcommand is one function here; it imports the code that does the work when it is called."""

import errno
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from attnpatch import __version__
from attnpatch.cli.analyze import EXIT_CODES, Dtype, analyze, chosen_dtype
from attnpatch.cli.merge import merge
from attnpatch.cli.policy_options import with_policy_options
from attnpatch.cli.replay import replay
from attnpatch.cli.usage import WrongUsage, no_such_command, said_in_one_line
from attnpatch.errors import AttnpatchError, PolicyError, UsageError
from attnpatch.hosts.off import missing
from attnpatch.policy import Policy


class OneLineErrors(TyperGroup):
    """Turns an expected failure of a subcommand into one line on stderr and exit code 1, or 2 for a wrong option.

    This cannot be done around ``app()``: there typer has already turned Ctrl-C into an exit code, which differs
    between versions of typer.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the subcommand."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except WrongUsage as error:
            # Without arguments the error holds the help.
            if not given:
                raise
            raise _stopped(said_in_one_line(error, self, given), 2) from error

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the subcommand."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise UsageError(no_such_command(args[0], list(self.commands)))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        code = 1
        try:
            return super().invoke(ctx)
        except WrongUsage as error:
            line, code = said_in_one_line(error, self, []), 2
        except KeyboardInterrupt:
            line = "stopped"
        except AttnpatchError as error:
            line = str(error)
            # As for an option that does not exist.
            code = 2 if isinstance(error, (UsageError, PolicyError)) else 1
        except (ImportError, AttributeError):
            off = missing()
            if off is None:
                raise
            line = f"off with this torch: {off}"
        except OSError as error:
            # The reader of our output has ended ("| head"), which is no error; typer exits quietly.
            if error.errno == errno.EPIPE:
                raise
            line = _said(error)
        raise _stopped(line, code)


class Command(TyperCommand):
    """A command whose wrong usage is one line, and whose options and arguments may not be empty.

    An empty path would be the current folder; it comes from a shell variable that is not set.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options; refuse what is empty, unknown, missing or not accepted."""
        for place, arg in enumerate(args[: self.count_own(args)]):
            name, separator, value = arg.partition("=")
            is_empty_option = name.startswith("--") and separator and not value
            if is_empty_option or not arg:
                before = args[place - 1] if place and args[place - 1].startswith("-") else "an argument"
                raise UsageError(f"{name or before} is empty; give it a value, or leave it out")
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except WrongUsage as error:
            raise UsageError(said_in_one_line(error, self, given)) from error

    def count_own(self, args: list[str]) -> int:
        """How many arguments are the command's own, from the first on."""
        return len(args)


def _stopped(line: str, code: int) -> typer.Exit:
    """Print one line on stderr; what is returned ends the process."""
    typer.echo(f"attnpatch: {' '.join(line.split())}", err=True)
    return typer.Exit(code)


def _said(error: OSError) -> str:
    """The message of an ``OSError``, without its errno."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


app = typer.Typer(
    name="attnpatch",
    cls=OneLineErrors,
    help="Attention a few query rows at a time, exactly, and block maps of where it goes.",
    no_args_is_help=True,
    add_completion=False,
    # An exception that gets here is a bug in attnpatch; a plain traceback can be copied into a report.
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnpatch {__version__}")
        raise typer.Exit


# With a callback, typer requires a subcommand's name even if there is only one subcommand.
@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command(cls=Command)
def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for the pictures and the block map.")
    ] = Path("attnpatch_demo"),
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all figures into this file.")
    ] = None,
) -> None:
    """Show attention by rows and a block map, on a small trained model that attnpatch ships."""
    from attnpatch.demo.run import run_demo

    run_demo(out, json)


@app.command(cls=Command)
def view(
    path: Annotated[
        Path,
        typer.Argument(metavar="DIR|FILE", help="A file that BlockMap.save wrote, or a folder of them."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("page.html"),
    picture: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="IMAGE", help="A picture of the prompt, to draw its tiles over; once for each, in order."
        ),
    ] = None,
) -> None:
    """Write block maps into one HTML page that any browser opens, without a network."""
    from attnpatch.viewing.files import load_maps
    from attnpatch.viewing.page import write_page

    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of a file")
    if out.exists() and path.exists() and (out.samefile(path) or out.suffix == ".safetensors"):
        raise UsageError(f"--out {out} holds block maps; give another name, such as page.html")
    maps, skipped = load_maps(path)
    for line in skipped:
        typer.echo(f"attnpatch: {' '.join(line.split())}", err=True)
    written = write_page(maps, out, picture or None)
    counted = [f"{len(maps)} block map{'s' * (len(maps) != 1)}", f"{written.stat().st_size / 1e6:.1f} MB"]
    counted += [f"{len(skipped)} file{'s' * (len(skipped) != 1)} skipped"] * bool(skipped)
    typer.echo(f"{written}: {', '.join(counted)}")
    if written.stat().st_size > 200e6:
        typer.echo("attnpatch: a page of this size opens slowly; give fewer maps, layers or heads", err=True)


class OptionsFirst(Command):
    """A command whose own options end at the script or at ``-m module``; everything after is passed to the script."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Mark where our options end; click cannot tell that they end at ``-m``."""
        end = self.count_own(args)
        if end and any(arg.startswith("-m") for arg in args[max(0, end - 2) : end]):
            args = [*args[:end], "--", *args[end:]] if end <= len(args) else args
        return super().parse_args(ctx, args)

    def count_own(self, args: list[str]) -> int:
        """Up to the script, or to the module's name."""
        with_value = {
            name for option in self.params if not getattr(option, "is_flag", True) for name in option.opts
        }
        end = 0
        while end < len(args) and args[end].startswith("-") and args[end] not in ("-", "--"):
            is_module = args[end].startswith("-m")
            end += 1 + (args[end] in with_value)
            if is_module:
                break
        return end


@app.command(
    cls=OptionsFirst,
    context_settings={"allow_interspersed_args": False},
)
@with_policy_options
def run(
    policy: dict[str, tuple[str, str]],
    report: Annotated[
        bool, typer.Option("--report", help="Print at exit what each attention module did.")
    ] = False,
    capture: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write the block map of every call into this folder.")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens per block; 128 if not given.")
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(metavar="CLASSES", help="Patch only models of these classes: package.module:Class,..."),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(metavar="PATHS", help="Patch only these modules of a model: layers.*.self_attn,..."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say only errors.")] = False,
    module: Annotated[
        str | None, typer.Option("-m", metavar="MODULE", help="Run a module, as python -m does.")
    ] = None,
    script: Annotated[
        list[str] | None, typer.Argument(metavar="SCRIPT [ARGS]", help="As for python.", show_default=False)
    ] = None,
) -> None:
    """Run a Python script with every model it builds patched, without editing it."""
    from attnpatch.activation.launcher import environment, launch

    if blocks is not None and capture is None:
        raise UsageError(f"--blocks {blocks} is given without --capture; add --capture FOLDER")
    options = {"capture": capture, "blocks": blocks, "modules": modules, "sites": sites}
    switches = {name: "1" for name, is_on in (("report", report), ("quiet", quiet)) if is_on}
    launch(script or [], module, environment(policy, {**options, **switches}))


@app.command(cls=Command)
def doctor() -> None:
    """Show on one screen versions, free memory, the kernels attention will run on, and problems with their fixes."""
    from attnpatch.activation.doctor import examine

    if not examine():
        raise typer.Exit(1)


@app.command(cls=Command)
@with_policy_options
def explain(
    policy: dict[str, tuple[str, str]],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder with a config.json, or a name on the hub.")
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")],
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dtype: Dtype = None,
    attention: Annotated[
        str | None, typer.Option(help="eager or sdpa; transformers chooses if not given.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where it would run; if not given: the accelerator, else cpu.")
    ] = None,
) -> None:
    """Predict how a model's attention would run at a length and what memory it takes, without loading the model."""
    for option, count in (("--seq-len", seq_len), ("--batch", batch)):
        if not 1 <= count <= 10**9:
            raise UsageError(f"{option} {count}: give a whole number from 1 to {10**9:,}")
    fields = vars(Policy.of_texts(policy))
    import attnpatch
    from attnpatch.hosts.transformers.loading import built_on_meta

    built = built_on_meta(model, chosen_dtype(dtype), attention)
    typer.echo(str(attnpatch.explain(built, seq_len, batch, device=device, **fields)))


app.command(cls=Command, epilog=EXIT_CODES)(analyze)
app.command(cls=Command, epilog=EXIT_CODES)(replay)
app.command(cls=Command)(merge)
