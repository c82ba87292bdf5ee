"""Watches the calls of a denoiser: which rows of a batch they are for, and who looks at each of its attention sites."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.blocks.heads import chosen_heads
from attnpatch.errors import AttnpatchError
from attnpatch.recording.accumulator import SiteObserver
from attnpatch.recording.diffusion.denoiser_call import DenoiserCall
from attnpatch.recording.diffusion.denoising import Sampling
from attnpatch.recording.diffusion.observer import ImageObserver
from attnpatch.recording.diffusion.token_provenance import IMAGE, SECOND, TEXT, Origins
from attnpatch.recording.options import CaptureOptions


@dataclasses.dataclass(frozen=True)
class DenoiserReading:
    """How a denoiser's calls are read (``attnpatch.hosts``).

    Attributes:
        read_call: Makes a ``DenoiserCall`` of arguments.
        num_heads: Of sites, where it is known.
        inputs_among: The tensors that a site is called with, as ``Layout`` counts them.
        sides_of: Rows and columns that the tokens of such a tensor were joined of; empty: not known.
    """

    read_call: Callable[[Any, Any], DenoiserCall]
    num_heads: dict[str, int]
    inputs_among: Callable[[Any, Any], list[torch.Tensor]]
    sides_of: Callable[[torch.Tensor], list[int]] = lambda tensor: []


class ImageRecorder:
    """Collects for one denoiser.

    Args:
        sampling: Where to.
        options: What the capture asked for.
        names: The denoiser's attention sites.
        prefix: Before their names: the component's.
        host: How its calls are read.
    """

    # Whether a capture that somebody asks for takes its place.
    gives_way = False
    # Whether its maps say which of the model's tokens is which.
    follows_order = True
    # Every row is looked at, and nothing else is measured.
    sample_rows, seed, measures, is_of_gradient = None, 0, (), False

    def __init__(
        self,
        sampling: Sampling,
        options: CaptureOptions,
        names: Sequence[str],
        prefix: str,
        host: DenoiserReading,
    ) -> None:
        self.sampling, self.prefix, self.heads = sampling, prefix, options.heads
        self.num_heads = {prefix + name: count for name, count in host.num_heads.items()}
        self.read_call, self.inputs_among, self.sides_of = host.read_call, host.inputs_among, host.sides_of
        wanted = options.sites
        self.wanted = {name for name in names if wanted is None or fnmatch.fnmatchcase(prefix + name, wanted)}
        self.call: DenoiserCall | None = None
        self.called: set[str] = set()
        self.owner: Any = None
        self._stack = contextlib.ExitStack()

    def is_mine(self) -> bool:
        """Whether the running thread's calls are seen."""
        return self.owner is None or bool(self.owner.is_mine())

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """The denoiser is about to run."""
        sampling, self.call, self.called = self.sampling, None, set()
        call = self.read_call(args, kwargs)
        step = sampling.run.step_of(call.timesteps)
        try:
            self.rows = sampling.rows_of(call)
        except AttnpatchError as error:
            # Blocks that do not fit the text, say: the images are made all the same.
            sampling.left_out.setdefault(f"step {step}", str(error))
            return
        self.call = call
        key = (step if sampling.is_kept_apart else 0, self.rows)
        self.records = sampling.run.records.setdefault(key, {})
        self.origins = self._stack.enter_context(Origins())
        kinds = (IMAGE, call.images), (TEXT, call.texts[:1]), (SECOND, call.texts[1:])
        for kind, tensors in kinds:
            for tensor in tensors:
                self.origins.mark(tensor, kind)

    def end_call(self) -> None:
        self._stack.close()
        self.call = None

    def wants(self, name: str) -> bool:
        """Whether a site was asked for; not outside a call of the denoiser."""
        return self.call is not None and name in self.wanted

    def head_numbers(self, num_heads: int) -> list[int]:
        """The heads that are kept apart.

        Raises:
            CaptureError: One was asked for that there is not.
        """
        return chosen_heads(self.heads, num_heads)

    def observer(self, site: Any, args: Any, kwargs: Any) -> SiteObserver:
        """Who looks at the call of a site that is about to be made."""
        inputs = [(self.origins.of(each), self.sides_of(each)) for each in self.inputs_among(args, kwargs)]
        is_again = site.name in self.called
        self.called.add(site.name)
        name = self.prefix + site.name
        return ImageObserver(self, name, self.call, self.records, inputs, is_again, site.is_candidate)
