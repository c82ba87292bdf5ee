"""DeferredRows: a score matrix that was asked for and not computed."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from attnpatch.memory import Room
from attnpatch.policy import Policy
from attnpatch.rows import guard
from attnpatch.rows.autograd import checkpoints, edges
from attnpatch.rows.deferred import sharing
from attnpatch.rows.evaluate import untiled
from attnpatch.rows.evaluate.tiled import Look, Replay
from attnpatch.rows.graph.axes import Tile
from attnpatch.rows.graph.nodes import Node, View, depth_of, map_structure, tensors_of
from attnpatch.rows.oom import Attempts, is_out_of_memory
from attnpatch.rows.op_table import called
from attnpatch.rows.provenance.dimensions import Layout
from attnpatch.rows.provenance.sources import Sources

# The keys that an attention is open to; see ``Observer.begin``.
Opened = Callable[[int | None], torch.Tensor | None]


class Tally(Protocol):
    """Who counts what happened at a site."""

    def count(self, what: str) -> None: ...

    def materialised(self, operation: str) -> None: ...

    def not_fused(self, step: str) -> None:
        """A recipe was kept from the fused kernel by a step (``Policy.fuse``)."""

    def summed(self, by: str) -> None:
        """Probabilities of a fused call were summed for a capture, and by what."""

    def left_native(self, reason: str, *numbers: int) -> None:
        """A rule left something native: its name (``patching.counters.REASONS``) and the numbers it went by."""

    def made(self, size: int) -> None:
        """A tensor of query x key elements was made, or a step's rows of one: its bytes."""


@dataclasses.dataclass(frozen=True)
class Passing:
    """Where a tile of probabilities belongs.

    Attributes:
        leads: int64 ``[leads]``, which of the flattened batch x heads the tile holds.
        rows: First and one past the last of its query rows.
        lead_count: How many leads the call has in all.
        q_len, kv_len: Query rows and keys of the call.
        weights: Float ``[leads, rows]``, a factor that each row still has to be multiplied by; ``None``: 1.
        positions: int64, the query rows of the tile where they are no neighbours; ``rows`` counts among those shown.
    """

    leads: torch.Tensor
    rows: tuple[int, int]
    lead_count: int
    q_len: int
    kv_len: int
    weights: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class Observer(Protocol):
    """Who looks at attention probabilities while they pass by.

    Attributes:
        is_of_gradient: Whether to show each probability times its gradient instead, in the backward pass.
    """

    is_of_gradient: bool

    def observe(self, probabilities: torch.Tensor, passing: Passing) -> None:
        """One tile: ``[leads, rows, kv_len]``, after softmax, before dropout.

        Keys that no row of the tile may look at can be left out at the end.
        """

    def take(self, call: dict[str, Any], lse: torch.Tensor, workspace: int | None) -> str | None:
        """See a whole SDPA call at once, given its arguments by name and ``[batch, heads, q_len]`` logsumexp.

        ``workspace``: bytes that may be held meanwhile; ``None``: as many as it takes.

        Returns:
            ``None`` if nothing of it needs to be shown any more; otherwise why, in a few words.
        """

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> torch.Tensor | None:
        """Query rows that need to be shown, int64, ascending; ``None``: all. More may be."""

    def begin(self, layout: Layout, opened: Opened) -> bool:
        """An attention of the site is about to be shown, or would be; whether it is to be.

        Args:
            layout: What its dimensions are.
            opened: From the place of the first query among the keys (``None``: they are others' tokens) to bool
                ``[batch, kv_len]``, the keys that attention is open to; ``None``: to all; empty: that is not known.
        """

    def restart(self) -> None:
        """Forget the tiles of this attention: it ran out of memory and begins again."""

    def end(self) -> None:
        """All tiles of this attention were shown."""

    def finish(self) -> None:
        """The call has ended."""


