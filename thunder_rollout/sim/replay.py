"""The programs of a recorded `trace.jsonl` as a workload.

Turns keep their prompts, outputs and the time from a turn's end to the next request; when programs
start is up to the simulation, and how long their turns take to its engines. Turns of one program
that overlapped are played one after the other. A prompt that was shortened or edited is taken for a
prefix of what came before, which flatters every policy's hits alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from thunder_rollout.core.decisions import Decision
from thunder_rollout.core.events import Event, ProgramEnded, ToolStarted, TurnEnded, TurnRequested
from thunder_rollout.errors import ConfigError
from thunder_rollout.observe.trace import read_trace
from thunder_rollout.sim.workloads import Script, ScriptedTurn, mean_context_tokens

Entry = tuple[float, Event, list[Decision]]


@dataclass(frozen=True, slots=True)
class Replay:
    """The recorded programs in order, over and over; the seed changes nothing."""

    scripts: tuple[Script, ...]
    name: str = "trace"

    def script(self, index: int, seed: int) -> Script:
        return self.scripts[index % len(self.scripts)]

    def mean_context_tokens(self) -> float:
        return mean_context_tokens(self.scripts)


def load_replay(path: Path) -> Replay:
    """Raises `ConfigError` for a file that isn't there or has no ended turn."""
    if not path.is_file():
        raise ConfigError(f"trace={str(path)!r}: no such file; give the trace.jsonl of a run folder")
    return Replay(scripts_of(read_trace(path), str(path)))


def scripts_of(entries: Iterable[Entry], where: str = "trace") -> tuple[Script, ...]:
    programs: dict[str, _Recorded] = {}
    for time, event, _ in entries:
        match event:
            case TurnRequested():
                programs.setdefault(event.program, _Recorded()).requested(event, time)
            case TurnEnded(program=name) if name in programs:
                programs[name].ended(event, time)
            case ToolStarted(program=name) if name in programs:
                programs[name].tool = event.tool or "tool"
            case ProgramEnded(program=name) if name in programs:
                programs[name].over(time)
            case _:
                pass
    scripts = tuple(program.script() for program in programs.values() if program.turns)
    if not scripts:
        raise ConfigError(f"trace={where!r}: no turn of it ended; give the trace.jsonl of a run that got somewhere")
    return scripts


class _Recorded:
    """One program as its events come."""

    def __init__(self) -> None:
        self.turns: list[ScriptedTurn] = []
        self.tool = "tool"
        self._group: str | None = None
        self._task_kind: str | None = None
        self._context_tokens = 0
        self._prompt_tokens: int | None = None
        self._last: tuple[int, int, float] | None = None  # new tokens, output tokens, when it ended

    def requested(self, event: TurnRequested, time: float) -> None:
        self._group, self._task_kind = event.group, event.task_kind
        self.over(time)
        self._prompt_tokens = event.prompt_tokens

    def ended(self, event: TurnEnded, time: float) -> None:
        if self._prompt_tokens is None or not event.output_tokens:
            return
        self._last = (self._prompt_tokens - self._context_tokens, event.output_tokens, time)
        self._context_tokens = self._prompt_tokens + event.output_tokens
        self._prompt_tokens = None

    def over(self, time: float) -> None:
        """The tool after the last turn is over."""
        if self._last is not None:
            new_tokens, output_tokens, ended_at = self._last
            self.turns.append(ScriptedTurn(new_tokens, output_tokens, max(0.0, time - ended_at), self.tool))
            self._last = None

    def script(self) -> Script:
        return Script(turns=tuple(self.turns), group=self._group, task_kind=self._task_kind)
