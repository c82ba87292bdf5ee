"""Lines of code without docstrings, comments and blanks: ``python -m tests.lines [FOLDER...]``."""

from __future__ import annotations

import ast
import io
import pathlib
import sys
import tokenize

_NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def code_lines(source: str) -> int:
    """How many lines of a file hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0] if node.body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            docstrings.update(range(first.lineno, first.end_lineno + 1))
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - docstrings)


def main() -> None:
    """Print a line for each folder, and for each folder in it."""
    for root in map(pathlib.Path, sys.argv[1:] or ["attnpatch", "benchmarks", "tests"]):
        counts = {path: code_lines(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
        folders: dict[str, int] = {}
        for path, count in counts.items():
            name, *inside = path.relative_to(root).parts
            folder = name if inside else "."
            folders[folder] = folders.get(folder, 0) + count
        print(f"{root}: {sum(counts.values()):,} lines in {len(counts)} files")
        for name, count in sorted(folders.items(), key=lambda item: -item[1]):
            print(f"  {name:20} {count:6,}")


if __name__ == "__main__":
    main()
