"""verl's own code makes the router from the file that ships, and asks nothing of it that it does not have."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from verl.workers.rollout import llm_server, router

from thunder_rollout.config import conf_dir
from thunder_rollout.verl_adapter import ProgramRouter

FILE = str(conf_dir() / "verl/thunder_router.yaml")


def test_verl_makes_the_actor_class_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its concurrency groups, that is, and the whole file."""
    made: list[Any] = []
    monkeypatch.setattr(ProgramRouter, "remote", lambda *args: made.append(args))
    router.get_router_handle({"a:1": "handle"}, router_config_path=FILE)
    ((servers, config),) = made
    assert servers == {"a:1": "handle"}
    assert config == router._load_router_yaml(FILE)
    assert ProgramRouter._default_options["concurrency_groups"] == {"acquire": 100_000, "release": 10_000}


def test_it_has_every_method_of_verls_own_with_its_parameters() -> None:
    """Fails where verl's contract changes."""
    ours = ProgramRouter.__ray_metadata__.modified_class
    for contract in (router.RequestLoadBalancer, router.GlobalRequestLoadBalancer):
        for name, method in inspect.getmembers(contract, inspect.isfunction):
            if name.startswith("_"):
                continue
            there = inspect.signature(getattr(ours, name)).parameters
            asked = {n for n, p in inspect.signature(method).parameters.items() if p.kind is not p.VAR_KEYWORD}
            assert asked <= set(there), f"{name} is called with {asked}"


def test_verls_client_sends_what_it_declares_and_no_more() -> None:
    """The declared fields are arguments of `generate`, and those of `acquire_server` beside the id."""
    ours = ProgramRouter.__ray_metadata__.modified_class
    declared = set(inspect.signature(ours.acquire_server).parameters) - {"self", "request_id", "_ray_trace_ctx"}
    assert declared == {"prompt_ids", "sampling_params"}
    assert declared <= set(inspect.signature(llm_server.LLMServerClient.generate).parameters)
    source = inspect.getsource(llm_server.LLMServerClient._release_server)
    assert '"request_id"' in source, "what a release may declare"
    assert "No available servers in load balancer" in inspect.getsource(llm_server.FullyAsyncLLMServerClient)


def test_what_is_read_of_a_server_is_there() -> None:
    """`replica` reads attributes that verl does not promise."""
    from verl.workers.config import RolloutConfig
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    source = inspect.getsource(vLLMHttpServer)
    written = ("_submission_paused = True", "engine = engine_client", "global_steps = global_steps")
    for attribute in written:
        assert f"self.{attribute}" in source
    fields = RolloutConfig.__dataclass_fields__
    read = ("data_parallel_size", "disaggregation", "max_num_seqs", "val_kwargs", "full_determinism")
    assert set(read) | {"temperature", "top_p", "top_k", "enable_prefix_caching", "name"} <= set(fields)
