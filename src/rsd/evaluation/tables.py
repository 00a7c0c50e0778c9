"""Tables on a terminal that lose nothing: side by side where the columns fit, else one block under another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsd.output import plural as plural

ABSENT = "-"


def percent(rate: float | None) -> str:
    return ABSENT if rate is None else f"{100 * rate:.1f} %"


def level_cell(rates: Sequence[float]) -> str:
    return " / ".join(f"{100 * rate:.0f} %" for rate in rates) or ABSENT


def say(console: Console, text: str, style: str | None = None) -> None:
    """A text as it is: nothing in it is markup, and long lines are left to the terminal."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """header and every row: as many cells; all but the first column on the right."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]]) + "\n"


def print_table(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    blocks: Literal["columns", "rows"] = "columns",
) -> None:
    """header and every row: as many cells; the first one names the row (and is empty or a noun in the header).

    blocks: what becomes a block of its own, with one cell a line, where the table is wider than the console: a column
    (quantities down, runs across) or a row (tasks down, their numbers across). No cell is
    ever cut; absent ones are left out.
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
    say(console, title, "bold")
    for heading, *cells in subjects:
        say(console, f"\n{heading}", "bold")
        for name, cell in zip(names[1:], cells, strict=True):
            if cell not in ("", ABSENT):
                say(console, f"  {name.ljust(width)}  {cell}")
