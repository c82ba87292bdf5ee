"""Scripted, traced, frozen and loaded modules run in C++, where attnpatch sees nothing: one clear line, and no change."""

import io

import pytest
import torch
from torch import nn

import attnpatch
from attnpatch import errors

X = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        x = self.proj(x)
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


class Holder(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core, self.own = core, Mixer()

    def forward(self, x):
        return self.own(self.core(x))


def loaded(module):
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


KINDS = {
    "scripted": lambda: torch.jit.script(Mixer()),
    "traced": lambda: torch.jit.trace(Mixer(), X),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(Mixer().eval())),
    "loaded": lambda: loaded(torch.jit.script(Mixer())),
    "loaded trace": lambda: loaded(torch.jit.trace(Mixer(), X)),
}
# What is called, and the whole message.
CALLS = {
    "apply": lambda model: attnpatch.apply(model),
    "patched": lambda model: attnpatch.patched(model).__enter__(),
    "capture": lambda model: attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(8)).__enter__(),
    "sites": lambda model: attnpatch.apply(model, sites=[""]),
    "explain": lambda model: attnpatch.explain(model, inputs=X),
    "by_rows": lambda model: attnpatch.by_rows(model),
}
CANNOT = "is TorchScript, which cannot be"
SAYS = dict.fromkeys(("apply", "patched", "capture"), f"the attention of Mixer {CANNOT} patched; use the eager model") | {
    "sites": "'Mixer' is a TorchScript module, which cannot be patched; patch the eager model",
    "explain": f"Mixer {CANNOT} run on shapes; explain the eager model",
    "by_rows": "by_rows() takes a function, not a Mixer; attnpatch.apply() patches a module",
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_model(kind, call):
    model = KINDS[kind]()
    native = model(X)
    with pytest.raises(errors.AttnpatchError) as raised:
        CALLS[call](model)
    assert str(raised.value) == SAYS[call]
    assert torch.equal(model(X), native)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_model(kind):
    """The rest of the model is patched; ``explain`` would need shapes inside the part, and leaves its parameters alone."""
    model = Holder(KINDS[kind]())
    native = model(X)
    with pytest.raises(
        errors.ExplainError, match=r"^Holder has a part \(core\) that is TorchScript, which cannot be run"
    ):
        attnpatch.explain(model, inputs=X)
    with pytest.warns(
        errors.AttnpatchWarning, match=f"^the attention of Holder in core {CANNOT} patched"
    ) as said:
        attnpatch.apply(model, mode="always")
    assert len(said) == 1
    assert torch.equal(model(X), native)
    assert [(site.name, site.counts["by_rows"]) for site in attnpatch.report(model).sites] == [("own", 1)]


def test_a_function():
    for function in (torch.jit.script(mixed), torch.jit.trace(mixed, X)):
        with pytest.raises(
            errors.PatchError, match=r"is TorchScript, which runs as it is; give the eager function$"
        ):
            attnpatch.by_rows(function)


def mixed(x: torch.Tensor) -> torch.Tensor:
    return (x @ x.transpose(-1, -2)).softmax(-1) @ x
