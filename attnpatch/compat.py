"""Every private name of torch and of its hosts that attnpatch uses, in one place, each with its purpose.

torch may change these in any release. If one is missing, importing this file fails, unless a comment says what happens
instead. Then attnpatch is off as a whole (``hosts/off.py``): nothing fails during a user's forward. ``tests/test_layers.py``
checks that no other file uses such a name, and ``tests/test_without_names.py`` takes away each of them.

The names of transformers, accelerate and torch's compiler, at the end, are looked up on objects that exist already. If
a release lacks one, attnpatch goes on without it, as the comment says.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd import forward_ad
from torch.overrides import (
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
)
from torch.utils import checkpoint
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves, tree_map

from attnpatch.releases.tested import is_at_least

# Contexts that switch off ``__torch_function__``: the first one for tensor subclasses, the second one for modes too.
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
DisableTorchFunction = torch._C.DisableTorchFunction
without_dispatch_modes = _disable_current_modes
# The active function modes (``TorchFunctionMode``) and dispatch modes (``TorchDispatchMode``), innermost last.
function_mode, function_modes, without_function_mode = (
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
)
dispatch_modes, push_dispatch_mode, pop_dispatch_mode = (
    _get_current_dispatch_mode_stack,
    _push_mode,
    _pop_mode,
)
# The state of one non-reentrant checkpoint, and the exception that ends its recomputation early. Where torch has no
# such class, no checkpoint is recognised.
CheckpointFrame: Any = getattr(checkpoint, "_CheckpointFrame", None)
StopRecomputation: Any = getattr(checkpoint, "_StopRecomputationError", None)
# The modes of a selective checkpoint.
SELECTIVE_MODES = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
OpOverload, OpOverloadPacket = torch._ops.OpOverload, torch._ops.OpOverloadPacket

# The operators behind ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in inference, and their steps. If one
# is missing, none is used: these modules then run as natively.
ENCODER_OPERATORS = (
    getattr(torch, "_native_multi_head_attention", None),
    getattr(torch, "_transformer_encoder_layer_fwd", None),
    getattr(torch, "_transform_bias_rescale_qkv", None),
    getattr(torch, "_masked_softmax", None),
    getattr(torch, "_addmm_activation", None),
)
(
    native_multi_head_attention,
    transformer_encoder_layer,
    transform_bias_rescale_qkv,
    masked_softmax,
    addmm_activation,
) = ENCODER_OPERATORS if all(ENCODER_OPERATORS) else (None,) * 5
# Softmax that gives 0 where a row has no key; SDPA's dense math uses it since torch 2.5. Where torch has no such operator,
# none runs.
safe_softmax = getattr(getattr(torch.ops.aten, "_safe_softmax", None), "default", None)
# ``torch.einsum`` without its search for an order of operands.
einsum_in_order = torch._VF.einsum  # type: ignore[attr-defined]
# True if ``torch.bmm`` multiplies narrow matrices into float32 (torch 2.8, on CUDA).
BMM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype")
# The kernels of SDPA, which return the logsumexp beside the result. If one is missing, maps do without its logsumexp.
flash_attention_on_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
flash_attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
efficient_attention = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)
cudnn_attention = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)
KERNELS = (flash_attention_on_cpu, flash_attention, efficient_attention, cudnn_attention)
# Which kernel SDPA would use. If the name is missing, the kernel is not known, and such calls run as natively.
sdp_choice = getattr(torch, "_fused_sdp_choice", None)
UNKNOWN_KERNEL = -1


def accelerator() -> torch.device | None:
    """The accelerator of this machine, or ``None`` if it has none (a build for CUDA may find no device)."""
    module = getattr(torch, "accelerator", None)
    if module is not None:  # since torch 2.6
        return module.current_accelerator() if module.is_available() else None
    kinds = (kind for kind in ("cuda", "xpu", "mps") if getattr(torch, kind).is_available())
    return next((torch.device(kind) for kind in kinds), None)


def mps_longest_buffer() -> int | None:
    """The most bytes of one tensor on MPS; ``None`` where torch does not tell."""
    ask = getattr(torch._C, "_mps_maxBufferLength", None)
    return None if ask is None else ask()


def fused_sdp_choice(*args: Any, **kwargs: Any) -> int:
    """The number of the kernel that SDPA would use for such a call; 0 is dense math. Some devices do not support it."""
    return UNKNOWN_KERNEL if sdp_choice is None else sdp_choice(*args, **kwargs)


# Some functions import torch's compiler at their first call on ``meta``. With torch 2.8, that import fails where torch
# functions are disabled: it asserts that it sees some.
_COMPILER_NEEDS_FUNCTIONS = not is_at_least("torch", "2.9")


@functools.cache
def prepare_meta() -> None:
    """Let torch import what functions on ``meta`` need, before a block in which it cannot."""
    if _COMPILER_NEEDS_FUNCTIONS:
        with torch._C._EnableTorchFunction(), without_dispatch_modes():
            torch.empty(1, device="meta") * 1


@functools.cache
def takes_any_mask() -> bool:
    """Whether torch's fused kernel on the CPU takes a mask whose keys do not lie side by side; torch 2.6 does not."""
    with DisableTorchFunction(), without_dispatch_modes():
        query, mask = torch.empty(1, 1, 16, 8, device="cpu"), torch.empty(16, 16, device="cpu")
        return fused_sdp_choice(query, query, query, mask.T) == fused_sdp_choice(query, query, query, mask)


