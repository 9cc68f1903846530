"""The main job on real parts: the tiny policy on real vLLM engines, acting in real sandboxes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import docker
import pytest

from tests.support import cli
from thunder_rollout.runtime.store import RunStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy() -> str:
    """The tiny policy's folder; trained here if it never was (minutes)."""
    train = [sys.executable, str(ROOT / "recipes" / "tiny_policy" / "train.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(train, check=True, capture_output=True, text=True, env=environment)
    return result.stdout.splitlines()[-1]


def args(policy: str, *more: str) -> list[str]:
    return ["rollout", f"engine.model={policy}", "observe.log_every_s=2", "observe.wandb.mode=disabled", *more]


@pytest.mark.timeout(900)
def test_the_tiny_policy_solves_tasks_in_local_sandboxes(policy, tmp_path):
    code, output = cli.run(tmp_path, *args(policy, "sandbox=local", "task.count=8", "rollout.n=4"))
    assert code == 0, output
    latest = tmp_path / "runs" / "latest"
    summary = cli.summary(latest)
    assert summary["num_samples"] == 32
    assert summary["resolved_rate"] > 0.2
    assert summary["sandbox_backend"] == "local"
    assert summary["failures"] == {}
    assert summary["kv_hit_rate"] > 0.3
    cli.check_agreement(latest)
    rows = cli.rows(latest)
    assert all(row["patch"] for row in rows if row["resolved"])
    assert {turn["backend"] for row in rows for turn in row["turns"]} == {"engine0", "engine1"}


@pytest.mark.docker
@pytest.mark.timeout(900)
def test_a_killed_run_in_docker_leaves_no_container_and_goes_on(policy, tmp_path):
    client = docker.from_env()
    command = args(
        policy, "sandbox=docker", "task.count=8", "rollout.n=2", "rollout.num_engines=1", "rollout.concurrency=4"
    )
    process = cli.start(tmp_path, *command)
    latest = tmp_path / "runs" / "latest"
    finished = cli.wait_for_samples(latest, 4, process, timeout_s=400)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = RunStore(latest.resolve())
    before = {file: file.stat().st_mtime_ns for file in finished}

    code, output = cli.run(tmp_path, *command)
    assert code == 0, output
    assert latest.resolve() == run.folder
    assert {file: file.stat().st_mtime_ns for file in finished} == before
    assert cli.summary(latest)["num_samples"] == 16
    assert cli.summary(latest)["sandbox_backend"] == "docker"
    cli.check_agreement(latest)
    assert client.containers.list(all=True, filters={"label": f"thunder.run={run.run_id}"}) == []


def test_what_vllm_refuses_is_said_without_a_traceback(policy, tmp_path):
    code, output = cli.run(
        tmp_path, *args(policy, "sandbox=local", "engine.max_model_len=100000", "engine.kv_cache_tokens=null")
    )
    assert code == 2, output
    assert "max_model_len" in output
    assert "Traceback" not in output