@dataclasses.dataclass
class SiteCall:
    """What the doors know of the call they serve.

    Attributes:
        policy: The rule.
        room: What is known of free memory.
        tally: Counts.
        observer: Looks at probabilities, or ``None``.
        decisions: What was decided for calls of a size. Kept by the site between calls.
        again: Whether this is a checkpointed forward pass running again: it must take the way it took before, or
            autograd finds other tensors saved.
        attempts: What ran out of memory on the way to the result that is being computed.
        is_of_masks: Whether it stands for the call of a model, whose masks it defers.
        weights: Where the probabilities of its attention are left, deferred, if somebody asked for them.
        sources: Where its tensors come from, if somebody looks.
    """

    policy: Policy
    room: Room
    tally: Tally
    observer: Observer | None = None
    decisions: dict[tuple[int, int], bool] = dataclasses.field(default_factory=dict)
    again: bool = False
    attempts: Attempts = dataclasses.field(default_factory=Attempts)
    is_of_masks: bool = False
    weights: list[torch.Tensor] | None = None
    sources: Sources | None = None

    def by_rows(self, q_len: int, temporaries: int, device: torch.device) -> bool:
        """Whether a native call with so many query rows and so many bytes of temporaries goes by rows."""
        if self.policy.mode != "auto":
            return self.policy.mode == "always"
        if q_len <= self.policy.min_tokens:
            self.tally.left_native("short", self.policy.min_tokens, q_len)
            return False
        known, size = self._known(q_len, temporaries)
        if not (self.again and size in known):
            short = self.room.is_short(device)
            known[size] = short or self.policy.by_rows(q_len, temporaries, self.room.free(device))
        if not known[size]:
            self.tally.left_native("memory", self.room.free(device), temporaries)
        return known[size]

    def _known(self, q_len: int, temporaries: int) -> tuple[dict[Any, bool], Any]:
        """Where decisions are kept, and under which name those for calls of this size."""
        known = checkpoints.decisions(self.decisions)
        size = (q_len, temporaries)
        return known, size if known is self.decisions else (id(self.decisions), size)

    def went_by_rows(self, q_len: int, temporaries: int) -> bool:
        """Whether this is a second run of a call that ran out of memory the first time."""
        known, size = self._known(q_len, temporaries)
        return self.again and known.get(size, False)

    @property
    def answers_shortage(self) -> bool:
        """Whether a native call that runs out of memory is answered by rows."""
        return self.policy.retry_on_oom and self.policy.mode == "auto"

    def is_answered(self, error: RuntimeError) -> bool:
        """Whether an error of a native call is answered by rows instead of being raised."""
        return self.answers_shortage and is_out_of_memory(error)

    def ran_out(self, error: RuntimeError, device: torch.device) -> None:
        """A native call ran out of memory and is answered by rows."""
        self.attempts.failed(error, "the native call")
        self.room.ran_out(device)
        self.retried()

    def remember(self, q_len: int, temporaries: int, by_rows: bool = True) -> None:
        """Keep how a call of this size went, for a checkpointed forward pass that runs again."""
        known, size = self._known(q_len, temporaries)
        known[size] = by_rows

    def replay(self, node: Node, watched: tuple[Node, Look] | None = None) -> torch.Tensor:
        """Compute a recipe by rows, under the policy of the site."""
        # On CPU a step is a few MiB, whatever is free.
        free = None if node.device.type == "cpu" else self.room.free(node.device)
        restart = self.observer.restart if watched and self.observer is not None else _nothing
        attempts, self.attempts = self.attempts, Attempts()
        return Replay(
            node, self.policy, watched, self.retried, restart, free, attempts, self.tally.made, self.failed
        )()

    def of_gradients(self, twin: Node) -> Replay:
        """What computes the gradients of a deferred tensor."""
        return Replay(
            twin, self.policy, on_retry=self.retried, on_size=self.tally.made, on_failure=self.failed
        )

    def failed(self, what: str, error: Exception) -> None:
        """Our own code failed, and the host's was used."""
        guard.failed(what, error, self.tally)

    def retried(self) -> None:
        self.tally.count("retried")


def _nothing() -> None:
    pass


