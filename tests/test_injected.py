"""No error of ours leaves a user's forward: an exception at any step of the engine ends in the native result."""

import functools
import importlib
import inspect
import pkgutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnpatch
from attnpatch import failures, rows

LENGTH, WIDTH = 40, 16
# What the answer to a failure itself is made of: who is asked last cannot be answered for.
LAST_RESORT = {
    "guard.guarded", "guard.failed", "guard.passes", "guard.attempted", "guard.ran", "tensor.natively",
    "tensor.materialize", "history.has_history", "handle.is_foreign", "handle.has_other_history", "tensor.is_pending", "tensor.DeferredTensor.__torch_function__",
    "tensor.DeferredTensor.__torch_dispatch__", "attention_call.AttentionCall.failed", "oom.is_out_of_memory",
    "selective_checkpoints.is_hidden", "selective_checkpoints.shown",
}  # fmt: skip


# Of a backward pass: there is no native call to go back to, and an error is raised by it and by no forward.
OF_BACKWARD = {
    f"kept_values.{kind}.{step}" for kind in ("Kept", "Packed") for step in ("instead_of", "forget", "leave")
}


class Injected(Exception):
    """Stands for any fault of ours."""


class MyAttention(nn.Module):
    """The kinds of attention in one module: by hand with masks, views and writes, torch's own, and positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.table = nn.Parameter(torch.randn(9, 2))

    def forward(self, x):
        query, key, value = self.projection(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(-1, -2)
        scores = scores * 0.3
        positions = torch.arange(x.shape[1])
        distances = (positions[None, :] - positions[:, None]).clamp(-4, 4) + 4
        scores += F.embedding(distances, self.table).permute(2, 0, 1)
        scores.masked_fill_(positions[None, :] > positions[:, None] + 8, -1e4)
        folded = scores.flatten(0, 1)
        probabilities = torch.softmax(folded.view_as(scores), -1, dtype=torch.float32).type_as(scores)
        out = probabilities @ value
        out += F.scaled_dot_product_attention(
            query, key, value, attn_mask=torch.zeros(x.shape[1], x.shape[1])
        )
        self.received = probabilities.detach().sum(-2)
        return out.transpose(1, 2).flatten(2)


def steps():
    """Every public function and method of the engine, by name, and how to put another in its place."""
    found = {}
    modules = [
        importlib.import_module(each.name)
        for each in pkgutil.walk_packages(rows.__path__, f"{rows.__name__}.")
        if not each.ispkg
    ]
    for module in modules:
        short = module.__name__.rpartition(".")[2]
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            if inspect.isfunction(value):
                found[f"{short}.{name}"] = [
                    (m, key) for m in modules for key, v in vars(m).items() if v is value
                ]
            elif inspect.isclass(value) and not issubclass(value, Exception):
                for key, method in vars(value).items():
                    if inspect.isfunction(method) and (
                        not key.startswith("_") or key in ("__init__", "__call__")
                    ):
                        found[f"{short}.{name}.{key}"] = [(value, key)]
    return {name: places for name, places in found.items() if name not in LAST_RESORT | OF_BACKWARD}


STEPS = steps()


def step_of_training(module, x):
    """The result, what else it kept, and every gradient."""
    module.zero_grad()
    result = module(x)
    result.square().sum().backward()
    return [result.detach(), module.received, *(p.grad.clone() for p in module.parameters())]


def test_the_list_is_long():
    assert len(STEPS) > 250


POLICIES = (
    {"mode": "always", "min_tokens": 4},
    {"mode": "auto", "min_tokens": 4, "min_free": "900GB"},
)


def module_and_input():
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return MyAttention(), x


def replaced(patch, name, function):
    for owner, key in STEPS[name]:
        patch.setattr(owner, key, function)


@functools.cache
def reached():
    """The steps that a call takes under each policy. An exception in any other step would be raised by nobody."""
    module, x = module_and_input()
    native = step_of_training(module, x)
    found = []
    for policy in POLICIES:
        names = set()

        def counted(name, function, _names=names):
            @functools.wraps(function)
            def call(*args, **kwargs):
                _names.add(name)
                return function(*args, **kwargs)

            return call

        with attnpatch.patched(module, **policy), pytest.MonkeyPatch.context() as patch:
            step_of_training(module, x)  # what is done once in a process
            for name, places in STEPS.items():
                owner, key = places[0]
                replaced(patch, name, counted(name, vars(owner)[key]))
            got = step_of_training(module, x)
            patch.undo()
            assert attnpatch.report(module).totals["failed"] == 0
        assert all(torch.allclose(mine, theirs, 1e-4, 1e-5) for mine, theirs in zip(got, native, strict=True))
        found += [(name, policy) for name in STEPS if name in names]
    return found


def test_many_steps_are_reached():
    assert len(reached()) > 300


@pytest.mark.parametrize("part", range(8))
def test_an_exception_anywhere_gives_the_native_result(part, monkeypatch):
    module, x = module_and_input()
    native = step_of_training(module, x)
    mine = reached()[part::8]
    raised = 0
    for name, policy in mine:
        calls = []

        def fails(*args, _calls=calls, _name=name, **kwargs):
            _calls.append(_name)
            raise Injected(_name)

        failures._said.clear()
        with (
            attnpatch.patched(module, **policy),
            monkeypatch.context() as patch,
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            replaced(patch, name, fails)
            try:
                got = step_of_training(module, x)
            except Exception as error:
                pytest.fail(f"{name} under {policy}: {error!r} left the forward")
            finally:
                patch.undo()
            totals = attnpatch.report(module).totals
        for found, theirs in zip(got, native, strict=True):
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if calls:
            raised += 1
            assert totals["failed"] > 0 and said, f"{name} failed and nobody was told: {dict(totals)}"
    # A few steps are taken for what an earlier call has left behind.
    assert raised > 0.9 * len(mine)
