"""What `adaptive` learns: return times, prefill seconds, growth, groups."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunder_rollout.core.policies.adaptive import groups
from thunder_rollout.core.policies.adaptive.groups import Groups
from thunder_rollout.core.policies.adaptive.growth import Growth
from thunder_rollout.core.policies.adaptive.load_curve import LoadCurve
from thunder_rollout.core.policies.adaptive.prefill_model import PrefillModel, ServiceClock
from thunder_rollout.core.policies.adaptive.return_times import ReturnTimes, Survival


def times(**prior: float) -> ReturnTimes:
    return ReturnTimes(**{"decay_base": 2.0, "decay_unit_s": 1.0, "prior_weight": 1.0, **prior})


@pytest.mark.parametrize("elapsed_s", [0.0, 0.3, 7.0, 1e7])
def test_without_data_it_is_the_papers_decay(elapsed_s: float) -> None:
    tool = times().of("bash")
    assert tool.remaining_s(elapsed_s) == pytest.approx(1 / math.log(2), rel=1e-6)
    assert tool.survival(min(elapsed_s, 20.0)) == pytest.approx(2 ** -min(elapsed_s, 20.0))


def test_a_heavy_tail_is_expected_longer_the_longer_it_lasted() -> None:
    rng = random.Random(0)
    known = times()
    samples = [rng.lognormvariate(0, 2) for _ in range(3000)]
    for acted_s in samples:
        known.add("web", acted_s, returned=True)
    tool = known.of("web")
    for elapsed_s in (0.0, 1.0, 10.0):
        left = [acted_s - elapsed_s for acted_s in samples if acted_s > elapsed_s]
        assert tool.remaining_s(elapsed_s) == pytest.approx(statistics.fmean(left), rel=0.35)
        assert tool.survival(elapsed_s) == pytest.approx(len(left) / len(samples), abs=0.05)
    assert tool.remaining_s(10.0) > tool.remaining_s(1.0) > tool.remaining_s(0.0)


def test_censored_programs_count_for_the_seconds_they_were_seen() -> None:
    rng = random.Random(1)
    naive, known = Survival(1.0, 1.0), Survival(1.0, 1.0)
    for _ in range(2000):
        acted_s, cut_s = rng.expovariate(1 / 10), rng.expovariate(1 / 10)
        known.add(min(acted_s, cut_s), returned=acted_s <= cut_s)
        if acted_s <= cut_s:
            naive.add(acted_s, returned=True)
    assert known.remaining_s(0.0) == pytest.approx(10.0, rel=0.15)
    assert naive.remaining_s(0.0) < 7.0


def test_what_still_acts_counts_once_however_often_it_is_told() -> None:
    whole, pieces = Survival(1.0, 1.0), Survival(1.0, 1.0)
    whole.add(7.0, returned=True)
    for seen_s, acted_s in ((0.0, 0.03), (0.03, 1.5), (1.5, 6.5)):
        pieces.add_acting(seen_s, acted_s)
    assert pieces.remaining_s(6.0) > whole.remaining_s(6.0), "it has not returned yet"
    pieces.add(7.0, returned=True, seen_s=6.5)
    assert [pieces.remaining_s(t) for t in (0.0, 1.0, 5.0)] == pytest.approx(
        [whole.remaining_s(t) for t in (0.0, 1.0, 5.0)], rel=1e-4
    )


def test_waiting_is_worth_its_while_for_as_long_as_a_return_is_likely() -> None:
    """Of ten programs nine return within a second and one never: one waits a second for a return, not for ever."""
    known = Survival(1.0, 1.0)
    for _ in range(200):
        for _ in range(9):
            known.add(0.9, returned=True)
        known.add_acting(0.0, 500.0)
    assert known.remaining_s(0.0) > 20.0
    assert known.holding_s(0.0) == pytest.approx(0.9 / 0.9 + 0.1, rel=0.2)
    assert known.holding_s(10.0) > 400.0
    assert known.holding_s(1e7) > 800.0


def test_where_waiting_always_pays_it_costs_what_it_is_expected_to() -> None:
    tool = times().of("bash")
    assert [tool.holding_s(t) for t in (0.0, 3.0, 1e7)] == pytest.approx([tool.remaining_s(t) for t in (0.0, 3.0, 1e7)])


def test_a_new_tool_borrows_from_the_others() -> None:
    known = times()
    for _ in range(50):
        known.add("bash", 0.1, returned=True)
    assert known.of("never seen").remaining_s(0.0) == pytest.approx(0.1, rel=0.5)
    known.add("slow", 30.0, returned=True)
    assert known.of("slow").remaining_s(0.0) > known.of("bash").remaining_s(0.0)


def test_prefill_seconds_are_found_again() -> None:
    rng = random.Random(2)
    model = PrefillModel(prior_token_s=1e-4, forgetting=0.995)
    assert model.prefill_s(1000, 2000) == pytest.approx(0.1)
    for _ in range(500):
        uncached, output, beside = rng.choice([200, 400, 3000]), rng.randrange(20, 200), rng.randrange(1, 9)
        prompt = uncached + rng.randrange(4000)
        duration_s = 0.05 + 2e-5 * uncached + 1e-8 * uncached * prompt + 1e-3 * output * beside
        model.add(
            uncached_tokens=uncached,
            prompt_tokens=prompt,
            output_tokens=output,
            duration_s=duration_s * rng.uniform(0.9, 1.1),
            service_s=duration_s / beside,
        )
    assert model.prefill_s(3000, 4000) == pytest.approx(2e-5 * 3000 + 1e-8 * 3000 * 4000, rel=0.3)
    assert model.prefill_s(0, 4000) == 0


def test_load_seconds_are_found_again() -> None:
    rng = random.Random(3)
    model = PrefillModel(prior_token_s=1e-4, prior_load_token_s=3e-6, forgetting=0.995)
    assert model.load_s(1000) == pytest.approx(3e-3)
    for _ in range(500):
        uncached, loaded = rng.choice([200, 3000]), rng.choice([0, 1000, 20_000])
        duration_s = 0.05 + 2e-5 * uncached + 5e-6 * loaded
        model.add(
            uncached_tokens=uncached,
            loaded_tokens=loaded,
            prompt_tokens=uncached + loaded,
            output_tokens=100,
            duration_s=duration_s * rng.uniform(0.9, 1.1),
            service_s=duration_s,
        )
    assert model.load_s(1000) == pytest.approx(5e-3, rel=0.2)
    assert model.prefill_s(3000, 4000) == pytest.approx(2e-5 * 3000, rel=0.3)


def test_prefill_is_never_for_free() -> None:
    model = PrefillModel(prior_token_s=1e-4, forgetting=1.0)
    for uncached in (100, 1000, 5000) * 5:
        model.add(
            uncached_tokens=uncached, prompt_tokens=uncached, output_tokens=10, duration_s=1 / uncached, service_s=0.0
        )
    assert model.prefill_s(1000, 1000) > 0


def test_a_turn_is_served_its_even_share() -> None:
    clock = ServiceClock()
    clock.num_in_flight = 2
    clock.advance(4.0)
    clock.num_in_flight = 1
    clock.advance(5.0)
    clock.num_in_flight = 0
    clock.advance(6.0)
    assert clock.served_s == 2.0 + 1.0 + 1.0


POINTS = (0.0, 250.0, 1000.0, 4000.0, 8000.0)


def test_a_context_is_expected_to_end_where_those_of_its_kind_did() -> None:
    growth = Growth(prior_growth=0.5)
    for final in (1000, 2000, 6000) * 100:
        growth.add_end("swe", final)
    growth.add_turn("swe", 300)
    assert growth.curve("swe", 900, POINTS) == pytest.approx([900, 1150 * 2 / 3, 1900 * 2 / 3, 4900 / 3, 0], rel=0.01)
    assert growth.curve("swe", 5000, POINTS) == [5000, 5250, 0, 0, 0]
    assert growth.curve("swe", 9000, POINTS) == [9000, 9250, 0, 0, 0], "longer than any: a turn more at most"
    assert growth.output_tokens("other") == 300


def test_before_any_end_a_context_is_expected_to_reach_what_others_have() -> None:
    growth = Growth(prior_growth=0.5)
    assert growth.curve("swe", 1000, POINTS) == [1000, 1250, 0, 0, 0], "half as much again, then it ends"
    growth.reach("swe", 3000)
    assert growth.curve("swe", 1000, POINTS) == [1000, 1250, 2000, 0, 0]
    assert growth.curve("other", 1000, POINTS) == [1000, 1250, 0, 0, 0]


def test_the_first_ends_are_the_short_ones_and_count_with_what_was_expected() -> None:
    growth = Growth(prior_growth=0.0)
    growth.reach("swe", 6000)
    for _ in range(4):
        growth.add_end("swe", 1200)
    assert growth.curve("swe", 1000, POINTS) == [1000, 625, 1000, 2500, 0], "half of the weight each"


def test_only_recent_ends_are_remembered() -> None:
    growth = Growth(prior_growth=0.5)
    for final in (*range(100, 400), *[5000] * 256):
        growth.add_end(None, final)
    assert growth.curve(None, 100, POINTS) == [100, 350, 1100, 4100, 0]


@given(finals=st.lists(st.integers(1, 9000), max_size=20), context=st.integers(1, 9000))
def test_a_curve_starts_at_the_context_and_never_passes_certain_growth(finals: list[int], context: int) -> None:
    growth = Growth(prior_growth=0.5)
    for final in finals:
        growth.add_end(None, final)
    curve = growth.curve(None, context, POINTS)
    assert curve[0] == context
    assert all(0 <= tokens <= (context + point) * (1 + 1e-9) for tokens, point in zip(curve, POINTS, strict=True))


@pytest.mark.parametrize("crowding", [0.0, 0.5, 1.0])
def test_crowding_is_how_turns_slow_down_beside_others(crowding: float) -> None:
    rng = random.Random(3)
    model = PrefillModel(prior_token_s=1e-4, forgetting=0.995)
    assert model.crowding == 1.0, "careful before anything was seen"
    for _ in range(2000):
        uncached, output, beside = rng.randrange(100, 900), rng.randrange(20, 200), rng.uniform(2, 30)
        duration_s = output * 0.01 * beside**crowding * rng.uniform(0.9, 1.1)
        model.add(
            uncached_tokens=uncached,
            prompt_tokens=5000,
            output_tokens=output,
            duration_s=duration_s,
            service_s=duration_s / beside,
        )
    assert model.crowding == pytest.approx(crowding, abs=0.15), "but for the pull of the prior"


def test_levels_of_load_are_remembered_while_the_engine_is_at_another() -> None:
    curve = LoadCurve()
    for beside, second in ((4.0, 0.1), (8.0, 0.1)):
        for _ in range(200):
            curve.add(beside=beside, tokens=10, duration_s=second)
    assert curve.crowding() < 0.7, "but for the pull of the prior"


def test_a_load_that_never_moves_says_nothing_of_crowding() -> None:
    rng = random.Random(3)
    curve = LoadCurve()
    for _ in range(1000):
        curve.add(beside=10 * rng.uniform(0.95, 1.05), tokens=10, duration_s=rng.uniform(0.1, 0.3))
    assert curve.crowding() > 0.9


def test_turns_without_tokens_are_counted_by_themselves() -> None:
    curve = LoadCurve()
    for beside in (2.0, 16.0) * 300:
        curve.add(beside=beside, tokens=1, duration_s=beside)
    assert curve.crowding() == pytest.approx(1.0, abs=0.01)


def test_a_group_is_as_complete_as_its_ended_share(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Groups()
    for name in "abc":
        known.join("g", name)
    known.leave("g", "a")
    assert known.complete_share("g") == pytest.approx(1 / 3)
    assert set(known.reordered) == {"a", "b", "c"}
    assert known.complete_share(None) == known.complete_share("other") == 0.0
    monkeypatch.setattr(groups, "MAX_GROUPS", 1)
    known.join("h", "d")
    known.leave("g", "b")
    assert known.complete_share("g") == 0.0
