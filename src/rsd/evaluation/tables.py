"""Tables on a terminal that lose nothing: side by side where the columns fit, else one block under another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ABSENT = "-"


def plural(count: int, noun: str) -> str:
    """`1 episode`, `2 episodes`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def print_table(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    blocks: Literal["columns", "rows"] = "columns",
) -> None:
    """header and every row: as many cells; the first one names the row (and is empty or a noun in the header).

    blocks: what becomes a block of its own, with one cell a line, where the table is wider than the console: a column
    (quantities down, runs across) or a row (tasks down, their numbers across). No cell is ever cut.
    """
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        table.add_column(escape(name), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    unlimited = console.options.update(max_width=10_000)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table, highlight=False)
        return
    grid = [list(header), *map(list, rows)]
    if blocks == "columns":
        grid = [list(column) for column in zip(*grid, strict=True)]
    names, *subjects = grid
    width = max(map(len, names[1:]), default=0)
    console.print(f"[bold]{escape(title)}[/bold]", highlight=False, soft_wrap=True)
    for heading, *cells in subjects:
        console.print(f"\n[bold]{escape(heading)}[/bold]", highlight=False, soft_wrap=True)
        for name, cell in zip(names[1:], cells, strict=True):
            if cell not in ("", ABSENT):
                console.print(f"  {name.ljust(width)}  {cell}", markup=False, highlight=False, soft_wrap=True)
