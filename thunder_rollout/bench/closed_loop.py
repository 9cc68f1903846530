"""A closed loop of scripted programs: as soon as one ends, its slot plays the next."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thunder_rollout.bench.config import WorkloadConfig
from thunder_rollout.bench.window import WaitMeter, Window
from thunder_rollout.bench.workload import Position, Script, script
from thunder_rollout.core.events import INITIAL_VERSION
from thunder_rollout.engine.protocol import Engine, Sampling
from thunder_rollout.runtime.client import ProgramClient, SchedulerPort


@dataclass(slots=True)
class _Asked:
    """Tokens that some prompt began with, and the weights under which they were computed; none: they are yet to be."""

    tokens: int = 0
    versions: frozenset[str] = frozenset()


class ClosedLoop:
    """Begins at `start`, one position a slot; they ask for their first turns in its order. `block_size`: of the
    engines; hashes are sent where `send_hashes`; `weight_version`: what the engines serve at first."""

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
        weight_version: str = INITIAL_VERSION,
    ) -> None:
        self.window = Window()
        self.waits = WaitMeter(scheduler, self.window)
        self.num_ended = 0
        self._workload = workload
        self._start = start
        self._engines = engines
        self._name = name
        self._seed = seed
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._weight_version = weight_version
        self._hash_block_size = block_size if send_hashes else None
        self._positions: dict[str, Position] = {}  # by program
        self._asked_s: dict[str, float] = {}  # when, for the turn that is not over; inf while the program acts
        self._next_index = max((position.index for position in start), default=-1) + 1
        self._asked_by_groups: dict[str, _Asked] = {}  # the newest prompt

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
        own = _Asked(len(context), frozenset({self._weight_version}))
        for number, turn in enumerate(program.turns, program.num_turns_over):
            self._positions[client.program] = Position(program.index, number)
            self._asked_s[client.program] = asyncio.get_running_loop().time()
            previous_tokens = len(context)
            context += turn.new_ids
            before, asked = own, _Asked(len(context))
            if program.group is not None:
                before = own if own.tokens else self._asked_by_groups.get(program.group, own)
                self._asked_by_groups[program.group] = asked
            result = await client.turn(context, Sampling(max_tokens=turn.output_tokens, ignore_eos=True))
            asked.versions = frozenset(segment.version for segment in result.weights)
            reusable_tokens = self._reusable_tokens(before, len(context), result.weights[0].version)
            self.window.add_turn(result, previous_tokens, reusable_tokens)
            context += result.generation.token_ids
            own = _Asked(len(context), asked.versions)
            self._asked_s[client.program] = float("inf")
            self._positions[client.program] = Position(program.index, number + 1)
            await client.tool_started(turn.tool)
            await asyncio.sleep(turn.tool_s)
            await client.tool_ended()
            self.window.add_hold(len(context), turn.tool_s)

    def _reusable_tokens(self, before: _Asked, prompt_tokens: int, version: str) -> int:
        """Of a prompt served first by the weights `version`, in whole blocks, what the program or another sample of
        its group has asked for before; the last token of a context is never computed before it is needed."""
        if before.versions and version not in before.versions:
            return 0
        return max(0, min(before.tokens, prompt_tokens) - 1) // self._block_size * self._block_size
