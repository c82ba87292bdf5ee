"""``attnpatch doctor``: prints what was found on one screen."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnpatch import __version__
from attnpatch.activation.examination import CALLS, Findings, examination
from attnpatch.policy import Policy


def examine() -> bool:
    """Print what was found.

    Returns:
        Whether nothing is wrong.
    """
    found = examination()
    show(Console(), found)
    return not found.wrong


def show(console: Console, found: Findings) -> None:
    """Print the findings: versions, memory, activation, policy, kernels, then each problem with its fix."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1)
    table.add_row("versions", _versions(found))
    for i, (name, free, total) in enumerate(found.devices):
        table.add_row(
            "memory" if i == 0 else "", f"{escape(name)}: {free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
        )
    table.add_row("start-up file", f"in {escape(found.folder)}" if found.folder else "not installed")
    seen = "becomes active with ATTNPATCH=1" if found.is_seen else "does not become active with ATTNPATCH=1"
    table.add_row("", f"a fresh interpreter {seen}")
    table.add_row("", f"this process is {'active' if found.is_active else 'not active'}")
    listed = [escape(f"{name}={value}") for name, value in found.variables.items()]
    table.add_row("variables", ", ".join(listed) or "none set")
    if found.policy is not None:
        table.add_row("policy", _policy(found.policy))
    packages = [escape(f"{name}: {what}") for name, what in found.packages.items()]
    table.add_row("kernel packages", "; ".join(packages))
    console.print(table)
    if found.kernels:
        console.print(_kernels(found))
    for note in found.notes:
        console.print(f"[bold yellow]note[/]  {escape(note)}", highlight=False)
    for feature in found.off:
        console.print(f"[bold yellow]off[/]  {escape(feature)}", highlight=False)
    if not found.wrong:
        console.print("[bold green]nothing is wrong[/]")
    for wrong, fix in found.wrong:
        console.print(f"[bold red]wrong[/]  {escape(wrong)}", highlight=False)
        console.print(f"  [bold]fix[/]  {escape(fix)}", highlight=False)


def _versions(found: Findings) -> Table:
    parts = [f"attnpatch {__version__}"]
    for name, (installed, least) in found.versions.items():
        known = f"{name} {installed}" if installed else f"{name} [dim]missing[/]"
        parts.append(f"{known} [dim](>= {least})[/]" if least else known)
    table = Table.grid(padding=(0, 2))
    for i in range(0, len(parts), 2):
        table.add_row(*parts[i : i + 2])
    return table


def _policy(policy: Policy) -> str:
    """Every field of the policy; values other than the default are bold."""
    shown = []
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        text = escape(f"{field.name}={value!r}")
        shown.append(text if value == field.default else f"[bold]{text}[/]")
    return ", ".join(shown)


def _kernels(found: Findings) -> Table:
    table = Table(title="kernels that scaled_dot_product_attention chooses here", title_justify="left")
    table.add_column("device, dtype")
    for call in CALLS:
        table.add_column(call)
    for device, dtype, chosen in found.kernels:
        cells = [f"[yellow]{kernel}[/]" if kernel == "math" else kernel for kernel in chosen]
        table.add_row(f"{device} {dtype}", *cells)
    if found.disabled:
        table.caption = f"switched off: {', '.join(found.disabled)}"
    return table
