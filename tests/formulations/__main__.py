"""``python -m tests.formulations``: tries every formulation and writes ``docs/formulations.md``."""

from .page import main

raise SystemExit(main())
