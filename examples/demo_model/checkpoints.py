"""Checkpoints of a training run, written atomically and read only by a run with the same arguments."""

from pathlib import Path
from typing import Any

import torch

from attnpatch import atomic_files


def write(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``. An older checkpoint remains until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.whole(path) as temporary:
        torch.save(state, temporary)


def read(path: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a run with these arguments; ``None`` if there is no checkpoint.

    Raises:
        SystemExit: The checkpoint was made with other arguments.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["arguments"] != arguments:
        raise SystemExit(
            f"{path} was made with {state['arguments']}; delete it to start again, or give the same arguments."
        )
    return state
