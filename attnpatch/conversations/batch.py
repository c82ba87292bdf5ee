"""Analyses many conversations into one file each. A killed run can be resumed, and several processes can share one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from attnpatch.api import capture, patched
from attnpatch.blocks.heads import chosen_heads
from attnpatch.blocks.spec import Blocks
from attnpatch.conversations.analyzer import BlockAttentionAnalyzer
from attnpatch.conversations.passes import text_config
from attnpatch.conversations.reading.files import Conversation, RejectedRecord, read_conversations
from attnpatch.conversations.result import Analysis
from attnpatch.conversations.results_folder import RunFolder
from attnpatch.errors import AnalysisError, AttnpatchError, in_one_line
from attnpatch.maps import io

METHODS = {
    "sequential": "analyze_conversation_sequential",
    "chunked": "analyze_conversation_chunked",
    "single pass": "analyze_conversation",
}
Outcome = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class Step:
    """The outcome of one conversation.

    Attributes:
        outcome: ``"done"``, ``"skipped"`` (done in an earlier run) or ``"failed"``.
        entry: Its line of the index.
        analysis: The result, if it was done in this run.
    """

    outcome: Outcome
    entry: Mapping[str, Any]
    analysis: Analysis | None = None


@dataclass(frozen=True)
class Summary:
    """The outcomes of many conversations.

    Attributes:
        done, skipped: How many were analysed in this run, and in earlier ones.
        failed: One line ``"file record: reason"`` per failure.
        tokens, seconds: Totals of the conversations that were done in this run.
        peak_bytes: The most bytes that any of them took.
    """

    done: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def with_step(self, step: Step) -> Summary:
        """The summary with one more conversation."""
        if step.outcome == "failed":
            line = f"{step.entry['source']}: {step.entry['error']}"
            return dataclasses.replace(self, failed=(*self.failed, line))
        if step.outcome == "skipped":
            return dataclasses.replace(self, skipped=self.skipped + 1)
        entry = step.entry
        one = Summary(1, 0, (), entry["tokens"], entry["seconds"], entry["peak_bytes"])
        return self + one

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.done + other.done, self.skipped + other.skipped, self.failed + other.failed,
            self.tokens + other.tokens, self.seconds + other.seconds, max(self.peak_bytes, other.peak_bytes),
        )  # fmt: skip


def analyze_file(
    analyzer: BlockAttentionAnalyzer,
    path: str | Path,
    folder: str | Path,
    **options: Any,
) -> Summary:
    """Analyse the conversations of a JSON or JSONL file, one safetensors file each; see ``analyze_all``.

    Raises:
        AnalysisError: The file cannot be read; and as ``analyze_all``.
    """
    return analyze_all(analyzer, read_conversations(path), folder, **options)


def analyze_all(
    analyzer: BlockAttentionAnalyzer,
    records: Iterable[Conversation | RejectedRecord],
    folder: str | Path,
    *,
    method: str = "sequential",
    resume: bool = False,
    normalize: str | None = None,
    on_progress: Callable[[Step], None] = lambda step: None,
    shard: tuple[int, int] = (0, 1),
    options: Mapping[str, Any] | None = None,
) -> Summary:
    """Analyse conversations, and write ``folder/<name>.safetensors`` for each, atomically.

    ``folder/index.jsonl`` has one line per conversation, in order: ``record`` (its number), ``source``, ``name``,
    ``file``, ``tokens``, ``messages``, ``seconds``, ``peak_bytes``, ``method``, ``notes``; or ``error``. A process
    that is killed loses only its current conversation, and with ``resume`` no conversation is analysed twice. If no
    conversation could be analysed, the index and the folder are removed (with several processes the caller does that,
    by ``results_folder.discard``).

    Args:
        analyzer: Model and options.
        records: Conversations, as ``read_conversations`` yields them.
        folder: Folder for the results.
        method: ``"sequential"``, ``"chunked"`` or ``"single pass"``.
        resume: Continue in a folder with the same options; failed conversations are tried again.
        normalize: As ``analyze_conversation`` takes it.
        on_progress: Called after each conversation of this process.
        shard: This process's number and the number of processes; it takes the records i with i % count == number.
        options: Further options that the results depend on, such as how the model was loaded; kept in ``run.json``.

    Returns:
        ``Summary`` of this process's conversations.

    Raises:
        AnalysisError: The folder has results already (without ``resume``), or results of other options; or the folder
            or the file cannot be used.
        BlockMapFileError: A result cannot be written.
    """
    if method not in METHODS:
        raise AnalysisError(f"method={method!r} is not accepted; give {', '.join(map(repr, METHODS))}")
    rank, count = shard
    if not 0 <= rank < count:
        raise AnalysisError(f"shard={shard!r} is not accepted; give (number from 0, count)")
    check(analyzer, method)
    normalize = normalize or "none"
    chosen = {**dataclasses.asdict(analyzer.options), "method": method, "normalize": normalize}
    chosen = {**chosen, "model": analyzer.name, **(options or {})}
    run = RunFolder(Path(folder), chosen, resume, shard)
    summary = Summary()
    try:
        for number, record in enumerate(records):
            if number % count != rank:
                continue
            if isinstance(record, RejectedRecord):
                entry = {"record": number + 1, "source": record.source, "error": record.reason}
                step = Step("failed", entry)
            else:
                step = _one(analyzer, run, number + 1, record, method, normalize)
            run.append(step.entry)
            summary = summary.with_step(step)
            on_progress(step)
        run.merge()
    finally:
        run.close()
        if count == 1:
            run.discard()
    return summary


def check(analyzer: BlockAttentionAnalyzer, method: str) -> None:
    """Check that the options fit the model, so that a misfit is not reported as every conversation's failure.

    Raises:
        AnalysisError, CaptureError, PatchError, PolicyError: They do not.
    """
    options, model = analyzer.options, analyzer.model
    if options.weighting == "gradient" and method != "single pass":
        raise AnalysisError("weighting='gradient' needs a single pass; give method='single pass'")
    with patched(model, **analyzer.policy), capture(model, Blocks.fixed(1), **options.of_capture):
        pass
    num_heads = getattr(text_config(model), "num_attention_heads", None)
    if isinstance(num_heads, int) and options.heads not in ("mean", "all"):
        chosen_heads(options.heads, num_heads)


def _one(
    analyzer: BlockAttentionAnalyzer,
    run: RunFolder,
    number: int,
    conversation: Conversation,
    method: str,
    normalize: str,
) -> Step:
    """Analyse one conversation, unless its file exists."""
    path = run.path(conversation.name)
    about = {"record": number, "source": conversation.source, "name": conversation.name}
    digest = _digest(conversation)
    run.clear(conversation.name)
    facts = io.facts(path) if path.exists() else None
    if facts is not None:
        found = facts.get("metadata", {}).get("conversation", {})
        if found.get("digest") != digest:
            reason = f"{path.name} has another conversation of the same name; give another folder"
            return Step("failed", {**about, "error": reason})
        known = run.entries.get(conversation.name, {})
        return Step("skipped", known if known.get("file") == path.name else _entry(about, path, facts))
    try:
        analysis = _analyzed(analyzer, conversation, method, normalize)
    # One failure among thousands must not stop the others; its line in the index has the reason.
    except AttnpatchError as error:
        return Step("failed", {**about, "error": _line(error)})
    except Exception as error:
        return Step("failed", {**about, "error": f"{type(error).__name__}: {_line(error)}"})
    what = {**about, "messages": len(conversation.messages), "digest": digest}
    facts = {**analysis.block_map.metadata, "conversation": what}
    block_map = dataclasses.replace(analysis.block_map, metadata=facts)
    analysis = dataclasses.replace(analysis, block_map=block_map)
    analysis.save(path)
    written = io.facts(path)
    if written is None:
        raise AnalysisError(f"{path} was written but cannot be read; check the disk")
    return Step("done", _entry(about, path, written), analysis)


def _analyzed(
    analyzer: BlockAttentionAnalyzer, conversation: Conversation, method: str, normalize: str
) -> Analysis:
    options: dict[str, Any] = {}
    if conversation.tools:
        options["template_options"] = {**analyzer.options.template_options, "tools": conversation.tools}
    return getattr(analyzer, METHODS[method])(conversation.messages, normalize, **options)


def _entry(about: Mapping[str, Any], path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the index. It is made from the file's header only, so it is the same whenever it is made again."""
    metadata, taken = facts["metadata"], facts["analysis"]
    return {
        **about,
        "file": path.name,
        "tokens": metadata["tokens"],
        "messages": metadata["conversation"]["messages"],
        "seconds": taken["seconds"],
        "peak_bytes": taken["peak_bytes"],
        "method": metadata["method"],
        "notes": taken["notes"],
    }


def _digest(conversation: Conversation) -> str:
    """A hash of messages and tools, to detect that the input file has changed before a run is resumed."""
    said = json.dumps([conversation.messages, conversation.tools], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _line(error: BaseException) -> str:
    return in_one_line(error, 500) or "no reason was given"
