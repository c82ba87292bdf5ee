"""Which thread, and which task, a capture sees: its own request, and none of another one in the same pool or loop."""

import asyncio
import concurrent.futures
import functools
import multiprocessing.pool
import threading

import pytest
import torch
import transformers

import attnpatch
from attnpatch import Blocks

WIDTH = 4


@functools.cache
def build(implementation):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, attn_implementation=implementation,
    )).eval()  # fmt: skip


def run(seed):
    """A request; requests have different lengths."""
    with torch.no_grad():
        build("sdpa")(tokens(seed))


def tokens(seed):
    return torch.randint(3, 64, (1, 9 + 4 * seed), generator=torch.Generator().manual_seed(seed))


def capture():
    return attnpatch.capture(build("sdpa"), Blocks.fixed(WIDTH))


def dense(seed):
    """``[layers, blocks, blocks]`` of the eager model's own probabilities, by a plain loop."""
    with torch.no_grad():
        seen = build("eager")(tokens(seed), output_attentions=True).attentions
    found = []
    for layer in seen:
        mean, count = layer[0].double().mean(0), layer.shape[-1]
        blocks = [range(start, min(start + WIDTH, count)) for start in range(0, count, WIDTH)]
        found.append(
            [[sum(mean[i, j].item() for i in q for j in k) / len(q) for k in blocks] for q in blocks]
        )
    return torch.tensor(found, dtype=torch.float64)


def check(maps, seed):
    assert not maps.left_out
    assert len(maps.sequences) == 1
    torch.testing.assert_close(maps.block_map.mass.double(), dense(seed), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------- one request, seen wherever it runs


def in_a_new_pool():
    with capture() as maps, concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(run, 1).result()
    check(maps, 1)


def in_a_pool_that_was_there():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with capture() as maps:
            list(pool.map(run, [1]))
        check(maps, 1)


def after_another_request_in_one_loop():
    async def request(seed):
        with capture() as maps:
            await asyncio.to_thread(run, seed)
        check(maps, seed)

    async def both():
        await request(1)
        await request(2)

    asyncio.run(both())


def in_a_worker_of_anyio():
    anyio = pytest.importorskip("anyio")

    async def request():
        await anyio.to_thread.run_sync(run, 2)
        with capture() as maps:
            await anyio.to_thread.run_sync(run, 1)
        check(maps, 1)

    anyio.run(request)


def around_the_loop():
    async def request():
        await asyncio.to_thread(run, 1)

    with capture() as maps:
        asyncio.run(request())
    check(maps, 1)


# ------------------------------------------------------------------------------------ two requests, one after the other


def another_task_in_its_loop(is_captured, in_thread):
    """While a request waits, another one is served by the same thread, and by the same pool."""

    async def call(seed):
        await asyncio.to_thread(run, seed) if in_thread else run(seed)

    async def first(is_done, go_on):
        with capture() as maps:
            await call(1)
            is_done.set()
            await go_on.wait()
        check(maps, 1)

    async def second(is_done, go_on):
        await is_done.wait()
        if is_captured:
            with capture() as maps:
                await call(2)
            check(maps, 2)
        else:
            await call(2)
        go_on.set()

    async def both():
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(first(*events), second(*events))

    asyncio.run(both())


def another_thread_in_its_pool():
    """The pool's worker was started inside the block."""
    pool, go_on = concurrent.futures.ThreadPoolExecutor(1), threading.Event()

    def serve():
        go_on.wait(20)
        pool.submit(run, 2).result()

    other = threading.Thread(target=serve)
    other.start()
    with capture() as maps:
        pool.submit(run, 1).result()
        go_on.set()
        other.join()
    pool.shutdown()
    check(maps, 1)


CASES = [in_a_new_pool, in_a_pool_that_was_there, after_another_request_in_one_loop, in_a_worker_of_anyio,
         around_the_loop, another_thread_in_its_pool]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_request_is_seen_whole_and_alone(case):
    starts = threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit
    case()
    assert starts == (threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit)


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("is_captured", [False, True])
def test_tasks_of_one_loop(is_captured, in_thread):
    another_task_in_its_loop(is_captured, in_thread)


# --------------------------------------------------------------------------------------------------- what is not seen


def begun_in_a_thread_that_has_ended():
    box, manager = [], capture()
    for step in (lambda: box.append(manager.__enter__()), lambda: manager.__exit__(None, None, None)):
        if box:
            run(1)
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    return box[0]


def in_a_worker_that_was_there():
    with multiprocessing.pool.ThreadPool(1) as pool, capture() as maps:
        pool.apply(run, (1,))
    return maps


@pytest.mark.filterwarnings("ignore::attnpatch.errors.AttnpatchWarning")
@pytest.mark.parametrize("case", [begun_in_a_thread_that_has_ended, in_a_worker_that_was_there])
def test_a_call_that_is_not_seen_is_said_to_be_elsewhere(case):
    maps = case()
    assert "begin the capture where the model is called" in maps.left_out[""]
    assert maps.left_out[""] in repr(maps)
    with pytest.raises(
        attnpatch.errors.CaptureError, match="threads or tasks that this capture does not see"
    ):
        maps.block_map  # noqa: B018
