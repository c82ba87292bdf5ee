"""Finds a stand-in where a kernel package (flash-attn, xFormers, SageAttention) is imported and not installed.

Nothing here imports torch: the finder is there from the start of an interpreter, and what it finds is made when a script
imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attnpatch.errors import in_one_line
from attnpatch.hosts import off
from attnpatch.hosts.transformers.flash_attn_2 import accept
from attnpatch.policy import Policy
from attnpatch.standins.packages import MODULES, NOT_OFFERED, PACKAGES

if TYPE_CHECKING:
    from attnpatch.patching.patch import Patch


class Loader(importlib.abc.Loader):
    """Makes the module of a stand-in.

    Args:
        finder: The finder.
    """

    def __init__(self, finder: Finder) -> None:
        self.finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """None: a plain module."""

    def exec_module(self, module: types.ModuleType) -> None:
        error = off.missing()  # this imports torch
        if error is not None:
            name = module.__name__
            raise ModuleNotFoundError(
                f"No module named {name!r}, and no stand-in: {in_one_line(error)}", name=name
            )
        from attnpatch.standins.modules import fill

        fill(module, lambda: self.finder.policy)
        if module.__name__ in PACKAGES:
            self.finder.say(
                f"attnpatch: {module.__name__} is not installed; a stand-in computes its attention functions with "
                "torch's"
            )


class Distribution(importlib.metadata.Distribution):
    """The metadata of a stand-in, which hosts ask for before they import a package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def read_text(self, filename: str) -> str | None:
        name, version = PACKAGES[self.package]
        summary = "Stand-in of attnpatch; the package itself is not installed"
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n",
            "top_level.txt": f"{self.package}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{self.package} is a stand-in of attnpatch, which has no files")


class Finder(importlib.abc.MetaPathFinder):
    """The last finder: it is asked for what no other one finds.

    Args:
        policy: The policy of calls outside patched models.
        say: Prints a line.
    """

    def __init__(self, policy: Policy, say: Callable[[str], None]) -> None:
        self.policy, self.say = policy, say

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module of a stand-in; ``None`` if it has no such module, or if the package is installed."""
        package = fullname.partition(".")[0]
        if package in NOT_OFFERED and is_missing(package):
            _refuse(fullname, f"attnpatch has no stand-in for it, since {NOT_OFFERED[package]}")
        if package not in PACKAGES or not is_missing(package):
            return None
        if fullname not in MODULES:
            offered = ", ".join(name for name in MODULES if name.startswith(package))
            _refuse(fullname, f"{package} is not installed, and attnpatch's stand-in has only {offered}")
            return None
        is_package = any(name.startswith(fullname + ".") for name in MODULES)
        return importlib.util.spec_from_loader(
            fullname, Loader(self), origin="stand-in of attnpatch", is_package=is_package
        )

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        """Metadata of the packages that are missing, unless somebody asks for what is in certain folders (pip)."""
        if context is not None and "path" in vars(context):
            return
        wanted = getattr(context, "name", None)
        for package, (name, _) in PACKAGES.items():
            is_asked = wanted is None or _plain(wanted) == _plain(name)
            if is_asked and is_missing(package):
                yield Distribution(package)


def is_missing(package: str) -> bool:
    """True if a package is not installed; a stand-in does not count."""
    module = sys.modules.get(package)
    if module is not None:
        return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), Loader)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        # The finder of import hooks asks all others, and so this one again.
        if isinstance(finder, Finder) or find is None or type(finder).__module__.startswith("wrapt"):
            continue
        if find(package, None, None) is not None:
            return False
    return True


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _refuse(fullname: str, why: str) -> None:
    """Raise an error that says more than Python's if a module is imported; do nothing if it is only looked for.

    Raises:
        ModuleNotFoundError: Somebody imports it.
    """
    frame: Any = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        if frame.f_code.co_name == "_find_and_load_unlocked":
            raise ModuleNotFoundError(f"No module named {fullname!r}; {why}", name=fullname)
        frame = frame.f_back


def replace_missing_kernels(**policy: Any) -> tuple[str, ...]:
    """Let imports of flash-attn, xFormers and SageAttention succeed where these packages are not installed.

    From now on such an import finds a stand-in. It has the package's attention functions with their signatures, computed
    by torch's functions: fused where torch has a fused kernel for them, otherwise by rows when memory is short. Call it
    before the import, and before transformers or diffusers is imported: they look for packages once. An installed package
    is imported as ever; ``apply(model, replace_kernels=True)`` replaces its calls. It holds until the process ends.

    Args:
        **policy: Fields of ``Policy`` for calls outside patched models. A later call replaces them for functions that
            were not imported before.

    Returns:
        The packages that are not installed, and have a stand-in now.

    Raises:
        PolicyError: A field is unknown or its value is invalid.
    """
    install(Policy.of(policy), lambda line: None)
    return tuple(package for package in PACKAGES if is_missing(package))


def install(policy: Policy, say: Callable[[str], None]) -> Finder:
    """Find stand-ins in this process from now on; a second call replaces the policy."""
    for finder in sys.meta_path:
        if isinstance(finder, Finder):
            finder.policy = policy
            return finder
    finder = Finder(policy, say)
    sys.meta_path.append(finder)
    accept(
        lambda: is_missing("flash_attn"),
        lambda error: say(f"attnpatch: transformers may refuse flash_attention_2: {in_one_line(error)}"),
    )
    return finder


def used() -> list[Patch]:
    """The patches of stand-ins that were called outside patched models."""
    modules = sys.modules.get("attnpatch.standins.modules")
    return [] if modules is None else modules.used()