class Handle:
    """What a DeferredRows stands for: a recipe, or the tensor it was turned into.

    Attributes:
        node: The recipe.
        call: The site call it came from.
        edge: The history it was given; another one means that somebody below Python's reach has made something of it.
        checkpoint: The one in which it was made, which saves its history.
        values: All of it, without history, once somebody needed it.
        written: The tensor that stands for it, history included, once it was written to in place.
        memory: What it shares with views of it, or with what it is a view of.
        path: Steps from the memory as a whole to this tensor.
        pending: The deferred tensors of the thread it was made in.
    """

    def __init__(
        self, node: Node, call: SiteCall, memory: sharing.Memory | None = None, path: tuple[Node, ...] = ()
    ) -> None:
        self.node, self.call = node, call
        self.edge: Any = None
        self.checkpoint: weakref.ref[Any] | None = None
        self.values: torch.Tensor | None = None
        self.written: torch.Tensor | None = None
        # The tensor with the deferred one's history, that history, and the one it began with itself.
        self._bridged: tuple[torch.Tensor, Any, Any] | None = None
        self._adopted: Any = None  # the history of ``written`` that its own has gone on with
        self._has_adopted = False
        self._tensor: weakref.ref[DeferredRows] | None = None
        self.memory = sharing.Memory(node) if memory is None else memory
        self.memory.members.add(self)
        self.path = path
        self.pending = _thread.pending
        self.pending.add(self)

    def belongs_to(self, tensor: DeferredRows) -> None:
        """Say which Python object carries its history."""
        self._tensor = weakref.ref(tensor)

    @property
    def tensor(self) -> DeferredRows | None:
        """That object, while it is alive."""
        return None if self._tensor is None else self._tensor()

    def forget(self) -> None:
        """What was computed is no longer what the recipe says."""
        self.values = self._bridged = None
        if self.written is None:
            self.pending.add(self)

    @property
    def has_values(self) -> bool:
        return self.values is not None or self.written is not None

    @property
    def is_computed(self) -> bool:
        ask, tally = checkpoints.is_to_be_pending, self.call.tally
        if self.written is None and guard.attempted(ask, self, name="a checkpoint", tally=tally):
            self.forget()
        return self.has_values

    def materialise(self, operation: str) -> torch.Tensor:
        """The whole tensor, computed by rows; ``operation`` is what asked for it.

        With the history that the deferred tensor has, where gradients are recorded now.
        """
        if not self.is_computed and (self.node.children or self.node.stands_for_memory):
            self.call.tally.materialised(operation)
        return self.reduced()

    def reduced(self) -> torch.Tensor:
        """The tensor, where it has no keys any more: as small as an output, and not counted as a whole matrix."""
        _thread.real.add(self)
        if self.written is not None:
            tensor = self.tensor
            return (
                self.written if tensor is None or not is_foreign(tensor) else self._with_history(self.written)
            )
        if self.values is None:
            # What is read in inference mode only now may be written to, or need gradients, later.
            is_read = torch.is_inference_mode_enabled() and not _is_inference(self.tensor)
            mode = torch.inference_mode(False) if is_read else contextlib.nullcontext()
            with torch.no_grad(), mode, _untransformed():
                self._compute()
        tensor = self.tensor
        if tensor is None or not torch.is_grad_enabled() or not has_history(tensor):
            return self.values
        return self._with_history(self.values)

    def _with_history(self, values: torch.Tensor) -> torch.Tensor:
        tensor = self.tensor
        if self._bridged is None or self._bridged[1] is not edges.history(tensor):
            with _untransformed():
                found = edges.bridged(tensor, values)
            self._bridged = found, edges.history(tensor), found.grad_fn
        return self._bridged[0]

    def _compute(self) -> None:
        try:
            sharing.compute(self)
        except Exception as error:
            if guard.passes(error):
                raise
            self.values = untiled.evaluated(self.node)
            self.call.failed("the computation of scores by rows", error)
            self.pending.discard(self)

    def stands_for(self, value: torch.Tensor) -> None:
        """From now on the computed tensor alone stands for it; its history goes on to the one that there is."""
        self.written, self._adopted = value, value.grad_fn
        self.pending.discard(self)
        _thread.real.add(self)

    def is_written(self, value: torch.Tensor) -> None:
        """The computed tensor was written to in place: it alone stands for the result, with its history."""
        has_another = value.grad_fn is not self._begun_with(value)
        self.stands_for(value)
        tensor = self.tensor
        if tensor is not None and has_another and value.requires_grad and torch.is_grad_enabled():
            edges.adopt(tensor, value)
            self.edge, self._has_adopted = edges.history(tensor), True
            with torch._C.DisableTorchFunctionSubclass():
                retains = tensor.retains_grad
            if retains:
                value.retain_grad()

    def _begun_with(self, value: torch.Tensor) -> Any:
        """The history that a tensor which stands for it had when it began to, or when this one's last went on with it."""
        if value is self.written:
            return self._adopted
        return self._bridged[2] if self._bridged is not None and value is self._bridged[0] else None

    def follow(self) -> None:
        """Go on with the history of the tensor that stands for it, if that has another one since: a view was written to."""
        tensor, value = self.tensor, self.values
        if tensor is None:
            return
        if self._bridged is not None and self._bridged[1] is edges.history(tensor):
            value = self._bridged[0]
        elif _has_other_history(tensor):
            return
        elif self.written is not None:
            value = self.written
        if value is not None and torch.is_grad_enabled() and value.grad_fn is not self._begun_with(value):
            self.is_written(value)

    @property
    def passes_by(self) -> torch.Tensor | None:
        """What it was written to as, if gradients pass by that on their way to its history, and by no tensor of its own.

        One that was written to without gradients recorded leads to the history that there was.
        """
        return self.written if self._has_adopted else None

    def is_shared(self) -> bool:
        return bool(self.memory.others(self))

    def settle_family(self, operation: str) -> None:
        """Turn all views of one matrix into views of one tensor, so that a write to one is seen by all."""
        if self.memory.whole is None:
            self.call.tally.materialised(operation)
        sharing.settle(self)

    def preserve(self, storage: int) -> None:
        """Keep the present values of what the recipe reads from a storage that is about to be written to."""
        for leaf in tensors_of(self.node):
            if leaf.tensor is not None and edges.memory_of(leaf.tensor) == storage:
                leaf.preserve()


