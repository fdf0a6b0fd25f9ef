"""Tables as Markdown with aligned columns, for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlabs.errors import printable


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Make a table. The first column is for names and left-aligned, the others are for numbers and right-aligned."""
    cells = [[printable(str(cell)).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    aligned = ["<", *[">"] * (len(widths) - 1)]
    lines = [[f"{cell:{to}{width}}" for cell, to, width in zip(row, aligned, widths, strict=True)] for row in cells]
    rule = [f"{'-' * (width - 1)}:" if to == ">" else "-" * width for to, width in zip(aligned, widths, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
