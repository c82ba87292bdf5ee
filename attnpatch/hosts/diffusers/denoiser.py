"""Reads the arguments of a denoiser's call, and tells when a pipeline's sampling begins and ends.

Arguments are found by the names that diffusers' models share and by those of the models' original code, so nothing is
imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attnpatch.errors import AttnpatchError
from attnpatch.failures import warn_once
from attnpatch.hosts.class_methods import Replaced, changing, owner_of
from attnpatch.hosts.diffusers import latent_grids
from attnpatch.hosts.diffusers.components import IMAGES, TIMESTEPS, components_of
from attnpatch.hosts.transformers.calls import parameter_names
from attnpatch.recording.diffusion.denoiser_call import DenoiserCall

# Arguments that hold text; the prompt's words are found in the first one that is given.
_TEXTS = ("encoder_hidden_states", "context", "txt", "encoder_hidden_states_t5", "clip_text")
# Arguments that hold one vector for each text.
_POOLED = ("clip_text_pooled", "pooled_projections")
_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")


def num_heads_of(denoiser: nn.Module) -> dict[str, int]:
    """The number of heads of each attention module that has an attribute ``heads``, by the module's name."""
    found = {name: getattr(module, "heads", None) for name, module in denoiser.named_modules()}
    return {name: heads for name, heads in found.items() if type(heads) is int}


def read_denoiser_call(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DenoiserCall:
    """The facts that a denoiser's arguments tell about its call.

    Args:
        part: The denoiser.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    given = {**dict(zip(parameter_names(type(part)), args, strict=False)), **kwargs}
    images = [tensor for name in IMAGES for tensor in _tensors(given.get(name))]
    texts = [tensor for name in _TEXTS for tensor in _tensors(given.get(name)) if tensor.dim() == 3]
    mask = next((given[name] for name in _MASKS if isinstance(given.get(name), torch.Tensor)), None)
    timestep = next((given[name] for name in TIMESTEPS if given.get(name) is not None), [])
    return DenoiserCall(
        batch=images[0].shape[0] if images else 1,
        images=images,
        texts=texts,
        pooled=next((given[name] for name in _POOLED if isinstance(given.get(name), torch.Tensor)), None),
        text_mask=(mask != 0).cpu() if mask is not None and mask.dim() == 2 else None,
        timesteps=frozenset(map(float, torch.as_tensor(timestep).flatten().unique().tolist())),
        latents=latent_grids.axes_of(given) or latent_grids.latents_grid(part, images),
        pictures=latent_grids.pictures_of(given, images),
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    """A tensor as a list, or the tensors of a list; nested lists are ignored."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return [one for one in values if isinstance(one, torch.Tensor)]


def evaluations_in(pipeline: Any, timestep: float | None) -> int:
    """How often a pipeline's samplers call the denoiser at one timestep; second-order samplers do so twice.

    Args:
        pipeline: A pipeline whose schedulers know the number of steps already.
        timestep: The denoiser's timestep. If no schedule contains it (schedulers may use another unit), the largest
            count of all timesteps is returned.
    """
    schedules = (getattr(each, "timesteps", None) for each in components_of(pipeline).values())
    runs = [
        (value, len(list(same)))
        for schedule in schedules
        if isinstance(schedule, torch.Tensor)
        for value, same in itertools.groupby(map(float, schedule.flatten().tolist()))
    ]
    here = [count for value, count in runs if value == timestep]
    return max(here or [count for _, count in runs], default=1)


@contextlib.contextmanager
def watching(
    pipeline: Any, begin: Callable[[dict[str, Any]], None], end: Callable[[Any], None]
) -> Iterator[None]:
    """Call ``begin`` and ``end`` around every call of a pipeline.

    Python looks ``__call__`` up in the class, so it is replaced there; only calls of this object are reported.

    Args:
        pipeline: The pipeline. Afterwards it and its class are as they were.
        begin: Called with the arguments by name.
        end: Called when the call returns, with its result, or fails, with ``None``.
    """
    owner = owner_of(type(pipeline), "__call__")
    if owner is None:
        yield  # the pipeline has no ``__call__``; its calls cannot be seen
        return
    with changing:
        calls = _watched.get(owner) or _CallOfClass(owner)
        watchers = calls.watchers.setdefault(id(pipeline), [])
        watchers.append((begin, end))
    try:
        yield
    finally:
        with changing:
            watchers.remove((begin, end))
            calls.leave(id(pipeline))


class _CallOfClass(Replaced):
    """``__call__`` in the class that defines it, while some pipelines are watched.

    Attributes:
        watchers: Functions to call before and after, by the id of the pipeline (its watcher keeps the pipeline alive).
    """

    def __init__(self, owner: type[Any]) -> None:
        super().__init__(owner, "__call__")
        self.watchers: dict[int, list[tuple[Callable[[dict[str, Any]], None], Callable[[Any], None]]]] = {}
        found, watchers = self.found, self.watchers

        @functools.wraps(found)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = found.__get__(self, type(self))
            told = list(watchers.get(id(self), ()))
            if not told:
                return call(*args, **kwargs)
            try:
                given = inspect.signature(call).bind(*args, **kwargs).arguments
            except TypeError:
                return call(*args, **kwargs)  # raises the pipeline's own error
            for begin, _ in told:
                _attempted(
                    begin, {**given, **given.get("kwargs", {})}, where="the beginning of a pipeline's call"
                )
            result = None
            try:
                result = call(*args, **kwargs)
                return result
            finally:
                for _, end in told:
                    _attempted(end, result, where="the end of a pipeline's call")

        self.put_in(__call__)
        _watched[owner] = self

    def leave(self, key: int) -> None:
        if not self.watchers[key]:
            del self.watchers[key]
        if not self.watchers:
            del _watched[self.kind]
            self.take_out()


_watched: dict[type[Any], _CallOfClass] = {}


def _attempted(step: Callable[..., Any], *args: Any, where: str) -> None:
    """Call a watcher's function; if it fails, warn, and let the pipeline's call go on."""
    try:
        step(*args)
    except AttnpatchError:
        raise
    except Exception as error:
        warn_once(where, error)


def images_in(result: Any) -> int | None:
    """The number of images that a pipeline's call has returned, which come first in its result; ``None``: not known."""
    first = result[0] if isinstance(result, (tuple, list, Mapping)) and len(result) else None
    is_batch = isinstance(first, (list, torch.Tensor)) or hasattr(first, "__array__")
    return len(first) if is_batch and getattr(first, "shape", (1,)) else None


def texts_given(given: dict[str, Any]) -> list[tuple[str, str]]:
    """The prompts among a pipeline's arguments, as pairs of role (``"prompt"`` or ``"negative"``) and text."""
    found: list[tuple[str, str]] = []
    for name, value in given.items():
        if "prompt" in name:
            role = "negative" if "negative" in name else "prompt"
            values: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
            found += [(role, text) for text in values if isinstance(text, str)]
    if not any(role == "negative" for role, _ in found):
        found.append(("negative", ""))
    return found
