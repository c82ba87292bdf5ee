"""The report that ``ATTNPATCH_REPORT=1`` prints when the script ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnpatch.reporting import report_of

if TYPE_CHECKING:
    from attnpatch.activation.session import Session


def closing_lines(session: Session) -> Iterator[str]:
    """The report of every model that ran, and a line for each other kind of event (models never called, ...)."""
    used = [(patch, 1) for patch in session.patches.values() if patch.was_used]
    for patch, number in (*session.gone.values(), *used):
        if number > 1:
            yield f"attnpatch: {number} models of this kind, added up:"
        yield f"attnpatch: {report_of(patch)}"
    idle = Counter(patch.model_kind for patch in session.patches.values() if not patch.was_used)
    idle.update(session.never_called)
    if idle:
        kinds = ", ".join(kind if number == 1 else f"{kind} x{number}" for kind, number in idle.items())
        yield f"attnpatch: {_counted(idle.total(), 'model')} built and never called: {kinds}"
    elif not used and not session.gone:
        yield "attnpatch: no model with attention was built"
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