class _Thread(threading.local):
    """Deferred tensors of this thread: another one neither waits for them nor writes to what they read."""

    def __init__(self) -> None:
        self.pending: weakref.WeakSet[Handle] = weakref.WeakSet()
        # For these a real tensor stands, which may be written to as another one's.
        self.real: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.site: SiteCall | None = None


_thread = _Thread()


def _untransformed() -> contextlib.AbstractContextManager[Any]:
    """Outside of ``torch.func``'s transforms: what is read in one was made before it."""
    is_inside = torch._C._functorch.peek_interpreter_stack() is not None
    return temporarily_clear_interpreter_stack() if is_inside else contextlib.nullcontext()


def pending() -> bool:
    """Whether some deferred tensor of this thread is alive and not yet computed."""
    return bool(_thread.pending)


def is_watching_writes() -> bool:
    """Whether something of this thread still reads tensors that may be overwritten, or stands for one."""
    return bool(_thread.pending) or bool(_thread.real) or edges.are_kept()


def before_write(tensor: torch.Tensor) -> None:
    """Let recipes keep the present values of a tensor that is about to be overwritten.

    The copy is of a query, a key or a mask: small beside the scores that need not be computed for it.
    """
    if is_watching_writes() and not isinstance(tensor, DeferredRows):
        storage = edges.memory_of(tensor)
        edges.before_write(storage)
        for handle in list(_thread.pending):
            handle.preserve(storage)


def after_write() -> None:
    """Let deferred tensors whose memory may have been written to as another tensor's have the history it has now."""
    for handle in list(_thread.real):
        handle.follow()


def secure_escaped() -> None:
    """Called when a site is left: what is still deferred now outlives it."""
    for handle in list(_thread.pending):
        for leaf in tensors_of(handle.node):
            leaf.secure()


# What torch says to code outside of it that asks a deferred tensor for its address.
_NO_MEMORY = ("Cannot access data pointer", "its data is not allocated")


def note_no_memory(error: Exception) -> None:
    """Say in the notes of an error that it may be of scores that were handed to code outside torch."""
    if any(words in str(error) for words in _NO_MEMORY):
        error.add_note(
            "attnpatch: scores by rows have no memory. If code outside torch (an extension in C++, DLPack) was handed "
            "them, leave this module out (sites=[...] of apply names the others), or use mode='never'."
        )


def left() -> None:
    """Called when a watch ends: nothing notices later writes to what deferred tensors read."""
    if pending():
        secure_escaped()


