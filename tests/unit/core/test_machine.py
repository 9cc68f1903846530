"""Every policy under arbitrary events: `Harness` checks the core's invariants after each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from thunder_rollout.core.backend import Backend
from thunder_rollout.core.config import (
    POLICIES,
    AdaptiveConfig,
    AimdConfig,
    CacheAwareConfig,
    CappedConfig,
    SchedulerConfig,
    ThunderConfig,
    TtlConfig,
)
from thunder_rollout.core.decisions import Decision, Pause, PrepareSandbox, Restore
from thunder_rollout.core.events import (
    BackendDown,
    BackendStats,
    BackendUp,
    Event,
    FinishReason,
    ProgramAnnounced,
    ProgramEnded,
    SandboxFailed,
    SandboxReady,
    SandboxStopped,
    ToolEnded,
    ToolStarted,
    TurnEnded,
    TurnProgress,
    TurnRequested,
    TurnStarted,
    WeightsUpdated,
    WeightsUpdating,
    Withdrawn,
)
from thunder_rollout.core.harness import Harness, replay
from thunder_rollout.core.policies.adaptive.ledger import Ledger
from thunder_rollout.core.policies.adaptive.policy import AdaptivePolicy
from thunder_rollout.core.program import SandboxNeed
from thunder_rollout.errors import BadEvent

pytestmark = pytest.mark.slow

PROGRAMS = st.sampled_from([f"p{index}" for index in range(8)])
BACKENDS = st.sampled_from(["a", "b", "c"])
VERSIONS = st.sampled_from([None, "0", "1", "2", "3"])
TOKENS = st.integers(1, 1200) | st.integers(1, 300)
CONFIGS = st.builds(
    SchedulerConfig,
    policy=st.sampled_from(("thunder", "adaptive", "adaptive", *POLICIES)),
    max_wait_s=st.sampled_from([8.0, 600.0]),
    prepare_ahead=st.sampled_from([0, 1, 2, 64]),
    thunder=st.builds(
        ThunderConfig,
        low_watermark=st.sampled_from([0.6, 0.8]),
        high_watermark=st.sampled_from([0.8, 1.0, 1.3]),
        decay_unit_s=st.sampled_from([1.0, 20.0]),
        decay_when_pausing=st.booleans(),
        headroom_tokens=st.sampled_from([0, 50]),
    ),
    capped=st.builds(CappedConfig, max_programs=st.integers(1, 4)),
    lease_s=st.sampled_from([None, None, 20.0]),
    max_staleness=st.sampled_from([None, 0, 1]),
    adaptive=st.builds(
        AdaptiveConfig,
        admit_watermark=st.sampled_from([0.6, 0.9]),
        least_fill=st.sampled_from([0.3, 0.6]),
        decay_unit_s=st.sampled_from([1.0, 20.0]),
        prior_prefill_token_s=st.sampled_from([1e-4, 1.0]),
        patience_s=st.sampled_from([0.0, 5.0]),
        lookahead=st.integers(1, 8),
        max_refill_share=st.sampled_from([0.1, 1.0]),
        silent_ends=st.booleans(),
        rebalance_on_update=st.booleans(),
    ),
    ttl=st.builds(TtlConfig, default_ttl_s=st.sampled_from([0.0, 5.0])),
    aimd=st.builds(AimdConfig, initial_programs=st.integers(1, 4)),
    cache_aware=st.builds(
        CacheAwareConfig, balance_abs_threshold=st.integers(0, 4), max_tree_tokens=st.sampled_from([500, 10_000])
    ),
)


def state_ledger(shell: Harness) -> Ledger:
    policy = shell.scheduler._policy
    assert isinstance(policy, AdaptivePolicy)
    return policy._ledger


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(config=CONFIGS, num_backends=st.integers(0, 2))
    def start(self, config: SchedulerConfig, num_backends: int) -> None:
        self.shell = Harness(config)
        self.generations: dict[str, int] = {}
        for name in "ab"[:num_backends]:
            self.up(name, 1000)

    def send(self, event: Event) -> list[Decision]:
        return self.checked(lambda: self.shell.send(event))

    def checked(self, act: Callable[[], list[Decision]], after_s: float = 0.0) -> list[Decision]:
        """`act` sends one event, `after_s` later; who is overdue by then is passed by nobody younger."""
        state, now = self.shell.scheduler._state, self.shell.now + after_s
        since_s = {program.program_id: program.waiting_since_s for program in state.waiting(now) if program.pending}
        overdue = state.overdue(now)
        bound = {program.program_id for program in state.programs.values() if program.backend is not None}
        decisions = act()
        self.check_preparations(decisions)
        for decision in decisions:
            if not isinstance(decision, Restore) or decision.request is None or decision.program in bound:
                continue
            for older in overdue:
                if older.backend is not None or not older.pending or older.program_id == decision.program:
                    continue
                if since_s.get(decision.program, now) > since_s[older.program_id]:
                    homes = {b.name for b in state.open_backends() if b.fits(older.context_tokens)}
                    assert homes != {decision.backend}, f"{decision.program} passed {older.program_id}"
        return decisions

    def check_preparations(self, decisions: list[Decision]) -> None:
        """`Harness` checks that each is one a program and released with it. Those ahead of a grant come in
        restore order, no more than allowed, and the head of the queue is never without."""
        state, max_ahead = self.shell.scheduler._state, self.shell.config.prepare_ahead
        asked = [decision.program for decision in decisions if isinstance(decision, PrepareSandbox)]
        order = [program.program_id for program in [*state.unready.ordered(self.shell.now), *state.announced.values()]]
        ahead = [program for program in asked if program in state.prepared]
        assert ahead == [program for program in order if program in ahead], "in restore order"
        assert all(decision.by_s >= self.shell.now for decision in decisions if isinstance(decision, PrepareSandbox))
        assert len(state.prepared) <= max_ahead
        if len(state.prepared) < max_ahead and not list(state.unready.overdue(self.shell.now)):
            failed = {name for name, program in state.announced.items() if program.sandbox is SandboxNeed.FAILED}
            assert not order or order[0] in state.prepared | failed

    # Backends

    @rule(
        name=BACKENDS,
        capacity_tokens=st.integers(100, 2000),
        offload_tokens=st.sampled_from([0, 0, 300, 5000]),
        releases=st.booleans(),
        updating=st.booleans(),
    )
    def up(
        self,
        name: str,
        capacity_tokens: int,
        offload_tokens: int = 0,
        releases: bool = False,
        updating: bool = False,
    ) -> None:
        generation = self.generations[name] = self.generations.get(name, 0) + 1
        self.send(
            BackendUp(
                backend=name,
                generation=generation,
                capacity_tokens=capacity_tokens,
                max_running=4,
                offload_tokens=offload_tokens,
                releases=releases,
                updating=updating,
            )
        )

    @rule(data=st.data())
    @precondition(lambda self: self.generations)
    def down(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.generations)))
        self.send(BackendDown(backend=name, generation=data.draw(st.integers(1, self.generations[name]))))

    @rule(data=st.data(), updating=st.booleans())
    @precondition(lambda self: self.generations)
    def weights(self, data: st.DataObject, updating: bool) -> None:
        names = tuple(data.draw(st.sets(st.sampled_from(sorted(self.generations)))))
        names = tuple(sorted(names))
        state, config = self.shell.scheduler._state, self.shell.config
        if updating:
            self.send(WeightsUpdating(backends=names))
            if config.policy == "adaptive" and config.adaptive.rebalance_on_update:
                for name in set(names) & set(state.backends):
                    programs = state.backends[name].programs.values()
                    assert all(program.marked for program in programs), "all places are given up, for it is free"
            return
        version = data.draw(VERSIONS)
        decisions = self.send(WeightsUpdated(backends=names, version=version))
        self.check_staleness()
        if config.policy == "adaptive":
            ledger, again = state_ledger(self.shell), {decision.program for decision in decisions}
            for program_id, account in ledger.programs.items():
                if account.last_backend in names and program_id not in again:
                    home = ledger.backends[account.last_backend]
                    assert account.last_cache != home.cache
                    assert program_id in ledger.tree or ledger.resident_tokens(program_id, home) == 0, "void"

    @rule(
        data=st.data(),
        used_tokens=st.none() | st.integers(0, 100),
        stored=st.none()
        | st.sets(st.integers(0, 2).flatmap(lambda family: st.integers(1000 * family, 1000 * family + 19))),
        removed=st.sets(st.integers(0, 19)),
        whole=st.booleans(),
    )
    @precondition(lambda self: self.generations)
    def stats(
        self, data: st.DataObject, used_tokens: int | None, stored: set[int] | None, removed: set[int], whole: bool
    ) -> None:
        """Engines say what they like of their caches; news of an older generation changes nothing."""
        name = data.draw(st.sampled_from(sorted(self.generations)))
        generation = data.draw(st.integers(1, self.generations[name]))
        self.send(
            BackendStats(
                backend=name,
                generation=generation,
                used_tokens=used_tokens,
                stored=None if stored is None else tuple(sorted(stored)),
                removed=tuple(sorted(removed)),
                whole=whole,
            )
        )
        backends = {backend.backend: backend for backend in self.shell.scheduler.snapshot().backends}
        if name not in backends or self.shell.config.policy != "adaptive":
            return
        drift_tokens = backends[name].drift_tokens
        assert drift_tokens is None or drift_tokens >= 0
        if generation == self.generations[name]:
            pool = state_ledger(self.shell).tree._pools[name]
            assert (drift_tokens is None) == (pool.resident is None)
            assert stored is None or not whole or pool.resident == stored

    # Programs

    @rule(program=PROGRAMS, prompt_tokens=TOKENS, sandbox=st.booleans(), family=st.none() | st.integers(0, 2))
    def ask(self, program: str, prompt_tokens: int, sandbox: bool, family: int | None) -> None:
        """Programs of one family share the prefix of the shorter one; some are samples of one group."""
        request = f"r{len(self.shell.log)}"
        hashes = None if family is None else tuple(family * 1000 + block for block in range(prompt_tokens // 64))
        self.send(
            TurnRequested(
                program=program,
                request=request,
                prompt_tokens=prompt_tokens,
                sandbox=sandbox,
                block_hashes=hashes,
                group={"p0": "g", "p1": "g", "p2": "g", "p3": "h", "p4": "h"}.get(program),
            )
        )

    @rule(program=PROGRAMS, task_kind=st.sampled_from([None, "toy"]))
    def announce(self, program: str, task_kind: str | None) -> None:
        state = self.shell.scheduler._state
        if program in state.programs or program in state.announced:
            with pytest.raises(BadEvent):
                self.send(ProgramAnnounced(program=program))
        else:
            self.send(ProgramAnnounced(program=program, task_kind=task_kind))

    @rule(data=st.data(), growth_tokens=st.integers(1, 400))
    @precondition(lambda self: self.shell.scheduler._state.programs)
    def ask_for_the_next_turn(self, data: st.DataObject, growth_tokens: int) -> None:
        programs = self.shell.scheduler._state.programs
        program = programs[data.draw(st.sampled_from(sorted(programs)))]
        self.ask(program.program_id, program.context_tokens + growth_tokens, sandbox=True, family=None)

    @rule(data=st.data(), output_tokens=st.integers(0, 300))
    @precondition(lambda self: self.shell.grants)
    def progress(self, data: st.DataObject, output_tokens: int) -> None:
        grant = data.draw(st.sampled_from(sorted(self.shell.grants)))
        program, _ = self.shell.grants[grant]
        self.send(TurnStarted(program=program, grant=grant))
        self.send(TurnProgress(program=program, grant=grant, output_tokens=output_tokens))

    @rule(
        data=st.data(),
        output_tokens=st.none() | st.integers(0, 300),
        finish=st.sampled_from(FinishReason),
        version=VERSIONS,
    )
    @precondition(lambda self: self.shell.grants)
    def end(self, data: st.DataObject, output_tokens: int | None, finish: FinishReason, version: str | None) -> None:
        grant = data.draw(st.sampled_from(sorted(self.shell.grants)))
        program, _ = self.shell.grants[grant]
        self.send(
            TurnEnded(
                program=program,
                grant=grant,
                output_tokens=output_tokens,
                finish_reason=finish,
                weight_version=version,
            )
        )

    @rule(data=st.data())
    @precondition(lambda self: self.shell.waiting or self.shell.grants)
    def withdraw_request(self, data: st.DataObject) -> None:
        open_requests = sorted([*self.shell.grants.values(), *((p, r) for r, p in self.shell.waiting.items())])
        program, request = data.draw(st.sampled_from(open_requests))
        self.send(Withdrawn(program=program, request=request))

    @rule(program=PROGRAMS)
    def withdraw_program(self, program: str) -> None:
        self.send(Withdrawn(program=program))

    @rule(program=PROGRAMS, what=st.sampled_from([ProgramEnded, ToolStarted, ToolEnded]))
    def about_a_known_program(self, program: str, what: Any) -> None:
        state = self.shell.scheduler._state
        if program in state.programs or (what is ProgramEnded and program in state.announced):
            self.send(what(program=program))

    @rule(program=PROGRAMS, what=st.sampled_from([SandboxReady, SandboxFailed, SandboxStopped]))
    def sandbox(self, program: str, what: Any) -> None:
        self.send(what(program=program))

    @rule(after_s=st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    def tick(self, after_s: float) -> None:
        programs = self.shell.scheduler._state.programs.values()
        marked = {program.program_id for program in programs if program.marked}
        decisions = self.checked(lambda: self.shell.tick(after_s), after_s)
        self.check_leases()
        config = self.shell.config.thunder
        if self.shell.config.policy != "thunder":
            return
        for backend in self.shell.scheduler._state.backends.values():
            paused = {d.program for d in decisions if isinstance(d, Pause) and d.backend == backend.name}
            self.check_demand(backend)
            if not config.decay_when_pausing:
                self.check_releases(backend, marked, paused)

    def check_leases(self) -> None:
        """Whoever is left was heard of, or waits for an answer; the sandboxes of the others are owed no more
        (see `the_shell_and_the_scheduler_agree`)."""
        lease_s, state = self.shell.config.lease_s, self.shell.scheduler._state
        if lease_s is not None:
            silent = [program for program in state.silent(self.shell.now, lease_s) if not program.pending]
            assert not silent

    def check_staleness(self) -> None:
        """Whoever is left and asks has no token that is too old."""
        versions = self.shell.scheduler._versions
        for program in self.shell.scheduler._state.programs.values():
            assert not program.pending or not versions.is_stale(program.oldest_weights)

    def check_demand(self, backend: Backend) -> None:
        """What is left after committed releases is within the watermark, but for one program that the
        liveness rule let onto an idle backend. Where eq. 7 discounts acting programs, the bound
        leaves them out."""
        config = self.shell.config.thunder
        left = [program for program in backend.programs.values() if not program.marked]
        if config.decay_when_pausing:
            left = [program for program in left if program.acting_since_s is None]
        needs = [program.context_tokens + config.headroom_tokens for program in left if not program.turns]
        admitted = [program.context_tokens + config.headroom_tokens for program in left if program.turns]
        demand = sum(needs) + (0 if len(admitted) == 1 and not backend.num_marked else sum(admitted))
        assert demand <= config.high_watermark * backend.capacity_tokens

    def check_releases(self, backend: Backend, marked_before: set[str], paused: set[str]) -> None:
        """Something was released only where demand without the committed releases was too high."""
        config = self.shell.config.thunder
        programs = backend.programs.values()
        marked = {program.program_id for program in programs if program.marked} - marked_before
        if not marked and not paused:
            return
        counted = {program.program_id for program in programs if not program.marked} | marked | paused
        known = self.shell.scheduler._state.programs
        demand = sum(known[name].context_tokens + config.headroom_tokens for name in counted)
        assert demand > config.high_watermark * backend.capacity_tokens, "committed releases are counted once"

    @rule(program=PROGRAMS)
    def bad_event_changes_nothing(self, program: str) -> None:
        state = self.shell.scheduler._state
        before = (self.shell.scheduler.snapshot(), self.shell.scheduler.waiting_order(), len(state.void_grants))
        bad = [
            TurnEnded(program=program, grant=10**9),
            TurnRequested(program=program, request="r", prompt_tokens=0),
            ProgramEnded(program="nobody"),
            BackendDown(backend="nowhere", generation=1),
            WeightsUpdating(backends=(*self.generations, "nowhere")),
            *(
                BackendUp(backend=b, generation=g, capacity_tokens=5, max_running=1)
                for b, g in self.generations.items()
            ),
            *(
                TurnRequested(program=holder, request=request, prompt_tokens=5)
                for holder, request in self.shell.grants.values()
            ),
        ]
        for event in bad:
            with pytest.raises(BadEvent):
                self.shell.scheduler.handle(event, self.shell.now)
        after = (self.shell.scheduler.snapshot(), self.shell.scheduler.waiting_order(), len(state.void_grants))
        assert after == before

    @invariant()
    def the_account_of_adaptive_is_exact(self) -> None:
        """Each backend is charged for what its programs hold, shared blocks once; counts never fall below 0."""
        if not hasattr(self, "shell") or self.shell.config.policy != "adaptive":
            return
        state, ledger = self.shell.scheduler._state, state_ledger(self.shell)
        assert set(ledger.programs) == set(state.programs)
        for group, members in ledger.groups._groups.items():
            assert set(members.live) == {p.program_id for p in state.programs.values() if p.group == group}
            assert 0 <= ledger.groups.complete_share(group) <= 1
        for backend in state.backends.values():
            account = ledger.backends[backend.name]
            accounts = [ledger.programs[name] for name in backend.programs]
            assert account.num_bound == backend.num_bound
            assert account.private_tokens == sum(program.private_tokens for program in accounts)
            assert account.reserve_tokens == pytest.approx(sum(program.reserve_tokens for program in accounts))
            assert account.clock.num_in_flight == sum(program.num_in_flight for program in backend.programs.values())
            curves = [program.curve for program in accounts if program.curve]
            assert account.curve == pytest.approx([sum(tokens) for tokens in zip(*curves, strict=True)] or [0] * 20)
            assert 0 <= ledger.gain(account) <= 1
            assert all(0 <= ledger.loss_share(program, account) <= 1 for program in backend.programs.values())
            assert account.refill_tokens == sum(
                run.uncached_tokens
                for program in ledger.programs.values()
                for run in program.runs.values()
                if run.refill and run.backend == backend.name
            )
            assert ledger.demand_tokens(account) <= backend.bound_tokens + account.reserve_tokens + 64 * len(accounts)

    @invariant()
    def beliefs_about_caches_add_up(self) -> None:
        if not hasattr(self, "shell") or self.shell.config.policy != "adaptive":
            return
        state, ledger = self.shell.scheduler._state, state_ledger(self.shell)
        for name, pool in ledger.tree._pools.items():
            running = {
                program
                for program, account in ledger.programs.items()
                for run in account.runs.values()
                if run.backend == name
            }
            assert set(pool.running) == running
            assert pool.num_held == sum(run.held[name] for run in pool.recent)
            assert all(0 < run.held[name] <= len(run.hashes) for run in pool.recent)
            assert pool.num_held <= pool.max_blocks
            assert name in state.backends or pool.resident is None

    @invariant()
    def the_shell_and_the_scheduler_agree(self) -> None:
        if not hasattr(self, "shell"):
            return
        state = self.shell.scheduler._state
        pending = {request for program in state.programs.values() for request in program.pending}
        assert pending == set(self.shell.waiting)
        assert {grant for program in state.programs.values() for grant in program.turns} == set(self.shell.grants)
        assert self.shell.owed <= {*state.programs, *state.announced}, "whoever ended released its sandbox"

    def teardown(self) -> None:
        if not hasattr(self, "shell"):
            return
        self.send(BackendUp(backend="z", generation=1, capacity_tokens=2000, max_running=4))
        self.send(WeightsUpdated(backends=tuple(sorted(self.generations))))
        for _ in range(100):
            if not self.shell.waiting and not self.shell.grants:
                break
            for program, _request in list(self.shell.grants.values()):
                self.shell.end(program, 1)
            self.shell.tick(5.0)
        assert not self.shell.waiting, "nobody is forgotten"
        state = self.shell.scheduler._state
        for program in sorted([*state.programs, *state.announced]):
            self.send(ProgramEnded(program=program))
        assert not self.shell.owed
        assert self.shell.scheduler.snapshot().num_programs == 0
        assert replay(self.shell.config, self.shell.log) == self.shell.decisions, "decisions are reproducible"


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
