"""The asyncio shell: waiting, cancelling, sandboxes ahead of need, and dying loudly."""

import asyncio
from dataclasses import replace

import pytest

from thunder_rollout.core.config import CappedConfig, SchedulerConfig
from thunder_rollout.core.events import (
    BackendDown,
    BackendStats,
    BackendUp,
    FinishReason,
    Tick,
    ToolStarted,
    TurnEnded,
    TurnRequested,
)
from thunder_rollout.errors import BadEvent, EngineDied, LeaseExpired, Rejected, SandboxFailed, ThunderError
from thunder_rollout.observe.trace import TraceWriter, read_trace
from thunder_rollout.runtime.service import Grant, SchedulerService
from thunder_rollout.sandbox.protocol import SandboxSpec

ONE_AT_A_TIME = SchedulerConfig(policy="capped", capped=CappedConfig(max_programs=1), tick_s=0.01)
SPEC = SandboxSpec(image="any")


def ask(program: str, turn: int = 0, *, tokens: int = 100, sandbox: bool = False) -> TurnRequested:
    return TurnRequested(program=program, request=f"{program}/{turn}", prompt_tokens=tokens, sandbox=sandbox)


class RecordingSandboxes:
    def __init__(self, failure: SandboxFailed | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.failure = failure
        self.puts_away = False
        self.start = asyncio.Event()
        self.start.set()

    async def prepare(self, program: str, spec: SandboxSpec, *, within_s: float) -> float:
        assert within_s >= 0
        self.calls.append(("prepare", program))
        await self.start.wait()
        if self.failure:
            raise self.failure
        return 0.25

    async def release(self, program: str) -> None:
        self.calls.append(("release", program))

    async def rest(self, program: str) -> bool:
        self.calls.append(("rest", program))
        if self.failure:
            raise self.failure
        return self.puts_away

    async def wake(self, program: str) -> None:
        self.calls.append(("wake", program))
        if self.failure:
            raise self.failure


@pytest.fixture
async def make_service():
    services = []

    async def make(config: SchedulerConfig = ONE_AT_A_TIME, *, up: bool = True, **kwargs) -> SchedulerService:
        service = SchedulerService(config, **kwargs)
        services.append(service)
        if up:
            service.handle(BackendUp(backend="e0", generation=0, capacity_tokens=10_000, max_running=8))
        await service.start()
        return service

    yield make
    for service in services:
        await service.stop()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_admit_returns_when_the_program_is_restored(make_service):
    service = await make_service()
    for name in ("a", "b"):
        service.open(name)
    first = await service.admit(ask("a"))
    second = asyncio.create_task(service.admit(ask("b")))
    await settle()
    assert not second.done()
    service.handle(TurnEnded(program="a", grant=first.grant, output_tokens=5))
    service.close("a")
    assert (await second).backend == "e0"


async def test_a_grant_tells_who_gave_up_its_kv_there(make_service):
    service = await make_service()
    for name in ("a", "b"):
        service.open(name)
    first = await service.admit(ask("a"))
    assert first.released == ()
    second = asyncio.create_task(service.admit(ask("b")))
    await settle()
    service.close("a")
    assert (await second).released == ("a",)


async def test_cancelling_a_wait_leaves_no_trace(make_service):
    service = await make_service()
    for name in ("a", "b"):
        service.open(name)
    await service.admit(ask("a"))
    before = service.metrics().scheduler
    waiting = asyncio.create_task(service.admit(ask("b")))
    await settle()
    assert service.metrics().scheduler.num_waiting == 1
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert service.metrics().scheduler == before


async def test_cancelling_after_the_grant_gives_it_back(make_service):
    service = await make_service()
    for name in ("a", "b"):
        service.open(name)
    await service.admit(ask("a"))
    waiting = asyncio.create_task(service.admit(ask("b")))
    await settle()
    service.close("a")  # grants b's turn ...
    assert service.metrics().scheduler.backends[0].num_in_flight == 1
    waiting.cancel()  # ... which its caller never hears of
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert service.metrics().scheduler.backends[0].num_in_flight == 0


async def test_a_request_that_fits_nowhere_is_rejected(make_service):
    service = await make_service()
    service.open("a")
    with pytest.raises(Rejected, match="10000"):
        await service.admit(ask("a", tokens=50_000))


async def test_a_bad_event_is_refused_to_its_sender_alone(make_service):
    service = await make_service()
    with pytest.raises(BadEvent):
        service.handle(TurnEnded(program="nobody", grant=7))
    service.open("a")
    assert (await service.admit(ask("a"))).backend == "e0"


async def test_when_the_last_backend_dies_waiters_hear_of_it(make_service):
    service = await make_service()
    for name in ("a", "b"):
        service.open(name)
    await service.admit(ask("a"))
    waiting = asyncio.create_task(service.admit(ask("b")))
    await settle()
    service.handle(BackendDown(backend="e0", generation=0, reason="killed"))
    with pytest.raises(EngineDied, match="killed"):
        await waiting


async def test_turns_of_a_backend_that_is_lost_are_told_and_those_of_one_that_leaves_are_not(make_service):
    service = await make_service()
    service.handle(BackendUp(backend="e1", generation=3, capacity_tokens=10_000, max_running=8))
    lost, leaves = (asyncio.create_task(service.until_down(*where)) for where in (("e0", 0), ("e1", 3)))
    await settle()
    service.handle(BackendDown(backend="e1", generation=3, reason="it leaves the run"))
    await settle()
    assert not lost.done()
    service.handle(BackendDown(backend="e0", generation=0, reason="killed", returning=True))
    await lost
    await service.until_down("e0", 0)
    next_one = asyncio.create_task(service.until_down("e0", 1))
    await settle()
    assert not next_one.done()
    assert not leaves.done()
    for task in (next_one, leaves):
        task.cancel()


async def test_late_news_of_an_earlier_loss_does_not_undo_a_later_one(make_service):
    service = await make_service()
    down = BackendDown(backend="e0", generation=0, reason="killed", returning=True)
    service.handle(down)
    service.handle(BackendUp(backend="e0", generation=1, capacity_tokens=10_000, max_running=8))
    service.handle(replace(down, generation=1))
    service.handle(down)  # of a turn that took its time to notice
    async with asyncio.timeout(1):
        await service.until_down("e0", 1)


async def test_while_a_backend_may_return_waiters_wait(make_service):
    service = await make_service()
    for name in ("a", "b", "c"):
        service.open(name)
    await service.admit(ask("a"))
    waiting = asyncio.create_task(service.admit(ask("b")))
    await settle()
    down = BackendDown(backend="e0", generation=0, reason="killed", returning=True)
    service.handle(down)
    await settle()
    assert not waiting.done()
    assert not service.report(BackendStats(backend="e0", generation=0, used_tokens=1))
    service.handle(BackendUp(backend="e0", generation=1, capacity_tokens=10_000, max_running=8))
    assert (await waiting).generation == 1
    assert service.report(BackendStats(backend="e0", generation=1, used_tokens=1))
    service.close("b")
    service.handle(down)
    assert (await service.admit(ask("c"))).generation == 1, "news of an older generation changes nothing"


async def test_a_backend_that_was_returning_and_is_given_up_fails_who_waits(make_service):
    service = await make_service()
    service.open("a")
    service.handle(BackendDown(backend="e0", generation=0, reason="killed", returning=True))
    waiting = asyncio.create_task(service.admit(ask("a")))
    await settle()
    service.handle(BackendDown(backend="e0", generation=0, reason="given up"))
    with pytest.raises(EngineDied, match="given up"):
        await waiting


async def test_a_broken_invariant_ends_the_service_loudly(make_service, monkeypatch):
    service = await make_service()
    for name in ("a", "b"):
        service.open(name)
    await service.admit(ask("a"))
    waiting = asyncio.create_task(service.admit(ask("b")))
    await settle()
    monkeypatch.setattr(service._scheduler, "handle", lambda event, now: 1 / 0)
    with pytest.raises(ThunderError, match="ZeroDivisionError"):
        await waiting
    with pytest.raises(ThunderError, match="ZeroDivisionError"):
        service.handle(TurnEnded(program="a", grant=1, finish_reason=FinishReason.STOP))


async def test_sandboxes_are_prepared_on_admission_and_released_at_the_end(make_service):
    sandboxes = RecordingSandboxes()
    service = await make_service(sandboxes=sandboxes)
    service.open("a", sandbox=SPEC)
    await service.admit(ask("a", sandbox=True))
    await settle()
    service.close("a")
    await settle()
    assert sandboxes.calls == [("prepare", "a"), ("release", "a")]


async def test_a_waiting_program_has_its_sandbox_prepared_before_its_turn(make_service):
    sandboxes = RecordingSandboxes()
    service = await make_service(sandboxes=sandboxes)
    for name in ("a", "b"):
        service.open(name, sandbox=SPEC)
    await service.admit(ask("a", sandbox=True))
    waiting = asyncio.create_task(service.admit(ask("b", sandbox=True)))
    await settle()
    assert ("prepare", "b") in sandboxes.calls
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await settle()
    assert ("release", "b") in sandboxes.calls


async def test_an_announced_program_has_its_sandbox_prepared_before_it_is_opened(make_service):
    sandboxes = RecordingSandboxes()
    service = await make_service(sandboxes=sandboxes)
    for name in ("a", "never"):
        service.announce(name, task_kind="toy", sandbox=SPEC)
    await settle()
    service.open("a", owner="worker0", sandbox=SPEC)
    await service.admit(ask("a", sandbox=True))
    service.close("a")
    service.close("never")
    service.close("never")
    await settle()
    assert sandboxes.calls == [("prepare", "a"), ("prepare", "never"), ("release", "a"), ("release", "never")]


async def granted_and_waiting(service: SchedulerService) -> tuple[Grant, asyncio.Task[Grant]]:
    """`b` has acted, and waits behind `a`."""
    for name in ("a", "b"):
        service.open(name, sandbox=SPEC)
    first = await service.admit(ask("b", sandbox=True))
    service.handle(TurnEnded(program="b", grant=first.grant, output_tokens=5))
    service.handle(BackendDown(backend="e0", generation=0, reason="dead", returning=True))
    service.handle(BackendUp(backend="e0", generation=1, capacity_tokens=10_000, max_running=8))
    grant = await service.admit(ask("a", sandbox=True))
    waiting = asyncio.create_task(service.admit(ask("b", 1, sandbox=True)))
    await settle()
    assert not waiting.done()
    return grant, waiting


@pytest.mark.parametrize("failure", [None, SandboxFailed("the host is gone")])
async def test_the_sandbox_of_a_program_that_waits_long_rests_until_its_grant(make_service, failure):
    sandboxes = RecordingSandboxes()
    service = await make_service(sandboxes=sandboxes, rest_after_s=0.02)
    _, waiting = await granted_and_waiting(service)
    sandboxes.calls.clear()
    sandboxes.failure = failure
    await asyncio.sleep(0.05)
    assert sandboxes.calls == [("rest", "b")]
    sandboxes.calls.clear()
    service.close("a")
    await waiting
    await settle()
    assert ("wake", "b") in sandboxes.calls


async def test_a_short_wait_is_not_told_to_the_host(make_service):
    sandboxes = RecordingSandboxes()
    service = await make_service(sandboxes=sandboxes, rest_after_s=0.02)
    _, waiting = await granted_and_waiting(service)
    service.close("a")
    await waiting
    await asyncio.sleep(0.04)
    assert not {"rest", "wake"} & {what for what, _ in sandboxes.calls}


async def test_a_sandbox_that_was_put_away_is_prepared_again(make_service):
    sandboxes = RecordingSandboxes()
    sandboxes.puts_away = True
    service = await make_service(sandboxes=sandboxes, rest_after_s=0.02)
    _, waiting = await granted_and_waiting(service)
    sandboxes.calls.clear()
    await asyncio.sleep(0.1)
    assert sandboxes.calls == [("rest", "b"), ("prepare", "b")]
    service.close("a")
    await waiting


async def test_stopping_a_service_with_a_sandbox_at_rest(make_service):
    sandboxes = RecordingSandboxes()
    service = await make_service(sandboxes=sandboxes, rest_after_s=0.02)
    _, waiting = await granted_and_waiting(service)
    await asyncio.sleep(0.05)
    await service.stop()
    await asyncio.gather(waiting, return_exceptions=True)
    assert ("wake", "b") not in sandboxes.calls


async def test_a_start_that_ends_after_its_program_is_released_again(make_service):
    sandboxes = RecordingSandboxes()
    sandboxes.start.clear()
    service = await make_service(sandboxes=sandboxes)
    service.open("a", sandbox=SPEC)
    await service.admit(ask("a", sandbox=True))
    await settle()
    service.close("a")
    await settle()
    sandboxes.start.set()
    await settle()
    assert sandboxes.calls == [("prepare", "a"), ("release", "a"), ("release", "a")]


async def test_news_of_a_preparation_that_was_given_up_are_not_taken_for_the_next_ones(make_service):
    sandboxes = RecordingSandboxes(SandboxFailed("released while it started"))
    sandboxes.start.clear()
    service = await make_service(up=False, sandboxes=sandboxes)
    service.open("a", sandbox=SPEC)
    first = asyncio.create_task(service.admit(ask("a", sandbox=True)))
    await settle()
    first.cancel()
    await settle()
    second = asyncio.create_task(service.admit(ask("a", 1, sandbox=True)))
    await settle()
    assert sandboxes.calls == [("prepare", "a"), ("release", "a"), ("prepare", "a")]
    handled = []
    handle = service.handle
    service.handle = lambda event: (handled.append(event), handle(event))[1]
    sandboxes.start.set()
    await settle()
    assert [type(event).__name__ for event in handled] == ["SandboxFailed"], "of the second alone"
    assert sandboxes.calls[-1] == ("prepare", "a"), "the second's is not released"
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)