# Answered from the wrapper itself, without computing anything.
_ATTRIBUTES = frozenset(
    "shape dtype device layout requires_grad ndim is_cuda is_cpu is_mps is_xpu is_meta is_sparse is_quantized "
    "is_nested is_leaf names itemsize nbytes is_mkldnn is_vulkan is_ipu is_maia is_mtia is_xla is_sparse_csr "
    "_backward_hooks _post_accumulate_grad_hooks retains_grad name grad output_nr _version".split()
)
# What is of the tensor that stands for it since it was written to in place.
_OF_HISTORY = frozenset(["grad", "retains_grad"])
# Steps of a recipe before it is computed: an iteration (Sinkhorn's) goes on and on, and Python's stack does not.
DEEPEST = 100
# Who calls these asks for the gradient of the deferred tensor itself.
_OBSERVING = frozenset(["register_hook", "retain_grad", "register_post_accumulate_grad_hook"])
_METHODS = frozenset(
    "size dim ndimension numel nelement element_size is_floating_point is_complex is_signed get_device stride "
    "is_contiguous __len__ is_inference storage_offset is_same_size __hash__ requires_grad_".split()
)


# What a write may change (``unsqueeze_``), and what the wrapper does not know.
_GEOMETRY = frozenset(
    "shape size dim ndim ndimension numel nelement stride is_contiguous storage_offset __len__".split()
)


class DeferredRows(torch.Tensor):
    """A tensor with shape, dtype and device but no storage, and a recipe that can compute any of its rows.

    Row-wise operations on it extend the recipe, a product over its keys replays it some rows at a time, and any
    other operation computes all of it first: slower and larger, never wrong.
    """

    handle: Handle

    @staticmethod
    def __new__(cls, handle: Handle) -> DeferredRows:
        node = handle.node
        self = torch.Tensor._make_wrapper_subclass(cls, node.shape, dtype=node.dtype, device=node.device)
        # Who takes its address (an extension in C++, a DLPack capsule) gets an error, and no memory that is not there.
        torch._C._set_throw_on_mutable_data_ptr(self)
        self.handle = handle
        handle.belongs_to(self)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        return guard.guarded(
            dispatch, (func, args, kwargs), lambda: natively(func, args, kwargs), name, _tally(args, kwargs)
        )

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The safety net below everything that Python can intercept."""
        kwargs = kwargs or {}
        # No mode is switched off here as it is inside __torch_function__: a replay would be deferred again.
        # Autograd has done its part above already: what comes of this gets its history from there.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return guard.guarded(
                _below,
                (func, args, kwargs),
                lambda: natively(func, args, kwargs),
                str(func),
                _tally(args, kwargs),
            )

    def as_subclass(self, cls: type[torch.Tensor]) -> torch.Tensor:  # torch does not ask __torch_function__
        with torch._C.DisableTorchFunction():
            real = self.handle.materialise("as_subclass")
        return real.as_subclass(cls)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        handle = self.handle
        if handle.is_computed:
            return repr(handle.reduced())
        return f"DeferredRows(shape={tuple(handle.node.shape)}, dtype={handle.node.dtype}, computed by rows when used)"


def _below(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    from attnpatch.rows import dispatch as rowwise  # as in `dispatch`

    result = rowwise.below(func, args, kwargs)
    if result is not NotImplemented:
        return result
    return guard.native(func, settle(args, str(func)), settle(kwargs, str(func)))


def _tally(args: Any, kwargs: dict[str, Any]) -> Tally | None:
    """Who counts what happens to the first deferred tensor among some arguments."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, DeferredRows):
            return value.handle.call.tally
        if isinstance(value, (list, tuple)) and (found := _tally(value, {})) is not None:
            return found
    return None


