"""Random programs on scores: two hundred of them, and what the fuzzer says of a fault; ``make fuzz`` runs many more."""

import dataclasses

import pytest
import torch
from fuzzing.processes import chunk
from fuzzing.programs import Program, compiled
from fuzzing.running import check, modules, run, shrunk

PLAIN = Program(
    ("s = q @ k.mT", "s = s * 0.5", "s = s.softmax(-1)", "vv = keys_of(v, s.shape, full)", "out = s @ vv")
)
# A result that is another where the scores are no plain tensor.
FAULT = "s = s * (1.0 if type(s) is torch.Tensor else 1.01)"


def with_line(line: str, **fields) -> Program:
    return dataclasses.replace(PLAIN, lines=(PLAIN.lines[0], line, *PLAIN.lines[1:]), **fields)


def test_two_hundred_programs(tmp_path):
    """From a fixed seed: values and gradients are the native ones."""
    result = chunk(0, 200, 0, tmp_path / "present")
    assert sum(result["counts"].values()) == 200 and result["counts"]["ok"] > 120, result["counts"]
    assert not result["found"], "\n".join(f"{what}\n{program}" for what, program in result["found"])


@pytest.mark.parametrize(
    "fields",
    [{}, {"around": "reentrant"}, {"around": "other"}, {"dtype": "bfloat16"}, {"autocast": True}],
    ids=str,
)
def test_a_program_that_is_right(fields):
    assert check(dataclasses.replace(PLAIN, **fields))[0] in ("ok", "rounding")


def test_a_wrong_value_is_seen_and_made_small():
    verdict, what = check(with_line(FAULT, shape=(2, 4, 9, 11), policy=3))
    assert verdict == "wrong" and "off by" in what
    small = shrunk(with_line(FAULT, shape=(2, 4, 9, 11), policy=3))
    assert small.lines == (PLAIN.lines[0], FAULT, *PLAIN.lines[3:]) and small.shape == (1, 1, 4, 4), small
    assert check(eval(str(small), {"Program": Program}))[0] == "wrong"


def test_a_wrong_gradient_is_seen():
    fault = "s = s if type(s) is torch.Tensor else s.detach() + 0.999 * (s - s.detach())"
    assert check(with_line(fault))[1].startswith("grad")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("assert type(s) is torch.Tensor", "raises AssertionError"),
        ("notes.write(type(s) is torch.Tensor)", "note 0: False instead of True"),
        ("s = s if type(s) is torch.Tensor else s.double()", "out 0: torch.float64"),
        ("s = s if type(s) is torch.Tensor else s.detach()", "grad q: None"),
    ],
)
def test_what_else_can_be_wrong_is_seen(line, said):
    lines = (PLAIN.lines[0], line, "vv = keys_of(v, s.shape, full).to(s.dtype)", "out = s @ vv")
    assert check(dataclasses.replace(PLAIN, lines=lines))[1].startswith(said)


def test_an_error_of_the_native_pass_is_no_fault():
    assert check(with_line("s = s.view(7, 7, 7)"))[0] == "native raises"


