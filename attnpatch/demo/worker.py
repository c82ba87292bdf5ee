"""The demo's measurements: a forward pass over a conversation, with a separate process for each case.

``python -m attnpatch.demo.worker MODEL CONVERSATION eager|sdpa native|rows LOGITS`` runs one case and prints a line of
JSON. ``measure_all`` runs all cases one after the other and compares their logits; ``show_runs`` prints a table.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file

import attnpatch
from attnpatch.demo.conversation import DemoConversation
from attnpatch.errors import AttnpatchError
from attnpatch.hosts.transformers.loading import load_model, load_tokenizer
from attnpatch.hosts.transformers.quiet import quieten
from attnpatch.memory.peak import PeakMeter

# Native comes first, because the run by rows is compared with it.
_NAMES = {"native": "native", "rows": "by rows"}
CASES = (("eager", "native"), ("eager", "rows"), ("sdpa", "native"), ("sdpa", "rows"))
_WARM_UP_TOKENS = 64
# The fastest pass counts, because other load can only make a pass slower. Memory and counts are those of the first
# pass; later passes reuse memory that it allocated.
_PASSES = 2


class DemoError(AttnpatchError):
    """The demo cannot run: a part of it is missing, or one of its processes failed."""


@dataclass(frozen=True)
class Measured:
    """The measurements of one process.

    Attributes:
        implementation: ``"eager"`` or ``"sdpa"``.
        way: ``"native"`` (the model as it is) or ``"rows"`` (patched with ``mode="always"``).
        seconds: Time of the fastest forward pass.
        peak: Peak bytes beyond the loaded model.
        counts: Totals of ``attnpatch.report``; None for a native run.
        difference: Largest absolute difference between the logits and those of the same implementation's native run.
        identical: Whether the logits equal those of the native run to the last bit.
    """

    implementation: str
    way: str
    seconds: float
    peak: int
    counts: dict[str, int] | None
    difference: float
    identical: bool


def load(folder: Path | str, implementation: str) -> tuple[Any, Any]:
    """Load the model in float32 and its tokenizer."""
    quieten()
    name = str(folder)
    return load_model(name, dtype=torch.float32, attention=implementation), load_tokenizer(name)


def measure_all(console: Console, model_folder: Path, conversation_file: Path) -> list[Measured]:
    """Run every case in a fresh process, with a progress bar if the output is a terminal.

    Args:
        console: Where to print.
        model_folder: Folder of the model and its tokenizer.
        conversation_file: A file that ``DemoConversation.save`` wrote.

    Raises:
        DemoError: A process failed.
    """
    found = []
    native: dict[str, torch.Tensor] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description:<16}"), BarColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        tempfile.TemporaryDirectory(prefix="attnpatch_demo_") as temporary,
    ):
        task = bar.add_task("starting", total=len(CASES))
        for number, (implementation, way) in enumerate(CASES):
            bar.update(task, completed=number, description=f"{implementation}, {_NAMES[way]}")
            # Each case has its own file, because loaded tensors are views of the file of their case.
            logits_file = Path(temporary) / f"{implementation}_{way}.safetensors"
            figures = _in_fresh_process(model_folder, conversation_file, implementation, way, logits_file)
            logits = load_file(logits_file)["logits"]
            before = native.setdefault(implementation, logits)
            difference = float((logits - before).abs().max())
            is_same = torch.equal(logits, before)
            found.append(Measured(implementation, way, **figures, difference=difference, identical=is_same))
    return found


def show_runs(console: Console, runs: list[Measured]) -> None:
    """Print the measurements as a table, and a note if by rows differs from SDPA."""
    table = Table("attention", "run")
    for name in ("time", "peak memory\nbeyond model", "logits differ\nfrom native", "attention\ncalls"):
        table.add_column(name, justify="right")
    for run in runs:
        native = run.way == "native"
        difference = "same to the\nlast bit" if run.identical else f"up to {run.difference:.0e}"
        table.add_row(
            run.implementation,
            _NAMES[run.way],
            f"{run.seconds:.2f} s",
            f"{run.peak / 1e6:,.0f} MB",
            "-" if native else difference,
            "not patched" if run.counts is None else counted(run.counts),
            end_section=not native,
        )
    console.print(table)
    if any(run.implementation == "sdpa" and not run.identical for run in runs):
        console.print(
            "sdpa uses PyTorch's fused kernel here, which never holds all scores. By default attnpatch leaves "
            "such calls native; forced by rows, they round differently."
        )


def counted(counts: dict[str, int]) -> str:
    """The report's counts that are not 0, one per line; ``largest`` is left out, because it is in bytes."""
    return "\n".join(
        f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and name != "largest"
    )


def _in_fresh_process(*arguments: object) -> dict[str, Any]:
    # ``-P`` is given, because the current folder may contain a file named like a module. attnpatch must be found all
    # the same.
    paths = [str(Path(attnpatch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "attnpatch.demo.worker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    _, _, implementation, way, _ = arguments
    if done.returncode == -signal.SIGKILL:
        raise DemoError(
            f"the {implementation} run ({way}) was killed, probably for lack of memory; free 2 GB and try again"
        )
    if done.returncode:
        ended = f"exit code {done.returncode}, without a message"
        if done.returncode < 0:
            ended = f"ended by {signal.Signals(-done.returncode).name}"
        last = (done.stderr.strip() or ended).splitlines()[-1]
        raise DemoError(f"the {implementation} run ({way}) failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def run_here(
    model_folder: str, conversation_file: str, implementation: str, way: str, logits_file: str
) -> dict[str, Any]:
    """Run one case in this process and save its logits; returns seconds, peak bytes and counts."""
    messages = DemoConversation.load(conversation_file).with_answer()
    model, tokenizer = load(model_folder, implementation)
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt")["input_ids"]
    model(ids[:, :_WARM_UP_TOKENS], use_cache=False)
    rows = way == "rows"
    with attnpatch.patched(model, mode="always") if rows else contextlib.nullcontext():
        with PeakMeter() as meter:
            start = time.perf_counter()
            logits = model(ids, use_cache=False).logits
            times = [time.perf_counter() - start]
        counts = attnpatch.report(model).totals if rows else None
        for _ in range(_PASSES - 1):
            start = time.perf_counter()
            model(ids, use_cache=False)
            times.append(time.perf_counter() - start)
    save_file({"logits": logits}, logits_file)
    return {"seconds": min(times), "peak": meter.peak, "counts": counts}


if __name__ == "__main__":
    print(json.dumps(run_here(*sys.argv[1:])))
