"""Work that its caller gives up when something else happens first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_ABORT_WAIT_S = 5.0  # for the work to take note; what hangs never does


async def unless(vain: Coroutine[Any, Any, NoReturn], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless `vain`, which waits for what makes it so, raises first. Whichever is left is
    cancelled, also where the caller is, and awaited, though not for ever."""
    task, stop = asyncio.create_task(work), asyncio.create_task(vain)
    task.add_done_callback(_retrieve)
    try:
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        stop.result()
    finally:
        for each in (task, stop):
            each.cancel()
        await asyncio.wait([task, stop], timeout=_ABORT_WAIT_S)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Where the work was given up nobody asks how else it ended."""
    if not task.cancelled():
        task.exception()
