"""What no policy can beat, beside every result.

- `infinite_kv`: the same simulation with a pool that holds everything, so that nothing is ever
  computed twice. What limits it is compute alone.
- closed loop: N programs, each never waiting for another: N / (its model time + its tool time).
- `clairvoyant`: see `sim.clairvoyant`; a schedule, so it can be beaten.

The bound of a policy's steps/min is the lower of the first two.
"""

from __future__ import annotations

from dataclasses import replace

from thunder_rollout.sim.clairvoyant import ClairvoyantPolicy, Foresight
from thunder_rollout.sim.measure import SimResult
from thunder_rollout.sim.profiles import EngineProfile
from thunder_rollout.sim.simulator import Setup, Simulation
from thunder_rollout.sim.workloads import Script, Workload

INFINITE_KV = "infinite_kv"
CLAIRVOYANT = "clairvoyant"
BOUNDS = (INFINITE_KV, CLAIRVOYANT)  # those that are simulated
SAMPLE_PROGRAMS = 200
FILL_SHARES = (1.0, 0.9, 0.8, 0.65)


def infinite_kv(setup: Setup) -> SimResult:
    """Sticky placement, for balance, on pools that never fill."""
    profile = setup.profile
    tokens = max(profile.capacity_tokens, 1000 * setup.num_slots * profile.longest_context_tokens)
    roomy = replace(profile, capacity_tokens=tokens, max_context_tokens=profile.longest_context_tokens)
    return Simulation(replace(setup, profile=roomy, scheduler=replace(setup.scheduler, policy="sticky"))).run()


def clairvoyant(setup: Setup) -> SimResult:
    """The best of a few shares of the pools to fill."""
    results = []
    for share in FILL_SHARES:
        foresight = Foresight()
        policy = ClairvoyantPolicy(foresight, setup.profile, share=share)
        results.append(Simulation(setup, policy=policy, foresight=foresight).run())
    return max(results, key=lambda result: result.steps_per_min)


def closed_loop_steps_per_min(workload: Workload, profile: EngineProfile, *, num_programs: int, seed: int) -> float:
    """All of a program's context cached, every turn alone on its engine."""
    seconds = 0.0
    turns = 0
    for index in range(SAMPLE_PROGRAMS):
        script = workload.script(index, seed)
        turns += len(script.turns)
        seconds += lone_s(script, profile)
    return 60 * num_programs * turns / seconds


def lone_s(script: Script, profile: EngineProfile) -> float:
    """The program from its first request to the end of its last tool, alone on an engine; a shared
    head counts as cached."""
    seconds = 0.0
    cached = sum(tokens for _, tokens in script.shared)
    context = 0
    for turn in script.turns:
        prompt = context + turn.new_tokens
        seconds += profile.turn_overhead_s + profile.prefill_s(prompt, min(cached, prompt - 1))
        seconds += profile.decode_s(prompt, turn.output_tokens) + turn.tool_s
        context = cached = prompt + turn.output_tokens
    return seconds
