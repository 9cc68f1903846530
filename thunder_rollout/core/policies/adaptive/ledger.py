"""What `adaptive` knows beyond the state: an account for each backend and each program.

Demand of a backend, in tokens: the blocks of its programs with shared ones counted once, what they
have beyond their hashed blocks, and the output that their turns in flight are still expected to
produce. Programs without hashes count in full.

The state tells of every change (`changed`), so accounts are exact between two events; `touched`
collects the backends whose demand or load changed since it was last cleared.
"""

from __future__ import annotations

from dataclasses import replace

from thunder_rollout.core.config import AdaptiveConfig
from thunder_rollout.core.events import (
    BackendDown,
    BackendStats,
    BackendUp,
    Event,
    FinishReason,
    Tick,
    ToolStarted,
    TurnEnded,
    TurnRequested,
    WeightsUpdated,
)
from thunder_rollout.core.policies.adaptive.absences import Absences
from thunder_rollout.core.policies.adaptive.accounts import BackendAccount, ProgramAccount, Run
from thunder_rollout.core.policies.adaptive.groups import Groups
from thunder_rollout.core.policies.adaptive.growth import Growth
from thunder_rollout.core.policies.adaptive.prefill_model import PrefillModel, ServiceClock
from thunder_rollout.core.policies.adaptive.projection import Projection
from thunder_rollout.core.policies.adaptive.return_times import ReturnTimes
from thunder_rollout.core.policies.adaptive.tiers import TieredTree
from thunder_rollout.core.policies.base import ProgramView
from thunder_rollout.core.program import Phase, Status

_CUT = (FinishReason.ABORT, FinishReason.ERROR)
_UNSIZED_BLOCKS = 2**40  # a pool's bound while no block size is known


