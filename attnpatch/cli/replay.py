"""``attnpatch replay``: what a served model looked at, from the log of its server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attnpatch.cli.analyze import sizes
from attnpatch.errors import UsageError


def replay(
    model: Annotated[
        str, typer.Option(metavar="PATH", help="The served model: its folder, or its name on the hub.")
    ],
    transcript: Annotated[
        Path, typer.Option(metavar="FILE", help="The log: requests with their responses, as JSON or JSONL.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = Path(
        "attention_maps"
    ),
    top: Annotated[
        int, typer.Option(metavar="N", min=0, help="Messages to list for each answer; 0 lists none.")
    ] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Continue in DIR; skip what is done.")] = False,
    layers: Annotated[str, typer.Option(metavar="LIST", help="all or last.")] = "all",
    single_pass: Annotated[
        bool,
        typer.Option("--single-pass", help="Run a whole conversation at once: faster if it fits in memory."),
    ] = False,
    use_4bit: Annotated[bool, typer.Option("--use-4bit", help="Weights in 4 bits (bitsandbytes).")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="float32, bfloat16 or float16; the checkpoint's if not given."),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(metavar="MAP", help="auto (spread the model over devices), cpu, cuda:1.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Limit per device, such as 0=20GiB,cpu=60GiB.")
    ] = None,
) -> None:
    """Show what the answers in a server's log attend to. The server is not touched.

    Each request is run through the model again, followed by the logged answer (teacher forcing). Logs of OpenAI's chat and
    responses API and of its batches are read. Results are written as those of attnpatch analyze.
    """
    if layers not in ("all", "last"):
        raise UsageError(f"--layers {layers}: give all or last")
    from attnpatch.cli.run_analyze import Task, run_task

    loading: dict[str, Any] = {
        "load_in_4bit": use_4bit,
        "load_in_8bit": False,
        "torch_dtype": dtype,
        "device_map": device_map,
        "max_memory": None if max_memory is None else sizes("--max-memory", max_memory),
        "use_gradient_checkpointing": False,
        "head_chunk_size": None,
    }
    options = {"blocks": "messages", "layers": layers, "heads": "mean", "weighting": "probability", "seed": 0}
    method = "single pass" if single_pass else "sequential"
    code = run_task(Task(model, transcript, out, method, None, resume, None, loading, options, top))
    if code:
        raise typer.Exit(code)
