"""``python -m tests.fuzzing``."""

from .processes import main

raise SystemExit(main())
