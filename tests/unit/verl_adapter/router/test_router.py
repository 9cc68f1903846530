"""The router as verl's load balancer, over fake replicas."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.replica_contract import CAPACITY_TOKENS, check_replica
from tests.unit.verl_adapter.router.conftest import ADAPTIVE, prompt, settle
from thunder_rollout.core.config import CappedConfig, SchedulerConfig
from thunder_rollout.core.program import Phase
from thunder_rollout.errors import ConfigError, Rejected
from thunder_rollout.verl_adapter.router import pool
from thunder_rollout.verl_adapter.router import router as module
from thunder_rollout.verl_adapter.router.fake import FakeReplica
from thunder_rollout.verl_adapter.router.replica import Sampling

TICKING = SchedulerConfig(tick_s=0.01, adaptive=ADAPTIVE)
ONE_AT_A_TIME = SchedulerConfig(policy="capped", capped=CappedConfig(max_programs=1), tick_s=1000.0)


async def test_a_request_gets_a_server_and_its_handle(make_shell):
    shell = make_shell("a")
    server, port = await shell.router.acquire("p", prompt("p", 100), {})
    assert (server, port.handle) == ("a", "handle of a")
    assert shell.router.status()["servers"] == {"a": 1}


async def test_without_servers_it_says_what_verls_own_says(make_shell):
    shell = make_shell("")
    with pytest.raises(RuntimeError, match="No available servers in load balancer"):
        await shell.acquire("p")


async def test_nothing_starts_before_the_first_request(make_shell):
    shell = make_shell("a b")
    await shell.router.inspect()
    await settle()
    assert shell.router.servers() == ["a", "b"]
    assert shell.router._started is None
    assert [replica.num_reads for replica in shell.replicas.values()] == [0, 0]


async def test_requests_beyond_the_kv_memory_are_held_and_count_as_in_flight(make_shell):
    shell = make_shell("a", facts={"capacity_tokens": 1000})
    held = [await shell.held(f"p{number}", 400) for number in range(4)]
    assert [task.done() for task in held] == [True, True, False, False]
    assert shell.router.total_inflight() == 4
    assert shell.router.status()["held"] == 2
    for number in range(2):
        await shell.release("a", f"p{number}")
    await asyncio.wait_for(asyncio.gather(*held), 1)
    assert shell.router.total_inflight() == 2


async def test_turns_of_one_request_id_are_one_program_where_its_cache_is(make_shell):
    shell = make_shell("a b c")
    first = await shell.acquire("p", 100)
    for turn in range(1, 5):
        await shell.release(first, "p")
        assert await shell.acquire("p", 100 + 50 * turn) == first
    assert shell.scheduler.num_programs == 1


async def test_a_request_id_that_comes_back_is_another_program(make_shell):
    shell = make_shell("a")
    await shell.acquire("0", 100)
    await shell.release("a", "0")
    await shell.acquire("0", 160)
    await shell.release("a", "0")
    await shell.acquire("0", 100)  # the first prompt again: the next step's run of the same task
    assert list(shell.core.programs) == ["0@1"], "the one before is over"
    await shell.release("a", "0")
    other = [9] * 100
    await shell.router.acquire("0", other, {})
    assert list(shell.core.programs) == ["0@2"]


async def test_a_release_starts_a_tool_with_what_the_turn_is_expected_to_have_made(make_shell):
    shell = make_shell("a")
    await shell.acquire("p", 100)
    await shell.release("a", "p")
    assert shell.core.programs["p@0"].context_tokens == 100, "nothing was learned yet"
    await shell.acquire("p", 180)
    assert shell.core.programs["p@0"].context_tokens == 180, "exact at every request"
    await shell.release("a", "p")
    program = shell.core.programs["p@0"]
    assert (program.phase, program.context_tokens) == (Phase.ACTING, 260)
    await shell.acquire("p", 200, max_tokens=30)
    await shell.release("a", "p")
    assert program.context_tokens == 230, "no more than the turn may make"


async def test_a_request_too_large_for_any_server_is_refused_with_a_reason(make_shell):
    shell = make_shell("a", facts={"capacity_tokens": 1000})
    with pytest.raises(Rejected, match="capacity_tokens=1000"):
        await shell.acquire("p", 1000)
    assert shell.router.total_inflight() == 0


async def test_a_cancelled_wait_leaves_no_trace(make_shell):
    shell = make_shell("a", scheduler=ONE_AT_A_TIME)
    await shell.acquire("p")
    held = await shell.held("q")
    held.cancel()
    await settle()
    assert shell.router.total_inflight() == 1
    assert list(shell.core.programs) == ["p@0"]


async def test_a_release_that_nobody_asked_for_changes_nothing(make_shell):
    shell = make_shell("a")
    await shell.acquire("p")
    for server, request_id in (("a", "q"), ("b", "p")):
        await shell.release(server, request_id)
    assert shell.router.total_inflight() == 1
    for _ in range(2):
        await shell.release("a", "p")
    assert shell.router.total_inflight() == 0


async def test_a_request_waits_for_the_release_before_it(make_shell):
    """They come in groups of their own, and a release reads its replica."""
    shell = make_shell("a")
    await shell.acquire("p", 100)
    shell.router.release("a", "p")
    await shell.acquire("p", 150)
    assert shell.core.programs["p@0"].num_in_flight == 1


# Weights


async def test_an_aborted_turn_starts_no_tool_and_the_gate_is_shut_until_its_server_serves_again(make_shell):
    shell = make_shell("a")
    await shell.acquire("p")
    shell.replicas["a"].become(paused=True)
    await shell.release("a", "p")
    assert shell.scheduler.backends[0].updating
    assert shell.core.programs["p@0"].acting_since_s is None
    again = await shell.held("p", 110)
    assert not again.done()
    shell.replicas["a"].become(paused=False, version=1)
    await shell.poll()
    assert await again == "a"
    ledger = shell.router._service._scheduler._policy._ledger
    assert ledger.return_times.of(None).num_returns == 0, "coming back from an abort is not the end of a tool"


async def test_a_release_that_comes_when_the_update_is_over_is_still_of_an_aborted_turn(make_shell):
    shell = make_shell("a")
    await shell.acquire("p")
    shell.replicas["a"].become(version=7)
    await shell.release("a", "p")
    assert shell.core.programs["p@0"].acting_since_s is None


async def test_a_turn_that_was_parked_through_an_update_is_none_that_was_aborted(make_shell):
    shell = make_shell("a")
    await shell.acquire("p")
    shell.replicas["a"].become(paused=True)
    await shell.poll()
    shell.replicas["a"].become(paused=False, version=1)
    await shell.poll()
    shell.clock.now += 30.0
    await shell.release("a", "p")
    assert shell.core.programs["p@0"].phase is Phase.ACTING


async def test_after_an_update_everybody_may_move_and_none_is_let_in_before_all_gates_open(make_shell):
    shell = make_shell("a b", facts={"capacity_tokens": 1000})
    servers = [await shell.acquire(f"p{number}", 300) for number in range(4)]
    assert sorted(servers) == ["a", "a", "b", "b"]
    for replica in shell.replicas.values():
        replica.become(paused=True)
    for number, server in enumerate(servers):
        await shell.release(server, f"p{number}")
    held = [await shell.held(f"p{number}", 310) for number in range(4)]
    shell.replicas["a"].become(paused=False, version=1)
    await shell.poll()
    assert not any(task.done() for task in held), "b is about to open"
    shell.replicas["b"].become(paused=False, version=1)
    await shell.poll()
    await settle()
    first = [task.result() if task.done() else None for task in held]
    assert first[2:] == [None, None], "all is computed again, so not all at once"
    assert sorted(first[:2]) == ["a", "b"], "in order, and spread"
    for number, server in enumerate(first[:2]):
        await shell.release(server, f"p{number}")
    assert sorted(await asyncio.gather(*held[2:])) == ["a", "b"]


async def test_a_gate_does_not_wait_for_another_for_ever(make_shell):
    shell = make_shell("a b")
    for replica in shell.replicas.values():
        replica.become(paused=True)
    held = await shell.held("p")
    shell.replicas["a"].become(paused=False)
    await shell.poll()
    assert not held.done()
    await shell.poll(after_s=1.0)
    assert await held == "a"


async def test_new_weights_between_two_steps_are_noticed_by_the_first_request(make_shell):
    shell = make_shell("a")
    server = await shell.acquire("p")
    await shell.release(server, "p")
    account = shell.router._service._scheduler._policy._ledger.backends["a"]
    before = account.cache
    shell.replicas["a"].become(version=1)
    shell.clock.now += 10.0
    await shell.acquire("q")
    assert account.cache == before + 1, "its cache is void"
    assert shell.core.programs["p@0"].backend is None, "places are given up"
    assert shell.core.programs["q@1"].marked is False, "and whoever came for the new weights keeps its own"


async def test_clearing_sticky_sessions_gives_all_places_up(make_shell):
    shell = make_shell("a b")
    for name in ("p", "q"):
        await shell.release(await shell.acquire(name), name)
    await shell.acquire("r")
    told = shell.router.clear_sticky_cache()
    assert told["cleared_entries"] == 3
    assert sum(told["server_loads"].values()) == 1
    assert sum(backend.num_acting for backend in shell.scheduler.backends) == 0


# Servers that come and go


async def test_servers_join_and_leave(make_shell):
    shell = make_shell("")
    late = FakeReplica("late")
    await shell.router.add_servers({"late": late})
    assert await shell.acquire("p") == "late"
    shell.router.remove_servers(["late", "never there"])
    assert (shell.router.servers(), shell.router.total_inflight()) == ([], 0)
    await shell.release("late", "p")
    with pytest.raises(RuntimeError, match="No available servers"):
        await shell.acquire("p", 120)
    await shell.router.add_servers({"late": late})
    assert await shell.acquire("p", 120) == "late"
    assert shell.scheduler.backends[0].generation == 1


async def test_a_server_that_joins_paused_serves_when_it_resumes(make_shell):
    shell = make_shell("a", facts={"capacity_tokens": 1000})
    await shell.acquire("p", 600)
    hybrid = FakeReplica("hybrid")
    hybrid.become(paused=True)
    await shell.router.add_servers({"h": hybrid})
    held = await shell.held("q", 600)
    assert not held.done()
    hybrid.become(paused=False)
    await shell.poll()
    assert await held == "h"


async def test_a_server_that_joins_slowly_holds_nobody_whom_others_serve(make_shell, monkeypatch):
    monkeypatch.setattr(module, "REFRESH_S", 0.05)
    shell = make_shell("a")
    late = FakeReplica("late")
    late.fall_silent()
    joining = asyncio.create_task(shell.router.add_servers({"late": late}))
    await settle()
    assert await asyncio.wait_for(shell.acquire("p"), 1) == "a"
    assert shell.router.servers() == ["a", "late"]
    late.answer()
    await joining
    assert len(shell.scheduler.backends) == 2
    assert await shell.acquire("q") == "late"


async def test_a_server_that_cannot_be_scheduled_ends_no_request_that_others_serve(make_shell):
    shell = make_shell("a")
    bad = FakeReplica("bad")
    bad.refuse(ConfigError("no such pool"))
    shell.router._joining["bad"] = bad
    assert await shell.acquire("p") == "a"
    shell.router.remove_servers(["a"])
    with pytest.raises(ConfigError, match="no such pool"):
        await shell.acquire("p", 150)


async def test_a_server_that_does_not_answer_keeps_no_gate_shut(make_shell, monkeypatch):
    monkeypatch.setattr(pool, "REFRESH_S", 0.05)
    shell = make_shell("a b")
    await shell.acquire("p")
    for replica in shell.replicas.values():
        replica.become(paused=True)
    await shell.poll()
    held = await shell.held("q")
    assert not held.done()
    shell.replicas["a"].become(paused=False, version=1)
    shell.replicas["b"].fall_silent()
    await shell.poll()
    await asyncio.wait_for(shell.poll(after_s=1.0), 1)
    assert await asyncio.wait_for(held, 1) == "a"
    shell.replicas["b"].answer()


async def test_requests_that_wait_when_the_last_server_leaves_hear_of_it(make_shell):
    shell = make_shell("a", scheduler=ONE_AT_A_TIME)
    await shell.acquire("p")
    held = await shell.held("q")
    shell.router.remove_servers(["a"])
    with pytest.raises(RuntimeError, match="No available servers in load balancer"):
        await held


async def test_a_dead_server_is_left_out_from_the_first_sign(make_shell):
    shell = make_shell("a b")
    server = await shell.acquire("p")
    other = "b" if server == "a" else "a"
    shell.replicas[server].die()
    await shell.release(server, "p")  # the call failed at the caller
    assert shell.router.servers() == [other]
    assert await shell.acquire("p") == other
    assert list(shell.core.programs) == ["p@0"], "whoever asks again goes on"
    assert list(shell.router.lost_servers()) == [server]
    shell.replicas[other].become(broken="its engine core died")
    await shell.poll()
    with pytest.raises(RuntimeError, match="No available servers"):
        await shell.acquire("p", 130)
    assert shell.router.lost_servers()[other] == "its engine core died"


async def test_a_server_that_is_dead_from_the_start_does_not_join(make_shell):
    shell = make_shell("a b")
    shell.replicas["a"].die()
    await shell.router.inspect()
    assert await shell.acquire("p") == "b"
    assert shell.router.servers() == ["b"]
    assert list(shell.router.lost_servers()) == ["a"]


async def test_a_server_that_verl_removes_or_brings_again_is_not_lost(make_shell):
    shell = make_shell("a b c")
    await shell.acquire("p")
    shell.replicas["a"].die()
    shell.replicas["b"].die()
    await shell.poll()
    assert sorted(shell.router.lost_servers()) == ["a", "b"]
    shell.router.remove_servers(["a", "c"])
    assert list(shell.router.lost_servers()) == ["b"]
    await shell.router.add_servers({"b": FakeReplica("another b")})
    assert shell.router.lost_servers() == {}


# Callers that die, programs that end


async def test_a_turn_that_its_server_never_sees_is_taken_back_with_its_program(make_shell):
    shell = make_shell("a", scheduler=ONE_AT_A_TIME, orphan_s=60.0)
    await shell.acquire("p", 100)
    held = await shell.held("q", 200)
    shell.replicas["a"].become(prompt_lengths=(100,))
    await shell.poll(after_s=100.0)
    shell.replicas["a"].become(prompt_lengths=())
    await shell.poll(after_s=59.0)
    assert not held.done(), "it was there a minute ago"
    await shell.poll(after_s=2.0)
    assert await held == "a"
    assert list(shell.core.programs) == ["q@1"]
    await shell.release("a", "p")  # its caller lives after all
    assert shell.router.metrics()["thunder/router/num_reclaimed_turns"] == 1


async def test_a_turn_in_flight_never_expires_while_its_server_has_it(make_shell):
    shell = make_shell("a", orphan_s=60.0, forget_after_s=100.0)
    await shell.acquire("p", 100)
    shell.replicas["a"].become(prompt_lengths=(100,))
    for _ in range(5):
        await shell.poll(after_s=1000.0)
    assert shell.core.programs["p@0"].num_in_flight == 1
    shell.replicas["a"].become(paused=True, prompt_lengths=())
    for _ in range(5):
        await shell.poll(after_s=1000.0)
    assert shell.core.programs["p@0"].num_in_flight == 1, "a paused server parks what nobody can count"


async def test_an_idle_program_gives_way_and_comes_back_with_its_next_request(make_shell):
    shell = make_shell("a", facts={"capacity_tokens": 1000}, scheduler=TICKING)
    await shell.acquire("p", 700)
    await shell.release("a", "p")
    held = await shell.held("q", 700)
    assert await shell.until_granted(held) == "a"
    assert "p@0" in shell.core.programs, "its end was not announced"
    await shell.release("a", "q")
    assert await shell.acquire("p", 750) == "a"
    assert shell.core.programs["p@0"].num_turns_admitted == 2


async def test_a_program_idle_for_long_leaves_the_books_and_may_come_back(make_shell):
    shell = make_shell("a", forget_after_s=600.0)
    await shell.acquire("p")
    await shell.release("a", "p")
    await shell.poll(after_s=599.0)
    assert shell.scheduler.num_programs == 1
    await shell.poll(after_s=2.0)
    assert shell.scheduler.num_programs == 0
    assert await shell.acquire("p", 130) == "a"
    assert shell.core.programs["p@1"].arrived_s == 0.0, "as old as it was"


async def test_what_waits_in_the_figures_are_requests_not_programs_that_may_be_over(make_shell):
    shell = make_shell("a", scheduler=TICKING, facts={"capacity_tokens": 1000})
    await shell.acquire("p", 700)
    held = await shell.held("q", 700)
    assert shell.router.metrics()["thunder/router/waiting_share"] == 0.7
    await shell.release("a", "p")
    assert await shell.until_granted(held) == "a"
    assert shell.scheduler.num_waiting_acting == 1, "it ended in silence, and made room"
    assert shell.router.metrics()["thunder/router/waiting_share"] == 0.0


# Validation, groups, images


async def test_validation_is_served_and_kept_out_of_the_figures(make_shell):
    shell = make_shell("a", facts={"validation": Sampling(temperature=0, top_p=1.0, top_k=-1)})
    for turn in range(3):
        await shell.acquire("v", 100 + 300 * turn, temperature=0, top_p=1.0, top_k=-1)
        await shell.release("a", "v")
    await shell.acquire("t", 200, temperature=1.0, top_p=1.0, top_k=-1)
    await shell.release("a", "t")
    assert shell.core.programs["t@1"].context_tokens == 200, "training's turns are not expected to grow as much"
    figures = shell.router.metrics()
    assert figures["thunder/router/num_turns"] == 1
    assert figures["thunder/router/prompt_tokens/mean"] == 200
    assert shell.router.metrics()["thunder/router/num_turns"] == 0, "since the last call"


async def test_validation_that_samples_as_training_does_is_told_by_its_name(make_shell):
    shell = make_shell("a")
    for turn in range(3):
        await shell.acquire("validation#v", 100 + 300 * turn)
        await shell.release("a", "validation#v")
    await shell.acquire("t", 200)
    figures = shell.router.metrics()
    assert (figures["thunder/router/num_turns"], figures["thunder/router/prompt_tokens/mean"]) == (1, 200)


async def test_samples_of_one_prompt_are_a_group_until_the_weights_change(make_shell):
    shell = make_shell("a b")
    for name in ("p", "q"):
        await shell.router.acquire(name, [5] * 100, {})
    shell.replicas["a"].become(version=1)
    shell.replicas["b"].become(version=1)
    await shell.poll()
    await shell.router.acquire("r", [5] * 100, {})
    groups = [program.group for program in shell.core.programs.values()]
    assert groups[0] == groups[1] != groups[2]


async def test_prompts_with_images_are_counted_not_compared(make_shell):
    shell = make_shell("a", facts={"placeholder_ids": frozenset({7})})
    for name in ("p", "q"):
        await shell.router.acquire(name, [5] * 90 + [7] * 10, {})
    ledger = shell.router._service._scheduler._policy._ledger
    assert ledger.backends["a"].private_tokens == 200
    assert {program.group for program in shell.core.programs.values()} == {None}


async def test_a_caller_that_tells_of_a_programs_end_makes_room_at_once(make_shell):
    shell = make_shell("a", facts={"capacity_tokens": 1000})
    await shell.acquire("p", 700)
    waiting = await shell.held("q", 700)
    shell.router.release("a", "p")
    await shell.router.program_ended("p")
    await asyncio.wait_for(waiting, 1)
    assert list(shell.core.programs) == ["q@1"]
    await shell.router.program_ended("nobody's")
    await shell.router.program_ended("q")  # before its release, which comes late
    assert list(shell.core.programs) == ["q@1"]
    await shell.release("a", "q")
    assert not shell.core.programs


async def test_a_tool_that_is_told_of_is_the_one_that_the_scheduler_learns_of(make_shell):
    shell = make_shell("a")
    await shell.acquire("p", 100)
    shell.router.release("a", "p")
    await shell.router.tool_started("p", "bash")
    assert shell.core.programs["p@0"].tool == "bash"
    await shell.acquire("p", 150)
    await shell.router.tool_started("p", "late")
    assert shell.core.programs["p@0"].tool != "late"


async def test_the_fake_replica_keeps_the_contract_of_replicas():
    fake = FakeReplica("fake", capacity_tokens=CAPACITY_TOKENS)

    async def become(**changes):
        fake.become(**changes)

    await check_replica(fake, become, fake.die)
