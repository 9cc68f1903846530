"""A recorded trace becomes a workload."""

from __future__ import annotations

from pathlib import Path

import pytest

from thunder_rollout.core.events import ProgramEnded, TurnEnded, TurnRequested
from thunder_rollout.errors import ConfigError
from thunder_rollout.observe.trace import TraceWriter
from thunder_rollout.sim.replay import load_replay
from thunder_rollout.sim.workloads import ScriptedTurn


def test_turns_keep_their_lengths_and_tool_times(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace.jsonl")
    writer.write(0.0, TurnRequested(program="a", request="1", prompt_tokens=100, group="g"), [])
    writer.write(2.0, TurnEnded(program="a", grant=1, output_tokens=10), [])
    writer.write(5.0, TurnRequested(program="a", request="2", prompt_tokens=150, group="g"), [])
    writer.write(6.0, TurnEnded(program="a", grant=2, output_tokens=20), [])
    writer.write(6.5, ProgramEnded(program="a"), [])
    writer.write(7.0, TurnRequested(program="unfinished", request="3", prompt_tokens=50), [])
    writer.close()
    replay = load_replay(tmp_path / "trace.jsonl")
    assert len(replay.scripts) == 1
    script = replay.script(5, seed=3)
    assert script.turns == (ScriptedTurn(100, 10, 3.0), ScriptedTurn(40, 20, 0.5))
    assert script.group == "g"
    assert replay.mean_context_tokens() == (110 + 170) / 2


def test_a_trace_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_replay(tmp_path / "trace.jsonl")
    (tmp_path / "trace.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no turn"):
        load_replay(tmp_path / "trace.jsonl")