def natively(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The host's own call on computed tensors, where ours has failed: with as little of ours as there can be."""
    name = getattr(func, "__name__", str(func))
    target = args[0] if args and isinstance(args[0], DeferredRows) else None
    # A write under no_grad leaves the history as it is.
    with torch.set_grad_enabled(torch.is_grad_enabled() or (target is not None and has_history(target))):
        real = settle(target, name)
    args = (real, *settle(tuple(args[1:]), name)) if target is not None else settle(tuple(args), name)
    result = func(*args, **settle(kwargs, name))
    if target is None or not (result is real or name in ("__setitem__", "__set__")):
        return result
    target.handle.written = real
    guard.attempted(target.handle.is_written, real, name=name, tally=target.handle.call.tally)
    return None if result is None else target


def settle(value: Any, operation: str) -> Any:
    """``value`` with every deferred tensor in it computed."""
    if isinstance(value, DeferredRows):
        return value.handle.materialise(operation)
    if isinstance(value, (list, tuple)):
        items = [settle(item, operation) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: settle(item, operation) for key, item in value.items()}
    return value


def dispatch_in(site: SiteCall, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``dispatch`` inside the call of a site."""
    outer, _thread.site = _thread.site, site
    try:
        return dispatch(func, args, kwargs)
    finally:
        _thread.site = outer


def site_of(tensors: Sequence[torch.Tensor]) -> SiteCall:
    """Whose a step of some deferred tensors is: the site's that runs if one of them is its own, else one's that has them.

    A mask is many sites'; a bias may be a layer's that has handed it on to the next (WavLM).
    """
    calls = [tensor.handle.call for tensor in tensors if isinstance(tensor, DeferredRows)]
    own = [call for call in calls if call is _thread.site] or [call for call in calls if not call.is_of_masks]
    return (own or calls)[0]


def running_site(otherwise: SiteCall) -> SiteCall:
    """The site whose call goes on."""
    return otherwise if _thread.site is None else _thread.site


def dispatch(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A torch function with a DeferredRows among its arguments."""
    from attnpatch.rows import dispatch as rowwise

    name = called(func)
    is_attribute = getattr(func, "__name__", "") in ("__get__", "__set__")
    if name in _GEOMETRY and isinstance(args[0], DeferredRows):
        found = sharing.geometry(args[0].handle, name, func, args[1:], kwargs)
        if found is not None:
            return found
    if is_attribute:
        if name in _OF_HISTORY and (passed := _passed_by(args[0])) is not args[0]:
            return guard.native(func, (passed, *args[1:]), kwargs)
        if name == "grad_fn":
            return _edge_of(args[0])
        if name in _ATTRIBUTES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
    elif name in _METHODS:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    elif name in _OBSERVING and isinstance(args[0], DeferredRows):
        return _observed(func, args, kwargs)
    elif func in _INPUTS:
        return _differentiated(func, args, kwargs)
    elif name == "__repr__" and isinstance(args[0], DeferredRows):
        return DeferredRows.__repr__(args[0])
    result = rowwise.apply(name, func, args, kwargs)
    # Not an error of the step: that is done, and must not be done again.
    guard.attempted(_bound, result, name, name="the depth of a recipe", tally=_tally((result,), {}))
    return result


def _bound(result: Any, operation: str) -> None:
    if is_pending(result) and depth_of(result.handle.node) > DEEPEST:
        result.handle.materialise(f"{operation} after {DEEPEST} steps")


def _observed(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A hook on a deferred tensor, or ``retain_grad``: somebody asks for its own gradient."""
    target = args[0]
    passed = _passed_by(target)
    if passed is not target:
        return guard.native(func, (passed, *args[1:]), kwargs)
    _observe(target)
    with torch._C.DisableTorchFunctionSubclass():
        return guard.native(func, args, kwargs)


def _edge_of(tensor: Any) -> Any:
    """``grad_fn``: who reads it may hook it, or ask for its gradient."""
    passed = _passed_by(tensor)
    if passed is tensor:
        _observe(tensor)
    return edges.history(passed)


def _passed_by(tensor: Any) -> Any:
    """What gradients pass by on their way to a deferred tensor's history: itself, or what it was written to as."""
    if not isinstance(tensor, DeferredRows) or _has_other_history(tensor):
        return tensor
    passed = tensor.handle.passes_by
    return tensor if passed is None else passed


def _observe(tensor: DeferredRows) -> None:
    node = tensor.handle.node
    if node.marks is None:
        return
    node.marks.is_observed = True
    if node.anchor is None and tensor.handle.edge is edges.history(tensor):
        with torch.enable_grad():
            node.anchor = edges.bridged(tensor, _nothing_like(tensor))


def _nothing_like(tensor: DeferredRows) -> torch.Tensor:
    """What has the shape of a deferred tensor, and one element."""
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


# Where each of autograd's functions takes what gradients are for.
_INPUTS = {torch.autograd.grad: 1, torch.autograd.backward: 5, torch.Tensor.backward: 4}


def _differentiated(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """``backward`` and ``grad``: they need the history of a deferred tensor, and not what is in it.

    Nothing deferred is among the arguments then: the call runs checkpointed layers again, which have to defer as before.
    """

    def source(value: Any) -> Any:
        if not is_pending(value) or not has_history(value):
            return settle(value, func.__name__)
        return edges.bridged(value, _nothing_like(value))

    def target(value: Any) -> Any:
        if not isinstance(value, DeferredRows):
            return value
        passed = _passed_by(value)
        if passed is not value:
            return passed
        _observe(value)
        with torch._C.DisableTorchFunctionSubclass():
            return torch.autograd.graph.get_gradient_edge(value)

    place = _INPUTS[func]
    with torch.enable_grad():
        args = tuple(
            map_structure(value, source if i == 0 else target if i == place else lambda v: settle(v, "grad"))
            for i, value in enumerate(args)
        )
        ways = {"outputs": source, "tensors": source, "inputs": target}
        kwargs = {
            key: map_structure(value, ways.get(key, lambda v: settle(v, "grad")))
            for key, value in kwargs.items()
        }
    return guard.native(func, args, kwargs)


def has_history(tensor: DeferredRows) -> bool:
    """Whether gradients go to a deferred tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.requires_grad


def _is_inference(tensor: DeferredRows | None) -> bool:
    if tensor is None:
        return True
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.is_inference()


def is_foreign(tensor: DeferredRows) -> bool:
    """Whether its history is not its recipe's: it came out of a function of somebody's own, or is a leaf of a graph."""
    if not torch.is_grad_enabled() or not has_history(tensor):
        return False
    return _has_other_history(tensor) or _is_of_outer_checkpoint(tensor.handle)


def _has_other_history(tensor: DeferredRows) -> bool:
    if not has_history(tensor):
        return False
    return tensor.handle.edge is None or edges.history(tensor) is not tensor.handle.edge


def _is_of_outer_checkpoint(handle: Handle) -> bool:
    """Whether it goes from one checkpoint into another: when they run again, what arrives has a history of torch's."""
    if handle.checkpoint is None:
        return False
    here = checkpoints.current()
    return here is not None and here is not handle.checkpoint()


def is_pending(value: Any) -> bool:
    return isinstance(value, DeferredRows) and not value.handle.is_computed


def computed(value: Any, operation: str = "a function with a backward pass of its own") -> Any:
    """``value``, or the tensor behind it if it is a deferred one that was computed already.

    So is one whose history is not its recipe's: gradients of what is made of it go to that history.
    """
    if isinstance(value, DeferredRows):
        if value.handle.is_computed:
            return value.handle.reduced()
        if is_foreign(value):
            return value.handle.materialise(operation)
    return value


def wrap(
    node: Node, call: SiteCall, memory: sharing.Memory | None = None, path: tuple[Node, ...] = ()
) -> DeferredRows:
    """A deferred tensor for a recipe, with the history that the tensor would have.

    Args:
        node: The recipe.
        call: Where it belongs.
        memory: What it shares memory with, if it is a view.
        path: The steps from there to the recipe.
    """
    if node.needs_grad is not None:
        node = View(node, node.dims)  # another tensor's recipe
    tensor = DeferredRows(Handle(node, call, memory, path))
    tensor.handle.edge = edges.connect(tensor, node, call.of_gradients)
    frame = checkpoints.current()
    tensor.handle.checkpoint = None if frame is None else weakref.ref(frame)
    return tensor


def detached(tensor: DeferredRows) -> None:
    """Take its history from a deferred tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        tensor.detach_()
    tensor.handle.edge = None


def goes_on_as(target: DeferredRows, result: DeferredRows) -> DeferredRows:
    """A step in place: the same Python object stands for the result."""
    handle = target.handle
    if result.handle.node.stops_gradient and has_history(target):
        detached(target)
    elif has_history(result) or (has_history(target) and torch.is_grad_enabled()):
        edges.adopt(target, result)
    handle.node = result.handle.node
    if not handle.path:
        handle.memory.recipe, handle.memory.whole = handle.node, None
    handle.node.carrier = weakref.ref(target)
    handle.edge = edges.history(target)
    return target


__all__ = ["DeferredRows", "Handle", "Observer", "SiteCall", "Tally", "Tile", "dispatch", "wrap"]
