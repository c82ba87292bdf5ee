"""The report that ``ATTNPATCH_REPORT=1`` prints when the script ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnpatch.activation.kinds import added_up
from attnpatch.activation.stderr import seen_in_words
from attnpatch.reporting import report_of
from attnpatch.standins import finder

if TYPE_CHECKING:
    from attnpatch.activation.session import Session
    from attnpatch.patching.patch import Patch


def closing_lines(session: Session) -> Iterator[str]:
    """The report of every model that ran, and a line for each other kind of event (models never called, ...)."""
    used = [patch for patch in session.patches.values() if patch.was_used]
    # A script may call the layers of a model one by one; then each layer counts as a separate model.
    alike: dict[Any, tuple[Patch, int]] = {}
    for patch in used:
        if patch in session.plain.patches:
            added_up(alike, patch)
    apart = [(patch, 1) for patch in used if patch not in session.plain.patches]
    for patch, number in (*session.gone.values(), *apart, *alike.values()):
        if number > 1:
            yield f"attnpatch: {number} models of this kind, added up:"
        yield f"attnpatch: {report_of(patch)}"
    outside = finder.used()
    yield from (f"attnpatch: {report_of(patch)}" for patch in outside)
    idle = Counter(patch.model_kind for patch in session.patches.values() if not patch.was_used)
    idle.update(session.never_called)
    if idle:
        kinds = ", ".join(kind if number == 1 else f"{kind} x{number}" for kind, number in idle.items())
        yield f"attnpatch: {_counted(idle.total(), 'model')} built and never called: {kinds}"
    elif not used and not session.gone and not outside:
        yield session.nothing_seen
    yield from seen_in_words(session.plain.seen, session.plain.parts)
    if session.counts["without"]:
        yield f"attnpatch: {_counted(session.counts['without'], 'model')} without attention"
    if session.counts["unpatched"]:
        yield f"attnpatch: {_counted(session.counts['unpatched'], 'model')} could not be patched"
    if session.settings.capture is not None:
        left_out = session.counts["not captured"]
        more = f", {left_out} could not be captured" if left_out else ""
        yield f"attnpatch: {_counted(session.written, 'sequence')} captured in {session.settings.capture}{more}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
