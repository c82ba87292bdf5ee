"""``attnpatch run``: sets the ``ATTNPATCH_*`` variables and replaces itself by ``python script.py``.

The script runs in a fresh interpreter, so ``__main__``, tracebacks, exit codes and child processes are the same as
without attnpatch. Where the start-up file is not installed, PYTHONPATH is set so that the interpreter and its children
import a ``sitecustomize`` that does the same.
"""

from __future__ import annotations

import os
import pathlib
import site
import subprocess
import sys
from collections.abc import Mapping, Sequence

from attnpatch.activation.settings import (
    BLOCKS_FORM,
    CAPTURE,
    MODULES_FORM,
    PREFIX,
    SITES_FORM,
    SWITCH,
    SWITCH_FORM,
    Settings,
    writable_folder,
)
from attnpatch.errors import AttnpatchError, UsageError
from attnpatch.policy import Policy

BOOT = pathlib.Path(__file__).parent / "boot"
# The options beside those of the policy. Each has a variable, ``ATTNPATCH_REPORT`` and so on, of the same form.
OPTIONS = {
    "report": SWITCH_FORM.of,
    "quiet": SWITCH_FORM.of,
    "capture": writable_folder,
    "blocks": BLOCKS_FORM.of,
    "modules": MODULES_FORM.of,
    "sites": SITES_FORM.of,
}


class LaunchError(AttnpatchError):
    """The script does not exist."""


def environment(texts: Mapping[str, tuple[str, str]], options: Mapping[str, str | None]) -> dict[str, str]:
    """The environment for the script: this process's variables, with those given here replaced.

    Args:
        texts: Policy fields, in the form that ``Policy.of_texts`` takes.
        options: The text of each of ``OPTIONS``; ``None``: not given.

    Raises:
        PolicyError: An option or a variable has an invalid value.
    """
    Policy.of_texts(texts)
    variables = {**os.environ, SWITCH: "1"}
    variables.update({PREFIX + field.upper(): text for field, (_, text) in texts.items()})
    for name, text in options.items():
        if text is not None:
            read, variable = OPTIONS[name](f"--{name} ", text), PREFIX + name.upper()
            # The path is absolute, because the script's children may work in other folders.
            variables[variable] = str(read) if variable == CAPTURE else text
    Settings.of_environment(variables)
    if startup_folder() is None:
        variables["PYTHONPATH"] = os.pathsep.join(_search_path(variables.get("PYTHONPATH")))
    return variables


def startup_folder() -> str | None:
    """The folder of the start-up file, which interpreters of this environment run; ``None`` if it is not installed."""
    found = (folder for folder in site_folders() if os.path.isfile(os.path.join(folder, "attnpatch.pth")))
    return next(found, None)


def site_folders() -> list[str]:
    """Where an interpreter looks for start-up files."""
    return [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]


def _search_path(before: str | None) -> list[str]:
    paths = [str(BOOT)]
    root = str(BOOT.parents[2])
    if root not in site_folders():
        # attnpatch runs from a checkout, and without this the script's interpreter would not find the package.
        paths.append(root)
    return [*paths, before] if before else paths


def launch(arguments: Sequence[str], module: str | None, variables: Mapping[str, str]) -> None:
    """Replace this process by ``python script args`` or ``python -m module args``; does not return.

    Args:
        arguments: The script and its arguments; with ``module``, only the arguments.
        module: The module given by ``-m``, or ``None``.
        variables: The environment.

    Raises:
        UsageError: No script was given.
        LaunchError: It does not exist.
    """
    if module is not None:
        arguments = ["-m", module, *arguments]
    elif not arguments:
        raise UsageError("nothing to run; give a script (attnpatch run script.py) or a module (-m module)")
    elif arguments[0] != "-" and not os.path.exists(arguments[0]):
        raise LaunchError(f"there is no script {arguments[0]}")
    command = [sys.executable, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":
        # On Windows execve would return to the shell at once.
        sys.exit(subprocess.call(command, env=variables))
    os.execve(command[0], command, variables)
