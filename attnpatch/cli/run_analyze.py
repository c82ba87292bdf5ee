"""What ``attnpatch analyze`` does: load the model, analyse the conversations, show progress, print a summary."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.util
import operator
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from attnpatch.cli.console import say
from attnpatch.cli.processes import Processes
from attnpatch.conversations.analyzer import CHECKPOINTING_NOTE, BlockAttentionAnalyzer
from attnpatch.conversations.batch import Step, Summary, analyze_all, check
from attnpatch.conversations.reading.files import Conversation, RejectedRecord, read_conversations
from attnpatch.conversations.results_folder import INDEX, discard
from attnpatch.conversations.single_pass_check import SINGLE_PASS
from attnpatch.errors import AnalysisError, CaptureError, MissingExtraError, UsageError
from attnpatch.hosts.transformers.quiet import quieten
from attnpatch.plotting.map_figure import shorten
from attnpatch.sizes import size_text

SOME_FAILED = 3
# Two times in seconds. The first is between progress lines, where there is no terminal for a progress bar. Over the
# second the rate is averaged, because one conversation may take minutes.
_SAY_EVERY, _PERIOD = 30.0, 3600.0


@dataclass(frozen=True)
class Task:
    """The options of one ``attnpatch analyze``, checked.

    Attributes:
        model, json: Folder or name of the model, and the file of conversations; None for the demo.
        out: Folder for the results.
        method, normalize, resume: As ``analyze_all`` takes them.
        pictures: Whether to draw results; None: only if there is a single conversation.
        loading: Arguments of ``BlockAttentionAnalyzer``.
        options: Fields of its ``Options``.
        top: How many messages to list for each answer.
    """

    model: str | None
    json: Path | None
    out: Path
    method: str
    normalize: str
    resume: bool
    pictures: bool | None
    loading: dict[str, Any]
    options: dict[str, Any]
    top: int = 0


def run_task(task: Task) -> int:
    """Run the task and print a summary.

    Returns:
        The exit code.

    Raises:
        AttnpatchError: The task cannot start, for example because a file or the model cannot be read.
    """
    processes = Processes()
    try:
        return _run(task, processes)
    finally:
        processes.leave()


def _run(task: Task, processes: Processes) -> int:
    quieten()
    shown, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    # This comes before the model is loaded, so that a missing file is reported at once.
    total = sum(1 for _ in _records(task))
    own = len(range(processes.rank, total, processes.count))
    draws = total == 1 if task.pictures is None else task.pictures
    if task.pictures and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError('--pictures needs matplotlib: pip install "attnpatch[plot]"')
    analyzer = _analyzer(task, processes)
    if analyzer.use_gradient_checkpointing and task.options["weighting"] != "gradient" and processes.is_main:
        say(errors, f"note: {CHECKPOINTING_NOTE}")
    try:
        check(analyzer, task.method)
    except CaptureError as error:  # such as --layers 99
        raise UsageError(str(error)) from error
    start = time.perf_counter()
    drawn: list[str] = []
    said: set[str] = set()
    with _progress(errors, own, processes) as advance:

        def after(step: Step) -> None:
            if step.outcome == "failed":
                say(errors, f"{step.entry['source']}: {step.entry['error']}")
            elif step.analysis is not None:
                _say_once(said, step.analysis.notes, errors if processes.is_main else None)
                if task.top:
                    _list(shown, step, task.top)
                if draws:
                    drawn.extend(_draw(analyzer, step, task, errors))
            advance(step)

        summary = analyze_all(
            analyzer, _records(task), task.out, method=task.method, resume=task.resume, normalize=task.normalize,
            on_progress=after, shard=(processes.rank, processes.count), options=_loaded(task),
        )  # fmt: skip
    gathered = processes.gathered(summary)
    if gathered is None:
        say(
            errors,
            "attnpatch: another process ended before its share was done; run the command again with --resume",
        )
    together = functools.reduce(operator.add, gathered or [summary])
    if processes.is_main:
        if len(gathered or ()) == processes.count and not together.done + together.skipped:
            discard(task.out, [task.out])
        _close(shown, task, together, time.perf_counter() - start, drawn)
    if gathered is None:
        return SOME_FAILED
    if together.failed:
        return SOME_FAILED if together.done + together.skipped else 1
    return 0


def _records(task: Task) -> Iterable[Conversation | RejectedRecord]:
    if task.json is not None:
        return read_conversations(task.json)
    from attnpatch.demo.conversation import DemoConversation
    from attnpatch.demo.run import FOLDER

    messages = DemoConversation.load(FOLDER / "conversation.json").with_answer()
    return [Conversation(tuple(messages), "demo", "conversation.json record 1")]


def _analyzer(task: Task, processes: Processes) -> BlockAttentionAnalyzer:
    model, loading = task.model, dict(task.loading)
    if model is None:
        from attnpatch.demo.run import FOLDER

        model = str(FOLDER / "model")
        # As in attnpatch demo; half precision is slow on most CPUs.
        loading["torch_dtype"] = loading["torch_dtype"] or "float32"
    if loading["device_map"] is None and torch.cuda.is_available():
        # Several processes get one device each; a single process gets all devices.
        several = processes.count > 1
        devices = torch.cuda.device_count()
        loading["device_map"] = {"": processes.local_rank % devices} if several else "auto"
    return BlockAttentionAnalyzer(model, **loading, **task.options)


def _loaded(task: Task) -> dict[str, Any]:
    """The loading options that change results; ``run.json`` records them."""
    kept = ("load_in_4bit", "load_in_8bit", "torch_dtype")
    model = "demo" if task.model is None else os.path.abspath(task.model)
    if task.model is not None and not Path(task.model).exists():
        model = task.model
    return {"model": model, **{name: task.loading[name] for name in kept}}


@contextlib.contextmanager
def _progress(console: Console, total: int, processes: Processes) -> Iterator[Any]:
    """Yields a function to call after each conversation; it shows the progress, by lines where there is no terminal.

    Conversations that were done before take no time, and do not count.
    """
    if not processes.is_main:
        yield lambda step: None
        return
    what = f"process 1 of {processes.count}" if processes.count > 1 else "conversations"
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    shown = {"console": console, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, **shown, speed_estimate_period=_PERIOD) as bar:
        bar.add_task(what, total=total, rate="")
        (task,) = bar.tasks
        said = time.monotonic()

        def advance(step: Step) -> None:
            nonlocal said
            if step.outcome == "skipped":
                bar.update(task.id, total=task.total - 1)
                return
            bar.advance(task.id)
            each = 1 / task.speed if task.speed else 0.0
            rate = f"{1 / each:.1f}/s" if 0 < each < 1 else f"{each:.1f} s each"
            bar.update(task.id, rate=rate if each else "")
            if not console.is_terminal and time.monotonic() - said >= _SAY_EVERY:
                said = time.monotonic()
                left = datetime.timedelta(seconds=int(each * task.remaining))
                say(console, f"{what}: {task.completed} of {task.total}, {rate}, {left} left")

        yield advance


def _say_once(said: set[str], notes: Iterable[str], console: Console | None) -> None:
    """Print the notes that concern the model and not one conversation, each once."""
    for note in notes:
        if console is not None and note.startswith(SINGLE_PASS) and note not in said:
            said.add(note)
            say(console, f"note: {note}")


def _list(console: Console, step: Step, top: int) -> None:
    """Print what the last message of a conversation attends to."""
    assert step.analysis is not None
    answer = " ".join((step.analysis.texts or [""])[-1].split())
    say(console, f"{step.entry['name']}: {shorten(answer, 70)}")
    for line in str(step.analysis.top(top)).splitlines():
        say(console, f"  {line}")


def _draw(analyzer: BlockAttentionAnalyzer, step: Step, task: Task, errors: Console) -> list[str]:
    """Draw one result. Without matplotlib the result is kept and a note is printed."""
    folder = task.out / "pictures" / str(step.entry["name"])
    try:
        assert step.analysis is not None
        written = analyzer.visualize_results(step.analysis, save_dir=folder)
    except MissingExtraError as error:
        say(errors, f"note: no pictures: {error}")
        return []
    except OSError as error:
        raise AnalysisError(f"cannot write pictures into {folder}: {error.strerror or error}") from error
    return [str(path) for path in written]


def _close(console: Console, task: Task, summary: Summary, seconds: float, drawn: list[str]) -> None:
    """Print the summary table and the paths of the results."""
    table = Table("", "", show_header=False)
    rows: list[tuple[str, Any]] = [("conversations analysed", summary.done)]
    rows += [("skipped, done before", summary.skipped), ("failed", len(summary.failed))]
    rows += [("tokens", f"{summary.tokens:,}")]
    rows += [("seconds in the model", f"{summary.seconds:.1f}"), ("seconds in all", f"{seconds:.1f}")]
    rows += [("most memory beyond the model", size_text(summary.peak_bytes))]
    for name, value in rows:
        table.add_row(name, str(value))
    console.print(table)
    if not summary.done + summary.skipped:
        say(console, "results: none")
        return
    say(console, f"results: {task.out}")
    say(console, f"index: {task.out / INDEX}")
    if drawn:
        say(console, f"pictures: {Path(drawn[0]).parent}")
    else:
        say(console, f"to see them: attnpatch view {task.out}")
    if task.resume and summary.done == 0 and summary.skipped and not summary.failed:
        say(console, "All conversations had been analysed before.")
