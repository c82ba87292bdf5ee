"""Entry point of the ``attnpatch`` command, and of ``python -m attnpatch``."""

import sys


def main() -> None:
    """Run the command line; without its extra say how to get it, in one line."""
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
