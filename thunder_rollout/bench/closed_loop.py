"""A closed loop of scripted programs: as soon as one ends, its slot plays the next."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from thunder_rollout.bench.config import WorkloadConfig
from thunder_rollout.bench.window import WaitMeter, Window
from thunder_rollout.bench.workload import Position, Script, script
from thunder_rollout.engine.protocol import Engine, Sampling
from thunder_rollout.runtime.client import ProgramClient, SchedulerPort


class ClosedLoop:
    """Begins at `start`, one position a slot; they ask for their first turns in its order. `block_size`: of the
    engines; hashes are sent where `send_hashes`."""

    def __init__(
        self,
        workload: WorkloadConfig,
        start: Sequence[Position],
        scheduler: SchedulerPort,
        engines: Mapping[str, Engine],
        *,
        name: str,
        seed: int,
        vocab_size: int,
        block_size: int,
        send_hashes: bool,
    ) -> None:
        self.window = Window()
        self.waits = WaitMeter(scheduler, self.window)
        self.num_ended = 0
        self.weight_version = 0  # raised by whoever changes the weights: contexts before it can't be reused
        self._workload = workload
        self._start = start
        self._engines = engines
        self._name = name
        self._seed = seed
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._hash_block_size = block_size if send_hashes else None
        self._positions: dict[str, Position] = {}  # by program
        self._asked_s: dict[str, float] = {}  # when, for the turn that is not over; inf while the program acts
        self._next_index = max((position.index for position in start), default=-1) + 1
        self._asked_by_groups: dict[str, tuple[int, int]] = {}  # tokens of the newest prompt, under which weights

    def begin(self) -> list[asyncio.Task[None]]:
        """One task a slot; they never end by themselves."""
        return [asyncio.create_task(self._slot(position)) for position in self._start]

    def positions(self) -> list[Position]:
        """Where the slots are now: those in an engine in the order in which they asked, those who act, then those
        who wait for admission in the order in which they asked."""
        waiting = self.waits.waiting
        names = sorted(self._asked_s, key=lambda name: (name in waiting, self._asked_s[name]))
        return [self._positions[name] for name in names]

    async def _slot(self, position: Position) -> None:
        while True:
            program = script(self._workload, position, seed=self._seed, vocab_size=self._vocab_size)
            name = f"{self._name}/{program.index}"
            self._positions[name] = position
            self._asked_s[name] = asyncio.get_running_loop().time()
            async with ProgramClient(
                name,
                self.waits,
                self._engines,
                group=program.group,
                task_kind=self._workload.name,
                block_size=self._hash_block_size,
            ) as client:
                await self._play(program, client)
            del self._positions[name], self._asked_s[name]
            self.num_ended += 1
            self.window.add_end()
            position = Position(self._next_index, 0)
            self._next_index += 1

    async def _play(self, program: Script, client: ProgramClient) -> None:
        context = list(program.context_ids)
        version = self.weight_version
        for number, turn in enumerate(program.turns, program.num_turns_over):
            self._positions[client.program] = Position(program.index, number)
            self._asked_s[client.program] = asyncio.get_running_loop().time()
            previous_tokens = len(context)
            context += turn.new_ids
            reusable_tokens = self._reusable_tokens(program, previous_tokens, len(context), version)
            version = self.weight_version
            result = await client.turn(context, Sampling(max_tokens=turn.output_tokens, ignore_eos=True))
            self.window.add_turn(result, previous_tokens, reusable_tokens)
            context += result.generation.token_ids
            self._asked_s[client.program] = float("inf")
            self._positions[client.program] = Position(program.index, number + 1)
            await client.tool_started(turn.tool)
            await asyncio.sleep(turn.tool_s)
            await client.tool_ended()
            self.window.add_hold(len(context), turn.tool_s)

    def _reusable_tokens(self, program: Script, previous_tokens: int, prompt_tokens: int, version: int) -> int:
        """Of the prompt, in whole blocks, what the program or another sample of its group has asked for before; the
        last token of a context is never computed before it is needed."""
        if previous_tokens == 0 and program.group is not None:
            previous_tokens, version = self._asked_by_groups.get(program.group, (0, version))
        if program.group is not None:
            self._asked_by_groups[program.group] = (prompt_tokens, self.weight_version)
        if version != self.weight_version:
            return 0
        return max(0, min(previous_tokens, prompt_tokens) - 1) // self._block_size * self._block_size
