"""asyncio with this project's errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """`asyncio.TaskGroup` that raises the first error itself, not a group around it, so that callers
    can catch our types."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


class SharedWaits(Generic[K]):
    """Many wait for the same, one call is made for them; it is cancelled when the last of them has left."""

    def __init__(self) -> None:
        self._calls: dict[K, asyncio.Task[None]] = {}
        self._num_waiting: dict[K, int] = {}

    async def wait(self, key: K, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Until `call`, or that of another who waits for `key`, has ended; raises what it raises."""
        if key not in self._calls:
            self._calls[key] = asyncio.create_task(call())
        task = self._calls[key]
        self._num_waiting[key] = self._num_waiting.get(key, 0) + 1
        try:
            await asyncio.shield(task)
        finally:
            self._num_waiting[key] -= 1
            if not self._num_waiting[key]:
                del self._calls[key], self._num_waiting[key]
                task.cancel()
