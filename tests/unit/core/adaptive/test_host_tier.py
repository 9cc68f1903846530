"""`adaptive` where a backend keeps KV in host memory as well."""

from __future__ import annotations

import pytest

from tests.unit.core.test_policy_adaptive import adaptive, blocks, who
from thunder_rollout.core.decisions import Pause
from thunder_rollout.core.events import (
    BackendUp,
    ProgramEnded,
    ToolStarted,
    TurnEnded,
    WeightsUpdated,
    WeightsUpdating,
)
from thunder_rollout.core.harness import Harness


def tiered(offload_tokens: int, *, prior_growth: float = 0.0, backends: str = "a") -> Harness:
    """Backends of 1000 tokens of KV, with so many in host memory."""
    shell = adaptive(prior_load_token_s=1e-6, prior_growth=prior_growth)
    for name in backends:
        shell.send(
            BackendUp(
                backend=name,
                generation=2,
                capacity_tokens=1000,
                max_running=8,
                block_size=16,
                offload_tokens=offload_tokens,
            )
        )
    return shell


@pytest.mark.parametrize(("offload_tokens", "victim"), [(0, "p"), (400, "q")])
def test_what_can_be_loaded_is_given_up_before_what_must_be_computed(offload_tokens: int, victim: str) -> None:
    """The tier has room for the one that ran last."""
    shell = tiered(offload_tokens)
    for name, first in (("p", 1000), ("q", 2000)):
        shell.ask(name, 400, block_hashes=blocks(first, 25))
        shell.end(name, 0)
        shell.send(ToolStarted(program=name, tool="web"))
    paused = [decision for decision in shell.ask("r", 300) if isinstance(decision, Pause)]
    assert [decision.program for decision in paused] == [victim]


def test_what_a_backend_can_load_is_cheap_to_place_there() -> None:
    shell = tiered(5000)
    ledger = shell.scheduler._policy._ledger  # type: ignore[attr-defined]
    account = ledger.backends["a"]
    shell.ask("p", 800, block_hashes=blocks(1000, 50))
    shell.end("p", 0)
    program = shell.scheduler._state.programs["p"]
    assert ledger.prefill_s(program, account) == 0
    shell.ask("q", 640, block_hashes=blocks(5000, 40))
    kept = ledger.resident_tokens("p", account)
    assert 0 < kept < 800, "the pool has lost some of it"
    assert ledger.prefill_s(program, account) == pytest.approx((800 - kept) * 1e-6)
    shell.send(WeightsUpdating(backends=("a",)))
    shell.send(WeightsUpdated(backends=("a",), version="2"))
    assert ledger.prefill_s(program, account) == pytest.approx(800 * 1e-4), "computed by other weights"


def test_a_peak_that_costs_only_loads_is_no_limit() -> None:
    for offload_tokens, admitted in ((0, []), (5000, ["q"])):
        shell = tiered(offload_tokens, prior_growth=0.5)
        shell.ask("p", 400)
        assert who(shell.ask("q", 360)) == admitted, "400 + 360 fit, with half as much again they do not"


def test_loads_are_no_refill_and_are_learned_from() -> None:
    shell = tiered(5000)
    shell.ask("p", 800, block_hashes=blocks(1000, 50))
    shell.end("p", 0)
    shell.send(ToolStarted(program="p", tool="web"))
    shell.ask("q", 640, block_hashes=blocks(5000, 40))
    shell.end("q", 0)
    shell.send(ProgramEnded(program="q"))
    ledger = shell.scheduler._policy._ledger  # type: ignore[attr-defined]
    account = ledger.backends["a"]
    shell.ask("p", 816, block_hashes=blocks(1000, 51))
    grant, run = next(iter(ledger.programs["p"].runs.items()))
    assert (run.held_tokens + run.loaded_tokens, run.uncached_tokens, run.refill) == (800, 16, False)
    assert account.refill_tokens == 0
    shell.now += 1.0
    seen = account.model._products[5][5]
    shell.send(TurnEnded(program="p", grant=grant, output_tokens=1, cached_tokens=800))
    assert run.loaded_tokens > 0
    assert account.model._products[5][5] > seen


@pytest.mark.parametrize(("offload_tokens", "at_once"), [(0, ["p"]), (5000, [])])
def test_a_program_waits_a_while_for_the_backend_that_can_load_it(offload_tokens: int, at_once: list[str]) -> None:
    shell = tiered(offload_tokens, backends="ab")
    shell.ask("p", 800, block_hashes=blocks(1000, 50))
    shell.ask("q", 800)
    shell.end("p", 0)
    shell.send(ToolStarted(program="p", tool="web"))
    shell.ask("r", 900)
    assert shell.scheduler._state.programs["p"].backend is None, "it gave its place to r"
    shell.ask("s", 10)
    shell.send(ProgramEnded(program="q"))
    assert shell.scheduler._state.backends["b"].num_in_flight == 1
    assert who(shell.ask("p", 816, block_hashes=blocks(1000, 51))) == at_once, "there is room on b"
    if not at_once:
        assert who(shell.tick(0.1)) == []
        assert who(shell.tick(0.1)) == ["p"], "0.08 s of prefill would hold up two turns"
