"""Where transformers and diffusers build their models, watched from before they are imported."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

TRANSFORMERS = "transformers.modeling_utils"
DIFFUSERS = "diffusers.models.modeling_utils"


def is_imported() -> bool:
    """Whether this process can have built a model."""
    return TRANSFORMERS in sys.modules or DIFFUSERS in sys.modules


def when_built(callback: Callable[[Any], None], failed: Callable[[Exception], None]) -> None:
    """Call ``callback`` with every model that the hosts build from now on, by whatever route.

    An inner model's call comes before the outer one's. Nothing is imported here; the hooks wait for the hosts.

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
    """Every model's ``__init__`` ends with ``post_init``."""
    import wrapt

    def after(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        callback(instance)
        return result

    wrapt.wrap_function_wrapper(module, "PreTrainedModel.post_init", after)


def _watch_diffusers(module: Any, callback: Callable[[Any], None]) -> None:
    """Nothing is called at the end of every ``__init__`` there, so each class's own is wrapped as the class is made.

    The hosts' classes are made after this module, which they import.
    """

    def __init_subclass__(cls: type[Any], **kwargs: Any) -> None:
        super(module.ModelMixin, cls).__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _told(cls.__init__, callback)

    module.ModelMixin.__init_subclass__ = classmethod(__init_subclass__)


def _told(init: Callable[..., None], callback: Callable[[Any], None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # Called by the __init__ of a subclass: the model is not complete then.
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