class Ledger:
    def __init__(self, config: AdaptiveConfig) -> None:
        self._config = config
        self.now = 0.0
        self.tree = TieredTree()
        self.block_size: int | None = None
        self.programs: dict[str, ProgramAccount] = {}
        self.backends: dict[str, BackendAccount] = {}
        self.touched: dict[str, None] = {}
        self.began_acting: dict[str, None] = {}  # backends where a program did since this was last cleared
        self.no_room_for: dict[str, None] = {}  # waiting programs that no backend had room for when all were asked
        self.queue_changed = False  # since this was last cleared
        self.growth = Growth(prior_growth=config.prior_growth)
        self._projection = Projection(self.growth, self.backends)
        self.return_times = ReturnTimes(
            decay_base=config.decay_base, decay_unit_s=config.decay_unit_s, prior_weight=config.prior_returns
        )
        self._absences = Absences(self.return_times, self.growth, silent_ends=config.silent_ends)
        self._fleet_model = self._new_model()
        self.groups = Groups()
        self._ended: dict[int, Run] = {}

    # Questions

    def demand_tokens(self, account: BackendAccount) -> float:
        blocks = self.tree.unique_blocks(account.name)
        return blocks * (self.block_size or 0) + account.private_tokens + account.reserve_tokens

    def freed_tokens(self, program_id: str) -> float:
        """What its backend's demand loses with it."""
        program = self.programs[program_id]
        blocks = self.tree.exclusive_blocks(program_id)
        return blocks * (self.block_size or 0) + program.private_tokens + program.reserve_tokens

    def added_tokens(self, program: ProgramView, backend: str) -> float:
        """What the backend's demand gains with it and its pending turn."""
        account = self.programs[program.program_id]
        blocks = self.tree.added_blocks(program.program_id, backend)
        return blocks * (self.block_size or 0) + account.private_tokens + self._expected_output(account)

    def resident_tokens(self, program_id: str, backend: BackendAccount) -> int:
        """How much of its context the backend's cache holds, as far as we know."""
        program = self.programs[program_id]
        if program_id in self.tree:
            return self.tree.held_blocks(program_id, backend.name) * (self.block_size or 0)
        if program.last_backend != backend.name or program.last_cache != backend.cache:
            return 0
        overwritten = backend.odometer_tokens - program.last_odometer
        return program.settled_tokens if overwritten <= backend.capacity_tokens - self.demand_tokens(backend) else 0

    def prefill_s(self, program: ProgramView, backend: BackendAccount) -> float:
        """Seconds to load and compute what of its context the backend does not hold."""
        missing = max(0, program.context_tokens - self.resident_tokens(program.program_id, backend))
        return sum(self.again_s(program, missing, backend))

    def again_s(self, program: ProgramView, num_tokens: float, backend: BackendAccount) -> tuple[float, float]:
        """Seconds to have the last `num_tokens` of its context on the backend again: of prefill, of loading."""
        model, before = self.model(backend), program.context_tokens - num_tokens
        offloaded = self.tree.offloaded_blocks(program.program_id, backend.name) * (self.block_size or 0)
        loaded = min(num_tokens, max(0.0, offloaded - before))
        return model.prefill_s(num_tokens - loaded, program.context_tokens), model.load_s(loaded)

    def model(self, backend: BackendAccount) -> PrefillModel:
        """The backend's own once it has seen enough, the fleet's before."""
        return backend.model if backend.model.num_turns >= self._config.min_turns else self._fleet_model

    def gain(self, account: BackendAccount) -> float:
        """By which share throughput grows with the programs bound: d ln X / d ln n of the closed loop
        X = n / (Z + D), with the tools' time Z and the turns' D, of which `crowding` grows with n; 0 before
        anything was seen."""
        absence_s, turn_s = self.return_times.recent_s, account.mean_turn_s
        if not turn_s:
            return 0.0
        return (absence_s + turn_s * (1.0 - self.model(account).crowding)) / (absence_s + turn_s)

    def loss_share(self, program: ProgramView, account: BackendAccount) -> float:
        """What losing such a program's KV costs, as a share of computing it again: what loading costs
        where the backend has a host tier."""
        if not account.offload_tokens:
            return 1.0
        model = self.model(account)
        return min(1.0, model.load_s(1.0) / model.prefill_s(1.0, program.context_tokens))

    def absence_s(self, program_id: str) -> float:
        """Expected seconds until its next request."""
        return self._absences.remaining_s(self.programs[program_id], self.now)

    def peak_tokens(self, program: ProgramView, backend: BackendAccount, added_tokens: float) -> float:
        """See `Projection.peak_tokens`."""
        return self._projection.peak_tokens(
            self.programs[program.program_id],
            program.context_tokens,
            backend,
            unique_tokens=self.tree.unique_blocks(backend.name) * (self.block_size or 0),
            added=added_tokens,
        )

    # Events

    def accept(self, request: TurnRequested) -> TurnRequested:
        """Take the request's hashes in. Raises `BadEvent` for hashes that are not."""
        hashes = request.block_hashes
        if hashes and self.block_size is None and len(hashes) <= request.prompt_tokens:
            self._set_block_size(2 ** ((request.prompt_tokens // len(hashes)).bit_length() - 1))
        program = self.programs.get(request.program)
        if not hashes or self.block_size is None or len(hashes) * self.block_size > request.prompt_tokens:
            if request.program in self.tree:
                self.tree.remove(request.program)
        else:
            self._put(request.program, program, hashes)
        if program is None:
            program = self.programs[request.program] = ProgramAccount(kind=request.task_kind, group=request.group)
            if request.group is not None:
                self.groups.join(request.group, request.program)
        program.expected_output_tokens = request.expected_output_tokens
        return request if hashes is None else replace(request, block_hashes=None)

    def changed(self, program: ProgramView) -> None:
        account = self.programs[program.program_id]
        self._charge(account, -1)
        self.no_room_for.pop(program.program_id, None)
        self.queue_changed |= account.backend is None or program.backend is None
        for grant in [grant for grant in account.runs if grant not in program.turns]:
            self._end_run(program.program_id, grant, account.runs.pop(grant))
        if program.status is Status.TERMINATED:
            self._forget(program.program_id, account)
            return
        self._follow(program, account)
        account.backend = program.backend
        if self.tree.num_blocks(program.program_id) * (self.block_size or 0) > program.context_tokens:
            self.tree.remove(program.program_id)  # the hashes are of a request that was rejected or withdrawn
        if program.program_id in self.tree:
            self.tree.bind(program.program_id, program.backend)
        hashed = self.tree.num_blocks(program.program_id) * (self.block_size or 0)
        account.context_tokens = program.context_tokens
        self.growth.reach(account.kind, program.context_tokens)
        self._projection.follow(account, None if program.marked else program.backend)
        account.private_tokens = max(0, program.context_tokens - hashed)
        account.num_in_flight = program.num_in_flight
        account.reserve_tokens = sum(
            max(0.0, run.output_tokens - program.turns[grant].output_tokens) for grant, run in account.runs.items()
        )
        self._charge(account, 1)

    def granted(self, program: ProgramView, request: TurnRequested, backend: str, grant: int) -> None:
        account, home = self.programs[program.program_id], self.backends[backend]
        account.spared_since_s = None
        held = min(request.prompt_tokens, self.resident_tokens(program.program_id, home))
        offloaded = self.tree.offloaded_blocks(program.program_id, backend) * (self.block_size or 0)
        loaded = min(request.prompt_tokens, max(held, offloaded)) - held
        uncached = request.prompt_tokens - held - loaded
        run = Run(
            backend=backend,
            prompt_tokens=request.prompt_tokens,
            held_tokens=held,
            loaded_tokens=loaded,
            uncached_tokens=uncached,
            output_tokens=self._expected_output(account),
            granted_s=self.now,
            served_s=home.clock.served_s,
            refill=account.was_granted and 2 * uncached > request.prompt_tokens,
        )
        account.was_granted = True
        self._charge(account, -1)
        account.runs[grant] = run
        account.reserve_tokens += run.output_tokens
        self._charge(account, 1)
        if run.refill:
            home.refill_tokens += uncached
        self.tree.start_turn(program.program_id, backend)

    def begin(self, now: float) -> None:
        self.now = now
        self._ended.clear()

    def observe(self, event: Event) -> None:
        match event:
            case TurnEnded():
                self._learn_turn(event)
            case ToolStarted():
                self.programs[event.program].tool = event.tool
                self.programs[event.program].expected_s = event.expected_s
            case BackendStats() if self.backends[event.backend].generation == event.generation:
                self.backends[event.backend].hear(event, self.tree, self.now, self.block_size or 0)
            case BackendUp():
                self._add_backend(event)
            case BackendDown() if self.backends[event.backend].generation == event.generation:
                self._void_caches((event.backend,))
                self.backends[event.backend].lose_sight(self.tree)
            case WeightsUpdated():
                self._void_caches(event.backends)
            case Tick():
                self._absences.look(self.programs, self.now)
            case _:
                pass

    # Inside

    def _new_model(self) -> PrefillModel:
        prefill_s, load_s = self._config.prior_prefill_token_s, self._config.prior_load_token_s
        return PrefillModel(prior_token_s=prefill_s, prior_load_token_s=load_s, forgetting=self._config.forgetting)

    def _expected_output(self, program: ProgramAccount) -> float:
        if program.expected_output_tokens is not None:
            return program.expected_output_tokens
        return self.growth.output_tokens(program.kind)

    def _put(self, program_id: str, program: ProgramAccount | None, hashes: tuple[int, ...]) -> None:
        """What the last turn produced became blocks; they are where it ran, if its prompt still is."""
        assert self.block_size is not None
        old = self.tree.num_blocks(program_id)
        ran_on = program.last_backend if program is not None else None
        whole = False
        if program is not None and ran_on is not None and program.last_cache == self.backends[ran_on].cache:
            whole = self.tree.held_blocks(program_id, ran_on) == old
        num_shared = self.tree.put(program_id, hashes)
        if program is not None:
            self.tree.bind(program_id, program.backend)
            if whole and ran_on is not None and num_shared == old:
                self.tree.hold(program_id, ran_on, program.settled_tokens // self.block_size)

    def _follow(self, program: ProgramView, account: ProgramAccount) -> None:
        """Note when it began acting, and learn from it when it comes back."""
        acting_since_s = program.acting_since_s if program.phase is Phase.ACTING else None
        if account.acting_since_s is not None and acting_since_s is None:
            self._absences.ended(account, self.now, returned=program.has_open)
            account.last_tool, account.tool, account.expected_s = account.tool, None, None
        if acting_since_s is not None and account.acting_since_s is None:
            self._absences.began(program.program_id, account, acting_since_s, self.now)
            if program.backend is not None:
                self.began_acting[program.backend] = None
        account.acting_since_s = acting_since_s

    def _charge(self, account: ProgramAccount, sign: int) -> None:
        if account.backend is None:
            return
        backend = self.backends[account.backend]
        backend.clock.advance(self.now)
        backend.private_tokens += sign * account.private_tokens
        backend.reserve_tokens += sign * account.reserve_tokens
        backend.num_bound += sign
        backend.clock.num_in_flight += sign * account.num_in_flight
        if not backend.num_bound:  # what rounding left
            backend.reserve_tokens = 0.0
        self.touched[backend.name] = None

    def _end_run(self, program_id: str, grant: int, run: Run) -> None:
        self._ended[grant] = run
        backend = self.backends[run.backend]
        self.tree.end_turn(program_id, run.backend)
        backend.turn_ended(program_id, self.now)
        if run.refill:
            backend.refill_tokens -= run.uncached_tokens
        self.touched[run.backend] = None

    def _forget(self, program_id: str, account: ProgramAccount) -> None:
        self._projection.follow(account, None)
        if account.acting_since_s is not None:
            self._absences.ended(account, self.now, returned=False)
        if program_id in self.tree:
            self.tree.remove(program_id)
        self._absences.forgotten(account)
        if account.group is not None:
            self.groups.leave(account.group, program_id)
        del self.programs[program_id]

    def _learn_turn(self, event: TurnEnded) -> None:
        run, program = self._ended.get(event.grant), self.programs.get(event.program)
        if run is None or program is None or event.finish_reason in _CUT:
            return
        backend = self.backends[run.backend]
        output = event.output_tokens or 0
        uncached, loaded = run.uncached_tokens, run.loaded_tokens
        if event.cached_tokens is not None:
            uncached = max(0, run.prompt_tokens - event.cached_tokens)
            loaded = max(0, event.cached_tokens - run.held_tokens) if backend.offload_tokens else 0
        backend.odometer_tokens += uncached + loaded + output
        program.last_backend = run.backend
        program.last_cache = backend.cache
        program.last_odometer = backend.odometer_tokens
        program.settled_tokens = run.prompt_tokens + output
        self.tree.hold(event.program, run.backend)
        self.growth.add_turn(program.kind, output)
        duration_s = self.now - run.granted_s
        backend.mean_turn_s += (duration_s - backend.mean_turn_s) / min(backend.model.num_turns + 1, 20)
        for model in (backend.model, self._fleet_model):
            model.add(
                uncached_tokens=uncached,
                loaded_tokens=loaded,
                prompt_tokens=run.prompt_tokens,
                output_tokens=output,
                duration_s=duration_s,
                service_s=backend.clock.served_s - run.served_s,
            )

    def _add_backend(self, event: BackendUp) -> None:
        if event.block_size is not None:
            self._set_block_size(event.block_size)
        old = self.backends.get(event.backend)
        if old is None:
            clock = ServiceClock()
            clock.advance(self.now)
            self.backends[event.backend] = BackendAccount(
                name=event.backend,
                generation=event.generation,
                capacity_tokens=event.capacity_tokens,
                offload_tokens=event.offload_tokens,
                releases=event.releases,
                max_running=event.max_running,
                model=self._new_model(),
                clock=clock,
            )
        else:
            self._void_caches((event.backend,))
            old.lose_sight(self.tree)
            old.generation = event.generation
            old.capacity_tokens = event.capacity_tokens
            old.offload_tokens, old.releases = event.offload_tokens, event.releases
            old.max_running = event.max_running
            old.refusal = None
        self._size_pool(self.backends[event.backend])
        self.touched[event.backend] = None

    def _void_caches(self, names: tuple[str, ...]) -> None:
        for name in names:
            self.tree.forget_held(name)
            self.backends[name].cache += 1
            self.touched[name] = None

    def _set_block_size(self, block_size: int) -> None:
        self.block_size = block_size
        for account in self.backends.values():
            self._size_pool(account)

    def _size_pool(self, account: BackendAccount) -> None:
        if not account.num_bound:
            self._projection.size(account)
        max_blocks = account.capacity_tokens // self.block_size if self.block_size else _UNSIZED_BLOCKS
        self.tree.add_backend(account.name, max_blocks, releases=account.releases)
        self.tree.set_tier(account.name, account.offload_tokens // (self.block_size or 1))
