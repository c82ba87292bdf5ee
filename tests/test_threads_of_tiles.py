"""Tiles in several threads: the same bits, the host's functions in its own thread, errors, and what keeps one thread."""

import contextlib
import math
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnpatch
from attnpatch.rows.evaluate import parallel

pytestmark = pytest.mark.skipif(
    not (torch.backends.openmp.is_available() and torch.backends.mkl.is_available()), reason="one thread"
)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(parallel, "LEAST_SCORES", 0)
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert not [thread for thread in threading.enumerate() if thread.name == "attnpatch tiles"]


@pytest.fixture
def counts(monkeypatch):
    """In how many threads each evaluation of tiles was run."""
    found, real = [], parallel.threads_for
    monkeypatch.setattr(parallel, "threads_for", lambda *given: found.append(real(*given)) or found[-1])
    return found


class Attention(nn.Module):
    """Attention written by hand. ``change`` is applied to the scores, ``dropout`` to the probabilities."""

    def __init__(self, change=None, dropout=0.0):
        super().__init__()
        self.change, self.dropout = change, dropout

    def forward(self, query, key, value, mask=None):
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        scores = scores if mask is None else scores + mask
        scores = scores if self.change is None else self.change(scores)
        weights = F.dropout(scores.softmax(-1), self.dropout, training=self.dropout > 0)
        return torch.matmul(weights, value)


def inputs(heads=4, tokens=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, tokens, 16, generator=generator).to(dtype) for _ in range(3)]


@contextlib.contextmanager
def by_rows(module, **policy):
    model = nn.Sequential(module)
    with attnpatch.patched(model, **{"mode": "always", "sites": ["0"], "rows": 16, "heads": 2, **policy}):
        yield model[0]
        assert attnpatch.report(model).totals["by_rows"] > 0


HIDDEN = torch.full((96, 96), -1e30).triu_(1)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mask", [None, HIDDEN, HIDDEN.expand(4, -1, -1).clone()], ids=["none", "all", "heads"]
)
def test_same_bits(mask, dtype, around, counts):
    given = [*inputs(dtype=dtype), None if mask is None else mask.to(dtype)]
    module = Attention()
    with around():
        native = module(*given)
        with by_rows(module) as site:
            got = site(*given)
    assert torch.equal(got, native) and got.is_inference() == native.is_inference()
    assert counts == [2]


