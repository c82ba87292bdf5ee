"""Tables of text with aligned columns."""

from collections.abc import Container


def aligned(rows: list[list[str]], right: Container[int]) -> list[str]:
    """The lines of a table; ``right``: the columns whose cells stand on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        found = [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in cells]
        lines.append("  ".join(found).rstrip())
    return lines