async def test_a_failed_preparation_does_not_end_the_scheduler(make_service):
    service = await make_service(sandboxes=RecordingSandboxes(SandboxFailed("no room")))
    service.open("a", sandbox=SPEC)
    await service.admit(ask("a", sandbox=True))
    await settle()
    service.open("b")
    waiting = asyncio.create_task(service.admit(ask("b")))
    service.close("a")
    await waiting


@pytest.fixture
async def two_owners(make_service) -> tuple[SchedulerService, asyncio.Task[Grant]]:
    """A program of worker0 runs, and one of worker1 waits for its place."""
    service = await make_service()
    service.open("a", owner="worker0")
    service.open("b", owner="worker1")
    await service.admit(ask("a"))
    waiting = asyncio.create_task(service.admit(ask("b")))
    await settle()
    return service, waiting


async def test_the_programs_of_a_dead_owner_end(two_owners):
    service, waiting = two_owners
    service.owner_died("worker0")
    await waiting


async def test_what_the_programs_of_a_dead_owner_wait_for_is_waited_for_no_longer(two_owners):
    service, waiting = two_owners
    service.owner_died("worker1")
    with pytest.raises(Rejected, match="worker1 died"):
        await waiting
    assert service.metrics().scheduler.num_waiting == 0


async def test_a_program_whose_lease_ran_out_hears_so_when_it_acts_and_may_begin_anew(make_service):
    service = await make_service(config=replace(ONE_AT_A_TIME, lease_s=0.01))
    service.open("a")
    grant = await service.admit(ask("a"))
    await asyncio.sleep(0.02)
    service.handle(Tick())
    service.handle(TurnEnded(program="a", grant=grant.grant, output_tokens=5))
    with pytest.raises(LeaseExpired, match=r"program=a was silent for scheduler\.lease_s=0\.01"):
        service.handle(ToolStarted(program="a", tool="bash"))
    with pytest.raises(LeaseExpired):
        await service.admit(ask("a", 1))
    service.close("a")
    with pytest.raises(BadEvent, match="unknown"):
        service.handle(ToolStarted(program="a", tool="bash"))


async def test_a_trace_replays_to_the_same_events_and_decisions(make_service, tmp_path):
    path = tmp_path / "trace.jsonl"
    service = await make_service(trace=TraceWriter(path))
    service.open("a")
    grant = await service.admit(ask("a"))
    service.handle(TurnEnded(program="a", grant=grant.grant, output_tokens=5, cached_tokens=0))
    service.close("a")
    await service.stop()
    entries = read_trace(path)
    replayed = SchedulerService(ONE_AT_A_TIME)._scheduler
    assert [replayed.handle(event, now) for now, event, _ in entries] == [decisions for _, _, decisions in entries]
    assert any(decisions for _, _, decisions in entries)
