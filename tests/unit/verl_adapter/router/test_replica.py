"""What is read of verl's server object, and which replicas are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from thunder_rollout.errors import ConfigError
from thunder_rollout.verl_adapter.router.replica import ReplicaState, Sampling, read_facts, read_state

TRAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
GREEDY = {"temperature": 0, "top_p": 1.0, "top_k": -1}


def config(**changes: Any) -> SimpleNamespace:
    settings = {
        "name": "vllm",
        "data_parallel_size": 1,
        "disaggregation": SimpleNamespace(enabled=False),
        "max_num_seqs": 32,
        "val_kwargs": SimpleNamespace(**GREEDY),
        "full_determinism": False,
        "enable_prefix_caching": True,
        **TRAIN,
    }
    return SimpleNamespace(**{**settings, **changes})


def vllm_server(**changes: Any) -> SimpleNamespace:
    cache = SimpleNamespace(num_gpu_blocks=101, block_size=16)
    requests = {"x": SimpleNamespace(prompt_len=7), "y": SimpleNamespace(prompt_len=9)}
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(cache_config=cache, model_config=SimpleNamespace(max_model_len=1024)),
        output_processor=SimpleNamespace(request_states=requests),
        errored=False,
    )
    attributes = {
        "config": config(),
        "model_config": SimpleNamespace(processor=None),
        "engine": engine,
        "global_steps": 3,
        "_submission_paused": False,
    }
    return SimpleNamespace(**{**attributes, **changes})


def test_a_vllm_replica_tells_its_pool_and_how_validation_samples() -> None:
    facts = read_facts(vllm_server(), None, 99)
    assert (facts.capacity_tokens, facts.block_size, facts.max_running) == (1600, 16, 32)
    assert facts.validation == Sampling(**GREEDY)
    assert facts.validation.matches({**GREEDY, "logprobs": True})
    assert not facts.validation.matches({**TRAIN, "logprobs": True})
    assert facts.warnings == ()


def test_validation_that_samples_as_training_does_cannot_be_told_apart() -> None:
    assert read_facts(vllm_server(config=config(val_kwargs=SimpleNamespace(**TRAIN))), None, 16).validation is None


def test_state_is_read_of_attributes_alone() -> None:
    server = vllm_server()
    assert read_state(server) == ReplicaState(paused=False, version=3, prompt_lengths=(7, 9))
    server._submission_paused = True
    server.engine.errored = True
    state = read_state(server)
    assert (state.paused, state.broken) == (True, "its engine core died")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data_parallel_size": 2}, r"data_parallel_size=2: .*use 1 and more replicas"),
        ({"disaggregation": SimpleNamespace(enabled=True)}, r"disaggregation\.enabled=true: .*use false"),
    ],
)
def test_what_has_several_pools_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        read_facts(vllm_server(config=config(**changes)), None, 16)


def test_a_replica_that_does_not_tell_its_capacity_is_refused_or_configured() -> None:
    server = SimpleNamespace(
        config=config(name="sglang"), model_config=SimpleNamespace(processor=None), global_steps=None
    )
    with pytest.raises(ConfigError, match=r"capacity_tokens: .*name=sglang .*set capacity_tokens"):
        read_facts(server, None, 16)
    assert read_facts(server, 5000, 32).capacity_tokens == 5000
    assert read_state(server) == ReplicaState(paused=False, version=None, prompt_lengths=None)


def test_sglang_keeps_its_pause_and_its_requests_itself() -> None:
    """Names of sglang 0.5.12, which verl 0.9.1 pins: `TokenizerManager.is_pause` and `.rid_to_state`."""
    requests = {"x": SimpleNamespace(obj=SimpleNamespace(input_ids=[1, 2, 3]))}
    manager = SimpleNamespace(is_pause=False, rid_to_state=requests)
    server = SimpleNamespace(config=config(name="sglang"), global_steps=3, tokenizer_manager=manager)
    assert read_state(server) == ReplicaState(paused=False, version=3, prompt_lengths=(3,))
    manager.is_pause = True
    assert read_state(server).paused


def test_what_a_run_gives_up_is_said() -> None:
    told = read_facts(vllm_server(config=config(full_determinism=True, enable_prefix_caching=False)), None, 16).warnings
    assert ["full_determinism" in told[0], "enable_prefix_caching" in told[1]] == [True, True]