_transform = torch._C._functorch.peek_interpreter_stack
# Whether a tensor is a functorch transform's wrapper around another tensor, and the tensor inside.
is_wrapped, unwrapped = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.get_unwrapped
# Whether a tensor is several gradients at once (``is_grads_batched``).
is_batched_gradient = torch._C._functorch.is_legacy_batchedtensor
# The number of forward-mode differentiations that are active, less 1; it changes.
assert isinstance(forward_ad._current_level, int)
_is_tracing, _dispatch_mode = torch._C._is_tracing, torch._C._get_dispatch_mode
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_graph_task = torch._C._current_graph_task_id
# Whether the running backward pass has ``retain_graph=True``, so that its nodes keep their saved tensors.
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_number_of_dispatch_modes = torch._C._len_torch_dispatch_stack
# Makes any access to the address of this tensor's memory raise an error.
throw_on_data_ptr = torch._C._set_throw_on_mutable_data_ptr
_overlap = torch._debug_has_internal_overlap
# The storage that a weak reference points to, or ``None`` if it was freed.
storage_behind = torch.UntypedStorage._new_with_weak_ptr
# A view that reads the tensor's elements negated (the negative bit is set).
neg_view = torch._neg_view


def is_transformed() -> bool:
    """Whether ``vmap``, ``torch.func.grad`` or another functorch transform is active; tensors are then wrappers."""
    return _transform() is not None


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` or ``make_fx`` records what runs."""
    return _is_tracing() or _dispatch_mode(_PROXY) is not None


def is_in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return _graph_task() != -1


# torch 2.6 and older do not have the name; see ``note_saved_tensor_hooks``.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_noted_hooks: Callable[[], list[Any]] = list


def saved_tensor_hooks() -> Any:
    """The active saved-tensor hooks of autograd (checkpoints and offloading set them), or ``None``."""
    if _top_hooks is not None:
        return _top_hooks(False)
    noted = _noted_hooks()
    return noted[-1] if noted else None


def note_saved_tensor_hooks(noted: Callable[[], list[Any]]) -> None:
    """Note the hooks of each thread where torch does not tell which are active (until 2.6); elsewhere do nothing.

    Args:
        noted: Returns this thread's list of hooks, innermost last. torch's two functions that begin and end hooks are
            replaced by ones that also keep this list.
    """
    global _noted_hooks
    if _top_hooks is not None:
        return
    _noted_hooks = noted
    begin = torch._C._autograd._push_saved_tensors_default_hooks
    end = torch._C._autograd._pop_saved_tensors_default_hooks

    def push(pack: Any, unpack: Any) -> None:
        begin(pack, unpack)
        noted().append((pack, unpack))

    def pop() -> None:
        end()
        if noted():  # they may have begun before attnpatch was imported
            noted().pop()

    torch._C._autograd._push_saved_tensors_default_hooks = push
    torch._C._autograd._pop_saved_tensors_default_hooks = pop


def has_dispatch_modes() -> bool:
    """Whether any ``TorchDispatchMode`` is active."""
    return bool(_number_of_dispatch_modes())


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor are known to share memory (an expanded one)."""
    return _overlap(tensor) == 1


def has_tile_registers(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a narrow dtype in tile registers (AMX); True where torch cannot say."""
    of_bfloat16 = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    of_float16 = getattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)
    return (of_bfloat16 if dtype == torch.bfloat16 else of_float16)()


# accelerate: the hook of a module, and the module's original forward. If a release has other names, a module counts as
# unchanged by accelerate: inputs are not moved to its device, and its current forward is used.
ACCELERATE_HOOK, ACCELERATE_FORWARD = "_hf_hook", "_old_forward"
# ``torch.compile`` of a module: the module inside. If the name is missing, the compiled module is used as it is.
COMPILED_MODULE = "_orig_mod"
# ``torch.compile`` of a function: the original function. If the name is missing, a compiled forward is called as it is.
COMPILED_FUNCTION = "_torchdynamo_orig_callable"
# ``nn.Module``: what a call runs if it is set (``Module.compile`` sets it), and what it runs otherwise. If the names
# are missing, ``ATTNPATCH=1`` patches only models of transformers and diffusers, and says so. The same holds without
# the interpreter's lock, because ``nn.Module`` reads the first name twice and it may be set in between.
COMPILED_CALL, PLAIN_CALL = "_compiled_call_impl", "_call_impl"


def has_call_attribute() -> bool:
    """Whether a module's call can be seen by the attribute that ``Module.compile`` sets."""
    has_names = all(hasattr(torch.nn.Module, name) for name in (COMPILED_CALL, PLAIN_CALL))
    return has_names and getattr(sys, "_is_gil_enabled", lambda: True)()


# The schema of an operator. If the name is missing, the operator counts as one that writes to no argument.
OPERATOR_SCHEMA = "_schema"
# transformers: the packed keys of a quantized cache's layer, and a pending reordering of a cache by beams. If they are
# missing, the cache's content is unknown, and calls that cut or reordered it are left out of maps.
QUANTIZED_KEYS, PENDING_BEAMS = "_quantized_keys", "_pending_beam_idx"
# Python: the function that a thread runs. If it is missing, a pool's worker that a captured thread starts counts as its own.
TARGET_OF_THREAD = "_target"
# transformers: what collects attention weights. Since 5.2 a context variable names what is collected, by a forward
# hook; from 4.54 to 5.1 it is a function in the place of a module's forward. If they are missing, the weights are those
# that the model's own code returns: none under SDPA.
OUTPUT_COLLECTOR, OUTPUT_HOOK, OUTPUT_WRAPPER = (
    "_active_collector",
    "output_capturing_hook",
    "wrapped_forward",
)
# transformers: the table of mask functions by attention implementation, and the functions that masks by rows call.
MASK_TABLE, MASK_FUNCTIONS = "ALL_MASK_ATTENTION_FUNCTIONS", ("sdpa_mask", "eager_mask")
# transformers: the argument with the positions of a mask's rows, until 5.3. If it is missing and no number of rows is
# given either, masks are whole.
MASK_POSITIONS = "cache_position"
# xFormers: attributes of its bias classes (the second name of the tensor: until 0.0.30).
XFORMERS_WINDOW, XFORMERS_BIAS, XFORMERS_OLD_BIAS = "_window_size", "_bias", "_subtensor"
# transformers: the table of attention functions by implementation. diffusers: the registry of attention back ends, and its
# table. If they are missing, kernels that are called through them are seen only if their packages' own functions are.
ATTENTION_TABLE, BACKEND_REGISTRY, BACKENDS = (
    "ALL_ATTENTION_FUNCTIONS",
    "_AttentionBackendRegistry",
    "_backends",
)


def chosen_attention(module: torch.nn.Module) -> Any:
    """The attention implementation that a module of transformers runs now; ``None`` if it does not tell.

    Without it, a call after a change of implementation may run once as the calls before it did.
    """
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables in a function's closure, by name; empty if it has none."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    found = {}
    for name, cell in zip(code.co_freevars if code is not None else (), cells, strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue  # not set yet
    return found


# ``torch.library.custom_op``: the operator of a definition. If the name is missing, calls of the definition are seen,
# and calls through ``torch.ops`` are not.
CUSTOM_OPERATOR = "_opoverload"

__all__ = [
    "DataDependentOutputException", "DynamicOutputShapeException", "FakeTensor", "FakeTensorMode", "TorchDispatchMode",
    "UnsupportedOperatorException", "is_traceable_wrapper_subclass",
    "temporarily_clear_interpreter_stack", "tree_leaves", "tree_map",
]  # fmt: skip
