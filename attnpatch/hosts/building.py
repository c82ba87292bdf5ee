"""Calls back for every model that transformers and diffusers build, even if they are imported later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

TRANSFORMERS = "transformers.modeling_utils"
DIFFUSERS = "diffusers.models.modeling_utils"


def when_imported(name: str, callback: Callable[[Any], None]) -> None:
    """Call ``callback`` with a module once it is imported; it must not raise."""
    import wrapt

    wrapt.register_post_import_hook(callback, name)


def when_built(callback: Callable[[Any], None], failed: Callable[[Exception], None]) -> None:
    """Call ``callback`` with every model that the hosts build from now on, in whatever way.

    The callback for an inner model comes before the outer model's. Nothing is imported here; import hooks wait for the
    hosts.

    Args:
        callback: Must not raise.
        failed: Called instead of raising into the script's import of a host.
    """
    import wrapt

    for name, watch in ((TRANSFORMERS, _watch_transformers), (DIFFUSERS, _watch_diffusers)):
        wrapt.register_post_import_hook(functools.partial(_hook, watch, callback, failed), name)


def _hook(
    watch: Callable[..., None], callback: Any, failed: Callable[[Exception], None], module: Any
) -> None:
    try:
        watch(module, callback)
    except Exception as error:
        failed(error)


def _watch_transformers(module: Any, callback: Callable[[Any], None]) -> None:
    """Wrap ``post_init``, with which every model's ``__init__`` ends."""
    import wrapt

    def after(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        callback(instance)
        return result

    wrapt.wrap_function_wrapper(module, "PreTrainedModel.post_init", after)


def _watch_diffusers(module: Any, callback: Callable[[Any], None]) -> None:
    """Wrap each class's own ``__init__`` when the class is created, because diffusers has no method that every
    ``__init__`` calls at its end.

    All model classes are created after this hook runs, since they import the module that it watches.
    """

    def __init_subclass__(cls: type[Any], **kwargs: Any) -> None:
        super(module.ModelMixin, cls).__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _told(cls.__init__, callback)

    module.ModelMixin.__init_subclass__ = classmethod(__init_subclass__)


def _told(init: Callable[..., None], callback: Callable[[Any], None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # Called by a subclass's __init__: the model is not complete yet.
        if id(self) in _under_way:
            init(self, *args, **kwargs)
            return
        _under_way.add(id(self))
        try:
            init(self, *args, **kwargs)
        finally:
            _under_way.discard(id(self))
        callback(self)

    return __init__


# Objects inside their outermost __init__, by id.
_under_way: set[int] = set()
