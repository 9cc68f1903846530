"""Tables keep their width where there is no terminal to fit them into."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from thunder_rollout.observe.console import table_console


@pytest.mark.parametrize(("is_terminal", "width"), [(False, 200), (True, 90)])
def test_a_terminal_is_taken_as_wide_as_it_is(is_terminal: bool, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=90)
    assert table_console(console, 200) is console
    assert console.width == width
