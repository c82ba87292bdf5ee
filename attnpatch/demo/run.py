"""``attnpatch demo``: measure time and memory, find the message the answer attends to, print and draw both."""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import attnpatch
from attnpatch.demo.conversation import DemoConversation, Message
from attnpatch.demo.worker import DemoError, Measured, load, measure_all, show_runs
from attnpatch.errors import MissingExtraError
from attnpatch.maps.block_map import BlockMap
from attnpatch.plotting import map_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parent
SNIPPET = """\
import attnpatch
attnpatch.apply(model)  # attention runs by rows when memory is short
with attnpatch.capture(model, blocks=attnpatch.Blocks.fixed(128)) as maps:
    model(**inputs)  # any call; then: maps.block_map.plot("map.png")"""

_SHOWN = 3
_DRAWN = 8
_MAX_NEW_TOKENS = 12
_FACT_COLOUR, _OTHER_COLOUR = "#d95f02", "#7f8fa6"


@dataclass(frozen=True)
class Finding:
    """Which messages the answer attends to.

    Attributes:
        reply: The model's answer.
        block_map: One block per message; the last one is the answer.
        layer: The layer that ``mass`` is from.
        mass: ``[messages before the answer]``, the share of the answer's attention on each, averaged over heads.
    """

    reply: str
    block_map: BlockMap
    layer: int
    mass: torch.Tensor

    @property
    def strongest(self) -> int:
        """The message with the largest share."""
        return int(self.mass.argmax())


def run_demo(
    out: Path,
    json_file: Path | None = None,
    console: Console | None = None,
    model_folder: Path = FOLDER / "model",
    conversation_file: Path = FOLDER / "conversation.json",
) -> None:
    """Run the whole demo.

    Args:
        out: Folder for the pictures and the block map; created if it does not exist.
        json_file: File for all figures, or None.
        console: Where to print; standard output by default.
        model_folder: A model and a tokenizer of transformers.
        conversation_file: A file that ``DemoConversation.save`` wrote.

    Raises:
        DemoError: The output cannot be written (checked first), a part of the demo is missing, or one of its
            processes failed.
        MissingExtraError: transformers or matplotlib is not installed.
        OSError: A file could not be written although the check passed.
    """
    check_installed()
    check_output(out, json_file)
    for needed in (model_folder / "config.json", conversation_file):
        if not needed.is_file():
            raise DemoError(f"a part of the demo is missing: {needed}; install attnpatch again")
    console = console or Console(highlight=False)
    conversation = DemoConversation.load(conversation_file)
    model, tokenizer = load(model_folder, "sdpa")
    introduce(console, model, tokenizer, conversation)
    runs = measure_all(console, model_folder, conversation_file)
    show_runs(console, runs)
    finding = look(model, tokenizer, conversation, trained_layer(model_folder))
    tell(console, conversation, finding)
    written = write(out, conversation, finding)
    if json_file is not None:
        json_file.write_text(json.dumps(figures_of(conversation, runs, finding), indent=1) + "\n")
        written["all figures"] = json_file
    close(console, written)


def check_installed() -> None:
    """Check that the needed extras are installed.

    Raises:
        MissingExtraError: One is missing.
    """
    for name in ("transformers", "matplotlib"):
        # find_spec imports nothing: transformers takes seconds, and a bad option should be reported at once.
        with contextlib.suppress(ImportError):
            if importlib.util.find_spec(name) is not None:
                continue
        raise MissingExtraError(f'the demo needs {name}: pip install "attnpatch[transformers,plot,cli]"')


