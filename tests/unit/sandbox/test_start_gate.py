from __future__ import annotations

import asyncio

import pytest

from thunder_rollout.sandbox.start_gate import StartGate


class Starts:
    """Starts through a gate that lets one in at a time; `order` is that in which they went in."""

    def __init__(self, max_starts: int = 1) -> None:
        self.gate = StartGate(max_starts)
        self.order: list[str] = []
        self.num_inside = self.most_inside = 0

    def begin(self, name: str, due_s: float) -> asyncio.Task[None]:
        return asyncio.create_task(self._start(name, due_s))

    async def _start(self, name: str, due_s: float) -> None:
        async with self.gate.inside(name, due_s):
            self.order.append(name)
            self.num_inside += 1
            self.most_inside = max(self.most_inside, self.num_inside)
            await asyncio.sleep(0.002)
            self.num_inside -= 1


async def test_the_one_that_is_due_first_goes_first_and_equals_as_they_came() -> None:
    starts = Starts()
    await asyncio.gather(*(starts.begin(name, due_s) for name, due_s in [("a", 9), ("b", 5), ("c", 1), ("d", 5)]))
    assert starts.order == ["a", "c", "b", "d"], "a found the gate open"


async def test_no_more_than_so_many_are_inside_and_so_many_are() -> None:
    starts = Starts(3)
    await asyncio.gather(*(starts.begin(f"p{number}", number) for number in range(10)))
    assert starts.most_inside == 3
    assert starts.num_inside == 0


async def test_one_that_became_urgent_passes_the_others() -> None:
    starts = Starts()
    tasks = [starts.begin(name, due_s) for name, due_s in [("a", 0), ("b", 2), ("c", 9)]]
    await asyncio.sleep(0)
    starts.gate.hasten("c", 1)
    starts.gate.hasten("b", 7)
    starts.gate.hasten("nobody", 0)
    await asyncio.gather(*tasks)
    assert starts.order == ["a", "c", "b"], "later than before changes nothing"


@pytest.mark.parametrize("num_steps", range(6))
async def test_a_cancelled_start_takes_nobodys_turn(num_steps: int) -> None:
    starts = Starts()
    first, second, third = (starts.begin(name, due_s) for name, due_s in [("a", 0), ("b", 1), ("c", 2)])
    await asyncio.sleep(0)
    first.cancel()  # lets b in, some steps of the loop later
    for _ in range(num_steps):
        await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    async with asyncio.timeout(1):
        await third
    assert starts.order[-1] == "c"
    async with asyncio.timeout(1):
        await starts.begin("d", 0)
