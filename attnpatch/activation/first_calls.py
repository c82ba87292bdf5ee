"""Reports the first call of every module, however it was built; later calls cost nothing.

``nn.Module.__call__`` reads the attribute that ``Module.compile()`` sets, and calls its value unless that is ``None``.
``FirstCalls`` is put there as an attribute of the class ``nn.Module``, so it is found by every module, even by one that
was copied, unpickled or made without ``__init__``. Once a module was seen, the module's own attribute is ``None``
(``settle``), and calls run as without attnpatch. ``nn.Module.__getstate__`` leaves this attribute out, so a copy counts
as a module that was not seen.

Alternatives, and why not: a wrapper of ``nn.Module.__call__`` costs every call of every layer; so does a global hook,
which also makes ``torch.compile`` warn and compile again. If each new module got an attribute, modules that no
``__init__`` made would be missed, and TorchScript refuses to compile a module that has one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from attnpatch import compat

_PREPARE = "__prepare_scriptable__"


class FirstCalls:
    """Takes the place where a compiled module keeps its call.

    Args:
        told: Called with a module before its first call. It must not raise. If it returns a function, that is called
            after the first call, unless the call raises.
    """

    def __init__(self, told: Callable[[nn.Module], Callable[[], None] | None]) -> None:
        self.told = told

    def __bool__(self) -> bool:
        """False: PEFT takes a module for a compiled one if this attribute is true."""
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The caller is ``nn.Module.__call__``. A plain function here would be bound to the module, but a bound function
        # is true.
        module = sys._getframe(1).f_locals["self"]
        after = self.told(module)
        result = getattr(module, compat.PLAIN_CALL)(*args, **kwargs)
        if after is not None:
            after()
        return result


def install(told: Callable[[nn.Module], Callable[[], None] | None]) -> bool:
    """Report the first call of every module of this process from now on; False if this torch has no place to hook in."""
    if not compat.has_call_attribute():
        return False
    setattr(nn.Module, compat.COMPILED_CALL, FirstCalls(told))
    setattr(nn.Module, _PREPARE, _without_mark)
    return True


def uninstall() -> None:
    """Undo ``install``; modules that were seen keep their mark, which changes nothing."""
    if isinstance(getattr(nn.Module, compat.COMPILED_CALL, None), FirstCalls):
        setattr(nn.Module, compat.COMPILED_CALL, None)
        delattr(nn.Module, _PREPARE)


def settle(module: nn.Module) -> None:
    """Do not report the first call of a module, nor those of the modules inside it."""
    for each in nn.Module.modules(module):
        settle_alone(each)


def settle_alone(module: nn.Module) -> None:
    """Do not report the first call of this one module."""
    # A module that was compiled keeps its own call.
    vars(module).setdefault(compat.COMPILED_CALL, None)


def is_settled(module: nn.Module) -> bool:
    return compat.COMPILED_CALL in vars(module)


def _without_mark(module: nn.Module) -> nn.Module:
    """Called first by ``torch.jit.script``, which takes every attribute of a module as a part of its type."""
    if vars(module).get(compat.COMPILED_CALL, module) is None:
        del vars(module)[compat.COMPILED_CALL]
    return module