@torch.no_grad()
@pytest.mark.parametrize("threads", [8, 16, 32])
@pytest.mark.parametrize(("heads", "tokens"), [(2, 200), (4, 200), (1, 1537)])
def test_own_steps_have_the_same_bits_with_many_threads(heads, tokens, threads):
    """The matrix library divides products by the number of threads. Steps of 64 rows would differ in some of these."""
    given, module = inputs(heads, tokens), Attention()
    torch.set_num_threads(threads)
    try:
        native = module(*given)
        with by_rows(module, rows=None, heads=None) as site:
            assert torch.equal(site(*given), native)
    finally:
        torch.set_num_threads(2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5", "bloom"])
def test_same_bits_of_models(name, counts):
    case = zoo.BY_NAME[name]
    model = case.build("eager")
    given = case.inputs("none")
    native = case.run(model, given)
    with attnpatch.patched(model, mode="always", rows=4, heads=2):
        got = case.run(model, given)
    assert all(zoo.equal_with_nan(got[each], native[each]) for each in native)
    assert 2 in counts


@torch.no_grad()
def test_keys_that_a_mask_hides_are_left_out(counts):
    """Lengths for which tiles have fewer keys, each size compared with all keys first."""
    given, mask = inputs(tokens=1536), torch.full((1536, 1536), -1e30).triu_(1)
    module = Attention()
    native = module(*given, mask)
    with by_rows(module, rows=128) as site:
        for _ in range(2):
            assert torch.equal(site(*given, mask), native)
    assert counts == [2, 2]


@torch.no_grad()
def test_rows_of_a_mask_are_made_in_the_thread_that_calls(counts, monkeypatch):
    """A function of the host may use what belongs to its thread."""
    from attnpatch.rows.creation.row_masks import RowFunctionNode

    made, real = [], RowFunctionNode.compute

    def compute(self, tile, run):
        made.append(threading.current_thread())
        return real(self, tile, run)

    monkeypatch.setattr(RowFunctionNode, "compute", compute)
    case = zoo.BY_NAME["llama"]
    model = case.build("eager")
    with attnpatch.patched(model, mode="always", rows=4, heads=2):
        case.run(model, case.inputs("none"))
    assert 2 in counts and len(made) > 4
    assert set(made) == {threading.current_thread()}


class Odd(Exception):
    pass


@torch.no_grad()
@pytest.mark.parametrize("error", [Odd("no mask"), KeyboardInterrupt()])
def test_an_error_of_the_host_ends_all_threads(error, monkeypatch):
    from attnpatch.rows.creation.row_masks import RowFunctionNode

    real, calls = RowFunctionNode.compute, []

    def compute(self, tile, run):
        calls.append(tile)
        if len(calls) == 3:
            raise error
        return real(self, tile, run)

    case = zoo.BY_NAME["llama"]
    model = case.build("eager")
    monkeypatch.setattr(RowFunctionNode, "compute", compute)
    with attnpatch.patched(model, mode="always", rows=4, heads=2):
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                case.run(model, case.inputs("none"))
        else:  # it is attnpatch that calls the function, so the model's own code follows
            case.run(model, case.inputs("none"))
            assert attnpatch.report(model).totals["failed"] == 1
    assert len(calls) >= 3


def test_the_first_error_is_raised_and_the_others_end():
    done = []

    def start(ask):
        def work(item):
            if item == 3:
                raise Odd(item)
            done.append(ask(lambda: (item, threading.current_thread())))

        return work

    with pytest.raises(Odd):
        parallel.in_threads([1, 2, 3], 2, start)
    assert {thread for _, thread in done} <= {threading.current_thread()}
    with pytest.raises(ZeroDivisionError):
        parallel.in_threads(list(range(9)), 2, lambda ask: lambda item: ask(lambda: 1 // 0))


@torch.no_grad()
def test_out_of_memory_goes_on_in_one_thread_with_smaller_steps(counts, monkeypatch):
    real, failed = parallel.in_threads, []

    def in_threads(items, count, start):
        def short(ask):
            def work(item):
                failed.append(item)
                raise RuntimeError(
                    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
                )

            return work

        return real(items, count, short)

    monkeypatch.setattr(parallel, "in_threads", in_threads)
    given, module = inputs(), Attention()
    native = module(*given)
    model = nn.Sequential(module)
    with attnpatch.patched(model, mode="always", sites=["0"], rows=32, heads=2):
        assert torch.equal(model[0](*given), native)
        assert attnpatch.report(model).totals["retried"] == 1
    assert counts == [2] and 1 <= len(failed) <= 2


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


ONE_THREAD = {
    "grad": (torch.enable_grad, Attention(), {}),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), Attention(), {}),
    "a mode of functions": (Mode, Attention(), {}),
    "a mode of operators": (Dispatch, Attention(), {}),
    "dropout": (contextlib.nullcontext, Attention(dropout=0.5), {}),
    "a workspace": (contextlib.nullcontext, Attention(), {"workspace": "1MB", "rows": None, "heads": None}),
}


@torch.no_grad()
@pytest.mark.parametrize("why", ONE_THREAD)
def test_what_keeps_one_thread(why, counts):
    around, module, policy = ONE_THREAD[why]
    given = inputs()
    with around():
        torch.manual_seed(0)
        native = module(*given)
        with by_rows(module, **policy) as site:
            torch.manual_seed(0)
            got = site(*given)
    if why != "dropout":  # whose random numbers by rows are others
        torch.testing.assert_close(got, native)
    assert 2 not in counts


@torch.no_grad()
def test_an_observer_keeps_one_thread(counts):
    case = zoo.BY_NAME["llama"]
    model = case.build("eager")
    with attnpatch.patched(model, mode="always", rows=4), attnpatch.capture(model, attnpatch.Blocks.fixed(8)):
        case.run(model, case.inputs("none"))
    assert 2 not in counts


def test_a_thread_that_begins_meanwhile_or_later_has_its_number():
    found = []

    def look():
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    def start(ask):
        found.append(-torch.get_num_threads())
        return lambda item: look()

    parallel.in_threads([1], 1, start)
    torch.set_num_threads(2)
    parallel.in_threads([1, 2, 3], 2, start)
    look()
    assert sorted(found) == [-2, -1, -1, 2, 2, 2, 2, 2]


@torch.no_grad()
def test_large_steps_have_few_threads(counts, monkeypatch):
    given = inputs()
    monkeypatch.setattr(parallel, "MOST_BYTES", 2 * 2 * 16 * 96 * 4 - 1)
    with by_rows(Attention()) as site:
        site(*given)
        monkeypatch.setattr(parallel, "MOST_BYTES", 2 * 2 * 16 * 96 * 4)
        site(*given)
    assert counts == [1, 2]


FORKED = """
import os, torch
import attnpatch
from attnpatch.rows.evaluate import parallel
from test_threads_of_tiles import Attention, by_rows, inputs

torch.set_num_threads(2)
parallel.LEAST_SCORES = 0
found, real = [], parallel.threads_for
parallel.threads_for = lambda *given: found.append(real(*given)) or found[-1]
with torch.no_grad(), by_rows(Attention()) as site:
    expected = site(*inputs())
    child = os.fork()
    got = site(*inputs())
    assert torch.equal(got, expected) and found == [2, 2]
    if child == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own():
    here = os.path.dirname(__file__)
    paths = [here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKED)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