VALUES = "vv = keys_of(v, s.shape, full)"
HIDDEN = "s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float('-inf'))"
# Programs of which the bits, or some numbers, are no matter of rows.
ALLOWED = {
    "a row that gives NaN and is cut off": Program(
        ("s = q @ k.mT", HIDDEN, "s = s - s.sum(-1).unsqueeze(-1) * 0.1", "s = s.softmax(-1)", "s = s.narrow(-2, 1, s.shape[-2] - 1)", VALUES, "out = s.tril() @ vv"),
        shape=(1, 1, 7, 4), grads=("q",),
    ),
    "sums that overflow in one order": Program(
        ("s = q @ k.mT", "s = s.masked_fill(~fit(keep, s, full), float('-inf'))", "s = s.nan_to_num()", VALUES, "out = s @ vv[..., :1]"),
        shape=(1, 4, 9, 4), grads=("v",), seed=126,
    ),
    "gradients that overflow in one order": Program(
        ("s = q @ k.mT", "s = s.masked_fill(~fit(keep, s, full), float('-inf'))", "s = s.nan_to_num()", VALUES, "out = s @ vv", "more.append(s @ s.mT)"),
        shape=(1, 1, 5, 4), grads=("q",),
    ),
    "NaN of a kernel for larger products": Program(
        ("s = q @ k.mT", "s = s.masked_fill(~fit(keep, s, full), float('-inf'))", "vv = keys_of(v, s.shape, full).to(s.dtype)", "out = s @ vv"),
        shape=(1, 6, 17, 11), dim=8, autocast=True, grads=(),
    ),
    "scores that are computed twice": Program(
        ("s = torch.baddbmm(bias.expand(full).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.25)", "s = s.pow(2)", "s = s.softmax(-1) * s.softmax(-2)", "s = s.pow(2)", "s = s * s", VALUES, "out = s @ vv"),
        shape=(2, 2, 13, 11), dim=8, grads=(), grid=False, seed=111,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_no_fault(name):
    assert check(ALLOWED[name])[0] in ("ok", "rounding")


def leaf_in_a_function(product: str, *more: str) -> Program:
    """Scores that are made a leaf in a reentrant checkpoint of which no argument needs a gradient."""
    body = "\n".join("    " + line for line in (f"s = {product}", "s.requires_grad_()", *more, "return s"))
    given = "q, k, v, bias, sink"
    part = f"def part({given}):\n{body}\ns = checkpoint(part, {given}, use_reentrant=True)"
    return Program((part, VALUES, "out = s @ vv"), grads=())


EINSUM, MATMUL = "torch.einsum('bhid,bhjd->bhij', q, k)", "q @ k.mT"


def test_a_leaf_that_leaves_a_function_is_torchs_own():
    """Natively it stays one where ``einsum`` has made it, a view of its own, and not where ``matmul`` has."""
    natively = [run(leaf_in_a_function(way), modules()[0], torch.float32).values for way in (EINSUM, MATMUL)]
    assert torch.equal(natively[0]["out 0"], natively[1]["out 0"])
    assert [values["requires_grad 0"] for values in natively] == [True, False]
    assert check(leaf_in_a_function(EINSUM))[0] == "torch's own"
    assert check(leaf_in_a_function(MATMUL))[0] == "ok"


@pytest.mark.parametrize("fault", [FAULT, "s = s if type(s) is torch.Tensor else s[..., :1].expand_as(s)"])
def test_a_fault_beside_such_a_leaf_is_seen(fault):
    assert check(leaf_in_a_function(EINSUM, fault))[0] == "wrong"
    lines = (
        f"s = {EINSUM}",
        "s.requires_grad_()",
        "s = s if type(s) is torch.Tensor else s.detach()",
        VALUES,
        "out = s @ vv",
    )
    assert check(Program(lines, grads=()))[0] == "wrong"


def test_a_result_that_is_read_after_what_it_needs_was_overwritten_is_refused():
    """A checkpoint that runs again writes to its argument by a tensor that nobody watches."""
    part = "def part(s):\n    s.detach().mul_(1.5)\n    return s\ns = checkpoint(part, s, use_reentrant=True)"
    lines = ("s = (q @ k.mT).half().float()", part, VALUES, "out = s @ vv", "more.append(s.sum(-2))")
    verdict, what = check(Program(lines))
    assert verdict == "refused" and "overwritten in place" in what


def test_the_reference_is_wide():
    """What a program casts to is float64 in the pass that others are measured by."""
    program = with_line("s = s.bfloat16().float().to(torch.bfloat16)")
    assert "float64" in program.source(wide=True) and "bfloat16" not in program.source(wide=True)
    assert compiled(program, False) is not compiled(program, True)
