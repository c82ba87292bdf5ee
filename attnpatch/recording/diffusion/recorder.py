"""ImageRecorder: follows the calls of a denoiser, and makes an observer for each call of its sites."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnpatch.errors import AttnpatchError
from attnpatch.recording.accumulator import SiteObserver
from attnpatch.recording.diffusion.denoiser_call import DenoiserCall
from attnpatch.recording.diffusion.denoising import Sampling
from attnpatch.recording.diffusion.observer import ImageObserver
from attnpatch.recording.diffusion.token_provenance import IMAGE, SECOND, TEXT, TokenKinds
from attnpatch.recording.options import CaptureOptions


@dataclasses.dataclass(frozen=True)
class DenoiserReading:
    """Functions that read a denoiser's calls (from ``attnpatch.hosts``).

    Attributes:
        read_call: Makes a ``DenoiserCall`` from arguments.
        num_heads: Number of heads by site, if known.
        inputs_among: The tensors that a site is called with, in the order in which ``Layout`` numbers them.
        sides_of: The pieces that such a tensor's tokens were concatenated from: the length of each, and the lengths of
            the dimensions that were merged into it (empty: not known).
    """

    read_call: Callable[[Any, Any], DenoiserCall]
    num_heads: dict[str, int]
    inputs_among: Callable[[Any, Any], list[torch.Tensor]]
    sides_of: Callable[[torch.Tensor], list[tuple[int, list[int]]]] = lambda tensor: []


class ImageRecorder:
    """Records the attention of one denoiser.

    Args:
        sampling: The runs to which it adds.
        options: The options of the capture.
        names: The denoiser's attention sites.
        prefix: The component's name, put before the sites' names.
        host: Reads its calls.
    """

    # True if another capture may replace it.
    gives_way = False
    # True if its maps depend on the order of the model's tokens.
    follows_order = True
    # All rows are summed, without further statistics.
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
        """True if the running thread's calls are captured."""
        return self.owner is None or bool(self.owner.is_mine())

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """Called when a call of the denoiser begins."""
        sampling, self.call, self.called = self.sampling, None, set()
        call = self.read_call(args, kwargs)
        step = sampling.run.step_of(call.timesteps)
        try:
            self.rows = sampling.rows_of(call)
        except AttnpatchError as error:
            # For example, blocks do not fit the text. The sampler must go on.
            sampling.left_out.setdefault(f"step {step}", str(error))
            return
        self.call = call
        key = (step if sampling.is_per_step else 0, self.rows)
        self.records = sampling.run.records.setdefault(key, {})
        self.token_kinds = self._stack.enter_context(TokenKinds(call.batch))
        kinds = (IMAGE, call.images), (TEXT, call.texts[:1]), (SECOND, call.texts[1:])
        for kind, tensors in kinds:
            for tensor in tensors:
                self.token_kinds.mark(tensor, kind)

    def end_call(self) -> None:
        self._stack.close()
        self.call = None

    def wants(self, name: str) -> bool:
        """True if a site was asked for and the denoiser is being called."""
        return self.call is not None and name in self.wanted

    def observer(self, site: Any, args: Any, kwargs: Any) -> SiteObserver:
        """The observer for a site's call that is about to begin."""
        inputs = [
            (self.token_kinds.of(each), self.sides_of(each)) for each in self.inputs_among(args, kwargs)
        ]
        is_again = site.name in self.called
        self.called.add(site.name)
        name = self.prefix + site.name
        return ImageObserver(self, name, self.call, self.records, inputs, is_again, lambda: site.may_be_none)
