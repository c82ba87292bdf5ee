"""``attnpatch analyze``: defines and checks its options; ``attnpatch.cli.run_analyze`` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attnpatch.errors import UsageError
from attnpatch.policy import check_words
from attnpatch.sizes import parse_size

EXIT_CODES = "Exit code: 0 all analysed; 1 nothing could be done; 2 usage; 3 some conversations failed."


# Options that ``attnpatch replay`` has too.
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue in DIR; skip what is done.")]
Use4Bit = Annotated[bool, typer.Option("--use-4bit", help="Weights in 4 bits (bitsandbytes).")]
SinglePass = Annotated[
    bool,
    typer.Option("--single-pass", help="Run a whole conversation at once: faster if it fits in memory."),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="float32, bfloat16 or float16; the checkpoint's if not given."),
]
DeviceMap = Annotated[
    str | None, typer.Option(metavar="MAP", help="auto (spread the model over devices), cpu, cuda:1.")
]
Layers = Annotated[str, typer.Option(metavar="LIST", help="all, last, or a list such as 0,5,-1.")]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="SIZES", help="Limit per device, such as 0=20GiB,cpu=60GiB.")
]


def analyze(
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder of the model, or its name on the hub.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Conversations, as JSON or JSONL.")
    ] = None,
    out: Out = Path("attention_maps"),
    mode: Annotated[
        Literal["real", "demo"],
        typer.Option(help="demo: use the small model and the conversation that attnpatch ships."),
    ] = "real",
    resume: Resume = False,
    use_4bit: Use4Bit = False,
    use_8bit: Annotated[bool, typer.Option("--use-8bit", help="Weights in 8 bits (bitsandbytes).")] = False,
    use_gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--use-gradient-checkpointing",
            help="Save memory in the backward pass; only --weighting gradient runs one.",
        ),
    ] = False,
    use_sampling: Annotated[
        bool, typer.Option("--use-sampling", help="Measure only a sample of each block's query rows.")
    ] = False,
    sample_rows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --use-sampling: rows per block; 16 if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**63, help="Seed of the sample.")] = 0,
    use_chunked: Annotated[
        bool, typer.Option("--use-chunked", help="Run chunks of one size instead of one message at a time.")
    ] = False,
    chunk_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens per chunk; 2048 if not given.")
    ] = None,
    single_pass: SinglePass = False,
    blocks: Annotated[
        str, typer.Option(metavar="KIND", help="messages, words, or tokens per block, such as 128.")
    ] = "messages",
    layers: Layers = "all",
    heads: Annotated[
        str, typer.Option(metavar="LIST", help="mean, all (each head kept), or a list such as 0,5,-1.")
    ] = "mean",
    head_chunk_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Heads per step when attention runs by rows.")
    ] = None,
    normalize: Annotated[
        Literal["none", "row", "density", "column"],
        typer.Option(help="How to normalise maps."),
    ] = "none",
    weighting: Annotated[
        Literal["probability", "gradient"],
        typer.Option(help="gradient: multiply by the gradient of the answer's log-probability."),
    ] = "probability",
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Longest conversation; the model's own limit if not given."),
    ] = None,
    truncate: Annotated[
        Literal["left", "right"] | None,
        typer.Option(help="Cut longer conversations at this end; refused if not given."),
    ] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    pictures: Annotated[
        bool | None,
        typer.Option(
            "--pictures/--no-pictures", help="Draw every result. If not given: draw if FILE holds only one."
        ),
    ] = None,
) -> None:
    # The exit codes are in the help's epilog, which is passed where the command is registered.
    """Show which message attends to which: write a block map for every conversation of a file, and an index.

    accelerate launch -m attnpatch analyze ... divides the conversations among processes.
    """
    if mode == "demo" and (model is not None or json is not None):
        raise UsageError("--mode demo brings its model and conversation; leave out --model and --json")
    if mode == "real" and (model is None or json is None):
        missing = "--model" if model is None else "--json"
        raise UsageError(f"{missing} is missing; give --model PATH --json FILE, or --mode demo")
    if use_4bit and use_8bit:
        raise UsageError("--use-4bit and --use-8bit were both given; choose one")
    method = _method(use_chunked, single_pass, weighting)
    if sample_rows is not None and not use_sampling:
        raise UsageError("--sample-rows is given without --use-sampling; add it")
    if chunk_size is not None and not use_chunked:
        raise UsageError("--chunk-size is given without --use-chunked; add it")
    options: dict[str, Any] = {
        "blocks": _blocks(blocks),
        "layers": chosen_layers(layers),
        "heads": heads if heads in ("all", "mean") else _numbers("--heads", heads, "mean, all"),
        "weighting": weighting,
        "seed": seed,
        "max_tokens": max_tokens,
        "truncate": truncate,
    }
    if use_sampling:
        options["sample_rows"] = 16 if sample_rows is None else sample_rows
    if chunk_size is not None:
        options["chunk_size"] = chunk_size
    loading: dict[str, Any] = {
        "load_in_4bit": use_4bit,
        "load_in_8bit": use_8bit,
        "torch_dtype": chosen_dtype(dtype),
        "device_map": device_map,
        "max_memory": None if max_memory is None else sizes("--max-memory", max_memory),
        "use_gradient_checkpointing": use_gradient_checkpointing,
        "head_chunk_size": head_chunk_size,
    }
    from attnpatch.cli.run_analyze import Task, run_task

    task = Task(model, json, out, method, normalize, resume, pictures, loading, options)
    code = run_task(task)
    if code:
        raise typer.Exit(code)


def _method(use_chunked: bool, single_pass: bool, weighting: str) -> str:
    if use_chunked and single_pass:
        raise UsageError("--use-chunked and --single-pass were both given; choose one")
    if weighting == "gradient":
        if use_chunked:
            raise UsageError("--weighting gradient needs a single pass; leave out --use-chunked")
        return "single pass"
    if use_chunked:
        return "chunked"
    return "single pass" if single_pass else "sequential"


def _blocks(text: str) -> str | int:
    if text in ("messages", "words"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(f"--blocks {text}: give messages, words, or tokens per block, such as 128")


def chosen_dtype(text: str | None) -> str | None:
    """The text of ``--dtype``.

    Raises:
        UsageError: It names no dtype of weights.
    """
    if text is not None and text not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {text}: give float32, bfloat16 or float16")
    return text


def chosen_layers(text: str) -> str | list[int]:
    """The text of ``--layers`` as the option ``layers`` takes it.

    Raises:
        UsageError: It names no layers.
    """
    return text if text in ("all", "last") else _numbers("--layers", text, "all, last")


def _numbers(option: str, text: str, words: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: give {words}, or whole numbers such as 0,5,-1") from None


def sizes(option: str, text: str) -> dict[int | str, int]:
    """The text ``0=20GiB,cpu=60GiB`` as the dict of bytes that transformers takes.

    Raises:
        UsageError, PolicyError: The text does not have this form.
    """
    found: dict[int | str, int] = {}
    for part in text.split(","):
        device, separator, size = (piece.strip() for piece in part.partition("="))
        if not separator or not device or not (device.isdecimal() or device in ("cpu", "disk", "mps")):
            raise UsageError(f"{option} {text}: give devices and sizes, such as 0=20GiB,cpu=60GiB")
        count = parse_size(size, f"{option} {device}")
        check_words(f"{option} {device}", size, count)
        found[int(device) if device.isdecimal() else device] = count
    return found
