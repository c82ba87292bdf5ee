"""Many conversations, one file each; resumed after a kill, and shared among processes."""

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
    """One conversation is through.

    Attributes:
        outcome: ``"done"``, ``"skipped"`` (it was done before) or ``"failed"``.
        entry: Its line of the index.
        analysis: Of one that was done now.
    """

    outcome: Outcome
    entry: Mapping[str, Any]
    analysis: Analysis | None = None


@dataclass(frozen=True)
class Summary:
    """What became of the conversations.

    Attributes:
        done, skipped: How many were analysed now, and before.
        failed: Lines ``"file record: reason"``.
        tokens, seconds: Of those done now, together.
        peak_bytes: The most that one of them took.
    """

    done: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def with_step(self, step: Step) -> Summary:
        """With one conversation more."""
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
    """Analyse conversations, and write ``folder/<name>.safetensors`` of each, whole or not at all.

    ``folder/index.jsonl`` has one line per conversation, in order: ``record`` (its number), ``source``, ``name``,
    ``file``, ``tokens``, ``messages``, ``seconds``, ``peak_bytes``, ``method``, ``notes``; or ``error``. A process
    that is killed at any moment loses the conversation it was at, and with ``resume`` nothing is done twice. Where no
    conversation could be analysed, no index and no folder is left (of several processes: see ``index.discard``).

    Args:
        analyzer: Model and options.
        records: As ``read_conversations`` yields them.
        folder: For the results.
        method: ``"sequential"``, ``"chunked"`` or ``"single pass"``.
        resume: Go on in a folder of the same options; what failed is tried again.
        normalize: As ``analyze_conversation`` takes it.
        on_progress: Called after each conversation of this process.
        shard: Number of this process and how many there are: it takes records i with i % count == number.
        options: More that the results depend on, such as how the model was loaded; kept in ``run.json``.

    Returns:
        ``Summary`` of this process's conversations.

    Raises:
        AnalysisError: The folder holds results already (without ``resume``), or those of other options; the folder
            or the file cannot be used.
        BlockMapFileError: A result cannot be written.
    """
    if method not in METHODS:
        raise AnalysisError(f"method={method!r} is not accepted; give {', '.join(map(repr, METHODS))}")
    rank, count = shard
    if not 0 <= rank < count:
        raise AnalysisError(f"shard={shard!r} is not accepted; give the process's number, below their count")
    check(analyzer, method)
    normalize = analyzer.options.normalization(normalize)
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
    """See that the model has what the options name, before any conversation is blamed for it.

    Raises:
        AnalysisError, CaptureError, PatchError, PolicyError: It has not.
    """
    options, model = analyzer.options, analyzer.model
    if options.weighting == "gradient" and method != "single pass":
        raise AnalysisError("weighting='gradient' needs a single pass; ask for that method")
    with patched(model, **analyzer.policy), capture(model, Blocks.fixed(1), **options.of_capture):
        pass
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_heads = getattr(config, "num_attention_heads", None)
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
    """One conversation, unless its file is there."""
    path = run.path(conversation.name)
    about = {"record": number, "source": conversation.source, "name": conversation.name}
    digest = _digest(conversation)
    run.clear(conversation.name)
    facts = io.facts(path) if path.exists() else None
    if facts is not None:
        found = facts.get("metadata", {}).get("conversation", {})
        if found.get("digest") != digest:
            reason = f"{path.name} is of another conversation of this name; give another folder"
            return Step("failed", {**about, "error": reason})
        known = run.entries.get(conversation.name, {})
        return Step("skipped", known if known.get("file") == path.name else _entry(about, path, facts))
    try:
        analysis = _analyzed(analyzer, conversation, method, normalize)
    # Whatever goes wrong with one of thousands, the others go on; its line says what it was.
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
        raise AnalysisError(f"{path} was written and cannot be read; is the disk sound?")
    return Step("done", _entry(about, path, written), analysis)


def _analyzed(
    analyzer: BlockAttentionAnalyzer, conversation: Conversation, method: str, normalize: str
) -> Analysis:
    options: dict[str, Any] = {}
    if conversation.tools:
        options["template_options"] = {**analyzer.options.template_options, "tools": conversation.tools}
    return getattr(analyzer, METHODS[method])(conversation.messages, normalize, **options)


def _entry(about: Mapping[str, Any], path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the index, from the file's header alone: it is the same whoever writes it, and when."""
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
    """Of what was said: a file may have changed before a run is resumed."""
    said = json.dumps([conversation.messages, conversation.tools], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _line(error: BaseException) -> str:
    return in_one_line(error, 500) or "no reason was given"
