"""Tracks which tokens of a tensor are text and which are the image, from a model's inputs through its functions.

Joint attention concatenates both, text first in one model and last in another. The concatenation shows which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from attnpatch.observing import MAKING

# Words are found in the first text that a denoiser is given (``TEXT``).
IMAGE, TEXT, SECOND, OTHER = "image", "text", "second text", "other"
# Tokens that may belong to another row of the batch than the row that holds them.
MOVED = "another row's"
# Known kinds of tokens that belong to no block, each in the words of a reason. ``UNKNOWN`` is the reason for all
# others.
OF_NO_BLOCK = {
    SECOND: "of a second text",
    MOVED: "of rows of the batch that were picked, joined or averaged, so it is not known whose they are",
}
UNKNOWN = "that are not known to be the image's or the text's"

# The kinds of tokens in order, each with its length; for a tensor of a single kind the length is ``None``.
Kinds = tuple[tuple[str, int | None], ...]

_JOINING = frozenset([torch.cat, torch.concat, torch.concatenate])
# Products, with the index of the argument whose rows are the result's rows.
_ROWS_OF = {"addmm": 1, "baddbmm": 1, "addbmm": 1, "einsum": 1}
_PRODUCTS = frozenset(
    ["matmul", "__matmul__", "bmm", "mm", "linear", "scaled_dot_product_attention", *_ROWS_OF]
)
# Functions that reorder tokens or pick some of them; functions that slice; functions that combine several tensors along
# one axis.
_PICKING = frozenset(
    [
        "gather",
        "index_select",
        "take_along_dim",
        "take",
        "masked_select",
        "index_add",
        "index_copy",
        "index_put",
    ]
    + ["scatter", "scatter_add", "scatter_reduce", "masked_scatter", "topk", "sort", "flip", "roll"]
)
_CUTTING = frozenset(["__getitem__", "narrow", "split", "split_with_sizes", "chunk", "tensor_split"])
_ALONG_ONE_AXIS = frozenset(
    ["conv1d", "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "interpolate"]
)
_REDUCING = frozenset(["mean", "sum", "amax", "amin", "max", "min", "median", "logsumexp", "prod"])
# Functions that take only the size or dtype of another tensor.
_LIKE = frozenset(["to", "type_as", "expand_as", "view_as", "reshape_as"])
# Functions that write tokens into an existing tensor.
_WRITING = frozenset(["__setitem__", "copy_", "index_put_", "index_copy_", "scatter_", "masked_scatter_"])


class TokenKinds(TorchFunctionMode):
    """A mode that tracks tokens while it is active.

    Args:
        batch: Rows of the batch that the model is called with. If there is only one, all tokens belong to it.

    Attributes:
        joined: By length, the kinds in the latest sequence of that length that was concatenated from several kinds.
    """

    def __init__(self, batch: int = 1) -> None:
        super().__init__()
        self.batch = batch
        self.joined: dict[int, Kinds] = {}
        self._known: Any = WeakIdKeyDictionary()

    def mark(self, tensor: torch.Tensor, kind: str) -> None:
        """Note that all tokens of a tensor are of one kind."""
        self._known[tensor] = ((kind, None),)

    def of(self, tensor: torch.Tensor) -> Kinds | None:
        """The kinds of a tensor's tokens; ``None`` if they are not known."""
        return self._known.get(tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in _WRITING:
            self._write(func, (*args, *kwargs.values()))
        if torch.compiler.is_compiling() or not isinstance(result, (torch.Tensor, tuple, list)):
            return result
        if isinstance(result, torch.Size):
            return result
        if func in _JOINING:
            self._join(result, *_pieces(args, kwargs))
            return result
        source = self._source(func, args, kwargs)
        if source is not None:
            kinds = self._known[source]
            for one in [result] if isinstance(result, torch.Tensor) else result:
                is_kept = len(kinds) > 1 or not _loses_order(func, args, source, one)
                if not isinstance(one, torch.Tensor) or one is source:
                    continue
                if self._loses_rows(source, one):
                    self._known[one] = ((MOVED, None),)
                elif is_kept:
                    self._hand_on(kinds, source, one)
        return result

    def _source(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The first argument whose kinds are known; for a product, the argument whose rows the result has."""
        name = getattr(func, "__name__", "")
        if name.startswith(MAKING):
            return None
        if name in _LIKE:
            args, kwargs = args[:1], {}
        if name in _PRODUCTS:
            args, kwargs = [a for a in args if isinstance(a, (torch.Tensor, str))], {}
            args = args[_ROWS_OF.get(name, 0) :][:1]
        known = [each for each in _tensors((*args, *kwargs.values())) if each in self._known]
        # If tokens of other rows are added to tokens in their own rows, the result has the kinds of the latter.
        in_place = (each for each in known if self._known[each] != ((MOVED, None),))
        return next(in_place, known[0] if known else None)

    def _loses_rows(self, source: torch.Tensor, result: torch.Tensor) -> bool:
        """True if a result does not have its source's rows of the batch: some were picked, averaged or repeated."""
        if self.batch == 1 or source.dim() < 2 or source.shape[0] != self.batch:
            return False
        return result.shape[:1] != source.shape[:1] and result.numel() != source.numel()

    def _write(self, func: Callable[..., Any], args: Any) -> None:
        """If tokens of another kind are written into a tensor, the kinds of its tokens are no longer known. If all of a
        new tensor is written in order, it has the kind of what is written.
        """
        target, values = args[0], [each for each in args[1:] if isinstance(each, torch.Tensor)]
        found = self._known.get(values[-1]) if values else None
        if values and target in self._known:
            if found != self._known[target]:
                del self._known[target]
        elif found is not None and len(found) == 1 and values[-1].numel() == target.numel():
            name = getattr(func, "__name__", "")
            if name == "copy_" or (name == "__setitem__" and not any(map(_picks, _listed(args[1:-1])))):
                self._known[target] = found

    def _join(self, result: torch.Tensor, pieces: list[torch.Tensor], dim: int) -> None:
        if not any(piece in self._known for piece in pieces):
            return
        if self.batch > 1 and dim in (0, -result.dim()) and result.shape[0] == self.batch:
            self._known[result] = ((MOVED, None),)
            return
        segments: list[tuple[str, int]] = []
        for piece in pieces:
            size = piece.shape[dim]
            found = self._known.get(piece, ((OTHER, None),))
            found = ((found[0][0], size),) if len(found) == 1 else found
            if sum(length for _, length in found) != size:
                return  # concatenated along another axis than the tokens'
            for kind, length in found:
                if segments and segments[-1][0] == kind:
                    length += segments.pop()[1]
                segments.append((kind, length))
        if len({kind for kind, _ in segments}) == 1:
            self._known[result] = ((segments[0][0], None),)
        else:
            self._known[result] = self.joined[result.shape[dim]] = tuple(segments)

    def _hand_on(self, kinds: Kinds, source: torch.Tensor, result: torch.Tensor) -> None:
        """Note the kinds of a result. If it is a part of a concatenation, its length tells which part."""
        if len(kinds) == 1 or sum(length for _, length in kinds) in result.shape:
            self._known[result] = kinds
            return
        cut = _cut(kinds, source, result)
        if cut:
            self._known[result] = cut if len(cut) > 1 else ((cut[0][0], None),)
            return
        parts = [kind for kind, length in kinds if length in result.shape]
        if len(set(parts)) > 1:
            # If several kinds have this length, the memory decides: a view of the first kind begins where its source
            # begins.
            shares = result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
            is_first = shares and result.storage_offset() == source.storage_offset()
            parts = parts[:1] if is_first else parts[-1:] if shares else []
        if parts:
            self._known[result] = ((parts[0], None),)


def _cut(kinds: Kinds, source: torch.Tensor, result: torch.Tensor) -> Kinds:
    """The kinds in a slice of a concatenated sequence; empty if it is not a slice, or cuts through a kind."""
    count, dims = sum(length or 0 for _, length in kinds), range(source.dim())
    differ = [dim for dim in dims if result.dim() == source.dim() and source.shape[dim] != result.shape[dim]]
    shares = source.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
    if (
        len(differ) != 1
        or source.shape[differ[0]] != count
        or not shares
        or source.stride() != result.stride()
    ):
        return ()
    first = (result.storage_offset() - source.storage_offset()) // source.stride(differ[0])
    last, place, found = first + result.shape[differ[0]], 0, []
    for kind, length in kinds:
        if first <= place and place + (length or 0) <= last:
            found.append((kind, length))
        place += length or 0
    return tuple(found) if sum(length or 0 for _, length in found) == last - first else ()


def _loses_order(func: Callable[..., Any], args: Any, source: torch.Tensor, result: Any) -> bool:
    """True if a result does not have all of its source's tokens in their order, so their positions are lost.

    Feature maps keep their positions: a convolution or a mean over rows and columns shows the same image.
    """
    name = getattr(func, "__name__", "")
    name = name if name.startswith("__") else name.rstrip("_")
    if name in _PICKING or (name == "__getitem__" and any(map(_picks, _listed(args[1:])))):
        return True
    if not isinstance(result, torch.Tensor):
        return False
    if name in _ALONG_ONE_AXIS:
        return source.dim() == 3 and result.shape[-1] != source.shape[-1]
    if name == "pad":
        return source.dim() == 3 and result.shape != source.shape
    if name in _REDUCING:
        return result.dim() < source.dim() and result.shape[-1:] == source.shape[-1:]
    if name in _CUTTING and source.dim() == result.dim() == 3:
        return result.shape[::2] == source.shape[::2] and result.shape[1] < source.shape[1]
    return False


def _picks(index: Any) -> bool:
    """True if an index picks single elements, or has a step."""
    if isinstance(index, slice):
        return index.step not in (None, 1)
    return isinstance(index, list) or (isinstance(index, torch.Tensor) and index.dim() > 0)


def _listed(args: Any) -> Any:
    return args[0] if args and isinstance(args[0], tuple) else args


def _pieces(args: Any, kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
    pieces = list(args[0] if args else kwargs["tensors"])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return pieces, dim


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (one for one in value if isinstance(one, torch.Tensor))
