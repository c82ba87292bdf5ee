"""Computes the tiles of a graph in several threads on CPU: each takes the next tiles from a list.

A tile's steps are so short that torch's threads wait for each other at the end of every one. Threads with tiles of their
own wait once, at the end, and if another process takes a core, the other threads take more tiles. Torch uses one thread
inside each of them. A tile has the same bits in any thread.

A new thread has none of the state of the thread that starts it. What may run there is therefore only torch's own
functions, without autograd, autocast, modes and random numbers. Rows that a function of the host makes (a mask) are made
in the thread that called the model, which waits for such requests meanwhile.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attnpatch import compat
from attnpatch.rows.evaluate.evaluator import Evaluator
from attnpatch.rows.evaluate.masked_tail import MaskedTail
from attnpatch.rows.evaluate.tile_plan import TilePlan
from attnpatch.rows.graph.axes import Tile, put
from attnpatch.rows.graph.nodes import InputNode, Node, OutputNode, SliceNode, ViewNode
from attnpatch.rows.graph.operations import OpNode

# Each thread holds the scores of a step, and all of them at most this many bytes. If torch has more threads, they work
# inside the steps.
MOST_THREADS, MOST_BYTES = 16, 256 * 2**20
# Scores of a call from which it is worth starting threads.
LEAST_SCORES = 2**20
_PURE = (InputNode, ViewNode, SliceNode, OutputNode)
# Jobs for each thread: with fewer, the others would wait for the last one.
_JOBS = 4


def threads_for(run: Evaluator, plan: TilePlan) -> int:
    """In how many threads the tiles of a graph are computed; 1: in the calling thread."""
    count, tiles = min(torch.get_num_threads(), MOST_THREADS), len(plan.lead) * len(plan.rows)
    scores = [node for node in run.nodes if node in run.scores]
    most = max((node.shape.numel() for node in scores), default=0)
    step = max((node.shape.numel() * node.dtype.itemsize for node in scores), default=0) // max(1, tiles)
    count = min(count, MOST_BYTES // max(1, step))
    if count < 2 or plan.row is None or tiles < 2 * count or most < LEAST_SCORES:
        return 1
    # Other matrix libraries have one number of threads for all threads of a process.
    if not (torch.backends.openmp.is_available() and torch.backends.mkl.is_available()):
        return 1
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _has_modes() or compat.is_transformed():
        return 1
    return count if all(map(_is_pure, run.nodes)) else 1


def _has_modes() -> bool:
    """True if a mode of the host or of torch (``torch.set_default_device``) sees what is called in this thread."""
    modes = compat.function_modes()
    return compat.has_dispatch_modes() or any(
        not type(mode).__module__.startswith("attnpatch.") for mode in modes
    )


def _is_pure(node: Node) -> bool:
    """True if a node is computed on CPU by functions of torch alone, or by a host's function that makes rows."""
    if type(node) is OpNode:
        module = getattr(node.func, "__module__", None) or "torch"
        return module.partition(".")[0] == "torch" and not node.context.autocast
    return node.device.type == "cpu" and (type(node) in _PURE or node.is_constant or node.is_made_by_host)


def compute(run: Evaluator, plan: TilePlan, tail: MaskedTail | None, count: int) -> tuple[torch.Tensor, int]:
    """The last node of ``run``.

    Args:
        run: Its evaluation, which has begun.
        plan: The tiles.
        tail: The keys that tiles may leave out, if any.
        count: How many threads compute tiles.

    Returns:
        The tensor, and the bytes of the largest part of scores that a thread has made.
    """
    root = run.nodes[-1]
    results: list[torch.Tensor] = []
    runs: list[Evaluator] = []
    lock = threading.Lock()

    def start(ask: Callable[[Callable[[], Any]], Any]) -> Callable[[list[Tile]], None]:
        own = Evaluator(root)
        own.row, own.shared, own.scores, own.in_calling_thread = run.row, run.shared, run.scores, ask
        runs.append(own)

        def work(tiles: list[Tile]) -> None:
            for tile in tiles:
                value = own.value(root, tile) if tail is None else tail.value(own, tile)[0]
                with lock:
                    if not results:
                        results.append(empty(root, value))
                put(results[0], root.dims, tile, value)
                del value
                own.next_tile()
            own.next_rows()
            own.next_lead()

        return work

    in_threads(_jobs(run, plan, count), count, start)
    return results[0], max(own.largest for own in runs)


