"""Out of memory: a native call that fails is answered by rows, smaller and smaller, and the answer is right.

Errors are injected below torch's own operators, at an allocation inside an attention module. Everything else is real.
"""

import contextlib

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnpatch
from attnpatch.patching import patch as patching

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 17.50 GB, max allowed: 18.13 GB).")


class Shortage(TorchDispatchMode):
    """Lets allocations inside attention modules fail.

    Args:
        least: Bytes from which on an allocation counts.
        at: Which one fails, once, counted from 1; 0: none.
        most: Bytes above which every allocation fails.
        error: What is raised.
        only: Name of the operator whose allocations count.
    """

    def __init__(self, least=0, at=0, most=None, error=CUDA, only=""):
        super().__init__()
        self.least, self.at, self.most, self.error, self.only = least, at, most, error, only
        self.seen, self.largest, self.failed = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if patching._thread.mode is None or self.only not in str(func):
            return result
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.allocated(tensor.untyped_storage().nbytes(), str(func))
        return result

    def allocated(self, size, name):
        self.largest = max(self.largest, size)
        self.seen += size >= self.least
        if (size >= self.least and self.seen == self.at) or (self.most is not None and size > self.most):
            self.failed.append(name)
            # A fresh one each time, as torch raises it.
            raise type(self.error)(*self.error.args)


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    """So that the rule says native."""
    monkeypatch.setenv("ATTNPATCH_FREE_MEMORY", "900GB")


@contextlib.contextmanager
def patched(model, case, **policy):
    for cls in case.register:
        attnpatch.register(cls)
    with attnpatch.patched(model, min_tokens=16, **policy):
        yield


if __name__ == "__main__":
    import os, sys
    os.environ["ATTNPATCH_FREE_MEMORY"] = "900GB"
    for case in zoo.CASES:
        for implementation in case.implementations:
            model = zoo.shared_model(case.name, implementation, torch.float32)
            from torch.nn.attention import SDPBackend, sdpa_kernel
            ctx = sdpa_kernel(SDPBackend.MATH) if implementation == "sdpa" else contextlib.nullcontext()
            with ctx, torch.no_grad():
                inputs = case.inputs(case.paddings[0])
                native = case.run(model, inputs)
                with patched(model, case), Shortage() as probe:
                    case.run(model, inputs)
                with patched(model, case), Shortage(least=probe.largest * 0.5) as count:
                    got = case.run(model, inputs)
                bad = []
                for at in range(1, min(count.seen, 14) + 1):
                    with patched(model, case), Shortage(least=probe.largest * 0.5, at=at) as s:
                        try:
                            got = case.run(model, inputs)
                        except RuntimeError as e:
                            bad.append((at, s.failed, type(e).__name__, str(e)[:60] if "out of mem" not in str(e) else ""))
                            continue
                        tot = attnpatch.report(model).totals
                    if not all(zoo.equal_with_nan(got[k], native[k]) for k in native):
                        bad.append((at, s.failed, "DIFFERS"))
                    elif s.failed and not tot["retried"]: bad.append((at, s.failed, "not retried", tot))
                print(case.name, implementation, probe.largest, count.seen, bad, flush=True)
