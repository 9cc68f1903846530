from __future__ import annotations

import pytest

from thunder_rollout.errors import ConfigError
from thunder_rollout.sandbox import docker_engine, local
from thunder_rollout.sandbox.config import SandboxConfig, select_backend
from thunder_rollout.sandbox.docker_engine import probe_engine
from thunder_rollout.sandbox.protocol import SandboxLimits
from thunder_rollout.sandbox.variables import common_variables

NOBODY = "unix:///no/such/docker.sock"


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("backend", {"backend": "podman"}),
        ("network", {"network": "host"}),
        ("cpu_shares", {"cpu_shares": 1}),
        ("when_paused", {"when_paused": "kill"}),
        ("max_starts", {"max_starts": 0}),
        ("max_sandboxes", {"max_sandboxes": 0}),
        ("start_timeout_s", {"start_timeout_s": -1.0}),
        ("limits.memory_bytes", {"limits": SandboxLimits(memory_bytes=1)}),
        ("limits.cpus", {"limits": SandboxLimits(cpus=0.001)}),
        ("limits.pids", {"limits": SandboxLimits(pids=1)}),
        ("limits.disk_bytes", {"limits": SandboxLimits(disk_bytes=1)}),
        ("limits.output_bytes", {"limits": SandboxLimits(output_bytes=1)}),
        ("limits.ttl_s", {"limits": SandboxLimits(ttl_s=0)}),
    ],
)
def test_a_bad_value_names_its_field(field: str, config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"sandbox\.{field}="):
        SandboxConfig(**config)


def test_thread_pools_are_as_large_as_the_sandbox() -> None:
    for cpus, num_threads in ((0.5, "1"), (1.0, "1"), (3.5, "3")):
        variables = common_variables(SandboxLimits(cpus=cpus))
        assert {variables[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMAXPROCS")} == {num_threads}


def test_an_engine_that_is_not_there_does_not_answer() -> None:
    probe = probe_engine(NOBODY)
    assert probe.version is None
    assert probe.address == NOBODY
    assert probe.error


def test_auto_is_local_without_an_engine_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "local_unavailable", lambda: None)
    choice = select_backend(SandboxConfig(docker_host=NOBODY))
    assert choice.backend == "local"
    assert f"no Docker engine answers at {NOBODY}" in choice.reason


def test_auto_is_docker_with_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = docker_engine.EngineProbe(address=NOBODY, version="99.0")
    monkeypatch.setattr(docker_engine, "probe_engine", lambda docker_host: probe)
    choice = select_backend(SandboxConfig())
    assert choice.backend == "docker"
    assert "99.0" in choice.reason


def test_docker_asked_for_and_not_there_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"use sandbox\.backend=local"):
        select_backend(SandboxConfig(backend="docker", docker_host=NOBODY))


def test_nothing_to_be_had_says_why_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "local_unavailable", lambda: "no user namespaces")
    for backend in ("auto", "local"):
        with pytest.raises(ConfigError, match="no user namespaces"):
            select_backend(SandboxConfig(backend=backend, docker_host=NOBODY))
