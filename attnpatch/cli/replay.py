"""``attnpatch replay``: what a served model looked at, from the log of its server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attnpatch.cli.analyze import (
    DeviceMap,
    Dtype,
    Layers,
    MaxMemory,
    Out,
    Resume,
    SinglePass,
    Use4Bit,
    chosen_dtype,
    chosen_layers,
    sizes,
)


def replay(
    model: Annotated[
        str, typer.Option(metavar="PATH", help="The served model: its folder, or its name on the hub.")
    ],
    transcript: Annotated[
        Path, typer.Option(metavar="FILE", help="The log: requests with their responses, as JSON or JSONL.")
    ],
    out: Out = Path("attention_maps"),
    top: Annotated[
        int, typer.Option(metavar="N", min=0, help="Messages to list for each answer; 0 lists none.")
    ] = 3,
    resume: Resume = False,
    layers: Layers = "all",
    single_pass: SinglePass = False,
    use_4bit: Use4Bit = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
) -> None:
    """Show what the answers in a server's log attend to. The server is not touched.

    Each request is run through the model again, followed by the logged answer (teacher forcing). Logs of OpenAI's chat and
    responses API and of its batches are read. Results are written as those of attnpatch analyze.
    """
    from attnpatch.cli.run_analyze import Task, run_task

    loading: dict[str, Any] = {
        "load_in_4bit": use_4bit,
        "load_in_8bit": False,
        "torch_dtype": chosen_dtype(dtype),
        "device_map": device_map,
        "max_memory": None if max_memory is None else sizes("--max-memory", max_memory),
        "use_gradient_checkpointing": False,
        "head_chunk_size": None,
    }
    options = {
        "blocks": "messages",
        "layers": chosen_layers(layers),
        "heads": "mean",
        "weighting": "probability",
        "seed": 0,
    }
    method = "single pass" if single_pass else "sequential"
    code = run_task(Task(model, transcript, out, method, "none", resume, None, loading, options, top))
    if code:
        raise typer.Exit(code)
