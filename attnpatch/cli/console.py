"""Prints lines for people, on a console whose encoding may lack some characters."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, line: str) -> None:
    """Print ``line`` as one line, unwrapped so that paths can be copied; unprintable characters are replaced."""
    text = " ".join(line.split())
    text = text.encode(console.encoding or "utf-8", "replace").decode(console.encoding or "utf-8")
    console.print(text, markup=False, soft_wrap=True)
