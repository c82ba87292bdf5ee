"""Which attention of transformers and diffusers goes by rows: ``python -m tests.compat [--transformers | --diffusers]``.

A whole sweep writes its page of the documentation. Whether block maps are right: ``tests.compat.maps_transformers`` and
``tests.compat.maps_diffusers``.
"""

from __future__ import annotations

import argparse

from . import by_rows_diffusers, by_rows_transformers


def main() -> int:
    """The sweeps; both where none or both are asked for. The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of architectures, or of model classes")
    for library in ("transformers", "diffusers"):
        parser.add_argument(f"--{library}", action="store_true", help=f"{library} alone")
    options = parser.parse_args()
    both = options.transformers == options.diffusers
    if both and options.only:
        parser.error("--only names models of one library: say --transformers or --diffusers")
    status = by_rows_transformers.main(options.only) if options.transformers or both else 0
    return max(status, by_rows_diffusers.main(options.only) if options.diffusers or both else 0)


if __name__ == "__main__":
    raise SystemExit(main())
