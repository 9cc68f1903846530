"""What a lost cache costs is what the engines' timing says, and is measured once a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from thunder_rollout.bench.config import BenchConfig
from thunder_rollout.bench.plan import planned_cells
from thunder_rollout.bench.prefill_cost import PrefillCosts, read_prefill_costs
from thunder_rollout.bench.rehearsal import VOCAB_SIZE, stage
from thunder_rollout.engine.virtual_time import run_in_virtual_time


def test_prefill_and_decoding_are_compared_once_a_model(config: BenchConfig, tmp_path: Path):
    plan = planned_cells(config)[0]

    async def measure() -> None:
        async with stage(plan) as (_, engines):
            costs = PrefillCosts(tmp_path)
            await costs.measure(plan, engines, vocab_size=VOCAB_SIZE)
            engines["engine0"].die()
            await costs.measure(plan, engines, vocab_size=VOCAB_SIZE)

    run_in_virtual_time(measure())
    (cost,) = read_prefill_costs(tmp_path)
    assert (cost.model, cost.context_tokens, cost.output_tokens) == ("qwen2_3m", 960, 30)
    assert cost.num_together == 16_384 // 990
    assert cost.prefill_s == pytest.approx(960 * 4e-5 + 960**2 / 2 * 6e-8 + 8e-3, rel=0.1)
    step_s = 8e-3 + 16 * (4e-4 + 975 * 5e-7)
    assert cost.decode_share_s == pytest.approx(29 * step_s / 16, rel=0.15)
    assert cost.ratio == cost.prefill_s / cost.decode_share_s
    assert replace(cost, prefill_s=2.0, decode_share_s=0.5).ratio == 4.0


def test_all_turns_together_fit_the_smallest_engine(config: BenchConfig, tmp_path: Path):
    even = planned_cells(config)[0]
    plan = replace(even, engines=(even.engines[0], replace(even.engines[1], kv_cache_tokens=8_192)))

    async def measure() -> None:
        async with stage(plan) as (_, engines):
            await PrefillCosts(tmp_path).measure(plan, engines, vocab_size=VOCAB_SIZE)

    run_in_virtual_time(measure())
    (cost,) = read_prefill_costs(tmp_path)
    assert cost.num_together == 8_192 // 990
