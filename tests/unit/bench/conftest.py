"""A small bench: two engines of 16k KV tokens, short programs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from thunder_rollout.bench.config import BenchConfig, CellsConfig, PlanConfig, ToolConfig, WorkloadConfig
from thunder_rollout.engine.config import EngineConfig

WORKLOAD = WorkloadConfig(
    prompt_tokens=300,
    observation_tokens=150,
    output_tokens=30,
    num_turns=8,
    tools=[ToolConfig(name="shell", mean_s=0.1)],
)


@pytest.fixture
def config(tmp_path) -> BenchConfig:
    cells = CellsConfig(
        workload="short_tools", policies=["sticky", "thunder"], loads=[0.5, 3.0], seeds=[0, 1], warmup_s=4, measure_s=10
    )
    return BenchConfig(
        engine=EngineConfig(model="fake", kind="fake", kv_cache_tokens=16_384, max_model_len=8_192),
        plan=PlanConfig(name="bench", cells=[cells]),
        workload={
            "short_tools": WORKLOAD,
            "groups": replace(WORKLOAD, group_size=4),
            "weight_updates": replace(WORKLOAD, weight_update_s=10.0),
            "uneven_engines": replace(WORKLOAD, kv_shares=[1.0, 0.5]),
        },
        runs_dir=str(tmp_path),
    )
