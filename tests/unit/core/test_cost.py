from __future__ import annotations

import pytest

from thunder_rollout.core.cost import (
    CostMeter,
    CostShares,
    TurnCost,
    caching_cost,
    decay,
    decode_cost,
    demand_tokens,
    prefill_cost,
    recompute_cost,
    s_pause,
    s_restore,
    unused_cost,
)


def turn(**changes: float) -> TurnCost:
    values: dict[str, float] = {
        "prompt_tokens": 1000,
        "cached_tokens": 600,
        "previous_context_tokens": 900,
        "output_tokens": 100,
        "prefill_s": 2.0,
        "decode_s": 10.0,
    }
    return TurnCost(**{**values, **changes})  # type: ignore[arg-type]


def test_decode_holds_the_prompt_and_half_of_the_output() -> None:
    assert decode_cost(turn()) == 1050 * 10.0


def test_prefill_time_is_split_by_new_and_recomputed_tokens() -> None:
    # 400 prefilled: 300 of them computed before, 100 new
    assert recompute_cost(turn()) == pytest.approx(1000 * 2.0 * 300 / 400)
    assert prefill_cost(turn()) == pytest.approx(1000 * 2.0 * 100 / 400)


def test_a_first_turn_recomputes_nothing() -> None:
    first = turn(cached_tokens=0, previous_context_tokens=0)
    assert recompute_cost(first) == 0
    assert prefill_cost(first) == 2000


def test_a_shrunk_prompt_recomputes_no_more_than_it_has() -> None:
    assert turn(prompt_tokens=500, cached_tokens=0).recomputed_tokens == 500
    assert turn(prompt_tokens=500, cached_tokens=500).prefilled_tokens == 0
    assert recompute_cost(turn(prompt_tokens=500, cached_tokens=500)) == 0


def test_a_cache_shared_with_others_recomputes_nothing() -> None:
    assert turn(cached_tokens=950).recomputed_tokens == 0


def test_what_a_cut_turn_computes_again_is_recomputed() -> None:
    cut = turn(refill_tokens=1100)
    assert (cut.prefilled_tokens, cut.recomputed_tokens) == (400 + 1100, 300 + 1100)
    assert recompute_cost(cut) == pytest.approx(1000 * 2.0 * 1400 / 1500)


def test_caching_and_unused() -> None:
    assert caching_cost(300, 4.0) == 1200
    assert unused_cost(1000, 10.0, 9000) == 1000
    assert unused_cost(1000, 10.0, 11000) == 0


def test_meter_closes_the_account_over_the_capacity() -> None:
    meter = CostMeter()
    meter.add_turn(turn())
    meter.add_hold(1100, 3.0)
    shares = meter.shares(capacity_tokens=2000, wall_s=20.0)
    assert shares.caching == 3300
    assert shares.total == pytest.approx(40_000)
    assert shares.waste == pytest.approx(shares.recompute + shares.unused + shares.caching)
    assert shares.fractions().total == pytest.approx(1.0)
    assert shares.fractions().decode == pytest.approx(10_500 / 40_000)


def test_fractions_of_nothing_are_nothing() -> None:
    assert CostMeter().shares(0, 0.0).fractions() == CostShares()


def test_decay_halves_every_unit_and_never_overflows() -> None:
    assert decay(0, base=2, unit_s=5) == 1
    assert decay(10, base=2, unit_s=5) == 0.25
    assert decay(1e6, base=2, unit_s=1) == 0
    assert decay(7, base=1, unit_s=1) == 1


def test_demand_is_the_left_side_of_equation_7() -> None:
    assert demand_tokens(1000, [(800, 1.0), (400, 2.0)], base=2, unit_s=1) == 1000 + 400 + 100


def test_pause_and_restore_orders() -> None:
    programs = [(100, False), (50, False), (100, True), (50, True)]
    by_pause = sorted(programs, key=lambda p: -s_pause(p[0], acting=p[1]))
    assert by_pause == [(50, True), (100, True), (50, False), (100, False)]
    by_restore = sorted(programs, key=lambda p: -s_restore(p[0], reasoning=not p[1]))
    assert by_restore == [(50, False), (100, False), (50, True), (100, True)]
    assert s_pause(0, acting=False) == 1
