import pytest

from thunder_rollout.core.decisions import Pause, PrepareSandbox, ReleaseSandbox, Restore
from thunder_rollout.core.events import (
    FinishReason,
    SandboxFailed,
    SandboxReady,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnRequested,
)
from thunder_rollout.core.snapshot import SchedulerSnapshot
from thunder_rollout.observe.metrics import RunMetrics
from thunder_rollout.observe.sandbox_waits import SandboxWait

IDLE = SchedulerSnapshot(
    backends=(),
    num_programs=0,
    num_waiting_returning=0,
    num_waiting_new=0,
    num_waiting_acting=0,
    waiting_tokens=0,
    pending_tokens=0,
)


def turn(metrics: RunMetrics, grant: int, *, at: float, reason: FinishReason = FinishReason.STOP) -> None:
    request = f"p/{grant}"
    metrics.observe(TurnRequested(program="p", request=request, prompt_tokens=100), [], at)
    restore = Restore(program="p", backend="e", generation=0, request=request, grant=grant)
    metrics.observe(ToolEnded(program="p"), [restore], at + 1)
    ended = TurnEnded(program="p", grant=grant, output_tokens=10, cached_tokens=60, finish_reason=reason)
    metrics.observe(ended, [], at + 2)


def test_rates_count_from_the_first_request():
    metrics = RunMetrics()
    turn(metrics, 1, at=100.0)
    turn(metrics, 2, at=110.0)
    snapshot = metrics.snapshot(IDLE, 130.0)
    assert snapshot.time_s == 30.0
    assert snapshot.steps_per_min == pytest.approx(4.0)
    assert snapshot.kv_hit_rate == pytest.approx(0.6)
    assert (snapshot.num_turns, snapshot.output_tokens, snapshot.num_restores) == (2, 20, 2)
    assert snapshot.queue_s == pytest.approx(2.0)


def test_a_cut_turn_is_no_step():
    metrics = RunMetrics()
    turn(metrics, 1, at=0.0, reason=FinishReason.ABORT)
    assert metrics.snapshot(IDLE, 10.0).num_turns == 0


def test_what_a_turn_made_before_it_was_cut_is_output():
    metrics = RunMetrics()
    turn(metrics, 1, at=0.0, reason=FinishReason.ABORT)
    turn(metrics, 2, at=2.0)
    snapshot = metrics.snapshot(IDLE, 10.0)
    assert (snapshot.num_turns, snapshot.output_tokens, snapshot.prompt_tokens) == (1, 20, 100)


def test_tools_and_pauses_are_added_up():
    metrics = RunMetrics()
    metrics.observe(ToolStarted(program="p"), [Pause(program="p", backend="e")], 1.0)
    metrics.observe(ToolEnded(program="p"), [], 3.5)
    snapshot = metrics.snapshot(IDLE, 4.0)
    assert (snapshot.tool_s, snapshot.num_pauses) == (2.5, 1)


def test_a_program_waits_for_its_sandbox_or_the_sandbox_for_its_program():
    metrics = RunMetrics()
    event = ToolEnded(program="other")

    def prepared(program: str, at: float) -> None:
        metrics.observe(event, [PrepareSandbox(program=program, by_s=at)], at)

    def granted(program: str, at: float) -> None:
        metrics.observe(event, [Restore(program=program, backend="e", generation=0, request="r", grant=1)], at)

    for number in range(20):
        prepared(f"p{number}", 0.0)
    metrics.observe(SandboxReady(program="p0", took_s=2.0), [], 2.0)
    granted("p0", 5.0)
    for number in range(1, 20):
        granted(f"p{number}", 1.0)
        granted(f"p{number}", 1.5)
        metrics.observe(SandboxReady(program=f"p{number}", took_s=2.0), [], 1.0 + number)
    metrics.observe(SandboxReady(program="p0", took_s=2.0), [], 99.0)
    for name, end in [("failed", SandboxFailed(program="failed")), ("released", event)]:
        prepared(name, 0.0)
        metrics.observe(end, [ReleaseSandbox(program="released")], 1.0)
        granted(name, 90.0)
    snapshot = metrics.snapshot(IDLE, 100.0)
    assert snapshot.sandbox_wait_p95_s == 18.0, "of 0 and 1 to 19"
    assert snapshot.sandbox_idle_s == pytest.approx(3.0 / 20)
    assert metrics.sandboxes.waits[0] == SandboxWait(granted_s=5.0, wait_s=0.0, idle_s=3.0, took_s=2.0)


def test_before_anything_happened_every_rate_is_zero():
    snapshot = RunMetrics().snapshot(IDLE, 5.0)
    assert (snapshot.steps_per_min, snapshot.kv_hit_rate, snapshot.imbalance) == (0.0, 0.0, 0.0)
    assert (snapshot.sandbox_wait_p95_s, snapshot.sandbox_idle_s) == (0.0, 0.0)
