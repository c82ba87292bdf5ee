"""Tells which tensors of a model's call hold tokens from its inputs, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attnpatch.rows.provenance.hidden_tokens import HiddenTokens
from attnpatch.rows.provenance.origins import lost
from attnpatch.rows.provenance.reordered.function_tables import IN_WORDS
from attnpatch.rows.provenance.reordered.picked import Picked
from attnpatch.rows.provenance.reordered.token_order import Order
from attnpatch.rows.provenance.sources import Sources
from attnpatch.rows.provenance.tensors import is_wide, share_memory
from attnpatch.rows.provenance.unseen_writes import UNSEEN, Notes

# How deep in a model's arguments tensors are looked for.
_DEPTH = 6


class TokenTensors:
    """The tensors of a model's call.

    Args:
        module: The model.
        given: Its arguments.

    Attributes:
        sources: The dimensions of tensors whose order is followed.
        is_bare: For tensors whose origin was seen: True if they hold no tokens (new ones, or made from parameters
            alone).
        of_tokens: Integer inputs of the model with one element per token: ids, padding masks.
        hidden: Tells which tensors may hide some of their tokens.
        picked: Tells which inputs tokens come from, and from which places they were picked.
    """

    def __init__(self, module: torch.nn.Module, given: Any) -> None:
        # These notes do not watch for unseen writes, since ``is_bare`` does.
        self.sources, self._module = Sources([], notes=Notes()), module
        self._look = Order(self.sources)
        self.is_bare = Notes(self._strayed)
        self.of_tokens: list[torch.Tensor] = []
        self.hidden = HiddenTokens(self.of_tokens)
        self.picked = Picked(self.hidden, self.why)
        self._constants: frozenset[int] | None = None
        self._has_others = False
        self._see(given)

    def has_tokens(self, tensor: torch.Tensor) -> bool:
        """True if a tensor may hold tokens from the model's inputs.

        A tensor that no torch function has made inside the model's call is either a constant of the model, or was made
        from tokens by code that attnpatch cannot follow (another library's, scripted).
        """
        if type(tensor) is torch.nn.Parameter:
            return False
        is_bare = self.is_bare.get(tensor)
        if is_bare is None:
            if is_learned(tensor) or not self.is_plain(tensor) or not is_wide(tensor):
                return not is_learned(tensor)
            if self._constants is None:
                # A buffer may itself be a view.
                self._constants = frozenset(
                    id(one) for each in self._module.buffers() for one in (each, base(each))
                )
            is_bare = self.is_bare[tensor] = id(base(tensor)) in self._constants
            if not is_bare and tensor.is_floating_point() and not self._has_others:
                self.lose(tensor, UNSEEN)
        return not is_bare

    def why(self, tensor: torch.Tensor) -> dict[int, str]:
        """For each dimension whose elements are in another order than before, or in an unknown one: the cause."""
        dims = self.sources.of(tensor)
        return {} if dims is None else self._look.why(dims)

    def sides(self, tensor: torch.Tensor) -> list[tuple[int, list[int]]]:
        """The pieces that tokens ``[batch, tokens, channels]`` were concatenated from: the length of each, and the
        lengths (frames, rows, columns) that were merged into it, empty if not known.
        """
        dims = self.sources.of(tensor)
        return [] if dims is None or len(dims) != 3 else self._look.sides(dims[1])

    def sharing(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The other known tensors that share the memory of one."""
        return [one for one in self.is_bare if one is not tensor and share_memory(one, tensor)]

    def lose(self, tensor: torch.Tensor, name: str) -> None:
        """Note that the origin of a tensor's elements is no longer known."""
        self.is_bare[tensor] = False
        self.sources.give(tensor, lost(tensor.shape, IN_WORDS.get(name, name)))
        self.picked.lose_places(tensor)

    def is_plain(self, tensor: torch.Tensor) -> bool:
        """True for plain tensors. A subclass may make plain tensors unseen, and must not be asked for its base."""
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        self._has_others |= not is_plain
        return is_plain

    def _strayed(self, tensor: torch.Tensor) -> bool:
        """Called if unseen code has written to a tensor: it may hold tokens now (False), in an unknown order."""
        self.lose(tensor, UNSEEN)
        return False

    def _see(self, given: Any, depth: int = 0) -> None:
        """Note the tensors among the model's arguments, also inside objects of any kind."""
        if isinstance(given, torch.Tensor):
            self.is_bare[given] = False
            self.picked.begin(given)
            if type(given) is torch.Tensor and given.dim() == 2 and not given.is_floating_point():
                self.of_tokens.append(given)
        elif depth < _DEPTH and not isinstance(given, (type, torch.nn.Module)):
            if isinstance(given, Mapping):
                inside = given.values()
            else:
                is_row = isinstance(given, (tuple, list, set, frozenset))
                inside = given if is_row else getattr(given, "__dict__", {}).values()
            for each in inside:
                self._see(each, depth + 1)


def base(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that a tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def is_learned(tensor: torch.Tensor) -> bool:
    """True if a tensor is a parameter or a view of one, so that it holds no tokens."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)


def has_tokens_of(tensor: torch.Tensor, result: torch.Tensor) -> bool:
    """True if a tensor can hold all of the result's tokens: same shape, and not a parameter."""
    return (
        tensor.shape == result.shape
        and not is_learned(tensor)
        and tensor.is_floating_point() == result.is_floating_point()
    )


def listed(index: Any) -> tuple[Any, ...]:
    """The parts of an index."""
    return index if isinstance(index, tuple) else (index,)
