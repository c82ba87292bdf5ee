"""Lines for people, on a console that may not know every character."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, line: str) -> None:
    """One line, whatever is in it: not folded, so that paths can be copied, and printable."""
    text = " ".join(line.split())
    text = text.encode(console.encoding or "utf-8", "replace").decode(console.encoding or "utf-8")
    console.print(text, markup=False, soft_wrap=True)
