"""Where transformers builds its models, watched from before it is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

MODULE = "transformers.modeling_utils"


def is_imported() -> bool:
    """Whether this process can have built a model."""
    return MODULE in sys.modules


def when_built(callback: Callable[[Any], None], failed: Callable[[Exception], None]) -> None:
    """Call ``callback`` with every model that transformers builds from now on, by whatever route.

    Every model's ``__init__`` ends with ``post_init``, an inner model's before the outer one's. Nothing is imported here;
    the hook waits for transformers.

    Args:
        callback: Must not raise.
        failed: Called instead of raising into the script's import of transformers.
    """
    import wrapt

    def after(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        callback(instance)
        return result

    def hook(module: Any) -> None:
        try:
            wrapt.wrap_function_wrapper(module, "PreTrainedModel.post_init", after)
        except Exception as error:
            failed(error)

    wrapt.register_post_import_hook(hook, MODULE)
