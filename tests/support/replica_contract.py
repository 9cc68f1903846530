"""What every `ReplicaPort` does, the fake and the one on verl's server actor."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from thunder_rollout.errors import EngineDied
from thunder_rollout.verl_adapter.router.replica import ReplicaPort

CAPACITY_TOKENS = 1600  # of a replica under test, in blocks of 16; it serves version 0


async def check_replica(port: ReplicaPort, become: Callable[..., Awaitable[Any]], die: Callable[[], Any]) -> None:
    """`become` changes what it tells: `paused`, `version`, `prompt_lengths`, `broken`."""
    facts = await port.facts()
    assert (facts.capacity_tokens, facts.block_size) == (CAPACITY_TOKENS, 16)
    state = await port.state()
    assert (state.paused, state.version, state.broken) == (False, 0, None)
    await become(paused=True, version=3, prompt_lengths=(7, 9))
    state = await port.state()
    assert (state.paused, state.version, state.prompt_lengths) == (True, 3, (7, 9))
    await become(paused=False, broken=True)
    state = await port.state()
    assert not state.paused
    assert state.broken
    die()
    for read in (port.facts, port.state):
        with pytest.raises(EngineDied):
            await read()
