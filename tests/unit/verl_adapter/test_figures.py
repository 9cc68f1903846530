"""What verl's logger is given of a batch."""

from __future__ import annotations

from thunder_rollout.verl_adapter.figures import agent_loop_timing, thunder_figures

METRICS = [
    {"generate_sequences": 3.0, "tool_calls": 1.0, "compute_score": 0.5, "num_preempted": 0},
    {"generate_sequences": 1.0, "tool_calls": 9.0, "compute_score": 0.0, "num_preempted": 2},
    {"generate_sequences": 2.0},  # another loop's, which leaves out what it has not
]
TAGS = [
    {"prompt_len": 10, "response_len": 20},
    {"prompt_len": 11, "response_len": 21},
    {"prompt_len": 1, "response_len": 2},
]


def row(**figures: float) -> dict[str, float]:
    zero = ("turns", "held_s", "engine_s", "tool_s", "sandbox_wait_s", "grade_s", "output_tokens", "prompt_tokens")
    return dict.fromkeys((*zero, "cached_tokens", "masked"), 0.0) | {"attempts": 1.0} | figures


def test_verls_own_timing_bears_verls_names() -> None:
    values = agent_loop_timing(METRICS, TAGS)
    assert values["timing_s/agent_loop/generate_sequences/mean"] == 2.0
    assert (values["timing_s/agent_loop/tool_calls/min"], values["timing_s/agent_loop/tool_calls/max"]) == (0.0, 9.0)
    assert values["timing_s/agent_loop/slowest/tool_calls"] == 9.0
    assert values["timing_s/agent_loop/slowest/response_length"] == 21.0


def test_hits_are_those_of_all_prompts_together_and_ends_are_shares() -> None:
    rows = [
        row(turns=2.0, prompt_tokens=100.0, cached_tokens=90.0, **{"end/submitted": 1.0}),
        row(turns=4.0, prompt_tokens=300.0, cached_tokens=110.0, masked=1.0, attempts=3.0, **{"end/max_turns": 1.0}),
    ]
    values = thunder_figures(rows)
    assert (values["thunder/turns/mean"], values["thunder/turns/max"]) == (3.0, 4.0)
    assert values["thunder/kv_hit_rate"] == 0.5
    assert (values["thunder/end/submitted"], values["thunder/end/max_turns"]) == (0.5, 0.5)
    assert (values["thunder/masked"], values["thunder/attempts/mean"]) == (0.5, 2.0)


def test_rows_of_other_loops_and_of_failures_give_no_figures() -> None:
    assert thunder_figures([None, {"failure": "engine_died"}]) == {}
    assert agent_loop_timing([], []) == {}