def _jobs(run: Evaluator, plan: TilePlan, count: int) -> list[list[Tile]]:
    """Tiles that share values and are computed one after the other; the last rows, which see most keys, come first."""
    row = plan.row
    assert row is not None
    if run.shared:
        return [[{**lead, row: span} for lead in plan.lead] for span in reversed(plan.rows)]
    size = max(1, len(plan.rows) * len(plan.lead) // (_JOBS * count))
    parts = [plan.rows[i : i + size] for i in range(0, len(plan.rows), size)]
    return [[{**lead, row: span} for span in part] for part in reversed(parts) for lead in plan.lead]


def in_threads(
    items: list[Any],
    count: int,
    start: Callable[[Callable[[Callable[[], Any]], Any]], Callable[[Any], None]],
) -> None:
    """Call a function for every item, in some threads.

    Args:
        items: Each thread takes the next one.
        count: How many threads.
        start: Called once in each thread; returns the function. It is given a function that runs another one in the
            calling thread.

    Raises:
        BaseException: The first error; every thread ends after its item.
    """
    left: Iterator[Any] = iter(items)
    errors: list[BaseException] = []
    lock, requests = threading.Lock(), queue.SimpleQueue[Any]()
    threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def ask(function: Callable[[], Any]) -> Any:
        answer = queue.SimpleQueue[Any]()
        requests.put((function, answer))
        value, error = answer.get()
        if error is not None:
            raise error
        return value

    def loop() -> None:
        try:
            # A thread takes over the number that any thread has set last when it first asks for its own. So this one
            # asks before it sets it, and the calling thread sets its number again, for threads that begin later.
            torch.get_num_threads()
            torch.set_num_threads(max(1, threads // count))
            ask(functools.partial(torch.set_num_threads, threads))
            with torch.inference_mode(is_inference), torch.no_grad():
                function = start(ask)
                while not errors:
                    with lock:
                        item = next(left, None)
                    if item is None:
                        break
                    function(item)
        except BaseException as error:
            errors.append(error)
        requests.put(None)

    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=loop, name="attnpatch tiles", daemon=True)
            thread.start()
            started.append(thread)
    except BaseException as error:
        errors.append(error)
    _serve(requests, len(started), errors)
    for thread in started:
        thread.join()
    if errors:
        # Frames in its traceback hold tensors of a step, so nothing in them may refer to the error.
        first = errors[0]
        errors.clear()
        try:
            raise first
        finally:
            del first


def _serve(requests: queue.SimpleQueue[Any], count: int, errors: list[BaseException]) -> None:
    """Run what threads ask for until all of them have ended."""
    while count:
        answer: Any = None
        try:
            request = requests.get()
            if request is None:
                count -= 1
                continue
            function, answer = request
            answer.put((function(), None))
        except BaseException as error:  # of the function, or an interrupt
            errors.append(error)
            if answer is not None:
                answer.put((None, error))


def empty(node: Node, value: torch.Tensor) -> torch.Tensor:
    """Memory for the whole result. Its dimensions lie in memory in the same order as those of a tile, which is the
    order of the host's result.
    """
    order = list(range(value.dim()))
    if 1 not in value.shape:
        order.sort(key=value.stride, reverse=True)
    strides, step = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= node.shape[dim]
    return torch.empty_strided(node.shape, strides, dtype=value.dtype, device=value.device)
