"""One simulated program: its script, how far it is, and what it asks next."""

from __future__ import annotations

import hashlib
import itertools

from thunder_rollout.core.events import TurnRequested
from thunder_rollout.sim.cache import SharedRun
from thunder_rollout.sim.engine import SimTurn
from thunder_rollout.sim.workloads import Script

HASHES_A_RUN = 1 << 24  # a block's hash is its run's x this + its place in the sequence


class SimProgram:
    """`context_tokens` is what it had when its last turn ended, `held_since` when its KV began to lie
    idle, unless its program was paused since."""

    __slots__ = (
        "_block_size",
        "_hashes",
        "context_tokens",
        "engine_number",
        "held_since",
        "name",
        "num_turns_ended",
        "prompt_tokens",
        "requested_at",
        "script",
        "shared",
        "slot",
    )

    def __init__(self, name: str, slot: int, script: Script, block_size: int, *, hashes: bool) -> None:
        self.name = name
        self.slot = slot
        self.script = script
        self.shared = _shared_runs(script, block_size)
        self.context_tokens = 0
        self.prompt_tokens = 0
        self.requested_at = 0.0
        self.held_since: float | None = None
        self.engine_number: int | None = None  # where its last turn went
        self.num_turns_ended = 0
        self._block_size = block_size
        self._hashes: list[int] | None = [] if hashes else None

    @property
    def is_over(self) -> bool:
        return self.num_turns_ended == len(self.script.turns)

    @property
    def next_output_tokens(self) -> int:
        return self.script.turns[self.num_turns_ended].output_tokens

    @property
    def request_name(self) -> str:
        """Of the turn that is next or under way."""
        return f"{self.name}/{self.num_turns_ended}"

    def contexts_to_come(self) -> list[int]:
        """Its context after the turn that is next or under way, and after each that follows."""
        rest = self.script.turns[self.num_turns_ended :]
        return list(itertools.accumulate((t.new_tokens + t.output_tokens for t in rest), initial=self.context_tokens))[
            1:
        ]

    def request(self, now: float) -> TurnRequested:
        """Ask for the next turn."""
        self.requested_at = now
        self.prompt_tokens = self.context_tokens + self.script.turns[self.num_turns_ended].new_tokens
        return TurnRequested(
            program=self.name,
            request=self.request_name,
            prompt_tokens=self.prompt_tokens,
            block_hashes=self._block_hashes(),
            group=self.script.group,
            task_kind=self.script.task_kind,
        )

    def turn(self, grant: int) -> SimTurn:
        """The turn it asked for, for an engine."""
        return SimTurn(
            key=self.name,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.next_output_tokens,
            shared=self.shared,
            program=self.name,
            grant=grant,
        )

    def end_turn(self, turn: SimTurn, now: float) -> tuple[str, float]:
        """Returns the tool that follows and how long it takes."""
        scripted = self.script.turns[self.num_turns_ended]
        self.num_turns_ended += 1
        self.context_tokens = turn.prompt_tokens + turn.output_tokens
        self.held_since = now
        return scripted.tool, scripted.tool_s

    def _block_hashes(self) -> tuple[int, ...] | None:
        hashes = self._hashes
        if hashes is None:
            return None
        num_blocks = self.prompt_tokens // self._block_size
        if not hashes:
            for part in self.shared:
                base = _base(part.key)
                hashes.extend(range(base + len(hashes), base + len(hashes) + part.num_blocks))
        base = _base(self.name)
        hashes.extend(range(base + len(hashes), base + num_blocks))
        return tuple(hashes[:num_blocks])


def _base(key: str) -> int:
    digest = hashlib.blake2b(key.encode(), digest_size=5).digest()
    return int.from_bytes(digest, "little") * HASHES_A_RUN


def _shared_runs(script: Script, block_size: int) -> tuple[SharedRun, ...]:
    """In full blocks; a block that two runs meet in belongs to the second."""
    runs = []
    tokens = blocks = 0
    for key, num_tokens in script.shared:
        tokens += num_tokens
        num_blocks = tokens // block_size - blocks
        if num_blocks:
            runs.append(SharedRun(key, num_blocks))
            blocks += num_blocks
    return tuple(runs)