def check_output(out: Path, json_file: Path | None) -> None:
    """Create the folder, and check that files can be written to it.

    Raises:
        DemoError: They cannot.
    """
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out} is a file; give a folder, or a name that is not taken")
    if json_file is not None and json_file.is_dir():
        raise DemoError(f"--json {json_file} is a folder; give the name of a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for folder in (out, *([json_file.parent] if json_file else [])):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        where = f"--json {json_file}" if json_file and out.is_dir() else f"--out {out}"
        raise DemoError(f"cannot write {where}: {error.strerror}; give another path") from error


def introduce(console: Console, model: Any, tokenizer: Any, conversation: DemoConversation) -> None:
    """Print what the demo works on."""
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    tokens = len(tokenizer.apply_chat_template(conversation.with_answer())["input_ids"])
    console.print(
        f"A {type(model).__name__} of {parameters:.1f} million parameters, trained to recall facts from a "
        f"conversation; and a conversation of {tokens:,} tokens in {len(conversation.messages)} messages."
    )
    console.print("\n1. Attention a few rows at a time", style="bold")
    console.print(
        "Each run is a forward pass over the conversation in a fresh process: with the model as it is "
        '(native), or after attnpatch.apply(model, mode="always") (by rows).\n'
    )


def trained_layer(model_folder: Path) -> int | None:
    """The layer that the model's evaluation chose on other conversations; None if there is no evaluation."""
    try:
        return int(json.loads((model_folder / "evaluation.json").read_text(encoding="utf-8"))["layer"])
    except (FileNotFoundError, KeyError):
        return None


@torch.inference_mode()
def look(model: Any, tokenizer: Any, conversation: DemoConversation, layer: int | None) -> Finding:
    """Let the model answer, and capture which messages the answer attends to."""
    inputs = tokenizer.apply_chat_template(
        conversation.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    reply = tokenizer.decode(new, skip_special_tokens=True).strip()
    messages = [*conversation.messages, {"role": "assistant", "content": reply or conversation.answer}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    with attnpatch.capture(model, blocks=attnpatch.Blocks.messages(tokenizer, messages)) as maps:
        model(**ids, use_cache=False)
    block_map = maps.block_map
    answer = block_map.mass[:, -1, :-1]
    if layer is None:
        # The question is excluded, because every answer attends to it.
        layer = int(answer[:, :-1].max(dim=1).values.argmax())
    return Finding(reply, block_map, layer, answer[layer])


def tell(console: Console, conversation: DemoConversation, finding: Finding) -> None:
    """Print question, answer and the messages that the answer attends to most."""
    messages, mass, fact = conversation.messages, finding.mass, conversation.fact_message
    console.print("\n2. Where the answer's attention goes", style="bold")
    right = finding.reply == conversation.answer
    lines = {
        f"message {len(messages) - 1} asks": messages[-1]["content"],
        "the model answers": finding.reply or "(nothing)",
        "expected": "the same" if right else conversation.answer,
    }
    for name, text in lines.items():
        console.print(f"{name:<18}  {text}", markup=False)
    console.print(f"\nMost attended to by the answer (layer {finding.layer}, mean over heads):")
    for index in mass.topk(min(_SHOWN, len(mass))).indices.tolist():
        text = textwrap.indent(beginning(messages, index, 68), " " * 10)
        console.print(f"  {mass[index]:6.1%}{text[8:]}", markup=False)
    console.print(f"\n{verdict(finding, fact)}", style="bold")


def verdict(finding: Finding, fact: int) -> str:
    """A sentence that says whether the message with the largest share is the one with the fact."""
    if finding.strongest == fact:
        return f"Message {fact} is the one that holds the fact."
    return f"That is not the message that holds the fact: message {fact} gets {finding.mass[fact]:.1%}."


def beginning(messages: list[Message], index: int, width: int) -> str:
    """A message's number, role and beginning, on at most two lines."""
    message = messages[index]
    text = f"{index} {message['role']}: {' '.join(message['content'].split())}"
    return textwrap.fill(text, width, max_lines=2, placeholder=" ...")


def write(out: Path, conversation: DemoConversation, finding: Finding) -> dict[str, Path]:
    """Write the pictures and the block map; returns their paths by description."""
    title = f"layer {finding.layer}, mean over heads; the answer is the last row"
    return {
        "the answer, drawn": draw_answer(conversation, finding, out / "answer.png"),
        "all messages, drawn": finding.block_map.plot(
            out / "block_map.png", layer=finding.layer, title=title
        ),
        "the block map": finding.block_map.save(out / "block_map.safetensors"),
    }


def draw_answer(conversation: DemoConversation, finding: Finding, path: Path) -> Path:
    """Draw the answer's row of the block map as bars: all messages, and below the strongest ones with their text."""
    figure = map_figure.new_figure(11, 7)
    question = textwrap.shorten(conversation.messages[-1]["content"], 70, placeholder=" ...")
    figure.suptitle(f'"{question}"  "{finding.reply}"', fontsize=12, parse_math=False)
    # Two subfigures: in one grid, the upper bars would be aligned with the lower ones, right of the long labels.
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    colours = [_OTHER_COLOUR] * len(finding.mass)
    colours[conversation.fact_message] = _FACT_COLOUR
    _draw_all(upper.subplots(), finding, conversation.fact_message, colours)
    _draw_strongest(lower.subplots(), conversation, finding, colours)
    figure.savefig(path, dpi=150)
    return path


def _draw_all(axes: "Axes", finding: Finding, fact: int, colours: list[str]) -> None:
    count = len(finding.mass)
    axes.bar(range(count), finding.mass, color=colours, width=1.0)
    axes.set_xlim(-1, count)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("message of the conversation (the last one asks)")
    axes.set_ylabel("share of attention")
    axes.set_title("What the answer attends to, by message", fontsize=10, loc="left")
    # The text is beside the bar, on the side with more room.
    left = fact > count / 2
    axes.annotate(
        f"message {fact} holds the fact",
        (fact, finding.mass[fact]),
        xytext=(-8 if left else 8, 4),
        textcoords="offset points",
        ha="right" if left else "left",
        color=_FACT_COLOUR,
    )


def _draw_strongest(
    axes: "Axes", conversation: DemoConversation, finding: Finding, colours: list[str]
) -> None:
    values, order = finding.mass.topk(min(_DRAWN, len(finding.mass)))
    names = [beginning(conversation.messages, index, 64) for index in order.tolist()]
    bars = axes.barh(range(len(names)), values, color=[colours[index] for index in order.tolist()])
    axes.bar_label(bars, [f"{value:.1%}" for value in values.tolist()], padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=8.5, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"share of attention (layer {finding.layer}, mean over heads)")


def figures_of(conversation: DemoConversation, runs: list[Measured], finding: Finding) -> dict[str, Any]:
    """All figures of the demo, for JSON."""
    return {
        "tokens": finding.block_map.metadata["tokens"],
        "messages": len(conversation.messages),
        "runs": [dataclasses.asdict(run) for run in runs],
        "question": conversation.messages[-1]["content"],
        "expected": conversation.answer,
        "answer": finding.reply,
        "exact": finding.reply == conversation.answer,
        "layer": finding.layer,
        "fact_message": conversation.fact_message,
        "strongest_message": finding.strongest,
        "strongest_is_fact": finding.strongest == conversation.fact_message,
        "mass": [round(share, 6) for share in finding.mass.tolist()],
    }


def close(console: Console, written: dict[str, Path]) -> None:
    """Print what was written, and code for the user's own model."""
    console.print("\nWritten:", style="bold")
    for name, path in written.items():
        # A wrapped path cannot be copied.
        console.print(f"  {name:<20} {path}", markup=False, soft_wrap=True)
    console.print("\nTo go on:", style="bold")
    for command, what in next_commands(written):
        console.print(f"  {command}", markup=False, soft_wrap=True)
        console.print(f"      {what}", markup=False)
    console.print("\nThe same for your model:", style="bold")
    console.print(textwrap.indent(SNIPPET, "  "), markup=False, soft_wrap=True)


def next_commands(written: dict[str, Path]) -> list[tuple[str, str]]:
    """Commands for what to try next, as they can be pasted, each with what it does."""
    # The demo is often run as .venv/bin/attnpatch, while the environment is not active.
    started = sys.argv[0] if Path(sys.argv[0]).name == "attnpatch" else f"{sys.executable} -m attnpatch"
    program = "attnpatch" if shutil.which("attnpatch") else started
    block_map, model = written["the block map"], FOLDER / "model"
    page = block_map.with_suffix(".html")
    return [
        (f"{program} view {block_map} --out {page}", "the map as a page: open it in a browser"),
        (f"{program} analyze --mode demo --out maps", "maps of some conversations: pictures, a page, tables"),
        (
            f"{program} explain {model} --seq-len 32768",
            "the memory that a model would take, before it is loaded",
        ),
    ]
