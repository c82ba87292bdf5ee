"""Entry point of the ``attnpatch`` command, and of ``python -m attnpatch``."""

import sys


def main() -> None:
    """Run the command line; if the ``cli`` extra is missing, print one line that says how to install it."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        needed = 'attnpatch needs typer and rich for its command line: pip install "attnpatch[cli]"'
        print(needed, file=sys.stderr)
        sys.exit(1)
    from attnpatch.cli.app import app

    app(prog_name="attnpatch")


if __name__ == "__main__":
    main()
