"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console


def table_console(console: Console | None, columns: int) -> Console:
    """`console`, or stdout, at least `columns` wide unless it is a terminal: into a file or a pipe rich
    would squeeze a table into 80."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, columns)
    return console
